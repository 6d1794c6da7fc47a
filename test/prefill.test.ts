/** Prompts longer than one prefill pass: the chunks must add up to what the tokens give one after another. */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { DraftSequence } from "../gpu-worker/engine/draft.ts";
import type { LocalEngine } from "../gpu-worker/engine-local.ts";
import { families, maxDifference, openEngine, promptOf } from "./support/goldens.ts";

const LONG = 1100; // three passes
const SHORT = 480; // one
const STEP = 10;

/** Text that never repeats for long. */
const tokens = Array.from({ length: LONG + 1 }, (_, i) => (i * i * 31 + i * 7) % 1100);

describe.each(families)("$name", ({ model, cases }) => {
  let engine: LocalEngine;
  beforeAll(() => {
    engine = openEngine({ model, shape: { totalToken: 2, depth: 0, topK: 1 } });
  });
  afterAll(() => engine.close());

  function prefill(length: number) {
    const expanded = engine.model.family.expandPrompt(tokens.slice(0, length), []);
    return engine.target.prefill({ expanded, imageRows: [] }, LONG, STEP);
  }

  test("a prompt of three passes has the logits and the drafts of the same tokens decoded step by step", () => {
    using whole = prefill(LONG);
    using drafted = new DraftSequence(engine.runtime, engine.model, whole, STEP, 8, 4);
    const wholeDrafts = drafted.prefill(tokens[LONG]);

    using steps = prefill(SHORT);
    using draftSteps = new DraftSequence(engine.runtime, engine.model, steps, STEP, 8, 4);
    let stepDrafts = draftSteps.prefill(tokens[SHORT]);
    let logits = steps.firstLogits;
    const vocabulary = logits.length;
    for (let at = SHORT; at < LONG; at += STEP) {
      const chain = Array.from({ length: STEP }, (_, i) => i);
      const tree = {
        tokens: tokens.slice(at, at + STEP),
        parents: chain.map((i) => i - 1),
        depths: chain,
        scores: chain,
      };
      logits = steps.score(tree).subarray((STEP - 1) * vocabulary, STEP * vocabulary);
      stepDrafts = draftSteps.extend(steps.commit({ nodes: chain, tokens: tokens.slice(at + 1, at + STEP + 1) }));
    }
    expect(maxDifference(whole.firstLogits, logits)).toBeLessThan(2e-3);
    expect(drafted.cache.length).toBe(LONG);
    expect(draftSteps.position).toBe(drafted.position);
    expect([...stepDrafts.tokens.subarray(0, 4)]).toEqual([...wholeDrafts.tokens.subarray(0, 4)]);
    const [a, b] = [stepDrafts, wholeDrafts].map((c) => c.logProbs.subarray(0, 4));
    expect(maxDifference(a, b)).toBeLessThan(2e-3);
  });

  test("a chunk may end inside a picture", async () => {
    const prompt = await promptOf(engine, cases.find(({ id }) => id === "16-describe2")!);
    const results = [512, 40, 7].map((chunk) => {
      using sequence = engine.target.prefill(prompt, 64, STEP, chunk);
      using draft = new DraftSequence(engine.runtime, engine.model, sequence, STEP, 8, 4);
      const { tokens: drafts, logProbs } = draft.prefill(270, chunk);
      return [...sequence.firstLogits, ...[...drafts.subarray(0, 4)].map(Number), ...logProbs.subarray(0, 4)];
    });
    for (const result of results) expect(maxDifference(result, results[0])).toBeLessThan(2e-3);
  });
});
