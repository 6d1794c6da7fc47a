/** Reading over a network: goes on from the byte where a connection broke. Knows no protocol. */
import { setTimeout } from "node:timers/promises";
import { StoreError } from "./store.ts";

/** Failures in a row, without a byte between, that end an attempt. */
export const TRIES = 5;

/** A failure that may pass; the server may have said after how long. */
export class Passing extends Error {
  readonly waitMs: number | undefined;

  constructor(message: string, waitMs?: number) {
    super(message);
    this.waitMs = waitMs;
  }
}

/** What a failed connection says of itself, in a few words. */
export function reasonOf(error: unknown): string {
  const { code, message } = (error instanceof Error && error.cause ? error.cause : error) as NodeJS.ErrnoException;
  return message || code || String(error);
}

export interface Opened {
  /** The bytes that were asked for, from the first one on. */
  body: AsyncIterable<Uint8Array>;
  /** Bytes of the whole object. */
  size: number;
}

/**
 * Bytes from … to-1 of the object `name`, as ReadableStore.read has it. `open` begins to read at a byte. Whatever it or
 * the body throws may pass, save a StoreError; between two tries are 0.2, 0.4, … s.
 */
export async function* resume(
  name: string,
  { from = 0, to }: { from?: number; to?: number },
  open: (from: number, to: number | undefined) => Promise<Opened>,
  signal?: AbortSignal,
): AsyncGenerator<Uint8Array> {
  let at = from;
  for (let failures = 0; to === undefined || at < to; ) {
    signal?.throwIfAborted();
    let why: unknown = new Passing("it ends early");
    try {
      const { body, size } = await open(at, to);
      to ??= size;
      for await (const chunk of body) {
        if (to > size) throw new StoreError(`${name} has ${size} bytes, not the ${to} that were asked for`);
        if (at + chunk.length > to) throw new StoreError(`${name}: more comes than the bytes that were asked for`);
        at += chunk.length;
        failures = 0;
        yield chunk;
      }
    } catch (error) {
      signal?.throwIfAborted();
      if (error instanceof StoreError) throw error;
      why = error;
    }
    if (to !== undefined && at >= to) return;
    if (++failures === TRIES) throw new StoreError(`${name} cannot be read, tried ${TRIES} times: ${reasonOf(why)}`);
    const ms = why instanceof Passing ? why.waitMs : undefined;
    await setTimeout(ms ?? 100 * 2 ** failures, undefined, { signal }).catch(() => signal?.throwIfAborted());
  }
}
