// The 3x3 convolution with stride 1 of up to 64 channels to 64, with fused_conv2d's epilogue, on Hopper.
//
// Legend: N C H W input, 64 output channels; activations N,H,W,C and weights 64,3,3,C in memory, bf16.
//
// With output channels as wgmma's columns, 64 of them read 4 KB of shared memory in 32 cycles: all that
// it gives. So here the channels are the rows of the product and the pixels its columns, and the weights
// (a warpgroup's 64 x 576) stay in registers, 144 a thread: a product then reads its pixels only, half of
// what shared memory gives, and the other half is left for TMA and the epilogue.
//
// A *strip* is 8 images x kColumns columns x all rows. A block takes a run of output rows, down the
// strip and on in the next one, and fetches every input row once, with its border, into a ring: 128 bytes
// (64 channels) a pixel, images innermost, then columns. An output row reads three slots of the ring; a
// tap (r, s) is the window of slot r that begins s columns, s * 1024 bytes, into it.
//
// Warpgroup 0 copies: its first warp fetches the input, the next two fetch the residuals of a consumer's
// rows and store its results. Warpgroups 1 and 2, the consumers, take the output rows in turn: one
// multiplies while the other is in its epilogue. The sums of a thread belong to two channels; they go to
// the staging buffer as pixels x channels, transposed on the way by stmatrix.

#pragma once

#include <cstdint>

#include "cuda/fused_conv2d_kernel.h"
#include "cuda/hopper.h"

