/**
 * Makes the edge's one file: `npm start` serves it with workerd, `wrangler` deploys it (wrangler.toml calls this).
 * The playground's page comes in as a text with its style and its script inside.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { type BuildOptions, build, type Plugin, stop } from "esbuild";

const edge = fileURLToPath(new URL("../edge/", import.meta.url));
const common: BuildOptions = { bundle: true, format: "esm", target: "esnext", logLevel: "error" };

/** Writes the bundle to `outfile`. Rejects with esbuild's complaint. */
export async function bundleEdge(outfile: string): Promise<void> {
  const conditions = ["workerd", "worker", "browser"];
  await build({
    ...common,
    entryPoints: [join(edge, "index.ts")],
    outfile,
    conditions,
    external: ["cloudflare:workers"],
    minify: true,
    plugins: [page],
  });
}

/** Gives `import page from "….html"` the page, self-contained. */
const page: Plugin = {
  name: "page",
  setup({ onLoad }) {
    onLoad({ filter: /\.html$/ }, async ({ path }) => ({ contents: await pageOf(path), loader: "text" }));
  },
};

/** The HTML file with its `<link href=*.css>` and `<script src=*.ts>` replaced by what they name. */
async function pageOf(path: string): Promise<string> {
  let html = await readFile(path, "utf8");
  for (const [tag, file] of html.matchAll(
    /<link rel="stylesheet" href="([^"]+)">|<script type="module" src="([^"]+)"><\/script>/g,
  )) {
    const name = file ?? /src="([^"]+)"/.exec(tag)![1];
    const { outputFiles } = await build({
      ...common,
      entryPoints: [join(path, "..", name)],
      write: false,
      minify: true,
    });
    const text = outputFiles![0].text.trim();
    html = html.replace(tag, () =>
      file ? `<style>${text}</style>` : `<script type="module">${text.replaceAll("</script", "<\\/script")}</script>`,
    );
  }
  return html;
}

/** Ends the bundler's process, some 40 MB, when no more bundles are wanted. */
export const endBundler = stop;

if (import.meta.main) await bundleEdge(process.argv[2]);
