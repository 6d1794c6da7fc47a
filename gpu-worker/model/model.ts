/** A target with its vision tower, and maybe a draft, compiled on a runtime: what `engine/` runs. */
import { createHash } from "node:crypto";
import { readFileSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { CheckpointError } from "../../shared/errors.ts";
import type { Runtime, Session } from "../engine/runtime.ts";
import { encodeOnnx } from "../graph/onnx.ts";
import { parseConfig } from "./config.ts";
import { adaptorGraph, type DraftConfig, draftBiasGraph, draftGraph, loadDraft } from "./draft.ts";
import { headWeight, languageGraph, moveGraph } from "./language.ts";
import { loadQwenConfig, type QwenConfig } from "./qwen/config.ts";
import { ProcessorConfig } from "./qwen/processor.ts";
import { visionGraph } from "./qwen/vision.ts";
import { frequencies, ropeTable } from "./rope.ts";
import { readJson, Weights } from "./weights.ts";

export interface Draft {
  config: DraftConfig;
  layer: Session;
  bias: Session;
  adaptor: Session;
  /** Angles of every position. */
  rope: { cos: Float32Array; sin: Float32Array };
}

export interface Model {
  folder: string;
  id: string;
  /** SHA-256 over the files that decide how a prompt becomes tokens. */
  fingerprint: string;
  created: number;
  config: QwenConfig;
  processor: ProcessorConfig;
  tokenizer: object;
  tokenizerConfig: object;
  vision: Session;
  language: Session;
  /** Moves cache rows; only where the host can't. */
  mover: Session | undefined;
  draft: Draft | undefined;
}

/** Files of a checkpoint that the edge needs too. */
const TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"] as const;

/**
 * Loads a checkpoint in the Hugging Face layout, and a ViSpec draft for it (none when `draftFolder` is undefined).
 * Throws CheckpointError naming the file and the field or tensor.
 */
export function loadModel(runtime: Runtime, folder: string, draftFolder?: string, int8Draft = false): Model {
  folder = resolve(folder);
  const configFile = join(folder, "config.json");
  const { model_type: type } = readJson(configFile) as { model_type?: string };
  if (type !== "qwen2_5_vl") throw new CheckpointError(`${configFile}: model_type is ${type}; qwen2_5_vl is supported`);
  const config = loadQwenConfig(folder);
  const weights = new Weights(folder);
  const processorFile = join(folder, "preprocessor_config.json");
  const processor = parseConfig(ProcessorConfig, readJson(processorFile), processorFile);
  const [tokenizer, tokenizerConfig] = TOKENIZER_FILES.map((name) => readJson(join(folder, name)) as object);
  const digest = createHash("sha256");
  for (const name of TOKENIZER_FILES) digest.update(readFileSync(join(folder, name)));
  const draftParts = draftFolder === undefined ? undefined : loadDraft(resolve(draftFolder), config.language);
  const options = { dtype: "f32" as const, fusedRotary: runtime.device === "cpu", int8: false };
  const session = (graph: Parameters<typeof encodeOnnx>[0]) => runtime.session(encodeOnnx(graph));
  const head = headWeight(config.language, weights);
  return {
    folder,
    id: basename(folder),
    fingerprint: digest.digest("hex"),
    created: Math.floor(statSync(configFile).mtimeMs / 1000),
    config,
    processor,
    tokenizer,
    tokenizerConfig,
    vision: session(visionGraph(config.vision, weights, options)),
    language: session(languageGraph(config.language, weights, options)),
    mover: runtime.unified ? undefined : session(moveGraph(config.language, options)),
    draft: draftParts && {
      config: draftParts.config,
      layer: runtime.session(
        encodeOnnx(draftGraph(draftParts.config, draftParts.weights, head, { ...options, int8: int8Draft })),
        {
          // Waking a second thread takes longer than such small products.
          threads: int8Draft ? 1 : undefined,
        },
      ),
      bias: session(draftBiasGraph(draftParts.config, draftParts.weights, options)),
      adaptor: session(adaptorGraph(draftParts.config, draftParts.weights, options)),
      rope: ropeTable(2 * config.contextLength, frequencies(draftParts.config.headSize, draftParts.config.ropeTheta)),
    },
  };
}
