// The passes of topk_mask.cu, which says how they follow each other.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/topk_mask_table.h"

namespace rtk::topk {

using Grid = cooperative_groups::grid_group;

template <class F, int Capacity>
struct Selection {
  const Table<Capacity>& table;
  Shared& shared;

  // The counts of this call's first and second pass.
  static constexpr uint32_t kSecond = 2;
  __device__ uint32_t first() const { return shared.calls % 2; }

  __device__ uint32_t segments() const { return table.segments; }
  __device__ uint32_t segment_of(uint32_t piece) const { return table.whole ? 0 : piece; }
  __device__ uint32_t size_of(uint32_t s) const { return table.whole ? table.total : table.piece[s].size; }
  __device__ uint32_t k_of(uint32_t s) const {
    if (table.device_k == nullptr) return table.piece[s].k;
    const int64_t k = table.device_k[s], size = size_of(s);
    return static_cast<uint32_t>(k < 0 ? 0 : k > size ? size : k);
  }
  __device__ bool trivial(uint32_t s) const {
    const uint32_t k = k_of(s);
    return k == 0 || k == size_of(s);
  }

  // Whether the k-th is among the candidates that a pass listed.
  __device__ bool holds(uint32_t s, uint32_t counts) const {
    const Record& record = table.records[s];
    const uint32_t k = k_of(s), above = record.above[counts], found = record.candidates[counts];
    return !record.overflown[counts] && found <= capacity_of(size_of(s)) && above < k && k - above <= found;
  }
  __device__ bool missed(uint32_t s) const { return !trivial(s) && !holds(s, first()); }
  __device__ bool tied(uint32_t s) const { return missed(s) && !holds(s, kSecond); }

  template <class Predicate>
  __device__ bool any(Predicate predicate) const {
    bool found = false;
    for (uint32_t s = threadIdx.x; s < segments(); s += kThreads) found |= predicate(s);
    return __syncthreads_or(found);
  }

