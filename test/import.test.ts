/** `vispec import`: the same files from wherever they come, whole or not at all, in the type that was asked for. */
import { createHash } from "node:crypto";
import { chmodSync, constants, copyFileSync, cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from "node:fs"; // biome-ignore format: one line
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, onTestFinished, test, vi } from "vitest";
import type { ImportDtype } from "../gpu-worker/checkpoint/convert.ts";
import { importCheckpoint } from "../gpu-worker/checkpoint/import.ts";
import { importCommand } from "../gpu-worker/cli/import.ts";
import { LocalEngine } from "../gpu-worker/engine-local.ts";
import { readEntries } from "../gpu-worker/model/weights.ts";
import { openStore } from "../gpu-worker/store/open.ts";
import { CheckpointError } from "../shared/errors.ts";
import { Checkpoint, readTensors, type StoredBytes, type Tensors } from "./support/checkpoint.ts";
import { type Ended, ROOT, start, startVispec, vispec } from "./support/cli.ts";
import { answer, type Case, families, LLAVA_MODEL, MODEL, textOf } from "./support/goldens.ts";
import { listen, startHub } from "./support/hub-server.ts";
import { startS3 } from "./support/s3-server.ts";

vi.mock("node:fs", async (original) => {
  const fs = await original<typeof import("node:fs")>();
  return { ...fs, copyFileSync: vi.fn(fs.copyFileSync) };
});

let folder: string;
let out: string;
let said: string[];
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "vispec-"));
  out = join(folder, "out");
  said = [];
  vi.spyOn(process.stderr, "write").mockReturnValue(true);
  vi.spyOn(console, "error").mockImplementation((text) => said.push(text));
  vi.spyOn(console, "warn").mockImplementation((text) => said.push(text));
});
afterEach(() => {
  rmSync(folder, { recursive: true, force: true });
  vi.restoreAllMocks();
  vi.unstubAllEnvs();
});

const run = (model: string, more: { draft?: string; dtype?: ImportDtype } = {}) =>
  importCheckpoint({ model, ...more }, out, new AbortController().signal);

