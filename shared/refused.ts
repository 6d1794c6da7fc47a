/** Parameters of OpenAI's and vLLM's APIs that are refused, and why. A name that is neither here nor in api.ts is unknown. */

const noTools = "the models here have no tool calls";
const textOnly = "answers are text";
const nothingStored = "nothing is stored";
const grammar = "use response_format";
const chatOnly = "belongs to POST /v1/chat/completions";
const special = "special tokens are never shown";
const ofTemplate = "the template is the model's own";

/** By their path in the body, without indices. */
export const REFUSED: Readonly<Record<string, string>> = {
  tools: noTools,
  tool_choice: noTools,
  parallel_tool_calls: noTools,
  functions: noTools,
  function_call: noTools,
  "messages.tool_calls": noTools,
  "messages.tool_call_id": noTools,
  "messages.function_call": noTools,
  "messages.name": "the models' templates have no names",
  "messages.audio": textOnly,
  audio: textOnly,
  modalities: textOnly,
  prediction: "drafts come from the draft model",
  store: nothingStored,
  metadata: nothingStored,
  prompt_cache_key: "pictures and prompts are kept by their content",
  prompt_cache_retention: "pictures and prompts are kept by their content",
  safety_identifier: "use user",
  priority: "use service_tier",
  reasoning_effort: "the models here do not think aloud",
  verbosity: "the models here have no such setting",
  web_search_options: "nothing is searched",
  // POST /v1/completions
  messages: chatOnly,
  response_format: chatOnly,
  max_completion_tokens: "use max_tokens",
  top_logprobs: "logprobs is their number here",
  min_pixels: chatOnly,
  max_pixels: chatOnly,
  mm_processor_kwargs: chatOnly,
  echo: "the prompt is not given back",
  suffix: "the models cannot fill in",
  best_of: "use n",
  // POST /v1/chat/completions
  prompt: "belongs to POST /v1/completions",
  // vLLM
  min_tokens: "use stop and logit_bias",
  bad_words: "use logit_bias",
  allowed_token_ids: "use logit_bias",
  logits_processors: "use logit_bias",
  guided_json: grammar,
  guided_regex: grammar,
  guided_choice: grammar,
  guided_grammar: grammar,
  structured_outputs: grammar,
  prompt_logprobs: "only the answer has log-probabilities",
  use_beam_search: "each choice is drawn token by token",
  length_penalty: "it belongs to beam search",
  early_stopping: "it belongs to beam search",
  include_stop_str_in_output: "stop strings are never shown",
  skip_special_tokens: special,
  spaces_between_special_tokens: special,
  return_tokens_as_token_ids: "log-probabilities have each token's bytes",
  truncate_prompt_tokens: "a prompt that is too long is refused",
  add_special_tokens: ofTemplate,
  add_generation_prompt: ofTemplate,
  continue_final_message: ofTemplate,
  chat_template: ofTemplate,
  chat_template_kwargs: ofTemplate,
  documents: ofTemplate,
};
