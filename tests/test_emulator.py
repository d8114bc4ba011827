"""The emulator of CUDA kernels, on kernels of its own: right results, CuPy's rules, and faults that are caught."""

import mmap

import numpy as np
import pytest
from cuda_proof import emulator
from cuda_proof.emulator import KernelFault, guarded, run_elementwise, run_raw

if problem := emulator.missing():
    pytest.skip(problem, allow_module_level=True)

import cupy

AXPY = cupy.ElementwiseKernel("float32 x, float32 y, float32 a", "float32 z", "z = a * x + y", "emulated_axpy")
HALVES = cupy.ElementwiseKernel("float16 x, float32 a", "float16 y", "y = a * float(x)", "emulated_halves")
GENERIC = cupy.ElementwiseKernel("T x, S y", "T z", "z = x + T(y)", "emulated_generic")
PAIR = cupy.ElementwiseKernel("T x", "T low, T high", "low = x - 1; high = x + 1", "emulated_pair", reduce_dims=False)
REVERSED = cupy.ElementwiseKernel("raw T x, int64 n", "raw T y", "y[i] = x[n - 1 - i]", "emulated_reversed")


def numbers(rng, shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def exact(x, y, a):
    """a x + y in float32: both with the multiply-add contracted and without are right."""
    wide = np.float64(a) * x.astype(np.float64) + y
    return wide, 1e-6 * (np.abs(wide) + np.abs(x) + np.abs(y))


# ------------------------------------------------------------------------------------------------- elementwise


@pytest.mark.parametrize("n", [1, 31, 127, 128, 129, 1009])
def test_a_vector(rng, n):
    x, y = numbers(rng, n), numbers(rng, n)
    (z,) = run_elementwise(AXPY, (x, y, 2.5))
    wide, near = exact(x, y, 2.5)
    assert z.dtype == np.float32
    assert np.all(np.abs(z - wide) <= near)


LAYOUTS = {
    "rows": lambda x: x,
    "transposed": lambda x: x.transpose(2, 1, 0).copy().transpose(2, 1, 0),
    "every other": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "backwards": lambda x: x[::-1, :, ::-1].copy()[::-1, :, ::-1],
    "middle axis first": lambda x: x.swapaxes(0, 1).copy().swapaxes(0, 1),
    "off by one element": lambda x: np.concatenate([[0], x.ravel()]).astype(x.dtype)[1:].reshape(x.shape),
    "one column": lambda x: np.broadcast_to(x[:, :, :1], x.shape),
    "one row": lambda x: np.broadcast_to(x[:1, :1], x.shape),
}


@pytest.mark.parametrize("wide", [False, True], ids=["32-bit", "64-bit"])
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_any_strides(rng, first, second, wide):
    x, y = LAYOUTS[first](numbers(rng, (3, 4, 5))), LAYOUTS[second](numbers(rng, (3, 4, 5)))
    out = LAYOUTS["backwards"](np.empty((3, 4, 5), np.float32))
    (z,) = run_elementwise(AXPY, (x, y, 2.0, out), wide=wide)
    assert z is out
    assert np.array_equal(z, 2 * x + y)


@pytest.mark.parametrize(
    ("a", "b"), [((), ()), ((), (3,)), ((4, 1), (3,)), ((2, 1, 3), (5, 1)), ((1, 3), (7, 1, 3)), ((2, 3), ())]
)
def test_broadcasting(rng, a, b):
    x, y = numbers(rng, a), numbers(rng, b)
    (z,) = run_elementwise(AXPY, (x, y, 4.0))
    assert z.shape == np.broadcast_shapes(a, b)
    assert np.array_equal(z, 4 * x + y)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_nothing(shape):
    (z,) = run_elementwise(AXPY, (np.empty(shape, "f"), np.float32(1).reshape(()), 1.0))
    assert z.shape == shape


def test_types_are_decided_as_cupy_does(rng):
    x, y = numbers(rng, 5, np.float64), numbers(rng, 5, np.float16)
    (z,) = run_elementwise(GENERIC, (x, y))
    assert z.dtype == np.float64
    assert np.array_equal(z, x + y)
    low, high = run_elementwise(PAIR, (x.reshape(1, 5),))
    assert np.array_equal(low, x.reshape(1, 5) - 1)
    assert np.array_equal(high, x.reshape(1, 5) + 1)
    with pytest.raises(TypeError, match="mismatched"):
        run_elementwise(AXPY, (x, x, 1.0))
    with pytest.raises(TypeError, match="Unsupported"):
        run_elementwise(AXPY, ("x", x, 1.0))


def test_half_is_rounded_once():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    (y,) = run_elementwise(HALVES, (x, 0.1))
    with np.errstate(all="ignore"):
        expected = (np.float32(0.1) * x.astype(np.float32)).astype(np.float16)
    assert np.array_equal(y, expected, equal_nan=True)


def test_raw_arrays_and_size(rng):
    x, y = numbers(rng, 300), np.zeros(300, "f")
    (out,) = run_elementwise(REVERSED, (x, 300, y), {"size": 300})
    assert out is y
    assert np.array_equal(y, x[::-1])
    with pytest.raises(ValueError, match="undecided"):
        run_elementwise(REVERSED, (x, 300, y))
    with pytest.raises(ValueError, match="raw"):
        run_elementwise(AXPY, (x, x, 1.0), {"size": 300})
    with pytest.raises(ValueError, match="mismatched"):
        run_elementwise(AXPY, (x, x, 1.0, y[:1]))


def test_memory_beyond_32_bits():
    """The last block of 2**31 and some elements, of which only the pages that are touched take memory."""
    n = 2**31 + 1000
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    x = np.frombuffer(mmap.mmap(-1, 2 * n, flags=lazily), np.float16)
    x[-3:] = [1, 2, 3]
    last = -(-n // 128)
    assert not emulator._Argument.of(x, wide=False).narrow
    run_elementwise(HALVES, (x, 2.0, x), blocks=(last - 1, last))
    assert np.array_equal(x[-4:], [0, 2, 4, 6])


@pytest.mark.parametrize("shape", [(), (3,), (1, 4), (4, 1), (2, 3), (2, 0), (2, 3, 4)])
def test_contiguity_is_cupys(shape):
    """CuPy's own arrays can be laid over host memory with no GPU, and say how they lie."""
    memory = np.arange(200.0)
    pointer = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0), 0)
    array = cupy.ndarray(shape, np.float64, pointer)
    views = [array, array.T, array[..., None], array[None], array[..., ::2] if shape else array]
    views += [array.swapaxes(0, -1), array[::-1]] if shape else []
    for view in views:
        mine = emulator._contiguous(view.shape, view.strides, 8)
        assert mine == view.flags.c_contiguous, (view.shape, view.strides)


