// y [rows,columns] = x [rows,inner] · w [inner,columns] for at most 64 rows of 16-bit values, on Hopper: the time is that
// of reading w once.
//
// A tile is 128 columns; a unit is 64 inner numbers of it, 16 KB of weights, which the copy engine brings into a ring in
// shared memory (TMA, in rows of 128 swizzled bytes). Units of all tiles are dealt equally to the blocks, one a
// multiprocessor (stream-K: Osama et al., 2023). The tensor cores take the weights as their 64 rows and the rows of x as
// their columns, so that few rows cost little. Parts of a tile are summed in the blocks' order by the block that begins
// it, which waits for the others (all run: there is a multiprocessor for each): sums depend neither on the number of rows
// nor on who was faster.
//
// A block starts as soon as the product before has left its multiprocessor, and fills its ring while the kernels between
// run, so that memory is hardly ever idle. It asks no faster than memory can give to all (PACE): else what the kernels
// between wait for comes late.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define COLUMNS 128
#define DEPTH 64
// Bytes of 64 columns of a unit.
#define BOX (DEPTH * 128)
#define CONSUMERS 256
#define THREADS (CONSUMERS + 64)
#define MOST_STAGES 8
// Clock cycles for a unit of every multiprocessor to come.
#define PACE 1300

struct alignas(64) TensorMap { u64 words[16]; };

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void initialise(u64* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void expect(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arriveAt(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(barrier)) : "memory");
}
__device__ __forceinline__ void waitFor(u64* barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared(barrier)), "r"(parity)
                 : "memory");
}

// A box of the map's matrix from (column, row) on, to shared memory; `policy` is how the second cache keeps it.
__device__ __forceinline__ void bring(void* to, const TensorMap& map, int column, int row, u64* barrier, u64 policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared(to)),
               "l"(&map), "r"(column), "r"(row), "r"(shared(barrier)), "l"(policy)
               : "memory");
}

// A matrix in shared memory in rows of 128 swizzled bytes, 8 of them after another every 1,024 bytes.
__device__ __forceinline__ u64 matrix(u32 address) {
  return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)(1024 >> 4) << 16 | address >> 4;
}

#if BF16
#define TYPES "bf16.bf16"
#else
#define TYPES "f16.f16"
#endif

// c += 64 weights' columns (their inner numbers one below the other) · 8 or 32 rows of x, 16 inner numbers.
__device__ __forceinline__ void multiply8(float* c, u64 w, u64 x) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPES " {%0,%1,%2,%3}, %4, %5, p, 1, 1, 1, 0;\n}"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "l"(w), "l"(x));
}
__device__ __forceinline__ void multiply32(float* c, u64 w, u64 x) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPES
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, p, 1, 1, 1, 0;\n}"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
                 "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
               : "l"(w), "l"(x));
}

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

// Sums a tile's parts, `acc` being this block's, in the block that begins it, whose last one it is; false in others. Those
// begin within it, which a block does at most once: so each has one place for a part, and a flag that says it is there.
template <int ROWS>
__device__ bool join(float (&acc)[ROWS / 2], const Deal& deal, int tile, float4* parts, int* flags) {
  const int start = tile * (int)deal.units, low = deal.owner(start), high = deal.owner(start + (int)deal.units - 1);
  constexpr int PIECES = ROWS / 8, PART = PIECES * CONSUMERS;
  if ((int)blockIdx.x != low) {
    float4* own = parts + blockIdx.x * PART + threadIdx.x;
#pragma unroll
    for (int j = 0; j < PIECES; j++)
      __stcg(own + j * CONSUMERS, make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]));
    __threadfence();
    together();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flags + blockIdx.x) : "memory");
    return false;
  }
  if (low == high) return true;
  const int mine = low + 1 + threadIdx.x;
  if (mine <= high) {
    int there = 0;
    while (!there) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flags + mine) : "memory");
    flags[mine] = 0;
  }
  together();
  constexpr int MANY = ROWS > 16 ? 2 : 4; // parts on their way at once; more would cost registers
  for (int block = low + 1; block <= high; block += MANY) {
    const float4* part = parts + block * PART + threadIdx.x;
    float4 p[MANY][PIECES];
#pragma unroll
    for (int n = 0; n < MANY; n++)
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        if (block + n <= high) p[n][j] = __ldcg(part + n * PART + j * CONSUMERS);
#pragma unroll
    for (int n = 0; n < MANY; n++) {
      if (block + n > high) break;
#pragma unroll
      for (int j = 0; j < PIECES; j++)
        acc[4 * j] += p[n][j].x, acc[4 * j + 1] += p[n][j].y, acc[4 * j + 2] += p[n][j].z, acc[4 * j + 3] += p[n][j].w;
    }
  }
  return true;
}

