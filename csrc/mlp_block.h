// Blocks of rows of the CPU's multilayer perceptron, and what is done to them. A block's values lie
// feature by feature (feature c of row r at values[c * ROWS + r]), and fit the caches; a register
// tile of 4 features x 2 vectors of rows does nearly all the work, forward and back.
#pragma once

#include "mlp_simd.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int TILE = 4;  // features a tile
constexpr int GRAD_TILE = VECTOR_BYTES == 64 ? 4 : 2;  // features of g, times 4 of x: by registers

// Memory that is soon read or written, asked for a few cache lines at a time, between the tiles:
// what it takes is then hidden behind the arithmetic. All at once, the tiles would wait for it.
class Ahead {
 public:
  template <class T> void add(const T* rows, int width, int64_t begin, int64_t end) {
    if (rows && begin < end)
      ranges_[size_++] = {reinterpret_cast<const char*>(rows + begin * width),
                          reinterpret_cast<const char*>(rows + end * width)};
  }
  void step() {
#if defined(__GNUC__)
    for (int i = 0; i < LINES && size_ > 0; ++i) {
      Range& range = ranges_[size_ - 1];
      __builtin_prefetch(range.at);
      range.at += 64;
      if (range.at >= range.end) --size_;
    }
#endif
  }

 private:
  static constexpr int LINES = 4;
  struct Range { const char *at, *end; } ranges_[5];
  int size_ = 0;
};

// A block: ROWS rows, of which the first n are used, `padded` (whole tiles) computed.
template <class T> struct Block {
  static constexpr int ROWS = MlpBlock<T>::rows, STEP = 2 * Simd<T>::lanes;
  int n, padded;
  Ahead* ahead;
  Block(int64_t rows, Ahead* ahead)
      : n(int(rows)), padded((n + STEP - 1) / STEP * STEP), ahead(ahead) {}

  // Rows of `width` values to features, zero where padded; and back.
  void read(const T* rows, int width, T* values) const {
    transpose(rows, width, n, width, values, ROWS);
    for (int c = 0; c < width; ++c) fill_zero(values + c * ROWS, n, padded);
  }
  void write(const T* values, int width, T* rows) const {
    transpose(values, ROWS, width, n, rows, width);
  }
};

// What becomes of a vector of sums on its way to place i of the results.
template <class T> struct Plain {
  Vector<T> operator()(int64_t, const Vector<T>& v) const { return v; }
};
template <class T> struct Relu {  // mlp_relu
  Vector<T> operator()(int64_t, const Vector<T>& v) const {
    return v < Vector<T>{} ? Vector<T>{} : v;
  }
};
template <class T> struct ReluBackward {  // mlp_relu_backward
  const T* h;
  Vector<T> operator()(int64_t i, const Vector<T>& v) const {
    return load<Vector<T>>(h + i) <= Vector<T>{} ? Vector<T>{} : v;
  }
};
template <class T> struct Scaled {
  const T* by;
  Vector<T> operator()(int64_t i, const Vector<T>& v) const { return load<Vector<T>>(by + i) * v; }
};

// y[o] = finish(bias[o] + sum_i w[o * w_out + i * w_in] x[i]) for N features o from `first` on.
template <int N, class T, class F>
inline void multiply_tile(Block<T> block, const T* w, int64_t w_out, int64_t w_in, const T* bias,
                          int first, int n_in, const T* x, T* y, const F& finish) {
  using V = Vector<T>;
  constexpr int ROWS = Block<T>::ROWS, LANES = Simd<T>::lanes;
  w += first * w_out;
  for (int r = 0; r < block.padded; r += 2 * LANES) {
    block.ahead->step();
    V low[N], high[N];
#pragma GCC unroll 4
    for (int o = 0; o < N; ++o) low[o] = high[o] = V{} + (bias ? bias[first + o] : T(0));
    for (int i = 0; i < n_in; ++i) {
      const V x0 = load<V>(x + i * ROWS + r), x1 = load<V>(x + i * ROWS + r + LANES);
#pragma GCC unroll 4
      for (int o = 0; o < N; ++o) {
        const T weight = w[o * w_out + i * w_in];
        low[o] += weight * x0;
        high[o] += weight * x1;
      }
    }
#pragma GCC unroll 4
    for (int o = 0; o < N; ++o) {
      const int64_t place = (first + o) * ROWS + r;
      store(y + place, finish(place, low[o]));
      store(y + place + LANES, finish(place + LANES, high[o]));
    }
  }
}
template <class T, class F>
void multiply(Block<T> block, const T* w, int64_t w_out, int64_t w_in, const T* bias, int n_out,
              int n_in, const T* x, T* y, const F& finish) {
  int o = 0;
  const auto tile = [&](auto n) {
    multiply_tile<decltype(n)::value>(block, w, w_out, w_in, bias, o, n_in, x, y, finish);
    o += decltype(n)::value;
  };
  while (o + TILE <= n_out) tile(std::integral_constant<int, TILE>());
  if (n_out - o == 3) tile(std::integral_constant<int, 3>());
  if (n_out - o == 2) tile(std::integral_constant<int, 2>());
  if (n_out - o == 1) tile(std::integral_constant<int, 1>());
}
template <class T>
void multiply(Block<T> block, const T* w, int64_t w_out, int64_t w_in, const T* bias, int n_out,
              int n_in, const T* x, T* y) {
  multiply(block, w, w_out, w_in, bias, n_out, n_in, x, y, Plain<T>());
}

