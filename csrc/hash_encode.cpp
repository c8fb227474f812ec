// Hash encoding on the CPU. Forward and the gradient of x go level by level, so that one level's
// table stays in cache; the gradient of the table goes by (level, range of its rows): each row is
// written by one thread, in the order of the points, without atomics.
// ALONG: the same along a tangent (second), each sum of products differentiated product by product.
#include "hash_encode.h"

#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the machine's are never passed

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 4096;  // points a chunk
constexpr int BLOCK = 64;        // points whose cells are computed together, in vector registers

// The features of one row, as one value.
template <class T, int F> struct Features {
  typedef T type __attribute__((vector_size(F * sizeof(T))));
};
template <class T> struct Features<T, 1> { typedef T type; };

template <class V, class T> inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> inline void store(T* p, const V& v) { std::memcpy(p, &v, sizeof v); }
template <class V, class T> inline V lerp(const V& a, const V& b, T w) { return a + w * (b - a); }

// Calls f(F, rows) with integral constants.
template <HashRows ROWS> using Rows = std::integral_constant<HashRows, ROWS>;
template <class F> void on_grid(int n_features, const HashGrid& grid, const F& f) {
  const auto with = [&](auto features) {
    if (!grid.dense) f(features, Rows<HashRows::hashed>());
    else if (grid.staggered) f(features, Rows<HashRows::wrapped>());
    else f(features, Rows<HashRows::dense>());
  };
  if (n_features == 1) with(std::integral_constant<int, 1>());
  else if (n_features == 2) with(std::integral_constant<int, 2>());
  else if (n_features == 4) with(std::integral_constant<int, 4>());
  else with(std::integral_constant<int, 8>());
}

// The cells of up to BLOCK points on one level, one array a quantity.
template <class T> struct Cells {
  uint32_t x[BLOCK], y[BLOCK], z[BLOCK];     // keys of the lower corner
  T wx[BLOCK], wy[BLOCK], wz[BLOCK];         // weights of the upper one
  T sx[BLOCK], sy[BLOCK], sz[BLOCK];         // their slopes
  T bx[BLOCK], by[BLOCK], bz[BLOCK];         // and the slopes'; only ALONG
};
template <bool ALONG, bool SMOOTH, bool STAGGERED, class T>
inline void find_cells_as(const T* x, int n, const HashGrid& grid, Cells<T>& c) {
  const T scale = T(grid.scale);
  const uint32_t step_y = grid.step_y, step_z = grid.step_z;
  for (int i = 0; i < n; ++i) {
    const HashAxis<T> ax = hash_axis(x[3 * i], scale, STAGGERED, SMOOTH);
    const HashAxis<T> ay = hash_axis(x[3 * i + 1], scale, STAGGERED, SMOOTH);
    const HashAxis<T> az = hash_axis(x[3 * i + 2], scale, STAGGERED, SMOOTH);
    c.x[i] = ax.cell;
    c.y[i] = ay.cell * step_y;
    c.z[i] = az.cell * step_z;
    c.wx[i] = ax.weight, c.wy[i] = ay.weight, c.wz[i] = az.weight;
    c.sx[i] = ax.slope, c.sy[i] = ay.slope, c.sz[i] = az.slope;
    if constexpr (ALONG) c.bx[i] = ax.bend, c.by[i] = ay.bend, c.bz[i] = az.bend;
  }
}
template <bool ALONG, class T>
__attribute__((noinline)) void find_cells(const HashEncodeArgs<T>& a, const HashGrid& grid,
                                          int64_t first, int n, Cells<T>& c) {
  const T* const x = a.x + 3 * first;
  if (a.staggered && a.smoothstep) find_cells_as<ALONG, true, true>(x, n, grid, c);
  else if (a.staggered) find_cells_as<ALONG, false, true>(x, n, grid, c);
  else if (a.smoothstep) find_cells_as<ALONG, true, false>(x, n, grid, c);
  else find_cells_as<ALONG, false, false>(x, n, grid, c);
}

// The rows of point i's eight corners; bit 0 of the corner is x.
template <HashRows ROWS, class T>
inline void corner_rows(const Cells<T>& c, int i, const HashGrid& grid, uint32_t* rows) {
  for (int k = 0; k < 8; ++k)
    rows[k] = hash_row<ROWS>(c.x[i] + (k & 1), c.y[i] + (k & 2 ? grid.step_y : 0),
                              c.z[i] + (k & 4 ? grid.step_z : 0), grid.mask);
}

// The derivatives of point i's weights along its tangent.
template <class T>
inline vec3<T> weights_along(const HashEncodeArgs<T>& a, const Cells<T>& c, int i, int64_t point) {
  const vec3<T> v =
      hash_tangent(load3(a.x + 3 * point), load3(a.tangent + 3 * point), a.staggered);
  return {c.sx[i] * v.x, c.sy[i] * v.y, c.sz[i] * v.z};
}

