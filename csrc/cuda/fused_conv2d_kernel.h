// A convolution with its epilogue on Hopper: implicit GEMM, TMA into shared memory, wgmma out of it.
//
// Legend: N C H W input, K output channels, R S filter; activations N,H,W,C and weights K,R,S,C in
// memory, bf16. out = epilogue(conv(x, w)): + bias, + residual, ReLU, and 0 where the gate's bit is 0.
//
// A tile is BM output pixels (a box of bn images x bw columns x bh rows) times BN channels. Its product
// runs over *taps* (one filter position each, with the offset at which it reads the input) and chunks
// of 64 channels. TMA fetches the box shifted by the tap; what lies outside the image arrives as zeros,
// so padding costs nothing and there is no index arithmetic in the loop. Shared memory holds 128-byte
// rows (64 channels of one pixel), images innermost, then columns, then rows. Two ways to feed them:
//   per tap  the box is fetched anew for every tap. Any stride. Taps that fall outside for the whole
//            tile are skipped (with one pixel a tile, 31 % of all at 4 x 4).
//   halo     the box is fetched once a chunk with its border, and every tap is a shifted window of it:
//            bn * bw = 64, so a window of a row of pixels is 64 whole rows, at a multiple of 1024 bytes.
// The input gradient of a stride-2 convolution (`upsample`) is four convolutions, one for each parity
// of the output pixel (a *class*), with 1, 2, 2 and 4 of the taps of a 3x3: no product with a stuffed
// zero. A residual at every second pixel splits its convolution into the same classes.
// *Sparse*, the kernel skips blocks of weights that are zero; fused_conv2d_live.h tells how.
//
// One block a multiprocessor stays for many tiles. Warpgroup 0 copies: its first warp fetches input and
// weights, the next two fetch the residuals of a consumer's tiles and store its results, by TMA, through
// staging buffers of their own. Warpgroups 1 and 2, the consumers, multiply. Normally they share a tile. With
// *resident* weights (they fit in shared memory as a whole) each takes tiles of its own, so that one
// multiplies while the other is in its epilogue.

#pragma once

#include <cstdint>

#include "cuda/fused_conv2d_live.h"
#include "cuda/fused_conv2d_parameters.h"
#include "cuda/hopper.h"

namespace rtk::fused {

// A position in a ring of stages; the parity says which round a barrier is in.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The tiles that a block takes.
template <int BN, bool kSparse>
__device__ inline Tile tile_of(const Parameters& p, const Live& live, int index) {
  if constexpr (kSparse) return live_tile_at(p, live, index, BN);
  return tile_at(p, index, BN);
}

template <bool kSparse>
__device__ inline int next_index(int index, int stride) {
  return kSparse ? live_next(index) : index + stride;
}

// Which channels of an output are positive, a bit each, in the order in which wgmma leaves its sums: of
// every 64 channels lane q of a quad holds 8 b + 2 q + e for b = 0..7, e = 0, 1, and writes one 16-bit
// word with that bit at 8 e + b. So nobody has to exchange bits, forward or backward.
__device__ inline uint32_t load_bits(const uint16_t* p) {
  uint16_t v;  // volatile: it is issued where it stands, before the product, which hides its latency
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

// Where this lane's bits of a row of the tile are, or -1 outside the output.
__device__ inline int64_t bits_at(const Parameters& p, const Tile& t, int row) {
  const int n = t.n + (row & ((1 << p.bn_log2) - 1));
  const int w = t.w + ((row >> p.bn_log2) & ((1 << p.bw_log2) - 1));
  const int h = t.h + (row >> (p.bn_log2 + p.bw_log2));
  const int oh = h * p.step + t.cls->h_first, ow = w * p.step + t.cls->w_first;
  if (n >= p.N || oh >= p.OH || ow >= p.OW) return -1;
  return (((static_cast<int64_t>(n) * p.OH + oh) * p.OW + ow) * p.K + t.k) / 16 + threadIdx.x % 4;
}

__device__ inline float max_with_nan(float a, float b) {  // fmaxf would lose a NaN
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
}

// The top bit of each half of a word, sixteen times over. (__byte_perm cannot repeat a sign.)
__device__ inline uint32_t spread_top_bits(uint32_t halves) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(mask) : "r"(halves));
  return mask;
}

