/** The passes of resizing of resample.cu. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Cuda } from "./driver.ts";
import type { Kernel } from "./kernel.ts";

const THREADS = 256;
/** Rows beyond so many are taken by blocks that are through with one. */
const BLOCKS = 4096;

/** Addresses of int32 on the device: Weights of input/resize.ts. */
export interface DeviceWeights {
  first: bigint;
  count: bigint;
  weight: bigint;
  stride: number;
}

/** Every method queues one kernel; pointers are device addresses of 8-bit samples. */
export class Resample {
  readonly #across: Kernel;
  readonly #down: Kernel;

  constructor(cuda: Cuda) {
    const module = cuda.compile(readFileSync(join(import.meta.dirname, "resample.cu"), "utf8"), {}, "resample.cu");
    [this.#across, this.#down] = [module.kernel("across"), module.kernel("down")];
  }

  /** [rows,from,3] to [rows,to,3]. */
  across(out: bigint, input: bigint, w: DeviceWeights, from: number, to: number, rows: number): void {
    const grid = [Math.ceil(to / THREADS), Math.min(rows, BLOCKS), 1] as const;
    this.#across.launch(grid, THREADS, 0, out, input, w.first, w.count, w.weight, w.stride, from, to, rows);
  }

  /** [..,row], whose first is row `top` of the picture, to [rows,row]. */
  down(out: bigint, input: bigint, w: DeviceWeights, row: number, rows: number, top: number): void {
    const grid = [Math.ceil(row / THREADS), Math.min(rows, BLOCKS), 1] as const;
    this.#down.launch(grid, THREADS, 0, out, input, w.first, w.count, w.weight, w.stride, row, rows, top);
  }
}
