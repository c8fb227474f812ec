// Hash encoding on the GPU. What it costs is the reading of corners, a few bytes each at random
// places of a table, so the table should stay in L2: the grid goes group of levels by group
// (blockIdx.y), and a group is the levels whose features share a 32-byte sector of a row of `out`.
// One level at a time would need less of L2, but write each sector in pieces, far apart in time.
// For 2^19 rows a level a group's tables have 16 MB, whatever the number of features and type.
//
// Forward and the gradient of the table: a thread a (point, level), a warp 32 points of one level:
// neighbours on a ray share cells of the coarse levels. A row is read by vector loads, and its
// gradient is added by vector reductions (sums in no fixed order).
// The gradient of x: a block has 32 points and a warp for every fourth level; four partial sums a
// point meet in shared memory. No atomics: the result is the same each time.
// ALONG: the same along a tangent (second).
// half: tables and features only; points, weights, sums and gradients of both are float.
#include "gpu.h"
#include "hash_encode.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int THREADS = 256;
constexpr int SLICES = 4;  // warps that share a point's levels, for the gradient of x

// Levels a block works on, as its warps go round them.
template <int F, class T> constexpr int BYTES = F * int(sizeof(T));
template <int F, class T>
constexpr int GROUP = BYTES<F, T> > 32 ? 1 : BYTES<F, T> < 4 ? THREADS / WARP : 32 / BYTES<F, T>;

template <int GROUP> __device__ inline int64_t group_point() {
  const int first = int(threadIdx.x) / WARP / GROUP * WARP;
  return int64_t(blockIdx.x) * (THREADS / GROUP) + first + lane_id();
}
template <int GROUP> __device__ inline int group_level() {
  return int(blockIdx.y) * GROUP + int(threadIdx.x) / WARP % GROUP;
}

// ---- F neighbouring numbers, in vectors of up to 16 bytes ---------------------------------------
template <int N, class T> struct alignas(N * sizeof(T)) Vector { T v[N]; };
template <int F, class T>
constexpr int WIDTH = BYTES<F, T> < 16 ? F : 16 / int(sizeof(T));

template <int F, class T> __device__ inline void load_features(const T* p, Wide<T> (&out)[F]) {
  constexpr int N = WIDTH<F, T>;
#pragma unroll
  for (int i = 0; i < F; i += N) {
    const Vector<N, T> part = *reinterpret_cast<const Vector<N, T>*>(p + i);
#pragma unroll
    for (int k = 0; k < N; ++k) out[i + k] = Wide<T>(part.v[k]);
  }
}
template <int F, class T> __device__ inline void store_features(T* p, const Wide<T> (&x)[F]) {
  constexpr int N = WIDTH<F, T>;
#pragma unroll
  for (int i = 0; i < F; i += N) {
    Vector<N, T> part;
#pragma unroll
    for (int k = 0; k < N; ++k) part.v[k] = T(x[i + k]);
    *reinterpret_cast<Vector<N, T>*>(p + i) = part;
  }
}

// ---- a point's cell on one level; bit 0 of a corner is x ----------------------------------------
template <class W> struct Cell { HashAxis<W> x, y, z; };

template <class W>
__device__ inline Cell<W> find_cell(vec3<W> p, const HashGrid& grid, bool smoothstep) {
  const W scale = W(grid.scale);
  return {hash_axis(p.x, scale, grid.staggered, smoothstep),
          hash_axis(p.y, scale, grid.staggered, smoothstep),
          hash_axis(p.z, scale, grid.staggered, smoothstep)};
}
template <HashRows ROWS, class W>
__device__ inline uint32_t corner_row_as(const Cell<W>& c, const HashGrid& grid, int corner) {
  const uint32_t x = c.x.cell + (corner & 1);
  const uint32_t y = c.y.cell * grid.step_y + (corner & 2 ? grid.step_y : 0);
  const uint32_t z = c.z.cell * grid.step_z + (corner & 4 ? grid.step_z : 0);
  return hash_row<ROWS>(x, y, z, grid.mask);
}
template <class W>
__device__ inline uint32_t corner_row(const Cell<W>& c, const HashGrid& grid, int corner) {
  if (!grid.dense) return corner_row_as<HashRows::hashed>(c, grid, corner);
  if (grid.staggered) return corner_row_as<HashRows::wrapped>(c, grid, corner);
  return corner_row_as<HashRows::dense>(c, grid, corner);
}
// All eight. Divisions of wrapped rows stand apart: between loads they take registers from them.
template <class W>
__device__ inline void corner_rows(const Cell<W>& c, const HashGrid& grid, uint32_t (&rows)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
    rows[k] = grid.dense ? corner_row_as<HashRows::dense>(c, grid, k)
                         : corner_row_as<HashRows::hashed>(c, grid, k);
  if (!grid.dense || !grid.staggered) return;
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (rows[k] > grid.mask) rows[k] %= grid.mask + 1;
}
template <class W> __device__ inline W corner_weight(const Cell<W>& c, int corner) {
  const W x = corner & 1 ? c.x.weight : W(1) - c.x.weight;
  const W y = corner & 2 ? c.y.weight : W(1) - c.y.weight;
  const W z = corner & 4 ? c.z.weight : W(1) - c.z.weight;
  return x * (y * z);
}

