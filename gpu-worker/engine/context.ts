/** One sequence in the target: its cache, the pass that scores trees on it, and what a drafter may read of it. */
import type { Fresh, Scores, Sequence } from "../decode/target.ts";
import type { Tree } from "../decode/tree.ts";
import type { Path } from "../decode/verify.ts";
import type { Model } from "../model/model.ts";
import type { Batch } from "./batch.ts";
import { SequenceCache } from "./cache.ts";
import type { Mark, PrefixCache, Rows } from "./prefix-cache.ts";
import type { Runtime } from "./runtime.ts";
import type { Prompt } from "./target.ts";
import type { Binding, Tensor } from "./tensor.ts";

/** Disposing of it gives its memory back to the target, which uses it for later sequences; `free` ends it. */
export class Context implements Sequence {
  readonly cache: SequenceCache;
  /** [capacity,D], after the final norm: the text's in the first rows (without sharing only the prompt's), the last tree's from `#treeRow` on. */
  readonly hidden: Tensor;
  /** [maxTree,V] */
  readonly logits: Tensor;
  readonly maxTree: number;
  readonly #model: Model;
  readonly #release: (context: Context) => void;
  readonly #batch: Batch | undefined;
  /** Row of the last tree's root in `hidden`: at the end, so that the prompt's rows stay for another choice. */
  readonly #treeRow: number;
  readonly #ids: Tensor;
  readonly #positions: Tensor;
  readonly #rows: Tensor;
  readonly #none: Tensor;
  readonly #noRows: Tensor;
  readonly #idValues: BigInt64Array;
  readonly #positionValues: BigInt64Array;
  readonly #logitValues: Float32Array;
  readonly #bindings = new Map<number, Binding>();
  /** Memory of others that goes with the sequence's. */
  readonly #companions = new Map<object, Disposable>();
  readonly #prefixes: PrefixCache | undefined;
  /** The prompt's tokens whose rows another sequence had. */
  cached = 0;
  /** One a row: its token; of a picture's first row the picture's name. */
  #marks: Mark[] = [];
  /** Tokens of the last tree. */
  #tokens: number[] = [];
  #prompt: Prompt | undefined;

  constructor(
    runtime: Runtime,
    model: Model,
    rows: number,
    maxTree: number,
    release: (context: Context) => void,
    batch?: Batch,
    prefixes?: PrefixCache,
  ) {
    const { language } = model.config;
    this.#model = model;
    this.#release = release;
    this.#batch = batch;
    this.#prefixes = prefixes;
    this.maxTree = maxTree;
    this.cache = new SequenceCache(runtime, language, rows, maxTree, model.mover);
    this.#treeRow = this.cache.capacity - maxTree;
    this.hidden = runtime.tensor("f32", this.cache.capacity * language.hidden, "device");
    this.logits = runtime.tensor("f32", maxTree * language.vocabulary);
    this.#ids = runtime.tensor("i64", maxTree);
    this.#positions = runtime.tensor("i64", maxTree);
    this.#rows = runtime.tensor("i64", maxTree);
    for (let i = 0; i < maxTree; i++) this.#rows.i64[i] = BigInt(i);
    this.#none = runtime.tensor("i64", 0);
    this.#noRows = runtime.tensor("f32", 0);
    this.#idValues = this.#ids.i64;
    this.#positionValues = this.#positions.i64;
    this.#logitValues = this.logits.f32;
  }

  /** Starts a sequence in this memory. */
  begin(prompt: Prompt): void {
    this.#prompt = prompt;
    this.cached = 0;
    this.#marks = [...prompt.expanded.tokens];
    for (const [i, { key }] of prompt.shared?.images.entries() ?? []) this.#marks[prompt.expanded.images[i].at] = key;
    this.cache.rewind(0);
  }

