"""The CPU's fused kernels: their functions, both kinds of kernel, threads, and the cache on disk."""

import concurrent.futures
import contextlib
import functools
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import mpmath
import numpy as np
import pytest

from gpugrad.compile import cpu_build, cpu_code, cpu_ir, cpu_kernels, scalar
from gpugrad.compile.kernels import Loop, RowPass
from gpugrad.op import registry

needs_numba = pytest.mark.skipif(cpu_code.available() is not None, reason=str(cpu_code.available()))
S = scalar.SYMBOLIC
SINGLE, DOUBLE = np.dtype("float32"), np.dtype("float64")
FLOATS = [pytest.param(SINGLE, id="float32"), pytest.param(DOUBLE, id="float64")]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUGRAD_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        cpu_build._folder.cache_clear()
        yield Path(os.environ["GPUGRAD_CACHE_DIR"])
    cpu_build._folder.cache_clear()


@contextlib.contextmanager
def no_memo():
    """Have kernels built anew: from the cache folder that is set, or compiled."""
    built, cpu_build._built = cpu_build._built, {}
    cpu_build._folder.cache_clear()
    try:
        yield
    finally:
        cpu_build._built = built
        cpu_build._folder.cache_clear()


def flat(roots, arrays):
    """Evaluate expressions on 1-D arrays by one compiled Loop."""
    loop = Loop(tuple(("full", a.dtype.str) for a in arrays), tuple(roots))
    outputs = [np.empty((1, arrays[0].size), e.dtype) for e in roots]
    cpu_code.loop(loop)([a.reshape(1, -1) for a in arrays], outputs, 2, 1, arrays[0].size)
    return [y[0] for y in outputs]


# ------------------------------------------------------------------------------------------------------- functions


def values(dtype, rng):
    """Numbers of every size, and all that are special."""
    f = np.finfo(dtype)
    special = [
        0,
        1,
        0.5,
        2,
        3,
        10,
        f.tiny,
        f.tiny * 2,
        f.smallest_subnormal,
        f.tiny / 8,
        f.max,
        np.inf,
        f.eps,
        1 + f.eps,
    ]
    special += [1 - f.epsneg, 88.72, 88.73, 89.4, 89.42, 103.9, 104.1, 709.7, 709.8, 710.4, 710.5, 745.1, 745.2, 1e10]
    special += [0.3465, 0.3466, 0.625, 0.7071, 1.4142, 17, 37, 1e-4, 1e-10, 2.0**64, 2.0**65]
    special = np.array([*special, *(-x for x in special), np.nan], dtype)
    sizes = np.exp(rng.uniform(np.log(f.tiny), np.log(f.max), 400))
    parts = [rng.standard_normal(400), rng.standard_normal(400) * 20, sizes, -sizes, 1 + rng.standard_normal(200) / 10]
    quarters = np.pi / 2 * np.concatenate([np.arange(-40, 40), np.exp2(rng.uniform(0, 25, 300)).round()])
    parts += [quarters, rng.uniform(-1e6, 1e6, 400), rng.uniform(-1.001, 1.001, 400), 1 - 2 ** rng.uniform(-50, -5, 99)]
    return np.concatenate([special, *(p.astype(dtype) for p in parts)])


def wrong(got, args, exact, ulps):
    """Return those of the arguments at which `got` differs from mpmath's function by more than so many ulps."""
    bad = []
    with mpmath.workprec(120), np.errstate(all="ignore"):
        for y, *at in zip(got, *args, strict=True):
            truth = exact(*(mpmath.mpf(float(x)) for x in at))
            near = y.dtype.type(float(truth))
            if np.isfinite(near) and np.isfinite(y):
                step = max(np.spacing(np.abs(near)), np.finfo(y.dtype).smallest_subnormal)
                if abs(mpmath.mpf(float(y)) - truth) > ulps * float(step):
                    bad.append(at)
            elif not (y == near or abs(truth) > 0.999 * float(np.finfo(y.dtype).max)):
                bad.append(at)
    return bad


