/** Products with matrices: names are ONNX's. */
import type { Dim, Graph, Value } from "../graph/graph.ts";
import { CUSTOM_DOMAIN } from "../graph/onnx.ts";
import { broadcast, cast } from "./elementwise.ts";

/** a [..,m,k] · b [..,k,n]. */
export function matMul(g: Graph, a: Value, b: Value): Value {
  const [k, inner] = [a.shape.at(-1), b.shape.at(-2)];
  if (typeof k === "number" && typeof inner === "number" && k !== inner)
    throw new Error(`MatMul of [${a.shape}] and [${b.shape}]: ${k} is not ${inner}`);
  const batch: Dim[] = broadcast(a.shape.slice(0, -2), b.shape.slice(0, -2));
  return g.node("MatMul", [a, b], [{ dtype: a.dtype, shape: [...batch, a.shape.at(-2)!, b.shape.at(-1)!] }])[0];
}

/** The operator of our own for products with weights, exact or through bytes. */
export const linearName = (int8: boolean) => (int8 ? "Linear8" : "Linear");

/** x [T,k] · w [k,n], w bound: by an operator of our own where numbers of rows come again. */
export function boundProduct(g: Graph, x: Value, w: Value): Value {
  if (!g.options.searched) return matMul(g, x, w);
  const out = { dtype: x.dtype, shape: [x.shape[0], w.shape[1]] };
  return g.node(linearName(g.options.int8), [x, w], [out], {}, CUSTOM_DOMAIN)[0];
}

/**
 * silu(x·gate) · (x·up) for x [T,k] and w [k,2n], where `gate` and `up` are bound as paired; by an operator of our own, whose
 * second output is its scratch memory.
 */
export function gatedProduct(g: Graph, x: Value, w: Value): Value {
  const [rows, columns] = [x.shape[0], w.shape[1] as number];
  const outputs = [columns / 2, columns].map((n) => ({ dtype: x.dtype, shape: [rows, n] }));
  return g.node("GatedLinear", [x, w], outputs, {}, CUSTOM_DOMAIN)[0];
}

/** a [m,k] · b [n,k]ᵀ + c, c broadcast to [m,n]. */
export function gemm(g: Graph, a: Value, b: Value, c: Value): Value {
  if (a.shape[1] !== b.shape[1]) throw new Error(`Gemm of [${a.shape}] and [${b.shape}]ᵀ`);
  return g.node("Gemm", [a, b, c], [{ dtype: a.dtype, shape: [a.shape[0], b.shape[0]] }], { transB: 1 })[0];
}

/** Largest integer of a matrix: CPUs without VNNI add two products with bytes in 16 bits, which must not overflow. */
const LARGEST = Math.floor(2 ** 15 / (2 * 255)) - 1;

/**
 * a [..,m,k] · b [k,n] in 8-bit integers: the constant b with one scale a column, a with one a run (DynamicQuantizeMatMul).
 * The scales and integers of b are worked out when the session loads. About 1 % relative error.
 */
export function int8MatMul(g: Graph, a: Value, b: Value): Value {
  const [k, n] = b.shape;
  const one = (op: string, inputs: Value[], shape: readonly Dim[]) => g.node(op, inputs, [{ dtype: "f32", shape }])[0];
  const largest = g.node("ReduceMax", [one("Abs", [b], b.shape), g.ints([0])], [{ dtype: "f32", shape: [n] }], {
    keepdims: 0,
  })[0];
  const scale = one("Div", [largest, g.floats([LARGEST])], [n]);
  const rounded = one("Round", [one("Div", [b, scale], [k, n])], [k, n]);
  const integers = cast(g, rounded, "i8");
  const out = { dtype: a.dtype, shape: [...a.shape.slice(0, -1), n] };
  return g.node("DynamicQuantizeMatMul", [a, integers, scale], [out], {}, "com.microsoft")[0];
}

/**
 * a [..,m,k] · Bᵀ with B [n,k] in integers of 4 or 8 bits: packed u8 [n, blocks, bytes a block], the lower half of a byte
 * first; scales [n, blocks]; no zero points (8 or 128 stands for 0). Products are made in a's type.
 */
export function matMulNBits(g: Graph, a: Value, packed: Value, scales: Value, k: number): Value {
  const [n, blocks, bytes] = packed.shape as number[];
  const size = Math.ceil(k / blocks);
  if (scales.shape[0] !== n || scales.shape[1] !== blocks || a.shape.at(-1) !== k)
    throw new Error(`MatMulNBits of [${a.shape}] and [${packed.shape}] with scales [${scales.shape}]`);
  const attributes = { K: k, N: n, bits: (8 * bytes) / size, block_size: size };
  const out = { dtype: a.dtype, shape: [...a.shape.slice(0, -1), n] };
  return g.node("MatMulNBits", [a, packed, scales], [out], attributes, "com.microsoft")[0];
}
