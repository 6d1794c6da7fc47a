/** The fair queue: order of turns, leaving, bounds, and that no turn is lost. */
import { expect, test, vi } from "vitest";
import { FairQueue, type Place } from "../gpu-worker/service/queue.ts";
import { ApiError } from "../shared/errors.ts";
import type { Priority } from "../shared/protocol.ts";

const never = new AbortController().signal;
/** Lets everything that is ready run. */
const settle = () => new Promise<void>((resolve) => setImmediate(resolve));

/** Asks for turns in order; `order` fills as they are given, and each is passed on by `next`. */
function scene(queue: FairQueue) {
  const order: string[] = [];
  const running: Place[] = [];
  const ask = async (lane: string, name: string, signal = never, priority?: Priority) => {
    const place = queue.enter(lane, priority);
    try {
      await place.turn(signal);
    } catch (error) {
      place[Symbol.dispose]();
      throw error;
    }
    order.push(name);
    running.push(place);
  };
  const next = async () => {
    running.shift()?.[Symbol.dispose]();
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

test("interactive ones go before batch ones, and among either lanes take turns", async () => {
  const queue = new FairQueue();
  const { order, ask, next } = scene(queue);
  for (const name of ["a1", "a2", "a3", "b1"]) ask(name[0], name, never, "batch");
  for (const name of ["c1", "c2", "a4"]) ask(name[0], name);
  await settle();
  expect([queue.waitingOf("interactive"), queue.waitingOf("batch"), queue.waiting]).toEqual([3, 3, 6]);
  for (let i = 0; i < 7; i++) await next();
  expect(order).toEqual(["a1", "c1", "a4", "c2", "a2", "b1", "a3"]);
  expect([queue.waitingOf("interactive"), queue.waitingOf("batch"), queue.running]).toEqual([0, 0, 0]);
});

test("a batch one that waits has its turn after eight interactive ones, however many there are", async () => {
  const { order, ask, next } = scene(new FairQueue());
  const names = Array.from({ length: 30 }, (_, i) => `i${i}`);
  for (const name of names) ask("a", name);
  await settle();
  for (let i = 0; i < 3; i++) await next(); // before any batch one waits
  for (const name of ["b0", "b1"]) ask("b", name, never, "batch");
  for (let i = 0; i < 32; i++) await next();
  expect(order).toEqual([...names.slice(0, 12), "b0", ...names.slice(12, 20), "b1", ...names.slice(20)]);
});

test("as many run at once as the queue allows", async () => {
  const queue = new FairQueue({ running: 2 });
  const { order, ask, next } = scene(queue);
  for (const name of ["a1", "a2", "a3"]) ask("a", name);
  await settle();
  expect([order, queue.running, queue.waiting]).toEqual([["a1", "a2"], 2, 1]);
  await next();
  expect([order, queue.running, queue.waiting]).toEqual([["a1", "a2", "a3"], 2, 0]);
});

test("of several turns a lane's flood gives up the second that is free", async () => {
  const { order, ask, next } = scene(new FairQueue({ running: 2 }));
  for (const name of ["a1", "a2", "a3", "a4", "a5", "a6", "b1", "b2", "c1"]) ask(name[0], name);
  await settle();
  for (let i = 0; i < 9; i++) await next();
  expect(order).toEqual(["a1", "a2", "a3", "b1", "c1", "a4", "b2", "a5", "a6"]);
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
  await settle();
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
  const place = queue.enter("a");
  await place.turn(gone.signal);
  gone.abort(new Error("client left"));
  using other = queue.enter("a");
  await expect(other.turn(gone.signal)).rejects.toThrow("client left");
  place[Symbol.dispose]();
  using third = queue.enter("b");
  await third.turn(never);
  expect(queue.running).toBe(1);
});

test("a turn that is passed on twice counts once", async () => {
  const queue = new FairQueue();
  const { order, ask } = scene(queue);
  const place = queue.enter("a");
  await place.turn(never);
  place[Symbol.dispose]();
  place[Symbol.dispose]();
  ask("a", "first");
  ask("a", "second");
  await settle();
  expect(order).toEqual(["first"]);
});

test("places are bounded in all and for a lane, whether they wait or are not ready yet, and are free again when left", () => {
  const queue = new FairQueue({ waiting: 4, lane: 1 });
  const refusal = (lane: string) => {
    try {
      queue.enter(lane);
    } catch (error) {
      expect(error).toBeInstanceOf(ApiError);
      return error as ApiError;
    }
  };
  const [a, , , , c] = ["a", "a", "b", "b", "c"].map((lane) => queue.enter(lane));
  const full = { status: 429, code: "queue_full", retryAfter: 1 };
  expect(refusal("d")).toMatchObject({ ...full, message: "The queue is full: 5 requests wait." });
  a[Symbol.dispose]();
  a[Symbol.dispose]();
  expect(queue.waiting).toBe(4);
  expect(refusal("b")).toMatchObject({ ...full, message: "The queue is full: 2 of your requests wait." });
  const again = queue.enter("a");
  expect(refusal("d")).toMatchObject(full);
  for (const place of [again, c]) place[Symbol.dispose]();
  expect(refusal("a")).toBeUndefined();
  expect(refusal("a")).toMatchObject({ ...full, message: expect.stringContaining("2 of your") });
});

test("a lane whose batch ones have all their places still has those of its interactive ones", () => {
  const queue = new FairQueue({ waiting: 8, lane: 1 });
  for (let i = 0; i < 2; i++) queue.enter("a", "batch");
  expect(() => queue.enter("a", "batch")).toThrow("2 of your requests wait");
  const place = queue.enter("a");
  expect([queue.waitingOf("interactive"), queue.waitingOf("batch")]).toEqual([1, 2]);
  place[Symbol.dispose]();
  expect(queue.waitingOf("interactive")).toBe(0);
});

test("who is refused is told how long the queue takes, by what turns took", async () => {
  const clock = vi.spyOn(performance, "now").mockReturnValue(0);
  const queue = new FairQueue({ waiting: 3 });
  const first = queue.enter("a");
  await first.turn(never);
  for (let i = 0; i < 3; i++) queue.enter("a");
  expect(() => queue.enter("b")).toThrow(expect.objectContaining({ retryAfter: 1 }));
  clock.mockReturnValue(4100);
  first[Symbol.dispose]();
  clock.mockRestore();
  queue.enter("a");
  expect(() => queue.enter("b")).toThrow(expect.objectContaining({ retryAfter: Math.ceil(4 * 4.1) }));
});

test("batch requests of several tenants leave places for interactive ones", () => {
  const queue = new FairQueue({ waiting: 8, lane: 4 });
  const enter = (n: number, priority: Priority) => queue.enter(`tenant ${n}`, priority);
  for (let n = 0; n < 5; n++) enter(n, "batch");
  expect(() => enter(5, "batch")).toThrow(/queue is full/);
  for (let n = 0; n < 4; n++) enter(n, "interactive");
  expect(() => enter(9, "interactive")).toThrow(/queue is full/);
});
