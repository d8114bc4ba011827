"""`compile`: a function captured once for each signature of its arguments."""

import functools
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import optree

from gpugrad import backend
from gpugrad import op as _op
from gpugrad.compile.capture import FLOAT, TENSOR, Captured, capture, kind_of
from gpugrad.compile.cpu import has_compiler
from gpugrad.compile.executable import Executable, executable
from gpugrad.compile.fingerprint import Unclear, data_bytes, fingerprint
from gpugrad.compile.program import Constant, Value, alike, simplified
from gpugrad.errors import CaptureError, CaptureWarning, DeviceMismatch
from gpugrad.op import Op, recording
from gpugrad.tensor import Tensor
from gpugrad.transforms import vjp

SIGNATURES = 64  # that are kept for one function, the oldest let go first
LARGE = 1 << 20  # bytes of data, from which on compiling a function unasked pays
SLOWER = "the function runs operation by operation, right but slower, as it cannot be captured"
MANY_SIGNATURES = 8  # captured for one function, above which a warning says so


class _Entry:
    """A signature's program, ready to run."""

    __slots__ = ("captured", "run")

    def __init__(self, captured: Captured, run: Executable) -> None:
        self.captured, self.run = captured, run


class Compiled:
    """A function that is captured once for each signature of its arguments, and replayed. Made by `gpugrad.compile`."""

    def __init__(self, fun: Callable[..., Any]) -> None:
        functools.update_wrapper(self, fun)
        self._fun = fun
        self._name = getattr(fun, "__name__", type(fun).__name__)
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._captures = 0
        self._lock = threading.RLock()
        self._latest: _Entry | None = None
        self._pullbacks: dict[Any, Compiled] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns. Raises CaptureError where it cannot be captured."""
        if recording.capturing is not None:  # within another: its equations are that one's
            return self._fun(*args, **kwargs)
        leaves, structure = _flat((args, kwargs))
        tracked = recording.on and any(type(leaf) is Tensor and leaf._node is not None for leaf in leaves)
        if tracked:
            return self._differentiable(leaves, structure)
        entry, arrays = self._entry(leaves, structure)
        return entry.captured.results(entry.run(arrays))

    def __repr__(self) -> str:
        return f"gpugrad.compile({self._name})"

    def __reduce__(self) -> Any:
        return compile, (self._fun,)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Print the program captured last, or for these arguments: operations, fused loops, buffers, bytes moved."""
        if args or kwargs:
            self._latest, _ = self._entry(*_flat((args, kwargs)))
        if self._latest is None:
            raise CaptureError(f"{self._name} has not been captured yet: call it, or show(*args)")
        print(self._latest.run.text(), file=sys.stdout)

    # ------------------------------------------------------------------------------------------------ inside

    def _entry(self, leaves: Sequence[Any], structure: Any) -> tuple[_Entry, list[Any]]:
        """Return the program for arguments, captured if it is new, and the arrays to run it on."""
        key: list[Any] = [structure]
        arrays: list[Any] = []
        for leaf in leaves:
            kind = kind_of(leaf)
            if kind is None:
                key.append(_static(leaf, self._name))
                continue
            array = leaf._data if kind is TENSOR else leaf
            arrays.append(array)
            if kind is FLOAT:
                key.append(FLOAT)
            else:
                key.append((kind, array.shape, array.dtype, array.device.id if backend.is_cuda_array(array) else -1))
        signature = tuple(key)
        entry = self._entries.get(signature)
        if entry is None:
            with self._lock:
                entry = self._entries.get(signature) or self._captured(signature, leaves, structure, arrays)
        self._latest = entry
        return entry, arrays

    def _captured(self, signature: Any, leaves: Sequence[Any], structure: Any, arrays: Sequence[Any]) -> _Entry:
        device = backend.CPU
        for array in arrays:
            if backend.is_cuda_array(array):
                device = backend.device_of(array)
        for array in arrays:
            if isinstance(array, numpy.ndarray):
                backend.host_array(array, f"gpugrad.compile: an argument of {self._name}")
                if device.kind == "cuda":
                    raise DeviceMismatch(
                        f"gpugrad.compile: {self._name} got arrays on {device!s} and the cpu; move them to one device"
                    )
        given = [(as_value(leaf), kind) if (kind := kind_of(leaf)) else leaf for leaf in leaves]
        captured = capture(self._fun, given, structure, device, self._name)
        entry = _Entry(captured, executable(simplified(captured.program), device))
        self._captures += 1
        if self._captures == MANY_SIGNATURES + 1:
            warnings.warn(
                f"gpugrad.compile: {self._name} has been captured for {self._captures} signatures; each new shape, "
                "dtype or static argument costs a capture: pad to few shapes, or call it without gpugrad.compile",
                CaptureWarning,
                stacklevel=4,
            )
        self._entries[signature] = entry
        while len(self._entries) > SIGNATURES:
            self._entries.popitem(last=False)
        return entry

    def _differentiable(self, leaves: list[Any], structure: Any) -> Any:
        """Run as one op on the tape, whose reverse rule is captured too."""
        places = tuple(k for k, leaf in enumerate(leaves) if type(leaf) is Tensor and leaf._node is not None)
        rest_now = [None if k in places else leaf for k, leaf in enumerate(leaves)]
        rest = list(rest_now)  # of which a pullback that is captured replaces what is traced

        def flat(*tensors: Any) -> Any:
            whole = list(rest)
            for k, tensor in zip(places, tensors, strict=True):
                whole[k] = tensor
            given: Any = optree.tree_unflatten(structure, whole)
            args, kwargs = given
            return self._fun(*args, **kwargs)

        detached = [leaf.detach() if k in places else leaf for k, leaf in enumerate(leaves)]
        entry, arrays = self._entry(detached, structure)
        captured = entry.captured
        outputs = captured.program.outputs
        floats = [k for k, v in enumerate(outputs) if v.dtype.kind == "f" and not isinstance(v, Constant)]
        if not floats:
            return captured.results(entry.run(arrays))
        found = entry.run(arrays)

        def outputs_of(*tensors: Any) -> tuple[Any, ...]:
            results = [r for r in optree.tree_leaves(flat(*tensors)) if type(r) is Tensor or backend.is_array(r)]
            return tuple(results[k] for k in floats)

        key = (structure, places, tuple(floats), tuple(_identity(leaf, self._name) for leaf in rest))
        pullback = self._pullbacks.get(key)
        if pullback is None:
            others = [k for k, leaf in enumerate(rest) if kind_of(leaf) is not None]

            def pulled(cotangents: Any, tensors: Any, constants: Any) -> Any:
                for k, constant in zip(others, constants, strict=True):
                    rest[k] = constant
                return vjp(outputs_of, *tensors)[1](cotangents)

            pulled.__name__ = f"the gradient of {self._name}"
            pullback = self._pullbacks[key] = Compiled(pulled)
        # arrays that are not tracked are the op's arguments too, so that the tape sees to what changes in place
        beside = [k for k, leaf in enumerate(rest) if kind_of(leaf) not in (None, FLOAT)]
        latest: list[Any] = [None, None]

        def rule(i: int, g: Any, _y: Any, *x: Any) -> Any:
            given = (g,) if len(floats) == 1 else tuple(g)
            if latest[0] is None or any(a is not b for a, b in zip(latest[0], given, strict=True)):
                with backend.activate(backend.device_of(found[floats[0]])):
                    zeros = backend.namespace(found[floats[0]]).zeros
                    full = tuple(
                        zeros(found[k].shape, dtype=found[k].dtype) if part is None else part
                        for k, part in zip(floats, given, strict=True)
                    )
                kept = dict(zip(beside, x[len(places) :], strict=True))
                constants = [kept.get(k, leaf) for k, leaf in enumerate(rest_now) if kind_of(leaf) is not None]
                latest[:] = given, pullback(full, x[: len(places)], constants)
            return latest[1][i]

        computed = found[floats[0]] if len(floats) == 1 else tuple(found[k] for k in floats)
        op = Op(
            name=f"compiled {self._name}",
            kind="primitive",
            forward=lambda _xp, *_x: computed,
            doc="",
            outputs=len(floats),
            variadic=True,
            vjps=(rule,),
            needs=((-1,),),
        )
        tracked = _op._run(op, [leaves[k] for k in (*places, *beside)], {})
        results = list(found)
        for k, tensor in zip(floats, (tracked,) if len(floats) == 1 else tracked, strict=True):
            results[k] = tensor
        return captured.results(results)