// A thread has of 8 rows of x two, and of a warp's 16 columns one and the eighth after it; turned, two columns of a row.
template <int ROWS>
__device__ void write(u16* y, const float (&acc)[ROWS / 2], int tile, int rows, int columns) {
  const int lane = threadIdx.x % 32, column = tile * COLUMNS + threadIdx.x / 32 * 16 + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < ROWS / 8; j++) {
    const u32 low = transposed(pack(acc[4 * j], acc[4 * j + 1])), high = transposed(pack(acc[4 * j + 2], acc[4 * j + 3]));
    const int row = 8 * j + lane / 4;
    if (row >= rows) continue;
    u16* to = y + (long long)row * columns + column;
    if (column < columns) *(u32*)to = low;
    if (column + 8 < columns) *(u32*)(to + 8) = high;
  }
}

template <int ROWS>
__device__ void skinny(const TensorMap& w, const TensorMap& x, u16* y, float4* parts, int* flags, int rows, int inner,
                       int columns, int stages) {
  constexpr int STAGE = 2 * BOX + ROWS * 128;
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
      bring(ring + stage * STAGE + 2 * BOX, x, deal.depth(begin + i), 0, full + stage, often);
    };
    if (second) {
      awaitInputs();
      letFollow();
      begun = 1;
      for (int i = 0; i < ahead; i++) inputs(i, i);
      return;
    }
    auto weights = [&](int i, int stage) {
      const int column = deal.tile(begin + i) * COLUMNS, row = deal.depth(begin + i);
      expect(full + stage, STAGE);
      bring(ring + stage * STAGE, w, column, row, full + stage, once);
      bring(ring + stage * STAGE + BOX, w, column + 64, row, full + stage, once);
    };
    long long next = clock64();
    for (int i = 0; i < ahead; i++) {
      while (!begun && clock64() < next) continue;
      next += PACE;
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
    float acc[ROWS / 2];
#pragma unroll
    for (int j = 0; j < ROWS / 2; j++) acc[j] = 0;
    for (; i < stop; i++) {
      const u32 at = shared(ring + stage * STAGE);
      waitFor(full + stage, turn);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++) {
        const u64 a = matrix(at + threadIdx.x / 128 * BOX + k * 2048);
#pragma unroll
        for (int j = 0; j < ROWS; j += ROWS < 32 ? 8 : 32) {
          const u64 b = matrix(at + 2 * BOX + j * 128 + k * 32);
          if (ROWS < 32) multiply8(acc + j / 2, a, b);
          else multiply32(acc + j / 2, a, b);
        }
      }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (before) {
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (threadIdx.x % 32 == 0) arriveAt(before);
      }
      before = empty + stage;
      if (++stage == stages) stage = 0, turn ^= 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (threadIdx.x % 32 == 0) arriveAt(before);
    if (join<ROWS>(acc, deal, tile, parts, flags)) write<ROWS>(y, acc, tile, rows, columns);
  }
}

// Blocks of up to 32 rows leave registers for attention's (attention.cu) beside them.
#define KERNEL(ROWS)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, ROWS > 32 ? 1 : 3)                                             \
  skinny##ROWS(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, u16* y, float4* parts,        \
               int* flags, int rows, int inner, int columns, int stages) {                                             \
    skinny<ROWS>(w, x, y, parts, flags, rows, inner, columns, stages);                                                 \
  }
KERNEL(8)
KERNEL(16)
KERNEL(32)
KERNEL(64)
