"""`check_grads`: compare the gradients of a function with central differences, to any order."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import optree

from gpugrad import backend
from gpugrad.tensor import Tensor
from gpugrad.transforms import vjp


def check_grads(
    fun: Callable[..., Any],
    args: Sequence[Any],
    order: int = 2,
    modes: Sequence[str] = ("rev",),
    rtol: float | None = None,
    atol: float | None = None,
    *,
    seed: int = 0,
) -> None:
    """Check the derivatives of fun at args against central differences, with random cotangents and directions.

    args: pytrees of floating-point arrays, Tensors or floats, strictly inside the domain of fun. order: how many times
    to differentiate (2 also checks the gradient of the gradient). modes: "rev". rtol, atol: by dtype if None
    (float64 1e-6,
    float32 1e-2, float16 1e-1). fun may return any pytree.
    Raises AssertionError that says at which order and by how much, ValueError for an unknown mode.
    """
    if set(modes) - {"rev"}:
        raise ValueError(f"check_grads: modes={tuple(modes)}; this version checks 'rev'")
    rng = numpy.random.default_rng(seed)
    _check(fun, list(args), order, 1, rtol, atol, rng)


def _check(
    fun: Callable[..., Any],
    args: list[Any],
    order: int,
    level: int,
    rtol: float | None,
    atol: float | None,
    rng: numpy.random.Generator,
) -> None:
    leaves: list[Any]
    leaves, structure = optree.tree_flatten(tuple(args))  # type: ignore[arg-type]
    hosts = [_host(leaf) for leaf in leaves]
    epsilon = max(float(numpy.finfo(h.dtype).eps) for h in hosts)
    step = epsilon ** (1 / 3)
    rtol = (1e-6 if epsilon < 1e-12 else 1e-2 if epsilon < 1e-4 else 1e-1) if rtol is None else rtol
    atol = rtol if atol is None else atol

    out, pull = vjp(fun, *args)
    outputs, out_structure = optree.tree_flatten(out)
    cotangents = [_like(rng.normal(size=_host(o).shape), o) for o in outputs]
    gradients: list[Any] = optree.tree_leaves(pull(optree.tree_unflatten(out_structure, cotangents)))  # type: ignore[arg-type]
    directions = [rng.normal(size=h.shape) for h in hosts]

    def along(t: float) -> float:
        moved = [_like(h + t * d, leaf) for h, d, leaf in zip(hosts, directions, leaves, strict=True)]
        values = optree.tree_leaves(fun(*optree.tree_unflatten(structure, moved)))
        return math.fsum(
            float(numpy.sum(_host(v).astype(numpy.float64) * _host(c))) for v, c in zip(values, cotangents, strict=True)
        )

    numeric = (along(step) - along(-step)) / (2 * step)
    exact = math.fsum(
        float(numpy.sum(_host(g).astype(numpy.float64) * d)) for g, d in zip(gradients, directions, strict=True)
    )
    scale = math.fsum(float(numpy.sum(numpy.abs(_host(g) * d))) for g, d in zip(gradients, directions, strict=True))
    error = abs(exact - numeric)
    if not error <= atol + rtol * max(abs(numeric), scale):
        name = getattr(fun, "__name__", "the function")
        raise AssertionError(
            f"{name}: derivative of order {level} is {exact:.12g} along a random direction, differences give "
            f"{numeric:.12g} (error {error:.3g}, allowed {atol + rtol * max(abs(numeric), scale):.3g})"
        )
    if order > 1:

        def gradient(*inner: Any) -> Any:
            _, inner_pull = vjp(fun, *inner)
            return inner_pull(optree.tree_unflatten(out_structure, cotangents))

        _check(gradient, args, order - 1, level + 1, rtol, atol, rng)


def _host(value: Any) -> "numpy.ndarray[Any, Any]":
    """Return a value's numbers on the host."""
    if type(value) is Tensor:
        return value.numpy()
    return numpy.asarray(backend.to_device(value, backend.CPU) if backend.is_array(value) else value)


def _like(values: "numpy.ndarray[Any, Any]", given: Any) -> Any:
    """Return host numbers as the kind of thing that was given, on its device."""
    if type(given) is Tensor:
        return Tensor(backend.asarray(values.astype(given.dtype), where=given.device))
    if backend.is_array(given):
        return backend.asarray(numpy.asarray(values, dtype=given.dtype), where=backend.device_of(given))
    return float(values)
