// Multilayer perceptron on the CPU. Rows are taken in blocks whose values lie feature by feature
// (feature c of row r at values[c * ROWS + r]), small enough for the caches; a register tile of
// 4 features x 2 vectors of rows does nearly all the work, forward and back.
#include "mlp_simd.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int TILE = 4;  // features a tile
constexpr int GRAD_TILE = VECTOR_BYTES == 64 ? 4 : 2;  // features of g, times 4 of x: by registers

// Memory that is soon read or written, asked for a few cache lines at a time, between the tiles: what
// it takes is then hidden behind the arithmetic. All at once, the tiles would wait for most of it.
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

// Layer l from x to y, with its activation; w: the layer's parameters.
template <class T>
void layer(const MlpShape& s, int l, Block<T> block, const T* w, const T* x, T* y, T* slope) {
  const int n_in = s.width[l], n_out = s.width[l + 1];
  const T* const bias = s.bias ? w + n_in * n_out : nullptr;
  if (l + 1 < s.n_layers && !s.silu)
    return multiply(block, w, n_in, int64_t(1), bias, n_out, n_in, x, y, Relu<T>());
  multiply(block, w, n_in, int64_t(1), bias, n_out, n_in, x, y);
  if (l + 1 == s.n_layers) return;
  if (slope) activate_silu<true>(block, n_out, y, slope);
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

// What the rows [begin, end) will write, and those after them, up to `stop`, read: first a.x.
template <class T> Ahead ahead_of(const MlpArgs<T>& a, int64_t begin, int64_t end, int64_t stop) {
  const int inputs = a.shape.width[0], outputs = a.shape.width[a.shape.n_layers];
  const int64_t next_end = min<int64_t>(end + Block<T>::ROWS, stop);
  Ahead ahead;
  ahead.add(a.out, outputs, begin, end);
  ahead.add(a.grad_x, inputs, begin, end);
  ahead.add(a.grad_out, outputs, end, next_end);
  ahead.add(a.tangent, inputs, end, next_end);
  ahead.add(a.x, inputs, end, next_end);
  return ahead;
}

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
    const auto back = [&](const auto& finish) {
      multiply<T>(block, w, 1, n_in, nullptr, n_in, n_out, s.g, s.spare, finish);
    };
    if (l == 0) back(Plain<T>());
    else if (shape.silu) back(Scaled<T>{s.slope[l]});
    else back(ReluBackward<T>{s.h[l]});
    s.turn();
    if (l > 0) w -= mlp_layer_parameters(shape, l - 1);
  }
  block.write(s.g, shape.width[0], a.grad_x + begin * shape.width[0]);
}

// The same along the tangent: d holds the derivatives of s's values, d.slope what bends them.
template <class T>
void block_second(const MlpArgs<T>& a, Block<T> block, int64_t begin, T* memory,
                  T* grad_params) {
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
  const int64_t valid = valid_rows(a.count, a.n);
  const int inputs = s.width[0], outputs = s.width[s.n_layers];
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
      const int64_t last = min(first + ROWS, stop);
      Ahead ahead = ahead_of(a, first, last, stop);
      const Block<T> block(last - first, &ahead);
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
  const int64_t valid = valid_rows(a.count, a.n);
  const int outputs = s.width[s.n_layers];
  parallel_for(a.n, 8 * ROWS, [&](int64_t begin, int64_t end) {
    alignas(64) T values[2][MLP_MAX_WIDTH * ROWS];
    const int64_t stop = clamp(valid, begin, end);
    for (int64_t first = begin; first < stop; first += ROWS) {
      const int64_t last = min(first + ROWS, stop);
      Ahead ahead = ahead_of(a, first, last, stop);
      const Block<T> block(last - first, &ahead);
      const T* w = a.params;
      block.read(a.x + first * s.width[0], s.width[0], values[0]);
      for (int l = 0; l < s.n_layers; w += mlp_layer_parameters(s, l++))
        layer<T>(s, l, block, w, values[l % 2], values[1 - l % 2], nullptr);
      block.write(values[s.n_layers % 2], outputs, a.out + first * outputs);
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
