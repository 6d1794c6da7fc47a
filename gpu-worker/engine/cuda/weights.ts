/** Weights on the GPU: read from the checkpoint's files, in the graphs' own type, shared by all graphs that ask for the same. */
import { closeSync, openSync, readSync } from "node:fs";
import { CheckpointError } from "../../../shared/errors.ts";
import type { Cuda, Pinned } from "../../cuda/driver.ts";
import type { Elementwise, Float } from "../../cuda/elementwise.ts";
import type { BoundWeight, Graph, StoredTensor } from "../../graph/graph.ts";
import type { FixedInput, Runtime } from "../runtime.ts";
import { DTYPES, type Tensor } from "../tensor.ts";

/** Bytes on their way at a time. */
const PIECE = 64 << 20;

/** Where rows go: to rows, or with a stride to columns, `at` and on; or to where those are of paired halves. */
interface Place {
  at: number;
  /** Of a row; 0: rows stay rows. */
  stride: number;
  paired?: boolean;
}

export class DeviceWeights implements Disposable {
  readonly #runtime: Runtime;
  readonly #cuda: Cuda;
  readonly #kernels: Elementwise;
  readonly #tensors = new Map<string, Tensor>();
  readonly #pinned: Pinned;
  readonly #piece: Tensor;
  /** Bytes of all weights. */
  bytes = 0;

  constructor(runtime: Runtime, cuda: Cuda, kernels: Elementwise) {
    this.#runtime = runtime;
    this.#cuda = cuda;
    this.#kernels = kernels;
    this.#pinned = cuda.pinned(PIECE);
    this.#piece = runtime.tensor("u8", PIECE, "device");
  }

  /** What a graph binds, read now unless another graph has it already. */
  of(graph: Graph): FixedInput[] {
    return [...graph.bound].map(([key, weight]) => {
      const tensor = this.#tensors.get(key) ?? this.#read(weight);
      this.#tensors.set(key, tensor);
      return { name: weight.value.name, tensor, dims: weight.value.shape as number[] };
    });
  }

  #read({ value, parts, turned, picked, rows, columns, paired }: BoundWeight): Tensor {
    const dims = value.shape as number[];
    const tensor = this.#runtime.tensor(value.dtype, dims.reduce((a, b) => a * b, 1), "device"); // biome-ignore format: one line
    this.bytes += tensor.elements * DTYPES[value.dtype].bytes;
    if (rows ?? columns) this.#cuda.fill(tensor.pointer, 0, tensor.elements * DTYPES[value.dtype].bytes);
    let at = 0;
    for (const part of parts) {
      this.#part(tensor, part, { at, stride: turned ? dims[1] : 0, paired }, picked);
      at += picked?.length ?? rows ?? part.shape[0];
    }
    return tensor;
  }

  /** Rows of one stored tensor, all of them or those. */
  #part(to: Tensor, part: StoredTensor, place: Place, rows?: readonly number[]): void {
    const columns = part.shape.slice(1).reduce((a, b) => a * b, 1);
    const rowBytes = columns * DTYPES[part.dtype].bytes;
    const count = rows?.length ?? part.shape[0];
    const most = Math.max(1, Math.floor(PIECE / rowBytes));
    const file = openSync(part.file, "r");
    try {
      for (let from = 0; from < count; from += most) {
        const n = Math.min(most, count - from);
        this.#cuda.synchronize(); // the piece before may still be on its way
        if (rows) for (let i = 0; i < n; i++) this.#fill(file, part, rows[from + i] * rowBytes, i * rowBytes, rowBytes);
        else this.#fill(file, part, from * rowBytes, 0, n * rowBytes);
        this.#place(to, part, { rows: n, columns }, { ...place, at: place.at + from });
      }
    } finally {
      closeSync(file);
    }
  }

  #fill(file: number, { offset, name, file: path }: StoredTensor, from: number, to: number, bytes: number): void {
    const view = new Uint8Array(this.#pinned.buffer, to, bytes);
    for (let done = 0; done < bytes; ) {
      const n = readSync(file, view, done, bytes - done, offset + from + done);
      if (n === 0) throw new CheckpointError(`${path}: ends within tensor ${name}`);
      done += n;
    }
  }

  /** Sends a piece of rows on, in the type that is wanted. */
  #place(
    to: Tensor,
    { dtype }: StoredTensor,
    { rows, columns }: { rows: number; columns: number },
    { at, stride, paired }: Place,
  ): void {
    const bytes = rows * columns * DTYPES[dtype].bytes;
    const first = to.pointer + BigInt(at * columns * DTYPES[to.dtype].bytes);
    if (stride === 0 && dtype === to.dtype) {
      this.#cuda.upload(first, this.#pinned, bytes);
      return;
    }
    this.#cuda.upload(this.#piece.pointer, this.#pinned, bytes);
    const [type, wanted] = [dtype as Float, to.dtype as Float];
    const piece = this.#piece.pointer;
    if (stride === 0) this.#kernels.convert(first, wanted, piece, type, rows * columns);
    else
      this.#kernels.turn({ data: to.pointer, type: wanted, at, stride, paired }, { data: piece, type, rows, columns });
  }

  /** Frees what only reading needs. */
  done(): void {
    this.#cuda.synchronize();
    this.#cuda.freePinned(this.#pinned);
    this.#piece[Symbol.dispose]();
  }

  [Symbol.dispose](): void {
    for (const tensor of this.#tensors.values()) tensor[Symbol.dispose]();
    this.#tensors.clear();
  }
}