  // The piece from `low` to `high` - 1 that holds a tile.
  __device__ uint32_t piece_of(uint32_t tile, uint32_t low, uint32_t high) const {
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      if (table.piece[middle].first_tile <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // What a block needs to know throughout lies in shared memory, not in registers.
  __device__ void begin() {
    if (threadIdx.x == 0) {
      const uint64_t tiles = table.tiles;
      shared.first_tile = static_cast<uint32_t>(tiles * blockIdx.x / gridDim.x);
      shared.end_tile = static_cast<uint32_t>(tiles * (blockIdx.x + 1) / gridDim.x);
      shared.first_piece = piece_of(shared.first_tile, 0, table.pieces);
      shared.calls = table.fresh ? 0 : table.header->calls;
    }
    __syncthreads();
  }

  // Calls body(piece index, its segment, first tile, end tile) for every piece of this block's run.
  template <class Body>
  __device__ void for_run(Body body) const {
    uint32_t tile = shared.first_tile;
    const uint32_t end = shared.end_tile;
    for (uint32_t i = shared.first_piece; tile < end; ++i) {
      const uint32_t next = i + 1 < table.pieces ? table.piece[i + 1].first_tile : table.tiles;
      const uint32_t stop = min(end, next);
      if (tile < stop) body(i, segment_of(i), tile, stop);
      tile = stop;
    }
  }

  // Lists those of four scores that `in` names. All lanes of a warp come here together.
  __device__ void stage(const float4& v, const bool (&in)[4], uint32_t id) {
    const uint32_t lane = threadIdx.x % 32, lower = (1u << lane) - 1;
    const float scores[4] = {v.x, v.y, v.z, v.w};
    unsigned lanes[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) lanes[e] = __ballot_sync(kAll, in[e]);
    uint32_t at = 0;
    if (lane == 0) {
      at = atomicAdd(&shared.count, __popc(lanes[0]) + __popc(lanes[1]) + __popc(lanes[2]) + __popc(lanes[3]));
    }
    at = __shfl_sync(kAll, at, 0);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t mine = at + __popc(lanes[e] & lower);
      // The smaller index is the larger number: it wins among equals.
      if (in[e] && mine < kStaged) {
        shared.staged[mine] = static_cast<uint64_t>(order_key(scores[e])) << 32 | ~(id + e);
      }
      at += __popc(lanes[e]);
    }
  }

  // The pass that writes masks: all above the bracket are marked, candidates are listed.
  template <class Predicate>
  __device__ void partition(uint32_t counts, Predicate wanted) {
    if (threadIdx.x == 0) shared.count = shared.above = 0;
    __syncthreads();
    for_run([&](uint32_t i, uint32_t s, uint32_t tile, uint32_t end) {
      if (!wanted(s)) return;
      const Piece& piece = table.piece[i];
      Record& record = table.records[s];
      const uint32_t size = size_of(s), k = k_of(s);
      const uint32_t fill = k == size ? 0x01010101u : 0;
      const bool open = 0 < k && k < size;
      const float lo = open ? score_of(record.lo) : NAN, hi = open ? score_of(record.hi) : NAN;
      const bool vectors = aligned<F>(piece);

      uint32_t at = (tile - piece.first_tile) * kTile + 4 * threadIdx.x;
      uint32_t id = tile * kTile + 4 * threadIdx.x, above = 0;
      typename F::Quad quads[kQuads];
      load_tile<F>(quads, piece, at, vectors);
      // Inside: this tile and the next of the run are full and aligned.
      const auto step = [&](auto inside) {
        constexpr bool Inside = decltype(inside)::value;
#pragma unroll
        for (int j = 0; j < kQuads; ++j) {
          const float4 v = F::floats(quads[j]);
          const bool x = v.x > hi, y = v.y > hi, z = v.z > hi, w = v.w > hi;
          const uint32_t marks = static_cast<uint32_t>(x) | static_cast<uint32_t>(y) << 8 |
                                 static_cast<uint32_t>(z) << 16 | static_cast<uint32_t>(w) << 24;
          above += __popc(marks);
          const bool in[4] = {v.x >= lo && !x, v.y >= lo && !y, v.z >= lo && !z, v.w >= lo && !w};
          if (__any_sync(kAll, in[0] || in[1] || in[2] || in[3])) stage(v, in, id + j * kQuadStep);
          store_quad<Inside>(piece, at + j * kQuadStep, marks | fill, vectors);
          // The next tile's, long before it is needed.
          const uint32_t next = Inside || tile + 1 < end ? at + kTile + j * kQuadStep : piece.size;
          quads[j] = load_quad<F, Inside>(piece, next, vectors);
        }
      };
      uint32_t beyond = (tile - piece.first_tile + 2) * kTile;  // the end of the next tile
      for (; tile < end; ++tile, at += kTile, id += kTile, beyond += kTile) {
        if (vectors && tile + 1 < end && beyond <= piece.size) {
          step(std::true_type{});
        } else {
          step(std::false_type{});
        }
      }
      above = warp_sum(above);
      if (threadIdx.x % 32 == 0 && above) atomicAdd(&shared.above, above);
      __syncthreads();
      const uint32_t count = shared.count;
      if (threadIdx.x == 0) {
        if (count) shared.base = atomicAdd(&record.candidates[counts], count);
        if (count > kStaged) record.overflown[counts] = 1;
        if (shared.above) atomicAdd(&record.above[counts], shared.above);
      }
      __syncthreads();
      const uint32_t capacity = capacity_of(size);
      uint64_t* list = candidates_of(s);
      for (uint32_t x = threadIdx.x; x < min(count, kStaged); x += kThreads) {
        if (shared.base + x < capacity) list[shared.base + x] = shared.staged[x];
      }
      if (threadIdx.x == 0) shared.count = shared.above = 0;
      __syncthreads();
    });
  }

  __device__ uint64_t* candidates_of(uint32_t s) const {
    return table.candidates + table.piece[s].first_candidate;
  }

  // Counts digit 0, 1 or 2 (11, 11 and 10 bits, the highest first) of the keys that share a prefix; of a
  // Sample: two neighbouring quads in 32, which is as little as memory reads at once, from everywhere.
  template <bool Sample, class Predicate>
  __device__ void count_digits(int digit, Predicate wanted) {
    constexpr uint32_t quads_a_tile = Sample ? kTile / 64 : kThreads;  // that the block loads at a time
    constexpr uint32_t tiles = kThreads / quads_a_tile, step = Sample ? tiles * kQuads : 1;
    const int shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, above = digit == 1 ? 21 : 10;
    const uint32_t digits = digit == 2 ? 1023 : 2047;
    for_run([&](uint32_t i, uint32_t s, uint32_t tile, uint32_t end) {
      if (!wanted(s)) return;
      const Piece piece = table.piece[i];
      const uint32_t prefix = table.records[s].prefix;
      const bool vectors = aligned<F>(piece);
      // Copies: neighbouring lanes often count the same digit.
      for (uint32_t x = threadIdx.x; x < kBins * kCopies; x += kThreads) shared.copies[x] = 0;
      __syncthreads();
      for (; tile < end; tile += step) {
        uint32_t at[kQuads];
        typename F::Quad quads[kQuads];
#pragma unroll
        for (int j = 0; j < kQuads; ++j) {
          if constexpr (Sample) {
            const uint32_t one = tile + j * tiles + threadIdx.x / quads_a_tile;
            const uint32_t quad = threadIdx.x % quads_a_tile;
            at[j] = one < end ? (one - piece.first_tile) * kTile + quad / 2 * 128 + quad % 2 * 4 : piece.size;
          } else {
            at[j] = (tile - piece.first_tile) * kTile + j * kQuadStep + 4 * threadIdx.x;
          }
          quads[j] = load_quad<F>(piece, at[j], vectors);
        }
#pragma unroll
        for (int j = 0; j < kQuads; ++j) {
          const float4 v = F::floats(quads[j]);
          const float scores[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t key = order_key(scores[e]);
            if (at[j] + e < piece.size && (digit == 0 || key >> above == prefix)) {
              atomicAdd(&shared.copies[(key >> shift & digits) * kCopies + threadIdx.x % kCopies], 1u);
            }
          }
        }
      }
      __syncthreads();
      for (uint32_t bin = threadIdx.x; bin < kBins; bin += kThreads) {
        uint32_t count = 0;
        for (int copy = 0; copy < kCopies; ++copy) count += shared.copies[bin * kCopies + copy];
        if (count) atomicAdd(&table.bins[s * kBins + bin], count);
      }
      __syncthreads();
    });
  }

  // Takes this thread's counts of a segment, in the order of find_bin, and clears them.
  __device__ void take_counts(uint32_t s, uint32_t (&counts)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t& bin = table.bins[s * kBins + kBins - 1 - (4 * threadIdx.x + i)];
      counts[i] = bin;
      bin = 0;
    }
  }

