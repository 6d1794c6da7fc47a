/** The log: one JSON object a line on standard error. Knows nothing of what is logged. */
import { inspect } from "node:util";

export type Log = (level: "info" | "warn" | "error", msg: string, fields?: Record<string, unknown>) => void;

export const logToStderr: Log = (level, msg, fields) => {
  process.stderr.write(`${JSON.stringify({ time: new Date().toISOString(), level, msg, ...fields })}\n`);
};

/** A thrown value with its stack and its causes: for the log alone, since no client may see them. */
export function describeError(thrown: unknown): string {
  return inspect(thrown);
}
