// The L2 step of projected gradient descent in one launch. How an image is summed depends on its size:
//
//   small   a block holds it in registers
//   large   many blocks take their parts of it through shared memory (pgd_step_ring.h)
//   other   a cluster of blocks reads it twice: where pixels cannot be taken four at a time or copied in
//           pieces of 16, with rare combinations of types, and on GPUs without the means of the large one
//
// The first two read every tensor once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/pgd_step_meeting.h"
#include "cuda/pgd_step_pixels.h"
#include "cuda/pgd_step_ring.h"
#include "rtk.h"

namespace rtk {
namespace {

using namespace pgd;

constexpr int kTwiceThreads = 512;
constexpr int kSmallUnits = 4;       // that a thread of the small kernel holds
constexpr int kSmallThreads = 1024;  // at most

// A block takes one image. A: x_adv and out, G: grad, X: x.
template <class A, class G, class X, int kWidth>
__global__ void __launch_bounds__(kSmallThreads) pgd_step_l2_small(const __grid_constant__ PgdStep p) {
  using Pixels = Unit<A, G, X, kWidth>;
  using As = decltype(Pixels::x_adv);
  using Gs = decltype(Pixels::grad);
  using Xs = decltype(Pixels::x);
  __shared__ Meetings meetings;
  const int units = static_cast<int>(p.chw / kWidth), stride = blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * units;

  Pixels held[kSmallUnits];
#pragma unroll
  for (int u = 0; u < kSmallUnits; ++u) {
    const int at = threadIdx.x + u * stride;
    if (at >= units) continue;
    held[u] = {load_once(static_cast<const As*>(p.x_adv) + first + at),
               load_once(static_cast<const Gs*>(p.grad) + first + at),
               load_once(static_cast<const Xs*>(p.x) + first + at)};
  }
  const auto for_each = [&](auto function) {
#pragma unroll
    for (int u = 0; u < kSmallUnits; ++u) {
      const int at = threadIdx.x + u * stride;
      if (at < units) function(held[u], at);
    }
  };
  float products[3] = {};
  for_each([&](const Pixels& pixels, int) { add_products(pixels, products); });
  unsigned number = 0;
  const Update update = meet(products, p, meetings, number, 0, 1, [&](float factor) {
    float sum = 0;
    for_each([&](const Pixels& pixels, int) { add_square(pixels, factor, sum); });
    return sum;
  });
  As* const out = static_cast<As*>(p.out) + first;
  for_each([&](const Pixels& pixels, int at) { out[at] = updated(pixels, update, p.clip_min, p.clip_max); });
}

// kCount neighbouring pixels as fp32, of the type that `dtype` says.
template <int kCount>
__device__ Pack<float, kCount> load(const void* from, DType dtype, int64_t i) {
  float pixels[kCount];
  const auto convert = [&](const auto pack) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) pixels[j] = pack[j];
  };
  switch (dtype) {
    case DType::bf16: convert(static_cast<const Pack<__nv_bfloat16, kCount>*>(from)[i]); break;
    case DType::f16: convert(static_cast<const Pack<__half, kCount>*>(from)[i]); break;
    case DType::u8: convert(static_cast<const Pack<uint8_t, kCount>*>(from)[i]); break;
    default: return static_cast<const Pack<float, kCount>*>(from)[i];
  }
  Pack<float, kCount> result;
  result.set(pixels);
  return result;
}

template <int kCount>
__device__ void store(void* to, DType dtype, int64_t i, const Pack<float, kCount>& pack) {
  if (dtype == DType::f32) {
    static_cast<Pack<float, kCount>*>(to)[i] = pack;
    return;
  }
  float pixels[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) pixels[j] = pack[j];
  // Not set() in place: nvcc 13.0 made single bytes of that memcpy into global memory, and wrong results.
  Pack<__nv_bfloat16, kCount> narrow;
  narrow.set(pixels);
  static_cast<Pack<__nv_bfloat16, kCount>*>(to)[i] = narrow;
}

