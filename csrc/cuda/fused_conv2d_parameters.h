// What a launch of fused_conv2d's kernel is told, and how a tile is found; fused_conv2d_kernel.h explains.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/hopper.h"

namespace rtk::fused {

constexpr int kChunk = 64;             // channels of a row in shared memory
constexpr int kRow = kChunk * 2;       // bytes of it
constexpr int kConsumers = 2;          // warpgroups that multiply
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kMaxStages = 16, kMaxTaps = 9, kMaxClasses = 4;
constexpr int kSharedBytes = 232448;   // what a block may have on sm_90
constexpr int kMaxStaging = 4;         // buffers of a consumer
constexpr int kBarrierBytes = 8 * (4 * kMaxStages + 2 * kConsumers * kMaxStaging);

struct Tap {
  int dh, dw;      // the input pixel of output pixel (h, w) is (h * stride + dh, w * stride + dw)
  int weight;      // r * S + s
  int row;         // halo: where the tap's window begins in the box, in rows of shared memory
};

// The output pixels (h * step + h_first, w * step + w_first) and the taps that reach them.
struct Class {
  int taps, h_first, w_first, map;  // map: which of the maps of residual and output
  bool residual;
  Tap tap[kMaxTaps];                // by growing `weight`
  uint32_t weights;                 // the taps' `weight`, a bit each
};

struct Parameters {
  CUtensorMap x, w, residual[kMaxClasses], out[kMaxClasses];
  const float* bias;
  const uint16_t* gate;                // a bit a channel, K / 16 words a pixel; see load_bits
  uint16_t* positive;                  // the same of this output, or null
  int N, H, W, C, K, OH, OW, stride, step;
  bool relu, halo, skip;
  int bn_log2, bw_log2, bh;            // the box of output pixels
  int h_low, w_low;                    // halo: the smallest tap offsets
  int block_pitch;                     // rows of shared memory from one 64-pixel block to the next
  int tiles_k, tiles_n, tiles_w, tiles_h, classes, tiles;
  int chunks, a_stages, b_stages, staging;
  uint32_t a_bytes;
  Class cls[kMaxClasses];
  const uint64_t* live;                // R S words for every 64 channels, or null; see fused_conv2d_live.h
  int filter_taps, live_bytes;         // R S; the shared memory that the words' table takes
  bool by_channels;                    // all tiles of the same channels one after the other
};

struct Tile {
  int k, n, h, w;                      // first channel, image, row, column (of the class)
  const Class* cls;
};

__device__ inline Tile tile_at(const Parameters& p, int index, int BN) {
  Tile t;
  t.k = index % p.tiles_k * BN;
  index /= p.tiles_k;
  t.w = (index % p.tiles_w) << p.bw_log2;
  index /= p.tiles_w;
  t.h = index % p.tiles_h * p.bh;
  index /= p.tiles_h;
  t.n = (index % p.tiles_n) << p.bn_log2;
  t.cls = &p.cls[index / p.tiles_n];
  return t;
}

// Whether any pixel of the tile reads inside the image at this tap.
__device__ inline bool reaches(const Parameters& p, const Tile& t, const Tap& tap) {
  const int h = t.h * p.stride + tap.dh, w = t.w * p.stride + tap.dw;
  return h + (p.bh - 1) * p.stride >= 0 && h < p.H && w + ((1 << p.bw_log2) - 1) * p.stride >= 0 && w < p.W;
}

// How many boxes of a chunk the tile fetches.
__device__ inline int boxes_of(const Parameters& p, const Tile& t) { return p.halo ? min(t.cls->taps, 1) : t.cls->taps; }

}  // namespace rtk::fused
