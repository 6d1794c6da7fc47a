/** The target's decoder as a graph: Qwen2 and Llama layers over a KV cache. Knows no image and no tree. */

import { Graph, type GraphOptions, type StoredTensor, type Value } from "../graph/graph.ts";
import { addRmsNorm, rmsNorm } from "../ops/norm.ts";
import { concat, gather, gatherCacheRows, reshape, scatterRows, splitBy, tensorScatter } from "../ops/shape.ts";
import {
  cachedAttention,
  cacheInputs,
  type DecoderLayerConfig,
  embedding,
  linear,
  mlpBlock,
  parameter,
  sequenceInputs,
} from "./layers.ts";
import type { TensorSource } from "./weights.ts";

/** Our own attention for the target's heads. */
export const TARGET_ATTENTION = "TargetAttention";

export interface LanguageConfig extends DecoderLayerConfig {
  layers: number;
  vocabulary: number;
  tiedEmbeddings: boolean;
}

/** Checkpoint names of the decoder's parts. */
export interface LanguageNames {
  /** Prefix of embed_tokens, layers and norm. */
  model: string;
  head: string;
}

/** The matrix that turns hidden states into logits, [V,D]. */
export function headWeight(c: LanguageConfig, w: TensorSource, names: LanguageNames): StoredTensor {
  const name = c.tiedEmbeddings ? `${names.model}.embed_tokens` : names.head;
  return w.get(`${name}.weight`, [c.vocabulary, c.hidden]);
}

/**
 * One pass over T tokens after those in the cache (Qwen2_5_VLTextModel or LlamaModel, and lm_head).
 * Inputs: ids i64 [T]; image_rows [R,D] that take the places image_index i64 [R,1] of the embeddings; logit_rows i64 [K]:
 * the rows that logits are wanted of; the cache inputs. Outputs: hidden [T,D] after the final norm; logits [K,V]. Without
 * `pictures` a pass over text alone: no rows come in, and logits are those of all tokens.
 */
export function languageGraph(
  c: LanguageConfig,
  w: TensorSource,
  options: GraphOptions,
  names: LanguageNames,
  pictures = true,
): Graph {
  const g = new Graph(options);
  const ids = g.input("ids", "i64", ["T"]);
  const cache = cacheInputs(g, c.headSize, TARGET_ATTENTION);
  const table = w.get(`${names.model}.embed_tokens.weight`, [c.vocabulary, c.hidden]);
  let embedded = embedding(g, table, ids);
  if (pictures) {
    const imageRows = g.input("image_rows", g.dtype, ["R", c.hidden]);
    embedded = scatterRows(g, embedded, g.input("image_index", "i64", ["R", 1]), imageRows);
  }
  const x = decoder(g, embedded, c, w, names, cache);
  const hidden = g.binds ? x : reshape(g, x, [-1, c.hidden], "T");
  g.output("hidden", hidden);
  const wanted = pictures ? gather(g, hidden, g.input("logit_rows", "i64", ["K"])) : hidden;
  g.output("logits", linear(g, wanted, [headWeight(c, w, names)]));
  return g;
}

/** Layers and the final norm over embeddings [T,D]; [1,T,D], or [T,D] where weights are bound. */
function decoder(
  g: Graph,
  embedded: Value,
  c: LanguageConfig,
  w: TensorSource,
  names: LanguageNames,
  cache: Parameters<typeof cachedAttention>[5],
): Value {
  const norm = (name: string) => parameter(g, w.get(`${name}.weight`, [c.hidden]));
  let residual = g.binds ? embedded : reshape(g, embedded, [1, -1, c.hidden], "T");
  const first = norm(`${names.model}.layers.0.input_layernorm`);
  let x = g.binds ? addRmsNorm(g, residual, null, first, c.epsilon)[0] : rmsNorm(g, residual, first, c.epsilon);
  for (let i = 0; i < c.layers; i++) {
    const layer = `${names.model}.layers.${i}`;
    const attended = cachedAttention(g, x, w, `${layer}.self_attn`, i, cache, c);
    const [mlp, sum] = mlpBlock(g, attended, residual, w, layer, c);
    const next = i + 1 < c.layers ? `${names.model}.layers.${i + 1}.input_layernorm` : `${names.model}.norm`;
    [x, residual] = addRmsNorm(g, mlp, sum, norm(next), c.epsilon);
  }
  return x;
}

/**
 * One pass over trees of several sequences, each over its own cache: products run over all tokens at once. The inputs of
 * sequence i are those of a pass over text alone with `.i` behind their names, and `sizes` i64 [sequences]: how many
 * tokens each has. Outputs: hidden.i [T_i,D] after the final norm, logits.i [T_i,V].
 */
export function batchGraph(
  c: LanguageConfig,
  w: TensorSource,
  options: GraphOptions,
  names: LanguageNames,
  sequences: number,
): Graph {
  const g = new Graph(options);
  const all = Array.from({ length: sequences }, (_, i) => i);
  const ids = all.map((i) => g.input(`ids.${i}`, "i64", [`T${i}`]));
  const caches = all.map((i) => sequenceInputs(g, c.headSize, `.${i}`));
  const sizes = g.input("sizes", "i64", [sequences]);
  const table = w.get(`${names.model}.embed_tokens.weight`, [c.vocabulary, c.hidden]);
  const x = decoder(g, embedding(g, table, concat(g, ids, 0)), c, w, names, { caches, sizes });
  const hidden = reshape(g, x, [-1, c.hidden], "T");
  const logits = linear(g, hidden, [headWeight(c, w, names)]);
  for (const [name, rows] of Object.entries({ hidden, logits }))
    for (const [i, part] of splitBy(g, rows, sizes, sequences, 0, "T").entries()) g.output(`${name}.${i}`, part);
  return g;
}

/**
 * Moves rows of every layer's cache in place: rows `from` i64 [n] to `to` i64 [1] and on. For devices whose memory the
 * host cannot see; the host's own copy is asserted equal.
 */
export function moveGraph({ layers, kvHeads, headSize }: LanguageConfig, options: GraphOptions): Graph {
  const g = new Graph(options);
  const from = g.input("from", "i64", ["n"]);
  const to = g.input("to", "i64", [1]);
  for (let i = 0; i < layers; i++)
    for (const name of [`key.${i}`, `value.${i}`]) {
      const cache = g.input(name, g.dtype, [1, kvHeads, "M", headSize]);
      g.output(`${name}.next`, tensorScatter(g, cache, gatherCacheRows(g, cache, from), to));
    }
  return g;
}
