// Multilayer perceptron on the CPU: a block of rows through the layers, forward, back and along a
// tangent.
#include "mlp_block.h"

namespace df {
namespace DF_ISA {
namespace {

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
