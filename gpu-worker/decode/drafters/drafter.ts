/** What the decode loop asks of a drafter; plain decoding is the drafter that proposes only the root. */
import type { Fresh, Sequence } from "../target.ts";
import { rootOnly, type Tree } from "../tree.ts";

export interface Drafter<S extends Sequence = Sequence> {
  /** The most nodes of a tree, root included. */
  readonly maxTree: number;
  /** A sequence's drafting state, made after its prefill. */
  start(sequence: S): Drafting;
}

export interface Drafting {
  /** Trees come verified: what proposing one takes is counted as verification, since the two cannot be told apart. */
  readonly verifies?: true;
  /** A tree rooted at the last token of the text; `fresh` is what the text gained since the last call. */
  propose(fresh: Fresh): Tree | Promise<Tree>;
  /** Starts early on what `propose` will be asked for with the same `fresh`; logits of the tree before are gone then. */
  ahead?(fresh: Fresh): void;
}

/** Plain decoding. */
export const noDrafter: Drafter = {
  maxTree: 1,
  start: () => ({ propose: (fresh) => rootOnly(fresh.next.at(-1)!) }),
};
