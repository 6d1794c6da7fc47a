/** Finds stop strings in text that comes in pieces. Knows no tokens. */

/** Holds back what may be the beginning of a stop string; gives text that comes before any. */
export class StopStrings {
  readonly #stops: readonly string[];
  #held = "";

  constructor(stops: readonly string[]) {
    this.#stops = stops;
  }

  /** The text that is final now; `stopped` when a stop string was completed, which cuts the text before it. */
  push(text: string): { text: string; stopped: boolean } {
    if (this.#stops.length === 0 || text === "") return { text, stopped: false };
    const all = this.#held + text;
    const cuts = this.#stops.map((stop) => all.indexOf(stop)).filter((at) => at >= 0);
    if (cuts.length > 0) return { text: all.slice(0, Math.min(...cuts)), stopped: true };
    const keep = Math.max(...this.#stops.map((stop) => overlap(all, stop)));
    this.#held = all.slice(all.length - keep);
    return { text: all.slice(0, all.length - keep), stopped: false };
  }

  /** What was held back and turned out to be no stop string. */
  flush(): string {
    const text = this.#held;
    this.#held = "";
    return text;
  }
}

/** Length of the longest end of `text` that is a beginning of `stop`. */
function overlap(text: string, stop: string): number {
  for (let n = Math.min(stop.length - 1, text.length); n > 0; n--) if (text.endsWith(stop.slice(0, n))) return n;
  return 0;
}
