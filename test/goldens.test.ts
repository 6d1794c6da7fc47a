/** The engine against what Hugging Face's own code and the published ViSpec code answer for the tiny checkpoints. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { decode } from "../gpu-worker/decode/decode.ts";
import { noDrafter } from "../gpu-worker/decode/drafters/drafter.ts";
import { fixedPlan, type TreeShape } from "../gpu-worker/decode/drafters/plan.ts";
import { type VispecDrafting, vispecDrafter } from "../gpu-worker/decode/drafters/vispec.ts";
import { argmax, Sampler } from "../gpu-worker/decode/sample.ts";
import { writeTreeMask } from "../gpu-worker/engine/mask.ts";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import { encodeOnnx } from "../gpu-worker/graph/onnx.ts";
import { moveGraph } from "../gpu-worker/model/language.ts";
import {
  answer,
  type Case,
  families,
  goldenTensors,
  maxDifference,
  openEngine,
  plainSampling,
  promptOf,
  readGolden,
  textOf,
  tokensOf,
} from "./support/goldens.ts";

const TOLERANCE = 2e-3; // of logits and hidden states, from the goldens' README

describe.each(families)("$name", ({ model, goldens, cases }) => {
  let engine: LocalEngine;
  beforeAll(() => {
    engine = openEngine({ model, shape: { totalToken: 30, depth: 3, topK: 8 } }); // a fixed tree drafts in float32
  });
  afterAll(() => engine.close());

  async function context(golden: Case, maxTree = 60) {
    return engine.target.prefill(await promptOf(engine, golden), 256, maxTree);
  }

  describe("prompts", () => {
    test.each(cases)("$id has the ids, positions and rope delta of Hugging Face's processor", async (golden) => {
      const { expanded } = await promptOf(engine, golden);
      expect(expanded.tokens).toEqual(golden.input_ids);
      const inOrder = [golden.input_ids.map((_, i) => i)];
      expect(expanded.positions.map((row) => [...row])).toEqual(golden.position_ids ?? inOrder);
      expect(expanded.delta).toBe(golden.rope_delta ?? 0);
    });
  });

  describe("activations", () => {
    const tensors = goldenTensors(goldens);
    const having = (name: string) => cases.filter(({ id }) => tensors.has(`${id}.${name}`));

    test.each(having("inputs_embeds"))("$id: the vision tower's rows, at the image tokens' places", async (golden) => {
      const { expanded, imageRows } = await promptOf(engine, golden);
      const embeds = tensors.get(`${golden.id}.inputs_embeds`)!;
      const width = engine.model.config.language.hidden;
      for (const [i, { at, count }] of expanded.images.entries())
        expect(maxDifference(imageRows[i], embeds.subarray(at * width, (at + count) * width))).toBeLessThan(TOLERANCE);
    });

    test.each(having("last_hidden"))(
      "$id: hidden states of every prompt token, and the last logits",
      async (golden) => {
        using sequence = await context(golden);
        const hidden = tensors.get(`${golden.id}.last_hidden`)!;
        expect(maxDifference(sequence.hidden.f32.subarray(0, hidden.length), hidden)).toBeLessThan(TOLERANCE);
        const logits = tensors.get(`${golden.id}.logits_last2`)!.subarray(sequence.firstLogits.length);
        expect(maxDifference(sequence.firstLogits, logits)).toBeLessThan(TOLERANCE);
      },
    );
  });

  describe("greedy answers", () => {
    const shapes: (TreeShape | undefined)[] = [
      { totalToken: 30, depth: 3, topK: 8 },
      { totalToken: 7, depth: 5, topK: 1 },
      undefined,
    ];
    if (process.env.LONG)
      shapes.push(
        { totalToken: 16, depth: 4, topK: 4 },
        { totalToken: 60, depth: 5, topK: 10 },
        { totalToken: 2, depth: 0, topK: 1 },
      );
    const trees = readGolden("draft.json", goldens).rows;
    const acceptedOf = (id: string, shape?: TreeShape) =>
      trees.find(
        ({ case: name, tree }: { case: string; tree: Record<string, number> }) =>
          name === id &&
          tree.total_token === shape?.totalToken &&
          tree.depth === shape?.depth &&
          tree.top_k === shape?.topK,
      )?.loop.accepted as number[] | undefined;

    test("plain decoding gives the ids and texts of all cases", async () => {
      const plain = openEngine({ model, drafter: "none" });
      try {
        for (const golden of cases) {
          const steps = await answer(plain, golden);
          expect(tokensOf(steps), golden.id).toEqual(golden.output_ids);
          expect(textOf(steps), golden.id).toBe(golden.output_text);
          expect(steps.at(-1)!.finish).toMatchObject({ reason: "stop", imageTokens: golden.image_tokens });
        }
      } finally {
        await plain.close();
      }
    });

    test.each(shapes)(
      "ViSpec with %o gives the ids of all cases, and accepts as the published code does",
      async (shape) => {
        const drafted = openEngine({ model, shape });
        try {
          for (const golden of cases) {
            const steps = await answer(drafted, golden);
            expect(tokensOf(steps), golden.id).toEqual(golden.output_ids);
            const wanted = acceptedOf(golden.id, shape);
            const { acceptedPerCycle, cycles } = steps.at(-1)!.finish!;
            // The reference goes on beyond an end-of-sequence token, in the cycle that accepts it and for one cycle more.
            if (wanted) expect(acceptedPerCycle.slice(0, -1), golden.id).toEqual(wanted.slice(0, cycles - 1));
            if (wanted) expect([cycles, cycles + 1], golden.id).toContain(wanted.length);
          }
        } finally {
          await drafted.close();
        }
      },
    );

    test("the graph that moves cache rows on devices does what the host's own copy does", async () => {
      const moved = openEngine({ model, shape: { totalToken: 16, depth: 4, topK: 4 } });
      try {
        const { language } = moved.model.config;
        const graph = moveGraph(language, { dtype: "f32", attention: "fused", int8: false });
        moved.model.mover = moved.runtime.session(encodeOnnx(graph));
        moved.target[Symbol.dispose](); // sequences made before know no mover
        for (const golden of cases.slice(0, 6)) {
          const steps = await answer(moved, golden);
          expect(tokensOf(steps), golden.id).toEqual(golden.output_ids);
        }
      } finally {
        await moved.close();
      }
    });

    test("a limit cuts the answer exactly, whatever the tree holds beyond it", async () => {
      const golden = cases[0];
      for (const maxTokens of [1, 2, 5, 6, 7]) {
        const steps = await answer(engine, golden, { maxTokens });
        expect(tokensOf(steps)).toEqual(golden.output_ids.slice(0, maxTokens));
        expect(steps.at(-1)!.finish!.reason).toBe("length");
      }
    });

    test("all that a drafter takes whose trees come verified is counted as verification", async () => {
      const drafter: typeof noDrafter = { ...noDrafter, start: (s) => ({ ...noDrafter.start(s), verifies: true }) };
      const samplers = [new Sampler(plainSampling)];
      const options = { samplers, maxTokens: 3, stopTokens: new Set<number>(), signal: AbortSignal.timeout(60_000) };
      const drafting: number[] = [];
      for await (const cycles of decode(engine.target, drafter, await promptOf(engine, cases[0]), options))
        for await (const { draftMs } of cycles) drafting.push(draftMs);
      expect(drafting).toEqual([0, 0, 0]);
    });
  });

  describe("the draft's first tree", () => {
    const rows = readGolden("draft.json", goldens).rows.filter((row: { first?: unknown }) => row.first);

    test.each(rows as { case: string; tree: Record<string, number>; first: Record<string, never> }[])(
      "$case, $tree: hidden row, tokens, mask, positions and scores",
      async ({ case: id, tree: t, first }) => {
        using sequence = await context(cases.find((c) => c.id === id)!);
        const root = argmax(sequence.firstLogits);
        expect(root).toBe(first.first_token);
        const shape = { totalToken: t.total_token, depth: t.depth, topK: t.top_k };
        const drafting = vispecDrafter(engine.runtime, engine.model, () => fixedPlan(shape)).start(
          sequence,
        ) as VispecDrafting;
        const prompt = sequence.prompt.expanded.tokens.length;
        drafting.sequence.prefill(root);
        const width = engine.model.config.language.hidden;
        const at = drafting.sequence.lastRow * width;
        expect(maxDifference(drafting.sequence.out.subarray(at, at + width), first.out_hidden_last)).toBeLessThan(
          TOLERANCE,
        );
        expect(drafting.sequence.cache.length).toBe(first.kv_length);
        expect(drafting.sequence.position).toBe(first.kv_real_length);
        const again = vispecDrafter(engine.runtime, engine.model, () => fixedPlan(shape)).start(
          sequence,
        ) as VispecDrafting;
        const tree = again.propose({ rows: [prompt - 1], next: [root] });
        expect(tree.tokens).toEqual(first.draft_tokens);
        expect(tree.depths).toEqual(first.tree_position_ids);
        const n = tree.tokens.length;
        const mask = new Float32Array(n * n);
        writeTreeMask(mask, n, 0, tree.parents);
        const lines = Array.from({ length: n }, (_, i) => [...mask.subarray(i * n, (i + 1) * n)].map((v) => (v === 0 ? 1 : 0)).join("")); // biome-ignore format: one row a line
        expect(lines).toEqual(first.tree_mask);
        expect(maxDifference(tree.scores, first.scores)).toBeLessThan(TOLERANCE);
      },
    );
  });
});
