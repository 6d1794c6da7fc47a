/** `vispec generate` as a terminal's user and as a script see it. */
import { copyFileSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { stripVTControlCharacters } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Checkpoint } from "./support/checkpoint.ts";
import { startVispec, vispec } from "./support/cli.ts";
import { type Case, cases, dataUrl, GOLDENS } from "./support/goldens.ts";

const golden = (id: string) => cases.find((c) => c.id === id)!;
const described = golden("00-describe");
const picture = join(GOLDENS, "images/00-describe-0.png");
const question = "Describe this image in detail.";

async function json(...args: string[]) {
  const { code, stdout, stderr } = await vispec(["generate", "--json", ...args]);
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  expect(stdout).toMatch(/^.+\n$/);
  return JSON.parse(stdout);
}

describe.concurrent("--json", () => {
  const shape = ["--total-token", "30", "--depth", "3", "--top-k-draft", "8"];

  test("gives the documented fields, which agree with each other", async () => {
    const result = await json("--image", picture, "--prompt", question, ...shape);
    expect(Object.keys(result).sort()).toEqual(["acceptedPerCycle", "cycles", "finishReason", "meanAccepted", "text", "timings", "tokens", "tokensPerCycle", "usage"]); // biome-ignore format: one line
    expect(result).toMatchObject({
      text: described.output_text,
      tokens: described.output_ids,
      finishReason: "stop",
      usage: {
        promptTokens: described.input_ids.length,
        cachedTokens: 0,
        imageTokens: described.image_tokens,
        completionTokens: described.output_ids.length,
      },
    });
    const { acceptedPerCycle, cycles, meanAccepted, tokensPerCycle, timings } = result;
    const accepted = acceptedPerCycle.reduce((a: number, b: number) => a + b);
    expect(acceptedPerCycle).toHaveLength(cycles);
    expect(1 + cycles + accepted).toBe(described.output_ids.length); // the prefill's token, then a cycle's one and its drafts
    expect(meanAccepted).toBeCloseTo(accepted / cycles, 12);
    expect(meanAccepted).toBeGreaterThan(1);
    expect(tokensPerCycle).toBe(meanAccepted + 1);
    expect(Object.keys(timings).sort()).toEqual(["draft", "prefill", "tokensPerSecond", "total", "verify", "vision"]);
    for (const value of Object.values(timings)) expect(value).toBeGreaterThan(0);
  });

  test("--drafter none gives the same text, one token a cycle; --max-tokens ends it early", async () => {
    const result = await json("--image", picture, "--prompt", question, "--drafter", "none", "--max-tokens", "12");
    expect(result).toMatchObject({ tokens: described.output_ids.slice(0, 12), finishReason: "length", cycles: 11 });
    expect(result).toMatchObject({ meanAccepted: 0, tokensPerCycle: 1 });
  });

  test("--context bounds prompt and answer together", async () => {
    const { usage, finishReason } = await json("--image", picture, "--prompt", question, "--context", "120");
    expect([usage.promptTokens + usage.completionTokens, finishReason]).toEqual([120, "length"]);
    const refused = await vispec(["generate", "--image", picture, "--prompt", question, "--context", "30"]);
    expect(refused.code).toBe(2);
    expect(refused.stderr).toContain("the model's context is 30");
    const short = await json("--prompt", "Count from 27 to 31.", "--context", "80");
    expect(short.text).toBe(golden("19-text").output_text);
  });

  test("a seed at a temperature repeats itself, and top-k 1 is greedy", async () => {
    const sampled = ["--prompt", "Tell me a short story about Clara and a fox.", "--temperature", "1"];
    const [one, again, greedy] = [
      await json(...sampled, "--seed", "3"),
      await json(...sampled, "--seed", "3", "--drafter", "none"),
      await json(...sampled, "--seed", "3", "--top-k", "1"),
    ];
    expect(again.tokens).toEqual(one.tokens);
    expect(one.tokens).not.toEqual(greedy.tokens);
    expect(greedy.tokens).toEqual(golden("18-story").output_ids);
  });

  test("several --image come before the prompt, in order", async () => {
    const compare = golden("15-compare");
    const images = [0, 1].flatMap((i) => ["--image", join(GOLDENS, `images/15-compare-${i}.png`)]);
    const result = await json(...images, "--prompt", "Compare the two images.");
    expect(result.text).toBe(compare.output_text);
  });
});

describe("--messages", () => {
  let folder: string;
  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), "vispec-"));
    mkdirSync(join(folder, "pictures"));
  });
  afterAll(() => rmSync(folder, { recursive: true }));

  /** A case's messages in a file, its images as `url` says. */
  function messagesFile({ id, messages }: Case, url: (name: string, i: number) => string): string {
    let count = 0;
    const text = JSON.stringify(messages, (key, value) => (key === "url" ? url(value, count++) : value));
    const file = join(folder, `${id}.json`);
    writeFileSync(file, text);
    return file;
  }
  const beside = (name: string, i: number) => {
    copyFileSync(join(GOLDENS, name), join(folder, `pictures/${i}.png`));
    return `pictures/${i}.png`;
  };

  test.each([
    ["12-turns2", "a path relative to the file", beside],
    ["16-describe2", "a data: URL and a relative path", (name: string, i: number) => (i === 0 ? dataUrl(name) : beside(name, i))], // biome-ignore format: one row
    ["14-turns3", "an absolute path", (name: string) => join(GOLDENS, name)],
  ])("takes %s with its images as %s", async (id, _how, url) => {
    const result = await json("--messages", messagesFile(golden(id), url));
    expect(result.text).toBe(golden(id).output_text);
  });
});

