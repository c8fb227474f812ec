// What mlp_half.h is made of: pieces of matrices for tensor cores (mma_16x8x16, see gpu.h).
//
// Everything comes in groups of 16 features, of which lane
// (g, t) = (lane / 4, lane % 4) owns features 4t to 4t + 3 of rows g and g + 8: a Fragment. As mma
// sums over its k in any order, a Fragment is an operand a as it stands, if b takes k in the same
// order; and the mma's results form a Fragment again if b's columns are chosen for it. So forward
// keeps values in registers from layer to layer, and reads and writes 8 bytes at a time.
//
// Rows in shared memory are an odd multiple of 8 words apart, so that no access here has bank
// conflicts; rows of weights stand in the order of slot_of() for the same reason.
#pragma once

#include "gpu.h"
#include "mlp.h"

namespace df {
namespace DF_ISA {
namespace {

struct Fragment { uint32_t r[4]; };  // (row g, g + 8; features 4t, 4t + 1), (.. 4t + 2, 4t + 3)

struct Lane {
  int g = lane_id() / 4, t = lane_id() % 4;
};

// Where feature f's row of weights stands. For a lane (g, t): output 4 (g / 2) + g % 2 + 2 i, its
// column of b forward, in row 8 i + forward_slot; output 4 t + i, its k back, in backward_slot(i).
__device__ inline int slot_of(int f) {
  return f / 16 * 16 + 4 * (f % 4) + ((f % 16 / 4 + 2 * (f & 1)) & 3);
}
__device__ inline int forward_slot(Lane lane) { return slot_of(4 * (lane.g / 2) + lane.g % 2); }
__device__ inline int backward_slot(Lane lane, int i) { return slot_of(4 * lane.t + i); }

template <class To, class From> __device__ inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
__device__ inline uint32_t pack(float low, float high) {
  return bits_of<uint32_t>(__floats2half2_rn(low, high));
}
__device__ inline float2 unpack(uint32_t x) { return __half22float2(bits_of<half2>(x)); }
__device__ inline uint32_t lows(uint32_t x, uint32_t y) { return (x & 0xffffu) | y << 16; }
__device__ inline uint32_t highs(uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); }

__device__ inline uint32_t word(const half* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ inline uint2& words(half* p) { return *reinterpret_cast<uint2*>(p); }
__device__ inline const uint2& words(const half* p) { return *reinterpret_cast<const uint2*>(p); }

// Four numbers of a row of `width` in global memory, zero beyond. whole: as 8 bytes.
__device__ inline bool is_whole(const half* p, int width) {
  return width % 4 == 0 && reinterpret_cast<uintptr_t>(p) % 8 == 0;
}
__device__ inline uint2 load4(const half* row, int column, int width, bool whole) {
  if (whole) return column < width ? words(row + column) : uint2{0, 0};
  const uint16_t* const p = reinterpret_cast<const uint16_t*>(row) + column;
  uint32_t x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = column + i < width ? p[i] : 0;
  return {x[0] | x[1] << 16, x[2] | x[3] << 16};
}
__device__ inline void store4(half* row, int column, int width, bool whole, uint2 x) {
  if (whole) {
    if (column < width) words(row + column) = x;
    return;
  }
  uint16_t* const p = reinterpret_cast<uint16_t*>(row) + column;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (column + i < width) p[i] = uint16_t((i < 2 ? x.x : x.y) >> (i % 2 * 16));
}
// Rows `row` and `row + 8` of (n, width), from the valid ones on zero; columns from `column`.
__device__ inline Fragment load_rows(const half* p, int64_t row, int64_t valid, int column,
                                     int width, bool whole) {
  uint2 x[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (row + 8 * i < valid) x[i] = load4(p + (row + 8 * i) * width, column, width, whole);
  return {{x[0].x, x[1].x, x[0].y, x[1].y}};
}
__device__ inline void store_rows(half* p, int64_t row, int64_t valid, int64_t n, int column,
                                  int width, bool whole, const Fragment& f) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (row + 8 * i < n)
      store4(p + (row + 8 * i) * width, column, width, whole,
             row + 8 * i < valid ? uint2{f.r[i], f.r[2 + i]} : uint2{0, 0});
}
// The same in shared memory; p: the lane's own place in row g.
__device__ inline Fragment load_shared(const half* p, int stride) {
  const uint2 low = words(p), high = words(p + 8 * stride);
  return {{low.x, high.x, low.y, high.y}};
}
__device__ inline void store_shared(half* p, int stride, const Fragment& f) {
  words(p) = {f.r[0], f.r[2]};
  words(p + 8 * stride) = {f.r[1], f.r[3]};
}

// ---- a group of 16 features of a Fragment's rows, in float: acc[i] from mma number i ------------
// Forward acc[i] holds features 4t + 2i, 4t + 2i + 1; backward 4t + i, 4t + 2 + i.
using Sums = float[2][4];

__device__ inline void start(Sums& acc, const float* bias, Lane lane) {  // bias: 16, or null
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 b = bias ? *reinterpret_cast<const float2*>(bias + 4 * lane.t + 2 * i)
                          : make_float2(0, 0);
    acc[i][0] = acc[i][2] = b.x;
    acc[i][1] = acc[i][3] = b.y;
  }
}
// acc += a w^T for M fragments; w: the corner of 16 outputs x 16 inputs.
template <int M>
__device__ inline void forward_step(Sums (&acc)[M], const Fragment (&a)[M], const half* w,
                                    int stride, Lane lane) {
  w += forward_slot(lane) * stride + 4 * lane.t;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint2 pair = words(w + 8 * i * stride);
    const uint32_t b[2] = {pair.x, pair.y};
#pragma unroll
    for (int m = 0; m < M; ++m) mma_16x8x16(acc[m][i], a[m].r, b);
  }
}
// acc += a w.
__device__ inline void backward_step(Sums& acc, const Fragment& a, const half* w, int stride,
                                     Lane lane) {
  uint32_t x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = word(w + backward_slot(lane, i) * stride + 2 * lane.g);
  const uint32_t even[2] = {lows(x[0], x[1]), lows(x[2], x[3])};
  const uint32_t odd[2] = {highs(x[0], x[1]), highs(x[2], x[3])};
  mma_16x8x16(acc[0], a.r, even);
  mma_16x8x16(acc[1], a.r, odd);
}
// acc += g^T h over all rows, for a square of 16 outputs x 16 inputs; h null: a column of ones.
// acc[i] then holds outputs 2g (first half) and 2g + 1 of inputs 4t + i, 4t + 2 + i.
__device__ inline void product_step(Sums& acc, const half* g, int g_stride, const half* h,
                                    int h_stride, int rows, Lane lane) {
  const uint32_t one = lane.g == 0 ? 0x3c00u : 0;
  for (int r = lane.t; r < rows; r += 16) {
    uint32_t x[4], y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = word(g + (r + 4 * i) * g_stride + 2 * lane.g);
      y[i] = h ? word(h + (r + 4 * i) * h_stride + 2 * lane.g) : one;
    }
    const uint32_t a[4] = {lows(x[0], x[1]), highs(x[0], x[1]), lows(x[2], x[3]),
                           highs(x[2], x[3])};
    const uint32_t even[2] = {lows(y[0], y[1]), lows(y[2], y[3])};
    const uint32_t odd[2] = {highs(y[0], y[1]), highs(y[2], y[3])};
    mma_16x8x16(acc[0], a, even);
    mma_16x8x16(acc[1], a, odd);
  }
}

