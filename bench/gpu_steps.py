"""Ops and training steps on a GPU, by gpugrad and its peers: what `bench.gpu` times beside the kernels.

A peer is a function that returns an `Implementation`; one that cannot run here raises, and is named as missing.
"""

import functools
import importlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import gpugrad as gg
from gpugrad import backend

from .gpu import BETA, COLUMNS, SINGLE, Meter, launches, random

COMPILE_SECONDS = 40  # what torch.compile may need, which is why not every step has it


@dataclass
class Implementation:
    """run: once more, without waiting. wait: for what run returned. check: the numbers to compare with float64.

    close: puts back what building it has set.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], object]
    check: Callable[[], Sequence[Any]]
    close: Callable[[], object] = lambda: None


@dataclass
class Step:
    """A named piece of work, the peers that do it, and the float64 numbers they must give (relative to the largest)."""

    name: str
    build: dict[str, Callable[[], Implementation]]
    expected: Callable[[], Sequence[Any]]
    rtol: float
    targets: tuple[dict[str, Any], ...] = ()
    note: str = ""
    moved: int = 0  # bytes that cannot be avoided, where that is what limits it


class Missing(Exception):
    """A peer cannot run here: why."""


@functools.cache
def _torch() -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise Missing(f"not installed ({error})") from None
    if not torch.cuda.is_available():
        raise Missing(f"PyTorch {torch.__version__} sees no GPU")
    return torch


@functools.cache
def _jax() -> Any:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory too
    try:
        jax = importlib.import_module("jax")
        jax.devices("gpu")
    except ImportError as error:
        raise Missing(f"not installed ({error})") from None
    except RuntimeError as error:
        raise Missing(f"JAX sees no GPU ({str(error).splitlines()[0]})") from None
    jax.config.update("jax_default_matmul_precision", "highest")
    return jax


def _numbers(value: Any) -> Any:
    """Return a result of any peer as a float64 host array."""
    value = value._data if isinstance(value, gg.Tensor) else value
    if backend.is_array(value):
        value = backend.to_device(value, backend.CPU)
    elif hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value, np.float64)


def _verified(step: Step, got: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """Say how far off an implementation is, or None when it is right."""
    for i, (mine, right) in enumerate(zip(got, expected, strict=True)):
        mine, right = _numbers(mine), np.asarray(right, np.float64)
        error = (
            np.max(np.abs(mine - right)) / max(np.max(np.abs(right)), 1e-30) if mine.shape == right.shape else np.inf
        )
        if not error <= step.rtol:
            return f"part {i} is off by {error:.2g} relative, allowed {step.rtol:.2g}"
    return None


def measure(meter: Meter, make: Callable[[Meter], Step]) -> dict[str, Any]:
    """Check and time a step by every peer."""
    if meter.left <= 0:
        return {"name": make.__name__, "note": "skipped, out of time", "peers": {}}
    step = make(meter)
    found = {"name": step.name, "note": step.note, "targets": step.targets, "peers": _measure(meter, step)}
    meter.cupy.get_default_memory_pool().free_all_blocks()  # the other peers' pools need it
    return found


def _measure(meter: Meter, step: Step) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    expected = step.expected()
    for peer, build in step.build.items():
        if meter.left <= (COMPILE_SECONDS if peer == "torch.compile" else 0):
            rows[peer] = {"skipped": "out of time"}
            continue
        try:
            made = build()
            try:
                rows[peer] = _checked_and_timed(meter, step, made, expected)
            finally:
                made.close()
            if "wrong" in rows[peer]:
                meter.wrong.append(f"{step.name}: {peer}: {rows[peer]['wrong']}")
        except Missing as error:
            rows[peer] = {"missing": str(error)}
        except Exception as error:
            if peer == "gpugrad":
                raise
            rows[peer] = {"missing": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
    return rows


def _checked_and_timed(meter: Meter, step: Step, made: Implementation, expected: Sequence[Any]) -> dict[str, Any]:
    if off := _verified(step, made.check(), expected):
        return {"wrong": off}
    row: dict[str, Any] = meter.on_host(made.run, made.wait)
    if step.moved:
        row["GBps"] = step.moved / row["median_s"] / 1e9
    return row


def count(meter: Meter, found: list[dict[str, Any]]) -> None:
    """Count the launches of the steps that they hold up; after all timing, which profiling would disturb."""
    for make in (least_squares, mlp_small):
        step = make(meter)
        peers = next((entry["peers"] for entry in found if entry["name"] == step.name), {})
        for peer, row in peers.items():
            if "median_s" in row and peer != "torch.compile" and meter.left > 0:
                run = step.build[peer]().run
                run()
                row["launches"] = launches(meter, run)
        counted = ", ".join(f"{peer} {row['launches']}" for peer, row in peers.items() if row.get("launches"))
        print(f"\nlaunches a call, {step.name}: {counted or 'not counted (PyTorch and its profiler count them)'}")


def show(entry: dict[str, Any]) -> None:
    """Print a step's times."""
    print(f"\n{entry['name']}{entry['note'] and ' (' + entry['note'] + ')'}")
    print(f"  {'':24s}{'median ms':>11s}{'min ms':>10s}{'/ gpugrad':>11s}{'GB/s':>9s}")
    mine = entry["peers"].get("gpugrad", {}).get("median_s")
    for peer, row in entry["peers"].items():
        if "median_s" not in row:
            print(f"  {peer:24s}{next(f'{key}: {text}' for key, text in row.items())}")
            continue
        ratio = f"{row['median_s'] / mine:11.2f}" if mine else f"{'':11s}"
        rate = f"{row['GBps']:9.0f}" if "GBps" in row else ""
        print(f"  {peer:24s}{row['median_s'] * 1e3:11.4f}{row['min_s'] * 1e3:10.4f}{ratio}{rate}", flush=True)


