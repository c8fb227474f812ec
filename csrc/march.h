// Stratified samples along rays, kept where the occupancy grid is set.
//
// Bin i of a ray is [near + i step, near + (i + 1) step), the last one cut at far; its one sample
// lies at near + i step + u dt. Empty cells, and empty blocks of 8^3 cells, are jumped over, but
// the result is that of trying every bin: no bin is jumped over that rounding could put elsewhere.
// Products whose rounding decides a sample's place are never fused into an FMA, so that every
// instruction set, the GPU and the twin place the same samples.
//
// The CPU gives rays their rows in the order of rays. On the GPU the rows of a ray are consecutive
// too, but rays come in any order, and so does the choice of those that do not fit the capacity.
#pragma once

#include <cfloat>
#include <limits>

#include "rays.h"

namespace df {

template <class T> struct MarchArgs {
  const T* rays_o;          // (n, 3) origins
  const T* rays_d;          // (n, 3) directions, any length but 0; distances are in units of it
  const T* near;            // (n,) where sampling starts
  const T* far;             // (n,) where it ends; far <= near: no samples
  const uint8_t* bitfield;  // (resolution^3 / 8,) occupancy, cell c is bit c % 8 of byte c / 8
  const int64_t* seed;      // (1,) of the jitter
  const int32_t* limit;     // (n,) samples a ray may have, from its nearest on, or null: any number
  T* positions;             // (capacity, 3)
  T* t;                     // (capacity,) distances
  T* dt;                    // (capacity,) widths of the bins
  int32_t* packed;          // (n, 2) start and count of each ray's samples
  int32_t* count;           // (1,) samples demanded
  int32_t* first;           // (n,) scratch of the CPU: first bin of each ray that holds a sample
  uint8_t* blocks;          // (ceil(resolution / 8)^3,) scratch: 0 where all cells are empty
  int64_t* counter;         // (2,) scratch on CUDA: rows asked for; end of the rows in use at most
  int64_t n, capacity;
  int64_t first_ray;        // number of the first ray, for the jitter
  int resolution;
  double bound, step;
  bool jitter;
};

inline namespace DF_ISA {

constexpr int MAX_BINS = 1 << 20;
constexpr int EDGE = 8;  // cells along a block's edge

// a * b, rounded for itself: never fused with a sum.
template <class T> DF_HD T product(T a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4) return __fmul_rn(a, b);
  else return __dmul_rn(a, b);
#else
  T x = a * b;
#if defined(__GNUC__) && defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__GNUC__) && defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
#endif
}

// ---- grid ---------------------------------------------------------------------------------------
template <class T> struct OccupancyGrid {
  const uint8_t *bitfield, *blocks;
  int resolution, n_blocks;
  T bound, scale, cell_size;  // scale: cells per unit
};
template <class T> DF_HD OccupancyGrid<T> load_grid(const MarchArgs<T>& a) {
  return {a.bitfield, a.blocks, a.resolution, (a.resolution + EDGE - 1) / EDGE, T(a.bound),
          T(a.resolution / (2 * a.bound)), T(2 * a.bound / a.resolution)};
}
struct Cell { int x, y, z; };
// False outside the cube [-bound, bound)^3.
template <class T> DF_HD bool find_cell(const OccupancyGrid<T>& g, vec3<T> p, Cell& c) {
  const T size = T(g.resolution);
  const T x = (p.x + g.bound) * g.scale;
  const T y = (p.y + g.bound) * g.scale;
  const T z = (p.z + g.bound) * g.scale;
  if (!(x >= 0 && y >= 0 && z >= 0 && x < size && y < size && z < size)) return false;
  c = {int(x), int(y), int(z)};
  return true;
}
template <class T> DF_HD bool occupied(const OccupancyGrid<T>& g, Cell c) {
  const uint32_t i = (uint32_t(c.x) * g.resolution + c.y) * g.resolution + c.z;
  return g.bitfield[i >> 3] >> (i & 7) & 1;
}
// False if no cell of the block that holds c is set; true may be wrong, see find_block.
template <class T> DF_HD bool block_occupied(const OccupancyGrid<T>& g, Cell c) {
  return g.blocks[(c.x / EDGE * g.n_blocks + c.y / EDGE) * g.n_blocks + c.z / EDGE];
}
// What block number i is set to. Its rows of cells may share bytes with others: 1 is a perhaps.
template <class T> DF_HD uint8_t find_block(const OccupancyGrid<T>& g, int i) {
  const int x = i / (g.n_blocks * g.n_blocks) * EDGE, y = i / g.n_blocks % g.n_blocks * EDGE;
  const int z = i % g.n_blocks * EDGE, last = min(z + EDGE, g.resolution) - 1;
  uint8_t any = 0;
  for (int cx = x; cx < min(x + EDGE, g.resolution); ++cx)
    for (int cy = y; cy < min(y + EDGE, g.resolution); ++cy) {
      const uint32_t row = (uint32_t(cx) * g.resolution + cy) * g.resolution;
      any |= g.bitfield[(row + z) >> 3] | g.bitfield[(row + last) >> 3];
    }
  return any != 0;
}

// ---- ray ----------------------------------------------------------------------------------------
template <class T> struct Ray {
  vec3<T> o, d, inv_d;
  T near, far, step, inv_step;
  T margin;  // more than the rounding error of a position within the cube
};
template <class T> DF_HD Ray<T> load_ray(const MarchArgs<T>& a, int64_t i) {
  constexpr T epsilon = sizeof(T) == 4 ? T(FLT_EPSILON) : T(DBL_EPSILON);
  const vec3<T> o = load3(a.rays_o + 3 * i), d = load3(a.rays_d + 3 * i);
  const T reach = std::fabs(o.x) + std::fabs(o.y) + std::fabs(o.z) + T(a.bound) +
                  std::fabs(a.near[i]) * (std::fabs(d.x) + std::fabs(d.y) + std::fabs(d.z));
  return {o, d, {1 / d.x, 1 / d.y, 1 / d.z}, a.near[i], a.far[i], T(a.step), T(1 / a.step),
          32 * epsilon * reach};
}
// Number of bins; more than MAX_BINS, or NaN, if it makes no sense.
template <class T> DF_HD T bin_count(T near, T far, T step) {
  return far <= near ? T(0) : std::ceil((far - near) / step);
}
template <class T> struct Sample { T t, dt; vec3<T> position; };
template <class T> DF_HD Sample<T> bin_sample(const Ray<T>& r, int i, T u) {
  const T start = r.near + product(T(i), r.step);
  const T dt = clamp(r.far - start, T(0), r.step);
  const T t = start + product(u, dt);
  return {t, dt, {r.o.x + product(t, r.d.x), r.o.y + product(t, r.d.y), r.o.z + product(t, r.d.z)}};
}

// The distance at which a coordinate moving along o + t d leaves [low, high], a margin early; minus
// infinity if at p it is less than the margin past the side by which it came in.
template <class T> DF_HD T leave(T o, T d, T inv_d, T p, T low, T high, T margin) {
  if (d > 0) return p - low < margin ? -INFINITY : (high - margin - o) * inv_d;
  if (d < 0) return high - p < margin ? -INFINITY : (low + margin - o) * inv_d;
  return INFINITY;
}
// The first bin after i that is not certain to lie in the cube of `cells` cells an edge from cell c
// on, where bin i's sample p lies.
template <class T>
DF_HD int next_bin(const Ray<T>& r, const OccupancyGrid<T>& g, int i, vec3<T> p, Cell c, int cells,
                   int end) {
  const vec3<T> low{T(c.x) * g.cell_size - g.bound, T(c.y) * g.cell_size - g.bound,
                    T(c.z) * g.cell_size - g.bound};
  const T size = T(cells) * g.cell_size;
  const T exit = min(min(leave(r.o.x, r.d.x, r.inv_d.x, p.x, low.x, low.x + size, r.margin),
                         leave(r.o.y, r.d.y, r.inv_d.y, p.y, low.y, low.y + size, r.margin)),
                     leave(r.o.z, r.d.z, r.inv_d.z, p.z, low.z, low.z + size, r.margin));
  const T bin = (exit - r.near) * r.inv_step;
  return bin > T(i + 1) ? (bin < T(end) ? int(bin) : end) : i + 1;
}

// Bins [begin, end) outside of which no sample can lie in the cube.
template <class T>
DF_HD void bin_range(const Ray<T>& r, const OccupancyGrid<T>& g, int& begin, int& end) {
  int near_axis, far_axis;
  const Interval<T> cube = box_interval(r.o, r.d, g.bound + r.margin, near_axis, far_axis);
  const T bins = bin_count(r.near, r.far, r.step);
  const T from = (cube.near - r.near) / r.step - 1, to = (cube.far - r.near) / r.step + 2;
  begin = end = 0;
  if (!(bins <= MAX_BINS) || !(from < bins) || !(to > 0)) return;  // also where NaN
  begin = from > 0 ? int(from) : 0;
  end = int(min(to, bins));
}

// Samples that ray i may have.
template <class T> DF_HD int sample_limit(const MarchArgs<T>& a, int64_t i) {
  return a.limit ? a.limit[i] : MAX_BINS;
}
// The number of ray i by which it is jittered.
template <class T> DF_HD uint32_t ray_number(const MarchArgs<T>& a, int64_t i) {
  return uint32_t(a.first_ray + i);
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(march, MarchArgs)
