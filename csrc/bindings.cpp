// The only pybind11 file, for every module: integer addresses and a stream in, launcher out.
// No torch here; dreamfusion_fast/ops/<stem>.py validates the tensors and passes their addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "kernels.h"
#ifdef DF_EMULATED
#include "emulation/emulation.h"
#endif

namespace py = pybind11;

// ---- what Python passes -------------------------------------------------------------------------
namespace {

// The address of an array (0: absent); becomes whichever pointer is asked for.
struct Address {
  std::uintptr_t value = 0;
  template <class T> operator T*() const { return reinterpret_cast<T*>(value); }
};

}  // namespace

namespace pybind11::detail {

template <> struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));
  bool load(handle source, bool) {
    value.value = PyLong_AsSize_t(source.ptr());
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
  }
};

template <> struct type_caster<df::HashLevels> {  // ops/hash_encode.py: _levels
  PYBIND11_TYPE_CASTER(df::HashLevels, const_name("(resolutions, offsets, scales)"));
  bool load(handle source, bool) {
    const auto [resolutions, offsets, scales] =
        source.cast<std::tuple<std::vector<int32_t>, std::vector<int64_t>, std::vector<float>>>();
    if (resolutions.size() > df::HASH_MAX_LEVELS || offsets.size() != resolutions.size() + 1)
      throw value_error("expected 1 to 32 resolutions and one more offset");
    if (!scales.empty() && scales.size() != resolutions.size())
      throw value_error("expected no scale or one for each resolution");
    value = {};
    std::copy(resolutions.begin(), resolutions.end(), value.resolution);
    std::copy(offsets.begin(), offsets.end(), value.offset);
    std::copy(scales.begin(), scales.end(), value.scale);
    return true;
  }
};

template <> struct type_caster<df::MlpShape> {
  PYBIND11_TYPE_CASTER(df::MlpShape, const_name("(widths, bias, silu)"));
  bool load(handle source, bool) {
    const auto [widths, bias, silu] = source.cast<std::tuple<std::vector<int>, bool, bool>>();
    if (widths.size() < 2 || widths.size() > df::MLP_MAX_LAYERS + 1)
      throw value_error("expected 2 to 33 widths");
    value = {int(widths.size()) - 1, {}, bias, silu};
    std::copy(widths.begin(), widths.end(), value.width);
    return true;
  }
};

}  // namespace pybind11::detail

// ---- from Args to a Python function -------------------------------------------------------------
namespace {

// How a field of Args comes from Python: a pointer as its address.
template <class Field>
using Passed = std::conditional_t<std::is_pointer_v<Field>, Address, Field>;

// "sigma, lit.normal" -> {"sigma", "normal"}
template <size_t N> std::array<std::string, N> names_of(std::string text) {
  std::array<std::string, N> names;
  for (std::string& name : names) {
    const size_t comma = std::min(text.find(", "), text.size());
    name = text.substr(0, comma);
    name.erase(0, name.rfind('.') + 1);
    text.erase(0, comma + 2);
  }
  return names;
}

// Defines m.name(scalar, fields..., stream), of which scalar says whose fields they are (0 float,
// 1 double, 2 half: ops/_backend.py). Kinds: what FIELDS makes of Args for each of these.
template <class Launch, class... Field, class... Kinds>
void bind_fields(py::module_& m, const char* name, const char* fields, Launch launch,
                 std::tuple<Field&...>, Kinds...) {
  const auto call = [launch](int scalar, Passed<Field>... passed, Address stream) {
    int kind = 0;
    const auto launch_if_meant = [&](auto args) {
      if (kind++ != scalar) return;
      args.fields() = std::tie(passed...);
      launch(args, stream);
    };
    (launch_if_meant(Kinds{}), ...);
    if (scalar >= kind) throw py::value_error("this kernel has no half precision");
  };
  const auto names = names_of<sizeof...(Field)>(fields);
  const auto define = [&](const auto&... of) {
    m.def(name, call, py::call_guard<py::gil_scoped_release>(), py::arg("scalar"),
          py::arg(of.c_str())..., py::arg("stream"));
  };
  std::apply(define, names);
}
template <class Launch, class Kind, class... Kinds>
void bind(py::module_& m, const char* name, const char* fields, Launch launch, Kind kind,
          Kinds... kinds) {
  bind_fields(m, name, fields, launch, kind.fields(), kind, kinds...);
}

}  // namespace

