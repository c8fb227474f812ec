// Frequency encoding on the CPU: each row in blocks of columns; sines and cosines side by side in
// vector registers.
#include "frequency_encode.h"

#include <cstring>

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 256;  // rows a chunk
constexpr int BLOCK = 64;       // columns at a time

// Columns [j, j + size) of a row, per column: frequency 2^l, damping, and sine and cosine of 2^l x.
template <class T> struct Block {
  T scale[BLOCK], w[BLOCK], angle[BLOCK], s[BLOCK], c[BLOCK];
};

constexpr float FAST_LIMIT = 0x1p24f;  // |angle| up to which sine_cosine is good to 2 ulp of 1

// Sine and cosine without branches, for the compiler to vectorise: the nearest multiple of pi/2 is
// taken off in double, polynomials do the rest in float.
inline void sine_cosine(float x, float& s, float& c) {
  constexpr double ROUND = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double shifted = double(x) * 0.63661977236758134308 + ROUND;
  int64_t bits;
  std::memcpy(&bits, &shifted, 8);
  const int32_t quadrant = int32_t(bits);
  const float r = float(double(x) - (shifted - ROUND) * 1.57079632679489661923);
  quadrant_sine_cosine(r, quadrant, s, c);
}

void sines(Block<float>& k, int size) {
  float largest = 0;
  bool finite = true;
  for (int i = 0; i < size; ++i) {
    largest = max(largest, std::fabs(k.angle[i]));
    finite &= k.angle[i] - k.angle[i] == 0;
  }
  if (finite && largest < FAST_LIMIT) {
    for (int i = 0; i < size; ++i) sine_cosine(k.angle[i], k.s[i], k.c[i]);
  } else {
    for (int i = 0; i < size; ++i) k.s[i] = std::sin(k.angle[i]), k.c[i] = std::cos(k.angle[i]);
  }
}
void sines(Block<double>& k, int size) {
  for (int i = 0; i < size; ++i) k.s[i] = std::sin(k.angle[i]), k.c[i] = std::cos(k.angle[i]);
}

// Calls f(block, first column, size) for row `row`, block after block.
template <class T, class F>
void for_blocks(const FrequencyEncodeArgs<T>& a, int64_t row, const F& f) {
  Block<T> k;
  const int columns = a.n_frequencies * a.dims;
  const T* x = a.x + row * a.dims;
  T scale = 1, w = a.variance ? frequency_damping(a.variance[row], scale) : T(1);
  for (int first = 0, l = 0, d = 0; first < columns; first += BLOCK) {
    const int size = min(BLOCK, columns - first);
    for (int i = 0; i < size; ++i) {
      k.scale[i] = scale;
      k.w[i] = w;
      k.angle[i] = scale * x[d];
      if (++d < a.dims) continue;
      d = 0;
      scale = frequency_scale<T>(++l);
      if (a.variance && l < a.n_frequencies) w = frequency_damping(a.variance[row], scale);
    }
    sines(k, size);
    f(k, first, size);
  }
}

}  // namespace

template <class T> void frequency_encode_forward(const FrequencyEncodeArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n), half = int64_t(a.n_frequencies) * a.dims;
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    for (int64_t row = begin; row < stop; ++row)
      for_blocks(a, row, [&](const Block<T>& k, int first, int size) {
        T* out = a.out + 2 * half * row + first;
        for (int i = 0; i < size; ++i) out[i] = k.w[i] * k.s[i];
        for (int i = 0; i < size; ++i) out[half + i] = k.w[i] * k.c[i];
      });
    fill_zero(a.out, 2 * half * stop, 2 * half * end);
  });
}

template <class T> void frequency_encode_backward(const FrequencyEncodeArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n), half = int64_t(a.n_frequencies) * a.dims;
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    fill_zero(a.grad_x, begin * a.dims, end * a.dims);
    if (a.grad_variance) fill_zero(a.grad_variance, begin, end);
    for (int64_t row = begin; row < stop; ++row)
      for_blocks(a, row, [&](const Block<T>& k, int first, int size) {
        const T* gs = a.grad_out + 2 * half * row + first;
        const T* gc = gs + half;
        T dx[BLOCK];
        for (int i = 0; i < size; ++i)
          dx[i] = frequency_grad_x(k.scale[i], k.w[i], k.s[i], k.c[i], gs[i], gc[i]);
        T* grad_x = a.grad_x + row * a.dims;
        for (int i = 0, d = first % a.dims; i < size; ++i, d = d + 1 < a.dims ? d + 1 : 0)
          grad_x[d] += dx[i];
        if (!a.grad_variance) return;
        T sum = 0;
        for (int i = 0; i < size; ++i)
          sum += frequency_grad_variance(k.scale[i], k.w[i], k.s[i], k.c[i], gs[i], gc[i]);
        a.grad_variance[row] += sum;
      });
  });
}

template <class T> void frequency_encode_second(const FrequencyEncodeArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n), half = int64_t(a.n_frequencies) * a.dims;
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    if (a.grad_grad_out) fill_zero(a.grad_grad_out, 2 * half * stop, 2 * half * end);
    if (a.grad_x) fill_zero(a.grad_x, begin * a.dims, end * a.dims);
    if (a.grad_variance) fill_zero(a.grad_variance, begin, end);
    for (int64_t row = begin; row < stop; ++row)
      for_blocks(a, row, [&](const Block<T>& k, int first, int size) {
        const T* gs = a.grad_out + 2 * half * row + first;
        const T* gc = gs + half;
        const T q = a.q ? a.q[row] : T(0);
        T u[BLOCK], ds[BLOCK], dc[BLOCK], dx[BLOCK], dv[BLOCK];
        for (int i = 0, d = first % a.dims; i < size; ++i, d = d + 1 < a.dims ? d + 1 : 0)
          u[i] = a.u ? a.u[row * a.dims + d] : T(0);
        for (int i = 0; i < size; ++i) {
          const FrequencySecond<T> z =
              frequency_second(k.scale[i], k.w[i], k.s[i], k.c[i], gs[i], gc[i], u[i], q);
          ds[i] = z.gs, dc[i] = z.gc, dx[i] = z.x, dv[i] = z.variance;
        }
        if (T* out = a.grad_grad_out) {
          out += 2 * half * row + first;
          std::memcpy(out, ds, size * sizeof(T));
          std::memcpy(out + half, dc, size * sizeof(T));
        }
        if (a.grad_x)
          for (int i = 0, d = first % a.dims; i < size; ++i, d = d + 1 < a.dims ? d + 1 : 0)
            a.grad_x[row * a.dims + d] += dx[i];
        T sum = 0;
        for (int i = 0; i < size; ++i) sum += dv[i];
        if (a.grad_variance) a.grad_variance[row] += sum;
      });
  });
}

DF_INSTANTIATE(frequency_encode_forward, FrequencyEncodeArgs)
DF_INSTANTIATE(frequency_encode_backward, FrequencyEncodeArgs)
DF_INSTANTIATE(frequency_encode_second, FrequencyEncodeArgs)

}  // namespace DF_ISA
}  // namespace df
