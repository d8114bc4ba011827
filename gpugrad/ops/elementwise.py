"""Arithmetic, comparisons and the elementary functions, element by element with broadcasting."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.declare import Function, elementwise, nondiff

_FLOAT = numpy.dtype(float)  # what a Python number stands for
_HALF = numpy.dtype("float16")
LN2, LN10 = math.log(2.0), math.log(10.0)

# -------------------------------------------------------------------------------------------- arithmetic

add = elementwise(
    "add",
    forward=lambda xp, x, y: x + y,
    partials=(1, 1),
    domain=[(-3, 3), (-3, 3)],
    doc="x + y.",
)
subtract = elementwise(
    "subtract",
    forward=lambda xp, x, y: x - y,
    partials=(1, -1),
    domain=[(-3, 3), (-3, 3)],
    doc="x - y.",
)
multiply = elementwise(
    "multiply",
    forward=lambda xp, x, y: x * y,
    partials=(lambda _z, _x, y: y, lambda _z, x, _y: x),
    domain=[(-3, 3), (-3, 3)],
    doc="x * y.",
)
divide = elementwise(
    "divide",
    forward=lambda xp, x, y: x / y,
    partials=(lambda _z, _x, y: 1 / y, lambda z, _x, y: -z / y),
    domain=[(-3, 3), (0.5, 3)],
    doc="x / y.",
)


def _pow_base(_z: Any, x: Any, y: Any) -> Any:
    if isinstance(y, (int, float)):
        return 2 * x if y == 2 else y * x ** (y - 1) if y else 0.0
    return y * x ** where(y == 0, 1, y - 1)


pow = elementwise(  # the standard's name
    "pow",
    forward=lambda xp, x, y: x**y,
    partials=(_pow_base, lambda z, x, _y: z * log(where(x > 0, x, 1))),
    domain=[(0.3, 3), (-2, 3)],
    doc="x ** y. The slope of x**0 in x is 0, also at x = 0; in y it is 0 where x <= 0.",
)
negative = elementwise("negative", forward=lambda xp, x: -x, partials=-1, domain=[(-3, 3)], doc="-x.")
abs = elementwise(  # the standard's name
    "abs",
    forward=lambda xp, x: xp.abs(x),
    partials=lambda _y, x: sign(x),
    domain=[(0.2, 3)],
    doc="Absolute value; slope 0 at 0.",
)


def _sign(xp: Any, x: Any) -> Any:
    # array-api-compat puts NaN right by a mask assignment, which waits for the device; CuPy's own is right since 14
    return backend.cupy().sign(x) if backend.is_cuda_array(x) else xp.sign(x)


sign: Function = elementwise(
    "sign", forward=_sign, partials=0, domain=[(0.2, 3)], doc="-1, 0 or 1; NaN for NaN. Slope 0."
)
square = elementwise(
    "square", forward=lambda xp, x: xp.square(x), partials=lambda _y, x: 2 * x, domain=[(-3, 3)], doc="x * x."
)
reciprocal = elementwise(
    "reciprocal",
    forward=lambda xp, x: xp.reciprocal(x),
    partials=lambda y, _x: -y * y,
    domain=[(0.4, 3)],
    doc="1 / x.",
)


def _above(z: Any, x: Any, y: Any) -> Any:
    """1 where x > y, 0 where x < y, 1/2 at a tie: the minimum-norm subgradient."""
    return ((x > y).astype(z.dtype) + (x >= y).astype(z.dtype)) * 0.5


maximum = elementwise(
    "maximum",
    forward=lambda xp, x, y: xp.maximum(x, y),
    partials=(_above, lambda z, x, y: _above(z, y, x)),
    domain=[(-3, 0.9), (1, 3)],
    masks=True,
    doc="The larger of x and y; NaN if either is NaN. A tie splits the cotangent evenly.",
)
minimum = elementwise(
    "minimum",
    forward=lambda xp, x, y: xp.minimum(x, y),
    partials=(lambda z, x, y: _above(z, y, x), _above),
    domain=[(-3, 0.9), (1, 3)],
    masks=True,
    doc="The smaller of x and y; NaN if either is NaN. A tie splits the cotangent evenly.",
)
_clip = elementwise(
    "clip",
    forward=lambda xp, x, low, high: xp.minimum(xp.maximum(x, low), high),
    partials=(
        lambda _y, x, low, high: (x >= low) & (x <= high),
        lambda _y, x, low, high: (x < low) & (low <= high),
        lambda _y, x, low, high: (x > high) | (low > high),
    ),
    domain=[(-0.9, 0.9), (-2, -1), (1, 2)],
    masks=True,
    doc="x limited to low..high; slope 1 in x at a bound.",
)


def clip(x: Any, /, min: Any = None, max: Any = None) -> Any:  # the standard's names
    """Limit x to min..max (arrays, numbers or None), broadcasting; the slope in x is 1 at a bound."""
    if min is None and max is None:
        return x + 0
    if min is None:
        # not minimum(): its tie at the bound splits the slope, clip's is 1
        return _clip(x, _lowest(x), max)
    return _clip(x, min, _highest(x) if max is None else max)


def _lowest(x: Any) -> Any:
    return -math.inf if getattr(x, "dtype", _FLOAT).kind == "f" else _limits(x).min


def _highest(x: Any) -> Any:
    return math.inf if getattr(x, "dtype", _FLOAT).kind == "f" else _limits(x).max


def _limits(x: Any) -> Any:
    return numpy.iinfo(x.dtype)


where: Function = elementwise(
    "where",
    forward=lambda xp, condition, x, y: xp.where(_truth(condition), x, y),
    partials=(0, lambda _z, condition, _x, _y: _truth(condition), lambda _z, condition, _x, _y: ~_truth(condition)),
    domain=[(1, 2), (-3, 3), (-3, 3)],
    masks=True,
    doc="x where condition holds, else y. The branch not taken gets exactly zero, also where its slope is infinite.",
)


def _truth(condition: Any) -> Any:
    if not hasattr(condition, "dtype"):
        return numpy.bool_(condition)  # ~ of a Python bool is an integer, and CuPy wants something with a dtype
    return condition if condition.dtype.kind == "b" else condition != 0


# The slope rule of the reverse sweep after a `where`: an exact zero wins over an infinity.
masked_product = elementwise(
    "masked_product",
    forward=lambda xp, x, y: xp.where((x == 0) | (y == 0), 0, x * y),
    partials=(lambda _z, _x, y: y, lambda _z, x, _y: x),
    domain=[(0.5, 3), (0.5, 3)],
    masks=True,
    doc="x * y, and 0 where either is 0 even if the other is infinite or NaN.",
)
selected = elementwise(
    "selected",
    forward=lambda xp, x, condition: xp.where(_truth(condition), x, 0),
    partials=(lambda _z, _x, condition: _truth(condition), 0),
    domain=[(-3, 3), (1, 2)],
    masks=True,
    doc="x where condition holds, else 0.",
)

# ---------------------------------------------------------------------------------- exponentials and logs

exp = elementwise(
    "exp", forward=lambda xp, x: xp.exp(x), partials=lambda y, _x: y, domain=[(-3, 3)], doc="Exponential e**x."
)
expm1 = elementwise(
    "expm1",
    forward=lambda xp, x: xp.expm1(x),
    partials=lambda _y, x: exp(x),
    domain=[(-2, 2)],
    doc="exp(x) - 1, accurate near 0.",
)
log: Function = elementwise(
    "log", forward=lambda xp, x: xp.log(x), partials=lambda _y, x: 1 / x, domain=[(0.2, 4)], doc="Natural logarithm."
)
log1p = elementwise(
    "log1p",
    forward=lambda xp, x: xp.log1p(x),
    partials=lambda _y, x: 1 / (1 + x),
    domain=[(-0.7, 3)],
    doc="log(1 + x), accurate near 0.",
)
log2 = elementwise(
    "log2",
    forward=lambda xp, x: xp.log2(x),
    partials=lambda _y, x: 1 / (x * LN2),
    domain=[(0.2, 4)],
    doc="Logarithm to base 2.",
)
log10 = elementwise(
    "log10",
    forward=lambda xp, x: xp.log10(x),
    partials=lambda _y, x: 1 / (x * LN10),
    domain=[(0.2, 4)],
    doc="Logarithm to base 10.",
)
sqrt = elementwise(
    "sqrt", forward=lambda xp, x: xp.sqrt(x), partials=lambda y, _x: 0.5 / y, domain=[(0.2, 4)], doc="Square root."
)


def in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a formula compute float16 in float32 and round once."""

    @functools.wraps(forward)
    def wide(xp: Any, *values: Any, **params: Any) -> Any:
        dtypes = {value.dtype for value in values if hasattr(value, "dtype")}
        if not dtypes:  # Python numbers only
            values = (numpy.float64(values[0]), *values[1:])
        if _HALF not in dtypes:
            return forward(xp, *values, **params)
        singles = (v.astype(numpy.float32) if getattr(v, "dtype", None) == _HALF else v for v in values)
        y = forward(xp, *singles, **params)
        if dtypes != {_HALF}:
            return y
        # an intermediate that comes with the result stays wide
        return (y[0].astype(numpy.float16), *y[1:]) if isinstance(y, tuple) else y.astype(numpy.float16)

    return wide


