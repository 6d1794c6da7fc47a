/** A decoding cycle of some sequences, of one shape: draft their trees, verify them. All on the device, without a stop. */
import { dividesWell, gpuOf } from "../../cuda/attention.ts";
import { CycleBlock, type CycleStart, canDivide, type DraftInputs } from "../../cuda/cycle-block.ts";
import type { CapturedGraph } from "../../cuda/driver.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { Tree } from "../../decode/tree.ts";
import type { Binding, Tensor } from "../tensor.ts";
import { type CudaDraft, type CudaModel, FRESH_ROWS } from "./model.ts";
import type { DraftSpace, Workspace } from "./workspace.ts";

/** The shape of plain decoding: the root alone. */
export const PLAIN: TreeShape = { totalToken: 1, depth: 0, topK: 1 };
/** Runs before a graph is made: in the first ones ONNX Runtime takes its memory. */
const RUNS = 2;

export class Cycle implements Disposable {
  readonly shape: TreeShape;
  readonly sequences: number;
  readonly #model: CudaModel;
  readonly #space: Workspace;
  readonly #block: CycleBlock;
  readonly #verify: Binding;
  /** The draft's passes: over fresh rows, then over levels, which read each other's output by turns. */
  readonly #draft: { fresh: Binding; levels: [Binding, Binding] } | undefined;
  #runs = 0;
  #graph: CapturedGraph | undefined;

  constructor(model: CudaModel, space: Workspace, shape: TreeShape, sequences: number) {
    const { cuda, text, config, cache, hidden, treeRow, draft } = model;
    const { hidden: width, vocabulary } = config.language;
    const rows = sequences * shape.totalToken;
    if (rows > model.passRows) throw new Error(`a pass over ${rows} rows: there is memory for ${model.passRows}`);
    this.shape = shape;
    this.sequences = sequences;
    this.#model = model;
    this.#space = space;
    const { totalToken } = shape;
    const language = { ...config.language, dtype: model.dtype };
    const divided = canDivide(shape, sequences) && dividesWell(language, totalToken, sequences, gpuOf(cuda, language));
    this.#block = new CycleBlock(cuda, shape, FRESH_ROWS, sequences, divided);
    this.#verify = cache.bind(text.binding(), this.#block.verify, rows, sequences);
    this.#verify.output("hidden", hidden, [rows, width], treeRow * width);
    this.#verify.output("logits", space.logits, [rows, vocabulary]);
    if (shape === PLAIN || !draft) return;
    const level = (from: 0 | 1) => this.#bindLevel(draft, space.draft!, from);
    this.#draft = { fresh: this.#bindFresh(draft, space.draft!), levels: [level(0), level(1)] };
  }

  /** Queues the cycle; from its third time on it is a graph. */
  start(starts: readonly CycleStart[]): void {
    this.#block.begin(starts);
    if (!this.#graph && this.#runs++ >= RUNS) this.#graph = this.#model.cuda.capture(() => this.#queue());
    if (this.#graph) this.#graph.launch();
    else this.#queue();
  }

  #queue(): void {
    this.#block.upload();
    this.queueDraft();
    this.queueVerify();
    this.#block.download();
  }

  queueDraft(): void {
    if (!this.#draft) return;
    const { draft, trees, elementwise, dtype, config } = this.#model;
    const { logits, biases, rowBias } = this.#space.draft!;
    const { slots } = this.#block;
    const { topK, depth } = this.shape;
    const grow = (level: number) =>
      trees.grow(this.#block, level, logits.pointer, draft!.vocabulary, draft!.map?.pointer ?? 0n);
    const bias = (each: number) => {
      const rows = this.sequences * each;
      elementwise.gatherRows(rowBias.pointer, biases.pointer, slots, each, rows, config.language.hidden, dtype);
    };
    bias(FRESH_ROWS);
    this.#draft.fresh.run();
    grow(0);
    if (depth > 0) bias(topK);
    for (let level = 1; level <= depth; level++) {
      this.#draft.levels[(level - 1) & 1].run();
      grow(level);
    }
  }

  queueVerify(): void {
    const { trees, config } = this.#model;
    trees.finish(this.#block);
    this.#verify.run();
    trees.argmax(this.#block, this.#space.logits.pointer, config.language.vocabulary);
  }

  #bindPass(
    { layer, cache }: CudaDraft,
    space: DraftSpace,
    inputs: DraftInputs,
    each: number,
    hidden: Tensor,
    out: Tensor,
  ): Binding {
    // biome-ignore format: one list
    const { runtime, config } = this.#model;
    const { hidden: width } = config.language;
    const rows = this.sequences * each;
    const binding = cache.bind(layer.binding(), inputs, rows, this.sequences);
    binding.input("hidden", hidden, [hidden.elements / width, width]);
    binding.input("hidden_rows", runtime.at(inputs.hiddenRows, "i64", rows), [rows]);
    binding.input("keep", space.ones, [rows, 1]).input("row_bias", space.rowBias, [rows, width]);
    return binding.output("out", out, [rows, width]);
  }

  /** A cycle's first pass: logits after the last of each sequence's fresh rows. */
  #bindFresh(draft: CudaDraft, space: DraftSpace): Binding {
    const { fresh, sequences } = this.#block;
    const binding = this.#bindPass(draft, space, fresh, FRESH_ROWS, this.#model.hidden, space.out[0]);
    binding.input("logit_rows", this.#model.runtime.at(fresh.last, "i64", sequences), [sequences]);
    return binding.output("logits", space.logits, [sequences, draft.vocabulary]);
  }

  /** A pass over a level's rows, which reads output `from` and writes the other: logits after every row. */
  #bindLevel(draft: CudaDraft, space: DraftSpace, from: 0 | 1): Binding {
    const rows = this.sequences * this.shape.topK;
    const binding = this.#bindPass(draft, space, this.#block.level, this.shape.topK, space.out[from], space.out[1 - from]); // biome-ignore format: one call
    binding.input("logit_rows", space.identity, [rows]);
    return binding.output("logits", space.logits, [rows, draft.vocabulary]);
  }

  /** The i-th sequence's tree, and the target's likeliest token after each node, once the device is done. */
  tree(i: number): Tree {
    return this.#block.tree(i);
  }
  best(i: number): Int32Array {
    return this.#block.best(i);
  }
  /** The first of its rows of logits and hidden states. */
  firstRow(i: number): number {
    return this.#block.firstRow(i);
  }

  [Symbol.dispose](): void {
    this.#graph?.[Symbol.dispose]();
    for (const binding of [this.#verify, this.#draft?.fresh, ...(this.#draft?.levels ?? [])])
      binding?.[Symbol.dispose]();
    this.#block[Symbol.dispose]();
  }
}
