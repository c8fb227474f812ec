// Fully connected layers: h_0 = x, h_(l+1) = act(W_l h_l + b_l), the last without act.
//
// act is relu, max(z, 0), or silu, z / (1 + exp(-z)). All parameters lie in one array: W_0
// (out, in) row by row, b_0 (out) if there are biases, W_1, and so on.
// Backward computes the hidden values again, block of rows by block of rows.
//
// Second: the derivative along a tangent v of the rows, d/de at x + e v, of what the others give:
// of the outputs (out, or null: not wanted), of grad_x and of grad_params. These are also the
// gradients of <v, grad_x> by grad_out, x and params: what backward's own backward asks for. With
// R the derivative along v (Pearlmutter 1994), d_l the gradient of z_l:
//   R h_0 = v,  R z_(l+1) = W_l R h_l,  R h_l = act'(z_l) R z_l,
//   R d_l = act''(z_l) R z_l W_l^T d_(l+1) + act'(z_l) W_l^T R d_(l+1),  none at the last layer,
//   R grad W_l = d_(l+1) R h_l^T + R d_(l+1) h_l^T.  relu: act'' = 0, so R d = 0 and R grad_x = 0.
// Half (CUDA): sums, the gradient of params and the workspace are float (Wide).
#pragma once

#include "common.h"

