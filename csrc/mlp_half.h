// Multilayer perceptron in half precision, on tensor cores; see mlp_tiles.h for how.
//
// A block keeps all weights in shared memory and goes through many tiles of rows; a warp takes 16
// rows (forward: 32) from x through all layers, their values in registers.
// Backward computes hidden values again into shared memory, then, from the last layer, with g the
// gradient of a layer's outputs, h its inputs: the products g^T h over the block's rows, 16 x 16
// at a time (a square), each in registers of one warp, its slot, until the block has done all its
// tiles and adds them to grad_params; then g W, which takes the place of h. A column of ones
// beside h gives the biases' gradient. What exceeds the slots is computed by further blocks
// (blockIdx.y), which repeat the rest.
#pragma once

#include "mlp_tiles.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int HALF_THREADS = 128;
constexpr int FORWARD_TILES = 2;     // of 16 rows a warp: weights are read once for both
constexpr int FORWARD_BLOCKS = 1024;  // at most; each loads the weights once
constexpr int BACKWARD_BLOCKS = 512;  // and each adds to all of grad_params

// ---- a block's shared memory: weights, biases, backward's values -------------------------------
template <int W> struct Network {
  static constexpr int G = W / 16, S = W + (W % 32 == 0 ? 16 : 0);
  const MlpShape& s;
  half* weights;
  int inputs = mlp_half_width(s, 0), outputs = mlp_half_width(s, s.n_layers);
  int input_stride = mlp_half_stride(inputs), output_stride = mlp_half_stride(outputs);
  int rows = blockDim.x / 2;
  __device__ Network(const MlpShape& shape, half* shared) : s(shape), weights(shared) {}

  // Layer l's weights and biases; columns of the rows of its inputs.
  __device__ half* w(int l) const {
    return weights + (l == 0 ? 0 : W * (input_stride + (l - 1) * S));
  }
  __device__ float* bias(int l) const {
    return s.bias ? reinterpret_cast<float*>(w(s.n_layers - 1) + outputs * S) + l * W : nullptr;
  }
  __device__ int stride(int l) const {
    return l == 0 ? input_stride : l == s.n_layers ? output_stride : S;
  }
  // Layer l's inputs (rows, stride(l)); l = n_layers: the outputs' gradient. Slopes for silu.
  __device__ half* values(int l) const {
    half* const first = w(s.n_layers - 1) + outputs * S +
                        (s.bias ? 2 * ((s.n_layers - 1) * W + outputs) : 0);
    return first + (l == 0 ? 0 : rows * (input_stride + (l - 1) * S * (s.silu ? 2 : 1)));
  }
  __device__ half* slopes(int l) const { return values(l) + rows * S; }

  // Squares of layer l's gradient, the biases' column last: number of columns, and of squares
  // before it.
  __device__ int columns(int l) const { return (l == 0 ? inputs / 16 : G) + s.bias; }
  __device__ int squares_before(int l) const {
    return l == 0 ? 0 : G * (columns(0) + (l - 1) * columns(1));
  }
  __device__ int squares(int l) const {
    return columns(l) * (l + 1 == s.n_layers ? outputs / 16 : G);
  }

  __device__ void load(const half* params) const {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP, column = 4 * lane_id();
    for (int l = 0; l < s.n_layers; params += mlp_layer_parameters(s, l++)) {
      const int n_in = s.width[l], n_out = s.width[l + 1], padded = l == 0 ? inputs : W;
      const int n_rows = l + 1 == s.n_layers ? outputs : W;
      const bool whole = is_whole(params, n_in);
      for (int o = warp; o < n_rows && column < padded; o += warps)
        words(w(l) + slot_of(o) * stride(l) + column) =
            o < n_out ? load4(params + o * n_in, column, n_in, whole) : uint2{0, 0};
      for (int o = threadIdx.x; o < n_rows && s.bias; o += blockDim.x)
        bias(l)[o] = o < n_out ? __half2float(params[n_in * n_out + o]) : 0.0f;
    }
    __syncthreads();
  }
};

