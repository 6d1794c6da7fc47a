/** Steps of the engine as OpenAI's JSON: steps made by hand, and every event read as JSON. */
import { expect, test } from "vitest";
import type { Finish, Step, TokenLogprob } from "../gpu-worker/engine.ts";
import { Answer, errorEvent, modelList } from "../gpu-worker/service/openai.ts";
import { ApiError } from "../shared/errors.ts";
import type { GenerateRequest } from "../shared/protocol.ts";
import { Tokenizer } from "../shared/tokenizer.ts";
import { tinyModel } from "./support/tiny-model.ts";

const tokenizer = new Tokenizer(tinyModel.tokenizer, tinyModel.tokenizerConfig);
const EOS = tokenizer.tokenId("<|im_end|>")!;
const CREATED = 1_700_000_123;

const answerTo = (request: Partial<GenerateRequest> = {}) =>
  new Answer(
    { id: 'id-"1"', kind: "chat", n: 1, logprobs: null, stopTokenIds: [], includeUsage: false, includeDrafts: false, ...request } as GenerateRequest, // biome-ignore format: one line
    tinyModel,
    tokenizer,
    CREATED,
  );

const identity = { created: CREATED, model: "tiny", service_tier: "default", id: 'id-"1"' };

function finish(reason: Finish["reason"], numbers: Partial<Finish> = {}): Finish {
  const timings = { prefill: 1, draft: 1, verify: 1, total: 3 };
  const counts = { promptTokens: 10, cachedTokens: 7, imageTokens: 4, completionTokens: 3, cycles: 2, acceptedPerCycle: [1, 0], drafted: 5 }; // biome-ignore format: one line
  return { reason, ...counts, timings, ...numbers };
}

const logprob = (token: number): TokenLogprob => ({ token, logprob: -token / 1000, top: [] });

/** A step with the tokens of `text` and perhaps more, each with a log-probability. */
function step(text: string, more: Partial<Step> = {}, tokens = tokenizer.encode(text)): Step {
  return { choice: 0, tokens, accepted: 0, text, draftText: 0, logprobs: tokens.map(logprob), ...more };
}

const withoutLogprobs = (steps: Step[]) => steps.map(({ logprobs: _, ...rest }) => rest);

// biome-ignore lint/suspicious/noExplicitAny: JSON of many forms
type Json = any;

/** The events of a stream, read. */
function read(text: string): Json[] {
  expect(text.endsWith("\n\n")).toBe(true);
  return text.slice(0, -2).split("\n\n").map((event) => {
    expect(event).toMatch(/^data: [^\r\n]+$/);
    return event === "data: [DONE]" ? "[DONE]" : JSON.parse(event.slice(6));
  }); // biome-ignore format: one chain
}

const stream = (steps: Step[], request: Partial<GenerateRequest> = {}) => {
  const answer = answerTo(request);
  return read(steps.map((one) => answer.streamStep(one)).join(""));
};
const body = (steps: Step[], request: Partial<GenerateRequest> = {}): Json => JSON.parse(answerTo(request).body(steps));

const TEXT = 'Say "é\\\n\u2028 🐎"';
const plain = withoutLogprobs([step(TEXT), step(" there", { finish: finish("stop") }, [325, EOS])]);

const usage = {
  prompt_tokens: 10,
  completion_tokens: 3,
  total_tokens: 13,
  prompt_tokens_details: { cached_tokens: 7, image_tokens: 4 },
  completion_tokens_details: { accepted_prediction_tokens: 1, rejected_prediction_tokens: 4 },
};

test("a chat is one body with message, reason and usage", () => {
  const message = { role: "assistant", content: `${TEXT} there`, refusal: null };
  expect(body(plain)).toEqual({
    ...{ object: "chat.completion", ...identity },
    choices: [{ index: 0, message, logprobs: null, finish_reason: "stop" }],
    usage,
  });
});

