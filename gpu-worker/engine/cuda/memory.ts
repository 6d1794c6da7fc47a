/** Memory of the CUDA engine: KV caches in blocks of one pool, and small inputs on their way to the device. */
import { BLOCK_ROWS, type Paging } from "../../cuda/attention.ts";
import type { PassInputs } from "../../cuda/cycle-block.ts";
import type { Mark, Pinned } from "../../cuda/driver.ts";
import type { CacheShape } from "../cache.ts";
import type { Rows } from "../prefix-cache.ts";
import type { Runtime } from "../runtime.ts";
import { type Binding, DTYPES, type DType, type Tensor } from "../tensor.ts";
import type { DeviceRows } from "./shared-rows.ts";

/** Which blocks each slot's sequence has. Block 0 is nobody's: what has no block of its own yet names it. */
export class Blocks implements Disposable {
  readonly slots: number;
  /** Entries of a slot's table. */
  readonly width: number;
  /** i32 [slots,width] */
  readonly tables: Tensor;
  readonly #runtime: Runtime;
  readonly #host: Pinned;
  /** The tables' last copy. */
  readonly #sent: Mark;
  readonly #held: number[][];
  #free: number[] = [];

  constructor(runtime: Runtime, slots: number, rows: number) {
    this.#runtime = runtime;
    this.slots = slots;
    this.width = Math.ceil(rows / BLOCK_ROWS);
    this.tables = runtime.tensor("i32", slots * this.width, "device");
    this.#host = runtime.cuda!.pinned(slots * this.width * 4);
    this.#sent = runtime.cuda!.mark();
    this.#held = Array.from({ length: slots }, () => []);
    for (let slot = 0; slot < slots; slot++) this.release(slot);
  }

  /** Says how many blocks there are, block 0 aside. */
  fill(count: number): void {
    this.#free = Array.from({ length: count }, (_, i) => count - i);
  }

  /** Blocks that nobody has. */
  get free(): number {
    return this.#free.length;
  }

  /** Gives a slot blocks for its first rows, as far as it has none. Throws an Error when there are none left. */
  reserve(slot: number, rows: number): void {
    const held = this.#held[slot];
    const from = held.length;
    const wanted = Math.min(this.width, Math.ceil(rows / BLOCK_ROWS));
    if (wanted - from > this.#free.length)
      throw new Error(`${rows} rows need ${wanted - from} more blocks of KV cache; ${this.#free.length} are free`);
    while (held.length < wanted) held.push(this.#free.pop()!);
    if (wanted <= from) return;
    this.#table(slot).set(held.slice(from), from);
    this.#send(slot, from, wanted);
  }

  /** Takes a slot's blocks back. Work that was queued for its sequence may still write to them before any other's. */
  release(slot: number): void {
    this.#sent.wait(); // what is on its way must not read what comes after
    this.#free.push(...this.#held[slot].splice(0).reverse());
    this.#table(slot).fill(0);
    this.#send(slot, 0, this.width);
  }

  /** Where a row is among the rows of all blocks. */
  row(slot: number, row: number): number {
    return this.#held[slot][Math.floor(row / BLOCK_ROWS)] * BLOCK_ROWS + (row % BLOCK_ROWS);
  }

  /** Address of a slot's table. */
  table(slot: number): bigint {
    return this.tables.pointer + BigInt(slot * this.width * 4);
  }

  #table(slot: number): Int32Array {
    return new Int32Array(this.#host.buffer, slot * this.width * 4, this.width);
  }

  #send(slot: number, from: number, to: number): void {
    const at = BigInt((slot * this.width + from) * 4);
    this.#runtime.cuda!.upload(this.tables.pointer + at, this.#host.pointer + at, (to - from) * 4);
    this.#sent.record();
  }

  [Symbol.dispose](): void {
    this.tables[Symbol.dispose]();
    this.#sent[Symbol.dispose]();
    this.#runtime.cuda!.freePinned(this.#host);
  }
}

/** Rows of a sequence, or of any other, as blocks of a tensor [blocks,planes,BLOCK_ROWS,width]. */
export function pagedRows(blocks: Blocks, slot: number, pool: Tensor, planes: number, width: number): Rows<DeviceRows> {
  const blockBytes = planes * BLOCK_ROWS * width * DTYPES[pool.dtype].bytes;
  return { data: { base: pool.pointer, table: blocks.table(slot), blockBytes }, heads: planes, count: 0, width };
}

/** Keys and values of a decoder's layers, and the angles of every row of a slot. */
export class PagedCache implements Disposable {
  readonly shape: CacheShape;
  /** [blocks,planes,BLOCK_ROWS,headSize]: of each layer the planes of its keys, then of its values. */
  pool!: Tensor;
  readonly planes: number;
  /** f32 [slots,rows,headSize/2], or [rows,headSize/2] for all slots. */
  readonly cos: Tensor;
  readonly sin: Tensor;
  readonly paging: Paging;
  readonly #runtime: Runtime;
  readonly #blocks: Blocks;
  readonly #dtype: DType;

