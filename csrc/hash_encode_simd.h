// Hash encoding on the CPU: the features of a row and of two neighbours as values, the cells of a
// block of points by vectors of points, and features ordered by level.
#pragma once

#include "hash_encode.h"

#include <cstring>
#include <type_traits>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the machine's are never passed

namespace df {
namespace DF_ISA {
namespace {

// The features of one row.
template <class T, int F> struct FeaturesOf {
  typedef T type __attribute__((vector_size(F * sizeof(T))));
};
template <class T> struct FeaturesOf<T, 1> { typedef T type; };
template <class T, int F> using Features = typename FeaturesOf<T, F>::type;

template <class V, class T> inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> inline void store(T* p, const V& v) { std::memcpy(p, &v, sizeof v); }
template <class T, class V> inline T dot_features(const V& a, const V& b) {
  if constexpr (std::is_same_v<V, T>) {
    return a * b;
  } else {
    const V products = a * b;
    T sum = products[0];
    for (int f = 1; f < int(sizeof(V) / sizeof(T)); ++f) sum += products[f];
    return sum;
  }
}

// The features of two corners that are neighbours in x: two floats each share a register.
template <class V> struct Both { V left, right; };
template <class V> inline Both<V> operator-(const Both<V>& a, const Both<V>& b) {
  return {a.left - b.left, a.right - b.right};
}
template <class V> inline Both<V> operator+(const Both<V>& a, const Both<V>& b) {
  return {a.left + b.left, a.right + b.right};
}
template <class V, class T> inline Both<V> operator*(T w, const Both<V>& a) {
  return {w * a.left, w * a.right};
}
template <class V> inline V left(const Both<V>& p) { return p.left; }
template <class V> inline V right(const Both<V>& p) { return p.right; }
template <class T, int F> struct Pair {
  using type = Both<Features<T, F>>;
  static type of(const Features<T, F>& a, const Features<T, F>& b) { return {a, b}; }
};
// s: <g, features> of two pairs.
template <class T, class V>
inline void dot_pairs(const V& g, const Both<V>& a, const Both<V>& b, T* s) {
  s[0] = dot_features<T>(g, a.left), s[1] = dot_features<T>(g, a.right);
  s[2] = dot_features<T>(g, b.left), s[3] = dot_features<T>(g, b.right);
}
typedef float Quad __attribute__((vector_size(16)));
inline Features<float, 2> left(const Quad& p) { return __builtin_shufflevector(p, p, 0, 1); }
inline Features<float, 2> right(const Quad& p) { return __builtin_shufflevector(p, p, 2, 3); }
template <> struct Pair<float, 2> {
  using type = Quad;
  static type of(const Features<float, 2>& a, const Features<float, 2>& b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3);
  }
};
template <class T>
inline void dot_pairs(const Features<float, 2>& g, const Quad& a, const Quad& b, T* s) {
  const Quad both = Pair<float, 2>::of(g, g), x = both * a, y = both * b;
  store(s, Quad(__builtin_shufflevector(x, y, 0, 2, 4, 6) +
                __builtin_shufflevector(x, y, 1, 3, 5, 7)));
}
template <class V, class T> inline V lerp(const V& a, const V& b, T w) { return a + w * (b - a); }

// Calls f(F), or f(F, rows), with integral constants.
template <class Call> void with_features(int n_features, const Call& f) {
  if (n_features == 1) f(std::integral_constant<int, 1>());
  else if (n_features == 2) f(std::integral_constant<int, 2>());
  else if (n_features == 4) f(std::integral_constant<int, 4>());
  else f(std::integral_constant<int, 8>());
}
template <HashRows ROWS> using Rows = std::integral_constant<HashRows, ROWS>;
template <class Call> void on_grid(int n_features, const HashGrid& grid, const Call& f) {
  with_features(n_features, [&](auto features) {
    if (!grid.dense) f(features, Rows<HashRows::hashed>());
    else if (grid.staggered) f(features, Rows<HashRows::wrapped>());
    else f(features, Rows<HashRows::dense>());
  });
}

constexpr int BLOCK = 64;  // points whose cells are computed together

// The cells of up to BLOCK points on one level, one array a quantity, of short loops that g++ makes
// vectors of. ORDER: of the derivatives that are wanted.
template <class T> struct Cells {
  uint32_t row[8][BLOCK];             // of the corners; bit 0 of a corner is x
  T wx[BLOCK], wy[BLOCK], wz[BLOCK];  // weights of the upper one
  T sx[BLOCK], sy[BLOCK], sz[BLOCK];  // their slopes: ORDER 1
  T bx[BLOCK], by[BLOCK], bz[BLOCK];  // and the slopes': ORDER 2
  T vx[BLOCK], vy[BLOCK], vz[BLOCK];  // the tangent where it counts: if there is one
};
// One coordinate of them: cells times `step`, weights, slopes and bends.
template <int ORDER, bool SMOOTH, bool STAGGERED, class T>
inline void find_axis(const T* __restrict x, int n, T scale, uint32_t step,
                      uint32_t* __restrict key, T* __restrict weight, T* __restrict slope,
                      T* __restrict bend) {
  for (int i = 0; i < n; ++i) {
    const HashAxis<T> axis = hash_axis(x[i], scale, STAGGERED, SMOOTH);
    key[i] = axis.cell * step;
    weight[i] = axis.weight;
    if constexpr (ORDER > 0) slope[i] = axis.slope;
    if constexpr (ORDER > 1) bend[i] = axis.bend;
  }
}
template <HashRows ROWS, int ORDER, bool SMOOTH, bool STAGGERED, class T>
inline void find_cells_as(const T* x, const T* tangent, int n, const HashGrid& grid,
                          Cells<T>& c) {
  constexpr HashRows PLAIN = ROWS == HashRows::hashed ? ROWS : HashRows::dense;
  uint32_t kx[BLOCK], ky[BLOCK], kz[BLOCK];
  T px[BLOCK], py[BLOCK], pz[BLOCK];
  for (int i = 0; i < n; ++i) px[i] = x[3 * i], py[i] = x[3 * i + 1], pz[i] = x[3 * i + 2];
  const T scale = T(grid.scale);
  const uint32_t step_y = grid.step_y, step_z = grid.step_z, mask = grid.mask;
  find_axis<ORDER, SMOOTH, STAGGERED>(px, n, scale, 1, kx, c.wx, c.sx, c.bx);
  find_axis<ORDER, SMOOTH, STAGGERED>(py, n, scale, step_y, ky, c.wy, c.sy, c.by);
  find_axis<ORDER, SMOOTH, STAGGERED>(pz, n, scale, step_z, kz, c.wz, c.sz, c.bz);
  for (int i = 0; tangent && i < n; ++i) {
    const vec3<T> v = hash_tangent(vec3<T>{px[i], py[i], pz[i]}, load3(tangent + 3 * i), STAGGERED);
    c.vx[i] = v.x, c.vy[i] = v.y, c.vz[i] = v.z;
  }
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 8; ++k)
      c.row[k][i] = hash_row<PLAIN>(kx[i] + (k & 1), ky[i] + (k & 2 ? step_y : 0),
                                    kz[i] + (k & 4 ? step_z : 0), mask);
  if constexpr (ROWS == HashRows::wrapped)  // apart: a division would keep the loops above scalar
    for (int k = 0; k < 8; ++k)
      for (int i = 0; i < n; ++i) c.row[k][i] = hash_row<ROWS>(c.row[k][i], 0, 0, mask);
}
template <HashRows ROWS, int ORDER, class T>
__attribute__((noinline)) void find_cells(const HashEncodeArgs<T>& a, const HashGrid& grid,
                                          int64_t first, int n, Cells<T>& c) {
  const T *const x = a.x + 3 * first, *const v = a.tangent ? a.tangent + 3 * first : nullptr;
  if (a.staggered && a.smoothstep) find_cells_as<ROWS, ORDER, true, true>(x, v, n, grid, c);
  else if (a.staggered) find_cells_as<ROWS, ORDER, false, true>(x, v, n, grid, c);
  else if (a.smoothstep) find_cells_as<ROWS, ORDER, true, false>(x, v, n, grid, c);
  else find_cells_as<ROWS, ORDER, false, false>(x, v, n, grid, c);
}

// Calls f(cells, n, first) for every block of n points from begin to end.
template <HashRows ROWS, int ORDER, class T, class F>
inline void for_blocks(const HashEncodeArgs<T>& a, const HashGrid& grid, int64_t begin,
                       int64_t end, const F& f) {
  Cells<T> cells;
  for (int64_t first = begin; first < end; first += BLOCK) {
    const int n = int(min<int64_t>(BLOCK, end - first));
    find_cells<ROWS, ORDER>(a, grid, first, n, cells);
    f(cells, n, first);
  }
}

// Transposes SIDE x SIDE times the features of a point.
template <int F, int SIDE, class T>
inline void turn_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  if constexpr (SIDE == 1) {
    store(to, load<Features<T, F>>(from));
  } else {
    typedef double Row __attribute__((vector_size(32)));  // of any eight bytes each
    const Row a = load<Row>(from), b = load<Row>(from + from_stride);
    const Row c = load<Row>(from + 2 * from_stride), d = load<Row>(from + 3 * from_stride);
    const Row ab0 = __builtin_shufflevector(a, b, 0, 4, 2, 6);
    const Row ab1 = __builtin_shufflevector(a, b, 1, 5, 3, 7);
    const Row cd0 = __builtin_shufflevector(c, d, 0, 4, 2, 6);
    const Row cd1 = __builtin_shufflevector(c, d, 1, 5, 3, 7);
    store(to, __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5));
    store(to + to_stride, __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5));
    store(to + 2 * to_stride, __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7));
    store(to + 3 * to_stride, __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7));
  }
}