test("a batch request is answered as flex, whole and in chunks", () => {
  expect(body(plain, { priority: "batch" }).service_tier).toBe("flex");
  const chunks = stream(plain, { priority: "batch" }).slice(0, -1);
  expect(new Set(chunks.map(({ service_tier }) => service_tier))).toEqual(new Set(["flex"]));
});

test("a chat is streamed as role, text, reason, usage and an end", () => {
  const chunk = (delta: object, reason: string | null = null) => ({
    ...{ object: "chat.completion.chunk", ...identity },
    choices: [{ index: 0, delta, logprobs: null, finish_reason: reason }],
  });
  const chunks = [
    chunk({ role: "assistant", content: "", refusal: null }),
    ...[chunk({ content: TEXT }), chunk({ content: " there" }), chunk({}, "stop")],
  ];
  expect(stream(plain)).toEqual([...chunks, "[DONE]"]);
  const last = { object: "chat.completion.chunk", ...identity, choices: [], usage };
  const nulls = chunks.map((one) => ({ ...one, usage: null }));
  expect(stream(plain, { includeUsage: true })).toEqual([...nulls, last, "[DONE]"]);
});

test("a completion has its text where OpenAI has it, in body and chunks", () => {
  const head = { object: "text_completion", ...identity };
  const chunk = (text: string, reason: string | null = null) => ({
    ...head,
    choices: [{ index: 0, text, logprobs: null, finish_reason: reason }],
  });
  const request = { kind: "completion" } as const;
  expect(body(plain, request)).toEqual({ ...chunk(`${TEXT} there`, "stop"), usage });
  const chunks = [chunk(TEXT), chunk(" there"), chunk("", "stop")];
  expect(stream(plain, request)).toEqual([...chunks, "[DONE]"]);
  const nulls = chunks.map((one) => ({ ...one, usage: null }));
  const last = { ...head, choices: [], usage };
  expect(stream(plain, { ...request, includeUsage: true })).toEqual([...nulls, last, "[DONE]"]);
});

const three = withoutLogprobs([
  step("One", { finish: finish("stop", { completionTokens: 2 }) }, [46, EOS]),
  ...[step("Two", { choice: 1 }), step(" more", { choice: 1, finish: finish("length", { acceptedPerCycle: [2, 3], drafted: 6 }) })],
  step("", { choice: 2, finish: finish("stop", { completionTokens: 1, acceptedPerCycle: [], drafted: 0 }) }, [EOS]),
]); // biome-ignore format: one step a line

test.each(["chat", "completion"] as const)(
  "choices of a %s have their own texts and reasons, and one usage",
  (kind) => {
    const sum = {
      ...{ ...usage, completion_tokens: 6, total_tokens: 16 },
      completion_tokens_details: { accepted_prediction_tokens: 6, rejected_prediction_tokens: 5 },
    };
    const request = { kind, n: 3, includeUsage: true };
    const whole = body(three, request);
    const seen = ({ index, message, text, finish_reason }: Json) => [index, message?.content ?? text, finish_reason];
    expect(whole.choices.map(seen)).toEqual([[0, "One", "stop"], [1, "Two more", "length"], [2, "", "stop"]]); // biome-ignore format: one line
    expect(whole.usage).toEqual(sum);

    const events = stream(three, request);
    expect(events.splice(-2)).toEqual([expect.objectContaining({ choices: [], usage: sum }), "[DONE]"]);
    const parts = events.map(({ choices: [{ index, delta, text, finish_reason: reason }], usage: none }) => {
      expect(none).toBeNull();
      return [index, delta?.role ? "role" : (delta?.content ?? text ?? ""), reason];
    });
    const expected = [
    ...[[0, "role", null], [0, "One", null], [0, "", "stop"]],
    ...[[1, "role", null], [1, "Two", null], [1, " more", null], [1, "", "length"]],
    ...[[2, "role", null], [2, "", "stop"]],
  ]; // biome-ignore format: one choice a line
    expect(parts).toEqual(kind === "chat" ? expected : expected.filter(([, what]) => what !== "role"));
  },
);

