/** Clients as they come from npm against edge, GPU worker and engine: what their users see is what is tested. */
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { ContextOverflowError } from "@langchain/core/errors";
import { ChatOpenAI } from "@langchain/openai";
import { DownloadError, generateObject, generateText, Output, streamText } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest";
import { z } from "zod";
import { Checkpoint } from "./support/checkpoint.ts";
import { clients, MODEL_ID as model, vercel } from "./support/clients.ts";
import { type Case, cases, GOLDENS, readGolden, withImages } from "./support/goldens.ts";
import { type Stack, startStack } from "./support/stack.ts";

type Params = OpenAI.ChatCompletionCreateParamsNonStreaming;

let stack: Stack;
let client: OpenAI;
beforeAll(async () => {
  stack = await startStack({ imageUrls: "any" });
  client = new OpenAI({ baseURL: `${stack.url}/v1`, apiKey: "none", maxRetries: 0 });
});
afterAll(() => stack?.close());
afterEach(() => void vi.restoreAllMocks());

/** The goldens' pictures at /images/NAME, on loopback; notes what was asked for. */
const fetched: string[] = [];
const pictures = createServer((request, response) => {
  fetched.push(request.url!);
  if (!request.url!.startsWith("/images/")) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": "image/png" }).end(readFileSync(join(GOLDENS, request.url!)));
});
let pictureUrl: string;
beforeAll(async () => {
  await new Promise<void>((resolve) => pictures.listen(0, "127.0.0.1", resolve));
  pictureUrl = `http://127.0.0.1:${(pictures.address() as AddressInfo).port}`;
});
afterAll(() => pictures.close());

const golden = (id: string) => cases.find((c) => c.id.startsWith(id))!;
const messagesOf = (id: string) => withImages(golden(id)) as Case["messages"];
/** A case's messages with its pictures as http URLs. */
const withUrls = (id: string): Case["messages"] =>
  JSON.parse(JSON.stringify(golden(id).messages).replaceAll('"images/', `"${pictureUrl}/images/`));
const picture = (url: string): Case["messages"] => [
  { role: "user", content: [{ type: "image_url", image_url: { url } }] },
];
const dataUrlOf = (bytes: string) => `data:image/png;base64,${Buffer.from(bytes, "latin1").toString("base64")}`;

/** Of the answers that are to have a form. */
const Shape = z.object({ color: z.enum(["red", "blue", "purple"]), filled: z.boolean() });

// One image, its size odd, no image, several turns about one image, two images.
const asked = ["00-describe", "06-ocr", "08-json", "21-odd", "18-story", "20-text2", "12-turns2", "14-turns3", "15-compare", "17-describe2"]; // biome-ignore format: one list

