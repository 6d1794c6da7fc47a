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

/** Who shares a pass: how many sequences, and the nodes of the others' trees. */
export interface Load {
  sequences: number;
  others: number;
}
const ALONE: Load = { sequences: 1, others: 0 };

/** What one cycle's tree came to; milliseconds of drafting, and of all the rest (verifying, host work). */
export interface Outcome {
  accepted: number;
  draftMs: number;
  restMs: number;
}

/** What decides, while a cycle drafts, how it goes on. Scores are log-probabilities of paths from the root. */
export interface Plan {
  /** Children a node. */
  readonly topK: number;
  /** The most nodes of a tree, root included, and the most levels below the first. */
  readonly maxTree: number;
  readonly maxDepth: number;
  /** Begins a cycle whose catch-up pass had `rows` rows. */
  begin(rows: number): void;
  /** How many of the beams (scores falling) to expand into one more level, 0 to stop; `seen`: the scores of all nodes. */
  width(level: number, beams: number[], seen: number[]): number;
  /** How likely the draft held the first and second child of a node to be. */
  saw(first: number, second: number): void;
  /** How many of the best nodes to verify, the root not counted. */
  size(seen: number[]): number;
  learn(outcome: Outcome): void;
  /** Whether drafting has turned out slower than plain decoding, so that the sequence should go on without. */
  readonly loses: boolean;
}

/** The same tree in every cycle, as the paper has it. */
export function fixedPlan({ totalToken, depth, topK }: TreeShape): Plan {
  return {
    topK,
    maxTree: totalToken,
    maxDepth: depth,
    loses: false,
    begin() {},
    width: (level, beams) => (level < depth ? Math.min(topK, beams.length) : 0),
    saw() {},
    size: () => totalToken - 1,
    learn() {},
  };
}

const MAX_DEPTH = 8;
const TOP_K = 6;
const WIDTHS = [1, 2, 4];
/** Log-probability of paths that are not looked at: 2 %. */
const UNLIKELY = Math.log(0.02);
/** Sizes of trees that are verified, root included: few, since a shape's first pass is slower. */
const SIZES = [1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32];
/** Cycles of a sequence after which the balance is looked at, and again each time. */
const TRIAL = 24;

/**
 * The tree that promises most, decided anew in every cycle: the draft's own probabilities say how many tokens it would
 * give, measured costs how long it would take. Nodes and levels are added while the tokens that they promise are worth
 * more than what decoding yields in the same time. Nothing of it can change the text, only how fast it comes.
 */
export class AdaptivePlan implements Plan {
  readonly topK = TOP_K;
  readonly maxTree = SIZES.at(-1)!;
  readonly maxDepth = MAX_DEPTH;
  loses = false;
  readonly #costs: Costs;
  readonly #experience: Experience;
  /** Of this cycle so far, by the table: draft and verify milliseconds; and the tokens that its tree promises. */
  #draft = 0;
  #verify = 0;
  #promised = 0;
  #cycles = 0;
  readonly #loadNow: () => Load;
  #load = ALONE;

  /** `load` says who else decodes: all wait for what a draft or a node costs, so with more of them trees are smaller. */
  constructor(costs: Costs, experience: Experience, load: () => Load = () => ALONE) {
    this.#costs = costs;
    this.#experience = experience;
    this.#loadNow = load;
    experience.rate ||= 1 / costs.verify(1);
  }

