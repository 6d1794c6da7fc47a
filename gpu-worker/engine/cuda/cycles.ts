/** The cycles of all shapes and numbers of sequences, and what has to be done before one. */
import { Moves } from "../../cuda/moves.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import { DTYPES } from "../tensor.ts";
import type { Run, Runner } from "./batch.ts";
import { Cycle, PLAIN } from "./cycle.ts";
import type { CudaModel } from "./model.ts";
import type { CudaSequence } from "./sequence.ts";
import type { Workspace } from "./workspace.ts";

export class Cycles implements Runner<CudaSequence>, Disposable {
  readonly #model: CudaModel;
  readonly #space: Workspace;
  readonly #moves: Moves;
  readonly #made = new Map<string, Cycle>();

  constructor(model: CudaModel, space: Workspace) {
    this.#model = model;
    this.#space = space;
    this.#moves = new Moves(model.cuda, model.blocks.slots);
  }

  /** The cycle of a shape for so many sequences, made when it is first asked for. */
  of(shape: TreeShape, sequences: number): Cycle {
    const key = `${sequences}/${shape.totalToken}/${shape.depth}/${shape.topK}`;
    const cycle = this.#made.get(key) ?? new Cycle(this.#model, this.#space, shape, sequences);
    this.#made.set(key, cycle);
    return cycle;
  }

  start(sequences: readonly CudaSequence[], shape: TreeShape = PLAIN, others: Iterable<CudaSequence> = []): Run {
    const { cuda } = this.#model;
    const cycle = this.of(shape, sequences.length);
    this.#settle(new Set([...others, ...sequences]));
    let wait: () => number;
    try {
      const starts = sequences.map((sequence) => sequence.next(shape !== PLAIN));
      wait = cuda.timed(() => cycle.start(starts));
    } catch (error) {
      cuda.synchronize(); // what was sent must be read before the next cycle sends
      throw error;
    }
    const tree = (i: number) => {
      sequences[i].verified({ row: cycle.firstRow(i), best: cycle.best(i) });
      return cycle.tree(i);
    };
    return { wait, tree };
  }

  /** Moves what sequences accepted of their last trees: keys and values, and hidden states for the draft. */
  #settle(sequences: Iterable<CudaSequence>): void {
    const { trees, cache, draft, hidden, config, dtype } = this.#model;
    const moves = [...sequences].flatMap((sequence) => sequence.settle() ?? []);
    if (moves.length === 0) return;
    this.#moves.send(moves);
    trees.moveRows(this.#moves, cache.place);
    if (draft) trees.keepRows(this.#moves, hidden.pointer, config.language.hidden * DTYPES[dtype].bytes);
  }

  /** A whole cycle that keeps nothing but its roots, followed by token 0: for measurements. Gives milliseconds. */
  step(sequences: readonly CudaSequence[], shape: TreeShape): number {
    const run = this.start(sequences, shape);
    const milliseconds = run.wait();
    for (const [i, sequence] of sequences.entries()) {
      run.tree(i);
      sequence.commit({ nodes: [0], tokens: [0] });
    }
    return milliseconds;
  }

  [Symbol.dispose](): void {
    for (const cycle of this.#made.values()) cycle[Symbol.dispose]();
    this.#moves[Symbol.dispose]();
  }
}
