/**
 * Full-size widths on this machine's CPU: inflates a 7B-shaped LLaVA and a 3B-shaped Qwen, both cut to six layers, one
 * after the other, and asks each three golden questions, plain and with drafts. Run by hand or by CI, not by npm test:
 * node test/full-size.ts. Needs 5 GB of disk (TMPDIR says where). Exit code 1 when an answer differs.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { inflateCommand } from "../gpu-worker/cli/inflate.ts";
import { type Drafter, noDrafter } from "../gpu-worker/decode/drafters/drafter.ts";
import { AdaptivePlan, Experience } from "../gpu-worker/decode/drafters/plan.ts";
import { vispecDrafter } from "../gpu-worker/decode/drafters/vispec.ts";
import { LocalEngine } from "../gpu-worker/engine-local.ts";
import { answer, families, tokensOf } from "./support/goldens.ts";

const LAYERS = 6;
const TREE = { totalToken: 30, depth: 3, topK: 8 };
/** About what passes of such sizes cost, in plain passes: measuring it takes longer than all answers. */
const COSTS = { verify: (nodes: number) => 0.9 + nodes / 10, draft: (rows: number) => 0.2 + rows / 50 };
const LIMIT = { maxTokens: 16 };
/** A picture, several turns about one, text alone. */
const CASES = ["05-", "13-", "19-"];
const MODELS = [
  { like: "llava-1.6-7b", family: "llava" },
  { like: "qwen2.5-vl-3b", family: "qwen" },
];

const interrupt = new AbortController();
process.once("SIGINT", () => interrupt.abort());

async function timed<T>(work: () => T): Promise<[Awaited<T>, string]> {
  const begun = performance.now();
  const result = await work();
  return [result, `${((performance.now() - begun) / 1000).toFixed(1)} s`];
}

const memory = () => `at most ${(process.resourceUsage().maxRSS / 1e6).toFixed(1)} GB of memory`;

async function check(like: string, family: string, folder: string): Promise<void> {
  const { model, cases } = families.find(({ name }) => name === family)!;
  const out = join(folder, like);
  const args = ["--model", model, "--like", like, "--layers", String(LAYERS), "--out", out];
  const [, writing] = await timed(() => inflateCommand(args, interrupt.signal));
  console.log(`${like}: written in ${writing}`);
  const [engine, loading] = await timed(() => new LocalEngine({ model: out, shape: TREE }));
  console.log(`${like}: loaded in ${loading}, ${memory()}`);
  const changeable: { drafter: Drafter } = engine;
  const experience = new Experience();
  const drafters = {
    plain: noDrafter,
    adaptive: vispecDrafter(engine.runtime, engine.model, () => new AdaptivePlan(COSTS, experience)),
    "30/3/8": engine.drafter,
  };
  for (const [name, drafter] of Object.entries(drafters)) {
    changeable.drafter = drafter;
    for (const golden of cases.filter(({ id }) => CASES.some((begin) => id.startsWith(begin)))) {
      interrupt.signal.throwIfAborted();
      const [steps, seconds] = await timed(() => answer(engine, golden, LIMIT));
      const tokens = tokensOf(steps);
      const same = `${tokens}` === `${golden.output_ids.slice(0, LIMIT.maxTokens)}`;
      const { cycles } = steps.at(-1)!.finish!;
      const verdict = same ? "as the small model" : "DIFFERENT";
      console.log(`${like}: ${name}, ${golden.id}: ${verdict}, ${tokens.length} tokens, ${cycles} passes, ${seconds}`);
      if (!same) process.exitCode = 1;
    }
  }
  await engine.close();
  console.log(`${like}: ${memory()}`);
}

const only = MODELS.find(({ like }) => like === process.argv[2]);
if (only) {
  const folder = mkdtempSync(join(tmpdir(), "vispec-full-size-"));
  try {
    await check(only.like, only.family, folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
} else
  for (const { like } of MODELS) {
    // Each in a process of its own: what the first leaves in its heap does not count for the second.
    const { status } = spawnSync(process.execPath, [import.meta.filename, like], { stdio: "inherit" });
    if (status !== 0) process.exitCode = 1;
  }
