// What every CUDA op does around its kernel: checked calls, the caller's device, a launch on its stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace rtk {

// Throws a std::runtime_error that names the op and CUDA's word for what failed.
inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }
}

// Works on `device`; the caller's is back at the end of the scope.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    check(op, cudaGetDevice(&previous_));
    if (device == previous_) previous_ = -1;
    check(op, cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// Launches `blocks` blocks with `shared` bytes of dynamic shared memory and up to one attribute.
template <class... Parameters, class... Arguments>
void launch_with(const char* op, cudaLaunchAttribute* attribute, void (*kernel)(Parameters...), int64_t blocks,
                 int threads, size_t shared, cudaStream_t stream, Arguments... arguments) {
  if (blocks > std::numeric_limits<int>::max()) throw std::invalid_argument(std::string(op) + ": too large");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute != nullptr;
  check(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// In clusters of `cluster` blocks. For 1 there is no attribute: a GPU without clusters takes it then.
template <class... Parameters, class... Arguments>
void launch_clusters(const char* op, void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads,
                     size_t shared, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  launch_with(op, cluster > 1 ? &attribute : nullptr, kernel, blocks, threads, shared, stream, arguments...);
}

// As soon as the kernel before has given its multiprocessors free, not only when all of it is done (sm_90
// and up). The kernel must execute griddepcontrol.wait before it touches memory that others use.
template <class... Parameters, class... Arguments>
void launch_early(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
                  cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  launch_with(op, &attribute, kernel, blocks, threads, shared, stream, arguments...);
}

// All blocks at once, or not at all: they may wait for each other.
template <class... Parameters, class... Arguments>
void launch_cooperative(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
                        cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  launch_with(op, &attribute, kernel, blocks, threads, shared, stream, arguments...);
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
            cudaStream_t stream, Arguments... arguments) {
  launch_with(op, nullptr, kernel, blocks, threads, shared, stream, arguments...);
}

}  // namespace rtk
