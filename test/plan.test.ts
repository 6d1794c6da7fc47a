/** How large a tree is drafted, by made-up costs: no clock is asked. */
import { expect, test } from "vitest";
import { AdaptivePlan, type Costs, Experience, fixedPlan } from "../gpu-worker/decode/drafters/plan.ts";
import { interpolate } from "../gpu-worker/engine/costs.ts";

const likely = [0.9, 0.8, 0.7, 0.6, 0.05].map(Math.log);
const costs = (verify: (nodes: number) => number, draft = 0.1): Costs => ({ verify, draft: (rows) => draft * rows });

/** Runs cycles whose passes take what the table says. */
function cycles(plan: AdaptivePlan, table: Costs, n: number, accepted: (nodes: number) => number): void {
  for (let i = 0; i < n; i++) {
    plan.begin(1);
    const nodes = plan.size(likely);
    plan.learn({ accepted: accepted(nodes), draftMs: table.draft(1), restMs: table.verify(nodes + 1) });
  }
}

test("where a pass over many nodes costs what one over one does, every node that is worth looking at is verified", () => {
  const plan = new AdaptivePlan(
    costs(() => 1),
    new Experience(),
  );
  plan.begin(1);
  expect(plan.size([...likely, Math.log(0.01)])).toBe(5);
});

test("where each node costs a whole pass, none is verified", () => {
  const plan = new AdaptivePlan(
    costs((nodes) => nodes),
    new Experience(),
  );
  plan.begin(1);
  expect(plan.size(likely)).toBe(0);
});

test("another level is drafted while its price is below what it promises", () => {
  const [cheap, dear] = [0.01, 2].map(
    (draft) =>
      new AdaptivePlan(
        costs(() => 1, draft),
        new Experience(),
      ),
  );
  for (const plan of [cheap, dear]) plan.begin(1);
  expect(cheap.width(0, likely, likely)).toBeGreaterThan(0);
  expect(dear.width(0, likely, likely)).toBe(0);
  expect(cheap.width(cheap.maxDepth, likely, likely)).toBe(0);
});

test("drafting that is slower than plain decoding is given up, and not before enough was seen", () => {
  const table = costs(() => 1, 3);
  const plan = new AdaptivePlan(table, new Experience());
  cycles(plan, table, 48, () => 0);
  expect(plan.loses).toBe(false);
  cycles(plan, table, 72, () => 0);
  expect(plan.loses).toBe(true);
});

test("drafting that is faster is kept", () => {
  const table = costs(() => 1);
  const plan = new AdaptivePlan(table, new Experience());
  cycles(plan, table, 240, (nodes) => Math.min(nodes, 2));
  expect(plan.loses).toBe(false);
});

test("drafts that are never accepted are not verified for long where nodes cost time", () => {
  const table = costs((nodes) => 1 + 0.4 * (nodes - 1));
  const plan = new AdaptivePlan(table, new Experience());
  plan.begin(1);
  expect(plan.size(likely)).toBeGreaterThan(0);
  cycles(plan, table, 200, () => 0);
  plan.begin(1);
  expect(plan.size(likely)).toBe(0);
});

test("a fixed tree is the paper's in every cycle", () => {
  const plan = fixedPlan({ totalToken: 30, depth: 3, topK: 8 });
  expect([0, 1, 2, 3].map((level) => plan.width(level, new Array(8).fill(0), []))).toEqual([8, 8, 8, 0]);
  expect(plan.size([])).toBe(29);
});

test("costs between measured points are linear, and go on beyond the last", () => {
  const cost = interpolate([1, 2, 4], [1, 2, 6]);
  expect([1, 1.5, 2, 3, 4, 6].map(cost)).toEqual([1, 1.5, 2, 4, 6, 10]);
});
