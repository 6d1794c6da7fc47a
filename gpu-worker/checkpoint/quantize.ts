/**
 * Weight-only quantization: the decoder's matrices in 4 or 8 bits, in blocks of 32 along a row, one scale a block and no
 * zero point, laid out as ONNX Runtime's MatMulNBits reads them (model/layers.ts). Embeddings, head, norms, biases and
 * the vision tower stay as they are.
 */
import { BLOCK_SIZE, quantizedNames } from "../model/layers.ts";
import type { TensorInfo } from "../model/safetensors.ts";

export type Bits = 4 | 8;

/** What config.json says of a checkpoint quantized here; Hugging Face's loaders refuse a method that they don't know. */
export const quantizationConfig = (bits: Bits) => ({ quant_method: "vispec", bits, block_size: BLOCK_SIZE });

const MATRICES =
  /^(model\.)?(language_model\.)?(model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$/;

/** Whether a target's tensor is one of those that are quantized. */
export function isQuantized(name: string): boolean {
  return MATRICES.test(name);
}

/** What a matrix [rows,columns] becomes: its integers [rows, blocks, bytes a block] and its scales [rows, blocks]. */
export function quantizedTensors({ name, shape: [rows, columns] }: TensorInfo, bits: Bits): TensorInfo[] {
  const blocks = Math.ceil(columns / BLOCK_SIZE);
  const names = quantizedNames(name);
  return [
    { name: names.packed, dtype: "U8", shape: [rows, blocks, (BLOCK_SIZE * bits) / 8] },
    { name: names.scales, dtype: "F32", shape: [rows, blocks] },
  ];
}

/**
 * Quantizes whole rows, [rows,columns] in float32. A block's scale brings its largest value, with its sign, to the lowest
 * integer (−8 or −128): so all are used. `squares` and `squaredError` are sums over the values, for the error it brings.
 */
export function quantizeRows(values: Float32Array, rows: number, columns: number, bits: Bits) {
  const blocks = Math.ceil(columns / BLOCK_SIZE);
  const zero = 1 << (bits - 1);
  const packed = new Uint8Array((rows * blocks * BLOCK_SIZE * bits) / 8);
  const scales = new Float32Array(rows * blocks);
  let [squares, squaredError] = [0, 0];
  for (let block = 0; block < scales.length; block++) {
    const column = (block % blocks) * BLOCK_SIZE;
    const from = Math.floor(block / blocks) * columns + column;
    const count = Math.min(BLOCK_SIZE, columns - column);
    let largest = 0;
    for (let i = from; i < from + count; i++) if (Math.abs(values[i]) > Math.abs(largest)) largest = values[i];
    const scale = (scales[block] = -largest / zero);
    for (let i = 0; i < BLOCK_SIZE; i++) {
      const value = i < count ? values[from + i] : 0;
      const nearest = scale === 0 ? 0 : Math.min(zero - 1, Math.max(-zero, Math.round(value / scale)));
      const at = block * BLOCK_SIZE + i;
      if (bits === 8) packed[at] = nearest + zero;
      else packed[at >> 1] |= (nearest + zero) << (4 * (at & 1));
      squares += value * value;
      squaredError += (value - nearest * scale) ** 2;
    }
  }
  return { packed, scales, squares, squaredError };
}
