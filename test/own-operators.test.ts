/** The graphs that CUDA runs compute what the CPU engine's do: both get the same inputs, the one with operators in TypeScript. */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { draftVocabulary, FREQUENT_FILE } from "../gpu-worker/engine/cuda/model.ts";
import { encodePicture, type Passage } from "../gpu-worker/engine/images.ts";
import { type FixedInput, Runtime, type Session } from "../gpu-worker/engine/runtime.ts";
import type { Tensor } from "../gpu-worker/engine/tensor.ts";
import { type Dim, Graph } from "../gpu-worker/graph/graph.ts";
import { CUSTOM_DOMAIN, encodeOnnx } from "../gpu-worker/graph/onnx.ts";
import { filterHere } from "../gpu-worker/input/resize.ts";
import { adaptorGraph, DRAFT_ATTENTION, draftBiasGraph, draftGraph, foldGraph } from "../gpu-worker/model/draft.ts";
import { headWeight, languageGraph, TARGET_ATTENTION } from "../gpu-worker/model/language.ts";
import { gatedMlp } from "../gpu-worker/model/layers.ts";
import { graphs, describe as readCheckpoint } from "../gpu-worker/model/model.ts";
import { frequencies, ropeTable } from "../gpu-worker/model/rope.ts";
import { gatedSilu } from "../gpu-worker/ops/elementwise.ts";
import { families, MODEL, maxDifference } from "./support/goldens.ts";
import {
  addRmsNormOp,
  addRowsOp,
  attentionOp,
  bytesAt,
  gatedLinearOp,
  gatedSiluOp,
  linearOp,
  pairRowsOp,
  weightsOn,
} from "./support/own-operators.ts";

const OWN = { dtype: "f32", attention: "own", int8: false } as const;
/** Of the passes in a cycle. */
const CYCLE = { ...OWN, searched: true } as const;
const FUSED = { ...OWN, attention: "fused" } as const;
/** Of every cache. */
const ROWS = 192;

type Given = Record<string, ArrayLike<number>>;
type Caches = Map<string, Tensor>;
interface Runnable {
  graph: Graph;
  session: Session;
}

const some = (n: number, seed: number) => Float32Array.from({ length: n }, (_, i) => Math.sin(i * i + i + seed));
const range = (n: number) => Array.from({ length: n }, (_, i) => i);
/** Numbers agree within 1e-4 of the largest. */
function agree(what: string, own: ArrayLike<number>, wanted: Float32Array): void {
  const largest = wanted.reduce((top, x) => Math.max(top, Math.abs(x)), 0);
  expect(largest, what).toBeGreaterThan(0);
  expect(maxDifference(own, wanted) / largest, what).toBeLessThan(1e-4);
}

/** Gives a graph those inputs that it has, and the caches, which it changes. */
function run(runtime: Runtime, { graph, session }: Runnable, given: Given, caches: Caches = new Map()) {
  using memory = new DisposableStack();
  using binding = session.binding();
  const outputs: Record<string, Tensor> = {};
  const [T, K, k] = [given.ids?.length, given.logit_rows?.length, given.k?.[0]];
  const sizes: Record<string, number> = { M: ROWS, T, K, k };
  for (const { name, dtype, shape } of graph.inputs) {
    const data = given[name];
    const cached = name.startsWith("key.") || name.startsWith("value.");
    if (!data && !cached) continue; // the session has it
    const of = (d: Dim) => (d === "M" ? ROWS : d === "S" ? 1 : d);
    const known = shape.map(of).filter((d) => typeof d === "number");
    const product = known.reduce((a, b) => a * b, 1);
    const dims = shape.map(of).map((d) => (typeof d === "number" ? d : data.length / product));
    const tensor = cached ? (caches.get(name) ?? runtime.tensor(dtype, product)) : runtime.tensor(dtype, data.length);
    if (cached) caches.set(name, tensor);
    else if (dtype === "i64") memory.use(tensor).i64.set(Array.from(data, BigInt));
    else memory.use(tensor)[dtype as "f32" | "i32"].set(data);
    binding.input(name, tensor, dims);
  }
  for (const { name, value } of graph.outputs) {
    const dims = value.shape.map((d) => (typeof d === "number" ? d : sizes[d]));
    const cache = caches.get(name.replace(".next", ""));
    const tensor = cache ?? memory.use(runtime.tensor(value.dtype, dims.reduce((a, b) => a * b, 1))); // biome-ignore format: one line
    if (!cache) outputs[name] = tensor;
    binding.output(name, tensor, dims);
  }
  binding.run();
  const numbers = (t: Tensor) => (t.dtype === "i64" ? Float32Array.from(t.i64, Number) : t.f32.slice());
  return Object.fromEntries(Object.entries(outputs).map(([name, tensor]) => [name, numbers(tensor)]));
}

