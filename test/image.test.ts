/** Decoding, resizing and image processors against what Pillow 12.3 and transformers 5.18 gave (processor.json of the goldens). */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { crc32, deflateSync } from "node:zlib";
import sharp from "sharp";
import { describe, expect, test } from "vitest";
import { Runtime } from "../gpu-worker/engine/runtime.ts";
import { Graph, type Value } from "../gpu-worker/graph/graph.ts";
import { encodeOnnx } from "../gpu-worker/graph/onnx.ts";
import { decodeImage, MAX_PIXELS, type Picture } from "../gpu-worker/input/decode.ts";
import { filterHere, resizeBicubic } from "../gpu-worker/input/resize.ts";
import type { VisionPass } from "../gpu-worker/model/family.ts";
import { describe as readCheckpoint } from "../gpu-worker/model/model.ts";
import { ProcessorConfig, smartResize } from "../gpu-worker/model/qwen/processor.ts";
import { Weights } from "../gpu-worker/model/weights.ts";
import { ApiError } from "../shared/errors.ts";
import { families, GOLDENS, readGolden } from "./support/goldens.ts";

interface Decoded {
  width: number;
  height: number;
  sha256: string;
  sample_index: number[];
  sample_value: number[];
}
interface Golden {
  file: { format: string };
  decoded: Decoded;
  pil: { shape: number[]; image_grid_thw?: number[][]; sha256: string; error?: { message: string } };
  image_tokens: number;
  orientation_not_applied?: Golden;
  error?: { stage: string };
}

const goldensOf = (folder: string): Record<string, Golden> => readGolden("processor.json", folder).images;
const goldens = goldensOf(GOLDENS);
const read = (name: string, folder = GOLDENS) => readFileSync(join(folder, "images", name));
const configFile = new URL("../models/tiny-qwen2.5-vl/preprocessor_config.json", import.meta.url);
const stored = JSON.parse(readFileSync(configFile, "utf8"));
const config = ProcessorConfig.parse(stored);

const sha = (a: Uint8Array | Float32Array) =>
  createHash("sha256")
    .update(new Uint8Array(a.buffer, a.byteOffset, a.byteLength))
    .digest("hex");

async function refusal(work: () => unknown): Promise<string> {
  const error = await Promise.resolve()
    .then(work)
    .catch((thrown: unknown) => thrown);
  expect(error).toBeInstanceOf(ApiError);
  expect(error).toMatchObject({ status: 400, code: "invalid_image" });
  return (error as ApiError).message;
}

function expectDecoded(picture: Picture, golden: Decoded) {
  expect([picture.width, picture.height]).toEqual([golden.width, golden.height]);
  expect(golden.sample_index.map((i) => picture.rgb[i])).toEqual(golden.sample_value);
  expect(sha(picture.rgb)).toBe(golden.sha256);
}

describe.each(families)("Golden images of $name", ({ model, goldens: folder }) => {
  const { family } = readCheckpoint(model);
  const goldens = goldensOf(folder);
  const accepted = Object.keys(goldens).filter((name) => !goldens[name].error && goldens[name].file.format !== "BMP");

  function expectProcessed(picture: Picture, golden: Golden) {
    const { inputs, image } = family.visionPass(picture, family.pixels);
    const { data, dims } = inputs.pixels;
    const [grid] = golden.pil.image_grid_thw ?? [];
    expect(dims).toEqual(grid ? golden.pil.shape : golden.pil.shape.slice(1));
    expect(image.grid).toEqual(grid && [grid[1] / 2, grid[2] / 2]);
    expect(sha(data as Float32Array)).toBe(golden.pil.sha256);
    expect(image.count).toBe(golden.image_tokens);
    expect(family.imageTokens(picture, family.pixels)).toBe(golden.image_tokens);
  }

  test.each(accepted)("%s decodes to Pillow's very bytes and gives the reference's very numbers", async (name) => {
    const golden = goldens[name];
    const bytes = read(name, folder);
    const picture = await decodeImage(bytes);
    expectDecoded(picture, golden.decoded);
    expect(bytes.equals(read(name, folder))).toBe(true); // the input is not written to
    if (!golden.pil.error) return expectProcessed(picture, golden);
    expect(await refusal(() => family.visionPass(picture, family.pixels))).toContain("3x700 has 233.33");
  });

  test("a graph that binds its weights makes the very same numbers of levels", () => {
    const [picture, weights] = [noise(133, 90), new Weights(model)];
    const [ours, onHost] = (["own", "fused"] as const).map((attention) => {
      const graph = family.visionGraph(weights, { dtype: "f32", attention, int8: false });
      return firstOperand(
        graph,
        family.visionPass(picture, family.pixels, attention === "own" ? filterHere : undefined).inputs.pixels,
      );
    });
    expect(sha(ours)).toBe(sha(onHost));
    expect(new Set(ours).size).toBeGreaterThan(100);
  });

  test.each(accepted.filter((name) => goldens[name].orientation_not_applied))(
    "%s can be decoded as stored",
    async (name) => {
      const golden = goldens[name].orientation_not_applied!;
      const picture = await decodeImage(read(name, folder), { orient: false });
      expectDecoded(picture, golden.decoded);
      expectProcessed(picture, golden);
    },
  );
});

