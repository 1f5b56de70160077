// One projected gradient step. The arithmetic is PyTorch's, operation by operation, so that the Linf
// step gives the same bits as the expression it stands for.

#include <cmath>

#include "cpu/numeric.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/sum_squares.h"

namespace rtk::RTK_ISA {
namespace {

constexpr int64_t kGrain = 32768;

// x + clamp((x_adv + step * sign(grad)) - x, -eps, eps). The sign of NaN is 0, as torch.sign's.
template <class A, class G, class X>
void linf(const PgdStep& p, int threads) {
  parallel_for(p.n * p.chw, kGrain, threads, [&p](int64_t begin, int64_t end) {
    const A* x_adv = static_cast<const A*>(p.x_adv);
    const G* grad = static_cast<const G*>(p.grad);
    const X* x = static_cast<const X*>(p.x);
    A* out = static_cast<A*>(p.out);
    const float step = p.step_size, eps = p.eps, low = p.clip_min, high = p.clip_max;
    for (int64_t i = begin; i < end; ++i) {
      const float g = to_float(grad[i]), origin = to_float(x[i]);
      const float sign = static_cast<float>(static_cast<int>(g > 0) - static_cast<int>(g < 0));
      const float delta = (to_float(x_adv[i]) + step * sign) - origin;
      out[i] = from_float<A>(clamp(origin + clamp(delta, -eps, eps), low, high));
    }
  });
}

// One image: d = (x_adv + step * g / (||g|| + 1e-10)) - x, then x + d * min(1, eps / ||d||).
template <class A, class G, class X>
void l2_image(const PgdStep& p, int64_t image, int threads) {
  const int64_t offset = image * p.chw;
  const A* x_adv = static_cast<const A*>(p.x_adv) + offset;
  const G* grad = static_cast<const G*>(p.grad) + offset;
  const X* x = static_cast<const X*>(p.x) + offset;
  A* out = static_cast<A*>(p.out) + offset;

  const double grad_squares = sum_squares(p.chw, threads, [=](int64_t i) { return to_float(grad[i]); });
  const float grad_norm = static_cast<float>(std::sqrt(grad_squares)) + 1e-10f;
  const float step = p.step_size, low = p.clip_min, high = p.clip_max;
  auto delta = [=](int64_t i) {
    return (to_float(x_adv[i]) + step * (to_float(grad[i]) / grad_norm)) - to_float(x[i]);
  };
  const float norm = static_cast<float>(std::sqrt(sum_squares(p.chw, threads, delta)));
  // Not min(1, eps / norm): 0 / 0 must be 1, and a NaN norm must stay seen.
  const float scale = norm <= p.eps ? 1.0f : p.eps / norm;

  parallel_for(p.chw, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = from_float<A>(clamp(to_float(x[i]) + delta(i) * scale, low, high));
    }
  });
}

template <class A, class G, class X>
void l2(const PgdStep& p, int threads) {
  // Threads take images, or the pixels of one image where there are too few images.
  const bool by_image = p.n >= threads;
  const int64_t grain = 1 + kGrain / (p.chw + 1);
  parallel_for(p.n, grain, by_image ? threads : 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      l2_image<A, G, X>(p, image, by_image ? 1 : threads);
    }
  });
}

}  // namespace

void pgd_step(const PgdStep& p, int threads) {
  with_type<float, Bf16>(p.x_adv_dtype, "pgd_step x_adv", [&](auto a) {
    with_type<float, Bf16, F16>(p.grad_dtype, "pgd_step grad", [&](auto g) {
      with_type<float, U8>(p.x_dtype, "pgd_step x", [&](auto x) {
        using A = typename decltype(a)::type;
        using G = typename decltype(g)::type;
        using X = typename decltype(x)::type;
        p.l2 ? l2<A, G, X>(p, threads) : linf<A, G, X>(p, threads);
      });
    });
  });
}

}  // namespace rtk::RTK_ISA
