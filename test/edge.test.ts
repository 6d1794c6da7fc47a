/** The edge in workerd before a GPU worker's server with a scripted engine: statuses, images, streams, disconnects. */
import { createHash } from "node:crypto";
import { once } from "node:events";
import { connect, type Socket } from "node:net";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { type RunningServer, startServer } from "../gpu-worker/service/server.ts";
import { type RunningEdge, startEdge } from "../gpu-worker/start.ts";
import { ApiError } from "../shared/errors.ts";
import { imageKey } from "../shared/protocol.ts";
import { chatter, fails, finishOf, ScriptedEngine, say, silence, words } from "./support/scripted-engine.ts";
import { tinyModel } from "./support/tiny-model.ts";

const secret = "a secret of the tests";
const LIMITS = tinyModel.pixels;

const engine = new ScriptedEngine();
let server: RunningServer;
let edge: RunningEdge;

beforeAll(async () => {
  server = await startServer(engine, { port: 0, host: "127.0.0.1", secret });
  edge = await startEdge({ port: 0, upstream: server.url, secret });
});

afterAll(async () => {
  await edge?.close();
  await server?.close();
});

beforeEach(() => {
  engine.script = words(["Hello", " there"]);
  engine.held.clear();
  for (const list of [engine.puts, engine.requests, engine.signals]) list.length = 0;
});

const hi = [{ role: "user", content: "Hi" }];
const picture = (...bytes: number[]) => ({
  type: "image_url",
  image_url: { url: `data:image/png;base64,${Buffer.from(bytes).toString("base64")}` },
});
const ask = (url: string, body: unknown, init: RequestInit = {}) =>
  fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    body: typeof body === "string" ? body : JSON.stringify(body),
    ...init,
  });
const message = async (response: Response) => ((await response.json()) as { error: { message: string } }).error.message;
/**
 * Asks over a bare connection, to be left by a reset. workerd takes the plain end of a connection for a client that only
 * has nothing more to say; it then notices at the next write that nobody reads, but before the first step there is none.
 */
function askAndHang(url: string): Socket {
  const body = JSON.stringify({ messages: hi });
  const socket = connect(Number(new URL(url).port), "127.0.0.1");
  socket.on("error", () => {});
  socket.write(
    `POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: ${body.length}\r\n\r\n${body}`,
  );
  return socket;
}
/** The events of a stream, parsed, without [DONE], which must be the last. */
async function events(response: Response) {
  const lines = (await response.text()).split("\n\n").filter((line) => line !== "");
  expect(lines.pop()).toBe("data: [DONE]");
  return lines.map((line) => JSON.parse(line.slice("data: ".length)));
}
/** Resolves when the engine is at work on request number n, and gives its signal. */
async function started(n = 1): Promise<AbortSignal> {
  while (engine.signals.length < n) await new Promise((resolve) => setImmediate(resolve));
  return engine.signals[n - 1];
}
const aborted = async (signal: AbortSignal) => signal.aborted || once(signal, "abort");

