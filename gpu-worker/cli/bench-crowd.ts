/** `vispec bench --crowd`: several answers at once on CUDA at forced acceptance, to study costs. Prints; asserts nothing. */
import { setTimeout as sleep } from "node:timers/promises";
import { decode } from "../decode/decode.ts";
import type { Drafter } from "../decode/drafters/drafter.ts";
import { Sampler } from "../decode/sample.ts";
import type { Tree } from "../decode/tree.ts";
import type { Path } from "../decode/verify.ts";
import { always, cudaDrafter } from "../engine/cuda/drafter.ts";
import type { CudaTarget } from "../engine/cuda/target.ts";
import type { LocalEngine } from "../engine-local.ts";
import { ANSWER, forced, GREEDY, PAPER } from "./bench-cuda.ts";
import { percentile } from "./bench-load.ts";

export interface CrowdBench {
  /** How many answers at once; a row each. */
  crowd: number[];
  /** Drafts accepted a cycle, where that is forced. */
  accept: number | undefined;
  /** Tokens of each prompt. */
  past: number;
  /** Milliseconds from one long prompt to the next, where there are any. */
  longEvery: number | undefined;
}

/** Tokens of a long prompt, and of its answer; milliseconds to the first one, when the answers' first cycle is over. */
const LONG = { prompt: 4000, answer: 32, after: 100 };

interface Answer {
  tokens: number;
  /** Milliseconds between its cycles. */
  gaps: number[];
}

/** One answer, from the moment that `ready` resolves. */
async function answer(
  target: CudaTarget,
  drafter: Drafter,
  prompt: number,
  maxTokens: number,
  signal: AbortSignal,
  ready: () => Promise<void>,
  accept?: (tree: Tree) => Path,
): Promise<Answer> {
  const expanded = target.model.family.expandPrompt(new Array<number>(prompt).fill(0), []);
  const options = { samplers: [new Sampler(GREEDY)], maxTokens, stopTokens: new Set<number>(), signal, accept };
  const gaps: number[] = [];
  let [tokens, last] = [0, 0];
  for await (const choice of decode(target, drafter as never, { expanded, imageRows: [] }, options))
    for await (const cycle of choice) {
      if (last > 0) {
        gaps.push(performance.now() - last);
        tokens += cycle.tokens.length;
      } else await ready();
      last = performance.now();
    }
  return { tokens, gaps };
}

/** So many answers that begin to decode together, each of ANSWER tokens. */
async function rowOf(
  target: CudaTarget,
  drafter: Drafter,
  n: number,
  { accept, past, longEvery }: CrowdBench,
  signal: AbortSignal,
) {
  const all = Promise.withResolvers<void>();
  let [waiting, begun] = [n, 0];
  const ready = () => {
    if (--waiting === 0) {
      begun = performance.now();
      all.resolve();
    }
    return all.promise;
  };
  const over = new AbortController();
  const long = longEvery && all.promise.then(() => longPrompts(target, drafter, longEvery, over.signal));
  const accepting = () => (accept === undefined ? undefined : forced(accept, PAPER));
  const answers = await Promise.all(
    Array.from({ length: n }, () => answer(target, drafter, past, ANSWER, signal, ready, accepting())),
  );
  const ms = performance.now() - begun;
  over.abort();
  const prompts = (await long) ?? 0;
  const gaps = answers.flatMap((one) => one.gaps);
  const tokens = answers.reduce((sum, one) => sum + one.tokens, 0);
  return {
    ...{ sequences: n, tokensPerSecond: (1000 * tokens) / ms, perCycle: tokens / gaps.length, prompts },
    ...{ p50: percentile(gaps, 0.5), p99: percentile(gaps, 0.99) },
  };
}

/** Long prompts one after the other until the signal; how many began. */
async function longPrompts(target: CudaTarget, drafter: Drafter, every: number, signal: AbortSignal): Promise<number> {
  const none = () => Promise.resolve();
  const under: Promise<unknown>[] = [];
  await sleep(LONG.after, undefined, { signal }).catch(() => {});
  while (!signal.aborted) {
    under.push(answer(target, drafter, LONG.prompt, LONG.answer, signal, none).catch(() => {}));
    await sleep(every, undefined, { signal }).catch(() => {});
  }
  await Promise.all(under);
  return under.length;
}

/** Prints a table, plain decoding and the paper's tree by turns. */
export async function benchCrowd(engine: LocalEngine, bench: CrowdBench, signal: AbortSignal): Promise<void> {
  const target = engine.parts.target as CudaTarget;
  const drafters = { plain: engine.plain, tree: cudaDrafter(target.batch, always(PAPER)) as Drafter };
  const { accept, past, longEvery } = bench;
  const long = longEvery ? `, and prompts of ${LONG.prompt} every ${longEvery} ms` : "";
  console.log(`${target.model.cuda.name}, ${target.model.dtype}: answers of ${ANSWER} tokens after prompts of ${past}${long}; 30/3/8, ${accept} drafts a cycle forced\n`); // biome-ignore format: one line
  const names = ["decoding", "at once", "tokens/s", "× one", "tokens a cycle", "between arrivals ms p50 / p99", "p99 ÷ p50", "long prompts"]; // biome-ignore format: one line
  console.log(`| ${names.join(" | ")} |\n${"|---".repeat(names.length)}|`);
  for (const [name, drafter] of Object.entries(drafters)) {
    let one = 0;
    for (const n of bench.crowd) {
      const own = drafter === engine.plain ? { ...bench, accept: undefined } : bench;
      await rowOf(target, drafter, n, own, signal); // graphs are made in the first run
      const row = await rowOf(target, drafter, n, own, signal);
      one ||= row.tokensPerSecond;
      const { p50, p99 } = row;
      const cells = [name, n, row.tokensPerSecond.toFixed(0), (row.tokensPerSecond / one).toFixed(2)];
      cells.push(row.perCycle.toFixed(2), `${p50.toFixed(2)} / ${p99.toFixed(2)}`, (p99 / p50).toFixed(2), row.prompts);
      console.log(`| ${cells.join(" | ")} |`);
    }
  }
}
