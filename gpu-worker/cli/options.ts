/** Reads the command line: flags to checked values. A mistake is a UsageError that names the flag. */
import { parseArgs } from "node:util";
import type { TreeShape } from "../decode/drafters/plan.ts";
import { MOST_SEQUENCES } from "../engine/batch.ts";
import type { EngineOptions } from "../engine-local.ts";

export class UsageError extends Error {
  override name = "UsageError";
}

/** What `parseArgs` gives for flags that all take a value, but for the switches. */
export type Flags = Record<string, string | boolean | (string | boolean)[] | undefined>;

export const DEFAULT_MODEL = "models/tiny-qwen2.5-vl";

/** What `engineOptions` reads; and `prefix-cache` and `kv-cache`, where requests are served. */
export const MODEL_FLAGS = [
  "model",
  "draft",
  "drafter",
  "total-token",
  "depth",
  "top-k-draft",
  "device",
  "threads",
  "context",
  "dtype",
  "draft-vocab",
];

/** Flags of a command: `values` take one, `lists` may come several times, `switches` take none. */
export function parseFlags(args: string[], values: string[], lists: string[] = [], switches: string[] = []): Flags {
  const options = {
    ...Object.fromEntries(values.map((name) => [name, { type: "string" as const }])),
    ...Object.fromEntries(lists.map((name) => [name, { type: "string" as const, multiple: true }])),
    ...Object.fromEntries(switches.map((name) => [name, { type: "boolean" as const }])),
  };
  try {
    return parseArgs({ args, options, strict: true, allowPositionals: false }).values as Flags;
  } catch (error) {
    throw new UsageError((error as Error).message.replaceAll("\n", " "), { cause: error });
  }
}

/** A number within bounds, or undefined when the flag is absent. */
export function number(
  flags: Flags,
  name: string,
  { min, max = Number.MAX_SAFE_INTEGER, integer = true }: { min: number; max?: number; integer?: boolean },
): number | undefined {
  const text = flags[name];
  if (text === undefined) return undefined;
  const value = String(text).trim() === "" ? Number.NaN : Number(text);
  const kind = integer ? "a whole number" : "a number";
  if (Number.isNaN(value) || value < min || value > max || (integer && !Number.isInteger(value)))
    throw new UsageError(`--${name} is ${text}; it must be ${kind} from ${min} to ${max}`);
  return value;
}

/** One of the choices, or undefined when the flag is absent. */
export function oneOf<T extends string>(flags: Flags, name: string, choices: readonly T[]): T | undefined {
  const value = flags[name];
  if (value === undefined) return undefined;
  if (!choices.includes(value as T))
    throw new UsageError(`--${name} is ${value}; it must be one of ${choices.join(", ")}`);
  return value as T;
}

/** Tokens that a draft must be able to propose: more than a node has children. */
const LEAST_VOCABULARY = 64;
/** The largest trees: those of a GPU are grown by kernels of fixed sizes (cuda/tree.cu). */
const MOST = { cuda: { nodes: 128, depth: 8, topK: 10 }, others: { nodes: 1024, depth: 64, topK: 64 } };

/** The tree, if any of its flags is given; the others are then the paper's defaults. */
function treeShape(flags: Flags, device: EngineOptions["device"]): TreeShape | undefined {
  const most = device === "cuda" ? MOST.cuda : MOST.others;
  const totalToken = number(flags, "total-token", { min: 1, max: most.nodes });
  const depth = number(flags, "depth", { min: 0, max: most.depth });
  const topK = number(flags, "top-k-draft", { min: 1, max: most.topK });
  if (totalToken === undefined && depth === undefined && topK === undefined) return undefined;
  return { totalToken: totalToken ?? 30, depth: depth ?? 3, topK: topK ?? 8 };
}

export function engineOptions(flags: Flags): EngineOptions {
  const device = oneOf(flags, "device", ["cpu", "cuda", "webgpu"]);
  for (const name of ["dtype", "draft-vocab"])
    if (flags[name] !== undefined && device !== "cuda") throw new UsageError(`--${name} is for --device cuda`);
  const prefixMiB = number(flags, "prefix-cache", { min: 0, max: 2 ** 20 });
  if (prefixMiB !== undefined && device === "webgpu") throw new UsageError("--prefix-cache is not for --device webgpu");
  const kvMiB = number(flags, "kv-cache", { min: 1, max: 2 ** 20 });
  if (kvMiB !== undefined && device === "webgpu") throw new UsageError("--kv-cache is not for --device webgpu");
  const concurrency = number(flags, "concurrency", { min: 1, max: MOST_SEQUENCES });
  if ((concurrency ?? 1) > 1 && device === "webgpu")
    throw new UsageError(`--concurrency is ${concurrency}; more than 1 is not for --device webgpu`);
  const draftVocabulary = number(flags, "draft-vocab", { min: 0 });
  if (draftVocabulary && draftVocabulary < LEAST_VOCABULARY)
    throw new UsageError(`--draft-vocab is ${draftVocabulary}; it must be 0, for all, or at least ${LEAST_VOCABULARY}`);
  return {
    model: (flags.model as string | undefined) ?? DEFAULT_MODEL,
    draft: flags.draft as string | undefined,
    drafter: oneOf(flags, "drafter", ["vispec", "none"]),
    shape: treeShape(flags, device),
    device,
    threads: number(flags, "threads", { min: 1, max: 1024 }),
    concurrency,
    prefixBytes: prefixMiB && prefixMiB * 2 ** 20,
    kvBytes: kvMiB && kvMiB * 2 ** 20,
    context: number(flags, "context", { min: 2 }),
    dtype: oneOf(flags, "dtype", ["f32", "f16", "bf16"]),
    draftVocabulary,
  };
}