// The values of a forward group through the activation; slope: silu's, if wanted.
__device__ inline Fragment activate(const Sums& acc, bool silu, Fragment* slope) {
  Fragment h;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float z[2] = {acc[i / 2][i % 2 * 2], acc[i / 2][i % 2 * 2 + 1]};
    if (silu) {
      const float e[2] = {expf(-z[0]), expf(-z[1])};
      h.r[i] = pack(mlp_silu(z[0], e[0]), mlp_silu(z[1], e[1]));
      if (slope) slope->r[i] = pack(mlp_silu_slope(z[0], e[0]), mlp_silu_slope(z[1], e[1]));
    } else {
      h.r[i] = pack(mlp_relu(z[0]), mlp_relu(z[1]));
    }
  }
  return h;
}
__device__ inline Fragment as_output(const Sums& acc) {  // of a forward group
  return {{pack(acc[0][0], acc[0][1]), pack(acc[0][2], acc[0][3]), pack(acc[1][0], acc[1][1]),
           pack(acc[1][2], acc[1][3])}};
}
// The gradient before the activation, of a backward group.
__device__ inline Fragment activate_backward(const Sums& acc, bool silu, const Fragment& h) {
  Fragment g;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int high = i % 2 * 2, second = i / 2;
    const float z[2] = {acc[0][high + second], acc[1][high + second]};
    const float2 s = unpack(h.r[i]);
    g.r[i] = silu ? pack(z[0] * s.x, z[1] * s.y)
                  : pack(mlp_relu_backward(s.x, z[0]), mlp_relu_backward(s.y, z[1]));
  }
  return g;
}
__device__ inline Fragment as_fragment(const Sums& acc) {  // of a backward group
  return {{pack(acc[0][0], acc[1][0]), pack(acc[0][2], acc[1][2]), pack(acc[0][1], acc[1][1]),
           pack(acc[0][3], acc[1][3])}};
}

}  // namespace
}  // namespace DF_ISA
}  // namespace df
