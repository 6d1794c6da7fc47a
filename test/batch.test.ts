/** Requests that share passes: each has the text that it has alone. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { BLOCK_ROWS, KvPool } from "../gpu-worker/decode/pool.ts";
import { LocalEngine } from "../gpu-worker/engine-local.ts";
import { answer, families, tokensOf } from "./support/goldens.ts";
import { askedOf, runSchedule } from "./support/schedules.ts";

describe.each(families)("$name", ({ model, cases }) => {
  let engine: LocalEngine;
  beforeAll(() => {
    engine = new LocalEngine({ model, concurrency: 16, prefixBytes: 0 });
  });
  afterAll(() => engine.close());

  test("all goldens at once have their ids", async () => {
    const answers = await Promise.all(cases.map((golden) => answer(engine, golden)));
    for (const [i, golden] of cases.entries()) expect(tokensOf(answers[i]), golden.id).toEqual(golden.output_ids);
  });

  test("a third of the rows that sixteen of them need is enough for all, with the same ids", async () => {
    const needs = cases.map(({ input_ids, output_ids }) => input_ids.length + output_ids.length + 32);
    const mean = needs.reduce((a, b) => a + b, 0) / needs.length;
    const pool = new KvPool(Math.max(Math.max(...needs) + BLOCK_ROWS, (16 * mean) / 3));
    engine.target.pool = pool;
    const answers = await Promise.all(cases.map((golden) => answer(engine, golden)));
    engine.target.pool = undefined;
    for (const [i, golden] of cases.entries()) expect(tokensOf(answers[i]), golden.id).toEqual(golden.output_ids);
    expect(pool.preemptions).toBeGreaterThan(0);
    expect(pool.used).toBe(0);
  });

  test("a prompt that the KV cache could never hold is refused", async () => {
    const { layers, kvHeads, headSize } = engine.model.config.language;
    const kvBytes = BLOCK_ROWS * 2 * layers * kvHeads * headSize * 4;
    const small = new LocalEngine({ model, kvBytes, drafter: "none" });
    expect(small.target.pool!.blocks).toBe(1);
    expect(small.info.contextLength).toBe(BLOCK_ROWS - 1);
    const longest = cases.toSorted((a, b) => b.input_ids.length - a.input_ids.length)[0];
    await expect(answer(small, longest)).rejects.toThrow(/the model's context (is|of) 63/);
    await small.close();
  });

  test("random schedules, with cancels", async () => {
    const asked = await askedOf(engine, cases.slice(0, 4));
    const wrong: string[] = [];
    for (let seed = 1; seed <= 6; seed++) wrong.push(...(await runSchedule(engine, asked, seed)));
    expect(wrong).toEqual([]);
    expect(engine.target.batch!.decoding).toBe(0);
  });
});
