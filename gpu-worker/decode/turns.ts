/** One at a time, first come first served. */
export class Turns {
  #last: Promise<void> = Promise.resolve();

  /** Waits for those who asked before; disposing of the turn passes it on. Rejects with the signal's reason on abort. */
  async take(signal: AbortSignal): Promise<Disposable> {
    const turn = Promise.withResolvers<void>();
    const gone = Promise.withResolvers<never>();
    const leave = () => gone.reject(signal.reason);
    const before = this.#last;
    this.#last = turn.promise;
    signal.addEventListener("abort", leave);
    try {
      await Promise.race([before, gone.promise]);
      signal.throwIfAborted();
    } catch (reason) {
      void before.then(turn.resolve); // whoever comes after still waits for those before
      throw reason;
    } finally {
      signal.removeEventListener("abort", leave);
    }
    return { [Symbol.dispose]: turn.resolve };
  }
}
