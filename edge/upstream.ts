/**
 * Talks to the GPU workers: which one, its model, its missing images. Knows no OpenAI request and no client. When a
 * client leaves, the runtime cancels every fetch that its request began, so none takes a signal for that.
 */
import { ChatModel, type PreparedChat } from "../shared/chat.ts";
import { ApiError, misconfigured } from "../shared/errors.ts";
import { type ChatImage, imageNotFound } from "../shared/images.ts";
import { type GenerateRequest, imagePath, type MissingImages, type ModelInfo } from "../shared/protocol.ts";
import { SIGNATURE_HEADER, Signer } from "../shared/sign.ts";

interface Call {
  method: "GET" | "POST" | "PUT";
  /** With its query. */
  path: string;
  body?: string | Uint8Array<ArrayBuffer>;
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

/** Milliseconds in which a worker has to say whether it is ready. */
const READY_TIMEOUT = 5000;

/** Images that are sent at once for one request. */
const PUTS_AT_ONCE = 4;

/** The GPU workers, and the model that they hold; one for all requests of an isolate. */
export class Upstreams {
  readonly #urls: string[];
  readonly #signer: Signer;
  /**
   * Parsed once per isolate: a full-size tokenizer takes most of a second. The model itself and not a promise of it, for
   * a promise would hang for all when the request that fetches is cancelled.
   */
  #model: ChatModel | null = null;

  /** `urls`: without a path. `secret`: what workers believe requests by. */
  constructor(urls: string[], secret: string) {
    this.#urls = urls;
    this.#signer = new Signer(secret);
  }

