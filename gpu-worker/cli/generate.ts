/** `vispec generate`: one answer on the terminal or as JSON, by the engine in this process. */
import { readFileSync } from "node:fs";
import { dirname, resolve } from "node:path";
import { ChatModel, prepareChat } from "../../shared/chat.ts";
import { ApiError, toApiError } from "../../shared/errors.ts";
import { parseChatRequest } from "../../shared/parse.ts";
import { imageKey, type PixelLimits } from "../../shared/protocol.ts";
import type { Finish } from "../engine.ts";
import { LocalEngine } from "../engine-local.ts";
import { engineOptions, type Flags, MODEL_FLAGS, number, parseFlags, UsageError } from "./options.ts";

export const GENERATE_HELP = `vispec generate --image FILE … --prompt TEXT | --messages FILE.json
  [--model DIR] [--draft DIR] [--drafter vispec|none] [--total-token N --depth N --top-k-draft N]
  [--temperature T --top-p P --top-k K --min-p P --seed S] [--max-tokens N] [--device cpu|cuda|webgpu] [--threads N] [--context N] [--dtype bf16|f16|f32] [--draft-vocab N] [--json]`;

/** Bytes of a file that the command line names. */
function read(file: string, what: string): Buffer {
  try {
    return readFileSync(file);
  } catch (error) {
    throw new UsageError(`${what} ${file}: ${(error as Error).message}`, { cause: error });
  }
}

/** A data: URL; which format it is the decoder sees from the bytes, not from the label. */
const dataUrl = (file: string, what: string) => {
  const bytes = read(file, what);
  if (bytes.length === 0) throw new UsageError(`${what} ${file} is empty (0 bytes)`);
  return `data:image/png;base64,${bytes.toString("base64")}`;
};

interface Message {
  content?: unknown;
}

/** The messages of the command line, with file paths turned into data: URLs; `files` maps those back for error messages. */
function messagesOf(flags: Flags, files: string[]): unknown {
  const images = (flags.image as string[] | undefined) ?? [];
  if (flags.messages === undefined) {
    if (flags.prompt === undefined) throw new UsageError("either --prompt or --messages is needed");
    files.push(...images);
    const parts = images.map((file) => ({ type: "image_url", image_url: { url: dataUrl(file, "image") } }));
    return [{ role: "user", content: [...parts, { type: "text", text: flags.prompt }] }];
  }
  if (flags.prompt !== undefined || images.length > 0)
    throw new UsageError("--messages stands alone: no --prompt, no --image");
  const file = resolve(flags.messages as string);
  let messages: unknown;
  try {
    messages = JSON.parse(read(file, "messages").toString());
  } catch (error) {
    if (error instanceof UsageError) throw error;
    throw new UsageError(`messages ${file}: malformed JSON: ${(error as Error).message}`, { cause: error });
  }
  for (const message of Array.isArray(messages) ? (messages as Message[]) : [])
    for (const part of Array.isArray(message?.content) ? message.content : []) {
      const url = part?.image_url?.url;
      if (typeof url !== "string") continue;
      files.push(url.startsWith("data:") ? "" : url);
      if (!url.startsWith("data:")) part.image_url.url = dataUrl(resolve(dirname(file), url), "image");
    }
  return messages;
}

/** Runs the command; `signal` ends it between two cycles. */
export async function generateCommand(args: string[], signal: AbortSignal): Promise<void> {
  const values = ["prompt", "messages", "temperature", "top-p", "top-k", "min-p", "seed", "max-tokens"];
  const flags = parseFlags(args, [...MODEL_FLAGS, ...values], ["image"], ["json"]);
  const files: string[] = [];
  const fraction = { min: 0, max: 1, integer: false };
  const body = {
    messages: messagesOf(flags, files),
    temperature: number(flags, "temperature", { min: 0, max: 2, integer: false }) ?? 0,
    top_p: number(flags, "top-p", fraction),
    top_k: number(flags, "top-k", { min: 0 }),
    min_p: number(flags, "min-p", fraction),
    seed: number(flags, "seed", { min: Number.MIN_SAFE_INTEGER }),
    max_tokens: number(flags, "max-tokens", { min: 1 }),
  };
  const chat = parseChatRequest(JSON.stringify(body));
  const engine = new LocalEngine({ ...engineOptions(flags), concurrency: 1 });
  try {
    await engine.warmUp();
    const asker = { id: "generate", tenant: "" };
    const { request, images } = await prepareChat(chat, new ChatModel(engine.info), asker);
    const begun = performance.now();
    const keys: string[] = [];
    for (const [i, { hash, limits, where }] of request.images.entries()) {
      keys.push(imageKey(request.tenant, hash!, limits));
      await putImage(engine, keys[i], images.get(hash!)!.bytes, limits, files[i] ? `image ${files[i]}` : where);
    }
    const vision = performance.now() - begun;
    const tokens: number[] = [];
    let text = "";
    for await (const step of engine.generate(request, keys, signal)) {
      tokens.push(...step.tokens);
      text += step.text;
      if (!flags.json) print(step.text, step.draftText);
      if (step.finish) report(flags, text, tokens, step.finish, vision);
    }
  } finally {
    await engine.close();
  }
}

async function putImage(
  engine: LocalEngine,
  key: string,
  bytes: Uint8Array,
  limits: PixelLimits,
  name: string,
): Promise<void> {
  try {
    await engine.putImage(key, bytes, limits);
  } catch (thrown) {
    const error = toApiError(thrown);
    throw error.status >= 500 ? thrown : new ApiError(error.status, `${name}: ${error.message}`, { cause: thrown });
  }
}

/** Accepted drafts are green on a terminal, the target's own tokens as they are. */
function print(text: string, draftText: number): void {
  const colour = process.stdout.isTTY && draftText > 0 && !process.env.NO_COLOR;
  process.stdout.write(colour ? `\x1b[32m${text.slice(0, draftText)}\x1b[0m${text.slice(draftText)}` : text);
}

/** To microseconds. */
function rounded(values: Record<string, number>): Record<string, number> {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, Number(value.toFixed(3))]));
}

function report(flags: Flags, text: string, tokens: number[], finish: Finish, vision: number): void {
  const { acceptedPerCycle, cycles, completionTokens, promptTokens, cachedTokens, imageTokens, timings } = finish;
  const accepted = acceptedPerCycle.reduce((a, b) => a + b, 0);
  const meanAccepted = cycles === 0 ? 0 : accepted / cycles;
  const decodeMs = timings.total - timings.prefill;
  const tokensPerSecond = decodeMs > 0 ? ((completionTokens - 1) / decodeMs) * 1000 : 0;
  if (!flags.json) {
    const figures = [
      `${completionTokens} tokens`,
      `${tokensPerSecond.toFixed(0)} tokens/s`,
      `${meanAccepted.toFixed(2)} drafts accepted a cycle`,
      `first token after ${(vision + timings.prefill).toFixed(0)} ms`,
    ];
    process.stdout.write(`\n\n${figures.join(" · ")}\n`);
    return;
  }
  const result = {
    text,
    tokens,
    finishReason: finish.reason,
    usage: { promptTokens, cachedTokens, imageTokens, completionTokens },
    cycles,
    acceptedPerCycle,
    meanAccepted,
    tokensPerCycle: meanAccepted + 1,
    timings: rounded({ vision, ...timings, tokensPerSecond }),
  };
  process.stdout.write(`${JSON.stringify(result)}\n`);
}
