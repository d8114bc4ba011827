"""What a function depends on beside its arguments, as plain data: to notice when a captured loss means something else.

Seen are its code, defaults, what it closes over, the globals it names, and the attributes of an object that it is a
method of; functions among those likewise. Numbers, strings and arrays up to 64 KiB count by value, larger arrays and
other objects by identity: a large array that a captured function closes over must not be changed in place.
"""

import functools
import types
from typing import Any, NamedTuple

import numpy

from gpugrad.tensor import Tensor

_DEEP = 5
SMALL = 1 << 16
_PLAIN = (type(None), bool, int, float, complex, str, bytes, numpy.generic, numpy.dtype)
_LIBRARIES = ("gpugrad", "numpy", "cupy", "math", "builtins", "functools", "operator", "scipy")


class _Large(NamedTuple):
    """An array that counts by identity."""

    identity: int
    nbytes: int


def data_bytes(meaning: Any) -> int:
    """Return the bytes of large arrays that a fingerprint has in it."""
    if isinstance(meaning, _Large):
        return meaning.nbytes
    return sum(map(data_bytes, meaning)) if isinstance(meaning, tuple) else 0


def fingerprint(fun: Any) -> Any:
    """Return something equal for as long as a function means the same."""
    return _of(fun, _DEEP, set())


def _of(value: Any, deep: int, within: set[int]) -> Any:
    if isinstance(value, _PLAIN):
        # 1, 1.0 and True are equal, NaN is not equal to itself
        return type(value), value if value == value else "nan"
    if type(value) is Tensor:
        value = value._data
    if isinstance(value, numpy.ndarray) and value.nbytes <= SMALL and value.dtype.kind != "O":
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, (types.ModuleType, type, types.BuiltinFunctionType)):
        return id(value)
    if hasattr(value, "nbytes") and hasattr(value, "dtype"):
        return _Large(id(value), int(value.nbytes))
    if deep == 0 or id(value) in within:
        return id(value)
    within = within | {id(value)}
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_of(item, deep - 1, within) for item in value)
    if isinstance(value, dict):
        return tuple((_of(k, 1, within), _of(item, deep - 1, within)) for k, item in value.items())
    if isinstance(value, functools.partial):
        return tuple(_of(part, deep, within) for part in (value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        return _of(value.__func__, deep, within), _of(value.__self__, deep - 1, within)
    if isinstance(value, types.FunctionType):
        return _of_function(value, deep, within)
    attributes = getattr(value, "__dict__", None)
    return id(value), None if not isinstance(attributes, dict) else _of(attributes, deep - 1, within)


def _of_function(fun: types.FunctionType, deep: int, within: set[int]) -> Any:
    if (fun.__module__ or "").partition(".")[0] in _LIBRARIES and fun.__closure__ is None:
        return id(fun)
    cells = []
    for cell in fun.__closure__ or ():
        try:
            cells.append(_of(cell.cell_contents, deep - 1, within))
        except ValueError:  # not set yet
            cells.append(None)
    scope = fun.__globals__
    named = tuple(_of(scope[name], deep - 1, within) for name in _names(fun.__code__) if name in scope)
    return id(fun.__code__), tuple(cells), named, _of(fun.__defaults__, 2, within), _of(fun.__kwdefaults__, 2, within)


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that a function, and the functions written in it, look up outside."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
