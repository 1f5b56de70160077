// The host's side of fused_conv2d: which taps, which boxes, how much shared memory; the tensor maps; the
// launch. fused_conv2d_kernel.h tells how the kernel works; narrow_conv2d.cu has one for 64 channels.

#include "cuda/fused_conv2d_kernel.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/narrow_conv2d.h"
#include "cuda/tensor_map.h"
#include "rtk.h"

namespace rtk {
namespace {

using namespace fused;

constexpr int64_t kStaysInCache = 16 << 20;  // bytes of input that a pass per tile of channels finds in L2

// The classes of output pixels with the taps that reach them, the most work first.
void list_taps(const FusedConv2d& c, Parameters& p) {
  const bool sparse_residual = c.residual != nullptr && c.residual_stride == 2;
  p.step = sparse_residual ? 2 : c.upsample;
  p.stride = c.stride * p.step / c.upsample;
  p.classes = 0;
  for (int h_first = 0; h_first < std::min(p.step, p.OH); ++h_first) {
    for (int w_first = 0; w_first < std::min(p.step, p.OW); ++w_first) {
      Class& cls = p.cls[p.classes];
      const bool residual = c.residual != nullptr && (!sparse_residual || h_first + w_first == 0);
      cls = {0, h_first, w_first, p.classes++, residual, {}, 0};
      for (int r = 0; r < c.r; ++r) {
        for (int s = 0; s < c.s; ++s) {
          const int dh = h_first * c.stride + r - c.padding, dw = w_first * c.stride + s - c.padding;
          if (dh % c.upsample || dw % c.upsample) continue;
          cls.tap[cls.taps++] = {dh / c.upsample, dw / c.upsample, r * c.s + s, 0};
          cls.weights |= 1u << (r * c.s + s);
        }
      }
    }
  }
  std::stable_sort(p.cls, p.cls + p.classes, [](const Class& a, const Class& b) { return a.taps > b.taps; });
}

// The maps of residual and output: the pixels of a class, in boxes of what a consumer holds.
void map_results(const FusedConv2d& c, Parameters& p, int rows) {
  const int bn = std::min(1 << p.bn_log2, rows), bw = std::min(1 << p.bw_log2, rows / bn), bh = rows / (bn * bw);
  for (int i = 0; i < p.classes; ++i) {
    const Class& cls = p.cls[i];
    const int64_t K = p.K, W = int64_t{p.step} * K, H = int64_t{p.step} * p.OW * K, N = int64_t{p.OH} * p.OW * K;
    const int64_t rows_h = ceil_div(p.OH - cls.h_first, p.step), rows_w = ceil_div(p.OW - cls.w_first, p.step);
    const int64_t first = (int64_t{cls.h_first} * p.OW + cls.w_first) * K;
    const auto map = [&](const void* data, int64_t offset, int64_t n, int64_t w, int64_t h) {
      return tensor_map<4>(static_cast<const __nv_bfloat16*>(data) + offset, {K, p.N, rows_w, rows_h}, {n, w, h},
                           {kChunk, bn, bw, bh}, {1, 1, 1, 1});
    };
    p.out[cls.map] = map(c.out, first, N, W, H);
    if (!cls.residual) continue;
    const bool sparse = c.residual_stride == 2;  // a small tensor of its own: only this class's pixels
    p.residual[cls.map] = sparse ? map(c.residual, 0, rows_h * rows_w * K, K, rows_w * K) : map(c.residual, first, N, W, H);
  }
}

// Throws std::invalid_argument where the tile does not fit; launches only with a device (>= 0).
template <int BN, int MB, bool kResident>
void launch_tiles(const FusedConv2d& c, Parameters& p, int device, cudaStream_t stream) {
  const int bn = 1 << c.bn_log2, bw = 1 << c.bw_log2, pixels = 64 * MB * (kResident ? 1 : kConsumers);
  require(bn * bw <= pixels, "a tile has no such box");
  p.bh = pixels / (bn * bw);
  p.bn_log2 = c.bn_log2;
  p.bw_log2 = c.bw_log2;
  p.chunks = ceil_div(p.C, kChunk);
  p.tiles_k = ceil_div(p.K, BN);
  const bool sparse = p.live != nullptr && !kResident;  // resident weights are multiplied with their zeros
  const int64_t tables = sparse ? live_bytes(p.tiles_k, p.chunks, BN / 64) : 0;
  require(tables <= kSharedBytes / 4, "no room in shared memory for what is live");
  p.live_bytes = static_cast<int>(tables);
  p.by_channels = int64_t{p.N} * p.H * p.W * p.C * 2 <= kStaysInCache;

  int h_high = 0, w_high = 0;
  p.h_low = p.w_low = 0;
  if (c.halo) {
    require(bn * bw == 64 && p.stride == 1, "halo needs 64-pixel rows and stride 1");
    for (int i = 0; i < p.classes; ++i) {
      for (int j = 0; j < p.cls[i].taps; ++j) {
        const Tap& tap = p.cls[i].tap[j];
        p.h_low = std::min(p.h_low, tap.dh), h_high = std::max(h_high, tap.dh);
        p.w_low = std::min(p.w_low, tap.dw), w_high = std::max(w_high, tap.dw);
      }
    }
  }
  const int box_w = bw + w_high - p.w_low, box_h = p.bh + h_high - p.h_low;
  require(bn <= 256 && (box_w - 1) * p.stride < 256 && (box_h - 1) * p.stride < 256, "the box is too large");
  p.block_pitch = c.halo ? box_w * bn : 64;
  for (int i = 0; i < p.classes; ++i) {
    for (Tap& tap : p.cls[i].tap) tap.row = ((tap.dh - p.h_low) * box_w + tap.dw - p.w_low) * bn;
  }
  p.halo = c.halo;
  p.skip = !c.halo && !kResident && c.r * c.s > 1;
  p.a_bytes = static_cast<uint32_t>(kRow * bn * box_w * box_h);

  // Shared memory: staging first, as its depth is what hides the latency of memory-bound layers, but not
  // so much that fewer than four stages are left for what is multiplied.
  constexpr int kBBytes = BN * kRow, kStagingBytes = kConsumers * MB * 64 * kRow;
  const int reserved = 1024 + (kBarrierBytes + p.live_bytes + 1023) / 1024 * 1024;
  const int a_bytes = static_cast<int>(p.a_bytes), boxes = (c.halo ? 1 : p.cls[0].taps) * p.chunks;
  for (p.staging = MB == 1 && BN > 64 ? kMaxStaging : 2; p.staging >= 1; p.staging /= 2) {
    const int room = kSharedBytes - reserved - p.staging * kStagingBytes;
    if (kResident) {
      p.b_stages = c.r * c.s * p.chunks;
      p.a_stages = (room - p.b_stages * kBBytes) / a_bytes;
    } else if (c.halo) {  // a box serves all taps: two of them, the rest is for weights
      p.a_stages = 2;
      p.b_stages = (room - p.a_stages * a_bytes) / kBBytes;
    } else {
      p.a_stages = p.b_stages = room / (a_bytes + kBBytes);
    }
    if ((kResident ? p.a_stages : p.b_stages) >= 4) break;
  }
  p.staging = std::max(p.staging, 1);
  p.a_stages = std::min(p.a_stages, kMaxStages);
  if (!kResident) p.b_stages = std::min(p.b_stages, kMaxStages);
  // A consumer with tiles of its own must find that its next stage was filled since it last looked: a
  // parity tells two rounds apart, not three.
  require(p.a_stages > (kResident ? boxes : 1) && (kResident || p.b_stages >= 2),
          "no room in shared memory");
  const size_t bytes = reserved + size_t(p.staging) * kStagingBytes + size_t(p.a_stages) * a_bytes +
                       size_t(p.b_stages) * kBBytes;

  p.tiles_n = ceil_div(p.N, bn);
  p.tiles_w = ceil_div(ceil_div(p.OW, p.step), bw);
  p.tiles_h = ceil_div(ceil_div(p.OH, p.step), p.bh);
  const int64_t tiles = int64_t{p.classes} * p.tiles_k * p.tiles_n * p.tiles_w * p.tiles_h;
  require(tiles <= std::numeric_limits<int>::max(), "too many tiles");
  p.tiles = static_cast<int>(tiles);

  if (device < 0) return;

  p.x = tensor_map<4>(c.x, {p.C, p.N, p.W, p.H}, {int64_t{p.H} * p.W * p.C, p.C, int64_t{p.W} * p.C},
                      {kChunk, bn, box_w, box_h}, {1, 1, p.stride, p.stride});
  map_results(c, p, 64 * MB);
  p.w = tensor_map<3>(c.w, {p.C, c.r * c.s, p.K}, {p.C, int64_t{c.r} * c.s * p.C},
                      {kChunk, 1, sparse ? 64 : BN}, {1, 1, 1});

  int processors = 0;
  check(kName, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  int blocks = std::min(p.tiles, processors);
  if (kResident) {
    require(p.tiles_k <= processors, "too many channels for resident weights");
    blocks = std::max(blocks / p.tiles_k, 1) * p.tiles_k;
  }
  auto kernel = p.gate != nullptr ? fused_conv2d_kernel<BN, MB, kResident, true, false>
                                  : fused_conv2d_kernel<BN, MB, kResident, false, false>;
  if constexpr (!kResident) {
    if (sparse) {
      kernel = p.gate != nullptr ? fused_conv2d_kernel<BN, MB, false, true, true>
                                 : fused_conv2d_kernel<BN, MB, false, false, true>;
    }
  }
  check(kName, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  launch_early(kName, kernel, blocks, kThreads, bytes, stream, p);
}

void run(const FusedConv2d& c, int device, cudaStream_t stream) {
  require(c.c % 8 == 0 && c.k % 64 == 0, "input channels must be a multiple of 8, output channels of 64");
  require(c.gate == nullptr || (c.bias == nullptr && !c.relu && c.positive == nullptr), "a gate stands alone");
  require(c.positive == nullptr || c.relu, "positive needs a ReLU");
  require(c.r * c.s <= kMaxTaps, "filters have at most 9 taps");
  require(c.live == nullptr || c.c <= 64 * kChunk, "live words are for at most 4096 input channels");
  require(c.upsample == 1 || (c.upsample == 2 && c.stride == 1), "upsample must be 1 or 2, and 2 needs stride 1");

  Parameters p{};
  p.bias = static_cast<const float*>(c.bias);
  p.gate = static_cast<const uint16_t*>(c.gate);
  p.positive = static_cast<uint16_t*>(c.positive);
  p.live = static_cast<const uint64_t*>(c.live);
  p.filter_taps = c.r * c.s;
  p.N = c.n, p.H = c.h, p.W = c.w_in, p.C = c.c, p.K = c.k, p.OH = c.oh, p.OW = c.ow;
  p.relu = c.relu;
  if (c.r == 1 && c.s == 1 && c.stride == 1 && c.upsample == 1 && c.padding == 0 &&
      (c.residual == nullptr || c.residual_stride == 1)) {
    const int64_t pixels = int64_t{c.n} * c.h * c.w_in;  // a plain matrix product
    require(pixels <= std::numeric_limits<int>::max(), "too many pixels");
    p.N = static_cast<int>(pixels);
    p.H = p.W = p.OH = p.OW = 1;
  }
  list_taps(c, p);

  if (c.narrow_columns != 0) return narrow_conv2d(c, device, stream);
  const auto is = [&c](int channels, int blocks, bool resident) {
    return c.tile_channels == channels && c.tile_blocks == blocks && c.resident == resident;
  };
  if (is(64, 1, false)) return launch_tiles<64, 1, false>(c, p, device, stream);
  if (is(64, 2, false)) return launch_tiles<64, 2, false>(c, p, device, stream);
  if (is(128, 1, false)) return launch_tiles<128, 1, false>(c, p, device, stream);
  if (is(128, 2, false)) return launch_tiles<128, 2, false>(c, p, device, stream);
  if (is(256, 1, false)) return launch_tiles<256, 1, false>(c, p, device, stream);
  if (is(64, 1, true)) return launch_tiles<64, 1, true>(c, p, device, stream);
  if (is(64, 2, true)) return launch_tiles<64, 2, true>(c, p, device, stream);
  if (is(128, 1, true)) return launch_tiles<128, 1, true>(c, p, device, stream);
  if (is(128, 2, true)) return launch_tiles<128, 2, true>(c, p, device, stream);
  if (is(256, 1, true)) return launch_tiles<256, 1, true>(c, p, device, stream);
  require(false, "no such tile");
}

}  // namespace

void fused_conv2d_cuda(const FusedConv2d& c, int device, void* stream) {
  if (c.n == 0 || c.oh == 0 || c.ow == 0) return;
  const DeviceGuard guard(kName, device);
  run(c, device, static_cast<cudaStream_t>(stream));
}

bool fused_conv2d_fits(const FusedConv2d& c) {
  try {
    run(c, -1, nullptr);
  } catch (const std::invalid_argument&) {
    return false;
  }
  return true;
}

}  // namespace rtk
