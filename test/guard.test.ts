/** The edge as a guard: keys, rates, loopback only without keys, CORS, what it sends to a worker, and what it never shows. */
import { createHash } from "node:crypto";
import { once } from "node:events";
import { createServer, request as httpRequest, type IncomingMessage, type ServerResponse } from "node:http";
import { type AddressInfo, connect } from "node:net";
import { text as readText } from "node:stream/consumers";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { Bucket } from "../edge/bucket.ts";
import { type ApiKey, authenticate, findKey, parseKeys } from "../edge/keys.ts";
import { type EdgeOptions, type RunningEdge, startEdge } from "../gpu-worker/start.ts";
import type { ApiError } from "../shared/errors.ts";
import { GenerateRequest, imagePath } from "../shared/protocol.ts";
import { SIGNATURE_HEADER, Verifier } from "../shared/sign.ts";
import { tinyModel } from "./support/tiny-model.ts";

const SECRET = "a secret of the tests";
const sha256 = (text: string | Uint8Array) => createHash("sha256").update(text).digest("hex");
const hi = [{ role: "user", content: "Hi" }];

interface Seen {
  method: string;
  path: string;
  headers: IncomingMessage["headers"];
  body: string;
}

/** Stands for a GPU worker: checks signatures, notes what it is asked, and answers `generate` as it is told. */
class FakeWorker {
  readonly seen: Seen[] = [];
  readonly #verifier = new Verifier(SECRET);
  generate: (response: ServerResponse, nth: number) => void = ok;
  put: (response: ServerResponse) => void = (response) => response.writeHead(204).end();
  ready = true;
  readonly #server = createServer((request, response) => this.#answer(request, response));

