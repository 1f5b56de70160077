// The L2 step of projected gradient descent in one launch: every tensor is read once.
//
// A cluster of blocks takes one image after the other, and a thread the same few places in each:
//
//   memory -> registers (the image that comes) -> shared memory (the one that is worked on) -> memory
//
// On the way into shared memory three products are summed, which give both norms:
//
//   |grad|^2 = gg and, with f = step / (|grad| + 1e-10),
//   |delta|^2 = |(x_adv - x) + f grad|^2 = dd + 2 f dg + f^2 gg
//
// So the cluster meets once an image. While it does, and while the image is then written, the next
// one's pixels are on their way into registers: the memory is never waited for with nothing asked. A
// 224-pixel image in fp32 fills the shared memory of eight multiprocessors, registers are the room left.
//
// Where the three terms cancel, |delta| is summed directly and the cluster meets once more. Images that do
// not fit, or whose pixels cannot be taken four at a time, are read twice (the second time mostly from
// L2), by a kernel of their own. Sums are added in a fixed order: the result is the same in every run.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kMostThreads = 1024, kMostWarps = kMostThreads / 32;  // of 64 registers
constexpr int64_t kSharedOfAll = 227 * 1024;  // of a multiprocessor, for all its blocks
constexpr int kTwiceThreads = 512;
constexpr int kMostRanks = 8;           // the largest cluster that every GPU with clusters runs
constexpr int kUnits = 2;               // held in registers by a thread; a unit: the pixels it takes at once
constexpr int64_t kMeeting = 300;       // what a meeting takes, in units that could have been moved
constexpr float kDivisionEps = 1e-10f;  // keeps a zero gradient a zero step
constexpr double kCancelled = 0.25;     // of the terms' sum: below it, their rounding would show

// Byte j of a word, divided by 255 and correctly rounded: the first product is exact (8 by 9 bits), the
// second tiny.
__device__ float from_byte(uint32_t word, int j) {
  // As the last byte of 2^23's mantissa: a conversion would run at a quarter of the rate.
  const float u = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 + j)) - 0x1p23f;
  return u * 0x1.01p-8f + u * 0x1.010102p-24f;
}

__device__ float to_float(float v) { return v; }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float to_float(__half v) { return __half2float(v); }
__device__ float to_float(uint8_t v) { return from_byte(v, 0); }

// The number at place j of a word, in the order of memory.
template <class T>
__device__ float from_word(uint32_t word, int j) {
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(word);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(j ? word & 0xffff0000 : word << 16);
  if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * j)));
  if constexpr (std::is_same_v<T, uint8_t>) return from_byte(word, j);
}

// Neighbouring pixels as they lie in memory, converted where they are used. Several are held as words:
// the compiler would give every narrow value a register of its own.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  static constexpr int kInWord = 4 / sizeof(T);
  uint32_t word[kCount / kInWord];

  __device__ float operator[](int j) const { return from_word<T>(word[j / kInWord], j % kInWord); }
  __device__ void set(const float (&v)[kCount]) {
    T values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = T(v[j]);
    memcpy(word, values, sizeof(word));
  }
};

template <class T>
struct Pack<T, 1> {
  T value;

  __device__ float operator[](int) const { return to_float(value); }
  __device__ void set(const float (&v)[1]) { value = T(v[0]); }
};

// NaN stays NaN, as in torch.clamp.
__device__ float clamp(float v, float low, float high) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
  return v;
}

// The same pixels of the three tensors.
template <class A, class G, class X, int kCount>
struct Unit {
  Pack<A, kCount> x_adv;
  Pack<G, kCount> grad;
  Pack<X, kCount> x;
};

// Adds |grad|^2, (x_adv - x) . grad and |x_adv - x|^2.
template <class A, class G, class X, int kCount>
__device__ void add_products(const Unit<A, G, X, kCount>& unit, float (&sums)[3]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float g = unit.grad[j], d = unit.x_adv[j] - unit.x[j];
    sums[0] += g * g;
    sums[1] += d * g;
    sums[2] += d * d;
  }
}

