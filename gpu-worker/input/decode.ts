/** From an encoded image to RGB, with the values that Pillow's `ImageOps.exif_transpose(im).convert("RGB")` gives. */
import sharp from "sharp";
import { ApiError } from "../../shared/errors.ts";

// Decoded pictures are kept elsewhere, and the cores belong to the inference engine.
sharp.cache(false);
sharp.concurrency(1);

/** Most pixels (width x height) that an image may have: 64 megapixels, 192 MB as RGB. */
export const MAX_PIXELS = 64_000_000;

/** 8-bit RGB, height·width·3 bytes, row by row. */
export interface Picture {
  width: number;
  height: number;
  rgb: Uint8Array;
}

type Accepted = "jpeg" | "png" | "webp" | "gif";
type Raw = { data: Uint8Array | Uint16Array; width: number; height: number; channels: number };

/**
 * Decodes a JPEG, PNG, WebP or GIF (its first frame). The EXIF (or XMP) orientation is applied unless `orient` is
 * false. Colour profiles and gamma are ignored and alpha is dropped, not blended. 16-bit gray saturates at 255, other
 * 16-bit samples lose their low byte.
 * Throws ApiError 400 `invalid_image`, with a message of its own for: no bytes, no image, a format not accepted
 * (named), too many pixels (found out before decoding), truncated or damaged data.
 */
export async function decodeImage(bytes: Uint8Array, { orient = true } = {}): Promise<Picture> {
  const format = acceptedFormat(bytes);
  const name = FORMAT_NAMES[format];
  const frame = format === "gif" ? firstGifFrame(bytes) : null;
  // "error": benign warnings (say, an odd colour profile) pass, as with Pillow; a premature end does not.
  const options = { failOn: "error", ignoreIcc: true, limitInputPixels: false } as const;
  const image = sharp(frame ? frame.opaque : bytes, options);
  // A PNG's size stands at a fixed place, so that even a file of which no more is there is told what is wrong with it.
  if (format === "png" && bytes.length >= 24) {
    const header = new DataView(bytes.buffer, bytes.byteOffset, 24);
    checkPixels(header.getUint32(16), header.getUint32(20));
  }
  const about = await image.metadata().catch((cause) => refuse(`The ${name} image is truncated or damaged.`, cause));
  if (about.format !== format) refuse(`The ${name} image is truncated or damaged.`);
  const { width, height } = frame ?? about;
  checkPixels(width, height);

  const deep = about.depth === "ushort";
  // The file's own colour space throughout, so that nothing is converted.
  const { data, info } = await image
    .pipelineColourspace(about.space)
    .toColourspace(about.space)
    .raw({ depth: deep ? "ushort" : "uchar" })
    .toBuffer({ resolveWithObject: true })
    .catch((cause) => refuse(`The ${name} image is truncated or damaged.`, cause));
  const raw: Raw = { ...info, data: deep ? new Uint16Array(data.buffer, data.byteOffset, data.length / 2) : data };
  const rgb = about.space === "cmyk" ? rgbOfCmyk(raw) : rgbOf(raw, sampleOf(bytes, deep));
  const decoded = { width: info.width, height: info.height, rgb };
  const picture = frame ? onScreen(frame, decoded) : decoded;
  return orient ? transpose(picture, about.orientation ?? orientationOfXmp(about.xmp)) : picture;
}

function refuse(message: string, cause?: unknown): never {
  throw new ApiError(400, message, { code: "invalid_image", cause });
}

function checkPixels(width: number, height: number): void {
  if (width * height > MAX_PIXELS)
    refuse(`The image has ${width}x${height} pixels; at most ${MAX_PIXELS} (width times height) are accepted.`);
}

const ACCEPTED_NAMES = "JPEG, PNG, WebP and GIF";
const FORMAT_NAMES: Record<Accepted, string> = { jpeg: "JPEG", png: "PNG", webp: "WebP", gif: "GIF" };

/** What each format begins with, in Latin-1; `.` stands for any byte. */
const MAGIC: [format: string, pattern: RegExp][] = [
  ["jpeg", /^\xff\xd8\xff/],
  ["png", /^\x89PNG\r\n\x1a\n/],
  ["webp", /^RIFF....WEBP/s],
  ["gif", /^GIF8[79]a/],
  ["BMP", /^BM/],
  ["TIFF", /^(II[*+]\0|MM\0[*+])/],
  ["AVIF", /^....ftypavi[fs]/s],
  ["HEIC", /^....ftyp(he[iv][cmsx]|mif1|msf1)/s],
  ["JPEG XL", /^(\xff\x0a|\0\0\0\x0cJXL )/],
  ["JPEG 2000", /^(\0\0\0\x0cjP {2}|\xff\x4f\xff\x51)/],
  ["PDF", /^\s*%PDF-/],
  ["ICO", /^\0\0[\x01\x02]\0/],
  ["PSD", /^8BPS/],
  ["SVG", /^(\xef\xbb\xbf)?\s*<(svg\b|[?!].*<svg\b)/is],
];

/** The format by the first bytes alone: nothing but the four accepted ones ever reaches a decoder. */
function acceptedFormat(bytes: Uint8Array): Accepted {
  if (bytes.length === 0) refuse("The image is empty (0 bytes).");
  const head = Buffer.from(bytes.buffer, bytes.byteOffset, Math.min(bytes.length, 1024)).toString("latin1");
  const format = MAGIC.find(([, pattern]) => pattern.test(head))?.[0];
  if (!format) refuse(`The data is not an image; accepted are ${ACCEPTED_NAMES}.`);
  if (!(format in FORMAT_NAMES))
    refuse(`Images in ${format} format are not supported; accepted are ${ACCEPTED_NAMES}.`);
  return format as Accepted;
}

