// Random starts from a counter: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011), so that a pixel's noise is a function of the seed and of its index in
// (N, C, H, W), and nothing has to be kept or synchronised.
//
// Counter (index / 4 low, index / 4 high, stream, 0), word index % 4. Streams: 0 uniform noise or
// Box-Muller's radius, 1 Box-Muller's angle, 2 the L2 radius of an image.

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/numeric.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/sum_squares.h"

namespace rtk::RTK_ISA {
namespace {

constexpr int64_t kBatch = 1024;

inline void philox(uint64_t counter, uint32_t stream, uint64_t seed, uint32_t* words) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = stream, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// A run of the stream's words, in words[0 .. count), of the indexes from `first` on; words has room
// for kBatch + 8, and where the run starts inside it is returned.
const uint32_t* random_words(int64_t first, int64_t count, uint32_t stream, uint64_t seed, uint32_t* words) {
  const int64_t counter = first / 4, groups = (first + count + 3) / 4 - counter;
  for (int64_t g = 0; g < groups; ++g) philox(counter + g, stream, seed, words + 4 * g);
  return words + first % 4;
}

// -2 ln(m / 2^24) for m in [1, 2^24], by ln f = 2 atanh((f - 1) / (f + 1)) with f in [sqrt .5, sqrt 2).
// libm's log differs between machines; this is the same everywhere and vectorises.
inline double minus_two_log(uint32_t m) {
  const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(m)));
  const uint32_t above = (bits & 0x007fffffu) > 0x003504f3u;
  const int32_t exponent = static_cast<int32_t>(bits >> 23) - 127 - 24 + static_cast<int32_t>(above);
  const double f = bit_cast<float>((bits & 0x007fffffu) | ((127u - above) << 23));
  const double s = (f - 1.0) / (f + 1.0), z = s * s;
  double series = 1.0 / 19;
  series = series * z + 1.0 / 17;
  series = series * z + 1.0 / 15;
  series = series * z + 1.0 / 13;
  series = series * z + 1.0 / 11;
  series = series * z + 1.0 / 9;
  series = series * z + 1.0 / 7;
  series = series * z + 1.0 / 5;
  series = series * z + 1.0 / 3;
  series = series * z + 1.0;
  return -2.0 * (exponent * 0.69314718055994530942 + 2.0 * s * series);
}

// cos(2 pi k / 2^24): the nearest quarter turn is taken off exactly, in integers; Taylor for the rest.
inline double cos_turn(int32_t k) {
  const int32_t quarter = (k + (1 << 21)) >> 22;
  const double a = (k - quarter * (1 << 22)) * (6.28318530717958647692 / (1 << 24)), z = a * a;
  double sine = 1.0 / 6227020800;
  sine = sine * z - 1.0 / 39916800;
  sine = sine * z + 1.0 / 362880;
  sine = sine * z - 1.0 / 5040;
  sine = sine * z + 1.0 / 120;
  sine = sine * z - 1.0 / 6;
  sine = a + a * z * sine;
  double cosine = -1.0 / 87178291200;
  cosine = cosine * z + 1.0 / 479001600;
  cosine = cosine * z - 1.0 / 3628800;
  cosine = cosine * z + 1.0 / 40320;
  cosine = cosine * z - 1.0 / 720;
  cosine = cosine * z + 1.0 / 24;
  cosine = cosine * z - 0.5;
  cosine = 1.0 + z * cosine;
  const double magnitude = quarter & 1 ? sine : cosine;
  return ((quarter + 1) & 2) ? -magnitude : magnitude;
}

// Uniform noise in [-eps, eps) for the indexes from `first` on.
void uniform_noise(const PgdInit& p, int64_t first, int64_t count, float* noise) {
  uint32_t buffer[kBatch + 8];
  const uint32_t* words = random_words(first, count, 0, p.seed, buffer);
  for (int64_t i = 0; i < count; ++i) {
    const float u = static_cast<float>(static_cast<int32_t>(words[i] >> 8)) * 0x1.0p-24f;
    noise[i] = (u * 2.0f - 1.0f) * p.eps;
  }
}

// Standard normals by Box-Muller for the indexes from `first` on.
void normal_noise(const PgdInit& p, int64_t first, int64_t count, float* noise) {
  uint32_t buffers[2][kBatch + 8];
  const uint32_t* a = random_words(first, count, 0, p.seed, buffers[0]);
  const uint32_t* b = random_words(first, count, 1, p.seed, buffers[1]);
  for (int64_t i = 0; i < count; ++i) {
    const double radius = std::sqrt(minus_two_log((a[i] >> 8) + 1));
    noise[i] = static_cast<float>(radius * cos_turn(static_cast<int32_t>(b[i] >> 8)));
  }
}

