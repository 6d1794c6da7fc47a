/** `npm start` and `vispec serve`: what is printed can be pasted, signals end them in order and leave nothing running. */
import { once } from "node:events";
import { connect } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, expect, test } from "vitest";
import { Checkpoint } from "./support/checkpoint.ts";
import { type Running, start, startVispec } from "./support/cli.ts";
import { cases } from "./support/goldens.ts";

/** In npm run test:long. */
const long = test.runIf(process.env.LONG);
const running: Running[] = [];
// After a test that failed: the whole group, for npm alone would leave the others running.
afterEach(() => {
  for (const { child, code } of running.splice(0)) if (code === null) process.kill(-child.pid!, "SIGKILL");
});

async function until(holds: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await holds())) await sleep(5);
}

/** Waits until nobody listens there: what ends by itself when its parent died may take a moment. */
const refused = (url: string) =>
  until(async () => {
    const socket = connect(Number(new URL(url).port), "127.0.0.1");
    socket.on("error", () => {});
    const connected = await once(socket, "connect").catch((error) => error.code !== "ECONNREFUSED");
    socket.destroy();
    return connected === false;
  });

/** Ctrl-C: the signal goes to the whole process group. */
const interrupt = ({ child }: Running) => process.kill(-child.pid!, "SIGINT");

/** The text of a stream's chunks. */
function streamed(events: string): string {
  const lines = events.split("\n\n").filter((line) => line !== "");
  expect(lines.pop()).toBe("data: [DONE]");
  const chunks = lines.map((line) => JSON.parse(line.slice("data: ".length)));
  return chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
}

/** The log's lines; all of standard error must be such. */
const logOf = ({ stderr }: Running): Record<string, unknown>[] => stderr.trim().split("\n").map((line) => JSON.parse(line)); // biome-ignore format: one line

/** The URL of the GPU worker behind `npm start`. */
async function workerOf(running: Running): Promise<string> {
  const url = () => /"the GPU worker listens","url":"([^"]+)"/.exec(running.stderr)?.[1];
  await until(() => url() !== undefined);
  return url()!;
}

const tell = (url: string, change: object = {}) => {
  const body = { stream: true, temperature: 0, ...change, messages: [{ role: "user", content: "Tell me a story." }] }; // biome-ignore format: one line
  const headers = { "content-type": "application/json" };
  return fetch(`${url}/v1/chat/completions`, { method: "POST", headers, body: JSON.stringify(body) });
};

test("npm start prints a curl command that answers as pasted, and ends on Ctrl-C with all its processes", async () => {
  const npm = start("npm", ["start"], { PORT: "0" });
  running.push(npm);
  const [, url, curl] = await npm.says(/answers at (http:\S+)\. [^\n]*\n\n(curl .*)\n\n/);
  const pasted = start("bash", ["-c", curl]);
  const { code, stdout } = await pasted.gone;
  expect(code).toBe(0);
  expect(streamed(stdout)).toBe(cases.find(({ id }) => id === "00-describe")!.output_text);

  interrupt(npm);
  const ended = await npm.gone; // all that hold its output: npm, both Nodes, the engine, workerd
  expect(ended.code).toBe(130);
  const lines = logOf(npm).filter(({ msg }) => msg === "request");
  expect(lines).toMatchObject([{ level: "info", id: /"id":"([^"]+)"/.exec(stdout)![1], status: 200 }]);
  await refused(url);
});

long("SIGTERM lets the ten streams of npm start end whole, refuses new requests, and ends everything", async () => {
  using checkpoint = new Checkpoint().endless();
  const npm = start("npm", ["start", "--", "--concurrency", "1", "--model", checkpoint.folder], { PORT: "0" });
  running.push(npm);
  const [, url] = await npm.says(/answers at (http:\S+)\./);
  const worker = await workerOf(npm);
  const health = async () => (await fetch(`${worker}/health`)).json() as Promise<Record<string, unknown>>;
  const streams = Array.from({ length: 9 }, () => tell(url, { max_tokens: 400 }));
  // One that is not read before the worker has sent it all; it is too large for the sockets' buffers.
  const slow = tell(url, { max_tokens: 2500, logprobs: true, top_logprobs: 20 });
  await until(async () => (await health()).waiting === 9);
  process.kill(-npm.child.pid!, "SIGTERM"); // npm and node24.mjs pass it on, so some get it three times
  await until(async () => (await health()).status === "draining");
  const late = await tell(url);
  expect([late.status, late.headers.get("retry-after")]).toEqual([503, "1"]);
  expect((await fetch(`${url}/ready`)).status).toBe(503);
  const texts = await Promise.all(streams.map(async (stream) => (await stream).text()));
  await until(async () => (await health()).running === 0);
  texts.push(await (await slow).text());
  for (const text of texts) {
    expect(text).toMatch(/"finish_reason":"length"[^\n]*\n\ndata: \[DONE\]\n\n$/);
    expect(streamed(text)).toContain(streamed(texts[0]));
  }
  expect(await npm.gone).toMatchObject({ code: 0 });
  await refused(url);
});

test.each([
  ["SIGINT", 130],
  ["SIGTERM, and --drain is over,", 0],
  ["SIGTERM, then SIGINT,", 130],
  ["SIGTERM twice", 130],
] as const)("serve ends on %s in the middle of a stream", async (signals, code) => {
  using checkpoint = new Checkpoint().endless();
  const drain = code === 0 ? "1" : "60";
  const server = startVispec(["serve", "--port", "0", "--drain", drain, "--model", checkpoint.folder]);
  running.push(server);
  const [, url] = await server.says(/is served at (http:\S+)\n/);
  const response = await tell(url);
  expect(response.status).toBe(200);
  const send = (signal: NodeJS.Signals) => process.kill(-server.child.pid!, signal);
  send(signals.startsWith("SIGINT") ? "SIGINT" : "SIGTERM");
  if (signals.includes("then")) {
    await until(() => server.stderr.includes("draining"));
    send("SIGINT");
  }
  if (signals.includes("twice")) {
    await sleep(1100); // one that follows at once may be the same, passed on by a parent
    send("SIGTERM");
  }
  await response.text().catch(() => "");
  expect((await server.gone).code).toBe(code);
  await refused(url);
});

test("when the process dies without a chance to say goodbye, engine and edge end all the same", async () => {
  const main = startVispec(["start"], { PORT: "0" });
  running.push(main);
  const [, url] = await main.says(/answers at (http:\S+)\. /);
  main.child.kill("SIGKILL");
  await main.gone;
  await refused(url);
});
