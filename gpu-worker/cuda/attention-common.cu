// Attention of one layer over the KV caches of several sequences, with rotary positions, for chunks of a prompt and for
// trees of up to 128 tokens: what the kernels for 16 bits (attention-tiles.cu, attention-join.cu and attention.cu, in
// this order) and those for f32 (attention-f32.cu) share.
//
// Everything that changes from pass to pass is read from device memory (`control`, `positions`, `mask`, `tables`), so a
// captured launch serves every length, and sequences wherever they lie. Token t's keys and values go to row past + first
// + t of its sequence. It sees the columns before `past` and, if causal, those up to its own; else column past + j where
// bit j of its mask is set.
//
// The rows of a sequence lie in blocks of 64, row c in block table[c / 64]; a block holds the rows of all KV heads and
// layers. Rows that no token sees may hold anything; a token that sees nothing gets zeros. The table must reach past +
// first + tokens rows: what lies beyond is left out.
// Defines: HEAD (a multiple of 16, at most 128) and one of F16, BF16, F32. attention.ts chooses the grids.

#if F32
using value = float;
#else
using value = unsigned short;
#endif
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int HALF = HEAD / 2;
/** A thread turns eight elements and their partners half a head on: so many such items make a head. */
constexpr int ITEMS = HEAD / 16;
/** Rows of a block of the cache. */
constexpr int BLOCK_ROWS = 64;
/** The score of a column that is not seen: below any, and finite, so that no difference is NaN. */
constexpr float NOTHING = -1e38f;

/**
 * What every kernel gets; what is a sequence's begins with that of the first. `divided`: how many sequences, where they
 * have unequal numbers of tokens, else 0; `tokens`: the most of a sequence; `width`: blocks in a slot's table.
 */
#define INPUTS                                                                                                       \
  const value *qkv, const value *bias, value *keys, value *values, const float *cos, const float *sin,               \
      const int *positions, const int *mask, const int *control, const int *tables, value *out, uint4 *partials,     \
      float2 *sums, int divided, int tokens, int heads, int kvHeads, int width, int blockStride, int angleStride
#define GIVEN                                                                                                        \
  qkv, bias, keys, values, cos, sin, positions, mask, control, tables, out, partials, sums, divided, tokens, heads,  \
      kvHeads, width, blockStride, angleStride

/**
 * A sequence's part. qkv, out: [tokens,(heads + 2 kvHeads) HEAD], [tokens,heads HEAD]; keys, values: those of block 0,
 * [kvHeads,BLOCK_ROWS,HEAD], and `blockStride` elements on those of the next.
 */
struct Pass {
  /** past, first, causal, slot. */
  int4 control;
  /** Its tokens: the first of them in the pass, how many; where they are divided, the other half of `control`. */
  int2 span;
  const value *qkv, *bias;
  value *keys, *values;
  const float *cos, *sin;
  const int *positions, *mask, *table;
  value *out;
  /**
   * What splits leave for `combine` (attention-join.cu), of all sequences: [sequences,kvHeads,mostRows,splits,
   * CHUNKS], [sequences,kvHeads,mostRows,splits].
   */
  uint4 *partials;
  float2 *sums;
  /** capacity: columns that the table has room for. */
  int sequence, tokens, mostRows, heads, kvHeads, blockStride, capacity;

  __device__ Pass(int sequence, INPUTS)
      : control(__ldcg((const int4*)control + (divided ? 2 * sequence : sequence))),
        span(divided ? __ldcg((const int2*)control + 4 * sequence + 2) : make_int2(sequence * tokens, tokens)),
        qkv(qkv + (size_t)span.x * (heads + 2 * kvHeads) * HEAD), bias(bias), keys(keys), values(values),
        cos(cos + (size_t)this->control.w * angleStride), sin(sin + (size_t)this->control.w * angleStride),
        positions(positions + span.x), mask(mask + span.x * 4), table(tables + this->control.w * width),
        out(out + (size_t)span.x * heads * HEAD), partials(partials), sums(sums), sequence(sequence), tokens(span.y),
        mostRows(tokens * (heads / kvHeads)), heads(heads), kvHeads(kvHeads), blockStride(blockStride),
        capacity(width * BLOCK_ROWS) {}

  /** The block of a column below the capacity. */
  __device__ int blockOf(int column) const { return __ldcg(table + column / BLOCK_ROWS); }
  /** Elements from `keys` or `values` to a KV head's row of a column that lies in `block`. */
  __device__ long long rowAt(int block, int kv, int column) const {
    return (long long)block * blockStride + (kv * BLOCK_ROWS + column % BLOCK_ROWS) * HEAD;
  }
};

struct Eight {
  float x[8];
};

__device__ Eight read8(const float* from) {
  const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}
