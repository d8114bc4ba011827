// Optimiser updates of up to MANY parameters in one launch: w, g and the state are read once and written once.
//
//   SGD    u <- momentum u + g;  w' = w - rate (nesterov ? g + momentum u : u)              (Polyak 1964)
//   Adam   m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
//          w' = (1 - shrink) w - rate m / (sqrt(v) + eps)                                   (Kingma & Ba 2015)
//
// rate and eps of Adam come with both bias corrections in them; shrink = lr * weight_decay for AdamW. g is first scaled
// by *scale (gradient clipping, a number on the device; null for none) and, in SGD, has weight_decay * w added.
// Half-precision weights are updated in float and rounded once; the state is of type A. Relative error of an update
// 4e-7 (float), 6e-16 (double). w' is a new array: the old weights stay as they are.
//
// The table of pointers is a kernel argument, passed by value: no copy to the device. A block works on CHUNK elements
// of one parameter. Build alone: nvcc -cubin -arch=sm_90 -DGPUGRAD_T=float cuda_kernels/optim.cu (half: as swish_sum.cu
// tells). Launch: 256 threads; grid: begin[count] blocks.
#include "math.cuh"

using T = GPUGRAD_T;
using A = gpugrad::acc_t<T>;
constexpr int MANY = 64, CHUNK = 2048, THREADS = 256;  // gpugrad/kernels.py has the same numbers

struct Table {
  T* out[MANY];
  const T* weight[MANY];
  const A* gradient[MANY];
  A* first[MANY];   // velocity, or first moment
  A* second[MANY];  // second moment
  long long size[MANY];
  int begin[MANY + 1];  // first block of each parameter
  int count;
};

// Calls update(parameter, element) for every element of this block's chunk.
template <class Update> __device__ __forceinline__ void each(const Table& table, Update update) {
  int p = 0;
  for (int half = MANY / 2; half > 0; half /= 2)
    if (p + half < table.count && table.begin[p + half] <= int(blockIdx.x)) p += half;
  const long long start = (long long)(blockIdx.x - table.begin[p]) * CHUNK;
#pragma unroll
  for (int k = 0; k < CHUNK / THREADS; ++k) {
    const long long e = start + k * THREADS + threadIdx.x;
    if (e < table.size[p]) update(p, e);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sgd(const __grid_constant__ Table table, A rate, A momentum, A weight_decay, int nesterov, const A* scale) {
  const A by = scale ? *scale : A(1);
  each(table, [&](int p, long long e) {
    const A w = table.weight[p][e], g = by * table.gradient[p][e] + weight_decay * w;
    A step = g;
    if (momentum != 0) {
      const A u = momentum * table.first[p][e] + g;
      table.first[p][e] = u;
      step = nesterov ? g + momentum * u : u;
    }
    table.out[p][e] = T(w - rate * step);
  });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    adam(const __grid_constant__ Table table, A rate, A beta1, A rest1, A beta2, A rest2, A eps, A shrink,
         const A* scale) {
  const A by = scale ? *scale : A(1);
  each(table, [&](int p, long long e) {
    const A w = table.weight[p][e], g = by * table.gradient[p][e];
    const A m = beta1 * table.first[p][e] + rest1 * g, v = beta2 * table.second[p][e] + rest2 * (g * g);
    table.first[p][e] = m;
    table.second[p][e] = v;
    table.out[p][e] = T(w - shrink * w - rate * m / (gpugrad::root(v) + eps));
  });
}
