"""The optimisers: on problems with a known minimum, against SciPy, and against PyTorch step by step."""

import importlib
import itertools
import math
import warnings

import numpy as np
import pytest
from cuda_proof import stand_in as machine
from devices import host
from numpy.testing import assert_allclose, assert_array_equal

import gpugrad as gg
from gpugrad import optim
from gpugrad.errors import DeviceMismatch, ShapeMismatch
from gpugrad.optim import first_order
from gpugrad.optim.first_order import Layout
from gpugrad.optim.lbfgs import Point, _Flat, _Memory, strong_wolfe
from gpugrad.tensor import Tensor


def frozen(array):
    """A copy that cannot be written to, so that an optimiser that tries is caught."""
    array = np.array(array)
    array.flags.writeable = False
    return array


# --- problems, with gradients by hand -------------------------------------------------------------------


class Problem:
    """Counts its evaluations and hands out the same gradient buffers every time, as a careful objective may."""

    def __init__(self, dtype="float64"):
        self.dtype, self.calls, self._buffers = dtype, 0, None

    def value_and_grad(self, params):
        self.calls += 1
        value, grads = self.formula(params)
        if self._buffers is None:
            self._buffers = {key: np.empty_like(params[key]) for key in grads}
        for key, grad in grads.items():
            self._buffers[key][...] = grad
        return float(value), dict(self._buffers)

    def start(self):
        return {key: frozen(np.asarray(value, dtype=self.dtype)) for key, value in self.begin.items()}


class Quadratic(Problem):
    """1/2 (w - c)' A (w - c) with eigenvalues from 1 down to 1/kappa in a rotated basis."""

    kappa = 1e2

    def __init__(self, dtype="float64"):
        super().__init__(dtype)
        rng = np.random.default_rng(1)
        q, _ = np.linalg.qr(rng.normal(size=(7, 7)))
        self.a = (q * np.geomspace(1, 1 / self.kappa, 7)) @ q.T
        self.minimum = {"w": rng.normal(size=7)}
        self.begin = {"w": np.zeros(7)}

    def formula(self, params):
        r = params["w"] - self.minimum["w"]
        return r @ self.a @ r / 2, {"w": self.a @ r}


class IllConditioned(Quadratic):
    kappa = 1e6


class Rosenbrock(Problem):
    """Three copies of Rosenbrock's valley, over a pytree of two arrays."""

    begin = {"x": [-1.2, 0.0, 2.0], "y": [[1.0], [0.5], [-1.0]]}  # noqa: RUF012
    minimum = {"x": np.ones(3), "y": np.ones((3, 1))}  # noqa: RUF012

    def formula(self, params):
        x, y = params["x"], params["y"][:, 0]
        gap = y - x * x
        value = np.sum((1 - x) ** 2 + 100 * gap**2)
        return value, {"x": -2 * (1 - x) - 400 * x * gap, "y": 200 * gap[:, None]}


class Logistic(Problem):
    """Mean logistic loss with a ridge penalty; its batches are objectives too."""

    begin = {"w": np.zeros(4), "b": np.zeros(())}  # noqa: RUF012

    def __init__(self, dtype="float64", rows=None):
        super().__init__(dtype)
        rng = np.random.default_rng(2)
        x = rng.normal(size=(101, 4)) * [1, 2, 0.5, 1]
        y = (rng.uniform(size=101) < 1 / (1 + np.exp(-(x @ [1.0, -0.5, 2.0, 0.0] + 0.3)))) * 1.0
        keep = slice(None) if rows is None else rows
        self.x, self.y = x[keep].astype(dtype), y[keep].astype(dtype)
        self.rows = len(self.y)
        self.seeds = []

    def formula(self, params):
        w, b = params["w"], params["b"]
        eta = self.x @ w + b
        share = (np.where(eta > 0, 1, np.exp(eta)) / (1 + np.exp(-np.abs(eta))) - self.y) / self.rows
        value = np.mean(np.logaddexp(0, eta) - self.y * eta) + 0.005 * (w @ w)
        return value, {"w": self.x.T @ share + 0.01 * w, "b": share.sum()}

    def batches(self, batch_size, seed):
        self.seeds.append(seed)
        order = np.random.default_rng(seed).permutation(self.rows)
        for start in range(0, self.rows, batch_size):
            yield type(self)(self.dtype, order[start : start + batch_size])

    @property
    def minimum(self):
        optimize = pytest.importorskip("scipy.optimize", reason="SciPy gives the minimum of the logistic loss")
        rule = Logistic()

        def flat(v):
            value, grads = rule.formula({"w": v[:4], "b": v[4]})
            return value, np.r_[grads["w"], grads["b"]]

        found = optimize.minimize(flat, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-11})
        return {"w": found.x[:4], "b": found.x[4]}


# --- one table: optimisers x problems x dtypes ----------------------------------------------------------


def decaying(step):
    return 0.05 / (1 + step / 200)


# method, options, problem, allowed error of the minimum in float64, and in float32
TABLE = [
    ("lbfgs", {}, Quadratic, 1e-5, 1e-4),
    ("lbfgs", {"tol": 1e-9}, IllConditioned, 2e-3, None),  # |error| <= kappa * tol
    ("lbfgs", {"tol": 1e-9}, Rosenbrock, 1e-8, 1e-5),
    ("lbfgs", {"tol": 1e-9}, Logistic, 1e-7, 1e-4),
    ("gd", {}, Quadratic, 1e-3, 1e-3),
    ("gd", {"tol": 1e-3, "max_iter": 20_000}, Rosenbrock, 1e-2, 1e-2),
    ("gd", {"tol": 1e-9}, Logistic, 1e-6, 1e-2),
    ("gd", {"lr": 1.9, "tol": 1e-5}, Quadratic, 2e-3, 2e-3),
    ("sgd", {"lr": 1.0, "tol": 1e-5, "max_iter": 2000}, Quadratic, 2e-3, 2e-3),
    (optim.SGD, {"lr": 0.2, "momentum": 0.9}, Quadratic, 1e-3, 1e-3),
    (optim.SGD, {"lr": 0.2, "momentum": 0.9, "nesterov": True}, Quadratic, 1e-3, 1e-3),
    (optim.SGD, {"lr": 1e-3, "momentum": 0.9, "clip_norm": 50.0}, Rosenbrock, 3e-2, 3e-2),
    ("adam", {"lr": decaying, "max_iter": 1500}, Quadratic, 1e-3, 1e-3),
    ("adam", {"lr": 0.1, "max_iter": 4000}, Rosenbrock, 5e-2, 5e-2),
    ("adam", {"lr": 0.05}, Logistic, 1e-3, 1e-3),
    (optim.AdamW, {"lr": 0.05, "weight_decay": 0.0}, Logistic, 1e-3, 1e-3),
]