# mpmath's functions, and where they are compared with
EXACT = {
    "exp": (mpmath.exp, lambda x: np.abs(x) < 1000),
    "expm1": (mpmath.expm1, lambda x: np.abs(x) < 1000),
    "log": (mpmath.log, lambda x: x > 0),
    "log1p": (mpmath.log1p, lambda x: x > -1),
    "log2": (lambda x: mpmath.log(x) / mpmath.log(2), lambda x: x > 0),
    "log10": (mpmath.log10, lambda x: x > 0),
    "tanh": (mpmath.tanh, lambda x: np.abs(x) < 1000),
    "sinh": (mpmath.sinh, lambda x: np.abs(x) < 1000),
    "cosh": (mpmath.cosh, lambda x: np.abs(x) < 1000),
    "sin": (mpmath.sin, np.isfinite),
    "cos": (mpmath.cos, np.isfinite),
    "tan": (mpmath.tan, np.isfinite),
    "asin": (mpmath.asin, lambda x: np.abs(x) <= 1),
    "acos": (mpmath.acos, lambda x: np.abs(x) <= 1),
    "atan": (mpmath.atan, np.isfinite),
}
EXACT_OF_TWO = {
    "pow": (mpmath.power, lambda x, y: (x > 0) & (np.abs(y * np.log(np.where(x > 0, x, 1))) < 800)),
    "atan2": (mpmath.atan2, lambda x, y: (x != 0) | (y != 0)),
    "hypot": (mpmath.hypot, lambda x, y: True),
}
UNARY = ["neg", "abs", "sign", "sqrt", "exp", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "asin"]
UNARY += ["acos", "atan", "sinh", "cosh", "tanh", "floor", "isnan", "isfinite"]
LOGICAL = ["and", "or", "not", "where"]
BINARY = [fn for fn in scalar.FUNCTIONS if fn not in [*UNARY, *LOGICAL]]


@needs_numba
@pytest.mark.parametrize("dtype", FLOATS)
def test_functions_are_within_two_units_of_the_truth(dtype, rng):
    x = values(dtype, rng)
    got = dict(zip(UNARY, flat([scalar.apply(fn, scalar.argument(0, dtype)) for fn in UNARY], [x]), strict=True))
    for fn, (exact, domain) in EXACT.items():
        inside = np.isfinite(x) & domain(x)
        assert not wrong(got[fn][inside], [x[inside]], exact, 2.0), fn


@needs_numba
@pytest.mark.parametrize("dtype", FLOATS)
def test_functions_of_two_numbers_are_within_two_units_of_the_truth(dtype, rng):
    x = values(dtype, rng)
    x, y = np.concatenate([[x, rng.permutation(x)], rng.standard_normal((2, 1000)).astype(dtype)], 1)
    # powers that fill the range of results, of numbers of every size and near 1
    base = np.abs(np.concatenate([rng.choice(x[np.isfinite(x) & (x != 0)], 500), 1 + rng.standard_normal(500) / 99]))
    base = base.astype(dtype)
    base = base[base != 1]
    power = rng.uniform(-1, 1, base.size) * np.log(float(np.finfo(dtype).max)) / np.log(base.astype(DOUBLE))
    with np.errstate(over="ignore"):
        x, y = np.concatenate([x, base]), np.concatenate([y, power.astype(dtype)])
    a, b = scalar.argument(0, dtype), scalar.argument(1, dtype)
    roots = [scalar.apply(fn, a, b) for fn in EXACT_OF_TWO]
    for got, (fn, (exact, domain)) in zip(flat(roots, [x, y]), EXACT_OF_TWO.items(), strict=True):
        with np.errstate(all="ignore"):
            inside = np.isfinite(x) & np.isfinite(y) & domain(x.astype(DOUBLE), y.astype(DOUBLE))
        assert not wrong(got[inside], [x[inside], y[inside]], exact, 2.0), fn


