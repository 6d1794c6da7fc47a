/** Images as they come in a request: data: URLs to bytes, bytes to hashes. Does not look into the pictures. */
import { ApiError } from "./errors.ts";

const MEDIA_TYPES = ["image/jpeg", "image/jpg", "image/png", "image/webp", "image/gif"];

/** Bytes of a base64 data: URL. Throws ApiError 400 that begins with `where`, e.g. "messages[0].content[1]". */
export function decodeDataUrl(url: string, where: string): Uint8Array<ArrayBuffer> {
  const refuse = (why: string, code = "invalid_image_url") =>
    new ApiError(400, `${where}: ${why}`, { param: where, code });
  if (/^https?:/i.test(url)) {
    throw refuse("images are not fetched from the network; send the picture itself as a data: URL");
  }
  const comma = url.indexOf(",");
  const header = /^data:([^;,]*)((?:;[^;,]*)*)$/i.exec(url.slice(0, Math.min(comma, 200)));
  if (comma < 0 || !header) throw refuse(`must be a data: URL with base64, like "data:image/png;base64,…"`);
  const mediaType = header[1].toLowerCase();
  if (!MEDIA_TYPES.includes(mediaType)) {
    throw refuse(`media type ${JSON.stringify(mediaType)} is not supported; send JPEG, PNG, WebP or GIF`);
  }
  if (!/;base64$/i.test(header[2])) throw refuse("the data: URL must be base64");
  let binary: string;
  try {
    binary = atob(url.slice(comma + 1));
  } catch (cause) {
    throw new ApiError(400, `${where}: the data: URL's base64 is malformed`, {
      param: where,
      code: "invalid_base64",
      cause,
    });
  }
  if (binary.length === 0) throw refuse("the image is empty (0 bytes)", "empty_image");
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** The name of an image: the SHA-256 of its encoded bytes in hex. */
export async function hashImage(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
