"""What a function depends on beside its arguments, as plain data: to notice when a captured loss means something else.

Seen are its code, defaults, what it closes over, the globals it names, and of objects, classes and modules among those
the attributes: an object's own, and what the code names of a class or a module; functions among those likewise.
Numbers, strings and arrays up to 64 KiB count by value, larger arrays and other objects by identity: a large array that
a captured function closes over must not be changed in place.
"""

import array
import collections
import contextvars
import functools
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy

from gpugrad.tensor import Tensor

_MANY = 1000  # items of a container, above which looking at each in every call costs too much
# What changes without a trace in attributes.
_HIDDEN = (bytearray, memoryview, array.array, collections.deque, contextvars.ContextVar, threading.local)
_HIDING = frozenset({"pandas", "polars", "pyarrow"})
_DEEP = 8
SMALL = 1 << 16
_PLAIN = (type(None), bool, int, float, complex, str, bytes, numpy.generic, numpy.dtype)
_LIBRARIES = sys.stdlib_module_names | {"gpugrad", "numpy", "cupy", "scipy", "torch", "jax"}
_SETTINGS = frozenset({"types", "argparse", "functools"})  # of the standard library, but objects of which hold settings
Names = tuple[str, ...]


class _Same:
    """An object that counts by identity; once it is gone, another at its address is not the same."""

    __slots__ = ("held", "identity", "nbytes")

    def __init__(self, thing: Any, nbytes: int = 0) -> None:
        self.identity, self.nbytes = id(thing), nbytes
        try:
            self.held: Any = weakref.ref(thing)
        except TypeError:
            self.held = lambda: thing

    def __hash__(self) -> int:
        return self.identity

    def __eq__(self, other: object) -> bool:
        if type(other) is not _Same or self.identity != other.identity:
            return False
        thing = self.held()
        return thing is not None and thing is other.held()


def data_bytes(meaning: Any) -> int:
    """Return the bytes of large arrays that a fingerprint has in it."""
    if type(meaning) is _Same:
        return meaning.nbytes
    return sum(map(data_bytes, meaning)) if isinstance(meaning, (tuple, frozenset)) else 0


class Unclear(Exception):
    """A function refers to what cannot be looked at, or to too much of it."""


def fingerprint(fun: Any) -> Any:
    """Return something equal for as long as a function means the same.

    Raises Unclear where that cannot be told: for objects that hide what is in them, and containers of thousands.
    """
    return _of(fun, _DEEP, set(), ("__call__",))


def _of(value: Any, deep: int, within: set[int], names: Names) -> Any:
    """Return what a value means to code that uses the attributes `names`."""
    if isinstance(value, _PLAIN):
        # 1, 1.0 and True are equal, NaN is not equal to itself
        return type(value), value if value == value else "nan"
    if type(value) is Tensor:
        value = value._data
    if isinstance(value, numpy.ndarray) and value.nbytes <= SMALL and value.dtype.kind != "O":
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, types.BuiltinFunctionType):
        return _Same(value)
    if isinstance(value, type):
        return _Same(value), _of_class(value, deep, within, names)
    if isinstance(value, types.ModuleType):
        if deep == 0 or _is_library(value.__name__):
            return _Same(value)
        scope = vars(value)
        return _Same(value), tuple(_of(scope[name], deep - 1, within, names) for name in names if name in scope)
    if hasattr(value, "nbytes") and hasattr(value, "dtype"):
        return _Same(value, int(value.nbytes))
    if deep == 0 or id(value) in within:
        return _Same(value)
    within = within | {id(value)}
    if isinstance(value, (tuple, list, set, frozenset, dict)) and len(value) > _MANY:
        raise Unclear(f"a {type(value).__name__} of {len(value):,} items")
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_of(item, deep - 1, within, names) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(_of(item, deep - 1, within, names) for item in value)
    if isinstance(value, dict):
        return tuple((_of(k, 1, within, ()), _of(item, deep - 1, within, names)) for k, item in value.items())
    if isinstance(value, functools.partial):
        return tuple(_of(part, deep, within, names) for part in (value.func, value.args, value.keywords))
    if isinstance(value, types.MethodType):
        function = value.__func__
        used = _names(function.__code__) if isinstance(function, types.FunctionType) else names
        return _of(function, deep, within, names), _of(value.__self__, deep - 1, within, used)
    if isinstance(value, types.FunctionType):
        return _of_function(value, deep, within)
    if isinstance(value, _HIDDEN) or type(value).__module__.partition(".")[0] in _HIDING:
        raise Unclear(f"a {type(value).__name__}")
    home = type(value).__module__
    if home in sys.stdlib_module_names and home not in _SETTINGS:  # such as a logger
        return _Same(value)
    own = tuple(_of(attribute, deep - 1, within, names) for attribute in _own(value))
    return _Same(value), own, _of_class(type(value), deep, within, names)


def _own(value: Any) -> Iterator[Any]:
    """Yield the attributes that an object has itself."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield attributes
    for cls in type(value).__mro__:
        if "__slots__" in vars(cls):
            for member in tuple(vars(cls).values()):
                if isinstance(member, types.MemberDescriptorType):
                    try:
                        yield member.__get__(value)
                    except AttributeError:  # not set yet
                        yield None


def _of_class(cls: type, deep: int, within: set[int], names: Names) -> Any:
    """Return what a class means to code that uses `names`: those attributes, and what the methods among them use."""
    if deep == 0 or id(cls) in within or _is_library(cls.__module__):
        return None
    within = within | {id(cls)}
    found = []
    wanted = dict.fromkeys((*names, "__call__"))
    for name in (todo := list(wanted)):
        for base in cls.__mro__:
            if name not in vars(base) or _is_library(base.__module__):
                continue
            attribute = vars(base)[name]
            attribute = getattr(attribute, "fget", getattr(attribute, "__func__", attribute))
            if isinstance(attribute, types.FunctionType):
                todo.extend(n for n in _names(attribute.__code__) if n not in wanted)
                wanted.update(dict.fromkeys(_names(attribute.__code__)))
            elif isinstance(attribute, (types.MemberDescriptorType, types.GetSetDescriptorType)):
                continue
            found.append(_of(attribute, deep - 1, within, ()))
    return tuple(found)


def _is_library(name: Any) -> bool:
    return str(name).partition(".")[0] in _LIBRARIES


def _of_function(fun: types.FunctionType, deep: int, within: set[int]) -> Any:
    if _is_library(fun.__module__) and (fun.__closure__ is None or hasattr(fun, "op")):  # the function of an op
        return _Same(fun)
    names = _names(fun.__code__)
    cells = []
    for cell in fun.__closure__ or ():
        try:
            cells.append(_of(cell.cell_contents, deep - 1, within, names))
        except ValueError:  # not set yet
            cells.append(None)
    scope = fun.__globals__
    named = tuple(_of(scope[name], deep - 1, within, names) for name in names if name in scope)
    defaults = (_of(given, 2, within, names) for given in (fun.__defaults__, fun.__kwdefaults__))
    return _Same(fun.__code__), tuple(cells), named, *defaults


@functools.lru_cache(1024)
def _names(code: types.CodeType) -> Names:
    """Return the names that a function, and the functions written in it, look up outside or as attributes."""
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*code.co_names, *inner)))
