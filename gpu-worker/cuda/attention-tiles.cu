// Attention of values of 16 bits: what a block copies and turns into shared memory. attention-common.cu goes before.

/** Columns of a tile: those of a block of the cache. */
constexpr int TILE = BLOCK_ROWS;
/** Of a row in shared memory: an odd number of 16 bytes, so that `ldmatrix` finds its eight rows in different banks. */
constexpr int STRIDE = HEAD + 8;
/** Keys and values of a tile. */
constexpr int STAGE = 2 * TILE * STRIDE;

__device__ u32 address(const void* shared) { return (u32)__cvta_generic_to_shared(shared); }
/**
 * Copies 16 bytes to shared memory in the background, or zeros. Other blocks may want them at about the same time, the next
 * pass after all the weights: so the second cache shall rather keep all else.
 */
__device__ void copy16(value* to, const value* from, bool real) {
  u64 once;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(address(to)), "l"(from),
               "r"(real ? 16 : 0), "l"(once));
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

/** Where a block of threads works: which sequence (-1: nowhere), and the first of its rows of one KV head's queries. */
struct Place {
  int sequence, row0;

  __device__ Place(int tokens, int group, int height) {
    const u32 tiles = (tokens * group + height - 1) / height;
    sequence = blockIdx.z / tiles;
    row0 = (tiles - 1 - blockIdx.z % tiles) * height; // a causal prompt's long rows come first
  }

  /** Of sequences of unequal numbers of tokens, 32 at most: their tiles follow each other. */
  __device__ Place(const int* control, int sequences, int group, int height) {
    const int lane = threadIdx.x % 32;
    const int tiles = lane < sequences ? (__ldcg((const int2*)control + 4 * lane + 2).y * group + height - 1) / height : 0;
    int end = tiles;
#pragma unroll
    for (int far = 1; far < 32; far *= 2) {
      const int before = __shfl_up_sync(~0u, end, far);
      if (lane >= far) end += before;
    }
    sequence = __ffs(__ballot_sync(~0u, end > (int)blockIdx.z)) - 1;
    row0 = ((int)blockIdx.z - __shfl_sync(~0u, end - tiles, max(sequence, 0))) * height;
  }
};

/** A block's share: rows from `row0` of one KV head's queries, columns start … stop-1. */
struct Share {
  int kv, group, rows, row0, split, splits;
  int past, fresh, causal, start, stop, tiles;

  /** `stored`: the new columns are in the cache, so columns that no row of the block sees may be left out. */
  __device__ Share(const Pass& p, int row0, int height, bool stored) : row0(row0) {
    kv = blockIdx.x;
    split = blockIdx.y;
    splits = gridDim.y;
    group = p.heads / p.kvHeads;
    rows = p.tokens * group;
    past = p.control.x;
    fresh = past + p.control.y;
    causal = p.control.z;
    const int length = min(fresh + p.tokens, p.capacity), units = (length + TILE - 1) / TILE;
    const int last = (row0 + height - 1) / group;
    start = units * split / splits * TILE;
    stop = min(units * (split + 1) / splits * TILE, stored && causal ? min(length, past + last + 1) : length);
    tiles = (stop - start + TILE - 1) / TILE;
  }
  /** The first column of the tile that is computed as the i-th: the last come first. */
  __device__ int base(int i) const { return start + (tiles - 1 - i) * TILE; }
};

/** The block of the cache in which the tile from `base` lies, which need not be in the table. */
__device__ int blockAt(const Pass& p, int base) { return p.blockOf(min(max(base, 0), p.capacity - 1)); }

/**
 * Starts the copy of a tile's cached columns, which lie in `block`; zeros stand for those that no token sees, which may hold
 * anything.
 */
template <int THREADS>
__device__ void copyTile(const Pass& p, const Share& s, const Bits& seen, int block, bool stored, int base, value* stage) {
  constexpr int PIECES = ITEMS * 2, STEP = THREADS / PIECES; // of 16 bytes in a row; rows that all threads copy at once
  if (THREADS % PIECES == 0 && TILE % STEP == 0 && base + TILE <= (stored ? s.stop : min(s.past, s.stop))) {
    const int column = threadIdx.x / PIECES, d = threadIdx.x % PIECES * 8;
    const long long from = p.rowAt(block, s.kv, column) + d;
    value* to = stage + column * STRIDE + d;
#pragma unroll
    for (int i = 0; i < TILE; i += STEP) copy16(to + i * STRIDE, p.keys + from + i * HEAD, true);
#pragma unroll
    for (int i = 0; i < TILE; i += STEP) copy16(to + (TILE + i) * STRIDE, p.values + from + i * HEAD, true);
    return;
  }
#pragma unroll 2
  for (int i = threadIdx.x; i < TILE * PIECES; i += THREADS) {
    const int column = base + i / PIECES, d = i % PIECES * 8;
    if (!stored && column >= s.fresh && column < s.stop) continue;
    const bool real = column < s.stop && (column < s.past || s.causal || seen.has(column - s.past));
    const long long from = real ? p.rowAt(block, s.kv, column) + d : 0;
    value* to = stage + (column - base) * STRIDE + d;
    copy16(to, p.keys + from, real);
    copy16(to + TILE * STRIDE, p.values + from, real);
  }
}