// The top bit of each half that is positive, of two bf16 without a sign (they come from a ReLU): what is
// not 0 carries into it, but a NaN does not count.
__device__ inline uint32_t positive_halves(uint32_t two) {
  const uint32_t not_zero = two + 0x7FFF7FFFu, nan = two + 0x007F007Fu;
  return not_zero & ~nan & 0x80008000u;
}

// Finishes 64 channels of a 64-pixel block and puts them into the staging buffer, where the residual is.
// `acc` holds, for every eight channels, two of row lane / 4 and two of the row eight below; `bits` those
// of the two rows: the gate's on the way back, this output's on the way forward.
template <bool kGated>
__device__ __forceinline__ void finish(const Parameters& p, float* acc, const float2 (&bias)[8], bool residual,
                                       uint32_t (&bits)[2], uint32_t staging) {
  using namespace hopper;
  const int lane = threadIdx.x % 32;
  const uint32_t row = staging + (threadIdx.x % 128 / 32 * 16 + lane % 16) * kRow;
  const auto matrices = [=](int b) { return row + (((b + lane / 16) ^ (lane % 8)) << 4); };  // channels 8 b to 8 b + 15
  if (residual) {
#pragma unroll
    for (int b = 0; b < 8; b += 2) {
      uint32_t v[4];
      load_matrices(v, matrices(b));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* two = acc + (b + i / 2) * 4 + i % 2 * 2;
        two[0] += __uint_as_float(v[i] << 16);
        two[1] += __uint_as_float(v[i] & 0xFFFF0000u);
      }
    }
  }
  const float floor = p.relu ? 0.0f : -INFINITY;
  if constexpr (kGated) {
#pragma unroll
    for (uint32_t& word : bits) word = ((word & 0xFF) << 8) | ((word & 0xFF00) << 16);  // b at bits 8 + b and 24 + b
  }
#pragma unroll
  for (int b = 0; b < 8; b += 2) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = b + i / 2, half = i % 2;
      float x = acc[block * 4 + half * 2], y = acc[block * 4 + half * 2 + 1];
      if constexpr (!kGated) {
        x = max_with_nan(x + bias[block].x, floor);
        y = max_with_nan(y + bias[block].y, floor);
      }
      const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
      v[i] = reinterpret_cast<const uint32_t&>(two);
      if constexpr (kGated) {
        v[i] &= spread_top_bits(bits[half] << (7 - block));
      } else {
        bits[half] |= positive_halves(v[i]) >> (15 - block);
      }
    }
    store_matrices(matrices(b), v);
  }
  if constexpr (!kGated) {
#pragma unroll
    for (uint32_t& word : bits) word = (word & 0xFF) | ((word >> 8) & 0xFF00);
  }
}

