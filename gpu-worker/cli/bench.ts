/** `vispec bench`: how fast the model answers here, plain and with drafts, in one run. Prints; asserts nothing. */
import { createHash, randomBytes } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { cpus } from "node:os";
import { basename, join } from "node:path";
import { planInflation, readShape } from "../checkpoint/inflate.ts";
import { LIKE, likeShape } from "../checkpoint/inflate-shapes.ts";
import { inCache } from "../cuda/cache-folder.ts";
import type { Costs, TreeShape } from "../decode/drafters/plan.ts";
import { MOST_SEQUENCES } from "../engine/batch.ts";
import type { Finish } from "../engine.ts";
import { type EngineOptions, LocalEngine } from "../engine-local.ts";
import { startEngine } from "../engine-process.ts";
import { startServer } from "../service/server.ts";
import { startEdge } from "../start.ts";
import { benchCrowd } from "./bench-crowd.ts";
import { benchCuda, printCuda } from "./bench-cuda.ts";
import { benchEdge } from "./bench-edge.ts";
import { benchLoad, dataUrls, LOAD_FLAGS, messages, type Question, questionsOf } from "./bench-load.ts";
import { inflateCommand } from "./inflate.ts";
import { engineOptions, type Flags, number, oneOf, parseFlags, UsageError } from "./options.ts";

export const BENCH_HELP = `vispec bench [--rounds N] [--model DIR] [--draft DIR] [--like SHAPE] [--device cpu|cuda|webgpu] [--threads N] [--context N] [--json]
  --like inflates the model to that shape first, once, into a cache folder (see vispec inflate): small is for a CPU
vispec bench --device cuda [--model DIR] [--draft DIR] [--dtype bf16|f16|f32] [--draft-vocab N] [--past N] [--accept MEAN,…] [--json]
  passes, prompts and answers beside what the memory allows; --accept forces means of accepted drafts, to study costs
vispec bench --device cuda --crowd N,… [--accept MEAN] [--past N] [--long-prompts MS] [--model DIR] … [--json]
  so many answers at once at forced acceptance; with --long-prompts, while prompts of 4,000 tokens come every MS
vispec bench --concurrency N,… [--arrival closed|poisson:RATE] [--requests N] [--plot FILE.svg] [--model DIR] … [--json]
  that many requests at once, or RATE a second; times from arrival, tokens/s, goodput; --plot draws tokens/s and tree size
vispec bench --edge [--rounds N] [--json]`;

interface Row {
  decoding: string;
  prefillMs: number;
  tokensPerSecond: number;
  meanAccepted: number;
  draftedPerCycle: number;
  draftShare: number;
  verifyShare: number;
  hostShare: number;
}

const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);
const median = (values: number[]) => values.toSorted((a, b) => a - b)[values.length >> 1];

/** One pass over the pictures. Decoding is everything after the first token, the draft's own prefill included. */
function summarize(decoding: string, all: Finish[]): Row {
  const decode = sum(all.map((f) => f.timings.total - f.timings.prefill));
  const cycles = sum(all.map((f) => f.cycles));
  const [draft, verify] = [sum(all.map((f) => f.timings.draft)), sum(all.map((f) => f.timings.verify))];
  return {
    decoding,
    prefillMs: sum(all.map((f) => f.timings.prefill)) / all.length,
    tokensPerSecond: (sum(all.map((f) => f.completionTokens - 1)) / decode) * 1000,
    meanAccepted: sum(all.flatMap((f) => f.acceptedPerCycle)) / cycles,
    draftedPerCycle: sum(all.map((f) => f.drafted)) / cycles,
    draftShare: draft / decode,
    verifyShare: verify / decode,
    hostShare: 1 - (draft + verify) / decode,
  };
}

class Contender {
  readonly name: string;
  readonly engine: LocalEngine;
  readonly rows: Row[] = [];
  readonly #plain: boolean;
  #questions: Question[] = [];

