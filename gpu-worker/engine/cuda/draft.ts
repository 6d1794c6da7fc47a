/** ViSpec's draft model on the GPU: a sequence's rows in its cache, the prompt's above all, with those of the adaptor. */
import type { Fresh } from "../../decode/target.ts";
import type { Mark } from "../prefix-cache.ts";
import { DTYPES, type Tensor } from "../tensor.ts";
import { Staging } from "./memory.ts";
import { CHUNK, type CudaDraft, type CudaModel, FRESH_ROWS } from "./model.ts";
import { FEW } from "./prompts.ts";
import type { CudaSequence } from "./sequence.ts";
import { ONE } from "./workspace.ts";

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
  readonly #sequence: CudaSequence;
  readonly #model: CudaModel;
  readonly #draft: CudaDraft;
  readonly #out: Tensor;
  /** [1,vocabulary] */
  readonly #logits: Tensor;
  /** [CHUNK,D]: each prompt row's bias. */
  readonly #rowBias: Tensor;
  /** [1,D]: of rows after the prompt; a row of the workspace's. */
  readonly #bias: Tensor;
  readonly #staging: Staging<"ids" | "hiddenRows" | "positions" | "masks" | "control" | "last" | "keep" | "biasRow">;
  /** What each of the prompt's rows depends on beside those before; none before it was seen. */
  #marks: Mark[] = [];
  /** Where the prompt's rows end. */
  #prompt = { length: 0, position: 0 };

  constructor(sequence: CudaSequence, draft: CudaDraft) {
    const { model } = sequence;
    const { runtime, dtype } = model;
    const { hidden } = draft.config;
    this.#sequence = sequence;
    this.#model = model;
    this.#draft = draft;
    const rows = (n: number, width = hidden) => runtime.tensor(dtype, n * width, "device");
    [this.#out, this.#rowBias, this.#logits] = [rows(CHUNK), rows(CHUNK), rows(1, draft.vocabulary)];
    const at = BigInt(sequence.slot * hidden * DTYPES[dtype].bytes);
    this.#bias = runtime.at(sequence.space.draft!.biases.pointer + at, dtype, hidden);
    this.#staging = new Staging(runtime, {
      ...{ ids: ["i64", CHUNK], hiddenRows: ["i64", CHUNK], positions: ["i32", CHUNK], masks: ["i32", 4 * CHUNK] },
      ...{ control: ["i32", 4], last: ["i64", 1], keep: [dtype, CHUNK], biasRow: ["i32", CHUNK] },
    } as const);
  }

  /** Sends 1 where `one` holds and 0 elsewhere, in the model's type. */
  #sendKeep(n: number, one: (i: number) => boolean): void {
    const bits = ONE[this.#model.dtype];
    const { buffer } = this.#staging.bytes("keep");
    const values = this.#model.dtype === "f32" ? new Uint32Array(buffer) : new Uint16Array(buffer);
    for (let i = 0; i < n; i++) values[i] = one(i) ? bits : 0;
    this.#staging.send("keep", n);
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
    if (this.position === 0) this.#prefillPrompt();
    const { length } = this.#sequence;
    const end = length - 1;
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
    this.length = prefixes?.reuse(this.#owner, marks, this.#rows) ?? 0;
    this.#run(rows.slice(this.length), table);
    this.#marks = marks;
    this.position = end;
    this.#prompt = { length: this.length, position: end };
    this.#model.cuda.synchronize();
  }

  /** Leaves a copy of the prompt's rows to others. */
  share(): void {
    this.#sequence.prefixes?.keep(this.#owner, this.#marks, this.#rows);
  }

  get #rows() {
    return [this.#draft.cache.rows(this.#sequence.slot)];
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
    // Products search for algorithms by the number of rows: small ones, which would be many, are padded.
    const padded = Math.max(n, FEW);
    this.#model.blocks.reserve(this.#sequence.slot, this.length + padded);
    cuda.synchronize();
    const [ids, hiddenRows, positions] = [staging.i64("ids"), staging.i64("hiddenRows"), staging.i32("positions")];
    const biasRow = staging.i32("biasRow");
    for (let i = 0; i < padded; i++) {
      const row = rows[Math.min(i, n - 1)];
      ids[i] = BigInt(row.id ?? 0);
      hiddenRows[i] = row.id === undefined ? 0n : BigInt(this.#sequence.rowOf(row.at));
      positions[i] = row.at;
      biasRow[i] = row.bias;
    }
    staging.i32("control").set([this.length, 0, 1, this.#sequence.slot]);
    staging.i64("last")[0] = BigInt(n - 1);
    this.#sendKeep(padded, (i) => rows[Math.min(i, n - 1)].id !== undefined);
    for (const name of ["ids", "hiddenRows", "positions", "biasRow"] as const) staging.send(name, padded);
    staging.send("control", 4);
    staging.send("last", 1);
    const index = staging.tensor("biasRow").pointer;
    elementwise.gatherRows(this.#rowBias.pointer, table.pointer, index, 1, padded, width, dtype);
    using binding = this.#draft.layer.binding();
    const at = (name: "ids" | "positions" | "masks" | "control") => staging.tensor(name).pointer;
    this.#draft.cache.bind(binding, { ids: at("ids"), positions: at("positions"), masks: at("masks"), control: at("control") }, padded); // biome-ignore format: one line
    const { hidden } = this.#model;
    binding.input("hidden", hidden, [hidden.elements / width, width]);
    binding
      .input("hidden_rows", staging.tensor("hiddenRows"), [padded])
      .input("keep", staging.tensor("keep"), [padded, 1]);
    binding.input("row_bias", this.#rowBias, [padded, width]).input("logit_rows", staging.tensor("last"), [1]);
    binding.output("out", this.#out, [padded, width]).output("logits", this.#logits, [1, this.#draft.vocabulary]);
    binding.run();
    this.length += n;
  }

  /** Rows that the target has and the draft has not, as all sequences' are counted, with the token after each. */
  fresh(): Fresh {
    const { length, tokens } = this.#sequence;
    const rows = Array.from({ length: length - this.position }, (_, i) => this.position + i);
    return { rows: rows.map((row) => this.#sequence.rowOf(row)), next: rows.map((row) => tokens[row + 1]) };
  }

  /** A cycle that was queued brought the draft so many rows further. */
  took(rows: number): void {
    this.length += rows;
    this.position += rows;
  }

  [Symbol.dispose](): void {
    for (const part of [this.#out, this.#rowBias, this.#logits, this.#staging]) part[Symbol.dispose]();
  }
}
