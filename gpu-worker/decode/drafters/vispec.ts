/** ViSpec's drafter: builds the tree from the draft model's candidates (EAGLE-2's dynamic tree). Knows no verification. */
import type { Context } from "../../engine/context.ts";
import { type Candidates, DraftSequence } from "../../engine/draft.ts";
import type { Runtime } from "../../engine/runtime.ts";
import type { Model } from "../../model/model.ts";
import type { Fresh } from "../target.ts";
import { rootOnly, type Tree } from "../tree.ts";
import type { Drafter, Drafting } from "./drafter.ts";
import type { Plan } from "./plan.ts";

/** Every node that was seen while drafting, in order of creation; the root is not among them. */
interface Seen {
  tokens: number[];
  /** Index of each node's parent among them, -1 under the root. */
  parents: number[];
  depths: number[];
  /** Sum of log-probabilities from the root. */
  scores: number[];
  /** Index among the nodes that were fed to the draft; -1 for the others. */
  fed: number[];
}

/** Indices of the n best scores from `from` on, the earlier first on ties. */
function best(scores: readonly number[], from: number, n: number): number[] {
  const order: number[] = [];
  for (let i = from; i < scores.length; i++) order.push(i);
  return order.sort((a, b) => scores[b] - scores[a] || a - b).slice(0, n);
}

export class VispecDrafting implements Drafting {
  readonly sequence: DraftSequence;
  readonly #plan: Plan;
  #started = false;
  #resting = false;
  /** When the last tree was proposed, and how long that took. */
  #proposed = 0;
  #draftMs = 0;

  constructor(sequence: DraftSequence, plan: Plan) {
    this.sequence = sequence;
    this.#plan = plan;
  }

  propose(fresh: Fresh): Tree {
    const root = fresh.next.at(-1)!;
    const begun = performance.now();
    if (this.#started && !this.#resting)
      this.#plan.learn({ accepted: fresh.next.length - 1, draftMs: this.#draftMs, restMs: begun - this.#proposed });
    // Once plain decoding is faster the draft's cache is let fall behind: it rests for the rest of the sequence.
    if ((this.#resting ||= this.#plan.loses)) return rootOnly(root);
    this.#plan.begin(fresh.next.length);
    const first = this.#started ? this.sequence.extend(fresh) : this.sequence.prefill(root);
    this.#started = true;
    const seen: Seen = { tokens: [], parents: [], depths: [], scores: [], fed: [] };
    this.#addChildren(seen, first, 0, -1);
    this.#drawLevels(seen);
    const tree = grow(root, seen, best(seen.scores, 0, this.#plan.size(seen.scores)));
    this.#proposed = performance.now();
    this.#draftMs = this.#proposed - begun;
    return tree;
  }

  #drawLevels(seen: Seen): void {
    const { topK } = this.#plan;
    const fedParents: number[] = [];
    let before = 0;
    let fed: number[] = [];
    for (let level = 0; ; level++) {
      let beams = best(seen.scores, before, topK);
      const scores = beams.map((i) => seen.scores[i]);
      const width = this.#plan.width(level, scores, seen.scores);
      if (width === 0) return;
      beams = beams.slice(0, width);
      const rows = beams.map((i) => (level === 0 ? this.sequence.lastRow : fed.indexOf(seen.parents[i])));
      for (const i of beams) {
        seen.fed[i] = fedParents.length;
        fedParents.push(seen.parents[i] < 0 ? -1 : seen.fed[seen.parents[i]]);
      }
      const tokens = beams.map((i) => seen.tokens[i]);
      const found = this.sequence.level(tokens, rows, fedParents, level);
      before = seen.tokens.length;
      for (const [row, i] of beams.entries()) this.#addChildren(seen, found, row, i);
      if (topK > 1) this.#plan.saw(Math.exp(found.logProbs[0]), Math.exp(found.logProbs[1]));
      fed = beams;
    }
  }

  #addChildren(seen: Seen, { tokens, logProbs }: Candidates, row: number, parent: number): void {
    const { topK } = this.#plan;
    const [depth, score] = parent < 0 ? [1, 0] : [seen.depths[parent] + 1, seen.scores[parent]];
    for (let i = row * topK; i < (row + 1) * topK; i++) {
      seen.tokens.push(Number(tokens[i]));
      seen.parents.push(parent);
      seen.depths.push(depth);
      seen.scores.push(score + logProbs[i]);
      seen.fed.push(-1);
    }
  }
}

/** The tree of the kept nodes, in order of creation: a parent's score is never below its children's. */
function grow(root: number, seen: Seen, kept: number[]): Tree {
  const tree = rootOnly(root);
  const place = new Map([[-1, 0]]);
  for (const i of kept.sort((a, b) => a - b)) {
    place.set(i, tree.tokens.length);
    tree.tokens.push(seen.tokens[i]);
    tree.parents.push(place.get(seen.parents[i])!);
    tree.depths.push(seen.depths[i]);
    tree.scores.push(seen.scores[i]);
  }
  return tree;
}

/** `plan` is asked for a plan at the start of every sequence; all have the same bounds. */
export function vispecDrafter(runtime: Runtime, model: Model, plan: (context?: Context) => Plan): Drafter<Context> {
  const { maxTree, maxDepth, topK } = plan();
  const rows = Math.max(topK, maxDepth + 2);
  const drafter: Drafter<Context> = {
    maxTree,
    start(context: Context) {
      const make = () => new DraftSequence(runtime, model, context, rows, topK * maxDepth, topK);
      return new VispecDrafting(context.companion(drafter, make), plan(context));
    },
  };
  return drafter;
}