  /** Tokens that all sequences together yield in a millisecond. */
  get #rate(): number {
    return this.#experience.rate * this.#load.sequences;
  }

  begin(rows: number): void {
    this.#load = this.#loadNow();
    this.#draft = this.#costs.draft(rows);
  }

  width(level: number, beams: number[], seen: number[]): number {
    if (level >= MAX_DEPTH) return 0;
    const experience = this.#experience;
    const now = this.#probabilities(seen);
    let [width, most] = [0, this.#best(now).value];
    for (const w of WIDTHS) {
      if (w > beams.length || (w > 1 && beams[w - 1] < UNLIKELY)) break;
      const children = this.#probabilities(beams.slice(0, w)).flatMap((p) => [
        p * experience.first,
        p * experience.second,
      ]);
      const price = this.#costs.draft(w) * experience.draftScale * this.#rate;
      const value = this.#best([...now, ...children]).value - price;
      if (value > most) [width, most] = [w, value];
    }
    if (width > 0) this.#draft += this.#costs.draft(width);
    return width;
  }

  saw(first: number, second: number): void {
    this.#experience.saw(first, second);
  }

  /** Those of the likely paths only: the others are never worth a node. */
  #probabilities(scores: number[]): number[] {
    const likely: number[] = [];
    for (const score of scores) {
      const p = score < UNLIKELY ? 0 : this.#experience.probability(score);
      if (p > 0) likely.push(p);
    }
    return likely;
  }

  /** The number of nodes, best first, whose tokens exceed most what decoding yields in the time of their verification. */
  #best(probabilities: number[]): { nodes: number; tokens: number; value: number } {
    const price = this.#rate * this.#experience.verifyScale;
    probabilities.sort((a, b) => b - a);
    let best = { nodes: 0, tokens: 0, value: Number.NEGATIVE_INFINITY };
    let tokens = 0;
    let n = 0;
    for (const size of SIZES) {
      if (size - 1 > probabilities.length) break;
      while (n < size - 1) tokens += probabilities[n++];
      const value = tokens - price * this.#costs.verify(size + this.#load.others);
      if (value > best.value) best = { nodes: n, tokens, value };
    }
    return best;
  }

  size(seen: number[]): number {
    const { nodes, tokens } = this.#best(this.#probabilities(seen));
    this.#promised = tokens;
    this.#verify = this.#costs.verify(nodes + 1);
    return nodes;
  }

  learn({ accepted, draftMs, restMs }: Outcome): void {
    const experience = this.#experience;
    const { draftScale, verifyScale } = experience;
    const { sequences } = this.#load;
    // Among others the rest is their drafting too, which says nothing of what a pass costs.
    const ratios = sequences > 1 ? [draftScale, verifyScale] : [draftMs / this.#draft, restMs / this.#verify];
    experience.learn(accepted, this.#promised, ratios[0], ratios[1], draftMs + restMs);
    if (++this.#cycles % TRIAL !== 0 || !experience.seasoned) return;
    this.loses = experience.rate * experience.verifyScale * this.#costs.verify(sequences) < 1;
  }
}

/** Cycles that a running mean looks back on. */
const MEMORY = 100;
/** The draft is believed at least this much, so that a run of bad luck can be made up for. */
const LEAST_TRUST = 0.25;

/** Running means that outlive a sequence. */
export class Experience {
  /** Tokens a millisecond. */
  rate = 0;
  /** What passes cost now over what the table says. */
  draftScale = 1;
  verifyScale = 1;
  /** Mean probability of a node's likeliest child, and of the second. */
  first = 0.8;
  second = 0.1;
  /** Means a cycle; it starts as if ten cycles had gone as promised. */
  #accepted = 1;
  #promised = 1;
  #time = 0;
  #cycles = 10;

  /** Whether enough was seen to give drafting up: not in a process that has just started. */
  get seasoned(): boolean {
    return this.#cycles > MEMORY;
  }

  /** How likely a path of that score is accepted: the draft's own probability, by as much as it was right so far. */
  probability(score: number): number {
    return Math.min(1, Math.exp(score) * Math.max(LEAST_TRUST, this.#accepted / this.#promised));
  }

  /** `draftRatio`, `restRatio`: milliseconds over what the table says. */
  learn(accepted: number, promised: number, draftRatio: number, restRatio: number, milliseconds: number): void {
    const weight = 1 / Math.min(++this.#cycles, MEMORY);
    // A cycle that something else held up says nothing of what passes cost.
    const toward = (mean: number, value: number) => mean + weight * (Math.min(value, 3 * mean) - mean);
    this.#accepted += weight * (accepted - this.#accepted);
    this.#promised += weight * (promised - this.#promised);
    this.#time = toward(this.#time || milliseconds, milliseconds);
    this.draftScale = toward(this.draftScale, draftRatio);
    this.verifyScale = toward(this.verifyScale, restRatio);
    this.rate = (this.#accepted + 1) / this.#time;
  }

  saw(first: number, second: number): void {
    this.first += 0.01 * (first - this.first);
    this.second += 0.01 * (second - this.second);
  }
}
