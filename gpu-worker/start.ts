/**
 * Runs the edge on this machine: bundles edge/ and serves it with workerd itself. `wrangler dev` runs the same Worker in
 * the same workerd, but takes ten times as long to start and puts a proxy of its own before each byte.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import type { Readable, Writable } from "node:stream";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import { PortInUseError } from "./http.ts";

const root = fileURLToPath(new URL("..", import.meta.url));

/**
 * Runs workerd until standard input ends, which it does too when this process dies in whatever way. In a process group
 * of its own, so that a terminal's Ctrl-C reaches only this process, which then closes in order. Killed and not asked to
 * end, since workerd would wait for streams under way; it has nothing to lose.
 */
const LIFELINE = '"$0" "$@" </dev/null & exec 3>&-; read -r _; exec 2>/dev/null; kill -9 $!; wait $!';

export interface RunningEdge {
  url: string;
  /** Resolves when workerd is gone, be it by `close` or by itself. */
  ended: Promise<void>;
  /** Ends workerd and its connections; resolves when it is gone. */
  close(): Promise<void>;
}

/**
 * Serves the edge on loopback; resolves when it takes connections. `port` 0 takes a free one; `upstream` is the GPU
 * workers' URLs, separated by commas. Rejects with a message that says why, e.g. that the port is in use.
 */
export async function startEdge({ port, upstream }: { port: number; upstream: string }): Promise<RunningEdge> {
  mkdirSync(join(root, ".wrangler"), { recursive: true });
  const folder = mkdtempSync(join(root, ".wrangler", "edge-"));
  try {
    await bundle(join(folder, "edge.js"));
    writeFileSync(join(folder, "edge.capnp"), workerdConfig(port, upstream));
    const workerd: string = createRequire(import.meta.url)("workerd").default;
    const child = spawn("/bin/sh", ["-c", LIFELINE, workerd, "serve", join(folder, "edge.capnp"), "--control-fd=3"], {
      stdio: ["pipe", "inherit", "pipe", "pipe"],
      detached: true,
    });
    // The control pipe ends with workerd, the shell around it only when told.
    const ended = new Promise<void>((resolve) => child.stdio[3]!.once("end", resolve));
    const close = () => end(child);
    const boundPort = await listening(child, port).catch(async (error) => {
      await close();
      throw error;
    });
    return { url: `http://127.0.0.1:${boundPort}`, ended, close };
  } finally {
    rmSync(folder, { recursive: true, force: true }); // workerd has read it by now
  }
}

async function bundle(outfile: string): Promise<void> {
  await build({
    entryPoints: [join(root, "edge/index.ts")],
    outfile,
    bundle: true,
    format: "esm",
    target: "esnext",
    conditions: ["workerd", "worker", "browser"],
    logLevel: "error",
  });
}

/** workerd's configuration, with the compatibility date that wrangler.toml has. */
function workerdConfig(port: number, upstream: string): string {
  const toml = readFileSync(join(root, "wrangler.toml"), "utf8");
  const date = /^compatibility_date = (".*")$/m.exec(toml)![1];
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
  bindings = [(name = "GPU_WORKERS", text = ${JSON.stringify(upstream)})],
);
`;
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
      stderr.pipe(process.stderr);
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
