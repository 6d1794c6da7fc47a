/** The GPU worker as a service: who may ask it what, queue, deadline, drain, metrics, log; and what it does in faults. */
import { createHash } from "node:crypto";
import { once } from "node:events";
import { truncateSync, writeFileSync } from "node:fs";
import { createServer, type ServerResponse } from "node:http";
import { type AddressInfo, connect } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";
import { afterEach, describe, expect, test } from "vitest";
import { startEngine } from "../gpu-worker/engine-process.ts";
import { type RunningServer, type ServerOptions, startServer } from "../gpu-worker/service/server.ts";
import { type GenerateRequest, imagePath } from "../shared/protocol.ts";
import { Signer } from "../shared/sign.ts";
import { Checkpoint } from "./support/checkpoint.ts";
import { dataUrl } from "./support/goldens.ts";
import { chatter, finishOf, type Script, ScriptedEngine, say, silence, words } from "./support/scripted-engine.ts";
import { startStack } from "./support/stack.ts";
import { tinyModel } from "./support/tiny-model.ts";

const SECRET = "a secret of the tests";
const signer = new Signer(SECRET);
const limits = { minPixels: 3136, maxPixels: 12845056 };
const alice = { tenant: "alice", priority: "interactive", deadline: null } as const;
const sampling = { temperature: 0, topP: 1, topK: 0, minP: 0, seed: 1, repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, logitBias: [] }; // biome-ignore format: one line

/** What an edge sends. */
function requestOf(change: Partial<GenerateRequest> = {}): GenerateRequest {
  return {
    ...{ id: "chatcmpl-1", kind: "chat", user: null, ...alice },
    ...{ model: tinyModel.id, fingerprint: tinyModel.fingerprint, tokens: [1, 2, 3], images: [], sampling, n: 1 },
    ...{ maxTokens: null, stop: [], stopTokenIds: [], ignoreEos: false, logprobs: null, json: null, plain: false },
    ...{ stream: false, includeUsage: false, includeDrafts: false },
    ...change,
  };
}

type Line = Record<string, unknown>;
type Health = { status: string; running: number; waiting: number };

const healthOf = async (url: string) => (await fetch(`${url}/health`)).json() as Promise<Health>;

async function until(holds: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await holds())) await sleep(5);
}

/** A server with a scripted engine; `lines` is its log. */
class Scene implements AsyncDisposable {
  readonly engine = new ScriptedEngine();
  readonly lines: Line[] = [];
  server!: RunningServer;

  /** `concurrency`: how many turns there are at once. */
  static async start(options: Partial<ServerOptions> = {}, concurrency = 1): Promise<Scene> {
    const scene = new Scene();
    scene.engine.concurrency = concurrency;
    const log: ServerOptions["log"] = (level, msg, fields) => scene.lines.push({ level, msg, ...fields });
    const all = { port: 0, host: "127.0.0.1", secret: SECRET, log, ...options };
    scene.server = await startServer(scene.engine, all);
    return scene;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.server.close();
  }

  get port(): number {
    return Number(new URL(this.server.url).port);
  }

  fetch(path: string, init?: RequestInit): Promise<Response> {
    return fetch(this.server.url + path, init);
  }

  async signed(method: string, path: string, body?: string | Uint8Array<ArrayBuffer>, init?: RequestInit) {
    const signature = await signer.sign(method, path, method === "POST" ? (body as string) : "");
    return this.fetch(path, { method, body, headers: { "x-vispec-signature": signature }, ...init });
  }

  generate(change: Partial<GenerateRequest> = {}, init?: RequestInit): Promise<Response> {
    return this.signed("POST", "/internal/generate", JSON.stringify(requestOf(change)), init);
  }

  chat(change: object = {}, init?: RequestInit): Promise<Response> {
    const body = JSON.stringify({ messages: [{ role: "user", content: "Hi" }], ...change });
    return this.fetch("/v1/chat/completions", { method: "POST", body, ...init });
  }

  health(): Promise<Health> {
    return healthOf(this.server.url);
  }

  /** Waits until so many run and wait. */
  counts(running: number, waiting: number): Promise<void> {
    return until(async () =>
      isDeepStrictEqual({ ...(await this.health()), status: "" }, { status: "", running, waiting }),
    );
  }

  /** Waits for the log's line number n. */
  async line(n = 1): Promise<Line> {
    await until(() => this.lines.length >= n);
    return this.lines[n - 1];
  }

  /** A metric's values by their labels, without those that all have. */
  async metric(name: string): Promise<Record<string, number>> {
    const text = await (await this.fetch("/metrics")).text();
    const rows = [...text.matchAll(new RegExp(`^${name}\\{(.*)\\} (\\S+)$`, "gm"))];
    const own = (labels: string) => labels.replace(/,?model_name="tiny",engine="0"/, "");
    return Object.fromEntries(rows.map(([, labels, value]) => [own(labels), Number(value)]));
  }
}

