// Spherical harmonics on the CPU: one row after another, every polynomial unrolled.
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")  // measured: a fifth less time than at 256
#endif
#include "spherical_harmonics.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 1024;  // rows a chunk

// Calls f(std::integral_constant<int, degree>) so that the degree is a constant inside.
template <int DEGREE = 8, class F> void on_degree(int degree, const F& f) {
  if (degree == DEGREE) return f(std::integral_constant<int, DEGREE>());
  if constexpr (DEGREE > 1) on_degree<DEGREE - 1>(degree, f);
}

}  // namespace

template <class T> void spherical_harmonics_forward(const SphericalHarmonicsArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n);
  on_degree(a.degree, [&](auto degree) {
    constexpr int D = decltype(degree)::value;
    parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
      const int64_t stop = clamp(valid, begin, end);
      for (int64_t i = begin; i < stop; ++i)
        sh_forward<D>(load3(a.dirs + 3 * i), a.out + D * D * i);
      fill_zero(a.out, D * D * stop, D * D * end);
    });
  });
}

template <class T> void spherical_harmonics_backward(const SphericalHarmonicsArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n);
  on_degree(a.degree, [&](auto degree) {
    constexpr int D = decltype(degree)::value;
    parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
      const int64_t stop = clamp(valid, begin, end);
      for (int64_t i = begin; i < stop; ++i)
        store3(a.grad_dirs + 3 * i, sh_backward<D>(load3(a.dirs + 3 * i), a.grad_out + D * D * i));
      fill_zero(a.grad_dirs, 3 * stop, 3 * end);
    });
  });
}

DF_INSTANTIATE(spherical_harmonics_forward, SphericalHarmonicsArgs)
DF_INSTANTIATE(spherical_harmonics_backward, SphericalHarmonicsArgs)

}  // namespace DF_ISA
}  // namespace df
