// The occupancy grid of instant-ngp (Mueller et al. 2022, appendix E): a decaying maximum of the
// density seen in each cell, and one bit a cell for march. Cell (x, y, z): index (x G + y) G + z.
#pragma once

#include "common.h"

namespace df {

template <class T> struct OccupancyPointsArgs {
  const int64_t* seed;  // (1,)
  T* points;            // (resolution^3, 3) one point in each cell
  int resolution;
  double bound;         // the grid fills the cube [-bound, bound]^3
};

template <class T> struct OccupancyUpdateArgs {
  T* ema;               // (n,) decaying maximum; changed
  uint8_t* bitfield;    // (n / 8,) cell c is bit c % 8 of byte c / 8; written
  const T* density;     // (n,) density found in each cell
  double* partial;      // (ceil(n / chunk),) scratch: a chunk's sum of ema
  int64_t n, chunk;     // multiples of 8
  double decay, threshold;
};

inline namespace DF_ISA {

// A point in cell (x, y, z), which has index `cell`; size: a cell's edge.
template <class T>
DF_HD vec3<T> occupancy_point(uint64_t seed, uint32_t cell, vec3<int> at, T size, T bound) {
  return {(T(at.x) + T(uniform01(seed, cell, 0))) * size - bound,
          (T(at.y) + T(uniform01(seed, cell, 1))) * size - bound,
          (T(at.z) + T(uniform01(seed, cell, 2))) * size - bound};
}
template <class T> DF_HD T occupancy_cell_size(int resolution, T bound) {
  return 2 * bound / T(resolution);
}
DF_HD vec3<int> occupancy_cell(uint32_t cell, int resolution) {
  const uint32_t g = uint32_t(resolution);
  return {int(cell / (g * g)), int(cell / g % g), int(cell % g)};
}

template <class T> DF_HD T positive(T x) { return x > 0 ? x : T(0); }  // NaN becomes 0
template <class T> DF_HD T occupancy_ema(T ema, T density, T decay) {
  return max(positive(ema * decay), positive(density));
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(occupancy_points, OccupancyPointsArgs)
DF_DECLARE(occupancy_update, OccupancyUpdateArgs)
