/** The `openai` package as it comes from npm against edge, GPU worker and engine: what its users see is what is tested. */
import { ChildProcess } from "node:child_process";
import OpenAI from "openai";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test, vi } from "vitest";
import type { FromEngine } from "../gpu-worker/engine-process.ts";
import { Checkpoint } from "./support/checkpoint.ts";
import { cases, readGolden, withImages } from "./support/goldens.ts";
import { type Stack, startStack } from "./support/stack.ts";

type Params = OpenAI.ChatCompletionCreateParamsNonStreaming;

let stack: Stack;
let client: OpenAI;
beforeAll(async () => {
  stack = await startStack();
  client = new OpenAI({ baseURL: `${stack.url}/v1`, apiKey: "none", maxRetries: 0 });
});
afterAll(() => stack?.close());

const model = "tiny-qwen2.5-vl";
const golden = (id: string) => cases.find((c) => c.id.startsWith(id))!;
const messagesOf = (id: string) => withImages(golden(id)) as OpenAI.ChatCompletionMessageParam[];
const ask = (id: string, change: Partial<Params> = {}) =>
  client.chat.completions.create({ model, messages: messagesOf(id), temperature: 0, ...change });
const textOf = (answer: OpenAI.ChatCompletion) => answer.choices[0].message.content;

// One image, its size odd, no image, several turns about one image, two images.
const asked = ["00-describe", "06-ocr", "08-json", "21-odd", "18-story", "20-text2", "12-turns2", "14-turns3", "15-compare", "17-describe2"]; // biome-ignore format: one list

describe("an answer", () => {
  test.each(asked)("to %s is the target's own, with its usage", async (id) => {
    const answer = await ask(id);
    expect(textOf(answer)).toBe(golden(id).output_text);
    expect(answer).toMatchObject({ object: "chat.completion", model, choices: [{ finish_reason: "stop" }] });
    const [prompt, output] = [golden(id).input_ids.length, golden(id).output_ids.length];
    const usage = { prompt_tokens: prompt, completion_tokens: output, total_tokens: prompt + output };
    expect(answer.usage).toMatchObject({ ...usage, prompt_tokens_details: { image_tokens: golden(id).image_tokens } });
  });

  test.each(asked)("to %s streams in pieces that join to the same text, usage last", async (id) => {
    const stream = await client.chat.completions.create({
      ...{ model, messages: messagesOf(id), temperature: 0, stream: true },
      stream_options: { include_usage: true },
    } as OpenAI.ChatCompletionCreateParamsStreaming);
    const chunks: OpenAI.ChatCompletionChunk[] = [];
    for await (const chunk of stream) chunks.push(chunk);
    const deltas = chunks.flatMap((chunk) => chunk.choices[0]?.delta.content || []);
    expect(deltas.join("")).toBe(golden(id).output_text);
    expect(deltas.length).toBeGreaterThan(1);
    expect(deltas.length).toBeLessThan(golden(id).output_ids.length); // drafts were accepted, so several tokens a piece
    expect(chunks.map((chunk) => chunk.choices[0]?.finish_reason).filter(Boolean)).toEqual(["stop"]);
    expect(chunks.at(-1)!.usage).toMatchObject({
      ...{ prompt_tokens: golden(id).input_ids.length, completion_tokens: golden(id).output_ids.length },
    });
  });

  test("stops before a stop string and after max_tokens", async () => {
    const text = golden("00").output_text;
    const stopped = await ask("00", { stop: [" Then", "never"] });
    expect(textOf(stopped)).toBe(text.slice(0, text.indexOf(" Then")));
    expect(stopped.choices[0].finish_reason).toBe("stop");
    const limited = await ask("00", { max_tokens: 9 });
    expect(limited).toMatchObject({ choices: [{ finish_reason: "length" }], usage: { completion_tokens: 9 } });
    expect(textOf(limited)!.length).toBeGreaterThan(9);
    expect(text.startsWith(textOf(limited)!)).toBe(true);
  });

  test("has the log-probabilities of the target", async () => {
    const answer = await ask("00", { logprobs: true, top_logprobs: 10, max_tokens: 20 });
    const { content } = answer.choices[0].logprobs!;
    expect(content!.map(({ token }) => token).join("")).toBe(textOf(answer));
    const top = content![0].top_logprobs;
    const logits: [number, number][] = readGolden("cases.json").cases[0].first_top10;
    for (const [i, [, logit]] of logits.entries())
      expect(Math.abs(top[i].logprob - top[0].logprob - (logit - logits[0][1]))).toBeLessThan(4e-3);
    for (const { token, top_logprobs: likely } of content!) {
      expect(likely[0].token).toBe(token); // greedy
      expect(likely.map(({ logprob }) => Math.exp(logprob)).reduce((a, b) => a + b)).toBeLessThan(1 + 1e-5);
    }
  });

  test("of a seed is the same text, whatever else runs", async () => {
    // Seeds whose draws all lie far from a border between two tokens, in relation to float32's rounding.
    const seeds = [1, 3, 4];
    const one = (seed: number) => ask("18", { seed, temperature: 1 }).then(textOf);
    const alone: (string | null)[] = [];
    for (const seed of seeds) alone.push(await one(seed));
    expect(new Set(alone).size).toBe(seeds.length);
    const others = asked.map((id, i) => ask(id, { temperature: i % 2, max_tokens: 30 }));
    expect(await Promise.all(seeds.map(one))).toEqual(alone);
    await Promise.all(others);
  });
});

