/** What the decode loop asks of a target model, wherever it runs. */
import type { Prompt } from "../engine/target.ts";
import type { KvPool } from "./pool.ts";
import type { Tree } from "./tree.ts";
import type { Path } from "./verify.ts";

/** The target's logits after each node of a tree. */
export interface Scores {
  /** [V]; valid until the next call. */
  row(node: number): Float32Array;
  /** The likeliest token, the lowest of several: where the device has found it. */
  best?(node: number): number;
}

/** What the text gained, for a drafter to read: rows of the target's hidden states, and the token that follows each. */
export interface Fresh {
  rows: number[];
  next: number[];
}

/** One prompt and its answer so far. Disposing of it gives its memory back. */
export interface Sequence extends Disposable {
  /** Tokens whose keys and values are kept. */
  readonly length: number;
  /** The prompt's tokens that were not run, for an earlier sequence's rows are theirs. */
  readonly cached?: number;
  /** Logits [V] after the prompt's last token, valid until the first tree is scored. */
  readonly firstLogits: Float32Array;
  /** One pass over every node of the tree; valid until the next. */
  scores(tree: Tree): Scores | Promise<Scores>;
  /** Keeps the path's nodes. */
  commit(path: Path): Fresh;
  /** Says that the last tree's logits are not wanted any more: others may be waiting for their memory. */
  release?(): void;
  /** Goes back to the prompt, for another choice. */
  rewind(): void;
}

export interface TargetModel<S extends Sequence = Sequence> extends Disposable {
  /** Bounds the rows that all sequences together may have. */
  readonly pool?: KvPool;
  /** `room` is the most tokens that will be added to the prompt, `maxTree` the largest tree that will be scored. */
  begin(prompt: Prompt, room: number, maxTree: number): S;
  /** Runs the prompt; yields between two passes. */
  passes(sequence: S): Generator<void>;
}
