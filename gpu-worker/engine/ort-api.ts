/**
 * ONNX Runtime's C API as this project calls it: each function's index in OrtApi (ONNX Runtime 1.29) and its C signature,
 * the library that has them, and what their statuses say.
 */
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import koffi from "koffi";

/** Index in `struct OrtApi` and parameters; every function but the releases returns an OrtStatus*, null when all is well. */
const functions = {
  GetErrorMessage: [2, "const char* f(void* status)"],
  CreateEnv: [3, "void* f(int level, const char* id, _Out_ void** out)"],
  CreateSessionFromArray: [8, "void* f(void* env, void* data, size_t length, void* options, _Out_ void** out)"],
  CreateSessionOptions: [10, "void* f(_Out_ void** out)"],
  SetIntraOpNumThreads: [24, "void* f(void* options, int n)"],
  CreateCustomOpDomain: [26, "void* f(const char* name, _Out_ void** out)"],
  CustomOpDomain_Add: [27, "void* f(void* domain, void* op)"],
  AddCustomOpDomain: [28, "void* f(void* options, void* domain)"],
  CreateRunOptions: [39, "void* f(_Out_ void** out)"],
  CreateTensorWithDataAsOrtValue: [
    49,
    "void* f(void* info, void* data, size_t bytes, void* dims, size_t rank, int type, _Out_ void** out)",
  ],
  GetTensorMutableData: [51, "void* f(void* value, _Out_ void** out)"],
  GetDimensions: [62, "void* f(void* info, void* dims, size_t rank)"],
  GetTensorTypeAndShape: [65, "void* f(void* value, _Out_ void** out)"],
  CreateMemoryInfo: [68, "void* f(const char* name, int kind, int id, int mem, _Out_ void** out)"],
  AllocatorAlloc: [75, "void* f(void* allocator, size_t bytes, _Out_ void** out)"],
  AllocatorFree: [76, "void* f(void* allocator, void* data)"],
  GetAllocatorWithDefaultOptions: [78, "void* f(_Out_ void** out)"],
  KernelContext_GetInput: [90, "void* f(void* context, size_t index, _Out_ void** out)"],
  KernelContext_GetOutput: [91, "void* f(void* context, size_t index, void* dims, size_t rank, _Out_ void** out)"],
  ReleaseStatus: [93, "void f(void* status)"],
  ReleaseSession: [95, "void f(void* session)"],
  ReleaseValue: [96, "void f(void* value)"],
  ReleaseTensorTypeAndShapeInfo: [99, "void f(void* info)"],
  ReleaseSessionOptions: [100, "void f(void* options)"],
  AddSessionConfigEntry: [130, "void* f(void* options, const char* key, const char* value)"],
  CreateAllocator: [131, "void* f(void* session, void* info, _Out_ void** out)"],
  RunWithBinding: [133, "void* f(void* session, void* run, void* binding)"],
  CreateIoBinding: [134, "void* f(void* session, _Out_ void** out)"],
  ReleaseIoBinding: [135, "void f(void* binding)"],
  BindInput: [136, "void* f(void* binding, const char* name, void* value)"],
  BindOutput: [137, "void* f(void* binding, const char* name, void* value)"],
  AddRunConfigEntry: [165, "void* f(void* options, const char* key, const char* value)"],
  SessionOptionsAppendExecutionProvider_CUDA_V2: [204, "void* f(void* options, void* cuda)"],
  CreateCUDAProviderOptions: [205, "void* f(_Out_ void** out)"],
  UpdateCUDAProviderOptions: [206, "void* f(void* cuda, const char** keys, const char** values, size_t n)"],
  ReleaseCUDAProviderOptions: [208, "void f(void* cuda)"],
  SessionOptionsAppendExecutionProvider: [
    216,
    "void* f(void* options, const char* name, const char** keys, const char** values, size_t n)",
  ],
} as const satisfies Record<string, readonly [number, string]>;

export type Handle = bigint;
export type Call = (...args: unknown[]) => unknown;
// When the library object is collected, the library is unloaded and every later call jumps into nothing.
let library: ReturnType<typeof koffi.load>;
export let api: Record<keyof typeof functions, Call>;
export let environment: Handle;

/** @throws Error with ONNX Runtime's words for a status that is not null. */
export function check(status: unknown): void {
  if (!status) return;
  const message = api.GetErrorMessage(status) as string;
  api.ReleaseStatus(status);
  throw new Error(`ONNX Runtime: ${message}`);
}

/** Calls a function whose last parameter receives a handle. */
export function create(f: Call, ...args: unknown[]): Handle {
  const out: [Handle | null] = [null];
  check(f(...args, out));
  return out[0]!;
}

/** The shared library inside the installed onnxruntime-node. */
export function libraryPath(): string {
  const root = dirname(createRequire(import.meta.url).resolve("onnxruntime-node/package.json"));
  const folder = join(root, "bin", "napi-v6", process.platform, process.arch);
  const names = { darwin: "libonnxruntime.1.dylib", win32: "onnxruntime.dll" } as Record<string, string>;
  const path = join(folder, names[process.platform] ?? "libonnxruntime.so.1");
  if (!existsSync(path)) throw new Error(`ONNX Runtime has no build for ${process.platform} ${process.arch}: ${path}`);
  return path;
}

/** Loads the library, once. @throws Error where there is no build of it for this machine. */
export function loadOrt(): void {
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
