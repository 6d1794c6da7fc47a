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

/**
 * Writes the attention mask of nodes `first` … n-1 into rows 0, 1, … of `bias`, columns `from` … from+n-1: 0 where the
 * row's node sees the column's (itself and its ancestors), -Infinity elsewhere. `stride` is the length of a row.
 */
export function writeTreeMask(
  bias: Float32Array,
  stride: number,
  from: number,
  parents: readonly number[],
  first = 0,
): void {
  for (let i = first; i < parents.length; i++) {
    const row = (i - first) * stride + from;
    bias.fill(Number.NEGATIVE_INFINITY, row, row + parents.length);
    for (let j = i; j >= 0; j = parents[j]) bias[row + j] = 0;
  }
}

/** The child of `node` that holds `token`, or -1. */
export function childWith(tree: Tree, node: number, token: number): number {
  for (let i = node + 1; i < tree.tokens.length; i++)
    if (tree.parents[i] === node && tree.tokens[i] === token) return i;
  return -1;
}
