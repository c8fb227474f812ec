// Rays on the CPU: image rows side by side, and rays in chunks.
#include "rays.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t ROWS = 4;      // image rows a chunk
constexpr int64_t GRAIN = 1024;  // rays a chunk

// Calls f(ray, origin, direction) for every ray.
template <class T, class F> void for_rays(const RayIntersectArgs<T>& a, const F& f) {
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i, load3(a.rays_o + 3 * i), load3(a.rays_d + 3 * i));
  });
}

template <class T> void store_interval(const RayIntersectArgs<T>& a, int64_t i, Interval<T> hit) {
  hit = limit_interval(hit, T(a.min_distance));
  a.near[i] = hit.near;
  a.far[i] = hit.far;
}

}  // namespace

template <class T> void generate_rays_forward(const GenerateRaysArgs<T>& a, Stream) {
  parallel_for(a.b * a.height, ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Camera<T> c = load_camera(a.c2w + row / a.height * 12, a.focal[row / a.height]);
      const T y = pixel_y<T>(row % a.height, a.height);
      for (int64_t j = 0; j < a.width; ++j) {
        const vec3<T> w = pixel_direction(c, pixel_x<T>(j, a.width), y);
        store3(a.rays_o + 3 * (row * a.width + j), c.position);
        store3(a.rays_d + 3 * (row * a.width + j), (1 / std::sqrt(dot(w, w))) * w);
      }
    }
  });
}

template <class T> void generate_rays_backward(const GenerateRaysArgs<T>& a, Stream) {
  parallel_for(a.b * a.height, ROWS, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Camera<T> c = load_camera(a.c2w + row / a.height * 12, a.focal[row / a.height]);
      const T y = pixel_y<T>(row % a.height, a.height);
      T g[13] = {};
      for (int64_t j = 0; j < a.width; ++j) {
        const int64_t pixel = 3 * (row * a.width + j);
        pixel_backward(c, pixel_x<T>(j, a.width), y, load3(a.grad_o + pixel),
                       load3(a.grad_d + pixel), g);
      }
      for (int k = 0; k < 13; ++k) a.partial[13 * row + k] = g[k];
    }
  });
  for (int64_t image = 0; image < a.b; ++image) {
    T g[13] = {};
    for (int64_t row = image * a.height; row < (image + 1) * a.height; ++row)
      for (int k = 0; k < 13; ++k) g[k] += a.partial[13 * row + k];
    for (int k = 0; k < 12; ++k) a.grad_c2w[12 * image + k] = g[k];
    a.grad_focal[image] = g[12];
  }
}

template <class T> void ray_sphere_intersect_forward(const RayIntersectArgs<T>& a, Stream) {
  for_rays(a, [&](int64_t i, vec3<T> o, vec3<T> d) {
    store_interval(a, i, sphere_interval(o, d, T(a.size)));
  });
}

template <class T> void ray_sphere_intersect_backward(const RayIntersectArgs<T>& a, Stream) {
  for_rays(a, [&](int64_t i, vec3<T> o, vec3<T> d) {
    vec3<T> grad_o, grad_d;
    sphere_backward(o, d, T(a.size), T(a.min_distance), a.grad_near[i], a.grad_far[i], grad_o,
                    grad_d);
    store3(a.grad_o + 3 * i, grad_o);
    store3(a.grad_d + 3 * i, grad_d);
  });
}

template <class T> void ray_box_intersect_forward(const RayIntersectArgs<T>& a, Stream) {
  for_rays(a, [&](int64_t i, vec3<T> o, vec3<T> d) {
    int near_axis, far_axis;
    store_interval(a, i, box_interval(o, d, T(a.size), near_axis, far_axis));
  });
}

template <class T> void ray_box_intersect_backward(const RayIntersectArgs<T>& a, Stream) {
  for_rays(a, [&](int64_t i, vec3<T> o, vec3<T> d) {
    vec3<T> grad_o, grad_d;
    box_backward(o, d, T(a.size), T(a.min_distance), a.grad_near[i], a.grad_far[i], grad_o, grad_d);
    store3(a.grad_o + 3 * i, grad_o);
    store3(a.grad_d + 3 * i, grad_d);
  });
}

DF_INSTANTIATE(generate_rays_forward, GenerateRaysArgs)
DF_INSTANTIATE(generate_rays_backward, GenerateRaysArgs)
DF_INSTANTIATE(ray_sphere_intersect_forward, RayIntersectArgs)
DF_INSTANTIATE(ray_sphere_intersect_backward, RayIntersectArgs)
DF_INSTANTIATE(ray_box_intersect_forward, RayIntersectArgs)
DF_INSTANTIATE(ray_box_intersect_backward, RayIntersectArgs)

}  // namespace DF_ISA
}  // namespace df
