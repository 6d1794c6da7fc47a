/** Antialiased bicubic resizing of 8-bit RGB, bit for bit as Pillow 12 does it (what Image.resize and src/libImaging/Resample.c compute). */
import type { Picture } from "./decode.ts";

/** Fraction bits of the fixed-point weights: 32, less 8 for the sample and 2 for weights whose absolute sum exceeds 1. */
const PRECISION_BITS = 22;
const ONE_HALF = 1 << (PRECISION_BITS - 1);
const BICUBIC_RADIUS = 2;

/** Rounded sums, shifted to -LOWEST .. 255 + LOWEST; bicubic's overshoot stays far within. */
const LOWEST = 512;
const CLIP = Uint8ClampedArray.from({ length: 2 * LOWEST + 256 }, (_, i) => i - LOWEST);

/** For every output position: the first input position, how many there are, and their weights (`stride` apart). */
interface Weights {
  first: Int32Array;
  count: Int32Array;
  weight: Int32Array;
  stride: number;
}

/**
 * The picture at `width` x `height` (integers of at least 1). Horizontal pass first, only for rows that the vertical
 * pass reads; each pass rounds to 8 bits. A picture over 100 times as tall as wide that gets shorter has its vertical
 * pass first. An unchanged size gives a copy.
 */
export function resizeBicubic(picture: Picture, width: number, height: number): Picture {
  if (!Number.isInteger(width) || !Number.isInteger(height) || width < 1 || height < 1)
    throw new RangeError(`The size ${width}x${height} is not one of positive integers.`);
  if (picture.height > 100 * picture.width && height < picture.height && width !== picture.width)
    return resizeBicubic(resizeBicubic(picture, picture.width, height), width, height);
  const across = width === picture.width ? null : weights(picture.width, width);
  if (height === picture.height) {
    const rgb = across ? horizontal(picture, across, 0, picture.height) : new Uint8Array(picture.rgb);
    return { width, height, rgb };
  }
  const down = weights(picture.height, height);
  const top = down.first[0];
  const bottom = down.first[height - 1] + down.count[height - 1];
  const rgb = across
    ? horizontal(picture, across, top, bottom)
    : picture.rgb.subarray(top * width * 3, bottom * width * 3);
  return { width, height, rgb: vertical(rgb, width * 3, down, top) };
}

/** Keys' cubic with a = -1/2. The order of operations matters: it decides the last bit of a weight. */
function bicubic(x: number): number {
  const a = -0.5;
  if (x < 0) x = -x;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** Weights from `input` samples to `output` samples; the filter widens with the scale when it shrinks. */
function weights(input: number, output: number): Weights {
  const scale = input / output;
  const stretch = Math.max(scale, 1);
  const support = BICUBIC_RADIUS * stretch;
  const stride = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(output);
  const count = new Int32Array(output);
  const weight = new Int32Array(output * stride);
  const real = new Float64Array(stride);
  for (let i = 0; i < output; i++) {
    const center = (i + 0.5) * scale;
    const from = Math.max(0, Math.trunc(center - support + 0.5));
    const n = Math.min(input, Math.trunc(center + support + 0.5)) - from;
    let sum = 0;
    for (let k = 0; k < n; k++) sum += real[k] = bicubic((k + from - center + 0.5) * (1 / stretch));
    for (let k = 0; k < n; k++) weight[i * stride + k] = fixed(sum === 0 ? real[k] : real[k] / sum);
    first[i] = from;
    count[i] = n;
  }
  return { first, count, weight, stride };
}

/** Fixed point, halves away from zero. */
function fixed(weight: number): number {
  return Math.trunc(weight * (1 << PRECISION_BITS) + (weight < 0 ? -0.5 : 0.5));
}

/** Rows `top` to `bottom` of the picture, each filtered to `across.first.length` pixels. */
function horizontal(picture: Picture, across: Weights, top: number, bottom: number): Uint8Array {
  const { first, count, weight, stride } = across;
  const width = first.length;
  const source = picture.rgb;
  const out = new Uint8Array(width * (bottom - top) * 3);
  let to = 0;
  for (let y = top; y < bottom; y++) {
    const row = y * picture.width * 3;
    for (let x = 0; x < width; x++) {
      let r = ONE_HALF;
      let g = ONE_HALF;
      let b = ONE_HALF;
      let at = row + first[x] * 3;
      const end = x * stride + count[x];
      for (let k = x * stride; k < end; k++, at += 3) {
        const w = weight[k];
        r = (r + Math.imul(source[at], w)) | 0;
        g = (g + Math.imul(source[at + 1], w)) | 0;
        b = (b + Math.imul(source[at + 2], w)) | 0;
      }
      out[to] = CLIP[(r >> PRECISION_BITS) + LOWEST];
      out[to + 1] = CLIP[(g >> PRECISION_BITS) + LOWEST];
      out[to + 2] = CLIP[(b >> PRECISION_BITS) + LOWEST];
      to += 3;
    }
  }
  return out;
}

/** `source` holds rows of `row` samples from input row `top` on. Sums a whole row at a time: memory is read in order. */
function vertical(source: Uint8Array, row: number, down: Weights, top: number): Uint8Array {
  const { first, count, weight, stride } = down;
  const out = new Uint8Array(row * first.length);
  const sum = new Int32Array(row);
  for (let y = 0; y < first.length; y++) {
    sum.fill(ONE_HALF);
    for (let k = 0; k < count[y]; k++) {
      const w = weight[y * stride + k];
      const from = (first[y] - top + k) * row;
      for (let i = 0; i < row; i++) sum[i] = (sum[i] + Math.imul(source[from + i], w)) | 0;
    }
    const to = y * row;
    for (let i = 0; i < row; i++) out[to + i] = CLIP[(sum[i] >> PRECISION_BITS) + LOWEST];
  }
  return out;
}
