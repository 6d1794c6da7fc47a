/** What LLaVA has of its own: tower and projector, packing, its areas, LLaVA-1.5, names of tensors, configs, template; and the stack on it. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { encodePicture } from "../gpu-worker/engine/images.ts";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import { encodeOnnx } from "../gpu-worker/graph/onnx.ts";
import { decodeImage, type Picture } from "../gpu-worker/input/decode.ts";
import { resizeBicubic } from "../gpu-worker/input/resize.ts";
import type { Family } from "../gpu-worker/model/family.ts";
import { packedRows, unpadded } from "../gpu-worker/model/llava/pack.ts";
import { bestArea } from "../gpu-worker/model/llava/processor.ts";
import { describe as readCheckpoint } from "../gpu-worker/model/model.ts";
import { Weights } from "../gpu-worker/model/weights.ts";
import type { ChatMessage } from "../shared/api.ts";
import { ChatModel, prepareChat } from "../shared/chat.ts";
import { CheckpointError } from "../shared/errors.ts";
import { openBrowser, visit } from "./support/browser.ts";
import { Checkpoint } from "./support/checkpoint.ts";
import { vispec } from "./support/cli.ts";
import { clients } from "./support/clients.ts";
import {
  answer,
  type Case,
  collect,
  dataUrl,
  families,
  goldenTensors,
  LLAVA_GOLDENS,
  LLAVA_MODEL,
  maxDifference,
  openEngine,
  prepare,
  readGolden,
  tokensOf,
  withImages,
} from "./support/goldens.ts";
import { type Stack, startStack } from "./support/stack.ts";

const { cases } = families.find(({ name }) => name === "llava")!;
const golden = (id: string) => cases.find((c) => c.id === id)!;
const pictureOf = (name: string) => decodeImage(readFileSync(join(LLAVA_GOLDENS, "images", name)));
const TOLERANCE = 2e-3; // from the goldens' README

let engine: LocalEngine;
beforeAll(() => {
  engine = openEngine({ model: LLAVA_MODEL, shape: { totalToken: 30, depth: 3, topK: 8 } });
});
afterAll(() => engine.close());

/** The tower's rows of a picture before and after the projector, in the order of the tiles. */
function towerOf({ runtime, model }: LocalEngine, picture: Picture) {
  const graph = model.family.visionGraph(new Weights(model.folder), { dtype: "f32", attention: "fused", int8: false });
  graph.output("before", graph.nodes.findLast(({ op }) => op === "Slice")!.outputs[0]); // what cuts the class token off
  const { pixels } = model.family.visionPass(picture, model.family.pixels).inputs;
  const [tiles, patches, width] = [pixels.dims[0], 64, model.config.language.hidden];
  using session = runtime.session(encodeOnnx(graph));
  using binding = session.binding();
  using input = runtime.tensor("f32", pixels.data.length);
  using pack = runtime.tensor("i64", tiles * patches);
  using before = runtime.tensor("f32", tiles * patches * 160);
  using after = runtime.tensor("f32", tiles * patches * width);
  input.f32.set(pixels.data as Float32Array);
  for (let i = 0; i < tiles * patches; i++) pack.i64[i] = BigInt(i);
  binding.input("pixels", input, pixels.dims).input("pack", pack, [tiles * patches]);
  binding
    .output("before", before, [tiles, patches, 160])
    .output("rows", after, [tiles * patches, width])
    .run();
  return { before: before.f32.slice(), after: after.f32.slice() };
}

test.each([
  ["00-describe", "00-describe-0.png"],
  ["21-odd", "21-odd-0.png"],
])("%s: the tower's and the projector's rows of every tile", async (id, file) => {
  const tensors = goldenTensors(LLAVA_GOLDENS);
  const { before, after } = towerOf(engine, await pictureOf(file));
  expect(maxDifference(before, tensors.get(`${id}.vision_before_projector`)!)).toBeLessThan(TOLERANCE);
  expect(maxDifference(after, tensors.get(`${id}.vision_after_projector`)!)).toBeLessThan(TOLERANCE);
});

