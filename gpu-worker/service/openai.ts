/** Steps of the engine in the words of OpenAI's API: one JSON body, or server-sent events. Sends nothing itself. */
import type { ApiError } from "../../shared/errors.ts";
import type { GenerateRequest, ModelInfo } from "../../shared/protocol.ts";
import { Detokenizer, type Tokenizer } from "../../shared/tokenizer.ts";
import { utf8 } from "../../shared/utf8.ts";
import type { Finish, Step, TokenLogprob } from "../engine.ts";

/** Writes one answer. Its strings are put together by hand, since this runs for every step of every stream. */
export class Answer {
  readonly #request: GenerateRequest;
  readonly #tokenizer: Tokenizer;
  readonly #isChat: boolean;
  /** `"object":…,"created":…,"model":…,"service_tier":…,"id":…` of a body and of a chunk. */
  readonly #bodyHead: string;
  readonly #chunkHead: string;
  /** OpenAI has "usage":null in all chunks but the last when usage was asked for. */
  readonly #chunkEnd: string;
  readonly #newLogprobs: () => LogprobWriter;
  /** The choice that is being streamed, when its first tokens came, and its log-probabilities. */
  #choice = -1;
  #began = 0;
  #logprobs: LogprobWriter;
  /** Of the choices that have ended. */
  readonly #finishes: Finish[] = [];

  /** `created`: seconds since 1970. */
  constructor(request: GenerateRequest, info: ModelInfo, tokenizer: Tokenizer, created: number) {
    this.#request = request;
    this.#tokenizer = tokenizer;
    this.#isChat = request.kind === "chat";
    this.#newLogprobs = () => (this.#isChat ? chatLogprobs(tokenizer) : completionLogprobs(tokenizer));
    const tier = request.priority === "batch" ? "flex" : "default";
    const identity = `"created":${created},"model":${JSON.stringify(info.id)},"service_tier":"${tier}","id":${JSON.stringify(request.id)}`;
    this.#bodyHead = `"object":"${this.#isChat ? "chat.completion" : "text_completion"}",${identity}`;
    this.#chunkHead = `data: {"object":"${this.#isChat ? "chat.completion.chunk" : "text_completion"}",${identity}`;
    this.#chunkEnd = request.includeUsage ? `,"usage":null}\n\n` : `}\n\n`;
    this.#logprobs = this.#newLogprobs();
  }