// Calls f(cells, i, row) for every point from begin to end.
template <bool ALONG, class T, class F>
inline void for_points(const HashEncodeArgs<T>& a, const HashGrid& grid, int64_t begin,
                       int64_t end, const F& f) {
  Cells<T> cells;
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int n = int(min<int64_t>(BLOCK, end - first));
    find_cells<ALONG>(a, grid, first, n, cells);
    for (int i = 0; i < n; ++i) f(cells, i, first + i);
  }
}

template <int F, HashRows ROWS, bool ALONG, class T>
void encode(const HashEncodeArgs<T>& a, int level, int64_t begin, int64_t end) {
  using V = typename Features<T, F>::type;
  const HashGrid grid = hash_grid(a.levels, a.staggered, level);
  const T* table = a.table + F * grid.offset;
  for_points<ALONG>(a, grid, begin, end, [&](const Cells<T>& c, int i, int64_t point) {
    uint32_t rows[8];
    corner_rows<ROWS>(c, i, grid, rows);
    V v[4], dx[4];
    for (int k = 0; k < 4; ++k) {
      const V left = load<V>(table + int64_t(F) * rows[2 * k]);
      const V right = load<V>(table + int64_t(F) * rows[2 * k + 1]);
      v[k] = lerp(left, right, c.wx[i]);
      if constexpr (ALONG) dx[k] = right - left;
    }
    const V low = lerp(v[0], v[1], c.wy[i]), high = lerp(v[2], v[3], c.wy[i]);
    T* const out = a.out + F * (a.n_levels * point + level);
    if constexpr (ALONG) {
      const vec3<T> d = weights_along(a, c, i, point);
      const V x = lerp(lerp(dx[0], dx[1], c.wy[i]), lerp(dx[2], dx[3], c.wy[i]), c.wz[i]);
      store(out, d.x * x + d.y * lerp(v[1] - v[0], v[3] - v[2], c.wz[i]) + d.z * (high - low));
    } else {
      store(out, lerp(low, high, c.wz[i]));
    }
  });
}

template <int F, HashRows ROWS, bool ALONG, class T>
void encode_grad_x(const HashEncodeArgs<T>& a, int level, int64_t begin, int64_t end) {
  const HashGrid grid = hash_grid(a.levels, a.staggered, level);
  const T* table = a.table + F * grid.offset;
  for_points<ALONG>(a, grid, begin, end, [&](const Cells<T>& c, int i, int64_t point) {
    uint32_t rows[8];
    corner_rows<ROWS>(c, i, grid, rows);
    const T* g = a.grad_out + F * (a.n_levels * point + level);
    T s[8];
    for (int k = 0; k < 8; ++k) {
      s[k] = g[0] * table[int64_t(F) * rows[k]];
      for (int f = 1; f < F; ++f) s[k] += g[f] * table[int64_t(F) * rows[k] + f];
    }
    const vec3<T> d = hash_weight_gradient(s, c.wx[i], c.wy[i], c.wz[i]);
    const vec3<T> slope{c.sx[i], c.sy[i], c.sz[i]};
    T* const grad = a.grad_x + 3 * point;
    if constexpr (ALONG) {
      const vec3<T> v =
          hash_tangent(load3(a.x + 3 * point), load3(a.tangent + 3 * point), a.staggered);
      const vec3<T> mixed = hash_weight_mixed(s, c.wx[i], c.wy[i], c.wz[i]);
      const vec3<T> bend{c.bx[i], c.by[i], c.bz[i]};
      store3(grad, load3(grad) + hash_hessian_times(v, slope, bend, d, mixed));
    } else {
      grad[0] += slope.x * d.x;
      grad[1] += slope.y * d.y;
      grad[2] += slope.z * d.z;
    }
  });
}

// Adds every point's share to the level's rows [low, high); RANGED: these are not all.
template <int F, HashRows ROWS, bool RANGED, bool ALONG, class T>
void encode_grad_table(const HashEncodeArgs<T>& a, int level, int64_t points, int64_t low,
                       int64_t high) {
  using V = typename Features<T, F>::type;
  const HashGrid grid = hash_grid(a.levels, a.staggered, level);
  T* grad = a.grad_table + F * grid.offset;
  fill_zero(grad, F * low, F * high);
  for_points<ALONG>(a, grid, 0, points, [&](const Cells<T>& c, int i, int64_t point) {
    uint32_t rows[8];
    corner_rows<ROWS>(c, i, grid, rows);
    const V g = load<V>(a.grad_out + F * (a.n_levels * point + level));
    const V z1 = g * c.wz[i], z0 = g - z1;
    const V y1 = z0 * c.wy[i], y3 = z1 * c.wy[i], y0 = z0 - y1, y2 = z1 - y3;
    V y[4] = {y0, y1, y2, y3}, dx[4];
    if constexpr (ALONG) {
      const vec3<T> d = weights_along(a, c, i, point);
      const V dz1 = g * d.z, dy1 = z0 * d.y - dz1 * c.wy[i], dy3 = z1 * d.y + dz1 * c.wy[i];
      for (int k = 0; k < 4; ++k) dx[k] = y[k] * d.x;
      y[0] = -(dz1 + dy1), y[1] = dy1, y[2] = dz1 - dy3, y[3] = dy3;
    }
    for (int k = 0; k < 8; ++k) {
      if (RANGED && !(rows[k] >= low && rows[k] < high)) continue;
      V upper = y[k / 2] * c.wx[i];
      if constexpr (ALONG) upper += dx[k / 2];
      T* p = grad + int64_t(F) * rows[k];
      store(p, load<V>(p) + (k & 1 ? upper : y[k / 2] - upper));
    }
  });
}

