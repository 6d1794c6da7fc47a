/**
 * ViSpec's tree as kernels (tree.cu): their grids, and the memory of a cycle of one shape. The only place that knows how
 * that memory is laid out. Knows no graph, no session and no model.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { TreeShape } from "../decode/drafters/plan.ts";
import type { Fresh } from "../decode/target.ts";
import type { Tree } from "../decode/tree.ts";
import type { Cuda, Kernel, Pinned } from "./driver.ts";

// The bounds of tree.cu.
const THREADS = 256;
const HELD = 32;
const MAX_SLICES = 32;
const MAX_TOP_K = 10;
const MAX_NODES = 128;
const MAX_FRESH = 16;
/** Bytes of its struct Seen. */
const SEEN_BYTES = 1296 * 16 + 16 * 4 + MAX_NODES * 16;
/** Its struct Cycle, in 32-bit words. The counts are its first six. */
const CYCLE = { nodes: 8, control: 24, last: 28, words: 32 };

/** What a cycle begins with; lengths and rows are counted before it. */
export interface CycleStart {
  /** Rows of the target's cache, and the nodes of the last tree to keep there, rising: all rows that are fresh. */
  target: { length: number; nodes: readonly number[] };
  /** Rows of the draft's cache, and the position where its rows go on. */
  draft: { length: number; position: number };
  /** The draft's fresh rows: rows of the target's hidden states, and the token after each; the last one is the root. */
  fresh: Fresh;
}

/** Addresses of what a pass reads: ids [n] i64, positions [n], masks [n,4], control [4] i32. */
export interface PassInputs {
  ids: bigint;
  positions: bigint;
  masks: bigint;
  control: bigint;
}

/** Addresses of a draft pass; hiddenRows [n] i64. */
export interface DraftInputs extends PassInputs {
  hiddenRows: bigint;
}

/** Nodes that a cycle sees: top_k under the root, then top_k under each of top_k beams a level. */
function seenOf({ depth, topK }: TreeShape): number {
  return topK + depth * topK * topK;
}

function checkShape({ totalToken, depth, topK }: TreeShape): void {
  const within = (n: number, from: number, to: number) => Number.isInteger(n) && n >= from && n <= to;
  const fits = within(topK, 1, MAX_TOP_K) && within(depth, 0, MAX_FRESH - 2) && within(totalToken, 1, MAX_NODES);
  if (fits && topK * depth <= MAX_NODES) return;
  throw new Error(
    `no tree on the device of total_token ${totalToken}, depth ${depth}, top_k ${topK}: at most ${MAX_NODES}, ` +
      `${MAX_FRESH - 2} and ${MAX_TOP_K}, and depth times top_k at most ${MAX_NODES}`,
  );
}

/** Offsets of arrays one after the other from `start` on, each on a boundary of 16 bytes; `end` is the next one's. */
function layout<Name extends string>(start: number, sizes: Record<Name, number>) {
  const at = {} as Record<Name, number>;
  let end = start;
  for (const name of Object.keys(sizes) as Name[]) {
    at[name] = end;
    end += Math.ceil(sizes[name] / 16) * 16;
  }
  return { at, end };
}

/** Where everything of a shape lies: what the host writes, what it reads, what only the device sees. */
function memoryOf({ totalToken: n, topK: k }: TreeShape, rows: number) {
  const ints = (count: number) => count * 4;
  const pass = (count: number) => ({ ids: count * 8, positions: ints(count), masks: ints(count * 4) });
  const input = layout(0, { cycle: ints(CYCLE.words), ...pass(rows), hiddenRows: rows * 8 });
  const results = layout(input.end, {
    tokens: ints(n),
    parents: ints(n),
    depths: ints(n),
    scores: n * 4,
    best: ints(n),
  });
  const level = layout(results.end, { ...pass(k), hiddenRows: k * 8, control: ints(4) });
  const verify = layout(level.end, { ...pass(n), control: ints(4) });
  const lists = Math.max(k * k, n) * MAX_SLICES;
  const sums = Math.max(k, n) * MAX_SLICES * 4;
  const work = layout(verify.end, { seen: SEEN_BYTES, keys: ints(lists), indices: ints(lists), sums });
  return { input, results, level, verify, work };
}

function addresses<Name extends string>(base: bigint, at: Record<Name, number>): Record<Name, bigint> {
  const entries = Object.entries<number>(at).map(([name, offset]) => [name, base + BigInt(offset)]);
  return Object.fromEntries(entries) as Record<Name, bigint>;
}

