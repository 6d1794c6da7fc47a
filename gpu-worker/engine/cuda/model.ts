/** A checkpoint on the GPU: weights in device memory, sessions over them, and the kernels of our own. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import { CheckpointError } from "../../../shared/errors.ts";
import { BLOCK_ROWS } from "../../cuda/attention.ts";
import type { Cuda } from "../../cuda/driver.ts";
import { Elementwise, type Float } from "../../cuda/elementwise.ts";
import { Products } from "../../cuda/products.ts";
import { TreeKernels } from "../../cuda/tree.ts";
import type { TreeShape } from "../../decode/drafters/plan.ts";
import type { Graph } from "../../graph/graph.ts";
import { CUSTOM_DOMAIN, encodeOnnx } from "../../graph/onnx.ts";
import { parseConfig } from "../../model/config.ts";
import { adaptorGraph, DRAFT_ATTENTION, draftBiasGraph, draftGraph, foldGraph } from "../../model/draft.ts";
import { headWeight, languageGraph, TARGET_ATTENTION } from "../../model/language.ts";
import { type Checkpoint, describe, type ModelFiles } from "../../model/model.ts";
import { frequencies, ropeTable } from "../../model/rope.ts";
import type { Seeing } from "../images.ts";
import { PrefixCache } from "../prefix-cache.ts";
import type { FixedInput, Runtime, Session } from "../runtime.ts";
import { DTYPES, type Tensor } from "../tensor.ts";
import { Blocks, PagedCache } from "./memory.ts";
import { addRmsNormOp, addRowsOp, attentionOp, gatedLinearOp, gatedSiluOp, linearOp, pairRowsOp } from "./operators.ts";
import { CudaPassage } from "./passage.ts";
import { type DeviceRows, deviceRows } from "./shared-rows.ts";
import { DeviceWeights } from "./weights.ts";

/** Most tokens of a pass. */
export const CHUNK = 2048;
/** Most nodes of a tree. */
export const MAX_TREE = 128;
/** Rows of a cycle's first draft pass: deep enough for every shape, since shapes alternate. */
export const FRESH_ROWS = 10;
/** Rows that a cycle may write after those that were accepted before it: a tree of the draft's, after fresh rows. */
export const CYCLE_ROWS = MAX_TREE + 16;
/** Most nodes of a tree where several share a pass and it is chosen by cost. */
export const SHARED_TREE = 32;
/** Of the memory that is free once weights are there, for the KV cache. */
const KV_SHARE = 0.6;
/** At most; and a third of what is free then. */
const PREFIX_BYTES = 4 * 2 ** 30;
/** Vocabularies above this are cut for the draft unless the user says otherwise. */
const LARGE_VOCABULARY = 65_536;
const DRAFT_VOCABULARY = 32_768;

export interface CudaDraft {
  config: NonNullable<Checkpoint["draft"]>["config"];
  layer: Session;
  bias: Session;
  adaptor: Session;
  /** Tokens that it can propose: how many, and where they are not 0, 1, 2, … their ids i32. */
  vocabulary: number;
  map: Tensor | undefined;
  cache: PagedCache;
}

export interface CudaModel extends ModelFiles, Seeing, Disposable {
  dtype: Float;
  cuda: Cuda;
  runtime: Runtime;
  elementwise: Elementwise;
  trees: TreeKernels;
  weights: DeviceWeights;
  /** Rows that sequences share. */
  prefixes: PrefixCache<DeviceRows>;
  /** Which blocks of the pools sequences have: of both decoders' keys and values, and of hidden states. */
  blocks: Blocks;
  cache: PagedCache;
  /** [blocks·BLOCK_ROWS+passRows,D], after the final norm: rows as blocks have them, and the last trees' from `treeRow` on. */
  hidden: Tensor;
  treeRow: number;
  /** Most rows of a pass over trees. */
  passRows: number;
  /** Over prompts, pictures in them, with the logits of some rows. */
  prefill: Session;
  /** Over a tree, with the logits of every node. */
  text: Session;
  draft: CudaDraft | undefined;
  /** Bytes of weights that a pass reads: of the target, of the draft with its head. */
  passBytes: { target: number; draft: number };
}

export interface CudaOptions {
  draft?: string;
  context?: number;
  /** What is computed in; by default what most of the decoder's weights are stored in. */
  dtype?: Float;
  /** Tokens that the draft can propose, the most frequent ones; 0: all. */
  draftVocabulary?: number;
  /** Most bytes of rows that are kept for prompts which begin alike; 0: none. */
  prefixBytes?: number;
  /** Most bytes of the KV cache: of both decoders' keys and values, and the hidden states that the draft reads. */
  kvBytes?: number;
  /** Most sequences at once. */
  concurrency?: number;
  /** The tree where it is always the same. */
  shape?: TreeShape;
}

