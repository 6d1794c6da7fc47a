/** Measures what passes cost here: the table that trees are chosen by. */
import type { Costs } from "../decode/drafters/plan.ts";
import type { Model } from "../model/model.ts";
import { DraftSequence } from "./draft.ts";
import type { Runtime } from "./runtime.ts";
import type { Target } from "./target.ts";

const PROMPT = 128;
const NODES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32];
const ROWS = [1, 2, 3, 4, 6];
const REPEATS = 12;

/** A pass that takes longer is measured once, after one that warms up: what disturbs a short one is lost in it. */
const LONG = 50;

function milliseconds(run: () => void): number {
  const start = performance.now();
  run();
  return performance.now() - start;
}

/** Lower quartile of each run's milliseconds: what a pass takes when nothing else is in its way. */
function time(runs: (() => void)[]): number[] {
  // The first passes of a shape, and of this code, are slow.
  const long = runs.map((run) => {
    if (milliseconds(run) > LONG) return true;
    run();
    return milliseconds(run) > LONG;
  });
  return runs.map((run, i) => {
    const repeats = long[i] ? 1 : REPEATS;
    const times = Array.from({ length: repeats }, () => milliseconds(run));
    return times.sort((a, b) => a - b)[repeats >> 2];
  });
}

/** Linear between measured points, and beyond the last as between the last two. */
export function interpolate(at: readonly number[], values: readonly number[]): (x: number) => number {
  return (x) => {
    let i = 1;
    while (i < at.length - 1 && at[i] < x) i++;
    const slope = (values[i] - values[i - 1]) / (at[i] - at[i - 1]);
    return values[i - 1] + slope * (x - at[i - 1]);
  };
}

/** A few passes after a prompt of 128 tokens; takes some tenths of a second on a small model. */
export function measureCosts(runtime: Runtime, model: Model, target: Target): Costs {
  const tokens = new Array<number>(PROMPT).fill(0);
  const prompt = { expanded: model.family.expandPrompt(tokens, []), imageRows: [] };
  const most = NODES.at(-1)!;
  using context = target.prefill(prompt, most, most);
  const chain = (n: number) => Array.from({ length: n }, (_, i) => i - 1);
  const trees = NODES.map((n) => {
    return { tokens: tokens.slice(0, n), parents: chain(n), depths: chain(n).map((p) => p + 1), scores: [] };
  });
  const verify = time(trees.map((tree) => () => context.score(tree)));
  const widest = ROWS.at(-1)!;
  using sequence = new DraftSequence(runtime, model, context, widest, widest, widest);
  sequence.prefill(0);
  const levels = ROWS.map((n) => {
    const under = new Array<number>(n).fill(-1);
    const from = new Array<number>(n).fill(0);
    return () => sequence.level(tokens.slice(0, n), from, under, 0);
  });
  const draft = time(levels);
  return { verify: interpolate(NODES, verify), draft: interpolate(ROWS, draft) };
}
