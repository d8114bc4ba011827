"""Formulas at their edges: tails, limits, points without a derivative, branches not taken, accumulation."""

import math

import mpmath
import numpy as np
import pytest
from devices import host
from devices import test_device_is_there as test_device_is_there
from numpy.testing import assert_allclose, assert_array_equal

import gpugrad as gg

INF, NAN = math.inf, math.nan
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
LONG = np.longdouble


@pytest.fixture
def value(device):
    """A function that computes on the device, and returns on the host: value(f, *arrays)."""
    return lambda function, *arrays: host(
        function(*(a if isinstance(a, (int, float)) else device.put(a) for a in arrays))
    )


@pytest.fixture
def gradients(device):
    """Gradients of sum(g * function) in every argument, by the plain sweep or the recorded one, on the host."""

    def of(function, *arrays, g=1.0, recorded=False):
        tensors = [gg.tensor(device.put(a), requires_grad=True) for a in arrays]
        out = function(*tensors)
        g = device.put(np.broadcast_to(np.asarray(g, out.dtype), out.shape))
        out.backward(g, create_graph=recorded)
        return [None if t.grad is None else t.grad.numpy() for t in tensors]

    return of


@pytest.fixture
def slack(device):
    """What error bounds are multiplied by: CUDA's elementary functions are good to 2 ulp, glibc's to 1."""
    return 2 if device.kind == "cuda" else 1


@pytest.fixture
def slope(gradients):
    """The first of the gradients."""
    return lambda function, *arrays, **options: gradients(function, *arrays, **options)[0]


both = pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
float_dtypes = pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])


# --- swish and sigmoid: error bounds ----------------------------------------------------------------------


def exact(name, x, beta, *, digits=50):
    """Value and slopes by mpmath, rounded once to long double by way of two doubles."""
    with mpmath.workdps(digits):
        values = []
        for xi, bi in zip(x, beta, strict=True):
            a, b = mpmath.mpf(float(xi)), mpmath.mpf(float(bi))
            z = a * b
            s, c = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
            values.append(
                {
                    "value": a * s,
                    "dx": s * (1 + z * c),
                    "dbeta": a * a * s * c,
                    "sigmoid": s,
                    "dsigmoid": b * s * c,
                    "softplus": mpmath.log1p(mpmath.exp(z)),
                    "log_sigmoid": -mpmath.log1p(mpmath.exp(-z)),
                    "xx": b * s * c * (2 + z * (c - s)),
                    "xb": a * s * c * (2 + z * (c - s)),
                    "bb": a**3 * s * c * (c - s),
                }[name]
            )
        high = [float(v) for v in values]
        rest = [float(v - h) for v, h in zip(values, high, strict=True)]
    return np.array(high, LONG) + np.array(rest, LONG)


# Relative, off the root of the slope. Four roundings and an exponential good to 2.5 ulp (float32) or 1 ulp (float64).
BOUNDS = {
    "float32": {"value": 3e-7, "dx": 8e-7, "dbeta": 5e-7},
    "float64": {"value": 4.5e-16, "dx": 1.5e-15, "dbeta": 8e-16},
}
ROOT = -1.2784645428  # of the slope of swish in z


def ordinary_points(dtype):
    """x within 79 either side: the range of the fast path."""
    x = np.concatenate([np.linspace(-79, 79, 400), np.linspace(-6, 6, 200), [1e-3, -1e-3, 1e-30, 0.0]])
    return x[np.abs(x - ROOT) > 0.3].astype(dtype)


def extreme_points(dtype):
    """x as far as 85, which the fast path leaves alone, with the ordinary ones among them."""
    return np.concatenate([np.array([-85, -84.3, -81.7, 81.1, 84.9, 85]).astype(dtype), ordinary_points(dtype)])


def relative_errors(got, want):
    want = np.asarray(want, LONG)
    error = np.abs(np.asarray(got).astype(LONG) - want)
    # the relative error of a subnormal result means nothing
    return error / np.maximum(np.abs(want), np.finfo(np.asarray(got).dtype).tiny)