// The first layer for M fragments of rows: x(k) gives group k of their inputs, done(o, sums) takes
// group o of the outputs.
template <int W, int M, class X, class Done>
__device__ inline void first_layer(const Network<W>& net, Lane lane, const X& x, const Done& done) {
  Sums acc[W / 16][M];
#pragma unroll
  for (int o = 0; o < W / 16; ++o)
#pragma unroll
    for (int m = 0; m < M; ++m) start(acc[o][m], net.s.bias ? net.bias(0) + 16 * o : nullptr, lane);
  for (int k = 0; k < net.inputs / 16; ++k) {
    Fragment a[M];
    x(k, a);
#pragma unroll
    for (int o = 0; o < W / 16; ++o)
      forward_step<M>(acc[o], a, net.w(0) + 16 * (o * net.input_stride + k), net.input_stride,
                      lane);
  }
#pragma unroll
  for (int o = 0; o < W / 16; ++o) done(o, acc[o]);
}
// Group o of layer l's outputs, l > 0, from the whole of its inputs.
template <int W, int M>
__device__ inline void layer_group(const Network<W>& net, Lane lane, int l, int o,
                                   const Fragment (&h)[W / 16][M], Sums (&acc)[M]) {
#pragma unroll
  for (int m = 0; m < M; ++m) start(acc[m], net.s.bias ? net.bias(l) + 16 * o : nullptr, lane);
#pragma unroll
  for (int k = 0; k < W / 16; ++k)
    forward_step<M>(acc, h[k], net.w(l) + 16 * (o * net.S + k), net.S, lane);
}
template <class T, int N> __device__ inline void copy_all(T (&to)[N], const T (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = from[i];
}

template <int W>
__global__ void __launch_bounds__(HALF_THREADS) mlp_half_forward_kernel(MlpArgs<half> a) {
  constexpr int G = W / 16, M = FORWARD_TILES;
  DF_DYNAMIC_SHARED(half, shared);
  const MlpShape& s = a.shape;
  const Network<W> net(s, shared);
  const Lane lane;
  net.load(a.params);
  const int64_t valid = valid_rows(a.count, a.n), step = int64_t(gridDim.x) * (blockDim.x / 2 * M);
  const int n_in = s.width[0], n_out = s.width[s.n_layers];
  const bool whole_in = is_whole(a.x, n_in), whole_out = is_whole(a.out, n_out);
  for (int64_t first = global_thread() / WARP * (16 * M); first < a.n; first += step) {
    Fragment h[G][M];
    const int64_t row = first + lane.g;
    const auto store = [&](int m, int o, const Fragment& f) {
      store_rows(a.out, row + 16 * m, valid, a.n, 16 * o + 4 * lane.t, n_out, whole_out, f);
    };
    if (first >= valid) {
      for (int o = 0; o < net.outputs / 16; ++o)
        for (int m = 0; m < M; ++m) store(m, o, Fragment{});
      continue;
    }
    const auto x = [&](int k, Fragment(&f)[M]) {
#pragma unroll
      for (int m = 0; m < M; ++m)
        f[m] = load_rows(a.x, row + 16 * m, valid, 16 * k + 4 * lane.t, n_in, whole_in);
    };
    first_layer<W, M>(net, lane, x, [&](int o, const Sums(&acc)[M]) {
#pragma unroll
      for (int m = 0; m < M; ++m) h[o][m] = activate(acc[m], s.silu, nullptr);
    });
    for (int l = 1; l + 1 < s.n_layers; ++l) {
      Fragment next[G][M];
#pragma unroll
      for (int o = 0; o < G; ++o) {
        Sums acc[M];
        layer_group<W, M>(net, lane, l, o, h, acc);
#pragma unroll
        for (int m = 0; m < M; ++m) next[o][m] = activate(acc[m], s.silu, nullptr);
      }
#pragma unroll
      for (int o = 0; o < G; ++o) copy_all(h[o], next[o]);
    }
    for (int o = 0; o < net.outputs / 16; ++o) {
      Sums acc[M];
      layer_group<W, M>(net, lane, s.n_layers - 1, o, h, acc);
#pragma unroll
      for (int m = 0; m < M; ++m) store(m, o, as_output(acc[m]));
    }
  }
}

// Squares a warp can hold the gradient of: 8 registers each.
template <int W> constexpr int SLOTS = W == 16 ? 4 : W == 32 ? 6 : W == 64 ? 10 : 8;

// x, the hidden layers' values (and slopes) and grad_out of a warp's rows into shared memory.
template <int W>
__device__ inline void hidden_values(const MlpArgs<half>& a, const Network<W>& net, Lane lane,
                                     int64_t row, int64_t valid, int own) {
  constexpr int G = W / 16;
  const MlpShape& s = a.shape;
  const int n_in = s.width[0], n_out = s.width[s.n_layers], t4 = 4 * lane.t;
  const bool whole_in = is_whole(a.x, n_in), whole_out = is_whole(a.grad_out, n_out);
  Fragment h[G][1];
  const auto keep = [&](int l, int o, const Sums& acc) {
    Fragment slope;
    const Fragment f = activate(acc, s.silu, &slope);
    const int at = own * net.S + 16 * o + t4;
    store_shared(net.values(l) + at, net.S, f);
    if (s.silu) store_shared(net.slopes(l) + at, net.S, slope);
    return f;
  };
  const auto x = [&](int k, Fragment(&f)[1]) {
    f[0] = load_rows(a.x, row, valid, 16 * k + t4, n_in, whole_in);
    store_shared(net.values(0) + own * net.input_stride + 16 * k + t4, net.input_stride, f[0]);
  };
  first_layer<W, 1>(net, lane, x,
                    [&](int o, const Sums(&acc)[1]) { h[o][0] = keep(1, o, acc[0]); });
  for (int l = 1; l + 1 < s.n_layers; ++l) {
    Fragment next[G][1];
#pragma unroll
    for (int o = 0; o < G; ++o) {
      Sums acc[1];
      layer_group<W, 1>(net, lane, l, o, h, acc);
      next[o][0] = keep(l + 1, o, acc[0]);
    }
#pragma unroll
    for (int o = 0; o < G; ++o) copy_all(h[o], next[o]);
  }
  for (int k = 0; k < net.outputs / 16; ++k)
    store_shared(net.values(s.n_layers) + own * net.output_stride + 16 * k + t4, net.output_stride,
                 load_rows(a.grad_out, row, valid, 16 * k + t4, n_out, whole_out));
}

// Adds this tile's part to the squares of layer l that the warp holds; `first`: in slot 0.
template <int W>
__device__ inline void add_products(const Network<W>& net, Lane lane, int l, int first,
                                    Sums (&slots)[SLOTS<W>]) {
  const int columns = net.columns(l), squares = net.squares(l), warps = blockDim.x / WARP;
  int k = first - net.squares_before(l);
#pragma unroll
  for (int i = 0; i < SLOTS<W>; ++i, k += warps)
    if (k >= 0 && k < squares) {
      const int o = k / columns, c = k % columns;
      const bool ones = net.s.bias && c + 1 == columns;
      product_step(slots[i], net.values(l + 1) + 16 * o, net.stride(l + 1),
                   ones ? nullptr : net.values(l) + 16 * c, net.stride(l), net.rows, lane);
    }
}
// Adds the squares that the warp holds to grad_params.
template <int W>
__device__ inline void write_slots(const Network<W>& net, Lane lane, int first,
                                   const Sums (&slots)[SLOTS<W>], float* grad) {
  const int warps = blockDim.x / WARP;
  for (int l = 0; l < net.s.n_layers; grad += mlp_layer_parameters(net.s, l++)) {
    const int columns = net.columns(l), squares = net.squares(l);
    const int n_in = net.s.width[l], n_out = net.s.width[l + 1];
    int k = first - net.squares_before(l);
#pragma unroll
    for (int i = 0; i < SLOTS<W>; ++i, k += warps) {
      if (k < 0 || k >= squares) continue;
      const int o = k / columns * 16 + 2 * lane.g, c = k % columns * 16 + 4 * lane.t;
      const bool ones = net.s.bias && k % columns + 1 == columns;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int out = o + j / 4, in = c + j % 4;
        const float sum = slots[i][j % 2][j / 4 * 2 + j % 4 / 2];
        if (out >= n_out) continue;
        if (!ones && in < n_in) red_add(grad + out * n_in + in, sum);
        if (ones && j % 4 == 0 && lane.t == 0) red_add(grad + n_in * n_out + out, sum);
      }
    }
  }
}

