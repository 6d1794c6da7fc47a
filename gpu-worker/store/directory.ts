/** A plain directory as a store. */
import { randomBytes } from "node:crypto";
import type { Stats } from "node:fs";
import { mkdir, open, readdir, realpath, rename, rm, stat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { byKey, checkKey, chunks, NO_SUCH_BYTE, type ObjectInfo, type ObjectStore, StoreError } from "./store.ts";

const CHUNK = 1 << 20;
/** Objects that are being written, or were when the process died. */
const TEMPORARY = /^\.vispec-[0-9a-f]{16}\.tmp$/;

const codeOf = (error: unknown) => (error as NodeJS.ErrnoException).code ?? "";

const infoOf = (key: string, { size, mtimeMs }: Stats) => ({ key, bytes: size, version: `${mtimeMs}-${size}` });

export class DirectoryStore implements ObjectStore {
  readonly location: string;

  constructor(location: string) {
    this.location = location;
  }

  async list(prefix = "", signal?: AbortSignal): Promise<ObjectInfo[]> {
    const infos: ObjectInfo[] = [];
    /** `above` are the real paths of the folders on the way: a link to one of them goes in circles. */
    const walk = async (names: string[], folder: string, above: string[]): Promise<void> => {
      for (const name of names) {
        signal?.throwIfAborted();
        const key = folder + name;
        const path = join(this.location, key);
        // What cannot be looked at is no object; if it is one that is needed, it will be missed.
        const stats = await stat(path).catch(() => undefined);
        if (stats?.isDirectory() && (`${key}/`.startsWith(prefix) || prefix.startsWith(`${key}/`))) {
          const real = await realpath(path).catch(() => "");
          if (!above.includes(real)) await walk(await readdir(path).catch(() => []), `${key}/`, [...above, real]);
        } else if (stats?.isFile() && key.startsWith(prefix) && !TEMPORARY.test(name)) infos.push(infoOf(key, stats));
      }
    };
    signal?.throwIfAborted();
    const names = await this.#io("", readdir(this.location));
    await walk(names, "", [await this.#io("", realpath(this.location))]);
    return infos.sort(byKey);
  }

  async stat(key: string, signal?: AbortSignal): Promise<ObjectInfo | undefined> {
    signal?.throwIfAborted();
    const info = await this.#io(
      key,
      stat(this.#path(key)).catch((error) => {
        if (codeOf(error) !== "ENOENT" && codeOf(error) !== "ENOTDIR") throw error;
      }),
    );
    return info?.isFile() ? infoOf(key, info) : undefined;
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
