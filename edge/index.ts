/** The public endpoint, a Worker: checks and tokenizes requests, passes answers through. Runs no model, reads no answer. */
import { type Context, Hono } from "hono";
import { cors } from "hono/cors";
import { type Asker, type ChatModel, type PreparedChat, prepareChat, prepareCompletion } from "../shared/chat.ts";
import { ApiError, toApiError } from "../shared/errors.ts";
import { parseChatRequest, parseCompletionRequest } from "../shared/parse.ts";
import { type Bindings, configOf } from "./config.ts";
import { type ApiKey, authenticate, checkModel, maySee } from "./keys.ts";
import { checkLocal, isLocalOrigin } from "./local.ts";
import { openApi } from "./openapi.ts";
import { pageResponse } from "./page.ts";
import { countRequest } from "./rate.ts";

export { Rate } from "./rate.ts";

interface Env {
  Bindings: Bindings;
  /** `key` is null where none is needed. */
  Variables: { requestId: string; key: ApiKey | null };
}
type EdgeContext = Context<Env>;

/** An isolate has 128 MB for everything; a body is there up to four times (text, parsed, base64 decoded, bytes). */
const BODY_LIMIT = 20 * 2 ** 20;

const ID_PREFIXES: Record<string, string> = { "/v1/chat/completions": "chatcmpl-", "/v1/completions": "cmpl-" };

const app = new Hono<Env>();
export default app;

/** Gives each request its id, and a line in the log. */
app.use(async (c, next) => {
  const begun = Date.now();
  const id = `${ID_PREFIXES[c.req.path] ?? "req-"}${crypto.randomUUID()}`;
  c.set("requestId", id);
  c.set("key", null);
  await next();
  c.res.headers.set("x-request-id", id);
  console.log(logLine(c, Date.now() - begun));
});

app.use(
  cors({
    origin: (origin, c: EdgeContext) => {
      const { keys, origins } = configOf(c.env);
      if (keys.length === 0) return isLocalOrigin(origin) ? origin : null;
      return origins.includes("*") ? "*" : origins.find((allowed) => allowed === origin);
    },
    // Headers: those that the browser asks for, such as authorization and the x-stainless-* of the client `openai`.
    allowMethods: ["GET", "HEAD", "POST"],
    exposeHeaders: ["x-request-id", "retry-after"],
    maxAge: 86400,
  }),
);

app.use("/v1/*", async (c, next) => {
  const { keys } = configOf(c.env);
  if (keys.length === 0) checkLocal(c.req.raw);
  else c.set("key", await authenticate(keys, c.req.header("authorization")));
  await next();
});

app.post("/v1/chat/completions", (c) => complete(c, parseChatRequest, prepareChat));
app.post("/v1/completions", (c) => complete(c, parseCompletionRequest, prepareCompletion));

app.get("/v1/models", async (c) => c.json({ object: "list", data: await models(c) }));

app.get("/v1/models/:id{.+}", async (c) => {
  const id = c.req.param("id");
  checkModel(c.get("key"), id);
  const model = (await models(c)).find((model) => model.id === id);
  if (!model) throw new ApiError(404, "There is no such model here.", { code: "model_not_found", param: "model" });
  return c.json(model);
});

app.get("/health", (c) => c.json({ status: "ok" }));

app.get("/ready", async (c) => {
  await configOf(c.env).upstreams.ready();
  return c.json({ status: "ready" });
});

app.get("/openapi.json", (c) => c.json(openApi()));
app.get("/", () => pageResponse());

const METHODS: Record<string, string> = {
  "/v1/chat/completions": "POST",
  "/v1/completions": "POST",
  "/v1/models": "GET",
  "/v1/models/:id{.+}": "GET",
  "/health": "GET",
  "/ready": "GET",
  "/openapi.json": "GET",
  "/": "GET",
};
for (const [path, method] of Object.entries(METHODS)) app.all(path, (c) => methodNotAllowed(c, method));

app.notFound((c) =>
  errorResponse(new ApiError(404, `There is nothing at ${c.req.path.slice(0, 200)}.`, { code: "not_found" })),
);

app.onError((thrown) => errorResponse(toApiError(thrown)));

