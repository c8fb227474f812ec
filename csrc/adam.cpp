// Adam on the CPU: one pass looks for non-finite gradients, one updates.
#include "adam.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 1 << 15;  // elements a chunk: for fewer, no second thread is woken

template <class T> bool all_finite(const AdamArgs<T>& a) {
  const T unscale = T(1 / a.grad_scale) / (a.loss_scale ? T(*a.loss_scale) : T(1));
  int bad = 0;
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    int found = 0;
    for (int64_t i = begin; i < end; ++i) {
      const T g = a.grad[i] * unscale;
      found |= g - g != 0;  // inf - inf and NaN - NaN are NaN
    }
    if (!found) return;
#pragma omp atomic write
    bad = 1;
  });
  return !bad;
}

}  // namespace

template <class T> void adam_step(const AdamArgs<T>& a, Stream) {
  if (!all_finite(a)) {
    ++*a.skipped;
    return;
  }
  const int64_t step = a.step_is_int64 ? ++*static_cast<int64_t*>(a.step)
                                       : ++*static_cast<int32_t*>(a.step);
  const AdamFactors<T> f = adam_factors(a, step);
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    T* __restrict__ p = a.param;
    T* __restrict__ m = a.exp_avg;
    T* __restrict__ v = a.exp_avg_sq;
    const T* __restrict__ g = a.grad;
    for (int64_t i = begin; i < end; ++i) adam_element(f, p[i], g[i], m[i], v[i]);
  });
}

DF_INSTANTIATE(adam_step, AdamArgs)

}  // namespace DF_ISA
}  // namespace df
