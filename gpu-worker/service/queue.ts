/** Who may run next: lanes in turn, each first come first served, within bounds. Knows nothing of what runs. */
import { ApiError } from "../../shared/errors.ts";

interface Waiting {
  start: () => void;
}

/** Disposing of a place gives it up, and passes its turn on if it has one. */
export interface Place extends Disposable {
  /** Waits for this place's turn; asked once. Rejects with the signal's reason on abort. */
  turn(signal: AbortSignal): Promise<void>;
}

export interface QueueOptions {
  /** How many turns may be held at once. */
  running?: number;
  /** How many places there are beside those, in all and for one lane. */
  waiting?: number;
  lane?: number;
}

/**
 * Gives turns to lanes round-robin, so that a tenant's hundred requests delay another's first by one at most. Places are
 * bounded, and those of one lane more tightly, so that no tenant can fill the queue alone.
 */
export class FairQueue {
  /** Lanes that wait for a turn, in the order of their next one (a Map keeps insertion order). */
  readonly #lanes = new Map<string, Waiting[]>();
  /** How many places each lane has taken. */
  readonly #taken = new Map<string, number>();
  readonly #most: { running: number; waiting: number; lane: number };
  #places = 0;
  #running = 0;
  /** Milliseconds that a turn takes: a running mean over some ten of them. */
  #meanTurn = 0;

  constructor({ running = 1, waiting = 256, lane = 64 }: QueueOptions = {}) {
    this.#most = { running, waiting, lane };
  }

  /** How many hold a turn. */
  get running(): number {
    return this.#running;
  }

  /** How many have a place and no turn. */
  get waiting(): number {
    return this.#places - this.#running;
  }

  /** Takes a place. Throws ApiError 429 when all places, or all of this lane, are taken. */
  enter(lane: string): Place {
    const taken = this.#taken.get(lane) ?? 0;
    const { running, waiting, lane: ofLane } = this.#most;
    if (this.#places >= waiting + running) throw this.#full("requests wait");
    if (taken >= ofLane + running) throw this.#full("of your requests wait", taken);
    this.#places++;
    this.#taken.set(lane, taken + 1);
    let began: number | null = null;
    let left = false;
    return {
      turn: async (signal) => {
        await this.#turn(lane, signal);
        began = performance.now();
      },
      [Symbol.dispose]: () => {
        if (left) return;
        left = true;
        this.#leave(lane);
        if (began !== null) this.#passOn(performance.now() - began);
      },
    };
  }

  #full(what: string, count = this.waiting): ApiError {
    const retryAfter = Math.max(1, Math.ceil((this.#meanTurn * this.waiting) / 1000));
    return new ApiError(429, `The queue is full: ${count} ${what}.`, { code: "queue_full", retryAfter });
  }

  #leave(lane: string): void {
    this.#places--;
    const rest = this.#taken.get(lane)! - 1;
    if (rest > 0) this.#taken.set(lane, rest);
    else this.#taken.delete(lane);
  }

  async #turn(lane: string, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    if (this.#running < this.#most.running) this.#running++;
    else await this.#wait(lane, signal);
  }

  #wait(lane: string, signal: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const leave = () => {
        this.#remove(lane, waiting);
        reject(signal.reason);
      };
      const waiting = {
        start: () => {
          signal.removeEventListener("abort", leave);
          resolve();
        },
      };
      signal.addEventListener("abort", leave, { once: true });
      const queue = this.#lanes.get(lane);
      if (queue) queue.push(waiting);
      else this.#lanes.set(lane, [waiting]);
    });
  }

  #remove(lane: string, waiting: Waiting): void {
    const queue = this.#lanes.get(lane)!.filter((other) => other !== waiting);
    // Setting an existing key keeps the lane's place in the round.
    if (queue.length > 0) this.#lanes.set(lane, queue);
    else this.#lanes.delete(lane);
  }

  /** Hands a turn that took so long to the next lane, without freeing it in between, so that nobody can cut in. */
  #passOn(took: number): void {
    this.#meanTurn = this.#meanTurn === 0 ? took : 0.9 * this.#meanTurn + 0.1 * took;
    const next = this.#lanes.entries().next().value;
    if (!next) {
      this.#running--;
      return;
    }
    const [lane, queue] = next;
    const waiting = queue.shift()!;
    this.#lanes.delete(lane);
    if (queue.length > 0) this.#lanes.set(lane, queue); // to the end of the round
    waiting.start();
  }
}
