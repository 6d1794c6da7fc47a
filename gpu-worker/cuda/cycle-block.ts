/**
 * The memory of a cycle of one shape and of several sequences, for the kernels of tree.cu: the only place that knows how it
 * is laid out. Knows no graph, no session and no model.
 */
import type { TreeShape } from "../decode/drafters/plan.ts";
import type { Fresh } from "../decode/target.ts";
import type { Tree } from "../decode/tree.ts";
import { mostNodes } from "./attention.ts";
import type { Cuda, Pinned } from "./driver.ts";
import { MAX_KEPT } from "./moves.ts";

// The bounds of tree.cu.
export const MAX_SLICES = 32;
export const MAX_TOP_K = 10;
const MAX_NODES = 128;
/** Bytes of its struct Seen. */
const SEEN_BYTES = 1296 * 16 + 16 * 4 + MAX_NODES * 16;
/** Its struct Cycle, in 32-bit words. */
const CYCLE_WORDS = 8;

/** Most fresh rows: as many as a cycle keeps. */
const MAX_FRESH = MAX_KEPT;
/** Sequences whose lists of nodes have room in shared memory. */
const MOST_DIVIDING = 32;

/** What a sequence's cycle begins with. */
export interface CycleStart {
  slot: number;
  /** Rows of the target's cache. */
  length: number;
  /** Rows of the draft's cache, and the position where its rows go on; both without the fresh ones. */
  draft: { length: number; position: number };
  /** The draft's fresh rows: absolute rows of hidden states, and the token after each; the last one is the root. */
  fresh: Fresh;
}

/**
 * Addresses of what a pass reads of its n rows: ids [n] i64, positions [n], masks [n,4] i32; and of each sequence: control
 * [sequences,4] i32, where all have equally many.
 */
export interface PassInputs {
  ids: bigint;
  positions: bigint;
  masks: bigint;
  control: bigint;
  /** Sequences have unequal numbers of rows: control [sequences,8] says how many (attention.ts). */
  divided?: boolean;
}

/** Addresses of a draft pass; hiddenRows [n] i64. */
export interface DraftInputs extends PassInputs {
  hiddenRows: bigint;
}

/** Whether sequences can divide nodes: not where there is nothing to choose from. */
export const canDivide = (shape: TreeShape, sequences: number) =>
  sequences > 1 && sequences <= MOST_DIVIDING && shape.totalToken > 1 && seenOf(shape) >= shape.totalToken;

/** How many of a sequence's nodes its tree may be of, the root aside. */
export const listOf = (shape: TreeShape, divided: boolean) =>
  Math.min((divided ? mostNodes(shape.totalToken) : shape.totalToken) - 1, seenOf(shape));

