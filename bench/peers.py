"""What gpugrad is compared with: what can run here, on how many threads, and how a loss is written in each library.

A loss is written once, with the operators that all libraries share and the few functions of `Names`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import threadpoolctl

import gpugrad as gg
from gpugrad import backend
from gpugrad.backend import Device

# peer -> the package it needs
PEERS = {
    "numpy": "numpy",
    "cupy": "cupy",
    "autograd": "autograd",
    "torch": "torch",
    "torch.compile": "torch",
    "jax.jit": "jax",
    "sklearn": "sklearn",
}
ON_CUDA = ("cupy", "torch", "torch.compile", "jax.jit")
PACKAGES = ("numpy", "numba", "threadpoolctl", "cupy", "autograd", "torch", "jax", "scikit-learn")

Names = SimpleNamespace  # exp, log1p, softplus, silu, abs, where, clip, and dense_silu(X, W, b)
Program = Callable[..., Any]  # program(names, params, *data) -> a loss a row
Run = Callable[[], Any]


def missing(peer: str, where: Device) -> str | None:
    """Say why a peer cannot run here, or None."""
    if where.kind == "cuda" and peer not in ON_CUDA:
        return "runs on the CPU only"
    if where.kind == "cpu" and peer == "cupy":
        return "runs on a GPU only"
    if peer == "cupy":
        return None  # the device is there, so it is
    package = PEERS[peer]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if peer == "sklearn":
        return _sklearn_problem()
    if where.kind == "cuda" and package == "torch" and not importlib.import_module("torch").cuda.is_available():
        return "PyTorch sees no GPU"
    if where.kind == "cuda" and package == "jax":
        try:
            importlib.import_module("jax").devices("gpu")
        except RuntimeError as error:
            return f"JAX sees no GPU ({(str(error).splitlines() or [''])[0]})"
    return None


def _sklearn_problem() -> str | None:
    try:  # private names: one evaluation of a loss and its gradient is nowhere public
        importlib.import_module("sklearn._loss")
        linear_loss = importlib.import_module("sklearn.linear_model._linear_loss")
    except ImportError as error:
        return f"this scikit-learn has its loss elsewhere ({error})"
    known = hasattr(getattr(linear_loss, "LinearModelLoss", None), "loss_gradient")
    return None if known else "this scikit-learn has its loss elsewhere"


def versions() -> dict[str, str | None]:
    """Return versions of what computes, None for what is not installed."""
    found: dict[str, str | None] = {"gpugrad": gg.__version__}
    for package in PACKAGES:
        names = ("cupy-cuda13x", "cupy-cuda12x", "cupy") if package == "cupy" else (package,)
        found[package] = None
        for name in names:
            try:
                found[package] = found[package] or metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
    return found


def importable(package: str, wanted: bool) -> None:
    """Hide a package from this process where it is not wanted, as if it were not installed."""
    if not wanted:
        sys.modules[package] = None  # type: ignore[assignment]


def hold_threads(threads: int, where: Device) -> None:
    """Let everything in this process compute on so many cores, from now on; before JAX is imported.

    By affinity where the system has it (JAX and gpugrad count the cores that they may run on), and by each library's
    own setting. PyTorch and JAX are not imported for it.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)  # what PyTorch starts with
    threadpoolctl.threadpool_limits(threads)
    if where.kind == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory too
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


# ------------------------------------------------------------------------------------------ the same functions in each


def in_gpugrad() -> Names:
    from gpugrad.nn import dense

    return Names(
        exp=gg.exp, log1p=gg.log1p, softplus=gg.softplus, silu=gg.silu, abs=gg.abs, where=gg.where, clip=gg.clip,
        dense_silu=lambda X, W, b: dense(X, W, b, gg.silu),
    )  # fmt: skip


def in_torch() -> Names:
    torch = importlib.import_module("torch")
    silu = torch.nn.functional.silu
    return Names(
        exp=torch.exp, log1p=torch.log1p, softplus=torch.nn.functional.softplus, silu=silu, abs=torch.abs,
        where=torch.where, clip=torch.clamp, dense_silu=lambda X, W, b: silu(X @ W + b),
    )  # fmt: skip


