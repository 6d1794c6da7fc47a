// The draft tree on the device: the likeliest next tokens of a pass, the tree that grows from them, the inputs of the
// passes that follow, and the rows that are kept of a tree. A pass may be of several sequences, whose rows follow each
// other. Lengths come from device memory, never from launch parameters, so that one CUDA graph serves every cycle. Same
// choices as decode/drafters/vispec.ts, to the order of ties.
// Defines: F16, BF16 or F32 (one of them, 1), the type of the logits. `tree.ts` knows the grids and owns the memory.

#if F16
typedef unsigned short element;
__device__ float number(element x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
#elif BF16
typedef unsigned short element;
__device__ float number(element x) { return __uint_as_float((unsigned)x << 16); }
#else
typedef float element;
__device__ float number(element x) { return x; }
#endif

typedef unsigned long long u64;

#define ALL 0xffffffffu
#define THREADS 256
#define PER (16 / (int)sizeof(element)) // elements of one load
#define HELD 32                         // elements of a slice that a thread holds
#define MAX_SLICES 32                   // of a row of logits: one a lane when they are merged
#define MAX_K 10
#define MAX_NODES 128
#define MAX_SEEN 1296 // K + D*K*K with K <= 10 and K*D <= 128, rounded up
#define MAX_KEPT 16
#define BLOCK_ROWS 64 // of a cache

/** What the host says of a sequence's cycle: a CycleBlock begins with one for each. */
struct Cycle {
  int targetAfter;   // rows of the target's cache
  int draftAfter;    // rows of the draft's cache after the fresh ones
  int draftPosition; // position of the first level's nodes
  int root;          // token of the tree's root
  int slot;
  int unused[3];
};

/** Rows that a sequence keeps of its last tree, as moves.ts writes them. Unused ones: from = to = 0, hiddenFrom = -1. */
struct alignas(16) Move {
  int from[MAX_KEPT]; // rows of keys and values
  int to[MAX_KEPT];
  int hiddenFrom[MAX_KEPT]; // rows of hidden states
};

/** Every node that a sequence saw in a cycle, in order of creation, without the root: K, then K*K a level. */
struct Seen {
  double scores[MAX_SEEN]; // sums of log-probabilities from the root
  int tokens[MAX_SEEN];
  int parents[MAX_SEEN]; // among them; -1: the root
  int beams[16];         // those that were fed last
  int4 fed[MAX_NODES];   // mask of each node that was fed: its ancestors and itself
};

/** Larger values have larger keys; the zeros are one. 0 is no value's key. */
__device__ unsigned keyOf(float x) {
  unsigned bits = __float_as_uint(x + 0.0f);
  return bits ^ ((unsigned)((int)bits >> 31) | 0x80000000u);
}

__device__ float valueOf(unsigned key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

__device__ u64 keyOf(double x) {
  u64 bits = (u64)__double_as_longlong(x);
  return bits ^ ((u64)((long long)bits >> 63) | 0x8000000000000000ull);
}

/** Unique for each place, larger for a larger value, then for a lower index. */
__device__ u64 placeKey(float x, int index) { return (u64)keyOf(x) << 32 | ~(unsigned)index; }

__device__ float sumOfWarp(float x) {
  for (int far = 16; far > 0; far >>= 1) x += __shfl_xor_sync(ALL, x, far);
  return x;
}

__device__ void setBit(int4 &mask, int bit) {
  int word = bit >> 5, value = (int)(1u << (bit & 31));
  if (word == 0) mask.x |= value;
  if (word == 1) mask.y |= value;
  if (word == 2) mask.z |= value;
  if (word == 3) mask.w |= value;
}

/** A thread's share of logits[begin, end): place (load, e) holds index begin + (load*THREADS + thread)*PER + e. */
__device__ void loadSlice(const element *row, int begin, int end, bool aligned, float (&x)[HELD]) {
  const float lowest = __uint_as_float(0xff800000u);
  #pragma unroll
  for (int load = 0; load < HELD / PER; load++) {
    int at = begin + (load * THREADS + (int)threadIdx.x) * PER;
    union {
      uint4 vector;
      element elements[PER];
    } read;
    bool whole = aligned && at < end;
    if (whole) read.vector = *(const uint4 *)(row + at);
    #pragma unroll
    for (int e = 0; e < PER; e++) {
      float other = !aligned && at + e < end ? number(row[at + e]) : lowest;
      x[load * PER + e] = whole ? number(read.elements[e]) : other;
    }
  }
}

/**
 * The k largest of each slice of each row of logits [rows,V], falling, the lower index first on ties: keys and indices
 * [rows,slices,k], and the sum of exp(x - largest) [rows,slices]. Grid (slices, rows); slice <= THREADS*HELD, a
 * multiple of PER. Every element that is among the k largest is at least the k-th largest of the 32 groups' maxima,
 * which few others are.
 */
extern "C" __global__ void __launch_bounds__(THREADS, 4)
candidates(const element *logits, unsigned *keys, int *indices, float *sums, int V, int slice, int k) {
  letFollow();
  awaitInputs();
  __shared__ u64 groups[32];
  __shared__ u64 found[MAX_K * THREADS / 32 * HELD];
  __shared__ float parts[THREADS / 32];
  __shared__ int many;
  const int thread = threadIdx.x, lane = thread % 32;
  const int begin = blockIdx.x * slice, end = min(begin + slice, V);
  float x[HELD];
  loadSlice(logits + (size_t)blockIdx.y * V, begin, end, V % PER == 0, x);

  float most = x[0];
  int place = 0;
  #pragma unroll
  for (int i = 1; i < HELD; i++) {
    if (x[i] > most) most = x[i], place = i;
  }
  u64 own = placeKey(most, begin + (place / PER * THREADS + thread) * PER + place % PER), group = own;
  for (int far = 4; far > 0; far >>= 1) {
    u64 other = __shfl_xor_sync(ALL, group, far);
    if (other > group) group = other;
  }
  if (thread % 8 == 0) groups[thread / 8] = group;
  if (thread == 0) many = 0;
  __syncthreads();

  u64 mine = groups[lane];
  int rank = 0;
  #pragma unroll
  for (int i = 0; i < 32; i++) rank += groups[i] > mine;
  u64 threshold = __shfl_sync(ALL, mine, __ffs(__ballot_sync(ALL, rank == k - 1)) - 1);
  u64 largest = __shfl_sync(ALL, mine, __ffs(__ballot_sync(ALL, rank == 0)) - 1);
  float top = valueOf((unsigned)(largest >> 32)), sum = 0;
  #pragma unroll
  for (int i = 0; i < HELD; i++) {
    sum += __expf(x[i] - top);
    int index = begin + (i / PER * THREADS + thread) * PER + i % PER;
    if (own >= threshold && index < end && placeKey(x[i], index) >= threshold)
      found[atomicAdd(&many, 1)] = placeKey(x[i], index);
  }
  sum = sumOfWarp(sum);
  if (lane == 0) parts[thread / 32] = sum;
  __syncthreads();

  const size_t list = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
  for (int i = thread; i < max(many, k); i += THREADS) {
    int before = 0;
    if (i < many)
      for (int j = 0; j < many; j++) before += found[j] > found[i];
    else before = i;
    if (before >= k) continue;
    keys[list * k + before] = i < many ? (unsigned)(found[i] >> 32) : 0;
    indices[list * k + before] = i < many ? (int)~(unsigned)found[i] : 0;
  }
  if (thread == 0) {
    float total = 0;
    for (int i = 0; i < THREADS / 32; i++) total += parts[i];
    sums[list] = total;
  }
}

/** One warp: the largest of each row over its slices' lists of one: out [rows]. */
extern "C" __global__ void argmax(const unsigned *keys, const int *indices, int *out, int slices) {
  letFollow();
  awaitInputs();
  const int lane = threadIdx.x;
  unsigned key = lane < slices ? keys[(size_t)blockIdx.x * slices + lane] : 0;
  int winner = __ffs(__ballot_sync(ALL, key == __reduce_max_sync(ALL, key))) - 1;
  if (lane == winner) out[blockIdx.x] = indices[(size_t)blockIdx.x * slices + lane];
}

/** One warp: merges a row's sorted lists, which it copies to `held`. Lane j < k returns the j-th, `index` its index. */
__device__ float merge(const unsigned *keys, const int *indices, const float *sums, int slices, int k,
                       uint2 *held, int &index) {
  const int lane = threadIdx.x % 32;
  float sum = lane < slices ? sums[lane] : 0;
  for (int i = lane; i < slices * k; i += 32) held[i] = make_uint2(keys[i], indices[i]);
  __syncwarp();
  int at = lane * k, from = 0;
  unsigned head = lane < slices ? held[at].x : 0, first = head, mine = 0;
  for (int j = 0; j < k; j++) {
    unsigned top = __reduce_max_sync(ALL, head);
    int winner = __ffs(__ballot_sync(ALL, head == top)) - 1; // the lowest slice: its indices are lower
    int taken = __shfl_sync(ALL, at, winner);
    if (lane == j) mine = top, from = taken;
    if (lane == winner) head = ++at < (lane + 1) * k && lane < slices ? held[at].x : 0;
  }
  float largest = valueOf(__reduce_max_sync(ALL, first));
  // The sum of a slice of minus infinity only is no number.
  float total = sumOfWarp(sum > 0 ? sum * expf(valueOf(first) - largest) : 0);
  index = held[from].y;
  return valueOf(mine) - largest - logf(total);
}

/**
 * One level of every sequence's tree from the lists of its pass, level 0: the children of the last fresh row, which is
 * row last[sequence] of that pass. Adds the rows*k children to `seen`; unless it is the last level, picks the k best of
 * them and writes their pass: ids and hiddenRows [sequences*k] i64, positions [sequences*k], masks [sequences*k] over
 * the nodes fed so far, control [sequences]. `map` turns indices into tokens, null: as they are. A block a sequence, of
 * 32*(MAX_K + 1) threads: a warp for each row, one for the parents.
 */
extern "C" __global__ void __launch_bounds__(32 * (MAX_K + 1))
grow(const Cycle *cycles, const long long *last, const unsigned *keys, const int *indices, const float *sums,
     const int *map, Seen *allSeen, long long *ids, long long *hiddenRows, int *positions, int4 *masks, int4 *control,
     int slices, int k, int level, int isLast) {
  letFollow();
  awaitInputs();
  __shared__ uint2 held[MAX_K][MAX_SLICES * MAX_K];
  __shared__ float logProbs[MAX_K * MAX_K];
  __shared__ int tokens[MAX_K * MAX_K];
  __shared__ u64 order[MAX_K * MAX_K];
  __shared__ double parentScores[MAX_K];
  __shared__ int parents[MAX_K];
  __shared__ int chosen[MAX_K];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, sequence = blockIdx.x;
  const int rows = level == 0 ? 1 : k, children = rows * k;
  const Cycle *cycle = cycles + sequence;
  Seen *seen = allSeen + sequence;
  if (warp < rows) {
    int list = (sequence * rows + warp) * slices, index;
    float logProb = merge(keys + list * k, indices + list * k, sums + list, slices, k, held[warp], index);
    if (lane < k) {
      logProbs[warp * k + lane] = logProb;
      tokens[warp * k + lane] = map ? map[index] : index;
    }
  } else if (warp == MAX_K && lane < rows) {
    int parent = level == 0 ? -1 : seen->beams[lane];
    parents[lane] = parent;
    parentScores[lane] = parent < 0 ? 0 : seen->scores[parent];
  }
  __syncthreads();

  const int before = level == 0 ? 0 : k + (level - 1) * k * k;
  if (thread < children) {
    double score = parentScores[thread / k] + (double)logProbs[thread];
    order[thread] = keyOf(score);
    seen->scores[before + thread] = score;
    seen->tokens[before + thread] = tokens[thread];
    seen->parents[before + thread] = parents[thread / k];
  }
  if (isLast) return;
  __syncthreads();
  if (thread < children) {
    int rank = 0;
    for (int i = 0; i < children; i++) rank += i < thread ? order[i] >= order[thread] : order[i] > order[thread];
    if (rank < k) chosen[rank] = thread;
  }
  __syncthreads();

  const int first = level * k;
  if (thread < k) {
    int child = chosen[thread], row = child / k, out = sequence * k + thread;
    int4 mask = level == 0 ? make_int4(0, 0, 0, 0) : seen->fed[first - k + row];
    setBit(mask, first + thread);
    seen->beams[thread] = before + child;
    seen->fed[first + thread] = mask;
    ids[out] = tokens[child];
    hiddenRows[out] = level == 0 ? last[sequence] : sequence * k + row;
    positions[out] = cycle->draftPosition + level;
    masks[out] = mask;
  }
  if (thread == 0) control[sequence] = make_int4(cycle->draftAfter, first, 0, cycle->slot);
}

/**
 * The `most` best of the `count` nodes that each sequence saw, falling, the earlier first on ties, so that parents come
 * before children: keys and nodes [sequences,most]. A block a sequence, of 1,024 threads.
 */
extern "C" __global__ void __launch_bounds__(1024)
rank(const Seen *allSeen, u64 *keys, int *nodes, int count, int most) {
  letFollow();
  awaitInputs();
  __shared__ u64 order[MAX_SEEN];
  __shared__ int ranks[MAX_SEEN];
  const int thread = threadIdx.x;
  const Seen *seen = allSeen + blockIdx.x;
  for (int i = thread; i < count; i += blockDim.x) {
    order[i] = keyOf(seen->scores[i]);
    ranks[i] = 0;
  }
  __syncthreads();
  // Each node is compared with all, a quarter of them at a time, so that a small tree fills the block too.
  const int quarter = (count + 3) / 4;
  for (int i = thread; i < 4 * count; i += blockDim.x) {
    int node = i % count, from = i / count * quarter, to = min(from + quarter, count), rank = 0;
    u64 own = order[node];
    #pragma unroll 8
    for (int j = from; j < to; j++) rank += j < node ? order[j] >= own : order[j] > own;
    atomicAdd(&ranks[node], rank);
  }
  __syncthreads();
  for (int i = thread; i < count; i += blockDim.x) {
    if (ranks[i] >= most) continue;
    keys[blockIdx.x * most + ranks[i]] = order[i];
    nodes[blockIdx.x * most + ranks[i]] = i;
  }
}

/** How many of a falling list's keys come before a key: those that are larger, and equal ones if `ties`. */
__device__ int before(const u64 *list, int n, u64 key, bool ties) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list[middle] > key || (ties && list[middle] == key)) low = middle + 1;
    else high = middle;
  }
  return low;
}

