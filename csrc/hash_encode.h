// Multiresolution hash encoding (instant-ngp, Mueller et al. 2022), three dimensions.
//
// Level l is a grid of N_l cells a side over [0, 1]^3. A point p (clamped to the cube) lies at
//   pos = N_l p,   cell c = min(floor(pos), N_l - 1),   fraction f = pos - c in [0, 1],
// without instant-ngp's offset of half a cell, and its features are the trilinear interpolation of
// the table's at the eight corners, with weights f or, "smoothstep", f^2 (3 - 2 f).
// Corner (i, j, k) is row i + (N + 1) (j + (N + 1) k) of the level where those (N + 1)^3 rows fit,
// and (i xor 2654435761 j xor 805459861 k) mod 2^log2_table_size, 32 bits wide, where not.
// NaN: its cell is N - 1, its fraction is NaN.
//
// Staggered levels are tiny-cuda-nn's: a scale s_l, N_l = ceil(s_l) + 1 vertices a side, and a
// point, not clamped, lies at pos = s_l p + 1/2, in the cell floor(pos), of any sign. Corner
// (i, j, k) is row i + N (j + N k), in 32 bits and modulo the level's rows, where N^3 of them fit,
// hashed as above where not. NaN: its cell is -2^30.
//
// Second: the derivative along a tangent v of the points, d/de at x + e v, of what the others give:
// of the features (out, or null: not wanted), of grad_x (its Hessian times v) and of grad_table.
// These are also the gradients of <v, grad_x> by grad_out, x and table: what backward's own
// backward asks for. v does not count in a coordinate outside of the cube.
#pragma once

#include "common.h"

