/** Inflated checkpoints: as large as asked for, and their answers are the small model's. */
import { createHash } from "node:crypto";
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs"; // biome-ignore format: one line
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Inflation, planInflation, readShape, writeInflation } from "../gpu-worker/checkpoint/inflate.ts";
import type { Planned } from "../gpu-worker/checkpoint/inflate-plan.ts";
import { LIKE, likeShape, type Shape } from "../gpu-worker/checkpoint/inflate-shapes.ts";
import { layerPlaces } from "../gpu-worker/checkpoint/inflate-vision.ts";
import { PUBLISHED } from "../gpu-worker/checkpoint/published.ts";
import { DiskFullError } from "../gpu-worker/checkpoint/staging.ts";
import { inflateCommand } from "../gpu-worker/cli/inflate.ts";
import { UsageError } from "../gpu-worker/cli/options.ts";
import { fixedPlan } from "../gpu-worker/decode/drafters/plan.ts";
import { type VispecDrafting, vispecDrafter } from "../gpu-worker/decode/drafters/vispec.ts";
import { argmax } from "../gpu-worker/decode/sample.ts";
import { LocalEngine } from "../gpu-worker/engine-local.ts";
import { describe as describeCheckpoint, graphs } from "../gpu-worker/model/model.ts";
import { elements } from "../gpu-worker/model/safetensors.ts";
import type { TensorSource } from "../gpu-worker/model/weights.ts";
import { CheckpointError } from "../shared/errors.ts";
import { Checkpoint } from "./support/checkpoint.ts";
import { answer, type Case, families, LLAVA_MODEL, MODEL, maxDifference, promptOf, tokensOf } from "./support/goldens.ts"; // biome-ignore format: one line

const TOLERANCE = 2e-3; // of logits and log-probabilities: float32's, over sums of other lengths
const TREE = { totalToken: 30, depth: 3, topK: 8 };
/** Of an answer: enough for some cycles. */
const LIMIT = { maxTokens: 40 };
const signal = new AbortController().signal;

/** Nothing here is a multiple of the small models' sizes that need not be. */
const decoder = { hidden: 512, inner: 700, heads: 8, kvHeads: 2, layers: 6 };
const SHAPES: Record<string, Shape> = {
  qwen: {
    ...{ family: "qwen2_5_vl", vocabulary: 2000, decoder },
    vision: { width: 320, inner: 500, heads: 4, layers: 6, full: [2, 5], run: 6 },
  },
  llava: {
    ...{ family: "llava_next", vocabulary: 2000, decoder: { ...decoder, kvHeads: 8 } },
    vision: { width: 256, inner: 512, heads: 4, layers: 7, full: [], run: 6 },
  },
};

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), "vispec-inflate-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const planOf = (model: string, shape: Shape, shardBytes?: number) =>
  planInflation(model, join(model, "draft"), shape, shardBytes);