  /** Goes back to the prompt, for another choice: only the logits after it are gone. */
  rewind(): void {
    this.share();
    this.#marks.length = this.prompt.expanded.tokens.length;
    this.cache.rewind(this.#marks.length);
  }

  /** Where rows are shared with other sequences, if this one's may be. */
  get prefixes(): PrefixCache | undefined {
    return this.prompt.shared && this.#prefixes;
  }

  /** Takes over the rows that others had of the prompt, but for the last token's, whose logits are wanted. */
  reuse(): void {
    this.cached = this.prefixes?.reuse(this.#owner, this.#marks.slice(0, -1), this.#shared) ?? 0;
    this.cache.length = this.cached;
  }

  /** Leaves a copy of its rows to others. */
  share(): void {
    this.prefixes?.keep(this.#owner, this.#marks.slice(0, this.cache.length), this.#shared);
  }

  get #owner(): string {
    return `target/${this.prompt.shared!.tenant}`;
  }

  /** Keys, values, and the hidden states that a drafter reads. */
  get #shared(): Rows[] {
    const { hidden: width } = this.#model.config.language;
    return [...this.cache.rows, { data: this.hidden.f32, heads: 1, count: this.cache.capacity, width }];
  }

  get prompt(): Prompt {
    if (!this.#prompt) throw new Error("no sequence was begun");
    return this.#prompt;
  }

  /** Memory that `owner` keeps beside this sequence's, made once and freed with it. */
  companion<T extends Disposable>(owner: object, make: () => T): T {
    const known = this.#companions.get(owner) as T | undefined;
    const companion = known ?? make();
    if (!known) this.#companions.set(owner, companion);
    return companion;
  }

  /** Logits [V] after the prompt's last token, valid until the first tree is scored. */
  get firstLogits(): Float32Array {
    return this.#logitValues.subarray(0, this.#model.config.language.vocabulary);
  }

  /** Gets ready for a pass over the tree. */
  prepare(tree: Tree): void {
    const n = tree.tokens.length;
    const { length } = this.cache;
    for (let i = 0; i < n; i++) {
      this.#idValues[i] = BigInt(tree.tokens[i]);
      this.#positionValues[i] = BigInt(length + tree.depths[i]);
    }
    this.#tokens = tree.tokens;
    if (n === 1) this.cache.causal(1);
    else this.cache.tree(tree.parents);
  }

  /** One pass over every node of the tree: logits [n,V], valid until the next pass. */
  score(tree: Tree): Float32Array {
    this.prepare(tree);
    this.#binding(tree.tokens.length).run();
    return this.#logitValues;
  }

  async scores(tree: Tree): Promise<Scores> {
    if (this.#batch) await this.#batch.score(this, tree);
    else this.score(tree);
    const { vocabulary } = this.#model.config.language;
    return { row: (node) => this.#logitValues.subarray(node * vocabulary, (node + 1) * vocabulary) };
  }

  get length(): number {
    return this.cache.length;
  }

  #binding(n: number): Binding {
    const known = this.#bindings.get(n);
    if (known) return known;
    const { hidden: width } = this.#model.config.language;
    const binding = this.#model.language.binding();
    this.#bindings.set(n, binding);
    this.bindCaches(binding);
    binding.input("logit_rows", this.#rows, [n]);
    binding.input("image_rows", this.#noRows, [0, width]).input("image_index", this.#none, [0, 1]);
    return this.bindTree(binding, n);
  }

  /** Binds what is the same for all trees to a graph whose names end in `suffix`. */
  bindCaches(binding: Binding, suffix = ""): void {
    this.cache.bind(binding, 1, undefined, suffix);
  }

  /** Binds the rest, for trees of n nodes. */
  bindTree(binding: Binding, n: number, suffix = ""): Binding {
    const { hidden: width, vocabulary } = this.#model.config.language;
    this.cache.bindBias(binding, n, undefined, suffix);
    binding.input(`ids${suffix}`, this.#ids, [n]).input(`positions${suffix}`, this.#positions, [1, n]);
    binding.output(`hidden${suffix}`, this.hidden, [n, width], this.#treeRow * width);
    return binding.output(`logits${suffix}`, this.logits, [n, vocabulary]);
  }

  /** Keeps the cache rows of the path's nodes. */
  commit(path: Path): Fresh {
    this.cache.keep(path.nodes);
    if (this.prefixes) this.#note(path.nodes);
    return { rows: path.nodes.map((node) => this.#treeRow + node), next: path.tokens };
  }

  /** What others will need of a path: its marks, and its hidden states after the prompt's. */
  #note(nodes: readonly number[]): void {
    const { hidden: width } = this.#model.config.language;
    const states = this.hidden.f32;
    for (const node of nodes) {
      const from = (this.#treeRow + node) * width;
      states.copyWithin(this.#marks.length * width, from, from + width);
      this.#marks.push(this.#tokens[node]);
    }
  }

  [Symbol.dispose](): void {
    if (!this.#prompt) return;
    this.share();
    this.#prompt = undefined;
    this.#release(this);
  }

  free(): void {
    for (const binding of this.#bindings.values()) binding[Symbol.dispose]();
    for (const companion of this.#companions.values()) companion[Symbol.dispose]();
    const tensors = [this.hidden, this.logits, this.#ids, this.#positions, this.#rows, this.#none, this.#noRows];
    for (const tensor of tensors) tensor[Symbol.dispose]();
    this.cache[Symbol.dispose]();
  }
}
