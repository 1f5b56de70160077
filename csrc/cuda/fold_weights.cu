// Masks and batch norms folded into the weights of a whole model: one launch, both layouts.
//
// A block folds one tile: 32 output by 32 input channels at up to nine filter taps, or 64 by 64 of
// a 1x1 filter. It reads the weight along its memory, keeps the bf16 tile in shared memory, and
// writes it out along C and, the other way, along K. Legend: K output channels, C input channels,
// RS filter taps.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kThreads = 256;
constexpr int kTaps = 9;  // the most taps of a tile
constexpr int kSide = 32, kSide1x1 = 64;

// A row of the table that rtk/ops/fold_weights.py writes. Null: no mask, no bias, no batch norm
// (mean and var), gamma 1, beta 0. A mask stride is 0 where the mask is broadcast.
struct Layer {
  const float* weight;
  const uint8_t* mask;
  const float *bias, *mean, *var, *gamma, *beta;
  __nv_bfloat16 *out, *turned;
  float* out_bias;
  int64_t k, c, r, s;
  int64_t strides[4], mask_strides[4];
  int64_t eps_bits;
  int64_t first_tile;
};
constexpr int kWords = sizeof(Layer) / sizeof(int64_t);
static_assert(kWords == 24, "rtk/ops/fold_weights.py writes 24 numbers a layer");

// The tile in shared memory: tap, output channel, input channel. Two more columns a row and sixteen
// more elements a tap keep reads along K, and writes along the taps, mostly free of bank conflicts.
template <int Side>
struct Tile {
  static constexpr int pitch = Side + 2, plane = Side * pitch + 16;
  static __device__ int at(int tap, int k, int c) { return tap * plane + k * pitch + c; }
};
constexpr int kTileElements = kTaps * Tile<kSide>::plane;
static_assert(kTileElements >= Tile<kSide1x1>::plane);

struct Shared {
  __align__(16) __nv_bfloat16 tile[kTileElements];
  float scale[kSide1x1];
  Layer layer;
};

// Which part of the layer a block folds.
struct Part {
  int k0, c0, tap0;     // its first element
  int ks, cs, taps;     // how much of the tile is inside the weight
};

__device__ float folded(float weight, bool kept, float scale) { return kept ? __fmul_rn(weight, scale) : 0.0f; }

// The factor of the tile's output channels, and for the first tile of each the folded bias. Rounded
// after every operation, as PyTorch's elementwise operators are.
__device__ void fold_norm(Shared& shared, const Part& part) {
  const Layer& layer = shared.layer;
  if (threadIdx.x >= part.ks) return;
  const int k = part.k0 + threadIdx.x;
  float scale = 1, bias = layer.bias ? layer.bias[k] : 0;
  if (layer.mean) {
    const float deviation = __fsqrt_rn(__fadd_rn(layer.var[k], __int_as_float(static_cast<int>(layer.eps_bits))));
    scale = __fdiv_rn(layer.gamma ? layer.gamma[k] : 1, deviation);
    bias = __fmul_rn(__fsub_rn(bias, layer.mean[k]), scale);
    if (layer.beta) bias = __fadd_rn(bias, layer.beta[k]);
  }
  shared.scale[threadIdx.x] = scale;
  if (part.c0 == 0 && part.tap0 == 0) layer.out_bias[k] = bias;
}

// How a weight lies in memory, and whether sixteen bytes of it can be read at once.
enum class Order { strided, taps_last, channels_last };

