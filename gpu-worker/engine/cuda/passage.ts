/** Memory on both sides that every picture goes through on its way to the vision tower and back. */
import type { Pinned } from "../../cuda/driver.ts";
import type { Elementwise, Float } from "../../cuda/elementwise.ts";
import { Resample } from "../../cuda/resample.ts";
import type { Picture } from "../../input/decode.ts";
import type { Filter, Weights } from "../../input/resize.ts";
import type { InputData } from "../../model/family.ts";
import type { Passage } from "../images.ts";
import type { Runtime } from "../runtime.ts";
import type { ImageData } from "../target.ts";
import { DTYPES, type DType, type Tensor } from "../tensor.ts";

/** Where each piece of device memory begins: a multiple of this many bytes. */
const ALIGNMENT = 256;

/** All of it grows to what the largest picture takes, and is kept: taking memory costs more than a copy. */
export class CudaPassage implements Passage, Disposable {
  readonly #runtime: Runtime;
  readonly #elementwise: Elementwise;
  readonly #dtype: Float;
  readonly #resample: Resample;
  readonly #device: { inputs?: Tensor; rows?: Tensor; picture?: Tensor; across?: Tensor; down?: Tensor } = {};
  /** Whose samples are on the device: one may be resized to several sizes. */
  #sent: Picture | undefined;
  #pinned: Pinned | undefined;

  constructor(runtime: Runtime, elementwise: Elementwise, dtype: Float) {
    this.#runtime = runtime;
    this.#elementwise = elementwise;
    this.#dtype = dtype;
    this.#resample = new Resample(runtime.cuda!);
  }

  readonly filter: Filter = (picture, { across, down, top, bottom }) => {
    const samples = this.#send(picture);
    const width = across ? across.first.length : picture.width;
    const row = 3 * width;
    let [from, rows] = [samples + BigInt(3 * picture.width * top), bottom - top];
    if (across) {
      const to = this.#on("across", rows * row);
      this.#resample.across(to, from, this.#weights(across), picture.width, width, rows);
      from = to;
    }
    if (down) {
      rows = down.first.length;
      const to = this.#on("down", rows * row);
      this.#resample.down(to, from, this.#weights(down), row, rows, top);
      from = to;
    }
    return new Uint8Array(this.#bring(from, rows * row));
  };

  #send(picture: Picture): bigint {
    const { rgb } = picture;
    const memory = this.#on("picture", rgb.byteLength);
    if (this.#sent === picture) return memory;
    this.#upload(memory, [rgb]);
    this.#sent = picture;
    return memory;
  }

  /** The numbers of a pass on the device; they hold until the next. */
  #weights({ first, count, weight, stride }: Weights) {
    const memory = this.#on("inputs", first.byteLength + count.byteLength + weight.byteLength);
    this.#upload(memory, [first, count, weight]);
    const at = (bytes: number) => memory + BigInt(bytes);
    return { first: memory, count: at(first.byteLength), weight: at(first.byteLength + count.byteLength), stride };
  }

  /** Sends arrays, one behind the other; waits for what was queued before. */
  #upload(memory: bigint, arrays: readonly (Uint8Array | Int32Array)[]): void {
    const cuda = this.#runtime.cuda!;
    const bytes = arrays.reduce((sum, { byteLength }) => sum + byteLength, 0);
    cuda.synchronize(); // the copy before this one
    const pinned = this.#host(bytes);
    let at = 0;
    for (const { buffer, byteOffset, byteLength } of arrays) {
      new Uint8Array(pinned.buffer, at, byteLength).set(new Uint8Array(buffer, byteOffset, byteLength));
      at += byteLength;
    }
    cuda.upload(memory, pinned, bytes);
  }

  /** Waits for bytes of the device. */
  #bring(from: bigint, bytes: number): ArrayBuffer {
    const cuda = this.#runtime.cuda!;
    const pinned = this.#host(bytes);
    cuda.download(pinned, from, bytes);
    cuda.synchronize();
    return pinned.buffer.slice(0, bytes);
  }

  put(data: readonly InputData[]): Tensor[] {
    const cuda = this.#runtime.cuda!;
    this.#sent = undefined;
    let end = 0;
    const place = (bytes: number) => {
      const from = end;
      end += Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;
      return from;
    };
    const types = data.map((numbers) => this.#typeOf(numbers));
    const sent = data.map(({ byteLength }) => place(byteLength));
    const bytes = end;
    // What is sent in float32 and wanted in 16 bits gets a second place.
    const wanted = data.map(({ length }, i) => (halves(types[i]) ? place(length * DTYPES[types[i]].bytes) : sent[i]));
    cuda.synchronize(); // a run that failed may have left a copy on its way
    const pinned = this.#host(bytes);
    for (const [i, { buffer, byteOffset, byteLength }] of data.entries())
      new Uint8Array(pinned.buffer, sent[i], byteLength).set(new Uint8Array(buffer, byteOffset, byteLength));
    const memory = this.#on("inputs", end);
    cuda.upload(memory, pinned, bytes);
    return data.map(({ length }, i) => {
      const pointer = memory + BigInt(wanted[i]);
      if (halves(types[i])) this.#elementwise.convert(pointer, this.#dtype, memory + BigInt(sent[i]), "f32", length);
      return this.#runtime.at(pointer, types[i], length);
    });
  }

  rows(elements: number): Tensor {
    const memory = this.#on("rows", elements * DTYPES[this.#dtype].bytes);
    return this.#runtime.at(memory, this.#dtype, elements);
  }

  take({ pointer, elements, dtype }: Tensor): ImageData {
    const data = this.#bring(pointer, elements * DTYPES[dtype].bytes);
    return dtype === "f32" ? new Float32Array(data) : new Uint16Array(data);
  }

  #typeOf(numbers: InputData): DType {
    if (numbers instanceof Float32Array) return this.#dtype;
    return numbers instanceof Uint8Array ? "u8" : "i64";
  }

  #host(bytes: number): Pinned {
    if (this.#pinned && this.#pinned.buffer.byteLength >= bytes) return this.#pinned;
    this.#runtime.cuda!.synchronize(); // what is on its way from the old
    this.#freePinned();
    this.#pinned = this.#runtime.cuda!.pinned(bytes);
    return this.#pinned;
  }

  #freePinned(): void {
    if (this.#pinned) this.#runtime.cuda!.freePinned(this.#pinned);
    this.#pinned = undefined;
  }

  #on(name: "inputs" | "rows" | "picture" | "across" | "down", bytes: number): bigint {
    const held = this.#device[name];
    if (held && held.elements >= bytes) return held.pointer;
    held?.[Symbol.dispose]();
    this.#device[name] = undefined;
    const taken = this.#runtime.tensor("u8", bytes, "device");
    this.#device[name] = taken;
    return taken.pointer;
  }

  [Symbol.dispose](): void {
    this.#freePinned();
    for (const tensor of Object.values(this.#device)) tensor?.[Symbol.dispose]();
  }
}

const halves = (dtype: DType) => dtype === "f16" || dtype === "bf16";
