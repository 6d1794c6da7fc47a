/** A sequence in its room of the pool: it may have to give both back, and is then computed again. */
import { setImmediate } from "node:timers/promises";
import type { Prompt } from "../engine/target.ts";
import type { Room } from "./pool.ts";
import type { Sequence, TargetModel } from "./target.ts";
import { Turns } from "./turns.ts";

export interface RunningOptions {
  prompt: Prompt;
  /** The most tokens after the prompt, and the most nodes of a tree. */
  maxTokens: number;
  maxTree: number;
  signal: AbortSignal;
  /** Whether the first logits are wanted again after trees were scored. */
  keepLogits: boolean;
}

/** Turns of each target's prompts. */
const prompts = new WeakMap<object, Turns>();

/** Lets messages in: a cancellation above all, whose reason it throws. */
export async function breathe(signal: AbortSignal): Promise<void> {
  await setImmediate();
  signal.throwIfAborted();
}

export class Running<S extends Sequence> implements Disposable {
  /** Logits after the prompt. */
  logits = new Float32Array();
  /** Milliseconds that the prompt took. */
  milliseconds = 0;
  readonly #target: TargetModel<S>;
  readonly #options: RunningOptions;
  #sequence: S | undefined;
  #room: Room | undefined;
  /** Tokens of an answer that the sequence was begun with. */
  #answer = 0;
  #admitted = false;

  constructor(target: TargetModel<S>, options: RunningOptions) {
    this.#target = target;
    this.#options = options;
  }

  get sequence(): S {
    return this.#sequence!;
  }

  /** Waits for room, and runs the prompt and so much of an answer. */
  async begin(answer: readonly number[] = []): Promise<void> {
    const { prompt, maxTokens, maxTree, signal, keepLogits } = this.#options;
    const begun = performance.now();
    const rows = prompt.expanded.tokens.length + answer.length + maxTree;
    do {
      this[Symbol.dispose]();
      this.#room = await this.#target.pool?.admit(rows, signal, this.#admitted);
      this.#admitted = true;
      this.#answer = answer.length;
      this.#sequence = this.#target.begin(withAnswer(prompt, answer), maxTokens - answer.length, maxTree);
    } while (!(await this.#runPrompt(this.#sequence)));
    const { firstLogits } = this.sequence;
    // Trees are scored into the same memory.
    this.logits = keepLogits ? firstLogits.slice() : (firstLogits as typeof this.logits);
    this.milliseconds = performance.now() - begun;
  }

  /** One prompt at a time, a pass by turns with others' cycles. False: its room is wanted meanwhile. */
  async #runPrompt(sequence: S): Promise<boolean> {
    const { signal } = this.#options;
    const turns = prompts.get(this.#target) ?? new Turns();
    prompts.set(this.#target, turns);
    using _turn = await turns.take(signal);
    if (this.#room?.gaveWay) return false;
    for (const _ of this.#target.passes(sequence)) {
      await breathe(signal);
      if (this.#room?.gaveWay) return false;
    }
    return true;
  }

  /** Whether there is room for another tree, where that takes no waiting. */
  fitsNow(): boolean {
    return this.#room?.growNow(this.sequence.length + this.#options.maxTree) ?? true;
  }

  /** Waits for room for another tree. False: `begin` has to come next. */
  async fits(): Promise<boolean> {
    const { maxTree, signal } = this.#options;
    return (await this.#room?.grow(this.sequence.length + maxTree, signal)) ?? true;
  }

  /** Goes back to the prompt, for another choice. */
  async rewind(): Promise<void> {
    if (this.#answer > 0) await this.begin();
    else this.sequence.rewind();
    this.milliseconds = 0;
  }

  [Symbol.dispose](): void {
    this.#sequence?.[Symbol.dispose]();
    this.#room?.[Symbol.dispose]();
    this.#sequence = this.#room = undefined;
  }
}

/** A prompt that ends in so much of its answer. */
function withAnswer({ expanded, imageRows, ...rest }: Prompt, answer: readonly number[]): Prompt {
  if (answer.length === 0) return { expanded, imageRows, ...rest };
  const { tokens, positions, delta } = expanded;
  const from = tokens.length;
  const longer = positions.map((row) => {
    const all = new Int32Array(from + answer.length);
    all.set(row);
    for (let i = from; i < all.length; i++) all[i] = i + delta;
    return all;
  });
  return { ...rest, expanded: { ...expanded, tokens: [...tokens, ...answer], positions: longer }, imageRows };
}
