// Backward of activation(x + b) with the bias gradient, a sum down the columns, fused in: one pass writes dx, which is
// also the gradient of x, and per-block sums of it; add_partials finishes. x is (rows, cols), b is (cols,).
//
//   relu    dx = y > 0 ? g : 0              needs only the output y
//   swish   dx = g * swish'(beta, x + b)    computes z = x + b again: cheaper than reading it
//
// Exact (relu) or as swish.cuh has it; db to the relative error of sums.cuh.
// Build alone: nvcc -cubin -arch=sm_90 -DGPUGRAD_T=float cuda_kernels/bias.cu (half: as swish_sum.cu tells).
// Launch: BLOCK threads; grid (packs of columns, chunks of rows).
#include "relu.cuh"
#include "sums.cuh"
#include "swish.cuh"

using T = GPUGRAD_T;
using A = gpugrad::acc_t<T>;
constexpr int WIDE = 16 / sizeof(T);

template <int N>
__device__ __forceinline__ void bias_relu(const A* g, const T* y, A* dx, double* partial, long long rows,
                                          long long cols) {
  const gpugrad::Place at(cols / N, N);
  gpugrad::column_sums<N>(at, g, y, dx, partial, rows, cols,
                          [](int, A c, A v, A& d) { return d = gpugrad::relu_backward(c, v); });
}

template <int N>
__device__ __forceinline__ void bias_swish(const A* g, const T* x, const T* b, A beta, int masked, A* dx,
                                           double* partial, long long rows, long long cols) {
  const gpugrad::Place at(cols / N, N);
  A bias[N];
#pragma unroll
  for (int k = 0; k < N; ++k) bias[k] = at.idle ? A(0) : A(b[at.column + k]);
  gpugrad::column_sums<N>(at, g, x, dx, partial, rows, cols, [&](int k, A c, A v, A& d) {
    const A z = beta * (v + bias[k]);
    return d = gpugrad::times(c, gpugrad::swish_dx(z, gpugrad::Sigmoid<A>(z)), masked);
  });
}

#define GPUGRAD_KERNEL extern "C" __global__ void __launch_bounds__(gpugrad::BLOCK)

GPUGRAD_KERNEL bias_relu_wide(const A* g, const T* y, A* dx, double* partial, long long rows, long long cols) {
  bias_relu<WIDE>(g, y, dx, partial, rows, cols);
}
GPUGRAD_KERNEL bias_relu_narrow(const A* g, const T* y, A* dx, double* partial, long long rows, long long cols) {
  bias_relu<1>(g, y, dx, partial, rows, cols);
}
GPUGRAD_KERNEL bias_swish_wide(const A* g, const T* x, const T* b, A beta, int masked, A* dx,
                               double* partial, long long rows, long long cols) {
  bias_swish<WIDE>(g, x, b, beta, masked, dx, partial, rows, cols);
}
GPUGRAD_KERNEL bias_swish_narrow(const A* g, const T* x, const T* b, A beta, int masked, A* dx,
                                 double* partial, long long rows, long long cols) {
  bias_swish<1>(g, x, b, beta, masked, dx, partial, rows, cols);
}
