/**
 * Client libraries as their users use them, each behind the same three functions, so that one contract runs over all of
 * them. Knows the libraries and no server.
 */
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { AIMessage, type AIMessageChunk, HumanMessage } from "@langchain/core/messages";
import { ChatOpenAI } from "@langchain/openai";
import { APICallError, generateText, type ModelMessage, streamText } from "ai";
import OpenAI from "openai";
import type { Case } from "./goldens.ts";

export const MODEL_ID = "tiny-qwen2.5-vl";

export interface Question {
  /** The edge's URL. */
  url: string;
  messages: Case["messages"];
  model?: string;
  maxTokens?: number;
  signal?: AbortSignal;
  /** Streams, and sees each piece of the text as it comes. */
  onPiece?: (piece: string) => void;
}

export interface Answer {
  text: string;
  finish: string | null | undefined;
  promptTokens: number | undefined;
  completionTokens: number | undefined;
}

export interface Client {
  /** Asks with temperature 0. */
  ask(question: Question): Promise<Answer>;
  /** What the client's own error class tells of an answer that was refused; throws what is not of that class. */
  refusal(thrown: unknown): { status?: number; param?: string | null; message: string };
  /** Whether `ask` threw this because its signal was aborted. */
  hasLeft(thrown: unknown): boolean;
}

// Warnings about names that a later version is to drop, and nothing else: the tests show that they still work.
(globalThis as { AI_SDK_LOG_WARNINGS?: boolean }).AI_SDK_LOG_WARNINGS = false;

const openai: Client = {
  async ask({ url, messages, model = MODEL_ID, maxTokens, signal, onPiece }) {
    const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
    const params = { model, messages: messages as OpenAI.ChatCompletionMessageParam[], temperature: 0, max_tokens: maxTokens }; // biome-ignore format: one list
    if (!onPiece) {
      const { choices, usage } = await client.chat.completions.create(params, { signal });
      return answer(choices[0].message.content!, choices[0].finish_reason, usage?.prompt_tokens, usage?.completion_tokens); // biome-ignore format: one line
    }
    const streamed = { ...params, stream: true, stream_options: { include_usage: true } } as const;
    let [text, finish, usage]: [string, string?, OpenAI.CompletionUsage?] = [""];
    for await (const chunk of await client.chat.completions.create(streamed, { signal })) {
      const piece = chunk.choices[0]?.delta.content;
      if (piece) onPiece(piece);
      text += piece ?? "";
      finish ??= chunk.choices[0]?.finish_reason ?? undefined;
      usage ??= chunk.usage ?? undefined;
    }
    signal?.throwIfAborted(); // the client's stream just ends
    return answer(text, finish, usage?.prompt_tokens, usage?.completion_tokens);
  },
  refusal(thrown) {
    if (!(thrown instanceof OpenAI.APIError)) throw thrown;
    return thrown;
  },
  hasLeft: (thrown) => isAbort(thrown) || thrown instanceof OpenAI.APIUserAbortError,
};

/** The Vercel AI SDK. Without `supportedUrls` it fetches http pictures itself; see the tests. */
const aiSdk: Client = {
  async ask({ url, messages, model = MODEL_ID, maxTokens, signal, onPiece }) {
    const params = {
      model: vercel(url)(model),
      messages: messages.map(({ role, content }) => ({
        role,
        content:
          typeof content === "string" ? content : content.map((part) => (part.image_url ? imagePart(part) : part)),
      })) as ModelMessage[],
      ...{ temperature: 0, maxRetries: 0, maxOutputTokens: maxTokens, abortSignal: signal },
    };
    if (!onPiece) {
      const { text, finishReason, usage } = await generateText(params);
      return answer(text, finishReason, usage.inputTokens, usage.outputTokens);
    }
    let failure: unknown;
    const result = streamText({ ...params, onError: ({ error }) => void (failure = error) });
    for await (const piece of result.textStream) onPiece(piece);
    signal?.throwIfAborted(); // the SDK's stream just ends
    if (failure) throw failure;
    const usage = await result.usage;
    return answer(await result.text, await result.finishReason, usage.inputTokens, usage.outputTokens);
  },
  refusal(thrown) {
    if (!APICallError.isInstance(thrown)) throw thrown;
    const { error } = thrown.data as { error: { param: string | null } };
    return { status: thrown.statusCode, param: error.param, message: thrown.message };
  },
  hasLeft: isAbort,
};

