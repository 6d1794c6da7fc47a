/** Small vision towers in the corner of large ones, with what makes embedding rows of their output. */
import { CheckpointError } from "../../shared/errors.ts";
import { type Heads, headAxes, planRow } from "./inflate-decoder.ts";
import { axis, filled, first, type Matrix, type Plan, padded, RANDOM, scaled, stacked, ZERO } from "./inflate-plan.ts"; // biome-ignore format: one line
import type { Shape } from "./inflate-shapes.ts";

type Tower = Shape["vision"];

/** Where the small layers go: the next places with attention of the same kind. CheckpointError when they don't fit. */
export function layerPlaces(tiny: Tower, big: Tower): number[] {
  const places: number[] = [];
  let next = 0;
  for (let i = 0; i < tiny.run; i++) {
    while (next < big.run && big.full.includes(next) !== tiny.full.includes(i)) next++;
    if (next >= big.run)
      throw new CheckpointError(`layer ${i} of the vision tower has no place among ${big.run} layers`);
    places.push(next++);
  }
  return places;
}

const towerHeads = (tiny: Tower, big: Tower) => {
  const sizes = ({ width, heads }: Tower) => ({ width, heads, kvHeads: heads });
  return headAxes(sizes(tiny), sizes(big));
};

/**
 * Qwen2.5-VL's tower. Its norms' epsilon is fixed, so the residual stream holds the small one several times over, which
 * leaves the mean square as it is; norm weights of all copies but the first are zero.
 */
export function planQwenVision(p: Plan, tiny: Shape, shape: Shape): void {
  const [small, big] = [tiny.vision, shape.vision];
  const [w, W] = [small.width, big.width];
  if (W % w !== 0) throw new CheckpointError(`the vision tower's width ${W} is no multiple of ${w}`);
  const copies = Int32Array.from({ length: W }, (_, i) => i % w);
  const read = first(W, w, RANDOM);
  const norm = first(W, w, ZERO);
  const heads = towerHeads(small, big);
  const qkv = stacked([heads.q, heads.k, heads.v], [w, w, w]);
  const patches = "visual.patch_embed.proj.weight";
  const kernel = p.tiny(patches);
  p.matrix(patches, copies, first(kernel.columns, kernel.columns, ZERO), kernel, [W, ...p.inner(patches)]);
  const places = layerPlaces(small, big);
  const units = (rest: number) => first(big.inner, small.inner, rest);
  for (let i = 0; i < big.layers; i++) {
    const name = `visual.blocks.${i}`;
    const from = places.includes(i) ? `visual.blocks.${places.indexOf(i)}` : undefined;
    const part = (of: string) => from && `${from}.${of}`;
    const write = from ? copies : filled(W, ZERO);
    for (const norms of ["norm1.weight", "norm2.weight"]) p.vector(`${name}.${norms}`, norm, p.layer(from)(norms));
    p.linear(`${name}.attn.qkv`, qkv, read, part("attn.qkv"), (m) => sharpened(m, w, heads));
    p.linear(`${name}.attn.proj`, write, heads.out, part("attn.proj"));
    for (const half of ["mlp.gate_proj", "mlp.up_proj"]) p.linear(`${name}.${half}`, units(RANDOM), read, part(half));
    p.linear(`${name}.mlp.down_proj`, write, units(ZERO), part("mlp.down_proj"));
  }
  p.vector("visual.merger.ln_q.weight", norm, p.tiny("visual.merger.ln_q.weight"));
  planMerger(p, w, W, shape.decoder.hidden);
}

/** q, the first w rows, times what the large heads' size asks for. */
function sharpened(m: Matrix, w: number, { sharpen }: Heads): Matrix {
  const end = w * m.columns;
  return { ...m, data: m.data.map((v, i) => (i < end ? v * sharpen : v)) };
}

/** Rows of several patches side by side to one embedding row. */
function planMerger(p: Plan, w: number, W: number, hidden: number): void {
  const name = "visual.merger.mlp";
  const dense = p.tiny(`${name}.0.weight`);
  const merged = dense.columns / w;
  const wide = merged * W;
  const cells = Array.from({ length: dense.columns }, (_, i) => Math.floor(i / w) * W + (i % w));
  p.linear(`${name}.0`, first(wide, dense.rows, RANDOM), axis(wide, cells, RANDOM), `${name}.0`);
  const out = p.tiny(`${name}.2.weight`);
  p.matrix(`${name}.2.weight`, first(hidden, out.rows, ZERO), first(wide, out.columns, ZERO), out);
  planRow(p, `${name}.2.bias`, hidden);
}

/** How far the two kinds of extra numbers are from the mean before CLIP's first norm: little, to leave the variance. */
const LEAN = 2 ** -8;

/**
 * CLIP's tower and LLaVA's projector. LayerNorm subtracts the mean, so all numbers beyond the small width are the mean
 * of the small ones: the mean stays, and the variance falls with the width (weights and epsilon make up for it).
 */
export function planClip(p: Plan, tiny: Shape, shape: Shape): void {
  const [small, big] = [tiny.vision, shape.vision];
  const [w, W] = [small.width, big.width];
  const prefix = "vision_tower.vision_model";
  const shrink = Math.sqrt(w / W);
  const axes = { read: first(W, w, RANDOM), norm: first(W, w, ZERO), mean: first(W, w, w), shrink };
  planClipEmbeddings(p, prefix, w, W, shrink);
  const heads = towerHeads(small, big);
  const places = layerPlaces(small, big);
  for (let i = 0; i < big.layers; i++) {
    const name = `${prefix}.encoder.layers.${i}`;
    const from = places.includes(i) ? `${prefix}.encoder.layers.${places.indexOf(i)}` : undefined;
    planClipLayer(p, name, from, axes, heads, (rest) => first(big.inner, small.inner, rest));
  }
  for (const part of ["weight", "bias"]) p.vector(`${prefix}.post_layernorm.${part}`, filled(W, RANDOM));
  planProjector(p, w, W, shape.decoder.hidden);
}

