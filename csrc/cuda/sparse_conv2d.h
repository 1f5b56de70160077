// The lists by which sparse_conv2d multiplies only by weights that are not zero, and the order of its input
// in shared memory, which the order of a list follows.
//
// Sixteen output channels, a panel, share a list of columns, one for each chunk of 128 input channels: the
// (tap, input channel) at which any of them has a weight. A list is, in words of 32 bits, a header of four, whose
// first is the number of steps, and the steps, of 32 columns: 32 places, each (9 r + s) 128 + the channel in the
// chunk, and the weights, two pieces of 16 columns, each an A fragment of mma.m16n8k16. There is room for all
// columns, so that no list overflows.
//
// Legend: C input channels, K output channels, R S filter.
#pragma once

#include <cstdint>

namespace rtk::sparse {

constexpr int kPanel = 16;        // output channels that share a list
constexpr int kChunk = 128;       // input channels of a list, and in shared memory at once
constexpr int kStepColumns = 32;  // columns that a warp multiplies at once; lists are padded to that
constexpr int kTaps = 9;          // the most
constexpr int kRow = 9;           // pixels of a row in shared memory, of every tile
constexpr int kHeader = 4;        // words
constexpr int kStepWords = kStepColumns + kStepColumns * kPanel / 2;

// Shared memory is cut in units of sixteen bytes: a channel of a pixel, of eight images. This is where a channel
// of a chunk begins. Every pitch is 7 modulo 8, so that a unit's group of banks does not depend on the tile; the
// last term makes the writes of neighbouring channels free of conflicts.
template <int kPitch>
__host__ __device__ constexpr uint32_t channel_unit(uint32_t c) {
  static_assert(kPitch % 8 == 7);
  return c * kPitch + c / 8;
}

// The words of a list.
__host__ __device__ inline int list_words(int c, int taps) {
  return kHeader + (taps * (c < kChunk ? c : kChunk) + kStepColumns - 1) / kStepColumns * kStepWords;
}
__host__ __device__ inline int chunks_of(int c) { return (c + kChunk - 1) / kChunk; }
__host__ __device__ inline int panels_of(int k) { return (k + kPanel - 1) / kPanel; }

}  // namespace rtk::sparse