const errorOf = async (response: Response) =>
  ((await response.json()) as { error: { message: string; code: string; param: string } }).error;

/** A script that waits for `go` before its first step. */
function gate(script: Script) {
  const { promise, resolve } = Promise.withResolvers<void>();
  const gated: Script = async function* (request, signal) {
    await promise;
    yield* script(request, signal);
  };
  return { script: gated, go: resolve };
}

describe("what is internal", () => {
  const routes: [string, string, string?][] = [
    ["GET", "/internal/model"],
    ["POST", "/internal/generate", JSON.stringify(requestOf())],
    ["PUT", imagePath(alice, "0".repeat(64), limits), "x"],
  ];

  test.each(routes)("%s %.20s is answered for a signature only", async (method, path, body) => {
    await using scene = await Scene.start();
    const unsigned = await scene.fetch(path, { method, body });
    expect([unsigned.status, (await errorOf(unsigned)).code]).toEqual([401, "invalid_signature"]);
    const headers = {
      "x-vispec-signature": await signer.sign(method, "/internal/other", method === "POST" ? body! : ""),
    };
    expect((await scene.fetch(path, { method, body, headers })).status).toBe(401);
    expect((await scene.signed(method, path, body)).status).not.toBe(401);
    await using open = await Scene.start({ secret: undefined });
    const refused = await open.signed(method, path, body);
    expect([refused.status, (await errorOf(refused)).message]).toEqual([401, expect.stringContaining("WORKER_SECRET")]);
    expect(open.engine.requests).toEqual([]);
  });

  test("and the plain API is for this machine's own clients, and may be off", async () => {
    await using scene = await Scene.start();
    const status = async (of: Scene, headers: Record<string, string>) => (await of.chat({}, { headers })).status;
    expect(await status(scene, {})).toBe(200);
    for (const name of ["origin", "forwarded", "x-forwarded-for", "cf-connecting-ip"])
      expect([name, await status(scene, { [name]: "127.0.0.1" })]).toEqual([name, 404]);
    for (const host of ["worker.example", "127.evil.example", "127.0.0.1.evil.example"]) {
      const socket = connect(scene.port, "127.0.0.1");
      socket.write(`POST /v1/chat/completions HTTP/1.1\r\nhost: ${host}\r\ncontent-length: 0\r\n\r\n`);
      expect([host, String((await once(socket, "data"))[0])]).toEqual([host, expect.stringMatching(/^HTTP\/1.1 404 /)]);
      socket.destroy();
    }
    await using off = await Scene.start({ plainApi: false });
    expect(await status(off, {})).toBe(404);
  });

  test("a signed path of another tenant's image is not believed, nor are bytes of another hash", async () => {
    await using scene = await Scene.start();
    const bytes = Uint8Array.of(1, 2);
    const path = imagePath(alice, createHash("sha256").update(bytes).digest("hex"), limits);
    const headers = { "x-vispec-signature": await signer.sign("PUT", path, "") };
    const elsewhere = path.replace("alice", "bob");
    expect((await scene.fetch(elsewhere, { method: "PUT", body: bytes, headers })).status).toBe(401);
    const wrong = await scene.signed("PUT", path, Uint8Array.of(3));
    expect([wrong.status, (await errorOf(wrong)).code]).toEqual([400, "hash_mismatch"]);
    for (const part of [/&max=\d+/, /&priority=\w+/])
      expect((await scene.signed("PUT", path.replace(part, ""), bytes)).status).toBe(400);
    expect(scene.engine.puts).toEqual([]);
    expect((await scene.signed("PUT", path, bytes)).status).toBe(204);
    expect(scene.engine.puts).toEqual([expect.stringMatching(/^[0-9a-f]{64}\/3136-12845056\/alice$/)]);
  });

  test("a prompt for another model is answered 412", async () => {
    await using scene = await Scene.start();
    expect((await scene.generate({ fingerprint: "another" })).status).toBe(412);
  });
});

