/** Rows that sequences share, on the GPU. */
import type { Elementwise } from "../../cuda/elementwise.ts";
import type { RowMemory } from "../prefix-cache.ts";
import type { Runtime } from "../runtime.ts";
import { DTYPES, type DType, type Tensor } from "../tensor.ts";

/** Copies are queued, in order with all that writes and reads the rows; freeing memory waits for them. */
export function deviceRows(runtime: Runtime, elementwise: Elementwise, dtype: DType): RowMemory<Tensor> {
  const { bytes } = DTYPES[dtype];
  /** The memory that rooms are parts of, by the first of them. */
  const whole = new WeakMap<Tensor, Tensor>();
  return {
    bytes,
    take(numbers) {
      const all = runtime.tensor(dtype, numbers.reduce((a, b) => a + b, 0), "device"); // biome-ignore format: one line
      let at = all.pointer;
      const rooms = numbers.map((n) => {
        const room = runtime.at(at, dtype, n);
        at += BigInt(n * bytes);
        return room;
      });
      whole.set(rooms[0], all);
      return rooms;
    },
    free: ([first]) => whole.get(first)?.[Symbol.dispose](),
    copy(from, at, to, toAt, count) {
      const row = from.width * bytes;
      elementwise.copyRows(
        to.data.pointer + BigInt(toAt * row),
        from.data.pointer + BigInt(at * row),
        from.heads,
        to.count * row,
        from.count * row,
        count * row,
      );
    },
  };
}
