/** Where checkpoints, datasets and results live: one interface, over a directory or S3; hub repositories can be read. */

export interface ObjectInfo {
  /** Path with "/" between its parts, relative to the store's root. */
  key: string;
  bytes: number;
  /** SHA-256 of the content in hex, where the store knows it. S3's `list` never does; its `stat` may. */
  sha256?: string;
  /** Changes with the content, where the store has such a mark: a download that goes on compares it. */
  version?: string;
}

/** A file or object is not there, or a store refuses or fails; the message names the store and the key. */
export class StoreError extends Error {
  override name = "StoreError";
}

export interface ReadableStore {
  /** As the user named it. */
  readonly location: string;
  /**
   * All objects whose key begins with `prefix`, sorted by key. A place that does not exist is a StoreError; S3 knows
   * buckets only, so that nothing under a prefix is an empty list. Aborted, it rejects with the signal's reason.
   */
  list(prefix?: string, signal?: AbortSignal): Promise<ObjectInfo[]>;
  /** undefined when there is no such object. */
  stat(key: string, signal?: AbortSignal): Promise<ObjectInfo | undefined>;
  /**
   * Bytes from … to-1 of an object, in chunks; `to` defaults to its end. Failures that may pass are tried again, from the
   * byte where they came. StoreError when there is no such object, when it has no byte `from` (but an empty object can be
   * read whole), when it ends before `to`, when more than that comes, or when it changes meanwhile; the signal's reason when it is aborted. With
   * to <= from nothing is asked and nothing comes.
   */
  read(key: string, range?: { from?: number; to?: number }, signal?: AbortSignal): AsyncIterable<Uint8Array>;
}

export interface ObjectStore extends ReadableStore {
  /**
   * Writes an object whole: until it resolves, and when it rejects, readers see what was there before. An error of the
   * body's comes out as it is. The signal is looked at between two chunks of the body.
   */
  write(key: string, body: Uint8Array | AsyncIterable<Uint8Array>, signal?: AbortSignal): Promise<void>;
  /** Removes an object; one that is not there is no error. */
  remove(key: string): Promise<void>;
}

/** StoreError for a key that is empty, absolute, or has a part that is empty, "." or "..". */
export function checkKey(location: string, key: string): void {
  if (key.split("/").some((part) => part === "" || part === "." || part === "..") || key.includes("\0"))
    throw new StoreError(`${location}: ${JSON.stringify(key)} is not a path inside it`);
}

export const NO_SUCH_BYTE = "it ends before the first byte that was asked for";

/** The order of `list`. Not localeCompare: it has to be the same everywhere. */
export const byKey = (a: ObjectInfo, b: ObjectInfo) => (a.key < b.key ? -1 : a.key > b.key ? 1 : 0);

/** A body's chunks, until the signal is aborted. */
export async function* chunks(body: Uint8Array | AsyncIterable<Uint8Array>, signal?: AbortSignal) {
  signal?.throwIfAborted();
  if (body instanceof Uint8Array) yield body;
  else
    for await (const chunk of body) {
      yield chunk;
      signal?.throwIfAborted();
    }
}
