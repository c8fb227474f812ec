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
  if constexpr (M + 1 < DEGREE)
    sh_forward<DEGREE, M + 1>(v, out, v.x * c - v.y * s, v.x * s + v.y * c);
}

// The same column, backward: adds to the gradients of c, s and z; dq and dp are d/dz of q and p.
template <int DEGREE, int M, int L, class T>
DF_HD void sh_column_backward(T z, T c, T s, T q, T p, T dq, T dp, const T* g, T& gc, T& gs,
                              T& gz) {
  const T gp = g[L * L + L + M], gm = M > 0 ? g[L * L + L - M] : T(0);
  gc += gp * q;
  gs += gm * q;
  gz += (gp * c + gm * s) * dq;
  if constexpr (L + 1 < DEGREE) {
    const T a = T(ShStep<L + 1, M>::a), ab = T(ShStep<L + 1, M>::ab);
    sh_column_backward<DEGREE, M, L + 1>(z, c, s, a * z * q - ab * p, q,
                                         a * (q + z * dq) - ab * dp, dq, g, gc, gs, gz);
  }
}
// c0 + i s0 = (x + iy)^(M-1): d(x + iy)^M/dx = M (c0 + i s0), and d/dy is i times that.
template <int DEGREE, int M = 0, class T>
DF_HD vec3<T> sh_backward(vec3<T> v, const T* g, T c = T(1), T s = T(0), T c0 = T(0), T s0 = T(0)) {
  T gc = 0, gs = 0, gz = 0;
  sh_column_backward<DEGREE, M, M>(v.z, c, s, T(ShDiagonal<M>::q), T(0), T(0), T(0), g, gc, gs, gz);
  const vec3<T> d{T(M) * (gc * c0 + gs * s0), T(M) * (gs * c0 - gc * s0), gz};
  if constexpr (M + 1 < DEGREE)
    return d + sh_backward<DEGREE, M + 1>(v, g, v.x * c - v.y * s, v.x * s + v.y * c, c, s);
  else
    return d;
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(spherical_harmonics_forward, SphericalHarmonicsArgs)
DF_DECLARE(spherical_harmonics_backward, SphericalHarmonicsArgs)
