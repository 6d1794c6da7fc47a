/** Pictures that the engine holds: decoded, through the vision tower, kept by the name that they were put under. */
import { ApiError } from "../../shared/errors.ts";
import type { PixelLimits } from "../../shared/protocol.ts";
import { decodeImage, type Picture } from "../input/decode.ts";
import type { Filter } from "../input/resize.ts";
import type { ImageShape, InputData } from "../model/family.ts";
import type { ModelFiles } from "../model/model.ts";
import type { Runtime, Session } from "./runtime.ts";
import type { ImageData } from "./target.ts";
import type { Tensor } from "./tensor.ts";

/** Embedding rows of one picture in the prompt. */
export interface ImageRows extends ImageShape {
  /** [count, D] */
  rows: ImageData;
}

/** A picture that is held. */
export interface KeptImage extends ImageRows {
  /** What it was put under. */
  key: string;
  /** What the draft makes of it, once it was asked for: the adaptor's outputs [num_q,D], and the bias of the last [1,D]. */
  adapted?: { rows: Float32Array; bias: Float32Array };
}

/** A picture's way to a device that has memory of its own, and back; that memory is the next picture's too. */
export interface Passage {
  /** Resizes pictures. */
  readonly filter: Filter;
  /** The data on the device, numbers in the model's type; waits for none of it. */
  put(data: readonly InputData[]): Tensor[];
  /** Room for the tower's output. */
  rows(elements: number): Tensor;
  /** Waits for the rows. */
  take(rows: Tensor): ImageData;
}

/** What seeing takes of a model; with a passage its vision graph takes levels. */
export interface Seeing extends Pick<ModelFiles, "family" | "config"> {
  vision: Session;
  passage?: Passage;
}

/**
 * Runs the vision tower on a decoded picture, resized to the limits; the model's own by default. Throws ApiError 400 for
 * a picture that cannot be resized so, or would have more tokens than the context.
 */
export function encodePicture(
  runtime: Runtime,
  model: Seeing,
  picture: Picture,
  limits: PixelLimits = model.family.pixels,
): ImageRows {
  const { family, config, vision, passage } = model;
  checkTokens(family.imageTokens(picture, limits), config.contextLength);
  const { inputs, image } = family.visionPass(picture, limits, passage?.filter);
  const dims = [image.count, config.language.hidden];
  const data = Object.values(inputs).map((input) => input.data);
  using memory = new DisposableStack();
  using binding = vision.binding();
  const tensors = passage ? passage.put(data) : data.map((numbers) => memory.use(onHost(runtime, numbers)));
  for (const [i, [name, { dims }]] of Object.entries(inputs).entries()) binding.input(name, tensors[i], dims);
  const elements = dims[0] * dims[1];
  const rows = passage ? passage.rows(elements) : memory.use(runtime.tensor("f32", elements));
  binding.output("rows", rows, dims).run();
  return { ...image, rows: passage ? passage.take(rows) : rows.f32.slice() };
}

/** Not for levels, which only devices take. */
function onHost(runtime: Runtime, data: InputData): Tensor {
  const tensor = runtime.tensor(data instanceof Float32Array ? "f32" : "i64", data.length);
  if (data instanceof Float32Array) tensor.f32.set(data);
  else tensor.i64.set(data as BigInt64Array);
  return tensor;
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
  readonly #model: Seeing;
  readonly #maxBytes: number;
  readonly #images = new Map<string, KeptImage>();
  #bytes = 0;

  constructor(runtime: Runtime, model: Seeing, maxBytes = 256 << 20) {
    this.#runtime = runtime;
    this.#model = model;
    this.#maxBytes = maxBytes;
  }

  /** The picture, which now counts as used last; undefined when it is not held. */
  get(key: string): KeptImage | undefined {
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
    const image = { key, ...encodePicture(this.#runtime, this.#model, picture, limits) };
    this.#images.set(key, image);
    this.#bytes += image.rows.byteLength;
    for (const [old, { rows }] of this.#images) {
      if (this.#bytes <= this.#maxBytes || old === key) break;
      this.#images.delete(old);
      this.#bytes -= rows.byteLength;
    }
  }
}
