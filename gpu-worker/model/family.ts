/** What one architecture of vision-language models has of its own: adding one is a folder with such an object. */
import { ApiError } from "../../shared/errors.ts";
import type { PixelLimits } from "../../shared/protocol.ts";
import type { Graph, GraphOptions } from "../graph/graph.ts";
import type { Picture } from "../input/decode.ts";
import type { Filter } from "../input/resize.ts";
import type { LanguageConfig, LanguageNames } from "./language.ts";
import type { TensorSource } from "./weights.ts";

export interface FamilyConfig {
  language: LanguageConfig;
  /** What the checkpoint at hand calls the decoder's tensors. */
  names: LanguageNames;
  /** Prompt and answer together, in tokens. */
  contextLength: number;
  ropeTheta: number;
  /** Placeholder of a picture in the prompt. */
  imageToken: number;
  eosTokens: ReadonlySet<number>;
}

/** What a prompt has to know of a picture in it. */
export interface ImageShape {
  /** Rows that the vision tower gives, one a token of the prompt. */
  count: number;
  /** Rows and columns that they stand in, where positions depend on it. */
  grid?: readonly [height: number, width: number];
}

/** Numbers in float32, places in i64, levels of pixels in bytes. */
export type InputData = Float32Array | BigInt64Array | Uint8Array;

/** One run of the vision graph on a picture, as plain data. */
export interface VisionPass {
  inputs: Record<string, { data: InputData; dims: number[] }>;
  /** Of the output `rows` [count, D]. */
  image: ImageShape;
}

/** A prompt with each image placeholder expanded to one token for each row that the vision tower gives. */
export interface ExpandedPrompt {
  tokens: number[];
  /** First token and count of each image's run. */
  images: { at: number; count: number }[];
  /** One or several rows of positions, [S] each; `rotaryAxes` says what turns with which. */
  positions: readonly Int32Array[];
  /** The token at index i after the prompt has position i + delta in all rows. */
  delta: number;
}

export interface Family {
  readonly config: FamilyConfig;
  /** [head/2]: the row of positions that each rotary frequency of the decoder turns with. */
  readonly rotaryAxes: readonly number[];
  /** The area that pictures have where a request does not say it. */
  readonly pixels: PixelLimits;
  /** Tokens of a picture of that size. Throws ApiError 400 for one that cannot be brought to the limits. */
  imageTokens(size: { width: number; height: number }, limits: PixelLimits): number;
  /**
   * From one picture's inputs, as `visionPass` makes them, to the output `rows` [count,D]. A graph that binds its weights
   * takes the levels of pixels, and makes the processor's numbers of them itself.
   */
  visionGraph(w: TensorSource, options: GraphOptions): Graph;
  /** `filter`: for a graph that binds its weights, resizes the picture; else it is done here. Throws as imageTokens. */
  visionPass(picture: Picture, limits: PixelLimits, filter?: Filter): VisionPass;
  /** Throws ApiError 400 where placeholders and pictures are not as many. */
  expandPrompt(tokens: readonly number[], images: readonly ImageShape[]): ExpandedPrompt;
}

/** Every placeholder as often as its picture has rows. Throws ApiError 400 where there are not as many of both. */
export function expandImages(
  tokens: readonly number[],
  images: readonly ImageShape[],
  imageToken: number,
): Pick<ExpandedPrompt, "tokens" | "images"> {
  const placeholders = tokens.filter((t) => t === imageToken).length;
  if (placeholders !== images.length)
    throw new ApiError(400, `the prompt has ${placeholders} image placeholders for ${images.length} images`, {
      code: "image_placeholders",
      param: "messages",
    });
  const out: number[] = [];
  const runs: { at: number; count: number }[] = [];
  for (const token of tokens) {
    const count = token === imageToken ? images[runs.length].count : 1;
    if (token === imageToken) runs.push({ at: out.length, count });
    for (let i = 0; i < count; i++) out.push(token);
  }
  return { tokens: out, images: runs };
}
