/** The memory of one sequence in one decoder: KV cache, rotary tables and attention bias, of a fixed capacity. */
import { writeTreeMask } from "./mask.ts";
import type { Rows } from "./prefix-cache.ts";
import type { Runtime, Session } from "./runtime.ts";
import type { Binding, Tensor } from "./tensor.ts";

export interface CacheShape {
  layers: number;
  kvHeads: number;
  headSize: number;
}

/**
 * Rows 0 … length-1 hold accepted tokens; a pass writes its rows after them. `capacity` rows of keys and values a layer,
 * [1,kvHeads,capacity,headSize]. `maxTokens` is the most tokens of a pass but for the prefill's. `mover` (moveGraph) is
 * what moves rows on a device whose memory JavaScript can't see.
 */
export class SequenceCache implements Disposable {
  length = 0;
  readonly capacity: number;
  readonly shape: CacheShape;
  readonly cos: Tensor;
  readonly sin: Tensor;
  readonly #runtime: Runtime;
  readonly #mover: Session | undefined;
  readonly #keys: Tensor[];
  readonly #values: Tensor[];
  readonly #lastRow: Tensor;
  readonly #capacity: Tensor;
  /** [maxTokens,capacity]: 0 for rows that a token sees. */
  readonly #bias: Tensor;
  readonly #biasValues: Float32Array;
  readonly #maxTokens: number;
  /** Columns that are open to every token. */
  #open = 0;
  /** What the last pass opened for its own tokens, to be closed before the next. */
  #block = { from: 0, rows: 0, columns: 0 };

  constructor(runtime: Runtime, shape: CacheShape, capacity: number, maxTokens: number, mover?: Session) {
    this.shape = shape;
    this.capacity = capacity;
    this.#runtime = runtime;
    this.#mover = mover;
    this.#maxTokens = maxTokens;
    const elements = shape.kvHeads * this.capacity * shape.headSize;
    const caches = () => Array.from({ length: shape.layers }, () => runtime.tensor("f32", elements, "device"));
    this.#keys = caches();
    this.#values = caches();
    this.#lastRow = runtime.tensor("i32", 1);
    this.#capacity = runtime.tensor("i32", 1);
    this.#capacity.i32[0] = this.capacity;
    this.#bias = runtime.tensor("f32", maxTokens * this.capacity);
    this.#biasValues = this.#bias.f32.fill(Number.NEGATIVE_INFINITY);
    this.cos = runtime.tensor("f32", (this.capacity * shape.headSize) / 2);
    this.sin = runtime.tensor("f32", (this.capacity * shape.headSize) / 2);
  }

  /** Forgets all rows but the first `length`; 0 empties the cache for another sequence. */
  rewind(length: number): void {
    for (let i = 0; i < this.#maxTokens; i++) {
      const row = i * this.capacity;
      this.#biasValues.fill(Number.NEGATIVE_INFINITY, row + length, row + this.capacity);
    }
    this.length = length;
    this.#open = Math.min(this.#open, length);
    this.#block.rows = 0;
  }

