/** Passes over pieces of prompts. Those of few tokens are graphs: ONNX Runtime takes the host longer than the device. */
import type { CapturedGraph, Mark } from "../../cuda/driver.ts";
import { frequencies, ropeTable } from "../../model/rope.ts";
import { DTYPES, type Tensor } from "../tensor.ts";
import { Staging } from "./memory.ts";
import { CHUNK, type CudaModel, put } from "./model.ts";
import type { CudaSequence } from "./sequence.ts";

/** Tokens of a graph's pass, of which the last may be padding; a tree's cycle has room for more. */
export const FEW = 128;
/** Runs before a graph is made: in the first ones ONNX Runtime takes its memory. */
const RUNS = 2;

/** Rows of pictures within a piece of a prompt: the first of them, and how many. */
interface Pictured {
  first: number;
  count: number;
}

/** Its memory serves one pass at a time, as one stream gives. */
export class PromptPasses implements Disposable {
  readonly #model: CudaModel;
  readonly #staging: Staging<
    "ids" | "positions" | "masks" | "control" | "logitRow" | "imageIndex" | "imageRow" | "axes"
  >;
  readonly #sent: Mark;
  /** [CHUNK,D] hidden states, [FEW,D] rows of pictures, [V] after the last token. */
  readonly #hidden: Tensor;
  readonly #imageRows: Tensor;
  readonly #logits: Tensor;
  /** f32 [context,headSize/2], and i32 [headSize/2]: the axis that each number's position is of. */
  readonly #angles: Record<"cos" | "sin", Tensor>;
  readonly #axes: Tensor;
  /** Rows of positions that anything turns by. */
  readonly #turning: number;
  /** Of text, and of pieces with pictures. */
  readonly #graphs: { runs: number; graph?: CapturedGraph }[] = [{ runs: 0 }, { runs: 0 }];

  constructor(model: CudaModel) {
    const { runtime, cuda, dtype, family, config } = model;
    const { hidden, vocabulary, headSize } = config.language;
    const rows = (n: number, width = hidden) => runtime.tensor(dtype, n * width, "device");
    this.#model = model;
    [this.#hidden, this.#imageRows, this.#logits] = [rows(CHUNK), rows(FEW), rows(1, vocabulary)];
    const { cos, sin } = ropeTable(config.contextLength, frequencies(headSize, config.ropeTheta));
    this.#angles = { cos: put(runtime, cos), sin: put(runtime, sin) };
    this.#axes = put(runtime, Int32Array.from(family.rotaryAxes));
    this.#sent = cuda.mark();
    this.#turning = Math.max(...family.rotaryAxes) + 1;
    this.#staging = new Staging(runtime, {
      ...{ ids: ["i64", CHUNK], positions: ["i32", CHUNK], masks: ["i32", 4 * CHUNK], control: ["i32", 4] },
      ...{ logitRow: ["i64", 1], imageIndex: ["i64", CHUNK], imageRow: ["i32", FEW] },
      axes: ["i32", this.#turning * config.contextLength],
    } as const);
  }