// A cluster takes one image, and reads it again where the others hold it. One kernel for all types.
template <int kCount>
__global__ void __launch_bounds__(kTwiceThreads)
    pgd_step_l2_twice(const __grid_constant__ PgdStep p, int ranks, int64_t part) {
  __shared__ Meetings meetings;
  const int64_t image = blockIdx.x / ranks, rank = blockIdx.x % ranks;
  const int64_t units = p.chw / kCount, first = rank * part, offset = image * units + first;
  const int64_t count = min(part, units - first);  // negative: the last ranks of a small image idle
  const auto read = [&](int64_t i) {
    return Unit<float, float, float, kCount>{load<kCount>(p.x_adv, p.x_adv_dtype, offset + i),
                                             load<kCount>(p.grad, p.grad_dtype, offset + i),
                                             load<kCount>(p.x, p.x_dtype, offset + i)};
  };

  open(meetings);
  float products[3] = {};
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) add_products(read(i), products);
  wait_for_all_open();
  unsigned number = 0;
  const Update update = meet(products, p, meetings, number, static_cast<int>(rank), ranks, [&](float factor) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) add_square(read(i), factor, sum);
    return sum;
  });
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    store(p.out, p.x_adv_dtype, offset + i, updated(read(i), update, p.clip_min, p.clip_max));
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kWidth>
bool is_small(const PgdStep& p) {
  return p.chw <= kWidth * kSmallUnits * kSmallThreads;
}

template <class A, class G, class X, int kWidth>
void launch_small(const PgdStep& p, cudaStream_t stream) {
  const int64_t threads = ceil_div(ceil_div(p.chw / kWidth, kSmallUnits), 32) * 32;
  launch("pgd_step", pgd_step_l2_small<A, G, X, kWidth>, p.n, static_cast<int>(threads), 0, stream, p);
}

template <int kWidth>
void launch_twice(const PgdStep& p, int device, cudaStream_t stream) {
  const auto kernel = pgd_step_l2_twice<kWidth>;
  const int ranks = has_clusters(kernel, device) ? kMostRanks : 1;
  const int64_t part = ceil_div(p.chw / kWidth, ranks);
  launch_clusters("pgd_step", kernel, p.n * ranks, ranks, kTwiceThreads, 0, stream, p, ranks, part);
}

// How the ring is cut for images of one size; no ranks: it cannot serve them.
template <class A, class G, class X, int kWidth>
Ring plan_ring(int64_t n, int64_t chw, int device) {
  constexpr int64_t kBytes = sizeof(A) + sizeof(G) + sizeof(X);  // that a pixel takes in shared memory
  constexpr int64_t kMostPart = kHeldUnits<A, G, X, kWidth> * kMostWorkers * 32 * kWidth;
  constexpr int64_t kRound = 500;  // what an image costs a block beside its pixels, in pixels
  constexpr int kComing = 1;       // slots for pixels that are not summed yet
  Ring ring;
  if (!attribute(cudaDevAttrCooperativeLaunch, device) || !has_clusters(pgd_step_l2_ring<A, G, X, kWidth>, device) ||
      n > std::numeric_limits<int>::max() / 2 || chw > std::numeric_limits<int>::max() / 2) {
    return ring;
  }
  const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
                       ceil_div(int64_t{sizeof(RingShared)}, kLine) * kLine;

  // The multiprocessor with the most to do decides.
  constexpr int kUnit = kPartPixels<A, G, X>;
  const auto part_of = [chw](int64_t ranks) { return ceil_div(ceil_div(chw, ranks), kUnit) * kUnit; };
  int64_t ranks = 0, best = std::numeric_limits<int64_t>::max();
  for (int64_t r = ceil_div(chw, kMostPart); r <= std::min<int64_t>(multiprocessors, kMostRingRanks); ++r) {
    const int64_t cost = ceil_div(n, std::min(n, multiprocessors / r)) * (part_of(r) + kRound);
    if (cost < best) best = cost, ranks = r;
  }
  if (!ranks) return ring;
  const int64_t part = part_of(ranks);
  ring.ranks = static_cast<int>(ranks);
  ring.part = static_cast<int>(part);
  ring.slots = static_cast<int>(std::min<int64_t>(kMostSlots, most / (part * kBytes)));
  ring.lag = std::clamp(ring.slots - kComing, 1, kDesks - kHeld - 1);
  ring.workers = static_cast<int>(ceil_div(ceil_div(part / kWidth, kHeldUnits<A, G, X, kWidth>), 32));
  ring.blocks = static_cast<int>(std::min(n, multiprocessors / ranks) * ranks);
  check("pgd_step", cudaFuncSetAttribute(pgd_step_l2_ring<A, G, X, kWidth>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(most)));
  return ring;
}

// Of this thread's last step: all steps of an attack are alike, and asking the driver takes longer than
// launching.
template <class A, class G, class X, int kWidth>
const Ring& ring_for(int64_t n, int64_t chw, int device) {
  struct Last {
    int64_t n = -1, chw = -1;
    int device = -1;
    Ring ring;
  };
  static thread_local Last last;
  if (last.n != n || last.chw != chw || last.device != device) {
    last = {n, chw, device, plan_ring<A, G, X, kWidth>(n, chw, device)};
  }
  return last.ring;
}

size_t workspace_bytes(const Ring& ring) {
  return ring.ranks > 1 ? size_t{2} * kBoxes * ring.blocks * sizeof(Letter) : 0;
}

