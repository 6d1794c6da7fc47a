/** Reads the goldens (test/goldens/README.md says how they were made) and asks the engine what they ask. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { encodePicture, type ImageRows } from "../../gpu-worker/engine/images.ts";
import type { Prompt } from "../../gpu-worker/engine/target.ts";
import type { Step } from "../../gpu-worker/engine.ts";
import { type EngineOptions, LocalEngine } from "../../gpu-worker/engine-local.ts";
import { decodeImage } from "../../gpu-worker/input/decode.ts";
import { ChatModel, prepareChat } from "../../shared/chat.ts";
import { type GenerateRequest, imageKey, type Sampling } from "../../shared/protocol.ts";

export const GOLDENS = join(import.meta.dirname, "../goldens/qwen");
export const MODEL = join(import.meta.dirname, "../../models/tiny-qwen2.5-vl");
export const LLAVA_GOLDENS = join(import.meta.dirname, "../goldens/llava");
export const LLAVA_MODEL = join(import.meta.dirname, "../../models/tiny-llava-next");

export const readGolden = (name: string, folder = GOLDENS) => JSON.parse(readFileSync(join(folder, name), "utf8"));

interface Part {
  type: string;
  image_url?: { url: string };
}

export interface Case {
  id: string;
  /** That the pictures' names lie in. */
  folder: string;
  messages: { role: string; content: string | Part[] }[];
  input_ids: number[];
  /** Of Qwen; LLaVA's are 0, 1, 2, … */
  position_ids?: number[][];
  rope_delta?: number;
  output_ids: number[];
  output_text: string;
  image_tokens: number;
}

function casesOf(folder: string): Case[] {
  return readGolden("cases.json", folder).cases.map((golden: Case) => ({ ...golden, folder }));
}

export const cases = casesOf(GOLDENS);

/** What the suites that hold for every family run over. */
export const families = [
  { name: "qwen", model: MODEL, goldens: GOLDENS, cases },
  { name: "llava", model: LLAVA_MODEL, goldens: LLAVA_GOLDENS, cases: casesOf(LLAVA_GOLDENS) },
];

/** A case, or what is asked like one; without a folder the pictures are Qwen's. */
export type Asked = Pick<Case, "id" | "messages"> & { folder?: string };

/** The target's own distribution, with nothing cut or changed. */
export const plainSampling: Sampling = {
  ...{ temperature: 1, topP: 1, topK: 0, minP: 0, seed: 1 },
  ...{ repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, logitBias: [] },
};

/** A case's messages with its pictures as data: URLs. */
export function withImages({ messages, folder }: Pick<Asked, "messages" | "folder">) {
  return messages.map((message) => ({
    ...message,
    content:
      typeof message.content === "string"
        ? message.content
        : message.content.map((part) =>
            part.image_url === undefined
              ? part
              : { type: "image_url", image_url: { url: dataUrl(part.image_url.url, folder) } },
          ),
  }));
}

export function dataUrl(name: string, folder = GOLDENS): string {
  return `data:image/png;base64,${readFileSync(join(folder, name)).toString("base64")}`;
}

/** A case as the engine's request, with the keys of its pictures, which the engine now holds. */
export async function prepare(
  engine: LocalEngine,
  golden: Asked,
  change: Partial<GenerateRequest> = {},
  pixels: { min_pixels?: number; max_pixels?: number } = {},
): Promise<{ request: GenerateRequest; images: string[] }> {
  const chat = { messages: withImages(golden), temperature: 0, max_tokens: 256, ...pixels };
  const asker = { id: golden.id, tenant: "" };
  const { request, images } = await prepareChat(chat as never, new ChatModel(engine.info), asker);
  const keys: string[] = [];
  for (const { hash, limits } of request.images) {
    keys.push(imageKey(request.tenant, hash!, limits));
    await engine.putImage(keys.at(-1)!, images.get(hash!)!.bytes, limits);
  }
  return { request: { ...request, ...change }, images: keys };
}

/** A case's expanded prompt, with its pictures' rows. */
export async function promptOf(engine: LocalEngine, golden: Case): Promise<Prompt & { rows: ImageRows[] }> {
  const rows: ImageRows[] = [];
  for (const { content } of golden.messages)
    for (const { image_url } of typeof content === "string" ? [] : content) {
      if (!image_url) continue;
      const picture = await decodeImage(readFileSync(join(golden.folder, image_url.url)));
      rows.push(encodePicture(engine.runtime, engine.model, picture));
    }
  const { request } = await prepare(engine, golden);
  const expanded = engine.model.family.expandPrompt(request.tokens, rows);
  return { expanded, imageRows: rows.map((image) => image.rows), rows };
}

/** All steps of a case's answer. */
export async function answer(
  engine: LocalEngine,
  golden: Asked,
  change: Partial<GenerateRequest> = {},
): Promise<Step[]> {
  const { request, images } = await prepare(engine, golden, change);
  return collect(engine.generate(request, images, AbortSignal.timeout(60_000)));
}

export const tokensOf = (steps: Step[]) => steps.flatMap(({ tokens }) => tokens);
export const textOf = (steps: Step[]) => steps.map(({ text }) => text).join("");

/** All steps of one generation. */
export async function collect(steps: AsyncIterable<Step>): Promise<Step[]> {
  const all: Step[] = [];
  for await (const step of steps) all.push(step);
  return all;
}

export function openEngine(options: Partial<EngineOptions> = {}): LocalEngine {
  return new LocalEngine({ model: MODEL, ...options });
}

/** Float32 tensors of tensors.safetensors by name. */
export function goldenTensors(folder = GOLDENS): Map<string, Float32Array> {
  const file = readFileSync(join(folder, "tensors.safetensors"));
  const length = Number(file.readBigUInt64LE());
  const header = JSON.parse(file.subarray(8, 8 + length).toString());
  const tensors = new Map<string, Float32Array>();
  for (const [name, entry] of Object.entries<{ dtype: string; data_offsets: [number, number] }>(header)) {
    if (entry.dtype !== "F32") continue;
    const [from, to] = entry.data_offsets.map((offset) => 8 + length + offset);
    tensors.set(name, new Float32Array(file.buffer.slice(file.byteOffset + from, file.byteOffset + to)));
  }
  return tensors;
}

/** The largest difference of two rows of numbers. */
export function maxDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.POSITIVE_INFINITY;
  let worst = 0;
  for (let i = 0; i < a.length; i++) worst = Math.max(worst, Math.abs(a[i] - b[i]));
  return worst;
}