#if F32
__device__ void write8(float* to, const Eight& e) {
  ((float4*)to)[0] = make_float4(e.x[0], e.x[1], e.x[2], e.x[3]);
  ((float4*)to)[1] = make_float4(e.x[4], e.x[5], e.x[6], e.x[7]);
}
#else
__device__ u32 pack(float low, float high) {
  u32 both;
#if F16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}
__device__ void unpack(u32 both, float& low, float& high) {
#if F16
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high) : "r"(both));
#else
  low = __uint_as_float(both << 16);
  high = __uint_as_float(both & 0xffff0000u);
#endif
}
__device__ Eight unpack8(const uint4& raw) {
  Eight e;
  unpack(raw.x, e.x[0], e.x[1]);
  unpack(raw.y, e.x[2], e.x[3]);
  unpack(raw.z, e.x[4], e.x[5]);
  unpack(raw.w, e.x[6], e.x[7]);
  return e;
}
__device__ Eight read8(const value* from) { return unpack8(*(const uint4*)from); }
__device__ void write8(value* to, const Eight& e) {
  *(uint4*)to = make_uint4(pack(e.x[0], e.x[1]), pack(e.x[2], e.x[3]), pack(e.x[4], e.x[5]), pack(e.x[6], e.x[7]));
}
#endif

/** Elements d … d+7 of a head of a token's qkv row, the bias added. */
__device__ Eight element8(const Pass& p, int token, int head, int d) {
  const int at = head * HEAD + d;
  Eight e = read8(p.qkv + (size_t)token * (p.heads + 2 * p.kvHeads) * HEAD + at);
  if (p.bias) {
    const Eight bias = read8(p.bias + at);
    for (int i = 0; i < 8; i++) e.x[i] += bias.x[i];
  }
  return e;
}

/** Elements d … d+7 of a query's or key's head (d < HALF) and their partners, turned by the token's position. */
__device__ void turned(const Pass& p, int token, int head, int d, Eight& low, Eight& high) {
  const Eight a = element8(p, token, head, d), b = element8(p, token, head, d + HALF);
  const size_t at = (size_t)p.positions[token] * HALF + d;
  const Eight cos = read8(p.cos + at), sin = read8(p.sin + at);
  for (int i = 0; i < 8; i++) {
    low.x[i] = a.x[i] * cos.x[i] - b.x[i] * sin.x[i];
    high.x[i] = b.x[i] * cos.x[i] + a.x[i] * sin.x[i];
  }
}

/** Elements d … d+7 and their partners of a token's key and value, as the cache holds them. */
struct Item {
  Eight keyLow, keyHigh, low, high;
  __device__ Item(const Pass& p, int token, int kv, int d) {
    turned(p, token, p.heads + kv, d, keyLow, keyHigh);
    low = element8(p, token, p.heads + p.kvHeads + kv, d);
    high = element8(p, token, p.heads + p.kvHeads + kv, d + HALF);
  }
  __device__ void write(value* key, value* val) const {
    write8(key, keyLow);
    write8(key + HALF, keyHigh);
    write8(val, low);
    write8(val + HALF, high);
  }
};

/** Puts the keys and values of all tokens into the cache; one thread an item, gridDim.y = sequences. */
extern "C" __global__ void store(INPUTS) {
  awaitInputs();
  const Pass p(blockIdx.y, GIVEN);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int d = i % ITEMS * 8, kv = i / ITEMS % kvHeads, token = i / ITEMS / kvHeads;
  if (token >= p.tokens) return;
  const int column = p.control.x + p.control.y + token;
  if (column >= p.capacity) return;
  const long long at = p.rowAt(p.blockOf(column), kv, column) + d;
  Item(p, token, kv, d).write(keys + at, values + at);
}

/** The columns past + j that a token sees, as 128 bits. */
struct Bits {
  u64 low, high;
  __device__ bool has(int j) const { return ((j < 64 ? low : high) >> (j & 63)) & 1; }
};
__device__ Bits bitsOf(const Pass& p, int token) {
  const ulonglong2 raw = __ldcg((const ulonglong2*)p.mask + token);
  return {raw.x, raw.y};
}
/** Columns that any token sees. */
__device__ Bits seenByAny(const Pass& p) {
  Bits all = {0, 0};
  for (int t = threadIdx.x % 32; t < p.tokens; t += 32) {
    const Bits bits = bitsOf(p, t);
    all = {all.low | bits.low, all.high | bits.high};
  }
  const auto join = [](u64 x) {
    return (u64)__reduce_or_sync(~0u, (u32)(x >> 32)) << 32 | __reduce_or_sync(~0u, (u32)x);
  };
  return {join(all.low), join(all.high)};
}