describe("a request's pictures", () => {
  const picture = Uint8Array.of(7, 7);
  const hash = createHash("sha256").update(picture).digest("hex");
  const where = "messages[0].content[0]";
  const ref = (change: object = {}) => ({ hash, url: null, where, limits, ...change });
  const closing: (() => void)[] = [];
  afterEach(() => {
    for (const close of closing.splice(0)) close();
  });

  /** A server of pictures on loopback. */
  async function pictures(answer: (response: ServerResponse) => void): Promise<string> {
    const server = createServer((_request, response) => answer(response)).listen(0, "127.0.0.1");
    await once(server, "listening");
    closing.push(() => {
      server.close();
      server.closeAllConnections();
    });
    return `http://127.0.0.1:${(server.address() as AddressInfo).port}/picture.png`;
  }

  test("are asked for by their indices, before the request waits", async () => {
    await using scene = await Scene.start();
    const images = [ref(), ref({ limits: { minPixels: 1, maxPixels: 9 } }), ref()];
    const response = await scene.generate({ images });
    expect([response.status, await response.json()]).toEqual([409, { missing: [0, 1, 2] }]);
    scene.engine.held.add(`${hash}/3136-12845056/alice`);
    expect(await (await scene.generate({ images })).json()).toEqual({ missing: [1] });
    scene.engine.held.add(`${hash}/1-9/alice`);
    expect((await scene.generate({ images })).status).toBe(200);
    expect((await scene.generate({ images, tenant: "bob" })).status).toBe(409);
    expect(scene.lines).toHaveLength(1); // what comes again is no request that ended
  });

  test("that were dropped while it waited are asked for again, and put with its turn where their bytes are here", async () => {
    await using scene = await Scene.start();
    const { script, go } = gate(words(["first"]));
    scene.engine.script = script;
    const running = scene.chat();
    await scene.counts(1, 0);
    scene.engine.held.add(`${hash}/3136-12845056/alice`);
    const waiting = scene.generate({ images: [ref()] });
    await scene.counts(1, 1);
    const url = `data:image/png;base64,${Buffer.from(picture).toString("base64")}`;
    const plain = scene.chat({ messages: [{ role: "user", content: [{ type: "image_url", image_url: { url } }] }] });
    await scene.counts(1, 2);
    expect(scene.engine.puts).toEqual([]);
    scene.engine.held.clear();
    scene.engine.script = words(["later"]);
    go();
    expect((await running).status).toBe(200);
    expect(await (await waiting).json()).toEqual({ missing: [0] });
    expect((await plain).status).toBe(200);
    expect(scene.engine.puts).toHaveLength(1);
  });

  test("that an edge sends take their tenant's turn", async () => {
    await using scene = await Scene.start();
    const { script, go } = gate(words(["first"]));
    scene.engine.script = script;
    const running = scene.chat();
    await scene.counts(1, 0);
    const path = imagePath(alice, hash, limits);
    const headers = { "x-vispec-signature": await signer.sign("PUT", path, "") };
    const put = fetch(`http://127.0.0.1:${scene.port}${path}`, { method: "PUT", headers, body: picture });
    await scene.counts(1, 1);
    expect(scene.engine.puts).toEqual([]);
    go();
    expect([(await running).status, (await put).status]).toEqual([200, 204]);
    expect(scene.engine.puts).toHaveLength(1);
  });

  test("that are dropped in the moment before they are used are put again, but not for ever", async () => {
    await using scene = await Scene.start({ imageUrls: "any" });
    const url = await pictures((response) => response.end(picture));
    const drop = (times: number) => {
      scene.engine.held.clear();
      scene.engine.putImage = async (key) => {
        if (times-- <= 0) scene.engine.held.add(key);
      };
    };
    drop(2);
    expect((await scene.generate({ images: [ref({ hash: null, url })] })).status).toBe(200);
    drop(3);
    const response = await scene.generate({ images: [ref({ hash: null, url })] });
    expect([response.status, (await errorOf(response)).code]).toEqual([503, "image_missing"]);
  });

  describe("that a client of its own names by their hash", () => {
    const { minPixels, maxPixels } = tinyModel.pixels;
    const key = `${hash}/${minPixels}-${maxPixels}/`;
    const named = { type: "image_url", image_url: { url: `sha256:${hash}` } };
    const sent = { type: "image_url", image_url: { url: `data:image/png;base64,${Buffer.from(picture).toString("base64")}` } }; // biome-ignore format: one line
    const ask = (scene: Scene, ...content: object[]) => scene.chat({ messages: [{ role: "user", content }] });
    const notFound = async (response: Response, where: string) =>
      expect([response.status, await errorOf(response)]).toEqual([404, expect.objectContaining({ code: "image_not_found", param: where })]); // biome-ignore format: one line

    test("are used when they are held, and not found when they are not, or in another size", async () => {
      await using scene = await Scene.start();
      const other = { type: "image_url", image_url: { url: "data:image/png;base64,AQID" } };
      await notFound(await ask(scene, other, named), "messages[0].content[1]");
      expect(scene.engine.puts).toEqual([]);
      expect((await ask(scene, sent)).status).toBe(200);
      expect((await ask(scene, named)).status).toBe(200);
      expect(scene.engine.puts).toEqual([key]);
      expect(scene.engine.requests).toHaveLength(2);
      await notFound(await ask(scene, { ...named, max_pixels: 9000 }), where);
      expect(await scene.metric("vispec:requests_refused_total")).toEqual({ 'code="image_not_found"': 2 });
    });

    test("have the bytes that the same request has, wherever they stand and in whatever size", async () => {
      await using scene = await Scene.start();
      expect((await ask(scene, { ...named, max_pixels: 9000 }, sent, named)).status).toBe(200);
      expect(scene.engine.puts).toEqual([`${hash}/${minPixels}-9000/`, key]);
    });

    test("are not found when they were dropped while the request waited, or at the last moment", async () => {
      await using scene = await Scene.start();
      const { script, go } = gate(words(["first"]));
      scene.engine.script = script;
      const running = scene.chat();
      await scene.counts(1, 0);
      scene.engine.held.add(key);
      const waiting = ask(scene, named);
      await scene.counts(1, 1);
      scene.engine.held.clear();
      go();
      expect((await running).status).toBe(200);
      await notFound(await waiting, where);
      scene.engine.held.add(key);
      const generate = scene.engine.generate.bind(scene.engine);
      scene.engine.generate = (...asked) => {
        scene.engine.held.clear();
        return generate(...asked);
      };
      await notFound(await ask(scene, named), where);
    });
  });

  test("are fetched where they are named by URL, and held as this tenant's", async () => {
    await using scene = await Scene.start({ imageUrls: "any" });
    const url = await pictures((response) => response.end(picture));
    expect((await scene.generate({ images: [ref({ hash: null, url })] })).status).toBe(200);
    expect(scene.engine.puts).toEqual([`${hash}/3136-12845056/alice`]);
    expect((await scene.generate({ images: [ref()] })).status).toBe(200);
    await using home = await Scene.start();
    const refused = await home.generate({ images: [ref({ hash: null, url })] });
    expect([refused.status, (await errorOf(refused)).param]).toEqual([400, where]);
  });

  test("are not fetched without end, in number or size", async () => {
    await using scene = await Scene.start({ imageUrls: "any" });
    const url = await pictures((response) => response.end(Buffer.alloc(17 << 20, 1)));
    for (const [count, what] of [
      [65, "more than 64 pictures"],
      [4, "larger than 64 MiB"],
    ] as const) {
      const response = await scene.generate({ images: Array(count).fill(ref({ hash: null, url })) });
      const { message, code, param } = await errorOf(response);
      expect([response.status, code, param]).toEqual([400, "images_too_large", "messages"]);
      expect(message).toContain(what);
    }
    expect(scene.engine.puts).toEqual([]);
  });

  test("that cannot be used are named by their place", async () => {
    await using scene = await Scene.start({ imageUrls: "any" });
    const url = await pictures((response) => response.end(Uint8Array.of(0)));
    const response = await scene.generate({ images: [ref({ hash: null, url })] });
    const { message, param, code } = await errorOf(response);
    expect([response.status, message, param, code]).toEqual([400, `${where}: the image cannot be decoded`, where, "invalid_image"]); // biome-ignore format: one line
  });

  // The time limit is below that of a fetch from a silent server.
  test("are not fetched any further when the client leaves", { timeout: 4000 }, async () => {
    await using scene = await Scene.start({ imageUrls: "any" });
    const { promise: left, resolve } = Promise.withResolvers<void>();
    const client = new AbortController();
    const url = await pictures((response) => {
      response.once("close", resolve);
      client.abort();
    });
    const asked = scene.generate({ images: [ref({ hash: null, url })] }, { signal: client.signal });
    await expect(asked).rejects.toThrow("aborted");
    await left;
    expect(await scene.line()).toMatchObject({ id: "chatcmpl-1", status: 499, level: "info" });
    await scene.counts(0, 0);
  });
});