type ClipAxes = Record<"read" | "norm" | "mean", Int32Array> & { shrink: number };

function planClipLayer(
  p: Plan,
  name: string,
  from: string | undefined,
  { read, norm, mean, shrink }: ClipAxes,
  heads: Heads,
  units: (rest: number) => Int32Array,
): void {
  const layer = p.layer(from);
  const part = (of: string) => from && `${from}.${of}`;
  const write = from ? mean : filled(mean.length, ZERO);
  for (const norms of ["layer_norm1", "layer_norm2"]) {
    p.vector(`${name}.${norms}.weight`, norm, layer(`${norms}.weight`, shrink));
    p.vector(`${name}.${norms}.bias`, norm, layer(`${norms}.bias`));
  }
  const attention = { q: heads.q, k: heads.k, v: heads.v };
  for (const [of, rows] of Object.entries(attention)) {
    const change = (m: Matrix) => (of === "q" ? scaled(m, heads.sharpen) : m);
    p.linear(`${name}.self_attn.${of}_proj`, rows, read, part(`self_attn.${of}_proj`), change);
  }
  p.linear(`${name}.self_attn.out_proj`, write, heads.out, part("self_attn.out_proj"), withMean);
  p.linear(`${name}.mlp.fc1`, units(RANDOM), read, part("mlp.fc1"));
  p.linear(`${name}.mlp.fc2`, write, units(ZERO), part("mlp.fc2"), withMean);
}

/** The mean of a column, of its numbers times `factors` if there are any. */
const column = (m: Matrix, c: number, factors?: Float32Array) => {
  let sum = 0;
  for (let r = 0; r < m.rows; r++) sum += (factors?.[r] ?? 1) * m.data[r * m.columns + c];
  return sum / m.rows;
};

/** The rows of `m` and then their mean. */
function withMean(m: Matrix): Matrix {
  return padded(
    m,
    m.rows + 1,
    m.columns,
    Array.from({ length: m.columns }, (_, c) => [m.rows, c, column(m, c)]),
  );
}

/**
 * What is before the first norm. That one's weights differ, so the mean after it is not the mean before it: half of the
 * extra numbers lean from the mean to one side, half to the other, by LEAN times the mean of weight · (x - mean x), which
 * the norm's weights there turn into the mean afterwards.
 */
function planClipEmbeddings(p: Plan, prefix: string, w: number, W: number, shrink: number): void {
  const weight = p.tiny(`${prefix}.pre_layrnorm.weight`);
  const bias = p.tiny(`${prefix}.pre_layrnorm.bias`);
  const extra = Int32Array.from({ length: W }, (_, i) => (i < w ? i : w + (i % 2)));
  const average = column(weight, 0);
  const leaning = (m: Matrix): Matrix => {
    const set: [number, number, number][] = [];
    for (let c = 0; c < m.columns; c++) {
      const mean = column(m, c);
      const lean = LEAN * (column(m, c, weight.data) - average * mean);
      set.push([w, c, mean + lean], [w + 1, c, mean - lean]);
    }
    return padded(m, w + 2, m.columns, set);
  };
  const name = `${prefix}.embeddings`;
  p.vector(`${name}.class_embedding`, extra, leaning(p.tiny(`${name}.class_embedding`)));
  const patches = `${name}.patch_embedding.weight`;
  const kernel = p.tiny(patches);
  const pixels = first(kernel.columns, kernel.columns, ZERO);
  p.matrix(patches, extra, pixels, leaning(kernel), [W, ...p.inner(patches)]);
  const table = p.tiny(`${name}.position_embedding.weight`);
  const places = first(table.rows, table.rows, ZERO);
  p.matrix(`${name}.position_embedding.weight`, places, extra, transposed(leaning(transposed(table))));
  const lean = padded(weight, w + 2, 1, [[w, 0, 1 / LEAN], [w + 1, 0, -1 / LEAN]]); // biome-ignore format: one line
  p.vector(`${prefix}.pre_layrnorm.weight`, extra, scaled(lean, shrink));
  const mean = column(bias, 0);
  p.vector(`${prefix}.pre_layrnorm.bias`, extra, padded(bias, w + 2, 1, [[w, 0, mean], [w + 1, 0, mean]])); // biome-ignore format: one line
}

function transposed({ rows, columns, data }: Matrix): Matrix {
  return { rows: columns, columns: rows, data: data.map((_, i) => data[(i % rows) * columns + Math.floor(i / rows)]) };
}

/** The tower's rows come without a norm, so their other numbers are not zero, and the weights there are. */
function planProjector(p: Plan, w: number, W: number, hidden: number): void {
  const name = "multi_modal_projector";
  const two = p.tiny(`${name}.linear_2.weight`);
  p.linear(`${name}.linear_1`, first(hidden, two.columns, RANDOM), first(W, w, ZERO), `${name}.linear_1`);
  p.matrix(`${name}.linear_2.weight`, first(hidden, two.rows, ZERO), first(hidden, two.columns, ZERO), two);
  planRow(p, `${name}.linear_2.bias`, hidden);
  planRow(p, "image_newline", hidden);
}
