// The lists of sparse_conv2d (sparse_conv2d.h), of several weights in one launch. A block makes one list.
//
// Legend: C input channels, K output channels, R S filter.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/sparse_conv2d.h"
#include "rtk.h"

namespace rtk {
namespace {

using namespace sparse;

constexpr int kThreads = 256;
constexpr int kGroups = 8;  // of banks, sixteen bytes each: the eight rows that ldmatrix reads together meet there
constexpr int kColumns = kTaps * kChunk;
constexpr uint16_t kNone = 0xffff;
constexpr int kPerThread = (kColumns + kThreads - 1) / kThreads;
static_assert(kThreads / 32 == kGroups && kColumns % kStepColumns == 0);

struct Layer {
  const uint16_t* w;
  int32_t* out;
  int k, c, s, taps, first_block;
};
struct Layers {
  Layer at[kSparseColumnsWeights];
  int count;
};

// Where an element of a piece of 16 rows and 16 columns is, in the order in which a lane of mma.m16n8k16 holds
// its eight of A.
__device__ inline int fragment(int row, int column) {
  const int lane = row % 8 * 4 + column % 8 / 2;
  return lane * 8 + column / 8 * 4 + row / 8 * 2 + column % 2;
}

__device__ inline const Layer& layer_of(const Layers& layers, int block) {
  int low = 0, high = layers.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (layers.at[middle].first_block <= block ? low : high) = middle;
  }
  return layers.at[low];
}

// Where the n-th column of a group of banks goes: into the n-th matrix, the eight columns that ldmatrix reads
// together, so that they are of different groups. What a group has more than there are matrices fills the holes
// that others leave, beginning with the last matrix, where most are.
__device__ inline int position(const int (&counts)[kGroups], int matrices, int group, int n) {
  int before = 0, over = 0;
#pragma unroll
  for (int other = 0; other < kGroups; ++other) {
    before += other < group && counts[other] > n;
    over += min(max(counts[other] - matrices, 0), n - matrices);
  }
  if (n < matrices) return n * kGroups + before;
  over += before;
  for (int matrix = matrices - 1;; --matrix) {
    int taken = 0;
#pragma unroll
    for (int other = 0; other < kGroups; ++other) taken += counts[other] > matrix;
    if (over < kGroups - taken) return matrix * kGroups + taken + over;
    over -= kGroups - taken;
  }
}

__global__ void __launch_bounds__(kThreads) sparse_columns(const __grid_constant__ Layers layers) {
  __shared__ __align__(16) uint16_t values[kColumns * kPanel];
  __shared__ uint32_t live[kColumns];  // a bit a row; from bit 16 on, the group
  __shared__ uint16_t rank[kColumns];  // in the group
  __shared__ uint16_t places[kColumns];
  __shared__ int counts[kGroups];
  const Layer& layer = layer_of(layers, static_cast<int>(blockIdx.x));
  const int list = static_cast<int>(blockIdx.x) - layer.first_block, chunks = chunks_of(layer.c);
  const int k0 = list / chunks * kPanel, c0 = list % chunks * kChunk;
  const int channels = min(kChunk, layer.c - c0), columns = layer.taps * channels, rows = min(kPanel, layer.k - k0);
  const int64_t row_stride = int64_t{layer.taps} * layer.c;
  const uint16_t* w = layer.w + k0 * row_stride + c0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const auto place_of = [&](int j) {
    const int tap = j / channels;
    return (tap / layer.s * kRow + tap % layer.s) * kChunk + j % channels;
  };
  for (int i = static_cast<int>(threadIdx.x); i < kColumns * kPanel / 8; i += kThreads) {
    reinterpret_cast<uint4*>(values)[i] = make_uint4(0, 0, 0, 0);
  }
  for (int i = static_cast<int>(threadIdx.x); i < kColumns; i += kThreads) places[i] = kNone;
  uint32_t weights[kPerThread][kPanel / 2];  // two rows a word
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int j = i * kThreads + static_cast<int>(threadIdx.x);
    uint32_t bits = 0;
#pragma unroll
    for (int row = 0; row < kPanel; ++row) {
      uint32_t value = 0;
      if (j < columns && row < rows) {
        value = __ldg(w + row * row_stride + int64_t{j / channels} * layer.c + j % channels);
      }
      weights[i][row / 2] = row % 2 ? weights[i][row / 2] | value << 16 : value;
      bits |= static_cast<uint32_t>((value & 0x7fff) != 0) << row;  // -0 is zero too
    }
    if (j < columns) {
      const int c = j % channels, group = (channel_unit<7>(c) + place_of(j) / kChunk) % kGroups;
      live[j] = bits | static_cast<uint32_t>(group) << kPanel;
    }
  }
  __syncthreads();

