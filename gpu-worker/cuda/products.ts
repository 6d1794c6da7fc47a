/**
 * Products with weight matrices: of few rows by a kernel of our own where the GPU has it (skinny-gemm.cu), else by cuBLASLt, each
 * by the algorithm that was the fastest when its shape first came.
 */
import type { Cuda } from "./driver.ts";
import type { Elementwise, Float } from "./elementwise.ts";
import { type Call, declare, load, TOOLKIT } from "./nvrtc.ts";
import { type ByteMatrix, type ProductShape, SkinnyGemm } from "./skinny-gemm.ts";

/** Values of cublasComputeType_t, cudaDataType_t and cublasLtMatmulPreferenceAttributes_t. */
const COMPUTE_32F = 68;
const TYPES = { f32: 0, f16: 2, bf16: 14 } as const;
const MAX_WORKSPACE = 1;
/** Of a, b, c and d. */
const MIN_ALIGNMENT = [5, 6, 7, 8];
/** sizeof cublasLtMatmulAlgo_t and cublasLtMatmulHeuristicResult_t, which begins with one. */
const ALGORITHM_BYTES = 64;
const RESULT_BYTES = 96;

/** cuBLAS's own advice for Hopper. */
const WORKSPACE = 32 << 20;
/** Bytes. */
const ALIGNMENT = 16;
/** Most algorithms that are tried (the library names some eight), and how often. */
const CANDIDATES = 24;
const TRIALS = 9;
/** Rows above which the library's own choice is taken: there products cost by their arithmetic, and shapes are many. */
const SEARCHED_ROWS = 64;
/** What another algorithm must gain over the library's own choice, in which noise is not. */
const GAIN = 0.99;
/** Read before each trial: more than any GPU's second cache holds, so that weights come from memory as in a pass. */
const OTHERS = 128 << 20;

const functions = {
  cublasLtCreate: "int f(_Out_ void** handle)",
  cublasLtMatmulDescCreate: "int f(_Out_ void** desc, int compute, int scale)",
  cublasLtMatrixLayoutCreate: "int f(_Out_ void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride)",
  cublasLtMatmulPreferenceCreate: "int f(_Out_ void** preference)",
  cublasLtMatmulPreferenceSetAttribute: "int f(void* preference, int attribute, void* value, size_t bytes)",
  cublasLtMatmulAlgoGetHeuristic:
    "int f(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int most, void* results, _Out_ int* count)",
  cublasLtMatmul:
    "int f(void* handle, void* desc, void* alpha, void* a, void* aLayout, void* b, void* bLayout, void* beta, void* c, void* cLayout, void* d, void* dLayout, void* algorithm, void* workspace, size_t bytes, void* stream)",
} as const;

// When the library object is collected, the library is unloaded and every later call jumps into nothing.
let library: ReturnType<typeof load>;
let lt: Record<keyof typeof functions, Call>;

function loadCublasLt(): void {
  if (lt) return;
  const names = [13, 12].map((major) => `libcublasLt.so.${major}`);
  const paths = names.flatMap((name) => [name, ...TOOLKIT.map((folder) => `${folder}/${name}`)]);
  library = load(paths, `${names.join(" or ")} was not found: CUDA's toolkit has it`);
  lt = declare(library, functions);
}

function call(name: keyof typeof functions, ...args: unknown[]): void {
  const result = lt[name](...args);
  if (result !== 0) throw new Error(`cuBLASLt: ${name}: status ${result}`);
}

function make(name: keyof typeof functions, ...args: unknown[]): bigint {
  const out: [bigint] = [0n];
  call(name, out, ...args);
  return out[0];
}

/** A shape's layouts of w, x and y, and its algorithm. */
interface Plan {
  layouts: readonly [bigint, bigint, bigint];
  algorithm: Uint8Array;
}

/** Its scratch memory serves one launch at a time, as one stream gives. */
export class Products implements Disposable {
  readonly #cuda: Cuda;
  readonly #elementwise: Elementwise;
  readonly #dtype: Float;
  readonly #handle: bigint;
  readonly #desc: bigint;
  readonly #preference: bigint;
  readonly #workspace: bigint;
  readonly #one = Float32Array.of(1);
  readonly #zero = Float32Array.of(0);
  readonly #plans = new Map<string, Plan>();
  readonly #skinny: SkinnyGemm | undefined;
  /** What was rounded, by where the matrix is. */
  readonly #rounded = new Map<bigint, ByteMatrix>();