describe("the queue", () => {
  test("refuses what it has no place for with 429 and Retry-After, and a tenant sooner than all of them", async () => {
    await using scene = await Scene.start({ maxWaiting: 8 });
    scene.engine.script = silence;
    const client = new AbortController();
    const ask = (tenant: string) => scene.generate({ tenant }, { signal: client.signal }).catch(() => null);
    const asked = [ask("a"), ask("a"), ask("a")];
    await scene.counts(1, 2);
    const refused = await scene.generate({ tenant: "a" });
    expect([refused.status, (await errorOf(refused)).code]).toEqual([429, "queue_full"]);
    expect(refused.headers.get("retry-after")).toMatch(/^[1-9]\d*$/);
    for (const tenant of ["b", "b", "c", "c", "d", "d"]) asked.push(ask(tenant));
    await scene.counts(1, 8);
    expect((await scene.generate({ tenant: "e" })).status).toBe(429);
    expect(await scene.metric("vispec:requests_refused_total")).toEqual({ 'code="queue_full"': 2 });
    client.abort();
    await Promise.all(asked);
    await scene.counts(0, 0);
  });

  test("has as many turns as the engine decodes requests at once, pictures' among them", async () => {
    await using scene = await Scene.start({}, 2);
    const { script, go } = gate(words(["first"]));
    scene.engine.script = script;
    const asked = [scene.generate(), scene.generate()];
    await until(() => scene.engine.requests.length === 2);
    const bytes = Uint8Array.of(1);
    const hash = createHash("sha256").update(bytes).digest("hex");
    asked.push(scene.generate(), scene.signed("PUT", imagePath({ ...alice, tenant: "bob" }, hash, limits), bytes));
    await scene.counts(2, 2);
    expect(await scene.metric("vllm:num_requests_running")).toEqual({ "": 2 });
    expect([scene.engine.requests.length, scene.engine.puts]).toEqual([2, []]);
    go();
    expect((await Promise.all(asked)).map(({ status }) => status)).toEqual([200, 200, 200, 204]);
  });

  test("has eight turns where weights are small, and one where every copy of them counts", async () => {
    using checkpoint = new Checkpoint();
    const concurrency = async () => {
      const engine = await startEngine({ model: checkpoint.folder, drafter: "none" });
      await engine.close();
      return engine.concurrency;
    };
    expect(await concurrency()).toBe(8);
    const other = join(checkpoint.folder, "more.safetensors");
    writeFileSync(other, "");
    truncateSync(other, 1e9); // takes no room
    expect(await concurrency()).toBe(1);
  });

  test("lets interactive requests, and their pictures, go before those of the flex tier", async () => {
    await using scene = await Scene.start();
    const { script, go } = gate(words(["first"]));
    scene.engine.script = script;
    const order: string[] = [];
    const running = scene.generate();
    await scene.counts(1, 0);
    const bytes = Uint8Array.of(1);
    const hash = createHash("sha256").update(bytes).digest("hex");
    const path = imagePath({ ...alice, priority: "batch" }, hash, limits);
    const asked: [name: string, ask: () => Promise<Response>][] = [
      ["batch picture", () => scene.signed("PUT", path, bytes)],
      ["flex", () => scene.chat({ service_tier: "flex" })],
      ["batch", () => scene.generate({ priority: "batch" })],
      ["default", () => scene.chat({ service_tier: "default" })],
      ["picture", () => scene.signed("PUT", imagePath(alice, hash, limits), bytes)],
      ["interactive", () => scene.generate()],
    ];
    const answers: Promise<unknown>[] = [];
    for (const [i, [name, ask]] of asked.entries()) {
      answers.push(ask().then((response) => void (response.ok && order.push(name))));
      await scene.counts(1, i + 1);
    }
    expect(await scene.metric("vispec:requests_waiting")).toEqual({ 'priority="interactive"': 3, 'priority="batch"': 3 }); // biome-ignore format: one line
    go();
    await Promise.all([running, ...answers]);
    expect([order.slice(0, 3), order.slice(3)].map((names) => names.toSorted())).toEqual([
      ["default", "interactive", "picture"],
      ["batch", "batch picture", "flex"],
    ]);
  });

  test.each([
    [12, false],
    [64, true],
  ])("is not held by a client that never reads %i MiB, who is cut off: %s", async (mib, cut) => {
    await using scene = await Scene.start();
    const long = "x".repeat(1 << 20);
    scene.engine.script = words(Array(mib).fill(long)); // more than any socket's buffer
    const body = JSON.stringify(requestOf({ stream: true }));
    const signature = await signer.sign("POST", "/internal/generate", body);
    const socket = connect(scene.port, "127.0.0.1").pause();
    socket.write(`POST /internal/generate HTTP/1.1\r\nhost: test\r\nx-vispec-signature: ${signature}\r\ncontent-length: ${body.length}\r\n\r\n${body}`); // biome-ignore format: one line
    await until(() => scene.engine.requests.length === 1);
    scene.engine.script = words(["next"]);
    expect(await (await scene.generate({ tenant: "bob" })).text()).toContain("next");
    expect(scene.engine.requests).toHaveLength(2);
    expect(scene.engine.signals[0].aborted).toBe(cut);
    socket.destroy();
  });
});

