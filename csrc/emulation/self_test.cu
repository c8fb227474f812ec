// Small kernels that show that the emulation does what CUDA does (works_...), and that it reports
// what CUDA leaves undefined (bad_...; race_... by ThreadSanitizer). tests/test_emulation.py runs
// and reads them.
//   emulation_test [NAME [forward|reverse|shuffled]]  one line a test; 1 if one fails
//   emulation_test to_half | from_half                stdin to stdout, binary
// Without a name: every works_. Those run on a GPU too, where they check gpu.h's instructions,
// above all the lane mapping of mma:
//   nvcc -std=c++17 -DDF_ISA=cuda -DDF_IS_CUDA -arch=native csrc/emulation/self_test.cu
#include "../gpu.h"

#include <cstring>
#include <functional>
#include <map>
#include <vector>

namespace df {
namespace DF_ISA {
namespace {

template <class T> struct Array {  // n zeros that host and device see
  T* p = nullptr;
  explicit Array(size_t n) {
#if defined(__CUDACC__)
    check(cudaMallocManaged(&p, n * sizeof(T)), "Array");
#else
    p = static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64));
#endif
    std::memset(static_cast<void*>(p), 0, n * sizeof(T));
  }
  Array(const Array&) = delete;
  T& operator[](size_t i) { return p[i]; }
#if defined(__CUDACC__)
  ~Array() { cudaFree(p); }
#else
  ~Array() { std::free(p); }
#endif
};

template <class... P, class... A>
void run(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
         const A&... arguments) {
  launch(name, kernel, grid, block, shared, nullptr, arguments...);
#if defined(__CUDACC__)
  check(cudaDeviceSynchronize(), name);
#endif
}

void expect(double got, double want, const std::string& what) {
  if (got != want)
    throw std::runtime_error(what + ": got " + std::to_string(got) + ", expected " +
                             std::to_string(want));
}

// ---- what works ---------------------------------------------------------------------------------
template <class T> __global__ void shuffle_kernel(T* out) {
  const int i = threadIdx.x, lane = lane_id();
  const T x = T(10 * i);
  out[6 * i] = __shfl_sync(FULL_WARP, x, (7 * lane + 3) % 32);
  out[6 * i + 1] = __shfl_xor_sync(FULL_WARP, x, 5);
  out[6 * i + 2] = __shfl_up_sync(FULL_WARP, x, 3);
  out[6 * i + 3] = __shfl_down_sync(FULL_WARP, x, 9);
  out[6 * i + 4] = warp_sum(x);
  const unsigned half_warp = lane < 16 ? 0xffffu : 0xffff0000u;  // two collectives at once
  out[6 * i + 5] = __shfl_xor_sync(half_warp, x, 15);
}
template <class T> void works_shuffle() {
  Array<T> out(6 * 64);
  run("shuffle_kernel", shuffle_kernel<T>, 1, 64, 0, out.p);
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, first = i - lane;
    expect(out[6 * i], 10 * (first + (7 * lane + 3) % 32), "__shfl_sync");
    expect(out[6 * i + 1], 10 * (i ^ 5), "__shfl_xor_sync");
    expect(out[6 * i + 2], 10 * (lane >= 3 ? i - 3 : i), "__shfl_up_sync");
    expect(out[6 * i + 3], 10 * (lane + 9 < 32 ? i + 9 : i), "__shfl_down_sync");
    expect(out[6 * i + 4], 10 * (32 * first + 31 * 16), "warp_sum");
    expect(out[6 * i + 5], 10 * (i ^ 15), "half a warp's __shfl_xor_sync");
  }
}
void works_shuffles() {
  works_shuffle<int>();
  works_shuffle<float>();
  works_shuffle<double>();
}

