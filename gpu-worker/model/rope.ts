/** Tables of rotary angles. */

/** Frequencies of a rotary embedding of `size` dimensions: theta^(-2i/size), in float32 as HF computes them. */
export function frequencies(size: number, theta: number): Float32Array {
  return Float32Array.from({ length: size / 2 }, (_, i) => 1 / Math.fround(theta ** Math.fround((2 * i) / size)));
}

/** cos and sin of position × frequency, [positions, frequencies] each; the angle is rounded to float32 as HF's is. */
export function ropeTable(positions: number, frequency: Float32Array): { cos: Float32Array; sin: Float32Array } {
  const n = frequency.length;
  const [cos, sin] = [new Float32Array(positions * n), new Float32Array(positions * n)];
  for (let p = 0; p < positions; p++)
    for (let i = 0; i < n; i++) {
      const angle = Math.fround(p * frequency[i]);
      cos[p * n + i] = Math.cos(angle);
      sin[p * n + i] = Math.sin(angle);
    }
  return { cos, sin };
}