// The same contract holds for a client of the edge and for one that asks the GPU worker itself.
describe.each(["edge", "worker"])("a chat request to the %s", (where) => {
  const url = () => (where === "edge" ? edge.url : server.url);

  test("is answered in OpenAI's shape", async () => {
    const response = await ask(url(), { messages: hi, model: "tiny" });
    expect(response.status).toBe(200);
    const body = (await response.json()) as Record<string, unknown>;
    expect(body).toMatchObject({
      object: "chat.completion",
      model: "tiny",
      choices: [{ index: 0, message: { role: "assistant", content: "Hello there" }, finish_reason: "stop" }],
      usage: {
        completion_tokens: 3,
        completion_tokens_details: { accepted_prediction_tokens: 3, rejected_prediction_tokens: 6 },
      },
    });
    expect(response.headers.get("x-request-id")).toBe(body.id);
  });

  test("streams a chunk per step, with role, reason, usage and an end", async () => {
    const response = await ask(url(), { messages: hi, stream: true, stream_options: { include_usage: true } });
    expect(response.headers.get("content-type")).toContain("text/event-stream");
    const chunks = await events(response);
    expect(new Set(chunks.map((chunk) => chunk.object))).toEqual(new Set(["chat.completion.chunk"]));
    expect(chunks.map((chunk) => chunk.choices[0]?.delta)).toEqual([
      { role: "assistant", content: "", refusal: null },
      { content: "Hello" },
      { content: " there" },
      {},
      undefined,
    ]);
    expect(chunks.map((chunk) => chunk.choices[0]?.finish_reason)).toEqual([null, null, null, "stop", undefined]);
    expect(chunks.at(-1).usage.total_tokens).toBe(chunks.at(-1).usage.prompt_tokens + 3);
  });

  test("has log-probabilities with text and bytes of each token, half a character included", async () => {
    engine.script = async function* (request) {
      const top = [{ token: 127, logprob: -0.5 }];
      const logprobs = [
        { token: 127, logprob: -0.5, top },
        { token: 102, logprob: -Infinity, top: [] },
      ];
      yield { ...say("é"), tokens: [127, 102], logprobs };
      yield { ...say(""), finish: finishOf(request, 2) };
    };
    const request = { messages: hi, logprobs: true, top_logprobs: 1 };
    const expected = [
      {
        token: "\ufffd",
        logprob: -0.5,
        bytes: [0xc3],
        top_logprobs: [{ token: "\ufffd", logprob: -0.5, bytes: [0xc3] }],
      },
      { token: "\ufffd", logprob: -9999, bytes: [0xa9], top_logprobs: [] },
    ];
    const body = (await (await ask(url(), request)).json()) as { choices: { logprobs: { content: unknown } }[] };
    expect(body.choices[0].logprobs.content).toEqual(expected);
    const chunks = await events(await ask(url(), { ...request, stream: true }));
    expect(chunks[1].choices[0].logprobs.content).toEqual(expected);
  });

  test.each([
    ["{", 400, "The body is not valid JSON: it ends too early at line 1, column 2."],
    [{ messages: [] }, 400, "messages: must not be empty"],
    [{ messages: [{ role: "bot", content: "x" }] }, 400, "messages[0].role: must be one of"],
    [{ messages: hi, max_tokens: 0 }, 400, "max_tokens: must be at least 1"],
    [{ messages: hi, tools: [] }, 400, "tools: this parameter is not supported: the models here have no tool calls"],
    [{ messages: hi, temprature: 1 }, 400, "temprature: this parameter is not supported"],
    [{ messages: hi, top_logprobs: 1 }, 400, "top_logprobs: needs logprobs to be true"],
    [{ messages: hi, model: "gpt-4o" }, 404, 'model: "gpt-4o" is not served here'],
    [{ messages: [{ role: "user", content: [picture()] }] }, 400, "messages[0].content[0]: the image is empty"],
    [
      { messages: [{ role: "user", content: [picture(0, 1)] }] },
      400,
      "messages[0].content[0]: the image cannot be decoded",
    ],
  ])("%j is refused with its reason", async (body, status, text) => {
    const response = await ask(url(), body);
    expect(response.status).toBe(status);
    expect(await message(response)).toContain(text);
    expect(engine.requests).toEqual([]);
  });

  test.each([false, true])("that fails before its first step has a status (stream: %s)", async (stream) => {
    engine.script = fails(new ApiError(400, "stop_token_ids[0]: no such token", { param: "stop_token_ids" }));
    const response = await ask(url(), { messages: hi, stream });
    expect(response.status).toBe(400);
    expect(await message(response)).toBe("stop_token_ids[0]: no such token");
  });

  test("that fails in the middle of its stream says so in it, and tells no internals", async () => {
    engine.script = async function* () {
      yield say("Hel");
      throw new ApiError(503, "The engine restarts.", { cause: "a secret" });
    };
    const text = await (await ask(url(), { messages: hi, stream: true })).text();
    expect(text).toContain(`"content":"Hel"`);
    expect(text.trim().split("\n\n").at(-1)).toBe(
      `data: {"error":{"message":"The engine restarts.","type":"server_error","param":null,"code":null}}`,
    );
    expect(text).not.toContain("secret");
  });

  test("whose client leaves in mid-stream stops the engine", async () => {
    engine.script = chatter;
    const client = new AbortController();
    const response = await ask(url(), { messages: hi, stream: true }, { signal: client.signal });
    const reader = response.body!.getReader();
    await reader.read();
    const signal = await started();
    expect(signal.aborted).toBe(false);
    client.abort();
    await aborted(signal);
  });

  test("whose client leaves before the first step stops the engine, and the next one runs", async () => {
    engine.script = silence;
    const client = askAndHang(url());
    const signal = await started();
    client.resetAndDestroy();
    await aborted(signal);
    engine.script = words(["next"]);
    expect((await ask(url(), { messages: hi })).status).toBe(200);
  });

  test("lists the model, and names what it does not know", async () => {
    const models = await (await fetch(`${url()}/v1/models`)).json();
    expect(models).toMatchObject({ object: "list", data: [{ id: "tiny", object: "model", owned_by: "vispec" }] });
    const unknown = await fetch(`${url()}/v1/embeddings`, { method: "POST" });
    expect([unknown.status, await message(unknown)]).toEqual([404, "There is nothing at /v1/embeddings."]);
    const wrong = await fetch(`${url()}/v1/chat/completions`);
    expect([wrong.status, await message(wrong)]).toEqual([405, expect.stringContaining("GET is not allowed")]);
  });
});