// Derivatives of the three weights along a tangent; and of a corner's weight.
template <class W>
__device__ inline vec3<W> weights_along(const Cell<W>& c, vec3<W> x, vec3<W> tangent,
                                       bool staggered) {
  const vec3<W> v = hash_tangent(x, tangent, staggered);
  return {c.x.slope * v.x, c.y.slope * v.y, c.z.slope * v.z};
}
template <class W>
__device__ inline W corner_weight_along(const Cell<W>& c, vec3<W> d, int corner) {
  const W x = corner & 1 ? c.x.weight : W(1) - c.x.weight;
  const W y = corner & 2 ? c.y.weight : W(1) - c.y.weight;
  const W z = corner & 4 ? c.z.weight : W(1) - c.z.weight;
  const W dx = corner & 1 ? d.x : -d.x, dy = corner & 2 ? d.y : -d.y;
  const W dz = corner & 4 ? d.z : -d.z;
  return dx * (y * z) + x * (dy * z + y * dz);
}

// ---- forward ------------------------------------------------------------------------------------
template <int F, bool ALONG, class T>
__global__ void __launch_bounds__(THREADS) hash_forward_kernel(HashEncodeArgs<T> a) {
  using W = Wide<T>;
  const int64_t point = group_point<GROUP<F, T>>();
  const int level = group_level<GROUP<F, T>>();
  if (point >= a.n || level >= a.n_levels) return;
  W sum[F] = {};
  if (point < valid_rows(a.count, a.n)) {
    const HashGrid grid = hash_grid(a.levels, a.staggered, level);
    const vec3<W> x = load3(a.x + 3 * point);
    const Cell<W> cell = find_cell(x, grid, a.smoothstep);
    const T* const table = a.table + F * grid.offset;
    vec3<W> d;
    if constexpr (ALONG) d = weights_along(cell, x, load3(a.tangent + 3 * point), a.staggered);
    uint32_t rows[8];
    corner_rows(cell, grid, rows);
    W v[8][F];  // all are read before the first is used
#pragma unroll
    for (int k = 0; k < 8; ++k) load_features<F>(table + int64_t(F) * rows[k], v[k]);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      W weight;
      if constexpr (ALONG) weight = corner_weight_along(cell, d, k);
      else weight = corner_weight(cell, k);
#pragma unroll
      for (int f = 0; f < F; ++f) sum[f] += weight * v[k][f];
    }
  }
  store_features<F>(a.out + F * (a.n_levels * point + level), sum);
}

// ---- backward -----------------------------------------------------------------------------------
template <int F, bool ALONG, class T>
__global__ void __launch_bounds__(THREADS) hash_grad_table_kernel(HashEncodeArgs<T> a) {
  using W = Wide<T>;
  const int64_t point = group_point<GROUP<F, T>>();
  const int level = group_level<GROUP<F, T>>();
  if (point >= valid_rows(a.count, a.n) || level >= a.n_levels) return;
  const HashGrid grid = hash_grid(a.levels, a.staggered, level);
  const vec3<W> x = load3(a.x + 3 * point);
  const Cell<W> cell = find_cell(x, grid, a.smoothstep);
  vec3<W> d;
  if constexpr (ALONG) d = weights_along(cell, x, load3(a.tangent + 3 * point), a.staggered);
  W* const grad = a.grad_table + F * grid.offset;
  W g[F];
  load_features<F>(a.grad_out + F * (a.n_levels * point + level), g);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    W weight;
    if constexpr (ALONG) weight = corner_weight_along(cell, d, k);
    else weight = corner_weight(cell, k);
    W part[F];
#pragma unroll
    for (int f = 0; f < F; ++f) part[f] = weight * g[f];
    red_add_vector<F>(grad + int64_t(F) * corner_row(cell, grid, k), part);
  }
}

