/**
 * Bad requests made from good ones, the same for the same seed: at the levels of bytes, JSON, schema, picture, parameter
 * and HTTP. Knows the public schemas, and from them what an answer has to name; sends nothing.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { z } from "zod";
import { ChatRequest, CompletionRequest } from "../../shared/api.ts";
import { GenerateRequest } from "../../shared/protocol.ts";
import { dataUrl, GOLDENS } from "./goldens.ts";
import { type Body, breakSomewhere, encode, type Json, Random } from "./wrong-values.ts";

export interface BadRequest {
  kind: string;
  method: string;
  path: string;
  headers: Record<string, string>;
  body: Buffer;
  /** Goes to the GPU worker itself and not to the edge: in public, or as the edge with a signature that is good or bad. */
  worker?: "public" | "signed" | "unsigned";
  expected: Expected;
}

export interface Expected {
  /** The only status that will do; else any 4xx. */
  status?: number;
  /** What the error's param begins with; null: nothing has to be named; absent: something has to. */
  param?: string | null;
  /** It may be good after all. */
  mayPass?: boolean;
}

const CHAT = "/v1/chat/completions";
const TEXT = "/v1/completions";
const picture = dataUrl("images/size-28x28.png");
const image = (url: string): Json => ({ type: "image_url", image_url: { url } });

/** Good requests, with answers so short that one which stays good costs little. */
const good: { path: string; schema: z.ZodType; body: Body }[] = [
  { path: CHAT, schema: ChatRequest, body: { messages: [{ role: "user", content: "Hi" }], max_tokens: 1 } },
  {
    path: CHAT,
    schema: ChatRequest,
    body: {
      messages: [
        { role: "system", content: "Be short." },
        { role: "user", content: [image(picture), { type: "text", text: "What is it?" }] },
        { role: "assistant", content: "A shape.", refusal: null },
        { role: "user", content: [{ type: "text", text: "Wie groß? 🟣" }] },
      ],
      ...{ max_tokens: 2, temperature: 0.5, seed: 7, stop: ["x", "y"], n: 1 },
    },
  },
  {
    path: CHAT,
    schema: ChatRequest,
    body: {
      messages: [
        { role: "developer", content: [{ type: "text", text: "Be short." }] },
        {
          role: "user",
          content: [
            {
              type: "image_url",
              image_url: { url: picture, detail: "low", min_pixels: 784, max_pixels: 5000 },
              ...{ min_pixels: 784, max_pixels: 5000 },
            },
            { type: "text", text: "Colour?" },
          ],
        },
      ],
      ...{ model: "tiny-qwen2.5-vl", max_completion_tokens: 2, n: 2, temperature: 1, top_p: 0.9, top_k: 5, min_p: 0.1 },
      ...{ seed: -1, presence_penalty: 0.5, frequency_penalty: -0.5, repetition_penalty: 1.1, logit_bias: { "5": 3 } },
      ...{ stop: "never", stop_token_ids: [3], ignore_eos: false, stream: true, drafter: "none", user: "someone" },
      ...{ stream_options: { include_usage: true, include_drafts: true }, logprobs: true, top_logprobs: 2 },
      ...{ service_tier: "flex", deadline: 3600 },
      ...{ min_pixels: 784, mm_processor_kwargs: { max_pixels: 9000 }, response_format: { type: "text" } },
    },
  },
  {
    path: CHAT,
    schema: ChatRequest,
    body: {
      messages: [{ role: "user", content: "A shape in JSON." }],
      max_tokens: 2,
      response_format: {
        type: "json_schema",
        json_schema: { name: "shape", description: "One", strict: true, schema: { type: "boolean" } },
      },
    },
  },
  { path: TEXT, schema: CompletionRequest, body: { prompt: "Once upon", max_tokens: 2, logprobs: 1, stream: false } },
  { path: TEXT, schema: CompletionRequest, body: { prompt: [5, 6, 7], max_tokens: 1 } },
];

/** What has to be said of a body that was damaged without knowing where, by asking the schema. */
function expectedOf(body: Buffer, schema: z.ZodType): Expected {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(body));
  } catch {
    return { status: 400, param: null }; // no UTF-8, or no JSON
  }
  const result = schema.safeParse(value);
  if (result.success) return { mayPass: true };
  if (value === null || typeof value !== "object" || Array.isArray(value)) return { status: 400, param: null };
  const first = ({ path, ...issue }: z.core.$ZodIssue) =>
    path[0] ?? (issue.code === "unrecognized_keys" && issue.keys[0]);
  const [param, ...others] = new Set(result.error.issues.map(first));
  return others.length === 0 && typeof param === "string" ? { status: 400, param } : { status: 400 };
}

