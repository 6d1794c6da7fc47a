/** What the image processors of all families share: fields of preprocessor_config.json, and levels to numbers. */
import { z } from "zod";
import { ApiError } from "../../shared/errors.ts";
import type { PixelLimits } from "../../shared/protocol.ts";
import type { Graph, Value } from "../graph/graph.ts";
import type { Picture } from "../input/decode.ts";
import { add, cast } from "../ops/elementwise.ts";
import { gather } from "../ops/shape.ts";

const three = z.tuple([z.number(), z.number(), z.number()]);
const always = z.literal(true).optional();

/** Fields of preprocessor_config.json. Steps that are always done here: a model that wants them otherwise is refused. */
export const PIXEL_FIELDS = {
  image_mean: three,
  image_std: three,
  rescale_factor: z
    .number()
    .positive()
    .default(1 / 255),
  do_resize: always,
  do_rescale: always,
  do_normalize: always,
  do_convert_rgb: always,
  resample: z.literal(3, "only bicubic resampling (3) is supported").optional(),
};

export interface Normalization {
  mean: readonly number[];
  std: readonly number[];
  rescaleFactor: number;
}

/** The float32 value of each of a channel's 256 levels; every step rounds to float32, as numpy does. */
export function levels(config: Normalization, channel: number): Float32Array {
  const mean = Math.fround(config.mean[channel]);
  const std = Math.fround(config.std[channel]);
  return Float32Array.from(
    { length: 256 },
    (_, level) => Math.fround(Math.fround(level * config.rescaleFactor) - mean) / std,
  );
}

/** Levels u8 [..,3] to the numbers of `levels`, bit for bit, in the graph's own type. */
export function numbersOf(g: Graph, pixels: Value, config: Normalization): Value {
  const tables = g.floats([0, 1, 2].flatMap((channel) => [...levels(config, channel)]));
  return gather(g, tables, add(g, cast(g, pixels, "i32"), cast(g, g.ints([0, 256, 512]), "i32")));
}

/** A square of `side` pixels of one channel, row by row, to `out` from `at` on. */
export function writeSquare(
  out: Float32Array,
  at: number,
  { width, rgb }: Picture,
  square: { top: number; left: number; side: number },
  channel: number,
  table: Float32Array,
): void {
  const { top, left, side } = square;
  for (let y = 0; y < side; y++) {
    let source = ((top + y) * width + left) * 3 + channel;
    for (let x = 0; x < side; x++, source += 3) out[at++] = table[rgb[source]];
  }
}

export interface Size {
  width: number;
  height: number;
}

/** Throws ApiError 400 for a minimum above the maximum. */
export function checkLimits({ minPixels, maxPixels }: PixelLimits): void {
  if (minPixels <= maxPixels) return;
  const message = `min_pixels is ${minPixels}, which is more than max_pixels, ${maxPixels}.`;
  throw new ApiError(400, message, { param: "min_pixels" });
}

const MAX_ASPECT_RATIO = 200;

/** Throws ApiError 400 for a picture whose longer side is more than 200 times the shorter. */
export function checkAspectRatio({ width, height }: Size): void {
  const ratio = Math.max(width, height) / Math.min(width, height);
  if (ratio <= MAX_ASPECT_RATIO) return;
  const message = `The image's aspect ratio must not exceed ${MAX_ASPECT_RATIO}, but ${width}x${height} has ${Number(ratio.toFixed(2))}.`;
  throw new ApiError(400, message, { code: "invalid_image" });
}
