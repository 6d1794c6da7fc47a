/** docs/api.md and /openapi.json against schemas and sources. With UPDATE_DOCS=1 the page's tables are written anew. */
import { execFile, spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
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

describe("the helper that names pictures", () => {
  const params = {
    model: "tiny",
    messages: [
      { role: "system", content: "Be brief." },
      {
        role: "user",
        content: [
          { type: "image_url", image_url: { url: "data:image/png;base64,AQID" } },
          { type: "text", text: "What?" },
        ],
      },
    ],
  };
  /** What the helper needs of Python's `openai`, which is not there where these tests run. */
  const OPENAI_PY = `
import json, types, urllib.error, urllib.request

class NotFoundError(Exception):
    pass

class OpenAI:
    def __init__(self, base_url):
        self.url = base_url + "/chat/completions"
        self.chat = types.SimpleNamespace(completions=self)

    def create(self, **params):
        try:
            answer = urllib.request.urlopen(urllib.request.Request(self.url, json.dumps(params).encode()))
        except urllib.error.HTTPError as refusal:
            error = NotFoundError()
            error.code = json.load(refusal)["error"]["code"]
            raise error
        return json.load(answer, object_hook=lambda fields: types.SimpleNamespace(**fields))
`;
  const TWICE_TS = `
const [url, params] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
for (let i = 0; i < 2; i++) console.log((await create(client, JSON.parse(params))).choices[0].message.content);
`;
  const TWICE_PY = `
import json, sys
client = openai.OpenAI(base_url=sys.argv[1])
for _ in range(2):
    print(create(client, **json.loads(sys.argv[2])).choices[0].message.content)
`;

  test.for([
    ["ts", process.execPath, TWICE_TS],
    ["python", "python3", TWICE_PY],
  ])("sends the bytes once: %s", async ([language, command, twice], { skip, onTestFinished }) => {
    if (language === "python") skip(spawnSync("python3", ["--version"]).status !== 0, "there is no Python");
    const [, code] = new RegExp(`\`\`\`${language}\n([\\s\\S]*?)\`\`\``).exec(page)!;
    const folder = mkdtempSync(join(tmpdir(), "vispec-docs-"));
    onTestFinished(() => rmSync(folder, { recursive: true }));
    symlinkSync(join(ROOT, "node_modules"), join(folder, "node_modules"));
    writeFileSync(join(folder, "openai.py"), OPENAI_PY);
    writeFileSync(join(folder, `create.${language}`), code + twice);
    const engine = new ScriptedEngine();
    const server = await startServer(engine, { port: 0, host: "127.0.0.1" });
    onTestFinished(() => server.close());
    const args = [join(folder, `create.${language}`), `${server.url}/v1`, JSON.stringify(params)];
    const { stdout } = await promisify(execFile)(command, args, { env: { ...process.env, no_proxy: "127.0.0.1" } });
    expect(stdout).toBe("Hello there\nHello there\n");
    expect([engine.puts.length, engine.requests.length]).toEqual([1, 2]);
    // The name alone was asked for first, and was enough the second time.
    const metrics = await (await fetch(`${server.url}/metrics`)).text();
    expect(metrics).toMatch(/^vispec:requests_refused_total\{code="image_not_found",.*\} 1$/m);
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
