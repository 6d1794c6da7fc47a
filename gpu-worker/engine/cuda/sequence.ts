/** One sequence on the GPU: its prompt, its rows in blocks, and what its last tree left. */
import type { CycleStart } from "../../cuda/cycle-block.ts";
import type { Pinned, Mark as StreamMark } from "../../cuda/driver.ts";
import type { Move } from "../../cuda/moves.ts";
import type { Fresh, Scores, Sequence } from "../../decode/target.ts";
import type { Tree } from "../../decode/tree.ts";
import type { Path } from "../../decode/verify.ts";
import type { Mark, PrefixCache, Rows } from "../prefix-cache.ts";
import type { Prompt } from "../target.ts";
import { DTYPES, type Tensor } from "../tensor.ts";
import { CudaDraftState } from "./draft.ts";
import { pagedRows } from "./memory.ts";
import { type CudaModel, CYCLE_ROWS } from "./model.ts";
import type { PromptPasses } from "./prompts.ts";
import type { DeviceRows } from "./shared-rows.ts";
import type { Workspace } from "./workspace.ts";

/** Who wants to know of a sequence. */
export interface Owner {
  /** It takes no part in cycles any more, not in the one that runs either. */
  left(sequence: CudaSequence): void;
  /** Its memory may serve another. */
  ended(sequence: CudaSequence): void;
  /** Logits of its last tree are not wanted any more. */
  released(sequence: CudaSequence): void;
}

/** Where a sequence's last tree is: the first of its rows in the pass, and the likeliest token after each node. */
interface Verified {
  row: number;
  best: Int32Array;
}

/** Rows of keys and values of accepted tokens lie at 0 … length-1; those of the last tree's nodes after them. */
export class CudaSequence implements Sequence {
  readonly model: CudaModel;
  readonly space: Workspace;
  /** Its place in the tables of blocks, angles and biases. */
  readonly slot: number;
  readonly draft: CudaDraftState | undefined;
  /** Prompt and answer; the last one may not have been through the target yet. */
  readonly tokens: number[] = [];
  /** Rows before the last tree's, and its nodes that were accepted since: moved before the next cycle starts. */
  kept = { length: 0, nodes: [] as number[] };
  readonly #owner: Owner;
  readonly #imagesSent: StreamMark;
  /** Rows of the prompt's pictures, one after the other: as large as was needed so far. */
  #imageRows: { tensor: Tensor; pinned: Pinned } | undefined;
  /** [V] after the prompt's last token. */
  readonly #first: Tensor;
  readonly #row: { tensor: Tensor; pinned: Pinned };
  /** The prompt's tokens whose rows another sequence had. */
  cached = 0;
  #verified: Verified | undefined;
  #prompt: Prompt | undefined;

  constructor(model: CudaModel, space: Workspace, slot: number, owner: Owner) {
    const { runtime, cuda, dtype, draft } = model;
    const { language } = model.config;
    this.model = model;
    this.space = space;
    this.slot = slot;
    this.#owner = owner;
    this.#first = runtime.tensor(dtype, language.vocabulary, "device");
    const row = runtime.tensor("f32", language.vocabulary, "device");
    this.#row = { tensor: row, pinned: cuda.pinned(language.vocabulary * 4) };
    this.#imagesSent = cuda.mark();
    this.draft = draft && new CudaDraftState(this, draft);
  }

  get prompt(): Prompt {
    if (!this.#prompt) throw new Error("no sequence was begun");
    return this.#prompt;
  }

  get length(): number {
    return this.kept.length + this.kept.nodes.length;
  }

  /** Starts a sequence in this memory, with room for its prompt. */
  begin(prompt: Prompt, passes: PromptPasses): void {
    this.#prompt = prompt;
    this.draft?.begin(); // first of all: whatever fails below, its rows are not this prompt's
    this.#verified = undefined;
    this.tokens.length = 0;
    for (const token of prompt.expanded.tokens) this.tokens.push(token);
    this.kept = { length: 0, nodes: [] };
    this.cached = 0;
    this.model.blocks.reserve(this.slot, this.tokens.length);
    passes.turn(this);
    this.#sendImages(prompt);
  }

  #sendImages({ imageRows }: Prompt): void {
    const { cuda, runtime, dtype } = this.model;
    const bytes = imageRows.reduce((sum, rows) => sum + rows.byteLength, 0);
    this.#imagesSent.wait();
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
    this.#imagesSent.record();
  }

  /** Where rows are shared with other sequences, if this one's may be. */
  get prefixes(): PrefixCache<DeviceRows> | undefined {
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
  get #shared(): Rows<DeviceRows>[] {
    return this.draft ? [this.model.cache.rows(this.slot), this.#hidden] : [this.model.cache.rows(this.slot)];
  }

  get #hidden(): Rows<DeviceRows> {
    const { blocks, hidden, config } = this.model;
    return pagedRows(blocks, this.slot, hidden, 1, config.language.hidden);
  }

