// Attention of values of 16 bits, on tensor cores; attention-common.cu, which goes before, says what it computes.
//
// The queries of a KV head's group are rows of one matrix (row = token * group + head in the group), so that a tile of
// 16 rows fills the tensor cores even where few tokens run. A block has four warps: RW of them side by side over rows,
// 4 / RW over the columns of a tile; the columns are split further over blocks (gridDim.y), whose unnormalised sums
// `combine` joins. Online softmax as in FlashAttention-2 (Dao, 2023).
//
// gridDim = (kvHeads, splits, tiles of 16 RW rows), 128 threads, 3 stages of shared memory.

constexpr int TILE = 64, STAGES = 3;
/** Of a row in shared memory: an odd number of 16 bytes, so that `ldmatrix` finds its eight rows in different banks. */
constexpr int STRIDE = HEAD + 8;
constexpr int STAGE = 2 * TILE * STRIDE;

__device__ u32 address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }
/** Copies 16 bytes to shared memory in the background, or zeros. */
__device__ void copy16(value* to, const value* from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(real ? 16 : 0));
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ void await() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
__device__ void load(u32 (&r)[4], const value* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(from)) : "memory");
}
__device__ void loadTransposed(u32 (&r)[4], const value* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(from)) : "memory");
}
/** c [16,8] += a [16,16] b [16,8]. */
__device__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if F16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/** 2 to the x. */
__device__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/** A block's share: rows from `row0` of one KV head's queries, columns start … stop-1. */
struct Share {
  int kv, group, rows, row0, split, splits;
  int past, fresh, causal, start, stop;

  /** `stored`: the new columns are in the cache, so columns that no row of the block sees may be left out. */
  __device__ Share(const Pass& p, int height, bool stored) {
    kv = blockIdx.x;
    split = blockIdx.y;
    splits = gridDim.y;
    group = p.heads / p.kvHeads;
    rows = p.tokens * group;
    row0 = (gridDim.z - 1 - blockIdx.z) * height; // a causal prompt's long rows come first
    past = p.control[0];
    fresh = past + p.control[1];
    causal = p.control[2];
    const int length = min(fresh + p.tokens, p.capacity);
    const int span = ((length + splits - 1) / splits + 15) & ~15;
    const int last = (row0 + height - 1) / group;
    start = split * span;
    stop = min(start + span, stored && causal ? min(length, past + last + 1) : length);
  }
};

/** Starts the copy of a tile's cached columns; zeros stand for those that no token sees, which may hold anything. */
__device__ void copyTile(const Pass& p, const Share& s, const Bits& seen, bool stored, int base, value* stage) {
  const size_t head = (size_t)s.kv * p.capacity;
#pragma unroll 4
  for (int i = threadIdx.x; i < TILE * ITEMS * 2; i += 128) {
    const int column = base + i / (ITEMS * 2), d = i % (ITEMS * 2) * 8;
    if (!stored && column >= s.fresh && column < s.stop) continue;
    const bool real = column < s.stop && (column < s.past || s.causal || seen.has(column - s.past));
    const size_t from = (head + (real ? column : 0)) * HEAD + d;
    value* to = stage + (column - base) * STRIDE + d;
    copy16(to, p.keys + from, real);
    copy16(to + TILE * STRIDE, p.values + from, real);
  }
}

/** Computes a tile's new columns; the blocks of the first rows put them into the cache as well. */
__device__ void turnTile(const Pass& p, const Share& s, int base, value* stage) {
  const int from = max(base, s.fresh), count = min(base + TILE, s.stop) - from;
  for (int i = threadIdx.x; i < count * ITEMS; i += 128) {
    const int column = from + i / ITEMS, d = i % ITEMS * 8;
    const Item item(p, column - s.fresh, s.kv, d);
    value* key = stage + (column - base) * STRIDE + d;
    item.write(key, key + TILE * STRIDE);
    const size_t at = ((size_t)s.kv * p.capacity + column) * HEAD + d;
    if (s.row0 == 0) item.write(p.keys + at, p.values + at);
  }
}

/** Turned queries of the block's rows, zeros behind the last: [height,STRIDE]. */
__device__ void turnQueries(const Pass& p, const Share& s, int height, value* queries) {
  for (int i = threadIdx.x; i < height * ITEMS; i += 128) {
    const int local = i / ITEMS, d = i % ITEMS * 8, row = s.row0 + local;
    Eight low = {}, high = {};
    if (row < s.rows) turned(p, row / s.group, s.kv * s.group + row % s.group, d, low, high);
    write8(queries + local * STRIDE + d, low);
    write8(queries + local * STRIDE + d + HALF, high);
  }
}

/** What a thread knows of its rows, lane / 4 and that + 8 of its warp's 16: largest score, sum, output, the tokens. */
struct Rows {
  float top[2] = {NOTHING, NOTHING}, total[2] = {0, 0}, acc[HEAD / 8][4] = {};
  int token[2];
  Bits bits[2];

