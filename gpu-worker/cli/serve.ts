/** `vispec serve`: the GPU worker alone. `npm start`: the worker and the edge before it, on this machine. */
import { randomBytes } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { isLoopback } from "../../shared/loopback.ts";
import { endBundler } from "../bundle.ts";
import { startEngine } from "../engine-process.ts";
import { logToStderr as log } from "../log.ts";
import { type ServerOptions, startServer } from "../service/server.ts";
import { startEdge } from "../start.ts";
import { engineOptions, type Flags, MODEL_FLAGS, number, oneOf, parseFlags, UsageError } from "./options.ts";

export const SERVE_HELP = `vispec serve [--port N] [--host ADDRESS] [--max-waiting N] [--deadline SECONDS] [--drain SECONDS]
  [--image-urls off|public|any] [--model DIR] [--draft DIR] [--drafter vispec|none]
  [--total-token N --depth N --top-k-draft N] [--device cpu|cuda|webgpu] [--threads N] [--context N] [--dtype bf16|f16|f32] [--draft-vocab N]
  [--prefix-cache MIB]: what is kept of prompts for others that begin alike; 512 by default (4,096 on CUDA), 0 keeps nothing
  [--kv-cache MIB]: keys and values of what is decoded at once; requests wait, or are computed again, where they do not
    fit; by default no bound, on CUDA 60 % of what is free
  [--concurrency N]: requests that are decoded at once, 16 at most; by default 16 on CUDA, on the CPU 8 where weights are
    under 1 GB, else 1
  npm start takes the same but for --port (PORT) and --host; API_KEYS and CORS_ORIGINS are the edge's.
  WORKER_SECRET is what edge and worker share; a --host that is not this machine alone needs it.
  SIGTERM refuses new requests, and ends when those under way are answered, after --drain seconds at the latest.`;

/** What `serve` and `start` have in common. */
const SERVICE_FLAGS = [
  ...MODEL_FLAGS,
  "concurrency",
  "max-waiting",
  "deadline",
  "drain",
  "image-urls",
  "prefix-cache",
  "kv-cache",
];
/** Seconds; a timer cannot hold more than 2^31 milliseconds. */
const LONGEST = 86_400;

const EXAMPLE = "test/goldens/qwen/images/00-describe-0.png";

/** A signal that ends at once, and one that lets finish what is under way. */
export interface EndSignals {
  interrupt: AbortSignal;
  terminate: AbortSignal;
}

/** Resolves once it was told to terminate and everything is closed; throws the reason of an interrupt. */
export async function serveCommand(args: string[], signals: EndSignals): Promise<void> {
  const flags = parseFlags(args, ["port", "host", ...SERVICE_FLAGS]);
  const port = number(flags, "port", { min: 0, max: 65535 }) ?? 8788;
  const host = (flags.host as string) ?? "127.0.0.1";
  const secret = process.env.WORKER_SECRET;
  if (!secret && !isLoopback(host))
    throw new UsageError(`--host ${host} can be reached from elsewhere, so WORKER_SECRET must be set`);
  // With a secret there is an edge, and maybe a proxy before this worker: what it passes on would look local.
  const options = { ...serviceOptions(flags), port, host, secret, plainApi: !secret };
  const drain = drainSeconds(flags);
  await using engine = disposable(await startEngine(engineOptions(flags), { log }));
  await using server = disposable(await startServer(engine, options));
  console.log(`${engine.info.id} is served at ${server.url}`);
  await untilEnd(() => server.drain(), drain, signals);
}

/** The edge takes the port that PORT names (0: a free one); the worker a free one, on loopback. */
export async function startCommand(args: string[], signals: EndSignals): Promise<void> {
  const flags = parseFlags(args, SERVICE_FLAGS);
  const port = Number(process.env.PORT || "8787");
  if (!Number.isInteger(port) || port < 0 || port > 65535)
    throw new UsageError(`PORT is ${process.env.PORT}; it must be a whole number from 0 to 65535`);
  const secret = process.env.WORKER_SECRET || randomBytes(32).toString("hex");
  const options = { ...serviceOptions(flags), port: 0, host: "127.0.0.1", secret };
  const drain = drainSeconds(flags);
  await using engine = disposable(await startEngine(engineOptions(flags), { log }));
  await using server = disposable(await startServer(engine, options));
  const { API_KEYS: apiKeys, CORS_ORIGINS: corsOrigins } = process.env;
  const edgeOptions = { port, upstream: server.url, secret, apiKeys, corsOrigins, log };
  await using edge = disposable(await startEdge(edgeOptions));
  await endBundler();
  log("info", "the GPU worker listens", { url: server.url });
  console.log(`${engine.info.id} answers at ${edge.url}. Ask it about a picture:\n\n${curl(edge.url)}\n`);
  // The edge comes second: it has to pass on what the worker has written last.
  await untilEnd(() => server.drain().then(() => edge.drain()), drain, signals);
}

function serviceOptions(flags: Flags): Partial<ServerOptions> {
  return {
    imageUrls: oneOf(flags, "image-urls", ["off", "public", "any"]),
    maxWaiting: number(flags, "max-waiting", { min: 0 }),
    deadline: number(flags, "deadline", { min: 1, max: LONGEST }),
    log,
  };
}

function drainSeconds(flags: Flags): number {
  return number(flags, "drain", { min: 0, max: LONGEST }) ?? 120;
}

/** Waits for a signal. When told to terminate, work under way ends first, for so many seconds at most. */
async function untilEnd(
  drain: () => Promise<void>,
  seconds: number,
  { interrupt, terminate }: EndSignals,
): Promise<void> {
  await Promise.race([aborted(interrupt), aborted(terminate)]);
  if (!interrupt.aborted) {
    log("info", "draining", { seconds });
    await Promise.race([drain(), sleep(seconds * 1000, undefined, { ref: false }), aborted(interrupt)]);
  }
  interrupt.throwIfAborted();
}

/** A command that works as pasted, in the project's root. */
function curl(url: string): string {
  const image = `data:image/png;base64,'$(base64 < ${EXAMPLE} | tr -d '\\n')'`;
  const content = `[{"type":"image_url","image_url":{"url":"${image}"}},{"type":"text","text":"Describe this image in detail."}]`;
  return `curl -N ${url}/v1/chat/completions -H 'content-type: application/json' -d '{"stream":true,"temperature":0,"messages":[{"role":"user","content":${content}}]}'`;
}

function aborted(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) resolve();
    else signal.addEventListener("abort", () => resolve(), { once: true });
  });
}

function disposable<T extends { close(): Promise<void> }>(thing: T): T & AsyncDisposable {
  return Object.assign(thing, { [Symbol.asyncDispose]: () => thing.close() });
}
