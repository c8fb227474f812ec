// Every launcher once at tiny sizes, in the three run orders, for ThreadSanitizer, which tells of
// races: tables so small that threads collide, more than one block where that is cheap, results
// that are never looked at. Prints each launcher before it runs; a report names the kernel's line.
//   race_test [PREFIX]      only launchers whose name begins so
#include "../gpu.h"

#include <random>
#include <string>

#include "../adam.h"
#include "../composite.h"
#include "../frequency_encode.h"
#include "../hash_encode.h"
#include "../march.h"
#include "../mlp.h"
#include "../occupancy.h"
#include "../radiance.h"
#include "../rays.h"
#include "../spherical_harmonics.h"

namespace {

using namespace df;
std::string prefix;
std::mt19937 generator(1);

// n numbers in [low, high), never freed.
template <class T> T* numbers(size_t n, double low = -1, double high = 1) {
  T* const p = new (std::align_val_t(64)) T[n];
  std::uniform_real_distribution<double> uniform(low, high);
  for (size_t i = 0; i < n; ++i) p[i] = T(float(uniform(generator)));
  return p;
}
template <class T> T* filled(size_t n, T value = 0) {
  T* const p = new (std::align_val_t(64)) T[n];
  std::fill(p, p + n, value);
  return p;
}

template <class Args> void run(const char* name, void (*launcher)(const Args&, Stream), Args a) {
  if (std::string(name).rfind(prefix, 0) != 0) return;
  std::printf("%s\n", name);
  std::fflush(stdout);
  launcher(a, nullptr);
}
#define RUN(name, args) run(#name, name, args)

template <class T> void adam() {
  AdamArgs<T> a{};
  a.n = 1100;
  a.param = numbers<T>(a.n), a.exp_avg = numbers<T>(a.n), a.exp_avg_sq = numbers<T>(a.n, 0, 1);
  T* const grad = numbers<T>(a.n);
  a.grad = grad;
  a.step = filled<int32_t>(1), a.skipped = filled<int32_t>(1), a.found = filled<int32_t>(1);
  a.param_half = numbers<half>(a.n), a.factors = numbers<T>(ADAM_FACTORS);
  a.lr = 0.01, a.beta1 = 0.9, a.beta2 = 0.99, a.eps = 1e-8, a.grad_scale = 1;
  a.loss_scale = numbers<float>(1, 1, 2);
  RUN(adam_step, a);
  grad[3] = grad[1099] = T(NAN);  // found by threads of two blocks, or by two of one
  RUN(adam_step, a);
}

template <class T> void composite() {
  CompositeArgs<T> a{};
  a.n_rays = 5, a.n_samples = 77, a.channels = 3, a.early_stop = 0.01;
  const int32_t packed[] = {0, 33, 35, 0, 35, 37, 72, 1, 73, 4};
  a.packed = std::copy(packed, packed + 10, filled<int32_t>(10)) - 10;
  a.sigma = numbers<T>(77, 0, 2), a.rgb = numbers<T>(3 * 77);
  a.t = numbers<T>(77), a.dt = numbers<T>(77, 0.1, 0.2);
  a.colour = numbers<T>(3 * 5), a.opacity = numbers<T>(5), a.depth = numbers<T>(5);
  a.weights = numbers<T>(77);
  RUN(composite_forward, a);
  a.grad_colour = numbers<T>(3 * 5), a.grad_opacity = numbers<T>(5);
  a.grad_depth = numbers<T>(5), a.grad_weights = numbers<T>(77);
  a.grad_sigma = numbers<T>(77), a.grad_rgb = numbers<T>(3 * 77);
  a.grad_t = numbers<T>(77), a.grad_dt = numbers<T>(77);
  RUN(composite_backward, a);
  LitArgs<T>& lit = a.lit;
  lit.gradient = numbers<T>(3 * 77), lit.rays_o = numbers<T>(3 * 5), lit.rays_d = numbers<T>(3 * 5);
  lit.shading = numbers<T>(SHADING), lit.rays_per_view = 5;
  lit.normal = numbers<T>(3 * 5), lit.orientation = numbers<T>(5);
  RUN(composite_lit_forward, a);
  lit.grad_normal = numbers<T>(3 * 5), lit.grad_orientation = numbers<T>(5);
  lit.grad_gradient = numbers<T>(3 * 77);
  RUN(composite_lit_backward, a);
}

template <class T> void frequency_encode() {
  FrequencyEncodeArgs<T> a{};
  a.n = 45, a.dims = 3, a.n_frequencies = 4;
  a.x = numbers<T>(3 * 45), a.variance = numbers<T>(45, 0, 1), a.count = filled<int32_t>(1, 43);
  a.out = numbers<T>(24 * 45), a.grad_out = numbers<T>(24 * 45);
  a.grad_x = numbers<T>(3 * 45), a.grad_variance = numbers<T>(45);
  RUN(frequency_encode_forward, a);
  RUN(frequency_encode_backward, a);
  a.u = numbers<T>(3 * 45), a.q = numbers<T>(45), a.grad_grad_out = numbers<T>(24 * 45);
  RUN(frequency_encode_second, a);
}

template <class T> void hash_encode(int features) {
  HashEncodeArgs<T> a{};
  a.n = 40, a.n_levels = 2, a.n_features = features, a.smoothstep = features == 2;
  a.levels.resolution[0] = 1, a.levels.resolution[1] = 8;  // one dense, one hashed
  a.levels.offset[1] = 16, a.levels.offset[2] = 32;
  a.x = numbers<Wide<T>>(3 * 40, -0.1, 1.1), a.count = filled<int32_t>(1, 38);
  a.table = numbers<T>(32 * features), a.out = numbers<T>(2 * 40 * features);
  a.grad_out = numbers<T>(2 * 40 * features), a.grad_x = numbers<Wide<T>>(3 * 40);
  a.grad_table = numbers<Wide<T>>(32 * features);
  RUN(hash_encode_forward, a);
  RUN(hash_encode_backward, a);
  a.tangent = numbers<Wide<T>>(3 * 40);
  RUN(hash_encode_second, a);
  a.staggered = true, a.levels.scale[0] = 0.5, a.levels.scale[1] = 7;
  a.levels.resolution[0] = 2;  // and 8
  RUN(hash_encode_forward, a);
  RUN(hash_encode_backward, a);
  RUN(hash_encode_second, a);
}

template <class T> void marching(int capacity) {
  MarchArgs<T> a{};
  a.n = 140, a.capacity = capacity, a.resolution = 4, a.bound = 1, a.step = 0.5, a.jitter = true;
  a.rays_o = numbers<T>(3 * 140), a.rays_d = numbers<T>(3 * 140);
  a.near = numbers<T>(140, 0, 0.1), a.far = numbers<T>(140, 1, 2);
  a.bitfield = filled<uint8_t>(8, 0xb7), a.seed = filled<int64_t>(1, 5);
  a.positions = numbers<T>(3 * capacity), a.t = numbers<T>(capacity), a.dt = numbers<T>(capacity);
  a.packed = filled<int32_t>(2 * 140), a.count = filled<int32_t>(1), a.first = filled<int32_t>(140);
  a.blocks = filled<uint8_t>(1), a.counter = filled<int64_t>(2);
  RUN(march, a);
}

template <class T> void mlp(bool silu, std::initializer_list<int> widths) {
  MlpArgs<T> a{};
  a.n = 70, a.count = filled<int32_t>(1, 69);
  a.shape.bias = true, a.shape.silu = silu, a.shape.n_layers = int(widths.size()) - 1;
  std::copy(widths.begin(), widths.end(), a.shape.width);
  const int inputs = a.shape.width[0], outputs = a.shape.width[a.shape.n_layers];
  const int64_t parameters = mlp_parameters(a.shape);
  a.x = numbers<T>(70 * inputs), a.params = numbers<T>(parameters), a.out = numbers<T>(70 * outputs);
  a.grad_out = numbers<T>(70 * outputs), a.grad_x = numbers<T>(70 * inputs);
  a.grad_params = numbers<Wide<T>>(parameters);
  a.workspace = numbers<Wide<T>>(mlp_workspace<T>(a.shape, a.n, true, true));
  RUN(mlp_forward, a);
  RUN(mlp_backward, a);
  if constexpr (!std::is_same_v<T, half>) {
    a.tangent = numbers<T>(70 * inputs);
    RUN(mlp_second, a);
  }
}

template <class T> void occupancy() {
  OccupancyPointsArgs<T> p{filled<int64_t>(1, 7), numbers<T>(3 * 512), 8, 1};
  RUN(occupancy_points, p);
  OccupancyUpdateArgs<T> a{};
  a.n = 512, a.chunk = 128, a.decay = 0.9, a.threshold = 0.5;
  a.ema = numbers<T>(512, 0, 1), a.density = numbers<T>(512, 0, 1);
  a.bitfield = filled<uint8_t>(64), a.partial = filled<double>(4);
  RUN(occupancy_update, a);
}

template <class T> void radiance() {
  RadianceArgs<T> a{};
  a.n = 300, a.channels = 3, a.ceiling = 8, a.blob_density = 5, a.blob_size = 0.2, a.scale = 2;
  a.count = filled<int32_t>(1, 299), a.out = numbers<T>(1200);
  a.positions = numbers<Wide<T>>(900), a.of_x = numbers<Wide<T>>(900);
  a.sigma = numbers<Wide<T>>(300), a.values = numbers<Wide<T>>(900);
  a.gradient = numbers<Wide<T>>(900), a.grad_out = numbers<T>(1200);
  a.grad_sigma = numbers<Wide<T>>(300), a.grad_values = numbers<Wide<T>>(900);
  a.grad_gradient = numbers<Wide<T>>(900), a.grad_of_x = numbers<Wide<T>>(900);
  RUN(radiance_forward, a);
  RUN(radiance_backward, a);
}

template <class T> void rays() {
  GenerateRaysArgs<T> a{};
  a.b = 2, a.height = 3, a.width = 37;
  a.c2w = numbers<T>(2 * 12), a.focal = numbers<T>(2, 30, 40);
  a.rays_o = numbers<T>(3 * 222), a.rays_d = numbers<T>(3 * 222);
  a.grad_o = numbers<T>(3 * 222), a.grad_d = numbers<T>(3 * 222), a.partial = numbers<T>(6 * 13);
  a.grad_c2w = numbers<T>(2 * 12), a.grad_focal = numbers<T>(2);
  RUN(generate_rays_forward, a);
  RUN(generate_rays_backward, a);
  RayIntersectArgs<T> i{};
  i.n = 140, i.size = 1, i.min_distance = 0.01;
  i.rays_o = numbers<T>(3 * 140), i.rays_d = numbers<T>(3 * 140);
  i.near = numbers<T>(140), i.far = numbers<T>(140);
  i.grad_near = numbers<T>(140), i.grad_far = numbers<T>(140);
  i.grad_o = numbers<T>(3 * 140), i.grad_d = numbers<T>(3 * 140);
  RUN(ray_sphere_intersect_forward, i);
  RUN(ray_sphere_intersect_backward, i);
  RUN(ray_box_intersect_forward, i);
  RUN(ray_box_intersect_backward, i);
}

template <class T> void spherical_harmonics() {
  SphericalHarmonicsArgs<T> a{};
  a.n = 140, a.degree = 4, a.count = filled<int32_t>(1, 139);
  a.dirs = numbers<T>(3 * 140), a.out = numbers<T>(16 * 140);
  a.grad_out = numbers<T>(16 * 140), a.grad_dirs = numbers<T>(3 * 140);
  RUN(spherical_harmonics_forward, a);
  RUN(spherical_harmonics_backward, a);
}

template <class T> void all() {
  adam<T>();
  composite<T>();
  frequency_encode<T>();
  hash_encode<T>(2);
  hash_encode<T>(8);
  marching<T>(1000);
  marching<T>(50);
  mlp<T>(false, {3, 16, 16, 4});
  mlp<T>(true, {5, 40, 1});
  occupancy<T>();
  radiance<T>();
  rays<T>();
  spherical_harmonics<T>();
}

}  // namespace

int main(int n, char** arguments) {
  if (n > 1) prefix = arguments[1];
  using emulation::Order;
  for (Order order : {Order::forward, Order::reverse, Order::shuffled}) {
    emulation::order = order;
    all<float>();
    all<double>();
    hash_encode<half>(2);
    hash_encode<half>(4);
    mlp<half>(false, {32, 64, 64, 4});
    mlp<half>(true, {20, 32, 16});
  }
}
