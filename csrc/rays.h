// Pinhole rays, and where a ray meets a sphere at the origin or the cube [-bound, bound]^3.
#pragma once

#include "common.h"

namespace df {

template <class T> struct GenerateRaysArgs {
  const T* c2w;        // (b, 3, 4) camera to world, columns right, up, back, position
  const T* focal;      // (b,) focal length, pixels
  const T* grad_o;     // (b, height, width, 3) gradient of rays_o; backward only
  const T* grad_d;     // (b, height, width, 3) gradient of rays_d; backward only
  T* rays_o;           // (b, height, width, 3) origins
  T* rays_d;           // (b, height, width, 3) unit directions
  T* partial;          // (b * height, 13) scratch: gradients of c2w and focal by row; backward only
  T* grad_c2w;         // (b, 3, 4) gradient of c2w; backward only
  T* grad_focal;       // (b,) gradient of focal; backward only
  int64_t b, height, width;
};

template <class T> struct RayIntersectArgs {
  const T* rays_o;     // (n, 3) origins
  const T* rays_d;     // (n, 3) directions, any length but 0; distances are in units of it
  const T* grad_near;  // (n,) gradient of near; backward only
  const T* grad_far;   // (n,) gradient of far; backward only
  T* near;             // (n,) entry, at least min_distance
  T* far;              // (n,) exit; a miss has near = far = 0
  T* grad_o;           // (n, 3) gradient of rays_o; backward only
  T* grad_d;           // (n, 3) gradient of rays_d; backward only
  int64_t n;
  double size;         // the sphere's radius, or the cube's bound
  double min_distance;
};

inline namespace DF_ISA {

// ---- pinhole camera -----------------------------------------------------------------------------
template <class T> struct Camera { vec3<T> right, up, back, position; T inv_focal; };
template <class T> DF_HD Camera<T> load_camera(const T* m, T focal) {
  return {{m[0], m[4], m[8]}, {m[1], m[5], m[9]}, {m[2], m[6], m[10]}, {m[3], m[7], m[11]},
          1 / focal};
}

// The pixel in row i, column j, seen from the centre of the image: x to the right, y up.
template <class T> DF_HD T pixel_x(int64_t j, int64_t width) {
  return T(j) + T(0.5) - T(0.5) * T(width);
}
template <class T> DF_HD T pixel_y(int64_t i, int64_t height) {
  return T(0.5) * T(height) - T(0.5) - T(i);
}

template <class T> DF_HD vec3<T> pixel_direction(const Camera<T>& c, T x, T y) {  // not normalised
  return (x * c.inv_focal) * c.right + (y * c.inv_focal) * c.up - c.back;
}
// Adds a pixel's gradients of (c2w, focal) to g[13], given those of its origin and direction.
template <class T>
DF_HD void pixel_backward(const Camera<T>& c, T x, T y, vec3<T> grad_o, vec3<T> grad_d, T* g) {
  const vec3<T> w = pixel_direction(c, x, y);
  const T inv_length = 1 / std::sqrt(dot(w, w));
  const vec3<T> d = inv_length * w;
  const vec3<T> gw = inv_length * (grad_d - dot(d, grad_d) * d);
  const T u = x * c.inv_focal, v = y * c.inv_focal;
  g[0] += u * gw.x, g[1] += v * gw.x, g[2] -= gw.x, g[3] += grad_o.x;
  g[4] += u * gw.y, g[5] += v * gw.y, g[6] -= gw.y, g[7] += grad_o.y;
  g[8] += u * gw.z, g[9] += v * gw.z, g[10] -= gw.z, g[11] += grad_o.z;
  g[12] -= c.inv_focal * dot(gw, u * c.right + v * c.up);
}

// ---- intersections ------------------------------------------------------------------------------
template <class T> struct Interval { T near, far; };

// 0 for a proper ray; NaN where a component is not finite or the direction has no length.
template <class T> DF_HD T poison(vec3<T> o, vec3<T> d) {
  return T(0) * (o.x + o.y + o.z + d.x + d.y + d.z) + T(0) / dot(d, d);
}
template <class T> DF_HD bool is_miss(Interval<T> i, T min_distance) {  // false for NaN
  return i.far <= i.near || i.far <= min_distance;
}

// Without limits: near >= far is a miss. From the point closest to the centre, which is accurate
// even for an origin far away.
template <class T> DF_HD Interval<T> sphere_interval(vec3<T> o, vec3<T> d, T radius) {
  const T dd = dot(d, d), middle = -dot(o, d) / dd;
  const vec3<T> closest = o + middle * d;
  const T gap = radius * radius - dot(closest, closest);
  const T half = gap > 0 ? std::sqrt(gap / dd) : T(0);
  return {middle - half, middle + half + poison(o, d)};
}

// The slab method. Where a component of d is zero the slab holds all of the ray or none of it.
// near_axis and far_axis: whose planes the ray enters and leaves by.
template <class T>
DF_HD Interval<T> box_interval(vec3<T> o, vec3<T> d, T bound, int& near_axis, int& far_axis) {
  const T os[3] = {o.x, o.y, o.z}, ds[3] = {d.x, d.y, d.z};
  Interval<T> hit{-INFINITY, INFINITY};
  near_axis = far_axis = 0;
  for (int k = 0; k < 3; ++k) {
    if (ds[k] == 0) {
      if (std::fabs(os[k]) > bound) hit.far = -INFINITY;
      continue;
    }
    const T a = (-bound - os[k]) / ds[k], b = (bound - os[k]) / ds[k];
    const T low = min(a, b), high = max(a, b);
    if (low > hit.near) hit.near = low, near_axis = k;
    if (high < hit.far) hit.far = high, far_axis = k;
  }
  hit.far += poison(o, d);
  return hit;
}

// near at least min_distance; a miss becomes 0, 0; NaN stays NaN.
template <class T> DF_HD Interval<T> limit_interval(Interval<T> i, T min_distance) {
  if (is_miss(i, min_distance)) return {T(0), T(0)};
  return i.far != i.far ? Interval<T>{i.far, i.far} : Interval<T>{max(i.near, min_distance), i.far};
}

// |o + t d|^2 = radius^2 differentiated: dt = -p . (do + t dd) / (p . d) at the point p = o + t d.
template <class T>
DF_HD void sphere_backward(vec3<T> o, vec3<T> d, T radius, T min_distance, T grad_near, T grad_far,
                           vec3<T>& grad_o, vec3<T>& grad_d) {
  grad_o = grad_d = {T(0), T(0), T(0)};
  const Interval<T> hit = sphere_interval(o, d, radius);
  if (is_miss(hit, min_distance)) return;
  const vec3<T> q = o + hit.far * d;
  grad_o = (-grad_far / dot(q, d)) * q;
  grad_d = hit.far * grad_o;
  if (hit.near < min_distance) return;
  const vec3<T> p = o + hit.near * d;
  const vec3<T> g = (-grad_near / dot(p, d)) * p;
  grad_o = grad_o + g;
  grad_d = grad_d + hit.near * g;
}

// o_k + t d_k = +-bound differentiated: dt = -(do_k + t dd_k) / d_k on the axis k that is hit.
template <class T>
DF_HD void box_backward(vec3<T> o, vec3<T> d, T bound, T min_distance, T grad_near, T grad_far,
                        vec3<T>& grad_o, vec3<T>& grad_d) {
  int near_axis, far_axis;
  const Interval<T> hit = box_interval(o, d, bound, near_axis, far_axis);
  const T ds[3] = {d.x, d.y, d.z};
  T go[3] = {}, gd[3] = {};
  const bool far_counts = !is_miss(hit, min_distance);
  const bool near_counts = far_counts && hit.near >= min_distance;
#pragma unroll  // on the GPU, arrays indexed by a variable would lie in memory
  for (int k = 0; k < 3; ++k) {
    if (far_counts && k == far_axis) {
      go[k] = -grad_far / ds[k];
      gd[k] = hit.far * go[k];
    }
    if (near_counts && k == near_axis) {
      const T g = -grad_near / ds[k];
      go[k] += g;
      gd[k] += hit.near * g;
    }
  }
  grad_o = load3(go);
  grad_d = load3(gd);
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(generate_rays_forward, GenerateRaysArgs)
DF_DECLARE(generate_rays_backward, GenerateRaysArgs)
DF_DECLARE(ray_sphere_intersect_forward, RayIntersectArgs)
DF_DECLARE(ray_sphere_intersect_backward, RayIntersectArgs)
DF_DECLARE(ray_box_intersect_forward, RayIntersectArgs)
DF_DECLARE(ray_box_intersect_backward, RayIntersectArgs)
