/**
 * A thousand requests of every kind in a process of their own, whose JavaScript heap is held small so that the size of
 * the process tells of native memory: node --expose-gc --max-semi-space-size=1. Prints what is left of them as JSON.
 */
import { setImmediate } from "node:timers/promises";
import type { GenerateRequest } from "../../shared/protocol.ts";
import { cases, collect, openEngine, prepare, promptOf } from "./goldens.ts";

const engine = openEngine();
const never = new AbortController().signal;
type Prepared = Awaited<ReturnType<typeof prepare>>;
const requestOf = (id: string, change: Partial<GenerateRequest>) =>
  prepare(engine, cases.find((c) => c.id === id)!, change);

const text = await requestOf("18-story", { maxTokens: 6 });
const long = await requestOf("18-story", { maxTokens: 200 });
const picture = await requestOf("00-describe", { maxTokens: 6 });
const pictures = await requestOf("15-compare", { maxTokens: 6 });
const all = ({ request, images }: Prepared, change: Partial<GenerateRequest> = {}) =>
  collect(engine.generate({ ...request, ...change }, images, never));

async function refused(work: Promise<unknown>): Promise<void> {
  const error = await work.then(
    () => null,
    (thrown) => thrown,
  );
  if (!error) throw new Error("was to be refused");
}

/** Decodes until the signal is aborted in the third cycle. */
async function abortInTheMiddle(): Promise<void> {
  const controller = new AbortController();
  const steps = engine.generate(long.request, long.images, controller.signal);
  for (let i = 0; i < 3; i++) await steps.next();
  controller.abort();
  await refused(steps.next());
}

/** Decodes three cycles and leaves the loop, as a reader that fails does. */
async function leaveInTheMiddle(): Promise<void> {
  let cycles = 0;
  for await (const _step of engine.generate(long.request, long.images, never)) if (++cycles === 3) return;
}

/** What follows answers in JSON has some 12 kB in the grammar's thread. */
async function followMany(): Promise<void> {
  const { eosTokens } = engine.model.config;
  for (let i = 0; i < 30; i++)
    (await engine.grammars.open({ schema: null, strict: true }, eosTokens))[Symbol.dispose]();
}

const kinds: (() => Promise<unknown>)[] = [
  () => all(text),
  () => all(text, { sampling: { ...text.request.sampling, temperature: 1 } }),
  () => all(text, { n: 3, plain: true }),
  () => all(picture, { n: 2 }),
  () => all(text, { json: { schema: null, strict: true } }),
  followMany,
  () => all(picture),
  () => all(pictures),
  abortInTheMiddle,
  leaveInTheMiddle,
  () => refused(all(text, { maxTokens: 5000 })),
  () => refused(all({ ...picture, images: ["held by nobody"] })),
  () => refused(engine.putImage("broken", Uint8Array.of(1), engine.info.pixels)),
  () => promptOf(engine, cases.find(({ id }) => id === "06-ocr")!), // one more pass of the vision tower
];

async function measure() {
  engine.target[Symbol.dispose](); // what it keeps for later sequences
  // Twice what it takes for V8 to let go of code that runs no more, and for what waits for a turn of the event loop.
  for (let i = 0; i < 10; i++) {
    await setImmediate();
    (globalThis as unknown as { gc(): void }).gc();
  }
  const { rss, heapUsed } = process.memoryUsage();
  return { tensors: engine.runtime.allocatedBytes, heap: heapUsed, process: rss };
}

async function rounds(n: number): Promise<void> {
  for (let i = 0; i < n; i++) for (const kind of kinds) await kind();
}

const first = (await measure()).tensors;
await rounds(40);
const before = await measure();
await rounds(100);
const after = await measure();
const left = {
  tensors: after.tensors - first,
  heap: after.heap - before.heap,
  process: after.process - before.process,
};
console.log(JSON.stringify(left));
await engine.close();
