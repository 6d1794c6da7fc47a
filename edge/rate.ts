/** Requests a minute of one name, counted in one place for all isolates: a Durable Object with a bucket in memory. */
import { DurableObject } from "cloudflare:workers";
import { ApiError } from "../shared/errors.ts";
import { Bucket } from "./bucket.ts";
import type { ApiKey } from "./keys.ts";

/**
 * One for each name. It keeps nothing but memory: an object that is dropped for idleness would have been full again by
 * then, since the runtime waits longer than the minute in which a bucket fills.
 */
export class Rate extends DurableObject {
  readonly #bucket = new Bucket();

  /** Counts a request; gives 0, or the seconds to wait. */
  take(perMinute: number): number {
    return this.#bucket.take(perMinute, Date.now());
  }
}

/** Counts a request. Throws ApiError 429 when the key's minute has no more room. */
export async function countRequest(rates: DurableObjectNamespace<Rate>, key: ApiKey | null): Promise<void> {
  if (!key?.requestsPerMinute) return;
  const seconds = await rates.get(rates.idFromName(key.name)).take(key.requestsPerMinute);
  if (seconds === 0) return;
  throw new ApiError(429, `This API key has ${key.requestsPerMinute} requests a minute. Try again in ${seconds} s.`, {
    code: "rate_limit_exceeded",
    retryAfter: seconds,
  });
}