@needs_numba
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_function_agrees_with_numpy_also_at_special_values(dtype, rng):
    x = values(dtype, rng)
    pairs = np.concatenate([x[:80].repeat(80), x, rng.standard_normal(500)]).astype(dtype)
    others = np.concatenate([np.tile(x[:80], 80), rng.permutation(x), rng.standard_normal(500)]).astype(dtype)
    a, b = scalar.argument(0, dtype), scalar.argument(1, dtype)
    for names, args, arrays in ((UNARY, [a], [x]), (BINARY, [a, b], [pairs, others])):
        roots = [scalar.apply(fn, *args) for fn in names]
        for fn, got, wanted in zip(names, flat(roots, arrays), scalar.run(roots, arrays), strict=True):
            assert got.dtype == wanted.dtype, fn
            if got.dtype == bool:
                np.testing.assert_array_equal(got, wanted, err_msg=fn)
                continue
            # sums of numbers that cancel: NumPy's logaddexp and ours differ by what each rounds away
            eps = np.finfo(dtype).eps
            atol = {"logaddexp": 2 * eps}.get(fn, 4 * np.finfo(dtype).smallest_subnormal)
            np.testing.assert_allclose(got, wanted, rtol=5 * eps, atol=atol, err_msg=fn)
            signed = ["neg", "abs", "sqrt", "expm1", "log1p", "sin", "tan", "asin", "atan", "sinh", "tanh", "floor"]
            signed += ["copysign", "mul", "atan2", "pow"]
            if fn in signed:
                zero = (got == 0) & (wanted == 0)
                np.testing.assert_array_equal(np.signbit(got)[zero], np.signbit(wanted)[zero], err_msg=fn)


@needs_numba
def test_logic_and_integers(rng):
    x, k = rng.standard_normal(1000).astype(SINGLE), rng.integers(-5, 6, 1000)
    small, m = rng.integers(0, 200, 1000).astype(np.uint8), rng.random(1000) < 0.5
    x[:3] = np.nan, np.inf, -np.inf
    a, i, u, c = (scalar.argument(n, v.dtype) for n, v in enumerate((x, k, small, m)))
    roots = [
        S.where(c, a, 0),
        (a > 0) & ~c | (i == 2),
        c == (i < 0),
        i * i - 3,
        -i,
        abs(i),
        S.sign(i),
        S.maximum(i, -1),
    ]
    roots += [
        S.minimum(u, 100),
        u + 1,
        S.sign(u),
        i / 2,
        S.exp(i.astype(SINGLE)),
        i * a,
        u.astype(SINGLE),
        c + i,
        c * a,
    ]
    roots += [a.astype(bool), i.astype(np.int8), S.isnan(i), S.isfinite(i), S.floor(i), i > u, S.maximum(c, a > 0)]
    for e, got, wanted in zip(roots, flat(roots, [x, k, small, m]), scalar.run(roots, [x, k, small, m]), strict=True):
        assert got.dtype == wanted.dtype, e
        np.testing.assert_allclose(got, wanted, rtol=1e-6, err_msg=str(e))


@needs_numba
@pytest.mark.parametrize(("dtype", "bounds"), [(SINGLE, (2e-7, 8e-7, 3e-7)), (DOUBLE, (3e-16, 1.5e-15, 6e-16))])
def test_swish_holds_its_bounds(dtype, bounds, rng):
    x = np.concatenate([rng.uniform(-85, 85, 300), rng.standard_normal(300)]).astype(dtype)
    x = x[np.abs(x + 1.2785) > 0.05]  # near the root of the slope errors are absolute
    args = scalar.argument(0, dtype), scalar.argument(1, dtype)
    swish = registry["swish"]
    slopes = [scalar.evaluate_formula(lambda _xp, *a, rule=rule: rule(None, *a), args, {}) for rule in swish.partials]
    roots = [scalar.evaluate_formula(swish.forward, args, {}), *slopes]
    got = flat(roots, [x, np.ones_like(x)])
    with mpmath.workprec(120):
        for k, at in enumerate(x):
            t = mpmath.mpf(float(at))
            p, q = 1 / (1 + mpmath.exp(-t)), 1 / (1 + mpmath.exp(t))
            for y, truth, bound in zip(got, (t * p, p * (1 + t * q), t * t * p * q), bounds, strict=True):
                assert abs(mpmath.mpf(float(y[k])) - truth) <= bound * abs(truth), at


