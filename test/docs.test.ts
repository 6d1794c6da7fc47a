/** docs/api.md and /openapi.json against schemas and sources. With UPDATE_DOCS=1 the page's tables are written anew. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { z } from "zod";
import { ERRORS, openApi } from "../edge/openapi.ts";
import { startServer } from "../gpu-worker/service/server.ts";
import { ChatRequest, CompletionRequest } from "../shared/api.ts";
import { parameters, sources, TABLES, withTables } from "./support/api-docs.ts";
import { ROOT } from "./support/cli.ts";
import { finishOf, ScriptedEngine, say } from "./support/scripted-engine.ts";

const file = join(ROOT, "docs/api.md");
if (process.env.UPDATE_DOCS) writeFileSync(file, withTables(readFileSync(file, "utf8")));
const page = readFileSync(file, "utf8");
const found = (pattern: RegExp, of: (path: string) => boolean = () => true): Set<string> =>
  new Set([...sources()].filter(([path]) => of(path)).flatMap(([, text]) => [...text.matchAll(pattern)].map(([, name]) => name))); // biome-ignore format: one line

/** Codes as the sources write them: `code: "x"`, `code: known ? "x" : "y"`, `new Refusal("x", …)`. */
function codesIn(text: string): string[] {
  const expressions = [...text.matchAll(/\bcode\b\s*[:=](?![=>])([^,}\n]*)/g), ...text.matchAll(/new \w+\(("[a-z]+(?:_[a-z]+)+")/g)]; // biome-ignore format: one line
  return expressions.flatMap(([, expression]) => [...expression.matchAll(/"([a-z][a-z0-9_]*)"/g)].map(([, code]) => code)); // biome-ignore format: one line
}
/** Other codes: zod's, and the labels of a metric. */
const OTHERS = ["shared/api.ts", "gpu-worker/service/metrics.ts"];
/** Between the engine and its server, which makes it a 503. */
const INSIDE = ["gpu-worker/engine-local.ts image_missing 409"];

