/** From a request to steps of text: expands the prompt, decodes, detokenises, stops, counts. Knows no HTTP and no process. */
import { ApiError } from "../../shared/errors.ts";
import type { GenerateRequest } from "../../shared/protocol.ts";
import { Detokenizer, type Tokenizer } from "../../shared/tokenizer.ts";
import type { ImageRows } from "../engine/images.ts";
import type { Target } from "../engine/target.ts";
import type { Finish, Step, TokenLogprob } from "../engine.ts";
import type { Model } from "../model/model.ts";
import { expandPrompt } from "../model/qwen/positions.ts";
import { type Cycle, decode } from "./decode.ts";
import type { Drafter } from "./drafters/drafter.ts";
import { Sampler } from "./sample.ts";
import { StopStrings } from "./stop.ts";

/** The last step's news of the whole generation, as it grows. */
class Tally {
  readonly finish: Omit<Finish, "reason">;
  readonly #begun = performance.now();

  constructor(promptTokens: number, imageTokens: number) {
    this.finish = {
      promptTokens,
      imageTokens,
      completionTokens: 0,
      cycles: 0,
      acceptedPerCycle: [],
      drafted: 0,
      timings: { prefill: 0, draft: 0, verify: 0, total: 0 },
    };
  }

  add(cycle: Cycle): void {
    const { finish } = this;
    if (finish.timings.prefill === 0) {
      finish.timings.prefill = cycle.verifyMs;
      return;
    }
    finish.cycles++;
    finish.acceptedPerCycle.push(cycle.accepted);
    finish.drafted += cycle.drafted;
    finish.timings.draft += cycle.draftMs;
    finish.timings.verify += cycle.verifyMs;
  }

  end(reason: Finish["reason"]): Finish {
    this.finish.timings.total = performance.now() - this.#begun;
    return { ...this.finish, reason };
  }
}

/** The chosen token's log-probability and those of the n likeliest, under softmax(logits). */
export function logprobsOf(logits: Float32Array, token: number, n: number): TokenLogprob {
  let highest = Number.NEGATIVE_INFINITY;
  for (const value of logits) if (value > highest) highest = value;
  let sum = 0;
  for (const value of logits) sum += Math.exp(value - highest);
  const log = highest + Math.log(sum);
  const top: { token: number; logprob: number }[] = [];
  for (let i = 0; n > 0 && i < logits.length; i++) {
    if (top.length === n && logits[i] - log <= top[n - 1].logprob) continue;
    const at = top.findIndex((t) => t.logprob < logits[i] - log);
    top.splice(at < 0 ? top.length : at, 0, { token: i, logprob: logits[i] - log });
    if (top.length > n) top.pop();
  }
  return { token, logprob: logits[token] - log, top };
}

/**
 * One request, cycle by cycle; the last step has `finish`. `images` are the pictures' rows in the order of the request.
 * Throws ApiError 400 when prompt and answer do not fit the context, and the signal's reason when it is aborted.
 */
export async function* generate(
  engine: { model: Model; target: Target; tokenizer: Tokenizer; drafter: Drafter },
  request: GenerateRequest,
  images: ImageRows[],
  signal: AbortSignal,
): AsyncGenerator<Step> {
  const { model, target, tokenizer, drafter } = engine;
  const { imageToken, contextLength, eosTokens } = model.config;
  const grids = images.map(({ grid }) => grid);
  const expanded = expandPrompt(request.tokens, grids, imageToken);
  checkTokens(request.tokens, model.config.language.vocabulary);
  const maxTokens = roomFor(expanded.tokens.length, request.maxTokens, contextLength);
  const stopTokens = new Set([...eosTokens, ...request.stopTokenIds]);
  const detokenizer = new Detokenizer(tokenizer);
  const stops = new StopStrings(request.stop);
  const imageTokens = expanded.images.reduce((sum, { count }) => sum + count, 0);
  const tally = new Tally(expanded.tokens.length, imageTokens);
  const options = { sampler: new Sampler(request.sampling), maxTokens, stopTokens, signal };
  const prompt = { expanded, imageRows: images.map((i) => i.rows) };

  for await (const cycle of decode(target, drafter, prompt, options)) {
    tally.add(cycle);
    const step: Step = { tokens: [], accepted: cycle.accepted, text: "", draftText: 0 };
    if (request.logprobs !== null) step.logprobs = [];
    for (const [i, token] of cycle.tokens.entries()) {
      step.tokens.push(token);
      tally.finish.completionTokens++;
      if (request.logprobs !== null) step.logprobs!.push(logprobsOf(cycle.logits(i), token, request.logprobs));
      const stop = stopTokens.has(token);
      const { text, stopped } = stops.push(stop ? detokenizer.flush() : detokenizer.push(token));
      step.text += text;
      if (i < cycle.accepted) step.draftText = step.text.length;
      if (!stop && !stopped && tally.finish.completionTokens < maxTokens) continue;
      if (!stopped) {
        const rest = stops.push(detokenizer.flush());
        step.text += rest.stopped ? rest.text : rest.text + stops.flush();
      }
      step.accepted = Math.min(step.accepted, step.tokens.length);
      step.finish = tally.end(stop || stopped ? "stop" : "length");
      yield step;
      return;
    }
    yield step;
  }
}

function checkTokens(tokens: readonly number[], vocabulary: number): void {
  const bad = tokens.find((t) => t >= vocabulary);
  if (bad !== undefined) throw new ApiError(400, `token ${bad} is not in the vocabulary of ${vocabulary}`);
}

/** How many tokens the answer may have. */
function roomFor(prompt: number, asked: number | null, context: number): number {
  const room = context - prompt;
  const code = "context_length_exceeded";
  if (room < 1)
    throw new ApiError(
      400,
      `the prompt has ${prompt} tokens, its images' included; the model's context is ${context}`,
      {
        code,
        param: "messages",
      },
    );
  if (asked !== null && asked > room)
    throw new ApiError(
      400,
      `max_tokens is ${asked}, but the prompt's ${prompt} tokens, its images' included, leave ${room} of the model's context of ${context}`,
      { code, param: "max_tokens" },
    );
  return asked ?? room;
}
