// One SGD step on the scores of a learned mask, all layers of a model in one launch.
//
// Straight-through estimation: the gradient of a score is the weight times the dense gradient of the masked
// weight. Every element is read and written once, 22 bytes a weight under bf16 gradients, so all that matters
// is that enough loads are under way: a thread asks for all of its eight elements before it uses one.
//
// Where weights share a score, a thread, a warp or a block sums over each group, by its size, in an order that is
// always the same. A group is a box along at most two strides of memory: layers in any layout, and groups by row,
// kernel, channel or tile, are such, once axes that follow each other are taken together. Layers with one score a
// weight may stand between.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/launch.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kThreads = 256;
constexpr int kQuads = 2;  // of four elements each, that a thread handles
constexpr uint32_t kQuadStep = 4 * kThreads, kTile = kQuads * kQuadStep;

// What a launch takes as an argument: 4 KB everywhere, 32,764 bytes on what is built here.
constexpr int kFew = 80, kMany = kScoreStepTensors;
constexpr int kFewGrouped = 64, kManyGrouped = kScoreGroupsTensors;

constexpr uint32_t kWarp = 32;
constexpr int64_t kMostOfThread = 16, kMostOfWarp = 2048;  // weights of a group

struct Piece {
  float *scores, *buffer;
  const float* weight;
  const void* grad;
  uint32_t size, first_block;
  bool vectors;  // all four addresses allow loads of four elements
};

// Divides by a number, exactly for dividends below 2^31 (Granlund and Montgomery 1994).
struct Divider {
  uint32_t by, magic, shift;
};

struct Axis {
  Divider count;
  uint32_t step, score_step;
};

struct Side {
  uint32_t most, size, stride, axis;
};

struct GroupedPiece : Piece {  // `size` counts groups; `lanes` 0 is a plain piece, of elements
  uint32_t lanes;
  Axis axis[kScoreAxes];
  Side outer, inner;
};

struct Rates {
  float lr, momentum, weight_decay;
  bool nesterov;
};

template <class Piece, int Capacity>
struct Table {
  const float* device_lr;
  Rates rates;
  uint32_t pieces;
  Piece piece[Capacity];

  // The piece of this block: the last that does not begin after it. Of empty pieces there are no blocks.
  __device__ const Piece& mine() const {
    uint32_t lo = 0, hi = pieces - 1;
    while (lo < hi) {
      const uint32_t middle = (lo + hi + 1) / 2;
      if (piece[middle].first_block <= blockIdx.x) {
        lo = middle;
      } else {
        hi = middle - 1;
      }
    }
    return piece[lo];
  }
  __device__ Rates current_rates() const {
    Rates now = rates;
    if (device_lr != nullptr) now.lr = *device_lr;
    return now;
  }
};
static_assert(sizeof(Table<Piece, kFew>) <= 4096 && sizeof(Table<Piece, kMany>) <= 32764);
static_assert(sizeof(Table<GroupedPiece, kManyGrouped>) <= 32764);

__device__ float4 load_grad(const float* grad) { return __ldcs(reinterpret_cast<const float4*>(grad)); }
__device__ float4 load_grad(const __nv_bfloat16* grad) {
  const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(grad));
  return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}
__device__ float one_grad(float grad) { return grad; }
__device__ float one_grad(__nv_bfloat16 grad) { return __bfloat162float(grad); }

// Rounded after every operation but for the last of each line, as torch's foreach functions are.
__device__ void step(float& score, float& buffer, float product, const Rates& rates) {
  const float g = fmaf(rates.weight_decay, score, product);
  buffer = __fadd_rn(__fmul_rn(rates.momentum, buffer), g);
  const float direction = rates.nesterov ? fmaf(rates.momentum, buffer, g) : buffer;
  score = fmaf(-rates.lr, direction, score);
}