// KERNEL(name, Args, fields...) makes the launcher df::name a Python function of these fields of
// Args, in this order; what is not among them is zero. KERNEL_OR_HALF: on CUDA in float16 too.
#define KERNEL(name, Args, ...) \
  BIND(name, #__VA_ARGS__, FIELDS(float, Args, __VA_ARGS__), FIELDS(double, Args, __VA_ARGS__))
#ifdef DF_IS_CUDA
#define KERNEL_OR_HALF(name, Args, ...)                                                         \
  BIND(name, #__VA_ARGS__, FIELDS(float, Args, __VA_ARGS__), FIELDS(double, Args, __VA_ARGS__), \
       FIELDS(half, Args, __VA_ARGS__))
#else
#define KERNEL_OR_HALF KERNEL
#endif
#define BIND(name, fields, ...) \
  bind(m, #name, fields, [](const auto& args, df::Stream s) { df::name(args, s); }, __VA_ARGS__)
// An Args<T> of zeros and a tuple of references to some of its fields.
#define FIELDS(T, Args, ...)                                                         \
  [] {                                                                               \
    struct Kind : df::Args<T> { auto fields() { return std::tie(__VA_ARGS__); } };   \
    return Kind{};                                                                   \
  }()

// One block a stem, alphabetical.
static void bind_kernels(py::module_& m) {
  KERNEL(adam_step, AdamArgs, param, grad, exp_avg, exp_avg_sq, step, skipped, rate, loss_scale,
         param_half, found, factors, step_is_int64, n, lr, beta1, beta2, eps, grad_scale);
  m.attr("ADAM_FACTORS") = df::ADAM_FACTORS;

  KERNEL(composite_forward, CompositeArgs, sigma, rgb, t, dt, packed, colour, opacity, depth,
         weights, n_rays, n_samples, channels, early_stop);
  KERNEL(composite_backward, CompositeArgs, sigma, rgb, t, dt, packed, grad_colour, grad_opacity,
         grad_depth, grad_weights, weights, grad_sigma, grad_rgb, grad_t, grad_dt, n_rays,
         n_samples, channels, early_stop);
  KERNEL(composite_lit_forward, CompositeArgs, sigma, rgb, lit.gradient, t, dt, packed, lit.rays_o,
         lit.rays_d, lit.shading, colour, opacity, depth, weights, lit.normal, lit.orientation,
         n_rays, n_samples, channels, lit.rays_per_view, early_stop);
  KERNEL(composite_lit_backward, CompositeArgs, sigma, rgb, lit.gradient, t, dt, packed, lit.rays_o,
         lit.rays_d, lit.shading, grad_colour, grad_opacity, grad_depth, grad_weights,
         lit.grad_normal, lit.grad_orientation, weights, grad_sigma, grad_rgb, lit.grad_gradient,
         grad_t, grad_dt, n_rays, n_samples, channels, lit.rays_per_view, early_stop);

  KERNEL(frequency_encode_forward, FrequencyEncodeArgs, x, variance, out, count, n, dims,
         n_frequencies);
  KERNEL(frequency_encode_backward, FrequencyEncodeArgs, x, variance, grad_out, grad_x,
         grad_variance, count, n, dims, n_frequencies);
  KERNEL(frequency_encode_second, FrequencyEncodeArgs, x, variance, grad_out, u, q, grad_grad_out,
         grad_x, grad_variance, count, n, dims, n_frequencies);

  KERNEL_OR_HALF(hash_encode_forward, HashEncodeArgs, x, table, out, count, n, n_levels, n_features,
                 smoothstep, staggered, levels);
  KERNEL_OR_HALF(hash_encode_backward, HashEncodeArgs, x, table, grad_out, grad_x, grad_table,
                 count, n, n_levels, n_features, smoothstep, staggered, levels);
  KERNEL_OR_HALF(hash_encode_second, HashEncodeArgs, x, table, grad_out, tangent, out, grad_x,
                 grad_table, count, n, n_levels, n_features, smoothstep, staggered, levels);

  KERNEL(march, MarchArgs, rays_o, rays_d, near, far, bitfield, seed, limit, positions, t, dt,
         packed, count, first, blocks, counter, n, capacity, first_ray, resolution, bound, step,
         jitter);

  KERNEL_OR_HALF(mlp_forward, MlpArgs, x, params, out, count, n, shape);
  KERNEL_OR_HALF(mlp_backward, MlpArgs, x, params, grad_out, grad_x, grad_params, workspace, count,
                 n, shape);
  KERNEL(mlp_second, MlpArgs, x, params, grad_out, tangent, out, grad_x, grad_params, workspace,
         count, n, shape);
  m.def("mlp_workspace",
        [](int scalar, int64_t n, const df::MlpShape& shape, bool params, bool second) {
          if (scalar == 0) return df::mlp_workspace<float>(shape, n, params, second);
          if (scalar == 1) return df::mlp_workspace<double>(shape, n, params, second);
          return int64_t(0);  // half
        },
        py::arg("scalar"), py::arg("n"), py::arg("shape"), py::arg("params"), py::arg("second"),
        "Numbers in the workspace of mlp_backward, or of mlp_second.");
#ifdef DF_IS_CUDA
  m.def("mlp_half_fits", &df::mlp_half_fits, py::arg("shape"),
        "Whether the half kernels take a network of this shape.");
#endif

  KERNEL(occupancy_points, OccupancyPointsArgs, seed, points, resolution, bound);
  KERNEL(occupancy_update, OccupancyUpdateArgs, ema, bitfield, density, partial, n, chunk, decay,
         threshold);

  KERNEL_OR_HALF(radiance_forward, RadianceArgs, out, positions, of_x, sigma, values, gradient,
                 count, n, channels, cone, raw, bias, ceiling, blob_density, blob_size, scale);
  KERNEL_OR_HALF(radiance_backward, RadianceArgs, grad_sigma, grad_values, grad_gradient, sigma,
                 values, grad_out, grad_of_x, count, n, channels, raw, ceiling, scale);

  KERNEL(generate_rays_forward, GenerateRaysArgs, c2w, focal, rays_o, rays_d, b, height, width);
  KERNEL(generate_rays_backward, GenerateRaysArgs, c2w, focal, grad_o, grad_d, partial, grad_c2w,
         grad_focal, b, height, width);
  KERNEL(ray_box_intersect_forward, RayIntersectArgs, rays_o, rays_d, near, far, n, size,
         min_distance);
  KERNEL(ray_box_intersect_backward, RayIntersectArgs, rays_o, rays_d, grad_near, grad_far, grad_o,
         grad_d, n, size, min_distance);
  KERNEL(ray_sphere_intersect_forward, RayIntersectArgs, rays_o, rays_d, near, far, n, size,
         min_distance);
  KERNEL(ray_sphere_intersect_backward, RayIntersectArgs, rays_o, rays_d, grad_near, grad_far,
         grad_o, grad_d, n, size, min_distance);

  KERNEL(spherical_harmonics_forward, SphericalHarmonicsArgs, dirs, out, count, n, degree);
  KERNEL(spherical_harmonics_backward, SphericalHarmonicsArgs, dirs, grad_out, grad_dirs, count, n,
         degree);
}

// ---- the modules --------------------------------------------------------------------------------
#ifdef DF_IS_HOST
static void bind_cpu_settings(py::module_& m) {
  m.def("isa", df::isa, "The instruction set in use.");
  m.def("use_isa", df::use_isa, py::arg("name"),
        "Select an instruction set: for tests and benches.");
  m.def("isas", df::isas, "The instruction sets this machine can use.");
  m.def("max_threads", df::max_threads, "Threads the CPU kernels run on.");
  m.def("set_num_threads", df::set_num_threads, py::arg("n"),
        "Run the CPU kernels on n threads; 0: as many as OpenMP (torch) is set to.");
  m.def("keep_memory", [] {
#ifdef __GLIBC__
    return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
    return false;
#endif
  },
        "Keep freed memory, of large tensors too, for the process's next allocations: each step of a\n"
        "training run would else ask the system for the same pages again, and wait while it clears\n"
        "them. For good, and for the whole process, whose memory then never shrinks. Returns whether\n"
        "the C library can (glibc); else nothing changes.");
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
  bind_kernels(m);
#ifdef DF_IS_HOST
  m.attr("has_half") = false;
  bind_cpu_settings(m);
#else
  m.attr("has_half") = true;  // KERNEL_OR_HALF
#endif
#ifdef DF_CUDA_ARCHITECTURES
  m.attr("architectures") = DF_CUDA_ARCHITECTURES;
#endif
#ifdef DF_EMULATED
  bind_emulation(m);
#endif
}
