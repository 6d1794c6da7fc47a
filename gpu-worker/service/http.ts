/** What node:http leaves to its users: bodies with a limit, JSON and error answers, a signal for when to give up. */
import type { IncomingMessage, Server, ServerResponse } from "node:http";
import { ApiError } from "../../shared/errors.ts";
import { isLoopback } from "../../shared/loopback.ts";

/** A port that another process has; nothing is wrong with the program, so the message says it all. */
export class PortInUseError extends Error {
  override name = "PortInUseError";

  constructor(port: number, cause?: unknown) {
    super(`port ${port} is in use`, { cause });
  }
}

/** Rejects if the port cannot be had. */
export function listen(server: Server, port: number, host: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", (error: NodeJS.ErrnoException) => {
      reject(error.code === "EADDRINUSE" ? new PortInUseError(port, error) : error);
    });
    server.listen(port, host, resolve);
  });
}

/** The whole body. Throws ApiError 413 beyond `limit` bytes; what is beyond is read off and dropped. */
export async function readBody(request: IncomingMessage, limit: number): Promise<Uint8Array<ArrayBuffer>> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  if (Number(request.headers["content-length"] ?? 0) > limit) throw tooLarge(request, limit);
  for await (const chunk of request.iterator({ destroyOnReturn: false })) {
    size += chunk.length;
    if (size > limit) throw tooLarge(request, limit);
    chunks.push(chunk);
  }
  const body = new Uint8Array(size);
  let at = 0;
  for (const chunk of chunks) {
    body.set(chunk, at);
    at += chunk.length;
  }
  return body;
}

function tooLarge(request: IncomingMessage, limit: number): ApiError {
  // A client that still writes reads no answer when its connection is reset.
  request.resume();
  return new ApiError(413, `The body is larger than ${limit / 2 ** 20} MiB.`, { code: "body_too_large" });
}

/** Milliseconds in which a client has to read the rest of its answer once the deadline is over. */
const GRACE = 10_000;

/** The reason of a signal whose client closed its connection; nobody is left to be told. */
export class ClientLeft extends Error {
  override name = "ClientLeft";
}

/**
 * `signal` aborts when the client closes its connection before it was answered in full (ClientLeft), or when `most`
 * seconds are over (ApiError 504). A client that does not even read what is there by then is cut off. `shorten` sets the
 * request's own deadline, in seconds from this call too; one that is over by then aborts at once.
 */
export function requestSignal(response: ServerResponse, most: number) {
  const controller = new AbortController();
  const { signal } = controller;
  const began = performance.now();
  const expire = (message: string) => {
    controller.abort(new ApiError(504, message, { code: "deadline_exceeded" }));
    timer = setTimeout(() => response.destroy(), GRACE);
  };
  let timer = setTimeout(expire, most * 1000, `The answer was not complete after ${most} seconds.`);
  const shorten = (deadline: number | null) => {
    if (deadline === null || deadline >= most || signal.aborted) return;
    clearTimeout(timer);
    const left = 1000 * deadline - (performance.now() - began);
    const message = "The answer was not complete within the request's deadline.";
    if (left > 0) timer = setTimeout(expire, left, message);
    else expire(message);
  };
  const close = () => {
    clearTimeout(timer);
    if (!response.writableFinished) controller.abort(new ClientLeft("the client went away"));
  };
  if (response.closed || response.destroyed) close();
  else response.once("close", close);
  return { signal, shorten };
}

export function sendJson(response: ServerResponse, status: number, body: string): void {
  response.writeHead(status, { "content-type": "application/json", "content-length": Buffer.byteLength(body) });
  response.end(body);
}

/** Answers with an error in OpenAI's shape. */
export function sendError(response: ServerResponse, error: ApiError): void {
  if (error.retryAfter !== null) response.setHeader("retry-after", String(error.retryAfter));
  sendJson(response, error.status, JSON.stringify(error));
}

/** Whether a request comes from this machine, and neither from a web page nor through a proxy that says so. */
export function isDirect({ socket, headers }: IncomingMessage): boolean {
  const forwarded = ["origin", "forwarded", "x-forwarded-for", "cf-connecting-ip"].some(
    (name) => headers[name] !== undefined,
  );
  const host = (headers.host ?? "").replace(/:\d+$/, "").toLowerCase();
  return isLoopback(socket.remoteAddress ?? "") && isLoopback(host) && !forwarded;
}