describe("on a terminal", () => {
  // Standard output that claims to be a terminal, for a pseudo-terminal cannot be had everywhere.
  const terminal = ["--import", "data:text/javascript,process.stdout.isTTY=true"];
  const args = ["generate", "--image", picture, "--prompt", question, "--total-token", "30", "--depth", "3"];

  test("accepted drafts are green, and a line of figures closes the answer", async () => {
    const { code, stdout } = await startVispec(args, {}, terminal).gone;
    expect(code).toBe(0);
    expect(stripVTControlCharacters(stdout)).toMatch(/\n\n160 tokens · \d+ tokens\/s · \d\.\d\d drafts accepted a cycle · first token after \d+ ms\n$/); // biome-ignore format: one line
    expect(stripVTControlCharacters(stdout).startsWith(described.output_text)).toBe(true);
    const green = stdout.split("\x1b[32m").slice(1).map((part) => part.split("\x1b[0m")); // biome-ignore format: one chain
    expect(green.length).toBeGreaterThan(20);
    for (const parts of green) {
      expect(parts).toHaveLength(2); // each colour ends before the next begins
      expect(parts[0].length).toBeGreaterThan(0);
    }
    const drafted = green.reduce((sum, [text]) => sum + text.length, 0);
    expect(drafted).toBeGreaterThan(described.output_text.length / 3);
    expect(drafted).toBeLessThan(described.output_text.length);
  });

  test.each([
    ["NO_COLOR is set", { NO_COLOR: "1" }, terminal],
    ["the output is no terminal", {}, []],
  ])("there is no colour when %s", async (_when, env, node) => {
    const { stdout } = await startVispec(args, env, node).gone;
    expect(stdout).not.toContain("\x1b");
    expect(stdout.startsWith(described.output_text)).toBe(true);
  });

  test("Ctrl-C in the middle of an answer ends it with exit code 130 and no complaint", async () => {
    using checkpoint = new Checkpoint().endless();
    const running = startVispec(["generate", "--prompt", "Tell me a story.", "--model", checkpoint.folder]);
    await running.says(/\S/);
    running.child.kill("SIGINT");
    const { code, stderr, stdout } = await running.gone;
    expect({ code, stderr }).toEqual({ code: 130, stderr: "" });
    expect(stdout).not.toContain("tokens/s");
  });
});

describe.concurrent("the command line", () => {
  test.each([[[]], [["--help"]], [["help"]], [["generate", "--help"]]])("%j shows every command", async (args) => {
    const { code, stdout, stderr } = await vispec(args);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    for (const text of [
      "vispec generate --image FILE",
      "--messages FILE.json",
      "vispec serve [--port N]",
      "--image-urls off|public|any",
      "WORKER_SECRET",
      "vispec bench",
    ])
      expect(stdout).toContain(text);
  });

  test.each([
    [["generate", "--prompt", "Hi", "--colour"], /--colour/],
    [["generate", "--prompt", "Hi", "positional"], /positional/],
    [["generate", "--prompt", "Hi", "--drafter", "eagle"], /--drafter is eagle; it must be one of vispec, none/],
    [["generate", "--prompt", "Hi", "--depth", "deep"], /--depth is deep/],
    [["generate"], /either --prompt or --messages is needed/],
    [["generate", "--prompt", "Hi", "--messages", "x.json"], /--messages stands alone/],
    [["generate", "--prompt", "Hi", "--image", "nowhere.png"], /image nowhere\.png/],
    [["generate", "--prompt", "Hi", "--dtype", "f16"], /--dtype is for --device cuda/],
    [["generate", "--prompt", "Hi", "--device", "cuda", "--draft-vocab", "5"], /--draft-vocab is 5; .* at least 64/],
    [["generate", "--prompt", "Hi", "--device", "cuda", "--depth", "9"], /--depth is 9; it must be .* from 0 to 8/],
    [["serve", "--port", "70000"], /--port is 70000/],
    [["serve", "--concurrency", "17"], /--concurrency is 17; it must be a whole number from 1 to 16/],
    [["bench", "--concurrency", "1,2", "--device", "webgpu"], /--concurrency is 2; .* not for --device webgpu/],
    [["bench", "--crowd", "8"], /--crowd is for --device cuda/],
    [["bench", "--crowd", "17", "--device", "cuda"], /--crowd is 17; it must be a whole number from 1 to 16/],
    [["bench", "--arrival", "poisson:0"], /--arrival is poisson:0; it must be closed, or poisson:RATE/],
    [["serve", "--deadline", "0"], /--deadline is 0/],
    [["serve", "--drain", "soon"], /--drain is soon/],
    [["serve", "--max-waiting", "-1"], /'--max-waiting' argument is ambiguous/],
    [["serve", "--image-urls", "some"], /--image-urls is some; it must be one of off, public, any/],
    [["start", "--image-urls", "some"], /--image-urls is some/],
    [["serve", "--host", "0.0.0.0"], /--host 0\.0\.0\.0 .* WORKER_SECRET must be set/],
    [["train"], /there is no command train; there are generate, serve/],
  ])("%j is refused with exit code 2", async (args, message) => {
    const { code, stdout, stderr } = await vispec(args, { WORKER_SECRET: undefined });
    expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
    expect(stderr).toMatch(/^vispec: .+\n$/);
    expect(stderr).toMatch(message);
  });
});
