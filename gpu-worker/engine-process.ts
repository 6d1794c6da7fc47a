/**
 * The engine in a process of its own, so that HTTP never waits for a pass and a crash of native code ends no server. A
 * process that died or hangs is replaced; knows messages, nothing of what the engine does with them.
 */
import { type ChildProcess, fork } from "node:child_process";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";
import { ApiError, CheckpointError } from "../shared/errors.ts";
import type { GenerateRequest, ModelInfo, PixelLimits } from "../shared/protocol.ts";
import type { Engine, Step } from "./engine.ts";
import type { EngineOptions } from "./engine-local.ts";
import { describeError, type Log } from "./log.ts";
import { untilAborted } from "./until-aborted.ts";

/** What one call asks of the engine. */
type Question =
  | { generate: GenerateRequest; images: string[] }
  | { missing: string[] }
  | { put: string; bytes: Uint8Array; limits: PixelLimits };

export type ToEngine = { ping: true } | ({ call: number } & (Question | { abort: true }));

export type FromEngine =
  | { ready: ModelInfo; concurrency: number }
  | { failed: string; checkpoint: boolean }
  | { pong: true }
  | { call: number; step: Step }
  | { call: number; done: unknown }
  | { call: number; error: { status: number; message: string; code: string | null; param: string | null } };

type Answer = Extract<FromEngine, { call: number }>;
type Ready = Extract<FromEngine, { ready: ModelInfo }>;

export interface WatchOptions {
  /** Milliseconds without any message after which the process counts as hanging. A pass may take seconds. */
  hangTimeout?: number;
  log?: Log;
}

/** How often the process is asked for a sign of life in `hangTimeout`. */
const PINGS = 4;
/** Milliseconds between two attempts to start the process again: the first wait, which doubles, and the longest. */
const FIRST_WAIT = 500;
const LONGEST_WAIT = 30_000;

/** Starts the process and waits until its model is loaded. Rejects with CheckpointError when it can't be. */
export async function startEngine(options: EngineOptions, watch: WatchOptions = {}): Promise<EngineProcess> {
  const begun = performance.now();
  const child = launch(options);
  const ready = await loaded(child);
  return new EngineProcess(options, watch, child, ready, performance.now() - begun);
}

function launch(options: EngineOptions): ChildProcess {
  const child = fork(join(import.meta.dirname, "engine-child.ts"), [JSON.stringify(options)], {
    serialization: "advanced",
  });
  child.on("error", () => {}); // a send to a dying process fails; "exit" tells those who wait
  return child;
}

/** Waits for the model to be loaded; a process that cannot load it is ended. */
async function loaded(child: ChildProcess): Promise<Ready> {
  const { promise, resolve, reject } = Promise.withResolvers<Ready>();
  const exit = (code: number | null, signal: string | null) =>
    reject(new Error(`the engine ended while loading (${signal ?? code})`));
  child.once("exit", exit);
  child.once("error", reject);
  child.once("message", (message: FromEngine) => {
    if ("ready" in message) return resolve(message);
    child.kill("SIGKILL");
    const { failed, checkpoint } = message as Extract<FromEngine, { failed: string }>;
    reject(checkpoint ? new CheckpointError(failed) : new Error(failed));
  });
  return promise.finally(() => child.off("exit", exit).off("error", reject));
}

export class EngineProcess implements Engine {
  info: ModelInfo;
  /** How often the process was started again, or is to be. */
  restarts = 0;
  readonly concurrency: number;
  readonly #options: EngineOptions;
  readonly #hangTimeout: number;
  /** Milliseconds that loading may take when the process is started again. */
  readonly #loadTimeout: number;
  readonly #log: Log;
  /** The process that serves, or the last one that was started. */
  #child: ChildProcess;
  /** Whom to tell what the process says of a call. */
  readonly #calls = new Map<number, (answer: Answer) => void>();
  #next = 0;
  #ready = false;
  /** Resolves when there is a process that serves, or none any more. */
  #up: Promise<void> = Promise.resolve();
  readonly #closing = new AbortController();

  /** `loadMs`: what loading took the first time. */
  constructor(options: EngineOptions, watch: WatchOptions, child: ChildProcess, first: Ready, loadMs: number) {
    this.concurrency = first.concurrency;
    this.#options = { ...options, concurrency: first.concurrency }; // later processes keep to what the queue was made for
    this.#hangTimeout = watch.hangTimeout ?? 60_000;
    this.#loadTimeout = Math.max(this.#hangTimeout, 10 * loadMs);
    this.#log = watch.log ?? (() => {});
    this.#child = child;
    this.info = first.ready;
    this.#serve(child);
  }

  get ready(): boolean {
    return this.#ready;
  }

  get pid(): number {
    return this.#child.pid!;
  }

