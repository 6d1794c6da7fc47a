/**
 * Memory, sessions and bindings on ONNX Runtime. The only file that knows its C API; knows nothing of models.
 * One code path for every provider: tensors live on the device ("device") or in memory that JavaScript sees ("host").
 */
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { availableParallelism } from "node:os";
import { dirname, join } from "node:path";
import koffi from "koffi";
import { CheckpointError } from "../../shared/errors.ts";
import { Cuda } from "../cuda/driver.ts";
import { type CustomOp, customOp, type KernelApi } from "./custom-op.ts";
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

/** How operators of our own reach their tensors. */
const kernelApi: KernelApi = {
  input(context, index) {
    const value = create(api.KernelContext_GetInput, context, index);
    return value ? create(api.GetTensorMutableData, value) : 0n;
  },
  output(context, index, dims) {
    return create(api.GetTensorMutableData, create(api.KernelContext_GetOutput, context, index, dims, dims.length));
  },
  dims(context) {
    const info = create(api.GetTensorTypeAndShape, create(api.KernelContext_GetInput, context, 0));
    const dims = new BigInt64Array(2);
    check(api.GetDimensions(info, dims, 2));
    api.ReleaseTensorTypeAndShapeInfo(info);
    return dims;
  },
};

/** An input of every run of a session: weights, where they are no constants of the graph. */
export interface FixedInput {
  name: string;
  tensor: Tensor;
  dims: Dims;
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
  /** The device's own interface, on CUDA: sessions run on its stream, and a run returns before it is done. */
  readonly cuda: Cuda | undefined;
  #customOps: Handle | undefined;
  /** What an operator of our own threw in the run that is under way. */
  readonly #failure: { error: unknown } = { error: undefined };

