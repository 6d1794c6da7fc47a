/** Operators of our own in ONNX Runtime's graphs: struct OrtCustomOp, made of callbacks into JavaScript. */
import koffi from "koffi";

/**
 * An operator whose inputs are in the device's memory and whose first has rank 2; its outputs have rank 2 and the first's
 * type, and as many rows as it unless said otherwise.
 */
export interface CustomOp {
  name: string;
  /** ONNXTensorElementDataType of each input. */
  inputs: readonly number[];
  /** Index of an input that may be left out. */
  optional?: number;
  /** 1 by default. */
  outputs?: number;
  /** Columns of an output, for so many of the first input. */
  columns(columns: number, dims: Dims, output: number): number;
  /** Index of the input that has as many rows as each output. */
  rowsOf?: readonly number[];
  /** Queues the kernel; the input that was left out is 0n. */
  compute(inputs: readonly bigint[], outputs: readonly bigint[], shape: OpShape): void;
}

/** Dimensions of an input of rank 2, or how many values one of rank 1 has. */
type Dims = (input: number) => readonly number[];

/** Rows and columns of the first input, columns of the first output. */
export interface OpShape {
  rows: number;
  columns: number;
  width: number;
  dims: Dims;
}

/** What a kernel's call needs of the API. */
export interface KernelApi {
  /** Address of an input, 0n for one that was left out. */
  input(context: bigint, index: number): bigint;
  /** Address of an output, made with these dimensions. */
  output(context: bigint, index: number, dims: BigInt64Array): bigint;
  dims(context: bigint, index: number): BigInt64Array;
}

/** Fields before GetVariadicInputMinArity are what a struct of this version must have. */
const VERSION = 13;
// Callbacks and strings must outlive every session that knows them.
const kept: unknown[] = [];
let count = 0;

function text(value: string): bigint {
  const memory = koffi.alloc("char", value.length + 1);
  for (let i = 0; i <= value.length; i++) koffi.encode(memory, i, "char", i < value.length ? value.charCodeAt(i) : 0);
  kept.push(memory);
  return koffi.address(memory);
}

function callback(signature: string, f: (...args: never[]) => unknown): unknown {
  const pointer = koffi.register(f, koffi.pointer(koffi.proto(signature.replace(" f(", ` custom_${count++}(`))));
  kept.push(pointer);
  return pointer;
}

/**
 * The struct of an operator for a provider, the CPU's by default. `failed` gets what compute throws: an exception must not cross the
 * native frames between.
 */
export function customOp(op: CustomOp, api: KernelApi, failed: (error: unknown) => void, where?: string): unknown {
  const [name, provider] = [text(op.name), where === undefined ? 0n : text(where)];
  const compute = (_kernel: bigint, context: bigint) => {
    try {
      const inputs = op.inputs.map((_, i) => api.input(context, i));
      const of: Dims = (input) => Array.from(api.dims(context, input), Number);
      const [rows, columns] = of(0);
      const made = (i: number) =>
        BigInt64Array.of(BigInt(op.rowsOf ? of(op.rowsOf[i])[0] : rows), BigInt(op.columns(columns, of, i)));
      const outputs = Array.from({ length: op.outputs ?? 1 }, (_, i) => api.output(context, i, made(i)));
      op.compute(inputs, outputs, { rows, columns, width: op.columns(columns, of, 0), dims: of });
    } catch (error) {
      failed(error);
    }
  };
  const fields: [signature: string, f: (...args: never[]) => unknown][] = [
    ["void* f(void* op, void* api, void* info)", () => name], // a kernel needs no state: any pointer will do
    ["void* f(void* op)", () => name],
    ["void* f(void* op)", () => provider],
    ["int f(void* op, size_t index)", (_op: bigint, index: number | bigint) => op.inputs[Number(index)]],
    ["size_t f(void* op)", () => op.inputs.length],
    ["int f(void* op, size_t index)", () => op.inputs[0]],
    ["size_t f(void* op)", () => op.outputs ?? 1],
    ["void f(void* kernel, void* context)", compute],
    ["void f(void* kernel)", () => {}],
    ["int f(void* op, size_t index)", (_op: bigint, index: number | bigint) => (Number(index) === op.optional ? 1 : 0)],
    ["int f(void* op, size_t index)", () => 0],
    ["int f(void* op, size_t index)", () => 0],
  ];
  const struct = koffi.alloc("void*", 32);
  kept.push(struct);
  koffi.encode(struct, 0, "uint32_t", VERSION);
  for (const [i, [signature, f]] of fields.entries())
    koffi.encode(struct, 8 * (i + 1), "void*", callback(signature, f));
  return struct;
}
