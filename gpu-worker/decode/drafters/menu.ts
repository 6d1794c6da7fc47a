/** Which of a few trees to draft where a cycle's shape is fixed before it begins. Knows tallies and costs, no device. */
import type { TreeShape } from "./plan.ts";

/**
 * Trees for a GPU, where verifying 32 nodes costs about what one does and drafting takes depth + 1 passes: chosen by
 * depth above all, with more nodes where more levels want them. 30/3/8 is the paper's.
 */
export const MENU: readonly TreeShape[] = [
  { totalToken: 16, depth: 1, topK: 8 },
  { totalToken: 32, depth: 2, topK: 8 },
  { totalToken: 30, depth: 3, topK: 8 },
  { totalToken: 32, depth: 4, topK: 8 },
  { totalToken: 60, depth: 4, topK: 8 },
  { totalToken: 48, depth: 5, topK: 8 },
  { totalToken: 60, depth: 6, topK: 8 },
];

/**
 * Small trees, offered beside some of those where several sequences share a pass: it has the nodes of all their trees as
 * rows, which cost time beyond some tens of them, so that each node has to earn it. A chain, and trees of few children.
 */
export const CROWD: readonly TreeShape[] = [
  { totalToken: 4, depth: 2, topK: 1 },
  { totalToken: 8, depth: 3, topK: 2 },
  { totalToken: 16, depth: 3, topK: 4 },
];

/** Drafting cycles that a position's probability looks back on: texts change. */
const POSITION_MEMORY = 100;
/** And that a shape's width looks back on: long, since it hangs on the text little. */
const WIDTH_MEMORY = 500;
/** Cycles that a cost looks back on. */
const COST_MEMORY = 200;
/** What is believed before anything was seen, and the evidence (drafts, drafts, cycles) that outweighs such beliefs. */
const FIRST = 0.6;
const POSITION_PRIOR = 3;
const WIDTH_PRIOR = 50;
const COST_PRIOR = 2;
/** How much likelier each draft of a shape may be accepted than it seems before any was seen; falls with their number. */
const HOPE = 0.2;
/** Part of the time that may be lost to trying shapes that seem worse. */
const TRIALS = 0.015;

/** A quotient of two sums, of which the older parts fade. */
class Tally {
  #got = 0;
  weight = 0;
  readonly #kept: number;

  constructor(memory: number) {
    this.#kept = 1 - 1 / memory;
  }

  add(got: number, weight: number): void {
    this.#got += got;
    this.weight += weight;
  }

  fade(): void {
    this.#got *= this.#kept;
    this.weight *= this.#kept;
  }

  /** The quotient, as if `strength` of weight had given `prior` besides. */
  toward(prior: number, strength: number): number {
    return (this.#got + strength * prior) / (this.weight + strength);
  }
}

/** A tree, or plain decoding. */
interface Option {
  readonly shape: TreeShape | undefined;
  /** The most drafts that can be accepted. */
  readonly levels: number;
  /** What cycles took over what was measured for as many sequences. */
  readonly cost: Tally;
  /** Drafts accepted over what the positions' probabilities promised: more where a tree is wider. */
  readonly width: Tally;
}

/** An option for a cycle of so many sequences: milliseconds as measured beforehand, and as they are believed to be. */
interface Offer {
  readonly option: Option;
  readonly measured: number;
  readonly milliseconds: number;
}

/** Milliseconds of one whole cycle of that many sequences; undefined: the shape is not offered for so many. */
type Milliseconds = (shape: TreeShape | undefined, sequences: number) => number | undefined;

/**
 * Chooses the shape that promises the most tokens a millisecond, plain decoding among them, from what was accepted so
 * far: for each position i of a draft how likely it is accepted when i − 1 were, for each shape how much more or less
 * than that it gives. Sequences that share a cycle have the same shape. Spends at most 1.5 % of the time on shapes that
 * seem worse and may not be. Deterministic; to be shared by all sequences of an engine.
 */
export class ShapeChooser {
  readonly #plain: Option;
  readonly #drafting: Option[];
  readonly #measured: Milliseconds;
  /** The i-th: drafts accepted at position i over times that one was there to be. */
  readonly #positions: Tally[];
  /** Of all cycles: milliseconds over what was measured. */
  readonly #scale = new Tally(COST_MEMORY);
  /** Milliseconds, times the sequences that wait so long, that may be lost to trials. */
  #allowance = 0;