/** What the first product of a graph without weights' numbers takes, from the input `pixels`. */
function firstOperand(graph: Graph, { data, dims }: VisionPass["inputs"][string]): Float32Array {
  const operand = graph.nodes.find(({ op }) => op === "MatMul")!.inputs[0]!;
  if (graph.inputs.includes(operand)) return data as Float32Array;
  const wanted = new Set<Value | null>([operand]);
  const nodes = graph.nodes.toReversed().filter(({ inputs, outputs }) => {
    const needed = wanted.has(outputs[0]);
    if (needed) for (const value of inputs) wanted.add(value);
    return needed;
  });
  const part = new Graph({ dtype: "f32", attention: "fused", int8: false });
  part.nodes.push(...nodes.reverse());
  part.inputs.push(graph.inputs.find(({ name }) => name === "pixels")!);
  part.constants.push(...graph.constants.filter(({ value }) => wanted.has(value)));
  part.output("operand", operand);
  const runtime = new Runtime();
  using session = runtime.session(encodeOnnx(part));
  using binding = session.binding();
  using input = runtime.tensor("f32", data.length); // more than bytes take
  new Uint8Array(input.f32.buffer).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  const pixels = data instanceof Uint8Array ? runtime.at(input.pointer, "u8", data.length) : input;
  const frames = data instanceof Uint8Array && dims.length === 7 ? 2 : 1; // Qwen's: each level stands for two frames
  using out = runtime.tensor("f32", frames * data.length);
  const [, ...row] = operand.shape as number[];
  const rows = out.elements / row.reduce((a, b) => a * b);
  binding
    .input("pixels", pixels, dims)
    .output("operand", out, [rows, ...row])
    .run();
  return out.f32.slice();
}

function chunk(type: string, data: Uint8Array): Buffer {
  const body = Buffer.concat([Buffer.from(type), data]);
  const out = Buffer.alloc(body.length + 8);
  out.writeUInt32BE(data.length, 0);
  body.copy(out, 4);
  out.writeUInt32BE(crc32(body), body.length + 4);
  return out;
}

/** One PNG row (filter byte left out) under a header of any size. */
function png(width: number, height: number, depth: number, colour: number, row: number[], more: Buffer[] = []): Buffer {
  const header = Buffer.alloc(13);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  header.set([depth, colour], 8);
  const data = chunk("IDAT", deflateSync(Uint8Array.from([0, ...row])));
  const signature = Buffer.from("\x89PNG\r\n\x1a\n", "latin1");
  return Buffer.concat([signature, chunk("IHDR", header), ...more, data, chunk("IEND", new Uint8Array())]);
}

const rgbOf = async (bytes: Uint8Array) => [...(await decodeImage(bytes)).rgb];