/** Elements d … d+7 of a token's head and their partners half a head on, on their way from memory to shared memory. */
struct Piece {
  uint4 low, high, biasLow, biasHigh;
  size_t angle;
  int d;

  __device__ void load(const Pass& p, int token, int head, int at) {
    d = at;
    const int from = head * HEAD + d;
    const value* row = p.qkv + (size_t)token * (p.heads + 2 * p.kvHeads) * HEAD + from;
    low = *(const uint4*)row;
    high = *(const uint4*)(row + HALF);
    biasLow = p.bias ? *(const uint4*)(p.bias + from) : make_uint4(0, 0, 0, 0);
    biasHigh = p.bias ? *(const uint4*)(p.bias + from + HALF) : make_uint4(0, 0, 0, 0);
    angle = (size_t)p.positions[token] * HALF + d;
  }
  /** The bias added and, if `turns`, turned by the token's position. */
  __device__ void turn(const Pass& p, bool turns, Eight& first, Eight& second) const {
    const Eight cos = read8(p.cos + angle), sin = read8(p.sin + angle);
    const Eight a = unpack8(low), b = unpack8(high), biasA = unpack8(biasLow), biasB = unpack8(biasHigh);
    for (int i = 0; i < 8; i++) {
      const float x = a.x[i] + biasA.x[i], y = b.x[i] + biasB.x[i];
      first.x[i] = turns ? x * cos.x[i] - y * sin.x[i] : x;
      second.x[i] = turns ? y * cos.x[i] + x * sin.x[i] : y;
    }
  }
};

/** Turned queries of the block's rows, zeros behind the last: [HEIGHT,STRIDE]. Two steps, with other loads between. */
template <int HEIGHT, int THREADS> struct Queries {
  static constexpr int N = (HEIGHT * ITEMS + THREADS - 1) / THREADS;
  Piece pieces[N];

  __device__ Queries(const Pass& p, int row0) {
    const int group = p.heads / p.kvHeads;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const int i = min(threadIdx.x + n * THREADS, HEIGHT * ITEMS - 1);
      const int row = min(row0 + i / ITEMS, p.tokens * group - 1);
      pieces[n].load(p, row / group, blockIdx.x * group + row % group, i % ITEMS * 8);
    }
  }
  __device__ void write(const Pass& p, const Share& s, value* queries) const {
#pragma unroll
    for (int n = 0; n < N; n++) {
      const int i = threadIdx.x + n * THREADS;
      Eight low = {}, high = {};
      if (s.row0 + i / ITEMS < s.rows) pieces[n].turn(p, true, low, high);
      value* to = queries + i / ITEMS * STRIDE + pieces[n].d;
      if (i >= HEIGHT * ITEMS) continue;
      write8(to, low);
      write8(to + HALF, high);
    }
  }
};

/**
 * Computes the new columns, which lie in the tiles that are computed first: all keys, then all values. The
 * blocks of the first rows put them into the cache as well.
 */
template <int THREADS> struct Columns {
  static constexpr int N = 2;
  Piece pieces[N];
  /** Where in the cache the pieces go. */
  int blocks[N], from, count;

  __device__ Columns(const Pass& p, const Share& s) {
    from = max(s.start, s.fresh);
    count = max(0, s.stop - from);
    if (count) load(p, s, threadIdx.x);
  }
  __device__ void load(const Pass& p, const Share& s, int first) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      const int i = min(first + n * THREADS, 2 * count * ITEMS - 1), at = i / ITEMS;
      const int token = from - s.fresh + at % count, head = p.heads + (at < count ? 0 : p.kvHeads) + s.kv;
      pieces[n].load(p, token, head, i % ITEMS * 8);
      blocks[n] = p.blockOf(from + at % count);
    }
  }
  __device__ void write(const Pass& p, const Share& s, value* memory) {
    for (int first = threadIdx.x; first < 2 * count * ITEMS; first += N * THREADS) {
      if (first >= N * THREADS) load(p, s, first);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int i = first + n * THREADS, at = i / ITEMS, d = pieces[n].d;
        if (i >= 2 * count * ITEMS) break;
        const bool key = at < count;
        const int column = from + (key ? at : at - count), tile = s.tiles - 1 - (column - s.start) / TILE;
        Eight low, high;
        pieces[n].turn(p, key, low, high);
        value* to = memory + tile * STAGE + ((key ? 0 : TILE) + (column - s.start) % TILE) * STRIDE + d;
        write8(to, low);
        write8(to + HALF, high);
        if (s.row0 != 0) continue;
        to = (key ? p.keys : p.values) + p.rowAt(blocks[n], s.kv, column) + d;
        write8(to, low);
        write8(to + HALF, high);
      }
    }
  }
};