/** Nodes that a cycle sees: top_k under the root, then top_k under each of top_k beams a level. */
export function seenOf({ depth, topK }: TreeShape): number {
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
function memoryOf(shape: TreeShape, freshRows: number, sequences: number, divided: boolean) {
  const { totalToken, topK } = shape;
  const [n, k, rows] = [totalToken * sequences, topK * sequences, freshRows * sequences];
  const ints = (count: number) => count * 4;
  const longs = (count: number) => count * 8;
  const control = ints(4 * sequences);
  const pass = (count: number) => ({ ids: longs(count), positions: ints(count), masks: ints(count * 4) });
  const input = layout(0, {
    cycles: ints(CYCLE_WORDS * sequences),
    slots: ints(sequences),
    control,
    last: longs(sequences),
    ...pass(rows),
    hiddenRows: longs(rows),
  });
  const results = layout(input.end, {
    tokens: ints(n),
    parents: ints(n),
    depths: ints(n),
    scores: n * 4,
    best: ints(n),
    spans: ints(2 * sequences),
  });
  const level = layout(results.end, { ...pass(k), hiddenRows: longs(k), control });
  const verify = layout(level.end, { ...pass(n), control: (divided ? 2 : 1) * control });
  const lists = Math.max(k * topK, n) * MAX_SLICES;
  const sums = Math.max(k, n) * MAX_SLICES * 4;
  const listed = sequences * listOf(shape, divided);
  const work = layout(verify.end, {
    ...{ seen: SEEN_BYTES * sequences, keys: ints(lists), indices: ints(lists), sums },
    ...{ ranked: longs(listed), rankedNodes: ints(listed) },
  });
  return { input, results, level, verify, work };
}

function addresses<Name extends string>(base: bigint, at: Record<Name, number>): Record<Name, bigint> {
  const entries = Object.entries<number>(at).map(([name, offset]) => [name, base + BigInt(offset)]);
  return Object.fromEntries(entries) as Record<Name, bigint>;
}

/**
 * The memory of cycles of one shape and so many sequences, on the host and on the device. Every address stays, so a
 * graph can hold it. Arrays are contiguous over the sequences.
 */
export class CycleBlock implements Disposable {
  readonly shape: TreeShape;
  /** Rows of a sequence in the draft's first pass: the fresh ones, then padding. */
  readonly freshRows: number;
  readonly sequences: number;
  /** [sequences] i32: the slot of each. */
  readonly slots: bigint;
  /** The draft's first pass; `last` [sequences] i64: the rows of the pass whose candidates it should give. */
  readonly fresh: DraftInputs & { last: bigint };
  /** A pass over topK rows of each sequence. */
  readonly level: DraftInputs;
  /** The target's pass over totalToken rows of each sequence, or as many on average. */
  readonly verify: PassInputs & { divided: boolean };
  /** For the kernels only: what the host says of each cycle, the nodes seen, lists of candidates. */
  readonly work: Record<"cycles" | "seen" | "keys" | "indices" | "sums" | "ranked" | "rankedNodes", bigint>;
  readonly results: Record<"tokens" | "parents" | "depths" | "scores" | "best" | "spans", bigint>;
  readonly #cuda: Cuda;
  readonly #memory: ReturnType<typeof memoryOf>;
  readonly #base: bigint;
  readonly #input: Pinned;
  readonly #output: Pinned;

  /**
   * `freshRows`: as many as a deeper shape's cycle may leave, where shapes alternate; 16 at most. `divided`: sequences
   * share the nodes of a pass, where they can.
   */
  constructor(cuda: Cuda, shape: TreeShape, freshRows: number, sequences: number, divided: boolean) {
    checkShape(shape);
    if (freshRows < 1 || freshRows > MAX_FRESH) throw new Error(`${freshRows} fresh rows: at most ${MAX_FRESH} fit`);
    this.#cuda = cuda;
    this.shape = shape;
    this.freshRows = freshRows;
    this.sequences = sequences;
    this.#memory = memoryOf(shape, freshRows, sequences, divided);
    const { input, results, level, verify, work } = this.#memory;
    this.#base = cuda.alloc(work.end);
    const { cycles, slots, ...fresh } = addresses(this.#base, input.at);
    this.slots = slots;
    this.fresh = fresh;
    this.level = addresses(this.#base, level.at);
    this.verify = { ...addresses(this.#base, verify.at), divided };
    this.work = { cycles, ...addresses(this.#base, work.at) };
    this.results = addresses(this.#base, results.at);
    this.#input = cuda.pinned(input.end);
    this.#output = cuda.pinned(results.end - input.end);
  }

  /** Writes what each sequence's next cycle begins with into host memory; throws when its rows do not fit. */
  begin(starts: readonly CycleStart[]): void {
    if (starts.length !== this.sequences)
      throw new Error(`a pass of ${this.sequences} sequences, not of ${starts.length}`);
    for (const [i, start] of starts.entries()) this.#begin(i, start);
  }

  #begin(sequence: number, { slot, length, draft, fresh }: CycleStart): void {
    const n = fresh.rows.length;
    const rows = this.freshRows;
    if (n < 1 || n > rows || n !== fresh.next.length)
      throw new Error(`a cycle of ${n} fresh rows and ${fresh.next.length} tokens; ${rows} rows fit`);
    const { buffer } = this.#input;
    const { at } = this.#memory.input;
    const ints = (start: number, count: number) => new Int32Array(buffer, start + sequence * count * 4, count);
    const longs = (start: number, count: number) => new BigInt64Array(buffer, start + sequence * count * 8, count);
    const root = fresh.next[n - 1];
    ints(at.cycles, CYCLE_WORDS).set([length, draft.length + n, draft.position + n, root, slot, 0, 0, 0]);
    ints(at.slots, 1)[0] = slot;
    ints(at.control, 4).set([draft.length, 0, 1, slot]);
    longs(at.last, 1)[0] = BigInt(sequence * rows + n - 1);
    const [ids, hiddenRows] = [longs(at.ids, rows), longs(at.hiddenRows, rows)];
    const [positions, masks] = [ints(at.positions, rows), ints(at.masks, rows * 4).fill(0)];
    for (let i = 0; i < rows; i++) {
      const real = i < n;
      ids[i] = real ? BigInt(fresh.next[i]) : 0n;
      // Padding has the states of a row that was written: rubbish might be no number, which masks do not keep out.
      hiddenRows[i] = BigInt(fresh.rows[real ? i : 0]);
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

  /** Sequence i's tree of the last cycle that was downloaded, without padding. */
  tree(i: number): Tree {
    const n = Math.min(this.#span(i).rows, 1 + seenOf(this.shape));
    const ints = (name: "tokens" | "parents" | "depths") => [...this.#result(Int32Array, name, i).subarray(0, n)];
    const scores = [...this.#result(Float32Array, "scores", i).subarray(0, n)];
    return { tokens: ints("tokens"), parents: ints("parents"), depths: ints("depths"), scores };
  }

  /** The target's likeliest token after each of sequence i's nodes; valid until the next download. */
  best(i: number): Int32Array {
    return this.#result(Int32Array, "best", i);
  }

  /** The first of sequence i's rows in the target's pass. */
  firstRow(i: number): number {
    return this.#span(i).first;
  }

  #span(i: number): { first: number; rows: number } {
    const { input, results } = this.#memory;
    const [first, rows] = new Int32Array(this.#output.buffer, results.at.spans - input.end + i * 8, 2);
    return { first, rows };
  }

  #result<View>(
    view: new (buffer: ArrayBuffer, at: number, n: number) => View,
    name: keyof CycleBlock["results"],
    i: number,
  ): View {
    const { input, results } = this.#memory;
    const { first, rows } = this.#span(i);
    return new view(this.#output.buffer, results.at[name] - input.end + first * 4, rows);
  }

  [Symbol.dispose](): void {
    this.#cuda.free(this.#base);
    this.#cuda.freePinned(this.#input);
    this.#cuda.freePinned(this.#output);
  }
}
