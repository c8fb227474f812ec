// March on the CPU: rays side by side, once to count and, after a scan, once to fill. A ray's bins
// are taken in groups, whose numbers lie side by side in vector registers, by march.h's formulas.
#include "march.h"

#include <cstdio>
#include <stdexcept>

namespace df {
namespace DF_ISA {
namespace {

// A chunk takes some 20 microseconds or more: for less, no second thread is woken.
constexpr int64_t GRAIN = 256;         // rays a chunk
constexpr int64_t FILL_GRAIN = 16384;  // unused rows a chunk
constexpr int64_t BLOCK_GRAIN = 256;   // blocks of cells a chunk

template <class T> bool finite(vec3<T> v) {
  return std::isfinite(v.x) && std::isfinite(v.y) && std::isfinite(v.z);
}

template <class T> bool is_bad(const MarchArgs<T>& a, int64_t i) {
  const vec3<T> o = load3(a.rays_o + 3 * i), d = load3(a.rays_d + 3 * i);
  return !finite(o) || !finite(d) || !(dot(d, d) > 0) ||
         !(bin_count(a.near[i], a.far[i], T(a.step)) <= MAX_BINS);
}

template <class T> [[noreturn]] void fail(const MarchArgs<T>& a, int64_t i) {
  const vec3<T> o = load3(a.rays_o + 3 * i), d = load3(a.rays_d + 3 * i);
  const T near = a.near[i], far = a.far[i];
  const long long ray = i;
  char text[256];
  if (!finite(o))
    std::snprintf(text, sizeof text, "argument `rays_o`: expected finite origins, got (%g, %g, %g) "
                  "for ray %lld", double(o.x), double(o.y), double(o.z), ray);
  else if (!finite(d) || !(dot(d, d) > 0))
    std::snprintf(text, sizeof text, "argument `rays_d`: expected finite directions of non-zero "
                  "length, got (%g, %g, %g) for ray %lld",
                  double(d.x), double(d.y), double(d.z), ray);
  else if (near != near)
    std::snprintf(text, sizeof text, "argument `near`: expected numbers, got %g for ray %lld",
                  double(near), ray);
  else if (far != far)
    std::snprintf(text, sizeof text, "argument `far`: expected numbers, got %g for ray %lld",
                  double(far), ray);
  else
    std::snprintf(text, sizeof text, "argument `far`: expected at most %d steps of %g past near = "
                  "%g, got %g for ray %lld", MAX_BINS, a.step, double(near), double(far), ray);
  throw std::invalid_argument(text);
}

// Throws for the first bad ray.
template <class T> void check_rays(const MarchArgs<T>& a) {
  int64_t first_bad = a.n;
  parallel_for(a.n, 16 * GRAIN, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    while (i < end && !is_bad(a, i)) ++i;
    if (i == end) return;
#pragma omp critical(df_march)
    first_bad = min(first_bad, i);
  });
  if (first_bad < a.n) fail(a, first_bad);
}

template <class T> void find_blocks(const MarchArgs<T>& a, const OccupancyGrid<T>& g) {
  const int64_t n = int64_t(g.n_blocks) * g.n_blocks * g.n_blocks;
  parallel_for(n, BLOCK_GRAIN, [&](int64_t i, int64_t end) {
    for (; i < end; ++i) a.blocks[i] = find_block(g, int(i));
  });
}

// ---- bins side by side, in vector registers -----------------------------------------------------
constexpr int GROUP = 16;
template <class T> struct Bins { T t[GROUP], dt[GROUP], x[GROUP], y[GROUP], z[GROUP]; };

// These products are rounded for themselves: what follows is not fused with them. See product().
template <class V> inline void settle(V& products) {
#if defined(__GNUC__)
  asm("" : "+m"(products));
#endif
}

// bin_sample of bins i to i + GROUP - 1 of ray number `ray`.
template <class T>
inline void find_bins(const Ray<T>& r, bool jitter, uint64_t seed, uint32_t ray, int i,
                      Bins<T>& b) {
  T jump[GROUP];
  for (int k = 0; k < GROUP; ++k) jump[k] = T(0.5);
  if (jitter)
    for (int k = 0; k < GROUP; ++k)
      jump[k] = T(int32_t(hash32(seed, ray, uint32_t(i + k)) >> 8)) * T(0x1p-24);
  for (int k = 0; k < GROUP; ++k) b.t[k] = T(i + k) * r.step;
  settle(b.t);
#pragma omp simd  // without it g++ takes the numbers one by one
  for (int k = 0; k < GROUP; ++k) {
    b.t[k] += r.near;
    b.dt[k] = max(T(0), min(r.step, r.far - b.t[k]));
    jump[k] *= b.dt[k];
  }
  settle(jump);
  for (int k = 0; k < GROUP; ++k) {
    b.t[k] += jump[k];
    b.x[k] = b.t[k] * r.d.x;
    b.y[k] = b.t[k] * r.d.y;
    b.z[k] = b.t[k] * r.d.z;
  }
  settle(b);
  for (int k = 0; k < GROUP; ++k) {
    b.x[k] += r.o.x;
    b.y[k] += r.o.y;
    b.z[k] += r.o.z;
  }
}

// Bit k: the sample of bin k lies in an occupied cell. find_cell and occupied, side by side.
template <class T> inline uint32_t find_occupied(const OccupancyGrid<T>& g, const Bins<T>& b) {
  const T size = T(g.resolution);
  uint32_t cell[GROUP], inside[GROUP];
  for (int k = 0; k < GROUP; ++k) {
    const T x = (b.x[k] + g.bound) * g.scale;
    const T y = (b.y[k] + g.bound) * g.scale;
    const T z = (b.z[k] + g.bound) * g.scale;
    const bool in = (x >= 0) & (y >= 0) & (z >= 0) & (x < size) & (y < size) & (z < size);
    inside[k] = in;
    const int cx = int(in ? x : T(0)), cy = int(in ? y : T(0)), cz = int(in ? z : T(0));
    cell[k] = (uint32_t(cx) * g.resolution + cy) * g.resolution + cz;
  }
  uint32_t mask = 0;
#pragma GCC unroll 16
  for (int k = 0; k < GROUP; ++k)
    mask |= (g.bitfield[cell[k] >> 3] >> (cell[k] & 7) & inside[k]) << k;
  return mask;
}

// Calls f(i, mask, bins) for groups of bins [i, i + GROUP) of ray number `ray` from bin `begin` on,
// until f returns false. Mask: those that hold a sample; groups left out hold none.
template <class T, class F>
inline void for_groups(const MarchArgs<T>& a, const Ray<T>& r, const OccupancyGrid<T>& g,
                       uint32_t ray, int begin, int end, const F& f) {
  const uint64_t seed = uint64_t(*a.seed);
  const bool jumps = EDGE * g.cell_size > GROUP * r.step;  // an empty block may hold a whole group
  Bins<T> bins;
  for (int i = begin; i < end;) {
    find_bins(r, a.jitter, seed, ray, i, bins);
    uint32_t mask = find_occupied(g, bins);
    const int next = i + GROUP;
    if (next > end) mask &= (1u << (end - i)) - 1;
    if (mask && !f(i, mask, bins)) return;
    i = next;
    const vec3<T> p{bins.x[GROUP - 1], bins.y[GROUP - 1], bins.z[GROUP - 1]};
    Cell c;
    if (jumps && !mask && next < end && find_cell(g, p, c) && !block_occupied(g, c))
      i = next_bin(r, g, next - 1, p, {c.x & -EDGE, c.y & -EDGE, c.z & -EDGE}, EDGE, end);
  }
}

// Writes each ray's number of samples into packed[:, 1], and its first bin.
template <class T> void count_samples(const MarchArgs<T>& a, const OccupancyGrid<T>& grid) {
  parallel_for(a.n, GRAIN, [&](int64_t ray, int64_t last) {
    for (; ray < last; ++ray) {
      const Ray<T> r = load_ray(a, ray);
      const int limit = sample_limit(a, ray);
      int begin, end, first = 0, n = 0;
      bin_range(r, grid, begin, end);
      if (limit <= 0) end = begin;
      for_groups(a, r, grid, ray_number(a, ray), begin, end,
                 [&](int i, uint32_t mask, const Bins<T>&) {
        if (n == 0) first = i;
        n += __builtin_popcount(mask);
        return n < limit;
      });
      a.packed[2 * ray + 1] = n < limit ? n : max(limit, 0);
      a.first[ray] = first;
    }
  });
}

// Turns counts into starts, and drops the rays that do not fit. Returns the number of rows in use.
template <class T> int64_t scan(const MarchArgs<T>& a) {
  int64_t demanded = 0, used = 0;
  for (int64_t ray = 0; ray < a.n; ++ray) {
    int32_t* p = a.packed + 2 * ray;
    const int64_t start = demanded;
    demanded += p[1];
    p[0] = int32_t(min(start, a.capacity));
    if (demanded > a.capacity) p[1] = 0;
    else used = demanded;
  }
  a.count[0] = int32_t(min<int64_t>(demanded, std::numeric_limits<int32_t>::max()));
  return used;
}

template <class T> void fill(const MarchArgs<T>& a, const OccupancyGrid<T>& grid) {
  T *const positions = a.positions, *const t = a.t, *const dt = a.dt;
  parallel_for(a.n, GRAIN, [&](int64_t ray, int64_t last) {
    for (; ray < last; ++ray) {
      int64_t row = a.packed[2 * ray];
      const int64_t stop = row + a.packed[2 * ray + 1];
      if (row == stop) continue;
      for_groups(a, load_ray(a, ray), grid, ray_number(a, ray), a.first[ray], MAX_BINS,
                 [&](int, uint32_t mask, const Bins<T>& b) {
        for (; mask && row < stop; mask &= mask - 1, ++row) {
          const int k = __builtin_ctz(mask);
          store3(positions + 3 * row, {b.x[k], b.y[k], b.z[k]});
          t[row] = b.t[k];
          dt[row] = b.dt[k];
        }
        return row < stop;
      });
    }
  });
}

}  // namespace

template <class T> void march(const MarchArgs<T>& a, Stream) {
  check_rays(a);
  const OccupancyGrid<T> grid = load_grid(a);
  find_blocks(a, grid);
  count_samples(a, grid);
  const int64_t used = scan(a);
  fill(a, grid);
  parallel_for(a.capacity - used, FILL_GRAIN, [&](int64_t begin, int64_t end) {
    fill_zero(a.positions, 3 * (used + begin), 3 * (used + end));
    fill_zero(a.t, used + begin, used + end);
    fill_zero(a.dt, used + begin, used + end);
  });
}

DF_INSTANTIATE(march, MarchArgs)

}  // namespace DF_ISA
}  // namespace df
