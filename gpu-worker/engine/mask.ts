/** Attention masks of trees. Knows parents, no tokens. */

/**
 * Writes the attention mask of nodes `first` … n-1 into rows 0, 1, … of `bias`, columns `from` … from+n-1: 0 where the
 * row's node sees the column's (itself and its ancestors), -Infinity elsewhere. `stride` is the length of a row.
 */
export function writeTreeMask(
  bias: Float32Array,
  stride: number,
  from: number,
  parents: readonly number[],
  first = 0,
): void {
  for (let i = first; i < parents.length; i++) {
    const row = (i - first) * stride + from;
    bias.fill(Number.NEGATIVE_INFINITY, row, row + parents.length);
    for (let j = i; j >= 0; j = parents[j]) bias[row + j] = 0;
  }
}
