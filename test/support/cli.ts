/** Runs the command line in a process of its own. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { constants } from "node:os";
import { fileURLToPath } from "node:url";

export const ROOT = fileURLToPath(new URL("../..", import.meta.url));

export interface Ended {
  /** 128 and the signal's number for one that died of a signal, as shells have it. */
  code: number | null;
  stdout: string;
  stderr: string;
}

/** A child that runs, with its output as it grows. */
export interface Running extends Ended {
  child: ChildProcess;
  /** Resolves when it ended and none of its descendants holds its output any more, that is, when all of them are gone. */
  gone: Promise<Ended>;
  /** Resolves when standard output matches; rejects when the output ends before. */
  says(pattern: RegExp): Promise<RegExpExecArray>;
}

/** Starts a command in the project's root, in a process group of its own. */
export function start(command: string, args: string[], env: Record<string, string | undefined> = {}): Running {
  const own = { ...process.env, NO_COLOR: undefined, FORCE_COLOR: undefined, ...env };
  const child = spawn(command, args, { cwd: ROOT, env: own, detached: true, stdio: ["ignore", "pipe", "pipe"] });
  const running: Running = {
    ...{ child, code: null, stdout: "", stderr: "" },
    gone: once(child, "close").then(([code, signal]) =>
      Object.assign(running, { code: code ?? 128 + constants.signals[signal as NodeJS.Signals] }),
    ),
    says: (pattern) =>
      new Promise((resolve, reject) => {
        const look = () => {
          const found = pattern.exec(running.stdout);
          if (found) resolve(found);
        };
        child.stdout.on("data", look);
        child.once("close", () => reject(new Error(`${command} ended: ${running.stdout}${running.stderr}`)));
        look();
      }),
  };
  child.stdout.on("data", (data) => (running.stdout += data));
  child.stderr.on("data", (data) => (running.stderr += data));
  return running;
}

/** Starts `vispec …`. */
export const startVispec = (args: string[], env?: Record<string, string | undefined>, node: string[] = []) =>
  start(process.execPath, [...node, "gpu-worker/main.ts", ...args], env);

/** Runs `vispec …` to its end. */
export const vispec = (args: string[], env?: Record<string, string | undefined>): Promise<Ended> =>
  startVispec(args, env).gone;
