// Adam (Kingma and Ba 2015, algorithm 1), fused and in place. A non-finite gradient anywhere in the
// tensor skips the whole update: decided and counted on the device, without a sync.
#pragma once

#include "common.h"

namespace df {

constexpr int ADAM_FACTORS = 8;  // numbers in AdamFactors

template <class T> struct AdamArgs {
  T* param;          // (n,) parameters
  const T* grad;     // (n,) gradients, grad_scale * loss_scale times too large
  T* exp_avg;        // (n,) running mean of the gradient
  T* exp_avg_sq;     // (n,) running mean of its square
  void* step;        // (1,) int32 or int64, number of updates made
  int32_t* skipped;  // (1,) number of updates skipped
  const float* rate;  // (1,) factor of lr, or null: what a captured graph may change between replays
  const float* loss_scale;  // (1,) factor of grad_scale, or null: likewise
  void* param_half;  // (n,) float16 copy of the new parameters, or null; CUDA only
  int32_t* found;    // (1,) scratch on CUDA: is any gradient not finite
  T* factors;        // (ADAM_FACTORS,) scratch on CUDA: AdamFactors of this update
  bool step_is_int64;
  int64_t n;
  double lr, beta1, beta2, eps, grad_scale;
};

inline namespace DF_ISA {

template <class T> struct AdamFactors {  // what an update's elements have in common
  T beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_correction2, eps, unscale;
};
template <class T> DF_HD AdamFactors<T> adam_factors(const AdamArgs<T>& a, int64_t step) {
  const double lr = a.rate ? a.lr * double(*a.rate) : a.lr;
  const double scale = a.loss_scale ? a.grad_scale * double(*a.loss_scale) : a.grad_scale;
  return {T(a.beta1), T(1 - a.beta1), T(a.beta2), T(1 - a.beta2),
          T(lr / (1 - std::pow(a.beta1, double(step)))),
          T(1 / std::sqrt(1 - std::pow(a.beta2, double(step)))), T(a.eps), T(1 / scale)};
}
template <class T>
DF_HD void adam_element(const AdamFactors<T>& f, T& param, T grad, T& exp_avg, T& exp_avg_sq) {
  const T g = grad * f.unscale;
  exp_avg = f.beta1 * exp_avg + f.one_minus_beta1 * g;
  exp_avg_sq = f.beta2 * exp_avg_sq + f.one_minus_beta2 * g * g;
  param -= f.step_size * exp_avg / (std::sqrt(exp_avg_sq) * f.rsqrt_correction2 + f.eps);
}

}  // inline namespace DF_ISA
}  // namespace df

DF_DECLARE(adam_step, AdamArgs)