template <class Grad>
__device__ void step_elements(const Piece& piece, const Rates& rates) {
  const uint32_t begin = (blockIdx.x - piece.first_block) * kTile, at = begin + 4 * threadIdx.x;
  const Grad* const grad = static_cast<const Grad*>(piece.grad);
  if (piece.vectors && piece.size - begin >= kTile) {
    float4 s[kQuads], b[kQuads], w[kQuads], g[kQuads];
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const uint32_t i = at + j * kQuadStep;
      s[j] = *reinterpret_cast<const float4*>(piece.scores + i);
      b[j] = __ldcs(reinterpret_cast<const float4*>(piece.buffer + i));
      w[j] = *reinterpret_cast<const float4*>(piece.weight + i);
      g[j] = load_grad(grad + i);
    }
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
      const uint32_t i = at + j * kQuadStep;
      step(s[j].x, b[j].x, __fmul_rn(w[j].x, g[j].x), rates);
      step(s[j].y, b[j].y, __fmul_rn(w[j].y, g[j].y), rates);
      step(s[j].z, b[j].z, __fmul_rn(w[j].z, g[j].z), rates);
      step(s[j].w, b[j].w, __fmul_rn(w[j].w, g[j].w), rates);
      *reinterpret_cast<float4*>(piece.scores + i) = s[j];  // stays in L2: the selection reads it next
      __stcs(reinterpret_cast<float4*>(piece.buffer + i), b[j]);
    }
    return;
  }
  const uint32_t end = min(begin + kTile, piece.size);  // below 2^31: the sum does not overflow
  for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) {
    float s = piece.scores[i], b = piece.buffer[i];
    step(s, b, __fmul_rn(piece.weight[i], one_grad(grad[i])), rates);
    piece.scores[i] = s;
    piece.buffer[i] = b;
  }
}

// The share of one of `Lanes` threads in the sum of weight * grad over a box of outer x inner elements, every
// Lanes-th of them; it asks for `Batch` before it uses one.
template <uint32_t Lanes, int Batch, class Grad>
__device__ float share(const float* weight, const Grad* grad, uint32_t outer, uint32_t inner, uint32_t outer_stride,
                       uint32_t inner_stride, uint32_t lane) {
  const uint32_t elements = outer * inner;
  const uint32_t jump = Lanes == 1 ? (inner == 1 ? 1 : 0) : Lanes / inner, rest = Lanes - jump * inner;
  uint32_t row = Lanes == 1 ? 0 : lane / inner, column = lane - row * inner;
  float sum = 0.0f;
  for (uint32_t first = lane; first < elements; first += Batch * Lanes) {
    float w[Batch], g[Batch];
#pragma unroll
    for (int j = 0; j < Batch; ++j) {
      const bool inside = first + j * Lanes < elements;
      const uint32_t at = row * outer_stride + column * inner_stride;
      w[j] = inside ? weight[at] : 0.0f;
      g[j] = inside ? one_grad(grad[at]) : 0.0f;
      row += jump;
      column += rest;
      if (column >= inner) {
        column -= inner;
        ++row;
      }
    }
#pragma unroll
    for (int j = 0; j < Batch; ++j) sum = fmaf(w[j], g[j], sum);
  }
  return sum;
}

__device__ float warp_sum(float sum) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return sum;
}

