/** Operations on each element: names are ONNX's. */
import { DTYPES, type DType } from "../engine/tensor.ts";
import type { Dim, Graph, Value } from "../graph/graph.ts";
import { CUSTOM_DOMAIN } from "../graph/onnx.ts";

/** Shape of two operands by NumPy's broadcasting rule. */
export function broadcast(a: readonly Dim[], b: readonly Dim[]): Dim[] {
  const rank = Math.max(a.length, b.length);
  const at = (shape: readonly Dim[], i: number) => shape[i - rank + shape.length] ?? 1;
  return Array.from({ length: rank }, (_, i) => {
    const [x, y] = [at(a, i), at(b, i)];
    if (x === y || y === 1) return x;
    if (x === 1) return y;
    // A named size may be 1 in a run; a fixed one that differs never fits.
    if (typeof x === "number" && typeof y === "number") throw new Error(`shapes [${a}] and [${b}] do not broadcast`);
    return typeof x === "number" ? x : y;
  });
}

const binary = (op: string) => (g: Graph, a: Value, b: Value) =>
  g.node(op, [a, b], [{ dtype: a.dtype, shape: broadcast(a.shape, b.shape) }])[0];

export const add = binary("Add");
export const mul = binary("Mul");

export function cast(g: Graph, x: Value, dtype: DType): Value {
  return x.dtype === dtype ? x : g.node("Cast", [x], [{ dtype, shape: x.shape }], { to: DTYPES[dtype].onnx })[0];
}

const gate = (alpha: number) => (g: Graph, x: Value) =>
  g.node("QuickGelu", [x], [{ dtype: x.dtype, shape: x.shape }], { alpha: { float: alpha } }, "com.microsoft")[0];

/** x · sigmoid(x), in ONNX Runtime's fused kernel. */
export const silu = gate(1);
/** x · sigmoid(1.702 x), as CLIP has it. */
export const quickGelu = gate(1.702);

/** silu(x[..,:n]) · x[..,n:] of x [..,2n], in a kernel of our own. */
export function gatedSilu(g: Graph, x: Value): Value {
  const shape = [...x.shape.slice(0, -1), (x.shape.at(-1) as number) / 2];
  return g.node("GatedSilu", [x], [{ dtype: x.dtype, shape }], {}, CUSTOM_DOMAIN)[0];
}

/** x [T,D] + y [T or 1,D] in a kernel of our own. */
export function addRows(g: Graph, x: Value, y: Value): Value {
  return g.node("AddRows", [x, y], [{ dtype: x.dtype, shape: x.shape }], {}, CUSTOM_DOMAIN)[0];
}

/** x + y, [T,D], and its rows `index` [K] i64, in a kernel of our own. */
export function addPickRows(g: Graph, x: Value, y: Value, index: Value): [sum: Value, picked: Value] {
  const shapes = [x.shape, [index.shape[0], x.shape[1]]];
  const outputs = shapes.map((shape) => ({ dtype: x.dtype, shape }));
  const [sum, picked] = g.node("AddPickRows", [x, y, index], outputs, {}, CUSTOM_DOMAIN);
  return [sum, picked];
}

/** Exact (erf) GELU. */
export function gelu(g: Graph, x: Value): Value {
  return g.node("Gelu", [x], [{ dtype: x.dtype, shape: x.shape }])[0];
}

/** log softmax over the last axis. */
export function logSoftmax(g: Graph, x: Value): Value {
  return g.node("LogSoftmax", [x], [{ dtype: x.dtype, shape: x.shape }], { axis: -1 })[0];
}

export function softmax(g: Graph, x: Value): Value {
  return g.node("Softmax", [x], [{ dtype: x.dtype, shape: x.shape }], { axis: -1 })[0];
}