template <int W>
__global__ void __launch_bounds__(HALF_THREADS) mlp_half_backward_kernel(MlpArgs<half> a) {
  constexpr int G = W / 16;
  DF_DYNAMIC_SHARED(half, shared);
  const MlpShape& s = a.shape;
  const Network<W> net(s, shared);
  const Lane lane;
  net.load(a.params);
  const int64_t valid = valid_rows(a.count, a.n);
  const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, own = 16 * warp + lane.g;
  const int n_in = s.width[0], slot = int(blockIdx.y) * warps * SLOTS<W> + warp;
  half* const grad_x = blockIdx.y == 0 ? a.grad_x : nullptr;
  const bool whole = is_whole(grad_x, n_in);
  Sums slots[SLOTS<W>] = {};
  for (int64_t first = int64_t(blockIdx.x) * net.rows; first < a.n;
       first += int64_t(gridDim.x) * net.rows) {
    const int64_t row = first + own;
    const auto store = [&](int k, const Fragment& f) {
      store_rows(grad_x, row, valid, a.n, 16 * k + 4 * lane.t, n_in, whole, f);
    };
    if (first >= valid) {  // so for the whole block
      for (int k = 0; k < net.inputs / 16 && grad_x; ++k) store(k, Fragment{});
      continue;
    }
    hidden_values(a, net, lane, row, valid, own);
    Fragment g[G];
    for (int l = s.n_layers - 1; l > 0; --l) {
      __syncthreads();  // all rows' g and h are there
      if (a.grad_params) add_products(net, lane, l, slot, slots);
      const half* const of_outputs = net.values(l + 1) + own * net.stride(l + 1) + 4 * lane.t;
      Sums acc[G] = {};
      for (int k = 0; k < (l + 1 == s.n_layers ? net.outputs / 16 : G); ++k) {
        const Fragment f = load_shared(of_outputs + 16 * k, net.stride(l + 1));
#pragma unroll
        for (int i = 0; i < G; ++i)
          backward_step(acc[i], f, net.w(l) + 16 * (k * net.S + i), net.S, lane);
      }
      const int at = own * net.S + 4 * lane.t;
#pragma unroll
      for (int i = 0; i < G; ++i)
        g[i] = activate_backward(acc[i], s.silu,
                                 load_shared((s.silu ? net.slopes(l) : net.values(l)) + at + 16 * i,
                                             net.S));
      __syncthreads();  // nobody reads h any more
#pragma unroll
      for (int i = 0; i < G; ++i) store_shared(net.values(l) + at + 16 * i, net.S, g[i]);
    }
    __syncthreads();
    if (a.grad_params) add_products(net, lane, 0, slot, slots);
    for (int k = 0; k < net.inputs / 16 && grad_x; ++k) {
      Sums acc = {};
#pragma unroll
      for (int i = 0; i < G; ++i)
        backward_step(acc, g[i], net.w(0) + 16 * (i * net.input_stride + k), net.input_stride,
                      lane);
      store(k, as_fragment(acc));
    }
    __syncthreads();  // the next tile takes this one's place
  }
  if (a.grad_params) write_slots(net, lane, slot, slots, a.grad_params);
}

