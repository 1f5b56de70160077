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
//
// One block a multiprocessor stays for many tiles. Warpgroup 0 copies: its first warp fetches input and
// weights, the next two fetch the residuals of a consumer's tiles and store its results, by TMA, through
// a staging buffer each. Warpgroups 1 and 2, the consumers, multiply. Normally they share a tile. With
// *resident* weights (they fit in shared memory as a whole) each takes tiles of its own, so that one
// multiplies while the other is in its epilogue.

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/hopper.h"
#include "cuda/launch.h"
#include "rtk.h"

namespace rtk {
namespace {

constexpr int kChunk = 64;             // channels of a row in shared memory
constexpr int kRow = kChunk * 2;       // bytes of it
constexpr int kConsumers = 2;          // warpgroups that multiply
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kMaxStages = 16, kMaxTaps = 9, kMaxClasses = 4;
constexpr int kSharedBytes = 232448;   // what a block may have on sm_90
constexpr int kMaxStaging = 4;         // buffers of a consumer
constexpr int kBarrierBytes = 8 * (4 * kMaxStages + 2 * kConsumers * kMaxStaging);
constexpr char kName[] = "fused_conv2d";

struct Tap {
  int dh, dw;      // the input pixel of output pixel (h, w) is (h * stride + dh, w * stride + dw)
  int weight;      // r * S + s
  int row;         // halo: where the tap's window begins in the box, in rows of shared memory
};

// The output pixels (h * step + h_first, w * step + w_first) and the taps that reach them.
struct Class {
  int taps, h_first, w_first, map;  // map: which of the maps of residual and output
  bool residual;
  Tap tap[kMaxTaps];
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
};

struct Tile {
  int k, n, h, w;                      // first channel, image, row, column (of the class)
  const Class* cls;
};

__device__ Tile tile_at(const Parameters& p, int index, int BN) {
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
__device__ bool reaches(const Parameters& p, const Tile& t, const Tap& tap) {
  const int h = t.h * p.stride + tap.dh, w = t.w * p.stride + tap.dw;
  return h + (p.bh - 1) * p.stride >= 0 && h < p.H && w + ((1 << p.bw_log2) - 1) * p.stride >= 0 && w < p.W;
}

// How many boxes of a chunk the tile fetches.
__device__ int boxes_of(const Parameters& p, const Tile& t) { return p.halo ? min(t.cls->taps, 1) : t.cls->taps; }

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

// Which channels of an output are positive, a bit each, in the order in which wgmma leaves its sums: of
// every 64 channels lane q of a quad holds 8 b + 2 q + e for b = 0..7, e = 0, 1, and writes one 16-bit
// word with that bit at 8 e + b. So nobody has to exchange bits, forward or backward.
__device__ uint32_t load_bits(const uint16_t* p) {
  uint16_t v;  // volatile: it is issued where it stands, before the product, which hides its latency
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

// Where this lane's bits of a row of the tile are, or -1 outside the output.
__device__ int64_t bits_at(const Parameters& p, const Tile& t, int row) {
  const int n = t.n + (row & ((1 << p.bn_log2) - 1));
  const int w = t.w + ((row >> p.bn_log2) & ((1 << p.bw_log2) - 1));
  const int h = t.h + (row >> (p.bn_log2 + p.bw_log2));
  const int oh = h * p.step + t.cls->h_first, ow = w * p.step + t.cls->w_first;
  if (n >= p.N || oh >= p.OH || ow >= p.OW) return -1;
  return (((static_cast<int64_t>(n) * p.OH + oh) * p.OW + ow) * p.K + t.k) / 16 + threadIdx.x % 4;
}

__device__ float max_with_nan(float a, float b) {  // fmaxf would lose a NaN
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
}

// The top bit of each half of a word, sixteen times over. (__byte_perm cannot repeat a sign.)
__device__ uint32_t spread_top_bits(uint32_t halves) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(mask) : "r"(halves));
  return mask;
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
      } else {  // after a ReLU a half has no sign: what is not 0 carries into it, but a NaN does not count
        const uint32_t not_zero = v[i] + 0x7FFF7FFFu, nan = v[i] + 0x007F007Fu;
        bits[half] |= (not_zero & ~nan & 0x80008000u) >> (15 - block);
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
template <int BN, int MB, bool kResident>
__device__ void move_results(const Parameters& p, int consumer, uint32_t staging, uint32_t full, uint32_t done) {
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
    if (at.index < p.tiles) at.tile = tile_at(p, at.index, BN);
  };
  const auto advance = [&](Walk& at) {
    if (++at.round == BN / 64 || at.tile.k + at.round * 64 >= p.K) {
      at.round = 0;
      at.index += stride;
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
template <int BN, int MB, bool kResident, bool kGated>
__global__ void __launch_bounds__(kThreads, 1) fused_conv2d_kernel(const __grid_constant__ Parameters p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace hopper;
  constexpr uint32_t kBBytes = BN * kRow;
  extern __shared__ uint8_t shared[];
  const uint32_t barriers = shared_address(shared);
  const auto a_full = [=](int i) { return barriers + 8 * i; };
  const auto a_empty = [=](int i) { return barriers + 8 * (kMaxStages + i); };
  const auto b_full = [=](int i) { return barriers + 8 * (2 * kMaxStages + i); };
  const auto b_empty = [=](int i) { return barriers + 8 * (3 * kMaxStages + i); };
  const auto s_full = [=](int consumer, int i) { return barriers + 8 * (4 * kMaxStages + consumer * kMaxStaging + i); };
  const auto s_done = [=](int consumer, int i) { return s_full(consumer + kConsumers, i); };
  constexpr uint32_t kStagingBytes = MB * 64 * kRow;
  const uint32_t staging = (barriers + kBarrierBytes + 1023) / 1024 * 1024;
  const uint32_t a = staging + kConsumers * p.staging * kStagingBytes;
  const uint32_t b = a + p.a_stages * p.a_bytes;

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

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    fewer_registers<40>();
    if (threadIdx.x % 32 != 0 || threadIdx.x / 32 > kConsumers) return;
    if (threadIdx.x != 0) {
      move_results<BN, MB, kResident>(p, threadIdx.x / 32 - 1, staging, s_full(0, 0), s_done(0, 0));
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
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x) {
      const Tile t = tile_at(p, index, BN);
      const int taps = t.cls->taps, boxes = boxes_of(p, t);
      for (int outer = 0; outer < boxes; ++outer) {
        const Tap& tap = t.cls->tap[outer];
        if (p.skip && !reaches(p, t, tap)) continue;
        const int dh = p.halo ? p.h_low : tap.dh, dw = p.halo ? p.w_low : tap.dw;
        for (int chunk = 0; chunk < p.chunks; ++chunk) {
          barrier_wait(a_empty(ra.stage), ra.parity ^ 1);
          barrier_expect_bytes(a_full(ra.stage), p.a_bytes);
          copy_box(a + ra.stage * p.a_bytes, &p.x, a_full(ra.stage), chunk * kChunk, t.n, t.w * p.stride + dw,
                   t.h * p.stride + dh);
          ra.next(p.a_stages);
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
    more_registers<232>();
    const int consumer = warpgroup - 1;
    const bool signals = threadIdx.x % 128 == 0;
    const int first_block = kResident ? 0 : consumer * MB;
    if constexpr (kResident) barrier_wait(b_full(0), 0);
    const int lane = threadIdx.x % 32;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // this lane's, and the one eight below
    Ring ra, rb, rs;
    int turn = 0;
    for (int index = blockIdx.x; index < p.tiles; index += gridDim.x, ++turn) {
      const Tile t = tile_at(p, index, BN);
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
      for (int outer = 0; outer < boxes; ++outer) {
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
            wgmma_commit();
            wgmma_wait<1>();  // the product before this one is done: its stages may be filled again
            if (signals) {
              if (!kResident && b_running >= 0) barrier_arrive(b_empty(b_running));
              if (a_running >= 0 && a_running != ra.stage) barrier_arrive(a_empty(a_running));
            }
            a_running = ra.stage;
            if constexpr (!kResident) {
              b_running = rb.stage;
              rb.next(p.b_stages);
            }
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

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The driver's function, found through the runtime: nothing links against libcuda.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    check(kName, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
    if (status != cudaDriverEntryPointSuccess) throw std::runtime_error("fused_conv2d: the driver has no TMA");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

// A map over bf16 `data`: sizes and strides (elements, the first stride is 1 and left out), the box that
// one copy fetches, and the steps between the elements that it takes.
template <int kRank>
CUtensorMap tensor_map(const void* data, const int64_t (&sizes)[kRank], const int64_t (&strides)[kRank - 1],
                       const int (&box)[kRank], const int (&steps)[kRank]) {
  cuuint64_t dims[kRank], bytes[kRank - 1];
  cuuint32_t boxes[kRank], element_steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    dims[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>((box[i] - 1) * steps[i] + 1);
    element_steps[i] = static_cast<cuuint32_t>(steps[i]);
    if (i) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * 2;
  }
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(data), dims, bytes, boxes, element_steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::invalid_argument("fused_conv2d: no tensor map for these sizes");
  return map;
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("fused_conv2d: ") + what);
}

// The classes of output pixels with the taps that reach them, the most work first.
void list_taps(const FusedConv2d& c, Parameters& p) {
  const bool sparse_residual = c.residual != nullptr && c.residual_stride == 2;
  p.step = sparse_residual ? 2 : c.upsample;
  p.stride = c.stride * p.step / c.upsample;
  p.classes = 0;
  for (int h_first = 0; h_first < std::min(p.step, p.OH); ++h_first) {
    for (int w_first = 0; w_first < std::min(p.step, p.OW); ++w_first) {
      Class& cls = p.cls[p.classes];
      cls = {0, h_first, w_first, p.classes++, c.residual != nullptr && (!sparse_residual || h_first + w_first == 0), {}};
      for (int r = 0; r < c.r; ++r) {
        for (int s = 0; s < c.s; ++s) {
          const int dh = h_first * c.stride + r - c.padding, dw = w_first * c.stride + s - c.padding;
          if (dh % c.upsample || dw % c.upsample) continue;
          cls.tap[cls.taps++] = {dh / c.upsample, dw / c.upsample, r * c.s + s, 0};
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
  constexpr int kReserved = 1024 + (kBarrierBytes + 1023) / 1024 * 1024;
  const int a_bytes = static_cast<int>(p.a_bytes), boxes = (c.halo ? 1 : p.cls[0].taps) * p.chunks;
  for (p.staging = MB == 1 && BN > 64 ? kMaxStaging : 2; p.staging >= 1; p.staging /= 2) {
    const int room = kSharedBytes - kReserved - p.staging * kStagingBytes;
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
  const size_t bytes = kReserved + size_t(p.staging) * kStagingBytes + size_t(p.a_stages) * a_bytes +
                       size_t(p.b_stages) * kBBytes;

  p.tiles_k = ceil_div(p.K, BN);
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
  p.w = tensor_map<3>(c.w, {p.C, c.r * c.s, p.K}, {p.C, int64_t{c.r} * c.s * p.C}, {kChunk, 1, BN}, {1, 1, 1});

  int processors = 0;
  check(kName, cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  int blocks = std::min(p.tiles, processors);
  if (kResident) {
    require(p.tiles_k <= processors, "too many channels for resident weights");
    blocks = std::max(blocks / p.tiles_k, 1) * p.tiles_k;
  }
  const auto kernel = p.gate != nullptr ? fused_conv2d_kernel<BN, MB, kResident, true>
                                        : fused_conv2d_kernel<BN, MB, kResident, false>;
  check(kName, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  launch_early(kName, kernel, blocks, kThreads, bytes, stream, p);
}

void run(const FusedConv2d& c, int device, cudaStream_t stream) {
  require(c.c % 8 == 0 && c.k % 64 == 0, "input channels must be a multiple of 8, output channels of 64");
  require(c.gate == nullptr || (c.bias == nullptr && !c.relu && c.positive == nullptr), "a gate stands alone");
  require(c.positive == nullptr || c.relu, "positive needs a ReLU");
  require(c.r * c.s <= kMaxTaps, "filters have at most 9 taps");
  require(c.upsample == 1 || (c.upsample == 2 && c.stride == 1), "upsample must be 1 or 2, and 2 needs stride 1");

  Parameters p{};
  p.bias = static_cast<const float*>(c.bias);
  p.gate = static_cast<const uint16_t*>(c.gate);
  p.positive = static_cast<uint16_t*>(c.positive);
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
