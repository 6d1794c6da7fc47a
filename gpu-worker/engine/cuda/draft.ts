/** ViSpec's draft model on the GPU: its cache, the adaptor's rows, and the bindings of its passes in a cycle. */
import type { CycleBlock, DraftInputs } from "../../cuda/tree.ts";
import type { Fresh } from "../../decode/target.ts";
import type { Mark } from "../prefix-cache.ts";
import { type Binding, DTYPES, type Tensor } from "../tensor.ts";
import { DeviceCache, Staging } from "./memory.ts";
import { CHUNK, type CudaDraft, type CudaModel, FRESH_ROWS, MAX_TREE } from "./model.ts";
import type { CudaSequence } from "./sequence.ts";

/** Most rows of a level. */
const MOST_ROWS = 16;

/** A row of the prompt: the token at index `at` + 1 with the hidden state of `at`, or one of the adaptor's; its bias row. */
interface Row {
  at: number;
  id: number | undefined;
  bias: number;
}

/** As DraftSequence has it (engine/draft.ts): `length` counts rows, `position` those left out of pictures as well. */
export class CudaDraftState implements Disposable {
  length = 0;
  position = 0;
  readonly vocabulary: number;
  readonly map: Tensor | undefined;
  /** [MOST_ROWS,vocabulary] */
  readonly logits: Tensor;
  readonly #sequence: CudaSequence;
  readonly #model: CudaModel;
  readonly #draft: CudaDraft;
  readonly #cache: DeviceCache;
  /** Outputs of the last two passes of a cycle. */
  readonly #out: [Tensor, Tensor];
  readonly #prefillOut: Tensor;
  /** [CHUNK,D]: each prompt row's bias. */
  readonly #rowBias: Tensor;
  /** [1,D]: of rows after the prompt. */
  readonly #bias: Tensor;
  readonly #staging: Staging<
    "ids" | "hiddenRows" | "positions" | "masks" | "control" | "last" | "keep" | "biasRow" | "ones" | "identity"
  >;
  /** What each of the prompt's rows depends on beside those before; none before it was seen. */
  #marks: Mark[] = [];
  /** Where the prompt's rows end. */
  #prompt = { length: 0, position: 0 };

