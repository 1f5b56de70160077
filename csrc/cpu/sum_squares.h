// The sum of squares behind every L2 norm, the same to the last bit on every instruction set and
// thread count: a fixed number of double lanes per range, ranges added in order.
#pragma once

#include <vector>

#include "cpu/parallel.h"

namespace rtk::RTK_ISA {

constexpr int64_t kSumRange = 16384;

// Sums value(i)^2 over [0, n); value returns a float.
template <class Value>
double sum_squares(int64_t n, int threads, Value value) {
  constexpr int kLanes = 16;
  std::vector<double> partial((n + kSumRange - 1) / kSumRange);
  parallel_for(n, kSumRange, threads, [&](int64_t begin, int64_t end) {
    double lanes[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const double v = value(i + lane);
        lanes[lane] += v * v;
      }
    }
    for (int lane = 0; i < end; ++i, ++lane) {
      const double v = value(i);
      lanes[lane] += v * v;
    }
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    partial[begin / kSumRange] = sum;
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  return sum;
}

}  // namespace rtk::RTK_ISA
