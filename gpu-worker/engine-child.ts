/** Entry of the engine's own process: serves a LocalEngine to its parent. Started by engine-process.ts only. */
import { CheckpointError, toApiError } from "../shared/errors.ts";
import type { GenerateRequest } from "../shared/protocol.ts";
import { LocalEngine } from "./engine-local.ts";
import type { FromEngine, ToEngine } from "./engine-process.ts";
import { describeError, logToStderr } from "./log.ts";

// The parent may be gone while a sequence runs; "disconnect" ends this process then, so a failed send says nothing new.
const send = (message: FromEngine) => process.send?.(message, (_error: Error | null) => {});
const running = new Map<number, AbortController>();

/** Tells the parent what a client may know; `what` names the call in the log, which gets the rest. */
function fail(call: number, thrown: unknown, what: object): void {
  const { status, message, code, param } = toApiError(thrown);
  if (status >= 500 && !running.get(call)?.signal.aborted)
    logToStderr("error", "the engine failed", { ...what, error: describeError(thrown) });
  send({ call, error: { status, message, code, param } });
  if (status < 500 || engine?.healthy !== false) return;
  // The parent starts another process; no call on this device would succeed any more.
  logToStderr("error", "the device is lost to this process, which ends", { ...what });
  process.exit(1);
}

let engine: LocalEngine | undefined;

async function generate(engine: LocalEngine, call: number, request: GenerateRequest, images: string[]): Promise<void> {
  const controller = new AbortController();
  running.set(call, controller);
  try {
    for await (const step of engine.generate(request, images, controller.signal)) send({ call, step });
    send({ call, done: null });
  } catch (thrown) {
    fail(call, thrown, { id: request.id });
  } finally {
    running.delete(call);
  }
}

function serve(engine: LocalEngine): void {
  const answer = (call: number, result: Promise<unknown>, what: object) =>
    result.then((done) => send({ call, done: done ?? null })).catch((thrown) => fail(call, thrown, what));
  process.on("message", (message: ToEngine) => {
    if ("ping" in message) send({ pong: true });
    else if ("generate" in message) void generate(engine, message.call, message.generate, message.images);
    else if ("abort" in message) running.get(message.call)?.abort();
    else if ("missing" in message) void answer(message.call, engine.missingImages(message.missing), {});
    else {
      const { call, put, bytes, limits } = message;
      void answer(call, engine.putImage(put, bytes, limits), { image: put });
    }
  });
  send({ ready: engine.info, concurrency: engine.concurrency });
}

// The parent decides when to end; a signal may reach the whole process group, and running streams may end first.
for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => {});
process.on("disconnect", () => process.exit(0));
try {
  engine = new LocalEngine(JSON.parse(process.argv[2]));
  await engine.warmUp();
  serve(engine);
} catch (thrown) {
  send({ failed: (thrown as Error).message, checkpoint: thrown instanceof CheckpointError });
}
