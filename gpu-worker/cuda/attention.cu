// Attention of values of 16 bits, on tensor cores; attention-common.cu, which goes before, says what it computes.
//
// The queries of a KV head's group are rows of one matrix (row = token * group + head in the group), so that a tile of
// 16 rows fills the tensor cores even where few tokens run. A block has RW * CW warps: RW side by side over rows, CW
// over the columns of a tile; the columns are split further over blocks (gridDim.y), which attention-join.cu joins.
// Online softmax as in FlashAttention-2 (Dao, 2023).
//
// gridDim = (kvHeads, splits, sequences * tiles of 16 RW rows), 32 RW CW threads; shared memory as attention.ts says.

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

/**
 * A block's part of attention: STAGES tiles in shared memory, in a cluster of SPLITS blocks, or 1. The last columns
 * come first: a tree's new ones, all in the first STAGES - 1 tiles, are computed while others are copied.
 */
template <int RW, int CW, int STAGES, int SPLITS, bool STORED> __device__ void attend(INPUTS) {
  constexpr int HEIGHT = 16 * RW, WIDTH = TILE / CW, THREADS = 32 * RW * CW;
  extern __shared__ __align__(16) value memory[];
  const int group = heads / kvHeads;
  // The cache's columns come while the product before still runs (or is about to end): what it waited for is complete, and
  // that is all that writes them, and what says where they are.
  if (STORED) awaitInputs();
  const Place place = divided ? Place(control, divided, group, HEIGHT) : Place(tokens, group, HEIGHT);
  if (place.sequence < 0) return; // as all blocks of its cluster do
  const Pass p(place.sequence, GIVEN);
  if (SPLITS > 1) arrive();
  const Share s(p, place.row0, HEIGHT, STORED);
  int blocks[STAGES];
#pragma unroll
  for (int i = 0; i < STAGES; i++) blocks[i] = blockAt(p, s.base(i));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Bits seen = !s.causal && s.fresh > s.past ? seenByAny(p) : Bits{0, 0};
  const auto fetch = [&](int i, int block) {
    if (i < s.tiles) copyTile<THREADS>(p, s, seen, block, STORED, s.base(i), memory + i % STAGES * STAGE);
    commit();
  };
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) {
    fetch(i, blocks[0]);
#pragma unroll
    for (int j = 1; j < STAGES; j++) blocks[j - 1] = blocks[j]; // copies of this code would cost more than these moves
  }
  int ahead = blocks[0]; // loaded a tile before it is needed, so that no copy waits for it
  Rows r(p, s, s.row0 + warp % RW * 16);
  if (!STORED) awaitInputs();
  const Queries<HEIGHT, THREADS> rawQueries(p, place.row0);
  value* queries = memory + (STAGES - 1) * STAGE;
  if (STORED) rawQueries.write(p, s, queries);
  else {
    Columns<THREADS> columns(p, s);
    rawQueries.write(p, s, queries);
    columns.write(p, s, memory);
  }
  __syncthreads();
  u32 q[ITEMS][4];
#pragma unroll
  for (int k = 0; k < ITEMS; k++) load(q[k], queries + (warp % RW * 16 + lane % 16) * STRIDE + k * 16 + lane / 16 * 8);
  for (int i = 0; i < s.tiles; i++) {
    await<STAGES - 2>();
    __syncthreads();
    fetch(i + STAGES - 1, ahead);
    ahead = blockAt(p, s.base(i + STAGES));
    const int from = warp / RW * WIDTH, base = s.base(i) + from;
    if (base >= s.stop) continue;
    const value* keys = memory + i % STAGES * STAGE + from * STRIDE;
    float c[WIDTH / 8][4] = {};
    score<WIDTH>(c, q, keys, s, r, base);
    weigh<WIDTH>(c, r);
    gather<WIDTH>(r, c, keys + TILE * STRIDE);
  }
  __syncthreads();
  finish<RW, CW, SPLITS>(p, s, r, memory, (uint4*)(memory + STAGES * STAGE));
}

// tree<RW>x<splits>: blocks of few rows are two to a multiprocessor, the others one, with more warps and stages.
#define TREE(cluster, rw, cw, stages, splits, blocks)                                                                  \
  extern "C" __global__ void cluster __launch_bounds__(32 * rw * cw, blocks) tree##rw##x##splits(INPUTS) {             \
    letFollow();                                                                                                       \
    attend<rw, cw, stages, CLUSTERS ? splits : 1, false>(GIVEN);                                                       \
  }
#define TREES(rw, cw, stages, blocks)                                                                                  \
  TREE(, rw, cw, stages, 1, blocks)                                                                                    \
  TREE(CLUSTER_OF(2), rw, cw, stages, 2, blocks)                                                                       \
  TREE(CLUSTER_OF(3), rw, cw, stages, 3, blocks)                                                                       \
  TREE(CLUSTER_OF(4), rw, cw, stages, 4, blocks)                                                                       \
  TREE(CLUSTER_OF(6), rw, cw, stages, 6, blocks)                                                                       \
  TREE(CLUSTER_OF(8), rw, cw, stages, 8, blocks)
TREES(1, 4, 3, 2)
TREES(2, 4, 4, 1)
TREES(4, 2, 4, 1)

extern "C" __global__ void __launch_bounds__(128, 2) prompt(INPUTS) {
  attend<4, 1, 3, 1, true>(GIVEN);
}
