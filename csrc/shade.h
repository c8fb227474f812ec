// Shading of a sample (DreamFusion, Poole et al. 2022, section 3.1). With g the gradient of its log
// density, p its position and rho its albedo, lit by a view's light: position l, ambient a, diffuse
// d, texture k, base b,
//   n = -g / sqrt(|g|^2 + EPS^2),  light = a + d max(0, n . (l - p) / |l - p|),
//   colour = (k rho + b) light.
// k = 1, b = 0 shows the albedo; k = 0, b = 1 is white, textureless. Of the ray's direction v,
//   orientation = max(0, n . v)^2 (Ref-NeRF, Verbin et al. 2022, eq. 11).
#pragma once

#include "common.h"

namespace df {
inline namespace DF_ISA {

constexpr int SHADING = 7;           // numbers a view: l, a, d, k, b
constexpr double NORMAL_EPS = 1e-3;  // per scene unit: a far smaller |g| is no surface, and n is 0

template <class T> struct LitRay {
  vec3<T> origin, direction, light;
  T ambient, diffuse, texture, base;
};
template <class T>
DF_HD LitRay<T> lit_ray(const T* origin, const T* direction, const T* shading) {
  return {load3(origin), load3(direction), load3(shading),
          shading[3], shading[4], shading[5], shading[6]};
}

template <class T> DF_HD T inverse_sqrt(T x) {
#if defined(__CUDA_ARCH__)
  return ::rsqrt(x);
#else
  return 1 / std::sqrt(x);
#endif
}

// max(0, x); NaN stays NaN.
template <class T> DF_HD T relu(T x) { return x <= 0 ? T(0) : x; }

template <class T> struct Surface {
  vec3<T> normal;    // n
  vec3<T> to_light;  // unit; 0 at the light itself
  T scale;           // 1 / sqrt(|g|^2 + EPS^2)
  T facing;          // n . to_light
};
template <class T> DF_HD Surface<T> surface_of(const LitRay<T>& ray, vec3<T> g, T t) {
  const T scale = inverse_sqrt(dot(g, g) + T(NORMAL_EPS * NORMAL_EPS));
  const vec3<T> normal = -scale * g;
  const vec3<T> way = ray.light - (ray.origin + t * ray.direction);
  const T squared = dot(way, way);
  const vec3<T> to_light = (squared == 0 ? T(0) : inverse_sqrt(squared)) * way;
  return {normal, to_light, scale, dot(normal, to_light)};
}

template <class T> struct LitSample { vec3<T> colour, normal; T orientation; };
template <class T>
DF_HD LitSample<T> lit_sample(const LitRay<T>& ray, vec3<T> g, vec3<T> albedo, T t) {
  const Surface<T> s = surface_of(ray, g, t);
  const T light = ray.ambient + ray.diffuse * relu(s.facing);
  const T against = relu(dot(s.normal, ray.direction));
  const T k = ray.texture, b = ray.base;
  return {light * vec3<T>{k * albedo.x + b, k * albedo.y + b, k * albedo.z + b}, s.normal,
          against * against};
}

// The gradients that reach a ray, and what of them reaches a sample of weight w.
template <class T> struct LitRayGrad { vec3<T> colour, normal; T orientation; };
template <class T> struct LitSampleGrad {
  T weight;          // of w, through colour and normal; orientation keeps w constant
  T albedo;          // of the albedo, as a multiple of the gradient of the ray's colour
  vec3<T> gradient;  // of g
};
template <class T>
DF_HD LitSampleGrad<T> lit_sample_backward(const LitRay<T>& ray, const LitRayGrad<T>& grad,
                                           vec3<T> g, vec3<T> albedo, T t, T w) {
  const Surface<T> s = surface_of(ray, g, t);
  const T light = ray.ambient + ray.diffuse * relu(s.facing);
  const vec3<T> c = grad.colour;
  const T grad_light = ray.texture * dot(c, albedo) + ray.base * (c.x + c.y + c.z);
  const T grad_facing = s.facing <= 0 ? T(0) : ray.diffuse * grad_light;
  const T grad_against = 2 * grad.orientation * relu(dot(s.normal, ray.direction));
  const vec3<T> grad_n =
      w * (grad.normal + grad_facing * s.to_light + grad_against * ray.direction);
  return {grad_light * light + dot(grad.normal, s.normal), w * ray.texture * light,
          -s.scale * (grad_n - dot(s.normal, grad_n) * s.normal)};
}

}  // inline namespace DF_ISA
}  // namespace df
