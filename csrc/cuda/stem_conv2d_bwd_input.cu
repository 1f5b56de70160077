// The gradient of a ResNet's first convolution in the image, max-pool and normalisation included.
//
// Legend: N 3 H W image, K <= 64 channels, P Q the convolution's output, PP PQ the pooled one, G the
// gradient at (P, Q). A position (Y, X) is a few neighbouring image pixels that see the same
// neighbourhood of G: 2 x 2 pixels under the 7x7 filter of stride 2 (G rows Y - 1 to Y + 2), 1 x 2
// pixels under the 3x3 filter of stride 1 (G rows Y - 1 to Y + 1), four G columns in both. So
//   dx[position, (pixel, c)] = sum over (dy, dx, k) of G[neighbour (dy, dx), k] W[(dy, dx, k), (pixel, c)]
// is a matrix product: 16 positions of a row are a fragment's rows; its columns are 2 pixels x 3
// channels, padded from 6 to 8, for one (3x3) or two (7x7) image rows.
//
// G lies in shared memory as bf16, 128 bytes a pixel. Of a warp's four rows of positions each needs
// nearly the same rows of G: a fragment is loaded once and multiplied for all of them. The weights lie
// in shared memory in the order in which the lanes take them.

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

constexpr int kMaxK = 64;
constexpr int kPixelBytes = kMaxK * 2;
constexpr int kTapsX = 4;
constexpr int kSlices = kMaxK / 16;  // of the reduction over channels
constexpr int kWarpRows = 4;         // rows of positions of a warp

struct Tiling {
  int grad_h, grad_w;  // of G
  int steps, strips, segments, steps_a_segment;
  int64_t units;
};

// What the two geometries differ in. Rows of G that a step needs: kStepRows + kTapsY - 1, from row
// kRowShift of the buffer on; a position's columns start at kColumnShift.
struct Stem7 {
  static constexpr bool kPool = true;
  static constexpr int kFilter = 7, kTapsY = 4;
  static constexpr int kImageRows = 2;      // image rows of a position
  static constexpr int kColumnStep = 1;     // columns of G from a position to the next
  static constexpr int kFragments = 7, kRowGroups = 2;
  static constexpr int kThreads = 32 * kFragments * kRowGroups, kBlocks = 1;
  static constexpr int kStepRows = kWarpRows * kRowGroups;
  static constexpr int kRows = 12, kRowShift = 1;        // a ring, one row more so that pairs stay together
  static constexpr int kColumns = 116, kColumnShift = 1;  // likewise
  // Image pixel 2 Y + i takes G row Y + d through filter row i + 3 - 2 d; columns alike.
  static __device__ int filter_row(int i, int d) { return i + 3 - 2 * d; }
  static __device__ int filter_column(int i, int d) { return i + 3 - 2 * d; }
};

struct Stem3 {
  static constexpr bool kPool = false;
  static constexpr int kFilter = 3, kTapsY = 3;
  static constexpr int kImageRows = 1;
  static constexpr int kColumnStep = 2;
  static constexpr int kFragments = 1, kRowGroups = 4;
  static constexpr int kThreads = 32 * kFragments * kRowGroups, kBlocks = 2;
  static constexpr int kStepRows = kWarpRows * kRowGroups;
  static constexpr int kRows = kStepRows + 2, kRowShift = 0;
  static constexpr int kColumns = 34, kColumnShift = 0;
  // Image row Y takes G row Y + d through filter row 1 - d; image column 2 X + i G column 2 X + d.
  static __device__ int filter_row(int, int d) { return 1 - d; }
  static __device__ int filter_column(int i, int d) { return i + 1 - d; }
};

// The words of a lane for one tap and slice: two an n-tile.
template <class G>
struct alignas(8 * G::kImageRows) WeightPack {
  uint32_t words[2 * G::kImageRows];
};

template <class G>
constexpr size_t kWeightBytes = sizeof(WeightPack<G>) * 32 * kSlices * kTapsX * G::kTapsY;
template <class G>
constexpr size_t kShared = kWeightBytes<G> + size_t{G::kRows} * G::kColumns * kPixelBytes;

