// Adam on the GPU, in three kernels: is any gradient non-finite; then one thread counts the update,
// or that it is skipped, and computes what all elements share; then the elements. The decision
// stays on the device, and no thread reads the step's number while another changes it.
#include "adam.h"
#include "gpu.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 256;

// N neighbours, moved in one go.
template <class T, int N> struct alignas(N * sizeof(T)) Pack { T v[N]; };
template <int N, class T> __device__ inline Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, class T> __device__ inline void store_pack(T* p, const Pack<T, N>& x) {
  *reinterpret_cast<Pack<T, N>*>(p) = x;
}

template <int N, class T>
__global__ void __launch_bounds__(THREADS) adam_check_kernel(AdamArgs<T> a, T unscale) {
  const int64_t i = N * global_thread();
  if (a.loss_scale) unscale /= T(*a.loss_scale);
  bool bad = false;
  const auto look = [&](T grad) {
    const T g = grad * unscale;
    bad |= !(g - g == 0);  // inf - inf and NaN - NaN are NaN
  };
  if (i + N <= a.n) {
    const Pack<T, N> grad = load_pack<N>(a.grad + i);
#pragma unroll
    for (int k = 0; k < N; ++k) look(grad.v[k]);
  } else {
#pragma unroll 1
    for (int64_t j = i; j < a.n; ++j) look(a.grad[j]);
  }
  if (__any_sync(FULL_WARP, bad) && lane_id() == 0) atomicOr(a.found, 1);
}

template <class T> __device__ inline AdamFactors<T>* shared_factors(const AdamArgs<T>& a) {
  static_assert(sizeof(AdamFactors<T>) == ADAM_FACTORS * sizeof(T), "scratch of another size");
  return reinterpret_cast<AdamFactors<T>*>(a.factors);
}
template <class T> __global__ void adam_prepare_kernel(AdamArgs<T> a) {
  if (*a.found) {
    ++*a.skipped;
    return;
  }
  const int64_t step = a.step_is_int64 ? ++*static_cast<int64_t*>(a.step)
                                       : ++*static_cast<int32_t*>(a.step);
  *shared_factors(a) = adam_factors(a, step);
}

__device__ inline half to_half(float x) { return __float2half_rn(x); }

template <int N, class T>
__global__ void __launch_bounds__(THREADS) adam_update_kernel(AdamArgs<T> a) {
  const int64_t i = N * global_thread();
  if (i >= a.n || *a.found) return;
  const AdamFactors<T> f = *shared_factors(a);
  half* const copy = static_cast<half*>(a.param_half);
  if (i + N <= a.n) {
    Pack<T, N> p = load_pack<N>(a.param + i), m = load_pack<N>(a.exp_avg + i),
               v = load_pack<N>(a.exp_avg_sq + i);
    const Pack<T, N> g = load_pack<N>(a.grad + i);
#pragma unroll
    for (int k = 0; k < N; ++k) adam_element(f, p.v[k], g.v[k], m.v[k], v.v[k]);
    store_pack<N>(a.param + i, p);
    store_pack<N>(a.exp_avg + i, m);
    store_pack<N>(a.exp_avg_sq + i, v);
    if (!copy) return;
    Pack<half, N> rounded;
#pragma unroll
    for (int k = 0; k < N; ++k) rounded.v[k] = to_half(float(p.v[k]));
    store_pack<N>(copy + i, rounded);
  } else {
#pragma unroll 1
    for (int64_t j = i; j < a.n; ++j) {
      adam_element(f, a.param[j], a.grad[j], a.exp_avg[j], a.exp_avg_sq[j]);
      if (copy) copy[j] = to_half(float(a.param[j]));
    }
  }
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <int N, class T> void step_in_packs(const AdamArgs<T>& a, Stream stream) {
  const unsigned blocks = blocks_for(a.n, N * THREADS);
  device_zero(a.found, sizeof *a.found, stream);
  launch("adam_check_kernel", adam_check_kernel<N, T>, blocks, THREADS, 0, stream, a,
         T(1 / a.grad_scale));
  launch("adam_prepare_kernel", adam_prepare_kernel<T>, 1, 1, 0, stream, a);
  launch("adam_update_kernel", adam_update_kernel<N, T>, blocks, THREADS, 0, stream, a);
}

}  // namespace

template <class T> void adam_step(const AdamArgs<T>& a, Stream stream) {
  constexpr int N = 16 / sizeof(T);
  const bool whole = aligned(a.param, 16) && aligned(a.grad, 16) && aligned(a.exp_avg, 16) &&
                     aligned(a.exp_avg_sq, 16) && aligned(a.param_half, N * sizeof(half));
  if (whole) step_in_packs<N>(a, stream);
  else step_in_packs<1>(a, stream);  // views that begin anywhere
}

DF_INSTANTIATE(adam_step, AdamArgs)

}  // namespace DF_ISA
}  // namespace df
