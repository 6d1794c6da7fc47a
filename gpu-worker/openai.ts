/** Steps of the engine in the words of OpenAI's chat API: one JSON body, or server-sent events. Sends nothing itself. */
import type { ApiError } from "../shared/errors.ts";
import type { GenerateRequest, ModelInfo } from "../shared/protocol.ts";
import type { Tokenizer } from "../shared/tokenizer.ts";
import type { Finish, Step, TokenLogprob } from "./engine.ts";

/** Writes one answer. Its strings are put together by hand, since this runs for every step of every stream. */
export class Answer {
  readonly #request: GenerateRequest;
  readonly #tokenizer: Tokenizer;
  readonly #created: number;
  /** `"id":…,"created":…,"model":…` */
  readonly #identity: string;
  readonly #chunkStart: string;
  readonly #chunkEnd: string;

  /** `created`: seconds since 1970. */
  constructor(request: GenerateRequest, info: ModelInfo, tokenizer: Tokenizer, created: number) {
    this.#request = request;
    this.#tokenizer = tokenizer;
    this.#created = created;
    this.#identity = `"created":${this.#created},"model":${JSON.stringify(info.id)},"id":${JSON.stringify(request.id)}`;
    this.#chunkStart = `data: {"object":"chat.completion.chunk",${this.#identity},"choices":[{"index":0,"delta":`;
    // OpenAI has "usage":null in all chunks but the last when usage was asked for.
    this.#chunkEnd = request.includeUsage ? `}],"usage":null}\n\n` : `}]}\n\n`;
  }

  /** The first event, which names the role. */
  streamStart(): string {
    return this.#chunk(`{"role":"assistant","content":"","refusal":null}`, "null", "null");
  }

  /** Events of one step: its text, if it has any; after the last one the reason, the usage if asked for, and [DONE]. */
  streamStep(step: Step): string {
    let events = "";
    if (step.text !== "" || step.logprobs?.length) {
      const logprobs = step.logprobs ? `{"content":${this.#logprobs(step.logprobs)},"refusal":null}` : "null";
      events = this.#chunk(`{"content":${JSON.stringify(step.text)}}`, logprobs, "null");
    }
    return step.finish ? events + this.#streamEnd(step.finish) : events;
  }

  #streamEnd(finish: Finish): string {
    const usage = this.#request.includeUsage
      ? `data: {"object":"chat.completion.chunk",${this.#identity},"choices":[],"usage":${usageOf(finish)}}\n\n`
      : "";
    return `${this.#chunk("{}", "null", `"${finish.reason}"`)}${usage}data: [DONE]\n\n`;
  }

  #chunk(delta: string, logprobs: string, reason: string): string {
    return `${this.#chunkStart}${delta},"logprobs":${logprobs},"finish_reason":${reason}${this.#chunkEnd}`;
  }

  /** The body of an answer that is not streamed; `steps` are all of it. */
  body(steps: Step[]): string {
    const finish = steps.at(-1)?.finish;
    if (!finish) throw new Error("the engine ended without a finish");
    const text = JSON.stringify(steps.map((step) => step.text).join(""));
    const all = this.#request.logprobs === null ? null : steps.flatMap((step) => step.logprobs ?? []);
    const logprobs = all ? `{"content":${this.#logprobs(all)},"refusal":null}` : "null";
    const message = `{"role":"assistant","content":${text},"refusal":null}`;
    const choice = `{"index":0,"message":${message},"logprobs":${logprobs},"finish_reason":"${finish.reason}"}`;
    return `{"object":"chat.completion",${this.#identity},"choices":[${choice}],"usage":${usageOf(finish)}}`;
  }

  #logprobs(tokens: TokenLogprob[]): string {
    const one = ({ token, logprob }: { token: number; logprob: number }) => {
      const bytes = this.#tokenizer.tokenBytes(token);
      // JSON has no -Infinity; OpenAI writes -9999 for a token that is (almost) impossible.
      const value = Number.isFinite(logprob) ? logprob : -9999;
      return `"token":${JSON.stringify(this.#tokenizer.decodeBytes(bytes))},"logprob":${value},"bytes":[${bytes.join()}]`;
    };
    return `[${tokens.map((token) => `{${one(token)},"top_logprobs":[${token.top.map((top) => `{${one(top)}}`).join()}]}`).join()}]`;
  }
}

/** The event of an error after the stream has begun; the stream ends with it. */
export function errorEvent(error: ApiError): string {
  return `data: ${JSON.stringify(error)}\n\n`;
}

/** OpenAI's usage object. Its "prediction" is the draft's here: tokens drafted and kept, and drafted in vain. */
function usageOf(finish: Finish): string {
  const accepted = finish.acceptedPerCycle.reduce((sum, count) => sum + count, 0);
  return JSON.stringify({
    prompt_tokens: finish.promptTokens,
    completion_tokens: finish.completionTokens,
    total_tokens: finish.promptTokens + finish.completionTokens,
    prompt_tokens_details: { image_tokens: finish.imageTokens },
    completion_tokens_details: {
      accepted_prediction_tokens: accepted,
      rejected_prediction_tokens: Math.max(0, finish.drafted - accepted),
    },
  });
}

/** Body of GET /v1/models. */
export function modelList(info: ModelInfo): string {
  return JSON.stringify({
    object: "list",
    data: [{ id: info.id, object: "model", created: info.created, owned_by: "vispec" }],
  });
}
