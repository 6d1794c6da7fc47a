/** Bytes of tokens and of characters; knows how vocabularies spell bytes, not what a tokenizer is. */
import { CheckpointError } from "./errors.ts";

const lossy = new TextDecoder("utf-8", { ignoreBOM: true, fatal: false });
const encoder = new TextEncoder();

export const utf8 = {
  /** Text with one U+FFFD for each maximal sequence that is not UTF-8. */
  decode: (bytes: Uint8Array): string => (bytes.length === 0 ? "" : lossy.decode(bytes)),

  /** Looks whether the text has the same bytes: for lone bytes, an exception of a strict decoder takes ten times as long. */
  isValid(bytes: Uint8Array): boolean {
    return encoder.encode(utf8.decode(bytes)).every((byte, i) => byte === bytes[i]);
  },

  concat(a: Uint8Array, b: Uint8Array): Uint8Array {
    const both = new Uint8Array(a.length + b.length);
    both.set(a);
    both.set(b, a.length);
    return both;
  },
};

/**
 * How many bytes at the end may be a character that further bytes complete: 0 to 3. Some that no byte can complete
 * (overlong forms) count too; they become U+FFFD when something follows.
 */
export function incompleteSuffix(bytes: Uint8Array): number {
  for (let length = 1; length <= Math.min(3, bytes.length); length++) {
    const lead = bytes[bytes.length - length];
    if (lead < 0x80) return 0;
    if (lead >= 0xc0) return length < characterLength(lead) ? length : 0;
    // A continuation byte: the lead is further to the left.
  }
  return 0;
}

/** Bytes of the character that begins with this one. */
function characterLength(lead: number): number {
  return lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
}

/** Text with one U+FFFD for each byte that is in no character, as byte-fallback vocabularies have it. */
export function decodeEachByte(bytes: Uint8Array): string {
  let text = "";
  for (let at = 0; at < bytes.length; ) {
    const character = bytes.subarray(at, at + characterLength(bytes[at]));
    const valid = utf8.isValid(character);
    text += valid ? utf8.decode(character) : "\ufffd";
    at += valid ? character.length : 1;
  }
  return text;
}

/**
 * How a vocabulary with these decoder steps spells a token's bytes: byte-level (GPT-2's alphabet) or SentencePiece with
 * byte fallback ("▁" for a space, "<0xE4>" for a byte). Throws CheckpointError for others.
 */
export function tokenBytesReader(steps: string[]): (token: string) => Uint8Array {
  if (steps.includes("ByteLevel")) return byteLevelBytes;
  if (steps.includes("ByteFallback") && steps.includes("Replace")) return byteFallbackBytes;
  throw new CheckpointError(`tokenizer.json: decoder of ${steps.join(", ") || "no steps"} is not supported`);
}

const byteOf = gpt2Alphabet();

/** GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up in order. */
function gpt2Alphabet(): Map<string, number> {
  const bytes = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    bytes.set(String.fromCharCode(printable ? byte : next++), byte);
  }
  return bytes;
}

function byteLevelBytes(token: string): Uint8Array {
  const bytes = new Uint8Array(token.length);
  for (let i = 0; i < token.length; i++) {
    const byte = byteOf.get(token[i]);
    // A token beside the alphabet was put into the vocabulary as plain text.
    if (byte === undefined) return encoder.encode(token);
    bytes[i] = byte;
  }
  return bytes;
}

function byteFallbackBytes(token: string): Uint8Array {
  const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
  return byte ? Uint8Array.of(Number.parseInt(byte[1], 16)) : encoder.encode(token.replaceAll("▁", " "));
}
