// Exact top-k masks by radix selection on integers that order as the scores do.
//
// Each pass counts one digit of the keys that share the digits found so far, the highest first, and
// narrows the threshold to the bucket that holds the k-th largest; a last pass writes the masks. Counts
// are integers and ties are cut in index order, so threads and their timing decide nothing.

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "cpu/numeric.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"

namespace rtk::RTK_ISA {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int64_t kChunk = 1 << 18;
constexpr int kBatch = 1024;

// The integer that holds a score's bits, and its infinity.
template <class UInt, UInt kInfinityBits>
struct Format {
  using Bits = UInt;
  static constexpr int kBits = 8 * sizeof(UInt);
  static constexpr UInt kSign = UInt(1) << (kBits - 1);
  static constexpr UInt kInfinity = kInfinityBits;
};
using F32Format = Format<uint32_t, 0x7f800000u>;
using F64Format = Format<uint64_t, 0x7ff0000000000000u>;
using Bf16Format = Format<uint16_t, 0x7f80u>;
using F16Format = Format<uint16_t, 0x7c00u>;

// NaN is 0, below -inf; -0 is +0; negatives are turned around.
template <class F>
inline typename F::Bits order_key(typename F::Bits bits) {
  using Bits = typename F::Bits;
  const Bits magnitude = bits & static_cast<Bits>(~F::kSign);
  const Bits positive = static_cast<Bits>(bits | F::kSign), negative = static_cast<Bits>(~bits);
  const Bits key = (bits & F::kSign) && magnitude ? negative : positive;
  return magnitude > F::kInfinity ? Bits(0) : key;
}

// A piece of one segment: what a thread works on at a time.
struct Chunk {
  const void* scores;
  uint8_t* out;
  int64_t size;
};

std::vector<Chunk> split(const TopkMask& p, size_t element) {
  std::vector<Chunk> chunks;
  for (size_t s = 0; s < p.sizes.size(); ++s) {
    for (int64_t begin = 0; begin < p.sizes[s]; begin += kChunk) {
      chunks.push_back({static_cast<const char*>(p.scores[s]) + begin * element, p.out[s] + begin,
                        std::min(kChunk, p.sizes[s] - begin)});
    }
  }
  return chunks;
}

// Keys whose digits above `shift` equal `prefix` lie on the threshold; `needed` of them are taken.
template <class F>
struct Threshold {
  int shift = F::kBits;
  typename F::Bits prefix = 0;
  int64_t needed, on_it;
};

// Adds the next digit's counts, of the keys on the threshold, to `counts`.
template <class F>
void count_digits(const Chunk& chunk, const Threshold<F>& at, int bits, std::atomic<int64_t>* counts) {
  using Bits = typename F::Bits;
  const Bits* scores = static_cast<const Bits*>(chunk.scores);
  const bool all = at.shift == F::kBits;
  const int above = all ? 0 : at.shift, shift = at.shift - bits;
  const Bits prefix = at.prefix;
  const Bits digit_mask = static_cast<Bits>((1u << bits) - 1);
  // Four tables: neighbours often fall into one bin, and would wait for each other's store.
  uint32_t table[4][kDigits] = {};
  Bits keys[kBatch];
  for (int64_t begin = 0; begin < chunk.size; begin += kBatch) {
    const int size = static_cast<int>(std::min<int64_t>(kBatch, chunk.size - begin));
    int found = 0;
    for (int i = 0; i < size; ++i) {
      keys[i] = order_key<F>(scores[begin + i]);
      found += all | ((keys[i] >> above) == prefix);
    }
    if (found < size) {
      // Move the keys on the threshold forward, without a branch: none could be predicted.
      for (int i = 0, to = 0; to < found; ++i) {
        const Bits key = keys[i];
        keys[to] = key;
        to += (key >> above) == prefix;
      }
    }
    for (int i = 0; i < found; ++i) ++table[i & 3][(keys[i] >> shift) & digit_mask];
  }
  for (int digit = 0; digit < 1 << bits; ++digit) {
    const int64_t count = int64_t(table[0][digit]) + table[1][digit] + table[2][digit] + table[3][digit];
    if (count) counts[digit].fetch_add(count, std::memory_order_relaxed);
  }
}

template <class F>
Threshold<F> find_threshold(const std::vector<Chunk>& chunks, int64_t total, int64_t k, int threads) {
  Threshold<F> at;
  at.needed = k;
  at.on_it = total;
  while (at.shift > 0 && at.on_it != at.needed) {
    const int bits = std::min(kDigitBits, at.shift);
    std::vector<std::atomic<int64_t>> counts(kDigits);
    parallel_for(static_cast<int64_t>(chunks.size()), 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) count_digits<F>(chunks[c], at, bits, counts.data());
    });
    int digit = (1 << bits) - 1;
    for (; counts[digit] < at.needed; --digit) at.needed -= counts[digit];
    at.on_it = counts[digit];
    at.shift -= bits;
    at.prefix = static_cast<typename F::Bits>((at.prefix << bits) | digit);
  }
  return at;
}

