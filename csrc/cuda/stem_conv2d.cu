// A ResNet's first convolution with everything around it: normalise, convolve, add a bias, ReLU, max-pool.
//
// Legend: N 3 H W input, K <= 64 output channels, R S filter, P Q the convolution's output, PP PQ the
// pooled one. Implicit GEMM over tensor cores: a warp's A fragment is 16 neighbouring pixels of one
// output row. Shared memory holds the normalised bf16 patch with pixels interleaved, so that the S
// taps of a filter row are one run of values at a fixed distance from the pixel: reduction index (r; s,
// c), each run padded to a multiple of 8 with zero weights. So A is read by 32-bit loads at constant
// offsets, free of bank conflicts, and the weights stay in registers for a block's life.
//
// Column n of the n-tile j stands for channel 32 (j / 4) + 8 (n / 2) + 2 (j % 4) + n % 2: a thread then
// owns 8 neighbouring channels of a pixel, which is one 16-byte store.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/mma_bf16.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxK = 64;
constexpr int kPixelBytes = kMaxK * 2;

__device__ float to_float(float v) { return v; }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// What a block keeps in shared memory beside its weights; registers are for these.
struct Parameters {
  float bias[kMaxK];
  float mean[3], scale[3];

  __device__ float normalise(float value, int c) const { return (value - mean[c]) * scale[c]; }
};

// The three values of a pixel, normalised; 0 outside of the image, as padding after normalising gives.
template <class T>
__device__ __forceinline__ void load_pixel(float (&v)[3], const StemConv2d& p, const Parameters& parameters,
                                           const T* image, int y, int x, bool wanted) {
  wanted = wanted && y >= 0 && y < p.h && x >= 0 && x < p.w;
  const T* pixel = image + y * p.x_strides[2] + x * p.x_strides[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) v[c] = wanted ? parameters.normalise(to_float(pixel[c * p.x_strides[1]]), c) : 0.0f;
}

__device__ int channel_of(int tile, int column) {
  return tile / 4 * 32 + column / 2 * 8 + tile % 4 * 2 + column % 2;
}

// Fills shared memory; weight and bias are zero for the channels from K to 64.
template <int Taps>
__device__ void stage(const StemConv2d& p, float* weight, Parameters& parameters) {
  for (int i = threadIdx.x; i < kMaxK * Taps; i += kThreads) weight[i] = i < p.k * Taps ? p.weight[i] : 0.0f;
  const int i = threadIdx.x;
  if (i < kMaxK) parameters.bias[i] = i < p.k ? p.bias[i] : 0.0f;
  if (i < 3) parameters.mean[i] = p.mean[i], parameters.scale[i] = 1.0f / p.std[i];
}

// Sums of n-tiles 4 `half` to 4 `half` + 3 start as the bias.
__device__ __forceinline__ void start_sums(float (&sums)[4][4], const float* bias, int half, int t) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = *reinterpret_cast<const float2*>(bias + half * 32 + t * 8 + j * 2);
    sums[j][0] = sums[j][2] = pair.x;
    sums[j][1] = sums[j][3] = pair.y;
  }
}

// The 8 channels that a thread owns of the pixel in row g (second: g + 8) of its fragments.
__device__ __forceinline__ uint4 activated(const float (&sums)[4][4], int second) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) words[j] = pack_bf16(relu(sums[j][2 * second]), relu(sums[j][2 * second + 1]));
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Where those channels are positive: the bits of four 16-bit words as `pack_positive` lays them out. Of word
// j they are bits `block` and 8 + `block`, where the thread's channels are 8 `block` and up.
__device__ __forceinline__ uint2 positive_bits(const uint4& values, int block) {
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
  uint32_t bits[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // After a ReLU a half has no sign: what is not 0 carries into it, but a NaN does not count.
    const uint32_t halves = (words[j] + 0x7FFF7FFFu) & ~(words[j] + 0x007F007Fu) & 0x80008000u;
    bits[j] = (halves >> 15 & 1 | halves >> 23) << block;
  }
  return make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
}

// ---- 7x7, stride 2, padding 3, then max-pool 3x3, stride 2, padding 1 ----
//
// A block goes down a strip of 112 convolution columns, four convolution rows (two pooled ones) a
// step. The convolution's rows live in a ring of five in shared memory: the last one of a step is the
// first that the next step pools.

