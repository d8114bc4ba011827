"""What is measured: each workload with an implementation for gpugrad and for every peer.

An implementation is a function without arguments that computes value and gradient and waits for them. A peer that is
not installed is named as missing. `check` compares every implementation with float64 before anything is timed.
"""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Run = Callable[[], Any]
PEERS = {
    "gpugrad": None,
    "numpy": None,
    "torch": "torch",
    "torch.compile": "torch",
    "jax.jit": "jax",
    "autograd": "autograd",
}


@dataclass
class Workload:
    """A named computation. build: implementation by peer, made on first use. expected: float64 values to check."""

    name: str
    build: dict[str, Callable[[], Run]]
    expected: Callable[[], list[Any]]
    rtol: float

    def peers(self) -> list[str]:
        return [p for p in self.build if missing(p) is None]

    def check(self, peer: str, run: Run) -> None:
        """Raise AssertionError if an implementation gives other numbers than float64 does."""
        got = [np.asarray(part, dtype=np.float64) for part in run()]
        for mine, right in zip(got, self.expected(), strict=True):
            error = np.max(np.abs(mine - right)) / max(np.max(np.abs(right)), 1e-30)
            if not error <= self.rtol:
                raise AssertionError(f"{self.name}: {peer} is off by {error:.2g} relative, allowed {self.rtol:.2g}")


def missing(peer: str) -> str | None:
    """Say why a peer cannot be run here, or None."""
    module = PEERS[peer]
    return f"{module} is not installed" if module and importlib.util.find_spec(module) is None else None


# -------------------------------------------------------------------------------- scalars: f = xy + (x+y)^2 (x-y)


def _f(x: Any, y: Any) -> Any:
    return x * y + (x + y) ** 2 * (x - y)


def scalar() -> Workload:
    """Return the textbook function of two scalars, one gradient."""

    def gpugrad() -> Run:
        import gpugrad as gg

        f = gg.grad(_f, argnums=(0, 1))
        return lambda: f(2.0, 3.0)

    def torch() -> Run:
        import torch

        def run() -> Any:
            x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
            y = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
            _f(x, y).backward()
            return x.grad, y.grad

        return run

    def jax() -> Run:
        import jax

        f = jax.jit(jax.grad(_f, argnums=(0, 1)))
        return lambda: jax.block_until_ready(f(2.0, 3.0))

    def autograd() -> Run:
        import autograd

        f = autograd.grad(_f, argnum=(0, 1))
        return lambda: f(2.0, 3.0)

    return Workload(
        "scalar function, one gradient",
        {"gpugrad": gpugrad, "torch": torch, "jax.jit": jax, "autograd": autograd},
        lambda: [18.0, -33.0],
        1e-6,
    )


OPS = 64


