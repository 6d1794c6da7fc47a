/** Rows that sequences share, on the GPU. */
import type { Elementwise, Planes } from "../../cuda/elementwise.ts";
import type { RowMemory, Rows } from "../prefix-cache.ts";
import type { Runtime } from "../runtime.ts";
import { DTYPES, type DType, type Tensor } from "../tensor.ts";

/** Rows as they follow each other, or in the blocks that a table names. */
export type DeviceRows = Pick<Planes, "base" | "table" | "blockBytes">;

/** Copies are queued, in order with all that writes and reads the rows; freeing memory waits for them. */
export function deviceRows(runtime: Runtime, elementwise: Elementwise, dtype: DType): RowMemory<DeviceRows> {
  const { bytes } = DTYPES[dtype];
  /** The memory that rooms are parts of, by the first of them. */
  const whole = new WeakMap<DeviceRows, Tensor>();
  const planes = ({ data, heads, count, width }: Rows<DeviceRows>) => ({ ...data, planes: heads, count, rowBytes: width * bytes }); // biome-ignore format: one line
  return {
    bytes,
    take(numbers) {
      const all = runtime.tensor(dtype, numbers.reduce((a, b) => a + b, 0), "device"); // biome-ignore format: one line
      let at = all.pointer;
      const rooms = numbers.map((n) => {
        const room = { base: at };
        at += BigInt(n * bytes);
        return room;
      });
      whole.set(rooms[0], all);
      return rooms;
    },
    free: ([first]) => whole.get(first)?.[Symbol.dispose](),
    copy: (from, at, to, toAt, count) => elementwise.copyRows(planes(to), toAt, planes(from), at, count),
  };
}
