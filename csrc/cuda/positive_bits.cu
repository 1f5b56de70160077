// Which channels of an activation are positive, a bit each, in the order of fused_conv2d.cu: for gates of
// activations that another kernel made. Eight lanes read the 128 bytes of 64 channels.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) positive_bits(const uint4* __restrict__ x, uint2* __restrict__ bits,
                                                          int64_t count) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int b = threadIdx.x % 8;  // channels 8 b to 8 b + 7
  uint32_t words[4] = {};         // of 16 bits
  if (at < count) {
    const uint4 eight = x[at];
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float low = __uint_as_float(pairs[q] << 16), high = __uint_as_float(pairs[q] & 0xFFFF0000u);
      words[q] = (low > 0 ? 1u << b : 0) | (high > 0 ? 256u << b : 0);
    }
  }
  uint2 both = {words[0] | words[1] << 16, words[2] | words[3] << 16};
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) {
    both.x |= __shfl_xor_sync(~0u, both.x, lanes);
    both.y |= __shfl_xor_sync(~0u, both.y, lanes);
  }
  if (b == 0 && at < count) bits[at / 8] = both;
}

}  // namespace

void positive_bits_cuda(const void* x, void* bits, int64_t count, int device, void* stream) {
  if (count % 64) throw std::invalid_argument("positive_bits: count must be a multiple of 64");
  if (count == 0) return;
  const DeviceGuard guard("positive_bits", device);
  const int64_t packs = count / 8;
  launch("positive_bits", positive_bits, (packs + kThreads - 1) / kThreads, kThreads, 0,
         static_cast<cudaStream_t>(stream), static_cast<const uint4*>(x), static_cast<uint2*>(bits), packs);
}

}  // namespace rtk