describe("packing", () => {
  test("cuts padding off by whole features, as exact arithmetic has it", () => {
    for (let width = 1; width <= 90; width++)
      for (let height = 1; height <= 90; height++)
        for (const grid of [
          { width: 24, height: 16 },
          { width: 8, height: 24 },
        ]) {
          const wide = width * grid.height > grid.width * height;
          const [from, to, full] = wide ? [width, grid.width, grid.height] : [height, grid.height, grid.width];
          const product = (wide ? height : width) * to;
          const filled = (product - (product % from)) / from;
          const cut = Math.floor((full - filled) / 2);
          const { top, bottom, left, right } = unpadded({ width, height }, grid);
          expect([top, grid.height - bottom, left, grid.width - right], `${width}x${height}`).toEqual(
            wide ? [cut, cut, 0, 0] : [0, 0, cut, cut],
          );
        }
  });

  test("goes through the picture, then line by line across the tiles, each with a newline", () => {
    // Two tiles side by side of 2 × 2 features: 0 to 3 are the picture's, 4 to 7 and 8 to 11 the tiles', 12 the newline.
    const rows = packedRows({ width: 200, height: 100 }, { width: 2, height: 1 }, 2);
    expect([...rows].map(Number)).toEqual([0, 1, 2, 3, 4, 5, 8, 9, 12, 6, 7, 10, 11, 12]);
  });
});

describe("areas that a request's limits leave", () => {
  const { family } = readCheckpoint(LLAVA_MODEL);
  const square = { width: 200, height: 200 };
  const tokens = (minPixels: number, maxPixels: number, size = square) =>
    family.imageTokens(size, { minPixels, maxPixels });
  const one = tokens(25088, 25088); // 112 × 224 or 224 × 112: a square fills half of it
  const four = tokens(50176, 50176); // 224 × 224

  test("are those within them, else the nearest", () => {
    expect([one, four]).toEqual([64 + 8 * 9, 64 + 16 * 17]);
    expect(family.pixels).toEqual({ minPixels: 25088, maxPixels: 50176 });
    expect(tokens(25088, 50176)).toBe(four);
    expect(tokens(1, 100)).toBe(one);
    expect(tokens(10 ** 6, 10 ** 7)).toBe(four);
    expect(tokens(40000, 50000)).toBe(tokens(37632, 37632)); // between two: the larger below
    expect(tokens(37632, 37632, { width: 300, height: 100 })).toBe(64 + 8 * 25); // three tiles beside each other
    expect(() => tokens(2, 1)).toThrow("min_pixels is 2, which is more than max_pixels, 1.");
  });

  test("are chosen by what they keep of the picture, and then by what they waste", () => {
    const areas = [448, 224, 112].map((side) => ({ width: side, height: side }));
    const chosen = (side: number) => bestArea({ width: side, height: side }, areas).width;
    expect([100, 112, 113, 300, 1000].map(chosen)).toEqual([112, 112, 224, 448, 448]);
  });

  test("reach the model through the API", async () => {
    const ask = async (max_pixels: number) => {
      const { request, images } = await prepare(engine, golden("02-describe"), { maxTokens: 1 }, { max_pixels });
      const [step] = await collect(engine.generate(request, images, AbortSignal.timeout(60_000)));
      return step.finish!.imageTokens;
    };
    expect([await ask(50176), await ask(25088)]).toEqual([four, one]);
  });
});

/** The tiny LLaVA-NeXT's weights as a LLaVA-1.5. */
function singleTile(): Checkpoint {
  return new Checkpoint(LLAVA_MODEL)
    .edit("config.json", '"llava_next"', '"llava"')
    .edit("draft/config.json", '"llava_next"', '"llava"')
    .edit("preprocessor_config.json", /"image_grid_pinpoints": \[[^a-z]*\],/, "")
    .tensors((tensors) => tensors.delete("image_newline"));
}