/** All files below a folder by their paths. */
function files(root: string): Map<string, Buffer> {
  const entries = readdirSync(root, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
  const paths = entries.map((entry) => join(entry.parentPath, entry.name)).sort();
  return new Map(paths.map((path) => [path.slice(root.length), readFileSync(path)]));
}

function expectSame(root: string, other: string): void {
  const [a, b] = [files(root), files(other)];
  expect([...a.keys()]).toEqual([...b.keys()]);
  for (const [name, bytes] of a) expect(bytes.equals(b.get(name)!), name).toBe(true);
}

/** Nothing at `out`, and nothing beside it that another import could trip over. */
function expectNothing(): void {
  expect(readdirSync(folder)).toEqual([]);
}

/** A hub that has it as org/model, for this process too. */
async function hub(repository: string) {
  const server = await startHub({ "org/model": repository });
  onTestFinished(() => server.close());
  vi.stubEnv("HF_ENDPOINT", server.url);
  vi.stubEnv("HF_TOKEN", undefined);
  return server;
}

/** The ranges that a hub was asked for of a file. */
const rangesOf = ({ log }: { log: { path: string; range?: string }[] }, file: string) => {
  const sha256 = createHash("sha256").update(readFileSync(file)).digest("hex");
  return log.filter(({ path }) => path.startsWith(`/lfs/${sha256}`)).map(({ range }) => range);
};

const spoilt = (bytes: Buffer) => Buffer.concat([bytes.subarray(0, -10), Buffer.alloc(10, 7)]);

async function expectAnswer(model: string, golden: Case): Promise<void> {
  const engine = new LocalEngine({ model, shape: { totalToken: 30, depth: 3, topK: 8 } });
  try {
    const steps = await answer(engine, golden);
    expect(textOf(steps)).toBe(golden.output_text);
    expect(engine.info.drafts).toBe(true);
  } finally {
    await engine.close();
  }
}

const [qwen, llava] = families;
test.each([
  { ...qwen, shards: 3 },
  { ...llava, shards: 1 },
])("$name in $shards files is the same from a folder, S3 and the hub, and answers as it did", async (family) => {
  using checkpoint = new Checkpoint(family.model);
  if (family.shards > 1) checkpoint.shard(family.shards);
  const s3 = await startS3();
  onTestFinished(() => s3.close());
  for (const [name, value] of Object.entries(s3.env)) vi.stubEnv(name, value);
  const store = openStore("s3://checkpoints/some/model");
  for (const [name, bytes] of files(checkpoint.folder)) await store.write(name.slice(1), bytes);
  await hub(checkpoint.folder);
  for (const source of [checkpoint.folder, "s3://checkpoints/some/model", "org/model"]) {
    await run(source);
    expectSame(out, checkpoint.folder);
    expect(readdirSync(folder)).toEqual(["out"]);
    if (source === "org/model") await expectAnswer(out, family.cases[0]);
    rmSync(out, { recursive: true });
  }
});

/** Resolves when the hub has been asked for a byte of this file beyond the first million. */
async function halfWay(server: Awaited<ReturnType<typeof hub>>, file: string): Promise<void> {
  const far = () => rangesOf(server, file).some((range) => Number(/^bytes=(\d+)-/.exec(range ?? "")?.[1]) >= 1_000_000);
  await vi.waitFor(() => expect(far()).toBe(true), { timeout: 30_000, interval: 5 });
}

describe("broken off", () => {
  test("by SIGKILL it leaves nothing at its place, and goes on with the rest", async () => {
    const server = await hub(MODEL);
    server.cutAfter(1_000_000);
    const args = ["import", "--model", "org/model", "--out", out];
    const killed = startVispec(args, { HF_ENDPOINT: server.url });
    await halfWay(server, join(MODEL, "model.safetensors"));
    const second = await vispec(args, { HF_ENDPOINT: server.url });
    const busy = `${out}.partial is being written by process ${killed.child.pid}; if that is not so, remove ${out}.partial/lock`;
    expect(second).toMatchObject({ code: 2, stderr: `vispec: ${busy}\n` });
    killed.child.kill("SIGKILL");
    expect((await killed.gone).code).toBe(137);
    expect(readdirSync(folder)).toEqual(["out.partial"]);
    expect(existsSync(`${out}.partial/lock`)).toBe(true); // of a process that is dead
    const { size } = statSync(`${out}.partial/checkpoint/model.safetensors.part`);
    expect(size).toBeGreaterThanOrEqual(1_000_000);
    server.cutAfter(null);
    server.log.length = 0;
    expect(await vispec(args, { HF_ENDPOINT: server.url })).toMatchObject({ code: 0 });
    expectSame(out, MODEL);
    const [prefix, header, ...rest] = rangesOf(server, join(MODEL, "model.safetensors"));
    expect([prefix, header]).toEqual(["bytes=0-7", expect.stringMatching(/^bytes=8-\d{1,5}$/)]);
    const whole = statSync(join(MODEL, "model.safetensors")).size;
    // On a slow machine all of it may have come while the second command ran: nothing is asked for then.
    expect(rest).toEqual(size < whole ? [`bytes=${size}-${whole - 1}`] : []);
  });

  test("by Ctrl-C while it converts from a hub, it neither fetches nor converts again what is done", async () => {
    using checkpoint = new Checkpoint().shard(2);
    const [first, second] = [1, 2].map((i) => checkpoint.file(`model-${i}-of-2.safetensors`));
    const args = ["import", "--model", checkpoint.folder, "--out", join(folder, "whole"), "--dtype", "int4"];
    const whole = await vispec(args);
    const server = await hub(checkpoint.folder);
    server.cutAfter(1_000_000);
    Object.assign(args, { 2: "org/model", 4: out });
    const interrupted = startVispec(args, { HF_ENDPOINT: server.url });
    await halfWay(server, second);
    interrupted.child.kill("SIGINT");
    const { code, stderr } = await interrupted.gone;
    expect({ code, stderr }).toMatchObject({ code: 130, stderr: expect.stringContaining(`${out}.partial`) });
    expect(existsSync(out)).toBe(false);
    expect(existsSync(`${out}.partial/lock`)).toBe(false);
    server.cutAfter(null);
    server.log.length = 0;
    const ended = await vispec(args, { HF_ENDPOINT: server.url });
    expect(ended.code).toBe(0);
    expectSame(out, join(folder, "whole"));
    expect(readdirSync(folder)).toEqual(["out", "whole"]);
    expect(rangesOf(server, first)).toHaveLength(2); // its header
    expect(Number(/\d+/.exec(rangesOf(server, second).at(-1)!))).toBeGreaterThanOrEqual(1_000_000);
    const line = (text: string) => /^int4 .*$/m.exec(text)?.[0];
    expect(line(ended.stdout)).toMatch(/^int4 is off by \d+\.\d+ % .*, at worst by \d+\.\d+ % in model\.layers\./);
    expect(line(ended.stdout)).toBe(line(whole.stdout)); // also of the shard that was converted before
  });

  test("by a corrupted shard it says so, refuses another type, and takes the shard once it is right", async () => {
    using checkpoint = new Checkpoint().shard(3);
    const shards = [1, 2, 3].map((i) => checkpoint.file(`model-${i}-of-3.safetensors`));
    const server = await hub(checkpoint.folder);
    const good = readFileSync(shards[1]);
    writeFileSync(shards[1], spoilt(good));
    await expect(run("org/model")).rejects.toThrow(
      /model-2-of-3\.safetensors is damaged: its SHA-256 is \w{64}, not \w{64}/,
    );
    expect(existsSync(out)).toBe(false);
    await expect(run("org/model", { dtype: "fp16" })).rejects.toThrow(`${out}.partial is an unfinished import of org/model, not of org/model as fp16`); // biome-ignore format: one line
    writeFileSync(shards[1], good);
    server.log.length = 0;
    await run("org/model");
    expectSame(out, checkpoint.folder);
    expect(shards.map((shard) => rangesOf(server, shard).length)).toEqual([2, 3, 3]); // two are the header
  });

  test("and then changed at its source, the changed shard comes anew, and others than before leave no trace", async () => {
    using checkpoint = new Checkpoint().shard(3);
    await hub(checkpoint.folder);
    const last = checkpoint.file("model-3-of-3.safetensors");
    const good = readFileSync(last);
    writeFileSync(last, spoilt(good));
    await expect(run("org/model")).rejects.toThrow("damaged");
    writeFileSync(last, good);
    const [name] = readTensors(checkpoint.file("model-1-of-3.safetensors")).keys();
    checkpoint.tensors((tensors) => tensors.get(name)!.bytes.fill(1), "model-1-of-3.safetensors");
    checkpoint.edit("generation_config.json", "{", '{ "changed": true,');
    const server = await hub(checkpoint.folder);
    await run("org/model");
    expectSame(out, checkpoint.folder);
    expect(rangesOf(server, checkpoint.file("model-2-of-3.safetensors"))).toHaveLength(2); // its header
  });

  /** Leaves the first of two shards. */
  async function breakOff(checkpoint: Checkpoint): Promise<void> {
    await hub(checkpoint.folder);
    const last = checkpoint.file("model-2-of-2.safetensors");
    const good = readFileSync(last);
    writeFileSync(last, spoilt(good));
    await expect(run("org/model")).rejects.toThrow("damaged");
    writeFileSync(last, good);
  }

  test("and then without its draft, or with one for the first time, it is refused", async () => {
    using checkpoint = new Checkpoint().shard(2);
    await breakOff(checkpoint);
    cpSync(checkpoint.file("draft"), join(folder, "draft"), { recursive: true });
    rmSync(checkpoint.file("draft"), { recursive: true });
    await hub(checkpoint.folder);
    const refused = `${out}.partial is an unfinished import of org/model, not of org/model without a draft:`;
    await expect(run("org/model")).rejects.toThrow(refused);
    rmSync(`${out}.partial`, { recursive: true });
    await breakOff(checkpoint);
    cpSync(join(folder, "draft"), checkpoint.file("draft"), { recursive: true });
    await hub(checkpoint.folder);
    await expect(run("org/model")).rejects.toThrow("is an unfinished import of org/model without a draft, not of org/model:"); // biome-ignore format: one line
  });

  test.each(["", "{", "{}", "null", '{"request":"org/model","marks":{},"errors":{"a":null}}'])(
    "with %j as its import.json it says what to remove",
    async (text) => {
      mkdirSync(`${out}.partial`);
      writeFileSync(`${out}.partial/import.json`, text);
      const error = await run(MODEL).catch((error) => error);
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toBe(`${out}.partial/import.json is damaged: remove ${out}.partial`);
    },
  );

  test("before anything was kept, it does not say that something was", async () => {
    const args = ["--model", MODEL, "--out", out];
    await expect(importCommand(args, AbortSignal.abort(new Error("enough")))).rejects.toThrow("enough");
    expect(said).toEqual([]);
    expectNothing();
  });
});

test("Ctrl-C ends a listing", async () => {
  const reason = new Error("enough");
  const abort = new AbortController();
  const { url, close } = await listen(() => abort.abort(reason)); // it never answers
  onTestFinished(close);
  vi.stubEnv("HF_ENDPOINT", url);
  await expect(importCheckpoint({ model: "org/model" }, out, abort.signal)).rejects.toBe(reason);
  expectNothing();
});

test("a read-only file whose blocks are shared becomes one that can be written", async () => {
  // Few file systems can share blocks: here they are copied.
  vi.mocked(copyFileSync).mockImplementation((from, to, mode) => {
    if (mode !== constants.COPYFILE_FICLONE_FORCE) throw new Error("not a clone");
    writeFileSync(to, readFileSync(from));
    chmodSync(to, 0o444);
  });
  onTestFinished(() => void vi.mocked(copyFileSync).mockReset());
  await run(MODEL);
  expectSame(out, MODEL);
  expect(statSync(join(out, "model.safetensors")).mode & 0o600).toBe(0o600);
});

describe("refused, with nothing left:", () => {
  const SHARD = "model-2-of-2.safetensors";
  const MATRIX = "model.layers.3.self_attn.k_proj.weight";
  interface Entry {
    dtype: string;
    data_offsets: number[];
  }
  /** Changes the entries of a file's header; the bytes stay where they are. */
  const header = (c: Checkpoint, name: string, change: (entries: Entry[]) => void) => {
    const bytes = readFileSync(c.file(name));
    const end = 8 + Number(bytes.readBigUInt64LE());
    const json = JSON.parse(bytes.subarray(8, end).toString());
    change(Object.values(json));
    const text = Buffer.from(JSON.stringify(json));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(text.length));
    writeFileSync(c.file(name), Buffer.concat([length, text, bytes.subarray(end)]));
  };
  const shift = (entry: Entry, by: number) => (entry.data_offsets = entry.data_offsets.map((at) => at + by));
  const cut = (c: Checkpoint, name: string, bytes: number) =>
    writeFileSync(c.file(name), readFileSync(c.file(name)).subarray(0, bytes));
  const damages: [what: string, damage: (c: Checkpoint) => unknown, message: RegExp][] = [
    ["a header cut off", (c) => cut(c, SHARD, 1000), /model-2-of-2\.safetensors .* truncated in its header \(1000 bytes\)/], // biome-ignore format: one row
    ["a shard of 5 bytes", (c) => cut(c, SHARD, 5), /model-2-of-2\.safetensors is not a safetensors file/],
    ["an empty shard", (c) => cut(c, SHARD, 0), /model-2-of-2\.safetensors is not a safetensors file/],
    ["a shard cut off", (c) => cut(c, SHARD, 3_000_000), /model-2-of-2\.safetensors is truncated: tensor \S+ ends at byte \d+ of 3000000/], // biome-ignore format: one row
    ["an offset beyond the file", (c) => header(c, SHARD, (entries) => shift(entries.at(-1)!, 1e6)), /model-2-of-2\.safetensors is truncated: tensor \S+ ends at byte \d+/], // biome-ignore format: one row
    ["offsets that overlap", (c) => header(c, SHARD, ([, second]) => shift(second, -1)), /model-2-of-2\.safetensors: tensors \S+ and \S+ overlap/], // biome-ignore format: one row
    ["a type that nobody knows", (c) => header(c, SHARD, ([first]) => (first.dtype = "F5")), /model-2-of-2\.safetensors: tensor \S+ is F5, a type that is not known/], // biome-ignore format: one row
    ["a type that no graph reads", (c) => header(c, SHARD, ([first]) => (first.dtype = "I16")), /model-2-of-2\.safetensors: tensor \S+ is I16, not F32, F16 or BF16/], // biome-ignore format: one row
    ["a header that is no JSON", (c) => writeFileSync(c.file(SHARD), "\x04\0\0\0\0\0\0\0nonono"), /model-2-of-2\.safetensors: header is no JSON/], // biome-ignore format: one row
    ["a shard that is missing", (c) => c.remove(SHARD), /index\.json names model-2-of-2\.safetensors, which is missing/], // biome-ignore format: one row
    ["a tensor that is not where the index says", (c) => c.tensors((t) => t.delete([...t.keys()][0]), SHARD), /index\.json: tensor \S+ is not in model-2-of-2\.safetensors/], // biome-ignore format: one row
    ["an index that is no JSON", (c) => writeFileSync(c.file("model.safetensors.index.json"), "{"), /index\.json: .*JSON/], // biome-ignore format: one row
    ["an index without a map", (c) => c.edit("model.safetensors.index.json", "weight_map", "map"), /index\.json: weight_map: /], // biome-ignore format: one row
    ["no weights", (c) => c.remove("model.safetensors.index.json"), /has neither model\.safetensors nor model\.safetensors\.index\.json/], // biome-ignore format: one row
    ["a tensor of another shape", (c) => c.edit("config.json", '"intermediate_size": 512', '"intermediate_size": 500'), /model-\d-of-2\.safetensors: tensor model\.layers\.0\.mlp\.\S+ is \[512,192\], its config asks for \[500,192\]/], // biome-ignore format: one row
    ["an architecture that is not supported", (c) => c.edit("config.json", "qwen2_5_vl", "bert"), /config\.json: model_type is bert/], // biome-ignore format: one row
    ["a shard with the name of the draft", (c) => c.edit("model.safetensors.index.json", `"${SHARD}"`, '"draft"'), /index\.json: "draft" is no name of a file of weights/], // biome-ignore format: one row
    ["a shard that leads elsewhere", (c) => c.edit("model.safetensors.index.json", `"${SHARD}"`, '".."'), /index\.json: "\.\." is no name of a file of weights/], // biome-ignore format: one row
    ["a shard with the name of another file", (c) => c.edit("model.safetensors.index.json", `"${SHARD}"`, '"config.json"'), /index\.json: "config\.json" is no name of a file of weights/], // biome-ignore format: one row
    ["no tokenizer", (c) => c.remove("tokenizer.json"), /tokenizer\.json is missing/],
  ];
  test.each(damages)("%s", async (_what, damage, message) => {
    using checkpoint = new Checkpoint().shard(2);
    damage(checkpoint);
    const error = await run(checkpoint.folder).catch((error) => error);
    expect(error.message).toMatch(message);
    expect(error.message).not.toContain(out); // the user's own names
    expectNothing();
  });

  test("a tensor that is missing from the one file", async () => {
    using checkpoint = new Checkpoint().tensors((tensors) => tensors.delete(MATRIX));
    await expect(run(checkpoint.folder)).rejects.toThrow(`${checkpoint.folder}: tensor ${MATRIX} [64,192] is missing`);
    expectNothing();
  });

  test("--dtype for weights that are quantized already", async () => {
    await run(MODEL, { dtype: "int8" });
    const [quantized, second] = [out, join(folder, "second")];
    out = second;
    await expect(run(quantized, { dtype: "fp16" })).rejects.toThrow(`${quantized}/config.json: quantization_config`);
    expect(readdirSync(folder)).toEqual(["out"]);
    await run(quantized); // as it is
    expectSame(out, quantized);
  });

  test("on the command line, in one line and with exit code 2", async () => {
    const refused = async (args: string[], message: RegExp) => {
      const ended = await vispec(["import", ...args]);
      expect(ended).toMatchObject({ code: 2, stdout: "" });
      expect(ended.stderr).toMatch(/^vispec: .+\n$/);
      expect(ended.stderr).toMatch(message);
    };
    await refused(["--model", MODEL, "--out", folder], /--out \S+ exists already/);
    await refused(["--model", "./nowhere", "--out", out], /nowhere: no such file or directory/);
    await refused(["--model", MODEL, "--out", join(ROOT, "package.json/out")], /package\.json\/out cannot be written/);
    await refused(["--model", MODEL, "--out", "/proc/vispec/out"], /\/proc\/vispec\/out cannot be written: ENOENT/);
    const command = (...args: string[]) => importCommand(args, new AbortController().signal);
    symlinkSync("nowhere", out);
    await expect(command("--model", MODEL, "--out", out)).rejects.toThrow(`--out ${out} exists already`);
    await expect(run(MODEL)).rejects.toThrow(`${out} exists already`);
    rmSync(out);
    await expect(command("--model", MODEL)).rejects.toThrow("--model and --out are needed");
    await expect(command("--model", MODEL, "--out", out, "--dtype", "fp8")).rejects.toThrow("--dtype is fp8");
    expectNothing();
  });
});

