// Compositing on the GPU: a warp a ray, a lane a sample, 32 samples at a time. Transmittances come
// from an inclusive product scan over the lanes, times what all chunks in front let through.
//
// Backward goes over a ray twice, as composite.h explains: forward, leaving T_(i+1) in grad_sigma,
// and back, with a sum scan from behind. No lane reads what another has written, so nothing waits.
//
// Lit compositing (LIT) shades a sample where it is weighed: the same kernels, three channels.
//
// Results a sample are zeroed first and then written by the rays, up to their early stop: rays lie
// in any order and may leave gaps, so only the rays together know which rows belong to none.
#include "composite.h"
#include "gpu.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 128;

// x_0 x_1 .. x_lane.
template <class T> __device__ inline T product_up_to(T x) {
#pragma unroll
  for (int offset = 1; offset < WARP; offset *= 2) {
    const T other = __shfl_up_sync(FULL_WARP, x, offset);
    if (lane_id() >= offset) x *= other;
  }
  return x;
}

// x_lane + .. + x_31.
template <class T> __device__ inline T sum_from(T x) {
#pragma unroll
  for (int offset = 1; offset < WARP; offset *= 2) {
    const T other = __shfl_down_sync(FULL_WARP, x, offset);
    if (lane_id() + offset < WARP) x += other;
  }
  return x;
}

// Calls f(row, T_i, alpha_i, T_(i+1)) for a ray's samples up to the early stop, each in its lane;
// returns the row where it stopped, in every lane. Forward and backward both come here: they round
// alike and stop at the same sample.
template <class T, class F>
__device__ inline int64_t for_samples(const CompositeArgs<T>& a, Span ray, const F& f) {
  const T early_stop = T(a.early_stop);
  T in_front = 1;  // what the chunks so far let through
  for (int64_t first = ray.begin; first < ray.end; first += WARP) {
    if (in_front < early_stop) return first;
    const int64_t row = first + lane_id();
    T alpha = 0, keep = 1;
    if (row < ray.end) absorb(a.sigma[row] * a.dt[row], alpha, keep);
    const T next = in_front * product_up_to(keep);
    T transmittance = __shfl_up_sync(FULL_WARP, next, 1);
    if (lane_id() == 0) transmittance = in_front;
    // The first sample in the dark ends the ray, whatever comes behind it.
    const unsigned dark = __ballot_sync(FULL_WARP, row < ray.end && transmittance < early_stop);
    const int lit = dark ? __ffs(int(dark)) - 1 : WARP;
    if (row < ray.end && lane_id() < lit) f(row, transmittance, alpha, next);
    if (dark) return first + lit;
    in_front = __shfl_sync(FULL_WARP, next, WARP - 1);
  }
  return ray.end;
}

// What a ray sums for each sample: its colour; LIT: and its normal and orientation.
template <int C, bool LIT> constexpr int VALUES = LIT ? C + 4 : C;
template <int C, bool LIT, class T>
__device__ inline void load_values(const CompositeArgs<T>& a, const LitRay<T>& lit, int64_t row,
                                   T (&values)[VALUES<C, LIT>]) {
  if constexpr (LIT) {
    const LitSample<T> s =
        lit_sample(lit, load3(a.lit.gradient + 3 * row), load3(a.rgb + 3 * row), a.t[row]);
    store3(values, s.colour);
    store3(values + 3, s.normal);
    values[6] = s.orientation;
  } else {
#pragma unroll
    for (int c = 0; c < C; ++c) values[c] = a.rgb[C * row + c];
  }
}

template <int C, bool LIT, class T>
__global__ void __launch_bounds__(THREADS) composite_forward_kernel(CompositeArgs<T> a) {
  const int64_t ray = global_thread() / WARP;
  if (ray >= a.n_rays) return;  // a whole warp
  constexpr int N = VALUES<C, LIT>;
  const LitRay<T> lit = LIT ? lit_ray(a.lit, ray) : LitRay<T>{};
  T sums[N] = {}, opacity = 0, depth = 0;
  for_samples(a, ray_span(a.packed, ray, a.n_samples), [&](int64_t row, T light, T alpha, T) {
    const T w = light * alpha;
    a.weights[row] = w;
    opacity += w;
    depth += w * a.t[row];
    T values[N];
    load_values<C, LIT>(a, lit, row, values);
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] += w * values[i];
  });
  opacity = warp_sum(opacity);
  depth = warp_sum(depth);
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = warp_sum(sums[i]);
  if (lane_id() != 0) return;
  a.opacity[ray] = opacity;
  a.depth[ray] = depth;
