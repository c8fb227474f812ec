// The one platform include of every kernel (csrc/*.cu): CUDA under nvcc; under any other compiler
// the emulation that runs the same source on the CPU, for tests (emulation/emulation.h).
//
// Kernels take their Args by value. What differs between the two lives here, under one name each:
// launches, shared memory, and the instructions that CUDA offers only as inline PTX.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulation/emulation.h"
#endif

#include <cstdio>
#include <stdexcept>
#include <string>

#include "common.h"

#if defined(__CUDACC__)
// T name[count], shared by the threads of a block; and the launch's dynamic shared memory.
#define DF_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define DF_DYNAMIC_SHARED(T, name)                                 \
  extern __shared__ __align__(128) unsigned char df_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(df_dynamic_shared)
#endif

namespace df {
inline namespace DF_ISA {

constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP = 32;

__device__ inline int64_t global_thread() {
  return int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int lane_id() { return threadIdx.x % WARP; }

// A block's shared memory, static and dynamic together, is limited to 48 KiB unless the kernel has
// asked for more. Who has dynamic memory asks: how much of the static kind there is, the compiler
// alone knows.
inline bool asks_for_shared(size_t dynamic_bytes) { return dynamic_bytes > 0; }

// Blocks of `threads` that cover n items.
inline unsigned blocks_for(int64_t n, int threads) { return unsigned((n + threads - 1) / threads); }

#if defined(__CUDACC__)
#ifndef DF_CUDA_ARCHITECTURES
#define DF_CUDA_ARCHITECTURES "unknown architectures"
#endif
// Throws std::runtime_error, which Python sees as RuntimeError, naming the kernel.
inline void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  std::string what = "kernel `" + std::string(kernel) + "`: " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string arch = std::to_string(10 * major + minor);
    what += ": this build holds code for " DF_CUDA_ARCHITECTURES ", the GPU is " + arch +
            ": reinstall with pip install . -C cmake.define.DF_CUDA=ON "
            "-C cmake.define.CMAKE_CUDA_ARCHITECTURES=" + arch;
  }
  cudaGetLastError();  // cleared: the next call is not to be blamed for it
  throw std::runtime_error(what);
}

// Launches `kernel`; nothing to do for an empty grid. The only launch there is, and it is checked.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, const A&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (asks_for_shared(shared_bytes))
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          name);
  const auto call = [&](P... parameters) {
    void* addresses[] = {&parameters...};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses,
                           shared_bytes, cudaStream_t(stream)),
          name);
  };
  call(arguments...);
}
inline void device_zero(void* p, size_t bytes, Stream stream) {
  if (bytes) check(cudaMemsetAsync(p, 0, bytes, cudaStream_t(stream)), "memset");
}
#else
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream, const A&... arguments) {
  emulation::run(name, grid, block, shared_bytes, asks_for_shared(shared_bytes),
                 [&] { kernel(arguments...); });
}
inline void device_zero(void* p, size_t bytes, Stream) {
  if (bytes) std::memset(p, 0, bytes);
}
#endif

// ---- reductions to memory: RED, whose result nobody waits for -----------------------------------
__device__ inline void red_add(float* p, float x) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
#else
  atomicAdd(p, x);
#endif
}
__device__ inline void red_add(double* p, double x) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(p), "d"(x) : "memory");
#else
  atomicAdd(p, x);
#endif
}
// N = 1, 2, 4 or 8 neighbours; p aligned to min(16, N * sizeof) bytes. One instruction for up to
// 16 bytes of floats where the GPU has it (sm_90 on).
template <int N, class T> __device__ inline void red_add_vector(T* p, const T* x) {
#if !defined(__CUDACC__)
  emulation::check_aligned(p, N * sizeof(T) < 16 ? N * sizeof(T) : 16);
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 4 && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p + i), "f"(x[i]),
                   "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3]) : "memory");
  } else if constexpr (sizeof(T) == 4 && N == 2) {
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x[0]), "f"(x[1])
                 : "memory");
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < N; ++i) red_add(p + i, x[i]);
  }
}

// ---- tensor cores -------------------------------------------------------------------------------
// d += a b for a warp: a 16 x 16, b 16 x 8 halves, d 16 x 8 floats (PTX mma.m16n8k16.row.col).
// With g = lane / 4 and t = lane % 4, each register holding two halves, the lower index lower:
//   a[0] = a[g][2t, 2t+1]  a[1] = a[g+8][2t, ..]  a[2] = a[g][2t+8, ..]  a[3] = a[g+8][2t+8, ..]
//   b[0] = b[2t, 2t+1][g]  b[1] = b[2t+8, 2t+9][g]
//   d[0], d[1] = d[g][2t, 2t+1]  d[2], d[3] = d[g+8][2t, 2t+1]
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  emulation::mma_16x8x16(d, a, b);
#endif
}

// ---- warp ---------------------------------------------------------------------------------------
// The sum over a whole warp, in every lane; the order of additions is always the same.
template <class T> __device__ inline T warp_sum(T x) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
  return x;
}

}  // inline namespace DF_ISA
}  // namespace df
