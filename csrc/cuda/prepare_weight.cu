// The weight that a convolution runs on: masked and cast in one pass over memory.
//
// Two kernels: eight elements a thread where the three tensors are dense in one order and aligned,
// and one element a thread over strides (other layouts, broadcast masks, f64) else. Both wait for
// nothing and run on the caller's stream. The first takes the weights of many layers at once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;

struct B1 {
  uint8_t value;
};

__device__ float to_float(float v) { return v; }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float to_float(__half v) { return __half2float(v); }
template <class T>
__device__ T from_float(float v);
template <>
__device__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// A bool mask selects, so that a pruned weight is +0 even where it was NaN or negative.
template <class Value>
__device__ Value masked(Value w, B1 mask) {
  return mask.value ? w : Value(0);
}
template <class Value>
__device__ Value masked(Value w, float mask) {
  return w * mask;
}

template <class T>
struct alignas(sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16) Pack {
  T at[kVector];
};

// Weights of some layers, each a run of elements; a block's part of the work begins at its first block.
constexpr int kMostRuns = 96;  // what a kernel's arguments have room for

template <class W, class Mask, class Out>
struct Runs {
  struct Run {
    const W* w;
    const Mask* mask;
    Out* out;
    int64_t count, first_block;
  } at[kMostRuns];
  int runs;
};

template <class W, class Mask, class Out>
__global__ void __launch_bounds__(kThreads) prepare_dense(const __grid_constant__ Runs<W, Mask, Out> p) {
  int low = 0, high = p.runs;  // the run of this block is the last that begins no later
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.at[middle].first_block <= blockIdx.x ? low : high) = middle;
  }
  const auto [w, mask, out, count, first_block] = p.at[low];
  const int64_t first = ((blockIdx.x - first_block) * kThreads + threadIdx.x) * kVector;
  if (first + kVector <= count) {
    const Pack<W> ws = *reinterpret_cast<const Pack<W>*>(w + first);
    const Pack<Mask> masks = *reinterpret_cast<const Pack<Mask>*>(mask + first);
    Pack<Out> outs;
#pragma unroll
    for (int i = 0; i < kVector; ++i) outs.at[i] = from_float<Out>(masked(to_float(ws.at[i]), masks.at[i]));
    *reinterpret_cast<Pack<Out>*>(out + first) = outs;
  } else {
    for (int64_t i = first; i < count; ++i) out[i] = from_float<Out>(masked(to_float(w[i]), mask[i]));
  }
}

template <class Value>
__device__ Value load(const void* base, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(base)[at];
    case DType::f64: return static_cast<Value>(static_cast<const double*>(base)[at]);
    case DType::bf16: return to_float(static_cast<const __nv_bfloat16*>(base)[at]);
    default: return to_float(static_cast<const __half*>(base)[at]);
  }
}

template <class Value>
__device__ void store(void* base, DType dtype, int64_t at, Value v) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(base)[at] = static_cast<float>(v); break;
    case DType::f64: static_cast<double*>(base)[at] = v; break;
    case DType::bf16: static_cast<__nv_bfloat16*>(base)[at] = from_float<__nv_bfloat16>(static_cast<float>(v)); break;
    default: static_cast<__half*>(base)[at] = from_float<__half>(static_cast<float>(v));
  }
}

// Value: the product's type, double for an f64 weight. Index: 32 bits where every offset fits, as
// divisions of 64 bits are slow. Neighbouring threads write neighbouring elements: the dimensions
// come sorted by the output's strides.
template <class Value, class Index>
__global__ void __launch_bounds__(kThreads) prepare_strided(const __grid_constant__ PrepareWeight p, Index count) {
  const int64_t flat = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (flat >= count) return;
  Index rest = static_cast<Index>(flat);
  int64_t w_at = 0, mask_at = 0, out_at = 0;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    const Index size = static_cast<Index>(p.sizes[d]), index = rest % size;
    rest /= size;
    w_at += index * p.w_strides[d];
    mask_at += index * p.mask_strides[d];
    out_at += index * p.out_strides[d];
  }
  const Value w = load<Value>(p.w, p.w_dtype, w_at);
  const Value product = p.mask_dtype == DType::b1 ? masked(w, static_cast<const B1*>(p.mask)[mask_at])
                                                  : w * load<Value>(p.mask, p.mask_dtype, mask_at);
  store<Value>(p.out, p.out_dtype, out_at, product);
}

int64_t count_of(const PrepareWeight& p) { return p.sizes[0] * p.sizes[1] * p.sizes[2] * p.sizes[3]; }

// Dimensions from the largest output stride to the smallest, size 1 first.
PrepareWeight sorted(const PrepareWeight& p) {
  int order[4] = {0, 1, 2, 3};
  std::stable_sort(order, order + 4, [&p](int a, int b) {
    return (p.sizes[a] == 1) != (p.sizes[b] == 1) ? p.sizes[a] == 1 : p.out_strides[a] > p.out_strides[b];
  });
  PrepareWeight s = p;
  for (int d = 0; d < 4; ++d) {
    s.sizes[d] = p.sizes[order[d]];
    s.w_strides[d] = p.w_strides[order[d]];
    s.mask_strides[d] = p.mask_strides[order[d]];
    s.out_strides[d] = p.out_strides[order[d]];
  }
  return s;
}

