"""Captured losses: an Objective gives what it gives eagerly, finds linear models in whatever loss was written, and
falls back, with one warning, where a loss cannot be captured."""

import collections
import copy
import functools
import os
import pickle
import subprocess
import sys
import threading
import types
import warnings
from typing import Any

import numpy as np
import optree
import pytest

import gpugrad as gg
from gpugrad import errors, objective
from gpugrad.compile import cpu_code, function
from gpugrad.compile.cpu_rows import RowProgram
from gpugrad.compile.fingerprint import fingerprint

JIT = cpu_code.available()
ROWS = 2_003


@pytest.fixture(params=["compiled", "blocks"], autouse=True)
def captured(request: Any, monkeypatch: Any) -> str:
    """Capture whatever the size, with compiled loops and with those on NumPy."""
    if request.param == "compiled" and JIT is not None:
        pytest.skip(f"no compiled loops: {JIT}")
    if request.param == "blocks":
        monkeypatch.setattr(cpu_code, "available", lambda: "switched off for this test")
        monkeypatch.setattr(objective, "has_compiler", lambda: True)
    monkeypatch.setattr(objective, "CAPTURE_BYTES", 0)
    return str(request.param)


def eagerly(*args: Any, **options: Any) -> gg.Objective:
    made = gg.Objective(*args, **options)
    made._capturing = False
    return made


def eta(p: Any, X: Any) -> Any:
    return X @ p["w"] + p["b"]


def negative_binomial(p: Any, X: Any, y: Any) -> Any:
    mu, k = gg.exp(eta(p, X)), gg.softplus(p["k"])
    return (y + 1 / k) * gg.log1p(k * mu) - y * gg.log(k * mu)


def mixture(p: Any, X: Any, y: Any) -> Any:
    """Two linear predictors, one for the mean and one for the logarithm of the variance."""
    mean, log_variance = X @ p["w"], X @ p["v"]
    return 0.5 * (log_variance + (y - mean) ** 2 * gg.exp(-log_variance))


def softmax_regression(p: Any, X: Any, Y: Any) -> Any:
    return -gg.sum(gg.log_softmax(X @ p["W"] + p["c"], axis=1) * Y, axis=1)


# name: loss, parameters, further columns of data, whether it is one pass over rows
LINEAR: dict[str, Any] = {
    "least squares": (lambda p, X, y: (eta(p, X) - y) ** 2, "wb", ("y",)),
    "squared_error": (lambda p, X, y: gg.squared_error(X @ p["w"], y), "w", ("y",)),
    "logistic": (lambda p, X, y: gg.softplus(eta(p, X)) - y * eta(p, X), "wb", ("label",)),
    "logistic_loss": (lambda p, X, y: gg.logistic_loss(eta(p, X), y), "wb", ("label",)),
    "poisson": (lambda p, X, y: gg.exp(eta(p, X)) - y * eta(p, X), "wb", ("count",)),
    "poisson with exposure and weights": (
        lambda p, X, y, offset, weight: weight * (gg.exp(eta(p, X) + offset) - y * (eta(p, X) + offset)),
        "wb",
        ("count", "y", "positive"),
    ),
    "huber": (
        lambda p, X, y: gg.where(gg.abs(eta(p, X) - y) < 1.0, 0.5 * (eta(p, X) - y) ** 2, gg.abs(eta(p, X) - y) - 0.5),
        "wb",
        ("y",),
    ),
    "quantile": (lambda p, X, y: gg.maximum(0.9 * (y - eta(p, X)), -0.1 * (y - eta(p, X))), "wb", ("y",)),
    "log-cosh of a clipped residual": (
        lambda p, X, y, weight: weight * gg.log(gg.cosh(gg.clip(eta(p, X) - y, -3, 3))),
        "wb",
        ("y", "positive"),
    ),
    "gamma": (lambda p, X, y: y * gg.exp(-eta(p, X)) + eta(p, X), "wb", ("positive",)),
    "negative binomial": (negative_binomial, "wbk", ("count",)),
    "integer labels": (
        lambda p, X, y: gg.where(y > 0, gg.softplus(-eta(p, X)), gg.softplus(eta(p, X))),
        "wb",
        ("int",),
    ),
    "two predictors": (mixture, "wv", ("y",)),
    "softmax regression": (softmax_regression, "Wc", ("onehot",)),
    "one column": (lambda p, X, y: (X @ p["M"])[:, 0] * y, "M", ("y",)),
    "transformed parameters": (lambda p, X, y: gg.tanh(X @ (p["w"] * gg.exp(p["v"])) - y), "wv", ("y",)),
    "intercept and ridge a row": (lambda p, X, y: (eta(p, X) - y) ** 2 + 0.01 * gg.sum(p["w"] ** 2), "wb", ("y",)),
}


