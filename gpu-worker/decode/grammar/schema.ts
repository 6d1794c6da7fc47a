/**
 * JSON Schema as a grammar in EBNF. What it cannot keep to it refuses by name, so that answers satisfy their schema (but
 * that oneOf is read as anyOf). The grammar library's own converter passes over many keywords without a word, writes
 * characters that JSON has to escape, and takes numbers that are out of range. Knows no tokens.
 */
import { ApiError } from "../../../shared/errors.ts";
import { type Bound, CHARACTER, patternExpression, rangeExpression } from "./pattern.ts";

type Schema = Record<string, unknown>;

const PARAM = "response_format.json_schema.schema";

export function refuseSchema(why: string, cause?: unknown): ApiError {
  return new ApiError(400, `${PARAM}: ${why}`, { code: "invalid_json_schema", param: PARAM, cause });
}

/** Any JSON, and what schemas' rules are made of. Blanks and digits are bounded: a model could go on with them for ever. */
const BASIC = String.raw`
ws ::= (" " | "\n" [ \t]{0,16})?
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws "}" | "{" ws member ("," ws member)* "}"
member ::= string ws ":" ws value ws
array ::= "[" ws "]" | "[" ws value ws ("," ws value ws)* "]"
string ::= "\"" characters
characters ::= "\"" | ${CHARACTER} characters | "\\" (escape | "u" [0-9a-fA-F]{4}) characters
character ::= ${CHARACTER} | "\\" escape
escape ::= ["\\/bfnrt]
number ::= "-"? ("0" | [1-9] [0-9]{0,18}) ("." [0-9]{1,18})? ([eE] [+-]? [0-9]{1,2})?
`;

/** Keywords that say nothing of what is valid. */
const NOTES = "title description default examples deprecated readOnly writeOnly $comment $schema $id".split(" ");
const DEFINITIONS = ["$defs", "definitions"];
/** Keywords that decide alone, and which may stand beside them. */
const ALONE: Record<string, string[]> = { $ref: [], const: ["type"], enum: ["type"], anyOf: [], oneOf: [], allOf: [] };
const TYPES: Record<string, string[]> = {
  object: ["properties", "required", "additionalProperties"],
  array: ["items", "prefixItems", "minItems", "maxItems"],
  string: ["pattern", "format", "minLength", "maxLength"],
  integer: ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"],
  number: ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"],
  boolean: [],
  null: [],
};

const BYTE = String.raw`(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)`;
const DATE = String.raw`\d{4}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))`;
const DAYS = String.raw`(\d+Y(\d+M(\d+D)?)?|\d+M(\d+D)?|\d+D)`;
const HOURS = String.raw`T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S)`;
const TIME = String.raw`([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)`;
const HOST = String.raw`[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)*`;
/** Formats as regular expressions that need not match all that is valid. */
const FORMATS: Record<string, string> = {
  date: DATE,
  time: TIME,
  "date-time": `${DATE}T${TIME}`,
  duration: String.raw`P(${DAYS}(${HOURS})?|${HOURS}|\d+W)`,
  email: String.raw`[A-Za-z0-9]+([._+-][A-Za-z0-9]+)*@${HOST}\.[a-z]{2,}`,
  hostname: HOST,
  ipv4: String.raw`(${BYTE}\.){3}${BYTE}`,
  ipv6: "([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
  uri: String.raw`[a-z]+://${HOST}(:\d{1,4})?(/[\w.~-]*)*(\?[\w.~&=-]*)?(#[\w.~-]*)?`,
  uuid: "[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}",
};

/** A schema's text as a grammar. Strict: objects have no properties but those that are named. Throws ApiError 400. */
export function schemaGrammar(text: string, strict: boolean): string {
  let schema: unknown;
  try {
    schema = JSON.parse(text);
  } catch (cause) {
    throw refuseSchema("is not JSON", cause);
  }
  return new Converter(schema as Schema, strict).grammar();
}

class Converter {
  readonly #root: Schema;
  readonly #strict: boolean;
  readonly #rules: string[] = [];
  /** Rules of what references point to. */
  readonly #referred = new Map<string, string>();

  constructor(root: Schema, strict: boolean) {
    this.#root = root;
    this.#strict = strict;
  }

  grammar(): string {
    return `root ::= ${this.#reference("#", "")}\n${BASIC}${this.#rules.join("\n")}\n`;
  }