// What one thread does for a consumer: it fetches residuals into the staging buffers and stores what the
// consumer leaves there. `full` and `done` are the first of the barriers of all consumers' buffers.
template <int BN, int MB, bool kResident, bool kSparse>
__device__ void move_results(const Parameters& p, const Live& live, int consumer, uint32_t staging, uint32_t full,
                             uint32_t done) {
  using namespace hopper;
  constexpr uint32_t kBytes = MB * 64 * kRow;
  constexpr int kRows = MB * 64;
  const int first = kResident ? 0 : consumer * kRows;  // the consumer's box in the tile's
  const int first_n = first & ((1 << p.bn_log2) - 1);
  const int first_w = (first >> p.bn_log2) & ((1 << p.bw_log2) - 1), first_h = first >> (p.bn_log2 + p.bw_log2);
  staging += consumer * p.staging * kBytes;
  full += 8 * consumer * kMaxStaging;
  done += 8 * consumer * kMaxStaging;

  // Walks over (tile, round of 64 channels) in the consumer's order.
  struct Walk {
    int index, round;
    Tile tile;
  };
  const int stride = static_cast<int>(gridDim.x) * (kResident ? kConsumers : 1);
  const int begin = blockIdx.x + (kResident ? consumer * static_cast<int>(gridDim.x) : 0);
  const auto settle = [&](Walk& at) {
    if (at.index < p.tiles) at.tile = tile_of<BN, kSparse>(p, live, at.index);
  };
  const auto advance = [&](Walk& at) {
    if (++at.round == BN / 64 || at.tile.k + at.round * 64 >= p.K) {
      at.round = 0;
      at.index = next_index<kSparse>(at.index, stride);
      settle(at);
    }
  };
  const auto fetch = [&](const Walk& at, int stage) {
    if (at.tile.cls->residual) {
      barrier_expect_bytes(full + 8 * stage, kBytes);
      copy_box(staging + stage * kBytes, &p.residual[at.tile.cls->map], full + 8 * stage, at.tile.k + at.round * 64,
               at.tile.n + first_n, at.tile.w + first_w, at.tile.h + first_h);
    } else {
      barrier_arrive(full + 8 * stage);
    }
  };
  Walk next{begin, 0, {}}, now{begin, 0, {}};
  settle(next);
  settle(now);
  for (int i = 0; i < p.staging && next.index < p.tiles; ++i, advance(next)) fetch(next, i);
  for (Ring ring; now.index < p.tiles; advance(now), ring.next(p.staging)) {
    barrier_wait(done + 8 * ring.stage, ring.parity);
    store_box(&p.out[now.tile.cls->map], staging + ring.stage * kBytes, now.tile.k + now.round * 64,
              now.tile.n + first_n, now.tile.w + first_w, now.tile.h + first_h);
    store_commit();
    if (next.index < p.tiles) {
      store_wait_read();
      fetch(next, ring.stage);
      advance(next);
    }
  }
  store_wait();
}

