/** Attention over a KV cache as kernels (attention*.cu): their grids and the memory that they need between launches. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Cuda } from "./driver.ts";
import type { Kernel, Module } from "./kernel.ts";

// The bounds of attention*.cu.
const TILE = 64;
const MAX_SPLITS = 32;
const MAX_TREE = 128;
const MAX_HEAD = 128;

/** The most nodes of a sequence where several divide the nodes of a pass, `each` on average. */
export const mostNodes = (each: number) => Math.min(MAX_TREE, 2 * each);

/**
 * Blocks by their warps over rows: warps over columns, tiles in shared memory, blocks that a multiprocessor holds, and how long
 * they take for a tile (measured on an H100).
 */
const BLOCKS = {
  1: { across: 4, stages: 3, resident: 2, time: 1 },
  2: { across: 4, stages: 4, resident: 1, time: 1 },
  4: { across: 2, stages: 4, resident: 1, time: 1.35 },
} as const;
const PROMPT = { across: 1, stages: 3 };
/** Blocks of a cluster, where the GPU has clusters (Hopper); 8 is the most that every such GPU can hold. */
const SPLITS = [8, 6, 4, 3, 2] as const;

export interface AttentionShape {
  dtype: "f16" | "bf16" | "f32";
  heads: number;
  kvHeads: number;
  /** A multiple of 16, at most 128. */
  headSize: number;
}

/** Rows of a block of KV cache. */
export const BLOCK_ROWS = TILE;

/** Where a decoder's rows lie: engine/cuda/memory.ts has the blocks. */
export interface Paging {
  /** i32 [slots, width]: the block of each 64 rows of a slot's sequence. */
  tables: bigint;
  width: number;
  /** Elements from one block to the next. */
  blockStride: number;
  /** Elements of cos and of sin from one slot's angles to the next's; 0 where all share them. */
  angleStride: number;
}

/** Addresses in device memory, all of 16-byte alignment; elements are of the shape's dtype unless said otherwise. */
export interface AttentionPass {
  /**
   * [sequences, tokens, (heads + 2 kvHeads) headSize]: queries, keys, values of the tokens; what is added to each row,
   * or 0n.
   */
  qkv: bigint;
  bias: bigint;
  /**
   * [kvHeads, 64, headSize]: the layer's in block 0. Token t is written to row past + first + t of its sequence, which
   * must be below 64 width.
   */
  key: bigint;
  value: bigint;
  /** f32 [rows, headSize / 2], of slot 0; i32 [sequences, tokens]: the row of each token. */
  cos: bigint;
  sin: bigint;
  positions: bigint;
  /** i32 [sequences, tokens, 4]: bit j says that the token sees column past + j. Not read if causal; 0n will do then. */
  mask: bigint;
  /**
   * i32 [sequences, 4]: past, first, causal, slot. More than 128 tokens must be causal, and causal needs first = 0. No
   * two sequences have the same slot. Where tokens are divided unequally i32 [sequences, 8]: behind that the first of a
   * sequence's tokens in the pass, how many, 0, 0.
   */
  control: bigint;
  /** [sequences, tokens, heads headSize]. */
  out: bigint;
}

interface Grid {
  kernel: string;
  /** Blocks that a multiprocessor holds. */
  resident: number;
  /** Tiles of a sequence's rows, a row being a token's head in the group of a KV head; and rows of a tile. */
  tiles: number;
  height: number;
  /** Parts of the columns. */
  splits: number;
  threads: number;
  /** Bytes. */
  shared: number;
}

/** What a GPU holds at once. */
export interface Gpu {
  multiprocessors: number;
  /**
   * Clusters of `splits` blocks, `resident` blocks to a multiprocessor: each must lie in one part of the GPU, so that some
   * places stay empty.
   */
  clusters(grid: { kernel: string; splits: number; resident: number; threads: number; shared: number }): number;
}

/**
 * Of trees of so many tokens on average: as many splits as the GPU holds at once, of the blocks that are through with them
 * first; where several sequences leave no room for two splits, one, in the blocks that the GPU is through with in the fewest
 * turns. Never depends on how many columns there are, which a captured launch can't know.
 */
