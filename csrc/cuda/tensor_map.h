// What the hosts of fused_conv2d's kernels share: checked arguments, and maps for TMA.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"

namespace rtk::fused {

constexpr char kName[] = "fused_conv2d";

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("fused_conv2d: ") + what);
}

// The driver's function, found through the runtime: nothing links against libcuda.
inline decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    check(kName, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
    if (status != cudaDriverEntryPointSuccess) throw std::runtime_error("fused_conv2d: the driver has no TMA");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

// A map over bf16 `data`: sizes and strides (elements, the first stride is 1 and left out), the box that
// one copy fetches, and the steps between the elements that it takes.
template <int kRank>
CUtensorMap tensor_map(const void* data, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                       const int (&box)[kRank], const int (&steps)[kRank]) {
  cuuint64_t dims[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], element_steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>((box[i] - 1) * steps[i] + 1);
    element_steps[i] = static_cast<cuuint32_t>(steps[i]);
    if (i) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * 2;
  }
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), dims, bytes, boxes, element_steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::invalid_argument("fused_conv2d: no tensor map for these sizes");
  return map;
}

}  // namespace rtk::fused
