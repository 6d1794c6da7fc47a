/**
 * Regular expressions and ranges of numbers as expressions of the grammar's EBNF. Knows JavaScript's syntax of regular
 * expressions and what JSON may have in a string as it is, no schemas.
 */

/** The error of something that cannot be kept to, for a reason. */
export type Refuse = (why: string, cause?: unknown) => Error;

/** Characters by their code points, from … to, in rising order and apart. */
type Characters = [from: number, to: number][];

const LAST = 0x10ffff;
const ASCII: Characters = [[0, 0x7f]];
/** What a string can hold without an escape: of ASCII no control character, quote or backslash; no half surrogate pair. */
const PLAIN_ASCII: Characters = [[0x20, 0x21], [0x23, 0x5b], [0x5d, 0x7f]]; // biome-ignore format: one row
const BEYOND: Characters = [[0x80, 0xd7ff], [0xe000, LAST]]; // biome-ignore format: one row
const FEW = 256;
const DIGITS: Characters = [[0x30, 0x39]];
const WORD: Characters = [[0x30, 0x39], [0x41, 0x5a], [0x5f, 0x5f], [0x61, 0x7a]]; // biome-ignore format: one row
const SPACE: Characters = [[0x9, 0xd], [0x20, 0x20], [0xa0, 0xa0], [0x1680, 0x1680], [0x2000, 0x200a], [0x2028, 0x2029], [0x202f, 0x202f], [0x205f, 0x205f], [0x3000, 0x3000], [0xfeff, 0xfeff]]; // biome-ignore format: one row
const CONTROLS: Record<string, number> = { n: 10, r: 13, t: 9, f: 12, v: 11, "0": 0 };

function union(parts: Characters): Characters {
  const out: Characters = [];
  for (const [from, to] of parts.toSorted((a, b) => a[0] - b[0])) {
    const before = out.at(-1);
    if (before && from <= before[1] + 1) before[1] = Math.max(before[1], to);
    else out.push([from, to]);
  }
  return out;
}

function complement(characters: Characters): Characters {
  const out: Characters = [];
  let next = 0;
  for (const [from, to] of characters) {
    if (from > next) out.push([next, from - 1]);
    next = to + 1;
  }
  if (next <= LAST) out.push([next, LAST]);
  return out;
}

function intersection(a: Characters, b: Characters): Characters {
  return complement(union([...complement(a), ...complement(b)]));
}

/**
 * Those of the characters that JSON may have as they are. The grammar library's classes are right for ASCII only, so of
 * the others a class has all or none, and a few stand beside it. "" if nothing remains.
 */
function classOf(characters: Characters): string {
  const name = (code: number) =>
    /\w/.test(String.fromCharCode(code)) ? String.fromCharCode(code) : `\\U${code.toString(16).padStart(8, "0")}`;
  const names = (all: Characters) => all.map(([from, to]) => name(from) + (from < to ? `-${name(to)}` : "")).join("");
  const lacking = complement(characters);
  const ascii = intersection(characters, PLAIN_ASCII);
  if (intersection(lacking, BEYOND).length === 0) return `[^${names(intersection(complement(ascii), ASCII))}]`;
  const beyond = intersection(characters, BEYOND);
  const few = (all: Characters) => all.reduce((sum, [from, to]) => sum + to - from + 1, 0) <= FEW;
  const parts = ascii.length === 0 ? [] : [`[${names(ascii)}]`];
  if (few(beyond))
    parts.push(...beyond.flatMap(([from, to]) => Array.from({ length: to - from + 1 }, (_, i) => `"${String.fromCodePoint(from + i)}"`))); // biome-ignore format: one line
  else if (!few(intersection(lacking, BEYOND))) return ""; // else none of them is allowed, which is right too
  return parts.length > 1 ? `(${parts.join(" | ")})` : (parts[0] ?? "");
}

/** A string's character without an escape. */
export const CHARACTER = classOf([[0, LAST]]);

const single = (character: string): Characters => [[character.codePointAt(0)!, character.codePointAt(0)!]];

/** What an escape stands for: \d and its kin, or one character. */
function escaped(atom: string, refuse: Refuse): Characters {
  const set: Record<string, Characters> = { d: DIGITS, w: WORD, s: SPACE };
  const letter = atom[1];
  const known = set[letter.toLowerCase()];
  if (known) return letter === letter.toLowerCase() ? known : complement(known);
  const hex = /^\\[ux]([\da-fA-F]+)$/.exec(atom);
  const code = hex ? Number.parseInt(hex[1], 16) : (CONTROLS[letter] ?? atom.codePointAt(1)!);
  if (!hex && /[A-Za-z1-9]/.test(letter) && !(letter in CONTROLS)) throw refuse(`${atom} is not supported`);
  return [[code, code]];
}

const ATOM = /\\(?:u[\da-fA-F]{4}|x[\da-fA-F]{2}|.)|./gsu;

/** The characters of a class, brackets included. */
function parseClass(text: string, refuse: Refuse): Characters {
  const negated = text.startsWith("[^");
  const atoms = text.slice(negated ? 2 : 1, -1).match(ATOM) ?? [];
  const parts: Characters = [];
  const read = (atom: string) => (atom.length > 1 && atom.startsWith("\\") ? escaped(atom, refuse) : single(atom));
  const isOne = (characters: Characters) => characters.length === 1 && characters[0][0] === characters[0][1];
  for (let i = 0; i < atoms.length; i++) {
    const first = read(atoms[i]);
    const last = atoms[i + 1] === "-" && i + 2 < atoms.length ? read(atoms[i + 2]) : undefined;
    if (!last || !isOne(first) || !isOne(last)) parts.push(...first);
    else {
      parts.push([first[0][0], last[0][1]]);
      i += 2;
    }
  }
  return negated ? complement(union(parts)) : union(parts);
}