namespace stem7 {

constexpr int kTaps = 147;
constexpr int kColumns = 112;              // convolution pixels of a strip's row, 7 fragments
constexpr int kFragments = kColumns / 16;
constexpr int kRows = 4;                   // convolution rows a step
constexpr int kRing = kRows + 1;
constexpr int kPatchRows = 2 * kRows + 5;
constexpr int kKeptRows = 5;               // patch rows that the next step needs again
constexpr int kPatchColumns = 230;         // 2 * 111 + 7, and one that only meets zero weights
constexpr int kPatchWords = kPatchColumns * 3 / 2;
constexpr int kChunks = 21;                // 8 reduction indices each, three a filter row
constexpr int kConvBytes = kRing * kColumns * kPixelBytes;
constexpr int kPatchBytes = (kPatchRows * kPatchWords * 4 + 15) / 16 * 16;
constexpr size_t kShared = kConvBytes + kPatchBytes + sizeof(Parameters);
static_assert(kMaxK * kTaps * sizeof(float) <= kConvBytes, "the weights pass through the convolution's place");

struct Tiling {
  int conv_h, conv_w, pool_h, pool_w;
  int steps, strips, segments, steps_a_segment;
  int64_t units;
};

// Where a 16-byte chunk of a pixel lies: neighbours swap halves, or the stores of two would meet in a bank.
__device__ __forceinline__ int conv_offset(int slot, int column, int chunk) {
  return (slot * kColumns + column) * kPixelBytes + ((chunk ^ (column & 1) * 4) << 4);
}

template <class T>
__device__ void load_patch(__nv_bfloat16* patch, const StemConv2d& p, const Parameters& parameters, const T* image,
                           int first_row, int y0, int x0) {
  constexpr int kBatch = 4;  // pixels in flight a thread
  const int count = (kPatchRows - first_row) * kPatchColumns;
  for (int start = threadIdx.x; start < count; start += kBatch * kThreads) {
    float v[kBatch][3];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = start + b * kThreads;
      load_pixel(v[b], p, parameters, image, y0 + first_row + i / kPatchColumns, x0 + i % kPatchColumns, i < count);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = start + b * kThreads;
      if (i >= count) break;
#pragma unroll
      for (int c = 0; c < 3; ++c) patch[(first_row * kPatchColumns + i) * 3 + c] = __float2bfloat16_rn(v[b][c]);
    }
  }
}

__device__ __forceinline__ float tap(const float* weight, int channel, int chunk, int column) {
  const int at = chunk % 3 * 8 + column, s = at / 3, c = at % 3;
  return s < 7 ? weight[channel * kTaps + c * 49 + chunk / 3 * 7 + s] : 0.0f;
}