// grad[o * n_in + i] += sum over rows of g[o] x[i], for N features o and M features i.
template <int N, int M, class T>
inline void add_products_tile(Block<T> block, const T* g, const T* x, int n_in, T* grad) {
  using V = Vector<T>;
  constexpr int ROWS = Block<T>::ROWS;
  block.ahead->step();
  V acc[N * M];
#pragma GCC unroll 16
  for (int k = 0; k < N * M; ++k) acc[k] = V{};
  for (int r = 0; r < block.padded; r += Simd<T>::lanes) {
    V xs[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) xs[i] = load<V>(x + i * ROWS + r);
#pragma GCC unroll 4
    for (int o = 0; o < N; ++o) {
      const V gs = load<V>(g + o * ROWS + r);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) acc[o * M + i] += gs * xs[i];
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < N; ++o) {
    T* const to = grad + o * n_in;
    const V* const sums = acc + o * M;
    if constexpr (M == 4) add_four_sums(sums, to);
    else to[0] += sum<T>(sums[0]);
  }
}
template <class T>
void add_products(Block<T> block, const T* g, int n_out, const T* x, int n_in, T* grad) {
  constexpr int ROWS = Block<T>::ROWS;
  int o = 0;
  const auto row = [&](auto n) {
    constexpr int N = decltype(n)::value;
    int i = 0;
    for (; i + 4 <= n_in; i += 4)
      add_products_tile<N, 4>(block, g + o * ROWS, x + i * ROWS, n_in, grad + o * n_in + i);
    for (; i < n_in; ++i)
      add_products_tile<N, 1>(block, g + o * ROWS, x + i * ROWS, n_in, grad + o * n_in + i);
    o += N;
  };
  while (o + GRAD_TILE <= n_out) row(std::integral_constant<int, GRAD_TILE>());
  while (o < n_out) row(std::integral_constant<int, 1>());
}
template <class T> void add_sums(Block<T> block, const T* g, int n_out, T* grad) {
  constexpr int ROWS = Block<T>::ROWS;
  for (int first = 0; first < n_out; first += 4) {
    const int n = min(4, n_out - first);
    Vector<T> totals[4] = {};
    for (int o = 0; o < n; ++o)
      for (int r = 0; r < block.padded; r += Simd<T>::lanes)
        totals[o] += load<Vector<T>>(g + (first + o) * ROWS + r);
    if (n == 4) add_four_sums(totals, grad + first);
    else for (int o = 0; o < n; ++o) grad[first + o] += sum<T>(totals[o]);
  }
}

// Activates the values in place. SLOPE: silu's derivatives go there.
template <bool SLOPE, class T>
void activate_silu(Block<T> block, int width, T* __restrict values, T* __restrict slope) {
  T e[Block<T>::ROWS];  // in two loops: in one, g++ repeats the rest for each end of exp's clamp
  for (int c = 0; c < width; ++c) {
    for (int r = 0; r < block.padded; ++r) e[r] = exp_fast(-values[r]);
    for (int r = 0; r < block.padded; ++r) {
      const T z = values[r];
      if constexpr (SLOPE) slope[r] = mlp_silu_slope(z, e[r]);
      values[r] = mlp_silu(z, e[r]);
    }
    values += Block<T>::ROWS;
    if constexpr (SLOPE) slope += Block<T>::ROWS;
  }
}
// And of second: the derivatives along the tangent too, which come as those of z. bend: act'' R z.
template <class T>
void activate_relu_second(Block<T> block, int width, T* __restrict values, T* __restrict along) {
  for (int i = 0; i < width * Block<T>::ROWS; i += Block<T>::ROWS)
    for (int r = i; r < i + block.padded; ++r) {
      values[r] = mlp_relu(values[r]);
      along[r] = mlp_relu_backward(values[r], along[r]);
    }
}
template <class T>
void activate_silu_second(Block<T> block, int width, T* __restrict values, T* __restrict along,
                          T* __restrict slope, T* __restrict bend) {
  T e[Block<T>::ROWS];
  for (int c = 0; c < width; ++c) {
    for (int r = 0; r < block.padded; ++r) e[r] = exp_fast(-values[r]);
    for (int r = 0; r < block.padded; ++r) {
      const T z = values[r];
      slope[r] = mlp_silu_slope(z, e[r]);
      bend[r] = mlp_silu_bend(z, e[r]) * along[r];
      values[r] = mlp_silu(z, e[r]);
      along[r] *= slope[r];
    }
    values += Block<T>::ROWS, along += Block<T>::ROWS;
    slope += Block<T>::ROWS, bend += Block<T>::ROWS;
  }
}
template <class T>
void activate_backward(Block<T> block, int width, const T* h, const T* slope, T* g) {
  for (int c = 0; c < width; ++c, h += Block<T>::ROWS, g += Block<T>::ROWS) {
    if (slope) {
      for (int r = 0; r < block.padded; ++r) g[r] *= slope[r];
      slope += Block<T>::ROWS;
    } else {
      for (int r = 0; r < block.padded; ++r) g[r] = mlp_relu_backward(h[r], g[r]);
    }
  }
}

}  // namespace
}  // namespace DF_ISA
}  // namespace df
