// A convolution that multiplies only by the weights that are not zero, wherever they stand.
//
// It goes through the lists of sparse_conv2d.h. At 1 % density a column holds 1.1 weights: tensor cores multiply
// pieces of 16 columns, zeros included, by rows of the input that ldmatrix gathers from shared memory. There the
// input lies channel, pixel, eight images: what a column needs of a pixel is sixteen bytes, aligned whatever the
// tap is. That read is the bound, at 128 bytes a clock: the tensor cores idle half of the time, and plain FMAs
// would have to read no less and unpack bf16 besides.
//
// Legend: N H W C input, K output channels, R S filter.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>

#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "cuda/mma_bf16.h"
#include "cuda/sparse_conv2d.h"
#include "rtk.h"

namespace rtk {
namespace {

using namespace sparse;

constexpr int kImages = 8;  // of a block: a row of an 8 x 8 matrix of ldmatrix

// A block makes kSide x kSide pixels of eight images, in kPanels panels, each by kParts warps.
template <int kSide_, int kStride_, int kPanels_, int kParts_>
struct Tile {
  static constexpr int kSide = kSide_, kStride = kStride_, kPanels = kPanels_, kParts = kParts_;
  static constexpr int kWarps = kPanels * kParts, kThreads = 32 * kWarps, kChannels = kPanels * kPanel;
  // A warp has whole rows of pixels. Two that share 7 x 7 have three each, and about half of the middle one, the
  // tail: so their sums fit in the registers of 16 warps.
  static constexpr bool kHasTail = kSide == 7 && kParts == 2;
  static constexpr int kRows = kHasTail ? 3 : (kSide + kParts - 1) / kParts;
  static constexpr bool kUneven = !kHasTail && kRows * kParts != kSide;
  static constexpr int kMain = kRows * kSide, kTail = kHasTail ? 4 : 0, kPixels = kMain + kTail;
  static constexpr int kPitch = kSide == 4 && kStride == 1 ? 55 : 87;  // holds the pixels with their border
  static_assert(((kSide - 1) * kStride + 2) * (kRow + 1) < kPitch);    // the last pixel of a 3 x 3 filter
  static constexpr int kOutPitch = kChannels + 8;  // writes of eight channels by four images meet in no bank
  static constexpr int kInBytes = (kChunk * kPitch + kChunk / 8) * 16;
  static constexpr int kOutBytes = kSide * kSide * kImages * kOutPitch * 2;
  static constexpr int kShared = kInBytes > kOutBytes ? kInBytes : kOutBytes;
  static constexpr int kBlocks = kShared <= 112 * 1024 ? 2 : 1;  // of a multiprocessor, as shared memory allows
  static constexpr bool kAhead = kPixels < 16 && kBlocks == 1;  // registers are left for the next step's columns

