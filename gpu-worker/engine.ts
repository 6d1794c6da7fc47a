/** What the HTTP server knows of the engine: the interface that the engine's process and its stand-in share. */
import type { GenerateRequest, ModelInfo, PixelLimits } from "../shared/protocol.ts";

export type FinishReason = "stop" | "length";

export interface TokenLogprob {
  token: number;
  /** Natural logarithm, under the target's distribution before temperature and cuts. */
  logprob: number;
  top: { token: number; logprob: number }[];
}

/** What one decoding cycle of one choice gave. Choices come one after the other. */
export interface Step {
  choice: number;
  /** Tokens of this cycle: accepted drafts, then one of the target's own. */
  tokens: number[];
  /** How many of `tokens` were drafts. */
  accepted: number;
  /** Text that became final; never ends in half a character, never holds a stop string or a part of one. */
  text: string;
  /** How many characters of `text`, its first, came of drafts. */
  draftText: number;
  logprobs?: TokenLogprob[];
  /** Set on a choice's last step only. */
  finish?: Finish;
}

export interface Finish {
  reason: FinishReason;
  promptTokens: number;
  /** Prompt tokens that were known from earlier requests. */
  cachedTokens: number;
  completionTokens: number;
  /** Prompt tokens that stand for images. */
  imageTokens: number;
  /** Verify passes, without the prefill. */
  cycles: number;
  acceptedPerCycle: number[];
  /** Drafts that were proposed. */
  drafted: number;
  timings: Timings;
}

/** Milliseconds. */
export interface Timings {
  prefill: number;
  draft: number;
  verify: number;
  total: number;
}

export interface Engine {
  readonly info: ModelInfo;
  /** False while the engine's process is being started again. */
  readonly ready: boolean;
  /** How often that was. */
  readonly restarts: number;
  /** How many requests are to run at once. */
  readonly concurrency: number;
  /** Those of the images (see imageKey) that the engine does not hold. */
  missingImages(keys: string[]): Promise<string[]>;
  /** Decodes, checks, resizes and keeps an image; throws ApiError 400 for one that cannot be read or has too many tokens. */
  putImage(key: string, bytes: Uint8Array, limits: PixelLimits): Promise<void>;
  /**
   * All choices of a request, one after the other; `images` are the keys of its pictures, in order. Throws ApiError for a
   * request that does not fit the model, and 409 when a picture is not held any more; an abort ends it within one cycle.
   */
  generate(request: GenerateRequest, images: string[], signal: AbortSignal): AsyncIterable<Step>;
  close(): Promise<void>;
}
