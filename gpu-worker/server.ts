/** The GPU worker over HTTP: routes, statuses and streams. Knows the engine by its interface only. */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { ChatModel, type PreparedChat, prepareChat } from "../shared/chat.ts";
import { ApiError, toApiError } from "../shared/errors.ts";
import { hashImage } from "../shared/images.ts";
import { parseBody, parseChatRequest } from "../shared/parse.ts";
import { GenerateRequest, ImageHash } from "../shared/protocol.ts";
import type { Engine, Step } from "./engine.ts";
import { clientSignal, PortInUseError, readBody, sendError, sendJson } from "./http.ts";
import { Answer, errorEvent, modelList } from "./openai.ts";
import { FairQueue } from "./queue.ts";

const MIB = 2 ** 20;
export const IMAGE_LIMIT = 32 * MIB;
/** Of /internal/generate, which holds token ids; and of a plain request, which holds its images. */
const GENERATE_LIMIT = 16 * MIB;
const CHAT_LIMIT = 64 * MIB;

export interface RunningServer {
  url: string;
  /** Ends what runs and all connections. The engine stays the caller's to close. */
  close(): Promise<void>;
}

/** Serves an engine. `port` 0 takes a free one. Rejects if the port cannot be had. */
export async function startServer(engine: Engine, options: { port: number; host: string }): Promise<RunningServer> {
  const worker = new Worker(engine);
  const server = createServer({ noDelay: true }, (request, response) => {
    worker.answer(request, response).catch((error) => {
      if (response.headersSent || response.destroyed) response.destroy();
      else sendError(response, error);
    });
  });
  await listen(server, options.port, options.host);
  const { port } = server.address() as AddressInfo;
  const host = options.host.includes(":") ? `[${options.host}]` : options.host;
  return {
    url: `http://${host}:${port}`,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}

function listen(server: Server, port: number, host: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", (error: NodeJS.ErrnoException) => {
      reject(error.code === "EADDRINUSE" ? new PortInUseError(port, error) : error);
    });
    server.listen(port, host, resolve);
  });
}

class Worker {
  readonly #engine: Engine;
  readonly #model: ChatModel;
  readonly #queue = new FairQueue(1);
  readonly #modelJson: string;

  constructor(engine: Engine) {
    this.#engine = engine;
    this.#model = new ChatModel(engine.info);
    this.#modelJson = JSON.stringify(engine.info);
  }

  async answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const path = (request.url ?? "/").split("?", 1)[0];
    const image = path.startsWith("/internal/images/") ? path.slice("/internal/images/".length) : null;
    const routes: Record<string, () => void | Promise<void>> = {
      "GET /health": () => sendJson(response, 200, `{"status":"ok","waiting":${this.#queue.waiting}}`),
      "GET /v1/models": () => sendJson(response, 200, modelList(this.#engine.info)),
      "GET /internal/model": () => sendJson(response, 200, this.#modelJson),
      "POST /internal/generate": () => this.#internalGenerate(request, response),
      "POST /v1/chat/completions": () => this.#chat(request, response),
    };
    if (image !== null) routes[`PUT ${path}`] = () => this.#putImage(image, request, response);
    const route = routes[`${request.method} ${path}`];
    if (route) return route();
    const known = Object.keys(routes).some((other) => other.endsWith(` ${path}`));
    throw known
      ? new ApiError(405, `${request.method} is not allowed on ${path}.`, { code: "method_not_allowed" })
      : new ApiError(404, `There is nothing at ${path}.`, { code: "not_found" });
  }

  async #putImage(hash: string, request: IncomingMessage, response: ServerResponse): Promise<void> {
    if (!ImageHash.safeParse(hash).success) throw new ApiError(400, "The image's name must be its SHA-256 in hex.");
    const bytes = await readBody(request, IMAGE_LIMIT);
    if ((await hashImage(bytes)) !== hash) {
      throw new ApiError(400, `The image's bytes do not have the SHA-256 ${hash}.`, { code: "hash_mismatch" });
    }
    await this.#engine.putImage(hash, bytes);
    response.writeHead(204).end();
  }

  async #internalGenerate(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const body = parseBody(GenerateRequest, text(await readBody(request, GENERATE_LIMIT)));
    if (body.fingerprint !== this.#engine.info.fingerprint) {
      throw new ApiError(412, "The prompt was made for another model than this worker holds.", {
        code: "model_changed",
      });
    }
    const missing = await this.#engine.missingImages(body.images);
    if (missing.length > 0) return sendJson(response, 409, JSON.stringify({ missing }));
    const lane = request.headers["x-tenant"];
    await this.#generate(body, typeof lane === "string" ? lane : "", response);
  }