def in_jax() -> Names:
    jax = importlib.import_module("jax")
    jnp = jax.numpy
    return Names(
        exp=jnp.exp, log1p=jnp.log1p, softplus=jax.nn.softplus, silu=jax.nn.silu, abs=jnp.abs, where=jnp.where,
        clip=jnp.clip, dense_silu=lambda X, W, b: jax.nn.silu(X @ W + b),
    )  # fmt: skip


def in_autograd() -> Names:
    anp = importlib.import_module("autograd.numpy")

    def silu(x: Any) -> Any:
        return x / (1 + anp.exp(-x))

    return Names(
        exp=anp.exp, log1p=anp.log1p, softplus=lambda x: anp.logaddexp(x, 0), silu=silu, abs=anp.abs, where=anp.where,
        clip=anp.clip, dense_silu=lambda X, W, b: silu(anp.dot(X, W) + b),
    )  # fmt: skip


# -------------------------------------------------------------------- value and gradient of the mean of a loss, in each


def torch_arrays(arrays: Sequence[Any]) -> list[Any]:
    """Return PyTorch tensors in the same memory, on the CPU or a GPU."""
    torch = importlib.import_module("torch")
    return [torch.from_dlpack(a) for a in arrays]


def jax_arrays(arrays: Sequence[Any]) -> list[Any]:
    jnp = importlib.import_module("jax").numpy
    return [jnp.asarray(a) if isinstance(a, np.ndarray) else jnp.from_dlpack(a) for a in arrays]


def gpugrad_mean(program: Program, params: Sequence[Any], data: Sequence[Any], where: Device) -> Run:
    names = in_gpugrad()
    objective = gg.Objective(lambda p, *rows: program(names, p, *rows), tuple(data), device=str(where))
    params = list(params)

    def run() -> Any:
        value, grads = objective.value_and_grad(params)
        return [value, *grads]

    return run


def torch_mean(program: Program, params: Sequence[Any], data: Sequence[Any], compiled: bool = False) -> Run:
    torch, names = importlib.import_module("torch"), in_torch()
    given, rows = [p.clone().requires_grad_() for p in torch_arrays(params)], torch_arrays(data)
    loss = torch_compile(lambda p, *rows: program(names, p, *rows).mean(), compiled)

    def run() -> Any:
        value = loss(given, *rows)
        return [value.detach(), *torch.autograd.grad(value, given)]

    return run


def torch_compile(fun: Callable[..., Any], compiled: bool = True) -> Callable[..., Any]:
    """Compile by torch.compile for fixed shapes, forgetting what it compiled before: it counts, and gives up."""
    if not compiled:
        return fun
    torch = importlib.import_module("torch")
    torch._dynamo.reset()
    return torch.compile(fun, dynamic=False)  # type: ignore[no-any-return]


def jax_mean(program: Program, params: Sequence[Any], data: Sequence[Any]) -> Run:
    jax, names = importlib.import_module("jax"), in_jax()
    both = jax.jit(jax.value_and_grad(lambda p, *rows: jax.numpy.mean(program(names, p, *rows))))
    given, rows = jax_arrays(params), jax_arrays(data)

    def run() -> Any:
        value, grads = jax.block_until_ready(both(given, *rows))
        return [value, *grads]

    return run


def autograd_mean(program: Program, params: Sequence[Any], data: Sequence[Any]) -> Run:
    anp, names = importlib.import_module("autograd.numpy"), in_autograd()
    both = importlib.import_module("autograd").value_and_grad(lambda p: anp.mean(program(names, p, *data)))
    params = list(params)

    def run() -> Any:
        value, grads = both(params)
        return [value, *grads]

    return run


def host(value: Any) -> Any:
    """Return a result of any library as a float64 array on the host."""
    if isinstance(value, gg.Tensor):
        value = value.detach()._data
    if backend.is_array(value):
        value = backend.to_device(value, backend.CPU)
    elif hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value, np.float64)
