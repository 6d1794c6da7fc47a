/** Parameters that change which tokens are drawn: with a tree as without it, and each of its own effect. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import { decodeImage } from "../gpu-worker/input/decode.ts";
import { resizeBicubic } from "../gpu-worker/input/resize.ts";
import { smartResize } from "../gpu-worker/model/qwen/processor.ts";
import type { GenerateRequest, Sampling } from "../shared/protocol.ts";
import {
  answer,
  cases,
  collect,
  GOLDENS,
  openEngine,
  plainSampling,
  prepare,
  textOf,
  tokensOf,
} from "./support/goldens.ts";

const golden = (id: string) => cases.find((c) => c.id === id)!;
const greedy: Sampling = { ...plainSampling, temperature: 0 };

let plain: LocalEngine;
let drafted: [name: string, engine: LocalEngine][];
beforeAll(() => {
  plain = openEngine({ drafter: "none" });
  drafted = [
    ["30/3/8", openEngine({ shape: { totalToken: 30, depth: 3, topK: 8 } })],
    ["16/4/4", openEngine({ shape: { totalToken: 16, depth: 4, topK: 4 } })],
    ["a chain", openEngine({ shape: { totalToken: 7, depth: 5, topK: 1 } })],
    ["by cost", openEngine()],
  ];
});
afterAll(() => Promise.all([plain, ...drafted.map(([, engine]) => engine)].map((engine) => engine.close())));

/** Bytes of tensors, without the memory that the target keeps for later sequences. */
function allocated(engine: LocalEngine): number {
  engine.target[Symbol.dispose]();
  return engine.runtime.allocatedBytes;
}

describe("penalties and logit_bias", () => {
  const settings: [string, Partial<Sampling>][] = [
    ["repetition_penalty 1.3", { repetitionPenalty: 1.3 }],
    ["repetition_penalty 0.8", { repetitionPenalty: 0.8 }],
    ["presence_penalty 1.2", { presencePenalty: 1.2 }],
    ["frequency_penalty 0.6", { frequencyPenalty: 0.6 }],
    ["frequency_penalty -0.4", { frequencyPenalty: -0.4 }],
    ["logit_bias", { logitBias: [[13, -100], [220, 2], [262, -3]] }], // biome-ignore format: one row
    ["all at T=0.9", { temperature: 0.9, seed: 5, repetitionPenalty: 1.1, presencePenalty: 0.5, frequencyPenalty: 0.3, logitBias: [[13, -100]] }], // biome-ignore format: one row
  ];
  test.each(settings)("%s changes the answer, and to the same with every tree", async (_name, sampling) => {
    const changed: boolean[] = [];
    for (const id of ["00-describe", "15-compare", "18-story"]) {
      const change = { sampling: { ...greedy, ...sampling }, maxTokens: 150 };
      const wanted = tokensOf(await answer(plain, golden(id), change));
      for (const [name, engine] of drafted) {
        const steps = await answer(engine, golden(id), change);
        expect(tokensOf(steps), `${id} ${name}`).toEqual(wanted);
        expect(steps.at(-1)!.finish!.drafted, name).toBeGreaterThan(0);
      }
      const plainly = { sampling: { ...greedy, temperature: sampling.temperature ?? 0, seed: 5 }, maxTokens: 150 };
      changed.push(wanted.join() !== tokensOf(await answer(plain, golden(id), plainly)).join());
    }
    expect(changed).toContain(true);
  });

  test("a bias of -100 bans a token, one of 100 forces it", async () => {
    const [first, second] = golden("00-describe").output_ids;
    const biased = (token: number, bias: number) => ({ sampling: { ...greedy, logitBias: [[token, bias]] as [number, number][] }, maxTokens: 8 }); // biome-ignore format: one line
    expect(tokensOf(await answer(plain, golden("00-describe"), biased(first, -100)))).not.toContain(first);
    const forced = await answer(plain, golden("00-describe"), biased(second, 100));
    expect(tokensOf(forced)).toEqual(new Array(8).fill(second));
  });

  test("log-probabilities are those of the model, whatever changes the draw", async () => {
    const change = { sampling: { ...greedy, logitBias: [[5, 100]] as [number, number][] }, maxTokens: 1, logprobs: 1 };
    const [{ logprobs }] = await answer(plain, golden("00-describe"), change);
    expect(logprobs![0].token).toBe(5);
    expect(logprobs![0].top[0].token).toBe(golden("00-describe").output_ids[0]);
    expect(logprobs![0].logprob).toBeLessThan(-5);
  });
});

