/** The GPU worker over HTTP: routes, statuses, streams, drain. Knows the engine by its interface only. */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { type Asker, ChatModel, type PreparedChat, prepareChat, prepareCompletion } from "../../shared/chat.ts";
import { ApiError, toApiError } from "../../shared/errors.ts";
import { hashImage, imageNotFound } from "../../shared/images.ts";
import { parseBody, parseChatRequest, parseCompletionRequest } from "../../shared/parse.ts";
import { GenerateRequest, ImageHash, ImageQuery, imageKey, type MissingImages } from "../../shared/protocol.ts";
import { SIGNATURE_HEADER, Verifier } from "../../shared/sign.ts";
import type { Engine, Step } from "../engine.ts";
import { describeError, type Log } from "../log.ts";
import { untilAborted } from "../until-aborted.ts";
import type { ImageUrls } from "./fetch-image.ts";
import { ClientLeft, isDirect, listen, readBody, requestSignal, sendError, sendJson } from "./http.ts";
import { Metrics, RequestRecord } from "./metrics.ts";
import { Answer, errorEvent, modelList } from "./openai.ts";
import { collectPictures, lackingPictures, type Picture, putMissing } from "./pictures.ts";
import { FairQueue } from "./queue.ts";
import { stream } from "./stream.ts";

const MIB = 2 ** 20;
const IMAGE_LIMIT = 32 * MIB;
/** Of /internal/generate, which holds token ids; and of a plain request, which holds its images. */
const GENERATE_LIMIT = 16 * MIB;
const CHAT_LIMIT = 64 * MIB;
/** A client must be the first to close an idle connection: one that we close may just be taken for the next request. */
const KEEP_ALIVE = 75_000;
/** nginx's number for a client that left, in the log. */
const CLIENT_LEFT = 499;

export interface ServerOptions {
  /** 0 takes a free one. */
  port: number;
  host: string;
  /** What edge and worker share; without it, everything internal is refused. */
  secret?: string;
  /** Which pictures are fetched by their URL. */
  imageUrls?: ImageUrls;
  /** How many requests may wait for their turn; a quarter of them of one tenant and priority. */
  maxWaiting?: number;
  /** Seconds that a request may take, its wait included. */
  deadline?: number;
  /** Whether this machine's clients may ask without an edge; default true. */
  plainApi?: boolean;
  log?: Log;
}

export interface RunningServer {
  url: string;
  /** Refuses new work from now on; resolves when all that was accepted has been answered. */
  drain(): Promise<void>;
  /** Ends what runs and all connections. The engine stays the caller's to close. */
  close(): Promise<void>;
}