@both
@pytest.mark.parametrize("points", [ordinary_points, extreme_points])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("quantity", ["value", "dx", "dbeta"])
def test_swish_error_bounds(quantity, dtype, points, recorded, gradients, device, slack):
    x = points(dtype)
    beta = np.ones_like(x)
    bound = BOUNDS[dtype][quantity] * slack
    if quantity == "value":
        there = device.put(beta)
        tensor = gg.tensor(device.put(x), requires_grad=recorded)
        for got in (gg.swish(device.put(x), there), gg.swish(tensor, there), gg.silu(tensor)):
            assert got.dtype == dtype
            assert np.max(relative_errors(host(got), exact(quantity, x, beta))) <= bound
        return
    got = gradients(gg.swish, x, beta, recorded=recorded)[quantity == "dbeta"]
    assert got.dtype == dtype
    assert np.max(relative_errors(got, exact(quantity, x, beta))) <= bound


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swish_with_another_beta(dtype, recorded, rng, gradients, value, slack):
    """In ulps: at most 4 (1 + |z|), since rounding z moves exp(z) by |z| eps."""
    x = rng.uniform(-30, 30, 300).astype(dtype)
    beta = rng.uniform(0.2, 2.5, 300).astype(dtype)
    z = x.astype(float) * beta
    keep = np.abs(z - ROOT) > 0.3
    x, beta, z = x[keep], beta[keep], z[keep]
    allowed = 4 * slack * (1 + np.abs(z)) * EPS[dtype]
    assert np.all(relative_errors(value(gg.swish, x, beta), exact("value", x, beta)) <= allowed)
    dx, dbeta = gradients(gg.swish, x, beta, recorded=recorded)
    assert np.all(relative_errors(dx, exact("dx", x, beta)) <= allowed)
    assert np.all(relative_errors(dbeta, exact("dbeta", x, beta)) <= allowed)


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swish_slope_near_its_root(dtype, recorded, slope, value, slack):
    """Relative error means nothing where the slope crosses zero; the absolute one is bounded."""
    x = np.linspace(ROOT - 0.3, ROOT + 0.3, 101).astype(dtype)
    error = np.abs(slope(gg.silu, x, recorded=recorded).astype(LONG) - exact("dx", x, np.ones_like(x)))
    assert np.max(error) <= 2 * slack * EPS[dtype]
    assert abs(slope(gg.silu, np.array(ROOT), recorded=recorded)) < 1e-10
    assert value(gg.silu, np.array(ROOT)) == pytest.approx(-0.2784645428, abs=1e-10)
    assert slope(gg.silu, np.array(2.3993572805), recorded=recorded) == pytest.approx(1.0998393201, abs=1e-10)


def ulps_half(got, want):
    """Distance to the exact value in units of the last place of float16."""
    want = np.asarray(want, np.float64)
    unit = np.spacing(np.abs(want).astype(np.float16)).astype(np.float64)
    return np.max(np.abs(np.asarray(got, np.float64) - want) / unit)


@both
@pytest.mark.parametrize("beta", [1.0, 0.75])
@pytest.mark.parametrize("quantity", ["value", "dx", "dbeta"])
def test_swish_half(quantity, beta, recorded, gradients, device):
    """float16 is computed in float32 and rounded once: within an ulp."""
    x = np.concatenate([np.linspace(-60, 60, 241), np.linspace(-6, 6, 241)]).astype(np.float16)
    betas = np.full_like(x, beta)
    want = exact(quantity, x, betas)
    if quantity == "value":
        got = gg.swish(gg.tensor(device.put(x), requires_grad=recorded), beta).numpy()
    else:
        got = gradients(gg.swish, x, betas, recorded=recorded)[quantity == "dbeta"]
    assert got.dtype == np.float16
    assert ulps_half(got, want) <= 1


@both
@pytest.mark.parametrize("name", ["sigmoid", "softplus", "log_sigmoid", "tanh", "gelu"])
def test_activations_half(name, recorded, slope, value):
    """Values and slopes in float16 are within an ulp of those in float64."""
    function = getattr(gg, name)
    x = np.linspace(-9, 9, 400).astype(np.float16)
    assert ulps_half(value(function, x), value(function, x.astype(float))) <= 1
    got = slope(function, x, recorded=recorded)
    assert got.dtype == np.float16
    assert ulps_half(got, slope(function, x.astype(float))) <= 1


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["sigmoid", "softplus", "log_sigmoid"])
def test_sigmoid_family_error_bounds(name, dtype, recorded, slope, value, slack):
    x = np.concatenate([np.linspace(-85, 85, 500), np.linspace(-3, 3, 100)]).astype(dtype)
    one = np.ones_like(x)
    slopes = {"sigmoid": "dsigmoid", "softplus": "sigmoid"}
    allowed = 4 * slack * EPS[dtype]
    assert np.max(relative_errors(value(getattr(gg, name), x), exact(name, x, one))) <= allowed
    got = slope(getattr(gg, name), x, recorded=recorded)
    want = exact(slopes[name], x, one) if name in slopes else exact("sigmoid", -x, one)
    assert np.max(relative_errors(got, want)) <= allowed