describe("the deadline", () => {
  test("is a 504 before the first step, for a request that waits too", async () => {
    await using scene = await Scene.start({ deadline: 0.2 });
    scene.engine.script = silence;
    const both = await Promise.all([scene.generate(), scene.generate({ stream: true })]);
    for (const response of both)
      expect([response.status, (await errorOf(response)).code]).toEqual([504, "deadline_exceeded"]);
    expect(scene.engine.signals.every((signal) => signal.aborted)).toBe(true);
    await scene.counts(0, 0);
  });

  test("of a request ends its wait, before it reaches the engine, and that of its picture", async () => {
    await using scene = await Scene.start();
    scene.engine.script = silence;
    const client = new AbortController();
    const running = scene.generate({}, { signal: client.signal }).catch(() => null);
    await scene.counts(1, 0);
    const bytes = Uint8Array.of(1);
    const hash = createHash("sha256").update(bytes).digest("hex");
    for (const response of await Promise.all([
      scene.generate({ deadline: 0.2 }),
      scene.chat({ deadline: 0.2, stream: true }),
      scene.signed("PUT", imagePath({ ...alice, deadline: 0.2 }, hash, limits), bytes),
    ]))
      expect([response.status, (await errorOf(response)).code]).toEqual([504, "deadline_exceeded"]);
    await scene.counts(1, 0);
    client.abort();
    await running;
    expect([scene.engine.requests.length, scene.engine.puts]).toEqual([1, []]);
  });

  test("of a request that is over when it comes keeps it from an idle engine", async () => {
    await using scene = await Scene.start();
    expect((await scene.generate({ deadline: 1e-9 })).status).toBe(504);
    expect(scene.engine.requests).toEqual([]);
  });

  test("of a request is no later than the server's own", { timeout: 10_000 }, async () => {
    await using scene = await Scene.start({ deadline: 0.2 });
    scene.engine.script = silence;
    expect((await scene.generate({ deadline: 3600 })).status).toBe(504);
  });

  test.each<[whose: string, options: Partial<ServerOptions>, change: Partial<GenerateRequest>]>([
    ["the server's", { deadline: 0.2 }, {}],
    ["the request's", {}, { deadline: 0.2 }],
  ])("is an event that ends the stream after it: %s", async (_whose, options, change) => {
    await using scene = await Scene.start(options);
    scene.engine.script = chatter;
    const text = await (await scene.generate({ stream: true, ...change })).text();
    const last = JSON.parse(text.trim().split("\n\n").at(-1)!.slice("data: ".length));
    expect(last.error.code).toBe("deadline_exceeded");
    expect(await scene.metric("vllm:request_success_total")).toEqual({ 'finished_reason="error"': 1 });
  });
});

