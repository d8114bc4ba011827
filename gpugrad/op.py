"""Operations as records: the registry, dispatch to NumPy or CuPy, and recording on the tape.

An operation is one `Op` record and one Python function made from it (`make_function`). The function

1. unwraps its Tensors and finds the device (`backend.place`; two devices raise DeviceMismatch),
2. runs ``op.forward(xp, *arrays, **params)``,
3. wraps the result if an argument was a Tensor, and records a `Node` if one of them requires grad.

Given plain arrays only, it falls straight through to step 2 and returns plain arrays, so that rules
are written once: on arrays they compute, on Tensors (``create_graph=True``) they are recorded.
"""

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy

from gpugrad import backend
from gpugrad.backend import HOST_TYPES, Array
from gpugrad.errors import GpugradError, MutatedArray, NotDifferentiable, ShapeMismatch

ndarray = numpy.ndarray
SNAPSHOT_BYTES = 1 << 20  # an array of the user's is copied when saved up to this size, checked by a sum above it


class Aval(NamedTuple):
    """What a rule sees of an argument it does not keep: shape and dtype, no values."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


class Cuda(NamedTuple):
    """Kernels of an elementwise op for CUDA arrays; each returns None for arguments it does not take.

    forward(*arrays) -> array. residual(*arrays) -> (array, intermediate), for a recorded call.
    backward(wanted, masked, g, y, *arrays, *intermediate) -> a cotangent an argument; `wanted` has the shape of each
    whose cotangent is wanted, else None; where `masked`, an exact zero wins in products. Without it the op's partials
    take the intermediate.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    residual: Callable[..., Any] | None = None


@dataclass(eq=False, slots=True)
class Op:
    """One operation. Made by the five declarations of `gpugrad.declare`; read by tape, tests, docs and benchmarks.

    `partials` (elementwise) or `vjps` (other kinds) hold one rule an array argument; `needs[i]` tells which values rule
    i keeps: 0 is the output, k the k-th argument, -1 all arguments. `residual`, where an elementwise op has it, is a
    forward that also returns an intermediate, and partials that take it last: a cheaper first-order sweep. `cuda`:
    kernels that take the place of these formulas on CUDA arrays. `pointwise`: works element by element with
    broadcasting, whether it has a derivative or not.
    """

    name: str
    kind: str
    forward: Callable[..., Any]
    doc: str
    partials: tuple[Any, ...] | None = None
    vjps: tuple[Any, ...] = ()
    needs: tuple[tuple[int, ...], ...] = ()
    variadic: bool = False
    outputs: int = 1
    masks: bool | Callable[["Node"], bool] = False
    domain: Any = None
    reason: str = ""
    residual: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
    cuda: Cuda | None = None
    pointwise: bool = False
    function: Callable[..., Any] = field(init=False, repr=False)


registry: dict[str, Op] = {}


def register(op: Op) -> None:
    """Enter an operation under its name. Raises ValueError for a name already taken."""
    if op.name in registry:
        raise ValueError(f"op {op.name!r} is declared twice; choose another name")
    registry[op.name] = op


class Recording(threading.local):
    """What this thread does with calls; read on every one of them, so attributes and not functions.

    on: whether to record. trusted: ids of arrays whose read-only views nobody changes while this thread computes.
    capturing: what captures the function that runs, if something does (`gpugrad.compile`).
    """

    on = True
    trusted: frozenset[int] = frozenset()
    capturing: Any = None


recording = Recording()
_sequence = itertools.count()


class Node:
    """One recorded application of an op: a vertex of the computational graph.

    A leaf has ``op is None`` and collects ``grad``. ``saved`` is ``(output, *arguments)`` with None (elementwise)
    or an Aval (other kinds) for what no rule keeps, and is None once the graph has been freed.
    """

    __slots__ = ("__weakref__", "dtype", "grad", "guard", "op", "params", "parents", "saved", "seq", "shape")

    op: Op | None
    parents: tuple["Node | None", ...]
    saved: tuple[Any, ...] | None
    params: dict[str, Any]
    guard: list[tuple[Array, Any]] | None
    seq: int
    shape: tuple[int, ...]
    dtype: Any
    grad: Any


_new_node = Node.__new__
NO_PARAMS: dict[str, Any] = {}