describe("images through the edge", () => {
  test("are sent once, in whatever request they come", async () => {
    const first = { messages: [{ role: "user", content: [picture(1, 2), picture(3), picture(1, 2)] }] };
    const hashes = [[1, 2], [3]].map((bytes) => createHash("sha256").update(Buffer.from(bytes)).digest("hex"));
    expect((await ask(edge.url, first)).status).toBe(200);
    expect(engine.puts.toSorted()).toEqual(hashes.map((hash) => imageKey("", hash, LIMITS)).toSorted());
    expect(engine.requests[0].images.map(({ hash }) => hash)).toEqual([hashes[0], hashes[1], hashes[0]]);
    expect((await ask(edge.url, first)).status).toBe(200);
    expect(engine.puts.length).toBe(2);
  });

  test("are sent once for each size", async () => {
    const sizes = [4000, 5000, 4000].map((max_pixels) => ({ ...picture(7), max_pixels }));
    expect((await ask(edge.url, { messages: [{ role: "user", content: sizes }] })).status).toBe(200);
    expect(engine.puts.map((key) => key.split("/")[1]).toSorted()).toEqual(["3136-4000", "3136-5000"]);
  });

  test("are sent anew when the worker dropped them", async () => {
    const request = { messages: [{ role: "user", content: [picture(9)] }] };
    await ask(edge.url, request);
    engine.held.clear();
    expect((await ask(edge.url, request)).status).toBe(200);
    expect(engine.puts.length).toBe(2);
  });
});

