/** Which tree is drafted where a cycle's shape is fixed beforehand, by made-up costs and chances; and kept costs. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { z } from "zod";
import { CROWD, MENU, ShapeChooser } from "../gpu-worker/decode/drafters/menu.ts";
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

/** Milliseconds of a cycle of so many sequences. */
type Cost = (shape: Shape, sequences: number) => number;

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

/**
 * Runs cycles of so many sequences; the mean tokens of one a millisecond that the chosen shapes have, the milliseconds
 * that drafting took, and the last half's shapes.
 */
function run(chooser: ShapeChooser, cost: Cost, chance: Chance, cycles: number, seed = 1, sequences = 1) {
  const uniform = uniforms(seed);
  const shapes: Shape[] = [];
  let [tokens, time, drafting] = [0, 0, 0];
  for (let cycle = 0; cycle < cycles; cycle++) {
    const shape = chooser.choose(sequences);
    const taken = Array.from({ length: sequences }, () => {
      let accepted = 0;
      while (shape && accepted <= shape.depth && uniform() < chance(accepted, shape)) accepted++;
      return accepted;
    });
    const took = cost(shape, sequences) * (0.975 + 0.05 * uniform());
    chooser.learn(shape, taken, took);
    tokens += expected(shape, chance);
    time += took;
    if (shape) drafting += took;
    if (2 * cycle >= cycles) shapes.push(shape);
  }
  return { rate: tokens / time, drafting, shapes };
}

const best = (cost: Cost, chance: Chance, sequences = 1, menu = MENU) =>
  Math.max(...[undefined, ...menu].map((shape) => expected(shape, chance) / cost(shape, sequences)));