@pytest.mark.parametrize(("quantity", "first", "second"), [("xx", 0, 0), ("xb", 0, 1), ("xb", 1, 0), ("bb", 1, 1)])
@pytest.mark.parametrize("points", [ordinary_points, extreme_points])
def test_swish_second_order(quantity, first, second, points, device):
    """Second derivatives keep both tails too, over the fast path and the other."""
    x = points("float64")
    beta = np.ones_like(x)
    z = np.abs(x)
    a, b = (gg.tensor(device.put(v), requires_grad=True) for v in (x, beta))
    gg.swish(a, b).sum().backward(create_graph=True)
    once = (a, b)[first].grad
    a.zero_grad()
    b.zero_grad()
    once.sum().backward()
    got = (a, b)[second].grad.numpy()
    want = exact(quantity, x, beta)
    # f_xx, f_xb and f_bb have roots: the error is measured against the terms that cancel there
    s, c = 1 / (1 + np.exp(-z)), np.exp(-z) / (1 + np.exp(-z))
    size = {"xx": 1, "xb": np.abs(x), "bb": np.abs(x) ** 3}[quantity] * s * c * (2 + z)
    assert np.all(np.abs(got.astype(LONG) - want) <= 8e-16 * (1 + z) * size + 1e-300)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_swish_paths_agree(dtype, rng, gradients):
    """The sweep that reuses the forward's exponential gives the numbers of the recorded one, in either range."""
    for scale in (5, 60, 300):
        x = rng.normal(size=500).astype(dtype) * np.dtype(dtype).type(scale)
        beta = np.full(500, 0.75, dtype)
        plain = gradients(gg.swish, x, beta)
        recorded = gradients(gg.swish, x, beta, recorded=True)
        for a, b in zip(plain, recorded, strict=True):
            allowed = 8 * float(np.finfo(dtype).eps) * (1 + np.max(np.abs(x).astype(float)))
            assert_allclose(a.astype(float), b.astype(float), rtol=0, atol=allowed)


@both
@float_dtypes
def test_swish_limits(dtype, recorded, slope, gradients, value):
    x = np.array([-INF, INF, NAN], dtype)
    y = value(gg.silu, x)
    assert_array_equal(y, [-0.0, INF, NAN])
    assert np.signbit(y[0])
    assert_array_equal(slope(gg.silu, x, recorded=recorded), [0, 1, NAN])
    assert_array_equal(gradients(gg.swish, x, np.ones_like(x), recorded=recorded)[1], [0, 0, NAN])


@both
def test_swish_far_out(recorded, gradients, value):
    """Where x*x overflows, and where exp does: no NaN, no warning (warnings are errors here)."""
    big = np.array([-1e300, -1e19, -800.0, 800.0, 1e19, 1e300])
    dx, dbeta = gradients(gg.swish, big, np.ones_like(big), recorded=recorded)
    assert_array_equal(value(gg.silu, big), [-0.0, -0.0, value(gg.silu, np.array(-800.0)), 800.0, 1e19, 1e300])
    assert_array_equal(dx[[0, 1, 4, 5]], [0, 0, 1, 1])
    assert_array_equal(dbeta[[0, 1, 4, 5]], 0)
    single = big[1:5].astype(np.float32) * np.float32(10)
    dx, dbeta = gradients(gg.swish, single, np.ones_like(single), recorded=recorded)
    assert_array_equal(dx, [0, 0, 1, 1])
    assert_array_equal(dbeta, 0)


@both
@float_dtypes
@pytest.mark.parametrize(
    ("name", "values", "slopes"),
    [
        # at -10,000 and 10,000, where exp overflows
        ("sigmoid", [0, 1], [0, 0]),
        ("softplus", [0, 1e4], [0, 1]),
        ("log_sigmoid", [-1e4, 0], [1, 0]),
        ("tanh", [-1, 1], [0, 0]),
        ("gelu", [0, 1e4], [0, 1]),
        ("silu", [0, 1e4], [0, 1]),
        ("elu", [-1, 1e4], [0, 1]),
    ],
)
def test_far_out(name, values, slopes, dtype, recorded, slope, value):
    x = np.array([-1e4, 1e4], dtype)
    function = getattr(gg, name)
    assert_array_equal(value(function, x), np.array(values, dtype))
    assert_array_equal(slope(function, x, recorded=recorded), np.array(slopes, dtype))


@both
@float_dtypes
@pytest.mark.parametrize(
    ("name", "values", "slopes"),
    [
        # at -inf, inf, NaN
        ("sigmoid", [0, 1, NAN], [0, 0, NAN]),
        ("softplus", [0, INF, NAN], [0, 1, NAN]),
        ("log_sigmoid", [-INF, 0, NAN], [1, 0, NAN]),
        ("tanh", [-1, 1, NAN], [0, 0, NAN]),
        ("gelu", [0, INF, NAN], [0, 1, NAN]),
        ("relu", [0, INF, NAN], [0, 1, 0]),
        ("elu", [-1, INF, NAN], [0, 1, NAN]),
        ("exp", [0, INF, NAN], [0, INF, NAN]),
        ("atan", [-math.pi / 2, math.pi / 2, NAN], [0, 0, NAN]),
        ("abs", [INF, INF, NAN], [-1, 1, NAN]),
    ],
)
def test_limits(name, values, slopes, dtype, recorded, slope, value):
    x = np.array([-INF, INF, NAN], dtype)
    function = getattr(gg, name)
    assert_allclose(value(function, x), np.array(values, dtype), rtol=1e-3 if dtype == "float16" else 1e-6)
    assert_array_equal(slope(function, x, recorded=recorded), np.array(slopes, dtype))


