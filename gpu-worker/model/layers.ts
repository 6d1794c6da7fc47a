/** Layers that several models share, over weights by their checkpoint names. */
import type { Dim, Graph, StoredTensor, Value } from "../graph/graph.ts";
import { type CacheInputs, groupQueryAttention, type OwnCacheInputs, ownAttention } from "../ops/attention.ts";
import { add, cast, gatedSilu, mul, silu } from "../ops/elementwise.ts";
import { boundProduct, gatedProduct, int8MatMul, matMul, matMulNBits } from "../ops/matmul.ts";
import { addRmsNorm } from "../ops/norm.ts";
import { concat, gather, splitBy, transpose } from "../ops/shape.ts";
import type { TensorSource } from "./weights.ts";

/** A stored tensor in the graph's own type. Casts and transpositions of weights are done once, when a session loads. */
export function parameter(g: Graph, stored: StoredTensor): Value {
  return g.binds ? g.bind([stored]) : cast(g, g.weight(stored), g.dtype);
}

/** Rows of a stored table: cast after they are picked, so that there is no second copy of the whole. */
export function embedding(g: Graph, table: StoredTensor, ids: Value): Value {
  return g.binds ? gather(g, g.bind([table]), ids) : cast(g, gather(g, g.weight(table), ids), g.dtype);
}

/** Columns of a quantized matrix that share a scale. */
export const BLOCK_SIZE = 32;

/** Checkpoint names of a quantized matrix' parts. */
export const quantizedNames = (name: string) => ({ packed: `${name}.packed`, scales: `${name}.scales` });

/** A matrix [rows,columns] in integers of few bits: packed u8 [rows,blocks,bytes a block], scales [rows,blocks]. */
export interface QuantizedMatrix {
  packed: StoredTensor;
  scales: StoredTensor;
  shape: readonly number[];
}
export type Matrix = StoredTensor | QuantizedMatrix;

/** The matrix of that name and shape, quantized if the checkpoint has it so. */
export function matrix(w: TensorSource, name: string, shape: readonly [rows: number, columns: number]): Matrix {
  const { packed, scales } = quantizedNames(name);
  if (!w.has(packed)) return w.get(name, shape);
  const [rows, blocks] = [shape[0], Math.ceil(shape[1] / BLOCK_SIZE)];
  const bits = (8 * (w.shape(packed)[2] ?? 0)) / BLOCK_SIZE;
  // Not 4 or 8 bits: asks for 4, and so says what is wrong.
  const bytes = (BLOCK_SIZE * (bits === 8 ? 8 : 4)) / 8;
  return { packed: w.get(packed, [rows, blocks, bytes]), scales: w.get(scales, [rows, blocks]), shape };
}

/** x · Wᵀ (+ b) for one or several stored [out,in] matrices side by side, e.g. q, k and v in one product. */
export function linear(g: Graph, x: Value, weights: Matrix[], biases: StoredTensor[] = []): Value {
  const side = (tensors: StoredTensor[]) =>
    g.binds
      ? g.bind(tensors)
      : concat(
          g,
          tensors.map((t) => parameter(g, t)),
          0,
        );
  const y = weights.every((m) => "packed" in m)
    ? quantizedProduct(g, x, weights)
    : g.binds
      ? boundProduct(g, x, g.bind(weights as StoredTensor[], { turned: true }))
      : product(g, x, side(weights as StoredTensor[]));
  return biases.length ? add(g, y, side(biases)) : y;
}

function product(g: Graph, x: Value, matrix: Value): Value {
  const turned = transpose(g, matrix, [1, 0]);
  return g.options.int8 ? int8MatMul(g, x, turned) : matMul(g, x, turned);
}

