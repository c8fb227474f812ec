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
  const T* grad_out;        // (n, 2 * n_frequencies * dims) gradient of out; backward and second
  const T* u;               // (n, dims) gradient of backward's grad_x, or null: 0; second only
  const T* q;               // (n,) gradient of backward's grad_variance, or null: 0; second only
  T* out;                   // (n, 2 * n_frequencies * dims)
  T* grad_grad_out;         // (n, 2 * n_frequencies * dims), or null if unwanted; second only
  T* grad_x;                // (n, dims); backward, and second: null if unwanted
  T* grad_variance;         // (n,), or null if unwanted or without variance; backward and second
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
// Gradients of u frequency_grad_x + q frequency_grad_variance: one angle's share of second.
template <class T> struct FrequencySecond { T gs, gc, x, variance; };
template <class T>
DF_HD FrequencySecond<T> frequency_second(T scale, T w, T s, T c, T gs, T gc, T u, T q) {
  const T half_square = T(-0.5) * scale * scale, a = w * (scale * u), b = w * (half_square * q);
  const T along = gs * s + gc * c, across = gs * c - gc * s;
  return {a * c + b * s, b * c - a * s, scale * (b * across - a * along),
          half_square * (a * across + b * along)};
}

// x less the nearest multiple of pi / 2, which comes in three parts (Cody, Waite); |x| < LIMIT.
// Where a machine has no fma, it is slow.
template <class T> struct Reduction;
template <> struct Reduction<float> {
  static constexpr float LIMIT = 0x1p16f;
  static constexpr float A = 0x1.921fb0p+0f, B = 0x1.5110b4p-22f, C = 0x1.846988p-48f;
};
template <> struct Reduction<double> {
  static constexpr double LIMIT = 0x1p30;
  static constexpr double A = 0x1.921fb54442d18p+0, B = 0x1.1a62633145c07p-54,
                          C = -0x1.f1976b7ed8fbcp-110;
};
template <class T> DF_HD T reduce(T x, int32_t& quadrant) {
  using R = Reduction<T>;
  const T n = std::rint(x * T(0.63661977236758134308));
  quadrant = int32_t(n);
  return std::fma(-n, R::C, std::fma(-n, R::B, std::fma(-n, R::A, x)));
}

// x with its sign changed where bit 1 of quadrant is set; as bits: the fewest operations.
DF_HD float flip_sign(float x, int32_t quadrant) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits ^= uint32_t(quadrant) << 30 & 0x80000000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Sine and cosine of r + quadrant pi / 2, |r| <= pi / 4, to 2 ulp of 1 (polynomials: Cephes sinf,
// cosf). No branches.
DF_HD void quadrant_sine_cosine(float r, int32_t quadrant, float& s, float& c) {
  const float r2 = r * r;
  const float sine =
      r + r * r2 * (-1.6666654611e-1f + r2 * (8.3321608736e-3f - r2 * 1.9515295891e-4f));
  const float cosine = 1.0f + r2 *
      (-0.5f + r2 * (4.1666645683e-2f + r2 * (-1.3887316255e-3f + r2 * 2.4433157118e-5f)));
  s = flip_sign(quadrant & 1 ? cosine : sine, quadrant);
  c = flip_sign(quadrant & 1 ? sine : cosine, quadrant + 1);
}
// The same in double (Cephes sin, cos).
DF_HD void quadrant_sine_cosine(double r, int32_t quadrant, double& s, double& c) {
  const double z = r * r;
  double p = 1.58962301576546568060e-10, q = -1.13585365213876817300e-11;
  p = p * z - 2.50507477628578072866e-8, q = q * z + 2.08757008419747316778e-9;
  p = p * z + 2.75573136213857245213e-6, q = q * z - 2.75573141792967388112e-7;
  p = p * z - 1.98412698295895385996e-4, q = q * z + 2.48015872888517045348e-5;
  p = p * z + 8.33333333332211858878e-3, q = q * z - 1.38888888888730564116e-3;
  p = p * z - 1.66666666666666307295e-1, q = q * z + 4.16666666666665929218e-2;
  const double sine = r + r * z * p, cosine = 1 - 0.5 * z + z * z * q;
  const double a = quadrant & 1 ? cosine : sine, b = quadrant & 1 ? sine : cosine;
  s = quadrant & 2 ? -a : a;
  c = (quadrant + 1) & 2 ? -b : b;
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(frequency_encode_forward, FrequencyEncodeArgs)
DF_DECLARE(frequency_encode_backward, FrequencyEncodeArgs)
DF_DECLARE(frequency_encode_second, FrequencyEncodeArgs)
