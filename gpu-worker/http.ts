/** What node:http leaves to its users: bodies with a limit, JSON and error answers, a signal for clients that leave. */
import type { IncomingMessage, ServerResponse } from "node:http";
import { ApiError, toApiError } from "../shared/errors.ts";

/** A port that another process has; nothing is wrong with the program, so the message says it all. */
export class PortInUseError extends Error {
  override name = "PortInUseError";

  constructor(port: number, cause?: unknown) {
    super(`port ${port} is in use`, { cause });
  }
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

/** Aborts when the client closes its connection before it was answered in full. */
export function clientSignal(response: ServerResponse): AbortSignal {
  const controller = new AbortController();
  const check = () => {
    if (!response.writableFinished) controller.abort(new Error("the client went away"));
  };
  if (response.closed || response.destroyed) check();
  else response.once("close", check);
  return controller.signal;
}

export function sendJson(response: ServerResponse, status: number, body: string): void {
  response.writeHead(status, { "content-type": "application/json", "content-length": Buffer.byteLength(body) });
  response.end(body);
}

/** Answers with what may be told of an error, in OpenAI's shape; what may not goes to the log. */
export function sendError(response: ServerResponse, thrown: unknown): void {
  const error = toApiError(thrown);
  if (error.status >= 500) console.error(error.cause ?? error);
  sendJson(response, error.status, JSON.stringify(error));
}
