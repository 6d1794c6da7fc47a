/** `vispec import`: a checkpoint from a folder, S3 or a hub into a folder, maybe in another type. */
import { existsSync } from "node:fs";
import { resolve } from "node:path";
import { IMPORT_DTYPES } from "../checkpoint/convert.ts";
import { importCheckpoint } from "../checkpoint/import.ts";
import { isTaken } from "../checkpoint/staging.ts";
import { formatBytes } from "../progress.ts";
import { oneOf, parseFlags, UsageError } from "./options.ts";

export const IMPORT_HELP = `vispec import --model SRC --out DIR [--draft SRC] [--dtype bf16|fp16|fp32|int8|int4]
  SRC is a folder, s3://bucket/prefix, or a hub's org/name; HF_ENDPOINT and HF_TOKEN are honoured. A folder draft in the
  model is its draft. int8 and int4 quantize the decoder's matrices. What is broken off goes on when it is run again.`;

/** Runs the command; `signal` ends it, and what was brought stays for the next run. */
export async function importCommand(args: string[], signal: AbortSignal): Promise<void> {
  const flags = parseFlags(args, ["model", "out", "draft", "dtype"]);
  const { model, draft } = flags as Record<string, string | undefined>;
  if (!model || !flags.out) throw new UsageError("--model and --out are needed");
  const out = resolve(flags.out as string);
  if (isTaken(out)) throw new UsageError(`--out ${out} exists already`);
  const dtype = oneOf(flags, "dtype", IMPORT_DTYPES);
  const { bytes, error } = await importCheckpoint({ model, draft, dtype }, out, signal).catch((error) => {
    if (signal.aborted && existsSync(`${out}.partial`))
      console.error(`what is there stays in ${out}.partial; the same command goes on with it`);
    throw error;
  });
  const percent = (part: number) => `${(100 * part).toFixed(3)} %`;
  if (error)
    console.log(
      `${dtype} is off by ${percent(error.overall)} of the weights (root mean square), at worst by ${percent(error.worst)} in ${error.name}`,
    );
  console.log(`${out} is complete: weights of ${formatBytes(bytes)}`);
}
