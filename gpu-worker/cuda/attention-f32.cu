// Attention in f32, for comparison with other devices. attention-common.cu goes before.

/** Correct, not fast: a block a row, gridDim = (heads, tokens, sequences); 16 groups of 8 lanes, a column each. */
extern "C" __global__ void __launch_bounds__(128) attend(INPUTS) {
  awaitInputs();
  const Pass p(blockIdx.z, GIVEN);
  __shared__ float query[HEAD], part[16][HEAD], tops[16], totals[16];
  if (blockIdx.y >= p.tokens) return;
  const int head = blockIdx.x, token = blockIdx.y, kv = head / (heads / kvHeads);
  const int past = p.control.x, causal = p.control.z, group = threadIdx.x / 8, lane = threadIdx.x % 8;
  const int stop = min(p.capacity, past + (causal ? token + 1 : min(128, p.control.y + p.tokens)));
  const Bits bits = causal ? Bits{0, 0} : bitsOf(p, token);
  if (threadIdx.x < ITEMS) {
    Eight low, high;
    turned(p, token, head, threadIdx.x * 8, low, high);
    write8(query + threadIdx.x * 8, low);
    write8(query + threadIdx.x * 8 + HALF, high);
  }
  __syncthreads();
  float acc[HEAD / 8] = {}, top = NOTHING, total = 0;
  for (int base = 0; base < stop; base += 16) {
    const int column = base + group;
    const bool seen = column < stop && (causal || column < past || bits.has(column - past));
    const long long at = seen ? p.rowAt(p.blockOf(column), kv, column) + lane : 0;
    float score = 0;
    for (int i = 0; i < HEAD / 8; i++) score += seen ? query[lane + i * 8] * keys[at + i * 8] : 0;
    for (int i = 1; i < 8; i *= 2) score += __shfl_xor_sync(~0u, score, i);
    if (!seen) continue;
    score *= rsqrtf(HEAD);
    const float before = top;
    top = fmaxf(top, score);
    const float shrink = expf(before - top), weight = expf(score - top);
    total = total * shrink + weight;
    for (int i = 0; i < HEAD / 8; i++) acc[i] = acc[i] * shrink + weight * values[at + i * 8];
  }
  for (int i = 0; i < HEAD / 8; i++) part[group][lane + i * 8] = acc[i];
  if (lane == 0) tops[group] = top, totals[group] = total;
  __syncthreads();
  for (int i = 0; i < 16; i++) top = fmaxf(top, tops[i]);
  if (threadIdx.x >= HEAD) return;
  float sum = 0, result = 0;
  for (int i = 0; i < 16; i++) {
    const float weight = totals[i] != 0 ? expf(tops[i] - top) : 0;
    sum += weight * totals[i];
    result += weight * part[i][threadIdx.x];
  }
  p.out[((size_t)token * heads + head) * HEAD + threadIdx.x] = sum != 0 ? result / sum : 0;
}