  /** A plain OpenAI request, as the edge takes them; from this machine only, since nothing here asks for a key. */
  async #chat(request: IncomingMessage, response: ServerResponse): Promise<void> {
    if (!isLoopback(request.socket.remoteAddress))
      throw new ApiError(404, "There is nothing here.", { code: "not_found" });
    const chat = parseChatRequest(text(await readBody(request, CHAT_LIMIT)));
    const prepared = await prepareChat(chat, this.#model, `chatcmpl-${crypto.randomUUID()}`);
    await this.#putMissing(prepared);
    await this.#generate(prepared.request, "", response);
  }

  async #putMissing({ request, images }: PreparedChat): Promise<void> {
    for (const hash of await this.#engine.missingImages(request.images)) {
      const { bytes, where } = images.get(hash)!;
      try {
        await this.#engine.putImage(hash, bytes);
      } catch (thrown) {
        const { status, message, code } = toApiError(thrown);
        throw status >= 500
          ? thrown
          : new ApiError(status, `${where}: ${message}`, { code: code ?? undefined, param: where });
      }
    }
  }

  /** Waits for a turn and answers. Up to the first step a failure still has a status, so no header is sent before it. */
  async #generate(request: GenerateRequest, lane: string, response: ServerResponse): Promise<void> {
    const signal = clientSignal(response);
    using _turn = await this.#queue.turn(lane, signal);
    const answer = new Answer(request, this.#engine.info, this.#model.tokenizer, Math.floor(Date.now() / 1000));
    const steps = this.#engine.generate(request, signal);
    response.setHeader("x-request-id", request.id);
    if (request.stream) return stream(steps, answer, response);
    const all: Step[] = [];
    for await (const step of steps) all.push(step);
    sendJson(response, 200, answer.body(all));
  }
}

/**
 * Sends steps as they come; those that are ready in the same turn of the event loop share one write. A slow reader does
 * not hold the engine: an answer is bounded by the context and waits in the socket's buffer.
 */
async function stream(steps: AsyncIterable<Step>, answer: Answer, response: ServerResponse): Promise<void> {
  let pending = "";
  const flush = () => {
    if (pending !== "" && !response.writableEnded) response.write(pending);
    pending = "";
  };
  try {
    for await (const step of steps) {
      if (!response.headersSent) {
        response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache" });
        pending = answer.streamStart();
        setImmediate(flush);
      } else if (pending === "") setImmediate(flush);
      pending += answer.streamStep(step);
    }
  } catch (thrown) {
    if (!response.headersSent) throw thrown;
    const error = toApiError(thrown);
    if (!response.destroyed && error.status >= 500) console.error(error.cause ?? error);
    pending += errorEvent(error);
  }
  if (!response.headersSent && !response.destroyed) throw new Error("the engine ended without a step");
  response.end(pending);
  pending = "";
}

const utf8 = new TextDecoder();
const text = (bytes: Uint8Array) => utf8.decode(bytes);

function isLoopback(address: string | undefined): boolean {
  return address !== undefined && /^(::1|(::ffff:)?127\.)/.test(address);
}