namespace df {

constexpr int HASH_MAX_LEVELS = 32;

struct HashLevels {                      // ops/hash_encode.py: hash_table_rows
  int32_t resolution[HASH_MAX_LEVELS];   // N_l, 1..2^20; staggered: to 2^20 + 1
  int64_t offset[HASH_MAX_LEVELS + 1];   // first row of each level; the last: number of rows
  float scale[HASH_MAX_LEVELS];          // s_l, above -1 and up to 2^20; staggered only
};

template <class T> struct HashEncodeArgs {
  const Wide<T>* x;        // (n, 3) points; clamped to [0, 1] unless staggered
  const T* table;          // (rows, n_features)
  const T* grad_out;       // (n, n_levels * n_features) gradient of out; not in forward
  const Wide<T>* tangent;  // (n, 3) gradient of backward's grad_x; second only
  T* out;                  // (n, n_levels * n_features) features, level by level
  Wide<T>* grad_x;         // (n, 3) gradient of x, or null: not wanted; not in forward
  Wide<T>* grad_table;     // (rows, n_features) gradient of table, or null; backward only
  const int32_t* count;    // (1,) number of valid rows, or null: all
  int64_t n;               // points
  int n_levels;            // 1..32
  int n_features;          // 1, 2, 4 or 8
  bool smoothstep;         // else linear
  bool staggered;          // levels are tiny-cuda-nn's
  HashLevels levels;
};

inline namespace DF_ISA {

// A level as the loops use it. The row of a corner is made of one key a coordinate, i, j * step_y
// and k * step_z; a neighbour's key is one step further.
struct HashGrid {
  int64_t offset, rows;
  float scale;
  uint32_t step_y, step_z, mask;
  bool dense, staggered;
};
DF_HD HashGrid hash_grid(const HashLevels& levels, bool staggered, int l) {
  const uint32_t resolution = uint32_t(levels.resolution[l]);
  const uint32_t side = staggered ? resolution : resolution + 1;
  const int64_t offset = levels.offset[l], rows = levels.offset[l + 1] - offset;
  const bool dense = int64_t(side) * side * side <= rows;
  const float scale = staggered ? levels.scale[l] : float(levels.resolution[l]);
  return {offset, rows, scale, dense ? side : 2654435761u, dense ? side * side : 805459861u,
          uint32_t(rows - 1), dense, staggered};
}
enum class HashRows { hashed, dense, wrapped };  // wrapped: dense and staggered
template <HashRows ROWS>
DF_HD uint32_t hash_row(uint32_t x, uint32_t y, uint32_t z, uint32_t mask) {
  if (ROWS == HashRows::hashed) return (x ^ y ^ z) & mask;
  const uint32_t row = x + y + z;
  return ROWS == HashRows::wrapped && row > mask ? row % (mask + 1) : row;
}

// One coordinate's cell, weight of the upper corner, and that weight's derivatives by x, which
// count, unless staggered, only inside the cube: grad_x is zeroed at the end where hash_clamped(x).
template <class T> DF_HD bool hash_clamped(T x) { return !(x >= T(0) && x <= T(1)); }  // or NaN
template <class T> struct HashAxis { uint32_t cell; T weight, slope, bend; };
template <class T> DF_HD HashAxis<T> hash_axis(T x, T scale, bool staggered, bool smoothstep) {
  const T p = staggered ? x : clamp(x, T(0), T(1)), shift = staggered ? T(0.5) : T(0);
  // Rounded before it is used: a fused multiply-add would move the fraction out of the cell.
#if defined(__CUDA_ARCH__)
  T pos;
  if constexpr (sizeof(T) == 4) pos = __fmaf_rn(p, scale, shift);
  else pos = __fma_rn(p, scale, shift);
#else
  const T pos = staggered ? p * scale + shift : p * scale;  // used twice: g++, clang do not fuse it
#endif
  int32_t cell;
  T f;
  if (staggered) {
    constexpr T LIMIT = T(1 << 30);
    const T held = pos > -LIMIT ? (pos < LIMIT ? pos : LIMIT) : -LIMIT;
    cell = int32_t(held);
    cell -= held < T(cell);
    f = held - T(cell) + (pos - pos);  // infinite or NaN: NaN
  } else {
    cell = int32_t(pos < scale ? pos : scale - T(1));  // NaN: the last
    f = pos - T(cell);
  }
  if (!smoothstep) return {uint32_t(cell), f, scale, T(0)};
  return {uint32_t(cell), f * f * (T(3) - T(2) * f), scale * T(6) * f * (T(1) - f),
          scale * scale * (T(6) - T(12) * f)};
}

// The gradient of sum_c s_c w_c by the three weights; s: the corners' values, bit 0 of c is x.
template <class T> DF_HD vec3<T> hash_weight_gradient(const T* s, T wx, T wy, T wz) {
  const T y0 = s[0] + wx * (s[1] - s[0]), y1 = s[2] + wx * (s[3] - s[2]);  // z = 0
  const T y2 = s[4] + wx * (s[5] - s[4]), y3 = s[6] + wx * (s[7] - s[6]);  // z = 1
  const T d0 = s[1] - s[0], d1 = s[3] - s[2], d2 = s[5] - s[4], d3 = s[7] - s[6];
  const T x0 = d0 + wy * (d1 - d0), x1 = d2 + wy * (d3 - d2);
  const T z0 = y0 + wy * (y1 - y0), z1 = y2 + wy * (y3 - y2);
  const T e0 = y1 - y0, e1 = y3 - y2;
  return {x0 + wz * (x1 - x0), e0 + wz * (e1 - e0), z1 - z0};
}

// Its mixed second derivatives: by y and z (x), by x and z (y), by x and y (z).
template <class T> DF_HD vec3<T> hash_weight_mixed(const T* s, T wx, T wy, T wz) {
  const T d0 = s[1] - s[0], d1 = s[3] - s[2], d2 = s[5] - s[4], d3 = s[7] - s[6];
  const T x0 = d0 + wy * (d1 - d0), x1 = d2 + wy * (d3 - d2);
  const T e0 = s[2] - s[0] + wx * (d1 - d0), e1 = s[6] - s[4] + wx * (d3 - d2);
  return {e1 - e0, x1 - x0, d1 - d0 + wz * ((d3 - d2) - (d1 - d0))};
}

// The derivative along v of (slope_x f_x, slope_y f_y, slope_z f_z), with f_x.. the gradient by the
// weights and m.. the mixed derivatives.
template <class T>
DF_HD vec3<T> hash_hessian_times(vec3<T> v, vec3<T> slope, vec3<T> bend, vec3<T> f, vec3<T> m) {
  const vec3<T> w{v.x * slope.x, v.y * slope.y, v.z * slope.z};
  return {slope.x * (w.y * m.z + w.z * m.y) + v.x * bend.x * f.x,
          slope.y * (w.x * m.z + w.z * m.x) + v.y * bend.y * f.y,
          slope.z * (w.x * m.y + w.y * m.x) + v.z * bend.z * f.z};
}

// The tangent where it counts.
template <class T> DF_HD vec3<T> hash_tangent(vec3<T> x, vec3<T> v, bool staggered) {
  if (staggered) return v;
  return {hash_clamped(x.x) ? T(0) : v.x, hash_clamped(x.y) ? T(0) : v.y,
          hash_clamped(x.z) ? T(0) : v.z};
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(hash_encode_forward, HashEncodeArgs)
DF_DECLARE(hash_encode_backward, HashEncodeArgs)
DF_DECLARE(hash_encode_second, HashEncodeArgs)
