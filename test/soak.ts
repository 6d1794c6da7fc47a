/**
 * `node test/soak.ts [--seconds 120] [--clients 50]`: clients of every kind against `npm start`'s stack, for a while.
 * Prints latencies and memory as tables; exit code 1 if an answer was wrong or memory grew.
 *
 * Memory is the share of each process (PSS), looked at five times a second. Warm-up are thousands of requests before the
 * clock starts, which the engine refuses after all else was done for them, and the first third of the time: caches fill,
 * code is compiled, heaps reach their size. What is compared is the median of the sixth after that with that of the last
 * sixth, since garbage that V8 has not collected yet lies on top. (Node's youngest garbage is held small.) Heaps and
 * allocators also grow by steps, once and at any time, workerd's by 5 to 10 %; a leak goes on. So when memory grew, the
 * clients go on for as long again, and only what grows in each of three such rounds has failed.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { isDeepStrictEqual, parseArgs } from "node:util";
import { descendants, memoryOf } from "../gpu-worker/cli/processes.ts";
import { badRequest } from "./support/bad-requests.ts";
import { ROOT } from "./support/cli.ts";
import { type Case, cases, GOLDENS, withImages } from "./support/goldens.ts";
import { Random } from "./support/wrong-values.ts";

const { values } = parseArgs({
  options: { seconds: { type: "string", default: "120" }, clients: { type: "string", default: "50" } },
});
const [seconds, clients] = [Number(values.seconds), Number(values.clients)];
const GROWTH = 0.05;
const ROUNDS = 3;
const WARM_UP = 10_000;

/** Milliseconds, by the kind of request. */
interface Timing {
  kind: string;
  first?: number;
  total: number;
}
const timings: Timing[] = [];
const errors: string[] = [];
let url = "";

const post = (body: object, signal?: AbortSignal) =>
  fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });

/** A stream's text, and when its first piece came. */
async function read(response: Response, onPiece: () => unknown = () => {}): Promise<{ text: string; first: number }> {
  let [rest, text, first, done] = ["", "", 0, false];
  for await (const part of response.body!.pipeThrough(new TextDecoderStream())) {
    const events = (rest + part).split("\n\n");
    rest = events.pop()!;
    for (const event of events) {
      if (event === "data: [DONE]") done = true;
      else {
        const piece = JSON.parse(event.slice("data: ".length)).choices[0]?.delta.content;
        if (piece && first === 0) first = performance.now();
        text += piece ?? "";
      }
    }
    await onPiece();
  }
  if (!done) throw new Error("the stream has no end");
  return { text, first };
}

const asked = cases.map((golden) => ({ ...golden, messages: withImages(golden) }) as Case);
const texts = asked.filter(({ image_tokens }) => image_tokens === 0);
const pictures = asked.filter(({ image_tokens }) => image_tokens > 0);

/**
 * A question about a picture that nobody has sent before: always the same few pixels, and other bytes behind them. Few, for
 * the engine keeps what it makes of pictures, up to a limit, and that would count as growth.
 */
function newPicture(random: Random): Case {
  const bytes = Buffer.concat([SMALL, Buffer.from(Array.from({ length: 8 }, () => random.below(256)))]);
  const image_url = { url: `data:image/png;base64,${bytes.toString("base64")}` };
  const content = [
    { type: "image_url", image_url },
    { type: "text", text: "Describe this image in detail." },
  ];
  return { ...about, messages: [{ role: "user", content }] };
}
const SMALL = readFileSync(join(GOLDENS, "images/size-28x28.png"));
/** What is answered about it; the first answer tells. */
const about = { id: "new picture", output_text: "" } as Case;

function expectText(golden: Case, text: string): void {
  if (text !== golden.output_text) throw new Error(`${golden.id} was answered with ${JSON.stringify(text)}`);
}

async function streamed(golden: Case, onPiece?: () => unknown): Promise<number> {
  const response = await post({ messages: golden.messages, temperature: 0, stream: true });
  if (response.status !== 200) throw new Error(`status ${response.status}: ${await response.text()}`);
  const { text, first } = await read(response, onPiece);
  expectText(golden, text);
  return first;
}

async function whole(golden: Case): Promise<void> {
  const response = await post({ messages: golden.messages, temperature: 0 });
  const body = await response.text();
  if (response.status !== 200) throw new Error(`status ${response.status}: ${body}`);
  expectText(golden, JSON.parse(body).choices[0].message.content);
}

