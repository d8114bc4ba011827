"""Capture: run a function once on arrays that are not there, and keep the list of operations.

The arguments are Tensors whose array is a `Tracer`: shape, dtype and device, no values. Every op that meets one asks it
(`Tracer.apply`) instead of computing, so that what the function does is written down as equations. Nodes are recorded
as always; a reverse sweep within runs in the form that is itself recorded (``create_graph``), so that its rules, and
the rules of those, are equations too. Nothing is computed and no memory taken, whatever the sizes are.

What depends on no argument is computed while the function runs: constants are folded by being constants.
"""

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import optree

from gpugrad import backend
from gpugrad import op as _op
from gpugrad.backend import Abstract, Device
from gpugrad.compile.fingerprint import SMALL
from gpugrad.compile.program import Constant, Equation, Program, Value
from gpugrad.errors import CaptureError, GpugradError
from gpugrad.op import Op, box, recording
from gpugrad.ops.shape import axes_of
from gpugrad.tensor import Tensor

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_SAMPLE = 1 << 24  # elements that may be made to find out what shape an op gives

# What a captured value is to the caller: a Tensor, an array, an array or NumPy's scalar, or a Python float.
TENSOR, ARRAY, SCALAR, FLOAT = "tensor", "array", "scalar", "float"


def user_line() -> str:
    """Return file and line of the innermost frame that is not gpugrad's own."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else "?"


class Tracer(Abstract):
    """Stands for an array inside a Tensor while a function is captured. Reading a value raises CaptureError."""

    __slots__ = ("capture", "kind", "value")

    def __init__(self, capture: "Capture", value: Value, kind: str) -> None:
        self.capture, self.value, self.kind = capture, value, kind
        self.place = capture.device

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def size(self) -> int:
        return self.value.size

    def apply(self, op: Op, args: Any, params: dict[str, Any]) -> Any:
        """Write an op down. Raises what the op would raise for these shapes."""
        return self.capture.apply(op, args, params)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d array")
        return self.shape[0]

    def _read(self, *_args: Any, **_options: Any) -> Any:
        raise self.capture.refused(
            "a value is read",
            "gpugrad.where(condition, a, b) in place of if, gpugrad's functions in place of NumPy's and Python's, and "
            "no index or shape that depends on data",
        )

    item = copy = tolist = __bool__ = __float__ = __int__ = __index__ = __array__ = __dlpack__ = __format__ = _read
    __iter__ = __complex__ = _read


class Capture:
    """The equations that one thread is writing down."""

    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name
        self.equations: list[Equation] = []
        self.constants: dict[Any, Constant] = {}
        self.start = next(_op._sequence)
        self.refusal: CaptureError | None = None  # holds even where the function catches it

    def refused(self, what: str, remedy: str) -> CaptureError:
        """Return the error for something that cannot be captured, naming the user's line."""
        self.refusal = CaptureError(
            f"{user_line()}: {what} while {self.name} is captured, which runs without values; use {remedy}"
        )
        return self.refusal

    # ------------------------------------------------------------------------------------------------ values

    def tensor(self, value: Value, kind: str, node: Any = None) -> Tensor:
        """Return a Tensor for a value."""
        result: Tensor = box(Tracer(self, value, kind), node)
        return result

    def constant(self, array: Any) -> Constant:
        """Return the value of an array or number that is known."""
        if type(array) in (bool, int, float):
            return Constant(array)
        # by its place in memory: views of the same elements are the same constant
        at = array.data.ptr if backend.is_cuda_array(array) else array.__array_interface__["data"][0]
        key: Any = (at, array.shape, array.strides, array.dtype) if array.ndim else id(array)
        if isinstance(array, numpy.ndarray) and array.nbytes <= SMALL:
            # as it is now: the function may fill it anew before its next use
            key = (array.shape, array.dtype, array.tobytes())
            array = array if key in self.constants else array.copy()
        found = self.constants.get(key)
        if found is None:
            found = self.constants[key] = Constant(array)  # holds the array, so that its place stays its own
        return found

    def lift(self, number: Any) -> Tracer:
        """Return a known number as a value, so that what follows from it is written down and not computed."""
        return Tracer(self, Constant(number), TENSOR)

    def strong(self, given: Any) -> Any:
        """Return an argument of `grad` as it is differentiated: a Python float becomes a float64 scalar."""
        if type(given) is not Tensor or not isinstance(given._data, Tracer):
            return given
        value = given._data.value
        if value.weak:
            (value,) = self._add(
                _op.registry["astype"], (value,), {"dtype": "float64"}, [((), numpy.dtype("float64"), False)]
            )
        return self.tensor(value, TENSOR, given._node)  # what follows from it is a Tensor, as eagerly

    def like(self, value: Any, given: Any) -> Any:
        """Return a result of a transform as a value of the kind that was given to it."""
        data = value._data if type(value) is Tensor else value
        node = value._node if type(value) is Tensor else None
        known = (
            data.value
            if isinstance(data, Tracer)
            else self.constant(data if backend.is_cuda_array(data) else numpy.asarray(data))
        )
        if type(given) is Tensor:
            kind = given._data.kind if isinstance(given._data, Tracer) else TENSOR
            kind = kind if kind != SCALAR else ARRAY if given.ndim else SCALAR
        else:
            kind = FLOAT if type(given) is float else ARRAY
        return self.tensor(known, kind, node)

    # --------------------------------------------------------------------------------------------- equations

    def apply(self, op: Op, args: Sequence[Any], params: dict[str, Any]) -> Any:
        """Write down one application of an op and return its results as Tensors, recorded on the tape if tracked."""
        if recording.capturing is not self:
            raise CaptureError(f"{op.name}: a value of a function that was being captured has outlived the capture")
        values: list[Any] = []
        parents: list[Any] = []
        kinds: set[str] = set()
        for position, arg in enumerate(args):
            node = None
            if type(arg) is Tensor:
                node, arg = arg._node, arg._data
                kinds.add(arg.kind if isinstance(arg, Tracer) else TENSOR)
                if node is not None and not isinstance(arg, Tracer) and node.seq < self.start and recording.on:
                    raise self.refused(
                        f"argument {position} of {op.name} is a tensor that requires grad from outside",
                        "it as an argument",
                    )
            elif isinstance(arg, Abstract):
                kinds.add(arg.kind)  # type: ignore[attr-defined]  # a Tracer
            elif not isinstance(arg, (bool, int, float)) and not backend.is_array(arg):
                backend.place(op.name, [arg])  # raises
            if not op.pointwise and type(arg) in (bool, int, float):
                arg = numpy.asarray(arg)
            values.append(arg)
            parents.append(node)
        backend.place(op.name, values)
        inputs = tuple(v.value if isinstance(v, Tracer) else self.constant(v) for v in values)
        try:
            avals = infer(op, inputs, params)
        except ValueError as error:
            raise _op._named(op, values, error) from None
        outputs = self._add(op, inputs, params, avals)
        kind = TENSOR if TENSOR in kinds else SCALAR
        tracers = tuple(Tracer(self, v, kind) for v in outputs)
        node = None
        if recording.on and any(p is not None for p in parents):
            mine = [False] * max(len(values), len(tracers))
            node = _op._record(op, mine, values, parents, params, tracers, mine[: len(tracers)], self.device)
        if op.outputs == 1:
            return box(tracers[0], node)
        return tuple(box(t, None if node is None else _op.output_node(node, i, t)) for i, t in enumerate(tracers))

    def _add(self, op: Op, inputs: tuple[Value, ...], params: dict[str, Any], avals: Any) -> tuple[Value, ...]:
        outputs = tuple(Value(shape, dtype, weak) for shape, dtype, weak in avals)
        self.equations.append(Equation(op, inputs, params, outputs))
        return outputs