  constructor(sequence: CudaSequence, draft: CudaDraft) {
    const { model } = sequence;
    const { runtime, dtype, cuda } = model;
    const { hidden } = draft.config;
    this.#sequence = sequence;
    this.#model = model;
    this.#draft = draft;
    this.vocabulary = draft.vocabulary;
    this.map = draft.map;
    this.#cache = new DeviceCache(model, { ...draft.config, layers: 1 }, model.capacity + MAX_TREE);
    const rows = (n: number, width = hidden) => runtime.tensor(dtype, n * width, "device");
    this.#out = [rows(MOST_ROWS), rows(MOST_ROWS)];
    [this.#prefillOut, this.#rowBias, this.#bias] = [rows(CHUNK), rows(CHUNK), rows(1)];
    this.logits = rows(MOST_ROWS, draft.vocabulary);
    this.#staging = new Staging(runtime, {
      ...{ ids: ["i64", CHUNK], hiddenRows: ["i64", CHUNK], positions: ["i32", CHUNK], masks: ["i32", 4 * CHUNK] },
      ...{ control: ["i32", 4], last: ["i64", 1], keep: [dtype, CHUNK], biasRow: ["i32", CHUNK] },
      ...{ ones: [dtype, MOST_ROWS], identity: ["i64", MOST_ROWS] },
    } as const);
    for (const [name, tensor] of [["cos", this.#cache.cos], ["sin", this.#cache.sin]] as const) this.#angles(draft.rope[name], tensor); // biome-ignore format: one line
    this.#setOnes("ones", MOST_ROWS, () => true);
    for (let i = 0; i < MOST_ROWS; i++) this.#staging.i64("identity")[i] = BigInt(i);
    this.#staging.send("identity", MOST_ROWS);
    cuda.synchronize();
  }

  #angles(table: Float32Array, tensor: Tensor): void {
    const { cuda } = this.#model;
    const n = Math.min(table.length, tensor.elements);
    const pinned = cuda.pinned(n * 4);
    new Float32Array(pinned.buffer).set(table.subarray(0, n));
    cuda.upload(tensor.pointer, pinned, n * 4);
    cuda.synchronize();
    cuda.freePinned(pinned);
  }

  /** Sends 1 where `one` holds and 0 elsewhere, in the model's type. */
  #setOnes(name: "ones" | "keep", n: number, one: (i: number) => boolean): void {
    const bits = { f32: 0x3f800000, f16: 0x3c00, bf16: 0x3f80 }[this.#model.dtype];
    const { buffer } = this.#staging.bytes(name);
    const values = this.#model.dtype === "f32" ? new Uint32Array(buffer) : new Uint16Array(buffer);
    for (let i = 0; i < n; i++) values[i] = one(i) ? bits : 0;
    this.#staging.send(name, n);
  }

  /** Starts a sequence. */
  begin(): void {
    [this.length, this.position] = [0, 0];
    this.#prompt = { length: 0, position: 0 };
    this.#marks = [];
  }

  rewind(): void {
    ({ length: this.length, position: this.position } = this.#prompt);
  }

  /** Queues what the draft has to see before a cycle: the prompt at first, and later what plain cycles wrote. */
  catchUp(): void {
    const { kept, length } = this.#sequence;
    const end = Math.min(kept.length, length - 1);
    if (this.position === 0) {
      this.#prefillPrompt();
      this.#prompt = { length: this.length, position: this.position };
    }
    if (length - this.position <= FRESH_ROWS) return;
    const bias = 0;
    const rows = Array.from({ length: end - this.position }, (_, i) => this.position + i);
    this.#run(rows.map((at) => ({ at, id: this.#sequence.tokens[at + 1], bias })), this.#bias); // biome-ignore format: one line
    this.position = end;
  }

  /** The prompt's rows but the last, whose token only the first cycle knows. */
  #prefillPrompt(): void {
    const { prompt, tokens, prefixes } = this.#sequence;
    const { queries, hidden } = this.#draft.config;
    const { images } = prompt.expanded;
    const end = prompt.expanded.tokens.length - 1;
    const marks: Mark[] = [];
    let since: Mark[] = [tokens[0]]; // no row stands for it alone
    const add = (row: Row) => {
      rows.push(row);
      const mark = row.id ?? -1;
      marks.push(since.length > 0 ? JSON.stringify([...since, mark]) : mark);
      since = [];
    };
    // Row 0 is the bias without a picture; each picture has its adapted rows, and then the bias after it.
    using table = this.#model.runtime.tensor(this.#model.dtype, (1 + images.length * queries) * hidden, "device");
    this.#biasOf(table, 0, undefined);
    const rows: Row[] = [];
    let at = 0;
    for (const [i, { at: start, count }] of images.entries()) {
      const before = i * queries;
      for (; at < start - 1; at++) add({ at, id: tokens[at + 1], bias: before });
      this.#adapt(i, table);
      if (prompt.shared) since.push(prompt.shared.images[i].key);
      for (let q = 0; q < queries - 1; q++)
        add({ at: start - 1 + count - (queries - 1) + q, id: undefined, bias: before + 1 + q });
      at = start - 1 + count;
    }
    const last = images.length * queries;
    for (; at < end; at++) add({ at, id: tokens[at + 1], bias: last });
    const bytes = hidden * DTYPES[this.#model.dtype].bytes;
    this.#model.cuda.upload(this.#bias.pointer, table.pointer + BigInt(last * bytes), bytes);
    this.length = prefixes?.reuse(this.#owner, marks, this.#cache.rows) ?? 0;
    this.#run(rows.slice(this.length), table);
    this.#marks = marks;
    this.position = end;
    this.#model.cuda.synchronize();
  }

  /** Leaves a copy of the prompt's rows to others. */
  share(): void {
    this.#sequence.prefixes?.keep(this.#owner, this.#marks, this.#cache.rows);
  }

  get #owner(): string {
    return `draft/${this.#sequence.prefixes && this.#sequence.owner}`;
  }

  /** The adaptor's outputs for picture i: its rows into the table's, its last one as the bias after the picture. */
  #adapt(i: number, table: Tensor): void {
    const { queries, hidden } = this.#draft.config;
    const { images } = this.#sequence.prompt.expanded;
    const first = images.slice(0, i).reduce((sum, { count }) => sum + count, 0);
    using binding = this.#draft.adaptor.binding();
    binding.input("rows", this.#sequence.imageRows, [images[i].count, hidden], first * hidden);
    const row = 1 + i * queries;
    binding.output("out", table, [queries, hidden], row * hidden).run();
    this.#biasOf(table, row + queries - 1, row + queries - 1);
  }

  /** Writes row `to` of the table: the bias of the global vector in row `global`, or of none. */
  #biasOf(table: Tensor, to: number, global: number | undefined): void {
    const { hidden } = this.#draft.config;
    const { cuda, dtype } = this.#model;
    const bytes = hidden * DTYPES[dtype].bytes;
    if (global === undefined) cuda.fill(this.#bias.pointer, 0, bytes);
    else cuda.upload(this.#bias.pointer, table.pointer + BigInt(global * bytes), bytes);
    using binding = this.#draft.bias.binding();
    binding
      .input("global", this.#bias, [1, hidden])
      .output("bias", table, [1, hidden], to * hidden)
      .run();
  }

  #run(rows: Row[], table: Tensor): void {
    for (let from = 0; from < rows.length; from += CHUNK) this.#chunk(rows.slice(from, from + CHUNK), table);
  }

  #chunk(rows: Row[], table: Tensor): void {
    const { cuda, elementwise, dtype } = this.#model;
    const { hidden: width } = this.#draft.config;
    const staging = this.#staging;
    const n = rows.length;
    cuda.synchronize();
    const [ids, hiddenRows, positions] = [staging.i64("ids"), staging.i64("hiddenRows"), staging.i32("positions")];
    const biasRow = staging.i32("biasRow");
    for (const [i, row] of rows.entries()) {
      ids[i] = BigInt(row.id ?? 0);
      hiddenRows[i] = row.id === undefined ? 0n : BigInt(row.at);
      positions[i] = row.at;
      biasRow[i] = row.bias;
    }
    staging.i32("control").set([this.length, 0, 1, 0]);
    staging.i64("last")[0] = BigInt(n - 1);
    this.#setOnes("keep", n, (i) => rows[i].id !== undefined);
    for (const name of ["ids", "hiddenRows", "positions", "biasRow"] as const) staging.send(name, n);
    staging.send("control", 4);
    staging.send("last", 1);
    elementwise.gatherRows(this.#rowBias.pointer, table.pointer, staging.tensor("biasRow").pointer, n, width, dtype);
    using binding = this.#draft.prompt.binding();
    const at = (name: "ids" | "positions" | "masks" | "control") => staging.tensor(name).pointer;
    this.#cache.bind(binding, { ids: at("ids"), positions: at("positions"), masks: at("masks"), control: at("control") }, n); // biome-ignore format: one line
    binding.input("hidden", this.#sequence.hidden, [this.#sequence.hidden.elements / width, width]);
    binding.input("hidden_rows", staging.tensor("hiddenRows"), [n]).input("keep", staging.tensor("keep"), [n, 1]);
    binding.input("row_bias", this.#rowBias, [n, width]).input("logit_rows", staging.tensor("last"), [1]);
    binding.output("out", this.#prefillOut, [n, width]).output("logits", this.logits, [1, this.vocabulary]);
    binding.run();
    this.length += n;
  }

  /** Rows that the target has and the draft has not, with the token after each. */
  fresh(): Fresh {
    const { length, tokens } = this.#sequence;
    const rows = Array.from({ length: length - this.position }, (_, i) => this.position + i);
    return { rows, next: rows.map((row) => tokens[row + 1]) };
  }

  /** A cycle that was queued brought the draft so many rows further. */
  took(rows: number): void {
    this.length += rows;
    this.position += rows;
  }

  #bindPass(inputs: DraftInputs, rows: number, hidden: Tensor, out: Tensor): Binding {
    const { hidden: width } = this.#draft.config;
    const binding = this.#cache.bind(this.#draft.layer.binding(), inputs, rows);
    binding.input("hidden", hidden, [hidden.elements / width, width]);
    binding.input("hidden_rows", this.#model.runtime.at(inputs.hiddenRows, "i64", rows), [rows]);
    binding.input("keep", this.#staging.tensor("ones"), [rows, 1]).input("row_bias", this.#bias, [1, width]);
    return binding.output("out", out, [rows, width]);
  }

  /** A cycle's first pass: logits after the last of its fresh rows. */
  bindFresh({ fresh, freshRows }: CycleBlock): Binding {
    const binding = this.#bindPass(fresh, freshRows, this.#sequence.hidden, this.#out[0]);
    binding.input("logit_rows", this.#model.runtime.at(fresh.last, "i64", 1), [1]);
    return binding.output("logits", this.logits, [1, this.vocabulary]);
  }

  /** A pass over a level's rows, which reads output `from` and writes the other: logits after every row. */
  bindLevel(level: DraftInputs, rows: number, from: 0 | 1): Binding {
    const binding = this.#bindPass(level, rows, this.#out[from], this.#out[1 - from]);
    binding.input("logit_rows", this.#staging.tensor("identity"), [rows]);
    return binding.output("logits", this.logits, [rows, this.vocabulary]);
  }

  [Symbol.dispose](): void {
    for (const tensor of [...this.#out, this.#prefillOut, this.#rowBias, this.#bias, this.logits])
      tensor[Symbol.dispose]();
    for (const part of [this.#staging, this.#cache]) part[Symbol.dispose]();
  }
}
