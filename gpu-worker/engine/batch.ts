/** Trees of several sequences in one pass: those that are ready at the same time are scored together. */
import type { Tree } from "../decode/tree.ts";
import type { Model } from "../model/model.ts";
import { Context } from "./context.ts";
import type { Runtime, Session } from "./runtime.ts";
import type { Binding, Tensor } from "./tensor.ts";

/** Sequences that a graph has room for; places that are left over run one token of a sequence that nobody asks for. */
const ROOMS = [2, 4, 8, 16];
/** The most sequences of a pass. */
export const MOST_SEQUENCES = ROOMS.at(-1)!;

interface Asked {
  context: Context;
  tree: Tree;
}
interface Waiting extends Asked {
  resolve(): void;
  reject(error: unknown): void;
}

/** A graph for so many sequences, and what is bound to it. */
class Room implements Disposable {
  readonly #session: Session;
  readonly #binding: Binding;
  readonly #sizes: Tensor;
  readonly #bound: { context?: Context; nodes: number }[];

  constructor(runtime: Runtime, model: Model, sequences: number) {
    this.#session = model.batched(sequences);
    this.#binding = this.#session.binding();
    this.#sizes = runtime.tensor("i64", sequences);
    this.#binding.input("sizes", this.#sizes, [sequences]);
    this.#bound = Array.from({ length: sequences }, () => ({ nodes: 0 }));
  }

  run(asked: readonly Asked[], spare: Asked): void {
    const sizes = this.#sizes.i64;
    for (const [i, bound] of this.#bound.entries()) {
      const { context, tree } = asked[i] ?? spare;
      const nodes = tree.tokens.length;
      context.prepare(tree);
      if (bound.context !== context) context.bindCaches(this.#binding, `.${i}`);
      if (bound.context !== context || bound.nodes !== nodes) context.bindTree(this.#binding, nodes, `.${i}`);
      Object.assign(bound, { context, nodes });
      sizes[i] = BigInt(nodes);
    }
    this.#binding.run();
  }

  /** So that memory which comes again at the same address is not taken for what is bound. */
  forget(context: Context): void {
    for (const bound of this.#bound) if (bound.context === context) bound.context = undefined;
  }

  [Symbol.dispose](): void {
    for (const part of [this.#binding, this.#sizes, this.#session]) part[Symbol.dispose]();
  }
}

export class Batch implements Disposable {
  /** Rows of the last trees of those that decode. */
  readonly #rows = new Map<Context, number>();
  readonly #runtime: Runtime;
  readonly #model: Model;
  readonly #rooms = new Map<number, Room>();
  readonly #waiting: Waiting[] = [];
  #spare: Asked | undefined;
  #soon: NodeJS.Immediate | undefined;

  constructor(runtime: Runtime, model: Model) {
    this.#runtime = runtime;
    this.#model = model;
  }

  /** How many sequences decode. */
  get decoding(): number {
    return this.#rows.size;
  }

  /** Sequences that decode, and the nodes of the trees of all but one. */
  load(context: Context): { sequences: number; others: number } {
    let others = 0;
    for (const [other, rows] of this.#rows) if (other !== context) others += rows;
    return { sequences: Math.max(1, this.#rows.size), others };
  }

  /** Scores a tree, alone or with those of others that decode: waits at most until those that are ready have asked too. */
  score(context: Context, tree: Tree): Promise<void> | undefined {
    this.#rows.set(context, tree.tokens.length);
    if (this.#rows.size === 1) {
      context.score(tree);
      return undefined;
    }
    return new Promise((resolve, reject) => {
      this.#waiting.push({ context, tree, resolve, reject });
      if (this.#waiting.length >= Math.min(this.#rows.size, MOST_SEQUENCES)) this.#run();
      else this.#soon ??= setImmediate(() => this.#run());
    });
  }

  #run(): void {
    clearImmediate(this.#soon);
    this.#soon = undefined;
    const asked = this.#waiting.splice(0, MOST_SEQUENCES);
    if (this.#waiting.length > 0) this.#soon = setImmediate(() => this.#run());
    try {
      if (asked.length === 1) asked[0].context.score(asked[0].tree);
      else if (asked.length > 1) this.#room(asked.length).run(asked, this.#spareOne());
      for (const { resolve } of asked) resolve();
    } catch (error) {
      for (const { reject } of asked) reject(error);
    }
  }

  #room(sequences: number): Room {
    const size = ROOMS.find((most) => most >= sequences)!;
    const room = this.#rooms.get(size) ?? new Room(this.#runtime, this.#model, size);
    this.#rooms.set(size, room);
    return room;
  }

  #spareOne(): Asked {
    const tree = { tokens: [0], parents: [-1], depths: [0], scores: [0] };
    this.#spare ??= { context: new Context(this.#runtime, this.#model, 1, 1, () => {}), tree };
    return this.#spare;
  }

  /** A sequence has ended; its memory may serve another. */
  leave(context: Context): void {
    this.#rows.delete(context);
  }

  /** A sequence's memory is gone. */
  forget(context: Context): void {
    for (const room of this.#rooms.values()) room.forget(context);
  }

  [Symbol.dispose](): void {
    for (const room of this.#rooms.values()) room[Symbol.dispose]();
    this.#rooms.clear();
    this.#spare?.context.free();
  }
}
