/** A request body to a checked ChatRequest; turns JSON's and zod's complaints into one that names the place. */
import type { z } from "zod";
import { ApiError } from "./errors.ts";
import { ChatRequest } from "./protocol.ts";

type Issue = z.core.$ZodIssue;

/** Parses the body of POST /v1/chat/completions. Throws ApiError 400 that names the position or the parameter. */
export function parseChatRequest(body: string): ChatRequest {
  return parseBody(ChatRequest, body);
}

/** Parses a JSON body and checks it against a schema. Throws ApiError 400 that names the position or the field. */
export function parseBody<T>(schema: z.ZodType<T>, body: string): T {
  const result = schema.safeParse(parseJson(body));
  if (result.success) return result.data;
  const { path, message, code } = describe(result.error.issues[0], []);
  throw new ApiError(400, path ? `${path}: ${message}` : message, { param: path || undefined, code });
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

/** Names the field and what is wrong with it; of a union, the branch that the value got furthest in. */
function describe(issue: Issue, prefix: PropertyKey[]): { path: string; message: string; code?: string } {
  const path = [...prefix, ...issue.path];
  if (issue.code === "unrecognized_keys") {
    const name = fieldName([...path, issue.keys[0]]);
    return { path: name, message: "this parameter is not supported", code: "unknown_parameter" };
  }
  if (issue.code === "invalid_union" && issue.errors.length > 0) {
    const firsts = issue.errors.map((branch) => branch[0]);
    const inner = firsts.find((first) => first.path.length > 0 || first.code !== "invalid_type");
    if (inner) return describe(inner, path);
    const expected = firsts.map((first) => (first.code === "invalid_type" ? first.expected : "value"));
    return { path: fieldName(path), message: `must be ${expected.join(" or ")}` };
  }
  return { path: fieldName(path), message: plainMessage(issue) };
}

function plainMessage(issue: Issue): string {
  switch (issue.code) {
    case "invalid_type":
      return `must be ${issue.expected}${issue.message.includes("received undefined") ? ", but is missing" : issue.message.replace(/^.*(?=, received)/, "")}`;
    case "too_small":
      return issue.origin === "array" || issue.origin === "string"
        ? "must not be empty"
        : `must be ${issue.inclusive ? "at least" : "greater than"} ${issue.minimum}`;
    case "too_big":
      return `must be at most ${issue.maximum}${issue.origin === "array" ? " items" : ""}`;
    case "invalid_union":
      return `must be one of ${((issue as { options?: string[] }).options ?? []).join(", ")}`;
    default:
      return issue.message;
  }
}

/** `messages[0].content[1].type` */
function fieldName(path: PropertyKey[]): string {
  return path.reduce<string>(
    (name, key) => (typeof key === "number" ? `${name}[${key}]` : name ? `${name}.${String(key)}` : String(key)),
    "",
  );
}