  __device__ Rows(const Pass& p, const Share& s, int first) {
    for (int i = 0; i < 2; i++) {
      token[i] = min((first + (int)(threadIdx.x % 32) / 4 + 8 * i) / s.group, p.tokens - 1);
      bits[i] = s.causal ? Bits{0, 0} : bitsOf(p, token[i]);
    }
  }
  __device__ bool sees(const Share& s, int i, int column) const {
    if (column < s.past || column >= s.stop) return column < s.stop;
    return s.causal ? column - s.past <= token[i] : bits[i].has(column - s.past);
  }
};

/** Scores of 16 rows against WIDTH columns from `base`, whose keys begin at `keys`. */
template <int WIDTH>
__device__ void score(float (&c)[WIDTH / 8][4], const u32 (&q)[ITEMS][4], const value* keys, const Share& s,
                      const Rows& r, int base) {
  const int lane = threadIdx.x % 32;
  keys += (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < ITEMS; k++) {
#pragma unroll
    for (int j = 0; j < WIDTH / 16; j++) {
      u32 b[4];
      load(b, keys + j * 16 * STRIDE + k * 16);
      mma(c[2 * j], q[k], b[0], b[1]);
      mma(c[2 * j + 1], q[k], b[2], b[3]);
    }
  }
  if (base + WIDTH <= min(s.past, s.stop)) return;
#pragma unroll
  for (int j = 0; j < WIDTH / 8; j++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (!r.sees(s, e / 2, base + j * 8 + lane % 4 * 2 + e % 2)) c[j][e] = NOTHING;
    }
  }
}

/** Turns scores into weights relative to the largest so far, and shrinks what was summed before. */
template <int WIDTH> __device__ void weigh(float (&c)[WIDTH / 8][4], Rows& r) {
  const float scale = rsqrtf(HEAD) * 1.44269504f;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float top = r.top[i];
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++) top = fmaxf(top, fmaxf(c[j][2 * i], c[j][2 * i + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float zero = top == NOTHING ? 0 : top * scale, shrink = power(r.top[i] * scale - zero);
    r.top[i] = top;
    r.total[i] *= shrink;
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++) {
      c[j][2 * i] = power(c[j][2 * i] * scale - zero);
      c[j][2 * i + 1] = power(c[j][2 * i + 1] * scale - zero);
      r.total[i] += c[j][2 * i] + c[j][2 * i + 1];
    }
#pragma unroll
    for (int j = 0; j < HEAD / 8; j++) r.acc[j][2 * i] *= shrink, r.acc[j][2 * i + 1] *= shrink;
  }
}

/** Adds the values of WIDTH columns, by their weights. */
template <int WIDTH> __device__ void gather(Rows& r, const float (&c)[WIDTH / 8][4], const value* values) {
  const int lane = threadIdx.x % 32;
  values += lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
  for (int j = 0; j < WIDTH / 16; j++) {
    const float(&l)[4] = c[2 * j], (&h)[4] = c[2 * j + 1];
    const u32 a[4] = {pack(l[0], l[1]), pack(l[2], l[3]), pack(h[0], h[1]), pack(h[2], h[3])};
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
      u32 b[4];
      loadTransposed(b, values + j * 16 * STRIDE + k * 16);
      mma(r.acc[2 * k], a, b[0], b[1]);
      mma(r.acc[2 * k + 1], a, b[2], b[3]);
    }
  }
}