#pragma unroll
  for (int c = 0; c < C; ++c) a.colour[C * ray + c] = sums[c];
  if constexpr (LIT) {
    store3(a.lit.normal + 3 * ray, load3(sums + 3));
    a.lit.orientation[ray] = sums[6];
  }
}

// The gradients that reach a ray. Of its colour twice: by channel, and as the lane needs them to
// store grad_rgb, whose numbers lane + 32 k of a chunk are of channel (lane + 32 k) % C.
template <int C, class T> struct RayGrad { T colour[C], by_number[C], opacity, depth; };

template <int C, class T>
__device__ inline RayGrad<C, T> load_grad(const CompositeArgs<T>& a, int64_t ray) {
  RayGrad<C, T> grad = {};
  if (a.grad_opacity) grad.opacity = a.grad_opacity[ray];
  if (a.grad_depth) grad.depth = a.grad_depth[ray];
  if (a.grad_colour) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      grad.colour[c] = a.grad_colour[C * ray + c];
      grad.by_number[c] = a.grad_colour[C * ray + (lane_id() + WARP * c) % C];
    }
  }
  return grad;
}

// q: the gradient that reaches the weight of a sample; LIT: but for what shading knows.
template <int C, bool LIT, class T>
__device__ inline T grad_of_weight(const CompositeArgs<T>& a, const RayGrad<C, T>& grad,
                                   int64_t row) {
  T q = grad.opacity;
  if (a.grad_depth) q += grad.depth * a.t[row];
  if (a.grad_weights) q += a.grad_weights[row];
  if (!LIT && a.grad_colour) {
#pragma unroll
    for (int c = 0; c < C; ++c) q += grad.colour[c] * a.rgb[C * row + c];
  }
  return q;
}

// Rows [first, stop) of grad_rgb, at most 32, from the weights of the lanes. A lane stores every
// 32nd number, not its row: whole lines a store instead of C stores to parts of them.
// LIT: w is what the weight becomes on the way to the albedo.
template <int C, class T>
__device__ inline void store_grad_rgb(const CompositeArgs<T>& a, const RayGrad<C, T>& grad,
                                      int64_t first, int64_t stop, T w) {
#pragma unroll
  for (int k = 0; k < C; ++k) {
    const int number = lane_id() + WARP * k;
    const T weight = __shfl_sync(FULL_WARP, w, number / C);
    if (first + number / C < stop) a.grad_rgb[C * first + number] = weight * grad.by_number[k];
  }
}

// Rows [first, stop) of a (rows, 3) array, at most 32, from the vectors of the lanes; likewise.
template <class T>
__device__ inline void store_rows3(T* p, int64_t first, int64_t stop, vec3<T> v) {
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int number = lane_id() + WARP * k, source = number / 3, component = number % 3;
    const T x = __shfl_sync(FULL_WARP, v.x, source), y = __shfl_sync(FULL_WARP, v.y, source),
            z = __shfl_sync(FULL_WARP, v.z, source);
    if (first + source < stop)
      p[3 * first + number] = component == 0 ? x : component == 1 ? y : z;
  }
}

