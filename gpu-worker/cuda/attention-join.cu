// Attention of values of 16 bits: how warps and blocks join what they found. attention-tiles.cu goes before.
//
// The blocks of a row's splits are a thread block cluster where the GPU has them (Hopper): each sends its part of a row
// to the block that joins it, through shared memory. Elsewhere, and for prompts, parts go by global memory to `combine`.
// Parts are averages over the columns of a split, in the dtype, so that they are no larger than the output.

#if __CUDA_ARCH__ >= 900
#define CLUSTER_OF(splits) __cluster_dims__(1, splits, 1)
constexpr bool CLUSTERS = true;
#else
#define CLUSTER_OF(splits)
constexpr bool CLUSTERS = false;
#endif

/** Groups of four mma tiles of 8 columns, and chunks of 16 bytes of a row's part: that of lane % 4 in each group. */
constexpr int GROUPS = (HEAD + 31) / 32, CHUNKS = GROUPS * 4;

#if __CUDA_ARCH__ >= 900
__device__ void arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
/** Waits until all threads of the cluster arrived; what they sent before is here then. */
__device__ void awaitCluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
/** Where the same variable is in the shared memory of another block of the cluster. */
__device__ u32 addressAt(const void* shared, int block) {
  u32 at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(address(shared)), "r"(block));
  return at;
}
__device__ void send(uint4* to, int block, const uint4& x) {
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(addressAt(to, block)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w) : "memory");
}
__device__ void send(float2* to, int block, const float2& x) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(addressAt(to, block)), "f"(x.x), "f"(x.y) : "memory");
}
#else
__device__ void arrive() {}
__device__ void awaitCluster() {}
template <class T> __device__ void send(T*, int, const T&) {}
#endif

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

/** Writes a chunk of an output row. */
__device__ void writeChunk(value* row, int chunk, const uint4& x) {
  const u32 parts[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int j = chunk / 4 * 4 + i;
    if (j < HEAD / 8) *(u32*)(row + j * 8 + chunk % 4 * 2) = parts[i];
  }
}
/** A row of the output: row `row` of a KV head's queries. */
__device__ value* outputRow(const Pass& p, int kv, int row) {
  const int group = p.heads / p.kvHeads;
  return p.out + ((size_t)(row / group) * p.heads + kv * group + row % group) * HEAD;
}

/** Joins a chunk of a row's parts [splits,CHUNKS]; sums [splits] of {largest score in log2, sum of weights}. */
__device__ void join(const uint4* parts, const float2* sums, int splits, int chunk, value* row) {
  float top = NOTHING, total = 0;
#pragma unroll 8
  for (int i = 0; i < splits; i++) top = fmaxf(top, sums[i].x);
  Eight sum = {};
#pragma unroll 8
  for (int i = 0; i < splits; i++) {
    const float weight = sums[i].y * power(sums[i].x - top);
    const Eight part = unpack8(parts[i * CHUNKS + chunk]);
    total += weight;
    for (int e = 0; e < 8; e++) sum.x[e] += weight * part.x[e];
  }
  const float share = total != 0 ? 1 / total : 0;
  const auto both = [&](int i) { return pack(sum.x[i] * share, sum.x[i + 1] * share); };
  writeChunk(row, chunk, make_uint4(both(0), both(2), both(4), both(6)));
}

/** Joins the splits of each row; a thread a chunk, gridDim = (rows of all KV heads * CHUNKS / 128, sequences). */
extern "C" __global__ void __launch_bounds__(128) combine(INPUTS, int splits) {
  awaitInputs();
  const Pass p(blockIdx.y, GIVEN);
  const int i = blockIdx.x * 128 + threadIdx.x, at = i / CHUNKS, kv = at / p.mostRows, row = at % p.mostRows;
  if (kv >= kvHeads || row >= p.tokens * (heads / kvHeads)) return;
  const size_t first = ((size_t)p.sequence * p.mostRows * kvHeads + at) * splits;
  join(partials + first * CHUNKS, sums + first, splits, i % CHUNKS, outputRow(p, kv, row));
}

