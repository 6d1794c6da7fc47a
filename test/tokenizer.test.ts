/** The tokenizer against Hugging Face's: ids, texts and streams of the goldens, and the rules that they sample. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer as Reference } from "@huggingface/tokenizers";
import { describe, expect, test } from "vitest";
import { Detokenizer, Tokenizer } from "../shared/tokenizer.ts";
import { families, MODEL, readGolden } from "./support/goldens.ts";

interface Goldens {
  strings: { text: string; ids: number[]; with_special: number[]; decoded: string; decoded_skip_special: string }[];
  streams: { name: string; ids: number[]; pieces: string[]; final: string; text: string }[];
}
const filesOf = (model: string): [tokenizer: object, config: object] => {
  const [tokenizer, config] = ["tokenizer.json", "tokenizer_config.json"].map((name) =>
    JSON.parse(readFileSync(join(model, name), "utf8")),
  );
  return [tokenizer, config];
};

/** A repeatable stream of integers below n. */
function randomBelow(seed: number): (n: number) => number {
  return (n) => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return Math.floor((seed / 2 ** 32) * n);
  };
}

describe.each(families)("$name", ({ name, model, goldens: folder }) => {
  const [tokenizerJson, tokenizerConfig] = filesOf(model);
  const goldens: Goldens = readGolden("tokenizer.json", folder);
  const tokenizer = new Tokenizer(tokenizerJson, tokenizerConfig);

  describe("strings of the goldens", () => {
    test("have Hugging Face's ids", () => {
      for (const { text, ids } of goldens.strings) expect(tokenizer.encode(text), JSON.stringify(text)).toEqual(ids);
    });

    test("begin as prompts with what the tokenizer puts before them", () => {
      // A prompt that begins with the token already gets no second one.
      for (const { text, with_special } of goldens.strings.filter((string) => !string.text.startsWith("<s>")))
        expect(tokenizer.encodePrompt(text).slice(0, with_special.length), JSON.stringify(text)).toEqual(with_special);
    });

    test("decode to Hugging Face's text, with and without special tokens", () => {
      for (const { ids, decoded, decoded_skip_special } of goldens.strings) {
        expect(tokenizer.decode(ids)).toBe(decoded);
        expect(tokenizer.decode(ids, { skipSpecial: true })).toBe(decoded_skip_special);
      }
    });
  });

  describe("streaming", () => {
    test.each(goldens.streams)("sends the goldens' pieces of $name", ({ ids, pieces, final }) => {
      const detokenizer = new Detokenizer(tokenizer);
      expect(ids.map((id) => detokenizer.push(id))).toEqual(pieces);
      expect(detokenizer.flush()).toBe(final);
    });

    // For byte-fallback vocabularies the JavaScript library is no reference: it does not write one U+FFFD for each byte.
    test.runIf(name === "qwen")("follows the goldens' rule on random ids, broken characters included", () => {
      const below = randomBelow(7);
      const reference = new Reference(tokenizerJson, tokenizerConfig);
      for (let round = 0; round < 300; round++) {
        // Mostly single bytes, so that characters form, break and run on; some specials and ids without a token.
        const ids = Array.from({ length: 24 }, () => (below(10) < 7 ? 94 + below(162) : below(1200)));
        const detokenizer = new Detokenizer(tokenizer);
        let sent = "";
        for (let n = 1; n <= ids.length; n++) {
          const text = reference.decode(ids.slice(0, n), { skip_special_tokens: true });
          const expected = text.endsWith("\ufffd") ? "" : text.slice(sent.length);
          expect(detokenizer.push(ids[n - 1]), `${ids.slice(0, n)}`).toBe(expected);
          sent += expected;
        }
        expect(sent + detokenizer.flush()).toBe(reference.decode(ids, { skip_special_tokens: true }));
      }
    });

    test("does not decode a long run of broken bytes anew for each", () => {
      const ids = Array.from({ length: 1200 }, (_, id) => id);
      const ofByte = (byte: number) => ids.find((id) => `${tokenizer.tokenBytes(id)}` === `${byte}`)!;
      const [lead, continuation] = new TextEncoder().encode("é");
      for (const broken of [ofByte(lead), ofByte(continuation)]) {
        const detokenizer = new Detokenizer(tokenizer);
        let sent = "";
        for (let i = 0; i < 500_000; i++) sent += detokenizer.push(broken);
        expect(sent).toBe("");
        expect(detokenizer.push(ofByte(0x61))).toBe(`${"\ufffd".repeat(500_000)}a`);
      }
    });
  });

  describe("literal text", () => {
    const { added_tokens } = tokenizerJson as { added_tokens: { id: number; content: string; special: boolean }[] };
    const special = added_tokens.filter((token) => token.special).map(({ content }) => content);
    const countSpecial = (ids: number[]) => ids.filter((id) => tokenizer.isSpecial(id)).length;

    test.each(special)("keeps %s as text", (token) => {
      const text = `before ${token}${token} after`;
      expect(countSpecial(tokenizer.encode(text))).toBe(2);
      const ids = tokenizer.encode(tokenizer.literal(text));
      expect(countSpecial(ids)).toBe(0);
      expect(tokenizer.decode(ids)).toBe(text);
    });

    test("forms no special token across a border, wherever it lies", () => {
      for (const token of special) {
        for (let cut = 1; cut < token.length; cut++) {
          const joined = tokenizer.literal(token.slice(0, cut)) + tokenizer.literal(token.slice(cut));
          expect(countSpecial(tokenizer.encode(joined)), token.slice(0, cut)).toBe(0);
        }
      }
    });

    test("may spell special tokens very often", () => {
      const text = special[1].repeat(150_000);
      expect(tokenizer.decode(tokenizer.encode(tokenizer.literal(text))) === text).toBe(true);
    });

    test("cannot be undone by a lone surrogate in the text", () => {
      const ids = tokenizer.encode(tokenizer.literal(`\ud800${special[1]}\udc00`));
      expect(tokenizer.decode(ids)).toBe(`\ufffd${special[1]}\ufffd`);
      expect(countSpecial(ids)).toBe(0);
    });
  });
});

