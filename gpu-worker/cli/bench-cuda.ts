/** `vispec bench --device cuda`: what passes, prompts and answers cost on the GPU, beside what its memory allows. */
import sharp from "sharp";
import type { Sampling } from "../../shared/protocol.ts";
import { decode } from "../decode/decode.ts";
import type { Drafter } from "../decode/drafters/drafter.ts";
import { MENU } from "../decode/drafters/menu.ts";
import type { TreeShape } from "../decode/drafters/plan.ts";
import { Sampler, uniforms } from "../decode/sample.ts";
import type { Tree } from "../decode/tree.ts";
import type { Path } from "../decode/verify.ts";
import { PLAIN } from "../engine/cuda/cycle.ts";
import { always, cudaDrafter } from "../engine/cuda/drafter.ts";
import type { CudaModel } from "../engine/cuda/model.ts";
import type { CudaTarget } from "../engine/cuda/target.ts";
import { encodePicture, type KeptImage } from "../engine/images.ts";
import type { Prompt } from "../engine/target.ts";
import { DTYPES } from "../engine/tensor.ts";
import type { LocalEngine } from "../engine-local.ts";
import { decodeImage } from "../input/decode.ts";
import { UsageError } from "./options.ts";

/** The paper's tree. */
export const PAPER: TreeShape = MENU.find(({ totalToken, depth }) => totalToken === 30 && depth === 3)!;
const NODES = [1, 8, 16, 32, 48, 64];
export const ANSWER = 256;
/** Of a picture of about 1,000 tokens where patches are Qwen's. */
const PIXELS = { minPixels: 896 * 896, maxPixels: 896 * 896 };
const REPEATS = 15;
/** A picture of a thousand tokens and a text; as much of an answer after a prompt. */
const LEAST_CONTEXT = 2048;
export const GREEDY: Sampling = {
  ...{ temperature: 0, topK: 0, topP: 1, minP: 0, seed: 0 },
  ...{ repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, logitBias: [] },
};

const median = (values: number[]) => values.toSorted((a, b) => a - b)[values.length >> 1];
const nameOf = ({ totalToken, depth, topK }: TreeShape) => `${totalToken}/${depth}/${topK}`;

export interface CudaBench {
  /** Mean drafts accepted a cycle that decoding is forced to, for studies of cost. */
  accept: number[];
  /** Tokens of the prompt. */
  past: number;
  rounds: number;
}

/** TB/s of the device's memory: a copy counts what is read and what is written. */
function ratesOf({ cuda, elementwise }: CudaModel) {
  const bytes = Math.min(2 ** 31, Math.floor(cuda.freeMemory / 4 / 2 ** 20) * 2 ** 20);
  const memory = cuda.alloc(2 * bytes);
  cuda.fill(memory, 0x3a, 2 * bytes);
  const best = (run: () => void) => Math.min(...Array.from({ length: REPEATS }, () => cuda.milliseconds(run)));
  const copy = (2 * bytes) / best(() => cuda.upload(memory + BigInt(bytes), memory, bytes)) / 1e9;
  const read = (2 * bytes) / best(() => elementwise.readAll(memory, memory, 2 * bytes)) / 1e9;
  cuda.free(memory);
  return { copy, read };
}

/** Milliseconds of the device for passes after `past` rows, each a replayed graph. */
function passesOf(target: CudaTarget, past: number) {
  const { model } = target;
  using sequence = target.started(past);
  const time = (run: () => void) => {
    using graph = model.cuda.capture(run);
    return median(Array.from({ length: REPEATS }, () => model.cuda.milliseconds(() => graph.launch())));
  };
  const cycleOf = (shape: TreeShape) => {
    for (let i = 0; i < 2; i++) target.cycles.step([sequence], shape);
    return target.cycles.of(shape, 1);
  };
  // Without a draft there is no tree to verify.
  const verify = (model.draft ? NODES : [1]).map((totalToken) => {
    const shape = totalToken === 1 ? PLAIN : { totalToken, depth: 3, topK: 8 };
    const cycle = cycleOf(shape);
    return time(() => cycle.queueVerify());
  });
  if (!model.draft) return { verify, cycles: {} };
  const cycles = Object.fromEntries(
    MENU.map((shape) => {
      const cycle = cycleOf(shape);
      return [nameOf(shape), { draft: time(() => cycle.queueDraft()), verify: time(() => cycle.queueVerify()) }];
    }),
  );
  return { verify, cycles };
}

/** The chance of each draft after an accepted one that gives a mean of `mean` with drafts of `levels`. */
export function chanceOf(mean: number, levels: number): number {
  const expected = (q: number) => Array.from({ length: levels }, (_, i) => q ** (i + 1)).reduce((a, b) => a + b, 0);
  let [low, high] = [0, 1];
  for (let i = 0; i < 50; i++) {
    const middle = (low + high) / 2;
    if (expected(middle) < mean) low = middle;
    else high = middle;
  }
  return low;
}

/**
 * What stands in for verification: as many drafts as that chance gives, of the path to the deepest node. Drafts that the
 * tree has no room for (its best nodes may not reach the last level) are owed to the next cycles.
 */
