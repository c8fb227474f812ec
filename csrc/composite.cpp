// Compositing on the CPU: rays side by side; exponentials in blocks, in vector registers.
#include "composite.h"

#include <cstring>

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 128;        // rays a chunk
constexpr int64_t FILL_GRAIN = 8192;  // rows a chunk
constexpr int BLOCK = 64;             // samples at a time

// Calls f(std::integral_constant<int, channels>) so that the number is a constant inside.
template <int CHANNELS = 8, class F> void on_channels(int channels, const F& f) {
  if (channels == CHANNELS) return f(std::integral_constant<int, CHANNELS>());
  if constexpr (CHANNELS > 1) on_channels<CHANNELS - 1>(channels, f);
}

// absorb() without branches; alpha loses no digits where s is small.
inline void absorb_fast(float s, float& alpha, float& keep) {
  const ExpParts e = exp_parts(clamp(-s, -87.0f, 88.0f));
  keep = s > 87.0f ? 0.0f : e.scale + e.scale * e.rest;
  alpha = (1.0f - e.scale) - e.scale * e.rest;
}
inline void absorb_fast(double s, double& alpha, double& keep) { absorb(s, alpha, keep); }

// Not inlined: forward and backward then round alike, and stop early at the same sample.
template <class T>
__attribute__((noinline)) void absorb_block(const T* sigma, const T* dt, int n, T* alpha, T* keep) {
  for (int i = 0; i < n; ++i) absorb_fast(sigma[i] * dt[i], alpha[i], keep[i]);
}

// Calls f(row, T_i, alpha_i, T_(i+1)) for a ray's samples in order, up to the early stop; returns
// the row where it stopped.
template <class T, class F> int64_t for_samples(const CompositeArgs<T>& a, Span ray, const F& f) {
  const T early_stop = T(a.early_stop);
  T alpha[BLOCK], keep[BLOCK], transmittance = 1;
  for (int64_t first = ray.begin; first < ray.end; first += BLOCK) {
    const int n = int(min<int64_t>(BLOCK, ray.end - first));
    absorb_block(a.sigma + first, a.dt + first, n, alpha, keep);
    for (int i = 0; i < n; ++i) {
      if (transmittance < early_stop) return first + i;
      const T next = transmittance * keep[i];
      f(first + i, transmittance, alpha[i], next);
      transmittance = next;
    }
  }
  return ray.end;
}

// Rows [0, r) where the rays, in order, leave no gaps; the rest of the rows may belong to no ray.
template <class T> int64_t rows_without_gaps(const CompositeArgs<T>& a) {
  int64_t row = 0;
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    const Span s = ray_span(a.packed, ray, a.n_samples);
    if (s.begin == s.end) continue;
    if (s.begin != row) return row;
    row = s.end;
  }
  return row;
}

// Zeroes rows [begin, end) of the backward's results.
template <class T> void zero_grads(const CompositeArgs<T>& a, int64_t begin, int64_t end) {
  fill_zero(a.grad_sigma, begin, end);
  fill_zero(a.grad_rgb, a.channels * begin, a.channels * end);
  if (a.grad_t) fill_zero(a.grad_t, begin, end);
  if (a.grad_dt) fill_zero(a.grad_dt, begin, end);
}

template <int C, class T> void composite_ray(const CompositeArgs<T>& a, int64_t ray) {
  T colour[C] = {}, opacity = 0, depth = 0;
  const Span span = ray_span(a.packed, ray, a.n_samples);
  const int64_t stop = for_samples(a, span, [&](int64_t i, T transmittance, T alpha, T) {
    const T w = transmittance * alpha;
    a.weights[i] = w;
    opacity += w;
    depth += w * a.t[i];
    for (int c = 0; c < C; ++c) colour[c] += w * a.rgb[C * i + c];
  });
  fill_zero(a.weights, stop, span.end);
  for (int c = 0; c < C; ++c) a.colour[C * ray + c] = colour[c];
  a.opacity[ray] = opacity;
  a.depth[ray] = depth;
}

template <int C, class T> void composite_ray_backward(const CompositeArgs<T>& a, int64_t ray) {
  const Span span = ray_span(a.packed, ray, a.n_samples);
  const int64_t stop =
      for_samples(a, span, [&](int64_t i, T, T, T next) { a.grad_sigma[i] = next; });
  zero_grads(a, stop, span.end);
  T grad_colour[C] = {};
  if (a.grad_colour) std::memcpy(grad_colour, a.grad_colour + C * ray, sizeof grad_colour);
  const T grad_opacity = a.grad_opacity ? a.grad_opacity[ray] : T(0);
  const T grad_depth = a.grad_depth ? a.grad_depth[ray] : T(0);
  T behind = 0;
  for (int64_t i = stop - 1; i >= span.begin; --i) {
    const T w = a.weights[i];
    T q = grad_opacity + grad_depth * a.t[i];
    if (a.grad_weights) q += a.grad_weights[i];
    for (int c = 0; c < C; ++c) q += grad_colour[c] * a.rgb[C * i + c];
    const T grad_s = a.grad_sigma[i] * q - behind;
    behind += w * q;
    a.grad_sigma[i] = grad_s * a.dt[i];
    for (int c = 0; c < C; ++c) a.grad_rgb[C * i + c] = w * grad_colour[c];
    if (a.grad_t) a.grad_t[i] = w * grad_depth;
    if (a.grad_dt) a.grad_dt[i] = grad_s * a.sigma[i];
  }
}

}  // namespace

template <class T> void composite_forward(const CompositeArgs<T>& a, Stream) {
  const int64_t covered = rows_without_gaps(a);
  parallel_for(a.n_samples - covered, FILL_GRAIN, [&](int64_t begin, int64_t end) {
    fill_zero(a.weights, covered + begin, covered + end);
  });
  on_channels(a.channels, [&](auto channels) {
    parallel_for(a.n_rays, GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t ray = begin; ray < end; ++ray) composite_ray<decltype(channels)::value>(a, ray);
    });
  });
}

template <class T> void composite_backward(const CompositeArgs<T>& a, Stream) {
  const int64_t covered = rows_without_gaps(a);
  parallel_for(a.n_samples - covered, FILL_GRAIN, [&](int64_t begin, int64_t end) {
    zero_grads(a, covered + begin, covered + end);
  });
  on_channels(a.channels, [&](auto channels) {
    parallel_for(a.n_rays, GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t ray = begin; ray < end; ++ray)
        composite_ray_backward<decltype(channels)::value>(a, ray);
    });
  });
}

DF_INSTANTIATE(composite_forward, CompositeArgs)
DF_INSTANTIATE(composite_backward, CompositeArgs)

}  // namespace DF_ISA
}  // namespace df
