/** The fair queue: order of turns, leaving, and that no turn is lost. */
import { expect, test } from "vitest";
import { FairQueue } from "../gpu-worker/queue.ts";

const never = new AbortController().signal;
/** Lets everything that is ready run. */
const settle = () => new Promise<void>((resolve) => setImmediate(resolve));

/** Asks for turns in order; `order` fills as they are given, and each is passed on by `next`. */
function scene(queue: FairQueue) {
  const order: string[] = [];
  const turns: Disposable[] = [];
  const ask = (lane: string, name: string, signal = never) =>
    queue.turn(lane, signal).then((turn) => {
      order.push(name);
      turns.push(turn);
    });
  const next = async () => {
    turns.shift()?.[Symbol.dispose]();
    await settle();
  };
  return { order, ask, next };
}

test("lanes take turns, each first come first served", async () => {
  const { order, ask, next } = scene(new FairQueue());
  for (const name of ["a1", "a2", "a3", "b1", "c1", "b2"]) ask(name[0], name);
  await settle();
  expect(order).toEqual(["a1"]);
  for (let i = 0; i < 6; i++) await next();
  expect(order).toEqual(["a1", "a2", "b1", "c1", "a3", "b2"]);
});

test("as many run at once as the queue allows", async () => {
  const { order, ask, next } = scene(new FairQueue(2));
  for (const name of ["a1", "a2", "a3"]) ask("a", name);
  await settle();
  expect(order).toEqual(["a1", "a2"]);
  await next();
  expect(order).toEqual(["a1", "a2", "a3"]);
});

test("an abort leaves the queue at once and keeps the others' places", async () => {
  const queue = new FairQueue();
  const { order, ask, next } = scene(queue);
  const gone = new AbortController();
  ask("a", "a1");
  ask("b", "b1");
  const left = ask("c", "c1", gone.signal);
  ask("c", "c2");
  ask("a", "a2");
  expect(queue.waiting).toBe(4);
  gone.abort(new Error("client left"));
  await expect(left).rejects.toThrow("client left");
  expect(queue.waiting).toBe(3);
  for (let i = 0; i < 4; i++) await next();
  expect(order).toEqual(["a1", "b1", "c2", "a2"]);
});

test("an abort after the turn was given changes nothing, one before refuses it", async () => {
  const queue = new FairQueue();
  const gone = new AbortController();
  const turn = await queue.turn("a", gone.signal);
  gone.abort(new Error("client left"));
  await expect(queue.turn("a", gone.signal)).rejects.toThrow("client left");
  turn[Symbol.dispose]();
  using _ = await queue.turn("b", never);
  expect(queue.waiting).toBe(0);
});

test("a turn that is passed on twice counts once", async () => {
  const queue = new FairQueue();
  const { order, ask } = scene(queue);
  const turn = await queue.turn("a", never);
  turn[Symbol.dispose]();
  turn[Symbol.dispose]();
  ask("a", "first");
  ask("a", "second");
  await settle();
  expect(order).toEqual(["first"]);
});
