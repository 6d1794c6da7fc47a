/** Which drafts the target accepts. Pure: knows logits and a sampler, no model. */
import type { Sampler } from "./sample.ts";
import type { Scores } from "./target.ts";
import { childWith, type Tree } from "./tree.ts";

export interface Path {
  /** Nodes of the tree that are now part of the text, root first. */
  nodes: number[];
  /** The tokens after the root: accepted drafts, then one of the target's own. */
  tokens: number[];
}

/**
 * Walks from the root: at each node the target draws its next token, and while a child holds that token the walk goes on
 * there. At T = 0 this is the longest match with the target's argmax. At T > 0 a child x is accepted with probability
 * p(x), which is what trying the children one by one with rejection gives (drafts are a function of the past, so their
 * proposal is a point mass), and the text depends on the seed alone, not on the tree.
 * Stops after a token for which `last` holds, so that nothing is accepted beyond the end.
 */
export async function verify(
  tree: Tree,
  scores: Scores,
  sampler: Sampler,
  last: (token: number, index: number) => boolean,
): Promise<Path> {
  const path: Path = { nodes: [0], tokens: [] };
  for (let node = 0; ; ) {
    const token = sampler.greedy && scores.best ? scores.best(node) : await sampler.next(scores.row(node));
    path.tokens.push(token);
    if (last(token, path.tokens.length - 1)) return path;
    node = childWith(tree, node, token);
    if (node < 0) return path;
    path.nodes.push(node);
  }
}