// Column of a fragment -> pixel and channel, so that what a thread holds is contiguous in memory.
template <bool ChannelsLast>
__device__ int pixel_of(int column) {
  return ChannelsLast ? column / 3 : column % 2;
}
template <bool ChannelsLast>
__device__ int channel_of(int column) {
  return ChannelsLast ? column % 3 : column / 2;
}

template <class G, bool ChannelsLast>
__device__ float weight_at(const StemConv2dBwdInput& p, int k, int tap_y, int tap_x, int image_row, int column) {
  const int r = G::filter_row(image_row, tap_y - 1), s = G::filter_column(pixel_of<ChannelsLast>(column), tap_x - 1);
  if (k >= p.k || column >= 6 || r < 0 || r >= G::kFilter || s < 0 || s >= G::kFilter) return 0.0f;
  return p.weight[((k * 3 + channel_of<ChannelsLast>(column)) * G::kFilter + r) * G::kFilter + s];
}

template <class G, bool ChannelsLast>
__device__ void lay_out_weights(WeightPack<G>* packs, const StemConv2dBwdInput& p) {
  for (int i = threadIdx.x; i < kTapsX * kSlices * G::kTapsY * 32; i += G::kThreads) {
    const int lane = i % 32, tap_y = i / 32 % G::kTapsY, slice = i / 32 / G::kTapsY % kSlices,
              tap_x = i / 32 / G::kTapsY / kSlices;
    WeightPack<G> pack;
#pragma unroll
    for (int word = 0; word < 2 * G::kImageRows; ++word) {
      const int k = slice * 16 + word % 2 * 8 + lane % 4 * 2;
      pack.words[word] = pack_bf16(weight_at<G, ChannelsLast>(p, k, tap_y, tap_x, word / 2, lane / 4),
                                   weight_at<G, ChannelsLast>(p, k + 1, tap_y, tap_x, word / 2, lane / 4));
    }
    packs[i] = pack;
  }
}

// Where a chunk of 8 channels lies: the eight positions that one ldmatrix reads are in eight bank groups.
template <class G>
__device__ __forceinline__ int grad_offset(int slot, int column, int chunk) {
  return (slot * G::kColumns + column) * kPixelBytes + ((chunk ^ (column / G::kColumnStep & 7)) << 4);
}

struct Window {
  uint32_t words[4];
  uint32_t places[2];
};

__device__ __forceinline__ Window load_window(const StemConv2dBwdInput& p, const Tiling& tiling, int pool_h,
                                              int pool_w, int64_t n, int y, int x, int chunk) {
  Window w{{0, 0, 0, 0}, {~0u, ~0u}};  // no place: nothing goes anywhere
  if (y < 0 || y >= pool_h || x < 0 || x >= pool_w || chunk * 8 >= p.k) return w;
  const int64_t at = ((n * pool_h + y) * pool_w + x) * p.k + chunk * 8;
  const uint4 grad = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.grad) + at);
  const uint2 places = *reinterpret_cast<const uint2*>(p.index + at);
  w.words[0] = grad.x, w.words[1] = grad.y, w.words[2] = grad.z, w.words[3] = grad.w;
  w.places[0] = places.x, w.places[1] = places.y;
  return w;
}

// What a window gives channel e of its pixel at `place`.
__device__ __forceinline__ float routed(const Window& w, int e, uint32_t place) {
  const uint32_t word = w.words[e / 2];
  const float value = e % 2 ? high_bf16(word) : low_bf16(word);
  return (w.places[e / 4] >> e % 4 * 8 & 0xff) == place ? value : 0.0f;
}