  async listen(): Promise<string> {
    await once(this.#server.listen(0, "127.0.0.1"), "listening");
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  close(): void {
    this.#server.close();
    this.#server.closeAllConnections();
  }

  get generates(): Seen[] {
    return this.seen.filter(({ path }) => path === "/internal/generate");
  }

  get puts(): Seen[] {
    return this.seen.filter(({ method }) => method === "PUT");
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const { method = "", url: path = "", headers } = request;
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk);
    const body = Buffer.concat(chunks).toString("latin1");
    const signed = method === "PUT" ? "" : Buffer.from(body, "latin1").toString();
    const signature = headers[SIGNATURE_HEADER] as string | undefined;
    try {
      await this.#verifier.verify(method, path, signed, signature);
    } catch (error) {
      return json(response, 401, error);
    }
    this.seen.push({ method, path, headers, body });
    if (path === "/internal/model") json(response, 200, tinyModel);
    else if (path === "/v1/models") json(response, 200, { object: "list", data: [{ id: "tiny" }, { id: "Org/Big" }] });
    else if (path === "/ready") json(response, this.ready ? 200 : 503, {});
    else if (method === "PUT") this.put(response);
    else this.generate(response, this.generates.length);
  }
}

function json(response: ServerResponse, status: number, body: unknown, headers = {}): void {
  response.writeHead(status, { "content-type": "application/json", ...headers }).end(JSON.stringify(body));
}
function ok(response: ServerResponse): void {
  json(response, 200, { answered: true });
}

const worker = new FakeWorker();
const edges: RunningEdge[] = [];
const log: Record<string, unknown>[] = [];
let upstream: string;
const edgeWith = async (options: Partial<EdgeOptions> = {}): Promise<string> => {
  const note = (level: string, msg: string, fields?: object) => log.push({ level, msg, ...fields });
  const edge = await startEdge({ port: 0, upstream, secret: SECRET, log: note, ...options });
  edges.push(edge);
  return edge.url;
};
/** The log's line of this answer. */
async function lineOf(response: Response): Promise<Record<string, unknown>> {
  const id = response.headers.get("x-request-id");
  for (;;) {
    const line = log.find((line) => line.id === id);
    if (line) return line;
    await new Promise((resolve) => setImmediate(resolve));
  }
}

interface Told {
  status: number;
  code: string | null;
  param: string | null;
  message: string;
}
async function told(response: Response): Promise<Told> {
  const { error } = (await response.json()) as { error: Told };
  return { ...error, status: response.status };
}
const post = (url: string, body: unknown = { messages: hi }, headers: Record<string, string> = {}) =>
  fetch(`${url}/v1/chat/completions`, { method: "POST", body: JSON.stringify(body), headers });
const bearer = (key: string) => ({ authorization: `Bearer ${key}` });

beforeAll(async () => {
  upstream = await worker.listen();
});
afterAll(async () => {
  await Promise.all(edges.map((edge) => edge.close()));
  worker.close();
});
beforeEach(() => {
  worker.seen.length = 0;
});
afterEach(() => {
  worker.generate = ok;
  worker.put = (response) => response.writeHead(204).end();
});

describe("API keys", () => {
  const entries = [
    { name: "alice", sha256: sha256("key-of-alice"), models: ["tiny"] },
    { name: "bob", sha256: sha256("key-of-bob"), models: ["Org/Big"] },
    { name: "carol", sha256: sha256("key-of-carol"), requestsPerMinute: 5 },
    { name: "carol", sha256: sha256("another-of-carol"), requestsPerMinute: 5 },
    { name: "dave", sha256: sha256("key-of-dave"), requestsPerMinute: 2 },
  ];
  let url: string;
  beforeAll(async () => {
    url = await edgeWith({ apiKeys: JSON.stringify(entries) });
  });

  test("that are right are answered, as whose they are", async () => {
    const response = await post(url, { messages: hi }, bearer("key-of-alice"));
    expect(response.status).toBe(200);
    expect(JSON.parse(worker.generates[0].body).tenant).toBe("alice");
    expect(await lineOf(response)).toMatchObject({ level: "info", path: "/v1/chat/completions", status: 200, tenant: "alice" }); // biome-ignore format: one line
    expect((await post(url, { messages: hi }, { authorization: "bearer   key-of-alice" })).status).toBe(200);
  });

  test.each([
    ["none", undefined],
    ["a wrong one", "Bearer key-of-alicf"],
    ["the hash of a right one", `Bearer ${entries[0].sha256}`],
    ["an empty one", "Bearer "],
    ["another scheme", `Basic ${btoa("alice:key-of-alice")}`],
    ["two", "Bearer key-of-alice key-of-bob"],
  ])("are asked for: %s is a 401", async (_what, authorization) => {
    for (const path of ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/tiny", "/v1/nothing"]) {
      const method = path.includes("completions") ? "POST" : "GET";
      const response = await fetch(url + path, { method, headers: authorization ? { authorization } : {} });
      expect(response.headers.get("www-authenticate")).toBe("Bearer");
      expect(await told(response)).toMatchObject({ status: 401, code: "invalid_api_key", param: null });
    }
    expect(worker.seen).toEqual([]);
  });

  test("are not asked for by the page and by what machines ask", async () => {
    for (const path of ["/", "/openapi.json", "/health", "/ready"]) expect((await fetch(url + path)).status).toBe(200);
  });

  test("are for their models only, and see no others", async () => {
    const refused = { status: 403, code: "model_not_allowed", param: "model" };
    const bob = bearer("key-of-bob");
    expect(await told(await post(url, { messages: hi, model: "tiny" }, bob))).toMatchObject(refused);
    expect(await told(await post(url, { messages: hi }, bob))).toMatchObject(refused);
    expect(await told(await post(url, { messages: hi, model: "gpt" }, bearer("key-of-alice")))).toMatchObject(refused);
    expect(await told(await post(url, { messages: hi, model: "gpt" }, bearer("key-of-dave")))).toMatchObject({ status: 404, code: "model_not_found" }); // biome-ignore format: one line
    expect(worker.generates).toEqual([]);
    const get = (path: string, key: string) => fetch(url + path, { headers: bearer(key) });
    const ids = async (key: string) =>
      ((await (await get("/v1/models", key)).json()) as { data: { id: string }[] }).data.map(({ id }) => id);
    expect([await ids("key-of-alice"), await ids("key-of-bob")]).toEqual([["tiny"], ["Org/Big"]]);
    for (const path of ["/v1/models/Org/Big", "/v1/models/Org%2FBig"])
      expect(await (await get(path, "key-of-bob")).json()).toEqual({ id: "Org/Big" });
    expect(await told(await get("/v1/models/tiny", "key-of-bob"))).toMatchObject(refused);
    expect((await get("/v1/models/gpt", "key-of-carol")).status).toBe(404);
  });

  test("have their requests a minute, exactly, over parallel requests and all keys of a name", async () => {
    const ask = (i: number) => post(url, { messages: hi }, bearer(i % 2 ? "key-of-carol" : "another-of-carol"));
    const answers = await Promise.all(Array.from({ length: 30 }, (_, i) => ask(i)));
    expect(answers.filter(({ status }) => status === 200)).toHaveLength(5);
    const refused = answers.filter(({ status }) => status === 429);
    expect(refused).toHaveLength(25);
    expect(Number(refused[0].headers.get("retry-after"))).toBeGreaterThan(0);
    expect(Number(refused[0].headers.get("retry-after"))).toBeLessThanOrEqual(12);
    expect(await told(refused[0])).toMatchObject({ code: "rate_limit_exceeded", param: null });
    expect((await post(url, { messages: hi }, bearer("key-of-dave"))).status).toBe(200);
    expect((await fetch(`${url}/v1/models`, { headers: bearer("key-of-carol") })).status).toBe(200);
  });

  test("lets web pages from everywhere ask, unless origins are named", async () => {
    const named = await edgeWith({ apiKeys: JSON.stringify(entries), corsOrigins: "https://a.example, https://b.example/" }); // biome-ignore format: one line
    const asked = "authorization,content-type,x-stainless-os,x-stainless-retry-count";
    const preflight = (edge: string, origin: string) =>
      fetch(`${edge}/v1/chat/completions`, {
        method: "OPTIONS",
        headers: { origin, "access-control-request-method": "POST", "access-control-request-headers": asked },
      });
    const allowed = async (edge: string, origin: string) => {
      const { status, headers } = await preflight(edge, origin);
      expect([status, headers.get("access-control-allow-headers")]).toEqual([204, asked]);
      expect(headers.get("access-control-allow-methods")).toContain("POST");
      const answer = await post(edge, { messages: hi }, { origin }); // without a key, and readable all the same
      expect(answer.headers.get("access-control-allow-origin")).toBe(headers.get("access-control-allow-origin"));
      expect(answer.headers.get("access-control-expose-headers")).toBe("x-request-id,retry-after");
      return headers.get("access-control-allow-origin");
    };
    expect(await allowed(url, "https://a.example")).toBe("*");
    expect(await allowed(named, "https://a.example")).toBe("https://a.example");
    expect(await allowed(named, "https://b.example")).toBe("https://b.example");
    expect(await allowed(named, "https://c.example")).toBeNull();
  });

  test("are compared to the last byte of the last one, whichever is right", () => {
    let reads = 0;
    const counted = entries.map((entry) => ({
      get sha256() {
        reads++;
        return entry.sha256;
      },
    }));
    const costs = ["key-of-alice", "key-of-dave", "none"].map((key) => {
      reads = 0;
      findKey(counted, Buffer.from(sha256(key), "hex"));
      return reads;
    });
    expect(costs).toEqual(Array(3).fill(64 * entries.length));
    expect(findKey(entries, Buffer.from(sha256("key-of-bob"), "hex"))).toBe(entries[1]);
    expect(findKey(entries, Buffer.from(`00${sha256("key-of-bob").slice(2)}`, "hex"))).toBeNull();
  });

  const good = { name: "a", sha256: sha256("a") };
  test.each<[json: string, cause: string]>([
    ["{", "API_KEYS: "],
    ["{}", "API_KEYS: must be array"],
    [JSON.stringify([{ ...good, sha256: "plain-key" }]), "API_KEYS[0].sha256: must be 64 digits"],
    [JSON.stringify([good, { ...good, sha256: sha256("a").toUpperCase() }]), "API_KEYS[1].sha256: must be 64 digits"],
    [JSON.stringify([{ sha256: good.sha256 }]), "API_KEYS[0].name: must be string"],
    [JSON.stringify([{ ...good, name: "" }]), "API_KEYS[0].name: must be 1 to 64 letters"],
    [JSON.stringify([{ ...good, models: "tiny" }]), "API_KEYS[0].models: must be array"],
    [JSON.stringify([{ ...good, requestsPerMinute: 0 }]), "API_KEYS[0].requestsPerMinute: must be at least 1"],
    [JSON.stringify([{ ...good, key: "plain-key" }]), "API_KEYS[0].key: this parameter is not supported"],
  ])("that are malformed are named in the log's words: %.60s", (json, cause) => {
    const thrown = catching(() => parseKeys(json));
    expect(thrown).toMatchObject({ status: 500, code: "misconfigured", cause: expect.stringContaining(cause) });
    expect(`${thrown.cause}${thrown.message}`).not.toContain("plain-key");
  });

  test("are found by what follows Bearer, and by nothing else", async () => {
    const keys: ApiKey[] = parseKeys(JSON.stringify(entries));
    expect(await authenticate(keys, "Bearer key-of-bob")).toBe(keys[1]);
    await expect(authenticate(keys, undefined)).rejects.toMatchObject({ status: 401 });
  });
});

function catching(work: () => unknown): ApiError {
  try {
    work();
  } catch (error) {
    return error as ApiError;
  }
  throw new Error("was to be refused");
}

test("a bucket fills within a minute, and says after how many seconds there is a token", () => {
  const bucket = new Bucket();
  const take = (now: number) => bucket.take(3, now);
  expect([0, 0, 0, 0].map(() => take(1e12))).toEqual([0, 0, 0, 20]);
  expect([take(1e12 + 19_000), take(1e12 + 20_000), take(1e12 + 20_001)]).toEqual([1, 0, 20]);
  expect(Array.from({ length: 4 }, () => take(1e12 + 600_000))).toEqual([0, 0, 0, 20]);
});

describe("without keys", () => {
  let url: string;
  beforeAll(async () => {
    url = await edgeWith();
  });
  /** As fetch, which takes no header Host. */
  const withHost = async (host: string, path = "/v1/chat/completions", headers = {}): Promise<Told> => {
    const request = httpRequest(url + path, { method: "POST", headers: { host, ...headers } });
    request.end(JSON.stringify({ messages: hi }));
    const [response] = (await once(request, "response")) as [IncomingMessage];
    const body = JSON.parse(await readText(response));
    return { status: response.statusCode, ...body.error };
  };

  test("this machine is served, nobody is named, and no key is looked at", async () => {
    expect((await post(url, { messages: hi }, bearer("anything"))).status).toBe(200);
    expect(JSON.parse(worker.generates[0].body).tenant).toBe("");
    for (const address of ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
      for (const name of ["cf-connecting-ip", "x-forwarded-for"])
        expect((await post(url, { messages: hi }, { [name]: address })).status).toBe(200);
    const { port } = new URL(url);
    for (const host of ["localhost", `LOCALHOST:${port}`, "127.0.0.1:80", "127.9.9.9", "[::1]", `a.localhost:${port}`])
      expect((await withHost(host)).status, host).toBe(200);
  });

  test.each(["192.0.2.1", "10.0.0.1", "2001:db8::1", "127.0.0.1, 192.0.2.1", "localhost.example", ""])(
    "a client at %j is told that there are none",
    async (address) => {
      for (const name of ["cf-connecting-ip", "x-forwarded-for"]) {
        const response = await post(url, { messages: hi }, { [name]: address });
        expect(await told(response)).toMatchObject({ status: 401, code: "no_api_keys" });
      }
      expect(worker.seen).toEqual([]);
    },
  );

  test.each(["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "192.168.0.2", "[::2]"])(
    "a name that was made to point here is refused: %s",
    async (host) => {
      expect(await withHost(host)).toMatchObject({ status: 403, code: "host_not_allowed" });
      expect(worker.seen).toEqual([]);
    },
  );

  test.each([
    "https://evil.example",
    "null",
    "http://localhost.evil.example",
    "file://",
    "localhost",
    "ftp://localhost",
  ])("a web page from %s is refused, and cannot read the answer", async (origin) => {
    const response = await post(url, { messages: hi }, { origin });
    expect(response.headers.get("access-control-allow-origin")).toBeNull();
    expect(await told(response)).toMatchObject({ status: 403, code: "origin_not_allowed" });
    expect(worker.seen).toEqual([]);
  });

  test("a web page of this machine is served", async () => {
    for (const origin of ["http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443"]) {
      const response = await post(url, { messages: hi }, { origin });
      expect([response.status, response.headers.get("access-control-allow-origin")]).toEqual([200, origin]);
    }
  });
});

describe("what is misconfigured", () => {
  const wrong = JSON.stringify([{ name: "a", sha256: "plain-key" }]);
  test.each<[what: string, options: Partial<EdgeOptions>, cause: string]>([
    ["a key", { apiKeys: wrong }, "API_KEYS[0].sha256: must be 64 digits in lower-case hex"],
    ["no secret", { secret: "" }, "WORKER_SECRET is not set"],
    ["no worker", { upstream: " , " }, "GPU_WORKERS must be URLs"],
    ["a worker's path", { upstream: "http://127.0.0.1:1/path" }, "GPU_WORKERS must be URLs"],
  ])("answers 500 everywhere and stands in the log: %s", async (_what, options, cause) => {
    const url = await edgeWith(options);
    for (const path of ["/v1/models", "/ready", "/health", "/"]) {
      const response = await fetch(url + path);
      expect((await lineOf(response)).error).toContain(cause);
      const error = await told(response);
      expect(error).toMatchObject({ status: 500, code: "misconfigured" });
      expect(error.message).not.toMatch(/API_KEYS|SECRET|GPU_WORKERS|plain-key/);
    }
  });

  test("is another secret than the worker's", async () => {
    const url = await edgeWith({ secret: "another" });
    const response = await post(url);
    expect((await lineOf(response)).error).toContain("WORKER_SECRET or the clocks differ");
    expect(await told(response)).toMatchObject({ status: 500, code: "misconfigured" });
  });
});

describe("to the worker, the edge", () => {
  let url: string;
  beforeAll(async () => {
    url = await edgeWith();
    await post(url); // it has the model from now on
  });
  const bytes = [Uint8Array.of(1, 2), Uint8Array.of(3)];
  const image = (i: number, more = {}) => ({
    type: "image_url",
    image_url: { url: `data:image/png;base64,${Buffer.from(bytes[i]).toString("base64")}` },
    ...more,
  });
  const pictures = (...content: object[]) => ({ messages: [{ role: "user", content }] });
  const limits = tinyModel.pixels;

  test("sends the request that the contract has, under the id that the client sees", async () => {
    const response = await post(url, { messages: hi, seed: 7, user: "eve" });
    const [{ headers, body }] = worker.generates;
    const request = GenerateRequest.parse(JSON.parse(body));
    expect(request).toMatchObject({ kind: "chat", tenant: "", user: "eve", sampling: { seed: 7 } });
    expect(request.id).toMatch(/^chatcmpl-[0-9a-f-]{36}$/);
    expect([response.headers.get("x-request-id"), headers["x-request-id"]]).toEqual([request.id, request.id]);
    const completion = await fetch(`${url}/v1/completions`, { method: "POST", body: '{"prompt":"Hi"}' });
    expect(completion.headers.get("x-request-id")).toMatch(/^cmpl-/);
    expect(JSON.parse(worker.generates[1].body)).toMatchObject({ kind: "completion", tokens: expect.any(Array) });
  });

  test("sends the images that are missing, each once, and asks again", async () => {
    worker.generate = (response, nth) => (nth === 1 ? json(response, 409, { missing: [0, 2, 3] }) : ok(response));
    const far = { type: "image_url", image_url: { url: "http://pictures.example/a.png" } };
    const answer = await post(url, pictures(image(0), far, image(1, { max_pixels: 5000 }), image(0)));
    expect(answer.status).toBe(200);
    const small = { minPixels: 3136, maxPixels: 5000 };
    const plainly = { tenant: "", priority: "interactive", deadline: null } as const;
    expect(worker.puts.map(({ path, body }) => [path, body]).toSorted()).toEqual(
      [
        [imagePath(plainly, sha256(bytes[0]), limits), "\u0001\u0002"],
        [imagePath(plainly, sha256(bytes[1]), small), "\u0003"],
      ].toSorted(),
    );
    expect(worker.generates.map(({ body }) => body)).toEqual(Array(2).fill(worker.generates[0].body));
    expect(new Set(worker.seen.map(({ headers }) => headers[SIGNATURE_HEADER])).size).toBe(worker.seen.length);
  });

  test("sends images as urgently as their request, and of its deadline what is left", async () => {
    const missing = (response: ServerResponse) => void setTimeout(() => json(response, 409, { missing: [0] }), 50);
    worker.generate = (response, nth) => (nth === 1 ? missing(response) : ok(response));
    const asked = { ...pictures(image(0)), service_tier: "flex", deadline: 600 };
    expect((await post(url, asked)).status).toBe(200);
    const query = new URLSearchParams(worker.puts[0].path.split("?")[1]);
    expect(query.get("priority")).toBe("batch");
    const deadlines = worker.generates.map(({ body }) => GenerateRequest.parse(JSON.parse(body)).deadline!);
    const inOrder = [600, deadlines[0], Number(query.get("deadline")), deadlines[1]];
    expect(inOrder).toEqual(inOrder.toSorted((a, b) => b - a));
    expect(inOrder[2]).toBeLessThan(600 - 0.025);
  });

  test("asks for nothing more when the deadline is over", async () => {
    worker.generate = (response) => void setTimeout(() => json(response, 409, { missing: [0] }), 50);
    const error = await told(await post(url, { ...pictures(image(0)), deadline: 0.02 }));
    expect(error).toMatchObject({ status: 504, code: "deadline_exceeded" });
    expect(worker.puts).toEqual([]);
  });

  test("asks again at once when an image was dropped in the last moment", async () => {
    worker.generate = (response, nth) => (nth === 1 ? json(response, 409, { error: { message: "" } }) : ok(response));
    expect((await post(url, pictures(image(0)))).status).toBe(200);
    expect(worker.puts).toEqual([]);
  });

  test("gives up on a worker that keeps no images, or wants those that there are not", async () => {
    worker.generate = (response) => json(response, 409, { missing: [0] });
    expect(await told(await post(url, pictures(image(0))))).toMatchObject({ status: 502, code: "upstream_error" });
    expect(worker.generates).toHaveLength(3);
    for (const missing of [1, -1, 0.5]) {
      worker.generate = (response) => json(response, 409, { missing: [missing] });
      const error = await told(await post(url, pictures(image(0))));
      expect(error).toMatchObject({ status: 502, code: "upstream_error", message: expect.stringContaining("unknown") });
    }
  });

  test("tells the client what is wrong with an image by its place", async () => {
    worker.generate = (response) => json(response, 409, { missing: [1] });
    worker.put = (response) =>
      json(response, 400, { error: { message: "the image cannot be decoded", code: "invalid_image", param: null } });
    const error = await told(await post(url, pictures(image(0), image(1))));
    const where = "messages[0].content[1]";
    const message = `${where}: the image cannot be decoded`;
    expect(error).toMatchObject({ status: 400, code: "invalid_image", param: where, message });
    worker.put = (response) => json(response, 503, { error: { message: "draining", code: "draining" } }, { "retry-after": "3" }); // biome-ignore format: one line
    const response = await post(url, pictures(image(0), image(1)));
    expect([response.status, response.headers.get("retry-after")]).toEqual([503, "3"]);
  });

  test("passes on the worker's refusals with their Retry-After", async () => {
    const error = { message: "full", type: "rate_limit_error", param: null, code: "queue_full" };
    worker.generate = (response) => json(response, 429, { error }, { "retry-after": "7", server: "worker" });
    const response = await post(url);
    expect([response.headers.get("retry-after"), response.headers.get("server")]).toEqual(["7", null]);
    expect(await told(response)).toEqual({ ...error, status: 429 });
  });

  test("hides what is not a worker's answer", async () => {
    worker.generate = (response) =>
      response.writeHead(502, { "content-type": "text/html" }).end("<h1>nginx at 10.0.0.7");
    const response = await post(url);
    expect((await lineOf(response)).error).toBe("502 text/html");
    expect(await told(response)).toMatchObject({ status: 502, code: "upstream_error" });
    worker.generate = (response) => response.destroy();
    expect(await told(await post(url))).toMatchObject({ status: 503, code: "upstream_unreachable" });
  });

  test("asks whether it is ready", async () => {
    expect(await (await fetch(`${url}/ready`)).json()).toEqual({ status: "ready" });
    worker.ready = false;
    expect(await told(await fetch(`${url}/ready`))).toMatchObject({ status: 503, code: "not_ready" });
    worker.ready = true;
    const gone = new URL(upstream);
    gone.port = "1";
    const both = await edgeWith({ upstream: `${gone},${upstream}` });
    expect((await fetch(`${both}/ready`)).status).toBe(200);
  });
});

describe("every answer", () => {
  let url: string;
  beforeAll(async () => {
    url = await edgeWith();
  });
  const asked: [method: string, path: string, body?: string][] = [
    ["GET", "/"],
    ["HEAD", "/"],
    ["GET", "/health"],
    ["GET", "/openapi.json"],
    ["GET", "/nothing"],
    ["GET", "/v1/models/%zz"],
    ["GET", "/v1/chat/completions"],
    ["DELETE", "/v1/models"],
    ["OPTIONS", "/v1/models"],
    ["POST", "/v1/chat/completions", "{"],
    ["POST", "/v1/chat/completions", '{"messages":[]}'],
    ["POST", "/v1/completions"],
    ["POST", "/v1/completions", "\ufeff"],
  ];

  test.each(asked)("has an id, and shows neither path nor stack nor secret: %s %s %s", async (method, path, body) => {
    const response = await fetch(url + path, { method, body });
    expect(response.headers.get("x-request-id")).toMatch(/^(req|cmpl|chatcmpl)-[0-9a-f-]{36}$/);
    expect(response.status).toBeLessThan(500);
    const text = await response.text();
    if (path !== "/" && path !== "/openapi.json") expect(text).not.toMatch(/\bat \S+:\d+|edge\.js|\.ts\b|node_modules/);
    expect(text).not.toContain(SECRET);
    expect(await lineOf(response)).toMatchObject({ msg: "edge", method, status: response.status });
  });

  test("names the method that a path takes", async () => {
    for (const [path, method] of [
      ["/v1/completions", "POST"],
      ["/v1/models/tiny", "GET"],
      ["/ready", "GET"],
      ["/", "GET"],
    ]) {
      const response = await fetch(url + path, { method: "PUT" });
      expect(response.headers.get("allow")?.split(", ")).toContain(method);
      expect(await told(response)).toMatchObject({ status: 405, code: "method_not_allowed" });
    }
  });

  test("to a body that ends too early is a 400", async () => {
    const socket = connect(Number(new URL(url).port), "127.0.0.1");
    socket.write("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 9\r\n\r\n");
    socket.end("{");
    expect(await readText(socket)).toMatch(/^HTTP\/1\.1 400 [\s\S]*"code":"incomplete_body"/);
  });

  test("with the page allows the page's own style and script, and nothing from elsewhere", async () => {
    const response = await fetch(`${url}/`);
    const page = await response.text();
    const policy = response.headers.get("content-security-policy")!;
    const inline = [...page.matchAll(/<(style|script)[^>]*>([\s\S]*?)<\/\1>/g)];
    expect(inline.length).toBeGreaterThan(1);
    for (const [, tag, text] of inline) {
      const hash = createHash("sha256").update(text).digest("base64");
      expect(policy).toMatch(new RegExp(`${tag}-src [^;]*'sha256-${hash.replace(/[+/]/g, "\\$&")}'`));
    }
    expect(policy).toContain("default-src 'none'");
    expect(policy).toContain("connect-src 'self'");
    expect(policy).not.toContain("unsafe");
  });
});