describe("images by their names, through the edge", () => {
  const hashOf = (...bytes: number[]) => createHash("sha256").update(Buffer.from(bytes)).digest("hex");
  const named = (hash: string, more = {}) => ({ type: "image_url", image_url: { url: `sha256:${hash}` }, ...more });
  const about = (...content: object[]) => ({ messages: [{ role: "user", content }] });
  const notFound = async (response: Response, param = "messages[0].content[0]") => {
    const { error } = (await response.json()) as { error: object };
    expect([response.status, error]).toEqual([404, expect.objectContaining({ type: "not_found_error", code: "image_not_found", param })]); // biome-ignore format: one line
  };

  test("are used when they are held, and not found when they are not, or in another size", async () => {
    const name = named(hashOf(11));
    await notFound(await ask(edge.url, about(picture(12), name)), "messages[0].content[1]");
    expect(engine.puts).toEqual([]); // nothing is sent for a request that cannot be answered
    expect((await ask(edge.url, about(picture(11)))).status).toBe(200);
    expect((await ask(edge.url, about(name))).status).toBe(200);
    expect(engine.puts).toEqual([imageKey("", hashOf(11), LIMITS)]);
    expect(engine.requests[1].images[0]).toMatchObject({ hash: hashOf(11), url: null });
    await notFound(await ask(edge.url, about({ ...name, max_pixels: 9000 })));
    expect((await ask(edge.url, about({ ...name, max_pixels: 9000 }, picture(11)))).status).toBe(200);
  });

  test("are their tenant's own", async () => {
    const apiKeys = JSON.stringify(["alice", "bob"].map((name) => ({ name, sha256: hashOf(...Buffer.from(name)) })));
    const keyed = await startEdge({ port: 0, upstream: server.url, secret, apiKeys });
    const as = (key: string, body: object) => ask(keyed.url, body, { headers: { authorization: `Bearer ${key}` } });
    expect((await as("alice", about(picture(13)))).status).toBe(200);
    expect((await as("alice", about(named(hashOf(13))))).status).toBe(200);
    await notFound(await as("bob", about(named(hashOf(13)))));
    await keyed.close();
  });

  test("are looked for at every worker, also where another takes nothing more or is gone", async () => {
    const other = await startServer(engine, { port: 0, host: "127.0.0.1", secret });
    const empty = new ScriptedEngine();
    empty.info = engine.info;
    const [lacking, draining, gone] = await Promise.all(
      [empty, engine, engine].map((one) => startServer(one, { port: 0, host: "127.0.0.1", secret })),
    );
    void draining.drain();
    await gone.close();
    const edgeOf = (...servers: RunningServer[]) =>
      startEdge({ port: 0, upstream: servers.map(({ url }) => url).join(), secret });
    const [two, all] = await Promise.all([edgeOf(lacking, other), edgeOf(draining, lacking, gone)]);
    // Each of these names may have another worker as its first.
    for (let i = 0; i < 8; i++) {
      engine.held.add(imageKey("", hashOf(20, i), LIMITS));
      expect((await ask(two.url, about(named(hashOf(20, i))))).status).toBe(200);
      await notFound(await ask(two.url, about(named(hashOf(21, i)))));
      await notFound(await ask(all.url, about(named(hashOf(20, i)))));
    }
    expect([empty.requests, empty.puts, engine.puts]).toEqual([[], [], []]);
    await Promise.all([two, all, other, lacking, draining].map((one) => one.close()));
  });

  test("are not found when they are dropped before they are used", async () => {
    engine.held.add(imageKey("", hashOf(14), LIMITS));
    const generate = engine.generate.bind(engine);
    engine.generate = (...asked) => {
      engine.held.clear();
      return generate(...asked);
    };
    await notFound(await ask(edge.url, about(named(hashOf(14)))));
    engine.generate = generate;
    expect(engine.requests).toHaveLength(1);
  });
});

describe("edge and worker", () => {
  test("agree on the model anew when the worker has another one", async () => {
    await ask(edge.url, { messages: hi });
    engine.info = { ...engine.info, fingerprint: "tiny-2" };
    await server.close();
    server = await startServer(engine, { port: Number(new URL(server.url).port), host: "127.0.0.1", secret });
    expect((await ask(edge.url, { messages: hi })).status).toBe(200);
    expect(engine.requests.at(-1)!.fingerprint).toBe("tiny-2");
  });

  test("let a request that waits leave the queue with its client", async () => {
    engine.script = silence;
    const running = askAndHang(edge.url);
    const signal = await started();
    const waiting = askAndHang(edge.url);
    const queued = async () => ((await (await fetch(`${server.url}/health`)).json()) as { waiting: number }).waiting;
    while ((await queued()) !== 1);
    waiting.resetAndDestroy();
    while ((await queued()) !== 0);
    running.resetAndDestroy();
    await aborted(signal);
    expect(engine.requests.length).toBe(1);
  });
});

