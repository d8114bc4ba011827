"""A loss over rows as a program for any number of rows: what an `Objective` runs in place of the tape.

The number of rows is not in the program. It is captured twice, with two lengths that are found nowhere else among the
shapes; where the two differ in anything but that length (a random number, a division by ``len(X)``), it would not mean
the same for another number of rows, and is not used.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy
import optree

from gpugrad.backend import Device
from gpugrad.compile.capture import ARRAY, FLOAT, TENSOR, capture
from gpugrad.compile.program import Program, Value, alike, simplified
from gpugrad.compile.rows import Split, split
from gpugrad.errors import CaptureError, NotDifferentiable, ShapeMismatch
from gpugrad.ops.reduce import sum as _sum
from gpugrad.tensor import Tensor
from gpugrad.transforms import grad, value_and_grad

Want = Literal["value", "gradient", "product"]
# Numbers of rows to capture at, primes: one is many and one few, so that a branch on how many there are shows.
_MANY = (10_007, 10_009, 10_037, 10_039, 10_061, 10_067, 10_069, 10_079, 10_091, 10_093)
_FEW = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149)


def directional(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return (params, v, *block) -> the slope of the summed loss in params along v."""

    def along(params: Any, v: Any, *block: Any) -> Any:
        gradients = grad(lambda p: total(loss(p, *block)))(params)
        parts = [_sum(g * d) for g, d in zip(optree.tree_leaves(gradients), optree.tree_leaves(v), strict=True)]
        return functools.reduce(operator.add, parts)

    return along


def total(losses: Any) -> Any:
    """Add losses up, of one row or none: a penalty is a scalar already."""
    return _sum(losses) if losses.ndim else losses


def loss_program(
    loss: Callable[..., Any],
    want: Want,
    params: Sequence[Value],
    structure: Any,
    data: Sequence[Value],
    device: Device,
    *,
    scaled: bool = False,
) -> Split:
    """Return the program of the sum of a loss over rows, split; outputs in float64.

    want: "value" -> the sum; "gradient" -> the sum and the cotangent of each parameter; "product" -> the Hessian times
    a vector, which comes as more inputs like the parameters. data: as arrays are, of any number of rows. Raises
    CaptureError or `rows.NotByRows`, or what the loss raises. scaled: one more input, a number that all losses are
    multiplied by.
    """
    taken = {n for v in params for n in v.shape} | {n for v in data for n in v.shape[1:]}
    first, second = (next(n for n in lengths if not any(m % n == 0 and m for m in taken)) for lengths in (_MANY, _FEW))
    one, other = (_captured(loss, want, params, structure, data, n, device, scaled) for n in (first, second))
    if not alike(one, other, (first, second)):
        raise CaptureError(
            "it does not do the same for every number of rows: it uses that number, or something random, as a value"
        )
    return split(one, first, wide=True)


def _captured(
    loss: Callable[..., Any],
    want: Want,
    params: Sequence[Value],
    structure: Any,
    data: Sequence[Value],
    rows: int,
    device: Device,
    scaled: bool,
) -> Program:
    scale: Any = 1.0

    def checked(p: Any, *block: Any) -> Any:
        losses = loss(p, *block)
        if type(losses) is not Tensor or losses.shape != (rows,):
            raise ShapeMismatch("the loss does not return one number a row")  # the caller says it better
        if losses.dtype.kind != "f":
            raise NotDifferentiable("the loss is no floating-point number")
        if scaled and losses.dtype == numpy.float16:
            raise CaptureError("its losses are float16, in which a share of the mean is lost; return float32")
        return losses * scale if scaled else losses

    def whole(p: Any, block: Any, v: Any) -> Any:
        if want == "value":
            return _sum(checked(p, *block))
        if want == "gradient":
            value, gradients = value_and_grad(lambda q: _sum(checked(q, *block)))(p)
            return value, optree.tree_leaves(gradients)
        return optree.tree_leaves(grad(directional(checked))(p, v, *block))

    def inputs() -> list[Value]:
        return [Value(v.shape, v.dtype) for v in params]

    block = tuple((Value((rows, *v.shape[1:]), v.dtype), ARRAY) for v in data)
    leaves = [(v, TENSOR) for v in inputs()]
    along = [(v, TENSOR) for v in inputs()] if want == "product" else []
    count = len(leaves)

    def flat(*tensors: Any) -> Any:
        nonlocal scale
        if scaled:
            *tensors, scale = tensors  # type: ignore[assignment]
        p = optree.tree_unflatten(structure, list(tensors[:count]))
        v = optree.tree_unflatten(structure, list(tensors[count + len(block) :])) if along else None
        return whole(p, tensors[count : count + len(block)], v)

    given = [*leaves, *block, *along]
    if scaled:
        given.append((Value((), "float64", weak=True), FLOAT))
    positions: Any = (tuple(range(len(given))), {})
    _, outer = optree.tree_flatten(positions)
    name = getattr(loss, "__name__", "loss")
    return simplified(capture(flat, given, outer, device, name).program)
