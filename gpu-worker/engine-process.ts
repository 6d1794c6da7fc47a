/** The engine in a process of its own, so that HTTP never waits for a pass and a crash of native code ends no server. */
import { type ChildProcess, fork } from "node:child_process";
import { join } from "node:path";
import { ApiError, CheckpointError } from "../shared/errors.ts";
import type { GenerateRequest, ModelInfo } from "../shared/protocol.ts";
import type { Engine, Step } from "./engine.ts";
import type { EngineOptions } from "./engine-local.ts";

export type ToEngine = { call: number } & (
  | { generate: GenerateRequest }
  | { abort: true }
  | { missing: string[] }
  | { put: string; bytes: Uint8Array }
);

export type FromEngine =
  | { ready: ModelInfo }
  | { failed: string; checkpoint: boolean }
  | { call: number; step: Step }
  | { call: number; done: unknown }
  | { call: number; error: { status: number; message: string; code: string | null; param: string | null } };

type Answer = Extract<FromEngine, { call: number }>;

/** Starts the process and waits until its model is loaded. Rejects with CheckpointError when it can't be. */
export async function startEngine(options: EngineOptions): Promise<Engine> {
  const child = fork(join(import.meta.dirname, "engine-child.ts"), [JSON.stringify(options)], {
    serialization: "advanced",
  });
  const info = await new Promise<ModelInfo>((resolve, reject) => {
    child.once("exit", (code, signal) => reject(new Error(`the engine ended while loading (${signal ?? code})`)));
    child.once("error", reject);
    child.once("message", (message: FromEngine) => {
      if ("ready" in message) return resolve(message.ready);
      child.kill();
      const { failed, checkpoint } = message as Extract<FromEngine, { failed: string }>;
      reject(checkpoint ? new CheckpointError(failed) : new Error(failed));
    });
  });
  child.removeAllListeners("exit");
  return new EngineProcess(child, info);
}

class EngineProcess implements Engine {
  readonly info: ModelInfo;
  readonly #child: ChildProcess;
  readonly #calls = new Map<number, (answer: Answer) => void>();
  #next = 0;
  #ended: ApiError | undefined;

  constructor(child: ChildProcess, info: ModelInfo) {
    this.#child = child;
    this.info = info;
    child.on("message", (answer: Answer) => this.#calls.get(answer.call)?.(answer));
    child.on("error", () => {}); // a send to a dying engine fails; "exit" tells those who wait
    child.on("exit", () => {
      this.#ended = new ApiError(503, "The engine has stopped.", { code: "engine_stopped" });
      const { status, message, code, param } = this.#ended;
      for (const [call, receive] of this.#calls) receive({ call, error: { status, message, code, param } });
    });
  }

  missingImages(hashes: string[]): Promise<string[]> {
    return hashes.length === 0 ? Promise.resolve([]) : (this.#call({ missing: hashes }) as Promise<string[]>);
  }

  async putImage(hash: string, bytes: Uint8Array): Promise<void> {
    await this.#call({ put: hash, bytes });
  }

  #call(message: { missing: string[] } | { put: string; bytes: Uint8Array }): Promise<unknown> {
    const call = this.#next++;
    return new Promise((resolve, reject) => {
      if (this.#ended) return reject(this.#ended);
      this.#calls.set(call, (answer) => {
        this.#calls.delete(call);
        if ("error" in answer) reject(fromError(answer.error));
        else if ("done" in answer) resolve(answer.done);
      });
      this.#child.send({ call, ...message });
    });
  }

  async *generate(request: GenerateRequest, signal: AbortSignal): AsyncGenerator<Step> {
    if (this.#ended) throw this.#ended;
    signal.throwIfAborted();
    const call = this.#next++;
    const answers: Answer[] = [];
    let wake = () => {};
    this.#calls.set(call, (answer) => {
      answers.push(answer);
      wake();
    });
    const abort = () => {
      if (this.#child.connected) this.#child.send({ call, abort: true });
      wake();
    };
    signal.addEventListener("abort", abort, { once: true });
    this.#child.send({ call, generate: request });
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

  close(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return Promise.resolve();
    return new Promise((resolve) => {
      this.#child.once("exit", () => resolve());
      this.#child.disconnect();
    });
  }
}

function fromError({ status, message, code, param }: Extract<Answer, { error: unknown }>["error"]): ApiError {
  return new ApiError(status, message, { code: code ?? undefined, param: param ?? undefined });
}
