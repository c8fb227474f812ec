// Renders a radiance field to a PNG on the CPU with the kernels of dreamfusion_fast:
//   render OUT.png [--field FILE] [--azimuth DEGREES] [--elevation DEGREES] [--size PIXELS]
// FILE is what export_field.py wrote; without it, a scene is made up. Read `render` downward: one
// launcher after the other, each with the arrays that it reads and writes. Bad input: exit code 2.
#include <dreamfusion_fast/kernels.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "field.h"
#include "png.h"

namespace {

constexpr double PI = 3.14159265358979323846;
constexpr double DISTANCE = 1.5, FOCAL = 1.0;  // scene units and image widths: as in exports
using Floats = std::vector<float>;

struct Rays { Floats o, d, near, far; };                        // (n, 3), (n, 3), (n,), (n,)
struct Samples { Floats positions, t, dt; std::vector<int32_t> packed; int32_t count = 0; };
struct Radiance { Floats sigma, rgb; };                         // (n,), (n, 3)

// Camera to world (3, 4), columns right, up, back, position: on a sphere, z up, facing the centre.
std::vector<float> orbit(double azimuth, double elevation) {
  const double a = azimuth * PI / 180, e = elevation * PI / 180;
  const double ca = std::cos(a), sa = std::sin(a), ce = std::cos(e), se = std::sin(e);
  const double m[] = {-sa, -se * ca, ce * ca, DISTANCE * ce * ca,
                      ca,  -se * sa, ce * sa, DISTANCE * ce * sa,
                      0,   ce,       se,      DISTANCE * se};
  return {std::begin(m), std::end(m)};
}

// A ray through every pixel, and where it enters and leaves the scene's sphere.
Rays rays_of(const std::vector<float>& c2w, int size, double radius) {
  const int64_t n = int64_t(size) * size;
  Rays r{Floats(3 * n), Floats(3 * n), Floats(n), Floats(n)};
  const float focal = float(FOCAL * size);
  df::GenerateRaysArgs<float> generate{};  // zero: what is not set is absent
  generate.c2w = c2w.data();
  generate.focal = &focal;
  generate.rays_o = r.o.data();
  generate.rays_d = r.d.data();
  generate.b = 1, generate.height = size, generate.width = size;
  df::generate_rays_forward(generate);

  df::RayIntersectArgs<float> intersect{};
  intersect.rays_o = r.o.data();
  intersect.rays_d = r.d.data();
  intersect.near = r.near.data();
  intersect.far = r.far.data();
  intersect.n = n;
  intersect.size = radius;
  df::ray_sphere_intersect_forward(intersect);
  return r;
}

// Samples along the rays where the occupancy grid is set, in rows for `capacity` of them.
Samples march(const Field& f, const Rays& r, int64_t capacity) {
  const int64_t n = int64_t(r.near.size()), blocks = (f.occupancy_resolution + 7) / 8;
  Samples s{Floats(3 * capacity), Floats(capacity), Floats(capacity), std::vector<int32_t>(2 * n)};
  std::vector<int32_t> first(n);
  std::vector<uint8_t> block(blocks * blocks * blocks);
  const int64_t seed = 0;
  df::MarchArgs<float> a{};
  a.rays_o = r.o.data(), a.rays_d = r.d.data(), a.near = r.near.data(), a.far = r.far.data();
  a.bitfield = f.bitfield.data(), a.seed = &seed;
  a.positions = s.positions.data(), a.t = s.t.data(), a.dt = s.dt.data();
  a.packed = s.packed.data(), a.count = &s.count;
  a.first = first.data(), a.blocks = block.data();  // scratch
  a.n = n, a.capacity = capacity, a.resolution = f.occupancy_resolution;
  a.bound = f.radius, a.step = f.step, a.jitter = false;
  df::march(a);
  return s;
}

// Density and colour at positions (n, 3): hash grid, MLP, blob.
Radiance radiance_of(const Field& f, const Floats& positions) {
  const int64_t n = int64_t(positions.size()) / 3;
  Floats x(3 * n), features(n * f.mlp.width[0]), out(4 * n);
  for (int64_t i = 0; i < 3 * n; ++i) x[i] = positions[i] / float(2 * f.radius) + 0.5f;

  df::HashEncodeArgs<float> encode{};
  encode.x = x.data();
  encode.table = f.table.data();
  encode.out = features.data();
  encode.n = n, encode.n_levels = f.n_levels, encode.n_features = f.features;
  encode.smoothstep = f.smoothstep;
  encode.levels = f.levels;
  df::hash_encode_forward(encode);

  df::MlpArgs<float> mlp{};
  mlp.x = features.data();
  mlp.params = f.weights.data();
  mlp.out = out.data();
  mlp.n = n;
  mlp.shape = f.mlp;
  df::mlp_forward(mlp);

  Radiance result{Floats(n), Floats(3 * n)};
  df::RadianceArgs<float> a{};
  a.out = out.data(), a.positions = positions.data();
  a.sigma = result.sigma.data(), a.values = result.rgb.data();
  a.n = n, a.channels = 3;
  a.cone = f.cone, a.bias = f.density_bias, a.ceiling = f.log_density_max;
  a.blob_density = f.blob_density, a.blob_size = f.blob_size;
  df::radiance_forward(a);
  return result;
}

// Colours (n_rays, 3), the backdrop behind them.
Floats composite(const Field& f, const Samples& s, const Radiance& radiance) {
  const int64_t n_rays = int64_t(s.packed.size()) / 2, n_samples = int64_t(s.t.size());
  Floats colour(3 * n_rays), opacity(n_rays), depth(n_rays), weights(n_samples);
  df::CompositeArgs<float> a{};
  a.sigma = radiance.sigma.data(), a.rgb = radiance.rgb.data();
  a.t = s.t.data(), a.dt = s.dt.data(), a.packed = s.packed.data();
  a.colour = colour.data(), a.opacity = opacity.data(), a.depth = depth.data();
  a.weights = weights.data();
  a.n_rays = n_rays, a.n_samples = n_samples, a.channels = 3;
  a.early_stop = f.early_stop;
  df::composite_forward(a);
  for (int64_t i = 0; i < 3 * n_rays; ++i) colour[i] += (1 - opacity[i / 3]) * f.backdrop[i % 3];
  return colour;
}

std::vector<uint8_t> render(const Field& field, double azimuth, double elevation, int size) {
  const Rays rays = rays_of(orbit(azimuth, elevation), size, field.radius);
  const int32_t demanded = march(field, rays, 1).count;  // how many samples there are
  const Samples samples = march(field, rays, std::max(1, demanded));
  const Floats colour = composite(field, samples, radiance_of(field, samples.positions));
  std::vector<uint8_t> pixels;
  for (float c : colour) pixels.push_back(uint8_t(std::lround(255 * std::clamp(c, 0.0f, 1.0f))));
  return pixels;
}

// ---- the command line ---------------------------------------------------------------------------
double number(const std::string& option, const std::string& text, double low, double high) {
  char* end = nullptr;
  const double x = std::strtod(text.c_str(), &end);
  if (!text.empty() && *end == 0 && x >= low && x <= high) return x;
  char range[64];
  std::snprintf(range, sizeof range, "%g to %g", low, high);
  throw std::runtime_error("argument `" + option + "`: expected " + range + ", got " + text);
}

void run(const std::vector<std::string>& arguments) {
  if (arguments.empty() || arguments[0][0] == '-')
    throw std::runtime_error("usage: render OUT.png [--field FILE] [--azimuth DEGREES] "
                             "[--elevation DEGREES] [--size PIXELS]");
  std::string file;
  double azimuth = 30, elevation = 20, size = 256;
  for (size_t i = 1; i < arguments.size(); i += 2) {
    const std::string option = arguments[i];
    const std::string value = i + 1 < arguments.size() ? arguments[i + 1] : "";
    if (option == "--field") file = value;
    else if (option == "--azimuth") azimuth = number(option, value, -360, 360);
    else if (option == "--elevation") elevation = number(option, value, -90, 90);
    else if (option == "--size") size = number(option, value, 1, 4096);
    else throw std::runtime_error("argument `" + option + "`: expected --field, --azimuth, "
                                  "--elevation or --size");
  }
  const Field field = file.empty() ? make_field() : read_field(file);
  png::write(arguments[0], render(field, azimuth, elevation, int(size)), int(size), int(size));
  std::printf("%s: %g x %g, dreamfusion_fast %s, %s, %d threads\n", arguments[0].c_str(), size,
              size, df::version(), df::isa(), df::max_threads());
}

}  // namespace

int main(int n, char** arguments) {
  try {
    run({arguments + 1, arguments + n});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