template <uint32_t Lanes, class Grad>
__device__ void step_groups(const GroupedPiece& piece, const Rates& rates) {
  const uint32_t group = (blockIdx.x - piece.first_block) * (kThreads / Lanes) + threadIdx.x / Lanes;
  const uint32_t lane = threadIdx.x % Lanes;
  if (group >= piece.size) return;  // all lanes of it; where those are a block there is none too many

  uint32_t rest = group, at = 0, score_at = 0, outer = piece.outer.most, inner = piece.inner.most;
#pragma unroll
  for (uint32_t i = 0; i < kScoreAxes; ++i) {
    const Axis& axis = piece.axis[i];
    const uint32_t quotient = (__umulhi(rest, axis.count.magic) + rest) >> axis.count.shift;
    const uint32_t index = rest - quotient * axis.count.by;
    rest = quotient;
    at += index * axis.step;
    score_at += index * axis.score_step;
    if (piece.outer.axis == i) outer = min(outer, piece.outer.size - index * piece.outer.most);
    if (piece.inner.axis == i) inner = min(inner, piece.inner.size - index * piece.inner.most);
  }
  float s = 0.0f, b = 0.0f;
  if (lane == 0) {
    s = piece.scores[score_at];
    b = piece.buffer[score_at];
  }
  constexpr int kBatch = Lanes == 1 ? 4 : 8;
  float sum = share<Lanes, kBatch>(piece.weight + at, static_cast<const Grad*>(piece.grad) + at, outer, inner,
                                   piece.outer.stride, piece.inner.stride, lane);
  if constexpr (Lanes > 1) sum = warp_sum(sum);
  if constexpr (Lanes > kWarp) {
    __shared__ float of_warp[Lanes / kWarp];
    if (lane % kWarp == 0) of_warp[lane / kWarp] = sum;
    __syncthreads();
    if (lane != 0) return;
    sum = of_warp[0];
#pragma unroll
    for (uint32_t i = 1; i < Lanes / kWarp; ++i) sum += of_warp[i];
  }
  if (lane == 0) {
    step(s, b, sum, rates);
    piece.scores[score_at] = s;
    piece.buffer[score_at] = b;
  }
}

template <class Grad, int Capacity>
__global__ void __launch_bounds__(kThreads) score_step(const __grid_constant__ Table<Piece, Capacity> table) {
  step_elements<Grad>(table.mine(), table.current_rates());
}

template <class Grad, int Capacity>
__global__ void __launch_bounds__(kThreads)
    score_step_grouped(const __grid_constant__ Table<GroupedPiece, Capacity> table) {
  const GroupedPiece& piece = table.mine();
  const Rates rates = table.current_rates();
  switch (piece.lanes) {  // the same for all of a block
    case 0: step_elements<Grad>(piece, rates); break;
    case 1: step_groups<1, Grad>(piece, rates); break;
    case kWarp: step_groups<kWarp, Grad>(piece, rates); break;
    default: step_groups<kThreads, Grad>(piece, rates);
  }
}

bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

Piece piece_of(const ScoreStep& p, size_t i, int64_t size, int64_t first_block) {
  const size_t grad_bytes = p.grad_dtype == DType::f32 ? 16 : 8;
  const bool vectors = aligned(p.scores[i], 16) && aligned(p.buffers[i], 16) && aligned(p.weights[i], 16) &&
                       aligned(p.grads[i], grad_bytes);
  return {p.scores[i],
          p.buffers[i],
          p.weights[i],
          p.grads[i],
          static_cast<uint32_t>(size),
          static_cast<uint32_t>(first_block),
          vectors};
}

int64_t tiles_of(int64_t elements) { return (elements + kTile - 1) / kTile; }

template <class Piece, int Capacity>
Table<Piece, Capacity> empty_table(const ScoreStep& p) {
  return {p.device_lr, {p.lr, p.momentum, p.weight_decay, p.nesterov}, 0, {}};
}

template <int Capacity>
void run(const ScoreStep& p, cudaStream_t stream) {
  auto table = empty_table<Piece, Capacity>(p);
  int64_t blocks = 0;
  for (size_t i = 0; i < p.sizes.size(); ++i) {
    if (p.sizes[i] == 0) continue;
    table.piece[table.pieces++] = piece_of(p, i, p.sizes[i], blocks);
    blocks += tiles_of(p.sizes[i]);
  }
  if (blocks == 0) return;
  if (p.grad_dtype == DType::f32) {
    launch("score_step", score_step<float, Capacity>, blocks, kThreads, 0, stream, table);
  } else {
    launch("score_step", score_step<__nv_bfloat16, Capacity>, blocks, kThreads, 0, stream, table);
  }
}

Divider divider(int64_t by) {
  uint32_t shift = 0;
  while ((INT64_C(1) << shift) < by) ++shift;
  const uint64_t magic = ((UINT64_C(1) << 32) * ((UINT64_C(1) << shift) - static_cast<uint64_t>(by))) / by + 1;
  return {static_cast<uint32_t>(by), static_cast<uint32_t>(magic), shift};
}

