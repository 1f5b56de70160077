// One SGD step on the scores of a learned mask, all layers of a model in one launch.
//
// Straight-through estimation: the gradient of a score is the weight times the dense gradient of the masked
// weight. Every element is read and written once, 22 bytes a weight under bf16 gradients, so all that matters
// is that enough loads are under way: a thread asks for all of its eight elements before it uses one.

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

struct Piece {
  float *scores, *buffer;
  const float* weight;
  const void* grad;
  uint32_t size, first_tile;
  bool vectors;  // all four addresses allow loads of four elements
};

template <int Capacity>
struct Table {
  const float* device_lr;
  float lr, momentum, weight_decay;
  uint32_t pieces;
  bool nesterov;
  Piece piece[Capacity];
};
static_assert(sizeof(Table<kFew>) <= 4096 && sizeof(Table<kMany>) <= 32764);

struct Rates {
  float lr, momentum, weight_decay;
  bool nesterov;
};

__device__ float4 load_grad(const float* grad) { return __ldcs(reinterpret_cast<const float4*>(grad)); }
__device__ float4 load_grad(const __nv_bfloat16* grad) {
  const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(grad));
  return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}
__device__ float one_grad(float grad) { return grad; }
__device__ float one_grad(__nv_bfloat16 grad) { return __bfloat162float(grad); }

// Rounded after every operation but for the last of each line, as torch's foreach functions are.
__device__ void step(float& score, float& buffer, float weight, float grad, const Rates& rates) {
  const float g = fmaf(rates.weight_decay, score, __fmul_rn(weight, grad));
  buffer = __fadd_rn(__fmul_rn(rates.momentum, buffer), g);
  const float direction = rates.nesterov ? fmaf(rates.momentum, buffer, g) : buffer;
  score = fmaf(-rates.lr, direction, score);
}

template <class Grad, int Capacity>
__global__ void __launch_bounds__(kThreads) score_step(const __grid_constant__ Table<Capacity> table) {
  // The piece of this block's tile: the last that does not begin after it. Tiles of empty pieces there are none.
  uint32_t lo = 0, hi = table.pieces - 1;
  while (lo < hi) {
    const uint32_t middle = (lo + hi + 1) / 2;
    if (table.piece[middle].first_tile <= blockIdx.x) {
      lo = middle;
    } else {
      hi = middle - 1;
    }
  }
  const Piece& piece = table.piece[lo];
  const uint32_t begin = (blockIdx.x - piece.first_tile) * kTile, at = begin + 4 * threadIdx.x;
  const Rates rates{table.device_lr != nullptr ? *table.device_lr : table.lr, table.momentum, table.weight_decay,
                    table.nesterov};
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
      step(s[j].x, b[j].x, w[j].x, g[j].x, rates);
      step(s[j].y, b[j].y, w[j].y, g[j].y, rates);
      step(s[j].z, b[j].z, w[j].z, g[j].z, rates);
      step(s[j].w, b[j].w, w[j].w, g[j].w, rates);
      *reinterpret_cast<float4*>(piece.scores + i) = s[j];  // stays in L2: the selection reads it next
      __stcs(reinterpret_cast<float4*>(piece.buffer + i), b[j]);
    }
    return;
  }
  const uint32_t end = min(begin + kTile, piece.size);  // below 2^31: the sum does not overflow
  for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) {
    float s = piece.scores[i], b = piece.buffer[i];
    step(s, b, piece.weight[i], one_grad(grad[i]), rates);
    piece.scores[i] = s;
    piece.buffer[i] = b;
  }
}

bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <int Capacity>
void run(const ScoreStep& p, cudaStream_t stream) {
  const size_t grad_bytes = p.grad_dtype == DType::f32 ? 16 : 8;
  Table<Capacity> table{p.device_lr, p.lr, p.momentum, p.weight_decay, 0, p.nesterov, {}};
  int64_t tiles = 0;
  for (size_t i = 0; i < p.sizes.size(); ++i) {
    if (p.sizes[i] == 0) continue;
    const bool vectors = aligned(p.scores[i], 16) && aligned(p.buffers[i], 16) && aligned(p.weights[i], 16) &&
                         aligned(p.grads[i], grad_bytes);
    table.piece[table.pieces++] = {p.scores[i],
                                   p.buffers[i],
                                   p.weights[i],
                                   p.grads[i],
                                   static_cast<uint32_t>(p.sizes[i]),
                                   static_cast<uint32_t>(tiles),
                                   vectors};
    tiles += (p.sizes[i] + kTile - 1) / kTile;
  }
  if (tiles == 0) return;
  if (p.grad_dtype == DType::f32) {
    launch("score_step", score_step<float, Capacity>, tiles, kThreads, 0, stream, table);
  } else {
    launch("score_step", score_step<__nv_bfloat16, Capacity>, tiles, kThreads, 0, stream, table);
  }
}

}  // namespace

void score_step_cuda(const ScoreStep& p, int device, void* stream_address) {
  if (p.grad_dtype != DType::f32 && p.grad_dtype != DType::bf16) {
    throw std::invalid_argument("score_step: gradients must be f32 or bf16");
  }
  if (p.sizes.size() > static_cast<size_t>(kMany) ||
      std::any_of(p.sizes.begin(), p.sizes.end(), [](int64_t size) { return size < 0 || size >= INT64_C(1) << 31; })) {
    throw std::invalid_argument("score_step: too many tensors, or one of 2^31 elements or more");
  }
  const DeviceGuard guard("score_step", device);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_address);
  p.sizes.size() <= static_cast<size_t>(kFew) ? run<kFew>(p, stream) : run<kMany>(p, stream);
}

}  // namespace rtk
