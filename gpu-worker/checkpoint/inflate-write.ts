/** Writes planned tensors as safetensors files: in blocks, at the disk's speed, the same bytes each time. */
import { open, rename } from "node:fs/promises";
import { bytesOf, ELEMENT_BYTES, encodeHeader } from "../model/safetensors.ts";
import { type Axis, encode, type Planned, RANDOM, ZERO } from "./inflate-plan.ts";

/** Bytes of a block that is written at once. */
const BLOCK = 8 << 20;
/** Random numbers are made once a type, and used from varying places on. */
const POOL = 1 << 21;
/** Uniform within this, so that the deviation is 0.02. */
const SPREAD = 0.02 * Math.sqrt(3);

const pools = new Map<string, Uint16Array | Uint32Array>();

function randomPool(dtype: string): Uint16Array | Uint32Array {
  const known = pools.get(dtype);
  if (known) return known;
  let state = 1;
  const numbers = Float32Array.from({ length: POOL }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 31 - 1) * SPREAD;
  });
  const pool = encode(numbers, dtype);
  pools.set(dtype, pool);
  return pool;
}

/** Stretches of an axis that are zero. */
function zeroRuns(of: Axis): [from: number, to: number][] {
  const runs: [number, number][] = [];
  for (let i = 0; i < of.length; i++) {
    if (of[i] !== ZERO) continue;
    if (runs.at(-1)?.[1] === i) runs.at(-1)![1]++;
    else runs.push([i, i + 1]);
  }
  return runs;
}

/** A number that the name alone decides: where its random numbers begin. */
const seedOf = (name: string) => [...name].reduce((hash, c) => Math.imul(hash ^ c.charCodeAt(0), 16777619) >>> 0, 2166136261); // biome-ignore format: one line

/** The bytes of a tensor, in blocks that are overwritten by the next. */
export function* tensorBlocks({ name, dtype, rows, columns, source }: Planned): Generator<Uint8Array> {
  const width = columns.length;
  const pool = randomPool(dtype);
  const count = Math.max(1, Math.min(rows.length, Math.floor(BLOCK / (width * ELEMENT_BYTES[dtype]))));
  const block = dtype === "F32" ? new Uint32Array(count * width) : new Uint16Array(count * width);
  const zeros = zeroRuns(columns);
  const placed = source ? [...columns.keys()].filter((c) => columns[c] >= 0) : [];
  const values = source && encode(source.data, dtype);
  let at = seedOf(name);
  for (let begin = 0; begin < rows.length; begin += count) {
    const end = Math.min(begin + count, rows.length);
    for (let r = begin; r < end; r++) {
      const row = block.subarray((r - begin) * width, (r - begin + 1) * width);
      if (rows[r] === ZERO) {
        row.fill(0);
        continue;
      }
      at = (at + width + 1) % (POOL - width);
      row.set(pool.subarray(at, at + width));
      for (const [from, to] of zeros) row.fill(0, from, to);
      if (rows[r] === RANDOM) continue;
      for (const c of placed) row[c] = values![rows[r] * source!.columns + columns[c]];
    }
    yield new Uint8Array(block.buffer, 0, (end - begin) * width * ELEMENT_BYTES[dtype]);
  }
}

/** Bytes of a whole file. */
export const fileBytes = (tensors: Planned[]) =>
  encodeHeader(tensors).length + tensors.reduce((n, t) => n + bytesOf(t), 0);

/**
 * Writes a file under a name of its own, then gives it the real one: what has that is whole. `wrote` hears of each block.
 */
export async function writeTensors(
  file: string,
  tensors: Planned[],
  signal: AbortSignal,
  wrote: (bytes: number) => void,
): Promise<void> {
  const unfinished = `${file}.part`;
  {
    await using handle = await open(unfinished, "w");
    const write = async (bytes: Uint8Array) => {
      signal.throwIfAborted();
      await handle.writeFile(bytes);
      wrote(bytes.length);
    };
    await write(encodeHeader(tensors));
    for (const tensor of tensors) for (const bytes of tensorBlocks(tensor)) await write(bytes);
    await handle.sync();
  }
  await rename(unfinished, file);
}
