/** The public API's request bodies. Schemas only: their descriptions are what docs/api.md and /openapi.json say. */
import * as z from "zod";
import { LIMITS } from "./limits.ts";

const positive = z.int().min(1);

/**
 * An array whose check ends at its first wrong item. zod complains of each, and a body may have a million of them, in
 * arrays of arrays.
 */
const list = <T extends z.ZodType>(item: T, most: number) =>
  z
    .array(z.unknown())
    .max(most)
    .superRefine((values, context) => {
      for (const [at, value] of values.entries()) {
        const issue = item.safeParse(value).error?.issues[0];
        if (!issue) continue;
        context.addIssue({ ...issue, path: [at, ...issue.path] } as never);
        return;
      }
    })
    .pipe(z.array(item).min(1).max(most));

const isToken = (value: unknown) => Number.isSafeInteger(value) && (value as number) >= 0;
/** Token ids, of which again the first wrong one has to do. */
const tokens = z
  .array(z.unknown())
  .max(LIMITS.promptTokens)
  .superRefine((values, context) => {
    const at = values.findIndex((value) => !isToken(value));
    const message = "must be a token id; a prompt is one text or one list of ids";
    if (at >= 0) context.addIssue({ code: "custom", path: [at], message });
  })
  .pipe(z.array(z.int().min(0)).min(1));

const isObject = (value: unknown) => typeof value === "object" && value !== null && !Array.isArray(value);
/** zod leaves a key __proto__ out of records without a word. */
const isBiases = (value: unknown) =>
  isObject(value) &&
  !Object.hasOwn(value as object, "__proto__") &&
  Object.keys(value as object).length <= LIMITS.biases;

export const seed = z
  .int()
  .min(-(2 ** 53) + 1)
  .max(2 ** 53 - 1);

const stopString = z.string().min(1).max(LIMITS.stopCharacters);

/** What both endpoints take. A parameter that is not listed is refused by its name. */
const common = {
  model: z.string().nullish().describe("The model served; absent, it is that one. Any other name is a 404."),
  max_tokens: positive.nullish().describe("Most tokens of a choice; absent, as many as the context has room for."),
  n: positive
    .max(LIMITS.choices)
    .nullish()
    .describe("Choices from one prefill. Choice i is what `seed` + i alone would give."),
  temperature: z.number().min(0).max(2).nullish().describe("0 takes the likeliest token. Default 1."),
  top_p: z
    .number()
    .gt(0)
    .max(1)
    .nullish()
    .describe("Draws among the fewest likeliest tokens that reach this probability."),
  top_k: z.int().min(-1).nullish().describe("Draws among the k likeliest tokens; 0 or -1 is no limit."),
  min_p: z.number().min(0).max(1).nullish().describe("Drops tokens less likely than this times the likeliest."),
  seed: seed
    .nullish()
    .describe("The same seed gives the same text, whatever the drafter. Absent, each request draws its own."),
  presence_penalty: z
    .number()
    .min(-2)
    .max(2)
    .nullish()
    .describe("Taken from the logits of tokens that are in the answer so far."),
  frequency_penalty: z
    .number()
    .min(-2)
    .max(2)
    .nullish()
    .describe("As presence_penalty, times the number of occurrences."),
  repetition_penalty: z
    .number()
    .min(0.01)
    .max(2)
    .nullish()
    .describe("Divides the positive logits, multiplies the negative ones, of tokens in prompt or answer (vLLM)."),
  logit_bias: z
    .custom<object>(isBiases, `must be an object with at most ${LIMITS.biases} token ids`)
    .pipe(z.record(z.string().regex(/^(0|[1-9]\d{0,8})$/, "must be a token id"), z.number().min(-100).max(100)))
    .nullish()
    .describe("Token ids with what is added to their logits."),
  stop: z
    .union([stopString, z.array(stopString).max(LIMITS.stops)])
    .nullish()
    .describe("Strings before which a choice ends."),
  stop_token_ids: z
    .array(z.int().min(0))
    .max(LIMITS.stopTokens)
    .nullish()
    .describe("Tokens after which a choice ends (vLLM)."),
  ignore_eos: z.boolean().nullish().describe("Goes on after the end-of-sequence token, up to max_tokens (vLLM)."),
  stream: z.boolean().nullish().describe("Server-sent events instead of one body."),
  stream_options: z
    .strictObject({
      include_usage: z.boolean().nullish().describe("A last chunk with the usage."),
      include_drafts: z
        .boolean()
        .nullish()
        .describe(
          "Own extension: `draft` in every chunk says its tokens, how many were accepted drafts, how many of its first characters (UTF-16) those are, and the milliseconds since the choice's first tokens.",
        ),
    })
    .nullish()
    .describe("Needs stream."),
  drafter: z
    .enum(["vispec", "none"])
    .nullish()
    .describe("Own extension: `none` decodes without drafts. The text is the same."),
  service_tier: z
    .enum(["auto", "default", "priority", "flex"])
    .nullish()
    .describe(
      "`flex` is for work that can wait: everyone else's turn comes first, but for one turn in nine. The others are one tier. The answer says `default` or `flex`.",
    ),
  deadline: z
    .number()
    .gt(0)
    .max(LIMITS.deadline)
    .nullish()
    .describe(
      "Own extension: seconds in which the answer has to be complete, its wait included; then it ends with `deadline_exceeded`. The service has a limit of its own.",
    ),
  user: z
    .string()
    .max(LIMITS.userCharacters)
    .nullish()
    .describe("Written to the request's log line, for finding abuse."),
};