describe("n choices", () => {
  const engines = (): [string, LocalEngine, Partial<GenerateRequest>][] => [
    ["without drafts", plain, {}],
    ["without drafts where there are", drafted[0][1], { plain: true }],
    ...drafted.map(([name, engine]): [string, LocalEngine, Partial<GenerateRequest>] => [name, engine, {}]),
  ];

  test("are what single requests with seed + i give, log-probabilities and all", async () => {
    const sampling: Sampling = {
      ...plainSampling,
      temperature: 1.5,
      seed: 7,
      frequencyPenalty: 0.2,
      repetitionPenalty: 1.05,
    };
    for (const [name, engine, change] of engines()) {
      for (const id of ["00-describe", "18-story"]) {
        const asked = { ...change, sampling, maxTokens: 60, logprobs: 2 };
        const free = allocated(engine);
        const steps = await answer(engine, golden(id), { ...asked, n: 3 });
        expect(allocated(engine), name).toBe(free);
        expect(steps.filter((step) => step.finish).map((step) => step.choice)).toEqual([0, 1, 2]);
        const texts: string[] = [];
        for (const choice of [0, 1, 2]) {
          const mine = steps.filter((step) => step.choice === choice);
          const alone = await answer(engine, golden(id), { ...asked, sampling: { ...sampling, seed: 7 + choice } });
          expect(tokensOf(mine), `${name} ${id} ${choice}`).toEqual(tokensOf(alone));
          expect(textOf(mine)).toBe(textOf(alone));
          const [a, b] = [mine, alone].map((all) => all.flatMap((step) => step.logprobs!.map((l) => l.logprob)));
          for (const [i, logprob] of a.entries()) expect(logprob).toBeCloseTo(b[i], 4);
          const [finish, finishAlone] = [mine, alone].map((all) => all.at(-1)!.finish!);
          expect(finish.completionTokens).toBe(tokensOf(mine).length);
          // The draft reads the same hidden states; where trees go by the clock they differ.
          if (name !== "by cost") expect(finish.acceptedPerCycle).toEqual(finishAlone.acceptedPerCycle);
          texts.push(textOf(mine));
        }
        if (id === "18-story") expect(new Set(texts).size, name).toBe(3);
      }
    }
  });

  test("are equal at T=0, and a stop string ends only the choice that it is in", async () => {
    for (const [name, engine, change] of engines()) {
      const steps = await answer(engine, golden("00-describe"), { ...change, n: 3, stop: [" black"] });
      const texts = [0, 1, 2].map((choice) => textOf(steps.filter((step) => step.choice === choice)));
      const cut = golden("00-describe").output_text.split(" black")[0];
      expect(texts, name).toEqual([cut, cut, cut]);
      expect(steps.filter((step) => step.finish).map((step) => step.finish!.reason)).toEqual(["stop", "stop", "stop"]);
    }
  });

  test("leave nothing behind when they are left in the middle", async () => {
    for (const [name, engine] of engines()) {
      const { request, images } = await prepare(engine, golden("18-story"), { n: 4, maxTokens: 20 });
      const free = allocated(engine);
      for await (const step of engine.generate(request, images, AbortSignal.timeout(60_000)))
        if (step.choice === 2) break;
      expect(allocated(engine), name).toBe(free);
    }
  });
});

describe("ends", () => {
  const { output_ids: ids } = golden("18-story");
  test("ignore_eos goes on after the end of the sequence, up to max_tokens", async () => {
    for (const [name, engine] of drafted) {
      const steps = await answer(engine, golden("18-story"), { ignoreEos: true, maxTokens: ids.length + 40 });
      expect(tokensOf(steps).length, name).toBe(ids.length + 40);
      expect(tokensOf(steps).slice(0, ids.length)).toEqual(ids);
      expect(steps.at(-1)!.finish!.reason).toBe("length");
    }
  });

  test("stop_token_ids end all the same", async () => {
    for (const ignoreEos of [true, false]) {
      const steps = await answer(drafted[0][1], golden("18-story"), { ignoreEos, stopTokenIds: [ids[9]] });
      expect(tokensOf(steps)).toEqual(ids.slice(0, ids.indexOf(ids[9]) + 1));
      expect(steps.at(-1)!.finish!.reason).toBe("stop");
    }
  });
});

