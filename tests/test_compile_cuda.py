"""CUDA kernels that gpugrad.compile writes: their machine code for five architectures, and their numbers on the CPU.

As for the kernels in cuda_kernels/: NVRTC compiles the text with CuPy's own options and the instructions are read; g++
compiles the same text, which runs in memory where straying is noticed, and is compared with NumPy in float64. Faults
planted in the text must be found by a test that is named with them.
"""

import contextlib
import mmap

import numpy as np
import pytest
from cuda_proof import arrays, emulator, machine_code
from cuda_proof.emulator import KernelFault
from cuda_proof.machine_code import ARCHITECTURES
from devices import problem
from fused import FULL, every_layout, flat, logistic, several, sigmoid, squares, transposed

from gpugrad import kernels
from gpugrad.compile import cuda_code
from gpugrad.compile.kernels import Loop, RowPass
from gpugrad.compile.scalar import COMPARISONS, FUNCTIONS, SYMBOLIC, apply, argument, cast, constant, run

if missing := machine_code.missing() or problem("stand-in"):
    pytest.skip(missing, allow_module_level=True)

S = SYMBOLIC
# Of the type that each is computed in.
EPS = {np.dtype("float16"): 2.0**-24, np.dtype("float32"): 2.0**-24, np.dtype("float64"): 2.0**-53}

# ------------------------------------------------------------------------------------------------------ running


@pytest.fixture
def how(monkeypatch):
    """What raw kernels are run with beside what they are given: {"reverse": True} runs threads the other way."""
    real, options = emulator.run_raw, {}
    monkeypatch.setattr(emulator, "run_raw", lambda *args, **kwargs: real(*args, **kwargs, **options))
    return options


@pytest.fixture
def cupy(stand_in, how):
    return stand_in


def on_device(values, step=None, align=16, shift=0):
    """Put an array on the device, in memory with a page behind its last element that nobody may touch.

    step: elements from row to row. shift: elements that its beginning is beyond a multiple of `align` bytes.
    """
    values = np.asarray(values)
    rows = len(values) if values.ndim else 1
    width = values.size // rows if rows else 1
    step = width if step is None or values.ndim < 1 else step
    room = np.full(max(rows - 1, 0) * step + width * (rows > 0) + shift, 113, values.dtype)
    memory = emulator.guarded(room, align=align)[shift:]
    strides = (step * values.itemsize, values.itemsize)[: values.ndim]
    view = np.lib.stride_tricks.as_strided(memory, values.shape, strides)
    view[...] = values
    return arrays._over(view)


def host(array):
    return np.array(array._a)


def gradient(n, columns, dtype, seed=0):
    """Data of a regression, of a kind that no digits are lost in."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, columns)).astype(dtype)
    w = (rng.normal(size=columns) / np.sqrt(columns)).astype(dtype)
    return x, w, rng.uniform(0, 1, n).astype(dtype)


def exact_pass(kernel, matrices, weights, columns, scalars):
    """The sums, products back and outputs of a pass in float64, and how far off each may be."""
    wide = [np.asarray(m, np.float64) for m in matrices]
    with np.errstate(all="ignore"):
        sizes = [np.abs(wide[m]) @ np.abs(np.float64(w)) for m, w in zip(kernel.products, weights, strict=True)]
        sizes = [np.where(np.isfinite(size), size, 0) for size in sizes]
        z = [wide[m] @ np.float64(w) for m, w in zip(kernel.products, weights, strict=True)]
    inputs = [*z, *(np.asarray(c, np.float64) if c.dtype.kind == "f" else c for c in columns), *scalars]
    roots = [*kernel.sums, *(e for _, e in kernel.back), *kernel.outputs]
    n = len(wide[0])
    values = [np.broadcast_to(v, (n,)) for v in run(roots, inputs)]
    sums, rest = values[: len(kernel.sums)], values[len(kernel.sums) :]
    back, outputs = rest[: len(kernel.back)], rest[len(kernel.back) :]
    eps = EPS[wide_dtype(kernel)]
    loose = 16 * eps * (1 + sum(sizes, np.zeros(n)))  # of each row's terms, relative to 1 + their size
    with np.errstate(all="ignore"):
        found = [(np.sum(s, dtype=np.float64), np.sum(loose * (1 + np.abs(s)))) for s in sums]
        for (m, _), r in zip(kernel.back, back, strict=True):
            size = np.abs(wide[m]).T
            found.append((wide[m].T @ np.float64(r), size @ (loose * (1 + np.abs(r))) + 64 * eps * (size @ np.abs(r))))
    return found[: len(sums)], found[len(sums) :], [(o, loose * (1 + np.abs(np.float64(o)))) for o in outputs]


def wide_dtype(kernel):
    return np.dtype(kernel.matrices[0][0])


def run_pass(kernel, matrices, weights, columns, scalars=(), steps=None, shift=0, factor=1.0):
    """Run a pass in guarded memory; returns sums, products back in float64, and outputs."""
    code = cuda_code.row_pass(kernel)
    n = len(matrices[0])
    steps = steps or [m.shape[1] for m in matrices]
    device = [on_device(m, step, shift=shift) for m, step in zip(matrices, steps, strict=True)]
    outputs = [on_device(np.full(n, 113).astype(e.dtype)) for e in kernel.outputs]
    sums = [on_device(np.full((), np.nan)) for _ in kernel.sums]
    back = [on_device(np.full(kernel.matrices[m][1], np.nan)) for m, _ in kernel.back]
    results = [("sum", k, factor, a) for k, a in enumerate(sums)] + [("back", k, factor, a) for k, a in enumerate(back)]
    columns = [on_device(np.repeat(c, 3), step=1)[::3] if k % 2 else on_device(c) for k, c in enumerate(columns)]
    partial = code.partial(n)
    partial._a[...] = np.nan
    weights = [on_device(w) for w in weights]
    code(device, weights, columns, scalars, outputs, results, on_device(host(partial)))
    return [host(a)[()] for a in sums], [host(a) for a in back], [host(a) for a in outputs]


def near(got, want, allowed, what=""):
    """Fail where numbers are farther apart than allowed, or one is NaN or infinite where the other is not."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), what)
    np.testing.assert_array_equal(np.where(np.isfinite(want), 0, got), np.where(np.isfinite(want), 0, want), what)
    with np.errstate(invalid="ignore"):
        off = np.isfinite(want) & ~(np.abs(got - want) <= np.maximum(allowed, 1e-300))
    assert not np.any(off), f"{what}: {got[off][0]!r}, not {want[off][0]!r}: {np.sum(off)} of {off.size} are off"