/** Scales a thread's sums to averages over the columns of all warps of the block; returns {largest score, sum}. */
template <int RW, int CW> __device__ void average(Rows& r, float2* shared, float2 (&sums)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float scale = rsqrtf(HEAD) * 1.44269504f;
  for (int i = 0; i < 2; i++) {
    r.total[i] += __shfl_xor_sync(~0u, r.total[i], 1);
    r.total[i] += __shfl_xor_sync(~0u, r.total[i], 2);
    sums[i] = make_float2(r.top[i] * scale, r.total[i]);
    if (CW > 1 && lane % 4 == 0) shared[warp * 16 + lane / 4 + 8 * i] = sums[i];
  }
  if (CW > 1) __syncthreads();
  for (int i = 0; i < 2; i++) {
    const float mine = sums[i].x;
    if (CW > 1) {
      float2 others[CW];
      for (int w = 0; w < CW; w++) others[w] = shared[(w * RW + warp % RW) * 16 + lane / 4 + 8 * i];
      for (int w = 0; w < CW; w++) sums[i].x = fmaxf(sums[i].x, others[w].x);
      sums[i].y = 0;
      for (int w = 0; w < CW; w++) sums[i].y += others[w].y * power(others[w].x - sums[i].x);
    }
    const float share = sums[i].y != 0 ? power(mine - sums[i].x) / sums[i].y : 0;
#pragma unroll
    for (int j = 0; j < HEAD / 8; j++) r.acc[j][2 * i] *= share, r.acc[j][2 * i + 1] *= share;
  }
}

/** Adds up the averages of the CW warps of each row: group g of tiles ends with warp g % CW. */
template <int RW, int CW> __device__ void gatherWarps(Rows& r, float4* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto slot = [&](int w, int j) { return shared + ((w * RW + warp % RW) * (HEAD / 8) + j) * 32 + lane; };
#pragma unroll
  for (int j = 0; j < HEAD / 8; j++) {
    const float(&a)[4] = r.acc[j];
    if (j / 4 % CW != warp / RW) *slot(warp / RW, j) = make_float4(a[0], a[1], a[2], a[3]);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < HEAD / 8; j++) {
    if (j / 4 % CW != warp / RW) continue;
#pragma unroll
    for (int i = 1; i < CW; i++) {
      const float4 x = *slot((warp / RW + i) % CW, j);
      r.acc[j][0] += x.x, r.acc[j][1] += x.y, r.acc[j][2] += x.z, r.acc[j][3] += x.w;
    }
  }
}

/**
 * Joins the warps' sums, and the blocks' in a cluster; writes the output, or a part for `combine`. `memory` is free; to
 * `inbox` other blocks of the cluster (of SPLITS) send parts [OWN,SPLITS,CHUNKS] and their sums.
 */
template <int RW, int CW, int SPLITS>
__device__ void finish(const Pass& p, const Share& s, Rows& r, value* memory, uint4* inbox) {
  constexpr int THREADS = 32 * RW * CW, OWN = (16 * RW + SPLITS - 1) / SPLITS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float2 sums[2], *inboxSums = (float2*)(inbox + OWN * SPLITS * CHUNKS);
  float4* shared = (float4*)memory;
  average<RW, CW>(r, (float2*)(shared + THREADS * (HEAD / 8)), sums);
  if (CW > 1) gatherWarps<RW, CW>(r, shared);
  if (SPLITS > 1) awaitCluster(); // all its blocks run, so that they can be sent to
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int local = warp % RW * 16 + lane / 4 + 8 * i, row = s.row0 + local, owner = local / OWN;
    if (row >= s.rows) continue;
    const size_t at = SPLITS > 1 ? local % OWN * SPLITS + s.split
                                 : ((size_t)(p.sequence * p.kvHeads + s.kv) * p.mostRows + row) * s.splits + s.split;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      if (g % CW != warp / RW) continue;
      u32 parts[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int tile = min(4 * g + j, HEAD / 8 - 1);
        parts[j] = pack(r.acc[tile][2 * i], r.acc[tile][2 * i + 1]);
      }
      const int chunk = g * 4 + lane % 4;
      const uint4 x = make_uint4(parts[0], parts[1], parts[2], parts[3]);
      if (SPLITS > 1) send(inbox + at * CHUNKS + chunk, owner, x);
      else if (s.splits > 1) p.partials[at * CHUNKS + chunk] = x;
      else writeChunk(outputRow(p, s.kv, row), chunk, x);
    }
    if (warp >= RW || lane % 4 != 0) continue;
    if (SPLITS > 1) send(inboxSums + at, owner, sums[i]);
    else if (s.splits > 1) p.sums[at] = sums[i];
  }
  if (SPLITS == 1) return;
  arrive();
  awaitCluster();
  for (int i = threadIdx.x; i < OWN * CHUNKS; i += THREADS) {
    const int mine = i / CHUNKS * SPLITS, local = s.split * OWN + i / CHUNKS, row = s.row0 + local;
    if (local < 16 * RW && row < s.rows) join(inbox + mine * CHUNKS, inboxSums + mine, SPLITS, i % CHUNKS, outputRow(p, s.kv, row));
  }
}
