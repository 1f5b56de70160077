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
  void* workspace;  // pgd_step_workspace() bytes, of any content; on a CPU none
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

// The same on a GPU, a selection a tensor with its own k, or one over the `whole` list; f32 | bf16 | f16.
// `masks` (bytes) and `bits` (32 flat elements a word, the first lowest) may each be empty: not wanted.
// device_k, if not null, is read in place of k, and cut to what is possible.
//
// workspace: topk_mask_workspace() bytes. `fresh`: it may hold anything, and what it holds after is of no
// use; else it is all 0 before the first call and remembers the last thresholds, which makes the next call
// faster and changes no result. The tensors' sizes must stay the same then.
constexpr int kTopkMaskTensors = 768;  // the most tensors a call takes
struct TopkMasks {
  std::vector<const void*> scores;
  std::vector<int64_t> sizes;
  std::vector<uint8_t*> masks;
  std::vector<uint32_t*> bits;
  std::vector<int64_t> k;
  const int32_t* device_k;
  DType dtype;
  bool whole, fresh;
  void* workspace;
};

// An SGD step on the scores of masks, one tensor a layer: g = (sum over the score's weights of w * grad) +
// weight_decay * score; buffer = momentum * buffer + g; score -= lr * (nesterov ? g + momentum * buffer : buffer).
// The four tensors of a layer are dense and, with one score a weight, in one memory order; all f32, the gradients
// f32 | bf16. device_lr, if not null, is read in place of lr.
constexpr int kScoreStepTensors = 640, kScoreGroupsTensors = 192;  // the most a call takes, with groups the latter

// Which weights of a layer share a score. Weight and gradient lie in one memory order, scores and buffer in one that
// may be another. Groups are counted along up to four axes of memory, the innermost first: `counts` of them, a step
// apart in the weight, a score step in the scores. A group is most[0] x most[1] weights, a stride apart each way;
// where `axis` is not 4, `size` weights lie along that axis, and its last group may have less.
constexpr int kScoreAxes = 4;
struct ScoreGroups {
  int64_t counts[kScoreAxes], steps[kScoreAxes], score_steps[kScoreAxes];
  int64_t most[2], size[2], stride[2], axis[2];
};

