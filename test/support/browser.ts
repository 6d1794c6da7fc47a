/** A headless Chromium in which a page reaches its own origin only, and in which nothing goes wrong unseen. */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import chromium from "@sparticuz/chromium";
import { type Browser, type BrowserContextOptions, type Page, chromium as playwright } from "playwright-core";

/** What it would look up outside on its own is off. */
const ARGS = [
  "--no-sandbox",
  "--no-zygote",
  "--disable-gpu",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--no-first-run",
];

export async function openBrowser(): Promise<Browser> {
  return playwright.launch({ executablePath: await chromium.executablePath(), args: ARGS });
}

/** A page, and what went wrong in it so far: messages in its console, errors, requests to elsewhere (which fail). */
export interface Visit extends AsyncDisposable {
  page: Page;
  faults: string[];
}

export async function visit(browser: Browser, url: string, options: BrowserContextOptions = {}): Promise<Visit> {
  const context = await browser.newContext({ permissions: ["clipboard-read", "clipboard-write"], ...options });
  const faults: string[] = [];
  const { origin } = new URL(url);
  await context.route(
    (asked) => asked.origin !== origin,
    (route) => {
      faults.push(`request to ${route.request().url()}`);
      return route.abort();
    },
  );
  const page = await context.newPage();
  page.on("console", (message) => faults.push(message.text()));
  page.on("pageerror", (error) => faults.push(String(error)));
  await page.goto(url);
  return { page, faults, [Symbol.asyncDispose]: () => context.close() };
}

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

interface Violation {
  id: string;
  impact: string;
  nodes: { html: string }[];
}

/** axe's serious and critical findings in the page as it is. */
export async function axeFindings(page: Page): Promise<string[]> {
  await page.evaluate(axe);
  const violations = (await page.evaluate("axe.run().then((results) => results.violations)")) as Violation[];
  const grave = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
  return grave.flatMap(({ id, nodes }) => nodes.map(({ html }) => `${id}: ${html}`));
}

/** What a person's files, or without any a link, cause in the page: pasted, held over it, or dropped. */
export async function give(
  page: Page,
  way: "paste" | "dragover" | "drop",
  files: { name: string; mimeType: string; buffer: Buffer }[],
) {
  const sources = files.map(({ name, mimeType, buffer }) => [name, mimeType, buffer.toString("base64")]);
  await page.evaluate(`{
    const data = new DataTransfer();
    for (const [name, type, base64] of ${JSON.stringify(sources)})
      data.items.add(new File([Uint8Array.fromBase64(base64)], name, { type }));
    if (data.files.length === 0) data.setData("text/uri-list", "http://127.0.0.1:9/picture.png");
    const options = { bubbles: true, cancelable: true };
    const event =
      "${way}" === "paste"
        ? new ClipboardEvent("paste", { ...options, clipboardData: data })
        : new DragEvent("${way}", { ...options, dataTransfer: data });
    document.querySelector("#question").dispatchEvent(event);
  }`);
}
