/** `vispec bench --concurrency`: what several requests at once are answered at. Asserts nothing. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { ChatModel, prepareChat } from "../../shared/chat.ts";
import { type GenerateRequest, imageKey } from "../../shared/protocol.ts";
import { uniforms } from "../decode/sample.ts";
import type { Engine, Finish } from "../engine.ts";
import { type EngineOptions, LocalEngine } from "../engine-local.ts";
import { FairQueue } from "../service/queue.ts";
import { type Flags, number, UsageError } from "./options.ts";

/** Milliseconds; the tokens of requests within both are the goodput. */
const BOUNDS = { firstToken: 1000, betweenTokens: 100 };
const SEED = 1;
export const LOAD_FLAGS = ["concurrency", "arrival", "requests", "plot"];

const ROOT = join(import.meta.dirname, "../../test/goldens/qwen/images");
const PICTURES = ["00-describe-0.png", "01-describe-0.png", "02-describe-0.png", "03-describe-0.png", "23-odd-0.png"];
const PROMPT = "Describe this image in detail.";

export const dataUrls = () =>
  PICTURES.map((p) => `data:image/png;base64,${readFileSync(join(ROOT, p)).toString("base64")}`);
export const messages = (url: string) => [
  { role: "user" as const, content: [imagePart(url), { type: "text" as const, text: PROMPT }] },
];
const imagePart = (url: string) => ({ type: "image_url" as const, image_url: { url } });

export interface Question {
  request: GenerateRequest;
  images: string[];
}

/** Puts the pictures into an engine and gives the questions about them. */
export async function questionsOf(engine: LocalEngine): Promise<Question[]> {
  const model = new ChatModel(engine.info);
  const questions: Question[] = [];
  for (const url of dataUrls()) {
    const chat = { messages: messages(url), temperature: 0, max_tokens: 256 };
    const { request, images } = await prepareChat(chat, model, { id: "bench", tenant: "" });
    const [{ hash, limits }] = request.images;
    const key = imageKey(request.tenant, hash!, limits);
    await engine.putImage(key, images.get(hash!)!.bytes, limits);
    questions.push({ request, images: [key] });
  }
  return questions;
}

interface Load {
  /** Requests a second; without it as many are under way as the engine decodes at once. */
  rate: number | undefined;
  requests: number;
}

/** One answer; milliseconds, and the first token counts from the request's arrival. */
export interface Served {
  firstToken: number;
  /** From the first token to the last. */
  rest: number;
  /** Between two arrivals: a cycle's tokens come together. */
  between: number[];
  finish: Finish;
}

/** The rate of `--arrival`: undefined for closed. Throws UsageError. */
export function arrivalRate(text = "closed"): number | undefined {
  if (text === "closed") return undefined;
  const rate = Number(/^poisson:(.+)$/.exec(text)?.[1]);
  if (rate > 0 && rate <= 1e6) return rate;
  throw new UsageError(`--arrival is ${text}; it must be closed, or poisson:RATE with requests a second`);
}

/** Milliseconds from the start to each arrival of a Poisson process of `rate` a second. */
export function arrivals(rate: number, requests: number, uniform: () => number): number[] {
  let at = 0;
  return Array.from({ length: requests }, () => (at -= (1000 * Math.log(1 - uniform())) / rate));
}

/** The least value that this share of all does not exceed; NaN where there are none. */
export function percentile(values: number[], share: number): number {
  return values.toSorted((a, b) => a - b)[Math.max(0, Math.ceil(share * values.length) - 1)] ?? Number.NaN;
}