@both
@pytest.mark.parametrize("name", ["sigmoid", "softplus", "silu", "log_sigmoid", "tanh", "gelu"])
def test_subnormal_arguments(name, recorded, slope, value):
    """Next to zero the activations are their tangents."""
    tiny = np.array([5e-324, -5e-324, 1e-310, 0.0])
    function = getattr(gg, name)
    near, at = slope(function, tiny, recorded=recorded), slope(function, np.zeros(4), recorded=recorded)
    assert_array_equal(near, at)
    if name in ("tanh", "silu", "gelu"):
        assert_allclose(value(function, tiny), tiny * at, rtol=0, atol=5e-324)


def test_tails_underflow_gradually(slope, value, device):
    """Results in the subnormal range are rounded, not dropped."""
    x = np.array([-720.0, -740.0])
    expected = [float(mpmath.exp(-720)), float(mpmath.exp(-740))]
    for name in ("sigmoid", "softplus"):
        assert_allclose(value(getattr(gg, name), x), expected, rtol=1e-13, atol=5e-324)
        assert_allclose(slope(getattr(gg, name), x), expected, rtol=1e-13, atol=5e-324)
    assert_allclose(value(gg.log_sigmoid, -x), -np.array(expected), rtol=1e-13, atol=5e-324)
    single = np.array([-95.0, -100.0], np.float32)
    if device.kind == "cuda":  # CuPy compiles float32 so that subnormal numbers are zero
        return
    assert_allclose(value(gg.sigmoid, single), np.exp([-95.0, -100.0]), rtol=1e-6, atol=1.5e-45)


def test_gelu_and_ndtr_tails(slope, value):
    with mpmath.workdps(40):
        for x in (-37.0, -20.0, -8.0, -1.0, 0.5, 4.0):
            phi = mpmath.erfc(-mpmath.mpf(x) / mpmath.sqrt(2)) / 2
            density = mpmath.npdf(x)
            # exp(-x*x/2) with x*x rounded is off by x*x/2 eps
            allowed = (4 + x * x) * 2.0**-52
            point = np.array(x)
            from_registry = gg.op.registry["ndtr"].function
            assert value(from_registry, point) == pytest.approx(float(phi), rel=allowed)
            assert slope(from_registry, point) == pytest.approx(float(density), rel=allowed)
            assert value(gg.gelu, point) == pytest.approx(float(x * phi), rel=allowed)
            assert slope(gg.gelu, point) == pytest.approx(float(phi + x * density), rel=2 * allowed)


# --- points without a derivative ---------------------------------------------------------------------------


@both
@float_dtypes
def test_relu(dtype, recorded, slope, value):
    x = np.array([-INF, -1, -0.0, 0.0, 2, INF, NAN], dtype)
    assert_array_equal(value(gg.relu, x), np.array([0, 0, 0, 0, 2, INF, NAN], dtype))
    assert_array_equal(slope(gg.relu, x, recorded=recorded), np.array([0, 0, 0, 0, 1, 1, 0], dtype))


@both
def test_relu_slope_selects(recorded, slope):
    """An infinite or undefined cotangent stays out where the slope is 0, as it would with a branch."""
    x = np.array([-1.0, 0.0, 2.0, 3.0])
    g = np.array([INF, NAN, NAN, INF])
    assert_array_equal(slope(gg.relu, x, g=g, recorded=recorded), [0, 0, NAN, INF])


@both
@pytest.mark.parametrize(
    ("function", "x", "expected"),
    [
        (gg.abs, [0.0, -0.0, -2.0], [0, 0, -1]),
        (gg.sign, [0.0, -2.0, 3.0], [0, 0, 0]),
        (lambda x: gg.clip(x, -1.0, 2.0), [-1.5, -1.0, 0.0, 2.0, 2.5], [0, 1, 1, 1, 0]),
        (lambda x: gg.clip(x, None, 2.0), [1.0, 2.0, 2.5], [1, 1, 0]),
        (lambda x: gg.clip(x, -1.0), [-1.5, -1.0, 7.0], [0, 1, 1]),
        (gg.leaky_relu, [0.0, -1.0, 1.0], [0.01, 0.01, 1]),
        (gg.linalg.norm, [0.0, 0.0, 0.0], [0, 0, 0]),
        (lambda x: gg.linalg.norm(x, ord=1), [0.0, -3.0, 2.0], [0, -1, 1]),
        (lambda x: gg.linalg.norm(x, ord=3), [0.0, 0.0], [0, 0]),
        (lambda x: gg.linalg.norm(x, ord=math.inf), [0.0, 0.0], [0, 0]),
        (lambda x: gg.hypot(x, 0.0), [0.0, 2.0], [0, 1]),
        (gg.max, [1.0, 3.0, 3.0, 2.0], [0, 0.5, 0.5, 0]),
        (gg.min, [1.0, 1.0, 1.0, 2.0], [1 / 3, 1 / 3, 1 / 3, 0]),
        (lambda x: gg.maximum(x, 1.0), [0.0, 1.0, 2.0], [0, 0.5, 1]),
        (lambda x: gg.minimum(x, 1.0), [0.0, 1.0, 2.0], [1, 0.5, 0]),
        (lambda x: x**0, [0.0, 2.0, -1.0], [0, 0, 0]),
        (lambda x: x**0.0, [0.0, 2.0, -1.0], [0, 0, 0]),
        (lambda x: x ** gg.tensor([0.0, 0.0, 0.0], device=x.device), [0.0, 2.0, -1.0], [0, 0, 0]),
        (lambda x: x**1, [0.0, 2.0, -1.0], [1, 1, 1]),
        (lambda x: x**2, [0.0, 2.0, -1.0], [0, 4, -2]),
        (lambda x: x ** gg.tensor([2.0, 3.0, 1.0], device=x.device), [0.0, -2.0, 0.0], [0, 12, 1]),
        (gg.std, [2.0, 2.0, 2.0], [0, 0, 0]),
        (gg.var, [2.0, 2.0, 2.0], [0, 0, 0]),
    ],
    ids=[
        "abs", "sign", "clip", "clip-max", "clip-min", "leaky_relu", "norm", "norm1", "norm3", "norm-inf", "hypot",
        "max", "min", "maximum", "minimum", "x**0", "x**0.0", "x**array(0)", "x**1", "x**2", "x**array", "std", "var",
    ],
)  # fmt: skip
def test_slope_at_a_kink(function, x, expected, recorded, slope):
    assert_array_equal(slope(function, np.array(x), recorded=recorded), expected)