// Two rows of pooled pixels. A value and its place make one integer, (bf16 bits, 15 - position): ReLU
// left no sign, so the largest is the largest value, the first one among equals.
__device__ void pool(const unsigned char* conv, const StemConv2d& p, const Tiling& tiling, int64_t n, int step,
                     int ring_start, int conv_x0, int x_begin, int x_end) {
  constexpr int kMaxPooled = kColumns / 2;
  for (int i = threadIdx.x; i < 2 * kMaxPooled * 8; i += kThreads) {
    const int chunk = i % 8, x = x_begin + i / 8 % kMaxPooled, row = i / 8 / kMaxPooled, y = 2 * step + row;
    if (y >= tiling.pool_h || x >= x_end || chunk * 8 >= p.k) continue;
    uint32_t best[8] = {};
#pragma unroll
    for (int position = 0; position < 9; ++position) {
      const int conv_y = 2 * y - 1 + position / 3, conv_x = 2 * x - 1 + position % 3;
      if (conv_y < 0 || conv_y >= tiling.conv_h || conv_x < 0 || conv_x >= tiling.conv_w) continue;
      const int slot = (ring_start + 2 * row + position / 3) % kRing;
      const uint4 pixel = *reinterpret_cast<const uint4*>(conv + conv_offset(slot, conv_x - conv_x0, chunk));
      const uint32_t words[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        best[2 * e] = max(best[2 * e], words[e] << 16 | (15 - position));
        best[2 * e + 1] = max(best[2 * e + 1], (words[e] & 0xffff0000u) | (15 - position));
      }
    }
    uint32_t values[4], places[2] = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) values[e] = best[2 * e] >> 16 | (best[2 * e + 1] & 0xffff0000u);
#pragma unroll
    for (int e = 0; e < 8; ++e) places[e / 4] |= (15 - (best[e] & 15)) << e % 4 * 8;
    const int64_t at = ((n * tiling.pool_h + y) * tiling.pool_w + x) * p.k + chunk * 8;
    *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + at) =
        make_uint4(values[0], values[1], values[2], values[3]);
    *reinterpret_cast<uint2*>(p.index + at) = make_uint2(places[0], places[1]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward(const __grid_constant__ StemConv2d p, const __grid_constant__ Tiling tiling) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  unsigned char* conv = shared_memory;
  uint32_t* patch = reinterpret_cast<uint32_t*>(shared_memory + kConvBytes);
  Parameters& parameters = *reinterpret_cast<Parameters*>(shared_memory + kConvBytes + kPatchBytes);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int half = warp % 2;  // which 32 of the 64 channels

  stage<kTaps>(p, reinterpret_cast<float*>(conv), parameters);
  __syncthreads();
  uint32_t b[kChunks][4];
#pragma unroll
  for (int q = 0; q < kChunks; ++q) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* weight = reinterpret_cast<const float*>(conv);
      const int channel = channel_of(4 * half + j, g);
      b[q][j] = pack_bf16(tap(weight, channel, q, 2 * t), tap(weight, channel, q, 2 * t + 1));
    }
  }

  for (int64_t unit = blockIdx.x; unit < tiling.units; unit += gridDim.x) {
    const int strip = static_cast<int>(unit % tiling.strips);
    const int segment = static_cast<int>(unit / tiling.strips % tiling.segments);
    const int64_t n = unit / tiling.strips / tiling.segments;
    // 112 columns pool to 56 pixels at the image's left border, to 55 elsewhere: a window needs the
    // column to its left.
    const int x_begin = strip == 0 ? 0 : 1 + 55 * strip;
    const int x_end = min(56 + 55 * strip, tiling.pool_w);
    const int conv_x0 = max(2 * x_begin - 1, 0);
    const int begin = segment * tiling.steps_a_segment;
    const int end = min(begin + tiling.steps_a_segment, tiling.steps);
    // Below the top of the image the row above the first window is needed: one step earlier, that row only.
    const int first = max(begin - 1, 0);
    const T* image = static_cast<const T*>(p.x) + n * p.x_strides[0];

    for (int step = first; step < end; ++step) {
      load_patch(reinterpret_cast<__nv_bfloat16*>(patch), p, parameters, image, step == first ? 0 : kKeptRows,
                 2 * kRows * step - 3, 2 * conv_x0 - 3);
      __syncthreads();  // the patch is there, and nobody reads the convolution's rows any more

      const int ring_start = kRows * (step - first) % kRing;
      for (int fragment = (step < begin ? (kRows - 1) * kFragments : 0) + warp / 2; fragment < kRows * kFragments;
           fragment += kThreads / 64) {
        const int row = fragment / kFragments, column = fragment % kFragments * 16 + g;
        const uint32_t* pixel = patch + 2 * row * kPatchWords + column * 3 + t;
        float sums[4][4];
        start_sums(sums, parameters.bias, half, t);
#pragma unroll
        for (int q = 0; q + 1 < kChunks; q += 2) {
          const uint32_t* low = pixel + q / 3 * kPatchWords + q % 3 * 4;
          const uint32_t* high = pixel + (q + 1) / 3 * kPatchWords + (q + 1) % 3 * 4;
          const uint32_t a[4] = {low[0], low[24], high[0], high[24]};
#pragma unroll
          for (int j = 0; j < 4; ++j) mma_k16(sums[j], a, b[q][j], b[q + 1][j]);
        }
        const uint32_t* last = pixel + (kChunks - 1) / 3 * kPatchWords + (kChunks - 1) % 3 * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_k8(sums[j], last[0], last[24], b[kChunks - 1][j]);
        const int slot = (ring_start + 1 + row) % kRing;
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          *reinterpret_cast<uint4*>(conv + conv_offset(slot, column + 8 * second, 4 * half + t)) =
              activated(sums, second);
        }
      }
      __syncthreads();  // the convolution's rows are there, and nobody reads the patch any more

      if (step >= begin) pool(conv, p, tiling, n, step, ring_start, conv_x0, x_begin, x_end);
      for (int i = threadIdx.x; i < kKeptRows * kPatchWords; i += kThreads) {
        patch[i] = patch[i + (kPatchRows - kKeptRows) * kPatchWords];
      }
      __syncthreads();  // the kept rows are read before new ones come in their place
    }
  }
}