export function forced(mean: number, shape: TreeShape, seed = 1): (tree: Tree) => Path {
  const levels = shape.depth + 1;
  const [chance, uniform] = [chanceOf(mean, levels), uniforms(seed)];
  let owed = 0;
  return (tree) => {
    for (let i = 0; i < levels && uniform() < chance; i++) owed++;
    const taken = Math.min(owed, Math.max(...tree.depths));
    owed -= taken;
    return deepest(tree, taken);
  };
}

/** So many drafts of the path to the deepest node. */
export function deepest(tree: Tree, taken: number): Path {
  const nodes: number[] = [];
  for (let node = tree.depths.indexOf(Math.max(...tree.depths)); node >= 0; node = tree.parents[node])
    nodes.unshift(node);
  const kept = nodes.slice(0, taken + 1);
  return { nodes: kept, tokens: [...kept.slice(1).map((node) => tree.tokens[node]), tree.tokens[0]] };
}

interface Speed {
  decoding: string;
  tokensPerSecond: number;
  meanAccepted: number;
  cycleMs: number;
  /** Of the time that the device did nothing for the cycles. */
  hostShare: number;
}

/** One answer of a fixed length; time counts from the first cycle on. */
async function speedOf(
  decoding: string,
  { target, prompt, drafter, gpuMs }: { target: CudaTarget; prompt: Prompt; drafter: Drafter; gpuMs?: number },
  accept: ((tree: Tree) => Path) | undefined,
  signal: AbortSignal,
): Promise<Speed> {
  const options = { samplers: [new Sampler(GREEDY)], maxTokens: ANSWER, stopTokens: new Set<number>(), signal, accept };
  let [tokens, cycles, accepted, begun] = [0, 0, 0, 0];
  for await (const choice of decode(target, drafter as never, prompt, options))
    for await (const cycle of choice) {
      if (begun > 0) {
        tokens += cycle.tokens.length;
        accepted += cycle.accepted;
        cycles++;
      } else begun = performance.now();
    }
  const ms = performance.now() - begun;
  const hostShare = gpuMs === undefined ? Number.NaN : Math.max(0, 1 - (cycles * gpuMs) / ms);
  return {
    decoding,
    tokensPerSecond: (1000 * tokens) / ms,
    meanAccepted: accepted / cycles,
    cycleMs: ms / cycles,
    hostShare,
  };
}

/**
 * Milliseconds from a picture's bytes to the first token, by part, and to those of a second question about it and of a
 * third that is answered with drafts; medians over pictures never seen before.
 */
async function firstTokenOf(engine: LocalEngine, target: CudaTarget, signal: AbortSignal) {
  const { model } = target;
  const names = ["decode", "vision", "prefill", "total", "again", "drafting"] as const;
  const parts: Record<(typeof names)[number], number>[] = [];
  const first = async (image: KeptImage, question: number, drafter = engine.plain) => {
    const text = (token: number) => new Array<number>(32).fill(token);
    const expanded = model.family.expandPrompt([...text(0), model.config.imageToken, ...text(question)], [image]);
    const options = { samplers: [new Sampler(GREEDY)], maxTokens: 2, stopTokens: new Set<number>(), signal };
    const prompt = { expanded, imageRows: [image.rows], shared: { tenant: "", images: [image] } };
    let at = 0;
    for await (const choice of decode(target, drafter as never, prompt, options))
      for await (const _ of choice) at ||= performance.now();
    return { at, tokens: expanded.tokens.length };
  };
  let tokens = 0;
  for (let i = 0; i < 6; i++) {
    const bytes = await noise(i);
    const begun = performance.now();
    const picture = await decodeImage(bytes);
    const decoded = performance.now();
    const image = { key: String(i), ...encodePicture(engine.runtime, model, picture, PIXELS) };
    const seen = performance.now();
    const { at: end, tokens: length } = await first(image, 0);
    tokens = length;
    const asked = performance.now();
    const again = (await first(image, 1)).at - asked;
    const third = performance.now();
    const drafting = (await first(image, 2, engine.drafter)).at - third;
    parts.push({ decode: decoded - begun, vision: seen - decoded, prefill: end - seen, total: end - begun, again, drafting }); // biome-ignore format: one line
  }
  return { tokens, ...Object.fromEntries(names.map((name) => [name, median(parts.slice(1).map((p) => p[name]))])) };
}

/** A JPEG of 896 × 896 pixels, smooth noise. */
function noise(seed: number): Promise<Buffer> {
  const uniform = uniforms(seed + 1);
  const small = Uint8Array.from({ length: 32 * 32 * 3 }, () => 256 * uniform());
  return sharp(small, { raw: { width: 32, height: 32, channels: 3 } })
    .resize(896, 896)
    .jpeg()
    .toBuffer();
}

