// Calls one kernel a number of times, for tests/instructions.py to count its instructions:
//   instructions CALL TIMES       prints the compiler and the instruction set
// One thread and fixed inputs, the same with every standard library.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../csrc/kernels.h"

#if defined(__clang__)
#define COMPILER "clang", __clang_major__
#else
#define COMPILER "gcc", __GNUC__
#endif

namespace {

using namespace df;
uint32_t arrays = 0;

// As dispatch.cpp chooses (valgrind answers for the machine that it emulates); portable: of what.
const char* set_in_use() {
  if (std::strcmp(isa(), "portable") != 0) return isa();
#if defined(__x86_64__)
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "other";
#endif
}

// n numbers in [low, high), never freed.
float* numbers(int64_t n, float low = -1, float high = 1) {
  float* const p = new (std::align_val_t(64)) float[n];
  ++arrays;
  for (int64_t i = 0; i < n; ++i) p[i] = low + (high - low) * uniform01(1, arrays, uint32_t(i));
  return p;
}

void hash_encode_forward(int times) {  // L = 8, T = 2^16, 16 -> 1024
  HashEncodeArgs<float> a{};
  a.n = 4096, a.n_levels = 8, a.n_features = 2;
  for (int l = 0; l < a.n_levels; ++l) {
    const int64_t n = std::lround(16 * std::pow(64.0, l / 7.0)), rows = (n + 1) * (n + 1) * (n + 1);
    a.levels.resolution[l] = int32_t(n);
    a.levels.offset[l + 1] = a.levels.offset[l] + min<int64_t>((rows + 7) / 8 * 8, 1 << 16);
  }
  a.x = numbers(3 * a.n, 0), a.table = numbers(2 * a.levels.offset[a.n_levels]);
  a.out = numbers(a.n * 2 * a.n_levels);
  for (int i = 0; i < times; ++i) df::hash_encode_forward(a);
}

void mlp_backward(int times) {  // 32 -> 32 -> 4, relu, gradients of rows and parameters
  MlpArgs<float> a{};
  a.n = 4096, a.shape.n_layers = 2, a.shape.bias = true;
  a.shape.width[0] = a.shape.width[1] = 32, a.shape.width[2] = 4;
  const int64_t parameters = mlp_parameters(a.shape);
  a.x = numbers(32 * a.n), a.params = numbers(parameters), a.grad_out = numbers(4 * a.n);
  a.grad_x = numbers(32 * a.n), a.grad_params = numbers(parameters);
  a.workspace = numbers(mlp_workspace<float>(a.shape, a.n, true, false));
  for (int i = 0; i < times; ++i) df::mlp_backward(a);
}

void composite_backward(int times) {  // 512 rays of 32 samples, colours only, nothing left out
  CompositeArgs<float> a{};
  a.n_rays = 512, a.n_samples = 32 * a.n_rays, a.channels = 3;
  int32_t* const packed = new int32_t[2 * a.n_rays];
  for (int32_t ray = 0; ray < a.n_rays; ++ray) packed[2 * ray] = 32 * ray, packed[2 * ray + 1] = 32;
  a.packed = packed;
  a.sigma = numbers(a.n_samples, 0, 2), a.rgb = numbers(3 * a.n_samples, 0);
  a.t = numbers(a.n_samples, 1, 2), a.dt = numbers(a.n_samples, 0.1f, 0.2f);
  a.colour = numbers(3 * a.n_rays), a.opacity = numbers(a.n_rays), a.depth = numbers(a.n_rays);
  a.weights = numbers(a.n_samples), a.grad_colour = numbers(3 * a.n_rays);
  a.grad_sigma = numbers(a.n_samples), a.grad_rgb = numbers(3 * a.n_samples);
  df::composite_forward(a);
  for (int i = 0; i < times; ++i) df::composite_backward(a);
}

struct Kernel { const char* name; void (*run)(int); };
constexpr Kernel KERNELS[] = {{"hash_encode_forward", hash_encode_forward},
                              {"mlp_backward", mlp_backward},
                              {"composite_backward", composite_backward}};

}  // namespace

int main(int n, char** arguments) {
  df::set_num_threads(1);
  for (const Kernel& kernel : KERNELS) {
    if (n != 3 || std::strcmp(kernel.name, arguments[1]) != 0) continue;
    kernel.run(std::atoi(arguments[2]));
    std::printf("%s-%d %s\n", COMPILER, set_in_use());
    return 0;
  }
  std::fprintf(stderr, "usage: instructions CALL TIMES\n");
  return 2;
}