describe.each(families)("an inflated $name", ({ name, model, cases }) => {
  // One picture, two pictures, several turns, text alone.
  const asked = ["05", "13", "16", "19"].map((id) => cases.find((c) => c.id.startsWith(id))!);
  const opened: LocalEngine[] = [];
  const open = (path: string, options: Partial<ConstructorParameters<typeof LocalEngine>[0]>) => {
    opened.push(new LocalEngine({ model: path, ...options }));
    return opened.at(-1)!;
  };
  let [tiny, big]: LocalEngine[] = [];
  const out = () => join(folder, name);

  beforeAll(async () => {
    await writeInflation(planOf(model, SHAPES[name]), out(), signal);
    [tiny, big] = [model, out()].map((path) => open(path, { shape: TREE }));
  });
  afterAll(async () => {
    for (const engine of opened) await engine.close();
  });

  /** Logits after the prompt, and what the draft would have after the likeliest token. */
  async function firstOf(engine: LocalEngine, golden: Case) {
    using sequence = engine.target.prefill(await promptOf(engine, golden), 256, 60);
    const drafter = vispecDrafter(engine.runtime, engine.model, () => fixedPlan(TREE));
    const drafting = drafter.start(sequence) as VispecDrafting;
    const logits = sequence.firstLogits.slice();
    const { tokens, logProbs } = drafting.sequence.prefill(argmax(logits));
    return { logits, tokens: [...tokens.subarray(0, TREE.topK)], logProbs: logProbs.slice(0, TREE.topK) };
  }

  test("has the sizes that were asked for", () => {
    const { language } = big.model.config;
    const { decoder: d, vocabulary } = SHAPES[name];
    expect(language).toMatchObject({ ...d, vocabulary, headSize: 64, tiedEmbeddings: false });
    expect(big.model.draft!.config).toMatchObject({ hidden: 512, inner: 700, heads: 8, kvHeads: 8, vocabulary });
  });

  test("gives the small models' logits and log-probabilities, and other words no probability", async () => {
    for (const golden of asked) {
      const [small, large] = [await firstOf(tiny, golden), await firstOf(big, golden)];
      const words = small.logits.length;
      expect(maxDifference(large.logits.subarray(0, words), small.logits), golden.id).toBeLessThan(TOLERANCE);
      const rest = large.logits.subarray(words);
      expect(rest).toHaveLength(2000 - words);
      const top = Math.max(...small.logits);
      expect(
        rest.every((v) => Number.isFinite(v) && Math.exp((v - top) / 2) === 0),
        golden.id,
      ).toBe(true); // also at T = 2
      expect(large.tokens, golden.id).toEqual(small.tokens);
      expect(maxDifference(large.logProbs, small.logProbs), golden.id).toBeLessThan(TOLERANCE);
    }
  });

  test("answers token for token as the small model does, and accepts as many drafts in every cycle", async () => {
    const plain = open(out(), { drafter: "none" });
    for (const golden of asked) {
      const wanted = golden.output_ids.slice(0, LIMIT.maxTokens);
      expect(tokensOf(await answer(plain, golden, LIMIT)), golden.id).toEqual(wanted);
      const [small, large] = [await answer(tiny, golden, LIMIT), await answer(big, golden, LIMIT)];
      expect(tokensOf(large), golden.id).toEqual(wanted);
      const accepted = small.at(-1)!.finish!.acceptedPerCycle;
      expect(large.at(-1)!.finish!.acceptedPerCycle, golden.id).toEqual(accepted);
      expect(Math.max(...accepted)).toBeGreaterThan(1);
    }
  });

  test("drafts words of the small vocabulary in 8-bit products too", async () => {
    const quantized = open(out(), {});
    const golden = asked[0];
    const [small, large] = [await firstOf(tiny, golden), await firstOf(quantized, golden)];
    expect(large.tokens[0]).toBe(small.tokens[0]);
    // Words beyond the small vocabulary would take their share of the softmax.
    expect(large.logProbs[0]).toBeGreaterThan(small.logProbs[0] - 0.3);
    const wanted = golden.output_ids.slice(0, LIMIT.maxTokens);
    expect(tokensOf(await answer(quantized, golden, LIMIT))).toEqual(wanted);
  });
});

/** Planned tensors in place of files. */
class PlanSource implements TensorSource {
  readonly folder = "a plan";
  readonly #tensors: Map<string, Planned>;

