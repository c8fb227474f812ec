// Compositing on the CPU: rays side by side; exponentials and shading in blocks, in vector registers.
#include "composite.h"

#include <cstring>

namespace df {
namespace DF_ISA {
namespace {

// A chunk takes some 20 microseconds or more: for less, no second thread is woken.
constexpr int64_t GRAIN = 256;         // rays a chunk
constexpr int64_t FILL_GRAIN = 32768;  // rows a chunk
constexpr int BLOCK = 64;              // samples at a time

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
  if (a.lit.grad_gradient) fill_zero(a.lit.grad_gradient, 3 * begin, 3 * end);
}

// Vectors of a block, a component after the other: as vector registers hold them.
template <class T> struct Columns {
  T x[BLOCK], y[BLOCK], z[BLOCK];
  vec3<T> get(int i) const { return {x[i], y[i], z[i]}; }
  void set(int i, vec3<T> v) { x[i] = v.x, y[i] = v.y, z[i] = v.z; }
  void load(const T* rows, int n) {
    for (int i = 0; i < n; ++i) set(i, load3(rows + 3 * i));
  }
  void store(T* rows, int n) const {
    for (int i = 0; i < n; ++i) store3(rows + 3 * i, get(i));
  }
};

// Shades rows [begin, end) and sums what they show, by their weights: colour, normal, orientation.
template <class T>
void shade_ray(const CompositeArgs<T>& a, int64_t ray, int64_t begin, int64_t end) {
  const LitRay<T> lit = lit_ray(a.lit, ray);
  Columns<T> g, albedo, colours, normals;
  T orientations[BLOCK];
  LitSample<T> sum = {};
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int n = int(min<int64_t>(BLOCK, end - first));
    const T *const t = a.t + first, *const w = a.weights + first;
    g.load(a.lit.gradient + 3 * first, n);
    albedo.load(a.rgb + 3 * first, n);
    for (int i = 0; i < n; ++i) {
      const LitSample<T> s = lit_sample(lit, g.get(i), albedo.get(i), t[i]);
      colours.set(i, s.colour);
      normals.set(i, s.normal);
      orientations[i] = s.orientation;
    }
    for (int i = 0; i < n; ++i) {
      sum.colour = sum.colour + w[i] * colours.get(i);
      sum.normal = sum.normal + w[i] * normals.get(i);
      sum.orientation += w[i] * orientations[i];
    }
  }
  store3(a.colour + 3 * ray, sum.colour);
  store3(a.lit.normal + 3 * ray, sum.normal);
  a.lit.orientation[ray] = sum.orientation;
}

template <int C, bool LIT, class T> void composite_ray(const CompositeArgs<T>& a, int64_t ray) {
  T colour[C] = {}, opacity = 0, depth = 0;
  const Span span = ray_span(a.packed, ray, a.n_samples);
  const int64_t stop = for_samples(a, span, [&](int64_t i, T transmittance, T alpha, T) {
    const T w = transmittance * alpha;
    a.weights[i] = w;
    opacity += w;
    depth += w * a.t[i];
    if constexpr (!LIT)
      for (int c = 0; c < C; ++c) colour[c] += w * a.rgb[C * i + c];
  });
  fill_zero(a.weights, stop, span.end);
  if constexpr (LIT) shade_ray(a, ray, span.begin, stop);
  else for (int c = 0; c < C; ++c) a.colour[C * ray + c] = colour[c];
  a.opacity[ray] = opacity;
  a.depth[ray] = depth;
}

// The gradients of sample i but its colour's, from T_(i+1) in grad_sigma, from q, which reaches its
// weight, and from the sum of w q behind it, which grows.
template <class T>
inline void sample_backward(const CompositeArgs<T>& a, int64_t i, T w, T q, T grad_depth,
                            T& behind) {
  const T grad_s = a.grad_sigma[i] * q - behind;
  behind += w * q;
  a.grad_sigma[i] = grad_s * a.dt[i];
  if (a.grad_t) a.grad_t[i] = w * grad_depth;
  if (a.grad_dt) a.grad_dt[i] = grad_s * a.sigma[i];
}

// Leaves T_(i+1) in grad_sigma, and zeros behind the early stop, whose row it returns.
template <class T> int64_t start_backward(const CompositeArgs<T>& a, Span span) {
  const int64_t stop =
      for_samples(a, span, [&](int64_t i, T, T, T next) { a.grad_sigma[i] = next; });
  zero_grads(a, stop, span.end);
  return stop;
}

// The gradients of n samples' albedo and gradient; q: what reaches their weights through these.
template <class T>
void shade_block_backward(const CompositeArgs<T>& a, const LitRay<T>& lit,
                          const LitRayGrad<T>& grad, int64_t first, int n, T* q) {
  const T *const t = a.t + first, *const w = a.weights + first;
  Columns<T> g, albedo;
  g.load(a.lit.gradient + 3 * first, n);
  albedo.load(a.rgb + 3 * first, n);
  for (int i = 0; i < n; ++i) {
    const LitSampleGrad<T> s =
        lit_sample_backward(lit, grad, g.get(i), albedo.get(i), t[i], w[i]);
    q[i] = s.weight;
    g.set(i, s.gradient);
    albedo.set(i, s.albedo * grad.colour);
  }
  g.store(a.lit.grad_gradient + 3 * first, n);
  albedo.store(a.grad_rgb + 3 * first, n);
}

// The same of n samples' colours, unlit.
template <int C, class T>
void colour_block_backward(const CompositeArgs<T>& a, const T* grad_colour, int64_t first, int n,
                           T* __restrict q) {
  const T *const w = a.weights + first, *const rgb = a.rgb + C * first;
  T* const __restrict grad_rgb = a.grad_rgb + C * first;
  for (int i = 0; i < n; ++i) {
    q[i] = 0;
    for (int c = 0; c < C; ++c) q[i] += grad_colour[c] * rgb[C * i + c];
    for (int c = 0; c < C; ++c) grad_rgb[C * i + c] = w[i] * grad_colour[c];
  }
}

template <int C, bool LIT, class T>
void composite_ray_backward(const CompositeArgs<T>& a, int64_t ray) {
  const Span span = ray_span(a.packed, ray, a.n_samples);
  const int64_t stop = start_backward(a, span);
  T grad_colour[C] = {};
  if (a.grad_colour) std::memcpy(grad_colour, a.grad_colour + C * ray, sizeof grad_colour);
  const T grad_opacity = a.grad_opacity ? a.grad_opacity[ray] : T(0);
  const T grad_depth = a.grad_depth ? a.grad_depth[ray] : T(0);
  T q[BLOCK], behind = 0;
  for (int64_t end = stop; end > span.begin;) {
    const int n = int(min<int64_t>(BLOCK, end - span.begin));
    const int64_t first = end - n;
    if constexpr (LIT)
      shade_block_backward(a, lit_ray(a.lit, ray), lit_ray_grad(a.lit, a.grad_colour, ray), first,
                           n, q);
    else colour_block_backward<C>(a, grad_colour, first, n, q);
    for (int64_t i = end - 1; i >= first; --i) {
      T sum = grad_opacity + grad_depth * a.t[i] + q[i - first];
      if (a.grad_weights) sum += a.grad_weights[i];
      sample_backward(a, i, a.weights[i], sum, grad_depth, behind);
    }
    end = first;
  }
}

template <class T, class F> void for_rays(const CompositeArgs<T>& a, const F& f) {
  parallel_for(a.n_rays, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t ray = begin; ray < end; ++ray) f(ray);
  });
}