def leaf(data: Array) -> Node:
    """Return a fresh leaf of the graph for an array that requires grad."""
    node = _new_node(Node)
    node.op = None
    node.parents = ()
    node.saved = ()
    node.params = NO_PARAMS
    node.guard = None
    node.seq = next(_sequence)
    node.shape = data.shape
    node.dtype = data.dtype
    node.grad = None
    return node


# Tensor lives above this module; tensor.py hands its class down when it is imported.
_Tensor: Any = type(None)
_new_tensor: Any = object.__new__


def bind_tensor(cls: type) -> None:
    """Tell dispatch which class to unwrap and to wrap results in."""
    global _Tensor, _new_tensor
    _Tensor, _new_tensor = cls, cls.__new__


# --------------------------------------------------------------------------------- arrays changed in place


@functools.cache
def _weights() -> ndarray:
    """Odd factors, one for each place in a row: sums of products tell the places apart."""
    return numpy.random.default_rng(20261122).integers(0, 1 << 63, 256, dtype=numpy.uint64) * numpy.uint64(2) + _ONE


_ONE, _SHIFT = numpy.uint64(1), numpy.uint64(29)


def checksum(array: ndarray) -> bytes:
    """Hash the words of an array, 256 at a time: a change, a swap or a shuffle shows, but for a chance of 2**-64.

    Each word is mixed with itself shifted, lest a change of sign bits vanish modulo 2**64, and multiplied by a factor
    for its place. Reads the array once; blocks of 256 KiB stay in cache.
    """
    flat = array.reshape(-1, order="A").view(numpy.uint8)
    words = flat[: flat.size & ~7].view(numpy.uint64)
    weights = _weights()
    body = words[: words.size - words.size % weights.size].reshape(-1, weights.size)
    rows = numpy.empty(len(body), numpy.uint64)
    for start in range(0, len(body), 128):
        block = body[start : start + 128] >> _SHIFT
        block ^= body[start : start + 128]
        block *= weights
        numpy.sum(block, axis=1, out=rows[start : start + 128])
    return rows.tobytes() + flat[body.size * 8 :].tobytes()


def _is_trusted(array: ndarray) -> bool:
    """Tell whether this is memory that the running computation vouches for (`Recording.trusted`), seen read-only."""
    here: Any = array
    while recording.trusted and here is not None and not array.flags.writeable:
        if id(here) in recording.trusted:
            return True
        here = getattr(here, "base", None)
    return False


def protect(node: Node, array: ndarray) -> ndarray:
    """Return what the tape may keep of a host array that the user can reach.

    Up to 1 MiB a private copy. Above, the array itself with its checksum, compared before the reverse sweep uses it.
    """
    if _is_trusted(array):
        return array
    if array.nbytes <= SNAPSHOT_BYTES or not (array.flags.c_contiguous or array.flags.f_contiguous):
        return array.copy()
    if node.guard is None:
        node.guard = []
    node.guard.append((array, checksum(array)))
    return array


def verify(node: Node) -> None:
    """Raise MutatedArray if an array this node keeps by reference has changed since."""
    for array, before in node.guard or ():
        if checksum(array) != before:
            name = node.op.name if node.op else "leaf"
            raise MutatedArray(
                f"{name}: its argument of shape {array.shape}, dtype {array.dtype} was changed in place after the tape "
                "saved it; change it after the gradient is taken, or pass a copy (gpugrad.tensor copies)"
            )


# ------------------------------------------------------------------------------------------------ dispatch


