/** LLaVA-NeXT and LLaVA-1.5 as a family: what the rest of the engine asks of it. */
import { join } from "node:path";
import { ApiError, CheckpointError } from "../../../shared/errors.ts";
import type { PixelLimits } from "../../../shared/protocol.ts";
import { parseConfig } from "../config.ts";
import { expandImages, type Family, type VisionPass } from "../family.ts";
import { checkAspectRatio, checkLimits, type Size } from "../pixels.ts";
import { readJson, type TensorSource } from "../weights.ts";
import { loadLlavaConfig } from "./config.ts";
import { packedCount, packedRows } from "./pack.ts";
import {
  allowedAreas,
  bestArea,
  cut,
  middleOf,
  normalize,
  ProcessorConfig,
  type Square,
  tilesOf,
} from "./processor.ts";
import { visionGraph } from "./vision.ts";

/** Reads config.json, generation_config.json and preprocessor_config.json; CheckpointError names the file and the field. */
export function llavaFamily(folder: string, weights: TensorSource): Family {
  const config = loadLlavaConfig(folder, weights);
  const { vision: c } = config;
  const file = join(folder, "preprocessor_config.json");
  const processor = parseConfig(ProcessorConfig, readJson(file), file);
  if (processor.tile !== c.tile)
    throw new CheckpointError(`${file}: crop_size is ${processor.tile}, the vision tower's image_size ${c.tile}`);
  const pinpoints = processor.pinpoints;
  if (c.newline && !pinpoints) throw new CheckpointError(`${file}: image_grid_pinpoints is missing`);
  return {
    config,
    rotaryAxes: new Array<number>(config.language.headSize / 2).fill(0),
    visionGraph: (w, options) => visionGraph(c, processor, w, options),
    expandPrompt(tokens, images) {
      const expanded = expandImages(tokens, images, config.imageToken);
      return { ...expanded, positions: [Int32Array.from(expanded.tokens, (_, i) => i)], delta: 0 };
    },
    ...(c.newline ? anyResolution(processor, pinpoints!, c.tile / c.patch) : oneSize(processor, c.tile / c.patch)),
  };
}

type Pictures = Pick<Family, "pixels" | "imageTokens" | "visionPass">;

function pixelsOf(
  squares: readonly Square[],
  processor: ProcessorConfig,
  levels: boolean,
): VisionPass["inputs"][string] {
  const { tile } = processor;
  return levels
    ? { data: cut(squares), dims: [squares.length, tile, tile, 3] }
    : { data: normalize(squares, processor), dims: [squares.length, 3, tile, tile] };
}

/** LLaVA-NeXT: tiles of an area that fits the picture, `side` features a side each, besides the picture as one. */
function anyResolution(processor: ProcessorConfig, pinpoints: Size[], side: number): Pictures {
  const { tile } = processor;
  const areas = pinpoints.map(({ width, height }) => width * height);
  const target = (size: Size, limits: PixelLimits) => bestArea(size, allowedAreas(pinpoints, limits));
  const inTiles = ({ width, height }: Size) => ({ width: width / tile, height: height / tile });
  return {
    pixels: { minPixels: Math.min(...areas), maxPixels: Math.max(...areas) },
    imageTokens: (size, limits) => packedCount(size, inTiles(target(size, limits)), side),
    visionPass(picture, limits, filter) {
      const area = target(picture, limits);
      const pack = packedRows(picture, inTiles(area), side);
      return {
        inputs: {
          pixels: pixelsOf(tilesOf(picture, area, processor, filter), processor, filter !== undefined),
          pack: { data: pack, dims: [pack.length] },
        },
        image: { count: pack.length },
      };
    },
  };
}

/** LLaVA-1.5: the square in the picture's middle, at one size; a request that asks for another is refused. */
function oneSize(processor: ProcessorConfig, side: number): Pictures {
  const { tile } = processor;
  const pixels = tile * tile;
  const check = (size: Size, limits: PixelLimits) => {
    checkLimits(limits);
    checkAspectRatio(size); // the longer edge is resized before it is cut off
    const param = limits.minPixels > pixels ? "min_pixels" : limits.maxPixels < pixels ? "max_pixels" : undefined;
    if (param) throw new ApiError(400, `${param}: this model sees pictures at ${tile}x${tile} pixels only`, { param });
  };
  return {
    pixels: { minPixels: pixels, maxPixels: pixels },
    imageTokens(size, limits) {
      check(size, limits);
      return side * side;
    },
    visionPass(picture, limits, filter) {
      check(picture, limits);
      return {
        inputs: { pixels: pixelsOf([middleOf(picture, processor, filter)], processor, filter !== undefined) },
        image: { count: side * side },
      };
    },
  };
}
