// Adds what the blocks of a generated kernel left in partial[chunk][column], in double and in an order that depends on
// the number of chunks alone; writes each total times a factor, in float or double. Up to MANY vectors (or numbers,
// of one column) in one launch: the last step of a pass over data, 1 / n and the like included.
//
// Bytes: each partial sum is read once. SHARES threads a column, each with its share of the chunks; then a tree.
// Build alone: nvcc -cubin -std=c++17 -arch=sm_90 cuda_kernels/totals.cu. Launch: THREADS threads; begin[count] blocks.
constexpr int MANY = 16, THREADS = 512, COLUMNS = 8, SHARES = THREADS / COLUMNS;  // gpugrad/compile/cuda_code.py too

struct Table {
  const double* from[MANY];
  void* to[MANY];
  double factor[MANY];
  long long chunks[MANY];
  long long columns[MANY];
  int wide[MANY];       // double, else float
  int begin[MANY + 1];  // first block of each; COLUMNS columns a block
  int count;
};

extern "C" __global__ void __launch_bounds__(THREADS) add_totals(const __grid_constant__ Table table) {
  __shared__ double shared[SHARES][COLUMNS];
  int p = 0;
  while (p + 1 < table.count && table.begin[p + 1] <= int(blockIdx.x)) ++p;
  const double* from = table.from[p];
  const long long chunks = table.chunks[p], columns = table.columns[p];
  const int lane = threadIdx.x % COLUMNS, share = threadIdx.x / COLUMNS;
  const long long column = (long long)(blockIdx.x - table.begin[p]) * COLUMNS + lane;
  double sum = 0;
  if (column < columns) {
    const long long stop = chunks * (share + 1) / SHARES;
#pragma unroll 8
    for (long long chunk = chunks * share / SHARES; chunk < stop; ++chunk) sum += from[chunk * columns + column];
  }
  shared[share][lane] = sum;
  for (int half = SHARES / 2; half > 0; half /= 2) {
    __syncthreads();
    if (share < half) shared[share][lane] += shared[share + half][lane];
  }
  if (share == 0 && column < columns) {
    const double total = shared[0][lane] * table.factor[p];
    if (table.wide[p])
      static_cast<double*>(table.to[p])[column] = total;
    else
      static_cast<float*>(table.to[p])[column] = float(total);
  }
}
