// The L2 step of projected gradient descent in one launch: every tensor is read once.
//
// A cluster of blocks takes an image. Each block copies its part of x_adv, grad and x into shared
// memory asynchronously, and sums, as the pixels arrive, the three products that give both norms:
//
//   |grad|^2 = gg and, with f = step / (|grad| + 1e-10),
//   |delta|^2 = |(x_adv - x) + f grad|^2 = dd + 2 f dg + f^2 gg
//
// So the cluster meets once; then the pixels are taken from shared memory again and written. Where
// the three terms cancel, |delta| is summed directly and the cluster meets once more. Images that do
// not fit are read again from global memory (mostly from L2), by the same kernel. Sums are added in a
// fixed order: the result is the same in every run.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <type_traits>

#include "cuda/launch.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kThreads = 512, kFewThreads = 256, kMostWarps = kThreads / 32;
constexpr int kMostRanks = 8;               // the largest cluster that every GPU with clusters runs
constexpr int64_t kShared = 72 * 1024;      // of a block: three of them share a multiprocessor
constexpr int kStages = 4;                  // the copy's commit groups
constexpr float kDivisionEps = 1e-10f;      // keeps a zero gradient a zero step
constexpr double kCancelled = 0.25;         // of the terms' sum: below it, their rounding would show

struct U8 {
  uint8_t value;
};

__device__ float to_float(float v) { return v; }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float to_float(__half v) { return __half2float(v); }
// value / 255, correctly rounded: the first product is exact (8 by 9 bits), the second tiny.
__device__ float to_float(U8 v) {
  const float u = static_cast<float>(v.value);
  return u * 0x1.01p-8f + u * 0x1.010102p-24f;
}
__device__ void from_float(float v, float& to) { to = v; }
__device__ void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

// NaN stays NaN, as in torch.clamp.
__device__ float clamp(float v, float low, float high) {
  const float raised = v < low ? low : v;
  return raised > high ? high : raised;
}

template <int kBytes>
__device__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
  }
}
__device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The blocks of one image. Without clusters in the hardware a block is alone.
template <bool kRelease>
__device__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kRelease) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
#endif
}
__device__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ const float* in_block(float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

struct Reduction {
  float warps[3][kMostWarps];
  float block[2][3];  // read by the other blocks; one row per meeting
  double image[2][3];
};

// Sums kSums values of every thread over the image, the same to the last bit in all its blocks.
// When it returns, this block has read the others' sums and they may not have read this one's.
template <int kSums>
__device__ void sum_over_image(const float (&sums)[kSums], Reduction& r, int meeting, int ranks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    float v = sums[s];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    if (lane == 0) r.warps[s][warp] = v;
  }
  __syncthreads();
  if (threadIdx.x < kSums) {
    float total = 0;
    for (int w = 0; w < warps; ++w) total += r.warps[threadIdx.x][w];
    r.block[meeting][threadIdx.x] = total;
  }
  if (ranks > 1) {
    __syncwarp();  // the aligned barrier wants whole warps
    cluster_arrive<true>();
    cluster_wait();
  }
  if (threadIdx.x < kSums) {  // the thread that wrote the block's sum, so no barrier for a block alone
    double total = 0;
    if (ranks > 1) {
#pragma unroll
      for (int rank = 0; rank < kMostRanks; ++rank) {
        if (rank < ranks) total += *in_block(&r.block[meeting][threadIdx.x], rank);
      }
    } else {
      total = r.block[meeting][threadIdx.x];
    }
    r.image[meeting][threadIdx.x] = total;
  }
  __syncthreads();
}