describe("docs/api.md", () => {
  test("has the tables that schemas and sources make (UPDATE_DOCS=1 writes them)", () => {
    expect([...page.matchAll(/<!-- (\w+) -->/g)].map(([, name]) => name).toSorted()).toEqual(Object.keys(TABLES).toSorted()); // biome-ignore format: one line
    expect(page).toBe(withTables(page));
  });

  test("has every error code of the sources, and no other", () => {
    const texts = [...sources()].filter(([path]) => !OTHERS.includes(path)).map(([, text]) => text);
    expect(Object.keys(ERRORS).toSorted()).toEqual([...new Set(texts.flatMap(codesIn))].toSorted());
  });

  test("has each code with the status that the sources give it", () => {
    let seen = 0;
    for (const [path, text] of sources()) {
      for (const [, status, , code] of text.matchAll(
        /new ApiError\(\s*(\d+)(?:(?!new ApiError)[\s\S]){1,400}?\bcode: ("([a-z0-9_]+)")/g,
      )) {
        // biome-ignore format: one line
        if (INSIDE.includes(`${path} ${code} ${status}`)) continue;
        expect([path, code, ERRORS[code]?.[0]]).toEqual([path, code, Number(status)]);
        seen++;
      }
    }
    expect(seen).toBeGreaterThan(25);
  });

  test("has every header that is read or set, and every setting", () => {
    // Those of the service; stores, and what fetches CUDA's provider, are clients of others.
    const service = (path: string) => !/^gpu-worker\/(store\/|cli\/cuda\.ts$)/.test(path);
    const headers = found(/\b(?:headers?(?:\.[gs]et)?|setHeader)\(\s*"([a-zA-Z-]+)"|headers\["([a-z-]+)"\]/g, service);
    const named = found(/^export const \w*HEADER = "([a-z-]+)"/gm);
    const settings = found(/process\.env\.([A-Z0-9_]+)/g, (path) => path.startsWith("gpu-worker/"));
    const bindings = found(/^ {2}([A-Z_]+): (?:string|Durable)/gm, (path) => path === "edge/config.ts");
    expect([headers.size > 6, named.size, settings.size > 2, bindings.size]).toEqual([true, 1, true, 5]);
    // In a table's first column, or where the settings of the command line are.
    const places = page.split("\n").map((line) => (line.startsWith("|") ? line.split(" | ")[0] : ""));
    const models = readFileSync(join(ROOT, "docs/models.md"), "utf8");
    const told = [...places, page.slice(page.indexOf("\nEnvironment of")), models].join().toLowerCase();
    const missing = [...headers, ...named, ...settings, ...bindings].filter(
      (name) => name && !told.includes(`\`${name.toLowerCase()}\``),
    );
    expect(missing).toEqual([]);
  });

  test("has the GPU worker's endpoints", () => {
    const routes = found(/"((?:GET|POST|PUT) \/[^"]*)": \(/g, (path) => path === "gpu-worker/service/server.ts");
    expect(routes.size).toBeGreaterThan(5);
    expect([...routes].filter((route) => !page.includes(`\`${route}`))).toEqual([]);
  });
});

describe("the OpenAPI document", () => {
  interface Operation {
    requestBody?: { content: { "application/json": { schema: object } } };
    responses: Record<string, { description: string; content: object; headers: object }>;
  }
  const document = openApi() as {
    openapi: string;
    paths: Record<string, Record<string, Operation>>;
    components: { schemas: Record<string, { properties: Record<string, object> }>; securitySchemes: object };
  };
  const { schemas } = document.components;

  test("is whole: each reference leads somewhere, each schema is used, each status has its codes", () => {
    const refs = new Set([...JSON.stringify(document).matchAll(/"\$ref":"#\/components\/schemas\/(\w+)"/g)].map(([, name]) => name)); // biome-ignore format: one line
    expect([...refs].toSorted()).toEqual(Object.keys(schemas).toSorted());
    expect(JSON.stringify(document)).not.toContain("$schema");
    expect(document.openapi).toMatch(/^3\.1\./);
    for (const { parameters: _, ...methods } of Object.values(document.paths)) {
      for (const { responses } of Object.values(methods)) {
        expect(Object.keys(responses)).toContain("200");
        for (const [status, { description, content }] of Object.entries(responses)) {
          expect(content).toBeDefined();
          if (status !== "200") expect(description, status).toMatch(/^Codes: [a-z_]+/);
        }
      }
    }
  });

  test("has every parameter of the schemas, with its description", () => {
    for (const [name, schema] of [
      ["ChatRequest", ChatRequest],
      ["CompletionRequest", CompletionRequest],
    ] as const) {
      // biome-ignore format: one line
      expect(Object.keys(schemas[name].properties)).toEqual(Object.keys(schema.shape));
      for (const [parameter, { description }] of parameters(schema))
        if (!parameter.includes(".") && !parameter.includes("[")) expect(description, parameter).not.toBe("");
    }
  });

  test("says of each generating endpoint what it takes, and that it may stream", () => {
    for (const path of ["/v1/chat/completions", "/v1/completions"]) {
      const { post } = document.paths[path];
      expect(post.requestBody!.content["application/json"].schema).toHaveProperty("$ref");
      expect(Object.keys(post.responses["200"].content)).toEqual(["application/json", "text/event-stream"]);
      expect(post.responses["429"].headers).toHaveProperty("retry-after");
    }
  });

  /** The schema as zod has it, references followed, and with no property that it does not name. */
  const strict = (value: unknown): never => {
    if (Array.isArray(value)) return value.map(strict) as never;
    if (typeof value !== "object" || value === null) return value as never;
    const { $ref, ...rest } = value as { $ref?: string; properties?: object };
    if ($ref) return strict(schemas[$ref.split("/").at(-1)!]);
    const inner = Object.fromEntries(Object.entries(rest).map(([key, of]) => [key, strict(of)]));
    return (rest.properties ? { ...inner, additionalProperties: false } : inner) as never;
  };
  const complaint = (name: string, value: unknown) => z.fromJSONSchema(strict(schemas[name])).safeParse(value).error;

  test("describes the answers as they are", async () => {
    const engine = new ScriptedEngine();
    engine.script = async function* (request) {
      const logprobs = request.logprobs === null ? undefined : [{ token: 40, logprob: -1, top: [{ token: 41, logprob: -2 }] }]; // biome-ignore format: one line
      yield { ...say("H"), tokens: [40], logprobs };
      yield { ...say(""), finish: finishOf(request, 2) };
    };
    const server = await startServer(engine, { port: 0, host: "127.0.0.1" });
    const ask = async (path: string, body: object) =>
      (await fetch(server.url + path, { method: "POST", body: JSON.stringify(body) })).text();
    const options = { stream: true, stream_options: { include_usage: true, include_drafts: true } };
    for (const [path, name, body, logprobs] of [
      ["/v1/chat/completions", "Chat", { messages: [{ role: "user", content: "Hi" }] }, { logprobs: true, top_logprobs: 1 }], // biome-ignore format: one row
      ["/v1/completions", "Completion", { prompt: "Hi" }, { logprobs: 1 }],
    ] as const) {
      for (const more of [{}, logprobs])
        expect(complaint(name, JSON.parse(await ask(path, { ...body, ...more })))).toBeUndefined();
      for (const more of [{}, options, { ...options, ...logprobs }]) {
        const chunks = (await ask(path, { ...body, stream: true, ...more })).trim().split("\n\n").slice(0, -1);
        expect(chunks.length).toBeGreaterThan(1);
        for (const chunk of chunks)
          expect(complaint(`${name}Chunk`, JSON.parse(chunk.slice(6))), chunk).toBeUndefined();
      }
      expect(complaint("Error", JSON.parse(await ask(path, { nonsense: 1 })))).toBeUndefined();
    }
    const models = (await (await fetch(`${server.url}/v1/models`)).json()) as { data: object[] };
    expect([complaint("Models", models), complaint("Model", models.data[0])]).toEqual([undefined, undefined]);
    expect(complaint("Model", { ...models.data[0], more: 1 })).toBeDefined();
    await server.close();
  });
});