/** Bytes that are no UTF-8: a lone continuation, an overlong slash, a surrogate, beyond Unicode, a character cut short. */
const NOT_UTF8 = [[0x80], [0xc0, 0xaf], [0xed, 0xa0, 0x80], [0xf4, 0x90, 0x80, 0x80], [0xe2, 0x82], [0xff], [0xfe]];

const byteDamages: ((random: Random, body: Buffer) => Buffer)[] = [
  (random, body) => {
    const copy = Buffer.from(body);
    for (let i = 1 + random.below(4); i > 0; i--) copy[random.below(copy.length)] ^= 1 << random.below(8);
    return copy;
  },
  (random, body) => body.subarray(0, random.below(body.length)),
  (random, body) => body.subarray(1 + random.below(body.length)),
  (random, body) => insert(body, random.below(body.length), Buffer.from(random.pick(NOT_UTF8))),
  (random, body) => insert(body, random.below(body.length), Buffer.alloc(1 + random.below(3))), // NULs
  (_random, body) => Buffer.concat([Buffer.from([0xef, 0xbb, 0xbf]), body]), // a byte order mark
  (_random, body) => Buffer.from(body.toString(), "utf16le"),
  (random) => Buffer.from(Array.from({ length: random.below(200) }, () => random.below(256))),
  (random, body) => insert(body, random.below(body.length), body.subarray(random.below(body.length))),
];

function insert(body: Buffer, at: number, bytes: Buffer): Buffer {
  return Buffer.concat([body.subarray(0, at), bytes, body.subarray(at)]);
}

const brackets = /[[\]{},:"]/g;
const jsonDamages: ((random: Random, text: string) => string)[] = [
  // A bracket, comma, colon or quote lost or doubled.
  (random, text) => {
    const { index } = random.pick([...text.matchAll(brackets)]);
    return text.slice(0, index) + (random.below(2) ? text[index].repeat(2) : "") + text.slice(index + 1);
  },
  // A key twice.
  (random, text) => `{${random.pick(['"max_tokens":0', '"messages":[]', '"prompt":{}', '"temperature":1e999', '"n":0.5'])},${text.slice(1)}`, // biome-ignore format: one line
  (random, text) => `${text.slice(0, -1)},${random.pick(['"max_tokens":-1', '"messages":7', '"prompt":[]', '"seed":1e400', '"n":99999999999999999999'])}}`, // biome-ignore format: one line
  // What is JSON in other languages.
  (random, text) => text.replace(/:(\d+)/, `:${random.pick(["NaN", "Infinity", "0x10", "+1", "01", "1.", ".5", "1_000", "-", "undefined", "'1'", "1e", "١"])}`), // biome-ignore format: one line
  (random, text) => random.pick([`${text},`, `[${text}]`, `"${text}`, `(${text})`, `${text}${text}`, `/**/${text}`, text.replaceAll('"', "'"), `while(1);${text}`]), // biome-ignore format: one line
  (random) => random.pick(["", " ", "null", "true", "7", '"messages"', "[]", "{}", "[[]]", "{}{}", "\ud800", "]", '{"', "-", "nul"]), // biome-ignore format: one line
  (random, text) => text.replace(/"([^"]*)"/, (_, inner) => `"${inner}${random.pick(["\\x", "\\u12", "\\ud800\\", "\n", "\t", "\u0000"])}"`), // biome-ignore format: one line
  // Keys that mean something to JavaScript, and not to this API.
  (random, text) => `{${random.pick(['"__proto__":{"n":2}', '"constructor":{"prototype":{}}', '"toString":1', '"hasOwnProperty":null', '"then":1', '"tools":[]', '"functions":[]', '"best_of":2', '"echo":true'])},${text.slice(1)}`, // biome-ignore format: one line
  (random) => nested(random),
];

/** Nested ten to a hundred thousand deep, as the body or somewhere within one. */
function nested(random: Random): string {
  const depth = 10 ** (1 + random.below(5));
  const [open, close, core] = random.pick([["[", "]", ""], ['{"a":', "}", "1"], ['[{"a":', "}]", "null"]]); // biome-ignore format: one line
  const deep = open.repeat(depth) + core + (random.below(3) ? close.repeat(depth) : "");
  const places = [
    deep,
    `{"messages":${deep}}`,
    `{"messages":[{"role":"user","content":${deep}}]}`,
    `{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"logit_bias":${deep}}`,
    `{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"other":${deep}}`,
    `{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":${deep}}}}`,
    `{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"object","properties":{"a":${deep}}}}}}`,
    `{"prompt":${deep},"max_tokens":1}`,
  ];
  return random.pick(places);
}

