/** Qwen2.5-VL's vision tower: its graph, and the order of rows that it wants for a picture's grid. */
import { Graph, type GraphOptions, type Value } from "../../graph/graph.ts";
import { multiHeadAttention, rotaryEmbedding } from "../../ops/attention.ts";
import { add, gelu } from "../../ops/elementwise.ts";
import { matMul } from "../../ops/matmul.ts";
import { rmsNorm } from "../../ops/norm.ts";
import { concat, gather, reshape, split, transpose } from "../../ops/shape.ts";
import { gatedMlp, linear, parameter } from "../layers.ts";
import { type Normalization, numbersOf } from "../pixels.ts";
import type { TensorSource } from "../weights.ts";
import type { VisionConfig } from "./config.ts";

const EPSILON = 1e-6; // Qwen2_5_VLVisionBlock fixes it

/**
 * Patches of one picture to the rows that take its image tokens' places (Qwen2_5_VisionTransformerPretrainedModel).
 * Rows stay in the processor's order; only windowed attention gathers them into windows, each padded to its full size, so
 * that windows are a batch. Inputs: pixels [P,C·T·p·p]; cos, sin [P,head/2]; positions i64 [1,P]: 0, 1, 2, …; row_patch
 * i64 [W·S]: the patch in each window's row; patch_row i64 [P]: the row of each patch; mask [W,1,S,S]: -inf in padding's
 * columns. A graph that binds its weights takes pixels u8 [H/merge,merge,p,W/merge,merge,p,3], patches a side H and W:
 * levels in reading order. Output: rows [P/merge²,out], in reading order.
 */
export function visionGraph(
  c: VisionConfig,
  normalization: Normalization,
  w: TensorSource,
  options: GraphOptions,
): Graph {
  const g = new Graph(options);
  const pixelsPerPatch = 3 * c.temporalPatch * c.patch * c.patch;
  const size = (c.window * c.merge) ** 2;
  const pixels = g.binds ? patches(g, c, normalization) : g.input("pixels", g.dtype, ["P", pixelsPerPatch]);
  const inputs: AttentionInputs = {
    cos: g.input("cos", g.dtype, ["P", c.width / c.heads / 2]),
    sin: g.input("sin", g.dtype, ["P", c.width / c.heads / 2]),
    positions: g.input("positions", "i64", [1, "P"]),
    rowPatch: g.input("row_patch", "i64", ["rows"]),
    patchRow: g.input("patch_row", "i64", ["P"]),
    mask: g.input("mask", g.dtype, ["W", 1, size, size]),
  };

  const kernel = w.get("visual.patch_embed.proj.weight", [c.width, 3, c.temporalPatch, c.patch, c.patch]);
  const embed = transpose(g, reshape(g, parameter(g, kernel), [c.width, pixelsPerPatch]), [1, 0]);
  let x = matMul(g, pixels, embed);
  for (let i = 0; i < c.layers; i++) {
    const name = `visual.blocks.${i}`;
    const norm = (part: string, y: Value) =>
      rmsNorm(g, y, parameter(g, w.get(`${name}.${part}.weight`, [c.width])), EPSILON);
    const dense = (part: string, y: Value, out: number) =>
      linear(g, y, [w.get(`${name}.attn.${part}.weight`, [out, c.width])], [w.get(`${name}.attn.${part}.bias`, [out])]);
    const qkv = dense("qkv", norm("norm1", x), 3 * c.width);
    x = add(g, x, dense("proj", attention(g, qkv, inputs, c, c.fullAttention.has(i)), c.width));
    x = add(g, x, gatedMlp(g, norm("norm2", x), w, `${name}.mlp`, c.width, c.inner, true));
  }
  g.output("rows", merger(g, x, c, w));
  return g;
}

/** The processor's patches [P,3·T·p·p], made of levels; the one frame stands for all. */
function patches(g: Graph, { merge, patch, temporalPatch }: VisionConfig, normalization: Normalization): Value {
  const levels = g.input("pixels", "u8", ["down", merge, patch, "across", merge, patch, 3]);
  const blocks = transpose(g, numbersOf(g, levels, normalization), [0, 3, 1, 4, 6, 2, 5]);
  const frame = reshape(g, blocks, [-1, 3, 1, patch * patch], "P");
  const frames = concat(g, new Array<Value>(temporalPatch).fill(frame), 2);
  return reshape(g, frames, [-1, 3 * temporalPatch * patch * patch], "P");
}

