/** Attention over a KV cache as kernels (attention*.cu): their grids and the memory that they need between launches. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Cuda, Kernel, Module } from "./driver.ts";

// The bounds of attention.cu.
const TILE = 64;
const STAGES = 3;
const MAX_SPLITS = 32;
const MAX_TREE = 128;
const MAX_HEAD = 128;

export interface AttentionShape {
  dtype: "f16" | "bf16" | "f32";
  heads: number;
  kvHeads: number;
  /** A multiple of 16, at most 128. */
  headSize: number;
}

/** Addresses in device memory, all of 16-byte alignment; elements are of the shape's dtype unless said otherwise. */
export interface AttentionPass {
  /** [tokens, (heads + 2 kvHeads) headSize]: queries, keys, values of the tokens, and what is added to each row or 0n. */
  qkv: bigint;
  bias: bigint;
  /** [kvHeads, capacity, headSize]. Token t is written to row past + first + t, which must be below the capacity. */
  key: bigint;
  value: bigint;
  capacity: number;
  /** f32 [rows, headSize / 2]; i32 [tokens]: the row of each token. */
  cos: bigint;
  sin: bigint;
  positions: bigint;
  /** i32 [tokens, 4]: bit j says that the token sees column past + j. Not read if causal; 0n will do then. */
  mask: bigint;
  /** i32 [4]: past, first, causal, unused. More than 128 tokens must be causal, and causal needs first = 0. */
  control: bigint;
  /** [tokens, heads headSize]. */
  out: bigint;
}

interface Grid {
  kernel: "tree1" | "tree2" | "tree4" | "prompt";
  /** Tiles of rows, a row being a token's head in the group of a KV head. */
  tiles: number;
  /** Parts of the columns. */
  splits: number;
}

/**
 * As many splits as fill the GPU once, two blocks a multiprocessor. Few rows leave a block's warps for the columns.
 * Never depends on how many columns there are, which a captured launch can't know.
 */
function gridOf({ heads, kvHeads }: AttentionShape, tokens: number, multiprocessors: number): Grid {
  const rows = (tokens * heads) / kvHeads;
  const warps = rows <= 16 ? 1 : rows <= 32 ? 2 : 4;
  const tiles = Math.ceil(rows / (16 * warps));
  const splits = Math.min(MAX_SPLITS, Math.max(1, Math.floor((2 * multiprocessors) / (tiles * kvHeads))));
  if (tokens > MAX_TREE) return { kernel: "prompt", tiles: Math.ceil(rows / 64), splits };
  return { kernel: `tree${warps}`, tiles, splits };
}

const modules = new Map<string, Module>();

/** The kernels for a dtype and head size, compiled once in a process. */
function moduleOf(cuda: Cuda, { dtype, headSize }: AttentionShape): Module {
  const key = `${dtype} ${headSize}`;
  const known = modules.get(key);
  if (known) return known;
  const read = (name: string) => readFileSync(join(import.meta.dirname, name), "utf8");
  const name = dtype === "f32" ? "attention-f32.cu" : "attention.cu";
  const source = read("attention-common.cu") + read(name);
  const module = cuda.compile(source, { [dtype.toUpperCase()]: 1, HEAD: headSize }, name);
  modules.set(key, module);
  return module;
}

/** Attention of one decoder. Its scratch memory serves one launch at a time, as one stream gives. */
export class Attention implements Disposable {
  readonly #cuda: Cuda;
  readonly #shape: AttentionShape;
  readonly #kernels = new Map<string, Kernel>();
  readonly #scratch: bigint;
  readonly #partialBytes: number;

  /** @throws Error for a shape that the kernels don't have. */
  constructor(cuda: Cuda, shape: AttentionShape) {
    const { heads, kvHeads, headSize, dtype } = shape;
    if (headSize % 16 !== 0 || headSize > MAX_HEAD || heads % kvHeads !== 0)
      throw new Error(
        `no attention on the device for ${heads} heads of ${headSize} over ${kvHeads}: a head must be a multiple of 16 ` +
          `up to ${MAX_HEAD}, the heads a multiple of the KV heads`,
      );
    this.#cuda = cuda;
    this.#shape = shape;
    const module = moduleOf(cuda, shape);
    const names = dtype === "f32" ? ["store", "attend"] : ["store", "tree1", "tree2", "tree4", "prompt", "combine"];
    for (const name of names) this.#kernels.set(name, module.kernel(name));
    // Where columns are split, blocks fill the GPU at most once, and each leaves 64 rows at most.
    const parts = 2 * cuda.multiprocessors * 64;
    this.#partialBytes = parts * headSize * 4;
    this.#scratch = cuda.alloc(this.#partialBytes + parts * 8);
  }

  /** Queues the attention of one layer for `tokens` tokens, their keys and values into the cache. */
  launch(pass: AttentionPass, tokens: number): void {
    const { dtype, heads, kvHeads, headSize } = this.#shape;
    const inputs = [
      ...[pass.qkv, pass.bias, pass.key, pass.value, pass.cos, pass.sin, pass.positions, pass.mask, pass.control],
      ...[pass.out, this.#scratch, this.#scratch + BigInt(this.#partialBytes)],
      ...[tokens, heads, kvHeads, pass.capacity],
    ];
    const kernel = (name: string) => this.#kernels.get(name)!;
    const store = () =>
      kernel("store").launch([Math.ceil((tokens * kvHeads * headSize) / 16 / 128), 1, 1], 128, 0, ...inputs);
    if (dtype === "f32") {
      store();
      kernel("attend").launch([heads, tokens, 1], 128, 0, ...inputs);
      return;
    }
    const grid = gridOf(this.#shape, tokens, this.#cuda.multiprocessors);
    if (grid.kernel === "prompt") store();
    const shared = STAGES * 2 * TILE * (headSize + 8) * 2;
    kernel(grid.kernel).launch([kvHeads, grid.splits, grid.tiles], 128, shared, ...inputs);
    if (grid.splits > 1)
      kernel("combine").launch([Math.ceil((tokens * heads) / 4), 1, 1], 128, 0, ...inputs, grid.splits);
  }

  [Symbol.dispose](): void {
    this.#cuda.free(this.#scratch);
  }
}