const MOUNT = "unshare -rm sh -c 'mount -t tmpfs none /mnt'";
const mayMount = (await start("sh", ["-c", MOUNT]).gone).code === 0;
describe.skipIf(!mayMount)(`on a full disk (skipped where this is not permitted: ${MOUNT})`, () => {
  /** Runs `script` where `folder` is a disk of that size, $1 is Node, and the rest the import's arguments. */
  const onDisk = (size: string, script: string, source: string, env = {}): Promise<Ended> => {
    const mount = `mount -t tmpfs -o size=${size} none ${folder} || exit 99\n`;
    const args = [process.execPath, "gpu-worker/main.ts", "import", "--model", source, "--out", out];
    return start("unshare", ["-rm", "sh", "-c", mount + script, "sh", ...args], env).gone;
  };

  test("too small a one is refused before weights are written", async () => {
    const { stdout, stderr } = await onDisk("8m", `"$@"; echo "code $?"; du -sk ${folder}`, MODEL);
    expect(stdout).toMatch(/^code 1\n(\d{1,3})\s/); // less than 1000 KiB
    expect(stderr).toMatch(/^vispec: \S+\/out needs 10\.8 MB more; its disk has 8\.\d+ MB left\n$/);
  });

  test("one that fills up names the file, keeps what is there, and goes on once there is room", async () => {
    const server = await hub(MODEL);
    server.cutAfter(1_000_000);
    const part = `${out}.partial/checkpoint/model.safetensors.part`;
    const fill = `(while [ ! -e ${part} ]; do sleep 0.01; done; head -c 10000000 /dev/zero >${folder}/others) &`;
    const script = `${fill} "$@"; echo "code $?"; wait; cd ${folder}; find . -name '*.part'; rm others; cd "$OLDPWD"
      "$@"; echo "code $?"; ls ${folder}; cmp ${MODEL}/model.safetensors ${out}/model.safetensors && echo same`;
    const { stdout, stderr } = await onDisk("16m", script, "org/model", { HF_ENDPOINT: server.url });
    expect(stdout).toMatch(
      /^code 1\n\.\/out\.partial\/checkpoint\/model\.safetensors\.part\n.*is complete.*\ncode 0\nout\nsame\n$/,
    );
    expect(stderr).toContain(`vispec: the disk is full: ${out}.partial/checkpoint/model.safetensors is not whole`);
    expect(stderr).not.toMatch(/^ +at /m); // no stack
    expect(stderr).toMatch(/of which [4-7]\.\d+ MB are there/);
  });
});