int threads() {
#ifdef _OPENMP
  return num_threads > 0 ? num_threads : omp_get_max_threads();
#else
  return 1;
#endif
}

template <bool ALONG, class T> void grad_table(const HashEncodeArgs<T>& a, int64_t valid) {
  // Ranges a level: enough work for all threads; they change no sum.
  const int ranges = threads() == 1 ? 1 : max(1, (3 * threads() + a.n_levels - 1) / a.n_levels);
  parallel_for(int64_t(a.n_levels) * ranges, 1, [&](int64_t task, int64_t) {
    const int level = a.n_levels - 1 - int(task / ranges);  // the slow ones first
    const HashGrid grid = hash_grid(a.levels, a.staggered, level);
    const int64_t k = task % ranges, low = grid.rows * k / ranges;
    const int64_t high = grid.rows * (k + 1) / ranges;
    on_grid(a.n_features, grid, [&](auto f, auto rows) {
      constexpr int F = decltype(f)::value;
      constexpr HashRows R = decltype(rows)::value;
      // Along a tangent g++ rounds differently in the two: always the same one then.
      if (ranges == 1 && !ALONG) encode_grad_table<F, R, false, ALONG>(a, level, valid, low, high);
      else encode_grad_table<F, R, true, ALONG>(a, level, valid, low, high);
    });
  });
}

template <bool ALONG, class T> void features(const HashEncodeArgs<T>& a, int64_t valid) {
  const int64_t row = a.n_levels * a.n_features, chunks = (a.n + GRAIN - 1) / GRAIN;
  parallel_for(a.n_levels * chunks, 1, [&](int64_t task, int64_t) {  // level by level
    const int level = int(task / chunks);
    const int64_t begin = task % chunks * GRAIN, end = min(a.n, begin + GRAIN);
    const int64_t stop = clamp(valid, begin, end);
    on_grid(a.n_features, hash_grid(a.levels, a.staggered, level), [&](auto f, auto rows) {
      encode<decltype(f)::value, decltype(rows)::value, ALONG>(a, level, begin, stop);
    });
    if (level == 0) fill_zero(a.out, row * stop, row * end);
  });
}

template <bool ALONG, class T> void grad_x(const HashEncodeArgs<T>& a, int64_t valid) {
  for (int level = 0; level < a.n_levels; ++level) {
    parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
      const int64_t stop = clamp(valid, begin, end);
      if (level == 0) fill_zero(a.grad_x, 3 * begin, 3 * end);
      on_grid(a.n_features, hash_grid(a.levels, a.staggered, level), [&](auto f, auto rows) {
        encode_grad_x<decltype(f)::value, decltype(rows)::value, ALONG>(a, level, begin, stop);
      });
      if (a.staggered || level + 1 < a.n_levels) return;
      for (int64_t i = 3 * begin; i < 3 * stop; ++i)
        if (hash_clamped(a.x[i])) a.grad_x[i] = T(0);
    });
  }
}

}  // namespace

template <class T> void hash_encode_forward(const HashEncodeArgs<T>& a, Stream) {
  features<false>(a, valid_rows(a.count, a.n));
}

template <class T> void hash_encode_backward(const HashEncodeArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n);
  if (a.grad_table) grad_table<false>(a, valid);
  if (a.grad_x) grad_x<false>(a, valid);
}

template <class T> void hash_encode_second(const HashEncodeArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n);
  if (a.out) features<true>(a, valid);
  if (a.grad_table) grad_table<true>(a, valid);
  if (a.grad_x) grad_x<true>(a, valid);
}

DF_INSTANTIATE(hash_encode_forward, HashEncodeArgs)
DF_INSTANTIATE(hash_encode_backward, HashEncodeArgs)
DF_INSTANTIATE(hash_encode_second, HashEncodeArgs)

}  // namespace DF_ISA
}  // namespace df
