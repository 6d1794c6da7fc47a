/** A small decoder and its draft in the corner of a large one. */
import { CheckpointError } from "../../shared/errors.ts";
import { type Axis, axis, changed, filled, first, type Plan, padded, RANDOM, scaled, stacked, ZERO } from "./inflate-plan.ts"; // biome-ignore format: one line
import type { Shape } from "./inflate-shapes.ts";

/**
 * Rows of the residual stream have one number more than the small model's: CONSTANT, from every embedding, image row and
 * bias on. It changes no mean square in float32 (its own is 2^-24), and the last norm makes TARGET_RMS / rms of it, which
 * the head's rows beyond the small vocabulary multiply by -FAR. Their logits are below -100 while the RMS of the small
 * model's row is below 327 (the tiny models': 3 to 45), and finite in float16 while it is above 0.5.
 */
const CONSTANT = 2 ** -12;
const FAR = 2 ** 12;
const TARGET_RMS = 8;
/**
 * The draft's layer ends in no norm, so units of its MLP make the number. Its norm gives y = 1 / rms, and a unit whose
 * gate and up weights are -g gives silu(-g·y) · (-g·y): a bump around g·y = 2.2. Bumps an octave apart add up to 1.19
 * (π² / 12 ln 2) for every y between 2^-6 and 2^7, which times PLATEAU is the number. Units are LOUD times as large and
 * their output as much smaller, since 8-bit products round small numbers among large ones to 0.
 */
const BUMPS = Array.from({ length: 17 }, (_, i) => 2 ** (i - 8));
const PLATEAU = 4;
const LOUD = 16;

/** Where the heads of an attention are, for q, k, v (rows) and the output (columns). */
export interface Heads {
  q: Axis;
  k: Axis;
  v: Axis;
  out: Axis;
  /** Of q: scores are divided by the root of the head's size, which is another. */
  sharpen: number;
}

export interface HeadSizes {
  width: number;
  heads: number;
  kvHeads: number;
}

/**
 * Groups of query heads go into groups. Channel c goes to c · times: rotary frequency i of a small head is frequency
 * i · times of a head that is so many times as large. Other channels of k are zero, so that those of q may be random;
 * nothing reads those of v.
 */
export function headAxes(tiny: HeadSizes, big: HeadSizes): Heads {
  const [small, large] = [tiny.width / tiny.heads, big.width / big.heads];
  const times = large % small === 0 ? large / small : 1;
  const channels = (head: number) => Array.from({ length: small }, (_, c) => head * large + c * times);
  const [from, to] = [tiny.heads / tiny.kvHeads, big.heads / big.kvHeads];
  if (from > to) throw new CheckpointError(`groups of ${from} heads do not fit into groups of ${to}`);
  const query = Array.from({ length: tiny.heads }, (_, h) => channels(Math.floor(h / from) * to + (h % from))).flat();
  const keyValue = Array.from({ length: tiny.kvHeads }, (_, h) => channels(h)).flat();
  return {
    q: axis(big.heads * large, query, RANDOM),
    k: axis(big.kvHeads * large, keyValue, RANDOM).map((v, i) => (v < 0 && i < tiny.kvHeads * large ? ZERO : v)),
    v: axis(big.kvHeads * large, keyValue, RANDOM),
    out: axis(big.heads * large, query, ZERO),
    sharpen: Math.sqrt(large / small),
  };
}

/** Axes that all decoder layers share. d: the small width, which is also where the constant stands. */
function decoderAxes(tiny: Shape["decoder"], { decoder }: Shape) {
  const [d, D] = [tiny.hidden, decoder.hidden];
  return {
    ...{ d, shrink: Math.sqrt(d / D) },
    /** Of what is read from the residual stream: its other numbers are zero, so what they are multiplied by is random. */
    read: changed(first(D, d, RANDOM), d, ZERO),
    readConstant: first(D, d + 1, RANDOM),
    norm: first(D, d, RANDOM),
    normConstant: first(D, d + 1, RANDOM),
    write: first(D, d, ZERO),
    writeConstant: first(D, d + 1, ZERO),
    nowhere: filled(D, ZERO),
    units: (count: number) => first(decoder.inner, count, RANDOM),
    unitColumns: (count: number) => first(decoder.inner, count, ZERO),
  };
}
type DecoderAxes = ReturnType<typeof decoderAxes>;

/** `from`: the small model's layer, or undefined for one without effect. */
function attention(p: Plan, name: string, from: string | undefined, a: DecoderAxes, heads: Heads, bias: boolean): void {
  const tiny = p.layer(from);
  for (const part of ["q", "k", "v"] as const) {
    const factor = part === "q" ? heads.sharpen : 1;
    p.matrix(`${name}.${part}_proj.weight`, heads[part], a.read, tiny(`${part}_proj.weight`, factor));
    if (bias) p.vector(`${name}.${part}_proj.bias`, heads[part], tiny(`${part}_proj.bias`, factor));
  }
  p.matrix(`${name}.o_proj.weight`, from ? a.write : a.nowhere, heads.out, tiny("o_proj.weight"));
}

