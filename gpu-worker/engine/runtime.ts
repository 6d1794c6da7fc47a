/**
 * Memory, sessions and bindings on ONNX Runtime. The only file that knows its C API; knows nothing of models.
 * One code path for every provider: tensors live on the device ("device") or in memory that JavaScript sees ("host").
 */
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { availableParallelism } from "node:os";
import { dirname, join } from "node:path";
import koffi from "koffi";
import { functions } from "./ort-api.ts";

export type Device = "cpu" | "cuda" | "webgpu";
export type DType = "f32" | "f16" | "bf16" | "u8" | "i8" | "i32" | "i64";
/** Beyond these the passes of small models gain nothing. */
const MOST_THREADS = 8;
type Handle = bigint;
type Dims = readonly number[];

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

type Call = (...args: unknown[]) => unknown;
// When the library object is collected, the library is unloaded and every later call jumps into nothing.
let library: ReturnType<typeof koffi.load>;
let api: Record<keyof typeof functions, Call>;
let environment: Handle;

function check(status: unknown): void {
  if (!status) return;
  const message = api.GetErrorMessage(status) as string;
  api.ReleaseStatus(status);
  throw new Error(`ONNX Runtime: ${message}`);
}

/** Calls a function whose last parameter receives a handle. */
function create(f: Call, ...args: unknown[]): Handle {
  const out: [Handle | null] = [null];
  check(f(...args, out));
  return out[0]!;
}

/** The shared library inside the installed onnxruntime-node. */
function libraryPath(): string {
  const root = dirname(createRequire(import.meta.url).resolve("onnxruntime-node/package.json"));
  const folder = join(root, "bin", "napi-v6", process.platform, process.arch);
  const names = { darwin: "libonnxruntime.1.dylib", win32: "onnxruntime.dll" } as Record<string, string>;
  const path = join(folder, names[process.platform] ?? "libonnxruntime.so.1");
  if (!existsSync(path)) throw new Error(`ONNX Runtime has no build for ${process.platform} ${process.arch}: ${path}`);
  return path;
}

function load(): void {
  if (api) return;
  library = koffi.load(libraryPath());
  const base = library.func("void* OrtGetApiBase()")();
  const getApi = koffi.decode(koffi.decode(base, "void*"), koffi.proto("void* GetApi(uint32_t)"));
  const table = getApi(23);
  api = Object.fromEntries(
    Object.entries(functions).map(([name, [index, signature]]) => {
      const pointer = koffi.decode(table, index * 8, "void*");
      return [name, koffi.decode(pointer, koffi.proto(signature.replace(" f(", ` ${name}(`)))];
    }),
  ) as typeof api;
  environment = create(api.CreateEnv, 3, "vispec");
}

export interface RuntimeOptions {
  device?: Device;
  /** Threads of one pass on the CPU. */
  threads?: number;
}

/** A device and the sessions on it. */
export class Runtime {
  readonly device: Device;
  readonly #threads: number;
  readonly #hostInfo: Handle;
  readonly #hostAllocator: Handle;
  #deviceInfo: Handle;
  #deviceAllocator: Handle | undefined;
  readonly #runOptions: Handle;
  /** Bytes of all tensors that are alive: what a test of leaks looks at. */
  allocatedBytes = 0;

  constructor(options: RuntimeOptions = {}) {
    load();
    this.device = options.device ?? "cpu";
    this.#threads = options.threads ?? Math.min(MOST_THREADS, availableParallelism());
    this.#hostInfo = create(api.CreateMemoryInfo, "Cpu", 0, 0, 0);
    this.#hostAllocator = create(api.GetAllocatorWithDefaultOptions);
    const names = { cpu: "Cpu", cuda: "Cuda", webgpu: "WebGPU_Buf" };
    this.#deviceInfo =
      this.device === "cpu" ? this.#hostInfo : create(api.CreateMemoryInfo, names[this.device], 0, 0, 0);
    if (this.device === "cpu") this.#deviceAllocator = this.#hostAllocator;
    this.#runOptions = create(api.CreateRunOptions);
  }

  /** True where device memory is memory that JavaScript can read and write. */
  get unified(): boolean {
    return this.device === "cpu";
  }

