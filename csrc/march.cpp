// March on the CPU: rays side by side, once to count and, after a scan, once to fill.
#include "march.h"

#include <cstdio>
#include <stdexcept>

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 64;         // rays a chunk
constexpr int64_t FILL_GRAIN = 8192;  // unused rows a chunk
constexpr int64_t BLOCK_GRAIN = 256;  // blocks of cells a chunk

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

// Writes each ray's number of samples into packed[:, 1], and its first bin.
template <class T>
void count_samples(const MarchArgs<T>& a, const OccupancyGrid<T>& grid, uint64_t seed) {
  parallel_for(a.n, GRAIN, [&](int64_t ray, int64_t last) {
    for (; ray < last; ++ray) {
      const Ray<T> r = load_ray(a, ray);
      const int limit = sample_limit(a, ray);
      int begin, end, first = 0, n = 0;
      bin_range(r, grid, begin, end);
      if (limit <= 0) end = begin;
      for_samples(r, grid, a.jitter, seed, ray_number(a, ray), begin, end,
                  [&](int i, const Sample<T>&) {
        if (n++ == 0) first = i;
        return n < limit;
      });
      a.packed[2 * ray + 1] = n;
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

template <class T> void fill(const MarchArgs<T>& a, const OccupancyGrid<T>& grid, uint64_t seed) {
  parallel_for(a.n, GRAIN, [&](int64_t ray, int64_t last) {
    for (; ray < last; ++ray) {
      int64_t row = a.packed[2 * ray];
      const int64_t stop = row + a.packed[2 * ray + 1];
      if (row == stop) continue;
      for_samples(load_ray(a, ray), grid, a.jitter, seed, ray_number(a, ray), a.first[ray], MAX_BINS,
                  [&](int, const Sample<T>& s) {
        store3(a.positions + 3 * row, s.position);
        a.t[row] = s.t;
        a.dt[row] = s.dt;
        return ++row < stop;
      });
    }
  });
}

}  // namespace

template <class T> void march(const MarchArgs<T>& a, Stream) {
  check_rays(a);
  const OccupancyGrid<T> grid = load_grid(a);
  const uint64_t seed = uint64_t(*a.seed);
  find_blocks(a, grid);
  count_samples(a, grid, seed);
  const int64_t used = scan(a);
  fill(a, grid, seed);
  parallel_for(a.capacity - used, FILL_GRAIN, [&](int64_t begin, int64_t end) {
    fill_zero(a.positions, 3 * (used + begin), 3 * (used + end));
    fill_zero(a.t, used + begin, used + end);
    fill_zero(a.dt, used + begin, used + end);
  });
}

DF_INSTANTIATE(march, MarchArgs)

}  // namespace DF_ISA
}  // namespace df