def capture(fun: Callable[..., Any], leaves: Sequence[Any], structure: Any, device: Device, name: str) -> "Captured":
    """Run fun once on Tensors without values.

    leaves: for each leaf of the arguments a pair (Value, kind), or anything else that is handed on as it is.
    structure: the optree structure of (args, kwargs). Raises CaptureError, and whatever fun raises.
    """
    recorder = Capture(device, name)
    inputs = [leaf[0] for leaf in leaves if _is_traced(leaf)]
    given = [recorder.tensor(*leaf) if _is_traced(leaf) else leaf for leaf in leaves]
    unflattened: Any = optree.tree_unflatten(structure, given)
    args, kwargs = unflattened
    before = recording.capturing
    recording.capturing = recorder
    try:
        with backend.activate(device), numpy.errstate(all="ignore"):
            out = fun(*args, **kwargs)
    except TypeError as error:
        if not isinstance(error, GpugradError):
            error.add_note(
                f"while gpugrad captured {name}: arrays are Tensors in it; use gpugrad's functions in place of NumPy's"
            )
        raise
    finally:
        recording.capturing = before
    if recorder.refusal is not None:
        raise recorder.refusal
    results, out_structure = optree.tree_flatten(out)
    outputs: list[Value] = []
    shown: list[Any] = []
    for result in results:
        data = result._data if type(result) is Tensor else result
        if isinstance(data, Tracer):
            if data.capture is not recorder:
                raise CaptureError(f"{name} returned a value of another function that is being captured")
            shown.append(data.kind if not data.value.weak else FLOAT)
            outputs.append(data.value)
        elif backend.is_array(data):
            shown.append(TENSOR if type(result) is Tensor else SCALAR if isinstance(data, numpy.generic) else ARRAY)
            outputs.append(recorder.constant(data))
        else:
            shown.append(_Static(result))
    return Captured(Program(tuple(inputs), recorder.equations, tuple(outputs), name), shown, out_structure)


