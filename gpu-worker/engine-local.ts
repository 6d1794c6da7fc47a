/** The engine in this process: model, images, drafter. The child process runs it, and so does the command line. */
import { existsSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { ApiError, CheckpointError } from "../shared/errors.ts";
import type { GenerateRequest, ModelInfo, PixelLimits, Sampling } from "../shared/protocol.ts";
import { Tokenizer } from "../shared/tokenizer.ts";
import type { Float } from "./cuda/elementwise.ts";
import { decode } from "./decode/decode.ts";
import { type Drafter, noDrafter } from "./decode/drafters/drafter.ts";
import { AdaptivePlan, type Costs, Experience, fixedPlan, type TreeShape } from "./decode/drafters/plan.ts";
import { vispecDrafter } from "./decode/drafters/vispec.ts";
import { generate } from "./decode/generate.ts";
import { Grammars } from "./decode/grammar/grammar.ts";
import { BLOCK_ROWS, KvPool } from "./decode/pool.ts";
import { Sampler } from "./decode/sample.ts";
import type { TargetModel } from "./decode/target.ts";
import type { CacheShape } from "./engine/cache.ts";
import type { Context } from "./engine/context.ts";
import { measureCosts } from "./engine/costs.ts";
import { encodePicture, type ImageRows, ImageStore, type Seeing } from "./engine/images.ts";
import { PrefixCache } from "./engine/prefix-cache.ts";
import { type Device, Runtime } from "./engine/runtime.ts";
import { Target } from "./engine/target.ts";
import type { Engine, Step } from "./engine.ts";
import { onCuda } from "./engine-cuda.ts";
import { decodeImage } from "./input/decode.ts";
import { loadModel, type Model, type ModelFiles } from "./model/model.ts";

export interface EngineOptions {
  /** Folder of the target's checkpoint. */
  model: string;
  /** Folder of the draft; by default the target's `draft` folder, if there is one. */
  draft?: string;
  drafter?: "vispec" | "none";
  /** Fixed tree; without it the tree is chosen from measured costs. */
  shape?: TreeShape;
  device?: Device;
  /** Threads of a pass on the CPU. */
  threads?: number;
  /** How many requests are decoded at once. By default 16 on CUDA; 8 on the CPU where the weights are small, else 1. */
  concurrency?: number;
  /** Most bytes of keys and values of what is decoded at once; by default unbounded on the CPU, 60 % of what is free on CUDA. */
  kvBytes?: number;
  /** Most bytes of rows that are kept for prompts which begin alike; 0: none. 512 MiB by default, 4 GiB on CUDA. */
  prefixBytes?: number;
  /** Prompt and answer together have at most so many tokens; by default, and at most, what the model was made for. */
  context?: number;
  /** What is computed in on CUDA; by default what the checkpoint is stored in. The CPU computes in f32. */
  dtype?: Float;
  /** Tokens that the draft can propose on CUDA, the most frequent ones; 0: all. By default 32,768 of larger vocabularies. */
  draftVocabulary?: number;
}

/** A PNG of one pixel: the decoder, too, is slow the first time. */
const ONE_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mOYEbEJAAMuAaOpKd0RAAAAAElFTkSuQmCC";

const GREEDY: Sampling = {
  ...{ temperature: 0, topK: 0, topP: 1, minP: 0, seed: 0 },
  ...{ repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, logitBias: [] },
};

/** Bytes of weights below which every size of a batch may have its own copy of them. */
const SMALL = 1e9;

function concurrencyFor(folder: string): number {
  const files = readdirSync(folder).filter((name) => name.endsWith(".safetensors"));
  return files.reduce((sum, name) => sum + statSync(join(folder, name)).size, 0) < SMALL ? 8 : 1;
}

/** What is made anew for every kind of device. */
export interface Parts {
  model: ModelFiles & Seeing;
  target: TargetModel;
  drafter: Drafter;
  plain: Drafter;
  /** What passes cost, where trees are chosen by it. */
  costs?: Costs;
  /** How many sequences are decoded at once, where it may be several. */
  concurrency?: number;
  /** Forgets what was learned of how drafts fare. */
  forget(): void;
  close(): void;
}

/** Of keys and values in float32, the draft's layer included. */
function bytesARow({ config: { language }, draft }: Model): number {
  const of = (layers: number, { kvHeads, headSize }: CacheShape) => 2 * layers * kvHeads * headSize * 4;
  return of(language.layers, language) + (draft ? of(1, { ...draft.config, layers: 1 }) : 0);
}

/** Bounds rows, and with them the context: an answer must end by its length, not for want of room. */
function bound(target: Target, model: Model, bytes: number, maxTree: number): void {
  const pool = new KvPool(Math.floor(bytes / bytesARow(model)));
  const rows = pool.blocks * BLOCK_ROWS - maxTree;
  if (rows < 2) throw new CheckpointError(`a KV cache of ${bytes} bytes has no room for a token and a tree`);
  target.pool = pool;
  model.config.contextLength = Math.min(model.config.contextLength, rows);
}

function onHost(runtime: Runtime, options: EngineOptions, draft: string | undefined): Parts {
  const { shape, context } = options;
  const model = loadModel(runtime, options.model, {
    draft,
    int8Draft: shape === undefined && runtime.unified,
    context,
  });
  const prefixes = runtime.unified ? new PrefixCache(options.prefixBytes ?? 512 << 20) : undefined;
  const concurrency = runtime.unified ? (options.concurrency ?? concurrencyFor(options.model)) : 1;
  const target = new Target(runtime, model, concurrency, prefixes);
  const costs = draft === undefined || shape ? undefined : measureCosts(runtime, model, target);
  let experience = new Experience();
  const planner = (context?: Context) =>
    costs ? new AdaptivePlan(costs, experience, context && (() => target.load(context))) : fixedPlan(shape!);
  const drafter = draft === undefined ? noDrafter : vispecDrafter(runtime, model, planner);
  if (options.kvBytes !== undefined) bound(target, model, options.kvBytes, drafter.maxTree);
  const { language, mover, vision } = model;
  const sessions = [language, mover, vision, model.draft?.layer, model.draft?.bias, model.draft?.adaptor];
  return {
    ...{ model, target, drafter: drafter as Drafter, plain: noDrafter, costs, concurrency },
    forget: () => {
      experience = new Experience();
    },
    close: () => {
      target[Symbol.dispose]();
      for (const session of sessions) session?.[Symbol.dispose]();
    },
  };
}

export class LocalEngine implements Engine {
  readonly info: ModelInfo;
  readonly ready = true;
  readonly restarts = 0;
  readonly runtime: Runtime;
  readonly tokenizer: Tokenizer;
  readonly grammars: Grammars;
  readonly drafter: Drafter;
  readonly #parts: Parts;
  readonly #images: ImageStore;

  /** Loads the checkpoint; CheckpointError says what does not fit. */
  constructor(options: EngineOptions) {
    if (!existsSync(options.model)) throw new CheckpointError(`${options.model} is no folder`);
    const beside = join(options.model, "draft");
    const draft = options.drafter === "none" ? undefined : (options.draft ?? (existsSync(beside) ? beside : undefined));
    if (options.drafter === "vispec" && draft === undefined)
      throw new CheckpointError(`${beside} is missing: no draft`);
    this.runtime = new Runtime(options);
    this.#parts = (this.runtime.cuda ? onCuda : onHost)(this.runtime, options, draft);
    const { model, drafter } = this.#parts;
    this.drafter = drafter;
    this.tokenizer = new Tokenizer(model.tokenizer, model.tokenizerConfig);
    this.#images = new ImageStore(this.runtime, model);
    const { id, created, fingerprint, config, family, tokenizer, tokenizerConfig } = model;
    const { contextLength, eosTokens } = config;
    const { vocabulary } = config.language;
    this.grammars = new Grammars(tokenizer, vocabulary, eosTokens);
    const imageToken = this.tokenizer.decode([config.imageToken]);
    const { pixels } = family;
    const drafts = draft !== undefined;
    const files = { tokenizer, tokenizerConfig };
    this.info = { id, created, fingerprint, contextLength, vocabulary, imageToken, pixels, drafts, ...files };
  }

  /** The parts of the CPU's and WebGPU's engine; on CUDA they are others, with the same of what answering takes. */
  get model(): Model {
    return this.#parts.model as Model;
  }
  get target(): Target {
    return this.#parts.target as Target;
  }
  get plain(): Drafter {
    return this.#parts.plain;
  }
  /** What it is made of, whatever the device. */
  get parts(): Parts {
    return this.#parts;
  }
  get concurrency(): number {
    return this.#parts.concurrency ?? 1;
  }
  get costs(): Costs | undefined {
    return this.#parts.costs;
  }

  /**
   * Runs a small picture and some tokens through every part, so that no request pays for the first run of code and
   * graphs (but for those of several sequences, which are made when so many first meet), and forgets them. Takes about 0.1 s on a small model, and ends after the token that exceeds 0.3 s.
   */
  async warmUp(): Promise<void> {
    await decodeImage(Buffer.from(ONE_PIXEL, "base64"));
    const { family, config } = this.model;
    const picture = { width: 301, height: 263, rgb: new Uint8Array(301 * 263 * 3) };
    const images: ImageRows[] = [];
    // A context may be too short for any picture.
    if (family.imageTokens(picture, family.pixels) < config.contextLength)
      for (let i = 0; i < 2; i++) images[0] = encodePicture(this.runtime, this.model, picture);
    const expanded = family.expandPrompt([0, ...images.map(() => config.imageToken), 0], images);
    const imageRows = images.map(({ rows }) => rows);
    const samplers = [new Sampler(GREEDY)];
    const maxTokens = Math.min(100, config.contextLength - expanded.tokens.length);
    const options = { samplers, maxTokens, stopTokens: new Set<number>(), signal: new AbortController().signal };
    const choices = decode(this.target, this.drafter, { expanded, imageRows }, options);
    const enough = performance.now() + 300;
    for await (const cycles of choices) for await (const _cycle of cycles) if (performance.now() > enough) break;
    this.#parts.forget();
  }

  /** False when the device is lost to this process: it must end. */
  get healthy(): boolean {
    return this.runtime.cuda?.healthy ?? true;
  }

  async missingImages(keys: string[]): Promise<string[]> {
    return [...new Set(keys)].filter((key) => !this.#images.has(key));
  }

  putImage(key: string, bytes: Uint8Array, limits: PixelLimits): Promise<void> {
    return this.#images.put(key, bytes, limits);
  }

  async *generate(request: GenerateRequest, images: string[], signal: AbortSignal): AsyncGenerator<Step> {
    const held = images.map((key, i) => {
      const image = this.#images.get(key);
      // It was held when the request came, and made room for others while the request waited for its turn.
      if (!image) throw new ApiError(409, `image ${i} is not held any more; try again`, { code: "image_missing" });
      return image;
    });
    yield* generate(this, request, held, signal);
  }

  async close(): Promise<void> {
    this.grammars[Symbol.dispose]();
    this.#parts.close();
  }
}
