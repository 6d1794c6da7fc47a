/** Who shares a cycle and whose blocks are whose on CUDA, without a GPU: cycles are made up, memory is the host's. */
import { setImmediate } from "node:timers/promises";
import { expect, test } from "vitest";
import { dividesWell } from "../gpu-worker/cuda/attention.ts";
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
      if (this.fail) throw this.fail;
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
  await expect(Promise.all([asking("b", two), asking("c", two)])).rejects.toThrow("no memory");
  runner.fail = undefined;
  await asking("a", one);
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

test("random schedules in a pool that is too small end, with every text as it is alone", async () => {
  const uniform = uniforms(3);
  const below = (n: number) => Math.floor(uniform() * n);
  let [cycles, shared] = [0, 0];
  const batch: Batch<Made> = new Batch<Made>({
    start(sequences) {
      cycles++;
      shared = Math.max(shared, sequences.length);
      return { wait: () => 1, tree: (i) => sequences[i].drafted(below(3)) };
    },
  });
  const pool = new KvPool(64 * 14, 16);
  const target: TargetModel<Made> = {
    pool,
    begin: ({ expanded }) => new Made(expanded.tokens, batch, () => cycles),
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
  for (let schedule = 0; schedule < 20; schedule++) {
    const lengths = Array.from({ length: 2 + below(14) }, () => 1 + below(200));
    await Promise.all(lengths.map((length) => answer(below(97), length, below(4) ? length : below(length))));
    expect([pool.used, batch.decoding]).toEqual([0, 0]);
  }
  expect(shared).toBeGreaterThan(3);
  expect(pool.preemptions).toBeGreaterThan(10);
});

test("blocks are one slot's at a time; what was released is the next one's; there are no more than there are", () => {
  const sent: number[][] = [];
  const pinned = (bytes: number) => ({ pointer: 0n, buffer: new ArrayBuffer(bytes) });
  const upload = (to: bigint, _from: bigint, bytes: number) => sent.push([Number(to) / 4, bytes / 4]);
  const tensor = () => ({ pointer: 0n, [Symbol.dispose]() {} });
  const blocks = new Blocks({ cuda: { pinned, upload }, tensor } as unknown as Runtime, 3, 300);
  blocks.fill(7);
  expect([blocks.width, blocks.free]).toEqual([5, 7]);
  sent.length = 0;
  blocks.reserve(0, 65);
  blocks.reserve(1, 200);
  blocks.reserve(0, 128); // has them
  expect(sent).toEqual([[0, 2], [5, 4]]); // biome-ignore format: places in the tables, and how many
  const rows = [0, 64, 127].map((row) => blocks.row(0, row)).concat([0, 64, 128, 192].map((row) => blocks.row(1, row)));
  expect(rows.map((row) => row % 64)).toEqual([0, 0, 63, 0, 0, 0, 0]);
  const held = new Set(rows.map((row) => Math.floor(row / 64)));
  expect([held.size, held.has(0), Math.max(...held) <= 7, blocks.free]).toEqual([6, false, true, 1]);
  expect(() => blocks.reserve(2, 65)).toThrow("65 rows need 2 more blocks of KV cache; 1 are free");
  expect(blocks.free).toBe(1);
  for (const slot of [0, 1]) blocks.release(slot);
  blocks.reserve(2, 1000); // a table has no more places than the context
  expect(blocks.free).toBe(2);
  blocks.release(2);
  expect(blocks.free).toBe(7);
});

test("nodes are divided only where the GPU takes no more turns for it", () => {
  const qwen = { dtype: "bf16", heads: 28, kvHeads: 4, headSize: 128 } as const;
  const llava = { dtype: "f16", heads: 32, kvHeads: 32, headSize: 128 } as const;
  expect([2, 8, 16].map((n) => dividesWell(qwen, 30, n, 132))).toEqual([true, true, true]);
  // 30 rows are one tile of 32 for each head; more of them would be two for many.
  expect([2, 8, 16].map((n) => dividesWell(llava, 30, n, 132))).toEqual([false, false, false]);
  expect(dividesWell(llava, 4, 8, 132)).toBe(true);
});