/** What both kinds of attention read of a pass over nodes `first` … n-1 of a tree, or over a chain, after `past` rows. */
function attentionOf(past: number, parents: readonly number[], first = 0, causal = false): Given {
  const count = parents.length - first;
  const [bias, mask] = [new Float32Array(count * ROWS).fill(Number.NEGATIVE_INFINITY), new Int32Array(4 * count)];
  const positions = new Int32Array(count);
  for (let t = 0; t < count; t++) {
    bias.fill(0, t * ROWS, t * ROWS + past);
    positions[t] = past - 1;
    for (let j = first + t; j >= 0; j = parents[j], positions[t]++) {
      bias[t * ROWS + past + j] = 0;
      if (!causal) mask[4 * t + (j >> 5)] |= 1 << (j & 31);
    }
  }
  const control = [past, first, causal ? 1 : 0, 0];
  return { positions, bias, mask, control, last_row: [past + parents.length - 1], capacity: [ROWS] };
}
const chain = (past: number, count: number) => attentionOf(past, range(count).map((i) => i - 1), 0, true); // biome-ignore format: one line

describe.each(families)("$name", ({ model }) => {
  const checkpoint = readCheckpoint(model, join(model, "draft"));
  const { family, config, weights } = checkpoint;
  const { language, names, eosTokens } = config;
  const { config: drafting, weights: draftWeights } = checkpoint.draft!;
  const { hidden: width, vocabulary } = language;
  const head = headWeight(language, weights, names);
  const plain = graphs(checkpoint);
  const angles = ropeTable(ROWS, frequencies(language.headSize, config.ropeTheta));
  let runtime: Runtime;
  let load: (graph: Graph, more?: FixedInput[]) => Runnable;

  beforeAll(() => {
    runtime = new Runtime();
    const attentions = [attentionOp(TARGET_ATTENTION, language, ROWS), attentionOp(DRAFT_ATTENTION, drafting, ROWS)];
    const norms = [...new Set([language.epsilon, drafting.epsilon])].map(addRmsNormOp);
    const sums = [addRowsOp(false), addRowsOp(true)];
    runtime.addCustomOps(CUSTOM_DOMAIN, [...attentions, ...norms, ...sums, gatedLinearOp, gatedSiluOp, linearOp, pairRowsOp(width)]); // biome-ignore format: one line
    const weightsOf = weightsOn(runtime);
    load = (graph, more = []) => {
      const fixed = [...weightsOf(graph), ...more];
      return { graph, session: runtime.session(encodeOnnx(graph), { fixed }) };
    };
  });

  const compareCaches = (a: Caches, b: Caches, layers: number) => {
    expect([a.size, b.size]).toEqual([2 * layers, 2 * layers]);
    for (const [name, tensor] of a) agree(name, tensor.f32, b.get(name)!.f32);
  };

  test("a picture has the same rows", () => {
    const onHost = (data: Float32Array | BigInt64Array | Uint8Array) => {
      const dtype = data instanceof Float32Array ? "f32" : data instanceof Uint8Array ? "u8" : "i64";
      const tensor = runtime.tensor(dtype, data.length);
      new Uint8Array(bytesAt(tensor.pointer, data.byteLength)).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength)); // biome-ignore format: one line
      return tensor;
    };
    const rows = (elements: number) => runtime.tensor("f32", elements);
    const put: Passage["put"] = (all) => all.map(onHost);
    const passage: Passage = { filter: filterHere, put, rows, take: ({ f32 }) => f32.slice() };
    const picture = { width: 300, height: 190, rgb: Uint8Array.from(some(300 * 190 * 3, 1), (x) => 128 + 127 * x) };
    const seen = (vision: Session, passage?: Passage) => encodePicture(runtime, { family, config, vision, passage }, picture).rows; // biome-ignore format: one line
    const wanted = seen(load(plain.vision).session);
    agree("rows", seen(load(family.visionGraph(weights, OWN)).session, passage), wanted as Float32Array);
  });

  test("the target's passes over a prompt with a picture, its second chunk, and a tree", () => {
    const [cpu, prompt] = [load(plain.language), load(languageGraph(language, weights, OWN, names))];
    const text = load(languageGraph(language, weights, CYCLE, names, false));
    const [a, b]: [Caches, Caches] = [new Map(), new Map()];
    const both = (name: string, graph: Runnable, given: Given, other = cpu) => {
      const ids = Array.from(given.positions, (p, i) => (p * 31 + i * 7) % vocabulary);
      const all = { image_rows: [], image_index: [], logit_rows: range(ids.length), ...angles, ids, ...given };
      const [found, wanted] = [run(runtime, graph, all, a), run(runtime, other, all, b)];
      expect(Object.keys(found)).toEqual(["hidden", "logits"]);
      for (const output in found) agree(`${name} ${output}`, found[output], wanted[output]);
    };
    const picture = { image_rows: some(20 * width, 2), image_index: range(20).map((i) => 9 + i) };
    both("prompt", prompt, { ...chain(0, 70), ...picture, logit_rows: [69, 3] });
    both("chunk", prompt, { ...chain(70, 20), logit_rows: [19] });
    both("tree", text, attentionOf(90, range(80).map((i) => (i - 1) >> 1))); // biome-ignore format: one line
    const [tied, plainTied] = [CYCLE, FUSED].map((options) => load(languageGraph({ ...language, tiedEmbeddings: true }, weights, options, names, false))); // biome-ignore format: one line
    both("the embedding as head", tied, attentionOf(90, [-1]), plainTied);
    compareCaches(a, b, language.layers);
  });

  test("the draft's passes over a prompt's rows, with adapted ones among them, and over two levels of a tree", () => {
    const folded = runtime.tensor("f32", 2 * width * width);
    folded.f32.set(run(runtime, load(foldGraph(drafting, draftWeights, OWN)), {}).folded);
    const fixed = [{ name: "folded", tensor: folded, dims: [2 * width, width] }];
    const cut = draftVocabulary({ draftVocabulary: 300 }, vocabulary, eosTokens)!;
    const vocabularies = [range(vocabulary), cut];
    const layers = [OWN, CYCLE].map((options, i) => load(draftGraph(drafting, draftWeights, head, options, vocabularies[i]), fixed)); // biome-ignore format: one line
    const [cpu, a, b]: [Runnable, Caches, Caches] = [load(plain.draft!.layer), new Map(), new Map()];
    const both = (name: string, given: Given) => {
      const count = given.positions.length;
      const ids = Array.from(given.positions, (p, i) => (p * 37 + i * 11) % vocabulary);
      const hidden = { hidden: some(50 * width, count), hidden_rows: ids.map((id) => id % 50) };
      const all = { ...angles, ids, ...hidden, row_bias: some(width, 3), keep: ids.map(() => 1), logit_rows: range(count), k: [vocabulary], ...given }; // biome-ignore format: one line
      const wanted = run(runtime, cpu, all, b);
      // Of all tokens, from the likeliest on.
      const logProbs = wanted.log_probs.slice();
      for (const [i, logProb] of wanted.log_probs.entries())
        logProbs[i - (i % vocabulary) + wanted.tokens[i]] = logProb;
      for (const [i, layer] of layers.entries()) {
        const found = run(runtime, layer, all, a);
        agree(`${name} out`, found.out, wanted.out);
        const n = vocabularies[i].length;
        // Logits and log-probabilities differ by a constant in each row.
        const centred = found.logits.map((x, at) => x - found.logits[at - (at % n)]);
        const expected = found.logits.map((_, at) => {
          const row = Math.floor(at / n) * vocabulary;
          return logProbs[row + vocabularies[i][at % n]] - logProbs[row + vocabularies[i][0]];
        });
        agree(`${name} logits of ${n}`, centred, expected);
      }
    };
    const adapted = { keep: range(60).map((i) => (i % 7 === 3 ? 0 : 1)), row_bias: some(60 * width, 4) };
    both("prompt", { ...chain(0, 60), ...adapted, logit_rows: [59] });
    both("level", attentionOf(60, [-1, -1, -1]));
    both("next level", attentionOf(60, [-1, -1, -1, 0, 2], 3));
    compareCaches(a, b, 1);
  });

  test("the adaptor and the global vector's share", () => {
    const { bias, adaptor } = plain.draft!;
    const makers = [adaptorGraph, draftBiasGraph] as const;
    for (const [i, [name, graph]] of Object.entries({ out: adaptor, bias }).entries()) {
      const given = { rows: some(30 * width, 5), global: some(width, 6) };
      const found = run(runtime, load(makers[i](drafting, draftWeights, OWN)), given);
      agree(name, found[name], run(runtime, load(graph), given)[name]);
    }
  });
});

