// Pixels of the L2 step of projected gradient descent, as they lie in memory, and what is computed of each.
//
// With f = step / (|grad| + 1e-10) three sums give both norms:
//
//   |grad|^2 = gg,  |delta|^2 = |(x_adv - x) + f grad|^2 = dd + 2 f dg + f^2 gg
//
// so an image's pixels are summed once. Where the three terms cancel, |delta|^2 is summed directly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace rtk::pgd {

// Byte j of a word, divided by 255 and correctly rounded: the first product is exact (8 by 9 bits), the
// second tiny.
__device__ inline float from_byte(uint32_t word, int j) {
  // As the last byte of 2^23's mantissa: a conversion would run at a quarter of the rate.
  const float u = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 + j)) - 0x1p23f;
  return u * 0x1.01p-8f + u * 0x1.010102p-24f;
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(uint8_t v) { return from_byte(v, 0); }

// The number at place j of a word, in the order of memory.
template <class T>
__device__ inline float from_word(uint32_t word, int j) {
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(word);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(j ? word & 0xffff0000 : word << 16);
  if constexpr (std::is_same_v<T, __half>) return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * j)));
  if constexpr (std::is_same_v<T, uint8_t>) return from_byte(word, j);
}

// Neighbouring pixels as they lie in memory, converted where they are used. Several are held as words:
// the compiler would give every narrow value a register of its own.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  static constexpr int kInWord = 4 / sizeof(T);
  uint32_t word[kCount / kInWord];

  __device__ float operator[](int j) const { return from_word<T>(word[j / kInWord], j % kInWord); }
  __device__ void set(const float (&v)[kCount]) {
    T values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = T(v[j]);
    memcpy(word, values, sizeof(word));
  }
};

template <class T>
struct Pack<T, 1> {
  T value;

  __device__ float operator[](int) const { return to_float(value); }
  __device__ void set(const float (&v)[1]) { value = T(v[0]); }
};

// NaN stays NaN, as in torch.clamp.
__device__ inline float clamp(float v, float low, float high) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(high));
  return v;
}

// The same pixels of the three tensors.
template <class A, class G, class X, int kCount>
struct Unit {
  Pack<A, kCount> x_adv;
  Pack<G, kCount> grad;
  Pack<X, kCount> x;
};

// Adds |grad|^2, (x_adv - x) . grad and |x_adv - x|^2.
template <class A, class G, class X, int kCount>
__device__ void add_products(const Unit<A, G, X, kCount>& unit, float (&sums)[3]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float g = unit.grad[j], d = unit.x_adv[j] - unit.x[j];
    sums[0] += g * g;
    sums[1] += d * g;
    sums[2] += d * d;
  }
}

// Where the step along the gradient leads, as seen from the origin.
__device__ inline float delta(float x_adv, float grad, float origin, float factor) {
  return (x_adv + factor * grad) - origin;
}

template <class A, class G, class X, int kCount>
__device__ void add_square(const Unit<A, G, X, kCount>& unit, float factor, float& sum) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float d = delta(unit.x_adv[j], unit.grad[j], unit.x[j], factor);
    sum += d * d;
  }
}

// What an image's pixels have in common: out = clip(origin + scale delta).
struct Update {
  float factor, scale;
};

constexpr float kDivisionEps = 1e-10f;  // keeps a zero gradient a zero step
constexpr double kCancelled = 0.25;     // of the terms' sum: below it, their rounding would show

// Of the sums |grad|^2, (x_adv - x) . grad and |x_adv - x|^2 over an image: how long a gradient's step is, and
// the square of where it leads; `exact` says whether the three terms do not cancel.
struct Length {
  float factor;
  double square;
  bool exact;
};

__device__ inline Length length(const double (&sums)[3], float step_size) {
  const float factor = step_size / (sqrtf(static_cast<float>(sums[0])) + kDivisionEps);
  const double f = factor, terms = sums[2] + f * f * sums[0], square = terms + 2 * f * sums[1];
  return {factor, square, !(square < kCancelled * terms)};
}

// Not min(1, eps / norm): 0 / 0 must be 1, and a NaN norm must stay seen.
__device__ inline float scale_into_ball(double square, float eps) {
  const float norm = sqrtf(static_cast<float>(square));
  return norm <= eps ? 1.0f : eps / norm;
}

template <class A, class G, class X, int kCount>
__device__ Pack<A, kCount> updated(const Unit<A, G, X, kCount>& unit, Update update, float low, float high) {
  float pixels[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float origin = unit.x[j];
    const float d = delta(unit.x_adv[j], unit.grad[j], origin, update.factor);
    pixels[j] = clamp(origin + d * update.scale, low, high);
  }
  Pack<A, kCount> result;
  result.set(pixels);
  return result;
}

// Past L1, which would only hold what nobody asks for again.
template <class T, int kCount>
__device__ Pack<T, kCount> load_once(const Pack<T, kCount>* from) {
  Pack<T, kCount> to;
  static_assert(sizeof(to) == 4 || sizeof(to) == 8 || sizeof(to) == 16);
  if constexpr (sizeof(to) == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
                 : "l"(from));
  } else if constexpr (sizeof(to) == 8) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
                 : "=r"(to.word[0]), "=r"(to.word[1])
                 : "l"(from));
  } else {
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(to.word[0]) : "l"(from));
  }
  return to;
}

}  // namespace rtk::pgd