  /**
   * Binds the cache to a pass of `tokens` tokens; `bias` replaces the sequence's own (see `prefillBias`), `suffix` is what
   * the inputs' names end in.
   */
  bind(binding: Binding, tokens: number, bias: Tensor = this.#bias, suffix = ""): void {
    const { headSize } = this.shape;
    for (const [name, tensor] of this.#all())
      binding.input(name + suffix, tensor, this.#dims).output(`${name}${suffix}.next`, tensor, this.#dims);
    binding.input(`last_row${suffix}`, this.#lastRow, [1]).input(`capacity${suffix}`, this.#capacity, [1]);
    binding.input(`cos${suffix}`, this.cos, [this.capacity, headSize / 2]);
    binding.input(`sin${suffix}`, this.sin, [this.capacity, headSize / 2]);
    this.bindBias(binding, tokens, bias, suffix);
  }

  /** What changes of it with the number of tokens. */
  bindBias(binding: Binding, tokens: number, bias: Tensor = this.#bias, suffix = ""): void {
    binding.input(`bias${suffix}`, bias, [1, 1, tokens, this.capacity]);
  }

  get #dims(): number[] {
    return [1, this.shape.kvHeads, this.capacity, this.shape.headSize];
  }

  *#all(): Generator<[name: string, tensor: Tensor]> {
    for (const [i, tensor] of this.#keys.entries()) yield [`key.${i}`, tensor];
    for (const [i, tensor] of this.#values.entries()) yield [`value.${i}`, tensor];
  }

  /** Keys and values, where the host sees them. */
  get rows(): Rows[] {
    const { kvHeads: heads, headSize: width } = this.shape;
    return [...this.#all()].map(([, { f32: data }]) => ({ data, heads, count: this.capacity, width }));
  }

  /** Gets ready for a prefill pass of `tokens` tokens and gives its bias, the caller's to dispose of. */
  prefillBias(tokens: number): Tensor {
    const bias = this.#runtime.tensor("f32", tokens * this.capacity);
    const values = bias.f32;
    for (let i = 0; i < tokens; i++)
      values.fill(Number.NEGATIVE_INFINITY, i * this.capacity + this.length + tokens, (i + 1) * this.capacity);
    this.#lastRow.i32[0] = this.length + tokens - 1;
    return bias;
  }

  /** Gets ready for a pass whose tokens see all rows and their predecessors (the attention itself is causal). */
  causal(tokens: number): void {
    this.#closeBlock();
    for (let i = 0; i < tokens; i++) {
      const row = i * this.capacity + this.length;
      this.#biasValues.fill(0, row, row + tokens);
    }
    this.#block = { from: this.length, rows: tokens, columns: tokens };
    this.#lastRow.i32[0] = this.length + tokens - 1;
  }

  /**
   * Gets ready for a pass over tree nodes `first` … n-1 (those before are rows already, after `length`): each sees the
   * accepted rows, its ancestors and itself.
   */
  tree(parents: readonly number[], first = 0): void {
    this.#closeBlock();
    const [from, columns] = [this.length, parents.length];
    writeTreeMask(this.#biasValues, this.capacity, from, parents, first);
    this.#block = { from, rows: columns - first, columns };
    this.#lastRow.i32[0] = from + columns - 1;
  }

  /** Hides what the last pass opened, and opens the rows that were accepted since to every token. */
  #closeBlock(): void {
    const { from, rows, columns } = this.#block;
    for (let i = 0; i < rows; i++) {
      const row = i * this.capacity + from;
      this.#biasValues.fill(Number.NEGATIVE_INFINITY, row, row + columns);
    }
    for (let i = 0; i < this.#maxTokens; i++)
      this.#biasValues.fill(0, i * this.capacity + this.#open, i * this.capacity + this.length);
    this.#open = this.length;
  }

  /** Keeps the rows length + node of the given nodes (rising), moved together; `length` grows by as many. */
  keep(nodes: readonly number[]): void {
    const still = nodes.findIndex((node, i) => node !== i);
    if (still >= 0 && this.#mover) this.#moveOnDevice(this.#mover, nodes, still);
    else if (still >= 0) this.#moveHere(nodes, still);
    this.length += nodes.length;
  }

  #moveHere(nodes: readonly number[], still: number): void {
    const { kvHeads, headSize } = this.shape;
    for (const [, tensor] of this.#all()) {
      const rows = tensor.f32;
      for (let head = 0; head < kvHeads; head++) {
        const base = (head * this.capacity + this.length) * headSize;
        for (let i = still; i < nodes.length; i++)
          rows.copyWithin(base + i * headSize, base + nodes[i] * headSize, base + (nodes[i] + 1) * headSize);
      }
    }
  }

  #moveOnDevice(mover: Session, nodes: readonly number[], still: number): void {
    const moved = nodes.slice(still);
    using from = this.#runtime.tensor("i64", moved.length);
    using to = this.#runtime.tensor("i64", 1);
    from.i64.set(moved.map((node) => BigInt(this.length + node)));
    to.i64[0] = BigInt(this.length + still);
    using binding = mover.binding();
    for (const [name, tensor] of this.#all())
      binding.input(name, tensor, this.#dims).output(`${name}.next`, tensor, this.#dims);
    binding.input("from", from, [moved.length]).input("to", to, [1]).run();
  }

  [Symbol.dispose](): void {
    for (const [, tensor] of this.#all()) tensor[Symbol.dispose]();
    for (const tensor of [this.#lastRow, this.#capacity, this.#bias, this.cos, this.sin]) tensor[Symbol.dispose]();
  }
}
