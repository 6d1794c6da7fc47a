/** Normalisations, in ONNX Runtime's fused kernels. */
import type { Graph, Value } from "../graph/graph.ts";
import { CUSTOM_DOMAIN } from "../graph/onnx.ts";

/** (x − mean) / standard deviation · weight + bias over the last axis. */
export function layerNorm(g: Graph, x: Value, weight: Value, bias: Value, epsilon: number): Value {
  const attributes = { axis: -1, epsilon: { float: epsilon } };
  return g.node("LayerNormalization", [x, weight, bias], [{ dtype: x.dtype, shape: x.shape }], attributes)[0];
}

/** x / rms(x) · weight over the last axis (Qwen2RMSNorm, LlamaRMSNorm). */
export function rmsNorm(g: Graph, x: Value, weight: Value, epsilon: number): Value {
  const attributes = { axis: -1, epsilon: { float: epsilon } };
  return g.node("SimplifiedLayerNormalization", [x, weight], [{ dtype: x.dtype, shape: x.shape }], attributes)[0];
}

/** Operator of our own for an epsilon. */
export const normName = (epsilon: number) => `AddRmsNorm${String(epsilon).replace(/\W/g, "_")}`;

/** The sum x + residual, and its RMS norm, in one kernel; where operators are our own the residual may be null. */
export function addRmsNorm(
  g: Graph,
  x: Value,
  residual: Value | null,
  weight: Value,
  epsilon: number,
): [norm: Value, sum: Value] {
  const out = { dtype: x.dtype, shape: x.shape };
  if (g.binds) {
    const [norm, sum] = g.node(normName(epsilon), [x, residual, weight], [out, out], {}, CUSTOM_DOMAIN);
    return [norm, sum];
  }
  const [norm, , , sum] = g.node(
    "SkipSimplifiedLayerNormalization",
    [x, residual, weight],
    [out, { dtype: "f32", shape: [0] }, { dtype: "f32", shape: [0] }, out],
    { epsilon: { float: epsilon } },
    "com.microsoft",
  );
  return [norm, sum];
}
