/** A bucket of tokens that fills within a minute. Knows no clock and nobody who takes. */

const MINUTE = 60_000;

export class Bucket {
  /** When it will be full (ms). It holds whole tokens only in effect: what is kept is a time. */
  #fullAt = 0;

  /** Takes one of `perMinute` tokens at `now` (ms); gives 0, or the whole seconds after which there is one. */
  take(perMinute: number, now: number): number {
    const fullAt = Math.max(this.#fullAt, now) + MINUTE / perMinute;
    const wait = Math.round(fullAt - now - MINUTE);
    if (wait > 0) return Math.ceil(wait / 1000);
    this.#fullAt = fullAt;
    return 0;
  }
}