def test_flush_to_zero():
    tiny = np.array([1e-40, -1e-40, 1e-30], "f")
    (flushed,) = run_elementwise(AXPY, (tiny, np.zeros(3, "f"), 1.0))
    assert np.array_equal(flushed, np.float32([0, 0, 1e-30]))
    (kept,) = run_elementwise(AXPY, (tiny, np.zeros(3, "f"), 1.0), flush=False)
    assert np.array_equal(kept, tiny)
    (double,) = run_elementwise(GENERIC, (np.array([1e-310]), 0.0 * np.ones(1)))
    assert double[0] == 1e-310
    assert np.float32(1e-40) * np.float32(0.5) != 0  # the host's own arithmetic is as before


def test_worst_rounding_is_off_by_what_cuda_documents(rng):
    kernel = cupy.ElementwiseKernel("float32 x", "float32 y", "y = expf(x)", "emulated_exp")
    x = numbers(rng, 1000) * 10
    wide = np.exp(x.astype(np.float64))
    (near,), (far,) = run_elementwise(kernel, (x,)), run_elementwise(kernel, (x,), worst=True)
    ulp = np.spacing(wide.astype(np.float32))
    assert np.max(np.abs(near - wide) / ulp) < 1
    assert 2 < np.max(np.abs(far - wide) / ulp) < 3.1


def test_a_vector_load_at_a_wrong_address_is_caught(rng):
    body = "reinterpret_cast<float4*>(&y[0])[i] = reinterpret_cast<const float4*>(&x[0])[i]"
    kernel = cupy.ElementwiseKernel("raw float32 x", "raw float32 y", body, "emulated_vector")
    x, y = numbers(rng, 64), np.zeros(65, "f")
    y = y[1:] if y.ctypes.data % 16 == 0 else y[:64]
    aligned = guarded(x)
    out = guarded(np.zeros(64, "f"))
    run_elementwise(kernel, (aligned, out), {"size": 16})
    assert np.array_equal(out, x)
    with pytest.raises(KernelFault, match="misaligned"):
        run_elementwise(kernel, (aligned, y), {"size": 16})


@pytest.mark.parametrize(("start", "index"), [(False, "i + 1"), (True, "i - 1")], ids=["end", "start"])
def test_a_wrong_index_is_caught(rng, start, index):
    right = cupy.ElementwiseKernel("raw float32 x", "raw float32 y", "y[i] = 2 * x[i]", "emulated_index")
    wrong = cupy.ElementwiseKernel("raw float32 x", "raw float32 y", f"y[i] = 2 * x[{index}]", "emulated_index")
    x, y = guarded(numbers(rng, 129), start=start), np.zeros(129, "f")
    run_elementwise(right, (x, y), {"size": 129})
    assert np.array_equal(y, 2 * x)
    with pytest.raises(KernelFault, match="not the kernel's"):
        run_elementwise(wrong, (x, y), {"size": 129})
    room = np.concatenate([[7], x, [7]]).astype("f")
    run_elementwise(wrong, (room[1:-1], y), {"size": 129})
    assert not np.array_equal(y, 2 * x)