describe.each(Object.entries(clients))("%s", (_name, { ask, refusal, hasLeft }) => {
  async function expectGolden(id: string, messages: Case["messages"]): Promise<void> {
    const { output_text: text, input_ids, output_ids } = golden(id);
    const usage = { promptTokens: input_ids.length, completionTokens: output_ids.length };
    const question = { url: stack.url, messages };
    expect(await ask(question)).toEqual({ text, finish: "stop", ...usage });
    const pieces: string[] = [];
    const streamed = await ask({ ...question, onPiece: (piece) => pieces.push(piece) });
    expect(streamed).toEqual({ text, finish: "stop", ...usage });
    expect(pieces.join("")).toBe(text);
    expect(pieces.length).toBeGreaterThan(1);
    expect(pieces.length).toBeLessThan(output_ids.length); // drafts were accepted, so several tokens a piece
  }

  test.each(asked)("gets the target's own answer to %s, whole and in pieces, with its usage", (id) =>
    expectGolden(id, messagesOf(id)),
  );

  test.each(["00", "14", "15"])("gets it to %s with pictures as http URLs", async (id) => {
    fetched.length = 0;
    await expectGolden(id, withUrls(id));
    expect(new Set(fetched).size).toBe(id === "15" ? 2 : 1);
  });

  const refused: [string, object, number, string, RegExp][] = [
    [
      "a bad picture",
      { messages: picture(dataUrlOf("\x89PNG\r\n\x1a\nno picture")) },
      400,
      "messages[0].content[0]",
      /image/,
    ],
    ["max_tokens beyond the context", { maxTokens: 5000 }, 400, "max_tokens", /context of 4096/],
    ["another model's name", { model: "gpt-4o" }, 404, "model", /"gpt-4o" is not served/],
  ];
  test.each(refused)(
    "throws its own error for %s, which names its place",
    async (_what, change, status, param, text) => {
      for (const onPiece of [undefined, () => {}]) {
        const question = { url: stack.url, messages: messagesOf("19"), onPiece, ...change };
        const error = refusal(await ask(question).catch((thrown) => thrown));
        expect(error).toMatchObject({ status, message: expect.stringMatching(text) });
        expect(error.param).toMatch(new RegExp(`^${RegExp.escape(param)}`));
      }
    },
  );

  test("throws its own error for a picture that its address does not have", async () => {
    const error = refusal(await ask({ url: stack.url, messages: picture(`${pictureUrl}/x.png`) }).catch((e) => e));
    expect(error).toMatchObject({ status: 400, message: expect.stringContaining("404") });
    expect(error.param).toMatch(/^messages\[0\]\.content\[0\]/);
  });

  // A client that leaves before the answer's first byte closes its connection, which workerd takes for one that has
  // nothing more to say; so that is tested at the worker.
  test.each(["in mid-stream", "before its answer"])(
    "leaves %s: the engine stops, and the next one is answered",
    async (when) => {
      const url = when === "in mid-stream" ? endless.url : endless.workerUrl;
      const question = { url, messages: messagesOf("18"), model: endless.engine.info.id };
      const ended = await lengths(endless);
      const controller = new AbortController();
      const onPiece = when === "in mid-stream" ? () => controller.abort() : undefined;
      const failure = ask({ ...question, signal: controller.signal, onPiece }).catch((thrown) => thrown);
      if (!onPiece) {
        await vi.waitUntil(async () => (await running(endless)) === 1, { timeout: 30_000 });
        controller.abort();
      }
      expect(hasLeft(await failure)).toBe(true);
      await vi.waitUntil(async () => (await running(endless)) === 0, { timeout: 30_000 });
      expect(await lengths(endless)).toBe(ended); // it was not decoded to its end
      const next = await ask({ ...question, maxTokens: 20 });
      expect(next).toMatchObject({ finish: "length", completionTokens: 20 });
      expect(golden("18").output_text).toContain(next.text);
    },
  );

  test("throws what it throws for an error in mid-stream when the engine dies, and is answered by the next one", async () => {
    const question = { url: endless.url, messages: messagesOf("18"), model: endless.engine.info.id };
    const { pid } = endless.engine;
    const onPiece = () => endless.engine.pid === pid && process.kill(pid, "SIGKILL");
    const failure = await ask({ ...question, onPiece }).catch((thrown) => thrown);
    expect(failure).toBeInstanceOf(Error);
    expect(failure.message).toContain("The engine has stopped.");
    const next = await ask({ ...question, maxTokens: 20 });
    expect(golden("18").output_text).toContain(next.text);
  });
});

/** Its answers have no end of their own. */
let endless: Stack;
let checkpoint: Checkpoint;
beforeAll(async () => {
  checkpoint = new Checkpoint().endless();
  endless = await startStack({ model: checkpoint.folder });
});
afterAll(async () => {
  await endless?.close();
  checkpoint[Symbol.dispose]();
});

/** The sum of a metric's samples that have this label. */
async function metric({ workerUrl }: Stack, name: string, label = ""): Promise<number> {
  const text = await (await fetch(`${workerUrl}/metrics`)).text();
  const samples = text.split("\n").filter((line) => line.startsWith(`${name}{`) && line.includes(label));
  return samples.map((line) => Number(line.slice(line.lastIndexOf(" ")))).reduce((a, b) => a + b, 0);
}
const lengths = (stack: Stack) => metric(stack, "vllm:request_success_total", 'finished_reason="length"');
const running = (stack: Stack) => metric(stack, "vllm:num_requests_running");

