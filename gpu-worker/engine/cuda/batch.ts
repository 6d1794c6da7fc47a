/** Who shares a cycle with whom, and when it begins. Knows no device: `Runner` runs cycles. */
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { Tree } from "../../decode/tree.ts";

/** What decides on the shape of each cycle, and learns what came of it. */
export interface Chooser {
  /** For so many sequences. Undefined: no drafts. */
  choose(sequences: number): TreeShape | undefined;
  /** `accepted`: drafts of each sequence that goes on; `sequences`: how many there were. */
  learn(shape: TreeShape | undefined, accepted: readonly number[], milliseconds: number, sequences: number): void;
}

/** A cycle that was queued. */
export interface Run {
  /** Waits for it, and gives milliseconds. */
  wait(): number;
  /** Gives the i-th sequence its tree, verified. */
  tree(i: number): Tree;
}

export interface Runner<S> {
  /** Queues what the last trees of these and of others left to do, and a cycle: drafts trees, verifies them. */
  start(sequences: readonly S[], shape: TreeShape | undefined, others: Iterable<S>): Run;
}

interface Asked<S> {
  sequence: S;
  chooser: Chooser;
  /** Drafts of its last cycle; undefined before there was one. */
  accepted: number | undefined;
  /** Whether the sequence has left meanwhile. */
  gone: boolean;
  resolve(tree: Tree): void;
  reject(error: unknown): void;
}

/** A cycle of the sequences that asked for it. */
interface Started<S> {
  run: Run;
  shape: TreeShape | undefined;
  asked: readonly Asked<S>[];
}

/** Sequences that are ready at the same time draft and verify their trees in one pass each. */
export class Batch<S> implements Disposable {
  readonly #runner: Runner<S>;
  /** Those that decode: from their first cycle on. */
  readonly #decoding = new Set<S>();
  /** Those of the last cycle whose logits may still be read: the next one overwrites them. */
  readonly #reading = new Set<S>();
  #asked: Asked<S>[] = [];
  #running: Started<S> | undefined;
  /** The last cycle, for its chooser to learn from. */
  #last: (Started<S> & { milliseconds: number }) | undefined;
  #soon: NodeJS.Immediate | undefined;

  constructor(runner: Runner<S>) {
    this.#runner = runner;
  }

  /** How many sequences decode. */
  get decoding(): number {
    return this.#decoding.size;
  }

  /** Takes part in the next cycle of the chooser's; gives the tree once it is verified. */
  ask(sequence: S, chooser: Chooser, accepted: number | undefined): Promise<Tree> {
    this.#decoding.add(sequence);
    this.#reading.delete(sequence);
    return new Promise((resolve, reject) => {
      this.#asked.push({ sequence, chooser, accepted, gone: false, resolve, reject });
      this.#begin();
    });
  }

  /** The sequence has read what it wants of its last tree's logits. */
  release(sequence: S): void {
    if (this.#reading.delete(sequence)) this.#begin();
  }

  /** The sequence takes no part any more, not in the cycle that runs either. */
  leave(sequence: S): void {
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
      const shape = chooser.choose(asked.length);
      const sequences = asked.map(({ sequence }) => sequence);
      this.#running = { run: this.#runner.start(sequences, shape, this.#decoding), shape, asked };
    } catch (error) {
      for (const { reject } of asked) reject(error);
      this.#begin(); // others have asked too
      return;
    }
    setImmediate(() => this.#finish());
  }

  #learn(asked: readonly Asked<S>[]): void {
    const last = this.#last;
    this.#last = undefined;
    if (last?.asked[0].chooser !== asked[0].chooser) return;
    // One that comes late tells of an earlier cycle.
    const took = new Set(last.asked.map(({ sequence }) => sequence));
    const accepted = asked.flatMap((one) => (took.has(one.sequence) ? (one.accepted ?? []) : []));
    if (accepted.length > 0) asked[0].chooser.learn(last.shape, accepted, last.milliseconds, last.asked.length);
  }

  #finish(): void {
    const { run, asked, shape } = this.#running!;
    this.#running = undefined;
    try {
      this.#last = { run, asked, shape, milliseconds: run.wait() };
      for (const [i, { sequence, gone, resolve }] of asked.entries()) {
        if (gone) continue; // nobody waits for its tree any more
        this.#reading.add(sequence);
        resolve(run.tree(i));
      }
    } catch (error) {
      for (const { reject } of asked) reject(error);
    }
    this.#begin();
  }

  [Symbol.dispose](): void {
    clearImmediate(this.#soon);
  }
}