@needs_numba
@pytest.mark.parametrize(
    ("there", "planted"),
    [
        # the order of sums given up: the rounding in the exponential folds away
        (("fadd <", "fsub <"), ("fadd reassoc nsz <", "fsub reassoc nsz <")),
        # one coefficient of its polynomial, in the fifth digit
        (("0x3FC5554920000000",), ("0x3FC5565920000000",)),
    ],
    ids=["reassoc", "coefficient"],
)
def test_a_fault_in_the_exponential_is_found(there, planted, monkeypatch, rng):
    loop = Loop((("full", SINGLE.str),), (S.exp(scalar.argument(0, SINGLE)),))
    real = cpu_kernels.loop_text

    def faulty(*args, **options):
        text = real(*args, **options)
        ir = text.ir
        for old, new in zip(there, planted, strict=True):
            assert old in ir
            ir = ir.replace(old, new)
        return cpu_kernels.Text(ir, text.parameters)

    monkeypatch.setattr(cpu_kernels, "loop_text", faulty)
    if "reassoc" in planted[0]:
        monkeypatch.setattr(cpu_ir.Code, "fma", lambda _code, x, y, z: x * y + z)
    monkeypatch.setattr(cpu_build, "_folder", lambda: None)
    monkeypatch.setattr(cpu_build, "_built", {})
    x = rng.uniform(-80, 80, (1, 500)).astype(SINGLE)
    y = np.empty_like(x)
    cpu_code.loop(loop)([x], [y], 1, 1, 500)
    assert wrong(y[0], [x[0]], mpmath.exp, 2.0)


# ------------------------------------------------------------------------------------------------------------ Loop

SHAPES = [(0, 5), (3, 0), (1, 1), (1, 70), (17, 1), (70_001, 1), (501, 3), (17, 8), (97, 31), (300, 33), (129, 64)]
SHAPES += [(7, 1000), (1, 100_003), (1500, 257)]


def mixed_loop(dtype):
    """A Loop with every layout, several dtypes and every sum."""
    kinds = (dtype, dtype, dtype, dtype, np.dtype("int32"), np.dtype(bool))
    a, b, c, d, i, m = (scalar.argument(k, t) for k, t in enumerate(kinds))
    first = S.where(m, a * b + S.exp(-abs(c)), d) * i.astype(dtype)
    layouts = ("full", "row", "column", "scalar", "full", "row")
    sums = ((first, "all"), (a * a, "rows"), (first * 2, "columns"), (i + 1, "rows"), (m, "all"))
    inputs = tuple((layout, t.str) for layout, t in zip(layouts, kinds, strict=True))
    return Loop(inputs, (first, first > 0, i + 1), sums)


@needs_numba
@pytest.mark.parametrize("dtype", FLOATS)
def test_loops_of_every_layout_and_sum(dtype, rng):
    loop = mixed_loop(dtype)
    run = cpu_code.loop(loop)
    roots = (*loop.outputs, *(e for e, _ in loop.sums))
    for rows, columns in SHAPES:
        a = rng.standard_normal((rows, columns + 3)).astype(dtype)[:, 1 : columns + 1]
        b, c = rng.standard_normal(columns).astype(dtype), rng.standard_normal((rows, 2)).astype(dtype)[:, 1]
        i, m = rng.integers(-3, 4, (rows, columns)).astype("int32"), rng.random(columns) < 0.5
        d = np.array(0.7, dtype)
        for x in (a, b, c, i, m, d):
            x.flags.writeable = False
        outputs = [np.full((rows, columns + 2), 7, e.dtype)[:, :columns] for e in loop.outputs]
        sums = run([a, b, c, d, i, m], outputs, 2, rows, columns)
        wide = [a.astype(DOUBLE), b.astype(DOUBLE), c.astype(DOUBLE)[:, None], d.astype(DOUBLE), i, m]
        wanted = [np.broadcast_to(v, (rows, columns)) for v in scalar.run(roots, wide)]
        rtol = 30 * np.finfo(dtype).eps
        for y, v in zip(outputs, wanted, strict=False):
            np.testing.assert_allclose(y, v, rtol, rtol, err_msg=f"{rows, columns}")
            assert np.all(y.base[:, columns:] == y.dtype.type(7))
        for y, v, (_, over) in zip(sums, wanted[3:], loop.sums, strict=True):
            v = v.astype(DOUBLE)
            total = v.sum() if over == "all" else v.sum(0) if over == "rows" else v.sum(1)
            np.testing.assert_allclose(y, total, rtol, rtol * max(1, rows) ** 0.5, err_msg=f"{rows, columns} {over}")
            assert np.shape(y) == np.shape(total)
        before = [y.copy() for y in outputs]
        for threads in (1, 7):
            for y, x in zip(run([a, b, c, d, i, m], outputs, threads, rows, columns), sums, strict=True):
                np.testing.assert_array_equal(y, x)
            for y, x in zip(outputs, before, strict=True):
                np.testing.assert_array_equal(y, x)


