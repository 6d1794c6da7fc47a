/** Pictures that the engine holds: decoded, through the vision tower, kept by the name that they were put under. */
import { ApiError } from "../../shared/errors.ts";
import type { PixelLimits } from "../../shared/protocol.ts";
import { decodeImage, type Picture } from "../input/decode.ts";
import type { ImageShape } from "../model/family.ts";
import type { Model } from "../model/model.ts";
import type { Runtime } from "./runtime.ts";

/** Embedding rows of one picture in the prompt. */
export interface ImageRows extends ImageShape {
  /** [count, D] */
  rows: Float32Array;
}

/**
 * Runs the vision tower on a decoded picture, resized to the limits; the model's own by default. Throws ApiError 400 for
 * a picture that cannot be resized so, or would have more tokens than the context.
 */
export function encodePicture(
  runtime: Runtime,
  { family, config, vision }: Model,
  picture: Picture,
  limits: PixelLimits = family.pixels,
): ImageRows {
  checkTokens(family.imageTokens(picture, limits), config.contextLength);
  const { inputs, image } = family.visionPass(picture, limits);
  const dims = [image.count, config.language.hidden];
  using memory = new DisposableStack();
  using binding = vision.binding();
  for (const [name, { data, dims }] of Object.entries(inputs)) {
    const tensor = memory.use(runtime.tensor(data instanceof Float32Array ? "f32" : "i64", data.length));
    if (data instanceof Float32Array) tensor.f32.set(data);
    else tensor.i64.set(data);
    binding.input(name, tensor, dims);
  }
  const rows = memory.use(runtime.tensor("f32", dims[0] * dims[1]));
  binding.output("rows", rows, dims).run();
  return { ...image, rows: rows.f32.slice() };
}

/** Before the picture is resized: at the size that was asked for it may not even fit into memory. */
function checkTokens(tokens: number, context: number): void {
  if (tokens < context) return;
  const why = `the image would have ${tokens} tokens; the model's context is ${context} tokens, answer included`;
  throw new ApiError(400, why, { code: "context_length_exceeded" });
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
