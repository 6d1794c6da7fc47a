/** Keeps what was measured about a model on a device between starts: small JSON files in the user's cache folder. */
import { createHash, randomUUID } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { join } from "node:path";
import type { ZodType } from "zod";

/**
 * What `measure` gave the last time under the same key (all that the figures hang on: device, model, draft, type, version,
 * options), or now, when nothing is kept that `schema` accepts. A folder that cannot be written costs a warning.
 */
export function cachedCosts<T>(key: Record<string, string | number>, schema: ZodType<T>, measure: () => T): T {
  const sorted = Object.entries(key).sort(([a], [b]) => (a < b ? -1 : 1));
  const hash = createHash("sha256").update(JSON.stringify(sorted)).digest("hex").slice(0, 16);
  const folder = join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "vispec");
  const file = join(folder, `costs-${hash}.json`);
  const kept = schema.safeParse(read(file));
  if (kept.success) return kept.data;
  const costs = measure();
  write(folder, file, { key, costs });
  return costs;
}

/** The costs in the file; undefined when there is none, or it cannot be read. */
function read(file: string): unknown {
  try {
    return JSON.parse(readFileSync(file, "utf8"))?.costs;
  } catch {
    return undefined;
  }
}

/** The key is written for who looks into the folder. The file appears whole: other engines may start at the same time. */
function write(folder: string, file: string, content: object): void {
  const temporary = `${file}.${randomUUID()}`;
  try {
    mkdirSync(folder, { recursive: true });
    writeFileSync(temporary, `${JSON.stringify(content, null, 2)}\n`);
    renameSync(temporary, file);
  } catch (error) {
    if (existsSync(temporary)) rmSync(temporary);
    console.warn(`vispec: measured costs are not kept: ${(error as Error).message}`);
  }
}
