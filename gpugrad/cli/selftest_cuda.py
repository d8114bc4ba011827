"""The self-test of what only a GPU has: the CUDA kernels in all their forms, and the memory of the device."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optree

import gpugrad as gg
from gpugrad import backend, kernels
from gpugrad.cli.selftest_report import DOUBLE, HALF, SINGLE, Host, Run, host
from gpugrad.cli.selftest_sums import views
from gpugrad.errors import DeviceMemoryWarning

Exact = list[tuple[Host, Any]]  # each output, and the error allowed in units of the rounding of the accumulate type

# ---------------------------------------------------------------------------------------------- what they compute


def _sigmoid(z: Host) -> tuple[Host, Host]:
    """Return sigmoid(z) and sigmoid(-z), both to full accuracy."""
    t = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, t) / (1 + t), np.where(z >= 0, t, 1) / (1 + t)


def _swish(x: Host, beta: Host) -> Exact:
    z = beta * x
    y = x * _sigmoid(z)[0]
    return [(y, 4 * (1 + np.abs(z)) * np.abs(y))]


def _swish_keep(x: Host, beta: Host) -> Exact:
    z = np.abs(beta * x)
    m = _sigmoid(-z)[0]
    return [*_swish(x, beta), (m, 4 * (1 + z) * m)]


def _slopes(g: Host, x: Host, beta: Host) -> Exact:
    """g times the slopes of swish in x and in beta; near the root of the first the error is one of its two terms."""
    z = beta * x
    s, c = _sigmoid(z)
    wide = 4 * (1 + np.abs(z))
    dbeta = g * (x * s) * (x * c)
    return [(g * s * (1 + z * c), wide * np.abs(g) * s * (1 + np.abs(z) * c)), (dbeta, wide * np.abs(dbeta))]


def _summed(terms: Host, units: Host, axes: tuple[int, ...]) -> tuple[Host, Host]:
    return np.sum(terms, axis=axes), np.sum(units + 4 * np.abs(terms), axis=axes)


def _slopes_and_sum(g: Host, x: Host, beta: Host) -> Exact:
    dx, dbeta = _slopes(g, x, beta)
    return [dx, _summed(*dbeta, tuple(range(x.ndim - beta.ndim)))]


def _with_column_sum(dx: Host, units: Host) -> Exact:
    return [(dx, units), _summed(dx, units, tuple(range(dx.ndim - 1)))]


def _bias_swish(x: Host, b: Host, beta: Host) -> Exact:
    ((y, units),) = _swish(x + b, beta)
    return [(y, units + 2 * (np.abs(x) + np.abs(b)))]


def _bias_swish_backward(g: Host, x: Host, b: Host, beta: Host) -> Exact:
    dx, units = _slopes(g, x + b, beta)[0]
    return _with_column_sum(dx, units + np.abs(g * beta) * (np.abs(x) + np.abs(b)))


def _logistic_loss(eta: Host, y: Host) -> Exact:
    s, c = _sigmoid(eta)
    sure = (y == 0) | (y == 1)
    softplus = np.log1p(np.exp(-np.abs(eta))) + np.maximum(np.where(y == 1, -eta, eta), 0)
    loss = softplus - np.where(sure, 0, y * eta)
    slope = np.where(y == 1, -c, s - y)
    wide = 4 * (1 + np.abs(eta))
    return [
        (loss, wide * np.where(sure, loss, softplus + np.abs(y * eta))),
        (slope, wide * np.where(sure, np.abs(slope), s + y)),
    ]


EXACT: dict[str, Callable[..., Exact]] = {
    "relu": lambda x: [(np.maximum(x, 0), 0)],
    "relu_backward": lambda g, x: [(np.where(x > 0, g, 0), 0)],
    "swish": _swish,
    "swish_keep": _swish_keep,
    "swish_backward": lambda g, x, beta: _slopes(g, x, beta)[:1],
    "swish_backward_kept": lambda g, x, _m, beta: [(dx, 2 * units) for dx, units in _slopes(g, x, beta)[:1]],
    "swish_backward_both": _slopes,
    "swish_backward_sum": _slopes_and_sum,
    "bias_relu": lambda x, b: [(np.maximum(x + b, 0), np.abs(x) + np.abs(b))],
    "bias_relu_backward": lambda g, y: _with_column_sum(np.where(y > 0, g, 0), 0 * g),
    "bias_swish": _bias_swish,
    "bias_swish_backward": _bias_swish_backward,
    "squared_error": lambda eta, y: [((eta - y) ** 2, 4 * (eta - y) ** 2), (2 * (eta - y), 4 * np.abs(eta - y))],
    "logistic_loss": _logistic_loss,
}
# What the arrays of a summing launch are; those of a pointwise one stand in its record. A: the accumulate type.
SUMMING = {
    "swish_backward_sum": ("g:A", "x", "beta:A"),
    "bias_relu_backward": ("g:A", "x"),
    "bias_swish_backward": ("g:A", "x", "b", "beta:A"),
}
# Entry points of the `.cu` files, and what launches them.
LAUNCHED_BY = {
    "swish_sum_wide": "swish_backward_sum",
    "swish_sum_narrow": "swish_backward_sum",
    "bias_relu_wide": "bias_relu_backward",
    "bias_relu_narrow": "bias_relu_backward",
    "bias_swish_wide": "bias_swish_backward",
    "bias_swish_narrow": "bias_swish_backward",
    "add_partials": "bias_relu_backward",
    "add_all_partials": "swish_backward_sum",
    "sgd": "sgd_update",
    "adam": "adam_update",
}


def arguments_of(name: str) -> tuple[str, ...]:
    """Return what a launch function takes, in order; a trailing ``:A`` marks the accumulate type."""
    if name in SUMMING:
        return SUMMING[name]
    spec = kernels.POINTWISE[name]
    return (*spec.inputs, *spec.rows, *(f"{number}:A" for number in spec.numbers))


def _draw(rng: np.random.Generator, name: str, dtype: Any, shape: tuple[int, ...], beta: Any) -> list[Any]:
    """Random host arguments: values of everyday size with large ones strewn in; beta a number or an array."""
    wide: Any = kernels.WIDE[dtype]
    columns = shape[-1:]
    x = np.where(rng.random(shape) < 0.1, rng.uniform(-85, 85, shape), rng.normal(scale=3, size=shape)).astype(dtype)
    drawn = {
        "x": x,
        "eta": x,
        "target": rng.choice([0.0, 1.0, 0.3], shape).astype(dtype),
        "g:A": np.asarray(rng.normal(size=shape)).astype(wide),
        "b": np.asarray(rng.normal(size=columns)).astype(dtype),
        "m:A": np.asarray(_sigmoid(-np.abs(np.asarray(beta, DOUBLE) * x.astype(DOUBLE)))[0]).astype(wide),
        "beta:A": beta.astype(wide) if isinstance(beta, np.ndarray) else beta,
    }
    return [drawn[argument] for argument in arguments_of(name)]


def _betas(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the kinds of beta that a launch takes: a number of the host, one of the device, a row."""
    yield "", 1.25
    if "beta:A" in arguments_of(name) and name != "bias_swish_backward":
        yield ", beta on the device", np.asarray(1.25)
        if shape and name != "bias_swish":
            yield ", beta a row", rng.uniform(-1, 2, shape[-1:])


