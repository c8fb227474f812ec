// The only pybind11 file, for both modules: integer addresses and a stream in, launcher out.
// No torch here; dreamfusion_fast/ops/<stem>.py validates the tensors and passes their addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "adam.h"
#include "composite.h"
#include "frequency_encode.h"
#include "hash_encode.h"
#include "march.h"
#include "mlp.h"
#include "occupancy.h"
#include "radiance.h"
#include "rays.h"
#include "spherical_harmonics.h"
#ifdef DF_EMULATED
#include "emulation/emulation.h"
#endif

namespace py = pybind11;

namespace {

// The address of an array as Python passes it (0: absent); becomes whichever pointer is asked for.
struct Address {
  std::uintptr_t value = 0;
  template <class T> operator T*() const { return reinterpret_cast<T*>(value); }
};

}  // namespace

template <> struct pybind11::detail::type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));
  bool load(handle source, bool) {
    value.value = PyLong_AsSize_t(source.ptr());
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
};

namespace {

#ifndef DF_IS_CUDA
// The instruction set is chosen once, at import; use_isa() lets tests run both.
bool v3_supported() {
#ifdef DF_HAS_V3
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}
bool use_v3 = v3_supported();
#endif

template <class T> struct Type { using type = T; };

// Calls f(Type<T>()) with the scalar type: 0 float, 1 double (ops/_backend.py: scalar).
template <class F> void on_scalar(int scalar, const F& f) {
  if (scalar == 0) f(Type<float>());
  else if (scalar == 1) f(Type<double>());
  else throw py::value_error("this kernel has no half precision");
}
// For kernels that have half precision too: 2, on CUDA.
template <class F> void on_scalar_or_half(int scalar, const F& f) {
#ifdef DF_IS_CUDA
  if (scalar == 2) return f(Type<half>());
#endif
  on_scalar(scalar, f);
}

}  // namespace

// LAUNCH(name, Args, fields...) calls df::<instruction set>::name(Args<T>{fields...}, stream), with
// the enclosing function's scalar and stream. Fields in the struct's order; {} if unused.
#if defined(DF_IS_CUDA)
#define DF_CALL(name, args) df::cuda::name(args, stream)
#elif defined(DF_HAS_V3)
#define DF_CALL(name, args) use_v3 ? df::v3::name(args, stream) : df::base::name(args, stream)
#else
#define DF_CALL(name, args) df::base::name(args, stream)
#endif
#define LAUNCH(name, Args, ...) LAUNCH_ON(on_scalar, name, Args, __VA_ARGS__)
#define LAUNCH_OR_HALF(name, Args, ...) LAUNCH_ON(on_scalar_or_half, name, Args, __VA_ARGS__)
#define LAUNCH_ON(dispatch, name, Args, ...)                             \
  dispatch(scalar, [&](auto type) {                                      \
    const df::Args<typename decltype(type)::type> args{__VA_ARGS__};     \
    DF_CALL(name, args);                                                 \
  })

using GilReleased = py::call_guard<py::gil_scoped_release>;

// One block a stem, alphabetical.

// ---- adam ---------------------------------------------------------------------------------------
static void bind_adam(py::module_& m) {
  m.def("adam_step",
        [](int scalar, Address param, Address grad, Address exp_avg, Address exp_avg_sq,
           Address step, Address skipped, Address rate, Address param_half, Address found,
           Address factors, bool step_is_int64, int64_t n, double lr, double beta1, double beta2,
           double eps, double grad_scale, Address stream) {
          LAUNCH(adam_step, AdamArgs, param, grad, exp_avg, exp_avg_sq, step, skipped, rate,
                 param_half, found, factors, step_is_int64, n, lr, beta1, beta2, eps, grad_scale);
        },
        GilReleased(), py::arg("scalar"), py::arg("param"), py::arg("grad"), py::arg("exp_avg"),
        py::arg("exp_avg_sq"), py::arg("step"), py::arg("skipped"), py::arg("rate"),
        py::arg("param_half"), py::arg("found"), py::arg("factors"), py::arg("step_is_int64"), py::arg("n"),
        py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("grad_scale"),
        py::arg("stream"));
  m.attr("ADAM_FACTORS") = df::ADAM_FACTORS;
}

