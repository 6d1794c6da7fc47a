/** Shows how far long work is: a bar on a terminal, lines in a log. Writes to standard error only. */

const BAR = 30;
const EVERY_MS = { terminal: 100, log: 10_000 };

export const formatBytes = (bytes: number) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let [value, unit] = [bytes, 0];
  for (; value >= 1000 && unit < units.length - 1; unit++) value /= 1000;
  return `${unit === 0 ? value : value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${units[unit]}`;
};

/** Progress of `total` bytes under the name `what`; `done` says how many there are already. */
export class Progress {
  readonly #what: string;
  readonly #total: number;
  readonly #begun = performance.now();
  readonly #terminal = process.stderr.isTTY === true;
  readonly #first: number;
  #done: number;
  #shown = Number.NEGATIVE_INFINITY;

  constructor(what: string, total: number, done = 0) {
    this.#what = what;
    this.#total = total;
    this.#done = this.#first = done;
  }

  add(bytes: number): void {
    this.#done += bytes;
    const now = performance.now();
    if (now - this.#shown < (this.#terminal ? EVERY_MS.terminal : EVERY_MS.log)) return;
    this.#shown = now;
    this.#show(this.#terminal ? "" : "\n");
  }

  /** Shows the end, once; also of work that was broken off. */
  end(): void {
    this.#show("\n");
  }

  #show(end: string): void {
    const part = this.#total === 0 ? 1 : Math.min(1, this.#done / this.#total);
    const seconds = (performance.now() - this.#begun) / 1000;
    const speed = seconds > 0 ? `, ${formatBytes((this.#done - this.#first) / seconds)}/s` : "";
    const size = `${formatBytes(this.#done)} of ${formatBytes(this.#total)}${speed}`;
    const filled = Math.round(part * BAR);
    const bar = this.#terminal ? `\r\x1b[K${"█".repeat(filled)}${"░".repeat(BAR - filled)} ` : "";
    process.stderr.write(`${bar}${this.#what}: ${(100 * part).toFixed(0)} %, ${size}${end}`);
  }
}
