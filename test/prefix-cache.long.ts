/** Rows that later prompts take over: nothing of an answer may tell that there were any. */
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { DraftSequence } from "../gpu-worker/engine/draft.ts";
import { PrefixCache, type Rows } from "../gpu-worker/engine/prefix-cache.ts";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import type { GenerateRequest } from "../shared/protocol.ts";
import { type Asked, type Case, collect, families, openEngine, prepare, tokensOf } from "./support/goldens.ts";
import { Random } from "./support/wrong-values.ts";

/** Requests before the goldens are asked again; ten thousand of both models take ten minutes. */
const REQUESTS = Number(process.env.PREFIX_REQUESTS ?? 1000);
const TREE = { shape: { totalToken: 30, depth: 3, topK: 8 } };
const signal = new AbortController().signal;

type Pixels = Parameters<typeof prepare>[3];
async function ask(engine: LocalEngine, asked: Asked, change: Partial<GenerateRequest> = {}, pixels: Pixels = {}) {
  const { request, images } = await prepare(engine, asked, change, pixels);
  const steps = await collect(engine.generate(request, images, signal));
  const { acceptedPerCycle, cachedTokens, promptTokens } = steps.at(-1)!.finish!;
  return { answer: { tokens: tokensOf(steps), acceptedPerCycle }, cachedTokens, promptTokens, request };
}

/** Bytes that are kept of a token, without the draft's. */
function rowBytes(engine: LocalEngine): number {
  const { kvHeads, headSize, layers, hidden } = engine.model.config.language;
  return 4 * (2 * layers * kvHeads * headSize + hidden) + 8;
}

const question = (text: string, ...pictures: string[]) => {
  const images = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return [{ role: "user", content: [...images, { type: "text", text }] }];
};

/** Pictures that the model sees in the same number of tokens. */
const alike: Record<string, string[]> = { qwen: ["10-table", "11-table"], llava: ["00-describe", "03-describe"] };

