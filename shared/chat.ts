/** An OpenAI chat request to the engine's: template, tokens, images by hash, sampling. Knows no transport, runs no model. */
import { Template } from "@huggingface/jinja";
import { ApiError, CheckpointError } from "./errors.ts";
import { decodeDataUrl, hashImage } from "./images.ts";
import type { ChatMessage, ChatRequest, GenerateRequest, ModelInfo, Sampling } from "./protocol.ts";
import { checkLength, Tokenizer } from "./tokenizer.ts";

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
  readonly #imageTokenId: number;

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
    this.#imageTokenId = imageTokenId;
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
    const prompt = this.renderPrompt(messages, { addGenerationPrompt: true }, literal);
    const room = this.info.contextLength;
    checkLength(this.tokenizer, prompt, room);
    const tokens = this.tokenizer.encodePrompt(prompt);
    if (tokens.length >= room) {
      throw new ApiError(
        400,
        `The prompt has ${tokens.length} tokens; the model's context is ${room}, answer included.`,
        {
          code: "context_length_exceeded",
          param: "messages",
        },
      );
    }
    const images = imageUrls(messages).length;
    const placeholders = tokens.filter((token) => token === this.#imageTokenId).length;
    if (placeholders !== images) {
      throw new ApiError(
        400,
        `messages: the chat template gives ${placeholders} placeholders ${this.info.imageToken} for ${images} images`,
        { param: "messages" },
      );
    }
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

/** A picture's encoded bytes, and where it first stands in the request, e.g. "messages[0].content[1]". */
export interface ChatImage {
  bytes: Uint8Array<ArrayBuffer>;
  where: string;
}

/** What the engine is asked, and the pictures under their hashes (one entry for a picture that occurs twice). */
export interface PreparedChat {
  request: GenerateRequest;
  images: Map<string, ChatImage>;
}

/** Turns a checked chat request into the engine's. Throws ApiError 400 (404 for another model's name). */
export async function prepareChat(chat: ChatRequest, model: ChatModel, id: string): Promise<PreparedChat> {
  const { info } = model;
  if (chat.model !== undefined && chat.model !== info.id) {
    throw new ApiError(404, `model: ${JSON.stringify(chat.model)} is not served here; ${JSON.stringify(info.id)} is.`, {
      code: "model_not_found",
      param: "model",
    });
  }
  checkOptions(chat);
  const hashes: string[] = [];
  const images = new Map<string, ChatImage>();
  for (const { url, where } of imageUrls(chat.messages)) {
    const bytes = decodeDataUrl(url, where);
    const hash = await hashImage(bytes);
    hashes.push(hash);
    if (!images.has(hash)) images.set(hash, { bytes, where });
  }
  const request: GenerateRequest = {
    id,
    model: info.id,
    fingerprint: info.fingerprint,
    tokens: model.tokenize(chat.messages),
    images: hashes,
    sampling: samplingOf(chat),
    maxTokens: chat.max_completion_tokens ?? chat.max_tokens ?? null,
    stop: typeof chat.stop === "string" ? [chat.stop] : (chat.stop ?? []),
    stopTokenIds: chat.stop_token_ids ?? [],
    logprobs: chat.logprobs ? (chat.top_logprobs ?? 0) : null,
    stream: chat.stream ?? false,
    includeUsage: chat.stream_options?.include_usage ?? false,
  };
  return { request, images };
}

function checkOptions(chat: ChatRequest): void {
  if (chat.top_logprobs != null && !chat.logprobs) {
    throw new ApiError(400, "top_logprobs: needs logprobs to be true", { param: "top_logprobs" });
  }
  if (chat.stream_options && !chat.stream) {
    throw new ApiError(400, "stream_options: needs stream to be true", { param: "stream_options" });
  }
}

/** OpenAI's defaults; without a seed each request draws its own. */
function samplingOf(chat: ChatRequest): Sampling {
  return {
    temperature: chat.temperature ?? 1,
    topP: chat.top_p ?? 1,
    topK: chat.top_k ?? 0,
    minP: chat.min_p ?? 0,
    seed: chat.seed ?? crypto.getRandomValues(new Uint32Array(1))[0],
  };
}

/** The images' URLs in the order of the prompt, and where each stands. */
function imageUrls(messages: ChatMessage[]): { url: string; where: string }[] {
  return messages.flatMap((message, i) =>
    typeof message.content === "string"
      ? []
      : message.content.flatMap((part, j) =>
          part.type === "image_url" ? [{ url: part.image_url.url, where: `messages[${i}].content[${j}]` }] : [],
        ),
  );
}
