/** `vispec serve`: the GPU worker alone. `npm start`: the worker and the edge before it, on this machine. */
import { startEngine } from "../engine-process.ts";
import { startServer } from "../server.ts";
import { startEdge } from "../start.ts";
import { engineOptions, number, parseFlags, UsageError } from "./options.ts";

export const SERVE_HELP = `vispec serve [--port N] [--host ADDRESS] [--model DIR] [--draft DIR] [--drafter vispec|none]
  [--total-token N --depth N --top-k-draft N] [--device cpu|cuda|webgpu] [--threads N]`;

const EXAMPLE = "test/goldens/qwen/images/00-describe-0.png";

/** Resolves once the signal is aborted and everything is closed. */
export async function serveCommand(args: string[], signal: AbortSignal): Promise<void> {
  const flags = parseFlags(args, ["port", "host"]);
  const port = number(flags, "port", { min: 0, max: 65535 }) ?? 8788;
  await using engine = disposable(await startEngine(engineOptions(flags)));
  await using server = disposable(await startServer(engine, { port, host: (flags.host as string) ?? "127.0.0.1" }));
  console.log(`${engine.info.id} is served at ${server.url}`);
  await aborted(signal);
}

/** The edge takes the port that PORT names (0: a free one); the worker a free one, on loopback. */
export async function startCommand(args: string[], signal: AbortSignal): Promise<void> {
  const flags = parseFlags(args, []);
  const port = Number(process.env.PORT || "8787");
  if (!Number.isInteger(port) || port < 0 || port > 65535)
    throw new UsageError(`PORT is ${process.env.PORT}; it must be a whole number from 0 to 65535`);
  await using engine = disposable(await startEngine(engineOptions(flags)));
  await using server = disposable(await startServer(engine, { port: 0, host: "127.0.0.1" }));
  await using edge = disposable(await startEdge({ port, upstream: server.url }));
  console.log(`${engine.info.id} answers at ${edge.url}. Ask it about a picture:\n\n${curl(edge.url)}\n`);
  await aborted(signal);
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