/** What a schema cannot say: parameters that do not fit each other, the model or the context. */
const unfit: [change: Body, param: string, status?: number][] = [
  [{ model: "gpt-4o" }, "model", 404],
  [{ model: "" }, "model", 404],
  [{ model: "m".repeat(100_000) }, "model", 404],
  [{ max_tokens: 4096 }, "max_tokens"],
  [{ max_tokens: 2 ** 53 - 1 }, "max_tokens"],
  [{ max_tokens: 1, max_completion_tokens: 1 }, "max_"],
  [{ max_tokens: null, max_completion_tokens: 4096 }, "max_"],
  [{ top_logprobs: 2 }, "top_logprobs"],
  [{ logprobs: false, top_logprobs: 2 }, "top_logprobs"],
  [{ stream_options: {} }, "stream_options"],
  [{ stream: false, stream_options: { include_usage: true } }, "stream_options"],
  [{ stop_token_ids: [0, 1_000_000] }, "stop_token_ids[1]"],
  [{ logit_bias: { "999999999": 1 } }, "logit_bias.999999999"],
  [{ min_pixels: 5, mm_processor_kwargs: { min_pixels: 5 } }, "m"],
  [{ ignore_eos: true, response_format: { type: "json_object" } }, "ignore_eos"],
  [{ messages: [{ role: "user", content: "word ".repeat(50_000) }] }, "messages"],
  [{ messages: Array.from({ length: 5000 }, () => ({ role: "user", content: "Hi" })) }, "messages"],
  [{ messages: [{ role: "user", content: Array.from({ length: 5000 }, () => ({ type: "text", text: "Hi" })) }] }, "messages"], // biome-ignore format: one line
  [{ messages: [{ role: "user", content: Array.from({ length: 800 }, () => image(picture)) }] }, "messages"],
];

/** Schemas of which a grammar's compiler may make nothing. */
const oddSchemas: Json[] = [
  ...[{ type: "nonsense" }, { type: ["string", 7] }, { $ref: "#/nowhere" }, { $ref: "https://example.org/schema" }],
  ...[{ type: "string", pattern: "(" }, { minItems: "x" }, { properties: 7 }, { enum: [] }, { anyOf: [] }, { not: {} }],
  ...[{ type: "string", format: "no-such" }, { type: "integer", minimum: 5, maximum: 1 }, { $ref: "#" }, { items: [] }],
  ...[
    { type: "object", properties: { a: { $ref: "#" } }, required: ["a"] },
    { type: "string", minLength: 1e9 },
  ],
  ...[{ type: "string", pattern: "(a+)+$" }, { type: "array", minItems: 1e6 }, { enum: [{}] }, { required: "a" }],
];

const file = (name: string) => readFileSync(join(GOLDENS, "images", name));
const files = ["size-28x28.png", "jpeg-420.jpg", "gif.gif", "webp-lossy.webp", "png-palette.png", "jpeg-progressive.jpg"].map(file); // biome-ignore format: one list
const notPictures = ["bad-text.png", "bad-truncated.jpg", "bmp.bmp"].map(file);

/** A PNG's header that promises this size, and little behind it. */
function pngOf(width: number, height: number): Buffer {
  const bytes = Buffer.from(files[0]);
  bytes.writeUInt32BE(width, 16);
  bytes.writeUInt32BE(height, 20);
  bytes.writeUInt32BE(crc32(bytes.subarray(12, 29)), 29);
  return bytes;
}

const base64 = (bytes: Buffer, type = "image/png") => `data:${type};base64,${bytes.toString("base64")}`;

