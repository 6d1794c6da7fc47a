/** ViSpec's draft model as graphs (design: "ViSpec", NeurIPS 2025, sections 3.2 and 3.3; layout of the published checkpoints). */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { CheckpointError } from "../../shared/errors.ts";
import { Graph, type GraphOptions, type StoredTensor, type Value } from "../graph/graph.ts";
import { add, addPickRows, addRows, logSoftmax, mul, softmax } from "../ops/elementwise.ts";
import { boundProduct, gemm, int8MatMul, matMul } from "../ops/matmul.ts";
import { concat, gather, pairRows, reshape, slice, topK, transpose } from "../ops/shape.ts";
import { parseConfig } from "./config.ts";
import type { FamilyConfig } from "./family.ts";
import {
  cachedAttention,
  cacheInputs,
  type DecoderLayerConfig,
  embedding,
  linear,
  mlpBlock,
  parameter,
} from "./layers.ts";
import { readEntries, readJson, type TensorSource, Weights } from "./weights.ts";

const DraftJson = z.object({
  model_type: z.string().optional(),
  hidden_size: z.int().positive(),
  intermediate_size: z.int().positive(),
  num_attention_heads: z.int().positive(),
  num_hidden_layers: z.literal(1),
  rms_norm_eps: z.number().positive(),
  rope_theta: z.number().default(10000),
  vocab_size: z.int().positive(),
  qkv_bias: z.boolean().optional(),
});

type DraftJson = z.output<typeof DraftJson>;

export interface DraftConfig extends DecoderLayerConfig {
  ropeTheta: number;
  vocabulary: number;
  /** Queries of the vision adaptor: num_q - 1 rows an image, and the global vector. */
  queries: number;
}

/** What a draft has to know of its target. */
export interface DraftTarget {
  /** The model_type of its config.json. */
  type: string;
  config: Pick<FamilyConfig, "language" | "names" | "ropeTheta">;
  weights: TensorSource;
}

/** Architectures that published drafts name as their target's. */
const TARGETS = ["qwen2_5_vl", "llava_next", "llava"];
const EMBEDDING = "embed_tokens.weight";

/** Names of a draft's tensors, but for the embedding, which may be the target's. */
function tensorNames(qkvBias: boolean): string[] {
  const attention = (name: string, parts: string) =>
    [...parts].flatMap((p) => [
      `${name}.${p}_proj.weight`,
      ...(qkvBias && p !== "o" ? [`${name}.${p}_proj.bias`] : []),
    ]);
  return [
    ...["fc.weight", "fc.bias", "img_fc.weight", "img_fc.bias", "imadpt.q", "layers.0.post_attention_layernorm.weight"],
    ...["gate", "up", "down"].map((part) => `layers.0.mlp.${part}_proj.weight`),
    ...attention("layers.0.self_attn", "qkvo"),
    ...attention("imadpt", "kvo"),
  ];
}

/**
 * A draft's config and weights, checked against the target it is to draft for; `source` stands in for the folder's
 * tensors. Published drafts may lack config.json, which then comes from their tensors' shapes and the target's config,
 * and the embedding, a frozen copy of the target's, which then serves. Throws CheckpointError naming the field, or all
 * tensors that are absent; tensors that no draft has are ignored, with a warning.
 */
export function loadDraft(
  folder: string,
  target: DraftTarget,
  source?: TensorSource,
): { config: DraftConfig; weights: TensorSource } {
  const file = join(folder, "config.json");
  const own = source ?? new Weights(folder);
  const given = existsSync(file) ? parseConfig(DraftJson, readJson(file), file) : undefined;
  const qkvBias = given?.qkv_bias ?? own.has("layers.0.self_attn.q_proj.bias");
  const absent = tensorNames(qkvBias).filter((name) => !own.has(name));
  if (absent.length > 0) throw new CheckpointError(`${folder} lacks tensors of a draft: ${absent.join(", ")}`);
  const json = given ?? impliedJson(own, target);
  checkFit(given ? file : folder, json, target);
  const headSize = json.hidden_size / json.num_attention_heads;
  const queries = own.shape("imadpt.q")[0];
  own.get("imadpt.q", [queries, json.num_attention_heads, headSize]);
  const config: DraftConfig = {
    hidden: json.hidden_size,
    inner: json.intermediate_size,
    heads: json.num_attention_heads,
    kvHeads: json.num_attention_heads,
    headSize,
    qkvBias,
    epsilon: json.rms_norm_eps,
    ropeTheta: json.rope_theta,
    vocabulary: json.vocab_size,
    queries,
  };
  const single = join(folder, "model.safetensors");
  const stored = source || !existsSync(single) ? [] : readEntries(single).map(({ name }) => name);
  const extra = extraTensors(config, stored);
  if (extra.length > 0)
    console.warn(`vispec: ${folder}: no draft has these tensors, they are ignored: ${extra.join(", ")}`);
  return { config, weights: own.has(EMBEDDING) ? own : withEmbedding(own, target) };
}