describe("--dtype", () => {
  const values = ({ dtype, bytes }: StoredBytes): Float32Array => {
    const { buffer } = new Uint8Array(bytes);
    if (dtype === "F32") return new Float32Array(buffer);
    if (dtype === "F16") return Float32Array.from(new Float16Array(buffer));
    return new Float32Array(Uint32Array.from(new Uint16Array(buffer), (half) => half << 16).buffer);
  };
  /** The largest difference in proportion, beyond what fp16's subnormal numbers cannot tell apart. */
  const worstOff = (is: Float32Array, was: Float32Array) => {
    let worst = is.length === was.length ? 0 : Number.POSITIVE_INFINITY;
    for (let i = 0; i < is.length; i++)
      worst = Math.max(worst, (Math.abs(is[i] - was[i]) - 2 ** -25) / Math.max(2 ** -14, Math.abs(was[i])));
    return worst;
  };
  const same = (a: Uint8Array, b: Uint8Array) => Buffer.compare(a, b) === 0;

  const types = [["fp16", "F16", "float16"], ["fp32", "F32", "float32"], ["bf16", "BF16", "bfloat16"]] as const; // biome-ignore format: one line
  test.each(families)("fp16, fp32 and bf16 of $name hold its numbers, and its configs say so", async ({ model }) => {
    using checkpoint = new Checkpoint(model).shard(2);
    const json = (name: string) => JSON.parse(readFileSync(join(out, name), "utf8"));
    for (const [dtype, stored, torch] of types) {
      await run(checkpoint.folder, { dtype });
      for (const name of ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "draft/model.safetensors"]) {
        const [before, after] = [checkpoint.file(name), join(out, name)].map(readTensors);
        expect([...after.keys()]).toEqual([...before.keys()]);
        for (const [name, tensor] of after) {
          expect(tensor).toMatchObject({ dtype: stored, shape: before.get(name)!.shape });
          // fp16 has bf16's digits, and float32 those of both; bf16 has 8, so that half a unit of the last is lost.
          const off = worstOff(values(tensor), values(before.get(name)!));
          expect(off, name).toBeLessThanOrEqual(dtype === "bf16" ? 2 ** -8 : 0);
        }
      }
      expect(json("config.json").torch_dtype).toBe(torch);
      expect(json("config.json").text_config?.torch_dtype ?? torch).toBe(torch);
      expect(json("draft/config.json").torch_dtype).toBe(torch);
      const { metadata, weight_map } = json("model.safetensors.index.json");
      const entries = [1, 2].flatMap((i) => readEntries(join(out, `model-${i}-of-2.safetensors`)));
      expect(metadata.total_size).toBe(entries.reduce((sum, { bytes }) => sum + bytes, 0));
      expect(Object.keys(weight_map).sort()).toEqual(entries.map(({ name }) => name).sort());
      rmSync(out, { recursive: true });
    }
  });

  /** A tensor of float32 numbers in place of the norm of the decoder's end, padded with zeros; and one of bytes. */
  const withNumbers = (numbers: number[]) => (tensors: Tensors) => {
    const bytes = new Uint8Array(Float32Array.from({ length: 192 }, (_, i) => numbers[i] ?? 0).buffer);
    bytes.set([0xff, 0xff, 0xff, 0x7f], 4 * 191); // no number, with all bits set: rounded up it would be -0
    tensors.set("model.norm.weight", { dtype: "F32", shape: [192], bytes });
    tensors.set("flags", { dtype: "U8", shape: [3], bytes: Uint8Array.of(1, 2, 255) });
  };
  /** Halves between two neighbours, subnormal numbers, the largest that stay finite, and what is no number. */
  const numbers = [0.1, -0.1, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 1 + 2 ** -11 + 2 ** -23, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 1 + 2 ** -8 + 2 ** -23, 2 ** -24, 2 ** -25, 1.5 * 2 ** -25, 1e-30, 2 ** -149, -0, 65504, 65519, Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]; // biome-ignore format: one line

  test("rounds to nearest, ties to even, and leaves integers alone", async () => {
    using checkpoint = new Checkpoint().tensors(withNumbers(numbers));
    await run(checkpoint.folder, { dtype: "fp16" });
    let written = readTensors(join(out, "model.safetensors"));
    const halves = new Float16Array(new Uint8Array(written.get("model.norm.weight")!.bytes).buffer);
    expect([...halves].slice(0, numbers.length)).toEqual(numbers.map(Math.f16round));
    expect(written.get("flags")).toMatchObject({ dtype: "U8", shape: [3] });
    expect(same(written.get("flags")!.bytes, Uint8Array.of(1, 2, 255))).toBe(true);
    rmSync(out, { recursive: true });
    await run(checkpoint.folder, { dtype: "bf16" });
    written = readTensors(join(out, "model.safetensors"));
    const rounded = [...values(written.get("model.norm.weight")!)].slice(0, numbers.length);
    // In float64, which has room: to a whole number of steps, of 2^-7 of the number's power of two.
    const expected = numbers.map((value) => {
      if (!Number.isFinite(value) || value === 0) return value;
      const single = Math.fround(value);
      const step = 2 ** (Math.max(-126, Math.floor(Math.log2(Math.abs(single)))) - 7);
      const steps = single / step;
      const even = 2 * Math.round(steps / 2);
      return (Math.abs(steps - Math.trunc(steps)) === 0.5 ? even : Math.round(steps)) * step;
    });
    expect(rounded).toEqual(expected);
    expect(values(written.get("model.norm.weight")!)[191]).toBeNaN();
  });

  test.each([
    ["fp16", 65520],
    ["fp16", -1e10],
    ["bf16", 3.4e38],
  ] as const)("%s refuses %d by the tensor's name", async (dtype, number) => {
    // biome-ignore format: one line
    using checkpoint = new Checkpoint().tensors(withNumbers([1, number]));
    await expect(run(checkpoint.folder, { dtype })).rejects.toThrow(/model\.safetensors: tensor model\.norm\.weight holds -?\d\S*, which is beyond B?F16$/); // biome-ignore format: one line
    expect(existsSync(out)).toBe(false);
  });

  test.each(families)(
    "int4 of $name keeps the draft and what is no matrix of the decoder, from a hub too",
    async ({ model }) => {
      using checkpoint = new Checkpoint(model).shard(2);
      await hub(checkpoint.folder);
      const { error, bytes } = await run("org/model", { dtype: "int4" });
      expect(error!.overall).toBeGreaterThan(0.05);
      expect(error!.worst).toBeGreaterThanOrEqual(error!.overall);
      expect(error!.worst).toBeLessThan(0.2);
      const config = JSON.parse(readFileSync(join(out, "config.json"), "utf8"));
      expect(config.quantization_config).toEqual({ quant_method: "vispec", bits: 4, block_size: 32 });
      const [before, after] = [checkpoint.folder, out].map(
        (root) => new Map([1, 2].flatMap((i) => [...readTensors(join(root, `model-${i}-of-2.safetensors`))])),
      );
      const kept = [...before].filter(([name]) => after.has(name));
      const changed = [...before.keys()].filter((name) => !after.has(name));
      for (const [name, tensor] of kept) expect(same(tensor.bytes, after.get(name)!.bytes), name).toBe(true);
      expect(changed).toHaveLength(5 * 7);
      expect(after.size).toBe(before.size + changed.length);
      expect(kept.map(([name]) => name).join()).toContain("lm_head");
      const index = JSON.parse(readFileSync(join(out, "model.safetensors.index.json"), "utf8"));
      expect(Object.keys(index.weight_map).sort()).toEqual([...after.keys()].sort());
      expect(same(readFileSync(join(out, "draft/model.safetensors")), readFileSync(checkpoint.file("draft/model.safetensors")))).toBe(true); // biome-ignore format: one line
      const sizes = [...files(out)].filter(([name]) => name.endsWith(".safetensors")).map(([, file]) => file.length);
      expect(bytes).toBe(sizes.reduce((a, b) => a + b));
      expect(readdirSync(folder)).toEqual(["out"]);
      const engine = new LocalEngine({ model: out });
      await engine.close();
    },
  );

  test("holds a few pieces of a tensor at a time, however large it is", async () => {
    const name = "model.layers.0.mlp.up_proj.weight";
    const script = `
      import { truncateSync, writeFileSync } from "node:fs";
      import { convertShard, planShard } from "./gpu-worker/checkpoint/convert.ts";
      import { encodeHeader } from "./gpu-worker/model/safetensors.ts";
      import { readEntries } from "./gpu-worker/model/weights.ts";
      const peak = async (rows) => {
        const header = encodeHeader([{ name: "${name}", dtype: "F32", shape: [rows, 4096] }]);
        writeFileSync("${out}", header);
        truncateSync("${out}", header.length + rows * 4 * 4096); // zeros that take no room
        const plan = planShard(readEntries("${out}"), "int4", "");
        await convertShard("${out}", "${out}.4", plan, () => {}, new AbortController().signal);
        return process.resourceUsage().maxRSS / 1024;
      };
      const small = await peak(1024);
      console.log(await peak(16384) - small);`;
    const { stdout, stderr } = await start(process.execPath, ["--input-type=module", "-e", script]).gone;
    expect(stderr).toBe("");
    expect(Number(stdout)).toBeLessThan(200); // MiB, of a tensor of 256
    expect(statSync(`${out}.4`).size).toBeGreaterThan(32 << 20);
  });
});

