// Swish, x * sigma(beta * x), and its slopes (Ramachandran, Zoph & Le 2017; beta = 1 is SiLU).
//
//   z = beta * x;  s = sigma(z);  c = sigma(-z)
//   swish    = x * s                     -0 at x = -inf (beta > 0)
//   d/dx     = s * (1 + z * c)           1 at z = inf, 0 at z = -inf; greatest slope 1.0998 at z = 2.3994
//   d/dbeta  = (x * s) * (x * c)         0 at both infinities; x*x*s*(1-s) would overflow and lose the tail
//
// NaN in, NaN out. Relative error for |x| <= 85 with a well rounded exponential, float / double (half: 1 ulp): value
// 2e-7 / 3.5e-16, d/dx 8e-7 / 1.5e-15 (absolute 2e-7 / 4e-16 near its root z = -1.2784645428), d/dbeta 3e-7 / 6e-16.
// With one that is off by the most CUDA documents (2 ulp, 1 ulp): value 4.2e-7 / 5e-16, d/dbeta 6e-7 / 9e-16.
// float32 subnormals flush to zero: where |z| > 87.3 the smaller tail is 0, and with it the value and d/dx (z < 0) and
// d/dbeta; products that fall below 1.2e-38 are 0 too.
#pragma once

#include "math.cuh"

namespace gpugrad {

template <class A> __device__ __forceinline__ A swish(A x, A s) {
  return s == 0 ? copysign(A(0), x) : x * s;  // -inf * 0 would be NaN
}
template <class A> __device__ __forceinline__ A swish_dx(A z, const Sigmoid<A>& of) {
  return of.s * (1 + (is_infinite(z) ? A(0) : z) * of.c);
}
template <class A> __device__ __forceinline__ A swish_dbeta(A x, const Sigmoid<A>& of) {
  const A v = is_infinite(x) ? A(0) : x;  // where the factor beside it has reached 0
  return (v * of.s) * (v * of.c);
}

// What forward may keep for backward: m = sigma(-|z|), the smaller of s and c. The other is 1 - m to half an ulp, so
// that both tails survive, which keeping s itself would not allow.
template <class A> __device__ __forceinline__ A kept(A z, const Sigmoid<A>& of) { return z >= 0 ? of.c : of.s; }
template <class A> __device__ __forceinline__ Sigmoid<A> from_kept(A z, A m) {
  return z >= 0 ? Sigmoid<A>(1 - m, m) : Sigmoid<A>(m, 1 - m);
}

}  // namespace gpugrad