def name_of(value):
    return getattr(value, "__name__", None) or (value if isinstance(value, str) else None)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("method", "options", "problem", "wide", "narrow"), TABLE, ids=name_of)
def test_finds_the_minimum(method, options, problem, wide, narrow, dtype):
    bound = wide if dtype == "float64" else narrow
    if bound is None:
        pytest.skip("a condition number of 1e6 leaves float32 no digits")
    obj = problem(dtype)
    if isinstance(method, str):
        res = optim.minimize(obj, obj.start(), method, **options)
    else:
        res = optim.minimize(obj, obj.start(), method(**options))
    for key, expected in obj.minimum.items():
        assert res.params[key].dtype == dtype
        assert res.params[key].shape == expected.shape
        assert_allclose(res.params[key], expected, atol=bound, rtol=0)
    assert res.nfev == obj.calls
    assert res.fun == pytest.approx(float(obj.formula(res.params)[0]), rel=1e-6, abs=1e-12)
    assert len({len(column) for column in res.history.values()}) == 1
    assert len(res.history["fun"]) == res.nit + 1
    assert res.history["fun"][-1] == res.fun


# --- against SciPy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["L-BFGS-B", "BFGS"])
@pytest.mark.parametrize("problem", [Rosenbrock, Logistic, IllConditioned])
def test_lbfgs_is_as_good_as_scipy(problem, reference):
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is the reference")
    obj = problem()
    flat = _Flat(Layout(obj.start()))

    def fun(v):
        value, grads = obj.formula(flat.layout.rebuild(flat.split(v)))
        return value, flat.ravel(flat.layout.gradients(grads))

    options = {"gtol": 1e-8} | ({"ftol": 0.0} if reference == "L-BFGS-B" else {})
    theirs = optimize.minimize(
        fun, flat.ravel(flat.layout.arrays(obj.start())), jac=True, method=reference, options=options
    )
    ours = optim.minimize(obj, obj.start(), tol=1e-8)
    assert ours.success
    assert ours.fun <= theirs.fun + 1e-12
    assert ours.nfev <= 2 * theirs.nfev  # within a factor of a good implementation: the line search is not wasteful


# --- against PyTorch, step by step ----------------------------------------------------------------------

