/** Qwen2.5-VL as a family: what the rest of the engine asks of it, and the inputs of its vision tower. */
import { join } from "node:path";
import type { PixelLimits } from "../../../shared/protocol.ts";
import type { Picture } from "../../input/decode.ts";
import { parseConfig } from "../config.ts";
import type { Family, VisionPass } from "../family.ts";
import { frequencies } from "../rope.ts";
import { readJson } from "../weights.ts";
import { loadQwenConfig, type VisionConfig } from "./config.ts";
import { expandPrompt } from "./positions.ts";
import { imageGrid, imageTokens, ProcessorConfig, processImage } from "./processor.ts";
import { type VisionLayout, visionGraph, visionLayout } from "./vision.ts";

/** Reads config.json, generation_config.json and preprocessor_config.json; CheckpointError names the file and the field. */
export function qwenFamily(folder: string): Family {
  const config = loadQwenConfig(folder);
  const file = join(folder, "preprocessor_config.json");
  const processor = parseConfig(ProcessorConfig, readJson(file), file);
  return {
    config,
    rotaryAxes: config.mropeSection.flatMap((n, row) => new Array<number>(n).fill(row)),
    pixels: { minPixels: processor.minPixels, maxPixels: processor.maxPixels },
    imageTokens: (size, limits) => imageTokens(imageGrid(size, { ...processor, ...limits }), processor),
    visionGraph: (w, options) => visionGraph(config.vision, w, options),
    visionPass: (picture, limits) => visionPass(picture, limits, processor, config.vision),
    expandPrompt: (tokens, images) => expandPrompt(tokens, images, config.imageToken),
  };
}

function visionPass(picture: Picture, limits: PixelLimits, processor: ProcessorConfig, c: VisionConfig): VisionPass {
  const { pixels, grid } = processImage(picture, { ...processor, ...limits });
  const [, height, width] = grid;
  const layout = visionLayout(height, width, c);
  const { windows, size } = layout;
  const patches = height * width;
  const half = c.width / c.heads / 2;
  const [cos, sin] = angles(layout, half);
  return {
    inputs: {
      pixels: { data: pixels, dims: [patches, pixels.length / patches] },
      positions: { data: BigInt64Array.from({ length: patches }, (_, i) => BigInt(i)), dims: [1, patches] },
      row_patch: { data: BigInt64Array.from(layout.rowPatch, BigInt), dims: [windows * size] },
      patch_row: { data: BigInt64Array.from(layout.patchRow, BigInt), dims: [patches] },
      mask: { data: paddingMask(layout), dims: [windows, 1, size, size] },
      cos: { data: cos, dims: [patches, half] },
      sin: { data: sin, dims: [patches, half] },
    },
    image: { count: imageTokens(grid, processor), grid: [height / c.merge, width / c.merge] },
  };
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
function angles({ rows, columns }: VisionLayout, half: number): [cos: Float32Array, sin: Float32Array] {
  const frequency = frequencies(half, 10000); // Qwen2_5_VisionRotaryEmbedding fixes theta
  const n = frequency.length;
  const [cos, sin] = [new Float32Array(rows.length * half), new Float32Array(rows.length * half)];
  for (let i = 0; i < rows.length; i++)
    for (let f = 0; f < half; f++) {
      const angle = Math.fround((f < n ? rows[i] : columns[i]) * frequency[f % n]);
      cos[i * half + f] = Math.cos(angle);
      sin[i * half + f] = Math.sin(angle);
    }
  return [cos, sin];
}