test("a plain request has no drafts, and uses the memory of one with drafts", async () => {
  const [, engine] = drafted[0];
  allocated(engine);
  const wanted = golden("00-describe").output_ids;
  await answer(engine, golden("00-describe"));
  const held = engine.runtime.allocatedBytes;
  const steps = await answer(engine, golden("00-describe"), { plain: true });
  expect(tokensOf(steps)).toEqual(wanted);
  expect(steps.at(-1)!.finish).toMatchObject({ drafted: 0, cycles: wanted.length - 1 });
  expect(engine.runtime.allocatedBytes).toBe(held);
});

describe("refusals", () => {
  const refused: [string, Partial<GenerateRequest>, object][] = [
    ["a biased token that has no logits", { sampling: { ...greedy, logitBias: [[1280, 1]] } }, { param: "logit_bias" }],
    ["a stop token that has no logits", { stopTokenIds: [3, 1280] }, { param: "stop_token_ids" }],
    ["JSON without an end", { json: { schema: null, strict: true }, ignoreEos: true }, { param: "ignore_eos" }],
    ["a prompt's token that has no logits", { tokens: [1, 1280] }, { param: "messages" }],
    ["a prompt's token of a completion", { tokens: [1, 1280], kind: "completion" }, { param: "prompt" }],
  ];
  test.each(refused)("come for %s", async (_name, change, error) => {
    const refusal = answer(plain, golden("18-story"), change);
    await expect(refusal).rejects.toMatchObject({ name: "ApiError", status: 400, ...error });
  });

  test("come with 409 for a picture that is not held any more", async () => {
    const { request } = await prepare(plain, golden("00-describe"));
    const steps = plain.generate(request, ["gone"], AbortSignal.timeout(60_000));
    await expect(collect(steps)).rejects.toMatchObject({ name: "ApiError", status: 409, code: "image_missing" });
  });
});

describe("pixel limits", () => {
  const file = "images/00-describe-0.png";
  const bytes = readFileSync(join(GOLDENS, file));
  const imageTokens = async (pixels: { min_pixels?: number; max_pixels?: number }) => {
    const { request, images } = await prepare(plain, golden("00-describe"), { maxTokens: 40 }, pixels);
    return collect(plain.generate(request, images, AbortSignal.timeout(60_000)));
  };

  test.each([{ max_pixels: 20_000 }, { min_pixels: 160_000, max_pixels: 200_000 }, { min_pixels: 1, max_pixels: 1 }])(
    "%o give a picture the tokens of smart_resize, and the answer to the picture so resized",
    async (pixels) => {
      const picture = await decodeImage(bytes);
      const { minPixels, maxPixels } = plain.info.pixels;
      const [least, most] = [pixels.min_pixels ?? minPixels, pixels.max_pixels ?? maxPixels];
      const { width, height } = smartResize(picture.width, picture.height, 28, least, most);
      const steps = await imageTokens(pixels);
      expect(steps.at(-1)!.finish!.imageTokens).toBe((width * height) / 28 ** 2);
      expect(width * height).not.toBe(golden("00-describe").image_tokens * 28 ** 2);

      const key = `resized to ${width}x${height}`;
      const { rgb } = resizeBicubic(picture, width, height);
      const png = await sharp(rgb, { raw: { width, height, channels: 3 } })
        .png()
        .toBuffer();
      const { request } = await prepare(plain, golden("00-describe"), { maxTokens: 40 });
      await plain.putImage(key, png, { minPixels: 1, maxPixels: 2 ** 26 });
      const resized = await collect(plain.generate(request, [key], AbortSignal.timeout(60_000)));
      expect(tokensOf(steps)).toEqual(tokensOf(resized));
    },
  );

  test("that would fill the context are refused before anything of that size is made", async () => {
    const refusal = plain.putImage("huge", bytes, { minPixels: 10 ** 13, maxPixels: 10 ** 13 });
    await expect(refusal).rejects.toMatchObject({ status: 400, code: "context_length_exceeded" });
    await expect(refusal).rejects.toThrow(new RegExp(`\\d{11} tokens.* ${plain.info.contextLength} tokens`));
    const swapped = plain.putImage("swapped", bytes, { minPixels: 5000, maxPixels: 4000 });
    await expect(swapped).rejects.toMatchObject({ status: 400, param: "min_pixels" });
    expect(await plain.missingImages(["huge", "swapped"])).toEqual(["huge", "swapped"]);
  });
});
