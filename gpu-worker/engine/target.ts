/** The big model: prefill, scoring of trees, commit of the accepted path. Knows sessions and memory, no drafter or sampler. */
import type { Load } from "../decode/drafters/plan.ts";
import type { KvPool } from "../decode/pool.ts";
import type { TargetModel } from "../decode/target.ts";
import type { ExpandedPrompt } from "../model/family.ts";
import type { Model, ModelFiles } from "../model/model.ts";
import { frequencies, ropeTable } from "../model/rope.ts";
import { Batch } from "./batch.ts";
import { Context } from "./context.ts";
import type { KeptImage } from "./images.ts";
import type { PrefixCache } from "./prefix-cache.ts";
import type { Runtime } from "./runtime.ts";

/** Most tokens of one prefill pass: bounds the attention bias, chunk × capacity. */
const PREFILL_CHUNK = 512;

/** Capacities are multiples of this, so that sequences of like length can use each other's memory. */
const ROUND = 512;
/** Ended sequences whose memory is kept, at least. */
const MAX_FREE = 2;

/** A prompt whose pictures went through the vision tower: [count, D] rows in the order of `expanded.images`. */
export interface Prompt {
  expanded: ExpandedPrompt;
  imageRows: ImageData[];
  /** Whose it is, and its pictures by name: later prompts of the tenant's take over rows. Without it nobody does. */
  shared?: { tenant: string; images: KeptImage[] };
}

/** Numbers of image rows as they are kept: float32, or the bits of a type of 16. */
export type ImageData = Float32Array | Uint16Array<ArrayBuffer>;

export class Target implements TargetModel<Context> {
  readonly #runtime: Runtime;
  readonly #model: Model;
  /** Angles for every position, computed once: rows are copied into each sequence's table. */
  readonly #rope: { cos: Float32Array; sin: Float32Array };

  /** Memory of sequences that have ended, for those to come. */
  readonly #free: Context[] = [];
  readonly #most: number;
  /** Scores trees of several sequences at once, where that was asked for. */
  readonly batch: Batch | undefined;
  pool?: KvPool;
  readonly #prefixes: PrefixCache | undefined;

  /** `sequences`: how many may be decoded at once. `prefixes` (where the host sees memory) is what sequences share. */
  constructor(runtime: Runtime, model: Model, sequences = 1, prefixes?: PrefixCache) {
    this.#runtime = runtime;
    this.#model = model;
    this.#prefixes = prefixes;
    this.#most = Math.max(MAX_FREE, sequences);
    if (sequences > 1) this.batch = new Batch(runtime, model);
    const { language, contextLength, ropeTheta } = model.config;
    this.#rope = ropeTable(contextLength, frequencies(language.headSize, ropeTheta));
  }

  /** Runs the prompt in one go: `begin` and all of `passes`. */
  prefill(prompt: Prompt, room: number, maxTree: number, chunk = PREFILL_CHUNK): Context {
    const context = this.begin(prompt, room, maxTree);
    for (const _ of this.passes(context, chunk));
    return context;
  }

  /** `room` is the most tokens that will be added to the prompt, `maxTree` the largest tree that will be scored. */
  begin(prompt: Prompt, room: number, maxTree: number): Context {
    const context = this.#take(prompt.expanded.tokens.length + room, maxTree);
    context.begin(prompt);
    const { cos, sin, capacity } = context.cache;
    fillAngles({ cos: cos.f32, sin: sin.f32 }, this.#rope, this.#model, prompt.expanded, capacity);
    return context;
  }

  /** Runs what is new of the prompt, `chunk` tokens a pass; yields between two passes. */
  *passes(context: Context, chunk = PREFILL_CHUNK): Generator<void> {
    const { length } = context.prompt.expanded.tokens;
    context.reuse();
    for (let from = context.length; ; from += chunk) {
      this.#prefillChunk(context, from, Math.min(length, from + chunk));
      if (from + chunk >= length) break;
      yield;
    }
    context.share(); // before the answer: others may ask the same meanwhile
  }

  /**
   * Memory for a sequence of so many rows and a tree after them: an earlier one's, whose bindings are made already, or
   * new. What is made for larger trees serves for smaller ones, so that plain requests among others need none of their own.
   */
  #take(rows: number, maxTree: number): Context {
    const fit = this.#free.filter((c) => c.maxTree >= maxTree && c.cache.capacity >= rows + c.maxTree);
    const best = fit.sort((a, b) => a.cache.capacity - b.cache.capacity || a.maxTree - b.maxTree)[0];
    if (!best) {
      const capacity = Math.ceil((rows + maxTree) / ROUND) * ROUND;
      return new Context(this.#runtime, this.#model, capacity, maxTree, this.#give, this.batch, this.#prefixes);
    }
    this.#free.splice(this.#free.indexOf(best), 1);
    return best;
  }

  readonly #give = (context: Context): void => {
    this.batch?.leave(context);
    this.#free.push(context);
    if (this.#free.length > this.#most) this.#end(this.#free.shift()!);
  };

  #end(context: Context): void {
    this.batch?.forget(context);
    context.free();
  }

