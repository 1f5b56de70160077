// How the threads of an image sum over it: in a block, and in a cluster of blocks.
#pragma once

#include "cuda/hopper.h"
#include "cuda/pgd_step_pixels.h"
#include "rtk.h"

namespace rtk::pgd {

constexpr int kMostWarps = 32;
constexpr int kMostRanks = 8;  // the largest cluster that every GPU with clusters runs

// Where the blocks of a cluster, the ranks of an image, sum over it. Without clusters in the hardware a
// block is alone. Two rows, used in turns: a block may be one meeting ahead of another that still reads.
struct Meetings {
  float4 warps[kMostWarps];
  float4 ranks[2][kMostRanks];  // written by the ranks themselves
  uint64_t written[2];          // barriers
};

// Before the first meeting, in two steps; what is done between them is not waited for.
__device__ inline void open(Meetings& m) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : m.written) hopper::barrier_init(hopper::shared_address(&barrier), 1);
    hopper::barrier_init_fence();
  }
  __syncwarp();  // cluster barriers want whole warps
  hopper::cluster_arrive();
#endif
}

__device__ inline void wait_for_all_open() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  hopper::cluster_wait();
#endif
}

// For the first warp of each rank: writes the block's sum into all ranks.
__device__ inline void send_to_ranks(float4 sum, Meetings& m, int row, int rank, int ranks) {
#if __CUDA_ARCH__ >= 900
  const int lane = threadIdx.x;
  const uint32_t to = hopper::shared_address(&m.ranks[row][rank]), written = hopper::shared_address(&m.written[row]);
  if (lane == 0) hopper::barrier_expect_bytes(written, ranks * sizeof(float4));
  if (lane < ranks) hopper::send(hopper::in_rank(to, lane), sum, hopper::in_rank(written, lane));
#endif
}

__device__ inline void wait_for_ranks(Meetings& m, int row, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  hopper::barrier_wait(hopper::shared_address(&m.written[row]), parity);
#endif
}

__device__ inline void sum_over_warp(float (&sums)[3]) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
}

// Sums the threads' values over the image, the same to the last bit in all its threads. When a block has
// the sum it has all that others ever write to it, so it may go on, or leave, without another barrier.
__device__ inline void sum_over_image(float (&sums)[3], double (&image)[3], Meetings& m, unsigned number, int rank,
                               int ranks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, row = number % 2;
  sum_over_warp(sums);
  if (lane == 0) m.warps[warp] = {sums[0], sums[1], sums[2], 0};
  __syncthreads();
  if (warp == 0) {
    const float4 v = lane < warps ? m.warps[lane] : float4{};
    float block[3] = {v.x, v.y, v.z};
    sum_over_warp(block);
    const float4 sum{block[0], block[1], block[2], 0};
    if (ranks > 1) {
      send_to_ranks(sum, m, row, rank, ranks);
    } else if (lane == 0) {
      m.ranks[row][0] = sum;
    }
  }
  if (ranks > 1) {
    wait_for_ranks(m, row, number / 2 % 2);
  } else {
    __syncthreads();
  }
  // A row has a number for each lane: lane 4 r + s adds the sum s of rank r.
  static_assert(sizeof(m.ranks[row]) == 32 * sizeof(float));
  double sum = lane / 4 < ranks ? reinterpret_cast<const float*>(m.ranks[row])[lane] : 0.0f;
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
#pragma unroll
  for (int s = 0; s < 3; ++s) image[s] = __shfl_sync(0xffffffffu, sum, s);
}

// Turns the threads' products into the update. squares(factor) sums |delta|^2 over this thread's pixels.
template <class Squares>
__device__ Update meet(float (&products)[3], const PgdStep& p, Meetings& m, unsigned& number, int rank, int ranks,
                       Squares squares) {
  double sums[3];
  sum_over_image(products, sums, m, number++, rank, ranks);
  const Length found = length(sums, p.step_size);
  double square = found.square;
  if (!found.exact) {  // the same in all threads of the image
    float direct[3] = {squares(found.factor), 0, 0};
    sum_over_image(direct, sums, m, number++, rank, ranks);
    square = sums[0];
  }
  return {found.factor, scale_into_ball(square, p.eps)};
}

}  // namespace rtk::pgd
