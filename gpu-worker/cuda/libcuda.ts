/** The calls of the CUDA driver that this project makes, through koffi, and their errors. */
import koffi from "koffi";
import { type Call, declare, load } from "./nvrtc.ts";

// Handles and device pointers are void* to koffi, which gives bigints for these whatever their size.
const functions = {
  cuInit: "int f(uint flags)",
  cuDriverGetVersion: "int f(_Out_ int* version)",
  cuGetErrorName: "int f(int result, _Out_ const char** name)",
  cuGetErrorString: "int f(int result, _Out_ const char** text)",
  cuDeviceGet: "int f(_Out_ int* device, int index)",
  cuDeviceGetName: "int f(void* name, int bytes, int device)",
  cuDeviceGetAttribute: "int f(_Out_ int* value, int attribute, int device)",
  cuDevicePrimaryCtxRetain: "int f(_Out_ void** context, int device)",
  cuCtxSetCurrent: "int f(void* context)",
  cuMemGetInfo_v2: "int f(_Out_ size_t* free, _Out_ size_t* total)",
  cuMemAlloc_v2: "int f(_Out_ void** pointer, size_t bytes)",
  cuMemFree_v2: "int f(void* pointer)",
  cuMemHostAlloc: "int f(_Out_ void** pointer, size_t bytes, uint flags)",
  cuMemFreeHost: "int f(void* pointer)",
  cuMemcpyAsync: "int f(void* to, void* from, size_t bytes, void* stream)",
  cuMemsetD8Async: "int f(void* to, uint8 byte, size_t bytes, void* stream)",
  cuStreamCreate: "int f(_Out_ void** stream, uint flags)",
  cuStreamSynchronize: "int f(void* stream)",
  cuStreamBeginCapture_v2: "int f(void* stream, int mode)",
  cuStreamEndCapture: "int f(void* stream, _Out_ void** graph)",
  cuGraphInstantiateWithFlags: "int f(_Out_ void** exec, void* graph, uint64 flags)",
  cuGraphLaunch: "int f(void* exec, void* stream)",
  cuGraphExecDestroy: "int f(void* exec)",
  cuGraphDestroy: "int f(void* graph)",
  cuEventCreate: "int f(_Out_ void** event, uint flags)",
  cuEventDestroy_v2: "int f(void* event)",
  cuEventRecord: "int f(void* event, void* stream)",
  cuEventSynchronize: "int f(void* event)",
  cuEventElapsedTime: "int f(_Out_ float* ms, void* from, void* to)",
  cuModuleLoadData: "int f(_Out_ void** module, void* image)",
  cuModuleGetFunction: "int f(_Out_ void** kernel, void* module, const char* name)",
  cuFuncSetAttribute: "int f(void* kernel, int attribute, int value)",
  cuOccupancyMaxActiveClusters: "int f(_Out_ int* clusters, void* kernel, void* config)",
  cuTensorMapEncodeTiled:
    "int f(void* map, int type, uint rank, void* address, void* dims, void* strides, void* box, void* steps, int interleave, int swizzle, int promotion, int fill)",
  cuLaunchKernelEx: "int f(void* config, void* kernel, void* params, void* extra)",
} as const;
type Name = keyof typeof functions;

// When the library object is collected, the library is unloaded and every later call jumps into nothing.
let library: ReturnType<typeof koffi.load>;
export let api: Record<Name, Call>;

/** @throws Error with CUDA's name and words for a result that is not 0. */
export function fail(name: string, result: number): never {
  const texts = (["cuGetErrorName", "cuGetErrorString"] as const).map((get) => {
    const out: [string | null] = [null];
    api[get](result, out);
    return out[0] ?? `error ${result}`;
  });
  throw new Error(`CUDA: ${name}: ${texts[0]} (${texts[1]})`);
}

/** Calls a function. @throws Error that names it when its result is not 0. */
export function call(name: Name, ...args: unknown[]): void {
  const result = api[name](...args) as number;
  if (result !== 0) fail(name, result);
}

/** Calls a function whose first parameter receives the answer. */
export function get<T = bigint>(name: Name, ...args: unknown[]): T {
  const out: [T | null] = [null];
  call(name, out, ...args);
  return out[0]!;
}

/** Loads the driver, once. @throws Error that says what is missing: the driver, or a GPU. */
export function loadDriver(): void {
  if (!api) {
    library = load(["libcuda.so.1"], "libcuda.so.1 was not found: no NVIDIA driver on this machine");
    api = declare(library, functions);
  }
  call("cuInit", 0); // also after one that failed; it does nothing after one that did not
}

/** Values of CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion. */
const [U16, SWIZZLE_128, PROMOTE_256] = [1, 3, 3];
const MAP_WORDS = 16;
/** A map must be made at a multiple of so many bytes. */
const MAP_ALIGNMENT = 64;
let mapMemory: { at: bigint; words: BigUint64Array } | undefined;

/**
 * What tells the copy engine how a matrix of 16-bit values lies, [rows,columns], and which boxes of it are brought: in
 * rows of 128 swizzled bytes, with zeros outside of the matrix.
 */
export function tensorMap(
  address: bigint,
  [columns, rows]: readonly [number, number],
  [boxColumns, boxRows]: readonly [number, number],
): BigUint64Array {
  if (!mapMemory) {
    const memory = koffi.alloc("uint64", 2 * MAP_WORDS) as bigint;
    const at = memory + BigInt(MAP_ALIGNMENT) - (memory % BigInt(MAP_ALIGNMENT));
    mapMemory = { at, words: new BigUint64Array(koffi.view(at, 8 * MAP_WORDS)) };
  }
  const dims = BigUint64Array.of(BigInt(columns), BigInt(rows));
  const strides = BigUint64Array.of(BigInt(2 * columns));
  const [box, steps] = [Uint32Array.of(boxColumns, boxRows), Uint32Array.of(1, 1)];
  call(
    "cuTensorMapEncodeTiled",
    mapMemory.at,
    U16,
    2,
    address,
    dims,
    strides,
    box,
    steps,
    0,
    SWIZZLE_128,
    PROMOTE_256,
    0,
  );
  return mapMemory.words.slice();
}
