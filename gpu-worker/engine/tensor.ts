/** Memory that graphs read and write, and what binds it to their inputs and outputs. Knows no session and no device. */
import { api, type Call, check, create, type Handle } from "./ort-api.ts";

export type DType = "f32" | "f16" | "bf16" | "u8" | "i8" | "i32" | "i64";
export type Dims = readonly number[];

/** ONNXTensorElementDataType and bytes an element. */
export const DTYPES: Record<DType, { onnx: number; bytes: number }> = {
  f32: { onnx: 1, bytes: 4 },
  u8: { onnx: 2, bytes: 1 },
  i8: { onnx: 3, bytes: 1 },
  i32: { onnx: 6, bytes: 4 },
  i64: { onnx: 7, bytes: 8 },
  f16: { onnx: 10, bytes: 2 },
  bf16: { onnx: 16, bytes: 2 },
};

/** A piece of memory; a binding gives it its shape. */
export class Tensor implements Disposable {
  readonly dtype: DType;
  readonly elements: number;
  readonly pointer: Handle;
  readonly info: Handle;
  readonly #free: () => void;
  readonly #buffer: ArrayBuffer | undefined;
  #alive = true;

  constructor(dtype: DType, elements: number, pointer: Handle, info: Handle, free: () => void, buffer?: ArrayBuffer) {
    this.dtype = dtype;
    this.elements = elements;
    this.pointer = pointer;
    this.info = info;
    this.#free = free;
    this.#buffer = buffer;
  }

  #host(dtype: DType): ArrayBuffer {
    if (!this.#alive) throw new Error("tensor was freed");
    if (!this.#buffer) throw new Error("tensor is on the device");
    if (dtype !== this.dtype) throw new Error(`tensor holds ${this.dtype}, not ${dtype}`);
    return this.#buffer;
  }

  /** Views of host memory. Not to be kept beyond the tensor's life. */
  get f32(): Float32Array<ArrayBuffer> {
    return new Float32Array(this.#host("f32"), 0, this.elements);
  }
  get i32(): Int32Array<ArrayBuffer> {
    return new Int32Array(this.#host("i32"), 0, this.elements);
  }
  get i64(): BigInt64Array<ArrayBuffer> {
    return new BigInt64Array(this.#host("i64"), 0, this.elements);
  }

  [Symbol.dispose](): void {
    if (!this.#alive) return;
    this.#alive = false;
    this.#free();
  }
}

/** Inputs and outputs of a session's runs. What is bound stays bound, so a repeated pass is one call. */
export class Binding implements Disposable {
  readonly #run: (binding: Handle) => void;
  readonly #handle: Handle;
  /**
   * What binds each input and output again before a run, on WebGPU: there binding a host input copies it, and a run
   * replaces a bound output that another provider's kernel produced (a fallback to the CPU). On CUDA all that is bound lies
   * on the device.
   */
  readonly #again: Map<string, () => void> | undefined;

  constructor(run: (binding: Handle) => void, handle: Handle, rebinds: boolean) {
    this.#run = run;
    this.#handle = handle;
    this.#again = rebinds ? new Map() : undefined;
  }

  /** Binds elements of `tensor` from `offset` on, shaped `dims`, as an input. */
  input(name: string, tensor: Tensor, dims: Dims, offset = 0): this {
    return this.#keep(`input ${name}`, () => this.#bind(api.BindInput, name, tensor, dims, offset));
  }

  /** Binds an output; the same memory may be an input too (a KV cache that grows in place). */
  output(name: string, tensor: Tensor, dims: Dims, offset = 0): this {
    return this.#keep(`output ${name}`, () => this.#bind(api.BindOutput, name, tensor, dims, offset));
  }

  #keep(key: string, bind: () => void): this {
    if (this.#again) this.#again.set(key, bind);
    else bind();
    return this;
  }

  #bind(bind: Call, name: string, tensor: Tensor, dims: Dims, offset: number): void {
    const elements = dims.reduce((a, b) => a * b, 1);
    if (offset + elements > tensor.elements)
      throw new Error(`${name}: [${dims}] from ${offset} does not fit ${tensor.elements} elements`);
    const { onnx, bytes } = DTYPES[tensor.dtype];
    const value = create(
      api.CreateTensorWithDataAsOrtValue,
      tensor.info,
      tensor.pointer + BigInt(offset * bytes),
      elements * bytes,
      BigInt64Array.from(dims, BigInt),
      dims.length,
      onnx,
    );
    try {
      check(bind(this.#handle, name, value));
    } finally {
      api.ReleaseValue(value); // the binding holds its own reference
    }
  }

  /** Runs the graph; returns when every output is there, on CUDA when all of it is queued. */
  run(): void {
    if (this.#again) for (const bind of this.#again.values()) bind();
    this.#run(this.#handle);
  }

  [Symbol.dispose](): void {
    api.ReleaseIoBinding(this.#handle);
  }
}