def parameters(names: str, columns: int, rng: np.random.Generator, dtype: Any) -> dict[str, Any]:
    shapes = {"w": (columns,), "v": (columns,), "W": (columns, 3), "c": (3,), "M": (columns, 1)}
    p: dict[str, Any] = {n: (0.3 * rng.normal(size=shapes[n])).astype(dtype) for n in names if n in shapes}
    return p | {n: 0.3 for n in names if n not in shapes}


def columns_of(names: Any, rng: np.random.Generator, dtype: Any, rows: int = ROWS) -> list[Any]:
    made = {
        "y": lambda: rng.normal(size=rows),
        "label": lambda: rng.integers(0, 2, size=rows),
        "count": lambda: rng.poisson(2.0, size=rows),
        "positive": lambda: rng.uniform(0.5, 2, size=rows),
        "onehot": lambda: np.eye(3)[rng.integers(0, 3, size=rows)],
    }
    return [rng.integers(0, 2, size=rows) if n == "int" else made[n]().astype(dtype) for n in names]


def same(got: Any, want: Any, rtol: float) -> None:
    for a, b in zip(optree.tree_leaves(got), optree.tree_leaves(want), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b), initial=0))


def programs(obj: gg.Objective) -> list[RowProgram]:
    assert obj._programs, "nothing was captured"
    for program in obj._programs.values():
        assert isinstance(program, RowProgram), program
    return list(obj._programs.values())


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_linear_models_are_one_pass(name: str, dtype: Any, captured: str, rng: np.random.Generator) -> None:
    loss, names, extra = LINEAR[name]
    X = rng.normal(size=(ROWS, 7)).astype(dtype)
    data = (X, *columns_of(extra, rng, dtype))
    p = parameters(names, 7, rng, dtype)
    v = parameters(names, 7, rng, dtype)
    obj, eager = gg.Objective(loss, data, threads=2), eagerly(loss, data, threads=2)
    rtol = 1e-11 if dtype == np.float64 else 2e-5
    same(obj.value_and_grad(p), eager.value_and_grad(p), rtol)
    same(obj.value(p), eager.value(p), rtol)
    same(obj.hvp(p, v), eager.hvp(p, v), 20 * rtol)
    for program in programs(obj):
        if not program.parts.body.equations:
            assert name in ("quantile", "one column"), "only no curvature leaves nothing for a Hessian"
            continue
        assert program.pass_plan is not None, "not recognised as one pass over the rows"
        assert (program.kernel is not None) == (captured == "compiled")


def test_a_network_goes_by_blocks(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 5)), rng.normal(size=ROWS)
    p = gg.nn.init_mlp((5, 16, 16, 1), dtype=np.float64)

    def loss(p: Any, X: Any, y: Any) -> Any:
        return (gg.nn.mlp(p, X)[:, 0] - y) ** 2

    v = optree.tree_map(lambda a: rng.normal(size=a.shape), p)
    for options in ({}, {"block_size": 100}, {"block_size": 1}, {"threads": 1}, {"threads": 64}):
        obj, eager = gg.Objective(loss, (X, y), **options), eagerly(loss, (X, y), **options)
        same(obj.value_and_grad(p), eager.value_and_grad(p), 1e-10)
        if options.get("block_size") != 1:
            same(obj.hvp(p, v), eager.hvp(p, v), 1e-9)
        assert all(program.pass_plan is None for program in programs(obj))