// Calls f(begin, end) for the rows that may belong to no ray, in chunks.
template <class T, class F> void for_other_rows(const CompositeArgs<T>& a, const F& f) {
  const int64_t covered = rows_without_gaps(a);
  parallel_for(a.n_samples - covered, FILL_GRAIN,
               [&](int64_t begin, int64_t end) { f(covered + begin, covered + end); });
}
template <class T> void zero_other_weights(const CompositeArgs<T>& a) {
  for_other_rows(a, [&](int64_t begin, int64_t end) { fill_zero(a.weights, begin, end); });
}
template <class T> void zero_other_grads(const CompositeArgs<T>& a) {
  for_other_rows(a, [&](int64_t begin, int64_t end) { zero_grads(a, begin, end); });
}

}  // namespace

template <class T> void composite_forward(const CompositeArgs<T>& a, Stream) {
  zero_other_weights(a);
  on_channels(a.channels, [&](auto channels) {
    constexpr int C = decltype(channels)::value;
    for_rays(a, [&](int64_t ray) { composite_ray<C, false>(a, ray); });
  });
}

template <class T> void composite_backward(const CompositeArgs<T>& a, Stream) {
  zero_other_grads(a);
  on_channels(a.channels, [&](auto channels) {
    constexpr int C = decltype(channels)::value;
    for_rays(a, [&](int64_t ray) { composite_ray_backward<C, false>(a, ray); });
  });
}

template <class T> void composite_lit_forward(const CompositeArgs<T>& a, Stream) {
  zero_other_weights(a);
  for_rays(a, [&](int64_t ray) { composite_ray<3, true>(a, ray); });
}

template <class T> void composite_lit_backward(const CompositeArgs<T>& a, Stream) {
  zero_other_grads(a);
  for_rays(a, [&](int64_t ray) { composite_ray_backward<3, true>(a, ray); });
}

DF_INSTANTIATE(composite_forward, CompositeArgs)
DF_INSTANTIATE(composite_backward, CompositeArgs)
DF_INSTANTIATE(composite_lit_forward, CompositeArgs)
DF_INSTANTIATE(composite_lit_backward, CompositeArgs)

}  // namespace DF_ISA
}  // namespace df