test("a body needs the end of every choice", () => {
  expect(() => answerTo({ n: 4 }).body(three)).toThrow("without a finish");
  expect(() => answerTo().body(plain.slice(0, 1))).toThrow("without a finish");
});

test.each(["chat", "completion"] as const)(
  "chunks of a %s tell its drafts where asked, with text or without",
  (kind) => {
    const steps = withoutLogprobs([
      step("", {}, [127]),
      step("é there!", { accepted: 2, draftText: 7 }, [102, 325, 0]),
      step("", { accepted: 0, finish: finish("stop") }, [EOS]),
    ]);
    const drafts = (request: Partial<GenerateRequest>) =>
      stream(steps, { kind, ...request }).flatMap((event) => (event.draft ? [event.draft] : []));
    expect(drafts({ includeDrafts: true })).toEqual([
      { tokens: 1, accepted: 0, characters: 0, ms: expect.any(Number) },
      { tokens: 3, accepted: 2, characters: 7, ms: expect.any(Number) },
      { tokens: 1, accepted: 0, characters: 0, ms: expect.any(Number) },
    ]);
    expect(drafts({ includeDrafts: false })).toEqual([]);
    const content = (request: Partial<GenerateRequest>) =>
    stream(steps, { kind, ...request }).flatMap(({ choices }) => choices?.[0].delta?.content ?? choices?.[0].text ?? []).join(""); // biome-ignore format: one chain
    expect(content({ includeDrafts: true })).toBe("é there!");
    // A chunk without text says nothing else: role, text and reason for a chat, text and reason for a completion.
    expect(stream(steps, { kind })).toHaveLength(kind === "chat" ? 4 : 3);
  },
);

test("a chat's log-probabilities have each token's text and bytes, and the likeliest tokens", () => {
  const [first, second] = tokenizer.encode("é");
  const top = [{ token: 325, logprob: -0.5 }, { token: second, logprob: Number.NEGATIVE_INFINITY }]; // biome-ignore format: one line
  const logprobs = [{ ...logprob(first), top }, logprob(second)];
  const request = { logprobs: 2 };
  const content = [
    {
      ...{ token: "\ufffd", logprob: -first / 1000, bytes: [0xc3] },
      top_logprobs: [
        { token: " there", logprob: -0.5, bytes: [...Buffer.from(" there")] },
        { token: "\ufffd", logprob: -9999, bytes: [0xa9] },
      ],
    },
    { token: "\ufffd", logprob: -second / 1000, bytes: [0xa9], top_logprobs: [] },
  ];
  const steps = [step("é", { logprobs, finish: finish("length") })];
  expect(body(steps, request).choices[0].logprobs).toEqual({ content, refusal: null });
  expect(stream(steps, request)[1].choices[0].logprobs).toEqual({ content, refusal: null });
});

test("a completion's log-probabilities have a token's place in the text, and bytes for a part of a character", () => {
  const [first, second] = tokenizer.encode("é");
  const top = [{ token: 325, logprob: -0.5 }, { token: second, logprob: Number.NEGATIVE_INFINITY }]; // biome-ignore format: one line
  const steps = [
    step("🐎 there"),
    step("", { logprobs: [{ ...logprob(first), top }] }, [first]),
    step("é!", { finish: finish("length") }, [second, 0]),
    step(" there", { choice: 1, finish: finish("stop") }, [325, EOS]),
  ];
  const request = { kind: "completion", logprobs: 2, n: 2 } as const;
  const [one, two] = body(steps, request).choices.map(({ logprobs }: Json) => logprobs);
  const horse = ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x90", "bytes:\\x8e"];
  expect(one.tokens).toEqual([...horse, " there", "bytes:\\xc3", "bytes:\\xa9", "!"]);
  // The horse is one code point, which the last of its tokens gives.
  expect(one.text_offset).toEqual([0, 0, 0, 0, 1, 7, 7, 8]);
  expect(one.token_logprobs.slice(4)).toEqual([-0.325, -first / 1000, -second / 1000, 0]);
  expect(one.top_logprobs[5]).toEqual({ " there": -0.5, "bytes:\\xa9": -9999, "bytes:\\xc3": -first / 1000 });
  expect(one.top_logprobs[7]).toEqual({ "!": 0 });
  expect(two).toMatchObject({ tokens: [" there"], text_offset: [0] });
});

