/** The decode loop: prefill, then cycles of propose, score, verify, commit. Knows no text and no stop string. */
import type { Prompt } from "../engine/target.ts";
import type { Drafter } from "./drafters/drafter.ts";
import { breathe, Running } from "./running.ts";
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
  /** Of a choice's first cycle: the prompt's tokens that were known from earlier requests. */
  cached?: number;
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
  const { samplers, maxTokens, signal } = options;
  signal.throwIfAborted();
  const { maxTree } = drafter;
  using running = new Running(target, { prompt, maxTokens, maxTree, signal, keepLogits: samplers.length > 1 });
  await running.begin();
  for (const [i, sampler] of samplers.entries()) {
    if (i > 0) await running.rewind();
    yield decodeChoice(running, drafter, sampler, options);
  }
}

async function* decodeChoice<S extends Sequence>(
  running: Running<S>,
  drafter: Drafter<S>,
  sampler: Sampler,
  { maxTokens, stopTokens, signal, ...options }: DecodeOptions,
): AsyncGenerator<Cycle> {
  const given: number[] = [];
  const last = (token: number, index: number) => stopTokens.has(token) || given.length + index + 1 >= maxTokens;
  const { logits: row, milliseconds: verifyMs, sequence } = running;
  const first = await sampler.next(row);
  yield { tokens: [first], accepted: 0, drafted: 0, logits: () => row, draftMs: 0, verifyMs, cached: sequence.cached };
  if (last(first, 0)) return;
  given.push(first);
  const start = () => ({ drafting: drafter.start(running.sequence), fresh: lastOf(running.sequence, given) });
  for (let { drafting, fresh } = start(); ; ) {
    await breathe(signal);
    const begun = performance.now();
    if (!(await running.fits())) {
      await running.begin(given.slice(0, -1));
      ({ drafting, fresh } = start());
    }
    const tree = await drafting.propose(fresh);
    const proposed = drafting.verifies ? begun : performance.now();
    const scores = await running.sequence.scores(tree);
    const scored = performance.now();
    const path = options.accept?.(tree) ?? (await verify(tree, scores, sampler, last));
    fresh = running.sequence.commit(path);
    given.push(...path.tokens);
    const ended = given.length >= maxTokens || stopTokens.has(path.tokens.at(-1)!);
    // One that waits for room must not have others wait for it.
    if (!ended && !options.logits && running.fitsNow()) drafting.ahead?.(fresh);
    if (!options.logits) running.sequence.release?.();
    yield {
      tokens: path.tokens,
      accepted: path.tokens.length - 1,
      drafted: tree.tokens.length - 1,
      logits: (i) => scores.row(path.nodes[i]),
      draftMs: proposed - begun,
      verifyMs: scored - proposed,
    };
    running.sequence.release?.();
    if (ended) return;
  }
}

/** What a drafter reads first: the last token, which has not been through the target. */
const lastOf = (sequence: Sequence, given: readonly number[]): Fresh => ({
  rows: [sequence.length - 1],
  next: [given.at(-1)!],
});