# ----------------------------------------------------------------------------------------------------- the checks


def _check(run: Run, name: str, dtype: Any, what: str, given: Sequence[Any], laid: Callable[[Host], Any]) -> None:
    """Launch a kernel and compare its outputs with the formula in float64, and where it adds up, with themselves."""
    wide: Any = kernels.WIDE[dtype]
    eps, floor = float(np.finfo(wide).eps), 1e-30 if wide == SINGLE else 1e-290
    with run.case(f"{name} {dtype}, {what}"):
        arguments = [laid(a) if isinstance(a, np.ndarray) else a for a in given]
        launch = getattr(kernels, name)
        outputs = launch(*arguments)
        if outputs is None:
            raise NotImplementedError("the launch did not take these arguments")
        got = outputs if isinstance(outputs, tuple) else (outputs,)
        kinds = (":A", ":A") if name in SUMMING else kernels.POINTWISE[name].outputs
        with np.errstate(all="ignore"):
            wanted = EXACT[name](*(np.asarray(a, DOUBLE) for a in given))
        for i, (part, (want, units), kind) in enumerate(zip(got, wanted, kinds, strict=True)):
            bound = np.where(np.any(units), eps * np.asarray(units) + floor, 0)
            narrow = dtype == HALF and not kind.endswith(":A")
            if narrow:  # and rounded once more
                bound = bound + np.where(np.any(units), 2.0**-10 * np.abs(want) + 2.0**-24, 0)
            run.near(f"output {i}", part, want, bound, dtype if narrow else wide)
        if name in SUMMING:
            for i, (one, two) in enumerate(zip(got, launch(*arguments), strict=True)):
                run.same(f"output {i}, the same bits twice", two, one)


