/** Drafting on the GPU: a cycle's tree is drafted and verified in one go, so proposing one gives its scores too. */
import type { Drafter, Drafting } from "../../decode/drafters/drafter.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { Fresh } from "../../decode/target.ts";
import type { Tree } from "../../decode/tree.ts";
import { PLAIN } from "./cycle.ts";
import { MAX_TREE } from "./model.ts";
import type { CudaSequence } from "./sequence.ts";

/** What decides on the shape of each cycle, and learns what came of it. */
export interface Chooser {
  /** Undefined: no drafts. */
  choose(): TreeShape | undefined;
  learn(shape: TreeShape | undefined, accepted: number, milliseconds: number): void;
}

/** Always the same shape; without one, plain decoding. */
export const always = (shape?: TreeShape): Chooser => ({ choose: () => shape, learn() {} });

class CudaDrafting implements Drafting {
  readonly verifies = true;
  readonly #sequence: CudaSequence;
  readonly #chooser: Chooser;
  #shape: TreeShape | undefined;
  #begun = 0;
  #first = true;

  constructor(sequence: CudaSequence, chooser: Chooser) {
    this.#sequence = sequence;
    this.#chooser = chooser;
  }

  ahead(fresh: Fresh): void {
    const now = performance.now();
    if (!this.#first) this.#chooser.learn(this.#shape, fresh.next.length - 1, now - this.#begun);
    this.#begun = now;
    this.#shape = this.#chooser.choose();
    this.#sequence.start(this.#shape ?? PLAIN);
  }

  propose(fresh: Fresh): Tree {
    if (this.#first) this.#sequence.tokens.push(...fresh.next);
    if (!this.#sequence.running) this.ahead(fresh);
    this.#first = false;
    return this.#sequence.finish();
  }
}

export function cudaDrafter(chooser: Chooser): Drafter<CudaSequence> {
  return { maxTree: MAX_TREE, start: (sequence) => new CudaDrafting(sequence, chooser) };
}
