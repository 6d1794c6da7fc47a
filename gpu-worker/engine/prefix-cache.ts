/** Rows of sequences that have run, kept for others that begin alike. Knows no model: what rows hold is their owners' matter. */

/** What a row is made of beside the rows before it: a token, or a name that stands for more. */
export type Mark = number | string;

/** A tensor's rows, [heads,count,width], in memory of some kind. */
export interface Rows<M = Float32Array> {
  data: M;
  heads: number;
  count: number;
  width: number;
}

/** Where rows are kept. */
export interface RowMemory<M> {
  /** Bytes of a number. */
  bytes: number;
  /** Rooms for so many numbers each, taken and given back together. */
  take(numbers: readonly number[]): M[];
  free(rooms: readonly M[]): void;
  /** Copies rows at … at + count to rows toAt … of a tensor with as many heads of the same width. */
  copy(from: Rows<M>, at: number, to: Rows<M>, toAt: number, count: number): void;
}

/** What JavaScript sees. */
const hostMemory: RowMemory<Float32Array> = {
  bytes: 4,
  take: (numbers) => numbers.map((n) => new Float32Array(n)),
  free() {},
  copy(from, at, to, toAt, count) {
    const { width } = from;
    for (let head = 0; head < from.heads; head++) {
      const start = (head * from.count + at) * width;
      to.data.set(from.data.subarray(start, start + count * width), (head * to.count + toAt) * width);
    }
  },
};

/** An edge of a radix tree: the rows of some marks, after those of its parents. */
interface Run<M> {
  parent: Run<M> | undefined;
  marks: readonly Mark[];
  rows: Rows<M>[];
  /** By their first mark. */
  children: Map<Mark, Run<M>>;
}

/**
 * Sequences share the runs that they begin with. Least recently used runs go when all exceed `maxBytes`. An owner's rows are
 * of one shape, and nobody else ever gets them.
 */
export class PrefixCache<M = Float32Array> implements Disposable {
  readonly #maxBytes: number;
  readonly #memory: RowMemory<M>;
  readonly #root: Run<M> = { parent: undefined, marks: [], rows: [], children: new Map() };
  /** In the order of their last use, a parent always after its children: the first has none. */
  readonly #used = new Set<Run<M>>();
  #bytes = 0;

  constructor(maxBytes: number, memory = hostMemory as RowMemory<unknown> as RowMemory<M>) {
    this.#maxBytes = maxBytes;
    this.#memory = memory;
  }

  /** Of all rows and marks that are kept. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Copies the rows of the longest beginning of `marks` that is known to the first rows of `to`; gives their number. */
  reuse(owner: string, marks: readonly Mark[], to: readonly Rows<M>[]): number {
    const path = this.#walk(owned(owner, marks));
    let at = 0;
    for (const { run, common } of path) {
      this.#copy(run.rows, 0, to, at, common);
      at += common;
    }
    this.#use(path.map(({ run }) => run));
    return at;
  }

