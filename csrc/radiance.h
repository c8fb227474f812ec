// From a network's outputs to what is rendered (DreamFusion, Poole et al. 2022, section 3.1, A.2):
//   log sigma = min(out_0 + blob(p) + bias, ceiling),   values = sigmoid(out_1 ..), or out_1 ..;
// the blob begins a scene in the middle, "gaussian" (A.2) blob = lambda exp(-|p|^2 / (2 s^2)), or
// "cone" (Magic3D, Lin et al. 2023) blob = lambda (1 - |p| / s). Beside it, if the gradient of out_0
// by x = scale p + const is given, that of log sigma, without its ceiling, by p.
// Half (CUDA): out and its gradient only.
#pragma once

#include "common.h"

namespace df {

template <class T> struct RadianceArgs {
  const T* out;                     // (n, 1 + channels) of the network; forward only
  const Wide<T>* positions;         // (n, 3) p, scene units; forward only
  const Wide<T>* of_x;              // (n, 3) gradient of out_0 by x, or null; forward only
  const Wide<T>* grad_sigma;        // (n,) or null: zero; backward only, as the next two
  const Wide<T>* grad_values;       // (n, channels) or null
  const Wide<T>* grad_gradient;     // (n, 3) or null
  Wide<T>* sigma;                   // (n,) density, 1 / scene unit; read by backward
  Wide<T>* values;                  // (n, channels); read by backward
  Wide<T>* gradient;                // (n, 3) of log sigma by p, or null
  T* grad_out;                      // (n, 1 + channels); backward only
  Wide<T>* grad_of_x;               // (n, 3) or null; backward only
  const int32_t* count;             // (1,) number of valid rows, or null: all
  int64_t n;                        // rows
  int channels;                     // at least 1
  bool cone, raw;                   // blob; values without sigmoid
  double bias, ceiling;             // of log sigma
  double blob_density, blob_size;   // lambda and s
  double scale;                     // of x by p
};

inline namespace DF_ISA {

// The blob as the loops use it: exponent of the Gaussian, or slope of the cone.
template <class T> struct Blob { bool cone; T density, factor; };
template <class T, class A> DF_HD Blob<T> radiance_blob(const A& a) {
  return {a.cone, T(a.blob_density),
          a.cone ? T(-a.blob_density / a.blob_size) : T(-0.5 / (a.blob_size * a.blob_size))};
}
// Its gradient, given its value (Gaussian) and 1 / |p| (cone; 0 at the centre).
template <class T> DF_HD vec3<T> blob_gradient(const Blob<T>& b, vec3<T> p, T value, T inverse) {
  return (b.cone ? b.factor * inverse : 2 * b.factor * value) * p;
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(radiance_forward, RadianceArgs)
DF_DECLARE(radiance_backward, RadianceArgs)
