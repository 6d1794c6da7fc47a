/** LLaVA's and LLaVA-NeXT's config.json and generation_config.json. What published files leave out is what their classes default to. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { CheckpointError } from "../../../shared/errors.ts";
import { checkSizes, parseConfig } from "../config.ts";
import type { FamilyConfig } from "../family.ts";
import { readJson, type TensorSource } from "../weights.ts";

const size = (fallback: number) => z.int().positive().default(fallback);

/** LlamaConfig; null stands for what is not given. */
const TextJson = z.object({
  model_type: z.literal("llama").default("llama"),
  hidden_size: size(4096),
  intermediate_size: size(11008),
  num_hidden_layers: size(32),
  num_attention_heads: size(32),
  num_key_value_heads: z.int().positive().nullish(),
  hidden_act: z.literal("silu").default("silu"),
  rms_norm_eps: z.number().positive().default(1e-6),
  rope_theta: z.number().default(10000),
  // Newer files have both in rope_parameters.
  rope_scaling: z.null("scaled rotary positions are not supported").optional(),
  rope_parameters: z.object({ rope_theta: z.number().optional(), rope_type: z.literal("default") }).optional(),
  vocab_size: size(32000),
  max_position_embeddings: size(2048),
  attention_bias: z.literal(false).default(false),
  tie_word_embeddings: z.boolean().default(false),
  eos_token_id: z.union([z.int(), z.array(z.int())]).default(2),
});

/** CLIPVisionConfig. */
const VisionJson = z.object({
  model_type: z.literal("clip_vision_model").default("clip_vision_model"),
  hidden_size: size(768),
  intermediate_size: size(3072),
  num_hidden_layers: size(12),
  num_attention_heads: size(12),
  image_size: size(224),
  patch_size: size(32),
  hidden_act: z.literal("quick_gelu").default("quick_gelu"),
  layer_norm_eps: z.number().positive().default(1e-5),
});

const TopJson = z.object({
  model_type: z.enum(["llava", "llava_next"]),
  text_config: TextJson,
  vision_config: VisionJson,
  image_token_index: z.int().optional(),
  image_token_id: z.int().optional(),
  projector_hidden_act: z.literal("gelu").default("gelu"),
  vision_feature_layer: z.int().default(-2),
  vision_feature_select_strategy: z.literal("default").default("default"),
});

const GenerationJson = z.object({ eos_token_id: z.union([z.int(), z.array(z.int())]).optional() });

export interface VisionConfig {
  /** Those that are run. */
  layers: number;
  width: number;
  inner: number;
  heads: number;
  epsilon: number;
  /** Width of the decoder. */
  out: number;
  /** Pixels a side, of a tile and of a patch. */
  tile: number;
  patch: number;
  /** Whether rows of tiles end in a learned newline: LLaVA-NeXT. */
  newline: boolean;
  /** Before the names of the tower, the projector and the newline. */
  prefix: string;
}

export interface LlavaConfig extends FamilyConfig {
  vision: VisionConfig;
}

/** The checkpoint's configuration, and what its tensors are called: newer files have them under `model`. */
export function loadLlavaConfig(folder: string, weights: TensorSource): LlavaConfig {
  const file = join(folder, "config.json");
  const top = parseConfig(TopJson, readJson(file), file);
  const { text_config: text, vision_config: v, vision_feature_layer: layer } = top;
  const imageToken = top.image_token_index ?? top.image_token_id;
  if (imageToken === undefined) throw new CheckpointError(`${file}: image_token_index is missing`);
  // Hidden states are counted from the embeddings, which are number 0.
  const layers = layer < 0 ? v.num_hidden_layers + 1 + layer : layer;
  if (layers < 1 || layers > v.num_hidden_layers)
    throw new CheckpointError(`${file}: vision_feature_layer is ${layer}, of ${v.num_hidden_layers} layers`);
  const newer = weights.has("model.language_model.embed_tokens.weight");
  const config: LlavaConfig = {
    language: {
      hidden: text.hidden_size,
      inner: text.intermediate_size,
      heads: text.num_attention_heads,
      kvHeads: text.num_key_value_heads ?? text.num_attention_heads,
      headSize: text.hidden_size / text.num_attention_heads,
      qkvBias: false,
      epsilon: text.rms_norm_eps,
      layers: text.num_hidden_layers,
      vocabulary: text.vocab_size,
      tiedEmbeddings: text.tie_word_embeddings,
    },
    names: newer
      ? { model: "model.language_model", head: "lm_head" }
      : { model: "language_model.model", head: "language_model.lm_head" },
    vision: {
      ...{ layers, width: v.hidden_size, inner: v.intermediate_size, heads: v.num_attention_heads },
      ...{ epsilon: v.layer_norm_eps, out: text.hidden_size, tile: v.image_size, patch: v.patch_size },
      ...{ newline: top.model_type === "llava_next", prefix: newer ? "model." : "" },
    },
    ropeTheta: text.rope_parameters?.rope_theta ?? text.rope_theta,
    contextLength: text.max_position_embeddings,
    imageToken,
    eosTokens: new Set([generationEos(folder) ?? text.eos_token_id].flat()),
  };
  return checkSizes(config, file);
}

function generationEos(folder: string): number | number[] | undefined {
  const file = join(folder, "generation_config.json");
  return existsSync(file) ? parseConfig(GenerationJson, readJson(file), file).eos_token_id : undefined;
}
