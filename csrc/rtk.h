// The compiled ops of rtk: plain functions over pointers, sizes, strides and a thread count or stream.
//
// Nothing here knows of torch or numpy; the callers in rtk/ops check shapes, devices and memory
// before they pass pointers down. Sizes and strides count elements. Legend: N C H W input, K output
// channels, R S filter.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rtk {

// b1 is a bool in a byte, 0 or 1.
enum class DType : int { f32, f64, bf16, f16, u8, b1 };

// x' = clamp(project(x_adv + step), clip_min, clip_max) on n images of chw elements; the four buffers
// are dense and in one memory order. x_adv, out: f32 | bf16; grad: f32 | bf16 | f16; x: f32, or u8
// that stands for value / 255. All arithmetic in fp32.
struct PgdStep {
  const void* x_adv;
  DType x_adv_dtype;
  const void* grad;
  DType grad_dtype;
  const void* x;
  DType x_dtype;
  void* out;
  int64_t n, chw;
  float eps, step_size;
  bool l2;
  float clip_min, clip_max;
};

// A random start in the ball around x: f32 | bf16 | u8 (value / 255); out: f32 | bf16. The noise of a
// pixel depends on the seed and its index in (N, C, H, W) alone, not on strides, threads or machine.
struct PgdInit {
  const void* x;
  DType x_dtype;
  void* out;
  DType out_dtype;
  int64_t sizes[4], x_strides[4], out_strides[4];
  float eps;
  bool l2;
  float clip_min, clip_max;
  uint64_t seed;
};

// Exactly k ones in the byte masks over the concatenated segments, f32 | f64 | bf16 | f16: larger
// wins, then the smaller index; -0 equals +0; NaN loses to everything.
struct TopkMask {
  std::vector<const void*> scores;
  std::vector<int64_t> sizes;
  std::vector<uint8_t*> out;
  DType dtype;
  int64_t k;
};

// out = cast(w * mask) over 4 dimensions; a mask stride is 0 where the mask is broadcast. With a b1
// mask a pruned weight is exactly +0, whatever it was (w * False would keep NaN and the sign).
struct PrepareWeight {
  const void* w;
  DType w_dtype;
  const void* mask;
  DType mask_dtype;
  void* out;
  DType out_dtype;
  int64_t sizes[4], w_strides[4], mask_strides[4], out_strides[4];
};

// The block-sparse product and its gradients, all f32 and row-major: x (m, k), w (n, k), grad and
// out (m, n). mask (n / bn, k / bk) scales w's blocks; where it is 0 the block is never read.
struct BlockMatmul {
  const float* w;
  const float* mask;
  int64_t m, n, k, bn, bk;
};

// One instruction set's compilation of every op.
struct CpuOps {
  void (*pgd_step)(const PgdStep&, int threads);
  void (*pgd_init)(const PgdInit&, int threads);
  void (*topk_mask)(const TopkMask&, int threads);
  void (*prepare_weight)(const PrepareWeight&, int threads);
  // out = x @ (w * mask)^T
  void (*block_matmul)(const BlockMatmul&, const float* x, float* out, int threads);
  // out (m, k) = grad @ (w * mask)
  void (*block_matmul_bwd_input)(const BlockMatmul&, const float* grad, float* out, int threads);
  // dw (n, k) = mask * (grad^T @ x), dmask (n / bn, k / bk) = sum over a block of w * (grad^T @ x);
  // either may be null.
  void (*block_matmul_bwd_weight)(const BlockMatmul&, const float* grad, const float* x, float* dw,
                                  float* dmask, int threads);
};

// The best instruction set of this machine, or the one that RTK_CPU_ISA names; chosen once.
const CpuOps& cpu_ops();
std::string cpu_isa();
std::vector<std::string> built_isas();

#ifdef RTK_HAS_CUDA
// Queued on the stream of the device; throws std::runtime_error with CUDA's name of a failed launch.
void prepare_weight_cuda(const PrepareWeight&, int device, void* stream);
#endif

}  // namespace rtk
