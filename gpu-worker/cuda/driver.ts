/**
 * The CUDA driver: memory, copies, kernels and captured graphs on one stream of the first GPU. Knows nothing of models,
 * nor of ONNX Runtime, whose CUDA provider uses the same (primary) context and can be given the same stream.
 */
import koffi from "koffi";
import { Module } from "./kernel.ts";
import { api, call, fail, get, loadDriver } from "./libcuda.ts";
import { cachedCubin } from "./nvrtc.ts";

/** Values of CUdevice_attribute, CUfunction_attribute, CUstream_flags and CUstreamCaptureMode (cuda.h). */
const MULTIPROCESSORS = 16;
const CAPABILITY = { major: 75, minor: 76 };
const NON_BLOCKING = 1;
const UNTIMED = 2;
const RELAXED = 2;
const OUT_OF_MEMORY = 2;

/** Memory of the host that stays where it is. Kernels may read and write it too, at the same address, by PCIe. */
export interface Pinned {
  pointer: bigint;
  buffer: ArrayBuffer;
}

/** What every source may use. */
const PRELUDE = `
__device__ __forceinline__ void awaitInputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void letFollow() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#line 1
`;

let opened: Cuda | undefined;

/**
 * The first GPU. All work goes to one stream, in order; only `synchronize`, `milliseconds`, what `timed` gives, marks, `free` and `healthy` wait for it. Errors of
 * kernels show in a later call, as CUDA has it.
 */
export class Cuda {
  readonly name: string;
  /** CUstream. It does not wait for the default stream. */
  readonly stream: bigint;
  readonly multiprocessors: number;
  /** Compute capability as NVRTC writes it, e.g. sm_90. */
  readonly arch: string;
  /** Bytes. */
  readonly totalMemory: number;
  readonly #newest: number;
  #events: [bigint, bigint] | undefined;

  /** The one of this process. @throws Error that says what is missing: the driver, or a GPU. */
  static open(): Cuda {
    opened ??= new Cuda();
    return opened;
  }

  private constructor() {
    loadDriver();
    this.#newest = Math.floor(get<number>("cuDriverGetVersion") / 1000);
    const device = get<number>("cuDeviceGet", 0);
    const attribute = (id: number) => get<number>("cuDeviceGetAttribute", id, device);
    const name = Buffer.alloc(256);
    call("cuDeviceGetName", name, name.length, device);
    this.name = name.toString("latin1", 0, name.indexOf(0));
    this.multiprocessors = attribute(MULTIPROCESSORS);
    this.arch = `sm_${attribute(CAPABILITY.major)}${attribute(CAPABILITY.minor)}`;
    call("cuCtxSetCurrent", get("cuDevicePrimaryCtxRetain", device));
    this.totalMemory = this.#memory()[1];
    this.stream = get("cuStreamCreate", NON_BLOCKING);
  }