// Where the step along the gradient leads, as seen from the origin.
__device__ float delta(float x_adv, float grad, float origin, float factor) {
  return (x_adv + factor * grad) - origin;
}

template <class A, class G, class X, int kCount>
__device__ void add_square(const Unit<A, G, X, kCount>& unit, float factor, float& sum) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float d = delta(unit.x_adv[j], unit.grad[j], unit.x[j], factor);
    sum += d * d;
  }
}

// What an image's pixels have in common: out = clip(origin + scale delta).
struct Update {
  float factor, scale;
};

template <class A, class G, class X, int kCount>
__device__ Pack<A, kCount> updated(const Unit<A, G, X, kCount>& unit, Update update, float low, float high) {
  float pixels[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float origin = unit.x[j];
    const float d = delta(unit.x_adv[j], unit.grad[j], origin, update.factor);
    pixels[j] = clamp(origin + d * update.scale, low, high);
  }
  Pack<A, kCount> result;
  result.set(pixels);
  return result;
}

// Where the blocks of a cluster, the ranks of an image, sum over it. Without clusters in the hardware a
// block is alone. Two rows, used in turns: a block may be one meeting ahead of another that still reads.
struct Meetings {
  float4 warps[kMostWarps];
  float4 ranks[2][kMostRanks];  // written by the ranks themselves
  uint64_t written[2];          // barriers
};

// Before the first meeting, in two steps; what is done between them is not waited for.
__device__ void open(Meetings& m) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : m.written) hopper::barrier_init(hopper::shared_address(&barrier), 1);
    hopper::barrier_init_fence();
  }
  __syncwarp();  // cluster barriers want whole warps
  hopper::cluster_arrive();
#endif
}

__device__ void wait_for_all_open() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  hopper::cluster_wait();
#endif
}

// For the first warp of each rank: writes the block's sum into all ranks.
__device__ void send_to_ranks(float4 sum, Meetings& m, int row, int rank, int ranks) {
#if __CUDA_ARCH__ >= 900
  const int lane = threadIdx.x;
  const uint32_t to = hopper::shared_address(&m.ranks[row][rank]), written = hopper::shared_address(&m.written[row]);
  if (lane == 0) hopper::barrier_expect_bytes(written, ranks * sizeof(float4));
  if (lane < ranks) hopper::send(hopper::in_rank(to, lane), sum, hopper::in_rank(written, lane));
#endif
}

__device__ void wait_for_ranks(Meetings& m, int row, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  hopper::barrier_wait(hopper::shared_address(&m.written[row]), parity);
#endif
}

__device__ void sum_over_warp(float (&sums)[3]) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
}

// Sums the threads' values over the image, the same to the last bit in all its threads. When a block has
// the sum it has all that others ever write to it, so it may go on, or leave, without another barrier.
__device__ void sum_over_image(float (&sums)[3], double (&image)[3], Meetings& m, unsigned number, int rank,
                               int ranks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, row = number % 2;
  sum_over_warp(sums);
  if (lane == 0) m.warps[warp] = {sums[0], sums[1], sums[2], 0};
  __syncthreads();
  if (warp == 0) {
    const float4 v = lane < warps ? m.warps[lane] : float4{};
    float block[3] = {v.x, v.y, v.z};
    sum_over_warp(block);
    const float4 sum{block[0], block[1], block[2], 0};
    if (ranks > 1) {
      send_to_ranks(sum, m, row, rank, ranks);
    } else if (lane == 0) {
      m.ranks[row][0] = sum;
    }
  }
  if (ranks > 1) {
    wait_for_ranks(m, row, number / 2 % 2);
  } else {
    __syncthreads();
  }
  // A row has a number for each lane: lane 4 r + s adds the sum s of rank r.
  static_assert(sizeof(m.ranks[row]) == 32 * sizeof(float));
  double sum = lane / 4 < ranks ? reinterpret_cast<const float*>(m.ranks[row])[lane] : 0.0f;
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
#pragma unroll
  for (int s = 0; s < 3; ++s) image[s] = __shfl_sync(0xffffffffu, sum, s);
}

