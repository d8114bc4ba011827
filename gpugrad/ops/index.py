"""Indexing, and the scattering that is its transpose."""

import math
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.declare import Function, case, linear
from gpugrad.errors import DeviceMismatch, ShapeMismatch
from gpugrad.op import Node
from gpugrad.ops.shape import axes_of


def _scatter_into(xp: Any, g: Any, *, shape: tuple[int, ...], index: Any) -> Any:
    wide = numpy.float32 if g.dtype == numpy.float16 else g.dtype
    out = xp.zeros(shape, dtype=wide)
    if _may_repeat(index):
        xp.add.at(out, index, g.astype(wide))
    else:
        out[index] = g
    return out.astype(g.dtype, copy=False)


def _may_repeat(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(backend.is_array(p) and p.ndim and p.dtype.kind != "b" for p in parts)


def _drops(node: Node) -> bool:
    """Tell whether indexing may leave elements out: an index array may, slices do if the result is smaller."""
    index, parent = node.params["index"], node.parents[0]
    parts = index if isinstance(index, tuple) else (index,)
    return any(map(backend.is_array, parts)) or math.prod(node.shape) < math.prod(parent.shape)  # type: ignore[union-attr]


_getitem = linear(
    "getitem",
    forward=lambda xp, x, *, index: x[index],
    transpose=lambda g, _x, *, index: scatter(g, shape=_x.shape, index=index),
    domain=(
        case((4, 3), index=1),
        case((4, 3), index=(slice(None, None, -2), None, 0)),
        case((4, 3), index=(Ellipsis, slice(1, 3))),
        case((4, 3), index=(numpy.array([0, 2, 2]),)),
        case((4, 3), index=(numpy.array([[0], [3]]), numpy.array([1, 1]))),
        case((4, 3), index=(numpy.array([True, False, True, True]),)),
    ),
    masks=_drops,
    doc="x[index], index of integers, slices, masks and integer arrays.",
)
scatter: Function = linear(
    "scatter",
    forward=_scatter_into,
    transpose=lambda g, _g, *, shape, index: _getitem(g, index=index),
    domain=(
        case((2, 3), shape=(4, 3), index=(slice(0, 4, 2),)),
        case((3, 3), shape=(4, 3), index=(numpy.array([0, 2, 2]),)),
    ),
    doc="Zeros of `shape` with g added at index; repeated positions add up.",
)


def getitem(x: Any, index: Any, /) -> Any:
    """Return x[index]; the index may hold integers, slices, None, Ellipsis, masks and integer arrays or Tensors."""
    if type(index) is tuple:
        index = tuple(_fixed(x, part) for part in index)
    else:
        index = (_fixed(x, index),)
    return _getitem(x, index=index)


def _fixed(x: Any, part: Any) -> Any:
    """Return one part of an index as a private copy, on the device of x: the tape keeps it."""
    if part is None or part is Ellipsis or isinstance(part, (int, slice, numpy.integer)):
        return part
    array = getattr(part, "_data", part)
    where = backend.device_of(getattr(x, "_data", x))
    if not backend.is_array(array):
        array = backend.asarray(array, where=where)
        if not array.size:
            array = backend.asarray(array, dtype=int, where=where)
    elif array.ndim and backend.device_of(array) != where:
        raise DeviceMismatch(
            f"getitem: the array is on {where}, its index on {backend.device_of(array)}; move the index there"
        )
    if array.dtype.kind not in "biu":
        raise IndexError(f"getitem: an index of dtype {array.dtype}; expected integers, booleans or slices")
    with backend.activate(where):
        return array.copy()


def take(x: Any, indices: Any, /, *, axis: int | None = None) -> Any:
    """Return the elements at integer `indices` along axis: (..., n, ...) -> (..., *indices.shape, ...)."""
    if axis is None:
        if x.ndim != 1:
            raise ShapeMismatch(f"take: axis is needed for shape {x.shape}; it may be left out for one axis only")
        axis = 0
    (axis,) = axes_of(axis, x.ndim)
    return getitem(x, (slice(None),) * axis + (indices,))


def repeat(x: Any, repeats: Any, /, *, axis: int | None = None) -> Any:
    """Repeat each element along axis (None: of the flattened x); repeats an int, or one for each element."""
    if axis is None:
        x, axis = x.reshape((-1,)), 0
    array = getattr(x, "_data", x)
    with backend.activate(backend.device_of(array)):
        xp = backend.namespace(array)
        counts = getattr(repeats, "_data", repeats)
        positions = xp.repeat(xp.arange(x.shape[axis]), counts)
    return take(x, positions, axis=axis)