class _Static:
    """A result that is no array: returned as it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Captured:
    """A program, with what its outputs are to the caller: kinds, or results that are no arrays, and their structure."""

    def __init__(self, program: Program, kinds: list[Any], structure: Any) -> None:
        self.program, self.kinds, self.structure = program, kinds, structure

    def results(self, arrays: Sequence[Any]) -> Any:
        """Return computed outputs in the structure and the kinds that the function gives."""
        rest = iter(arrays)
        return optree.tree_unflatten(
            self.structure, [k.value if type(k) is _Static else _as_kind(next(rest), k) for k in self.kinds]
        )


def _as_kind(array: Any, kind: str) -> Any:
    if type(array) is Tensor:  # an output on the tape
        return array
    if kind == FLOAT:
        return float(array)
    if kind == TENSOR:
        if isinstance(array, numpy.ndarray):
            array.flags.writeable = False
        return box(array, None)
    return array[()] if kind == SCALAR and isinstance(array, numpy.ndarray) and not array.ndim else array


def _is_traced(leaf: Any) -> bool:
    return type(leaf) is tuple and len(leaf) == 2 and isinstance(leaf[0], Value)


def kind_of(leaf: Any) -> str | None:
    """Return what an argument is to a captured function, None for what is no array or float."""
    if type(leaf) is Tensor:
        return TENSOR
    if type(leaf) is float:
        return FLOAT
    if isinstance(leaf, numpy.generic):
        return SCALAR
    return ARRAY if backend.is_array(leaf) else None


# --------------------------------------------------------------------------------------- shapes and dtypes of results


Aval = tuple[tuple[int, ...], Any, bool]


def infer(op: Op, inputs: Sequence[Value], params: dict[str, Any]) -> list[Aval]:
    """Return shape, dtype and weakness of each output. Raises ValueError for shapes that do not fit."""
    if op.pointwise:
        dtype, weak = _dtype_of(op, tuple(_sample_kind(v) for v in inputs), _Params(params))
        avals = [(numpy.broadcast_shapes(*(v.shape for v in inputs)), dtype, weak)]
    elif op.name in _SHAPES:
        shape = _SHAPES[op.name](inputs, params)
        avals = [(shape, _dtype_by(op, inputs, params), False)]
    else:
        avals = _by_sample(op, inputs, params)
    for _, dtype, _ in avals:
        if dtype.kind == "O":
            raise TypeError(f"{op.name}: an argument has dtype object; expected numbers, cast it first")
        if dtype.kind == "c":
            raise CaptureError(f"{op.name}: complex numbers are not captured")
    return avals


class _Params(dict[str, Any]):
    """Static parameters as a key for caching; those that cannot be one are all different."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted((k, repr(v)) for k, v in self.items())))


