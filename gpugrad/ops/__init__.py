"""The operations, a module a family, and the table that makes operators and methods of Tensor from them."""

from collections.abc import Callable
from typing import Any

from gpugrad import backend
from gpugrad.ops import activation, create, elementwise, index, linalg, loss, reduce, shape, special
from gpugrad.tensor import Tensor

__all__ = ["activation", "create", "elementwise", "index", "linalg", "loss", "reduce", "shape", "special"]


def _reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: function(other, self)


def _to(self: Tensor, device: str) -> Tensor:
    """Return the tensor on another device (itself if it is there); a gradient flows back to where it came from."""
    where = backend.as_device(device)
    if self.device == where:
        return self
    moved: Tensor = shape.to_device(self, device=where, source=self.device)
    return moved


def _astype(self: Tensor, dtype: Any) -> Tensor:
    """Return the tensor cast to another dtype."""
    cast: Tensor = shape.astype(self, dtype=dtype)
    return cast


def _reshape(self: Tensor, *lengths: Any) -> Tensor:
    """Return the tensor under another shape, given as a tuple or as separate lengths."""
    given = lengths[0] if len(lengths) == 1 else lengths
    reshaped: Tensor = shape.reshape(self, given)
    return reshaped


def _transposed(self: Tensor) -> Tensor:
    """The tensor with its axes reversed."""
    turned: Tensor = shape.permute_dims(self, axes=tuple(range(self.ndim))[::-1])
    return turned


_BINARY = {
    "add": elementwise.add,
    "sub": elementwise.subtract,
    "mul": elementwise.multiply,
    "truediv": elementwise.divide,
    "pow": elementwise.pow,
    "matmul": linalg.matmul,
    "and": elementwise.logical_and,
    "or": elementwise.logical_or,
}
_METHODS = {
    "__lt__": elementwise.less,
    "__le__": elementwise.less_equal,
    "__gt__": elementwise.greater,
    "__ge__": elementwise.greater_equal,
    "__eq__": elementwise.equal,
    "__ne__": elementwise.not_equal,
    "__neg__": elementwise.negative,
    "__pos__": lambda self: self,
    "__abs__": elementwise.abs,
    "__invert__": elementwise.logical_not,
    "__getitem__": index.getitem,
    "_masked_product": elementwise.masked_product,
    "_selected": elementwise.selected,
    "to": _to,
    "to_device": _to,
    "astype": _astype,
    "reshape": _reshape,
    "T": property(_transposed),
    "mT": property(shape.matrix_transpose),
    "sum": reduce.sum,
    "mean": reduce.mean,
    "prod": reduce.prod,
    "max": reduce.max,
    "min": reduce.min,
    "var": lambda self, axis=None, correction=0, keepdims=False: reduce.var(
        self, axis=axis, correction=correction, keepdims=keepdims
    ),
    "std": lambda self, axis=None, correction=0, keepdims=False: reduce.std(
        self, axis=axis, correction=correction, keepdims=keepdims
    ),
}
for _name, _function in _BINARY.items():
    setattr(Tensor, f"__{_name}__", _function)
    setattr(Tensor, f"__r{_name}__", _reflected(_function))
for _name, _attribute in _METHODS.items():
    setattr(Tensor, _name, _attribute)
