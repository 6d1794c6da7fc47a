/** A target with its vision tower, and maybe a draft: read, checked, and compiled on a runtime for `engine/` to run. */
import { createHash } from "node:crypto";
import { existsSync, readFileSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { CheckpointError } from "../../shared/errors.ts";
import type { Runtime, Session } from "../engine/runtime.ts";
import type { Graph, GraphOptions } from "../graph/graph.ts";
import { encodeOnnx } from "../graph/onnx.ts";
import { adaptorGraph, type DraftConfig, draftBiasGraph, draftGraph, loadDraft } from "./draft.ts";
import type { Family, FamilyConfig } from "./family.ts";
import { batchGraph, headWeight, languageGraph, moveGraph } from "./language.ts";
import { llavaFamily } from "./llava/family.ts";
import { qwenFamily } from "./qwen/family.ts";
import { frequencies, ropeTable } from "./rope.ts";
import { elements } from "./safetensors.ts";
import { readJson, type TensorSource, Weights } from "./weights.ts";

/** Families by the model_type of config.json. What they are given: the checkpoint's folder, and its tensors by name. */
const FAMILIES: Record<string, (folder: string, weights: TensorSource) => Family> = {
  qwen2_5_vl: qwenFamily,
  llava_next: llavaFamily,
  llava: llavaFamily,
};

/** What a checkpoint's small files say, and its tensors by name. */
export interface Checkpoint {
  folder: string;
  id: string;
  /** SHA-256 over the files that decide how a prompt becomes tokens. */
  fingerprint: string;
  created: number;
  family: Family;
  config: FamilyConfig;
  tokenizer: object;
  tokenizerConfig: object;
  weights: TensorSource;
  draft: { config: DraftConfig; weights: TensorSource } | undefined;
}

export interface Draft {
  config: DraftConfig;
  layer: Session;
  bias: Session;
  adaptor: Session;
  /** Angles of every position. */
  rope: { cos: Float32Array; sin: Float32Array };
}

/** What a checkpoint's small files say. */
export type ModelFiles = Omit<Checkpoint, "weights" | "draft">;

export interface Model extends ModelFiles {
  vision: Session;
  language: Session;
  /** Makes a session for passes over the trees of so many sequences at once. */
  batched(sequences: number): Session;
  /** Moves cache rows; only where the host can't. */
  mover: Session | undefined;
  draft: Draft | undefined;
}

/**
 * Reads and checks a checkpoint in the Hugging Face layout but for its tensors: configs, tokenizer, image processor, and
 * the config of a ViSpec draft for it (none when `draftFolder` is undefined). `sources` stand in for the tensors of the
 * two folders, which then need none. Throws CheckpointError naming the file and the field.
 */
export function describe(
  folder: string,
  draftFolder?: string,
  sources: { target?: TensorSource; draft?: TensorSource } = {},
): Checkpoint {
  folder = resolve(folder);
  const configFile = join(folder, "config.json");
  const { model_type: type } = readJson(configFile) as { model_type?: string };
  if (type === undefined || !Object.hasOwn(FAMILIES, type)) {
    const known = Object.keys(FAMILIES).join(", ");
    throw new CheckpointError(`${configFile}: model_type is ${type}; supported are ${known}`);
  }
  const weights = sources.target ?? new Weights(folder);
  const family = FAMILIES[type](folder, weights);
  const { config } = family;
  return {
    ...{ folder, id: basename(folder), created: Math.floor(statSync(configFile).mtimeMs / 1000) },
    ...{ family, config, weights },
    ...tokenizerFiles(folder),
    draft:
      draftFolder === undefined ? undefined : loadDraft(resolve(draftFolder), { type, config, weights }, sources.draft),
  };
}

/** The tokenizer's files, which the edge needs too; the chat template may be a file of its own, as newer ones have it. */
function tokenizerFiles(folder: string): Pick<Checkpoint, "tokenizer" | "tokenizerConfig" | "fingerprint"> {
  const files = ["tokenizer.json", "tokenizer_config.json"];
  const [tokenizer, tokenizerConfig] = files.map((name) => readJson(join(folder, name)));
  const template = ["chat_template.jinja", "chat_template.json"].find((name) => existsSync(join(folder, name)));
  if (template) {
    files.push(template);
    const file = join(folder, template);
    const source = template.endsWith(".json") ? readJson(file) : { chat_template: readFileSync(file, "utf8") };
    Object.assign(tokenizerConfig, { chat_template: (source as { chat_template?: unknown }).chat_template });
  }
  const digest = createHash("sha256");
  for (const name of files) digest.update(readFileSync(join(folder, name)));
  return { tokenizer, tokenizerConfig, fingerprint: digest.digest("hex") };
}

/**
 * All graphs of a checkpoint. Building them asks for every tensor that they need by name and shape: CheckpointError
 * names the first that is missing or of another shape. `int8Draft`: the draft's layer computes in 8-bit integers.
 */
export function graphs(
  { family, config, weights, draft }: Checkpoint,
  options: GraphOptions = { dtype: "f32", attention: "fused", int8: false },
  int8Draft = false,
) {
  const head = headWeight(config.language, weights, config.names);
  return {
    vision: family.visionGraph(weights, options),
    language: languageGraph(config.language, weights, options, config.names),
    mover: moveGraph(config.language, options),
    draft: draft && {
      layer: draftGraph(draft.config, draft.weights, head, { ...options, int8: int8Draft }),
      bias: draftBiasGraph(draft.config, draft.weights, options),
      adaptor: adaptorGraph(draft.config, draft.weights, options),
    },
  };
}

export interface LoadOptions {
  /** Folder of a draft. */
  draft?: string;
  /** Whether the draft's layer computes in 8-bit integers. */
  int8Draft?: boolean;
  /** Bounds the context in tokens, and so the memory of tables and caches. */
  context?: number;
}

/** A draft of more weights is worth the waking of a second thread. */
const SMALL_DRAFT = 4e6;

/** Describes a checkpoint, builds its graphs and compiles them. Throws as `describe` and `graphs`. */
export function loadModel(
  runtime: Runtime,
  folder: string,
  { draft: draftFolder, int8Draft, context }: LoadOptions,
): Model {
  const checkpoint = describe(folder, draftFolder);
  const { config } = checkpoint;
  config.contextLength = Math.min(config.contextLength, context ?? config.contextLength);
  const options = {
    dtype: "f32" as const,
    attention: runtime.device === "cpu" ? ("fused" as const) : ("split" as const),
    int8: false,
  };
  const { vision, language, mover, draft } = graphs(checkpoint, options, int8Draft);
  const session = (graph: Graph, threads?: number) => runtime.session(encodeOnnx(graph), { threads });
  const draftConfig = checkpoint.draft?.config;
  return {
    ...checkpoint,
    vision: session(vision),
    language: session(language),
    batched: (n) => session(batchGraph(config.language, checkpoint.weights, options, config.names, n)),
    mover: runtime.unified ? undefined : session(mover),
    draft: draft &&
      draftConfig && {
        config: draftConfig,
        layer: session(draft.layer, int8Draft && weightsOf(draft.layer) < SMALL_DRAFT ? 1 : undefined),
        bias: session(draft.bias),
        adaptor: session(draft.adaptor),
        rope: ropeTable(2 * config.contextLength, frequencies(draftConfig.headSize, draftConfig.ropeTheta)),
      },
  };
}

const weightsOf = ({ weights }: Graph) =>
  [...weights.values()].reduce((sum, { stored }) => sum + elements(stored.shape), 0);
