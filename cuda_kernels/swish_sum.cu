// Swish backward with the sum of d/dbeta fused in: one pass over g and x writes dx and per-block sums, add_partials
// finishes. Bytes an element: reads g and x, writes dx; the sums are nothing beside that.
//
// Build alone: nvcc -cubin -arch=sm_90 -DGPUGRAD_T=float cuda_kernels/swish_sum.cu
// (half: -DGPUGRAD_T=__half -include cuda_fp16.h). Launch: BLOCK threads; grid (packs of columns, chunks of rows).
#include "sums.cuh"
#include "swish.cuh"

using T = GPUGRAD_T;
using A = gpugrad::acc_t<T>;
constexpr int WIDE = 16 / sizeof(T);

// beta is beta_at[column * beta_step], or beta_value where beta_at is null. For one beta for all elements, rows x cols
// is any matrix of the same elements (WIDE columns, or 1), and its column sums are added up in the end.
template <int N>
__device__ __forceinline__ void swish_sum(const A* g, const T* x, const A* beta_at, A beta_value, int beta_step,
                                          int masked, A* dx, double* partial, long long rows, long long cols) {
  const gpugrad::Place at(cols / N, N);
  A beta[N];
#pragma unroll
  for (int k = 0; k < N; ++k) beta[k] = beta_at && !at.idle ? beta_at[(at.column + k) * beta_step] : beta_value;
  gpugrad::column_sums<N>(at, g, x, dx, partial, rows, cols, [&](int k, A c, A v, A& d) {
    const A z = beta[k] * v;
    const gpugrad::Sigmoid<A> of(z);
    d = gpugrad::times(c, gpugrad::swish_dx(z, of), masked);
    return gpugrad::times(c, gpugrad::swish_dbeta(v, of), masked);
  });
}

extern "C" __global__ void __launch_bounds__(gpugrad::BLOCK)
    swish_sum_wide(const A* g, const T* x, const A* beta_at, A beta_value, int beta_step, int masked, A* dx,
                   double* partial, long long rows, long long cols) {
  swish_sum<WIDE>(g, x, beta_at, beta_value, beta_step, masked, dx, partial, rows, cols);
}

extern "C" __global__ void __launch_bounds__(gpugrad::BLOCK)
    swish_sum_narrow(const A* g, const T* x, const A* beta_at, A beta_value, int beta_step, int masked, A* dx,
                     double* partial, long long rows, long long cols) {
  swish_sum<1>(g, x, beta_at, beta_value, beta_step, masked, dx, partial, rows, cols);
}
