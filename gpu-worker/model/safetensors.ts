/** The safetensors format: headers to entries and back. Knows no file, no network and no model. */
import { z } from "zod";
import { CheckpointError } from "../../shared/errors.ts";
import { parseConfig } from "./config.ts";

/** Bytes an element, by the format's names of types. */
export const ELEMENT_BYTES: Record<string, number> = {
  ...{ F64: 8, F32: 4, F16: 2, BF16: 2, F8_E4M3: 1, F8_E5M2: 1 },
  ...{ I64: 8, I32: 4, I16: 2, I8: 1, U64: 8, U32: 4, U16: 2, U8: 1, BOOL: 1 },
};

export interface TensorInfo {
  name: string;
  dtype: string;
  shape: readonly number[];
}

export interface TensorEntry extends TensorInfo {
  /** Of its first byte, from the file's beginning. */
  offset: number;
  bytes: number;
}

/** Bytes at a file's beginning that say how long its header is. */
export const PREFIX_BYTES = 8;
const MAX_HEADER = 100 << 20;

const Header = z.record(
  z.string(),
  z.object({
    dtype: z.string(),
    shape: z.array(z.int().min(0)),
    data_offsets: z.tuple([z.int().min(0), z.int().min(0)]),
  }),
);

export const elements = (shape: readonly number[]) => shape.reduce((a, b) => a * b, 1);
export const bytesOf = ({ dtype, shape }: TensorInfo) => elements(shape) * ELEMENT_BYTES[dtype];

/** Bytes of the header after the first 8 of a file of `size` bytes; CheckpointError when they can't be. */
export function headerBytes(prefix: Uint8Array, size: number, file: string): number {
  const view = new DataView(prefix.buffer, prefix.byteOffset, prefix.byteLength);
  const length = prefix.byteLength < PREFIX_BYTES ? -1 : Number(view.getBigUint64(0, true));
  if (length < 2 || length > MAX_HEADER || PREFIX_BYTES + length > size)
    throw new CheckpointError(`${file} is not a safetensors file or is truncated in its header (${size} bytes)`);
  return length;
}

/** The tensors that a header names, in the order of their bytes. Throws CheckpointError for what a file of `size` bytes can't hold. */
export function parseHeader(header: Uint8Array, size: number, file: string): TensorEntry[] {
  const start = PREFIX_BYTES + header.length;
  const entries = Object.entries(parseConfig(Header, jsonOf(header, file), `${file}: header`)).map(
    ([name, { dtype, shape, data_offsets: [from, to] }]) => {
      if (!Object.hasOwn(ELEMENT_BYTES, dtype))
        throw new CheckpointError(`${file}: tensor ${name} is ${dtype}, a type that is not known here`);
      const bytes = bytesOf({ name, dtype, shape });
      if (to - from !== bytes)
        throw new CheckpointError(`${file}: tensor ${name} [${shape}] has ${to - from} bytes, not ${bytes}`);
      if (start + to > size)
        throw new CheckpointError(`${file} is truncated: tensor ${name} ends at byte ${start + to} of ${size}`);
      return { name, dtype, shape, offset: start + from, bytes };
    },
  ); // biome-ignore format: one chain
  entries.sort((a, b) => a.offset - b.offset || a.bytes - b.bytes);
  for (const [i, entry] of entries.entries()) {
    const before = entries[i - 1];
    if (before && before.offset + before.bytes > entry.offset)
      throw new CheckpointError(`${file}: tensors ${before.name} and ${entry.name} overlap`);
  }
  return entries;
}

function jsonOf(header: Uint8Array, file: string): object {
  try {
    const { __metadata__, ...tensors } = JSON.parse(new TextDecoder().decode(header)) ?? {};
    return tensors;
  } catch (error) {
    throw new CheckpointError(`${file}: header is no JSON`, { cause: error });
  }
}

/** The beginning of a file that holds these tensors in this order, up to the first one's bytes (at a multiple of 8). */
export function encodeHeader(tensors: readonly TensorInfo[]): Uint8Array {
  let at = 0;
  const header: Record<string, object> = { __metadata__: { format: "pt" } };
  for (const tensor of tensors) {
    const from = at;
    at += bytesOf(tensor);
    header[tensor.name] = { dtype: tensor.dtype, shape: tensor.shape, data_offsets: [from, at] };
  }
  const text = Buffer.from(JSON.stringify(header));
  const padded = Math.ceil(text.length / 8) * 8;
  const out = Buffer.alloc(PREFIX_BYTES + padded, " ");
  out.writeBigUInt64LE(BigInt(padded));
  text.copy(out, PREFIX_BYTES);
  return out;
}