describe("a byte-fallback vocabulary", () => {
  const strip = { type: "Strip", content: " ", start: 1, stop: 0 };
  const replace = { type: "Replace", pattern: { String: "▁" }, content: " " };
  const decoder = { type: "Sequence", decoders: [replace, { type: "ByteFallback" }, { type: "Fuse" }, strip] };
  const vocab = { "<unk>": 0, "<s>": 1, "▁a": 2, b: 3, "<0xE4>": 4, "<0xBD>": 5, "<0xA0>": 6, "▁": 7 };
  const model = { type: "BPE", unk_token: "<unk>", fuse_unk: true, byte_fallback: true, vocab, merges: [["▁", "a"]] };
  const added_tokens = [{ id: 1, content: "<s>", special: true, normalized: false }];
  const llama = new Tokenizer(
    { added_tokens, decoder, model, normalizer: null, pre_tokenizer: null, post_processor: null },
    { bos_token: "<s>", add_bos_token: true },
  );
  const pieces = (ids: number[]) => {
    const detokenizer = new Detokenizer(llama);
    return [...ids.map((id) => detokenizer.push(id)), detokenizer.flush()];
  };

  test("drops the space that the tokenizer put before the text, and no other", () => {
    expect(pieces([1, 2, 2, 3])).toEqual(["", "a", " a", "b", ""]);
    expect(pieces([7, 2])).toEqual(["", " a", ""]);
  });

  test("joins bytes to characters and writes one U+FFFD for each byte that stays alone", () => {
    expect(pieces([2, 4, 5, 6, 3])).toEqual(["a", "", "", "你", "b", ""]);
    expect(pieces([3, 4, 5, 3])).toEqual(["b", "", "", "\ufffd\ufffdb", ""]);
    expect(pieces([3, 4, 5])).toEqual(["b", "", "", "\ufffd\ufffd"]);
  });

  test("begins a prompt with its beginning-of-sequence token, once", () => {
    expect(llama.encodePrompt("b")).toEqual([1, 3]);
    expect(llama.encodePrompt("<s>b")).toEqual([1, 3]);
    const spelled = llama.encodePrompt(llama.literal("<s>b"));
    expect([spelled.indexOf(1), spelled.lastIndexOf(1), spelled.at(-1)]).toEqual([0, 0, 3]);
  });
});

test("a tokenizer whose decoder is unknown is refused by the decoder's name", () => {
  const [tokenizerJson, tokenizerConfig] = filesOf(MODEL);
  const other = { ...tokenizerJson, decoder: { type: "WordPiece", prefix: "##", cleanup: false } };
  expect(() => new Tokenizer(other, tokenizerConfig)).toThrow("decoder of WordPiece is not supported");
});