def _flat(arguments: Any) -> tuple[list[Any], Any]:
    return optree.tree_flatten(arguments, none_is_leaf=True)


class Unasked:
    """A function of one argument that is captured where that pays, and runs as it is where it does not or cannot be.

    It pays over data of `LARGE` bytes and more that the function closes over. The meaning of `source` (what the
    function was made from) is looked at in every call, and captured when two calls in a row find the same: a function
    that counts its calls or keeps its results, or of which something is changed from call to call, runs as it is.
    Where a function over such data cannot be captured, a CaptureWarning says so once.
    """

    def __init__(self, fun: Callable[[Any], Any], source: Any) -> None:
        self._fun, self._source = fun, source
        self._meaning: Any = None
        self._run: Callable[[Any], Any] | None = None
        self._told = False

    def __call__(self, argument: Any) -> Any:
        if not {"raise", "call"}.isdisjoint(numpy.geterr().values()):
            return self._fun(argument)  # who wants to hear of overflows hears of them from NumPy
        try:
            meaning = fingerprint(self._source)
        except Exception:  # an object that does not want to be looked at
            return self._fun(argument)
        if meaning != self._meaning:
            self._meaning, self._run = meaning, None
            return self._fun(argument)
        if self._run is None:
            self._run = self._chosen(argument)
        return self._run(argument)

    def _chosen(self, argument: Any) -> Callable[[Any], Any]:
        leaves, structure = _flat(((argument,), {}))
        arrays = [leaf._data if type(leaf) is Tensor else leaf for leaf in leaves]
        device = next((backend.device_of(a) for a in arrays if backend.is_cuda_array(a)), backend.CPU)
        if data_bytes(self._meaning) < LARGE or (device.kind == "cpu" and not has_compiler()):
            return self._fun
        given = [(as_value(leaf), kind) if (kind := kind_of(leaf)) else leaf for leaf in leaves]
        try:
            name = getattr(self._source, "__name__", "the function")
            one, other = (simplified(capture(self._fun, given, structure, device, name).program) for _ in range(2))
            if not alike(one, other):
                raise CaptureError("it does not do the same every time: it uses something random as a value")
        except Exception as error:  # whatever it does: it may well run as it is
            if not self._told:
                self._told = True
                why = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(f"{SLOWER}: {why}", CaptureWarning, stacklevel=4)
            return self._fun
        return Compiled(self._fun)