struct ScoreStep {
  std::vector<float*> scores, buffers;
  std::vector<const float*> weights;
  std::vector<const void*> grads;
  std::vector<int64_t> sizes;
  DType grad_dtype;
  float lr;
  const float* device_lr;
  float momentum, weight_decay;
  bool nesterov;
  // None: one score a weight everywhere. Else one a layer, of which counts[0] = 0 says the same.
  std::vector<ScoreGroups> groups;
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

// out = epilogue(conv(x, w)), bf16, activations N, H, W, C and weights K, R, S, C in memory, dense: add
// bias (f32) and residual (at pixels divisible by residual_stride), ReLU, 0 where the gate's bit is 0.
// gate, and positive, which is written (out > 0), have a bit a channel, K / 16 words of 16 bits a pixel:
// channel 64 a + 8 b + 2 q + e is bit 8 e + b of word 4 a + q. All of these may be null; a gate comes
// without bias and ReLU, positive with a ReLU. With upsample 2 zeros stand between x's pixels. live are the
// words of live_tiles: blocks of weights whose bit is off are all 0, and most tiles skip them.
struct FusedConv2d {
  const void *x, *w, *bias, *residual, *gate, *live;
  void *out, *positive;
  int n, h, w_in, c, k, r, s, oh, ow, stride, padding, upsample, residual_stride;
  bool relu;
  // The tile: channels (64, 128, 256), 64-pixel blocks a warpgroup (1, 2), how the input is fed, and
  // its box of pixels, 2^bn_log2 images x 2^bw_log2 columns x what remains in rows.
  int tile_channels, tile_blocks;
  bool halo, resident;
  int bn_log2, bw_log2;
  int narrow_columns;  // 14 or 16: a tile of narrow_conv2d.cu, and none of the above; else 0
};

// (ceil(k / 64), r s) words of 64 bits, dense: bit j of word (i, t) says whether tap t of the output channels
// 64 i to 64 i + 63 and the input channels 64 j to 64 j + 63 has a value that is not 0. w: any dtype, (k, c,
// r, s) under strides[4]; at most 4096 input channels.
struct LiveTiles {
  const void* w;
  DType dtype;
  uint64_t* out;
  int64_t sizes[4], strides[4];
};

// A bf16 weight, K, R, S, C in memory, dense, and where sparse_conv2d's lists of it go: ceil(k / 16) ceil(c / 128)
// lists, as cuda/sparse_conv2d.h lays them out, on 16 bytes. r and s are 3 at most.
constexpr int kSparseColumnsWeights = 64;  // the most a launch takes
struct SparseColumns {
  const void* w;
  int32_t* out;
  int k, c, r, s;
};

// out = conv(x, the weight of the lists) + bias (f32, may be null): bf16, N, H, W, C in memory, dense. With
// upsample 2 zeros stand between x's pixels. stride 1 or 2; c and k are multiples of 8.
struct SparseConv2d {
  const void* x;
  const int32_t* columns;
  const float* bias;
  void* out;
  int n, h, w_in, c, k, r, s, oh, ow, stride, padding, upsample;
};

// A ResNet's first convolution, fused: out = relu(conv((x - mean) / std, weight) + bias), bf16 and
// channels_last. pool: the ImageNet stem, 7x7, stride 2, padding 3, then max-pool 3x3, stride 2, padding
// 1, whose index (0 to 8 in the window) goes to `index`; else 3x3, stride 1, padding 1. x: f32 | bf16,
// (n, 3, h, w) under any strides; weight (k, 3, r, s), bias (k), mean and std (3): f32, dense.
struct StemConv2d {
  const void* x;
  DType x_dtype;
  int64_t x_strides[4];
  const float *weight, *bias, *mean, *std;
  void* out;
  uint8_t* index;
  uint16_t* positive;  // without pool: where out is positive, as pack_positive does; or null
  int64_t n, h, w, k;
  bool pool;
};

// Its gradient in x. grad: bf16, like the forward's out, already 0 where out is 0; dx: f32 | bf16,
// (n, 3, h, w), dense, in the asked layout.
struct StemConv2dBwdInput {
  const void* grad;
  const uint8_t* index;
  const float *weight, *std;
  void* dx;
  DType dx_dtype;
  int64_t n, h, w, k;
  bool pool, channels_last;
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
// One launch where all are alike, and each one run of elements.
void prepare_weights_cuda(const std::vector<PrepareWeight>&, int device, void* stream);
// Folds masks and batch norms into `layers` weights, rows of the device table that is described in
// cuda/fold_weights.cu; `tiles` is the sum of their tiles.
void fold_weights_cuda(const void* table, int layers, int64_t tiles, int device, void* stream);
// L2 only; x may be bf16 too. Each tensor is dense, all in one memory order.
void pgd_step_cuda(const PgdStep&, int device, void* stream);
size_t pgd_step_workspace(const PgdStep&, int device);  // bytes
void topk_mask_cuda(const TopkMasks&, int device, void* stream);
int64_t topk_mask_workspace(const std::vector<int64_t>& sizes, bool whole);
void score_step_cuda(const ScoreStep&, int device, void* stream);
void fused_conv2d_cuda(const FusedConv2d&, int device, void* stream);
// The bits of x > 0, `count` bf16 values whose channels come in multiples of 64.
void positive_bits_cuda(const void* x, void* bits, int64_t count, int device, void* stream);
void live_tiles_cuda(const LiveTiles&, int device, void* stream);
void sparse_columns_cuda(const std::vector<SparseColumns>&, int device, void* stream);
void sparse_conv2d_cuda(const SparseConv2d&, int device, void* stream);
bool fused_conv2d_fits(const FusedConv2d&);  // whether its tile does, in shared memory; pointers: null or not
void stem_conv2d_cuda(const StemConv2d&, int device, void* stream);
void stem_conv2d_bwd_input_cuda(const StemConv2dBwdInput&, int device, void* stream);
#endif

}  // namespace rtk
