// The L2 step of large images: all blocks work on a few images at once, and everything is read once.
//
// An image is cut into as many parts as there are ranks, and a block takes its part of one image after the
// other. A part comes by the copy engine into a slot of shared memory, is summed, and stays where it is for
// `lag` images; then it moves into registers, the slot is free, and after kHeld more images it is updated and
// written. By then the ranks have long exchanged their sums, through global memory.
//
// That exchange takes some six microseconds while the memory is busy: half of it until the slowest rank has its
// pixels, half on the way. A multiprocessor moves 200 KB meanwhile, so shared memory alone is too small for what
// waits and for what comes; with a part of an image in every multiprocessor of a cluster, as large as fits, the
// memory idles whenever the ranks meet.
//
// Warps: workers do the arithmetic; the producer starts the copies; the publisher writes the block's sums out;
// the gatherer collects those of all ranks. They meet at barriers of single images only, so they drift apart as far
// as there is room. Sums are added in a fixed order: the result is the same in every run.
//
// All blocks must run at once (a cooperative launch). Compute capability 9.0 and up.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/hopper.h"
#include "cuda/pgd_step_meeting.h"
#include "cuda/pgd_step_pixels.h"
#include "rtk.h"

namespace rtk::pgd {

constexpr int kHeld = 2;                // images that a worker holds a part of in registers
constexpr int kHeldBytes = 120;         // of one of them in one thread, at most
constexpr int kMostWorkers = 17;        // warps
constexpr int kServants = 3;            // the other warps
constexpr int kMostRingRanks = 5 * 32;  // a lane of the gatherer reads five
constexpr int kCopyPixels = 16;         // 16 bytes of uint8, the copy engine's unit: images are multiples of it
constexpr int kLine = 128;              // bytes; copies to an address in shared memory that is none take a tenth longer
constexpr int kMostSlots = 16;
constexpr int kDesks = 16;              // images between their sum and their writing: more than lag + kHeld

// A part is a multiple of that, so that the parts of all three tensors begin at lines.
template <class A, class G, class X>
constexpr int kPartPixels = kLine / std::min({sizeof(A), sizeof(G), sizeof(X)});

// Units of a part in one thread.
template <class A, class G, class X, int kWidth>
constexpr int kHeldUnits = kHeldBytes / (kWidth * (sizeof(A) + sizeof(G) + sizeof(X)));

// How the images are cut. workers: warps.
struct Ring {
  int ranks = 0, part = 0, slots = 0, lag = 0, workers = 0, blocks = 0;
};

// What ranks exchange: letters of 16 bytes, written whole. The last number is a tag that says of which round
// they are; a box serves every kBoxes-th image of a group.
struct Letter {
  float sums[3];
  unsigned tag;
};
constexpr int kBoxes = 64;  // more than twice what a writer may be ahead of a reader, lag + kHeld and one

__device__ inline void write_at_once(Letter* to, Letter v) {
#if __CUDA_ARCH__ >= 900
  const auto word = [](float low, unsigned high) { return uint64_t{high} << 32 | __float_as_uint(low); };
  asm volatile("{\n.reg .b128 v;\nmov.b128 v, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], v;\n}\n" ::"l"(to),
               "l"(word(v.sums[0], __float_as_uint(v.sums[1]))), "l"(word(v.sums[2], v.tag))
               : "memory");
#endif
}

__device__ inline Letter read_at_once(const Letter* from) {
  uint64_t low = 0, high = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b128 v;\nld.relaxed.gpu.global.b128 v, [%2];\nmov.b128 {%0, %1}, v;\n}\n"
               : "=l"(low), "=l"(high)
               : "l"(from)
               : "memory");
#endif
  const auto number = [](uint64_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); };
  return {{number(low), number(low >> 32), number(high)}, static_cast<unsigned>(high >> 32)};
}

