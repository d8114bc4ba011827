"""The tape: the reverse sweep over recorded Nodes, and `Tape`, the explicit way to record.

The Nodes hang together by their parents; there is no list that owns them, so memory goes when the last Tensor
goes. A sweep collects the Nodes it can reach, walks them from the newest to the oldest (a Node is always newer
than its parents) and multiplies cotangents backwards by the chain rule. It knows no op by name: an elementwise
op brings partial derivatives, any other a vjp per argument.

    x = 2, y = 3        f = x*y + x            newest first:
    n1 leaf x           g[n4] = 1
    n2 leaf y           n4 add:       g[n3] = 1*1         g[n1] = 1*1
    n3 = n1*n2          n3 multiply:  g[n2] = 1*x = 2     g[n1] = 1 + 1*y = 4
    n4 = n3+n1          leaves keep theirs: df/dx = 4, df/dy = 2
"""

import math
import operator
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ContextDecorator, ExitStack
from types import TracebackType
from typing import Any

import numpy
import optree

from gpugrad import backend
from gpugrad import op as _op
from gpugrad.backend import HOST_TYPES
from gpugrad.errors import GraphFreed, NotDifferentiable, ShapeMismatch
from gpugrad.op import Aval, Node, box, output_node, recording, verify
from gpugrad.tensor import Tensor

OUTPUT = _op.OUTPUT
# What a leaf has saved: nothing; LIVE while the transform that made it runs; None, as a constant, once that is over.
LIVE = (True,)


class no_grad(ContextDecorator, AbstractContextManager[None]):  # used like a function
    """Stop recording in this thread, as a context manager or a decorator."""

    _on = False

    def __init__(self) -> None:
        self._before: list[bool] = []

    def _recreate_cm(self) -> "no_grad":  # what ContextDecorator enters: one for each call, in whatever thread
        return type(self)()

    def __enter__(self) -> None:
        self._before.append(recording.on)
        recording.on = self._on

    def __exit__(self, *_exc: object) -> None:
        recording.on = self._before.pop()


class force_grad(no_grad):
    """Record in this thread even inside `no_grad`: what the transforms and `Tape` do."""

    _on = True


def reachable(outputs: Iterable[Node]) -> list[Node]:
    """Return the Nodes that lead to `outputs`, oldest first. Iterative: a graph may be 100,000 Nodes deep."""
    seen = set(outputs)
    stack = list(seen)
    while stack:
        for parent in stack.pop().parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=_age)


_age = operator.attrgetter("seq")
_BOOL, _HALF, _SINGLE = numpy.dtype(bool), numpy.dtype("float16"), numpy.dtype("float32")