/** Asks questions drawn with a seed, each in its turn. Gives the answers and the milliseconds from first to last. */
export async function serve(engine: Engine, questions: Question[], { rate, requests }: Load, signal: AbortSignal) {
  const uniform = uniforms(SEED);
  const drawn = Array.from({ length: requests }, () => questions[Math.floor(uniform() * questions.length)]);
  const times = rate === undefined ? undefined : arrivals(rate, requests, uniform);
  const queue = new FairQueue({ running: engine.concurrency, waiting: requests, lane: requests });
  const begun = performance.now();
  const one = async ({ request, images }: Question, i: number): Promise<Served> => {
    // A pass holds timers up: what counts is when the request was to come.
    let arrived = begun + (times?.[i] ?? 0);
    if (times) await sleep(Math.max(0, arrived - performance.now()), undefined, { signal });
    using place = queue.enter("");
    await place.turn(signal);
    if (!times) arrived = performance.now();
    return await answer(engine.generate(request, images, signal), arrived);
  };
  const ended = await Promise.allSettled(drawn.map(one));
  const milliseconds = performance.now() - begun;
  for (const result of ended) if (result.status === "rejected") throw result.reason;
  return { served: ended.map((result) => (result as PromiseFulfilledResult<Served>).value), milliseconds };
}

async function answer(steps: AsyncIterable<{ tokens: number[]; finish?: Finish }>, arrived: number): Promise<Served> {
  const between: number[] = [];
  let [first, last, finish] = [0, 0, undefined as Finish | undefined];
  for await (const step of steps) {
    const now = performance.now();
    if (first === 0) first = now;
    else between.push(now - last);
    last = now;
    finish = step.finish;
  }
  return { firstToken: first - arrived, rest: last - first, between, finish: finish! };
}

const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);

/** The figures of one concurrency. */
export function summarize(concurrency: number, served: Served[], milliseconds: number) {
  const tokens = (all: Served[]) => sum(all.map(({ finish }) => finish.completionTokens));
  const cycles = sum(served.map(({ finish }) => finish.cycles));
  const good = served.filter(({ firstToken, rest, finish }) => {
    return firstToken <= BOUNDS.firstToken && rest <= BOUNDS.betweenTokens * (finish.completionTokens - 1);
  });
  const firsts = served.map(({ firstToken }) => firstToken);
  const between = served.flatMap(({ between }) => between);
  const at = (values: number[], shares: number[]) =>
    Object.fromEntries(shares.map((share) => [`p${100 * share}`, percentile(values, share)]));
  return {
    concurrency,
    tokensPerSecond: (1000 * tokens(served)) / milliseconds,
    requestsPerSecond: (1000 * served.length) / milliseconds,
    firstTokenMs: at(firsts, [0.5, 0.95, 0.99]),
    betweenMs: at(between, [0.5, 0.99]),
    goodput: (1000 * tokens(good)) / milliseconds,
    meanAccepted: sum(served.flatMap(({ finish }) => finish.acceptedPerCycle)) / cycles,
    draftedPerCycle: sum(served.map(({ finish }) => finish.drafted)) / cycles,
  };
}

export type LoadRow = ReturnType<typeof summarize>;

/** One row, of an engine of its own; what is made at first use is made by an unmeasured run before. */
async function rowOf(options: EngineOptions, concurrency: number, load: Load, signal: AbortSignal): Promise<LoadRow> {
  const engine = new LocalEngine({ ...options, concurrency });
  try {
    await engine.warmUp();
    const questions = await questionsOf(engine);
    await serve(engine, questions, { rate: undefined, requests: 2 * concurrency }, signal);
    const { served, milliseconds } = await serve(engine, questions, load, signal);
    return summarize(concurrency, served, milliseconds);
  } finally {
    await engine.close();
  }
}

/** Prints a table or JSON, a row for each concurrency, and writes the plot where one is wanted. */
export async function benchLoad(flags: Flags, options: EngineOptions, concurrencies: number[], signal: AbortSignal) {
  const requests = number(flags, "requests", { min: 1, max: 100_000 }) ?? 64;
  const load = { rate: arrivalRate(flags.arrival as string | undefined), requests };
  const rows: LoadRow[] = [];
  for (const concurrency of concurrencies) rows.push(await rowOf(options, concurrency, load, signal));
  const one = rows.find(({ concurrency }) => concurrency === 1)?.tokensPerSecond;
  const all = rows.map((row) => ({ ...row, timesOne: one === undefined ? null : row.tokensPerSecond / one }));
  if (flags.json) console.log(JSON.stringify({ ...load, rate: load.rate ?? null, bounds: BOUNDS, rows: all }));
  else printTable(all, load);
  if (flags.plot) writeFileSync(flags.plot as string, plotOf(rows));
}