# ------------------------------------------------------------------------------------------------ swish


def _sample(n: int) -> slice:
    return slice(None, None, max(1, n // 100_000))


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def _waits(meter: Meter) -> Callable[[Any], object]:
    return lambda _result: meter.wait()


def swish_forward_backward(meter: Meter) -> Step:
    """Value and gradient of swish, every element of the gradient given a cotangent."""
    n = meter.size(100_000_000, COLUMNS)
    x, g = random(meter, (n,), SINGLE, scale=3), random(meter, (n,), SINGLE, seed=1)
    at = _sample(n)

    def expected() -> list[Any]:
        a, c = _numbers(x[at]), _numbers(g[at])
        s = _sigmoid(BETA * a)
        return [a * s, c * s * (1 + BETA * a * _sigmoid(-BETA * a))]

    def gpugrad() -> Implementation:
        tensor, cotangent = gg.tensor(x, requires_grad=True), gg.tensor(g)

        def run() -> Any:
            tensor.zero_grad()
            y = gg.swish(tensor, BETA)
            y.backward(cotangent)
            return y, tensor.grad

        return Implementation(run, _waits(meter), lambda: [part._data[at] for part in run()])

    def cupy() -> Implementation:
        def run() -> Any:
            s = 1 / (1 + meter.cupy.exp(-BETA * x))
            return x * s, g * (s * (1 + BETA * x * (1 - s)))

        return Implementation(run, _waits(meter), lambda: [part[at] for part in run()])

    def torch_by(wrap: Callable[[Any], Any]) -> Implementation:
        torch = _torch()
        leaf, cotangent = torch.from_dlpack(x).requires_grad_(), torch.from_dlpack(g)
        function = wrap(lambda t: t * torch.sigmoid(BETA * t))

        def run() -> Any:
            leaf.grad = None
            y = function(leaf)
            y.backward(cotangent)
            return y.detach(), leaf.grad

        return Implementation(run, _waits(meter), lambda: [part[:: at.step] for part in run()])

    def jax() -> Implementation:
        jax = _jax()
        xj, gj = (jax.numpy.from_dlpack(a) for a in (x, g))

        @jax.jit
        def both(x: Any, g: Any) -> Any:
            y, pull = jax.vjp(lambda x: x * jax.nn.sigmoid(BETA * x), x)
            return y, pull(g)[0]

        return Implementation(
            lambda: both(xj, gj), jax.block_until_ready, lambda: [part[:: at.step] for part in both(xj, gj)]
        )

    return Step(
        f"swish forward and backward, {n:,} float32",
        {
            "gpugrad": gpugrad,
            "cupy": cupy,
            "torch composition": lambda: torch_by(lambda f: f),
            "torch.compile": lambda: torch_by(_torch().compile),
            "jax.jit": jax,
        },
        expected,
        1e-5,
        moved=20 * n,
    )


def silu_forward_backward(meter: Meter) -> Step:
    """The same with beta 1, for which PyTorch has a kernel of its own."""
    n = meter.size(100_000_000, COLUMNS)
    x, g = random(meter, (n,), SINGLE, scale=3), random(meter, (n,), SINGLE, seed=1)
    at = _sample(n)

    def expected() -> list[Any]:
        a, c = _numbers(x[at]), _numbers(g[at])
        return [a * _sigmoid(a), c * _sigmoid(a) * (1 + a * _sigmoid(-a))]

    def gpugrad() -> Implementation:
        tensor, cotangent = gg.tensor(x, requires_grad=True), gg.tensor(g)

        def run() -> Any:
            tensor.zero_grad()
            y = gg.silu(tensor)
            y.backward(cotangent)
            return y, tensor.grad

        return Implementation(run, _waits(meter), lambda: [part._data[at] for part in run()])

    def torch() -> Implementation:
        torch = _torch()
        leaf, cotangent = torch.from_dlpack(x).requires_grad_(), torch.from_dlpack(g)

        def run() -> Any:
            leaf.grad = None
            y = torch.nn.functional.silu(leaf)
            y.backward(cotangent)
            return y.detach(), leaf.grad

        return Implementation(run, _waits(meter), lambda: [part[:: at.step] for part in run()])

    return Step(
        f"silu forward and backward, {n:,} float32",
        {"gpugrad": gpugrad, "torch": torch},
        expected,
        1e-5,
        targets=({"peer": "torch", "least": 1.0},),
        moved=20 * n,
    )


def swish_learnt_beta(meter: Meter) -> Step:
    """Backward of swish in x and in one beta, whose gradient is a sum over all elements."""
    n = meter.size(100_000_000, COLUMNS)
    x, g = random(meter, (n,), SINGLE, scale=3), abs(random(meter, (n,), SINGLE, seed=1))  # a sum that does not cancel
    at = _sample(n)

    def expected() -> list[Any]:
        a, c = _numbers(x[at]), _numbers(g[at])
        slope = c * _sigmoid(BETA * a) * (1 + BETA * a * _sigmoid(-BETA * a))
        total = 0.0
        for start in range(0, n, 1 << 22):  # in blocks: the sum itself over every element
            part, cot = (_numbers(v[start : start + (1 << 22)]) for v in (x, g))
            s = _sigmoid(BETA * part)
            total += float(np.sum(cot * part * part * s * (1 - s)))
        return [slope, total]

    def gpugrad() -> Implementation:
        tensor, beta = gg.tensor(x, requires_grad=True), gg.tensor(np.float32(BETA), device=str(meter.where))
        beta = gg.tensor(beta, requires_grad=True)
        cotangent = gg.tensor(g)
        y = gg.swish(tensor, beta)

        def run() -> Any:
            tensor.zero_grad()
            beta.zero_grad()
            y.backward(cotangent, retain_graph=True)
            return tensor.grad, beta.grad

        return Implementation(run, _waits(meter), lambda: _first_at(run(), at))

    def torch() -> Implementation:
        torch = _torch()
        leaf, cotangent = torch.from_dlpack(x).requires_grad_(), torch.from_dlpack(g)
        beta = torch.tensor(BETA, device=leaf.device, requires_grad=True)
        y = leaf * torch.sigmoid(beta * leaf)

        def run() -> Any:
            leaf.grad = beta.grad = None
            y.backward(cotangent, retain_graph=True)
            return leaf.grad, beta.grad

        return Implementation(run, _waits(meter), lambda: _first_at(run(), at))

    def cupy() -> Implementation:
        s = 1 / (1 + meter.cupy.exp(-BETA * x))

        def run() -> Any:
            c = 1 - s
            return g * (s * (1 + BETA * x * c)), (g * (x * s) * (x * c)).sum()

        return Implementation(run, _waits(meter), lambda: _first_at(run(), at))

    def jax() -> Implementation:
        jax = _jax()
        xj, gj, beta = jax.numpy.from_dlpack(x), jax.numpy.from_dlpack(g), jax.numpy.float32(BETA)

        @jax.jit
        def slopes(x: Any, beta: Any, g: Any) -> Any:
            return jax.vjp(lambda x, b: x * jax.nn.sigmoid(b * x), x, beta)[1](g)

        return Implementation(
            lambda: slopes(xj, beta, gj), jax.block_until_ready, lambda: _first_at(slopes(xj, beta, gj), at)
        )

    return Step(
        f"swish backward in x and a learnt beta, {n:,} float32",
        {"gpugrad": gpugrad, "cupy": cupy, "torch composition": torch, "jax.jit": jax},
        expected,
        2e-5,
        targets=({"peer": "torch composition", "least": 2.0},),
        note="backward alone; jax computes what it needs of forward again",
        moved=12 * n,
    )


def _first_at(parts: Any, at: slice) -> list[Any]:
    first, *rest = (part._data if isinstance(part, gg.Tensor) else part for part in parts)
    return [first[:: at.step], *rest]


def bias_swish_backward(meter: Meter) -> Step:
    """Backward of a layer's bias and activation, with the bias gradient's sum over the rows."""
    rows = meter.size(100_000_000, COLUMNS) // COLUMNS
    shape = (rows, COLUMNS)
    x, g = random(meter, shape, SINGLE), abs(random(meter, shape, SINGLE, seed=1))
    b = random(meter, (COLUMNS,), SINGLE, seed=2)

    def expected() -> list[Any]:
        total = np.zeros(COLUMNS)
        for start in reversed(range(0, rows, 1 << 14)):  # the block of the first row comes last
            z = _numbers(x[start : start + (1 << 14)]) + _numbers(b)
            part = _sigmoid(z) * (1 + z * _sigmoid(-z)) * _numbers(g[start : start + (1 << 14)])
            total += part.sum(axis=0)
        return [part[0], total]

    def gpugrad() -> Implementation:
        tensor, bias = gg.tensor(x, requires_grad=True), gg.tensor(b, requires_grad=True)
        cotangent = gg.tensor(g)
        y = gg.bias_swish(tensor, bias)

        def run() -> Any:
            tensor.zero_grad()
            bias.zero_grad()
            y.backward(cotangent, retain_graph=True)
            return tensor.grad, bias.grad

        return Implementation(run, _waits(meter), lambda: [run()[0]._data[0], run()[1]])

    def torch() -> Implementation:
        torch = _torch()
        leaf, bias = torch.from_dlpack(x).requires_grad_(), torch.from_dlpack(b).requires_grad_()
        cotangent = torch.from_dlpack(g)
        y = torch.nn.functional.silu(leaf + bias)

        def run() -> Any:
            leaf.grad = bias.grad = None
            y.backward(cotangent, retain_graph=True)
            return leaf.grad, bias.grad

        return Implementation(run, _waits(meter), lambda: [run()[0][0], run()[1]])

    return Step(
        f"bias and swish backward, {rows:,} x {COLUMNS} float32",
        {"gpugrad": gpugrad, "torch": torch},
        expected,
        5e-5,
        note="backward alone",
        moved=12 * rows * COLUMNS,
    )


# ------------------------------------------------------------------------------------------- regressions


def least_squares(meter: Meter) -> Step:
    """Mean squared error of a linear model, value and gradient."""

    def numbers(xp: Any, w: Any, X: Any, y: Any) -> Any:
        r = X @ w - y
        return xp.mean(r * r), (2 / len(X)) * (r @ X)

    return _linear(
        meter,
        "least squares",
        2_000_000,
        numbers,
        lambda w, X, y: gg.squared_error(X @ w, y),
        lambda torch, eta, y: ((eta - y) ** 2).mean(),
        lambda jax, eta, y: jax.numpy.mean((eta - y) ** 2),
        classes=False,
    )


def logistic(meter: Meter) -> Step:
    """Mean logistic loss of a linear model, value and gradient."""

    def numbers(xp: Any, w: Any, X: Any, y: Any) -> Any:
        eta = X @ w
        return xp.mean(xp.logaddexp(0, eta) - y * eta), ((1 / (1 + xp.exp(-eta)) - y) @ X) / len(X)

    return _linear(
        meter,
        "logistic",
        1_000_000,
        numbers,
        lambda w, X, y: gg.logistic_loss(X @ w, y),
        lambda torch, eta, y: torch.nn.functional.binary_cross_entropy_with_logits(eta, y),
        lambda jax, eta, y: jax.numpy.mean(jax.nn.softplus(eta) - y * eta),
        classes=True,
    )


def _linear(
    meter: Meter,
    name: str,
    full: int,
    numbers: Callable[..., Any],
    loss: Callable[..., Any],
    torch_loss: Callable[..., Any],
    jax_loss: Callable[..., Any],
    *,
    classes: bool,
) -> Step:
    """Return value and gradient of a linear model as a step; the losses are those of each library."""
    rows, columns = meter.size(full), 32
    X = random(meter, (rows, columns), SINGLE)
    w, truth = random(meter, (columns,), SINGLE, scale=0.3, seed=1), random(meter, (columns,), SINGLE, seed=2)
    y = X @ truth + random(meter, (rows,), SINGLE, seed=3)
    y = (y > 0).astype(SINGLE) if classes else y

    def expected() -> Any:
        return numbers(np, *(_numbers(a) for a in (w, X, y)))

    def gpugrad(captured: bool = True) -> Implementation:
        objective = gg.Objective(loss, (X, y), device=str(meter.where))
        objective._capturing = captured
        return Implementation(lambda: objective.evaluate(w), _waits(meter), lambda: objective.evaluate(w))

    def compiled() -> Implementation:
        run = functools.partial(gg.compile(gg.value_and_grad(lambda w, X, y: gg.mean(loss(w, X, y)))), w, X, y)
        return Implementation(run, _waits(meter), run)

    def cupy() -> Implementation:
        run = functools.partial(numbers, meter.cupy, w, X, y)
        return Implementation(run, _waits(meter), run)

    def torch_by(wrap: Callable[[Any], Any]) -> Implementation:
        torch = _torch()
        Xt, yt = torch.from_dlpack(X), torch.from_dlpack(y)
        wt = torch.from_dlpack(w.copy()).requires_grad_()
        function = wrap(lambda w, X, y: torch_loss(torch, X @ w, y))

        def run() -> Any:
            wt.grad = None
            value = function(wt, Xt, yt)
            value.backward()
            return value.detach(), wt.grad

        return Implementation(run, _waits(meter), run)

    def jax() -> Implementation:
        jax = _jax()
        Xj, yj, wj = (jax.numpy.from_dlpack(a) for a in (X, y, w))
        function = jax.jit(jax.value_and_grad(lambda w, X, y: jax_loss(jax, X @ w, y)))
        return Implementation(lambda: function(wj, Xj, yj), jax.block_until_ready, lambda: function(wj, Xj, yj))

    return Step(
        f"{name} {rows:,} x {columns} float32, value and gradient",
        {
            "gpugrad": gpugrad,
            "gpugrad op by op": functools.partial(gpugrad, captured=False),
            "gpugrad.compile": compiled,
            "cupy": cupy,
            "torch": lambda: torch_by(lambda f: f),
            **({} if classes else {"torch.compile": lambda: torch_by(_torch().compile)}),
            "jax.jit": jax,
        },
        expected,
        1e-4,
        note="GB/s counts X once",
        moved=4 * rows * columns,
        targets=({"peer": "gpugrad op by op", "least": 2.0},),
    )


def streamed(meter: Meter) -> Step:
    """Least squares on data that stays on the host, for which the device has no room: the limit is the bus."""
    rows, columns = meter.size(4_000_000, 1000), 32
    rng = np.random.default_rng(0)
    X = np.resize(rng.standard_normal((min(rows, 1 << 17), columns), dtype=SINGLE), (rows, columns))
    y = np.resize(rng.standard_normal(min(rows, 1 << 17), dtype=SINGLE), rows)
    w = random(meter, (columns,), SINGLE, scale=0.3, seed=1)
    pool = meter.cupy.get_default_memory_pool()

    def expected() -> list[Any]:
        a, value, slope = _numbers(w), 0.0, np.zeros(columns)
        for start in range(0, rows, 1 << 18):
            x = _numbers(X[start : start + (1 << 18)])
            r = x @ a - y[start : start + (1 << 18)]
            value, slope = value + r @ r, slope + 2 * (r @ x)
        return [value / rows, slope / rows]

    def gpugrad() -> Implementation:
        before = pool.get_limit()
        pool.free_all_blocks()
        pool.set_limit(size=pool.used_bytes() + X.nbytes // 2)
        try:
            objective = gg.Objective(lambda w, X, y: gg.squared_error(X @ w, y), (X, y), device=str(meter.where))
            if backend.is_cuda_array(objective.data[0]):
                raise RuntimeError("the data fits the device: nothing to stream")
        except BaseException:
            pool.set_limit(size=before)
            raise
        run = functools.partial(objective.evaluate, w)
        return Implementation(run, _waits(meter), run, lambda: pool.set_limit(size=before))

    def cupy() -> Implementation:
        def run() -> Any:
            there, target = meter.cupy.asarray(X), meter.cupy.asarray(y)
            r = there @ w - target
            return (r * r).mean(), (2 / rows) * (r @ there)

        return Implementation(run, _waits(meter), run)

    return Step(
        f"least squares {rows:,} x {columns} float32 streamed from the host, value and gradient",
        {"gpugrad": gpugrad, "cupy": cupy},
        expected,
        1e-4,
        note="cupy copies everything first; GB/s counts X once, the limit is the copy from the host",
        moved=4 * rows * columns,
    )


# --------------------------------------------------------------------------------------------- networks


def mlp(meter: Meter) -> Step:
    """A training step of a network on a large batch: forward, backward, Adam."""
    return _network(meter, meter.size(65_536), (64, 256, 256, 1), "MLP")


def mlp_small(meter: Meter) -> Step:
    """The same on a small batch, where launching costs more than computing."""
    return _network(meter, 256, (32, 64, 64, 1), "small MLP")


def _by_hand(xp: Any, params: Sequence[Any], X: Any, y: Any) -> tuple[Any, list[Any]]:
    """Return mean squared error and gradients of a swish network, backpropagated by hand."""
    hidden, slopes = [X], []
    for W, b in zip(params[0:-2:2], params[1:-2:2], strict=True):
        z = hidden[-1] @ W + b
        s = 1 / (1 + xp.exp(-z))
        hidden.append(z * s)
        slopes.append(s * (1 + z * (1 - s)))
    r = (hidden[-1] @ params[-2] + params[-1])[:, 0] - y
    g = (2 / len(X)) * r[:, None]
    gradients = [g.sum(axis=0), hidden[-1].T @ g]
    for layer in range(len(slopes) - 1, -1, -1):
        g = (g @ params[2 * layer + 2].T) * slopes[layer]
        gradients += [g.sum(axis=0), hidden[layer].T @ g]
    return (r * r).mean(), gradients[::-1]


def _adam_by_hand(xp: Any, params: list[Any], grads: Sequence[Any], state: list[Any], rate: float = 1e-3) -> None:
    state[0] += 1
    root = (1 - 0.999 ** state[0]) ** 0.5
    for k, (w, g) in enumerate(zip(params, grads, strict=True)):
        m, v = state[1][k], state[2][k]
        m += 0.1 * (g - m)
        v += 0.001 * (g * g - v)
        params[k] = w - rate * root / (1 - 0.9 ** state[0]) * m / (xp.sqrt(v) + 1e-8 * root)


def _network(meter: Meter, rows: int, sizes: tuple[int, ...], name: str) -> Step:
    X, y = random(meter, (rows, sizes[0]), SINGLE), random(meter, (rows,), SINGLE, seed=1)
    layers = gg.nn.init_mlp(sizes, device=str(meter.where))
    flat = [a for layer in layers for a in (layer["W"], layer["b"])]

    def expected() -> list[Any]:
        value, gradients = _by_hand(np, *(([_numbers(a) for a in flat]), _numbers(X), _numbers(y)))
        return [value, *gradients]

    def gpugrad(captured: bool = True) -> Implementation:
        objective = gg.Objective(
            lambda p, X, y: gg.squared_error(gg.nn.mlp(p, X)[:, 0], y), (X, y), device=str(meter.where)
        )
        objective._capturing = captured
        return training(objective.evaluate)

    def compiled() -> Implementation:
        slopes = gg.compile(gg.value_and_grad(lambda p: gg.mean(gg.squared_error(gg.nn.mlp(p, X)[:, 0], y))))
        return training(slopes)

    def training(evaluate: Callable[[Any], Any]) -> Implementation:
        optimizer = gg.optim.Adam(1e-3)
        params = [layers]

        def run() -> Any:
            value, grads = evaluate(params[0])
            params[0] = optimizer.step(params[0], grads)
            return value

        def check() -> list[Any]:
            value, grads = evaluate(layers)
            return [value, *(layer[key] for layer in grads for key in ("W", "b"))]

        return Implementation(run, _waits(meter), check)

    def cupy() -> Implementation:
        xp = meter.cupy
        params = list(flat)
        state: list[Any] = [0, [xp.zeros_like(a) for a in flat], [xp.zeros_like(a) for a in flat]]

        def run() -> Any:
            value, grads = _by_hand(xp, params, X, y)
            _adam_by_hand(xp, params, grads, state)
            return value

        def check() -> list[Any]:
            value, grads = _by_hand(xp, flat, X, y)
            return [value, *grads]

        return Implementation(run, _waits(meter), check)

    def torch_by(wrap: Callable[[Any], Any]) -> Implementation:
        torch = _torch()
        Xt, yt = torch.from_dlpack(X), torch.from_dlpack(y)
        p = [torch.from_dlpack(a.copy()).requires_grad_() for a in flat]
        optimizer = torch.optim.Adam(p, lr=1e-3, fused=True)

        def loss(X: Any, y: Any, *p: Any) -> Any:
            for W, b in zip(p[0:-2:2], p[1:-2:2], strict=True):
                X = torch.nn.functional.silu(torch.addmm(b, X, W))
            return ((torch.addmm(p[-1], X, p[-2])[:, 0] - y) ** 2).mean()

        function = wrap(loss)

        def gradients() -> Any:
            optimizer.zero_grad()
            value = function(Xt, yt, *p)
            value.backward()
            return value.detach()

        def run() -> Any:
            value = gradients()
            optimizer.step()
            return value

        return Implementation(run, _waits(meter), lambda: [gradients(), *(a.grad for a in p)])

    def jax() -> Implementation:
        jax = _jax()
        jnp = jax.numpy
        Xj, yj, start = jnp.from_dlpack(X), jnp.from_dlpack(y), [jnp.from_dlpack(a) for a in flat]

        def loss(p: Any, X: Any, y: Any) -> Any:
            for W, b in zip(p[0:-2:2], p[1:-2:2], strict=True):
                X = jax.nn.silu(X @ W + b)
            return jnp.mean(((X @ p[-2] + p[-1])[:, 0] - y) ** 2)

        slopes = jax.jit(jax.value_and_grad(loss))

        @jax.jit
        def step(state: Any, X: Any, y: Any) -> Any:
            t, p, m, v = state
            value, g = jax.value_and_grad(loss)(p, X, y)
            t = t + 1
            m = [0.9 * a + 0.1 * b for a, b in zip(m, g, strict=True)]
            v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g, strict=True)]
            root = jnp.sqrt(1 - 0.999**t)
            p = [
                w - 1e-3 * root / (1 - 0.9**t) * a / (jnp.sqrt(b) + 1e-8 * root)
                for w, a, b in zip(p, m, v, strict=True)
            ]
            return (t, p, m, v), value

        zeros = [jnp.zeros_like(a) for a in start]
        state = [(jnp.float32(0), start, zeros, zeros)]

        def run() -> Any:
            state[0], value = step(state[0], Xj, yj)
            return value

        def check() -> list[Any]:
            value, grads = slopes(start, Xj, yj)
            return [value, *grads]

        return Implementation(run, jax.block_until_ready, check)

    work = 6 * rows * sum(m * n for m, n in itertools.pairwise(sizes))
    return Step(
        f"{name} {'-'.join(map(str, sizes))} swish, {rows:,} rows float32: forward, backward, Adam",
        {
            "gpugrad": gpugrad,
            "gpugrad op by op": functools.partial(gpugrad, captured=False),
            "gpugrad.compile": compiled,
            "cupy": cupy,
            "torch": lambda: torch_by(lambda f: f),
            **({"torch.compile": lambda: torch_by(_torch().compile)} if rows <= 256 else {}),
            "jax.jit": jax,
        },
        expected,
        3e-4,
        note=f"{work / 1e9:,.2f} GFLOP in matrix products",
    )


STEPS = (
    swish_forward_backward,
    silu_forward_backward,
    swish_learnt_beta,
    bias_swish_backward,
    least_squares,
    logistic,
    streamed,
    mlp,
    mlp_small,
)
