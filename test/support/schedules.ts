/** Many requests at once, in random order, length and number, some of them cancelled: each must be what it is alone. */
import { setImmediate } from "node:timers/promises";
import { uniforms } from "../../gpu-worker/decode/sample.ts";
import type { LocalEngine } from "../../gpu-worker/engine-local.ts";
import type { GenerateRequest } from "../../shared/protocol.ts";
import { type Case, prepare } from "./goldens.ts";

/** Tokens of an answer, at most. */
const LONGEST = 40;
const SAMPLED = { temperature: 0.8, topP: 0.9, seed: 7 };

interface Asked {
  name: string;
  request: GenerateRequest;
  images: string[];
  alone: number[];
}

async function tokensOf(engine: LocalEngine, { request, images }: Asked, maxTokens: number, signal: AbortSignal) {
  const tokens: number[] = [];
  for await (const step of engine.generate({ ...request, maxTokens }, images, signal)) tokens.push(...step.tokens);
  return tokens;
}

/** Every case greedily, sampled, and without drafts, with its answer when nothing else runs. */
export async function askedOf(engine: LocalEngine, cases: readonly Case[]): Promise<Asked[]> {
  const asked: Asked[] = [];
  for (const golden of cases)
    for (const [name, change] of Object.entries({ greedy: {}, sampled: SAMPLED, plain: {} })) {
      const { request, images } = await prepare(engine, golden);
      const sampling = { ...request.sampling, ...change };
      const one = { name: `${golden.id} ${name}`, request: { ...request, sampling, plain: name === "plain" }, images };
      const alone = await tokensOf(engine, { ...one, alone: [] }, LONGEST, new AbortController().signal);
      asked.push({ ...one, alone });
    }
  return asked;
}

/** Runs one schedule; gives what is wrong with it. */
export async function runSchedule(engine: LocalEngine, asked: readonly Asked[], seed: number): Promise<string[]> {
  const uniform = uniforms(seed);
  const below = (n: number) => Math.floor(uniform() * n);
  const wrong: string[] = [];
  const run = async (which: Asked, wait: number, length: number, cancelAfter: number) => {
    for (let i = 0; i < wait; i++) await setImmediate();
    const controller = new AbortController();
    const wanted = which.alone.slice(0, length);
    const tokens: number[] = [];
    try {
      const steps = engine.generate({ ...which.request, maxTokens: length }, which.images, controller.signal);
      for await (const step of steps) {
        tokens.push(...step.tokens);
        if (tokens.length > cancelAfter) controller.abort(new Error("cancelled"));
      }
    } catch (error) {
      if ((error as Error).message !== "cancelled") throw error;
      wanted.length = Math.min(wanted.length, tokens.length);
    }
    if (JSON.stringify(tokens) !== JSON.stringify(wanted))
      wrong.push(`${seed} ${which.name}: ${tokens}, not ${wanted}`);
  };
  const requests = Array.from({ length: 2 + below(15) }, () => {
    const length = 1 + below(LONGEST);
    return [asked[below(asked.length)], below(40), length, below(4) === 0 ? below(length) : length] as const;
  });
  await Promise.all(requests.map((request) => run(...request)));
  return wrong;
}
