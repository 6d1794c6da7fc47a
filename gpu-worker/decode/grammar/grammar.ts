/**
 * Structured output: which tokens may come next in an answer that has to be JSON. xgrammar says it, in a thread of its
 * own (thread.ts), so that neither a schema that is slow to compile nor one that ends the library's WebAssembly
 * instance holds up or ends the engine. Knows no logits.
 */
import { Worker } from "node:worker_threads";
import { ApiError } from "../../../shared/errors.ts";
import type { GenerateRequest } from "../../../shared/protocol.ts";
import type { Constraint } from "../sample.ts";
import { refuseSchema, schemaGrammar } from "./schema.ts";
import type { FromThread, ToThread, Vocabulary } from "./thread.ts";

/** Any JSON object, which is what OpenAI's json_object means. */
const ANY_OBJECT = `{"type":"object"}`;
/** Milliseconds for one answer of the thread, above all for compiling a schema. */
const LIMIT = 5000;

/** Makes what keeps answers to their schemas, for one tokenizer. The thread starts with the first request for JSON. */
export class Grammars implements Disposable {
  readonly #makeVocabulary: () => Vocabulary;
  readonly #limit: number;
  #vocabulary: Vocabulary | undefined;
  #thread: Thread | undefined;

  /** `tokenizer`: tokenizer.json, parsed; `size`: how many tokens have logits. */
  constructor(tokenizer: object, size: number, eosTokens: Iterable<number>, limit = LIMIT) {
    this.#makeVocabulary = () => vocabularyOf(tokenizer as TokenizerJson, size, eosTokens);
    this.#limit = limit;
  }

  /**
   * What one answer has to keep to; `stopTokens` end it, unless they are text. Throws ApiError 400 for a schema that
   * cannot be kept to or takes too long to compile.
   */
  async open(json: NonNullable<GenerateRequest["json"]>, stopTokens: Iterable<number>): Promise<Matcher> {
    const grammar = json.schema === null ? schemaGrammar(ANY_OBJECT, false) : schemaGrammar(json.schema, json.strict);
    this.#vocabulary ??= this.#makeVocabulary();
    const { tokens } = this.#vocabulary;
    if (!this.#thread || this.#thread.ended) this.#thread = new Thread(this.#vocabulary, this.#limit);
    const stops = [...stopTokens].filter((token) => tokens[token] === "");
    const matcher = new Matcher(this.#thread, { grammar, stops });
    await matcher.mask();
    return matcher;
  }

  [Symbol.dispose](): void {
    this.#thread?.end(new Error("the engine was closed"));
  }
}

/** Follows one answer. Disposing of it frees the thread's memory of it. */
export class Matcher implements Constraint, Disposable {
  readonly #thread: Thread;
  readonly #id: number;
  #mask: Promise<Int32Array>;

  constructor(thread: Thread, opening: { grammar: string; stops: number[] }) {
    this.#thread = thread;
    this.#id = thread.calls;
    this.#mask = thread.ask(opening);
  }

  mask(): Promise<Int32Array> {
    return this.#mask;
  }

  accept(token: number): void {
    this.#mask = this.#thread.ask({ matcher: this.#id, accept: token });
    this.#mask.catch(() => {}); // it may be the last token, and nobody asks
  }

  [Symbol.dispose](): void {
    this.#thread.close(this.#id);
  }
}

interface Call {
  resolve(mask: Int32Array): void;
  reject(reason: Error): void;
  timer: NodeJS.Timeout;
}
type WithoutCall<T> = T extends { call: number } ? Omit<T, "call"> : never;

class Thread {
  /** How many there were so far: the next one's number. */
  calls = 0;
  ended = false;
  readonly #worker: Worker;
  readonly #limit: number;
  readonly #waiting = new Map<number, Call>();

  constructor(vocabulary: Vocabulary, limit: number) {
    this.#limit = limit;
    this.#worker = new Worker(new URL("./thread.ts", import.meta.url), { workerData: vocabulary });
    this.#worker.unref(); // the timer of a call that waits keeps the process
    this.#worker.on("error", (cause) => this.end(new Error("the grammar's thread has ended", { cause })));
    this.#worker.on("message", (message: FromThread) => {
      if ("mask" in message) this.#take(message.call)?.resolve(message.mask);
      else this.#take(message.call)?.reject(refuseSchema(message.refused));
      if ("broken" in message && message.broken) this.end(restarted());
    });
  }

  /** The mask that answers it; rejects when it is refused, or takes longer than the limit, which ends the thread. */
  ask(question: WithoutCall<ToThread>): Promise<Int32Array> {
    const call = this.calls++;
    return new Promise((resolve, reject) => {
      if (this.ended) return reject(restarted());
      const timer = setTimeout(() => {
        this.#take(call)?.reject(refuseSchema(`takes more than ${this.#limit / 1000} s to compile`));
        this.end(restarted());
      }, this.#limit);
      this.#waiting.set(call, { resolve, reject, timer });
      this.#worker.postMessage({ call, ...question } satisfies ToThread);
    });
  }

  close(matcher: number): void {
    this.#worker.postMessage({ close: matcher } satisfies ToThread);
  }

  /** Ends it, and with the reason what still waits. */
  end(reason: Error): void {
    this.ended = true;
    void this.#worker.terminate();
    for (const call of [...this.#waiting.keys()]) this.#take(call)?.reject(reason);
  }

  #take(call: number): Call | undefined {
    const waiting = this.#waiting.get(call);
    this.#waiting.delete(call);
    clearTimeout(waiting?.timer);
    return waiting;
  }
}

/** Of a request whose thread another one's schema has ended. */
function restarted(): ApiError {
  return new ApiError(503, "The grammar's thread was started again; try again.", { code: "grammar_restarted" });
}

interface TokenizerJson {
  model: { vocab: Record<string, number> };
  added_tokens: { id: number; content: string; special: boolean }[];
  decoder: { type: string; decoders?: { type: string }[] };
}

function vocabularyOf(json: TokenizerJson, size: number, eosTokens: Iterable<number>): Vocabulary {
  const tokens = new Array<string>(size).fill("");
  const set = (id: number, token: string) => {
    if (id < size) tokens[id] = token;
  };
  for (const [token, id] of Object.entries(json.model.vocab)) set(id, token);
  for (const { id, content, special } of json.added_tokens) set(id, special ? "" : content);
  for (const id of eosTokens) set(id, "");
  const steps = json.decoder.decoders ?? [json.decoder];
  return { tokens, spelling: steps.some(({ type }) => type === "ByteLevel") ? "byte_level" : "byte_fallback" };
}
