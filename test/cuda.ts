/**
 * The goldens on an NVIDIA GPU: node test/cuda.ts (after npm run cuda). In float32 every answer must be Hugging Face's,
 * token for token, plain and with trees. In 16 bits an answer may part from the CPU's, and a tree's from plain decoding's,
 * only where the target's two likeliest tokens lie within MARGIN of each other; how often that was is printed. What is
 * asked again finds its prompt's rows, and must go as before; so must what is asked all at once. Exit code 1 otherwise. Run by hand: neither npm test nor CI has a GPU.
 */
import { seedOf } from "../gpu-worker/decode/sample.ts";
import type { Step } from "../gpu-worker/engine.ts";
import { type EngineOptions, LocalEngine } from "../gpu-worker/engine-local.ts";
import { answer, type Case, families, prepare, tokensOf } from "./support/goldens.ts";

/** Of logits. */
const MARGIN = 0.1;
const TREES = {
  plain: { drafter: "none" },
  "30/3/8": { shape: { totalToken: 30, depth: 3, topK: 8 } },
  "60/5/10": { shape: { totalToken: 60, depth: 5, topK: 10 } },
  chosen: {},
} as const;
const signal = AbortSignal.timeout(600_000);
let failures = 0;

function check(holds: boolean, what: string): void {
  if (holds) return;
  failures++;
  console.log(`FAILED: ${what}`);
}

/** How far the target's likeliest token after a prefix of an answer is ahead of the second, on the CPU. */
async function marginAfter(cpu: LocalEngine, golden: Case, prefix: number[]): Promise<number> {
  const { request, images } = await prepare(cpu, golden, { logprobs: 2, maxTokens: 1 });
  const longer = { ...request, tokens: [...request.tokens, ...prefix] };
  for await (const { logprobs } of cpu.generate(longer, images, signal))
    if (logprobs) return logprobs[0].top[0].logprob - logprobs[0].top[1].logprob;
  return Number.NaN;
}

/** Where two answers part, -1 if nowhere. */
const partOf = (a: number[], b: number[]) =>
  a.length === b.length && a.every((token, i) => token === b[i])
    ? -1
    : [...a, Number.NaN].findIndex((token, i) => token !== b[i]);

/** Counts the answers that part from the others, each at a near tie. */
async function ties(cpu: LocalEngine, cases: Case[], answers: number[][], others: number[][], what: string) {
  let parted = 0;
  for (const [i, tokens] of answers.entries()) {
    const at = partOf(tokens, others[i]);
    if (at < 0) continue;
    parted++;
    const margin = await marginAfter(cpu, cases[i], tokens.slice(0, at));
    check(margin < MARGIN, `${what} ${cases[i].id}: parts at token ${at}, where the margin is ${margin.toFixed(3)}`);
  }
  return parted;
}

/** Sampling, several choices, penalties and log-probabilities: a tree must not change what plain decoding gives. */
async function sampled(engine: LocalEngine, golden: Case, what: string): Promise<void> {
  const { request, images } = await prepare(engine, golden, { n: 2, logprobs: 3, maxTokens: 40 });
  const sampling = { ...request.sampling, temperature: 0.7, seed: seedOf(5, 0), frequencyPenalty: 0.3 };
  const texts: string[] = [];
  for (const plain of [true, false]) {
    const all: unknown[] = [];
    for await (const step of engine.generate({ ...request, sampling, plain }, images, signal))
      all.push(...step.tokens.map((token, i) => [step.choice, token, step.logprobs![i].token]));
    texts.push(JSON.stringify(all));
  }
  check(texts[0] === texts[1], `${what} ${golden.id}: sampled with a tree is not what it is without`);
}

/** Asked again, a prompt's rows are there: in float32 all must go as before. Gives how many answers go otherwise in 16 bits. */
async function warm(cpu: LocalEngine, engine: LocalEngine, cases: Case[], steps: Step[][], what: string) {
  const again: Step[][] = [];
  for (const golden of cases) again.push(await answer(engine, golden));
  const finishes = again.map((all) => all.at(-1)!.finish!);
  const cached = finishes.map(({ cachedTokens, promptTokens }) => cachedTokens / promptTokens);
  check(Math.min(...cached) > 0.9, `${what}: only ${Math.min(...cached)} of a prompt's tokens were there`);
  const accepted = (all: Step[]) => JSON.stringify(all.at(-1)!.finish!.acceptedPerCycle);
  const others = again.filter((all, i) => accepted(all) !== accepted(steps[i])).length;
  return others + (await ties(cpu, cases, again.map(tokensOf), steps.map(tokensOf), `${what} asked again`)); // biome-ignore format: one line
}

/** Asked all at once, as far as there is room, answers must be those of one after the other; in 16 bits up to near ties. */
async function together(cpu: LocalEngine, engine: LocalEngine, cases: Case[], alone: number[][], what: string) {
  const steps = await Promise.all(cases.map((golden) => answer(engine, golden)));
  return await ties(cpu, cases, steps.map(tokensOf), alone, `${what} together`); // biome-ignore format: one line
}

for (const { name, model, cases } of families) {
  const cpu = new LocalEngine({ model, drafter: "none" });
  for (const dtype of ["f32", "f16", "bf16"] as const) {
    let plain: number[][] = [];
    for (const [tree, options] of Object.entries(TREES)) {
      const engine = new LocalEngine({ model, device: "cuda", dtype, ...options } as EngineOptions);
      const steps: Step[][] = [];
      for (const golden of cases) steps.push(await answer(engine, golden));
      const answers = steps.map(tokensOf);
      if (tree === "plain") plain = answers;
      const what = `${name} ${dtype} ${tree}`;
      const goldens = cases.map((golden) => golden.output_ids);
      const fromCpu = await ties(cpu, cases, answers, goldens, `${what} against the CPU`);
      const fromPlain = await ties(cpu, cases, answers, plain, `${what} against plain`);
      check(dtype !== "f32" || fromCpu === 0, `${what}: ${fromCpu} answers are not the goldens'`);
      if (dtype === "f32" && tree !== "plain") await sampled(engine, cases[1], what);
      if (tree === "30/3/8") {
        const others = await warm(cpu, engine, cases, steps, what);
        check(dtype !== "f32" || others === 0, `${what}: ${others} answers go otherwise when they are asked again`);
        console.log(`${what}: ${others} go otherwise when they are asked again`);
      }
      const parted = await together(cpu, engine, cases, answers, what);
      check(dtype !== "f32" || parted === 0, `${what}: ${parted} answers go otherwise when all are asked at once`);
      check(engine.parts.target.pool!.used === 0, `${what}: blocks of KV cache are in use after the last answer`);
      console.log(`${what}: ${parted} go otherwise when all are asked at once`);
      console.log(`${what}: ${fromCpu} of ${cases.length} part from the CPU's at near ties, ${fromPlain} from plain`);
      await engine.close();
    }
  }
  await cpu.close();
}
console.log(failures ? `${failures} failed` : "all as it should be");
process.exit(failures ? 1 : 0);