__global__ void vote_kernel(unsigned* out) {
  const unsigned lane = lane_id(), low = 0xfffffu;  // 20 lanes
  out[6 * lane] = __ballot_sync(FULL_WARP, lane % 3 == 0);
  out[6 * lane + 1] = __any_sync(FULL_WARP, lane == 31);
  out[6 * lane + 2] = __all_sync(FULL_WARP, lane != 31);
  if (lane >= 20) return;
  out[6 * lane + 3] = __ballot_sync(low, lane % 2);
  out[6 * lane + 4] = __any_sync(low, lane > 30);
  out[6 * lane + 5] = __all_sync(low, lane < 20);
}
void works_votes() {
  Array<unsigned> out(6 * 32);
  run("vote_kernel", vote_kernel, 1, 32, 0, out.p);
  for (int lane = 0; lane < 32; ++lane) {
    const unsigned want[6] = {0x49249249u, 1, 0, 0xaaaaau, 0, 1};
    for (int k = 0; k < (lane < 20 ? 6 : 3); ++k)
      expect(out[6 * lane + k], want[k], "vote " + std::to_string(k));
  }
}

constexpr int BLOCK = 96, BLOCKS = 3;
__global__ void barrier_kernel(int* out) {  // the sum over a block, by halves
  DF_SHARED(int, sums, 128);
  const int i = threadIdx.x;
  sums[i] = int(blockIdx.x) * 1000 + i;
  if (i < 128 - BLOCK) sums[BLOCK + i] = 0;
  for (int half = 64; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) sums[i] += sums[i + half];
  }
  __syncthreads();
  out[global_thread()] = sums[0];
}
void works_barriers() {
  Array<int> out(BLOCK * BLOCKS);
  run("barrier_kernel", barrier_kernel, BLOCKS, BLOCK, 0, out.p);
  for (int i = 0; i < BLOCK * BLOCKS; ++i)
    expect(out[i], i / BLOCK * 1000 * BLOCK + BLOCK * (BLOCK - 1) / 2, "a block's sum");
}

__global__ void dynamic_kernel(double* out, int n) {  // reversed, by way of dynamic shared memory
  DF_DYNAMIC_SHARED(double, values);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[n - 1 - threadIdx.x];
}
void works_dynamic_shared() {
  Array<double> out(70);
  run("dynamic_kernel", dynamic_kernel, 1, 70, 70 * sizeof(double), out.p, 70);
  for (int i = 0; i < 70; ++i) expect(out[i], 69 - i, "dynamic shared memory");
}

__global__ void warp_sync_kernel(int* out) {  // each warp by itself, some more often than others
  DF_SHARED(int, values, 96);
  const int i = threadIdx.x, warp = i / WARP, lane = lane_id();
  int x = i;
  for (int k = 0; k <= warp; ++k) {
    values[i] = x;
    __syncwarp(FULL_WARP);
    x = values[warp * WARP + (lane + 1) % WARP];
    __syncwarp(FULL_WARP);
  }
  out[i] = x;
}
void works_warp_sync() {
  Array<int> out(96);
  run("warp_sync_kernel", warp_sync_kernel, 1, 96, 0, out.p);
  for (int i = 0; i < 96; ++i)
    expect(out[i], i / 32 * 32 + (i % 32 + i / 32 + 1) % 32, "a rotation within a warp");
}

__global__ void atomic_kernel(float* f, double* d, int* n, unsigned* bits) {
  const int i = int(global_thread());
  atomicAdd(f, 1.0f);
  red_add(f + 1, 2.0f);
  red_add(d, 0.5);
  const float four[4] = {1, 2, 3, 4};
  red_add_vector<4>(f + 4, four);
  red_add_vector<2>(f + 2, four);
  const int ticket = atomicAdd(n, 1);  // every value once
  atomicOr(bits + ticket / 32, 1u << ticket % 32);
  atomicMax(n + 1, (i * 7) % 64);
}
void works_atomics() {
  Array<float> f(8);
  Array<double> d(1);
  Array<int> n(2);
  Array<unsigned> bits(2);
  run("atomic_kernel", atomic_kernel, 2, 32, 0, f.p, d.p, n.p, bits.p);
  const float want[8] = {64, 128, 64, 128, 64, 128, 192, 256};
  for (int k = 0; k < 8; ++k) expect(f[k], want[k], "float sum " + std::to_string(k));
  expect(d[0], 32, "double sum");
  expect(n[0], 64, "counter");
  expect(n[1], 63, "maximum");
  expect(bits[0] & bits[1], ~0u, "tickets");
}