function quantizedProduct(g: Graph, x: Value, weights: QuantizedMatrix[]): Value {
  const side = (tensors: StoredTensor[], one: (t: StoredTensor) => Value) =>
    g.binds ? g.bind(tensors) : concat(g, tensors.map(one), 0);
  const packed = side(
    weights.map((m) => m.packed),
    (t) => g.weight(t),
  );
  const scales = side(
    weights.map((m) => m.scales),
    (t) => parameter(g, t),
  );
  return matMulNBits(g, x, packed, scales, weights[0].shape[1]);
}

/** down(silu(gate(x)) · up(x)); tensors `${name}.gate_proj` and so on. */
export function gatedMlp(
  g: Graph,
  x: Value,
  w: TensorSource,
  name: string,
  size: number,
  inner: number,
  bias = false,
): Value {
  const weight = (part: string) =>
    matrix(w, `${name}.${part}_proj.weight`, part === "down" ? [size, inner] : [inner, size]);
  const vector = (part: string) => w.get(`${name}.${part}_proj.bias`, [part === "down" ? size : inner]);
  const size8 = Math.ceil(inner / 8) * 8;
  if (g.binds && size8 !== inner) return alignedMlp(g, x, w, name, { size, inner, padded: size8, bias });
  const project = (...parts: string[]) => linear(g, x, parts.map(weight), bias ? parts.map(vector) : []);
  const down = (gated: Value) => linear(g, gated, [weight("down")], bias ? [vector("down")] : []);
  const wide = ["gate", "up"].map(weight);
  if (pairs(g, wide, bias)) return down(gatedProduct(g, x, g.bind(wide, { turned: true, paired: true })));
  return down(g.binds ? gatedSilu(g, project("gate", "up")) : mul(g, silu(g, project("gate")), project("up")));
}

/** Whether one product gives both and what comes of them; not of bytes, where that takes longer (docs/performance.md). */
function pairs({ options }: Graph, wide: Matrix[], bias: boolean): wide is StoredTensor[] {
  return options.searched === true && !options.int8 && !bias && !wide.some((m) => "packed" in m);
}

/** The same with `padded` numbers between the products, zeros after the real ones: rows of 16 bytes are read faster. */
function alignedMlp(
  g: Graph,
  x: Value,
  w: TensorSource,
  name: string,
  { size, inner, padded, bias }: { size: number; inner: number; padded: number; bias: boolean },
): Value {
  const tensors = (parts: string[], kind: string, shape: number[]) =>
    parts.map((part) => w.get(`${name}.${part}_proj.${kind}`, shape));
  const wide = ["gate", "up"];
  const gates = matMul(g, x, g.bind(tensors(wide, "weight", [inner, size]), { turned: true, rows: padded }));
  const biased = bias ? add(g, gates, g.bind(tensors(wide, "bias", [inner]), { rows: padded })) : gates;
  const down = g.bind(tensors(["down"], "weight", [size, inner]), { turned: true, columns: padded });
  const y = matMul(g, gatedSilu(g, biased), down);
  return bias ? add(g, y, g.bind(tensors(["down"], "bias", [size]))) : y;
}

export interface DecoderLayerConfig {
  hidden: number;
  inner: number;
  heads: number;
  kvHeads: number;
  headSize: number;
  qkvBias: boolean;
  epsilon: number;
}

/** Caches of several sequences, and how many of a pass's tokens each has, i64 [sequences]. */
export interface ManyCaches {
  caches: readonly CacheInputs[];
  sizes: Value;
}

/**
 * Self-attention over the KV cache `layer`, whose memory becomes inputs (and outputs) of the graph. x [1,T,hidden] or
 * [T,hidden]. Of several sequences, each one's tokens see its own cache alone.
 */