constexpr int64_t GRAIN = 4096;  // points a chunk

// Features of some points ordered by level. A level that went through rows of all levels would
// move all of their cache lines for its own few bytes; so rows are turned once, part by part.
template <class T> class ByLevel {
 public:
  ByLevel(const HashEncodeArgs<T>& a, int64_t points)
      : features_(a.n_features), levels_(a.n_levels), row_(int64_t(levels_) * features_),
        capacity_(max<int64_t>(1, min(points, SCRATCH / row_))),
        // Levels begin in different sets of a cache.
        stride_((capacity_ * features_ + LINE - 1) / LINE * LINE + LINE),
        data_(scratch(stride_ * levels_)) {}

  int64_t capacity() const { return capacity_; }
  T* level(int l) const { return data_ + stride_ * l; }

  // The first n points here, from rows or to rows.
  void from_rows(const T* rows, int64_t n) const {
    turn(n, [&](int64_t i, int64_t l, auto F, auto side) {
      turn_square<F, side>(rows + i * row_ + F * l, row_, level(l) + F * i, stride_);
    });
  }
  void to_rows(T* rows, int64_t n) const {
    turn(n, [&](int64_t i, int64_t l, auto F, auto side) {
      turn_square<F, side>(level(l) + F * i, stride_, rows + i * row_ + F * l, row_);
    });
  }

 private:
  static constexpr int64_t SCRATCH = 1 << 23;      // numbers, at most: 32 MiB of floats
  static constexpr int64_t LINE = 64 / sizeof(T);  // numbers a cache line

  // Kept for the thread's next call: new pages cost as much as filling them.
  struct Kept {  // not std::unique_ptr, whose code the instruction sets would share
    T* data = nullptr;
    int64_t size = 0;
    void clear() {
      delete[] data;
      data = nullptr, size = 0;
    }
    ~Kept() { clear(); }
  };
  static T* scratch(int64_t size) {
    thread_local Kept kept;
    if (size > kept.size) {
      kept.clear();  // before the larger one is made
      kept.data = new T[size];
      kept.size = size;
    }
    return kept.data;
  }

  // Calls move(point, level, F, side) for squares of points and levels that cover the first n.
  template <class Move> void turn(int64_t n, const Move& move) const {
    with_features(features_, [&](auto F) {
      parallel_for(n, GRAIN, [&](int64_t begin, int64_t end) {
        constexpr int SIDE = F * sizeof(T) == 8 ? 4 : 1;
        const int64_t whole = begin + (end - begin) / SIDE * SIDE, levels = levels_ / SIDE * SIDE;
        for (int64_t i = begin; i < whole; i += SIDE)
          for (int64_t l = 0; l < levels; l += SIDE)
            move(i, l, F, std::integral_constant<int, SIDE>());
        for (int64_t i = begin; i < end; ++i)
          for (int64_t l = i < whole ? levels : 0; l < levels_; ++l)
            move(i, l, F, std::integral_constant<int, 1>());
      });
    });
  }

  int features_, levels_;
  int64_t row_, capacity_, stride_;
  T* data_;
};

}  // namespace
}  // namespace DF_ISA
}  // namespace df
