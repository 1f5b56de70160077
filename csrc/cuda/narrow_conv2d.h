#pragma once

#include <cuda_runtime.h>

#include "rtk.h"

namespace rtk {

// fused_conv2d with a narrow tile. Throws std::invalid_argument for what narrow_conv2d.cu does not take;
// launches only with a device (>= 0).
void narrow_conv2d(const FusedConv2d& c, int device, cudaStream_t stream);

}  // namespace rtk
