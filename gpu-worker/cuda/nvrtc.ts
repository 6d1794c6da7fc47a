/** CUDA C++ to machine code, by NVRTC through koffi. Needs the toolkit's library, but neither a GPU nor its driver. */
import { createHash } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import koffi from "koffi";
import { inCache, keep } from "./cache-folder.ts";

type Library = ReturnType<typeof koffi.load>;
export type Call = (...args: unknown[]) => unknown;

/** Where CUDA's toolkit has its libraries; the loader's own places (LD_LIBRARY_PATH) come first. */
export const TOOLKIT = ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib"];
/** CUDA's major versions whose NVRTC will do, the newest first. */
const MAJORS = [13, 12];

const functions = {
  nvrtcGetErrorString: "const char* f(int result)",
  nvrtcCreateProgram:
    "int f(_Out_ void** program, const char* source, const char* name, int n, void* texts, void* names)",
  nvrtcCompileProgram: "int f(void* program, int n, const char** options)",
  nvrtcGetProgramLogSize: "int f(void* program, _Out_ size_t* bytes)",
  nvrtcGetProgramLog: "int f(void* program, void* log)",
  nvrtcGetCUBINSize: "int f(void* program, _Out_ size_t* bytes)",
  nvrtcGetCUBIN: "int f(void* program, void* cubin)",
  nvrtcDestroyProgram: "int f(void** program)",
} as const;

/** Looks up the functions of a library: `signatures` has each one's C prototype, with `f` in the place of its name. */
export function declare<Name extends string>(library: Library, signatures: Record<Name, string>): Record<Name, Call> {
  const entries = Object.entries<string>(signatures);
  return Object.fromEntries(
    entries.map(([name, signature]) => [name, library.func(signature.replace(" f(", ` ${name}(`))]),
  ) as unknown as Record<Name, Call>;
}

/** The first of the files that can be loaded. @throws Error that says `missing` when none is there. */
export function load(names: readonly string[], missing: string): Library {
  const errors = new Set<string>();
  for (const name of names)
    try {
      if (!name.startsWith("/") || existsSync(name)) return koffi.load(name);
    } catch (error) {
      errors.add((error as Error).message);
    }
  throw new Error(`${missing} (${[...errors].join("; ")})`);
}

// When the library object is collected, the library is unloaded and every later call jumps into nothing.
let library: Library;
let nvrtc: Record<keyof typeof functions, Call>;

function loadNvrtc(newest: number): void {
  if (nvrtc) return;
  const oldest = Math.min(...MAJORS);
  if (newest < oldest)
    throw new Error(`the NVIDIA driver is for CUDA ${newest}; kernels need one for ${oldest} or later`);
  const names = MAJORS.filter((major) => major <= newest).map((major) => `libnvrtc.so.${major}`);
  const paths = names.flatMap((name) => [name, ...TOOLKIT.map((folder) => `${folder}/${name}`)]);
  const places = `LD_LIBRARY_PATH nor in ${TOOLKIT.join(" or ")}`;
  library = load(paths, `${names.join(" or ")} was not found, neither in ${places}: CUDA's toolkit has it`);
  nvrtc = declare(library, functions);
}

function check(result: unknown, name: string): void {
  if (result) throw new Error(`NVRTC: ${name}: ${nvrtc.nvrtcGetErrorString(result)}`);
}

/** Reads what comes as a size and bytes. */
function read(size: "nvrtcGetProgramLogSize" | "nvrtcGetCUBINSize", get: keyof typeof functions, program: bigint) {
  const bytes: [number | bigint] = [0];
  check(nvrtc[size](program, bytes), size);
  const data = new Uint8Array(Number(bytes[0]));
  check(nvrtc[get](program, data), get);
  return data;
}

/**
 * As compileCubin, but what was compiled once is kept in the user's cache folder: attention takes some 5 s. A folder that
 * cannot be read or written costs that time again, nothing else.
 */
export function cachedCubin(...what: Parameters<typeof compileCubin>): Uint8Array {
  const hash = createHash("sha256").update(JSON.stringify(what)).digest("hex").slice(0, 24);
  const file = inCache(`kernel-${hash}.cubin`);
  try {
    if (existsSync(file)) return readFileSync(file);
  } catch {
    // Compiled anew.
  }
  const cubin = compileCubin(...what);
  keep(file, cubin, "compiled kernels");
  return cubin;
}

export interface CompileOptions {
  /** What the log calls the source. */
  name?: string;
  /** The newest major version of CUDA that the driver can load. */
  newest?: number;
}

/**
 * Machine code of a source that includes nothing, for one architecture (`sm_90`), with macros defined.
 * @throws Error with NVRTC's log when the source has mistakes, or one that names the library when there is none.
 */
export function compileCubin(
  source: string,
  defines: Record<string, number>,
  arch: string,
  { name = "kernel.cu", newest = MAJORS[0]! }: CompileOptions = {},
): Uint8Array {
  loadNvrtc(newest);
  const out: [bigint] = [0n];
  check(nvrtc.nvrtcCreateProgram(out, source, name, 0, null, null), "nvrtcCreateProgram");
  const program = out[0];
  try {
    const macros = Object.entries(defines).map(([macro, value]) => `-D${macro}=${value}`);
    const options = [`--gpu-architecture=${arch}`, "--std=c++17", "--device-as-default-execution-space", ...macros];
    const result = nvrtc.nvrtcCompileProgram(program, options.length, options);
    if (!result) return read("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program);
    const log = new TextDecoder().decode(read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program));
    throw new Error(`NVRTC: ${nvrtc.nvrtcGetErrorString(result)}\n${log.replace(/\0+$/, "").trimEnd()}`);
  } finally {
    nvrtc.nvrtcDestroyProgram(out);
  }
}
