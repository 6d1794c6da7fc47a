/** The OpenAPI document of the public endpoint: requests from their zod schemas, the rest as data. Knows no request. */
import * as z from "zod";
import { ChatRequest, CompletionRequest } from "../shared/api.ts";

/** Every error code: its status and what it means. The test of docs/api.md holds it against the sources. */
export const ERRORS: Record<string, readonly [status: number, meaning: string]> = {
  incomplete_body: [400, "The connection ended before the body did."],
  invalid_utf8: [400, "The body is not UTF-8."],
  invalid_json: [400, "The body is not JSON; the message says where."],
  too_many_values: [400, "The body has more than a million JSON values."],
  unknown_parameter: [400, "There is no parameter of this name."],
  unsupported_parameter: [400, "OpenAI or vLLM have this parameter; the message says why it is refused here."],
  context_length_exceeded: [400, "Prompt and answer have no room in the model's context."],
  invalid_image_url: [400, "The image is neither a base64 data: URL of a known type nor an http(s) URL."],
  invalid_base64: [400, "The data: URL's base64 is malformed."],
  empty_image: [400, "The image has no bytes."],
  invalid_image: [400, "The image is damaged, of an unknown format, or beyond the limits on its size."],
  image_too_large: [400, "The image that was fetched has too many bytes."],
  images_too_large: [400, "The images that were fetched have too many bytes together."],
  image_url_refused: [400, "The image's URL leads to where this server does not fetch from."],
  image_fetch_failed: [400, "The image could not be fetched."],
  image_placeholders: [400, "The prompt has another number of image placeholders than the request has images."],
  invalid_json_schema: [400, "The response_format's schema cannot be made into a grammar."],
  hash_mismatch: [400, "Between edge and worker: an image's bytes do not have the SHA-256 of its path."],
  invalid_signature: [401, "Between edge and worker: the signature is missing, wrong, too old, or was used before."],
  invalid_api_key: [401, "The API key is missing or not known."],
  no_api_keys: [401, "No API keys are configured, and the client is on another machine."],
  model_not_allowed: [403, "The API key may not use this model."],
  host_not_allowed: [403, "No API keys are configured, and the header Host names no loopback address."],
  origin_not_allowed: [403, "No API keys are configured, and the request is of a web page from elsewhere."],
  not_found: [404, "There is nothing at this path."],
  model_not_found: [404, "No such model is served."],
  image_not_found: [404, "The picture of this name is not held, not any more, or not for this size. Send its bytes."],
  method_not_allowed: [405, "The path takes another method; the header Allow names it."],
  model_changed: [412, "Between edge and worker: the prompt was made for another model."],
  body_too_large: [413, "The body is larger than 20 MiB (64 MiB at the GPU worker itself)."],
  rate_limit_exceeded: [429, "The API key's requests of this minute are used up. See Retry-After."],
  queue_full: [429, "Too many requests wait for a GPU. See Retry-After."],
  internal_error: [500, "A fault of the service; the log has its cause under the request's id."],
  misconfigured: [500, "A setting of the service cannot be used; the log names it."],
  upstream_error: [502, "A GPU worker answered what the edge cannot use."],
  upstream_unreachable: [503, "No GPU worker can be reached."],
  not_ready: [503, "No GPU worker is ready."],
  draining: [503, "The GPU worker is about to end. See Retry-After."],
  engine_stopped: [503, "The engine stopped in the middle of the request, and starts again."],
  grammar_restarted: [503, "The compiler of grammars stopped in the middle of the request, and starts again."],
  image_missing: [503, "The GPU worker cannot hold all images of the request at once."],
  deadline_exceeded: [504, "The request took longer than its `deadline`, or the service, allows."],
};

type Schema = Record<string, unknown>;
const ref = (name: string): Schema => ({ $ref: `#/components/schemas/${name}` });
const json = (schema: Schema) => ({ "application/json": { schema } });
const object = (properties: Schema, optional: string[] = []): Schema => ({
  type: "object",
  properties,
  required: Object.keys(properties).filter((name) => !optional.includes(name)),
});
const array = (items: Schema): Schema => ({ type: "array", items });
const nullable = (schema: Schema): Schema => ({ anyOf: [schema, { type: "null" }] });
const constant = (value: string): Schema => ({ const: value });
const [text, count, number]: Schema[] = [{ type: "string" }, { type: "integer", minimum: 0 }, { type: "number" }];

const finishReason = { enum: ["stop", "length"] };
const tokenLogprob = { token: text, logprob: number, bytes: array(count) };
const chatLogprobs = object({
  content: array(object({ ...tokenLogprob, top_logprobs: array(object(tokenLogprob)) })),
  refusal: { type: "null" },
});
const completionLogprobs = object({
  tokens: array(text),
  token_logprobs: array(number),
  top_logprobs: array({ type: "object", additionalProperties: number }),
  text_offset: array(count),
});
const answer = (kind: string, choice: Schema) => {
  const choices = array(object({ index: count, finish_reason: nullable(finishReason), ...choice }));
  const tier = { enum: ["default", "flex"] };
  return { id: text, object: constant(kind), created: count, model: text, service_tier: tier, choices };
};
/** What a chunk has, if stream_options ask for it. */
const chunk = (kind: string, choice: Schema): Schema =>
  object({ ...answer(kind, choice), usage: nullable(ref("Usage")), draft: ref("Draft") }, ["usage", "draft"]);

