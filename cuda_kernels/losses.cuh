// Losses of one row and their slopes in the prediction, in one pass over the data.
//
//   squared error   l = (eta - y)^2                                    dl/deta = 2 (eta - y)
//   logistic loss   l = softplus(eta) - y * eta, 0 <= y <= 1           dl/deta = sigma(eta) - y
//
// The logistic loss is softplus(eta) at y = 0 and softplus(-eta) at y = 1, with slopes sigma(eta) and -sigma(-eta): no
// digit is lost however sure the model is, and eta = inf, y = 1 costs 0. softplus(z) = max(z, 0) + log1p(exp(-|z|)).
// Relative error, float / double (half: 1 ulp): squared error 2e-7 / 4e-16 of the rounded difference; logistic loss
// and slope for y in {0, 1} 3e-7 / 5e-16, or 5e-7 / 7e-16 with exp and log1p off by the most CUDA documents; for
// fractional y absolute 2e-7 / 4e-16 (4e-7 / 5e-16) times max(1, |eta|).
#pragma once

#include "math.cuh"

namespace gpugrad {

template <class A> __device__ __forceinline__ void squared_error(A eta, A y, A& loss, A& slope) {
  const A r = eta - y;
  loss = r * r;
  slope = 2 * r;
}

template <class A> __device__ __forceinline__ void logistic_loss(A eta, A y, A& loss, A& slope) {
  const bool sure = y == 0 || y == 1;
  const A z = y == 1 ? -eta : eta, tail = log1p_(exponential(-magnitude(z)));
  const Sigmoid<A> of(eta);
  loss = (z > 0 ? z : A(0)) + tail - (sure ? A(0) : y * eta);
  slope = y == 1 ? -of.c : of.s - y;
}

}  // namespace gpugrad
