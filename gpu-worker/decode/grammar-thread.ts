/** The grammar library at work, in a thread started by grammar.ts only: compiles grammars, follows answers, gives masks. */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname } from "node:path";
import { parentPort, workerData } from "node:worker_threads";
import type { CompiledGrammar, GrammarMatcher } from "@mlc-ai/web-xgrammar";

/** How the tokenizer spells its tokens. */
export interface Vocabulary {
  /** By id, as many as there are logits; "" for what is no text. */
  tokens: string[];
  spelling: "byte_level" | "byte_fallback";
}

/** Each `call` is answered with the mask of the next token, empty after the last; a matcher is known by its first call. */
export type ToThread =
  | { call: number; grammar: string; stops: number[] }
  | { call: number; matcher: number; accept: number }
  | { close: number };

/** `broken`: the thread can go on no more. */
export type FromThread = { call: number } & ({ mask: Int32Array } | { refused: string; broken: boolean });

type Library = typeof import("@mlc-ai/web-xgrammar");

const file = createRequire(import.meta.url).resolve("@mlc-ai/web-xgrammar");
// The package is CommonJS but says that it is ESM, so that Node cannot import it.
const parameters = ["module", "exports", "require", "__filename", "__dirname", "console"];
const evaluate = new Function(...parameters, readFileSync(file, "utf8"));

/** An instance of the library; an error in a grammar aborts it, and `said` tells what was wrong. */
function load(): { library: Library; said: string[] } {
  const module = { exports: {} };
  const said: string[] = [];
  const say = (...words: unknown[]) => said.push(words.join(" "));
  const quiet = { log: say, info: say, debug: say, warn: say, error: say };
  evaluate(module, module.exports, createRequire(file), file, dirname(file), quiet);
  return { library: module.exports as Library, said };
}

/** Compiled grammars that are kept. */
const MAX_KEPT = 16;

/** The grammar's fault, or the vocabulary's; the thread goes on. */
class Refused extends Error {}

let parser = load();
const { library } = load();
const { tokens, spelling } = workerData as Vocabulary;
const info = await library.TokenizerInfo.createTokenizerInfo(tokens, spelling, false, tokens.length, []);
const compiler = await library.GrammarCompiler.createGrammarCompiler(info, false);
/** Least recently used first. */
const compiled = new Map<string, CompiledGrammar>();
const matchers = new Map<number, GrammarMatcher>();

/** Throws for a grammar that the library cannot take, in an instance of its own: the others do not end with it. */
async function check(grammar: string): Promise<void> {
  try {
    (await parser.library.Grammar.fromEBNF(grammar)).dispose();
  } catch (cause) {
    const line = parser.said.find((text) => text.startsWith("[FATAL]")) ?? "";
    parser = load();
    throw new Refused(`the grammar library: ${line.replace(/^\[FATAL\] \S+:\d+: /, "").slice(0, 300)}`, { cause });
  }
}

async function compile(text: string): Promise<CompiledGrammar> {
  const known = compiled.get(text);
  if (!known) await check(text);
  const grammar = known ?? (await compiler.compileGrammar(text));
  compiled.delete(text);
  compiled.set(text, grammar);
  for (const [old, oldest] of compiled) {
    if (compiled.size <= MAX_KEPT) break;
    compiled.delete(old);
    oldest.dispose();
  }
  return grammar;
}

async function answer(message: Extract<ToThread, { call: number }>): Promise<Int32Array> {
  if ("grammar" in message) {
    const grammar = await compile(message.grammar);
    matchers.set(message.call, await library.GrammarMatcher.createGrammarMatcher(grammar, message.stops));
    return matchers.get(message.call)!.getNextTokenBitmask();
  }
  const matcher = matchers.get(message.matcher)!;
  matcher.acceptToken(message.accept);
  return matcher.isTerminated() ? new Int32Array(0) : matcher.getNextTokenBitmask();
}

async function serve(message: ToThread): Promise<void> {
  if ("close" in message) {
    matchers.get(message.close)?.dispose();
    matchers.delete(message.close);
    return;
  }
  const { call } = message;
  try {
    const mask = await answer(message);
    if (mask.length > 0 && mask.every((word) => word === 0)) throw new Refused("no token goes on from here");
    parentPort!.postMessage({ call, mask } satisfies FromThread, [mask.buffer as ArrayBuffer]);
  } catch (thrown) {
    const broken = !(thrown instanceof Refused);
    const refused = broken ? "the grammar library has failed on it" : thrown.message;
    parentPort!.postMessage({ call, refused, broken } satisfies FromThread);
  }
}

/** One message after the other: `said` is of one grammar. */
let turn = Promise.resolve();
parentPort!.on("message", (message: ToThread) => {
  turn = turn.then(() => serve(message));
});
