/** `vispec bench --concurrency`: when requests come, what is made of their times, and one small run. */
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { arrivals, percentile, plotOf, type Served, serve, summarize } from "../gpu-worker/cli/bench-load.ts";
import { uniforms } from "../gpu-worker/decode/sample.ts";
import type { GenerateRequest } from "../shared/protocol.ts";
import { vispec } from "./support/cli.ts";
import { finishOf, ScriptedEngine, say } from "./support/scripted-engine.ts";

test("Poisson arrivals come in order, at the rate, with exponential gaps, the same for a seed", () => {
  const times = arrivals(50, 20_000, uniforms(3));
  expect(arrivals(50, 20_000, uniforms(3))).toEqual(times);
  const gaps = times.map((time, i) => time - (times[i - 1] ?? 0));
  const mean = gaps.reduce((a, b) => a + b) / gaps.length;
  expect(mean).toBeGreaterThan(19.5);
  expect(mean).toBeLessThan(20.5);
  for (const factor of [0.5, 1, 2, 4]) {
    const longer = gaps.filter((gap) => gap > 20 * factor).length / gaps.length;
    expect(Math.abs(longer - Math.exp(-factor))).toBeLessThan(0.015);
  }
});

test("a percentile is a value that was seen, the least that so many do not exceed", () => {
  const values = Array.from({ length: 200 }, (_, i) => 200 - i);
  expect([0.5, 0.95, 0.99, 1].map((share) => percentile(values, share))).toEqual([100, 190, 198, 200]);
  expect([percentile([7], 0.01), percentile([], 0.5)]).toEqual([7, Number.NaN]);
});

test("tokens of requests that began late or went on slowly are not in the goodput", () => {
  const finish = { ...finishOf({ tokens: [] } as unknown as GenerateRequest, 5), acceptedPerCycle: [2, 0], cycles: 2 };
  const served = (firstToken: number, between: number): Served => {
    return { firstToken, rest: 4 * between, between: Array(4).fill(between), finish };
  };
  const row = summarize(3, [served(1000, 100), served(1001, 1), served(10, 101), served(20, 2)], 4000);
  expect(row).toEqual({
    ...{ concurrency: 3, tokensPerSecond: 5, requestsPerSecond: 1, goodput: 2.5 },
    ...{ meanAccepted: 1, draftedPerCycle: 4.5 },
    ...{ firstTokenMs: { p50: 20, p95: 1001, p99: 1001 }, betweenMs: { p50: 2, p99: 101 } },
  });
});

test.each([
  ["closed", undefined],
  ["Poisson", 1e6],
])("%s: as many run as the engine decodes at once, and a wait for that counts from arrival", async (_name, rate) => {
  const engine = new ScriptedEngine();
  engine.concurrency = 2;
  let [running, most] = [0, 0];
  engine.script = async function* (request) {
    most = Math.max(most, ++running);
    for (const until = performance.now() + 20; performance.now() < until; ) await new Promise(setImmediate);
    yield say("a");
    yield { ...say("b"), tokens: [1, 2], finish: finishOf(request, 3) };
    running--;
  };
  const questions = [{ request: { tokens: [] } as unknown as GenerateRequest, images: [] }];
  const never = new AbortController().signal;
  const { served, milliseconds } = await serve(engine, questions, { rate, requests: 6 }, never);
  expect([most, served.length]).toEqual([2, 6]);
  for (const { between, firstToken } of served) {
    expect(between).toHaveLength(1);
    expect(firstToken).toBeGreaterThanOrEqual(20);
    expect(firstToken).toBeLessThan(milliseconds);
  }
  // The fifth and the sixth have their turn after two others.
  if (rate) expect(Math.min(...served.slice(4).map(({ firstToken }) => firstToken))).toBeGreaterThan(55);
});

test("the plot has every point at its height, and says what it is", () => {
  const finish = finishOf({ tokens: [] } as unknown as GenerateRequest, 5);
  const row = (concurrency: number, tokensPerSecond: number, draftedPerCycle: number) => {
    const figures = summarize(concurrency, [{ firstToken: 1, rest: 1, between: [1], finish }], 1);
    return { ...figures, tokensPerSecond, draftedPerCycle };
  };
  const svg = plotOf([row(1, 100, 8), row(4, 200, 4), row(16, 50, 2)]);
  const lines = [...svg.matchAll(/<polyline points="(.*)"/g)].map(([, points]) => points);
  expect(lines).toEqual(["50.0,105.0 280.0,60.0 510.0,127.5", "50.0,210.0 280.0,255.0 510.0,277.5"]);
  const texts = [...svg.matchAll(/<text [^>]*>([^<]+)</g)].map(([, text]) => text);
  expect(texts).toEqual(["tokens/s", "100", "200", "50", "drafted a cycle", "8.0", "4.0", "2.0", "1", "4", "16", "requests at once"]); // biome-ignore format: one line
  expect(svg).toContain("prefers-color-scheme: dark");
});

test("bench --concurrency measures the model under load", async ({ onTestFinished }) => {
  const folder = mkdtempSync(join(tmpdir(), "vispec-"));
  onTestFinished(() => rmSync(folder, { recursive: true }));
  const plot = join(folder, "load.svg");
  const args = ["bench", "--concurrency", "1,2", "--arrival", "poisson:200", "--requests", "3"];
  const { code, stdout, stderr } = await vispec([...args, "--json", "--plot", plot]);
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  const { rate, requests, bounds, rows } = JSON.parse(stdout);
  expect({ rate, requests, bounds }).toEqual({ rate: 200, requests: 3, bounds: { firstToken: 1000, betweenTokens: 100 } }); // biome-ignore format: one line
  expect(rows.map(({ concurrency }: { concurrency: number }) => concurrency)).toEqual([1, 2]);
  expect(rows[0].timesOne).toBe(1);
  for (const { tokensPerSecond, requestsPerSecond } of rows) expect(tokensPerSecond).toBeGreaterThan(requestsPerSecond);
  expect(readFileSync(plot, "utf8")).toMatch(/^<svg .*<\/svg>\n$/s);
  const table = await vispec(["bench", "--requests", "1"]);
  expect(table.stdout).toMatch(/^1 requests, .* within 1000 ms, .* within 100 ms\n\n(\|.*\|\n){3}$/);
});
