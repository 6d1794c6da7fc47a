/** Nothing stays behind: tensors by the runtime's own count, everything else by the size of a process. */
import { afterAll, beforeAll, expect, test } from "vitest";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import type { GenerateRequest } from "../shared/protocol.ts";
import { start } from "./support/cli.ts";
import { cases, collect, openEngine, prepare } from "./support/goldens.ts";

test("a thousand requests, with pictures, aborted or refused, leave nothing behind", async () => {
  const node = ["--expose-gc", "--max-semi-space-size=1", "test/support/thousand-requests.ts"];
  const { stdout, stderr } = await start(process.execPath, node).gone;
  expect(stderr).toBe("");
  const left = JSON.parse(stdout);
  expect(left.tensors).toBe(0);
  expect(left.heap).toBeLessThan(1000 * 500);
  expect(left.process).toBeLessThan(1000 * 12_000);
});

let engine: LocalEngine;
beforeAll(() => {
  engine = openEngine();
});
afterAll(() => engine.close());

const never = new AbortController().signal;

/** Bytes of tensors, without the memory that the target keeps for later sequences. */
function allocated(): number {
  engine.target[Symbol.dispose]();
  return engine.runtime.allocatedBytes;
}
const requestOf = async (id: string, change: Partial<GenerateRequest>) =>
  (await prepare(engine, cases.find((c) => c.id === id)!, change)).request;

test("an abort frees a sequence's memory within one cycle", async () => {
  const request = await requestOf("00-describe", { maxTokens: 200 });
  const free = allocated();
  const controller = new AbortController();
  const steps = engine.generate(request, controller.signal);
  await steps.next();
  await steps.next();
  expect(engine.runtime.allocatedBytes).toBeGreaterThan(free);
  controller.abort(new Error("enough"));
  await expect(steps.next()).rejects.toThrow("enough");
  expect(allocated()).toBe(free);
});

test("sequences that run side by side free their own memory only", async () => {
  const request = await requestOf("06-ocr", { maxTokens: 20 });
  const alone = await collect(engine.generate(request, never));
  const free = allocated();
  const [kept, left] = [engine.generate(request, never), engine.generate(request, never)];
  const tokens: number[] = [...(await kept.next()).value!.tokens];
  await left.next();
  await left.return(undefined);
  for await (const step of kept) tokens.push(...step.tokens);
  expect(tokens).toEqual(alone.flatMap((step) => step.tokens));
  expect(allocated()).toBe(free);
});

test("a sequence uses the memory of one that ended, and is not changed by it", async () => {
  const long = await requestOf("00-describe", { maxTokens: 200 });
  const short = await requestOf("06-ocr", { maxTokens: 20 });
  allocated();
  const alone = await collect(engine.generate(short, never));
  await collect(engine.generate(long, never));
  const held = engine.runtime.allocatedBytes;
  const steps = engine.generate(short, never);
  const tokens = [...(await steps.next()).value!.tokens];
  expect(engine.runtime.allocatedBytes).toBe(held);
  for await (const step of steps) tokens.push(...step.tokens);
  expect(tokens).toEqual(alone.flatMap((step) => step.tokens));
});
