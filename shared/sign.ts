/** Signs what the edge tells a GPU worker, and checks it: HMAC-SHA-256, time, nonce. Knows no transport or routes. */
import { ApiError } from "./errors.ts";
import { toHex } from "./hex.ts";

export const SIGNATURE_HEADER = "x-vispec-signature";

/** Seconds that the two clocks may differ, either way. */
const WINDOW = 60;
const FORM = /^v1\.(\d{1,12})\.([0-9a-f]{32})\.([0-9a-f]{64})$/;
const utf8 = new TextEncoder();

type Key = Awaited<ReturnType<typeof crypto.subtle.importKey>>;

/** Gives the secret as a key, imported at the first call: a Worker may do no cryptography before its first request. */
function lazyKey(secret: string): () => Promise<Key> {
  if (secret === "") throw new Error("the secret of edge and worker is empty");
  // The key is kept and not its promise: in a Worker, one request must not wait for another's promise.
  let key: Key | undefined;
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  return async () => {
    key ??= await crypto.subtle.importKey("raw", utf8.encode(secret), algorithm, false, ["sign", "verify"]);
    return key;
  };
}

/** The edge's side. */
export class Signer {
  readonly #key: () => Promise<Key>;

  constructor(secret: string) {
    this.#key = lazyKey(secret);
  }

  /** The signature's header; `path` has the query, `body` is "" for a GET and for an image, which its path names. */
  async sign(method: string, path: string, body: string): Promise<string> {
    const seconds = String(Math.floor(Date.now() / 1000));
    const nonce = toHex(crypto.getRandomValues(new Uint8Array(16)));
    const key = await this.#key();
    const signature = await crypto.subtle.sign("HMAC", key, await message(seconds, nonce, method, path, body));
    return `v1.${seconds}.${nonce}.${toHex(new Uint8Array(signature))}`;
  }
}

/** The worker's side. It remembers the nonces of what it accepted for as long as their time would be good. */
export class Verifier {
  readonly #key: () => Promise<Key>;
  readonly #now: () => number;
  /** Nonces, and the second after which each may be forgotten; in the order of both. */
  readonly #seen = new Map<string, number>();

  /** `now`: milliseconds since 1970. */
  constructor(secret: string, now: () => number = Date.now) {
    this.#key = lazyKey(secret);
    this.#now = now;
  }

  /** Nonces that are remembered. */
  get remembered(): number {
    return this.#seen.size;
  }

  /** Throws ApiError 401 if `header` is missing, malformed, of another secret or request, too old or new, or used. */
  async verify(method: string, path: string, body: string, header: string | undefined): Promise<void> {
    const [, seconds, nonce, signature] = FORM.exec(header ?? "") ?? [];
    if (!signature) throw refused("The request has no valid signature.");
    const signed = await message(seconds, nonce, method, path, body);
    // crypto.subtle.verify compares in constant time.
    if (!(await crypto.subtle.verify("HMAC", await this.#key(), fromHex(signature), signed)))
      throw refused("The request has no valid signature.");
    // Nothing is remembered before this point: only who has the secret can fill the memory.
    const now = Math.floor(this.#now() / 1000);
    if (Math.abs(now - Number(seconds)) > WINDOW)
      throw refused(`The signature's time is more than ${WINDOW} s off this worker's clock.`);
    this.#forget(now);
    if (this.#seen.has(nonce)) throw refused("The signature was used before.");
    // The signer's clock may be ahead by the window, so its time may be good for twice as long.
    this.#seen.set(nonce, now + 2 * WINDOW);
  }

  #forget(now: number): void {
    for (const [nonce, last] of this.#seen) {
      if (last >= now) return;
      this.#seen.delete(nonce);
    }
  }
}

function refused(why: string): ApiError {
  return new ApiError(401, why, { code: "invalid_signature" });
}

async function message(seconds: string, nonce: string, method: string, path: string, body: string) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", utf8.encode(body)));
  return utf8.encode(`v1\n${seconds}\n${nonce}\n${method}\n${path}\n${toHex(hash)}`);
}

function fromHex(hex: string): Uint8Array<ArrayBuffer> {
  return Uint8Array.from({ length: hex.length / 2 }, (_, i) => Number.parseInt(hex.slice(2 * i, 2 * i + 2), 16));
}