/** Those of the names that are no tensor of a draft. */
export function extraTensors({ qkvBias }: DraftConfig, names: Iterable<string>): string[] {
  const known = new Set([EMBEDDING, ...tensorNames(qkvBias)]);
  return [...names].filter((name) => !known.has(name));
}

/** What a draft's config.json would say, as far as its tensors and its target tell. */
function impliedJson(own: TensorSource, { type, config: { language, ropeTheta } }: DraftTarget): DraftJson {
  return {
    model_type: type,
    hidden_size: own.shape("fc.weight")[0],
    intermediate_size: own.shape("layers.0.mlp.gate_proj.weight")[0],
    num_attention_heads: own.shape("imadpt.q")[1],
    num_hidden_layers: 1,
    rms_norm_eps: language.epsilon,
    rope_theta: ropeTheta,
    vocab_size: own.has(EMBEDDING) ? own.shape(EMBEDDING)[0] : language.vocabulary,
  };
}

function checkFit(where: string, json: DraftJson, { type, config: { language } }: DraftTarget): void {
  const family = TARGETS.includes(json.model_type ?? "") ? json.model_type : type;
  const checks: [string, number | string | undefined, number | string][] = [
    ["model_type", family, type],
    ["hidden_size", json.hidden_size, language.hidden],
    ["vocab_size", json.vocab_size, language.vocabulary],
  ];
  for (const [field, draft, wanted] of checks)
    if (draft !== wanted)
      throw new CheckpointError(
        `${where}: the draft does not fit its target: ${field} is ${draft}, the target's ${wanted}`,
      );
}

/** A draft's tensors and the target's embedding in place of the copy that it lacks. */
function withEmbedding(own: TensorSource, { config, weights }: DraftTarget): TensorSource {
  const theirs = `${config.names.model}.${EMBEDDING}`;
  return {
    folder: own.folder,
    has: (name) => name === EMBEDDING || own.has(name),
    shape: (name) => (name === EMBEDDING ? weights.shape(theirs) : own.shape(name)),
    get: (name, shape) => (name === EMBEDDING ? weights.get(theirs, shape) : own.get(name, shape)),
  };
}

/** A draft's config.json, for one that came without. */
export function draftJson(c: DraftConfig, type: string): DraftJson {
  return {
    model_type: type,
    hidden_size: c.hidden,
    intermediate_size: c.inner,
    num_attention_heads: c.heads,
    num_hidden_layers: 1,
    rms_norm_eps: c.epsilon,
    rope_theta: c.ropeTheta,
    vocab_size: c.vocabulary,
    qkv_bias: c.qkvBias,
  };
}

/** Our own attention for the draft's heads. */
export const DRAFT_ATTENTION = "DraftAttention";

const parts = (w: TensorSource, d: number) => ({
  fc: w.get("fc.weight", [d, 2 * d]),
  fcBias: w.get("fc.bias", [d]),
  imgFc: w.get("img_fc.weight", [d, 2 * d]),
  imgFcBias: w.get("img_fc.bias", [d]),
});

/**
 * One pass of the draft layer over T rows. `fc([e ; img_fc([h ; g])])` is folded into one product with [e ; h] and a
 * bias that holds the global vector's share (`draftBiasGraph`); the fold is computed once, when the session loads.
 * Inputs: ids i64 [T]; hidden [N,D] and hidden_rows i64 [T]: which hidden state goes with each id; keep [T,1]: 0 where
 * the row is the adaptor's, which then comes in as its bias; row_bias [B,D], B = 1 or T; logit_rows i64 [K]; k i64 [1];
 * the cache inputs. Outputs: out [T,D], not normed; log_probs [K,k] and tokens i64 [K,k], the k likeliest in order. Where
 * weights are bound, `folded` [2D,D] is an input too (`foldGraph`), and the last outputs are logits [K,V] of the tokens
 * `vocabulary`, or of all.
 */