// ---- composite ----------------------------------------------------------------------------------
static void bind_composite(py::module_& m) {
  m.def("composite_forward",
        [](int scalar, Address sigma, Address rgb, Address t, Address dt, Address packed,
           Address colour, Address opacity, Address depth, Address weights, int64_t n_rays,
           int64_t n_samples, int channels, double early_stop, Address stream) {
          LAUNCH(composite_forward, CompositeArgs, sigma, rgb, t, dt, packed, {}, {}, {},
                 {}, colour, opacity, depth, weights, {}, {}, {}, {}, n_rays, n_samples, channels,
                 early_stop, {});
        },
        GilReleased(), py::arg("scalar"), py::arg("sigma"), py::arg("rgb"), py::arg("t"),
        py::arg("dt"), py::arg("packed"), py::arg("colour"), py::arg("opacity"), py::arg("depth"),
        py::arg("weights"), py::arg("n_rays"), py::arg("n_samples"), py::arg("channels"),
        py::arg("early_stop"), py::arg("stream"));
  m.def("composite_backward",
        [](int scalar, Address sigma, Address rgb, Address t, Address dt, Address packed,
           Address grad_colour, Address grad_opacity, Address grad_depth, Address grad_weights,
           Address weights, Address grad_sigma, Address grad_rgb, Address grad_t, Address grad_dt,
           int64_t n_rays, int64_t n_samples, int channels, double early_stop, Address stream) {
          LAUNCH(composite_backward, CompositeArgs, sigma, rgb, t, dt, packed, grad_colour,
                 grad_opacity, grad_depth, grad_weights, {}, {}, {}, weights, grad_sigma, grad_rgb,
                 grad_t, grad_dt, n_rays, n_samples, channels, early_stop, {});
        },
        GilReleased(), py::arg("scalar"), py::arg("sigma"), py::arg("rgb"), py::arg("t"),
        py::arg("dt"), py::arg("packed"), py::arg("grad_colour"), py::arg("grad_opacity"),
        py::arg("grad_depth"), py::arg("grad_weights"), py::arg("weights"), py::arg("grad_sigma"),
        py::arg("grad_rgb"), py::arg("grad_t"), py::arg("grad_dt"), py::arg("n_rays"),
        py::arg("n_samples"), py::arg("channels"), py::arg("early_stop"), py::arg("stream"));
  m.def("composite_lit_forward",
        [](int scalar, Address sigma, Address albedo, Address gradient, Address t, Address dt,
           Address packed, Address rays_o, Address rays_d, Address shading, Address colour,
           Address opacity, Address depth, Address weights, Address normal, Address orientation,
           int64_t n_rays, int64_t n_samples, int64_t rays_per_view, double early_stop,
           Address stream) {
          LAUNCH(composite_lit_forward, CompositeArgs, sigma, albedo, t, dt, packed, {}, {}, {}, {},
                 colour, opacity, depth, weights, {}, {}, {}, {}, n_rays, n_samples, 3, early_stop,
                 {gradient, rays_o, rays_d, shading, {}, {}, normal, orientation, {},
                  rays_per_view});
        },
        GilReleased(), py::arg("scalar"), py::arg("sigma"), py::arg("albedo"),
        py::arg("gradient"), py::arg("t"), py::arg("dt"), py::arg("packed"), py::arg("rays_o"),
        py::arg("rays_d"), py::arg("shading"), py::arg("colour"), py::arg("opacity"),
        py::arg("depth"), py::arg("weights"), py::arg("normal"), py::arg("orientation"),
        py::arg("n_rays"), py::arg("n_samples"), py::arg("rays_per_view"), py::arg("early_stop"),
        py::arg("stream"));
  m.def("composite_lit_backward",
        [](int scalar, Address sigma, Address albedo, Address gradient, Address t, Address dt,
           Address packed, Address rays_o, Address rays_d, Address shading, Address grad_colour,
           Address grad_opacity, Address grad_depth, Address grad_weights, Address grad_normal,
           Address grad_orientation, Address weights, Address grad_sigma, Address grad_albedo,
           Address grad_gradient, Address grad_t, Address grad_dt, int64_t n_rays,
           int64_t n_samples, int64_t rays_per_view, double early_stop, Address stream) {
          LAUNCH(composite_lit_backward, CompositeArgs, sigma, albedo, t, dt, packed, grad_colour,
                 grad_opacity, grad_depth, grad_weights, {}, {}, {}, weights, grad_sigma,
                 grad_albedo, grad_t, grad_dt, n_rays, n_samples, 3, early_stop,
                 {gradient, rays_o, rays_d, shading, grad_normal, grad_orientation, {}, {},
                  grad_gradient, rays_per_view});
        },
        GilReleased(), py::arg("scalar"), py::arg("sigma"), py::arg("albedo"),
        py::arg("gradient"), py::arg("t"), py::arg("dt"), py::arg("packed"), py::arg("rays_o"),
        py::arg("rays_d"), py::arg("shading"), py::arg("grad_colour"), py::arg("grad_opacity"),
        py::arg("grad_depth"), py::arg("grad_weights"), py::arg("grad_normal"),
        py::arg("grad_orientation"), py::arg("weights"), py::arg("grad_sigma"),
        py::arg("grad_albedo"), py::arg("grad_gradient"), py::arg("grad_t"), py::arg("grad_dt"),
        py::arg("n_rays"), py::arg("n_samples"), py::arg("rays_per_view"), py::arg("early_stop"),
        py::arg("stream"));
}