@needs_numba
def test_a_loop_may_write_to_its_inputs(rng):
    x, g = scalar.argument(0, SINGLE), scalar.argument(1, SINGLE)
    run = cpu_code.loop(Loop((("full", SINGLE.str), ("full", SINGLE.str)), (x - g, g * 2)))
    for shape in ((1, 10_007), (33, 5), (40, 70)):
        a, b = rng.standard_normal((2, *shape)).astype(SINGLE)
        wanted = a - b, b * 2
        run([a, b], [a, b], 2, *shape)
        np.testing.assert_array_equal([a, b], wanted)


@needs_numba
def test_nan_stays_in_its_row_and_reaches_its_sums():
    x = scalar.argument(0, SINGLE)
    run = cpu_code.loop(Loop((("full", SINGLE.str),), (S.tanh(x),), ((x, "columns"), (x, "rows"), (x, "all"))))
    data = np.ones((5, 37), SINGLE)
    data[2, 36], data[4, 0] = np.nan, np.inf
    across, down, everything = run([data], [np.empty_like(data)], 1, 5, 37)
    np.testing.assert_array_equal(across, [37, 37, np.nan, 37, np.inf])
    np.testing.assert_array_equal(down, [np.inf, *[5] * 35, np.nan])
    assert np.isnan(everything)


@needs_numba
def test_infinities_of_both_signs_add_up_to_nan_without_a_warning():
    data = np.full((40_000, 33), np.inf, SINGLE)
    data[20_000:] = -np.inf
    x = scalar.argument(0, SINGLE)
    everything, down = cpu_code.loop(Loop((("full", SINGLE.str),), (), ((x, "all"), (x, "rows"))))(
        [data], [], 2, *data.shape
    )
    assert np.isnan(everything)
    assert np.isnan(down).all()


