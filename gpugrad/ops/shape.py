"""Shape manipulation: every op here is linear, and most give views."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.declare import Function, case, linear, primitive
from gpugrad.errors import ShapeMismatch


def axes_of(axis: Any, ndim: int) -> tuple[int, ...]:
    """Return axes (None for all, an int or a tuple of ints) as non-negative integers. Raises ShapeMismatch."""
    if axis is None:
        return tuple(range(ndim))
    axes = tuple(map(operator.index, axis if isinstance(axis, (tuple, list)) else (axis,)))
    for a in axes:
        if not -ndim <= a < ndim:
            raise ShapeMismatch(f"axis {a} does not exist: there are {ndim} axes")
    return tuple(a % ndim for a in axes)


def eye_like(x: Any, n: int) -> Any:
    """Return the boolean identity matrix (n, n) on the device of x (array or Tensor)."""
    array = getattr(x, "_data", x)
    with backend.activate(backend.device_of(array)):
        return backend.namespace(array).eye(n, dtype=bool)


_reshape = linear(
    "reshape",
    forward=lambda xp, x, *, shape: xp.reshape(x, shape),
    transpose=lambda g, _x, *, shape: g.reshape(_x.shape),
    domain=(case((3, 4), shape=(2, 6)), case((3, 4), shape=(-1,)), case((), shape=(1, 1)), case((0, 3), shape=(3, 0))),
    doc="The same elements in row-major order under another shape; one length may be -1.",
)


def reshape(x: Any, /, shape: int | Sequence[int]) -> Any:
    """Give x another shape with as many elements, in row-major order; one length may be -1."""
    return _reshape(x, shape=_lengths(shape))


def _lengths(shape: Any) -> tuple[int, ...]:
    return tuple(map(operator.index, shape)) if isinstance(shape, (tuple, list)) else (operator.index(shape),)


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    axes = [a % len(axes) for a in axes]
    return tuple(axes.index(i) for i in range(len(axes)))


permute_dims: Function = linear(
    "permute_dims",
    forward=lambda xp, x, *, axes: xp.permute_dims(x, axes),
    transpose=lambda g, _x, *, axes: permute_dims(g, axes=_inverse(axes)),
    domain=(case((2, 3, 4), axes=(2, 0, 1)), case((2, 3), axes=(-1, 0)), case((), axes=())),
    doc="Permute the axes: axis i of the result is axis axes[i] of x.",
)


def matrix_transpose(x: Any, /) -> Any:
    """Swap the last two axes: (..., m, n) -> (..., n, m)."""
    if x.ndim < 2:
        raise ShapeMismatch(f"matrix_transpose: shape {x.shape} has no two axes to swap")
    return permute_dims(x, axes=(*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def expand_dims(x: Any, /, *, axis: int = 0) -> Any:
    """Insert an axis of length 1 at position axis, from -(ndim + 1) to ndim."""
    if not -x.ndim - 1 <= axis <= x.ndim:
        raise ShapeMismatch(f"expand_dims: axis {axis} for shape {x.shape}; expected {-x.ndim - 1}..{x.ndim}")
    axis %= x.ndim + 1
    return reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))


def squeeze(x: Any, /, axis: int | tuple[int, ...]) -> Any:
    """Drop axes of length 1."""
    axes = axes_of(axis, x.ndim)
    if any(x.shape[a] != 1 for a in axes):
        raise ShapeMismatch(f"squeeze: axis {axis} of shape {x.shape} is not of length 1")
    return reshape(x, tuple(n for i, n in enumerate(x.shape) if i not in axes))


def _unbroadcast(g: Any, _x: Any, *, shape: tuple[int, ...]) -> Any:
    return g  # the reverse sweep sums over broadcast axes, here as everywhere


_broadcast_to = linear(
    "broadcast_to",
    forward=lambda xp, x, *, shape: xp.broadcast_to(x, shape),
    transpose=_unbroadcast,
    domain=(case((3,), shape=(2, 3)), case((2, 1), shape=(2, 3)), case((), shape=(2,)), case((1, 3), shape=(0, 3))),
    doc="Repeat x along new axes and along axes of length 1, without copying.",
)


def broadcast_to(x: Any, /, shape: Sequence[int]) -> Any:
    """Repeat x along new axes and along axes of length 1, without copying."""
    return _broadcast_to(x, shape=tuple(shape))


def _concat_part(i: int, g: Any, *_x: Any, axis: int) -> Any:
    axis %= g.ndim
    start = 0
    for x in _x[:i]:
        start += x.shape[axis]
    return g[(slice(None),) * axis + (slice(start, start + _x[i].shape[axis]),)]


_concat = linear(
    "concat",
    forward=lambda xp, *x, axis=0: xp.concat(x, axis=axis),
    transpose=_concat_part,
    variadic=True,
    domain=(case((2, 3), (4, 3)), case((2, 3), (2, 1), (2, 2), axis=-1)),
    doc="Join arrays along an axis they have.",
)


def concat(arrays: Sequence[Any], /, *, axis: int | None = 0) -> Any:
    """Join arrays along an axis they have; None joins them flattened."""
    if axis is None:
        return _concat([reshape(a, (-1,)) for a in arrays], axis=0)
    return _concat(arrays, axis=axis)


def stack(arrays: Sequence[Any], /, *, axis: int = 0) -> Any:
    """Join arrays of one shape along a new axis."""
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise ShapeMismatch(f"stack: shapes {sorted(shapes)} differ; all must be the same")
    return _concat([expand_dims(a, axis=axis) for a in arrays], axis=axis)


flip: Function = linear(
    "flip",
    forward=lambda xp, x, *, axis=None: xp.flip(x, axis=axis),
    transpose=lambda g, _x, *, axis: flip(g, axis=axis),
    domain=(case((3,)), case((2, 3), axis=1), case((2, 3), axis=(0, -1))),
    doc="Reverse the order of elements along axis (None: all).",
)


def _negated(shift: Any) -> Any:
    return tuple(-s for s in shift) if isinstance(shift, tuple) else -shift


roll: Function = linear(
    "roll",
    forward=lambda xp, x, *, shift, axis=None: xp.roll(x, shift, axis=axis),
    transpose=lambda g, _x, *, shift, axis: roll(g, shift=_negated(shift), axis=axis),
    domain=(case((5,), shift=2), case((2, 3), shift=1, axis=1), case((2, 3), shift=(1, -1), axis=(0, 1))),
    doc="Shift elements along axis; what leaves one end comes in at the other.",
)


def tile(x: Any, repetitions: int | Sequence[int], /) -> Any:
    """Lay x out repeatedly, repetitions[i] times along axis i."""
    reps = _lengths(repetitions)
    ndim = max(len(reps), x.ndim)
    reps = (1,) * (ndim - len(reps)) + reps
    shape = (1,) * (ndim - x.ndim) + x.shape
    between = tuple(n for s in shape for n in (1, s))
    spread = tuple(n for r, s in zip(reps, shape, strict=True) for n in (r, s))
    whole = tuple(r * s for r, s in zip(reps, shape, strict=True))
    return reshape(broadcast_to(reshape(x, between), spread), whole)


def _pad_widths(width: Any, ndim: int) -> tuple[tuple[int, int], ...]:
    pairs = numpy.broadcast_to(numpy.asarray(width), (ndim, 2))
    return tuple((int(before), int(after)) for before, after in pairs)


_pad = primitive(
    "pad",
    forward=lambda xp, x, *, pad_width, constant_values=0: xp.pad(
        x, pad_width, mode="constant", constant_values=constant_values
    ),
    vjp=lambda g, _y, _x, *, pad_width, constant_values: g[
        tuple(slice(before, before + n) for (before, _), n in zip(pad_width, _x.shape, strict=True))
    ],
    domain=(case((3,), pad_width=((1, 2),)), case((2, 3), pad_width=((0, 1), (2, 0)), constant_values=7.0)),
    doc="Surround x with a constant: pad_width[i] = (before, after) along axis i.",
)


def pad(x: Any, /, pad_width: Any, *, constant_values: float = 0) -> Any:
    """Surround x with a constant.

    pad_width: (before, after) for each axis, or one pair or one int for all.
    """
    return _pad(x, pad_width=_pad_widths(pad_width, x.ndim), constant_values=constant_values)


triu: Function = linear(
    "triu",
    forward=lambda xp, x, *, k=0: xp.triu(x, k=k),
    transpose=lambda g, _x, *, k: triu(g, k=k),
    domain=(case((3, 4)), case((2, 3, 3), k=1)),
    doc="Upper triangle of the matrices (..., m, n), zero below diagonal k.",
)
tril: Function = linear(
    "tril",
    forward=lambda xp, x, *, k=0: xp.tril(x, k=k),
    transpose=lambda g, _x, *, k: tril(g, k=k),
    domain=(case((3, 4)), case((2, 3, 3), k=-1)),
    doc="Lower triangle of the matrices (..., m, n), zero above diagonal k.",
)

astype = linear(
    "astype",
    forward=lambda xp, x, *, dtype: x.astype(dtype),
    transpose=lambda g, _x, *, dtype: g.astype(_x.dtype),
    domain=(case((3,), dtype="float64"),),
    doc="Cast to another dtype; the cotangent is cast back.",
)
to_device: Function = linear(
    "to_device",
    forward=lambda xp, x, *, device, source: backend.to_device(x, device),
    transpose=lambda g, _x, *, device, source: to_device(g, device=source, source=device),
    domain=(case((3,), device=backend.CPU, source=backend.CPU),),
    doc="Move to another device; the cotangent moves back.",
)