def test_the_whole_function_compiled_finds_the_pass_too(captured: str, rng: np.random.Generator) -> None:
    X = rng.normal(size=(60_000, 5))
    y, w = rng.normal(size=60_000), rng.normal(size=5)

    def loss(w: Any, X: Any, y: Any) -> Any:
        return gg.mean(gg.logaddexp(X @ w, 0.0) - y * (X @ w)) + 0.1 * gg.sum(w * w)

    both = gg.value_and_grad(loss)
    compiled = gg.compile(both)
    same(compiled(w, X, y), both(w, X, y), 1e-11)
    text = compiled._latest.run.text()  # type: ignore[union-attr]
    assert ("one pass over 60,000 rows" in text) == (captured == "compiled")


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_the_number_of_threads_leaves_no_trace(threads: int, rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(150_000, 8)).astype(np.float32), rng.normal(size=150_000).astype(np.float32)
    w = rng.normal(size=8).astype(np.float32)

    def loss(w: Any, X: Any, y: Any) -> Any:
        return (X @ w - y) ** 2

    one = gg.Objective(loss, (X, y), threads=1, block_size=4096).value_and_grad(w)
    many = gg.Objective(loss, (X, y), threads=threads, block_size=4096).value_and_grad(w)
    assert one[0] == many[0]
    np.testing.assert_array_equal(one[1], many[1])


def test_sums_are_as_exact_as_float64_makes_them(rng: np.random.Generator) -> None:
    X = rng.normal(size=(100_000, 4)).astype(np.float32)
    y = rng.normal(size=100_000).astype(np.float32)
    w = rng.normal(size=4).astype(np.float32)
    value, g = gg.Objective(lambda w, X, y: (X @ w - y) ** 2, (X, y)).value_and_grad(w)
    r = X.astype(float) @ w.astype(float) - y
    assert value == pytest.approx(np.mean(r * r), rel=1e-7)
    np.testing.assert_allclose(g, 2 * r @ X.astype(float) / len(r), rtol=1e-6, atol=1e-7)


def test_minimize_and_mini_batches(rng: np.random.Generator) -> None:
    X = rng.normal(size=(ROWS, 4))
    y = X @ np.array([1.0, -2.0, 0.5, 3.0]) + 0.1 * rng.normal(size=ROWS)
    for options in (
        {},
        {"method": "gd", "lr": 0.1, "max_iter": 20},
        {"method": "adam", "batch_size": 64, "epochs": 2, "lr": 0.05},
    ):
        results = [
            gg.minimize(make(lambda p, X, y: (eta(p, X) - y) ** 2, (X, y)), {"w": np.zeros(4), "b": 0.0}, **options)
            for make in (gg.Objective, eagerly)
        ]
        same(results[0].params, results[1].params, 1e-7)


def test_minimize_captures_a_function_over_large_data(monkeypatch: Any, rng: np.random.Generator) -> None:
    X = rng.normal(size=(40_000, 4))
    y = X @ np.array([1.0, -2.0, 0.5, 3.0])

    def fun(w: Any) -> Any:
        return scale * gg.mean((X @ w - y) ** 2)

    monkeypatch.setattr(function, "has_compiler", lambda: True)
    unasked = function.Unasked(gg.value_and_grad(fun), fun)
    scale = 0.0
    for _ in range(2):
        scale += 1.0
        for _ in range(3):
            same(unasked(np.ones(4)), gg.value_and_grad(fun)(np.ones(4)), 1e-10)
        assert isinstance(unasked._run, function.Compiled)
    np.testing.assert_allclose(gg.minimize(fun, np.zeros(4)).params, [1.0, -2.0, 0.5, 3.0], rtol=1e-6)

    def branching(w: Any) -> Any:
        return gg.mean((X @ w - y) ** 2) if float(w[0]) > -10 else gg.sum(w)

    with pytest.warns(errors.CaptureWarning, match="a value is read"):
        assert gg.minimize(branching, np.zeros(4)).success
    few = X[:10], y[:10]
    small = function.Unasked(lambda w: w, lambda w: few)
    small(1.0)
    small(1.0)
    assert not isinstance(small._run, function.Compiled)


def test_minimize_leaves_what_is_not_the_same_in_every_call(monkeypatch: Any, rng: np.random.Generator) -> None:
    X = rng.normal(size=(40_000, 4))
    monkeypatch.setattr(function, "has_compiler", lambda: True)
    seen: list[Any] = []

    def keeping(w: Any) -> Any:
        seen.append(gg.mean((X @ w - 1.0) ** 2))
        return seen[-1]

    found = gg.minimize(keeping, np.zeros(4))
    assert len(seen) == found.nfev
    assert min(map(float, seen)) == pytest.approx(found.fun)

    def random(w: Any) -> Any:
        return gg.mean((X @ w - 1.0) ** 2) + (w * rng.normal(size=4)).sum()

    unasked = function.Unasked(gg.value_and_grad(random), random)
    with pytest.warns(errors.CaptureWarning, match="random"):
        assert len({float(unasked(np.ones(4))[0]) for _ in range(4)}) == 4