/** How a sample becomes 8 bits. Pillow clips plain 16-bit gray (PNG colour type 0) and takes the high byte of all else. */
function sampleOf(bytes: Uint8Array, deep: boolean): (value: number) => number {
  if (!deep) return (value) => value;
  const plainGray = bytes[25] === 0;
  return plainGray ? (value) => Math.min(value, 255) : (value) => value >> 8;
}

/** Gray (1), gray with alpha (2), RGB (3) or RGB with alpha (4 channels) to RGB. */
function rgbOf({ data, width, height, channels }: Raw, sample: (value: number) => number): Uint8Array {
  if (channels === 3 && data instanceof Uint8Array) return new Uint8Array(data.buffer, data.byteOffset, data.length);
  const out = new Uint8Array(width * height * 3);
  const [green, blue] = channels < 3 ? [0, 0] : [1, 2];
  for (let from = 0, to = 0; to < out.length; from += channels, to += 3) {
    out[to] = sample(data[from]);
    out[to + 1] = sample(data[from + green]);
    out[to + 2] = sample(data[from + blue]);
  }
  return out;
}

/** Ink to light by Pillow's simple formula; the decoder has undone the inversion that Adobe's CMYK JPEGs have. */
function rgbOfCmyk({ data, width, height }: Raw): Uint8Array {
  const out = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; to < out.length; from += 4, to += 3) {
    const light = 255 - data[from + 3];
    for (let i = 0; i < 3; i++) out[to + i] = light - Math.round((data[from + i] * light) / 255);
  }
  return out;
}

/** A TIFF tag that XMP repeats; read only where EXIF has none. */
function orientationOfXmp(xmp: Uint8Array | undefined): number {
  return Number(/tiff:Orientation(?:="|>)([0-9])/.exec(xmp ? Buffer.from(xmp).toString("latin1") : "")?.[1] ?? 1);
}

/** Undoes an EXIF orientation: 2 to 4 mirror and turn by 180°, 5 to 8 also swap rows and columns; others leave all as it is. */
function transpose(picture: Picture, orientation: number): Picture {
  if (!(orientation >= 2 && orientation <= 8)) return picture;
  const swap = orientation >= 5;
  const [width, height] = swap ? [picture.height, picture.width] : [picture.width, picture.height];
  const fromRight = [2, 3, 7, 8].includes(orientation);
  const fromBottom = [3, 4, 6, 7].includes(orientation);
  const rgb = new Uint8Array(picture.rgb.length);
  let to = 0;
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++, to += 3) {
      const column = swap ? y : x;
      const row = swap ? x : y;
      const sourceX = fromRight ? picture.width - 1 - column : column;
      const sourceY = fromBottom ? picture.height - 1 - row : row;
      const from = (sourceY * picture.width + sourceX) * 3;
      rgb[to] = picture.rgb[from];
      rgb[to + 1] = picture.rgb[from + 1];
      rgb[to + 2] = picture.rgb[from + 2];
    }
  return { width, height, rgb };
}

interface GifFrame {
  /** The file with the first frame's transparency turned off, so that its pixels keep their palette colours. */
  opaque: Uint8Array;
  left: number;
  top: number;
  right: number;
  bottom: number;
  /** The screen, widened where the frame goes beyond it. */
  width: number;
  height: number;
  /** What Pillow shows around a frame that is smaller than the screen: the transparent colour, else colour 0. */
  around: Uint8Array;
}

/**
 * The first frame's place and colours; null where the blocks are not in order (the decoder will then say no). The
 * decoder blackens transparent pixels, and ignores screen sizes that it knows as mistakes; Pillow does neither.
 */
function firstGifFrame(bytes: Uint8Array): GifFrame | null {
  const opaque = new Uint8Array(bytes); // a copy: slice() of a Buffer would share its memory
  const u16 = (i: number) => opaque[i] | (opaque[i + 1] << 8);
  const paletteBytes = (packed: number) => (packed & 0x80 ? 3 << ((packed & 7) + 1) : 0);
  let palette = 13;
  let at = palette + paletteBytes(opaque[10]);
  let background = 0;
  while (at + 10 < opaque.length) {
    if (opaque[at] === 0x2c) {
      const [left, top, right, bottom] = [
        u16(at + 1),
        u16(at + 3),
        u16(at + 1) + u16(at + 5),
        u16(at + 3) + u16(at + 7),
      ];
      const [width, height] = [Math.max(u16(6), right), Math.max(u16(8), bottom)];
      if (opaque[at + 9] & 0x80) palette = at + 10;
      const around = opaque.slice(palette + background * 3, palette + background * 3 + 3);
      return { opaque, left, top, right, bottom, width, height, around };
    }
    if (opaque[at] !== 0x21) return null;
    if (opaque[at + 1] === 0xf9) {
      background = opaque[at + 3] & 1 ? opaque[at + 6] : 0;
      opaque[at + 3] &= ~1;
    }
    for (at += 2; opaque[at] > 0; ) at += opaque[at] + 1;
    at++;
  }
  return null;
}

/** Puts the frame, decoded with at least what is left of and above it, onto the whole screen. */
function onScreen(frame: GifFrame, decoded: Picture): Picture {
  const { left, top, right, bottom, width, height } = frame;
  if (left === 0 && top === 0 && right === width && bottom === height) return decoded;
  const rgb = new Uint8Array(width * height * 3);
  for (let i = 0; i < rgb.length; i += 3) rgb.set(frame.around, i);
  for (let y = top; y < bottom; y++) {
    const row = y * decoded.width;
    rgb.set(decoded.rgb.subarray((row + left) * 3, (row + right) * 3), (y * width + left) * 3);
  }
  return { width, height, rgb };
}