  /** Queues the rotary tables of a sequence's slot, for its prompt and rows after it. */
  turn({ slot, prompt }: CudaSequence): void {
    const { cache, elementwise, config } = this.#model;
    const { positions, delta, tokens } = prompt.expanded;
    const half = config.language.headSize / 2;
    this.#sent.wait();
    const all = this.#staging.i32("axes");
    for (let axis = 0; axis < this.#turning; axis++) all.set(positions[axis], axis * tokens.length);
    this.#staging.send("axes", this.#turning * tokens.length);
    this.#sent.record();
    const at = BigInt(slot * cache.paging.angleStride * 4);
    const places = { positions: this.#staging.tensor("axes").pointer, axes: this.#axes.pointer };
    for (const name of ["cos", "sin"] as const)
      elementwise.pickAngles(cache[name].pointer + at, this.#angles[name].pointer, places, {
        ...{ tokens: tokens.length, delta, half, rows: cache.paging.angleStride / half, most: config.contextLength },
      });
  }

  /**
   * Queues a pass over the prompt's tokens `from` … `to`, at most CHUNK. Gives its hidden states [to - from,D] and the
   * logits after the last, both valid until the next pass.
   */
  run(sequence: CudaSequence, from: number, to: number): { hidden: Tensor; logits: Tensor } {
    const n = to - from;
    const rows = Math.max(n, FEW);
    this.#model.blocks.reserve(sequence.slot, from + rows);
    const pictured = this.#stage(sequence, from, n, rows);
    if (rows > FEW) this.#pass(rows, pictured, sequence.imageRows);
    else {
      if (pictured.count > 0) this.#gather(sequence.imageRows);
      this.#few(pictured.count > 0);
    }
    return { hidden: this.#hidden, logits: this.#logits };
  }

  /** Makes the graphs, on what was sent for the last prompt. */
  warm(): void {
    this.#model.cuda.fill(this.#imageRows.pointer, 0, this.#imageRows.elements * DTYPES[this.#imageRows.dtype].bytes);
    this.#sent.wait();
    this.#staging.i64("imageIndex").fill(0n, 0, FEW);
    this.#staging.send("imageIndex", FEW);
    this.#sent.record();
    for (const pictured of [false, true]) for (let i = 0; i <= RUNS; i++) this.#few(pictured);
  }

  /** A pass over FEW tokens, from its third time on a graph. */
  #few(pictured: boolean): void {
    const of = this.#graphs[pictured ? 1 : 0];
    const pass = () => this.#pass(FEW, { first: 0, count: pictured ? FEW : 0 }, this.#imageRows);
    if (!of.graph && of.runs++ >= RUNS) of.graph = this.#model.cuda.capture(pass);
    if (of.graph) of.graph.launch();
    else pass();
  }

  /** Sends what the pass reads: of `rows` tokens, n of which are the prompt's and the others padding. */
  #stage(sequence: CudaSequence, from: number, n: number, rows: number): Pictured {
    const staging = this.#staging;
    this.#sent.wait();
    const [ids, positions] = [staging.i64("ids"), staging.i32("positions")];
    for (let i = 0; i < rows; i++) {
      ids[i] = BigInt(i < n ? sequence.tokens[from + i] : 0);
      positions[i] = from + i;
    }
    staging.i32("control").set([from, 0, 1, sequence.slot]);
    staging.i64("logitRow")[0] = BigInt(n - 1);
    const pictured = this.#place(sequence, from, from + n);
    for (const name of ["ids", "positions"] as const) staging.send(name, rows);
    staging.send("control", 4);
    staging.send("logitRow", 1);
    if (pictured.count > 0) staging.send("imageIndex", Math.max(pictured.count, Math.min(rows, FEW)));
    if (pictured.count > 0 && rows === FEW) staging.send("imageRow", FEW);
    this.#sent.record();
    return pictured;
  }

  /** Writes where rows of pictures go among tokens from … to. In a graph's pass the last row is written until FEW are. */
  #place({ prompt }: CudaSequence, from: number, to: number): Pictured {
    const [index, row] = [this.#staging.i64("imageIndex"), this.#staging.i32("imageRow")];
    let [first, count, before] = [-1, 0, 0];
    for (const { at, count: rows } of prompt.expanded.images) {
      for (let t = Math.max(at, from); t < Math.min(at + rows, to); t++) {
        if (first < 0) first = before + t - at;
        index[count++] = BigInt(t - from);
      }
      before += rows;
    }
    for (let i = 0; i < FEW && count > 0; i++) {
      row[i] = first + Math.min(i, count - 1);
      if (i >= count) index[i] = index[count - 1];
    }
    return { first: Math.max(0, first), count };
  }

  #gather(imageRows: Tensor): void {
    const { elementwise, dtype, config } = this.#model;
    const index = this.#staging.tensor("imageRow").pointer;
    const { hidden } = config.language;
    elementwise.gatherRows(this.#imageRows.pointer, imageRows.pointer, index, 1, FEW, hidden, dtype);
  }

  #pass(rows: number, { first, count }: Pictured, imageRows: Tensor): void {
    const { prefill, cache, config } = this.#model;
    const { hidden: width, vocabulary } = config.language;
    const staging = this.#staging;
    const at = (name: "ids" | "positions" | "masks" | "control") => staging.tensor(name).pointer;
    using binding = prefill.binding();
    cache.bind(binding, { ids: at("ids"), positions: at("positions"), masks: at("masks"), control: at("control") }, rows); // biome-ignore format: one line
    binding.input("image_rows", imageRows, [count, width], first * width);
    binding.input("image_index", staging.tensor("imageIndex"), [count, 1]);
    binding.input("logit_rows", staging.tensor("logitRow"), [1]);
    binding.output("hidden", this.#hidden, [rows, width]).output("logits", this.#logits, [1, vocabulary]).run();
  }

  [Symbol.dispose](): void {
    for (const { graph } of this.#graphs) graph?.[Symbol.dispose]();
    for (const part of [this.#staging, this.#hidden, this.#imageRows, this.#logits, this.#axes, this.#sent])
      part[Symbol.dispose]();
    for (const tensor of Object.values(this.#angles)) tensor[Symbol.dispose]();
  }
}
