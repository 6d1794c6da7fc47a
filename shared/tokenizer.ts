/** Text to token ids and back, as the checkpoint's tokenizer.json says; knows nothing of chats or models. */
import { Tokenizer as Encoder } from "@huggingface/tokenizers";
import { CheckpointError } from "./errors.ts";
import { decodeEachByte, incompleteSuffix, tokenBytesReader, utf8 } from "./utf8.ts";

/** The parts of tokenizer.json that are read here; `@huggingface/tokenizers` reads the rest. */
interface TokenizerJson {
  added_tokens: { id: number; content: string; special: boolean }[];
  decoder: { type: string; decoders?: { type: string; content?: string }[] } | null;
  model: { vocab: Record<string, number> };
}

/** What one token stands for. */
interface Piece {
  bytes: Uint8Array;
  /** Its text, if the bytes are whole characters that may be sent as they are; else null. */
  text: string | null;
}

/**
 * A lone surrogate, for marking places where special tokens are not to be recognised (see `literal`). Text that is
 * well-formed Unicode cannot contain it.
 */
const GUARD = "\ud800";
/** What no token joins to what follows it, in SentencePiece's vocabularies. */
const NO_WORD = "\n";
const NO_BYTES = new Uint8Array(0);

export class Tokenizer {
  readonly #encoder: Encoder;
  readonly #added = new Map<number, string>();
  readonly #special = new Map<string, number>();
  readonly #specialIds = new Set<number>();
  readonly #pieces: (Piece | undefined)[] = [];
  readonly #readBytes: (token: string) => Uint8Array;
  readonly #bosToken: string | null;
  readonly #addBos: boolean;
  /** SentencePiece's decoders drop the space that its normalizer put before the text. */
  readonly #dropsFirstSpace: boolean;
  /** Byte-fallback vocabularies write one U+FFFD for each bad byte, byte-level ones one for each bad sequence. */
  readonly #replacesEachByte: boolean;
  /** Characters of the longest token: a text longer than this times n has more than n tokens. */
  readonly longestToken: number;

  /** Takes tokenizer.json and tokenizer_config.json, parsed. Throws CheckpointError for what is not known here. */
  constructor(tokenizerJson: object, tokenizerConfig: object) {
    const json = tokenizerJson as TokenizerJson;
    if (!json.model?.vocab || !Array.isArray(json.added_tokens))
      throw new CheckpointError(`tokenizer.json: ${json.model?.vocab ? "added_tokens" : "model.vocab"} is missing`);
    const config = tokenizerConfig as { bos_token?: string | { content: string } | null; add_bos_token?: boolean };
    this.#encoder = new Encoder(tokenizerJson, tokenizerConfig);
    for (const token of json.added_tokens) {
      this.#added.set(token.id, token.content);
      if (!token.special) continue;
      this.#special.set(token.content, token.id);
      this.#specialIds.add(token.id);
    }
    const steps = json.decoder?.decoders ?? (json.decoder ? [json.decoder] : []);
    const has = (type: string) => steps.some((step) => step.type === type);
    this.#readBytes = tokenBytesReader(steps.map((step) => step.type));
    this.#dropsFirstSpace = has("Strip");
    this.#replacesEachByte = has("ByteFallback");
    this.#bosToken =
      typeof config.bos_token === "object" ? (config.bos_token?.content ?? null) : (config.bos_token ?? null);
    this.#addBos = config.add_bos_token === true && this.#bosToken !== null;
    this.longestToken = Object.keys(json.model.vocab).reduce((longest, token) => Math.max(longest, token.length), 1);
  }

  /** Ids of a text. Special tokens in it are recognised, unless `literal` marked them; none is added. */
  encode(text: string): number[] {
    return text.split(GUARD).flatMap((part, i) => (i === 0 ? this.#encode(part) : this.#encodeRest(part)));
  }

  #encode(text: string): number[] {
    return this.#encoder.encode(text, { add_special_tokens: false }).ids;
  }

  /** Ids of a text that goes on from another: SentencePiece's normalizer would put a space before it, as before any text. */
  #encodeRest(text: string): number[] {
    return this.#dropsFirstSpace
      ? this.#encode(NO_WORD + text).slice(this.#encode(NO_WORD).length)
      : this.#encode(text);
  }