export function cachedAttention(
  g: Graph,
  x: Value,
  w: TensorSource,
  name: string,
  layer: number,
  cache: CacheInputs | OwnCacheInputs | ManyCaches,
  c: DecoderLayerConfig,
): Value {
  const { hidden, heads, kvHeads, headSize } = c;
  const rows = { q: heads * headSize, k: kvHeads * headSize, v: kvHeads * headSize };
  const matrices = Object.entries(rows).map(([p, n]) => matrix(w, `${name}.${p}_proj.weight`, [n, hidden]));
  const biases = c.qkvBias ? Object.entries(rows).map(([p, n]) => w.get(`${name}.${p}_proj.bias`, [n])) : [];
  const pastOf = (suffix = "") => {
    const shape = [1, kvHeads, `M${suffix}`, headSize];
    const [key, value] = ["key", "value"].map((kind) => g.input(`${kind}.${layer}${suffix}`, g.dtype, shape));
    return { key, value };
  };
  const out = matrix(w, `${name}.o_proj.weight`, [hidden, heads * headSize]);
  if ("control" in cache) {
    const bias = biases.length ? g.bind(biases) : null;
    return linear(g, ownAttention(g, linear(g, x, matrices), bias, pastOf(), cache, heads * headSize), [out]);
  }
  const attend = (qkv: Value, inputs: CacheInputs, suffix?: string) => {
    const past = pastOf(suffix);
    const numbers = { query: heads, keyValue: kvHeads, size: headSize };
    const attended = groupQueryAttention(g, qkv, past, inputs, numbers);
    g.output(`${past.key.name}.next`, attended.key);
    g.output(`${past.value.name}.next`, attended.value);
    return attended.out;
  };
  const qkv = linear(g, x, matrices, biases);
  if (!("caches" in cache)) return linear(g, attend(qkv, cache), [out]);
  const { caches, sizes } = cache;
  const parts = splitBy(g, qkv, sizes, caches.length, 1, "T");
  return linear(g, concat(g, parts.map((part, i) => attend(part, caches[i], `.${i}`)), 1), [out]); // biome-ignore format: one line
}

/** What a pass's attention takes of one sequence, whose inputs end in `suffix`; its numbers of tokens and rows are T and M. */
export function sequenceInputs(g: Graph, headSize: number, suffix = ""): CacheInputs {
  const [tokens, rows] = [suffix.replace(".", "T") || "T", `M${suffix}`];
  return {
    lastRow: g.input(`last_row${suffix}`, "i32", [1]),
    capacity: g.input(`capacity${suffix}`, "i32", [1]),
    cos: g.input(`cos${suffix}`, g.dtype, [`R${suffix}`, headSize / 2]),
    sin: g.input(`sin${suffix}`, g.dtype, [`R${suffix}`, headSize / 2]),
    positions: g.input(`positions${suffix}`, "i64", [1, tokens]),
    bias: g.input(`bias${suffix}`, g.dtype, [1, 1, tokens, rows]),
  };
}

/** The inputs of a pass over a KV cache, declared once a graph; `operator` names our own attention, where that is used. */
export function cacheInputs(g: Graph, headSize: number, operator: string): CacheInputs | OwnCacheInputs {
  if (g.binds) {
    const ints = (name: string, shape: Dim[]) => g.input(name, "i32", shape);
    const angles = (name: string) => g.input(name, "f32", ["R", headSize / 2]);
    return {
      ...{ cos: angles("cos"), sin: angles("sin"), positions: ints("positions", ["T"]) },
      ...{ mask: ints("mask", ["T", 4]), control: ints("control", ["S", "W"]), operator },
    };
  }
  return sequenceInputs(g, headSize);
}

/** The second half of a decoder layer: x + residual, norm, MLP. Gives the MLP's output and the sum before the norm. */
export function mlpBlock(
  g: Graph,
  x: Value,
  residual: Value,
  w: TensorSource,
  name: string,
  c: DecoderLayerConfig,
): [Value, Value] {
  const weight = parameter(g, w.get(`${name}.post_attention_layernorm.weight`, [c.hidden]));
  const [norm, sum] = addRmsNorm(g, x, residual, weight, c.epsilon);
  return [gatedMlp(g, norm, w, `${name}.mlp`, c.hidden, c.inner), sum];
}
