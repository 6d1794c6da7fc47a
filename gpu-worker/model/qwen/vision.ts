/** Qwen2.5-VL's vision tower: its graph, and the order of rows that it wants for a picture's grid. */
import { Graph, type GraphOptions, type Value } from "../../graph/graph.ts";
import { multiHeadAttention, rotaryEmbedding } from "../../ops/attention.ts";
import { add, gelu } from "../../ops/elementwise.ts";
import { matMul } from "../../ops/matmul.ts";
import { rmsNorm } from "../../ops/norm.ts";
import { gather, reshape, split, transpose } from "../../ops/shape.ts";
import { gatedMlp, linear, parameter } from "../layers.ts";
import type { Weights } from "../weights.ts";
import type { VisionConfig } from "./config.ts";

const EPSILON = 1e-6; // Qwen2_5_VLVisionBlock fixes it

/**
 * Patches of one picture to the rows that take its image tokens' places (Qwen2_5_VisionTransformerPretrainedModel).
 * Rows are kept in window order throughout, each window padded to its full size, so that windows are a batch.
 * Inputs: pixels [P,C·T·p·p]; row_index i64 [W·S]: the patch in each row, S rows a window; window_mask i32 [W,S] and
 * full_mask i32 [1,W·S]: 0 at padding; cos, sin [W·S,head/2]; window_positions i64 [W,S] and full_positions i64 [1,W·S]:
 * 0, 1, 2, …; cell_index i64 [cells]: for each token in reading order, its place. Output: rows [cells,out].
 */
export function visionGraph(c: VisionConfig, w: Weights, options: GraphOptions): Graph {
  const g = new Graph(options);
  const pixelsPerPatch = 3 * c.temporalPatch * c.patch * c.patch;
  const size = (c.window * c.merge) ** 2;
  const pixels = g.input("pixels", g.dtype, ["P", pixelsPerPatch]);
  const rowIndex = g.input("row_index", "i64", ["rows"]);
  const attention = {
    window: { mask: g.input("window_mask", "i32", ["W", size]), at: g.input("window_positions", "i64", ["W", size]) },
    full: { mask: g.input("full_mask", "i32", [1, "rows"]), at: g.input("full_positions", "i64", [1, "rows"]) },
  };
  const cos = g.input("cos", g.dtype, ["rows", c.width / c.heads / 2]);
  const sin = g.input("sin", g.dtype, ["rows", c.width / c.heads / 2]);
  const cellIndex = g.input("cell_index", "i64", ["cells"]);

  const kernel = w.get("visual.patch_embed.proj.weight", [c.width, 3, c.temporalPatch, c.patch, c.patch]);
  const embed = transpose(g, reshape(g, parameter(g, kernel), [c.width, pixelsPerPatch]), [1, 0]);
  let x = gather(g, matMul(g, pixels, embed), rowIndex);
  for (let i = 0; i < c.layers; i++) {
    const name = `visual.blocks.${i}`;
    const norm = (part: string, y: Value) =>
      rmsNorm(g, y, parameter(g, w.get(`${name}.${part}.weight`, [c.width])), EPSILON);
    const full = c.fullAttention.has(i);
    const { mask, at } = full ? attention.full : attention.window;
    const qkv = linear(
      g,
      norm("norm1", x),
      [w.get(`${name}.attn.qkv.weight`, [3 * c.width, c.width])],
      [w.get(`${name}.attn.qkv.bias`, [3 * c.width])],
    );
    const shaped = reshape(g, qkv, full ? [1, -1, 3 * c.width] : [-1, size, 3 * c.width], full ? "rows" : "W");
    const [q, k, v] = split(g, shaped, [c.width, c.width, c.width]);
    const turn = (y: Value) => rotaryEmbedding(g, y, at, cos, sin, c.heads);
    const attended = reshape(g, multiHeadAttention(g, turn(q), turn(k), v, mask, c.heads), [-1, c.width], "rows");
    const matrix = w.get(`${name}.attn.proj.weight`, [c.width, c.width]);
    x = add(g, x, linear(g, attended, [matrix], [w.get(`${name}.attn.proj.bias`, [c.width])]));
    x = add(g, x, gatedMlp(g, norm("norm2", x), w, `${name}.mlp`, c.width, c.inner, true));
  }
  g.output("rows", merger(g, x, cellIndex, c, w));
  return g;
}

/** Qwen2_5_VLPatchMerger, and the return to reading order. */
function merger(g: Graph, x: Value, cellIndex: Value, c: VisionConfig, w: Weights): Value {
  const wide = c.width * c.merge ** 2;
  const name = "visual.merger";
  const normed = rmsNorm(g, x, parameter(g, w.get(`${name}.ln_q.weight`, [c.width])), EPSILON);
  const cells = gather(g, reshape(g, normed, [-1, wide], "all cells"), cellIndex);
  const dense = (y: Value, i: number, out: number) =>
    linear(g, y, [w.get(`${name}.mlp.${i}.weight`, [out, wide])], [w.get(`${name}.mlp.${i}.bias`, [out])]);
  return dense(gelu(g, dense(cells, 0, wide)), 2, c.out);
}

export interface VisionLayout {
  windows: number;
  /** Rows of one window. */
  size: number;
  /** [windows·size]: the patch in each row; padding repeats patch 0. */
  rowIndex: Int32Array;
  /** [windows·size]: 0 at padding. */
  mask: Uint8Array;
  /** [windows·size]: patch row and column, for the rotary embedding. */
  rows: Int32Array;
  columns: Int32Array;
  /** [cells]: where each token in reading order stands among the padded cells. */
  cellIndex: Int32Array;
}

/**
 * Window order of a still picture of height × width patches (get_window_index and rot_pos_emb of the HF class); patches
 * come in the processor's order, merge × merge blocks in reading order.
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
    rowIndex: new Int32Array(total),
    mask: new Uint8Array(total),
    rows: new Int32Array(total),
    columns: new Int32Array(total),
    cellIndex: new Int32Array(cellRows * cellColumns),
  };
  for (let row = 0; row < cellRows; row++)
    for (let column = 0; column < cellColumns; column++) {
      const cell = row * cellColumns + column;
      const at = Math.floor(row / window) * across + Math.floor(column / window);
      const place = at * cellsPerWindow + (row % window) * window + (column % window);
      layout.cellIndex[cell] = place;
      for (let i = 0; i < unit; i++) {
        const to = place * unit + i;
        layout.rowIndex[to] = cell * unit + i;
        layout.mask[to] = 1;
        layout.rows[to] = row * merge + Math.floor(i / merge);
        layout.columns[to] = column * merge + (i % merge);
      }
    }
  return layout;
}