describe("Pixels that Pillow treats in a way of its own", () => {
  test("16-bit gray saturates, with or without a transparent value", async () => {
    const row = [0x00, 0x07, 0x01, 0x00, 0xab, 0xcd];
    const expected = [7, 7, 7, 255, 255, 255, 255, 255, 255];
    expect(await rgbOf(png(3, 1, 16, 0, row))).toEqual(expected);
    expect(await rgbOf(png(3, 1, 16, 0, row, [chunk("tRNS", Uint8Array.of(0, 7))]))).toEqual(expected);
  });

  test("16-bit gray with alpha loses its low byte", async () => {
    const row = [0x00, 0xff, 0x80, 0x00, 0xab, 0xcd, 0x00, 0x00];
    expect(await rgbOf(png(2, 1, 16, 4, row))).toEqual([0, 0, 0, 0xab, 0xab, 0xab]);
  });

  test("16-bit RGB with alpha loses its low bytes and the alpha", async () => {
    expect(await rgbOf(png(1, 1, 16, 6, [1, 255, 2, 255, 3, 255, 0, 0]))).toEqual([1, 2, 3]);
  });

  test("Gamma is not applied", async () => {
    const gamma = chunk("gAMA", Uint8Array.of(0, 1, 0x86, 0xa0));
    expect(await rgbOf(png(1, 1, 8, 2, [100, 150, 200], [gamma]))).toEqual([100, 150, 200]);
  });

  test("Black ink darkens by Pillow's rounding", async () => {
    // Inks of 0 to 255 in steps that a JPEG of the best quality keeps nearly; what it kept is read back raw.
    const ink = Uint8Array.from({ length: 64 * 64 * 4 }, (_, i) => ((i % 4) * 60 + Math.floor(i / 256) * 3) & 255);
    const raw = { width: 64, height: 64, channels: 4 as const };
    const jpeg = await sharp(ink, { raw })
      .pipelineColourspace("cmyk")
      .toColourspace("cmyk")
      .jpeg({ quality: 100 })
      .toBuffer();
    const kept = await sharp(jpeg).pipelineColourspace("cmyk").toColourspace("cmyk").raw().toBuffer();
    const expected: number[] = [];
    for (let i = 0; i < kept.length; i += 4)
      for (let c = 0; c < 3; c++) {
        const product = kept[i + c] * (255 - kept[i + 3]) + 128; // divided by 255 as Pillow's MULDIV255 does
        expected.push(255 - kept[i + 3] - (((product >> 8) + product) >> 8));
      }
    expect(kept.filter((value, i) => i % 4 === 3 && value > 0).length).toBeGreaterThan(1000);
    expect(await rgbOf(jpeg)).toEqual(expected);
  });

  test("Colours are not converted from the profile of the file", async () => {
    const wide = await sharp({ create: { width: 1, height: 1, channels: 3, background: "red" } })
      .withIccProfile("p3")
      .png()
      .toBuffer();
    const { icc } = await sharp(wide).metadata();
    const profile = chunk("iCCP", Buffer.concat([Buffer.from("p3\0\0"), deflateSync(icc!)]));
    expect(await rgbOf(png(1, 1, 8, 2, [100, 150, 200], [profile]))).toEqual([100, 150, 200]);
  });

  test("Stray bytes between the segments of a JPEG are no damage", async () => {
    const jpeg = read("jpeg-444.jpg");
    const at = jpeg.indexOf(Uint8Array.of(0xff, 0xda));
    const stray = Buffer.concat([jpeg.subarray(0, at), Uint8Array.of(0, 0), jpeg.subarray(at)]);
    expectDecoded(await decodeImage(stray), goldens["jpeg-444.jpg"].decoded);
  });

  test("A broken colour profile is ignored", async () => {
    const profile = chunk("iCCP", Buffer.concat([Buffer.from("x\0\0"), deflateSync(Buffer.from("no profile at all"))]));
    expect(await rgbOf(png(1, 1, 8, 2, [100, 150, 200], [profile]))).toEqual([100, 150, 200]);
  });

  test("CMYK with black ink is inverted whether or not the file has an Adobe marker", async () => {
    const bytes = read("jpeg-cmyk.jpg");
    const marker = bytes.indexOf("Adobe") - 4;
    const without = Buffer.concat([bytes.subarray(0, marker), bytes.subarray(marker + 16)]);
    expectDecoded(await decodeImage(without), goldens["jpeg-cmyk.jpg"].decoded);
  });
});

/** The place of the first image descriptor of gif.gif. */
function gifDescriptor(gif: Buffer): number {
  return gif.indexOf(Uint8Array.of(0x2c, 0, 0, 0, 0, 120, 0, 90, 0));
}

