// Elementwise work on a matrix with the sums down its columns fused in, in an order that never changes.
//
//   rows x cols, row-major. A thread keeps to its own pack of N adjacent columns and walks down the rows:
//
//        columns ->   |0123|4567|89..|          across = number of packs in a row (at most blockDim.x)
//        row 0        | t0 | t1 | t2 |          down   = blockDim.x / across rows at a time
//        row 1        | t3 | t4 | t5 |          the block reads one stretch of memory: coalesced for any width
//        row 2        | t0 | t1 | t2 |          grid: x over packs of columns, y over chunks of rows
//
// Each thread adds up in A and folds into double every FOLD rows; the lines of a block are added through shared memory
// by a tree; the blocks' sums go to partial[chunk][column], which add_partials adds chunk by chunk. No atomics:
// the same data, sizes and alignment give the same bits. In float the FOLD additions of a thread are
// off by at most 4e-6 of the sum of magnitudes, for any number of rows (3e-7 where the terms are random); in double by
// 1e-15. Each term brings its own error along.
#pragma once

#include "math.cuh"

namespace gpugrad {

constexpr int BLOCK = 256, FOLD = 64;

// Where a thread works. cols counts columns, packs = cols / N.
struct Place {
  long long column, row, step;
  int across, down, lane, line;
  bool idle;

  __device__ __forceinline__ Place(long long packs, int n) {
    across = packs < BLOCK ? int(packs) : BLOCK;
    down = BLOCK / across;
    lane = threadIdx.x % across;
    line = threadIdx.x / across;
    const long long pack = (long long)blockIdx.x * across + lane;
    column = pack * n;
    row = line + (long long)down * blockIdx.y;
    step = (long long)down * gridDim.y;
    idle = line >= down || pack >= packs;
  }
};

// body(k, g, x, dx) works on one element of column k of the pack: sets dx and returns its term of the column's sum.
template <int N, class T, class A, class Body>
__device__ __forceinline__ void column_sums(const Place& at, const A* g, const T* x, A* dx, double* partial,
                                            long long rows, long long cols, Body body) {
  __shared__ double shared[BLOCK * N];
  double total[N];
  A part[N];
#pragma unroll
  for (int k = 0; k < N; ++k) total[k] = 0, part[k] = 0;
  if (!at.idle) {
    int held = 0;
    for (long long row = at.row; row < rows; row += at.step) {
      const long long element = row * cols + at.column;
      Pack<A, N> gs, out;
      Pack<T, N> xs;
      gs.load(g + element);
      xs.load(x + element);
#pragma unroll
      for (int k = 0; k < N; ++k) part[k] += body(k, A(gs[k]), A(xs[k]), out[k]);
      out.store(dx + element);
      if (++held == FOLD) {
        held = 0;
#pragma unroll
        for (int k = 0; k < N; ++k) total[k] += part[k], part[k] = 0;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) shared[threadIdx.x * N + k] = total[k] + part[k];
  for (int half = BLOCK / 2; half > 0; half /= 2) {  // a tree over the lines of the block, the same for any data
    __syncthreads();
    if (at.line < half && at.line + half < at.down) {
#pragma unroll
      for (int k = 0; k < N; ++k) shared[threadIdx.x * N + k] += shared[(threadIdx.x + half * at.across) * N + k];
    }
  }
  if (at.line == 0 && !at.idle) {
#pragma unroll
    for (int k = 0; k < N; ++k) partial[blockIdx.y * cols + at.column + k] = shared[threadIdx.x * N + k];
  }
}

// Adds the numbers of the threads of a block and returns the sum to thread 0: by shuffles within a warp, then through
// shared memory across warps. The tree is fixed.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[BLOCK / 32];
  for (int half = 16; half > 0; half /= 2) value += __shfl_down_sync(0xffffffffu, value, half);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < BLOCK / 32; ++w) sum += warps[w];
  return sum;
}

}  // namespace gpugrad
