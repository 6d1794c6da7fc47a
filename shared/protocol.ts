/** The contract between edge and GPU worker. Schemas only; what clients send is in api.ts. */
import * as z from "zod";
import { seed } from "./api.ts";

/** A SHA-256 of an image's encoded bytes, in hex. */
export const ImageHash = z.string().regex(/^[0-9a-f]{64}$/, "must be a SHA-256 in lower-case hex");

/** How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 cut nothing. */
export const Sampling = z.strictObject({
  temperature: z.number().min(0).max(2),
  topP: z.number().gt(0).max(1),
  topK: z.int().min(0),
  minP: z.number().min(0).max(1),
  seed,
  /** 1: none. */
  repetitionPenalty: z.number().min(0.01).max(2),
  /** 0: none. */
  presencePenalty: z.number().min(-2).max(2),
  frequencyPenalty: z.number().min(-2).max(2),
  /** Pairs of a token and what is added to its logit. */
  logitBias: z.array(z.tuple([z.int().min(0), z.number().min(-100).max(100)])),
});
export type Sampling = z.infer<typeof Sampling>;

/** The area in pixels that a picture is resized to. */
export const PixelLimits = z.strictObject({ minPixels: z.int().min(1), maxPixels: z.int().min(1) });
export type PixelLimits = z.infer<typeof PixelLimits>;

/** A picture: by the hash of its bytes, or by a URL that the worker fetches. */
export const ImageRef = z.strictObject({
  hash: ImageHash.nullable(),
  url: z.string().max(8192).nullable(),
  /** Where it stands in the client's request, e.g. "messages[0].content[1]": what errors about it name. */
  where: z.string(),
  limits: PixelLimits,
});
export type ImageRef = z.infer<typeof ImageRef>;

/** Who goes first in the queue: someone who waits for the answer, or work that can wait. */
export const Priority = z.enum(["interactive", "batch"]);
export type Priority = z.infer<typeof Priority>;

/** What the edge sends: the tokenized prompt with one placeholder per image, and the images in order. */
export const GenerateRequest = z.strictObject({
  id: z.string().max(128),
  /** Whose request it is: part of the images' keys, and the lane in the queue. */
  tenant: z.string().max(256),
  priority: Priority,
  /** Seconds from now in which the answer has to be complete; null: as many as the worker allows. */
  deadline: z.number().gt(0).nullable(),
  kind: z.enum(["chat", "completion"]),
  model: z.string(),
  /** Names the tokenizer and template that made `tokens`; a worker that holds another model answers 412. */
  fingerprint: z.string(),
  tokens: z.array(z.int().min(0)),
  images: z.array(ImageRef),
  sampling: Sampling,
  /** Choices; the i-th is drawn with seed + i. */
  n: z.int().min(1).max(16),
  /** Of each choice; null: as many as the context has room for. */
  maxTokens: z.int().min(1).nullable(),
  stop: z.array(z.string().min(1)).max(16),
  stopTokenIds: z.array(z.int().min(0)).max(64),
  ignoreEos: z.boolean(),
  /** null: no log-probabilities; n: the chosen token's and those of the n likeliest. */
  logprobs: z.int().min(0).max(20).nullable(),
  /** JSON that the answer has to be: of any form (schema null), or of a JSON schema (its text). null: anything. */
  json: z.strictObject({ schema: z.string().nullable(), strict: z.boolean() }).nullable(),
  /** Decodes without drafts. */
  plain: z.boolean(),
  stream: z.boolean(),
  includeUsage: z.boolean(),
  includeDrafts: z.boolean(),
  /** What the client calls its user: for the log. */
  user: z.string().nullable(),
});
export type GenerateRequest = z.infer<typeof GenerateRequest>;

/** What the edge has to know of a worker's model (GET /internal/model). */
export interface ModelInfo {
  id: string;
  created: number;
  fingerprint: string;
  /** Prompt and answer together, in tokens. */
  contextLength: number;
  /** Tokens that have logits. */
  vocabulary: number;
  /** Text of the placeholder that the chat template writes for an image. */
  imageToken: string;
  /** A picture's area in pixels, where a request does not say it. */
  pixels: PixelLimits;
  /** Whether the worker has a draft model. */
  drafts: boolean;
  /** tokenizer.json and tokenizer_config.json as they are in the checkpoint. */
  tokenizer: object;
  tokenizerConfig: object;
}

/** 409 of POST /internal/generate: images that have to be sent (PUT, paths as imagePath gives) first, by their index. */
export interface MissingImages {
  missing: number[];
}

/** Where the edge puts an image's bytes, for one tenant and one size; it waits for its turn as the request would. */
export function imagePath(
  { tenant, priority, deadline }: Pick<GenerateRequest, "tenant" | "priority" | "deadline">,
  hash: string,
  { minPixels, maxPixels }: PixelLimits,
): string {
  const whose = `tenant=${encodeURIComponent(tenant)}&min=${minPixels}&max=${maxPixels}`;
  return `/internal/images/${hash}?${whose}&priority=${priority}${deadline === null ? "" : `&deadline=${deadline}`}`;
}

/** The query of such a path. */
export const ImageQuery = z.strictObject({
  tenant: z.string(),
  min: z.coerce.number().pipe(PixelLimits.shape.minPixels),
  max: z.coerce.number().pipe(PixelLimits.shape.maxPixels),
  priority: Priority,
  deadline: z.coerce.number().gt(0).nullable().default(null),
});

/** The name under which the engine holds a picture: nobody can hit another tenant's. */
export function imageKey(tenant: string, hash: string, { minPixels, maxPixels }: PixelLimits): string {
  return `${hash}/${minPixels}-${maxPixels}/${tenant}`;
}