  /** How many sequences decode, and the nodes of the others' trees. */
  load(context: Context): Load {
    return this.batch?.load(context) ?? { sequences: 1, others: 0 };
  }

  /** Frees what is kept for later sequences. */
  [Symbol.dispose](): void {
    for (const context of this.#free.splice(0)) this.#end(context);
    this.batch?.[Symbol.dispose]();
  }

  #prefillChunk(context: Context, from: number, to: number): void {
    const { prompt, cache, hidden } = context;
    const { hidden: width, vocabulary } = this.#model.config.language;
    const n = to - from;
    const runtime = this.#runtime;
    using ids = runtime.tensor("i64", n);
    using positions = runtime.tensor("i64", n);
    using bias = cache.prefillBias(n);
    using logitRows = runtime.tensor("i64", 1);
    const images = imageRowsOf(prompt, from, to, width);
    using imageRows = runtime.tensor("f32", images.rows.length);
    using imageIndex = runtime.tensor("i64", images.index.length);
    imageRows.f32.set(images.rows);
    imageIndex.i64.set(images.index);
    const [idValues, positionValues] = [ids.i64, positions.i64];
    for (let i = 0; i < n; i++) {
      idValues[i] = BigInt(prompt.expanded.tokens[from + i]);
      positionValues[i] = BigInt(from + i);
    }
    logitRows.i64[0] = BigInt(n - 1); // of every chunk, though the last alone is wanted: a product with no rows crashes
    using binding = this.#model.language.binding();
    cache.bind(binding, n, bias);
    binding.input("ids", ids, [n]).input("positions", positions, [1, n]).input("logit_rows", logitRows, [1]);
    binding.input("image_rows", imageRows, [images.index.length, width]);
    binding.input("image_index", imageIndex, [images.index.length, 1]);
    binding.output("hidden", hidden, [n, width], from * width);
    binding.output("logits", context.logits, [1, vocabulary]);
    binding.run();
    cache.length += n;
  }
}

/**
 * Writes the angles of a sequence's tokens by their index, up to `rows`: the prompt's by their rows of positions, later
 * ones by index + delta. `all` are the angles of every position.
 */
export function fillAngles(
  to: { cos: Float32Array; sin: Float32Array },
  all: { cos: Float32Array; sin: Float32Array },
  { family, config }: Pick<ModelFiles, "family" | "config">,
  { positions, delta, tokens }: ExpandedPrompt,
  rows: number,
): void {
  const half = config.language.headSize / 2;
  const axis = family.rotaryAxes;
  for (const name of ["cos", "sin"] as const) {
    for (let i = 0; i < tokens.length; i++)
      for (let f = 0; f < half; f++) to[name][i * half + f] = all[name][positions[axis[f]][i] * half + f];
    const from = tokens.length;
    to[name].set(all[name].subarray((from + delta) * half, (rows + delta) * half), from * half);
  }
}

/** The image rows and their places within tokens from … to of a prompt. */
function imageRowsOf({ expanded, imageRows }: Prompt, from: number, to: number, width: number) {
  const index: bigint[] = [];
  const pieces: Float32Array[] = [];
  for (const [i, { at, count }] of expanded.images.entries()) {
    const [start, end] = [Math.max(at, from), Math.min(at + count, to)];
    if (start >= end) continue;
    for (let t = start; t < end; t++) index.push(BigInt(t - from));
    pieces.push((imageRows[i] as Float32Array).subarray((start - at) * width, (end - at) * width));
  }
  const rows = new Float32Array(index.length * width);
  let offset = 0;
  for (const piece of pieces) {
    rows.set(piece, offset);
    offset += piece.length;
  }
  return { index, rows };
}
