/** Reads config files of checkpoints. */
import type { z } from "zod";
import { CheckpointError } from "../../shared/errors.ts";

/** `value` checked by `schema`; CheckpointError names the file and the field. */
export function parseConfig<T extends z.ZodType>(schema: T, value: unknown, file: string): z.output<T> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const { path, message } = result.error.issues[0];
  throw new CheckpointError(`${file}: ${path.join(".") || "(root)"}: ${message}`);
}
