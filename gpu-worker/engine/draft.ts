/** ViSpec's draft model at work on one sequence: its own cache, the adaptor's rows, passes over rows and over tree levels. */

import type { Fresh } from "../decode/target.ts";
import type { Model } from "../model/model.ts";
import { SequenceCache } from "./cache.ts";
import type { Context } from "./context.ts";
import type { KeptImage } from "./images.ts";
import type { Mark } from "./prefix-cache.ts";
import type { Runtime, Session } from "./runtime.ts";
import type { Binding, Tensor } from "./tensor.ts";

/** The likeliest next tokens after some rows, k a row: natural log-probabilities, in falling order. */
export interface Candidates {
  logProbs: Float32Array;
  tokens: BigInt64Array;
}

/** Most rows of one pass over the prompt. */
const CHUNK = 512;

/**
 * Rows of the draft's cache pair a token's hidden state in the target with the next token's embedding; of an image's run
 * only the adaptor's rows are kept. `cache.length` counts rows, `position` the rows and those left out (the reference's
 * real length), where later rows go on.
 */
export class DraftSequence implements Disposable {
  readonly cache: SequenceCache;
  position = 0;
  /** Row of the last pass that stands for the last token of the text. */
  lastRow = 0;
  readonly topK: number;
  readonly #runtime: Runtime;
  readonly #model: Model;
  readonly #context: Context;
  /** [1,D]: the share of the last image's global vector in every row. */
  readonly #bias: Tensor;
  readonly #tensors: Record<"ids" | "hiddenRows" | "positions" | "one" | "k" | "last" | "tokens" | "keep", Tensor>;
  readonly #logProbs: Tensor;
  /** Outputs of the last two passes, [maxRows,D] each: a level reads the one before. */
  readonly #out: [Tensor, Tensor];
  readonly #bindings = new Map<string, Binding>();
  readonly #values: { ids: BigInt64Array; hiddenRows: BigInt64Array; positions: BigInt64Array; candidates: Candidates };
  #turn = 0;

