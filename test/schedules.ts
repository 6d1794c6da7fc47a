/**
 * 500 random schedules for each family, in a pool that is too small for them: node test/schedules.ts [COUNT [cpu|cuda]], in
 * float32. Every text must be what it is alone; blocks in use must come back to zero. Too long for npm test, which has a
 * few; exit code 1 on failure.
 */
import { KvPool } from "../gpu-worker/decode/pool.ts";
import type { Batch } from "../gpu-worker/engine/batch.ts";
import type { Batch as CudaBatch } from "../gpu-worker/engine/cuda/batch.ts";
import { LocalEngine } from "../gpu-worker/engine-local.ts";
import { families } from "./support/goldens.ts";
import { askedOf, runSchedule } from "./support/schedules.ts";

const count = Number(process.argv[2] ?? 500);
const device = process.argv[3] === "cuda" ? ({ device: "cuda", dtype: "f32" } as const) : {};
/** A few of the requests that a schedule has. */
const ROWS = 1280;
const CONCURRENCY = 16;
const STEP = 50;
let failures = 0;

for (const { name, model, cases } of families) {
  const engine = new LocalEngine({ model, concurrency: CONCURRENCY, ...device });
  const asked = await askedOf(engine, cases);
  const pool = new KvPool(ROWS, CONCURRENCY);
  const target = engine.parts.target as unknown as { pool: KvPool; batch: Batch | CudaBatch<unknown> };
  target.pool = pool;
  for (let seed = 1; seed <= count; seed++) {
    for (const wrong of await runSchedule(engine, asked, seed)) {
      failures++;
      console.log(`FAILED: ${name} ${wrong}`);
    }
    if (pool.used + target.batch.decoding > 0) {
      failures++;
      console.log(`FAILED: ${name} ${seed}: ${pool.used} blocks are in use, ${target.batch.decoding} decode`);
    }
    if (seed % STEP === 0) console.log(`${name}: ${seed} schedules, ${pool.preemptions} times one gave way`);
  }
  await engine.close();
}
console.log(failures ? `${failures} failed` : "every text as it is alone");
process.exit(failures ? 1 : 0);
