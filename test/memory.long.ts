/** Nothing stays behind: tensors by the runtime's own count, everything else by the size of a process. */
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import type { GenerateRequest } from "../shared/protocol.ts";
import { start } from "./support/cli.ts";
import { cases, collect, openEngine, prepare, tokensOf } from "./support/goldens.ts";

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
/** Starts answers to one case. */
async function asking(id: string, change: Partial<GenerateRequest>) {
  const { request, images } = await prepare(engine, cases.find((c) => c.id === id)!, change);
  return (signal = never) => engine.generate(request, images, signal);
}

test("an abort frees a sequence's memory within one cycle", async () => {
  const ask = await asking("00-describe", { maxTokens: 200 });
  const free = allocated();
  const controller = new AbortController();
  const steps = ask(controller.signal);
  await steps.next();
  await steps.next();
  expect(engine.runtime.allocatedBytes).toBeGreaterThan(free);
  controller.abort(new Error("enough"));
  await expect(steps.next()).rejects.toThrow("enough");
  expect(allocated()).toBe(free);
});

test("an abort ends a prompt of many passes after the one that runs", async () => {
  const controller = new AbortController();
  const { request } = await prepare(engine, {
    id: "long",
    messages: [{ role: "user", content: "word ".repeat(1000) }],
  });
  const free = allocated();
  const passes = engine.target.passes.bind(engine.target);
  let count = 0;
  vi.spyOn(engine.target, "passes").mockImplementation(function* (context, chunk) {
    for (const pass of passes(context, chunk)) {
      count++;
      controller.abort(new Error("enough"));
      yield pass;
    }
  });
  await expect(collect(engine.generate(request, [], controller.signal))).rejects.toThrow("enough");
  vi.restoreAllMocks();
  expect(count).toBe(1);
  expect(allocated()).toBe(free);
});

test("sequences that run side by side free their own memory only", async () => {
  const ask = await asking("06-ocr", { maxTokens: 20 });
  const alone = await collect(ask());
  const free = allocated();
  const [kept, left] = [ask(), ask()];
  const tokens: number[] = [...(await kept.next()).value!.tokens];
  await left.next();
  await left.return(undefined);
  for await (const step of kept) tokens.push(...step.tokens);
  expect(tokens).toEqual(tokensOf(alone));
  expect(allocated()).toBe(free);
});

test("a sequence uses the memory of one that ended, and is not changed by it", async () => {
  const long = await asking("00-describe", { maxTokens: 200 });
  const short = await asking("06-ocr", { maxTokens: 20 });
  allocated();
  const alone = await collect(short());
  await collect(long());
  const held = engine.runtime.allocatedBytes;
  const steps = short();
  const tokens = [...(await steps.next()).value!.tokens];
  expect(engine.runtime.allocatedBytes).toBe(held);
  for await (const step of steps) tokens.push(...step.tokens);
  expect(tokens).toEqual(tokensOf(alone));
});