def as_value(leaf: Any) -> Value:
    """Return an array, Tensor or float as an input of a program."""
    if type(leaf) is float:
        return Value((), "float64", weak=True)
    array = leaf._data if type(leaf) is Tensor else leaf
    return Value(array.shape, array.dtype)


def _static(leaf: Any, name: str) -> Any:
    """Return a leaf that is no array as part of a key: by value if it can be hashed. Raises TypeError otherwise."""
    try:
        hash(leaf)
    except TypeError:
        raise TypeError(
            f"gpugrad.compile: an argument of {name} is a {type(leaf).__name__}, which is neither an array nor "
            "hashable; pass arrays, or close over it"
        ) from None
    if isinstance(leaf, (bool, int, str, type(None))):
        return ("static", type(leaf), leaf)
    try:  # equal objects may mean different things, and one object may come to mean something else
        return ("static", type(leaf), fingerprint(leaf))
    except Unclear:
        return ("static", type(leaf), leaf)


def _identity(leaf: Any, name: str) -> Any:
    kind = kind_of(leaf)
    if kind is None:
        return _static(leaf, name)
    return kind if kind is FLOAT else (kind, leaf.shape, str(leaf.dtype))


def compile(fun: Callable[..., Any]) -> Compiled:
    """Return a function with the same results as fun, captured once for each signature, fused and replayed.

    fun takes and returns pytrees of arrays, Tensors and floats; transforms such as `grad` may be inside and around it.
    Its first call with new shapes, dtypes, device, structure or values of other arguments captures it: it runs once on
    Tensors without values. Python floats are arguments like arrays; integers, strings and other objects are static, and
    a new value is a new capture. What fun closes over counts as constant from then on. Under capture NumPy's functions
    cannot be used, and reading a value (``if``, ``float()``, ``.item()``) raises CaptureError, which names the line.
    Results are the caller's; memory of results that he has dropped is kept for the next call.
    """
    if not callable(fun):
        raise TypeError(f"gpugrad.compile: expected a function, got a {type(fun).__name__}")
    return fun if isinstance(fun, Compiled) else Compiled(fun)