# --------------------------------------------------------------------------------------------------------- raw

SUM = r"""
template <class V> __device__ __forceinline__ V block_sum(V value) {
  __shared__ V warps[32];
  for (int half = 16; half > 0; half /= 2) value += __shfl_down_sync(0xffffffffu, value, half);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : V(0);
  for (int half = 16; half > 0; half /= 2) value += __shfl_xor_sync(0xffffffffu, value, half);
  return value;
}
extern "C" __global__ void sums(const float* x, double* partial, long long n) {
  double mine = 0;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x)
    mine += x[i];
  mine = block_sum(mine);
  if (threadIdx.x == 0) partial[blockIdx.x] = mine;
}
"""


@pytest.mark.parametrize("n", [1, 31, 128, 129, 5003])
@pytest.mark.parametrize("threads", [32, 128, 256])
def test_a_sum_by_shuffles_and_shared_memory(rng, n, threads):
    x, forward, backward = numbers(rng, n), np.full(3, np.nan), np.full(3, np.nan)
    run_raw(SUM, "sums", (3,), (threads,), (x, forward, n))
    run_raw(SUM, "sums", (3,), (threads,), (x, backward, n), reverse=True)
    assert np.isclose(forward.sum(), x.astype(np.float64).sum(), rtol=1e-13, atol=1e-12)
    assert np.array_equal(forward, backward)


def test_three_dimensions():
    where = np.zeros((2, 3, 4, 2, 4, 8, 6), np.int32)
    run_raw(
        r"""extern "C" __global__ void where(int* out) {
          long long block = (blockIdx.x * (long long)gridDim.y + blockIdx.y) * gridDim.z + blockIdx.z;
          long long thread = (threadIdx.x * blockDim.y + threadIdx.y) * blockDim.z + threadIdx.z;
          int* mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
          mine[0] = blockIdx.x, mine[1] = blockIdx.y, mine[2] = blockIdx.z;
          mine[3] = threadIdx.x, mine[4] = threadIdx.y, mine[5] = threadIdx.z;
        }""", "where", (2, 3, 4), (2, 4, 8), (where,))  # fmt: skip
    assert np.array_equal(where, np.stack(np.indices(where.shape[:-1]), axis=-1))


def test_warp_functions(rng):
    x, out = rng.integers(0, 1 << 30, 64, dtype=np.int32), np.zeros((6, 64), np.int32)
    run_raw(
        r"""extern "C" __global__ void warp(const int* x, int* out) {
          int t = threadIdx.x, v = x[t];
          const unsigned all = 0xffffffffu;
          out[t] = __shfl_sync(all, v, 3);
          out[64 + t] = __shfl_up_sync(all, v, 1);
          out[128 + t] = __shfl_down_sync(all, v, 2, 8);
          out[192 + t] = __shfl_xor_sync(all, v, 5);
          out[256 + t] = int(__ballot_sync(all, v & 1));
          __syncwarp();
          if (t % 32 < 16) out[320 + t] = __shfl_sync(0xffffu, v, 15);
        }""", "warp", (1,), (64,), (x, out))  # fmt: skip
    warps, lane = x.reshape(2, 32), np.arange(32)
    assert np.array_equal(out[0].reshape(2, 32), np.broadcast_to(warps[:, 3:4], (2, 32)))
    assert np.array_equal(out[1].reshape(2, 32), warps[:, np.maximum(lane - 1, 0)])
    assert np.array_equal(out[2].reshape(2, 32), warps[:, np.where(lane % 8 < 6, lane + 2, lane)])
    assert np.array_equal(out[3].reshape(2, 32), warps[:, lane ^ 5])
    votes = ((warps & 1) << lane.astype(np.uint32)).sum(axis=1).astype(np.uint32).view(np.int32)
    assert np.array_equal(out[4].reshape(2, 32), np.broadcast_to(votes[:, None], (2, 32)))
    assert np.array_equal(out[5].reshape(2, 32)[:, :16], np.broadcast_to(warps[:, 15:16], (2, 16)))


