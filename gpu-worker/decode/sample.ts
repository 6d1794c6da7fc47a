/** Draws tokens from logits. Knows the text so far and a seed, no tree; probabilities and uniforms are float64. */
import type { Sampling } from "../../shared/protocol.ts";

/** What an answer has to keep to, token by token. */
export interface Constraint {
  /** One bit a token, from the lowest of each word on: set for those that may come next. */
  mask(): Promise<Int32Array>;
  /** Goes on after a token that was allowed. */
  accept(token: number): void;
}

/** Uniform float64 in [0,1) with 53 random bits, from a seed (sfc32, Chris Doty-Humphrey's PractRand). */
export function uniforms(seed: number): () => number {
  const low = seed >>> 0;
  let [a, b, c, counter] = [low, Math.floor(seed / 2 ** 32) >>> 0, 0x9e3779b9, 1];
  const next = () => {
    const t = (((a + b) | 0) + counter++) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + t) | 0;
    return t >>> 0;
  };
  for (let i = 0; i < 15; i++) next();
  return () => ((next() >>> 5) * 2 ** 26 + (next() >>> 6)) / 2 ** 53;
}

/** The seed of a request's i-th choice: seed + i, which goes on with the smallest seed after the largest. */
export function seedOf(seed: number, i: number): number {
  const beyond = seed - Number.MAX_SAFE_INTEGER + i;
  return beyond > 0 ? Number.MIN_SAFE_INTEGER + beyond - 1 : seed + i;
}

/** Index of the largest value; the first on ties. Two simple passes are faster than one that remembers where it was. */
export function argmax(logits: Float32Array): number {
  let highest = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < logits.length; i++) highest = logits[i] > highest ? logits[i] : highest;
  return Math.max(0, logits.indexOf(highest));
}

/** exp(logits / temperature), scaled so that the largest is 1. */
function weigh(logits: Float32Array, temperature: number): Float64Array {
  const highest = logits[argmax(logits)];
  const weights = new Float64Array(logits.length);
  for (let i = 0; i < logits.length; i++) weights[i] = Math.exp((logits[i] - highest) / temperature);
  return weights;
}

/** Indices of at least `enough` of the heaviest weights, in falling order (the lower index first on ties). */
function heaviest(weights: Float64Array, enough: (count: number, sum: number) => boolean): number[] {
  // Nearly always a few tokens are enough, so that sorting the whole vocabulary is the last resort.
  for (const floor of [1e-3, 1e-6, 0]) {
    const ids: number[] = [];
    let sum = 0;
    for (let i = 0; i < weights.length; i++)
      if (weights[i] > floor) {
        ids.push(i);
        sum += weights[i];
      }
    if (floor === 0 || enough(ids.length, sum)) return ids.sort((a, b) => weights[b] - weights[a] || a - b);
  }
  return [];
}

/**
 * Unnormalised probabilities of the next token, the largest 1: temperature first, then top-k, top-p (the fewest of the
 * likeliest tokens that together reach it) and min-p, each on what the one before left, as transformers' warpers do.
 * temperature must be above 0.
 */
export function distribution(logits: Float32Array, { temperature, topK, topP, minP }: Sampling): Float64Array {
  const weights = weigh(logits, temperature);
  const cutK = topK > 0 && topK < weights.length;
  if (cutK || topP < 1) {
    const all = weights.reduce((a, b) => a + b, 0);
    const order = heaviest(weights, (count, sum) => (cutK ? count >= topK : sum >= topP * all));
    const pool = cutK ? order.slice(0, topK) : order;
    const total = cutK ? pool.reduce((a, i) => a + weights[i], 0) : all;
    const kept = new Map<number, number>();
    let sum = 0;
    for (const id of pool) {
      if (topP < 1 && sum >= topP * total) break;
      kept.set(id, weights[id]);
      sum += weights[id];
    }
    weights.fill(0);
    for (const [id, weight] of kept) weights[id] = weight;
  }
  if (minP > 0) for (let i = 0; i < weights.length; i++) if (weights[i] < minP) weights[i] = 0;
  return weights;
}