  constructor(cuda: Cuda, elementwise: Elementwise, dtype: Float) {
    loadCublasLt();
    this.#cuda = cuda;
    this.#elementwise = elementwise;
    this.#dtype = dtype;
    this.#skinny = SkinnyGemm.for(cuda, dtype);
    this.#handle = make("cublasLtCreate");
    this.#desc = make("cublasLtMatmulDescCreate", COMPUTE_32F, TYPES.f32);
    this.#preference = make("cublasLtMatmulPreferenceCreate");
    const prefer = (attribute: number, value: ArrayBufferView) =>
      call("cublasLtMatmulPreferenceSetAttribute", this.#preference, attribute, value, value.byteLength);
    prefer(MAX_WORKSPACE, BigUint64Array.of(BigInt(WORKSPACE)));
    // Rows of a matrix may begin anywhere in it.
    for (const attribute of MIN_ALIGNMENT) prefer(attribute, Uint32Array.of(ALIGNMENT));
    this.#workspace = cuda.alloc(WORKSPACE);
  }

  /** Bytes of a weight that few rows are multiplied by roughly, of one of `bytes`. */
  roughBytes(bytes: number): number {
    return this.#skinny ? 1 : bytes;
  }

  /**
   * Queues y [rows,columns] = x [rows,inner] · w [inner,columns]. The first launch of a shape tries algorithms, and waits
   * for them: it can't be captured. `roughly`: few rows may be multiplied by w rounded to bytes, which the first launch of w
   * makes, and can't be captured either.
   */
  launch(y: bigint, x: bigint, w: bigint, shape: ProductShape, roughly = false): void {
    if (this.#skinny?.takes(shape)) {
      this.#skinny.launch(y, x, roughly ? this.#roundedOf(w, shape) : w, shape);
      return;
    }
    const key = `${shape.rows} ${shape.inner} ${shape.columns}`;
    const plan = this.#plans.get(key) ?? this.#choose([y, x, w], shape);
    this.#plans.set(key, plan);
    const result = this.#run([y, x, w], plan);
    if (result !== 0) throw new Error(`cuBLASLt: a product of shape ${key}: status ${result}`);
  }

  /**
   * Queues y [rows,columns/2] = silu(x·gate) · (x·up), the two paired in w [inner,columns]; `both` [rows,columns] is for
   * the products, where they are not made into y at once, which gives the same, bit for bit. As `launch` otherwise.
   */
  launchGated(y: bigint, both: bigint, x: bigint, w: bigint, shape: ProductShape): void {
    if (this.#skinny?.takes(shape)) {
      this.#skinny.launch(y, x, w, shape, true);
      return;
    }
    this.launch(both, x, w, shape);
    this.#elementwise.gatedSilu(y, both, shape.rows, shape.columns / 2, this.#dtype, true);
  }

  #roundedOf(w: bigint, shape: ProductShape): ByteMatrix {
    const known = this.#rounded.get(w) ?? this.#skinny!.quantize(w, shape);
    this.#rounded.set(w, known);
    return known;
  }

  /** Frees what was rounded; the rest is kept for as long as the process. */
  [Symbol.dispose](): void {
    for (const { data, scales } of this.#rounded.values()) for (const memory of [data, scales]) this.#cuda.free(memory);
    this.#rounded.clear();
  }

  #run([y, x, w]: readonly bigint[], { layouts, algorithm }: Plan): unknown {
    const [wLayout, xLayout, yLayout] = layouts;
    // cuBLAS's matrices are by columns: rows of ours are columns of its.
    return lt.cublasLtMatmul(
      ...[this.#handle, this.#desc, this.#one, w, wLayout, x, xLayout, this.#zero, y, yLayout, y, yLayout],
      ...[algorithm, this.#workspace, WORKSPACE, this.#cuda.stream],
    );
  }

  #choose(memory: readonly bigint[], { rows, inner, columns }: ProductShape): Plan {
    const layout = (r: number, c: number) => make("cublasLtMatrixLayoutCreate", TYPES[this.#dtype], r, c, r);
    const layouts = [layout(columns, inner), layout(inner, rows), layout(columns, rows)] as const;
    const most = rows > SEARCHED_ROWS ? 1 : CANDIDATES;
    const plans = this.#algorithms(layouts, most).map((algorithm) => ({ layouts, algorithm }));
    if (most === 1 && plans.length > 0) return plans[0];
    const others = this.#cuda.alloc(OTHERS);
    const times = plans.map((plan) => this.#time(memory, plan, others));
    this.#cuda.free(others);
    const least = Math.min(...times);
    if (!Number.isFinite(least)) throw new Error(`cuBLASLt knows no product of [${rows},${inner}] and [${inner},${columns}]`); // biome-ignore format: one line
    return plans[least < GAIN * times[0] ? times.indexOf(least) : 0];
  }

  /** What the library names for a shape, its own choice first. */
  #algorithms([w, x, y]: Plan["layouts"], most: number): Uint8Array[] {
    const results = new Uint8Array(most * RESULT_BYTES);
    const count: [number] = [0];
    const what = [this.#handle, this.#desc, w, x, y, y, this.#preference];
    call("cublasLtMatmulAlgoGetHeuristic", ...what, most, results, count);
    return Array.from({ length: count[0] }, (_, i) =>
      results.slice(i * RESULT_BYTES, i * RESULT_BYTES + ALGORITHM_BYTES),
    );
  }

  /** Milliseconds, the median of some runs; infinite for an algorithm that can't be run. */
  #time(memory: readonly bigint[], plan: Plan, others: bigint): number {
    const times: number[] = [];
    for (let i = 0; i < TRIALS; i++) {
      this.#elementwise.readAll(others, others, OTHERS);
      let result: unknown;
      const ms = this.#cuda.milliseconds(() => {
        result = this.#run(memory, plan);
      });
      if (result !== 0) return Number.POSITIVE_INFINITY;
      times.push(ms);
    }
    return times.sort((a, b) => a - b)[TRIALS >> 1];
  }
}