describe.each(families)("$name", ({ name, model, cases }) => {
  let [cold, warm]: LocalEngine[] = [];
  const expected: Awaited<ReturnType<typeof ask>>[] = [];
  beforeAll(async () => {
    cold = openEngine({ model, ...TREE, prefixBytes: 0 });
    warm = openEngine({ model, ...TREE });
    for (const golden of cases) expected.push(await ask(cold, golden));
  });
  afterAll(() => Promise.all([cold.close(), warm.close()]));

  const { folder } = cases[0];
  const pictureOf = (id: string) =>
    cases.find((golden) => golden.id === id)!.messages.flatMap(({ content }) => content as { image_url?: { url: string } }[])
      .find(({ image_url }) => image_url)!.image_url!.url; // biome-ignore format: one chain
  /** Asks both engines, whose answers have to be the same. */
  async function both(messages: Case["messages"], change: Partial<GenerateRequest> = {}, pixels: Pixels = {}) {
    const asked = { id: "asked", folder, messages };
    const found = await ask(warm, asked, change, pixels);
    expect(found.answer).toEqual((await ask(cold, asked, change, pixels)).answer);
    return found;
  }

  test("every golden has the same tokens and accepted lengths when it is asked again", async () => {
    for (const [i, golden] of cases.entries()) {
      for (const time of ["first", "second"]) {
        const { answer, cachedTokens, promptTokens } = await ask(warm, golden);
        expect(answer, golden.id).toEqual(expected[i].answer);
        if (time === "second") expect(cachedTokens, golden.id).toBe(promptTokens - 1);
      }
      expect([expected[i].answer.tokens, expected[i].cachedTokens]).toEqual([golden.output_ids, 0]);
    }
  });

  test("a second question about a picture, and the next turn, begin where the text is new", async () => {
    const picture = pictureOf("06-ocr");
    const first = await both(question("Read the text.", picture));
    const second = await both(question("What colour is it?", picture));
    expect(second.cachedTokens).toBeGreaterThan(first.promptTokens - 20);
    expect(second.cachedTokens).toBeLessThan(second.promptTokens - 1);
    const golden = cases.find(({ id }) => id === "00-describe")!;
    await both(golden.messages);
    const said = { role: "assistant", content: golden.output_text };
    const turn = await both([...golden.messages, said, { role: "user", content: "Go on." }]);
    expect(turn.cachedTokens).toBeGreaterThan(golden.input_ids.length + golden.output_ids.length - 5);
  });

  test("pictures in another order or beside others are known as far as all is the same", async () => {
    const [a, b] = ["00-describe", "01-describe"].map(pictureOf);
    const change = { maxTokens: 20, tenant: "order" };
    await both(question("Compare.", a, b), change);
    const turned = await both(question("Compare.", b, a), change);
    const alone = await both(question("Compare.", a), change);
    expect(turned.cachedTokens).toBeLessThan(20); // what comes before the first picture
    expect(alone.cachedTokens).toBeGreaterThan(turned.cachedTokens + 10);
  });

  test("nothing is taken over from another tenant, another picture or another preprocessing", async () => {
    const [a, b] = alike[name].map(pictureOf);
    const text = "What is to be seen?";
    const change = { maxTokens: 20, tenant: "mine" };
    const first = await both(question(text, a), change);
    const other = await both(question(text, b), change);
    expect([other.request.tokens, other.promptTokens]).toEqual([first.request.tokens, first.promptTokens]);
    const before = first.request.tokens.indexOf(warm.model.config.imageToken);
    expect(other.cachedTokens).toBe(before);
    const { minPixels } = warm.info.pixels;
    const limited = await both(question(text, a), change, { min_pixels: minPixels + 1 });
    expect(limited.promptTokens).toBe(first.promptTokens);
    expect(limited.cachedTokens).toBe(before);
    const stranger = await both(question(text, a), { ...change, tenant: "another" });
    expect(stranger.cachedTokens).toBe(0);
  });

  test("choices that are drawn come out the same, and so does a plain answer after a drafted one", async () => {
    const { messages } = cases.find(({ id }) => id === "15-compare")!;
    const sampling = { ...(await prepare(cold, cases[0])).request.sampling, temperature: 1, seed: 7 };
    const change = { n: 3, sampling, maxTokens: 30 };
    await both(messages, change);
    expect((await both(messages, change)).cachedTokens).toBeGreaterThan(100);
    expect((await both(messages, { maxTokens: 30, plain: true })).cachedTokens).toBeGreaterThan(100);
  });

  test("any of several choices can be gone on with", async () => {
    const golden = cases.find(({ id }) => id === "18-story")!;
    const sampling = { ...expected[0].request.sampling, temperature: 1, seed: 7 };
    const { request } = await prepare(warm, golden, { n: 2, sampling, maxTokens: 30, tenant: "choices" });
    const steps = await collect(warm.generate(request, [], signal));
    for (const choice of [0, 1]) {
      const tokens = [...request.tokens, ...tokensOf(steps.filter((step) => step.choice === choice))];
      const [step] = await collect(warm.generate({ ...request, tokens, n: 1, maxTokens: 1 }, [], signal));
      expect(step.finish!.cachedTokens).toBe(tokens.length - 1);
    }
  });

  test("the draft's rows and what it sees of a picture are taken over too", async () => {
    const { request, images } = await prepare(warm, cases[0], { tenant: "draft" });
    const asking = () => collect(warm.generate({ ...request, maxTokens: 2 }, images, signal));
    await asking();
    const adaptor = vi.spyOn(warm.model.draft!.adaptor, "binding");
    await asking();
    expect(adaptor).not.toHaveBeenCalled();
    adaptor.mockRestore();
    const shared = { tenant: "draft", images: [] };
    const prompt = { expanded: warm.model.family.expandPrompt([1, 2, 3, 4, 5], []), imageRows: [], shared };
    const rows = [0, 1].map(() => {
      using context = warm.target.prefill(prompt, 8, 8);
      using draft = new DraftSequence(warm.runtime, warm.model, context, 8, 8, 4);
      draft.prefill(6);
      return draft.lastRow + 1; // of its pass
    });
    expect(rows).toEqual([5, 1]);
  });

  test("drafts are made after a plain answer of the same prompt as after none", async () => {
    const { messages } = cases.find(({ id }) => id === "16-describe2")!;
    const tenant = "plain first";
    await both(messages, { tenant, plain: true });
    expect((await both(messages, { tenant })).cachedTokens).toBeGreaterThan(100);
  });

  test("the same question at the same time runs its prompt once", async () => {
    const tenant = "twice";
    const found = await Promise.all([ask(warm, cases[1], { tenant }), ask(warm, cases[1], { tenant })]);
    expect(found.map(({ cachedTokens }) => cachedTokens)).toEqual([0, found[0].promptTokens - 1]);
    for (const { answer } of found) expect(answer.tokens).toEqual(cases[1].output_ids);
  });

  test(`after ${REQUESTS} requests, with little room, as many drafts are accepted as before`, async () => {
    const longest = Math.max(...expected.map(({ promptTokens }) => promptTokens));
    const engine = openEngine({ model, ...TREE, prefixBytes: 4 * longest * rowBytes(warm) });
    try {
      let cached = 0;
      for (let i = 0; i < REQUESTS; i++) {
        const random = new Random(i);
        const change = { maxTokens: 1 + random.below(12), tenant: `${random.below(2)}`, plain: random.below(4) === 0 };
        const { request, images } = await prepare(engine, random.pick(cases), change);
        for await (const { finish } of engine.generate(request, images, signal)) {
          cached += finish?.cachedTokens ?? 0;
          if (random.below(10) === 0) break;
        }
      }
      expect(cached).toBeGreaterThan(10 * REQUESTS);
      for (const [i, golden] of cases.entries()) {
        if (REQUESTS < 1000 && i % 4 > 0) continue; // all of them after many
        expect((await ask(engine, golden)).answer, golden.id).toEqual(expected[i].answer);
      }
    } finally {
      await engine.close();
    }
  }, 60_000 + 1000 * REQUESTS); // biome-ignore format: the limit beside its reason
});