// Calls f(std::integral_constant<int, W>) with the hidden layers' padded width.
template <int W = MLP_HALF_MAX_WIDTH, class F> void on_hidden(const MlpShape& s, const F& f) {
  if (mlp_half_hidden(s) == W) return f(std::integral_constant<int, W>());
  if constexpr (W > 16) on_hidden<W / 2>(s, f);
}
inline void check_half(const char* name, const MlpShape& s) {
  if (!mlp_half_fits(s))
    throw std::runtime_error("kernel `" + std::string(name) + "`: widths that do not fit");
}

inline void mlp_half_forward(const MlpArgs<half>& a, Stream stream) {
  const char* const name = "mlp_half_forward_kernel";
  check_half(name, a.shape);
  on_hidden(a.shape, [&](auto w) {
    const unsigned blocks = blocks_for(a.n, HALF_THREADS / WARP * 16 * FORWARD_TILES);
    launch(name, mlp_half_forward_kernel<decltype(w)::value>, min<unsigned>(blocks, FORWARD_BLOCKS),
           HALF_THREADS, mlp_half_parameter_bytes(a.shape), stream, a);
  });
}

inline void mlp_half_backward(const MlpArgs<half>& a, Stream stream) {
  const char* const name = "mlp_half_backward_kernel";
  const MlpShape& s = a.shape;
  check_half(name, s);
  if (a.grad_params) device_zero(a.grad_params, mlp_parameters(s) * sizeof(float), stream);
  int warps = HALF_THREADS / WARP;  // 16 rows each: as many as fit
  const auto bytes = [&] {
    return mlp_half_parameter_bytes(s) + mlp_half_value_bytes(s, 16 * warps);
  };
  while (bytes() > MLP_HALF_SHARED) warps /= 2;
  on_hidden(s, [&](auto w) {
    constexpr int W = decltype(w)::value;
    int squares = 0;
    for (int l = 0; l < s.n_layers; ++l)
      squares += (mlp_half_width(s, l) / 16 + s.bias) * mlp_half_width(s, l + 1) / 16;
    const unsigned passes = a.grad_params ? blocks_for(squares, warps * SLOTS<W>) : 1;
    const unsigned blocks = min<unsigned>(blocks_for(a.n, 16 * warps), BACKWARD_BLOCKS);
    launch(name, mlp_half_backward_kernel<W>, dim3(blocks, passes), unsigned(warps * WARP), bytes(),
           stream, a);
  });
}

}  // namespace
}  // namespace DF_ISA
}  // namespace df
