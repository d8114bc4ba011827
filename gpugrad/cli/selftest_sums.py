"""The self-test of what is made of ops: layouts, long sums, networks, optimisers, finite sums and their minima."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optree

import gpugrad as gg
from gpugrad import backend
from gpugrad.backend import CPU
from gpugrad.cli.selftest_report import DOUBLE, HALF, SINGLE, Host, Run


def views(run: Run, x: Host) -> dict[str, Any]:
    """Return a host matrix on the device in several layouts of memory."""
    one_off = run.put(np.concatenate([x[:1, :1].ravel(), x.ravel()]))
    return {
        "in order": run.put(x),
        "by columns": run.put(x.T.copy()).T,
        "every second": run.put(np.repeat(x, 2, axis=1))[:, ::2],
        "backwards": run.put(x[::-1, ::-1].copy())[::-1, ::-1],
        "one element off": one_off[1:].reshape(x.shape),
    }


def layouts(run: Run) -> None:
    """Ops that have kernels of their own, or go to a library, on arrays laid out in every way."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(130, 3)).astype(SINGLE)
    functions: dict[str, Callable[[Any], Any]] = {
        "relu": gg.relu,
        "swish": lambda x: gg.swish(x, 1.5),
        "exp": gg.exp,
        "sum": lambda x: gg.sum(x, axis=0),
        "softmax": gg.softmax,
        "matmul": lambda x: gg.matmul(x, _beside(w, x)),
    }
    with run.group("layouts of memory"):
        for dtype in (SINGLE, DOUBLE):
            x = rng.normal(size=(37, 130)).astype(dtype)
            eps = float(np.finfo(SINGLE if run.where == CPU else dtype).eps)
            for name, function in functions.items():
                want, pull = gg.vjp(function, x.astype(DOUBLE))
                g = rng.normal(size=want.shape).astype(dtype)
                (slope,) = pull(g.astype(DOUBLE))
                for layout, laid in views(run, x).items():
                    with run.case(f"{name} {dtype}, {layout}"):
                        got, device_pull = gg.vjp(function, gg.asarray(laid))
                        run.near("value", got, want, 32 * eps * (1 + np.max(np.abs(want))))
                        given = gg.asarray(views(run, g)[layout] if g.ndim == 2 else run.put(g))
                        run.near("gradient", device_pull(given)[0], slope, 32 * eps * (1 + np.max(np.abs(slope))))


def _beside(array: Host, x: Any) -> Any:
    """Return a host array in the dtype of a tensor and on its device."""
    return backend.to_device(array.astype(x.dtype), x.device)


