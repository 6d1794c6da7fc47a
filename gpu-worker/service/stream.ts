/** An answer as server-sent events, written as its steps come. Knows no request. */
import type { ServerResponse } from "node:http";
import type { Step } from "../engine.ts";
import type { Answer } from "./openai.ts";

/** Bytes that may wait for a client to read them; one that leaves more unread is cut off. */
const UNREAD = 16 * 2 ** 20;

/**
 * Sends steps as they come; those that are ready in the same turn of the event loop share one write. A slow reader does
 * not hold the engine: an answer is bounded by the context and waits in the socket's buffer. No header is sent before
 * the first step; what is thrown leaves the response open.
 */
export async function stream(steps: AsyncIterable<Step>, answer: Answer, response: ServerResponse): Promise<void> {
  let pending = "";
  const flush = () => {
    if (pending !== "" && !response.writableEnded) response.write(pending);
    if (response.writableLength > UNREAD) response.destroy();
    pending = "";
  };
  try {
    for await (const step of steps) {
      if (!response.headersSent)
        response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache" });
      if (pending === "") setImmediate(flush);
      pending += answer.streamStep(step);
    }
  } catch (thrown) {
    flush();
    throw thrown;
  }
  if (!response.headersSent) throw new Error("the engine ended without a step");
  response.end(pending);
  pending = "";
}