type AttentionInputs = Record<"rowPatch" | "patchRow" | "mask" | "cos" | "sin" | "positions", Value>;

/** Among all patches, or within windows. qkv [P,3·width] to [P,width]. */
function attention(g: Graph, qkv: Value, inputs: AttentionInputs, c: VisionConfig, full: boolean): Value {
  const { rowPatch, patchRow, mask, cos, sin, positions } = inputs;
  const size = (c.window * c.merge) ** 2;
  const [q, k, v] = split(g, reshape(g, qkv, [1, -1, 3 * c.width], "P"), [c.width, c.width, c.width]);
  const turn = (y: Value) => rotaryEmbedding(g, y, positions, cos, sin, c.heads);
  const flat = (y: Value, rows: string) => reshape(g, y, [-1, c.width], rows);
  if (full) return flat(multiHeadAttention(g, turn(q), turn(k), v, null, c.heads), "P");
  const windows = (y: Value) => reshape(g, gather(g, flat(y, "P"), rowPatch), [-1, size, c.width], "W");
  const attended = multiHeadAttention(g, windows(turn(q)), windows(turn(k)), windows(v), mask, c.heads);
  return gather(g, flat(attended, "rows"), patchRow);
}

/** Qwen2_5_VLPatchMerger: merge² patches that stand together become one row. */
function merger(g: Graph, x: Value, c: VisionConfig, w: TensorSource): Value {
  const wide = c.width * c.merge ** 2;
  const name = "visual.merger";
  const normed = rmsNorm(g, x, parameter(g, w.get(`${name}.ln_q.weight`, [c.width])), EPSILON);
  const cells = reshape(g, normed, [-1, wide], "cells");
  const dense = (y: Value, i: number, out: number) =>
    linear(g, y, [w.get(`${name}.mlp.${i}.weight`, [out, wide])], [w.get(`${name}.mlp.${i}.bias`, [out])]);
  return dense(gelu(g, dense(cells, 0, wide)), 2, c.out);
}

export interface VisionLayout {
  windows: number;
  /** Rows of one window. */
  size: number;
  /** [windows·size]: the patch in each row; padding repeats patch 0. */
  rowPatch: Int32Array;
  /** [windows·size]: 0 at padding. */
  real: Uint8Array;
  /** [P]: the row of each patch. */
  patchRow: Int32Array;
  /** [P]: patch row and column, for the rotary embedding. */
  rows: Int32Array;
  columns: Int32Array;
}

/**
 * Windows of a still picture of height × width patches (get_window_index and rot_pos_emb of the HF class); patches come
 * in the processor's order, merge × merge blocks in reading order.
 */
export function visionLayout(height: number, width: number, c: VisionConfig): VisionLayout {
  const { merge, window } = c;
  const [cellRows, cellColumns] = [height / merge, width / merge];
  const [down, across] = [Math.ceil(cellRows / window), Math.ceil(cellColumns / window)];
  const [unit, cellsPerWindow] = [merge * merge, window * window];
  const total = down * across * cellsPerWindow * unit;
  const layout: VisionLayout = {
    windows: down * across,
    size: cellsPerWindow * unit,
    rowPatch: new Int32Array(total),
    real: new Uint8Array(total),
    patchRow: new Int32Array(height * width),
    rows: new Int32Array(height * width),
    columns: new Int32Array(height * width),
  };
  for (let row = 0; row < cellRows; row++)
    for (let column = 0; column < cellColumns; column++) {
      const cell = row * cellColumns + column;
      const at = Math.floor(row / window) * across + Math.floor(column / window);
      const place = at * cellsPerWindow + (row % window) * window + (column % window);
      for (let i = 0; i < unit; i++) {
        const [patch, to] = [cell * unit + i, place * unit + i];
        layout.rowPatch[to] = patch;
        layout.real[to] = 1;
        layout.patchRow[patch] = to;
        layout.rows[patch] = row * merge + Math.floor(i / merge);
        layout.columns[patch] = column * merge + (i % merge);
      }
    }
  return layout;
}
