// Pointwise work over (rows, columns) with any sums of its results fused in; what generated kernels are made of.
//
// loop        a thread keeps to its pack of N adjacent columns and walks down the rows (Place in sums.cuh): what all
//             rows share is read once a thread, what all columns share once a row. Sums over everything and over the
//             rows. `rest` elements beyond rows * cols, fewer than a pack, are done by the last block, one a thread.
// row_sums    `across` adjacent lanes, a power of two up to 32, walk along a row: sums over the columns, and over
//             everything.
//
// Sums are in double from the first addition on, in an order that depends on rows, columns and N alone: a thread's own
// terms, the threads of a block by a tree, the blocks in add_totals. partial: of each sum over everything [block], of
// each sum over the rows [chunk of rows][column]. Error 1e-15 of the sum of magnitudes, beside what each term has.
#pragma once

#include "expressions.cuh"
#include "sums.cuh"

namespace gpugrad {

// Given, what gpugrad/compile/cuda_code.py writes, holds pointers and numbers and the constants ALL, ROWS, COLUMNS: how
// many sums there are over everything, the rows, the columns. Work<N> is made of it and has
//
//   across(column)              what all rows have in the pack that begins there
//   load(row, column)           the rest of what the pack needs
//   element(k, all, down, along)
//   store(row, column), put(row, along)
template <int N, class Given> struct Sums {
  double all[some(Given::ALL)], down[some(Given::ROWS)][N], along[some(Given::COLUMNS)];

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int s = 0; s < some(Given::ALL); ++s) all[s] = 0;
#pragma unroll
    for (int s = 0; s < some(Given::ROWS) * N; ++s) down[s / N][s % N] = 0;
    clear();
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < some(Given::COLUMNS); ++s) along[s] = 0;
  }
};

template <template <int> class Work, int N, class Given>
__device__ __forceinline__ void pack(Work<N>& work, Sums<N, Given>& sums, long long row, long long column) {
  work.load(row, column);
#pragma unroll
  for (int k = 0; k < N; ++k) work.element(k, sums.all, sums.down, sums.along);
  work.store(row, column);
}

// The sums over everything of this block.
template <class Given, int N>
__device__ __forceinline__ void add_all(const Sums<N, Given>& sums, double* partial, long long blocks,
                                        long long block) {
#pragma unroll
  for (int s = 0; s < Given::ALL; ++s) {
    if (s > 0) __syncthreads();  // block_sum's shared memory is one
    const double sum = block_sum(sums.all[s]);
    if (threadIdx.x == 0) partial[s * blocks + block] = sum;
  }
}

template <template <int> class Work, int N, class Given>
__device__ __forceinline__ void loop(const Given& given, double* partial, long long rows, long long cols, int rest) {
  const Place at(cols / N, N);
  Sums<N, Given> sums;
  if (!at.idle) {
    Work<N> work{given};
    work.across(at.column);
    for (long long row = at.row; row < rows; row += at.step) pack<Work, N, Given>(work, sums, row, at.column);
  }
  const bool last = blockIdx.x == gridDim.x - 1 && blockIdx.y == gridDim.y - 1;
  if (N > 1 && last && int(threadIdx.x) < rest) {
    Work<1> work{given};
    Sums<1, Given> one;
    pack<Work, 1, Given>(work, one, 0, rows * cols + threadIdx.x);
#pragma unroll
    for (int s = 0; s < Given::ALL; ++s) sums.all[s] += one.all[s];
  }
  const long long blocks = (long long)gridDim.x * gridDim.y;
  add_all<Given>(sums, partial, blocks, (long long)blockIdx.y * gridDim.x + blockIdx.x);
  if (Given::ROWS > 0) {
    __shared__ double shared[Given::ROWS > 0 ? BLOCK * N : 1];
    partial += Given::ALL * blocks;
#pragma unroll
    for (int s = 0; s < Given::ROWS; ++s) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < N; ++k) shared[threadIdx.x * N + k] = sums.down[s][k];
      for (int half = BLOCK / 2; half > 0; half /= 2) {  // a tree over the lines of the block, the same for any data
        __syncthreads();
        if (at.line < half && at.line + half < at.down) {
#pragma unroll
          for (int k = 0; k < N; ++k) shared[threadIdx.x * N + k] += shared[(threadIdx.x + half * at.across) * N + k];
        }
      }
      if (at.line == 0 && !at.idle) {
#pragma unroll
        for (int k = 0; k < N; ++k)
          partial[(s * (long long)gridDim.y + blockIdx.y) * cols + at.column + k] = shared[threadIdx.x * N + k];
      }
    }
  }
}

template <template <int> class Work, int N, class Given>
__device__ __forceinline__ void row_sums(const Given& given, double* partial, long long rows, long long cols,
                                         int across) {
  const int lane = threadIdx.x % across, line = threadIdx.x / across, down = BLOCK / across;
  Sums<N, Given> sums;
  Work<N> work{given};
  for (long long first = (long long)blockIdx.x * down; first < rows; first += (long long)gridDim.x * down) {
    const long long row = first + line;
    sums.clear();
    if (row < rows)
      for (long long column = lane * N; column < cols; column += across * N) {
        work.across(column);
        pack<Work, N, Given>(work, sums, row, column);
      }
#pragma unroll
    for (int s = 0; s < Given::COLUMNS; ++s)
      for (int half = across / 2; half > 0; half /= 2)
        sums.along[s] += __shfl_xor_sync(0xffffffffu, sums.along[s], half);
    if (row < rows && lane == 0) work.put(row, sums.along);
  }
  add_all<Given>(sums, partial, gridDim.x, blockIdx.x);
}

}  // namespace gpugrad