@both
def test_maximum_ties_in_both_arguments(recorded, gradients):
    x, y, g = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]), np.array([10.0, 20.0, 30.0])
    for function, first in ((gg.maximum, [5, 0, 30]), (gg.minimum, [5, 20, 0])):
        dx, dy = gradients(function, x, y, g=g, recorded=recorded)
        assert_array_equal(dx, first)
        assert_array_equal(dx + dy, g)


@both
def test_clip_bounds_get_the_rest(recorded, gradients):
    x, low, high = np.array([-2.0, 0.0, 5.0, 1.0]), np.full(4, -1.0), np.full(4, 1.0)
    dx, dlow, dhigh = gradients(gg.op.registry["clip"].function, x, low, high, recorded=recorded)
    assert_array_equal(dx, [0, 1, 0, 1])
    assert_array_equal(dlow, [1, 0, 0, 0])
    assert_array_equal(dhigh, [0, 0, 1, 0])


def test_clip_keeps_nan_and_integers(value):
    assert_array_equal(value(lambda x: gg.clip(x, 0.0, 1.0), np.array([NAN, 5.0])), [NAN, 1.0])
    assert_array_equal(value(lambda x: gg.clip(x, max=2), np.array([-3, 5])), [-3, 2])
    assert value(lambda x: gg.clip(x, max=2), np.array([-3, 5], np.int8)).dtype == np.int8


@both
def test_pow_slopes(recorded, gradients):
    x, y = np.array([2.0, 0.0, 0.0, -2.0, 3.0]), np.array([3.0, 2.0, 0.0, 2.0, -1.0])
    dx, dy = gradients(gg.pow, x, y, recorded=recorded)
    assert_allclose(dx, [12, 0, 0, -4, -1 / 9], rtol=1e-15)
    assert_allclose(dy, [8 * math.log(2), 0, 0, 0, math.log(3) / 3], rtol=1e-15)


@both
def test_pow_of_a_number(recorded, slope):
    assert_allclose(slope(lambda y: 2.0**y, np.array([3.0, 0.0]), recorded=recorded), [8 * math.log(2), math.log(2)])
    assert_array_equal(slope(lambda y: 0.0**y, np.array([3.0, 0.5]), recorded=recorded), [0, 0])


def test_pow_second_order_at_zero():
    """x**2 has curvature 2 at 0, x**1 and x**0 none, x**3 none."""
    for power, curvature in ((2, 2), (1, 0), (0, 0), (3, 0), (2.0, 2), (np.array(2.0), 2), (np.array(1.0), 0)):
        second = gg.grad(gg.grad(lambda x, power=power: x**power))
        assert second(0.0) == curvature


def test_sqrt_at_zero(slope):
    """The slope there is infinite, and is given so without a warning."""
    assert_array_equal(slope(gg.sqrt, np.array([0.0, 4.0])), [INF, 0.25])


def test_norm_does_not_overflow(slope, value):
    big = np.array([3e200, -4e200])
    assert_allclose(value(gg.linalg.norm, big), 5e200, rtol=1e-15)
    assert_allclose(slope(gg.linalg.norm, big), [0.6, -0.8], rtol=1e-15)
    assert_allclose(value(gg.linalg.norm, np.array([3e-200, 4e-200])), 5e-200, rtol=1e-15)
    assert_allclose(value(gg.linalg.norm, np.array([300.0, 400.0], np.float16)), 500, rtol=1e-3)


# --- branches not taken ----------------------------------------------------------------------------------