test("a drain lets what was accepted end whole, refuses what is new, and then is over", async () => {
  await using scene = await Scene.start();
  const { script, go } = gate(words(["on", "ly"]));
  scene.engine.script = script;
  const accepted = [scene.generate({ stream: true }), scene.generate({ stream: true }), scene.generate()];
  await scene.counts(1, 2);
  let over = false;
  const drained = scene.server.drain().then(() => {
    over = true;
  });
  const bytes = Uint8Array.of(1);
  const image = imagePath(alice, createHash("sha256").update(bytes).digest("hex"), limits);
  for (const refused of [await scene.generate(), await scene.chat(), await scene.signed("PUT", image, bytes)]) {
    expect([refused.status, (await errorOf(refused)).code]).toEqual([503, "draining"]);
    expect([refused.headers.get("retry-after"), refused.headers.get("connection")]).toEqual(["1", "close"]);
  }
  expect([(await scene.fetch("/ready")).status, (await scene.health()).status]).toEqual([503, "draining"]);
  expect(over).toBe(false);
  go();
  const [one, two, three] = await Promise.all((await Promise.all(accepted)).map((response) => response.text()));
  for (const stream of [one, two]) expect(stream).toMatch(/"ly".*\[DONE\]\n\n$/s);
  expect(three).toContain("only");
  await drained;
});

