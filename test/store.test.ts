/** The stores: one contract over a directory and S3, then what only a network can do, and the hub. */
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test, vi } from "vitest";
import { openSource, openStore } from "../gpu-worker/store/open.ts";
import { type ObjectStore, type ReadableStore, StoreError } from "../gpu-worker/store/store.ts";
import { listen, startHub } from "./support/hub-server.ts";
import { startS3 } from "./support/s3-server.ts";

const MiB = 1 << 20;
const scratch = mkdtempSync(join(tmpdir(), "vispec-store-"));
let s3: Awaited<ReturnType<typeof startS3>>;

const useEnv = (env: Record<string, string>) => {
  for (const [name, value] of Object.entries(env)) vi.stubEnv(name, value);
};

beforeAll(async () => {
  s3 = await startS3();
});
beforeEach(() => {
  useEnv(s3.env);
  s3.log.length = 0;
});
afterEach(() => {
  s3.cutAfter(null);
  vi.unstubAllEnvs();
});
afterAll(async () => {
  await s3.close();
  rmSync(scratch, { recursive: true });
});

/** Bytes that differ everywhere, so that a shifted or repeated range cannot pass. */
function pattern(length: number, seed = 1): Uint8Array {
  const words = new Uint32Array(Math.ceil(length / 4));
  for (let i = 0, state = seed; i < words.length; i++)
    words[i] = state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return new Uint8Array(words.buffer, 0, length);
}

async function* inChunks(bytes: Uint8Array, size: number, fail?: { at: number; error: Error }) {
  for (let at = 0; at < bytes.length; at += size) {
    if (fail && at >= fail.at) throw fail.error;
    yield bytes.subarray(at, at + size);
  }
}

async function read(store: ReadableStore, key: string, range?: { from?: number; to?: number }, signal?: AbortSignal) {
  const chunks: Uint8Array[] = [];
  for await (const chunk of store.read(key, range, signal)) chunks.push(chunk);
  return Buffer.concat(chunks);
}

const soon = () => new Promise((resolve) => setTimeout(resolve, 10));

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex");

/** Compared by hash: vitest would print megabytes. */
const same = (actual: Uint8Array, expected: Uint8Array) =>
  expect([actual.length, sha256(actual)]).toEqual([expected.length, sha256(expected)]);

