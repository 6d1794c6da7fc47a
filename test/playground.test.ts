/** The playground in a browser, through edge, worker and engine: what it shows, sends and refuses, and who can use it. */
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Browser, BrowserContextOptions, Page } from "playwright-core";
import sharp from "sharp";
import { afterAll, afterEach, beforeAll, describe, expect, onTestFinished, test } from "vitest";
import { Answer, Refused } from "../edge/playground/stream.ts";
import { type RunningServer, startServer } from "../gpu-worker/service/server.ts";
import { type RunningEdge, startEdge } from "../gpu-worker/start.ts";
import { ApiError } from "../shared/errors.ts";
import { axeFindings, give, openBrowser, type Visit, visit } from "./support/browser.ts";
import { ROOT } from "./support/cli.ts";
import { cases, GOLDENS } from "./support/goldens.ts";
import { chatter, fails, finishOf, type Script, ScriptedEngine, say, words } from "./support/scripted-engine.ts";
import { type Stack, startStack } from "./support/stack.ts";

let browser: Browser;
let here: Visit | null = null;
beforeAll(async () => void (browser = await openBrowser()));
afterAll(() => browser?.close());

/** A page whose faults must be none in the end, but those that the test takes out. */
async function open(url: string, options?: BrowserContextOptions): Promise<Page> {
  here = await visit(browser, url, options);
  await here.page.waitForSelector("#model:not(:empty), #error:not(:empty)");
  return here.page;
}
afterEach(async () => {
  const faults = here?.faults;
  await here?.[Symbol.asyncDispose]();
  here = null;
  expect(faults ?? []).toEqual([]);
});
/** Takes out what the browser itself says of an answer with this status. */
const expectStatus = (status: number) => {
  expect(here!.faults.splice(0)).toEqual([expect.stringContaining(`status of ${status}`)]);
};

const PHONE: BrowserContextOptions = { viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true };
const golden = (id: string) => cases.find((each) => each.id === id)!;
const file = (name: string, buffer = readFileSync(join(GOLDENS, "images", name)), mimeType = "image/png") => ({
  name,
  mimeType,
  buffer,
});
const fits = (page: Page) => page.evaluate("document.documentElement.scrollWidth <= innerWidth");
const texts = (page: Page, selector: string) => page.locator(selector).allTextContents();
const error = (page: Page) => page.locator("#error").textContent();
const picked = (page: Page, count: number) => expect.poll(() => page.locator("#pictures img").count()).toBe(count);
/** Until nothing is under way: the one button sends again. */
const settled = (page: Page) => page.waitForSelector("#send[type=submit]");
async function ask(page: Page, question: string): Promise<void> {
  await page.fill("#question", question);
  await page.press("#question", "Enter");
}
/** The bodies that the page sends from now on. */
function bodies(page: Page) {
  const sent: { messages: { role: string; content: unknown }[]; [key: string]: unknown }[] = [];
  page.on("request", (request) => request.method() === "POST" && sent.push(request.postDataJSON()));
  return sent;
}

