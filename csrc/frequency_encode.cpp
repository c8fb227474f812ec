// Frequency encoding on the CPU: a few columns of a row side by side, in vector registers; what is
// the same for every row (frequencies, which coordinate a column takes) stands in tables.
#include "frequency_encode.h"

#include <cstring>

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 256;  // rows a chunk
constexpr int ROWS = 32;        // rows whose coordinates are looked at together
constexpr int BLOCK = 64;       // columns that one table has
constexpr int LANES = 8;        // columns side by side: loops of so many become vectors

// ---- sine and cosine: three ways, of which a row takes the first that is good for its angles ----
#ifdef FP_FAST_FMAF
struct Quick {  // to 2 ulp of 1, in T throughout
  template <class T> static constexpr T LIMIT = Reduction<T>::LIMIT;
  template <class T> static void at(T x, T& s, T& c) {
    int32_t quadrant;
    const T r = reduce(x, quadrant);
    quadrant_sine_cosine(r, quadrant, s, c);
  }
};
#endif
struct Wide {  // the same where multiples of pi / 2 can only be taken off in double
  template <class T> static constexpr T LIMIT = std::is_same_v<T, float> ? T(0x1p24) : T(0);
  template <class T> static void at(T x, T& s, T& c) {
    constexpr double ROUND = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
    const double shifted = double(x) * 0.63661977236758134308 + ROUND;
    int64_t bits;
    std::memcpy(&bits, &shifted, 8);
    const T r = T(double(x) - (shifted - ROUND) * 1.57079632679489661923);
    quadrant_sine_cosine(r, int32_t(bits), s, c);
  }
};
struct Library {
  template <class T> static void at(T x, T& s, T& c) { s = std::sin(x), c = std::cos(x); }
};

template <class T> constexpr T FIRST_LIMIT =
#ifdef FP_FAST_FMAF
    Quick::LIMIT<T>;
#else
    Wide::LIMIT<T>;
#endif

// Calls f(way) for angles of which below(limit) says whether all of them are.
template <class T, class Below, class F> void with_way(const Below& below, const F& f) {
#ifdef FP_FAST_FMAF
  if (below(Quick::LIMIT<T>)) return f(Quick());
#endif
  if (below(Wide::LIMIT<T>)) return f(Wide());
  f(Library());
}

// ---- columns ------------------------------------------------------------------------------------
// Columns [first, first + size) of the sines, or of the cosines. Up to a multiple of LANES there
// are more, of frequency 0: they are computed and left out.
template <class T> struct Columns {
  int first, size, dims, start;  // start: the coordinate of the first column
  T scale[BLOCK];                // 2^l
  T exponent[BLOCK];             // of the damping, for variance 1
  int offset[BLOCK / LANES];     // of a vector's coordinates in Repeated

  Columns(const FrequencyEncodeArgs<T>& a, int first_column)
      : first(first_column), size(min(BLOCK, a.n_frequencies * a.dims - first_column)),
        dims(a.dims), start(first_column % a.dims) {
    for (int i = 0; i < BLOCK; ++i) {
      scale[i] = i < size ? frequency_scale<T>((first + i) / dims) : T(0);
      exponent[i] = T(-0.5) * scale[i] * scale[i];
    }
    for (int v = 0; v < BLOCK / LANES; ++v) offset[v] = LANES * v % dims;
  }
  T top() const { return scale[size - 1]; }
};

// A row's coordinates, from k.start on, over and over: those of any vector stand side by side.
template <class T> struct Repeated {
  T x[BLOCK + LANES];
  void set(const Columns<T>& k, const T* from) {
    const int n = min(k.dims, BLOCK) + LANES;
    if (k.dims == 3 && k.start == 0) {
      const T a = from[0], b = from[1], c = from[2];
      for (int i = 0; i < 9; i += 3) x[i] = a, x[i + 1] = b, x[i + 2] = c;
      x[9] = a;
      return;
    }
    const int there = min(n, k.dims - k.start), all = min(n, k.dims);
    for (int i = 0; i < there; ++i) x[i] = from[k.start + i];
    for (int i = there; i < all; ++i) x[i] = from[i - there];
    for (int i = all; i < n; ++i) x[i] = x[i - k.dims];
  }
  void get(const Columns<T>& k, T* to) const {  // of every column
    for (int at = 0; at < k.size; at += LANES)
      for (int i = 0; i < LANES; ++i) to[at + i] = x[k.offset[at / LANES] + i];
  }
};