describe("a draft", () => {
  /** A draft alone, as published ones are: weights, and what else is left. */
  const draft = (model = MODEL, change: (tensors: Tensors) => unknown = () => {}, config = true) => {
    using checkpoint = new Checkpoint(join(model, "draft"));
    checkpoint.tensors(change);
    if (!config) checkpoint.remove("config.json");
    const own = mkdtempSync(join(tmpdir(), "vispec-"));
    onTestFinished(() => rmSync(own, { recursive: true }));
    for (const [name, bytes] of files(checkpoint.folder)) writeFileSync(join(own, name), bytes);
    return own;
  };

  test.each(families)(
    "of $name without config.json and embedding drafts as the whole one",
    async ({ model, cases }) => {
      const published = draft(model, (tensors) => tensors.delete("embed_tokens.weight"), false);
      await run(model, { draft: published });
      const config = JSON.parse(readFileSync(join(out, "draft/config.json"), "utf8"));
      const whole = JSON.parse(readFileSync(join(model, "draft/config.json"), "utf8"));
      for (const [field, value] of Object.entries(config)) expect(whole[field] ?? false, field).toEqual(value);
      const steps = [];
      for (const [target, beside] of [[model], [out], [model, published]]) {
        const engine = new LocalEngine({ model: target, draft: beside, shape: { totalToken: 30, depth: 3, topK: 8 } });
        steps.push((await answer(engine, cases[0])).map(({ tokens }) => tokens));
        await engine.close();
      }
      expect(steps[1]).toEqual(steps[0]); // cycle by cycle
      expect(steps[2]).toEqual(steps[0]);
    },
  );

  test("with tensors that no draft has is taken without them, with a warning that names them", async () => {
    const extra = { dtype: "BF16", shape: [2], bytes: new Uint8Array(4) };
    const published = draft(MODEL, (tensors) =>
      tensors.set("layers.0.input_layernorm.weight", extra).set("x.y", extra),
    );
    const warning = `vispec: ${published}: no draft has these tensors, they are ignored: layers.0.input_layernorm.weight, x.y`;
    await run(MODEL, { draft: published });
    expect(said.filter((text) => text.includes("ignored"))).toEqual([warning]);
    const engine = new LocalEngine({ model: MODEL, draft: published });
    await engine.close();
    expect(said.filter((text) => text.includes("ignored"))).toEqual([warning, warning]);
  });

  const small = (tensors: Tensors) => {
    for (const tensor of tensors.values()) {
      tensor.shape = tensor.shape.map((n) => (n === 192 ? 128 : n === 384 ? 256 : n === 6 ? 4 : n));
      tensor.bytes = tensor.bytes.subarray(0, 2 * tensor.shape.reduce((a, b) => a * b));
    }
  };
  const NAMES = ["fc.bias", "imadpt.q", "imadpt.k_proj.bias"];
  test.each<[string, () => string, string]>([
    ["that lacks tensors, which are all named", () => draft(MODEL, (t) => NAMES.map((name) => t.delete(name))), `lacks tensors of a draft: ${NAMES.join(", ")}`], // biome-ignore format: one row
    ["of another family", () => draft(LLAVA_MODEL), "config.json: the draft does not fit its target: model_type is llava_next, the target's qwen2_5_vl"], // biome-ignore format: one row
    ["for another vocabulary, without a config", () => draft(LLAVA_MODEL, undefined, false), "the draft does not fit its target: vocab_size is 1408, the target's 1280"], // biome-ignore format: one row
    ["of another width, without a config", () => draft(MODEL, small, false), "the draft does not fit its target: hidden_size is 128, the target's 192"], // biome-ignore format: one row
    ["whose tensors have other shapes than its config says", () => draft(MODEL, small), "tensor imadpt.q is [2,4,32], its config asks for [2,6,32]"], // biome-ignore format: one row
    ["that is no draft at all", () => MODEL, "config.json: num_hidden_layers: "],
    ["without weights", () => join(MODEL, "../../test/goldens/qwen/images"), "has neither model.safetensors nor"],
  ])("%s is refused before anything is loaded", async (_what, make, message) => {
    const published = make();
    await expect(run(MODEL, { draft: published })).rejects.toThrow(message);
    expectNothing();
  });
});