// MB: 64-pixel blocks a consumer holds.
template <int BN, int MB, bool kResident, bool kGated, bool kSparse>
__global__ void __launch_bounds__(kThreads, 1) fused_conv2d_kernel(const __grid_constant__ Parameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  static_assert(!(kResident && kSparse));
  constexpr uint32_t kBBytes = BN * kRow, kGroupBytes = 64 * kRow;
  // Sparse: two live groups at once, where ptxas 13.0 takes products of two widths. (Beside a gate it makes
  // every single wgmma wait, warning C7511.)
  constexpr bool kPairs = BN > 64 && !kGated;
  extern __shared__ uint8_t shared[];
  const uint32_t barriers = shared_address(shared);
  const auto a_full = [=](int i) { return barriers + 8 * i; };
  const auto a_empty = [=](int i) { return barriers + 8 * (kMaxStages + i); };
  const auto b_full = [=](int i) { return barriers + 8 * (2 * kMaxStages + i); };
  const auto b_empty = [=](int i) { return barriers + 8 * (3 * kMaxStages + i); };
  const auto s_full = [=](int consumer, int i) { return barriers + 8 * (4 * kMaxStages + consumer * kMaxStaging + i); };
  const auto s_done = [=](int consumer, int i) { return s_full(consumer + kConsumers, i); };
  constexpr uint32_t kStagingBytes = MB * 64 * kRow;
  const uint32_t staging = (barriers + kBarrierBytes + (kSparse ? p.live_bytes : 0) + 1023) / 1024 * 1024;
  const uint32_t a = staging + kConsumers * p.staging * kStagingBytes;
  const uint32_t b = a + p.a_stages * p.a_bytes;
  Live live{};
  if constexpr (kSparse) live = empty_live(p, shared + kBarrierBytes);

  if (threadIdx.x == 0) {
    prefetch_map(&p.x);
    prefetch_map(&p.w);
    for (int i = 0; i < p.a_stages; ++i) {
      barrier_init(a_full(i), 1);
      barrier_init(a_empty(i), kResident ? 1 : kConsumers);
    }
    for (int i = 0; i < (kResident ? 1 : p.b_stages); ++i) {
      barrier_init(b_full(i), 1);
      barrier_init(b_empty(i), kConsumers);
    }
    for (int i = 0; i < kConsumers * kMaxStaging; ++i) {
      barrier_init(s_full(0, i), 1);
      barrier_init(s_done(0, i), 4);  // a warp each
    }
    barrier_init_fence();
  }
  __syncthreads();
  allow_next_kernel();  // it gets a multiprocessor when a block here ends, and waits like this one:
  wait_for_kernel_before();
  if constexpr (kSparse) read_live<BN>(p, live);

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    fewer_registers<kSparse ? 56 : 40>();
    if (threadIdx.x % 32 != 0 || threadIdx.x / 32 > kConsumers) return;
    if (threadIdx.x != 0) {
      move_results<BN, MB, kResident, kSparse>(p, live, threadIdx.x / 32 - 1, staging, s_full(0, 0), s_done(0, 0));
      return;
    }
    if constexpr (kResident) {  // the grid is a multiple of tiles_k: this block's channels never change
      const int k = static_cast<int>(blockIdx.x) % p.tiles_k * BN;
      barrier_expect_bytes(b_full(0), p.b_stages * kBBytes);
      for (int i = 0; i < p.b_stages; ++i) {
        copy_box(b + i * kBBytes, &p.w, b_full(0), i % p.chunks * kChunk, i / p.chunks, k);
      }
    }
    Ring ra, rb;
    for (int index = blockIdx.x; index < p.tiles; index = next_index<kSparse>(index, gridDim.x)) {
      const Tile t = tile_of<BN, kSparse>(p, live, index);
      const auto fetch_input = [&](int chunk, int dh, int dw) {
        barrier_wait(a_empty(ra.stage), ra.parity ^ 1);
        barrier_expect_bytes(a_full(ra.stage), p.a_bytes);
        copy_box(a + ra.stage * p.a_bytes, &p.x, a_full(ra.stage), chunk * kChunk, t.n, t.w * p.stride + dw,
                 t.h * p.stride + dh);
        ra.next(p.a_stages);
      };
      if constexpr (kSparse) {
        const uint32_t reaching = reaching_taps(p, t);
        for (int chunk = 0; chunk < p.chunks; ++chunk) {
          uint32_t groups[BN / 64];
          uint32_t any = live_taps<BN>(p, live, t, chunk, reaching, groups);
          if (p.halo && any) fetch_input(chunk, p.h_low, p.w_low);
          for (; any; any &= any - 1) {
            const uint32_t bit = any & ~(any - 1);
            const Tap& tap = tap_of(*t.cls, bit);
            if (!p.halo) fetch_input(chunk, tap.dh, tap.dw);
            uint32_t bytes = 0;
#pragma unroll
            for (uint32_t group : groups) bytes += group & bit ? kGroupBytes : 0;
            barrier_wait(b_empty(rb.stage), rb.parity ^ 1);
            barrier_expect_bytes(b_full(rb.stage), bytes);
#pragma unroll
            for (int i = 0; i < BN / 64; ++i) {
              if (groups[i] & bit) {
                copy_box(b + rb.stage * kBBytes + i * kGroupBytes, &p.w, b_full(rb.stage), chunk * kChunk, tap.weight,
                         t.k + i * 64);
              }
            }
            rb.next(p.b_stages);
          }
        }
        continue;
      }
      const int taps = t.cls->taps, boxes = boxes_of(p, t);
      for (int outer = 0; outer < boxes; ++outer) {
        const Tap& tap = t.cls->tap[outer];
        if (p.skip && !reaches(p, t, tap)) continue;
        const int dh = p.halo ? p.h_low : tap.dh, dw = p.halo ? p.w_low : tap.dw;
        for (int chunk = 0; chunk < p.chunks; ++chunk) {
          fetch_input(chunk, dh, dw);
          if constexpr (!kResident) {
            for (int i = outer; i < (p.halo ? taps : outer + 1); ++i) {
              barrier_wait(b_empty(rb.stage), rb.parity ^ 1);
              barrier_expect_bytes(b_full(rb.stage), kBBytes);
              copy_box(b + rb.stage * kBBytes, &p.w, b_full(rb.stage), chunk * kChunk, t.cls->tap[i].weight, t.k);
              rb.next(p.b_stages);
            }
          }
        }
      }
    }
  } else {
    more_registers<kSparse ? 224 : 232>();
    const int consumer = warpgroup - 1;
    const bool signals = threadIdx.x % 128 == 0;
    const int first_block = kResident ? 0 : consumer * MB;
    if constexpr (kResident) barrier_wait(b_full(0), 0);
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // this lane's, and the one eight below
    Ring ra, rb, rs;
    int turn = 0;
    for (int index = blockIdx.x; index < p.tiles; index = next_index<kSparse>(index, gridDim.x), ++turn) {
      const Tile t = tile_of<BN, kSparse>(p, live, index);
      const int taps = t.cls->taps, boxes = boxes_of(p, t);
      if constexpr (kResident) {
        if (turn % kConsumers != consumer) {
          for (int i = 0; i < boxes * p.chunks; ++i) ra.next(p.a_stages);
          continue;
        }
      }
      uint32_t bits[BN / 64][MB][2] = {};
      if constexpr (kGated) {
#pragma unroll
        for (int i = 0; i < MB * 2; ++i) {
          const int64_t at = bits_at(p, t, (first_block + i / 2) * 64 + row + i % 2 * 8);
#pragma unroll
          for (int round = 0; round < BN / 64; ++round) {
            if (at >= 0 && t.k + round * 64 < p.K) bits[round][i / 2][i % 2] = load_bits(p.gate + at + round * 4);
          }
        }
      }
      float acc[MB][BN / 2];
      int accumulate = 0;
      int a_running = -1, b_running = -1;  // the stages that the product in flight reads
      const auto end_product = [&] {
        wgmma_commit();
        wgmma_wait<1>();  // the product before this one is done
      };
      const auto free_stages_before = [&] {  // they may be filled again
        if (signals) {
          if (!kResident && b_running >= 0) barrier_arrive(b_empty(b_running));
          if (a_running >= 0 && a_running != ra.stage) barrier_arrive(a_empty(a_running));
        }
        a_running = ra.stage;
        if constexpr (!kResident) {
          b_running = rb.stage;
          rb.next(p.b_stages);
        }
      };
      if constexpr (kSparse) {
#pragma unroll
        for (int m = 0; m < MB; ++m) {
#pragma unroll
          for (int i = 0; i < BN / 2; ++i) acc[m][i] = 0;
        }
        accumulate = 1;
        const uint32_t reaching = reaching_taps(p, t);
        for (int chunk = 0; chunk < p.chunks; ++chunk) {
          uint32_t groups[BN / 64];
          uint32_t any = live_taps<BN>(p, live, t, chunk, reaching, groups);
          if (any == 0) continue;
          if (p.halo) barrier_wait(a_full(ra.stage), ra.parity);
          for (; any; any &= any - 1) {
            const uint32_t bit = any & ~(any - 1);
            if (!p.halo) barrier_wait(a_full(ra.stage), ra.parity);
            barrier_wait(b_full(rb.stage), rb.parity);
            const uint32_t pitch = p.block_pitch * kRow, b_at = b + rb.stage * kBBytes;
            const uint32_t a_at = a + ra.stage * p.a_bytes + first_block * pitch +
                                  (p.halo ? tap_of(*t.cls, bit).row * kRow : 0);
            if constexpr (!kPairs) {
#pragma unroll
              for (int i = 0; i < BN / 64; ++i) {
                if (BN > 64 && !(groups[i] & bit)) continue;
                multiply_live<64>(acc, i, a_at, pitch, b_at);
                end_product();  // in the branch, or the compiler waits for this product too
              }
              free_stages_before();
            } else {
              uint32_t alone[BN / 64];
#pragma unroll
              for (int i = 0; i < BN / 64; ++i) alone[i] = groups[i] & bit & ~groups[i ^ 1];
#pragma unroll
              for (int i = 0; i < BN / 64; i += 2) {
                if (!(groups[i] & groups[i + 1] & bit)) continue;
                multiply_live<128>(acc, i, a_at, pitch, b_at);
              }
#pragma unroll
              for (int i = 0; i < BN / 64; ++i) {
                if (!alone[i]) continue;
                multiply_live<64>(acc, i, a_at, pitch, b_at);
              }
              // The sums' next product may have another width. The other consumer's goes on meanwhile.
              wgmma_commit();
              wgmma_wait<0>();
              if (signals) {
                barrier_arrive(b_empty(rb.stage));
                if (!p.halo) barrier_arrive(a_empty(ra.stage));
              }
              rb.next(p.b_stages);
            }
            if (!p.halo) ra.next(p.a_stages);
          }
          if (p.halo) {
            if (kPairs && signals) barrier_arrive(a_empty(ra.stage));
            ra.next(p.a_stages);
          }
        }
      }
      for (int outer = 0; outer < (kSparse ? 0 : boxes); ++outer) {
        if (p.skip && !reaches(p, t, t.cls->tap[outer])) continue;
        for (int chunk = 0; chunk < p.chunks; ++chunk) {
          barrier_wait(a_full(ra.stage), ra.parity);
          for (int i = outer; i < (p.halo ? taps : outer + 1); ++i) {
            const Tap& tap = t.cls->tap[i];
            uint32_t b_at;
            if constexpr (kResident) {
              b_at = b + (tap.weight * p.chunks + chunk) * kBBytes;
            } else {
              barrier_wait(b_full(rb.stage), rb.parity);
              b_at = b + rb.stage * kBBytes;
            }
            const uint32_t a_at = a + ra.stage * p.a_bytes + (p.halo ? tap.row * kRow : 0);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kChunk / 16; ++step) {
#pragma unroll
              for (int m = 0; m < MB; ++m) {
                const uint32_t block = (first_block + m) * p.block_pitch * kRow;
                wgmma<BN>(acc[m], matrix_descriptor(a_at + block + step * 32), matrix_descriptor(b_at + step * 32),
                          accumulate);
              }
              accumulate = 1;
            }
            end_product();
            free_stages_before();
          }
          ra.next(p.a_stages);
        }
      }
      wgmma_wait<0>();
      if (signals) {
        if (!kResident && b_running >= 0) barrier_arrive(b_empty(b_running));
        if (a_running >= 0) barrier_arrive(a_empty(a_running));
      }
      if (!accumulate) {  // no tap reaches these pixels
#pragma unroll
        for (int m = 0; m < MB; ++m) {
#pragma unroll
          for (int i = 0; i < BN / 2; ++i) acc[m][i] = 0;
        }
      }
#pragma unroll
      for (int round = 0; round < BN / 64; ++round) {
        const int k = t.k + round * 64;
        if (k >= p.K) break;
        float2 bias[8] = {};
        if (!kGated && p.bias != nullptr) {
#pragma unroll
          for (int i = 0; i < 8; ++i) bias[i] = __ldg(reinterpret_cast<const float2*>(p.bias + k + 8 * i) + lane % 4);
        }
        barrier_wait(s_full(consumer, rs.stage), rs.parity);
        const uint32_t buffer = staging + (consumer * p.staging + rs.stage) * kStagingBytes;
#pragma unroll
        for (int m = 0; m < MB; ++m) {
          finish<kGated>(p, acc[m] + round * 32, bias, t.cls->residual, bits[round][m], buffer + m * 64 * kRow);
          if (!kGated && p.positive != nullptr) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int64_t at = bits_at(p, t, (first_block + m) * 64 + row + half * 8);
              if (at >= 0) p.positive[at + round * 4] = static_cast<uint16_t>(bits[round][m][half]);
            }
          }
        }
        fence_for_engine();
        __syncwarp();
        if (lane == 0) barrier_arrive(s_done(consumer, rs.stage));
        rs.next(p.staging);
      }
    }
  }
#endif
}

}  // namespace rtk::fused
