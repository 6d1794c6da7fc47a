/** How large a tree to draft. Knows scores and measured costs, no model. */

/** Tree of the paper: every level expands top_k nodes, the best total_token − 1 of all are verified. */
export interface TreeShape {
  /** Nodes of the tree, root included. */
  totalToken: number;
  /** Levels below the first. */
  depth: number;
  /** Children a node, and nodes that are expanded a level. */
  topK: number;
}

/** Milliseconds of passes, host work included. */
export interface Costs {
  /** Of a draft pass over n rows. */
  draft(rows: number): number;
  /** Of a verify pass over n nodes. */
  verify(nodes: number): number;
}

/** What decides, while a cycle drafts, how it goes on. `scores` are log-probabilities of paths from the root. */
export interface Plan {
  readonly topK: number;
  /** The most nodes of a tree, root included, and the most levels below the first. */
  readonly maxTree: number;
  readonly maxDepth: number;
  /**
   * How many of the beams (scores falling) to expand into one more level; 0 to stop. `level` counts from 0; `seen` are the
   * scores of all nodes so far, in any order.
   */
  width(level: number, beams: number[], seen: number[]): number;
  /** How many of the best nodes to verify, the root not counted. */
  size(seen: number[]): number;
  /** What became of a cycle's tree. */
  learn(accepted: number): void;
  /** Whether drafting has turned out slower than plain decoding, so that the sequence should go on without. */
  readonly loses: boolean;
}

export function fixedPlan({ totalToken, depth, topK }: TreeShape): Plan {
  return {
    ...{ topK, maxTree: totalToken, maxDepth: depth, loses: false },
    width: (level, beams) => (level < depth ? Math.min(topK, beams.length) : 0),
    size: () => totalToken - 1,
    learn() {},
  };
}

const MAX_DEPTH = 8;
const TOP_K = 6;
const WIDTHS = [1, 2, 4];
/** Sizes of trees that are verified, root included: few, since a shape's first pass is slower. */
const SIZES = [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32];
/** Cycles after which the balance is looked at, and again each time. */
const TRIAL = 12;

/**
 * The tree that promises the most tokens a millisecond, decided anew in every cycle: the draft's own probabilities say
 * how many tokens a tree would give, the measured costs how long it would take. Another level is drafted while that
 * raises the rate. Nothing of it can change the text, only how fast it comes.
 */
export class AdaptivePlan implements Plan {
  readonly topK = TOP_K;
  readonly maxTree = SIZES.at(-1)!;
  readonly maxDepth = MAX_DEPTH;
  readonly #costs: Costs;
  /** Draft milliseconds of this cycle. */
  #spent = 0;
  /** Expected tokens of the tree that `size` chose. */
  #promised = 0;
  #cycle = 0;
  /** Sums over the trial's cycles. */
  #tokens = 0;
  #milliseconds = 0;
  #cycles = 0;
  loses = false;
  /** How the accepted drafts compare with what the draft's probabilities promised; and how likely its first child is. */
  readonly #trust: Trust;

  constructor(costs: Costs, trust: Trust) {
    this.#costs = costs;
    this.#trust = trust;
  }

  width(level: number, beams: number[], seen: number[]): number {
    if (level === 0) this.#spent = this.#costs.draft(2); // the catch-up: as many rows as were accepted
    if (level >= MAX_DEPTH) return 0;
    const now = seen.map((s) => this.#trust.probability(s));
    let [width, best] = [0, this.#best(now, 0).rate];
    for (const w of WIDTHS) {
      if (w > beams.length) break;
      const more = beams.slice(0, w).flatMap((s) => {
        const p = this.#trust.probability(s);
        return [p * this.#trust.first, p * (1 - this.#trust.first) * 0.5];
      });
      const { rate } = this.#best([...now, ...more], this.#costs.draft(w));
      if (rate > best) [width, best] = [w, rate];
    }
    if (width > 0) this.#spent += this.#costs.draft(width);
    return width;
  }

  /** The number of nodes, best first, that gives the most tokens a millisecond. */
  #best(probabilities: number[], extra: number): { nodes: number; tokens: number; rate: number } {
    const sorted = probabilities.toSorted((a, b) => b - a);
    let best = { nodes: 0, tokens: 1, rate: 0 };
    let tokens = 1;
    let n = 0;
    for (const size of SIZES) {
      if (size - 1 > sorted.length) break;
      while (n < size - 1) tokens += sorted[n++];
      const rate = tokens / (this.#spent + extra + this.#costs.verify(size));
      if (rate > best.rate) best = { nodes: n, tokens, rate };
    }
    return best;
  }

  size(seen: number[]): number {
    const { nodes, tokens } = this.#best(
      seen.map((s) => this.#trust.probability(s)),
      0,
    );
    this.#promised = tokens - 1;
    this.#cycle = this.#spent + this.#costs.verify(nodes + 1);
    return nodes;
  }

  learn(accepted: number): void {
    this.#trust.learn(accepted, this.#promised);
    this.#tokens += accepted + 1;
    this.#milliseconds += this.#cycle;
    if (++this.#cycles % TRIAL !== 0) return;
    this.loses = this.#tokens / this.#milliseconds < 1 / this.#costs.verify(1);
    this.#tokens = this.#milliseconds = 0;
  }
}

/** Running estimates that outlive a sequence: how far the draft's probabilities can be believed. */
export class Trust {
  #accepted = 20;
  #promised = 20;
  /** Mean probability of a node's first child. */
  first = 0.8;

  probability(score: number): number {
    return Math.min(1, Math.exp(score) * (this.#accepted / this.#promised));
  }

  learn(accepted: number, promised: number): void {
    const fade = 0.99;
    this.#accepted = this.#accepted * fade + accepted;
    this.#promised = this.#promised * fade + promised;
  }

  learnFirst(probability: number): void {
    this.first += 0.02 * (probability - this.first);
  }
}