  #serve(child: ChildProcess): void {
    let silent = 0;
    child.on("message", (message: FromEngine) => {
      silent = 0;
      if ("call" in message) this.#calls.get(message.call)?.(message);
    });
    // Unanswered pings are counted, not time: after a pause of this process, the other's answers may still be unread.
    const pings = setInterval(() => {
      if (silent++ < PINGS) return this.#send({ ping: true });
      this.#log("error", "the engine hangs", { pid: child.pid });
      child.kill("SIGKILL");
    }, this.#hangTimeout / PINGS);
    child.once("exit", (code, signal) => {
      clearInterval(pings);
      this.#stopped(signal ?? code);
    });
    this.#ready = true;
  }

  #stopped(how: string | number | null): void {
    this.#ready = false;
    const closing = this.#closing.signal.aborted;
    if (!closing) {
      this.restarts++;
      this.#log("error", "the engine has stopped", { how, calls: this.#calls.size });
      this.#up = this.#restart();
    }
    const { status, message, code, param } = stopped();
    for (const [call, receive] of this.#calls) receive({ call, error: { status, message, code, param } });
  }

  /** Starts a process until one serves; returns when there is one, or when none is wanted any more. */
  async #restart(): Promise<void> {
    const { signal } = this.#closing;
    for (let wait = FIRST_WAIT; !signal.aborted; wait = Math.min(2 * wait, LONGEST_WAIT)) {
      const child = launch(this.#options);
      this.#child = child;
      const late = setTimeout(() => child.kill("SIGKILL"), this.#loadTimeout);
      try {
        const { ready: info } = await loaded(child).finally(() => clearTimeout(late));
        if (!isDeepStrictEqual(info, this.info)) this.info = info;
        this.#log("info", "the engine serves again", { pid: child.pid });
        return this.#serve(child);
      } catch (error) {
        if (!signal.aborted) this.#log("error", "the engine cannot be started", { error: describeError(error), wait });
      }
      await sleep(wait, undefined, { signal }).catch(() => {});
    }
  }

  /** Those that the engine does not hold: all, if it stops while it is asked. */
  async missingImages(keys: string[]): Promise<string[]> {
    if (keys.length === 0) return [];
    return (await this.#call({ missing: keys }).catch((error) => {
      if (error.code === "engine_stopped") return keys;
      throw error;
    })) as string[];
  }

  async putImage(key: string, bytes: Uint8Array, limits: PixelLimits): Promise<void> {
    await this.#call({ put: key, bytes, limits });
  }

  /** Waits for a process that serves. Throws ApiError 503 when there will be none, and the signal's reason. */
  async #served(signal: AbortSignal): Promise<void> {
    while (!this.#ready && !this.#closing.signal.aborted) await untilAborted(this.#up, signal);
    signal.throwIfAborted();
    if (!this.#ready) throw stopped();
  }

  #send(message: ToEngine): void {
    this.#child.send(message, (_error) => {});
  }

  async #call(question: Question): Promise<unknown> {
    await this.#served(this.#closing.signal).catch(() => Promise.reject(stopped()));
    const call = this.#next++;
    return new Promise((resolve, reject) => {
      this.#calls.set(call, (answer) => {
        this.#calls.delete(call);
        if ("error" in answer) reject(fromError(answer.error));
        else if ("done" in answer) resolve(answer.done);
      });
      this.#send({ call, ...question });
    });
  }

  async *generate(request: GenerateRequest, images: string[], signal: AbortSignal): AsyncGenerator<Step> {
    await this.#served(signal);
    const call = this.#next++;
    const answers: Answer[] = [];
    let wake = () => {};
    this.#calls.set(call, (answer) => {
      answers.push(answer);
      wake();
    });
    const abort = () => {
      this.#send({ call, abort: true });
      wake();
    };
    signal.addEventListener("abort", abort, { once: true });
    this.#send({ call, generate: request, images });
    let over = false;
    try {
      for (;;) {
        if (answers.length === 0) await new Promise<void>((resolve) => (wake = resolve));
        signal.throwIfAborted();
        for (const answer of answers.splice(0)) {
          over = !("step" in answer);
          if ("error" in answer) throw fromError(answer.error);
          if ("done" in answer) return;
          yield answer.step;
        }
      }
    } finally {
      signal.removeEventListener("abort", abort);
      if (!over && !signal.aborted) abort();
      this.#calls.delete(call);
    }
  }

  /** Ends the process, whatever it is at: it has nothing to lose. Resolves when none is left. */
  async close(): Promise<void> {
    this.#closing.abort();
    const child = this.#child;
    if (child.exitCode === null && child.signalCode === null) {
      const gone = new Promise((resolve) => child.once("exit", resolve));
      child.kill("SIGKILL");
      await gone;
    }
    await this.#up;
  }
}

function stopped(): ApiError {
  return new ApiError(503, "The engine has stopped.", { code: "engine_stopped", retryAfter: 1 });
}

function fromError({ status, message, code, param }: Extract<Answer, { error: unknown }>["error"]): ApiError {
  const retryAfter = status === 503 ? 1 : undefined;
  return new ApiError(status, message, { code: code ?? undefined, param: param ?? undefined, retryAfter });
}
