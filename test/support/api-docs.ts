/** The tables of docs/api.md, made from the schemas, the OpenAPI document and the sources. */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { ApiKey } from "../../edge/keys.ts";
import { ERRORS, openApi } from "../../edge/openapi.ts";
import { ChatRequest, CompletionRequest } from "../../shared/api.ts";
import { REFUSED } from "../../shared/refused.ts";
import { ROOT } from "./cli.ts";

interface Schema {
  /** A list where null is one of them. */
  type?: string | string[];
  description?: string;
  const?: string;
  enum?: string[];
  anyOf?: Schema[];
  oneOf?: Schema[];
  properties?: Record<string, Schema>;
  additionalProperties?: Schema | boolean;
  required?: string[];
  items?: Schema;
  minimum?: number;
  exclusiveMinimum?: number;
  maximum?: number;
  minLength?: number;
  maxLength?: number;
  minItems?: number;
  maxItems?: number;
  pattern?: string;
}

interface Row {
  types: Set<string>;
  required: boolean;
  description: string;
}

/** Every parameter by its path, e.g. `stream_options.include_usage`, `messages[].content[].text`. */
export function parameters(schema: z.ZodType): Map<string, Row> {
  const rows = new Map<string, Row>();
  const visit = (schema: Schema, path: string, required: boolean, description = "") => {
    const text = schema.description ?? description;
    for (const variant of variantsOf(schema)) {
      if (variant.anyOf || variant.oneOf) {
        visit(variant, path, required, text);
        continue;
      }
      if (path !== "" && !path.endsWith("]")) {
        const row = rows.get(path) ?? { types: new Set(), required, description: "" };
        row.types.add(typeOf(variant));
        row.required &&= required;
        row.description ||= variant.description ?? text;
        rows.set(path, row);
      }
      for (const [name, inner] of Object.entries(variant.properties ?? {}))
        visit(inner, path ? `${path}.${name}` : name, variant.required?.includes(name) ?? false);
      if (variant.items) visit(variant.items, `${path}[]`, false);
    }
  };
  visit(z.toJSONSchema(schema, { unrepresentable: "any" }) as Schema, "", true);
  return rows;
}

/** The alternatives, without null. */
function variantsOf(schema: Schema): Schema[] {
  const { type } = schema;
  const types = Array.isArray(type) ? type.map((type) => ({ ...schema, type })) : [schema];
  return (schema.anyOf ?? schema.oneOf ?? types).filter((variant) => variant.type !== "null");
}

function typeOf(schema: Schema): string {
  if (schema.const !== undefined) return `\`${schema.const}\``;
  if (schema.enum) return schema.enum.map((value) => `\`${value}\``).join(" or ");
  const { minimum, exclusiveMinimum, maximum, minItems, maxItems, minLength, maxLength } = schema;
  const above = exclusiveMinimum === undefined ? undefined : `above ${exclusiveMinimum}`;
  switch (schema.type) {
    case "integer":
      return `whole number${bounds(above ?? minimum, maximum)}`;
    case "number":
      return `number${bounds(above ?? minimum, maximum)}`;
    case "string":
      return `text${bounds(minLength, maxLength, " characters")}`;
    case "array":
      return `list${bounds(minItems, maxItems, " items")} of ${plural(schema.items!)}`;
    case "boolean":
      return "true or false";
    default:
      return typeof schema.additionalProperties === "object"
        ? `object of ${plural(schema.additionalProperties)}`
        : "object";
  }
}

function plural(item: Schema): string {
  return variantsOf(item)[0].type === "object" ? "objects" : typeOf(item).replace(/^(text|number|whole number)/, "$1s");
}

/** " (0 to 2)"; bounds that hold for anything are left out. */
function bounds(low: number | string | undefined, high: number | undefined, unit = ""): string {
  const least = typeof low === "string" ? low : isBound(low) && !(unit && low! <= 1) ? `at least ${low}` : "";
  const most = isBound(high) ? `at most ${high}${unit}` : "";
  if (typeof low === "number" && isBound(low) && most && !(unit && low === 0)) return ` (${low} to ${high}${unit})`;
  const both = [least, most].filter((part) => part !== "").join(", ");
  return both && ` (${both})`;
}

function isBound(bound: number | undefined): boolean {
  return bound !== undefined && Math.abs(bound) !== Number.MAX_SAFE_INTEGER;
}

const cell = (text: string) => text.replaceAll("|", "\\|");
function table(heads: string[], rows: string[][]): string {
  return [heads, heads.map(() => "---"), ...rows].map((row) => `| ${row.map(cell).join(" | ")} |`).join("\n");
}

function parameterTable(schema: z.ZodType): string {
  const rows = [...parameters(schema)].map(([path, { types, required, description }]) => [
    `\`${path}\`${required ? " (required)" : ""}`,
    [...types].join(" or "),
    description,
  ]);
  return table(["parameter", "type", "what it does"], rows);
}

interface Document {
  paths: Record<string, Record<string, { summary: string; security?: []; responses: Record<string, object> }>>;
}

function endpointTable(): string {
  const { paths } = openApi() as Document;
  const rows = Object.entries(paths).flatMap(([path, { parameters: _, ...methods }]) =>
    Object.entries(methods).map(([method, { summary, security, responses }]) => [
      `\`${method.toUpperCase()} ${path}\``,
      summary,
      security ? "no" : "yes",
      Object.keys(responses).join(", "),
    ]),
  );
  return table(["endpoint", "what it does", "asks for a key", "statuses"], rows);
}

/** The tables by the names of their places in docs/api.md. */
export const TABLES: Record<string, () => string> = {
  endpoints: endpointTable,
  chat: () => parameterTable(ChatRequest),
  completion: () => parameterTable(CompletionRequest),
  keys: () => parameterTable(ApiKey),
  refused: () =>
    table(
      ["parameter", "why"],
      Object.entries(REFUSED).map(([name, why]) => [`\`${name}\``, why]),
    ),
  errors: () =>
    table(
      ["status", "code", "meaning"],
      Object.entries(ERRORS)
        .toSorted(([, [a]], [, [b]]) => a - b)
        .map(([code, [status, meaning]]) => [String(status), `\`${code}\``, meaning]),
    ),
};

/** The page with its tables made anew, between `<!-- NAME -->` and `<!-- /NAME -->`. */
export function withTables(page: string): string {
  return page.replaceAll(
    /(<!-- (\w+) -->\n)[\s\S]*?(<!-- \/\2 -->)/g,
    (_all, start: string, name: string, end: string) => `${start}\n${TABLES[name]()}\n\n${end}`,
  );
}

/** The sources that answer requests, by their path. */
export function sources(): Map<string, string> {
  const files = ["edge", "shared", "gpu-worker"].flatMap((folder) =>
    readdirSync(join(ROOT, folder), { recursive: true, encoding: "utf8" })
      .filter((name) => name.endsWith(".ts"))
      .map((name) => join(folder, name)),
  );
  return new Map(files.map((file) => [file, readFileSync(join(ROOT, file), "utf8")]));
}
