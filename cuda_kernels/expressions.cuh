// The operations on one element from which gpugrad/compile writes kernels, under their names there; what is said of
// NaN, infinities and types is NumPy's.
//
// float and double: rounded as CUDA documents for expf, log1pf and so on (1 to 2 ulp; + - * / sqrt correctly, where no
// multiply-add is contracted). maximum and minimum give NaN for a NaN on either side; sign(NaN) is NaN. Integers wrap
// around. half is computed in float, so it has no functions of its own. float32 subnormals flush to zero.
// `round_half` (a cast to half) is there where cuda_fp16.h has been included before.
#pragma once

#include "math.cuh"

namespace gpugrad {
namespace scalar {

// What integers are computed in: types without a sign, as overflow is undefined with one, and no narrower than int.
template <class T> struct wrapping { using type = T; };
template <> struct wrapping<signed char> { using type = unsigned; };
template <> struct wrapping<unsigned char> { using type = unsigned; };
template <> struct wrapping<short> { using type = unsigned; };
template <> struct wrapping<unsigned short> { using type = unsigned; };
template <> struct wrapping<int> { using type = unsigned; };
template <> struct wrapping<long long> { using type = unsigned long long; };
template <class T> using wrap = typename wrapping<T>::type;

#define GPUGRAD_OPERATION template <class T> __device__ __forceinline__

GPUGRAD_OPERATION T add(T x, T y) { return T(wrap<T>(x) + wrap<T>(y)); }
GPUGRAD_OPERATION T sub(T x, T y) { return T(wrap<T>(x) - wrap<T>(y)); }
GPUGRAD_OPERATION T mul(T x, T y) { return T(wrap<T>(x) * wrap<T>(y)); }
GPUGRAD_OPERATION T div(T x, T y) { return x / y; }
GPUGRAD_OPERATION T neg(T x) { return T(-wrap<T>(x)); }
GPUGRAD_OPERATION T abs(T x) { return x < 0 ? neg(x) : x; }
GPUGRAD_OPERATION T sign(T x) { return x != x ? x : T(T(x > 0) - T(x < 0)); }
GPUGRAD_OPERATION T maximum(T x, T y) { return x != x || x > y ? x : y; }
GPUGRAD_OPERATION T minimum(T x, T y) { return x != x || x < y ? x : y; }
GPUGRAD_OPERATION bool lt(T x, T y) { return x < y; }
GPUGRAD_OPERATION bool le(T x, T y) { return x <= y; }
GPUGRAD_OPERATION bool gt(T x, T y) { return x > y; }
GPUGRAD_OPERATION bool ge(T x, T y) { return x >= y; }
GPUGRAD_OPERATION bool eq(T x, T y) { return x == y; }
GPUGRAD_OPERATION bool ne(T x, T y) { return x != y; }
GPUGRAD_OPERATION bool isnan(T x) { return x != x; }
GPUGRAD_OPERATION bool isfinite(T x) { return T(x - x) == 0; }
GPUGRAD_OPERATION T where(bool condition, T x, T y) { return condition ? x : y; }

__device__ __forceinline__ float abs(float x) { return fabsf(x); }
__device__ __forceinline__ double abs(double x) { return fabs(x); }
__device__ __forceinline__ bool abs(bool x) { return x; }

#define GPUGRAD_FUNCTION(name)                                               \
  __device__ __forceinline__ float name(float x) { return ::name##f(x); }    \
  __device__ __forceinline__ double name(double x) { return ::name(x); }
GPUGRAD_FUNCTION(sqrt)
GPUGRAD_FUNCTION(exp)
GPUGRAD_FUNCTION(expm1)
GPUGRAD_FUNCTION(log)
GPUGRAD_FUNCTION(log1p)
GPUGRAD_FUNCTION(log2)
GPUGRAD_FUNCTION(log10)
GPUGRAD_FUNCTION(sin)
GPUGRAD_FUNCTION(cos)
GPUGRAD_FUNCTION(tan)
GPUGRAD_FUNCTION(asin)
GPUGRAD_FUNCTION(acos)
GPUGRAD_FUNCTION(atan)
GPUGRAD_FUNCTION(sinh)
GPUGRAD_FUNCTION(cosh)
GPUGRAD_FUNCTION(tanh)
GPUGRAD_FUNCTION(floor)
#undef GPUGRAD_FUNCTION

#define GPUGRAD_FUNCTION(name)                                                              \
  __device__ __forceinline__ float name(float x, float y) { return ::name##f(x, y); }       \
  __device__ __forceinline__ double name(double x, double y) { return ::name(x, y); }
GPUGRAD_FUNCTION(pow)
GPUGRAD_FUNCTION(atan2)
GPUGRAD_FUNCTION(hypot)
GPUGRAD_FUNCTION(copysign)
#undef GPUGRAD_FUNCTION

GPUGRAD_OPERATION T logaddexp(T x, T y) {
  if (x == y) return x + T(0.6931471805599453);  // of two equal infinities too
  const T d = x - y;
  return d > 0 ? x + log1p(exp(-d)) : d <= 0 ? y + log1p(exp(d)) : d;
}

#undef GPUGRAD_OPERATION

__device__ __forceinline__ bool both(bool x, bool y) { return x && y; }    // and
__device__ __forceinline__ bool either(bool x, bool y) { return x || y; }  // or
__device__ __forceinline__ bool opposite(bool x) { return !x; }            // not

#ifdef __CUDA_FP16_H__
__device__ __forceinline__ float round_half(float x) { return __half2float(__float2half_rn(x)); }
#endif

}  // namespace scalar
}  // namespace gpugrad
