/** What cannot be used is refused with one line that names the file, the field or the tensor: exit code 2, or status 400. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { crc32 } from "node:zlib";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { LocalEngine } from "../gpu-worker/engine-local.ts";
import { CheckpointError } from "../shared/errors.ts";
import { Checkpoint, convert, readTensors, writeTensors } from "./support/checkpoint.ts";
import { type Ended, vispec } from "./support/cli.ts";
import { type Case, cases, collect, dataUrl, GOLDENS, prepare } from "./support/goldens.ts";
import { type Stack, startStack } from "./support/stack.ts";

/** Exit code 2 and one line that has all of `parts`. */
function expectRefused(ended: Ended, ...parts: (string | RegExp)[]): void {
  expect(ended).toMatchObject({ code: 2, stdout: "" });
  expect(ended.stderr).toMatch(/^vispec: .+\n$/); // `.` matches no line end, so it is one line
  for (const part of parts) expect(ended.stderr).toMatch(part);
}

/** A PNG of that size that has no data. */
function emptyPng(width: number, height: number): Buffer {
  const chunk = (type: string, data: Buffer) => {
    const body = Buffer.concat([Buffer.from(type), data]);
    const ends = [Buffer.alloc(4), Buffer.alloc(4)];
    ends[0].writeUInt32BE(data.length);
    ends[1].writeUInt32BE(crc32(body));
    return Buffer.concat([ends[0], body, ends[1]]);
  };
  const header = Buffer.from("\0\0\0\0\0\0\0\0\x08\x02\0\0\0", "latin1");
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  const magic = Buffer.from("\x89PNG\r\n\x1a\n", "latin1");
  return Buffer.concat([magic, chunk("IHDR", header), chunk("IDAT", Buffer.alloc(0))]);
}

const images: [name: string, bytes: Buffer, message: RegExp][] = [
  ["zero.png", Buffer.alloc(0), /empty \(0 bytes\)/],
  ["truncated.jpg", readFileSync(join(GOLDENS, "images/bad-truncated.jpg")), /JPEG image is truncated or damaged/],
  ["huge.png", emptyPng(30_000, 30_000), /30000x30000 pixels; at most 64000000/],
  ["drawing.svg", Buffer.from('<svg xmlns="http://www.w3.org/2000/svg"/>'), /SVG format are not supported/],
  ["text.png", Buffer.from("this is no picture"), /not an image/],
];
const user = (content: unknown) => [{ role: "user", content }];
const hi = user("Hi");
const long = user("word ".repeat(4200));
const beyond = /(prompt has \d+ tokens|have \d+ characters); the model's context is 4096/;

describe.each(["url", "workerUrl"] as const)("over HTTP, at the stack's %s", (at) => {
  let stack: Stack;
  beforeAll(async () => {
    stack = await startStack();
  });
  afterAll(() => stack?.close());

  const image = (bytes: Buffer) => ({
    type: "image_url",
    image_url: { url: `data:image/png;base64,${bytes.toString("base64")}` },
  });
  const picture = dataUrl("images/size-28x28.png");
  test.each([
    ['{"messages": [}', null, 'not valid JSON: unexpected "}" at line 1, column 15'],
    ['{"temperature": NaN}', null, 'not valid JSON: unexpected "N" at line 1, column 17'],
    [{ messages: hi, temperature: "NaN" }, "temperature", "must be number"],
    [{ messages: [{ role: "robot", content: "x" }] }, "messages[0].role", "must be one of system, developer, user"],
    [{}, "messages", "missing"],
    [{ messages: [] }, "messages", "must not be empty"],
    [{ messages: hi, max_tokens: 0 }, "max_tokens", "must be at least 1"],
    [{ messages: long }, "messages", beyond],
    [{ messages: user([{ type: "image_url", image_url: { url: picture } }, { type: "text", text: "word ".repeat(4090) }]) }, "messages", beyond], // biome-ignore format: one row
    ...images.map(([, bytes, message]) => [
      { messages: user([{ type: "text", text: "What?" }, image(bytes)]) },
      "messages[0].content[1]",
      message,
    ]),
  ] as [unknown, string | null, string | RegExp][])("%.90j: %s", async (body, param, message) => {
    const text = typeof body === "string" ? body : JSON.stringify(body);
    const response = await fetch(`${stack[at]}/v1/chat/completions`, { method: "POST", body: text });
    expect(response.status).toBe(400);
    const { error } = (await response.json()) as { error: { message: string; param: string | null } };
    expect(error.message).toMatch(message);
    expect(error.param).toBe(param);
    if (param?.includes(".")) expect(error.message.startsWith(`${param}: `)).toBe(true);
  });
});