__device__ bool aligned(const void* address, int bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

__device__ Order order_of(const Layer& layer) {
  const int64_t c = layer.c, taps = layer.r * layer.s, *strides = layer.strides;
  if (c % 4 != 0 || !aligned(layer.weight, 16) || strides[0] != c * taps) return Order::strided;
  const bool row = layer.r == 1, column = layer.s == 1;
  if (strides[1] == 1 && (row || strides[2] == layer.s * c) && (column || strides[3] == c)) {
    return Order::channels_last;
  }
  if (strides[1] == taps && (row || strides[2] == layer.s) && (column || strides[3] == 1)) return Order::taps_last;
  return Order::strided;
}

__device__ bool same_strides(const Layer& layer) {
  bool same = aligned(layer.mask, 4);
  for (int d = 0; d < 4; ++d) same &= layer.strides[d] == layer.mask_strides[d];
  return same;
}

__device__ int64_t offset(const int64_t* strides, int64_t k, int64_t c, int tap, int s) {
  return k * strides[0] + c * strides[1] + (tap / s) * strides[2] + (tap % s) * strides[3];
}

// Fills the tile with four elements a load. Taps: R * S, which a tile holds entirely here. Full: all
// of its input channels are there, so that no index is divided by a number that is known too late.
// Apart: the mask's strides are not the weight's, so that its bytes are read one by one.
template <int Side, int Taps, Order order, int Batch, bool Full, bool Apart>
__device__ void load_vectors(Shared& shared, const Part& part) {
  const Layer& layer = shared.layer;
  const int cs = Full ? Side : part.cs, quads = cs / 4;
  const int row = quads * Taps, count = part.ks * row;  // loads an output channel, and in all
  const int k_pitch = static_cast<int>(layer.strides[0]), tap_pitch = static_cast<int>(layer.c);
  const int64_t base = part.k0 * layer.strides[0] + int64_t(part.c0) * (order == Order::taps_last ? Taps : 1);
  const float* weight = layer.weight + base;
  const bool masked = layer.mask != nullptr;
  const uint8_t* mask = Apart || !masked ? layer.mask : layer.mask + base;

  for (int first = threadIdx.x; first < count; first += kThreads * Batch) {
    float4 values[Batch];
    uchar4 keep[Batch];
#pragma unroll
    for (int b = 0; b < Batch; ++b) {  // all loads of a batch before the first use
      const int load = first + b * kThreads;
      keep[b] = make_uchar4(1, 1, 1, 1);
      if (load >= count) continue;
      const int k = load / row, in_row = load % row;
      const int at = order == Order::taps_last ? k * k_pitch + in_row * 4
                                               : k * k_pitch + in_row / quads * tap_pitch + in_row % quads * 4;
      values[b] = __ldg(reinterpret_cast<const float4*>(weight + at));
      if (!Apart && masked) keep[b] = __ldg(reinterpret_cast<const uchar4*>(mask + at));
    }
#pragma unroll
    for (int b = 0; b < Batch; ++b) {
      const int load = first + b * kThreads;
      if (load >= count) continue;
      const int k = load / row, in_row = load % row;
      const float scale = shared.scale[k];
      const float value[4] = {values[b].x, values[b].y, values[b].z, values[b].w};
      const uint8_t kept[4] = {keep[b].x, keep[b].y, keep[b].z, keep[b].w};
      __nv_bfloat16 results[4];
      int taps[4], channels[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        taps[i] = order == Order::taps_last ? (in_row * 4 + i) % Taps : in_row / quads;
        channels[i] = order == Order::taps_last ? (in_row * 4 + i) / Taps : in_row % quads * 4 + i;
        bool stays = kept[i];
        if (Apart) {
          const int width = static_cast<int>(layer.s);
          stays = mask[offset(layer.mask_strides, part.k0 + k, part.c0 + channels[i], taps[i], width)];
        }
        results[i] = __float2bfloat16_rn(folded(value[i], stays, scale));
      }
      if (order == Order::channels_last) {
        auto* pairs = reinterpret_cast<__nv_bfloat162*>(&shared.tile[Tile<Side>::at(taps[0], k, channels[0])]);
        pairs[0] = __halves2bfloat162(results[0], results[1]);
        pairs[1] = __halves2bfloat162(results[2], results[3]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) shared.tile[Tile<Side>::at(taps[i], k, channels[i])] = results[i];
      }
    }
  }
}

template <int Side, int Taps, Order order, int Batch>
__device__ void load_vectors(Shared& shared, const Part& part) {
  if (shared.layer.mask && !same_strides(shared.layer)) {
    load_vectors<Side, Taps, order, 1, false, true>(shared, part);
  } else if (part.cs == Side) {
    load_vectors<Side, Taps, order, Batch, true, false>(shared, part);
  } else {
    load_vectors<Side, Taps, order, Batch, false, false>(shared, part);
  }
}

// The same for every other filter and layout, one element a load.
template <int Side>
__device__ void load_elements(Shared& shared, const Part& part) {
  const Layer& layer = shared.layer;
  const int width = static_cast<int>(layer.s), count = part.ks * part.cs * part.taps;
  for (int load = threadIdx.x; load < count; load += kThreads) {
    const int tap = load % part.taps, c = load / part.taps % part.cs, k = load / (part.taps * part.cs);
    const int64_t from_k = part.k0 + k, from_c = part.c0 + c;
    const float value = layer.weight[offset(layer.strides, from_k, from_c, part.tap0 + tap, width)];
    const bool stays =
        layer.mask == nullptr || layer.mask[offset(layer.mask_strides, from_k, from_c, part.tap0 + tap, width)];
    shared.tile[Tile<Side>::at(tap, k, c)] = __float2bfloat16_rn(folded(value, stays, shared.scale[k]));
  }
}

__device__ uint32_t pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return __bfloat16_as_ushort(low) | uint32_t(__bfloat16_as_ushort(high)) << 16;
}