  constructor(name: string, engine: LocalEngine, plain = false) {
    this.name = name;
    this.engine = engine;
    this.#plain = plain;
  }

  async prepare(): Promise<void> {
    this.#questions = await questionsOf(this.engine);
  }

  async round(signal: AbortSignal): Promise<void> {
    const all: Finish[] = [];
    for (const { request, images } of this.#questions)
      for await (const step of this.engine.generate({ ...request, plain: this.#plain }, images, signal))
        if (step.finish) all.push(step.finish);
    this.rows.push(summarize(this.name, all));
  }

  /** The round of median speed, the first left out: it warms caches and compiled code up. */
  get result(): Row {
    const rows = this.rows.slice(1);
    const middle = median(rows.map((row) => row.tokensPerSecond));
    return rows.find((row) => row.tokensPerSecond === middle)!;
  }
}

/** Streams through the edge: milliseconds to the first token of a picture never seen before, and tokens/s after it. */
async function throughEdge(options: EngineOptions, rounds: number, signal: AbortSignal) {
  const begun = performance.now();
  const engine = await startEngine(options);
  const secret = randomBytes(32).toString("hex");
  const server = await startServer(engine, { port: 0, host: "127.0.0.1", secret });
  const edge = await startEdge({ port: 0, upstream: server.url, secret });
  const ready = performance.now() - begun;
  try {
    const [speeds, firsts]: number[][] = [[], []];
    for (let round = 0; round < rounds; round++)
      for (const [i, url] of dataUrls().entries()) {
        const { first, speed } = await stream(edge.url, url, signal);
        if (round > 0) speeds.push(speed);
        if (round === 0 && i > 0) firsts.push(first); // the edge's first request fetches the tokenizer
      }
    return { readyMs: ready, firstTokenMs: median(firsts), tokensPerSecond: median(speeds) };
  } finally {
    await edge.close();
    await server.close();
    await engine.close();
  }
}

async function stream(base: string, url: string, signal: AbortSignal): Promise<{ first: number; speed: number }> {
  const options = { stream: true, stream_options: { include_usage: true }, temperature: 0, max_tokens: 256 };
  const body = JSON.stringify({ ...options, messages: messages(url) });
  const begun = performance.now();
  const headers = { "content-type": "application/json" };
  const response = await fetch(`${base}/v1/chat/completions`, { method: "POST", body, headers, signal });
  if (!response.ok) throw new Error(await response.text());
  let [text, first] = ["", 0];
  const decoder = new TextDecoder();
  for await (const chunk of response.body!) {
    text += decoder.decode(chunk, { stream: true });
    if (first === 0 && /"content":"[^"]/.test(text)) first = performance.now() - begun;
  }
  const tokens = Number(/"completion_tokens":(\d+)/.exec(text)?.[1]);
  return { first, speed: ((tokens - 1) / (performance.now() - begun - first)) * 1000 };
}

/** Milliseconds of passes over 1, 2, … nodes or rows, as measured when the engine started. */
function costTable({ verify, draft }: Costs) {
  const sizes = [1, 2, 4, 6, 8, 16, 32];
  return { sizes, verifyMs: sizes.map(verify), draftMs: sizes.slice(0, 4).map(draft) };
}

function print(
  rows: Row[],
  costs: ReturnType<typeof costTable>,
  edge: Record<string, Awaited<ReturnType<typeof throughEdge>>> | undefined,
): void {
  const percent = (x: number) => `${(100 * x).toFixed(0)} %`;
  const { length, 0: cpu } = cpus();
  console.log(`${cpu.model}, ${length} cores, float32, ${process.platform} ${process.arch}; medians of one run\n`);
  console.log(
    "| decoding | prefill ms | tokens/s | × plain | mean accepted | drafted a cycle | draft | verify | host |",
  );
  console.log("|---|---|---|---|---|---|---|---|---|");
  for (const row of rows) {
    const ratio = row.tokensPerSecond / rows[0].tokensPerSecond;
    const shares = [row.draftShare, row.verifyShare, row.hostShare].map(percent);
    const numbers = [row.prefillMs.toFixed(1), row.tokensPerSecond.toFixed(0), ratio.toFixed(2)];
    const drafts = [row.meanAccepted.toFixed(2), row.draftedPerCycle.toFixed(1)];
    console.log(`| ${[row.decoding, ...numbers, ...drafts, ...shares].join(" | ")} |`);
  }
  const figures = (values: number[]) => values.map((value) => value.toFixed(2));
  console.log(`\n| ms a pass over | ${costs.sizes.join(" | ")} |\n|---${"|---".repeat(costs.sizes.length)}|`);
  console.log(`| verify (nodes) | ${figures(costs.verifyMs).join(" | ")} |`);
  console.log(`| draft (rows) | ${figures(costs.draftMs).join(" | ")} | | | |`);
  if (!edge) return;
  console.log(
    "\n| through the edge | ready after s | first token of a new picture ms | stream tokens/s |\n|---|---|---|---|",
  );
  for (const [name, e] of Object.entries(edge))
    console.log(
      `| ${name} | ${(e.readyMs / 1000).toFixed(1)} | ${e.firstTokenMs.toFixed(0)} | ${e.tokensPerSecond.toFixed(0)} |`,
    );
}

/** The checkpoint that `--like` asks for: inflated once, into a folder of the user's cache named by all that goes into it. */
async function inflated(like: string, model: string, draft: string, signal: AbortSignal): Promise<string> {
  const shape = oneOf({ like }, "like", LIKE)!;
  const { digest, texts, copies } = planInflation(model, draft, likeShape(shape, readShape(model)));
  const hash = createHash("sha256").update(JSON.stringify([digest, texts]));
  for (const { from } of copies) hash.update(readFileSync(from));
  const folder = inCache(`${basename(model)}-${like}-${hash.digest("hex").slice(0, 8)}`);
  if (existsSync(folder)) console.error(`${folder} is there already`);
  else await inflateCommand(["--model", model, "--draft", draft, "--like", like, "--out", folder], signal);
  return folder;
}

/** Engines by name, and who decodes with them: plain and adaptive share one, fixed trees draft in float32. */
function contendersOf(options: EngineOptions, fixed: Record<string, TreeShape>): Contender[] {
  const adaptive = new LocalEngine({ ...options, drafter: "vispec", shape: undefined });
  return [
    new Contender("plain", adaptive, true),
    new Contender("ViSpec, tree by cost", adaptive),
    ...Object.entries(fixed).map(
      ([name, shape]) => new Contender(name, new LocalEngine({ ...options, drafter: "vispec", shape })),
    ),
  ];
}

/** On a GPU what counts is how near the passes come to what its memory allows. */
async function onCuda(flags: Flags, options: EngineOptions, rounds: number, signal: AbortSignal): Promise<void> {
  const accept = acceptOf(flags);
  const engine = new LocalEngine(options);
  try {
    await engine.warmUp();
    const past = number(flags, "past", { min: 1 }) ?? 1024;
    const result = await benchCuda(engine, { accept, past, rounds }, signal);
    const contenders = [new Contender("plain", engine, true), new Contender("tree chosen by cost", engine)];
    for (const contender of contenders) await contender.prepare();
    for (let round = 0; round < rounds; round++) for (const contender of contenders) await contender.round(signal);
    const real = contenders.map(({ result: { decoding, tokensPerSecond, meanAccepted } }) => {
      return { decoding, tokensPerSecond, meanAccepted };
    });
    if (flags.json) console.log(JSON.stringify({ ...result, real }));
    else printCuda(result, real);
  } finally {
    await engine.close();
  }
}

/** Means of accepted drafts that decoding is forced to. */
function acceptOf(flags: Flags): number[] {
  const accept = String(flags.accept ?? "2.24").split(",").map(Number); // biome-ignore format: one chain
  if (accept.every((mean) => mean >= 0 && mean < 4)) return accept;
  throw new UsageError(`--accept is ${flags.accept}; means of 0 to 4 drafts a cycle are wanted, with commas between`);
}

async function onCrowd(flags: Flags, options: EngineOptions, signal: AbortSignal): Promise<void> {
  if (options.device !== "cuda") throw new UsageError("--crowd is for --device cuda");
  const crowd = String(flags.crowd).split(",").map((n) => number({ crowd: n }, "crowd", { min: 1, max: MOST_SEQUENCES })!); // biome-ignore format: one chain
  const [accept] = acceptOf(flags);
  const longEvery = number(flags, "long-prompts", { min: 1, max: 60_000 });
  if (longEvery && Math.max(...crowd) === MOST_SEQUENCES)
    throw new UsageError(`--long-prompts: beside ${MOST_SEQUENCES} answers none could run`);
  const past = number(flags, "past", { min: 1, max: 100_000 }) ?? 1024;
  const engine = new LocalEngine({ ...options, concurrency: Math.min(MOST_SEQUENCES, Math.max(...crowd) + 1) });
  try {
    await engine.warmUp();
    await benchCrowd(engine, { crowd, accept, past, longEvery, json: flags.json === true }, signal);
  } finally {
    await engine.close();
  }
}

/** Contenders take turns in every round, so that what else the machine does hits all alike. */
export async function benchCommand(args: string[], signal: AbortSignal): Promise<void> {
  const values = [
    "model",
    "draft",
    "like",
    "device",
    "threads",
    "context",
    "rounds",
    "dtype",
    "draft-vocab",
    "past",
    "accept",
    "crowd",
    "long-prompts",
    ...LOAD_FLAGS,
  ];
  const flags = parseFlags(args, values, [], ["json", "edge"]);
  if (flags.edge) {
    const rounds = number(flags, "rounds", { min: 1, max: 100_000 }) ?? 300;
    return benchEdge(rounds, flags.json === true, signal);
  }
  const like = flags.like as string | undefined;
  const rounds = number(flags, "rounds", { min: 2, max: 1000 }) ?? (like ? 3 : 8);
  const all = String(flags.concurrency ?? 1).split(",").map((concurrency) => engineOptions({ ...flags, concurrency })); // biome-ignore format: one chain
  const options = { ...all[0], prefixBytes: 0 }; // every round runs its prompts
  if (like) {
    const draft = options.draft ?? join(options.model, "draft");
    Object.assign(options, { model: await inflated(like, options.model, draft, signal), draft: undefined });
  }
  if (flags.crowd !== undefined) return onCrowd(flags, options, signal);
  if (LOAD_FLAGS.some((name) => flags[name] !== undefined))
    return benchLoad(flags, options, all.map(({ concurrency }) => concurrency!), signal); // biome-ignore format: one call
  if (options.device === "cuda") return onCuda(flags, { ...options, prefixBytes: undefined }, rounds, signal);
  const contenders = contendersOf(
    options,
    like
      ? {}
      : {
          "ViSpec 4/2/1": { totalToken: 4, depth: 2, topK: 1 },
          "ViSpec 30/3/8": { totalToken: 30, depth: 3, topK: 8 },
        },
  );
  for (const contender of contenders) await contender.prepare();
  for (let round = 0; round < rounds; round++)
    for (const contender of contenders) {
      if (!flags.json) console.error(`round ${round + 1} of ${rounds}: ${contender.name}`);
      await contender.round(signal);
    }
  const rows = contenders.map((contender) => contender.result);
  const costs = costTable(contenders[1].engine.costs!);
  for (const engine of new Set(contenders.map(({ engine }) => engine))) await engine.close();
  const edge = like
    ? undefined
    : {
        plain: await throughEdge({ ...options, drafter: "none" }, rounds, signal),
        ViSpec: await throughEdge({ ...options, drafter: "vispec", shape: undefined }, rounds, signal),
      };
  if (flags.json) console.log(JSON.stringify({ rows, costs, edge }));
  else print(rows, costs, edge);
}
