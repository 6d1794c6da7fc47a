/** The big model on the GPU. */
import { BLOCK_ROWS } from "../../cuda/attention.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { KvPool } from "../../decode/pool.ts";
import type { TargetModel } from "../../decode/target.ts";
import type { Prompt } from "../target.ts";
import { Batch } from "./batch.ts";
import { Cycles } from "./cycles.ts";
import { CHUNK, type CudaModel, CYCLE_ROWS } from "./model.ts";
import { FEW, PromptPasses } from "./prompts.ts";
import { CudaSequence } from "./sequence.ts";
import { Workspace } from "./workspace.ts";

/** Tokens of the prompt that graphs are made after. */
const WARM_TOKENS = 128;
const REPEATS = 7;
/** Cycles until the shape has its graph. */
const TO_GRAPH = 3;

export class CudaTarget implements TargetModel<CudaSequence> {
  readonly model: CudaModel;
  readonly cycles: Cycles;
  readonly batch: Batch<CudaSequence>;
  pool?: KvPool;
  readonly #space: Workspace;
  readonly #prompts: PromptPasses;
  readonly #free: CudaSequence[] = [];
  #made = 0;

  constructor(model: CudaModel) {
    this.model = model;
    this.#prompts = new PromptPasses(model);
    this.#space = new Workspace(model);
    this.cycles = new Cycles(model, this.#space);
    this.batch = new Batch(this.cycles);
  }

  /** Throws an Error when as many sequences have memory as can. */
  begin(prompt: Prompt): CudaSequence {
    const sequence = this.#take();
    try {
      sequence.begin(prompt, this.#prompts);
    } catch (error) {
      sequence[Symbol.dispose]();
      throw error;
    }
    return sequence;
  }

  #take(): CudaSequence {
    const free = this.#free.pop();
    if (free) return free;
    if (this.#made === this.model.blocks.slots)
      throw new Error(`${this.#made} sequences have all memory that there is`);
    return new CudaSequence(this.model, this.#space, this.#made++, {
      left: (sequence) => this.batch.leave(sequence),
      ended: (sequence) => this.#free.push(sequence),
      released: (sequence) => this.batch.release(sequence),
    });
  }

  *passes(sequence: CudaSequence): Generator<void> {
    const { length } = sequence.prompt.expanded.tokens;
    sequence.reuse();
    for (let from = sequence.length; ; ) {
      // While others decode, passes are short enough for them to go on smoothly.
      const to = Math.min(length, from + (this.batch.decoding > 0 ? FEW : CHUNK));
      sequence.prefillChunk(this.#prompts, from, to);
      if (to === length) return;
      from = to;
      yield;
    }
  }

  /** The most sequences that there is room for at the same time while cycles are made and measured. */
  get most(): number {
    const { free, slots } = this.model.blocks;
    return Math.max(1, Math.min(slots, Math.floor((free * BLOCK_ROWS) / (WARM_TOKENS + CYCLE_ROWS + BLOCK_ROWS))));
  }

  /** Makes graphs of the cycles of each shape that is offered to one sequence, to two, and so on. */
  warm(offered: (sequences: number) => readonly TreeShape[]): void {
    using stack = new DisposableStack();
    this.started(WARM_TOKENS)[Symbol.dispose]();
    this.#prompts.warm();
    const all = Array.from({ length: this.most }, () => stack.use(this.started(WARM_TOKENS)));
    for (let count = 1; count <= all.length; count++)
      for (const shape of offered(count)) this.#steps(all.slice(0, count), shape, TO_GRAPH);
  }

  /** Milliseconds of so many cycles, after which the sequences are as they were. */
  #steps(sequences: readonly CudaSequence[], shape: TreeShape, count: number): number[] {
    const times = Array.from({ length: count }, () => this.cycles.step(sequences, shape));
    for (const sequence of sequences) {
      sequence.rewind();
      sequence.tokens.push(0);
    }
    return times;
  }

  /** A sequence of so many equal tokens, ready for a cycle. */
  started(tokens: number): CudaSequence {
    const { family, config } = this.model;
    const most = config.contextLength - 1;
    const ids = new Array<number>(Math.min(tokens, most)).fill(0);
    const sequence = this.begin({ expanded: family.expandPrompt(ids, []), imageRows: [] });
    for (const _ of this.passes(sequence));
    sequence.tokens.push(0);
    return sequence;
  }

  /**
   * Milliseconds that the device takes for a cycle of each shape, of so many sequences after prompts of so many tokens:
   * medians.
   */
  measure(shapes: readonly TreeShape[], count = 1, tokens = WARM_TOKENS): number[] {
    using stack = new DisposableStack();
    const sequences = Array.from({ length: count }, () => stack.use(this.started(tokens)));
    return shapes.map((shape) => {
      const times = this.#steps(sequences, shape, TO_GRAPH + REPEATS).slice(TO_GRAPH);
      return times.sort((a, b) => a - b)[REPEATS >> 1];
    });
  }

  [Symbol.dispose](): void {
    this.model.cuda.synchronize();
    for (const sequence of this.#free.splice(0)) sequence.free();
    for (const part of [this.batch, this.cycles, this.#space, this.#prompts]) part[Symbol.dispose]();
  }
}