// Rebuilds G out of the pooled gradient, 2 x 2 pixels and 8 channels a thread: the pixels (2y, 2x) to
// (2y + 1, 2x + 1) are in the windows (y, x) to (y + 1, x + 1) and in no other. Rows are counted from
// the unit's first buffer row, which is row 2 * first_pair of G.
__device__ void load_grad(Stem7, unsigned char* grad, const StemConv2dBwdInput& p, const Tiling& tiling, int64_t n,
                          int first_pair, int begin_row, int end_row, int first_column) {
  using G = Stem7;
  const int pool_h = (tiling.grad_h - 1) / 2 + 1, pool_w = (tiling.grad_w - 1) / 2 + 1;
  const int count = (end_row - begin_row) / 2 * (G::kColumns / 2) * 8;
  for (int i = threadIdx.x; i < count; i += G::kThreads) {
    const int chunk = i % 8, column = i / 8 % (G::kColumns / 2) * 2, row = begin_row + i / 8 / (G::kColumns / 2) * 2;
    const int y = first_pair + row / 2, x = (first_column + column) / 2;  // first_column is even
    const Window a = load_window(p, tiling, pool_h, pool_w, n, y, x, chunk);
    const Window b = load_window(p, tiling, pool_h, pool_w, n, y, x + 1, chunk);
    const Window c = load_window(p, tiling, pool_h, pool_w, n, y + 1, x, chunk);
    const Window d = load_window(p, tiling, pool_h, pool_w, n, y + 1, x + 1, chunk);
    uint32_t words[4][4];  // pixel, pair of channels
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      float sums[4][2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int e = 2 * pair + h;
        sums[0][h] = routed(a, e, 4);
        sums[1][h] = routed(a, e, 5) + routed(b, e, 3);
        sums[2][h] = routed(a, e, 7) + routed(c, e, 1);
        sums[3][h] = routed(a, e, 8) + routed(b, e, 6) + routed(c, e, 2) + routed(d, e, 0);
      }
#pragma unroll
      for (int pixel = 0; pixel < 4; ++pixel) words[pixel][pair] = pack_bf16(sums[pixel][0], sums[pixel][1]);
    }
#pragma unroll
    for (int pixel = 0; pixel < 4; ++pixel) {
      const int slot = (row + pixel / 2) % G::kRows;
      *reinterpret_cast<uint4*>(grad + grad_offset<G>(slot, column + pixel % 2, chunk)) =
          make_uint4(words[pixel][0], words[pixel][1], words[pixel][2], words[pixel][3]);
    }
  }
}

// G is the gradient itself, zero outside.
__device__ void load_grad(Stem3, unsigned char* grad, const StemConv2dBwdInput& p, const Tiling& tiling, int64_t n,
                          int first_row, int begin_row, int end_row, int first_column) {
  using G = Stem3;
  const int count = (end_row - begin_row) * G::kColumns * 8;
  const __nv_bfloat16* image = static_cast<const __nv_bfloat16*>(p.grad) + n * tiling.grad_h * tiling.grad_w * p.k;
  for (int i = threadIdx.x; i < count; i += G::kThreads) {
    const int chunk = i % 8, column = i / 8 % G::kColumns, row = begin_row + i / 8 / G::kColumns;
    const int y = first_row + row, x = first_column + column;
    const bool inside = y >= 0 && y < tiling.grad_h && x >= 0 && x < tiling.grad_w && chunk * 8 < p.k;
    const int64_t at = inside ? (int64_t{y} * tiling.grad_w + x) * p.k + chunk * 8 : 0;
    copy_16_async(grad + grad_offset<G>(row % G::kRows, column, chunk), image + at, inside);
  }
  wait_for_copies();
}

__device__ __forceinline__ void store_two(float* at, float first, float second) {
  *reinterpret_cast<float2*>(at) = make_float2(first, second);
}
__device__ __forceinline__ void store_two(__nv_bfloat16* at, float first, float second) {
  *reinterpret_cast<uint32_t*>(at) = pack_bf16(first, second);
}
__device__ __forceinline__ void store_one(float* at, float value) { *at = value; }
__device__ __forceinline__ void store_one(__nv_bfloat16* at, float value) { *at = __float2bfloat16_rn(value); }