// ---- frequency_encode ---------------------------------------------------------------------------
static void bind_frequency_encode(py::module_& m) {
  m.def("frequency_encode_forward",
        [](int scalar, Address x, Address variance, Address out, Address count, int64_t n,
           int dims, int n_frequencies, Address stream) {
          LAUNCH(frequency_encode_forward, FrequencyEncodeArgs, x, variance, {}, {}, {}, out, {}, {},
                 {}, count, n, dims, n_frequencies);
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("variance"), py::arg("out"),
        py::arg("count"), py::arg("n"), py::arg("dims"), py::arg("n_frequencies"),
        py::arg("stream"));
  m.def("frequency_encode_backward",
        [](int scalar, Address x, Address variance, Address grad_out, Address grad_x,
           Address grad_variance, Address count, int64_t n, int dims, int n_frequencies,
           Address stream) {
          LAUNCH(frequency_encode_backward, FrequencyEncodeArgs, x, variance, grad_out, {}, {}, {}, {},
                 grad_x, grad_variance, count, n, dims, n_frequencies);
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("variance"),
        py::arg("grad_out"), py::arg("grad_x"), py::arg("grad_variance"), py::arg("count"),
        py::arg("n"), py::arg("dims"), py::arg("n_frequencies"), py::arg("stream"));
  m.def("frequency_encode_second",
        [](int scalar, Address x, Address variance, Address grad_out, Address u, Address q,
           Address grad_grad_out, Address grad_x, Address grad_variance, Address count, int64_t n,
           int dims, int n_frequencies, Address stream) {
          LAUNCH(frequency_encode_second, FrequencyEncodeArgs, x, variance, grad_out, u, q, {},
                 grad_grad_out, grad_x, grad_variance, count, n, dims, n_frequencies);
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("variance"),
        py::arg("grad_out"), py::arg("u"), py::arg("q"), py::arg("grad_grad_out"),
        py::arg("grad_x"), py::arg("grad_variance"), py::arg("count"), py::arg("n"),
        py::arg("dims"), py::arg("n_frequencies"), py::arg("stream"));
}

// ---- hash_encode --------------------------------------------------------------------------------
static df::HashLevels hash_levels(const std::vector<int32_t>& resolutions,
                                  const std::vector<int64_t>& offsets,
                                  const std::vector<float>& scales) {
  if (resolutions.size() > df::HASH_MAX_LEVELS || offsets.size() != resolutions.size() + 1)
    throw py::value_error("expected 1 to 32 resolutions and one more offset");
  if (!scales.empty() && scales.size() != resolutions.size())
    throw py::value_error("expected no scale or one for each resolution");
  df::HashLevels levels{};
  std::copy(resolutions.begin(), resolutions.end(), levels.resolution);
  std::copy(offsets.begin(), offsets.end(), levels.offset);
  std::copy(scales.begin(), scales.end(), levels.scale);
  return levels;
}

static void bind_hash_encode(py::module_& m) {
  m.def("hash_encode_forward",
        [](int scalar, Address x, Address table, Address out, Address count, int64_t n,
           int n_levels, int n_features, bool smoothstep, const std::vector<int32_t>& resolutions,
           const std::vector<int64_t>& offsets, const std::vector<float>& scales, Address stream) {
          LAUNCH_OR_HALF(hash_encode_forward, HashEncodeArgs, x, table, {}, {}, out, {}, {}, count,
                         n, n_levels, n_features, smoothstep, !scales.empty(),
                         hash_levels(resolutions, offsets, scales));
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("table"), py::arg("out"),
        py::arg("count"), py::arg("n"), py::arg("n_levels"), py::arg("n_features"),
        py::arg("smoothstep"), py::arg("resolutions"), py::arg("offsets"), py::arg("scales"),
        py::arg("stream"));
  m.def("hash_encode_backward",
        [](int scalar, Address x, Address table, Address grad_out, Address grad_x,
           Address grad_table, Address count, int64_t n, int n_levels, int n_features,
           bool smoothstep, const std::vector<int32_t>& resolutions,
           const std::vector<int64_t>& offsets, const std::vector<float>& scales, Address stream) {
          LAUNCH_OR_HALF(hash_encode_backward, HashEncodeArgs, x, table, grad_out, {}, {}, grad_x,
                         grad_table, count, n, n_levels, n_features, smoothstep, !scales.empty(),
                         hash_levels(resolutions, offsets, scales));
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("table"), py::arg("grad_out"),
        py::arg("grad_x"), py::arg("grad_table"), py::arg("count"), py::arg("n"),
        py::arg("n_levels"), py::arg("n_features"), py::arg("smoothstep"),
        py::arg("resolutions"), py::arg("offsets"), py::arg("scales"), py::arg("stream"));
  m.def("hash_encode_second",
        [](int scalar, Address x, Address table, Address grad_out, Address tangent, Address out,
           Address grad_x, Address grad_table, Address count, int64_t n, int n_levels,
           int n_features, bool smoothstep, const std::vector<int32_t>& resolutions,
           const std::vector<int64_t>& offsets, const std::vector<float>& scales, Address stream) {
          LAUNCH_OR_HALF(hash_encode_second, HashEncodeArgs, x, table, grad_out, tangent, out,
                         grad_x, grad_table, count, n, n_levels, n_features, smoothstep, !scales.empty(),
                         hash_levels(resolutions, offsets, scales));
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("table"), py::arg("grad_out"),
        py::arg("tangent"), py::arg("out"), py::arg("grad_x"), py::arg("grad_table"),
        py::arg("count"), py::arg("n"), py::arg("n_levels"), py::arg("n_features"),
        py::arg("smoothstep"), py::arg("resolutions"), py::arg("offsets"), py::arg("scales"),
        py::arg("stream"));
}

// ---- march --------------------------------------------------------------------------------------
static void bind_march(py::module_& m) {
  m.def("march",
        [](int scalar, Address rays_o, Address rays_d, Address near, Address far,
           Address bitfield, Address seed, Address positions, Address t, Address dt,
           Address packed, Address count, Address first, Address blocks, Address counter,
           int64_t n, int64_t capacity, int resolution, double bound, double step, bool jitter,
           Address stream) {
          LAUNCH(march, MarchArgs, rays_o, rays_d, near, far, bitfield, seed, positions, t, dt,
                 packed, count, first, blocks, counter, n, capacity, resolution, bound, step,
                 jitter);
        },
        GilReleased(), py::arg("scalar"), py::arg("rays_o"), py::arg("rays_d"), py::arg("near"),
        py::arg("far"), py::arg("bitfield"), py::arg("seed"), py::arg("positions"), py::arg("t"),
        py::arg("dt"), py::arg("packed"), py::arg("count"), py::arg("first"),
        py::arg("blocks"), py::arg("counter"), py::arg("n"), py::arg("capacity"),
        py::arg("resolution"), py::arg("bound"), py::arg("step"), py::arg("jitter"),
        py::arg("stream"));
}

// ---- mlp ----------------------------------------------------------------------------------------
static df::MlpShape mlp_shape(const std::vector<int>& widths, bool bias, bool silu) {
  if (widths.size() < 2 || widths.size() > df::MLP_MAX_LAYERS + 1)
    throw py::value_error("expected 2 to 33 widths");
  df::MlpShape shape{int(widths.size()) - 1, {}, bias, silu};
  std::copy(widths.begin(), widths.end(), shape.width);
  return shape;
}

static void bind_mlp(py::module_& m) {
  m.def("mlp_workspace",
        [](int scalar, int64_t n, const std::vector<int>& widths, bool bias, bool silu, bool params,
           bool second) {
          int64_t size = 0;
          on_scalar_or_half(scalar, [&](auto type) {
            size = df::mlp_workspace<typename decltype(type)::type>(mlp_shape(widths, bias, silu),
                                                                    n, params, second);
          });
          return size;
        },
        py::arg("scalar"), py::arg("n"), py::arg("widths"), py::arg("bias"), py::arg("silu"),
        py::arg("params"), py::arg("second"),
        "Numbers in the workspace of mlp_backward, or of mlp_second.");
#ifdef DF_IS_CUDA
  m.def("mlp_half_fits",
        [](const std::vector<int>& widths, bool bias, bool silu) {
          return df::mlp_half_fits(mlp_shape(widths, bias, silu));
        },
        py::arg("widths"), py::arg("bias"), py::arg("silu"),
        "Whether the half kernels take a network of this shape.");
#endif
  m.def("mlp_forward",
        [](int scalar, Address x, Address params, Address out, Address count, int64_t n,
           const std::vector<int>& widths, bool bias, bool silu, Address stream) {
          LAUNCH_OR_HALF(mlp_forward, MlpArgs, x, params, {}, {}, out, {}, {}, {}, count, n,
                         mlp_shape(widths, bias, silu));
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("params"), py::arg("out"),
        py::arg("count"), py::arg("n"), py::arg("widths"), py::arg("bias"), py::arg("silu"),
        py::arg("stream"));
  m.def("mlp_backward",
        [](int scalar, Address x, Address params, Address grad_out, Address grad_x,
           Address grad_params, Address workspace, Address count, int64_t n,
           const std::vector<int>& widths, bool bias, bool silu, Address stream) {
          LAUNCH_OR_HALF(mlp_backward, MlpArgs, x, params, grad_out, {}, {}, grad_x, grad_params,
                         workspace, count, n, mlp_shape(widths, bias, silu));
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("params"), py::arg("grad_out"),
        py::arg("grad_x"), py::arg("grad_params"), py::arg("workspace"), py::arg("count"),
        py::arg("n"), py::arg("widths"), py::arg("bias"), py::arg("silu"), py::arg("stream"));
  m.def("mlp_second",
        [](int scalar, Address x, Address params, Address grad_out, Address tangent, Address out,
           Address grad_x, Address grad_params, Address workspace, Address count, int64_t n,
           const std::vector<int>& widths, bool bias, bool silu, Address stream) {
          LAUNCH(mlp_second, MlpArgs, x, params, grad_out, tangent, out, grad_x, grad_params,
                 workspace, count, n, mlp_shape(widths, bias, silu));
        },
        GilReleased(), py::arg("scalar"), py::arg("x"), py::arg("params"), py::arg("grad_out"),
        py::arg("tangent"), py::arg("out"), py::arg("grad_x"), py::arg("grad_params"),
        py::arg("workspace"), py::arg("count"), py::arg("n"), py::arg("widths"), py::arg("bias"),
        py::arg("silu"), py::arg("stream"));
}

// ---- occupancy ----------------------------------------------------------------------------------
static void bind_occupancy(py::module_& m) {
  m.def("occupancy_points",
        [](int scalar, Address seed, Address points, int resolution, double bound,
           Address stream) {
          LAUNCH(occupancy_points, OccupancyPointsArgs, seed, points, resolution, bound);
        },
        GilReleased(), py::arg("scalar"), py::arg("seed"), py::arg("points"),
        py::arg("resolution"), py::arg("bound"), py::arg("stream"));
  m.def("occupancy_update",
        [](int scalar, Address ema, Address bitfield, Address density, Address partial,
           int64_t n, int64_t chunk, double decay, double threshold, Address stream) {
          LAUNCH(occupancy_update, OccupancyUpdateArgs, ema, bitfield, density, partial, n,
                 chunk, decay, threshold);
        },
        GilReleased(), py::arg("scalar"), py::arg("ema"), py::arg("bitfield"),
        py::arg("density"), py::arg("partial"), py::arg("n"), py::arg("chunk"), py::arg("decay"),
        py::arg("threshold"), py::arg("stream"));
}

// ---- radiance -----------------------------------------------------------------------------------
static void bind_radiance(py::module_& m) {
  m.def("radiance_forward",
        [](int scalar, Address out, Address positions, Address of_x, Address sigma, Address values,
           Address gradient, Address count, int64_t n, int channels, bool cone, bool raw,
           double bias, double ceiling, double blob_density, double blob_size, double scale,
           Address stream) {
          LAUNCH_OR_HALF(radiance_forward, RadianceArgs, out, positions, of_x, {}, {}, {}, sigma,
                         values, gradient, {}, {}, count, n, channels, cone, raw, bias, ceiling,
                         blob_density, blob_size, scale);
        },
        GilReleased(), py::arg("scalar"), py::arg("out"), py::arg("positions"), py::arg("of_x"),
        py::arg("sigma"), py::arg("values"), py::arg("gradient"), py::arg("count"), py::arg("n"),
        py::arg("channels"), py::arg("cone"), py::arg("raw"), py::arg("bias"), py::arg("ceiling"),
        py::arg("blob_density"), py::arg("blob_size"), py::arg("scale"), py::arg("stream"));
  m.def("radiance_backward",
        [](int scalar, Address grad_sigma, Address grad_values, Address grad_gradient,
           Address sigma, Address values, Address grad_out, Address grad_of_x, Address count,
           int64_t n, int channels, bool raw, double ceiling, double scale, Address stream) {
          LAUNCH_OR_HALF(radiance_backward, RadianceArgs, {}, {}, {}, grad_sigma, grad_values,
                         grad_gradient, sigma, values, {}, grad_out, grad_of_x, count, n, channels,
                         false, raw, 0, ceiling, 0, 1, scale);
        },
        GilReleased(), py::arg("scalar"), py::arg("grad_sigma"), py::arg("grad_values"),
        py::arg("grad_gradient"), py::arg("sigma"), py::arg("values"), py::arg("grad_out"),
        py::arg("grad_of_x"), py::arg("count"), py::arg("n"), py::arg("channels"), py::arg("raw"),
        py::arg("ceiling"), py::arg("scale"), py::arg("stream"));
}

// ---- rays ---------------------------------------------------------------------------------------
static void bind_rays(py::module_& m) {
  m.def("generate_rays_forward",
        [](int scalar, Address c2w, Address focal, Address rays_o, Address rays_d, int64_t b,
           int64_t height, int64_t width, Address stream) {
          LAUNCH(generate_rays_forward, GenerateRaysArgs, c2w, focal, {}, {}, rays_o,
                 rays_d, {}, {}, {}, b, height, width);
        },
        GilReleased(), py::arg("scalar"), py::arg("c2w"), py::arg("focal"), py::arg("rays_o"),
        py::arg("rays_d"), py::arg("b"), py::arg("height"), py::arg("width"), py::arg("stream"));
  m.def("generate_rays_backward",
        [](int scalar, Address c2w, Address focal, Address grad_o, Address grad_d,
           Address partial, Address grad_c2w, Address grad_focal, int64_t b, int64_t height,
           int64_t width, Address stream) {
          LAUNCH(generate_rays_backward, GenerateRaysArgs, c2w, focal, grad_o, grad_d, {},
                 {}, partial, grad_c2w, grad_focal, b, height, width);
        },
        GilReleased(), py::arg("scalar"), py::arg("c2w"), py::arg("focal"), py::arg("grad_o"),
        py::arg("grad_d"), py::arg("partial"), py::arg("grad_c2w"), py::arg("grad_focal"),
        py::arg("b"), py::arg("height"), py::arg("width"), py::arg("stream"));
  m.def("ray_box_intersect_forward",
        [](int scalar, Address rays_o, Address rays_d, Address near, Address far, int64_t n,
           double bound, double min_distance, Address stream) {
          LAUNCH(ray_box_intersect_forward, RayIntersectArgs, rays_o, rays_d, {}, {}, near,
                 far, {}, {}, n, bound, min_distance);
        },
        GilReleased(), py::arg("scalar"), py::arg("rays_o"), py::arg("rays_d"), py::arg("near"),
        py::arg("far"), py::arg("n"), py::arg("bound"), py::arg("min_distance"),
        py::arg("stream"));
  m.def("ray_box_intersect_backward",
        [](int scalar, Address rays_o, Address rays_d, Address grad_near, Address grad_far,
           Address grad_o, Address grad_d, int64_t n, double bound, double min_distance,
           Address stream) {
          LAUNCH(ray_box_intersect_backward, RayIntersectArgs, rays_o, rays_d, grad_near,
                 grad_far, {}, {}, grad_o, grad_d, n, bound, min_distance);
        },
        GilReleased(), py::arg("scalar"), py::arg("rays_o"), py::arg("rays_d"),
        py::arg("grad_near"), py::arg("grad_far"), py::arg("grad_o"), py::arg("grad_d"),
        py::arg("n"), py::arg("bound"), py::arg("min_distance"), py::arg("stream"));
  m.def("ray_sphere_intersect_forward",
        [](int scalar, Address rays_o, Address rays_d, Address near, Address far, int64_t n,
           double radius, double min_distance, Address stream) {
          LAUNCH(ray_sphere_intersect_forward, RayIntersectArgs, rays_o, rays_d, {}, {},
                 near, far, {}, {}, n, radius, min_distance);
        },
        GilReleased(), py::arg("scalar"), py::arg("rays_o"), py::arg("rays_d"), py::arg("near"),
        py::arg("far"), py::arg("n"), py::arg("radius"), py::arg("min_distance"),
        py::arg("stream"));
  m.def("ray_sphere_intersect_backward",
        [](int scalar, Address rays_o, Address rays_d, Address grad_near, Address grad_far,
           Address grad_o, Address grad_d, int64_t n, double radius, double min_distance,
           Address stream) {
          LAUNCH(ray_sphere_intersect_backward, RayIntersectArgs, rays_o, rays_d, grad_near,
                 grad_far, {}, {}, grad_o, grad_d, n, radius, min_distance);
        },
        GilReleased(), py::arg("scalar"), py::arg("rays_o"), py::arg("rays_d"),
        py::arg("grad_near"), py::arg("grad_far"), py::arg("grad_o"), py::arg("grad_d"),
        py::arg("n"), py::arg("radius"), py::arg("min_distance"), py::arg("stream"));
}

// ---- spherical_harmonics ------------------------------------------------------------------------
static void bind_spherical_harmonics(py::module_& m) {
  m.def("spherical_harmonics_forward",
        [](int scalar, Address dirs, Address out, Address count, int64_t n, int degree,
           Address stream) {
          LAUNCH(spherical_harmonics_forward, SphericalHarmonicsArgs, dirs, {}, out, {}, count, n,
                 degree);
        },
        GilReleased(), py::arg("scalar"), py::arg("dirs"), py::arg("out"), py::arg("count"),
        py::arg("n"), py::arg("degree"), py::arg("stream"));
  m.def("spherical_harmonics_backward",
        [](int scalar, Address dirs, Address grad_out, Address grad_dirs, Address count,
           int64_t n, int degree, Address stream) {
          LAUNCH(spherical_harmonics_backward, SphericalHarmonicsArgs, dirs, grad_out, {},
                 grad_dirs, count, n, degree);
        },
        GilReleased(), py::arg("scalar"), py::arg("dirs"), py::arg("grad_out"),
        py::arg("grad_dirs"), py::arg("count"), py::arg("n"), py::arg("degree"),
        py::arg("stream"));
}

// ---- the modules --------------------------------------------------------------------------------
#ifndef DF_IS_CUDA
static void bind_cpu_settings(py::module_& m) {
  m.def("isa", [] { return use_v3 ? "x86-64-v3" : "portable"; }, "The instruction set in use.");
  m.def("use_isa",
        [](const std::string& name) {
          if (name != "portable" && name != "x86-64-v3")
            throw py::value_error("expected \"portable\" or \"x86-64-v3\", got \"" + name + "\"");
          if (name == "x86-64-v3" && !v3_supported())
            throw py::value_error("this machine or this build has no x86-64-v3");
          use_v3 = name == "x86-64-v3";
        },
        py::arg("name"), "Select an instruction set: for tests and benches.");
  m.def("isas", [] {
    py::list names;
    names.append("portable");
    if (v3_supported()) names.append("x86-64-v3");
    return names;
  }, "The instruction sets this machine can use.");
  m.def("max_threads", [] {
#ifdef _OPENMP
    return df::num_threads > 0 ? df::num_threads : omp_get_max_threads();
#else
    return 1;
#endif
  }, "Threads the CPU kernels run on.");
  m.def("set_num_threads",
        [](int n) {
          if (n < 0) throw py::value_error("argument `n`: expected 0 (OpenMP's number) or more");
          df::num_threads = n;
        },
        py::arg("n"), "Run the CPU kernels on n threads; 0: as many as OpenMP (torch) is set to.");
  m.def("uniform01",
        [](uint64_t seed, uint32_t a, uint32_t b) { return df::uniform01(seed, a, b); },
        py::arg("seed"), py::arg("a"), py::arg("b"),
        "The kernels' random number in [0, 1) for a seed and two counters.");
}
#endif

#ifdef DF_EMULATED
static void bind_emulation(py::module_& m) {
  m.def("use_order",
        [](const std::string& name) {
          using emulation::Order;
          if (name != "forward" && name != "reverse" && name != "shuffled")
            throw py::value_error("expected forward, reverse or shuffled, got " + name);
          emulation::order = name == "forward"   ? Order::forward
                             : name == "reverse" ? Order::reverse
                                                 : Order::shuffled;
        },
        py::arg("name"), "Run CUDA threads and blocks in this order.");
}
#endif

PYBIND11_MODULE(DF_MODULE, m) {
#ifdef DF_IS_CUDA
  m.attr("has_half") = true;  // fp16 where a stem has it: on_scalar_or_half
#ifdef DF_CUDA_ARCHITECTURES
  m.attr("architectures") = DF_CUDA_ARCHITECTURES;
#endif
#else
  m.attr("has_half") = false;
  bind_cpu_settings(m);
#endif
#ifdef DF_EMULATED
  bind_emulation(m);
#endif
  // One line a stem, alphabetical.
  bind_adam(m);
  bind_composite(m);
  bind_frequency_encode(m);
  bind_hash_encode(m);
  bind_march(m);
  bind_mlp(m);
  bind_occupancy(m);
  bind_radiance(m);
  bind_rays(m);
  bind_spherical_harmonics(m);
}
