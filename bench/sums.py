"""The sums over many rows: least squares, generalised linear models, a loss nobody listed, a network.

A loss is written once for all libraries, as a user writes it, and once by hand with its slope. By hand it is the NumPy
(or CuPy) peer in float32, and in float64, block by block, what everybody's values are checked against.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpugrad import backend
from gpugrad.backend import Device

from .measure import Setting, Target, Work, near
from .peers import Names, Program, Run, autograd_mean, gpugrad_mean, jax_mean, torch_mean

BOTH = ("jax.jit", "torch.compile")
BLOCK = 100_000  # rows at a time in float64
READ = "one read of X, 1 thread"
GEMMS = "its matrix products alone"
TRANSCENDENTAL = 10  # operations that an exponential or a logarithm counts for


@dataclass
class Data:
    """Parameters and arrays that share their rows, on the device; float32."""

    params: list[Any]
    arrays: tuple[Any, ...]


def mean_work(
    setting: Setting,
    suite: str,
    name: str,
    program: Program,
    by_hand: Callable[..., list[Any]],
    make: Callable[[], Data],
    **more: Any,
) -> Work:
    """Return the row of value and gradient of the mean of a loss over all rows.

    program(names, params, *arrays) -> a loss a row. by_hand(xp, params, *arrays) -> the sum of the losses and of its
    gradients, one a parameter.
    """
    where = setting.where

    def mine(data: Data) -> Run:
        return gpugrad_mean(program, data.params, data.arrays, where)

    def plain(data: Data) -> Run:
        xp = backend.namespace(data.arrays[0])
        n = len(data.arrays[0])
        return lambda: [part / n for part in by_hand(xp, data.params, *data.arrays)]

    def torch(data: Data, compiled: bool = False) -> Run:
        return torch_mean(program, data.params, data.arrays, compiled)

    def verify(data: Data) -> Callable[[str, Any], str | None]:
        return near(in_float64(by_hand, data), 5e-4)

    return Work(
        suite,
        name,
        make,
        {
            "gpugrad": mine,
            "numpy" if where.kind == "cpu" else "cupy": plain,
            "torch": torch,
            "torch.compile": functools.partial(torch, compiled=True),
            "jax.jit": lambda data: jax_mean(program, data.params, data.arrays),
            "autograd": lambda data: autograd_mean(program, data.params, data.arrays),
        },
        verify,
        **more,
    )


def in_float64(by_hand: Callable[..., list[Any]], data: Data) -> list[Any]:
    """Return mean loss and gradients in float64 on the host, a block of rows at a time."""
    params = [_double(p) for p in data.params]
    rows = len(data.arrays[0])
    total: list[Any] = [0.0, *(np.zeros(p.shape) for p in params)]
    for start in range(0, rows, BLOCK):
        part = by_hand(np, params, *(_double(a[start : start + BLOCK]) for a in data.arrays))
        total = [a + b for a, b in zip(total, part, strict=True)]
    return [a / rows for a in total]


def _double(array: Any) -> Any:
    return np.asarray(backend.to_device(array, backend.CPU), np.float64)


# ---------------------------------------------------------------------------------------------------- linear predictors


@dataclass(frozen=True)
class Loss:
    """A loss of eta = X @ w.

    program(names, eta, y, *weights) -> a loss a row. by_hand(xp, eta, y, *weights) -> losses, their slopes in eta.
    response(rng, eta) -> y. sklearn: scikit-learn's name for it, and by what its value is multiplied to be ours.
    flops: a row, beyond the products.
    """

    program: Program
    by_hand: Callable[..., tuple[Any, Any]]
    response: Callable[[np.random.Generator, Any], Any]
    flops: int
    sklearn: tuple[str, float] | None = None
    weighted: bool = False


def _noisy(rng: np.random.Generator, eta: Any) -> Any:
    return eta + rng.standard_normal(len(eta), np.float32)


def _squared_by_hand(xp: Any, eta: Any, y: Any) -> tuple[Any, Any]:
    r = eta - y
    return r * r, 2 * r


def _logistic_by_hand(xp: Any, eta: Any, y: Any) -> tuple[Any, Any]:
    t = xp.exp(-abs(eta))
    return xp.maximum(eta, 0) + xp.log1p(t) - y * eta, xp.where(eta >= 0, 1, t) / (1 + t) - y


def _poisson_by_hand(xp: Any, eta: Any, y: Any) -> tuple[Any, Any]:
    mu = xp.exp(eta)
    return mu - y * eta, mu - y


def _log_cosh(m: Names, eta: Any, y: Any, weight: Any) -> Any:
    r = m.clip(eta - y, -1.5, 1.5)
    return weight * (m.softplus(-2.0 * r) + r - math.log(2.0))


def _log_cosh_by_hand(xp: Any, eta: Any, y: Any, weight: Any) -> tuple[Any, Any]:
    r = xp.clip(eta - y, -1.5, 1.5)
    return weight * xp.log(xp.cosh(r)), weight * xp.tanh(r) * (abs(eta - y) < 1.5)


def _huber(m: Names, eta: Any, y: Any) -> Any:
    r = eta - y
    size = m.abs(r)
    return m.where(size < 1.0, 0.5 * r * r, size - 0.5)


def _huber_by_hand(xp: Any, eta: Any, y: Any) -> tuple[Any, Any]:
    r = eta - y
    near = xp.clip(r, -1, 1)
    return near * (r - near / 2), near


def _quantile(m: Names, eta: Any, y: Any) -> Any:
    r = y - eta
    return m.where(r > 0, 0.8 * r, -0.2 * r)


def _quantile_by_hand(xp: Any, eta: Any, y: Any) -> tuple[Any, Any]:
    r = y - eta
    over = (r > 0).astype(eta.dtype)
    slope = 0.2 - over
    return -slope * r, slope


LOSSES = {
    "least squares": Loss(lambda m, eta, y: (eta - y) ** 2, _squared_by_hand, _noisy, 4, ("HalfSquaredError", 2.0)),
    "logistic": Loss(
        lambda m, eta, y: m.softplus(eta) - y * eta,
        _logistic_by_hand,
        lambda rng, eta: (rng.random(len(eta)) < 1 / (1 + np.exp(-eta))).astype(np.float32),
        8 + 2 * TRANSCENDENTAL,
        ("HalfBinomialLoss", 1.0),
    ),
    "Poisson": Loss(
        lambda m, eta, y: m.exp(eta) - y * eta,
        _poisson_by_hand,
        lambda rng, eta: rng.poisson(np.exp(eta)).astype(np.float32),
        4 + TRANSCENDENTAL,
        ("HalfPoissonLoss", 1.0),
    ),
    "log-cosh of a clipped residual, weighted": Loss(
        _log_cosh, _log_cosh_by_hand, _noisy, 12 + 2 * TRANSCENDENTAL, weighted=True
    ),
    "Huber": Loss(_huber, _huber_by_hand, _noisy, 8),
    "quantile 0.8": Loss(_quantile, _quantile_by_hand, _noisy, 6),
}


def linear(setting: Setting, suite: str, kind: str, rows: int, columns: int, **more: Any) -> Work:
    """Return the row of one loss of X @ w, X of rows x columns."""
    loss = LOSSES[kind]

    def program(m: Names, params: Any, X: Any, *rest: Any) -> Any:
        return loss.program(m, X @ params[0], *rest)

    def by_hand(xp: Any, params: Any, X: Any, *rest: Any) -> list[Any]:
        values, slopes = loss.by_hand(xp, X @ params[0], *rest)
        return [values.sum(), slopes @ X]

    work = mean_work(
        setting,
        suite,
        f"{kind}, {rows:,} x {columns}",
        program,
        by_hand,
        functools.partial(_linear_data, loss, rows, columns, setting.where),
        references={READ if setting.where.kind == "cpu" else "one read of X": lambda data: data.arrays[0].sum},
        moved=4 * rows * (columns + 1 + loss.weighted),
        flops=rows * (4 * columns + loss.flops),
        **more,
    )
    if loss.sklearn and setting.where.kind == "cpu":
        work.build["sklearn"] = functools.partial(_sklearn, *loss.sklearn, setting.threads)
    return work


def _linear_data(loss: Loss, rows: int, columns: int, where: Device) -> Data:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, columns), np.float32)
    truth = rng.standard_normal(columns).astype(np.float32) / np.float32(columns**0.5)
    arrays = [X, loss.response(rng, X @ truth)]
    if loss.weighted:
        arrays.append(rng.random(rows, np.float32) + np.float32(0.5))
    w = (0.5 * truth + 0.5 * rng.standard_normal(columns) / columns**0.5).astype(np.float32)
    return Data([backend.to_device(w, where)], tuple(backend.to_device(a, where) for a in arrays))


def _sklearn(name: str, factor: float, threads: int, data: Data) -> Run:
    """One evaluation of scikit-learn's own loss and gradient, what its linear models minimise."""
    loss = getattr(importlib.import_module("sklearn._loss"), name)()
    linear_loss = importlib.import_module("sklearn.linear_model._linear_loss").LinearModelLoss
    model = linear_loss(base_loss=loss, fit_intercept=False)
    X, y = data.arrays

    def run() -> Any:
        value, gradient = model.loss_gradient(data.params[0], X, y, n_threads=threads)
        return [factor * value, factor * gradient]

    return run


