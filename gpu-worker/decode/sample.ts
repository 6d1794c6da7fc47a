/** Draws tokens from logits. Knows one row of logits and a seed; probabilities and uniforms are float64. */
import type { Sampling } from "../../shared/protocol.ts";

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

/** Draws a sequence's tokens, one uniform each, so that the text depends on nothing but logits and seed. */
export class Sampler {
  readonly #sampling: Sampling;
  readonly #uniform: () => number;

  constructor(sampling: Sampling) {
    this.#sampling = sampling;
    this.#uniform = uniforms(sampling.seed);
  }

  /** The next token after a row of logits. Never one of probability 0. */
  next(logits: Float32Array): number {
    if (this.#sampling.temperature === 0) return argmax(logits);
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
