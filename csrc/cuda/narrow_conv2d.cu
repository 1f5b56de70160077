// The host's side of the narrow tiles: what they take, the tensor maps, the launch. narrow_conv2d_kernel.h
// tells how the kernel works.

#include "cuda/narrow_conv2d.h"

#include <cstdint>
#include <limits>

#include "cuda/launch.h"
#include "cuda/narrow_conv2d_kernel.h"
#include "cuda/tensor_map.h"

namespace rtk {
namespace {

using namespace narrow;

template <int kColumns>
void launch_narrow(const FusedConv2d& c, int device, cudaStream_t stream) {
  using L = Layout<kColumns>;
  constexpr int kBytes = 1024 + 1024 + L::kBytes;  // the barriers, and to align what follows
  static_assert(kBytes <= kSharedBytes);
  NarrowParameters p{};
  p.bias = static_cast<const float*>(c.bias);
  p.gate = static_cast<const uint2*>(c.gate);
  p.positive = static_cast<uint2*>(c.positive);
  p.N = c.n, p.OH = c.oh, p.OW = c.ow, p.padding = c.padding;
  p.relu = c.relu;
  p.has_residual = c.residual != nullptr;
  p.tiles_w = ceil_div(c.ow, kColumns);
  const int64_t rows = int64_t{ceil_div(c.n, kImages)} * p.tiles_w * c.oh;
  require(rows <= std::numeric_limits<int>::max() / 4, "too many rows");
  p.rows = static_cast<int>(rows);
  if (device < 0) return;

  const auto map = [](const void* data, int64_t channels, int64_t n, int64_t h, int64_t w, int columns) {
    return tensor_map<4>(data, {channels, n, w, h}, {h * w * channels, channels, w * channels},
                         {kChunk, kImages, columns, 1}, {1, 1, 1, 1});
  };
  p.x = map(c.x, c.c, c.n, c.h, c.w_in, kColumns + 2);
  p.out = map(c.out, c.k, c.n, c.oh, c.ow, kColumns);
  if (p.has_residual) p.residual = map(c.residual, c.k, c.n, c.oh, c.ow, kColumns);
  p.w = tensor_map<3>(c.w, {c.c, kTaps, c.k}, {c.c, int64_t{kTaps} * c.c}, {kChunk, 1, kChunk}, {1, 1, 1});

  int processors = 0;
  check(kName, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  p.rows_of_block = ceil_div(p.rows, processors);
  const auto kernel = p.gate != nullptr ? narrow_conv2d_kernel<kColumns, true> : narrow_conv2d_kernel<kColumns, false>;
  check(kName, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  launch_early(kName, kernel, ceil_div(p.rows, p.rows_of_block), kThreads, kBytes, stream, p);
}

}  // namespace

void narrow_conv2d(const FusedConv2d& c, int device, cudaStream_t stream) {
  require(c.c <= kChunk && c.k == kChunk, "a narrow tile takes up to 64 channels, and 64 output channels");
  require(c.r == 3 && c.s == 3 && c.stride == 1 && c.upsample == 1, "a narrow tile needs a 3x3 filter and stride 1");
  require(c.residual == nullptr || c.residual_stride == 1, "a narrow tile needs a residual of the output's size");
  const auto aligned = [](const void* bits) { return reinterpret_cast<uintptr_t>(bits) % sizeof(uint2) == 0; };
  require(aligned(c.gate) && aligned(c.positive), "a narrow tile needs bits at multiples of 8 bytes");
  if (c.narrow_columns == 14) return launch_narrow<14>(c, device, stream);
  if (c.narrow_columns == 16) return launch_narrow<16>(c, device, stream);
  require(false, "no such tile");
}

}  // namespace rtk
