/** OpenAI's requests to the engine's: template, tokens, images by hash, sampling. Knows no transport, runs no model. */
import { Template } from "@huggingface/jinja";
import type { ChatMessage, ChatRequest, CompletionRequest } from "./api.ts";
import { ApiError, CheckpointError } from "./errors.ts";
import { type ChatImage, imageParts, imagesOf } from "./images.ts";
import { LIMITS } from "./limits.ts";
import type { GenerateRequest, ModelInfo, Sampling } from "./protocol.ts";
import { Tokenizer } from "./tokenizer.ts";

interface TemplateOptions {
  addGenerationPrompt: boolean;
  /** Leaves the last message open, for the model to go on with it. */
  continueFinalMessage?: boolean;
}

/** A model's tokenizer and template, parsed once (0.1 s and more for a full-size vocabulary). */
export class ChatModel {
  readonly info: ModelInfo;
  readonly tokenizer: Tokenizer;
  readonly #template: Template;
  readonly imageTokenId: number;

  /** Throws CheckpointError without a chat template that can be read, or when the image token is not in the vocabulary. */
  constructor(info: ModelInfo) {
    const config = info.tokenizerConfig as { chat_template?: unknown };
    if (typeof config.chat_template !== "string")
      throw new CheckpointError("tokenizer_config.json: chat_template is missing");
    this.info = info;
    this.tokenizer = new Tokenizer(info.tokenizer, info.tokenizerConfig);
    this.#template = templateOf(config.chat_template);
    const imageTokenId = this.tokenizer.tokenId(info.imageToken);
    if (imageTokenId === undefined) throw new CheckpointError(`tokenizer.json: no token ${info.imageToken}`);
    this.imageTokenId = imageTokenId;
  }

  /** The prompt's text; `text` is applied to every text that a client wrote. */
  renderPrompt(messages: ChatMessage[], options: TemplateOptions, text = (content: string) => content): string {
    const plain = messages.map((message) => ({
      role: message.role === "developer" ? "system" : message.role,
      content: (typeof message.content === "string"
        ? [{ type: "text" as const, text: message.content }]
        : message.content
      ).map((part) => (part.type === "text" ? { type: "text", text: text(part.text) } : { type: "image" })),
    }));
    const prompt = this.#render({ messages: plain, add_generation_prompt: options.addGenerationPrompt });
    if (!options.continueFinalMessage) return prompt;
    const last = plain.at(-1)?.content.at(-1);
    const end = last && "text" in last ? last.text!.trimEnd() : "";
    return prompt.slice(0, prompt.lastIndexOf(end) + end.length);
  }

  #render(values: Record<string, unknown>): string {
    try {
      return this.#template.render(values);
    } catch (cause) {
      // Templates refuse conversations (say, two user turns in a row) with raise_exception.
      throw new ApiError(400, `messages: the chat template refuses them: ${(cause as Error).message}`, {
        param: "messages",
        cause,
      });
    }
  }

  /**
   * Token ids of a conversation, one placeholder per image. What clients wrote stays text, even if it spells a special
   * token. Throws ApiError 400 for messages that the template refuses or that cannot fit into the context.
   */
  tokenize(messages: ChatMessage[]): number[] {
    const literal = (text: string) => this.tokenizer.literal(text);
    const tokens = this.#encode(this.renderPrompt(messages, { addGenerationPrompt: true }, literal), "messages");
    const images = imageParts(messages).length;
    const placeholders = tokens.filter((token) => token === this.imageTokenId).length;
    if (placeholders !== images) {
      throw new ApiError(
        400,
        `messages: the chat template gives ${placeholders} placeholders ${this.info.imageToken} for ${images} images`,
        { param: "messages" },
      );
    }
    return tokens;
  }

  /** Token ids of a plain text, with no template; special tokens in it stay text. Throws ApiError 400 as `tokenize`. */
  tokenizeText(text: string): number[] {
    return this.#encode(this.tokenizer.literal(text), "prompt");
  }

  #encode(prompt: string, param: string): number[] {
    const room = this.info.contextLength;
    const refuse = (size: string) => tooLong(param, size, room);
    // Refused without the cost of encoding it, some seconds a million characters.
    if (prompt.length > room * Math.min(this.tokenizer.longestToken, LIMITS.charactersPerToken))
      throw refuse(`${prompt.length} characters`);
    const tokens = this.tokenizer.encodePrompt(prompt);
    if (tokens.length >= room) throw refuse(`${tokens.length} tokens`);
    return tokens;
  }
}