export function treeGrid(shape: AttentionShape, tokens: number, sequences: number, gpu: Gpu): Grid {
  const { heads, kvHeads, headSize } = shape;
  const rows = (tokens * heads) / kvHeads;
  const heights = rows <= 16 ? ([1] as const) : ([2, 4] as const);
  const grid = (warps: keyof typeof BLOCKS, splits: number): Grid => {
    const { across, stages, resident } = BLOCKS[warps];
    const parts = Math.ceil((16 * warps) / splits) * splits;
    return {
      kernel: `tree${warps}x${splits}`,
      tiles: Math.ceil(rows / (16 * warps)),
      height: 16 * warps,
      resident,
      splits,
      threads: 32 * warps * across,
      shared: stageBytes(headSize) * stages + parts * (Math.ceil(headSize / 32) * 64 + 8),
    };
  };
  /** Turns of the GPU that all blocks take. */
  const turns = (g: Grid) => (g.tiles * kvHeads * sequences) / gpu.clusters(g);
  const fits = heights.flatMap((warps) => {
    const splits = SPLITS.find((n) => turns(grid(warps, n)) <= 1);
    return splits ? [{ warps, splits, time: BLOCKS[warps].time / splits }] : [];
  });
  if (fits.length > 0) {
    const { warps, splits } = fits.reduce((a, b) => (b.time < a.time ? b : a));
    return grid(warps, splits);
  }
  const [low, high = low] = heights;
  if (sequences === 1) return grid(high, SPLITS.at(-1)!);
  const [small, large] = [grid(low, 1), grid(high, 1)];
  return Math.ceil(turns(large)) < Math.ceil(turns(small)) ? large : small;
}

/**
 * Whether sequences may have unequal numbers of tokens, `each` on average, without more turns of the GPU: a sequence's last
 * tile is half full then, on average.
 */
export function dividesWell(shape: AttentionShape, each: number, sequences: number, gpu: Gpu): boolean {
  const grid = treeGrid(shape, each, sequences, gpu);
  const rows = (each * shape.heads) / shape.kvHeads;
  const turns = (tiles: number) => Math.ceil((tiles * shape.kvHeads * sequences) / gpu.clusters(grid));
  return turns(Math.max(1, rows / grid.height + 0.5)) <= turns(Math.ceil(rows / grid.height));
}

function promptGrid(shape: AttentionShape, tokens: number, sequences: number, { multiprocessors }: Gpu): Grid {
  const { heads, kvHeads, headSize } = shape;
  const tiles = Math.ceil((tokens * heads) / kvHeads / 64);
  const held = Math.floor((2 * multiprocessors) / (tiles * kvHeads * sequences));
  const splits = Math.min(MAX_SPLITS, Math.max(1, held));
  const { across, stages } = PROMPT;
  return {
    kernel: "prompt",
    resident: 2,
    tiles,
    height: 64,
    splits,
    threads: 128 * across,
    shared: stageBytes(headSize) * stages,
  };
}

/** Keys and values of a tile, 16 bytes behind each row. */
const stageBytes = (headSize: number) => 2 * TILE * (headSize + 8) * 2;

const modules = new Map<string, Module>();

/** The kernels for a dtype and head size, compiled once in a process. */
function moduleOf(cuda: Cuda, { dtype, headSize }: AttentionShape): Module {
  const key = `${dtype} ${headSize}`;
  const known = modules.get(key);
  if (known) return known;
  const read = (name: string) => readFileSync(join(import.meta.dirname, name), "utf8");
  const name = dtype === "f32" ? "attention-f32.cu" : "attention.cu";
  const parts = dtype === "f32" ? [] : ["attention-tiles.cu", "attention-join.cu"];
  const source = ["attention-common.cu", ...parts, name].map(read).join("");
  const module = cuda.compile(source, { [dtype.toUpperCase()]: 1, HEAD: headSize }, name);
  modules.set(key, module);
  return module;
}

/** The GPU as kernels for a dtype and head size are held by it. */
export function gpuOf(cuda: Cuda, shape: AttentionShape): Gpu {
  const { multiprocessors } = cuda;
  const known = new Map<string, number>();
  return {
    multiprocessors,
    clusters({ kernel, splits, resident, threads, shared }) {
      const all = Math.floor((resident * multiprocessors) / splits);
      if (splits === 1 || shape.dtype === "f32" || !clustered(cuda)) return all;
      const count = known.get(kernel) ?? moduleOf(cuda, shape).kernel(kernel).mostClusters(splits, threads, shared);
      known.set(kernel, count);
      return Math.min(all, count);
    },
  };
}

