// Products of few rows on Hopper (skinny-gemm.cu, which follows): how a unit of weights comes and is multiplied, as values of
// 16 bits or as bytes with a scale for each column.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define COLUMNS 128
#define DEPTH 64
// Bytes of 64 columns of a unit, or of all 128 where a weight is a byte.
#define BOX (DEPTH * 128)
#define CONSUMERS 256
#define THREADS (CONSUMERS + 64)
#define MOST_STAGES 16

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
#define ACC4(c) "+f"((c)[0]), "+f"((c)[1]), "+f"((c)[2]), "+f"((c)[3])
#define ACC16(c) ACC4(c), ACC4(c + 4), ACC4(c + 8), ACC4(c + 12)
#define MULTIPLY8 "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32." TYPES " {%0,%1,%2,%3}, "
#define MULTIPLY32                                                                                                     \
  "{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32." TYPES                          \
  " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "

// c += 64 weights' columns (their inner numbers one below the other) · 8 or 32 rows of x, 16 inner numbers.
__device__ __forceinline__ void multiply8(float* c, u64 w, u64 x) {
  asm volatile(MULTIPLY8 "%4, %5, p, 1, 1, 1, 0;\n}" : ACC4(c) : "l"(w), "l"(x));
}
__device__ __forceinline__ void multiply32(float* c, u64 w, u64 x) {
  asm volatile(MULTIPLY32 "%16, %17, p, 1, 1, 1, 0;\n}" : ACC16(c) : "l"(w), "l"(x));
}
// The same with the warp's 16 columns of the 64 in its threads' registers.
__device__ __forceinline__ void multiply8(float* c, const u32* w, u64 x) {
  asm volatile(MULTIPLY8 "{%4,%5,%6,%7}, %8, p, 1, 1, 0;\n}"
               : ACC4(c) : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x));
}
__device__ __forceinline__ void multiply32(float* c, const u32* w, u64 x) {
  asm volatile(MULTIPLY32 "{%16,%17,%18,%19}, %20, p, 1, 1, 0;\n}"
               : ACC16(c) : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "l"(x));
}
// acc += w · x, `x` being where ROWS rows of 16 inner numbers begin.
template <int ROWS, class Weights> __device__ __forceinline__ void multiply(float* acc, Weights w, u32 x) {
#pragma unroll
  for (int j = 0; j < ROWS; j += ROWS < 32 ? 8 : 32) {
    if (ROWS < 32) multiply8(acc + j / 2, w, matrix(x + j * 128));
    else multiply32(acc + j / 2, w, matrix(x + j * 128));
  }
}
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void awaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// [inner,columns] of 16 bits.
struct Words {
  // Bytes of a unit; clock cycles for a unit of every multiprocessor to come; products that may be under way.
  static constexpr int BYTES = 2 * BOX, PACE = 1300, PENDING = 1;
  const TensorMap& map;

  __device__ void come(char* to, int tile, int depth, int, u64* barrier, u64 policy) const {
    bring(to, map, tile * COLUMNS, depth, barrier, policy);
    bring(to + BOX, map, tile * COLUMNS + 64, depth, barrier, policy);
  }
  // To the second cache only.
  __device__ void prefetch(int tile, int depth, int) const {
#pragma unroll
    for (int i = 0; i < 2; i++)
      asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map),
                   "r"(tile * COLUMNS + 64 * i), "r"(depth) : "memory");
  }
  template <int ROWS> __device__ void add(float* acc, const char* unit) const {
    const u32 w = shared(unit) + threadIdx.x / 128 * BOX, x = shared(unit) + BYTES;
    fence();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) multiply<ROWS>(acc, matrix(w + k * 2048), x + k * 32);
    commit();
  }
  __device__ void scale(float4&, int) const {}
};

// Units one behind the other, of a tile first: of each half of 32 inner numbers, 16 bytes a thread, as `place` says. A byte
// is 128 more than the weight over its column's scale.
struct Bytes {
  static constexpr int BYTES = BOX, PACE = 650, PENDING = 0;
  const char* data;
  const float* scales;

