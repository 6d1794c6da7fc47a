/** Reads config files of checkpoints. */
import type { z } from "zod";
import { CheckpointError } from "../../shared/errors.ts";
import type { FamilyConfig } from "./family.ts";

/** `value` checked by `schema`; CheckpointError names the file and the field. */
export function parseConfig<T extends z.ZodType>(schema: T, value: unknown, file: string): z.output<T> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const { path, message } = result.error.issues[0];
  throw new CheckpointError(`${file}: ${path.join(".") || "(root)"}: ${message}`);
}

/** The configuration, whose sizes go with each other; else CheckpointError, where a graph would fail in its run. */
export function checkSizes<T extends FamilyConfig & { vision: { width: number; heads: number } }>(
  c: T,
  file: string,
): T {
  const { hidden, heads, kvHeads, headSize, vocabulary } = c.language;
  const rests: [what: string, rest: number][] = [
    [`num_attention_heads ${heads} does not divide hidden_size ${hidden}`, hidden % heads],
    [`num_key_value_heads ${kvHeads} does not divide num_attention_heads ${heads}`, heads % kvHeads],
    [`heads of ${headSize} cannot be turned in halves`, headSize % 2],
    [
      `vision_config: ${c.vision.heads} heads do not divide hidden_size ${c.vision.width}`,
      c.vision.width % c.vision.heads,
    ],
  ];
  const wrong = rests.find(([, rest]) => rest !== 0);
  if (wrong) throw new CheckpointError(`${file}: ${wrong[0]}`);
  if (c.imageToken < 0 || c.imageToken >= vocabulary)
    throw new CheckpointError(`${file}: the image token ${c.imageToken} is not in the vocabulary of ${vocabulary}`);
  return c;
}
