/** API keys: whose a request is, and what that key may. Keys are known by their SHA-256 only. */
import * as z from "zod";
import { ApiError, misconfigured, toApiError } from "../shared/errors.ts";
import { toHex } from "../shared/hex.ts";
import { parseBody } from "../shared/parse.ts";

export const ApiKey = z.strictObject({
  name: z
    .string()
    .regex(/^[\w.@-]{1,64}$/, "must be 1 to 64 letters, digits, or any of _ . @ -")
    .describe("Whose it is: the tenant in queue, image keys and logs. Two keys may have one name."),
  sha256: z
    .string()
    .regex(/^[0-9a-f]{64}$/, "must be 64 digits in lower-case hex")
    .describe("SHA-256 of the key in hex: `printf %s KEY | sha256sum`."),
  models: z.array(z.string()).optional().describe("Models that it may use; absent, all."),
  requestsPerMinute: z
    .int()
    .min(1)
    .optional()
    .describe("Chats and completions a minute, all of a name together, refused ones included."),
});
export type ApiKey = z.infer<typeof ApiKey>;

/** Reads the binding API_KEYS. Throws ApiError 500 whose cause names the field that is wrong, and shows no value. */
export function parseKeys(json: string): ApiKey[] {
  try {
    return parseBody(z.array(ApiKey), json);
  } catch (thrown) {
    const { param, message } = toApiError(thrown);
    throw misconfigured(`API_KEYS${param ? "" : ": "}${message}`);
  }
}

/** Finds the key of a header `Authorization: Bearer KEY`. Throws ApiError 401. */
export async function authenticate(keys: ApiKey[], authorization: string | undefined): Promise<ApiKey> {
  const [, secret] = /^Bearer +(\S+) *$/i.exec(authorization ?? "") ?? [];
  if (!secret) throw refused("Give your API key in the header Authorization: Bearer KEY.");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(secret)));
  const key = findKey(keys, digest);
  if (!key) throw refused("The API key is not known.");
  return key;
}

function refused(message: string): ApiError {
  return new ApiError(401, message, { code: "invalid_api_key" });
}

/** The key with this SHA-256. Looks at every byte of every key, so that its time tells nothing. */
export function findKey(keys: readonly Pick<ApiKey, "sha256">[], digest: Uint8Array): ApiKey | null {
  const hex = toHex(digest);
  let found: Pick<ApiKey, "sha256"> | null = null;
  for (const key of keys) {
    let difference = 0;
    for (let i = 0; i < 64; i++) difference |= key.sha256.charCodeAt(i) ^ hex.charCodeAt(i);
    if (difference === 0) found = key;
  }
  return found as ApiKey | null;
}

/** Throws ApiError 403 for a model that the key may not use. */
export function checkModel(key: ApiKey | null, model: string): void {
  if (maySee(key, model)) return;
  throw new ApiError(403, "model: this API key may not use it.", { code: "model_not_allowed", param: "model" });
}

/** Whether the key (null: none is needed here) may use a model, and so may know of it. */
export function maySee(key: ApiKey | null, model: string): boolean {
  return !key?.models || key.models.includes(model);
}