// out (K, R, S, C): neighbouring threads write neighbouring channels, eight each. Taps: of the tile,
// 0 where that is not known when this is compiled.
template <int Side, int Taps>
__device__ void store_out(const Shared& shared, const Part& part) {
  const Layer& layer = shared.layer;
  const int taps = Taps ? Taps : part.taps, cs = part.cs, ks = part.ks;
  const int tap_pitch = static_cast<int>(layer.c), k_pitch = static_cast<int>(layer.r * layer.s) * tap_pitch;
  __nv_bfloat16* out = layer.out + int64_t(part.k0) * k_pitch + int64_t(part.tap0) * tap_pitch + part.c0;
  if (tap_pitch % 8 == 0) {
    constexpr int groups = Side / 8;
    for (int unit = threadIdx.x; unit < taps * Side * groups; unit += kThreads) {
      const int c = unit % groups * 8, k = unit / groups % Side, tap = unit / (groups * Side);
      if (c >= cs || k >= ks) continue;
      // Rows are four-byte aligned only, because of their padding.
      const auto* row = reinterpret_cast<const uint32_t*>(&shared.tile[Tile<Side>::at(tap, k, c)]);
      __stcg(reinterpret_cast<uint4*>(out + k * k_pitch + tap * tap_pitch + c),
             make_uint4(row[0], row[1], row[2], row[3]));
    }
  } else {
    for (int unit = threadIdx.x; unit < taps * Side * Side; unit += kThreads) {
      const int c = unit % Side, k = unit / Side % Side, tap = unit / (Side * Side);
      if (c >= cs || k >= ks) continue;
      out[k * k_pitch + tap * tap_pitch + c] = shared.tile[Tile<Side>::at(tap, k, c)];
    }
  }
}

