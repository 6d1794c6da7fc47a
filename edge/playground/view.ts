/** Pieces of the page as elements: a question, an answer's words, its numbers. Keeps no state. */
import type { Picture } from "./pictures.ts";
import type { Answer } from "./stream.ts";

/** An element with properties and children; without an inline style, which the page's security policy forbids. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  properties: Partial<HTMLElementTagNameMap[K]> = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function asked(pictures: Picture[], question: string): HTMLElement {
  const images = pictures.map(({ url, name }) => make("img", { src: url, alt: name }));
  return make("div", { className: "asked" }, ...images, make("h2", {}, question));
}

/** Word by word: a line below the spaces would stick out where the text wraps. */
export function write(text: HTMLElement, kind: string, part: string): void {
  for (const word of part.split(/(\s+)/)) text.append(word.trim() ? make("span", { className: kind }, word) : word);
}

export function numbersOf({ rate, meanAccepted, first, tokens }: Answer): HTMLElement[] {
  const format = (value: number | null, digits: number) =>
    value?.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) ?? "–";
  const rows = [
    ["tokens/s", format(rate, 0)],
    ["accepted a cycle", format(meanAccepted, 2)],
    ["first token", first === null ? "–" : `${format(first, 0)} ms`],
    ["tokens", format(tokens, 0)],
  ];
  return rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
}

export function verdict(drafting: Answer, plain: Answer): (Node | string)[] {
  const texts = drafting.text === plain.text ? "The two texts are identical." : "The two texts differ.";
  if (!drafting.rate || !plain.rate) return [`Too short to compare the speeds. ${texts}`];
  const factor = make("strong", {}, `${(drafting.rate / plain.rate).toFixed(2)}×`);
  return [factor, ` the tokens/s of plain decoding. ${texts}`];
}
