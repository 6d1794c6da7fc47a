/** Random conversations, short and long, with and without pictures: every drafter must give what plain decoding gives. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import { type Asked, answer, families, openEngine, plainSampling, tokensOf } from "./support/goldens.ts";

const PICTURES = ["00-describe-0", "03-describe-0", "05-count-0", "13-turns2-0", "23-odd-0", "01-describe-0"];

/** Whole numbers below n, the same in every run (a linear congruential generator). */
function generator(seed: number): (n: number) => number {
  return (n) => {
    seed = (seed * 1103515245 + 12345) % 2 ** 31;
    return seed % n;
  };
}

/** At most `pictures` of them: all has to fit into the context. */
function conversation(random: (n: number) => number, long: boolean, pictures: number, folder: string): Asked {
  const content: object[] = [];
  for (let i = random(pictures + 1); i > 0; i--) {
    content.push({ type: "image_url", image_url: { url: `images/${PICTURES[random(PICTURES.length)]}.png` } });
    if (random(2)) content.push({ type: "text", text: "and " });
  }
  content.push({ type: "text", text: "Describe the picture. ".repeat(1 + random(long ? 500 : 20)) });
  return { id: "random", folder, messages: [{ role: "user", content: content as never }] };
}

describe.each(families)("$name", ({ name, model, goldens }) => {
  let engines: LocalEngine[];
  beforeAll(() => {
    const shape = { totalToken: 16, depth: 4, topK: 4 };
    engines = [openEngine({ model, drafter: "none" }), openEngine({ model, shape }), openEngine({ model })];
  });
  afterAll(() => Promise.all(engines.map((engine) => engine.close())));

  test.each(Array.from({ length: name === "qwen" ? 16 : 6 }, (_, i) => i))(
    "conversation %i is the same with every drafter",
    async (i) => {
      const asked = conversation(generator(i), i % 3 === 0, name === "qwen" ? 6 : 3, goldens);
      const penalties = i % 4 < 2 ? {} : { repetitionPenalty: 1.05, frequencyPenalty: 0.1, presencePenalty: -0.2 };
      const sampling = { ...plainSampling, ...penalties, temperature: i % 2, seed: i };
      const answers: number[][] = [];
      for (const engine of engines) {
        answers.push(tokensOf(await answer(engine, asked, { sampling, maxTokens: i % 5 === 4 ? null : 60 })));
      }
      expect(answers[1]).toEqual(answers[0]);
      expect(answers[2]).toEqual(answers[0]);
    },
  );
});
