// Radiance on the CPU: rows in blocks whose numbers lie side by side, in vector registers.
#include "radiance.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 8192;  // rows a chunk: for fewer, no second thread is woken
constexpr int BLOCK = 64;        // rows at a time

// Rows [first, first + n) of the blob, and what its gradient needs: 1 / |p|.
template <class T>
void blob_block(const RadianceArgs<T>& a, const Blob<T>& b, int64_t first, int n, T* value,
                T* inverse) {
  const T* const p = a.positions + 3 * first;
  for (int i = 0; i < n; ++i)
    value[i] = p[3 * i] * p[3 * i] + p[3 * i + 1] * p[3 * i + 1] + p[3 * i + 2] * p[3 * i + 2];
  if (b.cone) {
    for (int i = 0; i < n; ++i) {
      const T distance = std::sqrt(value[i]);
      inverse[i] = distance > T(0) ? 1 / distance : T(0);
      value[i] = b.density + b.factor * distance;
    }
  } else {
    for (int i = 0; i < n; ++i) value[i] = b.density * exp_fast(b.factor * value[i]);
  }
}

// Calls f(std::integral_constant<int, channels>): 3, as colours have, or 0 where only the arguments
// know. With the number a constant, the compiler takes rows apart in vector registers.
template <class F> void on_channels(int channels, const F& f) {
  if (channels == 3) f(std::integral_constant<int, 3>());
  else f(std::integral_constant<int, 0>());
}

template <int CHANNELS, class T>
void forward_block(const RadianceArgs<T>& a, const Blob<T>& b, int64_t first, int n) {
  const int channels = CHANNELS ? CHANNELS : a.channels, width = 1 + channels;
  T value[BLOCK], inverse[BLOCK] = {}, work[BLOCK];
  blob_block(a, b, first, n, value, inverse);
  const T* const out = a.out + width * first;
  const T bias = T(a.bias), ceiling = T(a.ceiling);
  for (int i = 0; i < n; ++i) {
    const T log_sigma = out[width * i] + value[i] + bias;
    work[i] = log_sigma > ceiling ? ceiling : log_sigma;
  }
  for (int i = 0; i < n; ++i) a.sigma[first + i] = exp_fast(work[i]);
  T* const __restrict values = a.values + channels * first;
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < channels; ++c) values[channels * i + c] = out[width * i + 1 + c];
  if (!a.raw)  // in place: in the order of memory there is nothing to take apart
    for (int i = 0; i < channels * n; ++i) values[i] = 1 / (1 + exp_fast(-values[i]));
  if (!a.gradient) return;
  for (int i = 0; i < n; ++i) {
    const vec3<T> p = load3(a.positions + 3 * (first + i));
    const vec3<T> of_x = load3(a.of_x + 3 * (first + i));
    store3(a.gradient + 3 * (first + i),
           T(a.scale) * of_x + blob_gradient(b, p, value[i], inverse[i]));
  }
}

// The gradients of rows [begin, end) of the network's outputs.
template <int CHANNELS, class T>
void backward_rows(const RadianceArgs<T>& a, int64_t begin, int64_t end) {
  const int channels = CHANNELS ? CHANNELS : a.channels, width = 1 + channels;
  const T most = exp_fast(T(a.ceiling));
  const T *const sigma = a.sigma, *const values = a.values;
  const T *const grad_sigma = a.grad_sigma, *const grad_values = a.grad_values;
  T* const __restrict grad = a.grad_out;
  const bool raw = a.raw;
  for (int64_t i = begin; i < end; ++i) {
    grad[width * i] = grad_sigma && !(sigma[i] >= most) ? grad_sigma[i] * sigma[i] : T(0);
    for (int c = 0; c < channels; ++c) {
      const T g = grad_values ? grad_values[channels * i + c] : T(0);
      const T v = values[channels * i + c];
      grad[width * i + 1 + c] = raw ? g : g * (v * (1 - v));
    }
  }
}

}  // namespace

template <class T> void radiance_forward(const RadianceArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n);
  const Blob<T> blob = radiance_blob<T>(a);
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    on_channels(a.channels, [&](auto channels) {
      for (int64_t first = begin; first < stop; first += BLOCK)
        forward_block<decltype(channels)::value>(a, blob, first,
                                                 int(min<int64_t>(BLOCK, stop - first)));
    });
    fill_zero(a.sigma, stop, end);
    fill_zero(a.values, a.channels * stop, a.channels * end);
    if (a.gradient) fill_zero(a.gradient, 3 * stop, 3 * end);
  });
}

template <class T> void radiance_backward(const RadianceArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n), width = 1 + a.channels;
  const T scale = T(a.scale);
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    on_channels(a.channels, [&](auto channels) {
      backward_rows<decltype(channels)::value>(a, begin, stop);
    });
    fill_zero(a.grad_out, width * stop, width * end);
    if (!a.grad_of_x) return;
    for (int64_t i = 3 * begin; i < 3 * stop; ++i)
      a.grad_of_x[i] = a.grad_gradient ? scale * a.grad_gradient[i] : T(0);
    fill_zero(a.grad_of_x, 3 * stop, 3 * end);
  });
}

DF_INSTANTIATE(radiance_forward, RadianceArgs)
DF_INSTANTIATE(radiance_backward, RadianceArgs)

}  // namespace DF_ISA
}  // namespace df
