/** From a request to steps of text: expands the prompt, decodes, detokenises, stops, counts. Knows no HTTP and no process. */
import { ApiError } from "../../shared/errors.ts";
import type { GenerateRequest } from "../../shared/protocol.ts";
import { Detokenizer, type Tokenizer } from "../../shared/tokenizer.ts";
import type { KeptImage } from "../engine/images.ts";
import type { Finish, Step, TokenLogprob } from "../engine.ts";
import type { ModelFiles } from "../model/model.ts";
import { type Cycle, decode } from "./decode.ts";
import type { Drafter } from "./drafters/drafter.ts";
import type { Grammars } from "./grammar/grammar.ts";
import { Sampler, seedOf } from "./sample.ts";
import { StopStrings } from "./stop.ts";
import type { TargetModel } from "./target.ts";

/** What is the same for all choices of a request. */
interface Asked {
  request: GenerateRequest;
  tokenizer: Tokenizer;
  promptTokens: number;
  imageTokens: number;
  maxTokens: number;
  stopTokens: ReadonlySet<number>;
}

/** Turns one choice's cycles into steps, and counts. */
class Writer {
  readonly #choice: number;
  readonly #asked: Asked;
  /** Milliseconds, as performance.now() has it. */
  readonly #begun: number;
  readonly #detokenizer: Detokenizer;
  readonly #stops: StopStrings;
  readonly #finish: Omit<Finish, "reason">;

  constructor(choice: number, asked: Asked, begun: number) {
    this.#choice = choice;
    this.#asked = asked;
    this.#begun = begun;
    this.#detokenizer = new Detokenizer(asked.tokenizer);
    this.#stops = new StopStrings(asked.request.stop);
    const { promptTokens, imageTokens } = asked;
    const timings = { prefill: 0, draft: 0, verify: 0, total: 0 };
    const counts = { cachedTokens: 0, completionTokens: 0, cycles: 0, acceptedPerCycle: [], drafted: 0 };
    this.#finish = { promptTokens, imageTokens, ...counts, timings };
  }