  int count = 0;  // of this warp's group
  for (int first = 0; first < columns; first += 32) {
    const int j = first + lane;
    const uint32_t word = j < columns ? live[j] : 0;
    const bool mine = (word & 0xffff) != 0 && word >> kPanel == static_cast<uint32_t>(warp);
    const uint32_t all = __ballot_sync(~0u, mine);
    if (mine) rank[j] = static_cast<uint16_t>(count + __popc(all & ((1u << lane) - 1)));
    count += __popc(all);
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();

  int total = 0;
  for (const int each : counts) total += each;
  const int steps = (total + kStepColumns - 1) / kStepColumns, padded = steps * kStepColumns;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int j = i * kThreads + static_cast<int>(threadIdx.x);
    if (j >= columns || (live[j] & 0xffff) == 0) continue;
    const int at = position(counts, padded / kGroups, static_cast<int>(live[j] >> kPanel), rank[j]);
    places[at] = static_cast<uint16_t>(place_of(j));
#pragma unroll
    for (int row = 0; row < kPanel; ++row) {
      values[at / 16 * 256 + fragment(row, at % 16)] = static_cast<uint16_t>(weights[i][row / 2] >> row % 2 * 16);
    }
  }
  __syncthreads();
  int32_t* out = layer.out + int64_t{list} * list_words(layer.c, layer.taps);
  for (int at = static_cast<int>(threadIdx.x); at < padded; at += kThreads) {
    // Columns of zeros lie where another is read anyway, in the same matrix if it has any.
    uint16_t place = places[at];
    if (place == kNone) place = places[at / kGroups * kGroups];
    if (place == kNone) place = places[0];
    out[kHeader + at / kStepColumns * kStepWords + at % kStepColumns] = place;
  }
  constexpr int kQuads = kStepColumns * kPanel / 8;  // of a step's weights
  auto* to = reinterpret_cast<uint4*>(out + kHeader + kStepColumns);
  for (int i = static_cast<int>(threadIdx.x); i < steps * kQuads; i += kThreads) {
    to[i / kQuads * (kStepWords / 4) + i % kQuads] = reinterpret_cast<const uint4*>(values)[i];
  }
  if (threadIdx.x == 0) *reinterpret_cast<int4*>(out) = make_int4(steps, 0, 0, 0);
}

}  // namespace

void sparse_columns_cuda(const std::vector<SparseColumns>& weights, int device, void* stream) {
  const DeviceGuard guard("sparse_columns", device);
  for (size_t first = 0; first < weights.size(); first += kSparseColumnsWeights) {
    Layers layers{};
    int64_t blocks = 0;
    layers.count = static_cast<int>(std::min(weights.size() - first, size_t{kSparseColumnsWeights}));
    for (int i = 0; i < layers.count; ++i) {
      const SparseColumns& p = weights[first + i];
      if (p.r > 3 || p.s > 3) throw std::invalid_argument("sparse_columns: the filter is 3 x 3 at most");
      layers.at[i] = {static_cast<const uint16_t*>(p.w), p.out, p.k, p.c, p.s, p.r * p.s, static_cast<int>(blocks)};
      blocks += int64_t{panels_of(p.k)} * chunks_of(p.c);
    }
    launch("sparse_columns", sparse_columns, blocks, kThreads, 0, static_cast<cudaStream_t>(stream), layers);
  }
}

}  // namespace rtk
