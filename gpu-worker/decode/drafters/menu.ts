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
  /** Milliseconds of a cycle as measured beforehand, and what cycles took over that. */
  readonly measured: number;
  readonly cost: Tally;
  /** Drafts accepted over what the positions' probabilities promised: more where a tree is wider. */
  readonly width: Tally;
}

/**
 * Chooses the shape that promises the most tokens a millisecond, plain decoding among them, from what was accepted so
 * far: for each position i of a draft how likely it is accepted when i − 1 were, for each shape how much more or less
 * than that it gives. Spends at most 1.5 % of the time on shapes that seem worse and may not be. Deterministic; to be
 * shared by all sequences of an engine.
 */
export class ShapeChooser {
  readonly #plain: Option;
  readonly #drafting: Option[];
  /** The i-th: drafts accepted at position i over times that one was there to be. */
  readonly #positions: Tally[];
  /** Of all cycles: milliseconds over what was measured. */
  readonly #scale = new Tally(COST_MEMORY);
  /** Milliseconds that may be lost to trials, and the most that are saved up for them. */
  #allowance = 0;
  readonly #mostAllowance: number;

  /** `milliseconds`: of one whole cycle of a shape of the menu, or of plain decoding (undefined), measured. */
  constructor(menu: readonly TreeShape[], milliseconds: (shape: TreeShape | undefined) => number) {
    const option = (shape: TreeShape | undefined): Option => {
      const measured = milliseconds(shape);
      if (!(measured > 0 && measured < Number.POSITIVE_INFINITY))
        throw new RangeError(`a cycle of ${describe(shape)} cannot take ${measured} ms`);
      const levels = shape ? shape.depth + 1 : 0;
      return { shape, levels, measured, cost: new Tally(COST_MEMORY), width: new Tally(WIDTH_MEMORY) };
    };
    this.#plain = option(undefined);
    this.#drafting = menu.map(option);
    const levels = Math.max(0, ...this.#drafting.map((o) => o.levels));
    this.#positions = Array.from({ length: levels }, () => new Tally(POSITION_MEMORY));
    this.#mostAllowance = 2 * Math.max(...this.#drafting.map((o) => o.measured), this.#plain.measured);
  }

  /** The shape for the next cycle; undefined: plain decoding. */
  choose(): TreeShape | undefined {
    if (this.#drafting.length === 0) return undefined;
    const chances = this.#chances();
    const best = this.#best(chances);
    const [hope] = highest(this.#drafting, (o) => this.#rate(o, chances, HOPE));
    if (hope === best.option) return hope.shape;
    const loss = this.#milliseconds(hope) - (1 + accepted(hope, chances)) / best.rate;
    return (loss <= this.#allowance ? hope : best.option).shape;
  }

  /**
   * What a cycle of that shape came to: drafts accepted, and how long it took. A cycle that the end of the text cut
   * short says nothing and is to be left out. RangeError for a shape that is not of the menu.
   */
  learn(shape: TreeShape | undefined, taken: number, milliseconds: number): void {
    const option = shape ? this.#drafting.find((o) => o.shape === shape) : this.#plain;
    if (!option) throw new RangeError(`${describe(shape)} is not of the menu`);
    const chances = this.#chances();
    const best = this.#best(chances);
    // What held this cycle up says nothing of the next.
    const took = Math.min(milliseconds, 3 * this.#milliseconds(option));
    if (option !== best.option) this.#allowance -= took - (1 + taken) / best.rate;
    this.#allowance = Math.min(this.#allowance + TRIALS * took, this.#mostAllowance);
    this.#learnCost(option, took / option.measured);
    if (shape) this.#learnDrafts(option, taken, chances);
  }

  #learnCost(option: Option, ratio: number): void {
    // All fade: a shape that was not used lately costs what the others do over what was measured.
    for (const { cost } of [this.#plain, ...this.#drafting]) cost.fade();
    this.#scale.fade();
    this.#scale.add(ratio, 1);
    option.cost.add(ratio, 1);
  }

  #learnDrafts(option: Option, taken: number, chances: number[]): void {
    const tried = Math.min(taken + 1, option.levels);
    // By the tree's width, so that the positions' probabilities are of no shape of its own.
    const width = option.width.toward(1, WIDTH_PRIOR);
    // All fade: positions that no tree reached lately become as likely as the one before, so that they are tried again.
    for (const position of this.#positions) position.fade();
    for (let i = 0; i < tried; i++) this.#positions[i].add(i < taken ? 1 : 0, width);
    for (const { width } of this.#drafting) width.fade();
    const promised = chances.slice(0, tried).reduce((a, b) => a + b, 0);
    option.width.add(taken, promised);
  }

  /** How likely a draft is accepted at each position when those before are. */
  #chances(): number[] {
    let before = FIRST;
    return this.#positions.map((position) => {
      before = position.toward(before, POSITION_PRIOR);
      return before;
    });
  }

  #milliseconds({ measured, cost }: Option): number {
    return measured * cost.toward(this.#scale.toward(1, COST_PRIOR), COST_PRIOR);
  }

  /** Tokens a millisecond. */
  #rate(option: Option, chances: number[], hope = 0): number {
    return (1 + accepted(option, chances, hope)) / this.#milliseconds(option);
  }

  /** What seems best; plain decoding where nothing is better. */
  #best(chances: number[]): { option: Option; rate: number } {
    const [option, rate] = highest([this.#plain, ...this.#drafting], (o) => this.#rate(o, chances));
    return { option, rate };
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

/** The first of those with the highest value, and the value. */
function highest(options: readonly Option[], value: (option: Option) => number): [Option, number] {
  const values = options.map(value);
  const most = Math.max(...values);
  return [options[values.indexOf(most)], most];
}

const describe = (shape: TreeShape | undefined) =>
  shape ? `the tree ${shape.totalToken}/${shape.depth}/${shape.topK}` : "plain decoding";
