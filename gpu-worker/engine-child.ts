/** Entry of the engine's own process: serves a LocalEngine to its parent. Started by engine-process.ts only. */
import { CheckpointError, toApiError } from "../shared/errors.ts";
import { LocalEngine } from "./engine-local.ts";
import type { FromEngine, ToEngine } from "./engine-process.ts";

// The parent may be gone while a sequence runs; "disconnect" ends this process then, so a failed send says nothing new.
const send = (message: FromEngine) => process.send?.(message, (_error: Error | null) => {});
const running = new Map<number, AbortController>();

function fail(call: number, thrown: unknown): void {
  const { status, message, code, param } = toApiError(thrown);
  if (status >= 500 && !running.get(call)?.signal.aborted) console.error(thrown);
  send({ call, error: { status, message, code, param } });
}

async function generate(
  engine: LocalEngine,
  call: number,
  request: Parameters<LocalEngine["generate"]>[0],
): Promise<void> {
  const controller = new AbortController();
  running.set(call, controller);
  try {
    for await (const step of engine.generate(request, controller.signal)) send({ call, step });
    send({ call, done: null });
  } catch (thrown) {
    fail(call, thrown);
  } finally {
    running.delete(call);
  }
}

function serve(engine: LocalEngine): void {
  const answer = (call: number, result: Promise<unknown>) =>
    result.then((done) => send({ call, done: done ?? null })).catch((thrown) => fail(call, thrown));
  process.on("message", (message: ToEngine) => {
    if ("generate" in message) void generate(engine, message.call, message.generate);
    else if ("abort" in message) running.get(message.call)?.abort();
    else if ("missing" in message) void answer(message.call, engine.missingImages(message.missing));
    else if ("put" in message) void answer(message.call, engine.putImage(message.put, message.bytes));
  });
  send({ ready: engine.info });
}

// The parent decides when to end; Ctrl-C reaches the whole process group, and running streams may end first.
process.on("SIGINT", () => {});
process.on("disconnect", () => process.exit(0));
try {
  const engine = new LocalEngine(JSON.parse(process.argv[2]));
  await engine.warmUp();
  serve(engine);
} catch (thrown) {
  send({ failed: (thrown as Error).message, checkpoint: thrown instanceof CheckpointError });
}