/** Joins the warps' sums in shared memory [4 * 16,STRIDE], and writes the output, or the split's part of it. */
template <int RW> __device__ void finish(const Pass& p, const Share& s, Rows& r, float* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *tops = shared + 64 * STRIDE, *totals = tops + 64;
  for (int i = 0; i < 2; i++) {
    const int local = warp * 16 + lane / 4 + 8 * i;
    float total = r.total[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (lane % 4 == 0) tops[local] = r.top[i], totals[local] = total;
#pragma unroll
    for (int j = 0; j < HEAD / 8; j++) {
      *(float2*)(shared + local * STRIDE + j * 8 + lane % 4 * 2) = make_float2(r.acc[j][2 * i], r.acc[j][2 * i + 1]);
    }
  }
  __syncthreads();
  const float scale = rsqrtf(HEAD) * 1.44269504f;
  for (int i = threadIdx.x; i < 16 * RW * ITEMS * 2; i += 128) {
    const int local = i / (ITEMS * 2), d = i % (ITEMS * 2) * 8, row = s.row0 + local;
    if (row >= s.rows) return;
    float top = NOTHING, total = 0;
    for (int w = local; w < 64; w += 16 * RW) top = fmaxf(top, tops[w]);
    Eight sum = {};
    for (int w = local; w < 64; w += 16 * RW) {
      const float weight = tops[w] == NOTHING ? 0 : power((tops[w] - top) * scale);
      total += weight * totals[w];
      for (int e = 0; e < 8; e++) sum.x[e] += weight * shared[w * STRIDE + d + e];
    }
    if (s.splits > 1) {
      const size_t at = ((size_t)s.kv * s.rows + row) * s.splits + s.split;
      for (int e = 0; e < 8; e += 4) *(float4*)(p.partials + at * HEAD + d + e) = *(float4*)(sum.x + e);
      if (d == 0) p.sums[at] = make_float2(top * scale, total);
      continue;
    }
    for (int e = 0; e < 8; e++) sum.x[e] = total != 0 ? sum.x[e] / total : 0;
    const int head = s.kv * s.group + row % s.group;
    write8(p.out + ((size_t)(row / s.group) * p.heads + head) * HEAD + d, sum);
  }
}

/** A block's part of attention. The last columns come first: a tree's new ones are computed while others are copied. */
template <int RW, bool STORED> __device__ void attend(const Pass& p) {
  constexpr int HEIGHT = 16 * RW, WIDTH = TILE / 4 * RW;
  extern __shared__ __align__(16) value memory[];
  const Share s(p, HEIGHT, STORED);
  const int tiles = (s.stop - s.start + TILE - 1) / TILE, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Bits seen = !s.causal && s.fresh > s.past ? seenByAny(p) : Bits{0, 0};
  const auto fetch = [&](int i) {
    if (i < tiles) copyTile(p, s, seen, STORED, s.start + (tiles - 1 - i) * TILE, memory + i % STAGES * STAGE);
    commit();
  };
  const auto turn = [&](int i) {
    if (!STORED && i < tiles) turnTile(p, s, s.start + (tiles - 1 - i) * TILE, memory + i % STAGES * STAGE);
  };
  for (int i = 0; i < STAGES - 1; i++) fetch(i);
  Rows r(p, s, s.row0 + warp % RW * 16);
  value* queries = memory + (STAGES - 1) * STAGE;
  turnQueries(p, s, HEIGHT, queries);
  for (int i = 0; i < STAGES - 1; i++) turn(i);
  __syncthreads();
  u32 q[ITEMS][4];
#pragma unroll
  for (int k = 0; k < ITEMS; k++) load(q[k], queries + (warp % RW * 16 + lane % 16) * STRIDE + k * 16 + lane / 16 * 8);
  for (int i = 0; i < tiles; i++) {
    await<STAGES - 2>();
    __syncthreads();
    fetch(i + STAGES - 1);
    turn(i + STAGES - 1);
    const int from = warp / RW * WIDTH;
    const value* keys = memory + i % STAGES * STAGE + from * STRIDE;
    float c[WIDTH / 8][4] = {};
    score<WIDTH>(c, q, keys, s, r, s.start + (tiles - 1 - i) * TILE + from);
    weigh<WIDTH>(c, r);
    gather<WIDTH>(r, c, keys + TILE * STRIDE);
  }
  __syncthreads();
  finish<RW>(p, s, r, (float*)memory);
}

extern "C" __global__ void __launch_bounds__(128, 2) tree1(INPUTS) { attend<1, false>(PASS); }
extern "C" __global__ void __launch_bounds__(128, 2) tree2(INPUTS) { attend<2, false>(PASS); }
extern "C" __global__ void __launch_bounds__(128, 2) tree4(INPUTS) { attend<4, false>(PASS); }
extern "C" __global__ void __launch_bounds__(128, 2) prompt(INPUTS) { attend<4, true>(PASS); }

/** Joins the splits (at most 32) of each row; a warp a row, gridDim.x = rows of all KV heads / 4. */
extern "C" __global__ void __launch_bounds__(128, 4) combine(INPUTS, int splits) {
  const int lane = threadIdx.x % 32, group = heads / kvHeads, rows = tokens * group;
  const int at = blockIdx.x * 4 + threadIdx.x / 32;
  if (at >= rows * kvHeads) return;
  const float2 mine = lane < splits ? sums[(size_t)at * splits + lane] : make_float2(NOTHING, 0);
  float top = mine.x;
  for (int i = 1; i < 32; i *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
  const float weight = mine.y != 0 ? power(mine.x - top) : 0;
  float total = weight * mine.y;
  for (int i = 1; i < 32; i *= 2) total += __shfl_xor_sync(~0u, total, i);
  const float4* from = (const float4*)(partials + (size_t)at * splits * HEAD) + lane % (HEAD / 4);
  float4 sum = make_float4(0, 0, 0, 0);
  for (int base = 0; base < splits; base += 16) {
    float4 parts[16]; // more than is needed, without a branch, so that all are on their way at once
#pragma unroll
    for (int i = 0; i < 16; i++) parts[i] = from[min(base + i, splits - 1) * (HEAD / 4)];
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const float w = __shfl_sync(~0u, weight, base + i);
      sum.x += w * parts[i].x, sum.y += w * parts[i].y, sum.z += w * parts[i].z, sum.w += w * parts[i].w;
    }
  }
  if (lane >= HEAD / 4) return;
  const float share = total != 0 ? 1 / total : 0;
  const int row = at % rows, head = at / rows * group + row % group;
  const uint2 both = make_uint2(pack(sum.x * share, sum.y * share), pack(sum.z * share, sum.w * share));
  *(uint2*)(out + ((size_t)(row / group) * heads + head) * HEAD + lane * 4) = both;
}