def sums(run: Run) -> None:
    """Long sums: how exact, and the same bits every time."""
    rng = np.random.default_rng(2)
    rows = 20_011 if run.quick else 300_007
    x = rng.uniform(0, 1, size=rows).astype(SINGLE)
    table = rng.normal(size=(rows // 64, 33)).astype(SINGLE)
    b = rng.normal(size=33).astype(SINGLE)
    placed, table_placed, b_placed = run.put(x), run.put(table), run.put(b)
    with run.group("sums"):
        with run.case(f"sum of {rows:,} float32"):
            exact = math.fsum(x.tolist())
            run.near("sum", gg.sum(placed), exact, 1e-7 * exact, SINGLE)
            run.near("mean", gg.mean(placed), exact / rows, 1e-7 * exact / rows, SINGLE)
        with run.case("mean of 70,000 float16 ones"):
            run.near("mean", gg.mean(run.put(np.ones(70_000, HALF))), 1.0, 0.0, HALF)
        with run.case("cotangent of a broadcast row"):
            g = rng.normal(size=table.shape).astype(SINGLE)
            _, pull = gg.vjp(gg.add, table_placed, b_placed)
            size = np.sum(np.abs(g), axis=0, dtype=DOUBLE)
            run.near("gradient", pull(run.put(g))[1], np.sum(g, axis=0, dtype=DOUBLE), 2e-7 * size, SINGLE)
        functions: dict[str, Callable[[], Any]] = {
            "sum": lambda: gg.sum(placed),
            "sum along axis 0": lambda: gg.sum(table_placed, axis=0),
            "matmul": lambda: gg.matmul(table_placed.T, table_placed),
            "gradient of swish in x and beta": lambda: gg.vjp(gg.swish, table_placed, b_placed)[1](table_placed),
        }
        for name, function in functions.items():
            with run.case(f"{name}, three times"):
                first, *others = (optree.tree_leaves(function()) for _ in range(3))
                for again in others:
                    for one, two in zip(first, again, strict=True):
                        run.same("the same bits", one, two)


# -------------------------------------------------------------------------------- models, optimisers, regressions


def models(run: Run) -> None:
    """Whole networks, forward and backward, and swish with its beta learnt too."""
    rng = np.random.default_rng(3)
    X, y = rng.normal(size=(257, 5)), rng.normal(size=257)
    params: list[dict[str, Host]] = gg.nn.init_mlp([5, 33, 33, 1], dtype=DOUBLE, device="cpu")
    params[0]["b"] = rng.normal(size=33)
    wide = rng.normal(scale=3, size=(1001, 33))
    cases: dict[str, tuple[Callable[..., Any], Any]] = {
        **{
            f"network with {activation.__name__}": (
                lambda p, X, y, act=activation: gg.mean(gg.square(gg.nn.mlp(p, X, act)[:, 0] - y)),
                (params, X, y),
            )
            for activation in (gg.swish, gg.relu, gg.tanh)
        },
        "swish, beta a number": (lambda x, beta: gg.mean(gg.square(gg.swish(x, beta))), (wide, np.array(1.25))),
        "swish, beta a column": (
            lambda x, beta: gg.mean(gg.square(gg.swish(x, beta))),
            (wide, rng.uniform(0.5, 2, 33)),
        ),
    }
    dtypes = (SINGLE,) if run.where == CPU else (SINGLE, DOUBLE)
    with run.group("models"):
        for name, (function, arguments) in cases.items():
            every = tuple(range(len(arguments)))
            for dtype in dtypes:
                with run.case(f"{name}, {dtype}"):
                    low = optree.tree_map(lambda a, dtype=dtype: a.astype(dtype), arguments)
                    high = optree.tree_map(lambda a: a.astype(DOUBLE), low)
                    want, slopes = gg.value_and_grad(function, every)(*high)
                    got, gradients = gg.value_and_grad(function, every)(*optree.tree_map(run.put, low))
                    tight = 100 * float(np.finfo(dtype).eps)
                    run.near("value", got, want, tight * abs(want), dtype)
                    pairs = zip(optree.tree_leaves(gradients), optree.tree_leaves(slopes), strict=True)
                    for i, (g, slope) in enumerate(pairs):
                        run.near(f"gradient {i}", g, slope, tight * np.max(np.abs(slope)), dtype)


def optimisers(run: Run) -> None:
    """Five steps of every optimiser against its formula."""
    rng = np.random.default_rng(4)
    shapes: list[tuple[int, ...]] = [(33, 7), (131,), ()]
    rules: dict[str, tuple[Callable[[], Any], Callable[..., Host]]] = {
        "GradientDescent": (lambda: gg.optim.GradientDescent(0.1), lambda w, g, m, v, t: w - 0.1 * g),
        "SGD with momentum": (lambda: gg.optim.SGD(0.1, momentum=0.9), _sgd),
        "Adam": (lambda: gg.optim.Adam(0.1), _adam),
        "AdamW": (lambda: gg.optim.AdamW(0.1, weight_decay=0.5), lambda w, *rest: _adam(w, *rest) - 0.05 * w),
    }
    with run.group("optimisers"):
        for dtype in (SINGLE, DOUBLE, HALF):
            steps = [[np.asarray(rng.normal(size=s)).astype(dtype) for s in shapes] for _ in range(6)]
            for name, (make, formula) in rules.items():
                with run.case(f"{name}, {dtype}"):
                    params, grads = steps[0], steps[1:]
                    optimizer, moving = make(), [run.put(w) for w in params]
                    wanted = [w.astype(DOUBLE) for w in params]
                    moments = [(np.zeros(s), np.zeros(s)) for s in shapes]
                    for t, g in enumerate(grads, start=1):
                        moving = optimizer.step(moving, [run.put(a) for a in g])
                        arguments = zip(wanted, g, moments, strict=True)
                        wanted = [np.asarray(formula(w, a.astype(DOUBLE), *m, t)) for w, a, m in arguments]
                    for i, (got, want) in enumerate(zip(moving, wanted, strict=True)):
                        run.near(f"parameter {i}", got, want, 16 * float(np.finfo(dtype).eps) * (1 + abs(want)), dtype)


def _sgd(w: Host, g: Host, m: Host, _v: Host, _t: int) -> Host:
    m *= 0.9
    m += g
    return w - 0.1 * m


def _adam(w: Host, g: Host, m: Host, v: Host, t: int) -> Host:
    m += 0.1 * (g - m)
    v += 0.001 * (g * g - v)
    return w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)


def _linear_loss(w: Any, X: Any, y: Any) -> Any:
    return gg.square(X @ w - y)


def _logistic_loss(w: Any, X: Any, y: Any) -> Any:
    eta = X @ w
    return gg.softplus(eta) - y * eta


def _regression(rows: int, columns: int = 5) -> tuple[Host, Host, Host]:
    """Return X, y of a line with noise, and its least-squares solution, in float64 from float32 numbers."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(rows, columns)).astype(SINGLE).astype(DOUBLE)
    y = (X @ rng.normal(size=columns) + 0.1 * rng.normal(size=rows)).astype(SINGLE).astype(DOUBLE)
    return X, y, np.linalg.lstsq(X, y)[0]


def fits(run: Run) -> None:
    """The finite sum, in blocks of any size, and what `minimize` makes of it."""
    rows = 1_009 if run.quick else 5_003
    X, y, best = _regression(rows)
    truth = (y > 0).astype(DOUBLE)
    w = np.linspace(-0.5, 0.5, X.shape[1]).astype(SINGLE).astype(DOUBLE)
    eta, r = X @ w, X @ w - y
    exact = {
        "least squares": (_linear_loss, y, np.mean(r * r), 2 * X.T @ r / rows),
        "logistic": (
            _logistic_loss,
            truth,
            np.mean(np.logaddexp(0, eta) - truth * eta),
            X.T @ (1 / (1 + np.exp(-eta)) - truth) / rows,
        ),
    }
    with run.group("finite sums"):
        for dtype in (SINGLE, DOUBLE):
            eps = float(np.finfo(dtype).eps)
            for name, (loss, target, value, slope) in exact.items():
                data = (run.put(X.astype(dtype)), run.put(target.astype(dtype)))
                for size in ("auto", 64, rows):
                    with run.case(f"{name} {dtype}, block_size {size}"):
                        objective = gg.Objective(loss, data, block_size=size, device=str(run.where))
                        got, gradient = objective.value_and_grad(run.put(w.astype(dtype)))
                        run.near("value", np.float64(got), value, 16 * eps * value)
                        run.near("gradient", gradient, slope, 32 * eps * (1 + np.max(np.abs(slope))), dtype)
                        again = objective.value_and_grad(run.put(w.astype(dtype)))
                        run.same("the same value twice", np.float64(again[0]), np.float64(got))
                        run.same("the same gradient twice", again[1], gradient)
    with run.group("regressions"):
        start = run.put(np.zeros(X.shape[1]))
        objective = gg.Objective(_linear_loss, (run.put(X), run.put(y)), device=str(run.where))
        single = gg.Objective(
            _linear_loss, (run.put(X.astype(SINGLE)), run.put(y.astype(SINGLE))), device=str(run.where)
        )
        with run.case("lbfgs float64 against numpy.linalg.lstsq"):
            run.near("solution", gg.minimize(objective, start, "lbfgs", tol=1e-10).params, best, 1e-8, DOUBLE)
        with run.case("gd float64 against numpy.linalg.lstsq"):
            run.near("solution", gg.minimize(objective, start, "gd", tol=1e-8).params, best, 1e-6, DOUBLE)
        with run.case("lbfgs float32 against numpy.linalg.lstsq"):
            found = gg.minimize(single, start.astype(SINGLE), "lbfgs").params
            run.near("solution", found, best, 1e-4, SINGLE)
        with run.case("adam in batches against numpy.linalg.lstsq"):
            epochs = 30 if run.quick else 12
            found = gg.minimize(
                single,
                start.astype(SINGLE),
                gg.optim.Adam(lambda t: 0.05 * 0.98 ** (t / 4)),
                batch_size=64,
                epochs=epochs,
            ).params
            run.near("solution", found, best, 0.02, SINGLE)
