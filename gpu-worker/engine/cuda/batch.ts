/** Cycles of several sequences: those that are ready at the same time draft and verify their trees in one pass each. */
import { Moves } from "../../cuda/moves.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { Tree } from "../../decode/tree.ts";
import { DTYPES } from "../tensor.ts";
import { Cycle, PLAIN } from "./cycle.ts";
import type { CudaModel } from "./model.ts";
import type { CudaSequence } from "./sequence.ts";
import type { Workspace } from "./workspace.ts";

/** What decides on the shape of each cycle, and learns what came of it. */
export interface Chooser {
  /** For so many sequences. Undefined: no drafts. */
  choose(sequences: number): TreeShape | undefined;
  /** `accepted`: drafts of each sequence that goes on; `sequences`: how many there were. */
  learn(shape: TreeShape | undefined, accepted: readonly number[], milliseconds: number, sequences: number): void;
}

interface Asked {
  sequence: CudaSequence;
  chooser: Chooser;
  /** Drafts of its last cycle; undefined before there was one. */
  accepted: number | undefined;
  /** Whether the sequence has left meanwhile. */
  gone: boolean;
  resolve(tree: Tree): void;
  reject(error: unknown): void;
}

interface Started {
  cycle: Cycle;
  asked: readonly Asked[];
  /** Waits for it, and gives milliseconds. */
  wait(): number;
}

export class Batch implements Disposable {
  readonly #model: CudaModel;
  readonly #space: Workspace;
  readonly #moves: Moves;
  readonly #cycles = new Map<string, Cycle>();
  /** Those that decode: from their first cycle on. */
  readonly #decoding = new Set<CudaSequence>();
  /** Those of the last cycle whose logits may still be read: the next one overwrites them. */
  readonly #reading = new Set<CudaSequence>();
  #asked: Asked[] = [];
  #running: Started | undefined;
  /** The last cycle, for its chooser to learn from. */
  #last: { cycle: Cycle; asked: readonly Asked[]; milliseconds: number } | undefined;
  #soon: NodeJS.Immediate | undefined;

  constructor(model: CudaModel, space: Workspace) {
    this.#model = model;
    this.#space = space;
    this.#moves = new Moves(model.cuda, model.blocks.slots);
  }

  /** How many sequences decode. */
  get decoding(): number {
    return this.#decoding.size;
  }

  /** Takes part in the next cycle of the chooser's; gives the tree once it is verified. */
  ask(sequence: CudaSequence, chooser: Chooser, accepted: number | undefined): Promise<Tree> {
    this.#decoding.add(sequence);
    this.#reading.delete(sequence);
    return new Promise((resolve, reject) => {
      this.#asked.push({ sequence, chooser, accepted, gone: false, resolve, reject });
      this.#begin();
    });
  }

