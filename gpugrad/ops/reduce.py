"""Reductions, cumulative sums and softmax. float16 accumulates in float32, long float32 sums in float64."""

import math
from typing import Any

import numpy

from gpugrad.backend import where_it_is
from gpugrad.declare import Function, case, linear, nondiff, primitive
from gpugrad.ops.elementwise import exp, square, where
from gpugrad.ops.elementwise import sqrt as _sqrt
from gpugrad.ops.shape import axes_of, broadcast_to, eye_like, flip, permute_dims

Axis = Any  # None, an int or a tuple of ints


def restore(g: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    """Give a reduced array its reduced axes back, with length 1, so that it broadcasts against x."""
    if keepdims or (axis is None and not x.ndim):
        return g
    axes = axes_of(axis, x.ndim)
    return g.reshape(tuple(1 if i in axes else n for i, n in enumerate(x.shape)))


def count_of(x: Any, axis: Axis) -> int:
    """Return how many elements are reduced into one."""
    return math.prod(x.shape[a] for a in axes_of(axis, x.ndim))


def widened(x: Any) -> Any:
    """Return what a formula computes with: float32 for float16, float64 for integers, else x itself."""
    if x.dtype == numpy.float16:
        return x.astype(numpy.float32)
    return x if x.dtype.kind in "fc" else x.astype(numpy.float64)


def narrowed(y: Any, x: Any) -> Any:
    """Return a result computed from ``widened(x)`` in the dtype it should have."""
    return y.astype(numpy.float16) if x.dtype == numpy.float16 else y


def wide_sum(xp: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    """Add up in a wider type where rounding would show: float16 always, float32 from 4,096 terms on."""
    dtype = getattr(x, "dtype", None)
    if dtype == numpy.float16:
        return xp.sum(x, axis=axis, keepdims=keepdims, dtype=numpy.float32).astype(dtype)
    if dtype == numpy.float32 and count_of(x, axis) >= 4096:
        return xp.sum(x, axis=axis, keepdims=keepdims, dtype=numpy.float64).astype(dtype)
    return xp.sum(x, axis=axis, keepdims=keepdims)


def _spread(g: Any, _x: Any, *, axis: Axis, keepdims: bool) -> Any:
    return broadcast_to(restore(g, _x, axis, keepdims), shape=_x.shape)


_REDUCTIONS = (
    case((3, 4)),
    case((3, 4), axis=0),
    case((3, 4), axis=-1, keepdims=True),
    case((2, 3, 4), axis=(0, 2)),
    case(()),
    case((0, 3), axis=0),
)

sum = linear(  # the standard's name
    "sum",
    forward=lambda xp, x, *, axis=None, keepdims=False: wide_sum(xp, x, axis, keepdims),
    transpose=_spread,
    domain=_REDUCTIONS,
    doc="Sum over axis (an int, a tuple, or None for all): (..., n, ...) -> (..., ...).",
)


def _mean(xp: Any, x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    if getattr(x, "dtype", None) == numpy.float16:
        # not wide_sum: 70,000 ones overflow float16 before the division
        return xp.mean(x, axis=axis, keepdims=keepdims, dtype=numpy.float32).astype(x.dtype)
    if getattr(x, "dtype", None) == numpy.float32:
        wide = numpy.float64 if count_of(x, axis) >= 4096 else None
        total = xp.sum(x, axis=axis, keepdims=keepdims, dtype=wide)
        return (total / total.dtype.type(count_of(x, axis))).astype(x.dtype)
    return xp.mean(x, axis=axis, keepdims=keepdims)


mean = linear(
    "mean",
    forward=_mean,
    transpose=lambda g, _x, *, axis, keepdims: _spread(g / count_of(_x, axis), _x, axis=axis, keepdims=keepdims),
    domain=_REDUCTIONS[:5],
    doc="Arithmetic mean over axis.",
)


def _prod(xp: Any, x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    if getattr(x, "dtype", None) == numpy.float16:
        return xp.prod(x, axis=axis, keepdims=keepdims, dtype=numpy.float32).astype(x.dtype)
    return xp.prod(x, axis=axis, keepdims=keepdims)


def _prod_vjp(g: Any, _y: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    axes = axes_of(axis, x.ndim)
    if not axes:
        return g
    # bring the reduced axes to the end as one, take the products of all others there, and go back
    kept = tuple(i for i in range(x.ndim) if i not in axes)
    order = kept + axes
    moved = permute_dims(x, axes=order)
    flat = moved.reshape((*(x.shape[i] for i in kept), count_of(x, axis)))
    others = product_of_others(flat).reshape(moved.shape)
    back = tuple(order.index(i) for i in range(x.ndim))
    return restore(g, x, axis, keepdims) * permute_dims(others, axes=back)


prod = primitive(
    "prod",
    forward=_prod,
    vjp=_prod_vjp,
    domain=(*_REDUCTIONS[:5], case((4,), low=0.0, high=0.0)),
    doc="Product over axis. The slope is the product of the other elements, right at zeros too.",
)


def _product_of_others(xp: Any, x: Any) -> Any:
    ones = xp.ones_like(x[..., :1])
    before = xp.cumprod(xp.concat([ones, x[..., :-1]], axis=-1), axis=-1)
    after = xp.flip(xp.cumprod(xp.concat([ones, xp.flip(x, axis=-1)[..., :-1]], axis=-1), axis=-1), axis=-1)
    return xp.where((before == 0) | (after == 0), 0, before * after)  # a zero wins over an overflow on the other side


def _others_vjp(g: Any, _y: Any, x: Any) -> Any:
    # Row i of the table is x with a 1 at i; its products of others are the second derivatives. n*n memory, and only
    # for derivatives of second order.
    n = x.shape[-1]
    eye = eye_like(x, n)
    table = where(eye, 1.0, x.reshape((*x.shape[:-1], 1, n)))
    pairs = g.reshape((*g.shape, 1)) * product_of_others(table)
    return where(eye, 0.0, pairs).sum(axis=-2)


product_of_others: Function = primitive(
    "product_of_others",
    forward=_product_of_others,
    vjp=_others_vjp,
    domain=(case((4,)), case((2, 3)), case((3,), low=0.0, high=0.0)),
    doc="For each element along the last axis, the product of all others: (..., n) -> (..., n).",
)


def _extremum_vjp(g: Any, y: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    hit = (x == restore(y, x, axis, keepdims)).astype(x.dtype)
    share = hit / hit.sum(axis=axis, keepdims=True)
    return restore(g, x, axis, keepdims) * share


max = primitive(  # the standard's name
    "max",
    forward=lambda xp, x, *, axis=None, keepdims=False: xp.max(x, axis=axis, keepdims=keepdims),
    vjp=_extremum_vjp,
    domain=_REDUCTIONS[:5],
    masks=True,
    doc="Largest element over axis; ties share the cotangent evenly. NaN if there is one.",
)
min = primitive(  # the standard's name
    "min",
    forward=lambda xp, x, *, axis=None, keepdims=False: xp.min(x, axis=axis, keepdims=keepdims),
    vjp=_extremum_vjp,
    domain=_REDUCTIONS[:5],
    masks=True,
    doc="Smallest element over axis; ties share the cotangent evenly. NaN if there is one.",
)


@where_it_is
def var(x: Any, /, *, axis: Axis = None, correction: float = 0, keepdims: bool = False) -> Any:
    """Variance over axis, with divisor n - correction."""
    if getattr(x, "dtype", None) == numpy.float16:
        wide = x.astype(numpy.float32)
        return var(wide, axis=axis, correction=correction, keepdims=keepdims).astype(numpy.float16)
    centred = x - mean(x, axis=axis, keepdims=True)
    # a Python number would raise for a divisor of 0; NumPy gives NaN, as its var does
    return sum(square(centred), axis=axis, keepdims=keepdims) / centred.dtype.type(count_of(x, axis) - correction)


@where_it_is
def std(x: Any, /, *, axis: Axis = None, correction: float = 0, keepdims: bool = False) -> Any:
    """Standard deviation over axis, with divisor n - correction; slope 0 where it is 0."""
    if getattr(x, "dtype", None) == numpy.float16:
        wide = x.astype(numpy.float32)
        return std(wide, axis=axis, correction=correction, keepdims=keepdims).astype(numpy.float16)
    return _safe_sqrt(var(x, axis=axis, correction=correction, keepdims=keepdims))


def _safe_sqrt(x: Any) -> Any:
    positive = x > 0
    return where(positive, _sqrt(where(positive, x, 1)), 0 * x)


def _cumulative_sum(xp: Any, x: Any, *, axis: int = 0) -> Any:
    if x.dtype == numpy.float16:
        return xp.cumsum(x, axis=axis, dtype=numpy.float32).astype(x.dtype)
    return xp.cumsum(x, axis=axis)


cumulative_sum: Function = linear(
    "cumulative_sum",
    forward=_cumulative_sum,
    transpose=lambda g, _x, *, axis: flip(cumulative_sum(flip(g, axis=axis), axis=axis), axis=axis),
    domain=(case((4,)), case((3, 4), axis=1), case((3, 4), axis=-2), case((0,))),
    doc="Cumulative sum along axis; same shape as x.",
)


def _logsumexp(xp: Any, x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    wide = widened(x)
    # of nothing: any finite top will do
    top = xp.max(wide, axis=axis, keepdims=True) if x.size else xp.sum(wide, axis=axis, keepdims=True)
    top = xp.where(xp.isfinite(top), top, 0)
    total = xp.sum(xp.exp(wide - top), axis=axis, keepdims=True)
    # the logarithm of nothing is -inf, as the sum of no probabilities is
    y = xp.where(total == 0, -math.inf, xp.log(xp.where(total == 0, 1, total))) + top
    if not keepdims:
        y = y.reshape(tuple(n for i, n in enumerate(x.shape) if i not in axes_of(axis, x.ndim)))
    return narrowed(y, x)


def _logsumexp_vjp(g: Any, y: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    y = restore(y, x, axis, keepdims)
    infinite = (y == math.inf) | (y == -math.inf)
    # all -inf: slope zero; a +inf: all of the slope is its own
    safe = where(infinite, 0 * exp(-y * y), y)
    weight = where(infinite, (x == y) & (y > 0), exp(where(infinite, -math.inf, x) - safe))
    return restore(g, x, axis, keepdims) * weight.astype(x.dtype)


logsumexp = primitive(
    "logsumexp",
    forward=_logsumexp,
    vjp=_logsumexp_vjp,
    domain=_REDUCTIONS[:5],
    doc="log(sum(exp(x))) over axis without overflow; -inf with slope zero where all x are -inf.",
)


def _softmax(xp: Any, x: Any, *, axis: int = -1) -> Any:
    wide = widened(x)
    if not x.size:
        return xp.zeros_like(x, dtype=narrowed(wide, x).dtype)
    e = xp.exp(wide - xp.max(wide, axis=axis, keepdims=True))
    return narrowed(e / xp.sum(e, axis=axis, keepdims=True), x)


_ALONG = (case((4,)), case((3, 4)), case((3, 4), axis=0))

softmax = primitive(
    "softmax",
    forward=_softmax,
    vjp=lambda g, y, _x, *, axis: y * (g - (g * y).sum(axis=axis, keepdims=True)),
    domain=_ALONG,
    doc="exp(x) / sum(exp(x)) along axis, without overflow; same shape as x.",
)


def _log_softmax(xp: Any, x: Any, *, axis: int = -1) -> Any:
    wide = widened(x)
    if not x.size:
        return xp.zeros_like(x, dtype=narrowed(wide, x).dtype)
    shifted = wide - xp.max(wide, axis=axis, keepdims=True)
    return narrowed(shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True)), x)


log_softmax = primitive(
    "log_softmax",
    forward=_log_softmax,
    vjp=lambda g, y, _x, *, axis: g - exp(y) * g.sum(axis=axis, keepdims=True),
    domain=_ALONG,
    doc="log(softmax(x)) along axis, accurate where the softmax underflows.",
)

_INDEX = "its result is an index"
argmax = nondiff(
    "argmax",
    forward=lambda xp, x, *, axis=None, keepdims=False: xp.argmax(x, axis=axis, keepdims=keepdims),
    reason=_INDEX,
    doc="Index of the largest element along axis.",
)
argmin = nondiff(
    "argmin",
    forward=lambda xp, x, *, axis=None, keepdims=False: xp.argmin(x, axis=axis, keepdims=keepdims),
    reason=_INDEX,
    doc="Index of the smallest element along axis.",
)
_TRUTH = "its result is boolean"
all = nondiff(  # the standard's name
    "all",
    forward=lambda xp, x, *, axis=None, keepdims=False: xp.all(x, axis=axis, keepdims=keepdims),
    reason=_TRUTH,
    doc="Whether every element over axis is true.",
)
any = nondiff(  # the standard's name
    "any",
    forward=lambda xp, x, *, axis=None, keepdims=False: xp.any(x, axis=axis, keepdims=keepdims),
    reason=_TRUTH,
    doc="Whether some element over axis is true.",
)