def every_kernel(run: Run, dtypes: Sequence[Any] = (SINGLE, DOUBLE, HALF)) -> None:
    """Every launch in every form, size and layout."""
    rng = np.random.default_rng(6)
    shapes: list[tuple[int, ...]] = [(), (0,), (1_031,), (37, 40), (5, 33)]
    tables: list[tuple[int, ...]] = [(67, 64), (67, 33)]
    if not run.quick:
        shapes += [(1,), (127,), (129,), (100_003,), (3, 0)]
        tables += [(4_099, 64), (4_099, 33), (3, 2_056), (1, 1), (7, 3, 8), (100_003,)]
    for dtype in dtypes:
        with run.group(f"kernels, {dtype}"):
            for name in kernels.POINTWISE:
                for shape in shapes:
                    if "b" in arguments_of(name) and not shape:
                        continue
                    for kind, beta in _betas(rng, name, shape):
                        given = _draw(rng, name, dtype, shape, beta)
                        _check(run, name, dtype, f"shape {shape}{kind}", given, run.put)
                given = _draw(rng, name, dtype, (37, 40), 1.25)
                for layout in views(run, given[0]):
                    _check(run, name, dtype, layout, given, functools.partial(_laid, run, layout))
                _check(run, name, dtype, "broadcast", *_broadcast(run, given))
            for name in SUMMING:
                for shape in tables:
                    for kind, beta in _betas(rng, name, shape):
                        given = _draw(rng, name, dtype, shape, beta)
                        _check(run, name, dtype, f"shape {shape}{kind}", given, run.put)
                given = _draw(rng, name, dtype, (37, 40), 1.25)
                for layout in views(run, given[0]):
                    _check(run, name, dtype, layout, given, functools.partial(_laid, run, layout))
            _limits(run, dtype)
            _updates(run, dtype)
    with run.group("kernels that nothing checks"):
        for name in sorted({kernel.name for kernel in kernels.every()}):
            known = LAUNCHED_BY.get(name, name)
            with run.case(name):
                run.holds("kernel", known in EXACT or known in ("sgd_update", "adam_update"), "no check", "one here")


def _laid(run: Run, layout: str, array: Host) -> Any:
    return views(run, array)[layout] if array.ndim == 2 else run.put(array)


def _broadcast(run: Run, given: Sequence[Any]) -> tuple[list[Any], Callable[[Host], Any]]:
    """Return arguments whose matrices are one row, and how to lay them out: repeated without a copy."""
    xp = backend.namespace_of_device(run.where)
    rows = [np.broadcast_to(a[:1], a.shape) if isinstance(a, np.ndarray) and a.ndim == 2 else a for a in given]
    return rows, lambda a: xp.broadcast_to(run.put(a[:1].copy()), a.shape) if a.ndim == 2 else run.put(a)


def _limits(run: Run, dtype: Any) -> None:
    """Zeros, infinities and NaN, in whole packs and in the tail."""
    big = float(np.finfo(dtype).max)
    x = np.tile(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, big, -big], dtype), 5)
    g = run.put(np.ones(x.size, kernels.WIDE[dtype]))
    nan = np.nan
    limits: dict[str, tuple[list[float], Callable[[Any], Any]]] = {
        "relu": ([0, 0, np.inf, 0, nan, big, 0], lambda x: kernels.relu(x)),
        "relu_backward": ([0, 0, 1, 0, 0, 1, 0], lambda x: kernels.relu_backward(g, x)),
        "swish": ([0, -0.0, np.inf, -0.0, nan, big, -0.0], lambda x: kernels.swish(x, 1.0)),
        "swish_backward": ([0.5, 0.5, 1, 0, nan, 1, 0], lambda x: kernels.swish_backward(g, x, 1.0)),
        "swish_backward_both": ([0, 0, 0, 0, nan, 0, 0], lambda x: kernels.swish_backward_both(g, x, 1.0)[1]),
    }
    for name, (wanted, launch) in limits.items():
        with run.case(f"{name} {dtype} at 0, -0, inf, -inf, NaN and the largest numbers"):
            want = np.tile(np.array(wanted, DOUBLE), 5)
            got = launch(run.put(x))
            run.near("values", got, want, 1e-30)
            if name == "swish":
                run.near("signs", np.signbit(backend.to_device(got, backend.CPU))[:4], np.signbit(want)[:4], 0.0)