# ----------------------------------------------------------------------------------------------------------- a network


def network(m: Names, params: Sequence[Any], X: Any, y: Any) -> Any:
    """Squared error of a multilayer perceptron with Swish, a loss a row; params: W, b, W, b, ..."""
    for W, b in zip(params[:-2:2], params[1:-2:2], strict=True):
        X = m.dense_silu(X, W, b)
    return ((X @ params[-2] + params[-1])[:, 0] - y) ** 2


def network_by_hand(xp: Any, params: Sequence[Any], X: Any, y: Any) -> list[Any]:
    """The sum of the losses of `network` and its gradients: backpropagation written out."""
    hidden, slopes = [X], []
    for W, b in zip(params[:-2:2], params[1:-2:2], strict=True):
        z = hidden[-1] @ W + b
        s = 1 / (1 + xp.exp(-z))
        hidden.append(z * s)
        slopes.append(s + z * s * (1 - s))
    r = (hidden[-1] @ params[-2] + params[-1])[:, 0] - y
    g = 2 * r[:, None]
    grads: list[Any] = []
    for layer in reversed(range(len(hidden))):
        grads = [hidden[layer].T @ g, g.sum(0), *grads]
        if layer:
            g = (g @ params[2 * layer].T) * slopes[layer - 1]
    return [r @ r, *grads]


