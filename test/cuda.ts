/**
 * The goldens on an NVIDIA GPU: node test/cuda.ts (after npm run cuda). In float32 every answer must be Hugging Face's,
 * token for token, plain and with trees. In 16 bits an answer may part from the CPU's, and a tree's from plain decoding's,
 * only where the target's two likeliest tokens lie within MARGIN of each other; how often that was is printed. What is
 * asked again finds its prompt's rows, and must go as before; so must what is asked all at once. Pictures must be resized
 * as in JavaScript, bit for bit, and products of few rows be those of their matrices. Exit code 1 otherwise. Run by hand: neither npm test nor CI has a GPU.
 */
import { Cuda } from "../gpu-worker/cuda/driver.ts";
import { Elementwise } from "../gpu-worker/cuda/elementwise.ts";
import { Products } from "../gpu-worker/cuda/products.ts";
import { seedOf } from "../gpu-worker/decode/sample.ts";
import type { CudaTarget } from "../gpu-worker/engine/cuda/target.ts";
import type { Step } from "../gpu-worker/engine.ts";
import { type EngineOptions, LocalEngine } from "../gpu-worker/engine-local.ts";
import { filterHere, resizeBicubic } from "../gpu-worker/input/resize.ts";
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

/** Inner numbers and columns: odd edges, less than a block's share, a tile in many parts, more tiles than blocks. */
const SHAPES = [[200, 144], [64, 16], [3000, 528], [136, 19008]]; // biome-ignore format: one line
/** Of the largest in float32. */
const BYTES = 12 << 20;

/** Smooth and noisy numbers between -1 and 1, always the same. */
const number = (i: number) => Math.sin(i * 0.001) * 0.5 + (((i * 7919) % 257) / 257 - 0.5);

/** Growing, shrinking, one way only, and taller than a hundred times its width. */
function resized(engine: LocalEngine): void {
  const { filter } = (engine.parts.target as CudaTarget).model.passage!;
  const sizes = [[300, 190, 112, 112], [61, 40, 640, 480], [300, 190, 300, 28], [300, 190, 28, 190], [5, 700, 7, 90]]; // biome-ignore format: one line
  for (const [width, height, toWidth, toHeight] of sizes) {
    const picture = { width, height, rgb: Uint8Array.from({ length: 3 * width * height }, (_, i) => 128 + 127 * number(i)) }; // biome-ignore format: one line
    const [here, there] = [filterHere, filter].map((f) => resizeBicubic(picture, toWidth, toHeight, f).rgb);
    check(Buffer.compare(here, there) === 0, `${width}x${height} to ${toWidth}x${toHeight}: other samples than in JavaScript`); // biome-ignore format: one line
  }
}

/**
 * Products of few rows, exactly and through bytes, beside sums in float64: of every number of rows the same, and no further
 * off than rounding to 8 bits of the result, or of the weights, makes it. With the gated SiLU of their columns they must be
 * what that makes of them as a kernel of its own, bit for bit.
 */
function multiplied(dtype: "f16" | "bf16"): void {
  const cuda = Cuda.open();
  const kernels = new Elementwise(cuda);
  const products = new Products(cuda, kernels, dtype);
  const host = cuda.pinned(BYTES);
  const floats = new Float32Array(host.buffer);
  const wide = cuda.alloc(BYTES);
  const read = (from: bigint, n: number) => {
    kernels.convert(wide, "f32", from, dtype, n);
    cuda.download(host, wide, 4 * n);
    cuda.synchronize();
    return floats.slice(0, n);
  };
  const put = (n: number, scale: number) => {
    const memory = cuda.alloc(2 * n);
    for (let i = 0; i < n; i++) floats[i] = number(i * scale);
    cuda.upload(wide, host, 4 * n);
    kernels.convert(memory, dtype, wide, "f32", n);
    cuda.synchronize();
    return memory;
  };
  for (const [inner, columns] of SHAPES) {
    const [w, x, y] = [put(inner * columns, 1), put(64 * inner, 3), put(64 * columns, 1)];
    const [both, gated] = [put(64 * columns, 1), put(64 * columns, 1)];
    const [weights, inputs] = [read(w, inner * columns), read(x, 64 * inner)];
    const sums = Float64Array.from({ length: 64 * columns }, (_, at) => {
      let sum = 0;
      const [r, c] = [Math.floor(at / columns), at % columns];
      for (let i = 0; i < inner; i++) sum += inputs[r * inner + i] * weights[i * columns + c];
      return sum;
    });
    for (const roughly of [false, true]) {
      let first: Float32Array | undefined;
      for (const rows of [1, 8, 10, 16, 32, 50, 64]) {
        products.launch(y, x, w, { rows, inner, columns }, roughly);
        const out = read(y, rows * columns);
        let [off, all] = [0, 0];
        for (const [i, value] of out.entries()) {
          off += (value - sums[i]) ** 2;
          all += sums[i] ** 2;
        }
        const what = `${dtype}, ${rows} rows of [${inner},${columns}]${roughly ? " roughly" : ""}`;
        check(Math.sqrt(off / all) < (roughly ? 0.013 : 0.004), `${what}: off by ${Math.sqrt(off / all)}`);
        first ??= out;
        check(first.every((value, i) => i >= columns || value === out[i]), `${what}: the first row is another`); // biome-ignore format: one line
        if (roughly) continue;
        products.launchGated(gated, both, x, w, { rows, inner, columns });
        const made = read(gated, (rows * columns) / 2);
        kernels.gatedSilu(gated, y, rows, columns / 2, dtype, true);
        const apart = read(gated, (rows * columns) / 2);
        check(made.every((value, i) => value === apart[i]), `${what}: SiLU in the product is not SiLU after it`); // biome-ignore format: one line
      }
    }
  }
}

for (const dtype of ["f16", "bf16"] as const) multiplied(dtype);
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
      if (tree === "plain") resized(engine);
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