  __device__ static int first_row(int part) { return part * (kHasTail ? 4 : kRows); }
};

struct Place {
  int n0, y0, x0, k0;  // the first image, output row, output column and output channel
};

// The chunk's channels of all pixels that the tile sees, 0 outside of the images. A warp takes a pixel, or half of
// its channels, a lane four or two of them of the eight images, which it transposes in registers.
template <class T>
__device__ inline void load_input(const SparseConv2d& p, const Place& place, int chunk, unsigned char* shared) {
  constexpr int kLane = T::kBlocks == 1 ? 4 : 2, kSplit = kChunk / (32 * kLane);  // channels, as registers allow
  constexpr int kAtOnce = T::kAhead ? 2 : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = (T::kSide - 1) * T::kStride + p.r, columns = (T::kSide - 1) * T::kStride + p.s;
  // The block's image, and what all of them share: an offset of 32 bits, as few registers are left.
  const int64_t image = int64_t{p.h} * p.w_in * p.c * 2;
  const auto* x = static_cast<const unsigned char*>(p.x) + place.n0 * image;
#pragma unroll kAtOnce
  for (int task = warp; task < rows * columns * kSplit; task += T::kWarps) {
    const int pixel = task / kSplit, row = pixel / columns, column = pixel % columns;
    const int of_chunk = (task % kSplit * 32 + lane) * kLane, c = chunk * kChunk + of_chunk;
    int y = place.y0 * T::kStride - p.padding + row, xx = place.x0 * T::kStride - p.padding + column;
    bool inside = y >= 0 && xx >= 0 && c < p.c;
    if (p.upsample == 2) {
      inside = inside && (y | xx) % 2 == 0;
      y /= 2;
      xx /= 2;
    }
    inside = inside && y < p.h && xx < p.w_in;
    const int images = inside ? min(kImages, p.n - place.n0) : 0;
    const uint32_t offset = static_cast<uint32_t>((y * p.w_in + xx) * p.c + c) * 2;
    uint32_t words[kImages][2];
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
      words[i][0] = words[i][1] = 0;
      if (i >= images) continue;
      const unsigned char* from = x + i * image + offset;
      if constexpr (kLane == 4) {
        const uint2 both = __ldg(reinterpret_cast<const uint2*>(from));
        words[i][0] = both.x, words[i][1] = both.y;
      } else {
        words[i][0] = __ldg(reinterpret_cast<const uint32_t*>(from));
      }
    }
    auto* to = reinterpret_cast<uint4*>(shared) + channel_unit<T::kPitch>(of_chunk) + row * kRow + column;
#pragma unroll
    for (int q = 0; q < kLane; ++q) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = __byte_perm(words[2 * i][q / 2], words[2 * i + 1][q / 2], q % 2 ? 0x7632 : 0x5410);
      }
      to[q * T::kPitch] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// What a lane has of a step's 32 columns: the place of one, and of the weights of 16 and 16 its fragment.
struct Columns {
  uint32_t place;
  uint4 first, second;
};

__device__ inline Columns load_columns(const unsigned char* step, int lane) {
  const auto* values = reinterpret_cast<const uint4*>(step + kStepColumns * 4) + lane;
  return {__ldg(reinterpret_cast<const uint32_t*>(step) + lane), __ldg(values), __ldg(values + 32)};
}

// Multiplies by a step's columns. `at`: where this lane's column lies for the tile's first pixel.
template <class T>
__device__ inline void multiply(float (&sums)[T::kPixels][4], uint32_t at, int part, const uint4& a0,
                                const uint4& a1) {
  constexpr int kStep = T::kStride * 16;
  const uint32_t first[4] = {a0.x, a0.y, a0.z, a0.w}, second[4] = {a1.x, a1.y, a1.z, a1.w};
  const uint32_t main = at + T::first_row(part) * kRow * kStep, tail = at + (3 * kRow + part * 4) * kStep;
#pragma unroll
  for (int pixel = 0; pixel < T::kPixels; ++pixel) {
    const int row = pixel / T::kSide;
    if (T::kUneven && T::first_row(part) + row >= T::kSide) break;
    uint32_t b[4];
    hopper::load_matrices_transposed(b, pixel < T::kMain ? main + (row * kRow + pixel % T::kSide) * kStep
                                                         : tail + (pixel - T::kMain) * kStep);
    mma_k16(sums[pixel], first, b[0], b[1]);
    mma_k16(sums[pixel], second, b[2], b[3]);
  }
}

// The sums through shared memory, and from there sixteen bytes of channels a thread.
template <class T>
__device__ inline void store_output(const SparseConv2d& p, const Place& place, const float (&sums)[T::kPixels][4],
                                    unsigned char* shared) {
  auto* out = reinterpret_cast<__nv_bfloat16*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp / T::kPanels;
  const int k = warp % T::kPanels * kPanel + lane / 4, image = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < T::kPixels; ++i) {
    const int row = i < T::kMain ? T::first_row(part) + i / T::kSide : 3;
    const int column = i < T::kMain ? i % T::kSide : i - T::kMain + part * 4;
    if (row >= T::kSide || column >= T::kSide) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = (row * T::kSide + column) * kImages + image + e % 2;
      out[at * T::kOutPitch + k + e / 2 * 8] = __float2bfloat16_rn(sums[i][e]);
    }
  }
  __syncthreads();
  constexpr int kPacks = T::kChannels / 8;
  for (int i = static_cast<int>(threadIdx.x); i < T::kSide * T::kSide * kImages * kPacks; i += T::kThreads) {
    const int pack = i % kPacks, at = i / kPacks, pixel = at / kImages;
    const int n = place.n0 + at % kImages, y = place.y0 + pixel / T::kSide, x = place.x0 + pixel % T::kSide;
    const int channel = place.k0 + pack * 8;
    if (n >= p.n || y >= p.oh || x >= p.ow || channel >= p.k) continue;
    auto* to = static_cast<__nv_bfloat16*>(p.out) + ((int64_t{n} * p.oh + y) * p.ow + x) * p.k + channel;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(out + at * T::kOutPitch + pack * 8);
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) sparse_conv2d(const SparseConv2d p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp / T::kPanels;
  const int k_blocks = (p.k + T::kChannels - 1) / T::kChannels;
  const int tiles_x = (p.ow + T::kSide - 1) / T::kSide, tiles_y = (p.oh + T::kSide - 1) / T::kSide;
  // Blocks of the same pixels run side by side, for the L2 cache.
  int rest = static_cast<int>(blockIdx.x);
  Place place;
  place.k0 = rest % k_blocks * T::kChannels, rest /= k_blocks;
  place.x0 = rest % tiles_x * T::kSide, rest /= tiles_x;
  place.y0 = rest % tiles_y * T::kSide;
  place.n0 = rest / tiles_y * kImages;
  const int chunks = chunks_of(p.c), first_k = place.k0 + warp % T::kPanels * kPanel;
  const int words = list_words(p.c, p.r * p.s);

  float sums[T::kPixels][4];
  float bias[2] = {0, 0};
  if (p.bias != nullptr) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int k = first_k + lane / 4 + e * 8;
      if (k < p.k) bias[e] = __ldg(p.bias + k);
    }
  }