  /** A choice's first event, which names the role in a chat. */
  #streamStart(choice: number): string {
    this.#choice = choice;
    this.#began = performance.now();
    this.#logprobs = this.#newLogprobs();
    return this.#isChat
      ? this.#chunk(`"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null`, "null")
      : "";
  }

  /** Events of one step: its text, if any; after a choice's last one the reason; after all choices usage and [DONE]. */
  streamStep(step: Step): string {
    let events = step.choice === this.#choice ? "" : this.#streamStart(step.choice);
    const { includeDrafts, n } = this.#request;
    const listed = this.#listed(step);
    if (step.text !== "" || listed?.length || (includeDrafts && step.tokens.length > 0)) {
      const logprobs = listed ? this.#logprobs(listed) : "null";
      events += this.#chunk(this.#delta(step.text, logprobs), "null", includeDrafts ? this.#draft(step) : "");
    }
    if (!step.finish) return events;
    this.#finishes.push(step.finish);
    const last = this.#isChat ? `"delta":{},"logprobs":null` : this.#delta("", "null");
    events += this.#chunk(last, `"${step.finish.reason}"`);
    return this.#finishes.length < n ? events : events + this.#streamEnd();
  }

  #streamEnd(): string {
    const usage = `${this.#chunkHead},"choices":[],"usage":${usageOf(this.#finishes)}}\n\n`;
    return `${this.#request.includeUsage ? usage : ""}data: [DONE]\n\n`;
  }

  #delta(text: string, logprobs: string): string {
    const json = JSON.stringify(text);
    return `${this.#isChat ? `"delta":{"content":${json}}` : `"text":${json}`},"logprobs":${logprobs}`;
  }

  #chunk(delta: string, reason: string, draft = ""): string {
    const choice = `{"index":${this.#choice},${delta},"finish_reason":${reason}}`;
    return `${this.#chunkHead},"choices":[${choice}]${draft}${this.#chunkEnd}`;
  }

  /** Own extension. The time is the worker's: what it sends at short intervals often arrives at once. */
  #draft({ tokens, accepted, draftText }: Step): string {
    const ms = (performance.now() - this.#began).toFixed(2);
    return `,"draft":{"tokens":${tokens.length},"accepted":${accepted},"characters":${draftText},"ms":${Number(ms)}}`;
  }

  /** The body of an answer that is not streamed; `steps` are all of it. */
  body(steps: Step[]): string {
    const choices = Array.from({ length: this.#request.n }, (_, i) => steps.filter(({ choice }) => choice === i));
    const written = choices.map((own, i) => this.#bodyChoice(i, own)).join();
    return `{${this.#bodyHead},"choices":[${written}],"usage":${usageOf(this.#finishes)}}`;
  }

  #bodyChoice(choice: number, steps: Step[]): string {
    const finish = steps.at(-1)?.finish;
    if (!finish) throw new Error("the engine ended without a finish");
    this.#finishes.push(finish);
    const text = JSON.stringify(steps.map((step) => step.text).join(""));
    const message = this.#isChat ? `"message":{"role":"assistant","content":${text},"refusal":null}` : `"text":${text}`;
    const listed = steps.flatMap((step) => this.#listed(step) ?? []);
    const logprobs = this.#request.logprobs === null ? "null" : this.#newLogprobs()(listed);
    return `{"index":${choice},${message},"logprobs":${logprobs},"finish_reason":"${finish.reason}"}`;
  }

  /** A step's log-probabilities, without that of a token which ended the choice and is no part of its text. */
  #listed({ tokens, logprobs, finish }: Step): TokenLogprob[] | undefined {
    if (!logprobs || finish?.reason !== "stop") return logprobs;
    const last = tokens.at(-1)!;
    const isText = !this.#tokenizer.isSpecial(last) && !this.#request.stopTokenIds.includes(last);
    return isText ? logprobs : logprobs.slice(0, -1);
  }
}

/** What the parts of a choice's text, in their order, have as log-probabilities. */
type LogprobWriter = (tokens: TokenLogprob[]) => string;

function chatLogprobs(tokenizer: Tokenizer): LogprobWriter {
  const fields = ({ token, logprob }: { token: number; logprob: number }) => {
    const bytes = tokenizer.tokenBytes(token);
    const text = JSON.stringify(tokenizer.decodeBytes(bytes));
    return `"token":${text},"logprob":${finite(logprob)},"bytes":[${bytes.join()}]`;
  };
  const entry = (one: TokenLogprob) =>
    `{${fields(one)},"top_logprobs":[${one.top.map((other) => `{${fields(other)}}`).join()}]}`;
  return (tokens) => `{"content":[${tokens.map(entry).join()}],"refusal":null}`;
}

/** The form of /v1/completions. Offsets are in code points of the choice's text, as vLLM has them. */
function completionLogprobs(tokenizer: Tokenizer): LogprobWriter {
  const detokenizer = new Detokenizer(tokenizer);
  let end = 0;
  const offset = ({ token }: TokenLogprob) => {
    const start = end;
    end += [...detokenizer.push(token)].length;
    return start;
  };
  // A part of a character is written as OpenAI does, by its bytes.
  const name = (token: number) => {
    const bytes = tokenizer.tokenBytes(token);
    const hex = () => Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
    return utf8.isValid(bytes) ? tokenizer.decodeBytes(bytes) : `bytes:${hex()}`;
  };
  // The chosen token is among them, even if it is none of the likeliest.
  const likeliest = (one: TokenLogprob) =>
    Object.fromEntries([...one.top, one].map(({ token, logprob }) => [name(token), finite(logprob)]));
  return (tokens) =>
    JSON.stringify({
      tokens: tokens.map(({ token }) => name(token)),
      token_logprobs: tokens.map(({ logprob }) => finite(logprob)),
      top_logprobs: tokens.map(likeliest),
      text_offset: tokens.map(offset),
    });
}

/** JSON has no -Infinity; OpenAI writes -9999 for a token that is (almost) impossible. */
const finite = (logprob: number) => (Number.isFinite(logprob) ? logprob : -9999);

/** The event of an error after the stream has begun; the stream ends with it. */
export function errorEvent(error: ApiError): string {
  return `data: ${JSON.stringify(error)}\n\n`;
}

/** OpenAI's usage object for all choices. Its "predictions" are drafts here: those kept, and those in vain. */
function usageOf(finishes: Finish[]): string {
  const sum = (count: (finish: Finish) => number) => finishes.reduce((total, finish) => total + count(finish), 0);
  const { promptTokens, cachedTokens, imageTokens } = finishes[0];
  const completionTokens = sum((finish) => finish.completionTokens);
  const accepted = sum((finish) => finish.acceptedPerCycle.reduce((total, count) => total + count, 0));
  const drafted = sum((finish) => finish.drafted);
  return JSON.stringify({
    prompt_tokens: promptTokens,
    completion_tokens: completionTokens,
    total_tokens: promptTokens + completionTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens, image_tokens: imageTokens },
    completion_tokens_details: {
      accepted_prediction_tokens: accepted,
      rejected_prediction_tokens: Math.max(0, drafted - accepted),
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