// One level's part of the gradient of point p.
template <int F, bool ALONG, class T>
__device__ inline vec3<Wide<T>> level_gradient(const HashEncodeArgs<T>& a, vec3<Wide<T>> p,
                                               int64_t point, int level) {
  using W = Wide<T>;
  const HashGrid grid = hash_grid(a.levels, a.staggered, level);
  const Cell<W> cell = find_cell(p, grid, a.smoothstep);
  const T* const table = a.table + F * grid.offset;
  uint32_t rows[8];
  corner_rows(cell, grid, rows);
  W g[F], s[8];
  load_features<F>(a.grad_out + F * (a.n_levels * point + level), g);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    W v[F];
    load_features<F>(table + int64_t(F) * rows[k], v);
    s[k] = g[0] * v[0];
#pragma unroll
    for (int f = 1; f < F; ++f) s[k] += g[f] * v[f];
  }
  const vec3<W> d = hash_weight_gradient(s, cell.x.weight, cell.y.weight, cell.z.weight);
  const vec3<W> slope{cell.x.slope, cell.y.slope, cell.z.slope};
  if constexpr (!ALONG) return {slope.x * d.x, slope.y * d.y, slope.z * d.z};
  const vec3<W> bend{cell.x.bend, cell.y.bend, cell.z.bend};
  const vec3<W> v = hash_tangent(p, load3(a.tangent + 3 * point), a.staggered);
  return hash_hessian_times(v, slope, bend, d,
                            hash_weight_mixed(s, cell.x.weight, cell.y.weight, cell.z.weight));
}

// The bounds' 1, the fewest blocks a multiprocessor: else ptxas spills a register for one more.
template <int F, bool ALONG, class T>
__global__ void __launch_bounds__(SLICES * WARP, 1) hash_grad_x_kernel(HashEncodeArgs<T> a) {
  using W = Wide<T>;
  DF_SHARED(W, parts, SLICES * 3 * WARP);  // (slice, point, 3)
  const int64_t first = int64_t(blockIdx.x) * WARP, point = first + lane_id();
  vec3<W> grad{W(0), W(0), W(0)};
  if (point < valid_rows(a.count, a.n)) {
    const vec3<W> p = load3(a.x + 3 * point);
    for (int level = int(threadIdx.x) / WARP; level < a.n_levels; level += SLICES)
      grad = grad + level_gradient<F, ALONG>(a, p, point, level);
  }
  store3(parts + 3 * threadIdx.x, grad);
  __syncthreads();
  const int i = int(threadIdx.x);  // one of the block's coordinates
  if (i >= 3 * WARP || 3 * first + i >= 3 * a.n) return;
  W sum = W(0);
#pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) sum += parts[3 * WARP * slice + i];
  a.grad_x[3 * first + i] = !a.staggered && hash_clamped(a.x[3 * first + i]) ? W(0) : sum;
}

// Calls f(std::integral_constant<int, n_features>).
template <class F> void on_features(int n_features, const F& f) {
  if (n_features == 1) f(std::integral_constant<int, 1>());
  else if (n_features == 2) f(std::integral_constant<int, 2>());
  else if (n_features == 4) f(std::integral_constant<int, 4>());
  else f(std::integral_constant<int, 8>());
}

template <int F, class T> dim3 grid_of_groups(const HashEncodeArgs<T>& a) {
  return dim3(blocks_for(a.n, THREADS / GROUP<F, T>), blocks_for(a.n_levels, GROUP<F, T>));
}

template <bool ALONG, class T> void features(const HashEncodeArgs<T>& a, Stream stream) {
  on_features(a.n_features, [&](auto features) {
    constexpr int F = decltype(features)::value;
    launch("hash_forward_kernel", hash_forward_kernel<F, ALONG, T>, grid_of_groups<F>(a), THREADS,
           0, stream, a);
  });
}

template <bool ALONG, class T> void gradients(const HashEncodeArgs<T>& a, Stream stream) {
  if (a.grad_table)
    device_zero(a.grad_table,
                sizeof(Wide<T>) * size_t(a.levels.offset[a.n_levels]) * size_t(a.n_features),
                stream);
  on_features(a.n_features, [&](auto features) {
    constexpr int F = decltype(features)::value;
    if (a.grad_table)
      launch("hash_grad_table_kernel", hash_grad_table_kernel<F, ALONG, T>, grid_of_groups<F>(a),
             THREADS, 0, stream, a);
    if (a.grad_x)
      launch("hash_grad_x_kernel", hash_grad_x_kernel<F, ALONG, T>, blocks_for(a.n, WARP),
             SLICES * WARP, 0, stream, a);
  });
}

}  // namespace

template <class T> void hash_encode_forward(const HashEncodeArgs<T>& a, Stream stream) {
  features<false>(a, stream);
}

template <class T> void hash_encode_backward(const HashEncodeArgs<T>& a, Stream stream) {
  gradients<false>(a, stream);
}

template <class T> void hash_encode_second(const HashEncodeArgs<T>& a, Stream stream) {
  if (a.out) features<true>(a, stream);
  gradients<true>(a, stream);
}

DF_INSTANTIATE(hash_encode_forward, HashEncodeArgs)
DF_INSTANTIATE(hash_encode_backward, HashEncodeArgs)
DF_INSTANTIATE(hash_encode_second, HashEncodeArgs)
DF_INSTANTIATE_HALF(hash_encode_forward, HashEncodeArgs)
DF_INSTANTIATE_HALF(hash_encode_backward, HashEncodeArgs)
DF_INSTANTIATE_HALF(hash_encode_second, HashEncodeArgs)

}  // namespace DF_ISA
}  // namespace df