describe("GIF", () => {
  test("transparent pixels keep the colour of the palette", async () => {
    const gif = read("gif.gif");
    const at = gifDescriptor(gif);
    const control = Uint8Array.of(0x21, 0xf9, 4, 1, 0, 0, 5, 0); // colour 5 is transparent
    const transparent = Buffer.concat([gif.subarray(0, at), control, gif.subarray(at)]);
    expectDecoded(await decodeImage(transparent), goldens["gif.gif"].decoded);
  });

  // 640x480 is one of the screen sizes that the decoder takes for a mistake.
  test.each([
    [130, 100],
    [640, 480],
  ])("a frame smaller than its %ix%i screen is surrounded by the first colour", async (width, height) => {
    const gif = read("gif.gif");
    gif.writeUInt16LE(width, 6);
    gif.writeUInt16LE(height, 8);
    gif.writeUInt16LE(4, gifDescriptor(gif) + 1);
    const picture = await decodeImage(gif);
    const pixel = (x: number, y: number) => [...picture.rgb.subarray((y * width + x) * 3, (y * width + x) * 3 + 3)];
    expect([picture.width, picture.height]).toEqual([width, height]);
    const first = [...gif.subarray(13, 16)];
    const outside = [pixel(3, 0), pixel(124, 0), pixel(4, 90), pixel(width - 1, height - 1)];
    expect(outside).toEqual([first, first, first, first]);
    const rows = Array.from({ length: 90 }, (_, y) => picture.rgb.subarray((y * width + 4) * 3, (y * width + 124) * 3));
    expect(sha(Buffer.concat(rows))).toBe(goldens["gif.gif"].decoded.sha256);
  });
});

/** `at(x, y)` says which pixel of `p` comes to x, y. */
function moved(p: Picture, width: number, height: number, at: (x: number, y: number) => [number, number]): Picture {
  const rgb: number[] = [];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const [fromX, fromY] = at(x, y);
      rgb.push(...p.rgb.subarray((fromY * p.width + fromX) * 3, (fromY * p.width + fromX) * 3 + 3));
    }
  return { width, height, rgb: Uint8Array.from(rgb) };
}
/** What tells pictures apart, short enough for a failure's message. */
const brief = ({ width, height, rgb }: Picture) => ({ width, height, sha: sha(rgb) });
const mirror = (p: Picture) => moved(p, p.width, p.height, (x, y) => [p.width - 1 - x, y]);
const turn = (p: Picture) => moved(p, p.height, p.width, (x, y) => [y, p.height - 1 - x]); // clockwise

describe("Orientation", () => {
  const upright: [number, (p: Picture) => Picture][] = [
    [0, (p) => p],
    [1, (p) => p],
    [2, mirror],
    [3, (p) => turn(turn(p))],
    [4, (p) => mirror(turn(turn(p)))],
    [5, (p) => mirror(turn(p))],
    [6, turn],
    [7, (p) => mirror(turn(turn(turn(p))))],
    [8, (p) => turn(turn(turn(p)))],
    [9, (p) => p],
  ];

  test.each(upright)("EXIF %i is undone", async (orientation, undo) => {
    const bytes = read("jpeg-exif6.jpg");
    const tag = bytes.indexOf(Uint8Array.of(0x01, 0x12, 0, 3, 0, 0, 0, 1));
    bytes.writeUInt16BE(orientation, tag + 8);
    expect(brief(await decodeImage(bytes))).toEqual(brief(undo(await decodeImage(bytes, { orient: false }))));
  });

  test("an orientation that only XMP tells is undone too", async () => {
    const jpeg = read("jpeg-444.jpg");
    const xmp = Buffer.from('http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>', "latin1");
    const segment = Buffer.concat([Uint8Array.of(0xff, 0xe1, 0, xmp.length + 2), xmp]);
    const tagged = Buffer.concat([jpeg.subarray(0, 2), segment, jpeg.subarray(2)]);
    expect(brief(await decodeImage(tagged))).toEqual(brief(turn(await decodeImage(jpeg))));
  });
});

