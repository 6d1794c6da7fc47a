/** Which tree is drafted where a cycle's shape is fixed beforehand, by made-up costs and chances; and kept costs. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { z } from "zod";
import { MENU, ShapeChooser } from "../gpu-worker/decode/drafters/menu.ts";
import type { TreeShape } from "../gpu-worker/decode/drafters/plan.ts";
import { cachedCosts, codeHash } from "../gpu-worker/engine/costs-cache.ts";

type Shape = TreeShape | undefined;
/** Chance of the i-th draft, from 0 on, when those before were accepted. */
type Chance = (i: number, shape: TreeShape) => number;

/** Mulberry32. */
function uniforms(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A verify pass takes 1 ms, a little more beyond 32 nodes, and a draft pass `draft` ms. */
const costs = (draft: number) => (shape: Shape) =>
  shape ? 1 + 0.0015 * Math.max(0, shape.totalToken - 32) + draft * (shape.depth + 1) : 1;

function expected(shape: Shape, chance: Chance): number {
  let [sum, path] = [1, 1];
  for (let i = 0; shape && i <= shape.depth; i++) {
    path *= chance(i, shape);
    sum += path;
  }
  return sum;
}

/** Runs cycles; the mean tokens a millisecond that the chosen shapes have, and the milliseconds that drafting took. */
function run(chooser: ShapeChooser, cost: (s: Shape) => number, chance: Chance, cycles: number, seed = 1) {
  const uniform = uniforms(seed);
  let [tokens, time, drafting] = [0, 0, 0];
  for (let cycle = 0; cycle < cycles; cycle++) {
    const shape = chooser.choose();
    let accepted = 0;
    while (shape && accepted <= shape.depth && uniform() < chance(accepted, shape)) accepted++;
    const took = cost(shape) * (0.975 + 0.05 * uniform());
    chooser.learn(shape, accepted, took);
    tokens += expected(shape, chance);
    time += took;
    if (shape) drafting += took;
  }
  return { rate: tokens / time, drafting };
}

const best = (cost: (s: Shape) => number, chance: Chance) =>
  Math.max(...[undefined, ...MENU].map((shape) => expected(shape, chance) / cost(shape)));

const CHANCES: Record<string, Chance> = {
  high: () => 0.9,
  middling: () => 0.7,
  falling: (i) => 0.85 - 0.1 * i,
  "only two": (i) => (i < 2 ? 0.9 : 0.1),
  low: () => 0.12,
  "wider is better": (_, { totalToken, depth }) => 0.7 * (totalToken / (depth + 1) / 8) ** 0.05,
};

describe("the chooser", () => {
  test("comes within 3 % of the best shape's rate within 300 cycles, by the mean of ten runs", () => {
    for (const [name, chance] of Object.entries(CHANCES))
      for (const draft of [0.02, 0.07, 0.12]) {
        const cost = costs(draft);
        const rates = Array.from({ length: 10 }, (_, seed) => {
          const chooser = new ShapeChooser(MENU, cost);
          run(chooser, cost, chance, 300, seed);
          return run(chooser, cost, chance, 500, seed + 100).rate;
        });
        const part = rates.reduce((a, b) => a + b, 0) / rates.length / best(cost, chance);
        expect(part, `${name}, ${draft} ms a draft pass`).toBeGreaterThan(0.97);
      }
  });

  test("learns what a tree gives that accepts more, or less, than its depth says", () => {
    const cost = costs(0.02);
    for (const [wide, other] of [
      [0.75, 0.6],
      [0.5, 0.8],
    ]) {
      // biome-ignore format: pairs
      const chance: Chance = (_, { totalToken }) => (totalToken === 60 ? wide : other);
      const chooser = new ShapeChooser(MENU, cost);
      run(chooser, cost, chance, 1500);
      expect(run(chooser, cost, chance, 500, 2).rate / best(cost, chance)).toBeGreaterThan(0.95);
    }
  });

  test("loses at most 2.5 % to plain decoding where drafts are always wrong", () => {
    for (const draft of [0.02, 0.12, 0.5]) {
      const cost = costs(draft);
      const { rate, drafting } = run(new ShapeChooser(MENU, cost), cost, () => 0, 1000);
      expect(1 / rate).toBeLessThan(1.025);
      expect(drafting).toBeGreaterThan(0);
    }
  });

  test("follows a text that becomes easy, and one that becomes hard", () => {
    const cost = costs(0.07);
    const chooser = new ShapeChooser(MENU, cost);
    const texts: [Chance, number][] = [[() => 0, 800], [() => 0.85, 400], [(i) => (i < 1 ? 0.8 : 0.05), 400], [() => 0, 400], [() => 0.8, 400]]; // biome-ignore format: one line
    for (const [chance, cycles] of texts) {
      run(chooser, cost, chance, cycles);
      expect(run(chooser, cost, chance, 200, 2).rate / best(cost, chance)).toBeGreaterThan(0.95);
    }
  });

  test("believes what cycles take, not what was measured", () => {
    const cost = (shape: Shape) => costs(0.07)(shape) * (shape?.depth === 3 ? 2 : 1);
    const chooser = new ShapeChooser(MENU, costs(0.07));
    run(chooser, cost, CHANCES.falling, 300);
    expect(run(chooser, cost, CHANCES.falling, 300, 2).rate / best(cost, CHANCES.falling)).toBeGreaterThan(0.96);
  });

  test("makes the same choices of the same past", () => {
    const cost = costs(0.07);
    const [a, b] = [1, 2].map(() => run(new ShapeChooser(MENU, cost), cost, CHANCES.middling, 200));
    expect(a).toEqual(b);
  });

  test("refuses a cost that is none and a shape that is not of the menu; of an empty menu it decodes plain", () => {
    expect(() => new ShapeChooser(MENU, () => Number.NaN)).toThrow("plain decoding cannot take NaN ms");
    const chooser = new ShapeChooser(MENU, () => 1);
    expect(() => chooser.learn({ totalToken: 9, depth: 1, topK: 8 }, 0, 1)).toThrow(
      "the tree 9/1/8 is not of the menu",
    );
    const plain = new ShapeChooser([], () => 1);
    plain.learn(undefined, 0, 1);
    expect(plain.choose()).toBeUndefined();
  });
});

test("the menu holds the paper's tree, at most 64 nodes, and no more nodes than levels give", () => {
  expect(MENU).toContainEqual({ totalToken: 30, depth: 3, topK: 8 });
  expect(MENU.length).toBeLessThanOrEqual(8);
  for (const { totalToken, depth, topK } of MENU)
    expect(totalToken).toBeLessThanOrEqual(Math.min(64, 1 + topK + depth * topK * topK));
});

describe("kept costs", () => {
  let folder = "";
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), "vispec-costs-"));
    vi.stubEnv("XDG_CACHE_HOME", folder);
  });
  afterEach(() => {
    vi.unstubAllEnvs();
    vi.restoreAllMocks();
    rmSync(folder, { recursive: true });
  });
  const schema = z.array(z.number());
  const measured = (key: Record<string, string | number>) => {
    const measure = vi.fn(() => [1, 2.5]);
    expect(cachedCosts(key, schema, measure)).toEqual([1, 2.5]);
    return measure.mock.calls.length;
  };
  const file = () => join(folder, "vispec", readdirSync(join(folder, "vispec"))[0]);

  test("are measured once a key, whatever its order", () => {
    expect(measured({ device: "a", nodes: 1 })).toBe(1);
    expect(measured({ nodes: 1, device: "a" })).toBe(0);
    expect(measured({ device: "a", nodes: "1" })).toBe(1);
    expect(readdirSync(join(folder, "vispec"))).toEqual([
      expect.stringMatching(/^costs-[0-9a-f]{16}\.json$/),
      expect.stringMatching(/^costs-[0-9a-f]{16}\.json$/),
    ]);
  });

  test("are measured anew when the file is malformed or of another form, and kept then", () => {
    for (const text of ["", "{", "null", '{"costs":["1"]}']) {
      measured({ device: "a" });
      writeFileSync(file(), text);
      expect(measured({ device: "a" })).toBe(1);
      expect(JSON.parse(readFileSync(file(), "utf8"))).toEqual({ key: { device: "a" }, costs: [1, 2.5] });
    }
  });

  test("are given, with a warning, where they cannot be kept", () => {
    const warn = vi.spyOn(console, "warn").mockImplementation(() => {});
    writeFileSync(join(folder, "vispec"), "no folder");
    expect(measured({ device: "a" })).toBe(1);
    expect(warn).toHaveBeenCalledWith(expect.stringContaining("not kept"));
  });

  test("hang on the code: on every kernel's and source's text and name, and on the package's dependencies", () => {
    const path = (name: string) => join(folder, name);
    const hashes = new Set<string>();
    const changed = (change: () => void) => {
      change();
      hashes.add(codeHash(folder));
      return hashes.size;
    };
    mkdirSync(path("gpu-worker/cuda"), { recursive: true });
    writeFileSync(path("gpu-worker/main.ts"), "");
    writeFileSync(path("gpu-worker/cuda/tree.cu"), "a kernel");
    expect(changed(() => writeFileSync(path("package.json"), "{}"))).toBe(1);
    expect(changed(() => writeFileSync(path("gpu-worker/notes.md"), "no code"))).toBe(1);
    expect(changed(() => writeFileSync(path("gpu-worker/cuda/tree.cu"), "another"))).toBe(2);
    expect(changed(() => renameSync(path("gpu-worker/main.ts"), path("gpu-worker/cuda/main.ts")))).toBe(3);
    expect(changed(() => writeFileSync(path("gpu-worker/cuda/main.ts"), "more"))).toBe(4);
    expect(changed(() => writeFileSync(path("package.json"), '{"version":"2"}'))).toBe(5);
  });
});
