// Spherical harmonics on the GPU: a thread a row.
#include "gpu.h"
#include "spherical_harmonics.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 128;

template <int DEGREE, class T>
__global__ void __launch_bounds__(THREADS) sh_forward_kernel(SphericalHarmonicsArgs<T> a) {
  const int64_t row = global_thread();
  if (row >= a.n) return;
  T* const out = a.out + int64_t(DEGREE * DEGREE) * row;
  T values[DEGREE * DEGREE] = {};
  if (row < valid_rows(a.count, a.n)) sh_forward<DEGREE>(load3(a.dirs + 3 * row), values);
#pragma unroll
  for (int i = 0; i < DEGREE * DEGREE; ++i) out[i] = values[i];
}

template <int DEGREE, class T>
__global__ void __launch_bounds__(THREADS) sh_backward_kernel(SphericalHarmonicsArgs<T> a) {
  const int64_t row = global_thread();
  if (row >= a.n) return;
  vec3<T> grad{T(0), T(0), T(0)};
  if (row < valid_rows(a.count, a.n))
    grad = sh_backward<DEGREE>(load3(a.dirs + 3 * row),
                               a.grad_out + int64_t(DEGREE * DEGREE) * row);
  store3(a.grad_dirs + 3 * row, grad);
}

// Calls f(std::integral_constant<int, degree>) so that the degree is a constant inside.
template <int DEGREE = 8, class F> void on_degree(int degree, const F& f) {
  if (degree == DEGREE) return f(std::integral_constant<int, DEGREE>());
  if constexpr (DEGREE > 1) on_degree<DEGREE - 1>(degree, f);
}

}  // namespace

template <class T>
void spherical_harmonics_forward(const SphericalHarmonicsArgs<T>& a, Stream stream) {
  on_degree(a.degree, [&](auto degree) {
    launch("sh_forward_kernel", sh_forward_kernel<decltype(degree)::value, T>,
           blocks_for(a.n, THREADS), THREADS, 0, stream, a);
  });
}

template <class T>
void spherical_harmonics_backward(const SphericalHarmonicsArgs<T>& a, Stream stream) {
  on_degree(a.degree, [&](auto degree) {
    launch("sh_backward_kernel", sh_backward_kernel<decltype(degree)::value, T>,
           blocks_for(a.n, THREADS), THREADS, 0, stream, a);
  });
}

DF_INSTANTIATE(spherical_harmonics_forward, SphericalHarmonicsArgs)
DF_INSTANTIATE(spherical_harmonics_backward, SphericalHarmonicsArgs)

}  // namespace DF_ISA
}  // namespace df