describe("health, readiness and metrics", () => {
  test("say whether the engine serves", async () => {
    await using scene = await Scene.start();
    expect([(await scene.fetch("/ready")).status, await scene.health()]).toEqual([200, { status: "ok", running: 0, waiting: 0 }]); // biome-ignore format: one line
    scene.engine.ready = false;
    scene.engine.restarts = 2;
    expect([(await scene.fetch("/ready")).status, (await scene.health()).status]).toEqual([503, "restarting"]);
    expect((await scene.fetch("/health")).status).toBe(200);
    expect(await scene.metric("vispec:engine_ready")).toEqual({ "": 0 });
    expect(await scene.metric("vispec:engine_restarts_total")).toEqual({ "": 2 });
  });

  test("count what was asked and answered", async () => {
    await using scene = await Scene.start();
    scene.engine.script = async function* (request) {
      for (let choice = 0; choice < request.n; choice++) {
        yield say("a", choice);
        await sleep(50);
        yield { ...say("bcd", choice), tokens: [1, 2, 3], accepted: 2 };
        yield { ...say("", choice), tokens: [2], finish: { ...finishOf(request, 5), drafted: request.plain ? 0 : 9 } };
      }
    };
    for (const change of [{}, { n: 2, stream: true }, { plain: true }]) await (await scene.generate(change)).text();
    scene.engine.script = silence;
    const client = new AbortController();
    const left = scene.generate({}, { signal: client.signal });
    await scene.counts(1, 0);
    const waiting = scene.generate({}, { signal: client.signal });
    await scene.counts(1, 1);
    expect(await scene.metric("vllm:num_requests_running")).toEqual({ "": 1 });
    expect(await scene.metric("vllm:num_requests_waiting")).toEqual({ "": 1 });
    client.abort();
    await Promise.allSettled([left, waiting]);
    await scene.counts(0, 0);
    await scene.generate({ fingerprint: "another" });
    await scene.fetch("/v1/chat/completions", { method: "POST", body: "{" });

    const values = {
      prompt_tokens_total: { "": 9 },
      generation_tokens_total: { "": 20 },
      request_success_total: { 'finished_reason="stop"': 4, 'finished_reason="abort"': 2 },
      spec_decode_num_drafts_total: { "": 9 },
      spec_decode_num_draft_tokens_total: { "": 27 },
      spec_decode_num_accepted_tokens_total: { "": 9 },
      spec_decode_num_accepted_tokens_per_pos_total: { 'position="0"': 6, 'position="1"': 3 },
      time_to_first_token_seconds_count: { "": 3 },
      inter_token_latency_seconds_count: { "": 20 - 3 },
      e2e_request_latency_seconds_count: { "": 3 },
      request_queue_time_seconds_count: { "": 4 },
    };
    for (const [name, value] of Object.entries(values)) expect([name, await scene.metric(`vllm:${name}`)]).toEqual([name, value]); // biome-ignore format: one line
    expect(await scene.metric("vispec:requests_refused_total")).toEqual({ 'code="model_changed"': 1, 'code="invalid_json"': 1 }); // biome-ignore format: one line
    // The times between tokens add up to no more than the whole: a cycle's is shared by its tokens.
    const { "": tokens } = await scene.metric("vllm:inter_token_latency_seconds_sum");
    const { "": whole } = await scene.metric("vllm:e2e_request_latency_seconds_sum");
    const { "": first } = await scene.metric("vllm:time_to_first_token_seconds_sum");
    expect(tokens).toBeGreaterThan(0);
    expect(tokens + first).toBeLessThanOrEqual(whole);
    expect((await scene.metric("process_resident_memory_bytes"))[""]).toBeGreaterThan(1e6);
  });
});