Tiling tile(const StemConv2d& p, int slots) {
  Tiling t{};
  t.conv_h = (p.h - 1) / 2 + 1, t.conv_w = (p.w - 1) / 2 + 1;
  t.pool_h = (t.conv_h - 1) / 2 + 1, t.pool_w = (t.conv_w - 1) / 2 + 1;
  t.steps = (t.pool_h + 1) / 2;
  t.strips = t.pool_w <= 56 ? 1 : 1 + (t.pool_w - 56 + 54) / 55;
  const int64_t wanted = std::max<int64_t>(slots / (p.n * t.strips), 1);
  t.steps_a_segment = static_cast<int>((t.steps + wanted - 1) / wanted);
  t.segments = (t.steps + t.steps_a_segment - 1) / t.steps_a_segment;
  t.units = p.n * t.strips * t.segments;
  return t;
}

}  // namespace stem7

// ---- 3x3, stride 1, padding 1 ----
//
// Tiles of 16 x 32 pixels. A pixel of the patch has a fourth channel, 0, so that every run of taps
// starts at an even value. While a tile is computed the next one's pixels are on their way.

namespace stem3 {

constexpr int kTaps = 27;
constexpr int kTileRows = 16, kTileColumns = 32;
constexpr int kPatchRows = kTileRows + 2;
constexpr int kPatchColumns = kTileColumns + 3;  // two of halo, one that only meets zero weights
constexpr int kPatchWords = kPatchColumns * 2;
constexpr int kPatchPixels = kPatchRows * kPatchColumns;
constexpr int kPixelsAThread = (kPatchPixels + kThreads - 1) / kThreads;
constexpr int kChunks = 6;                       // 8 reduction indices each, two a filter row
constexpr int kPatchBytes = (kPatchPixels * 8 + 15) / 16 * 16;
constexpr int kWeightBytes = kMaxK * kTaps * static_cast<int>(sizeof(float));
constexpr size_t kShared = 2 * kPatchBytes + kWeightBytes + sizeof(Parameters);

struct Tiling {
  uint32_t rows, columns;  // tiles of an image
  uint32_t units;          // below 2^31; 64-bit divisions would take a good part of a tile's time
};

struct Tile {
  int64_t n;
  int y0, x0;

  __device__ Tile(const Tiling& tiling, uint32_t unit)
      : n(unit / tiling.columns / tiling.rows),
        y0(static_cast<int>(unit / tiling.columns % tiling.rows) * kTileRows),
        x0(static_cast<int>(unit % tiling.columns) * kTileColumns) {}
};

template <class T>
__device__ __forceinline__ void fetch(float (&v)[kPixelsAThread][3], const StemConv2d& p, const Parameters& parameters,
                                      const Tile& tile) {
  const T* image = static_cast<const T*>(p.x) + tile.n * p.x_strides[0];
#pragma unroll
  for (int b = 0; b < kPixelsAThread; ++b) {
    const int i = threadIdx.x + b * kThreads;
    load_pixel(v[b], p, parameters, image, tile.y0 - 1 + i / kPatchColumns, tile.x0 - 1 + i % kPatchColumns,
               i < kPatchPixels);
  }
}

__device__ __forceinline__ float tap(const float* weight, int channel, int chunk, int column) {
  const int at = chunk % 2 * 8 + column, s = at / 4, c = at % 4;
  return s < 3 && c < 3 ? weight[channel * kTaps + c * 9 + chunk / 2 * 3 + s] : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    forward(const __grid_constant__ StemConv2d p, const __grid_constant__ Tiling tiling) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  float* weight = reinterpret_cast<float*>(shared_memory + 2 * kPatchBytes);
  Parameters& parameters = *reinterpret_cast<Parameters*>(shared_memory + 2 * kPatchBytes + kWeightBytes);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  stage<kTaps>(p, weight, parameters);
  __syncthreads();
  uint32_t b[kChunks][8];
#pragma unroll
  for (int q = 0; q < kChunks; ++q) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int channel = channel_of(j, g);
      b[q][j] = pack_bf16(tap(weight, channel, q, 2 * t), tap(weight, channel, q, 2 * t + 1));
    }
  }
  float pixels[kPixelsAThread][3];
  fetch<T>(pixels, p, parameters, Tile(tiling, blockIdx.x));  // there is a unit for every block

  int buffer = 0;
  for (uint32_t unit = blockIdx.x; unit < tiling.units; unit += gridDim.x, buffer ^= 1) {
    uint32_t* patch = reinterpret_cast<uint32_t*>(shared_memory + buffer * kPatchBytes);
#pragma unroll
    for (int i = 0; i < kPixelsAThread; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at < kPatchPixels) {
        *reinterpret_cast<uint2*>(patch + 2 * at) =
            make_uint2(pack_bf16(pixels[i][0], pixels[i][1]), pack_bf16(pixels[i][2], 0.0f));
      }
    }
    // One barrier a tile: who writes this buffer again has passed the next barrier, which every warp
    // reaches only when it is done with this tile.
    __syncthreads();
    if (unit + gridDim.x < tiling.units) fetch<T>(pixels, p, parameters, Tile(tiling, unit + gridDim.x));

    const Tile tile(tiling, unit);