@in_float32
def _sigmoid(xp: Any, x: Any) -> Any:
    # t = exp(-|x|) cannot overflow, and both tails keep full relative accuracy
    t = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1, t) / (1 + t)


sigmoid: Function = elementwise(
    "sigmoid",
    forward=_sigmoid,
    partials=lambda s, x: s * sigmoid(-x),  # not s*(1-s): that loses every digit for large x
    domain=[(-4, 4)],
    doc="1 / (1 + exp(-x)), to full relative accuracy in both tails.",
)


def _share(_z: Any, x: Any, y: Any) -> Any:
    # exp(x) / (exp(x) + exp(y)); equal arguments (also both infinite) share evenly
    return sigmoid(where(x == y, 0, x - y))


logaddexp = elementwise(
    "logaddexp",
    forward=lambda xp, x, y: xp.logaddexp(x, y),
    partials=(_share, lambda _z, x, y: _share(_z, y, x)),
    domain=[(-3, 3), (-3, 3)],
    doc="log(exp(x) + exp(y)) without overflow.",
)


def _hypot_slope(z: Any, x: Any, _y: Any) -> Any:
    return where(z == 0, 0, x / where(z == 0, 1, z))


hypot = elementwise(
    "hypot",
    forward=lambda xp, x, y: xp.hypot(x, y),
    partials=(_hypot_slope, lambda z, x, y: _hypot_slope(z, y, x)),
    domain=[(0.3, 3), (0.3, 3)],
    doc="sqrt(x*x + y*y) without overflow; slope 0 at the origin.",
)

