/** Images as they come in a request: data: URLs to bytes, bytes to hashes, their sizes. Does not look into the pictures. */
import type { ChatMessage, ChatRequest, ImagePart } from "./api.ts";
import { ApiError } from "./errors.ts";
import { toHex } from "./hex.ts";
import { LIMITS } from "./limits.ts";
import type { ImageRef, PixelLimits } from "./protocol.ts";

const MEDIA_TYPES = ["image/jpeg", "image/jpg", "image/png", "image/webp", "image/gif"];

/** A picture's encoded bytes, and where it first stands in the request, e.g. "messages[0].content[1]". */
export interface ChatImage {
  bytes: Uint8Array<ArrayBuffer>;
  where: string;
}

/**
 * The images of a chat, in order, by their hash or URL; and those that are here as bytes, by their hash. `model`: its own
 * limits. Throws ApiError 400 that names the image's place.
 */
export async function imagesOf(chat: ChatRequest, model: PixelLimits) {
  const refs: ImageRef[] = [];
  const images = new Map<string, ChatImage>();
  for (const { part, where } of imageParts(chat.messages)) {
    const limits = pixelLimits(chat, part, where, model);
    const { url } = part.image_url;
    if (/^https?:/i.test(url)) {
      if (url.length > LIMITS.urlCharacters)
        throw new ApiError(400, `${where}: the URL has more than ${LIMITS.urlCharacters} characters`, { param: where });
      refs.push({ hash: null, url, where, limits });
      continue;
    }
    let hash = hashOfName(url, where);
    if (hash === null) {
      const bytes = decodeDataUrl(url, where);
      hash = await hashImage(bytes);
      if (!images.has(hash)) images.set(hash, { bytes, where });
    }
    refs.push({ hash, url: null, where, limits });
  }
  return { refs, images };
}

/** The image parts in the order of the prompt, and where each stands. */
export function imageParts(messages: ChatMessage[]): { part: ImagePart; where: string }[] {
  return messages.flatMap(({ content }, i) =>
    typeof content === "string"
      ? []
      : content.flatMap((part, j) =>
          part.type === "image_url" ? [{ part, where: `messages[${i}].content[${j}]` }] : [],
        ),
  );
}

/** The hash in `sha256:HASH`; null for a URL of another kind. Throws ApiError 400 for what is no hash. */
function hashOfName(url: string, where: string): string | null {
  if (!/^sha256:/i.test(url)) return null;
  const [, hash] = /^sha256:([0-9a-f]{64})$/.exec(url) ?? [];
  if (hash) return hash;
  const why = "a picture's name must be sha256: and 64 digits in lower-case hex";
  throw new ApiError(400, `${where}: ${why}`, { code: "invalid_image_url", param: where });
}

/** For a picture that came as a name alone, and is not held. `where`: its place in the request. */
export function imageNotFound(where: string): ApiError {
  const message = `${where}: the picture of this name is not held here (any more) for this size; send its bytes again`;
  return new ApiError(404, message, { code: "image_not_found", param: where });
}

/** Bytes of a base64 data: URL. Throws ApiError 400 that begins with `where`, e.g. "messages[0].content[1]". */
function decodeDataUrl(url: string, where: string): Uint8Array<ArrayBuffer> {
  const refuse = (why: string, options: { code: string; cause?: unknown } = { code: "invalid_image_url" }) =>
    new ApiError(400, `${where}: ${why}`, { param: where, ...options });
  const comma = url.indexOf(",");
  const header = /^data:([^;,]*)((?:;[^;,]*)*)$/i.exec(url.slice(0, Math.min(comma, 200)));
  if (comma < 0 || !header)
    throw refuse(
      `must be a data: URL with base64, like "data:image/png;base64,…", an http(s) URL, or a name "sha256:…"`,
    );
  const mediaType = header[1].toLowerCase();
  if (!MEDIA_TYPES.includes(mediaType)) {
    throw refuse(`media type ${JSON.stringify(mediaType)} is not supported; send JPEG, PNG, WebP or GIF`);
  }
  if (!/;base64$/i.test(header[2])) throw refuse("the data: URL must be base64");
  let bytes: Uint8Array<ArrayBuffer>;
  try {
    bytes = fromBase64(url.slice(comma + 1));
  } catch (cause) {
    throw refuse("the data: URL's base64 is malformed", { code: "invalid_base64", cause });
  }
  if (bytes.length === 0) throw refuse("the image is empty (0 bytes)", { code: "empty_image" });
  return bytes;
}

/** Throws for malformed base64. workerd has it natively, and faster; Node 24 has not. */
function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  const native = Uint8Array as { fromBase64?: (text: string) => Uint8Array<ArrayBuffer> };
  if (native.fromBase64) return native.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** The name of an image: the SHA-256 of its encoded bytes in hex. */
export async function hashImage(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  return toHex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)));
}

/** Most pixels of `detail: "low"`; and no more than a quarter of the model's own, if it can see so few. */
const LOW_DETAIL = 512 * 512;

/**
 * The area that a picture is to be resized to: what its part says, else the request, else the model. Throws ApiError 400
 * when the two limits cross; it names the one that stands nearer to the picture.
 */
function pixelLimits(chat: ChatRequest, part: ImagePart, where: string, model: PixelLimits): PixelLimits {
  const find = (name: "min_pixels" | "max_pixels", ofModel: number) => {
    const places: [place: string, value: number | null | undefined][] = [
      [`${where}.image_url.${name}`, part.image_url[name]],
      [`${where}.${name}`, part[name]],
      [name, chat[name]],
      [`mm_processor_kwargs.${name}`, chat.mm_processor_kwargs?.[name]],
      ["the model's own", ofModel],
    ];
    const at = places.findIndex(([, value]) => value != null);
    return { at, place: places[at][0], value: places[at][1]! };
  };
  const min = find("min_pixels", model.minPixels);
  const max = find("max_pixels", model.maxPixels);
  if (min.value > max.value) {
    const [param, why] =
      min.at <= max.at
        ? [min.place, `${min.value} is more than max_pixels, ${max.value} (${max.place})`]
        : [max.place, `${max.value} is less than min_pixels, ${min.value} (${min.place})`];
    throw new ApiError(400, `${param}: ${why}`, { param });
  }
  const low = Math.max(model.minPixels, Math.min(LOW_DETAIL, Math.floor(model.maxPixels / 4)));
  const maxPixels = part.image_url.detail === "low" ? Math.min(max.value, low) : max.value;
  return { minPixels: Math.min(min.value, maxPixels), maxPixels };
}