@needs_numba
def test_sums_of_float32_are_made_in_float64():
    x = scalar.argument(0, SINGLE)
    sums = cpu_code.loop(Loop((("full", SINGLE.str),), (), ((x, "all"), (x, "rows"))))
    tenths = np.full((300_000, 33), 0.1, SINGLE)
    everything, down = sums([tenths], [], 2, *tenths.shape)
    np.testing.assert_allclose(everything, tenths.size * float(SINGLE.type(0.1)), rtol=1e-12)
    np.testing.assert_allclose(down, 300_000 * float(SINGLE.type(0.1)), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------- RowPass


def logistic(dtype, columns):
    z, y = scalar.argument(0, dtype), scalar.argument(1, dtype)
    t = S.exp(-abs(z))
    r = S.where(z >= 0, 1, t) / (1 + t) - y
    matrix = (dtype.str, columns)
    return RowPass((matrix,), (0,), (dtype.str,), (), (S.maximum(z, 0) + S.log1p(t) - y * z,), ((0, r),), (r,))


def check_pass(kernel, matrices, weights, columns, scalars, rtol):
    """Compare a RowPass with NumPy in float64, and with itself on other numbers of threads."""
    rows = len(matrices[0])
    run = cpu_code.row_pass(kernel)
    outputs = [np.full((rows, 2), 7, e.dtype)[:, 1] for e in kernel.outputs]
    sums, back = run(matrices, weights, columns, scalars, outputs, 2)
    z = [matrices[m].astype(DOUBLE) @ w.astype(DOUBLE) for m, w in zip(kernel.products, weights, strict=True)]
    wide = [c.astype(DOUBLE) if c.dtype.kind == "f" else c for c in columns]
    roots = (*kernel.sums, *(e for _, e in kernel.back), *kernel.outputs)
    wanted = [np.broadcast_to(v, rows) for v in scalar.run(roots, [*z, *wide, *scalars])]
    for y, v in zip(sums, wanted, strict=False):
        np.testing.assert_allclose(y, v.sum(dtype=DOUBLE), rtol, rtol * (1 + np.abs(v).sum()))
    wanted = wanted[len(sums) :]
    for y, v, (m, _) in zip(back, wanted, kernel.back, strict=False):
        x = matrices[m].astype(DOUBLE)
        np.testing.assert_allclose(y, v.astype(DOUBLE) @ x, rtol, rtol * (1 + np.abs(v) @ np.abs(x)).max())
        assert y.dtype == DOUBLE
    for y, v in zip(outputs, wanted[len(back) :], strict=True):
        np.testing.assert_allclose(y, v, 20 * rtol, 20 * rtol)
        assert np.all(y.base[:, 0] == y.dtype.type(7))
    for threads in (1, 5):
        again = run(matrices, weights, columns, scalars, outputs, threads)
        assert again[0] == sums
        for y, v in zip(again[1], back, strict=True):
            np.testing.assert_array_equal(y, v)


@needs_numba
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 4, 8, 20, 32, 100, 700])
def test_a_pass_over_rows(dtype, columns, rng):
    kernel = logistic(dtype, columns)
    for rows in (0, 1, 7, 64, 65, 1031, 300_007 // columns):
        x = rng.standard_normal((rows, columns + 3)).astype(dtype)[:, 2 : columns + 2]
        w = (rng.standard_normal((columns, 2)) / columns**0.5).astype(dtype)[:, 0]
        y = (rng.random((rows, 3)) < 0.5).astype(dtype)[:, 1]
        for a in (x, w, y):
            a.flags.writeable = False
        for matrix in (x, x.copy()):  # short rows without gaps are read several at once
            check_pass(kernel, [matrix], [w], [y], [], 3e-7 if dtype == SINGLE else 1e-14)


@needs_numba
def test_a_pass_with_several_matrices_products_and_dtypes(rng):
    rows, dtype = 2017, SINGLE
    z = [scalar.argument(k, t) for k, t in enumerate((SINGLE, SINGLE, SINGLE, DOUBLE))]
    label, mask, weight = (scalar.argument(4 + k, t) for k, t in enumerate(("int64", "bool", SINGLE)))
    number, whole = scalar.argument(7, DOUBLE, weak=True), scalar.argument(8, "int64")
    e = S.where(mask, z[0] * S.tanh(z[1]) + z[2], z[3].astype(SINGLE) * number) * (label == whole).astype(SINGLE)
    back = ((0, e), (0, z[1] * weight), (1, z[3] * e), (0, mask), (0, z[3]))
    matrices = (("<f4", 11), ("<f8", 40))
    columns = ("<i8", "|b1", "<f4")
    sums = (e * e, mask, label)
    kernel = RowPass(matrices, (0, 0, 0, 1), columns, ("<f8", "<i8"), sums, back, (e > 0, label + 1, e))
    x, v = rng.standard_normal((rows, 11)).astype(SINGLE), rng.standard_normal((rows, 40))
    weights = [*(rng.standard_normal((3, 11)) / 4).astype(SINGLE), rng.standard_normal(40) / 7]
    data = [rng.integers(0, 3, rows), rng.random(rows) < 0.5, np.broadcast_to(np.ones((), dtype), (rows,))]
    check_pass(kernel, [x, v], weights, data, [1.5, np.array(2)], 1e-6)


@needs_numba
def test_sixteen_products_with_one_matrix(rng):
    z = [scalar.argument(k, SINGLE) for k in range(16)]
    largest = z[0]
    for other in z[1:]:
        largest = S.maximum(largest, other)
    total = S.exp(z[0] - largest)
    for other in z[1:]:
        total = total + S.exp(other - largest)
    back = tuple((0, S.exp(k - largest) / total) for k in z)
    kernel = RowPass((("<f4", 24),), (0,) * 16, (), (), (largest + S.log(total),), back)
    x = rng.standard_normal((999, 24)).astype(SINGLE)
    check_pass(kernel, [x], list((rng.standard_normal((16, 24)) / 5).astype(SINGLE)), [], [], 1e-6)


@needs_numba
def test_a_row_that_is_not_finite_shows():
    x, y = np.ones((100, 8), SINGLE), np.zeros(100, SINGLE)
    x[99, 7] = np.nan
    sums, (back,) = cpu_code.row_pass(logistic(SINGLE, 8))([x], [x[0]], [y], [], [np.empty(100, SINGLE)], 1)
    assert np.isnan(sums[0])
    assert np.isnan(back).all()


@needs_numba
def test_what_is_not_for_it_is_declined():
    half, big = scalar.argument(0, "float16"), scalar.argument(0, ">f4")
    whole = scalar.argument(0, "int64")
    assert cpu_code.loop(Loop((("full", "<f2"),), (half * 2,))) is None
    assert cpu_code.loop(Loop((("full", ">f4"),), (big,))) is None
    assert cpu_code.loop(Loop((("full", "<i8"),), (whole**whole,))) is None
    assert cpu_code.row_pass(RowPass((("<f2", 3),), (0,), (), (), (half,), ())) is None
    assert cpu_code.row_pass(RowPass((("<f4", 100_000),), (0,), (), (), (scalar.argument(0, SINGLE),), ())) is None
    assert cpu_code.row_pass(RowPass((("<f4", 3),), (0,) * 17, (), (), (scalar.argument(0, SINGLE),), ())) is None


# ------------------------------------------------------------------------------------------- machine code, threads


@needs_numba
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the names of registers are x86's")
@pytest.mark.parametrize("kernel", [logistic(SINGLE, 32), logistic(DOUBLE, 200)], ids=["float32", "float64"])
def test_kernels_use_the_widest_registers_and_call_nothing(kernel, monkeypatch):
    monkeypatch.setattr(cpu_build, "_folder", lambda: None)
    monkeypatch.setattr(cpu_build, "_built", {})
    entries = []
    real = cpu_build.build
    monkeypatch.setattr(cpu_build, "build", lambda *args: entries.append(real(*args)) or entries[-1])
    cpu_code.row_pass(kernel)
    code = cpu_build.machine_code(entries[0])
    name = {64: "zmm", 32: "ymm", 16: "xmm"}[cpu_build.register()]
    fused = [line for line in code.splitlines() if "vfm" in line or "vfnm" in line]
    if cpu_build.register() > 16:
        assert sum(name in line for line in fused) > 20
    for function in ("exp", "log"):
        assert not [line for line in code.splitlines() if "call" in line and function in line]


@needs_numba
def test_the_pool_may_run_kernels_that_use_the_pool(rng):
    kernel = logistic(SINGLE, 32)
    run = cpu_code.row_pass(kernel)
    x, y = rng.standard_normal((60_000, 32)).astype(SINGLE), np.ones(60_000, SINGLE)
    wanted = run([x], [x[0]], [y], [], [np.empty_like(y)], 1)[0]
    jobs = [cpu_code.pool(2).submit(run, [x], [x[0]], [y], [], [np.empty_like(y)], 2) for _ in range(6)]
    assert [job.result(60)[0] for job in jobs] == [wanted] * 6


@needs_numba
def test_threads_that_want_the_same_kernel_share_it(monkeypatch):
    monkeypatch.setattr(cpu_build, "_built", {})
    monkeypatch.setattr(cpu_build, "_folder", lambda: None)
    x = scalar.argument(0, SINGLE)
    loop = Loop((("full", SINGLE.str),), (x * 17 + 3,))
    ones = np.ones((1, 100), SINGLE)

    def work(_):
        y = np.empty_like(ones)
        cpu_code.loop(loop)([ones], [y], 1, 1, 100)
        return float(y[0, 50])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(4))) == {20.0}
    assert len(cpu_build._built) == 1