/**
 * Divides `budget` nodes among the sequences: the best of all of theirs, of each one's falling list of `most` keys,
 * which are copied to `lists`. counts [sequences]: how many each gets. For a whole block.
 */
__device__ void divide(const u64 *keys, u64 *lists, int *counts, int sequences, int most, int budget) {
  for (int i = threadIdx.x; i < sequences * most; i += blockDim.x) lists[i] = keys[i];
  for (int i = threadIdx.x; i < sequences; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < sequences * most; i += blockDim.x) {
    const int own = i / most;
    int rank = i % most;
    for (int other = 0; other < sequences; other++)
      if (other != own) rank += before(lists + other * most, most, lists[i], other < own);
    if (rank < budget) atomicAdd(&counts[own], 1);
  }
  __syncthreads();
}

/**
 * Keeps the best of the nodes that each sequence saw, of its list of `most` by `rank`, in order of creation, the root
 * first: the target's pass (ids [sequences*nodes] i64, positions, masks over the sequence's nodes, control [sequences])
 * and the trees for the host (tokens, parents, depths, scores [sequences*nodes]; spans [sequences]: where a sequence's
 * are, and how many). Where they are divided, sequences share their nodes by how likely each is, and control
 * [sequences,2] has the spans too; else all have as many, and fewer are padded with children of the root whose token is
 * -1 (id 0). A block a sequence, of 1,024 threads; dynamic shared memory: the lists and [sequences] ints.
 */