  /** A new rule's name; its body may name it. */
  #rule(body: (name: string) => string): string {
    const at = this.#rules.push("") - 1;
    const name = `r${at}`;
    this.#rules[at] = `${name} ::= ${body(name)}`;
    return name;
  }

  #reference(ref: unknown, at: string): string {
    const [, folder, name] = /^#(?:\/(\$defs|definitions)\/([^/~%]+))?$/.exec(String(ref)) ?? [null, null, ""];
    if (folder === null) throw refuse(at, `$ref has to be "#" or to point into "#/$defs/"`);
    const known = this.#referred.get(String(ref));
    if (known) return known;
    const all = folder === undefined ? undefined : (this.#root[folder] as Schema | undefined);
    if (folder !== undefined && !Object.hasOwn(all ?? {}, name)) throw refuse(at, `there is no ${ref}`);
    return this.#rule((rule) => {
      this.#referred.set(String(ref), rule);
      return folder === undefined ? this.#schema(this.#root, "") : this.#schema(all![name], `/${folder}/${name}`);
    });
  }

  /** What a schema allows, as an expression that can stand anywhere. */
  #schema(given: unknown, at: string): string {
    if (given === true) return "value";
    if (typeof given !== "object" || given === null || Array.isArray(given)) throw refuse(at, "is no schema that allows something"); // biome-ignore format: one line
    const schema = given as Schema;
    const alone = Object.keys(ALONE).find((key) => Object.hasOwn(schema, key));
    const types = alone ? [] : typesOf(schema, at);
    const allowed = alone ? [alone, ...ALONE[alone]] : types.flatMap((type) => ["type", ...TYPES[type]]);
    const notes = at === "" ? [...NOTES, ...DEFINITIONS] : NOTES;
    const other = Object.keys(schema).find((key) => !allowed.includes(key) && !notes.includes(key));
    if (other !== undefined) throw refuse(at, `the keyword ${JSON.stringify(other)} is not supported here`);
    if (alone) return this.#alone(alone, schema, at);
    if (types.length === 0) return "value";
    return `(${types.map((type) => this.#typed(type, schema, at)).join(" | ")})`;
  }

  #alone(keyword: string, { [keyword]: value, type }: Schema, at: string): string {
    if (keyword === "$ref") return this.#reference(value, at);
    const list = keyword === "const" ? [value] : value;
    if (!Array.isArray(list) || list.length === 0) throw refuse(at, `${keyword} must be an array`);
    if (keyword === "const" || keyword === "enum") {
      const types = type === undefined ? Object.keys(TYPES) : [type].flat();
      const values = list.filter(
        (one) => types.includes(typeOf(one)) || (types.includes("integer") && Number.isInteger(one)),
      );
      if (values.length === 0) throw refuse(at, `${keyword} has no value of the type`);
      return `(${values.map((one) => literal(JSON.stringify(one))).join(" | ")})`;
    }
    if (keyword === "allOf" && list.length > 1) throw refuse(at, "allOf is supported for one schema only");
    return `(${list.map((one, i) => this.#schema(one, `${at}/${keyword}/${i}`)).join(" | ")})`;
  }

  #typed(type: string, schema: Schema, at: string): string {
    if (type === "object") return this.#rule(() => this.#object(schema, at));
    if (type === "array") return this.#rule(() => this.#array(schema, at));
    if (type === "string") return string(schema, at);
    if (type === "boolean") return `("true" | "false")`;
    return type === "null" ? `"null"` : number(schema, at, type === "integer");
  }

  /**
   * The properties that are named, in their order, those that are not required maybe left out. Others come only where
   * none is named: to leave them out is always right.
   */
  #object({ properties = {}, required = [], additionalProperties = !this.#strict }: Schema, at: string): string {
    if (typeOf(properties) !== "object") throw refuse(at, "properties must be an object");
    if (!Array.isArray(required)) throw refuse(at, "required must be an array");
    const named = Object.entries(properties as Schema);
    const unknown = required.find((name) => !Object.hasOwn(properties as Schema, name));
    if (unknown !== undefined) throw refuse(at, `required has ${JSON.stringify(unknown)}, which properties lacks`);
    if (named.length > 0) return this.#properties(named, required, at);
    if (additionalProperties === false) return `"{" ws "}"`;
    const other = this.#schema(additionalProperties, `${at}/additionalProperties`);
    const pair = this.#rule(() => `string ws ":" ws ${other} ws`);
    return `"{" ws "}" | "{" ws ${pair} ("," ws ${pair})* "}"`;
  }

  #properties(named: [string, unknown][], required: string[], at: string): string {
    const end = `"}"`;
    const objects = required.length === 0 ? [`"{" ws ${end}`] : [];
    let rest = end;
    // From the last to the first: what may begin the object, and what follows a property. (That no rule of these may be
    // empty is for the library, which goes wrong on such.)
    for (const [name, schema] of named.toReversed()) {
      const value = this.#schema(schema, `${at}/properties/${name}`);
      const pair = this.#rule(() => `${literal(JSON.stringify(name))} ws ":" ws ${value} ws`);
      const optional = !required.includes(name);
      if (!optional) objects.length = 0;
      const after = rest;
      objects.push(`"{" ws ${pair} ${after}`);
      rest = this.#rule(() => `"," ws ${pair} ${after}${optional ? ` | ${after}` : ""}`);
    }
    return objects.join(" | ");
  }

  /** First the prefixItems, all of them, then items. */
  #array({ prefixItems = [], minItems, maxItems, ...schema }: Schema, at: string): string {
    if (!Array.isArray(prefixItems)) throw refuse(at, "prefixItems must be an array");
    const first = prefixItems.map((one, i) => this.#schema(one, `${at}/prefixItems/${i}`));
    const { items = first.length === 0 || !this.#strict } = schema;
    const [least, most] = counts(minItems, maxItems, "Items", at);
    const other =
      items === false || most <= first.length ? undefined : this.#rule(() => this.#schema(items, `${at}/items`));
    if (most < first.length || (least > first.length && !other)) throw refuse(at, "no array has so many items");
    const more = (already: number) =>
      other && `("," ws ${other} ws){${Math.max(0, least - already)},${Number.isFinite(most) ? most - already : ""}}`;
    const start = `"[" ws`;
    if (first.length > 0) return `${start} ${first.join(` ws "," ws `)} ws ${more(first.length) ?? ""} "]"`;
    const arrays = least === 0 ? [`${start} "]"`] : [];
    if (other) arrays.push(`${start} ${other} ws ${more(1)} "]"`);
    return arrays.join(" | ");
  }
}

