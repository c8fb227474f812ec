// Frequency encoding on the GPU.
//
// Forward: a thread a pair of columns, the sine and the cosine of one angle, which share the
// reduction of the angle; neighbours write neighbouring columns. Backward, and its own backward: a
// thread a coordinate, which adds up its frequencies. A block holds whole rows, so the gradient of a
// row's variance is summed in shared memory: no atomics, and always in the same order.
#include "frequency_encode.h"

#include <cstring>

#include "gpu.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 128;

// ---- sine and cosine, to 2 ulp of 1 for any angle -----------------------------------------------
// CUDA's own sincos() keeps the digits of a large angle's reduction in local memory.

// reduce() for any |x| >= 2 (Payne and Hanek): x is an integer m times 2^(e - 63), so digits of
// 2 / pi at 2^(65 - e) and above make multiples of 4 quadrants; the next 192 bits hold the rest.
__device__ inline double reduce_large(double x, int32_t& quadrant) {
  static const uint64_t TWO_OVER_PI[19] = {  // 64 zeros, then the digits after the point
      0x0000000000000000, 0xa2f9836e4e441529, 0xfc2757d1f534ddc0, 0xdb6295993c439041,
      0xfe5163abdebbc561, 0xb7246e3a424dd2e0, 0x06492eea09d1921c, 0xfe1deb1cb129a73e,
      0xe88235f52ebb4484, 0xe99c7026b45f7e41, 0x3991d639835339f4, 0x9c845f8bbdf9283b,
      0x1ff897ffde05980f, 0xef2f118b5a0a6d1f, 0x6d367ecf27cb09b7, 0x4f463f669e5fea2d,
      0x7527bac7ebe5f17b, 0x3d0739f78a5292ea, 0x6bfb5fb11f8d5d08};
  uint64_t bits;
  memcpy(&bits, &x, 8);
  const int e = int(bits >> 52 & 2047) - 1023, k = (e - 1) >> 6, shift = (e - 1) & 63;
  const uint64_t m = bits << 11 | uint64_t(1) << 63;
  uint64_t w[3];
#pragma unroll
  for (int i = 0; i < 3; ++i)  // shifted twice: by 64 in one go is undefined
    w[i] = TWO_OVER_PI[k + i] << shift | TWO_OVER_PI[k + i + 1] >> 1 >> (63 - shift);
  using uint128 = unsigned __int128;
  // Quadrants modulo 4, times 2^126: `high` and the lower half of `low`.
  const uint128 low = uint128(m) * w[1] + uint64_t(uint128(m) * w[2] >> 64);
  const uint64_t high = m * w[0] + uint64_t(low >> 64);
  const int64_t fraction = int64_t(high << 2 | uint64_t(low) >> 62);  // from the nearest, 2^-64
  quadrant = int32_t((high + (uint64_t(1) << 61)) >> 62);
  const double r = 1.57079632679489661923 *
                   (double(fraction) * 0x1p-64 + double(uint64_t(low) << 2) * 0x1p-128);
  if (e == 1024) return x - x;  // NaN
  if (x > 0) return r;
  quadrant = -quadrant;
  return -r;
}

template <class T> __device__ inline void sine_cosine(T x, T& s, T& c) {
  int32_t quadrant;
  const T r = std::fabs(x) < Reduction<T>::LIMIT ? reduce(x, quadrant)
                                                 : T(reduce_large(double(x), quadrant));
  quadrant_sine_cosine(r, quadrant, s, c);
}

// ---- kernels ------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(THREADS) frequency_forward_kernel(FrequencyEncodeArgs<T> a) {
  const unsigned half = unsigned(a.n_frequencies) * unsigned(a.dims);
  const uint64_t i = uint64_t(global_thread());  // unsigned: division is quicker
  const int64_t row = int64_t(i / half);
  if (row >= a.n) return;
  const unsigned column = unsigned(i - uint64_t(row) * half);
  T s = 0, c = 0;
  if (row < valid_rows(a.count, a.n)) {
    const unsigned l = column / unsigned(a.dims), d = column - l * unsigned(a.dims);
    const T scale = frequency_scale<T>(int(l));
    sine_cosine(scale * a.x[row * a.dims + d], s, c);
    if (a.variance) {
      const T w = frequency_damping(a.variance[row], scale);
      s *= w;
      c *= w;
    }
  }
  T* const out = a.out + 2 * int64_t(half) * row + column;
  out[0] = s;
  out[half] = c;
}

// Gradient of coordinate d of a row; adds what it contributes to that of the row's variance.
template <class T>
__device__ inline T coordinate_backward(const FrequencyEncodeArgs<T>& a, int64_t row, int d,
                                        T& grad_variance) {
  const int64_t half = int64_t(a.n_frequencies) * a.dims;
  const T* g = a.grad_out + 2 * half * row + d;
  const T x = a.x[row * a.dims + d], variance = a.variance ? a.variance[row] : T(0);
  T grad = 0;
  for (int l = 0; l < a.n_frequencies; ++l, g += a.dims) {
    const T scale = frequency_scale<T>(l);
    const T w = a.variance ? frequency_damping(variance, scale) : T(1), gs = g[0], gc = g[half];
    T s, c;
    sine_cosine(scale * x, s, c);
    grad += frequency_grad_x(scale, w, s, c, gs, gc);
    grad_variance += frequency_grad_variance(scale, w, s, c, gs, gc);
  }
  return grad;
}

