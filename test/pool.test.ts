import { describe, expect, test } from "vitest";
import { BLOCK_ROWS, KvPool } from "../gpu-worker/decode/pool.ts";

const { signal } = new AbortController();
const rows = (blocks: number) => blocks * BLOCK_ROWS;
/** Whether a promise is settled once everything that is ready has run. */
async function settled(promise: Promise<unknown>): Promise<boolean> {
  let over = false;
  promise.then(() => (over = true)).catch(() => (over = true));
  await new Promise(setImmediate);
  return over;
}

describe("a pool of rows", () => {
  test("admits by what is free, first come first served, and is empty in the end", async () => {
    const pool = new KvPool(rows(4) + 63);
    expect(pool.blocks).toBe(4);
    const first = await pool.admit(rows(2) + 1, signal);
    expect([first.blocks, pool.used]).toEqual([3, 3]);
    const second = pool.admit(rows(2), signal);
    const third = pool.admit(rows(1), signal);
    // It would fit, but it came later.
    expect(await settled(third)).toBe(false);
    first[Symbol.dispose]();
    first[Symbol.dispose]();
    (await second)[Symbol.dispose]();
    (await third)[Symbol.dispose]();
    expect(pool.used).toBe(0);
  });

  test("admits no more at the same time than there are places", async () => {
    const pool = new KvPool(rows(4), 2);
    const [first, second] = [await pool.admit(rows(1), signal), await pool.admit(rows(1), signal)];
    const third = pool.admit(rows(1), signal);
    expect(await settled(third)).toBe(false);
    second[Symbol.dispose]();
    for (const room of [first, await third]) room[Symbol.dispose]();
    expect(pool.used).toBe(0);
  });

  test("has the youngest give way to one that grows, and admits it again before new ones", async () => {
    const pool = new KvPool(rows(4));
    const [old, middle, young] = [await pool.admit(rows(1), signal), await pool.admit(rows(1), signal), await pool.admit(rows(1), signal)]; // biome-ignore format: one line
    expect(await old.grow(rows(2), signal)).toBe(true);
    const grown = old.grow(rows(3), signal);
    expect(await settled(grown)).toBe(false);
    expect([middle.gaveWay, young.gaveWay, pool.preemptions]).toEqual([false, true, 1]);
    const newcomer = pool.admit(rows(1), signal);
    expect(await young.grow(rows(2), signal)).toBe(false);
    young[Symbol.dispose]();
    expect(await grown).toBe(true);
    const again = pool.admit(rows(1), signal, true);
    middle[Symbol.dispose]();
    (await again)[Symbol.dispose]();
    (await newcomer)[Symbol.dispose]();
    old[Symbol.dispose]();
    expect(pool.used).toBe(0);
  });

  test("grows at once where that takes no waiting, and not before one that waits", async () => {
    const pool = new KvPool(5 * BLOCK_ROWS);
    const [first, second] = [await pool.admit(BLOCK_ROWS, signal), await pool.admit(BLOCK_ROWS, signal)];
    expect([first.growNow(BLOCK_ROWS), first.growNow(3 * BLOCK_ROWS), pool.used]).toEqual([true, true, 4]);
    expect([second.growNow(3 * BLOCK_ROWS), second.growNow(2 * BLOCK_ROWS), pool.used]).toEqual([false, true, 5]);
    const growing = first.grow(4 * BLOCK_ROWS, signal);
    expect([second.gaveWay, second.growNow(BLOCK_ROWS)]).toEqual([true, false]);
    second[Symbol.dispose]();
    expect(await growing).toBe(true);
  });

  test("has the one that grows give way itself when it is the youngest", async () => {
    const pool = new KvPool(rows(3));
    const [old, young] = [await pool.admit(rows(2), signal), await pool.admit(rows(1), signal)];
    expect(await young.grow(rows(2), signal)).toBe(false);
    expect([old.gaveWay, young.gaveWay]).toEqual([false, true]);
  });

  test("refuses what it could never hold, and lets those who wait leave", async () => {
    const pool = new KvPool(rows(2));
    await expect(pool.admit(rows(2) + 1, signal)).rejects.toThrow(/needs 129 rows .* there are 128/);
    using all = await pool.admit(rows(2), signal);
    await expect(all.grow(rows(3), signal)).rejects.toThrow(/needs 192 rows/);
    const controller = new AbortController();
    const waiting = pool.admit(rows(1), controller.signal);
    const behind = pool.admit(rows(1), signal);
    controller.abort(new Error("left"));
    await expect(waiting).rejects.toThrow("left");
    all[Symbol.dispose]();
    (await behind)[Symbol.dispose]();
    expect(pool.used).toBe(0);
  });
});