template <class A, class G, class X, int kWidth>
void launch_ring(const PgdStep& p, const Ring& ring, cudaStream_t stream) {
  const size_t shared = size_t{sizeof(A) + sizeof(G) + sizeof(X)} * ring.part * ring.slots;
  launch_cooperative("pgd_step", pgd_step_l2_ring<A, G, X, kWidth>, ring.blocks, (ring.workers + kServants) * 32,
                     shared, stream, p, ring, static_cast<Letter*>(p.workspace));
}

// Whether the kernels that read once exist for these types: a step in fp32 has its origin in fp32 or uint8, one
// in bf16 its gradient in bf16. Other combinations are read twice, which spares half of the compilation.
template <class A, class G, class X>
constexpr bool kOnce = !std::is_same_v<G, __half> && (sizeof(A) == 4 ? sizeof(X) != 2 : sizeof(G) == 2);

// Pixels of 16 bytes in the widest tensor.
template <class A, class G, class X>
constexpr int kWidest = sizeof(A) < 4 && sizeof(G) < 4 && sizeof(X) < 4 ? 8 : 4;

// With `bytes` nothing runs: it is told how large a workspace the step needs.
template <class A, class G, class X>
void l2(const PgdStep& p, int device, cudaStream_t stream, size_t* bytes) {
  const auto fits = [&p](int width) {
    const auto aligned = [width](const void* address, size_t pixel) {
      // The copy engine wants 16 bytes, of uint8 too.
      return reinterpret_cast<uintptr_t>(address) % std::max<size_t>(width * pixel, 16) == 0;
    };
    return p.chw % width == 0 && aligned(p.x_adv, sizeof(A)) && aligned(p.out, sizeof(A)) &&
           aligned(p.grad, sizeof(G)) && aligned(p.x, sizeof(X));
  };
  if constexpr (kOnce<A, G, X>) {
    constexpr int kWidth = kWidest<A, G, X>;
    if (fits(kWidth) && is_small<kWidth>(p)) {
      if (!bytes) launch_small<A, G, X, kWidth>(p, stream);
      return;
    }
    if (fits(kWidth) && p.chw % kCopyPixels == 0) {
      const Ring& ring = ring_for<A, G, X, kWidth>(p.n, p.chw, device);
      if (bytes) {
        *bytes = workspace_bytes(ring);
      } else if (ring.ranks) {
        launch_ring<A, G, X, kWidth>(p, ring, stream);
      }
      if (ring.ranks) return;
    }
  }
  if (bytes) return;
  if (fits(4)) return launch_twice<4>(p, device, stream);
  launch_twice<1>(p, device, stream);
}

template <class A, class G>
void by_x(const PgdStep& p, int device, cudaStream_t stream, size_t* bytes) {
  switch (p.x_dtype) {
    case DType::f32: return l2<A, G, float>(p, device, stream, bytes);
    case DType::bf16: return l2<A, G, __nv_bfloat16>(p, device, stream, bytes);
    case DType::u8: return l2<A, G, uint8_t>(p, device, stream, bytes);
    default: throw std::invalid_argument("pgd_step: x must be f32, bf16 or u8");
  }
}

template <class A>
void by_grad(const PgdStep& p, int device, cudaStream_t stream, size_t* bytes) {
  switch (p.grad_dtype) {
    case DType::f32: return by_x<A, float>(p, device, stream, bytes);
    case DType::bf16: return by_x<A, __nv_bfloat16>(p, device, stream, bytes);
    case DType::f16: return by_x<A, __half>(p, device, stream, bytes);
    default: throw std::invalid_argument("pgd_step: grad must be f32, bf16 or f16");
  }
}

void dispatch(const PgdStep& p, int device, cudaStream_t stream, size_t* bytes) {
  if (!p.l2) throw std::invalid_argument("pgd_step: the CUDA code takes the L2 norm only");
  if (p.n == 0 || p.chw == 0) return;
  const DeviceGuard guard("pgd_step", device);
  switch (p.x_adv_dtype) {
    case DType::f32: return by_grad<float>(p, device, stream, bytes);
    case DType::bf16: return by_grad<__nv_bfloat16>(p, device, stream, bytes);
    default: throw std::invalid_argument("pgd_step: x_adv must be f32 or bf16");
  }
}

}  // namespace

size_t pgd_step_workspace(const PgdStep& p, int device) {
  size_t bytes = 0;
  dispatch(p, device, nullptr, &bytes);
  return bytes;
}

void pgd_step_cuda(const PgdStep& p, int device, void* stream) {
  dispatch(p, device, static_cast<cudaStream_t>(stream), nullptr);
}

}  // namespace rtk

