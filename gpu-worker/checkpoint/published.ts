/** The published targets: what their config.json files say (what they leave out is left out here), and how large they are. */

export type PublishedName = "qwen2.5-vl-3b" | "qwen2.5-vl-7b" | "llava-1.6-7b" | "llava-1.6-13b" | "llava-1.5-7b";

export interface Published {
  /** On the hub. */
  repository: string;
  config: object;
  /** Of the whole model; a matrix that is embedding and head at once counts once. */
  parameters: number;
}

const QWEN = {
  architectures: ["Qwen2_5_VLForConditionalGeneration"],
  attention_dropout: 0,
  ...{ bos_token_id: 151643, eos_token_id: 151645 },
  ...{ vision_start_token_id: 151652, vision_end_token_id: 151653, vision_token_id: 151654 },
  ...{ image_token_id: 151655, video_token_id: 151656 },
  hidden_act: "silu",
  initializer_range: 0.02,
  max_position_embeddings: 128000,
  model_type: "qwen2_5_vl",
  rms_norm_eps: 1e-6,
  rope_theta: 1000000,
  sliding_window: 32768,
  torch_dtype: "bfloat16",
  transformers_version: "4.41.2",
  use_cache: true,
  use_sliding_window: false,
  rope_scaling: { type: "mrope", mrope_section: [16, 24, 24] },
};

const QWEN_VISION = {
  depth: 32,
  hidden_act: "silu",
  hidden_size: 1280,
  intermediate_size: 3420,
  num_heads: 16,
  in_chans: 3,
  patch_size: 14,
  spatial_merge_size: 2,
  spatial_patch_size: 14,
  window_size: 112,
  fullatt_block_indexes: [7, 15, 23, 31],
  tokens_per_second: 2,
  temporal_patch_size: 2,
};

const LLAVA = {
  ignore_index: -100,
  image_token_index: 32000,
  projector_hidden_act: "gelu",
  tie_word_embeddings: false,
  torch_dtype: "float16",
  vision_config: {
    hidden_size: 1024,
    image_size: 336,
    intermediate_size: 4096,
    model_type: "clip_vision_model",
    num_attention_heads: 16,
    num_hidden_layers: 24,
    patch_size: 14,
    projection_dim: 768,
    vocab_size: 32000,
  },
  vision_feature_layer: -2,
  vision_feature_select_strategy: "default",
  vocab_size: 32064,
};

/** Sizes that are LlamaConfig's defaults (4096 wide, MLP 11008, 32 layers and heads) are not in the files. */
const VICUNA = {
  architectures: ["LlamaForCausalLM"],
  max_position_embeddings: 4096,
  model_type: "llama",
  rms_norm_eps: 1e-5,
  torch_dtype: "float16",
  vocab_size: 32064,
};

const LLAVA_NEXT = {
  ...LLAVA,
  architectures: ["LlavaNextForConditionalGeneration"],
  model_type: "llava_next",
  image_grid_pinpoints: [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], // biome-ignore format: a table
  use_image_newline_parameter: true,
};

export const PUBLISHED: Record<PublishedName, Published> = {
  "qwen2.5-vl-3b": {
    repository: "Qwen/Qwen2.5-VL-3B-Instruct",
    parameters: 3_754_622_976,
    config: {
      ...QWEN,
      ...{ hidden_size: 2048, intermediate_size: 11008, num_hidden_layers: 36, max_window_layers: 70 },
      ...{ num_attention_heads: 16, num_key_value_heads: 2, vocab_size: 151936, tie_word_embeddings: true },
      vision_config: { ...QWEN_VISION, out_hidden_size: 2048 },
    },
  },
  "qwen2.5-vl-7b": {
    repository: "Qwen/Qwen2.5-VL-7B-Instruct",
    parameters: 8_292_166_656,
    config: {
      ...QWEN,
      ...{ hidden_size: 3584, intermediate_size: 18944, num_hidden_layers: 28, max_window_layers: 28 },
      ...{ num_attention_heads: 28, num_key_value_heads: 4, vocab_size: 152064, tie_word_embeddings: false },
      vision_config: { ...QWEN_VISION, out_hidden_size: 3584 },
    },
  },
  "llava-1.6-7b": {
    repository: "llava-hf/llava-v1.6-vicuna-7b-hf",
    parameters: 7_063_431_168,
    config: { ...LLAVA_NEXT, text_config: { ...VICUNA, _name_or_path: "lmsys/vicuna-7b-v1.5" } },
  },
  "llava-1.6-13b": {
    repository: "llava-hf/llava-v1.6-vicuna-13b-hf",
    parameters: 13_351_499_776,
    config: {
      ...LLAVA_NEXT,
      text_config: {
        ...VICUNA,
        _name_or_path: "lmsys/vicuna-13b-v1.5",
        ...{ hidden_size: 5120, intermediate_size: 13824, num_hidden_layers: 40 },
        ...{ num_attention_heads: 40, num_key_value_heads: 40 },
      },
    },
  },
  "llava-1.5-7b": {
    repository: "llava-hf/llava-1.5-7b-hf",
    parameters: 7_063_427_072,
    config: {
      ...LLAVA,
      architectures: ["LlavaForConditionalGeneration"],
      model_type: "llava",
      pad_token_id: 32001,
      text_config: { ...VICUNA, _name_or_path: "lmsys/vicuna-7b-v1.5" },
    },
  },
};