describe("with the tiny model", () => {
  let stack: Stack;
  beforeAll(async () => void (stack = await startStack()));
  afterAll(() => stack?.close());

  const ways: Record<string, (page: Page, ...files: ReturnType<typeof file>[]) => Promise<unknown>> = {
    "the file chooser": (page, ...files) => page.setInputFiles("#file", files),
    paste: (page, ...files) => give(page, "paste", files),
    drop: (page, ...files) => give(page, "drop", files),
  };

  test.each([
    ["the file chooser", "00-describe", ["00-describe-0.png"], "Describe this image in detail."],
    ["paste", "08-json", ["08-json-0.png"], "List the objects as JSON."],
    ["drop", "15-compare", ["15-compare-0.png", "15-compare-1.png"], "Compare the two images."],
  ])(
    "a picture by %s is answered as the golden says, drafts apart from the target's own",
    async (way, id, names, question) => {
      const page = await open(stack.url);
      await ways[way](page, ...names.map((name) => file(name)));
      await picked(page, names.length);
      await ask(page, question);
      await settled(page);
      expect(await texts(page, ".text")).toEqual([golden(id).output_text]);
      const joined = (await texts(page, ".text span")).join("").replace(/\s/g, "");
      expect(joined).toBe(golden(id).output_text.replace(/\s/g, ""));
      expect((await texts(page, ".text .draft")).length).toBeGreaterThan(5);
      expect((await texts(page, ".text .own")).length).toBeGreaterThan(5);
      const [, accepted, , tokens] = await texts(page, "dd");
      expect(Number(accepted)).toBeGreaterThan(0.5);
      expect(Number(tokens)).toBe(golden(id).output_ids.length);
      expect(await page.locator(".asked img").count()).toBe(names.length);
    },
  );

  test("the conversation goes back with each turn, until a new chat", async () => {
    const page = await open(stack.url);
    const sent = bodies(page);
    await ways.paste(page, file("13-turns2-0.png"));
    await picked(page, 1);
    for (const question of ["How many squares are there?", "Describe this image in detail."]) {
      await ask(page, question);
      await settled(page);
    }
    const [first, second] = await texts(page, ".text");
    const { messages } = sent[1];
    expect(messages.map(({ role }) => role)).toEqual(["user", "assistant", "user"]);
    expect(messages.slice(1)).toEqual([
      { role: "assistant", content: first },
      { role: "user", content: "Describe this image in detail." },
    ]);
    const body = JSON.stringify({ messages, temperature: 0, max_tokens: 512 });
    const response = await fetch(`${stack.url}/v1/chat/completions`, { method: "POST", body });
    expect(await response.json()).toMatchObject({ choices: [{ message: { content: second } }] });
    await page.click("#new");
    expect(await page.locator("article").count()).toBe(0);
    await ask(page, "Count from 27 to 31.");
    await settled(page);
    expect(sent[2].messages).toEqual([{ role: "user", content: "Count from 27 to 31." }]);
    expect(await texts(page, ".text")).toEqual([golden("19-text").output_text]);
  });

  test.each(["0", "1.5"])("plain decoding gives the identical text at temperature %s", async (temperature) => {
    const page = await open(stack.url);
    const sent = bodies(page);
    await ways.drop(page, file("03-describe-0.png"));
    await picked(page, 1);
    await page.click("#settings summary");
    await page.fill("#temperature", temperature);
    await page.check("#compare");
    await ask(page, "Describe this image in detail.");
    await settled(page);
    expect(sent.map(({ drafter }) => drafter)).toEqual([undefined, "none"]);
    expect(sent[0].seed).toBe(sent[1].seed);
    const [drafting, plain] = await texts(page, ".text");
    expect(plain).toBe(drafting);
    const panels = page.locator(".answer");
    expect(await panels.nth(0).locator(".draft").count()).toBeGreaterThan(0);
    expect(await panels.nth(1).locator(".draft").count()).toBe(0);
    expect(await page.locator(".verdict").textContent()).toMatch(/ The two texts are identical\.$/);
  });

  const odd = `It's "7 > $HOME"? \`ls\` \\n\nEND $(ls) é😀`;
  test("the code asks the same: curl's body, and an answer through the package openai", async () => {
    const folder = mkdtempSync(join(ROOT, ".wrangler", "code-"));
    try {
      const page = await open(stack.url);
      const sent = bodies(page);
      const name = "it's 00.png";
      writeFileSync(join(folder, name), readFileSync(join(GOLDENS, "images/00-describe-0.png")));
      await ways.paste(page, file(name, readFileSync(join(folder, name))));
      await picked(page, 1);
      const copied = async (language: string) => {
        await page.check(`input[value=${language}]`);
        await page.click("#copy");
        const code = (await page.evaluate("navigator.clipboard.readText()")) as string;
        expect(await page.inputValue("#snippet")).toBe(code);
        return code;
      };
      const run = (command: string, args: string[], input: string) =>
        new Promise<string>((resolve, reject) => {
          const done = (fault: Error | null, output: string) => (fault ? reject(fault) : resolve(output));
          execFile(command, args, { cwd: folder }, done).stdin!.end(input);
        });
      const shell = async (code: string) => JSON.parse(await run("sh", [], `curl() { cat; }\n${code}\n`));
      await page.click("#code summary");
      await page.fill("#question", odd);
      const typed = await shell(await copied("curl"));
      await page.fill("#question", "Describe this image in detail.");
      const code = await copied("JavaScript");
      const answer = await run(process.execPath, ["--input-type=module"], code);
      expect(answer.trim()).toBe(golden("00-describe").output_text);
      expect(await copied("Python")).toContain('open("it\'s 00.png", "rb")');
      await ask(page, odd);
      await settled(page);
      const { stream, stream_options, ...request } = sent[0];
      expect([stream, stream_options]).toEqual([true, { include_drafts: true }]);
      expect(typed).toEqual(request);
      // With nothing typed, it is the code of what was asked last.
      expect(await shell(await copied("curl"))).toEqual(request);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test.each([
    ["a large photo is shrunk", "photo.jpg", "image/jpeg", { width: 3000, height: 1500 }, [2000, 1000, "jpeg"]],
    ["a format that the API does not take is changed", "a.bmp", "image/bmp", null, [61, 45, "jpeg"]],
  ])("%s before it is sent", async (_, name, type, size, expected) => {
    const page = await open(stack.url);
    const sent = bodies(page);
    const bytes = size
      ? await sharp({ create: { ...size, channels: 3, background: "teal" } })
          .jpeg()
          .toBuffer()
      : readFileSync(join(GOLDENS, "images/bmp.bmp"));
    await ways["the file chooser"](page, file(name, bytes, type));
    await picked(page, 1);
    await ask(page, "What color is it?");
    await settled(page);
    const [{ image_url }] = sent[0].messages[0].content as { image_url: { url: string } }[];
    const { width, height, format } = await sharp(Buffer.from(image_url.url.split(",")[1], "base64")).metadata();
    expect([width, height, format]).toEqual(expected);
  });

  test("a picture that the API refuses is marked, and the question is there to be mended", async () => {
    const page = await open(stack.url);
    const thin = await sharp({ create: { width: 2, height: 900, channels: 3, background: "teal" } })
      .png()
      .toBuffer();
    await ways.paste(page, file("00-describe-0.png"), file("thin.png", thin));
    await picked(page, 2);
    await ask(page, "What is it?");
    await settled(page);
    expectStatus(400);
    expect(await error(page)).toMatch(/^messages\[0\]\.content\[1\]: /);
    expect(await page.locator("#pictures .bad img").getAttribute("alt")).toBe("thin.png");
    expect(await page.inputValue("#question")).toBe("What is it?");
    await page.click("text=× >> nth=1");
    await ask(page, "Describe this image in detail.");
    await settled(page);
    expect([await error(page), await page.locator(".text").textContent()]).toEqual([
      "",
      golden("00-describe").output_text,
    ]);
  });

  test.each(["light", "dark"] as const)(
    "axe finds nothing serious in %s, wide and on a phone; nothing sticks out",
    async (colorScheme) => {
      for (const size of [{}, PHONE]) {
        const page = await open(stack.url, { ...size, colorScheme });
        await page.click("#example");
        expect(await axeFindings(page)).toEqual([]);
        await page.check("#compare");
        await page.press("#question", "Enter");
        await page.waitForSelector(".verdict");
        await page.click("#settings summary");
        await page.click("#code summary");
        await ways.drop(page, file("notes.txt", Buffer.from("no"), "text/plain"));
        await page.waitForSelector("#error:not(:empty)");
        expect(await axeFindings(page)).toEqual([]);
        expect(await fits(page)).toBe(true);
        const [draft, own] = (await page.evaluate(
          `[".text .draft", ".text .own"].map((name) => getComputedStyle(document.querySelector(name)).textDecorationLine)`,
        )) as string[];
        expect([draft, own]).toEqual(["underline", "none"]);
        await page.context().close();
      }
    },
  );

  test("the keyboard alone does it all, and the focus is seen", async () => {
    const page = await open(stack.url);
    const sent = bodies(page);
    const focused = () =>
      page.evaluate(
        "document.activeElement.id || document.activeElement.ariaLabel || document.activeElement.textContent",
      );
    const seen: unknown[] = [];
    const tab = async (key = "Tab") => {
      await page.keyboard.press(key);
      const outline = await page.evaluate(
        `getComputedStyle(document.activeElement.closest(".button") ?? (document.activeElement.id === "question" ? document.querySelector(".card") : document.activeElement)).outlineStyle`,
      );
      expect([await focused(), outline]).not.toContain("none");
      seen.push(await focused());
    };
    for (let i = 0; i < 8; i++) await tab();
    expect(seen).toEqual(["new", "question", "file", "example", "compare", "send", "Settings", "Code"]);
    for (let i = 0; i < 4; i++) await tab("Shift+Tab");
    await page.keyboard.press("Enter");
    await page.keyboard.press("Enter");
    await picked(page, 2);
    await tab("Shift+Tab");
    await tab("Shift+Tab");
    await tab("Shift+Tab");
    expect(await focused()).toBe("Remove example.png");
    await page.keyboard.press("Enter");
    await picked(page, 1);
    expect(await focused()).toBe("Remove example.png");
    await tab();
    await page.keyboard.press("End");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("Please.");
    // What a screen reader is told: not each token.
    await page.evaluate(`{
      globalThis.told = [];
      const status = document.querySelector("[role=status]");
      new MutationObserver(() => told.push(status.textContent)).observe(status, { childList: true });
    }`);
    await page.keyboard.press("Enter");
    await settled(page);
    expect(sent[0].messages[0].content).toContainEqual({
      type: "text",
      text: "Describe this image in detail.\nPlease.",
    });
    expect(await focused()).toBe("question");
    const [answer] = await texts(page, ".text");
    expect(await page.evaluate("told")).toEqual(["Answering.", `Answer: ${answer}`]);
  });

  test("the page's security policy is in force", async () => {
    const page = await open(stack.url);
    const tried = await page.evaluate(`{
      const script = document.createElement("script");
      script.textContent = "globalThis.ran = true";
      document.body.append(script);
      document.body.setAttribute("style", "color: red");
      globalThis.ran === undefined && getComputedStyle(document.body).color !== "rgb(255, 0, 0)";
    }`);
    expect(tried).toBe(true);
    expect(here!.faults.splice(0)).toEqual([expect.stringContaining("script"), expect.stringContaining("style")]);
    await page.evaluate(`fetch("http://127.0.0.1:9/").catch(() => {})`);
    expect(here!.faults.splice(0).join()).toContain("connect-src 'self'");
  });
});

describe("with a scripted engine", () => {
  const engine = new ScriptedEngine();
  let server: RunningServer;
  let edge: RunningEdge;
  const secret = "what edge and worker share";
  const key = { name: "alice", sha256: createHash("sha256").update("alice's").digest("hex") };
  beforeAll(async () => {
    server = await startServer(engine, { port: 0, host: "127.0.0.1", secret, log: () => {} });
    edge = await startEdge({ port: 0, upstream: server.url, secret });
  });
  afterAll(async () => {
    await edge?.close();
    await server?.close();
  });

  test("of each chunk, as many characters are marked as came of drafts", async () => {
    engine.script = async function* (request) {
      yield say("The");
      yield { ...say(" big red"), tokens: [1, 2], accepted: 1, draftText: 4 };
      yield { ...say(" sq😀uare"), tokens: [1, 2, 3], accepted: 2, draftText: 5 };
      yield { ...say(""), finish: { ...finishOf(request, 7), acceptedPerCycle: [1, 2] } };
    };
    const page = await open(edge.url);
    await ask(page, "Hi");
    await settled(page);
    const spans = await page.evaluate(
      `[...document.querySelectorAll(".text span")].map((span) => [span.className, span.textContent])`,
    );
    expect(spans).toEqual([["own", "The"], ["draft", "big"], ["own", "red"], ["draft", "sq😀"], ["own", "uare"]]); // biome-ignore format: one line
    expect(await texts(page, "dd")).toEqual([expect.any(String), "1.00", expect.stringMatching(/^\d+ ms$/), "7"]);
  });

  test.each(["identical", "different"])("the comparison shows two speeds and their ratio; texts: %s", async (how) => {
    let goOn = () => {};
    // Each answer waits until its beginning is seen, so that it has a time.
    engine.script = async function* (request) {
      yield say("So");
      await new Promise<void>((resolve) => (goOn = resolve));
      await new Promise((resolve) => setTimeout(resolve, request.plain ? 60 : 20));
      yield say(request.plain && how === "different" ? " not" : " so");
      yield { ...say(""), finish: finishOf(request, 2) };
    };
    const page = await open(edge.url);
    await page.check("#compare");
    await ask(page, "Hi");
    for (const n of [0, 1]) {
      await page.locator(".text").nth(n).locator("span").first().waitFor();
      goOn();
    }
    await settled(page);
    const rates = (await page.locator("dl > :first-child dd").allTextContents()).map(Number);
    const [, ratio, texts] = /^(.*)× the tokens\/s of plain decoding\. (.*)$/.exec((await page.locator(".verdict").textContent())!)!; // biome-ignore format: one line
    expect(Number(ratio) / (rates[0] / rates[1])).toBeCloseTo(1, 0);
    expect(texts).toBe(how === "identical" ? "The two texts are identical." : "The two texts differ.");
  });

  test.each(["click", "Escape"])("%s stops the answer and the engine; what came stays in the chat", async (how) => {
    engine.script = chatter;
    engine.signals.length = 0;
    const page = await open(edge.url);
    const sent = bodies(page);
    await ask(page, "Talk");
    await page.waitForSelector(".text span >> nth=3");
    if (how === "click") await page.click("#send");
    else await page.keyboard.press("Escape");
    await settled(page);
    if (!engine.signals[0].aborted) await once(engine.signals[0], "abort");
    expect(await page.locator(".fault").textContent()).toBe("Stopped.");
    const [said] = await texts(page, ".text");
    expect(said).toMatch(/^(on )+$/);
    engine.script = words(["Bye"]);
    await ask(page, "Go on");
    await settled(page);
    expect(sent[1].messages[1]).toEqual({ role: "assistant", content: said });
  });

  const talksThenFails: Script = async function* () {
    yield say("Half of ");
    await new Promise((resolve) => setImmediate(resolve));
    throw new ApiError(503, "The engine has stopped; ask again.");
  };
  test.each([
    [
      "before the answer, over the question",
      503,
      fails(new ApiError(503, "The engine is starting.")),
      "#error",
      "The engine is starting.",
    ],
    ["within it, under what came", 200, talksThenFails, ".answer .fault", "The engine has stopped; ask again."],
    [
      "about a setting, at its field",
      400,
      fails(new ApiError(400, "max_tokens: too many", { param: "max_tokens" })),
      "#error",
      "max_tokens: too many",
    ],
  ])("an error %s", async (where, status, script, place, message) => {
    engine.script = script;
    const page = await open(edge.url);
    await ask(page, "Hi");
    await settled(page);
    if (status !== 200) expectStatus(status);
    expect(await texts(page, place)).toEqual([message]);
    expect(await texts(page, ".text")).toEqual(status === 200 ? ["Half of "] : []);
    expect(await page.inputValue("#question")).toBe(status === 200 ? "" : "Hi");
    expect(await page.evaluate("document.activeElement.id")).toBe(status === 400 ? "max_tokens" : "question");
    engine.script = words(["Well"]);
    await ask(page, "Again");
    await settled(page);
    expect([await error(page), (await texts(page, ".text")).at(-1)]).toEqual(["", "Well"]);
    void where;
  });

  test("a setting out of its range is not sent, and unfolded", async () => {
    const page = await open(edge.url);
    const sent = bodies(page);
    await page.click("#settings summary");
    await page.fill("#temperature", "9");
    await page.click("#settings summary");
    await ask(page, "Hi");
    expect(await page.evaluate("document.activeElement.id")).toBe("temperature");
    expect(await page.isVisible("#temperature")).toBe(true);
    expect(sent).toEqual([]);
  });

  test("a file that is no picture, and a link that is dropped, are told of at once", async () => {
    const page = await open(edge.url);
    await page.setInputFiles("#file", [file("notes.txt", Buffer.from("no"), "text/plain")]);
    await page.waitForSelector("#error:not(:empty)");
    expect(await error(page)).toBe("notes.txt is not a picture that this browser can read.");
    await give(page, "dragover", []);
    expect(await page.isVisible("text=Drop it here")).toBe(true);
    await give(page, "drop", []);
    expect(await error(page)).toBe("A link cannot be taken; drop the picture's file.");
    expect(await page.isVisible("text=Drop it here")).toBe(false);
  });

  test("where keys are asked for, a wrong one is told of at its field, and the right one opens", async () => {
    const guarded = await startEdge({ port: 0, upstream: server.url, secret, apiKeys: JSON.stringify([key]) });
    onTestFinished(() => guarded.close());
    const page = await open(guarded.url);
    expectStatus(401);
    expect(await page.evaluate("document.activeElement.id")).toBe("key");
    await page.fill("#key", "bob's");
    await page.press("#key", "Tab");
    await expect.poll(() => here!.faults.length).toBe(1);
    expectStatus(401);
    await page.waitForSelector("#key[aria-invalid=true]");
    expect(await error(page)).toBe("The API key is not known.");
    await page.fill("#key", "alice's");
    await page.press("#key", "Tab");
    await page.waitForSelector("#model:not(:empty)");
    engine.script = words(["Hello", " Alice"]);
    await ask(page, "Hi");
    await settled(page);
    expect([await error(page), ...(await texts(page, ".text"))]).toEqual(["", "Hello Alice"]);
    await page.click("#code summary");
    for (const language of ["curl", "JavaScript", "Python"]) {
      await page.check(`input[value=${language}]`);
      await expect.poll(() => page.inputValue("#snippet")).toContain("API_KEY");
      expect(await page.inputValue("#snippet")).not.toContain("alice's");
    }
  });
});

describe("a stream of events", () => {
  const chunk = (content: string, draft: object) => `data: ${JSON.stringify({ choices: [{ delta: { content }, finish_reason: null }], draft })}\r\n\r\n`; // biome-ignore format: one line
  const whole = `: hello\n\n${chunk("é😀", { tokens: 1, accepted: 0, characters: 0 })}${chunk("画 x", { tokens: 2, accepted: 1, characters: 1 })}data: [DONE]\r\n\r\n`;
  /** What is read of these parts, each a read of its own. */
  async function read(...parts: Uint8Array[]) {
    const body = ReadableStream.from(parts);
    const answer = new Answer(async () => new Response(body as never));
    const pieces = await Array.fromAsync(answer);
    return { pieces, text: answer.text, tokens: answer.tokens, accepted: answer.accepted };
  }

  test("is read alike wherever it is cut, within characters and line ends too", async () => {
    const bytes = Buffer.from(whole);
    const pieces = [
      { drafted: "", own: "é😀" },
      { drafted: "画", own: " x" },
    ];
    for (let cut = 0; cut <= bytes.length; cut++)
      expect(await read(bytes.subarray(0, cut), bytes.subarray(cut))).toEqual({
        pieces,
        text: "é😀画 x",
        tokens: 3,
        accepted: 1,
      });
    expect((await read(...Array.from(bytes, (byte) => Uint8Array.of(byte)))).pieces).toEqual(pieces);
  });

  test.each([
    [
      "an error event",
      `data: {"error":{"message":"The engine has stopped.","param":null}}\n\n`,
      "The engine has stopped.",
    ],
    ["an end without [DONE]", "", "The answer broke off."],
  ])("fails in words on %s", async (_, end, message) => {
    const bytes = Buffer.from(whole.replace("data: [DONE]\r\n\r\n", end));
    await expect(read(bytes)).rejects.toThrow(new Refused(message, 200));
  });
});