describe("an endless answer", () => {
  let checkpoint: Checkpoint;
  let endless: Stack;
  let asker: OpenAI;
  beforeEach(async () => {
    checkpoint = new Checkpoint().endless();
    endless = await startStack(checkpoint.folder);
    asker = new OpenAI({ baseURL: `${endless.url}/v1`, apiKey: "none", maxRetries: 0 });
  });
  afterEach(async () => {
    vi.restoreAllMocks();
    await endless?.close();
    checkpoint[Symbol.dispose]();
  });
  const params = () => ({ messages: messagesOf("18"), temperature: 0, model: endless.engine.info.id });

  test("ends in the engine's process when its client leaves, and the next one is answered", async () => {
    const emit = vi.spyOn(ChildProcess.prototype, "emit"); // sees every message of the engine's process
    const messages = () =>
      (emit.mock.calls as unknown[][]).filter(([name]) => name === "message").map(([, m]) => m as FromEngine);
    const stream = await asker.chat.completions.create({ ...params(), stream: true });
    for await (const _chunk of stream) {
      stream.controller.abort();
      break;
    }
    const next = await asker.chat.completions.create({ ...params(), max_tokens: 20 });
    expect(golden("18").output_text).toContain(textOf(next));
    const { call } = messages().find((m) => "step" in m) as { call: number };
    const own = () => messages().filter((m) => "call" in m && m.call === call);
    await vi.waitUntil(() => !("step" in own().at(-1)!), { timeout: 30_000 });
    // The call that was left ended with an error and not with its answer's last step.
    expect(own().some((m) => "step" in m && m.step.finish)).toBe(false);
    expect(own().at(-1)).toHaveProperty("error");
  });

  test("is an error in its stream when the engine's process dies, and later requests get status 503", async () => {
    const emit = vi.spyOn(ChildProcess.prototype, "emit");
    const log = vi.spyOn(console, "error").mockImplementation(() => {});
    const stream = await asker.chat.completions.create({ ...params(), stream: true });
    const index = emit.mock.calls.findIndex(([name]) => (name as string) === "message");
    const read = async () => {
      for await (const _chunk of stream) (emit.mock.contexts[index] as ChildProcess).kill("SIGKILL");
    };
    await expect(read()).rejects.toThrow("The engine has stopped.");
    const later = await asker.chat.completions.create(params()).catch((error) => error);
    expect(later).toBeInstanceOf(OpenAI.InternalServerError);
    expect(later).toMatchObject({ status: 503, code: "engine_stopped" });
    expect(log).toHaveBeenCalledTimes(2);
  });
});

describe("the client's error classes", () => {
  const picture = (data: string) => [
    { role: "user" as const, content: [{ type: "image_url" as const, image_url: { url: data } }] },
  ];
  const url = (bytes: string) => `data:image/png;base64,${Buffer.from(bytes, "latin1").toString("base64")}`;
  type Messages = OpenAI.ChatCompletionMessageParam[];
  const bad: [string, Partial<Params>, string | null, RegExp][] = [
    ["a bad image", { messages: picture(url("no image")) }, "messages[0].content[0]", /not an image/],
    ["an image's web address", { messages: picture("https://example.org/a.png") }, "messages[0].content[0]", /data: URL/], // biome-ignore format: one row
    ["an unknown role", { messages: [{ role: "bot", content: "x" }] as never }, "messages[0].role", /must be one of/],
    ["no messages", { messages: [] as Messages }, "messages", /must not be empty/],
    ["max_tokens 0", { max_tokens: 0 }, "max_tokens", /at least 1/],
    ["max_tokens beyond the context", { max_tokens: 4090 }, "max_tokens", /leave \d+ of the model's context of 4096/],
    ["a parameter that is not served", { tools: [] }, "tools", /not supported/],
  ];
  test.each(bad)("%s is a BadRequestError that names its place", async (_name, change, param, text) => {
    const error = await ask("19", change).catch((thrown) => thrown);
    expect(error).toBeInstanceOf(OpenAI.BadRequestError);
    expect(error).toMatchObject({ status: 400, param, type: "invalid_request_error" });
    expect(error.message).toMatch(text);
    expect(error.requestID).toMatch(/^chatcmpl-/);
  });

  test("another model's name is a NotFoundError, and models.list() names the one that is served", async () => {
    await expect(ask("19", { model: "gpt-4o" })).rejects.toBeInstanceOf(OpenAI.NotFoundError);
    const { data } = await client.models.list();
    expect(data).toMatchObject([{ id: model, object: "model" }]);
    expect((await ask("19", { model: data[0].id })).model).toBe(model);
  });
});