  /**
   * A session of an ONNX model whose external data lies under the root folder (locations are absolute paths without
   * their first slash). `threads` overrides the runtime's.
   */
  session(model: Uint8Array, options: { threads?: number } = {}): Session {
    const settings = create(api.CreateSessionOptions);
    try {
      check(api.SetIntraOpNumThreads(settings, options.threads ?? this.#threads));
      const entries = {
        "session.model_external_initializers_file_folder_path": "/",
        // A pass takes a fraction of a millisecond: threads that spin between passes would starve the other processes.
        "session.intra_op.allow_spinning": "1",
        "session.force_spinning_stop": "1",
        // No limit. By default what folds to more than about 1 GB, e.g. a head of 152k words, is cast in every run.
        "optimization.constant_folding_max_output_size_in_bytes": "0",
      };
      for (const [key, value] of Object.entries(entries)) check(api.AddSessionConfigEntry(settings, key, value));
      this.#appendProvider(settings);
      const session = create(api.CreateSessionFromArray, environment, model, model.length, settings);
      this.#deviceAllocator ??= create(api.CreateAllocator, session, this.#deviceInfo);
      return new Session(session, this.#runOptions, this.unified);
    } finally {
      api.ReleaseSessionOptions(settings);
    }
  }

  #appendProvider(settings: Handle): void {
    if (this.device === "webgpu") check(api.SessionOptionsAppendExecutionProvider(settings, "WebGPU", [], [], 0));
    if (this.device !== "cuda") return;
    const cuda = create(api.CreateCUDAProviderOptions);
    try {
      check(api.UpdateCUDAProviderOptions(cuda, ["device_id", "use_tf32"], ["0", "0"], 2));
      check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(settings, cuda));
    } finally {
      api.ReleaseCUDAProviderOptions(cuda);
    }
  }

  /** Memory for `elements` values: zeros on the host, whatever was there on the device. */
  tensor(dtype: DType, elements: number, where: "host" | "device" = "host"): Tensor {
    const host = where === "host" || this.unified;
    const allocator = host ? this.#hostAllocator : this.#deviceAllocator;
    if (!allocator) throw new Error(`a ${this.device} tensor needs a session on that device first`);
    const bytes = Math.max(1, elements) * DTYPES[dtype].bytes;
    const pointer = create(api.AllocatorAlloc, allocator, bytes);
    this.allocatedBytes += bytes;
    const free = () => {
      this.allocatedBytes -= bytes;
      check(api.AllocatorFree(allocator, pointer));
    };
    const buffer = host ? koffi.view(pointer, bytes) : undefined;
    if (buffer && where === "host") new Uint8Array(buffer).fill(0);
    return new Tensor(dtype, elements, pointer, host ? this.#hostInfo : this.#deviceInfo, free, buffer);
  }
}

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

/** A compiled graph. */
export class Session implements Disposable {
  readonly #handle: Handle;
  readonly #runOptions: Handle;
  readonly #unified: boolean;

  constructor(handle: Handle, runOptions: Handle, unified: boolean) {
    this.#handle = handle;
    this.#runOptions = runOptions;
    this.#unified = unified;
  }

  binding(): Binding {
    return new Binding(this.#handle, this.#runOptions, create(api.CreateIoBinding, this.#handle), this.#unified);
  }

  [Symbol.dispose](): void {
    api.ReleaseSession(this.#handle);
  }
}

/** Inputs and outputs of a session's runs. What is bound stays bound, so a repeated pass is one call. */
export class Binding implements Disposable {
  readonly #session: Handle;
  readonly #runOptions: Handle;
  readonly #handle: Handle;
  /**
   * What binds each input and output again before a run, on devices with memory of their own: there binding a host input
   * copies it, and a run replaces a bound output that another provider's kernel produced (a fallback to the CPU).
   */
  readonly #again: Map<string, () => void> | undefined;

  constructor(session: Handle, runOptions: Handle, handle: Handle, unified: boolean) {
    this.#session = session;
    this.#runOptions = runOptions;
    this.#handle = handle;
    this.#again = unified ? undefined : new Map();
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

  /** Runs the graph; returns when every output is there. */
  run(): void {
    if (this.#again) for (const bind of this.#again.values()) bind();
    check(api.RunWithBinding(this.#session, this.#runOptions, this.#handle));
  }

  [Symbol.dispose](): void {
    api.ReleaseIoBinding(this.#handle);
  }
}
