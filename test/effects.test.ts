/** Every parameter of the API does what it says, through the whole stack, and with drafts the same as without. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ChatRequest, CompletionRequest } from "../shared/api.ts";
import { cases, dataUrl, withImages } from "./support/goldens.ts";
import { type Stack, startStack } from "./support/stack.ts";

type Body = Record<string, unknown>;
type Answer = Awaited<ReturnType<typeof send>>;

const log: Body[] = [];
let stack: Stack;
beforeAll(async () => {
  stack = await startStack({ log: (_level, msg, fields) => void log.push({ msg, ...fields }) });
});
afterAll(() => stack?.close());

const story = cases.find(({ id }) => id === "18-story")!;
const messages = withImages(story);
const picture = (more: Body = {}, image_url: Body = {}) => [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: dataUrl("images/size-336x336.png"), ...image_url }, ...more },
      { type: "text", text: "What?" },
    ],
  },
];
/** What it has by the model's own limits: 336² pixels, of which a token stands for 28². */
const TOKENS = 144;

async function send(path: string, body: Body) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(`${stack.url}/v1/${path}`, { method: "POST", headers, body: JSON.stringify(body) });
  const text = await response.text();
  if (response.headers.get("content-type")?.startsWith("text/event-stream")) {
    const chunks = [...text.matchAll(/^data: (\{.*)$/gm)].map(([, json]) => JSON.parse(json));
    return { status: response.status, texts: [], reasons: [], usage: chunks.at(-1).usage, body: null, chunks };
  }
  const answer = JSON.parse(text);
  const choices: Body[] = answer.choices ?? [];
  const texts = choices.map(({ message, text }) => (text ?? (message as Body | undefined)?.content) as string);
  const reasons = choices.map((choice) => choice.finish_reason);
  return { status: response.status, texts, reasons, usage: answer.usage, body: answer, chunks: [] };
}

