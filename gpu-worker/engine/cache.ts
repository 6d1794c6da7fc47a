/** The memory of one sequence in one decoder: KV cache, rotary tables and attention bias, of a fixed capacity. */
import { writeTreeMask } from "../decode/tree.ts";
import type { Binding, DType, Runtime, Tensor } from "./runtime.ts";

export interface CacheShape {
  layers: number;
  kvHeads: number;
  headSize: number;
}

/** Rows of room are a multiple of this, so that sequences of like length have like shapes. */
const ROUND = 64;

/**
 * Rows 0 … length-1 hold accepted tokens; a pass writes its rows after them. `capacity` rows of keys and values a layer,
 * [1,kvHeads,capacity,headSize]. `maxTokens` is the most tokens of a pass that needs a mask.
 */
export class SequenceCache implements Disposable {
  length = 0;
  readonly capacity: number;
  readonly shape: CacheShape;
  readonly cos: Tensor;
  readonly sin: Tensor;
  readonly #unified: boolean;
  readonly #keys: Tensor[];
  readonly #values: Tensor[];
  readonly #lastRow: Tensor;
  readonly #capacity: Tensor;
  readonly #bias: Tensor;
  readonly #biasValues: Float32Array;
  /** Columns of the bias that the last pass masked, to be cleared before the next. */
  #masked = { from: 0, rows: 0, columns: 0 };

  constructor(runtime: Runtime, shape: CacheShape, rows: number, maxTokens: number, dtype: DType) {
    this.shape = shape;
    this.capacity = Math.ceil(rows / ROUND) * ROUND;
    this.#unified = runtime.unified;
    const elements = shape.kvHeads * this.capacity * shape.headSize;
    const caches = () => Array.from({ length: shape.layers }, () => runtime.tensor(dtype, elements, "device"));
    this.#keys = caches();
    this.#values = caches();
    this.#lastRow = runtime.tensor("i32", 1);
    this.#capacity = runtime.tensor("i32", 1);
    this.#capacity.i32[0] = this.capacity;
    this.#bias = runtime.tensor("f32", maxTokens * this.capacity);
    this.#biasValues = this.#bias.f32;
    this.cos = runtime.tensor("f32", (this.capacity * shape.headSize) / 2);
    this.sin = runtime.tensor("f32", (this.capacity * shape.headSize) / 2);
  }

  /** Binds the cache to a pass of `tokens` tokens; `bias` replaces the sequence's own (a prefill chunk's zeros). */
  bind(binding: Binding, tokens: number, bias: Tensor = this.#bias): void {
    const { kvHeads, headSize } = this.shape;
    const dims = [1, kvHeads, this.capacity, headSize];
    for (const [name, tensors] of [
      ["key", this.#keys],
      ["value", this.#values],
    ] as const)
      for (const [i, tensor] of tensors.entries())
        binding.input(`${name}.${i}`, tensor, dims).output(`${name}.${i}.next`, tensor, dims);
    binding.input("last_row", this.#lastRow, [1]).input("capacity", this.#capacity, [1]);
    binding.input("cos", this.cos, [this.capacity, headSize / 2]);
    binding.input("sin", this.sin, [this.capacity, headSize / 2]);
    binding.input("bias", bias, [1, 1, tokens, this.capacity]);
  }

  /** Gets ready for a pass whose tokens see all rows so far and each its predecessors; rows so far: `from`. */
  causal(tokens: number, from = this.length): void {
    this.#clearMask();
    this.#lastRow.i32[0] = from + tokens - 1;
  }

  /**
   * Gets ready for a pass over tree nodes `first` … n-1 (those before are rows already, after `length`): each sees the
   * accepted rows, its ancestors and itself.
   */
  tree(parents: readonly number[], first = 0): void {
    this.#clearMask();
    const [from, columns] = [this.length, parents.length];
    writeTreeMask(this.#biasValues, this.capacity, from, parents, first);
    this.#masked = { from, rows: columns - first, columns };
    this.#lastRow.i32[0] = from + columns - 1;
  }

  #clearMask(): void {
    const { from, rows, columns } = this.#masked;
    for (let i = 0; i < rows; i++) {
      const row = i * this.capacity + from;
      this.#biasValues.fill(0, row, row + columns);
    }
    this.#masked.rows = 0;
  }

  /** Keeps the rows length + node for the given nodes (rising), moved together; `length` grows by as many. */
  keep(nodes: readonly number[]): void {
    if (!this.#unified) throw new Error("moving cache rows on a device is not there yet");
    const { kvHeads, headSize } = this.shape;
    for (let i = 0; i < nodes.length; i++) {
      if (nodes[i] === i) continue;
      for (const tensors of [this.#keys, this.#values])
        for (const tensor of tensors) {
          const rows = tensor.f32;
          for (let head = 0; head < kvHeads; head++) {
            const base = (head * this.capacity + this.length) * headSize;
            rows.copyWithin(base + i * headSize, base + nodes[i] * headSize, base + (nodes[i] + 1) * headSize);
          }
        }
    }
    this.length += nodes.length;
  }

  [Symbol.dispose](): void {
    for (const t of [...this.#keys, ...this.#values, this.#lastRow, this.#capacity, this.#bias, this.cos, this.sin])
      t[Symbol.dispose]();
  }
}