function typesOf({ type, ...schema }: Schema, at: string): string[] {
  const implied = ["object", "array"].filter((name) => TYPES[name].some((key) => Object.hasOwn(schema, key)));
  const types = type === undefined ? implied : [type].flat();
  const unknown = types.find((name) => typeof name !== "string" || !Object.hasOwn(TYPES, name));
  if (unknown !== undefined) throw refuse(at, `${JSON.stringify(unknown)} is no type`);
  return [...new Set(types as string[])];
}

function typeOf(value: unknown): string {
  return value === null ? "null" : Array.isArray(value) ? "array" : typeof value;
}

function string({ pattern, format, minLength, maxLength }: Schema, at: string): string {
  const given = [pattern, format, minLength ?? maxLength].filter((value) => value !== undefined);
  if (given.length > 1) throw refuse(at, "only one of pattern, format and minLength with maxLength can be kept to");
  if (given.length === 0) return "string";
  if (pattern === undefined && format === undefined) {
    const [least, most] = counts(minLength, maxLength, "Length", at);
    return `("\\"" character{${least},${Number.isFinite(most) ? most : ""}} "\\"")`;
  }
  if (format !== undefined && !Object.hasOwn(FORMATS, String(format)))
    throw refuse(at, `the format ${JSON.stringify(format)} is not supported`);
  if (format === undefined && typeof pattern !== "string") throw refuse(at, "pattern must be a string");
  const expression = format === undefined ? (pattern as string) : FORMATS[String(format)];
  return `(${patternExpression(expression, (why, cause) => refuse(at, `pattern: ${why}`, cause))})`;
}

function number(schema: Schema, at: string, integer: boolean): string {
  const bounds = TYPES.number.map((key) => schema[key]);
  if (!integer && bounds.every((bound) => bound === undefined)) return "number";
  const round = (bound: unknown, up: boolean, open: boolean): Bound | undefined => {
    if (bound === undefined) return undefined;
    if (typeof bound !== "number") throw refuse(at, "its bounds must be numbers");
    // An integer above 1.5 is one from 2 on.
    const value = up ? Math.ceil(bound) : Math.floor(bound);
    if (!Number.isSafeInteger(value) || (!integer && value !== bound)) throw refuse(at, `the bound ${bound} is not supported: it has to be whole`); // biome-ignore format: one line
    return { value, open: open && value === bound };
  };
  const [minimum, maximum, above, below] = bounds;
  const from = tighter(round(minimum, true, false), round(above, true, true), 1);
  const to = tighter(round(maximum, false, false), round(below, false, true), -1);
  return rangeExpression(from, to, integer, (why) => refuse(at, why));
}

/** The bound that allows less; `sign` 1 for lower bounds, -1 for upper ones. */
function tighter(closed: Bound | undefined, open: Bound | undefined, sign: number): Bound {
  if (!closed || !open) return closed ?? open ?? { value: -sign * Number.POSITIVE_INFINITY, open: false };
  return sign * (open.value - closed.value) >= 0 ? open : closed;
}

function counts(
  least: unknown = 0,
  most: unknown = Number.POSITIVE_INFINITY,
  what: string,
  at: string,
): [number, number] {
  const isCount = (value: unknown) => value === Number.POSITIVE_INFINITY || (Number.isSafeInteger(value) && (value as number) >= 0); // biome-ignore format: one line
  if (!isCount(least) || !isCount(most)) throw refuse(at, `min${what} and max${what} must be whole numbers`);
  if ((least as number) > (most as number)) throw refuse(at, `min${what} is more than max${what}`);
  return [least as number, most as number];
}

/** A text as it is. */
function literal(text: string): string {
  return `"${text.replace(/["\\]/g, "\\$&")}"`;
}

function refuse(at: string, why: string, cause?: unknown): ApiError {
  return refuseSchema(at === "" ? why : `#${at}: ${why}`, cause);
}
