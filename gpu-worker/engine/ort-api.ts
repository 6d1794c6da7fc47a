/** ONNX Runtime's C API as this project calls it: each function's index in OrtApi (ONNX Runtime 1.29) and its C signature. */

/** Index in `struct OrtApi` and parameters; every function but the releases returns an OrtStatus*, null when all is well. */
export const functions = {
  GetErrorMessage: [2, "const char* f(void* status)"],
  CreateEnv: [3, "void* f(int level, const char* id, _Out_ void** out)"],
  CreateSessionFromArray: [8, "void* f(void* env, void* data, size_t length, void* options, _Out_ void** out)"],
  CreateSessionOptions: [10, "void* f(_Out_ void** out)"],
  SetIntraOpNumThreads: [24, "void* f(void* options, int n)"],
  CreateRunOptions: [39, "void* f(_Out_ void** out)"],
  CreateTensorWithDataAsOrtValue: [
    49,
    "void* f(void* info, void* data, size_t bytes, void* dims, size_t rank, int type, _Out_ void** out)",
  ],
  CreateMemoryInfo: [68, "void* f(const char* name, int kind, int id, int mem, _Out_ void** out)"],
  AllocatorAlloc: [75, "void* f(void* allocator, size_t bytes, _Out_ void** out)"],
  AllocatorFree: [76, "void* f(void* allocator, void* data)"],
  GetAllocatorWithDefaultOptions: [78, "void* f(_Out_ void** out)"],
  ReleaseStatus: [93, "void f(void* status)"],
  ReleaseSession: [95, "void f(void* session)"],
  ReleaseValue: [96, "void f(void* value)"],
  ReleaseSessionOptions: [100, "void f(void* options)"],
  AddSessionConfigEntry: [130, "void* f(void* options, const char* key, const char* value)"],
  CreateAllocator: [131, "void* f(void* session, void* info, _Out_ void** out)"],
  RunWithBinding: [133, "void* f(void* session, void* run, void* binding)"],
  CreateIoBinding: [134, "void* f(void* session, _Out_ void** out)"],
  ReleaseIoBinding: [135, "void f(void* binding)"],
  BindInput: [136, "void* f(void* binding, const char* name, void* value)"],
  BindOutput: [137, "void* f(void* binding, const char* name, void* value)"],
  SessionOptionsAppendExecutionProvider_CUDA_V2: [204, "void* f(void* options, void* cuda)"],
  CreateCUDAProviderOptions: [205, "void* f(_Out_ void** out)"],
  UpdateCUDAProviderOptions: [206, "void* f(void* cuda, const char** keys, const char** values, size_t n)"],
  ReleaseCUDAProviderOptions: [208, "void f(void* cuda)"],
  SessionOptionsAppendExecutionProvider: [
    216,
    "void* f(void* options, const char* name, const char** keys, const char** values, size_t n)",
  ],
} as const satisfies Record<string, readonly [number, string]>;
