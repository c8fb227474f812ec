// Radiance on the GPU: a thread a row.
#include "gpu.h"
#include "radiance.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 256;

template <class T> __global__ void __launch_bounds__(THREADS) radiance_forward_kernel(RadianceArgs<T> a) {
  using W = Wide<T>;
  const int64_t row = global_thread();
  if (row >= a.n) return;
  const bool valid = row < valid_rows(a.count, a.n);
  const T* const out = a.out + (1 + a.channels) * row;
  W sigma = W(0);
  if (valid) {
    const Blob<W> blob = radiance_blob<W>(a);
    const vec3<W> p = load3(a.positions + 3 * row);
    const W squared = dot(p, p), distance = blob.cone ? std::sqrt(squared) : W(0);
    const W value = blob.density * (blob.cone ? W(0) : std::exp(blob.factor * squared));
    const W added = blob.cone ? blob.density + blob.factor * distance : value;
    const W log_sigma = W(out[0]) + added + W(a.bias);
    sigma = std::exp(log_sigma > W(a.ceiling) ? W(a.ceiling) : log_sigma);
    if (a.gradient)
      store3(a.gradient + 3 * row,
             W(a.scale) * load3(a.of_x + 3 * row) +
                 blob_gradient(blob, p, value, distance > W(0) ? 1 / distance : W(0)));
  } else if (a.gradient) {
    store3(a.gradient + 3 * row, {W(0), W(0), W(0)});
  }
  a.sigma[row] = sigma;
  for (int c = 0; c < a.channels; ++c) {
    const W z = valid ? W(out[1 + c]) : W(0);
    a.values[a.channels * row + c] = !valid ? W(0) : a.raw ? z : 1 / (1 + std::exp(-z));
  }
}

template <class T> __global__ void __launch_bounds__(THREADS) radiance_backward_kernel(RadianceArgs<T> a) {
  using W = Wide<T>;
  const int64_t row = global_thread();
  if (row >= a.n) return;
  const bool valid = row < valid_rows(a.count, a.n);
  T* const grad = a.grad_out + (1 + a.channels) * row;
  const W sigma = a.sigma[row];
  const bool free = sigma < std::exp(W(a.ceiling)) || sigma != sigma;
  grad[0] = T(valid && free && a.grad_sigma ? a.grad_sigma[row] * sigma : W(0));
  for (int c = 0; c < a.channels; ++c) {
    const int64_t i = a.channels * row + c;
    const W g = valid && a.grad_values ? a.grad_values[i] : W(0), v = a.values[i];
    grad[1 + c] = T(a.raw ? g : g * (v * (1 - v)));
  }
  if (!a.grad_of_x) return;
  vec3<W> of_x{W(0), W(0), W(0)};
  if (valid && a.grad_gradient) of_x = W(a.scale) * load3(a.grad_gradient + 3 * row);
  store3(a.grad_of_x + 3 * row, of_x);
}

}  // namespace

template <class T> void radiance_forward(const RadianceArgs<T>& a, Stream stream) {
  launch("radiance_forward_kernel", radiance_forward_kernel<T>, blocks_for(a.n, THREADS), THREADS,
         0, stream, a);
}

template <class T> void radiance_backward(const RadianceArgs<T>& a, Stream stream) {
  launch("radiance_backward_kernel", radiance_backward_kernel<T>, blocks_for(a.n, THREADS), THREADS,
         0, stream, a);
}

DF_INSTANTIATE(radiance_forward, RadianceArgs)
DF_INSTANTIATE(radiance_backward, RadianceArgs)
DF_INSTANTIATE_HALF(radiance_forward, RadianceArgs)
DF_INSTANTIATE_HALF(radiance_backward, RadianceArgs)

}  // namespace DF_ISA
}  // namespace df
