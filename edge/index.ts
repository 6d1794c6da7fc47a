/** The public endpoint, a Worker: checks and tokenizes requests, passes answers through. Runs no model, reads no answer. */
import { type Context, Hono } from "hono";
import { prepareChat } from "../shared/chat.ts";
import { ApiError, toApiError } from "../shared/errors.ts";
import { parseChatRequest } from "../shared/parse.ts";
import type { ChatRequest } from "../shared/protocol.ts";
import { Upstreams } from "./upstream.ts";

interface Env {
  Bindings: { GPU_WORKERS: string };
  Variables: { requestId: string };
}

/** An isolate has 128 MB for everything; a body is there up to four times (text, parsed, base64 decoded, bytes). */
const BODY_LIMIT = 20 * 2 ** 20;

const app = new Hono<Env>();
export default app;

let upstreams: Upstreams | null = null;
const upstreamsOf = (c: Context<Env>) => (upstreams ??= new Upstreams(c.env.GPU_WORKERS));

app.use(async (c, next) => {
  c.set("requestId", `chatcmpl-${crypto.randomUUID()}`);
  await next();
  c.res.headers.set("x-request-id", c.get("requestId"));
});

app.post("/v1/chat/completions", async (c) => {
  const chat = parseChatRequest(await readText(c.req.raw));
  // Until there are keys, whoever shares an address shares a lane of the queue. Cloudflare sets the header.
  const tenant = c.req.header("cf-connecting-ip") ?? "";
  return passThrough(await complete(upstreamsOf(c), chat, c.get("requestId"), tenant));
});

app.get("/v1/models", async (c) => passThrough(await upstreamsOf(c).get("/v1/models")));

app.all("/v1/chat/completions", (c) => methodNotAllowed(c, "POST"));
app.all("/v1/models", (c) => methodNotAllowed(c, "GET"));

app.notFound((c) => errorResponse(new ApiError(404, `There is nothing at ${c.req.path}.`, { code: "not_found" })));

app.onError((thrown) => {
  const error = toApiError(thrown);
  if (error.status >= 500) console.error(String(error.cause ?? error));
  return errorResponse(error);
});

/**
 * The body's text. Throws ApiError 413 when it is too large, after reading on for a while: a client that still writes
 * gets a reset connection instead of the answer.
 */
async function readText(request: Request): Promise<string> {
  const decoder = new TextDecoder();
  let text = "";
  let size = 0;
  for await (const chunk of request.body ?? []) {
    size += chunk.length;
    if (size <= BODY_LIMIT) text += decoder.decode(chunk, { stream: true });
    else text = "";
    if (size > 4 * BODY_LIMIT) break;
  }
  if (size <= BODY_LIMIT) return text + decoder.decode();
  throw new ApiError(413, `The body is larger than ${BODY_LIMIT / 2 ** 20} MiB.`, { code: "body_too_large" });
}

async function complete(workers: Upstreams, chat: ChatRequest, id: string, tenant: string): Promise<Response> {
  for (let attempt = 0; ; attempt++) {
    const model = await workers.model();
    const response = await workers.generate(await prepareChat(chat, model, id), id, tenant);
    // 412: the workers hold another model by now.
    if (response.status !== 412 || attempt > 0) return response;
    await response.body?.cancel();
    workers.forget(model);
  }
}

/** The worker's answer with its body unread: the runtime moves the bytes, this isolate does not see them. */
function passThrough(upstream: Response): Response {
  const headers = new Headers();
  for (const name of ["content-type", "cache-control"]) {
    const value = upstream.headers.get(name);
    if (value !== null) headers.set(name, value);
  }
  return new Response(upstream.body, { status: upstream.status, headers });
}

function methodNotAllowed(c: Context, allowed: string): Response {
  const message = `${c.req.method} is not allowed on ${c.req.path}; use ${allowed}.`;
  const response = errorResponse(new ApiError(405, message, { code: "method_not_allowed" }));
  response.headers.set("allow", allowed);
  return response;
}

function errorResponse(error: ApiError): Response {
  return Response.json(error, { status: error.status });
}