def _updates(run: Run, dtype: Any) -> None:
    """Optimiser updates of more parameters than one launch takes, of all sizes."""
    rng = np.random.default_rng(7)
    wide: Any = kernels.WIDE[dtype]
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (2_048,), (2_049,), (5, 33), *[(7,)] * 64]
    w, g, u, v = ([np.asarray(rng.normal(size=s)) for s in shapes] for _ in range(4))
    w, v = [a.astype(dtype) for a in w], [np.square(a) for a in v]
    eps = 16 * float(np.finfo(dtype).eps)
    with run.case(f"sgd_update {dtype}"):
        states = [[run.put(a.astype(wide))] for a in u]
        out = kernels.sgd_update(
            [run.put(a) for a in w],
            [run.put(a.astype(wide)) for a in g],
            states,
            rate=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=0.01,
            scale=run.put(np.array(0.5, wide)),
        )
        for i, (got, state, a, b, m) in enumerate(zip(out, states, w, g, u, strict=True)):
            a = a.astype(DOUBLE)
            slope = 0.5 * b + 0.01 * a
            m = 0.9 * m + slope
            run.near(f"weight {i}", got, a - 0.1 * (slope + 0.9 * m), eps * (1 + np.abs(a)), dtype)
            run.near(f"velocity {i}", state[0], m, 8 * float(np.finfo(wide).eps) * (1 + np.abs(m)), wide)
    with run.case(f"adam_update {dtype}"):
        states = [[run.put(a.astype(wide)), run.put(b.astype(wide))] for a, b in zip(u, v, strict=True)]
        out = kernels.adam_update(
            [run.put(a) for a in w],
            [run.put(a.astype(wide)) for a in g],
            states,
            rate=0.1,
            betas=(0.9, 0.999),
            eps=1e-8,
            count=3,
            shrink=0.02,
            scale=None,
        )
        for i, (got, a, b, m, s) in enumerate(zip(out, w, g, u, v, strict=True)):
            a, m, s = a.astype(DOUBLE), 0.9 * m + 0.1 * b, 0.999 * s + 0.001 * b * b
            step = 0.1 * (m / (1 - 0.9**3)) / (np.sqrt(s / (1 - 0.999**3)) + 1e-8)
            run.near(f"weight {i}", got, 0.98 * a - step, eps * (1 + np.abs(a) + np.abs(step)), dtype)


# ----------------------------------------------------------------------------------------------------- the device


def memory(run: Run) -> None:
    """Device memory that a training step takes is back when its results are gone, without the garbage collector."""
    pool = backend.cupy().get_default_memory_pool()
    rng = np.random.default_rng(8)
    X, y = (run.put(rng.normal(size=s).astype(SINGLE)) for s in ((2_000, 16), (2_000,)))
    params = gg.nn.init_mlp([16, 32, 1], device=str(run.where))
    optimizer = gg.optim.Adam(1e-3)

    def loss(p: Any, X: Any, y: Any) -> Any:
        return gg.square(gg.nn.mlp(p, X)[:, 0] - y)

    objective = gg.Objective(loss, (X, y), device=str(run.where))

    def step() -> None:
        _, slopes = gg.value_and_grad(lambda p: gg.mean(loss(p, X, y)))(params)
        optimizer.step(params, slopes)

    steps: dict[str, Callable[[], Any]] = {
        "forward, backward and an Adam step": step,
        "Objective.value_and_grad": lambda: objective.value_and_grad(params),
        "minimize": lambda: gg.minimize(objective, params, "sgd", lr=1e-3, batch_size=500, epochs=1),
    }
    with run.group("memory"):
        for name, action in steps.items():
            with run.case(name):
                action()  # what is made once and kept: handles, optimiser state
                gc.collect()
                gc.disable()
                try:
                    before = pool.used_bytes()
                    action()
                    after = pool.used_bytes()
                finally:
                    gc.enable()
                run.holds("memory in use after it", after == before, f"{after:,} bytes", f"{before:,} as before")


