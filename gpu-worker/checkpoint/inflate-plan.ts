/** Large tensors described by small ones: which row and column of a small matrix stands where, and what stands elsewhere. */
import { closeSync, openSync, readSync } from "node:fs";
import { CheckpointError } from "../../shared/errors.ts";
import { bytesOf, type TensorInfo } from "../model/safetensors.ts";
import type { TensorSource } from "../model/weights.ts";
import { toFloats } from "./convert.ts";

/** For each row (or column) of a large tensor the one of the small matrix that stands there, or one of these two. */
export type Axis = Int32Array;
/** Zero, whatever the other axis says. */
export const ZERO = -1;
/** Any number: nothing reads it, or what reads it is multiplied by zero. */
export const RANDOM = -2;

/** Numbers of a small model, row by row. A vector has one column. */
export interface Matrix {
  rows: number;
  columns: number;
  data: Float32Array;
}

export interface Planned extends TensorInfo {
  rows: Axis;
  columns: Axis;
  /** Without it what stands at its places is random. */
  source?: Matrix;
}

/** An axis of `length` with the small model's i at `places[i]`, and `rest` elsewhere. */
export function axis(length: number, places: Iterable<number>, rest: number): Axis {
  const out = new Int32Array(length).fill(rest);
  let i = 0;
  for (const place of places) {
    if (place >= length) throw new CheckpointError(`the small model does not fit: place ${place} of ${length}`);
    out[place] = i++;
  }
  return out;
}

/** The first n of an axis are the small model's. */
export const first = (length: number, n: number, rest: number) => axis(length, Array(n).keys(), rest);
export const filled = (length: number, value: number): Axis => new Int32Array(length).fill(value);
/** An axis with the value at one index changed. */
export const changed = (of: Axis, index: number, value: number): Axis => of.with(index, value);

/** Axes one after the other, of matrices one after the other: `counts` are those' rows (or columns). */
export function stacked(axes: readonly Axis[], counts: readonly number[]): Axis {
  let before = 0;
  const parts = axes.map((part, i) => {
    const offset = before;
    before += counts[i];
    return [...part].map((v) => (v < 0 ? v : v + offset));
  });
  return Int32Array.from(parts.flat());
}

export const scaled = (m: Matrix, factor: number): Matrix => ({ ...m, data: m.data.map((v) => v * factor) });

/** `m` with zeros added, up to rows × columns; then the numbers of `set`, [row, column, value] each. */
export function padded(m: Matrix, rows: number, columns: number, set: [number, number, number][] = []): Matrix {
  const data = new Float32Array(rows * columns);
  for (let r = 0; r < m.rows; r++) data.set(m.data.subarray(r * m.columns, (r + 1) * m.columns), r * columns);
  for (const [row, column, value] of set) data[row * columns + column] = value;
  return { rows, columns, data };
}

/** Reads a small tensor whole: its first axis are the rows, the others the columns. */
function readMatrix(weights: TensorSource, name: string): Matrix {
  const { file, dtype, shape, offset, bytes } = weights.get(name, weights.shape(name));
  const raw = new Uint8Array(bytes);
  const descriptor = openSync(file, "r");
  try {
    readSync(descriptor, raw, 0, bytes, offset);
  } finally {
    closeSync(descriptor);
  }
  if (!["f32", "f16", "bf16"].includes(dtype))
    throw new CheckpointError(`${file}: tensor ${name} is ${dtype}: a quantized model cannot be inflated`);
  const data = toFloats(raw, dtype.toUpperCase());
  return { rows: shape[0], columns: data.length / shape[0], data };
}

/** Numbers as the format stores them. */
export function encode(data: Float32Array, dtype: string): Uint16Array | Uint32Array {
  if (dtype === "F32") return new Uint32Array(data.slice().buffer);
  if (dtype === "F16") return new Uint16Array(new Float16Array(data).buffer);
  return new Uint16Array(new Uint32Array(data.slice().buffer).map((word) => word >>> 16));
}

/** Whether every number is one of the type. */
function isExact({ data }: Matrix, dtype: string): boolean {
  if (dtype === "F32") return true;
  if (dtype === "F16") return data.every((v) => Math.f16round(v) === v);
  return new Uint32Array(data.buffer, data.byteOffset, data.length).every((word) => (word & 0xffff) === 0);
}

/** Collects the tensors of one checkpoint. */
export class Plan {
  readonly tensors: Planned[] = [];
  readonly dtype: string;
  readonly #tiny: TensorSource;

  /** Tensors are stored in the type of that of the small model, in F32 where it can't hold their numbers exactly. */
  constructor(tiny: TensorSource, sample: string) {
    this.#tiny = tiny;
    this.dtype = tiny.get(sample, tiny.shape(sample)).dtype.toUpperCase();
  }

  tiny(name: string): Matrix {
    return readMatrix(this.#tiny, name);
  }

  /** The shape of a small tensor without its first axis. */
  inner(name: string): number[] {
    return this.#tiny.shape(name).slice(1);
  }

  /** Reads parts of a small layer, times a factor; nothing when there is no such layer. */
  layer(from: string | undefined): (part: string, factor?: number) => Matrix | undefined {
    if (from === undefined) return () => undefined;
    return (part, factor = 1) => scaled(this.tiny(`${from}.${part}`), factor);
  }

  /** `shape` is given where it is not [rows, columns]. */
  matrix(name: string, rows: Axis, columns: Axis, source?: Matrix, shape = [rows.length, columns.length]): void {
    const dtype = source && !isExact(source, this.dtype) ? "F32" : this.dtype;
    this.tensors.push({ name, dtype, shape, rows, columns, source });
  }

  vector(name: string, rows: Axis, source?: Matrix): void {
    this.matrix(name, rows, new Int32Array(1), source, [rows.length]);
  }

  /** Weight and bias; `from` is the small model's, without which both are random. */
  linear(name: string, rows: Axis, columns: Axis, from?: string, change = (m: Matrix) => m): void {
    const source = (kind: string) => (from === undefined ? undefined : change(this.tiny(`${from}.${kind}`)));
    this.matrix(`${name}.weight`, rows, columns, source("weight"));
    this.vector(`${name}.bias`, rows, source("bias"));
  }

  get bytes(): number {
    return this.tensors.reduce((sum, tensor) => sum + bytesOf(tensor), 0);
  }
}