#pragma unroll 1
    for (int fragment = warp; fragment < kTileRows * (kTileColumns / 16); fragment += kThreads / 32) {
      const int row = fragment / 2, column = fragment % 2 * 16 + g;
      const uint32_t* pixel = patch + row * kPatchWords + column * 2 + t;
      const int y = tile.y0 + row;
      uint2 positive[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sums[4][4];
        start_sums(sums, parameters.bias, half, t);
#pragma unroll
        for (int q = 0; q < kChunks; q += 2) {
          const uint32_t* low = pixel + q / 2 * kPatchWords;
          const uint32_t a[4] = {low[0], low[16], low[4], low[20]};
#pragma unroll
          for (int j = 0; j < 4; ++j) mma_k16(sums[j], a, b[q][4 * half + j], b[q + 1][4 * half + j]);
        }
#pragma unroll
        for (int second = 0; second < 2; ++second) {
          const int x = tile.x0 + column + 8 * second, channel = half * 32 + t * 8;
          const uint4 values = activated(sums, second);
          const uint2 bits = positive_bits(values, 4 * half + t);
          positive[second].x |= bits.x, positive[second].y |= bits.y;
          if (y >= p.h || x >= p.w || channel >= p.k) continue;
          *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + ((tile.n * p.h + y) * p.w + x) * p.k +
                                    channel) = values;
        }
      }
      if (p.positive == nullptr) continue;
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
#pragma unroll
        for (uint2& bits : positive) {
          bits.x |= __shfl_xor_sync(~0u, bits.x, lanes);
          bits.y |= __shfl_xor_sync(~0u, bits.y, lanes);
        }
      }
      const int x = tile.x0 + column + 8 * t;  // two of a pixel's four lanes store a pixel each
      if (t < 2 && y < p.h && x < p.w) {
        reinterpret_cast<uint2*>(p.positive)[(tile.n * p.h + y) * p.w + x] = positive[t];
      }
    }
  }
}

}  // namespace stem3

template <class T>
void run(const StemConv2d& p, int slots, cudaStream_t stream) {
  if (p.pool) {
    const stem7::Tiling tiling = stem7::tile(p, slots);
    check("stem_conv2d", cudaFuncSetAttribute(stem7::forward<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(stem7::kShared)));
    launch("stem_conv2d", stem7::forward<T>, std::min<int64_t>(tiling.units, slots), kThreads, stem7::kShared, stream,
           p, tiling);
  } else {
    stem3::Tiling tiling{};
    tiling.rows = static_cast<uint32_t>((p.h + stem3::kTileRows - 1) / stem3::kTileRows);
    tiling.columns = static_cast<uint32_t>((p.w + stem3::kTileColumns - 1) / stem3::kTileColumns);
    if (p.n > std::numeric_limits<int>::max() / (int64_t{tiling.rows} * tiling.columns)) {
      throw std::invalid_argument("stem_conv2d: too large");
    }
    tiling.units = static_cast<uint32_t>(p.n) * tiling.rows * tiling.columns;
    launch("stem_conv2d", stem3::forward<T>, std::min<int64_t>(tiling.units, slots), kThreads, stem3::kShared, stream,
           p, tiling);
  }
}

}  // namespace

void stem_conv2d_cuda(const StemConv2d& p, int device, void* stream_address) {
  if (p.k % 8 || p.k < 8 || p.k > kMaxK || std::max(p.h, p.w) >= std::numeric_limits<int>::max() / 4) {
    throw std::invalid_argument("stem_conv2d: k must be a multiple of 8 up to 64, h and w below 2^29");
  }
  if (p.n * p.h * p.w == 0) return;
  const DeviceGuard guard("stem_conv2d", device);
  int multiprocessors = 0;
  check("stem_conv2d", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_address);
  switch (p.x_dtype) {
    case DType::f32: return run<float>(p, 2 * multiprocessors, stream);
    case DType::bf16: return run<__nv_bfloat16>(p, 2 * multiprocessors, stream);
    default: throw std::invalid_argument("stem_conv2d: x must be f32 or bf16");
  }
}

}  // namespace rtk