/** Prints tables, or JSON; the engine must be on CUDA. */
export async function benchCuda(engine: LocalEngine, bench: CudaBench, signal: AbortSignal) {
  const [model, target] = [engine.parts.model as CudaModel, engine.parts.target as CudaTarget];
  const { contextLength } = model.config;
  if (contextLength < LEAST_CONTEXT)
    throw new UsageError(`a context of ${contextLength} tokens is too short for the bench: ${LEAST_CONTEXT} at least`);
  const rates = ratesOf(model);
  const past = Math.min(bench.past, model.config.contextLength - ANSWER - 1);
  const passes = passesOf(target, past);
  const { language } = model.config;
  const kv = 2 * language.layers * language.kvHeads * language.headSize * DTYPES[model.dtype].bytes * past;
  const limit = (bytes: number) => bytes / Math.max(rates.copy, rates.read) / 1e9;
  const limits = { plain: limit(model.passBytes.target + kv), draft: limit(model.passBytes.draft) };
  const prompt = { expanded: model.family.expandPrompt(new Array<number>(past).fill(0), []), imageRows: [] };
  const speeds: Speed[] = [];
  const add = async (name: string, drafter: Drafter, gpuMs?: number, accept?: (tree: Tree) => Path) => {
    const rows: Speed[] = [];
    for (let i = 0; i < bench.rounds; i++)
      rows.push(await speedOf(name, { target, prompt, drafter, gpuMs }, accept, signal));
    const middle = median(rows.map((row) => row.tokensPerSecond));
    speeds.push(rows.find((row) => row.tokensPerSecond === middle)!);
  };
  await add("plain", engine.plain, target.measure([PLAIN], 1, past + ANSWER / 2)[0]);
  if (model.draft) {
    const gpuMs = target.measure([PAPER], 1, past + ANSWER / 2)[0];
    const paper = cudaDrafter(target.batch, always(PAPER)) as Drafter;
    for (const mean of bench.accept) {
      await add(`${nameOf(PAPER)}, ${mean} forced`, paper, gpuMs, forced(mean, PAPER));
    }
  }
  const firstToken = await firstTokenOf(engine, target, signal);
  return { device: model.cuda.name, dtype: model.dtype, rates, passBytes: model.passBytes, past, limits, nodes: NODES.slice(0, passes.verify.length), passes, speeds, firstToken }; // biome-ignore format: one list
}

type Result = Awaited<ReturnType<typeof benchCuda>>;

/** What pictures are answered at, with the drafts that the model's own draft gets accepted. */
type Real = Pick<Speed, "decoding" | "tokensPerSecond" | "meanAccepted">[];

export function printCuda(result: Result, real: Real) {
  const { device, dtype, rates, passBytes, past, limits, nodes, passes, speeds, firstToken } = result;
  const f = (x: number, digits = 3) => x.toFixed(digits);
  const row = (cells: (string | number)[]) => console.log(`| ${cells.join(" | ")} |`);
  const head = (cells: (string | number)[]) => {
    row(cells);
    row(cells.map(() => "---"));
  };
  console.log(`${device}, ${dtype}; copies at ${f(rates.copy, 2)} TB/s, reads at ${f(rates.read, 2)} TB/s\n`);
  console.log(
    `weights a pass: target ${f(passBytes.target / 1e9, 2)} GB, draft ${f(passBytes.draft / 1e9, 2)} GB; ` +
      `limits after ${past} rows: plain ${f(limits.plain)} ms, draft pass ${f(limits.draft)} ms\n`,
  );
  head(["verify, nodes", ...nodes]);
  row(["ms", ...passes.verify.map((ms) => f(ms))]);
  row(["× plain", ...passes.verify.map((ms) => f(ms / passes.verify[0]))]);
  row(["× limit", ...passes.verify.map((ms) => f(ms / limits.plain))]);
  console.log("");
  if (Object.keys(passes.cycles).length > 0) {
    head(["tree", "draft ms", "a draft pass", "verify ms", "cycle × plain"]);
    for (const [name, { draft, verify }] of Object.entries(passes.cycles)) {
      const each = draft / (Number(name.split("/")[1]) + 1);
      row([name, f(draft), f(each), f(verify), f((draft + verify) / passes.verify[0])]);
    }
    console.log("");
  }
  head(["decoding", "tokens/s", "× plain", "mean accepted", "cycle ms", "host share"]);
  for (const s of speeds) {
    const ratio = s.tokensPerSecond / speeds[0].tokensPerSecond;
    row([
      s.decoding,
      f(s.tokensPerSecond, 1),
      f(ratio, 2),
      f(s.meanAccepted, 2),
      f(s.cycleMs),
      `${f(100 * s.hostShare, 1)} %`,
    ]);
  }
  console.log("");
  head(["answers about pictures", "tokens/s", "× plain", "mean accepted"]);
  for (const { decoding, tokensPerSecond, meanAccepted } of real)
    row([decoding, f(tokensPerSecond, 1), f(tokensPerSecond / real[0].tokensPerSecond, 2), f(meanAccepted, 2)]);
  console.log("");
  head(Object.keys(firstToken).map((name) => (name === "tokens" ? "prompt tokens" : `${name} ms`)));
  row(Object.entries(firstToken).map(([name, value]) => (name === "tokens" ? value : f(value as number, 1))));
}
