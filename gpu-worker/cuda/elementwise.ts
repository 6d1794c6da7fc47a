/** The small kernels of elementwise.cu. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Cuda } from "./driver.ts";
import type { Kernel } from "./kernel.ts";

/** Element types, as the kernels number them. */
export type Float = "f32" | "f16" | "bf16";
const TYPES: Record<Float, number> = { f32: 0, f16: 1, bf16: 2 };
const NAMES = [
  "convert",
  "turn",
  "gatherRows",
  "pairRows",
  "addRows",
  "gatedSilu",
  "addRmsNorm",
  "readAll",
  "copyRows",
  "pickAngles",
] as const;
const THREADS = 256;
const BLOCKS = 2048;
const TILE = 32;
const BLOCK_ROWS = 64;
/**
 * Rows of planes: [planes][count][rowBytes], or where a table is given (i32, on the device: the block of each 64 rows)
 * blocks of [planes][64][rowBytes], where `count` does not matter.
 */
export interface Planes {
  base: bigint;
  /** A multiple of 4. */
  rowBytes: number;
  planes: number;
  count: number;
  table?: bigint;
  /** From one block to the next, where a block holds more than these planes. */
  blockBytes?: number;
}

/** Their struct in elementwise.cu. */
function structOf({ base, rowBytes, planes, count, table, blockBytes }: Planes): BigUint64Array {
  const planeBytes = (table === undefined ? count : BLOCK_ROWS) * rowBytes;
  return BigUint64Array.of(base, table ?? 0n, BigInt(blockBytes ?? planes * planeBytes), BigInt(planeBytes));
}

/** Threads of a block that has a row, eight values each. */
const rowThreads = (width: number) => Math.min(1024, Math.ceil(width / 8 / 32) * 32);

/** Every method queues one kernel; pointers are device addresses. */
export class Elementwise {
  readonly #kernels: Record<(typeof NAMES)[number], Kernel>;

  constructor(cuda: Cuda) {
    const source = readFileSync(join(import.meta.dirname, "elementwise.cu"), "utf8");
    const module = cuda.compile(source, {}, "elementwise.cu");
    const kernels = NAMES.map((name) => [name, module.kernel(name)]);
    this.#kernels = Object.fromEntries(kernels) as Record<(typeof NAMES)[number], Kernel>;
  }

  /** `n` values from one type to another. */
  convert(to: bigint, toType: Float, from: bigint, fromType: Float, n: number): void {
    const blocks = Math.min(BLOCKS, Math.ceil(n / THREADS));
    this.#kernels.convert.launch([blocks, 1, 1], THREADS, 0, to, from, n, TYPES[toType], TYPES[fromType]);
  }

  /** from [rows,columns] to columns `at` and on of to [columns,stride], or to where those go where its halves are paired. */
  turn(
    to: { data: bigint; type: Float; at: number; stride: number; paired?: boolean },
    from: { data: bigint; type: Float; rows: number; columns: number },
  ): void {
    const { rows, columns } = from;
    const grid = [Math.ceil(columns / TILE), Math.ceil(rows / TILE), 1] as const;
    const types = [TYPES[to.type], TYPES[from.type]];
    const place = [to.at, to.stride, to.paired ? 1 : 0];
    this.#kernels.turn.launch(grid, THREADS, 0, to.data, from.data, rows, columns, ...place, ...types);
  }

  /** out[r] = table[index[r / per]] for rows of `width` values; index i32, one for `per` rows. */
  gatherRows(out: bigint, table: bigint, index: bigint, per: number, rows: number, width: number, type: Float): void {
    this.#kernels.gatherRows.launch([rows, 1, 1], THREADS, 0, out, table, index, per, width, TYPES[type]);
  }