// The same, one order higher; a row that is not valid gets zeros.
template <class T>
__device__ inline T coordinate_second(const FrequencyEncodeArgs<T>& a, int64_t row, int d,
                                      bool valid, T& grad_variance) {
  const int64_t half = int64_t(a.n_frequencies) * a.dims;
  int64_t column = 2 * half * row + d;
  const T x = a.x[row * a.dims + d], variance = a.variance ? a.variance[row] : T(0);
  const T u = a.u ? a.u[row * a.dims + d] : T(0), q = a.q ? a.q[row] : T(0);
  T grad = 0;
  for (int l = 0; l < a.n_frequencies; ++l, column += a.dims) {
    FrequencySecond<T> z{};
    if (valid) {
      const T scale = frequency_scale<T>(l);
      const T w = a.variance ? frequency_damping(variance, scale) : T(1);
      T s, c;
      sine_cosine(scale * x, s, c);
      z = frequency_second(scale, w, s, c, a.grad_out[column], a.grad_out[column + half], u, q);
    }
    if (a.grad_grad_out) {
      a.grad_grad_out[column] = z.gs;
      a.grad_grad_out[column + half] = z.gc;
    }
    grad += z.x;
    grad_variance += z.variance;
  }
  return grad;
}

// Of a block's threads, `width` hold a row, THREADS / width rows a block.
struct Place {
  int64_t row;
  int first;    // coordinate; others follow every `width`
  bool inside;  // holds a row at all
};
__device__ inline Place place_of(int width, int64_t n) {
  const int rows = THREADS / width, of_block = int(threadIdx.x) / width;
  const int64_t row = int64_t(blockIdx.x) * rows + of_block;
  return {row, int(threadIdx.x) - of_block * width, of_block < rows && row < n};
}

// Adds up what the threads of a row hold, in `partial`, and writes it. All threads or none call it.
template <class T>
__device__ inline void write_row_sum(T* partial, T grad_variance, Place at, int width, T* out) {
  partial[threadIdx.x] = grad_variance;
  __syncthreads();
  if (!at.inside || at.first != 0) return;
  for (int i = 1; i < width; ++i) grad_variance += partial[threadIdx.x + i];
  out[at.row] = grad_variance;
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    frequency_backward_kernel(FrequencyEncodeArgs<T> a, int width) {
  DF_SHARED(T, partial, THREADS);
  const Place at = place_of(width, a.n);
  const bool valid = at.row < valid_rows(a.count, a.n);
  T grad_variance = 0;
  if (at.inside)
    for (int d = at.first; d < a.dims; d += width)
      a.grad_x[at.row * a.dims + d] =
          valid ? coordinate_backward(a, at.row, d, grad_variance) : T(0);
  if (a.grad_variance) write_row_sum(partial, grad_variance, at, width, a.grad_variance);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    frequency_second_kernel(FrequencyEncodeArgs<T> a, int width) {
  DF_SHARED(T, partial, THREADS);
  const Place at = place_of(width, a.n);
  const bool valid = at.row < valid_rows(a.count, a.n);
  T grad_variance = 0;
  if (at.inside)
    for (int d = at.first; d < a.dims; d += width) {
      const T grad = coordinate_second(a, at.row, d, valid, grad_variance);
      if (a.grad_x) a.grad_x[at.row * a.dims + d] = grad;
    }
  if (a.grad_variance) write_row_sum(partial, grad_variance, at, width, a.grad_variance);
}

}  // namespace

template <class T> void frequency_encode_forward(const FrequencyEncodeArgs<T>& a, Stream stream) {
  launch("frequency_forward_kernel", frequency_forward_kernel<T>,
         blocks_for(a.n * a.n_frequencies * a.dims, THREADS), THREADS, 0, stream, a);
}

// No coordinates: the variance's gradient is zero.
inline int threads_a_row(int dims) { return clamp(dims, 1, THREADS); }

template <class T> void frequency_encode_backward(const FrequencyEncodeArgs<T>& a, Stream stream) {
  const int width = threads_a_row(a.dims);
  launch("frequency_backward_kernel", frequency_backward_kernel<T>,
         blocks_for(a.n, THREADS / width), THREADS, 0, stream, a, width);
}

template <class T> void frequency_encode_second(const FrequencyEncodeArgs<T>& a, Stream stream) {
  const int width = threads_a_row(a.dims);
  launch("frequency_second_kernel", frequency_second_kernel<T>, blocks_for(a.n, THREADS / width),
         THREADS, 0, stream, a, width);
}

DF_INSTANTIATE(frequency_encode_forward, FrequencyEncodeArgs)
DF_INSTANTIATE(frequency_encode_backward, FrequencyEncodeArgs)
DF_INSTANTIATE(frequency_encode_second, FrequencyEncodeArgs)

}  // namespace DF_ISA
}  // namespace df
