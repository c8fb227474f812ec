// The occupancy grid on the CPU: one pass for the maxima and their sums, one for the bits.
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")  // measured: a fifth less time than at 256
#endif
#include "occupancy.h"

namespace df {
namespace DF_ISA {
namespace {

constexpr int64_t GRAIN = 4096;  // cells a chunk

// The new maxima of n cells, and their sum; each loop so simple that the compiler vectorises it.
template <class T>
double update_cells(int n, T decay, const T* __restrict density, T* __restrict ema) {
  for (int i = 0; i < n; ++i) ema[i] = occupancy_ema(ema[i], density[i], decay);
  double sums[8] = {};
  for (int i = 0; i < n; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += double(ema[i + k]);
  double sum = 0;
  for (int k = 0; k < 8; ++k) sum += sums[k];
  return sum;
}

template <class T> void update_ema(const OccupancyUpdateArgs<T>& a) {
  parallel_for(a.n, a.chunk, [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; i += GRAIN)
      sum += update_cells(int(min(GRAIN, end - i)), T(a.decay), a.density + i, a.ema + i);
    a.partial[begin / a.chunk] = sum;
  });
}

template <class T> double limit(const OccupancyUpdateArgs<T>& a) {
  double sum = 0;
  for (int64_t k = 0; k * a.chunk < a.n; ++k) sum += a.partial[k];
  return min(a.threshold, sum / double(a.n));
}

// The largest T that is not above x: what is above one is above the other.
template <class T> T rounded_down(double x) {
  const T t = T(x);
  return double(t) > x ? std::nextafter(t, T(-INFINITY)) : t;
}

// One bit for each of n <= GRAIN cells: comparisons side by side, then eight bytes to one: the
// product brings bit 0 of byte k (the k-th least) to bit 56 + k.
template <class T> void write_bits(const T* ema, int n, T above, uint8_t* bits) {
  uint8_t set[GRAIN];
  for (int i = 0; i < n; ++i) set[i] = ema[i] > above;
  for (int i = 0; i < n; i += 8) {
    uint64_t eight = 0;
    for (int k = 0; k < 8; ++k) eight |= uint64_t(set[i + k]) << 8 * k;  // one load
    bits[i / 8] = uint8_t(eight * 0x0102040810204080u >> 56);
  }
}

// Points in n cells from `at` on, whose index is `cell`. Coordinates are found first and put in
// order afterwards: as one loop, g++ would store them one by one.
template <class T>
void points_along_z(uint64_t seed, uint32_t cell, int n, vec3<int> at, T size, T bound, T* points) {
  constexpr int BLOCK = 64;
  T x[BLOCK], y[BLOCK], z[BLOCK];
  for (int first = 0; first < n; first += BLOCK) {
    const int end = min(BLOCK, n - first);
    for (int k = 0; k < end; ++k) {
      const uint32_t i = uint32_t(first + k);
      const vec3<T> p = occupancy_point(seed, cell + i, {at.x, at.y, at.z + int(i)}, size, bound);
      x[k] = p.x, y[k] = p.y, z[k] = p.z;
    }
    T* const __restrict out = points + 3 * first;
    for (int k = 0; k < end; ++k) out[3 * k] = x[k], out[3 * k + 1] = y[k], out[3 * k + 2] = z[k];
  }
}

}  // namespace

template <class T> void occupancy_points(const OccupancyPointsArgs<T>& a, Stream) {
  const int g = a.resolution;
  const uint64_t seed = uint64_t(*a.seed);
  const T bound = T(a.bound), size = occupancy_cell_size(g, bound);
  parallel_for(int64_t(g) * g * g, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, n; i < end; i += n) {  // cells along z, which differ in nothing else
      const vec3<int> at = occupancy_cell(uint32_t(i), g);
      n = min<int64_t>(g - at.z, end - i);
      points_along_z(seed, uint32_t(i), int(n), at, size, bound, a.points + 3 * i);
    }
  });
}

template <class T> void occupancy_update(const OccupancyUpdateArgs<T>& a, Stream) {
  update_ema(a);
  const T above = rounded_down<T>(limit(a));
  parallel_for(a.n, GRAIN, [&](int64_t begin, int64_t end) {
    write_bits(a.ema + begin, int(end - begin), above, a.bitfield + begin / 8);
  });
}

DF_INSTANTIATE(occupancy_points, OccupancyPointsArgs)
DF_INSTANTIATE(occupancy_update, OccupancyUpdateArgs)

}  // namespace DF_ISA
}  // namespace df
