/** Where tokens stand: Qwen2.5-VL's three-row positions (M-RoPE). */
import { type ExpandedPrompt, expandImages, type ImageShape } from "../family.ts";

/**
 * Expands placeholders and numbers the tokens in three rows: time, height, width (get_rope_index of Qwen2_5_VLModel,
 * still pictures only). The pictures' grids are their merged cells. Throws as expandImages.
 */
export function expandPrompt(
  tokens: readonly number[],
  images: readonly ImageShape[],
  imageToken: number,
): ExpandedPrompt {
  const expanded = expandImages(tokens, images, imageToken);
  const { length } = expanded.tokens;
  const rows = [new Int32Array(length), new Int32Array(length), new Int32Array(length)];
  let [at, next] = [0, 0];
  const text = (end: number) => {
    for (; at < end; at++, next++) for (const row of rows) row[at] = next;
  };
  for (const [i, run] of expanded.images.entries()) {
    text(run.at);
    const [height, width] = images[i].grid!;
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++, at++) {
        rows[0][at] = next;
        rows[1][at] = next + y;
        rows[2][at] = next + x;
      }
    next += Math.max(height, width);
  }
  text(length);
  return { ...expanded, positions: rows, delta: next - length };
}