describe("the edge alone", () => {
  test("refuses a body that is too large", async () => {
    const response = await ask(edge.url, " ".repeat(20 * 2 ** 20 + 1));
    expect([response.status, await message(response)]).toEqual([413, "The body is larger than 20 MiB."]);
  });

  test("says 503 when no GPU worker can be reached, and uses the next one when one can", async () => {
    const gone = await startServer(engine, { port: 0, host: "127.0.0.1", secret });
    await gone.close();
    const [none, second] = await Promise.all([
      startEdge({ port: 0, upstream: gone.url, secret }),
      startEdge({ port: 0, upstream: `${gone.url}, ${server.url}/`, secret }),
    ]);
    const response = await ask(none.url, { messages: hi });
    expect([response.status, await message(response)]).toEqual([503, "No GPU worker can be reached."]);
    for (let i = 1; i <= 8; i++) {
      const request = { messages: [{ role: "user", content: [picture(i)] }] };
      expect((await ask(second.url, request)).status).toBe(200);
    }
    await Promise.all([none.close(), second.close()]);
  });

  test("asks the next worker when one takes nothing more, and says so when none does", async () => {
    const draining = await startServer(engine, { port: 0, host: "127.0.0.1", secret });
    void draining.drain();
    const edges = await Promise.all(
      [`${draining.url},${server.url}`, draining.url].map((upstream) => startEdge({ port: 0, upstream, secret })),
    );
    for (let i = 1; i <= 8; i++) {
      const request = { messages: [{ role: "user", content: [picture(i)] }] };
      expect((await ask(edges[0].url, request)).status).toBe(200);
    }
    const response = await ask(edges[1].url, { messages: hi });
    expect([response.status, await message(response)]).toEqual([503, "This worker is about to end."]);
    await Promise.all([...edges, draining].map((one) => one.close()));
  });

  test("asks the same worker about the same picture, and shares pictures among workers", async () => {
    const engines = [new ScriptedEngine(), new ScriptedEngine()];
    for (const one of engines) one.info = engine.info;
    const servers = await Promise.all(engines.map((one) => startServer(one, { port: 0, host: "127.0.0.1", secret })));
    const both = await startEdge({ port: 0, upstream: servers.map(({ url }) => url).join(), secret });
    for (let i = 0; i < 40; i++) {
      const request = { messages: [{ role: "user", content: [picture(1 + (i % 20))] }] };
      expect((await ask(both.url, request)).status).toBe(200);
    }
    const sent = engines.map(({ puts }) => puts.length);
    expect(sent[0] + sent[1]).toBe(20);
    expect(Math.min(...sent)).toBeGreaterThan(0);
    await both.close();
    await Promise.all(servers.map((one) => one.close()));
  });

  test("names a port that is in use, and is gone when closed, streams and all", async () => {
    await expect(startEdge({ port: Number(new URL(server.url).port), upstream: server.url, secret })).rejects.toThrow(
      /port \d+ is in use/,
    );
    const other = await startEdge({ port: 0, upstream: server.url, secret });
    engine.script = chatter;
    const response = await ask(other.url, { messages: hi, stream: true });
    const signal = await started();
    const reading = response.text().catch(() => "");
    await other.close();
    await Promise.all([reading, aborted(signal), other.ended]);
    const socket = connect(Number(new URL(other.url).port), "127.0.0.1");
    await expect(once(socket, "connect")).rejects.toThrow("ECONNREFUSED");
  });

  test("drains: it ends by itself, and the streams under way end whole", async () => {
    const other = await startEdge({ port: 0, upstream: server.url, secret });
    const go = Promise.withResolvers<void>();
    engine.script = async function* (request) {
      yield say("Hel");
      await go.promise;
      yield { ...say("lo"), finish: finishOf(request, 2) };
    };
    const stream = await ask(other.url, { messages: hi, stream: true });
    let isGone = false;
    const drained = other.drain().then(() => (isGone = true));
    expect(isGone).toBe(false);
    go.resolve();
    const chunks = await events(stream);
    expect(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join("")).toBe("Hello");
    await drained;
    await other.close();
  });
});