# ----------------------------------------------------------------------------------------------------------- cache

PROGRAM = """
import time
import numpy as np
import sys
import gpugrad
from gpugrad.compile import cpu_build, cpu_code, scalar
from gpugrad.compile.kernels import Loop
assert "numba" not in sys.modules, "numba is imported at import"
x = scalar.argument(0, "float32")
y = np.empty((1, 9), "float32")
compiled = []
with cpu_build.compiling():
    cpu_code.loop(Loop((("full", "<f4"),), (scalar.SYMBOLIC.exp(x) + 5,)))([np.zeros((1, 9), "float32")], [y], 1, 1, 9)
    kernels = cpu_build._batch.kernels
assert (y == 6).all()
print(kernels, time.process_time())
"""


@contextlib.contextmanager
def program(folder):
    """Start another process that compiles a kernel, yield what waits for it: for how many kernels were compiled, and
    the seconds that it took of a processor."""
    env = {**os.environ, "GPUGRAD_CACHE_DIR": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes, env=env, text=True) as process:

        def outcome():
            out, err = process.communicate()
            assert process.returncode == 0, err
            kernels, seconds = out.split()
            return int(kernels), float(seconds)

        try:
            yield outcome
        finally:
            process.kill()


@needs_numba
def test_processes_share_the_cache(tmp_path):
    folder = tmp_path / "new" / "folder"
    with program(folder) as first, program(folder) as second:  # at once, and the folder is yet to be made
        first(), second()
    with program(folder) as third:
        assert third()[0] == 0
    assert not list(folder.glob("*.tmp"))


