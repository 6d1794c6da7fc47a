/** Weight-only quantization: what a matrix becomes, and what a quantized target answers. */
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { importCheckpoint } from "../gpu-worker/checkpoint/import.ts";
import { isQuantized, quantizeRows } from "../gpu-worker/checkpoint/quantize.ts";
import { argmax } from "../gpu-worker/decode/sample.ts";
import { Checkpoint } from "./support/checkpoint.ts";
import { answer, families, MODEL, openEngine, promptOf, tokensOf } from "./support/goldens.ts";
import { Random } from "./support/wrong-values.ts";

const bits = [4, 8] as const;

/** The rows that integers and scales stand for. */
function dequantize(
  { packed, scales }: { packed: Uint8Array; scales: Float32Array },
  rows: number,
  columns: number,
  bits: 4 | 8,
) {
  const blocks = scales.length / rows;
  return Float32Array.from({ length: rows * columns }, (_, i) => {
    const [row, column] = [Math.floor(i / columns), i % columns];
    const block = row * blocks + Math.floor(column / 32);
    const at = block * 32 + (column % 32);
    const stored = bits === 8 ? packed[at] - 128 : ((packed[at >> 1] >> (4 * (at & 1))) & 15) - 8;
    return stored * scales[block];
  });
}

const folder = mkdtempSync(join(tmpdir(), "vispec-quantize-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** The folder of a quantized copy. */
async function quantized(model: string, bits: 4 | 8): Promise<string> {
  const out = join(folder, `${basename(model)}-${bits}`);
  if (!existsSync(out)) await importCheckpoint({ model, dtype: `int${bits}` }, out, AbortSignal.timeout(60_000));
  return out;
}

describe.each(bits)("%i bits", (bits) => {
  test("a value is off by half a step of its block at most, but for the largest of the other sign", () => {
    const random = new Random(bits);
    const [rows, columns] = [3, 80]; // the last block is half empty
    const values = Float32Array.from({ length: rows * columns }, () => (random.below(2001) - 1000) / 1000);
    values.fill(0, 32, 64); // a block of zeros
    const quantized = quantizeRows(values, rows, columns, bits);
    const back = dequantize(quantized, rows, columns, bits);
    let squaredError = 0;
    for (const [i, value] of values.entries()) {
      const scale = quantized.scales[Math.floor(i / columns) * 3 + Math.floor((i % columns) / 32)];
      const off = Math.abs(back[i] - value);
      expect(off, `${i}`).toBeLessThanOrEqual(Math.abs(scale) * (value / scale > 2 ** (bits - 1) - 1 ? 1 : 0.5) + 1e-9);
      squaredError += (back[i] - value) ** 2;
    }
    expect(quantized.squaredError).toBeCloseTo(squaredError, 6);
    expect(quantized.squares).toBeCloseTo(
      values.reduce((sum, value) => sum + value * value, 0),
      6,
    );
    expect(Math.sqrt(squaredError / quantized.squares)).toBeLessThan(bits === 8 ? 0.006 : 0.09);
    expect([...back.subarray(32, 64)].every((value) => value === 0)).toBe(true);
  });

  test.each(families)(
    "$name: the quantized target agrees with the golden answers, and ViSpec with it",
    async ({ name, model, cases }) => {
      const checkpoint = { folder: await quantized(model, bits) };
      const plain = openEngine({ model: checkpoint.folder, drafter: "none" });
      const shapes = [{ totalToken: 16, depth: 4, topK: 4 }, undefined];
      const drafted = shapes.map((shape) => openEngine({ model: checkpoint.folder, shape }));
      let [same, all, equal] = [0, 0, 0];
      try {
        for (const [i, golden] of cases.entries()) {
          // Along the golden answer: how often its next token is the quantized target's likeliest, too.
          const ids = golden.output_ids;
          using sequence = plain.target.prefill(await promptOf(plain, golden), 0, ids.length);
          const { vocabulary } = plain.info;
          let likeliest = argmax(sequence.firstLogits);
          const parents = ids.map((_, i) => i - 1);
          const logits = sequence.score({ tokens: ids, parents, depths: ids.map((_, i) => i), scores: [] });
          for (const [i, id] of ids.entries()) {
            if (likeliest === id) same++;
            all++;
            likeliest = argmax(logits.subarray(i * vocabulary, (i + 1) * vocabulary));
          }
          const tokens = tokensOf(await answer(plain, golden));
          if (`${tokens}` === `${ids}`) equal++;
          // A third of the answers with drafts, for the time that they take.
          for (const engine of i % 3 === 0 ? drafted : [])
            expect(tokensOf(await answer(engine, golden)), golden.id).toEqual(tokens);
        }
      } finally {
        for (const engine of [plain, ...drafted]) await engine.close();
      }
      console.log(`${name} int${bits}: ${same} of ${all} tokens are the float32 target's (${((100 * same) / all).toFixed(2)} %), ${equal} of ${cases.length} answers`); // biome-ignore format: one line
      expect(same / all).toBeGreaterThan(bits === 8 ? 0.99 : 0.9);
      expect(same).toBeLessThan(bits === 8 ? all + 1 : all); // four bits are not the weights that they came from
    },
  );
});

test("a quantized matrix of another shape is refused by name", async () => {
  using checkpoint = new Checkpoint(await quantized(MODEL, 4)).tensors((tensors) => {
    const scales = tensors.get("model.layers.1.mlp.up_proj.weight.scales")!;
    scales.shape = [scales.shape[0] / 2, scales.shape[1] * 2];
  });
  expect(() => openEngine({ model: checkpoint.folder })).toThrow(
    /model\.layers\.1\.mlp\.up_proj\.weight\.scales is \[256,12\].*asks for \[512,6\]/,
  );
});

test("decoder matrices are quantized; embeddings, head, norms, biases and vision are not", () => {
  const names = (prefix: string) => [
    `${prefix}layers.3.self_attn.q_proj.weight`,
    `${prefix}layers.12.mlp.down_proj.weight`,
  ];
  for (const prefix of ["model.", "language_model.model.", "model.language_model."])
    for (const name of names(prefix)) expect(isQuantized(name), name).toBe(true);
  const others = [
    ...["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"],
    ...["model.layers.0.self_attn.q_proj.bias", "visual.blocks.0.mlp.up_proj.weight"],
    ...["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight"],
  ];
  for (const name of others) expect(isQuantized(name), name).toBe(false);
});
