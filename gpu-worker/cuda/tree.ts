/** ViSpec's tree as kernels (tree.cu), and their grids. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type CycleBlock, listOf, MAX_SLICES, MAX_TOP_K, seenOf } from "./cycle-block.ts";
import type { Cuda } from "./driver.ts";
import type { Kernel } from "./kernel.ts";
import { MAX_KEPT, type Moves } from "./moves.ts";

// Bounds of tree.cu.
const THREADS = 256;
const HELD = 32;
/** Rows of logits up to which slices are small. */
const FEW_ROWS = 16;

/** Keys and values of a decoder: blocks of [planes,64,rowBytes]. */
export interface Pool {
  pointer: bigint;
  planes: number;
  /** Of one row of one plane: a multiple of 16. */
  rowBytes: number;
  blockBytes: number;
}

/** Slices of a row of logits: enough blocks to fill the device with few rows, few lists to merge with many. */
function slicesOf(rows: number, vocabulary: number, per: number): { slices: number; slice: number } {
  const slices = Math.min(MAX_SLICES, Math.ceil(vocabulary / (rows > FEW_ROWS ? THREADS * HELD : 2048)));
  return { slices, slice: Math.ceil(vocabulary / slices / per) * per };
}

/** Kernels for logits of one type; every method enqueues only, so it can be captured, but for those of moves. */
export class TreeKernels {
  readonly #kernels: Record<"candidates" | "grow" | "rank" | "finish" | "argmax" | "moveRows" | "keepRows", Kernel>;
  /** Elements of 16 bytes. */
  readonly #per: number;

  constructor(cuda: Cuda, dtype: "f16" | "bf16" | "f32") {
    const source = readFileSync(join(import.meta.dirname, "tree.cu"), "utf8");
    const module = cuda.compile(source, { [dtype.toUpperCase()]: 1 }, "tree.cu");
    this.#kernels = {
      candidates: module.kernel("candidates"),
      grow: module.kernel("grow"),
      rank: module.kernel("rank"),
      finish: module.kernel("finish"),
      argmax: module.kernel("argmax"),
      moveRows: module.kernel("moveRows"),
      keepRows: module.kernel("keepRows"),
    };
    this.#per = dtype === "f32" ? 4 : 8;
  }

  /** Puts the rows that were sent in place in a pool. */
  moveRows(moves: Moves, { pointer, planes, rowBytes, blockBytes }: Pool): void {
    if (rowBytes % 16) throw new Error(`rows of ${rowBytes} bytes: they are moved by 16`);
    if (moves.count === 0) return;
    const columns = rowBytes / 16;
    const grid = [Math.ceil((planes * columns) / 128), moves.count, 1] as const;
    const pieces = BigInt(blockBytes / 16);
    this.#kernels.moveRows.launch(grid, 128, 0, moves.pointer, pointer, planes, columns, pieces);
  }

  /** Puts the hidden states of the rows that were sent in place; rows of `bytes`, a multiple of 4. */
  keepRows(moves: Moves, hidden: bigint, bytes: number): void {
    if (moves.count === 0) return;
    this.#kernels.keepRows.launch([MAX_KEPT, moves.count, 1], THREADS, 0, moves.pointer, hidden, bytes);
  }

  /**
   * Grows the trees by the candidates of a draft pass, `logits` [rows,vocabulary]: level 0 is the first pass, with one
   * row for a sequence's last fresh one, the others have topK each. `map` [vocabulary] i32, tokens of a cut vocabulary,
   * 0n for none. Unless it is level `depth`, the next one's pass is in `block.level` then.
   */
  grow(block: CycleBlock, level: number, logits: bigint, vocabulary: number, map = 0n): void {
    const { topK: k, depth } = block.shape;
    const { cycles, seen, keys, indices, sums } = block.work;
    const { ids, hiddenRows, positions, masks, control } = block.level;
    const slices = this.#candidates(block, logits, block.sequences * (level === 0 ? 1 : k), vocabulary, k);
    const lists = [cycles, block.fresh.last, keys, indices, sums, map];
    const pointers = [...lists, seen, ids, hiddenRows, positions, masks, control];
    const grid = [block.sequences, 1, 1] as const;
    const isLast = level === depth ? 1 : 0;
    this.#kernels.grow.launch(grid, 32 * (MAX_TOP_K + 1), 0, ...pointers, slices, k, level, isLast);
  }

  /** Picks each tree of the nodes that were seen, and writes the target's pass and the results. */
  finish(block: CycleBlock): void {
    const { ids, positions, masks, control } = block.verify;
    const { tokens, parents, depths, scores, spans } = block.results;
    const { cycles, seen, ranked, rankedNodes } = block.work;
    const { shape, sequences } = block;
    const [count, most] = [seenOf(shape), listOf(shape, block.verify.divided)];
    const grid = [sequences, 1, 1] as const;
    if (most > 0) this.#kernels.rank.launch(grid, 1024, 0, seen, ranked, rankedNodes, count, most);
    const lists = [cycles, seen, ranked, rankedNodes];
    const pointers = [...lists, ids, positions, masks, control, tokens, parents, depths, scores, spans];
    const numbers = [shape.totalToken, count, most, block.verify.divided ? 1 : 0];
    this.#kernels.finish.launch(grid, 1024, sequences * (8 * most + 4), ...pointers, ...numbers);
  }

  /** The likeliest token of each row of the target's logits [rows,vocabulary], the lower one on ties. */
  argmax(block: CycleBlock, logits: bigint, vocabulary: number): void {
    const rows = block.sequences * block.shape.totalToken;
    const slices = this.#candidates(block, logits, rows, vocabulary, 1);
    const { keys, indices } = block.work;
    this.#kernels.argmax.launch([rows, 1, 1], 32, 0, keys, indices, block.results.best, slices);
  }

  #candidates({ work }: CycleBlock, logits: bigint, rows: number, vocabulary: number, k: number): number {
    if (vocabulary < k || vocabulary > THREADS * HELD * MAX_SLICES)
      throw new Error(
        `a vocabulary of ${vocabulary}: candidates are taken from ${k} to ${THREADS * HELD * MAX_SLICES}`,
      );
    const { slices, slice } = slicesOf(rows, vocabulary, this.#per);
    const { keys, indices, sums } = work;
    this.#kernels.candidates.launch([slices, rows, 1], THREADS, 0, logits, keys, indices, sums, vocabulary, slice, k);
    return slices;
  }
}
