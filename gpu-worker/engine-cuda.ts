/** The engine's parts on CUDA. */
import { join, resolve } from "node:path";
import { z } from "zod";
import type { Drafter } from "./decode/drafters/drafter.ts";
import { CROWD, MENU, ShapeChooser } from "./decode/drafters/menu.ts";
import type { TreeShape } from "./decode/drafters/plan.ts";
import { BLOCK_ROWS, KvPool } from "./decode/pool.ts";
import { cachedCosts, codeHash } from "./engine/costs-cache.ts";
import type { Chooser } from "./engine/cuda/batch.ts";
import { PLAIN } from "./engine/cuda/cycle.ts";
import { always, cudaDrafter } from "./engine/cuda/drafter.ts";
import { loadCudaModel, SHARED_TREE } from "./engine/cuda/model.ts";
import { CudaTarget } from "./engine/cuda/target.ts";
import type { Runtime } from "./engine/runtime.ts";
import type { EngineOptions, Parts } from "./engine-local.ts";

/** Sequences that are decoded at once by default. */
const CONCURRENCY = 16;
/** How many sequences cycles are measured for; between them costs are a line. */
const COUNTS = [1, 2, 4, 8, 16];

/** Trees for so many sequences, plain decoding first. */
function offered(sequences: number): TreeShape[] {
  const menu = sequences === 1 ? MENU : MENU.filter(({ totalToken, depth }) => totalToken <= SHARED_TREE && depth > 2);
  return [PLAIN, ...menu, ...CROWD];
}

/** Milliseconds of cycles [counts][shapes], measured once for a model on a device, and again when the code changes. */
function costsOf(target: CudaTarget, counts: readonly number[], options: EngineOptions, draft: string): number[][] {
  const { cuda, dtype, fingerprint, passBytes } = target.model;
  const key = {
    ...{ device: cuda.name, model: resolve(options.model), draft: resolve(draft), fingerprint, dtype },
    ...{ bytes: passBytes.target, draftBytes: passBytes.draft, counts: counts.join() },
    shapes: JSON.stringify(counts.map(offered)),
    code: codeHash(join(import.meta.dirname, "..")),
  };
  const schema = z.array(z.array(z.number().positive())).length(counts.length);
  return cachedCosts(key, schema, () => counts.map((count) => target.measure(offered(count), count)));
}

/** What a cycle of a shape costs for any number of sequences (above the last, as of those); undefined where it is not offered. */
function costTable(counts: readonly number[], measured: readonly (readonly number[])[]) {
  const at = (i: number, shape: TreeShape) => measured[i][offered(counts[i]).indexOf(shape)] as number | undefined;
  return (shape: TreeShape | undefined, sequences: number): number | undefined => {
    const i = counts.findIndex((count, at) => count >= sequences || at === counts.length - 1);
    const above = at(i, shape ?? PLAIN);
    if (counts[i] <= sequences || above === undefined) return above;
    const share = (sequences - counts[i - 1]) / (counts[i] - counts[i - 1]);
    return (1 - share) * at(i - 1, shape ?? PLAIN)! + share * above;
  };
}

/** Loads the checkpoint onto the GPU and makes the graphs of all cycles. */
export function onCuda(runtime: Runtime, options: EngineOptions, draft: string | undefined): Parts {
  const { shape, concurrency = CONCURRENCY } = options;
  const model = loadCudaModel(runtime, options.model, { ...options, concurrency, draft });
  const target = new CudaTarget(model);
  target.pool = new KvPool(model.blocks.free * BLOCK_ROWS, concurrency);
  target.warm(draft === undefined ? () => [PLAIN] : shape ? () => [PLAIN, shape] : offered);
  const counts = [...new Set([...COUNTS.filter((count) => count < target.most), target.most])];
  const cost = draft === undefined || shape ? undefined : costTable(counts, costsOf(target, counts, options, draft));
  const choose = () => (cost ? new ShapeChooser([...MENU, ...CROWD], cost) : always(shape));
  let chooser = draft === undefined ? always() : choose();
  const drafter = (c: Chooser) => cudaDrafter(target.batch, c) as Drafter;
  return {
    ...{ model, target, plain: drafter(always()), concurrency },
    drafter: drafter({ choose: (n) => chooser.choose(n), learn: (...what) => chooser.learn(...what) }),
    forget: () => {
      if (cost) chooser = choose();
    },
    close: () => {
      target[Symbol.dispose]();
      model[Symbol.dispose]();
    },
  };
}