def _run(op: Op, args: Sequence[Any], params: dict[str, Any]) -> Any:
    """Dispatch and record one application, for every kind, arity and device."""
    tensor = _Tensor
    boxed = tracked = False
    host = True
    values: list[Any] = []
    parents: list[Node | None] = []
    external: list[bool] = []  # whether the user can reach an argument's memory
    for arg in args:
        node, mine = None, False
        if type(arg) is tensor:
            boxed = True
            node, mine = arg._node, not arg._external
            arg = arg._data
            if node is not None:
                tracked = True
        if type(arg) is ndarray:
            host = host and arg.dtype.kind in "fibuc"
        elif type(arg) not in HOST_TYPES:
            host = False
        values.append(arg)
        parents.append(node)
        external.append(not mine)
    xp, where = numpy, backend.CPU
    if not host:
        for value in values:
            if isinstance(value, backend.Abstract):
                return value.apply(op, args, params)
        # a tracked scalar has a place: it must not go to a GPU by value
        values = [
            v if n is None or not isinstance(v, numpy.generic) else numpy.asarray(v)
            for v, n in zip(values, parents, strict=True)
        ]
        xp, where, values = backend.place(op.name, values)
    if not op.pointwise or not any(hasattr(value, "dtype") for value in values):  # its formulas ask for shapes
        with backend.activate(where):
            values = [value if hasattr(value, "dtype") else xp.asarray(value) for value in values]
    tracked = tracked and recording.on
    on_cuda = where.kind == "cuda"
    residual = op.residual if tracked and not (on_cuda and op.cuda is not None) else None
    forward = op.forward if residual is None else residual[0]
    kept: list[Any] = []
    try:
        if not on_cuda:
            out = forward(xp, *values, **params)
        else:
            with backend.activate(where):
                out = None
                if op.cuda is not None and not params:
                    out, kept = _by_kernels(op.cuda, tracked, values)
                if out is None:
                    out = forward(xp, *values, **params)
    except ValueError as error:
        raise _named(op, values, error) from None
    if not boxed:
        return out
    if residual is not None:
        out, *kept = out
    results = (out,) if op.outputs == 1 else tuple(out)
    shared = [any(external) and _may_share(part, values) for part in results]
    for part, is_shared in zip(results, shared, strict=True):
        if type(part) is ndarray and not is_shared:
            part.flags.writeable = False  # `Tensor.data` shows it: nothing saved from it can change
    node = _record(op, external, values, parents, params, results, shared, where) if tracked else None
    if kept and node is not None:
        node.saved += tuple(kept)  # type: ignore[operator]  # just recorded
    if op.outputs == 1:
        return box(out, node, shared[0])
    return tuple(
        box(part, None if node is None else output_node(node, i, part), is_shared)
        for i, (part, is_shared) in enumerate(zip(results, shared, strict=True))
    )


def _by_kernels(cuda: Cuda, tracked: bool, values: list[Any]) -> tuple[Any, list[Any]]:
    """Return what an op's kernels compute, None if they do not take these values, and what backward is to have."""
    if tracked and cuda.residual is not None:
        found = cuda.residual(*values)
        if found is not None:
            return found[0], list(found[1:])
    return cuda.forward(*values), []


def _may_share(part: Array, values: list[Any]) -> bool:
    """Tell whether a result may lie in the memory of an argument: a view may, and an argument handed back does."""
    return not isinstance(part, numpy.generic) and (part.base is not None or any(part is value for value in values))


def box(data: Array, node: Node | None, external: bool = False) -> Any:
    """Make a Tensor of an array and its place on the tape."""
    result = _new_tensor(_Tensor)
    result._data = data
    result._node = node
    result._external = external
    return result


def _record(
    op: Op,
    external: list[bool],
    values: list[Any],
    parents: list[Node | None],
    params: dict[str, Any],
    outputs: tuple[Any, ...],
    shared: list[bool],
    where: backend.Device,
) -> Node | None:
    if not all(_numeric(op, part.dtype).kind == "f" for part in outputs):
        return None  # integers and booleans carry no gradient
    node = _new_node(Node)
    node.op = op
    node.parents = tuple(parents)
    node.params = params
    node.guard = None
    node.seq = next(_sequence)
    node.shape = outputs[0].shape
    node.dtype = outputs[0].dtype
    node.grad = None
    if op.variadic:
        kept = set(op.needs[0]) if op.needs else set()
        keep_arguments = -1 in kept
    else:
        kept = {k for i, p in enumerate(parents) if p is not None for k in op.needs[i]} if op.needs else set()
        keep_arguments = False
    saved: list[Any] = [None if op.outputs > 1 else Aval(node.shape, node.dtype)]
    if 0 in kept:
        mine = tuple(
            _keepable(node, part) if is_shared else part for part, is_shared in zip(outputs, shared, strict=True)
        )
        saved = [mine if op.outputs > 1 else mine[0]]
    for position, value in enumerate(values, start=1):
        if keep_arguments or position in kept:
            if external[position - 1]:
                value = _keepable(node, value)
        elif hasattr(value, "dtype"):
            value = Aval(value.shape, value.dtype)
        saved.append(value)
    node.saved = tuple(saved)
    return node


