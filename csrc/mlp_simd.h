// Vector registers of the CPU's multilayer perceptron: loads, sums, and transposes of rows.
#pragma once

#include "mlp.h"

#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the machine's are never passed

namespace df {
namespace DF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T> struct Simd {
  typedef T vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef T quad __attribute__((vector_size(4 * sizeof(T))));
  static constexpr int lanes = VECTOR_BYTES / sizeof(T);
};
template <class T> using Vector = typename Simd<T>::vector;
template <class T> using Quad = typename Simd<T>::quad;

template <class V, class T> inline V load(const T* p) {
  typedef V Anywhere __attribute__((aligned(alignof(T)), may_alias));
  return *reinterpret_cast<const Anywhere*>(p);
}
template <class V, class T> inline void store(T* p, const V& v) {
  typedef V Anywhere __attribute__((aligned(alignof(T)), may_alias));
  *reinterpret_cast<Anywhere*>(p) = v;
}

template <class T> inline T sum(const Vector<T>& v) {
  T s[Simd<T>::lanes];
  store(s, v);
  for (int half = Simd<T>::lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
}

#if defined(__clang__) || __GNUC__ >= 12
// The sum of a vector's quarters, or halves.
template <class T> inline Quad<T> fold(const Vector<T>& v) {
  if constexpr (Simd<T>::lanes == 16) {
    const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
           __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  } else if constexpr (Simd<T>::lanes == 8) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  } else {
    return v;
  }
}
#endif

#if defined(__clang__) || __GNUC__ >= 12
// Shuffles within fours of lanes: lane k of each four of a, or, from 4 on, of b.
template <class T, int A, int B, int C, int D, int... I>
inline Vector<T> shuffle_fours(const Vector<T>& a, const Vector<T>& b,
                               std::integer_sequence<int, I...>) {
  constexpr int from[4] = {A, B, C, D}, lanes = Simd<T>::lanes;
  return __builtin_shufflevector(a, b, (I / 4 * 4 + from[I % 4] % 4 + from[I % 4] / 4 * lanes)...);
}
template <class T, int A, int B, int C, int D>
inline Vector<T> shuffle_fours(const Vector<T>& a, const Vector<T>& b) {
  return shuffle_fours<T, A, B, C, D>(a, b, std::make_integer_sequence<int, Simd<T>::lanes>());
}
// Their sums while they are transposed: lane k of a four holds that of vector k's four.
template <class T> inline Vector<T> sum_fours(const Vector<T>* v) {
  const auto pair = [](const Vector<T>& a, const Vector<T>& b) {
    return shuffle_fours<T, 0, 4, 1, 5>(a, b) + shuffle_fours<T, 2, 6, 3, 7>(a, b);
  };
  const Vector<T> ab = pair(v[0], v[1]), cd = pair(v[2], v[3]);
  return shuffle_fours<T, 0, 1, 4, 5>(ab, cd) + shuffle_fours<T, 2, 3, 6, 7>(ab, cd);
}
#endif

// to[k] += the sum of vector k, for four.
template <class T> inline void add_four_sums(const Vector<T>* v, T* to) {
#if defined(__clang__) || __GNUC__ >= 12
  if constexpr (Simd<T>::lanes >= 4)
    return store(to, load<Quad<T>>(to) + fold<T>(sum_fours<T>(v)));
#endif
  for (int k = 0; k < 4; ++k) to[k] += sum<T>(v[k]);
}

// out[c * out_stride + r] = in[r * in_stride + c] for a 4 x 4 square.
template <class T>
inline void transpose_square(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
#if defined(__clang__) || __GNUC__ >= 12
  using Q = typename Simd<T>::quad;
  const Q a = load<Q>(in), b = load<Q>(in + in_stride), c = load<Q>(in + 2 * in_stride),
          d = load<Q>(in + 3 * in_stride);
  const Q ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Q cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Q ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Q cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store<Q>(out, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
  store<Q>(out + out_stride, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
  store<Q>(out + 2 * out_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  store<Q>(out + 3 * out_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
#else
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) out[c * out_stride + r] = in[r * in_stride + c];
#endif
}
template <class T>
void transpose(const T* in, int64_t in_stride, int rows, int columns, T* out, int64_t out_stride) {
  const int whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int r = 0; r < whole_rows; r += 4)
    for (int c = 0; c < whole_columns; c += 4)
      transpose_square(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
  for (int r = 0; r < rows; ++r)
    for (int c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      out[c * out_stride + r] = in[r * in_stride + c];
}

}  // namespace
}  // namespace DF_ISA
}  // namespace df