// (The 1: left to itself, ptxas spills on sm_120 to fit more blocks.)
template <int C, bool LIT, class T>
__global__ void __launch_bounds__(THREADS, 1) composite_backward_kernel(CompositeArgs<T> a) {
  const int64_t ray = global_thread() / WARP;
  if (ray >= a.n_rays) return;  // a whole warp
  const Span span = ray_span(a.packed, ray, a.n_samples);
  const int64_t stop =
      for_samples(a, span, [&](int64_t row, T, T, T next) { a.grad_sigma[row] = next; });
  const RayGrad<C, T> grad = load_grad<C>(a, ray);
  const LitRay<T> lit = LIT ? lit_ray(a.lit, ray) : LitRay<T>{};
  const LitRayGrad<T> lit_grad =
      LIT ? lit_ray_grad(a.lit, a.grad_colour, ray) : LitRayGrad<T>{};
  T behind = 0;  // sum of w q over the chunks so far
  const int64_t chunks = (stop - span.begin + WARP - 1) / WARP;
  for (int64_t first = span.begin + WARP * (chunks - 1); first >= span.begin; first -= WARP) {
    const int64_t row = first + lane_id();
    T w = 0, q = 0;
    LitSampleGrad<T> shaded = {};
    if (row < stop) {
      w = a.weights[row];
      q = grad_of_weight<C, LIT>(a, grad, row);
      if constexpr (LIT) {
        shaded = lit_sample_backward(lit, lit_grad, load3(a.lit.gradient + 3 * row),
                                     load3(a.rgb + 3 * row), a.t[row], w);
        q += shaded.weight;
      }
    }
    const T sum = sum_from(w * q);
    T later = __shfl_down_sync(FULL_WARP, sum, 1);
    if (lane_id() == WARP - 1) later = 0;
    if (row < stop) {
      const T grad_s = a.grad_sigma[row] * q - (behind + later);
      a.grad_sigma[row] = grad_s * a.dt[row];
      if (a.grad_t) a.grad_t[row] = w * grad.depth;
      if (a.grad_dt) a.grad_dt[row] = grad_s * a.sigma[row];
    }
    if (a.grad_colour) store_grad_rgb(a, grad, first, stop, LIT ? shaded.albedo : w);
    if constexpr (LIT) store_rows3(a.lit.grad_gradient, first, stop, shaded.gradient);
    behind += __shfl_sync(FULL_WARP, sum, 0);
  }
}

// Calls f(std::integral_constant<int, channels>) so that the number is a constant inside.
template <int CHANNELS = 8, class F> void on_channels(int channels, const F& f) {
  if (channels == CHANNELS) return f(std::integral_constant<int, CHANNELS>());
  if constexpr (CHANNELS > 1) on_channels<CHANNELS - 1>(channels, f);
}

template <class T> void zero_grads(const CompositeArgs<T>& a, Stream stream) {
  const size_t bytes = sizeof(T) * a.n_samples;
  device_zero(a.grad_sigma, bytes, stream);
  device_zero(a.grad_rgb, a.channels * bytes, stream);
  if (a.grad_t) device_zero(a.grad_t, bytes, stream);
  if (a.grad_dt) device_zero(a.grad_dt, bytes, stream);
  if (a.lit.grad_gradient) device_zero(a.lit.grad_gradient, 3 * bytes, stream);
}

template <class T>
void launch_rays(const char* name, void (*kernel)(CompositeArgs<T>), const CompositeArgs<T>& a,
                 Stream stream) {
  launch(name, kernel, blocks_for(WARP * a.n_rays, THREADS), THREADS, 0, stream, a);
}

}  // namespace

template <class T> void composite_forward(const CompositeArgs<T>& a, Stream stream) {
  device_zero(a.weights, sizeof(T) * a.n_samples, stream);
  on_channels(a.channels, [&](auto channels) {
    constexpr int C = decltype(channels)::value;
    launch_rays("composite_forward_kernel", composite_forward_kernel<C, false, T>, a, stream);
  });
}

template <class T> void composite_backward(const CompositeArgs<T>& a, Stream stream) {
  zero_grads(a, stream);
  on_channels(a.channels, [&](auto channels) {
    constexpr int C = decltype(channels)::value;
    launch_rays("composite_backward_kernel", composite_backward_kernel<C, false, T>, a, stream);
  });
}

template <class T> void composite_lit_forward(const CompositeArgs<T>& a, Stream stream) {
  device_zero(a.weights, sizeof(T) * a.n_samples, stream);
  launch_rays("composite_forward_kernel", composite_forward_kernel<3, true, T>, a, stream);
}

template <class T> void composite_lit_backward(const CompositeArgs<T>& a, Stream stream) {
  zero_grads(a, stream);
  launch_rays("composite_backward_kernel", composite_backward_kernel<3, true, T>, a, stream);
}

DF_INSTANTIATE(composite_forward, CompositeArgs)
DF_INSTANTIATE(composite_backward, CompositeArgs)
DF_INSTANTIATE(composite_lit_forward, CompositeArgs)
DF_INSTANTIATE(composite_lit_backward, CompositeArgs)

}  // namespace DF_ISA
}  // namespace df