TABLE = r"""
struct Table { float* at[3]; long long size[3]; int count; };
extern "C" __global__ void add(const Table table, float by, int one) {
  extern __shared__ float held[];
  for (int p = 0; p < table.count; ++p)
    if (threadIdx.x < table.size[p]) {
      held[threadIdx.x] = table.at[p][threadIdx.x];
      table.at[p][threadIdx.x] = held[threadIdx.x] + by * one;
    }
}
"""


def test_a_structure_by_value_and_dynamic_shared_memory(rng):
    arrays = [numbers(rng, n) for n in (1, 31, 32)]
    before = [a.copy() for a in arrays]
    kind = np.dtype([("at", np.uintp, 3), ("size", np.int64, 3), ("count", np.int32)], align=True)
    table = np.zeros((), kind)
    table["at"], table["size"], table["count"] = [a.ctypes.data for a in arrays], [a.size for a in arrays], 3
    run_raw(TABLE, "add", (1,), (32,), (table, np.float32(0.5), np.int32(1)), shared_mem=128)
    run_raw(TABLE, "add", (1,), (32,), (table[()], np.float32(0.5), np.int32(1)), shared_mem=128)
    for a, old in zip(arrays, before, strict=True):
        assert np.allclose(a, old + 1, rtol=0, atol=1e-6)
    with pytest.raises(KernelFault, match="beyond the dynamic shared memory"):
        run_raw(TABLE, "add", (1,), (32,), (table, np.float32(0.5), np.int32(1)), shared_mem=124)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0.5, np.int32(1)), "bytes"),
        ((np.float32(0.5), 1), "bytes"),
        ((np.int32(1), np.int32(1)), "argument 1 is an integer"),
        ((np.float32(0.5),), "bytes"),
    ],
    ids=["float64 for float", "int64 for int", "int for float", "one too few"],
)
def test_arguments_that_cuda_would_misread(args, message):
    kind = np.dtype([("at", np.uintp, 3), ("size", np.int64, 3), ("count", np.int32)], align=True)
    with pytest.raises(ValueError, match=message):
        run_raw(TABLE, "add", (1,), (32,), (np.zeros((), kind), *args))


@pytest.mark.parametrize(
    ("grid", "block", "shared"), [((0,), (32,), 0), ((1,), (1025,), 0), ((1, 70000), (1,), 0), ((1,), (1,), 50000)]
)
def test_launches_that_cuda_refuses(grid, block, shared):
    with pytest.raises(ValueError, match=r"at (least|most)"):
        run_raw(SUM, "sums", grid, block, (np.zeros(1, "f"), np.zeros(1), 1), shared_mem=shared)


# What to replace in SUM, by what, and what the fault is told as.
FAULTS = {
    "not all reach the barrier": (
        "__syncthreads();",
        "if (threadIdx.x != 5) __syncthreads();",
        "divergent barrier.*127 wait at __syncthreads, line 6; 1 wait at __shfl_xor_sync",
    ),
    "two barriers": (
        "__syncthreads();",
        "if (threadIdx.x < 64) {\n__syncthreads(); } else {\n__syncthreads(); }",
        "64 wait at __syncthreads, line 7; 64 wait at __syncthreads, line 8",
    ),
    "a thread leaves early": ("double mine = 0;", "double mine = 0; if (threadIdx.x == 77) return;", "which has left"),
    "a lane outside its mask": ("__shfl_down_sync(0xffffffffu", "__shfl_down_sync(0xfffffffeu", "not in its own mask"),
    "an index beyond the array": ("threadIdx.x / 32]", "40]", "beyond a fixed array"),
    "a null pointer": ("x[i]", "((const float*)0)[i]", "not the kernel's"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(rng, fault):
    right, wrong, message = FAULTS[fault]
    assert right in SUM
    with pytest.raises(KernelFault, match=message):
        run_raw(SUM.replace(right, wrong, 1), "sums", (2,), (128,), (numbers(rng, 500), np.zeros(2), 500))
    partial = np.zeros(2)  # and what comes after is not touched by it
    run_raw(SUM, "sums", (2,), (128,), (np.ones(500, "f"), partial, 500))
    assert partial.sum() == 500


def test_a_barrier_that_lacks_shows_in_one_of_the_orders(rng):
    lacking = SUM.replace("__syncthreads();", "")
    x, results = numbers(rng, 500), []
    for reverse in (False, True):
        partial = np.zeros(1)
        run_raw(lacking, "sums", (1,), (128,), (x, partial, 500), reverse=reverse)
        results.append(partial[0])
    assert any(not np.isclose(r, x.astype(np.float64).sum()) for r in results)  # shared memory nobody wrote is NaN


def test_a_missing_private_name_is_told_with_the_version():
    with pytest.raises(RuntimeError, match=f"CuPy {cupy.__version__} has no cupy._core._kernel._gone"):
        emulator.private("cupy._core._kernel", "_gone")
