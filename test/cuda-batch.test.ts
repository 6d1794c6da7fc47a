/** Who shares a cycle and whose blocks are whose on CUDA, without a GPU: cycles are made up, memory is the host's. */
import { setImmediate } from "node:timers/promises";
import { expect, test } from "vitest";
import { dividesWell, treeGrid } from "../gpu-worker/cuda/attention.ts";
import { decode } from "../gpu-worker/decode/decode.ts";
import type { TreeShape } from "../gpu-worker/decode/drafters/plan.ts";
import { KvPool } from "../gpu-worker/decode/pool.ts";
import { Sampler, uniforms } from "../gpu-worker/decode/sample.ts";
import type { Sequence, TargetModel } from "../gpu-worker/decode/target.ts";
import type { Tree } from "../gpu-worker/decode/tree.ts";
import { Batch, type Chooser, type Runner } from "../gpu-worker/engine/cuda/batch.ts";
import { cudaDrafter } from "../gpu-worker/engine/cuda/drafter.ts";
import { Blocks } from "../gpu-worker/engine/cuda/memory.ts";
import type { CudaSequence } from "../gpu-worker/engine/cuda/sequence.ts";
import type { Runtime } from "../gpu-worker/engine/runtime.ts";
import type { Prompt } from "../gpu-worker/engine/target.ts";
import { plainSampling } from "./support/goldens.ts";

const SHAPE: TreeShape = { totalToken: 4, depth: 2, topK: 1 };
const ROOT: Tree = { tokens: [0], parents: [-1], depths: [0], scores: [0] };

/** Notes who is in each cycle, and gives trees of a root. */
function noting<S>(): Runner<S> & { cycles: S[][]; fail?: Error } {
  const cycles: S[][] = [];
  return {
    cycles,
    start(sequences) {
      if (this.fail && sequences.includes("b" as S)) throw this.fail;
      cycles.push([...sequences]);
      return { wait: () => 5, tree: () => ROOT };
    },
  };
}

function learning() {
  const learnt: unknown[] = [];
  const chooser: Chooser = { choose: () => SHAPE, learn: (...what) => learnt.push(what) };
  return { chooser, learnt };
}

test("those who are ready share a cycle; the next one waits until all logits were read", async () => {
  const runner = noting<string>();
  const batch = new Batch(runner);
  const { chooser, learnt } = learning();
  await batch.ask("a", chooser, undefined);
  void batch.ask("a", chooser, 2); // at once, since nobody else decodes
  const late = batch.ask("b", chooser, undefined);
  for (let i = 0; i < 5; i++) await setImmediate();
  expect(runner.cycles).toEqual([["a"], ["a"]]);
  batch.release("a");
  await late;
  expect(runner.cycles.slice(2)).toEqual([["b"]]);
  await Promise.all([batch.ask("a", chooser, 1), batch.ask("b", chooser, 0)]);
  expect(runner.cycles.slice(3)).toEqual([["a", "b"]]);
  // Of the cycle that "b" was alone in: "a" tells of an earlier one.
  expect(learnt).toEqual([[SHAPE, [2], 5, 1], [SHAPE, [0], 5, 1]]); // biome-ignore format: one line
  expect(batch.decoding).toBe(2);
});

test("one that leaves while its cycle runs gets nothing, and holds nobody up", async () => {
  const runner = noting<string>();
  const batch = new Batch(runner);
  const { chooser } = learning();
  let given = false;
  void batch.ask("a", chooser, undefined).then(() => {
    given = true;
  });
  batch.leave("a");
  await batch.ask("b", chooser, undefined);
  expect([given, runner.cycles, batch.decoding]).toEqual([false, [["a"], ["b"]], 1]);
});

test("sequences of another chooser have cycles of their own, and an error is of those who are in the cycle", async () => {
  const runner = noting<string>();
  const batch = new Batch(runner);
  const [one, two] = [learning().chooser, learning().chooser];
  const asking = (name: string, chooser: Chooser) =>
    batch.ask(name, chooser, undefined).then(() => batch.release(name)); // biome-ignore format: one line
  await Promise.all([asking("a", one), asking("b", two), asking("c", two)]);
  expect(runner.cycles).toEqual([["a"], ["b", "c"]]);
  runner.fail = new Error("no memory");
  const all = await Promise.allSettled([asking("b", two), asking("c", two), asking("a", one)]);
  expect(all.map(({ status }) => status)).toEqual(["rejected", "rejected", "fulfilled"]);
  expect(runner.cycles.at(-1)).toEqual(["a"]);
});

/** The text's next token: any function of those before. */
const after = (tokens: readonly number[]) => tokens.reduce((a, token) => (31 * a + token + 7) % 9973, 1) % 97;