function templateOf(source: string): Template {
  try {
    return new Template(source);
  } catch (cause) {
    throw new CheckpointError(`tokenizer_config.json: chat_template: ${(cause as Error).message}`, { cause });
  }
}

/** What the engine is asked, and the pictures that came as bytes under their hashes (one entry for one that occurs twice). */
export interface PreparedChat {
  request: GenerateRequest;
  images: Map<string, ChatImage>;
}

/** What a request does not say itself: its name in logs and answers, and whose it is. */
export interface Asker {
  id: string;
  tenant: string;
}

/** Turns a checked chat request into the engine's. Throws ApiError 400 (404 for another model's name). */
export async function prepareChat(chat: ChatRequest, model: ChatModel, asker: Asker): Promise<PreparedChat> {
  const common = commonOf(chat, model.info, asker);
  if (chat.max_tokens != null && chat.max_completion_tokens != null)
    throw refuse("max_tokens", "is the same as max_completion_tokens; give one of them");
  if (chat.top_logprobs != null && !chat.logprobs) throw refuse("top_logprobs", "needs logprobs to be true");
  for (const name of ["min_pixels", "max_pixels"] as const) {
    if (chat[name] != null && chat.mm_processor_kwargs?.[name] != null)
      throw refuse(`mm_processor_kwargs.${name}`, `is the same as ${name}; give one of them`);
  }
  const json = jsonOf(chat.response_format);
  if (json && chat.ignore_eos)
    throw refuse("ignore_eos", "does not go with a JSON response_format, which says where the answer ends");
  const tokens = model.tokenize(chat.messages);
  const { refs, images } = await imagesOf(chat, model.info.pixels);
  const request: GenerateRequest = {
    ...common,
    kind: "chat",
    tokens,
    images: refs,
    maxTokens: chat.max_completion_tokens ?? chat.max_tokens ?? null,
    logprobs: chat.logprobs ? (chat.top_logprobs ?? 0) : null,
    json,
  };
  checkMost(
    request,
    model.info,
    chat.max_completion_tokens != null ? "max_completion_tokens" : "max_tokens",
    "top_logprobs",
  );
  return { request, images };
}

/** Turns a checked completion request into the engine's. Throws ApiError 400 (404 for another model's name). */
export async function prepareCompletion(
  completion: CompletionRequest,
  model: ChatModel,
  asker: Asker,
): Promise<PreparedChat> {
  const request: GenerateRequest = {
    ...commonOf(completion, model.info, asker),
    kind: "completion",
    tokens: promptTokens(completion.prompt, model),
    images: [],
    maxTokens: completion.max_tokens ?? null,
    logprobs: completion.logprobs ?? null,
    json: null,
  };
  checkMost(request, model.info, "max_tokens", "logprobs");
  return { request, images: new Map() };
}

/** Throws ApiError 400, under the names that the client uses, for a longer answer than fits, or one with too many parts. */
function checkMost(
  request: GenerateRequest,
  { contextLength }: ModelInfo,
  tokensName: string,
  logprobsName: string,
): void {
  const { tokens, maxTokens, logprobs, n } = request;
  const room = contextLength - tokens.length;
  // Without the images' tokens, which the engine counts.
  if (maxTokens !== null && maxTokens > room) {
    const why = `is ${maxTokens}, but the prompt's ${tokens.length} tokens leave ${room} of the model's context of ${contextLength}`;
    throw new ApiError(400, `${tokensName} ${why}`, { code: "context_length_exceeded", param: tokensName });
  }
  const most = logprobs === null ? 0 : n * (1 + logprobs) * (maxTokens ?? room);
  if (most > LIMITS.logprobs)
    throw refuse(
      logprobsName,
      `that may be ${most} log-probabilities, with n and max_tokens; at most ${LIMITS.logprobs} are given`,
    );
}

function promptTokens(prompt: string | number[], model: ChatModel): number[] {
  const { vocabulary, imageToken, contextLength } = model.info;
  if (typeof prompt === "string") {
    const tokens = model.tokenizeText(prompt);
    if (tokens.length === 0) throw refuse("prompt", "must have at least one token");
    return tokens;
  }
  if (prompt.length >= contextLength) throw tooLong("prompt", `${prompt.length} tokens`, contextLength);
  checkTokens("prompt", prompt, vocabulary);
  const image = prompt.indexOf(model.imageTokenId);
  if (image >= 0) throw refuse(`prompt[${image}]`, `is ${imageToken}, but a completion has no images`);
  return prompt;
}

