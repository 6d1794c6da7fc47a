/** Layers that several models share, over weights by their checkpoint names. */
import type { Graph, StoredTensor, Value } from "../graph/graph.ts";
import { type CacheInputs, groupQueryAttention } from "../ops/attention.ts";
import { add, cast, mul, silu } from "../ops/elementwise.ts";
import { int8MatMul, matMul, matMulNBits } from "../ops/matmul.ts";
import { addRmsNorm } from "../ops/norm.ts";
import { concat, gather, transpose } from "../ops/shape.ts";
import type { TensorSource } from "./weights.ts";

/** A stored tensor in the graph's own type. Casts and transpositions of weights are done once, when a session loads. */
export function parameter(g: Graph, stored: StoredTensor): Value {
  return cast(g, g.weight(stored), g.dtype);
}

/** Rows of a stored table: cast after they are picked, so that there is no second copy of the whole. */
export function embedding(g: Graph, table: StoredTensor, ids: Value): Value {
  return cast(g, gather(g, g.weight(table), ids), g.dtype);
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
    concat(
      g,
      tensors.map((t) => parameter(g, t)),
      0,
    );
  const y = weights.every((m) => "packed" in m)
    ? quantizedProduct(g, x, weights)
    : product(g, x, side(weights as StoredTensor[]));
  return biases.length ? add(g, y, side(biases)) : y;
}

function product(g: Graph, x: Value, matrix: Value): Value {
  const turned = transpose(g, matrix, [1, 0]);
  return g.options.int8 ? int8MatMul(g, x, turned) : matMul(g, x, turned);
}

function quantizedProduct(g: Graph, x: Value, weights: QuantizedMatrix[]): Value {
  const packed = concat(
    g,
    weights.map((m) => g.weight(m.packed)),
    0,
  );
  const scales = concat(
    g,
    weights.map((m) => parameter(g, m.scales)),
    0,
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
  const project = (part: string) => linear(g, x, [weight(part)], bias ? [vector(part)] : []);
  const gated = mul(g, silu(g, project("gate")), project("up"));
  return linear(g, gated, [weight("down")], bias ? [vector("down")] : []);
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

/** Self-attention over the KV cache `layer`, whose memory becomes inputs and outputs of the graph. x [1,T,hidden]. */
export function cachedAttention(
  g: Graph,
  x: Value,
  w: TensorSource,
  name: string,
  layer: number,
  cache: CacheInputs,
  c: DecoderLayerConfig,
): Value {
  const { hidden, heads, kvHeads, headSize } = c;
  const rows = { q: heads * headSize, k: kvHeads * headSize, v: kvHeads * headSize };
  const matrices = Object.entries(rows).map(([p, n]) => matrix(w, `${name}.${p}_proj.weight`, [n, hidden]));
  const biases = Object.entries(rows).map(([p, n]) => c.qkvBias && w.get(`${name}.${p}_proj.bias`, [n]));
  const qkv = linear(
    g,
    x,
    matrices,
    biases.filter((b) => b !== false),
  );
  const shape = [1, kvHeads, "M", headSize];
  const past = { key: g.input(`key.${layer}`, g.dtype, shape), value: g.input(`value.${layer}`, g.dtype, shape) };
  const { out, key, value } = groupQueryAttention(g, qkv, past, cache, {
    query: heads,
    keyValue: kvHeads,
    size: headSize,
  });
  g.output(`${past.key.name}.next`, key);
  g.output(`${past.value.name}.next`, value);
  return linear(g, out, [matrix(w, `${name}.o_proj.weight`, [hidden, heads * headSize])]);
}

/** The inputs of a pass over a KV cache, declared once a graph. */
export function cacheInputs(g: Graph, headSize: number): CacheInputs {
  return {
    lastRow: g.input("last_row", "i32", [1]),
    capacity: g.input("capacity", "i32", [1]),
    cos: g.input("cos", g.dtype, ["R", headSize / 2]),
    sin: g.input("sin", g.dtype, ["R", headSize / 2]),
    positions: g.input("positions", "i64", [1, "T"]),
    bias: g.input("bias", g.dtype, [1, 1, "T", "M"]),
    fusedRotary: g.options.fusedRotary,
  };
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