def chain() -> Workload:
    """Return the tape's overhead: 64 ops on 8 elements, forward and backward."""
    rng = np.random.default_rng(0)
    start, factor = rng.normal(size=8), rng.uniform(0.9, 1.1, size=8)

    def f(x: Any, c: Any) -> Any:
        for _ in range(OPS // 4):
            x = x * c
            x = x + c
            x = x - x * 0.5
        return x.sum()

    def gpugrad() -> Run:
        import gpugrad as gg

        c = gg.tensor(factor)
        g = gg.grad(lambda x: f(x, c))
        return lambda: (g(start),)

    def torch() -> Run:
        import torch

        c = torch.tensor(factor)

        def run() -> Any:
            x = torch.tensor(start, requires_grad=True)
            f(x, c).backward()
            return (x.grad,)

        return run

    def autograd() -> Run:
        import autograd

        g = autograd.grad(lambda x: f(x, factor))
        return lambda: (g(start),)

    return Workload(
        f"{OPS} ops on 8 elements",
        {"gpugrad": gpugrad, "torch": torch, "autograd": autograd},
        lambda: [(factor * 0.5) ** (OPS // 4)],
        1e-12,
    )


# ----------------------------------------------------------------------------------------------- finite sums


def least_squares(rows: int = 2_000_000, columns: int = 32) -> Workload:
    """Return mean squared error of a linear model, value and gradient, float32."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, columns), dtype=np.float32)
    truth = rng.standard_normal(columns).astype(np.float32)
    y = X @ truth + rng.standard_normal(rows).astype(np.float32)
    w = rng.standard_normal(columns).astype(np.float32)

    def expected() -> list[Any]:
        value, gradient = 0.0, np.zeros(columns)
        for start in range(0, rows, 100_000):
            x = X[start : start + 100_000].astype(np.float64)
            r = x @ w.astype(np.float64) - y[start : start + 100_000]
            value += r @ r
            gradient += 2 * r @ x
        return [value / rows, gradient / rows]

    def gpugrad() -> Run:
        import gpugrad as gg

        objective = gg.Objective(lambda w, X, y: (X @ w - y) ** 2, (X, y), device="cpu")
        return lambda: objective.value_and_grad(w)

    def numpy() -> Run:
        def run() -> Any:
            r = X @ w - y
            return r @ r / rows, (2 / rows) * (r @ X)

        return run

    def torch_parts() -> Any:
        import torch

        Xt, yt = torch.from_numpy(X), torch.from_numpy(y)
        wt = torch.from_numpy(w).requires_grad_()
        return Xt, yt, wt

    def torch() -> Run:
        Xt, yt, wt = torch_parts()

        def run() -> Any:
            wt.grad = None
            loss = ((Xt @ wt - yt) ** 2).mean()
            loss.backward()
            return loss.detach(), wt.grad

        return run

    def compiled() -> Run:
        import torch

        Xt, yt, wt = torch_parts()
        loss_of = torch.compile(lambda w, X, y: ((X @ w - y) ** 2).mean())

        def run() -> Any:
            wt.grad = None
            loss = loss_of(wt, Xt, yt)
            loss.backward()
            return loss.detach(), wt.grad

        return run

    def jax() -> Run:
        import jax
        import jax.numpy as jnp

        f = jax.jit(jax.value_and_grad(lambda w, X, y: jnp.mean((X @ w - y) ** 2)))
        Xj, yj, wj = jnp.asarray(X), jnp.asarray(y), jnp.asarray(w)
        return lambda: jax.block_until_ready(f(wj, Xj, yj))

    def autograd() -> Run:
        import autograd
        import autograd.numpy as anp

        f = autograd.value_and_grad(lambda w: anp.mean((anp.dot(X, w) - y) ** 2))
        return lambda: f(w)

    return Workload(
        f"least squares {rows:,} x {columns}",
        {
            "gpugrad": gpugrad,
            "numpy": numpy,
            "torch": torch,
            "torch.compile": compiled,
            "jax.jit": jax,
            "autograd": autograd,
        },
        expected,
        1e-4,
    )


def blocked_by_hand(rows: int = 2_000_000, columns: int = 32, block: int = 32_768) -> Run:
    """Return least squares by blocks on two threads in bare NumPy, no library: the floor for op-by-op execution."""
    from concurrent.futures import ThreadPoolExecutor

    import threadpoolctl

    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, columns), dtype=np.float32)
    y = rng.standard_normal(rows).astype(np.float32)
    w = rng.standard_normal(columns).astype(np.float32)
    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
    pool = ThreadPoolExecutor(2)

    def part(start: int, stop: int) -> Any:
        value, gradient = 0.0, np.zeros(columns)
        for a in range(start, stop, block):
            x = X[a : min(a + block, stop)]
            r = x @ w
            r -= y[a : min(a + block, stop)]
            value += float(r @ r)
            gradient += r @ x
        return value, gradient

    def run() -> Any:
        with blas.limit(limits=1):
            return [f.result() for f in (pool.submit(part, 0, rows // 2), pool.submit(part, rows // 2, rows))]

    return run


def mlp(rows: int = 65_536, sizes: tuple[int, ...] = (64, 256, 256, 1)) -> Workload:
    """Return mean squared error of a multilayer perceptron with Swish, value and gradient, float32."""
    import gpugrad as gg

    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, sizes[0]), dtype=np.float32)
    y = rng.standard_normal(rows).astype(np.float32)
    params = gg.nn.init_mlp(sizes)
    flat = [a for layer in params for a in (layer["W"], layer["b"])]

    def expected() -> list[Any]:
        """Backpropagation by hand in float64, block by block."""
        p = [a.astype(np.float64) for a in flat]
        value, grads = 0.0, [np.zeros_like(a) for a in p]
        for start in range(0, rows, 4096):
            hidden, slopes = [X[start : start + 4096].astype(np.float64)], []
            for W, b in zip(p[0:-2:2], p[1:-2:2], strict=True):
                z = hidden[-1] @ W + b
                s = 1 / (1 + np.exp(-z))
                hidden.append(z * s)
                slopes.append(s + z * s * (1 - s))
            r = (hidden[-1] @ p[-2] + p[-1])[:, 0] - y[start : start + 4096]
            value += r @ r
            g = 2 * r[:, None]
            for layer in reversed(range(len(p) // 2)):
                grads[2 * layer] += hidden[layer].T @ g
                grads[2 * layer + 1] += g.sum(0)
                if layer:
                    g = (g @ p[2 * layer].T) * slopes[layer - 1]
        return [value / rows, *(g / rows for g in grads)]

    def gpugrad() -> Run:
        objective = gg.Objective(lambda p, X, y: (gg.nn.mlp(p, X)[:, 0] - y) ** 2, (X, y), device="cpu")

        def run() -> Any:
            value, grads = objective.value_and_grad(params)
            return [value, *(a for layer in grads for a in (layer["W"], layer["b"]))]

        return run

    def torch_loss() -> Any:
        import torch

        def loss(p: Any, X: Any, y: Any) -> Any:
            for W, b in zip(p[0:-2:2], p[1:-2:2], strict=True):
                X = torch.nn.functional.silu(X @ W + b)
            return (((X @ p[-2] + p[-1])[:, 0] - y) ** 2).mean()

        return loss

    def torch_run(loss: Any) -> Run:
        import torch

        p = [torch.from_numpy(a.copy()).requires_grad_() for a in flat]
        Xt, yt = torch.from_numpy(X), torch.from_numpy(y)

        def run() -> Any:
            for a in p:
                a.grad = None
            value = loss(p, Xt, yt)
            value.backward()
            return [value.detach(), *(a.grad for a in p)]

        return run

    def torch() -> Run:
        return torch_run(torch_loss())

    def compiled() -> Run:
        import torch

        return torch_run(torch.compile(torch_loss()))

    def jax() -> Run:
        import jax
        import jax.numpy as jnp

        def loss(p: Any, X: Any, y: Any) -> Any:
            for W, b in zip(p[0:-2:2], p[1:-2:2], strict=True):
                X = jax.nn.silu(X @ W + b)
            return jnp.mean(((X @ p[-2] + p[-1])[:, 0] - y) ** 2)

        f = jax.jit(jax.value_and_grad(loss))
        Xj, yj, pj = jnp.asarray(X), jnp.asarray(y), [jnp.asarray(a) for a in flat]

        def run() -> Any:
            value, grads = jax.block_until_ready(f(pj, Xj, yj))
            return [value, *grads]

        return run

    shape = "-".join(map(str, sizes))
    return Workload(
        f"MLP {shape} swish, {rows:,} rows",
        {"gpugrad": gpugrad, "torch": torch, "torch.compile": compiled, "jax.jit": jax},
        expected,
        2e-4,
    )


def mlp_gemms(rows: int = 65_536, sizes: tuple[int, ...] = (64, 256, 256, 1)) -> Run:
    """Return the matrix products alone that one gradient of `mlp` cannot do without, on all BLAS threads."""
    rng = np.random.default_rng(0)
    h = [rng.standard_normal((rows, n), dtype=np.float32) for n in sizes]
    weights = [rng.standard_normal((m, n), dtype=np.float32) for m, n in itertools.pairwise(sizes)]

    def run() -> Any:
        for layer, W in enumerate(weights):
            h[layer] @ W
            h[layer].T @ h[layer + 1]
            if layer:
                h[layer + 1] @ W.T

    return run


WORKLOADS = {"scalar": scalar, "chain": chain, "least_squares": least_squares, "mlp": mlp}
QUICK: dict[str, Callable[[], Workload]] = {
    "scalar": scalar,
    "chain": chain,
    "least_squares": lambda: least_squares(20_000, 8),
    "mlp": lambda: mlp(2_048, (8, 32, 32, 1)),
}
# Which peers each has, known without building it.
IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "scalar": ("gpugrad", "torch", "jax.jit", "autograd"),
    "chain": ("gpugrad", "torch", "autograd"),
    "least_squares": ("gpugrad", "numpy", "torch", "torch.compile", "jax.jit", "autograd"),
    "mlp": ("gpugrad", "torch", "torch.compile", "jax.jit"),
}
