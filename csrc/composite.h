// Emission-absorption volume rendering of packed samples (Max 1995; NeRF, Mildenhall et al. 2020,
// eq. 3):  alpha_i = 1 - exp(-sigma_i dt_i),  T_i = prod_(j<i) (1 - alpha_j),  w_i = T_i alpha_i;
//   colour = sum w_i rgb_i,  opacity = sum w_i,  depth = sum w_i t_i.
//
// Backward: the loss is sum w_i q_i, with q_i the gradient that reaches w_i. As w_j falls with
// every optical depth s_i = sigma_i dt_i in front of it,
//   d loss / d s_i = T_(i+1) q_i - sum_(j>i) w_j q_j.
// One pass forward leaves T_(i+1) in grad_sigma, one pass back sums behind: samples hidden behind
// others get gradients that are small but right, which 1 - sum w and total - prefix would not give.
//
// Lit compositing shades on the way: rgb is the albedo and 3 channels, what is summed is the colour
// that shade.h makes of it, and normals and the orientation penalty are summed beside it.
#pragma once

#include "common.h"
#include "shade.h"

namespace df {

// What lit compositing needs beside CompositeArgs; of no meaning to the plain one.
template <class T> struct LitArgs {
  const T* gradient;          // (n_samples, 3) of the log density, per scene unit
  const T* rays_o;            // (n_rays, 3)
  const T* rays_d;            // (n_rays, 3) unit vectors
  const T* shading;           // (n_views, 7) light, ambient, diffuse, texture, base
  const T* grad_normal;       // (n_rays, 3) or null; backward only, as the next
  const T* grad_orientation;  // (n_rays,) or null
  T* normal;                  // (n_rays, 3)
  T* orientation;             // (n_rays,)
  T* grad_gradient;           // (n_samples, 3) gradients; backward only
  int64_t rays_per_view;      // rays of a view follow each other
};

template <class T> struct CompositeArgs {
  const T* sigma;          // (n_samples,) density, per unit of dt
  const T* rgb;            // (n_samples, channels)
  const T* t;              // (n_samples,) distances
  const T* dt;             // (n_samples,) lengths
  const int32_t* packed;   // (n_rays, 2) start and count of each ray's samples
  const T* grad_colour;    // (n_rays, channels) or null: zero; backward only, as the next three
  const T* grad_opacity;   // (n_rays,) or null
  const T* grad_depth;     // (n_rays,) or null
  const T* grad_weights;   // (n_samples,) or null
  T* colour;               // (n_rays, channels)
  T* opacity;              // (n_rays,)
  T* depth;                // (n_rays,)
  T* weights;              // (n_samples,) w; read by backward
  T* grad_sigma;           // (n_samples,) gradients; backward only
  T* grad_rgb;             // (n_samples, channels)
  T* grad_t;               // (n_samples,) or null: not wanted
  T* grad_dt;              // (n_samples,) or null
  int64_t n_rays, n_samples;
  int channels;            // 1..8
  double early_stop;       // samples with T below it are left out
  LitArgs<T> lit;
};

inline namespace DF_ISA {

// A ray's rows [begin, end), kept within the arrays whatever packed says.
struct Span { int64_t begin, end; };
DF_HD Span ray_span(const int32_t* packed, int64_t ray, int64_t n_samples) {
  const int64_t begin = clamp<int64_t>(packed[2 * ray], 0, n_samples);
  return {begin, begin + clamp<int64_t>(packed[2 * ray + 1], 0, n_samples - begin)};
}

// alpha = 1 - exp(-s), accurate for small s too, and keep = exp(-s), accurate for large s too.
template <class T> DF_HD void absorb(T s, T& alpha, T& keep) {
  alpha = -std::expm1(-s);
  keep = std::exp(-s);
}

template <class T> DF_HD LitRay<T> lit_ray(const LitArgs<T>& a, int64_t ray) {
  return lit_ray(a.rays_o + 3 * ray, a.rays_d + 3 * ray,
                 a.shading + SHADING * (ray / a.rays_per_view));
}
// grad_colour as CompositeArgs has it.
template <class T>
DF_HD LitRayGrad<T> lit_ray_grad(const LitArgs<T>& a, const T* grad_colour, int64_t ray) {
  LitRayGrad<T> grad = {};
  if (grad_colour) grad.colour = load3(grad_colour + 3 * ray);
  if (a.grad_normal) grad.normal = load3(a.grad_normal + 3 * ray);
  if (a.grad_orientation) grad.orientation = a.grad_orientation[ray];
  return grad;
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(composite_forward, CompositeArgs)
DF_DECLARE(composite_backward, CompositeArgs)
DF_DECLARE(composite_lit_forward, CompositeArgs)
DF_DECLARE(composite_lit_backward, CompositeArgs)
