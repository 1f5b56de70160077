// Number types of the CPU ops, inside the namespace of the instruction set they are compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rtk.h"

namespace rtk::RTK_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct U8 {
  uint8_t value;
};
struct B1 {
  uint8_t value;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float v) { return v; }
inline float to_float(double v) { return static_cast<float>(v); }
inline float to_float(Bf16 v) { return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(U8 v) { return static_cast<float>(v.value) / 255.0f; }
inline float to_float(B1 v) { return static_cast<float>(v.value); }
// Branch-free, so that loops over it vectorise: shift exponent and mantissa into a float's place and
// let a multiplication (normal) or a subtraction (subnormal) mend the exponent.
inline float to_float(F16 v) {
  const uint32_t w = static_cast<uint32_t>(v.bits) << 16;
  const uint32_t sign = w & 0x80000000u, twice = w + w;
  const float normal = bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(twice < (1u << 27) ? subnormal : normal));
}

template <class T>
T from_float(float v);

template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline double from_float<double>(float v) {
  return v;
}
// Round to nearest even, by carry: half of the last place that stays, less one where that is even.
template <>
inline Bf16 from_float<Bf16>(float v) {
  const uint32_t b = bit_cast<uint32_t>(v);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(v != v ? 0x7fc0u : rounded)};
}
// Adding a number of the right size makes the float unit round at a half's last place.
template <>
inline F16 from_float<F16>(float v) {
  const uint32_t b = bit_cast<uint32_t>(v), twice = b + b, sign = b & 0x80000000u;
  const float scaled = (bit_cast<float>(b & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t exponent = twice & 0xff000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t magnitude = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  return {static_cast<uint16_t>((sign >> 16) | (twice > 0xff000000u ? 0x7e00u : magnitude))};
}

// torch.clamp's: NaN stays NaN, -0 stays -0 at a bound of 0, and `high` wins where the bounds cross.
inline float clamp(float v, float low, float high) {
  const float raised = v < low ? low : v;
  return raised > high ? high : raised;
}

template <class T>
struct Tag {
  using type = T;
};
template <class T>
constexpr DType dtype_of = DType::f32;
template <>
inline constexpr DType dtype_of<double> = DType::f64;
template <>
inline constexpr DType dtype_of<Bf16> = DType::bf16;
template <>
inline constexpr DType dtype_of<F16> = DType::f16;
template <>
inline constexpr DType dtype_of<U8> = DType::u8;
template <>
inline constexpr DType dtype_of<B1> = DType::b1;

// Calls fn(Tag<T>) for the T among Ts that is `dtype`.
template <class... Ts, class Fn>
void with_type(DType dtype, const char* what, Fn&& fn) {
  const bool known = ((dtype_of<Ts> == dtype && (fn(Tag<Ts>{}), true)) || ...);
  if (!known) {
    throw std::invalid_argument(std::string(what) + ": no implementation for dtype code " +
                                std::to_string(static_cast<int>(dtype)));
  }
}

}  // namespace rtk::RTK_ISA