test("with room for three pictures the least recently used one goes", async () => {
  const [{ cases, model }] = families;
  const { folder } = cases[0];
  const pictures = ["05-count-0.png", "03-describe-0.png", "02-describe-0.png", "07-ocr-0.png"];
  const engine = openEngine({ model, drafter: "none" });
  const of = (picture: string) => ({ id: "one", folder, messages: question("What is it?", `images/${picture}`) });
  const lengths: number[] = [];
  for (const picture of pictures) lengths.push((await ask(engine, of(picture), { maxTokens: 1 })).promptTokens);
  await engine.close();
  const shared = cases[0].input_ids.indexOf(engine.model.config.imageToken);
  const rows = lengths[0] + lengths[1] + lengths[2] - 2 * shared;
  const small = openEngine({ model, drafter: "none", prefixBytes: rows * rowBytes(engine) });
  try {
    const cached = async (i: number) => (await ask(small, of(pictures[i]), { maxTokens: 1 })).cachedTokens;
    const found: number[] = [];
    for (const i of [0, 1, 2, 0, 3, 0, 2, 3, 1]) found.push(await cached(i));
    const whole = lengths.map((length) => length - 1);
    expect(lengths[3]).toBeLessThan(lengths[1]);
    expect(found).toEqual([0, shared, shared, whole[0], shared, whole[0], whole[2], whole[3], shared]);
  } finally {
    await small.close();
  }
});