/**
 * Bias and penalties on a row of logits, in the order and by the formulas of vLLM's sampler. `counts`: how often each
 * token is in the answer; `repeated`: the tokens of prompt and answer, for the repetition penalty.
 */
export function adjust(
  logits: Float32Array,
  { logitBias, repetitionPenalty, presencePenalty, frequencyPenalty }: Sampling,
  counts: ReadonlyMap<number, number>,
  repeated: ReadonlySet<number>,
): void {
  for (const [token, bias] of logitBias) logits[token] += bias;
  for (const token of repeated)
    logits[token] = logits[token] > 0 ? logits[token] / repetitionPenalty : logits[token] * repetitionPenalty;
  for (const [token, count] of counts) logits[token] -= frequencyPenalty * count + presencePenalty;
}

/**
 * Draws an answer's tokens, one uniform each, so that the text depends on nothing but logits and seed. Verification asks
 * for one token after the other along the path that is accepted, so the tokens drawn are the text so far: penalties and
 * constraint are those of the path, whatever the tree.
 */
export class Sampler {
  readonly #sampling: Sampling;
  readonly #constraint: Constraint | undefined;
  readonly #uniform: () => number;
  /** Whether logits are changed before the draw; else nothing is copied or counted. */
  readonly #adjusts: boolean;
  /** How often each token is in the answer. */
  readonly #counts = new Map<number, number>();
  /** Tokens of prompt and answer. */
  readonly #repeated: Set<number>;
  /** A row of logits that may be written to, made when one is needed. */
  #row: Float32Array | undefined;

  /** `prompt`: its tokens, which the repetition penalty looks at. */
  constructor(sampling: Sampling, prompt: readonly number[] = [], constraint?: Constraint) {
    this.#sampling = sampling;
    this.#constraint = constraint;
    this.#uniform = uniforms(sampling.seed);
    const { logitBias, presencePenalty, frequencyPenalty, repetitionPenalty } = sampling;
    this.#adjusts = logitBias.length > 0 || presencePenalty !== 0 || frequencyPenalty !== 0 || repetitionPenalty !== 1;
    this.#repeated = new Set(this.#adjusts ? prompt : []);
  }

  /** Whether it takes the likeliest token, whatever came before. */
  get greedy(): boolean {
    return this.#sampling.temperature === 0 && !this.#adjusts && !this.#constraint;
  }

  /** The next token after a row of logits, never one of probability 0; a promise where there is a constraint. */
  next(logits: Float32Array): number | Promise<number> {
    if (this.#constraint) return this.#nextAllowed(logits, this.#constraint);
    return this.#take(this.#adjusts ? this.#adjusted(logits) : logits);
  }

  async #nextAllowed(logits: Float32Array, constraint: Constraint): Promise<number> {
    const mask = await constraint.mask();
    const row = this.#adjusted(logits);
    for (let i = 0; i < row.length; i++)
      if (((mask[i >>> 5] >>> (i & 31)) & 1) === 0) row[i] = Number.NEGATIVE_INFINITY;
    const token = this.#take(row);
    constraint.accept(token);
    return token;
  }

  #adjusted(logits: Float32Array): Float32Array {
    this.#row ??= new Float32Array(logits.length);
    this.#row.set(logits);
    adjust(this.#row, this.#sampling, this.#counts, this.#repeated);
    return this.#row;
  }

  #take(logits: Float32Array): number {
    const token = this.#sampling.temperature === 0 ? argmax(logits) : this.#draw(logits);
    if (!this.#adjusts) return token;
    this.#counts.set(token, (this.#counts.get(token) ?? 0) + 1);
    this.#repeated.add(token);
    return token;
  }

  #draw(logits: Float32Array): number {
    const weights = distribution(logits, this.#sampling);
    const target = this.#uniform() * weights.reduce((a, b) => a + b, 0);
    let sum = 0;
    let last = 0;
    for (let i = 0; i < weights.length; i++) {
      if (weights[i] === 0) continue;
      last = i;
      if ((sum += weights[i]) > target) return i;
    }
    return last; // rounding let the uniform reach the very end
  }
}
