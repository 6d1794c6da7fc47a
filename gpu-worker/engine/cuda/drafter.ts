/** Drafting on the GPU: a cycle's tree is drafted and verified in one go, so proposing one gives its scores too. */
import type { Drafter, Drafting } from "../../decode/drafters/drafter.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { Fresh } from "../../decode/target.ts";
import type { Tree } from "../../decode/tree.ts";
import type { Batch, Chooser } from "./batch.ts";
import { CYCLE_ROWS } from "./model.ts";
import type { CudaSequence } from "./sequence.ts";

/** Always the same shape; without one, plain decoding. */
export const always = (shape?: TreeShape): Chooser => ({ choose: () => shape, learn() {} });

class CudaDrafting implements Drafting {
  readonly verifies = true;
  readonly #sequence: CudaSequence;
  readonly #batch: Batch<CudaSequence>;
  readonly #chooser: Chooser;
  #next: Promise<Tree> | undefined;
  #first = true;

  constructor(sequence: CudaSequence, batch: Batch<CudaSequence>, chooser: Chooser) {
    this.#sequence = sequence;
    this.#batch = batch;
    this.#chooser = chooser;
  }

  ahead(fresh: Fresh): void {
    const accepted = this.#first ? undefined : fresh.next.length - 1;
    this.#next = this.#batch.ask(this.#sequence, this.#chooser, accepted);
    this.#next.catch(() => {}); // whoever proposes gets to know
  }

  propose(fresh: Fresh): Promise<Tree> {
    if (this.#first) this.#sequence.tokens.push(...fresh.next);
    if (!this.#next) this.ahead(fresh);
    this.#first = false;
    const tree = this.#next!;
    this.#next = undefined;
    return tree;
  }
}

/** Sequences whose drafter has the same chooser share passes. */
export function cudaDrafter(batch: Batch<CudaSequence>, chooser: Chooser): Drafter<CudaSequence> {
  return { maxTree: CYCLE_ROWS, start: (sequence) => new CudaDrafting(sequence, batch, chooser) };
}