const ALL = [...MENU, ...CROWD];
const nodesOf = (shape: Shape) => shape?.totalToken ?? 1;
/** That of a tree of eight children a node; less, where there are fewer. */
const widerIsBetter =
  (chance: number): Chance =>
  (_, { topK }) =>
    chance * (topK / 8) ** 0.1;

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

  test("draws smaller trees the more sequences share a pass, and none in the end, where every row costs", () => {
    // A pass over 16 rows takes twice what one over none does.
    const cost: Cost = (shape, sequences) =>
      1 + (sequences * nodesOf(shape)) / 16 + 0.02 * (shape ? shape.depth + 1 : 0);
    for (const chance of [0.5, 0.8, 0.9]) {
      const sizes = Array.from({ length: 32 }, (_, i) => {
        const chooser = new ShapeChooser(ALL, cost);
        run(chooser, cost, widerIsBetter(chance), 300, 1, i + 1);
        // The one that it mostly draws: trials are among them.
        const sizes = run(chooser, cost, widerIsBetter(chance), 200, 2, i + 1).shapes.map(nodesOf);
        return sizes.sort((a, b) => a - b)[sizes.length >> 1];
      });
      expect(sizes, `${chance}`).toEqual(sizes.toSorted((a, b) => b - a));
      expect(new Set(sizes).size, `${chance}: ${sizes}`).toBeGreaterThan(1);
      expect(sizes.at(-1), `${chance}: ${sizes}`).toBe(1);
    }
  });

  test("gives no fewer tokens a second, but for 3 %, with every sequence that is added at the costs of an H100", () => {
    const cost: Cost = (shape, sequences) => {
      const drafting = shape ? (shape.depth + 1) * (0.33 + 0.001 * sequences * shape.topK) : 0;
      const rows = sequences * nodesOf(shape);
      return (shape ? 5.3 + 0.014 * Math.max(0, rows - 64) : 5.3 + 0.01 * sequences) + drafting + 0.02 * sequences;
    };
    for (const p of [0.5, 0.8])
      for (const chance of [() => p, widerIsBetter(p)]) {
        // One engine, whose load rises.
        const chooser = new ShapeChooser(ALL, cost);
        let before = 0;
        for (let sequences = 1; sequences <= 16; sequences++) {
          run(chooser, cost, chance, 300, sequences, sequences);
          const rate = sequences * run(chooser, cost, chance, 300, sequences + 100, sequences).rate;
          expect(rate / before, `${p}, ${sequences} sequences`).toBeGreaterThan(0.97);
          const most = sequences * best(cost, chance, sequences, ALL);
          expect(rate / most, `${p}, ${sequences} sequences`).toBeGreaterThan(0.95);
          before = rate;
        }
      }
  });

  test("learns from each sequence of a pass: eight that accept nothing end drafting within fewer cycles than one", () => {
    const cycles = (sequences: number) => {
      const chooser = new ShapeChooser(MENU, costs(0.12));
      for (let cycle = 0; ; cycle++) {
        const shape = chooser.choose(sequences);
        if (!shape) return cycle;
        chooser.learn(shape, new Array(sequences).fill(0), costs(0.12)(shape));
      }
    };
    expect(cycles(8)).toBeLessThan(cycles(1));
  });

  test("offers so many sequences only what has a cost for them", () => {
    const cost: Cost = (shape, sequences) => 1 + (sequences * nodesOf(shape)) / 1000;
    const offered = (shape: Shape, sequences: number) => sequences === 1 || shape === undefined || shape === CROWD[1];
    const chooser = new ShapeChooser(ALL, (shape, n) => (offered(shape, n) ? cost(shape, n) : undefined));
    const { shapes } = run(chooser, cost, CHANCES.middling, 100);
    expect(shapes).not.toContain(CROWD[1]);
    expect(new Set(run(chooser, cost, CHANCES.middling, 100, 1, 2).shapes)).toEqual(new Set([CROWD[1]]));
    expect(() => chooser.learn(MENU[0], [1, 1], 1)).toThrow("the tree 16/1/8 is not of the menu for 2 at once");
    const alone = new ShapeChooser(ALL, (shape, n) => (shape && n > 1 ? undefined : cost(shape, n)));
    expect(alone.choose(2)).toBeUndefined();
    expect(alone.choose()).toBeDefined();
    const dear = new ShapeChooser(MENU, (_, n) => (n > 1 ? 0 : 1));
    expect(() => dear.choose(2)).toThrow("plain decoding cannot take 0 ms");
  });

  test("loses as little to trials with sequences that come and go, time lost counted for each that waits", () => {
    const cost: Cost = (shape, sequences) => costs(0.12)(shape) + 0.005 * sequences * nodesOf(shape);
    const chooser = new ShapeChooser(ALL, cost);
    let [lost, waited] = [0, 0];
    for (let cycle = 0; cycle < 4000; cycle++) {
      // Mostly one, which would save up for trials of sixteen.
      const sequences = cycle % 10 === 0 ? 16 : 1;
      const shape = chooser.choose(sequences);
      const took = cost(shape, sequences);
      chooser.learn(shape, new Array(sequences).fill(0), took);
      lost += sequences * (took - cost(undefined, sequences));
      waited += sequences * took;
    }
    expect(lost / waited).toBeLessThan(0.025);
    expect(lost).toBeGreaterThan(0);
  });

  test("learns what a cycle took from one in which texts ended, and nothing of their drafts", () => {
    const choices = (ended: number) => {
      const chooser = new ShapeChooser(MENU, costs(0.02));
      for (let cycle = 0; cycle < 40; cycle++) {
        const shape = chooser.choose(8);
        chooser.learn(shape, new Array(8 - ended).fill(shape ? shape.depth + 1 : 0), costs(0.02)(shape), 8);
      }
      return chooser.choose(8);
    };
    expect(choices(0)).toEqual({ totalToken: 60, depth: 6, topK: 8 });
    expect(choices(4)).toEqual({ totalToken: 60, depth: 6, topK: 8 });
  });

  test("makes the same choices of the same past", () => {
    const cost = costs(0.07);
    const [a, b] = [1, 2].map(() => run(new ShapeChooser(MENU, cost), cost, CHANCES.middling, 200));
    expect(a).toEqual(b);
  });

  test("refuses a cost that is none and a shape that is not of the menu; of an empty menu it decodes plain", () => {
    expect(() => new ShapeChooser(MENU, () => Number.NaN)).toThrow("plain decoding cannot take NaN ms");
    const chooser = new ShapeChooser(MENU, () => 1);
    expect(() => chooser.learn({ totalToken: 9, depth: 1, topK: 8 }, [0], 1)).toThrow(
      "the tree 9/1/8 is not of the menu",
    );
    const plain = new ShapeChooser([], () => 1);
    plain.learn(undefined, [0], 1);
    expect(plain.choose()).toBeUndefined();
  });
});

test("the menus hold the paper's tree, at most 64 nodes, and no more nodes than levels give", () => {
  expect(MENU).toContainEqual({ totalToken: 30, depth: 3, topK: 8 });
  expect(MENU.length).toBeLessThanOrEqual(8);
  for (const { totalToken, depth, topK } of ALL)
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
