/** Operations that move elements without computing: names are ONNX's. */
import type { Dim, Graph, Value } from "../graph/graph.ts";
import { CUSTOM_DOMAIN } from "../graph/onnx.ts";
import { cast } from "./elementwise.ts";

/** `shape` may hold one -1, worked out by the run, which gets the name `rest`. */
export function reshape(g: Graph, x: Value, shape: readonly number[], rest: Dim = "rest"): Value {
  const out = shape.map((d) => (d === -1 ? rest : d));
  return g.node("Reshape", [x, g.ints(shape)], [{ dtype: x.dtype, shape: out }])[0];
}

export function transpose(g: Graph, x: Value, perm: readonly number[]): Value {
  return g.node("Transpose", [x], [{ dtype: x.dtype, shape: perm.map((i) => x.shape[i]) }], { perm })[0];
}

export function concat(g: Graph, xs: readonly Value[], axis: number): Value {
  const sizes = xs.map((x) => x.shape[axis]);
  const total = sizes.every((s) => typeof s === "number") ? sizes.reduce((a, b) => a + b, 0) : sizes.join("+");
  const shape = xs[0].shape.map((d, i) => (i === axis ? total : d));
  return xs.length === 1 ? xs[0] : g.node("Concat", xs, [{ dtype: xs[0].dtype, shape }], { axis })[0];
}

/** x [a,n,…] with `rows` rows of zeros before each of its n. */
export function padFront(g: Graph, x: Value, rows: number): Value {
  // CUDA's Pad knows no bfloat16.
  if (x.dtype === "bf16") return cast(g, padFront(g, cast(g, x, "f32"), rows), "bf16");
  const pads = x.shape.map((_, i) => (i === 1 ? rows : 0));
  const shape = x.shape.map((d, i) => (i === 1 ? (d as number) + rows : d));
  return g.node("Pad", [x, g.ints([...pads, ...x.shape.map(() => 0)])], [{ dtype: x.dtype, shape }])[0];
}

/** Splits the last axis into pieces of the given sizes. */
export function split(g: Graph, x: Value, sizes: readonly number[]): Value[] {
  const outputs = sizes.map((size) => ({ dtype: x.dtype, shape: [...x.shape.slice(0, -1), size] }));
  return g.node("Split", [x, g.ints(sizes)], outputs, { axis: -1 });
}

/** Splits an axis into `count` pieces of sizes [count] i64, which a run decides; the i-th is called `name``i`. */
export function splitBy(g: Graph, x: Value, sizes: Value, count: number, axis: number, name: string): Value[] {
  const shape = (i: number) => x.shape.map((d, a) => (a === axis ? `${name}${i}` : d));
  const outputs = Array.from({ length: count }, (_, i) => ({ dtype: x.dtype, shape: shape(i) }));
  return g.node("Split", [x, sizes], outputs, { axis });
}

/** x[from:to] along `axis`. */
export function slice(g: Graph, x: Value, axis: number, from: number, to: number): Value {
  const shape = x.shape.map((d, i) => (i === axis ? to - from : d));
  return g.node("Slice", [x, g.ints([from]), g.ints([to]), g.ints([axis])], [{ dtype: x.dtype, shape }])[0];
}

/** Rows of x (its first axis) by index. */
export function gather(g: Graph, x: Value, index: Value): Value {
  return g.node("Gather", [x, index], [{ dtype: x.dtype, shape: [...index.shape, ...x.shape.slice(1)] }], {
    axis: 0,
  })[0];
}

/** [table[ids] ; hidden[rows]] · keep, [T,2D], in one kernel of our own; table [V,D], hidden [N,D], keep [T,1]. */
export function pairRows(g: Graph, keep: Value, table: Value, ids: Value, hidden: Value, rows: Value): Value {
  const shape = [keep.shape[0], 2 * (table.shape[1] as number)];
  return g.node("PairRows", [keep, table, ids, hidden, rows], [{ dtype: table.dtype, shape }], {}, CUSTOM_DOMAIN)[0];
}

/** Rows `index` [n] of a cache [1,H,M,d]. */
export function gatherCacheRows(g: Graph, cache: Value, index: Value): Value {
  const shape = [cache.shape[0], cache.shape[1], index.shape[0], cache.shape[3]];
  return g.node("Gather", [cache, index], [{ dtype: cache.dtype, shape }], { axis: 2 })[0];
}

/** A cache [1,H,M,d] with `rows` [1,H,n,d] written from row `at` [1] on. */
export function tensorScatter(g: Graph, cache: Value, rows: Value, at: Value): Value {
  return g.node("TensorScatter", [cache, rows, at], [{ dtype: cache.dtype, shape: cache.shape }], { axis: 2 })[0];
}

/** x with its rows at `index` [R,1] replaced by `rows` [R,…]. */
export function scatterRows(g: Graph, x: Value, index: Value, rows: Value): Value {
  return g.node("ScatterND", [x, index, rows], [{ dtype: x.dtype, shape: x.shape }])[0];
}

/** The k largest of the last axis, in falling order, with their indices (i64). k [1]. */
export function topK(g: Graph, x: Value, k: Value): [values: Value, indices: Value] {
  const shape = [...x.shape.slice(0, -1), "k"];
  const [values, indices] = g.node(
    "TopK",
    [x, k],
    [
      { dtype: x.dtype, shape },
      { dtype: "i64", shape },
    ],
  );
  return [values, indices];
}