// A: x_adv and out, G: grad, X: x. kWidth: pixels a thread takes at once. kKept: the block's pixels
// fit in shared memory. `ranks` blocks take an image, `part` units of kWidth pixels each.
template <class A, class G, class X, int kWidth, bool kKept>
__global__ void __launch_bounds__(kThreads)
    pgd_step_l2(const __grid_constant__ PgdStep p, int ranks, int64_t part) {
  using As = Pack<A, kWidth>;
  using Gs = Pack<G, kWidth>;
  using Xs = Pack<X, kWidth>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Reduction reduction;

  const int64_t image = blockIdx.x / ranks, rank = blockIdx.x % ranks;  // a cluster's blocks are neighbours
  const int64_t units = p.chw / kWidth, first = rank * part;
  const int64_t left = units - first < part ? units - first : part;
  const int64_t offset = image * units + first;
  const As* x_adv = static_cast<const As*>(p.x_adv) + offset;
  const Gs* grad = static_cast<const Gs*>(p.grad) + offset;
  const Xs* x = static_cast<const Xs*>(p.x) + offset;
  As* out = static_cast<As*>(p.out) + offset;
  // A kept part counts in 32 bits. The last ranks of a small image may have nothing to do.
  using Index = std::conditional_t<kKept, int, int64_t>;
  const Index count = static_cast<Index>(left > 0 ? left : 0), step = blockDim.x, mine = threadIdx.x;

  // Each thread copies the pixels that it will use itself, so that it waits for nobody.
  As* kept_adv = reinterpret_cast<As*>(shared);
  Gs* kept_grad = reinterpret_cast<Gs*>(kept_adv + part);
  Xs* kept_x = reinterpret_cast<Xs*>(kept_grad + part);
  const Index per_stage = kKept ? (count + kStages * step - 1) / (kStages * step) * step : count;
  if constexpr (kKept) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      const Index end = min(count, (stage + 1) * per_stage);
      for (Index i = stage * per_stage + mine; i < end; i += step) {
        copy_async<sizeof(Gs)>(kept_grad + i, grad + i);
        copy_async<sizeof(As)>(kept_adv + i, x_adv + i);
        copy_async<sizeof(Xs)>(kept_x + i, x + i);
      }
      commit_copies();
    }
    x_adv = kept_adv;
    grad = kept_grad;
    x = kept_x;
  }

  float sums[3] = {};  // gg, dg, dd
  auto accumulate = [&](Index begin, Index end) {
#pragma unroll 2
    for (Index i = begin + mine; i < end; i += step) {
      const Gs gs = grad[i];
      const As as = x_adv[i];
      const Xs xs = x[i];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float g = to_float(gs.at[j]), d = to_float(as.at[j]) - to_float(xs.at[j]);
        sums[0] += g * g;
        sums[1] += d * g;
        sums[2] += d * d;
      }
    }
  };
  if constexpr (kKept) {
    static_assert(kStages == 4);
    wait_for_copies<3>();
    accumulate(0, min(count, per_stage));
    wait_for_copies<2>();
    accumulate(per_stage, min(count, 2 * per_stage));
    wait_for_copies<1>();
    accumulate(2 * per_stage, min(count, 3 * per_stage));
    wait_for_copies<0>();
    accumulate(3 * per_stage, count);
  } else {
    accumulate(0, count);
  }
  sum_over_image(sums, reduction, 0, ranks);

  const double gg = reduction.image[0][0], dg = reduction.image[0][1], dd = reduction.image[0][2];
  const float factor = p.step_size / (sqrtf(static_cast<float>(gg)) + kDivisionEps);
  const double f = factor, terms = dd + f * f * gg;
  double square = terms + 2 * f * dg;
  if (square < kCancelled * terms) {  // the same in all blocks of the image
    float direct[1] = {};
    for (Index i = mine; i < count; i += step) {
      const Gs gs = grad[i];
      const As as = x_adv[i];
      const Xs xs = x[i];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float delta = (to_float(as.at[j]) + factor * to_float(gs.at[j])) - to_float(xs.at[j]);
        direct[0] += delta * delta;
      }
    }
    sum_over_image(direct, reduction, 1, ranks);
    square = reduction.image[1][0];
  }
  // This block has read what it wanted of the others; it wrote nothing that they have yet to see.
  if (ranks > 1) cluster_arrive<false>();

  const float norm = sqrtf(static_cast<float>(square));
  // Not min(1, eps / norm): 0 / 0 must be 1, and a NaN norm must stay seen.
  const float scale = norm <= p.eps ? 1.0f : p.eps / norm;
