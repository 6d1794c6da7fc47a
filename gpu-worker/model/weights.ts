/** Finds tensors in a checkpoint's safetensors files. Reads their headers only; the numbers never pass through here. */
import { closeSync, existsSync, openSync, readFileSync, readSync, statSync } from "node:fs";
import { join, resolve } from "node:path";
import { z } from "zod";
import { CheckpointError } from "../../shared/errors.ts";
import { DTYPES, type DType } from "../engine/runtime.ts";
import type { StoredTensor } from "../graph/graph.ts";
import { parseConfig } from "./config.ts";

const STORED: Record<string, DType> = { F32: "f32", F16: "f16", BF16: "bf16" };
const MAX_HEADER = 100 << 20;

const Header = z.record(
  z.string(),
  z.object({
    dtype: z.string(),
    shape: z.array(z.int().min(0)),
    data_offsets: z.tuple([z.int().min(0), z.int().min(0)]),
  }),
);
type Header = z.infer<typeof Header>;
const Index = z.object({ weight_map: z.record(z.string(), z.string()) });

/** The JSON object in a file; CheckpointError names the file when it is missing, malformed or no object. */
export function readJson(file: string): object {
  try {
    const value: unknown = JSON.parse(readFileSync(file, "utf8"));
    if (typeof value === "object" && value !== null && !Array.isArray(value)) return value;
    throw new TypeError("a JSON object is needed");
  } catch (error) {
    const missing = (error as NodeJS.ErrnoException).code === "ENOENT";
    throw new CheckpointError(missing ? `${file} is missing` : `${file}: ${(error as Error).message}`, {
      cause: error,
    });
  }
}

function readHeader(file: string): { header: Header; start: number; size: number } {
  const descriptor = openSync(file, "r");
  try {
    const size = statSync(file).size;
    const prefix = Buffer.alloc(8);
    const length = readSync(descriptor, prefix, 0, 8, 0) === 8 ? Number(prefix.readBigUInt64LE()) : -1;
    if (length < 2 || length > MAX_HEADER || 8 + length > size)
      throw new CheckpointError(`${file} is not a safetensors file or is truncated in its header (${size} bytes)`);
    const text = Buffer.alloc(length);
    readSync(descriptor, text, 0, length, 8);
    const { __metadata__, ...tensors } = JSON.parse(text.toString()) ?? {};
    return { header: parseConfig(Header, tensors, `${file}: header`), start: 8 + length, size };
  } catch (error) {
    if (error instanceof SyntaxError) throw new CheckpointError(`${file}: header is no JSON`, { cause: error });
    throw error;
  } finally {
    closeSync(descriptor);
  }
}

function addFile(file: string, tensors: Map<string, StoredTensor>): void {
  const { header, start, size } = readHeader(file);
  for (const [name, entry] of Object.entries(header)) {
    const dtype = STORED[entry.dtype];
    if (!dtype) throw new CheckpointError(`${file}: tensor ${name} is ${entry.dtype}; F32, F16 and BF16 can be read`);
    const [from, to] = entry.data_offsets;
    const bytes = entry.shape.reduce((a, b) => a * b, 1) * DTYPES[dtype].bytes;
    if (to - from !== bytes)
      throw new CheckpointError(`${file}: tensor ${name} [${entry.shape}] has ${to - from} bytes, not ${bytes}`);
    if (start + to > size)
      throw new CheckpointError(`${file} is truncated: tensor ${name} ends at byte ${start + to} of ${size}`);
    tensors.set(name, { name, file, dtype, shape: entry.shape, offset: start + from, bytes });
  }
}

/** The tensors of model.safetensors, or of the shards that model.safetensors.index.json names. */
export class Weights {
  readonly folder: string;
  readonly #tensors = new Map<string, StoredTensor>();

  constructor(folder: string) {
    this.folder = resolve(folder);
    const single = join(this.folder, "model.safetensors");
    const index = `${single}.index.json`;
    if (existsSync(single)) addFile(single, this.#tensors);
    else if (existsSync(index)) {
      const { weight_map: map } = parseConfig(Index, readJson(index), index);
      for (const shard of new Set(Object.values(map))) {
        const file = join(this.folder, shard);
        if (!existsSync(file)) throw new CheckpointError(`${index} names ${shard}, which is missing`);
        addFile(file, this.#tensors);
      }
    } else throw new CheckpointError(`${this.folder} has neither model.safetensors nor model.safetensors.index.json`);
  }

  shape(name: string): readonly number[] {
    return this.#find(name).shape;
  }

  #find(name: string, shape = ""): StoredTensor {
    const tensor = this.#tensors.get(name);
    if (!tensor) throw new CheckpointError(`${this.folder}: tensor ${name}${shape} is missing`);
    return tensor;
  }

  /** The tensor of that name, which must have that shape. */
  get(name: string, shape: readonly number[]): StoredTensor {
    const tensor = this.#find(name, ` [${shape}]`);
    if (`${tensor.shape}` !== `${shape}`)
      throw new CheckpointError(`${tensor.file}: tensor ${name} is [${tensor.shape}], its config asks for [${shape}]`);
    return tensor;
  }
}