describe("Refusals", () => {
  const latin1 = (text: string) => Buffer.from(text, "latin1");

  test("tell an empty file, no image and a cut one apart", async () => {
    expect(await refusal(() => decodeImage(read("bad-empty.png")))).toBe("The image is empty (0 bytes).");
    const accepted = "accepted are JPEG, PNG, WebP and GIF.";
    expect(await refusal(() => decodeImage(read("bad-text.png")))).toBe(`The data is not an image; ${accepted}`);
    const cut = "The JPEG image is truncated or damaged.";
    expect(await refusal(() => decodeImage(read("bad-truncated.jpg")))).toBe(cut);
  });

  test.each<[string, Uint8Array]>([
    ["BMP", read("bmp.bmp")],
    ["SVG", latin1('<svg xmlns="http://www.w3.org/2000/svg"/>')],
    ["SVG", latin1('\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -->\n<svg/>')],
    ["TIFF", latin1("II*\0\x08\0\0\0")],
    ["TIFF", latin1("MM\0*\0\0\0\x08")],
    ["HEIC", latin1("\0\0\0\x18ftypheic\0\0\0\0")],
    ["AVIF", latin1("\0\0\0\x1cftypavif\0\0\0\0")],
    ["PDF", latin1("%PDF-1.7\n")],
    ["JPEG XL", latin1("\xff\x0a\0\0")],
  ])("name %s", async (format, bytes) => {
    const message = `Images in ${format} format are not supported; accepted are JPEG, PNG, WebP and GIF.`;
    expect(await refusal(() => decodeImage(bytes))).toBe(message);
  });

  test("tell the size of an image with too many pixels, and the limit", async () => {
    const message = (size: string) =>
      `The image has ${size} pixels; at most ${MAX_PIXELS} (width times height) are accepted.`;
    expect(await refusal(() => decodeImage(png(30000, 30000, 8, 2, [])))).toBe(message("30000x30000"));
    const header = png(30000, 30000, 8, 2, []).subarray(0, 33);
    expect(await refusal(() => decodeImage(header))).toBe(message("30000x30000"));
    expect(await refusal(() => decodeImage(png(8001, 8000, 8, 2, [])))).toBe(message("8001x8000"));
    const gif = read("gif.gif");
    gif.writeUInt16LE(65535, 6);
    gif.writeUInt16LE(65535, 8);
    expect(await refusal(() => decodeImage(gif))).toBe(message("65535x65535"));
    // At the limit it is the missing data that is at fault.
    expect(await refusal(() => decodeImage(png(8000, 8000, 8, 2, [])))).toContain("truncated or damaged");
  });

  test.each([
    "size-28x28.png",
    "png-palette-transparent.png",
    "jpeg-420-odd.jpg",
    "jpeg-progressive.jpg",
    "jpeg-cmyk.jpg",
    "jpeg-exif6.jpg",
    "gif.gif",
    "webp-lossy.webp",
    "webp-lossless.webp",
    "webp-alpha.webp",
  ])("come for every cut through %s, but near the end", async (name) => {
    const whole = read(name);
    const cuts = new Set([
      ...Array(32).keys(),
      ...Array.from({ length: 40 }, (_, i) => Math.floor((whole.length * i) / 40)),
    ]);
    for (const cut of cuts) await refusal(() => decodeImage(whole.subarray(0, cut)));
    for (let back = 1; back <= 24; back++) await decodedOrRefused(whole.subarray(0, whole.length - back));
  });

  test.each(["size-28x28.png", "jpeg-420-odd.jpg", "gif.gif", "webp-lossy.webp", "webp-lossless.webp"])(
    "or a picture come for %s with any byte changed",
    async (name) => {
      const whole = read(name);
      for (let i = 0; i < 60; i++) {
        const damaged = Buffer.from(whole);
        damaged[i < 30 ? i : Math.floor((whole.length * (i - 30)) / 30)] ^= 1 << (i % 8);
        await decodedOrRefused(damaged);
      }
    },
  );
});

async function decodedOrRefused(bytes: Uint8Array): Promise<void> {
  const outcome = await decodeImage(bytes).catch((error: unknown) => error);
  if (outcome instanceof Error) expect(outcome).toMatchObject({ name: "ApiError", status: 400, code: "invalid_image" });
  else expect((outcome as Picture).rgb.length).toBe((outcome as Picture).width * (outcome as Picture).height * 3);
}

/** A picture of noise with hard edges, which make the filter over- and undershoot. */
function noise(width: number, height: number): Picture {
  let state = 1;
  const rgb = Uint8Array.from({ length: width * height * 3 }, () => {
    state = (Math.imul(state, 1103515245) + 12345) & 0x7fffffff;
    const value = (state >> 16) & 255;
    return value < 80 ? 0 : value > 175 ? 255 : value;
  });
  return { width, height, rgb };
}