// Whether all three tensors are one run of elements in the order of a `sorted` argument.
bool dense(const PrepareWeight& p) {
  int64_t step = 1;
  for (int d = 3; d >= 0; --d) {
    if (p.sizes[d] != 1 && (p.w_strides[d] != step || p.mask_strides[d] != step || p.out_strides[d] != step)) {
      return false;
    }
    step *= p.sizes[d];
  }
  return true;
}

bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <class W, class Mask, class Out>
bool launch_dense(const std::vector<PrepareWeight>& all, cudaStream_t stream) {
  for (const PrepareWeight& p : all) {
    if (!aligned(p.w, alignof(Pack<W>)) || !aligned(p.mask, alignof(Pack<Mask>)) ||
        !aligned(p.out, alignof(Pack<Out>))) {
      return false;
    }
  }
  for (size_t first = 0; first < all.size(); first += kMostRuns) {
    Runs<W, Mask, Out> runs;
    runs.runs = static_cast<int>(std::min<size_t>(kMostRuns, all.size() - first));
    int64_t blocks = 0;
    for (int i = 0; i < runs.runs; ++i) {
      const PrepareWeight& p = all[first + i];
      const int64_t count = count_of(p), per_block = kThreads * kVector;
      runs.at[i] = {static_cast<const W*>(p.w), static_cast<const Mask*>(p.mask), static_cast<Out*>(p.out), count,
                    blocks};
      blocks += (count + per_block - 1) / per_block;
    }
    launch("prepare_weight", prepare_dense<W, Mask, Out>, blocks, kThreads, 0, stream, runs);
  }
  return true;
}

template <class W, class Mask>
bool dense_by_out(const std::vector<PrepareWeight>& all, cudaStream_t stream) {
  switch (all[0].out_dtype) {
    case DType::f32: return launch_dense<W, Mask, float>(all, stream);
    case DType::bf16: return launch_dense<W, Mask, __nv_bfloat16>(all, stream);
    case DType::f16: return launch_dense<W, Mask, __half>(all, stream);
    default: return false;
  }
}

template <class W>
bool dense_by_mask(const std::vector<PrepareWeight>& all, cudaStream_t stream) {
  switch (all[0].mask_dtype) {
    case DType::b1: return dense_by_out<W, B1>(all, stream);
    case DType::f32: return dense_by_out<W, float>(all, stream);
    default: return false;
  }
}

// False where the fast kernel does not serve these types, layouts or addresses. All have the types of the first.
bool try_dense(const std::vector<PrepareWeight>& all, cudaStream_t stream) {
  for (const PrepareWeight& p : all) {
    if (!dense(p)) return false;
  }
  switch (all[0].w_dtype) {
    case DType::f32: return dense_by_mask<float>(all, stream);
    case DType::bf16: return dense_by_mask<__nv_bfloat16>(all, stream);
    case DType::f16: return dense_by_mask<__half>(all, stream);
    default: return false;
  }
}

template <class Value>
void launch_strided(const PrepareWeight& p, cudaStream_t stream) {
  const int64_t count = count_of(p), blocks = (count + kThreads - 1) / kThreads;
  if (count <= std::numeric_limits<uint32_t>::max()) {
    launch("prepare_weight", prepare_strided<Value, uint32_t>, blocks, kThreads, 0, stream, p,
           static_cast<uint32_t>(count));
  } else {
    launch("prepare_weight", prepare_strided<Value, int64_t>, blocks, kThreads, 0, stream, p, count);
  }
}

bool is_float(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16 || dtype == DType::f16;
}

}  // namespace

void prepare_weights_cuda(const std::vector<PrepareWeight>& unsorted, int device, void* stream_address) {
  std::vector<PrepareWeight> all;
  for (const PrepareWeight& p : unsorted) {
    if (!is_float(p.w_dtype) || !is_float(p.out_dtype) || !(is_float(p.mask_dtype) || p.mask_dtype == DType::b1)) {
      throw std::invalid_argument(
          "prepare_weight: w and out must be f32, f64, bf16 or f16, the mask one of them or b1");
    }
    if (count_of(p)) all.push_back(sorted(p));
  }
  const DeviceGuard guard("prepare_weight", device);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_address);
  const auto types = [](const PrepareWeight& p) { return std::tuple(p.w_dtype, p.mask_dtype, p.out_dtype); };
  const bool alike = std::all_of(all.begin(), all.end(), [&](const auto& p) { return types(p) == types(all[0]); });
  if (all.empty() || (alike && try_dense(all, stream))) return;
  for (const PrepareWeight& p : all) {
    if (try_dense({p}, stream)) continue;
    p.w_dtype == DType::f64 ? launch_strided<double>(p, stream) : launch_strided<float>(p, stream);
  }
}

void prepare_weight_cuda(const PrepareWeight& p, int device, void* stream) { prepare_weights_cuda({p}, device, stream); }

}  // namespace rtk