def network_data(rows: int, sizes: Sequence[int], where: Device) -> Data:
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((rows, sizes[0]), np.float32), rng.standard_normal(rows, np.float32)
    params = []
    for m, n in itertools.pairwise(sizes):
        params += [rng.standard_normal((m, n)) * (2 / m) ** 0.5, 0.1 * rng.standard_normal(n)]
    return Data(
        [backend.to_device(p.astype(np.float32), where) for p in params],
        tuple(backend.to_device(a, where) for a in (X, y)),
    )


def network_flops(rows: int, sizes: Sequence[int]) -> int:
    """Operations of the matrix products of one gradient; the first layer needs no gradient of its input."""
    return 2 * rows * (3 * sum(m * n for m, n in itertools.pairwise(sizes)) - sizes[0] * sizes[1])


def mlp(setting: Setting, rows: int, sizes: tuple[int, ...], **more: Any) -> Work:
    """Return the row of value and gradient of a network over all rows."""

    def products(data: Data) -> Run:
        weights, (X, _) = data.params[::2], data.arrays
        layers = [X]
        for W in weights:
            layers.append(layers[-1] @ W)

        def run() -> None:
            for layer, W in enumerate(weights):
                layers[layer] @ W
                layers[layer].T @ layers[layer + 1]
                if layer:
                    layers[layer + 1] @ W.T

        return run

    return mean_work(
        setting,
        "mlp",
        f"MLP {'-'.join(map(str, sizes))} swish, {rows:,} rows",
        network,
        network_by_hand,
        functools.partial(network_data, rows, sizes, setting.where),
        references={GEMMS: products},
        moved=4 * rows * (sizes[0] + 1),
        flops=network_flops(rows, sizes),
        bound="gemm",
        **more,
    )


# ----------------------------------------------------------------------------------------------------------- the suites


def linreg(setting: Setting) -> list[Work]:
    """Least squares: the usual shape, a wide one and a tall one."""
    sizes = [(2_000_000, 32), (200_000, 512), (20_000_000, 8)]
    if setting.quick:
        sizes = [(rows // 100, columns) for rows, columns in sizes]
    wanted = (
        (Target(BOTH, least=7.0), Target((READ,), most=1.2)),
        (Target(BOTH, least=1.0), Target((READ,), most=1.2)),
        (Target(BOTH, least=1.0), Target((READ,), most=2.0)),
    )
    return [
        linear(setting, "linreg", "least squares", rows, columns, targets=_full(setting, targets))
        for (rows, columns), targets in zip(sizes, wanted, strict=True)
    ]


def glm(setting: Setting) -> list[Work]:
    """Logistic and Poisson regression, and losses that no list has."""
    rows = 20_000 if setting.quick else 1_000_000
    likelihood = (Target(BOTH, least=8.0), Target((READ,), most=1.2))
    unlisted = (Target(BOTH, least=5.0), Target((READ,), most=2.0))
    wanted = {"logistic": likelihood, "Poisson": likelihood, "log-cosh of a clipped residual, weighted": unlisted}
    return [
        linear(setting, "glm", kind, rows, 32, targets=_full(setting, wanted.get(kind, ())))
        for kind in LOSSES
        if kind != "least squares"
    ]


def mlps(setting: Setting) -> list[Work]:
    """A network on many rows."""
    targets = (Target(BOTH, least=1.3), Target(("torch",), least=3.0), Target((GEMMS,), most=1.2))
    if setting.quick:
        return [mlp(setting, 2_048, (64, 64, 64, 1))]
    return [mlp(setting, 65_536, (64, 256, 256, 1), targets=_full(setting, targets))]


def _full(setting: Setting, targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """Targets are stated for full sizes on the CPU."""
    return () if setting.quick or setting.where.kind != "cpu" else targets
