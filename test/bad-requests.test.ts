/** Ten thousand bad requests against edge, GPU worker and engine, and some that are not even HTTP. */
import { Agent, request as httpRequest, type IncomingMessage } from "node:http";
import { connect } from "node:net";
import { afterAll, beforeAll, expect, test } from "vitest";
import { z } from "zod";
import { SIGNATURE_HEADER, Signer } from "../shared/sign.ts";
import { type BadRequest, badRequest } from "./support/bad-requests.ts";
import { cases, withImages } from "./support/goldens.ts";
import { type Stack, startStack } from "./support/stack.ts";

const SEED = Number(process.env.SEED ?? 1);
const COUNT = Number(process.env.COUNT ?? 2500);
/** Milliseconds that no answer takes unless something hangs. */
const HANGS = 60_000;

let stack: Stack;
let signer: Signer;
beforeAll(async () => {
  stack = await startStack();
  signer = new Signer(stack.secret);
});
afterAll(() => stack?.close());

const agent = new Agent({ keepAlive: true, maxSockets: 16 });

interface Answer {
  status: number;
  body: string;
}

async function send(bad: Pick<BadRequest, "method" | "path" | "headers" | "body" | "worker">): Promise<Answer> {
  const { method, path, body } = bad;
  const headers: Record<string, string> = { ...bad.headers, "content-length": String(body.length) };
  if (bad.worker === "signed")
    headers[SIGNATURE_HEADER] = await signer.sign(method, path, method === "PUT" ? "" : new TextDecoder().decode(body));
  const url = new URL(bad.worker ? stack.workerUrl : stack.url);
  const response = await new Promise<IncomingMessage>((resolve, reject) => {
    const signal = AbortSignal.timeout(HANGS);
    const options = { agent, method, path, headers, signal, host: url.hostname, port: url.port };
    httpRequest(options, resolve).on("error", reject).end(body);
  });
  let text = "";
  for await (const chunk of response.setEncoding("utf8")) text += chunk;
  return { status: response.statusCode!, body: text };
}

/** Errors about the body as a whole, which name nothing in it. */
const WHOLE_BODY = ["too_many_values", "body_too_large"];

const Problem = z.strictObject({
  error: z.strictObject({
    message: z.string().min(1).max(1000),
    type: z.enum(["invalid_request_error", "not_found_error", "authentication_error", "rate_limit_error"]),
    param: z.string().min(1).nullable(),
    code: z.string().min(1).nullable(),
  }),
});

/** What is wrong with an answer; null if nothing is. */
function complaint({ method, expected }: BadRequest, { status, body }: Answer): string | null {
  if (expected.mayPass && (status === 200 || status === 204)) return null;
  if (status < 400 || status >= 500 || status !== (expected.status ?? status)) return `status ${status}`;
  if (method === "HEAD") return null;
  const parsed = Problem.safeParse(JSON.parse(body));
  if (!parsed.success) return `not OpenAI's error: ${body.slice(0, 300)}`;
  const { param, message, code } = parsed.data.error;
  if (/\bat .+:\d+:\d+|node_modules|\/work\/|file:\/\//.test(message.replaceAll("file:///etc/passwd", "")))
    return `tells internals: ${message}`;
  if (expected.param === null || WHOLE_BODY.includes(code!)) return null;
  if (param === null || !param.startsWith(expected.param ?? "")) return `names ${param}, not ${expected.param}`;
  return null;
}

async function ask(id: string): Promise<string> {
  const golden = cases.find((c) => c.id === id)!;
  const body = Buffer.from(JSON.stringify({ messages: withImages(golden), temperature: 0 }));
  const answer = await send({ method: "POST", path: "/v1/chat/completions", headers: {}, body });
  return JSON.parse(answer.body).choices[0].message.content;
}

async function expectUnharmed(pid: number): Promise<void> {
  expect([stack.engine.pid, stack.engine.restarts, stack.engine.ready]).toEqual([pid, 0, true]);
  for (const id of ["00-describe", "18-story"]) expect(await ask(id)).toBe(cases.find((c) => c.id === id)!.output_text);
}

test(`${COUNT} bad requests are refused with what is wrong with them, and harm nothing`, async () => {
  const { pid } = stack.engine;
  const failures: string[] = [];
  let [next, refused] = [0, 0];
  const sender = async () => {
    while (next < COUNT && failures.length < 20) {
      const i = next++;
      const bad = badRequest(SEED, i);
      const answer = await send(bad).catch((error): Answer => ({ status: 0, body: String(error) }));
      if (answer.status >= 400) refused++;
      const wrong = answer.status === 0 ? answer.body : complaint(bad, answer);
      if (wrong === null) continue;
      const { kind, method, path, worker = "edge", expected } = bad;
      const what = `${kind} ${worker} ${method} ${path.slice(0, 80)} ${JSON.stringify(expected)}`;
      failures.push(`SEED=${SEED} #${i} ${wrong} | ${answer.body.slice(0, 300)} | ${what} | ${shortened(bad.body)}`);
    }
  };
  await Promise.all(Array.from({ length: 16 }, sender));
  expect(failures).toEqual([]);
  expect(refused / COUNT).toBeGreaterThan(0.85);
  await expectUnharmed(pid);
}, 300_000);

const shortened = (body: Buffer) => (body.length < 400 ? body.toString() : `${body.toString("utf8", 0, 150)} … ${body.toString("utf8", body.length - 150)}`); // biome-ignore format: one line

/** Sends text over a bare connection, ends it, and gives what came back until the other side ended it too. */
function talk(text: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect(Number(new URL(stack.url).port), "127.0.0.1").setEncoding("latin1");
    let answer = "";
    socket.on("data", (data) => (answer += data));
    socket.on("error", () => resolve(answer)); // a reset
    socket.on("close", () => resolve(answer));
    socket.setTimeout(HANGS, () => reject(new Error("no answer, and the connection stays open")));
    socket.end(text, "latin1");
  });
}