  __device__ void come(char* to, int, int, int unit, u64* barrier, u64 policy) const {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared(to)), "l"(data + (size_t)unit * BOX), "n"(BOX), "r"(shared(barrier)), "l"(policy) : "memory");
  }
  __device__ void prefetch(int, int, int unit) const {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(data + (size_t)unit * BOX), "n"(BOX) : "memory");
  }
  // Column and inner number, within the unit, of byte `at` of a thread's in a half: in the order of the tensor cores' operand.
  static __device__ int2 place(int thread, int half, int at) {
    const int lane = thread % 32, piece = at / 2; // two inner numbers
    return make_int2(thread / 32 * 16 + lane / 4 + piece % 2 * 8,
                     half * 32 + at / 8 * 16 + lane % 4 * 2 + at % 2 + piece / 2 % 2 * 8);
  }
  // The numbers of four bytes, exactly.
  static __device__ void widen(u32* to, u32 four) {
#if BF16
    float f[4];
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = __uint_as_float(__byte_perm(four, 0x4b000000, 0x7440 + i)) - (8388608.0f + 128);
    to[0] = __byte_perm(__float_as_uint(f[0]), __float_as_uint(f[1]), 0x7632);
    to[1] = __byte_perm(__float_as_uint(f[2]), __float_as_uint(f[3]), 0x7632);
#else
#pragma unroll
    for (int i = 0; i < 2; i++) // 1024 + byte - 1152
      asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(to[i]) : "r"(__byte_perm(four, 0x64646464, i ? 0x4342 : 0x4140)), "r"(0x64806480));
#endif
  }
  template <int ROWS> __device__ void add(float* acc, const char* unit) const {
    const u32 x = shared(unit) + BYTES;
    u32 w[DEPTH / 16][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 bytes = ((const uint4*)unit)[half * CONSUMERS + threadIdx.x];
      widen(w[2 * half], bytes.x), widen(w[2 * half] + 2, bytes.y);
      widen(w[2 * half + 1], bytes.z), widen(w[2 * half + 1] + 2, bytes.w);
    }
    fence();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) multiply<ROWS>(acc, w[k], x + k * 32);
    commit();
  }
  // Of a thread's two columns.
  __device__ void scale(float4& sum, int column) const {
    const float low = scales[column], high = scales[column + 8];
    sum.x *= low, sum.y *= low, sum.z *= high, sum.w *= high;
  }
};

__device__ __forceinline__ float number(u16 x) {
  float f;
#if BF16
  f = __uint_as_float((u32)x << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
#endif
  return f;
}

// Each column's scale: its largest weight over 127. A block 32 columns, 32 x 32 threads; zeros behind the last column.
extern "C" __global__ void largest(float* scales, const u16* w, int inner, int columns) {
  awaitInputs();
  __shared__ float tops[32][33];
  const int column = blockIdx.x * 32 + threadIdx.x % 32;
  float top = 0;
  for (int i = threadIdx.x / 32; i < inner && column < columns; i += 32)
    top = fmaxf(top, fabsf(number(w[(size_t)i * columns + column])));
  tops[threadIdx.x % 32][threadIdx.x / 32] = top;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  for (int i = 1; i < 32; i++) top = fmaxf(top, tops[threadIdx.x][i]);
  scales[column] = top / 127;
}

// The bytes of [inner,columns]; a block of CONSUMERS threads a half of a unit.
extern "C" __global__ void quantize(uint4* bytes, const u16* w, const float* scales, int inner, int columns) {
  awaitInputs();
  const int units = (inner + DEPTH - 1) / DEPTH, unit = blockIdx.x / 2;
  uint4 made;
  for (int i = 0; i < 4; i++) {
    u32 four = 0;
    for (int j = 0; j < 4; j++) {
      const int2 at = Bytes::place(threadIdx.x, blockIdx.x % 2, 4 * i + j);
      const int column = unit / units * COLUMNS + at.x, row = unit % units * DEPTH + at.y;
      const float scale = scales[column];
      const bool is = column < columns && row < inner && scale > 0;
      const int x = is ? __float2int_rn(number(w[(size_t)row * columns + column]) / scale) : 0;
      four |= (u32)(min(max(x, -127), 127) + 128) << 8 * j;
    }
    (&made.x)[i] = four;
  }
  bytes[(size_t)blockIdx.x * CONSUMERS + threadIdx.x] = made;
}