/** URLs of things that are no pictures; those with `true` may turn out to be one. */
const badPictures: ((random: Random) => string | [string, true])[] = [
  (random) => base64(Buffer.from(Array.from({ length: random.below(64) }, () => random.below(256)))),
  (random) => base64(random.pick(notPictures)),
  (random) => [base64(((bytes) => bytes.subarray(0, random.below(bytes.length)))(random.pick(files))), true],
  (random) => {
    const bytes = Buffer.from(random.pick(files));
    for (let i = 1 + random.below(20); i > 0; i--) bytes[random.below(bytes.length)] = random.below(256);
    return [base64(bytes), true];
  },
  (random) => base64(random.pick([pngOf(30_000, 30_000), pngOf(0, 5), pngOf(2 ** 31 - 1, 2 ** 31 - 1), pngOf(100_000, 1), pngOf(1, 100_000)])), // biome-ignore format: one list
  (random) => base64(random.pick(files), random.pick(["image/svg+xml", "text/html", "image/bmp", "application/pdf", "", "image", "IMAGE /PNG"])), // biome-ignore format: one list
  (random) => base64(Buffer.from('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'), random.pick(["image/png", "image/svg+xml"])), // biome-ignore format: one line
  (random) => random.pick(["data:,", "data:", "data:image/png", "data:image/png,x", "data:image/png;base64", "data:image/png;base64,", "data:image/png;base64,AA", "data:image/png;base64,A", "data:image/png;base64,====", "data:image/png;base64,!!!!", "data:image/png;base64,iVBO\u0000Rw0K", "data:image/png;base64;base64x,AAAA"]), // biome-ignore format: one list
  (random) => random.pick(["x", " ", "//", "/etc/passwd", "file:///etc/passwd", "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/", "javascript:1", "blob:null", "about:blank", "HTTP:", "http://", "https://:0", "http://[", "http://a b/", "http://127.0.0.1:99999/"]), // biome-ignore format: one list
  (random) => random.pick(["http://127.0.0.1/a.png", "http://127.1/", "http://2130706433/", "http://0x7f.1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://user:secret@192.168.0.1/", "http://0.0.0.0/", "http://localhost/"]), // biome-ignore format: one list
  (random) => `http://127.0.0.1/${"a".repeat(8000 + random.below(2000))}`,
  (random) => random.pick(["sha256:", "SHA256:", `sha256:${"0".repeat(64)}`, `sha256:${"A".repeat(64)}`, `sha256:${"0".repeat(1e5)}`, `sha256:${"0".repeat(64)}\n`]), // biome-ignore format: one list
  (random) => `data:image/png;base64,${"A".repeat(4 * random.below(100_000))}`,
];

const methods = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"];
const paths = ["/v1", "/v1/", "/v1/chat", "/v1/chat/completions/", "/v1//chat/completions", "/v1/chat/completions/../x", "/V1/CHAT/COMPLETIONS", "/v1/chat/completions%00", "/v1/embeddings", "/internal/model", "/internal/generate", "/metrics", "/.env", "/%", "/%ff", "/..%2f..%2fetc/passwd", `/${"a".repeat(5000)}`, "/v1/models/gpt-4o", "/v1/models/%2e%2e", "/__proto__"]; // biome-ignore format: one list
const oddHeaders: Record<string, string>[] = [
  ...["text/plain", "", "application/json; charset=utf-16", "multipart/form-data", "application/x-www-form-urlencoded", "application/json, text/html", "x".repeat(1000)].map((type) => ({ "content-type": type })), // biome-ignore format: one list
  ...["", "Bearer", "Bearer ", "Basic Og==", "bearer x", `Bearer ${"k".repeat(4000)}`, "Bearer a b", "Digest x"].map((authorization) => ({ authorization })), // biome-ignore format: one list
  ...["gzip", "br", "identity", "x"].map((encoding) => ({ "content-encoding": encoding })),
  { accept: "image/png" },
  { "x-request-id": "x".repeat(4000) },
  { "x-vispec-signature": "v1.0.0.0", "x-tenant": "other" },
  { "cf-connecting-ip": "not an address" },
  { origin: "null", referer: "file:///" },
  { range: "bytes=0-0", "if-match": "*" },
];

/** CRC-32 as PNG has it. */
function crc32(bytes: Buffer): number {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let i = 0; i < 8; i++) crc = (crc >>> 1) ^ (0xedb88320 & -(crc & 1));
  }
  return ~crc >>> 0;
}

type Kind = (random: Random) => Omit<BadRequest, "kind" | "method" | "headers"> & Partial<BadRequest>;
const post = (path: string, body: Buffer, expected: Expected) => ({ path, body, expected });

