/** Memory that passes use, whatever sequences they are of. */
import { DTYPES, type Tensor } from "../tensor.ts";
import { type CudaModel, put } from "./model.ts";

/** Most rows of a sequence in a pass of the draft's. */
const MOST_ROWS = 16;

/** Of the draft's passes in a cycle; S sequences at most. */
export interface DraftSpace {
  /** Outputs of the last two passes, [16·S,D] each. */
  out: readonly [Tensor, Tensor];
  /** [16·S,vocabulary] */
  logits: Tensor;
  /** [S,D]: of each slot, the bias of rows after its prompt. */
  biases: Tensor;
  /** [16·S,D]: those of a pass's rows. */
  rowBias: Tensor;
  /** Of the model's type [16·S]: every row is kept. */
  ones: Tensor;
  /** i64 [16·S]: 0, 1, 2, … */
  identity: Tensor;
}

export class Workspace implements Disposable {
  /** [passRows,V]: logits of the last trees. */
  readonly logits: Tensor;
  readonly draft: DraftSpace | undefined;

  constructor(model: CudaModel) {
    const { runtime, dtype, passRows, config, draft, blocks } = model;
    const { hidden, vocabulary } = config.language;
    const rows = (n: number, width = hidden) => runtime.tensor(dtype, n * width, "device");
    this.logits = rows(passRows, vocabulary);
    if (!draft) return;
    const most = MOST_ROWS * blocks.slots;
    this.draft = {
      ...{ out: [rows(most), rows(most)], logits: rows(most, draft.vocabulary) },
      ...{ biases: rows(blocks.slots), rowBias: rows(most), ones: onesOf(model, most) },
      identity: put(
        runtime,
        BigInt64Array.from({ length: most }, (_, i) => BigInt(i)),
      ),
    };
  }

  [Symbol.dispose](): void {
    const { out = [], ...rest } = this.draft ?? {};
    for (const tensor of [this.logits, ...out, ...Object.values(rest)]) tensor[Symbol.dispose]();
  }
}

/** The bits of 1. */
export const ONE = { f32: 0x3f800000, f16: 0x3c00, bf16: 0x3f80 };

function onesOf({ runtime, dtype }: CudaModel, n: number): Tensor {
  const bits = dtype === "f32" ? ONE.f32 : ONE[dtype] * 0x10001;
  const { pointer } = put(runtime, new Int32Array(n).fill(bits));
  return runtime.at(pointer, dtype, (n * 4) / DTYPES[dtype].bytes);
}
