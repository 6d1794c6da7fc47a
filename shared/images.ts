/** Images as they come in a request: data: URLs to bytes, bytes to hashes, their sizes. Does not look into the pictures. */
import type { ChatRequest, ImagePart } from "./api.ts";
import { ApiError } from "./errors.ts";
import { toHex } from "./hex.ts";
import type { PixelLimits } from "./protocol.ts";

const MEDIA_TYPES = ["image/jpeg", "image/jpg", "image/png", "image/webp", "image/gif"];

export function isHttpUrl(url: string): boolean {
  return /^https?:/i.test(url);
}

/** Bytes of a base64 data: URL. Throws ApiError 400 that begins with `where`, e.g. "messages[0].content[1]". */
export function decodeDataUrl(url: string, where: string): Uint8Array<ArrayBuffer> {
  const refuse = (why: string, options: { code: string; cause?: unknown } = { code: "invalid_image_url" }) =>
    new ApiError(400, `${where}: ${why}`, { param: where, ...options });
  const comma = url.indexOf(",");
  const header = /^data:([^;,]*)((?:;[^;,]*)*)$/i.exec(url.slice(0, Math.min(comma, 200)));
  if (comma < 0 || !header)
    throw refuse(`must be a data: URL with base64, like "data:image/png;base64,…", or an http(s) URL`);
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
export function pixelLimits(chat: ChatRequest, part: ImagePart, where: string, model: PixelLimits): PixelLimits {
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
