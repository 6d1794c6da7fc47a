/** One sequence on the GPU: its prompt, and cycles of drafting and verification, each a captured graph. */
import type { Pinned } from "../../cuda/driver.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { Fresh, Scores, Sequence } from "../../decode/target.ts";
import type { Tree } from "../../decode/tree.ts";
import type { Path } from "../../decode/verify.ts";
import type { Mark, PrefixCache, Rows } from "../prefix-cache.ts";
import type { Prompt } from "../target.ts";
import { DTYPES, type Tensor } from "../tensor.ts";
import { Cycle, PLAIN } from "./cycle.ts";
import { CudaDraftState } from "./draft.ts";
import { DeviceCache, Staging } from "./memory.ts";
import { CHUNK, type CudaModel, MAX_TREE } from "./model.ts";

/** Rows of keys and values of accepted tokens lie at 0 … length-1; those of the last tree's nodes after them. */
export class CudaSequence implements Sequence {
  readonly model: CudaModel;
  readonly cache: DeviceCache;
  /** [capacity+MAX_TREE,D], after the final norm: accepted tokens' by index, the last tree's from `treeRow` on. */
  readonly hidden: Tensor;
  readonly treeRow: number;
  /** [MAX_TREE,V] */
  readonly logits: Tensor;
  readonly draft: CudaDraftState | undefined;
  /** Prompt and answer; the last one may not have been through the target yet. */
  readonly tokens: number[] = [];
  /** Rows before the last tree's, and its nodes that were accepted since: moved when the next cycle starts. */
  kept = { length: 0, nodes: [] as number[] };
  readonly #release: (sequence: CudaSequence) => void;
  readonly #staging: Staging<"ids" | "positions" | "masks" | "control" | "logitRow" | "imageIndex">;
  readonly #angles: Record<"cos" | "sin", Pinned>;
  /** Rows of the prompt's pictures, one after the other: as large as was needed so far. */
  #imageRows: { tensor: Tensor; pinned: Pinned } | undefined;
  readonly #row: { tensor: Tensor; pinned: Pinned };
  /** The prompt's tokens whose rows another sequence had. */
  cached = 0;
  readonly #cycles = new Map<string, Cycle>();
  #running: Cycle | undefined;
  #prompt: Prompt | undefined;

