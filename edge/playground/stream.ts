/** Asks the API and reads what it streams, with the time that it takes. Knows the API's words, not the page. */
import type { ChatRequest } from "../../shared/api.ts";

/** An error in the API's own words; `param` names its place in the request, `status` is 0 when there was no answer. */
export class Refused extends Error {
  override name = "Refused";
  readonly status: number;
  readonly param: string | null;

  constructor(message: string, status = 0, param: string | null = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** Text of one chunk: first what came of accepted drafts, then what is the target's own. */
export interface Piece {
  drafted: string;
  own: string;
}

interface Chunk {
  error?: { message: string; param: string | null };
  choices: { delta: { content?: string }; finish_reason: string | null }[];
  draft?: { tokens: number; accepted: number; characters: number; ms: number };
}

/** One answer on its way: iterate it once for its pieces; its numbers are true at any time. */
export class Answer implements AsyncIterable<Piece> {
  text = "";
  tokens = 0;
  accepted = 0;
  /** Milliseconds from the request to the first tokens. */
  first: number | null = null;
  finish: string | null = null;
  readonly #request: () => Promise<Response>;
  /** How many tokens came first, and the worker's milliseconds from them to the last ones. */
  #head = 0;
  #time = 0;

  constructor(request: () => Promise<Response>) {
    this.#request = request;
  }

  /** Tokens a second after the first ones, which the prompt's pass gives. Null until there are more. */
  get rate(): number | null {
    return this.#time > 0 ? (1000 * (this.tokens - this.#head)) / this.#time : null;
  }

  /** Accepted drafts a cycle. A cycle gives one token of the target's own; the first of these comes of the prompt. */
  get meanAccepted(): number | null {
    const cycles = this.tokens - this.accepted - 1;
    return cycles > 0 ? this.accepted / cycles : null;
  }

  /** Throws Refused, or what an abort gives. */
  async *[Symbol.asyncIterator](): AsyncGenerator<Piece> {
    const start = performance.now();
    const response = await this.#request();
    if (!response.ok || !response.body) throw await refusal(response);
    for await (const events of readEvents(response.body)) {
      this.first ??= performance.now() - start;
      for (const event of events) {
        if (event === "[DONE]") return;
        const chunk: Chunk = JSON.parse(event);
        if (chunk.error) throw new Refused(chunk.error.message, response.status, chunk.error.param);
        yield this.#take(chunk);
      }
    }
    throw new Refused("The answer broke off.", response.status);
  }

  #take({ choices: [{ delta, finish_reason }], draft }: Chunk): Piece {
    this.finish = finish_reason ?? this.finish;
    const text = delta.content ?? "";
    this.text += text;
    if (!draft) return { drafted: "", own: text };
    if (this.tokens === 0) this.#head = draft.tokens;
    this.#time = draft.ms;
    this.tokens += draft.tokens;
    this.accepted += draft.accepted;
    return { drafted: text.slice(0, draft.characters), own: text.slice(draft.characters) };
  }
}

/** Asks for a streamed answer that tells what was drafted. */
export function ask(url: URL, request: ChatRequest, headers: Record<string, string>, signal: AbortSignal): Answer {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_drafts: true } });
  return new Answer(() => call(url, { method: "POST", body, headers, signal }));
}

/** fetch, whose failure to reach anything becomes Refused. */
export async function call(url: URL, init: RequestInit): Promise<Response> {
  try {
    return await fetch(url, { ...init, headers: { "content-type": "application/json", ...init.headers } });
  } catch (error) {
    throw init.signal?.aborted ? error : new Refused("The server cannot be reached.");
  }
}

/** What a response that is not OK says. */
export async function refusal(response: Response): Promise<Refused> {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text) as Required<Pick<Chunk, "error">>;
    return new Refused(error.message, response.status, error.param);
  } catch {
    return new Refused(`The server answered with status ${response.status}.`, response.status);
  }
}

/** The data of server-sent events, one line each, as they come: the events that a read has completed. */
export async function* readEvents(body: ReadableStream<Uint8Array>): AsyncGenerator<string[]> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop()!;
    const events = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
    if (events.length > 0) yield events;
  }
}