// Turns the threads' products into the update. squares(factor) sums |delta|^2 over this thread's pixels.
template <class Squares>
__device__ Update meet(float (&products)[3], const PgdStep& p, Meetings& m, unsigned& number, int rank, int ranks,
                       Squares squares) {
  double sums[3];
  sum_over_image(products, sums, m, number++, rank, ranks);
  const float factor = p.step_size / (sqrtf(static_cast<float>(sums[0])) + kDivisionEps);
  const double f = factor, terms = sums[2] + f * f * sums[0];
  double square = terms + 2 * f * sums[1];
  if (square < kCancelled * terms) {  // the same in all threads of the image
    float direct[3] = {squares(factor), 0, 0};
    sum_over_image(direct, sums, m, number++, rank, ranks);
    square = sums[0];
  }
  const float norm = sqrtf(static_cast<float>(square));
  // Not min(1, eps / norm): 0 / 0 must be 1, and a NaN norm must stay seen.
  return {factor, norm <= p.eps ? 1.0f : p.eps / norm};
}

// Past L1, which would only hold what nobody asks for again.
template <class T, int kCount>
__device__ Pack<T, kCount> load_once(const Pack<T, kCount>* from) {
  Pack<T, kCount> to;
  static_assert(sizeof(to) == 4 || sizeof(to) == 8 || sizeof(to) == 16);
  if constexpr (sizeof(to) == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
                 : "l"(from));
  } else if constexpr (sizeof(to) == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
                 : "=r"(to.word[0]), "=r"(to.word[1])
                 : "l"(from));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(to.word[0]) : "l"(from));
  }
  return to;
}

// How an image is laid out over its ranks: each takes `part` units, and of them a thread every stride-th,
// `groups` times kUnits.
struct Split {
  int ranks, part, stride, groups;
};

// A: x_adv and out, G: grad, X: x.
template <class A, class G, class X, int kWidth>
__global__ void __launch_bounds__(kMostThreads, 1)
    pgd_step_l2(const __grid_constant__ PgdStep p, const __grid_constant__ Split split) {
  using Pixels = Unit<A, G, X, kWidth>;
  using As = decltype(Pixels::x_adv);
  using Gs = decltype(Pixels::grad);
  using Xs = decltype(Pixels::x);
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Meetings meetings;

  const int n = static_cast<int>(p.n), units = static_cast<int>(p.chw / kWidth), ranks = split.ranks;
  const int rank = blockIdx.x % ranks, cluster = blockIdx.x / ranks, clusters = gridDim.x / ranks;
  // A thread takes every stride-th unit of its rank's part from `first` on, `count` units further at most.
  const int mine = threadIdx.x, stride = split.stride, group = kUnits * stride, end = split.groups * group;
  const int first = rank * split.part + mine;
  const int count = mine < stride ? min(split.part - mine, units - first) : 0;

  // Nobody else touches these places: a thread reads what it wrote itself.
  As* const kept_adv = reinterpret_cast<As*>(shared) + mine;
  Gs* const kept_grad = reinterpret_cast<Gs*>(kept_adv - mine + split.part) + mine;
  Xs* const kept_x = reinterpret_cast<Xs*>(kept_grad - mine + split.part) + mine;
  const auto kept = [&](int at) { return Pixels{kept_adv[at], kept_grad[at], kept_x[at]}; };

  Pixels held[kUnits];
  const auto hold = [&](int u, int image, int at) {
    if (image >= n || at + u * stride >= count) return;
    const int64_t i = static_cast<int64_t>(image) * units + (first + at + u * stride);
    held[u] = {load_once(static_cast<const As*>(p.x_adv) + i), load_once(static_cast<const Gs*>(p.grad) + i),
               load_once(static_cast<const Xs*>(p.x) + i)};
  };

  open(meetings);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) hold(u, cluster, 0);
  wait_for_all_open();

  float products[3] = {};
  unsigned number = 0;
  for (int coming = cluster;; coming += clusters) {
    const int going = coming - clusters;  // the image in shared memory; at first there is none
    Update update{};
    if (going >= 0) {
      update = meet(products, p, meetings, number, rank, ranks, [&](float factor) {
        float sum = 0;
        for (int at = 0; at < count; at += stride) add_square(kept(at), factor, sum);
        return sum;
      });
      for (float& product : products) product = 0;
    }
    As* const out = static_cast<As*>(p.out) + (static_cast<int64_t>(going) * units + first);
    for (int at = 0; at < end; at += group) {
      const bool last = at + group >= end;
      const int next_image = last ? coming + clusters : coming, next_at = last ? 0 : at + group;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int i = at + u * stride;
        if (i < count) {
          if (going >= 0) out[i] = updated(kept(i), update, p.clip_min, p.clip_max);
          if (coming < n) {
            kept_adv[i] = held[u].x_adv;
            kept_grad[i] = held[u].grad;
            kept_x[i] = held[u].x;
            add_products(held[u], products);
          }
        }
        hold(u, next_image, next_at);  // at once: the other units are still on their way
      }
    }
    if (coming >= n) return;
  }
}