  constructor(model: CudaModel, release: (sequence: CudaSequence) => void) {
    const { runtime, cuda, dtype, capacity, draft } = model;
    const { language } = model.config;
    this.model = model;
    this.#release = release;
    this.cache = new DeviceCache(model, language, capacity);
    this.treeRow = capacity;
    this.hidden = runtime.tensor(dtype, (capacity + MAX_TREE) * language.hidden, "device");
    this.logits = runtime.tensor(dtype, MAX_TREE * language.vocabulary, "device");
    const row = runtime.tensor("f32", language.vocabulary, "device");
    this.#row = { tensor: row, pinned: cuda.pinned(language.vocabulary * 4) };
    this.#staging = new Staging(runtime, {
      ids: ["i64", CHUNK],
      positions: ["i32", CHUNK],
      masks: ["i32", 4 * CHUNK],
      control: ["i32", 4],
      logitRow: ["i64", 1],
      imageIndex: ["i64", CHUNK],
    });
    const bytes = this.cache.cos.elements * 4;
    this.#angles = { cos: cuda.pinned(bytes), sin: cuda.pinned(bytes) };
    this.draft = draft && new CudaDraftState(this, draft);
  }

  get prompt(): Prompt {
    if (!this.#prompt) throw new Error("no sequence was begun");
    return this.#prompt;
  }

  get length(): number {
    return this.kept.length + this.kept.nodes.length;
  }

  /** Starts a sequence in this memory; `angles` fills the rotary tables of its rows and says how many numbers of each. */
  begin(prompt: Prompt, angles: (cos: Float32Array, sin: Float32Array) => number): void {
    this.#prompt = prompt;
    this.draft?.begin(); // first of all: whatever fails below, its rows are not this prompt's
    this.tokens.length = 0;
    for (const token of prompt.expanded.tokens) this.tokens.push(token);
    this.kept = { length: 0, nodes: [] };
    this.cached = 0;
    this.model.cuda.synchronize();
    const { cos, sin } = this.#angles;
    const filled = angles(new Float32Array(cos.buffer), new Float32Array(sin.buffer));
    for (const name of ["cos", "sin"] as const)
      this.model.cuda.upload(this.cache[name].pointer, this.#angles[name], filled * 4);
    this.#sendImages(prompt);
  }

  #sendImages({ imageRows }: Prompt): void {
    const { cuda, runtime, dtype } = this.model;
    const bytes = imageRows.reduce((sum, rows) => sum + rows.byteLength, 0);
    if (!this.#imageRows || this.#imageRows.pinned.buffer.byteLength < bytes) {
      this.#freeImages();
      const room = Math.max(bytes, DTYPES[dtype].bytes * this.model.config.language.hidden);
      const pinned = cuda.pinned(room);
      this.#imageRows = { tensor: runtime.tensor(dtype, room / DTYPES[dtype].bytes, "device"), pinned };
    }
    const { tensor, pinned } = this.#imageRows;
    let at = 0;
    for (const rows of imageRows) {
      new Uint8Array(pinned.buffer, at, rows.byteLength).set(new Uint8Array(rows.buffer, rows.byteOffset, rows.byteLength)); // biome-ignore format: one line
      at += rows.byteLength;
    }
    if (bytes > 0) cuda.upload(tensor.pointer, pinned, bytes);
  }

  /** Where rows are shared with other sequences, if this one's may be. */
  get prefixes(): PrefixCache<Tensor> | undefined {
    return this.#prompt?.shared && this.model.prefixes;
  }

  get owner(): string {
    return this.prompt.shared!.tenant;
  }

  /** Takes over the rows that others had of the prompt, but for the last token's, whose logits are wanted. */
  reuse(): void {
    const { prefixes } = this;
    if (!prefixes) return;
    this.cached = prefixes.reuse(`target/${this.owner}`, this.#marksOf(this.tokens.length - 1), this.#shared);
    this.kept = { length: this.cached, nodes: [] };
  }

  /** Leaves a copy of its rows to others; those of the last cycle are not in their places yet. */
  #share(): void {
    this.prefixes?.keep(`target/${this.owner}`, this.#marksOf(this.kept.length), this.#shared);
    this.draft?.share();
  }

  /** Of the first rows: a picture's first has its name. */
  #marksOf(rows: number): Mark[] {
    const marks: Mark[] = this.tokens.slice(0, rows);
    const { expanded, shared } = this.prompt;
    for (const [i, { at }] of expanded.images.entries()) if (at < rows) marks[at] = shared!.images[i].key;
    return marks;
  }

  /** Keys, values, and the hidden states that the draft reads. */
  get #shared(): Rows<Tensor>[] {
    const { hidden: width } = this.model.config.language;
    return [...this.cache.rows, { data: this.hidden, heads: 1, count: this.hidden.elements / width, width }];
  }

  /** [rows,D] of all pictures of the prompt. */
  get imageRows(): Tensor {
    return this.#imageRows!.tensor;
  }

  /** Queues a pass over the prompt's tokens `from` … `to`. */
  prefillChunk(from: number, to: number): void {
    const { cuda, config, prefill } = this.model;
    const { hidden: width, vocabulary } = config.language;
    const n = to - from;
    const staging = this.#staging;
    cuda.synchronize(); // what the pass before was sent
    const [ids, positions] = [staging.i64("ids"), staging.i32("positions")];
    for (let i = 0; i < n; i++) {
      ids[i] = BigInt(this.tokens[from + i]);
      positions[i] = from + i;
    }
    staging.i32("control").set([from, 0, 1, 0]);
    staging.i64("logitRow")[0] = BigInt(n - 1);
    const images = this.#imageIndex(from, to, staging.i64("imageIndex"));
    for (const name of ["ids", "positions"] as const) staging.send(name, n);
    staging.send("control", 4);
    staging.send("logitRow", 1);
    staging.send("imageIndex", images.count);
    using binding = prefill.binding();
    this.cache.bind(binding, this.#inputs, n);
    binding.input("image_rows", this.imageRows, [images.count, width], images.first * width);
    binding.input("image_index", staging.tensor("imageIndex"), [images.count, 1]);
    binding.input("logit_rows", staging.tensor("logitRow"), [1]);
    binding.output("hidden", this.hidden, [n, width], from * width).output("logits", this.logits, [1, vocabulary]);
    binding.run();
    this.kept = { length: to, nodes: [] };
  }

  get #inputs() {
    const at = (name: "ids" | "positions" | "masks" | "control") => this.#staging.tensor(name).pointer;
    return { ids: at("ids"), positions: at("positions"), masks: at("masks"), control: at("control") };
  }

  /** Writes the places of image rows among tokens from … to; those rows are `count` from the prompt's row `first` on. */
  #imageIndex(from: number, to: number, index: BigInt64Array): { first: number; count: number } {
    let [first, count, before] = [-1, 0, 0];
    for (const { at, count: rows } of this.prompt.expanded.images) {
      for (let t = Math.max(at, from); t < Math.min(at + rows, to); t++) {
        if (first < 0) first = before + t - at;
        index[count++] = BigInt(t - from);
      }
      before += rows;
    }
    return { first: Math.max(0, first), count };
  }

  /** Queues a cycle of a shape; its root is the text's last token. */
  start(shape: TreeShape): void {
    const draft = shape === PLAIN ? undefined : this.draft;
    draft?.catchUp();
    this.#running = this.cycle(shape);
    const { length, nodes } = this.kept;
    const fresh = draft?.fresh() ?? { rows: [0], next: [this.tokens.at(-1)!] };
    const state = draft ? { length: draft.length, position: draft.position } : { length: 0, position: 0 };
    this.#running.start({ target: { length, nodes }, draft: state, fresh });
    draft?.took(fresh.rows.length);
    this.kept = { length: this.length, nodes: [] };
  }

  /** A whole cycle that keeps nothing but its root, followed by token 0: for measurements. */
  step(shape: TreeShape): void {
    this.start(shape);
    this.finish();
    this.commit({ nodes: [0], tokens: [0] });
  }

  /** The tree of the cycle that was started, when it is done. */
  finish(): Tree {
    if (!this.#running) throw new Error("no cycle was started");
    this.model.cuda.synchronize();
    return this.#running.tree();
  }

  get running(): boolean {
    return this.#running !== undefined;
  }

  /** The shape's cycle, made when it is first asked for; `capture` makes it a graph. */
  cycle(shape: TreeShape): Cycle {
    const key = `${shape.totalToken}/${shape.depth}/${shape.topK}`;
    const cycle = this.#cycles.get(key) ?? new Cycle(this, shape);
    this.#cycles.set(key, cycle);
    return cycle;
  }

  get firstLogits(): Float32Array {
    return this.#logitsOf(0);
  }

  /** Row of logits on the host, valid until the next. */
  #logitsOf(row: number): Float32Array {
    const { cuda, elementwise, dtype, config } = this.model;
    const { vocabulary } = config.language;
    const { tensor, pinned } = this.#row;
    const from = this.logits.pointer + BigInt(row * vocabulary * DTYPES[dtype].bytes);
    elementwise.convert(tensor.pointer, "f32", from, dtype, vocabulary);
    cuda.download(pinned, tensor.pointer, vocabulary * 4);
    cuda.synchronize();
    return new Float32Array(pinned.buffer);
  }

  /** Of the tree that `finish` gave: it was verified in the same cycle. */
  scores(_tree: Tree): Scores {
    const best = this.#running!.best();
    return { row: (node) => this.#logitsOf(node), best: (node) => best[node] };
  }

  commit(path: Path): Fresh {
    this.kept.nodes = path.nodes;
    this.tokens.push(...path.tokens);
    this.#running = undefined;
    return { rows: path.nodes, next: path.tokens };
  }

  rewind(): void {
    this.model.cuda.synchronize();
    this.tokens.length = this.prompt.expanded.tokens.length;
    this.kept = { length: this.tokens.length, nodes: [] };
    this.#running = undefined;
    this.draft?.rewind();
  }

  [Symbol.dispose](): void {
    if (!this.#prompt) return;
    this.#share();
    this.model.cuda.synchronize();
    this.#prompt = undefined;
    this.#running = undefined;
    this.#release(this);
  }

  #freeImages(): void {
    const freed = this.#imageRows;
    this.#imageRows = undefined;
    freed?.tensor[Symbol.dispose]();
    if (freed) this.model.cuda.freePinned(freed.pinned);
  }

  free(): void {
    for (const cycle of this.#cycles.values()) cycle[Symbol.dispose]();
    this.#freeImages();
    this.model.cuda.freePinned(this.#row.pinned);
    for (const tensor of [this.hidden, this.logits, this.#row.tensor]) tensor[Symbol.dispose]();
    for (const pinned of Object.values(this.#angles)) this.model.cuda.freePinned(pinned);
    for (const part of [this.#staging, this.cache, this.draft]) part?.[Symbol.dispose]();
  }
}