const POST = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n";
const JSON_BODY = '{"messages":[{"role":"user","content":"Hi"}],"max_tokens":1}';
const notHttp: [string, string][] = [
  ["nothing", ""],
  ["a TLS greeting", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
  ["HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
  ["another version", "GET / HTTP/9.9\r\n\r\n"],
  ["an unknown method", POST.replace("POST", "BREW")],
  ["line feeds alone", "\n".repeat(10_000)],
  ["no end of the headers", POST],
  ["a header without a colon", `${POST}nonsense\r\n\r\n`],
  ["a NUL in a header", `${POST}x: a\0b\r\ncontent-length: 2\r\n\r\n{}`],
  ["a header on two lines", `${POST}x: a\r\n b\r\ncontent-length: 2\r\n\r\n{}`],
  ["a header of a megabyte", `${POST}x: ${"a".repeat(2 ** 20)}\r\ncontent-length: 2\r\n\r\n{}`],
  ["ten thousand headers", `${POST}${"x: a\r\n".repeat(10_000)}content-length: 2\r\n\r\n{}`],
  ["a path of a megabyte", `GET /${"a".repeat(2 ** 20)} HTTP/1.1\r\nhost: localhost\r\n\r\n`],
  ["a body shorter than it says", `${POST}content-length: 1000\r\n\r\n${JSON_BODY}`],
  ["a body longer than it says", `${POST}content-length: 5\r\n\r\n${JSON_BODY}`],
  ["a length below zero", `${POST}content-length: -1\r\n\r\n${JSON_BODY}`],
  ["a length that is no number", `${POST}content-length: 1e1\r\n\r\n${JSON_BODY}`],
  ["a length beyond all", `${POST}content-length: 99999999999999999999\r\n\r\n${JSON_BODY}`],
  ["two lengths", `${POST}content-length: 2\r\ncontent-length: 60\r\n\r\n${JSON_BODY}`],
  ["a length and chunks", `${POST}content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n`],
  ["chunks of no size", `${POST}transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n`],
  ["a chunk larger than all", `${POST}transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n{}\r\n`],
  ["chunks without an end", `${POST}transfer-encoding: chunked\r\n\r\n5\r\n{"mes\r\n`],
  ["another encoding", `${POST}transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n`],
  [
    "two requests at once, the first bad",
    `${POST}content-length: 1\r\n\r\n{${POST}content-length: 60\r\n\r\n${JSON_BODY}`,
  ],
];

// What is no HTTP never reaches the Worker: workerd's parser answers (in its own words, some with status 500) or hangs up.
test.each(notHttp)("%s gets an answer or a closed connection, and harms nothing", async (_what, text) => {
  const { pid } = stack.engine;
  expect(await talk(text)).not.toContain('"server_error"');
  expect((await send(badRequest(SEED, 0))).status).toBe(400);
  expect([stack.engine.pid, stack.engine.restarts]).toEqual([pid, 0]);
});

test("bodies beyond the limit are refused, with and without a length", async () => {
  const { pid } = stack.engine;
  const large = Buffer.alloc(21 * 2 ** 20, " ");
  for (const path of ["/v1/chat/completions", "/v1/completions"]) {
    const { status, body } = await send({ method: "POST", path, headers: {}, body: large });
    expect([status, JSON.parse(body).error.code]).toEqual([413, "body_too_large"]);
    const chunked = await fetch(stack.url + path, { method: "POST", body: new Blob([large]).stream(), duplex: "half" } as RequestInit); // biome-ignore format: one line
    expect([chunked.status, ((await chunked.json()) as { error: { code: string } }).error.code]).toEqual([413, "body_too_large"]); // biome-ignore format: one line
  }
  await expectUnharmed(pid);
});