BRANCHES = {
    "log": (lambda x: gg.where(x > 0, gg.log(x), 0.0), [0.0, 2.0], [0, 0.5], [0, -0.25]),
    "log-array": (lambda x: gg.where(x > 0, gg.log(x), 0 * x), [0.0, 2.0], [0, 0.5], [0, -0.25]),
    "sqrt": (lambda x: gg.where(x > 0, gg.sqrt(x), 0.0), [0.0, 4.0], [0, 0.25], [0, -1 / 32]),
    "divide": (lambda x: gg.where(x != 0, 1 / x, 0.0), [0.0, 2.0], [0, -0.25], [0, 0.25]),
    "divide-by": (lambda x: gg.where(x != 0, gg.sin(x) / x, 1.0), [0.0, 1e-3], [0, -3.33333e-4], [0, -1 / 3]),
    "other-branch": (lambda x: gg.where(x <= 0, 0.0, gg.log(x)), [0.0, 2.0], [0, 0.5], [0, -0.25]),
    "nested": (
        lambda x: gg.where(x > 0, gg.sqrt(gg.where(x > 1, gg.log(x - 1), x)), 0.0),
        [0.0, 0.25, 1.0],
        [0, 1, 0.5],
        [0, -2, -0.25],
    ),
    "chain": (lambda x: gg.where(x > 0, gg.exp(gg.sqrt(gg.log(x))), 0.0)[1:], [0.0, math.e], [0, 0.5], None),
    "getitem": (lambda x: gg.log(x)[1:], [0.0, 2.0], [0, 0.5], [0, -0.25]),
    "mask": (lambda x: gg.log(x)[[False, True]], [0.0, 2.0], [0, 0.5], [0, -0.25]),
    "take": (lambda x: gg.take(gg.sqrt(x), [1]), [0.0, 4.0], [0, 0.25], [0, -1 / 32]),
    "take-repeated": (lambda x: gg.log(x)[[1, 1]], [0.0, 2.0], [0, 1], [0, -0.5]),
    "maximum": (lambda x: gg.maximum(gg.log(x), -1.0), [0.0, 2.0], [0, 0.5], [0, -0.25]),
    "clip": (lambda x: gg.clip(gg.log(x), -1.0, 5.0), [0.0, 2.0], [0, 0.5], [0, -0.25]),
    "max": (lambda x: gg.max(gg.log(x)), [0.0, 2.0], [0, 0.5], [0, -0.25]),
    "norm": (lambda x: gg.where(x > 0, gg.linalg.norm(x), 0.0), [0.0, 2.0], [0, 1], None),
    "power": (lambda x: gg.where(x > 0, x**-0.5, 0.0), [0.0, 4.0], [0, -0.0625], [0, 0.75 / 32]),
    "xlogx": (lambda x: gg.where(x > 0, x * gg.log(x), 0.0), [0.0, 2.0], [0, 1 + math.log(2)], [0, 0.5]),
    "reshape-sum": (
        lambda x: gg.where((x > 0).reshape((2, 1)), gg.log(x).reshape((2, 1)), 0.0).sum(axis=1),
        [0.0, 2.0],
        [0, 0.5],
        [0, -0.25],
    ),
    "concat": (lambda x: gg.concat([gg.log(x)[1:], x[:1]]), [0.0, 2.0], [1, 0.5], [0, -0.25]),
    "diagonal": (
        lambda x: gg.linalg.diagonal(gg.log(x.reshape((2, 2)))),
        [1.0, 0.0, 0.0, 4.0],
        [1, 0, 0, 0.25],
        [-1, 0, 0, -1 / 16],
    ),
}


