/**
 * Makes a checkpoint with the tensors' shapes of a large model that answers as a small one does: to measure speed by,
 * and to test with, where no real weights are. The small weights stand in a corner of the large tensors; the rest is
 * random or zero and without effect (inflate-decoder.ts and inflate-vision.ts say how).
 */
import { createHash } from "node:crypto";
import { copyFileSync, existsSync, mkdirSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CheckpointError } from "../../shared/errors.ts";
import { draftJson } from "../model/draft.ts";
import { describe, graphs } from "../model/model.ts";
import { bytesOf, encodeHeader } from "../model/safetensors.ts";
import { readJson, Weights } from "../model/weights.ts";
import { planDecoder, planDraft } from "./inflate-decoder.ts";
import { Plan, type Planned } from "./inflate-plan.ts";
import { decoderConfig, decoderOf, inflatedConfig, type Shape, shapeOf } from "./inflate-shapes.ts";
import { planClip, planQwenVision } from "./inflate-vision.ts";
import { fileBytes, writeTensors } from "./inflate-write.ts";
import { Staging, writing } from "./staging.ts";

/** Of one file with weights. */
const SHARD_BYTES = 5e9;

export interface Inflation {
  /** Files with weights: path in the checkpoint, and tensors in their order. */
  files: { path: string; tensors: Planned[]; bytes: number }[];
  /** Files of text. */
  texts: { path: string; text: string }[];
  /** Files that are copied: path in the checkpoint, and whence. */
  copies: { path: string; from: string }[];
  /** SHA-256 of all that decides the bytes of `files`. */
  digest: string;
}

/** The sizes of a small checkpoint. */
export const readShape = (folder: string): Shape => shapeOf(readJson(join(folder, "config.json")));

/**
 * What is to be written: nothing but the small checkpoint is read. `draft` is that of `model`; CheckpointError where one
 * of them is none, they don't fit each other, or they don't fit into `shape`.
 */
export function planInflation(model: string, draft: string, shape: Shape, shardBytes = SHARD_BYTES): Inflation {
  const checkpoint = describe(model, draft);
  graphs(checkpoint); // asks for every tensor by name and shape
  const [tiny, draftFile] = [readShape(model), join(draft, "config.json")];
  // Published drafts may lack it.
  const draftConfig = existsSync(draftFile) ? readJson(draftFile) : draftJson(checkpoint.draft!.config, tiny.family);
  const qwen = tiny.family === "qwen2_5_vl";
  const prefix = qwen ? "" : "language_model.";
  const target = new Plan(new Weights(model), `${prefix}lm_head.weight`);
  (qwen ? planQwenVision : planClip)(target, tiny, shape);
  planDecoder(target, prefix, tiny, shape);
  const drafting = new Plan(new Weights(draft), "embed_tokens.weight");
  planDraft(drafting, { ...tiny, decoder: decoderOf(draftConfig) }, shape);

  const shards = split(target.tensors, shardBytes);
  const number = (i: number) => String(i).padStart(5, "0");
  const files = shards.map((tensors, i) => ({
    path: `model-${number(i + 1)}-of-${number(shards.length)}.safetensors`,
    tensors,
  }));
  decoderConfig(draftConfig, tiny, shape);
  Object.assign(draftConfig, { num_key_value_heads: shape.decoder.heads });
  const json = (value: object) => `${JSON.stringify(value, null, 2)}\n`;
  const map = files.flatMap(({ path, tensors }) => tensors.map(({ name }) => [name, path]));
  const index = { metadata: { total_size: target.bytes }, weight_map: Object.fromEntries(map) };
  const all = [...files, { path: "draft/model.safetensors", tensors: drafting.tensors }];
  return {
    files: all.map((file) => ({ ...file, bytes: fileBytes(file.tensors) })),
    texts: [
      { path: "config.json", text: json(inflatedConfig(readJson(join(model, "config.json")), tiny, shape)) },
      { path: "model.safetensors.index.json", text: json(index) },
      { path: "draft/config.json", text: json(draftConfig) },
    ],
    copies: readdirSync(model, { withFileTypes: true })
      .filter((entry) => entry.isFile() && !/^config\.json$|safetensors|^README|^\./.test(entry.name))
      .map(({ name }) => ({ path: name, from: join(model, name) })),
    digest: digestOf(all.flatMap(({ tensors }) => tensors)),
  };
}

function split(tensors: Planned[], most: number): Planned[][] {
  const shards: Planned[][] = [];
  let room = 0;
  for (const tensor of tensors) {
    const bytes = bytesOf(tensor);
    if (shards.length === 0 || bytes > room) {
      shards.push([]);
      room = most;
    }
    shards.at(-1)!.push(tensor);
    room -= bytes;
  }
  return shards;
}

function digestOf(tensors: Planned[]): string {
  const digest = createHash("sha256").update(encodeHeader(tensors));
  for (const { rows, columns, source } of tensors) {
    digest.update(rows).update(columns);
    if (source) digest.update(source.data);
  }
  return digest.digest("hex");
}

const isWritten = (file: string, bytes: number) => statSync(file, { throwIfNoEntry: false })?.size === bytes;

/**
 * Writes the checkpoint beside `out` and renames it at the end; interrupted, it goes on with the file where it was.
 * `begins` hears how many bytes of weights there are, and how many of them are there already; what it gives hears of
 * bytes as they are written. CheckpointError when `out` exists or what lies beside it is of something else,
 * DiskFullError, or the signal's reason.
 */
export async function writeInflation(
  plan: Inflation,
  out: string,
  signal: AbortSignal,
  begins: (total: number, there: number) => (bytes: number) => void = () => () => {},
): Promise<void> {
  if (existsSync(out)) throw new CheckpointError(`${out} exists already`);
  const staging = new Staging(out, `an inflated model (${plan.digest})`);
  const sum = (files: Inflation["files"]) => files.reduce((total, { bytes }) => total + bytes, 0);
  const missing = plan.files.filter(({ path, bytes }) => !isWritten(staging.path(path), bytes));
  try {
    staging.checkSpace(sum(missing));
  } catch (error) {
    if (!staging.begun) staging.discard();
    throw error;
  }
  staging.begin([]);
  const wrote = begins(sum(plan.files), sum(plan.files) - sum(missing));
  mkdirSync(staging.path("draft"), { recursive: true });
  for (const { path, tensors } of missing) {
    const file = staging.path(path);
    await writing(file, () => writeTensors(file, tensors, signal, wrote));
  }
  for (const { path, text } of plan.texts) writeFileSync(staging.path(path), text);
  for (const { path, from } of plan.copies) copyFileSync(from, staging.path(path));
  await staging.finish();
}