def _sample_kind(value: Value) -> Any:
    if value.weak:
        if isinstance(value, Constant) and type(value.array) is int:
            return value.array  # NumPy refuses one that does not fit the dtype it meets
        return {"f": float, "i": int, "u": int, "b": bool}[value.dtype.kind]
    return value.dtype


@functools.lru_cache(1 << 12)
def _dtype_of(op: Op, kinds: tuple[Any, ...], params: _Params) -> tuple[Any, bool]:
    samples = [k(1) if isinstance(k, type) else k if type(k) is int else numpy.ones(1, k) for k in kinds]
    with numpy.errstate(all="ignore"):
        out = op.forward(numpy, *samples, **params)
    return numpy.asarray(out).dtype, type(out) in (bool, int, float)


def _dtype_by(op: Op, inputs: Sequence[Value], params: dict[str, Any]) -> Any:
    if op.name in _SAME_DTYPE:
        return inputs[0].dtype
    if op.name == "astype":
        return numpy.dtype(params["dtype"])
    if op.name in ("matmul", "vecdot", "outer", "concat"):
        return numpy.result_type(*(v.dtype for v in inputs))
    samples = [numpy.ones((1,) * v.ndim, v.dtype) for v in inputs]
    return numpy.asarray(op.forward(numpy, *samples, **params)).dtype


def _by_sample(op: Op, inputs: Sequence[Value], params: dict[str, Any]) -> list[Aval]:
    """Run an op on arrays of ones (matrices with a unit diagonal) to see what it gives."""
    if sum(v.size for v in inputs) > _SAMPLE:
        raise CaptureError(f"{op.name}: cannot be captured for arrays this large")
    samples = []
    for value in inputs:
        if value.ndim < 2 or value.dtype.kind not in "fc":
            samples.append(numpy.ones(value.shape, value.dtype))
        else:
            samples.append(numpy.zeros(value.shape, value.dtype) + numpy.eye(*value.shape[-2:], dtype=value.dtype))
    host = {k: _on_host(v) for k, v in params.items()}
    with numpy.errstate(all="ignore"):
        out = op.forward(numpy, *samples, **host)
    parts = (out,) if op.outputs == 1 else tuple(out)
    return [(numpy.shape(p), numpy.asarray(p).dtype, False) for p in parts]


def _on_host(parameter: Any) -> Any:
    if isinstance(parameter, tuple):
        return tuple(map(_on_host, parameter))
    if isinstance(parameter, Device):
        return backend.CPU
    return backend.to_device(parameter, backend.CPU) if backend.is_cuda_array(parameter) else parameter


def _matmul_shape(inputs: Sequence[Value], _params: dict[str, Any]) -> tuple[int, ...]:
    x, y = inputs
    if not x.ndim or not y.ndim:
        raise ValueError("matmul: an argument has no axes: shape mismatch")
    a = x.shape if x.ndim > 1 else (1, *x.shape)
    b = y.shape if y.ndim > 1 else (*y.shape, 1)
    if a[-1] != b[-2]:
        raise ValueError(f"mismatch in the core dimension of shapes {x.shape} and {y.shape}")
    batch = numpy.broadcast_shapes(a[:-2], b[:-2])
    return (*batch, *((a[-2],) if x.ndim > 1 else ()), *((b[-1],) if y.ndim > 1 else ()))


