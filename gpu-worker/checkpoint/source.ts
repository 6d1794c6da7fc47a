/** A checkpoint in a store: which of its objects make it up, and its tensors by name. Reads the shards' headers only. */
import { CheckpointError } from "../../shared/errors.ts";
import { parseConfig } from "../model/config.ts";
import { headerBytes, PREFIX_BYTES, parseHeader, type TensorEntry } from "../model/safetensors.ts";
import { Index, type TensorSource, Weights } from "../model/weights.ts";
import type { ObjectInfo, ReadableStore } from "../store/store.ts";

export const INDEX = "model.safetensors.index.json";
const SINGLE = "model.safetensors";

/** Files beside the weights that say how a checkpoint is used, and under which terms. */
const SMALL = [
  ...["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"],
  ...["tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja"],
  ...["special_tokens_map.json", "added_tokens.json"],
];
const isSmall = (name: string) => SMALL.includes(name) || /^(README|LICEN[CS]E)(\.\w+)?$/i.test(name);

export interface Shard {
  name: string;
  info: ObjectInfo;
  entries: TensorEntry[];
}

/** One model of a store: a target, or a draft. */
export interface Source {
  store: ReadableStore;
  /** Where it is, for messages. */
  where: string;
  small: { name: string; info: ObjectInfo }[];
  shards: Shard[];
  /** Whether an index lists the shards. */
  indexed: boolean;
}

/** The whole of a small object. */
async function readAll(store: ReadableStore, key: string, signal: AbortSignal): Promise<Buffer> {
  const chunks: Uint8Array[] = [];
  for await (const chunk of store.read(key, {}, signal)) chunks.push(chunk);
  return Buffer.concat(chunks);
}

/**
 * The model at the store's root, or in the folder `prefix` (it ends with "/"), or undefined when there are no weights.
 * Throws CheckpointError for an index or a header that cannot be, StoreError when the store fails.
 */
export async function readSource(
  store: ReadableStore,
  prefix: string,
  objects: readonly ObjectInfo[],
  signal: AbortSignal,
): Promise<Source | undefined> {
  const where = `${store.location}/${prefix}`.replace(/\/+$/, "");
  const here = new Map(
    objects
      .filter(({ key }) => key.startsWith(prefix) && !key.slice(prefix.length).includes("/"))
      .map((info) => [info.key.slice(prefix.length), info]),
  );
  const indexed = !here.has(SINGLE);
  if (indexed && !here.has(INDEX)) return undefined;
  const index = `${where}/${INDEX}`;
  const map = indexed ? await readIndex(store, here.get(INDEX)!.key, index, signal) : {};
  const shards: Shard[] = [];
  for (const name of indexed ? new Set(Object.values(map)) : [SINGLE]) {
    // Shards keep their names, which must not lead elsewhere, nor be those of other files.
    if (!/^[^/\0]+\.safetensors$/.test(name))
      throw new CheckpointError(`${index}: ${JSON.stringify(name)} is no name of a file of weights`);
    const listed = here.get(name);
    if (!listed) throw new CheckpointError(`${index} names ${name}, which is missing`);
    const info = (listed.sha256 ? undefined : await store.stat(listed.key, signal)) ?? listed;
    shards.push({ name, info, entries: await readHeader(store, info, `${where}/${name}`, signal) });
  }
  const homes = new Map(shards.flatMap(({ name, entries }) => entries.map((entry) => [entry.name, name])));
  for (const [tensor, shard] of Object.entries(map))
    if (homes.get(tensor) !== shard) throw new CheckpointError(`${index}: tensor ${tensor} is not in ${shard}`);
  const small = [...here].filter(([name]) => isSmall(name) || (indexed && name === INDEX));
  return { store, where, small: small.map(([name, info]) => ({ name, info })), shards, indexed };
}

async function readIndex(store: ReadableStore, key: string, file: string, signal: AbortSignal) {
  const text = await readAll(store, key, signal);
  try {
    return parseConfig(Index, JSON.parse(text.toString()), file).weight_map;
  } catch (error) {
    if (error instanceof CheckpointError) throw error;
    throw new CheckpointError(`${file}: ${(error as Error).message}`, { cause: error });
  }
}

async function readHeader(store: ReadableStore, info: ObjectInfo, file: string, signal: AbortSignal) {
  const range = async (from: number, to: number) => {
    const chunks: Uint8Array[] = [];
    if (to > from) for await (const chunk of store.read(info.key, { from, to }, signal)) chunks.push(chunk);
    return Buffer.concat(chunks);
  };
  const length = headerBytes(await range(0, Math.min(PREFIX_BYTES, info.bytes)), info.bytes, file);
  return parseHeader(await range(PREFIX_BYTES, PREFIX_BYTES + length), info.bytes, file);
}

/** The tensors of a source, as graphs ask for them. */
export function sourceTensors({ where, shards }: Source): TensorSource {
  return new Weights(
    where,
    shards.map(({ name, entries }) => ({ file: `${where}/${name}`, entries })),
  );
}