/** The message of the StoreError that the work fails with. */
async function refusal(work: Promise<unknown>): Promise<string> {
  const error = await work.then(
    () => expect.fail("it did not fail"),
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(StoreError);
  const { message } = error as StoreError;
  expect(message).not.toMatch(/secret|signature=|\n/);
  return message;
}

const keysOf = async (store: ReadableStore, prefix?: string) => (await store.list(prefix)).map(({ key }) => key);

let places = 0;
describe.each([
  { kind: "a directory", place: () => join(scratch, `place-${places++}`) },
  { kind: "S3", place: () => `s3://${s3.bucket}/place-${places++}/deep` },
])("$kind", ({ kind, place }) => {
  let store: ObjectStore;
  beforeEach(async () => {
    store = openStore(place());
    await store.write("first.txt", Buffer.from("first"));
  });

  test("gives back what was written, tells its size, and replaces it", async () => {
    const body = pattern(100_000);
    await store.write("a/b/c.bin", body);
    same(await read(store, "a/b/c.bin"), body);
    const before = await store.stat("a/b/c.bin");
    expect(before).toMatchObject({ key: "a/b/c.bin", bytes: 100_000 });
    await store.write("a/b/c.bin", inChunks(pattern(500, 2), 7));
    same(await read(store, "a/b/c.bin"), pattern(500, 2));
    const after = await store.stat("a/b/c.bin");
    expect(after?.bytes).toBe(500);
    expect(after?.version).not.toBe(before?.version);
    expect(before?.version).toBeTruthy();
  });

  test("lists every object under a prefix, sorted, whatever its name", async () => {
    const names = ["b.txt", "B.txt", "a b+c&d?.txt", "日本/é.bin", "sub/x", "sub-2/y", "100%.txt", "first.txt"];
    for (const name of names) await store.write(name, Buffer.from(name));
    expect(await keysOf(store)).toEqual([...names].sort());
    expect(await keysOf(store, "sub")).toEqual(["sub-2/y", "sub/x"]);
    expect(await keysOf(store, "sub/")).toEqual(["sub/x"]);
    expect(await keysOf(store, "none")).toEqual([]);
    for (const name of names) expect((await read(store, name)).toString()).toBe(name);
    const listed = (await store.list("日本/"))[0];
    expect(await store.stat("日本/é.bin")).toMatchObject(listed);
  });

  test("removes an object, and what is not there without an error", async () => {
    await store.remove("first.txt");
    await store.remove("first.txt");
    expect(await store.stat("first.txt")).toBeUndefined();
    expect(await keysOf(store)).toEqual([]);
  });

  test("reads ranges, and says what is not there", async () => {
    const body = pattern(3 * MiB + 5);
    await store.write("body", body);
    for (const [from, to] of [[0, 1], [1, 2], [MiB - 3, 2 * MiB + 7], [3 * MiB, 3 * MiB + 5]]) // biome-ignore format: one line
      same(await read(store, "body", { from, to }), body.subarray(from, to));
    same(await read(store, "body", { from: 17 }), body.subarray(17));
    same(await read(store, "body", { to: 17 }), body.subarray(0, 17));
    expect(await read(store, "body", { from: 5, to: 5 })).toHaveLength(0);
    const ends = `${store.location}/body has ${body.length} bytes, not the ${body.length + 1} that were asked for`;
    expect(await refusal(read(store, "body", { from: 9, to: body.length + 1 }))).toBe(ends);
    const before = `${store.location}/body: it ends before the first byte that was asked for`;
    expect(await refusal(read(store, "body", { from: body.length }))).toBe(before);
    expect(await refusal(read(store, "body", { from: 1e9, to: 2e9 }))).toBe(before);
    await store.write("empty", new Uint8Array());
    expect(await read(store, "empty")).toHaveLength(0);
    expect(await store.stat("empty")).toMatchObject({ bytes: 0 });
  });

  test("takes bodies of many megabytes, in one piece or in chunks of any size", async () => {
    const body = pattern(19 * MiB + 3);
    await store.write("whole", body);
    same(await read(store, "whole"), body);
    await store.write("chunks", inChunks(body, 777_777));
    same(await read(store, "chunks"), body);
    expect((await store.list()).map(({ bytes }) => bytes)).toEqual([body.length, 5, body.length]);
  });

  test.each([1000, 11 * MiB])("a body that fails after %i bytes leaves the old object and nothing else", async (at) => {
    const error = new Error("the source broke");
    const body = pattern(20 * MiB);
    await expect(store.write("first.txt", inChunks(body, 500_000, { at, error }))).rejects.toBe(error);
    expect((await read(store, "first.txt")).toString()).toBe("first");
    await expect(store.write("new", inChunks(body, 500_000, { at, error }))).rejects.toBe(error);
    expect(await keysOf(store)).toEqual(["first.txt"]);
    await expectNoLeftovers(kind, store);
  });

  test("while an object is written, readers see the old one", async () => {
    async function* body() {
      yield pattern(9 * MiB);
      expect((await read(store, "first.txt")).toString()).toBe("first");
      expect(await keysOf(store)).toEqual(["first.txt"]);
      yield pattern(1000);
    }
    await store.write("first.txt", body());
    expect((await store.stat("first.txt"))?.bytes).toBe(9 * MiB + 1000);
  });

  test("an aborted write leaves the old object, an aborted read ends; both with the signal's reason", async () => {
    const reason = new Error("enough");
    const writing = new AbortController();
    async function* endless() {
      for (let sent = 0; ; sent++) {
        if (sent === 20) writing.abort(reason);
        yield pattern(MiB);
      }
    }
    await expect(store.write("first.txt", endless(), writing.signal)).rejects.toBe(reason);
    await expect(store.write("first.txt", pattern(10), AbortSignal.abort(reason))).rejects.toBe(reason);
    expect((await read(store, "first.txt")).toString()).toBe("first");
    await expectNoLeftovers(kind, store);

    await store.write("large", pattern(10 * MiB));
    const reading = new AbortController();
    let got = 0;
    const broken = async () => {
      for await (const chunk of store.read("large", {}, reading.signal)) {
        got += chunk.length;
        reading.abort(reason);
      }
    };
    await expect(broken()).rejects.toBe(reason);
    expect(got).toBeLessThan(10 * MiB);
    await expect(read(store, "large", {}, AbortSignal.abort(reason))).rejects.toBe(reason);
  });

  test("a reader that leaves early is no error, and the store works on", async () => {
    await store.write("large", pattern(10 * MiB));
    for await (const _ of store.read("large")) break;
    expect((await read(store, "first.txt")).toString()).toBe("first");
  });

  test.each(["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\0b"])("%j is no key", async (key) => {
    for (const work of [store.write(key, pattern(1)), read(store, key), store.stat(key), store.remove(key)])
      expect(await refusal(work)).toBe(`${store.location}: ${JSON.stringify(key)} is not a path inside it`);
  });

  test("a listing or a look that is aborted ends with the signal's reason", async () => {
    const reason = new Error("enough");
    const aborted = AbortSignal.abort(reason);
    await expect(store.list("", aborted)).rejects.toBe(reason);
    await expect(store.stat("first.txt", aborted)).rejects.toBe(reason);
  });

  test("what is missing is undefined to stat, and named when it is read", async () => {
    expect(await store.stat("nothing")).toBeUndefined();
    expect(await store.stat("first.txt/under")).toBeUndefined();
    expect(await refusal(read(store, "nothing"))).toMatch(
      new RegExp(`^${store.location}/nothing: (there is )?no such (object|file or directory)$`),
    );
  });
});

async function expectNoLeftovers(kind: string, { location }: ObjectStore): Promise<void> {
  if (kind === "a directory") expect(readdirSync(location)).toEqual(["first.txt"]);
  else
    expect(s3.log.filter(({ method, path }) => method === "POST" && /[?&]uploads/.test(path)).length).toBe(
      s3.log.filter(({ method, path }) => method === "DELETE" && /uploadId=/.test(path)).length,
    );
}

describe("a directory", () => {
  test("follows links to files, and skips dangling ones and what is being written", async () => {
    const root = join(scratch, "links");
    mkdirSync(root);
    writeFileSync(join(scratch, "blob"), "content");
    symlinkSync("../blob", join(root, "model.safetensors"));
    symlinkSync("../gone", join(root, "dangling"));
    writeFileSync(join(root, ".vispec-0123456789abcdef.tmp"), "half");
    const store = openSource(root);
    expect(await store.list()).toMatchObject([{ key: "model.safetensors", bytes: 7 }]);
    expect((await read(store, "model.safetensors")).toString()).toBe("content");
  });

  test("follows links to folders, but not in circles, and lets nothing that is broken fail the listing", async () => {
    const root = join(scratch, "circles");
    mkdirSync(join(root, "versions/1"), { recursive: true });
    writeFileSync(join(root, "versions/1/model.safetensors"), "content");
    symlinkSync("versions/1", join(root, "draft"));
    symlinkSync("../..", join(root, "versions/1/up"));
    symlinkSync(".", join(root, "self"));
    symlinkSync("loop", join(root, "loop"));
    symlinkSync("loop/x", join(root, "versions/through-the-loop"));
    const store = openSource(root);
    expect(await keysOf(store)).toEqual(["draft/model.safetensors", "versions/1/model.safetensors"]);
    expect(await keysOf(store, "draft/")).toEqual(["draft/model.safetensors"]);
    expect(await keysOf(store, "dra")).toEqual(["draft/model.safetensors"]);
  });

  test("a place that does not exist, or is no directory, is an error to list", async () => {
    const gone = join(scratch, "gone");
    expect(await refusal(openSource(gone).list())).toBe(`${gone}: no such file or directory`);
    writeFileSync(join(scratch, "file"), "");
    expect(await refusal(openSource(join(scratch, "file")).list())).toContain("not a directory");
    expect(await refusal(openStore(join(scratch, "file")).write("a", pattern(1)))).toContain(join(scratch, "file/a: "));
  });

  test("a file that is cut while it is read is an error", async () => {
    const store = openStore(join(scratch, "cut"));
    await store.write("a", pattern(4 * MiB));
    const work = async () => {
      for await (const _ of store.read("a")) truncateSync(join(scratch, "cut/a"), MiB);
    };
    expect(await refusal(work())).toContain(`not the ${4 * MiB}`);
  });
});

describe("S3", () => {
  const place = () => `s3://${s3.bucket}/only-${places++}`;

  test("large bodies go up in parts, small ones at once; both with SHA-256, and stat tells that of a whole one", async () => {
    const store = openStore(place());
    await store.write("small", pattern(1000));
    expect(s3.log.map(({ method }) => method)).toEqual(["PUT"]);
    expect(await store.stat("small")).toMatchObject({ sha256: sha256(pattern(1000)) });
    s3.log.length = 0;
    await store.write("large", pattern(17 * MiB));
    const parts = s3.log.filter(({ path }) => /partNumber=\d/.test(path));
    expect(parts.map(({ method }) => method)).toEqual(["PUT", "PUT", "PUT"]);
    expect(await store.stat("large")).toEqual({
      key: "large",
      bytes: 17 * MiB,
      version: expect.stringMatching(/-3"$/),
    });
  });

  test("reads go on from the byte where the connection broke, again and again", async () => {
    const store = openStore(place());
    const body = pattern(1_000_000);
    await store.write("a", body);
    s3.log.length = 0;
    s3.cutAfter(150_000);
    same(await read(store, "a"), body);
    // More breaks than would be put up with if no byte came between them.
    const starts = [150, 300, 450, 600, 750, 900].map((start) => `bytes=${start}000-999999`);
    expect(s3.log.map(({ range }) => range)).toEqual([undefined, ...starts]);
    same(await read(store, "a", { from: 10, to: 200_000 }), body.subarray(10, 200_000));
  });

  test("a connection that never brings a byte is given up, and an abort ends the waiting", async () => {
    const store = openStore(place());
    await store.write("a", pattern(1000));
    s3.cutAfter(0);
    s3.log.length = 0;
    const abort = new AbortController();
    const reason = new Error("enough");
    const aborted = expect(read(store, "a", {}, abort.signal)).rejects.toBe(reason);
    while (s3.log.length < 2) await soon();
    abort.abort(reason);
    await aborted;
    s3.log.length = 0;
    expect(await refusal(read(store, "a"))).toContain("/a cannot be read, tried 5 times: ");
    expect(s3.log).toHaveLength(5);
  });

  test("an object that changes between two pieces is an error, not a mixture", async () => {
    const store = openStore(place());
    await store.write("a", pattern(100_000));
    s3.cutAfter(40_000);
    const work = async () => {
      for await (const _ of store.read("a")) await store.write("a", pattern(100_000, 2));
    };
    expect(await refusal(work())).toBe(`${store.location}/a: it changed while it was read`);
  });

  test("bytes that do not have the object's checksum are an error", async () => {
    const store = openStore(place());
    const headers = {
      etag: '"x"',
      "content-length": "5",
      "x-amz-checksum-sha256": Buffer.alloc(32).toString("base64"),
    };
    s3.answerNext(200, headers, "wrong");
    expect(await refusal(read(store, "a"))).toContain("/a: what came does not have the checksum");
  });

  test("a range that is ignored, begins elsewhere or is exceeded is an error", async () => {
    const store = openStore(place());
    await store.write("a", pattern(1000));
    const whole = { etag: '"x"', "content-length": "1000" };
    s3.answerNext(200, whole, "x".repeat(1000));
    expect(await refusal(read(store, "a", { from: 5, to: 10 }))).toContain("/a: the server does not send the range");
    s3.answerNext(206, { ...whole, "content-range": "bytes 0-999/1000" }, "x".repeat(1000));
    expect(await refusal(read(store, "a", { from: 5, to: 10 }))).toContain("/a: the server does not send the range");
    s3.answerNext(206, { ...whole, "content-range": "bytes 5-9/1000" }, "x".repeat(1000));
    expect(await refusal(read(store, "a", { from: 5, to: 10 }))).toContain("/a: more comes than the bytes that were");
  });

  test("a listing and a look that get no answer end with the signal's reason", async () => {
    const reason = new Error("enough");
    let abort = new AbortController();
    const { url, close } = await listen(() => abort.abort(reason));
    vi.stubEnv("AWS_ENDPOINT_URL", url);
    await expect(openSource("s3://b/x").list("", abort.signal)).rejects.toBe(reason);
    abort = new AbortController();
    await expect(openSource("s3://b/x").stat("a", abort.signal)).rejects.toBe(reason);
    await close();
  });

  test("a busy server is asked again", async () => {
    const store = openStore(place());
    for (let i = 0; i < 3; i++) s3.answerNext(503);
    await store.write("a", pattern(1000));
    for (let i = 0; i < 3; i++) s3.answerNext(500);
    same(await read(store, "a"), pattern(1000));
  });

  test("lists more than one page, without the objects that stand for folders", async () => {
    const prefix = `pages-${places++}`;
    const put = (key: string) => fetch(`${s3.endpoint}/${s3.bucket}/${prefix}/${key}`, { method: "PUT", body: "x" });
    await Promise.all(Array.from({ length: 1003 }, (_, i) => put(`${1000 + i}`)));
    await put("");
    await put("folder/");
    expect(await openSource(`s3://${s3.bucket}/${prefix}/`).list()).toHaveLength(1003);
  });

  test("a write that S3 refuses half-way removes its parts and says why", async () => {
    const store = openStore(place());
    async function* body() {
      yield pattern(17 * MiB);
      while (!s3.log.some(({ path }) => path.includes("partNumber="))) await soon();
      s3.answerNext(403, {}, "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>");
      yield pattern(20 * MiB, 3);
    }
    expect(await refusal(store.write("a", body()))).toBe(`${store.location}/a: access is denied`);
    await expectNoLeftovers("S3", store);
    expect(await store.list()).toEqual([]);
  });

  test("with an endpoint the bucket stands in the path", async () => {
    vi.stubEnv("AWS_ENDPOINT_URL", s3.endpoint.replace("127.0.0.1", "localhost"));
    await openStore(`s3://${s3.bucket}/styles`).write("a", pattern(10));
    expect(s3.log[0].path).toMatch(new RegExp(`^/${s3.bucket}/styles/a\\b`));
  });

  const xml = (code: string) => `<Error><Code>${code}</Code><Message>The message</Message></Error>`;
  test.each([
    [403, "AccessDenied", "access is denied"],
    [403, "InvalidAccessKeyId", "the credentials are wrong"],
    [403, "SignatureDoesNotMatch", "the credentials are wrong"],
    [301, "PermanentRedirect", "the bucket is in another region: set AWS_REGION"],
    [405, "MethodNotAllowed", "MethodNotAllowed: The message"],
  ])("%i %s is said plainly", async (status, code, reason) => {
    s3.answerNext(status, {}, xml(code));
    expect(await refusal(openSource(place()).list())).toMatch(new RegExp(`^s3://.*: ${reason}$`));
  });

  test("a missing bucket, denied access without a body, no credentials, no region and a dead endpoint are named", async () => {
    expect(await refusal(openSource("s3://no-bucket/x").list())).toBe("s3://no-bucket/x/: there is no such bucket");
    expect(await refusal(read(openSource("s3://no-bucket"), "a"))).toBe("s3://no-bucket/a: there is no such bucket");
    expect(await refusal(openStore("s3://no-bucket").write("a", pattern(1)))).toContain("there is no such bucket");
    s3.answerNext(403);
    expect(await refusal(openSource("s3://no-bucket").stat("a"))).toBe("s3://no-bucket/a: access is denied");
    vi.stubEnv("AWS_REGION", undefined);
    expect(await refusal(openSource("s3://b").list())).toContain("there is no region: set AWS_REGION");
    useEnv({ AWS_REGION: "eu-central-1", AWS_ENDPOINT_URL: "http://127.0.0.1:9" });
    const dead = await refusal(openSource("s3://b").list());
    expect(dead).toMatch(/^s3:\/\/b\/: the endpoint cannot be reached: .*127\.0\.0\.1:9/);
    vi.stubEnv("AWS_ACCESS_KEY_ID", undefined);
    expect(await refusal(openSource("s3://b").list())).toContain("there are no credentials: set AWS_ACCESS_KEY_ID");
  });
});

describe("the hub", () => {
  const TOKEN = "hf_secret";
  const folder = join(scratch, "repo");
  const weights = pattern(700_000);
  const readme = Buffer.from("# A model\n".repeat(2000));
  let hub: Awaited<ReturnType<typeof startHub>>;
  let gated: typeof hub;

  beforeAll(async () => {
    mkdirSync(join(folder, "draft 1"), { recursive: true });
    writeFileSync(join(folder, "README.md"), readme);
    writeFileSync(join(folder, "config.json"), "{}");
    writeFileSync(join(folder, "empty"), "");
    writeFileSync(join(folder, "model.safetensors"), weights);
    writeFileSync(join(folder, "draft 1/é+#?%41.safetensors"), weights.subarray(0, 5000));
    hub = await startHub({ "org/model-1.5": folder });
    gated = await startHub({ "org/model": folder }, { token: TOKEN });
  });
  beforeEach(() => {
    useEnv({ HF_ENDPOINT: hub.url, HF_TOKEN: "", HUGGING_FACE_HUB_TOKEN: "" });
    hub.cutAfter(null);
    hub.log.length = gated.log.length = 0;
  });
  afterAll(async () => {
    await hub.close();
    await gated.close();
  });

  test("lists a repository with sizes and, of LFS files, SHA-256; files are read from its CDN or itself", async () => {
    const store = openSource("org/model-1.5");
    const list = await store.list();
    expect(list.map(({ key, bytes, sha256 }) => [key, bytes, sha256])).toEqual([
      ["README.md", readme.length, undefined],
      ["config.json", 2, undefined],
      ["draft 1/é+#?%41.safetensors", 5000, sha256(weights.subarray(0, 5000))],
      ["empty", 0, undefined],
      ["model.safetensors", weights.length, sha256(weights)],
    ]);
    expect(await keysOf(store, "draft 1/")).toEqual(["draft 1/é+#?%41.safetensors"]);
    expect(await store.stat("config.json")).toEqual(list[1]);
    expect(await store.stat("none")).toBeUndefined();
    same(await read(store, "README.md"), readme);
    same(await read(store, "model.safetensors"), weights);
    same(await read(store, "draft 1/é+#?%41.safetensors", { from: 10, to: 4000 }), weights.subarray(10, 4000));
    same(await read(store, "empty"), Buffer.alloc(0));
    expect(hub.log.some(({ path }) => path.startsWith("/lfs/"))).toBe(true);
    expect(hub.log.every(({ encoding }) => /^identity(, identity)?$/.test(encoding ?? ""))).toBe(true);
    expect(await refusal(read(store, "none"))).toBe("org/model-1.5: none: there is no such file");
    expect(await refusal(read(store, "config.json", { to: 3 }))).toContain("has 2 bytes, not the 3");
    expect(await refusal(read(store, "config.json", { from: 2 }))).toContain("config.json: it ends before");
  });

  test("all is read of one commit, asked for once", async () => {
    const store = openSource("org/model-1.5@main");
    await store.list();
    await read(store, "config.json");
    await read(store, "README.md", { from: 5 });
    const [first, ...rest] = hub.log.map(({ path }) => path);
    expect(first).toBe("/api/models/org/model-1.5/revision/main?blobs=true");
    expect(rest).toHaveLength(2);
    const sha = /^\/org\/model-1\.5\/resolve\/([0-9a-f]{40})\/config\.json$/.exec(rest[0])?.[1];
    expect(sha).toBeDefined();
    expect(rest[1]).toBe(`/org/model-1.5/resolve/${sha}/README.md`);
    same(await read(openSource(`org/model-1.5@${sha}`), "config.json"), Buffer.from("{}"));
    const branch = "refs/pr/1";
    expect(await refusal(openSource(`org/model-1.5@${branch}`).list())).toBe(
      `org/model-1.5@${branch}: revision ${branch}: there is no such revision`,
    );
  });

  test("reads go on from the byte where the connection broke, through the redirect again", async () => {
    const store = openSource("org/model-1.5");
    hub.cutAfter(250_000);
    same(await read(store, "model.safetensors"), weights);
    const ranges = hub.log.filter(({ path }) => path.startsWith("/lfs/")).map(({ range }) => range);
    expect(ranges).toEqual([undefined, "bytes=250000-699999", "bytes=500000-699999"]);
    same(await read(store, "model.safetensors", { from: 1, to: 600_000 }), weights.subarray(1, 600_000));
  });

  test("busy and failing servers are asked again, after as long as they want", async () => {
    hub.answerNext(503);
    hub.answerNext(429, { "retry-after": "0" });
    hub.answerNext(200, { "content-length": "9", connection: "close" }, '{"sha"');
    const store = openSource("org/model-1.5");
    expect(await store.list()).toHaveLength(5);
    hub.answerNext(502);
    same(await read(store, "config.json"), Buffer.from("{}"));
    for (let i = 0; i < 5; i++) hub.answerNext(500, { "retry-after": "0" });
    expect(await refusal(read(store, "config.json"))).toBe(
      "org/model-1.5: config.json cannot be read, tried 5 times: the hub answers 500",
    );
    const waits = new AbortController();
    const asked = hub.log.length;
    hub.answerNext(429, { "retry-after": "60" });
    const waiting = expect(read(store, "config.json", {}, waits.signal)).rejects.toThrow("enough");
    while (hub.log.length === asked) await soon();
    await new Promise((resolve) => setTimeout(resolve, 400));
    expect(hub.log).toHaveLength(asked + 1);
    waits.abort(new Error("enough"));
    await waiting;
  });

  test("a body that goes on beyond what was asked for is refused at once", async () => {
    const store = openSource("org/model-1.5");
    await store.list();
    hub.answerNext(206, { "content-range": "bytes 1-1/2" }, "{}".repeat(1000));
    expect(await refusal(read(store, "config.json", { from: 1, to: 2 }))).toContain("config.json: more comes than");
    hub.answerNext(200, {}, "{}".repeat(1000));
    expect(await refusal(read(store, "config.json"))).toContain("config.json: more comes than");
    expect(hub.log).toHaveLength(3);
  });

  test("the token goes to the endpoint and not to the CDN", async () => {
    useEnv({ HF_ENDPOINT: `${gated.url}/`, HUGGING_FACE_HUB_TOKEN: TOKEN });
    same(await read(openSource("org/model"), "model.safetensors"), weights);
    expect(gated.log.map(({ path, authorization }) => [path.split("/")[1], authorization])).toEqual([
      ["api", `Bearer ${TOKEN}`],
      ["org", `Bearer ${TOKEN}`],
      ["lfs", undefined],
    ]);
  });

  test("what the hub refuses is said plainly, and the token is not", async () => {
    vi.stubEnv("HF_ENDPOINT", gated.url);
    const unknown = await refusal(openSource("org/none").list());
    expect(unknown).toContain(
      "org/none: revision main: the hub refuses it (401): there is no such repository, or it is",
    );
    expect(unknown).toContain("private or gated, and set HF_TOKEN");
    expect(await refusal(openSource("org/model").list())).toContain("(401)");
    vi.stubEnv("HF_TOKEN", "hf_another");
    const refused = await refusal(openSource("org/model").list());
    expect(refused).toContain(
      "(403): there is no such repository, or it is private or gated, and HF_TOKEN has no access",
    );
    expect(await refusal(openSource("org/none").list())).toBe("org/none: revision main: there is no such repository");
    expect(refused).not.toContain("hf_another");
  });

  test("servers that cannot be reached, go in circles, or are no hub are named", async () => {
    const store = openSource("org/model-1.5");
    for (let i = 0; i < 6; i++) hub.answerNext(302, { location: "/again" });
    expect(await refusal(store.list())).toBe(`org/model-1.5: ${hub.url} redirects in circles`);
    hub.answerNext(200, {}, "<html>");
    expect(await refusal(store.list())).toBe(`org/model-1.5: ${hub.url} does not answer as the hub does`);
    await store.list();
    for (const [status, headers] of [
      [200, {}],
      [206, { "content-range": "bytes 0-1/2" }],
    ] as const) {
      // biome-ignore format: one line
      hub.answerNext(status, headers, "{}");
      expect(await refusal(read(store, "config.json", { from: 1 }))).toContain("does not send the range");
    }
    for (const location of ["file:///etc/passwd", "http://["]) {
      hub.log.length = 0;
      hub.answerNext(302, { location });
      const said = await refusal(openSource("org/model-1.5").list());
      expect(said).toBe(`org/model-1.5: ${hub.url} redirects to what is no http address`);
      expect(hub.log).toHaveLength(1);
    }
    for (const size of [-5, 1.5, undefined]) {
      hub.answerNext(200, {}, JSON.stringify({ sha: "0", siblings: [{ rfilename: "a", size }] }));
      expect(await refusal(openSource("org/model-1.5").list())).toContain("does not answer as the hub does");
    }
    const { url, close } = await listen(() => {});
    await close();
    vi.stubEnv("HF_ENDPOINT", url);
    expect(await refusal(openSource("org/model-1.5").list())).toBe(
      `org/model-1.5: revision main cannot be read, tried 5 times: connect ECONNREFUSED ${new URL(url).host}`,
    );
  });
});

describe("a location", () => {
  const kindOf = (location: string) => openSource(location).constructor.name;

  test("names a directory, S3 or a hub repository", () => {
    expect(["./org/name", "/org/name", "models/tiny-qwen2.5-vl"].map(kindOf)).toEqual(Array(3).fill("DirectoryStore"));
    expect(["s3://bucket", "s3://bucket/a/b"].map(kindOf)).toEqual(Array(2).fill("S3Store"));
    expect(["org/name", "llava-hf/llava-1.5-7b-hf@refs/pr/1"].map(kindOf)).toEqual(Array(2).fill("HubStore"));
    expect(openStore("org/name").constructor.name).toBe("DirectoryStore");
  });

  test.each(["", "name", "a/b/c", "https://huggingface.co/org/name", "s3://", "s3:///key"])(
    "%j names none",
    (location) => {
      expect(() => openSource(location)).toThrow(StoreError);
    },
  );

  test.each(["", "https://bucket", "s3://"])("%j is no place to write to", (location) => {
    expect(() => openStore(location)).toThrow(StoreError);
  });
});
