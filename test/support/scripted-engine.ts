/** An Engine without a model, for tests of the HTTP side: it yields what a script says and notes what it was asked. */
import type { Engine, Finish, Step } from "../../gpu-worker/engine.ts";
import { ApiError } from "../../shared/errors.ts";
import type { GenerateRequest, ModelInfo } from "../../shared/protocol.ts";
import { tinyModel } from "./tiny-model.ts";

export type Script = (request: GenerateRequest, signal: AbortSignal) => AsyncIterable<Step>;

export class ScriptedEngine implements Engine {
  info: ModelInfo = { ...tinyModel };
  ready = true;
  restarts = 0;
  concurrency = 1;
  /** Keys of the images held, and those of every putImage so far. */
  readonly held = new Set<string>();
  readonly puts: string[] = [];
  readonly requests: GenerateRequest[] = [];
  readonly signals: AbortSignal[] = [];
  script: Script = words(["Hello", " there"]);

  async missingImages(keys: string[]): Promise<string[]> {
    return [...new Set(keys)].filter((key) => !this.held.has(key));
  }

  async putImage(key: string, bytes: Uint8Array): Promise<void> {
    this.puts.push(key);
    if (bytes[0] === 0) throw new ApiError(400, "the image cannot be decoded", { code: "invalid_image" });
    this.held.add(key);
  }

  generate(request: GenerateRequest, images: string[], signal: AbortSignal): AsyncIterable<Step> {
    this.requests.push(request);
    this.signals.push(signal);
    if (images.some((key) => !this.held.has(key)))
      return fails(new ApiError(409, "an image is not held any more", { code: "image_missing" }))(request, signal);
    return this.script(request, signal);
  }

  async close(): Promise<void> {}
}

/** A step of one token with this text. */
export function say(text: string, choice = 0): Step {
  return { choice, tokens: [1], accepted: 0, text, draftText: 0 };
}

/** A script that says these words, one a step, each step after a turn of the event loop. */
export function words(texts: string[]): Script {
  return async function* (request) {
    for (const text of texts) {
      await new Promise((resolve) => setImmediate(resolve));
      yield say(text);
    }
    yield { ...say(""), finish: finishOf(request, texts.length + 1) };
  };
}

/** A script that talks until it is aborted. */
export const chatter: Script = async function* (_request, signal) {
  while (!signal.aborted) {
    yield say("on ");
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
  throw signal.reason;
};

/** A script that gives no step until it is aborted. */
export const silence: Script = (_request, signal) =>
  firstStep(new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason))));

/** A script that fails before its first step. */
export const fails =
  (error: Error): Script =>
  () =>
    firstStep(Promise.reject(error));

function firstStep(step: Promise<never>): AsyncIterable<Step> {
  return { [Symbol.asyncIterator]: () => ({ next: () => step }) };
}

export function finishOf(request: GenerateRequest, completionTokens: number): Finish {
  return {
    reason: "stop",
    promptTokens: request.tokens.length,
    cachedTokens: 0,
    completionTokens,
    imageTokens: 0,
    cycles: 3,
    acceptedPerCycle: [2, 1, 0],
    drafted: 9,
    timings: { prefill: 0, draft: 0, verify: 0, total: 0 },
  };
}