def test_batches_share_what_was_captured(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 4)), rng.normal(size=ROWS)
    obj = gg.Objective(lambda w, X, y: (X @ w - y) ** 2, (X, y))
    for batch in obj.batches(100):
        batch.value_and_grad(np.ones(4))
    assert len(programs(obj)) == 1


# --------------------------------------------------------------------------------------------- what cannot be captured


def not_captured(loss: Any, data: Any, params: Any, why: str) -> None:
    """The loss runs eagerly, with the same numbers, and one warning that says why."""
    obj = gg.Objective(loss, data)
    with pytest.warns(errors.CaptureWarning, match=why):
        got = obj.value_and_grad(params)
    same(got, eagerly(loss, data).value_and_grad(params), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(obj.value_and_grad(params), got, 1e-12)


def test_a_branch_on_a_value(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 4)), rng.normal(size=ROWS)

    def loss(w: Any, X: Any, y: Any) -> Any:
        if float(w[0]) > 0:
            return (X @ w - y) ** 2
        return gg.abs(X @ w - y)

    not_captured(loss, (X, y), np.ones(4), r"test_compile_objective\.py:\d+: a value is read")
    not_captured(loss, (X, y), -np.ones(4), "a value is read")


def test_numpy_on_the_data(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 4)), rng.uniform(1, 2, size=ROWS)
    not_captured(lambda w, X, y: (X @ w - np.log(y)) ** 2, (X, y), np.ones(4), "cannot be captured")


def test_the_number_of_rows_as_a_value(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(100, 4)), rng.normal(size=100)
    not_captured(lambda w, X, y: (X @ w - y) ** 2 / len(X), (X, y), np.ones(4), "every number of rows")


def test_something_random(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(100, 4)), rng.normal(size=100)
    noise = np.random.default_rng(0)
    obj = gg.Objective(lambda w, X, y: (X @ w - y) ** 2 * noise.uniform(0.5, 1.5), (X, y))
    with pytest.warns(errors.CaptureWarning, match="something random"):
        first = obj.value(np.ones(4))
    assert obj.value(np.ones(4)) != first, "drawn anew every time, as eagerly"


def test_a_branch_on_the_number_of_rows(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 4)), rng.normal(size=ROWS)

    def loss(w: Any, X: Any, y: Any) -> Any:
        return (X @ w - y) ** 2 if len(X) > 5000 else gg.abs(X @ w - y)

    not_captured(loss, (X, y), np.ones(4), "every number of rows")


def test_a_loss_that_keeps_a_record(rng: np.random.Generator) -> None:
    X = rng.normal(size=(ROWS, 4))
    seen: list[Any] = []

    def loss(w: Any, X: Any) -> Any:
        seen.append(len(X))
        return X @ w

    obj = gg.Objective(loss, (X,))
    with pytest.warns(errors.CaptureWarning, match="changes what it refers to"):
        obj.value(np.ones(4))
    before = len(seen)
    obj.value(np.ones(4))
    assert len(seen) > before


def test_a_loss_whose_record_outgrows_what_is_looked_at(rng: np.random.Generator) -> None:
    X = rng.normal(size=(ROWS, 4))
    seen: list[int] = [0] * 1000

    def loss(w: Any, X: Any) -> Any:
        seen.append(len(X))
        return X @ w

    with pytest.warns(errors.CaptureWarning, match="changes what it refers to"):
        assert gg.Objective(loss, (X,)).value(np.ones(4)) == pytest.approx(np.mean(X.sum(1)))


def test_a_loss_that_fills_a_cache_of_its_own(rng: np.random.Generator) -> None:
    class Model:
        @functools.cached_property
        def scale(self) -> float:
            return 2.0

        def loss(self, w: Any, X: Any) -> Any:
            return self.scale * (X @ w)

    X = rng.normal(size=(ROWS, 4))
    obj = gg.Objective(Model().loss, (X,))
    assert obj.value(np.ones(4)) == pytest.approx(2 * np.mean(X.sum(1)))
    assert obj.value(np.ones(4)) == pytest.approx(2 * np.mean(X.sum(1)))
    assert len(programs(obj)) == 1


