/** Qwen2.5-VL as a family: what the rest of the engine asks of it, and the inputs of its vision tower. */
import { join } from "node:path";
import type { Picture } from "../../input/decode.ts";
import type { Filter } from "../../input/resize.ts";
import { parseConfig } from "../config.ts";
import type { Family, InputData, VisionPass } from "../family.ts";
import { frequencies, ropeTable } from "../rope.ts";
import { readJson } from "../weights.ts";
import { loadQwenConfig, type VisionConfig } from "./config.ts";
import { expandPrompt } from "./positions.ts";
import { type Grid, imageGrid, imageTokens, ProcessorConfig, processImage, resizeToGrid } from "./processor.ts";
import { type VisionLayout, visionGraph, visionLayout } from "./vision.ts";

/** Reads config.json, generation_config.json and preprocessor_config.json; CheckpointError names the file and the field. */
export function qwenFamily(folder: string): Family {
  const config = loadQwenConfig(folder);
  const { merge } = config.vision;
  const file = join(folder, "preprocessor_config.json");
  const processor = parseConfig(ProcessorConfig, readJson(file), file);
  return {
    config,
    rotaryAxes: config.mropeSection.flatMap((n, row) => new Array<number>(n).fill(row)),
    pixels: { minPixels: processor.minPixels, maxPixels: processor.maxPixels },
    imageTokens: (size, limits) => imageTokens(imageGrid(size, { ...processor, ...limits }), processor),
    visionGraph: (w, options) => visionGraph(config.vision, processor, w, options),
    visionPass(picture, limits, filter) {
      const limited = { ...processor, ...limits };
      const { pixels, grid } = filter ? levelsOf(picture, limited, filter) : numbersOf(picture, limited);
      return {
        inputs: { pixels, ...placesOf(grid, config.vision) },
        image: { count: imageTokens(grid, processor), grid: [grid[1] / merge, grid[2] / merge] },
      };
    },
    expandPrompt: (tokens, images) => expandPrompt(tokens, images, config.imageToken),
  };
}

interface Pixels {
  pixels: { data: InputData; dims: number[] };
  grid: Grid;
}

function numbersOf(picture: Picture, config: ProcessorConfig): Pixels {
  const { pixels, grid } = processImage(picture, config);
  const patches = grid[1] * grid[2];
  return { pixels: { data: pixels, dims: [patches, pixels.length / patches] }, grid };
}

/** The resized picture as it is, with a shape that tells the patches of merge blocks apart. */
function levelsOf(picture: Picture, config: ProcessorConfig, filter: Filter): Pixels {
  const { resized, grid } = resizeToGrid(picture, config, filter);
  const { mergeSize: merge, patchSize: side } = config;
  return { pixels: { data: resized.rgb, dims: [grid[1] / merge, merge, side, grid[2] / merge, merge, side, 3] }, grid };
}

/** The inputs that depend on nothing but the grid. */
function placesOf([, height, width]: Grid, c: VisionConfig): VisionPass["inputs"] {
  const layout = visionLayout(height, width, c);
  const { windows, size } = layout;
  const patches = height * width;
  const half = c.width / c.heads / 2;
  const { cos, sin } = angles(layout, half, Math.max(height, width));
  return {
    positions: { data: bigInts(Int32Array.from({ length: patches }, (_, i) => i)), dims: [1, patches] },
    row_patch: { data: bigInts(layout.rowPatch), dims: [windows * size] },
    patch_row: { data: bigInts(layout.patchRow), dims: [patches] },
    mask: { data: paddingMask(layout), dims: [windows, 1, size, size] },
    cos: { data: cos, dims: [patches, half] },
    sin: { data: sin, dims: [patches, half] },
  };
}

/** A plain loop: BigInt64Array.from takes several times as long. */
function bigInts(values: Int32Array): BigInt64Array {
  const out = new BigInt64Array(values.length);
  for (let i = 0; i < values.length; i++) out[i] = BigInt(values[i]);
  return out;
}

/** -inf where a window's row would look at padding. */
function paddingMask({ windows, size, real }: VisionLayout): Float32Array {
  const mask = new Float32Array(windows * size * size);
  for (let w = 0; w < windows; w++)
    for (let column = 0; column < size; column++) {
      if (real[w * size + column]) continue;
      for (let row = 0; row < size; row++) mask[(w * size + row) * size + column] = Number.NEGATIVE_INFINITY;
    }
  return mask;
}

/** 2-D rotary angles: the first half of the frequencies turns with the patch's row, the second with its column. */
function angles({ rows, columns }: VisionLayout, half: number, places: number) {
  const n = half / 2;
  const table = ropeTable(places, frequencies(half, 10000)); // Qwen2_5_VisionRotaryEmbedding fixes theta
  const spread = (of: Float32Array) => {
    const out = new Float32Array(rows.length * half);
    for (let i = 0, to = 0; i < rows.length; i++, to += half)
      for (let f = 0; f < n; f++) {
        out[to + f] = of[rows[i] * n + f];
        out[to + n + f] = of[columns[i] * n + f];
      }
    return out;
  };
  return { cos: spread(table.cos), sin: spread(table.sin) };
}