  // Narrows the prefixes by the digit just counted, and clears the counts.
  template <class Predicate>
  __device__ void find_digit(int digit, Predicate wanted) {
    for (uint32_t s = blockIdx.x; s < segments(); s += gridDim.x) {
      if (!wanted(s)) continue;
      Record& record = table.records[s];
      uint32_t counts[4];
      take_counts(s, counts);
      find_bin(counts, record.needed, shared);
      if (threadIdx.x == 0) {
        record.prefix = record.prefix << (digit == 2 ? 10 : kBinBits) | shared.bin;
        record.needed -= shared.before;
        record.equal = shared.inside;
        if (digit == 0) record.coarse = shared.inside;
        if (digit == 1) set_bracket(record, record.prefix << 10, record.prefix << 10 | 1023);
        if (digit == 2) guess(record, record.prefix, 1ull << 21, record.coarse, size_of(s));
      }
      __syncthreads();
    }
  }

  // The same of a sample, where as large a share is wanted as of all; after digit 1 it sets the bracket.
  __device__ void find_sampled_digit(int digit) {
    for (uint32_t s = blockIdx.x; s < segments(); s += gridDim.x) {
      if (trivial(s)) continue;
      Record& record = table.records[s];
      uint32_t counts[4], total;
      take_counts(s, counts);
      sum_before(counts[0] + counts[1] + counts[2] + counts[3], shared, total);
      const uint64_t k = k_of(s), size = size_of(s);
      const uint32_t needed = digit == 0 ? static_cast<uint32_t>((k * total + size - 1) / size) : record.needed;
      find_bin(counts, needed, shared);
      if (threadIdx.x == 0) {
        record.prefix = record.prefix << kBinBits | shared.bin;
        record.needed = needed - shared.before;
        if (digit == 0) {
          record.coarse = shared.inside;
          record.equal = total;
        } else {
          set_sampled_bracket(record, static_cast<float>(k) / size, size);
        }
      }
      __syncthreads();
    }
  }