  #memory(): [free: number, total: number] {
    const [free, total]: [number | bigint][] = [[0], [0]];
    call("cuMemGetInfo_v2", free, total);
    return [Number(free[0]), Number(total[0])];
  }

  /** Bytes that are free at this moment. */
  get freeMemory(): number {
    return this.#memory()[0];
  }

  /** Device memory, with whatever was there. */
  alloc(bytes: number): bigint {
    const out: [bigint] = [0n];
    const result = api.cuMemAlloc_v2(out, bytes) as number;
    if (result === OUT_OF_MEMORY)
      throw new Error(`CUDA: no room for ${bytes} bytes on the ${this.name}: ${this.freeMemory} are free`);
    if (result !== 0) fail("cuMemAlloc_v2", result);
    return out[0];
  }

  /** Waits for all work on the device. */
  free(pointer: bigint): void {
    call("cuMemFree_v2", pointer);
  }

  pinned(bytes: number): Pinned {
    const pointer = get("cuMemHostAlloc", bytes, 0);
    return { pointer, buffer: koffi.view(pointer, bytes) };
  }

  /** The buffer is empty from then on; what was sent to or from it must be over. */
  freePinned({ pointer, buffer }: Pinned): void {
    buffer.transfer(0);
    call("cuMemFreeHost", pointer);
  }

  /** Queues a copy to the device, from the host or the device. */
  upload(to: bigint, from: Pinned | bigint, bytes: number): void {
    call("cuMemcpyAsync", to, typeof from === "bigint" ? from : from.pointer, bytes, this.stream);
  }

  /** Queues a copy from the device; what it brings is there after `synchronize`. */
  download(to: Pinned | bigint, from: bigint, bytes: number): void {
    call("cuMemcpyAsync", typeof to === "bigint" ? to : to.pointer, from, bytes, this.stream);
  }

  /** Queues setting every one of the bytes to `byte`. */
  fill(pointer: bigint, byte: number, bytes: number): void {
    call("cuMemsetD8Async", pointer, byte, bytes, this.stream);
  }

  /** False after an error that no later call recovers from (a fault in a kernel, a lost device). */
  get healthy(): boolean {
    return api.cuStreamSynchronize(this.stream) === 0;
  }

  /** Waits until everything that was queued is done. */
  synchronize(): void {
    call("cuStreamSynchronize", this.stream);
  }

  /**
   * Compiles a source that includes nothing, after PRELUDE; `name` is what errors call it. Where every kernel says
   * `awaitInputs();` before it reads or writes what others write, kernels start while those before run, if the GPU can
   * (sm_90 and later): when the blocks before have all ended, or said `letFollow();`.
   * @throws Error with the compiler's log.
   */
  compile(source: string, defines: Record<string, number>, name?: string): Module {
    // What only Hopper has (its tensor cores' own instructions) is compiled for that architecture alone.
    const arch = this.arch === "sm_90" ? "sm_90a" : this.arch;
    const cubin = cachedCubin(PRELUDE + source, defines, arch, { name, newest: this.#newest });
    const early = source.includes("awaitInputs();") && Number(this.arch.slice(3)) >= 90;
    return new Module(get("cuModuleLoadData", cubin), this.stream, early);
  }

  /**
   * The work that `run` queues, as a graph that can be launched any number of times; none of it is done now. What `run`
   * throws goes on. Memory must not be allocated or freed by it, and nothing may wait for the stream.
   */
  capture(run: () => void): CapturedGraph {
    call("cuStreamBeginCapture_v2", this.stream, RELAXED);
    try {
      run();
    } catch (error) {
      const graph: [bigint | null] = [null];
      // Its status does not matter: what went wrong is `error`, and the stream is usable again in any case.
      api.cuStreamEndCapture(this.stream, graph);
      if (graph[0]) api.cuGraphDestroy(graph[0]);
      throw error;
    }
    const out: [bigint] = [0n];
    call("cuStreamEndCapture", this.stream, out);
    try {
      return new CapturedGraph(get("cuGraphInstantiateWithFlags", out[0], 0), this.stream);
    } finally {
      call("cuGraphDestroy", out[0]);
    }
  }

  /** A place in the stream, to be waited for. */
  mark(): Mark {
    return new Mark(get("cuEventCreate", UNTIMED), this.stream);
  }

  /** Milliseconds that the device takes for what `run` queues; waits for it. */
  milliseconds(run: () => void): number {
    return this.timed(run)();
  }

  /** Queues what `run` does; what this gives waits for it, but not for what was queued since, and gives milliseconds. */
  timed(run: () => void): () => number {
    this.#events ??= [get("cuEventCreate", 0), get("cuEventCreate", 0)];
    const [from, to] = this.#events;
    call("cuEventRecord", from, this.stream);
    run();
    call("cuEventRecord", to, this.stream);
    return () => {
      call("cuEventSynchronize", to);
      return get<number>("cuEventElapsedTime", from, to);
    };
  }
}

/** A place in the stream. */
export class Mark implements Disposable {
  readonly #event: bigint;
  readonly #stream: bigint;

  constructor(event: bigint, stream: bigint) {
    this.#event = event;
    this.#stream = stream;
  }

  /** It is now behind all that was queued. */
  record(): void {
    call("cuEventRecord", this.#event, this.#stream);
  }

  /** Waits for what is before it, if it was ever recorded. */
  wait(): void {
    call("cuEventSynchronize", this.#event);
  }

  [Symbol.dispose](): void {
    call("cuEventDestroy_v2", this.#event);
  }
}

/** Work that was captured. */
export class CapturedGraph implements Disposable {
  readonly #exec: bigint;
  readonly #stream: bigint;

  constructor(exec: bigint, stream: bigint) {
    this.#exec = exec;
    this.#stream = stream;
  }

  /** Queues the work once more. */
  launch(): void {
    call("cuGraphLaunch", this.#exec, this.#stream);
  }

  [Symbol.dispose](): void {
    call("cuGraphExecDestroy", this.#exec);
  }
}