test("an MLP whose rows are no multiple of 16 bytes is widened with zeros", () => {
  const { weights } = readCheckpoint(MODEL);
  const beginning = (name: string, shape: readonly number[]) => {
    const bytes = 2 * shape.reduce((a, b) => a * b, 1);
    return { ...weights.get(name, weights.shape(name)), shape, bytes };
  };
  const source = { folder: MODEL, has: () => false, shape: () => [], get: beginning };
  const runtime = new Runtime();
  runtime.addCustomOps(CUSTOM_DOMAIN, [gatedSiluOp]);
  const weightsOf = weightsOn(runtime);
  const [wanted, own] = [FUSED, OWN].map((options) => {
    const graph = new Graph(options);
    graph.output(
      "y",
      gatedMlp(graph, graph.input("x", "f32", [3, 160]), source, "visual.blocks.0.mlp", 160, 429, true),
    );
    const session = runtime.session(encodeOnnx(graph), { fixed: weightsOf(graph) });
    return run(runtime, { graph, session }, { x: some(480, 7) }).y;
  });
  agree("y", own, wanted);
});

test("what an operator throws reaches whoever runs the graph, once", () => {
  const runtime = new Runtime();
  let broken = true;
  const compute: typeof gatedSiluOp.compute = (...args) => {
    if (broken) throw new RangeError("broken");
    gatedSiluOp.compute(...args);
  };
  runtime.addCustomOps(CUSTOM_DOMAIN, [{ ...gatedSiluOp, compute }]);
  const graph = new Graph(OWN);
  graph.output("y", gatedSilu(graph, graph.input("x", "f32", [1, 2])));
  const runnable = { graph, session: runtime.session(encodeOnnx(graph)) };
  expect(() => run(runtime, runnable, { x: [2, 3] })).toThrow(new RangeError("broken"));
  broken = false;
  expect(run(runtime, runnable, { x: [2, 3] }).y[0]).toBeCloseTo(6 / (1 + Math.exp(-2)), 5);
});