const kinds: Record<string, [share: number, make: Kind]> = {
  schema: [
    38,
    (random) => {
      const { path, schema, body } = random.pick(good);
      const bad = breakSomewhere(random, body, schema);
      return post(path, bad.body, { status: 400, param: bad.param });
    },
  ],
  bytes: [
    16,
    (random) => {
      const { path, schema, body } = random.pick(good);
      const damaged = random.pick(byteDamages)(random, encode(body));
      return post(path, damaged, expectedOf(damaged, schema));
    },
  ],
  json: [
    16,
    (random) => {
      const { path, schema, body } = random.pick(good);
      const damaged = Buffer.from(random.pick(jsonDamages)(random, JSON.stringify(body)));
      return post(path, damaged, expectedOf(damaged, schema));
    },
  ],
  fit: [
    4,
    (random) => {
      if (random.below(2)) {
        const response_format = { type: "json_schema", json_schema: { name: "x", schema: random.pick(oddSchemas) } };
        return post(CHAT, encode({ ...good[0].body, response_format }), { param: "response_format", mayPass: true });
      }
      const [change, param, status = 400] = random.pick(unfit);
      return post(CHAT, encode({ ...good[0].body, ...change }), { status, param });
    },
  ],
  picture: [
    12,
    (random) => {
      const bad = random.pick(badPictures)(random);
      const [url, mayPass] = typeof bad === "string" ? [bad, false] : bad;
      const before = random.below(3);
      const content = [
        ...Array.from({ length: before }, () => image(picture)),
        image(url),
        { type: "text", text: "?" },
      ];
      const messages = [{ role: "user", content }];
      return post(CHAT, encode({ messages, max_tokens: 1 }), { param: `messages[0].content[${before}]`, mayPass });
    },
  ],
  http: [
    4,
    (random) => {
      const body = encode(good[0].body);
      const [wrongMethod, wrongPath] = [random.below(3) === 0, random.below(2) === 0];
      if (wrongMethod) return { ...post(random.pick([CHAT, TEXT]), body, { param: null, mayPass: true }), method: random.pick(methods) }; // biome-ignore format: one line
      if (wrongPath)
        return { ...post(random.pick(paths), body, { param: null }), method: random.pick(["GET", "POST"]) };
      return { ...post(CHAT, body, { param: null, mayPass: true }), headers: random.pick(oddHeaders) };
    },
  ],
  worker: [
    5,
    (random) => {
      const make = random.pick([kinds.schema, kinds.json, kinds.bytes, kinds.picture])[1];
      return { ...make(random), worker: "public" as const };
    },
  ],
  internal: [
    5,
    (random) => {
      const worker = random.below(3) === 0 ? ("unsigned" as const) : ("signed" as const);
      const refused = worker === "unsigned" ? { status: 401, param: null } : undefined;
      if (random.below(4) === 0) {
        const hash = random.pick(["0".repeat(64), "x", "..%2f", "A".repeat(64), "%"]);
        const query = random.pick(["", "?tenant=", "?tenant=a&min=0&max=5", "?tenant=a&min=x&max=", "?min=1&max=2", `?tenant=${"t".repeat(300)}&min=1&max=2`, "?tenant=a&min=9&max=1&priority=batch", "?tenant=a&min=784&max=5000", "?tenant=a&min=784&max=5000&priority=batch", "?tenant=a&min=784&max=5000&priority=first", "?tenant=a&min=784&max=5000&priority=batch&deadline=0"]); // biome-ignore format: one list
        return {
          ...post(`/internal/images/${hash}${query}`, files[0], refused ?? { param: null }),
          method: "PUT",
          worker,
        };
      }
      const bad = breakSomewhere(random, generate, GenerateRequest);
      return { ...post("/internal/generate", bad.body, refused ?? { status: 400, param: bad.param }), worker };
    },
  ],
};

/** A good request of the edge to the worker, but for the fingerprint, of which no worker knows. */
const generate: Body = {
  ...{ id: "x", tenant: "t", kind: "chat", model: "m", fingerprint: "f", tokens: [1, 2], n: 1, maxTokens: 1 },
  ...{ user: null, stop: ["x"], stopTokenIds: [1], ignoreEos: false, logprobs: null, json: null },
  ...{ priority: "batch", deadline: 60 },
  images: [{ hash: "0".repeat(64), url: null, where: "messages[0].content[0]", limits: { minPixels: 784, maxPixels: 5000 } }], // biome-ignore format: one line
  sampling: { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 1, repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, logitBias: [[1, 2]] }, // biome-ignore format: one line
  ...{ plain: false, stream: false, includeUsage: false, includeDrafts: false },
};

const wheel = Object.entries(kinds).flatMap(([kind, [share]]) => Array.from({ length: share }, () => kind));

/** The i-th bad request of a seed. */
export function badRequest(seed: number, i: number): BadRequest {
  const random = new Random(seed * 1_000_003 + i);
  const kind = wheel[i % wheel.length];
  return { kind, method: "POST", headers: { "content-type": "application/json" }, ...kinds[kind][1](random) };
}
