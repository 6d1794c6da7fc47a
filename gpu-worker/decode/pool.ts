/** Rows of KV cache in blocks of a fixed pool: who is admitted, who grows, and who gives way. Knows no memory. */
import { ApiError } from "../../shared/errors.ts";

export const BLOCK_ROWS = 64;

/**
 * Requests come in by what is free, first come first served. One that grows beyond what is free has the youngest give way:
 * it drops its rows and computes them again when there is room, before new ones. The oldest never gives way, so there is
 * always one that comes to its end.
 */
export class KvPool {
  readonly blocks: number;
  /** How often one gave way. */
  preemptions = 0;
  /** In order of admission. */
  readonly #held: Room[] = [];
  readonly #queue: symbol[] = [];
  readonly #most: number;
  #growing = 0;
  #changed = Promise.withResolvers<void>();

  /** `most`: how many have rooms at the same time. */
  constructor(rows: number, most = Number.POSITIVE_INFINITY) {
    this.blocks = Math.floor(rows / BLOCK_ROWS);
    this.#most = most;
  }

  /** Blocks in use. */
  get used(): number {
    return this.#held.reduce((sum, { blocks }) => sum + blocks, 0);
  }

  /**
   * Waits for room for so many rows; `again`: before all who were not admitted yet. Rejects with ApiError 400 when the pool
   * is smaller than that, and with the signal's reason.
   */
  async admit(rows: number, signal: AbortSignal, again = false): Promise<Room> {
    const wanted = this.#blocksOf(rows);
    const ticket = Symbol();
    if (again) this.#queue.unshift(ticket);
    else this.#queue.push(ticket);
    try {
      while (this.#queue[0] !== ticket || this.#growing > 0 || !this.#hasRoom(wanted)) await this.#change(signal);
    } finally {
      this.#queue.splice(this.#queue.indexOf(ticket), 1);
      this.#tell();
    }
    const room = new Room(this, wanted);
    this.#held.push(room);
    return room;
  }

  #hasRoom(blocks: number): boolean {
    return this.#held.length < this.#most && this.blocks - this.used >= blocks;
  }

  #blocksOf(rows: number): number {
    const blocks = Math.ceil(rows / BLOCK_ROWS);
    if (blocks <= this.blocks) return blocks;
    const why = `the request needs ${rows} rows of KV cache; there are ${this.blocks * BLOCK_ROWS}`;
    throw new ApiError(400, why, { code: "context_length_exceeded" });
  }

  /** Room's. */
  async grow(room: Room, rows: number, signal: AbortSignal): Promise<boolean> {
    const wanted = this.#blocksOf(rows);
    if (wanted <= room.blocks || room.gaveWay) return !room.gaveWay;
    this.#growing++;
    try {
      while (!room.gaveWay && this.blocks - this.used < wanted - room.blocks) {
        this.#makeWay(wanted - room.blocks);
        if (!room.gaveWay) await this.#change(signal);
      }
    } finally {
      this.#growing--;
      this.#tell();
    }
    if (!room.gaveWay) room.blocks = wanted;
    return !room.gaveWay;
  }

  /** Room's. */
  growNow(room: Room, rows: number): boolean {
    if (room.gaveWay) return false;
    const more = Math.ceil(rows / BLOCK_ROWS) - room.blocks;
    // Not before one that waits.
    if (more > 0 && (this.#growing > 0 || this.blocks - this.used < more)) return false;
    room.blocks += Math.max(0, more);
    return true;
  }

  /** Asks the youngest for their rooms until so many blocks are free, or will be. */
  #makeWay(blocks: number): void {
    let free = this.blocks - this.used;
    for (const room of this.#held.toReversed()) {
      if (free >= blocks) return;
      if (!room.gaveWay) this.preemptions++;
      room.gaveWay = true;
      free += room.blocks;
    }
  }

  /** Room's. */
  leave(room: Room): void {
    const at = this.#held.indexOf(room);
    if (at < 0) return;
    this.#held.splice(at, 1);
    this.#tell();
  }

  #tell(): void {
    this.#changed.resolve();
    this.#changed = Promise.withResolvers();
  }

  async #change(signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    const leave = () => this.#tell();
    signal.addEventListener("abort", leave, { once: true });
    await this.#changed.promise;
    signal.removeEventListener("abort", leave);
    signal.throwIfAborted();
  }
}

/** What one sequence holds; disposing of it gives it back. */
export class Room implements Disposable {
  blocks: number;
  /** Whether it has to be given back, for another that grows. */
  gaveWay = false;
  readonly #pool: KvPool;

  constructor(pool: KvPool, blocks: number) {
    this.#pool = pool;
    this.blocks = blocks;
  }

  /** Grows to so many rows if that takes no waiting; whether it has them now. */
  growNow(rows: number): boolean {
    return this.#pool.growNow(this, rows);
  }

  /** Grows to so many rows; false: it has to be given back instead. Rejects as `admit`. */
  grow(rows: number, signal: AbortSignal): Promise<boolean> {
    return this.#pool.grow(this, rows, signal);
  }

  [Symbol.dispose](): void {
    this.#pool.leave(this);
  }
}
