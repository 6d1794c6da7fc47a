/** Products of few rows with a weight matrix on Hopper, by the kernels of skinny-weights.cu and skinny-gemm.cu. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Cuda } from "./driver.ts";
import type { Kernel } from "./kernel.ts";
import { tensorMap } from "./libcuda.ts";

// As in skinny-weights.cu.
const COLUMNS = 128;
const DEPTH = 64;
const THREADS = 256 + 64;
const BOX_COLUMNS = 64;
const ROW_BYTES = 2 * DEPTH;

/**
 * Units in the ring of the kernel for so many rows at most, of weights of so many bytes. More than half of the shared memory
 * of a multiprocessor, so that no two blocks fit on one: of one product they would leave another without.
 */
const STAGES = { 2: { 8: 8, 16: 8, 32: 7, 64: 6 }, 1: { 8: 16, 16: 16, 32: 14, 64: 12 } } as const;
const HEIGHTS = [8, 16, 32, 64] as const;
type Height = (typeof HEIGHTS)[number];
/** Parts of the multiprocessors that are enough: where every tile has as many blocks, and elsewhere (H100). */
const ENOUGH = { even: 0.7, odd: 0.94 };
/** Of the ring's beginning. */
const ALIGNMENT = 1024;

export interface ProductShape {
  rows: number;
  inner: number;
  columns: number;
}

/** A matrix [inner,columns] as bytes, on the device, with its columns' scales. */
export interface ByteMatrix {
  data: bigint;
  scales: bigint;
}

const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b));

/** Its scratch memory serves one launch at a time, as one stream gives. */
export class SkinnyGemm {
  readonly #blocks: number;
  readonly #cuda: Cuda;
  readonly #kernels: Record<"bytes" | "skinny" | "gated", Record<Height, Kernel>>;
  readonly #largest: Kernel;
  readonly #quantize: Kernel;
  readonly #parts: bigint;

  /** The kernels, where the GPU has them (Hopper). */
  static for(cuda: Cuda, dtype: "f32" | "f16" | "bf16"): SkinnyGemm | undefined {
    return cuda.arch === "sm_90" && dtype !== "f32" ? new SkinnyGemm(cuda, dtype) : undefined;
  }

  private constructor(cuda: Cuda, dtype: "f16" | "bf16") {
    const files = ["skinny-weights.cu", "skinny-gemm.cu"];
    const source = files.map((name) => readFileSync(join(import.meta.dirname, name), "utf8")).join("");
    const module = cuda.compile(source, { [dtype.toUpperCase()]: 1 }, files[1]);
    const kernels = (name: string) =>
      Object.fromEntries(HEIGHTS.map((rows) => [rows, module.kernel(`${name}${rows}`)])) as Record<Height, Kernel>;
    this.#cuda = cuda;
    this.#kernels = { bytes: kernels("bytes"), skinny: kernels("skinny"), gated: kernels("gated") };
    [this.#largest, this.#quantize] = [module.kernel("largest"), module.kernel("quantize")];
    this.#blocks = cuda.multiprocessors;
    const bytes = this.#blocks * HEIGHTS.at(-1)! * COLUMNS * 4;
    this.#parts = cuda.alloc(bytes);
    cuda.fill(this.#parts, 0xff, bytes);
  }

  /** Whether it has a kernel for the shape: rows of both matrices must be multiples of 16 bytes. */
  takes({ rows, inner, columns }: ProductShape): boolean {
    return rows <= HEIGHTS.at(-1)! && inner % 8 === 0 && columns % 8 === 0;
  }

  /** Rounds w [inner,columns] to bytes, with a scale for each column, in memory that the caller frees. Waits for it. */
  quantize(w: bigint, { inner, columns }: Pick<ProductShape, "inner" | "columns">): ByteMatrix {
    const tiles = Math.ceil(columns / COLUMNS);
    const units = tiles * Math.ceil(inner / DEPTH);
    const [data, scales] = [this.#cuda.alloc(units * COLUMNS * DEPTH), this.#cuda.alloc(tiles * COLUMNS * 4)];
    this.#largest.launch([(tiles * COLUMNS) / 32, 1, 1], 1024, 0, scales, w, inner, columns);
    this.#quantize.launch([2 * units, 1, 1], 256, 0, data, w, scales, inner, columns);
    this.#cuda.synchronize(); // products ask for weights before they await what was queued before them
    return { data, scales };
  }

  /**
   * Blocks for so many tiles and units: where many of them begin with a tile, few parts have to be joined. Some idle
   * multiprocessors do no harm then, the others read as fast as memory gives; but bytes need all, to widen them.
   */
  #blocksFor(tiles: number, units: number, bytes: 1 | 2): number {
    const most = Math.min(this.#blocks, units);
    if (bytes === 1) return most;
    const even = tiles * Math.floor(most / tiles);
    if (even >= ENOUGH.even * most) return even;
    for (let blocks = most; blocks >= ENOUGH.odd * most; blocks--) if (3 * gcd(tiles, blocks) >= blocks) return blocks;
    return most;
  }

  /** Queues y [rows,columns] = x [rows,inner] · w [inner,columns]; `gated`: y [rows,columns/2] of halves paired in w. */
  launch(y: bigint, x: bigint, w: bigint | ByteMatrix, { rows, inner, columns }: ProductShape, gated = false): void {
    const height = HEIGHTS.find((most) => most >= rows)!;
    const bytes = typeof w === "bigint" ? 2 : 1;
    const stage = DEPTH * COLUMNS * bytes + height * ROW_BYTES;
    const stages = STAGES[bytes][height];
    const tiles = Math.ceil(columns / COLUMNS);
    this.#kernels[gated ? "gated" : bytes === 2 ? "skinny" : "bytes"][height].launch(
      [this.#blocksFor(tiles, tiles * Math.ceil(inner / DEPTH), bytes), 1, 1],
      THREADS,
      stages * stage + ALIGNMENT,
      ...(typeof w === "bigint" ? [tensorMap(w, [columns, inner], [BOX_COLUMNS, DEPTH])] : [w.data, w.scales]),
      tensorMap(x, [inner, rows], [DEPTH, height]),
      ...[y, this.#parts, rows, inner, columns, stages],
    );
  }
}
