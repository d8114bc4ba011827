"""Swish on a large array, a training step on a small batch, and what a call costs whatever it computes."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import gpugrad as gg
from gpugrad import backend

from .measure import Setting, Target, Work, near
from .peers import (
    Names,
    Run,
    in_autograd,
    in_gpugrad,
    in_jax,
    in_torch,
    jax_arrays,
    torch_arrays,
    torch_compile,
)  # fmt: skip
from .sums import BOTH, TRANSCENDENTAL, Data, network, network_by_hand, network_data, network_flops

COPY = "one copy, 1 thread"
RATE = 0.05


# ---------------------------------------------------------------------------------------------------------------- swish


def swish(setting: Setting) -> list[Work]:
    """Swish and its gradient, for a given cotangent: (x, g) -> (y, dx)."""
    n, where = 100_000 if setting.quick else 10_000_000, setting.where

    def make() -> tuple[Any, Any]:
        rng = np.random.default_rng(0)
        x, g = 3 * rng.standard_normal(n, np.float32), rng.standard_normal(n, np.float32)
        return backend.to_device(x, where), backend.to_device(g, where)

    def by_hand(xp: Any, x: Any, g: Any) -> list[Any]:
        s = 1 / (1 + xp.exp(-x))
        y = x * s
        return [y, g * (s + y * (1 - s))]

    def verify(data: Any) -> Callable[[str, Any], str | None]:
        at = slice(None, None, max(1, n // 100_000))
        x, g = (np.asarray(backend.to_device(a[at], backend.CPU), np.float64) for a in data)
        check = near(by_hand(np, x, g), 1e-5)
        return lambda name, got: check(name, [part[at] for part in got])

    def both(x: Any, g: Any) -> Any:
        y, pull = gg.vjp(gg.silu, x)
        return y, pull(g)[0]

    def compiled(data: Any) -> Run:
        fun = gg.compile(both)
        return lambda: fun(*data)

    def torch(data: Any, compiled: bool = False) -> Run:
        module = importlib.import_module("torch")
        x, g = torch_arrays(data)
        x.requires_grad_()
        fun = torch_compile(module.nn.functional.silu, compiled)

        def run() -> Any:
            y = fun(x)
            return y.detach(), module.autograd.grad(y, x, g)[0]

        return run

    def jax(data: Any) -> Run:
        module = importlib.import_module("jax")

        def both(x: Any, g: Any) -> Any:
            y, pull = module.vjp(module.nn.silu, x)
            return y, pull(g)[0]

        fun, given = module.jit(both), jax_arrays(data)
        return lambda: module.block_until_ready(fun(*given))

    def autograd(data: Any) -> Run:
        pull_of = importlib.import_module("autograd").make_vjp(in_autograd().silu)

        def run() -> Any:
            pull, y = pull_of(data[0])
            return y, pull(data[1])

        return run

    def copy(data: Any) -> Run:
        target = data[0].copy()
        if where.kind == "cuda":
            return lambda: target.data.copy_from_device_async(data[0].data, data[0].nbytes)
        return lambda: np.copyto(target, data[0])

    targets = (Target(BOTH, least=5.0), Target((COPY,), most=3.0))
    return [
        Work(
            "swish",
            f"swish forward and backward, {n:,}",
            make,
            {
                "gpugrad": compiled,
                "gpugrad, not compiled": lambda data: lambda: both(*data),
                "numpy" if where.kind == "cpu" else "cupy": lambda data: functools.partial(
                    by_hand, backend.namespace(data[0]), *data
                ),
                "torch": torch,
                "torch.compile": functools.partial(torch, compiled=True),
                "jax.jit": jax,
                "autograd": autograd,
            },
            verify,
            {COPY if where.kind == "cpu" else "one copy": copy},
            moved=16 * n,
            flops=n * (8 + TRANSCENDENTAL),
            bound="copy",
            targets=() if setting.quick or where.kind != "cpu" else targets,
        )
    ]


# ----------------------------------------------------------------------------------------------------------------- step


def step(setting: Setting) -> list[Work]:
    """A whole step of gradient descent on a small batch: new parameters from old ones."""
    sizes = (32, 64, 64, 1)
    rows = (256,) if setting.quick else (32, 256, 2048)
    return [_step(setting, n, sizes) for n in rows]


def _step(setting: Setting, rows: int, sizes: tuple[int, ...]) -> Work:
    where = setting.where

    def loss(m: Names, params: Any, X: Any, y: Any) -> Any:
        return network(m, params, X, y).mean()

    def by_hand(xp: Any, params: Sequence[Any], X: Any, y: Any) -> list[Any]:
        grads = network_by_hand(xp, params, X, y)[1:]
        return [p - (RATE / rows) * g for p, g in zip(params, grads, strict=True)]

    def updated(data: Data) -> Callable[..., Any]:
        names = in_gpugrad()
        both = gg.value_and_grad(lambda params, X, y: loss(names, params, X, y))

        def step(params: Any, X: Any, y: Any) -> Any:
            _, grads = both(params, X, y)
            return [p - RATE * g for p, g in zip(params, grads, strict=True)]

        return step

    def mine(data: Data) -> Run:
        fun = gg.compile(updated(data))
        return lambda: fun(data.params, *data.arrays)

    def eager(data: Data) -> Run:
        fun = updated(data)
        return lambda: fun(data.params, *data.arrays)

    def torch(data: Data, compiled: bool = False) -> Run:
        module, names = importlib.import_module("torch"), in_torch()
        params, (X, y) = [p.clone().requires_grad_() for p in torch_arrays(data.params)], torch_arrays(data.arrays)
        fun = torch_compile(functools.partial(loss, names), compiled)

        def run() -> Any:
            grads = module.autograd.grad(fun(params, X, y), params)
            with module.no_grad():
                return module._foreach_add(params, grads, alpha=-RATE)

        return run

    def jax(data: Data) -> Run:
        module, names = importlib.import_module("jax"), in_jax()
        gradient = module.grad(functools.partial(loss, names))

        @module.jit
        def fun(params: Any, X: Any, y: Any) -> Any:
            return [p - RATE * g for p, g in zip(params, gradient(params, X, y), strict=True)]

        params, arrays = jax_arrays(data.params), jax_arrays(data.arrays)
        return lambda: module.block_until_ready(fun(params, *arrays))

    def autograd(data: Data) -> Run:
        gradient = importlib.import_module("autograd").grad(functools.partial(loss, in_autograd()))

        def run() -> Any:
            return [p - RATE * g for p, g in zip(data.params, gradient(data.params, *data.arrays), strict=True)]

        return run

    def verify(data: Data) -> Callable[[str, Any], str | None]:
        given = [np.asarray(backend.to_device(a, backend.CPU), np.float64) for a in (*data.params, *data.arrays)]
        return near(by_hand(np, given[:-2], *given[-2:]), 1e-5)

    return Work(
        "step",
        f"step of SGD, MLP {'-'.join(map(str, sizes))} swish, {rows:,} rows",
        functools.partial(network_data, rows, sizes, where),
        {
            "gpugrad": mine,
            "gpugrad, not compiled": eager,
            "numpy" if where.kind == "cpu" else "cupy": lambda data: functools.partial(
                by_hand, backend.namespace(data.params[0]), data.params, *data.arrays
            ),
            "torch": torch,
            "torch.compile": functools.partial(torch, compiled=True),
            "jax.jit": jax,
            "autograd": autograd,
        },
        verify,
        flops=network_flops(rows, sizes),
        bound="calls",
        targets=(Target(("jax.jit",), least=1.0),) if rows == 256 and where.kind == "cpu" and not setting.quick else (),
    )


# ------------------------------------------------------------------------------------------------------------- overhead


def overhead(setting: Setting) -> list[Work]:
    """What a call costs: two scalars, a chain of ops, one op, one call of something compiled."""
    rng = np.random.default_rng(0)
    on_host = rng.normal(size=8), rng.uniform(0.9, 1.1, size=8)
    x, c = (backend.to_device(a, setting.where) for a in on_host)
    plain = "numpy" if setting.where.kind == "cpu" else "cupy"

    def f(x: Any, y: Any) -> Any:
        return x * y + (x + y) ** 2 * (x - y)

    def scalars(gradient: Callable[..., Any]) -> Callable[[Any], Run]:
        return lambda _data: functools.partial(gradient(f, (0, 1)), 2.0, 3.0)

    def torch_scalars(_data: Any) -> Run:
        torch = importlib.import_module("torch")

        def run() -> Any:
            x, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 3.0))
            return torch.autograd.grad(f(x, y), (x, y))

        return run

    def jax_scalars(_data: Any) -> Run:
        jax = importlib.import_module("jax")
        fun = jax.jit(jax.grad(f, (0, 1)))
        return lambda: jax.block_until_ready(fun(2.0, 3.0))

    def chain(x: Any, c: Any) -> Any:
        for _ in range(16):
            x = x * c
            x = x + c
            x = x - x * 0.5
        return x.sum()

    def torch_on(fun: Callable[..., Any], gradient: bool, compiled: bool = False) -> Callable[[Any], Run]:
        def build(data: Any) -> Run:
            torch = importlib.import_module("torch")
            wrapped, (x, c) = torch_compile(fun, compiled), torch_arrays(data)
            x.requires_grad_()
            return lambda: (torch.autograd.grad(wrapped(x, c), x)[0] if gradient else wrapped(x, c),)

        return build

    def jax_on(fun: Callable[..., Any], gradient: bool) -> Callable[[Any], Run]:
        def build(data: Any) -> Run:
            jax = importlib.import_module("jax")
            wrapped, given = jax.jit(jax.grad(fun) if gradient else fun), jax_arrays(data)
            return lambda: (jax.block_until_ready(wrapped(*given)),)

        return build

    def autograd_chain(data: Any) -> Run:
        gradient = importlib.import_module("autograd").grad(chain)
        return lambda: (gradient(*data),)

    def made(fun: Callable[..., Any]) -> Callable[[Any], Run]:
        return lambda data: lambda: (fun(*data),)

    def row(name: str, build: dict[str, Callable[[Any], Run]], expected: list[Any], **more: Any) -> Work:
        return Work("overhead", name, lambda: (x, c), build, lambda _data: near(expected, 1e-5), bound="calls", **more)

    tensors = gg.tensor(x, requires_grad=True), gg.tensor(c)
    rows = [
        row(
            "scalars, one gradient of xy + (x+y)^2 (x-y)",
            {
                "gpugrad": scalars(gg.grad),
                "torch": torch_scalars,
                "jax.jit": jax_scalars,
                "autograd": scalars(lambda f, n: importlib.import_module("autograd").grad(f, n)),
            },
            [18.0, -33.0],
        ),
        row(
            "64 ops on 8 elements, forward and backward",
            {
                "gpugrad": made(gg.grad(lambda x, c: chain(x, tensors[1]))),
                "gpugrad, compiled": made(gg.compile(gg.grad(chain))),
                "torch": torch_on(chain, gradient=True),
                "torch.compile": torch_on(chain, gradient=True, compiled=True),
                "jax.jit": jax_on(chain, gradient=True),
                "autograd": autograd_chain,
            },
            [(on_host[1] * 0.5) ** 16],
            left_out={"torch.compile": "writes every use of a value out in full, and compiles for minutes"},
        ),
        row(
            "one op, recorded: multiply, 8 elements",
            {
                "gpugrad": lambda _data: lambda: (tensors[0] * tensors[1],),
                plain: made(operator.mul),
                "torch": torch_on(lambda x, c: x * c, gradient=False),
            },
            [on_host[0] * on_host[1]],
        ),
        row(
            "one call of a compiled function: x * c + 1, 8 elements",
            {
                "gpugrad": made(gg.compile(lambda x, c: x * c + 1.0)),
                plain: made(lambda x, c: x * c + 1.0),
                "torch.compile": torch_on(lambda x, c: x * c + 1.0, gradient=False, compiled=True),
                "jax.jit": jax_on(lambda x, c: x * c + 1.0, gradient=False),
            },
            [on_host[0] * on_host[1] + 1.0],
        ),
    ]
    return rows if setting.where.kind == "cpu" else rows[1:]  # Python's own numbers are on no GPU