describe("Resizing", () => {
  // From Pillow 12.3: the first 16 digits of the SHA-256 of the same noise, resized with BICUBIC.
  test.each<[number, number, number, number, string]>([
    [37, 23, 112, 84, "946bd77ebcc83678"],
    [90, 61, 28, 28, "1ed980861514a225"],
    [64, 48, 64, 20, "e81f59e58d459b90"],
    [64, 48, 19, 48, "34b52ef312bb7da1"],
    [61, 47, 53, 41, "8f77e30108d25bff"],
    [1, 1, 5, 7, "fb3d2672c7186eb8"],
    [300, 2, 11, 140, "71508b5bca6606b4"],
    [5, 400, 56, 28, "5d65878c4675cd3e"],
    [33, 33, 33, 33, "0141107ba26a2849"],
    // More than 100 times as tall as wide: the vertical pass comes first, if it shrinks.
    [3, 400, 56, 28, "05da06fff170dafe"],
    [4, 401, 9, 500, "6e3ab612cf88e75b"],
  ])("%ix%i to %ix%i gives Pillow's very bytes", (width, height, toWidth, toHeight, expected) => {
    const resized = resizeBicubic(noise(width, height), toWidth, toHeight);
    expect([resized.width, resized.height]).toEqual([toWidth, toHeight]);
    expect(sha(resized.rgb).slice(0, 16)).toBe(expected);
  });

  test("to the same size gives the picture itself", () => {
    const picture = noise(4, 3);
    expect(resizeBicubic(picture, 4, 3)).toBe(picture);
  });

  test("to no size at all is a fault of the caller", () => {
    expect(() => resizeBicubic(noise(2, 2), 0, 2)).toThrow(RangeError);
    expect(() => resizeBicubic(noise(2, 2), 2, 1.5)).toThrow(RangeError);
  });
});

describe("smartResize", () => {
  const sized = (width: number, height: number) => Object.values(smartResize(width, height, 28, 3136, 112896));

  test("rounds halves to the even neighbour, as Python does", () => {
    expect(sized(70, 98)).toEqual([56, 112]); // 2.5 and 3.5 times 28
    expect(sized(71, 97)).toEqual([84, 84]);
  });

  test("shrinks to the largest and grows to the smallest area allowed", () => {
    expect(sized(1600, 1200)).toEqual([364, 280]);
    expect(sized(336, 336)).toEqual([336, 336]);
    expect(sized(1, 1)).toEqual([56, 56]);
    expect(sized(2, 3)).toEqual([56, 84]);
  });

  test("never goes under one merge block", () => {
    expect(smartResize(3000, 20, 28, 3136, 28 * 28 * 4)).toEqual({ width: 672, height: 28 });
  });

  test("refuses an aspect ratio over 200 and names it", async () => {
    expect(sized(2000, 10)).toEqual([812, 28]);
    const message = "The image's aspect ratio must not exceed 200, but 2001x10 has 200.1.";
    expect(await refusal(() => sized(2001, 10))).toBe(message);
    expect(await refusal(() => sized(10, 2001))).toContain("10x2001 has 200.1");
  });
});

describe("ProcessorConfig", () => {
  const { min_pixels: _, max_pixels: __, ...rest } = stored;

  test("takes the limits of older and newer files, and the class's own otherwise", () => {
    expect(config).toMatchObject({ minPixels: 3136, maxPixels: 112896, rescaleFactor: 1 / 255 });
    const size = { shortest_edge: 3136, longest_edge: 12845056 };
    expect(ProcessorConfig.parse({ ...rest, size })).toMatchObject({ minPixels: 3136, maxPixels: 12845056 });
    expect(ProcessorConfig.parse(rest)).toMatchObject({ minPixels: 3136, maxPixels: 1003520 });
  });

  test("refuses what would be processed otherwise than asked", () => {
    expect(ProcessorConfig.safeParse({ ...stored, do_resize: false }).success).toBe(false);
    expect(ProcessorConfig.safeParse({ ...stored, resample: 2 }).success).toBe(false);
    expect(ProcessorConfig.safeParse({ ...stored, min_pixels: 200000 }).success).toBe(false);
  });
});
