/** ViSpec's drafter: builds the tree from the draft model's candidates (EAGLE-2's dynamic tree). Knows no verification. */

import type { Context, Fresh } from "../../engine/context.ts";
import { type Candidates, DraftSequence } from "../../engine/draft.ts";
import type { Runtime } from "../../engine/runtime.ts";
import type { Model } from "../../model/model.ts";
import type { Tree } from "../tree.ts";
import type { Drafter, Drafting } from "./drafter.ts";

export interface TreeShape {
  /** Nodes of the tree, root included. */
  totalToken: number;
  /** Levels below the first. */
  depth: number;
  /** Children a node, and nodes that are expanded a level. */
  topK: number;
}

/** Every node that was seen while drafting, in order of creation; the root is not among them. */
class Candidate {
  readonly token: number;
  /** Index of the parent among the candidates, -1 under the root. */
  readonly parent: number;
  readonly depth: number;
  /** Sum of log-probabilities from the root. */
  readonly score: number;
  /** Index among the nodes that were fed to the draft, once it is one. */
  fed = -1;

  constructor(token: number, parent: number, depth: number, score: number) {
    this.token = token;
    this.parent = parent;
    this.depth = depth;
    this.score = score;
  }
}

/** Indices of the n best scores, the earlier first on ties. */
export function best(candidates: readonly Candidate[], from: number, n: number): number[] {
  const order = candidates.map((_, i) => i).slice(from);
  return order.sort((a, b) => candidates[b].score - candidates[a].score || a - b).slice(0, n);
}

export class VispecDrafting implements Drafting {
  readonly sequence: DraftSequence;
  readonly #shape: TreeShape;
  #started = false;

  constructor(sequence: DraftSequence, shape: TreeShape) {
    this.sequence = sequence;
    this.#shape = shape;
  }

  propose(fresh: Fresh): Tree {
    const first = this.#started ? this.sequence.extend(fresh) : this.sequence.prefill(fresh.next.at(-1)!);
    this.#started = true;
    const { depth, topK, totalToken } = this.#shape;
    const candidates: Candidate[] = [];
    addChildren(candidates, first, 0, topK, -1, 1, 0);
    let beams = best(candidates, 0, topK);
    let rows = beams.map(() => this.sequence.lastRow);
    const fedParents: number[] = [];
    for (let level = 0; level < depth; level++) {
      for (const i of beams) {
        const { parent } = candidates[i];
        candidates[i].fed = fedParents.length;
        fedParents.push(parent < 0 ? -1 : candidates[parent].fed);
      }
      const tokens = beams.map((i) => candidates[i].token);
      const found = this.sequence.level(tokens, rows, fedParents, level);
      const before = candidates.length;
      for (const [row, i] of beams.entries())
        addChildren(candidates, found, row, topK, i, level + 2, candidates[i].score);
      const next = best(candidates, before, topK);
      rows = next.map((i) => beams.indexOf(candidates[i].parent));
      beams = next;
    }
    return grow(fresh.next.at(-1)!, candidates, best(candidates, 0, totalToken - 1));
  }

  [Symbol.dispose](): void {
    this.sequence[Symbol.dispose]();
  }
}

function addChildren(
  to: Candidate[],
  { tokens, logProbs }: Candidates,
  row: number,
  topK: number,
  parent: number,
  depth: number,
  score: number,
): void {
  for (let i = row * topK; i < (row + 1) * topK; i++)
    to.push(new Candidate(Number(tokens[i]), parent, depth, score + logProbs[i]));
}

/** The tree of the kept candidates, in order of creation: a parent's score is never below its children's. */
function grow(root: number, candidates: readonly Candidate[], kept: number[]): Tree {
  const tree: Tree = { tokens: [root], parents: [-1], depths: [0], scores: [0] };
  const place = new Map([[-1, 0]]);
  for (const i of kept.sort((a, b) => a - b)) {
    const { token, parent, depth, score } = candidates[i];
    place.set(i, tree.tokens.length);
    tree.tokens.push(token);
    tree.parents.push(place.get(parent)!);
    tree.depths.push(depth);
    tree.scores.push(score);
  }
  return tree;
}

/** A drafter of fixed tree shape. Throws RangeError for a shape that cannot be. */
export function vispecDrafter(runtime: Runtime, model: Model, shape: TreeShape = { totalToken: 30, depth: 3, topK: 8 }): Drafter {
  return {
    maxTree: shape.totalToken,
    start(context: Context, room: number) {
      const rows = Math.max(shape.topK, shape.depth + 2);
      const scratch = shape.topK * shape.depth;
      return new VispecDrafting(new DraftSequence(runtime, model, context, room, rows, scratch, shape.topK), shape);
    },
  };
}
