/** Rewrites a shard with its tensors in another type, in pieces of a few MiB. Knows no store and no config. */
import { type FileHandle, open } from "node:fs/promises";
import { CheckpointError } from "../../shared/errors.ts";
import { BLOCK_SIZE } from "../model/layers.ts";
import {
  bytesOf,
  ELEMENT_BYTES,
  elements,
  encodeHeader,
  type TensorEntry,
  type TensorInfo,
} from "../model/safetensors.ts";
import { type Bits, isQuantized, quantizedTensors, quantizeRows } from "./quantize.ts";

export const IMPORT_DTYPES = ["bf16", "fp16", "fp32", "int8", "int4"] as const;
export type ImportDtype = (typeof IMPORT_DTYPES)[number];

const FLOATS: Record<string, string> = { bf16: "BF16", fp16: "F16", fp32: "F32" };
/** Elements that are held at a time: 16 MiB of float32, and as much again for each step. */
const PIECE = 4 << 20;

/** Sums over the weights that were quantized, for the error it brings. */
export interface Squares {
  squares: number;
  squaredError: number;
}

/** A tensor of a shard, and the one or two that it becomes. */
export interface Change {
  from: TensorEntry;
  to: TensorInfo[];
}

export const bitsOf = (dtype: ImportDtype | undefined): Bits | undefined =>
  dtype === "int4" ? 4 : dtype === "int8" ? 8 : undefined;

/** What becomes of a shard's tensors: floats in another type, or the decoder's matrices in integers. The rest stays. */
export function planShard(entries: readonly TensorEntry[], dtype: ImportDtype, file: string): Change[] {
  const bits = bitsOf(dtype);
  return entries.map((from) => {
    const { name, shape } = from;
    const isFloat = Object.values(FLOATS).includes(from.dtype);
    if (bits === undefined) return { from, to: [{ name, shape, dtype: isFloat ? FLOATS[dtype] : from.dtype }] };
    if (!isQuantized(name)) return { from, to: [from] };
    if (!isFloat || shape.length !== 2)
      throw new CheckpointError(`${file}: tensor ${name} [${shape}] of ${from.dtype} is no matrix of floats`);
    return { from, to: quantizedTensors(from, bits) };
  });
}

export const plannedBytes = (plan: readonly Change[]) =>
  encodeHeader(plan.flatMap(({ to }) => to)).length + plan.reduce((sum, { to }) => sum + to.reduce((n, t) => n + bytesOf(t), 0), 0); // biome-ignore format: one sum

/**
 * Writes the shard that `plan` makes of `input` to `output`, and gives what quantization costs each matrix. `wrote` hears
 * of bytes. Throws CheckpointError for a number that is finite and would not be any more.
 */
export async function convertShard(
  input: string,
  output: string,
  plan: readonly Change[],
  wrote: (bytes: number) => void,
  signal: AbortSignal,
): Promise<Record<string, Squares>> {
  await using source = await open(input, "r");
  await using target = await open(output, "w");
  const header = encodeHeader(plan.flatMap(({ to }) => to));
  await write(target, header, 0);
  wrote(header.length);
  let at = header.length;
  const errors: Record<string, Squares> = {};
  for (const { from, to } of plan) {
    const places = to.map((tensor) => (at += bytesOf(tensor)) - bytesOf(tensor));
    for await (const { parts, cost } of convertTensor({ source, input }, from, to, signal)) {
      for (const [i, part] of parts.entries()) {
        await write(target, part, places[i]);
        places[i] += part.length;
        wrote(part.length);
      }
      if (!cost) continue;
      const sum = (errors[from.name] ??= { squares: 0, squaredError: 0 });
      sum.squares += cost.squares;
      sum.squaredError += cost.squaredError;
    }
  }
  await target.sync();
  return errors;
}

/** The bytes of the tensors in `to`, side by side, piece by piece in whole rows. */
async function* convertTensor(
  { source, input }: { source: FileHandle; input: string },
  from: TensorEntry,
  to: readonly TensorInfo[],
  signal: AbortSignal,
): AsyncGenerator<{ parts: Uint8Array[]; cost?: Squares }> {
  const columns = to.length === 2 ? from.shape[1] : 1;
  const step = Math.max(1, Math.floor(PIECE / columns)) * columns;
  const count = elements(from.shape);
  const size = ELEMENT_BYTES[from.dtype];
  for (let first = 0; first < count; first += step) {
    signal.throwIfAborted();
    const bytes = await read(source, from.offset + first * size, Math.min(step, count - first) * size);
    if (to.length === 2) {
      const rows = bytes.length / size / columns;
      const bits = ((8 * to[0].shape[2]) / BLOCK_SIZE) as Bits;
      const { packed, scales, ...cost } = quantizeRows(toFloats(bytes, from.dtype), rows, columns, bits);
      yield { parts: [packed, new Uint8Array(scales.buffer)], cost };
    } else if (to[0].dtype === from.dtype) yield { parts: [bytes] };
    else yield { parts: [fromFloats(toFloats(bytes, from.dtype), to[0], input)] };
  }
}

/** Numbers of F32, F16 or BF16 as float32, which holds them all. */
export function toFloats({ buffer }: Uint8Array<ArrayBuffer>, dtype: string): Float32Array {
  if (dtype === "F32") return new Float32Array(buffer);
  if (dtype === "F16") return new Float32Array(new Float16Array(buffer));
  const words = new Uint32Array(new Uint16Array(buffer));
  for (let i = 0; i < words.length; i++) words[i] <<= 16;
  return new Float32Array(words.buffer);
}

/** Float32 in the tensor's type, rounded to nearest, ties to even; CheckpointError for a finite number beyond it. */
function fromFloats(values: Float32Array, { name, dtype }: TensorInfo, file: string): Uint8Array {
  if (dtype === "F32") return new Uint8Array(values.buffer);
  const halves = dtype === "F16" ? new Uint16Array(new Float16Array(values).buffer) : roundToBf16(values);
  const infinity = dtype === "F16" ? 0x7c00 : 0x7f80;
  for (let i = 0; i < halves.length; i++)
    if ((halves[i] & 0x7fff) === infinity && Number.isFinite(values[i]))
      throw new CheckpointError(`${file}: tensor ${name} holds ${values[i]}, which is beyond ${dtype}`);
  return new Uint8Array(halves.buffer);
}

function roundToBf16(values: Float32Array): Uint16Array<ArrayBuffer> {
  const words = new Uint32Array(values.buffer);
  const halves = new Uint16Array(words.length);
  for (let i = 0; i < words.length; i++) {
    const word = words[i];
    // The carry would make an infinity of a NaN whose bits are all in the lower half.
    const nan = (word & 0x7fffffff) > 0x7f800000;
    halves[i] = nan ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
  }
  return halves;
}

async function read(file: FileHandle, position: number, length: number): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = new Uint8Array(length);
  for (let have = 0; have < length; ) {
    const { bytesRead } = await file.read(bytes, have, length - have, position + have);
    if (bytesRead === 0) throw new CheckpointError(`a shard ended at byte ${position + have} while it was read`);
    have += bytesRead;
  }
  return bytes;
}

/** All of the bytes; a single write may take fewer. */
export async function write(file: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; )
    done += (await file.write(bytes, done, bytes.length - done, position + done)).bytesWritten;
}
