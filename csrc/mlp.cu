// Multilayer perceptron on the GPU. Half runs on tensor cores: mlp_half.h. Here float and double:
// a block takes a tile of rows through all layers, its values feature by feature (MlpTile), the
// weights of 16 inputs at a time staged in shared memory; a thread computes 4 rows x 2 outputs.
// Forward keeps two layers' values in shared memory. Backward keeps all in the block's workspace,
// which the caches hold, adds its gradient of params up there, tile after tile, and a second
// kernel sums the blocks' in order: the same result every time.
#include "gpu.h"
#include "mlp.h"
#include "mlp_half.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 128;
constexpr int DEPTH = 16;   // inputs whose weights are staged at a time
constexpr int SQUARE = 32;  // outputs x inputs whose gradient is computed at a time

template <class T> struct alignas(16) Quad { T v[4]; };
template <class T> __device__ inline Quad<T>& quad(T* p) { return *reinterpret_cast<Quad<T>*>(p); }
template <class T> __device__ inline const Quad<T>& quad(const T* p) {
  return *reinterpret_cast<const Quad<T>*>(p);
}

// Calls store(o, r, y[o] at rows r to r + 3) for all o, where
// y[o] = bias[o] + sum_i w[o * w_out + i * w_in] x[i]. Begins with a barrier: x may be just written
// and store may overwrite what was read before.
template <class T, class Store>
__device__ inline void multiply(const T* w, int w_out, int w_in, const T* bias, int n_out,
                                int n_in, const T* x, const Store& store) {
  constexpr int GROUPS = MlpTile<T>::rows / 4, OUTS = 2 * THREADS / GROUPS, STRIDE = OUTS + 2;
  DF_SHARED(T, staged, DEPTH * STRIDE);
  const int r = threadIdx.x % GROUPS * 4, out = threadIdx.x / GROUPS * 2;
  for (int first = 0; first < n_out; first += OUTS) {
    T acc[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        acc[j][i] = bias && first + out + j < n_out ? bias[first + out + j] : T(0);
    for (int begin = 0; begin < n_in; begin += DEPTH) {
      __syncthreads();
      for (int e = threadIdx.x; e < DEPTH * OUTS; e += THREADS) {
        // Neighbouring threads read neighbouring weights.
        const int k = w_in == 1 ? e % DEPTH : e / OUTS, o = w_in == 1 ? e / DEPTH : e % OUTS;
        const bool inside = begin + k < n_in && first + o < n_out;
        staged[k * STRIDE + o] = inside ? w[(first + o) * w_out + (begin + k) * w_in] : T(0);
      }
      __syncthreads();
      const int depth = min(DEPTH, n_in - begin);
#pragma unroll 4
      for (int k = 0; k < depth; ++k) {
        const Quad<T> values = quad(x + (begin + k) * MlpTile<T>::stride + r);
        const T* const weights = staged + k * STRIDE + out;
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[j][i] += weights[j] * values.v[i];
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (first + out + j < n_out) store(first + out + j, r, acc[j]);
  }
}

// Adds sum over rows of g[o] h[i] to grad[o * n_in + i]. Begins with a barrier.
template <class T>
__device__ inline void add_products(const T* g, int n_out, const T* h, int n_in, T* grad) {
  constexpr int ROWS = MlpTile<T>::rows, STRIDE = MlpTile<T>::stride, QUADS = ROWS / 4;
  constexpr int PER_THREAD = SQUARE * SQUARE / THREADS;
  DF_SHARED(T, gs, SQUARE * STRIDE);
  DF_SHARED(T, hs, SQUARE * STRIDE);
  const int i = threadIdx.x % SQUARE, o = threadIdx.x / SQUARE * PER_THREAD;
  for (int o0 = 0; o0 < n_out; o0 += SQUARE)
    for (int i0 = 0; i0 < n_in; i0 += SQUARE) {
      __syncthreads();
      for (int e = threadIdx.x; e < SQUARE * QUADS; e += THREADS) {
        const int c = e / QUADS, at = e % QUADS * 4;
        const Quad<T> zero{};
        quad(gs + c * STRIDE + at) = o0 + c < n_out ? quad(g + (o0 + c) * STRIDE + at) : zero;
        quad(hs + c * STRIDE + at) = i0 + c < n_in ? quad(h + (i0 + c) * STRIDE + at) : zero;
      }
      __syncthreads();
      T acc[PER_THREAD] = {};
#pragma unroll 2
      for (int r = 0; r < ROWS; r += 4) {
        const Quad<T> x = quad(hs + i * STRIDE + r);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
          const Quad<T> y = quad(gs + (o + j) * STRIDE + r);
#pragma unroll
          for (int q = 0; q < 4; ++q) acc[j] += x.v[q] * y.v[q];
        }
      }
#pragma unroll
      for (int j = 0; j < PER_THREAD; ++j)
        if (o0 + o + j < n_out && i0 + i < n_in) grad[(o0 + o + j) * n_in + i0 + i] += acc[j];
    }
}
template <class T> __device__ inline void add_sums(const T* g, int n_out, T* grad) {
  for (int o = threadIdx.x; o < n_out; o += THREADS) {
    T total = 0;
    for (int r = 0; r < MlpTile<T>::rows; ++r) total += g[o * MlpTile<T>::stride + r];
    grad[o] += total;
  }
}

// A tile's first n rows of `width` numbers to features, zero past them; and all its rows back.
template <class T>
__device__ inline void read_rows(const T* rows, int width, int64_t n, T* values) {
  for (int e = threadIdx.x; e < width * MlpTile<T>::rows; e += THREADS) {
    const int r = e / width, c = e % width;
    values[c * MlpTile<T>::stride + r] = r < n ? rows[e] : T(0);
  }
}
// Rows up to `valid` from the features (not read if 0), up to `n` zero.
template <class T>
__device__ inline void write_rows(const T* values, int width, int64_t valid, int64_t n, T* rows) {
  for (int e = threadIdx.x; e < width * MlpTile<T>::rows; e += THREADS) {
    const int r = e / width, c = e % width;
    if (r < n) rows[e] = r < valid ? values[c * MlpTile<T>::stride + r] : T(0);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 6) mlp_forward_kernel(MlpArgs<T> a) {
  constexpr int ROWS = MlpTile<T>::rows, STRIDE = MlpTile<T>::stride;
  const MlpShape& s = a.shape;
  DF_DYNAMIC_SHARED(T, values);  // two layers' values, the widest's size each
  const int64_t first = int64_t(blockIdx.x) * ROWS;
  const int64_t valid = valid_rows(a.count, a.n) - first;
  const int inputs = s.width[0], outputs = s.width[s.n_layers];
  T *x = values, *y = values;
  if (valid > 0) {
    int widest = inputs;
    for (int l = 1; l <= s.n_layers; ++l) widest = max(widest, s.width[l]);
    y += widest * STRIDE;
    read_rows(a.x + first * inputs, inputs, valid, x);
    const T* w = a.params;
    for (int l = 0; l < s.n_layers; w += mlp_layer_parameters(s, l++)) {
      const int n_in = s.width[l], n_out = s.width[l + 1];
      const bool active = l + 1 < s.n_layers;
      multiply(w, n_in, 1, s.bias ? w + n_in * n_out : nullptr, n_out, n_in, x,
               [&](int o, int r, const T(&z)[4]) {
                 Quad<T> h;
#pragma unroll
                 for (int i = 0; i < 4; ++i)
                   h.v[i] = !active  ? z[i]
                            : s.silu ? mlp_silu(z[i], std::exp(-z[i]))
                                     : mlp_relu(z[i]);
                 quad(y + o * STRIDE + r) = h;
               });
      T* const done = x;
      x = y;
      y = done;
    }
    __syncthreads();
  }
  write_rows(x, outputs, valid, a.n - first, a.out + first * outputs);
}

// Columns of a tile in the workspace: layer l's inputs and, in hidden layers with silu, slopes.
__device__ inline int columns(const MlpShape& s, int l) {
  return s.width[l] * (s.silu && l > 0 ? 2 : 1);
}

// One tile: the hidden values again into the workspace, then back through the layers.
template <class T>
__device__ inline void tile_backward(const MlpArgs<T>& a, int64_t first, int64_t valid, T* h,
                                     T* grad_params) {
  constexpr int STRIDE = MlpTile<T>::stride;
  const MlpShape& s = a.shape;
  const int inputs = s.width[0], outputs = s.width[s.n_layers];
  const T* w = a.params;
  read_rows(a.x + first * inputs, inputs, valid, h);
  int widest = max(inputs, outputs);
  for (int l = 0; l + 1 < s.n_layers; w += mlp_layer_parameters(s, l++)) {
    const int n_in = s.width[l], n_out = s.width[l + 1];
    T *const next = h + columns(s, l) * STRIDE, *const slope = next + n_out * STRIDE;
    multiply(w, n_in, 1, s.bias ? w + n_in * n_out : nullptr, n_out, n_in, h,
             [&](int o, int r, const T(&z)[4]) {
#pragma unroll
               for (int i = 0; i < 4; ++i) {
                 const int at = o * STRIDE + r + i;
                 if (s.silu) {
                   const T e = std::exp(-z[i]);
                   slope[at] = mlp_silu_slope(z[i], e);
                   next[at] = mlp_silu(z[i], e);
                 } else {
                   next[at] = mlp_relu(z[i]);
                 }
               }
             });
    widest = max(widest, n_out);
    h = next;
  }
  T *g = h + columns(s, s.n_layers - 1) * STRIDE, *spare = g + widest * STRIDE;
  read_rows(a.grad_out + first * outputs, outputs, valid, g);
  for (int l = s.n_layers - 1; l >= 0; --l) {
    const int n_in = s.width[l], n_out = s.width[l + 1];
    __syncthreads();
    if (a.grad_params) {
      T* const grad = grad_params + (w - a.params);
      add_products(g, n_out, h, n_in, grad);
      if (s.bias) add_sums(g, n_out, grad + n_in * n_out);
    }
    if (l == 0 && !a.grad_x) return;
    const T *const slope = h + n_in * STRIDE, *const values = h;
    multiply<T>(w, 1, n_in, nullptr, n_in, n_out, g, [&](int c, int r, const T(&z)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = c * STRIDE + r + i;
        spare[at] = l == 0 ? z[i] : s.silu ? z[i] * slope[at] : mlp_relu_backward(values[at], z[i]);
      }
    });
    T* const done = g;
    g = spare;
    spare = done;
    if (l == 0) break;
    h -= columns(s, l - 1) * STRIDE;
    w -= mlp_layer_parameters(s, l - 1);
  }
  __syncthreads();
  write_rows(g, inputs, valid, a.n - first, a.grad_x + first * inputs);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 3) mlp_backward_kernel(MlpArgs<T> a) {
  constexpr int ROWS = MlpTile<T>::rows;
  const int64_t valid = valid_rows(a.count, a.n), inputs = a.shape.width[0];
  const bool params = a.grad_params;
  T* const memory = a.workspace + int64_t(blockIdx.x) *
                                      mlp_chunk_workspace(a.shape, MlpTile<T>::stride, params);
  T* const grad_params = memory + mlp_block_columns(a.shape) * MlpTile<T>::stride;
  if (params)
    for (int64_t i = threadIdx.x; i < mlp_parameters(a.shape); i += THREADS) grad_params[i] = T(0);
  for (int64_t first = int64_t(blockIdx.x) * ROWS; first < a.n; first += gridDim.x * ROWS) {
    __syncthreads();  // the tile before is read to its end
    if (first < valid)
      tile_backward(a, first, valid - first, memory, grad_params);
    else if (a.grad_x)
      write_rows<T>(nullptr, int(inputs), 0, a.n - first, a.grad_x + first * inputs);
  }
}

// grad_params from the partial gradients of all blocks: 32 parameters a block of threads, 8
// threads each. Sums in a fixed order.
constexpr int SLICES = 8;
template <class T>
__global__ void __launch_bounds__(WARP * SLICES) mlp_sum_kernel(MlpArgs<T> a, int64_t blocks) {
  DF_SHARED(T, partial, SLICES * WARP);
  const int64_t n = mlp_parameters(a.shape), i = int64_t(blockIdx.x) * WARP + lane_id();
  const int64_t size = mlp_chunk_workspace(a.shape, MlpTile<T>::stride, true);
  const T* const from = a.workspace + mlp_block_columns(a.shape) * MlpTile<T>::stride + i;
  T total = 0;
  if (i < n)
    for (int64_t k = threadIdx.x / WARP; k < blocks; k += SLICES) total += from[k * size];
  partial[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x >= WARP || i >= n) return;
#pragma unroll
  for (int k = 1; k < SLICES; ++k) total += partial[k * WARP + threadIdx.x];
  a.grad_params[i] = total;
}

}  // namespace

template <class T> void mlp_forward(const MlpArgs<T>& a, Stream stream) {
  if constexpr (std::is_same_v<T, half>) {
    mlp_half_forward(a, stream);
  } else {
    int widest = 0;
    for (int l = 0; l <= a.shape.n_layers; ++l) widest = max(widest, a.shape.width[l]);
    launch("mlp_forward_kernel", mlp_forward_kernel<T>, blocks_for(a.n, MlpTile<T>::rows), THREADS,
           2 * widest * MlpTile<T>::stride * sizeof(T), stream, a);
  }
}

template <class T> void mlp_backward(const MlpArgs<T>& a, Stream stream) {
  if constexpr (std::is_same_v<T, half>) {
    mlp_half_backward(a, stream);
  } else {
    const int64_t blocks = mlp_blocks<T>(a.shape, a.n);
    launch("mlp_backward_kernel", mlp_backward_kernel<T>, unsigned(blocks), THREADS, 0, stream, a);
    if (a.grad_params)
      launch("mlp_sum_kernel", mlp_sum_kernel<T>, blocks_for(mlp_parameters(a.shape), WARP),
             WARP * SLICES, 0, stream, a, blocks);
  }
}

DF_INSTANTIATE(mlp_forward, MlpArgs)
DF_INSTANTIATE(mlp_backward, MlpArgs)
DF_INSTANTIATE_HALF(mlp_forward, MlpArgs)
DF_INSTANTIATE_HALF(mlp_backward, MlpArgs)

}  // namespace DF_ISA
}  // namespace df