# ------------------------------------------------------------------------- trigonometric and hyperbolic

sin = elementwise(
    "sin", forward=lambda xp, x: xp.sin(x), partials=lambda _y, x: cos(x), domain=[(-3, 3)], doc="Sine, x in radians."
)
cos: Function = elementwise(
    "cos",
    forward=lambda xp, x: xp.cos(x),
    partials=lambda _y, x: -sin(x),
    domain=[(-3, 3)],
    doc="Cosine, x in radians.",
)
tan = elementwise(
    "tan",
    forward=lambda xp, x: xp.tan(x),
    partials=lambda y, _x: 1 + y * y,
    domain=[(-1.2, 1.2)],
    doc="Tangent, x in radians.",
)
asin = elementwise(
    "asin",
    forward=lambda xp, x: xp.asin(x),
    partials=lambda _y, x: 1 / sqrt((1 - x) * (1 + x)),
    domain=[(-0.8, 0.8)],
    doc="Inverse sine, in radians.",
)
acos = elementwise(
    "acos",
    forward=lambda xp, x: xp.acos(x),
    partials=lambda _y, x: -1 / sqrt((1 - x) * (1 + x)),
    domain=[(-0.8, 0.8)],
    doc="Inverse cosine, in radians.",
)
atan = elementwise(
    "atan",
    forward=lambda xp, x: xp.atan(x),
    partials=lambda _y, x: 1 / (1 + x * x),
    domain=[(-3, 3)],
    doc="Inverse tangent, in radians.",
)


def _atan2_slope(x: Any, y: Any) -> Any:
    r = hypot(x, y)
    return where(r == 0, 0 * r, (y / where(r == 0, 1, r)) / where(r == 0, 1, r))


atan2 = elementwise(
    "atan2",
    forward=lambda xp, x, y: xp.atan2(x, y),
    partials=(lambda _z, x, y: _atan2_slope(x, y), lambda _z, x, y: -_atan2_slope(y, x)),
    domain=[(0.3, 3), (0.3, 3)],
    doc="Angle of the point (y, x) in radians, -pi..pi; slope 0 at the origin.",
)
sinh = elementwise(
    "sinh", forward=lambda xp, x: xp.sinh(x), partials=lambda _y, x: cosh(x), domain=[(-2, 2)], doc="Hyperbolic sine."
)
cosh: Function = elementwise(
    "cosh", forward=lambda xp, x: xp.cosh(x), partials=lambda _y, x: sinh(x), domain=[(-2, 2)], doc="Hyperbolic cosine."
)
tanh = elementwise(
    "tanh",
    forward=lambda xp, x: xp.tanh(x),
    # 1 - y*y loses every digit where tanh saturates; 1/cosh**2 does not
    partials=lambda _y, x: 4 * sigmoid(2 * x) * sigmoid(-2 * x),
    domain=[(-2, 2)],
    doc="Hyperbolic tangent.",
)

# --------------------------------------------------------------------------- comparisons: no derivative

_BOOLEAN = "its result is boolean"


def _comparison(name: str, compute: Any, doc: str) -> Any:
    return nondiff(name, forward=lambda xp, x, y: compute(x, y), reason=_BOOLEAN, doc=doc, pointwise=True)


less = _comparison("less", operator.lt, "x < y.")
less_equal = _comparison("less_equal", operator.le, "x <= y.")
greater = _comparison("greater", operator.gt, "x > y.")
greater_equal = _comparison("greater_equal", operator.ge, "x >= y.")
equal = _comparison("equal", operator.eq, "x == y.")
not_equal = _comparison("not_equal", operator.ne, "x != y.")
logical_and = _comparison("logical_and", operator.and_, "x & y of booleans.")
logical_or = _comparison("logical_or", operator.or_, "x | y of booleans.")
logical_not = nondiff(
    "logical_not", forward=lambda xp, x: ~x, reason=_BOOLEAN, doc="Not x, of booleans.", pointwise=True
)
isnan = nondiff("isnan", forward=lambda xp, x: xp.isnan(x), reason=_BOOLEAN, doc="Whether x is NaN.", pointwise=True)
isfinite = nondiff(
    "isfinite",
    forward=lambda xp, x: xp.isfinite(x),
    reason=_BOOLEAN,
    doc="Whether x is neither infinite nor NaN.",
    pointwise=True,
)
