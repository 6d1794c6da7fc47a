/** `vispec inflate`: a checkpoint as large as a published one that answers as a small one does. */
import { join, resolve } from "node:path";
import { planInflation, readShape, writeInflation } from "../checkpoint/inflate.ts";
import { LIKE, likeShape } from "../checkpoint/inflate-shapes.ts";
import { isTaken } from "../checkpoint/staging.ts";
import { formatBytes, Progress } from "../progress.ts";
import { DEFAULT_MODEL, number, oneOf, parseFlags, UsageError } from "./options.ts";

export const INFLATE_HELP = `vispec inflate --like ${LIKE.join("|")} --out DIR
  [--model TINY] [--draft DIR] [--layers N]
  Writes a checkpoint of that model's size, with a draft, which answers exactly as TINY does. What was interrupted goes on
  when it is started again. --layers cuts it to so many layers of decoder and vision tower, for tests.`;

export async function inflateCommand(args: string[], signal: AbortSignal): Promise<void> {
  const flags = parseFlags(args, ["model", "draft", "like", "out", "layers"]);
  const like = oneOf(flags, "like", LIKE);
  const layers = number(flags, "layers", { min: 1 });
  if (like === undefined || flags.out === undefined) throw new UsageError("inflate needs --like and --out");
  const model = (flags.model as string | undefined) ?? DEFAULT_MODEL;
  const draft = (flags.draft as string | undefined) ?? join(model, "draft");
  const out = resolve(flags.out as string);
  const tiny = readShape(model);
  const shape = likeShape(like, tiny, layers);
  const least = Math.max(tiny.decoder.layers, tiny.vision.layers);
  if (layers !== undefined && layers < least)
    throw new UsageError(`--layers is ${layers}; it must be at least ${least}, what ${model} has`);
  if (isTaken(out)) throw new UsageError(`--out ${out} exists already`);
  const plan = planInflation(model, draft, shape);
  let progress: Progress | undefined;
  try {
    await writeInflation(plan, out, signal, (total, there) => {
      const bytes = total - there;
      console.error(`inflate writes ${formatBytes(bytes)} (${bytes} bytes) to ${out}`);
      const shown = new Progress("inflate", total, there);
      progress = shown;
      return (n) => shown.add(n);
    });
  } finally {
    progress?.end();
  }
  console.error(`${out} is as large as ${like} and answers as ${model} does`);
}
