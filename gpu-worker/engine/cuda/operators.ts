/** Operators of our own in CUDA's graphs: each queues a kernel of cuda/. */
import { Attention, type Paging } from "../../cuda/attention.ts";
import type { Cuda } from "../../cuda/driver.ts";
import type { Elementwise, Float } from "../../cuda/elementwise.ts";
import type { Products } from "../../cuda/products.ts";
import type { DecoderLayerConfig } from "../../model/layers.ts";
import { linearName } from "../../ops/matmul.ts";
import { normName } from "../../ops/norm.ts";
import type { CustomOp } from "../custom-op.ts";
import { DTYPES } from "../tensor.ts";

export function attentionOp(
  cuda: Cuda,
  name: string,
  { heads, kvHeads, headSize }: DecoderLayerConfig,
  dtype: Float,
  paging: Paging,
): CustomOp {
  const attention = new Attention(cuda, { dtype, heads, kvHeads, headSize }, paging);
  const float = DTYPES[dtype].onnx;
  const [f32, i32] = [DTYPES.f32.onnx, DTYPES.i32.onnx];
  return {
    name,
    inputs: [float, float, float, float, f32, f32, i32, i32, i32],
    optional: 1,
    columns: () => heads * headSize,
    compute([qkv, bias, key, value, cos, sin, positions, mask, control], [out], { rows, dims }) {
      const [sequences, words] = dims(8);
      const memory = { qkv, bias, key, value, cos, sin, positions, mask, control, out };
      attention.launch(memory, rows, sequences, words === 8);
    },
  };
}

export function gatedSiluOp(elementwise: Elementwise, dtype: Float): CustomOp {
  return {
    name: "GatedSilu",
    inputs: [DTYPES[dtype].onnx],
    columns: (columns) => columns / 2,
    compute: ([x], [out], { rows, columns }) => elementwise.gatedSilu(out, x, rows, columns / 2, dtype),
  };
}

export function pairRowsOp(elementwise: Elementwise, dtype: Float, width: number): CustomOp {
  const [float, i64] = [DTYPES[dtype].onnx, DTYPES.i64.onnx];
  return {
    name: "PairRows",
    inputs: [float, float, i64, float, i64],
    columns: () => 2 * width,
    compute([keep, table, ids, hidden, hiddenRows], [out], { rows }) {
      elementwise.pairRows(out, { keep, table, ids, hidden, hiddenRows }, rows, width, dtype);
    },
  };
}

/** x + y, whose rows may be one for all; `picks`: and rows of the sum by index. */
export function addRowsOp(elementwise: Elementwise, dtype: Float, picks: boolean): CustomOp {
  const [float, i64] = [DTYPES[dtype].onnx, DTYPES.i64.onnx];
  return {
    name: picks ? "AddPickRows" : "AddRows",
    inputs: picks ? [float, float, i64] : [float, float],
    ...(picks && { outputs: 2, rowsOf: [0, 2] }),
    columns: (columns) => columns,
    compute([x, y, index = 0n], [sum, picked = 0n], { rows, columns: width, dims }) {
      const [[yRows], [count]] = [dims(1), picks ? dims(2) : [0]];
      elementwise.addRows({ sum, picked }, { x, y, index }, { rows, yRows, picks: count, width }, dtype);
    },
  };
}

export function addRmsNormOp(elementwise: Elementwise, dtype: Float, epsilon: number): CustomOp {
  const float = DTYPES[dtype].onnx;
  return {
    name: normName(epsilon),
    inputs: [float, float, float],
    optional: 1,
    outputs: 2,
    columns: (columns) => columns,
    compute([x, residual, weight], [norm, sum], { rows, columns }) {
      elementwise.addRmsNorm({ norm, sum }, { x, residual, weight }, rows, columns, epsilon, dtype);
    },
  };
}

/** A product with a weight matrix; `roughly`: of few rows with the matrix rounded to bytes. */
export function linearOp(products: Products, dtype: Float, roughly = false): CustomOp {
  const float = DTYPES[dtype].onnx;
  return {
    name: linearName(roughly),
    inputs: [float, float],
    columns: (_inner, dims) => dims(1)[1],
    compute: ([x, w], [y], { rows, columns: inner, width: columns }) =>
      products.launch(y, x, w, { rows, inner, columns }, roughly),
  };
}

/** Two products with paired matrices, and the gated SiLU of them; its second output is for them both. */
export function gatedLinearOp(products: Products, dtype: Float): CustomOp {
  const float = DTYPES[dtype].onnx;
  return {
    name: "GatedLinear",
    inputs: [float, float],
    outputs: 2,
    columns: (_inner, dims, output) => dims(1)[1] / (output === 0 ? 2 : 1),
    compute: ([x, w], [y, both], { rows, columns: inner, dims }) =>
      products.launchGated(y, both, x, w, { rows, inner, columns: dims(1)[1] }),
  };
}
