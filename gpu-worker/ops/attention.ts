/** Attention, in ONNX Runtime's fused kernels. */
import type { Graph, Value } from "../graph/graph.ts";
import { CUSTOM_DOMAIN } from "../graph/onnx.ts";
import { split } from "./shape.ts";

/** What every layer of a cached decoder pass shares. T tokens, M rows of room in the cache. */
export interface CacheInputs {
  /** i32 [1]: rows in use after this pass, minus one. */
  lastRow: Value;
  /** i32 [1], on the host: M. */
  capacity: Value;
  /** [M, head/2] each, indexed by `positions`. */
  cos: Value;
  sin: Value;
  /** i64 [1,T]: the row of cos and sin for each token. */
  positions: Value;
  /** [1,1,T,M]: added to the scores; -inf hides a row. */
  bias: Value;
}

/**
 * Attention over a KV cache that grows in place, with rotary embedding (rotate-half) of query and key.
 * qkv [1,T,(heads+2·kvHeads)·head]; pastKey, pastValue [1,kvHeads,M,head]. It is causal besides the bias, which a tree
 * allows since ancestors come first. Gives [1,T,heads·head] and the two caches, to be bound to the past's own memory.
 */
export function groupQueryAttention(
  g: Graph,
  qkv: Value,
  past: { key: Value; value: Value },
  cache: CacheInputs,
  heads: { query: number; keyValue: number; size: number },
): { out: Value; key: Value; value: Value } {
  const { lastRow, capacity, cos, sin, positions, bias } = cache;
  const fusedRotary = g.options.attention === "fused";
  const { query, keyValue, size } = heads;
  const kvSize = keyValue * size;
  const split3 = (x: Value) => split(g, x, [query * size, kvSize, kvSize]);
  const turn = (x: Value, n: number) => rotaryEmbedding(g, x, positions, cos, sin, n);
  const inputs = fusedRotary
    ? [qkv, null, null]
    : split3(qkv).map((x, i) => (i < 2 ? turn(x, [query, keyValue][i]) : x));
  const angles = fusedRotary ? [cos, sin, positions] : [null, null, null];
  const [out, key, value] = g.node(
    "GroupQueryAttention",
    [...inputs, past.key, past.value, lastRow, capacity, ...angles, bias],
    [{ dtype: qkv.dtype, shape: [1, qkv.shape[1], query * size] }, past.key, past.value],
    { num_heads: query, kv_num_heads: keyValue, do_rotary: fusedRotary ? 1 : 0 },
    "com.microsoft",
  );
  return { out, key, value };
}

/** What every layer of a pass shares where the attention is our own (cuda/attention.cu says what each holds). */
export interface OwnCacheInputs {
  /** f32 [M,head/2] each. */
  cos: Value;
  sin: Value;
  /** i32 [T], [T,4] and [S,4] of S sequences with equally many tokens each, one after the other. */
  positions: Value;
  mask: Value;
  control: Value;
  /** Name of the operator: it knows the numbers of heads. */
  operator: string;
}

/**
 * The same as groupQueryAttention with bias and rotary embedding, in a kernel of our own that reads lengths and masks from
 * the device. qkv [T,(heads+2·kvHeads)·head], bias of as many numbers or null; the caches change in place. [T,heads·head].
 */
export function ownAttention(
  g: Graph,
  qkv: Value,
  bias: Value | null,
  past: { key: Value; value: Value },
  { cos, sin, positions, mask, control, operator }: OwnCacheInputs,
  width: number,
): Value {
  const inputs = [qkv, bias, past.key, past.value, cos, sin, positions, mask, control];
  return g.node(operator, inputs, [{ dtype: qkv.dtype, shape: [qkv.shape[0], width] }], {}, CUSTOM_DOMAIN)[0];
}

/** Uncached attention of all to all. q, k, v [B,S,heads·head]; bias [B,1,S,S], added to the scores, or null. */
export function multiHeadAttention(g: Graph, q: Value, k: Value, v: Value, bias: Value | null, heads: number): Value {
  return g.node(
    "MultiHeadAttention",
    bias ? [q, k, v, null, null, bias] : [q, k, v],
    [{ dtype: q.dtype, shape: q.shape }],
    { num_heads: heads },
    "com.microsoft",
  )[0];
}

/** Rotate-half rotary embedding of x [B,S,heads·head] by rows `positions` (i64 [B,S]) of cos and sin [P,head/2]. */
export function rotaryEmbedding(g: Graph, x: Value, positions: Value, cos: Value, sin: Value, heads: number): Value {
  return g.node(
    "RotaryEmbedding",
    [x, positions, cos, sin],
    [{ dtype: x.dtype, shape: x.shape }],
    { num_heads: heads },
    "com.microsoft",
  )[0];
}