extern "C" __global__ void __launch_bounds__(1024)
finish(const Cycle *cycles, const Seen *allSeen, const u64 *keys, const int *ranked, long long *ids, int *positions,
       int4 *masks, int4 *control, int *tokens, int *parents, int *depths, float *scores, int2 *spans, int nodes,
       int count, int most, int divided) {
  letFollow();
  awaitInputs();
  extern __shared__ u64 lists[];
  __shared__ int above[MAX_SEEN], places[MAX_SEEN];
  __shared__ int kept[MAX_NODES];
  const int thread = threadIdx.x, sequences = gridDim.x;
  int *counts = (int *)(lists + sequences * most);
  const Cycle *cycle = cycles + blockIdx.x;
  const Seen *seen = allSeen + blockIdx.x;
  int keep = min(nodes - 1, most), first = blockIdx.x * nodes;
  if (divided) {
    divide(keys, lists, counts, sequences, most, sequences * (nodes - 1));
    keep = counts[blockIdx.x], first = 0;
    for (int i = 0; i < (int)blockIdx.x; i++) first += 1 + counts[i];
  }
  for (int i = thread; i < count; i += blockDim.x) {
    above[i] = seen->parents[i];
    places[i] = 0;
  }
  if (thread < keep) kept[thread] = ranked[blockIdx.x * most + thread];
  __syncthreads();
  if (thread < keep) {
    int place = 1;
    for (int i = 0; i < keep; i++) place += kept[i] < kept[thread];
    places[kept[thread]] = place;
  }
  __syncthreads();
  const int rows = divided ? 1 + keep : nodes;
  if (thread >= rows) return;

  // The first threads write the kept nodes, the next the root, the others the padding.
  const int node = thread < keep ? kept[thread] : -1;
  const int place = node >= 0 ? places[node] : thread == keep ? 0 : thread;
  const int parent = node >= 0 ? above[node] : -1;
  int depth = place == 0 ? 0 : 1;
  int4 mask = make_int4(1, 0, 0, 0);
  setBit(mask, place);
  for (int i = parent; i >= 0; i = above[i], depth++) setBit(mask, places[i]);
  const int token = node >= 0 ? seen->tokens[node] : place == 0 ? cycle->root : -1;
  const int out = first + place;
  ids[out] = token < 0 ? 0 : token;
  positions[out] = cycle->targetAfter + depth;
  masks[out] = mask;
  tokens[out] = token;
  parents[out] = place == 0 ? -1 : parent < 0 ? 0 : places[parent];
  depths[out] = depth;
  scores[out] = node >= 0 ? (float)seen->scores[node] : place == 0 ? 0.0f : __uint_as_float(0xff800000u);
  if (thread > 0) return;
  spans[blockIdx.x] = make_int2(first, rows);
  control[divided ? 2 * blockIdx.x : blockIdx.x] = make_int4(cycle->targetAfter, 0, 0, cycle->slot);
  if (divided) control[2 * blockIdx.x + 1] = make_int4(first, rows, 0, 0);
}