  /**
   * `milliseconds`: measured, of a shape of the menu or of plain decoding (undefined), which is always offered; of one
   * sequence all are.
   */
  constructor(menu: readonly TreeShape[], milliseconds: Milliseconds) {
    const option = (shape: TreeShape | undefined): Option => {
      const levels = shape ? shape.depth + 1 : 0;
      return { shape, levels, cost: new Tally(COST_MEMORY), width: new Tally(WIDTH_MEMORY) };
    };
    this.#measured = milliseconds;
    this.#plain = option(undefined);
    this.#drafting = menu.map(option);
    for (const { shape } of [this.#plain, ...this.#drafting]) check(shape, milliseconds(shape, 1));
    const levels = Math.max(0, ...this.#drafting.map((o) => o.levels));
    this.#positions = Array.from({ length: levels }, () => new Tally(POSITION_MEMORY));
  }

  /** The shape for the next cycle, of so many sequences; undefined: plain decoding. */
  choose(sequences = 1): TreeShape | undefined {
    const offers = this.#offers(sequences);
    if (offers.length === 1) return undefined;
    const chances = this.#chances();
    const best = highest(offers, chances);
    const hope = highest(offers.slice(1), chances, HOPE);
    if (hope.option === best.option) return hope.option.shape;
    const loss = sequences * (hope.milliseconds - (1 + accepted(hope.option, chances)) / best.rate);
    return (loss <= this.#allowance ? hope : best).option.shape;
  }

  /**
   * What a cycle of that shape and so many sequences came to: drafts accepted by each, and how long it took. A sequence
   * that the end of its text cut short says nothing and is to be left out of `taken`. RangeError for a shape that is not
   * offered.
   */
  learn(shape: TreeShape | undefined, taken: readonly number[], milliseconds: number, sequences = taken.length): void {
    const offers = this.#offers(sequences);
    const offer = offers.find(({ option }) => option.shape === shape);
    if (!offer) throw new RangeError(`${describe(shape)} is not of the menu for ${sequences} at once`);
    const { option, measured } = offer;
    const chances = this.#chances();
    const best = highest(offers, chances);
    // What held this cycle up says nothing of the next.
    const took = Math.min(milliseconds, 3 * offer.milliseconds);
    const mean = taken.length > 0 ? taken.reduce((a, b) => a + b, 0) / taken.length : accepted(option, chances);
    if (option !== best.option) this.#allowance -= sequences * (took - (1 + mean) / best.rate);
    // Saved up for two trials of so many sequences at most.
    const most = 2 * sequences * Math.max(...offers.map((o) => o.measured));
    this.#allowance = Math.min(this.#allowance + TRIALS * sequences * took, most);
    this.#learnCost(option, took / measured);
    if (shape && taken.length > 0) this.#learnDrafts(option, taken, chances);
  }

  /** What a cycle of so many sequences can be, plain decoding first. */
  #offers(sequences: number): Offer[] {
    const scale = this.#scale.toward(1, COST_PRIOR);
    return [this.#plain, ...this.#drafting].flatMap((option) => {
      const measured = this.#measured(option.shape, sequences);
      if (measured === undefined && option.shape) return [];
      check(option.shape, measured);
      return [{ option, measured, milliseconds: measured * option.cost.toward(scale, COST_PRIOR) }];
    });
  }

  #learnCost(option: Option, ratio: number): void {
    // All fade: a shape that was not used lately costs what the others do over what was measured.
    for (const { cost } of [this.#plain, ...this.#drafting]) cost.fade();
    this.#scale.fade();
    this.#scale.add(ratio, 1);
    option.cost.add(ratio, 1);
  }

  #learnDrafts(option: Option, taken: readonly number[], chances: number[]): void {
    // By the tree's width, so that the positions' probabilities are of no shape of its own.
    const width = option.width.toward(1, WIDTH_PRIOR);
    // All fade: positions that no tree reached lately become as likely as the one before, so that they are tried again.
    for (const position of this.#positions) position.fade();
    for (const { width } of this.#drafting) width.fade();
    for (const drafts of taken) {
      const tried = Math.min(drafts + 1, option.levels);
      for (let i = 0; i < tried; i++) this.#positions[i].add(i < drafts ? 1 : 0, width);
      const promised = chances.slice(0, tried).reduce((a, b) => a + b, 0);
      option.width.add(drafts, promised);
    }
  }

  /** How likely a draft is accepted at each position when those before are. */
  #chances(): number[] {
    let before = FIRST;
    return this.#positions.map((position) => {
      before = position.toward(before, POSITION_PRIOR);
      return before;
    });
  }
}

/** Drafts that a cycle is expected to accept; with `hope`, as many as may be if little was seen of the shape. */
function accepted({ levels, width }: Option, chances: number[], hope = 0): number {
  const factor = width.toward(1, WIDTH_PRIOR) * (1 + hope / Math.sqrt(1 + width.weight / WIDTH_PRIOR));
  let [sum, path] = [0, 1];
  for (const chance of chances.slice(0, levels)) {
    path *= Math.min(1, chance * factor);
    sum += path;
  }
  return sum;
}

/** The first of those with the most tokens of a sequence a millisecond, and how many. */
function highest(offers: readonly Offer[], chances: number[], hope = 0): Offer & { rate: number } {
  const rates = offers.map(({ option, milliseconds }) => (1 + accepted(option, chances, hope)) / milliseconds);
  const rate = Math.max(...rates);
  return { ...offers[rates.indexOf(rate)], rate };
}

function check(shape: TreeShape | undefined, milliseconds: number | undefined): asserts milliseconds is number {
  if (!(milliseconds! > 0 && milliseconds! < Number.POSITIVE_INFINITY))
    throw new RangeError(`a cycle of ${describe(shape)} cannot take ${milliseconds} ms`);
}

const describe = (shape: TreeShape | undefined) =>
  shape ? `the tree ${shape.totalToken}/${shape.depth}/${shape.topK}` : "plain decoding";