/** The probes of one endpoint, `asked` being its plainest request. */
function probesOf(path: string, asked: Body) {
  /** The answer, after it was seen that it is the same without drafts. */
  const ask = async (change: Body): Promise<Answer> => {
    const body = { temperature: 0, max_tokens: 40, ...asked, ...change };
    const [drafted, plain] = [await send(path, body), await send(path, { ...body, drafter: "none" })];
    expect(drafted.texts).toEqual(plain.texts);
    expect(drafted.reasons).toEqual(plain.reasons);
    return drafted;
  };
  const usual = () => ask({});
  /** At this temperature and seed the answer is another than the likeliest. */
  const drawn = { temperature: 1.5, seed: 3 };
  const differs = (change: Body) => async () =>
    expect((await ask(change)).texts).not.toEqual((await ask({ max_tokens: change.max_tokens ?? 40 })).texts);
  const isGreedy = (change: Body) => async () => {
    expect((await ask(drawn)).texts).not.toEqual((await usual()).texts);
    expect((await ask({ ...drawn, ...change })).texts).toEqual((await usual()).texts);
  };
  const cut = (name: string) => async () => {
    const { usage, reasons } = await ask({ max_tokens: undefined, [name]: 5 });
    expect([usage.completion_tokens, reasons]).toEqual([5, ["length"]]);
  };
  const tokensOf = (prompt: object) => send(path, { ...asked, ...prompt, max_tokens: 1 }).then(({ usage }) => usage);
  const sizes =
    (...prompts: [prompt: object, tokens: number][]) =>
    async () => {
      for (const [prompt, tokens] of prompts)
        expect((await tokensOf(prompt)).prompt_tokens_details.image_tokens).toBe(tokens);
    };

  const common: Record<string, () => Promise<unknown>> = {
    model: async () => {
      expect((await ask({ model: "tiny-qwen2.5-vl" })).status).toBe(200);
      expect((await ask({ model: null })).status).toBe(200);
      expect((await send(path, { ...asked, model: "another" })).status).toBe(404);
    },
    max_tokens: cut("max_tokens"),
    n: async () => expect((await ask({ n: 3 })).texts).toEqual(Array(3).fill((await usual()).texts[0])),
    temperature: differs(drawn),
    top_p: isGreedy({ top_p: 1e-6 }),
    top_k: isGreedy({ top_k: 1 }),
    min_p: isGreedy({ min_p: 1 }),
    seed: async () => {
      const [one, same, other] = [await ask(drawn), await ask(drawn), await ask({ ...drawn, seed: 4 })];
      expect(one.texts).toEqual(same.texts);
      expect(one.texts).not.toEqual(other.texts);
    },
    presence_penalty: differs({ presence_penalty: 2, max_tokens: 150 }),
    frequency_penalty: differs({ frequency_penalty: 2, max_tokens: 150 }),
    repetition_penalty: differs({ repetition_penalty: 1.8, max_tokens: 150 }),
    logit_bias: differs({ logit_bias: { [story.output_ids[0]]: -100, [story.output_ids[4]]: -100 } }),
    stop: async () => {
      const [text] = (await usual()).texts;
      const word = text.split(" ")[3];
      const { texts, usage } = await ask({ stop: word });
      expect(texts).toEqual([text.slice(0, text.indexOf(word))]);
      // Of a cycle that is cut only what is in the answer counts.
      const { accepted_prediction_tokens: accepted } = usage.completion_tokens_details;
      expect(accepted).toBeLessThan(usage.completion_tokens);
    },
    stop_token_ids: async () => {
      // A comma, which is in the answer.
      const { texts, reasons } = await ask({ stop_token_ids: [story.output_ids[4]] });
      const [text] = (await usual()).texts;
      expect([texts, reasons]).toEqual([[text.slice(0, text.indexOf(","))], ["stop"]]);
    },
    ignore_eos: async () => {
      const ends = { max_tokens: 400 };
      expect((await ask(ends)).reasons).toEqual(["stop"]);
      const { reasons, usage } = await ask({ ...ends, ignore_eos: true });
      expect([reasons, usage.completion_tokens]).toEqual([["length"], 400]);
    },
    stream: async () => expect((await send(path, { ...asked, max_tokens: 9, stream: true })).chunks.length).toBeGreaterThan(2), // biome-ignore format: one row
    stream_options: async () => {
      const options = { include_usage: true, include_drafts: true };
      const body = { ...asked, temperature: 0, max_tokens: 40, stream: true, stream_options: options };
      const { usage, chunks } = await send(path, body);
      const drafts = chunks.flatMap(({ draft }) => draft ?? []);
      const sum = (name: string) => drafts.reduce((all, draft) => all + draft[name], 0);
      expect(sum("tokens")).toBe(usage.completion_tokens);
      expect(sum("accepted")).toBe(usage.completion_tokens_details.accepted_prediction_tokens);
      expect(sum("accepted")).toBeGreaterThan(0);
    },
    drafter: async () => {
      const drafts = async (drafter: string) => (await ask({ drafter })).usage.completion_tokens_details;
      // (The second request of `ask` decodes plainly; the first is the one that counts.)
      expect((await drafts("vispec")).accepted_prediction_tokens).toBeGreaterThan(0);
      const none = { accepted_prediction_tokens: 0, rejected_prediction_tokens: 0 };
      const body = { ...asked, max_tokens: 40, drafter: "none" };
      expect((await send(path, body)).usage.completion_tokens_details).toEqual(none);
    },
    service_tier: async () => {
      for (const [asked, told] of [["flex", "flex"], ["priority", "default"], [null, "default"]]) // biome-ignore format: one list
        expect((await ask({ service_tier: asked })).body.service_tier).toBe(told);
    },
    deadline: async () => {
      expect((await ask({ deadline: 600 })).texts).toEqual((await usual()).texts);
      const { status, body } = await send(path, { ...asked, deadline: 1e-9 });
      expect([status, body.error.code]).toEqual([504, "deadline_exceeded"]);
    },
    user: async () => {
      await ask({ user: "somebody" });
      expect(log.at(-1)).toMatchObject({ msg: "request", user: "somebody" });
    },
  };
  return { common, ask, usual, cut, tokensOf, sizes };
}

/** One test a parameter; a parameter without a probe fails. */
function check(schema: { shape: object }, probes: Record<string, () => Promise<unknown>>): void {
  test("has a probe", () => expect(Object.keys(probes).sort()).toEqual(Object.keys(schema.shape).sort()));
  for (const [name, probe] of Object.entries(probes)) test(`${name} does what it says`, probe);
}

