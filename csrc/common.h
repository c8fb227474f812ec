// Shared by every kernel: the host/device macro, small vectors, a hash generator, parallel loops.
//
// Two places for code. Args structs are plain data and live in `df`. Functions live in
// `df::DF_ISA`, because each csrc/<stem>.cpp is compiled once per instruction set (isa.h has the
// list; under nvcc: cuda) and the linker must never merge one set's function into another's.
// For the same reason kernels use no standard containers and allocate nothing shared.
// Who only calls the launchers leaves DF_ISA undefined: kernels.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef DF_ISA
#define DF_ISA host
#define DF_IS_HOST
#endif

#if defined(DF_EMULATED)
struct half;  // emulation/emulation.h
#elif defined(DF_IS_CUDA)
struct __half;  // cuda_fp16.h
typedef __half half;
#endif

#if defined(__CUDACC__)
#define DF_HD __host__ __device__ inline
#else
#define DF_HD inline
#endif

// Declares launcher `void name(const Args<T>&, Stream)`, whose definition stands in csrc/<stem>.cpp
// (or .cu), in df::DF_ISA; DF_INSTANTIATE follows it. For the host it is in df: dispatch.cpp.
#if defined(DF_IS_HOST)
#define DF_DECLARE(name, Args) \
  namespace df { template <class T> void name(const Args<T>&, Stream = nullptr); }
#else
#define DF_DECLARE(name, Args) \
  namespace df { inline namespace DF_ISA { template <class T> void name(const Args<T>&, Stream); } }
#endif
#define DF_INSTANTIATE(name, Args)                        \
  template void name<float>(const Args<float>&, Stream);  \
  template void name<double>(const Args<double>&, Stream);
#define DF_INSTANTIATE_HALF(name, Args) template void name<half>(const Args<half>&, Stream);

namespace df {

// What sums of T, and coordinates beside it, are held in: T, or float for half.
template <class T> struct WideOf { using type = T; };
#if defined(DF_IS_CUDA)
template <> struct WideOf<half> { using type = float; };
#endif
template <class T> using Wide = typename WideOf<T>::type;

using Stream = void*;  // a cudaStream_t; the CPU launchers ignore it

// Threads of the CPU loops; 0: as many as OpenMP gives (torch.set_num_threads sets that too).
extern int num_threads;  // dispatch.cpp: set_num_threads

inline namespace DF_ISA {

template <class T> DF_HD constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> DF_HD constexpr T max(T a, T b) { return a < b ? b : a; }
// NaN stays NaN: both comparisons are false and x comes back.
template <class T> DF_HD T clamp(T x, T low, T high) { return x < low ? low : high < x ? high : x; }

template <class T> struct vec3 { T x, y, z; };
template <class T> DF_HD vec3<T> operator+(vec3<T> a, vec3<T> b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z};
}
template <class T> DF_HD vec3<T> operator-(vec3<T> a, vec3<T> b) {
  return {a.x - b.x, a.y - b.y, a.z - b.z};
}
template <class T> DF_HD vec3<T> operator*(T s, vec3<T> a) { return {s * a.x, s * a.y, s * a.z}; }
template <class T> DF_HD T dot(vec3<T> a, vec3<T> b) { return a.x * b.x + a.y * b.y + a.z * b.z; }
template <class T> DF_HD vec3<T> cross(vec3<T> a, vec3<T> b) {
  return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}
template <class T> DF_HD vec3<T> load3(const T* p) { return {p[0], p[1], p[2]}; }
template <class T> DF_HD void store3(T* p, vec3<T> a) { p[0] = a.x; p[1] = a.y; p[2] = a.z; }

// Packed samples: arrays have n rows, of which the first *count are valid (no count: all are).
DF_HD int64_t valid_rows(const int32_t* count, int64_t n) {
  return count ? clamp<int64_t>(*count, 0, n) : n;
}

// Counter-based random numbers: a chain of four 32-bit mixes (constants: C. Wellons, "lowbias32")
// over the halves of the seed and two counters. 32-bit operations only, so that torch's int64
// reproduces it bit for bit: reference.uniform01.
DF_HD uint32_t mix32(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}
DF_HD uint32_t hash32(uint64_t seed, uint32_t a, uint32_t b) {
  uint32_t h = mix32(uint32_t(seed) + 0x9e3779b9u);
  h = mix32(h ^ uint32_t(seed >> 32));
  return mix32(mix32(h ^ a) ^ b);
}
// Uniform in [0, 1), a multiple of 2^-24. From a signed integer: vector units convert that at once.
DF_HD float uniform01(uint64_t seed, uint32_t a, uint32_t b) {
  return float(int32_t(hash32(seed, a, b) >> 8)) * 0x1p-24f;
}

// Sets p[begin..end) to zero.
template <class T> DF_HD void fill_zero(T* p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) p[i] = T(0);
}

#if !defined(__CUDACC__)
// exp(x) = scale (1 + rest) for x in [-87, 88] without branches, for the compiler to vectorise: scale
// is a power of two, rest = exp(r) - 1, |r| < 0.35, by the polynomial of Cephes expf; good to 2 ulp.
struct ExpParts { float scale, rest; };
inline ExpParts exp_parts(float x) {
  constexpr float ROUND = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504088896341f + ROUND, n = shifted - ROUND;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r +
                    4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 5.0000001201e-1f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits + 127u) << 23;
  ExpParts e;
  std::memcpy(&e.scale, &bits, 4);
  e.rest = r + r * r * p;
  return e;
}

// exp without branches, to 2 ulp; float: the ends of what a float holds beyond [-87, 88].
inline float exp_fast(float x) {
  const ExpParts e = exp_parts(clamp(x, -87.0f, 88.0f));
  return e.scale + e.scale * e.rest;
}
inline double exp_fast(double x) { return std::exp(x); }

// Calls body(begin, end) for [0, n) in chunks of `grain` (the last is shorter), in any order, on
// all threads. Chunk k is [k * grain, ...) whatever the number of threads: a reduction that keeps
// one partial result a chunk and adds them in order of k is bit-identical for any number.
template <class Body> void parallel_for(int64_t n, int64_t grain, const Body& body) {
  const int64_t chunks = (n + grain - 1) / grain;
#ifdef _OPENMP
  const int wanted = num_threads > 0 ? num_threads : omp_get_max_threads();
  if (chunks > 1 && wanted > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(wanted)
    for (int64_t k = 0; k < chunks; ++k) body(k * grain, min(n, (k + 1) * grain));
    return;
  }
#endif
  for (int64_t k = 0; k < chunks; ++k) body(k * grain, min(n, (k + 1) * grain));
}
#endif

}  // inline namespace DF_ISA
}  // namespace df