  constructor(runtime: Runtime, blocks: Blocks, shape: CacheShape, dtype: DType, angles: "shared" | "each") {
    this.shape = shape;
    this.#runtime = runtime;
    this.#blocks = blocks;
    this.#dtype = dtype;
    this.planes = 2 * shape.layers * shape.kvHeads;
    const stride = (blocks.width * BLOCK_ROWS * shape.headSize) / 2;
    const table = () => runtime.tensor("f32", (angles === "each" ? blocks.slots : 1) * stride, "device");
    [this.cos, this.sin] = [table(), table()];
    this.paging = {
      ...{ tables: blocks.tables.pointer, width: blocks.width, angleStride: angles === "each" ? stride : 0 },
      blockStride: this.planes * BLOCK_ROWS * shape.headSize,
    };
  }

  get blockBytes(): number {
    return this.paging.blockStride * DTYPES[this.#dtype].bytes;
  }

  /** Takes memory for so many blocks. */
  fill(count: number): void {
    this.pool = this.#runtime.tensor(this.#dtype, count * this.paging.blockStride, "device");
  }

  /** What moves rows wants to know. */
  get place() {
    const { headSize } = this.shape;
    const { planes, blockBytes } = this;
    return { pointer: this.pool.pointer, planes, rowBytes: headSize * DTYPES[this.#dtype].bytes, blockBytes };
  }

  rows(slot: number): Rows<DeviceRows> {
    return pagedRows(this.#blocks, slot, this.pool, this.planes, this.shape.headSize);
  }

  /** Binds the cache and the inputs of a pass of `tokens` tokens, those of all its sequences. */
  bind(binding: Binding, inputs: PassInputs, tokens: number, sequences = 1): Binding {
    const { ids, positions, masks, control, divided } = inputs;
    const { kvHeads, headSize, layers } = this.shape;
    const at = (pointer: bigint, dtype: DType, n: number) => this.#runtime.at(pointer, dtype, n);
    const dims = [1, kvHeads, BLOCK_ROWS, headSize];
    for (const [i, name] of ["key", "value"].entries())
      for (let layer = 0; layer < layers; layer++) {
        const offset = (2 * layer + i) * kvHeads * BLOCK_ROWS * headSize;
        binding.input(`${name}.${layer}`, this.pool, dims, offset);
      }
    const words = divided ? 8 : 4;
    const angles = [(2 * this.cos.elements) / headSize, headSize / 2];
    binding.input("cos", this.cos, angles).input("sin", this.sin, angles);
    binding.input("ids", at(ids, "i64", tokens), [tokens]);
    binding.input("positions", at(positions, "i32", tokens), [tokens]);
    return binding
      .input("mask", at(masks, "i32", 4 * tokens), [tokens, 4])
      .input("control", at(control, "i32", words * sequences), [sequences, words]);
  }

  [Symbol.dispose](): void {
    for (const tensor of [this.pool, this.cos, this.sin]) tensor?.[Symbol.dispose]();
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
