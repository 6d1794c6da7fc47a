/** Who may run next: by priority, then lanes in turn, each first come first served. Knows nothing of what runs. */
import { ApiError } from "../../shared/errors.ts";
import type { Priority } from "../../shared/protocol.ts";

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
  /** How many places there are beside those, in all and for one lane of one priority. */
  waiting?: number;
  lane?: number;
}

/** Turns that interactive ones get while batch ones wait; then one of these has its turn, for they are not to starve. */
const BEFORE_BATCH = 8;

/**
 * Gives turns to interactive ones before batch ones, and among either to lanes round-robin, so that a tenant's hundred
 * requests delay another's first by one at most. Places are bounded, and those of one lane more tightly, so that no tenant
 * can fill the queue alone; by priority, so that its batch requests do not keep out its interactive ones.
 */
export class FairQueue {
  /** Lanes that wait for a turn, in the order of their next one (a Map keeps insertion order). */
  readonly #lanes = { interactive: new Map<string, Waiting[]>(), batch: new Map<string, Waiting[]>() };
  /** How many places have been taken, by priority and lane. */
  readonly #taken = new Map<string, number>();
  /** How many have a place and no turn. */
  readonly #waiting = { interactive: 0, batch: 0 };
  readonly #most: { running: number; waiting: number; lane: number };
  #places = 0;
  #running = 0;
  /** Turns that batch ones have waited for since they last had one. */
  #passedOver = 0;
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

  /** The same of one priority. */
  waitingOf(priority: Priority): number {
    return this.#waiting[priority];
  }

  /** Takes a place. Throws ApiError 429 when all places, or all of this lane and priority, are taken. */
  enter(lane: string, priority: Priority = "interactive"): Place {
    const key = `${priority} ${lane}`;
    const taken = this.#taken.get(key) ?? 0;
    const { running, waiting, lane: ofLane } = this.#most;
    if (this.#places >= waiting + running) throw this.#full("requests wait");
    // Else batch ones of several tenants could leave no place for interactive ones.
    if (priority === "batch" && this.#waiting.batch >= waiting / 2 + running) throw this.#full("requests wait");
    if (taken >= ofLane + running) throw this.#full("of your requests wait", taken);
    this.#places++;
    this.#taken.set(key, taken + 1);
    this.#waiting[priority]++;
    let began: number | null = null;
    let left = false;
    return {
      turn: async (signal) => {
        await this.#turn(this.#lanes[priority], lane, signal);
        this.#waiting[priority]--;
        began = performance.now();
      },
      [Symbol.dispose]: () => {
        if (left) return;
        left = true;
        this.#leave(key);
        if (began !== null) this.#passOn(performance.now() - began);
        else this.#waiting[priority]--;
      },
    };
  }

  #full(what: string, count = this.waiting): ApiError {
    const ms = (this.#meanTurn * this.waiting) / this.#most.running;
    const retryAfter = Math.max(1, Math.ceil(ms / 1000));
    return new ApiError(429, `The queue is full: ${count} ${what}.`, { code: "queue_full", retryAfter });
  }

  #leave(key: string): void {
    this.#places--;
    const rest = this.#taken.get(key)! - 1;
    if (rest > 0) this.#taken.set(key, rest);
    else this.#taken.delete(key);
  }

  async #turn(lanes: Map<string, Waiting[]>, lane: string, signal: AbortSignal): Promise<void> {
    signal.throwIfAborted();
    if (this.#running < this.#most.running) this.#running++;
    else await wait(lanes, lane, signal);
  }

  /** Hands a turn that took so long to the next one, without freeing it in between, so that nobody can cut in. */
  #passOn(took: number): void {
    this.#meanTurn = this.#meanTurn === 0 ? took : 0.9 * this.#meanTurn + 0.1 * took;
    const { interactive, batch } = this.#lanes;
    const isBatch = batch.size > 0 && (interactive.size === 0 || this.#passedOver === BEFORE_BATCH);
    this.#passedOver = isBatch || batch.size === 0 ? 0 : this.#passedOver + 1;
    const next = takeNext(isBatch ? batch : interactive);
    if (next) next.start();
    else this.#running--;
  }
}

function wait(lanes: Map<string, Waiting[]>, lane: string, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const leave = () => {
      const queue = lanes.get(lane)!.filter((other) => other !== waiting);
      // Setting an existing key keeps the lane's place in the round.
      if (queue.length > 0) lanes.set(lane, queue);
      else lanes.delete(lane);
      reject(signal.reason);
    };
    const waiting = {
      start: () => {
        signal.removeEventListener("abort", leave);
        resolve();
      },
    };
    signal.addEventListener("abort", leave, { once: true });
    const queue = lanes.get(lane);
    if (queue) queue.push(waiting);
    else lanes.set(lane, [waiting]);
  });
}

/** Takes out the first of the lane whose turn it is. */
function takeNext(lanes: Map<string, Waiting[]>): Waiting | undefined {
  const next = lanes.entries().next().value;
  if (!next) return undefined;
  const [lane, queue] = next;
  const waiting = queue.shift();
  lanes.delete(lane);
  if (queue.length > 0) lanes.set(lane, queue); // to the end of the round
  return waiting;
}
