/** Finds tensors in a checkpoint's safetensors files. Reads their headers only; the numbers never pass through here. */
import { closeSync, existsSync, fstatSync, openSync, readFileSync, readSync } from "node:fs";
import { basename, join } from "node:path";
import { z } from "zod";
import { CheckpointError } from "../../shared/errors.ts";
import type { DType } from "../engine/tensor.ts";
import type { StoredTensor } from "../graph/graph.ts";
import { parseConfig } from "./config.ts";
import { headerBytes, PREFIX_BYTES, parseHeader, type TensorEntry } from "./safetensors.ts";

const STORED: Record<string, DType> = { F32: "f32", F16: "f16", BF16: "bf16" };
/** model.safetensors.index.json. */
export const Index = z.object({ weight_map: z.record(z.string(), z.string()) });

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

/** The tensors of one safetensors file, of which its header alone is read. */
export function readEntries(file: string): TensorEntry[] {
  const descriptor = openSync(file, "r");
  try {
    const { size } = fstatSync(descriptor);
    const prefix = Buffer.alloc(PREFIX_BYTES);
    const read = readSync(descriptor, prefix, 0, PREFIX_BYTES, 0);
    const header = Buffer.alloc(headerBytes(prefix.subarray(0, read), size, file));
    readSync(descriptor, header, 0, header.length, PREFIX_BYTES);
    return parseHeader(header, size, file);
  } finally {
    closeSync(descriptor);
  }
}

/** What the builders of graphs ask for tensors by name; CheckpointError when there is none, or of another shape. */
export interface TensorSource {
  /** Where they come from, for messages. */
  readonly folder: string;
  has(name: string): boolean;
  shape(name: string): readonly number[];
  /** The tensor of that name, which must have that shape. */
  get(name: string, shape: readonly number[]): StoredTensor;
}

/** The tensors of model.safetensors, or of the shards that model.safetensors.index.json names. */
export class Weights implements TensorSource {
  readonly folder: string;
  readonly #tensors = new Map<string, TensorEntry & { file: string }>();

  /** `files` stand in for those of the folder. */
  constructor(folder: string, files = filesOf(folder)) {
    this.folder = folder;
    for (const { file, entries } of files)
      for (const entry of entries) this.#tensors.set(entry.name, { ...entry, file });
  }

  has(name: string): boolean {
    return this.#tensors.has(name);
  }

  shape(name: string): readonly number[] {
    return this.#find(name).shape;
  }

  #find(name: string, shape = ""): TensorEntry & { file: string } {
    const tensor = this.#tensors.get(name);
    if (!tensor) throw new CheckpointError(`${this.folder}: tensor ${name}${shape} is missing`);
    return tensor;
  }

  get(name: string, shape: readonly number[]): StoredTensor {
    const tensor = this.#find(name, ` [${shape}]`);
    const { file } = tensor;
    if (`${tensor.shape}` !== `${shape}`)
      throw new CheckpointError(`${file}: tensor ${name} is [${tensor.shape}], its config asks for [${shape}]`);
    // Integers of quantized matrices (layers.ts) are bytes, everything else are floats.
    const packed = name.endsWith(".packed");
    const dtype = packed && tensor.dtype === "U8" ? "u8" : packed ? undefined : STORED[tensor.dtype];
    const wanted = packed ? "U8" : "F32, F16 or BF16";
    if (!dtype) throw new CheckpointError(`${file}: tensor ${name} is ${tensor.dtype}, not ${wanted}`);
    return { ...tensor, dtype };
  }
}

function filesOf(folder: string): { file: string; entries: TensorEntry[] }[] {
  const single = join(folder, "model.safetensors");
  if (existsSync(single)) return [{ file: single, entries: readEntries(single) }];
  const index = `${single}.index.json`;
  if (!existsSync(index))
    throw new CheckpointError(`${folder} has neither model.safetensors nor model.safetensors.index.json`);
  const { weight_map: map } = parseConfig(Index, readJson(index), index);
  return [...new Set(Object.values(map))].map((shard) => {
    if (shard !== basename(shard) || shard === "..")
      throw new CheckpointError(`${index}: ${shard} is no file beside it`);
    const file = join(folder, shard);
    if (!existsSync(file)) throw new CheckpointError(`${index} names ${shard}, which is missing`);
    return { file, entries: readEntries(file) };
  });
}