TORCH = [
    (optim.SGD, "SGD", {"lr": 0.05}),
    (optim.SGD, "SGD", {"lr": 0.05, "momentum": 0.9}),
    (optim.SGD, "SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (optim.SGD, "SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    (optim.SGD, "SGD", {"lr": 0.05, "weight_decay": 0.3}),
    (optim.Adam, "Adam", {"lr": 0.05}),
    (optim.Adam, "Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2}),
    (optim.AdamW, "AdamW", {"lr": 0.05}),
    (optim.AdamW, "AdamW", {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.4}),
]


@pytest.mark.oracle
@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("ours", "theirs", "options"), TORCH, ids=lambda value: str(value)[:60])
def test_same_iterates_as_torch(ours, theirs, options, dtype, schedule):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    rng = np.random.default_rng(3)
    params = {"a": frozen(rng.normal(size=(3, 5)).astype(dtype)), "b": frozen(rng.normal(size=()).astype(dtype))}
    mirror = [torch.tensor(params[key]) for key in ("a", "b")]
    reference = getattr(torch.optim, theirs)(mirror, **options)
    base = options["lr"]
    rate = (lambda step: base * 0.9**step) if schedule else base
    rule = ours(**(options | {"lr": rate}))
    rtol = 1e-13 if dtype == "float64" else 2e-5
    for step in range(40):
        grads = {key: frozen(rng.normal(size=params[key].shape).astype(dtype) * 3) for key in params}
        before = {key: value.copy() for key, value in params.items()}
        new = rule.step(params, grads)
        assert_array_equal(params["a"], before["a"])
        params = new
        for tensor, key in zip(mirror, ("a", "b"), strict=True):
            tensor.grad = torch.tensor(grads[key])
        if schedule:
            reference.param_groups[0]["lr"] = base * 0.9**step
        reference.step()
        for tensor, key in zip(mirror, ("a", "b"), strict=True):
            assert params[key].dtype == dtype
            assert_allclose(params[key], tensor.numpy(), rtol=rtol, atol=rtol)


@pytest.mark.oracle
def test_clips_as_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    rng = np.random.default_rng(4)
    for size in (0.1, 10.0):
        grads = [rng.normal(size=4) * size, rng.normal(size=(2, 2)) * size]
        mirror = [torch.zeros(grad.shape, dtype=torch.float64) for grad in grads]
        for tensor, grad in zip(mirror, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        torch.nn.utils.clip_grad_norm_(mirror, 2.0)
        step = optim.GradientDescent(1.0, clip_norm=2.0).step([np.zeros(4), np.zeros((2, 2))], grads)
        for ours, theirs in zip(step, mirror, strict=True):
            assert_allclose(ours, -theirs.grad.numpy(), rtol=1e-6)  # PyTorch adds 1e-6 to the norm


# --- step rules -----------------------------------------------------------------------------------------


def test_first_steps_by_hand():
    """The first step of each rule, worked out on paper: g = (2, -4), w = (1, 1)."""
    w, g = np.ones(2), np.array([2.0, -4.0])
    assert_allclose(optim.GradientDescent(0.1).step(w, g), [0.8, 1.4])
    assert_allclose(optim.SGD(0.1, momentum=0.5, nesterov=True).step(w, g), [0.7, 1.6])
    assert_allclose(optim.Adam(0.1).step(w, g), [0.9, 1.1], rtol=1e-8)  # bias correction: the first step has length lr
    assert_allclose(optim.AdamW(0.1, weight_decay=0.5).step(w, g), [0.85, 1.05], rtol=1e-8)


@pytest.mark.parametrize("rule", [optim.GradientDescent, optim.SGD, optim.Adam, optim.AdamW])
def test_clipping_bounds_the_norm_over_all_parameters(rule):
    grads = {"a": np.array([3.0, 0.0]), "b": np.array(4.0)}
    params = {"a": np.zeros(2), "b": np.zeros(())}
    small = rule(0.1, clip_norm=1.0).step(params, grads)
    same = rule(0.1).step(params, {"a": np.array([0.6, 0.0]), "b": np.array(0.8)})
    assert_allclose(small["a"], same["a"], rtol=1e-15)
    assert_allclose(small["b"], same["b"], rtol=1e-15)
    loose, free = rule(0.1, clip_norm=5.001).step(params, grads), rule(0.1).step(params, grads)
    assert_array_equal(loose["a"], free["a"])


class OnDevice(np.ndarray):
    """An array that, like one on a GPU, must not be looked at from the host."""

    def _sync(self, *_):
        raise AssertionError("read back to the host")

    __float__ = __bool__ = __int__ = __index__ = item = tolist = _sync


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("rule", [optim.GradientDescent, optim.SGD, optim.Adam, optim.AdamW])
def test_a_step_never_waits_for_the_device(rule, clip):
    options = {"momentum": 0.9} if rule is optim.SGD else {}
    opt = rule(0.1, clip_norm=clip, **options)
    params = [np.ones(3).view(OnDevice), np.ones((2, 2)).view(OnDevice)]
    for _ in range(3):
        params = opt.step(params, [array * 2 for array in params])
    assert all(np.all(np.isfinite(array.view(np.ndarray))) for array in params)


def test_state_keeps_the_dtype_and_half_precision_computes_wider():
    for dtype, work in [("float64", "float64"), ("float32", "float32"), ("float16", "float32")]:
        opt = optim.Adam(0.1)
        # In float16 the square of 1e-4 is 0, and the step would be infinite.
        new = opt.step(np.ones(3, dtype), np.full(3, 1e-4, dtype))
        assert new.dtype == dtype
        assert_allclose(new, 0.9, rtol=1e-3)
        assert [buffer.dtype for buffer in opt.state[0]] == [work, work]


def test_schedule_sees_the_step_number():
    seen = []
    opt = optim.SGD(lambda step: seen.append(step) or 0.5**step)
    w = np.zeros(1)
    for _ in range(3):
        w = opt.step(w, np.ones(1))
    assert seen == [0, 1, 2]
    assert_allclose(w, -1.75)


# --- kinds of parameters --------------------------------------------------------------------------------


def squares(params):
    """Sum of (p - 3)^2 over the leaves, whatever they are."""
    import optree

    leaves, spec = optree.tree_flatten(params)
    arrays = [np.asarray(leaf) for leaf in leaves]
    value = sum(float(np.sum((array - 3.0) ** 2)) for array in arrays)
    return value, optree.tree_unflatten(spec, [2 * (array - 3) for array in arrays])


class Squares:
    value_and_grad = staticmethod(squares)


PARAMS = [
    frozen([1.0, 2.0]),
    np.asfortranarray(np.arange(6.0, dtype="float32").reshape(2, 3)),
    frozen(0.0),
    1.5,
    np.float32(2.0),
    Tensor(frozen([1.0, 2.0])),
    {"w": [frozen([[1.0]]), None], "b": (0.5, Tensor(frozen(1.0))), "none": np.zeros((0, 2))},
    [np.float64(1), frozen(np.ones(2, "float32"))],
    [frozen(np.ones(3, "float16"))],
]


@pytest.mark.parametrize("method", ["lbfgs", "gd", "adam", optim.SGD(0.1, momentum=0.5)], ids=name_of)
@pytest.mark.parametrize("params", PARAMS, ids=lambda value: type(value).__name__)
def test_results_have_the_kinds_of_the_parameters(params, method):
    import optree

    if not isinstance(method, str):
        method = optim.SGD(method.lr, momentum=method.momentum)
    res = optim.minimize(Squares, params, method, lr=0.1 if method == "adam" else None)
    before, spec = optree.tree_flatten(params)
    after, spec_after = optree.tree_flatten(res.params)
    assert spec == spec_after
    for old, new in zip(before, after, strict=True):
        assert type(old) is type(new)
        assert getattr(old, "dtype", None) == getattr(new, "dtype", None)
        assert np.shape(old) == np.shape(new)
        assert_allclose(np.asarray(new), 3, rtol=2e-3)
        if isinstance(new, np.ndarray):
            assert new.flags.writeable
            assert not np.shares_memory(old, new)
            assert new.base is None  # not a view that keeps something larger alive


def test_tracked_tensors_come_back_tracked():
    from gpugrad import op

    start = frozen([1.0])
    leaf = op.box(start, op.leaf(start))
    for _ in range(2):
        leaf = optim.GradientDescent(0.5).step(leaf, np.ones(1))
        assert leaf.requires_grad
    assert_array_equal(leaf.numpy(), [0.0])


# --- the line search ------------------------------------------------------------------------------------


def more_thuente_1(a):
    return -a / (a * a + 2), (a * a - 2) / (a * a + 2) ** 2


def more_thuente_2(a):
    return (a + 0.004) ** 5 - 2 * (a + 0.004) ** 4, 5 * (a + 0.004) ** 4 - 8 * (a + 0.004) ** 3


def wavy(a):
    """A bowl with ripples: slopes of both signs far from the minimum."""
    return 0.1 * (a - 5) ** 2 + math.sin(3 * a) / 4, 0.2 * (a - 5) + 0.75 * math.cos(3 * a) - 2e-3 * (a == 0)


def walled(a):
    """Infinite beyond 2."""
    return (-math.log(2 - a) * 0.1 - a, 0.1 / (2 - a) - 1) if a < 2 else (math.inf, math.nan)


@pytest.mark.parametrize("first", [1e-3, 1e-1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("c2", [0.9, 0.1])
@pytest.mark.parametrize("function", [more_thuente_1, more_thuente_2, wavy, walled])
def test_steps_meet_both_wolfe_conditions(function, c2, first):
    calls = []

    def phi(alpha):
        calls.append(alpha)
        return Point(alpha, *function(alpha))

    start = Point(0.0, *function(0.0))
    found = strong_wolfe(phi, start, first, c1=1e-4, c2=c2)
    assert found is not None
    assert found.fun <= start.fun + 1e-4 * found.alpha * start.slope
    assert abs(found.slope) <= c2 * abs(start.slope)
    assert len(calls) <= 25


def test_line_search_on_what_cannot_be_searched():
    rising = Point(0.0, 1.0, -1.0)
    assert strong_wolfe(lambda a: Point(a, 1 + a, 1.0), rising, 1.0) is None
    assert strong_wolfe(lambda a: Point(a, math.nan, math.nan), rising, 1.0) is None
    falling = strong_wolfe(lambda a: Point(a, 1 - a, -1.0), rising, 1.0)  # unbounded below: the lowest point seen
    assert falling is not None
    assert falling.fun < -1e3


def test_lbfgs_takes_wolfe_steps():
    obj = Rosenbrock()
    seen = []

    class Spy:
        def value_and_grad(self, params):
            value, grads = obj.formula(params)
            seen.append((np.r_[params["x"], params["y"][:, 0]], value, np.r_[grads["x"], grads["y"][:, 0]]))
            return value, grads

    res = optim.minimize(Spy(), obj.start())
    accepted = [next(entry for entry in seen if entry[1] == fun) for fun in res.history["fun"]]
    for (x, f, g), (x1, f1, g1) in itertools.pairwise(accepted):
        assert f1 <= f + 1e-4 * g @ (x1 - x)
        assert abs(g1 @ (x1 - x)) <= 0.9 * abs(g @ (x1 - x))
        assert (g1 - g) @ (x1 - x) > 0


@pytest.mark.parametrize("method", ["lbfgs", "gd"])
def test_the_first_trial_moves_by_one_unit_at_most(method):
    tried = []

    class Steep:
        def value_and_grad(self, w):
            tried.append(w.copy())
            return 1e8 * float(w @ w), 2e8 * w

    res = optim.minimize(Steep(), np.full(3, 5.0), method, tol=1e-3)
    assert res.success
    assert np.linalg.norm(tried[1] - tried[0]) == pytest.approx(1)


# --- the L-BFGS memory ----------------------------------------------------------------------------------


def filled_memory(pairs, size, dtype="float64"):
    memory = _Memory(_Flat(Layout(np.zeros(4, dtype))), size)
    start = Point(0, 0, 0, np.zeros(4, dtype), np.zeros(4, dtype))
    for s, y in pairs:
        memory.add(start, memory.look(1.0, s, 0.0, y, start))
    return memory


def direction_at(memory, gradient):
    """The direction where the gradient is this, and its slope."""
    here = Point(0, 0, 0, np.zeros(4), gradient)
    here = memory.look(0.0, here.x, 0.0, gradient, here)
    memory.add(here, here)  # a step of nothing: no pair, but the products with the gradient
    slope = memory.turn(here)
    return memory.direction.copy(), slope


def dense_direction(pairs, gradient):
    """-H g with H from the BFGS update formula in full (Nocedal & Wright, eq. 6.17 and 6.20)."""
    s, y = pairs[-1]
    h = np.eye(4) * (s @ y) / (y @ y)
    for s, y in pairs:
        v = np.eye(4) - np.outer(y, s) / (s @ y)
        h = v.T @ h @ v + np.outer(s, s) / (s @ y)
    return -h @ gradient


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_two_loop_recursion_is_the_dense_update(count):
    rng = np.random.default_rng(count)
    hessian = np.diag([1.0, 2.0, 5.0, 9.0]) + 0.3
    pairs = [(s, hessian @ s + 0.01 * rng.normal(size=4)) for s in rng.normal(size=(count, 4))]
    gradient = frozen(rng.normal(size=4))
    direction, slope = direction_at(filled_memory(pairs, 5), gradient)
    expected = dense_direction(pairs[-5:], gradient)
    assert_allclose(direction, expected, rtol=1e-11)
    assert slope == pytest.approx(expected @ gradient, rel=1e-11)


def test_a_cleared_memory_starts_afresh():
    rng = np.random.default_rng(0)
    pairs = [(s, 2 * s + 0.1 * rng.normal(size=4)) for s in rng.normal(size=(4, 4))]
    memory = filled_memory(pairs, 3)
    memory.clear()
    gradient = rng.normal(size=4)
    direction, slope = direction_at(memory, gradient)
    assert_array_equal(direction, -gradient)
    assert slope == pytest.approx(-gradient @ gradient)
    start = Point(0, 0, 0, np.zeros(4), np.zeros(4))
    memory.add(start, memory.look(1.0, pairs[0][0], 0.0, pairs[0][1], start))
    assert_allclose(direction_at(memory, gradient)[0], dense_direction(pairs[:1], gradient), rtol=1e-11)


def test_pairs_without_positive_curvature_are_skipped():
    good = (np.array([1.0, 0, 0, 0]), np.array([2.0, 0, 0, 0]))
    negative = (np.array([0, 1.0, 0, 0]), np.array([0, -1.0, 0, 0]))
    flat = (np.array([0, 1.0, 0, 0]), np.array([1.0, 1e-17, 0, 0]))
    memory = filled_memory([good, negative, flat], 5)
    assert len(memory.used) == 1
    assert_allclose(direction_at(memory, np.ones(4))[0], -0.5)


def test_inner_products_of_float32_accumulate_in_float64():
    n = 100_000
    memory = _Memory(_Flat(Layout(np.zeros(n, "float32"))), 1)
    a = np.full(n, 0.1, "float32")
    start = Point(0, 0, 0, np.zeros(n, "float32"), np.zeros(n, "float32"))
    point = memory.look(1.0, a, 0.0, 2 * a, start)
    exact = n * float(a[0]) ** 2
    assert_allclose(point.products[:3], exact * np.array([[1, 2, 2], [2, 4, 4], [2, 4, 4]]), rtol=1e-12)


# --- stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lbfgs", "gd"])
def test_tol_bounds_the_largest_gradient_entry(method):
    obj = Quadratic()
    for tol in (1e-2, 1e-4):
        res = optim.minimize(obj, obj.start(), method, tol=tol)
        assert res.success
        assert "tol" in res.message
        norms = res.history["grad_norm"]
        assert norms[-1] == np.max(np.abs(obj.formula(res.params)[1]["w"])) <= tol
        assert all(norm > tol for norm in norms[:-1])


@pytest.mark.parametrize("method", ["lbfgs", "gd"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stops_by_itself_at_the_precision_of_the_arithmetic(dtype, method):
    obj = Logistic(dtype)
    res = optim.minimize(obj, obj.start(), method, tol=0.0, max_iter=3000)
    assert res.success, res.message
    assert "rounding" in res.message
    # Values alone would end L-BFGS where gd ends, at the square root of the rounding error.
    reached = {"gd": (1e-3, 1e-7), "lbfgs": (1e-7, 1e-14)}[method]
    assert res.history["grad_norm"][-1] < reached[dtype == "float64"]
    assert res.nfev < 3000


def test_lbfgs_goes_on_where_the_value_has_no_digits_left():
    """Under an offset of 1e6 the value resolves steps of 1e-5 only; the gradient knows more."""
    obj = Quadratic()

    class Offset:
        def value_and_grad(self, params):
            value, grads = obj.formula(params)
            return value + 1e6, grads

    res = optim.minimize(Offset(), obj.start(), tol=1e-9)
    assert res.success
    assert_allclose(res.params["w"], obj.minimum["w"], atol=1e-6)


@pytest.mark.parametrize("method", ["lbfgs", "gd"])
def test_a_wrong_gradient_is_reported(method):
    class Wrong:
        def value_and_grad(self, params):
            value, grads = squares(params)
            return value, -grads

    res = optim.minimize(Wrong(), np.zeros(2), method)
    assert not res.success
    assert "check_grads" in res.message
    assert_array_equal(res.params, 0)


def test_a_start_at_the_minimum_stops_at_once():
    for method in ("lbfgs", "gd"):
        for tol in (1e-6, None):
            res = optim.minimize(Squares, np.full(2, 3.0), method, tol=tol)
            assert (res.success, res.nit, res.nfev) == (True, 0, 1)


@pytest.mark.parametrize("method", ["lbfgs", "gd", "adam"])
def test_max_iter_is_kept(method):
    obj = Rosenbrock()
    res = optim.minimize(obj, obj.start(), method, max_iter=7)
    assert (res.nit, res.success) == (7, False)
    assert "max_iter 7" in res.message
    assert optim.minimize(obj, obj.start(), method, max_iter=7, tol=None).success


def test_lbfgs_backs_off_where_the_objective_is_infinite():
    class Log:
        def value_and_grad(self, w):
            with np.errstate(divide="ignore", invalid="ignore"):
                return float(np.sum(w - 5 * np.log(w))), 1 - 5 / w

    for method in ("lbfgs", "gd"):
        res = optim.minimize(Log(), np.array([1e-3, 40.0]), method, max_iter=20_000)
        assert res.success
        assert_allclose(res.params, 5, rtol=1e-4)


@pytest.mark.parametrize("method", ["gd", "sgd", "adam"])
def test_divergence_returns_the_best_parameters(method):
    obj = Rosenbrock()
    res = optim.minimize(obj, obj.start(), method, lr=1e200 if method == "adam" else 1.0)
    assert not res.success
    assert f"iteration {res.nit + 1}" in res.message
    assert "smaller lr" in res.message
    assert all(np.all(np.isfinite(leaf)) for leaf in res.params.values())
    assert res.fun == min(res.history["fun"]) == obj.formula(res.params)[0]


def test_non_finite_gradients_and_starts():
    class Broken:
        def value_and_grad(self, w):
            return float(w[0] ** 2), np.array([math.nan if w[0] < 0.95 else 1.0])

    res = optim.minimize(Broken(), np.ones(1), "sgd", lr=0.01)
    assert not res.success
    assert "max|gradient| is nan at iteration 6" in res.message
    assert res.params[0] == pytest.approx(0.95)

    for method in ("lbfgs", "gd", "adam"):
        res = optim.minimize(Broken(), np.zeros(1), method)
        assert not res.success
        assert "starting parameters" in res.message
        assert_array_equal(res.params, 0)
        assert math.isnan(res.fun)
        with pytest.raises(ValueError, match=r"params\['w'\] holds NaN"):
            optim.minimize(Squares, {"w": np.array([math.nan])}, method)


@pytest.mark.parametrize("method", ["lbfgs", "gd", "adam"])
def test_interrupt_returns_the_best_parameters(method):
    obj = Rosenbrock()

    class Interrupted:
        def value_and_grad(self, params):
            if obj.calls == 20:
                raise KeyboardInterrupt
            return obj.value_and_grad(params)

    res = optim.minimize(Interrupted(), obj.start(), method)
    assert (res.success, res.message, res.nfev) == (False, "interrupted", 20)
    assert res.fun == min(res.history["fun"]) == obj.formula(res.params)[0]
    assert res.fun < obj.formula(obj.start())[0]


@pytest.mark.parametrize("method", ["lbfgs", "gd", "adam"])
@pytest.mark.parametrize("way", ["return", "raise"])
def test_callback_stops_the_run(method, way):
    obj, seen = Rosenbrock(), []

    def callback(res):
        seen.append((res.nit, res.fun, float(obj.formula(res.params)[0]), len(res.history["fun"])))
        if res.nit == 3:
            if way == "raise":
                raise StopIteration
            return True
        return None

    res = optim.minimize(obj, obj.start(), method, callback=callback)
    assert [entry[0] for entry in seen] == [1, 2, 3]
    assert all(fun == value and length == nit + 1 for nit, fun, value, length in seen)
    assert (res.nit, res.success) == (3, False)
    assert "callback" in res.message


def test_progress_goes_to_stderr(capsys):
    obj = Logistic()
    optim.minimize(obj, obj.start(), "lbfgs", progress=True)
    optim.minimize(obj, obj.start(), "adam", batch_size=20, epochs=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "lbfgs" in err
    assert "2/2" in err
    optim.minimize(obj, obj.start(), "lbfgs")
    assert capsys.readouterr() == ("", "")


def test_result_reads_well():
    obj = Rosenbrock()
    shown = str(optim.minimize(obj, obj.start()))
    assert shown.startswith("success: converged")
    assert "params['y'] float64(3, 1)" in shown
    assert len(shown) < 400


# --- mini-batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mini_batches_come_near_the_minimum(method, dtype):
    obj = Logistic(dtype)
    rate = 1.0 if method == "sgd" else 0.05
    res = optim.minimize(
        obj, obj.start(), method, lr=lambda step: rate / (1 + step / 100), batch_size=34, epochs=100, seed=5
    )
    assert res.success
    assert (res.nit, res.nfev) == (100, 100 * 3)
    assert res.history["epoch"] == list(range(1, 101))
    assert_allclose(res.params["w"], obj.minimum["w"], atol=0.2)
    assert res.params["w"].dtype == dtype


def test_mini_batch_runs_are_plain_optimiser_steps():
    """The same numbers as a loop written out, with the mean loss weighted by rows (the last batch is short)."""
    obj = Logistic()
    res = optim.minimize(obj, obj.start(), "adam", lr=0.1, batch_size=30, epochs=3, seed=11)
    seeds = list(obj.seeds)
    assert len(set(seeds)) == 3  # a new order each epoch
    params, opt, means = obj.start(), optim.Adam(0.1), []
    for seed in seeds:
        total = 0.0
        for batch in obj.batches(30, seed):
            value, grads = batch.value_and_grad(params)
            total += value * batch.rows
            params = opt.step(params, grads)
        means.append(total / 101)
    assert_array_equal(res.params["w"], params["w"])
    assert_allclose(res.history["fun"], means, rtol=1e-14)
    again = optim.minimize(Logistic(), obj.start(), "adam", lr=0.1, batch_size=30, epochs=3, seed=11)
    assert_array_equal(again.params["w"], res.params["w"])
    other = optim.minimize(Logistic(), obj.start(), "adam", lr=0.1, batch_size=30, epochs=3, seed=12)
    assert not np.array_equal(other.params["w"], res.params["w"])


def test_mini_batches_wait_for_the_device_once_an_epoch(monkeypatch):
    module = importlib.import_module("gpugrad.optim.minimize")  # the package's attribute is the function
    transfers = []
    real = first_order.to_host
    monkeypatch.setattr(module, "to_host", lambda *args: transfers.append(1) or real(*args))
    obj = Logistic()

    class Batch:
        def __init__(self, inner):
            self.inner, self.rows = inner, inner.rows

        def evaluate(self, params):
            value, grads = self.inner.formula(params)
            return np.asarray(value).view(OnDevice), grads

        def value_and_grad(self, params):
            raise AssertionError("evaluate is preferred")

    class Source:
        def batches(self, batch_size, seed):
            return map(Batch, obj.batches(batch_size, seed))

    monkeypatch.setattr(OnDevice, "__float__", lambda self: float(self.view(np.ndarray)))
    res = optim.minimize(Source(), obj.start(), "adamw", batch_size=10, epochs=4)
    assert res.success
    assert len(transfers) == 4


def test_mini_batch_tol_is_the_relative_improvement_of_an_epoch():
    obj = Logistic()
    res = optim.minimize(obj, obj.start(), "adam", lr=0.02, batch_size=25, epochs=500, tol=2e-2)
    fun = res.history["fun"]
    gains = [(a - b) / a for a, b in itertools.pairwise(fun)]
    assert res.success
    assert res.nit < 500
    assert gains[-1] < 2e-2 <= min(gains[:-1])

    class Scaled(Logistic):
        def formula(self, params):
            value, grads = super().formula(params)
            return 1e3 * value, {key: 1e3 * grad for key, grad in grads.items()}

    scaled = Scaled()
    assert optim.minimize(scaled, obj.start(), "adam", lr=0.02, batch_size=25, epochs=500, tol=2e-2).nit == res.nit
    short = optim.minimize(obj, obj.start(), "adam", lr=0.02, batch_size=25, epochs=2, tol=2e-2)
    assert not short.success


class Given:
    """Mini-batches of one row that answer as told: (value, gradient) from the parameters."""

    rows = 1

    def __init__(self, answer):
        self.value_and_grad = answer

    def batches(self, batch_size, seed):
        return iter([self, self])


def test_slow_divergence_goes_back_to_the_start():
    """Every epoch ends worse than the start, though it is long before anything overflows."""
    res = optim.minimize(Given(lambda w: (float(w @ w), 2 * w)), np.ones(2), "sgd", lr=10.0, batch_size=1, epochs=999)
    assert not res.success
    assert 10 < res.nit < 999
    assert_array_equal(res.params, 1)
    assert res.fun == 2


def test_parameters_at_infinity_are_seen_though_the_objective_is_finite():
    def answer(w):
        return 1.0 - 0.1 * float(w[0] < 0), np.full(1, 1e300)

    for options in ({"batch_size": 1, "epochs": 1}, {"max_iter": 3}):
        res = optim.minimize(Given(answer), np.ones(1), "sgd", lr=1e10, **options)
        assert not res.success
        assert "parameter" in res.message
        assert_array_equal(res.params, 1)


def test_mini_batch_divergence_returns_finite_parameters():
    obj = Logistic()
    for blow_up in (0, 10):  # in the first epoch and in the second, of 7 steps each
        rate = lambda step, at=blow_up: math.inf if step > 1000 else 1e308 if step >= at else 0.1  # noqa: E731
        res = optim.minimize(obj, obj.start(), "sgd", lr=rate, batch_size=16, epochs=5)
        assert not res.success
        assert f"epoch {1 + blow_up // 7}" in res.message
        assert "smaller lr" in res.message
        assert np.all(np.isfinite(res.params["w"]))
        if not blow_up:
            assert_array_equal(res.params["w"], 0)


def test_mini_batch_interrupt_keeps_what_an_epoch_has_won():
    class Interrupted(Logistic):
        def batches(self, batch_size, seed):
            for k, batch in enumerate(super().batches(batch_size, seed)):
                if k == 5 and len(self.seeds) == self.last:
                    raise KeyboardInterrupt
                yield batch

    for last in (1, 3):
        obj = Interrupted()
        obj.last = last
        res = optim.minimize(obj, obj.start(), "adam", lr=0.05, batch_size=16, epochs=9)
        assert (res.success, res.message, res.nit) == (False, "interrupted", last - 1)
        assert res.nfev == 7 * (last - 1) + 5
        assert obj.formula(res.params)[0] < obj.formula(obj.start())[0]


def test_mini_batch_callback_is_called_each_epoch():
    seen = []
    obj = Logistic()
    res = optim.minimize(
        obj, obj.start(), "adam", batch_size=20, epochs=9, callback=lambda r: seen.append(r.nit) or r.nit == 4
    )
    assert seen == [1, 2, 3, 4]
    assert (res.nit, res.success) == (4, False)


# --- optimisers handed in -------------------------------------------------------------------------------


def test_an_optimiser_goes_on_where_it_was():
    obj = Quadratic()
    whole = optim.minimize(obj, obj.start(), optim.Adam(0.05), max_iter=20, tol=None)
    opt = optim.Adam(0.05)
    half = optim.minimize(obj, obj.start(), opt, max_iter=10, tol=None)
    rest = optim.minimize(obj, half.params, opt, max_iter=10, tol=None)
    # An iteration steps before it evaluates: 10 steps, then 10 more.
    assert opt.count == 20
    assert_array_equal(rest.params["w"], whole.params["w"])
    with pytest.raises(ValueError, match="make a new optimiser"):
        optim.minimize(Squares, np.zeros(3), opt)


def test_a_function_is_differentiated():
    pytest.importorskip("gpugrad.transforms", reason="the transforms are not there")
    res = optim.minimize(lambda w: ((w - 2.0) * (w - 2.0)).sum(), np.zeros(3))
    assert res.success
    assert_allclose(res.params, 2.0, atol=1e-6)


# --- what cannot be done --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "newton"}, r"unknown method 'newton': expected one of gd, sgd, adam, adamw, lbfgs"),
        ({"method": "sgd"}, "'sgd' needs lr"),
        ({"method": "sgd", "lr": -0.1}, r"lr is -0\.1; expected a finite number, not negative"),
        ({"method": "gd", "lr": -1}, "not negative"),
        ({"method": "adam", "lr": math.nan}, "lr is nan"),
        ({"method": "adam", "lr": lambda step: -1.0}, r"the lr schedule at step 0 is -1\.0"),
        ({"method": "lbfgs", "lr": 0.1}, "leave lr out"),
        ({"method": "lbfgs", "clip_norm": 1.0}, "clip_norm"),
        ({"method": "gd", "clip_norm": 1.0}, "give an lr too"),
        ({"method": "sgd", "lr": 0.1, "clip_norm": 0.0}, "clip_norm is 0.0; expected a positive"),
        ({"method": "lbfgs", "batch_size": 10}, "'lbfgs' needs the whole sum"),
        ({"method": "gd", "lr": 0.1, "batch_size": 10}, "'gd' needs the whole sum"),
        ({"method": optim.GradientDescent(0.1), "batch_size": 10}, "needs the whole sum"),
        ({"method": "adam", "epochs": 3}, "epochs is 3 without batch_size"),
        ({"method": "adam", "batch_size": 10, "max_iter": 3}, "counted in epochs"),
        ({"method": "adam", "batch_size": 10, "epochs": 0}, "epochs is 0; expected an integer, at least 1"),
        ({"method": "adam", "batch_size": 2.5}, "batch_size is 2.5"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"max_iter": True}, "max_iter is True"),
        ({"seed": -1}, "seed is -1"),
        ({"tol": -1.0}, "tol is -1.0"),
        ({"tol": "tight"}, "tol is 'tight'"),
        ({"method": optim.SGD(0.1), "lr": 0.2}, "give it to the optimiser itself"),
        ({"method": optim.SGD(0.1), "clip_norm": 0.2}, "clip_norm came beside"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_options_that_do_not_go_together(options, message):
    obj = Logistic()
    with pytest.raises(ValueError, match=message):
        optim.minimize(obj, obj.start(), **options)
    assert obj.calls <= 1


def test_objectives_that_do_not_fit():
    w = np.zeros(2)
    with pytest.raises(ValueError, match="has no batches"):
        optim.minimize(Squares, w, "adam", batch_size=2)
    with pytest.raises(TypeError, match="obj is a int"):
        optim.minimize(3, w)

    def returning(value, grads):
        return type("Objective", (), {"value_and_grad": staticmethod(lambda params: (value, grads))})

    with pytest.raises(ShapeMismatch, match=r"the objective returned shape \(2,\)"):
        optim.minimize(returning(np.zeros(2), w), w)
    with pytest.raises(ShapeMismatch, match=r"gradient of params\['a'\] has shape \(3,\); expected \(2,\)"):
        optim.minimize(returning(0.0, {"a": np.zeros(3)}), {"a": w})
    with pytest.raises(ValueError, match="gradients have structure"):
        optim.minimize(returning(0.0, [w]), w)

    class Empty:
        def batches(self, batch_size, seed):
            return iter(())

    with pytest.raises(ValueError, match="no rows in epoch 1"):
        optim.minimize(Empty(), w, "adam", batch_size=2)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (np.arange(3), TypeError, "params has dtype int64; expected float16, float32 or float64"),
        ({"w": np.ones(2, complex)}, TypeError, r"params\['w'\] has dtype complex128"),
        ([np.ones(2), "three"], TypeError, r"params\[1\] is a str"),
        (True, TypeError, "params is a bool"),
        ({}, ValueError, "params holds no parameters"),
        (None, ValueError, "params holds no parameters"),
    ],
)
def test_parameters_that_are_none(params, error, message):
    with pytest.raises(error, match=message):
        optim.minimize(Squares, params)


def test_optimisers_with_wrong_options():
    for make in (
        lambda: optim.SGD(-1.0),
        lambda: optim.SGD(0.1, momentum=1.0),
        lambda: optim.SGD(0.1, nesterov=True),
        lambda: optim.SGD(0.1, weight_decay=-1.0),
        lambda: optim.Adam(betas=(0.9, 1.0)),
        lambda: optim.Adam(eps=0.0),
        lambda: optim.AdamW(weight_decay=-1.0),
        lambda: optim.GradientDescent(0.1, clip_norm=-1.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


# --- on a device ----------------------------------------------------------------------------------------

RULES = [
    lambda **more: optim.GradientDescent(0.1, **more),
    lambda **more: optim.SGD(0.1, **more),
    lambda **more: optim.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1, **more),
    lambda **more: optim.SGD(lambda step: 0.1 / (1 + step), momentum=0.5, **more),
    lambda **more: optim.Adam(0.1, **more),
    lambda **more: optim.AdamW(0.1, **more),
]


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("rule", range(len(RULES)))
def test_every_device_makes_the_same_steps(rule, clip, device):
    """One kernel for all parameters of a dtype, against the formulas in NumPy."""
    rng = np.random.default_rng(7)
    start = {
        "a": rng.normal(size=(3, 2)),
        "b": rng.normal(size=5).astype("float32"),
        "c": np.asfortranarray(rng.normal(size=(4, 700))).astype("float32"),
        "d": rng.normal(size=(2, 3)).astype("float16"),
        "e": rng.normal(size=()),
        "f": np.zeros((0, 3)),
    }
    ours, theirs = RULES[rule](clip_norm=clip), RULES[rule](clip_norm=clip)
    on_cpu, there = start, {key: device.put(value) for key, value in start.items()}
    for _ in range(4):
        grads = {key: rng.normal(size=value.shape).astype(value.dtype) for key, value in start.items()}
        on_cpu = ours.step(on_cpu, grads)
        there = theirs.step(there, {key: device.put(value) for key, value in grads.items()})
    for key, expected in on_cpu.items():
        got = host(there[key])
        assert got.dtype == expected.dtype
        eps = float(np.finfo(expected.dtype).eps)
        assert_allclose(got, expected, rtol=20 * eps, atol=20 * eps)
    if not device.on_cpu:
        with pytest.raises(DeviceMismatch, match=r"gradient of params\['a'\] is on cpu, the parameter on cuda:0"):
            theirs.step(there, grads)
        with pytest.raises(ValueError, match=r"computed on cuda:0, cpu\); make a new optimiser"):
            theirs.begin(Layout(start), list(start.values()))


def test_parameters_of_two_devices_do_not_mix(stand_in):
    with stand_in.cuda.Device(1):
        other = stand_in.ones(2)
    with pytest.raises(DeviceMismatch, match=r"params\[1\] is on cuda:1, params\[0\] on cuda:0"):
        optim.minimize(lambda p: p[0].sum(), [stand_in.ones(2), other])


def least_squares(p, x, y):
    return gg.squared_error(x @ p["w"] + p["b"], y)


@pytest.fixture
def regression():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(500, 4)).astype("float32")
    return x, (x @ [1.0, -2.0, 0.5, 0.0] + 0.3 + 0.1 * rng.normal(size=500)).astype("float32")


METHODS = [
    ("lbfgs", {}),
    ("gd", {}),
    ("gd", {"lr": 0.05}),
    ("sgd", {"lr": 0.05, "clip_norm": 1.0}),
    ("adam", {"lr": 0.05}),
    ("adamw", {"lr": lambda step: 0.05 / (1 + step)}),
]


def waits(run, *, steps, more):
    """How often a run waits for the device beyond once an evaluation, from its lengths `steps` and `more`."""
    results = []
    run(1)  # block sizes are found once
    for length in (steps, more):
        with machine.counting() as count:
            result = run(length)
        results.append((count.syncs, result))
    (first, short), (second, long) = results
    return second - first - (long.nfev - short.nfev)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else "")
def test_one_wait_an_evaluation(stand_in, regression, method, options, where):
    """Line search, state and parameters stay there, whatever the parameters are: arrays, or numbers as `b`."""
    obj = gg.Objective(least_squares, regression, device="cuda")
    start = {"w": np.zeros(4, "float32") if where == "host" else stand_in.zeros(4, "float32"), "b": 0.0}
    right = optim.minimize(
        gg.Objective(least_squares, regression, device="cpu"),
        {"w": np.zeros(4, "float32"), "b": 0.0},
        method,
        **options,
        max_iter=6,
        tol=None,
    )

    def run(max_iter):
        return optim.minimize(obj, start, method, **options, max_iter=max_iter, tol=None)

    assert waits(run, steps=2, more=6) == 0
    found = run(6)
    assert type(found.params["w"]) is type(start["w"])
    assert type(found.params["b"]) is float
    assert_allclose(host(found.params["w"]), right.params["w"], atol=2e-5)
    assert found.params["b"] == pytest.approx(right.params["b"], abs=2e-5)
    assert_allclose(found.history["fun"], right.history["fun"], rtol=1e-4)


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_one_wait_an_epoch(stand_in, regression, method):
    obj = gg.Objective(least_squares, regression, device="cuda")
    start = {"w": np.zeros(4, "float32"), "b": 0.0}

    def run(epochs):
        return optim.minimize(obj, start, method, lr=0.01, batch_size=60, epochs=epochs)

    assert waits(run, steps=2, more=5) == 3 - 3 * 9  # 9 evaluations an epoch, one wait
    right = optim.minimize(
        gg.Objective(least_squares, regression, device="cpu"), start, method, lr=0.01, batch_size=60, epochs=5
    )
    found = run(5)
    assert_allclose(found.params["w"], right.params["w"], atol=2e-5)
    assert_allclose(found.history["fun"], right.history["fun"], rtol=1e-5)


def test_what_a_callback_costs(stand_in, regression):
    """Parameters that live on the device are shown as they are; those of the host are read for it, at once."""
    obj = gg.Objective(least_squares, regression, device="cuda")
    for start, extra in (
        ({"w": stand_in.zeros(4, "float32"), "b": stand_in.zeros((), "float32")}, 0),
        ({"w": np.zeros(4, "float32"), "b": 0.0}, 4),
    ):
        seen = []

        def callback(result, seen=seen):
            seen.append((type(result.params["w"]), type(result.params["b"])))

        def run(max_iter, start=start, callback=callback):
            return optim.minimize(obj, start, "adam", max_iter=max_iter, tol=None, callback=callback)

        assert waits(run, steps=2, more=6) == extra
        assert set(seen) == {(type(start["w"]), type(start["b"]))}


@pytest.mark.parametrize("fault", ["in the optimiser", "in the loss", "a number read back", "in the line search"])
def test_a_hidden_wait_is_caught(stand_in, regression, fault, monkeypatch):
    """Each of these slips into a step; the count of the tests above sees it."""
    method, loss = "adam", least_squares
    if fault == "in the optimiser":
        real = optim.Adam.advance
        monkeypatch.setattr(
            optim.Adam, "advance", lambda self, arrays, grads: (float(grads[0].sum()), real(self, arrays, grads))[1]
        )
    elif fault == "in the loss":
        loss = lambda p, x, y: least_squares(p, x, y) * (1.0 + 0.0 * p["b"].item())  # noqa: E731
    elif fault == "a number read back":
        monkeypatch.setattr(Layout, "inside", Layout.rebuild)
    else:
        method = "lbfgs"
        real_turn = _Memory.turn
        monkeypatch.setattr(_Memory, "turn", lambda self, here: real_turn(self, here) + 0.0 * float(here.grad[0]))
    obj = gg.Objective(loss, regression, device="cuda")
    start = {"w": stand_in.zeros(4, "float32"), "b": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gg.errors.CaptureWarning)  # a loss that reads a value is not captured
        assert waits(lambda n: optim.minimize(obj, start, method, max_iter=n, tol=None), steps=2, more=6) >= 4


def test_launches_of_a_training_step(stand_in):
    """A step on a small batch costs what its launches cost: 16 for two hidden layers, 23 before losses were captured.

    Seven products: one a layer forward, two a layer backward but for the first, and none where one factor is a column.
    Five loops: bias and activation of a hidden layer, the loss with its slope, and for each hidden layer backward; the
    last three add up too, which takes a launch more each. The update is one.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(256, 32)).astype("float32"), rng.normal(size=256).astype("float32")
    params = gg.nn.init_mlp([32, 64, 64, 1], device="cuda")
    obj = gg.Objective(lambda p, x, y: gg.squared_error(gg.nn.mlp(p, x)[:, 0], y), (x, y), device="cuda")
    rule = optim.Adam(1e-3)
    for _ in range(2):
        with stand_in.counting() as count:
            _, grads = obj.evaluate(params)
            params = rule.step(params, grads)
    assert count.launches == 16
    assert count.syncs == 0


@pytest.mark.gpu
def test_a_gpu_finds_minima():
    cupy = pytest.importorskip("cupy", reason="needs CuPy and a GPU")

    class OnGpu:
        def evaluate(self, params):
            x, y = params
            return ((1 - x) ** 2 + 100 * (y - x * x) ** 2).sum(), [
                -2 * (1 - x) - 400 * x * (y - x * x),
                200 * (y - x * x),
            ]

    for method in ("lbfgs", "gd", "adam"):
        res = optim.minimize(
            OnGpu(),
            [cupy.full(3, 0.9), cupy.full(3, 0.8)],
            method,
            lr=0.01 if method == "adam" else None,
            max_iter=4000,
        )
        assert isinstance(res.params[0], cupy.ndarray)
        assert_allclose(res.params[0].get(), 1, atol=1e-2)