describe("tokens that a draft may propose", () => {
  const folder = mkdtempSync(join(tmpdir(), "vispec-"));
  afterAll(() => rmSync(folder, { recursive: true }));
  const tokens = (size: number | undefined, of: number, eos: number[], draft?: string) =>
    draftVocabulary({ draft, draftVocabulary: size }, of, new Set(eos));

  test("are all, but the first 32,768 of a large vocabulary, with those that end an answer", () => {
    expect(tokens(undefined, 65_536, [2])).toBeUndefined();
    expect(tokens(undefined, 151_936, [151_645, 7])).toEqual([...range(32_767), 151_645]);
    expect(tokens(0, 151_936, [2])).toBeUndefined();
    expect(tokens(100, 100, [2])).toBeUndefined();
    expect(tokens(4, 100, [99])).toEqual([0, 1, 2, 99]);
  });

  test("are the draft's most frequent ones by its list, and then the first; the list may name none beyond", () => {
    const list = (content: unknown) => writeFileSync(join(folder, FREQUENT_FILE), JSON.stringify(content));
    list([50, 40, 99, 30, 0]);
    expect(tokens(3, 100, [2], folder)).toEqual([2, 40, 50]);
    expect(tokens(8, 100, [2], folder)).toEqual([0, 1, 2, 3, 30, 40, 50, 99]);
    expect(tokens(0, 100, [2], folder)).toBeUndefined();
    expect(() => tokens(3, 99, [2], folder)).toThrow(/frequent_tokens\.json: token 99 is not among 99/);
    list([1.5]);
    expect(() => tokens(3, 100, [2], folder)).toThrow(FREQUENT_FILE);
  });
});
