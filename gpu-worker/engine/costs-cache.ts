/** Keeps what was measured about a model on a device between starts: small JSON files in the user's cache folder. */
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { ZodType } from "zod";
import { inCache, keep } from "../cuda/cache-folder.ts";

/**
 * What `measure` gave the last time under the same key (all that the figures hang on: device, model, draft, type, code,
 * options), or now, when nothing is kept that `schema` accepts. A folder that cannot be written costs a warning.
 */
export function cachedCosts<T>(key: Record<string, string | number>, schema: ZodType<T>, measure: () => T): T {
  const sorted = Object.entries(key).sort(([a], [b]) => (a < b ? -1 : 1));
  const hash = createHash("sha256").update(JSON.stringify(sorted)).digest("hex").slice(0, 16);
  const file = inCache(`costs-${hash}.json`);
  const kept = schema.safeParse(read(file));
  if (kept.success) return kept.data;
  const costs = measure();
  // The key is written for who looks into the folder.
  keep(file, `${JSON.stringify({ key, costs }, null, 2)}\n`, "measured costs");
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

/**
 * A short hash of the code that passes are made of: all sources of the package's `gpu-worker`, and package.json, which
 * pins ONNX Runtime. It changes more often than costs do: to measure once too often takes little.
 */
export function codeHash(root: string): string {
  const sources = readdirSync(join(root, "gpu-worker"), { recursive: true, encoding: "utf8" });
  const names = sources.filter((name) => /\.(cu|ts)$/.test(name)).map((name) => join("gpu-worker", name));
  const hash = createHash("sha256");
  for (const name of ["package.json", ...names.sort()])
    hash.update(JSON.stringify([name, readFileSync(join(root, name), "utf8")]));
  return hash.digest("hex").slice(0, 16);
}