#pragma unroll 2
  for (Index i = mine; i < count; i += step) {
    const Gs gs = grad[i];
    const As as = x_adv[i];
    const Xs xs = x[i];
    As result;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float origin = to_float(xs.at[j]);
      const float delta = (to_float(as.at[j]) + factor * to_float(gs.at[j])) - origin;
      from_float(clamp(origin + delta * scale, p.clip_min, p.clip_max), result.at[j]);
    }
    out[i] = result;
  }
  if (ranks > 1) {
    __syncwarp();
    cluster_wait();  // no block leaves while another reads its shared memory
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check("pgd_step", cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Whether the kernel that the current device runs was compiled with clusters.
template <class Kernel>
bool has_clusters(Kernel kernel, int device) {
  if (!attribute(cudaDevAttrClusterLaunch, device)) return false;
  cudaFuncAttributes attributes{};
  check("pgd_step", cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// Parts are a multiple of 4 units long, so that the three arrays in shared memory are aligned.
int64_t part_of(int64_t units, int ranks) { return ((units + ranks - 1) / ranks + 3) / 4 * 4; }

template <class A, class G, class X, int kWidth, bool kKept>
void launch_l2(const PgdStep& p, int ranks, int64_t shared, cudaStream_t stream) {
  const int64_t part = part_of(p.chw / kWidth, ranks);
  const auto kernel = pgd_step_l2<A, G, X, kWidth, kKept>;
  constexpr int64_t kWithoutAsking = 48 * 1024 - sizeof(Reduction);
  if (shared > kWithoutAsking) {
    check("pgd_step", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared)));
  }
  const int threads = part > 4 * kFewThreads ? kThreads : kFewThreads;
  launch_clusters("pgd_step", kernel, p.n * ranks, ranks, threads, shared, stream, p, ranks, part);
}

template <class A, class G, class X>
void l2(const PgdStep& p, int device, cudaStream_t stream) {
  constexpr int kWidth = 4;
  const bool wide = p.chw % kWidth == 0 && aligned(p.x_adv, alignof(Pack<A, kWidth>)) &&
                    aligned(p.out, alignof(Pack<A, kWidth>)) && aligned(p.grad, alignof(Pack<G, kWidth>)) &&
                    aligned(p.x, alignof(Pack<X, kWidth>));
  if (!wide) {
    const int ranks = has_clusters(pgd_step_l2<A, G, X, 1, false>, device) ? kMostRanks : 1;
    return launch_l2<A, G, X, 1, false>(p, ranks, 0, stream);
  }
  const auto shared = [&p](int ranks) {
    return part_of(p.chw / kWidth, ranks) * kWidth * static_cast<int64_t>(sizeof(A) + sizeof(G) + sizeof(X));
  };
  int ranks = 1;
  if (shared(1) > kShared && has_clusters(pgd_step_l2<A, G, X, kWidth, true>, device)) {
    while (ranks < kMostRanks && shared(ranks) > kShared) ranks *= 2;
  }
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int64_t{sizeof(Reduction)};
  if (shared(ranks) <= most) {
    launch_l2<A, G, X, kWidth, true>(p, ranks, shared(ranks), stream);
  } else {
    launch_l2<A, G, X, kWidth, false>(p, ranks, 0, stream);
  }
}

template <class A, class G>
void by_x(const PgdStep& p, int device, cudaStream_t stream) {
  switch (p.x_dtype) {
    case DType::f32: return l2<A, G, float>(p, device, stream);
    case DType::bf16: return l2<A, G, __nv_bfloat16>(p, device, stream);
    case DType::u8: return l2<A, G, U8>(p, device, stream);
    default: throw std::invalid_argument("pgd_step: x must be f32, bf16 or u8");
  }
}

template <class A>
void by_grad(const PgdStep& p, int device, cudaStream_t stream) {
  switch (p.grad_dtype) {
    case DType::f32: return by_x<A, float>(p, device, stream);
    case DType::bf16: return by_x<A, __nv_bfloat16>(p, device, stream);
    case DType::f16: return by_x<A, __half>(p, device, stream);
    default: throw std::invalid_argument("pgd_step: grad must be f32, bf16 or f16");
  }
}

}  // namespace

void pgd_step_cuda(const PgdStep& p, int device, void* stream_address) {
  if (!p.l2) throw std::invalid_argument("pgd_step: the CUDA code takes the L2 norm only");
  if (p.n == 0 || p.chw == 0) return;
  const DeviceGuard guard("pgd_step", device);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_address);
  switch (p.x_adv_dtype) {
    case DType::f32: return by_grad<float>(p, device, stream);
    case DType::bf16: return by_grad<__nv_bfloat16>(p, device, stream);
    default: throw std::invalid_argument("pgd_step: x_adv must be f32 or bf16");
  }
}

}  // namespace rtk