namespace rtk::narrow {

using namespace fused;

constexpr int kTaps = 9, kSteps = kChunk / 16;      // products of a tap: 16 channels each
constexpr int kImages = 8;                          // so that a column is 1024 bytes, a whole swizzle
constexpr int kColumnBytes = kImages * kRow;
constexpr int kWeightBytes = kTaps * kChunk * kRow;
constexpr int kSlots = 8, kBuffers = 2;             // of the ring; of a consumer's staging
constexpr int kWarps = 4;                           // of a consumer
constexpr int kGatePitch = 16 * kImages * 2 + 16;   // of a word's row: 16 bytes more, against bank conflicts
constexpr int kGateBytes = 4 * kGatePitch;

struct NarrowParameters {
  CUtensorMap x, w, residual, out;
  const float* bias;
  const uint2* gate;                   // 64 bits a pixel, see load_bits
  uint2* positive;                     // the same of this output, or null
  int N, OH, OW, padding;
  int tiles_w, rows, rows_of_block;
  bool relu, has_residual;
};

// Shared memory behind the barriers, each part at a multiple of 1024 bytes.
template <int kColumns>
struct Layout {
  static constexpr int kSlotBytes = (kColumns + 2) * kColumnBytes, kBufferBytes = kColumns * kColumnBytes;
  static constexpr int kStaging = 0;
  static constexpr int kRing = kConsumers * kBuffers * kBufferBytes;
  static constexpr int kGates = kRing + kSlots * kSlotBytes;
  static constexpr int kBytes = kGates + kConsumers * 2 * kGateBytes;
  // The weights lie in the ring's last slots until the consumers have them.
  static constexpr int kWeights = kGates - kWeightBytes;
  static constexpr int kFreeSlots = (kWeights - kRing) / kSlotBytes;
  static_assert(kSlotBytes % 1024 == 0 && kBufferBytes % 1024 == 0 && kWeights % 1024 == 0);
  static_assert(kFreeSlots >= 3, "the first row must not wait for the weights to leave");
};

__device__ inline uint2 load_bits(const uint2* p) {
  uint2 v;  // volatile: see the other load_bits
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

struct Barriers {
  uint32_t first;
  __device__ uint32_t full(int slot) const { return first + 8 * (slot % kSlots); }
  __device__ uint32_t empty(int slot) const { return full(slot) + 8 * kSlots; }
  __device__ uint32_t staged(int consumer, int i) const { return first + 8 * (2 * kSlots + consumer * kBuffers + i); }
  __device__ uint32_t done(int consumer, int i) const { return staged(consumer + kConsumers, i); }
  __device__ uint32_t issued(int consumer) const { return staged(2 * kConsumers, consumer); }
  __device__ uint32_t weights() const { return issued(kConsumers); }
  __device__ uint32_t weights_read() const { return issued(kConsumers + 1); }
  static constexpr int kBytes = 8 * (2 * kSlots + 2 * kConsumers * kBuffers + kConsumers + 2);
};
static_assert(Barriers::kBytes <= 1024);

// The output row of that index: its first image and column, and its place in the strip.
struct Row {
  int n, w, h;
};

template <int kColumns>
__device__ inline Row row_at(const NarrowParameters& p, int index) {
  const int strip = index / p.OH;
  return {strip / p.tiles_w * kImages, strip % p.tiles_w * kColumns, index % p.OH};
}

// How often the ring was filled before this slot, as a barrier's parity.
__device__ inline uint32_t round_of(int slot) { return slot / kSlots & 1; }

template <int kColumns>
__device__ void fetch_input(const NarrowParameters& p, int begin, int end, uint32_t memory, Barriers at) {
  using namespace hopper;
  using L = Layout<kColumns>;
  barrier_expect_bytes(at.weights(), kWeightBytes);
  for (int tap = 0; tap < kTaps; ++tap) {
    copy_box(memory + L::kWeights + tap * kChunk * kRow, &p.w, at.weights(), 0, tap, 0);
  }
  int slot = 0;
  for (int index = begin; index < end;) {
    const Row row = row_at<kColumns>(p, index);
    const int rows = min(end - index, p.OH - row.h);
    for (int i = 0; i < rows + 2; ++i, ++slot) {
      if (slot == L::kFreeSlots) barrier_wait(at.weights_read(), 0);
      if (slot >= kSlots) barrier_wait(at.empty(slot), round_of(slot - kSlots));
      barrier_expect_bytes(at.full(slot), L::kSlotBytes);
      copy_box(memory + L::kRing + slot % kSlots * L::kSlotBytes, &p.x, at.full(slot), 0, row.n, row.w - p.padding,
               row.h + i - p.padding);
    }
    index += rows;
  }
}

// What one thread does for a consumer: it fetches residuals into its staging buffers and stores what the
// consumer leaves there.
template <int kColumns>
__device__ void move_rows(const NarrowParameters& p, int consumer, int begin, int end, uint32_t memory, Barriers at) {
  using namespace hopper;
  using L = Layout<kColumns>;
  const uint32_t staging = memory + L::kStaging + consumer * kBuffers * L::kBufferBytes;
  const auto fetch = [&](int index, int buffer) {
    if (index >= end) return;
    const uint32_t full = at.staged(consumer, buffer);
    if (!p.has_residual) return barrier_arrive(full);
    const Row row = row_at<kColumns>(p, index);
    barrier_expect_bytes(full, L::kBufferBytes);
    copy_box(staging + buffer * L::kBufferBytes, &p.residual, full, 0, row.n, row.w, row.h);
  };
  begin += consumer;
  for (int i = 0; i < kBuffers; ++i) fetch(begin + i * kConsumers, i);
  Ring ring;
  for (int index = begin; index < end; index += kConsumers, ring.next(kBuffers)) {
    const Row row = row_at<kColumns>(p, index);
    barrier_wait(at.done(consumer, ring.stage), ring.parity);
    store_box(&p.out, staging + ring.stage * L::kBufferBytes, 0, row.n, row.w, row.h);
    store_commit();
    store_wait_read();
    fetch(index + kBuffers * kConsumers, ring.stage);
  }
  store_wait();
}

// The bits of a staged pixel: channel 8 b + 2 q + e is bit 8 e + b of word q.
__device__ inline uint2 positive_bits(uint32_t pixel, int swizzle) {
  uint32_t words[4] = {};
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    uint32_t v[4];
    hopper::load_shared(v, pixel + ((b ^ swizzle) << 4));
#pragma unroll
    for (int q = 0; q < 4; ++q) words[q] |= positive_halves(v[q]) >> (15 - b);  // bits b and 16 + b
  }
  return {__byte_perm(words[0], words[1], 0x6420), __byte_perm(words[2], words[3], 0x6420)};
}

template <int kColumns, bool kGated>
__global__ void __launch_bounds__(kThreads, 1) narrow_conv2d_kernel(const __grid_constant__ NarrowParameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  using L = Layout<kColumns>;
  extern __shared__ uint8_t shared[];
  const Barriers at{shared_address(shared)};
  const uint32_t memory = (at.first + Barriers::kBytes + 1023) / 1024 * 1024;

  if (threadIdx.x == 0) {
    prefetch_map(&p.x);
    prefetch_map(&p.w);
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(at.full(i), 1);
      barrier_init(at.empty(i), kConsumers * kWarps);
    }
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      for (int i = 0; i < kBuffers; ++i) {
        barrier_init(at.staged(consumer, i), 1);
        barrier_init(at.done(consumer, i), kWarps);
      }
      barrier_init(at.issued(consumer), kWarps);
    }
    barrier_init(at.weights(), 1);
    barrier_init(at.weights_read(), kConsumers * kWarps);
    barrier_init_fence();
  }
  __syncthreads();
  allow_next_kernel();  // it gets a multiprocessor when a block here ends, and waits like this one:
  wait_for_kernel_before();

  const int begin = static_cast<int>(blockIdx.x) * p.rows_of_block;
  const int end = min(begin + p.rows_of_block, p.rows);
  const int warp_index = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);  // known to be uniform
  if (warp_index < kWarps) {
    fewer_registers<24>();
    if (threadIdx.x % 32 != 0 || warp_index > kConsumers) return;
    if (warp_index == 0) {
      fetch_input<kColumns>(p, begin, end, memory, at);
    } else {
      move_rows<kColumns>(p, warp_index - 1, begin, end, memory, at);
    }
  } else {
    more_registers<240>();  // with the copying warpgroup's 24 what all have at the launch: 3 x 168
    const int consumer = warp_index / kWarps - 1, warp = warp_index % kWarps, lane = threadIdx.x % 32;
    const bool signals = lane == 0;

    uint32_t weight[kTaps * kSteps][4];  // channels 16 warp and on, as wgmma takes them
    barrier_wait(at.weights(), 0);
    const uint32_t weight_row = memory + L::kWeights + (warp * 16 + lane % 16) * kRow;
#pragma unroll
    for (int i = 0; i < kTaps * kSteps; ++i) {
      const int piece = i % kSteps * 2 + lane / 16;  // 8 input channels
      load_matrices(weight[i], weight_row + i / kSteps * kChunk * kRow + ((piece ^ (lane % 8)) << 4));
    }
    __syncwarp();
    if (signals) barrier_arrive(at.weights_read());

    float bias[2] = {};  // of channels lane / 4 and the one eight above
    if (!kGated && p.bias != nullptr) {
      bias[0] = __ldg(p.bias + warp * 16 + lane / 4);
      bias[1] = __ldg(p.bias + warp * 16 + lane / 4 + 8);
    }
    const float floor = p.relu ? 0.0f : -INFINITY;

    // As threads of a pixel: bits, in and out.
    const int pixel = threadIdx.x % 128, image = pixel % kImages, column = pixel / kImages;
    const auto bits_at = [&](const Row& row) -> int64_t {
      if (column >= kColumns || row.n + image >= p.N || row.w + column >= p.OW) return -1;
      return (static_cast<int64_t>(row.n + image) * p.OH + row.h) * p.OW + row.w + column;
    };
    const auto gates = [=](int turn) { return memory + L::kGates + (consumer * 2 + turn % 2) * kGateBytes; };
    // In matrices of 8 pixels (a column) x 8 channels: lane's row of the first two columns' four.
    const int piece = warp * 2 + lane / 8 % 2;  // 8 channels
    const uint32_t matrix_row = (lane / 16 * kImages + lane % 8) * kRow + ((piece ^ (lane % 8)) << 4);

    // Hands slots back. Both consumers do so for all of them, in order, those included that only the
    // other one reads; after the slot was filled, or it would count for the round before.
    int released = 0;
    const auto release = [&](int until) {
#pragma unroll 1
      for (; released < until; ++released) {
        barrier_wait(at.full(released), round_of(released));
        if (signals) barrier_arrive(at.empty(released));
      }
    };
    const auto first_slot = [&](int index) { return index - begin + 2 * (index / p.OH - begin / p.OH); };

    Ring staging;
    int turn = 0;
    for (int index = begin + consumer; index < end; index += kConsumers, ++turn) {
      const Row row = row_at<kColumns>(p, index);
      const int slot = first_slot(index);
      release(slot);
      const int64_t bits = bits_at(row);
      uint2 gate = {};
      if (kGated && bits >= 0) gate = load_bits(p.gate + bits);

#pragma unroll
      for (int r = 0; r < 3; ++r) barrier_wait(at.full(slot + r), round_of(slot + r));
      // The row before is the other consumer's. Its products go first: taking turns, one of the two always
      // multiplies; side by side, both would reach their epilogues at once.
      if (consumer == 1) {
        barrier_wait(at.issued(0), turn & 1);
      } else if (turn > 0) {
        barrier_wait(at.issued(1), (turn - 1) & 1);
      }
      float acc[kColumns * 4];
      wgmma_fence();
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const uint64_t pixels = matrix_descriptor(memory + L::kRing + (slot + r) % kSlots * L::kSlotBytes);
#pragma unroll
        for (int i = 0; i < 3 * kSteps; ++i) {
          if (r == 2 && i == 2 * kSteps && signals) barrier_arrive(at.issued(consumer));  // as good as done
          const int offset = i / kSteps * kColumnBytes + i % kSteps * 32;
          wgmma<kColumns * kImages>(acc, weight[r * 3 * kSteps + i], pixels + offset / 16, r + i > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      keep_order(acc);
      release(index + kConsumers < end ? min(first_slot(index + kConsumers), slot + 3) : slot + 3);

      if constexpr (kGated) {  // from threads of a pixel to those of a channel: pixels of word q side by side
        if (column < kColumns) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            store_shared_half(gates(turn) + q * kGatePitch + pixel * 2, (q < 2 ? gate.x : gate.y) >> (q % 2 * 16));
          }
        }
        warpgroup_barrier(1 + consumer);
      }
      barrier_wait(at.staged(consumer, staging.stage), staging.parity);
      const uint32_t buffer = memory + L::kStaging + (consumer * kBuffers + staging.stage) * L::kBufferBytes;
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        const uint32_t matrices = buffer + matrix_row + j * kColumnBytes;
        float* const sums = acc + j * 4;  // for each of four matrices two pixels of a channel
        uint32_t v[4];
        if (p.has_residual) {
          load_matrices_transposed(v, matrices);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[i * 2] += __uint_as_float(v[i] << 16);
            sums[i * 2 + 1] += __uint_as_float(v[i] & 0xFFFF0000u);
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x = sums[i * 2], y = sums[i * 2 + 1];
          if constexpr (!kGated) {
            x = max_with_nan(x + bias[i % 2], floor);
            y = max_with_nan(y + bias[i % 2], floor);
          }
          const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
          v[i] = reinterpret_cast<const uint32_t&>(two);
        }
        if constexpr (kGated) {
          const int first_bit = lane / 4 % 2 * 8 + warp * 2;  // this lane's channels: this bit and the next
#pragma unroll
          for (int i = 0; i < 4; i += 2) {
            const int two_pixels = (j + i / 2) * kImages + lane % 4 * 2;
            const uint32_t words = load_shared(gates(turn) + lane / 8 * kGatePitch + two_pixels * 2);
            v[i] &= spread_top_bits(words << (15 - first_bit));
            v[i + 1] &= spread_top_bits(words << (14 - first_bit));
          }
        }
        store_matrices_transposed(matrices, v);
      }
      if (!kGated && p.positive != nullptr) {
        warpgroup_barrier(1 + consumer);
        if (bits >= 0) p.positive[bits] = positive_bits(buffer + pixel * kRow, image);
      }
      fence_for_engine();
      __syncwarp();
      if (signals) barrier_arrive(at.done(consumer, staging.stage));
      staging.next(kBuffers);
    }
  }
#endif
}

}  // namespace rtk::narrow