@needs_numba
@pytest.mark.slow
def test_a_second_process_starts_within_a_second(tmp_path):
    times = []
    for _ in range(4):
        with program(tmp_path) as outcome:
            times.append(outcome()[1])
    assert min(times[1:]) < 1


def kernel_from_cache():
    """Build a kernel and run it; return how many were compiled."""
    x = scalar.argument(0, SINGLE)
    ones, y = np.ones((1, 5), SINGLE), np.empty((1, 5), SINGLE)
    with no_memo(), cpu_build.compiling():
        cpu_code.loop(Loop((("full", SINGLE.str),), (x * 4,)))([ones], [y], 1, 1, 5)
        kernels = cpu_build._batch.kernels
    assert (y == 4).all()
    return kernels


@needs_numba
def test_damaged_files_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUGRAD_CACHE_DIR", str(tmp_path))
    assert [kernel_from_cache() for _ in range(3)] == [1, 0, 0]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(p.suffix for p in files) == [".json", ".nbc", ".nbi", ".py"]
    for path in files:
        data = bytearray(path.read_bytes())
        for damage in (b"", bytes(data[: len(data) // 2]), bytes(data[:-9]) + b"\xff" * 9):
            path.write_bytes(damage)
            assert [kernel_from_cache() for _ in range(2)] == [1, 0], path
        path.unlink()
        assert [kernel_from_cache() for _ in range(2)] == [1, 0], path


@needs_numba
@pytest.mark.parametrize("where", ["read-only", "a file"])
def test_without_a_folder_to_write_to_kernels_are_compiled_all_the_same(where, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    if where == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        if os.name == "nt" or os.getuid() == 0:  # who may write everywhere
            monkeypatch.setattr(cpu_build.tempfile, "TemporaryFile", _refuse)
        folder.chmod(0o500)
    monkeypatch.setenv("GPUGRAD_CACHE_DIR", str(folder))
    with pytest.warns(UserWarning, match="not kept"):
        assert kernel_from_cache() == 1
    folder.chmod(0o700)


def _refuse(**_options):
    raise PermissionError("read-only")


@needs_numba
def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("GPUGRAD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with no_memo():
        assert cpu_build._folder() == tmp_path / "cache" / "gpugrad"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    with no_memo():
        assert cpu_build._folder() == tmp_path / ".cache" / "gpugrad"


@needs_numba
def test_long_compiles_are_told_once(monkeypatch, capsys):
    monkeypatch.setattr(cpu_build, "_folder", lambda: None)
    monkeypatch.setattr(cpu_build, "_built", {})
    x = scalar.argument(0, SINGLE)
    monkeypatch.setattr(cpu_build, "LONG", 0.0)
    with cpu_build.compiling():
        for k in range(2):
            loop = Loop((("full", "<f4"),), (x + k,))
            cpu_build.build(k, functools.partial(cpu_kernels.loop_text, loop, register=16, lanes=8, narrow=False))
    said = capsys.readouterr().err
    assert said.startswith("gpugrad: compiled 2 kernels, kept for this process")
    assert said.count("\n") == 1
    monkeypatch.setattr(cpu_build, "LONG", 60.0)
    with cpu_build.compiling():
        time.sleep(0.01)
    assert capsys.readouterr().err == ""


def test_the_compiler_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("GPUGRAD_JIT", "0")
    assert cpu_code.available() == "GPUGRAD_JIT=0"


def test_a_numba_that_is_missing_broken_or_old_is_no_error(monkeypatch):
    monkeypatch.delenv("GPUGRAD_JIT", raising=False)

    def problem():
        cpu_build._problem.cache_clear()
        return cpu_code.available()

    try:
        monkeypatch.setitem(sys.modules, "numba", type(sys)("numba"))
        sys.modules["numba"].__version__, sys.modules["numba"].__spec__ = "0.60.1", sys.__spec__
        assert "0.62 or newer" in problem()
        monkeypatch.setattr(cpu_build.importlib, "import_module", _broken)
        assert "cannot be imported: broken" in problem()
        monkeypatch.setattr(cpu_build.importlib.util, "find_spec", lambda name: None)
        assert "not installed" in problem()
    finally:
        monkeypatch.undo()
        cpu_build._problem.cache_clear()


def _broken(name):
    raise ImportError("broken")