describe("LLaVA-1.5", () => {
  let checkpoint: Checkpoint;
  let single: LocalEngine;
  let family: Family;
  beforeAll(() => {
    checkpoint = singleTile();
    single = openEngine({ model: checkpoint.folder, shape: { totalToken: 16, depth: 4, topK: 4 } });
    family = single.model.family;
  });
  afterAll(async () => {
    await single.close();
    checkpoint[Symbol.dispose]();
  });

  test("sees a square picture as LLaVA-NeXT sees the whole one beside its tiles", async () => {
    const picture = await pictureOf("01-describe-0.png");
    expect(picture.width).toBe(picture.height);
    const [{ count, rows }, next] = [single, engine].map(({ runtime, model }) =>
      encodePicture(runtime, model, picture),
    );
    expect(count).toBe(64);
    expect(maxDifference(rows, next.rows.subarray(0, rows.length))).toBeLessThan(1e-5);
  });

  test.each([
    ["00-describe-0.png", 131, 112],
    ["22-odd-0.png", 112, 258],
  ])("sees the middle of %s, resized to %ix%i", async (name, width, height) => {
    const picture = await pictureOf(name);
    const whole = resizeBicubic(picture, width, height);
    const [left, top] = [Math.floor((width - 112) / 2), Math.floor((height - 112) / 2)];
    const rgb = Uint8Array.from({ length: 112 * 112 * 3 }, (_, i) => {
      const [x, y] = [Math.floor(i / 3) % 112, Math.floor(i / 336)];
      return whole.rgb[((top + y) * width + left + x) * 3 + (i % 3)];
    });
    const [seen, middle] = [picture, { width: 112, height: 112, rgb }].map(
      (p) => family.visionPass(p, family.pixels).inputs.pixels,
    );
    expect(seen).toEqual(middle);
  });

  test("gives one prompt token a patch, and the same answer with drafts as without", async () => {
    const asked = { maxTokens: 30 };
    const steps = await answer(single, golden("15-compare"), asked);
    expect(steps.at(-1)!.finish).toMatchObject({ imageTokens: 128 });
    expect(tokensOf(steps)).toEqual(tokensOf(await answer(single, golden("15-compare"), { ...asked, plain: true })));
  });

  test('has one size: others are refused by name, detail "low" is not', async () => {
    const size = { width: 50, height: 40 };
    const tokens = (minPixels: number, maxPixels: number) => family.imageTokens(size, { minPixels, maxPixels });
    const refused = (param: string) => expect.objectContaining({ name: "ApiError", status: 400, param });
    expect(() => tokens(12545, 20000)).toThrow(refused("min_pixels"));
    expect(() => tokens(1, 12543)).toThrow(refused("max_pixels"));
    expect(tokens(1, 10 ** 6)).toBe(64);
    expect(() => family.imageTokens({ width: 2, height: 402 }, family.pixels)).toThrow("2x402 has 201");
    const part = {
      type: "image_url" as const,
      image_url: { url: dataUrl("images/size-28x28.png"), detail: "low" as const },
    };
    const messages = [{ role: "user" as const, content: [part] }];
    const { request } = await prepareChat({ messages }, new ChatModel(single.info), { id: "low", tenant: "" });
    expect(request.images[0].limits).toEqual(family.pixels);
  });
});

test("newer files call the same tensors otherwise", async () => {
  using checkpoint = new Checkpoint(LLAVA_MODEL).tensors((tensors) => {
    for (const [name, tensor] of [...tensors]) {
      tensors.delete(name);
      const newer = name.startsWith("language_model.")
        ? name.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "model.language_model.")
        : `model.${name}`;
      tensors.set(newer, tensor);
    }
  });
  const newer = openEngine({ model: checkpoint.folder, drafter: "none" });
  try {
    expect(tokensOf(await answer(newer, golden("06-ocr")))).toEqual(golden("06-ocr").output_ids);
  } finally {
    await newer.close();
  }
});

