/** Products of few rows with a weight matrix on Hopper, by the kernels of skinny-gemm.cu. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Cuda } from "./driver.ts";
import type { Kernel } from "./kernel.ts";
import { tensorMap } from "./libcuda.ts";

// As in skinny-gemm.cu.
const COLUMNS = 128;
const DEPTH = 64;
const THREADS = 256 + 64;
const BOX_COLUMNS = 64;
const ROW_BYTES = 2 * DEPTH;

/** Most rows of each kernel, and units in its ring. */
const STAGES = { 8: 8, 16: 8, 32: 7, 64: 6 } as const;
const HEIGHTS = [8, 16, 32, 64] as const;
type Height = (typeof HEIGHTS)[number];
/** Bytes of shared memory that two blocks share on a multiprocessor, besides what each takes that asks for none. */
const SHARED = 230_000;
/** With so many, no two blocks fit on one: of one product they would leave another multiprocessor without. */
const MORE_THAN_HALF = 115_600;
/** Of the ring's beginning. */
const ALIGNMENT = 1024;

export interface ProductShape {
  rows: number;
  inner: number;
  columns: number;
}

/** Its scratch memory serves one launch at a time, as one stream gives. */
export class SkinnyGemm {
  readonly #blocks: number;
  readonly #kernels: Record<Height, Kernel>;
  readonly #parts: bigint;
  readonly #flags: bigint;

  /** The kernels, where the GPU has them (Hopper). */
  static for(cuda: Cuda, dtype: "f32" | "f16" | "bf16"): SkinnyGemm | undefined {
    return cuda.arch === "sm_90" && dtype !== "f32" ? new SkinnyGemm(cuda, dtype) : undefined;
  }

  private constructor(cuda: Cuda, dtype: "f16" | "bf16") {
    const source = readFileSync(join(import.meta.dirname, "skinny-gemm.cu"), "utf8");
    const module = cuda.compile(source, { [dtype.toUpperCase()]: 1 }, "skinny-gemm.cu");
    const kernels = HEIGHTS.map((rows) => [rows, module.kernel(`skinny${rows}`)]);
    this.#kernels = Object.fromEntries(kernels) as Record<Height, Kernel>;
    this.#blocks = cuda.multiprocessors;
    this.#parts = cuda.alloc(this.#blocks * HEIGHTS.at(-1)! * COLUMNS * 4);
    this.#flags = cuda.alloc(this.#blocks * 4);
    cuda.fill(this.#flags, 0, this.#blocks * 4);
  }

  /** Whether it has a kernel for the shape: rows of both matrices must be multiples of 16 bytes. */
  takes({ rows, inner, columns }: ProductShape): boolean {
    return rows <= HEIGHTS.at(-1)! && inner % 8 === 0 && columns % 8 === 0;
  }

  /**
   * Queues y [rows,columns] = x [rows,inner] · w [inner,columns]; `beside`: bytes of shared memory of the kernel before,
   * which it shall run beside.
   */
  launch(y: bigint, x: bigint, w: bigint, { rows, inner, columns }: ProductShape, beside = 0): void {
    const height = HEIGHTS.find((most) => most >= rows)!;
    const stage = DEPTH * COLUMNS * 2 + height * ROW_BYTES;
    const fit = Math.max(3, Math.floor((SHARED - beside - ALIGNMENT) / stage));
    const stages = Math.min(STAGES[height], fit);
    const shared = Math.max(stages * stage + ALIGNMENT, MORE_THAN_HALF);
    const units = Math.ceil(columns / COLUMNS) * Math.ceil(inner / DEPTH);
    this.#kernels[height].launch(
      [Math.min(this.#blocks, units), 1, 1],
      THREADS,
      shared,
      tensorMap(w, [columns, inner], [BOX_COLUMNS, DEPTH]),
      tensorMap(x, [inner, rows], [DEPTH, height]),
      ...[y, this.#parts, this.#flags, rows, inner, columns, stages],
    );
  }
}
