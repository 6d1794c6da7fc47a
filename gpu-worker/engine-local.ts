/** The engine in this process: model, images, drafter. The child process runs it, and so does the command line. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { ApiError, CheckpointError } from "../shared/errors.ts";
import type { GenerateRequest, ModelInfo, PixelLimits, Sampling } from "../shared/protocol.ts";
import { Tokenizer } from "../shared/tokenizer.ts";
import { decode } from "./decode/decode.ts";
import { type Drafter, noDrafter } from "./decode/drafters/drafter.ts";
import { AdaptivePlan, type Costs, Experience, fixedPlan, type Plan, type TreeShape } from "./decode/drafters/plan.ts";
import { vispecDrafter } from "./decode/drafters/vispec.ts";
import { generate } from "./decode/generate.ts";
import { Grammars } from "./decode/grammar/grammar.ts";
import { Sampler } from "./decode/sample.ts";
import { measureCosts } from "./engine/costs.ts";
import { encodePicture, type ImageRows, ImageStore } from "./engine/images.ts";
import { type Device, Runtime } from "./engine/runtime.ts";
import { Target } from "./engine/target.ts";
import type { Engine, Step } from "./engine.ts";
import { decodeImage } from "./input/decode.ts";
import { loadModel, type Model } from "./model/model.ts";

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
  /** Prompt and answer together have at most so many tokens; by default, and at most, what the model was made for. */
  context?: number;
}

/** A PNG of one pixel: the decoder, too, is slow the first time. */
const ONE_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mOYEbEJAAMuAaOpKd0RAAAAAElFTkSuQmCC";

const GREEDY: Sampling = {
  ...{ temperature: 0, topK: 0, topP: 1, minP: 0, seed: 0 },
  ...{ repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, logitBias: [] },
};

export class LocalEngine implements Engine {
  readonly info: ModelInfo;
  readonly ready = true;
  readonly restarts = 0;
  readonly runtime: Runtime;
  readonly model: Model;
  readonly target: Target;
  readonly drafter: Drafter;
  readonly tokenizer: Tokenizer;
  readonly grammars: Grammars;
  /** What passes cost here, where trees are chosen by it. */
  costs: Costs | undefined;
  readonly #images: ImageStore;
  #experience = new Experience();

  /** Loads the checkpoint; CheckpointError says what does not fit. */
  constructor(options: EngineOptions) {
    const { shape } = options;
    if (!existsSync(options.model)) throw new CheckpointError(`${options.model} is no folder`);
    const beside = join(options.model, "draft");
    const draft = options.drafter === "none" ? undefined : (options.draft ?? (existsSync(beside) ? beside : undefined));
    if (options.drafter === "vispec" && draft === undefined)
      throw new CheckpointError(`${beside} is missing: no draft`);
    this.runtime = new Runtime(options);
    const int8Draft = shape === undefined && this.runtime.unified;
    this.model = loadModel(this.runtime, options.model, { draft, int8Draft, context: options.context });
    this.target = new Target(this.runtime, this.model);
    this.drafter = draft === undefined ? noDrafter : vispecDrafter(this.runtime, this.model, this.#planner(shape));
    this.tokenizer = new Tokenizer(this.model.tokenizer, this.model.tokenizerConfig);
    this.#images = new ImageStore(this.runtime, this.model);
    const { id, created, fingerprint, config, family, tokenizer, tokenizerConfig } = this.model;
    const { contextLength, eosTokens } = config;
    const { vocabulary } = config.language;
    this.grammars = new Grammars(tokenizer, vocabulary, eosTokens);
    const imageToken = this.tokenizer.decode([config.imageToken]);
    const { pixels } = family;
    const drafts = draft !== undefined;
    const files = { tokenizer, tokenizerConfig };
    this.info = { id, created, fingerprint, contextLength, vocabulary, imageToken, pixels, drafts, ...files };
  }

  #planner(shape: TreeShape | undefined): () => Plan {
    if (shape) return () => fixedPlan(shape);
    const costs = measureCosts(this.runtime, this.model, this.target);
    this.costs = costs;
    return () => new AdaptivePlan(costs, this.#experience);
  }

  /**
   * Runs a small picture and some tokens through every part, so that no request pays for the first run of code and
   * graphs, and forgets them. Takes about 0.1 s on a small model, and ends after the token that exceeds 0.3 s.
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
    const options = { samplers, maxTokens: 100, stopTokens: new Set<number>(), signal: new AbortController().signal };
    const choices = decode(this.target, this.drafter, { expanded, imageRows }, options);
    const enough = performance.now() + 300;
    for await (const cycles of choices) for await (const _cycle of cycles) if (performance.now() > enough) break;
    this.#experience = new Experience();
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
    this.target[Symbol.dispose]();
    const { language, mover, vision, draft } = this.model;
    for (const session of [language, mover, vision, draft?.layer, draft?.bias, draft?.adaptor])
      session?.[Symbol.dispose]();
  }
}