async function firstAnswer(): Promise<string> {
  const response = await post({ messages: newPicture(new Random(0)).messages, temperature: 0 });
  return ((await response.json()) as { choices: { message: { content: string } }[] }).choices[0].message.content;
}

async function badOne(random: Random): Promise<void> {
  const { method, path, headers, body, worker, expected } = badRequest(7, random.below(1e6));
  if (worker || expected.mayPass) return;
  const response = await fetch(url + path, { method, headers, body: method === "POST" ? body : undefined });
  await response.text();
  if (response.status < 400 || response.status >= 500) throw new Error(`status ${response.status}`);
}

/** Requests that the engine refuses, for their length, after all else was done for them; and bad ones, some of them huge. */
async function warmUp(): Promise<void> {
  const begun = performance.now();
  let left = WARM_UP;
  const sender = async () => {
    while (left-- > 0) {
      const random = new Random(left);
      if (left % 10 === 0) await badOne(random);
      const { messages } = left % 2 ? newPicture(random) : random.pick(asked);
      const response = await post({ messages, max_tokens: 4090 });
      if (response.status !== 400) throw new Error(`status ${response.status}: ${await response.text()}`);
      await response.text();
    }
  };
  await Promise.all(Array.from({ length: clients }, sender));
  console.error(`${WARM_UP} requests to warm up took ${((performance.now() - begun) / 1000).toFixed(0)} s`);
}

/** What a client may do, with how often; those that stream tell when the first piece came. */
const kinds: Record<string, [share: number, run: (random: Random) => Promise<unknown>]> = {
  "text, streamed": [25, (random) => streamed(random.pick(texts))],
  "text, whole": [10, (random) => whole(random.pick(texts))],
  "known picture, streamed": [20, (random) => streamed(random.pick(pictures))],
  "known picture, whole": [10, (random) => whole(random.pick(pictures))],
  "new picture, streamed": [8, (random) => streamed(newPicture(random))],
  "new picture, whole": [4, (random) => whole(newPicture(random))],
  "three choices": [
    5,
    async (random) => {
      const response = await post({ messages: random.pick(texts).messages, n: 3, max_tokens: 40 });
      const { choices } = (await response.json()) as { choices: unknown[] };
      if (choices.length !== 3) throw new Error(`${choices.length} choices`);
    },
  ],
  "left in mid-stream": [
    6,
    async (random) => {
      const controller = new AbortController();
      const messages = random.pick(pictures).messages;
      const response = await post({ messages, stream: true, temperature: 0 }, controller.signal);
      await read(response, () => controller.abort()).catch((error) => {
        if (!controller.signal.aborted) throw error;
      });
    },
  ],
  "bad request": [8, badOne],
  "slow reader": [4, (random) => streamed(random.pick(texts), () => sleep(50 + random.below(150)))],
};
const wheel = Object.entries(kinds).flatMap(([kind, [share]]) => Array.from({ length: share }, () => kind));

async function client(seed: number, end: number): Promise<void> {
  const random = new Random(seed);
  while (performance.now() < end) {
    const kind = random.pick(wheel);
    const begun = performance.now();
    try {
      const first = await kinds[kind][1](random);
      timings.push({
        kind,
        first: typeof first === "number" ? first - begun : undefined,
        total: performance.now() - begun,
      });
    } catch (error) {
      errors.push(`${kind}: ${error}`);
      if (errors.length > 20) return;
    }
  }
}

/** Asks for the longest of streams and never reads, again every ten seconds. */
async function neverReads(end: number): Promise<void> {
  while (performance.now() < end) {
    const body = JSON.stringify({
      messages: [{ role: "user", content: "Hi" }],
      stream: true,
      ignore_eos: true,
      max_tokens: 1000,
    });
    const socket = connect(Number(new URL(url).port), "127.0.0.1").pause();
    socket.on("error", () => {});
    const type = "content-type: application/json\r\n";
    socket.write(`POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n${type}content-length: ${body.length}\r\n\r\n${body}`); // biome-ignore format: one line
    await sleep(Math.min(10_000, Math.max(0, end - performance.now())));
    socket.resetAndDestroy();
  }
}

/** The stack's processes by name. */
function processesOf(main: number): Record<string, number> {
  const below = descendants(main);
  const find = (pattern: RegExp) => below.find(({ command }) => pattern.test(command))?.pid;
  const found = { worker: main, engine: find(/engine-child/), workerd: find(/^\S*workerd serve /) };
  return Object.fromEntries(Object.entries(found).filter((entry): entry is [string, number] => entry[1] !== undefined));
}