def captured(run: Run) -> None:
    """Functions of `gpugrad.compile`, called until graphs of them are replayed, with float64 on the CPU."""
    rng, rows = np.random.default_rng(21), 1_003 if run.quick else 100_003
    X, y, w = rng.normal(size=(rows, 20)), rng.normal(size=rows), rng.normal(size=20)
    W, classes = rng.normal(size=(20, 3)), np.eye(3)[rng.integers(0, 3, rows)]
    layers = [{k: host(v) for k, v in layer.items()} for layer in gg.nn.init_mlp([20, 16, 16, 1])]
    slopes = gg.value_and_grad
    functions: dict[str, tuple[Callable[..., Any], Any]] = {
        "loop": (lambda X, w: gg.exp(0.1 * X) * gg.tanh(w) + 1.0, (X, w)),
        "sums": (lambda X: (gg.sum(gg.exp(X), axis=0), gg.sum(gg.exp(X), axis=1), gg.sum(gg.exp(X))), (X,)),
        "least squares": (slopes(lambda w, X, y: gg.mean(gg.squared_error(X @ w, y))), (w, X, y)),
        "logistic": (slopes(lambda w, X, y: gg.mean(gg.softplus(X @ w * -gg.sign(y)))), (w, X, y)),
        "classes": (
            slopes(lambda W, X, t: -gg.mean(gg.sum(t * gg.log_softmax(X @ W, axis=1), axis=1))),
            (W, X, classes),
        ),
        "network": (slopes(lambda p, X, y: gg.mean(gg.squared_error(gg.nn.mlp(p, X)[:, 0], y))), (layers, X, y)),
    }
    with run.group("captured functions"):
        for name, (function, args) in functions.items():
            with run.case(name):
                single = optree.tree_map(lambda a: np.asarray(a, SINGLE), args)
                want = optree.tree_leaves(function(*optree.tree_map(lambda a: np.asarray(a, DOUBLE), single)))
                given, compiled = optree.tree_map(run.put, single), gg.compile(function)
                for call in range(6):
                    for i, (a, b) in enumerate(zip(optree.tree_leaves(compiled(*given)), want, strict=True)):
                        b = host(b)
                        run.near(f"result {i}, call {call}", a, b, 1e-5 * np.max(np.abs(b)), SINGLE)


@contextmanager
def _room(pool: Any, size: int) -> Iterator[None]:
    """Leave CuPy's memory pool no more than `size` bytes above what is in use."""
    before = pool.get_limit()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + size)
    try:
        yield
    finally:
        pool.set_limit(size=before)


def short_of_memory(run: Run) -> None:
    """Data that the device has no room for is streamed, blocks that do not fit are halved: with the same results."""
    pool = backend.cupy().get_default_memory_pool()
    rng, rows = np.random.default_rng(9), 6_007 if run.quick else 40_009
    X, y = (rng.normal(size=s).astype(SINGLE) for s in ((rows, 16), (rows,)))
    where = str(run.where)
    params = gg.nn.init_mlp([16, 8, 1], device=where)

    def loss(p: Any, X: Any, y: Any) -> Any:
        return gg.squared_error(gg.nn.mlp(p, X)[:, 0], y)

    def compare(got: Any, want: Any) -> None:
        run.near("value", np.float64(got[0]), want[0], 1e-5 * want[0])
        pairs = zip(optree.tree_leaves(got[1]), optree.tree_leaves(want[1]), strict=True)
        for i, (a, b) in enumerate(pairs):
            b = host(b)
            run.near(f"gradient {i}", a, b, 1e-5 * np.max(np.abs(b)), SINGLE)

    with run.group("short of memory"):
        exact = gg.Objective(loss, (run.put(X), run.put(y)), device=where)
        want = exact.value_and_grad(params)
        options: dict[str, Any] = {"method": "sgd", "lr": 1e-3, "batch_size": 1_000, "epochs": 1}
        fitted = gg.minimize(exact, params, **options)
        with run.case("streamed from the host"), _room(pool, X.nbytes // 2):
            streamed = gg.Objective(loss, (X, y), device=where)
            there = [backend.is_cuda_array(a) for a in streamed.data]
            run.holds("data left on the host", not any(there), f"on the device: {there}", "all on the host")
            compare(streamed.value_and_grad(params), want)
            again = gg.minimize(streamed, params, **options)
            compare((again.fun, again.params), (fitted.fun, fitted.params))
        with run.case("blocks halved"), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            objective = gg.Objective(loss, (run.put(X), run.put(y)), device=where, block_size=rows)
            with _room(pool, rows * 8 * 4):  # a hidden layer of all rows: more is kept between steps
                compare(objective.value_and_grad(params), want)
            found = [w for w in said if issubclass(w.category, DeviceMemoryWarning)]
            run.holds("warnings", len(found) == 1, f"{len(found)} of them", "one")