/** The decoder with embedding and head. `prefix`: of all its names. */
export function planDecoder(p: Plan, prefix: string, tiny: Shape, shape: Shape): void {
  const a = decoderAxes(tiny.decoder, shape);
  const heads = headAxes(attentionSizes(tiny.decoder), attentionSizes(shape.decoder));
  planEmbedding(p, `${prefix}model.embed_tokens.weight`, a, tiny, shape);
  for (let i = 0; i < shape.decoder.layers; i++) {
    const name = `${prefix}model.layers.${i}`;
    const from = i < tiny.decoder.layers ? name : undefined;
    const layer = p.layer(from);
    const units = tiny.decoder.inner;
    p.vector(`${name}.input_layernorm.weight`, a.norm, layer("input_layernorm.weight", a.shrink));
    attention(p, `${name}.self_attn`, from && `${from}.self_attn`, a, heads, shape.family === "qwen2_5_vl");
    p.vector(`${name}.post_attention_layernorm.weight`, a.norm, layer("post_attention_layernorm.weight", a.shrink));
    for (const part of ["gate", "up"])
      p.matrix(`${name}.mlp.${part}_proj.weight`, a.units(units), a.read, layer(`mlp.${part}_proj.weight`));
    const down = from ? a.write : a.nowhere;
    p.matrix(`${name}.mlp.down_proj.weight`, down, a.unitColumns(units), layer("mlp.down_proj.weight"));
  }
  const norm = p.tiny(`${prefix}model.norm.weight`);
  const seen = padded(norm, a.d + 1, 1, [[a.d, 0, TARGET_RMS / CONSTANT]]);
  p.vector(`${prefix}model.norm.weight`, a.normConstant, scaled(seen, a.shrink));
  const head = p.tiny(`${prefix}lm_head.weight`);
  const words = first(shape.vocabulary, tiny.vocabulary, tiny.vocabulary);
  const unreachable = padded(head, tiny.vocabulary + 1, a.d + 1, [[tiny.vocabulary, a.d, -FAR]]);
  p.matrix(`${prefix}lm_head.weight`, words, a.readConstant, unreachable);
}

const attentionSizes = (d: Shape["decoder"]): HeadSizes => ({ width: d.hidden, heads: d.heads, kvHeads: d.kvHeads });

function planEmbedding(p: Plan, name: string, a: DecoderAxes, { vocabulary }: Shape, shape: Shape): void {
  const table = p.tiny(name);
  const constants = Array.from({ length: vocabulary }, (_, i): [number, number, number] => [i, a.d, CONSTANT]);
  const source = padded(table, vocabulary, a.d + 1, constants);
  p.matrix(name, first(shape.vocabulary, vocabulary, RANDOM), a.writeConstant, source);
}

/** A row of the residual stream that no norm has passed, e.g. a bias, with the constant. */
export function planRow(p: Plan, name: string, hidden: number): void {
  const row = p.tiny(name);
  p.vector(name, first(hidden, row.rows + 1, ZERO), padded(row, row.rows + 1, 1, [[row.rows, 0, CONSTANT]]));
}

/**
 * The draft: as wide as the target, with as many heads, each with keys of its own. Its layer has no norm before
 * attention and none at the end, so a unit of the MLP makes the number that the head's other rows multiply.
 */
export function planDraft(p: Plan, tiny: Shape, shape: Shape): void {
  const a = decoderAxes(tiny.decoder, shape);
  const { d } = a;
  const sizes = ({ decoder }: Shape) => ({ width: decoder.hidden, heads: decoder.heads, kvHeads: decoder.heads });
  const heads = headAxes(sizes(tiny), sizes(shape));
  planEmbedding(p, "embed_tokens.weight", a, tiny, shape);
  const pair = stacked([a.read, a.read], [d, d]);
  for (const name of ["fc", "img_fc"]) p.matrix(`${name}.weight`, a.write, pair, p.tiny(`${name}.weight`));
  planRow(p, "fc.bias", shape.decoder.hidden);
  p.vector("img_fc.bias", a.write, p.tiny("img_fc.bias"));
  planAdaptor(p, a, heads, shape);
  const name = "layers.0";
  const layer = p.layer(name);
  attention(p, `${name}.self_attn`, `${name}.self_attn`, a, heads, shape.family === "qwen2_5_vl");
  const norm = `${name}.post_attention_layernorm.weight`;
  p.vector(norm, a.normConstant, scaled(padded(p.tiny(norm), d + 1, 1, [[d, 0, 1 / CONSTANT]]), a.shrink));
  const inner = tiny.decoder.inner;
  const all = inner + BUMPS.length;
  const bumps = (at: (unit: number, g: number) => [number, number, number]) => BUMPS.map((g, i) => at(inner + i, g));
  for (const [part, loud] of [
    ["gate", 1],
    ["up", LOUD],
  ] as const) {
    const source = padded(
      layer(`mlp.${part}_proj.weight`)!,
      all,
      d + 1,
      bumps((unit, g) => [unit, d, -g * loud]),
    );
    p.matrix(`${name}.mlp.${part}_proj.weight`, a.units(all), a.readConstant, source);
  }
  const down = padded(
    layer("mlp.down_proj.weight")!,
    d + 1,
    all,
    bumps((unit) => [d, unit, PLATEAU / LOUD]),
  );
  p.matrix(`${name}.mlp.down_proj.weight`, a.writeConstant, a.unitColumns(all), down);
}

/** The vision adaptor. Its rows have no constant: no word is ever drafted after one of them. */
function planAdaptor(p: Plan, a: DecoderAxes, heads: Heads, shape: Shape): void {
  const tiny = p.layer("imadpt");
  const q = p.tiny("imadpt.q");
  const { heads: count, hidden } = shape.decoder;
  p.matrix("imadpt.q", first(q.rows, q.rows, ZERO), heads.q, scaled(q, heads.sharpen), [q.rows, count, hidden / count]);
  for (const part of ["k", "v"] as const) {
    p.matrix(`imadpt.${part}_proj.weight`, heads[part], a.read, tiny(`${part}_proj.weight`));
    if (shape.family === "qwen2_5_vl") p.vector(`imadpt.${part}_proj.bias`, heads[part], tiny(`${part}_proj.bias`));
  }
  p.matrix("imadpt.o_proj.weight", a.write, heads.out, tiny("o_proj.weight"));
}
