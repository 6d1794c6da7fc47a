/** Writes docs/playground.png: `node test/support/screenshot.ts`. A real answer; on a machine with nothing else to do. */
import { join } from "node:path";
import sharp from "sharp";
import { openBrowser, visit } from "./browser.ts";
import { ROOT } from "./cli.ts";
import { GOLDENS } from "./goldens.ts";
import { startStack } from "./stack.ts";

await using stack = await startStack();
const browser = await openBrowser();
const { page } = await visit(browser, stack.url, { viewport: { width: 1000, height: 700 }, deviceScaleFactor: 2 });
await page.check("#compare");
// The first rounds warm everything up.
for (let round = 0; round < 6; round++) {
  await page.click("#new");
  await page.setInputFiles("#file", join(GOLDENS, "images/17-describe2-0.png"));
  await page.locator("#pictures img").waitFor();
  await page.fill("#question", "Describe this image in detail.");
  await page.press("#question", "Enter");
  await page.waitForSelector(".verdict");
}
await page.evaluate("document.activeElement.blur()");
const picture = await page.screenshot({ fullPage: true });
await sharp(picture).png({ palette: true, effort: 10 }).toFile(join(ROOT, "docs/playground.png"));
await browser.close();
