/** Rows that sequences keep of their last trees, on their way to the device: what tree.cu's moveRows and keepRows read. */
import type { Cuda, Pinned } from "./driver.ts";

/** Most rows of a sequence that a cycle keeps: the bound of tree.cu. */
export const MAX_KEPT = 16;
/** Its struct Move, in 32-bit words. */
const MOVE_WORDS = 3 * MAX_KEPT;

/** Rows that a sequence keeps of its last tree, at most 16; rows are absolute. */
export interface Move {
  /** Rows of keys and values, and where they belong. */
  from: readonly number[];
  to: readonly number[];
  /** Rows of hidden states, which go to the same places; none of them is such a place. */
  hiddenFrom: readonly number[];
}

/** Moves on the way to the device: of sequences whose kept rows are not in place yet. */
export class Moves implements Disposable {
  /** On the device. */
  readonly pointer: bigint;
  readonly #cuda: Cuda;
  readonly #input: Pinned;
  readonly #sequences: number;
  #count = 0;

  /** Room for so many. */
  constructor(cuda: Cuda, sequences: number) {
    this.#cuda = cuda;
    this.#sequences = sequences;
    this.#input = cuda.pinned(sequences * MOVE_WORDS * 4);
    this.pointer = cuda.alloc(sequences * MOVE_WORDS * 4);
  }

  /** How many were sent last. */
  get count(): number {
    return this.#count;
  }

  /** Queues the copy of these to the device. Nothing may still be on its way from before. */
  send(moves: readonly Move[]): void {
    if (moves.length > this.#sequences) throw new Error(`${moves.length} moves; ${this.#sequences} fit`);
    for (const [i, { from, to, hiddenFrom }] of moves.entries()) {
      if (from.length > MAX_KEPT || to.length !== from.length || hiddenFrom.length !== from.length)
        throw new Error(`a move of ${from.length} rows and ${hiddenFrom.length} hidden states to ${to.length} rows`);
      const words = new Int32Array(this.#input.buffer, i * MOVE_WORDS * 4, MOVE_WORDS);
      words.fill(0).fill(-1, 2 * MAX_KEPT);
      for (const [part, rows] of [from, to, hiddenFrom].entries()) words.set(rows, part * MAX_KEPT);
    }
    this.#count = moves.length;
    if (this.#count > 0) this.#cuda.upload(this.pointer, this.#input, this.#count * MOVE_WORDS * 4);
  }

  [Symbol.dispose](): void {
    this.#cuda.free(this.pointer);
    this.#cuda.freePinned(this.#input);
  }
}
