/** The engine's parts on CUDA. */
import { join, resolve } from "node:path";
import { z } from "zod";
import type { Drafter } from "./decode/drafters/drafter.ts";
import { MENU, ShapeChooser } from "./decode/drafters/menu.ts";
import type { TreeShape } from "./decode/drafters/plan.ts";
import { cachedCosts, codeHash } from "./engine/costs-cache.ts";
import { PLAIN } from "./engine/cuda/cycle.ts";
import { always, type Chooser, cudaDrafter } from "./engine/cuda/drafter.ts";
import { loadCudaModel } from "./engine/cuda/model.ts";
import { CudaTarget } from "./engine/cuda/target.ts";
import type { Runtime } from "./engine/runtime.ts";
import type { EngineOptions, Parts } from "./engine-local.ts";

/** Milliseconds of each shape's cycle, measured once for a model on a device, and again when the code changes. */
function costsOf(target: CudaTarget, shapes: readonly TreeShape[], options: EngineOptions, draft: string): number[] {
  const { cuda, dtype, fingerprint, passBytes } = target.model;
  const key = {
    ...{ device: cuda.name, model: resolve(options.model), draft: resolve(draft), fingerprint, dtype },
    ...{ bytes: passBytes.target, draftBytes: passBytes.draft, shapes: JSON.stringify(shapes) },
    code: codeHash(join(import.meta.dirname, "..")),
  };
  return cachedCosts(key, z.array(z.number().positive()).length(shapes.length), () => target.measure(shapes));
}

/** Loads the checkpoint onto the GPU and makes the graphs of its cycles. */
export function onCuda(runtime: Runtime, options: EngineOptions, draft: string | undefined): Parts {
  const model = loadCudaModel(runtime, options.model, { ...options, draft });
  const target = new CudaTarget(model);
  const { shape } = options;
  const shapes = [PLAIN, ...(draft === undefined ? [] : shape ? [shape] : MENU)];
  target.warm(shapes);
  const cost = draft === undefined || shape ? undefined : costsOf(target, shapes, options, draft);
  const choose = () => (cost ? new ShapeChooser(MENU, (s) => cost[shapes.indexOf(s ?? PLAIN)]) : always(shape));
  let chooser = draft === undefined ? always() : choose();
  const drafter = (c: Chooser) => cudaDrafter(c) as Drafter;
  return {
    ...{ model, target, plain: drafter(always()) },
    drafter: drafter({ choose: () => chooser.choose(), learn: (...what) => chooser.learn(...what) }),
    forget: () => {
      if (cost) chooser = choose();
    },
    close: () => {
      target[Symbol.dispose]();
      model[Symbol.dispose]();
    },
  };
}
