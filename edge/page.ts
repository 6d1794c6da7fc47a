/** The playground as an answer. The page is one text, whose style and script a policy allows by their hashes. */
import page from "./playground/index.html";

let policy: string | null = null;

/** The page; it can reach nothing but this server. */
export async function pageResponse(): Promise<Response> {
  policy ??= await policyOf(page);
  return new Response(page, {
    headers: {
      "content-type": "text/html; charset=utf-8",
      "content-security-policy": policy,
      "cache-control": "no-cache",
      "referrer-policy": "no-referrer",
      "x-content-type-options": "nosniff",
    },
  });
}

async function policyOf(html: string): Promise<string> {
  const hashes = async (tag: string) => {
    const texts = [...html.matchAll(new RegExp(`<${tag}[^>]*>([\\s\\S]*?)</${tag}>`, "g"))].map(([, text]) => text);
    return (await Promise.all(texts.map(hash))).join(" ") || "'none'";
  };
  const sources = {
    "default-src": "'none'",
    "script-src": await hashes("script"),
    "style-src": await hashes("style"),
    "connect-src": "'self'",
    "img-src": "blob: data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
  };
  return Object.entries(sources)
    .map((source) => source.join(" "))
    .join("; ");
}

async function hash(text: string): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text)));
  return `'sha256-${btoa(String.fromCharCode(...digest))}'`;
}
