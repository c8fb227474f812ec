// Fully connected layers: h_0 = x, h_(l+1) = act(W_l h_l + b_l), the last without act.
//
// act is relu, max(z, 0), or silu, z / (1 + exp(-z)). All parameters lie in one array: W_0
// (out, in) row by row, b_0 (out) if there are biases, W_1, and so on.
// Backward computes the hidden values again, block of rows by block of rows.
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
  const T* grad_out;     // (n, outputs) gradient of out; backward only, as the next three
  T* out;                // (n, outputs)
  T* grad_x;             // (n, inputs) gradient of x, or null: not wanted
  T* grad_params;        // (mlp_parameters,) gradient of params, or null: not wanted
  T* workspace;          // (mlp_workspace,) anything
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

// The CPU's blocks and chunks of rows: a chunk has its own workspace and partial gradient, and
// there are at most 64, whatever the number of rows and threads.
template <class T> struct MlpBlock { static constexpr int rows = 512 / sizeof(T); };
DF_HD int64_t mlp_chunk_rows(int64_t n) { return max<int64_t>(1024, (n + 8191) / 8192 * 128); }
DF_HD int64_t mlp_chunks(int64_t n) { return (n + mlp_chunk_rows(n) - 1) / mlp_chunk_rows(n); }

// Columns of a block's values in a chunk's workspace: every layer's inputs, hidden layers' slopes
// (silu), and two gradients.
DF_HD int64_t mlp_block_columns(const MlpShape& s) {
  int64_t total = s.width[0], widest = s.width[0];
  for (int l = 1; l <= s.n_layers; ++l) {
    if (l < s.n_layers) total += s.width[l] * (s.silu ? 2 : 1);
    widest = max<int64_t>(widest, s.width[l]);
  }
  return total + 2 * widest;
}
DF_HD int64_t mlp_chunk_workspace(const MlpShape& s, int64_t rows, bool params) {
  return mlp_block_columns(s) * rows + (params ? (mlp_parameters(s) + 15) / 16 * 16 : 0);
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(mlp_forward, MlpArgs)
DF_DECLARE(mlp_backward, MlpArgs)