// Marks all keys on or above the threshold; returns how many are on it.
template <class F>
int64_t mark_all(const Chunk& chunk, const Threshold<F>& at) {
  using Bits = typename F::Bits;
  // Locals: a store through uint8_t* may change anything that is reached through a reference.
  const Bits* scores = static_cast<const Bits*>(chunk.scores);
  uint8_t* out = chunk.out;
  const Bits prefix = at.prefix;
  const int size = static_cast<int>(chunk.size), shift = at.shift;
  int on_it = 0;
  for (int i = 0; i < size; ++i) {
    const Bits key = static_cast<Bits>(order_key<F>(scores[i]) >> shift);
    out[i] = key >= prefix;
    on_it += key == prefix;
  }
  return on_it;
}

// Takes the marks on the threshold back, but for the first `keep`.
template <class F>
void unmark_ties(const Chunk& chunk, const Threshold<F>& at, int64_t keep) {
  const auto* scores = static_cast<const typename F::Bits*>(chunk.scores);
  for (int64_t i = 0; i < chunk.size; ++i) {
    const bool tie = (order_key<F>(scores[i]) >> at.shift) == at.prefix;
    if (tie && keep-- <= 0) chunk.out[i] = 0;
  }
}

template <class F>
void select(const TopkMask& p, int64_t total, int threads) {
  const std::vector<Chunk> chunks = split(p, sizeof(typename F::Bits));
  const int64_t count = static_cast<int64_t>(chunks.size());
  const Threshold<F> at = find_threshold<F>(chunks, total, p.k, threads);

  std::vector<int64_t> ties(count);
  parallel_for(count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) ties[c] = mark_all<F>(chunks[c], at);
  });
  if (at.on_it == at.needed) return;

  std::vector<int64_t> keep(count);
  int64_t left = at.needed;
  for (int64_t c = 0; c < count; ++c) {
    keep[c] = std::min(left, ties[c]);
    left -= keep[c];
  }
  parallel_for(count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (keep[c] < ties[c]) unmark_ties<F>(chunks[c], at, keep[c]);
    }
  });
}

}  // namespace

void topk_mask(const TopkMask& p, int threads) {
  int64_t total = 0;
  for (const int64_t size : p.sizes) total += size;
  if (p.k < 0 || p.k > total) {
    throw std::invalid_argument("topk_mask: k must be in [0, " + std::to_string(total) + "], got " +
                                std::to_string(p.k));
  }
  if (p.k == 0 || p.k == total) {
    for (size_t s = 0; s < p.sizes.size(); ++s) std::fill_n(p.out[s], p.sizes[s], p.k != 0);
    return;
  }
  with_type<float, double, Bf16, F16>(p.dtype, "topk_mask", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (dtype_of<T> == DType::f32) select<F32Format>(p, total, threads);
    if constexpr (dtype_of<T> == DType::f64) select<F64Format>(p, total, threads);
    if constexpr (dtype_of<T> == DType::bf16) select<Bf16Format>(p, total, threads);
    if constexpr (dtype_of<T> == DType::f16) select<F16Format>(p, total, threads);
  });
}

}  // namespace rtk::RTK_ISA
