/** The big model on the GPU. */
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { TargetModel } from "../../decode/target.ts";
import { frequencies, ropeTable } from "../../model/rope.ts";
import { fillAngles, type Prompt } from "../target.ts";
import { CHUNK, type CudaModel, MAX_TREE } from "./model.ts";
import { CudaSequence } from "./sequence.ts";

/** Tokens of the prompt that graphs are made after. */
const WARM_TOKENS = 128;
const REPEATS = 7;

export class CudaTarget implements TargetModel<CudaSequence> {
  readonly model: CudaModel;
  readonly #rope: { cos: Float32Array; sin: Float32Array };
  readonly #free: CudaSequence[] = [];
  /** Whose cycles are made graphs at once. */
  #shapes: readonly TreeShape[] = [];

  constructor(model: CudaModel) {
    this.model = model;
    const { contextLength, language, ropeTheta } = model.config;
    this.#rope = ropeTable(contextLength, frequencies(language.headSize, ropeTheta));
  }

  /** Memory for the whole context is taken with the first sequence, and used again by later ones. */
  begin(prompt: Prompt, room: number): CudaSequence {
    const sequence = this.#free.pop() ?? this.#make();
    try {
      this.#begin(sequence, prompt, room);
    } catch (error) {
      sequence[Symbol.dispose]();
      throw error;
    }
    return sequence;
  }

  #begin(sequence: CudaSequence, prompt: Prompt, room: number): void {
    const { expanded } = prompt;
    const rows = Math.min(this.model.capacity, expanded.tokens.length + room + MAX_TREE);
    sequence.begin(prompt, (cos, sin) => {
      fillAngles({ cos, sin }, this.#rope, this.model, expanded, rows);
      return (rows * this.model.config.language.headSize) / 2;
    });
  }

  #make(): CudaSequence {
    const sequence = new CudaSequence(this.model, (ended) => this.#free.push(ended));
    if (this.#shapes.length > 0) this.#warm(sequence, this.#shapes);
    return sequence;
  }

  *passes(sequence: CudaSequence, chunk = CHUNK): Generator<void> {
    const { length } = sequence.prompt.expanded.tokens;
    sequence.reuse();
    for (let from = sequence.length; ; from += chunk) {
      sequence.prefillChunk(from, Math.min(length, from + chunk));
      if (from + chunk >= length) return;
      yield;
    }
  }

  /** Makes graphs of the shapes' cycles, in this and all later memory. */
  warm(shapes: readonly TreeShape[]): void {
    this.#shapes = shapes;
    using sequence = this.#free.pop() ?? this.#make();
    this.#warm(sequence, shapes);
  }

  #warm(sequence: CudaSequence, shapes: readonly TreeShape[]): void {
    this.prefill(sequence, WARM_TOKENS);
    for (const shape of shapes) {
      // ONNX Runtime takes its memory in the first runs.
      for (let i = 0; i < 2; i++) sequence.step(shape);
      sequence.cycle(shape).capture();
    }
  }

  /** Starts a sequence of so many equal tokens. */
  prefill(sequence: CudaSequence, tokens: number): void {
    const ids = new Array<number>(Math.min(tokens, this.model.config.contextLength - 1)).fill(0);
    const prompt = { expanded: this.model.family.expandPrompt(ids, []), imageRows: [] };
    this.#begin(sequence, prompt, this.model.config.contextLength);
    for (const _ of this.passes(sequence));
    sequence.tokens.push(0);
  }

  /** Milliseconds that the device takes for a cycle of each shape after a prompt of so many tokens: medians. */
  measure(shapes: readonly TreeShape[], tokens = WARM_TOKENS): number[] {
    using sequence = this.#free.pop() ?? this.#make();
    this.prefill(sequence, tokens);
    return shapes.map((shape) => {
      const times = Array.from({ length: REPEATS }, () => this.model.cuda.milliseconds(() => sequence.step(shape)));
      return times.sort((a, b) => a - b)[REPEATS >> 1];
    });
  }

  [Symbol.dispose](): void {
    for (const sequence of this.#free.splice(0)) sequence.free();
  }
}
