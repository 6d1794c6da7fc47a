/** From an RGB picture to the tiles of LLaVA's vision tower, as Hugging Face's LlavaNextImageProcessor and CLIPImageProcessor (Pillow backend) make them. */
import { z } from "zod";
import type { PixelLimits } from "../../../shared/protocol.ts";
import type { Picture } from "../../input/decode.ts";
import { type Filter, resizeBicubic } from "../../input/resize.ts";
import { checkLimits, levels, type Normalization, PIXEL_FIELDS, type Size, writeSquare } from "../pixels.ts";

const side = z.int().positive();

/** preprocessor_config.json. Padding to the largest of a batch (do_pad) is nothing for one picture. */
export const ProcessorConfig = z
  .object({
    ...PIXEL_FIELDS,
    size: z.object({ shortest_edge: side }),
    crop_size: z.object({ height: side, width: side }),
    do_center_crop: z.literal(true).optional(),
    /** Pixels of the areas that tiles may fill. */
    image_grid_pinpoints: z
      .array(z.tuple([side, side]))
      .min(1)
      .optional(),
  })
  .refine(
    (s) => s.size.shortest_edge === s.crop_size.height && s.crop_size.height === s.crop_size.width,
    "size.shortest_edge and both of crop_size must be one number",
  )
  .transform((s) => ({
    tile: s.size.shortest_edge,
    pinpoints: s.image_grid_pinpoints?.map(([height, width]) => ({ height, width })),
    mean: s.image_mean,
    std: s.image_std,
    rescaleFactor: s.rescale_factor,
  }))
  .refine(
    (c) => c.pinpoints?.every(({ height, width }) => height % c.tile === 0 && width % c.tile === 0) ?? true,
    "image_grid_pinpoints must be multiples of crop_size",
  );
export type ProcessorConfig = z.infer<typeof ProcessorConfig>;

const area = ({ width, height }: Size) => width * height;

/**
 * The areas that may be chosen: those within the limits, else the largest below the maximum, else the smallest.
 * Throws ApiError 400 for a minimum above the maximum.
 */
export function allowedAreas(pinpoints: readonly Size[], limits: PixelLimits): Size[] {
  checkLimits(limits);
  const small = pinpoints.filter((p) => area(p) <= limits.maxPixels);
  const within = small.filter((p) => area(p) >= limits.minPixels);
  if (within.length > 0) return within;
  const nearest = small.length > 0 ? Math.max(...small.map(area)) : Math.min(...pinpoints.map(area));
  return pinpoints.filter((p) => area(p) === nearest);
}

/** The area that keeps most of a picture's pixels, and of those the one that wastes least (select_best_resolution). */
export function bestArea({ width, height }: Size, areas: readonly Size[]): Size {
  let best = areas[0];
  let [most, least] = [-1, 0];
  for (const candidate of areas) {
    const scale = Math.min(candidate.width / width, candidate.height / height);
    const scaled = Math.trunc(width * scale) * Math.trunc(height * scale);
    const effective = Math.min(scaled, width * height);
    const wasted = area(candidate) - effective;
    if (effective < most || (effective === most && wasted >= least)) continue;
    best = candidate;
    [most, least] = [effective, wasted];
  }
  return best;
}

/** The whole picture as a square, then the tiles of the picture in its area, row by row. */
export function tilesOf(picture: Picture, target: Size, { tile }: ProcessorConfig, filter?: Filter): Square[] {
  const padded = padTo(resizeInto(picture, target, filter), target);
  const squares = [{ from: resizeBicubic(picture, tile, tile, filter), top: 0, left: 0, side: tile }];
  for (let top = 0; top < target.height; top += tile)
    for (let left = 0; left < target.width; left += tile) squares.push({ from: padded, top, left, side: tile });
  return squares;
}

/** LLaVA-1.5: the shorter edge brought to S, and the square in the middle. */
export function middleOf(picture: Picture, { tile }: ProcessorConfig, filter?: Filter): Square {
  const short = Math.min(picture.width, picture.height);
  const [width, height] = [picture.width, picture.height].map((n) =>
    n === short ? tile : Math.trunc((tile * n) / short),
  );
  const from = resizeBicubic(picture, width, height, filter);
  const [top, left] = [height, width].map((n) => Math.trunc((n - tile) / 2));
  return { from, top, left, side: tile };
}

/** `side` pixels a side of a picture. */
export type Square = { from: Picture; top: number; left: number; side: number };

/** The tower's numbers [squares,3,S,S]. */
export function normalize(squares: readonly Square[], config: Normalization): Float32Array {
  const tables = [0, 1, 2].map((channel) => levels(config, channel));
  const plane = squares[0].side ** 2;
  const out = new Float32Array(squares.length * 3 * plane);
  for (const [i, square] of squares.entries())
    for (let channel = 0; channel < 3; channel++)
      writeSquare(out, (3 * i + channel) * plane, square.from, square, channel, tables[channel]);
  return out;
}

/** The levels of squares, [squares,S,S,3]. */
export function cut(squares: readonly Square[]): Uint8Array {
  const row = 3 * squares[0].side;
  const out = new Uint8Array(squares.length * row * squares[0].side);
  let at = 0;
  for (const { from, top, left, side } of squares)
    for (let y = top; y < top + side; y++, at += row) {
      const start = 3 * (y * from.width + left);
      out.set(from.rgb.subarray(start, start + row), at);
    }
  return out;
}

/** As large as fits, at the same aspect ratio. */
function resizeInto(picture: Picture, target: Size, filter?: Filter): Picture {
  const [across, down] = [target.width / picture.width, target.height / picture.height];
  const edge = (n: number, scale: number, most: number) => Math.min(Math.ceil(n * scale), most);
  return across < down
    ? resizeBicubic(picture, target.width, edge(picture.height, across, target.height), filter)
    : resizeBicubic(picture, edge(picture.width, down, target.width), target.height, filter);
}

/** The picture in the middle of a black one. */
function padTo({ width, height, rgb }: Picture, target: Size): Picture {
  const out = new Uint8Array(3 * area(target));
  const [left, top] = [(target.width - width) >> 1, (target.height - height) >> 1];
  for (let y = 0; y < height; y++)
    out.set(rgb.subarray(3 * y * width, 3 * (y + 1) * width), 3 * ((top + y) * target.width + left));
  return { ...target, rgb: out };
}
