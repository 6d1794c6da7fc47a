/** One shape of a decoding cycle: keep what was accepted, draft a tree, verify it. All on the device, without a stop. */
import type { CapturedGraph } from "../../cuda/driver.ts";
import { CycleBlock, type CycleStart } from "../../cuda/tree.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { Tree } from "../../decode/tree.ts";
import { type Binding, DTYPES } from "../tensor.ts";
import { FRESH_ROWS } from "./model.ts";
import type { CudaSequence } from "./sequence.ts";

/** The shape of plain decoding: the root alone. */
export const PLAIN: TreeShape = { totalToken: 1, depth: 0, topK: 1 };

export class Cycle implements Disposable {
  readonly shape: TreeShape;
  readonly #sequence: CudaSequence;
  readonly #block: CycleBlock;
  readonly #verify: Binding;
  /** The draft's passes: over fresh rows, then over levels, which read each other's output by turns. */
  readonly #draft: { fresh: Binding; levels: [Binding, Binding] } | undefined;
  #graph: CapturedGraph | undefined;

  constructor(sequence: CudaSequence, shape: TreeShape) {
    const { cuda, text, config } = sequence.model;
    const { hidden, vocabulary } = config.language;
    this.shape = shape;
    this.#sequence = sequence;
    this.#block = new CycleBlock(cuda, shape, FRESH_ROWS);
    const n = shape.totalToken;
    this.#verify = sequence.cache.bind(text.binding(), this.#block.verify, n);
    this.#verify.output("hidden", sequence.hidden, [n, hidden], sequence.treeRow * hidden);
    this.#verify.output("logits", sequence.logits, [n, vocabulary]);
    const { draft } = sequence;
    if (shape === PLAIN || !draft) return;
    const level = (from: 0 | 1) => draft.bindLevel(this.#block.level, shape.topK, from);
    this.#draft = { fresh: draft.bindFresh(this.#block), levels: [level(0), level(1)] };
  }

  /** Queues the cycle. */
  start(begin: CycleStart): void {
    this.#block.begin(begin);
    if (this.#graph) this.#graph.launch();
    else this.#queue();
  }

  /** Makes a graph of the cycle, which must have run before: that is when ONNX Runtime takes its memory. */
  capture(): void {
    this.#graph ??= this.#sequence.model.cuda.capture(() => this.#queue());
  }

  #queue(): void {
    this.#block.upload();
    this.#keep();
    this.queueDraft();
    this.queueVerify();
    this.#block.download();
  }

  /** Moves what the last cycle accepted: keys and values, and hidden states for the draft. */
  #keep(): void {
    const { model, cache, hidden, treeRow, draft } = this.#sequence;
    model.trees.moveRows(this.#block, cache.caches);
    if (!draft) return;
    const bytes = model.config.language.hidden * DTYPES[model.dtype].bytes;
    model.elementwise.keepRows(hidden.pointer, this.#block.work.cycle, treeRow, bytes, this.#block.freshRows);
  }

  queueDraft(): void {
    if (!this.#draft) return;
    const { draft, model } = this.#sequence;
    const { logits, vocabulary, map } = draft!;
    const grow = (level: number) =>
      model.trees.grow(this.#block, level, logits.pointer, vocabulary, map?.pointer ?? 0n);
    this.#draft.fresh.run();
    grow(0);
    for (let level = 1; level <= this.shape.depth; level++) {
      this.#draft.levels[(level - 1) & 1].run();
      grow(level);
    }
  }

  queueVerify(): void {
    const { model, logits } = this.#sequence;
    model.trees.finish(this.#block);
    this.#verify.run();
    model.trees.argmax(this.#block, logits.pointer, model.config.language.vocabulary);
  }

  /** The tree, and the target's likeliest token after each node, once the device is done. */
  tree(): Tree {
    return this.#block.tree();
  }
  best(): Int32Array {
    return this.#block.best();
  }

  [Symbol.dispose](): void {
    this.#graph?.[Symbol.dispose]();
    for (const binding of [this.#verify, this.#draft?.fresh, ...(this.#draft?.levels ?? [])])
      binding?.[Symbol.dispose]();
    this.#block[Symbol.dispose]();
  }
}
