/** `npm start`: what it prints can be pasted, and Ctrl-C leaves nothing running. */
import { once } from "node:events";
import { connect } from "node:net";
import { afterEach, expect, test } from "vitest";
import { Checkpoint } from "./support/checkpoint.ts";
import { type Running, start, startVispec } from "./support/cli.ts";
import { cases } from "./support/goldens.ts";

const running: Running[] = [];
// After a test that failed: the whole group, for npm alone would leave the others running.
afterEach(() => {
  for (const { child, code } of running.splice(0)) if (code === null) process.kill(-child.pid!, "SIGKILL");
});

const refused = (url: string) =>
  expect(once(connect(Number(new URL(url).port), "127.0.0.1"), "connect")).rejects.toThrow("ECONNREFUSED");

/** Ctrl-C: the signal goes to the whole process group. */
const interrupt = ({ child }: Running) => process.kill(-child.pid!, "SIGINT");

/** The text of a stream's chunks. */
function streamed(events: string): string {
  const lines = events.split("\n\n").filter((line) => line !== "");
  expect(lines.pop()).toBe("data: [DONE]");
  const chunks = lines.map((line) => JSON.parse(line.slice("data: ".length)));
  return chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");
}

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
  expect([0, 130]).toContain(ended.code);
  expect(ended.stderr).toBe("");
  await refused(url);
});

test.each(["SIGINT", "SIGTERM"] as const)("serve ends on %s, in the middle of a stream", async (signal) => {
  using checkpoint = new Checkpoint().endless();
  const server = startVispec(["serve", "--port", "0", "--model", checkpoint.folder]);
  running.push(server);
  const [, url] = await server.says(/is served at (http:\S+)\n/);
  const body = JSON.stringify({
    stream: true,
    temperature: 0,
    messages: [{ role: "user", content: "Tell me a story." }],
  });
  const response = await fetch(`${url}/v1/chat/completions`, { method: "POST", body });
  expect(response.status).toBe(200);
  process.kill(-server.child.pid!, signal);
  await response.text().catch(() => "");
  expect(await server.gone).toMatchObject({ code: 0, stderr: "" });
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
