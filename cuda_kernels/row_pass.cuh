// One pass over the rows of data matrices, in which each element is read once:
//
//   z = x . w;  pointwise work on z and what else there is of the row;  sum += term;  g += r * x
//
// A row lies in the registers of GROUP adjacent lanes of a warp, a lane with every GROUP-th pack of N columns (16
// bytes, or one element where rows are not aligned). GROUP = 8, SET = 8, four groups in a warp, 32 columns of float:
//
//     lane in group      0      1    ...   7        a lane holds a pack of each of SET rows
//     row 0 of the set  |0123||4567| ... |28..|     1. it multiplies each by its share of w: SET partial products
//     row 1             |0123||4567| ... |28..|     2. SET - 1 shuffles add them up over the group such that lane k
//     ...                                              has z of row k: the work on z is done once a row, by all lanes
//     row 7             |0123||4567| ... |28..|     3. r of row k goes to the group by a shuffle; each lane adds r * x
//                                                      to its share of g
//
// Where SET < GROUP, lanes beyond SET do the work of lane k % SET once more, and it is not counted. SETS sets are under
// way at a time. A batch of a warp is 32 / GROUP * SET * SETS adjacent rows; what a row has beside x is read by the
// lane that works on it, adjacent lanes adjacent rows.
//
// g is added up in A and folded into double every FOLD rows, in shared memory, by the thread that added it; then over
// the groups of the block, in their order; terms of sums are added in double throughout. The block's sums go to
// partial: of each sum [block], of each g [block][column]; add_totals adds them in the order of the blocks. No atomics:
// the same data, sizes and alignment give the same bits. g in float is off by at most 4e-6 of the sum of magnitudes
// (3e-7 where terms are random), in double by 1e-15, beside what r has; z by columns / GROUP + 5 roundings at most.
#pragma once

#include "expressions.cuh"
#include "math.cuh"

namespace gpugrad {
namespace rows {

constexpr int THREADS = 128, WARP = 32, WARPS = THREADS / WARP, FOLD = 64;
constexpr unsigned ALL = 0xffffffffu;

// The share of a lane in a vector of COLUMNS: weights, or what is added up.
template <class A, int N, int COLUMNS, int GROUP> struct Share {
  static constexpr int PACKS = COLUMNS / N, EACH = (PACKS + GROUP - 1) / GROUP, COUNT = EACH * N;
  static_assert(COLUMNS % N == 0, "columns are whole packs");
  A at[COUNT];

  // The column of element i of the share of a lane; COLUMNS or more where there is none.
  static __device__ __forceinline__ int column(int lane, int i) { return (i / N * GROUP + lane) * N + i % N; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) at[i] = 0;
  }
  template <class T> __device__ __forceinline__ void load(const T* from, long long step) {
    const int lane = threadIdx.x % GROUP;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) at[i] = column(lane, i) < COLUMNS ? A(from[column(lane, i) * step]) : A(0);
  }
  // Adds the share to the thread's own slots of the block's shared memory, and begins anew.
  __device__ __forceinline__ void fold(double* slots) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) slots[i * THREADS + threadIdx.x] += at[i], at[i] = 0;
  }
  // Adds the slots of all groups of the block.
  static __device__ __forceinline__ void total(const double* slots, double* sums) {
    for (int place = threadIdx.x; place < COUNT * GROUP; place += THREADS) {
      const int i = place / GROUP, lane = place % GROUP;
      double sum = 0;
#pragma unroll 4
      for (int thread = lane; thread < THREADS; thread += GROUP) sum += slots[i * THREADS + thread];
      if (column(lane, i) < COLUMNS) sums[column(lane, i)] = sum;
    }
  }
};

// The rows of a matrix that a lane holds its packs of.
template <class T, int N, int COLUMNS, int GROUP, int HELD> struct Rows {
  using A = acc_t<T>;
  using Vector = Share<A, N, COLUMNS, GROUP>;
  static constexpr int EACH = Vector::EACH;
  const T* from;
  long long step;
  Pack<T, N> held[HELD][EACH];

  __device__ __forceinline__ void load(int h, long long row, bool there) {
    const int lane = threadIdx.x % GROUP;
    const T* at = from + row * step + lane * N;
#pragma unroll
    for (int v = 0; v < EACH; ++v) {
      if (there && Vector::column(lane, v * N) < COLUMNS)
        held[h][v].load(at + v * GROUP * N);
      else
        held[h][v].clear();
    }
  }
  __device__ __forceinline__ A dot(int h, const Vector& weight) {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < EACH * N; ++i) sum += A(held[h][i / N][i % N]) * weight.at[i];
    return sum;
  }
  __device__ __forceinline__ void add(int h, A r, Vector& sum) {
#pragma unroll
    for (int i = 0; i < EACH * N; ++i) sum.at[i] += r * A(held[h][i / N][i % N]);
  }
};