  /** The step of a cycle; with `finish` it is the choice's last, and the rest of the cycle is cut off. */
  step(cycle: Cycle): Step {
    const { logprobs } = this.#asked.request;
    this.#count(cycle);
    const step: Step = { choice: this.#choice, tokens: [], accepted: cycle.accepted, text: "", draftText: 0 };
    if (logprobs !== null) step.logprobs = [];
    for (const [i, token] of cycle.tokens.entries()) {
      step.tokens.push(token);
      this.#finish.completionTokens++;
      if (logprobs !== null) step.logprobs!.push(logprobsOf(cycle.logits(i), token, logprobs));
      const reason = this.#write(step, token);
      if (i < cycle.accepted) step.draftText = step.text.length;
      if (reason === null) continue;
      // Drafts that were accepted beyond the end are not part of the answer.
      step.accepted = Math.min(step.accepted, step.tokens.length);
      const { acceptedPerCycle } = this.#finish;
      if (acceptedPerCycle.length > 0) acceptedPerCycle[acceptedPerCycle.length - 1] = step.accepted;
      this.#finish.timings.total = performance.now() - this.#begun;
      step.finish = { ...this.#finish, reason };
      break;
    }
    return step;
  }

  #count(cycle: Cycle): void {
    const finish = this.#finish;
    if (finish.completionTokens === 0) {
      finish.timings.prefill = cycle.verifyMs;
      finish.cachedTokens = cycle.cached ?? 0;
      return;
    }
    finish.cycles++;
    finish.acceptedPerCycle.push(cycle.accepted);
    finish.drafted += cycle.drafted;
    finish.timings.draft += cycle.draftMs;
    finish.timings.verify += cycle.verifyMs;
  }

  /** Adds a token's text to the step; says why the choice ends with it, if it does. */
  #write(step: Step, token: number): Finish["reason"] | null {
    const { stopTokens, maxTokens } = this.#asked;
    const stop = stopTokens.has(token);
    const { text, stopped } = this.#stops.push(stop ? this.#detokenizer.flush() : this.#detokenizer.push(token));
    step.text += text;
    if (!stop && !stopped && this.#finish.completionTokens < maxTokens) return null;
    if (!stopped) {
      const rest = this.#stops.push(this.#detokenizer.flush());
      step.text += rest.stopped ? rest.text : rest.text + this.#stops.flush();
    }
    return stop || stopped ? "stop" : "length";
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

/** What answering takes of an engine. */
export interface Generating {
  model: Pick<ModelFiles, "config" | "family">;
  target: TargetModel;
  tokenizer: Tokenizer;
  drafter: Drafter;
  /** Decodes without drafts. */
  plain: Drafter;
  grammars: Grammars;
}

/**
 * All choices of one request, cycle by cycle; each one's last step has `finish`. `images` are the pictures' rows in the
 * order of the request. Throws ApiError 400 for a request that does not fit the model or its context, and for a schema
 * that cannot be kept to; the signal's reason when it is aborted.
 */
export async function* generate(
  engine: Generating,
  request: GenerateRequest,
  images: KeptImage[],
  signal: AbortSignal,
): AsyncGenerator<Step> {
  const { model, target, tokenizer } = engine;
  const { contextLength, eosTokens, language } = model.config;
  checkTokens(request, language.vocabulary);
  const expanded = model.family.expandPrompt(request.tokens, images);
  const promptTokens = expanded.tokens.length;
  const imageTokens = expanded.images.reduce((sum, { count }) => sum + count, 0);
  const maxTokens = roomFor(promptTokens, request, contextLength);
  const stopTokens = new Set([...(request.ignoreEos ? [] : eosTokens), ...request.stopTokenIds]);
  const asked = { request, tokenizer, promptTokens, imageTokens, maxTokens, stopTokens };
  using matchers = new DisposableStack();
  const samplers: Sampler[] = [];
  for (let choice = 0; choice < request.n; choice++) {
    const sampling = { ...request.sampling, seed: seedOf(request.sampling.seed, choice) };
    const matcher = request.json ? matchers.use(await engine.grammars.open(request.json, stopTokens)) : undefined;
    samplers.push(new Sampler(sampling, expanded.tokens, matcher));
  }
  const shared = { tenant: request.tenant, images };
  const prompt = { expanded, imageRows: images.map((i) => i.rows), shared };
  const drafter = request.plain ? engine.plain : engine.drafter;
  const options = { samplers, maxTokens, stopTokens, signal, logits: request.logprobs !== null };
  let choice = 0;
  let begun = performance.now();
  for await (const cycles of decode(target, drafter, prompt, options)) {
    const writer = new Writer(choice++, asked, begun);
    for await (const cycle of cycles) {
      const step = writer.step(cycle);
      yield step;
      if (step.finish) break;
    }
    begun = performance.now();
  }
}

/** The parameter that a prompt came in. */
const promptParam = ({ kind }: GenerateRequest) => (kind === "chat" ? "messages" : "prompt");

function checkTokens(request: GenerateRequest, vocabulary: number): void {
  const { tokens, sampling, stopTokenIds, json, ignoreEos } = request;
  const check = (ids: readonly number[], param: string) => {
    const bad = ids.find((id) => id >= vocabulary);
    if (bad === undefined) return;
    throw new ApiError(400, `${param}: token ${bad} is not in the vocabulary of ${vocabulary}`, { param });
  };
  check(tokens, promptParam(request));
  check(sampling.logitBias.map(([token]) => token), "logit_bias"); // biome-ignore format: one line
  check(stopTokenIds, "stop_token_ids");
  if (json && ignoreEos) {
    const why = "ignore_eos: an answer in JSON ends where its grammar does, with the end-of-sequence token";
    throw new ApiError(400, why, { param: "ignore_eos" });
  }
}

/** How many tokens a choice may have. */
function roomFor(prompt: number, request: GenerateRequest, context: number): number {
  const { maxTokens } = request;
  const room = context - prompt;
  const code = "context_length_exceeded";
  if (room < 1) {
    const why = `the prompt has ${prompt} tokens, its images' included; the model's context is ${context}`;
    throw new ApiError(400, why, { code, param: promptParam(request) });
  }
  if (maxTokens !== null && maxTokens > room) {
    const why = `max_tokens is ${maxTokens}, but the prompt's ${prompt} tokens, its images' included, leave ${room} of the model's context of ${context}`;
    throw new ApiError(400, why, { code, param: "max_tokens" });
  }
  return maxTokens ?? room;
}