def test_rows_that_mix(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(100, 4)), rng.normal(size=100)
    not_captured(
        lambda w, X, y: (X @ w - y - gg.mean(X @ w)) ** 2, (X, y), np.ones(4), "every number of rows|across rows"
    )
    not_captured(lambda w, X, y: gg.softmax(X @ w) * y, (X, y), np.ones(4), "softmax works across rows")
    not_captured(lambda w, X, y: (X @ w - gg.max(X @ w)) * y, (X, y), np.ones(4), "max works across rows")


def test_integers_in_one_row(captured: str, rng: np.random.Generator) -> None:
    X, small = rng.normal(size=(ROWS, 3)), rng.integers(0, 256, (ROWS, 3)).astype(np.uint8)

    def counts(w: Any, X: Any, k: Any) -> Any:
        return (X @ w) * ((X > 0).sum(axis=1) + k.sum(axis=1) + gg.prod(k, axis=1)) * gg.where(k[:, 0] > -1, 1.0, 2.0)

    def dots(w: Any, X: Any, k: Any) -> Any:
        return (X @ w) * gg.tanh(X @ np.ones((3, 40))).sum(axis=1) * (k @ np.array([1, 2, 3], np.uint8))

    for loss in (counts, dots):
        obj = gg.Objective(loss, (X, small))
        same(obj.value_and_grad(np.ones(3)), eagerly(loss, (X, small)).value_and_grad(np.ones(3)), 1e-10)
        programs(obj)


def test_transposed_rows_in_pointwise_work(captured: str, rng: np.random.Generator) -> None:
    def loss(W: Any, X: Any) -> Any:
        return gg.logsumexp((np.array([[1.0], [2.0]]) + (W @ X.T)).T, axis=1)

    X, W = rng.normal(size=(ROWS, 3)), rng.normal(size=(2, 3))
    obj = gg.Objective(loss, (X,))
    same(obj.value_and_grad(W), eagerly(loss, (X,)).value_and_grad(W), 1e-10)
    programs(obj)


def test_what_no_row_is_in_becomes_rows(rng: np.random.Generator) -> None:
    X, W = rng.normal(size=(50_000, 4)), rng.normal(size=(250, 200))

    def fun(X: Any, W: Any) -> Any:
        return gg.exp(X * W.reshape((50_000, 1))).sum()

    np.testing.assert_allclose(float(gg.compile(fun)(X, W)), float(fun(X, W)))
    empty = np.zeros((50_000, 0))
    np.testing.assert_allclose(gg.compile(lambda X, w, y: X @ w + y)(empty, np.zeros(0), X[:, 0]), X[:, 0])


def test_an_index_among_the_data(rng: np.random.Generator) -> None:
    group, y = rng.integers(0, 5, size=ROWS), rng.normal(size=ROWS)
    not_captured(lambda table, group, y: (gg.take(table, group) - y) ** 2, (group, y), np.ones(5), "a value is read")


def test_errors_of_the_loss_are_the_eager_ones(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(100, 4)), rng.normal(size=100)
    with pytest.raises(errors.ShapeMismatch, match="one loss a row"):
        gg.Objective(lambda w, X, y: gg.sum((X @ w - y) ** 2), (X, y)).value_and_grad(np.ones(4))
    with pytest.raises(KeyError):
        gg.Objective(lambda p, X, y: X @ p["w"], (X, y)).value({"v": np.ones(4)})
    with pytest.raises(errors.ShapeMismatch, match="matmul"):
        gg.Objective(lambda w, X, y: X @ w - y, (X, y)).value_and_grad(np.ones(3))
    with pytest.raises(errors.ShapeMismatch, match="hvp"):
        gg.Objective(lambda w, X, y: (X @ w - y) ** 2, (X, y)).hvp(np.ones(4), np.ones(3))


def test_the_row_that_is_not_finite_is_named(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 4)), rng.normal(size=ROWS)
    X[1234, 2] = np.nan
    with pytest.raises(errors.NonFiniteLoss, match="row 1234"):
        gg.Objective(lambda w, X, y: (X @ w - y) ** 2, (X, y)).value_and_grad(np.ones(4))
    value, g = gg.Objective(lambda w, X, y: (X @ w - y) ** 2, (X, y)).evaluate(np.ones(4))
    assert np.isnan(value)
    assert np.isnan(g).all()


def test_nan_in_data_that_a_branch_drops(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 4)), rng.normal(size=ROWS)
    y[::7] = np.nan

    def loss(w: Any, X: Any, y: Any) -> Any:
        return gg.where(gg.isnan(y), 0.0, (X @ w - y) ** 2)

    same(gg.Objective(loss, (X, y)).value_and_grad(np.ones(4)), eagerly(loss, (X, y)).value_and_grad(np.ones(4)), 1e-12)