Side side(const ScoreGroups& of, int i) {
  return {static_cast<uint32_t>(of.most[i]), static_cast<uint32_t>(of.size[i]), static_cast<uint32_t>(of.stride[i]),
          static_cast<uint32_t>(of.axis[i])};
}

template <int Capacity>
void run_grouped(const ScoreStep& p, cudaStream_t stream) {
  auto table = empty_table<GroupedPiece, Capacity>(p);
  int64_t blocks = 0;
  for (size_t i = 0; i < p.sizes.size(); ++i) {
    if (p.sizes[i] == 0) continue;
    GroupedPiece piece{};
    const ScoreGroups& of = p.groups[i];
    if (of.counts[0] == 0) {
      static_cast<Piece&>(piece) = piece_of(p, i, p.sizes[i], blocks);
      blocks += tiles_of(p.sizes[i]);
    } else {
      int64_t groups = 1;
      for (int j = 0; j < kScoreAxes; ++j) {
        groups *= of.counts[j];
        piece.axis[j] = {divider(of.counts[j]), static_cast<uint32_t>(of.steps[j]),
                         static_cast<uint32_t>(of.score_steps[j])};
      }
      const int64_t weights = of.most[0] * of.most[1];
      static_cast<Piece&>(piece) = piece_of(p, i, groups, blocks);
      piece.lanes = weights <= kMostOfThread ? 1u : weights <= kMostOfWarp ? kWarp : uint32_t{kThreads};
      piece.outer = side(of, 0);
      piece.inner = side(of, 1);
      blocks += (groups * piece.lanes + kThreads - 1) / kThreads;
    }
    table.piece[table.pieces++] = piece;
  }
  if (blocks == 0) return;
  if (p.grad_dtype == DType::f32) {
    launch("score_step", score_step_grouped<float, Capacity>, blocks, kThreads, 0, stream, table);
  } else {
    launch("score_step", score_step_grouped<__nv_bfloat16, Capacity>, blocks, kThreads, 0, stream, table);
  }
}

bool too_large(int64_t size) { return size < 0 || size >= INT64_C(1) << 31; }

bool out_of_range(const ScoreGroups& of) {
  if (of.counts[0] == 0) return false;  // a score a weight
  int64_t groups = 1;
  for (int i = 0; i < kScoreAxes; ++i) {
    if (too_large(of.counts[i]) || too_large(of.steps[i]) || too_large(of.score_steps[i])) return true;
    groups *= of.counts[i];
    if (too_large(groups)) return true;
  }
  for (int i = 0; i < 2; ++i) {
    if (of.most[i] < 1 || too_large(of.most[i]) || too_large(of.size[i]) || too_large(of.stride[i])) return true;
  }
  return groups == 0;
}

}  // namespace

void score_step_cuda(const ScoreStep& p, int device, void* stream_address) {
  if (p.grad_dtype != DType::f32 && p.grad_dtype != DType::bf16) {
    throw std::invalid_argument("score_step: gradients must be f32 or bf16");
  }
  const size_t most = p.groups.empty() ? kMany : kManyGrouped;
  if (p.sizes.size() > most || std::any_of(p.sizes.begin(), p.sizes.end(), too_large) ||
      std::any_of(p.groups.begin(), p.groups.end(), out_of_range)) {
    throw std::invalid_argument("score_step: too many tensors, or one of 2^31 elements or more");
  }
  const DeviceGuard guard("score_step", device);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_address);
  if (p.groups.empty()) {
    p.sizes.size() <= static_cast<size_t>(kFew) ? run<kFew>(p, stream) : run<kMany>(p, stream);
  } else {
    p.sizes.size() <= static_cast<size_t>(kFewGrouped) ? run_grouped<kFewGrouped>(p, stream)
                                                       : run_grouped<kManyGrouped>(p, stream);
  }
}

}  // namespace rtk
