/** Where checkpoints, datasets and results live: one interface, over a directory or S3; hub repositories can be read. */

export interface ObjectInfo {
  /** Path with "/" between its parts, relative to the store's root. */
  key: string;
  bytes: number;
  /** SHA-256 of the content in hex, where the store knows it. */
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
  /** All objects whose key begins with `prefix`, sorted by key. A place that does not exist is a StoreError. */
  list(prefix?: string): Promise<ObjectInfo[]>;
  /** undefined when there is no such object. */
  stat(key: string): Promise<ObjectInfo | undefined>;
  /**
   * Bytes from … to-1 of an object, in chunks; `to` defaults to its end. Failures that may pass are tried again, from the
   * byte where they came. StoreError when there is no such object, or when it ends before `to`; the signal's reason when
   * it is aborted.
   */
  read(key: string, range?: { from?: number; to?: number }, signal?: AbortSignal): AsyncIterable<Uint8Array>;
}

export interface ObjectStore extends ReadableStore {
  /** Writes an object whole: until it resolves, and when it rejects, readers see what was there before. */
  write(key: string, body: Uint8Array | AsyncIterable<Uint8Array>, signal?: AbortSignal): Promise<void>;
  /** Removes an object; one that is not there is no error. */
  remove(key: string): Promise<void>;
}
