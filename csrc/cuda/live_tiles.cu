// Which 64 x 64 blocks of a weight, or of its mask, have a value that is not zero: the words by which
// fused_conv2d skips the others. A block of threads makes the word of one tap and 64 output channels.
//
// Legend: K output channels, C input channels, R S filter.

#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kThreads = 512;
constexpr int kBlock = 64;  // channels, both ways

// A value is zero where all its bits but the sign are. T: the unsigned integer of its size.
template <class T, bool kSigned>
__device__ inline bool is_zero(T bits) {
  return (kSigned ? static_cast<T>(bits << 1) : bits) == 0;
}

// kValues: that many of neighbouring input channels are read at once.
template <class T, bool kSigned, int kValues>
__global__ void __launch_bounds__(kThreads) live_tiles(const LiveTiles p) {
  struct alignas(sizeof(T) * kValues) Pack {
    T values[kValues];
  };
  const int64_t S = p.sizes[3], taps = p.sizes[2] * S;
  const int64_t k64 = blockIdx.x / taps, tap = blockIdx.x % taps;
  const int64_t first = k64 * kBlock * p.strides[0] + tap / S * p.strides[2] + tap % S * p.strides[3];
  const T* w = static_cast<const T*>(p.w) + first;
  const int rows = static_cast<int>(min(int64_t{kBlock}, p.sizes[0] - k64 * kBlock));
  const int packs = static_cast<int>(p.sizes[1]) / kValues;  // of a row

  unsigned long long word = 0;
  for (int i = threadIdx.x; i < rows * packs; i += kThreads) {
    const int c = i % packs * kValues;
    const Pack pack = *reinterpret_cast<const Pack*>(w + i / packs * p.strides[0] + c * p.strides[1]);
    bool zero = true;
#pragma unroll
    for (T value : pack.values) zero = zero && is_zero<T, kSigned>(value);
    if (!zero) word |= 1ull << (c / kBlock);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) word |= __shfl_xor_sync(~0u, word, lanes);
  __shared__ unsigned long long words[kThreads / 32];
  if (threadIdx.x % 32 == 0) words[threadIdx.x / 32] = word;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (const unsigned long long other : words) word |= other;
    p.out[blockIdx.x] = word;
  }
}

template <class T, bool kSigned>
void run(const LiveTiles& p, cudaStream_t stream) {
  constexpr int kValues = 16 / sizeof(T);
  bool packs = p.strides[1] == 1 && p.sizes[1] % kValues == 0 && reinterpret_cast<uintptr_t>(p.w) % 16 == 0;
  for (const int i : {0, 2, 3}) packs = packs && p.strides[i] % kValues == 0;
  const int64_t blocks = (p.sizes[0] + kBlock - 1) / kBlock * p.sizes[2] * p.sizes[3];
  launch("live_tiles", packs ? live_tiles<T, kSigned, kValues> : live_tiles<T, kSigned, 1>, blocks, kThreads, 0, stream,
         p);
}

}  // namespace

void live_tiles_cuda(const LiveTiles& p, int device, void* stream) {
  if (p.sizes[1] > 64 * kBlock) throw std::invalid_argument("live_tiles: a word is for at most 4096 input channels");
  const DeviceGuard guard("live_tiles", device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::f64: return run<unsigned long long, true>(p, on);
    case DType::f32: return run<unsigned, true>(p, on);
    case DType::bf16:
    case DType::f16: return run<unsigned short, true>(p, on);
    case DType::u8:
    case DType::b1: return run<unsigned char, false>(p, on);
  }
}

}  // namespace rtk
