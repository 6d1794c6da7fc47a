/** Memory of the CUDA engine: KV caches of a decoder, and small inputs on their way to the device. */
import type { Pinned } from "../../cuda/driver.ts";
import type { PassInputs } from "../../cuda/tree.ts";
import type { CacheShape } from "../cache.ts";
import type { Rows } from "../prefix-cache.ts";
import type { Runtime } from "../runtime.ts";
import { type Binding, DTYPES, type DType, type Tensor } from "../tensor.ts";
import { type CudaModel, put } from "./model.ts";

/** Keys and values of every layer, [1,kvHeads,capacity,headSize] each, and the angles of every row. */
export class DeviceCache implements Disposable {
  readonly capacity: number;
  readonly shape: CacheShape;
  /** f32 [capacity,headSize/2] */
  readonly cos: Tensor;
  readonly sin: Tensor;
  readonly #runtime: Runtime;
  readonly #tensors: Map<string, Tensor>;
  readonly #pointers: Tensor;
  readonly #bytes: number;

  constructor({ runtime, dtype }: CudaModel, shape: CacheShape, capacity: number) {
    this.capacity = capacity;
    this.shape = shape;
    this.#runtime = runtime;
    this.#bytes = DTYPES[dtype].bytes;
    const elements = shape.kvHeads * capacity * shape.headSize;
    const names = ["key", "value"].flatMap((kind) => Array.from({ length: shape.layers }, (_, i) => `${kind}.${i}`));
    this.#tensors = new Map(names.map((name) => [name, runtime.tensor(dtype, elements, "device")]));
    this.#pointers = put(runtime, BigInt64Array.from([...this.#tensors.values()].map((t) => t.pointer)));
    const angles = () => runtime.tensor("f32", (capacity * shape.headSize) / 2, "device");
    [this.cos, this.sin] = [angles(), angles()];
  }

  /** What moves rows wants to know. */
  get caches() {
    const { kvHeads: heads, headSize, layers } = this.shape;
    const { capacity } = this;
    return { pointers: this.#pointers.pointer, count: 2 * layers, heads, capacity, rowBytes: headSize * this.#bytes };
  }

  /** Keys and values. */
  get rows(): Rows<Tensor>[] {
    const { kvHeads: heads, headSize: width } = this.shape;
    return [...this.#tensors.values()].map((data) => ({ data, heads, count: this.capacity, width }));
  }

  /** Binds the cache and the inputs of a pass of `tokens` tokens. */
  bind(binding: Binding, { ids, positions, masks, control }: PassInputs, tokens: number): Binding {
    const { kvHeads, headSize } = this.shape;
    const at = (pointer: bigint, dtype: DType, n: number) => this.#runtime.at(pointer, dtype, n);
    for (const [name, tensor] of this.#tensors) binding.input(name, tensor, [1, kvHeads, this.capacity, headSize]);
    binding.input("cos", this.cos, [this.capacity, headSize / 2]).input("sin", this.sin, [this.capacity, headSize / 2]);
    binding.input("ids", at(ids, "i64", tokens), [tokens]);
    binding.input("positions", at(positions, "i32", tokens), [tokens]);
    return binding
      .input("mask", at(masks, "i32", 4 * tokens), [tokens, 4])
      .input("control", at(control, "i32", 4), [4]);
  }

  [Symbol.dispose](): void {
    for (const tensor of [...this.#tensors.values(), this.#pointers, this.cos, this.sin]) tensor[Symbol.dispose]();
  }
}

/** Named arrays that the host fills and the device reads; `send` queues the copy of the first elements of one. */
export class Staging<Name extends string> implements Disposable {
  readonly #runtime: Runtime;
  readonly #arrays: Record<Name, { tensor: Tensor; pinned: Pinned }>;

  constructor(runtime: Runtime, sizes: Record<Name, readonly [DType, number]>) {
    this.#runtime = runtime;
    const entries = Object.entries<readonly [DType, number]>(sizes).map(([name, [dtype, elements]]) => {
      const tensor = runtime.tensor(dtype, elements, "device");
      return [name, { tensor, pinned: runtime.cuda!.pinned(elements * DTYPES[dtype].bytes) }];
    });
    this.#arrays = Object.fromEntries(entries) as Record<Name, { tensor: Tensor; pinned: Pinned }>;
  }

  tensor(name: Name): Tensor {
    return this.#arrays[name].tensor;
  }

  /** Host memory of an array, to be written when nothing that was sent before is still on its way. */
  i64(name: Name): BigInt64Array {
    return new BigInt64Array(this.#arrays[name].pinned.buffer);
  }
  i32(name: Name): Int32Array {
    return new Int32Array(this.#arrays[name].pinned.buffer);
  }
  bytes(name: Name): Uint8Array {
    return new Uint8Array(this.#arrays[name].pinned.buffer);
  }

  send(name: Name, elements: number): void {
    const { tensor, pinned } = this.#arrays[name];
    this.#runtime.cuda!.upload(tensor.pointer, pinned, elements * DTYPES[tensor.dtype].bytes);
  }

  [Symbol.dispose](): void {
    for (const { tensor, pinned } of Object.values<{ tensor: Tensor; pinned: Pinned }>(this.#arrays)) {
      tensor[Symbol.dispose]();
      this.#runtime.cuda!.freePinned(pinned);
    }
  }
}
