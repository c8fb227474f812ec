// Rays on the GPU. An image's rays: a block a row of pixels, a thread a number of the results, so
// that stores are whole lines; a direction is cheap enough to be made once a component.
// Its backward sums without atomics, always in the same order: a warp a row of pixels into
// `partial`, then a warp for each of the camera's 13 numbers. Intersections: a thread a ray.
#include "gpu.h"
#include "rays.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 128;
constexpr int NUMBERS = 13;  // of a camera: c2w and focal length

// The camera of an image row, and the row's y.
template <class T> struct ImageRow { Camera<T> camera; T y; };
template <class T>
__device__ inline ImageRow<T> image_row(const GenerateRaysArgs<T>& a, int64_t row) {
  const int64_t image = row / a.height;
  return {load_camera(a.c2w + 12 * image, a.focal[image]),
          pixel_y<T>(row - image * a.height, a.height)};
}

template <class T> __device__ inline T component(vec3<T> v, int k) {
  return k == 0 ? v.x : k == 1 ? v.y : v.z;
}

template <class T>
__global__ void __launch_bounds__(THREADS) generate_rays_forward_kernel(GenerateRaysArgs<T> a) {
  const ImageRow<T> row = image_row(a, blockIdx.x);
  const int64_t begin = 3 * a.width * blockIdx.x;
  for (int i = threadIdx.x; i < 3 * int(a.width); i += THREADS) {
    const vec3<T> w = pixel_direction(row.camera, pixel_x<T>(i / 3, a.width), row.y);
    a.rays_o[begin + i] = component(row.camera.position, i % 3);
    a.rays_d[begin + i] = (1 / std::sqrt(dot(w, w))) * component(w, i % 3);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) generate_rays_rows_kernel(GenerateRaysArgs<T> a) {
  const int64_t i = global_thread() / WARP;
  if (i >= a.b * a.height) return;  // a whole warp
  const ImageRow<T> row = image_row(a, i);
  T g[NUMBERS] = {};
  for (int j = lane_id(); j < int(a.width); j += WARP) {
    const int64_t pixel = 3 * (i * a.width + j);
    pixel_backward(row.camera, pixel_x<T>(j, a.width), row.y, load3(a.grad_o + pixel),
                   load3(a.grad_d + pixel), g);
  }
  T mine = 0;  // lane k stores number k
#pragma unroll
  for (int k = 0; k < NUMBERS; ++k) {
    const T sum = warp_sum(g[k]);
    if (lane_id() == k) mine = sum;
  }
  if (lane_id() < NUMBERS) a.partial[NUMBERS * i + lane_id()] = mine;
}

template <class T>
__global__ void __launch_bounds__(NUMBERS * WARP) generate_rays_images_kernel(
    GenerateRaysArgs<T> a) {
  const int64_t image = blockIdx.x;
  const int k = threadIdx.x / WARP;
  T sum = 0;
  for (int64_t row = lane_id(); row < a.height; row += WARP)
    sum += a.partial[NUMBERS * (image * a.height + row) + k];
  sum = warp_sum(sum);
  if (lane_id() != 0) return;
  if (k < 12) a.grad_c2w[12 * image + k] = sum;
  else a.grad_focal[image] = sum;
}

// Which of the two bodies a kernel intersects.
struct Sphere {};
struct Box {};
template <class T> __device__ inline Interval<T> interval(Sphere, vec3<T> o, vec3<T> d, T size) {
  return sphere_interval(o, d, size);
}
template <class T> __device__ inline Interval<T> interval(Box, vec3<T> o, vec3<T> d, T size) {
  int near_axis, far_axis;
  return box_interval(o, d, size, near_axis, far_axis);
}

template <class Body, class T>
__global__ void __launch_bounds__(THREADS) ray_intersect_forward_kernel(RayIntersectArgs<T> a) {
  const int64_t i = global_thread();
  if (i >= a.n) return;
  const Interval<T> hit = limit_interval(
      interval(Body(), load3(a.rays_o + 3 * i), load3(a.rays_d + 3 * i), T(a.size)),
      T(a.min_distance));
  a.near[i] = hit.near;
  a.far[i] = hit.far;
}

template <class Body, class T>
__global__ void __launch_bounds__(THREADS) ray_intersect_backward_kernel(RayIntersectArgs<T> a) {
  const int64_t i = global_thread();
  if (i >= a.n) return;
  const vec3<T> o = load3(a.rays_o + 3 * i), d = load3(a.rays_d + 3 * i);
  const T size = T(a.size), min_distance = T(a.min_distance);
  vec3<T> grad_o, grad_d;
  if constexpr (std::is_same<Body, Sphere>::value)
    sphere_backward(o, d, size, min_distance, a.grad_near[i], a.grad_far[i], grad_o, grad_d);
  else
    box_backward(o, d, size, min_distance, a.grad_near[i], a.grad_far[i], grad_o, grad_d);
  store3(a.grad_o + 3 * i, grad_o);
  store3(a.grad_d + 3 * i, grad_d);
}

}  // namespace

template <class T> void generate_rays_forward(const GenerateRaysArgs<T>& a, Stream stream) {
  launch("generate_rays_forward_kernel", generate_rays_forward_kernel<T>,
         unsigned(a.b * a.height), THREADS, 0, stream, a);
}

template <class T> void generate_rays_backward(const GenerateRaysArgs<T>& a, Stream stream) {
  launch("generate_rays_rows_kernel", generate_rays_rows_kernel<T>,
         blocks_for(WARP * a.b * a.height, THREADS), THREADS, 0, stream, a);
  launch("generate_rays_images_kernel", generate_rays_images_kernel<T>, unsigned(a.b),
         NUMBERS * WARP, 0, stream, a);
}

template <class T> void ray_sphere_intersect_forward(const RayIntersectArgs<T>& a, Stream stream) {
  launch("ray_sphere_intersect_forward_kernel", ray_intersect_forward_kernel<Sphere, T>,
         blocks_for(a.n, THREADS), THREADS, 0, stream, a);
}

template <class T> void ray_sphere_intersect_backward(const RayIntersectArgs<T>& a, Stream stream) {
  launch("ray_sphere_intersect_backward_kernel", ray_intersect_backward_kernel<Sphere, T>,
         blocks_for(a.n, THREADS), THREADS, 0, stream, a);
}

template <class T> void ray_box_intersect_forward(const RayIntersectArgs<T>& a, Stream stream) {
  launch("ray_box_intersect_forward_kernel", ray_intersect_forward_kernel<Box, T>,
         blocks_for(a.n, THREADS), THREADS, 0, stream, a);
}

template <class T> void ray_box_intersect_backward(const RayIntersectArgs<T>& a, Stream stream) {
  launch("ray_box_intersect_backward_kernel", ray_intersect_backward_kernel<Box, T>,
         blocks_for(a.n, THREADS), THREADS, 0, stream, a);
}

DF_INSTANTIATE(generate_rays_forward, GenerateRaysArgs)
DF_INSTANTIATE(generate_rays_backward, GenerateRaysArgs)
DF_INSTANTIATE(ray_sphere_intersect_forward, RayIntersectArgs)
DF_INSTANTIATE(ray_sphere_intersect_backward, RayIntersectArgs)
DF_INSTANTIATE(ray_box_intersect_forward, RayIntersectArgs)
DF_INSTANTIATE(ray_box_intersect_backward, RayIntersectArgs)

}  // namespace DF_ISA
}  // namespace df