// out = clamp(x + noise * scale) over the indexes from `first` on, a row of the image at a time.
template <class X, class Out>
void add_noise(const PgdInit& p, int64_t first, int64_t count, const float* noise, float scale) {
  const X* x = static_cast<const X*>(p.x);
  Out* out = static_cast<Out*>(p.out);
  const float low = p.clip_min, high = p.clip_max;
  const int64_t C = p.sizes[1], H = p.sizes[2], W = p.sizes[3];
  for (int64_t done = 0; done < count;) {
    const int64_t row = (first + done) / W, w = (first + done) % W, run = std::min(W - w, count - done);
    const int64_t index[4] = {row / H / C, row / H % C, row % H, w};
    int64_t x_at = 0, out_at = 0;
    for (int d = 0; d < 4; ++d) {
      x_at += index[d] * p.x_strides[d];
      out_at += index[d] * p.out_strides[d];
    }
    const int64_t x_step = p.x_strides[3], out_step = p.out_strides[3];
    if (x_step == 1 && out_step == 1) {
      for (int64_t i = 0; i < run; ++i) {
        out[out_at + i] = from_float<Out>(clamp(to_float(x[x_at + i]) + noise[done + i] * scale, low, high));
      }
    } else {
      for (int64_t i = 0; i < run; ++i) {
        const float v = to_float(x[x_at + i * x_step]) + noise[done + i] * scale;
        out[out_at + i * out_step] = from_float<Out>(clamp(v, low, high));
      }
    }
    done += run;
  }
}

template <class X, class Out>
void linf(const PgdInit& p, int threads) {
  const int64_t total = p.sizes[0] * p.sizes[1] * p.sizes[2] * p.sizes[3];
  parallel_for(total, 16 * kBatch, threads, [&](int64_t begin, int64_t end) {
    float noise[kBatch];
    for (int64_t i = begin; i < end; i += kBatch) {
      const int64_t count = std::min(kBatch, end - i);
      uniform_noise(p, i, count, noise);
      add_noise<X, Out>(p, i, count, noise, 1.0f);
    }
  });
}

// eps * U^(1 / chw): a radius with which points of random direction fill the ball evenly.
float image_radius(const PgdInit& p, int64_t image, int64_t chw) {
  uint32_t words[4];
  philox(image, 2, p.seed, words);
  const double u = ((words[0] >> 8) + 1) * 0x1.0p-24;
  return p.eps * static_cast<float>(std::pow(u, 1.0 / static_cast<double>(chw)));
}

template <class X, class Out>
void l2(const PgdInit& p, int threads) {
  const int64_t n = p.sizes[0], chw = p.sizes[1] * p.sizes[2] * p.sizes[3];
  const bool by_image = n >= threads;
  const int inner = by_image ? 1 : threads;
  const int64_t grain = 1 + 4 * kBatch / (chw + 1);
  parallel_for(n, grain, by_image ? threads : 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> noise(new float[chw]);
    float* z = noise.get();
    for (int64_t image = begin; image < end; ++image) {
      parallel_for(chw, kBatch, inner, [&](int64_t from, int64_t to) {
        normal_noise(p, image * chw + from, to - from, z + from);
      });
      const float norm = static_cast<float>(std::sqrt(sum_squares(chw, inner, [z](int64_t i) { return z[i]; })));
      const float scale = norm > 0 ? image_radius(p, image, chw) / norm : 0.0f;
      parallel_for(chw, 16 * kBatch, inner, [&](int64_t from, int64_t to) {
        add_noise<X, Out>(p, image * chw + from, to - from, z + from, scale);
      });
    }
  });
}

}  // namespace

void pgd_init(const PgdInit& p, int threads) {
  with_type<float, Bf16, U8>(p.x_dtype, "pgd_init x", [&](auto x) {
    with_type<float, Bf16>(p.out_dtype, "pgd_init out", [&](auto out) {
      using X = typename decltype(x)::type;
      using Out = typename decltype(out)::type;
      p.l2 ? l2<X, Out>(p, threads) : linf<X, Out>(p, threads);
    });
  });
}

}  // namespace rtk::RTK_ISA