/** The memory of cycles of one shape, on the host and on the device. Every address stays, so a graph can hold it. */
export class CycleBlock implements Disposable {
  readonly shape: TreeShape;
  /** Rows of the draft's first pass: the fresh ones, then padding. */
  readonly freshRows: number;
  /** The draft's first pass; `last` [1] i64: the row whose candidates it should give. */
  readonly fresh: DraftInputs & { last: bigint };
  /** A pass over topK rows. */
  readonly level: DraftInputs;
  /** The target's pass over totalToken rows. */
  readonly verify: PassInputs;
  /** For the kernels only: the cycle's counts, the nodes seen, lists of candidates. */
  readonly work: Record<"cycle" | "seen" | "keys" | "indices" | "sums", bigint>;
  readonly results: Record<"tokens" | "parents" | "depths" | "scores" | "best", bigint>;
  readonly #cuda: Cuda;
  readonly #memory: ReturnType<typeof memoryOf>;
  readonly #base: bigint;
  readonly #input: Pinned;
  readonly #output: Pinned;

  /** `freshRows`: as many as a deeper shape's cycle may leave, where shapes alternate; 16 at most. */
  constructor(cuda: Cuda, shape: TreeShape, freshRows: number) {
    checkShape(shape);
    if (freshRows < 1 || freshRows > MAX_FRESH) throw new Error(`${freshRows} fresh rows: at most ${MAX_FRESH} fit`);
    this.#cuda = cuda;
    this.shape = shape;
    this.freshRows = freshRows;
    this.#memory = memoryOf(shape, this.freshRows);
    const { input, results, level, verify, work } = this.#memory;
    this.#base = cuda.alloc(work.end);
    const { cycle, ...fresh } = addresses(this.#base, input.at);
    const word = (n: number) => cycle + BigInt(n * 4);
    this.fresh = { ...fresh, control: word(CYCLE.control), last: word(CYCLE.last) };
    this.level = addresses(this.#base, level.at);
    this.verify = addresses(this.#base, verify.at);
    this.work = { cycle, ...addresses(this.#base, work.at) };
    this.results = addresses(this.#base, results.at);
    this.#input = cuda.pinned(input.end);
    this.#output = cuda.pinned(results.end - input.end);
  }

  /** Writes what the next cycle begins with into host memory; throws when its rows do not fit. */
  begin({ target, draft, fresh }: CycleStart): void {
    const n = fresh.rows.length;
    const count = target.nodes.length;
    const rows = this.freshRows;
    if (n < 1 || n > rows || n !== fresh.next.length || count > MAX_FRESH)
      throw new Error(`a cycle of ${n} fresh rows, ${fresh.next.length} tokens and ${count} moved; ${rows} rows fit`);
    const { buffer } = this.#input;
    const { at } = this.#memory.input;
    const cycle = new Int32Array(buffer, at.cycle, CYCLE.words).fill(0);
    cycle.set([target.length, count, target.length + count, draft.length + n, draft.position + n, fresh.next[n - 1]]);
    cycle.set(target.nodes, CYCLE.nodes);
    cycle.set([draft.length, 0, 1, 0], CYCLE.control);
    cycle[CYCLE.last] = n - 1;
    const ids = new BigInt64Array(buffer, at.ids, rows);
    const hiddenRows = new BigInt64Array(buffer, at.hiddenRows, rows);
    const positions = new Int32Array(buffer, at.positions, rows);
    const masks = new Int32Array(buffer, at.masks, rows * 4).fill(0);
    for (let i = 0; i < rows; i++) {
      const real = i < n;
      ids[i] = real ? BigInt(fresh.next[i]) : 0n;
      hiddenRows[i] = real ? BigInt(fresh.rows[i]) : 0n;
      positions[i] = draft.position + (real ? i : 0);
      // At most 16 rows, so the first word holds every bit: a row sees those before it, padding only itself.
      masks[i * 4] = real ? 2 ** (i + 1) - 1 : 2 ** i;
    }
  }

  /** Enqueues the copy of what `begin` wrote. */
  upload(): void {
    this.#cuda.upload(this.#base, this.#input, this.#memory.input.end);
  }

  /** Enqueues the copy of the results, for `tree` and `best`. */
  download(): void {
    const { input, results } = this.#memory;
    this.#cuda.download(this.#output, this.#base + BigInt(input.end), results.end - input.end);
  }

  /** The tree of the last cycle that was downloaded, without padding. */
  tree(): Tree {
    const n = Math.min(this.shape.totalToken, 1 + seenOf(this.shape));
    const ints = (name: "tokens" | "parents" | "depths") => [...this.#result(Int32Array, name).subarray(0, n)];
    const scores = [...this.#result(Float32Array, "scores").subarray(0, n)];
    return { tokens: ints("tokens"), parents: ints("parents"), depths: ints("depths"), scores };
  }

  /** [totalToken]: the target's likeliest token after each node; valid until the next download. */
  best(): Int32Array {
    return this.#result(Int32Array, "best");
  }

  #result<View>(
    view: new (buffer: ArrayBuffer, at: number, n: number) => View,
    name: keyof CycleBlock["results"],
  ): View {
    const { input, results } = this.#memory;
    return new view(this.#output.buffer, results.at[name] - input.end, this.shape.totalToken);
  }

  [Symbol.dispose](): void {
    this.#cuda.free(this.#base);
    this.#cuda.freePinned(this.#input);
    this.#cuda.freePinned(this.#output);
  }
}

/** The caches of a decoder: `pointers`, the address of an array on the device, names `count` of [heads,capacity,rowBytes]. */
export interface Caches {
  pointers: bigint;
  count: number;
  heads: number;
  capacity: number;
  /** Of one row of one head: a multiple of 16. */
  rowBytes: number;
}

/** Slices of a row of logits: enough blocks to fill the device with few rows, few lists to merge with many. */
function slicesOf(rows: number, vocabulary: number, per: number): { slices: number; slice: number } {
  const slices = Math.min(MAX_SLICES, Math.ceil(vocabulary / (rows > MAX_FRESH ? THREADS * HELD : 2048)));
  return { slices, slice: Math.ceil(vocabulary / slices / per) * per };
}

/** Kernels for logits of one type; every method enqueues only, so it can be captured. */
export class TreeKernels {
  readonly #kernels: Record<"candidates" | "grow" | "finish" | "argmax" | "moveRows", Kernel>;
  /** Elements of 16 bytes. */
  readonly #per: number;

  constructor(cuda: Cuda, dtype: "f16" | "bf16" | "f32") {
    const source = readFileSync(join(import.meta.dirname, "tree.cu"), "utf8");
    const module = cuda.compile(source, { [dtype.toUpperCase()]: 1 }, "tree.cu");
    this.#kernels = {
      candidates: module.kernel("candidates"),
      grow: module.kernel("grow"),
      finish: module.kernel("finish"),
      argmax: module.kernel("argmax"),
      moveRows: module.kernel("moveRows"),
    };
    this.#per = dtype === "f32" ? 4 : 8;
  }

  /** Moves the target's rows that the last cycle kept together. */
  moveRows(block: CycleBlock, { pointers, count, heads, capacity, rowBytes }: Caches): void {
    if (rowBytes % 16) throw new Error(`rows of ${rowBytes} bytes: they are moved by 16`);
    const columns = rowBytes / 16;
    const grid = [Math.ceil((heads * columns) / 128), count, 1] as const;
    this.#kernels.moveRows.launch(grid, 128, 0, pointers, block.work.cycle, heads, columns, capacity);
  }

  /**
   * Grows the tree by the candidates of a draft pass, `logits` [rows,vocabulary]: level 0 is the first pass, with one row
   * for its last fresh one, the others have topK. `map` [vocabulary] i32, tokens of a cut vocabulary, 0n for none. Unless
   * it is level `depth`, the next one's pass is in `block.level` then.
   */
  grow(block: CycleBlock, level: number, logits: bigint, vocabulary: number, map = 0n): void {
    const { topK: k, depth } = block.shape;
    const { cycle, seen, keys, indices, sums } = block.work;
    const { ids, hiddenRows, positions, masks, control } = block.level;
    const slices = this.#candidates(block, logits, level === 0 ? 1 : k, vocabulary, k);
    const pointers = [cycle, keys, indices, sums, map, seen, ids, hiddenRows, positions, masks, control];
    const last = level === depth ? 1 : 0;
    this.#kernels.grow.launch([1, 1, 1], 32 * (MAX_TOP_K + 1), 0, ...pointers, slices, k, level, last);
  }

  /** Picks the tree of the nodes that were seen, and writes the target's pass and the results. */
  finish(block: CycleBlock): void {
    const { ids, positions, masks, control } = block.verify;
    const { tokens, parents, depths, scores } = block.results;
    const { cycle, seen } = block.work;
    const pointers = [cycle, seen, ids, positions, masks, control, tokens, parents, depths, scores];
    this.#kernels.finish.launch([1, 1, 1], 1024, 0, ...pointers, block.shape.totalToken, seenOf(block.shape));
  }

  /** The likeliest token of each row of the target's logits [totalToken,vocabulary], the lower one on ties. */
  argmax(block: CycleBlock, logits: bigint, vocabulary: number): void {
    const rows = block.shape.totalToken;
    const slices = this.#candidates(block, logits, rows, vocabulary, 1);
    const { keys, indices } = block.work;
    this.#kernels.argmax.launch([rows, 1, 1], 32, 0, keys, indices, block.results.best, slices);
  }

  #candidates({ work }: CycleBlock, logits: bigint, rows: number, vocabulary: number, k: number): number {
    if (vocabulary < k || vocabulary > THREADS * HELD * MAX_SLICES)
      throw new Error(
        `a vocabulary of ${vocabulary}: candidates are taken from ${k} to ${THREADS * HELD * MAX_SLICES}`,
      );
    const { slices, slice } = slicesOf(rows, vocabulary, this.#per);
    const { keys, indices, sums } = work;
    this.#kernels.candidates.launch([slices, rows, 1], THREADS, 0, logits, keys, indices, sums, vocabulary, slice, k);
    return slices;
  }
}