describe("of POST /v1/chat/completions, every parameter", () => {
  const { common, ask, usual, cut, tokensOf, sizes } = probesOf("chat/completions", { messages });
  const word = { role: "user", content: "Hi." };
  check(ChatRequest, {
    ...common,
    messages: async () => {
      const [system, developer] = ["system", "developer"].map((role) => [{ role, content: "Be brief." }, word]);
      const assistant = [word, { role: "assistant", content: "Hello." }, word];
      const [one, same, longer] = await Promise.all(
        [system, developer, assistant].map((m) => tokensOf({ messages: m }).then((usage) => usage.prompt_tokens)),
      );
      expect(one).toBe(same);
      expect(longer).not.toBe(one);
      await sizes(
        [{ messages: picture() }, TOKENS],
        [{ messages: picture({}, { detail: "high" }) }, TOKENS],
        [{ messages: picture({}, { detail: "low" }) }, 36],
        [{ messages: picture({}, { max_pixels: 224 ** 2 }) }, 64],
        [{ messages: picture({ max_pixels: 224 ** 2 }) }, 64],
        [{ messages: picture({ min_pixels: 448 ** 2, max_pixels: 448 ** 2 }) }, 256],
      )();
    },
    max_completion_tokens: cut("max_completion_tokens"),
    logprobs: async () => {
      const { body, texts } = await ask({ logprobs: true });
      const { content } = body.choices[0].logprobs;
      expect(content.map(({ token }: Body) => token).join("")).toBe(texts[0]);
      for (const { logprob } of content) expect(logprob).toBeLessThanOrEqual(0);
      expect((await usual()).body.choices[0].logprobs).toBeNull();
    },
    top_logprobs: async () => {
      const { body } = await ask({ logprobs: true, top_logprobs: 4 });
      for (const { token, top_logprobs: top } of body.choices[0].logprobs.content) {
        expect(top).toHaveLength(4);
        expect(top[0].token).toBe(token); // greedy
      }
    },
    response_format: async () => {
      const schema = {
        type: "object",
        properties: { n: { type: "integer", minimum: 3, maximum: 9 } },
        required: ["n"],
      };
      const json_schema = { name: "number", schema };
      const { texts } = await ask({ max_tokens: 200, response_format: { type: "json_schema", json_schema } });
      const { n, ...rest } = JSON.parse(texts[0]);
      expect([3 <= n && n <= 9, rest]).toEqual([true, {}]);
      const json = withImages(cases.find(({ id }) => id === "08-json")!);
      const { texts: objects } = await ask({
        messages: json,
        max_tokens: 400,
        response_format: { type: "json_object" },
      });
      expect(typeof JSON.parse(objects[0])).toBe("object");
      expect((await ask({ response_format: { type: "text" } })).texts).toEqual((await usual()).texts);
    },
    max_pixels: sizes(
      [{ messages: picture(), max_pixels: 224 ** 2 }, 64],
      [{ messages: picture({ max_pixels: 168 ** 2 }), max_pixels: 224 ** 2 }, 36],
    ),
    min_pixels: sizes([{ messages: picture(), min_pixels: 448 ** 2, max_pixels: 448 ** 2 }, 256]),
    mm_processor_kwargs: sizes([{ messages: picture(), mm_processor_kwargs: { max_pixels: 224 ** 2 } }, 64]),
  });
});

describe("of POST /v1/completions, every parameter", () => {
  const prompt = "Once upon a time,";
  const { common, ask, usual, tokensOf } = probesOf("completions", { prompt });
  check(CompletionRequest, {
    ...common,
    prompt: async () => {
      const ids = story.output_ids.slice(0, 5);
      expect(await tokensOf({ prompt: ids })).toMatchObject({ prompt_tokens: 5 });
      expect((await ask({ prompt: ids })).texts).toEqual((await usual()).texts);
      expect((await ask({ prompt: "Two" })).texts).not.toEqual((await usual()).texts);
    },
    logprobs: async () => {
      const { body, texts } = await ask({ logprobs: 2 });
      const { tokens, token_logprobs, top_logprobs } = body.choices[0].logprobs;
      expect(tokens.join("")).toBe(texts[0]);
      for (const [i, top] of top_logprobs.entries()) {
        expect(top[tokens[i]]).toBe(token_logprobs[i]);
        expect(Object.keys(top).length).toBe(2);
      }
    },
  });
});
