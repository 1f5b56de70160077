// The Python module rtk._C: pointers come as integers, every call runs without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <tuple>
#include <vector>

#include "build_config.h"
#include "rtk.h"

namespace py = pybind11;

namespace rtk {
namespace {

using Address = uintptr_t;
using Four = std::array<int64_t, 4>;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype(int code) { return static_cast<DType>(code); }

void copy(const Four& from, int64_t (&to)[4]) { std::copy(from.begin(), from.end(), to); }

PgdStep pgd_step_args(Address x_adv, int x_adv_dtype, Address grad, int grad_dtype, Address x, int x_dtype, Address out,
                      int64_t n, int64_t chw, double eps, double step_size, bool l2, double clip_min, double clip_max,
                      Address workspace) {
  return {pointer(x_adv), dtype(x_adv_dtype), pointer(grad), dtype(grad_dtype), pointer(x), dtype(x_dtype),
          pointer(out), n, chw, static_cast<float>(eps), static_cast<float>(step_size), l2,
          static_cast<float>(clip_min), static_cast<float>(clip_max), pointer(workspace)};
}

void pgd_step_cpu(Address x_adv, int x_adv_dtype, Address grad, int grad_dtype, Address x, int x_dtype, Address out,
                  int64_t n, int64_t chw, double eps, double step_size, bool l2, double clip_min, double clip_max,
                  int threads) {
  cpu_ops().pgd_step(pgd_step_args(x_adv, x_adv_dtype, grad, grad_dtype, x, x_dtype, out, n, chw, eps, step_size, l2,
                                   clip_min, clip_max, 0),
                     threads);
}

void pgd_init_cpu(Address x, int x_dtype, Address out, int out_dtype, int64_t n, int64_t c, int64_t h, int64_t w,
                  const Four& x_strides, const Four& out_strides, double eps, bool l2, double clip_min,
                  double clip_max, uint64_t seed, int threads) {
  PgdInit p{pointer(x), dtype(x_dtype), pointer(out), dtype(out_dtype), {n, c, h, w}, {}, {}, static_cast<float>(eps),
            l2, static_cast<float>(clip_min), static_cast<float>(clip_max), seed};
  copy(x_strides, p.x_strides);
  copy(out_strides, p.out_strides);
  cpu_ops().pgd_init(p, threads);
}

void topk_mask_cpu(const std::vector<Address>& scores, const std::vector<int64_t>& sizes,
                   const std::vector<Address>& out, int score_dtype, int64_t k, int threads) {
  if (scores.size() != sizes.size() || out.size() != sizes.size()) {
    throw std::invalid_argument("topk_mask: ptrs, sizes and out_ptrs must have one entry per segment");
  }
  TopkMask p{{}, sizes, {}, dtype(score_dtype), k};
  for (const Address address : scores) p.scores.push_back(pointer(address));
  for (const Address address : out) p.out.push_back(pointer<uint8_t>(address));
  cpu_ops().topk_mask(p, threads);
}

PrepareWeight prepare_weight_args(Address w, int w_dtype, const Four& w_strides, Address mask, int mask_dtype,
                                  const Four& mask_strides, Address out, int out_dtype, const Four& out_strides,
                                  const Four& sizes) {
  PrepareWeight p{pointer(w), dtype(w_dtype), pointer(mask), dtype(mask_dtype), pointer(out), dtype(out_dtype),
                  {}, {}, {}, {}};
  copy(sizes, p.sizes);
  copy(w_strides, p.w_strides);
  copy(mask_strides, p.mask_strides);
  copy(out_strides, p.out_strides);
  return p;
}

void prepare_weight_cpu(Address w, int w_dtype, const Four& w_strides, Address mask, int mask_dtype,
                        const Four& mask_strides, Address out, int out_dtype, const Four& out_strides,
                        const Four& sizes, int threads) {
  cpu_ops().prepare_weight(prepare_weight_args(w, w_dtype, w_strides, mask, mask_dtype, mask_strides, out, out_dtype,
                                               out_strides, sizes),
                           threads);
}

#ifdef RTK_HAS_CUDA
void pgd_step_on_stream(Address x_adv, int x_adv_dtype, Address grad, int grad_dtype, Address x, int x_dtype,
                        Address out, int64_t n, int64_t chw, double eps, double step_size, bool l2, double clip_min,
                        double clip_max, Address workspace, int device, Address stream) {
  pgd_step_cuda(pgd_step_args(x_adv, x_adv_dtype, grad, grad_dtype, x, x_dtype, out, n, chw, eps, step_size, l2,
                              clip_min, clip_max, workspace),
                device, pointer(stream));
}

size_t pgd_step_workspace_for(Address x_adv, int x_adv_dtype, Address grad, int grad_dtype, Address x, int x_dtype,
                              Address out, int64_t n, int64_t chw, int device) {
  return pgd_step_workspace(
      pgd_step_args(x_adv, x_adv_dtype, grad, grad_dtype, x, x_dtype, out, n, chw, 0, 0, true, 0, 0, 0), device);
}

void prepare_weight_on_stream(Address w, int w_dtype, const Four& w_strides, Address mask, int mask_dtype,
                              const Four& mask_strides, Address out, int out_dtype, const Four& out_strides,
                              const Four& sizes, int device, Address stream) {
  prepare_weight_cuda(prepare_weight_args(w, w_dtype, w_strides, mask, mask_dtype, mask_strides, out, out_dtype,
                                          out_strides, sizes),
                      device, pointer(stream));
}

// What `prepare_weight_args` takes, a layer each.
using PrepareWeightArgs = std::tuple<Address, int, Four, Address, int, Four, Address, int, Four, Four>;

void prepare_weights_on_stream(const std::vector<PrepareWeightArgs>& layers, int device, Address stream) {
  std::vector<PrepareWeight> all;
  for (const PrepareWeightArgs& layer : layers) all.push_back(std::apply(prepare_weight_args, layer));
  prepare_weights_cuda(all, device, pointer(stream));
}

void fold_weights_on_stream(Address table, int layers, int64_t tiles, int device, Address stream) {
  fold_weights_cuda(pointer(table), layers, tiles, device, pointer(stream));
}

void topk_mask_on_stream(const std::vector<Address>& scores, const std::vector<int64_t>& sizes,
                         const std::vector<Address>& masks, const std::vector<Address>& bits,
                         const std::vector<int64_t>& k, Address device_k, int score_dtype, bool whole, bool fresh,
                         Address workspace, int device, Address stream) {
  if (scores.size() != sizes.size() || k.size() != (whole ? 1 : sizes.size()) ||
      (!masks.empty() && masks.size() != sizes.size()) || (!bits.empty() && bits.size() != sizes.size())) {
    throw std::invalid_argument("topk_mask: there must be one entry per tensor");
  }
  TopkMasks p{{}, sizes, {}, {}, k, pointer<const int32_t>(device_k), dtype(score_dtype), whole, fresh,
              pointer(workspace)};
  for (const Address address : scores) p.scores.push_back(pointer(address));
  for (const Address address : masks) p.masks.push_back(pointer<uint8_t>(address));
  for (const Address address : bits) p.bits.push_back(pointer<uint32_t>(address));
  topk_mask_cuda(p, device, pointer(stream));
}

void score_step_on_stream(const std::vector<Address>& scores, const std::vector<Address>& buffers,
                          const std::vector<Address>& weights, const std::vector<Address>& grads,
                          const std::vector<int64_t>& sizes, const std::vector<std::array<int64_t, 20>>& groups,
                          int grad_dtype, double lr, Address device_lr, double momentum, double weight_decay,
                          bool nesterov, int device, Address stream) {
  if (scores.size() != sizes.size() || buffers.size() != sizes.size() || weights.size() != sizes.size() ||
      grads.size() != sizes.size() || (!groups.empty() && groups.size() != sizes.size())) {
    throw std::invalid_argument("score_step: there must be one entry per tensor");
  }
  ScoreStep p{{}, {}, {}, {}, sizes, dtype(grad_dtype), static_cast<float>(lr), pointer<const float>(device_lr),
              static_cast<float>(momentum), static_cast<float>(weight_decay), nesterov, {}};
  for (const std::array<int64_t, 20>& g : groups) {
    p.groups.push_back({{g[0], g[1], g[2], g[3]}, {g[4], g[5], g[6], g[7]}, {g[8], g[9], g[10], g[11]},
                        {g[12], g[13]}, {g[14], g[15]}, {g[16], g[17]}, {g[18], g[19]}});
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    p.scores.push_back(pointer<float>(scores[i]));
    p.buffers.push_back(pointer<float>(buffers[i]));
    p.weights.push_back(pointer<const float>(weights[i]));
    p.grads.push_back(pointer(grads[i]));
  }
  score_step_cuda(p, device, pointer(stream));
}

FusedConv2d fused_conv2d_args(Address x, Address w, Address bias, Address residual, Address gate, Address live,
                              Address out, Address positive, const std::array<int, 9>& sizes, int stride, int padding,
                              int upsample, int residual_stride, bool relu, const std::array<int, 7>& tile) {
  const auto [n, h, w_in, c, k, r, s, oh, ow] = sizes;
  return {pointer(x), pointer(w), pointer(bias), pointer(residual), pointer(gate), pointer(live), pointer(out),
          pointer(positive), n, h, w_in, c, k, r, s, oh, ow, stride, padding, upsample, residual_stride, relu,
          tile[0], tile[1], tile[2] != 0, tile[3] != 0, tile[4], tile[5], tile[6]};
}

void fused_conv2d_on_stream(Address x, Address w, Address bias, Address residual, Address gate, Address live,
                            Address out, Address positive, const std::array<int, 9>& sizes, int stride, int padding,
                            int upsample, int residual_stride, bool relu, const std::array<int, 7>& tile, int device,
                            Address stream) {
  fused_conv2d_cuda(fused_conv2d_args(x, w, bias, residual, gate, live, out, positive, sizes, stride, padding,
                                      upsample, residual_stride, relu, tile),
                    device, pointer(stream));
}

void positive_bits_on_stream(Address x, Address bits, int64_t count, int device, Address stream) {
  positive_bits_cuda(pointer(x), pointer(bits), count, device, pointer(stream));
}

void live_tiles_on_stream(Address w, int w_dtype, const Four& sizes, const Four& strides, Address out, int device,
                          Address stream) {
  LiveTiles p{pointer(w), dtype(w_dtype), pointer<uint64_t>(out), {}, {}};
  copy(sizes, p.sizes);
  copy(strides, p.strides);
  live_tiles_cuda(p, device, pointer(stream));
}

void sparse_columns_on_stream(const std::vector<Address>& weights, const std::vector<std::array<int, 4>>& sizes,
                              const std::vector<Address>& out, int device, Address stream) {
  if (weights.size() != sizes.size() || out.size() != sizes.size()) {
    throw std::invalid_argument("sparse_columns: there must be one entry per weight");
  }
  std::vector<SparseColumns> p;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto [k, c, r, s] = sizes[i];
    p.push_back({pointer(weights[i]), pointer<int32_t>(out[i]), k, c, r, s});
  }
  sparse_columns_cuda(p, device, pointer(stream));
}

void sparse_conv2d_on_stream(Address x, Address columns, Address bias, Address out, const std::array<int, 9>& sizes,
                             int stride, int padding, int upsample, int device, Address stream) {
  const auto [n, h, w_in, c, k, r, s, oh, ow] = sizes;
  sparse_conv2d_cuda({pointer(x), pointer<const int32_t>(columns), pointer<const float>(bias), pointer(out), n, h,
                      w_in, c, k, r, s, oh, ow, stride, padding, upsample},
                     device, pointer(stream));
}

bool fused_conv2d_fits_args(Address x, Address w, Address bias, Address residual, Address gate, Address live,
                            Address out, Address positive, const std::array<int, 9>& sizes, int stride, int padding,
                            int upsample, int residual_stride, bool relu, const std::array<int, 7>& tile) {
  return fused_conv2d_fits(fused_conv2d_args(x, w, bias, residual, gate, live, out, positive, sizes, stride, padding,
                                             upsample, residual_stride, relu, tile));
}

void stem_conv2d_on_stream(Address x, int x_dtype, const Four& x_strides, Address weight, Address bias, Address mean,
                           Address std, Address out, Address index, Address positive, const Four& nhwk,
                           bool pool, int device, Address stream) {
  StemConv2d p{pointer(x), dtype(x_dtype), {}, pointer<float>(weight), pointer<float>(bias), pointer<float>(mean),
               pointer<float>(std), pointer(out), pointer<uint8_t>(index), pointer<uint16_t>(positive),
               nhwk[0], nhwk[1], nhwk[2], nhwk[3], pool};
  copy(x_strides, p.x_strides);
  stem_conv2d_cuda(p, device, pointer(stream));
}

void stem_conv2d_bwd_input_on_stream(Address grad, Address index, Address weight, Address std, Address dx,
                                     int dx_dtype, const Four& nhwk, bool pool, bool channels_last, int device,
                                     Address stream) {
  stem_conv2d_bwd_input_cuda({pointer(grad), pointer<uint8_t>(index), pointer<float>(weight), pointer<float>(std),
                              pointer(dx), dtype(dx_dtype), nhwk[0], nhwk[1], nhwk[2], nhwk[3], pool, channels_last},
                             device, pointer(stream));
}
#endif

BlockMatmul block_args(Address w, Address mask, int64_t m, int64_t n, int64_t k, int64_t bn, int64_t bk) {
  if (bn < 1 || bk < 1 || n % bn || k % bk) {
    throw std::invalid_argument("block_matmul: bn and bk must divide n and k");
  }
  return {pointer<const float>(w), pointer<const float>(mask), m, n, k, bn, bk};
}

void block_matmul_cpu(Address x, Address w, Address mask, Address out, int64_t m, int64_t n, int64_t k, int64_t bn,
                      int64_t bk, int threads) {
  cpu_ops().block_matmul(block_args(w, mask, m, n, k, bn, bk), pointer<const float>(x), pointer<float>(out), threads);
}

void block_matmul_bwd_input_cpu(Address grad, Address w, Address mask, Address out, int64_t m, int64_t n, int64_t k,
                                int64_t bn, int64_t bk, int threads) {
  cpu_ops().block_matmul_bwd_input(block_args(w, mask, m, n, k, bn, bk), pointer<const float>(grad),
                                   pointer<float>(out), threads);
}

void block_matmul_bwd_weight_cpu(Address grad, Address x, Address w, Address mask, Address dw, Address dmask,
                                 int64_t m, int64_t n, int64_t k, int64_t bn, int64_t bk, int threads) {
  cpu_ops().block_matmul_bwd_weight(block_args(w, mask, m, n, k, bn, bk), pointer<const float>(grad),
                                    pointer<const float>(x), pointer<float>(dw), pointer<float>(dmask), threads);
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> architectures;
  std::istringstream list(RTK_CUDA_ARCHITECTURES);
  for (std::string one; std::getline(list, one, ';');) architectures.push_back(one);
  return architectures;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = RTK_COMPILER;
  info["flags"] = RTK_FLAGS;
  info["build_type"] = RTK_BUILD_TYPE;
  info["cuda"] = RTK_CUDA_VERSION;
  info["isas"] = built_isas();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled ops of rtk, over raw pointers; _C.pyi describes each.";
  module.attr("f32") = static_cast<int>(DType::f32);
  module.attr("f64") = static_cast<int>(DType::f64);
  module.attr("bf16") = static_cast<int>(DType::bf16);
  module.attr("f16") = static_cast<int>(DType::f16);
  module.attr("u8") = static_cast<int>(DType::u8);
  module.attr("b1") = static_cast<int>(DType::b1);
  module.attr("build_info") = build_info();
  module.attr("cuda_status") = RTK_CUDA_STATUS;
  module.attr("cuda_architectures") = cuda_architectures();
  module.def("cpu_isa", &cpu_isa);

  const py::call_guard<py::gil_scoped_release> no_gil;
  module.def("pgd_step_cpu", &pgd_step_cpu, no_gil);
  module.def("pgd_init_cpu", &pgd_init_cpu, no_gil);
  module.def("topk_mask_cpu", &topk_mask_cpu, no_gil);
  module.def("prepare_weight_cpu", &prepare_weight_cpu, no_gil);
  module.def("block_matmul_cpu", &block_matmul_cpu, no_gil);
  module.def("block_matmul_bwd_input_cpu", &block_matmul_bwd_input_cpu, no_gil);
  module.def("block_matmul_bwd_weight_cpu", &block_matmul_bwd_weight_cpu, no_gil);
#ifdef RTK_HAS_CUDA
  module.def("pgd_step_cuda", &pgd_step_on_stream, no_gil);
  module.def("pgd_step_workspace", &pgd_step_workspace_for, no_gil);
  module.def("prepare_weight_cuda", &prepare_weight_on_stream, no_gil);
  module.def("prepare_weights_cuda", &prepare_weights_on_stream, no_gil);
  module.def("fold_weights_cuda", &fold_weights_on_stream, no_gil);
  module.attr("topk_mask_tensors") = kTopkMaskTensors;
  module.def("topk_mask_workspace", &topk_mask_workspace, no_gil);
  module.def("topk_mask_cuda", &topk_mask_on_stream, no_gil);
  module.attr("score_step_tensors") = kScoreStepTensors;
  module.attr("score_groups_tensors") = kScoreGroupsTensors;
  module.def("score_step_cuda", &score_step_on_stream, no_gil);
  module.def("fused_conv2d_cuda", &fused_conv2d_on_stream, no_gil);
  module.def("fused_conv2d_fits", &fused_conv2d_fits_args, no_gil);
  module.def("live_tiles_cuda", &live_tiles_on_stream, no_gil);
  module.def("positive_bits_cuda", &positive_bits_on_stream, no_gil);
  module.def("sparse_columns_cuda", &sparse_columns_on_stream, no_gil);
  module.def("sparse_conv2d_cuda", &sparse_conv2d_on_stream, no_gil);
  module.def("stem_conv2d_cuda", &stem_conv2d_on_stream, no_gil);
  module.def("stem_conv2d_bwd_input_cuda", &stem_conv2d_bwd_input_on_stream, no_gil);
#endif
}

}  // namespace rtk
