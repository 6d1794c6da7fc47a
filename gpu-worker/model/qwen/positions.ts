/** Where tokens stand: Qwen2.5-VL's three-row positions (M-RoPE), and what the chat template's image placeholders become. */
import { ApiError } from "../../../shared/errors.ts";

/** A prompt with its image placeholders expanded to one token for each row that the vision tower gives. */
export interface ExpandedPrompt {
  tokens: number[];
  /** First token and count of each image's run. */
  images: { at: number; count: number }[];
  /** [S] each: time, height, width. */
  positions: [Int32Array, Int32Array, Int32Array];
  /** The token at index i after the prompt has position i + delta in all rows. */
  delta: number;
}

/**
 * Expands placeholders and numbers the tokens (get_rope_index of Qwen2_5_VLModel, still pictures only).
 * `grids` are the pictures' sizes in merged cells, [height, width] each, in order.
 */
export function expandPrompt(tokens: number[], grids: [number, number][], imageToken: number): ExpandedPrompt {
  const placeholders = tokens.filter((t) => t === imageToken).length;
  if (placeholders !== grids.length)
    throw new ApiError(400, `the prompt has ${placeholders} image placeholders for ${grids.length} images`, {
      code: "image_placeholders",
      param: "messages",
    });
  const out: number[] = [];
  const images: { at: number; count: number }[] = [];
  const rows: [number[], number[], number[]] = [[], [], []];
  let next = 0;
  for (const token of tokens) {
    if (token !== imageToken) {
      for (const row of rows) row.push(next);
      out.push(token);
      next++;
      continue;
    }
    const [height, width] = grids[images.length];
    images.push({ at: out.length, count: height * width });
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) {
        out.push(imageToken);
        rows[0].push(next);
        rows[1].push(next + y);
        rows[2].push(next + x);
      }
    next += Math.max(height, width);
  }
  const positions = rows.map((r) => Int32Array.from(r)) as ExpandedPrompt["positions"];
  return { tokens: out, images, positions, delta: next - out.length };
}