// Adds SET numbers a lane over the lanes of each group; lane k of a group returns the sum of number k % SET.
template <int SET, int GROUP, int HALF = SET / 2, class A>
__device__ __forceinline__ A transposed_sum(A (&z)[SET]) {
  if constexpr (HALF > 0) {  // recursion, which a loop that is not unrolled would keep in local memory
    const bool upper = threadIdx.x & HALF;
#pragma unroll
    for (int k = 0; k < HALF; ++k) {
      const A keep = upper ? z[k + HALF] : z[k], give = upper ? z[k] : z[k + HALF];
      z[k] = keep + __shfl_xor_sync(ALL, give, HALF);
    }
    return transposed_sum<SET, GROUP, HALF / 2>(z);
  } else {
#pragma unroll
    for (int bit = SET; bit < GROUP; bit *= 2) z[0] += __shfl_xor_sync(ALL, z[0], bit);
    return z[0];
  }
}

// Work is what gpugrad/compile/cuda_code.py writes. It has the constants GROUP, SET, SETS; PRODUCTS, SUMS, BACK (how
// many there are); SLOTS (elements a lane has of all vectors g); the types A and Given; and
//
//   load(h, row, there)               the rows numbered h of all matrices
//   read(row, given)                  what else the row has
//   dots(h, z)                        this lane's share of the products
//   chain(z, given, row, there, counted, sums, r)
//   add(h, r), fold(slots), totals(slots, partial)
template <class Work> __device__ __forceinline__ void row_pass(Work& work, double* partial, long long count) {
  using A = typename Work::A;
  constexpr int GROUP = Work::GROUP, SET = Work::SET, SETS = Work::SETS;
  constexpr int APART = WARP / GROUP * SET, BATCH = APART * SETS;  // rows of a warp
  __shared__ double slots[some(Work::SLOTS) * THREADS], warps[some(Work::SUMS)][WARPS];
  const int lane = threadIdx.x % WARP, group = lane / GROUP, place = lane % GROUP, warp = threadIdx.x / WARP;
  double sums[some(Work::SUMS)];
#pragma unroll
  for (int s = 0; s < some(Work::SUMS); ++s) sums[s] = 0;
#pragma unroll
  for (int i = 0; i < Work::SLOTS; ++i) slots[i * THREADS + threadIdx.x] = 0;

  int added = 0;
  for (long long first = ((long long)blockIdx.x * WARPS + warp) * BATCH; first < count;
       first += (long long)gridDim.x * WARPS * BATCH) {
    const long long begin = first + group * SET;
    if (first + BATCH <= count) {
#pragma unroll
      for (int h = 0; h < SET * SETS; ++h) work.load(h, begin + h / SET * APART + h % SET, true);
    } else {
#pragma unroll
      for (int h = 0; h < SET * SETS; ++h) {
        const long long row = begin + h / SET * APART + h % SET;
        work.load(h, row, row < count);
      }
    }
    typename Work::Given given[SETS];
#pragma unroll
    for (int q = 0; q < SETS; ++q) {
      const long long row = begin + q * APART + place % SET;
      work.read(row < count ? row : count - 1, given[q]);
    }
#pragma unroll
    for (int q = 0; q < SETS; ++q) {
      A shares[some(Work::PRODUCTS)][SET], z[some(Work::PRODUCTS)], r[some(Work::BACK)];
#pragma unroll
      for (int k = 0; k < SET; ++k) {
        work.dots(q * SET + k, z);
#pragma unroll
        for (int p = 0; p < Work::PRODUCTS; ++p) shares[p][k] = z[p];
      }
#pragma unroll
      for (int p = 0; p < Work::PRODUCTS; ++p) z[p] = transposed_sum<SET, GROUP>(shares[p]);
      const long long row = begin + q * APART + place % SET;
      work.chain(z, given[q], row, row < count, row < count && place < SET, sums, r);
#pragma unroll
      for (int k = 0; k < SET; ++k) {
        A rs[some(Work::BACK)];
#pragma unroll
        for (int b = 0; b < Work::BACK; ++b)
          rs[b] = GROUP == 1 ? r[b] : __shfl_sync(ALL, r[b], group * GROUP + k);
        work.add(q * SET + k, rs);
      }
    }
    added += SET * SETS;
    if (added >= FOLD) {
      added = 0;
      work.fold(slots);
    }
  }
  work.fold(slots);
#pragma unroll
  for (int s = 0; s < Work::SUMS; ++s) {
    for (int half = WARP / 2; half > 0; half /= 2) sums[s] += __shfl_xor_sync(ALL, sums[s], half);
    if (lane == 0) warps[s][warp] = sums[s];
  }
  __syncthreads();
  if (threadIdx.x < Work::SUMS) {
    double sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += warps[threadIdx.x][w];
    partial[(long long)threadIdx.x * gridDim.x + blockIdx.x] = sum;
  }
  work.totals(slots, partial + (long long)Work::SUMS * gridDim.x);
}

}  // namespace rows
}  // namespace gpugrad
