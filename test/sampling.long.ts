/** Sampling: the distribution is transformers', a tree changes nothing of it, and a seed's text is the seed's alone. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { decode } from "../gpu-worker/decode/decode.ts";
import { noDrafter } from "../gpu-worker/decode/drafters/drafter.ts";
import type { TreeShape } from "../gpu-worker/decode/drafters/plan.ts";
import { adjust, distribution, Sampler, seedOf, uniforms } from "../gpu-worker/decode/sample.ts";
import type { Scores } from "../gpu-worker/decode/target.ts";
import { rootOnly, type Tree } from "../gpu-worker/decode/tree.ts";
import { type Path, verify } from "../gpu-worker/decode/verify.ts";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import type { Sampling } from "../shared/protocol.ts";
import {
  answer,
  cases,
  families,
  openEngine,
  plainSampling as plain,
  prepare,
  promptOf,
  readGolden,
  tokensOf,
} from "./support/goldens.ts";

/** Probabilities of tokens as transformers' warpers define them, written without a thought for speed. */
function warped(logits: ArrayLike<number>, { temperature, topK, topP, minP }: Sampling): number[] {
  const normed = (weights: number[]) => weights.map((w) => w / weights.reduce((a, b) => a + b));
  let p = normed(Array.from(logits, (x) => Math.exp(x / temperature)));
  const order = () => p.map((_, i) => i).sort((a, b) => p[b] - p[a] || a - b);
  const keep = (ids: number[]) => (p = normed(p.map((x, i) => (ids.includes(i) ? x : 0))));
  if (topK > 0) keep(order().slice(0, topK));
  if (topP < 1) keep(order().filter((_, n, ids) => ids.slice(0, n).reduce((a, i) => a + p[i], 0) < topP));
  const floor = minP * Math.max(...p);
  return keep(order().filter((i) => p[i] >= floor));
}

describe.each(families)("the next token's distribution of $name", ({ model, goldens, cases }) => {
  let engine: LocalEngine;
  beforeAll(() => {
    engine = openEngine({ model, drafter: "none" });
  });
  afterAll(() => engine.close());

  type Row = { case: string; position: number; temperature: number; top_p: number; support: number; ids: number[]; probabilities: number[] }; // biome-ignore format: one row
  const rows: Row[] = readGolden("sampling.json", goldens).rows;

  test.each([...new Set(rows.map((row) => row.case))])("%s: is that of transformers at every position", async (id) => {
    const golden = cases.find((c) => c.id === id)!;
    const { request } = await prepare(engine, golden);
    const options = { samplers: [new Sampler(request.sampling)], maxTokens: 256, stopTokens: new Set<number>() };
    const signal = AbortSignal.timeout(60_000);
    const logits: Float32Array[] = [];
    for await (const cycles of decode(engine.target, noDrafter, await promptOf(engine, golden), { ...options, signal }))
      for await (const cycle of cycles) {
        logits.push(cycle.logits(0).slice());
        if (logits.length > Math.max(...rows.map((row) => row.position))) break;
      }
    for (const row of rows.filter((r) => r.case === id)) {
      const settings = { ...plain, temperature: row.temperature, topP: row.top_p };
      const weights = distribution(logits[row.position], settings);
      const total = weights.reduce((a, b) => a + b);
      const where = `position ${row.position} T ${row.temperature} top_p ${row.top_p}`;
      expect(weights.filter((w) => w > 0).length, where).toBe(row.support);
      // Logits agree to about 3e-5, so probabilities do in proportion.
      for (const [i, token] of row.ids.entries())
        expect(Math.abs(weights[token] / total / row.probabilities[i] - 1), `${where} token ${token}`).toBeLessThan(
          1e-3,
        );
      const rest = weights.filter((_, token) => !row.ids.includes(token)).reduce((a, w) => Math.max(a, w), 0);
      expect(rest / total, where).toBeLessThanOrEqual(row.probabilities.at(-1)! * (1 + 1e-3));
    }
  });
});

test("the next token's distribution is that of transformers' definition for every mixture of cuts, on random logits", () => {
  const random = uniforms(3);
  for (let n = 0; n < 500; n++) {
    const logits = Float32Array.from({ length: 40 }, () => 12 * random() - 6);
    const topK = Math.floor(random() * 45);
    const settings = { ...plain, topK, topP: 0.05 + 0.95 * random(), minP: random() ** 3, temperature: 0.1 + 1.9 * random() }; // biome-ignore format: one row
    const weights = distribution(logits, settings);
    const total = weights.reduce((a, b) => a + b);
    const wanted = warped(logits, settings);
    for (const [i, p] of wanted.entries()) expect(weights[i] / total).toBeCloseTo(p, 12);
  }
});