  release(sequence: CudaSequence): void {
    if (this.#reading.delete(sequence)) this.#begin();
  }

  leave(sequence: CudaSequence): void {
    if (!this.#decoding.delete(sequence)) return;
    this.#reading.delete(sequence);
    for (const asked of this.#running?.asked ?? []) if (asked.sequence === sequence) asked.gone = true;
    this.#asked = this.#asked.filter((asked) => asked.sequence !== sequence);
    this.#begin();
  }

  /** Starts a cycle at once when all who decode are ready, else with those who are ready when this turn ends. */
  #begin(): void {
    if (this.#running || this.#reading.size > 0 || this.#asked.length === 0) return;
    if (this.#asked.length === this.#decoding.size) this.#start();
    else this.#soon ??= setImmediate(() => this.#start());
  }

  #start(): void {
    clearImmediate(this.#soon);
    this.#soon = undefined;
    if (this.#running || this.#reading.size > 0 || this.#asked.length === 0) return;
    const [{ chooser }] = this.#asked;
    const asked = this.#asked.filter((one) => one.chooser === chooser);
    this.#asked = this.#asked.filter((one) => one.chooser !== chooser);
    this.#learn(asked);
    try {
      const sequences = asked.map(({ sequence }) => sequence);
      const shape = chooser.choose(asked.length) ?? PLAIN;
      this.#running = { ...this.#queue(sequences, shape), asked };
    } catch (error) {
      for (const { reject } of asked) reject(error);
      return;
    }
    setImmediate(() => this.#finish());
  }

  #learn(asked: readonly Asked[]): void {
    const last = this.#last;
    this.#last = undefined;
    if (last?.asked[0].chooser !== asked[0].chooser) return;
    // One that comes late tells of an earlier cycle.
    const took = new Set(last.asked.map(({ sequence }) => sequence));
    const accepted = asked.flatMap((one) => (took.has(one.sequence) ? (one.accepted ?? []) : []));
    const { shape, sequences } = last.cycle;
    if (accepted.length > 0)
      asked[0].chooser.learn(shape === PLAIN ? undefined : shape, accepted, last.milliseconds, sequences);
  }

  /** Queues what the last trees left to do, and a cycle. */
  #queue(sequences: readonly CudaSequence[], shape: TreeShape): Pick<Started, "cycle" | "wait"> {
    const { cuda } = this.#model;
    const cycle = this.cycle(shape, sequences.length);
    this.#settle(sequences);
    const starts = sequences.map((sequence) => sequence.next(shape !== PLAIN));
    return { cycle, wait: cuda.timed(() => cycle.start(starts)) };
  }

  /** Moves what sequences accepted of their last trees: keys and values, and hidden states for the draft. */
  #settle(sequences: readonly CudaSequence[]): void {
    const { trees, cache, draft, hidden, config, dtype } = this.#model;
    const moves = [...new Set([...this.#decoding, ...sequences])].flatMap((sequence) => sequence.settle() ?? []);
    if (moves.length === 0) return;
    this.#moves.send(moves);
    trees.moveRows(this.#moves, cache.place);
    if (draft) trees.keepRows(this.#moves, hidden.pointer, config.language.hidden * DTYPES[dtype].bytes);
  }

  #finish(): void {
    const { cycle, asked, wait } = this.#running!;
    try {
      const milliseconds = wait();
      this.#last = { cycle, asked, milliseconds };
      const here = [...asked.entries()].filter(([, { gone }]) => !gone);
      for (const [i, { sequence }] of here) this.#take(cycle, sequence, i);
      for (const [, { sequence }] of here) this.#reading.add(sequence);
      this.#running = undefined;
      for (const [i, { resolve }] of asked.entries()) resolve(cycle.tree(i));
    } catch (error) {
      this.#running = undefined;
      for (const { reject } of asked) reject(error);
    }
    this.#begin();
  }

  #take(cycle: Cycle, sequence: CudaSequence, i: number): void {
    sequence.verified({ row: i * cycle.shape.totalToken, best: cycle.best(i) });
  }

  /** The cycle of a shape for so many sequences, made when it is first asked for. */
  cycle(shape: TreeShape, sequences: number): Cycle {
    const key = `${sequences}/${shape.totalToken}/${shape.depth}/${shape.topK}`;
    const cycle = this.#cycles.get(key) ?? new Cycle(this.#model, this.#space, shape, sequences);
    this.#cycles.set(key, cycle);
    return cycle;
  }

  /** A whole cycle that keeps nothing but its roots, followed by token 0: for measurements. Gives milliseconds. */
  step(sequences: readonly CudaSequence[], shape: TreeShape): number {
    const { cycle, wait } = this.#queue(sequences, shape);
    const milliseconds = wait();
    for (const [i, sequence] of sequences.entries()) {
      this.#take(cycle, sequence, i);
      sequence.commit({ nodes: [0], tokens: [0] });
    }
    return milliseconds;
  }

  [Symbol.dispose](): void {
    clearImmediate(this.#soon);
    for (const cycle of this.#cycles.values()) cycle[Symbol.dispose]();
    this.#moves[Symbol.dispose]();
  }
}