template <class G, class Out, bool ChannelsLast>
__global__ void __launch_bounds__(G::kThreads, G::kBlocks)
    backward(const __grid_constant__ StemConv2dBwdInput p, const __grid_constant__ Tiling tiling) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  WeightPack<G>* weights = reinterpret_cast<WeightPack<G>*>(shared_memory);
  unsigned char* grad = shared_memory + kWeightBytes<G>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int fragment = warp % G::kFragments, group = warp / G::kFragments;
  const int columns[2] = {min(2 * t, 5), min(2 * t + 1, 5)};  // lanes with t = 3 hold the padding
  const float scale[2] = {1.0f / p.std[channel_of<ChannelsLast>(columns[0])],
                          1.0f / p.std[channel_of<ChannelsLast>(columns[1])]};
  const bool pairs = p.w % 2 == 0;  // then two values are aligned and both inside of the image
  lay_out_weights<G, ChannelsLast>(weights, p);

  for (int64_t unit = blockIdx.x; unit < tiling.units; unit += gridDim.x) {
    const int strip = static_cast<int>(unit % tiling.strips);
    const int segment = static_cast<int>(unit / tiling.strips % tiling.segments);
    const int64_t n = unit / tiling.strips / tiling.segments;
    const int begin = segment * tiling.steps_a_segment;
    const int end = min(begin + tiling.steps_a_segment, tiling.steps);
    const int x_begin = strip * 16 * G::kFragments;  // in positions
    const int first_column = x_begin * G::kColumnStep - 1 - G::kColumnShift;
    const int first_row = begin * G::kStepRows - 1 - G::kRowShift;

    for (int step = begin; step < end; ++step) {
      const int local_row = (step - begin) * G::kStepRows;  // the step's first buffer row
      const int kept = step == begin ? 0 : G::kRows - G::kStepRows;
      load_grad(G{}, grad, p, tiling, n, G::kPool ? first_row / 2 : first_row, local_row + kept,
                local_row + G::kRows, first_column);
      __syncthreads();  // G (and at first the weights) are there

      int row_at[kWarpRows + G::kTapsY - 1];
#pragma unroll
      for (int i = 0; i < kWarpRows + G::kTapsY - 1; ++i) {
        row_at[i] = (local_row + G::kRowShift + group * kWarpRows + i) % G::kRows * (G::kColumns * kPixelBytes);
      }
      float sums[kWarpRows][G::kImageRows][4] = {};
      const WeightPack<G>* pack = weights + lane;
#pragma unroll 1
      for (int tap_x = 0; tap_x < kTapsX; ++tap_x) {
        const int column = (fragment * 16 + lane % 16) * G::kColumnStep + G::kColumnShift + tap_x;
#pragma unroll 2
        for (int slice = 0; slice < kSlices; ++slice, pack += 32 * G::kTapsY) {
          const unsigned char* pixel = grad + grad_offset<G>(0, column, slice * 2 + lane / 16);
          WeightPack<G> b[G::kTapsY];
#pragma unroll
          for (int tap_y = 0; tap_y < G::kTapsY; ++tap_y) b[tap_y] = pack[32 * tap_y];
#pragma unroll
          for (int i = 0; i < kWarpRows + G::kTapsY - 1; ++i) {
            uint32_t a[4];
            load_a(a, pixel + row_at[i]);
#pragma unroll
            for (int tap_y = 0; tap_y < G::kTapsY; ++tap_y) {
              const int row = i - tap_y;  // G row Y + tap_y - 1 is the i-th
              if (row < 0 || row >= kWarpRows) continue;
#pragma unroll
              for (int j = 0; j < G::kImageRows; ++j) {
                mma_k16(sums[row][j], a, b[tap_y].words[2 * j], b[tap_y].words[2 * j + 1]);
              }
            }
          }
        }
      }

#pragma unroll
      for (int row = 0; row < kWarpRows; ++row) {
#pragma unroll
        for (int j = 0; j < G::kImageRows; ++j) {
          const int y = (step * G::kStepRows + group * kWarpRows + row) * G::kImageRows + j;
          if (y >= p.h || t == 3) continue;
#pragma unroll
          for (int second = 0; second < 2; ++second) {
            const int x = 2 * (x_begin + fragment * 16 + g + 8 * second);
            if (x >= p.w) continue;
            const float first_value = sums[row][j][2 * second] * scale[0];
            const float second_value = sums[row][j][2 * second + 1] * scale[1];
            Out* at = static_cast<Out*>(p.dx) + (ChannelsLast ? ((n * p.h + y) * p.w + x) * 3 + 2 * t
                                                              : ((n * 3 + t) * p.h + y) * p.w + x);
            if (pairs) {
              store_two(at, first_value, second_value);
            } else {
              if (x + pixel_of<ChannelsLast>(columns[0]) < p.w) store_one(at, first_value);
              if (x + pixel_of<ChannelsLast>(columns[1]) < p.w) store_one(at + 1, second_value);
            }
          }
        }
      }
      __syncthreads();  // nobody reads G any more
    }
  }
}