// A target that is a table: after each prefix, fixed random logits over six tokens. Token 0 ends the text.
const VOCABULARY = 6;
const LENGTH = 3;
const END = 0;
const table = new Map<number, Float32Array>();
const tableLogits = (prefix: readonly number[]) => {
  const key = prefix.reduce((sum, token) => sum * 7 + token + 1, 11);
  const known = table.get(key);
  if (known) return known;
  const random = uniforms(key);
  const logits = Float32Array.from({ length: VOCABULARY }, () => 4 * random() - 2);
  table.set(key, logits);
  return logits;
};
const isLast = (token: number, length: number) => token === END || length >= LENGTH;

const PROMPT = [2, 5];

/** Bias and penalties after a text as vLLM defines them, written without a thought for speed. */
function penalized(logits: Float32Array, text: readonly number[], s: Sampling): Float32Array {
  return logits.map((value, token) => {
    const biased = value + s.logitBias.reduce((sum, [id, bias]) => sum + (id === token ? bias : 0), 0);
    const seen = [...PROMPT, ...text].includes(token);
    const repeated = !seen ? biased : biased > 0 ? biased / s.repetitionPenalty : biased * s.repetitionPenalty;
    const count = text.filter((other) => other === token).length;
    return repeated - s.frequencyPenalty * count - (count > 0 ? s.presencePenalty : 0);
  });
}

/** Every text that the target can give, with its probability. */
function enumerate(settings: Sampling, prefix: number[] = [], probability = 1): Map<string, number> {
  const all = new Map<string, number>();
  for (const [token, p] of warped(penalized(tableLogits(prefix), prefix, settings), settings).entries()) {
    if (p === 0) continue;
    const text = [...prefix, token];
    if (isLast(token, text.length)) all.set(text.join(), probability * p);
    else for (const [rest, q] of enumerate(settings, text, probability * p)) all.set(rest, q);
  }
  return all;
}

/** Draws a tree from the past alone, as a draft model does: a node of depth d gets `widths[d]` children. */
function draft(past: readonly number[], widths: number[]): Tree {
  const tree = rootOnly(past.at(-1)!);
  const paths = [[...past]];
  for (let node = 0; node < tree.tokens.length; node++) {
    const likely = [...tableLogits([...paths[node], 3])].map((value, token) => ({ value, token })); // not the target's
    likely.sort((a, b) => b.value - a.value);
    for (const { token } of likely.slice(0, widths[tree.depths[node]] ?? 0)) {
      tree.tokens.push(token);
      tree.parents.push(node);
      tree.depths.push(tree.depths[node] + 1);
      paths.push([...paths[node], token]);
    }
  }
  return tree;
}

/** Logits [n,V] as a target gives them. */
const scoresOf = (logits: Float32Array, vocabulary = VOCABULARY): Scores => {
  return { row: (node) => logits.subarray(node * vocabulary, (node + 1) * vocabulary) };
};

type Judge = (...parameters: Parameters<typeof verify>) => Path | Promise<Path>;
/** The logits of a tree's node: `path` is the text up to it, `text` that up to the root. */
type Logits = (path: number[], text: number[]) => Float32Array;

/** The decode loop over the table. */
async function sampleText(sampler: Sampler, widths: number[], judge: Judge, target: Logits): Promise<number[]> {
  const text = [await sampler.next(target([], []))];
  while (!isLast(text.at(-1)!, text.length)) {
    const tree = draft(text, widths);
    const logits = new Float32Array(tree.tokens.length * VOCABULARY);
    const paths: number[][] = [];
    for (const [node, token] of tree.tokens.entries()) {
      paths.push(node === 0 ? text.slice() : [...paths[tree.parents[node]], token]);
      logits.set(target(paths[node], text), node * VOCABULARY);
    }
    const given = text.length;
    const path = await judge(tree, scoresOf(logits), sampler, (token, i) => isLast(token, given + i + 1));
    text.push(...path.tokens);
  }
  return text;
}

/**
 * Pearson's χ² of texts drawn with seeds 1 … n against the exact distribution, as a standard normal score (Wilson and
 * Hilferty). Texts that are expected fewer than 5 times count as one. A text of probability zero makes it infinite.
 */
