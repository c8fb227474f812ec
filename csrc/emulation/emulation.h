// CUDA on the CPU, for tests: what csrc/*.cu use of it, run by fibers on one OS thread.
//
// Every CUDA thread runs on its own until it reaches a barrier or a warp collective, in one of
// three orders (forward, reverse, shuffled) of threads and of blocks. Reported as an error that
// names the kernel: threads of a block waiting at different barriers, or at one that others will
// never reach; collectives whose mask names lanes that never come, or lanes that are not in it; a
// shuffle that reads such a lane; pointers that are not aligned for a vector access.
// Shared memory is one heap block an array, filled with 0xff, so that AddressSanitizer sees its
// ends; under ThreadSanitizer each CUDA thread is a thread, ordered only by barriers.
//
// Limits: no memory model beyond barriers (a missing fence goes unseen); no asynchronous copies; no
// streams (a launch is over when it returns); sums by atomics come in the run order, not in a
// GPU's; expf and its kin are the host's. mma adds in order of k, in float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulation {

struct Context { uint3 thread, block; dim3 block_dim, grid_dim; };
extern const Context* current;  // the running CUDA thread's

enum class Order { forward, reverse, shuffled };
extern Order order;

// Runs a grid of blocks; body is the kernel with its arguments. asked: whether the launch has asked
// for more shared memory than a card grants to everyone. Throws std::runtime_error.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, bool asked,
         const std::function<void()>& body);

struct Site { const char* file; int line; };  // where in a kernel
void barrier(Site site);
void sync_warp(unsigned mask, Site site);
// Gives every lane of the mask the values of all (bytes a lane, in `all`: 32 * bytes).
void exchange(unsigned mask, Site site, const void* value, size_t bytes, void* all);
// The address of a shared array of this block, by the key of its declaration; null key: dynamic.
void* shared(const void* key, size_t bytes);
void fail(const char* what, Site site);  // does not return to the kernel
void check_aligned(const void* p, size_t bytes);

template <class T> T shuffle(unsigned mask, Site site, T value, int source) {
  T all[32];
  exchange(mask, site, &value, sizeof value, all);
  if (!(mask >> source & 1)) fail("a shuffle reads a lane that is not in its mask", site);
  return all[source];
}
inline int lane() { return int(current->thread.x % 32); }
inline unsigned ballot(unsigned mask, Site site, bool predicate) {
  uint8_t all[32], mine = predicate;
  exchange(mask, site, &mine, 1, all);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned((mask >> i & 1) && all[i]) << i;
  return bits;
}
template <class T> T from_below(unsigned mask, Site site, T v, unsigned n) {
  return shuffle(mask, site, v, lane() >= int(n) ? lane() - int(n) : lane());
}
template <class T> T from_above(unsigned mask, Site site, T v, unsigned n) {
  return shuffle(mask, site, v, lane() + n < 32 ? lane() + int(n) : lane());
}

template <class T, class F> T atomic_update(T* p, const F& f) {
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do next = f(old);
  while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block)
#define blockDim (emulation::current->block_dim)
#define gridDim (emulation::current->grid_dim)

#define DF_SITE emulation::Site{__FILE__, __LINE__}
#define __syncthreads() emulation::barrier(DF_SITE)
#define __syncwarp(mask) emulation::sync_warp(mask, DF_SITE)
#define __shfl_sync(mask, v, source) emulation::shuffle(mask, DF_SITE, v, (source) & 31)
#define __shfl_xor_sync(mask, v, bits) \
  emulation::shuffle(mask, DF_SITE, v, (emulation::lane() ^ (bits)) & 31)
#define __shfl_up_sync(mask, v, n) emulation::from_below(mask, DF_SITE, v, n)
#define __shfl_down_sync(mask, v, n) emulation::from_above(mask, DF_SITE, v, n)
#define __ballot_sync(mask, p) emulation::ballot(mask, DF_SITE, p)
#define __any_sync(mask, p) (emulation::ballot(mask, DF_SITE, p) != 0)
#define __all_sync(mask, p) (emulation::ballot(mask, DF_SITE, p) == unsigned(mask))

#define DF_SHARED(T, name, count)  \
  static const char name##_key = 0; \
  T* const name = static_cast<T*>(emulation::shared(&name##_key, sizeof(T) * (count)))
#define DF_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emulation::shared(nullptr, 0))

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
template <class T> T __ldg(const T* p) { return *p; }

template <class T, class U> T atomicAdd(T* p, U x) {
  return emulation::atomic_update(p, [x](T old) { return T(old + x); });
}
template <class T> T atomicMax(T* p, T x) {
  return emulation::atomic_update(p, [x](T old) { return old < x ? x : old; });
}
template <class T> T atomicOr(T* p, T x) {
  return emulation::atomic_update(p, [x](T old) { return T(old | x); });
}
template <class T> T atomicExch(T* p, T x) {
  return emulation::atomic_update(p, [x](T) { return x; });
}

// ---- half precision: round to nearest even, like the GPU's conversions ---------------------------
struct half {
  uint16_t bits;
  half() = default;
  half(float x);
  operator float() const;
};
struct alignas(4) half2 { half x, y; };
inline float __half2float(half x) { return x; }
inline half __float2half_rn(float x) { return x; }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline float2 __half22float2(half2 v) { return {v.x, v.y}; }

namespace emulation {
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
}
