/**
 * Where an import grows: OUT.partial, with the checkpoint in a folder of its own and what it is made of in import.json.
 * It becomes OUT by one rename at the end.
 */
import { createHash } from "node:crypto";
import { chmodSync, constants, copyFileSync, createReadStream, existsSync, lstatSync, mkdirSync, readdirSync, readFileSync, renameSync, rmdirSync, rmSync, statfsSync, statSync, writeFileSync } from "node:fs"; // biome-ignore format: one line
import { open } from "node:fs/promises";
import { dirname, join } from "node:path";
import { z } from "zod";
import { CheckpointError } from "../../shared/errors.ts";
import { formatBytes } from "../progress.ts";
import { DirectoryStore } from "../store/directory.ts";
import { type ObjectInfo, type ReadableStore, StoreError } from "../store/store.ts";
import type { Squares } from "./convert.ts";

/** No room for what is to be written. What was written stays. */
export class DiskFullError extends Error {
  override name = "DiskFullError";
  readonly code = "ENOSPC";
}

/** The work's result; a full disk is told as such. */
export async function writing<T>(file: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    const { code = "" } = error as NodeJS.ErrnoException;
    if (error instanceof DiskFullError || !["ENOSPC", "EDQUOT"].includes(code)) throw error;
    const message = `the disk is full: ${file} is not whole; once there is room, the same command goes on from there`;
    throw new DiskFullError(message, { cause: error });
  }
}

const State = z.object({
  /** What was asked for, in words: an import that goes on has to be of the same. */
  request: z.string(),
  /** What tells an object that has changed since, by the names of the shards. */
  marks: z.record(z.string(), z.string()),
  /** What quantization cost the matrices that are done. */
  errors: z.record(
    z.string(),
    z.custom<Squares>((value) => typeof value === "object" && value !== null),
  ),
});

/** Those of this process. They end with it; who is killed leaves a lock that the next one takes over. */
const locks = new Set<string>();
process.on("exit", () => {
  for (const lock of locks) rmSync(lock, { force: true });
});

function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== "ESRCH";
  }
}

/** Takes the lock of `folder`, or throws CheckpointError while another process has it. */
function lockFolder(folder: string): void {
  const lock = join(folder, "lock");
  const take = () => writeFileSync(lock, String(process.pid), { flag: "wx" });
  try {
    take();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    const pid = Number.parseInt(readFileSync(lock, "utf8"), 10);
    // In containers, who was killed and who goes on often have the same number.
    if (pid !== process.pid && isAlive(pid))
      throw new CheckpointError(`${folder} is being written by process ${pid}; if that is not so, remove ${lock}`);
    rmSync(lock);
    take();
  }
  locks.add(lock);
}

/** Makes a folder and those above it. One by one: Node's recursive mkdir never returns below /proc. */
function makeFolder(folder: string): void {
  try {
    mkdirSync(folder);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "EEXIST") return;
    if (code !== "ENOENT") throw error;
    makeFolder(dirname(folder));
    mkdirSync(folder);
  }
}

/** Makes OUT.partial; CheckpointError where that cannot be. */
const makePartial = (out: string) => making(out, () => makeFolder(`${out}.partial`));

function making(out: string, make: () => unknown): void {
  try {
    make();
  } catch (error) {
    if (error instanceof CheckpointError) throw error;
    throw new CheckpointError(`${out} cannot be written: ${(error as Error).message}`, { cause: error });
  }
}

/** Whether a path is taken, be it by a link that leads nowhere. */
export function isTaken(path: string): boolean {
  try {
    return lstatSync(path) !== undefined;
  } catch {
    return false;
  }
}

export class Staging {
  readonly out: string;
  /** The checkpoint. */
  readonly folder: string;
  readonly #root: string;
  readonly #state: z.infer<typeof State>;