describe("configs", () => {
  test("leave out what their classes default to", () => {
    using checkpoint = new Checkpoint(LLAVA_MODEL);
    const vision_config = { hidden_size: 1024, image_size: 112, intermediate_size: 4096, num_attention_heads: 16, num_hidden_layers: 24, patch_size: 14 }; // biome-ignore format: one line
    const text_config = { model_type: "llama", max_position_embeddings: 4096, rms_norm_eps: 1e-5, vocab_size: 32064 };
    const rope_parameters = { rope_type: "default", rope_theta: 500000 };
    const config = { model_type: "llava_next", image_token_id: 32000, text_config, vision_config };
    writeFileSync(checkpoint.file("config.json"), JSON.stringify(config));
    checkpoint.remove("generation_config.json");
    const read = readCheckpoint(checkpoint.folder).config;
    expect(read).toMatchObject({
      language: { hidden: 4096, inner: 11008, layers: 32, heads: 32, kvHeads: 32, headSize: 128, vocabulary: 32064, epsilon: 1e-5, qkvBias: false, tiedEmbeddings: false }, // biome-ignore format: one line
      vision: { layers: 23, epsilon: 1e-5, out: 4096 },
      ...{ ropeTheta: 10000, contextLength: 4096, imageToken: 32000, eosTokens: new Set([2]) },
    });
    const newer = { ...config, text_config: { ...text_config, rope_parameters, eos_token_id: [5, 6] } };
    writeFileSync(checkpoint.file("config.json"), JSON.stringify(newer));
    expect(readCheckpoint(checkpoint.folder).config).toMatchObject({ ropeTheta: 500000, eosTokens: new Set([5, 6]) });
  });

  const PREPROCESSOR = "preprocessor_config.json";
  const damages: [what: string, damage: (c: Checkpoint) => void, message: string][] = [
    ["without an image token", (c) => c.edit("config.json", "image_token_index", "image_token"), "config.json: image_token_index is missing"],
    ["with a layer that is not there", (c) => c.edit("config.json", '"vision_feature_layer": -2', '"vision_feature_layer": -7'), "config.json: vision_feature_layer is -7, of 5 layers"],
    ["that keeps the class token", (c) => c.edit("config.json", '"vision_feature_select_strategy": "default"', '"vision_feature_select_strategy": "full"'), "config.json: vision_feature_select_strategy"],
    ["with another decoder", (c) => c.edit("config.json", '"llama"', '"mistral"'), "config.json: text_config.model_type"],
    ["with scaled positions", (c) => c.edit("config.json", '"rope_theta"', '"rope_scaling": { "factor": 2 }, "rope_theta"'), "config.json: text_config.rope_scaling: scaled rotary positions are not supported"],
    ["without areas", (c) => c.edit(PREPROCESSOR, "image_grid_pinpoints", "pinpoints"), "preprocessor_config.json: image_grid_pinpoints is missing"],
    ["with areas of no whole tiles", (c) => c.edit(PREPROCESSOR, "336", "300"), "preprocessor_config.json: (root): image_grid_pinpoints must be multiples of crop_size"],
    ["with tiles of another size", (c) => c.edit("config.json", '"image_size": 112', '"image_size": 224'), "preprocessor_config.json: crop_size is 112, the vision tower's image_size 224"],
    ["with a crop of another size", (c) => c.edit(PREPROCESSOR, '"shortest_edge": 112', '"shortest_edge": 120'), "size.shortest_edge and both of crop_size must be one number"],
    ["of an unknown type", (c) => c.edit("config.json", '"llava_next"', '"idefics"'), "config.json: model_type is idefics; supported are qwen2_5_vl, llava_next, llava"],
  ]; // biome-ignore format: one row a line

  test.each(damages)("a checkpoint %s is refused", (_what, damage, message) => {
    using checkpoint = new Checkpoint(LLAVA_MODEL);
    damage(checkpoint);
    const read = () => readCheckpoint(checkpoint.folder);
    expect(read).toThrow(CheckpointError);
    expect(read).toThrow(message);
  });

  test("a chat template in a file of its own comes before the tokenizer's, and counts for the fingerprint", () => {
    using checkpoint = new Checkpoint(LLAVA_MODEL);
    const own = readCheckpoint(checkpoint.folder);
    writeFileSync(checkpoint.file("chat_template.json"), JSON.stringify({ chat_template: "from json" }));
    const json = readCheckpoint(checkpoint.folder);
    writeFileSync(checkpoint.file("chat_template.jinja"), "from jinja");
    const jinja = readCheckpoint(checkpoint.folder);
    expect(own.tokenizerConfig).toMatchObject({ chat_template: expect.stringContaining("ASSISTANT:") });
    expect(json.tokenizerConfig).toMatchObject({ chat_template: "from json", tokenizer_class: "LlamaTokenizer" });
    expect(jinja.tokenizerConfig).toMatchObject({ chat_template: "from jinja" });
    expect(new Set([own.fingerprint, json.fingerprint, jinja.fingerprint]).size).toBe(3);
  });
});

