/** Structured output: the answer keeps to its schema whatever is drawn, and is with a tree what it is without one. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { Grammars, type Matcher } from "../gpu-worker/decode/grammar/grammar.ts";
import { patternExpression, rangeExpression } from "../gpu-worker/decode/grammar/pattern.ts";
import { schemaGrammar } from "../gpu-worker/decode/grammar/schema.ts";
import { uniforms } from "../gpu-worker/decode/sample.ts";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import { Tokenizer } from "../shared/tokenizer.ts";
import { answer, cases, MODEL, openEngine, plainSampling, prepare, textOf, tokensOf } from "./support/goldens.ts";

const file = (name: string) => JSON.parse(readFileSync(join(MODEL, name), "utf8"));
const tokenizer = new Tokenizer(file("tokenizer.json"), file("tokenizer_config.json"));
const SIZE = 1280;
const EOS = 1177;
const json = (schema: unknown, strict = true) => ({ schema: JSON.stringify(schema), strict });

/** An expression of strings, classes, groups and quantifiers as JavaScript's. */
function regExpOf(expression: string): RegExp {
  const parts = expression.match(/"(?:\\.|[^"\\])*"|\[(?:\\U[\da-f]{8}|[^\]])*\]|[^"[\]\s]/gsu)!;
  const source = parts.map((part) => {
    if (part.startsWith("[")) return part.replace(/\\U([\da-f]{8})/g, "\\u{$1}");
    if (!part.startsWith('"')) return part;
    return part.slice(1, -1).replace(/\\(.)/g, "$1").replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"); // biome-ignore format: one chain
  });
  return new RegExp(`^(?:${source.join("")})$`, "u");
}

const refuse = (why: string) => new Error(why);

describe("ranges", () => {
  const random = uniforms(11);
  const below = (n: number) => Math.floor(random() * n);

  test("have the numbers between their bounds and no others, for any bounds", () => {
    for (let round = 0; round < 1500; round++) {
      const size = 10 ** (1 + below(5));
      const [a, b] = [below(2 * size) - size, below(2 * size) - size].sort((x, y) => x - y);
      const from = { value: below(4) ? a : Number.NEGATIVE_INFINITY, open: below(2) === 0 };
      const to = { value: below(4) ? b : Number.POSITIVE_INFINITY, open: below(2) === 0 };
      const integer = below(2) === 0;
      const isIn = (x: number) =>
        (from.open ? x > from.value : x >= from.value) && (to.open ? x < to.value : x <= to.value);
      if (integer ? Number(from.open) + Number(to.open) + from.value > to.value : from.value >= to.value) continue;
      const expression = regExpOf(rangeExpression(from, to, integer, refuse));
      const near = [a, b].flatMap((x) => [-11, -10, -9, -1, 0, 1, 9, 10, 11].map((d) => x + d));
      const far = Array.from({ length: 20 }, () => below(3 * size) - Math.floor(1.5 * size));
      for (const x of [...near, ...far, 0]) {
        const texts = integer ? [`${x}`] : [`${x}`, `${x}.5`, `${x}.07`];
        for (const text of texts)
          expect(expression.test(text), `${text} in ${JSON.stringify({ from, to, integer })}`).toBe(isIn(Number(text)));
      }
      for (const text of ["", "-", "00", "01", "+1", "1.", ".5", "1e3"])
        expect(expression.test(text), text).toBe(false);
    }
  });

  test("without a number are refused", () => {
    const bounds = [[5, 4], [-4, -5]]; // biome-ignore format: one row
    for (const [from, to] of bounds)
      expect(() => rangeExpression({ value: from, open: false }, { value: to, open: false }, true, refuse)).toThrow(/no number/); // biome-ignore format: one line
    expect(() => rangeExpression({ value: 0, open: true }, { value: 1, open: true }, true, refuse)).toThrow(
      /no number/,
    );
  });
});

