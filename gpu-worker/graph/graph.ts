/** A computation as plain data: values, nodes, weights. Knows nothing of ONNX's encoding or of what operators mean. */
import { DTYPES, type DType } from "../engine/tensor.ts";

/** A size, or the name of one that a run decides. */
export type Dim = number | string;

export interface Value {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly Dim[];
}

export type Attribute = number | string | readonly number[] | { readonly float: number };

export interface Node {
  readonly op: string;
  readonly domain: string;
  /** null stands for an optional input that is left out. */
  readonly inputs: readonly (Value | null)[];
  readonly outputs: readonly Value[];
  readonly attributes: Readonly<Record<string, Attribute>>;
}

/** A tensor inside a file, as safetensors stores it. */
export interface StoredTensor {
  readonly name: string;
  /** Absolute path. */
  readonly file: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** Of its first byte in the file. */
  readonly offset: number;
  readonly bytes: number;
}

export interface Constant {
  readonly value: Value;
  readonly bytes: Uint8Array;
}

export interface GraphOptions {
  /** What activations are computed in. */
  dtype: DType;
  /**
   * What attends over a KV cache: ONNX Runtime's kernel with the rotary embedding in it (the CPU's honours the positions
   * of a tree), or beside it, or a kernel of our own (CUDA), in whose graphs weights are inputs that lie on the device.
   */
  attention: "fused" | "split" | "own";
  /** Whether products with weights go through 8-bit integers (on CUDA the weights alone): for drafts, which need not be exact. */
  int8: boolean;
  /** Whether numbers of rows come again and again, so that products with bound weights are worth a search (cuda/products.ts). */
  searched?: boolean;
}

/** How stored tensors become one input. */
export interface BindOptions {
  /** Whether it is [columns,rows] of the stored [rows,columns]: products read it faster. */
  turned?: boolean;
  /** Those of the rows that are kept, in this order; all by default. */
  picked?: readonly number[];
  /** Rows of each part, and columns, with zeros after the stored ones; as many as there are by default. */
  rows?: number;
  columns?: number;
  /** Whether two parts of as many rows, turned, go by turns, eight of each (cuda/skinny-gemm.cu). */
  paired?: boolean;
}

/** Memory that a run gets as an input: stored tensors, below each other, in the graph's own type unless they are bytes. */
export interface BoundWeight extends BindOptions {
  readonly value: Value;
  readonly parts: readonly StoredTensor[];
}

/** Collects a graph. Operators (ops/) add nodes through `node`; the numbers of weights stay in their files. */
export class Graph {
  readonly inputs: Value[] = [];
  readonly outputs: { name: string; value: Value }[] = [];
  readonly nodes: Node[] = [];
  readonly weights = new Map<string, { value: Value; stored: StoredTensor }>();
  readonly bound = new Map<string, BoundWeight>();
  readonly constants: Constant[] = [];
  readonly options: GraphOptions;
  #count = 0;

  constructor(options: GraphOptions) {
    this.options = options;
  }

  get dtype(): DType {
    return this.options.dtype;
  }

  /** Whether weights are inputs (see GraphOptions). */
  get binds(): boolean {
    return this.options.attention === "own";
  }

  input(name: string, dtype: DType, shape: readonly Dim[]): Value {
    const value = { name, dtype, shape };
    this.inputs.push(value);
    return value;
  }

  /** Makes `value` an output that runs know by this name. */
  output(name: string, value: Value): void {
    this.outputs.push({ name, value });
  }

  /** A stored tensor as it is in its file; the same one twice is the same value. */
  weight(stored: StoredTensor): Value {
    const key = `${stored.file}:${stored.name}`;
    const known = this.weights.get(key);
    if (known) return known.value;
    const value = { name: `w${this.weights.size}.${stored.name}`, dtype: stored.dtype, shape: stored.shape };
    this.weights.set(key, { value, stored });
    return value;
  }

  /** Stored tensors as one input; graphs that ask for the same get the same memory. */
  bind(parts: readonly StoredTensor[], options: BindOptions = {}): Value {
    const { turned, picked, rows, columns, paired } = options;
    const key = `${turned} ${picked} ${rows} ${columns} ${paired} ${parts.map((part) => `${part.file}:${part.name}`)}`;
    const known = this.bound.get(key);
    if (known) return known.value;
    const { shape, dtype } = parts[0];
    const count = picked?.length ?? parts.reduce((sum, part) => sum + (rows ?? part.shape[0]), 0);
    const name = `w${this.bound.size}.${parts[0].name}`;
    const value = {
      name,
      dtype: dtype === "u8" ? dtype : this.dtype,
      shape: turned ? [columns ?? shape[1], count] : [count, ...shape.slice(1)],
    };
    this.bound.set(key, { value, parts, ...options });
    return value;
  }

  /** Small integers that the graph itself holds (shapes, axes). */
  ints(values: readonly number[]): Value {
    const value: Value = { name: `c${this.#count++}`, dtype: "i64", shape: [values.length] };
    this.constants.push({ value, bytes: new Uint8Array(BigInt64Array.from(values, BigInt).buffer) });
    return value;
  }

  /** A few numbers in the graph's own type. */
  floats(values: readonly number[]): Value {
    const value: Value = { name: `c${this.#count++}`, dtype: "f32", shape: [values.length] };
    this.constants.push({ value, bytes: new Uint8Array(Float32Array.from(values).buffer) });
    if (this.dtype === "f32") return value;
    return this.node("Cast", [value], [{ dtype: this.dtype, shape: value.shape }], { to: DTYPES[this.dtype].onnx })[0];
  }

  node(
    op: string,
    inputs: readonly (Value | null)[],
    outputs: readonly { dtype: DType; shape: readonly Dim[] }[],
    attributes: Record<string, Attribute> = {},
    domain = "",
  ): Value[] {
    const values = outputs.map(({ dtype, shape }) => ({ name: `v${this.#count++}`, dtype, shape }));
    this.nodes.push({ op, domain, inputs, outputs: values, attributes });
    return values;
  }
}
