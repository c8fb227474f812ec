// Multilayer perceptron on the CPU. Rows are taken in blocks whose values lie feature by feature
// (feature c of row r at values[c * ROWS + r]), small enough for the caches; a register tile of
// 4 features x 2 vectors of rows does nearly all the work, forward and back.
#include "mlp.h"

#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the machine's are never passed

namespace df {
namespace DF_ISA {
namespace {

#if defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int TILE = 4;  // features a tile

template <class T> struct Simd {
  typedef T vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef T quad __attribute__((vector_size(4 * sizeof(T))));
  static constexpr int lanes = VECTOR_BYTES / sizeof(T);
};
template <class T> using Vector = typename Simd<T>::vector;

template <class V, class T> inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> inline void store(T* p, const V& v) { std::memcpy(p, &v, sizeof v); }

template <class T> inline T sum(const Vector<T>& v) {
  T s[Simd<T>::lanes];
  store(s, v);
  for (int half = Simd<T>::lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}

// out[c * out_stride + r] = in[r * in_stride + c] for a 4 x 4 square.
template <class T>
inline void transpose_square(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
#if defined(__clang__) || __GNUC__ >= 12
  using Q = typename Simd<T>::quad;
  const Q a = load<Q>(in), b = load<Q>(in + in_stride), c = load<Q>(in + 2 * in_stride),
          d = load<Q>(in + 3 * in_stride);
  const Q ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Q cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Q ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Q cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store<Q>(out, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store<Q>(out + out_stride, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  store<Q>(out + 2 * out_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  store<Q>(out + 3 * out_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
#else
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) out[c * out_stride + r] = in[r * in_stride + c];
#endif
}
template <class T>
void transpose(const T* in, int64_t in_stride, int rows, int columns, T* out, int64_t out_stride) {
  const int whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int r = 0; r < whole_rows; r += 4)
    for (int c = 0; c < whole_columns; c += 4)
      transpose_square(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
  for (int r = 0; r < rows; ++r)
    for (int c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      out[c * out_stride + r] = in[r * in_stride + c];
}

// A block: ROWS rows, of which the first n are used, `padded` (whole tiles) computed.
template <class T> struct Block {
  static constexpr int ROWS = MlpBlock<T>::rows, STEP = 2 * Simd<T>::lanes;
  int n, padded;
  explicit Block(int64_t rows) : n(int(rows)), padded((n + STEP - 1) / STEP * STEP) {}

  // Rows of `width` values to features, zero where padded; and back.
  void read(const T* rows, int width, T* values) const {
    transpose(rows, width, n, width, values, ROWS);
    for (int c = 0; c < width; ++c) fill_zero(values + c * ROWS, n, padded);
  }
  void write(const T* values, int width, T* rows) const {
    transpose(values, ROWS, width, n, rows, width);
  }
};

// y[o] = bias[o] + sum_i w[o * w_out + i * w_in] x[i] for N features o.
template <int N, class T>
inline void multiply_tile(Block<T> block, const T* w, int64_t w_out, int64_t w_in, const T* bias,
                          int n_in, const T* x, T* y) {
  using V = Vector<T>;
  constexpr int ROWS = Block<T>::ROWS, LANES = Simd<T>::lanes;
  for (int r = 0; r < block.padded; r += 2 * LANES) {
    V low[N], high[N];
    for (int o = 0; o < N; ++o) low[o] = high[o] = V{} + (bias ? bias[o] : T(0));
    for (int i = 0; i < n_in; ++i) {
      const V x0 = load<V>(x + i * ROWS + r), x1 = load<V>(x + i * ROWS + r + LANES);
      for (int o = 0; o < N; ++o) {
        const T weight = w[o * w_out + i * w_in];
        low[o] += weight * x0;
        high[o] += weight * x1;
      }
    }
    for (int o = 0; o < N; ++o) {
      store(y + o * ROWS + r, low[o]);
      store(y + o * ROWS + r + LANES, high[o]);
    }
  }
}
template <class T>
void multiply(Block<T> block, const T* w, int64_t w_out, int64_t w_in, const T* bias, int n_out,
              int n_in, const T* x, T* y) {
  int o = 0;
  const auto tile = [&](auto n) {
    multiply_tile<decltype(n)::value>(block, w + o * w_out, w_out, w_in, bias ? bias + o : nullptr,
                                      n_in, x, y + o * Block<T>::ROWS);
    o += decltype(n)::value;
  };
  while (o + TILE <= n_out) tile(std::integral_constant<int, TILE>());
  if (n_out - o == 3) tile(std::integral_constant<int, 3>());
  if (n_out - o == 2) tile(std::integral_constant<int, 2>());
  if (n_out - o == 1) tile(std::integral_constant<int, 1>());
}

// grad[o * n_in + i] += sum over rows of g[o] x[i], for N features o and M features i.
template <int N, int M, class T>
inline void add_products_tile(Block<T> block, const T* g, const T* x, int n_in, T* grad) {
  using V = Vector<T>;
  constexpr int ROWS = Block<T>::ROWS;
  V acc[N][M] = {};
  for (int r = 0; r < block.padded; r += Simd<T>::lanes) {
    V xs[M];
    for (int i = 0; i < M; ++i) xs[i] = load<V>(x + i * ROWS + r);
    for (int o = 0; o < N; ++o) {
      const V gs = load<V>(g + o * ROWS + r);
      for (int i = 0; i < M; ++i) acc[o][i] += gs * xs[i];
    }
  }
  for (int o = 0; o < N; ++o)
    for (int i = 0; i < M; ++i) grad[o * n_in + i] += sum<T>(acc[o][i]);
}
template <class T>
void add_products(Block<T> block, const T* g, int n_out, const T* x, int n_in, T* grad) {
  constexpr int ROWS = Block<T>::ROWS;
  int o = 0;
  const auto row = [&](auto n) {
    constexpr int N = decltype(n)::value;
    int i = 0;
    for (; i + 2 <= n_in; i += 2)
      add_products_tile<N, 2>(block, g + o * ROWS, x + i * ROWS, n_in, grad + o * n_in + i);
    if (i < n_in)
      add_products_tile<N, 1>(block, g + o * ROWS, x + i * ROWS, n_in, grad + o * n_in + i);
    o += N;
  };
  while (o + TILE <= n_out) row(std::integral_constant<int, TILE>());
  while (o < n_out) row(std::integral_constant<int, 1>());
}
template <class T> void add_sums(Block<T> block, const T* g, int n_out, T* grad) {
  for (int o = 0; o < n_out; ++o) {
    Vector<T> total = {};
    for (int r = 0; r < block.padded; r += Simd<T>::lanes)
      total += load<Vector<T>>(g + o * Block<T>::ROWS + r);
    grad[o] += sum<T>(total);
  }
}

// Activates the values in place. SLOPE: silu's derivatives go there.
template <class T> void activate_relu(Block<T> block, int width, T* values) {
  for (T* const end = values + width * Block<T>::ROWS; values < end; values += Block<T>::ROWS)
    for (int r = 0; r < block.padded; ++r) values[r] = mlp_relu(values[r]);
}
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

// Layer l from x to y, with its activation; w: the layer's parameters.
template <class T>
void layer(const MlpShape& s, int l, Block<T> block, const T* w, const T* x, T* y, T* slope) {
  const int n_in = s.width[l], n_out = s.width[l + 1];
  multiply(block, w, n_in, int64_t(1), s.bias ? w + n_in * n_out : nullptr, n_out, n_in, x, y);
  if (l + 1 == s.n_layers) return;
  if (!s.silu) activate_relu(block, n_out, y);
  else if (slope) activate_silu<true>(block, n_out, y, slope);
  else activate_silu<false>(block, n_out, y, slope);
}

// Places for a block's values: inputs of each layer, hidden layers' slopes (silu), two gradients.
template <class T> struct Values {
  T *h[MLP_MAX_LAYERS], *slope[MLP_MAX_LAYERS], *g, *spare;
  Values(const MlpShape& s, T* memory) {
    constexpr int ROWS = Block<T>::ROWS;
    T* const end = memory + mlp_block_columns(s, false) * ROWS;
    for (int l = 0; l < s.n_layers; ++l) {
      h[l] = memory;
      memory += s.width[l] * ROWS;
      slope[l] = s.silu && l > 0 ? memory : nullptr;
      if (slope[l]) memory += s.width[l] * ROWS;
    }
    g = memory;
    spare = memory + (end - memory) / 2;
  }
  void turn() {
    T* const done = g;
    g = spare;
    spare = done;
  }
};

// Rows [begin, begin + block.n): recompute the hidden values, then back through the layers.
template <class T>
void block_backward(const MlpArgs<T>& a, Block<T> block, int64_t begin, T* memory,
                    T* grad_params) {
  const MlpShape& shape = a.shape;
  Values<T> s(shape, memory);
  const T* w = a.params;
  block.read(a.x + begin * shape.width[0], shape.width[0], s.h[0]);
  for (int l = 0; l + 1 < shape.n_layers; w += mlp_layer_parameters(shape, l++))
    layer(shape, l, block, w, s.h[l], s.h[l + 1], s.slope[l + 1]);
  const int outputs = shape.width[shape.n_layers];
  block.read(a.grad_out + begin * outputs, outputs, s.g);
  for (int l = shape.n_layers - 1; l >= 0; --l) {
    const int n_in = shape.width[l], n_out = shape.width[l + 1];
    if (grad_params) {
      T* const grad = grad_params + (w - a.params);
      add_products(block, s.g, n_out, s.h[l], n_in, grad);
      if (shape.bias) add_sums(block, s.g, n_out, grad + n_in * n_out);
    }
    if (l == 0 && !a.grad_x) return;
    multiply<T>(block, w, 1, n_in, nullptr, n_in, n_out, s.g, s.spare);
    s.turn();
    if (l > 0) {
      activate_backward(block, n_in, s.h[l], s.slope[l], s.g);
      w -= mlp_layer_parameters(shape, l - 1);
    }
  }
  block.write(s.g, shape.width[0], a.grad_x + begin * shape.width[0]);
}

// The same along the tangent: d holds the derivatives of s's values, d.slope what bends them.
template <class T>
void block_second(const MlpArgs<T>& a, Block<T> block, int64_t begin, T* memory, T* grad_params) {
  constexpr int ROWS = Block<T>::ROWS;
  const MlpShape& shape = a.shape;
  const int last = shape.n_layers - 1, inputs = shape.width[0], outputs = shape.width[last + 1];
  Values<T> s(shape, memory), d(shape, memory + mlp_block_columns(shape, false) * ROWS);
  const T* w = a.params;
  block.read(a.x + begin * inputs, inputs, s.h[0]);
  block.read(a.tangent + begin * inputs, inputs, d.h[0]);
  for (int l = 0; l < last; w += mlp_layer_parameters(shape, l++)) {
    const int n_in = shape.width[l], n_out = shape.width[l + 1];
    const T* const bias = shape.bias ? w + n_in * n_out : nullptr;
    multiply(block, w, n_in, int64_t(1), bias, n_out, n_in, s.h[l], s.h[l + 1]);
    multiply<T>(block, w, n_in, 1, nullptr, n_out, n_in, d.h[l], d.h[l + 1]);
    if (shape.silu)
      activate_silu_second(block, n_out, s.h[l + 1], d.h[l + 1], s.slope[l + 1], d.slope[l + 1]);
    else
      activate_relu_second(block, n_out, s.h[l + 1], d.h[l + 1]);
  }
  if (a.out) {
    multiply<T>(block, w, shape.width[last], 1, nullptr, outputs, shape.width[last], d.h[last],
                s.g);
    block.write(s.g, outputs, a.out + begin * outputs);
  }
  const bool bends = shape.silu && last > 0 && a.grad_x;  // else grad_x is zero
  if (!grad_params && !bends) return;
  block.read(a.grad_out + begin * outputs, outputs, s.g);
  for (int l = last; l >= 0; --l) {
    const int n_in = shape.width[l], n_out = shape.width[l + 1];
    const bool bent = shape.silu && l < last;  // d.g is not zero
    if (grad_params) {
      T* const grad = grad_params + (w - a.params);
      add_products(block, s.g, n_out, d.h[l], n_in, grad);
      if (bent) add_products(block, d.g, n_out, s.h[l], n_in, grad);
      if (bent && shape.bias) add_sums(block, d.g, n_out, grad + n_in * n_out);
    }
    if (l == 0 && !bends) return;
    if (bent) multiply<T>(block, w, 1, n_in, nullptr, n_in, n_out, d.g, d.spare);
    else fill_zero(d.spare, 0, shape.silu ? n_in * ROWS : 0);
    d.turn();
    if (l == 0) break;
    multiply<T>(block, w, 1, n_in, nullptr, n_in, n_out, s.g, s.spare);
    s.turn();
    if (shape.silu)
      for (int i = 0; i < n_in * ROWS; i += ROWS)
        for (int r = i; r < i + block.padded; ++r)
          d.g[r] = d.slope[l][r] * s.g[r] + s.slope[l][r] * d.g[r];
    activate_backward(block, n_in, s.h[l], s.slope[l], s.g);
    w -= mlp_layer_parameters(shape, l - 1);
  }
  block.write(d.g, inputs, a.grad_x + begin * inputs);
}

// All rows, chunk by chunk, each with its part of the workspace; then the sum of their gradients
// of params.
template <bool SECOND, class T> void backward(const MlpArgs<T>& a) {
  constexpr int64_t ROWS = Block<T>::ROWS;
  const MlpShape& s = a.shape;
  const int64_t valid = valid_rows(a.count, a.n), inputs = s.width[0], outputs = s.width[s.n_layers];
  const int64_t rows = mlp_chunk_rows(a.n), chunks = (valid + rows - 1) / rows;
  const int64_t size = mlp_chunk_workspace(s, ROWS, a.grad_params, SECOND);
  const int64_t values = mlp_block_columns(s, SECOND) * ROWS;
  const bool zero_x = SECOND && !(s.silu && s.n_layers > 1);
  parallel_for(a.n, rows, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    T* const memory = a.workspace + begin / rows * size;
    T* const grad_params = a.grad_params ? memory + values : nullptr;
    if (grad_params && begin < stop) fill_zero(grad_params, 0, mlp_parameters(s));
    for (int64_t first = begin; first < stop; first += ROWS) {
      const Block<T> block(min(ROWS, stop - first));
      if constexpr (SECOND) block_second(a, block, first, memory, grad_params);
      else block_backward(a, block, first, memory, grad_params);
    }
    if (a.grad_x) fill_zero(a.grad_x, (zero_x ? begin : stop) * inputs, end * inputs);
    if (SECOND && a.out) fill_zero(a.out, stop * outputs, end * outputs);
  });
  if (!a.grad_params) return;
  const T* const partial = a.workspace + values;
  parallel_for(mlp_parameters(s), 4096, [&](int64_t begin, int64_t end) {
    fill_zero(a.grad_params, begin, end);
    for (int64_t k = 0; k < chunks; ++k)
      for (int64_t i = begin; i < end; ++i) a.grad_params[i] += partial[k * size + i];
  });
}

}  // namespace

template <class T> void mlp_forward(const MlpArgs<T>& a, Stream) {
  constexpr int64_t ROWS = Block<T>::ROWS;
  const MlpShape& s = a.shape;
  const int64_t valid = valid_rows(a.count, a.n), outputs = s.width[s.n_layers];
  parallel_for(a.n, 8 * ROWS, [&](int64_t begin, int64_t end) {
    alignas(64) T values[2][MLP_MAX_WIDTH * ROWS];
    const int64_t stop = clamp(valid, begin, end);
    for (int64_t first = begin; first < stop; first += ROWS) {
      const Block<T> block(min(ROWS, stop - first));
      const T* w = a.params;
      block.read(a.x + first * s.width[0], s.width[0], values[0]);
      for (int l = 0; l < s.n_layers; w += mlp_layer_parameters(s, l++))
        layer<T>(s, l, block, w, values[l % 2], values[1 - l % 2], nullptr);
      block.write(values[s.n_layers % 2], int(outputs), a.out + first * outputs);
    }
    fill_zero(a.out, stop * outputs, end * outputs);
  });
}

template <class T> void mlp_backward(const MlpArgs<T>& a, Stream) { backward<false>(a); }
template <class T> void mlp_second(const MlpArgs<T>& a, Stream) { backward<true>(a); }

DF_INSTANTIATE(mlp_forward, MlpArgs)
DF_INSTANTIATE(mlp_backward, MlpArgs)
DF_INSTANTIATE(mlp_second, MlpArgs)

}  // namespace DF_ISA
}  // namespace df