// turned (C, R, S, K), the taps in reverse. Four threads write 64 bytes along K, a warp eight such
// rows: then its reads, two bytes each, meet in no bank.
template <int Side, int Taps>
__device__ void store_turned(const Shared& shared, const Part& part) {
  const Layer& layer = shared.layer;
  const int taps = Taps ? Taps : part.taps, all_taps = static_cast<int>(layer.r * layer.s), cs = part.cs, ks = part.ks;
  const int tap_pitch = static_cast<int>(layer.k), c_pitch = all_taps * tap_pitch;
  __nv_bfloat16* turned =
      layer.turned + int64_t(part.c0) * c_pitch + int64_t(all_taps - 1 - part.tap0) * tap_pitch + part.k0;
  if (tap_pitch % 8 == 0) {
    constexpr int blocks = Side / 32;
    for (int unit = threadIdx.x; unit < taps * Side * blocks * 4; unit += kThreads) {
      const int c = unit / 4 % Side, rest = unit / (4 * Side), tap = rest / blocks;
      const int k = rest % blocks * 32 + unit % 4 * 8;
      if (c >= cs || k >= ks) continue;
      const __nv_bfloat16* column = &shared.tile[Tile<Side>::at(tap, k, c)];
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = pack(column[2 * i * Tile<Side>::pitch], column[(2 * i + 1) * Tile<Side>::pitch]);
      }
      __stcg(reinterpret_cast<uint4*>(turned + c * c_pitch - tap * tap_pitch + k),
             make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  } else {
    for (int unit = threadIdx.x; unit < taps * Side * Side; unit += kThreads) {
      const int k = unit % Side, c = unit / Side % Side, tap = unit / (Side * Side);
      if (c >= cs || k >= ks) continue;
      turned[c * c_pitch - tap * tap_pitch + k] = shared.tile[Tile<Side>::at(tap, k, c)];
    }
  }
}

// Taps: R * S where it is known when this is compiled, else 0.
template <int Side, int Taps, int Batch>
__device__ void fold(Shared& shared, int64_t tile) {
  const Layer& layer = shared.layer;
  const int all_taps = static_cast<int>(layer.r * layer.s);
  const int64_t tap_tiles = (all_taps + kTaps - 1) / kTaps, c_tiles = (layer.c + Side - 1) / Side;
  Part part;
  part.tap0 = static_cast<int>(tile % tap_tiles) * kTaps;
  part.c0 = static_cast<int>(tile / tap_tiles % c_tiles) * Side;
  part.k0 = static_cast<int>(tile / (tap_tiles * c_tiles)) * Side;
  part.taps = min(kTaps, all_taps - part.tap0);
  part.cs = min(Side, static_cast<int>(layer.c) - part.c0);
  part.ks = min(Side, static_cast<int>(layer.k) - part.k0);

  fold_norm(shared, part);
  __syncthreads();
  const Order order = Taps == 0 ? Order::strided : order_of(layer);
  if constexpr (Taps > 0) {
    if (order == Order::channels_last) load_vectors<Side, Taps, Order::channels_last, Batch>(shared, part);
  }
  if constexpr (Taps > 1) {
    if (order == Order::taps_last) load_vectors<Side, Taps, Order::taps_last, Batch>(shared, part);
  }
  if (order == Order::strided) load_elements<Side>(shared, part);
  __syncthreads();
  store_out<Side, Taps>(shared, part);
  store_turned<Side, Taps>(shared, part);
}

__global__ void __launch_bounds__(kThreads, 4) fold_weights(const Layer* __restrict__ table, int layers) {
  __shared__ Shared shared;
  // The layer of this block: how many begin no later than it does.
  int found = 0;
  for (int first = 0; first < layers; first += kThreads) {
    const int at = first + static_cast<int>(threadIdx.x);
    found += __syncthreads_count(at < layers && table[at].first_tile <= blockIdx.x);
  }
  if (threadIdx.x < kWords) {
    reinterpret_cast<int64_t*>(&shared.layer)[threadIdx.x] =
        reinterpret_cast<const int64_t*>(table + found - 1)[threadIdx.x];
  }
  __syncthreads();
  const int64_t tile = blockIdx.x - shared.layer.first_tile, taps = shared.layer.r * shared.layer.s;
  if (taps == 1) {
    fold<kSide1x1, 1, 4>(shared, tile);
  } else if (taps == 9) {
    fold<kSide, 9, 3>(shared, tile);
  } else {
    fold<kSide, 0, 1>(shared, tile);
  }
}

}  // namespace

void fold_weights_cuda(const void* table, int layers, int64_t tiles, int device, void* stream) {
  const DeviceGuard guard("fold_weights", device);
  launch("fold_weights", fold_weights, tiles, kThreads, 0, static_cast<cudaStream_t>(stream),
         static_cast<const Layer*>(table), layers);
}

}  // namespace rtk