  /** The workers' model. Throws ApiError 503 when none can be reached. */
  async model(): Promise<ChatModel> {
    if (this.#model) return this.#model;
    const info = await (await this.#get("/internal/model")).json<ModelInfo>();
    // Another request may have been faster.
    return (this.#model ??= new ChatModel(info));
  }

  /** Drops the model (if it is still that one), so that the next request fetches it anew. */
  forget(model: ChatModel): void {
    if (this.#model === model) this.#model = null;
  }

  /** The body of GET /v1/models. Throws ApiError 503 when no worker can be reached. */
  async models(): Promise<{ data: { id: string }[] }> {
    return (await this.#get("/v1/models")).json();
  }

  /** Resolves when a worker is ready. Throws ApiError 503 when none is. */
  async ready(): Promise<void> {
    const signal = AbortSignal.timeout(READY_TIMEOUT);
    const ask = async (url: string) => {
      const response = await this.#fetch(url, { method: "GET", path: "/ready", signal });
      await response.body?.cancel();
      if (!response.ok) throw new Error(`${url} answers ${response.status}`);
    };
    try {
      await Promise.any(this.#urls.map(ask));
    } catch (cause) {
      throw new ApiError(503, "No GPU worker is ready.", { code: "not_ready", retryAfter: 1, cause });
    }
  }

  async #get(path: string): Promise<Response> {
    const response = answerOf(await this.#first(this.#urls, (url) => this.#fetch(url, { method: "GET", path })));
    if (response.ok) return response;
    throw new ApiError(502, "The model's description cannot be had.", {
      code: "upstream_error",
      cause: `${path}: ${response.status}`,
    });
  }

  /**
   * Sends a request, which came at `arrived` (ms), to the worker that is likeliest to hold its first image, and the images
   * that it lacks. Resolves with the worker's response, whatever its status; its body is still to be read. Throws ApiError.
   */
  generate({ request, images }: PreparedChat, arrived: number): Promise<Response> {
    const headers = { "content-type": "application/json", "x-request-id": request.id };
    const first = request.images.at(0);
    return this.#first(rank(this.#urls, first?.hash ?? first?.url ?? request.id), async (url) => {
      // A worker may drop an image between the two calls, when others need the room; more than that is a fault.
      for (let attempt = 0; attempt < 3; attempt++) {
        const body = JSON.stringify(atNow(request, arrived));
        const response = await this.#fetch(url, { method: "POST", path: "/internal/generate", headers, body });
        if (response.status !== 409) return answerOf(response);
        // None where it was dropped at the last moment; then the next answer names it.
        const { missing = [] } = await response.json<Partial<MissingImages>>();
        await this.#putImages(url, missing, { request: atNow(request, arrived), images });
      }
      throw new ApiError(502, "The GPU worker cannot keep this request's images.", { code: "upstream_error" });
    });
  }

  /**
   * Sends images' bytes, those of one that stands twice in the request once. Throws ApiError as the next method, and 404
   * before anything is sent for an image that the client named only.
   */
  async #putImages(url: string, missing: number[], { request, images }: PreparedChat): Promise<void> {
    const puts = new Map<string, ChatImage>();
    for (const index of missing) {
      const ref = request.images[index];
      if (!ref?.hash) throw new ApiError(502, "The GPU worker asked for an unknown image.", { code: "upstream_error" });
      const image = images.get(ref.hash);
      if (!image) throw imageNotFound(ref.where);
      puts.set(imagePath(request, ref.hash, ref.limits), image);
    }
    // A few at a time: each takes a place in the worker's queue.
    const rest = [...puts];
    const next = async (): Promise<void> => {
      const put = rest.shift();
      if (!put) return;
      await this.#putImage(url, put[0], put[1], request.id);
      return next();
    };
    await Promise.all(Array.from({ length: PUTS_AT_ONCE }, next));
  }

  /** Throws ApiError that names the image's place if the worker refuses it. */
  async #putImage(url: string, path: string, { bytes, where }: ChatImage, id: string): Promise<void> {
    const call: Call = { method: "PUT", path, headers: { "x-request-id": id }, body: bytes };
    const response = answerOf(await this.#fetch(url, call));
    if (response.ok) return;
    const { error } = await response.json<{ error: { message: string; code: string | null } }>();
    const retryAfter = Number(response.headers.get("retry-after")) || undefined;
    const code = error.code ?? undefined;
    throw response.status < 500 && response.status !== 429
      ? new ApiError(response.status, `${where}: ${error.message}`, { code, param: where, retryAfter })
      : new ApiError(response.status, error.message, { code, retryAfter });
  }

  async #fetch(url: string, { method, path, body, headers, signal }: Call): Promise<Response> {
    // Of an image the path names the bytes, and the worker checks that.
    const signature = await this.#signer.sign(method, path, typeof body === "string" ? body : "");
    return fetch(url + path, { method, body, headers: { ...headers, [SIGNATURE_HEADER]: signature }, signal });
  }

  /**
   * Tries the workers in order until one can be reached, takes the request and holds the images that it only names; else
   * throws that one lacks such an image, for it would take the request with the bytes; else gives the last refusal.
   */
  async #first(urls: string[], call: (url: string) => Promise<Response>): Promise<Response> {
    let notFound: ApiError | null = null;
    let refusal: Response | null = null;
    let cause: unknown;
    for (const url of urls) {
      try {
        const response = await call(url);
        if (!(await isBusy(response))) return response;
        refusal = response;
      } catch (error) {
        if (error instanceof ApiError && error.code === "image_not_found") notFound ??= error;
        else if (error instanceof ApiError && !BUSY.includes(error.code)) throw error;
        else cause = error;
      }
    }
    if (notFound) throw notFound;
    if (refusal) return refusal;
    if (cause instanceof ApiError) throw cause;
    throw new ApiError(503, "No GPU worker can be reached.", { code: "upstream_unreachable", cause });
  }
}

/** Codes of a worker that takes nothing more for now. */
const BUSY: (string | null)[] = ["draining", "queue_full"];

/** Whether another worker may take what this one does not. (Not a request on which an engine has died: it might again.) */
async function isBusy(response: Response): Promise<boolean> {
  if (response.status !== 429 && response.status !== 503) return false;
  const { error } = await response.clone().json<{ error?: { code: string | null } }>();
  return BUSY.includes(error?.code ?? null);
}

/** The request with what is left of its deadline. Throws ApiError 504 when nothing is. */
function atNow(request: GenerateRequest, arrived: number): GenerateRequest {
  if (request.deadline === null) return request;
  const deadline = request.deadline - (Date.now() - arrived) / 1000;
  if (deadline > 0) return { ...request, deadline };
  throw new ApiError(504, "The request's deadline is over.", { code: "deadline_exceeded" });
}

/** A worker's answer that a client may see. Throws ApiError for one that is about the edge, or not a worker's at all. */
function answerOf(response: Response): Response {
  const type = response.headers.get("content-type") ?? "";
  if (response.status === 401)
    throw misconfigured("a GPU worker refuses the edge's signature: WORKER_SECRET or the clocks differ");
  if (response.status === 204 || /^(application\/json|text\/event-stream)\b/.test(type)) return response;
  throw new ApiError(502, "The GPU worker's answer cannot be read.", {
    code: "upstream_error",
    cause: `${response.status} ${type}`,
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
