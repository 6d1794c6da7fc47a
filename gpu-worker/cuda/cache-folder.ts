/** The user's cache folder: what can be made again, but takes its time. */
import { randomUUID } from "node:crypto";
import { existsSync, mkdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, join } from "node:path";

/** Path of a name in the folder; neither need be there. */
export function inCache(name: string): string {
  return join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "vispec", name);
}

/**
 * Writes a file of the folder. It appears whole: other processes may start at the same time. Where it cannot be written,
 * a warning says that `what` (a plural) are not kept.
 */
export function keep(file: string, data: string | Uint8Array, what: string): void {
  const temporary = `${file}.${randomUUID()}`;
  try {
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(temporary, data);
    renameSync(temporary, file);
  } catch (error) {
    if (existsSync(temporary)) rmSync(temporary);
    console.warn(`vispec: ${what} are not kept: ${(error as Error).message}`);
  }
}
