/** The operators of our own that CUDA's graphs have, in plain TypeScript on the CPU, and the weights that those graphs bind. */
import { closeSync, openSync, readSync } from "node:fs";
import koffi from "koffi";
import { toFloats } from "../../gpu-worker/checkpoint/convert.ts";
import type { CustomOp } from "../../gpu-worker/engine/custom-op.ts";
import type { FixedInput, Runtime } from "../../gpu-worker/engine/runtime.ts";
import { DTYPES, type Tensor } from "../../gpu-worker/engine/tensor.ts";
import type { BoundWeight, Graph, StoredTensor } from "../../gpu-worker/graph/graph.ts";
import type { DecoderLayerConfig } from "../../gpu-worker/model/layers.ts";
import { normName } from "../../gpu-worker/ops/norm.ts";

const F32 = DTYPES.f32.onnx;
const [I32, I64] = [DTYPES.i32.onnx, DTYPES.i64.onnx];

export const bytesAt = (address: bigint, bytes: number): ArrayBuffer => koffi.view(address, bytes);
const f32 = (address: bigint, n: number) => new Float32Array(bytesAt(address, 4 * n));
const i32 = (address: bigint, n: number) => new Int32Array(bytesAt(address, 4 * n));
const i64 = (address: bigint, n: number) => new BigInt64Array(bytesAt(address, 8 * n));

/** Turns a head's pairs half a head apart, in place. */
function turn(head: Float32Array, cos: Float32Array, sin: Float32Array): void {
  for (const [i, c] of cos.entries()) {
    const [a, b] = [head[i], head[i + cos.length]];
    head[i] = a * c - b * sin[i];
    head[i + cos.length] = b * c + a * sin[i];
  }
}

/** Softmax over the rows that begin at `seen` of the keys, times the values. */
function attend(query: Float32Array, keys: Float32Array, values: Float32Array, seen: number[], out: Float32Array) {
  const scores = seen.map((at) => {
    let score = 0;
    for (let d = 0; d < query.length; d++) score += query[d] * keys[at + d];
    return score / Math.sqrt(query.length);
  });
  const top = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - top));
  const total = weights.reduce((a, b) => a + b, 0);
  out.fill(0);
  for (const [i, at] of seen.entries())
    for (let d = 0; d < out.length; d++) out[d] += (weights[i] / total) * values[at + d];
}

/** What cuda/attention-common.cu says; `capacity`: rows of every cache. */
export function attentionOp(name: string, shape: DecoderLayerConfig, capacity: number): CustomOp {
  const { heads, kvHeads, headSize } = shape;
  const width = (heads + 2 * kvHeads) * headSize;
  return {
    name,
    inputs: [F32, F32, F32, F32, F32, F32, I32, I32, I32],
    optional: 1,
    columns: () => heads * headSize,
    compute([qkv, bias, key, value, cos, sin, positions, mask, control], [out], { rows: tokens }) {
      const added = bias ? f32(bias, width) : new Float32Array(width);
      const x = f32(qkv, tokens * width).map((element, i) => element + added[i % width]);
      const [past, first, causal] = i32(control, 4);
      const [place, bits] = [i32(positions, tokens), i32(mask, 4 * tokens)];
      const angles = [cos, sin].map((table) => f32(table, ((Math.max(...place) + 1) * headSize) / 2));
      const [keys, values] = [key, value].map((cache) => f32(cache, kvHeads * capacity * headSize));
      const head = (t: number, h: number) => x.subarray(t * width + h * headSize, t * width + (h + 1) * headSize);
      const row = (kv: number, column: number) => (kv * capacity + column) * headSize;
      for (let t = 0; t < tokens; t++) {
        const [c, s] = angles.map((table) =>
          table.subarray((place[t] * headSize) / 2, ((place[t] + 1) * headSize) / 2),
        );
        for (let h = 0; h < heads + kvHeads; h++) turn(head(t, h), c, s);
        for (let kv = 0; kv < kvHeads; kv++) {
          keys.set(head(t, heads + kv), row(kv, past + first + t));
          values.set(head(t, heads + kvHeads + kv), row(kv, past + first + t));
        }
      }
      const sees = (t: number, j: number) => (causal ? j <= t : (bits[4 * t + (j >> 5)] >> (j & 31)) & 1);
      const results = f32(out, tokens * heads * headSize);
      for (let t = 0; t < tokens; t++) {
        const columns = Array.from({ length: past + first + tokens }, (_, i) => i).filter((i) => i < past || sees(t, i - past)); // biome-ignore format: one line
        for (let h = 0; h < heads; h++) {
          const seen = columns.map((column) => row(Math.floor((h * kvHeads) / heads), column));
          const at = (t * heads + h) * headSize;
          attend(head(t, h), keys, values, seen, results.subarray(at, at + headSize));
        }
      }
    },
  };
}

export const gatedSiluOp: CustomOp = {
  name: "GatedSilu",
  inputs: [F32],
  columns: (columns) => columns / 2,
  compute([x], [out], { rows, columns }) {
    const [from, to, inner] = [f32(x, rows * columns), f32(out, (rows * columns) / 2), columns / 2];
    for (let i = 0; i < to.length; i++) {
      const at = Math.floor(i / inner) * columns + (i % inner);
      to[i] = (from[at] / (1 + Math.exp(-from[at]))) * from[at + inner];
    }
  },
};

/** Where number i of two halves is that go by turns, eight of each. */
const pairedAt = (i: number, half: number) =>
  16 * Math.floor((i % half) / 8) + 8 * Math.floor(i / half) + ((i % half) % 8);

