"""The numbers of every CUDA kernel: CuPy's own text of it, run on the CPU, against mpmath and exact sums.

Each kernel is judged in each form and data type over a pool of points with |x| <= 85, at special points, for sizes
around a block, and for any layout, in memory where straying is noticed. Faults planted in the text must be found.
"""

import functools
import math
import mmap
from typing import NamedTuple

import numpy as np
import pytest
from cuda_proof import emulator
from devices import problem

import gpugrad as gg
from gpugrad import kernels
from gpugrad.kernels import DOUBLE, HALF, SINGLE, WIDE, Kernel

if missing := emulator.missing() or problem("stand-in"):
    pytest.skip(missing, allow_module_level=True)

import cupy
import mpmath

ROOT = -1.2784645427610738  # of swish', where z * sigma(-z) = -1
EVERY = list(kernels.every())
POINTWISE = [k for k in EVERY if k.kind == "elementwise"]
EPS = {HALF: 2.0**-10, SINGLE: 2.0**-23, DOUBLE: 2.0**-52}

# Relative errors over |x| <= 85 for a beta that multiplies without rounding; of the derivative near its root absolute.
# WORST is for an exponential and logarithm that are off by as much as CUDA documents at the most.
BOUND = {
    "value": {SINGLE: 2e-7, DOUBLE: 3.5e-16},
    "dx": {SINGLE: 8e-7, DOUBLE: 1.5e-15},
    "dx near its root": {SINGLE: 2e-7, DOUBLE: 4e-16},
    "dbeta": {SINGLE: 3e-7, DOUBLE: 6e-16},
    "loss": {SINGLE: 3e-7, DOUBLE: 5e-16},
    "loss between": {SINGLE: 2e-7, DOUBLE: 4e-16},
    "sum": {SINGLE: 3e-7, DOUBLE: 1e-15},
}
WORST = BOUND | {
    "value": {SINGLE: 4.2e-7, DOUBLE: 5e-16},
    "dbeta": {SINGLE: 6e-7, DOUBLE: 9e-16},
    "loss": {SINGLE: 5e-7, DOUBLE: 7e-16},
    "loss between": {SINGLE: 4e-7, DOUBLE: 5e-16},
}


def inputs_of(kernel):
    """Names and types of a pointwise kernel's arrays, without beta and b."""
    return kernels._typed(kernels.POINTWISE[kernel.name].inputs, kernel.dtype)


def outputs_of(kernel):
    return kernels._typed(kernels.POINTWISE[kernel.name].outputs, kernel.dtype)


def has_beta(kernel):
    return bool(kernels.POINTWISE[kernel.name].numbers)


def has_row(kernel):
    return bool(kernels.POINTWISE[kernel.name].rows)


def strided(*dtypes):
    return [k for k in POINTWISE if k.form == "strided" and k.dtype in (dtypes or kernels.DTYPES)]


def named(kernel):
    return f"{kernel.name}-{kernel.form}-{kernel.dtype}"


def pick(name, form="strided", dtype=SINGLE):
    return Kernel(name, form, dtype)


# ------------------------------------------------------------------------------------------------------ running


