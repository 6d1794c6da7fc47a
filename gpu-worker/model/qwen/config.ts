/** Qwen2.5-VL's config.json and generation_config.json, as the graphs need them. */
import { join } from "node:path";
import { z } from "zod";
import { CheckpointError } from "../../../shared/errors.ts";
import { checkSizes, parseConfig } from "../config.ts";
import type { FamilyConfig } from "../family.ts";
import { readJson } from "../weights.ts";

const VisionJson = z.object({
  depth: z.int().positive(),
  hidden_size: z.int().positive(),
  intermediate_size: z.int().positive(),
  num_heads: z.int().positive(),
  in_chans: z.literal(3).default(3),
  out_hidden_size: z.int().positive(),
  patch_size: z.int().positive().default(14),
  spatial_merge_size: z.int().positive().default(2),
  temporal_patch_size: z.int().positive().default(2),
  window_size: z.int().positive().default(112),
  fullatt_block_indexes: z.array(z.int()),
  hidden_act: z.literal("silu"),
});

const TextJson = z.object({
  hidden_size: z.int().positive(),
  intermediate_size: z.int().positive(),
  num_attention_heads: z.int().positive(),
  num_key_value_heads: z.int().positive(),
  num_hidden_layers: z.int().positive(),
  rms_norm_eps: z.number().positive(),
  rope_theta: z.number(),
  vocab_size: z.int().positive(),
  max_position_embeddings: z.int().positive(),
  tie_word_embeddings: z.boolean().default(false),
  rope_scaling: z.object({ mrope_section: z.array(z.int()).length(3) }),
});

const TopJson = z.object({
  image_token_id: z.int(),
  vision_config: VisionJson,
});

const GenerationJson = z.object({ eos_token_id: z.union([z.int(), z.array(z.int())]) });

export interface VisionConfig {
  layers: number;
  width: number;
  inner: number;
  heads: number;
  out: number;
  /** Pixels a side. */
  patch: number;
  temporalPatch: number;
  /** Patches a side that become one token. */
  merge: number;
  /** Tokens a side of an attention window. */
  window: number;
  fullAttention: ReadonlySet<number>;
}

export interface QwenConfig extends FamilyConfig {
  vision: VisionConfig;
  /** Rotary frequencies that turn with time, height, width. */
  mropeSection: readonly number[];
}

/** The checkpoint's configuration; newer files keep the decoder's part under text_config. */
export function loadQwenConfig(folder: string): QwenConfig {
  const file = join(folder, "config.json");
  const raw = readJson(file) as Record<string, unknown>;
  const top = parseConfig(TopJson, raw, file);
  const text = parseConfig(TextJson, { ...raw, ...(raw.text_config as object | undefined) }, file);
  const generationFile = join(folder, "generation_config.json");
  const { eos_token_id: eos } = parseConfig(GenerationJson, readJson(generationFile), generationFile);
  const v = top.vision_config;
  const headSize = text.hidden_size / text.num_attention_heads;
  if (text.rope_scaling.mrope_section.reduce((a, b) => a + b) !== headSize / 2)
    throw new CheckpointError(`${file}: rope_scaling.mrope_section does not add up to half the head size ${headSize}`);
  const config: QwenConfig = {
    language: {
      hidden: text.hidden_size,
      inner: text.intermediate_size,
      heads: text.num_attention_heads,
      kvHeads: text.num_key_value_heads,
      headSize,
      qkvBias: true,
      epsilon: text.rms_norm_eps,
      layers: text.num_hidden_layers,
      vocabulary: text.vocab_size,
      tiedEmbeddings: text.tie_word_embeddings,
    },
    names: { model: "model", head: "lm_head" },
    vision: {
      layers: v.depth,
      width: v.hidden_size,
      inner: v.intermediate_size,
      heads: v.num_heads,
      out: v.out_hidden_size,
      patch: v.patch_size,
      temporalPatch: v.temporal_patch_size,
      merge: v.spatial_merge_size,
      window: Math.floor(v.window_size / v.spatial_merge_size / v.patch_size),
      fullAttention: new Set(v.fullatt_block_indexes),
    },
    ropeTheta: text.rope_theta,
    mropeSection: text.rope_scaling.mrope_section,
    contextLength: text.max_position_embeddings,
    imageToken: top.image_token_id,
    eosTokens: new Set([eos].flat()),
  };
  return checkSizes(config, file);
}