  /** [rows,D] of all pictures of the prompt. */
  get imageRows(): Tensor {
    return this.#imageRows!.tensor;
  }

  /** Queues a pass over the prompt's tokens `from` … `to`. */
  prefillChunk(passes: PromptPasses, from: number, to: number): void {
    const { hidden, logits } = passes.run(this, from, to);
    const { cuda, dtype } = this.model;
    if (to === this.tokens.length)
      cuda.upload(this.#first.pointer, logits.pointer, logits.elements * DTYPES[dtype].bytes);
    if (this.draft) this.#keepHidden(hidden, from, to - from);
    this.kept = { length: to, nodes: [] };
  }

  /** Puts hidden states of a piece of the prompt where the draft finds them. */
  #keepHidden(rows: Tensor, from: number, count: number): void {
    const { elementwise, dtype } = this.model;
    const { data, heads: planes, width } = this.#hidden;
    const rowBytes = width * DTYPES[dtype].bytes;
    const plain = { base: rows.pointer, rowBytes, planes, count };
    elementwise.copyRows({ ...data, rowBytes, planes, count: 0 }, from, plain, 0, count);
  }

  /** Where a row is among all sequences'. */
  rowOf(row: number): number {
    return this.model.blocks.row(this.slot, row);
  }

  /** What of the last tree has to be moved, if anything; from then on it counts as moved. */
  settle(): Move | undefined {
    const { length, nodes } = this.kept;
    if (nodes.length === 0) return undefined;
    this.kept = { length: this.length, nodes: [] };
    const first = this.model.treeRow + this.#verified!.row;
    return {
      from: nodes.map((node) => this.rowOf(length + node)),
      to: nodes.map((_, i) => this.rowOf(length + i)),
      hiddenFrom: nodes.map((node) => first + node),
    };
  }

  /** What a cycle begins with, drafting or not; all that the last one left must be settled. Its root is the text's last token. */
  next(drafting: boolean): CycleStart {
    const draft = drafting ? this.draft : undefined;
    const { slot, length } = this;
    this.model.blocks.reserve(slot, length + CYCLE_ROWS);
    draft?.catchUp();
    const fresh = draft?.fresh() ?? { rows: [0], next: [this.tokens.at(-1)!] };
    const { length: rows, position } = draft ?? { length: 0, position: 0 };
    draft?.took(fresh.rows.length);
    return { slot, length, draft: { length: rows, position }, fresh };
  }

  /** The tree that a pass has verified. */
  verified(tree: Verified): void {
    this.#verified = tree;
  }

  get firstLogits(): Float32Array {
    return this.#logitsOf(this.#first, 0);
  }

  /** Row of logits on the host, valid until the next. */
  #logitsOf(logits: Tensor, row: number): Float32Array {
    const { cuda, elementwise, dtype, config } = this.model;
    const { vocabulary } = config.language;
    const { tensor, pinned } = this.#row;
    const from = logits.pointer + BigInt(row * vocabulary * DTYPES[dtype].bytes);
    elementwise.convert(tensor.pointer, "f32", from, dtype, vocabulary);
    cuda.download(pinned, tensor.pointer, vocabulary * 4);
    cuda.synchronize();
    return new Float32Array(pinned.buffer);
  }

  /** Of the tree that was drafted: it was verified in the same cycle. */
  scores(_tree: Tree): Scores {
    const { row, best } = this.#verified!;
    return { row: (node) => this.#logitsOf(this.space.logits, row + node), best: (node) => best[node] };
  }

  commit(path: Path): Fresh {
    this.kept.nodes = path.nodes;
    this.tokens.push(...path.tokens);
    return { rows: path.nodes, next: path.tokens };
  }

  release(): void {
    this.#owner.released(this);
  }

  rewind(): void {
    this.#owner.left(this);
    this.tokens.length = this.prompt.expanded.tokens.length;
    this.kept = { length: this.tokens.length, nodes: [] };
    this.draft?.rewind();
  }

  [Symbol.dispose](): void {
    if (!this.#prompt) return;
    this.#share();
    this.#prompt = undefined;
    this.#owner.left(this);
    this.model.blocks.release(this.slot);
    this.#owner.ended(this);
  }

  #freeImages(): void {
    const freed = this.#imageRows;
    this.#imageRows = undefined;
    freed?.tensor[Symbol.dispose]();
    if (freed) this.model.cuda.freePinned(freed.pinned);
  }

  free(): void {
    this.#freeImages();
    this.model.cuda.freePinned(this.#row.pinned);
    for (const tensor of [this.#first, this.#row.tensor]) tensor[Symbol.dispose]();
    for (const part of [this.#imagesSent, this.draft]) part?.[Symbol.dispose]();
  }
}