def _keepable(node: Node, value: Any) -> Any:
    """Return what the tape may keep of an argument that the user can reach."""
    if type(value) is ndarray:
        return protect(node, value)
    # CuPy arrays cannot be made read-only: they are copied on their device
    if backend.is_cuda_array(value):
        with backend.activate(backend.device_of(value)):
            return value.copy()
    return value


OUTPUT = Op(
    "output", "linear", lambda xp, x: x, "one of several outputs; its cotangent goes to its place in the parent's"
)


def output_node(parent: Node, index: int, part: Array) -> Node:
    node = leaf(part)
    node.op = OUTPUT
    node.parents = (parent,)
    node.params = {"index": index}
    return node


def _plain(op: Op, *values: Any) -> Any:
    """Compute on host arrays and numbers alone. Raises TypeError for arrays of anything but numbers."""
    for value in values:
        if type(value) is ndarray and value.dtype.kind not in "fbiuc":
            backend.place(op.name, list(values))  # raises
    try:
        return op.forward(numpy, *values)
    except ValueError as error:
        raise _named(op, values, error) from None


def _named(op: Op, values: Sequence[Any], error: ValueError) -> ValueError:
    """Return the error of a forward with the op and the shapes in it, where it is about shapes."""
    text = str(error)
    if isinstance(error, GpugradError) or not any(
        w in text for w in ("shape", "broadcast", "dimension", "axes", "axis")
    ):
        return error
    shapes = " and ".join(str(tuple(v.shape)) for v in values if hasattr(v, "shape"))
    return ShapeMismatch(f"{op.name}: arguments of shape {shapes} do not fit: {text}")


def _numeric(op: Op, dtype: Any) -> Any:
    """Return the dtype of a recorded result.

    Raises TypeError for Python objects, which came in with an array of them; NotDifferentiable for complex numbers.
    """
    if dtype.kind == "O":
        raise TypeError(f"{op.name}: an argument has dtype object; expected numbers, cast it first")
    if dtype.kind == "c":
        raise NotDifferentiable(f"{op.name}: complex numbers carry no gradient; detach the input if that is meant")
    return dtype


def _unary(op: Op) -> Callable[..., Any]:
    """Call of an elementwise op of one array and no parameters: `_run` with everything known written out."""
    forward = op.forward
    keep_y, keep_x = 0 in op.needs[0], 1 in op.needs[0]

    def call(x: Any, /) -> Any:
        if type(x) is not _Tensor:
            return _plain(op, x) if type(x) in HOST_TYPES else _run(op, (x,), NO_PARAMS)
        data = x._data
        if type(data) not in HOST_TYPES:
            return _run(op, (x,), NO_PARAMS)
        out = forward(numpy, data)
        result = _new_tensor(_Tensor)
        result._data = out
        result._node = None
        result._external = False
        if type(out) is ndarray:
            if out.base is None and out is not data:
                out.flags.writeable = False
            else:
                result._external = x._external
        parent = x._node
        if parent is not None and recording.on:
            node = _new_node(Node)
            node.op = op
            node.parents = (parent,)
            node.params = NO_PARAMS
            node.guard = None
            node.seq = next(_sequence)
            node.shape = out.shape
            node.dtype = _numeric(op, out.dtype)
            if keep_x and x._external and type(data) is ndarray:
                data = protect(node, data)
            node.saved = (out if keep_y else None, data if keep_x else None)
            result._node = node
        return result

    return call