// The segments (pieces of an image that different blocks take) that finish first on `slots` blocks.
template <class G>
Tiling tile(const StemConv2dBwdInput& p, int slots) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Tiling t{};
  t.grad_h = static_cast<int>(G::kPool ? (p.h - 1) / 2 + 1 : p.h);
  t.grad_w = static_cast<int>(G::kPool ? (p.w - 1) / 2 + 1 : p.w);
  t.steps = static_cast<int>(ceil_div(ceil_div(p.h, G::kImageRows), G::kStepRows));
  t.strips = static_cast<int>(ceil_div(ceil_div(p.w, 2), 16 * G::kFragments));
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int size = t.steps; size >= 1; --size) {
    const int64_t segments = ceil_div(t.steps, size), units = p.n * t.strips * segments;
    // A segment rebuilds rows of its neighbour: a quarter of a step.
    const int64_t cost = ceil_div(units, slots) * (4 * size + 1);
    if (cost < least) {
      least = cost;
      t.steps_a_segment = size, t.segments = static_cast<int>(segments), t.units = units;
    }
  }
  return t;
}

template <class G, class Out, bool ChannelsLast>
void run(const StemConv2dBwdInput& p, int multiprocessors, cudaStream_t stream) {
  const char* op = "stem_conv2d_bwd_input";
  const int slots = G::kBlocks * multiprocessors;
  const Tiling tiling = tile<G>(p, slots);
  check(op, cudaFuncSetAttribute(backward<G, Out, ChannelsLast>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(kShared<G>)));
  launch(op, backward<G, Out, ChannelsLast>, std::min<int64_t>(tiling.units, slots), G::kThreads, kShared<G>, stream,
         p, tiling);
}

template <class Out>
void run_layout(const StemConv2dBwdInput& p, int multiprocessors, cudaStream_t stream) {
  if (p.pool) {
    p.channels_last ? run<Stem7, Out, true>(p, multiprocessors, stream)
                    : run<Stem7, Out, false>(p, multiprocessors, stream);
  } else {
    p.channels_last ? run<Stem3, Out, true>(p, multiprocessors, stream)
                    : run<Stem3, Out, false>(p, multiprocessors, stream);
  }
}

}  // namespace

void stem_conv2d_bwd_input_cuda(const StemConv2dBwdInput& p, int device, void* stream_address) {
  const char* op = "stem_conv2d_bwd_input";
  if (p.k % 8 || p.k < 8 || p.k > kMaxK || std::max(p.h, p.w) >= std::numeric_limits<int>::max() / 4) {
    throw std::invalid_argument("stem_conv2d_bwd_input: k must be a multiple of 8 up to 64, h and w below 2^29");
  }
  if (p.n * p.h * p.w == 0) return;
  const DeviceGuard guard(op, device);
  int multiprocessors = 0;
  check(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_address);
  switch (p.dx_dtype) {
    case DType::f32: return run_layout<float>(p, multiprocessors, stream);
    case DType::bf16: return run_layout<__nv_bfloat16>(p, multiprocessors, stream);
    default: throw std::invalid_argument("stem_conv2d_bwd_input: dx must be f32 or bf16");
  }
}

}  // namespace rtk