struct RingShared {
  uint64_t filled[kMostSlots], emptied[kMostSlots];  // a slot's pixels are there; they are needed no more
  // An image's sums over the block are there; its update is there. The same of the images whose |delta|^2 is
  // summed directly: their phases are counted by those images only.
  uint64_t summed[kDesks], updates[kDesks], squared[kDesks], settled[kDesks];
  Update update[kDesks];
  bool again[kDesks];  // update.factor is there; update.scale after the squares
  float4 sums[kDesks][kMostWorkers];
};

// One of a block's warps, and what all of them go through in the same order: the images of its group.
struct RingWarp {
  const PgdStep& p;
  const Ring& ring;
  RingShared& shared;
  Letter* letters;  // (2, groups, kBoxes, ranks): of products, of squares
  int lane, rank, group, groups, images;

  __device__ int image(int i) const { return group + i * groups; }
  __device__ int64_t first_pixel(int i) const { return image(i) * p.chw + static_cast<int64_t>(rank) * ring.part; }
  __device__ int slot(int i) const { return i % ring.slots; }
  __device__ static int desk(int i) { return i % kDesks; }
  // The phase `number` of a barrier.
  __device__ static void wait(uint64_t& barrier, unsigned number) {
    hopper::barrier_wait(hopper::shared_address(&barrier), number & 1);
  }
  __device__ void wait_slot(uint64_t (&barriers)[kMostSlots], int i) const { wait(barriers[slot(i)], i / ring.slots); }
  __device__ static void wait_desk(uint64_t (&barriers)[kDesks], int i) { wait(barriers[desk(i)], i / kDesks); }
  __device__ static void arrive(uint64_t& barrier) { hopper::barrier_arrive(hopper::shared_address(&barrier)); }

  __device__ Letter* boxes(int which, int i) const {
    return letters + ((which * groups + group) * kBoxes + i % kBoxes) * ring.ranks;
  }
  __device__ static unsigned tag(int i) { return i / kBoxes + 1; }

  // The first lane hands the block's sums to all ranks.
  __device__ void post(int which, int i, float4 sum) const {
    if (lane == 0) write_at_once(boxes(which, i) + rank, {{sum.x, sum.y, sum.z}, tag(i)});
  }

  // Of the workers' sums.
  __device__ float4 block_sum(int i) const {
    const float4 v = lane < ring.workers ? shared.sums[desk(i)][lane] : float4{};
    float sums[3] = {v.x, v.y, v.z};
    sum_over_warp(sums);
    return {sums[0], sums[1], sums[2], 0};
  }

