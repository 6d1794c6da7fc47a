/** What the decode loop asks of a drafter; plain decoding is the drafter that proposes only the root. */
import type { Context, Fresh } from "../../engine/context.ts";
import { rootOnly, type Tree } from "../tree.ts";

export interface Drafter {
  /** The most nodes of a tree, root included. */
  readonly maxTree: number;
  /** A sequence's drafting state, made after its prefill. */
  start(context: Context): Drafting;
}

export interface Drafting {
  /** A tree rooted at the last token of the text; `fresh` is what the text gained since the last call. */
  propose(fresh: Fresh): Tree;
}

/** Plain decoding. */
export const noDrafter: Drafter = {
  maxTree: 1,
  start: () => ({ propose: (fresh) => rootOnly(fresh.next.at(-1)!) }),
};
