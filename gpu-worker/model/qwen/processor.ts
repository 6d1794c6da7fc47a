/** From an RGB picture to the patches of Qwen2.5-VL's vision tower, as Hugging Face's Qwen2VLImageProcessor (Pillow backend) makes them. */
import { z } from "zod";
import type { Picture } from "../../input/decode.ts";
import { type Filter, filterHere, resizeBicubic } from "../../input/resize.ts";
import { checkAspectRatio, checkLimits, levels, PIXEL_FIELDS, writeSquare } from "../pixels.ts";

const Stored = z.object({
  // Older files name the limits min_pixels and max_pixels, newer ones size.shortest_edge and size.longest_edge (pixels, for all their names).
  min_pixels: z.int().positive().nullish(),
  max_pixels: z.int().positive().nullish(),
  size: z
    .object({ shortest_edge: z.int().positive().optional(), longest_edge: z.int().positive().optional() })
    .nullish(),
  patch_size: z.int().positive().default(14),
  temporal_patch_size: z.int().positive().default(2),
  merge_size: z.int().positive().default(2),
  ...PIXEL_FIELDS,
});

/** Parses a model's preprocessor_config.json; limits default to those of the Hugging Face class (56² and 28²·1280 pixels). */
export const ProcessorConfig = Stored.transform((s) => ({
  minPixels: s.min_pixels ?? s.size?.shortest_edge ?? 56 * 56,
  maxPixels: s.max_pixels ?? s.size?.longest_edge ?? 28 * 28 * 1280,
  patchSize: s.patch_size,
  temporalPatchSize: s.temporal_patch_size,
  mergeSize: s.merge_size,
  mean: s.image_mean,
  std: s.image_std,
  rescaleFactor: s.rescale_factor,
})).refine((c) => c.minPixels <= c.maxPixels, "min_pixels must not exceed max_pixels");
export type ProcessorConfig = z.infer<typeof ProcessorConfig>;

/** Patches in time, height and width. */
export type Grid = [t: number, h: number, w: number];

export interface ProcessedImage {
  /** [t·h·w, 3·temporalPatchSize·patchSize²] float32, in merge-block order. */
  pixels: Float32Array;
  grid: Grid;
}

/**
 * The size in pixels that a picture is resized to: multiples of `factor`, about the same aspect ratio, an area within
 * the limits where that is possible. As smart_resize of Hugging Face's image_processing_qwen2_vl.
 * Throws ApiError 400 for an aspect ratio over 200 or a minimum above the maximum.
 */
export function smartResize(
  width: number,
  height: number,
  factor: number,
  minPixels: number,
  maxPixels: number,
): { width: number; height: number } {
  checkLimits({ minPixels, maxPixels });
  checkAspectRatio({ width, height });
  const rounded = { width: roundHalfEven(width / factor) * factor, height: roundHalfEven(height / factor) * factor };
  const area = rounded.width * rounded.height;
  if (area > maxPixels) {
    const shrink = Math.sqrt((height * width) / maxPixels);
    const edge = (n: number) => Math.max(factor, Math.floor(n / shrink / factor) * factor);
    return { width: edge(width), height: edge(height) };
  }
  if (area < minPixels) {
    const grow = Math.sqrt(minPixels / (height * width));
    const edge = (n: number) => Math.ceil((n * grow) / factor) * factor;
    return { width: edge(width), height: edge(height) };
  }
  return rounded;
}

/** Python's round(): halves go to the even neighbour. */
function roundHalfEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest < 0.5 || (rest === 0.5 && floor % 2 === 0) ? floor : floor + 1;
}

/** The patches of a picture of this size. Throws as smartResize. */
export function imageGrid({ width, height }: { width: number; height: number }, config: ProcessorConfig): Grid {
  const { patchSize, mergeSize, minPixels, maxPixels } = config;
  const size = smartResize(width, height, patchSize * mergeSize, minPixels, maxPixels);
  return [1, size.height / patchSize, size.width / patchSize];
}

/** Prompt tokens that stand for an image of this grid. */
export function imageTokens(grid: Grid, config: ProcessorConfig): number {
  return (grid[0] * grid[1] * grid[2]) / config.mergeSize ** 2;
}

/** The picture at the size that is cut into the grid's patches. Throws as smartResize. */
export function resizeToGrid(
  picture: Picture,
  config: ProcessorConfig,
  filter: Filter,
): { resized: Picture; grid: Grid } {
  const grid = imageGrid(picture, config);
  return { resized: resizeBicubic(picture, grid[2] * config.patchSize, grid[1] * config.patchSize, filter), grid };
}

/**
 * Resizes, normalizes and cuts a picture into patches. Patches come in merge blocks (mergeSize² neighbours together,
 * blocks row by row), each as [channel, frame, row, column] with the one frame repeated. Throws as smartResize.
 */
export function processImage(picture: Picture, config: ProcessorConfig): ProcessedImage {
  const { resized, grid } = resizeToGrid(picture, config, filterHere);
  const [, rows, columns] = grid;
  const perPatch = 3 * config.temporalPatchSize * config.patchSize ** 2;
  const pixels = new Float32Array(rows * columns * perPatch);
  const tables = [0, 1, 2].map((channel) => levels(config, channel));
  const merge = config.mergeSize;
  let at = 0;
  for (let top = 0; top < rows; top += merge)
    for (let left = 0; left < columns; left += merge)
      for (let i = 0; i < merge * merge; i++, at += perPatch)
        writePatch(pixels, at, resized, top + Math.floor(i / merge), left + (i % merge), tables, config);
  return { pixels, grid };
}

/** Writes the patch in the given row and column of patches to `pixels` from `at` on. */
function writePatch(
  pixels: Float32Array,
  at: number,
  from: Picture,
  row: number,
  column: number,
  tables: Float32Array[],
  { patchSize, temporalPatchSize }: ProcessorConfig,
): void {
  const frame = patchSize * patchSize;
  const square = { top: row * patchSize, left: column * patchSize, side: patchSize };
  for (let channel = 0; channel < 3; channel++) {
    const start = at;
    writeSquare(pixels, start, from, square, channel, tables[channel]);
    at += frame;
    for (let t = 1; t < temporalPatchSize; t++, at += frame) pixels.copyWithin(at, start, start + frame);
  }
}