  // Of all ranks; the same bits in all of them.
  __device__ void image_sum(int which, int i, double (&sums)[3]) const {
    const Letter* from = boxes(which, i);
    Letter v[kMostRingRanks / 32] = {};
    bool there;
    do {  // all that are missing are asked for at once
#pragma unroll
      for (int k = 0; k < kMostRingRanks / 32; ++k) {
        const int r = lane + 32 * k;
        if (r < ring.ranks && v[k].tag != tag(i)) v[k] = read_at_once(from + r);
      }
      there = true;
#pragma unroll
      for (int k = 0; k < kMostRingRanks / 32; ++k) {
        there = there && (lane + 32 * k >= ring.ranks || v[k].tag == tag(i));
      }
    } while (!there);
    __syncwarp();
    for (double& sum : sums) sum = 0;
#pragma unroll
    for (int k = 0; k < kMostRingRanks / 32; ++k) {
      if (lane + 32 * k >= ring.ranks) continue;
#pragma unroll
      for (int s = 0; s < 3; ++s) sums[s] += v[k].sums[s];
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
#pragma unroll
      for (double& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
  }
};

// Fills the slots of images from `first` to before `last`, each as soon as it is free.
template <class A, class G, class X>
__device__ void produce(const RingWarp& w, unsigned char* slots, int pixels, int slot_bytes, int first, int last) {
  if (w.lane) return;
  for (int i = first; i < last; ++i) {
    const int slot = w.slot(i);
    if (i >= w.ring.slots) w.wait_slot(w.shared.emptied, i - w.ring.slots);
    const uint32_t filled = hopper::shared_address(&w.shared.filled[slot]);
    hopper::barrier_expect_bytes(filled, pixels * (sizeof(A) + sizeof(G) + sizeof(X)));
    if (!pixels) continue;
    uint32_t to = hopper::shared_address(slots + slot * slot_bytes);
    const auto copy = [&](const void* tensor, uint32_t bytes) {  // a pixel
      const auto from = static_cast<const unsigned char*>(tensor) + w.first_pixel(i) * bytes;
      hopper::copy_bytes(to, from, pixels * bytes, filled);
      to += w.ring.part * bytes;
    };
    copy(w.p.x_adv, sizeof(A));
    copy(w.p.grad, sizeof(G));
    copy(w.p.x, sizeof(X));
  }
}

__device__ inline void publish(const RingWarp& w) {
  if (w.ring.ranks == 1) return;  // the gatherer is at hand
  for (int i = 0; i < w.images; ++i) {
    w.wait_desk(w.shared.summed, i);
    w.post(0, i, w.block_sum(i));
  }
}

__device__ inline void gather(const RingWarp& w) {
  unsigned phases = 0;  // a bit a desk: that of `squared`
  for (int i = 0; i < w.images; ++i) {
    const int desk = w.desk(i);
    double sums[3];
    w.wait_desk(w.shared.summed, i);  // there is no use in asking earlier
    if (w.ring.ranks == 1) {
      const float4 sum = w.block_sum(i);
      sums[0] = sum.x, sums[1] = sum.y, sums[2] = sum.z;
    } else {
      w.image_sum(0, i, sums);
    }
    const Length found = length(sums, w.p.step_size);
    if (w.lane == 0) {
      w.shared.update[desk] = {found.factor, scale_into_ball(found.square, w.p.eps)};
      w.shared.again[desk] = !found.exact;
      w.arrive(w.shared.updates[desk]);
    }
    if (found.exact) continue;
    w.wait(w.shared.squared[desk], phases >> desk);
    phases ^= 1u << desk;
    const float4 sum = w.block_sum(i);
    sums[0] = sum.x;
    if (w.ring.ranks > 1) {
      w.post(1, i, sum);
      w.image_sum(1, i, sums);
    }
    if (w.lane == 0) {
      w.shared.update[desk].scale = scale_into_ball(sums[0], w.p.eps);
      w.arrive(w.shared.settled[desk]);
    }
  }
}

template <class A, class G, class X, int kWidth>
__device__ void work(const RingWarp& w, unsigned char* slots, int pixels, int slot_bytes) {
  constexpr int kUnits = kHeldUnits<A, G, X, kWidth>;
  using Pixels = Unit<A, G, X, kWidth>;
  using As = decltype(Pixels::x_adv);
  using Gs = decltype(Pixels::grad);
  using Xs = decltype(Pixels::x);
  const int warp = threadIdx.x / 32, units = pixels / kWidth, stride = w.ring.workers * 32, part = w.ring.part;
  const int lag = w.ring.lag;
  RingShared& shared = w.shared;
  unsigned phases = 0;  // a bit a desk: that of `settled`

  const auto kept = [&](int slot, int at) {
    const unsigned char* base = slots + slot * slot_bytes;
    return Pixels{reinterpret_cast<const As*>(base)[at], reinterpret_cast<const Gs*>(base + part * sizeof(A))[at],
                  reinterpret_cast<const Xs*>(base + part * (sizeof(A) + sizeof(G)))[at]};
  };
  const auto for_each = [&](auto function) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int at = threadIdx.x + u * stride;
      if (at < units) function(u, at);
    }
  };
  const auto give = [&](float (&sums)[3], int desk, uint64_t& barrier) {
    sum_over_warp(sums);
    if (w.lane == 0) {
      shared.sums[desk][warp] = {sums[0], sums[1], sums[2], 0};
      w.arrive(barrier);
    }
  };