  // Wide enough for the k-th but in rare cases: four standard deviations of the sample's rank.
  __device__ void set_sampled_bracket(Record& record, float share, uint64_t size) {
    if (size <= kStaged) return set_bracket(record, kNegativeInfinity, kPositiveInfinity);
    const float ranks = 4 * sqrtf(record.equal * share * (1 - share)) + 4;
    const float keys = ranks * (1 << 21) / record.coarse;
    const uint32_t middle = record.prefix << 10 | 512;
    const uint32_t half = keys < 2e9f ? max(static_cast<uint32_t>(keys), F::ulp) : 2000000000u;
    set_bracket(record, middle - min(half, middle), middle + min(half, ~middle));
  }

  // Sets the next call's bracket around `threshold`, near which `count` scores lie in `width` keys.
  __device__ void guess(Record& record, uint32_t threshold, uint64_t width, uint64_t count, uint32_t size) {
    const uint64_t wanted = size / 1024 + 512, capacity = capacity_of(size);
    const uint32_t last = record.threshold;
    const uint64_t drift = last == 0 ? 0 : max(threshold, last) - min(threshold, last);
    uint64_t half = max(wanted * width / (2 * count), 2 * drift);
    half = min(half, capacity * width / (4 * count));
    half = min(max(half, uint64_t(F::ulp)), uint64_t(~0u));
    const uint64_t hi = min(threshold + half, uint64_t(~0u));
    set_bracket(record, threshold - static_cast<uint32_t>(min(half, uint64_t(threshold))),
                static_cast<uint32_t>(hi));
    record.threshold = threshold;
  }

  // Marks those of a segment's candidates that are among its k largest. One block does it.
  __device__ void select(uint32_t s, uint32_t counts) {
    Record& record = table.records[s];
    const uint32_t count = record.candidates[counts];
    const uint64_t* list = candidates_of(s);
    if (count <= kStaged) {
      for (uint32_t x = threadIdx.x; x < count; x += kThreads) shared.staged[x] = list[x];
      list = shared.staged;
    }
    // The `needed` largest of the `left` candidates from low to high, and all above high, are wanted.
    const uint32_t lo = record.lo, hi = record.hi;
    uint64_t low = static_cast<uint64_t>(lo) << 32, high = static_cast<uint64_t>(hi) << 32 | ~0u;
    uint32_t needed = k_of(s) - record.above[counts], left = count;
    while (needed < left) {
      const int shift = max(64 - __clzll(static_cast<int64_t>(high - low)) - kBinBits, 0);
      for (uint32_t bin = threadIdx.x; bin < kBins; bin += kThreads) shared.bins[bin] = 0;
      __syncthreads();
      for (uint32_t x = threadIdx.x; x < count; x += kThreads) {
        const uint64_t one = list[x];
        if (low <= one && one <= high) atomicAdd(&shared.bins[(one - low) >> shift], 1u);
      }
      __syncthreads();
      uint32_t own[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i] = shared.bins[kBins - 1 - (4 * threadIdx.x + i)];
      find_bin(own, needed, shared);
      needed -= shared.before;
      left = shared.inside;
      low += static_cast<uint64_t>(shared.bin) << shift;
      high = min(high, low + ((uint64_t{1} << shift) - 1));
    }
    __syncthreads();
    for (uint32_t x = threadIdx.x; x < count; x += kThreads) {
      const uint64_t one = list[x];
      if (one < low) continue;
      const uint32_t id = ~static_cast<uint32_t>(one), tile = id / kTile;
      const uint32_t i = table.whole ? piece_of(tile, 0, table.pieces) : s;
      mark(table.piece[i], id - table.piece[i].first_tile * kTile);
    }
    if (threadIdx.x == 0) {
      const bool first = counts != kSecond;
      const uint64_t width = first ? static_cast<uint64_t>(hi) - lo + 1 : 1ull << 21;
      guess(record, static_cast<uint32_t>(low >> 32), width, first ? count : record.coarse, size_of(s));
    }
    __syncthreads();
  }

  // Begins a first call: clears all, and guesses brackets from a sample.
  __device__ void sample(const Grid& grid) {
    const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
    for (uint32_t x = thread; x < segments() * kBins; x += threads) table.bins[x] = 0;
    for (uint32_t s = thread; s < segments(); s += threads) table.records[s] = Record{};
    grid.sync();
#pragma unroll 1
    for (int digit = 0; digit < 2; ++digit) {
      count_digits<true>(digit, [&](uint32_t s) { return !trivial(s); });
      grid.sync();
      find_sampled_digit(digit);
      grid.sync();
    }
  }