async function chiSquare(
  settings: Sampling,
  widths: number[],
  { judge = verify as Judge, n = 12_000, target = tableLogits as Logits, sampling = settings } = {},
): Promise<number> {
  const exact = enumerate(settings);
  const counts = new Map<string, number>();
  for (let seed = 1; seed <= n; seed++) {
    const text = await sampleText(new Sampler({ ...sampling, seed }, PROMPT), widths, judge, target);
    if (!exact.has(text.join())) return Number.POSITIVE_INFINITY;
    counts.set(text.join(), (counts.get(text.join()) ?? 0) + 1);
  }
  const cells: [count: number, expected: number][] = [];
  const rare: [number, number] = [0, 0];
  for (const [text, p] of exact) {
    const cell: [number, number] = [counts.get(text) ?? 0, n * p];
    if (cell[1] >= 5) cells.push(cell);
    else for (const i of [0, 1]) rare[i] += cell[i];
  }
  if (rare[1] >= 5) cells.push(rare);
  const statistic = cells.reduce((sum, [count, expected]) => sum + (count - expected) ** 2 / expected, 0);
  const spread = 2 / (9 * (cells.length - 1));
  return (Math.cbrt(statistic / (cells.length - 1)) - (1 - spread)) / Math.sqrt(spread);
}

const penalties: Sampling = {
  ...plain,
  ...{ repetitionPenalty: 1.3, presencePenalty: -0.5, frequencyPenalty: 1.2, logitBias: [[1, 0.8]] },
};

test("bias comes first, then the repetition penalty on both signs, then frequency and presence", () => {
  const row = Float32Array.of(2, -1, 0.5, 4, -2, 3);
  const sampling: Sampling = { ...plain, logitBias: [[1, 3], [3, -100]], repetitionPenalty: 2, frequencyPenalty: 0.25, presencePenalty: 1 }; // biome-ignore format: one row
  // Tokens 1 and 4 are in the answer, once and three times; 0 and 2 in the prompt.
  adjust(row, sampling, new Map([[1, 1], [4, 3]]), new Set([0, 1, 2, 4])); // biome-ignore format: one row
  expect([...row]).toEqual([1, (-1 + 3) / 2 - 0.25 - 1, 0.25, -96, -2 * 2 - 0.75 - 1, 3]);
});

