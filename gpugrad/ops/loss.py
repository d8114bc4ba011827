"""Losses of single rows in a form that keeps their slope: value and slope in one pass over the data."""

from typing import Any

from gpugrad import kernels
from gpugrad.declare import elementwise
from gpugrad.op import Cuda
from gpugrad.ops.elementwise import in_float32, sigmoid, where


def _difference(xp: Any, prediction: Any, target: Any) -> Any:
    difference = prediction - target
    return difference * difference, 2 * difference


squared_error = elementwise(
    "squared_error",
    forward=in_float32(lambda xp, prediction, target: _difference(xp, prediction, target)[0]),
    partials=(
        lambda _l, prediction, target: 2 * (prediction - target),
        lambda _l, prediction, target: 2 * (target - prediction),
    ),
    residual=(
        in_float32(_difference),
        (lambda _l, _prediction, _target, slope: slope, lambda _l, _prediction, _target, slope: -slope),
    ),
    domain=[(-3, 3), (-3, 3)],
    cuda=Cuda(
        lambda prediction, target: _value(kernels.squared_error(prediction, target)), None, kernels.squared_error
    ),
    doc="(prediction - target)**2, the loss of least squares; one for each element.",
)


def _value(found: Any) -> Any:
    return None if found is None else found[0]


def _logistic(xp: Any, eta: Any, y: Any) -> Any:
    """Return softplus(eta) - y*eta and sigmoid(eta) - y, neither of which loses a digit where y is 0 or 1."""
    product = y * eta
    y = y if hasattr(y, "dtype") else product.dtype.type(y)
    z = eta * (1 - product.dtype.type(2) * (y == 1))  # -eta where y is 1, in the dtype of the result
    t = xp.exp(-xp.abs(z))
    loss = xp.maximum(z, 0) + xp.log1p(t) - xp.where((y == 0) | (y == 1), 0, product)
    of_z = xp.where(z >= 0, 1, t) / (1 + t)
    return loss, xp.where(y == 1, -of_z, of_z - y)


def _logistic_slope(_l: Any, eta: Any, y: Any) -> Any:
    return where(y == 1, -sigmoid(-eta), sigmoid(eta) - y)


logistic_loss = elementwise(
    "logistic_loss",
    forward=in_float32(lambda xp, eta, y: _logistic(xp, eta, y)[0]),
    partials=(_logistic_slope, lambda _l, eta, _y: -eta),
    residual=(
        in_float32(_logistic),
        (lambda _l, _eta, _y, slope: slope, lambda _l, eta, _y, _slope: -eta),
    ),
    domain=[(-4, 4), (0.05, 0.95)],
    cuda=Cuda(lambda eta, y: _value(kernels.logistic_loss(eta, y)), None, kernels.logistic_loss),
    doc="-log likelihood of y in 0..1 under probability sigmoid(eta): softplus(eta) - y * eta; one for each element.",
)
