/** Launches of compiled kernels. */
import koffi from "koffi";
import { api, fail } from "./libcuda.ts";

/** Value of CUfunction_attribute (cuda.h). */
const MAX_DYNAMIC_SHARED = 8;
/** Bytes of dynamic shared memory that a kernel may use without asking. */
const PLAIN_SHARED = 48 * 1024;
/** Bytes of parameters that a kernel can have on every architecture. */
const MOST_PARAMETERS = 4096;

/** Compiled kernels. */
export class Module {
  readonly #handle: bigint;
  readonly #stream: bigint;
  readonly #early: boolean;

  constructor(handle: bigint, stream: bigint, early: boolean) {
    this.#handle = handle;
    this.#stream = stream;
    this.#early = early;
  }

  /** The kernel of that name, which must be `extern "C"`. */
  kernel(name: string): Kernel {
    const out: [bigint] = [0n];
    const result = api.cuModuleGetFunction(out, this.#handle, name) as number;
    if (result !== 0) fail(`kernel ${name}`, result);
    return new Kernel(name, out[0], this.#stream, this.#early);
  }
}

export type Argument = bigint | number | BigUint64Array | { float: number };

/** The structs of a launch, which copies them, so that one of each is enough for all kernels. */
interface Launch {
  /** The kernel's parameters, and void*[MOST_PARAMETERS / 8]: where each is. */
  memory: bigint;
  u64: BigUint64Array;
  i32: Int32Array;
  f32: Float32Array;
  places: bigint;
  pointers: BigUint64Array;
  /** CUlaunchConfig: grid, block, shared memory, then stream and attributes from its bytes 32 on. */
  config: bigint;
  shape: Uint32Array;
  more: BigUint64Array;
}
let launch: Launch | undefined;

/** CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION. */
const EARLY = 6;
const ATTRIBUTE_BYTES = 72;

function newLaunch(): Launch {
  const bytes = [MOST_PARAMETERS, MOST_PARAMETERS, 56, ATTRIBUTE_BYTES];
  const start = koffi.alloc("uint64", bytes.reduce((a, b) => a + b, 0) / 8) as bigint; // biome-ignore format: one line
  const [memory, places, config, attribute] = bytes.map((_, i) => start + BigInt(bytes.slice(0, i).reduce((a, b) => a + b, 0))); // biome-ignore format: one line
  const buffer = koffi.view(memory, MOST_PARAMETERS);
  new Uint32Array(koffi.view(attribute, ATTRIBUTE_BYTES)).set([EARLY, 0, 1]);
  const more = new BigUint64Array(koffi.view(config, 56), 32, 3);
  more[1] = attribute;
  return {
    memory,
    u64: new BigUint64Array(buffer),
    i32: new Int32Array(buffer),
    f32: new Float32Array(buffer),
    places,
    pointers: new BigUint64Array(koffi.view(places, MOST_PARAMETERS)),
    config,
    shape: new Uint32Array(koffi.view(config, 28)),
    more,
  };
}

export class Kernel {
  readonly #name: string;
  readonly #handle: bigint;
  readonly #stream: bigint;
  readonly #early: boolean;
  #shared = PLAIN_SHARED;

  constructor(name: string, handle: bigint, stream: bigint, early: boolean) {
    this.#name = name;
    this.#handle = handle;
    this.#stream = stream;
    this.#early = early;
  }

  /** Gives the driver's result, which is not 0 where the GPU has not so much. */
  #allow(shared: number): number {
    if (shared <= this.#shared) return 0;
    const result = api.cuFuncSetAttribute(this.#handle, MAX_DYNAMIC_SHARED, shared) as number;
    if (result === 0) this.#shared = shared;
    return result;
  }

  /** How many of its clusters, of blocks (1, `blocks`, 1) as the kernel says, the GPU holds at once. */
  mostClusters(blocks: number, threads: number, shared: number): number {
    if (this.#allow(shared) !== 0) return 0;
    launch ??= newLaunch();
    launch.shape.set([1, blocks, 1, threads, 1, 1, shared]);
    launch.more.set([this.#stream, launch.more[1], 0n]);
    const out: [number] = [0];
    const result = api.cuOccupancyMaxActiveClusters(out, this.#handle, launch.config) as number;
    if (result !== 0) fail(`clusters of kernel ${this.#name}`, result);
    return out[0];
  }

  /**
   * Queues the kernel on blocks of `threads` threads with `shared` bytes of dynamic shared memory. Of the arguments a
   * bigint is a pointer, a number an int, {float} a float, an array a struct of 8-byte fields. Their number and kinds are
   * not checked.
   */
  launch(
    [x, y, z]: readonly [number, number, number],
    threads: number,
    shared: number,
    ...args: readonly Argument[]
  ): void {
    const allowed = this.#allow(shared);
    if (allowed !== 0) fail(`${shared} bytes of shared memory for kernel ${this.#name}`, allowed);
    launch ??= newLaunch();
    const { memory, u64, i32, f32, places, pointers, config, shape, more } = launch;
    let [at, count] = [0, 0]; // in units of 4 bytes
    for (const arg of args) {
      if (typeof arg !== "number") at += at & 1;
      pointers[count++] = memory + BigInt(4 * at);
      if (typeof arg === "bigint") {
        u64[at >> 1] = arg;
        at += 2;
      } else if (typeof arg === "number") i32[at++] = arg;
      else if (arg instanceof BigUint64Array) {
        u64.set(arg, at >> 1);
        at += 2 * arg.length;
      } else f32[at++] = arg.float;
    }
    shape.set([x, y, z, threads, 1, 1, shared]);
    more[0] = this.#stream;
    more[2] = this.#early ? 1n : 0n;
    const result = api.cuLaunchKernelEx(config, this.#handle, places, null) as number;
    if (result !== 0) fail(`kernel ${this.#name} on [${x}, ${y}, ${z}] x ${threads}`, result);
  }
}