  constructor(options: RuntimeOptions = {}) {
    load();
    this.device = options.device ?? "cpu";
    this.#threads = options.threads ?? Math.min(MOST_THREADS, availableParallelism());
    this.#hostInfo = create(api.CreateMemoryInfo, "Cpu", 0, 0, 0);
    this.#hostAllocator = create(api.GetAllocatorWithDefaultOptions);
    if (this.device === "cuda") {
      try {
        this.cuda = Cuda.open();
      } catch (error) {
        throw new CheckpointError(`device cuda: ${(error as Error).message}`, { cause: error });
      }
      const provider = join(dirname(libraryPath()), "libonnxruntime_providers_cuda.so");
      if (!existsSync(provider))
        throw new CheckpointError(
          `${provider} is missing: npm run cuda (vispec cuda) fetches ONNX Runtime's CUDA provider`,
        );
    }
    const names = { cpu: "Cpu", cuda: "Cuda", webgpu: "WebGPU_Buf" };
    this.#deviceInfo =
      this.device === "cpu" ? this.#hostInfo : create(api.CreateMemoryInfo, names[this.device], 0, 0, 0);
    if (this.device === "cpu") this.#deviceAllocator = this.#hostAllocator;
    this.#runOptions = create(api.CreateRunOptions);
    if (this.cuda) check(api.AddRunConfigEntry(this.#runOptions, "disable_synchronize_execution_providers", "1"));
  }

  /** Makes operators known to all later sessions. */
  addCustomOps(domain: string, ops: readonly CustomOp[]): void {
    const failed = (error: unknown) => {
      this.#failure.error ??= error;
    };
    this.#customOps = create(api.CreateCustomOpDomain, domain);
    const provider = this.cuda && "CUDAExecutionProvider";
    for (const op of ops) check(api.CustomOpDomain_Add(this.#customOps, customOp(op, kernelApi, failed, provider)));
  }

  /** True where device memory is memory that JavaScript can read and write. */
  get unified(): boolean {
    return this.device === "cpu";
  }

  /**
   * A session of an ONNX model whose external data lies under the root folder (locations are absolute paths without
   * their first slash). `threads` overrides the runtime's.
   */
  session(model: Uint8Array, options: { threads?: number; fixed?: readonly FixedInput[] } = {}): Session {
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
      if (this.#customOps) check(api.AddCustomOpDomain(settings, this.#customOps));
      const session = create(api.CreateSessionFromArray, environment, model, model.length, settings);
      if (!this.cuda) this.#deviceAllocator ??= create(api.CreateAllocator, session, this.#deviceInfo);
      const run = this.#customOps ? this.#runCustom : (handle: Handle, binding: Handle) => this.#run(handle, binding);
      // On CUDA a session lives as long as the process: buffers that it frees on the stream can bring its allocator down
      // with them, in a callback that may not call CUDA, which ends the process (seen with ONNX Runtime 1.29).
      const release = () => this.cuda || api.ReleaseSession(session);
      return new Session(session, { run, release }, this.device === "webgpu", options.fixed ?? []);
    } finally {
      api.ReleaseSessionOptions(settings);
    }
  }

  #run(session: Handle, binding: Handle): void {
    check(api.RunWithBinding(session, this.#runOptions, binding));
  }

  readonly #runCustom = (session: Handle, binding: Handle): void => {
    try {
      this.#run(session, binding);
    } catch (error) {
      this.#failure.error ??= error; // what an operator threw comes first: this is what followed
    }
    const { error } = this.#failure;
    this.#failure.error = undefined;
    if (error) throw error;
  };

  #appendProvider(settings: Handle): void {
    if (this.device === "webgpu") check(api.SessionOptionsAppendExecutionProvider(settings, "WebGPU", [], [], 0));
    if (!this.cuda) return;
    const options = {
      device_id: "0",
      has_user_compute_stream: "1",
      user_compute_stream: String(this.cuda.stream),
      use_tf32: "0",
      // Else sums of squares are made in the type of the input.
      enable_skip_layer_norm_strict_mode: "1",
    };
    // What falls back to the CPU would cross to the host in every pass, and cannot be captured.
    check(api.AddSessionConfigEntry(settings, "session.disable_cpu_ep_fallback", "1"));
    const cuda = create(api.CreateCUDAProviderOptions);
    try {
      const [keys, values] = [Object.keys(options), Object.values(options)];
      check(api.UpdateCUDAProviderOptions(cuda, keys, values, keys.length));
      check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(settings, cuda));
    } finally {
      api.ReleaseCUDAProviderOptions(cuda);
    }
  }

  /** Memory for `elements` values: zeros on the host, whatever was there on the device. */
  tensor(dtype: DType, elements: number, where: "host" | "device" = "host"): Tensor {
    const host = where === "host" || this.unified;
    if (!host && this.cuda) return this.#cudaTensor(this.cuda, dtype, elements);
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

  /** Device memory that someone else owns. */
  at(pointer: Handle, dtype: DType, elements: number): Tensor {
    return new Tensor(dtype, elements, pointer, this.#deviceInfo, () => {});
  }

  #cudaTensor(cuda: Cuda, dtype: DType, elements: number): Tensor {
    const bytes = Math.max(1, elements) * DTYPES[dtype].bytes;
    const pointer = cuda.alloc(bytes);
    this.allocatedBytes += bytes;
    const free = () => {
      this.allocatedBytes -= bytes;
      cuda.free(pointer);
    };
    return new Tensor(dtype, elements, pointer, this.#deviceInfo, free);
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

interface Does {
  run(session: Handle, binding: Handle): void;
  release(): unknown;
}

/** A compiled graph. */
export class Session implements Disposable {
  readonly #handle: Handle;
  readonly #does: Does;
  readonly #rebinds: boolean;
  readonly #fixed: readonly FixedInput[];

  constructor(handle: Handle, does: Does, rebinds: boolean, fixed: readonly FixedInput[]) {
    this.#handle = handle;
    this.#does = does;
    this.#rebinds = rebinds;
    this.#fixed = fixed;
  }

  binding(): Binding {
    const run = (binding: Handle) => this.#does.run(this.#handle, binding);
    const binding = new Binding(run, create(api.CreateIoBinding, this.#handle), this.#rebinds);
    for (const { name, tensor, dims } of this.#fixed) binding.input(name, tensor, dims);
    return binding;
  }

  [Symbol.dispose](): void {
    this.#does.release();
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