// A row's columns: sines, cosines and dampings; then their shares of the gradients.
template <class T> struct Row { T s[BLOCK], c[BLOCK], w[BLOCK], u[BLOCK], dv[BLOCK], *dx; };

// exp_fast, but 0 below its range: its least number times a sine would be subnormal, and slow. Not
// inlined, where 16 registers would not hold its constants beside the sines'.
__attribute__((noinline)) void damping(const Columns<float>& k, float variance, float* w) {
  for (int i = 0; i < k.size; ++i) {
    const float x = k.exponent[i] * variance;
    const ExpParts e = exp_parts(88.0f < x ? 88.0f : x);
    w[i] = x < -87.0f ? 0.0f : e.scale + e.scale * e.rest;
  }
}
inline void damping(const Columns<double>& k, double variance, double* w) {  // one exp a frequency
  for (int i = 0; i < k.size; ++i)
    w[i] = i && k.scale[i] == k.scale[i - 1] ? w[i - 1] : std::exp(k.exponent[i] * variance);
}

template <class Way, class T>
inline void find_row(const Columns<T>& k, const Repeated<T>& x, Row<T>& z) {
  for (int at = 0; at < k.size; at += LANES) {
    const T* const mine = x.x + k.offset[at / LANES];
    for (int i = 0; i < LANES; ++i) Way::at(k.scale[at + i] * mine[i], z.s[at + i], z.c[at + i]);
  }
}

// Whether all angles of rows [begin, end) are below `limit`, which NaN never is.
template <class T>
bool all_below(T limit, const FrequencyEncodeArgs<T>& a, const Columns<T>& k, int64_t begin,
               int64_t end) {
  const T* const x = a.x;
  const T least = limit / k.top();
  int others = 0;
  for (int64_t i = begin * a.dims; i < end * a.dims; ++i) others |= std::fabs(x[i]) < least ? 0 : 1;
  return !others;
}

template <class T> inline T sum(const T* p, int n) {  // eight sums side by side
  T s[LANES] = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; ++j) s[j] += p[i + j];
  for (; i < n; ++i) s[0] += p[i];
  for (int h = LANES / 2; h; h /= 2)
    for (int j = 0; j < h; ++j) s[j] += s[j + h];
  return s[0];
}

// Adds dx of a row's columns to the gradient of its coordinates.
template <class T> void add_columns(const Columns<T>& k, const T* dx, T* grad_x) {
  if (k.dims == 3 && k.size == 24) {  // the most usual: eight frequencies, unrolled
    T s[3] = {dx[0], dx[1], dx[2]};
    for (int l = 1; l < 8; ++l)
      for (int d = 0; d < 3; ++d) s[d] += dx[3 * l + d];
    for (int d = 0; d < 3; ++d) grad_x[d] += s[d];
    return;
  }
  for (int i = 0, d = k.start; i < min(k.size, k.dims); ++i, d = d + 1 < k.dims ? d + 1 : 0) {
    T sum = dx[i];
    for (int j = i + k.dims; j < k.size; j += k.dims) sum += dx[j];
    grad_x[d] += sum;
  }
}

// Calls f(columns, row, what was found for it) for rows [begin, end), one block of columns after
// another, with what u (n, dims; or null: 0) has for each column; adds the dx that f leaves to
// grad_x (n, dims; or null). A row's way depends on nothing but the row.
template <class T, class F>
void for_rows(const FrequencyEncodeArgs<T>& a, int64_t begin, int64_t end, const T* u, T* grad_x,
              const F& f) {
  Repeated<T> xs[ROWS], us[ROWS];
  Row<T> z;
  T dx[ROWS][BLOCK];  // summed only later: so soon, what was stored as vectors is slow to read
  for (int i = 0; i < BLOCK; ++i) z.w[i] = T(1), z.u[i] = T(0);
  for (int first = 0; first < a.n_frequencies * a.dims; first += BLOCK) {
    const Columns<T> k(a, first);
    for (int64_t row = begin, n; row < end; row += n) {
      n = min<int64_t>(ROWS, end - row);
      if (!all_below(FIRST_LIMIT<T>, a, k, row, row + n)) n = 1;
      for (int r = 0; r < n; ++r) xs[r].set(k, a.x + (row + r) * a.dims);
      for (int r = 0; r < n && u; ++r) us[r].set(k, u + (row + r) * a.dims);
      with_way<T>([&](T limit) { return all_below(limit, a, k, row, row + n); }, [&](auto way) {
        for (int r = 0; r < n; ++r) {
          find_row<decltype(way)>(k, xs[r], z);
          if (a.variance) damping(k, a.variance[row + r], z.w);
          if (u) us[r].get(k, z.u);
          z.dx = dx[r];
          f(k, row + r, z);
        }
      });
      for (int r = 0; r < n && grad_x; ++r) add_columns(k, dx[r], grad_x + (row + r) * a.dims);
    }
  }
}

}  // namespace