/** Reads, checks and prepares a request, and passes the worker's answer through. */
async function complete<Asked extends { model?: string | null }>(
  c: EdgeContext,
  parse: (body: Uint8Array) => Asked,
  prepare: (asked: Asked, model: ChatModel, asker: Asker) => Promise<PreparedChat>,
): Promise<Response> {
  const { upstreams } = configOf(c.env);
  const arrived = Date.now();
  const key = c.get("key");
  await countRequest(c.env.RATES, key);
  const asked = parse(await readBody(c.req.raw));
  const asker = { id: c.get("requestId"), tenant: key?.name ?? "" };
  for (let attempt = 0; ; attempt++) {
    const model = await upstreams.model();
    checkModel(key, asked.model ?? model.info.id);
    const response = await upstreams.generate(await prepare(asked, model, asker), arrived);
    // 412: the workers hold another model by now.
    if (response.status !== 412 || attempt > 0) return passThrough(response);
    await response.body?.cancel();
    upstreams.forget(model);
  }
}

/** The models that the key may use, as the workers describe them. */
async function models(c: EdgeContext): Promise<{ id: string }[]> {
  const { data } = await configOf(c.env).upstreams.models();
  return data.filter(({ id }) => maySee(c.get("key"), id));
}

/**
 * The body's bytes. Throws ApiError 413 when there are too many, after reading on for a while: a client that still writes
 * gets a reset connection instead of the answer.
 */
async function readBody(request: Request): Promise<Uint8Array> {
  const length = request.headers.get("content-length");
  const chunks: Uint8Array[] = [];
  let size = 0;
  try {
    // In one go where it can be, which is faster by far.
    if (length !== null && Number(length) <= BODY_LIMIT) return new Uint8Array(await request.arrayBuffer());
    for await (const chunk of request.body ?? []) {
      size += chunk.length;
      if (size <= BODY_LIMIT) chunks.push(chunk);
      else chunks.length = 0;
      if (size > 4 * BODY_LIMIT) break;
    }
  } catch (cause) {
    throw new ApiError(400, "The body ends before its time.", { code: "incomplete_body", cause });
  }
  if (size > BODY_LIMIT)
    throw new ApiError(413, `The body is larger than ${BODY_LIMIT / 2 ** 20} MiB.`, { code: "body_too_large" });
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

/** The worker's answer with its body unread: the runtime moves the bytes, this isolate does not see them. */
function passThrough(upstream: Response): Response {
  const headers = new Headers();
  for (const name of ["content-type", "cache-control", "retry-after"]) {
    const value = upstream.headers.get(name);
    if (value !== null) headers.set(name, value);
  }
  return new Response(upstream.body, { status: upstream.status, headers });
}

function methodNotAllowed(c: EdgeContext, allowed: string): Response {
  const message = `${c.req.method} is not allowed on ${c.req.path}; use ${allowed}.`;
  const response = errorResponse(new ApiError(405, message, { code: "method_not_allowed" }));
  response.headers.set("allow", allowed === "GET" ? "GET, HEAD, OPTIONS" : `${allowed}, OPTIONS`);
  return response;
}

function errorResponse(error: ApiError): Response {
  const response = Response.json(error, { status: error.status });
  if (error.retryAfter !== null) response.headers.set("retry-after", String(error.retryAfter));
  if (error.status === 401) response.headers.set("www-authenticate", "Bearer");
  return response;
}

function logLine(c: EdgeContext, ms: number): string {
  const { status } = c.res;
  const failed = status >= 500;
  const request = { id: c.get("requestId"), method: c.req.method, path: c.req.path.slice(0, 200), status, ms };
  const code = c.error && toApiError(c.error).code;
  const error = c.error && failed ? causeOf(c.error) : undefined;
  const level = failed ? "error" : "info";
  return JSON.stringify({ level, msg: "edge", ...request, tenant: c.get("key")?.name, code, error });
}

/** For the log alone: what no client may see. */
function causeOf(error: unknown): string {
  if (error instanceof AggregateError) return error.errors.map(causeOf).join("; ");
  if (error instanceof ApiError) return error.cause === undefined ? error.message : causeOf(error.cause);
  return error instanceof Error ? (error.stack ?? String(error)) : String(error);
}