const usage = object({
  prompt_tokens: count,
  completion_tokens: count,
  total_tokens: count,
  prompt_tokens_details: object({
    cached_tokens: count,
    image_tokens: { ...count, description: "Prompt tokens that stand for pictures." },
  }),
  completion_tokens_details: object({
    accepted_prediction_tokens: { ...count, description: "Tokens of the draft model that the model accepted." },
    rejected_prediction_tokens: { ...count, description: "Tokens that were drafted in vain." },
  }),
});
const draft = object({
  tokens: { ...count, description: "Tokens of this chunk." },
  accepted: { ...count, description: "How many of them were accepted drafts." },
  characters: { ...count, description: "How many of the text's first characters came of drafts." },
  ms: { type: "number", description: "Milliseconds since the choice's first tokens, by the worker's clock." },
});
const model = object({ id: text, object: constant("model"), created: count, owned_by: text });
const error = object({ message: text, type: text, param: nullable(text), code: nullable(text) });
const none: Schema = { type: "null" };
const chat = { logprobs: nullable(chatLogprobs) };
const completion = { text, logprobs: nullable(completionLogprobs) };
const message = object({ role: constant("assistant"), content: text, refusal: none });
const delta = object({ role: text, content: text, refusal: none }, ["role", "content", "refusal"]);

const schemas = (): Record<string, Schema> => ({
  ChatRequest: requestSchema(ChatRequest),
  CompletionRequest: requestSchema(CompletionRequest),
  Chat: object({ ...answer("chat.completion", { message, ...chat }), usage: ref("Usage") }),
  ChatChunk: chunk("chat.completion.chunk", { delta, ...chat }),
  Completion: object({ ...answer("text_completion", completion), usage: ref("Usage") }),
  CompletionChunk: chunk("text_completion", completion),
  Usage: usage,
  Draft: draft,
  Model: model,
  Models: object({ object: constant("list"), data: array(ref("Model")) }),
  Status: object({ status: text }),
  Error: object({ error }),
});

function requestSchema(schema: z.ZodType): Schema {
  const { $schema: _, ...rest } = z.toJSONSchema(schema, { unrepresentable: "any" });
  return rest;
}

/** Those of the errors that an operation can answer with, by status. */
function errorResponses(statuses: number[]): Record<string, object> {
  const codesOf = (status: number) =>
    Object.entries(ERRORS)
      .filter(([, [of, meaning]]) => of === status && !meaning.startsWith("Between edge and worker"))
      .map(([code]) => code);
  const responses = statuses.map((status) => {
    const codes = codesOf(status);
    const description = `Codes: ${codes.join(", ")}${status === 400 ? "; without a code: a parameter's value" : ""}.`;
    return [status, { description, headers: headers(status === 429 || status === 503), content: json(ref("Error")) }];
  });
  return Object.fromEntries(responses);
}

function headers(retry = false): Record<string, object> {
  const id = { description: "The request's id, which the logs have too.", schema: text };
  const after = { description: "Seconds after which to try again.", schema: count };
  return { "x-request-id": id, ...(retry ? { "retry-after": after } : {}) };
}

const GUARDED = [401, 403, 500, 502, 503];
const GENERATES = [400, 404, 413, 429, ...GUARDED, 504].toSorted();

interface Operation {
  summary: string;
  content: object;
  errors: number[];
  request?: string;
  /** No key is asked for. */
  open?: true;
}

function operation({ summary, content, errors, request, open }: Operation): object {
  const answers = { 200: { description: "OK", headers: headers(), content }, ...errorResponses(errors) };
  const body = request && { required: true, content: json(ref(request)) };
  return { summary, ...(body ? { requestBody: body } : {}), responses: answers, ...(open ? { security: [] } : {}) };
}

const generates = (summary: string, request: string, whole: string, chunk: string) =>
  operation({
    summary,
    request,
    errors: GENERATES,
    content: { ...json(ref(whole)), "text/event-stream": { schema: ref(chunk) } },
  });
const gives = (summary: string, schema: string, errors: number[], open?: true) =>
  operation({ summary, content: json(ref(schema)), errors, open });

const CHAT = "Answers a conversation with pictures. With `stream`, events `data: {chunk}`, at the end `data: [DONE]`; a failure in mid-stream is an event with an error."; // biome-ignore format: one line

/** The endpoints by path and method. */
const paths = () => ({
  "/v1/chat/completions": { post: generates(CHAT, "ChatRequest", "Chat", "ChatChunk") },
  "/v1/completions": {
    post: generates("Goes on with a text.", "CompletionRequest", "Completion", "CompletionChunk"),
  },
  "/v1/models": { get: gives("The models that the key may use.", "Models", GUARDED) },
  "/v1/models/{model}": {
    get: gives("One of them.", "Model", [404, ...GUARDED]),
    parameters: [{ name: "model", in: "path", required: true, schema: text }],
  },
  "/health": { get: gives("Whether the edge itself runs.", "Status", [], true) },
  "/ready": { get: gives("Whether a GPU worker is ready to answer.", "Status", [503], true) },
  "/openapi.json": {
    get: operation({ summary: "This document.", content: json({ type: "object" }), errors: [], open: true }),
  },
  "/": {
    get: operation({ summary: "The playground.", content: { "text/html": { schema: text } }, errors: [], open: true }),
  },
});

let document: object | null = null;

/** The document, made at the first call. */
export function openApi(): object {
  document ??= {
    openapi: "3.1.0",
    info: { title: "ViSpec", version: "1", description: "OpenAI's chat API for vision-language models." },
    security: [{ key: [] }],
    paths: paths(),
    components: {
      schemas: schemas(),
      securitySchemes: {
        key: {
          type: "http",
          scheme: "bearer",
          description: "Where no keys are configured, none is asked for, and only the service's own machine is served.",
        },
      },
    },
  };
  return document;
}