/** A sequence of the made-up model, whose logits are gone when another cycle has begun. */
class Made implements Sequence {
  readonly tokens: number[];
  readonly #prompt: number;
  readonly #batch: Batch<Made>;
  readonly #cycles: () => number;
  #verified = 0;

  constructor(tokens: readonly number[], batch: Batch<Made>, cycles: () => number) {
    this.tokens = [...tokens];
    this.#prompt = tokens.length;
    this.#batch = batch;
    this.#cycles = cycles;
  }
  get length() {
    return this.tokens.length;
  }
  get firstLogits() {
    return Float32Array.from({ length: 97 }, (_, i) => (i === after(this.tokens) ? 1 : 0));
  }
  /** A chain of two drafts, of which the first `right` are what follows. */
  drafted(right: number): Tree {
    this.#verified = this.#cycles();
    const text = [...this.tokens];
    for (let i = 0; i < 2; i++) text.push(i < right ? after(text) : 98);
    return { tokens: text.slice(-3), parents: [-1, 0, 1], depths: [0, 1, 2], scores: [0, -1, -2] };
  }
  scores(tree: Tree) {
    const best = (node: number) => {
      expect(this.#cycles()).toBe(this.#verified);
      return after([...this.tokens, ...tree.tokens.slice(1, node + 1)]);
    };
    return { best, row: () => new Float32Array() };
  }
  commit({ nodes, tokens }: { nodes: number[]; tokens: number[] }) {
    this.tokens.push(...tokens);
    return { rows: nodes, next: tokens };
  }
  release() {
    this.#batch.release(this);
  }
  rewind() {
    this.#batch.leave(this);
    this.tokens.length = this.#prompt;
  }
  [Symbol.dispose]() {
    this.#batch.leave(this);
  }
}

/** Answers of the made-up model, in a pool of so many blocks; what they did so far. */
function made(blocks: number) {
  const uniform = uniforms(3);
  const below = (n: number) => Math.floor(uniform() * n);
  const seen = { cycles: 0, most: 0, missed: 0 };
  const batch: Batch<Made> = new Batch<Made>({
    start(sequences) {
      seen.cycles++;
      seen.most = Math.max(seen.most, sequences.length);
      if (sequences.length < batch.decoding) seen.missed++;
      return { wait: () => 1, tree: (i) => sequences[i].drafted(below(3)) };
    },
  });
  const pool = new KvPool(64 * blocks, 16);
  const target: TargetModel<Made> = {
    pool,
    begin: ({ expanded }) => new Made(expanded.tokens, batch, () => seen.cycles),
    *passes() {
      yield;
    },
    [Symbol.dispose]() {},
  };
  const drafter = cudaDrafter(batch as unknown as Batch<CudaSequence>, learning().chooser) as never;
  const answer = async (first: number, length: number, cancelAfter: number) => {
    for (let i = below(60); i > 0; i--) await setImmediate();
    const tokens = Array.from({ length: 1 + below(120) }, (_, i) => (first + i) % 97);
    const prompt = { expanded: { tokens, positions: [], images: [], delta: 0 }, imageRows: [] } as Prompt;
    const samplers = [new Sampler({ ...plainSampling, temperature: 0 })];
    const options = { samplers, maxTokens: length, stopTokens: new Set<number>() };
    const controller = new AbortController();
    const given: number[] = [];
    try {
      for await (const choice of decode(target, drafter, prompt, { ...options, signal: controller.signal }))
        for await (const cycle of choice) {
          given.push(...cycle.tokens);
          if (given.length > cancelAfter) controller.abort(new Error("cancelled"));
        }
    } catch (error) {
      expect((error as Error).message).toBe("cancelled");
    }
    const wanted = [...tokens];
    while (wanted.length < tokens.length + given.length) wanted.push(after(wanted));
    expect(given).toEqual(wanted.slice(tokens.length));
    expect(given.length).toBeGreaterThanOrEqual(Math.min(length, cancelAfter));
  };
  return { answer, below, pool, batch, seen };
}

test("random schedules in a pool that is too small end, with every text as it is alone", async () => {
  const { answer, below, pool, batch, seen } = made(14);
  for (let schedule = 0; schedule < 20; schedule++) {
    const lengths = Array.from({ length: 2 + below(14) }, () => 1 + below(200));
    await Promise.all(lengths.map((length) => answer(below(97), length, below(4) ? length : below(length))));
    expect([pool.used, batch.decoding]).toEqual([0, 0]);
  }
  expect(seen.most).toBeGreaterThan(3);
  expect(pool.preemptions).toBeGreaterThan(10);
});

test("where there is room for all, hardly a cycle goes without one that decodes", async () => {
  const { answer, seen } = made(1000);
  await Promise.all(Array.from({ length: 16 }, (_, i) => answer(i, 1500, 1500)));
  expect(seen.cycles).toBeGreaterThan(500);
  // When they begin, one after the other.
  expect(seen.missed).toBeLessThan(20);
});

test("blocks are one slot's at a time; what was released is the next one's; there are no more than there are", () => {
  const [device, host] = [new Int32Array(15).fill(-1), new ArrayBuffer(15 * 4)];
  let sent = 0;
  const cuda = {
    pinned: () => ({ pointer: 1000n, buffer: host }),
    upload(to: bigint, from: bigint, bytes: number) {
      sent += bytes / 4;
      device.set(new Int32Array(host, Number(from) - 1000, bytes / 4), Number(to) / 4);
    },
    mark: () => ({ record() {}, wait() {}, [Symbol.dispose]() {} }),
  };
  const tensor = () => ({ pointer: 0n, [Symbol.dispose]() {} });
  const blocks = new Blocks({ cuda, tensor } as unknown as Runtime, 3, 300);
  const table = (slot: number) => [...device.subarray(5 * slot, 5 * slot + 5)];
  blocks.fill(7);
  expect([blocks.width, blocks.free, [...device]]).toEqual([5, 7, new Array(15).fill(0)]);
  sent = 0;
  blocks.reserve(0, 65);
  blocks.reserve(1, 200);
  blocks.reserve(0, 128); // has them
  expect([sent, blocks.free]).toEqual([2 + 4, 1]);
  const held = [...table(0).slice(0, 2), ...table(1).slice(0, 4)];
  expect([new Set(held).size, Math.min(...held), Math.max(...held) <= 7]).toEqual([6, expect.any(Number), true]);
  expect(held).not.toContain(0);
  expect([table(0).slice(2), table(1).slice(4), table(2)]).toEqual([[0, 0, 0], [0], [0, 0, 0, 0, 0]]);
  expect([0, 63, 64, 127].map((row) => blocks.row(0, row))).toEqual(
    [0, 63, 64, 127].map((row) => table(0)[row >> 6] * 64 + (row % 64)),
  );
  expect(() => blocks.reserve(2, 65)).toThrow("65 rows need 2 more blocks of KV cache; 1 are free");
  expect(blocks.free).toBe(1);
  blocks.release(1);
  expect(table(1)).toEqual([0, 0, 0, 0, 0]);
  blocks.reserve(2, 1000); // a table has no more places than the context
  expect(blocks.free).toBe(0);
  expect(new Set([...table(0).slice(0, 2), ...table(2)]).size).toBe(7);
  blocks.release(0);
  blocks.reserve(1, 128);
  expect(new Set([...table(1).slice(0, 2), ...table(2)]).size).toBe(7);
});

const qwen = { dtype: "bf16", heads: 28, kvHeads: 4, headSize: 128 } as const;
const llava = { dtype: "f16", heads: 32, kvHeads: 32, headSize: 128 } as const;
// Clusters find no place on some multiprocessors.
const placed = ({ splits, resident }: { splits: number; resident: number }) =>
  Math.floor((132 * resident * (splits > 2 ? 0.85 : 1)) / splits);
const gpu = { multiprocessors: 132, clusters: placed };

test("attention's grid is that of the blocks that are through first, all at once where columns are split", () => {
  const kernels = (shape: typeof qwen | typeof llava) => [1, 8, 32, 64].map((n) => treeGrid(shape, n, 1, gpu).kernel);
  expect(kernels(qwen)).toEqual(["tree1x8", "tree2x8", "tree4x6", "tree4x4"]);
  expect(kernels(llava)).toEqual(["tree1x6", "tree1x6", "tree2x3", "tree4x3"]);
  for (const shape of [qwen, llava])
    for (let each = 1; each <= 128; each++)
      for (const sequences of [1, 2, 5, 16]) {
        const grid = treeGrid(shape, each, sequences, gpu);
        expect(grid.tiles * grid.height).toBeGreaterThanOrEqual((each * shape.heads) / shape.kvHeads);
        const clusters = grid.tiles * shape.kvHeads * sequences;
        if (sequences > 1 && grid.splits > 1) expect(clusters).toBeLessThanOrEqual(placed(grid));
      }
});

test("nodes are divided only where the GPU takes no more turns for it", () => {
  expect([2, 8, 16].map((n) => dividesWell(qwen, 30, n, gpu))).toEqual([true, true, true]);
  // 30 rows are one tile of 32 for each head; more of them would be two for many.
  expect([2, 8, 16].map((n) => dividesWell(llava, 30, n, gpu))).toEqual([false, false, false]);
  expect(dividesWell(llava, 4, 8, gpu)).toBe(true);
});
