/**
 * Talks to the GPU workers: which one, its model, its missing images. Knows no OpenAI request and no client. When a
 * client leaves, the runtime cancels every fetch that its request began, so none takes a signal.
 */
import { ChatModel, type PreparedChat } from "../shared/chat.ts";
import { ApiError } from "../shared/errors.ts";
import type { MissingImages, ModelInfo } from "../shared/protocol.ts";

/** The GPU workers, and the model that they hold; one for all requests of an isolate. */
export class Upstreams {
  readonly #urls: string[];
  /**
   * Parsed once per isolate: a full-size tokenizer takes most of a second. The model itself and not a promise of it, for
   * a promise would hang for all when the request that fetches is cancelled.
   */
  #model: ChatModel | null = null;

  /** `urls`: base URLs, separated by commas. */
  constructor(urls: string) {
    this.#urls = urls
      .split(",")
      .map((url) => url.trim().replace(/\/$/, ""))
      .filter((url) => url !== "");
  }

  /** The workers' model. Throws ApiError 503 when none can be reached. */
  async model(): Promise<ChatModel> {
    if (this.#model) return this.#model;
    const response = await this.get("/internal/model");
    if (!response.ok) throw new ApiError(503, "The model's description cannot be had.", { code: "upstream_error" });
    return (this.#model = new ChatModel(await response.json<ModelInfo>()));
  }

  /** Drops the model (if it is still that one), so that the next request fetches it anew. */
  forget(model: ChatModel): void {
    if (this.#model === model) this.#model = null;
  }

  /** GET from the first worker that can be reached. Throws ApiError 503 when none can. */
  get(path: string): Promise<Response> {
    return this.#first(this.#urls, (url) => fetch(url + path));
  }

  /**
   * Sends a request to the worker that is likeliest to hold its first image, and the images that it lacks. Resolves with
   * the worker's response, whatever its status; its body is still to be read. `tenant` names whose turn it takes in the
   * worker's queue. Throws ApiError.
   */
  generate(prepared: PreparedChat, requestId: string, tenant: string): Promise<Response> {
    const body = JSON.stringify(prepared.request);
    const headers = { "content-type": "application/json", "x-request-id": requestId, "x-tenant": tenant };
    return this.#first(rank(this.#urls, prepared.request.images[0] ?? requestId), async (url) => {
      // A worker may drop an image between the two calls, when others need the room; more than that is a fault.
      for (let attempt = 0; attempt < 3; attempt++) {
        const response = await fetch(`${url}/internal/generate`, { method: "POST", headers, body });
        if (response.status !== 409) return response;
        const { missing } = await response.json<MissingImages>();
        await Promise.all(missing.map((hash) => putImage(url, hash, prepared)));
      }
      throw new ApiError(503, "The GPU worker cannot keep this request's images.", { code: "upstream_error" });
    });
  }

  /** Tries the workers in order until one can be reached. */
  async #first(urls: string[], call: (url: string) => Promise<Response>): Promise<Response> {
    let cause: unknown;
    for (const url of urls) {
      try {
        return await call(url);
      } catch (error) {
        if (error instanceof ApiError) throw error;
        cause = error;
      }
    }
    throw new ApiError(503, "No GPU worker can be reached.", { code: "upstream_unreachable", cause });
  }
}

/** Sends an image's bytes. Throws ApiError that names the image's place if the worker refuses it. */
async function putImage(url: string, hash: string, { images }: PreparedChat): Promise<void> {
  const image = images.get(hash);
  if (!image) throw new ApiError(502, "The GPU worker asked for an unknown image.", { code: "upstream_error" });
  const response = await fetch(`${url}/internal/images/${hash}`, { method: "PUT", body: image.bytes });
  const body = await response.text();
  if (response.ok) return;
  const { error } = JSON.parse(body) as { error: { message: string; code: string | null } };
  throw new ApiError(response.status, `${image.where}: ${error.message}`, {
    code: error.code ?? undefined,
    param: image.where,
  });
}

/**
 * Rendezvous hashing: the workers by their score for this key. A worker that comes or goes moves only the keys that are
 * or become its own.
 */
export function rank(urls: string[], key: string): string[] {
  const scored = urls.map((url) => ({ url, score: fnv1a(`${url} ${key}`) }));
  return scored.sort((a, b) => b.score - a.score).map(({ url }) => url);
}

/** 32-bit FNV-1a, mixed at the end since keys that differ in their last letter only would keep their order. */
function fnv1a(text: string): number {
  let hash = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}