namespace df {

constexpr int MLP_MAX_LAYERS = 32, MLP_MAX_WIDTH = 256;

struct MlpShape {
  int n_layers;                   // 1..32
  int width[MLP_MAX_LAYERS + 1];  // inputs, hidden layers', outputs; 1..256 each
  bool bias;
  bool silu;                      // else relu
};

template <class T> struct MlpArgs {
  const T* x;            // (n, inputs)
  const T* params;       // (mlp_parameters,)
  const T* grad_out;     // (n, outputs) gradient of out; not in forward
  const T* tangent;      // (n, inputs) gradient of backward's grad_x; second only
  T* out;                // (n, outputs)
  T* grad_x;             // (n, inputs) gradient of x, or null: not wanted; not in forward
  Wide<T>* grad_params;  // (mlp_parameters,) gradient of params, or null: not wanted
  Wide<T>* workspace;    // (mlp_workspace,) anything
  const int32_t* count;  // (1,) number of valid rows, or null: all
  int64_t n;             // rows
  MlpShape shape;
};

inline namespace DF_ISA {

DF_HD int64_t mlp_layer_parameters(const MlpShape& s, int layer) {
  return int64_t(s.width[layer] + s.bias) * s.width[layer + 1];
}
DF_HD int64_t mlp_parameters(const MlpShape& s) {
  int64_t total = 0;
  for (int l = 0; l < s.n_layers; ++l) total += mlp_layer_parameters(s, l);
  return total;
}

template <class T> DF_HD T mlp_relu(T z) { return z < T(0) ? T(0) : z; }  // NaN stays NaN
// The gradient of z from that of h = relu(z): none at zero.
template <class T> DF_HD T mlp_relu_backward(T h, T g) { return h <= T(0) ? T(0) : g; }
// silu and its derivative from z and e = exp(-z).
template <class T> DF_HD T mlp_silu(T z, T e) { return z * (T(1) / (T(1) + e)); }
template <class T> DF_HD T mlp_silu_slope(T z, T e) {
  const T s = T(1) / (T(1) + e);
  return s + z * s * (T(1) - s);
}
template <class T> DF_HD T mlp_silu_bend(T z, T e) {
  const T s = T(1) / (T(1) + e);
  return s * (T(1) - s) * (T(2) + z * (T(1) - T(2) * s));
}

// The CPU's blocks and chunks of rows: a chunk has its own workspace and partial gradient, and
// there are at most 64, whatever the number of rows and threads.
template <class T> struct MlpBlock { static constexpr int rows = 512 / sizeof(T); };
DF_HD int64_t mlp_chunk_rows(int64_t n) { return max<int64_t>(1024, (n + 8191) / 8192 * 128); }
DF_HD int64_t mlp_chunks(int64_t n) { return (n + mlp_chunk_rows(n) - 1) / mlp_chunk_rows(n); }

// Columns of a block's values in a chunk's workspace: every layer's inputs, hidden layers' slopes
// (silu), and two gradients. Second: and each of these' derivative along the tangent.
DF_HD int64_t mlp_block_columns(const MlpShape& s, bool second) {
  int64_t total = s.width[0], widest = s.width[0];
  for (int l = 1; l <= s.n_layers; ++l) {
    if (l < s.n_layers) total += s.width[l] * (s.silu ? 2 : 1);
    widest = max<int64_t>(widest, s.width[l]);
  }
  return (total + 2 * widest) * (second ? 2 : 1);
}
DF_HD int64_t mlp_chunk_workspace(const MlpShape& s, int64_t rows, bool params, bool second) {
  return mlp_block_columns(s, second) * rows + (params ? (mlp_parameters(s) + 15) / 16 * 16 : 0);
}

#if defined(DF_IS_CUDA)
// A thread block of the GPU's float and double kernels takes `rows` rows at a time. Feature c of
// row r lies at c * stride + r: a padded stride, so that features and rows both spread over banks.
template <class T> struct MlpTile {
  static constexpr int rows = 128 / sizeof(T), stride = rows + 4;
};
// Backward's thread blocks: each has its own workspace and partial gradient, as the CPU's chunks.
template <class T> DF_HD int64_t mlp_blocks(const MlpShape& s, int64_t n) {
  const int64_t most = clamp<int64_t>((int64_t(1) << 24) / mlp_parameters(s), 64, 1024);
  return min((n + MlpTile<T>::rows - 1) / MlpTile<T>::rows, most);
}

// ---- half: what lies in a block's shared memory, padded for tensor cores (mlp_tiles.h) ----
constexpr int MLP_HALF_MAX_WIDTH = 128;
constexpr int64_t MLP_HALF_SHARED = 99 * 1024;  // the least that sm_80 to sm_120 give a block

// Hidden layers have one width, inputs and outputs multiples of 16. No more than 128 all.
DF_HD int mlp_half_hidden(const MlpShape& s) {
  int width = 16;
  for (int l = 1; l < s.n_layers; ++l)
    while (width < s.width[l]) width *= 2;
  return width;
}
DF_HD int mlp_half_width(const MlpShape& s, int layer) {
  return layer > 0 && layer < s.n_layers ? mlp_half_hidden(s) : (s.width[layer] + 15) / 16 * 16;
}
// From row to row: an odd multiple of 8 words.
DF_HD int mlp_half_stride(int width) { return width + (width % 32 == 0 ? 16 : 0); }
DF_HD int64_t mlp_half_weights(const MlpShape& s) {  // halves, of all layers
  int64_t total = 0;
  for (int l = 0; l < s.n_layers; ++l)
    total += mlp_half_width(s, l + 1) * mlp_half_stride(mlp_half_width(s, l));
  return total;
}
// Bytes of weights and (float) biases; and of backward's values of every layer.
DF_HD int64_t mlp_half_parameter_bytes(const MlpShape& s) {
  int64_t biases = 0;
  for (int l = 0; l < s.n_layers && s.bias; ++l) biases += mlp_half_width(s, l + 1);
  return 2 * mlp_half_weights(s) + 4 * biases;
}
DF_HD int64_t mlp_half_value_bytes(const MlpShape& s, int64_t rows) {
  const int64_t hidden = mlp_half_stride(mlp_half_hidden(s)) * (s.silu ? 2 : 1);
  return 2 * rows * (mlp_half_stride(mlp_half_width(s, 0)) + (s.n_layers - 1) * hidden +
                     mlp_half_stride(mlp_half_width(s, s.n_layers)));
}
DF_HD bool mlp_half_fits(const MlpShape& s) {
  for (int l = 0; l <= s.n_layers; ++l)
    if (s.width[l] > MLP_HALF_MAX_WIDTH) return false;
  return s.n_layers > 1 &&
         mlp_half_parameter_bytes(s) + mlp_half_value_bytes(s, 16) <= MLP_HALF_SHARED;
}
#endif

// Numbers of Wide<T> in the workspace of mlp_backward or mlp_second.
template <class T>
DF_HD int64_t mlp_workspace(const MlpShape& s, int64_t n, bool params, bool second) {
#if defined(DF_IS_CUDA)
  if constexpr (std::is_same_v<T, half>) return 0;
  else return mlp_blocks<T>(s, n) * mlp_chunk_workspace(s, MlpTile<T>::stride, params, second);
#else
  return mlp_chunks(n) * mlp_chunk_workspace(s, MlpBlock<T>::rows, params, second);
#endif
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(mlp_forward, MlpArgs)
DF_DECLARE(mlp_backward, MlpArgs)
DF_DECLARE(mlp_second, MlpArgs)