const TextPart = z.strictObject({
  type: z.literal("text").describe("What the part is."),
  text: z.string().describe("Of a text part. What spells a special token stays text."),
});
const area = positive.max(LIMITS.area);
const pixels = {
  min_pixels: area.nullish().describe("A smaller picture is enlarged to this area."),
  max_pixels: area.nullish().describe("A larger picture is shrunk to this area."),
};
/** A picture in a user's message. */
export const ImagePart = z.strictObject({
  type: z.literal("image_url"),
  image_url: z.strictObject({
    url: z
      .string()
      .min(1)
      .describe(
        "A base64 data: URL of a JPEG, PNG, WebP or GIF (first frame), an http(s) URL, or the name `sha256:HASH` of a picture that was sent before.",
      ),
    detail: z
      .enum(["auto", "low", "high"])
      .nullish()
      .describe(
        "`low` allows at most 512² pixels, and at most a quarter of the model's own limit, whatever min_pixels says; the others change nothing.",
      ),
    ...pixels,
  }),
  ...pixels,
});
export type ImagePart = z.infer<typeof ImagePart>;
const parts = <T extends z.ZodType>(part: T) =>
  z.union([z.string(), list(part, LIMITS.parts)]).describe("A text, or parts; only those of a user have pictures.");

/** One message of OpenAI's chat API. */
export const ChatMessage = z.discriminatedUnion("role", [
  z.strictObject({ role: z.literal("system").describe("Who speaks; developer is system."), content: parts(TextPart) }),
  z.strictObject({ role: z.literal("developer"), content: parts(TextPart) }),
  z.strictObject({ role: z.literal("user"), content: parts(z.discriminatedUnion("type", [TextPart, ImagePart])) }),
  // Clients send an answer's message back as it came, and that has refusal: null.
  z.strictObject({ role: z.literal("assistant"), content: parts(TextPart), refusal: z.null().optional() }),
]);
export type ChatMessage = z.infer<typeof ChatMessage>;

const ResponseFormat = z.discriminatedUnion("type", [
  z.strictObject({ type: z.literal("text").describe("`text` is any text.") }),
  z.strictObject({ type: z.literal("json_object") }),
  z.strictObject({
    type: z.literal("json_schema"),
    json_schema: z.strictObject({
      name: z
        .string()
        .regex(/^[\w-]{1,64}$/, "must be 1 to 64 letters, digits, _ or -")
        .describe("1 to 64 letters, digits, _ or -. Changes nothing."),
      description: z.string().nullish().describe("Changes nothing: what the model should know goes into a message."),
      strict: z
        .boolean()
        .nullish()
        .describe("True, the default: where the schema does not speak of other properties and items, there are none."),
      // Not a record: zod would leave out a key __proto__.
      schema: z.custom<Record<string, unknown>>(isObject, "must be an object").meta({
        type: "object",
        description: `A JSON schema of at most ${LIMITS.schemaCharacters} characters and ${LIMITS.schemaDepth} levels.`,
      }),
    }),
  }),
]);

/** The request body of POST /v1/chat/completions. */
export const ChatRequest = z.strictObject({
  messages: list(ChatMessage, LIMITS.messages).describe(
    "Roles system, developer, user, assistant; content as a string or as parts. Only user messages have pictures.",
  ),
  ...common,
  max_completion_tokens: positive.nullish().describe("As max_tokens, of which it is OpenAI's newer name; not both."),
  logprobs: z
    .boolean()
    .nullish()
    .describe("Log-probabilities of the chosen tokens, under the model before temperature, penalties and bias."),
  top_logprobs: z.int().min(0).max(20).nullish().describe("And of so many likeliest tokens. Needs logprobs."),
  response_format: ResponseFormat.nullish().describe(
    "`json_object` or `json_schema`: each token is drawn among those that the grammar allows.",
  ),
  min_pixels: area.nullish().describe("For every picture that does not say its own."),
  max_pixels: area.nullish().describe("For every picture that does not say its own."),
  mm_processor_kwargs: z.strictObject(pixels).nullish().describe("The same two under vLLM's name; not both."),
});
export type ChatRequest = z.infer<typeof ChatRequest>;

/** The request body of POST /v1/completions: plain text, no template and no pictures. */
export const CompletionRequest = z.strictObject({
  prompt: z.union([z.string(), tokens]).describe("One text, or one list of token ids."),
  ...common,
  logprobs: z
    .int()
    .min(0)
    .max(20)
    .nullish()
    .describe("Log-probabilities of the chosen and of so many likeliest tokens."),
});
export type CompletionRequest = z.infer<typeof CompletionRequest>;
