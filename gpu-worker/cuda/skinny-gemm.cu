// y [rows,columns] = x [rows,inner] · w [inner,columns] for at most 64 rows of 16-bit values, on Hopper: the time is that
// of reading w once. skinny-weights.cu goes before.
//
// A tile is 128 columns; a unit is 64 inner numbers of it, 16 KB of weights (8 as bytes), which the copy engine brings into
// a ring in shared memory (TMA, in rows of 128 swizzled bytes). Units of all tiles are dealt to the blocks, no more than one a
// multiprocessor (stream-K: Osama et al., 2023). The tensor cores take the weights as their 64 rows and the rows of x as
// their columns, so that few rows cost little. Parts of a tile come through the ring to the block that begins it, which sums
// them in the blocks' order and waits for the others (all run: there is a multiprocessor for each): sums depend neither on the
// number of rows nor on who was faster. A part's place holds NOTHING until it is there, so that no fence and no flag is
// waited for.
//
// A block starts as soon as the product before has left its multiprocessor, and fills its ring while the kernels between
// run, then the second cache with what comes next, so that memory is hardly ever idle. It asks no faster than memory can give
// to all (PACE): else what the kernels between wait for comes late.

// Units by which the block that sums a tile has more than the others, so that their parts are there when it is through.
#define BONUS 2
// Units that a block asks the second cache for, at most: of all blocks 35 MB, which is most of what an H100's holds.
#define AHEAD 16

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

// How units are dealt: block b has those from `first(b)` on, equally many; or, where every tile has the same number of blocks
// (`each`, else 0), the one that sums has `own`. Nothing here exceeds 32 bits.
struct Deal {
  u32 units, tiles, total, each, own;
  __device__ Deal(int inner, int columns)
      : units((inner + DEPTH - 1) / DEPTH), tiles((columns + COLUMNS - 1) / COLUMNS), total(units * tiles),
        each(gridDim.x % tiles == 0 ? gridDim.x / tiles : 0), own(units) {
    if (each > 1) own = min(units - (each - 1), (units + each - 1) / each + BONUS);
  }
  __device__ int first(u32 block) const {
    if (each == 0) return total * block / gridDim.x;
    const u32 rank = block % each;
    return block / each * units + (rank == 0 ? 0 : own + (units - own) * (rank - 1) / (each - 1));
  }
  __device__ int owner(u32 unit) const { return ((unit + 1) * gridDim.x - 1) / total; }
  __device__ int low(u32 tile) const { return each ? tile * each : owner(tile * units); }
  __device__ int high(u32 tile) const { return each ? (tile + 1) * each - 1 : owner((tile + 1) * units - 1); }
  __device__ int tile(u32 unit) const { return unit / units; }
  __device__ int depth(u32 unit) const { return unit % units * DEPTH; }
};

// No float that is computed: as bits, what memory is filled with.
#define NOTHING 0xffffffffu
__device__ __forceinline__ float4 take(const float4* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
  return x;
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

// A tile's parts, each of pieces of 8 rows, [ROWS / 8,CONSUMERS], which the block that begins the tile sums. It has the tile as
// its last, all others as their first: so a block leaves one part. PER pieces find place in a stage of the ring.
template <int ROWS, int STAGE> struct Parts {
  static constexpr int PIECES = ROWS / 8, PART = PIECES * CONSUMERS, PIECE_BYTES = CONSUMERS * 16;
  static constexpr int FIT = STAGE / PIECE_BYTES, PER = FIT < PIECES ? FIT : PIECES, TIMES = (PIECES + PER - 1) / PER;

  int low, high;
  float4* all;

  __device__ Parts(const Deal& deal, int tile, float4* all) : low(deal.low(tile)), high(deal.high(tile)), all(all) {}
  __device__ bool sums() const { return (int)blockIdx.x == low; }
  __device__ float4* piece(int block, int j) const { return all + block * PART + j * CONSUMERS; }
};

__device__ __forceinline__ void bringBytes(void* to, const void* from, int bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared(to)),
               "l"(from), "r"(bytes), "r"(shared(barrier)) : "memory");
}

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

// As elementwise.cu has it, bit for bit, of numbers rounded as if they had been written.
__device__ __forceinline__ float gated(u16 gate, u16 up) {
  const float x = number(gate);
  return x / (1.0f + __expf(-x)) * number(up);
}
// Where w's columns are the gate's and up's by turns, eight of each, a thread has both: what comes of them is y
// [rows,columns / 2].
__device__ void writeGated(u16* y, float4 sum, int piece, int tile, int rows, int columns) {
  const int lane = threadIdx.x % 32, column = (tile * COLUMNS + threadIdx.x / 32 * 16) / 2 + lane % 4 * 2;
  const u32 gates = pack(sum.x, sum.y), ups = pack(sum.z, sum.w);
  const u32 made = transposed(pack(gated(gates, ups), gated(gates >> 16, ups >> 16)));
  const int row = 8 * piece + lane / 4;
  if (row < rows && column < columns / 2) *(u32*)(y + (long long)row * (columns / 2) + column) = made;
}