describe("on the command line", () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), "vispec-"));
    for (const [name, bytes] of images) writeFileSync(join(folder, name), bytes);
  });
  afterAll(() => rmSync(folder, { recursive: true }));
  const generate = (...args: string[]) => vispec(["generate", "--json", ...args]);

  test.concurrent.each(images)("the image %s", async (name, _bytes, message) => {
    const file = join(folder, name);
    expectRefused(await generate("--prompt", "What?", "--image", file), `image ${file}`, message);
    // Both ways read a picture alike.
    if (name !== images[0][0] && name !== images.at(-1)![0]) return;
    const messages = join(folder, `${name}.json`);
    writeFileSync(messages, JSON.stringify(user([{ type: "image_url", image_url: { url: name } }])));
    expectRefused(await generate("--messages", messages), name, message);
  });

  test.concurrent.each([
    ["malformed", "[{", /malformed\.json: malformed JSON/],
    ["role", JSON.stringify([{ role: "robot", content: "x" }]), /messages\[0\]\.role: must be one of/],
    ["empty", "[]", /messages: must not be empty/],
    ["no-list", "7", /messages: must be array/],
    ["long", JSON.stringify(long), beyond],
    ["absent-image", JSON.stringify(user([{ type: "image_url", image_url: { url: "no.png" } }])), /image .*no\.png/],
    ["inline-image", JSON.stringify(user([{ type: "image_url", image_url: { url: "data:image/png;base64,AAAA" } }])), /messages\[0\]\.content\[0\]: .*not an image/], // biome-ignore format: one row
  ])("the messages file %s", async (name, text, message) => {
    writeFileSync(join(folder, `${name}.json`), text);
    expectRefused(await generate("--messages", join(folder, `${name}.json`)), message);
  });

  test.concurrent.each([
    [["--max-tokens", "0"], /--max-tokens is 0; it must be a whole number from 1/],
    [["--temperature", "NaN"], /--temperature is NaN; it must be a number from 0 to 2/],
    [["--max-tokens", "4096"], /max_tokens is 4096, but the prompt's \d+ tokens/],
    [["--model", "nowhere"], /nowhere is no folder/],
    [["--draft", "nowhere"], /nowhere/],
  ])("%s", async (args, message) => expectRefused(await generate("--prompt", "Hi", ...args), message));
});