  /**
   * Keeps the first rows of `from`, one a mark, as far as they are not known; none if they exceed the bound together, or
   * where memory for them cannot be had.
   */
  keep(owner: string, marks: readonly Mark[], from: readonly Rows<M>[]): void {
    if (this.#bytesOf(marks, from) > this.#maxBytes) return;
    const text = owned(owner, marks);
    const walked = this.#walk(text);
    const at = walked.reduce((sum, { common }) => sum + common, 0);
    const path = walked.map(({ run }) => run);
    if (at < text.length) {
      this.#use(path);
      const more = text.slice(at);
      this.#makeRoom(this.#bytesOf(more, from), path);
      const made: Rows<M>[][] = [];
      try {
        const rows = this.#cut(from, at, more.length, made);
        const last = walked.at(-1);
        if (last && last.common < last.run.marks.length)
          path[path.length - 1] = this.#split(last.run, last.common, made);
        path.push(this.#add(path.at(-1) ?? this.#root, more, rows));
      } catch (error) {
        for (const rows of made) this.#free(rows);
        console.warn(`vispec: rows are not kept for other prompts: ${(error as Error).message}`);
      }
    }
    this.#use(path);
    this.#makeRoom(0, path); // of a run that was split the rest may be too much
  }

  /** Drops what went unused for longest until there is room for so many bytes, but nothing of a path that was used last. */
  #makeRoom(bytes: number, path: readonly Run<M>[]): void {
    for (const run of this.#used) {
      if (this.#bytes + bytes <= this.#maxBytes || path.includes(run)) return;
      this.#drop(run);
    }
  }

  /** The runs that `marks` begin with, and how many marks of each they have. */
  #walk(marks: readonly Mark[]): { run: Run<M>; common: number }[] {
    const path: { run: Run<M>; common: number }[] = [];
    let at = 0;
    for (let run = this.#root.children.get(marks[0]); run; ) {
      let common = 1;
      while (common < run.marks.length && run.marks[common] === marks[at + common]) common++;
      path.push({ run, common });
      at += common;
      run = common < run.marks.length ? undefined : run.children.get(marks[at]);
    }
    return path;
  }

  #use(path: readonly Run<M>[]): void {
    for (const run of path.toReversed()) {
      this.#used.delete(run);
      this.#used.add(run);
    }
  }

  #add(parent: Run<M>, marks: Mark[], rows: Rows<M>[]): Run<M> {
    const run: Run<M> = { parent, marks, rows, children: new Map() };
    parent.children.set(marks[0], run);
    this.#bytes += this.#bytesOf(marks, rows);
    return run;
  }

  /** Makes two of a run: the first `at` rows, which it gives, and the others after them. */
  #split(run: Run<M>, at: number, made: Rows<M>[][]): Run<M> {
    const { parent, marks, rows } = run;
    // Both copies before the tree changes: there may be no memory for them.
    const before = this.#cut(rows, 0, at, made);
    const after = this.#cut(rows, at, marks.length - at, made);
    const first: Run<M> = { parent, marks: marks.slice(0, at), rows: before, children: new Map() };
    parent!.children.set(marks[0], first);
    first.children.set(marks[at], run);
    Object.assign(run, { parent: first, marks: marks.slice(at), rows: after });
    this.#free(rows);
    return first;
  }

  #drop(run: Run<M>): void {
    run.parent!.children.delete(run.marks[0]);
    this.#used.delete(run);
    this.#bytes -= this.#bytesOf(run.marks, run.rows);
    this.#free(run.rows);
  }

  #free(rows: readonly Rows<M>[]): void {
    this.#memory.free(rows.map(({ data }) => data));
  }

  /** Forgets all rows. */
  [Symbol.dispose](): void {
    for (const run of this.#used) this.#drop(run);
  }

  /** Of a row for each mark, and of the marks. */
  #bytesOf(marks: readonly Mark[], rows: readonly Rows<M>[]): number {
    return marks.length * rows.reduce((sum, { heads, width }) => sum + this.#memory.bytes * heads * width, 8);
  }

  #copy(from: readonly Rows<M>[], at: number, to: readonly Rows<M>[], toAt: number, count: number): void {
    for (const [i, source] of from.entries()) this.#memory.copy(source, at, to[i], toAt, count);
  }

  /** A copy of rows at … at + count, which is added to what was made. */
  #cut(from: readonly Rows<M>[], at: number, count: number, made: Rows<M>[][]): Rows<M>[] {
    const rooms = this.#memory.take(from.map(({ heads, width }) => heads * count * width));
    const rows = from.map(({ heads, width }, i) => ({ data: rooms[i], heads, count, width }));
    made.push(rows);
    this.#copy(from, at, rows, 0, count);
    return rows;
  }
}

/** The first mark names the owner too, so that nothing of two owners is alike. */
function owned(owner: string, marks: readonly Mark[]): Mark[] {
  return marks.map((mark, i) => (i === 0 ? JSON.stringify([owner, mark]) : mark));
}
