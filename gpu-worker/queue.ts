/** Who may run next: lanes in turn, each first come first served. Knows nothing of what runs. */

interface Waiting {
  start: () => void;
}

/** Gives turns to lanes round-robin, so that a tenant's hundred requests delay another's first by one at most. */
export class FairQueue {
  /** Lanes that wait, in the order of their next turn (a Map keeps insertion order). */
  readonly #lanes = new Map<string, Waiting[]>();
  #free: number;

  /** `running`: how many turns may be held at once. */
  constructor(running = 1) {
    this.#free = running;
  }

  /** How many wait. */
  get waiting(): number {
    return [...this.#lanes.values()].reduce((sum, lane) => sum + lane.length, 0);
  }

  /** Waits for a turn of the lane; disposing of the turn passes it on. Rejects with the signal's reason on abort. */
  async turn(lane: string, signal: AbortSignal): Promise<Disposable> {
    signal.throwIfAborted();
    if (this.#free > 0) this.#free--;
    else await this.#wait(lane, signal);
    let held = true;
    return {
      [Symbol.dispose]: () => {
        if (held) this.#passOn();
        held = false;
      },
    };
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

  /** Hands the turn to the next lane without freeing it in between, so nobody can cut in. */
  #passOn(): void {
    const next = this.#lanes.entries().next().value;
    if (!next) {
      this.#free++;
      return;
    }
    const [lane, queue] = next;
    const waiting = queue.shift()!;
    this.#lanes.delete(lane);
    if (queue.length > 0) this.#lanes.set(lane, queue); // to the end of the round
    waiting.start();
  }
}