def test_float_errors_are_heard_of_where_asked_for(rng: np.random.Generator) -> None:
    X, y = 1000 * np.ones((100, 1)), np.ones(100)
    obj = gg.Objective(lambda w, X, y: gg.exp(X @ w) * y, (X, y))
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        obj.value(np.ones(1))


# ------------------------------------------------------------------------------------- what a loss means may change


def test_a_loss_that_means_something_else_is_captured_again(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 4)), rng.normal(size=ROWS)
    power, table, small = 2.0, {"scale": 1.0}, np.array([1.0])

    def loss(w: Any, X: Any, y: Any) -> Any:
        return small[0] * table["scale"] * gg.abs(X @ w - y) ** power

    obj, w = gg.Objective(loss, (X, y)), np.ones(4)
    first = obj.value(w)
    power = 3.0
    assert obj.value(w) == pytest.approx(np.mean(np.abs(X @ w - y) ** 3))
    power = 2.0
    table["scale"] = 2.0
    assert obj.value(w) == pytest.approx(2 * first)
    small[0] = 3.0
    assert obj.value(w) == pytest.approx(6 * first)


def test_what_cannot_be_looked_at_is_not_captured(rng: np.random.Generator) -> None:
    X = rng.normal(size=(ROWS, 4))
    for held in (collections.deque([2.0]), [2.0] * 5000, dict.fromkeys(range(5000), 2.0)):
        not_captured(lambda w, X, held=held: held[0] * (X @ w), (X,), np.ones(4), "may change unnoticed")


def test_an_objective_is_copied_and_pickled_after_use(rng: np.random.Generator) -> None:
    X = rng.normal(size=(ROWS, 4))
    obj = gg.Objective(row_sums, (X,))
    value = obj.value(np.ones(4))
    assert copy.deepcopy(obj).value(np.ones(4)) == value
    assert pickle.loads(pickle.dumps(obj)).value(np.ones(4)) == value


def row_sums(w: Any, X: Any) -> Any:
    return X @ w


def test_parameters_of_no_axes_keep_their_kind(rng: np.random.Generator) -> None:
    X = rng.normal(size=(ROWS, 4)).astype(np.float32)
    p = {"w": np.ones(4, np.float32), "a": np.array(0.5, np.float32), "b": np.float32(0.5), "c": 0.5}

    def loss(p: Any, X: Any) -> Any:
        return (X @ p["w"]) * p["a"] + p["b"] * p["c"]

    same(gg.Objective(loss, (X,)).value_and_grad(p), eagerly(loss, (X,)).value_and_grad(p), 1e-5)


def test_an_objective_within_a_captured_function(rng: np.random.Generator) -> None:
    obj = gg.Objective(row_sums, (rng.normal(size=(ROWS, 4)),))
    with pytest.raises(errors.CaptureError, match="call it outside"):
        gg.compile(lambda w: obj.value(w))(np.ones(4))


def test_fingerprints() -> None:
    class Model:
        def __init__(self) -> None:
            self.alpha = 1.0
            self.me = self

        def loss(self, w: Any) -> Any:
            return w * self.alpha

    fingerprint(lambda w: w * float(np.ndarray is np.generic))  # classes have attributes that are no values

    class Shy:
        def __getattr__(self, name: str) -> Any:
            raise OSError(name)

    shy = Shy()
    X = np.ones((10, 2))
    assert gg.Objective(lambda w, X: (X @ w) * (1.0 if shy else 2.0), (X,)).value(np.ones(2)) == 2.0
    model = Model()
    before = fingerprint(model.loss)
    assert before == fingerprint(model.loss)
    hash(before)
    model.alpha = 2.0
    assert before != fingerprint(model.loss)
    large = np.ones(1_000_000)
    assert fingerprint(lambda w: w * large) != fingerprint(lambda w: w * large), "two functions"

    def make(c: Any) -> Any:
        return lambda w: w * c

    one, other = make(1.0), make(1)
    assert fingerprint(one) != fingerprint(other)


SETTINGS = types.ModuleType("settings")


class Slotted:
    __slots__ = ("scale",)


