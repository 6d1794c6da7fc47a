/** The decode loop: prefill, then cycles of propose, score, verify, commit. Knows no text and no stop string. */
import { setImmediate } from "node:timers/promises";
import type { Prompt } from "../engine/target.ts";
import type { Drafter } from "./drafters/drafter.ts";
import type { Sampler } from "./sample.ts";
import type { Fresh, Sequence, TargetModel } from "./target.ts";
import type { Tree } from "./tree.ts";
import { type Path, verify } from "./verify.ts";

/** What one cycle gave; the first is the prefill's, with one token and no draft. */
export interface Cycle {
  tokens: number[];
  /** How many of `tokens` were drafts. */
  accepted: number;
  /** How many drafts were proposed. */
  drafted: number;
  /** The target's logits that tokens[i] was drawn from, before bias, penalties and constraint, [V]; valid until the next cycle. */
  logits(i: number): Float32Array;
  /** Milliseconds. */
  draftMs: number;
  verifyMs: number;
}

export interface DecodeOptions {
  /** One a choice. */
  samplers: readonly Sampler[];
  /** The most tokens of a choice. */
  maxTokens: number;
  /** Tokens after which nothing follows. */
  stopTokens: ReadonlySet<number>;
  signal: AbortSignal;
  /** Whether cycles' logits will be asked for: else the next cycle may begin before the last one was looked at. */
  logits?: boolean;
  /** Takes the place of verification where costs are studied: what would be accepted of a tree. */
  accept?: (tree: Tree) => Path;
}

/**
 * Decodes a prompt's choices one after the other, from one prefill, each a cycle at a time: a choice ends after a stop
 * token or maxTokens, or when its loop is left. Leaving the outer loop frees the sequence's memory. Throws the signal's
 * reason within one cycle of an abort.
 */
export async function* decode<S extends Sequence>(
  target: TargetModel<S>,
  drafter: Drafter<S>,
  prompt: Prompt,
  options: DecodeOptions,
): AsyncGenerator<AsyncGenerator<Cycle>> {
  options.signal.throwIfAborted();
  const begun = performance.now();
  using context = target.begin(prompt, options.maxTokens, drafter.maxTree);
  for (const _ of target.passes(context)) await breathe(options.signal);
  // Trees are scored into the same memory.
  const logits = options.samplers.length > 1 ? context.firstLogits.slice() : context.firstLogits;
  const prefilled = { context, logits, milliseconds: performance.now() - begun };
  for (const sampler of options.samplers) {
    yield decodeChoice(prefilled, drafter, sampler, options);
    context.rewind();
    prefilled.milliseconds = 0;
  }
}

async function* decodeChoice<S extends Sequence>(
  prefilled: { context: S; logits: Float32Array; milliseconds: number },
  drafter: Drafter<S>,
  sampler: Sampler,
  { maxTokens, stopTokens, signal, ...options }: DecodeOptions,
): AsyncGenerator<Cycle> {
  const { context, logits: row, milliseconds: verifyMs } = prefilled;
  let given = 0;
  const last = (token: number, index: number) => stopTokens.has(token) || given + index + 1 >= maxTokens;
  const first = await sampler.next(row);
  yield { tokens: [first], accepted: 0, drafted: 0, logits: () => row, draftMs: 0, verifyMs };
  if (last(first, 0)) return;
  given = 1;
  const drafting = drafter.start(context);
  for (let fresh: Fresh = { rows: [context.length - 1], next: [first] }; ; ) {
    await breathe(signal);
    const start = performance.now();
    const tree = drafting.propose(fresh);
    const proposed = drafting.verifies ? start : performance.now();
    const scores = context.scores(tree);
    const scored = performance.now();
    const path = options.accept?.(tree) ?? (await verify(tree, scores, sampler, last));
    fresh = context.commit(path);
    given += path.tokens.length;
    const ended = given >= maxTokens || stopTokens.has(path.tokens.at(-1)!);
    if (!ended && !options.logits) drafting.ahead?.(fresh);
    yield {
      tokens: path.tokens,
      accepted: path.tokens.length - 1,
      drafted: tree.tokens.length - 1,
      logits: (i) => scores.row(path.nodes[i]),
      draftMs: proposed - start,
      verifyMs: scored - proposed,
    };
    if (ended) return;
  }
}

/** Lets messages in: a cancellation above all, whose reason it throws. */
async function breathe(signal: AbortSignal): Promise<void> {
  await setImmediate();
  signal.throwIfAborted();
}
