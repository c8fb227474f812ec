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

// Numbers of shared memory in which weights, or add_products' values, are staged.
template <class T> constexpr int OUTS = 2 * THREADS / (MlpTile<T>::rows / 4);  // at a time
template <class T> constexpr int STAGED = DEPTH * (OUTS<T> + 2);
template <class T> constexpr int STAGED_BACKWARD =
    max(STAGED<T>, 2 * SQUARE * MlpTile<T>::stride);

// Calls store(o, r, y[o] at rows r to r + 3) for all o, where
// y[o] = bias[o] + sum_i w[o * w_out + i * w_in] x[i]. Begins with a barrier: x may be just written
// and store may overwrite what was read before.
template <class T, class Store>
__device__ inline void multiply(T* staged, const T* w, int w_out, int w_in, const T* bias,
                                int n_out, int n_in, const T* x, const Store& store) {
  constexpr int GROUPS = MlpTile<T>::rows / 4, STRIDE = OUTS<T> + 2;
  const int r = threadIdx.x % GROUPS * 4, out = threadIdx.x / GROUPS * 2;
  for (int first = 0; first < n_out; first += OUTS<T>) {
    T acc[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        acc[j][i] = bias && first + out + j < n_out ? bias[first + out + j] : T(0);
    for (int begin = 0; begin < n_in; begin += DEPTH) {
      __syncthreads();
      for (int e = threadIdx.x; e < DEPTH * OUTS<T>; e += THREADS) {
        // Neighbouring threads read neighbouring weights.
        const int k = w_in == 1 ? e % DEPTH : e / OUTS<T>, o = w_in == 1 ? e / DEPTH : e % OUTS<T>;
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
__device__ inline void add_products(T* staged, const T* g, int n_out, const T* h, int n_in,
                                    T* grad) {
  constexpr int ROWS = MlpTile<T>::rows, STRIDE = MlpTile<T>::stride, QUADS = ROWS / 4;
  constexpr int PER_THREAD = SQUARE * SQUARE / THREADS;
  T *const gs = staged, *const hs = staged + SQUARE * STRIDE;
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
  DF_SHARED(T, staged, STAGED<T>);
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
      multiply(staged, w, n_in, 1, s.bias ? w + n_in * n_out : nullptr, n_out, n_in, x,
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
__device__ inline void tile_backward(const MlpArgs<T>& a, int64_t first, int64_t valid, T* staged,
                                     T* h, T* grad_params) {
  constexpr int STRIDE = MlpTile<T>::stride;
  const MlpShape& s = a.shape;
  const int inputs = s.width[0], outputs = s.width[s.n_layers];
  const T* w = a.params;
  read_rows(a.x + first * inputs, inputs, valid, h);
  int widest = max(inputs, outputs);
  for (int l = 0; l + 1 < s.n_layers; w += mlp_layer_parameters(s, l++)) {
    const int n_in = s.width[l], n_out = s.width[l + 1];
    T *const next = h + columns(s, l) * STRIDE, *const slope = next + n_out * STRIDE;
    multiply(staged, w, n_in, 1, s.bias ? w + n_in * n_out : nullptr, n_out, n_in, h,
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
      add_products(staged, g, n_out, h, n_in, grad);
      if (s.bias) add_sums(g, n_out, grad + n_in * n_out);
    }
    if (l == 0 && !a.grad_x) return;
    const T *const slope = h + n_in * STRIDE, *const values = h;
    multiply<T>(staged, w, 1, n_in, nullptr, n_in, n_out, g, [&](int c, int r, const T(&z)[4]) {
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

// The same along the tangent: d, like h, holds the derivatives of h's values; where h has slopes, d
// has what bends them. A thread meets the same (feature, rows) in every product of a layer, so the
// second may read what the first has left.
template <class T>
__device__ inline void tile_second(const MlpArgs<T>& a, int64_t first, int64_t valid, T* staged,
                                   T* h, T* grad_params) {
  constexpr int STRIDE = MlpTile<T>::stride;
  const MlpShape& s = a.shape;
  const int last = s.n_layers - 1, inputs = s.width[0], outputs = s.width[last + 1];
  const int64_t to_d = mlp_block_columns(s, false) * STRIDE;  // from a value to its derivative
  const T* w = a.params;
  read_rows(a.x + first * inputs, inputs, valid, h);
  read_rows(a.tangent + first * inputs, inputs, valid, h + to_d);
  int widest = max(inputs, outputs);
  for (int l = 0; l < last; w += mlp_layer_parameters(s, l++)) {
    const int n_in = s.width[l], n_out = s.width[l + 1];
    T *const next = h + columns(s, l) * STRIDE, *const slope = next + n_out * STRIDE;
    multiply(staged, w, n_in, 1, s.bias ? w + n_in * n_out : nullptr, n_out, n_in, h,
             [&](int o, int r, const T(&z)[4]) {
#pragma unroll
               for (int i = 0; i < 4; ++i) next[o * STRIDE + r + i] = z[i];
             });
    multiply<T>(staged, w, n_in, 1, nullptr, n_out, n_in, h + to_d, [&](int o, int r, const T(&rz)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = o * STRIDE + r + i;
        const T z = next[at];
        if (s.silu) {
          const T e = std::exp(-z), by_z = mlp_silu_slope(z, e);
          slope[at] = by_z;
          slope[to_d + at] = mlp_silu_bend(z, e) * rz[i];
          next[at] = mlp_silu(z, e);
          next[to_d + at] = by_z * rz[i];
        } else {
          next[at] = mlp_relu(z);
          next[to_d + at] = mlp_relu_backward(next[at], rz[i]);
        }
      }
    });
    widest = max(widest, n_out);
    h = next;
  }
  T *g = h + columns(s, last) * STRIDE, *spare = g + widest * STRIDE;
  if (a.out) {
    multiply<T>(staged, w, s.width[last], 1, nullptr, outputs, s.width[last], h + to_d,
                [&](int o, int r, const T(&z)[4]) {
#pragma unroll
                  for (int i = 0; i < 4; ++i) g[o * STRIDE + r + i] = z[i];
                });
    __syncthreads();
    write_rows(g, outputs, valid, a.n - first, a.out + first * outputs);
    __syncthreads();
  }
  const bool bends = s.silu && last > 0 && a.grad_x;  // else grad_x is zero
  if (!a.grad_params && !bends) return;
  read_rows(a.grad_out + first * outputs, outputs, valid, g);
  for (int l = last; l >= 0; --l) {
    const int n_in = s.width[l], n_out = s.width[l + 1];
    const bool bent = s.silu && l < last;  // the derivative of g is not zero
    __syncthreads();
    if (a.grad_params) {
      T* const grad = grad_params + (w - a.params);
      add_products(staged, g, n_out, h + to_d, n_in, grad);
      if (bent) {
        add_products(staged, g + to_d, n_out, h, n_in, grad);
        if (s.bias) add_sums(g + to_d, n_out, grad + n_in * n_out);
      }
    }
    if (l == 0 && !bends) return;
    if (bent)
      multiply<T>(staged, w, 1, n_in, nullptr, n_in, n_out, g + to_d, [&](int c, int r, const T(&z)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) spare[to_d + c * STRIDE + r + i] = z[i];
      });
    if (l > 0) {
      const T *const slope = h + n_in * STRIDE, *const values = h;
      multiply<T>(staged, w, 1, n_in, nullptr, n_in, n_out, g, [&](int c, int r, const T(&z)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = c * STRIDE + r + i;
          if (s.silu) {
            const T before = bent ? slope[at] * spare[to_d + at] : T(0);
            spare[to_d + at] = slope[to_d + at] * z[i] + before;
            spare[at] = slope[at] * z[i];
          } else {
            spare[at] = mlp_relu_backward(values[at], z[i]);
          }
        }
      });
    }
    T* const done = g;
    g = spare;
    spare = done;
    if (l == 0) break;
    h -= columns(s, l - 1) * STRIDE;
    w -= mlp_layer_parameters(s, l - 1);
  }
  __syncthreads();
  write_rows(g + to_d, inputs, valid, a.n - first, a.grad_x + first * inputs);
}

template <bool SECOND, class T>
__global__ void __launch_bounds__(THREADS, 3) mlp_backward_kernel(MlpArgs<T> a) {
  constexpr int ROWS = MlpTile<T>::rows;
  DF_SHARED(T, staged, STAGED_BACKWARD<T>);
  const int64_t valid = valid_rows(a.count, a.n), inputs = a.shape.width[0];
  const bool params = a.grad_params;
  T* const memory = a.workspace + int64_t(blockIdx.x) *
                                      mlp_chunk_workspace(a.shape, MlpTile<T>::stride, params,
                                                          SECOND);
  T* const grad_params = memory + mlp_block_columns(a.shape, SECOND) * MlpTile<T>::stride;
  const bool zero_x = SECOND && !(a.shape.silu && a.shape.n_layers > 1);
  if (params)
    for (int64_t i = threadIdx.x; i < mlp_parameters(a.shape); i += THREADS) grad_params[i] = T(0);
  for (int64_t first = int64_t(blockIdx.x) * ROWS; first < a.n; first += gridDim.x * ROWS) {
    __syncthreads();  // the tile before is read to its end
    if (first < valid) {
      if constexpr (SECOND) tile_second(a, first, valid - first, staged, memory, grad_params);
      else tile_backward(a, first, valid - first, staged, memory, grad_params);
    } else if (SECOND && a.out) {
      const int outputs = a.shape.width[a.shape.n_layers];
      write_rows<T>(nullptr, outputs, 0, a.n - first, a.out + first * outputs);
    }
    if (a.grad_x && (zero_x || first >= valid))
      write_rows<T>(nullptr, int(inputs), 0, a.n - first, a.grad_x + first * inputs);
  }
}

// grad_params from the partial gradients of all blocks: 32 parameters a block of threads, 8
// threads each. Sums in a fixed order.
constexpr int SLICES = 8;
template <class T>
__global__ void __launch_bounds__(WARP * SLICES)
    mlp_sum_kernel(MlpArgs<T> a, int64_t blocks, bool second) {
  DF_SHARED(T, partial, SLICES * WARP);
  const int64_t n = mlp_parameters(a.shape), i = int64_t(blockIdx.x) * WARP + lane_id();
  const int64_t size = mlp_chunk_workspace(a.shape, MlpTile<T>::stride, true, second);
  const T* const from = a.workspace + mlp_block_columns(a.shape, second) * MlpTile<T>::stride + i;
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

template <bool SECOND, class T> void backward(const MlpArgs<T>& a, Stream stream) {
  const int64_t blocks = mlp_blocks<T>(a.shape, a.n);
  launch("mlp_backward_kernel", mlp_backward_kernel<SECOND, T>, unsigned(blocks), THREADS, 0,
         stream, a);
  if (a.grad_params)
    launch("mlp_sum_kernel", mlp_sum_kernel<T>, blocks_for(mlp_parameters(a.shape), WARP),
           WARP * SLICES, 0, stream, a, blocks, SECOND);
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
  if constexpr (std::is_same_v<T, half>) mlp_half_backward(a, stream);
  else backward<false>(a, stream);
}

template <class T> void mlp_second(const MlpArgs<T>& a, Stream stream) {
  backward<true>(a, stream);
}

DF_INSTANTIATE(mlp_forward, MlpArgs)
DF_INSTANTIATE(mlp_backward, MlpArgs)
DF_INSTANTIATE(mlp_second, MlpArgs)
DF_INSTANTIATE_HALF(mlp_forward, MlpArgs)
DF_INSTANTIATE_HALF(mlp_backward, MlpArgs)

}  // namespace DF_ISA
}  // namespace df