  Pixels held[kHeld][kUnits];
  for (int base = 0; base < w.images + lag + kHeld; base += kHeld) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (const int i = base + h - lag - kHeld; i >= 0 && i < w.images) {  // written
        const int desk = w.desk(i);
        w.wait_desk(shared.updates, i);
        Update update = shared.update[desk];
        if (shared.again[desk]) {
          float sums[3] = {};
          for_each([&](int u, int) { add_square(held[h][u], update.factor, sums[0]); });
          give(sums, desk, shared.squared[desk]);
          w.wait(shared.settled[desk], phases >> desk);
          phases ^= 1u << desk;
          update = shared.update[desk];
        }
        As* const out = static_cast<As*>(w.p.out) + w.first_pixel(i) / kWidth;
        for_each([&](int u, int at) { out[at] = updated(held[h][u], update, w.p.clip_min, w.p.clip_max); });
      }
      if (const int i = base + h - lag; i >= 0 && i < w.images) {  // moved
        const int slot = w.slot(i);
        for_each([&](int u, int at) { held[h][u] = kept(slot, at); });
        __syncwarp();
        if (w.lane == 0) w.arrive(shared.emptied[slot]);
      }
      if (const int i = base + h; i < w.images) {  // summed
        const int slot = w.slot(i), desk = w.desk(i);
        w.wait_slot(shared.filled, i);
        float sums[3] = {};
        for_each([&](int, int at) { add_products(kept(slot, at), sums); });
        give(sums, desk, shared.summed[desk]);
      }
    }
  }
}

// A: x_adv and out, G: grad, X: x.
template <class A, class G, class X, int kWidth>
__global__ void __launch_bounds__((kMostWorkers + kServants) * 32, 1)
    pgd_step_l2_ring(const __grid_constant__ PgdStep p, const __grid_constant__ Ring ring, Letter* letters) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(kLine) unsigned char slots[];
  __shared__ RingShared shared;
  const int groups = ring.blocks / ring.ranks, group = blockIdx.x / ring.ranks;
  const int images = (static_cast<int>(p.n) - group + groups - 1) / groups;
  const int rank = blockIdx.x % ring.ranks, warp = threadIdx.x / 32;
  const RingWarp w{p, ring, shared, letters, static_cast<int>(threadIdx.x % 32), rank, group, groups, images};

  if (threadIdx.x == 0) {
    const auto init = [](uint64_t& barrier, int arrivals) {
      hopper::barrier_init(hopper::shared_address(&barrier), arrivals);
    };
    for (int slot = 0; slot < ring.slots; ++slot) {
      init(shared.filled[slot], 1);
      init(shared.emptied[slot], ring.workers);
    }
    for (int desk = 0; desk < kDesks; ++desk) {
      init(shared.summed[desk], ring.workers);
      init(shared.updates[desk], 1);
      init(shared.squared[desk], ring.workers);
      init(shared.settled[desk], 1);
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();

  const int slot_bytes = ring.part * static_cast<int>(sizeof(A) + sizeof(G) + sizeof(X));
  const int64_t left = p.chw - static_cast<int64_t>(rank) * ring.part;
  const int pixels = static_cast<int>(left < 0 ? 0 : left < ring.part ? left : ring.part);
  // No box may hold a tag when ranks begin to read. While they wait for each other, the first pixels come.
  const int early = min(images, ring.slots);
  if (warp == ring.workers) produce<A, G, X>(w, slots, pixels, slot_bytes, 0, early);
  if (ring.ranks > 1) {
    for (int box = threadIdx.x; box < 2 * kBoxes; box += blockDim.x) w.boxes(box / kBoxes, box % kBoxes)[rank].tag = 0;
    cooperative_groups::this_grid().sync();
  }
  if (warp < ring.workers) {
    work<A, G, X, kWidth>(w, slots, pixels, slot_bytes);
  } else if (warp == ring.workers) {
    produce<A, G, X>(w, slots, pixels, slot_bytes, early, images);
  } else if (warp == ring.workers + 1) {
    publish(w);
  } else {
    gather(w);
  }
#endif
}

}  // namespace rtk::pgd