/** Describes a checkpoint and brings it to the GPU. Throws as `describe`, and an Error where memory does not suffice. */
export function loadCudaModel(runtime: Runtime, folder: string, options: CudaOptions): CudaModel {
  const cuda = runtime.cuda!;
  const { weights: source, draft: drafting, ...files } = describe(folder, options.draft);
  const { config, family } = files;
  const { language, names } = config;
  config.contextLength = Math.min(config.contextLength, options.context ?? config.contextLength);
  const { concurrency = 1, shape } = options;
  const head = headWeight(language, source, names);
  const dtype = options.dtype ?? (head.dtype as Float);
  const graphOptions = { dtype, attention: "own" as const, int8: false };
  const elementwise = new Elementwise(cuda);
  const blocks = new Blocks(runtime, concurrency, config.contextLength + CYCLE_ROWS);
  const cache = new PagedCache(runtime, blocks, language, dtype, "each");
  const draftCache = drafting && new PagedCache(runtime, blocks, { ...drafting.config, layers: 1 }, dtype, "shared");
  const products = new Products(cuda, elementwise, dtype);
  const ops = [attentionOp(cuda, TARGET_ATTENTION, language, dtype, cache.paging), linearOp(products, dtype)];
  ops.push(gatedLinearOp(products, dtype), gatedSiluOp(elementwise, dtype));
  ops.push(addRmsNormOp(elementwise, dtype, language.epsilon));
  const cycleOptions = { ...graphOptions, searched: true };
  if (drafting) {
    const { epsilon, hidden } = drafting.config;
    ops.push(pairRowsOp(elementwise, dtype, hidden), linearOp(products, dtype, true));
    for (const picks of [false, true]) ops.push(addRowsOp(elementwise, dtype, picks));
    ops.push(attentionOp(cuda, DRAFT_ATTENTION, drafting.config, dtype, draftCache!.paging));
    if (epsilon !== language.epsilon) ops.push(addRmsNormOp(elementwise, dtype, epsilon));
  }
  runtime.addCustomOps(CUSTOM_DOMAIN, ops);
  const weights = new DeviceWeights(runtime, cuda, elementwise);
  const session = (graph: Graph, more: FixedInput[] = []) =>
    runtime.session(encodeOnnx(graph), { fixed: [...weights.of(graph), ...more] });
  const roughBytesOf = ({ tensor, dims }: FixedInput) =>
    tensor.elements * (dims.length === 2 ? products.roughBytes(DTYPES[dtype].bytes) : DTYPES[dtype].bytes);
  const passBytes = { target: 0, draft: 0 };
  const pass = (name: keyof typeof passBytes, graph: Graph, more?: FixedInput[]) => {
    // Of the embedding a pass reads a few rows.
    const read = weights.of(graph).filter(({ dims }) => dims[0] !== language.vocabulary);
    const size = name === "draft" ? roughBytesOf : bytesOf;
    passBytes[name] += read.reduce((sum, weight) => sum + size(weight), 0);
    return session(graph, more);
  };
  const load = (d: NonNullable<Checkpoint["draft"]>): CudaDraft => {
    const { hidden, headSize, ropeTheta } = d.config;
    const tokens = draftVocabulary(options, language.vocabulary, config.eosTokens);
    const folded = runtime.tensor(dtype, 2 * hidden * hidden, "device");
    const fixed = { name: "folded", tensor: folded, dims: [2 * hidden, hidden] };
    passBytes.draft = roughBytesOf(fixed);
    using fold = session(foldGraph(d.config, d.weights, graphOptions));
    using binding = fold.binding();
    binding.output(fixed.name, folded, fixed.dims).run();
    const { cos, sin } = ropeTable(blocks.width * BLOCK_ROWS, frequencies(headSize, ropeTheta));
    fill(runtime, draftCache!.cos, cos);
    fill(runtime, draftCache!.sin, sin);
    return {
      config: d.config,
      layer: pass("draft", draftGraph(d.config, d.weights, head, { ...cycleOptions, int8: true }, tokens), [fixed]),
      bias: session(draftBiasGraph(d.config, d.weights, graphOptions)),
      adaptor: session(adaptorGraph(d.config, d.weights, graphOptions)),
      vocabulary: tokens?.length ?? language.vocabulary,
      map: tokens && put(runtime, Int32Array.from(tokens)),
      cache: draftCache!,
    };
  };
  const parts = {
    passage: new CudaPassage(runtime, elementwise, dtype),
    trees: new TreeKernels(cuda, dtype),
    vision: session(family.visionGraph(source, graphOptions)),
    prefill: session(languageGraph(language, source, cycleOptions, names)),
    text: pass("target", languageGraph(language, source, cycleOptions, names, false)),
    draft: drafting && load(drafting),
  };
  weights.done();
  const passRows = Math.max(MAX_TREE, concurrency * (shape?.totalToken ?? SHARED_TREE));
  const width = drafting ? language.hidden : 0;
  const blockBytes = cache.blockBytes + (draftCache?.blockBytes ?? 0) + BLOCK_ROWS * width * DTYPES[dtype].bytes;
  const room = Math.min(options.kvBytes ?? Number.POSITIVE_INFINITY, KV_SHARE * cuda.freeMemory);
  const count = Math.min(concurrency * blocks.width, Math.floor(room / blockBytes) - 1);
  // An answer must end by its length, not for want of room.
  config.contextLength = Math.min(config.contextLength, count * BLOCK_ROWS - CYCLE_ROWS);
  if (config.contextLength < 2)
    throw new CheckpointError(`a KV cache of ${Math.floor(room)} bytes has no room for a token and a tree`);
  blocks.fill(count);
  for (const part of [cache, draftCache]) part?.fill(count + 1);
  const treeRow = drafting ? (count + 1) * BLOCK_ROWS : 0;
  const hidden = runtime.tensor(dtype, (treeRow + passRows) * language.hidden, "device");
  const bytes = options.prefixBytes ?? Math.min(PREFIX_BYTES, cuda.freeMemory / 3);
  const prefixes = new PrefixCache(bytes, deviceRows(runtime, elementwise, dtype));
  const { draft, vision, prefill, text, passage } = parts;
  const sessions = [vision, prefill, text, draft?.layer, draft?.bias, draft?.adaptor];
  const memory = [draft?.map, passage, prefixes, hidden, cache, draftCache, blocks, products, weights];
  return {
    ...{ ...files, ...parts, dtype, cuda, runtime, elementwise, weights, passBytes },
    ...{ prefixes, blocks, cache, hidden, treeRow, passRows },
    [Symbol.dispose]: () => {
      for (const part of [...sessions, ...memory]) part?.[Symbol.dispose]();
    },
  };
}