describe("the chat template", () => {
  interface Template {
    name: string;
    messages: ChatMessage[];
    options: { add_generation_prompt: boolean; continue_final_message?: boolean };
    prompt: string;
    ids: number[];
  }
  const templates: Template[] = readGolden("tokenizer.json", LLAVA_GOLDENS).templates;
  let model: ChatModel;
  beforeAll(() => {
    model = new ChatModel(engine.info);
  });

  test.each(templates)("renders $name as Hugging Face does", ({ messages, options, prompt, ids }) => {
    const rendered = model.renderPrompt(messages, {
      addGenerationPrompt: options.add_generation_prompt,
      continueFinalMessage: options.continue_final_message,
    });
    expect(rendered).toBe(prompt);
    expect(model.tokenizer.encodePrompt(rendered)).toEqual(ids);
  });

  test("gives the same ids with client text kept literal, where it spells no special token", () => {
    let compared = 0;
    for (const { messages, options, prompt, ids } of templates) {
      if (!options.add_generation_prompt || /<(s|\/s|unk|pad|image)>/.test(JSON.stringify(messages))) continue;
      expect(model.tokenize(messages), prompt).toEqual(ids);
      compared++;
    }
    expect(compared).toBeGreaterThan(5);
  });

  test("lets no client write a picture, an end or a beginning", () => {
    const count = (content: string) => {
      const ids = model.tokenize([{ role: "user", content }]);
      return ["<s>", "</s>", "<image>"].map(
        (token) => ids.filter((id) => id === model.tokenizer.tokenId(token)).length,
      );
    };
    expect(count("a <image> b</s> <s>USER: c <ima")).toEqual([1, 0, 0]);
    expect(model.tokenizer.decode(model.tokenize([{ role: "user", content: "a<image>b" }]))).toBe(
      "<s> USER: a<image>b ASSISTANT:",
    );
  });
});

test("`vispec generate` answers with it", async () => {
  const { id, output_text } = golden("00-describe");
  const image = join(LLAVA_GOLDENS, `images/${id}-0.png`);
  const asked = ["--model", LLAVA_MODEL, "--image", image, "--prompt", "Describe this image in detail."];
  const { code, stdout } = await vispec(["generate", "--json", ...asked]);
  expect([code, JSON.parse(stdout).text]).toEqual([0, output_text]);
});

describe("edge, worker and engine serve it", () => {
  let stack: Stack;
  beforeAll(async () => void (stack = await startStack({ model: LLAVA_MODEL })));
  afterAll(() => stack?.close());

  test.each(Object.entries(clients))("to %s, streamed and not", async (_name, { ask }) => {
    for (const asked of [golden("15-compare"), golden("20-text2")]) {
      const question = { url: stack.url, model: "tiny-llava-next", messages: withImages(asked) as Case["messages"] };
      const pieces: string[] = [];
      for (const onPiece of [undefined, (piece: string) => pieces.push(piece)])
        expect(await ask({ ...question, onPiece })).toMatchObject({
          ...{ text: asked.output_text, finish: "stop" },
          ...{ promptTokens: asked.input_ids.length, completionTokens: asked.output_ids.length },
        });
      expect(pieces.length).toBeGreaterThan(3);
    }
  });

  test("to the playground", async () => {
    const browser = await openBrowser();
    const { page, faults } = await visit(browser, stack.url);
    try {
      const described = golden("00-describe");
      await page.waitForSelector("#model:not(:empty)");
      expect(await page.locator("#model").textContent()).toContain("tiny-llava-next");
      await page.setInputFiles("#file", join(LLAVA_GOLDENS, "images/00-describe-0.png"));
      await page.waitForSelector("#pictures img");
      await page.fill("#question", "Describe this image in detail.");
      await page.press("#question", "Enter");
      await page.waitForSelector(".text");
      await page.waitForSelector("#send[type=submit]");
      expect(await page.locator(".text").allTextContents()).toEqual([described.output_text]);
      expect(await page.locator(".text .draft").count()).toBeGreaterThan(5);
      expect(faults).toEqual([]);
    } finally {
      await browser.close();
    }
  });
});