describe("patterns", () => {
  const random = uniforms(12);
  const below = (n: number) => Math.floor(random() * n);
  const pick = <T>(values: T[]) => values[below(values.length)];
  const ATOMS = ["a", "b", "-", "[ab]", "[^a]", "[a-c\\d]", "\\d", "\\w", "\\S", ".", "\\.", "é", "[é-ü]", "[\\]\\-]", "[\\w-]", "[\\d-z]", "\\u0062"]; // biome-ignore format: one row

  /** A regular expression of so many levels. */
  function generate(depth: number): string {
    if (depth === 0) return pick(ATOMS);
    const inner = () => generate(depth - 1);
    return pick([() => inner() + inner(), () => `(${inner()}|${inner()})`, () => `(?:${inner()}|)`, () => `(?<x${below(1e9)}>${inner()})${pick(["?", "*", "+", "{2}", "{1,2}", "{0,}", "*?", "+?"])}`])(); // biome-ignore format: one row
  }

  test("match what JavaScript matches, as far as JSON has it without an escape", () => {
    const alphabet = ["a", "b", "c", "-", "1", ".", "é", "ü", "]", " ", '"', "\\", "\n", "中"];
    let [matched, total] = [0, 0];
    for (let round = 0; round < 400; round++) {
      const pattern = generate(3);
      const wanted = new RegExp(`^(?:${pattern})$`, "s");
      const given = regExpOf(patternExpression(`^${pattern}$`, refuse));
      for (let i = 0; i < 60; i++) {
        const text = Array.from({ length: below(5) }, () => pick(alphabet)).join("");
        const may = wanted.test(text) && !/["\\\n]/.test(text);
        // Of what is beyond ASCII a class has all, none or a few: \S has none.
        if (/[^\0-\x7f]/.test(text)) expect(!given.test(`"${text}"`) || may, `${pattern} ${text}`).toBe(true);
        else expect(given.test(`"${text}"`), `${pattern} ${JSON.stringify(text)}`).toBe(may);
        matched += Number(may);
        total++;
      }
    }
    expect(matched / total).toBeGreaterThan(0.02);
  });

  test.each([
    ["(", /no regular expression/],
    ["(?=a)b", /\(\? is not supported/],
    ["(?<!a)b", /\(\? is not supported/],
    ["(a)\\1", /\\1 is not supported/],
    ["\\bword", /\\b is not supported/],
    ["a^b", /\^ is not supported/],
    ["x{,3}", /\{ is not supported/],
    ["\\n", /has to escape/],
    ['say "hi"', /" stands for what JSON has to escape/],
    ["\\\\", /has to escape/],
    ["[\\u4e00-\\u9fff]", /too many characters beyond ASCII/],
  ])("%s is refused", (pattern, why) => {
    expect(() => patternExpression(pattern, refuse)).toThrow(why);
  });
});

describe("schemas", () => {
  test.each<[unknown, RegExp]>([
    [{ type: "foo" }, /"foo" is no type/],
    [{ type: "object", properties: { a: { type: "array", items: { not: {} } } } }, /#\/properties\/a\/items: the keyword "not"/], // biome-ignore format: one row
    [{ type: "array", uniqueItems: true }, /"uniqueItems"/],
    [{ type: "integer", multipleOf: 3 }, /"multipleOf"/],
    [{ type: "object", patternProperties: {} }, /"patternProperties"/],
    [{ type: "string", minimum: 3 }, /"minimum"/],
    [{ $ref: "#/$defs/a" }, /there is no #\/\$defs\/a/],
    [{ $ref: "http://example.com/a.json" }, /\$ref has to be/],
    [{ type: "object", properties: {}, required: ["a"] }, /required has "a"/],
    [{ type: "object", properties: { a: false } }, /#\/properties\/a: is no schema/],
    [{ type: "string", pattern: "^a$", maxLength: 3 }, /only one of pattern/],
    [{ type: "string", pattern: "(" }, /pattern: is no regular expression/],
    [{ type: "string", format: "nonsense" }, /the format "nonsense"/],
    [{ type: "string", minLength: 3, maxLength: 2 }, /minLength is more than maxLength/],
    [{ type: "array", minItems: -1 }, /minItems and maxItems must be whole/],
    [{ type: "array", prefixItems: [{}], items: false, minItems: 2 }, /no array has so many/],
    [{ type: "number", maximum: 0.5 }, /the bound 0.5/],
    [{ type: "integer", minimum: 3, maximum: 2 }, /no number is in its range/],
    [{ enum: [] }, /enum must be an array/],
    [{ type: "string", enum: [1] }, /enum has no value of the type/],
    [{ allOf: [{}, {}] }, /allOf is supported for one/],
    [{ anyOf: [{ type: "string" }], type: "string" }, /"type"/],
  ])("%j is refused", (schema, why) => {
    expect(() => schemaGrammar(JSON.stringify(schema), true)).toThrow(why);
  });
});

/** Whether JSON satisfies a schema, for the keywords of these tests. */
// biome-ignore lint/suspicious/noExplicitAny: a schema is what it is
function satisfies(value: unknown, schema: any, root = schema): boolean {
  const holds = (part: unknown, inner: unknown) => satisfies(part, inner, root);
  if (schema === true) return true;
  if (schema.$ref) return holds(value, schema.$ref === "#" ? root : root.$defs[schema.$ref.split("/").at(-1)]);
  const same = (other: unknown) => JSON.stringify(other) === JSON.stringify(value);
  if ("const" in schema) return same(schema.const);
  if (schema.enum) return schema.enum.some(same);
  if (schema.anyOf) return schema.anyOf.some((one: unknown) => holds(value, one));
  const type = value === null ? "null" : Array.isArray(value) ? "array" : typeof value;
  const types = [schema.type ?? type].flat();
  if (!types.includes(type) && !(types.includes("integer") && Number.isInteger(value))) return false;
  const { minimum = -Infinity, maximum = Infinity, exclusiveMinimum = -Infinity, exclusiveMaximum = Infinity } = schema;
  if (typeof value === "number")
    return value >= minimum && value <= maximum && value > exclusiveMinimum && value < exclusiveMaximum;
  const { minLength = 0, maxLength = Infinity, minItems = 0, maxItems = Infinity, pattern = "" } = schema;
  if (typeof value === "string")
    return [...value].length >= minLength && [...value].length <= maxLength && new RegExp(pattern, "su").test(value);
  if (Array.isArray(value)) {
    const itemOf = (i: number) => schema.prefixItems?.[i] ?? schema.items ?? true;
    return value.length >= minItems && value.length <= maxItems && value.every((item, i) => holds(item, itemOf(i)));
  }
  if (type !== "object") return true;
  const { properties = {}, required = [], additionalProperties } = schema;
  const others = additionalProperties ?? Object.keys(properties).length === 0;
  return (
    required.every((name: string) => Object.hasOwn(value as object, name)) &&
    Object.entries(value as object).every(([name, part]) => {
      const inner = Object.hasOwn(properties, name) ? properties[name] : others;
      return inner !== false && holds(part, inner);
    })
  );
}

const shapes = {
  type: "object",
  properties: {
    kind: { enum: ["circle", "a/b", 'with "quotes"', null] },
    count: { type: "integer", minimum: 1, maximum: 30 },
    share: { type: "number", minimum: 0, exclusiveMaximum: 1 },
    name: { type: "string", maxLength: 8 },
    code: { type: "string", pattern: "^[A-Z]{2}-\\d{2,4}$" },
    tags: { type: "array", items: { type: "string", pattern: "^.{2,5}$" }, minItems: 1, maxItems: 3 },
    nested: {
      type: "object",
      properties: { ok: { type: "boolean" }, why: { type: "string", maxLength: 12 } },
      required: ["ok"],
    },
  },
  required: ["kind", "count", "tags", "nested"],
};
const list = {
  $ref: "#/$defs/node",
  $defs: {
    node: {
      type: "object",
      properties: { value: { type: ["integer", "string"] }, next: { anyOf: [{ $ref: "#/$defs/node" }, { type: "null" }] } }, // biome-ignore format: one row
      required: ["value", "next"],
    },
  },
};
const optional = { type: "object", properties: Object.fromEntries([..."abcdef"].map((name) => [name, { type: "integer" }])), required: ["c"] }; // biome-ignore format: one row
const schemas: [string, object, bounded: boolean][] = [
  ["shapes", shapes, true],
  ["a list of lists", list, false],
  ["optional properties", optional, true],
  ["none required", { ...optional, required: [] }, true],
  ["a map", { type: "object", additionalProperties: { type: "number", exclusiveMinimum: -3, maximum: 12 } }, false],
  ["a tuple", { type: "array", prefixItems: [{ const: [1, "x/y"] }, { type: "boolean" }], items: false }, true],
  ["anything", { type: "array", items: true, minItems: 2, maxItems: 4 }, false],
  ["a string at the root", { type: "string", minLength: 2 }, false],
];

describe("masks", () => {
  let grammars: Grammars;
  beforeAll(() => {
    grammars = new Grammars(file("tokenizer.json"), SIZE, [EOS]);
  });
  afterAll(() => grammars[Symbol.dispose]());

  const allowedIn = (mask: Int32Array) =>
    Array.from({ length: SIZE }, (_, i) => i).filter((i) => (mask[i >>> 5] >>> (i & 31)) & 1);

  /** A text of random tokens, after a while of those that close; null if it did not end. */
  async function walk(matcher: Matcher, random: () => number): Promise<string | null> {
    const ids: number[] = [];
    for (let step = 0; step < 500; step++) {
      // Bytes that are no characters alone may come to be no character at all.
      const allowed = allowedIn(await matcher.mask()).filter((id) => !tokenizer.decode([id]).includes("\ufffd"));
      const closing = allowed.filter((id) => id === EOS || /^["\]}0-9.,:]+$/.test(tokenizer.decode([id])));
      const among = step > 30 && closing.length > 0 && random() < 0.8 ? closing : allowed;
      const id = among[Math.floor(random() * among.length)];
      matcher.accept(id);
      if (id === EOS) return tokenizer.decode(ids);
      expect(tokenizer.isSpecial(id)).toBe(false);
      ids.push(id);
    }
    return null;
  }

  test.each(schemas)("let nothing but %s through, whatever is drawn", async (_name, schema) => {
    const random = uniforms(21);
    const texts = new Set<string>();
    for (let round = 0; round < 15; round++) {
      using matcher = await grammars.open(json(schema), [EOS]);
      const text = await walk(matcher, random);
      if (text === null) continue;
      expect(satisfies(JSON.parse(text), schema), text).toBe(true);
      texts.add(text);
    }
    expect(texts.size).toBeGreaterThan(5);
  });

  /** Whether a text may be the whole answer. */
  async function accepts(schema: object, text: string, strict = true): Promise<boolean> {
    using matcher = await grammars.open(json(schema, strict), [EOS]);
    for (const id of [...tokenizer.encode(text), EOS]) {
      if (!allowedIn(await matcher.mask()).includes(id)) return false;
      matcher.accept(id);
    }
    return (await matcher.mask()).length === 0;
  }

  const nested = '{"kind": "circle", "count": 3, "name": "a\\nb", "tags": ["big"], "nested": {"ok": true}}';
  test.each<[object, string, boolean]>([
    [shapes, nested, true],
    [shapes, JSON.stringify(JSON.parse(nested)), true],
    [shapes, JSON.stringify(JSON.parse(nested), null, 2), true],
    [shapes, nested.replace("3", "31"), false],
    [shapes, nested.replace("circle", "square"), false],
    [shapes, nested.replace('"big"', '"big", "red", "odd", "too"'), false],
    [shapes, nested.replace("true}", 'true, "other": 1}'), false],
    [{ type: "number" }, "-12.5e-3", true],
    [{ type: "string", format: "date-time" }, '"2024-12-31T23:59:59Z"', true],
    [{ type: "string", format: "email" }, '"first.last@example.com"', true],
    [{ type: "string", pattern: "^\\S+@[^\\s@]+$" }, '"me@here"', true],
    [{ type: "string", maxLength: 3 }, '"äöü"', true],
    [{ type: "string", maxLength: 3 }, '"four"', false],
    [{ type: "string" }, '"中文 \\u00e9 \\"quoted\\""', true],
    [{ const: "a/b" }, '"a/b"', true],
    [{ type: "object" }, "{}", true],
    [{ type: "object" }, '{"a": 1}', false],
  ])("%j: %s is allowed: %s", async (schema, text, allowed) => {
    expect(await accepts(schema, text)).toBe(allowed);
  });

  test("let an object have any properties where strict is false and none is named", async () => {
    expect(await accepts({ type: "object" }, '{"a": [1, {"b": null}]}', false)).toBe(true);
  });

  test("end the answer when the JSON is whole, with a stop token that is no text", async () => {
    for (const stops of [[EOS], [EOS, 1175], [EOS, 5]]) {
      using matcher = await grammars.open(json({ const: true }), stops);
      for (const id of tokenizer.encode("true")) matcher.accept(id);
      expect(allowedIn(await matcher.mask())).toEqual(stops.filter((id) => tokenizer.isSpecial(id)).sort());
    }
  });

  test("know the tokens of a vocabulary with byte fallback", async () => {
    const words = ["<unk>", "[", "]", "▁", "<0x0A>", "▁true", "true", "<0x74>", "</s>"];
    const vocab = Object.fromEntries(words.map((word, id) => [word, id]));
    const added_tokens = ["<unk>", "</s>"].map((content) => ({ id: vocab[content], content, special: true }));
    const decoders = ["Replace", "ByteFallback", "Fuse"].map((type) => ({ type }));
    using grammars = new Grammars({ model: { vocab }, added_tokens, decoder: { type: "Sequence", decoders } }, 12, [8]);
    using matcher = await grammars.open(json({ type: "array", items: { const: true } }), [8]);
    const wanted = [["["], ["]", "▁", "<0x0A>", "▁true", "true", "<0x74>"], ["]", "▁", "<0x0A>"], ["</s>"]]; // biome-ignore format: one row
    for (const [step, drawn] of ["[", "▁true", "]", "</s>"].entries()) {
      const mask = await matcher.mask();
      expect(words.filter((_, id) => (mask[0] >>> id) & 1)).toEqual(wanted[step]);
      matcher.accept(vocab[drawn]);
    }
  });

  test("refuse a schema that leads nowhere", async () => {
    const refusal = { status: 400, code: "invalid_json_schema", param: "response_format.json_schema.schema" };
    await expect(grammars.open(json({ $ref: "#" }), [EOS])).rejects.toMatchObject(refusal);
    expect(await accepts({ const: 1 }, "1")).toBe(true);
  });

  test("refuse what takes too long to compile", async () => {
    using hasty = new Grammars(file("tokenizer.json"), SIZE, [EOS], 1);
    const late = { status: 400, message: expect.stringMatching(/takes more than 0.001 s to compile/) };
    for (let i = 0; i < 2; i++) await expect(hasty.open(json(shapes), [EOS])).rejects.toMatchObject(late);
  });
});

describe("answers", () => {
  let engines: [string, LocalEngine][];
  beforeAll(() => {
    engines = [
      ["without drafts", openEngine({ drafter: "none" })],
      ["30/3/8", openEngine({ shape: { totalToken: 30, depth: 3, topK: 8 } })],
      ["a chain", openEngine({ shape: { totalToken: 7, depth: 5, topK: 1 } })],
      ["by cost", openEngine()],
    ];
  });
  afterAll(() => Promise.all(engines.map(([, engine]) => engine.close())));
  const golden = (id: string) => cases.find((c) => c.id === id)!;

  test.each(schemas)("are JSON of %s, the same with every tree, greedy or drawn", async (_name, schema, bounded) => {
    for (const [temperature, id] of [
      [0, "00-describe"],
      [1, "18-story"],
    ] as const) {
      const change = {
        json: json(schema),
        maxTokens: bounded ? 400 : 150,
        sampling: { ...plainSampling, temperature, seed: 3 },
      };
      const wanted = await answer(engines[0][1], golden(id), change);
      // Where a schema bounds nothing, an answer may take all of its tokens.
      const ended = wanted.at(-1)!.finish!.reason === "stop";
      if (bounded) expect(ended, textOf(wanted)).toBe(true);
      if (ended) expect(satisfies(JSON.parse(textOf(wanted)), schema), textOf(wanted)).toBe(true);
      for (const [name, engine] of engines)
        expect(tokensOf(await answer(engine, golden(id), change)), `${name} ${id}`).toEqual(tokensOf(wanted));
    }
  });

  test("of several choices are what each is alone, and penalties go along", async () => {
    const sampling = { ...plainSampling, frequencyPenalty: 0.5, seed: 40 };
    for (const [name, engine] of engines) {
      const change = { json: json(shapes), maxTokens: 150, sampling };
      const steps = await answer(engine, golden("18-story"), { ...change, n: 3 });
      for (const choice of [0, 1, 2]) {
        const mine = steps.filter((step) => step.choice === choice);
        const alone = { ...change, sampling: { ...sampling, seed: 40 + choice } };
        expect(tokensOf(mine), name).toEqual(tokensOf(await answer(engine, golden("18-story"), alone)));
        expect(satisfies(JSON.parse(textOf(mine)), shapes)).toBe(true);
      }
    }
  });

  test("to json_object are objects", async () => {
    let whole = 0;
    for (let seed = 1; seed <= 8; seed++) {
      const change = { json: { schema: null, strict: true }, maxTokens: 600, sampling: { ...plainSampling, seed } };
      const steps = await answer(engines[1][1], golden("08-json"), change);
      if (steps.at(-1)!.finish!.reason === "length") continue;
      expect(JSON.parse(textOf(steps))).toBeTypeOf("object");
      whole++;
    }
    expect(whole).toBeGreaterThan(2);
  });

  test("come to an end though the model wants to go on with blanks", async () => {
    const blanks = Array.from({ length: SIZE }, (_, id) => id).filter((id) => /^\s+$/.test(tokenizer.decode([id])));
    const logitBias = blanks.map((id): [number, number] => [id, 100]);
    const change = { json: json({ ...optional, required: ["c"] }), maxTokens: 400, sampling: { ...plainSampling, temperature: 0, logitBias } }; // biome-ignore format: one line
    const steps = await answer(engines[1][1], golden("00-describe"), change);
    expect(steps.at(-1)!.finish!.reason).toBe("stop");
    expect(textOf(steps)).toMatch(/\s{10}/);
  });

  test("with a bad schema are refused, and the next request is answered", async () => {
    for (const [name, engine] of engines) {
      const bad = answer(engine, golden("18-story"), { json: json({ type: "foo" }) });
      await expect(bad, name).rejects.toMatchObject({ status: 400, param: "response_format.json_schema.schema" });
      const steps = await answer(engine, golden("18-story"), { json: json(shapes), maxTokens: 300 });
      expect(satisfies(JSON.parse(textOf(steps)), shapes)).toBe(true);
    }
  });

  test("to others are not held up by a schema that takes long to compile, which is refused", async () => {
    const [, engine] = engines[1];
    const pattern = "^((a{1000}){1000}){1000}((b{1000}){1000}){1000}$";
    let refused = false;
    const hostile = answer(engine, golden("18-story"), { json: json({ type: "string", pattern }) }).catch((error) => {
      refused = true;
      return error;
    });
    expect(tokensOf(await answer(engine, golden("00-describe")))).toEqual(golden("00-describe").output_ids);
    expect(refused).toBe(false);
    expect(await hostile).toMatchObject({ status: 400, code: "invalid_json_schema" });
    const steps = await answer(engine, golden("18-story"), { json: json(shapes), maxTokens: 300 });
    expect(satisfies(JSON.parse(textOf(steps)), shapes)).toBe(true);
  });

  test("that are left in the middle leave nothing behind", async () => {
    const [, engine] = engines[1];
    engine.target[Symbol.dispose]();
    const free = engine.runtime.allocatedBytes;
    const { request, images } = await prepare(engine, golden("18-story"), { json: json(shapes), n: 2 });
    for await (const step of engine.generate(request, images, AbortSignal.timeout(60_000)))
      if (step.choice === 1) break;
    engine.target[Symbol.dispose]();
    expect(engine.runtime.allocatedBytes).toBe(free);
  });
});
