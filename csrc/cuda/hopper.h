// Hopper's own instructions, one small function each: barriers in shared memory, the bulk tensor copy
// (TMA) and the asynchronous warpgroup product (wgmma). PTX ISA, "mbarrier", "cp.async.bulk.tensor"
// and "wgmma". Usable from code compiled for sm_90a only.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace rtk::hopper {

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- mbarrier: a phase completes after `count` arrivals and all announced bytes.

__device__ inline void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of that parity has completed.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// --- clusters: blocks that run at once and reach each other's shared memory (any sm_90).

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where the block of that rank has what this one has at `address`.
__device__ inline uint32_t in_rank(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Writes 16 bytes into a block's shared memory and counts them at a barrier of that block, which waits there
// as for a copy.
__device__ inline void send(uint32_t to, float4 value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
               : "memory");
}

// One thread copies `bytes` into shared memory and counts them at a barrier; all three multiples of 16.
__device__ inline void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// --- TMA: one thread copies a box of a tensor into shared memory; outside the tensor it writes zeros.

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// The other way: rows of shared memory that lie outside the tensor are not written.
__device__ inline void store_box(const CUtensorMap* map, uint32_t from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until shared memory may be written again (read), or the stores are done altogether.
__device__ inline void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What ordinary stores wrote to shared memory becomes visible to the copy engine and to wgmma.
__device__ inline void fence_for_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Four 8 x 8 matrices of bf16; lane l gives the address of row l % 8 of matrix l / 8, and holds two
// columns, 2 (l % 4) and the next, of row l / 4 of each: as wgmma leaves its sums.

__device__ inline void load_matrices(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

__device__ inline void store_matrices(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// The same of the matrices' transposes: a lane holds two rows, 2 (l % 4) and the next, of column l / 4.

__device__ inline void load_matrices_transposed(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

__device__ inline void store_matrices_transposed(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// --- Ordinary accesses to shared memory by its own addresses.

__device__ inline void load_shared(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ inline void store_shared_half(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(v)) : "memory");
}

// All 128 threads of a warpgroup meet; `id` 1 to 15, one for each of them.
__device__ inline void warpgroup_barrier(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// --- wgmma: d (64 x N, fp32, in the registers of 128 threads) += a (64 x 16) b (N x 16)^T, bf16.

// Describes a matrix in shared memory whose rows are 128 bytes apart and swizzled by 128 bytes (TMA's
// layout for 64 bf16 a row). `address` is a multiple of 1024, plus 32 for each step of 16 along the row.
__device__ inline uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;  // from one group of eight rows to the next
  constexpr uint64_t kUnused = uint64_t{1} << 16;             // the other stride; swizzled rows have none
  return kSwizzle128 | kEightRows | kUnused | ((address & 0x3FFFF) >> 4);
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` committed groups are still running.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define RTK_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RTK_D32(i) RTK_D8(i), RTK_D8(i + 8), RTK_D8(i + 16), RTK_D8(i + 24)
#define RTK_R8(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define RTK_R32                                                                                       \
  RTK_R8(0, 1, 2, 3, 4, 5, 6, 7) ", " RTK_R8(8, 9, 10, 11, 12, 13, 14, 15) ", "                       \
  RTK_R8(16, 17, 18, 19, 20, 21, 22, 23) ", " RTK_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define RTK_R64                                                                                       \
  RTK_R32 ", " RTK_R8(32, 33, 34, 35, 36, 37, 38, 39) ", " RTK_R8(40, 41, 42, 43, 44, 45, 46, 47) ", " \
  RTK_R8(48, 49, 50, 51, 52, 53, 54, 55) ", " RTK_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define RTK_R128                                                                                      \
  RTK_R64 ", " RTK_R8(64, 65, 66, 67, 68, 69, 70, 71) ", " RTK_R8(72, 73, 74, 75, 76, 77, 78, 79) ", " \
  RTK_R8(80, 81, 82, 83, 84, 85, 86, 87) ", " RTK_R8(88, 89, 90, 91, 92, 93, 94, 95) ", "             \
  RTK_R8(96, 97, 98, 99, 100, 101, 102, 103) ", " RTK_R8(104, 105, 106, 107, 108, 109, 110, 111) ", " \
  RTK_R8(112, 113, 114, 115, 116, 117, 118, 119) ", " RTK_R8(120, 121, 122, 123, 124, 125, 126, 127)

// Where `accumulate` is 0, d's old values are not read.
template <int N>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 64 || N == 128 || N == 256);
  if constexpr (N == 64) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" RTK_R32 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : RTK_D32(0)
        : "l"(a), "l"(b), "r"(accumulate));
  } else if constexpr (N == 128) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" RTK_R64 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : RTK_D32(0), RTK_D32(32)
        : "l"(a), "l"(b), "r"(accumulate));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" RTK_R128 "}, %128, %129, p, 1, 1, 0, 0;\n}\n"
        : RTK_D32(0), RTK_D32(32), RTK_D32(64), RTK_D32(96)
        : "l"(a), "l"(b), "r"(accumulate));
  }
}

// The same with a's part of 64 x 16 in registers: each warp has 16 of the rows, as four 8 x 8 matrices
// (upper left, lower left, upper right, lower right) in the layout of load_matrices.
template <int N>
__device__ inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 112 || N == 128);
  if constexpr (N == 112) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %61, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {" RTK_R32 ", "
        RTK_R8(32, 33, 34, 35, 36, 37, 38, 39) ", " RTK_R8(40, 41, 42, 43, 44, 45, 46, 47) ", "
        RTK_R8(48, 49, 50, 51, 52, 53, 54, 55) "}, {%56, %57, %58, %59}, %60, p, 1, 1, 0;\n}\n"
        : RTK_D32(0), RTK_D8(32), RTK_D8(40), RTK_D8(48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  } else {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" RTK_R64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"
        : RTK_D32(0), RTK_D32(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
}

// Nothing that reads or writes the sums is moved across this.
template <int N>
__device__ inline void keep_order(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#undef RTK_D8
#undef RTK_D32
#undef RTK_R8
#undef RTK_R32
#undef RTK_R64
#undef RTK_R128

// --- kernels one after the other: the next may start its blocks now; the one before is done altogether.

__device__ inline void allow_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// --- registers: a producer gives them up, the warpgroups that multiply take them.

template <int kCount>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace rtk::hopper