template <int ROWS, bool GATED = false, class Weights>
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
    const int lane = threadIdx.x % 32;
    const bool first = threadIdx.x < CONSUMERS + 32;
    if (!first && lane > 0) return;
    u64 once, often;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
    const int ahead = min(stages, count);
    auto inputs = [&](int i, int stage) {
      bring(ring + stage * STAGE + Weights::BYTES, x, deal.depth(begin + i), 0, full + stage, often);
    };
    if (!first) {
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
    if (lane == 0) {
      long long next = clock64();
      for (int i = 0; i < ahead; i++) {
        while (!begun && clock64() < next) continue;
        next += Weights::PACE;
        weights(i, i);
      }
      for (int i = ahead; i < min(count, ahead + AHEAD); i++) {
        while (!begun && clock64() < next) continue;
        if (begun) break;
        next += Weights::PACE;
        w.prefetch(deal.tile(begin + i), deal.depth(begin + i), begin + i);
      }
      awaitInputs();
      letFollow();
      for (int i = ahead, stage = 0, turn = 0; i < count; i++) {
        waitFor(empty + stage, turn);
        weights(i, stage);
        inputs(i, stage);
        if (++stage == stages) stage = 0, turn ^= 1;
      }
    }
    __syncwarp();
    // The parts of the last tile, if they are summed here, follow its units through the ring, each brought by a lane.
    const Parts<ROWS, STAGE> of(deal, deal.tile(begin + count - 1), parts);
    const int copies = of.sums() ? (of.high - of.low) * of.TIMES : 0;
    for (int from = 0; from < copies; from += stages) {
      const int i = from + lane, place = count + i, stage = place % stages;
      if (lane < stages && i < copies) {
        const int j = i % of.TIMES * of.PER, n = min(of.PER, of.PIECES - j);
        float4* const piece = of.piece(of.low + 1 + i / of.TIMES, j);
        seen(&(piece + (n - 1) * CONSUMERS)->x);
        if (place >= stages) waitFor(empty + stage, place / stages % 2 ^ 1);
        expect(full + stage, n * of.PIECE_BYTES);
        bringBytes(ring + stage * STAGE, piece, n * of.PIECE_BYTES, full + stage);
      }
      __syncwarp();
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
    const Parts<ROWS, STAGE> of(deal, tile, parts);
    if (!of.sums()) {
#pragma unroll
      for (int j = 0; j < ROWS / 8; j++) put(of.piece(blockIdx.x, j) + threadIdx.x, acc[j]);
      continue;
    }
    for (int block = of.low + 1; block <= of.high; block++)
#pragma unroll
      for (int from = 0; from < of.PIECES; from += of.PER) {
        waitFor(full + stage, turn);
        const float4* here = (const float4*)(ring + stage * STAGE) + threadIdx.x;
#pragma unroll
        for (int j = from; j < from + of.PER && j < of.PIECES; j++)
          acc[j] += await(of.piece(block, j) + threadIdx.x, here[(j - from) * CONSUMERS]);
        __syncwarp(); // one lane says for all that the stage may be filled again
        if (threadIdx.x % 32 == 0) arriveAt(empty + stage);
        if (++stage == stages) stage = 0, turn ^= 1;
      }
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++)
      if (GATED) writeGated(y, acc[j], j, tile, rows, columns);
      else write(y, w, acc[j], j, tile, rows, columns);
  }
}

// Blocks of up to 32 rows (16 with bytes) leave registers for those of the kernels between two products.
#define REST                                                                                                           \
  const __grid_constant__ TensorMap x, u16 *y, float4 *parts, int rows, int inner, int columns, int stages
#define KERNELS(ROWS)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, ROWS > 32 ? 1 : 3)                                             \
  skinny##ROWS(const __grid_constant__ TensorMap w, REST) {                                                            \
    skinny<ROWS>(Words{w}, x, y, parts, rows, inner, columns, stages);                                                 \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, ROWS > 32 ? 1 : 3)                                             \
  gated##ROWS(const __grid_constant__ TensorMap w, REST) {                                                             \
    skinny<ROWS, true>(Words{w}, x, y, parts, rows, inner, columns, stages);                                           \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(THREADS, ROWS > 16 ? 1 : 3)                                             \
  bytes##ROWS(const char* data, const float* scales, REST) {                                                           \
    skinny<ROWS>(Bytes{data, scales}, x, y, parts, rows, inner, columns, stages);                                      \
  }
KERNELS(8)
KERNELS(16)
KERNELS(32)
KERNELS(64)