def sweep(
    outputs: Sequence[tuple[Node, Any]],
    targets: Iterable[Node] | None,
    *,
    keep: bool = False,
    create: bool = False,
    nodes: list[Node] | None = None,
) -> dict[Node, Any]:
    """Run the reverse sweep.

    outputs: pairs of a Node and its cotangent (array, or Tensor with `create`). targets: the Nodes whose cotangents
    are wanted, None for every leaf. keep: leave the graph usable. create: record the sweep itself, so that its
    results can be differentiated. nodes: `reachable(outputs)` where the caller has it already.
    Returns the cotangents by Node; a Node that nothing reached is absent. Raises GraphFreed, MutatedArray,
    NotDifferentiable.
    """
    order = reachable(node for node, _ in outputs) if nodes is None else nodes
    useful: set[Node] | None = None
    wanted: frozenset[Node] = frozenset()
    if targets is not None:
        wanted = frozenset(targets)
        if any(node.op is None and node not in wanted for node in order):
            useful = set()  # other leaves hang on this graph: do not work for them
            for node in order:
                if node in wanted or not useful.isdisjoint(node.parents):
                    useful.add(node)
    cotangents: dict[Node, Any] = {}
    for node, cotangent in outputs:
        before = cotangents.get(node)
        cotangents[node] = cotangent if before is None else before + cotangent
    results: dict[Node, Any] = {}
    masked: set[Node] = set()
    # An infinite slope is an answer here, not a mishap to warn about; forward keeps NumPy's own warnings.
    recorded, recording.on = recording.on, create
    try:
        with numpy.errstate(all="ignore"), ExitStack() as places:
            here = backend.CPU
            for node in reversed(order):
                g = cotangents.pop(node, None)
                op = node.op
                if g.__class__ not in _ON_HOST:
                    here = _follow(places, here, g)
                if g is not None and (op is None or node in wanted):
                    results[node] = g if g.dtype == node.dtype else g.astype(node.dtype)
                if op is None:
                    continue
                saved = node.saved
                if g is None or op is OUTPUT:
                    if g is not None:
                        _hand_to_parent(node, g, cotangents)
                    if not keep and (useful is None or node in useful):  # the rest is not this sweep's to free
                        node.saved, node.parents, node.guard = None, (), None
                    continue
                if saved is None:
                    raise _freed()
                if node.guard is not None:
                    verify(node)
                parents = node.parents
                params = node.params
                in_mask = bool(masked) and node in masked
                if in_mask or (op.masks and (op.masks is True or op.masks(node))):
                    masked.update(p for p in parents if p is not None)
                partials = op.partials
                parts = None
                if node.dtype == _HALF and op.outputs == 1:  # read as float16, computed in float32 and rounded once
                    g = g.astype(_SINGLE)
                if create:
                    saved = _linked(node)
                elif op.cuda is not None and backend.is_cuda_array(g):
                    partials, parts = _by_kernels(node, g, useful, in_mask)
                    saved = saved[: len(parents) + 1] if partials is op.partials else saved
                elif op.residual is not None:
                    partials = op.residual[1]
                if node.dtype == _HALF:
                    saved = _widened(saved)
                latest = product = None
                for i, parent in enumerate(parents):
                    if parent is None or (useful is not None and parent not in useful):
                        continue
                    if parts is not None:
                        gi = parts[i]
                    elif partials is not None:
                        rule = partials[i]
                        if rule.__class__ is int:
                            gi = g if rule == 1 else -g if rule == -1 else g * rule
                        elif rule is latest:  # one slope for several arguments, as in activation(x + b)
                            gi = product
                        else:
                            latest = rule
                            partial = rule(*saved, **params) if params else rule(*saved)
                            if getattr(partial, "dtype", None) == _BOOL:
                                product = gi = _selected(g, partial)
                            else:
                                product = gi = _masked_product(g, partial) if in_mask else g * partial
                    elif op.variadic:
                        gi = op.vjps[0](i, g, *saved, **params)
                    else:
                        gi = op.vjps[i](g, *saved, **params)
                    # Broadcasting is undone here, once for all ops.
                    if gi.shape != parent.shape:
                        gi = unbroadcast(gi, parent.shape)
                    dtype = parent.dtype if parent.dtype != _HALF else _SINGLE  # float16 is added up in float32
                    if gi.dtype != dtype:
                        gi = gi.astype(dtype)
                    before = cotangents.get(parent)
                    if before is not None:
                        if gi.__class__ not in _ON_HOST:  # the rule may have moved it
                            here = _follow(places, here, gi)
                        gi = before + gi
                    cotangents[parent] = gi
                if not keep:
                    node.saved, node.parents, node.guard = None, (), None
    finally:
        recording.on = recorded
    return results


def _by_kernels(node: Node, g: Any, useful: set[Node] | None, masked: bool) -> tuple[Any, Any]:
    """Return the partials that fit what a node on CUDA saved, and the cotangents from its kernels, None if none."""
    op = node.op
    assert op is not None
    assert op.cuda is not None
    assert node.saved is not None
    if op.cuda.backward is None:
        kept = len(node.saved) > len(node.parents) + 1
        return op.residual[1] if kept and op.residual is not None else op.partials, None
    wanted = tuple(None if p is None or not (useful is None or p in useful) else p.shape for p in node.parents)
    return op.partials, op.cuda.backward(wanted, masked, g, *node.saved)


# What needs no device made current: host arrays and numbers, nothing, lists of parts, and Tensors, whose ops do it.
_ON_HOST = HOST_TYPES | {type(None), list, Tensor}