  /** Ids of a whole prompt: as `encode`, with the beginning-of-sequence token if the tokenizer wants one. */
  encodePrompt(prompt: string): number[] {
    const ids = this.encode(prompt);
    if (!this.#addBos) return ids;
    const bos = this.#special.get(this.#bosToken!)!;
    return ids[0] === bos ? ids : [bos, ...ids];
  }

  /**
   * A text in which `encode` finds no special token, whatever it is joined to: what a client wrote can then forge
   * neither a turn nor an image. Unpaired surrogates become U+FFFD, as they would in UTF-8.
   */
  literal(text: string): string {
    text = text.toWellFormed();
    for (const token of this.#special.keys()) {
      if (text.includes(token)) text = text.replaceAll(token, token[0] + GUARD + token.slice(1));
    }
    return this.#endsInsideSpecial(text) ? text + GUARD : text;
  }

  #endsInsideSpecial(text: string): boolean {
    for (const token of this.#special.keys()) {
      for (let length = 1; length < token.length; length++) if (text.endsWith(token.slice(0, length))) return true;
    }
    return false;
  }

  /** Text of ids; an id that names no token gives nothing. */
  decode(ids: readonly number[], { skipSpecial = false } = {}): string {
    const detokenizer = new Detokenizer(this, { skipSpecial });
    let text = "";
    for (const id of ids) text += detokenizer.push(id);
    return text + detokenizer.flush();
  }

  /** Id of a token by its own text; undefined if there is none. */
  tokenId(token: string): number | undefined {
    return this.#special.get(token) ?? this.#encoder.token_to_id(token);
  }

  isSpecial(id: number): boolean {
    return this.#specialIds.has(id);
  }

  /** What the token stands for: its bytes, which may be a part of a character. Empty for an unknown id. */
  tokenBytes(id: number): Uint8Array {
    return this.piece(id).bytes;
  }

  /** Internal to this file's Detokenizer: the token's piece, made once. */
  piece(id: number): Piece {
    return (this.#pieces[id] ??= this.#makePiece(id));
  }

  #makePiece(id: number): Piece {
    const added = this.#added.get(id);
    const token = added ?? this.#encoder.id_to_token(id);
    if (token === undefined || token === null) return { bytes: NO_BYTES, text: "" };
    const bytes = added === undefined ? this.#readBytes(token) : new TextEncoder().encode(added);
    const text = this.decodeBytes(bytes);
    // A token that ends in U+FFFD, be it really that character, is held back (see Detokenizer), so it has no text here.
    const whole = utf8.isValid(bytes) && !text.endsWith("\ufffd");
    return { bytes, text: whole ? text : null };
  }

  /** Text of bytes, with U+FFFD for what is not UTF-8. */
  decodeBytes(bytes: Uint8Array): string {
    return this.#replacesEachByte && !utf8.isValid(bytes) ? decodeEachByte(bytes) : utf8.decode(bytes);
  }

  /** Whether the first space of a decoded text is the tokenizer's own and is dropped. */
  get dropsFirstSpace(): boolean {
    return this.#dropsFirstSpace;
  }
}

/**
 * Turns ids into text as they come, each in constant time. What `push` gave so far plus what `flush` gives is the
 * decoding of all ids; nothing given ends in U+FFFD or half a character before `flush`.
 */
export class Detokenizer {
  readonly #tokenizer: Tokenizer;
  readonly #skipSpecial: boolean;
  /** Bytes of a character that has begun. */
  #tail: Uint8Array = NO_BYTES;
  /** Text that ends in U+FFFD, which is not sent before something else follows. */
  #held = "";
  #atStart: boolean;

  constructor(tokenizer: Tokenizer, { skipSpecial = true } = {}) {
    this.#tokenizer = tokenizer;
    this.#skipSpecial = skipSpecial;
    this.#atStart = tokenizer.dropsFirstSpace;
  }

  /** Takes the next id and returns the text that may be sent now, often that of this id alone, "" if there is none. */
  push(id: number): string {
    if (this.#skipSpecial && this.#tokenizer.isSpecial(id)) return "";
    const piece = this.#tokenizer.piece(id);
    if (piece.text !== null && this.#tail.length === 0 && this.#held === "") return this.#send(piece.text);
    const bytes = this.#tail.length === 0 ? piece.bytes : utf8.concat(this.#tail, piece.bytes);
    const whole = bytes.length - incompleteSuffix(bytes);
    this.#tail = bytes.subarray(whole);
    const text = this.#tokenizer.decodeBytes(bytes.subarray(0, whole));
    this.#held += text;
    // Looks at the new text only: asking the held one would copy all of it each time.
    return this.#tail.length > 0 || text === "" || text.endsWith("\ufffd") ? "" : this.#release();
  }

  /** The rest, with U+FFFD for bytes that never became a character. */
  flush(): string {
    this.#held += this.#tokenizer.decodeBytes(this.#tail);
    this.#tail = NO_BYTES;
    return this.#release();
  }

  #release(): string {
    const text = this.#held;
    this.#held = "";
    return this.#send(text);
  }

  #send(text: string): string {
    if (!this.#atStart || text === "") return text;
    this.#atStart = false;
    return text.startsWith(" ") ? text.slice(1) : text;
  }
}