  /** `maxRows`: the most rows of one level or one catch-up; `scratch`: the most rows of a tree. */
  constructor(runtime: Runtime, model: Model, context: Context, maxRows: number, scratch: number, topK: number) {
    const { config, rope } = model.draft!;
    this.#runtime = runtime;
    this.#model = model;
    this.#context = context;
    this.topK = topK;
    this.cache = new SequenceCache(runtime, { ...config, layers: 1 }, context.cache.capacity + scratch, maxRows);
    const angles = (this.cache.capacity * config.headSize) / 2;
    this.cache.cos.f32.set(rope.cos.subarray(0, angles));
    this.cache.sin.f32.set(rope.sin.subarray(0, angles));
    const ints = (n: number) => runtime.tensor("i64", n);
    this.#tensors = {
      ids: ints(maxRows),
      hiddenRows: ints(maxRows),
      positions: ints(maxRows),
      one: ints(maxRows),
      k: ints(1),
      last: ints(1),
      tokens: ints(maxRows * topK),
      keep: runtime.tensor("f32", maxRows),
    };
    for (let i = 0; i < maxRows; i++) this.#tensors.one.i64[i] = BigInt(i);
    this.#tensors.keep.f32.fill(1);
    this.#tensors.k.i64[0] = BigInt(topK);
    this.#logProbs = runtime.tensor("f32", maxRows * topK);
    this.#bias = runtime.tensor("f32", config.hidden);
    const rows = [Math.max(maxRows, Math.min(CHUNK, this.cache.capacity)), maxRows];
    this.#out = rows.map((n) => runtime.tensor("f32", n * config.hidden, "device")) as [Tensor, Tensor];
    const { ids, hiddenRows, positions, tokens } = this.#tensors;
    this.#values = {
      ids: ids.i64,
      hiddenRows: hiddenRows.i64,
      positions: positions.i64,
      candidates: { logProbs: this.#logProbs.f32, tokens: tokens.i64 },
    };
  }

  /** Starts a sequence: the prompt's rows and the root's, `chunk` a pass; `first` is the text's first token. */
  prefill(first: number, chunk = CHUNK): Candidates {
    const { prefixes, prompt } = this.#context;
    const { rows, marks, bias } = this.#promptRows(first);
    const owner = `draft/${prompt.shared?.tenant}`;
    this.cache.rewind(0);
    this.#turn = 0;
    this.#bias.f32.set(bias);
    this.cache.length = prefixes?.reuse(owner, marks.slice(0, -1), this.cache.rows) ?? 0;
    for (let from = this.cache.length; from < rows.length; from += chunk)
      this.#prefillChunk(rows.slice(from, from + chunk));
    prefixes?.keep(owner, marks, this.cache.rows);
    this.position = prompt.expanded.tokens.length;
    return this.#values.candidates;
  }

  /** The prompt's rows and the root's, each with what it depends on beside those before; and the bias of rows to come. */
  #promptRows(first: number): { rows: PromptRow[]; marks: Mark[]; bias: Float32Array } {
    const { expanded, shared } = this.#context.prompt;
    const { hidden: width, queries } = this.#model.draft!.config;
    const next = [...expanded.tokens.slice(1), first];
    const rows: PromptRow[] = [];
    const marks: Mark[] = [];
    let since: Mark[] = [expanded.tokens[0]]; // no row stands for it alone
    const add = (row: PromptRow, mark: number) => {
      rows.push(row);
      marks.push(since.length > 0 ? JSON.stringify([...since, mark]) : mark);
      since = [];
    };
    let bias = this.#globalBias(new Float32Array(width));
    let at = 0;
    for (const [i, { at: start, count }] of expanded.images.entries()) {
      for (; at < start - 1; at++) add({ at, id: next[at], bias }, next[at]);
      // Row r pairs the hidden state of token r with token r + 1, so an image's run begins one row before its tokens.
      at = start - 1 + count;
      const adapted = this.#adapt(i);
      if (shared) since.push(shared.images[i].key);
      for (let q = 0; q < queries - 1; q++)
        add({ at: at - (queries - 1) + q, adapted: adapted.rows.subarray(q * width, (q + 1) * width) }, q);
      bias = adapted.bias;
    }
    for (; at < next.length; at++) add({ at, id: next[at], bias }, next[at]);
    return { rows, marks, bias };
  }

  #prefillChunk(rows: PromptRow[]): void {
    const n = rows.length;
    const { hidden: width } = this.#model.draft!.config;
    const runtime = this.#runtime;
    using ids = runtime.tensor("i64", n);
    using hiddenRows = runtime.tensor("i64", n);
    using positions = runtime.tensor("i64", n);
    using keep = runtime.tensor("f32", n);
    using rowBias = runtime.tensor("f32", n * width);
    using mask = this.cache.prefillBias(n);
    const values = { ids: ids.i64, hidden: hiddenRows.i64, at: positions.i64, keep: keep.f32, bias: rowBias.f32 };
    for (const [i, row] of rows.entries()) {
      values.at[i] = BigInt(row.at);
      values.bias.set("adapted" in row ? row.adapted : row.bias, i * width);
      if ("adapted" in row) continue;
      values.ids[i] = BigInt(row.id);
      values.hidden[i] = BigInt(row.at);
      values.keep[i] = 1;
    }
    this.#tensors.last.i64[0] = BigInt(n - 1);
    using binding = this.#model.draft!.layer.binding();
    this.cache.bind(binding, n, mask);
    const { hidden } = this.#context;
    binding.input("ids", ids, [n]).input("hidden", hidden, [hidden.elements / width, width]);
    binding.input("hidden_rows", hiddenRows, [n]).input("positions", positions, [1, n]);
    binding.input("keep", keep, [n, 1]).input("row_bias", rowBias, [n, width]);
    binding.output("out", this.#out[0], [n, width]);
    this.#bindCandidates(binding, 1, this.#tensors.last);
    binding.run();
    this.cache.length += n;
    this.lastRow = n - 1;
  }

  /** Rows of tokens that the target accepted since, from its own hidden states. Candidates follow the last of them. */
  extend({ rows, next }: Fresh): Candidates {
    const n = rows.length;
    const { ids, hiddenRows, positions, candidates } = this.#values;
    for (let i = 0; i < n; i++) {
      ids[i] = BigInt(next[i]);
      hiddenRows[i] = BigInt(rows[i]);
      positions[i] = BigInt(this.position + i);
    }
    this.cache.causal(n);
    this.#binding(n, "fresh").run();
    this.#turn = 0;
    this.lastRow = n - 1;
    this.cache.length += n;
    this.position += n;
    return candidates;
  }

  /**
   * A level of the tree, `depth` levels below the first: its tokens, the last of the nodes fed so far, whose `parents`
   * are among them (-1: the root); `from` says which row of the pass before proposed each. Candidates follow every node.
   */
  level(tokens: number[], from: number[], parents: number[], depth: number): Candidates {
    const first = parents.length - tokens.length;
    const n = tokens.length;
    const { ids, hiddenRows, positions, candidates } = this.#values;
    for (let i = 0; i < n; i++) {
      ids[i] = BigInt(tokens[i]);
      hiddenRows[i] = BigInt(from[i]);
      positions[i] = BigInt(this.position + depth);
    }
    this.cache.tree(parents, first);
    this.#binding(n, this.#turn === 0 ? "even" : "odd").run();
    this.#turn = 1 - this.#turn;
    return candidates;
  }

  #binding(n: number, kind: "fresh" | "even" | "odd"): Binding {
    const key = `${kind}${n}`;
    const known = this.#bindings.get(key);
    if (known) return known;
    const binding = this.#model.draft!.layer.binding();
    this.#bindings.set(key, binding);
    const { hidden: width } = this.#model.draft!.config;
    const { ids, hiddenRows, positions, keep, one } = this.#tensors;
    const hidden = kind === "fresh" ? this.#context.hidden : this.#out[kind === "even" ? 0 : 1];
    this.cache.bind(binding, n);
    binding.input("ids", ids, [n]).input("hidden", hidden, [hidden.elements / width, width]);
    binding.input("hidden_rows", hiddenRows, [n]).input("positions", positions, [1, n]);
    binding.input("keep", keep, [n, 1]).input("row_bias", this.#bias, [1, width]);
    binding.output("out", this.#out[kind === "even" ? 1 : 0], [n, width]);
    // A catch-up wants candidates after its last row only; a level after every row.
    if (kind === "fresh") this.#bindCandidates(binding, 1, one, n - 1);
    else this.#bindCandidates(binding, n, one);
    return binding;
  }

  #bindCandidates(binding: Binding, rows: number, logitRows: Tensor, offset = 0): void {
    binding.input("logit_rows", logitRows, [rows], offset).input("k", this.#tensors.k, [1]);
    binding.output("log_probs", this.#logProbs, [rows, this.topK]);
    binding.output("tokens", this.#tensors.tokens, [rows, this.topK]);
  }

  /** What the draft sees of the prompt's i-th picture; kept with it, where it has a name. */
  #adapt(i: number): NonNullable<KeptImage["adapted"]> {
    const { expanded, imageRows, shared } = this.#context.prompt;
    const { hidden: width, queries } = this.#model.draft!.config;
    const image = shared?.images[i];
    if (image?.adapted) return image.adapted;
    const input: [string, Float32Array, number[]] = ["rows", imageRows[i] as Float32Array, [expanded.images[i].count, width]]; // biome-ignore format: one line
    const rows = this.#small(this.#model.draft!.adaptor, input, ["out", [queries, width]]);
    const adapted = { rows, bias: this.#globalBias(rows.subarray((queries - 1) * width)) };
    if (image) image.adapted = adapted;
    return adapted;
  }

  #globalBias(global: Float32Array): Float32Array {
    const { hidden: width } = this.#model.draft!.config;
    return this.#small(this.#model.draft!.bias, ["global", global, [1, width]], ["bias", [1, width]]);
  }

  /** Runs a graph of one input and one output, once. */
  #small(
    session: Session,
    [inName, data, inDims]: [string, Float32Array, number[]],
    [outName, outDims]: [string, number[]],
  ): Float32Array {
    using binding = session.binding();
    using input = this.#runtime.tensor("f32", data.length);
    using output = this.#runtime.tensor("f32", outDims[0] * outDims[1]);
    input.f32.set(data);
    binding.input(inName, input, inDims).output(outName, output, outDims).run();
    return output.f32.slice();
  }

  /** Output of the last pass, [n,D] on the host: for tests. */
  get out(): Float32Array {
    return this.#out[this.#turn].f32;
  }

  [Symbol.dispose](): void {
    for (const binding of this.#bindings.values()) binding[Symbol.dispose]();
    for (const t of [...Object.values(this.#tensors), this.#logProbs, this.#bias, ...this.#out]) t[Symbol.dispose]();
    this.cache[Symbol.dispose]();
  }
}

/** A row of the prompt at position `at`: a text row with its id and bias, or one of the adaptor's. */
type PromptRow = { at: number } & ({ id: number; bias: Float32Array } | { adapted: Float32Array });