def _reduced_shape(inputs: Sequence[Value], params: dict[str, Any]) -> tuple[int, ...]:
    (x,) = inputs
    axes = axes_of(params["axis"], x.ndim)
    if params["keepdims"]:
        return tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return tuple(n for i, n in enumerate(x.shape) if i not in axes)


def _new_shape(inputs: Sequence[Value], params: dict[str, Any]) -> tuple[int, ...]:
    (x,) = inputs
    shape = tuple(params["shape"])
    if shape.count(-1) == 1:
        rest = -math.prod(shape)
        shape = tuple(n if n != -1 else x.size // rest if rest else 0 for n in shape)
    if math.prod(shape) != x.size or min(shape, default=0) < 0:
        raise ValueError(f"cannot reshape array of size {x.size} into shape {tuple(params['shape'])}")
    return shape


def _broadcast_shape(inputs: Sequence[Value], params: dict[str, Any]) -> tuple[int, ...]:
    (x,) = inputs
    shape = tuple(params["shape"])
    if numpy.broadcast_shapes(x.shape, shape) != shape:
        raise ValueError(f"cannot broadcast shape {x.shape} to {shape}")
    return shape


def _permuted_shape(inputs: Sequence[Value], params: dict[str, Any]) -> tuple[int, ...]:
    (x,) = inputs
    axes = params["axes"]
    if sorted(a % max(x.ndim, 1) for a in axes) != list(range(x.ndim)):
        raise ValueError(f"axes {axes} do not fit shape {x.shape}")
    return tuple(x.shape[a] for a in axes)


def _view_shape(inputs: Sequence[Value], params: dict[str, Any]) -> tuple[int, ...]:
    # a view of one element repeated: indexing by slices costs nothing, whatever the shape
    sample = numpy.broadcast_to(numpy.zeros(()), inputs[0].shape)
    shape: tuple[int, ...] = sample[_on_host(params["index"])].shape
    return shape


def _concat_shape(inputs: Sequence[Value], params: dict[str, Any]) -> tuple[int, ...]:
    axis = params["axis"]
    for v in inputs[1:]:
        same = v.ndim == inputs[0].ndim and all(
            a == b or i == axis % v.ndim for i, (a, b) in enumerate(zip(v.shape, inputs[0].shape, strict=True))
        )
        if not same:
            raise ValueError(
                f"concat: shapes {[v.shape for v in inputs]} differ off axis {axis}: dimensions must match"
            )
    (axis,) = axes_of(axis, inputs[0].ndim)
    shape = inputs[0].shape
    return (*shape[:axis], sum(v.shape[axis] for v in inputs), *shape[axis + 1 :])


def _same_shape(inputs: Sequence[Value], _params: dict[str, Any]) -> tuple[int, ...]:
    return inputs[0].shape


_SHAPES: dict[str, Callable[[Sequence[Value], dict[str, Any]], tuple[int, ...]]] = {
    "matmul": _matmul_shape,
    "reshape": _new_shape,
    "broadcast_to": _broadcast_shape,
    "permute_dims": _permuted_shape,
    "getitem": _view_shape,
    "scatter": lambda _inputs, params: tuple(params["shape"]),
    "concat": _concat_shape,
    **dict.fromkeys(("sum", "mean", "prod", "max", "min", "logsumexp"), _reduced_shape),
    **dict.fromkeys(("astype", "softmax", "log_softmax", "cumulative_sum", "flip", "roll", "to_device"), _same_shape),
}
_SAME_DTYPE = {
    "reshape",
    "broadcast_to",
    "permute_dims",
    "getitem",
    "scatter",
    "flip",
    "roll",
    "to_device",
    "cumulative_sum",
}
