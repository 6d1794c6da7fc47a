/**
 * Runs the edge on this machine: bundles edge/ and serves it with workerd itself. `wrangler dev` runs the same Worker in
 * the same workerd, but takes ten times as long to start and puts a proxy of its own before each byte.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type { Readable, Writable } from "node:stream";
import { fileURLToPath } from "node:url";
import { bundleEdge } from "./bundle.ts";
import type { Log } from "./log.ts";
import { PortInUseError } from "./service/http.ts";

const root = fileURLToPath(new URL("..", import.meta.url));

/**
 * Runs workerd until standard input ends, which it does too when this process dies in whatever way. In a process group
 * of its own, so that a terminal's Ctrl-C reaches only this process, which then closes in order. A line asks workerd to
 * end, for which it waits for streams under way; the end of the input kills it.
 */
const LIFELINE =
  '"$0" "$@" </dev/null & exec 3>&-; read -r _ && kill -TERM $! && read -r _; exec 2>/dev/null; kill -9 $!; wait $!';

export interface RunningEdge {
  url: string;
  /** Resolves when workerd is gone, be it by `close` or by itself. */
  ended: Promise<void>;
  /** Takes no more connections; resolves when requests under way have been answered and workerd is gone. */
  drain(): Promise<void>;
  /** Ends workerd and its connections; resolves when it is gone. */
  close(): Promise<void>;
}

export interface EdgeOptions {
  /** 0 takes a free one. */
  port: number;
  /** The GPU workers' URLs, separated by commas. */
  upstream: string;
  /** What edge and workers share. */
  secret: string;
  /** As the binding API_KEYS (docs/api.md). */
  apiKeys?: string;
  /** As the binding CORS_ORIGINS. */
  corsOrigins?: string;
  log?: Log;
}

/** Serves the edge on loopback; resolves when it takes connections. Rejects with why not, e.g. that the port is in use. */
export async function startEdge(options: EdgeOptions): Promise<RunningEdge> {
  const { port, log = () => {} } = options;
  mkdirSync(join(root, ".wrangler"), { recursive: true });
  const folder = mkdtempSync(join(root, ".wrangler", "edge-"));
  try {
    await bundleEdge(join(folder, "edge.js"));
    const bindings = {
      GPU_WORKERS: options.upstream,
      WORKER_SECRET: options.secret,
      API_KEYS: options.apiKeys,
      CORS_ORIGINS: options.corsOrigins,
    };
    writeFileSync(join(folder, "edge.capnp"), workerdConfig(port, Object.keys(bindings)));
    const workerd: string = createRequire(import.meta.url)("workerd").default;
    const child = spawn("/bin/sh", ["-c", LIFELINE, workerd, "serve", join(folder, "edge.capnp"), "--control-fd=3"], {
      stdio: ["pipe", "pipe", "pipe", "pipe"],
      detached: true,
      env: { ...process.env, ...bindings },
    });
    createInterface({ input: child.stdout! }).on("line", (line) => passOn(line, log));
    // The control pipe ends with workerd, the shell around it only when told.
    const ended = new Promise<void>((resolve) => child.stdio[3]!.once("end", resolve));
    const close = () => end(child);
    const boundPort = await listening(child, port).catch(async (error) => {
      await close();
      throw error;
    });
    const drain = () => {
      child.stdin!.write("drain\n");
      return ended;
    };
    return { url: `http://127.0.0.1:${boundPort}`, ended, drain, close };
  } finally {
    rmSync(folder, { recursive: true, force: true }); // workerd has read it by now
  }
}

/**
 * workerd's configuration, with the compatibility date that wrangler.toml has. Bindings come from its environment, for
 * they hold secrets; one that is not set there is null.
 */
function workerdConfig(port: number, bindings: string[]): string {
  const toml = readFileSync(join(root, "wrangler.toml"), "utf8");
  const date = /^compatibility_date = (".*")$/m.exec(toml)![1];
  const texts = bindings.map((name) => `(name = "${name}", fromEnvironment = "${name}")`);
  return `using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [
    (name = "edge", worker = .edge),
    (name = "internet", network = (allow = ["public", "private"])),
  ],
  sockets = [(name = "http", address = "127.0.0.1:${port}", http = (), service = "edge")],
);
const edge :Workerd.Worker = (
  modules = [(name = "edge.js", esModule = embed "edge.js")],
  compatibilityDate = ${date},
  bindings = [${texts.join(", ")}, (name = "RATES", durableObjectNamespace = "Rate")],
  durableObjectNamespaces = [(className = "Rate", uniqueKey = "vispec-rates")],
  durableObjectStorage = (inMemory = void),
);
`;
}

/** A line that workerd prints: what the edge logs, as JSON, or some words of the runtime. */
function passOn(line: string, log: Log): void {
  const { level, msg, ...fields } = line.startsWith('{"level":') ? JSON.parse(line) : { level: "info", msg: line };
  log(level, msg, fields);
}

/** Waits for the port that workerd reports; its standard error is kept until then, and shown from then on. */
function listening(child: ChildProcess, port: number): Promise<number> {
  const control = child.stdio[3] as Readable;
  const stderr = child.stderr!;
  return new Promise((resolve, reject) => {
    let events = "";
    let complaint = "";
    const keep = (data: Buffer) => (complaint += data);
    stderr.on("data", keep);
    control.on("data", (data: Buffer) => {
      events += data;
      const bound = /"event":"listen".*"port":(\d+)/.exec(events);
      if (!bound) return;
      stderr.off("data", keep);
      stderr.on("data", (data: Buffer) => process.stderr.write(data));
      resolve(Number(bound[1]));
    });
    child.once("error", reject);
    control.once("end", () => {
      const inUse = complaint.includes("Address already in use");
      reject(inUse ? new PortInUseError(port) : new Error(`the edge did not start: ${complaint.split("\n")[0]}`));
    });
  });
}

async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const gone = new Promise((resolve) => child.once("exit", resolve));
  (child.stdin as Writable).end();
  await gone;
}
