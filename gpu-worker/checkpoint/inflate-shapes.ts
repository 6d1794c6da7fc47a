/** Sizes of the models that `inflate` knows, out of config.json files; and the config.json of an inflated one. */
import { CheckpointError } from "../../shared/errors.ts";
import { PUBLISHED } from "./published.ts";

export type Family = "qwen2_5_vl" | "llava_next";

export interface Shape {
  family: Family;
  vocabulary: number;
  decoder: { hidden: number; inner: number; heads: number; kvHeads: number; layers: number };
  vision: {
    width: number;
    inner: number;
    heads: number;
    layers: number;
    /** Qwen's layers that look at the whole picture; in the order of the layers. */
    full: number[];
    /** LLaVA's layers that run: up to the feature layer. Qwen runs all. */
    run: number;
  };
}

/** LlamaConfig's defaults, which LLaVA's files leave out. */
const LLAMA = { hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32, num_attention_heads: 32 };

/** The decoder's sizes in a config.json, a draft's too. */
export function decoderOf(config: object): Shape["decoder"] {
  const c: typeof LLAMA & { num_key_value_heads?: number } = { ...LLAMA, ...config };
  const heads = c.num_attention_heads;
  const sizes = { hidden: c.hidden_size, inner: c.intermediate_size, layers: c.num_hidden_layers };
  return { ...sizes, heads, kvHeads: c.num_key_value_heads ?? heads };
}

/** The sizes in a config.json of a target that the model's own loader accepts. */
export function shapeOf(config: object): Shape {
  const top = config as { model_type: Family; text_config?: object; vision_config: Record<string, number> };
  const text = { ...top, ...top.text_config } as unknown as { vocab_size: number };
  const v = top.vision_config;
  const layers = v.depth ?? v.num_hidden_layers;
  const { fullatt_block_indexes: full = [] } = v as { fullatt_block_indexes?: number[] };
  const { vision_feature_layer: feature = -2 } = config as { vision_feature_layer?: number };
  const run = top.model_type === "qwen2_5_vl" ? layers : layers + 1 + feature;
  const tower = { width: v.hidden_size, inner: v.intermediate_size, heads: v.num_heads ?? v.num_attention_heads };
  return {
    ...{ family: top.model_type, vocabulary: text.vocab_size, decoder: decoderOf(text) },
    vision: { ...tower, layers, full, run },
  };
}

export const LIKE = ["qwen2.5-vl-3b", "qwen2.5-vl-7b", "llava-1.6-7b", "llava-1.6-13b", "small"] as const;
export type Like = (typeof LIKE)[number];

/** About 0.45 billion parameters, for a CPU. */
function smallShape(family: Family): Shape {
  const qwen = family === "qwen2_5_vl";
  return {
    family,
    vocabulary: 32000,
    decoder: { hidden: 896, inner: 4864, heads: 14, kvHeads: qwen ? 2 : 14, layers: 24 },
    vision: qwen
      ? { width: 640, inner: 1710, heads: 8, layers: 8, full: [3, 7], run: 8 }
      : { width: 512, inner: 2048, heads: 8, layers: 8, full: [], run: 7 },
  };
}

/**
 * The sizes of a model by its name; `small` is of the small model's family. `layers` cuts decoder and vision tower; where
 * Qwen's layers of full attention are cut off, the small model's take their places.
 */
export function likeShape(like: Like, tiny: Shape, layers = Number.POSITIVE_INFINITY): Shape {
  const shape = like === "small" ? smallShape(tiny.family) : shapeOf(PUBLISHED[like].config);
  if (shape.family !== tiny.family)
    throw new CheckpointError(`${like} is of ${shape.family}, the model to inflate of ${tiny.family}`);
  const { decoder, vision } = shape;
  const cut = Math.max(0, vision.layers - layers);
  const full = vision.full.filter((i) => i < vision.layers - cut);
  return {
    ...shape,
    decoder: { ...decoder, layers: Math.min(layers, decoder.layers) },
    vision: {
      ...{ ...vision, layers: vision.layers - cut, run: vision.run - cut },
      full: full.length < tiny.vision.full.length ? tiny.vision.full : full,
    },
  };
}

/** Tiny's config.json with the sizes of `shape`; everything else, token ids and pictures among it, stays. */
export function inflatedConfig(tinyConfig: object, tiny: Shape, shape: Shape): object {
  const config = structuredClone(tinyConfig) as Record<string, never> & { text_config?: object; vision_config: object };
  const { decoder: d, vision: v, family, vocabulary } = shape;
  const text = (config.text_config ?? config) as { rope_scaling?: { mrope_section: number[] } };
  decoderConfig(text, tiny, shape);
  Object.assign(text, { num_hidden_layers: d.layers, num_key_value_heads: d.kvHeads });
  // No exact tied embedding of two matrices that differ is known, so an inflated 3B has a head of its own.
  Object.assign(config, { tie_word_embeddings: false, vocab_size: vocabulary });
  const vision = config.vision_config as { layer_norm_eps?: number };
  Object.assign(vision, { hidden_size: v.width, intermediate_size: v.inner });
  if (family === "qwen2_5_vl") {
    const times = (d.hidden * tiny.decoder.heads) / (d.heads * tiny.decoder.hidden);
    if (text.rope_scaling) text.rope_scaling.mrope_section = text.rope_scaling.mrope_section.map((n) => n * times);
    Object.assign(vision, { depth: v.layers, num_heads: v.heads, out_hidden_size: d.hidden });
    Object.assign(vision, { fullatt_block_indexes: v.full });
  } else {
    Object.assign(vision, { num_hidden_layers: v.layers, num_attention_heads: v.heads });
    vision.layer_norm_eps = ((vision.layer_norm_eps ?? 1e-5) * tiny.vision.width) / v.width;
  }
  return config;
}

/** What a decoder's and a draft's config have in common. The mean square of a row falls with its width, so epsilon does. */
export function decoderConfig(config: object, tiny: Shape, { decoder: d, vocabulary }: Shape): void {
  const { rms_norm_eps: epsilon } = config as { rms_norm_eps: number };
  Object.assign(config, { hidden_size: d.hidden, intermediate_size: d.inner, num_attention_heads: d.heads });
  Object.assign(config, { vocab_size: vocabulary, rms_norm_eps: (epsilon * tiny.decoder.hidden) / d.hidden });
}
