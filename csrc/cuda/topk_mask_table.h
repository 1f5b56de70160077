// What topk_mask.cu works on: the table of a launch, what is kept from call to call, keys, scores and marks.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "rtk.h"

namespace rtk::topk {

constexpr int kThreads = 512, kWarps = kThreads / 32, kBlocksPerSm = 2;
constexpr int kQuads = 4;  // four scores each, that a thread loads at a time
constexpr uint32_t kQuadStep = 4 * kThreads, kTile = kQuads * kQuadStep;
constexpr uint32_t kStaged = 4096;  // candidates that a block can list in one piece of its run
constexpr int kBinBits = 11, kBins = 1 << kBinBits, kCopies = 4;
constexpr uint32_t kNegativeInfinity = 0x007fffffu, kPositiveInfinity = 0xff800000u;  // as keys
constexpr unsigned kAll = ~0u;

// How many candidates a segment may have: more than a sample's bracket holds, 16 sqrt(size) at worst.
__host__ __device__ constexpr uint32_t capacity_of(int64_t size) {
  const int64_t most = size / 64 + 6144;
  return static_cast<uint32_t>(size < most ? size : most);
}

// What a launch can take as an argument (4 KB everywhere, 32,764 bytes on what is built here).
constexpr int kFew = 96, kMany = kTopkMaskTensors;

// One tensor. Its candidates begin at `first_candidate` if it is the first of a segment.
struct Piece {
  const void* scores;
  uint8_t* mask;   // null: no bytes wanted
  uint32_t* bits;  // null: no bits wanted
  uint32_t size, first_tile, k, first_candidate;
};

// One segment, kept from call to call. Keys lo to hi: the bracket. The counts come in three sets: two that
// first passes take in turn, each cleared in the other's call, and one for a second pass.
struct Record {
  uint32_t lo, hi, threshold;
  uint32_t coarse;  // keys that share the threshold's highest 11 bits
  // Of a count: the key's bits so far, how many of the keys that have them are wanted, how many there are.
  uint32_t prefix, needed, equal;
  uint32_t above[3], candidates[3], overflown[3];
};

struct Header {
  uint32_t calls;
};

template <int Capacity>
struct Table {
  Header* header;
  Record* records;
  uint32_t *bins, *ties;
  uint64_t* candidates;
  const int32_t* device_k;
  uint32_t pieces, segments, tiles, total;
  bool whole, fresh;
  Piece piece[Capacity];
};
static_assert(sizeof(Table<kFew>) <= 4096 && sizeof(Table<kMany>) <= 32764);

struct Shared {
  union {
    uint64_t staged[kStaged];
    uint32_t copies[kBins * kCopies];
  };
  uint32_t bins[kBins];
  uint32_t warp_sums[kWarps];
  uint32_t count, above, base;
  uint32_t bin, before, inside;
  uint32_t calls;  // before this one
  uint32_t first_tile, end_tile, first_piece;  // this block's run
};

// The integer that orders as the scores do: NaN is 0, -0 is +0, negatives are turned around. No score has
// the key 0x7fffffff.
__device__ inline uint32_t order_key(float score) {
  const uint32_t bits = __float_as_uint(score), magnitude = bits & 0x7fffffffu;
  const uint32_t key = (bits >> 31) && magnitude ? ~bits : bits | 0x80000000u;
  return magnitude > 0x7f800000u ? 0 : key;
}

__device__ inline float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ inline void set_bracket(Record& record, uint32_t lo, uint32_t hi) {
  lo = min(max(lo, kNegativeInfinity), kPositiveInfinity);
  hi = min(max(hi, lo), kPositiveInfinity);
  record.lo = lo;
  record.hi = hi == 0x7fffffffu && lo < hi ? hi - 1 : hi;
}

// Scores are loaded as bits and become floats where they are used: until then nothing waits for the load.
// `ulp`: how far the keys of neighbouring scores lie apart, at least.
struct Format32 {
  using Bits = uint32_t;
  using Quad = uint4;
  static constexpr uint32_t ulp = 1;
  static __device__ Quad pack(Bits a, Bits b, Bits c, Bits d) { return make_uint4(a, b, c, d); }
};
struct Format16 {
  using Bits = uint16_t;
  using Quad = uint2;
  static __device__ Quad pack(Bits a, Bits b, Bits c, Bits d) {
    return make_uint2(a | static_cast<uint32_t>(b) << 16, c | static_cast<uint32_t>(d) << 16);
  }
};
struct F32 : Format32 {
  static __device__ float4 floats(Quad q) {
    return make_float4(__uint_as_float(q.x), __uint_as_float(q.y), __uint_as_float(q.z), __uint_as_float(q.w));
  }
};
struct Bf16 : Format16 {
  static constexpr uint32_t ulp = 1u << 16;
  static __device__ float4 floats(Quad q) {
    return make_float4(__uint_as_float(q.x << 16), __uint_as_float(q.x & 0xffff0000u), __uint_as_float(q.y << 16),
                       __uint_as_float(q.y & 0xffff0000u));
  }
};
struct F16 : Format16 {
  static constexpr uint32_t ulp = 1u << 13;
  static __device__ float one(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
  static __device__ float4 floats(Quad q) {
    return make_float4(one(q.x), one(q.x >> 16), one(q.y), one(q.y >> 16));
  }
};

// Four scores from `at` on. Where there are none: NaN, for which no comparison holds.
template <class F, bool Inside = false>
__device__ typename F::Quad load_quad(const Piece& piece, uint32_t at, bool vectors) {
  using Bits = typename F::Bits;
  const Bits* scores = static_cast<const Bits*>(piece.scores);
  if (Inside || (vectors && at + 4 <= piece.size)) {
    return __ldcg(reinterpret_cast<const typename F::Quad*>(scores + at));
  }
  const Bits none = static_cast<Bits>(0x7fffffffu);
  const uint32_t left = at < piece.size ? piece.size - at : 0;
  return F::pack(left > 0 ? scores[at] : none, left > 1 ? scores[at + 1] : none,
                 left > 2 ? scores[at + 2] : none, left > 3 ? scores[at + 3] : none);
}

template <class F>
__device__ void load_tile(typename F::Quad (&quads)[kQuads], const Piece& piece, uint32_t at, bool vectors) {
#pragma unroll
  for (int j = 0; j < kQuads; ++j) quads[j] = load_quad<F>(piece, at + j * kQuadStep, vectors);
}

template <class F>
__device__ bool aligned(const Piece& piece) {
  return reinterpret_cast<uintptr_t>(piece.scores) % sizeof(typename F::Quad) == 0 &&
         reinterpret_cast<uintptr_t>(piece.mask) % 4 == 0;
}

// Writes four marks, one a byte of `marks`; Inside: they are known to lie in the tensor, and aligned. All
// lanes of a warp come here together.
template <bool Inside>
__device__ void store_quad(const Piece& piece, uint32_t at, uint32_t marks, bool vectors) {
  const bool inside = Inside || at + 4 <= piece.size;
  if (piece.mask != nullptr) {
    if (inside && (Inside || vectors)) {
      *reinterpret_cast<uint32_t*>(piece.mask + at) = marks;
    } else {
      for (uint32_t e = 0; e < 4 && at + e < piece.size; ++e) piece.mask[at + e] = marks >> (8 * e) & 1;
    }
  }
  if (piece.bits != nullptr) {
    uint32_t word = (marks * 0x01020408u) >> 24 & 15;  // the lowest bits of the bytes, side by side
    if (!inside) word &= at < piece.size ? (1u << (piece.size - at)) - 1 : 0;
    word <<= at % 32;
    for (int lanes = 1; lanes < 8; lanes *= 2) word |= __shfl_xor_sync(kAll, word, lanes);
    if (at % 32 == 0 && (Inside || at < piece.size)) piece.bits[at / 32] = word;
  }
}

__device__ inline void mark(const Piece& piece, uint32_t at) {
  if (piece.mask != nullptr) piece.mask[at] = 1;
  if (piece.bits != nullptr) atomicOr(&piece.bits[at / 32], 1u << (at % 32));
}

__device__ inline uint32_t warp_sum(uint32_t value) { return __reduce_add_sync(kAll, value); }

// The sum of the values of the threads before this one; `total`: of all. Every thread calls it.
__device__ inline uint32_t sum_before(uint32_t value, Shared& shared, uint32_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t before = value;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) shared.warp_sums[warp] = before;
  __syncthreads();
  before -= value;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before += total;
    total += shared.warp_sums[w];
  }
  __syncthreads();
  return before;
}

// Finds the bin, from the highest down, that holds the `needed`-th of all counted (there are as many):
// `counts` are this thread's four, of bins 2047 - 4 t, 2046 - 4 t and so on. Leaves in `shared` the bin, how
// many are in the bins above it, and in it. Every thread calls it.
__device__ inline void find_bin(const uint32_t (&counts)[4], uint32_t needed, Shared& shared) {
  static_assert(4 * kThreads == kBins);
  uint32_t total;
  uint32_t before = sum_before(counts[0] + counts[1] + counts[2] + counts[3], shared, total);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (before < needed && needed <= before + counts[i]) {
      shared.bin = kBins - 1 - (4 * threadIdx.x + i);
      shared.before = before;
      shared.inside = counts[i];
    }
    before += counts[i];
  }
  __syncthreads();
}

}  // namespace rtk::topk