/** Serves an engine. Rejects if the port cannot be had. */
export async function startServer(engine: Engine, options: ServerOptions): Promise<RunningServer> {
  const worker = new Worker(engine, options);
  const server = createServer({ noDelay: true, keepAliveTimeout: KEEP_ALIVE }, (request, response) => {
    void worker.answer(request, response);
  });
  await listen(server, options.port, options.host);
  const { port } = server.address() as AddressInfo;
  const host = options.host.includes(":") ? `[${options.host}]` : options.host;
  return {
    url: `http://${host}:${port}`,
    drain: () => worker.drain(),
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

/** One request for text on its way. */
interface Job {
  response: ServerResponse;
  record: RequestRecord;
  signal: AbortSignal;
}

class Worker {
  readonly #engine: Engine;
  readonly #imageUrls: ImageUrls;
  readonly #plainApi: boolean;
  readonly #verifier: Verifier | null;
  readonly #deadline: number;
  readonly #log: Log;
  readonly #queue: FairQueue;
  readonly #metrics: Metrics;
  #model: ChatModel;
  /** Responses under way, and who waits for the last of them. */
  #open = 0;
  #drained: PromiseWithResolvers<void> | null = null;

  constructor(engine: Engine, options: ServerOptions) {
    const { secret, imageUrls = "public", maxWaiting = 256, deadline = 600, plainApi = true, log = () => {} } = options;
    this.#plainApi = plainApi;
    this.#engine = engine;
    this.#imageUrls = imageUrls;
    this.#verifier = secret ? new Verifier(secret) : null;
    this.#deadline = deadline;
    this.#log = log;
    this.#queue = new FairQueue({ running: engine.concurrency, waiting: maxWaiting, lane: Math.ceil(maxWaiting / 4) });
    this.#model = new ChatModel(engine.info);
    this.#metrics = new Metrics(engine.info.id, {
      running: () => this.#queue.running,
      waiting: () => this.#queue.waiting,
      waitingOf: (priority) => this.#queue.waitingOf(priority),
      ready: () => engine.ready,
      restarts: () => engine.restarts,
    });
  }

  get #ready(): boolean {
    return this.#engine.ready && !this.#drained;
  }

  /** The engine's model; another one when its process was started again on a checkpoint that has changed. */
  #currentModel(): ChatModel {
    if (this.#model.info !== this.#engine.info) this.#model = new ChatModel(this.#engine.info);
    return this.#model;
  }

  drain(): Promise<void> {
    this.#drained ??= Promise.withResolvers();
    if (this.#open === 0) this.#drained.resolve();
    return this.#drained.promise;
  }

  async answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    this.#open++;
    response.once("close", () => {
      if (--this.#open === 0) this.#drained?.resolve();
    });
    if (this.#drained) response.setHeader("connection", "close");
    try {
      await this.#route(request, response);
    } catch (thrown) {
      if (response.destroyed) return;
      const error = toApiError(thrown);
      const { method, url, headers } = request;
      const fields = { id: headers["x-request-id"], method, url, error: describeError(error.cause ?? error) };
      if (error.status >= 500) this.#log("error", "a request failed", fields);
      if (response.headersSent) response.destroy();
      else sendError(response, error);
    }
  }

  #route(request: IncomingMessage, response: ServerResponse): void | Promise<void> {
    const [path, query = ""] = (request.url ?? "/").split("?", 2);
    const image = /^\/internal\/images\/([^/]+)$/.exec(path)?.[1];
    const routes: Record<string, () => void | Promise<void>> = {
      "GET /health": () => this.#health(response, 200),
      "GET /ready": () => this.#health(response, this.#ready ? 200 : 503),
      "GET /metrics": () => this.#sendMetrics(response),
      "GET /v1/models": () => sendJson(response, 200, modelList(this.#engine.info)),
      "GET /internal/model": () => this.#sendModel(request, response),
      "POST /internal/generate": () => this.#internalGenerate(request, response),
      "POST /v1/chat/completions": () =>
        this.#plain("chatcmpl", request, response, (body, asker) =>
          prepareChat(parseChatRequest(body), this.#currentModel(), asker),
        ),
      "POST /v1/completions": () =>
        this.#plain("cmpl", request, response, (body, asker) =>
          prepareCompletion(parseCompletionRequest(body), this.#currentModel(), asker),
        ),
    };
    if (image !== undefined) {
      routes[`PUT ${path}`] = () => this.#putImage(image, query, request, response);
    }
    const route = routes[`${request.method} ${path}`];
    if (route) return route();
    const known = Object.keys(routes).some((other) => other.endsWith(` ${path}`));
    const named = path.slice(0, 200);
    throw known
      ? new ApiError(405, `${request.method} is not allowed on ${named}.`, { code: "method_not_allowed" })
      : new ApiError(404, `There is nothing at ${named}.`, { code: "not_found" });
  }

  #health(response: ServerResponse, status: number): void {
    const { running, waiting } = this.#queue;
    const state = this.#drained ? "draining" : this.#engine.ready ? "ok" : "restarting";
    sendJson(response, status, JSON.stringify({ status: state, running, waiting }));
  }

  async #sendMetrics(response: ServerResponse): Promise<void> {
    const text = await this.#metrics.text();
    response.writeHead(200, { "content-type": this.#metrics.contentType }).end(text);
  }

  async #sendModel(request: IncomingMessage, response: ServerResponse): Promise<void> {
    await this.#verify(request, "");
    sendJson(response, 200, JSON.stringify(this.#engine.info));
  }

  /** Throws ApiError 401 for what was not signed by the edge. */
  async #verify({ method, url, headers }: IncomingMessage, body: string): Promise<void> {
    if (!this.#verifier) {
      const message = "This worker was started without WORKER_SECRET, so it answers nothing internal.";
      throw new ApiError(401, message, { code: "invalid_signature" });
    }
    const signature = headers[SIGNATURE_HEADER];
    await this.#verifier.verify(method!, url!, body, typeof signature === "string" ? signature : undefined);
  }

  /** To be called once the body is read: whoever still writes would read no answer. */
  #refuseWhenDraining(): void {
    if (!this.#drained) return;
    throw new ApiError(503, "This worker is about to end.", { code: "draining", retryAfter: 1 });
  }

  async #putImage(hash: string, query: string, request: IncomingMessage, response: ServerResponse): Promise<void> {
    await this.#verify(request, "");
    const { data: asked } = ImageQuery.safeParse(Object.fromEntries(new URLSearchParams(query)));
    if (!ImageHash.safeParse(hash).success || !asked)
      throw new ApiError(400, "The image's path must be its SHA-256 in hex with tenant, min, max and priority.");
    const bytes = await readBody(request, IMAGE_LIMIT);
    if ((await hashImage(bytes)) !== hash)
      throw new ApiError(400, `The image's bytes do not have the SHA-256 ${hash}.`, { code: "hash_mismatch" });
    this.#refuseWhenDraining();
    // The vision tower is work like any other, and takes the tenant's turn.
    const { signal, shorten } = requestSignal(response, this.#deadline);
    shorten(asked.deadline);
    const limits = { minPixels: asked.min, maxPixels: asked.max };
    using place = this.#queue.enter(asked.tenant, asked.priority);
    await place.turn(signal);
    await untilAborted(this.#engine.putImage(imageKey(asked.tenant, hash, limits), bytes, limits), signal);
    response.writeHead(204).end();
  }

  #internalGenerate(request: IncomingMessage, response: ServerResponse): Promise<void> {
    return this.#generate("edge", response, async () => {
      const body = await readBody(request, GENERATE_LIMIT);
      await this.#verify(request, new TextDecoder().decode(body));
      const generate = parseBody(GenerateRequest, body);
      this.#checkModel(generate);
      return { request: generate, images: new Map() };
    });
  }

  /** Throws ApiError 412 for a prompt in another model's tokens; the engine may have been started again on another one. */
  #checkModel({ fingerprint }: GenerateRequest): void {
    if (fingerprint === this.#engine.info.fingerprint) return;
    const message = "The prompt was made for another model than this worker holds.";
    throw new ApiError(412, message, { code: "model_changed" });
  }

  /** An OpenAI request without an edge. From this machine only, and from no web page on it: nothing here asks for a key. */
  async #plain(
    kind: string,
    request: IncomingMessage,
    response: ServerResponse,
    prepare: (body: Uint8Array, asker: Asker) => Promise<PreparedChat>,
  ): Promise<void> {
    if (!this.#plainApi || !isDirect(request)) throw new ApiError(404, "There is nothing here.", { code: "not_found" });
    const id = `${kind}-${crypto.randomUUID()}`;
    response.setHeader("x-request-id", id);
    const asker = { id, tenant: "" };
    await this.#generate("client", response, async () => prepare(await readBody(request, CHAT_LIMIT), asker));
  }

  /** Answers one request for text, from its arrival to its line in the log. `prepare` reads and checks it. */
  async #generate(
    from: "edge" | "client",
    response: ServerResponse,
    prepare: () => Promise<PreparedChat>,
  ): Promise<void> {
    const record = new RequestRecord(this.#metrics);
    const { signal, shorten } = requestSignal(response, this.#deadline);
    try {
      const prepared = await prepare();
      shorten(prepared.request.deadline);
      record.request = prepared.request;
      response.setHeader("x-request-id", prepared.request.id);
      this.#refuseWhenDraining();
      const missing = await this.#serve(prepared, { response, record, signal });
      if (missing.length > 0 && from === "client") throw imageNotFound(prepared.request.images[missing[0]].where);
      // Not the request's end: it comes again, after its images.
      if (missing.length > 0) return sendJson(response, 409, JSON.stringify({ missing } satisfies MissingImages));
      record.answered();
      this.#log("info", "request", { ...record.fields(), status: 200 });
    } catch (thrown) {
      const error = signal.reason instanceof ClientLeft ? null : toApiError(thrown);
      record.failed(error);
      const id = response.getHeader("x-request-id") ?? null;
      const fields = { ...record.fields(), id, status: error?.status ?? CLIENT_LEFT, code: error?.code };
      if (error === null || error.status < 500) this.#log("info", "request", fields);
      else this.#log("error", "request", { ...fields, error: describeError(error.cause ?? error) });
      if (error === null) response.destroy();
      else if (response.headersSent) response.end(errorEvent(error));
      else sendError(response, error);
    }
  }

  /** Queues and answers. Gives the indices of images that have to be sent first; nothing was sent to the client then. */
  async #serve(prepared: PreparedChat, job: Job): Promise<number[]> {
    const { record, signal } = job;
    // The place is taken before anything is fetched, so that what is fetched at the same time is bounded too.
    using place = this.#queue.enter(prepared.request.tenant, prepared.request.priority);
    const pictures = await collectPictures(prepared, this.#imageUrls, signal);
    const { missing } = await lackingPictures(this.#engine, pictures, signal);
    if (missing.length > 0) return missing;
    record.queued();
    await place.turn(signal);
    this.#checkModel(prepared.request);
    record.started();
    for (let attempt = 0; ; attempt++) {
      // The engine may have been started again meanwhile, or have dropped images to make room for others.
      const gone = await putMissing(this.#engine, pictures, signal);
      if (gone.length > 0) return gone;
      try {
        await this.#send(prepared.request, pictures, job);
        return [];
      } catch (thrown) {
        // An image was dropped in this very moment; the engine says so before it gives anything.
        if (!(thrown instanceof ApiError) || thrown.status !== 409) throw thrown;
        const message = "The images of this request cannot all be held at once.";
        if (attempt === 2) throw new ApiError(503, message, { code: "image_missing", cause: thrown });
      }
    }
  }

  /** Runs the engine and sends what it gives. Up to the first step a failure has a status, so no header is sent before. */
  async #send(request: GenerateRequest, pictures: Picture[], { response, record, signal }: Job): Promise<void> {
    const { info, tokenizer } = this.#currentModel();
    const answer = new Answer(request, info, tokenizer, Math.floor(Date.now() / 1000));
    const keys = pictures.map(({ key }) => key);
    const steps = recorded(this.#engine.generate(request, keys, signal), record);
    if (request.stream) return stream(steps, answer, response);
    const all: Step[] = [];
    for await (const step of steps) all.push(step);
    sendJson(response, 200, answer.body(all));
  }
}

async function* recorded(steps: AsyncIterable<Step>, record: RequestRecord): AsyncGenerator<Step> {
  for await (const step of steps) {
    record.step(step);
    yield step;
  }
}
