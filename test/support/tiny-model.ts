/** ModelInfo of the embedded model, read from its files without an engine; for tests of the HTTP side. */
import { readFileSync } from "node:fs";
import type { ModelInfo } from "../../shared/protocol.ts";

const json = (file: string) =>
  JSON.parse(readFileSync(new URL(`../../models/tiny-qwen2.5-vl/${file}`, import.meta.url), "utf8"));

export const tinyModel: ModelInfo = {
  id: "tiny",
  created: 1_700_000_000,
  fingerprint: "tiny-1",
  contextLength: 4096,
  vocabulary: 1280,
  imageToken: "<|image_pad|>",
  pixels: { minPixels: 3136, maxPixels: 112896 },
  drafts: true,
  tokenizer: json("tokenizer.json"),
  tokenizerConfig: json("tokenizer_config.json"),
};
