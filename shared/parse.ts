/** A request body to a checked request; turns JSON's and zod's complaints into one that names the place. */
import type { z } from "zod";
import { ChatRequest, CompletionRequest } from "./api.ts";
import { ApiError } from "./errors.ts";
import { LIMITS } from "./limits.ts";
import { REFUSED } from "./refused.ts";

type Issue = z.core.$ZodIssue;

/** Parses the body of POST /v1/chat/completions. Throws ApiError 400 that names the position or the parameter. */
export function parseChatRequest(body: string | Uint8Array): ChatRequest {
  return parseBody(ChatRequest, body);
}

/** Parses the body of POST /v1/completions. Throws ApiError 400 that names the position or the parameter. */
export function parseCompletionRequest(body: string | Uint8Array): CompletionRequest {
  return parseBody(CompletionRequest, body);
}

/** Parses a JSON body (bytes: UTF-8) and checks it against a schema. Throws ApiError 400 as above. */
export function parseBody<T>(schema: z.ZodType<T>, body: string | Uint8Array): T {
  const text = typeof body === "string" ? body : decode(body);
  checkSize(text);
  const result = schema.safeParse(parseJson(text));
  if (result.success) return result.data;
  const { path, message, code } = describe(result.error.issues[0], []);
  const name = fieldName(path);
  throw new ApiError(400, name ? `${name}: ${message}` : message, { param: name || undefined, code });
}

function decode(body: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: false }).decode(body);
  } catch (cause) {
    throw new ApiError(400, "The body is not valid UTF-8.", { code: "invalid_utf8", cause });
  }
}

/** Throws ApiError 400 when the text begins more JSON values than may be, without parsing it. */
function checkSize(text: string): void {
  let values = 0;
  for (let i = 0; i < text.length; i++) {
    const character = text.charCodeAt(i);
    if (character === QUOTE) {
      i = endOfString(text, i);
    } else if (character === COMMA || character === BRACKET || character === BRACE) {
      if (++values > LIMITS.values)
        throw new ApiError(400, `The body has more than ${LIMITS.values} JSON values.`, { code: "too_many_values" });
    }
  }
}

const [QUOTE, COMMA, BRACKET, BRACE, BACKSLASH] = [...'",[{\\'].map((character) => character.charCodeAt(0));

/** Where the string that begins at `start` has its closing quote; the text's length if it has none. */
function endOfString(text: string, start: number): number {
  for (let end = text.indexOf('"', start + 1); end >= 0; end = text.indexOf('"', end + 1)) {
    let backslashes = 0;
    while (text.charCodeAt(end - 1 - backslashes) === BACKSLASH) backslashes++;
    if (backslashes % 2 === 0) return end;
  }
  return text.length;
}

function parseJson(body: string): unknown {
  try {
    return JSON.parse(body);
  } catch (cause) {
    const at = errorPosition(body, cause as Error);
    if (at === undefined) throw new ApiError(400, "The body is not valid JSON.", { code: "invalid_json", cause });
    const line = body.slice(0, at).split("\n").length;
    const column = at - body.lastIndexOf("\n", at - 1);
    const what =
      at >= body.length
        ? "it ends too early"
        : `unexpected ${JSON.stringify(String.fromCodePoint(body.codePointAt(at)!))}`;
    throw new ApiError(400, `The body is not valid JSON: ${what} at line ${line}, column ${column}.`, {
      code: "invalid_json",
      cause,
    });
  }
}

/** Bodies longer than this (characters) are not searched for what is wrong with them: that parses them again and again. */
const SEARCHED = 1 << 20;

/** Where JSON stops to be JSON. The engine's message does not always say; then the first prefix that fails is searched. */
function errorPosition(body: string, error: Error): number | undefined {
  const told = /at position (\d+)/.exec(error.message);
  if (told) return Number(told[1]);
  if (body.length > SEARCHED) return undefined;
  let low = 0;
  let high = body.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (canGoOn(body.slice(0, middle + 1))) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Whether the text is the beginning of some JSON: it parses, or what is wrong with it is its end. */
function canGoOn(prefix: string): boolean {
  try {
    JSON.parse(prefix);
    return true;
  } catch (error) {
    const message = (error as Error).message;
    const position = /at position (\d+)/.exec(message);
    return position ? Number(position[1]) >= prefix.length : message.includes("end of JSON input");
  }
}

interface Complaint {
  path: PropertyKey[];
  message: string;
  code?: string;
}

/** The field and what is wrong with it; of a union, the branch that the value got furthest in. */
function describe(issue: Issue, prefix: PropertyKey[]): Complaint {
  const path = [...prefix, ...issue.path];
  if (issue.code === "unrecognized_keys") return refusal([...path, issue.keys[0]]);
  if (issue.code === "invalid_key") return { path, message: issue.issues[0].message };
  if (issue.code === "invalid_union" && issue.errors.length > 0) {
    const firsts = issue.errors.map((branch) => branch[0]);
    const inner = firsts.find((first) => first.path.length > 0 || first.code !== "invalid_type");
    if (inner) return describe(inner, path);
    const expected = firsts.map((first) => (first.code === "invalid_type" ? first.expected : "value"));
    return { path, message: `must be ${expected.join(" or ")}` };
  }
  return { path, message: plainMessage(issue) };
}

function refusal(path: PropertyKey[]): Complaint {
  const name = path.filter((key) => typeof key === "string").join(".");
  const known = Object.hasOwn(REFUSED, name);
  const message = `this parameter is not supported${known ? `: ${REFUSED[name]}` : ""}`;
  return { path, message, code: known ? "unsupported_parameter" : "unknown_parameter" };
}

function plainMessage(issue: Issue): string {
  switch (issue.code) {
    case "invalid_type": {
      const expected = issue.expected === "int" ? "a whole number" : issue.expected;
      if (issue.message.includes("received undefined")) return `must be ${expected}, but is missing`;
      return `must be ${expected}${issue.message.replace(/^.*(?=, received)/, "")}`;
    }
    case "too_small":
      return issue.origin === "array" || issue.origin === "string"
        ? "must not be empty"
        : `must be ${issue.inclusive ? "at least" : "greater than"} ${issue.minimum}`;
    case "too_big": {
      const units = { string: " characters", array: " items" }[issue.origin as string];
      return `must ${units ? "have" : "be"} at most ${issue.maximum}${units ?? ""}`;
    }
    case "invalid_value":
      return `must be ${issue.values.length > 1 ? "one of " : ""}${issue.values.join(", ")}`;
    case "invalid_union":
      return `must be one of ${((issue as { options?: string[] }).options ?? []).join(", ")}`;
    default:
      return issue.message;
  }
}

/** `messages[0].content[1].type`; a key is whatever a client wrote, of any length. */
function fieldName(path: PropertyKey[]): string {
  return path.reduce<string>((name, key) => {
    if (typeof key === "number") return `${name}[${key}]`;
    const short = String(key).slice(0, 100).toWellFormed();
    return name ? `${name}.${short}` : short;
  }, "");
}
