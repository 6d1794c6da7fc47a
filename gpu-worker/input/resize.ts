/** Antialiased bicubic resizing of 8-bit RGB, bit for bit as Pillow 12 does it (what Image.resize and src/libImaging/Resample.c compute). */
import type { Picture } from "./decode.ts";

/** Fraction bits of the fixed-point weights: 32, less 8 for the sample and 2 for weights whose absolute sum exceeds 1. */
const PRECISION_BITS = 22;
const ONE_HALF = 1 << (PRECISION_BITS - 1);
const BICUBIC_RADIUS = 2;

/** For every output position: the first input position, how many there are, and their weights (`stride` apart). */
export interface Weights {
  first: Int32Array;
  count: Int32Array;
  weight: Int32Array;
  stride: number;
}

/** What is done to a picture: the passes that there are, the horizontal one over its rows `top` to `bottom` alone. */
interface Passes {
  across: Weights | undefined;
  down: Weights | undefined;
  top: number;
  bottom: number;
}

/** Does the passes; gives the samples that come out. */
export type Filter = (picture: Picture, passes: Passes) => Uint8Array;

/** In JavaScript: some 24 ms a million pixels. */
export const filterHere: Filter = (picture, { across, down, top, bottom }) => {
  const width = across ? across.first.length : picture.width;
  const rows = across
    ? horizontal(picture, across, top, bottom)
    : picture.rgb.subarray(top * width * 3, bottom * width * 3);
  return down ? vertical(rows, width * 3, down, top) : rows;
};

/**
 * The picture at `width` x `height` (integers of at least 1). Horizontal pass first, only for rows that the vertical
 * pass reads; each pass rounds to 8 bits. A picture over 100 times as tall as wide that gets shorter has its vertical
 * pass first. An unchanged size gives the picture itself.
 */
export function resizeBicubic(picture: Picture, width: number, height: number, filter = filterHere): Picture {
  if (!Number.isInteger(width) || !Number.isInteger(height) || width < 1 || height < 1)
    throw new RangeError(`The size ${width}x${height} is not one of positive integers.`);
  if (width === picture.width && height === picture.height) return picture;
  if (picture.height > 100 * picture.width && height < picture.height && width !== picture.width)
    return resizeBicubic(resizeBicubic(picture, picture.width, height, filter), width, height, filter);
  const across = width === picture.width ? undefined : weights(picture.width, width);
  const down = height === picture.height ? undefined : weights(picture.height, height);
  const top = down ? down.first[0] : 0;
  const bottom = down ? down.first[height - 1] + down.count[height - 1] : picture.height;
  return { width, height, rgb: filter(picture, { across, down, top, bottom }) };
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
  const from = picture.width * 3;
  const to = across.first.length * 3;
  const out = new Uint8ClampedArray(to * (bottom - top));
  for (let y = top; y < bottom; y += 2) {
    const last = Math.min(y + 1, bottom - 1);
    twoRows(out, (y - top) * to, (last - top) * to, picture.rgb, y * from, last * from, across);
  }
  return new Uint8Array(out.buffer);
}

/** Filters the rows of `source` at `from` and `from2` to `to` and `to2`: two that share weights, maybe the same one twice. */
function twoRows(
  out: Uint8ClampedArray,
  to: number,
  to2: number,
  source: Uint8Array,
  from: number,
  from2: number,
  { first, count, weight, stride }: Weights,
): void {
  const down = from2 - from;
  for (let x = 0; x < first.length; x++, to += 3, to2 += 3) {
    let r = ONE_HALF;
    let g = ONE_HALF;
    let b = ONE_HALF;
    let r2 = ONE_HALF;
    let g2 = ONE_HALF;
    let b2 = ONE_HALF;
    let at = from + first[x] * 3;
    const end = x * stride + count[x];
    for (let k = x * stride; k < end; k++, at += 3) {
      const w = weight[k];
      const below = at + down;
      r = (r + Math.imul(source[at], w)) | 0;
      g = (g + Math.imul(source[at + 1], w)) | 0;
      b = (b + Math.imul(source[at + 2], w)) | 0;
      r2 = (r2 + Math.imul(source[below], w)) | 0;
      g2 = (g2 + Math.imul(source[below + 1], w)) | 0;
      b2 = (b2 + Math.imul(source[below + 2], w)) | 0;
    }
    out[to] = r >> PRECISION_BITS;
    out[to + 1] = g >> PRECISION_BITS;
    out[to + 2] = b >> PRECISION_BITS;
    out[to2] = r2 >> PRECISION_BITS;
    out[to2 + 1] = g2 >> PRECISION_BITS;
    out[to2 + 2] = b2 >> PRECISION_BITS;
  }
}

/** `source` holds rows of `row` samples from input row `top` on. Sums a whole row at a time: memory is read in order. */
function vertical(source: Uint8Array, row: number, down: Weights, top: number): Uint8Array {
  const { first, count, weight, stride } = down;
  const out = new Uint8ClampedArray(row * first.length);
  const sum = new Int32Array(row);
  for (let y = 0, to = 0; y < first.length; y++, to += row) {
    const from = (first[y] - top) * row;
    if (count[y] <= 6) {
      six(out, to, source, { row, from, count: count[y], weight, at: y * stride });
      continue;
    }
    sum.fill(ONE_HALF);
    for (let k = 0; k < count[y]; k++) {
      const w = weight[y * stride + k];
      const start = from + k * row;
      for (let i = 0; i < row; i++) sum[i] = (sum[i] + Math.imul(source[start + i], w)) | 0;
    }
    for (let i = 0; i < row; i++) out[to + i] = sum[i] >> PRECISION_BITS;
  }
  return new Uint8Array(out.buffer);
}

/** One row of `out` of up to six rows of `source`, in one loop: what a picture takes that grows, or shrinks a little. */
function six(
  out: Uint8ClampedArray,
  to: number,
  source: Uint8Array,
  { row, from, count, weight, at }: { row: number; from: number; count: number; weight: Int32Array; at: number },
): void {
  // Row 0 with weight 0 stands in for those that there are fewer than six.
  const w = (k: number) => (k < count ? weight[at + k] : 0);
  const r = (k: number) => (k < count ? from + k * row : 0);
  const [w0, w1, w2, w3, w4, w5] = [w(0), w(1), w(2), w(3), w(4), w(5)];
  const [r0, r1, r2, r3, r4, r5] = [r(0), r(1), r(2), r(3), r(4), r(5)];
  for (let i = 0; i < row; i++) {
    const a = Math.imul(source[r0 + i], w0) + Math.imul(source[r1 + i], w1) + Math.imul(source[r2 + i], w2);
    const b = Math.imul(source[r3 + i], w3) + Math.imul(source[r4 + i], w4) + Math.imul(source[r5 + i], w5);
    out[to + i] = ((ONE_HALF + a + b) | 0) >> PRECISION_BITS;
  }
}
