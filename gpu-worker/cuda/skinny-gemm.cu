// y [rows,columns] = x [rows,inner] · w [inner,columns] for at most 64 rows of 16-bit values, on Hopper: the time is that
// of reading w once. skinny-weights.cu goes before.
//
// A tile is 128 columns; a unit is 64 inner numbers of it, 16 KB of weights (8 as bytes), which the copy engine brings into
// a ring in shared memory (TMA, in rows of 128 swizzled bytes). Units of all tiles are dealt equally to the blocks, no more
// than one a multiprocessor (stream-K: Osama et al., 2023). The tensor cores take the weights as their 64 rows and the rows
// of x as their columns, so that few rows cost little. Parts of a tile are summed in the blocks' order by the block that
// begins it, or by its first ones, which wait for the others (all run: there is a multiprocessor for each): sums depend
// neither on the number of rows nor on who was faster. A part's place holds NOTHING until it is there, so that no fence and
// no flag is waited for.
//
// A block starts as soon as the product before has left its multiprocessor, and fills its ring while the kernels between
// run, so that memory is hardly ever idle. It asks no faster than memory can give to all (PACE): else what the kernels
// between wait for comes late.

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 x;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#endif
  return x;
}
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ void together() { asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory"); }

// How units are dealt: block b has those from `first(b)` on. Nothing here exceeds 32 bits.
struct Deal {
  u32 units, total;
  __device__ Deal(int inner, int columns)
      : units((inner + DEPTH - 1) / DEPTH), total(units * ((columns + COLUMNS - 1) / COLUMNS)) {}
  __device__ int first(u32 block) const { return total * block / gridDim.x; }
  __device__ int owner(u32 unit) const { return ((unit + 1) * gridDim.x - 1) / total; }
  __device__ int tile(u32 unit) const { return unit / units; }
  __device__ int depth(u32 unit) const { return unit % units * DEPTH; }
};

// No float that is computed: as bits, what memory is filled with.
#define NOTHING 0xffffffffu
// Rows of other blocks' parts that are much for one block to read (measured on an H100).
#define MUCH 192

__device__ __forceinline__ float4 take(const float4* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void copy16(float4* to, const float4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void put(float4* to, float4 x, bool real = true) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float& f = (&x.x)[i];
    if (real && __float_as_uint(f) == NOTHING) f = __uint_as_float(0x7fffffff); // a NaN is a NaN
  }
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ bool there(const float4& x) {
  return __float_as_uint(x.x) != NOTHING && __float_as_uint(x.y) != NOTHING && __float_as_uint(x.z) != NOTHING &&
         __float_as_uint(x.w) != NOTHING;
}
// Waits until a number is there.
__device__ __forceinline__ void seen(const float* at) {
  u32 x = NOTHING;
  while (x == NOTHING) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
}
// Of a part's place, `x` being what was seen there: waits for it, and empties the place for the next launch.
__device__ __forceinline__ float4 await(float4* at, float4 x) {
  while (!there(x)) x = take(at);
  const float none = __uint_as_float(NOTHING);
  put(at, make_float4(none, none, none, none), false);
  return x;
}
__device__ __forceinline__ void operator+=(float4& sum, const float4& x) {
  sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}

// A tile's parts, each of pieces of 8 rows, [ROWS / 8,CONSUMERS]: summed by the block that begins it, or, if they are much to
// read, by its first SHARE blocks, which divide the pieces. Whoever sums has the tile as its last. For all but the one that
// begins it, it is their first: so a block has one place for what it leaves of a tile that it begins, and one of another.
template <int ROWS> struct Parts {
  static constexpr int PIECES = ROWS / 8, PART = PIECES * CONSUMERS, SHARE = PIECES < 4 ? PIECES : 4;
  int low, high, self;
  bool shared;
  float4* all;

  __device__ Parts(const Deal& deal, int tile, float4* all)
      : low(deal.owner(tile * deal.units)), high(deal.owner((tile + 1) * deal.units - 1)), self(blockIdx.x),
        shared(PIECES > 1 && (high - low) * ROWS >= MUCH && high - low >= SHARE), all(all + threadIdx.x) {}

  __device__ bool sums() const { return self - low < (shared ? SHARE : 1); }
  __device__ bool sums(int piece) const { return self - low == (shared ? piece % SHARE : 0); }
  __device__ float4* place(int block, int piece) const {
    return all + (block + (block == low ? gridDim.x : 0)) * PART + piece * CONSUMERS;
  }
  __device__ void leave(const float4 (&acc)[PIECES]) const {
#pragma unroll
    for (int j = 0; j < PIECES; j++)
      if (!sums(j)) put(place(self, j), acc[j]);
  }
  // Of the pieces that this block sums, acc becomes the sum. `memory` of `bytes` is what the products were made of.
  template <bool SHARED> __device__ void add(float4 (&acc)[PIECES], char* memory, int bytes) const {
    constexpr int STEP = SHARED ? SHARE : 1, EACH = PIECES / STEP;
    const int lane = threadIdx.x % 32, turn = SHARED ? self - low : 0, fit = bytes / (EACH * CONSUMERS * 16);
    float4* const here = (float4*)memory + threadIdx.x; // [fit,EACH,CONSUMERS]
    for (int from = SHARED ? low : low + 1; from <= high; from += fit) {
      const int count = min(fit, high + 1 - from);
      const auto another = [&](int n) { return !SHARED || from + n != self; };
      // All threads' looking for all of it would take the second cache's whole bandwidth: they look at one number a part,
      // of what is written last.
      for (int n = lane; n < count; n += 32)
        if (another(n)) seen(&(place(from + n, PIECES - STEP + turn) - lane)->x);
      together(); // the memory is free when all warps are through with their products
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        if (SHARED && from == low && j % STEP == turn) here[(turn * EACH + j / STEP) * CONSUMERS] = acc[j];
#pragma unroll 1
      for (int n = 0; n < count; n++)
#pragma unroll
        for (int i = 0; i < EACH; i++)
          if (another(n)) copy16(here + (n * EACH + i) * CONSUMERS, place(from + n, i * STEP + turn));
      asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 1
      for (int n = 0; n < count; n++)
#pragma unroll
        for (int j = 0; j < PIECES; j++) {
          if (j % STEP != turn) continue;
          float4 part = here[(n * EACH + j / STEP) * CONSUMERS];
          if (another(n)) part = await(place(from + n, j), part);
          if (SHARED && from + n == low) acc[j] = part;
          else acc[j] += part;
        }
    }
  }
};

// A thread has of 8 rows of x two, and of a warp's 16 columns one and the eighth after it; turned, two columns of a row.
template <class Weights>
__device__ void write(u16* y, const Weights& w, float4 sum, int piece, int tile, int rows, int columns) {
  const int lane = threadIdx.x % 32, warp = tile * COLUMNS + threadIdx.x / 32 * 16, column = warp + lane % 4 * 2;
  w.scale(sum, warp + lane / 4);
  const u32 low = transposed(pack(sum.x, sum.y)), high = transposed(pack(sum.z, sum.w));
  const int row = 8 * piece + lane / 4;
  if (row >= rows) return;
  u16* to = y + (long long)row * columns + column;
  if (column < columns) *(u32*)to = low;
  if (column + 8 < columns) *(u32*)(to + 8) = high;
}

template <int ROWS, class Weights>
__device__ void skinny(const Weights& w, const TensorMap& x, u16* y, float4* parts, int rows, int inner, int columns,
                       int stages) {
  constexpr int STAGE = Weights::BYTES + ROWS * 128;
  extern __shared__ char memory[];
  __shared__ u64 full[MOST_STAGES], empty[MOST_STAGES];
  __shared__ volatile int begun;
  char* ring = memory + (1024 - shared(memory) % 1024) % 1024;
  const Deal deal(inner, columns);
  const int begin = deal.first(blockIdx.x), count = deal.first(blockIdx.x + 1) - begin;
  if (threadIdx.x == 0) {
    begun = 0;
    for (int i = 0; i < stages; i++) initialise(full + i, 1), initialise(empty + i, CONSUMERS / 32);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    const bool first = threadIdx.x == CONSUMERS, second = threadIdx.x == CONSUMERS + 32;
    if (!first && !second) return;
    u64 once, often;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
    const int ahead = min(stages, count);
    auto inputs = [&](int i, int stage) {
      bring(ring + stage * STAGE + Weights::BYTES, x, deal.depth(begin + i), 0, full + stage, often);
    };
    if (second) {
      awaitInputs();
      letFollow();
      begun = 1;
      for (int i = 0; i < ahead; i++) inputs(i, i);
      return;
    }
    auto weights = [&](int i, int stage) {
      const int unit = begin + i;
      expect(full + stage, STAGE);
      w.come(ring + stage * STAGE, deal.tile(unit), deal.depth(unit), unit, full + stage, once);
    };
    long long next = clock64();
    for (int i = 0; i < ahead; i++) {
      while (!begun && clock64() < next) continue;
      next += Weights::PACE;
      weights(i, i);
    }
    awaitInputs();
    letFollow();
    for (int i = ahead, stage = 0, turn = 0; i < count; i++) {
      waitFor(empty + stage, turn);
      weights(i, stage);
      inputs(i, stage);
      if (++stage == stages) stage = 0, turn ^= 1;
    }
    return;
  }
  awaitInputs();
  letFollow(); // not before: what comes next may read, without waiting, what is older than x (attention.cu)
  for (int i = 0, stage = 0, turn = 0; i < count;) {
    const int tile = deal.tile(begin + i), stop = min(count, (tile + 1) * (int)deal.units - begin);
    u64* before = nullptr; // of the unit that is multiplied while the next is waited for
    float4 acc[ROWS / 8] = {};
    for (; i < stop; i++) {
      waitFor(full + stage, turn);
      w.template add<ROWS>(&acc[0].x, ring + stage * STAGE);
      if (before || Weights::PENDING == 0) {
        awaitProducts<Weights::PENDING>();
        if (threadIdx.x % 32 == 0) arriveAt(Weights::PENDING ? before : empty + stage);
      }
      before = empty + stage;
      if (++stage == stages) stage = 0, turn ^= 1;
    }
    awaitProducts<0>();
    if (Weights::PENDING && threadIdx.x % 32 == 0) arriveAt(before);
    const Parts<ROWS> of(deal, tile, parts);
    of.leave(acc);
    if (!of.sums()) continue;
    if (of.shared) of.template add<true>(acc, ring, stages * STAGE);
    else of.template add<false>(acc, ring, stages * STAGE);
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++)
      if (of.sums(j)) write(y, w, acc[j], j, tile, rows, columns);
  }
}

// Blocks of up to 32 rows (16 with bytes) leave registers for attention's (attention.cu) beside them.
#define REST                                                                                                           \
  const __grid_constant__ TensorMap x, u16 *y, float4 *parts, int rows, int inner, int columns, int stages
#define KERNELS(ROWS)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, ROWS > 32 ? 1 : 3)                                             \
  skinny##ROWS(const __grid_constant__ TensorMap w, REST) {                                                            \
    skinny<ROWS>(Words{w}, x, y, parts, rows, inner, columns, stages);                                          \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, ROWS > 16 ? 1 : 3)                                             \
  bytes##ROWS(const char* data, const float* scales, REST) {                                                           \
    skinny<ROWS>(Bytes{data, scales}, x, y, parts, rows, inner, columns, stages);                               \
  }
KERNELS(8)
KERNELS(16)
KERNELS(32)
KERNELS(64)