const ATTENTION = "model.layers.3.self_attn.k_proj.weight";
describe("a checkpoint", () => {
  const damages: [what: string, damage: (c: Checkpoint) => unknown, message: RegExp][] = [
    ["without a tensor", (c) => c.tensors((t) => t.delete(ATTENTION)), new RegExp(`tensor ${ATTENTION} .*is missing`)],
    ["with a misshapen tensor", (c) => c.tensors((t) => (t.get(ATTENTION)!.shape = [32, 384])), new RegExp(`model\\.safetensors: tensor ${ATTENTION} is \\[32,384\\], its config asks for \\[64,192\\]`)], // biome-ignore format: one row
    ["with a misshapen tensor of the vision tower", (c) => c.tensors((t) => (t.get("visual.merger.ln_q.weight")!.shape = [2, 80])), /tensor visual\.merger\.ln_q\.weight is \[2,80\]/], // biome-ignore format: one row
    ["that is truncated in a tensor", (c) => truncate(c.file("model.safetensors"), 5_000_000), /model\.safetensors is truncated: tensor \S+ ends at byte \d+ of 5000000/], // biome-ignore format: one row
    ["that is truncated in its header", (c) => truncate(c.file("model.safetensors"), 1000), /model\.safetensors .*truncated in its header/], // biome-ignore format: one row
    ["whose weights are empty", (c) => truncate(c.file("model.safetensors"), 0), /model\.safetensors is not a safetensors file/], // biome-ignore format: one row
    ["with a tensor of another type", (c) => c.tensors((t) => (t.get(ATTENTION)!.dtype = "I16")), new RegExp(`tensor ${ATTENTION} is I16, not F32, F16 or BF16`)], // biome-ignore format: one row
    ["whose tensor has no shape", (c) => c.tensors((t) => (t.get(ATTENTION)!.shape = undefined as never)), new RegExp(`model\\.safetensors: .*${ATTENTION}`)], // biome-ignore format: one row
    ["without weights", (c) => c.remove("model.safetensors"), /neither model\.safetensors nor/],
    ["without config.json", (c) => c.remove("config.json"), /config\.json is missing/],
    ["whose config.json is malformed", (c) => c.edit("config.json", "{", ""), /config\.json: .*JSON/],
    ["whose config.json is null", (c) => writeFileSync(c.file("config.json"), "null"), /config\.json: /],
    ["with a config field of a wrong type", (c) => c.edit("config.json", '"hidden_size": 192', '"hidden_size": "192"'), /config\.json: hidden_size: /], // biome-ignore format: one row
    ["whose heads have no groups", (c) => c.edit("config.json", '"num_key_value_heads": 2', '"num_key_value_heads": 4'), /config\.json: num_key_value_heads 4 does not divide num_attention_heads 6/], // biome-ignore format: one row
    ["whose vision heads divide nothing", (c) => c.edit("config.json", '"num_heads": 4', '"num_heads": 7'), /config\.json: vision_config: 7 heads do not divide hidden_size 160/], // biome-ignore format: one row
    ["whose image token is no word", (c) => c.edit("config.json", '"image_token_id": 1181', '"image_token_id": 99999'), /config\.json: the image token 99999 is not in the vocabulary of 1280/], // biome-ignore format: one row
    ["with a negative epsilon", (c) => c.edit("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": -1'), /config\.json: rms_norm_eps: /], // biome-ignore format: one row
    ["with bytes for floats", (c) => c.tensors((t) => t.set("fc.bias", { dtype: "U8", shape: [192], bytes: new Uint8Array(192) }), "draft/model.safetensors"), /tensor fc\.bias is U8, not F32, F16 or BF16/], // biome-ignore format: one row
    ["whose index leads elsewhere", (c) => writeFileSync(c.remove("model.safetensors").file("model.safetensors.index.json"), '{"weight_map":{"a":"../a.safetensors"}}'), /index\.json: \.\.\/a\.safetensors is no file beside it/], // biome-ignore format: one row
    ["without a vision config", (c) => c.edit("config.json", "vision_config", "vision"), /config\.json: vision_config: /], // biome-ignore format: one row
    ["with another width than its tensors", (c) => c.edit("config.json", '"intermediate_size": 512', '"intermediate_size": 500'), /tensor model\.layers\.\d+\.mlp\.\S+ is \[.*its config asks for \[/], // biome-ignore format: one row
    ["of another model_type", (c) => c.edit("config.json", '"model_type": "qwen2_5_vl"', '"model_type": "bert"'), /config\.json: model_type is bert/], // biome-ignore format: one row
    ["without tokenizer.json", (c) => c.remove("tokenizer.json"), /tokenizer\.json is missing/],
    ["whose tokenizer.json is no tokenizer", (c) => writeFileSync(c.file("tokenizer.json"), "{}"), /tokenizer\.json/],
    ["without a chat template", (c) => c.edit("tokenizer_config.json", "chat_template", "template"), /tokenizer_config\.json: chat_template is missing/], // biome-ignore format: one row
    ["without preprocessor_config.json", (c) => c.remove("preprocessor_config.json"), /preprocessor_config\.json is missing/], // biome-ignore format: one row
    ["with a draft for another width", (c) => c.edit("draft/config.json", '"hidden_size": 192', '"hidden_size": 256'), /draft\/config\.json: the draft does not fit its target: hidden_size is 256, the target's 192/], // biome-ignore format: one row
    ["with a draft for another vocabulary", (c) => c.edit("draft/config.json", '"vocab_size": 1280', '"vocab_size": 32000'), /draft\/config\.json: the draft does not fit its target: vocab_size is 32000/], // biome-ignore format: one row
    ["whose draft lacks a tensor", (c) => c.tensors((t) => t.delete("fc.weight"), "draft/model.safetensors"), /draft lacks tensors of a draft: fc\.weight\n/], // biome-ignore format: one row
    ["with a shard that is missing", (c) => rmSync(shard(c)[1]), /index\.json names model-00002-of-00002\.safetensors, which is missing/], // biome-ignore format: one row
    ["whose index lists no shards", (c) => shard(c) && c.edit("model.safetensors.index.json", "weight_map", "map"), /index\.json: .*weight_map/], // biome-ignore format: one row
  ];
  // The engine reads all but the words, and refuses in the same process sooner; some of it is seen on the command line as well.
  const words = /tokenizer|template|without a tensor|malformed|a shard that is missing/;
  test.concurrent.each(damages.filter(([what]) => words.test(what)))(
    "%s is refused in one line",
    async (_what, damage, message) => {
      using checkpoint = new Checkpoint();
      damage(checkpoint);
      expectRefused(await vispec(["generate", "--prompt", "Hi", "--model", checkpoint.folder]), message);
    },
  );
  test.each(damages.filter(([what]) => !words.test(what)))(
    "%s is refused by the engine",
    async (_what, damage, message) => {
      using checkpoint = new Checkpoint();
      damage(checkpoint);
      const open = async () => await new LocalEngine({ model: checkpoint.folder }).close();
      const error = await open().then(
        () => undefined,
        (reason: unknown) => reason,
      );
      expect(error).toBeInstanceOf(CheckpointError);
      expect((error as Error).message).toMatch(/^.+$/); // one line
      expect(`${(error as Error).message}\n`).toMatch(message);
    },
  );

  const story = cases.find(({ id }) => id === "18-story")!;
  const described = cases.find(({ id }) => id === "00-describe")!;
  async function answer(folder: string, golden: Case): Promise<string> {
    const engine = new LocalEngine({ model: folder });
    try {
      const { request, images } = await prepare(engine, golden);
      const steps = await collect(engine.generate(request, images, AbortSignal.timeout(60_000)));
      return steps.map(({ text }) => text).join("");
    } finally {
      await engine.close();
    }
  }

  test("in shards, listed in an index, answers like the one file", async () => {
    using checkpoint = new Checkpoint();
    shard(checkpoint);
    for (const golden of [story, described]) expect(await answer(checkpoint.folder, golden)).toBe(golden.output_text);
  });

  test.each(["F32", "F16"] as const)("of %s weights answers like the one of BF16", async (dtype) => {
    using checkpoint = new Checkpoint();
    const all = (t: Map<string, never>) => {
      for (const [name, tensor] of t) t.set(name, convert(tensor, dtype) as never);
    };
    checkpoint.tensors(all as never).tensors(all as never, "draft/model.safetensors");
    // Numbers of bf16 lie well within fp16's range here, and have fewer digits: nothing is lost in either.
    for (const golden of [story, described]) expect(await answer(checkpoint.folder, golden)).toBe(golden.output_text);
  });
});

describe.each([["serve"], ["start"]])("%s", (command) => {
  test("with a broken checkpoint ends with exit code 2 and one line, and leaves no process", async () => {
    using checkpoint = new Checkpoint().tensors((t) => t.delete(ATTENTION));
    const ended = await vispec([command, "--model", checkpoint.folder], { PORT: "0" });
    expectRefused(ended, checkpoint.folder, ATTENTION);
  });

  test("on a port that is in use ends with exit code 1 and one line, and leaves no process", async () => {
    const server = createServer().listen(0, "127.0.0.1");
    try {
      const port = String((await new Promise<{ port: number }>((r) => server.once("listening", () => r(server.address() as never)))).port); // biome-ignore format: one line
      const ended = await vispec([command, ...(command === "serve" ? ["--port", port] : [])], { PORT: port });
      expect(ended).toMatchObject({ code: 1, stdout: "" });
      expect(ended.stderr).toMatch(new RegExp(`^vispec: port ${port} is in use\n$`));
    } finally {
      server.close();
    }
  });
});

function truncate(file: string, bytes: number): void {
  writeFileSync(file, readFileSync(file).subarray(0, bytes));
}

/** Splits the weights into two shards with an index, and gives the shards' paths. */
function shard(checkpoint: Checkpoint): string[] {
  const all = [...readTensors(checkpoint.file("model.safetensors"))];
  const names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
  const map: Record<string, string> = {};
  for (const [i, name] of names.entries()) {
    const own = all.filter((_, n) => n % 2 === i);
    for (const [tensor] of own) map[tensor] = name;
    writeTensors(checkpoint.file(name), new Map(own));
  }
  checkpoint.remove("model.safetensors");
  writeFileSync(checkpoint.file("model.safetensors.index.json"), JSON.stringify({ weight_map: map }));
  return names.map((name) => checkpoint.file(name));
}
