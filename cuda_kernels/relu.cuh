// ReLU and its slope. Exact, half included, but for float32 subnormals, which flush to zero: relu(x) and slope 0.
//
//   relu(x)  = x > 0 ? x : (x is NaN ? x : 0)       relu(NaN) = NaN, relu(-inf) = 0, relu(-0) = 0
//   relu'(x) = x > 0                                relu'(0) = 0, relu'(NaN) = 0
//
// The slope selects and does not multiply: an infinite or NaN cotangent does not leak from where it is 0.
// The sign of y = relu(x) is that of the slope, so backward may be given y in place of x.
#pragma once

#include "math.cuh"

namespace gpugrad {

template <class A> __device__ __forceinline__ A relu(A x) { return x > 0 ? x : x != x ? x : A(0); }
template <class A> __device__ __forceinline__ A relu_backward(A g, A x) { return x > 0 ? g : A(0); }

}  // namespace gpugrad
