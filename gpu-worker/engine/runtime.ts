/**
 * Memory and sessions on ONNX Runtime, through its C API; knows nothing of models.
 * One code path for every provider: tensors live on the device ("device") or in memory that JavaScript sees ("host").
 */
import { existsSync } from "node:fs";
import { availableParallelism } from "node:os";
import { dirname, join } from "node:path";
import koffi from "koffi";
import { CheckpointError } from "../../shared/errors.ts";
import { Cuda } from "../cuda/driver.ts";
import { type CustomOp, customOp, type KernelApi } from "./custom-op.ts";
import { api, check, create, environment, type Handle, libraryPath, loadOrt } from "./ort-api.ts";
import { Binding, type Dims, DTYPES, type DType, Tensor } from "./tensor.ts";

export type Device = "cpu" | "cuda" | "webgpu";
/** Beyond these the passes of small models gain nothing. */
const MOST_THREADS = 8;

/** How operators of our own reach their tensors. */
const kernelApi: KernelApi = {
  input(context, index) {
    const value = create(api.KernelContext_GetInput, context, index);
    return value ? create(api.GetTensorMutableData, value) : 0n;
  },
  output(context, index, dims) {
    return create(api.GetTensorMutableData, create(api.KernelContext_GetOutput, context, index, dims, dims.length));
  },
  dims(context, index) {
    const info = create(api.GetTensorTypeAndShape, create(api.KernelContext_GetInput, context, index));
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
    loadOrt();
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
