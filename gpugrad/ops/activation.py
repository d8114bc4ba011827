"""Activation functions: ReLU, Swish and their relatives, in forms that neither overflow nor lose the tails.

ReLU and Swish, alone and with a bias, have CUDA kernels of their own (`gpugrad.kernels`).

z = beta*x, t = exp(-|z|), s = sigmoid(z) = (z >= 0 ? 1 : t) / (1 + t), c = sigmoid(-z). One exponential gives both
tails to full relative accuracy; 1 - s would lose every digit of c. Swish: Ramachandran, Zoph & Le 2017; SiLU and
GELU: Hendrycks & Gimpel 2016; ELU: Clevert et al. 2015.
"""

import math
from typing import Any

import numpy

from gpugrad import kernels
from gpugrad.declare import elementwise
from gpugrad.op import Cuda
from gpugrad.ops.elementwise import exp, in_float32, sigmoid, where
from gpugrad.ops.special import ndtr

INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def _relu_cuda(_wanted: Any, _masked: bool, g: Any, y: Any, _x: Any) -> Any:
    dx = kernels.relu_backward(g, y)
    return None if dx is None else (dx,)


relu = elementwise(
    "relu",
    forward=lambda xp, x: xp.maximum(x, 0),
    partials=lambda y, _x: y > 0,
    domain=[(0.1, 3)],
    masks=True,
    cuda=Cuda(kernels.relu, _relu_cuda),
    doc="max(x, 0); NaN for NaN. Slope 0 at 0.",
)


def _bias_relu_cuda(wanted: Any, _masked: bool, g: Any, y: Any, _x: Any, _b: Any) -> Any:
    if wanted[1] is None:
        dx = kernels.relu_backward(g, y)
        return None if dx is None else (dx, None)
    return kernels.bias_relu_backward(g, y) if wanted[1] == y.shape[-1:] else None


def _bias_relu_slope(y: Any, _x: Any, _b: Any) -> Any:
    return y > 0


bias_relu = elementwise(
    "bias_relu",
    forward=in_float32(lambda xp, x, b: xp.maximum(x + b, 0)),
    partials=(_bias_relu_slope, _bias_relu_slope),
    domain=[(0.1, 2), (0.1, 2)],
    masks=True,
    cuda=Cuda(kernels.bias_relu, _bias_relu_cuda),
    doc="relu(x + b): a dense layer after its product, (rows, columns), (columns,) -> (rows, columns).",
)


def _swish_forward(xp: Any, x: Any, beta: Any) -> Any:
    z = beta * x
    # where z is -inf, x*s would be inf*0; the limit is 0 with the sign of x
    return xp.where(z == -math.inf, xp.copysign(z.dtype.type(0), x), x) * _s(xp, z)


def _s(xp: Any, z: Any) -> Any:
    t = xp.exp(-xp.abs(z))
    return xp.where(z >= 0, 1, t) / (1 + t)


def _swish_kept(xp: Any, x: Any, beta: Any) -> Any:
    """Compute swish and its slope in x together, one exponential for both.

    With |z| <= 80 throughout (the rule), e = exp(-z) serves both tails without a branch an element.
    """
    z = x if type(beta) is float and beta == 1 else beta * x
    if isinstance(z, numpy.ndarray) and z.ndim and z.size and z.min() > -80 and z.max() < 80:
        e = xp.negative(z)
        xp.exp(e, out=e)
        s = e + 1
        xp.divide(1, s, out=s)
        e *= s
        e *= z
        e += 1
        e *= s
        s *= x  # now swish; its shape is that of z
        return s, e
    s, c = _s(xp, z), _s(xp, -z)
    zc = xp.where(xp.abs(z) == math.inf, 0, z) * c
    return _swish_forward(xp, x, beta), s * (1 + zc)


def _finite(x: Any) -> Any:
    """x, and 0 for an infinite x, where the factor beside it has reached 0."""
    if not hasattr(x, "dtype"):
        return 0.0 if math.isinf(x) else x
    return where((x == math.inf) | (x == -math.inf), 0 * sigmoid(x), x)


def _swish_dx(_y: Any, x: Any, beta: Any) -> Any:
    z = beta * x
    return sigmoid(z) * (1 + _finite(z) * sigmoid(-z))


def _swish_dbeta(_y: Any, x: Any, beta: Any) -> Any:
    z = beta * x
    x = _finite(x)
    return (x * sigmoid(z)) * (x * sigmoid(-z))


def _dtype(x: Any) -> Any:
    return getattr(x, "dtype", None)


def _beta_for(x: Any, beta: Any) -> Any:
    """Return beta as kernels take it; None if it would widen the result."""
    if _dtype(x) != numpy.float16 or not hasattr(beta, "dtype"):
        return beta
    if beta.dtype != numpy.float16:
        return None
    return float(beta) if isinstance(beta, numpy.generic) else beta.astype(numpy.float32)


def _swish_cuda(x: Any, beta: Any) -> Any:
    beta = _beta_for(x, beta)
    return None if beta is None else kernels.swish(x, beta)