const bytesOf = ({ tensor }: FixedInput) => tensor.elements * DTYPES[tensor.dtype].bytes;

/** Numbers on the device. */
export function put(runtime: Runtime, data: Int32Array | BigInt64Array | Float32Array): Tensor {
  const dtype = data instanceof Float32Array ? "f32" : data instanceof Int32Array ? "i32" : "i64";
  const tensor = runtime.tensor(dtype, data.length, "device");
  fill(runtime, tensor, data);
  return tensor;
}

/** Copies numbers to the device, and waits. */
function fill(runtime: Runtime, { pointer }: Tensor, data: Int32Array | BigInt64Array | Float32Array): void {
  const cuda = runtime.cuda!;
  const pinned = cuda.pinned(Math.max(1, data.byteLength));
  new Uint8Array(pinned.buffer).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  cuda.upload(pointer, pinned, data.byteLength);
  cuda.synchronize();
  cuda.freePinned(pinned);
}

/** File beside a draft's weights: its tokens by falling frequency in the training data. */
const Frequent = z.array(z.number().int().nonnegative());
export const FREQUENT_FILE = "frequent_tokens.json";

/**
 * The tokens that a draft may propose: the most frequent by the draft's own list, else the first of the vocabulary (merges
 * of byte-pair encodings come in falling frequency), with those that end an answer. Undefined for all of them.
 */
export function draftVocabulary(
  { draft, draftVocabulary: asked }: CudaOptions,
  vocabulary: number,
  eosTokens: ReadonlySet<number>,
): number[] | undefined {
  const size = asked ?? (vocabulary > LARGE_VOCABULARY ? DRAFT_VOCABULARY : 0);
  if (size === 0 || size >= vocabulary) return undefined;
  const file = join(draft ?? "", FREQUENT_FILE);
  const listed = existsSync(file) ? parseConfig(Frequent, readList(file), file) : [];
  const beyond = listed.find((id) => id >= vocabulary);
  if (beyond !== undefined) throw new CheckpointError(`${file}: token ${beyond} is not among ${vocabulary}`);
  const tokens = new Set(eosTokens);
  for (const id of listed) if (tokens.size < size) tokens.add(id);
  for (let id = 0; tokens.size < size; id++) tokens.add(id);
  return [...tokens].sort((a, b) => a - b);
}

function readList(file: string): unknown {
  try {
    return JSON.parse(readFileSync(file, "utf8"));
  } catch (error) {
    throw new CheckpointError(`${file}: ${(error as Error).message}`, { cause: error });
  }
}
