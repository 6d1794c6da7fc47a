/** A plain directory as a store. */
import { randomBytes } from "node:crypto";
import { mkdir, open, readdir, rename, rm, stat } from "node:fs/promises";
import { dirname, join, relative, sep } from "node:path";
import { byKey, checkKey, chunks, NO_SUCH_BYTE, type ObjectInfo, type ObjectStore, StoreError } from "./store.ts";

const CHUNK = 1 << 20;
/** Objects that are being written, or were when the process died. */
const TEMPORARY = /^\.vispec-[0-9a-f]{16}\.tmp$/;

const codeOf = (error: unknown) => (error as NodeJS.ErrnoException).code ?? "";

export class DirectoryStore implements ObjectStore {
  readonly location: string;

  constructor(location: string) {
    this.location = location;
  }

  async list(prefix = ""): Promise<ObjectInfo[]> {
    const entries = await this.#io("", readdir(this.location, { recursive: true, withFileTypes: true }));
    const infos: ObjectInfo[] = [];
    for (const entry of entries) {
      if (entry.isDirectory() || TEMPORARY.test(entry.name)) continue;
      const key = relative(this.location, join(entry.parentPath, entry.name)).replaceAll(sep, "/");
      const info = key.startsWith(prefix) ? await this.stat(key) : undefined;
      if (info) infos.push(info);
    }
    return infos.sort(byKey);
  }

  async stat(key: string): Promise<ObjectInfo | undefined> {
    const info = await this.#io(
      key,
      stat(this.#path(key)).catch((error) => {
        if (codeOf(error) !== "ENOENT" && codeOf(error) !== "ENOTDIR") throw error;
      }),
    );
    return info?.isFile() ? { key, bytes: info.size, version: `${info.mtimeMs}-${info.size}` } : undefined;
  }

  async *read(key: string, { from = 0, to }: { from?: number; to?: number } = {}, signal?: AbortSignal) {
    if (to !== undefined && to <= from) return;
    await using file = await this.#io(key, open(this.#path(key)));
    const { size } = await this.#io(key, file.stat());
    const name = join(this.location, key);
    if (from > size || (from === size && size > 0)) throw new StoreError(`${name}: ${NO_SUCH_BYTE}`);
    to ??= size;
    for (let at = from; at < to; ) {
      signal?.throwIfAborted();
      const length = Math.min(CHUNK, to - at);
      const { bytesRead, buffer } = await this.#io(key, file.read(Buffer.allocUnsafe(length), 0, length, at));
      if (bytesRead === 0) throw new StoreError(`${name} has ${at} bytes, not the ${to} that were asked for`);
      at += bytesRead;
      yield buffer.subarray(0, bytesRead);
    }
  }

  async write(key: string, body: Uint8Array | AsyncIterable<Uint8Array>, signal?: AbortSignal): Promise<void> {
    const path = this.#path(key);
    const temporary = join(dirname(path), `.vispec-${randomBytes(8).toString("hex")}.tmp`);
    await this.#io(key, mkdir(dirname(path), { recursive: true }));
    try {
      {
        await using file = await this.#io(key, open(temporary, "wx"));
        for await (const chunk of chunks(body, signal)) await this.#io(key, file.writeFile(chunk));
        await this.#io(key, file.sync());
      }
      await this.#io(key, rename(temporary, path));
    } catch (error) {
      await rm(temporary, { force: true });
      throw error;
    }
  }

  async remove(key: string): Promise<void> {
    await this.#io(key, rm(this.#path(key), { force: true }));
  }

  #path(key: string): string {
    checkKey(this.location, key);
    return join(this.location, key);
  }

  /** The operation's result; its failure as a StoreError in Node's words, without code and path. */
  async #io<T>(key: string, operation: Promise<T>): Promise<T> {
    try {
      return await operation;
    } catch (error) {
      const reason = /^\w+: (.+?), /.exec((error as Error).message)?.[1] ?? (error as Error).message;
      throw new StoreError(`${join(this.location, key)}: ${reason}`, { cause: error });
    }
  }
}