// A cluster takes one image, and reads it again where the other kernel has it in shared memory.
template <class A, class G, class X, int kCount>
__global__ void __launch_bounds__(kTwiceThreads)
    pgd_step_l2_twice(const __grid_constant__ PgdStep p, int ranks, int64_t part) {
  using Read = Unit<A, G, X, kCount>;
  using As = decltype(Read::x_adv);
  __shared__ Meetings meetings;

  const int64_t image = blockIdx.x / ranks, rank = blockIdx.x % ranks;
  const int64_t units = p.chw / kCount, first = rank * part, offset = image * units + first;
  const int64_t count = min(part, units - first);  // negative: the last ranks of a small image idle
  const As* x_adv = static_cast<const As*>(p.x_adv) + offset;
  const auto* grad = static_cast<const decltype(Read::grad)*>(p.grad) + offset;
  const auto* x = static_cast<const decltype(Read::x)*>(p.x) + offset;
  As* out = static_cast<As*>(p.out) + offset;
  const auto read = [&](int64_t i) { return Read{x_adv[i], grad[i], x[i]}; };

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
    out[i] = updated(read(i), update, p.clip_min, p.clip_max);
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

// How the kernel that reads once is launched. It depends on the sizes only, and asking the driver takes
// longer than launching, so a thread remembers its last: all steps of an attack are alike.
struct Plan {
  int64_t n = 0, chw = 0;
  int device = -1;
  int64_t clusters = 0;  // 0: images do not fit
  Split split{};
  int threads = 0;
  size_t shared = 0;
};

template <class A, class G, class X, int kWidth>
Plan plan_l2(int64_t n, int64_t chw, int device) {
  const auto kernel = pgd_step_l2<A, G, X, kWidth>;
  constexpr int64_t kUnitBytes = kWidth * (sizeof(A) + sizeof(G) + sizeof(X));
  const int64_t units = chw / kWidth, multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - int64_t{sizeof(Meetings)};
  Plan plan{n, chw, device};
  if (n > std::numeric_limits<int>::max() / 2) return plan;

  // The multiprocessor with the most to do decides: that many parts, each with its meeting.
  int64_t best = std::numeric_limits<int64_t>::max();
  for (int ranks = 1; ranks <= (has_clusters(kernel, device) ? kMostRanks : 1); ranks *= 2) {
    // A multiple of 4 units, so that the three arrays in shared memory are aligned.
    const int64_t part = ceil_div(ceil_div(units, ranks), 4) * 4;
    const int64_t cost = ceil_div(n * ranks, multiprocessors) * (part + kMeeting);
    if (part * kUnitBytes > most || cost >= best) continue;
    best = cost;
    plan.shared = part * kUnitBytes;
    plan.split.ranks = ranks;
    plan.split.part = static_cast<int>(part);
  }
  if (!plan.shared) return plan;

  // Blocks that share a multiprocessor share its registers.
  Split& split = plan.split;
  const int64_t sharing = kSharedOfAll / static_cast<int64_t>(plan.shared + 2 * sizeof(Meetings));
  const int64_t most_threads = kMostThreads / std::clamp<int64_t>(sharing, 1, 8);
  split.groups = static_cast<int>(ceil_div(split.part, kUnits * most_threads));
  split.stride = static_cast<int>(ceil_div(split.part, kUnits * split.groups));
  plan.threads = static_cast<int>(ceil_div(split.stride, 32) * 32);

  // As many clusters as fit at once, each of them for several images. L1 has nothing to do.
  check("pgd_step",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)));
  check("pgd_step", cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared));
  int resident = 0;
  if (split.ranks > 1) {
    resident = resident_clusters("pgd_step", kernel, split.ranks, plan.threads, plan.shared);
  } else {
    check("pgd_step",
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan.threads, plan.shared));
    resident *= static_cast<int>(multiprocessors);
  }
  plan.clusters = std::min<int64_t>(n, resident);
  return plan;
}

