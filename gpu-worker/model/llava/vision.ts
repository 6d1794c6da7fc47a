/** LLaVA's vision tower, CLIP, and the projector into the decoder's space, as one graph. */
import { Graph, type GraphOptions, type Value } from "../../graph/graph.ts";
import { multiHeadAttention } from "../../ops/attention.ts";
import { add, gelu, quickGelu } from "../../ops/elementwise.ts";
import { matMul } from "../../ops/matmul.ts";
import { layerNorm } from "../../ops/norm.ts";
import { concat, gather, padFront, reshape, slice, split, transpose } from "../../ops/shape.ts";
import { linear, parameter } from "../layers.ts";
import { type Normalization, numbersOf } from "../pixels.ts";
import type { TensorSource } from "../weights.ts";
import type { VisionConfig } from "./config.ts";

/**
 * Tiles of one picture to the rows that take its image tokens' places (CLIPVisionTransformer without its last layers,
 * LlavaNextMultiModalProjector). Inputs: pixels [tiles,3,S,S]; with a newline pack i64 [R]: the place of each row among the
 * tiles' features, one tile after the other, with the newline after all of them (pack_image_features of LlavaNextModel is
 * this selection). A graph that binds its weights takes pixels u8 [tiles,S,S,3], levels. Output: rows [R,out]; without
 * a newline the features as they are, [tiles·patches,out].
 */
export function visionGraph(
  c: VisionConfig,
  normalization: Normalization,
  w: TensorSource,
  options: GraphOptions,
): Graph {
  const g = new Graph(options);
  const patches = (c.tile / c.patch) ** 2;
  const tower = `${c.prefix}vision_tower.vision_model`;
  const norm = (name: string, y: Value) => {
    const part = (p: string) => parameter(g, w.get(`${name}.${p}`, [c.width]));
    return layerNorm(g, y, part("weight"), part("bias"), c.epsilon);
  };
  let x = norm(`${tower}.pre_layrnorm`, embeddings(g, c, normalization, w, `${tower}.embeddings`)); // the tensor's name is spelt so
  for (let i = 0; i < c.layers; i++) {
    const name = `${tower}.encoder.layers.${i}`;
    x = add(g, x, attention(g, norm(`${name}.layer_norm1`, x), c, w, `${name}.self_attn`));
    const inner = quickGelu(g, dense(g, norm(`${name}.layer_norm2`, x), w, [`${name}.mlp.fc1`], c.width, c.inner));
    x = add(g, x, dense(g, inner, w, [`${name}.mlp.fc2`], c.inner, c.width));
  }
  const features = reshape(g, slice(g, x, 1, 1, 1 + patches), [-1, c.width], "features"); // without the class token
  const projector = `${c.prefix}multi_modal_projector`;
  const wide = gelu(g, dense(g, features, w, [`${projector}.linear_1`], c.width, c.out));
  const rows = dense(g, wide, w, [`${projector}.linear_2`], c.out, c.out);
  if (!c.newline) g.output("rows", rows);
  else {
    const newline = parameter(g, w.get(`${c.prefix}image_newline`, [c.out]));
    const pack = g.input("pack", "i64", ["R"]);
    g.output("rows", gather(g, concat(g, [rows, reshape(g, newline, [1, c.out])], 0), pack));
  }
  return g;
}

/** The input's patches [tiles,side,side,3,p,p]. */
function patchesOf(g: Graph, { tile, patch }: VisionConfig, normalization: Normalization): Value {
  const side = tile / patch;
  const cut = (pixels: Value, dims: number[], perm: number[]) =>
    transpose(g, reshape(g, pixels, [-1, ...dims], "tiles"), perm);
  if (!g.binds)
    return cut(g.input("pixels", g.dtype, ["tiles", 3, tile, tile]), [3, side, patch, side, patch], [0, 2, 4, 1, 3, 5]);
  const levels = g.input("pixels", "u8", ["tiles", tile, tile, 3]);
  return cut(numbersOf(g, levels, normalization), [side, patch, side, patch, 3], [0, 1, 3, 5, 2, 4]);
}

/** CLIPVisionEmbeddings: the class token and each patch, at their places. [tiles,1+patches,width]. */
function embeddings(g: Graph, c: VisionConfig, normalization: Normalization, w: TensorSource, name: string): Value {
  const side = c.tile / c.patch;
  const numbers = 3 * c.patch ** 2;
  const cells = patchesOf(g, c, normalization);
  const kernel = parameter(g, w.get(`${name}.patch_embedding.weight`, [c.width, 3, c.patch, c.patch]));
  const matrix = transpose(g, reshape(g, kernel, [c.width, numbers]), [1, 0]);
  const patches = matMul(g, reshape(g, cells, [-1, side * side, numbers], "tiles"), matrix);
  const places = parameter(g, w.get(`${name}.position_embedding.weight`, [1 + side * side, c.width]));
  const token = reshape(g, parameter(g, w.get(`${name}.class_embedding`, [c.width])), [1, c.width]);
  const first = add(g, slice(g, places, 0, 0, 1), token);
  return add(g, padFront(g, patches, 1), concat(g, [first, slice(g, places, 0, 1, 1 + side * side)], 0));
}

function attention(g: Graph, x: Value, c: VisionConfig, w: TensorSource, name: string): Value {
  const qkv = dense(g, x, w, ["q", "k", "v"].map((p) => `${name}.${p}_proj`), c.width, c.width); // biome-ignore format: one line
  const [q, k, v] = split(g, qkv, [c.width, c.width, c.width]);
  return dense(g, multiHeadAttention(g, q, k, v, null, c.heads), w, [`${name}.out_proj`], c.width, c.width);
}

/** Linear layers with bias, side by side. */
function dense(g: Graph, x: Value, w: TensorSource, names: string[], from: number, to: number): Value {
  const weights = names.map((name) => w.get(`${name}.weight`, [to, from]));
  return linear(g, x, weights, names.map((name) => w.get(`${name}.bias`, [to]))); // biome-ignore format: one line
}