/**
 * Moves kept rows to their places in a pool [blocks,planes,BLOCK_ROWS,columns] of 16 bytes. A thread reads all rows of
 * its plane and column before it writes any, since a row's place may be another's. Grid (planes*columns / 128, moves),
 * 128 threads.
 */
extern "C" __global__ void __launch_bounds__(128)
moveRows(const Move *moves, uint4 *pool, int planes, int columns, long long blockPieces) {
  awaitInputs();
  const int at = blockIdx.x * 128 + threadIdx.x;
  if (at >= planes * columns) return;
  const Move move = moves[blockIdx.y];
  pool += (size_t)(at / columns) * BLOCK_ROWS * columns + at % columns;
  const auto pieceOf = [&](unsigned row) {
    return pool + row / BLOCK_ROWS * (size_t)blockPieces + row % BLOCK_ROWS * (size_t)columns;
  };
  uint4 held[MAX_KEPT];
  #pragma unroll
  for (int i = 0; i < MAX_KEPT; i++) {
    if (move.from[i] != move.to[i]) held[i] = *pieceOf(move.from[i]);
  }
  #pragma unroll
  for (int i = 0; i < MAX_KEPT; i++) {
    if (move.from[i] != move.to[i]) *pieceOf(move.to[i]) = held[i];
  }
}

template <typename Piece> __device__ void copyRow(char *to, const char *from, int bytes) {
  const int pieces = bytes / (int)sizeof(Piece);
  for (int i = threadIdx.x; i < pieces; i += blockDim.x) ((Piece *)to)[i] = ((const Piece *)from)[i];
}

/**
 * hidden[to[i]] = hidden[hiddenFrom[i]], rows of `bytes`, a multiple of 4. No row is both read and written. Grid
 * (MAX_KEPT, moves).
 */
extern "C" __global__ void keepRows(const Move *moves, char *hidden, int bytes) {
  awaitInputs();
  const Move &move = moves[blockIdx.y];
  const int source = move.hiddenFrom[blockIdx.x];
  if (source < 0) return;
  const char *from = hidden + (size_t)source * bytes;
  char *to = hidden + (size_t)move.to[blockIdx.x] * bytes;
  if (bytes % 16 == 0) copyRow<uint4>(to, from, bytes);
  else copyRow<unsigned>(to, from, bytes);
}