def _binary(op: Op) -> Callable[..., Any]:
    """Call of an elementwise op of two arrays and no parameters: `_run` with everything known written out."""
    forward = op.forward
    # which of (output, x, y) to keep when only x, only y, or both require grad
    first, second = set(op.needs[0]), set(op.needs[1])
    kept = tuple(tuple(k in need for k in range(3)) for need in (first, second, first | second))

    def call(x: Any, y: Any, /) -> Any:
        parent_x = parent_y = None
        a, b, boxed, my_x, my_y = x, y, False, False, False  # my: memory that only gpugrad reaches
        if type(x) is _Tensor:
            a, parent_x, boxed, my_x = x._data, x._node, True, not x._external
        if type(y) is _Tensor:
            b, parent_y, boxed, my_y = y._data, y._node, True, not y._external
        if type(a) not in HOST_TYPES or type(b) not in HOST_TYPES:
            return _run(op, (x, y), NO_PARAMS)
        if not boxed:
            return _plain(op, a, b)
        try:
            out = forward(numpy, a, b)
        except ValueError as error:
            raise _named(op, (a, b), error) from None
        result = _new_tensor(_Tensor)
        result._data = out
        result._node = None
        result._external = False
        if type(out) is ndarray:
            if out.base is None and out is not a and out is not b:
                out.flags.writeable = False
            else:
                result._external = not (my_x and my_y)
        if (parent_x is not None or parent_y is not None) and recording.on:
            node = _new_node(Node)
            node.op = op
            node.parents = (parent_x, parent_y)
            node.params = NO_PARAMS
            node.guard = None
            node.seq = next(_sequence)
            node.shape = out.shape
            node.dtype = _numeric(op, out.dtype)
            keep_out, keep_x, keep_y = kept[0 if parent_y is None else 1 if parent_x is None else 2]
            if keep_x and not my_x and type(a) is ndarray:
                a = protect(node, a)
            if keep_y and not my_y and type(b) is ndarray:
                b = protect(node, b)
            node.saved = (out if keep_out else None, a if keep_x else None, b if keep_y else None)
            result._node = node
        return result

    return call


def make_function(op: Op, arrays: int, signature: inspect.Signature) -> Callable[..., Any]:
    """Make the public function of an op: its name, signature and docstring, and the fastest call that fits it.

    The first `arrays` parameters are arrays (a variadic op takes one sequence of them), the others static.
    """
    parameters = list(signature.parameters.values())
    written_out = op.kind == "elementwise" and op.residual is None and arrays == len(parameters)
    names = [p.name for p in parameters[1 if op.variadic else 0 :]]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if written_out and arrays == 1:
        call = _unary(op)
    elif written_out and arrays == 2:
        call = _binary(op)
        call.__defaults__ = tuple(defaults.values()) or None
    elif op.variadic:

        def call(sequence: Any, /, *rest: Any, **params: Any) -> Any:
            return _run(op, tuple(sequence), _static(op, _bound(op, names, defaults, rest, params)))
    else:

        def call(*args: Any, **params: Any) -> Any:
            if len(args) == arrays == len(names) and not params:
                return _run(op, args, params)
            bound = _bound(op, names, defaults, args, params)
            return _run(op, tuple(bound.pop(name) for name in names[:arrays]), _static(op, bound))

    call.__name__ = call.__qualname__ = op.name.rpartition(".")[2]
    call.__doc__ = op.doc
    call.__signature__ = signature  # type: ignore[attr-defined]  # functions take it, typeshed does not know
    call.op = op  # type: ignore[attr-defined]
    return call


def _bound(
    op: Op, names: list[str], defaults: dict[str, Any], args: tuple[Any, ...], params: dict[str, Any]
) -> dict[str, Any]:
    """Join arguments given by position, by name and by default; inspect.Signature.bind takes ten times as long."""
    given = dict(zip(names, args, strict=False))
    bound = defaults | given | params
    if len(args) > len(names) or len(given) + len(params) > len(given | params) or len(bound) != len(names):
        surplus = [name for name in params if name not in names or name in given]
        missing = [name for name in names if name not in bound]
        what = (
            f"unexpected argument {surplus[0]!r}" if surplus else f"missing {missing[0]!r}" if missing else "too many"
        )
        raise TypeError(f"{op.name}: {what}; call it as {op.name}{inspect.signature(op.function)}")
    return bound


def _static(op: Op, params: dict[str, Any]) -> dict[str, Any]:
    """Return static parameters as the tape may keep them: lists as tuples.

    Raises TypeError for arrays, which would carry no gradient and could change.
    """
    for name, value in params.items():
        if type(value) is list:
            params[name] = _as_tuple(value)
        elif type(value) is _Tensor or (backend.is_array(value) and value.ndim):
            raise TypeError(
                f"{op.name}: {name} is an array of shape {value.shape}, expected a plain value: the op is not "
                "differentiated in it"
            )
    return params


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if type(value) is list else value


def refuse(op: Op) -> Callable[..., Any]:
    """Return the rule of an op that has no derivative: it raises NotDifferentiable with the reason."""

    def rule(*_args: Any, **_params: Any) -> Any:
        raise NotDifferentiable(f"{op.name} has no derivative: {op.reason}; detach its input if that is meant")

    return rule