@both
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", BRANCHES)
def test_branch_not_taken_gets_exactly_zero(name, recorded, slope):
    function, x, expected, _ = BRANCHES[name]
    if name == "divide-by":
        assert_allclose(slope(function, np.array(x), recorded=recorded), expected, rtol=1e-4)
    else:
        assert_allclose(slope(function, np.array(x), recorded=recorded), expected, rtol=1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", [name for name, row in BRANCHES.items() if row[3] is not None])
def test_branch_not_taken_in_second_order(name, device):
    function, x, _, expected = BRANCHES[name]
    second = gg.grad(lambda x: gg.grad(lambda x: function(x).sum())(x).sum())(device.put(x))
    # sin(x)/x: the terms that cancel are 1e6 times what is left
    assert_allclose(host(second), expected, rtol=1e-6 if name == "divide-by" else 1e-14, atol=0)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_branch_with_gradients_in_the_condition_only(device):
    x = gg.tensor([0.0, 2.0], device=device, requires_grad=True)
    gg.where(x > 1, 2.0, 3.0 * x).sum().backward()
    assert_array_equal(host(x.grad), [3, 0])


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_infinite_slope_stays_where_it_is_taken(device):
    """Masking must not hide a true infinity."""
    x = gg.tensor([0.0, 4.0], device=device, requires_grad=True)
    gg.where(x >= 0, gg.sqrt(x), 0.0).sum().backward()
    assert_array_equal(host(x.grad), [INF, 0.25])


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_branch_shared_with_an_unmasked_use(device):
    """Where the masked value is used elsewhere too, that use counts: log at 0 has an infinite slope."""
    x = gg.tensor([0.0, 2.0], device=device, requires_grad=True)
    y = gg.log(x)
    (gg.where(x > 0, y, 0.0) + y).sum().backward()
    assert_array_equal(host(x.grad), [INF, 1.0])


@both
@pytest.mark.parametrize("condition", [True, False, 1, 0, 1.5, np.True_, np.False_])
def test_where_with_a_constant_condition(condition, recorded, gradients):
    x, y = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    dx, dy = gradients(lambda x, y: gg.where(condition, x, y), x, y, g=[3.0, 5.0], recorded=recorded)
    chosen, other = (dx, dy) if condition else (dy, dx)
    assert_array_equal(chosen, [3, 5])
    assert other is None or not np.any(other)


# --- reductions -----------------------------------------------------------------------------------------


@both
def test_logsumexp_of_infinities(recorded, slope, value):
    nothing = np.full(3, -INF)
    assert value(gg.logsumexp, nothing) == -INF
    assert_array_equal(slope(gg.logsumexp, nothing, recorded=recorded), [0, 0, 0])
    some = np.array([-INF, 1.0, 1.0])
    assert value(gg.logsumexp, some) == pytest.approx(1 + math.log(2), rel=1e-15)
    assert_allclose(slope(gg.logsumexp, some, recorded=recorded), [0, 0.5, 0.5], rtol=1e-15)
    all_of_it = np.array([1.0, INF, 0.0])
    assert value(gg.logsumexp, all_of_it) == INF
    assert_array_equal(slope(gg.logsumexp, all_of_it, recorded=recorded), [0, 1, 0])
    table = np.array([[-INF, -INF], [0.0, 0.0]])
    assert_allclose(value(lambda x: gg.logsumexp(x, axis=1), table), [-INF, math.log(2)], rtol=1e-15)
    got = slope(lambda x: gg.logsumexp(x, axis=1), table, recorded=recorded)
    assert_allclose(got, [[0, 0], [0.5, 0.5]], rtol=1e-15)


def test_logaddexp_of_infinities(gradients, value):
    x, y = np.array([-INF, -INF, INF]), np.array([-INF, 1.0, 1.0])
    assert_array_equal(value(gg.logaddexp, x, y), [-INF, 1, INF])
    dx, dy = gradients(gg.logaddexp, x, y)
    assert np.all(np.isfinite(dx))
    assert_array_equal(dx[1:], [0, 1])
    assert_array_equal(dy[1:], [1, 0])


def test_softmax_does_not_overflow(slope, value):
    x = np.array([0.0, 1000.0, 999.0])
    e = 1 / (1 + math.exp(-1))
    assert_allclose(value(gg.softmax, x), [0, e, 1 - e], rtol=1e-14)
    assert_allclose(value(gg.log_softmax, x), [-1000 + math.log(e), math.log(e), math.log(e) - 1], rtol=1e-14)
    assert np.all(np.isfinite(slope(gg.softmax, x, g=[1.0, 2.0, 3.0])))


def test_half_and_single_accumulate_wider(value, device):
    ones = np.ones(70_000, np.float16)
    assert value(gg.mean, ones) == 1
    assert gg.mean(gg.tensor(device.put(ones))).dtype == np.float16
    assert value(gg.sum, np.ones(5000, np.float16)) == 5000  # in half, 2048 + 1 = 2048
    assert value(gg.vecdot, np.ones(5000, np.float16), np.ones(5000, np.float16)) == 5000
    assert value(gg.linalg.norm, np.ones(10_000, np.float16)) == 100
    assert value(gg.cumulative_sum, np.ones(5000, np.float16))[-1] == 5000
    assert value(gg.logsumexp, np.zeros(60_000, np.float16)) == np.float16(math.log(60_000))
    tenth = np.full(10_000_000, 0.1, np.float32)
    exact_sum = 1e7 * float(np.float32(0.1))
    assert value(gg.sum, tenth) == pytest.approx(exact_sum, rel=6e-8)
    assert value(gg.mean, tenth) == pytest.approx(float(np.float32(0.1)), rel=6e-8)


def test_half_variance_does_not_overflow(value):
    """Squares of 300 do not fit float16; their mean does not either, but the variance of 300 +- 5 does."""
    x = np.array([295.0, 305.0] * 500, np.float16)
    assert value(gg.var, x) == 25
    assert value(gg.std, x) == 5
    assert value(gg.var, np.array([0.0, 2.0] * 35_000, np.float16)) == 1


def test_gradient_of_a_broadcast_half_accumulates_wider(device):
    bias = gg.tensor(device.put(np.zeros(1, np.float16)), requires_grad=True)
    many = device.put(np.ones(5000, np.float16))
    (many * (1 + bias)).backward(many)
    assert_array_equal(host(bias.grad), [5000])
    row = gg.tensor(device.put(np.zeros(3, np.float16)), requires_grad=True)
    rows = device.put(np.ones((5000, 3), np.float16))
    (rows + row).backward(rows)
    assert_array_equal(host(row.grad), [5000] * 3)


def test_gradient_of_a_broadcast_single_accumulates_wider(rng, device):
    """The sum over 10**6 rows of a bias gradient is right to float32's own precision."""
    g = rng.uniform(0, 1, 1_000_000).astype(np.float32)
    bias = gg.tensor(device.put(np.zeros((), np.float32)), requires_grad=True)
    (device.put(np.zeros(1_000_000, np.float32)) + bias).backward(device.put(g))
    assert bias.grad.item() == pytest.approx(float(g.sum(dtype=np.float64)), rel=1.2e-7)
    row = gg.tensor(device.put(np.zeros(2, np.float32)), requires_grad=True)
    (device.put(np.zeros((500_000, 2), np.float32)) + row).backward(device.put(g.reshape(-1, 2)))
    assert_allclose(host(row.grad), g.reshape(-1, 2).sum(axis=0, dtype=np.float64), rtol=1.2e-7)


@pytest.mark.parametrize("zeros", [0, 1, 2, 3])
def test_prod_with_zeros(zeros, slope, device):
    """First and second derivatives are the products of the others, whatever is zero."""
    x = np.array([2.0, -3.0, 0.5, 4.0])
    x[:zeros] = 0
    n = len(x)
    others = [np.prod(np.delete(x, i)) for i in range(n)]
    assert_array_equal(slope(gg.prod, x), others)
    assert_array_equal(slope(gg.prod, x, recorded=True), others)
    weights = np.array([1.0, -2.0, 3.0, 0.25])
    there = device.put(weights)
    second = host(gg.grad(lambda x: (gg.grad(gg.prod)(x) * there).sum())(device.put(x)))
    pairs = [sum(weights[i] * np.prod(np.delete(x, [i, j])) for i in range(n) if i != j) for j in range(n)]
    assert_allclose(second, pairs, rtol=1e-14, atol=1e-14)


def test_prod_with_zeros_along_an_axis(slope):
    x = np.array([[0.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    assert_array_equal(slope(lambda x: gg.prod(x, axis=1), x), [[6, 0, 0], [0, 0, 0]])
    assert_array_equal(slope(lambda x: gg.prod(x, axis=0), x), [[4, 0, 0], [0, 2, 3]])


def test_det_of_a_singular_matrix(slope):
    """Cofactors exist where the inverse does not."""
    rank_two = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    cofactors = [[-3, 6, -3], [6, -12, 6], [-3, 6, -3]]
    assert_allclose(slope(gg.linalg.det, rank_two), cofactors, rtol=0, atol=1e-13)
    rank_one = np.outer([1.0, 2.0, 3.0], [1.0, -1.0, 2.0])
    assert_allclose(slope(gg.linalg.det, rank_one), np.zeros((3, 3)), rtol=0, atol=1e-13)
    assert_array_equal(slope(gg.linalg.det, np.zeros((3, 3))), np.zeros((3, 3)))
    assert_allclose(slope(gg.linalg.det, np.zeros((1, 1))), [[1]], rtol=1e-15)


def test_slogdet_does_not_overflow(slope, device):
    x = 1e200 * np.eye(3)
    sign, log = map(host, gg.linalg.slogdet(device.put(x)))
    assert (sign, log) == (1, pytest.approx(600 * math.log(10), rel=1e-14))
    assert_allclose(slope(lambda x: gg.linalg.slogdet(x).logabsdet, x), 1e-200 * np.eye(3), rtol=1e-14)


def test_expm1_and_log1p_near_zero(value):
    x = np.array([1e-12, -1e-12])
    assert_allclose(value(gg.expm1, x), x + x * x / 2, rtol=1e-15)
    assert_allclose(value(gg.log1p, x), x - x * x / 2, rtol=1e-15)


@both
def test_tanh_slope_does_not_vanish_early(recorded, slope):
    x = np.array([20.0, -20.0, 300.0])
    expected = [4 * math.exp(-40), 4 * math.exp(-40), 4 * math.exp(-600)]
    assert_allclose(slope(gg.tanh, x, recorded=recorded), expected, rtol=1e-13)


def test_asin_slope_near_one(slope):
    """(1 - x)(1 + x), not 1 - x*x."""
    x = np.array([1 - 2.0**-40])
    with mpmath.workdps(40):
        expected = float(1 / mpmath.sqrt(1 - mpmath.mpf(float(x[0])) ** 2))
    assert_allclose(slope(gg.asin, x), [expected], rtol=1e-15)
    assert_allclose(slope(gg.acos, x), [-expected], rtol=1e-15)


def test_atan2_does_not_overflow(gradients):
    y, x = np.array([3e200, 3e-200]), np.array([4e200, 4e-200])
    dy, dx = gradients(gg.atan2, y, x)
    assert_allclose(dy, [0.16e-200, 0.16e200], rtol=1e-14)
    assert_allclose(dx, [-0.12e-200, -0.12e200], rtol=1e-14)


def test_backward_does_not_warn(device):
    """An infinite slope is an answer, not a mishap: with warnings as errors, this passes."""
    x = gg.tensor([0.0], device=device, requires_grad=True)
    gg.sqrt(x).sum().backward()
    assert x.grad.item() == INF


def test_forward_keeps_numpys_warnings():
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        gg.log(gg.tensor([0.0]))