  // Finds brackets of 1,024 keys for the segments that were missed.
  __device__ void narrow(const Grid& grid) {
    const auto wanted = [&](uint32_t s) { return missed(s); };
    const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
    for (uint32_t x = thread; x < segments() * kBins; x += threads) table.bins[x] = 0;
    for (uint32_t s = thread; s < segments(); s += threads) {
      Record& record = table.records[s];
      record.prefix = 0;
      record.needed = k_of(s);
      record.above[kSecond] = record.candidates[kSecond] = record.overflown[kSecond] = 0;
    }
    grid.sync();
#pragma unroll 1
    for (int digit = 0; digit < 2; ++digit) {
      count_digits<false>(digit, wanted);
      grid.sync();
      find_digit(digit, wanted);
      grid.sync();
    }
  }

  // Masks by the exact threshold, for the segments that have too many candidates in 1,024 keys.
  __device__ void cut_ties(const Grid& grid) {
    const auto wanted = [&](uint32_t s) { return tied(s); };
    count_digits<false>(2, wanted);
    grid.sync();
    find_digit(2, wanted);
    grid.sync();
    mark_above(wanted);
    grid.sync();
    mark_ties(wanted);
  }

  // Marks what is above the threshold, and on it where all of that is wanted; counts the ties of each tile.
  template <class Predicate>
  __device__ void mark_above(Predicate wanted) {
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    for_run([&](uint32_t i, uint32_t s, uint32_t tile, uint32_t end) {
      if (!wanted(s)) return;
      const Piece& piece = table.piece[i];
      const uint32_t threshold = table.records[s].prefix;
      const bool all = table.records[s].needed == table.records[s].equal, vectors = aligned<F>(piece);
      uint32_t at = (tile - piece.first_tile) * kTile + 4 * threadIdx.x;
      for (; tile < end; ++tile, at += kTile) {
        typename F::Quad quads[kQuads];
        load_tile<F>(quads, piece, at, vectors);
        uint32_t ties = 0;
#pragma unroll
        for (int j = 0; j < kQuads; ++j) {
          const float4 v = F::floats(quads[j]);
          const float scores[4] = {v.x, v.y, v.z, v.w};
          uint32_t marks = 0;
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t key = order_key(scores[e]);
            const bool on_it = key == threshold;
            marks |= static_cast<uint32_t>(key > threshold || (on_it && all)) << (8 * e);
            ties += on_it && at + j * kQuadStep + e < piece.size;
          }
          store_quad<false>(piece, at + j * kQuadStep, marks, vectors);
        }
        ties = warp_sum(ties);
        if (threadIdx.x % 32 == 0 && ties) atomicAdd(&shared.count, ties);
        __syncthreads();
        if (threadIdx.x == 0) {
          table.ties[tile] = shared.count;
          shared.count = 0;
        }
        __syncthreads();
      }
    });
  }

  // Marks the first `needed` scores that are on the threshold, in the order of their index.
  template <class Predicate>
  __device__ void mark_ties(Predicate wanted) {
    for_run([&](uint32_t i, uint32_t s, uint32_t tile, uint32_t end) {
      if (!wanted(s)) return;
      const Piece& piece = table.piece[i];
      const uint32_t threshold = table.records[s].prefix, needed = table.records[s].needed;
      if (needed == table.records[s].equal) return;
      uint32_t mine = 0, seen;  // ties in the tiles before
      for (uint32_t t = table.piece[s].first_tile + threadIdx.x; t < tile; t += kThreads) mine += table.ties[t];
      sum_before(mine, shared, seen);
      uint32_t at = (tile - piece.first_tile) * kTile + 4 * threadIdx.x;
      for (; tile < end && seen < needed; ++tile, at += kTile) {
        if (table.ties[tile] == 0) continue;
        for (int j = 0; j < kQuads; ++j) {
          const uint32_t first = at + j * kQuadStep;
          const float4 v = F::floats(load_quad<F>(piece, first, aligned<F>(piece)));
          const float scores[4] = {v.x, v.y, v.z, v.w};
          uint32_t on_it = 0, total;
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            on_it |= static_cast<uint32_t>(first + e < piece.size && order_key(scores[e]) == threshold) << e;
          }
          uint32_t rank = seen + sum_before(__popc(on_it), shared, total);
          for (int e = 0; e < 4; ++e) {
            if (!(on_it >> e & 1)) continue;
            if (rank < needed) mark(piece, first + e);
            ++rank;
          }
          seen += total;
        }
      }
    });
  }
};

}  // namespace rtk::topk