  constructor(tensors: Planned[]) {
    this.#tensors = new Map(tensors.map((tensor) => [tensor.name, tensor]));
    expect(this.#tensors.size).toBe(tensors.length);
  }

  has(name: string) {
    return this.#tensors.has(name);
  }

  shape(name: string) {
    return this.#tensors.get(name)!.shape;
  }

  get(name: string, shape: readonly number[]) {
    expect([name, this.#tensors.get(name)?.shape]).toEqual([name, shape]);
    return { name, dtype: "bf16" as const, shape, file: "/plan", offset: 0, bytes: 2 * elements(shape) };
  }
}

const isDraft = (path: string) => path.startsWith("draft/");
const tensorsOf = ({ files }: Inflation, draft: boolean) =>
  files.filter(({ path }) => isDraft(path) === draft).flatMap(({ tensors }) => tensors);
const count = (tensors: Planned[]) => tensors.reduce((sum, { shape }) => sum + elements(shape), 0);

describe("sizes", () => {
  const models = LIKE.flatMap((like) =>
    (like === "small" ? [MODEL, LLAVA_MODEL] : [like.startsWith("qwen") ? MODEL : LLAVA_MODEL]).map(
      (model) => [like, model] as const,
    ),
  );

  test.each(models)("%s of %s has every tensor that its graphs ask for", (like, model) => {
    const plan = planOf(model, likeShape(like, readShape(model)));
    const target = mkdtempSync(join(folder, "plan-"));
    mkdirSync(join(target, "draft"));
    for (const { path, text } of plan.texts) writeFileSync(join(target, path), text);
    for (const { path, from } of plan.copies) copyFileSync(from, join(target, path));
    const sources = { target: new PlanSource(tensorsOf(plan, false)), draft: new PlanSource(tensorsOf(plan, true)) };
    graphs(describeCheckpoint(target, join(target, "draft"), sources));
    for (const { tensors } of plan.files)
      for (const { rows, columns, shape } of tensors) expect(rows.length * columns.length).toBe(elements(shape));
    const { decoder: d, vocabulary } = likeShape(like, readShape(model));
    const inflated = count(tensorsOf(plan, false));
    if (like === "small") expect(inflated / 1e9).toSatisfy((billions: number) => billions > 0.4 && billions < 0.5);
    // The published 3B ties its head to its embedding; LLaVA's places are those of small pictures.
    const extra = like === "qwen2.5-vl-3b" ? vocabulary * d.hidden : like.startsWith("llava") ? (65 - 577) * 1024 : 0;
    if (like !== "small") expect(inflated).toBe(PUBLISHED[like].parameters + extra);
  });

  test("shards hold 5 GB at most, and the index names each tensor's", () => {
    const plan = planOf(MODEL, likeShape("qwen2.5-vl-7b", readShape(MODEL)));
    const shards = plan.files.filter(({ path }) => !isDraft(path));
    expect(shards.map(({ path }) => path)).toEqual([1, 2, 3, 4].map((i) => `model-0000${i}-of-00004.safetensors`));
    expect(Math.max(...shards.map(({ bytes }) => bytes))).toBeLessThan(5.001e9);
    const index = JSON.parse(plan.texts.find(({ path }) => path.endsWith("index.json"))!.text);
    for (const { path, tensors } of shards) for (const { name } of tensors) expect(index.weight_map[name]).toBe(path);
    expect(index.metadata.total_size).toBeGreaterThan(16.58e9);
  });

  test.each([
    { ...decoder, kvHeads: 4 },
    { ...decoder, hidden: 128 },
    { ...decoder, inner: 500 },
  ])("%o has no room for the small model", (small) => {
    expect(() => planOf(MODEL, { ...SHAPES.qwen, decoder: small })).toThrow(/not fit/);
  });

  test("layers of a vision tower go to places of the same kind of attention", () => {
    const { vision } = readShape(MODEL);
    expect(layerPlaces(vision, likeShape("qwen2.5-vl-3b", readShape(MODEL)).vision)).toEqual([0, 7, 8, 15]);
    expect(layerPlaces(vision, likeShape("qwen2.5-vl-3b", readShape(MODEL), 6).vision)).toEqual([0, 1, 2, 3]);
    const cut = { ...vision, layers: 3, run: 3 };
    expect(() => layerPlaces(vision, cut)).toThrow(CheckpointError);
  });
});

/** A shape that takes little time to write. */
const LITTLE: Shape = {
  ...{ family: "qwen2_5_vl", vocabulary: 1400 },
  decoder: { hidden: 256, inner: 600, heads: 8, kvHeads: 2, layers: 5 },
  vision: { width: 320, inner: 440, heads: 4, layers: 4, full: [1, 3], run: 4 },
};

describe("writing", () => {
  const hashes = (path: string) =>
    readdirSync(path, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map(({ parentPath, name }) => {
        const file = join(parentPath, name);
        return [file.slice(path.length), createHash("sha256").update(readFileSync(file)).digest("hex")];
      })
      .sort();

  test("interrupted and started again gives the same bytes, and writes only what was missing", async () => {
    const plan = planOf(MODEL, LITTLE, 4e6);
    expect(plan.files.length).toBeGreaterThan(3);
    await writeInflation(plan, join(folder, "whole"), signal);
    const interrupt = new AbortController();
    const out = join(folder, "again");
    const enough = plan.files[0].bytes + plan.files[1].bytes / 2;
    let written = 0;
    const broken = writeInflation(plan, out, interrupt.signal, () => (bytes) => {
      written += bytes;
      if (written > enough) interrupt.abort(new Error("interrupted"));
    });
    await expect(broken).rejects.toThrow("interrupted");
    expect(existsSync(out)).toBe(false);
    let rest = [0, 0];
    await writeInflation(plan, out, signal, (total, there) => {
      rest = [total - there, 0];
      return (bytes) => {
        rest[1] += bytes;
      };
    });
    expect(rest[0]).toBe(rest[1]);
    expect(rest[0]).toBe(plan.files.slice(1).reduce((sum, { bytes }) => sum + bytes, 0));
    expect(hashes(out)).toEqual(hashes(join(folder, "whole")));
    expect(existsSync(`${out}.partial`)).toBe(false);
  });

  test("another shape does not go on with what was interrupted", async () => {
    const out = join(folder, "other");
    const interrupted = AbortSignal.abort(new Error("interrupted"));
    await expect(writeInflation(planOf(MODEL, LITTLE), out, interrupted)).rejects.toThrow("interrupted");
    const other = planOf(MODEL, { ...LITTLE, vocabulary: 1401 });
    await expect(writeInflation(other, out, signal)).rejects.toThrow(/other\.partial is an unfinished/);
  });

  test("too little room is told before anything is written", async () => {
    const plan = planOf(MODEL, LITTLE);
    const huge = { ...plan, files: plan.files.map((file) => ({ ...file, bytes: 1e16 })) };
    const out = join(folder, "huge");
    await expect(writeInflation(huge, out, signal)).rejects.toThrow(DiskFullError);
    expect(existsSync(`${out}.partial`)).toBe(false);
  });

  test("what another process writes is left alone", async () => {
    const out = join(folder, "locked");
    mkdirSync(`${out}.partial`);
    writeFileSync(`${out}.partial/lock`, String(process.ppid));
    const work = writeInflation(planOf(MODEL, LITTLE), out, signal);
    await expect(work).rejects.toThrow(`${out}.partial is being written by process ${process.ppid};`);
    expect(readdirSync(`${out}.partial`)).toEqual(["lock"]);
  });

  test("a folder that exists is left alone", async () => {
    await expect(writeInflation(planOf(MODEL, LITTLE), dirname(folder), signal)).rejects.toThrow(/exists already/);
  });
});

test("a draft without config.json, as published ones are, is inflated like one with it", () => {
  using bare = new Checkpoint().remove("draft/config.json");
  expect(planOf(bare.folder, SHAPES.qwen).digest).toBe(planOf(MODEL, SHAPES.qwen).digest);
});

describe("the command", () => {
  const out = () => join(folder, "command");
  test.each([
    [["--like", "llava-1.6-7b"], /llava-1.6-7b is of llava_next, .* of qwen2_5_vl/],
    [["--like", "qwen2.5-vl-3b", "--layers", "4"], /--layers is 4; it must be at least 5/],
    [["--like", "gpt-4"], /--like is gpt-4/],
    [[], /--like/],
  ])("refuses %j", async (args, message) => {
    const run = inflateCommand(["--model", MODEL, "--out", out(), ...args], signal);
    await expect(run).rejects.toMatchObject({ name: expect.stringMatching(/^(Usage|Checkpoint)Error$/) });
    await expect(inflateCommand(["--model", MODEL, "--out", out(), ...args], signal)).rejects.toThrow(message);
    expect(existsSync(`${out()}.partial`)).toBe(false);
  });

  test("refuses a folder that exists", async () => {
    const args = ["--model", MODEL, "--like", "small", "--out", folder];
    await expect(inflateCommand(args, signal)).rejects.toThrow(UsageError);
  });

  test("refuses a link that leads nowhere, and a place where nothing can be written", async () => {
    const command = (place: string) =>
      inflateCommand(["--model", MODEL, "--like", "small", "--out", place], signal).catch((error) => error);
    symlinkSync("nowhere", join(folder, "dangling"));
    expect(await command(join(folder, "dangling"))).toBeInstanceOf(UsageError);
    writeFileSync(join(folder, "file"), "");
    for (const place of [join(folder, "file/x"), join(folder, "file/x/y"), join(folder, "dangling/x"), "/proc/x/y"]) {
      const error = await command(place);
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toContain(`${place} cannot be written: `);
    }
  });
});