describe("the openai package", () => {
  const ask = (id: string, change: Partial<Params> = {}) =>
    client.chat.completions.create({
      model,
      messages: messagesOf(id) as Params["messages"],
      temperature: 0,
      ...change,
    });
  const textOf = (answer: OpenAI.ChatCompletion) => answer.choices[0].message.content;

  test("has the usage in full: image tokens, and the draft's as predictions", async () => {
    const { usage } = await ask("00");
    expect(usage).toMatchObject({
      total_tokens: golden("00").input_ids.length + golden("00").output_ids.length,
      prompt_tokens_details: { image_tokens: golden("00").image_tokens, cached_tokens: expect.any(Number) },
      completion_tokens_details: { rejected_prediction_tokens: expect.any(Number) },
    });
    expect(usage!.completion_tokens_details!.accepted_prediction_tokens).toBeGreaterThan(0);
  });

  test("stops before a stop string and after max_tokens", async () => {
    const text = golden("00").output_text;
    const stopped = await ask("00", { stop: [" Then", "never"] });
    expect(textOf(stopped)).toBe(text.slice(0, text.indexOf(" Then")));
    expect(stopped.choices[0].finish_reason).toBe("stop");
    for (const limit of [{ max_tokens: 9 }, { max_completion_tokens: 9 }]) {
      const limited = await ask("00", limit);
      expect(limited).toMatchObject({ choices: [{ finish_reason: "length" }], usage: { completion_tokens: 9 } });
      expect(textOf(limited)!.length).toBeGreaterThan(9);
      expect(text.startsWith(textOf(limited)!)).toBe(true);
    }
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

  // Seeds whose draws all lie far from a border between two tokens, in relation to float32's rounding.
  const seeds = [1, 3, 4];
  const drawn = (seed: number) => ask("18", { seed, temperature: 1 }).then(textOf);

  test("gets the same text of a seed, whatever else runs", async () => {
    const alone: (string | null)[] = [];
    for (const seed of seeds) alone.push(await drawn(seed));
    expect(new Set(alone).size).toBe(seeds.length);
    const others = asked.map((id, i) => ask(id, { temperature: i % 2, max_tokens: 30 }));
    expect(await Promise.all(seeds.map(drawn))).toEqual(alone);
    await Promise.all(others);
  });

  test("gets n choices, each what its own seed alone gives, whole and in a stream", async () => {
    const params = { seed: 3, n: 2, temperature: 1 };
    const expected = [await drawn(3), await drawn(4)];
    const { choices, usage } = await ask("18", params);
    expect(choices.map(({ index }) => index)).toEqual([0, 1]);
    expect(choices.map(({ message }) => message.content)).toEqual(expected);
    expect(usage!.prompt_tokens).toBe(golden("18").input_ids.length);
    const messages = messagesOf("18") as Params["messages"];
    const stream = await client.chat.completions.create({ model, messages, ...params, stream: true });
    const texts = ["", ""];
    for await (const { choices } of stream) texts[choices[0].index] += choices[0].delta.content ?? "";
    expect(texts).toEqual(expected);
  });

  test("moves the answer by logit_bias and by penalties", async () => {
    const first = golden("19").output_ids[0];
    const forced = await ask("19", { logit_bias: { [first]: 100 }, max_tokens: 5, logprobs: true });
    const tokens = forced.choices[0].logprobs!.content!.map(({ token }) => token);
    expect(tokens).toEqual(Array.from({ length: 5 }, () => tokens[0]));
    const banned = await ask("19", { logit_bias: { [first]: -100 }, max_tokens: 5 });
    expect(textOf(banned)).not.toBe(textOf(await ask("19", { max_tokens: 5 })));
    const plain = await drawn(3);
    for (const penalty of [{ presence_penalty: 2 }, { frequency_penalty: 2 }])
      expect(textOf(await ask("18", { seed: 3, temperature: 1, ...penalty }))).not.toBe(plain);
  });

  test("parses an answer in the form of a schema", async () => {
    const parsed = await client.chat.completions.parse({
      ...{ model, messages: messagesOf("00") as Params["messages"], temperature: 0 },
      response_format: zodResponseFormat(Shape, "shape"),
    });
    expect(parsed.choices[0].finish_reason).toBe("stop");
    expect(Shape.parse(parsed.choices[0].message.parsed)).toEqual(parsed.choices[0].message.parsed);
  });

  test("completes plain text, whole and in a stream", async () => {
    const params = { model, prompt: "Once upon a time, Clara", temperature: 0, max_tokens: 12 };
    const whole = await client.completions.create(params);
    expect(whole).toMatchObject({ object: "text_completion", choices: [{ index: 0, finish_reason: "length" }] });
    expect(whole.usage).toMatchObject({ completion_tokens: 12 });
    let text = "";
    for await (const chunk of await client.completions.create({ ...params, stream: true }))
      text += chunk.choices[0].text;
    expect(text).toBe(whole.choices[0].text);
    expect(text.length).toBeGreaterThan(12);
  });

  test("lists and retrieves the model that is served", async () => {
    const { data } = await client.models.list();
    expect(data).toMatchObject([{ id: model, object: "model" }]);
    expect(await client.models.retrieve(model)).toEqual(data[0]);
    await expect(client.models.retrieve("gpt-4o")).rejects.toBeInstanceOf(OpenAI.NotFoundError);
    await expect(ask("19", { model: "gpt-4o" })).rejects.toBeInstanceOf(OpenAI.NotFoundError);
  });

  const bad: [string, Partial<Params>, string | null, RegExp][] = [
    ["a bad image", { messages: picture(dataUrlOf("no image")) as never }, "messages[0].content[0]", /not an image/],
    ["an unknown role", { messages: [{ role: "bot", content: "x" }] as never }, "messages[0].role", /must be one of/],
    ["no messages", { messages: [] }, "messages", /must not be empty/],
    ["max_tokens 0", { max_tokens: 0 }, "max_tokens", /at least 1/],
    ["max_tokens beyond the context", { max_tokens: 4090 }, "max_tokens", /leave \d+ of the model's context of 4096/],
    ["a parameter that is not served", { tools: [] }, "tools", /not supported/],
  ];
  test.each(bad)("has a BadRequestError for %s, which names its place", async (_name, change, param, text) => {
    const error = await ask("19", change).catch((thrown) => thrown);
    expect(error).toBeInstanceOf(OpenAI.BadRequestError);
    expect(error).toMatchObject({ status: 400, param, type: "invalid_request_error" });
    expect(error.message).toMatch(text);
    expect(error.requestID).toMatch(/^chatcmpl-/);
  });
});

describe("the Vercel AI SDK's own", () => {
  const messages = [{ role: "user" as const, content: "Describe a shape." }];

  test("structured output follows the schema, whole and in a stream", async () => {
    const params = { model: vercel(stack.url)(model), messages, temperature: 0, maxRetries: 0 };
    const { output } = await generateText({ ...params, output: Output.object({ schema: Shape }) });
    expect(Shape.parse(output)).toEqual(output);
    expect((await generateObject({ ...params, schema: Shape })).object).toEqual(output);
    const streamed = streamText({ ...params, output: Output.object({ schema: Shape }) });
    expect(await streamed.output).toEqual(output);
  });

  test("metadata has the draft's tokens", async () => {
    const { providerMetadata } = await generateText({ model: vercel(stack.url)(model), messages, temperature: 0 });
    expect(providerMetadata!.vispec.acceptedPredictionTokens).toBeGreaterThan(0);
  });

  const withPicture = (url: string) => [
    {
      role: "user" as const,
      content: [
        { type: "file" as const, mediaType: "image/png", data: new URL(url) },
        { type: "text" as const, text: "Describe this image in detail." },
      ],
    },
  ];

  test("way with a picture's address, by default, is to fetch it itself and to send the bytes", async () => {
    const params = { model: vercel(stack.url, {})(model), temperature: 0, maxRetries: 0 };
    // It refuses loopback before any connection, so a public name stands for the server here.
    const own = fetch;
    vi.spyOn(globalThis, "fetch").mockImplementation((url, init) =>
      own(String(url).replace("http://pictures.example", pictureUrl), init),
    );
    fetched.length = 0;
    const { text } = await generateText({
      ...params,
      messages: withPicture("http://pictures.example/images/00-describe-0.png"),
    });
    expect(text).toBe(golden("00").output_text);
    expect(fetched).toEqual(["/images/00-describe-0.png"]);
    const refused = generateText({ ...params, messages: withPicture(`${pictureUrl}/images/00-describe-0.png`) });
    await expect(refused).rejects.toSatisfy(DownloadError.isInstance);
  });
});

describe("LangChain's own", () => {
  const chat = (name = model) =>
    new ChatOpenAI({ model: name, apiKey: "none", maxRetries: 0, temperature: 0, configuration: { baseURL: `${stack.url}/v1` } }); // biome-ignore format: one line

  test.each(["jsonSchema", undefined] as const)("structured output (method %s) follows the schema", async (method) => {
    const output = await chat().withStructuredOutput(Shape, { name: "shape", method }).invoke("Describe a shape.");
    expect(Shape.parse(output)).toEqual(output);
  });

  test("errors tell a prompt that is too long and a model that is not there", async () => {
    const long = await chat()
      .invoke("word ".repeat(8000))
      .catch((thrown) => thrown);
    expect(long).toBeInstanceOf(ContextOverflowError);
    const missing = await chat("gpt-4o")
      .invoke("Hi")
      .catch((thrown) => thrown);
    expect(missing).toMatchObject({ lc_error_code: "MODEL_NOT_FOUND" });
  });
});