export function draftGraph(
  c: DraftConfig,
  w: TensorSource,
  head: StoredTensor,
  options: GraphOptions,
  vocabulary?: readonly number[],
): Graph {
  const g = new Graph(options);
  const d = c.hidden;
  const ids = g.input("ids", "i64", ["T"]);
  const hidden = g.input("hidden", g.dtype, ["N", d]);
  const hiddenRows = g.input("hidden_rows", "i64", ["T"]);
  const keep = g.input("keep", g.dtype, ["T", 1]);
  const rowBias = g.input("row_bias", g.dtype, ["B", d]);
  const logitRows = g.input("logit_rows", "i64", ["K"]);
  const cache = cacheInputs(g, c.headSize, DRAFT_ATTENTION);
  const table = w.get("embed_tokens.weight", [c.vocabulary, d]);
  const kept = g.binds
    ? pairRows(g, keep, g.bind([table]), ids, hidden, hiddenRows)
    : mul(g, concat(g, [embedding(g, table, ids), gather(g, hidden, hiddenRows)], 1), keep);
  const fused = g.binds
    ? addRows(g, boundProduct(g, kept, g.input("folded", g.dtype, [2 * d, d])), rowBias)
    : options.int8
      ? add(g, int8MatMul(g, kept, transpose(g, folded(g, c, w), [1, 0])), rowBias)
      : gemm(g, kept, folded(g, c, w), rowBias);

  const x = g.binds ? fused : reshape(g, fused, [1, -1, d], "T");
  const attended = cachedAttention(g, x, w, "layers.0.self_attn", 0, cache, c);
  const [mlp, sum] = mlpBlock(g, attended, x, w, "layers.0", c);
  if (g.binds) {
    const [out, wanted] = addPickRows(g, mlp, sum, logitRows);
    g.output("out", out);
    g.output("logits", boundProduct(g, wanted, g.bind([head], { turned: true, picked: vocabulary })));
    return g;
  }
  const out = reshape(g, add(g, mlp, sum), [-1, d], "T");
  g.output("out", out);
  const wanted = gather(g, out, logitRows);
  const [logProbs, tokens] = topK(g, logSoftmax(g, linear(g, wanted, [head])), g.input("k", "i64", [1]));
  g.output("log_probs", logProbs);
  g.output("tokens", tokens);
  return g;
}

/** The matrix of [e ; h]: fc_e beside fc_h · img_fc_h, [D,2D]. */
function folded(g: Graph, { hidden: d }: DraftConfig, w: TensorSource): Value {
  const { fc, imgFc } = parts(w, d);
  const fcHidden = slice(g, parameter(g, fc), 1, d, 2 * d);
  const imgHidden = slice(g, parameter(g, imgFc), 1, 0, d);
  return concat(g, [slice(g, parameter(g, fc), 1, 0, d), matMul(g, fcHidden, imgHidden)], 1);
}

/** That matrix, turned, as an output: for where constants are not folded because weights are inputs. */
export function foldGraph(c: DraftConfig, w: TensorSource, options: GraphOptions): Graph {
  const g = new Graph(options);
  g.output("folded", transpose(g, folded(g, c, w), [1, 0]));
  return g;
}

/** The global vector's share of every text row: fc_h · (img_fc_g · g + b_img) + b. global [1,D] to bias [1,D]. */
export function draftBiasGraph(c: DraftConfig, w: TensorSource, options: GraphOptions): Graph {
  const g = new Graph(options);
  const d = c.hidden;
  const { fc, fcBias, imgFc, imgFcBias } = parts(w, d);
  const half = (x: Value) => slice(g, x, 1, d, 2 * d);
  const global = g.input("global", g.dtype, [1, d]);
  const image = gemm(g, global, half(parameter(g, imgFc)), parameter(g, imgFcBias));
  g.output("bias", gemm(g, image, half(parameter(g, fc)), parameter(g, fcBias)));
  return g;
}

/**
 * The vision adaptor: num_q learned queries attend to the input embeddings of one run of image tokens.
 * rows [n,D] to out [num_q,D]; no rotary embedding, no residual.
 */
export function adaptorGraph(c: DraftConfig, w: TensorSource, options: GraphOptions): Graph {
  const g = new Graph(options);
  const d = c.hidden;
  const rows = g.input("rows", g.dtype, ["n", d]);
  const project = (part: string) => {
    const bias = c.qkvBias ? [w.get(`imadpt.${part}_proj.bias`, [d])] : [];
    const y = linear(g, rows, [w.get(`imadpt.${part}_proj.weight`, [d, d])], bias);
    return reshape(g, y, [-1, c.heads, c.headSize], "n");
  };
  // [num_q,heads,head] as [heads,num_q,head], scaled once: this is folded when the session loads.
  const query = parameter(g, w.get("imadpt.q", [c.queries, c.heads, c.headSize]));
  const scale = g.floats([c.headSize ** -0.5]);
  const scaled = transpose(g, mul(g, query, scale), [1, 0, 2]);
  const scores = softmax(g, matMul(g, scaled, transpose(g, project("k"), [1, 2, 0])));
  const mixed = matMul(g, scores, transpose(g, project("v"), [1, 0, 2]));
  const joined = reshape(g, transpose(g, mixed, [1, 0, 2]), [c.queries, d]);
  g.output("out", linear(g, joined, [w.get("imadpt.o_proj.weight", [d, d])]));
  return g;
}
