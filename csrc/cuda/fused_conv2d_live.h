// What fused_conv2d's kernel needs to skip weights that are zero.
//
// Legend: K output channels, C input channels, R S filter. A *block* of weights is one tap of 64 output
// channels (a *group*) and 64 input channels (a chunk). Parameters::live has a 64-bit word for every group
// and tap; its bit j says that chunk j's block is live, that is, has a weight that is not zero.
// live_tiles.cu makes the words.
//
// A thread block turns them round once, into shared memory: for every chunk and group of a tile's channels
// a mask of the taps that are live. Who fetches and who multiplies walk over the masks in the same order.
// The input of a tap is fetched where any group is live there; only live groups' weights are fetched and
// multiplied: by products of 64 channels, which shared memory holds up, or two neighbours by one of 128. On
// the same sums, products of different widths may not be in flight together.
#pragma once

#include <cstdint>

#include "cuda/fused_conv2d_parameters.h"

namespace rtk::fused {

// The tables of one thread block, in shared memory.
struct Live {
  int* products;    // of each tile of channels
  uint16_t* order;  // the tiles of channels, that with the most products first
  uint16_t* masks;  // [tile of channels][chunk][group]: bit r * S + s
};

// For all threads together, as is read_live, with a barrier between the two.
__device__ inline Live empty_live(const Parameters& p, uint8_t* shared) {
  int* products = reinterpret_cast<int*>(shared);
  for (int k = threadIdx.x; k < p.tiles_k; k += kThreads) products[k] = 0;
  uint16_t* order = reinterpret_cast<uint16_t*>(products + p.tiles_k);
  return {products, order, order + p.tiles_k};
}

// The bytes that they take.
inline int64_t live_bytes(int64_t tiles_k, int64_t chunks, int groups) {
  return tiles_k * static_cast<int64_t>(sizeof(int) + sizeof(uint16_t) * (1 + chunks * groups));
}

template <int BN>
__device__ inline void read_live(const Parameters& p, const Live& live) {
  constexpr int kGroups = BN / 64;
  const int masks = p.chunks * kGroups;  // of a tile
  for (int i = threadIdx.x; i < p.tiles_k * masks; i += kThreads) {
    const int k = i / masks * kGroups + i % kGroups, chunk = i % masks / kGroups;
    uint32_t mask = 0;
    if (k * 64 < p.K) {
      const uint64_t* words = p.live + static_cast<int64_t>(k) * p.filter_taps;
#pragma unroll
      for (int tap = 0; tap < kMaxTaps; ++tap) {
        if (tap < p.filter_taps) mask |= static_cast<uint32_t>(words[tap] >> chunk & 1) << tap;
      }
    }
    live.masks[i] = static_cast<uint16_t>(mask);
    atomicAdd(&live.products[i / masks], __popc(mask));
  }
  __syncthreads();
  for (int k = threadIdx.x; k < p.tiles_k; k += kThreads) {
    int before = 0;
    for (int other = 0; other < p.tiles_k; ++other) {
      const int more = live.products[other] - live.products[k];
      before += more > 0 || (more == 0 && other < k);
    }
    live.order[before] = static_cast<uint16_t>(k);
  }
  __syncthreads();
}

// Tiles of channels have more or less to do: so the order goes from much work to little, and the blocks
// take tiles to and fro (0 1 2, 2 1 0, ...), which evens out what each gets.
__device__ inline Tile live_tile_at(const Parameters& p, const Live& live, int index, int BN) {
  const int others = p.tiles / p.tiles_k;
  const int k = p.by_channels ? index / others : index % p.tiles_k;
  const int other = p.by_channels ? index % others : index / p.tiles_k;
  return tile_at(p, other * p.tiles_k + live.order[k], BN);
}

__device__ inline int live_next(int index) {
  const int blocks = static_cast<int>(gridDim.x);
  return index + 2 * (blocks - index % blocks) - 1;
}

// The taps of the tile's class that read inside the image, a bit each.
__device__ inline uint32_t reaching_taps(const Parameters& p, const Tile& t) {
  if (!p.skip) return t.cls->weights;
  uint32_t taps = 0;
  for (int i = 0; i < t.cls->taps; ++i) {
    if (reaches(p, t, t.cls->tap[i])) taps |= 1u << t.cls->tap[i].weight;
  }
  return taps;
}

// The live taps of a tile's groups at a chunk, of those in `reaching`; returns those of any group.
template <int BN>
__device__ inline uint32_t live_taps(const Parameters& p, const Live& live, const Tile& t, int chunk,
                                     uint32_t reaching, uint32_t (&groups)[BN / 64]) {
  const uint16_t* masks = live.masks + (t.k / BN * p.chunks + chunk) * (BN / 64);
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < BN / 64; ++i) {
    groups[i] = masks[i] & reaching;
    any |= groups[i];
  }
  return any;
}

// acc += a b^T for N channels from group `group` on, over one chunk. `pitch`: from one of the MB 64-pixel
// blocks of a to the next, in bytes.
template <int N, int MB, int kSums>
__device__ __forceinline__ void multiply_live(float (&acc)[MB][kSums], int group, uint32_t a, uint32_t pitch,
                                              uint32_t b) {
  using namespace hopper;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
#pragma unroll
    for (int m = 0; m < MB; ++m) {
      wgmma<N>(reinterpret_cast<float(&)[N / 2]>(acc[m][group * 32]), matrix_descriptor(a + m * pitch + step * 32),
               matrix_descriptor(b + group * 64 * kRow + step * 32), 1);
    }
  }
}

// The tap whose bit is `bit`.
__device__ inline const Tap& tap_of(const Class& cls, uint32_t bit) {
  return cls.tap[__popc(cls.weights & (bit - 1))];
}

}  // namespace rtk::fused
