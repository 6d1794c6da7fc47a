// The two passes of antialiased resizing of 8-bit RGB pictures, exactly as input/resize.ts has them: weights of fixed point,
// sums that start with a half, each pass rounded to 8 bits.

typedef unsigned char u8;
typedef unsigned int u32;

#define PRECISION_BITS 22
#define ONE_HALF (1u << (PRECISION_BITS - 1))

// For each output position: the first input position, how many there are, and their weights, `stride` apart.
#define WEIGHTS const int *first, const int *count, const int *weight, int stride

__device__ u8 rounded(u32 sum) { return min(max((int)sum >> PRECISION_BITS, 0), 255); }

// Rows of `from` pixels to rows of `to`; a thread a pixel.
extern "C" __global__ void across(u8* out, const u8* in, WEIGHTS, int from, int to, int rows) {
  awaitInputs();
  const int x = blockIdx.x * blockDim.x + threadIdx.x;
  if (x >= to) return;
  const int* w = weight + x * stride;
  for (int y = blockIdx.y; y < rows; y += gridDim.y) {
    const u8* at = in + ((long long)y * from + first[x]) * 3;
    u32 r = ONE_HALF, g = ONE_HALF, b = ONE_HALF;
    for (int k = 0; k < count[x]; k++, at += 3) r += at[0] * w[k], g += at[1] * w[k], b += at[2] * w[k];
    u8* put = out + ((long long)y * to + x) * 3;
    put[0] = rounded(r), put[1] = rounded(g), put[2] = rounded(b);
  }
}

// Rows of `row` samples, the first being row `top` of the picture, to `rows` of them; a thread a sample.
extern "C" __global__ void down(u8* out, const u8* in, WEIGHTS, int row, int rows, int top) {
  awaitInputs();
  const int x = blockIdx.x * blockDim.x + threadIdx.x;
  if (x >= row) return;
  for (int y = blockIdx.y; y < rows; y += gridDim.y) {
    const u8* at = in + (long long)(first[y] - top) * row + x;
    u32 sum = ONE_HALF;
    for (int k = 0; k < count[y]; k++, at += row) sum += *at * weight[y * stride + k];
    out[(long long)y * row + x] = rounded(sum);
  }
}