describe("sampling through a tree", () => {
  const settings: [string, Sampling][] = [
    ["T=1", plain],
    ["T=0.7", { ...plain, temperature: 0.7 }],
    ["top_p 0.9", { ...plain, topP: 0.9 }],
    ["top_k 3", { ...plain, topK: 3 }],
    ["min_p 0.2", { ...plain, minP: 0.2 }],
    ["T=1.3, top_k 4, top_p 0.8, min_p 0.1", { ...plain, temperature: 1.3, topK: 4, topP: 0.8, minP: 0.1 }],
    ["presence 1, frequency 0.7", { ...plain, presencePenalty: 1, frequencyPenalty: 0.7 }],
    ["repetition 1.8", { ...plain, repetitionPenalty: 1.8 }],
    ["logit_bias", { ...plain, logitBias: [[3, 1.5], [0, -2], [4, -100]] }], // biome-ignore format: one row
    ["all penalties, T=0.8, top_k 5", { ...penalties, temperature: 0.8, topK: 5 }],
  ];
  const shapes: [string, number[]][] = [
    ["no tree", []],
    ["a chain", [1, 1, 1]],
    ["a wide tree", [6]],
    ["a bushy tree", [3, 2]],
    ["a tree of all texts", [6, 6]],
  ];

  test.each(shapes)("gives the target's own distribution with %s", async (_name, widths) => {
    for (const [name, setting] of settings) expect(await chiSquare(setting, widths), name).toBeLessThan(3.5);
  });

  const biased: [string, Judge][] = [
    [
      "accepts its first child whatever the target says",
      (tree, scores, sampler, last) => {
        const child = tree.parents.indexOf(0);
        if (child < 0) return verify(tree, scores, sampler, last);
        return { nodes: [0], tokens: [tree.tokens[child]] };
      },
    ],
    [
      "draws anew, the rejected child among the choices",
      async (tree, scores, sampler) => {
        const child = tree.parents.indexOf(0);
        const row = scores.row(0);
        const tokens = [await sampler.next(row)];
        if (child >= 0 && tokens[0] !== tree.tokens[child]) tokens[0] = await sampler.next(row);
        return { nodes: [0], tokens };
      },
    ],
    [
      "takes a node's logits for its parent's",
      (tree, scores, sampler, last) => {
        const shifted = tree.parents.flatMap((parent) => [...scores.row(Math.max(parent, 0))]);
        return verify(tree, scoresOf(Float32Array.from(shifted)), sampler, last);
      },
    ],
  ];
  test.each(biased)("is caught by the same measure when the verifier %s", async (_name, judge) => {
    expect(await chiSquare(plain, [1, 1, 1], { judge, n: 2000 })).toBeGreaterThan(8);
  });

  const forgetful: [string, Logits][] = [
    ["count nothing of the path inside the tree", (path, text) => penalized(tableLogits(path), text, penalties)],
    ["count the last token of the path twice", (path) => penalized(tableLogits(path), [...path, ...path.slice(-1)], penalties)], // biome-ignore format: one row
    ["are left out", (path) => tableLogits(path)],
  ];
  test.each(forgetful)("is caught by the same measure when penalties %s", async (_name, target) => {
    const wrong = await chiSquare(penalties, [6, 6], { target, sampling: plain, n: 4000 });
    expect(wrong).toBeGreaterThan(8);
    const right: Logits = (path) => penalized(tableLogits(path), path, penalties);
    expect(await chiSquare(penalties, [6, 6], { target: right, sampling: plain, n: 4000 })).toBeLessThan(3.5);
  });

  test("never gives a token of probability zero", async () => {
    const logits = Float32Array.of(1, -Infinity, 0.5, -Infinity, 3, -200);
    const tree: Tree = { tokens: [9, 1, 3, 0], parents: [-1, 0, 0, 0], depths: [0, 1, 1, 1], scores: [0, 0, 0, 0] };
    const rows = Float32Array.from({ length: 4 * 6 }, (_, i) => logits[i % 6]);
    for (const [name, setting] of [...settings, ["T=0", { ...plain, temperature: 0 }] as const]) {
      for (let seed = 0; seed < 3000; seed++) {
        const text: number[] = [];
        const { tokens } = await verify(
          tree,
          scoresOf(rows, 6),
          new Sampler({ ...setting, seed }, PROMPT),
          () => false,
        );
        for (const token of tokens) {
          const row = penalized(logits, text, setting);
          const possible = setting.temperature === 0 ? [0, 0, 0, 0, 1, 0] : warped(row, setting);
          expect(possible[token], `${name} seed ${seed}`).toBeGreaterThan(0);
          text.push(token);
        }
      }
    }
  });

  test("gives each seed its own draws, close seeds and large ones too", () => {
    const seeds = [0, 1, 2, -1, 2 ** 32, 2 ** 53 - 1, 1 - 2 ** 53];
    expect(new Set(seeds.map((seed) => uniforms(seed)())).size).toBe(seeds.length);
    const mean = Array.from({ length: 10_000 }, (_, seed) => uniforms(seed)()).reduce((a, b) => a + b) / 10_000;
    expect(Math.abs(mean - 0.5)).toBeLessThan(0.01);
  });

  test("a choice's seed is the request's plus its number, and goes round at the end", () => {
    const most = Number.MAX_SAFE_INTEGER;
    const seeds: [seed: number, i: number, wanted: number][] = [
      [7, 0, 7],
      [7, 3, 10],
      [-2, 5, 3],
      [-most, 15, 15 - most],
      [most, 0, most],
      [most - 1, 1, most],
      [most, 1, -most],
      [most - 2, 15, 12 - most],
    ];
    for (const [seed, i, wanted] of seeds) expect(seedOf(seed, i), `${seed} + ${i}`).toBe(wanted);
  });
});

// One uniform is drawn for a token, so a seed's text does not depend on the drafter (but for draws that lie within
// float32's rounding of a border between two tokens; none of these seeds has one).
describe("a seed's text from the engine", () => {
  const shapes: (TreeShape | undefined)[] = [
    { totalToken: 30, depth: 3, topK: 8 },
    { totalToken: 60, depth: 5, topK: 10 },
    { totalToken: 7, depth: 5, topK: 1 },
    undefined,
  ];
  const runs = ["00-describe", "15-compare", "18-story"].flatMap((id) =>
    [1, 3].map((seed) => ({ golden: cases.find((c) => c.id === id)!, sampling: { ...plain, seed } })),
  );
  async function texts(options: Parameters<typeof openEngine>[0]) {
    const engine = openEngine(options);
    try {
      const all: number[][] = [];
      for (const { golden, sampling } of runs) {
        all.push(tokensOf(await answer(engine, golden, { sampling, maxTokens: 200 })));
      }
      return all;
    } finally {
      await engine.close();
    }
  }
  let wanted: number[][];
  beforeAll(async () => {
    wanted = await texts({ drafter: "none" });
  });

  test.each(shapes)("is with ViSpec %o what it is without a draft", async (shape) => {
    expect(new Set(wanted.map((tokens) => tokens.join())).size).toBeGreaterThan(3); // not the greedy ones
    expect(await texts({ shape })).toEqual(wanted);
  });
});
