/** A request's pictures on their way into the engine: fetched if need be, put, or found missing. Knows no HTTP server. */
import type { PreparedChat } from "../../shared/chat.ts";
import { ApiError, toApiError } from "../../shared/errors.ts";
import { hashImage } from "../../shared/images.ts";
import { imageKey, type PixelLimits } from "../../shared/protocol.ts";
import type { Engine } from "../engine.ts";
import { untilAborted } from "../until-aborted.ts";
import { fetchImage, type ImageUrls } from "./fetch-image.ts";

/** Of one request: how many may be named by URL, how many are fetched at once, and the bytes of all, which are held. */
const MOST_FETCHED = 64;
const AT_ONCE = 4;
const FETCHED_LIMIT = 64 * 2 ** 20;

export interface Picture {
  /** The engine's name for it. */
  key: string;
  /** Where it stands in the client's request. */
  where: string;
  limits: PixelLimits;
  /** Absent where only the edge has them. */
  bytes?: Uint8Array<ArrayBuffer>;
}

/** The pictures in order. Those that are named by URL are fetched; `images` are those that came with the request. */
export async function collectPictures(
  { request, images }: PreparedChat,
  urls: ImageUrls,
  signal: AbortSignal,
): Promise<Picture[]> {
  if (request.images.filter(({ hash }) => hash === null).length > MOST_FETCHED)
    throw tooMuch(`more than ${MOST_FETCHED} pictures are named by URL; send the others themselves`);
  const pictures: Picture[] = [];
  let fetched = 0;
  for (let from = 0; from < request.images.length; from += AT_ONCE) {
    const some = request.images.slice(from, from + AT_ONCE).map(async ({ hash, url, where, limits }) => {
      if (hash !== null)
        return { key: imageKey(request.tenant, hash, limits), where, limits, bytes: images.get(hash)?.bytes };
      const bytes = await fetchImage(url ?? "", where, urls, signal);
      fetched += bytes.length;
      return { key: imageKey(request.tenant, await hashImage(bytes), limits), where, limits, bytes };
    });
    pictures.push(...(await Promise.all(some)));
    if (fetched > FETCHED_LIMIT)
      throw tooMuch(`the pictures that are named by URL are together larger than ${FETCHED_LIMIT / 2 ** 20} MiB`);
  }
  return pictures;
}

function tooMuch(what: string): ApiError {
  return new ApiError(400, `messages: ${what}`, { code: "images_too_large", param: "messages" });
}

/** The keys that the engine lacks, and the indices of those pictures whose bytes are not here either. */
export async function lackingPictures(engine: Engine, pictures: Picture[], signal: AbortSignal) {
  const lacking = new Set(await untilAborted(engine.missingImages(pictures.map(({ key }) => key)), signal));
  return { lacking, missing: [...pictures.keys()].filter((i) => lacking.has(pictures[i].key) && !pictures[i].bytes) };
}

/**
 * Gives the engine what it lacks. Returns the indices of those whose bytes are not here, and then puts none. Throws
 * ApiError 400 that names the picture's place for one that the engine cannot use.
 */
export async function putMissing(engine: Engine, pictures: Picture[], signal: AbortSignal): Promise<number[]> {
  const { lacking, missing } = await lackingPictures(engine, pictures, signal);
  if (missing.length > 0) return missing;
  for (const { key, where, limits, bytes } of pictures) {
    if (!lacking.delete(key)) continue;
    try {
      await untilAborted(engine.putImage(key, bytes!, limits), signal);
    } catch (thrown) {
      const { status, message, code } = toApiError(thrown);
      if (status >= 500) throw thrown;
      throw new ApiError(status, `${where}: ${message}`, { code: code ?? undefined, param: where, cause: thrown });
    }
  }
  return [];
}
