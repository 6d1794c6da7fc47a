/** A tree of draft tokens, as plain data. Node 0 is the root, the last token that is already part of the text. */

export interface Tree {
  /** [n]: token of each node; a parent always comes before its children. */
  tokens: number[];
  /** [n]: index of each node's parent; -1 for the root. */
  parents: number[];
  /** [n]: 0 for the root. */
  depths: number[];
  /** [n]: the drafter's log-probability of each node's path from the root. */
  scores: number[];
}

/** The tree that drafts nothing: plain decoding. */
export function rootOnly(token: number): Tree {
  return { tokens: [token], parents: [-1], depths: [0], scores: [0] };
}

/** The child of `node` that holds `token`, or -1. */
export function childWith(tree: Tree, node: number, token: number): number {
  for (let i = node + 1; i < tree.tokens.length; i++)
    if (tree.parents[i] === node && tree.tokens[i] === token) return i;
  return -1;
}