describe("the log", () => {
  test("has one line a request with its id, whose it is, its tokens and times", async () => {
    await using scene = await Scene.start();
    await (await scene.generate({ id: "chatcmpl-7", user: "u1" })).text();
    expect(await scene.line()).toEqual({
      ...{ level: "info", msg: "request", id: "chatcmpl-7", tenant: "alice", user: "u1", status: 200, finish: "stop" },
      ...{ prompt_tokens: 3, completion_tokens: 3, accepted: 3, drafted: 9 },
      ...{ queue_ms: expect.any(Number), ttft_ms: expect.any(Number), total_ms: expect.any(Number) },
    });
    const refused = await scene.chat({ max_tokens: 0 });
    const id = refused.headers.get("x-request-id");
    expect(id).toMatch(/^chatcmpl-/);
    expect(await scene.line(2)).toMatchObject({ level: "info", id, status: 400, ttft_ms: null });
    expect(scene.lines).toHaveLength(2);
  });

  test.each([false, true])("has what a failure's client is not told (in mid-stream: %s)", async (started) => {
    await using scene = await Scene.start();
    scene.engine.script = async function* () {
      if (started) yield say("so far");
      throw new Error("a tensor's name", { cause: new Error("and a path") });
    };
    const response = await scene.generate({ stream: true });
    expect(response.status).toBe(started ? 200 : 500);
    const text = await response.text();
    expect(text).toContain("internal_error");
    expect(text).not.toMatch(/tensor|path|service\.test/);
    const line = await scene.line();
    expect(line).toMatchObject({ level: "error", id: "chatcmpl-1", status: 500, code: "internal_error" });
    expect(line.error).toMatch(/a tensor's name\n +at .*service\.test.*and a path/s);
  });
});

const isGone = (pid: number) => {
  try {
    return !process.kill(pid, 0);
  } catch {
    return true;
  }
};

describe("an engine that fails", () => {
  const text = [{ role: "user", content: "Tell me a story." }];
  const picture = [{ role: "user", content: [{ type: "image_url", image_url: { url: dataUrl("images/size-28x28.png") } }, { type: "text", text: "What is it?" }] }]; // biome-ignore format: one line
  const ask = (url: string, messages: unknown, change: object = { max_tokens: 12 }, init?: RequestInit) =>
    fetch(`${url}/v1/chat/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ messages, temperature: 0, ...change }),
      ...init,
    });
  const content = async (response: Response) =>
    ((await response.json()) as { choices: { message: { content: string } }[] }).choices[0].message.content;

  test.each([
    ["dies", "SIGKILL", undefined],
    ["hangs", "SIGSTOP", 1500],
  ] as const)("and %s fails its own request only, and is replaced", async (_how, signal, hangTimeout) => {
    using checkpoint = new Checkpoint().endless();
    await using stack = await startStack({ model: checkpoint.folder, hangTimeout, concurrency: 1 });
    const before = [await content(await ask(stack.url, text)), await content(await ask(stack.url, picture))];
    const running = await ask(stack.url, text, { stream: true });
    const queued = [ask(stack.url, text), ask(stack.url, picture), ask(stack.workerUrl, picture)];
    await until(async () => (await healthOf(stack.workerUrl)).waiting === queued.length);
    const { pid } = stack.engine;
    if (hangTimeout) await sleep(1.5 * hangTimeout); // as long as it answers, it is left alone
    expect(stack.engine.restarts).toBe(0);
    process.kill(pid, signal);
    const last = (await running.text()).trim().split("\n\n").at(-1)!;
    expect(JSON.parse(last.slice("data: ".length)).error).toMatchObject({
      type: "server_error",
      code: "engine_stopped",
    });
    await until(async () => (await fetch(`${stack.url}/ready`)).ok);
    const answers = await Promise.all((await Promise.all(queued)).map(content));
    expect(answers).toEqual([...before, before[1]]);
    expect([stack.engine.restarts, stack.engine.ready, isGone(pid)]).toEqual([1, true, true]);
    expect(await (await fetch(`${stack.workerUrl}/metrics`)).text()).toMatch(/^vispec:engine_restarts_total\{.*\} 1$/m);
  });

  test("and cannot be started is tried again and again, while what waits can leave or stay", async () => {
    using checkpoint = new Checkpoint();
    const lines: Line[] = [];
    const log: ServerOptions["log"] = (level, msg, fields) => lines.push({ level, msg, ...fields });
    const engine = await startEngine({ model: checkpoint.folder, concurrency: 1 }, { log });
    const server = await startServer(engine, { port: 0, host: "127.0.0.1" });
    checkpoint.edit("config.json", '"model_type"', '"modeltype"');
    process.kill(engine.pid, "SIGKILL");
    const failures = () => lines.filter(({ msg }) => msg === "the engine cannot be started");
    await until(() => failures().length === 2);
    expect(failures().map(({ wait }) => wait)).toEqual([500, 1000]);
    expect(failures()[0].error).toMatch(/config\.json/);
    expect([engine.ready, (await fetch(`${server.url}/ready`)).status]).toEqual([false, 503]);
    const client = new AbortController();
    const leave = [text, picture].map((messages) => ask(server.url, messages, {}, { signal: client.signal }));
    const stays = ask(server.url, picture);
    const status = (running: number, waiting: number) => ({ status: "restarting", running, waiting });
    await until(async () => isDeepStrictEqual(await healthOf(server.url), status(1, 2)));
    client.abort();
    for (const left of leave) await expect(left).rejects.toThrow("aborted");
    await until(async () => isDeepStrictEqual(await healthOf(server.url), status(0, 1)));
    checkpoint.edit("config.json", '"modeltype"', '"model_type"');
    expect((await stays).status).toBe(200);
    await server.close();
    await engine.close();
  });

  test.runIf(process.env.LONG)("and hangs while it is loaded again is given up", async () => {
    const engine = await startEngine({ model: "models/tiny-qwen2.5-vl" }, { hangTimeout: 1000 });
    const pids = [engine.pid];
    process.kill(engine.pid, "SIGKILL");
    await until(() => engine.pid !== pids[0]);
    pids.push(engine.pid);
    process.kill(engine.pid, "SIGSTOP");
    await until(() => engine.ready);
    expect(pids).not.toContain(engine.pid);
    expect(pids.map(isGone)).toEqual([true, true]);
    await engine.close();
  });

  test("leaves no process when it is closed while another is started", async () => {
    const { promise: restarting, resolve } = Promise.withResolvers<void>();
    const engine = await startEngine({ model: "models/tiny-qwen2.5-vl" }, { log: () => resolve() });
    const { pid } = engine;
    process.kill(pid, "SIGKILL");
    await restarting;
    await until(() => engine.pid !== pid);
    await engine.close();
    expect([isGone(pid), isGone(engine.pid), engine.ready]).toEqual([true, true, false]);
  });
});
