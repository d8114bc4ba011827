"""Dense layers as plain functions of their parameters."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.errors import ShapeMismatch
from gpugrad.ops.activation import bias_relu, bias_swish, relu, silu, swish

Params = list[dict[str, Any]]


def init_mlp(sizes: Sequence[int], *, seed: int = 0, dtype: Any = numpy.float32, device: str | None = None) -> Params:
    """Return random parameters of a multilayer perceptron: for each layer W (inputs, outputs) and b (outputs,).

    sizes: inputs, hidden widths..., outputs. W is normal with variance 2 / inputs (He et al. 2015), 1 / inputs in the
    last layer; b is zero. The same seed gives the same numbers on every device.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ShapeMismatch(f"init_mlp: sizes {list(sizes)}; expected at least inputs and outputs, all positive")
    rng = numpy.random.default_rng(seed)
    where = backend.as_device(device)
    params = []
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), start=1):
        gain = 1.0 if layer == len(sizes) - 1 else 2.0
        weights = rng.normal(scale=math.sqrt(gain / fan_in), size=(fan_in, fan_out))
        params.append(
            {
                "W": backend.asarray(weights.astype(dtype), where=where),
                "b": backend.asarray(numpy.zeros(fan_out, dtype), where=where),
            }
        )
    return params


# Activations that take the bias along: one pass over the layer forward, one backward that sums the bias gradient too.
_WITH_BIAS = ((swish, bias_swish), (silu, bias_swish), (relu, bias_relu))


@backend.where_it_is
def dense(X: Any, W: Any, b: Any, activation: Callable[[Any], Any] | None = None) -> Any:  # matrices
    """Apply a dense layer, activation(X @ W + b): (rows, inputs), (inputs, outputs), (outputs,) -> (rows, outputs)."""
    if activation is None:
        return X @ W + b
    for plain, with_bias in _WITH_BIAS:
        if activation is plain:
            return with_bias(X @ W, b)
    return activation(X @ W + b)


def mlp(params: Params, X: Any, activation: Callable[[Any], Any] = swish) -> Any:  # a matrix
    """Apply a multilayer perceptron: (rows, inputs) -> (rows, outputs). No activation after the last layer."""
    for layer in params[:-1]:
        X = dense(X, layer["W"], layer["b"], activation)
    return dense(X, params[-1]["W"], params[-1]["b"])
