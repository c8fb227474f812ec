// Hash encoding on the CPU, level by level, so that one level's table stays in cache. The gradient
// of the table goes by (level, range of its rows): each row is written by one thread, in the order
// of the points, without atomics.
// ALONG: the same along a tangent (second), each sum of products differentiated product by product.
#include "hash_encode_simd.h"

namespace df {
namespace DF_ISA {
namespace {

// The features of point i's corners, by pairs: bit 0 of a pair is y.
template <int F, HashRows ROWS, class T> struct Corners {
  typename Pair<T, F>::type at[4];
  Corners(const T* table, const Cells<T>& c, int i) {
    for (int k = 0; k < 4; ++k) {
      const T* const first = table + int64_t(F) * c.row[2 * k][i];
      if constexpr (ROWS == HashRows::dense)  // neighbours in memory, too
        at[k] = load<typename Pair<T, F>::type>(first);
      else
        at[k] = Pair<T, F>::of(load<Features<T, F>>(first),
                               load<Features<T, F>>(table + int64_t(F) * c.row[2 * k + 1][i]));
    }
  }
  // <g, features> of each corner.
  void dot(const Features<T, F>& g, T* s) const {
    for (int k = 0; k < 4; k += 2) dot_pairs<T>(g, at[k], at[k + 1], s + 2 * k);
  }
};

// The derivatives of the weights along the tangents, if wanted.
template <bool ALONG, class T> struct WeightsAlong {
  T x[BLOCK], y[BLOCK], z[BLOCK];
  WeightsAlong(const Cells<T>& c, int n) {
    for (int i = 0; ALONG && i < n; ++i)
      x[i] = c.sx[i] * c.vx[i], y[i] = c.sy[i] * c.vy[i], z[i] = c.sz[i] * c.vz[i];
  }
};

// out, and g below: of this level, from the point `begin` on.
template <int F, HashRows ROWS, bool ALONG, class T>
void encode(const HashEncodeArgs<T>& a, int level, int64_t begin, int64_t end, T* const out) {
  const HashGrid grid = hash_grid(a.levels, a.staggered, level);
  const T* const table = a.table + F * grid.offset;
  for_blocks<ROWS, ALONG>(a, grid, begin, end, [=](const Cells<T>& c, int n, int64_t first) {
    const WeightsAlong<ALONG, T> d(c, n);
    T* to = out + F * (first - begin);
    for (int i = 0; i < n; ++i, to += F) {
      const Corners<F, ROWS, T> v(table, c, i);
      if constexpr (ALONG) {
        const auto d0 = v.at[1] - v.at[0], d1 = v.at[3] - v.at[2];
        const auto low = v.at[0] + c.wy[i] * d0, high = v.at[2] + c.wy[i] * d1, dz = high - low;
        const auto z = low + c.wz[i] * dz, y = d.y[i] * lerp(d0, d1, c.wz[i]) + d.z[i] * dz;
        const auto dx = d.x[i] * (right(z) - left(z));
        store(to, Features<T, F>(dx + lerp(left(y), right(y), c.wx[i])));
      } else {
        const auto low = lerp(v.at[0], v.at[1], c.wy[i]), high = lerp(v.at[2], v.at[3], c.wy[i]);
        const auto z = lerp(low, high, c.wz[i]);
        store(to, lerp(left(z), right(z), c.wx[i]));
      }
    }
  });
}

template <int F, HashRows ROWS, bool ALONG, class T>
void encode_grad_x(const HashEncodeArgs<T>& a, int level, int64_t begin, int64_t end,
                   const T* const grad_out) {
  const HashGrid grid = hash_grid(a.levels, a.staggered, level);
  const T* const table = a.table + F * grid.offset;
  for_blocks<ROWS, 1 + ALONG>(a, grid, begin, end, [&](const Cells<T>& c, int n, int64_t first) {
    T s[BLOCK][8];  // <g, features> of the corners: what follows goes by vectors of points
    for (int i = 0; i < n; ++i) {
      const auto g = load<Features<T, F>>(grad_out + F * (first - begin + i));
      Corners<F, ROWS, T>(table, c, i).dot(g, s[i]);
    }
    T gx[BLOCK], gy[BLOCK], gz[BLOCK];
    for (int i = 0; i < n; ++i) {
      const vec3<T> slope{c.sx[i], c.sy[i], c.sz[i]};
      const vec3<T> d = hash_weight_gradient(s[i], c.wx[i], c.wy[i], c.wz[i]);
      vec3<T> sum{slope.x * d.x, slope.y * d.y, slope.z * d.z};
      if constexpr (ALONG) {
        const vec3<T> bend{c.bx[i], c.by[i], c.bz[i]};
        const vec3<T> v{c.vx[i], c.vy[i], c.vz[i]};
        const vec3<T> mixed = hash_weight_mixed(s[i], c.wx[i], c.wy[i], c.wz[i]);
        sum = hash_hessian_times(v, slope, bend, d, mixed);
      }
      gx[i] = sum.x, gy[i] = sum.y, gz[i] = sum.z;
    }
    T* grad = a.grad_x + 3 * first;
    for (int i = 0; i < n; ++i, grad += 3) grad[0] += gx[i], grad[1] += gy[i], grad[2] += gz[i];
  });
}

// Not fused with what is added to it: else the result would hang on where g++ puts the addition.
template <class V> inline V rounded(V v) {
#if defined(__GNUC__) && __GNUC__ >= 12
  return __builtin_assoc_barrier(v);
#else
  asm("" : "+m"(v));
  return v;
#endif
}
template <class T, class V> inline void add(T* p, const V& v) { store(p, load<V>(p) + v); }

// Adds every point's share to the level's rows [low, high); RANGED: these are not all.
template <int F, HashRows ROWS, bool RANGED, bool ALONG, class T>
void encode_grad_table(const HashEncodeArgs<T>& a, int level, int64_t begin, int64_t end,
                       const T* const grad_out, int64_t low, int64_t high) {
  using V = Features<T, F>;
  const HashGrid grid = hash_grid(a.levels, a.staggered, level);
  T* const table = a.grad_table + F * grid.offset;
  for_blocks<ROWS, ALONG>(a, grid, begin, end, [=](const Cells<T>& c, int n, int64_t first) {
    const WeightsAlong<ALONG, T> d(c, n);
    const T* from = grad_out + F * (first - begin);
    for (int i = 0; i < n; ++i, from += F) {
      const V g = load<V>(from);
      const V z1 = g * c.wz[i], z0 = g - z1;
      const V y1 = z0 * c.wy[i], y3 = z1 * c.wy[i], y0 = z0 - y1, y2 = z1 - y3;
      V y[4] = {y0, y1, y2, y3}, dx[4] = {};
      if constexpr (ALONG) {
        const V dz1 = g * d.z[i];
        const V dy1 = z0 * d.y[i] - dz1 * c.wy[i], dy3 = z1 * d.y[i] + dz1 * c.wy[i];
        for (int k = 0; k < 4; ++k) dx[k] = y[k] * d.x[i];
        y[0] = -(dz1 + dy1), y[1] = dy1, y[2] = dz1 - dy3, y[3] = dy3;
      }
      for (int k = 0; k < 4; ++k) {
        const V upper = rounded(ALONG ? V(y[k] * c.wx[i] + dx[k]) : V(y[k] * c.wx[i]));
        const V lower = rounded(V(y[k] - upper));
        const uint32_t row = c.row[2 * k][i], next = c.row[2 * k + 1][i];
        T *const at = table + F * int64_t(row), *const at_next = table + F * int64_t(next);
        if (ROWS == HashRows::dense && row >= low && next < high) {  // neighbours in memory, too
          add(at, Pair<T, F>::of(lower, upper));
        } else {
          if (!RANGED || (row >= low && row < high)) add(at, lower);
          if (!RANGED || (next >= low && next < high)) add(at_next, upper);
        }
      }
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

// The three results for the points [begin, end), from a.grad_out by level.
template <bool ALONG, class T>
void grad_table(const HashEncodeArgs<T>& a, const ByLevel<T>& g, int64_t begin, int64_t end) {
  // Ranges a level: enough work for all threads; they change no sum.
  const int ranges = threads() == 1 ? 1 : max(1, (3 * threads() + a.n_levels - 1) / a.n_levels);
  parallel_for(int64_t(a.n_levels) * ranges, 1, [&](int64_t task, int64_t) {
    const int level = a.n_levels - 1 - int(task / ranges);  // the slow ones first
    const HashGrid grid = hash_grid(a.levels, a.staggered, level);
    const int64_t k = task % ranges, low = grid.rows * k / ranges;
    const int64_t high = grid.rows * (k + 1) / ranges;
    if (begin == 0)
      fill_zero(a.grad_table + a.n_features * grid.offset, a.n_features * low, a.n_features * high);
    on_grid(a.n_features, grid, [&](auto f, auto rows) {
      constexpr int F = decltype(f)::value;
      constexpr HashRows R = decltype(rows)::value;
      const auto add = [&](auto ranged) {
        encode_grad_table<F, R, ranged, ALONG>(a, level, begin, end, g.level(level), low, high);
      };
      // Along a tangent g++ rounds differently in the two: always the same one then.
      if (ranges == 1 && R != HashRows::dense && !ALONG) add(std::false_type());
      else add(std::true_type());
    });
  });
}

template <bool ALONG, class T>
void grad_x(const HashEncodeArgs<T>& a, const ByLevel<T>& g, int64_t first, int64_t last) {
  for (int level = 0; level < a.n_levels; ++level) {
    parallel_for(last - first, GRAIN, [&](int64_t chunk, int64_t chunk_end) {
      const int64_t begin = first + chunk, end = first + chunk_end;
      if (level == 0) fill_zero(a.grad_x, 3 * begin, 3 * end);
      on_grid(a.n_features, hash_grid(a.levels, a.staggered, level), [&](auto f, auto rows) {
        encode_grad_x<f, decltype(rows)::value, ALONG>(a, level, begin, end,
                                                       g.level(level) + f * chunk);
      });
      if (a.staggered || level + 1 < a.n_levels) return;
      for (int64_t i = 3 * begin; i < 3 * end; ++i)
        if (hash_clamped(a.x[i])) a.grad_x[i] = T(0);
    });
  }
}

template <bool ALONG, class T>
void features(const HashEncodeArgs<T>& a, const ByLevel<T>& out, int64_t first, int64_t last) {
  const int64_t chunks = (last - first + GRAIN - 1) / GRAIN;
  parallel_for(a.n_levels * chunks, 1, [&](int64_t task, int64_t) {  // level by level
    const int level = int(task / chunks);
    const int64_t chunk = task % chunks * GRAIN, begin = first + chunk;
    on_grid(a.n_features, hash_grid(a.levels, a.staggered, level), [&](auto f, auto rows) {
      encode<f, decltype(rows)::value, ALONG>(a, level, begin, min(last, begin + GRAIN),
                                              out.level(level) + f * chunk);
    });
  });
  out.to_rows(a.out + int64_t(a.n_levels) * a.n_features * first, last - first);
}

template <bool ALONG, class T> void run(const HashEncodeArgs<T>& a, bool forward, bool backward) {
  const int64_t valid = valid_rows(a.count, a.n), row = int64_t(a.n_levels) * a.n_features;
  const ByLevel<T> by_level(a, valid);
  int64_t first = 0;
  do {  // once without points, too: the table's gradient is zero then
    const int64_t last = min(valid, first + by_level.capacity());
    if (forward) features<ALONG>(a, by_level, first, last);
    if (backward) by_level.from_rows(a.grad_out + row * first, last - first);
    if (backward && a.grad_table) grad_table<ALONG>(a, by_level, first, last);
    if (backward && a.grad_x) grad_x<ALONG>(a, by_level, first, last);
    first = last;
  } while (first < valid);
  if (forward) fill_zero(a.out, row * valid, row * a.n);
  if (backward && a.grad_x) fill_zero(a.grad_x, 3 * valid, 3 * a.n);
}

}  // namespace

template <class T> void hash_encode_forward(const HashEncodeArgs<T>& a, Stream) {
  run<false>(a, true, false);
}

template <class T> void hash_encode_backward(const HashEncodeArgs<T>& a, Stream) {
  run<false>(a, false, a.grad_table || a.grad_x);
}

template <class T> void hash_encode_second(const HashEncodeArgs<T>& a, Stream) {
  run<true>(a, a.out, a.grad_table || a.grad_x);
}

DF_INSTANTIATE(hash_encode_forward, HashEncodeArgs)
DF_INSTANTIATE(hash_encode_backward, HashEncodeArgs)
DF_INSTANTIATE(hash_encode_second, HashEncodeArgs)

}  // namespace DF_ISA
}  // namespace df
