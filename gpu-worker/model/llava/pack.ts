/** How LLaVA-NeXT puts a picture's rows together: the whole picture, then the tiles as one grid with line ends. */
import type { Size } from "../pixels.ts";

interface Bounds {
  top: number;
  bottom: number;
  left: number;
  right: number;
}

/** The part of a grid of features that the picture fills, without what padded it to its area (unpad_image). */
export function unpadded(picture: Size, grid: Size): Bounds {
  const wide = picture.width / picture.height > grid.width / grid.height;
  const scale = wide ? grid.width / picture.width : grid.height / picture.height;
  // Rounded to 7 places first, so that 7.999999999 is 8.
  const filled = Math.trunc(Number(((wide ? picture.height : picture.width) * scale).toFixed(7)));
  const cut = Math.floor(((wide ? grid.height : grid.width) - filled) / 2);
  return wide
    ? { top: cut, bottom: grid.height - cut, left: 0, right: grid.width }
    : { top: 0, bottom: grid.height, left: cut, right: grid.width - cut };
}

/** Rows of a picture whose tiles have side × side features: the square's, and the grid's, each line one longer. */
export function packedCount(picture: Size, tiles: Size, side: number): number {
  const { top, bottom, left, right } = unpadded(picture, { width: tiles.width * side, height: tiles.height * side });
  return side * side + (bottom - top) * (right - left + 1);
}

/**
 * Places of the packed rows among the features of all tiles, the whole picture's first; the newline's place is after them
 * (pack_image_features of LlavaNextModel). `tiles`: how many there are across and down.
 */
export function packedRows(picture: Size, tiles: Size, side: number): BigInt64Array {
  const { top, bottom, left, right } = unpadded(picture, { width: tiles.width * side, height: tiles.height * side });
  const each = side * side;
  const newline = each * (1 + tiles.width * tiles.height);
  const rows = new BigInt64Array(packedCount(picture, tiles, side));
  let at = 0;
  for (; at < each; at++) rows[at] = BigInt(at);
  for (let y = top; y < bottom; y++) {
    for (let x = left; x < right; x++) {
      const tile = 1 + Math.floor(y / side) * tiles.width + Math.floor(x / side);
      rows[at++] = BigInt(tile * each + (y % side) * side + (x % side));
    }
    rows[at++] = BigInt(newline);
  }
  return rows;
}
