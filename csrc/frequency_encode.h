// Frequency encoding of NeRF (Mildenhall et al. 2020, eq. 4, without its factor pi), and its
// integrated form (mip-NeRF, Barron et al. 2021, eq. 14) for an isotropic Gaussian:
//   E[sin 2^l X] = w_l sin(2^l x),  E[cos 2^l X] = w_l cos(2^l x),  w_l = exp(-4^l variance / 2).
// Column l * dims + d holds the sine of coordinate d, column (L + l) * dims + d the cosine.
#pragma once

#include "common.h"

namespace df {

template <class T> struct FrequencyEncodeArgs {
  const T* x;               // (n, dims) coordinates, radians at l = 0
  const T* variance;        // (n,) variance of each coordinate, or null: 0
  const T* grad_out;        // (n, 2 * n_frequencies * dims) gradient of out; backward only
  T* out;                   // (n, 2 * n_frequencies * dims)
  T* grad_x;                // (n, dims); backward only
  T* grad_variance;         // (n,), or null without variance; backward only
  const int32_t* count;     // (1,) number of valid rows, or null: all
  int64_t n;                // rows
  int dims, n_frequencies;  // D >= 1, 1 <= L <= 24
};

inline namespace DF_ISA {

template <class T> DF_HD T frequency_scale(int l) { return T(int64_t(1) << l); }  // 2^l
template <class T> DF_HD T frequency_damping(T variance, T scale) {
  return std::exp(T(-0.5) * scale * scale * variance);
}
// Gradients of w s and w c (s, c: sine and cosine of scale * x) given gs and gc.
template <class T> DF_HD T frequency_grad_x(T scale, T w, T s, T c, T gs, T gc) {
  return scale * (w * (gs * c - gc * s));
}
template <class T> DF_HD T frequency_grad_variance(T scale, T w, T s, T c, T gs, T gc) {
  return T(-0.5) * scale * scale * (w * (gs * s + gc * c));
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(frequency_encode_forward, FrequencyEncodeArgs)
DF_DECLARE(frequency_encode_backward, FrequencyEncodeArgs)