  /** Rows at … at + rows of every plane to rows toAt and on of another memory's; none is both read and written. */
  copyRows(to: Planes, toAt: number, from: Planes, at: number, rows: number): void {
    const { rowBytes, planes } = from;
    if (to.rowBytes !== rowBytes || to.planes !== planes || rowBytes % 4)
      throw new Error(`rows of ${planes} times ${rowBytes} bytes to ${to.planes} times ${to.rowBytes}`);
    const wide = rowBytes % 16 === 0 && ((to.base | from.base) & 15n) === 0n;
    const grid = [Math.ceil((rows * rowBytes) / (wide ? 16 : 4) / THREADS), planes, 1] as const;
    const numbers = [at, rows, rowBytes, wide ? 1 : 0];
    this.#kernels.copyRows.launch(grid, THREADS, 0, structOf(to), toAt, structOf(from), ...numbers);
  }

  /**
   * to [rows,half] = table [most,half] at each row's positions: those of the prompt's tokens by axis, positions
   * [axes,tokens] i32 and axes [half] i32; then the row + delta.
   */
  pickAngles(
    to: bigint,
    table: bigint,
    { positions, axes }: { positions: bigint; axes: bigint },
    { tokens, delta, half, rows, most }: Record<"tokens" | "delta" | "half" | "rows" | "most", number>,
  ): void {
    const grid = [Math.ceil((rows * half) / THREADS), 1, 1] as const;
    const numbers = [tokens, delta, half, rows, most];
    this.#kernels.pickAngles.launch(grid, THREADS, 0, to, table, positions, axes, ...numbers);
  }

  /** x [rows,2·inner] to silu(x[:,:inner]) · x[:,inner:], or with its halves paired; inner a multiple of 8 in 16 bits. */
  gatedSilu(out: bigint, x: bigint, rows: number, inner: number, type: Float, paired = false): void {
    const threads = type === "f32" ? inner : inner / 8;
    const numbers = [inner, TYPES[type], paired ? 1 : 0];
    this.#kernels.gatedSilu.launch([rows, Math.ceil(threads / THREADS), 1], THREADS, 0, out, x, ...numbers);
  }

  /** [table[ids] ; hidden[hiddenRows]] where keep is not 0, else zeros: [rows,2·width]; indices i64. */
  pairRows(
    out: bigint,
    from: Record<"keep" | "table" | "ids" | "hidden" | "hiddenRows", bigint>,
    rows: number,
    width: number,
    type: Float,
  ): void {
    const { keep, table, ids, hidden, hiddenRows } = from;
    const grid = [rows, 2, 1] as const;
    this.#kernels.pairRows.launch(grid, THREADS, 0, out, keep, table, ids, hidden, hiddenRows, width, TYPES[type]);
  }

  /** x [rows,width] + y [rows or 1,width] to sum; and sum[index], index i64 [picks], to picked, if there is any. */
  addRows(
    { sum, picked }: { sum: bigint; picked: bigint },
    { x, y, index }: { x: bigint; y: bigint; index: bigint },
    { rows, yRows, picks, width }: Record<"rows" | "yRows" | "picks" | "width", number>,
    type: Float,
  ): void {
    const numbers = [rows, yRows, width, TYPES[type]];
    this.#kernels.addRows.launch([rows + picks, 1, 1], rowThreads(width), 0, sum, picked, x, y, index, ...numbers);
  }

  /** x [rows,width] + residual (or 0n) to sum, and sum / rms(sum) · weight [width] to norm; width even. */
  addRmsNorm(
    { norm, sum }: { norm: bigint; sum: bigint },
    { x, residual, weight }: { x: bigint; residual: bigint; weight: bigint },
    rows: number,
    width: number,
    epsilon: number,
    type: Float,
  ): void {
    const numbers = [width, TYPES[type], { float: epsilon }];
    this.#kernels.addRmsNorm.launch([rows, 1, 1], rowThreads(width), 0, norm, sum, x, residual, weight, ...numbers);
  }

  /** Reads bytes (a multiple of 16) once and forgets them: what a bandwidth is measured by. */
  readAll(from: bigint, out: bigint, bytes: number): void {
    this.#kernels.readAll.launch([BLOCKS, 1, 1], THREADS, 0, from, out, bytes / 16);
  }
}