// One product, each lane's registers filled from, and written to, plain matrices.
__global__ void mma_kernel(const half* a, const half* b, float* d) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const half pair[2] = {a[16 * (g + 8 * (i % 2)) + 2 * t + 8 * (i / 2)],
                          a[16 * (g + 8 * (i % 2)) + 2 * t + 8 * (i / 2) + 1]};
    memcpy(&fa[i], pair, 4);
  }
  for (int i = 0; i < 2; ++i) {
    const half pair[2] = {b[8 * (2 * t + 8 * i) + g], b[8 * (2 * t + 8 * i + 1) + g]};
    memcpy(&fb[i], pair, 4);
  }
  float fd[4];
  for (int i = 0; i < 4; ++i) fd[i] = d[8 * (g + 8 * (i / 2)) + 2 * t + i % 2];
  mma_16x8x16(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = fd[i];
}
void works_mma() {
  Array<half> a(16 * 16), b(16 * 8);
  Array<float> d(16 * 8);
  float want[16 * 8];  // small integers: exact in any order
  for (int i = 0; i < 256; ++i) a[i] = __float2half_rn(float((i * 37 + i / 16) % 61 - 30));
  for (int i = 0; i < 128; ++i) b[i] = __float2half_rn(float((i * 23 + i / 8) % 53 - 26));
  for (int i = 0; i < 128; ++i) {
    want[i] = d[i] = float(i % 7);
    for (int k = 0; k < 16; ++k)
      want[i] += __half2float(a[16 * (i / 8) + k]) * __half2float(b[8 * k + i % 8]);
  }
  run("mma_kernel", mma_kernel, 1, 32, 0, a.p, b.p, d.p);
  for (int i = 0; i < 128; ++i)
    expect(d[i], want[i], "mma row " + std::to_string(i / 8) + " column " + std::to_string(i % 8));
}

__global__ void index_kernel(unsigned* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + i] += 1;
}
void works_indices() {
  Array<unsigned> out(24 * 30);
  run("index_kernel", index_kernel, dim3(2, 3, 4), dim3(5, 3, 2), 0, out.p);
  for (int i = 0; i < 24 * 30; ++i) expect(out[i], 1, "visits of an index");
}

#if defined(DF_EMULATED)
// ---- what is reported ---------------------------------------------------------------------------
__global__ void divergent_kernel(int) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void early_return_kernel(int n) {
  if (int(threadIdx.x) >= n) return;
  __syncthreads();
}
__global__ void missing_lane_kernel(int lane) {
  if (lane_id() == lane) return;
  __shfl_xor_sync(FULL_WARP, 1.0f, 1);
}
__global__ void waiting_warp_kernel(int) {  // one warp at a barrier, the other waits for a lane
  if (threadIdx.x >= 32) __syncthreads();
  else if (threadIdx.x > 0) __syncwarp(FULL_WARP);
}
__global__ void outside_mask_kernel(int source) {
  if (lane_id() < 8) __shfl_sync(0xffu, 1, source);
}
__global__ void not_in_mask_kernel(int) { __ballot_sync(0x7fffffffu, 1); }
__global__ void two_masks_kernel(int) {
  if (lane_id() < 16) __syncwarp(lane_id() < 8 ? 0xffffu : 0xff00u);
}
__global__ void misaligned_reduction_kernel(float* p) {
  const float four[4] = {};
  red_add_vector<4>(p + 1, four);
}
__global__ void misaligned_load_kernel(float* p) {
  p[0] = reinterpret_cast<const float4*>(p + 1)->x;
}
__global__ void static_overrun_kernel(float* p) {
  DF_SHARED(float, values, 32);
  values[threadIdx.x] = 0;
  p[0] = values[threadIdx.x + 1];
}
__global__ void dynamic_overrun_kernel(float*) {
  DF_DYNAMIC_SHARED(float, values);
  values[threadIdx.x] = 0;
}
__global__ void global_overrun_kernel(float* p) { p[threadIdx.x] = 0; }
__global__ void unwritten_shared_kernel(float* p) {
  DF_SHARED(float, values, 4);
  p[0] = values[3];
}