def check_pass(kernel, n, *, stretch=0, shift=0, seed=0, change=None):
    """Compare a pass over random data with NumPy in float64."""
    dtype = wide_dtype(kernel)
    rng = np.random.default_rng(seed)
    matrices = [gradient(n, columns, dtype, seed + m)[0] for m, (_, columns) in enumerate(kernel.matrices)]
    weights = [gradient(1, kernel.matrices[m][1], dtype, seed + 9 + j)[1] for j, m in enumerate(kernel.products)]
    columns = [
        (rng.integers(0, 4, n) if np.dtype(d).kind == "i" else rng.uniform(0, 1, n) * (1 + (d == "bool")))
        for d in kernel.columns
    ]
    columns = [(c > 1 if d == "bool" else c).astype(d) for c, d in zip(columns, kernel.columns, strict=True)]
    scalars = [np.dtype(d).type(0.75 - k) for k, d in enumerate(kernel.scalars)]
    if change:
        change(matrices, weights, columns)
    given = [float(s) if k % 2 else on_device(np.asarray(s)) for k, s in enumerate(scalars)]
    steps = [m.shape[1] + stretch for m in matrices]
    got = run_pass(kernel, matrices, weights, columns, given, steps, shift, factor=0.5)
    want = exact_pass(kernel, matrices, weights, columns, scalars)
    for k, (value, (exact, allowed)) in enumerate(zip(got[0], want[0], strict=True)):
        near(2 * value, exact, allowed, f"sum {k}")
    for k, (value, (exact, allowed)) in enumerate(zip(got[1], want[1], strict=True)):
        near(2 * value, exact, allowed, f"back {k}")
    for value, (exact, allowed), e in zip(got[2], want[2], kernel.outputs, strict=True):
        assert value.dtype == e.dtype
        if e.dtype.kind == "f":
            near(value, exact, allowed, "output")
        elif e.dtype.kind != "b":
            np.testing.assert_array_equal(value, exact)
        else:
            assert np.sum(value != exact) <= 0.01 * n  # where rounding decides
    return got


def same_bits(one, other):
    for a, b in zip((x for part in one for x in part), (x for part in other for x in part), strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------ RowPass: numbers

DTYPES = ("float32", "float64", "float16")
COLUMNS = (1, 2, 3, 4, 8, 20, 32, 33, 100, 512)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_logistic_regression(cupy, how, columns, dtype):
    """Sizes none, one, prime, around a batch of a warp and around a block; threads in either order."""
    kernel = logistic(columns, dtype)
    form, _ = cuda_code.row_pass(kernel).form([True])
    block, batch = form.rows_a_block, form.rows_a_block // 4
    for n in (0, 1, batch, batch + 1, block - 1, 3 * block + 7 if block < 200 else block + 7):
        check_pass(kernel, n)
    how["reverse"] = True
    backward = check_pass(kernel, 331)
    how.clear()
    same_bits(check_pass(kernel, 331), backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [4, 32, 512])
def test_rows_at_any_distance_and_address(cupy, columns, dtype):
    pack = 16 // np.dtype(dtype).itemsize
    kernel = squares(columns, dtype)
    code = cuda_code.row_pass(kernel)
    wide, narrow = code.form([True])[0].packs, code.form([False])[0].packs
    assert (wide, narrow) == ((pack if columns % pack == 0 else 1,), (1,))
    for stretch, shift in ((pack, 0), (1, 0), (pack - 1, 0), (0, 1), (3, 1)):
        check_pass(kernel, 67, stretch=stretch, shift=shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 31, 129, 1009])
