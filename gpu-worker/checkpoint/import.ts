/** Brings a checkpoint and its draft from a store into a folder: checked before it is loaded, whole or not at all. */
import { existsSync, mkdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { CheckpointError } from "../../shared/errors.ts";
import { draftJson, extraTensors } from "../model/draft.ts";
import { describe, graphs } from "../model/model.ts";
import { bytesOf } from "../model/safetensors.ts";
import { readJson, Weights } from "../model/weights.ts";
import { formatBytes, Progress } from "../progress.ts";
import { openSource } from "../store/open.ts";
import {
  bitsOf,
  type Change,
  convertShard,
  type ImportDtype,
  plannedBytes,
  planShard,
  type Squares,
} from "./convert.ts";
import { quantizationConfig } from "./quantize.ts";
import { INDEX, readSource, type Shard, type Source, sourceTensors } from "./source.ts";
import { bytesHere, fetchFile, localFile, Staging, writing } from "./staging.ts";

export interface ImportRequest {
  /** A directory, s3://bucket/prefix, or a hub's org/name. */
  model: string;
  /** The same; by default the folder `draft` of the model, if there is one. */
  draft?: string;
  /** What the weights become; by default they stay as they are. */
  dtype?: ImportDtype;
}

export interface Imported {
  /** Of all weights. */
  bytes: number;
  /** Root mean square of what quantization changed, over that of the weights: of all, and of the worst matrix. */
  error?: { overall: number; worst: number; name: string };
}

/** A shard of the target or of its draft, on its way. */
interface Item {
  source: Source;
  shard: Shard;
  /** Relative to the checkpoint. */
  name: string;
  /** undefined: as it is. */
  plan: Change[] | undefined;
  /** Of what is written in the end. */
  bytes: number;
}

/**
 * Imports into `out`, which must not exist. What is broken off stays in `out`.partial, and the same request goes on with
 * it. Progress and warnings go to standard error. Throws CheckpointError or StoreError for what cannot be used,
 * DiskFullError, or the signal's reason.
 */
export async function importCheckpoint(request: ImportRequest, out: string, signal: AbortSignal): Promise<Imported> {
  const { target, draft } = await findSources(request, signal);
  const { dtype } = request;
  const draftDtype = bitsOf(dtype) ? undefined : dtype;
  const drafting = draft ? request.draft && `with the draft ${request.draft}` : "without a draft";
  const words = [request.model, drafting, dtype && `as ${dtype}`];
  const staging = new Staging(out, words.filter(Boolean).join(" "));
  try {
    return await writing(out, async () => {
      await bringSmall(staging, target, "", signal);
      rmSync(staging.path("draft/config.json"), { force: true });
      if (draft) await bringSmall(staging, draft, "draft/", signal);
      check(staging, target, draft, dtype);
      const items = [...itemsOf(target, "", dtype), ...(draft ? itemsOf(draft, "draft/", draftDtype) : [])];
      staging.begin(items.map(({ name, shard }) => [name, shard.info]));
      await bringShards(staging, items, signal);
      if (dtype) rewrite(staging, "", target, items, dtype);
      if (draft && draftDtype) rewrite(staging, "draft/", draft, items, draftDtype);
      checkWritten(staging, draft !== undefined);
      const error = quantizationError(staging);
      await staging.finish();
      return { bytes: items.reduce((sum, { bytes }) => sum + bytes, 0), error };
    });
  } catch (error) {
    if (!staging.begun) staging.discard();
    throw withPlaces(error, staging, target, draft);
  }
}

/** The model and its draft: the one asked for, or the one beside the model, if any. */
async function findSources({ model, draft }: ImportRequest, signal: AbortSignal) {
  const open = async (location: string) => {
    const store = openSource(location);
    const objects = await store.list("", signal);
    return (folder: string) => readSource(store, folder, objects, signal);
  };
  const found = (source: Source | undefined, location: string) => {
    if (source) return source;
    throw new CheckpointError(`${location} has neither model.safetensors nor ${INDEX}`);
  };
  const own = await open(model);
  const target = found(await own(""), model);
  return { target, draft: draft === undefined ? await own("draft/") : found(await (await open(draft))(""), draft) };
}

/** Small files come anew each time: the last run may have rewritten them. */
async function bringSmall(staging: Staging, source: Source, folder: string, signal: AbortSignal): Promise<void> {
  mkdirSync(staging.path(folder), { recursive: true });
  for (const { name, info } of source.small) {
    const file = staging.path(folder + name);
    for (const old of [file, `${file}.part`]) rmSync(old, { force: true });
    await writing(file, () => fetchFile(source.store, info, file, () => {}, signal));
  }
}

/** Builds all graphs over the headers, which asks for every tensor; completes a draft that has no config.json. */
function check(staging: Staging, target: Source, draft: Source | undefined, dtype: ImportDtype | undefined): void {
  const draftFolder = draft && staging.path("draft");
  const sources = { target: sourceTensors(target), draft: draft && sourceTensors(draft) };
  const checkpoint = describe(staging.folder, draftFolder, sources);
  graphs(checkpoint);
  const file = staging.path("config.json");
  const config = readJson(file) as { model_type: string; quantization_config?: unknown };
  if (dtype && config.quantization_config)
    throw new CheckpointError(`${file}: quantization_config: what is quantized already is imported without --dtype`);
  if (!draft || !checkpoint.draft) return;
  const names = draft.shards.flatMap(({ entries }) => entries.map(({ name }) => name));
  const extra = extraTensors(checkpoint.draft.config, names);
  if (extra.length > 0)
    console.error(`vispec: ${draft.where}: no draft has these tensors, they are ignored: ${extra.join(", ")}`);
  const own = staging.path("draft/config.json");
  if (existsSync(own)) return;
  writeFileSync(own, JSON.stringify(draftJson(checkpoint.draft.config, config.model_type), null, 2));
}

/** Builds the graphs of what was written, from its files. */
function checkWritten(staging: Staging, drafts: boolean): void {
  const target = new Weights(staging.folder);
  const draft = drafts ? new Weights(staging.path("draft")) : undefined;
  graphs(describe(target.folder, draft?.folder, { target, draft }));
}

/** The error, naming the source in place of the folder that its small files were brought to. */
function withPlaces(error: unknown, staging: Staging, target: Source, draft: Source | undefined): unknown {
  if (!(error instanceof CheckpointError)) return error;
  const told = draft ? error.message.replaceAll(staging.path("draft"), draft.where) : error.message;
  return new CheckpointError(told.replaceAll(staging.folder, target.where), { cause: error });
}

function itemsOf(source: Source, folder: string, dtype: ImportDtype | undefined): Item[] {
  return source.shards.map((shard) => {
    const plan = dtype && planShard(shard.entries, dtype, `${source.where}/${shard.name}`);
    return { source, shard, name: folder + shard.name, plan, bytes: plan ? plannedBytes(plan) : shard.info.bytes };
  });
}

/** Brings every shard that is not there yet, converted where it is to be. */
async function bringShards(staging: Staging, items: Item[], signal: AbortSignal): Promise<void> {
  let [total, done, room, original] = [0, 0, 0, 0];
  for (const { source, shard, name, plan, bytes } of items) {
    const download = plan && !localFile(source.store, "") ? shard.info.bytes : 0;
    const whole = existsSync(staging.path(name));
    const here = whole ? download + bytes : bytesHere(plan ? staging.original(name) : staging.path(name));
    total += download + bytes;
    done += here;
    if (whole) continue;
    room += plan ? bytes : bytes - here;
    original = Math.max(original, download - here);
  }
  staging.checkSpace(room + original);
  const going = done > 0 ? `, of which ${formatBytes(done)} are there` : "";
  console.error(`${staging.out}: weights of ${formatBytes(total)} in ${items.length} files${going}`);
  const progress = new Progress("import", total, done);
  try {
    for (const item of items)
      if (!existsSync(staging.path(item.name)))
        await writing(staging.path(item.name), () => bringShard(staging, item, (n) => progress.add(n), signal));
  } finally {
    progress.end();
  }
}

async function bringShard(
  staging: Staging,
  { source, shard, name, plan }: Item,
  wrote: (bytes: number) => void,
  signal: AbortSignal,
): Promise<void> {
  const file = staging.path(name);
  if (!plan) return fetchFile(source.store, shard.info, file, wrote, signal);
  const original = localFile(source.store, shard.info.key) ?? staging.original(name);
  await fetchFile(source.store, shard.info, original, wrote, signal);
  staging.addErrors(await convertShard(original, `${file}.part`, plan, wrote, signal));
  renameSync(`${file}.part`, file);
  rmSync(staging.original(name), { force: true });
}

const TORCH_DTYPES: Partial<Record<ImportDtype, string>> = { bf16: "bfloat16", fp16: "float16", fp32: "float32" };

/** Has config.json and the index say what the weights have become. */
function rewrite(staging: Staging, folder: string, source: Source, items: Item[], dtype: ImportDtype): void {
  const edit = (name: string, change: (json: Record<string, unknown>) => void) => {
    const file = staging.path(folder + name);
    const json = readJson(file) as Record<string, unknown>;
    change(json);
    writeFileSync(file, `${JSON.stringify(json, null, 2)}\n`);
  };
  edit("config.json", (config) => {
    const bits = bitsOf(dtype);
    if (bits) config.quantization_config = quantizationConfig(bits);
    else
      for (const part of [config, config.text_config, config.vision_config] as Record<string, unknown>[])
        for (const key of ["torch_dtype", "dtype"]) if (part?.[key]) part[key] = TORCH_DTYPES[dtype];
  });
  if (!source.indexed) return;
  edit(INDEX, (index) => {
    const tensors = items
      .filter((item) => item.source === source)
      .flatMap(({ shard, plan = [] }) =>
        plan.flatMap(({ to }) => to.map((tensor) => ({ ...tensor, shard: shard.name }))),
      );
    index.metadata = { total_size: tensors.reduce((sum, tensor) => sum + bytesOf(tensor), 0) };
    index.weight_map = Object.fromEntries(tensors.map(({ name, shard }) => [name, shard]));
  });
}

function quantizationError({ errors }: Staging): Imported["error"] {
  const rms = ({ squares, squaredError }: Squares) => Math.sqrt(squaredError / (squares || 1));
  const all = Object.entries(errors);
  if (all.length === 0) return undefined;
  const [name, worst] = all.reduce((a, b) => (rms(b[1]) > rms(a[1]) ? b : a));
  const sum = all.reduce((a, [, b]) => ({ squares: a.squares + b.squares, squaredError: a.squaredError + b.squaredError }), { squares: 0, squaredError: 0 }); // biome-ignore format: one sum
  return { overall: rms(sum), worst: rms(worst), name };
}
