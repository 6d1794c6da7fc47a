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

const file = createRequire(import.meta.url).resolve("@mlc-ai/web-xgrammar");
// The package is CommonJS but says that it is ESM, so that Node cannot import it.
const parameters = ["module", "exports", "require", "__filename", "__dirname", "console"];
const evaluate = new Function(...parameters, readFileSync(file, "utf8"));

const module = { exports: {} };
/** What the library prints before it gives up: of its own sources, nothing for a client. */
const quiet = { log() {}, info() {}, debug() {}, warn() {}, error() {} };
evaluate(module, module.exports, createRequire(file), file, dirname(file), quiet);
const library = module.exports as typeof import("@mlc-ai/web-xgrammar");

/** Compiled grammars that are kept. */
const MAX_KEPT = 16;

const { tokens, spelling } = workerData as Vocabulary;
const info = await library.TokenizerInfo.createTokenizerInfo(tokens, spelling, false, tokens.length, []);
const compiler = await library.GrammarCompiler.createGrammarCompiler(info, false);
/** Least recently used first. */
const compiled = new Map<string, CompiledGrammar>();
const matchers = new Map<number, GrammarMatcher>();

async function compile(text: string): Promise<CompiledGrammar> {
  const grammar = compiled.get(text) ?? (await compiler.compileGrammar(text));
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
  if (!matcher.acceptToken(message.accept)) throw new Error("a token was drawn that the grammar does not allow");
  return matcher.isTerminated() ? new Int32Array(0) : matcher.getNextTokenBitmask();
}

function close(matcher: number): void {
  matchers.get(matcher)?.dispose();
  matchers.delete(matcher);
}

async function serve(message: ToThread): Promise<void> {
  if ("close" in message) return close(message.close);
  const { call } = message;
  const send = (answer: FromThread, moved: ArrayBuffer[] = []) => parentPort!.postMessage(answer, moved);
  try {
    const mask = await answer(message);
    if (mask.length === 0 || mask.some((word) => word !== 0)) return send({ call, mask }, [mask.buffer as ArrayBuffer]);
    if ("grammar" in message) close(call);
    send({ call, refused: "no token goes on from here", broken: false });
  } catch {
    // The instance is aborted: out of memory, as a rule.
    send({ call, refused: "the grammar library cannot take it, maybe for its size", broken: true });
  }
}

parentPort!.on("message", serve);
