/** `vispec bench --crowd`: several answers at once on CUDA at forced acceptance, to study costs. Prints; asserts nothing. */
import { setTimeout as sleep } from "node:timers/promises";
import { decode } from "../decode/decode.ts";
import type { Drafter } from "../decode/drafters/drafter.ts";
import { BLOCK_ROWS } from "../decode/pool.ts";
import { Sampler, uniforms } from "../decode/sample.ts";
import type { Tree } from "../decode/tree.ts";
import type { Path } from "../decode/verify.ts";
import { always, cudaDrafter } from "../engine/cuda/drafter.ts";
import { CYCLE_ROWS } from "../engine/cuda/model.ts";
import type { CudaTarget } from "../engine/cuda/target.ts";
import type { LocalEngine } from "../engine-local.ts";
import { ANSWER, chanceOf, deepest, forced, GREEDY, PAPER } from "./bench-cuda.ts";
import { percentile } from "./bench-load.ts";
import { UsageError } from "./options.ts";

export interface CrowdBench {
  /** How many answers at once; a row each. */
  crowd: number[];
  /** Drafts accepted a cycle of the paper's tree: forced. */
  accept: number;
  /** Tokens of each prompt. */
  past: number;
  /** Milliseconds from one long prompt to the next, where there are any. */
  longEvery: number | undefined;
  json: boolean;
}

interface Decoding {
  name: string;
  drafter: Drafter;
  /** What would be accepted of a tree, for the i-th answer. */
  accept?: (i: number) => (tree: Tree) => Path;
}

/** Tokens of a long prompt, and of its answer; milliseconds to the first one, when the answers' first cycle is over. */
const LONG = { prompt: 4000, answer: 32, after: 100 };

interface Answer {
  tokens: number;
  /** Milliseconds between its cycles. */
  gaps: number[];
}

/** One answer to so many equal tokens, from the moment that `ready` resolves. */
async function answer(
  target: CudaTarget,
  drafter: Drafter,
  prompt: { tokens: number; of: number },
  maxTokens: number,
  signal: AbortSignal,
  ready: () => Promise<void>,
  accept?: (tree: Tree) => Path,
): Promise<Answer> {
  const expanded = target.model.family.expandPrompt(new Array<number>(prompt.tokens).fill(prompt.of), []);
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
  { name, drafter, accept }: Decoding,
  n: number,
  { past, longEvery }: CrowdBench,
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
  const answers = await Promise.all(
    // Different prompts, so that trees are different and have unequal shares of a pass.
    Array.from({ length: n }, (_, i) =>
      answer(target, drafter, { tokens: past, of: i }, ANSWER, signal, ready, accept?.(i)),
    ),
  ).finally(() => over.abort());
  const ms = performance.now() - begun;
  const prompts = (await long) ?? 0;
  const gaps = answers.flatMap((one) => one.gaps);
  const tokens = answers.reduce((sum, one) => sum + one.tokens, 0);
  return {
    ...{ decoding: name, sequences: n, tokensPerSecond: (1000 * tokens) / ms, perCycle: tokens / gaps.length, prompts },
    ...{ p50: percentile(gaps, 0.5), p99: percentile(gaps, 0.99) },
  };
}

/** Long prompts one after the other until the signal; how many got to an answer. */
async function longPrompts(target: CudaTarget, drafter: Drafter, every: number, signal: AbortSignal): Promise<number> {
  let count = 0;
  const began = async () => {
    count++;
  };
  const under: Promise<unknown>[] = [];
  await sleep(LONG.after, undefined, { signal }).catch(() => {});
  while (!signal.aborted) {
    const one = answer(target, drafter, { tokens: LONG.prompt, of: 0 }, LONG.answer, signal, began).catch((error) => {
      if (error !== signal.reason) throw error; // the others are over before it is: no mistake
    });
    one.catch(() => {}); // it is told below
    under.push(one);
    await sleep(every, undefined, { signal }).catch(() => {});
  }
  await Promise.all(under);
  return count;
}

/** The tree of each cycle chosen by cost; each draft on the deepest path is accepted with the chance that gives that mean of the paper's tree. */
function chosen(engine: LocalEngine, mean: number): Decoding {
  const chance = chanceOf(mean, PAPER.depth + 1);
  const accept = (i: number) => {
    const uniform = uniforms(1 + i);
    return (tree: Tree) => {
      let taken = 0;
      while (taken < Math.max(...tree.depths) && uniform() < chance) taken++;
      return deepest(tree, taken);
    };
  };
  return { name: "by cost", drafter: engine.drafter, accept };
}

/** Prints a table or JSON: plain decoding, the paper's tree, and trees chosen by cost. */
export async function benchCrowd(engine: LocalEngine, bench: CrowdBench, signal: AbortSignal): Promise<void> {
  const target = engine.parts.target as CudaTarget;
  const { accept, past, longEvery, json } = bench;
  const most = Math.max(...bench.crowd);
  const beyond = CYCLE_ROWS + BLOCK_ROWS;
  const context = Math.max(past + ANSWER, longEvery ? LONG.prompt + LONG.answer : 0);
  const rows = most * (past + ANSWER + beyond) + (longEvery ? LONG.prompt + LONG.answer + beyond : 0);
  const { contextLength } = target.model.config;
  if (rows > target.pool!.blocks * BLOCK_ROWS || context > contextLength)
    throw new UsageError(`these answers need ${rows} rows of KV cache and a context of ${context}; there are ${target.pool!.blocks * BLOCK_ROWS} and ${contextLength}`); // biome-ignore format: one line
  const tree = cudaDrafter(target.batch, always(PAPER)) as Drafter;
  const decodings: Decoding[] = [
    { name: "plain", drafter: engine.plain },
    { name: "30/3/8", drafter: tree, accept: (i) => forced(accept, PAPER, 1 + i) },
    chosen(engine, accept),
  ];
  const long = longEvery ? `, and prompts of ${LONG.prompt} every ${longEvery} ms` : "";
  if (!json)
    console.log(`${target.model.cuda.name}, ${target.model.dtype}: answers of ${ANSWER} tokens after prompts of ${past}${long}; ${accept} drafts a cycle of 30/3/8 forced\n`); // biome-ignore format: one line
  const names = ["decoding", "at once", "tokens/s", "× one", "tokens a cycle", "between arrivals ms p50 / p99", "p99 ÷ p50", "long prompts"]; // biome-ignore format: one line
  if (!json) console.log(`| ${names.join(" | ")} |\n${"|---".repeat(names.length)}|`);
  const all: Awaited<ReturnType<typeof rowOf>>[] = [];
  for (const decoding of decodings) {
    let one = 0;
    await rowOf(target, decoding, most, bench, signal); // compiles the code
    for (const n of bench.crowd) {
      const row = await rowOf(target, decoding, n, bench, signal);
      all.push(row);
      one ||= row.tokensPerSecond;
      const { p50, p99 } = row;
      const cells = [decoding.name, n, row.tokensPerSecond.toFixed(0), (row.tokensPerSecond / one).toFixed(2)];
      cells.push(row.perCycle.toFixed(2), `${p50.toFixed(2)} / ${p99.toFixed(2)}`, (p99 / p50).toFixed(2), row.prompts);
      if (!json) console.log(`| ${cells.join(" | ")} |`);
    }
  }
  if (json) console.log(JSON.stringify({ device: target.model.cuda.name, dtype: target.model.dtype, ...bench, rows: all })); // biome-ignore format: one line
}
