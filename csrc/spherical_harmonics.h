// Real spherical harmonics in the order and with the signs of instant-ngp / tiny-cuda-nn.
//
// Component l * l + l + m (0 <= l < DEGREE, -l <= m <= l) of a direction (x, y, z) is
//   q_lm(z) * Re (x + iy)^m  for m >= 0,    q_l|m|(z) * Im (x + iy)^|m|  for m < 0,
// where q_lm is the normalised associated Legendre polynomial divided by (1 - z^2)^(m/2), with the
// Condon-Shortley sign (-1)^m. It comes from the three-term recurrence
//   q_lm = a_lm (z q_(l-1)m - b_lm q_(l-2)m),
//   a_lm^2 = (4 l^2 - 1) / (l^2 - m^2),   b_lm^2 = ((l - 1)^2 - m^2) / (4 (l - 1)^2 - 1).
// A polynomial in the vector as given: nothing is normalised here.
#pragma once

#include "common.h"

namespace df {

template <class T> struct SphericalHarmonicsArgs {
  const T* dirs;         // (n, 3) directions, unit length expected
  const T* grad_out;     // (n, degree^2) gradient of out; backward only
  T* out;                // (n, degree^2) components
  T* grad_dirs;          // (n, 3) gradient of dirs; backward only
  const int32_t* count;  // (1,) number of valid rows, or null: all
  int64_t n;             // rows
  int degree;            // 1..8
};

inline namespace DF_ISA {

constexpr double sh_sqrt(double x) {  // Newton's iteration, at compile time
  double r = x > 1 ? x : 1;
  for (int i = 0; i < 40; ++i) r = 0.5 * (r + x / r);
  return x > 0 ? r : 0;
}
constexpr double sh_diagonal(int m) {  // q_mm
  double v = (2 * m + 1) / (4 * 3.14159265358979323846) * (m > 0 ? 2 : 1);
  for (int k = 1; k <= m; ++k) v *= (2.0 * k - 1) / (2.0 * k);
  return (m % 2 ? -1 : 1) * sh_sqrt(v);
}
template <int L, int M> struct ShStep {  // static members, for nvcc reads them as constants
  static constexpr double a = sh_sqrt((4.0 * L * L - 1) / (L * L - M * M));
  static constexpr double b =
      sh_sqrt(((L - 1.0) * (L - 1) - M * M) / (4.0 * (L - 1) * (L - 1) - 1));
  static constexpr double ab = a * b;
};
template <int M> struct ShDiagonal { static constexpr double q = sh_diagonal(M); };

// Order m, degrees L..DEGREE-1, with c + is = (x + iy)^m, q = q_Lm and p = q_(L-1)m.
template <int DEGREE, int M, int L, class T>
DF_HD void sh_column(T z, T c, T s, T q, T p, T* out) {
  out[L * L + L + M] = q * c;
  if constexpr (M > 0) out[L * L + L - M] = q * s;
  if constexpr (L + 1 < DEGREE) {
    const T a = T(ShStep<L + 1, M>::a), ab = T(ShStep<L + 1, M>::ab);
    sh_column<DEGREE, M, L + 1>(z, c, s, a * z * q - ab * p, q, out);
  }
}
template <int DEGREE, int M = 0, class T>
DF_HD void sh_forward(vec3<T> v, T* out, T c = T(1), T s = T(0)) {
  sh_column<DEGREE, M, M>(v.z, c, s, T(ShDiagonal<M>::q), T(0), out);
  if constexpr (M == 0 && DEGREE > 1)
    sh_forward<DEGREE, 1>(v, out, v.x, v.y);
  else if constexpr (M + 1 < DEGREE)
    sh_forward<DEGREE, M + 1>(v, out, v.x * c - v.y * s, v.x * s + v.y * c);
}

// The same column, backward: adds to the gradients of c, s and z; dq and dp are d/dz of q and p.
// What is known to be 0 or 1 is left out by hand: x + 0 and 0 x are not x and 0 to a compiler,
// which thinks of -0 and infinity.
template <int DEGREE, int M, int L, class T>
DF_HD void sh_column_backward(T z, T c, T s, T q, T p, T dq, T dp, const T* g, T& gc, T& gs,
                              T& gz) {
  const T gp = g[L * L + L + M];
  if constexpr (M > 0) {  // c and s of M = 0 are constants
    const T gm = g[L * L + L - M];
    gc = L > M ? gc + gp * q : gp * q;
    gs = L > M ? gs + gm * q : gm * q;
    if constexpr (L > M) gz += (gp * c + gm * s) * dq;
  } else if constexpr (L > 0) {
    gz = L > 1 ? gz + gp * dq : gp * dq;
  }
  if constexpr (L + 1 < DEGREE) {
    const T a = T(ShStep<L + 1, M>::a), ab = T(ShStep<L + 1, M>::ab);
    T next = a * q;
    if constexpr (L > M) next = a * (q + z * dq);
    if constexpr (L > M + 1) next -= ab * dp;
    sh_column_backward<DEGREE, M, L + 1>(z, c, s, a * z * q - ab * p, q, next, dq, g, gc, gs, gz);
  }
}
// c0 + i s0 = (x + iy)^(M-1): d(x + iy)^M/dx = M (c0 + i s0), and d/dy is i times that.
template <int DEGREE, int M, class T>
DF_HD void sh_order_backward(vec3<T> v, const T* g, T c, T s, T c0, T s0, vec3<T>& d) {
  T gc, gs;
  sh_column_backward<DEGREE, M, M>(v.z, c, s, T(ShDiagonal<M>::q), T(0), T(0), T(0), g, gc, gs,
                                   d.z);
  if constexpr (M == 1) {
    d.x = gc;
    d.y = gs;
  } else {
    d.x += T(M) * (gc * c0 + gs * s0);
    d.y += T(M) * (gs * c0 - gc * s0);
  }
  if constexpr (M + 1 < DEGREE)
    sh_order_backward<DEGREE, M + 1>(v, g, v.x * c - v.y * s, v.x * s + v.y * c, c, s, d);
}
template <int DEGREE, class T> DF_HD vec3<T> sh_backward(vec3<T> v, const T* g) {
  vec3<T> d{0, 0, 0};
  T gc, gs;
  sh_column_backward<DEGREE, 0, 0>(v.z, T(1), T(0), T(ShDiagonal<0>::q), T(0), T(0), T(0), g, gc,
                                   gs, d.z);
  if constexpr (DEGREE > 1) sh_order_backward<DEGREE, 1>(v, g, v.x, v.y, T(1), T(0), d);
  return d;
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(spherical_harmonics_forward, SphericalHarmonicsArgs)
DF_DECLARE(spherical_harmonics_backward, SphericalHarmonicsArgs)