def _swish_cuda_kept(x: Any, beta: Any) -> Any:
    # Only where the exponential costs more than the memory it saves: float64 runs at 1/64 of the rate on most GPUs.
    return kernels.swish_keep(x, beta) if _dtype(x) == numpy.float64 and not hasattr(beta, "dtype") else None


def _swish_cuda_backward(wanted: Any, masked: bool, g: Any, _y: Any, x: Any, beta: Any, *kept: Any) -> Any:
    if kept:
        dx = kernels.swish_backward_kept(g, x, kept[0], beta, masked)
        return None if dx is None else (dx, None)
    beta = _beta_for(x, beta)
    if beta is None:
        return None
    if wanted[1] is not None:
        return kernels.swish_backward_sum(g, x, beta, masked) or kernels.swish_backward_both(g, x, beta, masked)
    dx = kernels.swish_backward(g, x, beta, masked)
    return None if dx is None else (dx, None)


swish = elementwise(
    "swish",
    forward=in_float32(lambda xp, x, beta=1.0: _swish_forward(xp, x, beta)),
    partials=(_swish_dx, _swish_dbeta),
    residual=(
        in_float32(_swish_kept),
        (lambda _y, _x, _beta, slope: slope, lambda y, x, beta, _slope: _swish_dbeta(y, x, beta)),
    ),
    domain=[(-4, 4), (0.3, 2)],
    cuda=Cuda(_swish_cuda, _swish_cuda_backward, _swish_cuda_kept),
    doc="x * sigmoid(beta * x); beta a number or an array that broadcasts, differentiable too.",
)


def _bias_swish_slope(_y: Any, x: Any, b: Any, beta: Any) -> Any:
    return _swish_dx(None, x + b, beta)


def _bias_swish_dbeta(_y: Any, x: Any, b: Any, beta: Any) -> Any:
    return _swish_dbeta(None, x + b, beta)


def _kept_slope(_y: Any, _x: Any, _b: Any, _beta: Any, slope: Any) -> Any:
    return slope


def _bias_swish_cuda(x: Any, b: Any, beta: Any) -> Any:
    return None if _dtype(x) == numpy.float16 and hasattr(beta, "dtype") else kernels.bias_swish(x, b, beta)


def _bias_swish_cuda_backward(wanted: Any, masked: bool, g: Any, _y: Any, x: Any, b: Any, beta: Any) -> Any:
    found = None if wanted[2] is not None else kernels.bias_swish_backward(g, x, b, beta, masked)
    return None if found is None else (*found, None)


bias_swish = elementwise(
    "bias_swish",
    forward=in_float32(lambda xp, x, b, beta=1.0: _swish_forward(xp, x + b, beta)),
    partials=(_bias_swish_slope, _bias_swish_slope, _bias_swish_dbeta),
    residual=(
        in_float32(lambda xp, x, b, beta: _swish_kept(xp, x + b, beta)),
        (_kept_slope, _kept_slope, lambda y, x, b, beta, _slope: _bias_swish_dbeta(y, x, b, beta)),
    ),
    domain=[(-2, 2), (-2, 2), (0.3, 2)],
    cuda=Cuda(_bias_swish_cuda, _bias_swish_cuda_backward),
    doc="swish(x + b, beta): a dense layer after its product, (rows, columns), (columns,) -> (rows, columns).",
)


def silu(x: Any, /) -> Any:
    """Swish with beta 1: x * sigmoid(x)."""
    return swish(x, 1.0)


log_sigmoid = elementwise(
    "log_sigmoid",
    forward=in_float32(lambda xp, x: xp.minimum(x, 0) - xp.log1p(xp.exp(-xp.abs(x)))),
    partials=lambda _y, x: sigmoid(-x),
    domain=[(-4, 4)],
    doc="log(sigmoid(x)) without overflow.",
)
softplus = elementwise(
    "softplus",
    forward=in_float32(lambda xp, x: xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))),
    partials=lambda _y, x: sigmoid(x),
    domain=[(-4, 4)],
    doc="log(1 + exp(x)) without overflow.",
)


def _gelu_slope(_y: Any, x: Any) -> Any:
    return ndtr(x) + _finite(x) * (INV_SQRT_2PI * exp(-0.5 * x * x))


gelu = elementwise(
    "gelu",
    forward=in_float32(lambda xp, x: xp.where(x == -math.inf, -0.0, x) * ndtr(x)),
    partials=_gelu_slope,
    domain=[(-3, 3)],
    doc="x * Phi(x), Phi the standard normal distribution function (the exact form, not the tanh approximation).",
)
elu = elementwise(
    "elu",
    forward=in_float32(lambda xp, x, *, alpha=1.0: xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0)))),
    partials=lambda _y, x, *, alpha: where(x > 0, 1, alpha * exp(where(x > 0, 0, x))),
    domain=[(-3, -0.1)],
    doc="x for x > 0, else alpha * (exp(x) - 1).",
)
leaky_relu = elementwise(
    "leaky_relu",
    forward=lambda xp, x, *, negative_slope=0.01: xp.where(x > 0, x, negative_slope * x),
    partials=lambda _y, x, *, negative_slope: (x > 0).astype(x.dtype) * (1 - negative_slope) + negative_slope,
    domain=[(-3, -0.1)],
    doc="x for x > 0, else negative_slope * x.",
)