class OfClass:
    scale = 1.0

    def times(self, z: Any) -> Any:
        return z * self.scale * SETTINGS.scale

    def __call__(self, w: Any, X: Any) -> Any:
        return self.times(X @ w)


def test_attributes_wherever_they_are(rng: np.random.Generator) -> None:
    slotted, nested, members = Slotted(), {"model": {"penalty": [{"scale": 1.0}]}}, {1.0}
    slotted.scale = SETTINGS.scale = 1.0
    X, w = rng.normal(size=(ROWS, 3)), np.ones(3)

    def set_nested(value: float) -> None:
        nested["model"]["penalty"][0]["scale"] = value

    def set_members(value: float) -> None:
        members.clear()
        members.add(value)

    for loss, change in (
        (lambda w, X: (X @ w) * slotted.scale, lambda v: setattr(slotted, "scale", v)),
        (lambda w, X: (X @ w) * nested["model"]["penalty"][0]["scale"], set_nested),
        (lambda w, X: (X @ w) * sum(members), set_members),
        (lambda w, X: (X @ w) * OfClass.scale, lambda v: setattr(OfClass, "scale", v)),
        (lambda w, X: (X @ w) * SETTINGS.scale, lambda v: setattr(SETTINGS, "scale", v)),
        (OfClass(), lambda v: setattr(OfClass, "scale", v)),
        (OfClass(), lambda v: setattr(SETTINGS, "scale", v)),
    ):
        obj = gg.Objective(loss, (X,))
        for value in (1.0, 3.0, 1.0):
            change(value)
            assert obj.value(w) == pytest.approx(value * X.sum() / ROWS)
        assert len(programs(obj)) == 2


def test_another_object_at_the_same_address() -> None:
    def loss_of(large: Any) -> Any:
        return lambda w: w * large

    before = fingerprint(loss_of(np.ones(1_000_000)))
    again = [fingerprint(loss_of(np.ones(1_000_000))) for _ in range(5)]
    assert all(before != other for other in again)


def test_many_threads_at_once(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(20_000, 4)), rng.normal(size=20_000)
    obj = gg.Objective(lambda w, X, y: gg.tanh(X @ w) * y, (X, y))
    right = obj.value(np.ones(4))
    got: list[float] = []
    workers = [threading.Thread(target=lambda: got.extend(obj.value(np.ones(4)) for _ in range(20))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == [right] * 80


def test_half_precision_data(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(500, 4)).astype(np.float16), rng.normal(size=500).astype(np.float16)
    w = rng.normal(size=4).astype(np.float16)

    def loss(w: Any, X: Any, y: Any) -> Any:
        return (X @ w - y) ** 2

    same(gg.Objective(loss, (X, y)).value_and_grad(w), eagerly(loss, (X, y)).value_and_grad(w), 2e-3)


def test_data_of_any_layout(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(ROWS, 4)), rng.normal(size=ROWS)

    def loss(w: Any, X: Any, y: Any) -> Any:
        return (X @ w - y) ** 2

    want = eagerly(loss, (X, y)).value_and_grad(np.ones(4))
    wide = np.zeros((ROWS, 9))
    wide[:, 2:6] = X
    for given in (
        np.asfortranarray(X),
        wide[:, 2:6],
        X.astype(X.dtype.newbyteorder(">")),
        np.repeat(X, 2, axis=0)[::2],
    ):
        same(gg.Objective(loss, (given, y)).value_and_grad(np.ones(4)), want, 1e-11)


SLOW = """
import numpy as np, resource, gpugrad as gg
rng = np.random.default_rng(0)
X = rng.standard_normal((1_000_000, 32), dtype=np.float32)
y = rng.standard_normal(1_000_000).astype(np.float32)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def loss(w, X, y):
    return gg.log(gg.cosh(gg.clip(X @ w - y, -3, 3)))
small = gg.Objective(loss, (X[:50_000], y[:50_000]))
small.value_and_grad(np.ones(32, np.float32))
before = peak()
gg.Objective(loss, (X, y)).value_and_grad(np.ones(32, np.float32))
f = gg.compile(gg.value_and_grad(lambda w, X, y: gg.mean(loss(w, X, y))))
f(np.ones(32, np.float32), X, y)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_beyond_the_data(captured: str) -> None:
    if captured == "blocks":
        environment = {**os.environ, "GPUGRAD_JIT": "0"}
    else:
        environment = dict(os.environ)
    done = subprocess.run([sys.executable, "-c", SLOW], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6