  /**
   * Begins, or goes on with what was broken off; CheckpointError when that was of something else or is damaged, or when
   * another process is at it.
   */
  constructor(out: string, request: string) {
    this.out = out;
    this.#root = `${out}.partial`;
    makePartial(out);
    making(out, () => lockFolder(this.#root));
    this.folder = join(this.#root, "checkpoint");
    if (isTaken(out)) {
      if (!this.begun) this.discard();
      throw new CheckpointError(`${out} exists already`);
    }
    this.#state = this.begun ? this.#load() : { request, marks: {}, errors: {} };
    if (this.#state.request !== request)
      throw new CheckpointError(
        `${this.#root} is an unfinished import of ${this.#state.request}, not of ${request}: finish it, or remove it`,
      );
    making(out, () => mkdirSync(this.folder, { recursive: true }));
  }

  get #json(): string {
    return join(this.#root, "import.json");
  }

  /** Whether weights may have been written. */
  get begun(): boolean {
    return existsSync(this.#json);
  }

  path(name: string): string {
    return join(this.folder, name);
  }

  /** Where a shard is kept from its download to its conversion. */
  original(name: string): string {
    return join(this.#root, name.replaceAll("/", "."));
  }

  /** Notes the objects that shards are made of; what came of others, before they changed, is removed. */
  begin(objects: Iterable<readonly [name: string, info: ObjectInfo]>): void {
    const mark = ({ bytes, sha256, version }: ObjectInfo) => `${bytes} ${sha256 ?? version ?? ""}`;
    const marks = Object.fromEntries([...objects].map(([name, info]) => [name, mark(info)]));
    for (const [name, before] of Object.entries(this.#state.marks))
      if (before !== marks[name])
        for (const file of [this.path(name), this.original(name)])
          for (const end of ["", ".part"]) rmSync(file + end, { force: true });
    this.#state.marks = marks;
    this.#save();
  }

  get errors(): Readonly<Record<string, Squares>> {
    return this.#state.errors;
  }

  addErrors(errors: Record<string, Squares>): void {
    Object.assign(this.#state.errors, errors);
    this.#save();
  }

  #load(): z.infer<typeof State> {
    try {
      return State.parse(JSON.parse(readFileSync(this.#json, "utf8")));
    } catch (cause) {
      throw new CheckpointError(`${this.#json} is damaged: remove ${this.#root}`, { cause });
    }
  }

  #save(): void {
    writeFileSync(`${this.#json}.new`, JSON.stringify(this.#state), { flush: true });
    renameSync(`${this.#json}.new`, this.#json);
  }

  /** Throws DiskFullError when so many bytes more surely don't fit. */
  checkSpace(bytes: number): void {
    const { bavail, bsize } = statfsSync(this.#root);
    if (bytes <= bavail * bsize) return;
    const free = formatBytes(bavail * bsize);
    throw new DiskFullError(`${this.out} needs ${formatBytes(bytes)} more; its disk has ${free} left`);
  }

  /** Removes all that imports write, and nothing else that may be there. */
  discard(): void {
    rmSync(this.folder, { recursive: true, force: true });
    rmSync(this.#json, { force: true });
    const lock = join(this.#root, "lock");
    rmSync(lock, { force: true });
    locks.delete(lock);
    if (readdirSync(this.#root).length === 0) rmdirSync(this.#root);
  }

  /** Gives the checkpoint its name. */
  async finish(): Promise<void> {
    await sync(this.folder);
    renameSync(this.folder, this.out);
    await sync(dirname(this.out));
    this.discard();
  }
}

/** Has the disk hold a folder's names. */
async function sync(folder: string): Promise<void> {
  await using handle = await open(folder, "r");
  await handle.sync();
}

/** Bytes of an object that are in `file` already. */
export function bytesHere(file: string): number {
  return statSync(existsSync(file) ? file : `${file}.part`, { throwIfNoEntry: false })?.size ?? 0;
}

/**
 * Brings an object into `file`, which appears when it is whole and, where the store tells a hash, checked; goes on with
 * what is in `file.part`. `wrote` hears of bytes. Throws StoreError for one that is damaged, and forgets it.
 */
export async function fetchFile(
  store: ReadableStore,
  info: ObjectInfo,
  file: string,
  wrote: (bytes: number) => void,
  signal: AbortSignal,
): Promise<void> {
  const part = `${file}.part`;
  if (existsSync(file)) return;
  if (!existsSync(part) && cloned(store, info, part)) wrote(info.bytes);
  const hash = info.sha256 === undefined ? undefined : createHash("sha256");
  if (hash && existsSync(part)) for await (const chunk of createReadStream(part, { signal })) hash.update(chunk);
  {
    await using handle = await open(part, "a");
    const { size: from } = await handle.stat();
    if (from < info.bytes)
      for await (const chunk of store.read(info.key, { from, to: info.bytes }, signal)) {
        await handle.writeFile(chunk);
        hash?.update(chunk);
        wrote(chunk.length);
      }
    await handle.sync();
  }
  const [size, digest] = [statSync(part).size, hash?.digest("hex")];
  if (size !== info.bytes || info.sha256 !== digest) {
    rmSync(part);
    const what =
      size === info.bytes ? `its SHA-256 is ${digest}, not ${info.sha256}` : `${size} bytes, not ${info.bytes}`;
    throw new StoreError(`${store.location}/${info.key} is damaged: ${what}`);
  }
  renameSync(part, file);
}

/** Path of an object of a store that is a directory. */
export function localFile(store: ReadableStore, key: string): string | undefined {
  return store instanceof DirectoryStore ? join(store.location, key) : undefined;
}

/** Shares a local file's blocks where the file system can, which takes neither time nor room; says whether it did. */
function cloned(store: ReadableStore, { key }: ObjectInfo, to: string): boolean {
  const from = localFile(store, key);
  try {
    if (from) {
      copyFileSync(from, to, constants.COPYFILE_FICLONE_FORCE);
      chmodSync(to, 0o666 & ~process.umask()); // the copy has the mode of what may be read-only
    }
    return from !== undefined;
  } catch {
    rmSync(to, { force: true });
    return false;
  }
}