def _follow(places: ExitStack, here: backend.Device, g: Any) -> backend.Device:
    """Make the device of a cotangent the current one, on which plain CuPy arithmetic runs; graphs may cross devices."""
    where = backend.device_of(g)
    if where != here and where.kind == "cuda":
        places.enter_context(backend.activate(where))
        return where
    return here


def _hand_to_parent(node: Node, g: Any, cotangents: dict[Node, Any]) -> None:
    """Put the cotangent of one of several outputs into its place among those of the op that gave them."""
    if node.saved is None:
        raise _freed()
    parent = node.parents[0]
    assert parent is not None
    assert parent.op is not None
    parts = cotangents.setdefault(parent, [None] * parent.op.outputs)
    index = node.params["index"]
    parts[index] = g if parts[index] is None else parts[index] + g


def _freed() -> GraphFreed:
    return GraphFreed(
        "the graph was freed by an earlier backward(); use retain_graph=True there, or Tape(persistent=True)"
    )


def _linked(node: Node) -> tuple[Any, ...]:
    """Return what the node saved as Tensors that hang where they hung, so that rules on them are recorded."""
    out, *arguments = node.saved[: len(node.parents) + 1]  # type: ignore[index]  # not freed: the caller looked
    linked: list[Any] = []
    if type(out) is tuple:
        out = tuple(box(part, output_node(node, i, part)) for i, part in enumerate(out))
    elif backend.is_array(out):
        out = box(out, node)
    for value, parent in zip(arguments, node.parents, strict=True):
        linked.append(box(value, parent) if backend.is_array(value) else value)
    return (out, *linked)