template <class A, class G, class X, int kWidth>
void launch_twice(const PgdStep& p, int device, cudaStream_t stream) {
  const auto kernel = pgd_step_l2_twice<A, G, X, kWidth>;
  const int ranks = has_clusters(kernel, device) ? kMostRanks : 1;
  const int64_t part = ceil_div(p.chw / kWidth, ranks);
  launch_clusters("pgd_step", kernel, p.n * ranks, ranks, kTwiceThreads, 0, stream, p, ranks, part);
}

template <class A, class G, class X, int kWidth>
void launch_once(const PgdStep& p, int device, cudaStream_t stream) {
  static thread_local Plan plan;
  if (plan.n != p.n || plan.chw != p.chw || plan.device != device) {
    plan = plan_l2<A, G, X, kWidth>(p.n, p.chw, device);
  }
  if (!plan.clusters) return launch_twice<A, G, X, kWidth>(p, device, stream);
  const int ranks = plan.split.ranks;
  launch_clusters("pgd_step", pgd_step_l2<A, G, X, kWidth>, plan.clusters * ranks, ranks, plan.threads, plan.shared,
                  stream, p, plan.split);
}

template <class A, class G, class X>
void l2(const PgdStep& p, int device, cudaStream_t stream) {
  const auto fits = [&p](int width) {
    const auto aligned = [width](const void* address, size_t bytes) {
      return reinterpret_cast<uintptr_t>(address) % (width * bytes) == 0;
    };
    return p.chw % width == 0 && aligned(p.x_adv, sizeof(A)) && aligned(p.out, sizeof(A)) &&
           aligned(p.grad, sizeof(G)) && aligned(p.x, sizeof(X));
  };
  // 16 bytes at once from the widest tensor.
  if constexpr (sizeof(A) < 4 && sizeof(G) < 4 && sizeof(X) < 4) {
    if (fits(8)) return launch_once<A, G, X, 8>(p, device, stream);
  }
  if (fits(4)) return launch_once<A, G, X, 4>(p, device, stream);
  launch_twice<A, G, X, 1>(p, device, stream);
}

template <class A, class G>
void by_x(const PgdStep& p, int device, cudaStream_t stream) {
  switch (p.x_dtype) {
    case DType::f32: return l2<A, G, float>(p, device, stream);
    case DType::bf16: return l2<A, G, __nv_bfloat16>(p, device, stream);
    case DType::u8: return l2<A, G, uint8_t>(p, device, stream);
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