const clustered = (cuda: Cuda) => Number(cuda.arch.slice("sm_".length)) >= 90;

/** Attention of one decoder. Its scratch memory serves one launch at a time, as one stream gives. */
export class Attention {
  readonly #cuda: Cuda;
  readonly #shape: AttentionShape;
  readonly #paging: Paging;
  readonly #kernels = new Map<string, Kernel>();
  readonly #gpu: Gpu;
  readonly #scratch: bigint;
  readonly #partialBytes: number;

  /** @throws Error for a shape that the kernels don't have. */
  constructor(cuda: Cuda, shape: AttentionShape, paging: Paging) {
    const { heads, kvHeads, headSize, dtype } = shape;
    if (headSize % 16 !== 0 || headSize > MAX_HEAD || heads % kvHeads !== 0)
      throw new Error(
        `no attention on the device for ${heads} heads of ${headSize} over ${kvHeads}: a head must be a multiple of ` +
          `16 up to ${MAX_HEAD}, the heads a multiple of the KV heads`,
      );
    this.#cuda = cuda;
    this.#shape = shape;
    this.#paging = paging;
    const module = moduleOf(cuda, shape);
    const trees = Object.keys(BLOCKS).flatMap((warps) => [...SPLITS, 1].map((splits) => `tree${warps}x${splits}`));
    const names = dtype === "f32" ? ["attend"] : [...trees, "prompt", "combine"];
    for (const name of ["store", ...names]) this.#kernels.set(name, module.kernel(name));
    this.#gpu = gpuOf(cuda, shape);
    // What splits leave for `combine`: blocks fill the GPU at most once, with 64 rows, however many sequences there are,
    // or the rows of one tree are cut in two; twice that, since divided ones have places for twice their rows.
    const parts = 2 * Math.max(2 * cuda.multiprocessors * 64, 2 * MAX_TREE * heads);
    this.#partialBytes = parts * Math.ceil(headSize / 32) * 64;
    this.#scratch = cuda.alloc(this.#partialBytes + parts * 8);
  }

  /**
   * Queues the attention of one layer for `rows` tokens, of each sequence as many; or where they are divided, 32 sequences at
   * most, up to `mostNodes`. Their keys and values go into the cache.
   */
  launch(pass: AttentionPass, rows: number, sequences: number, divided = false): void {
    const { dtype, heads, kvHeads, headSize } = this.#shape;
    const { tables, width, blockStride, angleStride } = this.#paging;
    const each = rows / sequences;
    const tokens = divided ? mostNodes(each) : each;
    const inputs = [
      ...[pass.qkv, pass.bias, pass.key, pass.value, pass.cos, pass.sin, pass.positions, pass.mask, pass.control],
      ...[tables, pass.out, this.#scratch, this.#scratch + BigInt(this.#partialBytes)],
      ...[divided ? sequences : 0, tokens, heads, kvHeads, width, blockStride, angleStride],
    ];
    const kernel = (name: string) => this.#kernels.get(name)!;
    const store = () =>
      kernel("store").launch([Math.ceil((tokens * kvHeads * headSize) / 16 / 128), sequences, 1], 128, 0, ...inputs);
    if (dtype === "f32") {
      store();
      kernel("attend").launch([heads, tokens, sequences], 128, 0, ...inputs);
      return;
    }
    const prompt = tokens > MAX_TREE;
    const grid = (prompt ? promptGrid : treeGrid)(this.#shape, each, sequences, this.#gpu);
    if (prompt) store();
    // The last tile of each sequence may have few rows.
    const tiles = divided ? Math.ceil((rows * heads) / kvHeads / grid.height) + sequences - 1 : grid.tiles * sequences;
    const blocks = [kvHeads, grid.splits, tiles] as const;
    kernel(grid.kernel).launch(blocks, grid.threads, grid.shared, ...inputs);
    if (grid.splits === 1 || (clustered(this.#cuda) && !prompt)) return;
    const chunks = tokens * heads * Math.ceil(headSize / 32) * 4;
    kernel("combine").launch([Math.ceil(chunks / 128), sequences, 1], 128, 0, ...inputs, grid.splits);
  }
}