def _widened(saved: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what a node saved with float16 arrays cast to float32."""
    return tuple(
        _widened(v)
        if type(v) is tuple
        else v.astype(_SINGLE)
        if getattr(v, "dtype", None) == _HALF and type(v) is not Aval
        else v
        for v in saved
    )


def _masked_product(g: Any, partial: Any) -> Any:
    """Multiply, with an exact zero on either side winning over an infinity or NaN on the other."""
    if type(g) is Tensor:
        return g._masked_product(partial)
    return backend.namespace(g).where((g == 0) | (partial == 0), 0, g * partial)


def _selected(g: Any, partial: Any) -> Any:
    """Apply a slope that is 1 or 0: select, so that an infinity in g does not become NaN where the slope is 0."""
    if type(g) is Tensor:
        return g._selected(partial)
    return backend.select(partial, g)


def unbroadcast(g: Any, shape: tuple[int, ...]) -> Any:
    """Sum a cotangent over the axes along which its argument was broadcast, or spread it where a rule gave less."""
    if len(g.shape) < len(shape) or any(a == 1 != b for a, b in zip(g.shape[::-1], shape[::-1], strict=False)):
        return g + _zeros(g, shape)
    extra = len(g.shape) - len(shape)
    axes = (*range(extra), *(i + extra for i, n in enumerate(shape) if n == 1 and g.shape[i + extra] != 1))
    if type(g) is Tensor:
        total: Any = g.sum(axis=axes)
    else:
        terms = math.prod(g.shape[i] for i in axes)
        # as gpugrad.sum does; NumPy adds rows up one after another
        wide = numpy.float64 if g.dtype == numpy.float32 and terms >= 4096 else None
        total = g.sum(axis=axes, dtype=wide)
    return total if total.shape == shape else total.reshape(shape)  # no view where none is needed: it would be copied


def _zeros(like: Any, shape: tuple[int, ...]) -> Any:
    array = like._data if type(like) is Tensor else like
    with backend.activate(backend.device_of(array)):
        return backend.namespace(array).zeros(shape, dtype=array.dtype)


def ones_like(node: Node, array: Any) -> Any:
    """Return the cotangent 1 of a scalar output. Raises ShapeMismatch for an output that is no scalar."""
    if node.shape != ():
        raise ShapeMismatch(
            f"the gradient of a non-scalar needs a cotangent: the output has shape {node.shape}; "
            "reduce it (.sum() or .mean()), or give one of that shape"
        )
    if recording.capturing is not None:
        return recording.capturing.lift(node.dtype.type(1))
    if not backend.is_cuda_array(array):
        return node.dtype.type(1)
    with backend.activate(backend.device_of(array)):
        return backend.namespace(array).ones((), dtype=node.dtype)


def as_cotangent(given: Any, output: Tensor, *, create: bool = False) -> Any:
    """Check a cotangent against its output and return it as an array of the output's dtype (Tensor with `create`).

    Raises ShapeMismatch, DeviceMismatch.
    """
    value = given._data if type(given) is Tensor else given
    if not backend.is_array(value):
        value = backend.asarray(value, dtype=output.dtype, where=output.device)
    backend.place("cotangent", [output._data, value])
    if value.shape != output.shape:
        raise ShapeMismatch(
            f"the cotangent has shape {value.shape}, its output {output.shape}; a cotangent has its output's shape"
        )
    if create and type(given) is Tensor:
        return given if given.dtype == output.dtype else given.astype(output.dtype)
    with backend.activate(output.device):
        value = value.astype(output.dtype)  # a copy: what the caller does to his array later is no concern of ours
    return box(value, None) if create else value


_adding_up = threading.Lock()


def backward(output: Tensor, gradient: Any = None, *, retain_graph: bool = False, create_graph: bool = False) -> None:
    """Add d output / d leaf to the `grad` of every leaf that the output was computed from.

    gradient: the cotangent of the output, of its shape; may be left out for a scalar. retain_graph: allow another
    backward over the same graph. create_graph: record the backward itself, for higher derivatives.
    Raises ShapeMismatch, GraphFreed, MutatedArray, NotDifferentiable.
    """
    node = output._node
    if recording.capturing is not None:
        raise recording.capturing.refused("backward() adds to the grad of leaves", "gpugrad.grad or value_and_grad")
    if node is None:
        raise NotDifferentiable(
            f"backward: this tensor (shape {output.shape}, dtype {output.dtype}) does not depend on a tensor that "
            "requires grad; set requires_grad=True on a leaf, and compute outside no_grad"
        )
    cotangent = (
        ones_like(node, output._data) if gradient is None else as_cotangent(gradient, output, create=create_graph)
    )
    if create_graph and type(cotangent) is not Tensor:
        cotangent = box(cotangent, None)
    shared: set[int] = set()
    results = sweep([(node, cotangent)], None, keep=retain_graph or create_graph, create=create_graph)
    with _adding_up:  # threads may share a leaf
        for leaf, g in results.items():
            if not create_graph:
                g = box(own(g, shared), None)
            leaf.grad = g if leaf.grad is None else leaf.grad + g


setattr(Tensor, "backward", backward)  # noqa: B010  # a method of Tensor, which this module is above


def own(g: Any, handed_out: set[int]) -> Any:
    """Return a gradient as an array that is the caller's alone: writable, no view, given to nobody else."""
    if isinstance(g, numpy.generic):
        return g
    if isinstance(g, numpy.ndarray):
        if g.base is not None or not g.flags.writeable or id(g) in handed_out:
            g = g.copy()
    elif id(g) in handed_out or not g.flags.owndata:
        with backend.activate(backend.device_of(g)):
            g = g.copy()
    handed_out.add(id(g))
    return g


_watching = threading.Lock()


class _Open(threading.local):
    tapes: "tuple[Tape, ...]" = ()


_open = _Open()


class Tape(AbstractContextManager["Tape"]):
    """Record what happens to watched tensors, then ask for gradients.

        with gg.Tape() as tape:
            tape.watch(w)
            loss = f(w)
        dw = tape.gradient(loss, w)

    A tape gives one gradient and is used up, unless ``persistent=True``. It records inside `no_grad` too.
    """

    def __init__(self, persistent: bool = False) -> None:
        self._persistent = persistent
        self._watched: list[tuple[Tensor, Node]] = []
        self._used = False
        self._recording = force_grad()

    def __enter__(self) -> "Tape":
        self._recording.__enter__()
        _open.tapes += (self,)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._recording.__exit__()
        _open.tapes = tuple(tape for tape in _open.tapes if tape is not self)
        with _watching:
            for tensor, node in self._watched:
                node.params["tapes"] -= 1
                if not node.params["tapes"] and tensor._node is node:
                    tensor._node = None
                    node.saved = None  # a constant for whatever looks at this graph later

    def watch(self, tensors: Any) -> None:
        """Track a floating-point Tensor, or every one in a pytree, until the ``with`` block ends.

        Raises TypeError for a plain array (operations on it cannot be seen), NotDifferentiable for integers.
        """
        for tensor in optree.tree_leaves(tensors):
            if type(tensor) is not Tensor:
                raise TypeError(f"Tape.watch: got a {type(tensor).__name__}; wrap it first: x = gpugrad.asarray(x)")
            with _watching:  # tapes of several threads may watch one tensor: the last one lets it go
                node = tensor._node
                if node is None:
                    tensor._node = node = new_leaf(tensor._data, "Tape.watch")
                    node.params = {"tapes": 0}
                if "tapes" in node.params:
                    node.params["tapes"] += 1
                    self._watched.append((tensor, node))

    def gradient(self, target: Tensor, sources: Any, output_gradients: Any = None) -> Any:
        """Return d target / d sources, as Tensors in the structure of `sources`.

        target: a scalar Tensor, or any with `output_gradients` of its shape. A source it does not depend on has
        gradient zero. Raises GraphFreed on the second call of a tape that is not persistent.
        """
        if self._used and not self._persistent:
            raise GraphFreed("this tape has given its gradient; make it with Tape(persistent=True) to ask again")
        if type(target) is not Tensor:
            raise TypeError(f"Tape.gradient: the target is a {type(target).__name__}, expected a Tensor")
        leaves, structure = optree.tree_flatten(sources)
        watched = {id(tensor): node for tensor, node in self._watched}
        nodes: list[Node] = []
        for source in leaves:
            node = watched.get(id(source), source._node if type(source) is Tensor else None)
            if node is None:
                raise NotDifferentiable(
                    f"Tape.gradient: a source ({type(source).__name__}) was not watched; "
                    "call tape.watch on it before it is used"
                )
            nodes.append(node)
        if target._node is None:
            raise NotDifferentiable(
                "Tape.gradient: the target was not recorded; compute it inside the with block, after tape.watch"
            )
        self._used = True
        order = reachable([target._node])
        # Inside the block of another tape (or its own, if it persists), inside a transform, or with other leaves
        # about, the sweep itself is recorded: that is how second derivatives are taken.
        create = recording.capturing is not None or (
            recording.on
            and (
                any(tape is not self or self._persistent for tape in _open.tapes)
                or any(_is_others(node, (*nodes, *watched.values())) for node in order)
            )
        )
        given = (
            ones_like(target._node, target._data)
            if output_gradients is None
            else as_cotangent(output_gradients, target, create=create)
        )
        if create and type(given) is not Tensor:
            given = box(given, None)
        keep = self._persistent or create
        results = sweep([(target._node, given)], nodes, keep=keep, create=create, nodes=order)
        gradients = []
        handed_out: set[int] = set()
        for source, node in zip(leaves, nodes, strict=True):
            g = results.get(node)
            if g is None:
                g = box(_zeros(source, source.shape), None)
            gradients.append(g if type(g) is Tensor else box(own(g, handed_out), None))
        return optree.tree_unflatten(structure, gradients)


def _is_others(node: Node, ours: Sequence[Node]) -> bool:
    """Tell whether a leaf belongs to a running transform, or to a tensor that is no concern of this tape."""
    return node.op is None and (node.saved is LIVE or (node.saved is not None and node not in ours))


def new_leaf(data: Any, asker: str) -> Node:
    """Return a leaf for an array that is to be differentiated. Raises NotDifferentiable for integers and booleans."""
    require_float(data, asker)
    return _op.leaf(data)


def require_float(data: Any, asker: str) -> None:
    """Raise NotDifferentiable unless the array is of floating point."""
    if data.dtype.kind != "f":
        raise NotDifferentiable(
            f"{asker}: a gradient with respect to dtype {data.dtype} does not exist; "
            "cast the input to floating point first, e.g. x.astype('float64') or 3.0 for 3"
        )