function median(numbers: number[]): number {
  return numbers.toSorted((a, b) => a - b)[numbers.length >> 1];
}

function quantiles(numbers: number[]): string[] {
  const sorted = numbers.toSorted((a, b) => a - b);
  const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return sorted.length === 0 ? ["", "", ""] : [0.5, 0.95, 0.99].map((share) => at(share).toFixed(0));
}

function printLatencies(elapsed: number): void {
  console.log(`${timings.length} requests of ${clients} clients in ${elapsed.toFixed(0)} s: ${(timings.length / elapsed).toFixed(1)} a second\n`); // biome-ignore format: one line
  console.log(
    "| ms | requests | first token p50 | p95 | p99 | total p50 | p95 | p99 |\n|---|---|---|---|---|---|---|---|",
  );
  const row = (name: string, some: Timing[]) => {
    const firsts = some.flatMap(({ first }) => first ?? []);
    const cells = [name, some.length, ...quantiles(firsts), ...quantiles(some.map(({ total }) => total))];
    console.log(`| ${cells.join(" | ")} |`);
  };
  for (const kind of Object.keys(kinds))
    row(
      kind,
      timings.filter((timing) => timing.kind === kind),
    );
  row("all", timings);
}

/** Prints what each process took and takes in a round; gives those that grew. */
function printMemory(samples: Record<string, number[]>): string[] {
  console.log("\n| MiB | after warm-up | at the end | growth |\n|---|---|---|---|");
  return Object.entries(samples).flatMap(([name, all]) => {
    const part = (from: number, to: number) => median(all.slice(from * all.length, to * all.length)) / 2 ** 20;
    const [before, after] = [part(1 / 3, 1 / 2), part(5 / 6, 1)];
    const growth = after / before - 1;
    console.log(`| ${name} | ${before.toFixed(1)} | ${after.toFixed(1)} | ${(100 * growth).toFixed(1)} % |`);
    return growth > GROWTH ? [name] : [];
  });
}

const stack = spawn(process.execPath, ["gpu-worker/main.ts", "start", "--prefix-cache", "16"], {
  cwd: ROOT,
  env: { ...process.env, PORT: "0", NODE_OPTIONS: "--max-semi-space-size=1" },
  stdio: ["ignore", "pipe", "pipe"],
});
stack.stderr.resume(); // the log
const ready = Promise.withResolvers<string>();
let said = "";
stack.stdout.on("data", (data) => {
  said = (said + data).slice(-10_000);
  const found = /answers at (http:\S+)\. /.exec(said);
  if (found) ready.resolve(found[1]);
});
stack.once("exit", (code) => ready.reject(new Error(`the stack ended with ${code}: ${said}`)));
url = await ready.promise;

about.output_text = await firstAnswer();
await warmUp();
const processes = processesOf(stack.pid!);
let samples: Record<string, number[]> = {};
const sampler = setInterval(() => {
  for (const [name, pid] of Object.entries(processes)) (samples[name] ??= []).push(memoryOf(pid));
}, 200);
const begun = performance.now();
const progress = setInterval(() => {
  const memory = Object.entries(samples).map(([name, all]) => `${name} ${(all.at(-1)! / 2 ** 20).toFixed(0)} MiB`);
  const elapsed = ((performance.now() - begun) / 1000).toFixed(0);
  console.error(`${elapsed} s: ${timings.length} requests, ${errors.length} errors, ${memory.join(", ")}`);
}, 10_000);
let grown: string[] = [];
for (let round = 0; round < ROUNDS && (round === 0 || grown.length > 0) && errors.length === 0; round++) {
  samples = {};
  const end = performance.now() + 1000 * seconds;
  await Promise.all([
    neverReads(end),
    ...Array.from({ length: clients - 1 }, (_, i) => client(i + round * clients, end)),
  ]);
  const growing = printMemory(samples);
  grown = round === 0 ? growing : growing.filter((name) => grown.includes(name));
}
clearInterval(sampler);
clearInterval(progress);
const elapsed = (performance.now() - begun) / 1000;
if (!isDeepStrictEqual(processesOf(stack.pid!), processes)) errors.push("a process was started anew");
stack.kill("SIGTERM");
await once(stack, "exit");

printLatencies(elapsed);
const off = [...errors, ...grown.map((name) => `${name} grew by more than ${100 * GROWTH} %, and went on growing`)];
for (const what of off) console.error(what);
process.exitCode = off.length > 0 ? 1 : 0;
