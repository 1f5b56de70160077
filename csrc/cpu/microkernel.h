// The register tile under the block-sparse products: kRows x kColumns sums, kept in registers over a
// whole run of the reduced dimension, fed from packed panels.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace rtk::RTK_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kRows = 8;  // 16 of 32 registers hold sums: enough to hide the FMA's latency
#elif defined(__AVX2__)
constexpr int kWidth = 8, kRows = 6;  // 12 of 16
#else
constexpr int kWidth = 4, kRows = 6;
#endif
constexpr int kVectors = 2, kColumns = kVectors * kWidth;

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float))));

// A panel lists its kRows (or kColumns) values for each step of the reduced dimension. A run is a
// contiguous piece of it: where it starts in the rows' panel, and how many steps it has.
struct Run {
  int64_t begin, depth;
};

// tile (kRows, kColumns) = or += the sum over the runs of rows^T columns. The columns' panel holds the
// runs' steps one after the other.
inline void multiply_panels(const Run* runs, int64_t run_count, const float* rows, const float* columns, bool add,
                            float* tile, int64_t tile_stride) {
  Vector sums[kRows][kVectors] = {};
  for (int64_t r = 0; r < run_count; ++r) {
    const float* a = rows + runs[r].begin * kRows;
    for (int64_t step = 0; step < runs[r].depth; ++step, a += kRows, columns += kColumns) {
      const Vector* b = reinterpret_cast<const Vector*>(columns);
      const Vector b0 = b[0], b1 = b[1];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        sums[i][0] += a[i] * b0;
        sums[i][1] += a[i] * b1;
      }
    }
  }
  for (int i = 0; i < kRows; ++i, tile += tile_stride) {
    Vector* to = reinterpret_cast<Vector*>(tile);
    to[0] = add ? to[0] + sums[i][0] : sums[i][0];
    to[1] = add ? to[1] + sums[i][1] : sums[i][1];
  }
}

// Floats that start on a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(new (std::align_val_t(64)) float[count]) {}
  float* get() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(float* data) const { ::operator delete[](data, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Delete> data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace rtk::RTK_ISA
