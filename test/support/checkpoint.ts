/** Copies of the embedded checkpoint, changed or damaged, in temporary folders. */
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { MODEL } from "./goldens.ts";

export interface StoredBytes {
  dtype: string;
  shape: number[];
  bytes: Uint8Array;
}
export type Tensors = Map<string, StoredBytes>;

export function readTensors(file: string): Tensors {
  const data = readFileSync(file);
  const start = 8 + Number(data.readBigUInt64LE());
  const header = JSON.parse(data.subarray(8, start).toString());
  delete header.__metadata__;
  const entries = Object.entries<{ dtype: string; shape: number[]; data_offsets: [number, number] }>(header);
  return new Map(
    entries.map(
      ([
        name,
        {
          dtype,
          shape,
          data_offsets: [from, to],
        },
      ]) => [name, { dtype, shape, bytes: data.subarray(start + from, start + to) }],
    ),
  );
}

export function writeTensors(file: string, tensors: Tensors): void {
  let at = 0;
  const header: Record<string, object> = {};
  for (const [name, { dtype, shape, bytes }] of tensors)
    header[name] = { dtype, shape, data_offsets: [at, (at += bytes.length)] };
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(file, Buffer.concat([length, text, ...[...tensors.values()].map(({ bytes }) => bytes)]));
}

/** A copy of the embedded checkpoint, or of another, gone at the end of its scope; `file` gives paths in it. */
export class Checkpoint implements Disposable {
  readonly folder = mkdtempSync(join(tmpdir(), "vispec-"));

  constructor(model = MODEL) {
    cpSync(model, this.folder, { recursive: true });
  }

  file(name: string): string {
    return join(this.folder, name);
  }

  remove(name: string): this {
    rmSync(this.file(name));
    return this;
  }

  /** Edits a JSON file as text's first match of `from`. */
  edit(name: string, from: string | RegExp, to: string): this {
    const text = readFileSync(this.file(name), "utf8");
    const changed = text.replace(from, to);
    if (changed === text) throw new Error(`${name} has no ${from}`);
    writeFileSync(this.file(name), changed);
    return this;
  }

  /** Gives the answers no end before the context's, which is large: a generation that surely still runs when it is stopped. */
  endless(): this {
    return this.edit("generation_config.json", /1177|1175/g, "1176").edit("config.json", "4096", "16384");
  }

  /** Splits the weights into shards with an index, every n-th tensor into each. */
  shard(count: number): this {
    const all = [...readTensors(this.file("model.safetensors"))];
    const map: Record<string, string> = {};
    for (let i = 0; i < count; i++) {
      const own = all.filter((_, n) => n % count === i);
      const name = `model-${i + 1}-of-${count}.safetensors`;
      for (const [tensor] of own) map[tensor] = name;
      writeTensors(this.file(name), new Map(own));
    }
    const total = all.reduce((sum, [, { bytes }]) => sum + bytes.length, 0);
    const index = { metadata: { total_size: total }, weight_map: map };
    writeFileSync(this.file("model.safetensors.index.json"), JSON.stringify(index));
    return this.remove("model.safetensors");
  }

  tensors(change: (tensors: Tensors) => void, name = "model.safetensors"): this {
    const tensors = readTensors(this.file(name));
    change(tensors);
    writeTensors(this.file(name), tensors);
    return this;
  }

  [Symbol.dispose](): void {
    rmSync(this.folder, { recursive: true, force: true });
  }
}

/** bf16 as fp32, the same numbers, or as fp16, rounded to nearest even. */
export function convert({ shape, bytes }: StoredBytes, dtype: "F32" | "F16"): StoredBytes {
  const halves = new Uint16Array(new Uint8Array(bytes).buffer);
  const words = Uint32Array.from(halves, (half) => half << 16);
  const numbers = new Float32Array(words.buffer);
  const typed = dtype === "F32" ? numbers : Float16Array.from(numbers);
  return { dtype, shape, bytes: new Uint8Array(typed.buffer) };
}
