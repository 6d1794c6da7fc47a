export const BENCH_HELP = "vispec bench";
export async function benchCommand(_args: string[], _signal: AbortSignal): Promise<void> {}
