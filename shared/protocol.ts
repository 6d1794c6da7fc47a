/** The contract between edge and GPU worker, and the part of OpenAI's chat API that both take. Schemas only. */
import { z } from "zod";

/** A SHA-256 of an image's encoded bytes, in hex: the name under which a GPU worker holds the image. */
export const ImageHash = z.string().regex(/^[0-9a-f]{64}$/, "must be a SHA-256 in lower-case hex");

const seed = z
  .int()
  .min(-(2 ** 53) + 1)
  .max(2 ** 53 - 1);

/** How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 cut nothing. */
export const Sampling = z.strictObject({
  temperature: z.number().min(0).max(2),
  topP: z.number().gt(0).max(1),
  topK: z.int().min(0),
  minP: z.number().min(0).max(1),
  seed,
});
export type Sampling = z.infer<typeof Sampling>;

/** What the edge sends: the tokenized prompt with one placeholder per image, and the images' hashes in order. */
export const GenerateRequest = z.strictObject({
  id: z.string().max(128),
  model: z.string(),
  /** Names the tokenizer and template that made `tokens`; a worker that holds another model answers 412. */
  fingerprint: z.string(),
  tokens: z.array(z.int().min(0)),
  images: z.array(ImageHash),
  sampling: Sampling,
  /** null: as many as the context has room for. */
  maxTokens: z.int().min(1).nullable(),
  stop: z.array(z.string().min(1)).max(16),
  stopTokenIds: z.array(z.int().min(0)).max(64),
  /** null: no log-probabilities; n: the chosen token's and those of the n likeliest. */
  logprobs: z.int().min(0).max(20).nullable(),
  stream: z.boolean(),
  includeUsage: z.boolean(),
});
export type GenerateRequest = z.infer<typeof GenerateRequest>;

/** What the edge has to know of a worker's model (GET /internal/model). */
export interface ModelInfo {
  id: string;
  created: number;
  fingerprint: string;
  /** Prompt and answer together, in tokens. */
  contextLength: number;
  /** Text of the placeholder that the chat template writes for an image. */
  imageToken: string;
  /** tokenizer.json and tokenizer_config.json as they are in the checkpoint. */
  tokenizer: object;
  tokenizerConfig: object;
}

/** 409 of POST /internal/generate: these images have to be sent (PUT /internal/images/:hash) first. */
export interface MissingImages {
  missing: string[];
}

const TextPart = z.strictObject({ type: z.literal("text"), text: z.string() });
const ImagePart = z.strictObject({
  type: z.literal("image_url"),
  image_url: z.strictObject({ url: z.string().min(1), detail: z.enum(["auto", "low", "high"]).optional() }),
});
const parts = <T extends z.ZodType>(part: T) => z.union([z.string(), z.array(part).min(1)]);

/** One message of OpenAI's chat API. */
export const ChatMessage = z.discriminatedUnion("role", [
  z.strictObject({ role: z.literal("system"), content: parts(TextPart), name: z.string().optional() }),
  z.strictObject({ role: z.literal("developer"), content: parts(TextPart), name: z.string().optional() }),
  z.strictObject({
    role: z.literal("user"),
    content: parts(z.discriminatedUnion("type", [TextPart, ImagePart])),
    name: z.string().optional(),
  }),
  z.strictObject({ role: z.literal("assistant"), content: parts(TextPart), name: z.string().optional() }),
]);
export type ChatMessage = z.infer<typeof ChatMessage>;

/** The request body of POST /v1/chat/completions. A parameter that is not here is refused by its name. */
export const ChatRequest = z.strictObject({
  model: z.string().optional(),
  messages: z.array(ChatMessage).min(1),
  temperature: z.number().min(0).max(2).nullish(),
  top_p: z.number().gt(0).max(1).nullish(),
  top_k: z.int().min(0).nullish(),
  min_p: z.number().min(0).max(1).nullish(),
  seed: seed.nullish(),
  max_tokens: z.int().min(1).nullish(),
  max_completion_tokens: z.int().min(1).nullish(),
  stop: z.union([z.string().min(1), z.array(z.string().min(1)).max(16)]).nullish(),
  stop_token_ids: z.array(z.int().min(0)).max(64).nullish(),
  logprobs: z.boolean().nullish(),
  top_logprobs: z.int().min(0).max(20).nullish(),
  stream: z.boolean().nullish(),
  stream_options: z.strictObject({ include_usage: z.boolean().optional() }).nullish(),
  n: z.literal(1, "only one choice per request is supported").nullish(),
  user: z.string().nullish(),
});
export type ChatRequest = z.infer<typeof ChatRequest>;