const TOKEN =
  /\[(?:\\.|[^\]\\])*\]|\((?:\?(?::|<[A-Za-z_]\w*>)?)?|\{\d+(?:,\d*)?\}\??|[*+?]\??|\\(?:u[\da-fA-F]{4}|x[\da-fA-F]{2}|.)|./gsu;

/**
 * The strings, between quotes, that a regular expression matches as a whole and JSON can hold without an escape. Throws
 * what `refuse` gives for one that is none, or not regular.
 */
export function patternExpression(pattern: string, refuse: Refuse): string {
  try {
    new RegExp(pattern);
  } catch (cause) {
    throw refuse("is no regular expression", cause);
  }
  const one = (characters: Characters, token: string) => {
    const text = classOf(characters);
    if (text === "")
      throw refuse(`${token} stands for what JSON has to escape, or for too many characters beyond ASCII`);
    return ` ${text}`;
  };
  const body = pattern.replace(/^\^/, "").replace(/(?<!\\)\$$/, "");
  let out = "";
  for (const token of body.match(TOKEN) ?? []) {
    if (token === ")") out += ")";
    // Either may have nothing behind it, which is an empty string.
    else if (token === "|") out += ' | ""';
    else if (/^(\^|\$|\{|\}|\(\?)$/.test(token))
      // anchors inside, braces that count nothing, lookaround
      throw refuse(`${token} is not supported where it stands`);
    else if (token.startsWith("(")) out += ' (""';
    else if (/^(\{.+|[*+?]\??)$/s.test(token)) out += token.replace(/(?<=.)\?$/s, "");
    else if (token === ".") out += ` ${CHARACTER}`;
    else if (token.startsWith("[")) out += one(parseClass(token, refuse), token);
    else if (token.startsWith("\\")) out += one(escaped(token, refuse), token);
    else if (/\w/.test(token)) out += ` "${token}"`;
    else out += one(single(token), token);
  }
  return `"\\"" (""${out}) "\\""`;
}

/** Of a number that has no bound. */
const MOST_DIGITS = 19;
const anyDigits = (count: number) => (count === 0 ? "" : ` [0-9]{${count}}`);

/** Digits from … to, of the same length. */
function digits(from: string, to: string): string {
  const rest = from.length - 1;
  if (from === to) return from === "" ? '""' : `"${from}"`;
  if (/^0+$/.test(from) && /^9+$/.test(to)) return anyDigits(from.length);
  const [a, b] = [Number(from[0]), Number(to[0])];
  if (a === b) return `"${a}" ${digits(from.slice(1), to.slice(1))}`;
  const parts: string[] = [];
  const wholeFirst = /^0*$/.test(from.slice(1));
  const wholeLast = /^9*$/.test(to.slice(1));
  if (!wholeFirst) parts.push(`"${a}" ${digits(from.slice(1), "9".repeat(rest))}`);
  const [low, high] = [wholeFirst ? a : a + 1, wholeLast ? b : b - 1];
  if (low <= high) parts.push(`[${low}-${high}]${anyDigits(rest)}`);
  if (!wholeLast) parts.push(`"${b}" ${digits("0".repeat(rest), to.slice(1))}`);
  return `(${parts.join(" | ")})`;
}

/** Whole numbers from … to, neither below 0; `to` may be Infinity. */
function whole(from: number, to: number): string {
  const parts: string[] = [];
  for (let length = String(from).length; ; length++) {
    const low = Math.max(from, length === 1 ? 0 : 10 ** (length - 1));
    if (to === Number.POSITIVE_INFINITY && low === 10 ** (length - 1)) {
      parts.push(`[1-9] [0-9]{${length - 1},${MOST_DIGITS - 1}}`);
      break;
    }
    const high = Math.min(to, 10 ** length - 1);
    parts.push(digits(String(low), String(high)));
    if (high === to) break;
  }
  return `(${parts.join(" | ")})`;
}

export interface Bound {
  value: number;
  /** Whether it is not part of the range itself. */
  open: boolean;
}

/** Numbers of a range that does not go below 0, with a decimal fraction. */
function decimals(from: Bound, to: Bound): string[] {
  const parts: string[] = [];
  if (from.value < to.value) {
    const low = from.value + (from.open ? 1 : 0);
    if (low <= to.value - 1) parts.push(`${whole(low, to.value - 1)} ("." [0-9]{1,9})?`);
    if (from.open) parts.push(`"${from.value}." [0-9]{0,8} [1-9]`);
  } else if (from.open || from.value > to.value) return [];
  if (!to.open && to.value !== Number.POSITIVE_INFINITY) parts.push(`"${to.value}" ("." "0")?`);
  return parts;
}

/**
 * Numbers from … to, whose bounds are whole (and safe integers) or infinite; `integer`: without a fraction. Throws what
 * `refuse` gives when there is none.
 */
export function rangeExpression(from: Bound, to: Bound, integer: boolean, refuse: Refuse): string {
  const zero = { value: 0, open: false };
  const minus = ({ value, open }: Bound) => ({ value: -value, open });
  const upward = (low: Bound, high: Bound) => {
    if (!integer) return decimals(low, high);
    const [first, last] = [low.value + (low.open ? 1 : 0), high.value - (high.open ? 1 : 0)];
    return first <= last ? [whole(first, last)] : [];
  };
  const parts = [
    ...(to.value >= 0 ? upward(from.value < 0 ? zero : from, to) : []),
    ...(from.value < 0 ? upward(to.value > 0 ? zero : minus(to), minus(from)).map((part) => `"-" (${part})`) : []),
  ];
  if (parts.length === 0) throw refuse("no number is in its range");
  return `(${parts.join(" | ")})`;
}
