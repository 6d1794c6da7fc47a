/** Reads single files out of a zip archive on the disk, without holding it in memory. No zip64, no encryption. */
import { createReadStream, createWriteStream } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { PassThrough } from "node:stream";
import { pipeline } from "node:stream/promises";
import { crc32, createInflateRaw } from "node:zlib";

/** Signatures and sizes of the records, and the longest comment of an archive (APPNOTE.TXT, 4.3). */
const DIRECTORY_END = { signature: 0x06054b50, bytes: 22, comment: 65_535 };
const DIRECTORY_ENTRY = { signature: 0x02014b50, bytes: 46 };
const LOCAL_BYTES = 30;
const [STORED, DEFLATED] = [0, 8];
const ZIP64 = 0xffffffff;

interface Entry {
  method: number;
  crc: number;
  /** Bytes in the archive. */
  packed: number;
  /** Where its local header begins. */
  offset: number;
}

async function readAt(file: FileHandle, position: number, length: number): Promise<Buffer> {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, position);
  if (bytesRead < length) throw new Error("it ends early");
  return buffer;
}

/** The central directory. */
async function readDirectory(file: FileHandle): Promise<Buffer> {
  const { size } = await file.stat();
  const length = Math.min(size, DIRECTORY_END.bytes + DIRECTORY_END.comment);
  const tail = await readAt(file, size - length, length);
  const signature = Buffer.alloc(4);
  signature.writeUInt32LE(DIRECTORY_END.signature);
  const at = tail.lastIndexOf(signature);
  if (at < 0 || at + DIRECTORY_END.bytes > length) throw new Error("it is no zip archive, or not whole");
  const bytes = tail.readUInt32LE(at + 12);
  const offset = tail.readUInt32LE(at + 16);
  if (offset === ZIP64) throw new Error("it is a zip64 archive");
  return readAt(file, offset, bytes);
}

function findEntry(directory: Buffer, name: string): Entry {
  for (let at = 0; at + DIRECTORY_ENTRY.bytes <= directory.length; ) {
    if (directory.readUInt32LE(at) !== DIRECTORY_ENTRY.signature) throw new Error("its directory is damaged");
    const [nameBytes, extra, comment] = [28, 30, 32].map((field) => directory.readUInt16LE(at + field));
    const start = at + DIRECTORY_ENTRY.bytes;
    if (directory.toString("utf8", start, start + nameBytes) === name) {
      const [crc, packed, offset] = [16, 20, 42].map((field) => directory.readUInt32LE(at + field));
      return { method: directory.readUInt16LE(at + 10), crc, packed, offset };
    }
    at = start + nameBytes + extra + comment;
  }
  throw new Error(`it has no ${name}`);
}

/**
 * Writes the file `name` of the archive to `to`. Where it throws, part of the file may be there.
 * @throws Error that names the archive: it is no zip archive, has no such file, or is damaged.
 */
export async function extract(archive: string, name: string, to: string, signal?: AbortSignal): Promise<void> {
  try {
    await using file = await open(archive);
    const { method, crc, packed, offset } = findEntry(await readDirectory(file), name);
    if (method !== STORED && method !== DEFLATED) throw new Error(`${name} is packed in an unknown way (${method})`);
    const local = await readAt(file, offset, LOCAL_BYTES);
    const start = offset + LOCAL_BYTES + local.readUInt16LE(26) + local.readUInt16LE(28);
    const source = createReadStream(archive, { start, end: start + packed - 1 });
    const unpack = method === STORED ? new PassThrough() : createInflateRaw();
    let sum = 0;
    const check = async function* (chunks: AsyncIterable<Buffer>) {
      for await (const chunk of chunks) {
        sum = crc32(chunk, sum);
        yield chunk;
      }
    };
    await pipeline(source, unpack, check, createWriteStream(to), { signal });
    if (sum !== crc) throw new Error(`${name} is damaged`);
  } catch (cause) {
    signal?.throwIfAborted();
    throw new Error(`${archive}: ${(cause as Error).message}`, { cause });
  }
}
