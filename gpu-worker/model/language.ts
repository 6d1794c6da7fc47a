/** The target's decoder as a graph: Qwen2 and Llama layers over a KV cache. Knows no image and no tree. */

import { Graph, type GraphOptions, type StoredTensor } from "../graph/graph.ts";
import { addRmsNorm, rmsNorm } from "../ops/norm.ts";
import { gather, gatherCacheRows, reshape, scatterRows, tensorScatter } from "../ops/shape.ts";
import {
  cachedAttention,
  cacheInputs,
  type DecoderLayerConfig,
  embedding,
  linear,
  mlpBlock,
  parameter,
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
  const hidden = g.binds ? x : reshape(g, x, [-1, c.hidden], "T");
  g.output("hidden", hidden);
  const wanted = pictures ? gather(g, hidden, g.input("logit_rows", "i64", ["K"])) : hidden;
  g.output("logits", linear(g, wanted, [headWeight(c, w, names)]));
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
