/** Pictures that the engine holds: decoded, through the vision tower, kept by the name that they were put under. */
import { ApiError } from "../../shared/errors.ts";
import type { PixelLimits } from "../../shared/protocol.ts";
import { decodeImage, type Picture } from "../input/decode.ts";
import type { Model } from "../model/model.ts";
import { imageGrid, imageTokens, processImage } from "../model/qwen/processor.ts";
import { type VisionLayout, visionLayout } from "../model/qwen/vision.ts";
import { frequencies } from "../model/rope.ts";
import type { Runtime } from "./runtime.ts";

/** Embedding rows of one picture in the prompt. */
export interface ImageRows {
  /** Merged cells: height, width. */
  grid: [number, number];
  /** [height·width, D] */
  rows: Float32Array;
}

/**
 * Runs the vision tower on a decoded picture, resized to the limits; the model's own by default. Throws ApiError 400 for
 * a picture that cannot be resized so, or would have more tokens than the context.
 */
export function encodePicture(
  runtime: Runtime,
  model: Model,
  picture: Picture,
  limits: PixelLimits = model.processor,
): ImageRows {
  const { vision: c } = model.config;
  const processor = { ...model.processor, minPixels: limits.minPixels, maxPixels: limits.maxPixels };
  checkTokens(imageTokens(imageGrid(picture, processor), processor), model.config.contextLength);
  const { pixels, grid } = processImage(picture, processor);
  const [, height, width] = grid;
  const layout = visionLayout(height, width, c);
  const total = layout.windows * layout.size;
  const half = c.width / c.heads / 2;
  const patches = height * width;
  const cells = imageTokens(grid, model.processor);
  const ints = (values: ArrayLike<number>) => {
    const tensor = runtime.tensor("i64", values.length);
    const data = tensor.i64;
    for (let i = 0; i < values.length; i++) data[i] = BigInt(values[i]);
    return tensor;
  };
  using pixelTensor = runtime.tensor("f32", pixels.length);
  using rowPatch = ints(layout.rowPatch);
  using patchRow = ints(layout.patchRow);
  using positions = ints(layout.rows.map((_, i) => i));
  using mask = runtime.tensor("f32", total * layout.size);
  using cos = runtime.tensor("f32", patches * half);
  using sin = runtime.tensor("f32", patches * half);
  using rows = runtime.tensor("f32", cells * c.out);
  pixelTensor.f32.set(pixels);
  fillMask(mask.f32, layout);
  fillAngles(cos.f32, sin.f32, layout.rows, layout.columns, half);
  using binding = model.vision.binding();
  binding.input("pixels", pixelTensor, [patches, pixels.length / patches]).input("positions", positions, [1, patches]);
  binding.input("row_patch", rowPatch, [total]).input("patch_row", patchRow, [patches]);
  binding.input("mask", mask, [layout.windows, 1, layout.size, layout.size]);
  binding.input("cos", cos, [patches, half]).input("sin", sin, [patches, half]);
  binding.output("rows", rows, [cells, c.out]).run();
  return { grid: [height / c.merge, width / c.merge], rows: rows.f32.slice() };
}

/** Before the picture is resized: at the size that was asked for it may not even fit into memory. */
function checkTokens(tokens: number, context: number): void {
  if (tokens < context) return;
  const why = `the image would have ${tokens} tokens; the model's context is ${context} tokens, answer included`;
  throw new ApiError(400, why, { code: "context_length_exceeded" });
}

/** -inf where a window's row would look at padding. */
function fillMask(mask: Float32Array, { windows, size, real }: VisionLayout): void {
  for (let w = 0; w < windows; w++)
    for (let column = 0; column < size; column++) {
      if (real[w * size + column]) continue;
      for (let row = 0; row < size; row++) mask[(w * size + row) * size + column] = Number.NEGATIVE_INFINITY;
    }
}

/** 2-D rotary angles: the first half of the frequencies turns with the patch's row, the second with its column. */
function fillAngles(cos: Float32Array, sin: Float32Array, rows: Int32Array, columns: Int32Array, half: number): void {
  const frequency = frequencies(half, 10000); // Qwen2_5_VisionRotaryEmbedding fixes theta
  const n = frequency.length;
  for (let i = 0; i < rows.length; i++)
    for (let f = 0; f < half; f++) {
      const angle = Math.fround((f < n ? rows[i] : columns[i]) * frequency[f % n]);
      cos[i * half + f] = Math.cos(angle);
      sin[i * half + f] = Math.sin(angle);
    }
}

/** Least recently used pictures go when the rows of all exceed `maxBytes`. */
export class ImageStore {
  readonly #runtime: Runtime;
  readonly #model: Model;
  readonly #maxBytes: number;
  readonly #images = new Map<string, ImageRows>();
  #bytes = 0;

  constructor(runtime: Runtime, model: Model, maxBytes = 256 << 20) {
    this.#runtime = runtime;
    this.#model = model;
    this.#maxBytes = maxBytes;
  }

  /** The picture, which now counts as used last; undefined when it is not held. */
  get(key: string): ImageRows | undefined {
    const image = this.#images.get(key);
    if (image) {
      this.#images.delete(key);
      this.#images.set(key, image);
    }
    return image;
  }

  has(key: string): boolean {
    return this.#images.has(key);
  }

  /** Decodes and encodes an image; ApiError 400 says what is wrong with it. */
  async put(key: string, bytes: Uint8Array, limits: PixelLimits): Promise<void> {
    if (this.has(key)) return;
    const picture = await decodeImage(bytes);
    if (this.has(key)) return; // another request has put it meanwhile
    const image = encodePicture(this.#runtime, this.#model, picture, limits);
    this.#images.set(key, image);
    this.#bytes += image.rows.byteLength;
    for (const [old, { rows }] of this.#images) {
      if (this.#bytes <= this.#maxBytes || old === key) break;
      this.#images.delete(old);
      this.#bytes -= rows.byteLength;
    }
  }
}
