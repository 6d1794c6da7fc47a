/** The edge's bindings, checked; once an isolate. Knows what is configured, not what it is used for. */
import { misconfigured } from "../shared/errors.ts";
import { type ApiKey, parseKeys } from "./keys.ts";
import type { Rate } from "./rate.ts";
import { Upstreams } from "./upstream.ts";

/** What wrangler.toml and gpu-worker/start.ts give; docs/api.md says what each means. A null is one that is not set. */
export interface Bindings {
  GPU_WORKERS: string | null;
  WORKER_SECRET: string | null;
  API_KEYS: string | null;
  CORS_ORIGINS: string | null;
  RATES: DurableObjectNamespace<Rate>;
}

export interface Config {
  upstreams: Upstreams;
  /** Empty: only this machine is served, and nobody is asked for a key. */
  keys: ApiKey[];
  /** Origins of web pages that may read answers, where there are keys; "*" is any. */
  origins: string[];
}

let config: Config | null = null;

/** Throws ApiError 500 whose cause, for the log only, names the binding that cannot be used. */
export function configOf(bindings: Bindings): Config {
  return (config ??= parseBindings(bindings));
}

function parseBindings(bindings: Bindings): Config {
  const keys = parseKeys(bindings.API_KEYS || "[]");
  const workers = list(bindings.GPU_WORKERS);
  const wrong = workers.find((url) => !URL.canParse(url) || new URL(url).pathname !== "/");
  if (workers.length === 0 || wrong !== undefined)
    throw misconfigured("GPU_WORKERS must be URLs without a path, separated by commas");
  if (!bindings.WORKER_SECRET) throw misconfigured("WORKER_SECRET is not set");
  const origins = list(bindings.CORS_ORIGINS || "*");
  return { upstreams: new Upstreams(workers, bindings.WORKER_SECRET), keys, origins };
}

function list(text: string | null): string[] {
  const items = (text ?? "").split(",").map((item) => item.trim().replace(/\/$/, ""));
  return items.filter((item) => item !== "");
}