template <class T> void frequency_encode_forward(const FrequencyEncodeArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n), half = int64_t(a.n_frequencies) * a.dims;
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    const auto write = [&](const Columns<T>& k, int64_t row, const Row<T>& z) {
      T* const __restrict s = a.out + 2 * half * row + k.first;
      T* const __restrict c = s + half;
      for (int i = 0; i < k.size; ++i) s[i] = z.w[i] * z.s[i], c[i] = z.w[i] * z.c[i];
    };
    for_rows<T>(a, begin, stop, nullptr, nullptr, write);
    fill_zero(a.out, 2 * half * stop, 2 * half * end);
  });
}

template <class T> void frequency_encode_backward(const FrequencyEncodeArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n), half = int64_t(a.n_frequencies) * a.dims;
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    fill_zero(a.grad_x, begin * a.dims, end * a.dims);
    if (a.grad_variance) fill_zero(a.grad_variance, begin, end);
    const auto differentiate = [&](const Columns<T>& k, int64_t row, Row<T>& z) {
      const T *const gs = a.grad_out + 2 * half * row + k.first, *const gc = gs + half;
      T* const __restrict dx = z.dx;
      for (int i = 0; i < k.size; ++i)
        dx[i] = frequency_grad_x(k.scale[i], z.w[i], z.s[i], z.c[i], gs[i], gc[i]);
      if (!a.grad_variance) return;
      for (int i = 0; i < k.size; ++i)
        z.dv[i] = frequency_grad_variance(k.scale[i], z.w[i], z.s[i], z.c[i], gs[i], gc[i]);
      a.grad_variance[row] += sum(z.dv, k.size);
    };
    for_rows<T>(a, begin, stop, nullptr, a.grad_x, differentiate);
  });
}

template <class T> void frequency_encode_second(const FrequencyEncodeArgs<T>& a, Stream) {
  const int64_t valid = valid_rows(a.count, a.n), half = int64_t(a.n_frequencies) * a.dims;
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    const int64_t stop = clamp(valid, begin, end);
    if (a.grad_grad_out) fill_zero(a.grad_grad_out, 2 * half * stop, 2 * half * end);
    if (a.grad_x) fill_zero(a.grad_x, begin * a.dims, end * a.dims);
    if (a.grad_variance) fill_zero(a.grad_variance, begin, end);
    const auto differentiate = [&](const Columns<T>& k, int64_t row, Row<T>& z) {
      const int64_t at = 2 * half * row + k.first;
      const T *const gs = a.grad_out + at, *const gc = gs + half;
      const T q = a.q ? a.q[row] : T(0);
      T unwanted[2 * BLOCK];
      T* const __restrict ds = a.grad_grad_out ? a.grad_grad_out + at : unwanted;
      T* const __restrict dc = a.grad_grad_out ? ds + half : unwanted + BLOCK;
      T* const __restrict dx = z.dx;
      for (int i = 0; i < k.size; ++i) {
        const FrequencySecond<T> g =
            frequency_second(k.scale[i], z.w[i], z.s[i], z.c[i], gs[i], gc[i], z.u[i], q);
        ds[i] = g.gs, dc[i] = g.gc, dx[i] = g.x, z.dv[i] = g.variance;
      }
      if (a.grad_variance) a.grad_variance[row] += sum(z.dv, k.size);
    };
    for_rows<T>(a, begin, stop, a.u, a.grad_x, differentiate);
  });
}

DF_INSTANTIATE(frequency_encode_forward, FrequencyEncodeArgs)
DF_INSTANTIATE(frequency_encode_backward, FrequencyEncodeArgs)
DF_INSTANTIATE(frequency_encode_second, FrequencyEncodeArgs)

}  // namespace DF_ISA
}  // namespace df