function printTable(rows: (LoadRow & { timesOne: number | null })[], { rate, requests }: Load): void {
  const what = `${requests} requests, ${rate === undefined ? "as many at once as are decoded" : `${rate} a second`}`;
  const names = ["at once", "tokens/s", "× one", "requests/s", "first token ms p50 / p95 / p99", "between arrivals ms p50 / p99", "goodput tokens/s", "mean accepted", "drafted a cycle"]; // biome-ignore format: one line
  const joined = (values: object, digits: number) => Object.values(values).map((value) => value.toFixed(digits)).join(" / "); // biome-ignore format: one line
  console.log(`${what}; goodput: first token within ${BOUNDS.firstToken} ms, mean between tokens within ${BOUNDS.betweenTokens} ms\n`); // biome-ignore format: one line
  console.log(`| ${names.join(" | ")} |\n${"|---".repeat(names.length)}|`);
  for (const row of rows) {
    const speed = [row.tokensPerSecond.toFixed(0), row.timesOne?.toFixed(2) ?? "", row.requestsPerSecond.toFixed(2)];
    const latency = [joined(row.firstTokenMs, 0), joined(row.betweenMs, 2), row.goodput.toFixed(0)];
    const drafts = [row.meanAccepted.toFixed(2), row.draftedPerCycle.toFixed(1)];
    console.log(`| ${[row.concurrency, ...speed, ...latency, ...drafts].join(" | ")} |`);
  }
}

const [WIDTH, BAND, MARGIN] = [560, 150, 50];
const STYLE = `text { font: 13px system-ui, sans-serif; fill: #1f2328; text-anchor: middle; }
rect { fill: #ffffff; } polyline { fill: none; stroke: #0969da; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
rect { fill: #0d1117; } text { fill: #e6edf3; } polyline { stroke: #58a6ff; }
}`;

/** An SVG of tokens/s and, below, of mean tree size by concurrency: lines from 0 with their figures at the points. */
export function plotOf(rows: LoadRow[]): string {
  const text = (x: number, y: number, what: string | number) =>
    `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}">${what}</text>`;
  const xOf = (i: number) => MARGIN + ((WIDTH - 2 * MARGIN) * i) / Math.max(1, rows.length - 1);
  const band = (title: string, values: number[], digits: number, top: number) => {
    const most = Math.max(...values, Number.MIN_VALUE);
    const yOf = (value: number) => top + BAND - ((BAND - 60) * value) / most;
    const points = values.map((value, i) => `${xOf(i).toFixed(1)},${yOf(value).toFixed(1)}`);
    const figures = values.map((value, i) => text(xOf(i), yOf(value) - 8, value.toFixed(digits)));
    return [text(WIDTH / 2, top + 24, title), `<polyline points="${points.join(" ")}"/>`, ...figures];
  };
  const height = 2 * BAND + 50;
  const speeds = rows.map(({ tokensPerSecond }) => tokensPerSecond);
  const trees = rows.map(({ draftedPerCycle }) => draftedPerCycle);
  const lines = [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" role="img" aria-label="Tokens a second and mean tree size by concurrency">`,
    `<style>${STYLE}</style><rect width="${WIDTH}" height="${height}"/>`,
    ...band("tokens/s", speeds, 0, 0),
    ...band("drafted a cycle", trees, 1, BAND),
    ...rows.map(({ concurrency }, i) => text(xOf(i), height - 28, concurrency)),
    text(WIDTH / 2, height - 10, "requests at once"),
    "</svg>",
  ];
  return `${lines.join("\n")}\n`;
}