const { logprobs: _, ...unasked } = step("there", { finish: finish("length") });
test("there are no log-probabilities where none were asked for", () => {
  for (const kind of ["chat", "completion"] as const) {
    for (const { choices } of stream([unasked], { kind }).slice(0, -1)) expect(choices[0].logprobs).toBeNull();
    expect(body([unasked], { kind }).choices[0].logprobs).toBeNull();
  }
});

const hello = tokenizer.encode("Hello");
test.each<[string, Step, Partial<GenerateRequest>, number]>([
  ["ends at the end-of-sequence token", step("Hello", { finish: finish("stop") }, [...hello, EOS]), {}, 3],
  ["is nothing but that token", step("", { finish: finish("stop") }, [EOS]), {}, 0],
  ["ends at a token of stop_token_ids", step("Hello", { finish: finish("stop") }, [...hello, 325]), { stopTokenIds: [325] }, 3],
  ["ends before a stop string", step("Hel", { finish: finish("stop") }, hello), {}, 3],
  ["goes on after the end-of-sequence token", step("Hello", { finish: finish("length") }, [EOS, ...hello]), {}, 4],
  ["ends at its length with that token", step("Hello", { finish: finish("length") }, [...hello, EOS]), {}, 4],
])("a choice that %s lists the tokens of its text", (_, last, request, count) => {
  for (const kind of ["chat", "completion"] as const) {
    const asked = { kind, logprobs: 0, ...request };
    const count_ = ({ logprobs }: Json) => (logprobs?.content ?? logprobs?.tokens ?? []).length;
    expect(count_(body([last], asked).choices[0])).toBe(count);
    const streamed = stream([last], asked).slice(0, -1).map(({ choices }) => count_(choices[0])); // biome-ignore format: one line
    expect(streamed.reduce((a, b) => a + b)).toBe(count);
  }
}); // biome-ignore format: a table

test("a stream's log-probabilities are those of the body, in parts", () => {
  const steps = [0, 1].flatMap((choice) => [
    step("Hello 🐎", { choice }),
    step("", { choice }, tokenizer.encode("中").slice(0, 1)),
    step("中 there", { choice, finish: finish("stop") }, [...tokenizer.encode("中").slice(1), 325, EOS]),
  ]);
  for (const kind of ["chat", "completion"] as const) {
    const request = { kind, n: 2, logprobs: 1 };
    const joined: Json[] = [{}, {}];
    for (const { choices } of stream(steps, request).slice(0, -1)) {
      for (const [name, values] of Object.entries<Json>(choices[0].logprobs ?? {})) {
        const own = joined[choices[0].index];
        own[name] = values && [...(own[name] ?? []), ...values];
      }
    }
    expect(joined).toEqual(body(steps, request).choices.map(({ logprobs }: Json) => logprobs));
  }
});

test("an error after the stream's begin is an event, and the list of models is a list", () => {
  const error = new ApiError(503, "The engine\nhas stopped.", { code: "engine_stopped" });
  expect(read(errorEvent(error))).toEqual([{ error: { message: "The engine\nhas stopped.", type: "server_error", param: null, code: "engine_stopped" } }]); // biome-ignore format: one line
  expect(JSON.parse(modelList(tinyModel))).toEqual({
    object: "list",
    data: [{ id: "tiny", object: "model", created: tinyModel.created, owned_by: "vispec" }],
  });
});