def test_several_matrices_products_and_outputs(cupy, dtype, n):
    check_pass(several(dtype), n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_backwards(cupy, dtype):
    """Distances below zero."""
    x, w, y = gradient(77, 8, dtype)
    (loss,), (g,), _ = run_pass(squares(8, dtype), [x], [w], [y])
    code = cuda_code.row_pass(squares(8, dtype))
    value, back = cupy.empty(()), cupy.empty(8)
    given = [cupy.asarray(x)[::-1]], [cupy.asarray(w[::-1].copy())[::-1]], [cupy.asarray(y)[::-1]]
    code(*given, [], [], [("sum", 0, 1.0, value), ("back", 0, 1.0, back)])
    np.testing.assert_allclose(value.get(), loss, rtol=1e-6)
    np.testing.assert_allclose(back.get(), g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("columns", [8, 512])
def test_values_with_cudas_worst_rounding(cupy, how, columns, dtype):
    how["worst"] = True
    check_pass(logistic(columns, dtype), 67)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_product_and_no_sum(cupy, dtype):
    check_pass(transposed(dtype), 131)


@pytest.mark.parametrize("columns", [1024, 1000])
def test_the_widest_rows(cupy, columns):
    check_pass(squares(columns), 13)
    check_pass(squares(columns // 2, "float64"), 13)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", [8, 20, 33])
@pytest.mark.parametrize("row", [0, -1])
def test_nan_and_infinities_go_where_numpys_go(cupy, columns, row, value):
    """In the last row too, beside which there are lanes with nothing to do; rows and columns of others stay clean."""

    def change(matrices, weights, columns):
        matrices[0][row, 2] = value

    for n in (5, 77):
        check_pass(squares(columns), n, change=change)
        check_pass(logistic(columns), n, change=change)

    def labels(matrices, weights, columns):
        columns[0][row] = value

    check_pass(squares(columns), 77, change=labels)


def test_an_infinity_of_an_earlier_batch_is_not_left_over(cupy, monkeypatch):
    """Row 138 is not there; the lane that would hold it has held row 10, and 0 times that is NaN."""
    monkeypatch.setattr(cuda_code, "BLOCKS", 1)
    check_pass(logistic(20), 133, stretch=4, change=lambda matrices, _w, _c: matrices[0].__setitem__((10, 2), np.inf))


@pytest.mark.parametrize("columns", [8, 32, 33, 512])
def test_sums_of_float32_are_folded_into_float64(cupy, monkeypatch, columns):
    """Terms of 18 bits: 64 of them are exact in float, and the double total is exact only if no more were added."""
    monkeypatch.setattr(cuda_code, "BLOCKS", 1)
    kernel = transposed_by(columns)
    form, _ = cuda_code.row_pass(kernel).form([True])
    n = 20 * max(64, form.rows_a_block)
    x, y = np.ones((n, columns), np.float32), np.full(n, 2**17 + 1, np.float32)
    _, (back,), _ = run_pass(kernel, [x], [], [y])
    np.testing.assert_array_equal(back, np.full(columns, n * (2**17 + 1.0)))


def transposed_by(columns):
    return RowPass((("float32", columns),), (), ("float32",), (), (), ((0, argument(0, "float32")),))


def test_sums_are_in_float64(cupy):
    """A million and a small number many times: float would lose every small one."""
    y = argument(0, "float32")
    kernel = RowPass((("float32", 4),), (), ("float32",), (), (y,), ())
    values = np.full(3001, 0.01, np.float32)
    values[5] = 1e8
    (total,), _, _ = run_pass(kernel, [np.ones((3001, 4), np.float32)], [], [values])
    assert abs(total - np.sum(values, dtype=np.float64)) < 1e-6


def test_results_have_factor_and_dtype(cupy):
    kernel = squares(6)
    x, w, y = gradient(50, 6, "float32")
    put = cupy.asarray
    value, g32, g64 = cupy.empty(()), cupy.empty(6, dtype="float32"), cupy.empty(6)
    results = [("sum", 0, 1 / 50, value), ("back", 0, 1 / 50, g32), ("back", 0, -1.0, g64)]
    results += [("sum", 0, float(k), cupy.empty(1)) for k in range(20)]
    with cupy.counting() as count:
        cuda_code.row_pass(kernel)([put(x)], [put(w)], [put(y)], [], [], results)
    assert (count.launches, count.syncs) == (3, 0)  # of results a launch takes 16
    r = x.astype(float) @ w - y
    np.testing.assert_allclose(value.get(), np.mean(r * r), rtol=1e-6)
    np.testing.assert_allclose(g64.get(), -2 * x.T.astype(float) @ r, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(g32.get(), (-g64.get() / 50).astype(np.float32))
    assert [float(a.get()[0]) for *_, a in results[3:]] == [k * float(results[4][3].get()[0]) for k in range(20)]


def test_beyond_2_to_the_31_elements(cupy):
    """The block that has the last rows of 2**31 and some float16."""
    columns, n = 8, 2**28 + 100
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    memory = mmap.mmap(-1, 2 * n * columns, flags=lazily)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    x = np.frombuffer(memory, np.float16).reshape(n, columns)
    y = np.frombuffer(mmap.mmap(-1, 2 * n, flags=lazily), np.float16)
    kernel = squares(columns, "float16")
    form, text = cuda_code.row_pass(kernel).form([True])
    x[-3:] = np.arange(24).reshape(3, 8) / 8
    w = np.ones(columns, np.float16)
    block, blocks = (n - 1) // form.rows_a_block % 2048, 2048
    partial = np.full(blocks * 9, np.nan)
    # from the last round of this block on: the rows before it are zeros
    skipped = (n - 1) // form.rows_a_block // blocks * blocks * form.rows_a_block
    text = text.replace("long long first = (", f"long long first = {skipped}ll + (")
    emulator.run_raw(
        text, "row_pass", (blocks,), (128,), (partial, n, x, columns, w, 1, y, 1), blocks=(block, block + 1)
    )
    r = x[-3:].astype(float).sum(axis=1)
    assert abs(partial[block] - np.sum(r * r)) < 1e-3
    np.testing.assert_allclose(partial[blocks:].reshape(blocks, 8)[block], 2 * x[-3:].T.astype(float) @ r, rtol=1e-6)


def test_the_order_of_a_sum_depends_on_sizes_alone():
    """How many blocks, and how rows lie in them, is asked of no device."""
    code = cuda_code.row_pass(logistic(32))
    form, _ = code.form([True])
    assert [code.blocks(n, form) for n in (0, 1, 128, 129, 10**9)] == [1, 1, 1, 2, cuda_code.BLOCKS]
    assert form == cuda_code.RowForm((4,), 8, 8, 1, 3)


def test_a_step_of_gradient_descent_is_three_launches(cupy):
    """Value, gradient and update of a linear model; nothing is read back."""
    for make in (squares, logistic):
        x, w, y = gradient(1000, 32, "float32")
        put = cupy.asarray
        data, weights, labels = put(x), put(w), put(y)
        value, g = cupy.empty(()), cupy.empty(32, dtype="float32")
        code = cuda_code.row_pass(make(32))
        bound = code.bind(
            [data], [weights], [labels], [], [], [("sum", 0, 1e-3, value), ("back", 0, 1e-3, g)], code.partial(1000)
        )
        with cupy.counting() as count:
            bound()
            options = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "scale": None}
            (moved,) = kernels.sgd_update([weights], [g], [[]], rate=0.1, **options)
        assert (count.launches, count.syncs, bound.launches) == (3, 0, 2)
        np.testing.assert_allclose(moved.get(), w - np.float32(0.1) * g.get(), rtol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (RowPass((), (), ("float32",), (), (argument(0, "float32"),), ()), "no matrix"),
        (RowPass((("int64", 3),), (), (), (), (), ()), "integers"),
        (RowPass((("float32", 3), ("float64", 3)), (0, 1), (), (), (argument(0, "float32"),), ()), "two dtypes"),
        (squares(1032), "too wide"),
        (squares(516, "float64"), "too wide"),
        (RowPass((("float32", 3),), (), ("int32",), (), (argument(0, "int32"),), ()), "a sum of integers"),
        (
            RowPass(
                (("float32", 3),),
                (),
                ("int32",),
                (),
                (),
                ((0, cast(apply("pow", argument(0, "int32"), argument(0, "int32")), np.dtype("float32"))),),
            ),
            "a power of integers",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_a_pass_is_not_written_for(kernel, why):
    assert cuda_code.row_pass(kernel) is None


def test_operands_that_do_not_fit_are_refused(cupy):
    code = cuda_code.row_pass(squares(4))
    x, w, y = (cupy.asarray(a) for a in gradient(8, 4, "float32"))
    value = [("sum", 0, 1.0, cupy.empty(()))]
    good = {"matrices": [x], "weights": [w], "columns": [y], "scalars": [], "outputs": [], "results": value}
    code.bind(**good)
    for name, wrong in {
        "matrices": [cupy.asarray(np.ones((8, 4)))],
        "weights": [w[:3]],
        "columns": [y[:7]],
        "results": [("back", 0, 1.0, cupy.empty(3))],
    }.items():
        with pytest.raises(ValueError, match="wanted"):
            code.bind(**good | {name: wrong})
    with pytest.raises(ValueError, match="next to each other"):
        code.bind(**good | {"matrices": [cupy.asarray(np.ones((4, 8), np.float32)).T]})
    with pytest.raises(ValueError, match="float32 or float64"):
        code.bind(**good | {"results": [("sum", 0, 1.0, cupy.empty((), dtype="float16"))]})


# --------------------------------------------------------------------------------------------------- Loop: numbers


def check_loop(kernel, rows, columns, *, stretch=0, shift=0, seed=0):
    """Compare a loop over random data with NumPy: outputs and sums."""
    rng = np.random.default_rng(seed)
    shapes = {"full": (rows, columns), "row": (columns,), "column": (rows,), "scalar": ()}
    given = [rng.normal(size=shapes[layout]) for layout, _ in kernel.inputs]
    given = [
        np.asarray(a > 0 if d == "bool" else 3 * a).astype(d) for a, (_, d) in zip(given, kernel.inputs, strict=True)
    ]
    device, lying = [], []
    for k, (a, (layout, _)) in enumerate(zip(given, kernel.inputs, strict=True)):
        if layout == "scalar":
            device.append(a.item() if k % 2 else on_device(a))
        else:
            step = {"full": columns + stretch, "row": None, "column": None}[layout]
            device.append(on_device(a, step, shift=shift if layout != "column" else 0))
        lying.append(a[:, None] if layout == "column" else a)
    outputs = [
        on_device(np.full((rows, columns), 113).astype(e.dtype), columns + stretch, shift=shift) for e in kernel.outputs
    ]
    code = cuda_code.loop(kernel)
    sums = [on_device(np.full(a.shape, np.nan, a.dtype)) for a in code.sums(rows, columns)]
    assert code(device, outputs, rows, columns, sums) == sums
    want = run([*kernel.outputs, *(e for e, _ in kernel.sums)], lying)
    for out, exact, e in zip(outputs, want, kernel.outputs, strict=False):
        exact = np.broadcast_to(exact, (rows, columns))
        if e.dtype.kind == "f":
            eps = 2.0 ** {2: -10, 4: -22, 8: -51}[e.dtype.itemsize]
            near(host(out), exact, eps * (4 + np.abs(np.float64(exact))), "output")
        else:
            np.testing.assert_array_equal(host(out), exact)
    got = []
    for total, (e, over), term in zip(sums, kernel.sums, want[len(outputs) :], strict=True):
        axis = {"all": None, "rows": 0, "columns": 1}[over]
        terms = np.broadcast_to(term, (rows, columns)).astype(np.float64)
        eps = EPS[e.dtype]
        near(host(total), terms.sum(axis), eps * (8 * np.abs(terms).sum(axis) + 16 * terms.size), f"sum over {over}")
        got.append(host(total))
    return [host(o) for o in outputs], got


SHAPES = [(1, 1), (1, 7), (7, 1), (3, 257), (257, 3), (130, 8), (1009, 5), (33, 64), (2, 2056), (0, 4), (4, 0)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sums", [(), ("all", "rows", "rows"), ("columns", "all", "columns", "all")], ids=str)
def test_loops_over_every_layout(cupy, how, sums, dtype):
    kernel = every_layout(sums, dtype)
    for rows, columns in SHAPES:
        for stretch, shift in ((0, 0), (4, 0), (1, 0), (0, 1)):
            forward = check_loop(kernel, rows, columns, stretch=stretch, shift=shift)
    how["reverse"] = True
    same_bits(check_loop(kernel, rows, columns, stretch=stretch, shift=shift), forward)
    backward = check_loop(kernel, 130, 8)
    how.clear()
    same_bits(check_loop(kernel, 130, 8), backward)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_loops_over_vectors(cupy, dtype):
    """Of any length, by packs with what is left at the end."""
    kernel = flat(dtype) if dtype != "float16" else Loop((("full", dtype),) * 2, flat(dtype).outputs)
    for n in (1, 2, 3, 7, 8, 9, 255, 1023, 1024, 1025, 5003):
        for shape in ((n, 1), (1, n)):
            for shift in (0, 1):
                check_loop(kernel, *shape, shift=shift)


def test_loops_over_mixed_types(cupy):
    """Packs of numbers of 1, 2, 4 and 8 bytes side by side."""
    mask, small, single, double = (
        argument(0, "bool"),
        argument(1, "float16"),
        argument(2, "float32"),
        argument(3, "float64"),
    )
    whole = argument(4, "int32")
    outputs = (S.where(mask, single, whole), cast(double, np.dtype("float16")) + small, single > double, whole * 2 - 1)
    kernel = Loop(tuple(("full", d) for d in ("bool", "float16", "float32", "float64", "int32")), outputs)
    assert cuda_code.loop(kernel).pack == 8
    for rows, columns in ((5, 16), (5, 7), (300, 8), (1, 1000)):
        check_loop(kernel, rows, columns)
        check_loop(kernel, rows, columns, stretch=8)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "uint32", "float16", "float32", "float64"])
def test_numbers_of_every_type(cupy, dtype):
    """From the host and from the device, beside an array."""
    x, number = argument(0, "float64"), argument(1, dtype)
    kernel = Loop((("full", "float64"), ("scalar", dtype)), (x * number,))
    values, of = np.arange(5.0), np.dtype(dtype).type(1)
    for given in (of.item(), of, on_device(np.asarray(of)), on_device(np.full(1, of))):
        out = on_device(np.full(5, np.nan))
        cuda_code.loop(kernel)([on_device(values), given], [out], 1, 5)
        np.testing.assert_array_equal(host(out), values)
    with pytest.raises(ValueError, match="a number of dtype"):
        cuda_code.loop(kernel)([on_device(values), on_device(np.ones(2, dtype))], [out], 1, 5)


def test_launches_of_loops(cupy):
    """One, and one more for sums that several blocks have a part in; none for nothing; no waits."""
    for sums, launches in (
        ((), 1),
        (("all",), 2),
        (("rows", "all", "rows"), 2),
        (("columns",), 1),
        (("columns", "all"), 2),
    ):
        kernel = every_layout(sums)
        x, row, column = (
            cupy.ones((64, 8), dtype="float32"),
            cupy.ones(8, dtype="float32"),
            cupy.ones(64, dtype="float32"),
        )
        outputs = [cupy.empty((64, 8), dtype="float32") for _ in range(2)]
        with cupy.counting() as count:
            made = cuda_code.loop(kernel)([x, row, column, 2.0], outputs, 64, 8)
        assert (count.launches, count.syncs) == (launches, 0)
        shapes = {"all": (), "rows": (8,), "columns": (64,)}
        assert [a.shape for a in made] == [shapes[over] for over in sums]


def test_what_a_loop_is_not_written_for():
    assert cuda_code.loop(every_layout(("rows", "columns"))) is None
    assert cuda_code.loop(Loop((("full", "int32"),), (), ((argument(0, "int32"), "all"),))) is None
    assert cuda_code.loop(Loop((("full", "int32"),), (apply("pow", argument(0, "int32"), 3),))) is None


def test_a_loop_beyond_2_to_the_31_elements(cupy):
    """The block that has the last elements of 2**31 and some float16, with what is left of a pack."""
    n = 2**31 + 1013
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memories = [mmap.mmap(-1, 2 * n, flags=lazily) for _ in range(2)]
    for memory in memories:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    x, y = (np.frombuffer(memory, np.float16) for memory in memories)
    x[-20:] = np.arange(20)
    kernel = Loop((("full", "float16"),), (argument(0, "float16") * 2,))
    code = cuda_code.loop(kernel)
    text = code.text(8).replace(
        "long long row = at.row;", f"long long row = at.row + {n // 8 // (256 * 2048) * 256 * 2048}ll;"
    )
    block = n // 8 // 256 % 2048
    for only in {block, 2047}:  # the last block does the rest
        emulator.run_raw(
            text,
            "loop",
            (1, 2048),
            (256,),
            (np.uintp(0), n // 8, 8, np.int32(n % 8), x, 8, y, 8),
            blocks=(only, only + 1),
        )
    np.testing.assert_array_equal(y[-20:], 2 * np.arange(20))


# ---------------------------------------------------------------------------------------------------- expressions

POINTS = np.array(
    [
        0.0,
        -0.0,
        0.3,
        -0.3,
        1.0,
        -1.0,
        2.5,
        -2.5,
        7.0,
        20.0,
        -20.0,
        88.0,
        -90.0,
        1e10,
        -1e10,
        np.inf,
        -np.inf,
        np.nan,
        0.5,
        -0.999,
    ]
)
ARITHMETIC = ["add", "sub", "mul", "div", "pow", "maximum", "minimum", "logaddexp", "atan2", "hypot", "copysign"]
BINARY = [*ARITHMETIC, *sorted(COMPARISONS)]
UNARY = [f for f in FUNCTIONS if f not in {*BINARY, "and", "or", "not", "where"}]


def outputs_of(roots, given):
    """What a loop over vectors gives for expressions."""
    n = given[0].size
    kernel = Loop(tuple(("full", a.dtype.str[1:] if a.dtype.kind != "b" else "bool") for a in given), tuple(roots))
    outputs = [on_device(np.zeros(n, e.dtype)) for e in roots]
    cuda_code.loop(kernel)([on_device(a) for a in given], outputs, 1, n)
    return [host(o) for o in outputs]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_function_is_numpys(cupy, dtype):
    """In value to a few units in the last place; exactly where NumPy's is NaN, infinite or zero."""
    pairs = np.array(np.meshgrid(POINTS, POINTS)).reshape(2, -1).astype(dtype)
    x, y = argument(0, dtype), argument(1, dtype)
    roots = [apply(f, x) for f in UNARY] + [apply(f, x, y) for f in BINARY]
    got = outputs_of(roots, list(pairs))
    for name, value, exact in zip([*UNARY, *BINARY], got, run(roots, list(pairs)), strict=True):
        if value.dtype.kind == "b":
            np.testing.assert_array_equal(value, exact, name)
            continue
        tiny = np.abs(exact) < 1e-37 if dtype == "float32" else np.zeros(exact.shape, bool)  # flushed
        np.testing.assert_allclose(value[~tiny], exact[~tiny], rtol=4 * np.finfo(dtype).eps, atol=0, err_msg=name)
        if name not in ("maximum", "minimum"):  # of two zeros either
            np.testing.assert_array_equal(np.signbit(value[exact == 0]), np.signbit(exact[exact == 0]), name)
        assert np.all(np.abs(value[tiny]) < 1e-37), name


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint64"])
def test_integers_wrap_around_as_numpys(cupy, dtype):
    info = np.iinfo(dtype)
    points = np.array([0, 1, 2, 7, info.max, info.min, info.max - 1, info.max // 2 + 1], dtype)
    pairs = np.array(np.meshgrid(points, points)).reshape(2, -1)
    x, y = argument(0, dtype), argument(1, dtype)
    names = ["add", "sub", "mul", "maximum", "minimum", *sorted(COMPARISONS)]
    roots = [apply(f, x, y) for f in names] + [apply(f, x) for f in ("neg", "abs", "sign", "isnan", "isfinite")]
    for name, value, exact in zip(
        [*names, "neg", "abs", "sign", "isnan", "isfinite"],
        outputs_of(roots, list(pairs)),
        run(roots, list(pairs)),
        strict=True,
    ):
        np.testing.assert_array_equal(value, exact, name)


def test_logic_and_selection(cupy):
    p, q = np.array([[False, False, True, True], [False, True, False, True]])
    x, y = np.float32([1, np.nan, np.inf, -0.0]), np.float32([np.nan, 2, 3, 4])
    a, b, u, v = argument(0, bool), argument(1, bool), argument(2, "float32"), argument(3, "float32")
    roots = [a & b, a | b, ~a, a + b, a * b, S.where(a, u, v), S.where(u, a, b), S.maximum(a, b)]
    for value, exact in zip(outputs_of(roots, [p, q, x, y]), run(roots, [p, q, x, y]), strict=True):
        np.testing.assert_array_equal(value, exact)


ALL_TYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
]


@pytest.mark.parametrize("source", ALL_TYPES)
def test_casts(cupy, source):
    points = [0, 1, 2, 3, 100, 0.6, 77] + [np.nan, np.inf, -3.7] * (source in ("float16", "float32", "float64"))
    values = np.array(points, dtype=float).astype(source)
    targets = [t for t in ALL_TYPES if np.isfinite(values.astype(float)).all() or t[0] in "bf"]
    roots = [cast(argument(0, source), np.dtype(t)) for t in targets if t != source]
    with np.errstate(invalid="ignore"):
        exact = [values.astype(e.dtype) for e in roots]
    for value, want in zip(outputs_of(roots, [values]), exact, strict=True):
        np.testing.assert_array_equal(value, want, strict=True)


def test_a_cast_to_half_rounds(cupy):
    x = np.float32([1 / 3, 2049, 70000, 1e-9])
    (back,) = outputs_of([cast(cast(argument(0, "float32"), np.dtype("float16")), np.dtype("float32"))], [x])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(back, x.astype(np.float16).astype(np.float32))


def test_constants_are_exact(cupy):
    values = [
        np.dtype(d).type(v) for d in ("float32", "float64") for v in (0.1, -0.0, np.pi, np.nan, np.inf, -np.inf, 1e30)
    ]
    values += [np.float64(1e-310), np.finfo("float64").max, np.finfo("float32").max, np.float32(2**-126)]
    values += [
        np.dtype(d).type(v) for d in ("int32", "int64", "uint64", "int8") for v in (np.iinfo(d).min, np.iinfo(d).max, 5)
    ]
    values += [np.True_, np.False_, np.float16(0.1)]
    roots = [constant(v, v.dtype) for v in values]
    for value, want in zip(outputs_of(roots, [np.zeros(3, np.float32)]), values, strict=True):
        np.testing.assert_array_equal(value, np.full(3, want), strict=True)
        assert want != want or np.all(np.signbit(np.float64(value)) == np.signbit(np.float64(want)))


def test_a_common_subexpression_is_computed_once():
    z = argument(0, "float32")
    text, names = cuda_code.lines([sigmoid(z), sigmoid(z) * z, z], lambda k: f"in{k}")
    assert "\n".join(text).count("::exp(") == 1
    assert names[2] == "in0"
    assert all(line.startswith(("const float t", "const bool t")) for line in text)


# --------------------------------------------------------------------------------------------------- machine code

CODE = {
    **{f"logistic {n} {d}": logistic(n, d) for n in (8, 32, 33, 512) for d in DTYPES},
    **{f"squares {n} float32": squares(n) for n in (1, 4, 32, 100, 1024)},
    "squares 512 float64": squares(512, "float64"),
    **{f"several {d}": several(d) for d in DTYPES},
    "transposed": transposed(),
}
# Instructions of a warp that a row may take, the tail and the folding counted in. An H100's 132 multiprocessors issue 4
# a clock at 1.755 GHz: 10 while 3.35 TB/s bring a row of 8 float32 and a label, 36 of 32, 568 of 512.
INSTRUCTIONS = {"logistic 8 float32 wide": 5, "logistic 32 float32 wide": 13, "logistic 512 float32 wide": 180}
HEAVY = {f"logistic {n} {d}" for n, d in ((8, "float32"), (32, "float32"), (32, "float64"), (512, "float16"))}
HEAVY |= {"squares 32 float32", "squares 1024 float32", "squares 512 float64", "several float32"}
LOOPS = {
    **{f"{sums} {d}": every_layout(sums, d) for sums in ((), ("all", "rows"), ("columns", "all")) for d in FULL},
    **{f"flat {d}": flat(d) for d in FULL},
    "half": Loop((("full", "float16"),), (argument(0, "float16") * 2,)),
}


def pass_faults(kernel, form, code):
    """What is wrong with the machine code of a pass, in words."""
    found = general_faults(code, {3: 168, 2: 208}[form.blocks])
    row = code.loop / rows_a_warp(form)
    if not 0 < row <= INSTRUCTIONS.get(code.label, 1000):
        found.append(f"{row} instructions a row")
    size = wide_dtype(kernel).itemsize
    each = [-(-(columns // pack) // form.group) for (_, columns), pack in zip(kernel.matrices, form.packs, strict=True)]
    packs = form.set * form.sets * sum(e for e, pack in zip(each, form.packs, strict=True) if pack * size == 16)
    if code.count("LDG", "128") < packs:
        found.append(f"{code.count('LDG', '128')} loads of 16 bytes, not {packs}")
    return found


def rows_a_warp(form):
    return form.rows_a_block // 4


def loop_faults(code, loads, stores):
    found = general_faults(code, 96)
    if code.count("LDG", "128") < loads or code.count("STG", "128") < stores:
        found.append(f"{code.count('LDG', '128')} loads, {code.count('STG', '128')} stores of 16 bytes")
    return found


def general_faults(code, registers):
    found = []
    if code.spill_stores or code.spill_loads or code.stack or code.count("LDL") or code.count("STL"):
        found.append(f"{code.spill_stores + code.spill_loads} bytes spilled, {code.stack} on the stack")
    operations = {name.partition(".")[0] for name in code.instructions}
    if any(name.startswith(("ATOM", "RED")) and name != "REDUX" for name in operations):
        found.append("has atomics")
    if code.registers > registers:
        found.append(f"{code.registers} registers, more than {registers}")
    if code.shared > 48 * 1024:
        found.append(f"{code.shared} bytes of shared memory")
    return found


def text_of(label, name, source):
    return machine_code.Text(label, name, source, cuda_code.OPTIONS)


def forms_of(kernel):
    """The forms of a pass, each once."""
    forms = {}
    for wide in (True, False):
        form, text = cuda_code.row_pass(kernel).form([wide] * len(kernel.matrices))
        forms.setdefault(form, ("wide" if wide else "narrow", text))
    return [(name, form, text) for form, (name, text) in forms.items()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_of_passes(architecture):
    """Of all for sm_90; for the others those that take most registers, and the plainest."""
    mine = {}
    for name, kernel in CODE.items():
        if architecture == 90 or name in HEAVY:
            mine |= {f"{name} {which}": (kernel, form, text) for which, form, text in forms_of(kernel)}
    codes = machine_code.compile_all(
        [text_of(label, "row_pass", text) for label, (*_, text) in mine.items()], architecture
    )
    wrong = []
    for label, code in codes.items():
        kernel, form, _ = mine[label]
        wrong += [f"{label}: {fault}" for fault in pass_faults(kernel, form, code)]
        print(
            f"sm_{architecture} {label:28} {tuple(form)!s:22} {code.registers:3} registers {code.shared:6} B shared "
            f"{code.count('LDG', '128'):2} LDG.128 {code.count('SHFL'):3} SHFL {code.instructions.total():5} in all, "
            f"{code.loop / rows_a_warp(form):6.1f} a row"
        )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_of_loops_and_totals(architecture):
    texts = {"totals": text_of("totals", "add_totals", kernels.source("totals.cu"))}
    wide = {}
    for name, kernel in LOOPS.items():
        if architecture != 90 and name.endswith("float64"):
            continue
        code = cuda_code.loop(kernel)
        full = sum(layout in ("full", "row") for layout, _ in kernel.inputs)
        for pack in {code.pack, 1}:
            label = f"{name} by {pack}"
            texts[label] = text_of(label, "loop", code.text(pack))
            wide[label] = (full, len(kernel.outputs)) if pack > 1 else (0, 0)
    wrong = []
    for label, code in machine_code.compile_all(list(texts.values()), architecture).items():
        wrong += [f"{label}: {fault}" for fault in loop_faults(code, *wide.get(label, (0, 0)))]
        print(f"sm_{architecture} {label:40} {code.registers:3} registers {code.instructions.total():5} instructions")
    assert not wrong, "\n".join(wrong)


CODE_FAULTS = {
    "loads by elements": (
        "words[w] = reinterpret_cast<const Word*>(from)[w];",
        "for (int k = 4 * w; k < 4 * w + 4; ++k) (*this)[k] = from[k];",
        "loads of 16 bytes",
    ),
    "an atomic sum": (
        "partial[(long long)threadIdx.x * gridDim.x + blockIdx.x] = sum;",
        "atomicAdd(&partial[threadIdx.x], sum);",
        "atomics",
    ),
    "rows in local memory": (
        "#pragma unroll\n      for (int h = 0; h < SET * SETS; ++h) work.load",
        "#pragma unroll 1\n      for (int h = 0; h < SET * SETS; ++h) work.load",
        "on the stack",
    ),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_planted_fault_in_the_machine_code_is_found(fault):
    old, new, told = CODE_FAULTS[fault]
    kernel = logistic(32)
    form, text = cuda_code.row_pass(kernel).form([True])
    assert old in text
    (code,) = machine_code.compile_all([text_of("planted", "row_pass", text.replace(old, new))], 90).values()
    assert any(told in found for found in pass_faults(kernel, form, code)), pass_faults(kernel, form, code)


# -------------------------------------------------------------------------------------------------- planted faults


@contextlib.contextmanager
def planted(monkeypatch, old, new):
    """Replace a piece of every text that has it, once it is to be built; fails if none had."""
    seen, built = [], cuda_code._built.__wrapped__

    def build(cupy, text, name):
        seen.append(old in text)
        return built(cupy, text.replace(old, new), name)

    with monkeypatch.context() as patch:
        patch.setattr(cuda_code, "_built", build)
        yield
    assert any(seen), f"nothing to replace: {old!r}"


def found(monkeypatch, how, old, new, check):
    """Whether a check fails on a planted fault, in one order of threads or the other; without it it must pass."""
    failed = 0
    for reverse in (False, True):
        how["reverse"] = reverse
        try:
            with planted(monkeypatch, old, new):
                check(monkeypatch)
        except (AssertionError, KernelFault):
            failed += 1
        check(monkeypatch)
    return failed > 0


def few_blocks(monkeypatch, check, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(cuda_code, "BLOCKS", 2)
        check(*args, **kwargs)


# Each is a piece of the tests above.
CHECKS = {
    "32 columns": lambda _: check_pass(logistic(32), 331),
    "512 columns": lambda _: check_pass(logistic(512), 19),
    "20 columns": lambda _: check_pass(squares(20), 331, stretch=4),
    "8 columns": lambda _: check_pass(squares(8), 331),
    "many blocks": lambda _: check_pass(squares(4), 2100),
    "an infinite row": lambda patch: test_an_infinity_of_an_earlier_batch_is_not_left_over(None, patch),
    "an infinite label": lambda _: check_pass(
        transposed(), 77, change=lambda _m, _w, columns: columns[0].__setitem__(-1, np.inf)
    ),
    "terms of 18 bits": lambda patch: test_sums_of_float32_are_folded_into_float64(None, patch, 32),
    "small terms": lambda _: test_sums_are_in_float64(None),
    "a vector": lambda _: check_loop(flat(), 1, 1023),
    "a long vector": lambda _: check_loop(flat(), 1, 5003),
    "a matrix": lambda _: check_loop(every_layout(("all",)), 257, 3),
    "packs": lambda _: check_loop(every_layout(()), 33, 64),
    "few blocks": lambda patch: few_blocks(patch, check_loop, every_layout(("rows",)), 1009, 5),
    "sums over rows": lambda _: check_loop(every_layout(("rows",)), 130, 8),
    "sums over columns": lambda patch: few_blocks(patch, check_loop, every_layout(("columns",)), 1009, 64),
    "two sums": lambda _: check_loop(every_layout(("all", "all")), 33, 64),
    "maximum": lambda _: check_function("maximum", 2),
    "sign": lambda _: check_function("sign", 1),
    "logaddexp": lambda _: check_function("logaddexp", 2),
}


def check_function(name, count):
    pairs = np.array(np.meshgrid(POINTS, POINTS)).reshape(2, -1).astype(np.float32)
    root = apply(name, *(argument(k, "float32") for k in range(count)))
    np.testing.assert_allclose(outputs_of([root], list(pairs))[0], run([root], list(pairs))[0], rtol=1e-6, atol=1e-37)


# What to replace, by what, and the check that must fail.
FAULTS = {
    "a shuffle too few": ("bit < GROUP; bit *= 2", "bit < GROUP / 2; bit *= 2", "512 columns"),
    "the wrong half is kept": ("upper ? z[k + HALF] : z[k], give", "upper ? z[k] : z[k + HALF], give", "32 columns"),
    "r of another row": ("group * GROUP + k)", "group * GROUP + (k ^ 1))", "32 columns"),
    "rows beyond the end are loaded": ("work.load(h, row, row < count);", "work.load(h, row, true);", "32 columns"),
    "rows beyond the end count": ("row < count && place < SET, sums", "place < SET, sums", "32 columns"),
    "r of rows beyond the end": ("there ? float(", "true ? float(", "an infinite label"),
    "lanes beyond a set count too": ("row < count && place < SET, sums", "row < count, sums", "512 columns"),
    "columns beyond the end": ("if (there && Vector::column(lane, v * N) < COLUMNS)", "if (there)", "20 columns"),
    "held rows are not cleared": ("held[h][v].clear();", ";", "an infinite row"),
    "one set for all": ("h / SET * APART + h % SET", "h % SET", "8 columns"),
    "labels of another row": ("work.read(row < count ? row : count - 1", "work.read(0", "32 columns"),
    "labels beyond the end": ("work.read(row < count ? row : count - 1", "work.read(row", "32 columns"),
    "no fold at the end": ("  work.fold(slots);\n#pragma unroll", "#pragma unroll", "32 columns"),
    "no fold on the way": ("FOLD = 64", "FOLD = 1 << 30", "terms of 18 bits"),
    "a fold that does not begin anew": ("+= at[i], at[i] = 0;", "+= at[i];", "terms of 18 bits"),
    "no barrier before the totals": (
        "  __syncthreads();\n  if (threadIdx.x < Work",
        "  if (threadIdx.x < Work",
        "32 columns",
    ),
    "a group is left out": ("thread < THREADS; thread", "thread < THREADS - GROUP; thread", "32 columns"),
    "blocks overlap": ("+= (long long)gridDim.x * WARPS * BATCH", "+= (long long)WARPS * BATCH", "many blocks"),
    "the factor is forgotten": ("shared[0][lane] * table.factor[p]", "shared[0][lane]", "32 columns"),
    "a share of the chunks is left out": ("share + half][lane]", "share + half - 1][lane]", "many blocks"),
    "totals in float": ("double sum = 0;\n  if (column", "float sum = 0;\n  if (column", "small terms"),
    "columns beyond a vector": ("if (share == 0 && column < columns)", "if (share == 0)", "32 columns"),
    "the rest is forgotten": ("int(threadIdx.x) < rest", "false", "a vector"),
    "the rest is not added": ("sums.all[s] += one.all[s];", ";", "a vector"),
    "every block does the rest": ("if (N > 1 && last &&", "if (N > 1 &&", "a long vector"),
    "the row of another pack": ("work.across(at.column);", "work.across(0);", "packs"),
    "a step too far": ("row += at.step", "row += at.step + 1", "few blocks"),
    "idle threads work": ("if (!at.idle) {", "if (true) {", "a matrix"),
    "lines are left out": ("at.line + half < at.down", "at.line + half < at.down - 1", "sums over rows"),
    "a sum runs into the next row": ("    sums.clear();\n", "", "sums over columns"),
    "lanes are left out": ("half = across / 2", "half = across / 4", "sums over columns"),
    "no barrier between sums": ("if (s > 0) __syncthreads();", ";", "two sums"),
    "a number from the host": (
        "given.s3 = i3 ? (float)(*i3) : (float)(i3_value);",
        "given.s3 = (float)(*i3);",
        "packs",
    ),
    "NaN is lost": ("return x != x || x > y ? x : y;", "return x > y ? x : y;", "maximum"),
    "the sign of NaN": ("x != x ? x : T(T(x > 0)", "T(T(x > 0)", "sign"),
    "two infinities": ("if (x == y) return x + T(0.69", "if (false) return x + T(0.69", "logaddexp"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(cupy, how, monkeypatch, fault):
    old, new, name = FAULTS[fault]
    assert found(monkeypatch, how, old, new, CHECKS[name])
