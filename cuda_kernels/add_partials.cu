// Adds what the blocks of a summing kernel left in partial[chunk][column], in double and in the order of the chunks.
//
// Build alone: nvcc -cubin -arch=sm_90 -DGPUGRAD_T=float cuda_kernels/add_partials.cu. Launch: BLOCK threads.
#include "sums.cuh"

using A = gpugrad::acc_t<GPUGRAD_T>;

// One sum a column. Grid: one block for every BLOCK / 8 columns: 8 threads a column, each an eighth of the chunks.
extern "C" __global__ void __launch_bounds__(gpugrad::BLOCK)
    add_partials(const double* partial, A* sums, long long chunks, long long cols) {
  constexpr int SHARES = 8, COLUMNS = gpugrad::BLOCK / SHARES;
  __shared__ double shared[SHARES][COLUMNS];
  const int lane = threadIdx.x % COLUMNS, share = threadIdx.x / COLUMNS;
  const long long column = (long long)blockIdx.x * COLUMNS + lane;
  double sum = 0;
  if (column < cols)
    for (long long chunk = chunks * share / SHARES; chunk < chunks * (share + 1) / SHARES; ++chunk)
      sum += partial[chunk * cols + column];
  shared[share][lane] = sum;
  __syncthreads();
  if (share == 0 && column < cols) {
    for (int other = 1; other < SHARES; ++other) sum += shared[other][lane];
    sums[column] = sum;
  }
}

// One sum of everything. Grid: one block.
extern "C" __global__ void __launch_bounds__(gpugrad::BLOCK)
    add_all_partials(const double* partial, A* sum, long long count) {
  double mine = 0;
  for (long long i = threadIdx.x; i < count; i += gpugrad::BLOCK) mine += partial[i];
  mine = gpugrad::block_sum(mine);
  if (threadIdx.x == 0) *sum = mine;
}