template <int N> __global__ void two_kinds_kernel(int* out) {
  DF_SHARED(int, fixed, N);
  DF_DYNAMIC_SHARED(int, given);
  fixed[threadIdx.x] = given[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = fixed[threadIdx.x] + given[threadIdx.x];
}
void two_kinds(size_t dynamic_bytes) {  // beside 8 KiB of the static kind
  Array<int> out(32);
  run("two_kinds_kernel", two_kinds_kernel<2048>, 1, 32, dynamic_bytes, out.p);
  for (int i = 0; i < 32; ++i) expect(out[i], 2 * i, "two_kinds");
}
void works_shared_of_two_kinds() {
  two_kinds(4 * 1024);
  two_kinds(44 * 1024);  // together more than a card grants to who does not ask
}
void bad_shared_of_two_kinds() { two_kinds(222 * 1024); }

void bad_divergent_barrier() { run("divergent_kernel", divergent_kernel, 1, 32, 0, 0); }
void bad_return_before_barrier() { run("early_return_kernel", early_return_kernel, 1, 64, 0, 63); }
void bad_missing_lane() { run("missing_lane_kernel", missing_lane_kernel, 1, 32, 0, 5); }
void bad_partial_warp() { run("missing_lane_kernel", missing_lane_kernel, 1, 24, 0, 32); }
void bad_waiting_warp() { run("waiting_warp_kernel", waiting_warp_kernel, 1, 64, 0, 0); }
void bad_outside_mask() { run("outside_mask_kernel", outside_mask_kernel, 1, 32, 0, 9); }
void bad_not_in_mask() { run("not_in_mask_kernel", not_in_mask_kernel, 1, 32, 0, 0); }
void bad_two_masks() { run("two_masks_kernel", two_masks_kernel, 1, 32, 0, 0); }
void bad_configuration() { run("divergent_kernel", divergent_kernel, 1, 1025, 0, 0); }
template <void (*kernel)(float*)> void bad_memory(const char* name, int threads, int bytes = 0) {
  Array<float> p(16);
  run(name, kernel, 1, threads, bytes, p.p);
}
void bad_misaligned_reduction() {
  bad_memory<misaligned_reduction_kernel>("misaligned_reduction_kernel", 1);
}
void bad_misaligned_load() { bad_memory<misaligned_load_kernel>("misaligned_load_kernel", 1); }
void bad_static_overrun() { bad_memory<static_overrun_kernel>("static_overrun_kernel", 32); }
void bad_dynamic_overrun() { bad_memory<dynamic_overrun_kernel>("dynamic_overrun_kernel", 9, 32); }
void bad_global_overrun() { bad_memory<global_overrun_kernel>("global_overrun_kernel", 17); }
void bad_unwritten_shared() {
  Array<float> p(1);
  run("unwritten_shared_kernel", unwritten_shared_kernel, 1, 1, 0, p.p);
  if (p[0] != p[0]) throw std::runtime_error("unwritten shared memory is NaN");
}

// ---- races: silent but for ThreadSanitizer ------------------------------------------------------
constexpr int NONE = 0, BLOCK_WIDE = 1, WARP_WIDE = 2, SHUFFLE = 3;
template <int SYNC> __device__ void synchronise() {
  if (SYNC == BLOCK_WIDE) __syncthreads();
  if (SYNC == WARP_WIDE) __syncwarp(FULL_WARP);
  if (SYNC == SHUFFLE) __shfl_xor_sync(FULL_WARP, 1, 1);
}
// Each thread writes, reads its neighbour's, writes again: right with the same SYNC in between.
template <int BEFORE_READ, int AFTER_READ> __global__ void neighbour_kernel(int* out) {
  DF_SHARED(int, values, 32);
  values[threadIdx.x] = 1;
  synchronise<BEFORE_READ>();
  const int x = values[(threadIdx.x + 1) % 32];
  synchronise<AFTER_READ>();
  values[threadIdx.x] = 2;
  out[global_thread()] = x + values[threadIdx.x];
}
template <int SYNC> __global__ void add_kernel(int* out) {  // blocks are never ordered
  synchronise<SYNC>();
  if (threadIdx.x == 0) *out += 1;
  synchronise<SYNC>();
}
template <void (*kernel)(int*)> void race() {
  Array<int> out(64);
  run("race", kernel, 2, 32, 0, out.p);
}
void works_no_race() {
  race<neighbour_kernel<BLOCK_WIDE, BLOCK_WIDE>>();
  race<neighbour_kernel<WARP_WIDE, WARP_WIDE>>();
  race<neighbour_kernel<BLOCK_WIDE, WARP_WIDE>>();
}
void race_no_barrier() { race<neighbour_kernel<NONE, BLOCK_WIDE>>(); }
void race_no_second_barrier() { race<neighbour_kernel<BLOCK_WIDE, NONE>>(); }
void race_no_warp_sync() { race<neighbour_kernel<NONE, WARP_WIDE>>(); }
void race_no_second_warp_sync() { race<neighbour_kernel<WARP_WIDE, NONE>>(); }
void race_shuffle_is_no_barrier() { race<neighbour_kernel<SHUFFLE, SHUFFLE>>(); }
void race_between_blocks() { race<add_kernel<NONE>>(); }
void race_barrier_orders_no_blocks() { race<add_kernel<BLOCK_WIDE>>(); }
void race_warp_sync_orders_no_blocks() { race<add_kernel<WARP_WIDE>>(); }

// Applies f to each A on stdin.
template <class A, class B, class F> int convert(const F& f) {
  A in;
  while (std::fread(&in, sizeof in, 1, stdin) == 1) {
    const B out = f(in);
    std::fwrite(&out, sizeof out, 1, stdout);
  }
  return 0;
}
#endif

#define DF_TEST(name) {#name, name}
const std::map<std::string, std::function<void()>> tests = {
    DF_TEST(works_atomics), DF_TEST(works_barriers), DF_TEST(works_dynamic_shared),
    DF_TEST(works_indices), DF_TEST(works_mma), DF_TEST(works_shared_of_two_kinds),
    DF_TEST(works_shuffles), DF_TEST(works_votes), DF_TEST(works_warp_sync),
#if defined(DF_EMULATED)
    DF_TEST(bad_configuration), DF_TEST(bad_divergent_barrier), DF_TEST(bad_dynamic_overrun),
    DF_TEST(bad_global_overrun), DF_TEST(bad_misaligned_load), DF_TEST(bad_misaligned_reduction),
    DF_TEST(bad_missing_lane), DF_TEST(bad_not_in_mask), DF_TEST(bad_outside_mask),
    DF_TEST(bad_partial_warp), DF_TEST(bad_return_before_barrier), DF_TEST(bad_static_overrun),
    DF_TEST(bad_shared_of_two_kinds), DF_TEST(bad_two_masks), DF_TEST(bad_unwritten_shared),
    DF_TEST(bad_waiting_warp),
    DF_TEST(race_barrier_orders_no_blocks), DF_TEST(race_between_blocks), DF_TEST(race_no_barrier),
    DF_TEST(race_no_second_barrier), DF_TEST(race_no_second_warp_sync), DF_TEST(race_no_warp_sync),
    DF_TEST(race_shuffle_is_no_barrier), DF_TEST(race_warp_sync_orders_no_blocks),
    DF_TEST(works_no_race),
#endif
};

bool passes(const std::string& name) {
  try {
    tests.at(name)();
    std::printf("%s: ok\n", name.c_str());
    return true;
  } catch (const std::exception& error) {
    std::printf("%s: %s\n", name.c_str(), error.what());
    return false;
  }
}

int main_of(const std::vector<std::string>& arguments) {
  const std::string name = arguments.empty() ? "" : arguments[0];
#if defined(DF_EMULATED)
  if (name == "to_half") return convert<float, uint16_t>([](float x) { return half(x).bits; });
  if (name == "from_half")
    return convert<uint16_t, float>([](uint16_t bits) {
      half h;
      h.bits = bits;
      return float(h);
    });
  if (arguments.size() > 1)
    emulation::order = arguments[1] == "reverse"    ? emulation::Order::reverse
                       : arguments[1] == "shuffled" ? emulation::Order::shuffled
                                                    : emulation::Order::forward;
#endif
  bool ok = true;
  for (const auto& [test, function] : tests)
    if (name.empty() ? test.rfind("works_", 0) == 0 : test == name) ok = passes(test) && ok;
  // After an error the next launch is well.
  if (name.rfind("bad_", 0) == 0) passes("works_barriers");
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace DF_ISA
}  // namespace df

int main(int n, char** arguments) { return df::main_of({arguments + 1, arguments + n}); }