/** The AI SDK's provider, told that http pictures may be passed on as URLs. */
export function vercel(url: string, supportedUrls: Record<string, RegExp[]> = { "image/*": [/^https?:/] }) {
  const options = { name: "vispec", baseURL: `${url}/v1`, includeUsage: true, supportsStructuredOutputs: true };
  return createOpenAICompatible({ ...options, supportedUrls: () => supportedUrls });
}

/** Bytes for a data: URL, as the SDK's users have them. */
function imagePart({ image_url }: { image_url?: { url: string } }) {
  const url = image_url!.url;
  return url.startsWith("data:")
    ? { type: "image", image: new Uint8Array(Buffer.from(url.slice(url.indexOf(",") + 1), "base64")) }
    : { type: "image", image: new URL(url) };
}

const langchain: Client = {
  async ask({ url, messages, model = MODEL_ID, maxTokens, signal, onPiece }) {
    const chat = new ChatOpenAI({
      ...{ model, apiKey: "none", maxRetries: 0, temperature: 0, maxTokens },
      configuration: { baseURL: `${url}/v1` },
    });
    const asked = messages.map(({ role, content }) =>
      role === "user" ? new HumanMessage({ content } as never) : new AIMessage(content as string),
    );
    let message: AIMessage | AIMessageChunk | undefined;
    if (!onPiece) message = await chat.invoke(asked, { signal });
    else
      for await (const chunk of await chat.stream(asked, { signal })) {
        if (chunk.content !== "") onPiece(chunk.content as string);
        message = message ? (message as AIMessageChunk).concat(chunk) : chunk;
      }
    const { content, response_metadata, usage_metadata } = message!;
    return answer(content as string, response_metadata.finish_reason as string, usage_metadata?.input_tokens, usage_metadata?.output_tokens); // biome-ignore format: one line
  },
  refusal: openai.refusal,
  hasLeft: isAbort,
};

/** What a client without a library does: fetch, and the stream's events by hand. */
const rawFetch: Client = {
  async ask({ url, messages, model = MODEL_ID, maxTokens, signal, onPiece }) {
    const stream = onPiece ? { stream: true, stream_options: { include_usage: true } } : {};
    const response = await fetch(`${url}/v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model, messages, temperature: 0, max_tokens: maxTokens, ...stream }),
      signal,
    });
    if (!response.ok) throw new HttpError(response.status, ((await response.json()) as { error: ErrorBody }).error);
    if (!onPiece) {
      const { choices, usage } = (await response.json()) as OpenAI.ChatCompletion;
      return answer(choices[0].message.content!, choices[0].finish_reason, usage?.prompt_tokens, usage?.completion_tokens); // biome-ignore format: one line
    }
    let [text, finish, usage]: [string, string?, OpenAI.CompletionUsage?] = [""];
    for await (const chunk of serverSentEvents(response)) {
      const choice = chunk.choices[0];
      if (choice?.delta.content) onPiece(choice.delta.content);
      text += choice?.delta.content ?? "";
      finish ??= choice?.finish_reason ?? undefined;
      usage ??= chunk.usage ?? undefined;
    }
    return answer(text, finish, usage?.prompt_tokens, usage?.completion_tokens);
  },
  refusal(thrown) {
    if (!(thrown instanceof HttpError)) throw thrown;
    return { status: thrown.status, ...thrown.body };
  },
  hasLeft: isAbort,
};

function isAbort(thrown: unknown): boolean {
  return thrown instanceof Error && thrown.name === "AbortError";
}

interface ErrorBody {
  message: string;
  param: string | null;
}

class HttpError extends Error {
  readonly status: number;
  readonly body: ErrorBody;

  constructor(status: number, body: ErrorBody) {
    super(body.message);
    this.status = status;
    this.body = body;
  }
}

/** The chunks of a stream; throws if it ends without [DONE], or with an error. */
export async function* serverSentEvents(response: Response): AsyncGenerator<OpenAI.ChatCompletionChunk> {
  let text = "";
  for await (const part of response.body!.pipeThrough(new TextDecoderStream())) {
    const events = (text + part).split("\n\n");
    text = events.pop()!;
    for (const event of events) {
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
  throw new Error("the stream has no end");
}

function answer(text: string, finish: Answer["finish"], promptTokens?: number, completionTokens?: number): Answer {
  return { text, finish, promptTokens, completionTokens };
}

export const clients = { openai, "the Vercel AI SDK": aiSdk, LangChain: langchain, "raw fetch": rawFetch };