def launch(kernel, arrays, numbers=(), row=None, *, masked=False, built=None, out=None, **how):
    """Run a pointwise kernel as kernels.py launches its form; returns its outputs.

    arrays: in the order of the kernel's inputs, of one shape. numbers: beta, a number or an array. row: b. masked: for
    those that take the flag.
    """
    built = built or kernel.object()
    wide = WIDE[kernel.dtype]
    values = list(arrays) + ([] if row is None else [row])
    values += [n if isinstance(n, np.ndarray) else wide.type(n) for n in numbers]
    values += [np.int32(masked)] if kernels.POINTWISE[kernel.name].masks else []
    if kernel.form == "strided":
        return emulator.run_elementwise(built, (*values, *(out or ())), **how)
    x = arrays[0]
    beyond = []
    for _, dtype in outputs_of(kernel):
        room = aligned(x.size + 64, dtype)
        room[...] = np.nan
        beyond.append(room)
    outputs = [room[: x.size].reshape(x.shape) for room in beyond]
    size = -(-x.size // kernel.pack)
    emulator.run_elementwise(built, (*values, x.shape[-1], x.size, *outputs), {"size": size}, **how)
    assert all(np.isnan(room[x.size :]).all() for room in beyond), "wrote beyond the end"
    return outputs


def aligned(n, dtype):
    """Return an uninitialised array at an address that is a multiple of 16."""
    room = np.empty(n * dtype.itemsize + 16, np.uint8)
    skip = -room.ctypes.data % 16
    return room[skip : skip + n * dtype.itemsize].view(dtype)


def walled(array):
    """Copy an array to a 16-byte address with a page behind it that nobody may touch."""
    return emulator.guarded(array, align=16)


class Case(NamedTuple):
    """What to give a kernel: arrays in the order of its inputs, numbers, a row."""

    arrays: list
    numbers: tuple
    row: np.ndarray | None

    def take(self, change):
        """Return the case with each array changed."""
        return Case([change(a) for a in self.arrays], self.numbers, self.row)


@functools.cache
def pool(dtype, count=2048):
    """Points in (-85, 85), all of one type: grid, random at many scales, around the root; in no order."""
    rng = np.random.default_rng(7)
    parts = [
        np.linspace(-85, 85, 512),
        rng.normal(size=count - 1152) * 3,
        rng.uniform(-1, 1, 256) * 10.0 ** rng.uniform(-4 if dtype == HALF else -17, 1.9, 256),
        ROOT + rng.uniform(-1, 1, 256) * 10.0 ** rng.uniform(-6, 0, 256),
        rng.uniform(-20, 20, 128),
    ]
    points = rng.permutation(np.clip(np.concatenate(parts), -85, 85)).astype(dtype)
    points.flags.writeable = False
    return points


def case(kernel, x, beta=1.0):
    """Make a case around the points x: cotangents, targets, what forward keeps, biases; beta as the form takes it."""
    rng = np.random.default_rng(x.size)
    wide = WIDE[kernel.dtype]
    if kernel.form == "packed-at":
        beta = np.array(beta, wide)
    elif kernel.form == "packed-row" and not has_row(kernel):
        beta = betas(x.shape[-1], wide)
    arrays = []
    for name, dtype in inputs_of(kernel):
        if name in ("x", "eta"):
            arrays.append(x)
        elif name == "g":
            arrays.append((rng.uniform(0.5, 2, x.shape) * rng.choice([-1, 1], x.shape)).astype(dtype))
        elif name == "m":
            _, s, c, *_ = reference(x, np.broadcast_to(np.asarray(beta, wide), x.shape))
            arrays.append(np.minimum(s, c).astype(dtype))
        elif name == "target":
            kinds = rng.integers(0, 3, x.shape)
            arrays.append(np.where(kinds == 2, rng.uniform(0, 1, x.shape), kinds).astype(dtype))
    row = rng.normal(size=x.shape[-1]).astype(kernel.dtype) if has_row(kernel) else None
    return Case(arrays, (beta,) if has_beta(kernel) else (), row)


def betas(width, wide):
    """One beta a column, each of which multiplies without rounding."""
    return np.resize(np.array([1, 0.5, -1, 0.25, -0.125], wide), width)


# ----------------------------------------------------------------------------------------------------- judging


def reference(x, beta):
    """swish, sigma(z), sigma(-z), d/dx, d/dbeta and softplus at z = beta * x, to 19 digits (long double)."""
    return _reference(x.astype(np.float64).tobytes(), np.asarray(beta, np.float64).tobytes(), x.shape)


@functools.lru_cache(maxsize=64)
def _reference(x, beta, shape):
    results = [[] for _ in range(6)]
    with mpmath.workdps(40):
        for number, factor in zip(np.frombuffer(x), np.frombuffer(beta), strict=True):
            v = mpmath.mpf(float(number))
            z = v * mpmath.mpf(float(factor))
            t = mpmath.exp(-abs(z))
            s, c = 1 / (1 + t), t / (1 + t)
            s, c = (s, c) if z >= 0 else (c, s)
            plus = mpmath.log1p(t) + (z if z > 0 else 0)
            for list_, value in zip(results, (v * s, s, c, s * (1 + z * c), v * s * v * c, plus), strict=True):
                high = float(value)
                list_.append(np.longdouble(high) + np.longdouble(float(value - high)))
    return tuple(np.array(r, np.longdouble).reshape(shape) for r in results)


def assert_near(got, want, allowed, where):
    """Fail where |got - want| > allowed, naming the worst point; NaN is near nothing."""
    error = np.abs(got.astype(np.longdouble) - want)
    excess = np.where(np.isfinite(error), error / np.maximum(allowed, np.finfo(np.float64).tiny), np.inf)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    found = f"{got[worst]!r}, not {float(want[worst])!r}"
    assert excess[worst] <= 1, f"at {where[worst]!r}: {found}: {float(excess[worst]):.3g} times what is allowed"


def tolerance(want, relative, dtype, absolute=0.0):
    """Allow a relative error; in half precision one unit in the last place of the result."""
    if dtype == HALF:
        return np.spacing(np.abs(want).astype(HALF)).astype(np.longdouble)
    return np.maximum(np.abs(want) * relative, absolute)


def judge(kernel, given, outputs, bound=BOUND):
    """Compare a pointwise kernel's outputs with the exact ones."""
    wide, eps = WIDE[kernel.dtype], EPS[WIDE[kernel.dtype]]
    named_inputs = dict(zip((name for name, _ in inputs_of(kernel)), given.arrays, strict=True))
    x = named_inputs.get("x", named_inputs.get("eta"))
    types = [dtype for _, dtype in outputs_of(kernel)]
    assert [o.dtype for o in outputs] == types
    assert all(o.shape == x.shape for o in outputs)
    if kernel.name in ("relu", "relu_backward", "bias_relu", "squared_error"):
        exact = exactly(kernel.name, named_inputs, given.row, wide, kernel.dtype)
        for got, want in zip(outputs, exact, strict=True):
            np.testing.assert_array_equal(got, want, strict=True)
        return
    if kernel.name == "logistic_loss":
        target = named_inputs["target"].astype(wide)
        _, s, c, *_, plus = reference(x, np.ones(x.shape))
        sure = (target == 0) | (target == 1)
        _, _, _, _, _, minus = reference(-x, np.ones(x.shape))
        loss = np.where(target == 1, minus, plus - np.where(sure, 0, np.longdouble(1) * target * x))
        slope = np.where(target == 1, -c, s - target)
        loose = np.where(sure, 0, bound["loss between"][wide]) * np.maximum(1, np.abs(x.astype(np.float64)))
        assert_near(outputs[0], loss, tolerance(loss, bound["loss"][wide], types[0], loose), x)
        assert_near(outputs[1], slope, tolerance(slope, bound["loss"][wide], types[1], loose), x)
        return
    (beta,) = given.numbers
    beta = np.broadcast_to(np.asarray(beta, wide), x.shape)
    v = x.astype(wide) + given.row.astype(wide) if kernel.name == "bias_swish" else x
    value, s, c, dx, dbeta, _ = reference(v, beta)
    g = named_inputs.get("g", np.ones((), wide)).astype(np.longdouble)
    z = v.astype(np.longdouble) * beta
    # The rounding of beta * x is the exponential's argument's, which makes |z| times as much of it.
    rounds = np.where(z == (v.astype(wide) * beta), 0, 4 * (1 + np.abs(z)) * eps)
    product = eps / 2 if "g" in named_inputs else 0
    near = np.abs(z - ROOT) < 1
    for got, (name, dtype) in zip(outputs, outputs_of(kernel), strict=True):
        if name == "y":
            assert_near(got, value, tolerance(value, bound["value"][wide] + rounds, dtype), v)
        elif name == "m":
            want = np.minimum(s, c)
            assert_near(got, want, tolerance(want, bound["value"][wide] + rounds, dtype), v)
        elif name == "dx":
            absolute = np.where(near, np.abs(g) * (bound["dx near its root"][wide] + rounds), 0)
            assert_near(got, g * dx, tolerance(g * dx, bound["dx"][wide] + product + rounds, dtype, absolute), v)
        else:
            assert_near(got, g * dbeta, tolerance(g * dbeta, bound["dbeta"][wide] + product + rounds, dtype), v)


def exactly(name, inputs, row, wide, dtype):
    """What the kernels that round at most once give, by NumPy."""
    x = inputs.get("x")
    if name == "relu":
        return [np.where(x > 0, x, np.where(x != x, x, dtype.type(0)))]
    if name == "relu_backward":
        return [np.where(x > 0, inputs["g"], wide.type(0))]
    if name == "bias_relu":
        v = x.astype(wide) + row.astype(wide)
        return [np.where(v > 0, v, np.where(v != v, v, wide.type(0))).astype(dtype)]
    rest = inputs["eta"].astype(wide) - inputs["target"].astype(wide)
    with np.errstate(over="ignore"):
        return [(rest * rest).astype(dtype), 2 * rest]


def by_elements(kernel, given):
    """What the strided form gives; where a number comes as an array, it is given the number."""
    if kernel.form == "packed-at":
        given = given._replace(numbers=tuple(float(n) for n in given.numbers))
    return launch(kernel._replace(form="strided"), *given)


# ----------------------------------------------------------------------------------------------- every kernel


@pytest.mark.parametrize("kernel", POINTWISE, ids=named)
def test_values(kernel):
    x = pool(kernel.dtype)
    if kernel.form == "packed-row" or has_row(kernel):
        x = x.reshape(-1, 64)
    given = case(kernel, x)
    judge(kernel, given, launch(kernel, *given.take(walled)))


@pytest.mark.parametrize("beta", [-1.3, 0.7, 3.1])
@pytest.mark.parametrize("kernel", [k for k in strided() if has_beta(k)], ids=named)
def test_values_at_any_beta(kernel, beta):
    """The product beta * x is rounded, and an exponential makes |z| units in the last place of that."""
    x = pool(kernel.dtype)[np.abs(pool(kernel.dtype)) < 80 / abs(beta)]
    given = case(kernel, x, WIDE[kernel.dtype].type(beta))
    judge(kernel, given, launch(kernel, *given))


@pytest.mark.parametrize("kernel", strided(SINGLE, DOUBLE), ids=named)
def test_values_with_cudas_worst_rounding(kernel):
    """Exponential and logarithm as far off as CUDA's documentation allows them to be."""
    given = case(kernel, pool(kernel.dtype))
    judge(kernel, given, launch(kernel, *given, worst=True), WORST)


@pytest.mark.parametrize("kernel", [k for k in POINTWISE if k.form != "strided"], ids=named)
def test_forms_give_the_same_bits(kernel):
    x = pool(kernel.dtype).reshape(-1, 64)
    given = case(kernel, x)
    for a, b in zip(launch(kernel, *given.take(walled)), by_elements(kernel, given), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("kernel", POINTWISE, ids=named)
def test_sizes(kernel):
    """None, one, prime, around a block of 128 threads, and around the elements of a block where each takes a pack."""
    check_sizes(kernel)


def check_sizes(kernel, built=None):
    rows = kernel.form == "packed-row"
    block = 128 * kernel.pack
    for n in (1, 2, 3) if rows else (0, 1, 2, 7, 31, 127, 128, 129, 257, 1009, block - 1, block, block + 1, block + 7):
        if n == 0 and kernel.form != "strided":
            continue
        x = pool(DOUBLE)[: n * kernel.pack if rows else n].astype(kernel.dtype)
        x = np.stack([x, x[::-1], x]) if rows else x
        given = case(kernel, x)
        want = by_elements(kernel, given)
        got = launch(kernel, *given.take(walled), built=built, reverse=True)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


LAYOUTS = {
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "every other": lambda a: np.repeat(np.repeat(a, 2, axis=0), 3, axis=1)[::2, ::3],
    "backwards": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "off by one element": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
    "one row for all": lambda a: np.broadcast_to(a[:1], a.shape),
    "one column for all": lambda a: np.broadcast_to(a[:, :1], a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", strided(), ids=named)
def test_layouts(kernel, layout):
    """Inputs in a layout, outputs in the order of another; the numbers are those of the elements."""
    x = pool(kernel.dtype)[: 37 * 23].reshape(37, 23)
    given = case(kernel, x)
    turned = given.take(LAYOUTS[layout])
    want = launch(kernel, *turned.take(np.ascontiguousarray))
    out = [LAYOUTS["transposed"](np.empty(w.shape, w.dtype)) for w in want]
    for a, b in zip(launch(kernel, *turned, out=out), want, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("kernel", strided(SINGLE), ids=named)
def test_three_axes_no_axes_and_64_bit_indices(kernel):
    x = pool(kernel.dtype)[: 4 * 5 * 6].reshape(4, 5, 6)
    given = case(kernel, x)
    want = launch(kernel, *given)
    mixed = given._replace(arrays=[a.swapaxes(k % 2, 2).copy().swapaxes(k % 2, 2) for k, a in enumerate(given.arrays)])
    for wide in (False, True):
        for a, b in zip(launch(kernel, *mixed, wide=wide), want, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
    none = given.take(lambda a: a[1, 2, 3])._replace(row=None if given.row is None else given.row[3])
    none = none.take(np.asarray)._replace(row=None if none.row is None else np.asarray(none.row))
    for a, b in zip(launch(kernel, *none), want, strict=True):
        assert a.shape == ()
        assert a == b[1, 2, 3]


@pytest.mark.parametrize("form", ["strided", "packed"])
def test_beyond_2_to_the_31_elements(form):
    """The last block over 2**31 and some elements of float16."""
    n = 2**31 + 1013
    x, y = sparse(n, np.float16), sparse(n, np.float16)
    x[-20:] = np.linspace(-4, 4, 20)
    kernel = pick("swish", form, HALF)
    want = launch(pick("swish", "strided", HALF), [np.array(x[-20:])], (1.5,))[0]
    if form == "strided":
        blocks, arguments, size = -(-n // 128), (x, np.float32(1.5), y), {}
    else:
        packs = -(-n // kernel.pack)
        blocks, arguments, size = -(-packs // 128), (x, np.float32(1.5), n, n, y), {"size": packs}
    emulator.run_elementwise(kernel.object(), arguments, size, blocks=(blocks - 1, blocks))
    np.testing.assert_array_equal(y[-20:], want)


def sparse(n, dtype):
    """Return zeros of which only the pages that are touched take memory."""
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    memory = mmap.mmap(-1, n * np.dtype(dtype).itemsize, flags=lazily)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype)


# --------------------------------------------------------------------------------------------- special points

TINY = {HALF: 6e-8, SINGLE: 1e-40, DOUBLE: 1e-310}  # subnormal: of float32 zero on the device, of the others not


def special(kernel, *arrays, masked=False):
    """Launch with plain lists of numbers, beta = 1."""
    typed = [np.array(a, dtype) for a, (_, dtype) in zip(arrays, inputs_of(kernel), strict=True)]
    return launch(kernel, typed, (1.0,) if has_beta(kernel) else (), masked=masked)


def assert_same(got, want):
    """Same numbers and same signs, of zeros too; NaN where NaN."""
    want = np.array(want, got.dtype)
    np.testing.assert_array_equal(got, want)
    real = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[real]), np.signbit(want[real]))


@pytest.mark.parametrize("form", ["strided", "packed"])
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_relu_at_special_points(dtype, form):
    tiny = TINY[dtype]
    x = [0.0, -0.0, np.inf, -np.inf, np.nan, tiny, -tiny, 1, -1]
    kept = 0.0 if dtype == SINGLE else tiny
    (y,) = special(pick("relu", form, dtype), x)
    assert_same(y, [0.0, 0.0, np.inf, 0.0, np.nan, kept, 0.0, 1, 0.0])
    for g in (3.0, np.inf, np.nan):
        gs = [g] * len(x)
        (dx,) = special(pick("relu_backward", form, dtype), gs, x)
        assert_same(dx, [0.0, 0.0, g, 0.0, 0.0, 0.0 if dtype == SINGLE else g, 0.0, g, 0.0])


@pytest.mark.parametrize("form", ["strided", "packed", "packed-at"])
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_swish_at_special_points(dtype, form):
    big = float(np.finfo(dtype).max)
    x = [0.0, -0.0, np.inf, -np.inf, np.nan, big, -big, 88.0, 104.0, 1000.0, -1000.0]
    numbers = (np.array(1.0, WIDE[dtype]),) if form == "packed-at" else (1.0,)
    one = np.ones(len(x))

    def run(name, *others):
        spec = kernels.POINTWISE[name]
        given = {"x": np.array(x), "g": one, "m": m if name == "swish_backward_kept" else None}
        types = kernels._typed(spec.inputs, dtype)
        with np.errstate(over="ignore"):
            return launch(pick(name, form, dtype), [given[n].astype(d) for n, d in types], numbers)

    limits = [0.0, -0.0, np.inf, -0.0, np.nan, big, -0.0, 88.0, 104.0, 1000.0, -0.0]
    assert_same(*run("swish"), limits)
    y, m = run("swish_keep")
    assert_same(y, limits)
    assert m[2] == m[3] == m[6] == 0
    assert np.isnan(m[4])
    slopes = [0.5, 0.5, 1, 0, np.nan, 1, 0, 1, 1, 1, 0]
    for name in ("swish_backward", "swish_backward_kept", "swish_backward_both"):
        dx, *rest = run(name)
        np.testing.assert_allclose(dx, slopes, rtol=EPS[WIDE[dtype]], atol=0)
        if rest:
            assert_same(rest[0][[0, 1, 2, 3, 4]], [0, 0, 0, 0, np.nan])
            assert np.all(np.abs(rest[0][5:]) <= 1e-30)


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_swish_in_its_far_tail(dtype):
    """Where exp(-|z|) is no longer a normal float32, results are zero, of float64 right to the last digits."""
    x = np.array([-88.0, -90.0, -104.0, -120.0, -700.0])
    with np.errstate(over="ignore"):
        (y,) = special(pick("swish", "strided", dtype), x)
        dx, dbeta = special(pick("swish_backward_both", "strided", dtype), np.ones(5), x)
    if dtype == DOUBLE:
        value, *_, slope, across, _ = reference(x, np.ones(5))
        for got, want in ((y, value), (dx, slope), (dbeta, across)):
            assert_near(got, want, np.abs(want) * 1.5e-15, x)
    else:
        assert_same(y, np.full(5, -0.0))
        assert np.all(dx == 0)
        assert np.all(dbeta == 0)


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_swish_of_subnormals(dtype):
    tiny = TINY[dtype]
    x = np.array([tiny, -tiny, 0.0], dtype)
    (y,) = special(pick("swish", "strided", dtype), x)
    dx, dbeta = special(pick("swish_backward_both", "strided", dtype), np.ones(3), x)
    assert_same(y, [0.0, -0.0, 0.0] if dtype == SINGLE else x / 2)
    np.testing.assert_allclose(dx, 0.5, rtol=1e-7)
    assert np.all(np.abs(dbeta) <= 1e-14)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_swish_slope_at_its_root_and_greatest(dtype):
    x = np.array(
        [np.nextafter(dtype.type(ROOT), 0), dtype.type(ROOT), np.nextafter(dtype.type(ROOT), -2), 2.3993572805], dtype
    )
    for name in ("swish_backward", "swish_backward_both"):
        dx = special(pick(name, "strided", dtype), np.ones(4), x)[0]
        assert_near(dx, reference(x, np.ones(4))[3], np.full(4, BOUND["dx near its root"][dtype] * 1.1), x)
        assert abs(dx[3] - 1.0998393201) < 1e-6


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_a_zero_wins_where_masked_and_nowhere_else(dtype):
    x, far = [np.nan, np.inf, -np.inf, 1.0], [-np.inf, -np.inf]
    for name in ("swish_backward", "swish_backward_both"):
        kernel = pick(name, "strided", dtype)
        for result in special(kernel, np.zeros(4), x, masked=True):
            assert np.all(result == 0)
        assert np.isnan(special(kernel, np.zeros(4), x)[0]).tolist() == [True, False, False, False]
        assert np.all(special(kernel, [np.inf, np.nan], far, masked=True)[0] == 0)
        assert np.all(np.isnan(special(kernel, [np.inf, np.nan], far)[0]))
    kernel = pick("swish_backward_kept", "packed", dtype)
    assert special(kernel, [0.0, np.inf], [1.0, -np.inf], [np.nan, 0.0], masked=True)[0].tolist() == [0, 0]
    assert np.all(np.isnan(special(kernel, [0.0, np.inf], [1.0, -np.inf], [np.nan, 0.0])[0]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_a_zero_wins_in_the_sums_where_masked(stand_in, dtype, masked):
    wide = WIDE[dtype]
    g = stand_in.asarray(np.array([[0, np.inf], [1, 1]], wide))
    x = stand_in.asarray(np.array([[np.nan, -np.inf], [0.5, 0.5]], dtype))
    b = stand_in.zeros(2, dtype=dtype)
    slope = 0.5 * (1 + np.tanh(0.25)) * (1 + 0.5 / (1 + np.exp(0.5)))
    for dx, total in (
        kernels.swish_backward_sum(g, x, stand_in.ones(2, dtype=wide), masked),
        kernels.bias_swish_backward(g, x, b, 1.0, masked),
    ):
        np.testing.assert_allclose(dx.get()[1], slope, rtol=1e-6)
        assert np.isnan(dx.get()[0]).tolist() == [not masked] * 2
        assert np.isnan(total.get()).tolist() == [not masked] * 2


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_losses_at_special_points(dtype):
    eta, target = [np.inf, -np.inf, np.inf, -np.inf, np.nan, 0, 0], [1, 0, 0, 1, 1, 0, 1]
    loss, slope = special(pick("logistic_loss", "strided", dtype), eta, target)
    np.testing.assert_array_equal(loss[:5], [0, 0, np.inf, np.inf, np.nan])
    np.testing.assert_array_equal(slope[:5], [0, 0, 1, -1, np.nan])
    np.testing.assert_allclose(loss[5:], np.log(2), rtol=2 * EPS[dtype])
    np.testing.assert_array_equal(slope[5:], [0.5, -0.5])
    loss, slope = special(pick("squared_error", "strided", dtype), [3, np.inf, np.nan], [1, 0, 0])
    np.testing.assert_array_equal(loss, [4, np.inf, np.nan])
    np.testing.assert_array_equal(slope, [4, np.inf, np.nan])


# ------------------------------------------------------------------------------------------------------- sums

SHAPES = [(1, 1), (1, 7), (7, 1), (31,), (3, 257), (257, 3), (130, 8), (1009, 5), (5, 1009), (33, 64), (2, 3, 48)]
SHAPES += [(9000, 4), (2, 2056)]


@pytest.fixture
def strict(monkeypatch):
    """Let raw kernels run in memory where straying is noticed; call what is given to run threads the other way."""
    real, how = emulator.run_raw, {"reverse": False}

    def run(source, name, grid, block, args, **kwargs):
        inside = [walled(a) if isinstance(a, np.ndarray) and a.dtype.names is None else a for a in args]
        real(source, name, grid, block, inside, **kwargs, **how)
        for a, b in zip(args, inside, strict=True):
            if b is not a:
                a[...] = b

    monkeypatch.setattr(emulator, "run_raw", run)
    return how


def sums_of(stand_in, name, dtype, shape, beta=None, seed=0):
    """Launch a summing kernel on random data; returns what it was given, dx and the sums, on the host."""
    rng = np.random.default_rng(seed)
    wide = WIDE[dtype]
    x = (rng.normal(size=shape) * 4).astype(dtype)
    g = (rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)).astype(wide)
    b = rng.normal(size=shape[-1]).astype(dtype)
    put = stand_in.asarray
    if name == "swish":
        on_device = put(beta) if isinstance(beta, np.ndarray) else beta
        dx, total = kernels.swish_backward_sum(put(g), put(x), on_device)
    elif name == "bias_relu":
        dx, total = kernels.bias_relu_backward(put(g), put(x))
    else:
        dx, total = kernels.bias_swish_backward(put(g), put(x), put(b), beta)
    return g, x, b, dx.get(), total.get()


def exact_sums(terms, axes):
    """Sums and sums of magnitudes of long double terms over all (0) or all but the last axis, in double."""
    flat = terms.reshape(-1, 1 if axes == 0 else terms.shape[-1]).astype(np.float64)
    return (
        np.array([math.fsum(column) for column in flat.T]),
        np.array([math.fsum(np.abs(column)) for column in flat.T]),
    )


def check_sums(got, terms, axes, wide, term=0.0):
    """Compare sums with exact ones of the terms, each of which may have the relative error `term`."""
    want, magnitude = exact_sums(terms, axes)
    allowed = magnitude * (BOUND["sum"][wide] + term)
    assert_near(got.reshape(-1), want.astype(np.longdouble), allowed, np.arange(want.size))


def plain_slopes(g, v, beta):
    """Slopes of swish in x and beta times g, in long double, by the formulas with both tails."""
    v, beta = v.astype(np.longdouble), np.asarray(beta).astype(np.longdouble)
    z = beta * v
    t = np.exp(-np.abs(z))
    s, c = np.where(z >= 0, 1, t) / (1 + t), np.where(z >= 0, t, 1) / (1 + t)
    return g * (s * (1 + z * c)), g * ((v * s) * (v * c))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("beta", ["number", "array", "row"])
def test_swish_backward_with_sums(stand_in, strict, dtype, shape, beta):
    wide = WIDE[dtype]
    values = {
        "number": 0.5,
        "array": np.array([0.5], wide),
        "row": betas(shape[-1], wide),
    }[beta]
    g, x, _, dx, total = sums_of(stand_in, "swish", dtype, shape, values)
    factor = np.broadcast_to(np.asarray(values, wide), shape)
    want, terms = plain_slopes(g.astype(np.longdouble), x, factor)
    eps = EPS[wide]
    assert_near(dx, want, np.maximum(np.abs(want) * BOUND["dx"][wide], 2 * BOUND["dx near its root"][wide]) + eps, x)
    assert total.shape == {"number": (), "array": (1,), "row": (shape[-1],)}[beta]
    check_sums(total, terms, 1 if beta == "row" else 0, wide, BOUND["dbeta"][wide])
    again = sums_of(stand_in, "swish", dtype, shape, values)
    strict["reverse"] = True
    other_way = sums_of(stand_in, "swish", dtype, shape, values)
    for run in (again, other_way):
        np.testing.assert_array_equal(run[3], dx)
        np.testing.assert_array_equal(run[4], total)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bias_relu", "bias_swish"])
def test_bias_backward(stand_in, strict, name, dtype, shape):
    wide = WIDE[dtype]
    g, x, b, dx, total = sums_of(stand_in, name, dtype, shape, 0.5)
    if name == "bias_relu":
        want = np.where(x > 0, g, wide.type(0)).astype(np.longdouble)
        np.testing.assert_array_equal(dx, want)
    else:
        v = x.astype(wide) + b.astype(wide)
        want, _ = plain_slopes(g.astype(np.longdouble), v, np.full(v.shape, 0.5))
        near = np.maximum(np.abs(want) * BOUND["dx"][wide], 2 * BOUND["dx near its root"][wide]) + EPS[wide]
        assert_near(dx, want, near, v)
    assert total.shape == (shape[-1],)
    check_sums(total, dx.astype(np.longdouble), 1, wide)
    strict["reverse"] = True
    other_way = sums_of(stand_in, name, dtype, shape, 0.5)
    np.testing.assert_array_equal(other_way[3], dx)
    np.testing.assert_array_equal(other_way[4], total)


@pytest.mark.parametrize("columns", [3, 8])
def test_sums_of_unaligned_arrays(stand_in, strict, columns):
    """Arrays that begin one element into an aligned one go by single elements, to the same numbers."""
    rng = np.random.default_rng(3)
    g, x = (rng.normal(size=1 + 100 * columns).astype("f") for _ in range(2))
    whole = [stand_in.asarray(a[1:].reshape(100, columns)) for a in (g, x)]
    shifted = [stand_in.asarray(a)[1:].reshape(100, columns) for a in (g, x)]
    for left, right in zip(
        kernels.swish_backward_sum(*whole, 1.0), kernels.swish_backward_sum(*shifted, 1.0), strict=True
    ):
        np.testing.assert_allclose(left.get(), right.get(), rtol=1e-6)


def test_sums_beyond_2_to_the_31_elements():
    """The block that has the last row of 2**31 and some float16."""
    kernel = pick("swish_sum_wide", "raw", HALF)
    rows, cols, chunks = 2**28 + 100, 8, kernels.BLOCKS
    g, dx = sparse(rows * cols, np.float32), sparse(rows * cols, np.float32)
    x, partial = sparse(rows * cols, np.float16), np.full((chunks, cols), np.nan)
    g[-cols:], x[-cols:] = np.arange(1, 9), np.linspace(-2, 2, cols)
    block = (rows - 1) // kernels.BLOCK % chunks
    arguments = (g, x, np.uintp(0), np.float32(1), np.int32(0), np.int32(0), dx, partial, rows, cols)
    grid, threads, only = (1, chunks), (kernels.BLOCK,), (block, block + 1)
    emulator.run_raw(kernel.source(), kernel.name, grid, threads, arguments, blocks=only)
    slopes, terms = plain_slopes(np.arange(1, 9), np.array(x[-cols:]), 1.0)
    np.testing.assert_allclose(dx[-cols:], slopes.astype(np.float64), rtol=1e-6)
    np.testing.assert_allclose(partial[block], terms.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_every_raw_kernel_is_run_by_the_tests_above(stand_in, monkeypatch, dtype):
    launched, run = set(), emulator.run_raw
    monkeypatch.setattr(
        emulator, "run_raw", lambda source, name, *a, **k: launched.add(name) or run(source, name, *a, **k)
    )
    for shape in SHAPES[4], SHAPES[9]:
        for name, beta in (
            ("swish", 0.5),
            ("swish", betas(shape[-1], WIDE[dtype])),
            ("bias_relu", None),
            ("bias_swish", 0.5),
        ):
            sums_of(stand_in, name, dtype, shape, beta)
    for make in OPTIMISERS.values():
        make().step([stand_in.ones(3, dtype)], [stand_in.ones(3, WIDE[dtype])])
    assert launched == set(kernels.RAW)


def test_many_rows_of_half_precision_lose_nothing(stand_in):
    """The gradient of a bias is a sum of 70,000 ones: exact, where float16 would stop at 2048."""
    g, y = stand_in.ones((70_000, 1), dtype="f"), stand_in.ones((70_000, 1), dtype="e")
    assert kernels.bias_relu_backward(g, y)[1].get() == [70_000]


# ------------------------------------------------------------------------------------------- optimiser updates

OPTIMISERS = {
    "gradient descent": lambda: gg.optim.GradientDescent(0.1),
    "sgd": lambda: gg.optim.SGD(0.1, weight_decay=0.01),
    "momentum": lambda: gg.optim.SGD(0.1, momentum=0.9),
    "nesterov": lambda: gg.optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "clipped": lambda: gg.optim.SGD(0.1, momentum=0.5, clip_norm=1.0),
    "adam": lambda: gg.optim.Adam(0.1),
    "adamw": lambda: gg.optim.AdamW(0.1, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6),
    "adam clipped": lambda: gg.optim.Adam(0.1, clip_norm=1.0),
}


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_updates_are_those_of_the_cpu(stand_in, optimiser, dtype):
    """Parameters around a block's share of 2,048 elements, and none; three steps."""
    rng = np.random.default_rng(11)
    shapes = [(1,), (31,), (0,), (2047,), (2048,), (2049,), (3, 5), (), (5000,)]
    start = [rng.normal(size=s).astype(dtype) for s in shapes]
    check_updates(stand_in, OPTIMISERS[optimiser], start, rng, dtype)


def test_updates_of_more_parameters_than_one_launch_takes(stand_in):
    rng = np.random.default_rng(12)
    start = [rng.normal(size=1 + k % 7).astype("f") for k in range(2 * kernels.MANY + 3)]
    launches = stand_in.launches
    check_updates(stand_in, OPTIMISERS["momentum"], start, rng, SINGLE)
    assert stand_in.launches > launches


def check_updates(stand_in, make, start, rng, dtype):
    here, there = make(), make()
    exact = make()
    host, card = [a.copy() for a in start], [stand_in.asarray(a) for a in start]
    wide = [a.astype(np.float64) for a in start]
    for _ in range(3):
        grads = [np.asarray(rng.normal(size=a.shape)).astype(WIDE[dtype]) for a in start]
        host = here.step(host, grads)
        wide = exact.step(wide, [g.astype(np.float64) for g in grads])
        before = [a.get() for a in card]
        card = there.step(card, [stand_in.asarray(g) for g in grads])
        assert all(np.array_equal(a, b) for a, b in zip(before, [c.get() for c in card], strict=True) if a.size == 0)
    for a, b, c, first in zip(host, card, wide, start, strict=True):
        b = b.get()
        assert b.dtype == dtype
        assert b.shape == first.shape
        # rounding of three steps, each of which is about 0.1 in size
        near = 4 * EPS[dtype] * (np.abs(c) + 1) if dtype == HALF else 8 * EPS[dtype] * (np.abs(c) + 1)
        assert np.all(np.abs(b.astype(np.float64) - c) <= near)
        assert np.all(np.abs(b.astype(np.float64) - a) <= 2 * near)


# ------------------------------------------------------------------------------------------------ planted faults


def planted(kernel, old, new):
    """Build a pointwise kernel with a piece of its text replaced; fails if the text has not that piece."""
    inputs, outputs, body = kernel.operation()
    before = kernel.source()
    assert (before + body).count(old) >= 1, f"nothing to replace: {old!r}"
    name = f"planted_{kernel.name}_{kernel.form}".replace("-", "_")
    return cupy.ElementwiseKernel(
        inputs, outputs, body.replace(old, new), name, preamble=before.replace(old, new), options=kernel.options
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("first + 4 <= count", "first < count"),
        ("e < count", "e < count - 1"),
        ("e = first;", "e = first + 1;"),
        ("(long long)i * 4", "(long long)i * 4 + 1"),
        ("&x_[first]", "&x_[first + 4]"),
    ],
    ids=["tail as a whole pack", "tail too short", "tail too late", "pack off by one", "next pack"],
)
def test_planted_wrong_index_is_found(old, new):
    kernel = pick("swish", "packed")
    check_sizes(kernel)
    with pytest.raises((AssertionError, emulator.KernelFault)):
        check_sizes(kernel, planted(kernel, old, new))


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("name", ["swish_backward", "swish_backward_both"])
def test_planted_slope_without_its_tail_is_found(name, dtype):
    """s * (1 - s) in place of s * sigma(-z)."""
    kernel = pick(name, dtype=dtype)
    given = case(kernel, pool(dtype))
    judge(kernel, given, launch(kernel, *given))
    wrong = planted(kernel, "c = (z >= 0 ? t : A(1)) / sum;", "c = 1 - s;")
    with pytest.raises(AssertionError, match="times what is allowed"):
        judge(kernel, given, launch(kernel, *given, built=wrong))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("swish", "exponential(-magnitude(z))", "exponential(-z)"),
        ("relu", "x > 0 ? x : x != x ? x : A(0)", "x * A(x > 0)"),
        ("relu_backward", "x > 0 ? g", "x >= 0 ? g"),
        ("swish", "s == 0 ? copysign(A(0), x) : x * s", "x * s"),
        ("swish_backward_both", "(v * of.s) * (v * of.c)", "x * x * of.s * of.c"),
    ],
)
def test_planted_formula_without_its_limits_is_found(name, old, new):
    kernel = pick(name)
    points = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -100.0, 3e38, -3e38, 1.0], "f")
    g = np.ones(points.size, "f")
    numbers = (1.0,) if kernels.POINTWISE[name].numbers else ()
    arrays = [g, points] if len(kernels.POINTWISE[name].inputs) == 2 else [points]
    right = launch(kernel, arrays, numbers)
    wrong = launch(kernel, arrays, numbers, built=planted(kernel, old, new))
    differs = [not np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(wrong, right, strict=True)]
    assert any(differs)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    __syncthreads();\n", ""),
        ("row < rows;", "row + 1 < rows;"),
        ("at.line + half < at.down", "at.line + half <= at.down"),
        ("blockIdx.y * cols + at.column + k", "blockIdx.y + at.column + k"),
    ],
    ids=["no barrier", "last row left out", "a line too many", "partial sums in a wrong place"],
)
def test_planted_fault_in_a_sum_is_found(stand_in, strict, monkeypatch, old, new):
    text = kernels.source("swish_sum.cu")
    assert text.count(old) == 1
    found = []
    for planted_text in (text, text.replace(old, new)):
        monkeypatch.setattr(kernels, "source", lambda name, t=planted_text: t if name == "swish_sum.cu" else real(name))
        kernels._built.cache_clear()
        found.append(sum_is_wrong(stand_in, strict))
    kernels._built.cache_clear()
    assert found == [False, True]


real = kernels.source


def sum_is_wrong(stand_in, strict):
    """Tell whether a check of the sums fails, for some shape and order of the threads."""
    for shape in [(257, 3), (1009, 5), (600, 64)]:
        row = betas(shape[-1], SINGLE)
        for strict["reverse"] in (False, True):
            try:
                g, x, _, _, total = sums_of(stand_in, "swish", SINGLE, shape, row)
                terms = plain_slopes(g.astype(np.longdouble), x, row)[1]
                check_sums(total, terms, 1, SINGLE, BOUND["dbeta"][SINGLE])
            except (AssertionError, emulator.KernelFault):
                return True
    return False


def long_column(text):
    """Column sum of a million equal numbers by one block: each thread adds 4,096 of them."""
    rows = 256 * 4096
    g, y = np.full(rows, np.float32(1.1)), np.ones(rows, np.float32)
    dx, partial = np.empty_like(g), np.full((1, 1), np.nan)
    emulator.run_raw(text, "bias_relu_narrow", (1, 1), (kernels.BLOCK,), (g, y, dx, partial, rows, 1))
    return abs(partial[0, 0] / (rows * float(np.float32(1.1))) - 1)


def test_threads_fold_their_sums_into_double():
    """Without it, adding equal numbers in float drifts with their count."""
    text = pick("bias_relu_narrow", "raw").source()
    assert long_column(text) <= 4e-6
    planted_text = text.replace("++held == FOLD", "++held == -1")
    assert planted_text != text
    assert long_column(planted_text) > 4e-6