/** What both kinds of request have, checked for what a schema cannot say. */
function commonOf(asked: ChatRequest | CompletionRequest, info: ModelInfo, { id, tenant }: Asker) {
  if (asked.model != null && asked.model !== info.id) {
    const named = JSON.stringify(asked.model.slice(0, 100));
    throw new ApiError(404, `model: ${named} is not served here; ${JSON.stringify(info.id)} is.`, {
      code: "model_not_found",
      param: "model",
    });
  }
  if (asked.stream_options && !asked.stream) throw refuse("stream_options", "needs stream to be true");
  if (asked.drafter === "vispec" && !info.drafts) throw refuse("drafter", "there is no draft model here");
  const stopTokenIds = asked.stop_token_ids ?? [];
  checkTokens("stop_token_ids", stopTokenIds, info.vocabulary);
  return {
    id,
    tenant,
    priority: asked.service_tier === "flex" ? ("batch" as const) : ("interactive" as const),
    deadline: asked.deadline ?? null,
    model: info.id,
    fingerprint: info.fingerprint,
    sampling: samplingOf(asked, info.vocabulary),
    n: asked.n ?? 1,
    stop: typeof asked.stop === "string" ? [asked.stop] : (asked.stop ?? []),
    stopTokenIds,
    ignoreEos: asked.ignore_eos ?? false,
    plain: asked.drafter === "none",
    stream: asked.stream ?? false,
    includeUsage: asked.stream_options?.include_usage ?? false,
    includeDrafts: asked.stream_options?.include_drafts ?? false,
    user: asked.user ?? null,
  };
}

/** OpenAI's defaults; without a seed each request draws its own. */
function samplingOf(asked: ChatRequest | CompletionRequest, vocabulary: number): Sampling {
  const logitBias = Object.entries(asked.logit_bias ?? {}).map(([token, bias]): [number, number] => {
    if (Number(token) >= vocabulary) throw refuse(`logit_bias.${token}`, noToken(vocabulary));
    return [Number(token), bias];
  });
  return {
    temperature: asked.temperature ?? 1,
    topP: asked.top_p ?? 1,
    topK: Math.max(0, asked.top_k ?? 0),
    minP: asked.min_p ?? 0,
    seed: asked.seed ?? crypto.getRandomValues(new Uint32Array(1))[0],
    repetitionPenalty: asked.repetition_penalty ?? 1,
    presencePenalty: asked.presence_penalty ?? 0,
    frequencyPenalty: asked.frequency_penalty ?? 0,
    logitBias,
  };
}

const noToken = (vocabulary: number) => `is no token of the model, which has ${vocabulary}`;

function checkTokens(param: string, tokens: number[], vocabulary: number): void {
  const wrong = tokens.findIndex((token) => token >= vocabulary);
  if (wrong >= 0) throw refuse(`${param}[${wrong}]`, noToken(vocabulary));
}

function jsonOf(format: ChatRequest["response_format"]): GenerateRequest["json"] {
  if (!format || format.type === "text") return null;
  if (format.type === "json_object") return { schema: null, strict: true };
  const { schema, strict } = format.json_schema;
  const param = "response_format.json_schema.schema";
  // The depth first: JSON.stringify recurses.
  if (isDeeper(schema, LIMITS.schemaDepth)) throw refuse(param, `must be nested at most ${LIMITS.schemaDepth} deep`);
  const text = JSON.stringify(schema);
  if (text.length > LIMITS.schemaCharacters)
    throw refuse(param, `must have at most ${LIMITS.schemaCharacters} characters as JSON`);
  return { schema: text, strict: strict ?? true };
}

/** Whether more objects and arrays stand in each other. Level by level and not by recursion: it may be 100,000. */
function isDeeper(value: object, depth: number): boolean {
  let level = [value];
  for (let i = 0; i < depth && level.length > 0; i++)
    level = level.flatMap((outer) =>
      Object.values(outer).filter((inner) => typeof inner === "object" && inner !== null),
    );
  return level.length > 0;
}

/** LangChain knows the error by the words "maximum context length". */
function tooLong(param: string, size: string, room: number): ApiError {
  const limit = `the model's context is ${room} tokens (its maximum context length, answer included)`;
  return new ApiError(400, `${param}: the prompt has ${size}; ${limit}.`, { code: "context_length_exceeded", param });
}

function refuse(param: string, why: string): ApiError {
  return new ApiError(400, `${param}: ${why}`, { param });
}