export const gatedLinearOp: CustomOp = {
  name: "GatedLinear",
  inputs: [F32, F32],
  outputs: 2,
  columns: (_inner, dims, output) => dims(1)[1] / (output === 0 ? 2 : 1),
  compute([x, w], [y, both], shape) {
    const { rows, width: half, dims } = shape;
    linearOp.compute([x, w], [both], { ...shape, width: dims(1)[1] });
    const [from, to] = [f32(both, rows * 2 * half), f32(y, rows * half)];
    for (let i = 0; i < to.length; i++) {
      const row = from.subarray(Math.floor(i / half) * 2 * half);
      const [gate, up] = [i % half, half + (i % half)].map((at) => row[pairedAt(at, half)]);
      to[i] = (gate / (1 + Math.exp(-gate))) * up;
    }
  },
};

export const linearOp: CustomOp = {
  name: "Linear",
  inputs: [F32, F32],
  columns: (_inner, dims) => dims(1)[1],
  compute([x, w], [y], { rows, columns: inner, width: columns }) {
    const [from, weights, out] = [f32(x, rows * inner), f32(w, inner * columns), f32(y, rows * columns).fill(0)];
    for (const [at, value] of from.entries()) {
      const [row, k] = [Math.floor(at / inner), at % inner];
      for (let c = 0; c < columns; c++) out[row * columns + c] += value * weights[k * columns + c];
    }
  },
};

export function addRmsNormOp(epsilon: number): CustomOp {
  return {
    name: normName(epsilon),
    inputs: [F32, F32, F32],
    optional: 1,
    outputs: 2,
    columns: (columns) => columns,
    compute([x, residual, weight], [norm, sum], { rows, columns }) {
      const [sums, norms, scale] = [f32(sum, rows * columns), f32(norm, rows * columns), f32(weight, columns)];
      sums.set(f32(x, rows * columns));
      if (residual) for (const [i, value] of f32(residual, rows * columns).entries()) sums[i] += value;
      for (let at = 0; at < sums.length; at += columns) {
        const row = sums.subarray(at, at + columns);
        const rms = Math.sqrt(row.reduce((total, value) => total + value * value, 0) / columns + epsilon);
        for (let i = 0; i < columns; i++) norms[at + i] = (row[i] / rms) * scale[i];
      }
    },
  };
}

export function addRowsOp(picks: boolean): CustomOp {
  return {
    name: picks ? "AddPickRows" : "AddRows",
    inputs: picks ? [F32, F32, I64] : [F32, F32],
    ...(picks && { outputs: 2, rowsOf: [0, 2] }),
    columns: (columns) => columns,
    compute([x, y, index], [sum, picked], { rows, columns, dims }) {
      const [from, other, sums] = [f32(x, rows * columns), f32(y, dims(1)[0] * columns), f32(sum, rows * columns)];
      for (const [i, value] of from.entries()) sums[i] = value + other[i % other.length];
      if (!picks) return;
      for (const [i, row] of i64(index, dims(2)[0]).entries())
        f32(picked, dims(2)[0] * columns).set(
          sums.subarray(Number(row) * columns, (Number(row) + 1) * columns),
          i * columns,
        );
    },
  };
}

export function pairRowsOp(width: number): CustomOp {
  return {
    name: "PairRows",
    inputs: [F32, F32, I64, F32, I64],
    columns: () => 2 * width,
    compute([keep, table, ids, hidden, hiddenRows], [out], { rows }) {
      const to = f32(out, rows * 2 * width).fill(0);
      const half = (from: bigint, row: bigint) => f32(from + row * BigInt(4 * width), width);
      for (const [i, kept] of f32(keep, rows).entries()) {
        if (kept === 0) continue;
        to.set(half(table, i64(ids, rows)[i]), 2 * i * width);
        to.set(half(hidden, i64(hiddenRows, rows)[i]), (2 * i + 1) * width);
      }
    },
  };
}

function numbers({ file, offset, bytes, dtype }: StoredTensor): Float32Array {
  const raw = new Uint8Array(bytes);
  const descriptor = openSync(file, "r");
  readSync(descriptor, raw, 0, bytes, offset);
  closeSync(descriptor);
  return toFloats(raw, dtype.toUpperCase());
}

/** Parts below each other, rows picked, zeros after them, turned: what engine/cuda/weights.ts does on the device. */
function arranged({ value, parts, turned, picked, rows, paired }: BoundWeight): Float32Array {
  const height = value.shape[turned ? 1 : 0] as number;
  const out = new Float32Array((value.shape as number[]).reduce((a, b) => a * b, 1));
  let at = 0;
  for (const part of parts) {
    const stored = numbers(part);
    const columns = stored.length / part.shape[0];
    const taken = picked ?? Array.from({ length: part.shape[0] }, (_, i) => i);
    for (const [i, row] of taken.entries())
      for (let c = 0; c < columns; c++)
        out[turned ? c * height + (paired ? pairedAt(at + i, height / 2) : at + i) : (at + i) * columns + c] =
          stored[row * columns + c];
    at += picked?.length ?? rows ?? part.shape[0];
  }
  return out;
}

/** Gives what graphs bind, in f32; those that ask for the same share it. */
export function weightsOn(runtime: Runtime): (graph: Graph) => FixedInput[] {
  const known = new Map<string, Tensor>();
  return ({ bound }) =>
    [...bound].map(([key, weight]) => {
      const { name, shape } = weight.value;
      if (!known.has(key)) {
        const values = arranged(weight);
        known.set(key, runtime.tensor("f32", values.length));
        known.get(key)!.f32.set(values);
      }
      return { name, tensor: known.get(key)!, dims: shape as number[] };
    });
}