#pragma unroll
  for (int i = 0; i < T::kPixels; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i][e] = bias[e / 2];
  }

  const uint32_t base = hopper::shared_address(shared);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int32_t* list = p.columns + (int64_t{first_k / kPanel} * chunks + chunk) * words;
    const int steps = first_k < p.k ? __ldg(list) : 0;
    // Also waits until all have multiplied by the chunk before. Channels that no panel reads are not loaded.
    if (!__syncthreads_or(steps > 0)) continue;
    load_input<T>(p, place, chunk, shared);
    __syncthreads();
    const auto* at = reinterpret_cast<const unsigned char*>(list + kHeader);
    Columns next;
    if (T::kAhead && steps > 0) next = load_columns(at, lane);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Columns now = T::kAhead ? next : load_columns(at, lane);
      at += kStepWords * 4;
      if (T::kAhead && step + 1 < steps) next = load_columns(at, lane);
      const uint32_t unit = channel_unit<T::kPitch>(now.place % kChunk) + now.place / kChunk;
      multiply<T>(sums, base + unit * 16, part, now.first, now.second);
    }
  }
  __syncthreads();
  store_output<T>(p, place, sums, shared);
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
int64_t blocks_of(const SparseConv2d& p) {
  return divided_up(p.n, kImages) * divided_up(p.oh, T::kSide) * divided_up(p.ow, T::kSide) *
         divided_up(p.k, T::kChannels);
}

template <class T>
void run(const SparseConv2d& p, cudaStream_t stream) {
  check("sparse_conv2d",
        cudaFuncSetAttribute(sparse_conv2d<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kShared));
  launch("sparse_conv2d", sparse_conv2d<T>, blocks_of<T>(p), T::kThreads, T::kShared, stream, p);
}

}  // namespace

void sparse_conv2d_cuda(const SparseConv2d& p, int device, void* stream) {
  if (p.r > 3 || p.s > 3 || p.c % 8 != 0 || p.k % 8 != 0 || (p.stride != 1 && p.stride != 2)) {
    throw std::invalid_argument("sparse_conv2d: not a filter, stride or number of channels that it takes");
  }
  if (int64_t{p.h} * p.w_in * p.c > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("sparse_conv2d: an image is too large");
  }
  const DeviceGuard guard("sparse_conv2d", device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.stride == 2) return run<Tile<4, 2, 8, 2>>(p, on);
  // 7 x 7 tiles cost 50 pixels, and see less of a border.
  const int64_t of_7 = divided_up(p.oh, 7) * divided_up(p.ow, 7) * 50;
  const int64_t of_4 = divided_up(p.oh, 4) * divided_up(p.ow, 4) * 16;
  if (of_7 * 10 > of_4 * 12) return run<Tile<4, 1, 8, 2>>(p, on);
  // Blocks of many channels load the input less often, as long as there are enough of them.
  using Large = Tile<7, 1, 8, 2>;
  using Small = Tile<7, 1, 4, 4>;
  int multiprocessors = 0;
  check("sparse_conv2d", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const bool large = p.k > Small::kChannels && blocks_of<Large>(p) * 4 >= int64_t{multiprocessors} * 3;
  large ? run<Large>(p, on) : run<Small>(p, on);
}

}  // namespace rtk