describe("the tree", () => {
  const WIDTHS = [3, 1, 2];
  const HEADS = [2, 1, 3];
  const BYTES_A_ROW = 4 * (6 + 1 + 6) + 8;

  const empty = (count: number): Rows[] =>
    WIDTHS.map((width, i) => ({ data: new Float32Array(HEADS[i] * count * width), heads: HEADS[i], count, width }));
  /** Rows whose every number tells of whom they are and of all marks up to them. */
  function rowsOf(owner: string, marks: number[], count = marks.length): Rows[] {
    const rows = empty(count);
    for (const { data, heads, width } of rows)
      for (let head = 0; head < heads; head++) {
        let sum = owner.length + head;
        for (const [i, mark] of marks.entries()) {
          sum = (sum * 31 + mark) % 65_521;
          data.fill(sum, (head * count + i) * width, (head * count + i + 1) * width);
        }
      }
    return rows;
  }
  const common = (a: number[], b: number[]) => {
    const at = a.findIndex((mark, i) => mark !== b[i]);
    return at < 0 ? a.length : at;
  };

  test.each([Number.POSITIVE_INFINITY, 60 * BYTES_A_ROW])("gives what was kept, and no more than %f bytes", (bound) => {
    const cache = new PrefixCache(bound);
    const kept: [owner: string, marks: number[]][] = [];
    let hits = 0;
    for (let i = 0; i < 2000; i++) {
      const random = new Random(i);
      const owner = random.pick(["a", "bc"]);
      const marks = Array.from({ length: random.below(30) }, () => random.below(random.pick([2, 3])));
      const known = Math.max(0, ...kept.map(([whose, others]) => (whose === owner ? common(marks, others) : 0)));
      const to = empty(40);
      const found = cache.reuse(owner, marks, to);
      expect(found).toBeLessThanOrEqual(known);
      if (bound === Number.POSITIVE_INFINITY) expect(found).toBe(known);
      expect(to).toEqual(rowsOf(owner, marks.slice(0, found), 40));
      hits += found;
      cache.keep(owner, marks, rowsOf(owner, marks, 40));
      expect(cache.bytes).toBeLessThanOrEqual(bound);
      expect(cache.reuse(owner, marks, empty(40))).toBe(marks.length);
      kept.push([owner, marks]);
    }
    expect(hits).toBeGreaterThan(1000);
  });

  test("without memory for a copy nothing is kept, and nothing is lost", () => {
    let left = Number.POSITIVE_INFINITY;
    const held = new Set<Float32Array>();
    const cache = new PrefixCache<Float32Array>(Number.POSITIVE_INFINITY, {
      bytes: 4,
      take(numbers) {
        if (left-- <= 0) throw new Error("no memory");
        const rooms = numbers.map((n) => new Float32Array(n));
        held.add(rooms[0]);
        return rooms;
      },
      free: ([first]) => held.delete(first),
      copy: (from, at, to, toAt, count) => {
        for (let head = 0; head < from.heads; head++) {
          const start = (head * from.count + at) * from.width;
          to.data.set(from.data.subarray(start, start + count * from.width), (head * to.count + toAt) * to.width);
        }
      },
    });
    const [one, other] = [
      [1, 2, 3, 4],
      [1, 2, 5],
    ];
    cache.keep("a", one, rowsOf("a", one));
    vi.spyOn(console, "warn").mockImplementation(() => {});
    for (const most of [0, 1, 2]) {
      left = most;
      cache.keep("a", other, rowsOf("a", other));
      const to = empty(4);
      expect(cache.reuse("a", one, to)).toBe(4);
      expect(to).toEqual(rowsOf("a", one));
    }
    left = 3;
    cache.keep("a", other, rowsOf("a", other));
    expect(cache.reuse("a", other, empty(3))).toBe(3);
    expect(held.size).toBe(3);
    cache[Symbol.dispose]();
    expect([held.size, cache.bytes]).toEqual([0, 0]);
  });

  test("what is longer than the bound is not kept, and drives nothing out", () => {
    const cache = new PrefixCache(10 * BYTES_A_ROW);
    const [short, long] = [8, 11].map((length) => Array.from({ length }, (_, i) => i + length));
    cache.keep("a", short, rowsOf("a", short));
    cache.keep("a", long, rowsOf("a", long));
    expect([short, long].map((marks) => cache.reuse("a", marks, empty(11)))).toEqual([8, 0]);
    expect(cache.bytes).toBe(8 * BYTES_A_ROW);
  });

  test("the runs that went unused go first, those that others begin with last", () => {
    const cache = new PrefixCache(12 * BYTES_A_ROW);
    const [a, b, c] = [3, 4, 5].map((last) => [1, 1, 1, 1, last, last, last]);
    for (const marks of [a, b]) cache.keep("a", marks, rowsOf("a", marks));
    cache.reuse("a", a, empty(7));
    cache.keep("a", c, rowsOf("a", c));
    expect([a, b, c].map((marks) => cache.reuse("a", marks, empty(7)))).toEqual([7, 4, 7]);
    const other = [2, 2, 2, 2, 2, 2, 2];
    cache.keep("a", other, rowsOf("a", other));
    expect([a, c, other].map((marks) => cache.reuse("a", marks, empty(7)))).toEqual([4, 4, 7]);
  });
});
