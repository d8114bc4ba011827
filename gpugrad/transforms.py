"""Function transforms: `grad`, `value_and_grad`, `vjp`. They nest, to any order.

Arguments are pytrees (optree) of arrays, Tensors and Python floats. The function gets Tensors in their place, so that
what it does is recorded; gradients come back in the same structure and kind: an array for an array, a Tensor for a
Tensor, a float for a float. Where something else on the tape is involved (an outer `grad`, a tensor that requires
grad), the results are Tensors on that tape.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import optree

from gpugrad import backend
from gpugrad.errors import NotDifferentiable, ShapeMismatch
from gpugrad.op import SNAPSHOT_BYTES, Node, box, recording
from gpugrad.ops.shape import reshape
from gpugrad.tape import LIVE, as_cotangent, force_grad, new_leaf, ones_like, own, reachable, sweep
from gpugrad.tensor import Tensor


class _Inputs:
    """The differentiated arguments: their leaves as given, as Tensors, and their places on the tape."""

    def __init__(self, arguments: Sequence[Any], asker: str) -> None:
        self.given: list[Any]
        self.given, self.structure = optree.tree_flatten(tuple(arguments))  # type: ignore[arg-type]
        outer = recording.on
        self.nodes: list[Node] = []
        self.tensors: list[Tensor] = []
        with force_grad():
            for given in self.given:
                tensor = self._track(given, asker, outer)
                self.tensors.append(tensor)
                self.nodes.append(tensor._node)  # type: ignore[arg-type]

    @staticmethod
    def _track(given: Any, asker: str, outer: bool) -> Tensor:
        if recording.capturing is not None:
            given = recording.capturing.strong(given)
        if type(given) is Tensor:
            if given._node is not None and outer:
                # An outer transform is watching: hang below it, at a place of our own.
                alias: Tensor = reshape(given, given.shape)
                return alias
            data, external = given._data, given._external
        elif type(given) is float:
            data, external = numpy.float64(given), False
        elif backend.is_array(given):
            data, external = given, not isinstance(given, numpy.generic)
            if isinstance(data, numpy.ndarray) and data.nbytes <= SNAPSHOT_BYTES:
                # once here, instead of each time an op saves it
                data, external = data.copy(), False
                data.flags.writeable = False
        elif isinstance(given, (bool, int)):
            raise NotDifferentiable(
                f"{asker}: a gradient with respect to the integer {given!r}; write {float(given)!r}"
            )
        else:
            raise TypeError(f"{asker}: cannot differentiate a {type(given).__name__}; expected array, Tensor or float")
        node = new_leaf(data, asker)
        node.saved = LIVE
        tensor: Tensor = box(data, node, external)
        return tensor

    def arguments(self) -> tuple[Any, ...]:
        """Return the traced arguments in the structure they came in."""
        return optree.tree_unflatten(self.structure, self.tensors)  # type: ignore[return-value]

    def close(self) -> None:
        """Say that the function has returned: for other transforms these leaves are constants from now on."""
        for node in self.nodes:
            if node.op is None:
                node.saved = None

    def like_given(self, results: dict[Node, Any]) -> tuple[Any, ...]:
        """Return cotangents in the structure and kinds the arguments came in; zero where none arrived."""
        handed_out: set[int] = set()
        out: list[Any] = []
        for given, tensor, node in zip(self.given, self.tensors, self.nodes, strict=True):
            g = results.get(node)
            if g is None:
                array = tensor._data
                with backend.activate(backend.device_of(array)):
                    g = backend.namespace(array).zeros(node.shape, dtype=node.dtype)
            out.append(_like(g, given, handed_out))
        return optree.tree_unflatten(self.structure, out)  # type: ignore[return-value]


def _like(value: Any, given: Any, handed_out: set[int]) -> Any:
    """Return a result as the kind of thing that was given: float, array or Tensor; a tracked Tensor as it is."""
    if recording.capturing is not None:
        return recording.capturing.like(value, given)
    if type(value) is Tensor:
        if value._node is not None:
            return value
        value = value._data
    if type(given) is float:
        return float(value)
    value = own(value, handed_out)
    if type(given) is Tensor:
        return box(value, None)
    if isinstance(given, numpy.ndarray) and not isinstance(value, numpy.ndarray):
        return numpy.asarray(value)
    return value


def _pick(args: tuple[Any, ...], argnums: int | Sequence[int], name: str) -> tuple[int, ...]:
    numbers = tuple(argnums) if isinstance(argnums, Sequence) else (operator.index(argnums),)
    for n in numbers:
        if not -len(args) <= n < len(args):
            raise TypeError(f"grad of {name}: argnums={argnums}, but it was called with {len(args)} argument(s)")
    picked = tuple(n % len(args) for n in numbers)
    if len(set(picked)) < len(picked):
        raise ValueError(f"grad of {name}: argnums={argnums} names an argument twice")
    return picked


def value_and_grad(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """Return a function that computes (value, gradient) of a scalar function in one forward and one reverse sweep.

    argnums: which positional arguments to differentiate, an int or several (then a tuple of gradients). has_aux: fun
    returns (value, aux), and the result is ((value, aux), gradient).
    Raises ShapeMismatch for a value that is no scalar, NotDifferentiable for integer inputs or outputs.
    """
    name = getattr(fun, "__name__", "the function")

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        numbers = _pick(args, argnums, name)
        inputs = _Inputs([args[n] for n in numbers], f"grad of {name}")
        traced = list(args)
        for n, tensor in zip(numbers, inputs.arguments(), strict=True):
            traced[n] = tensor
        outer = recording.on
        with force_grad():
            out = fun(*traced, **kwargs)
        inputs.close()
        aux = None
        if has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise TypeError(f"grad of {name}: has_aux=True, but it did not return a pair (value, aux)")
            out, aux = out
        value, results, recorded = _pull(out, inputs, outer, name)
        if has_aux and not recorded:
            aux = optree.tree_map(lambda part: _off_tape(part, inputs, outer), aux)  # type: ignore[arg-type]
        gradients = inputs.like_given(results)
        gradient = gradients if isinstance(argnums, Sequence) else gradients[0]
        return ((value, aux) if has_aux else value), gradient

    return wrapped


def _off_tape(value: Any, inputs: _Inputs, outer: bool) -> Any:
    """Detach what hangs on our inputs alone; what also hangs on an outer tape stays there."""
    if type(value) is not Tensor or value._node is None:
        return value
    return value if outer and _others(reachable([value._node]), inputs) else value.detach()


def _pull(out: Any, inputs: _Inputs, outer: bool, name: str) -> tuple[Any, dict[Node, Any], bool]:
    """Run the reverse sweep from a scalar output.

    Returns the value in the kind of the inputs, the cotangents, and whether all that was itself recorded.
    """
    kind = inputs.given[0] if inputs.given else 0.0
    if any(type(given) is Tensor for given in inputs.given):
        kind = next(given for given in inputs.given if type(given) is Tensor)
    if type(out) is not Tensor:
        shape = getattr(out, "shape", ())
        if shape != () or not isinstance(out, (int, float, numpy.generic, numpy.ndarray)):
            raise ShapeMismatch(f"grad of {name}: it returned a {type(out).__name__}, expected a scalar Tensor")
        return out, {}, False  # a constant
    if out.shape != ():
        raise ShapeMismatch(
            f"grad of {name}: it returned shape {out.shape}, expected a scalar: take .sum() or .mean(), or use vjp"
        )
    if out.dtype.kind != "f":
        raise NotDifferentiable(f"grad of {name}: it returned dtype {out.dtype}, expected floating point")
    node = out._node
    if node is None:
        return _like(out, kind, set()), {}, False
    nodes = reachable([node])
    create = recording.capturing is not None or (outer and _others(nodes, inputs))
    cotangent = ones_like(node, out._data)
    results = sweep(
        [(node, box(cotangent, None) if create else cotangent)], inputs.nodes, keep=create, create=create, nodes=nodes
    )
    if create and recording.capturing is None:
        return out, results, True
    return _like(out._data, kind, set()), results, False


def _others(nodes: list[Node], inputs: _Inputs) -> bool:
    """Tell whether a graph hangs on a leaf that is not one of our inputs (theirs may hang below an outer one)."""
    if not inputs.nodes:
        return bool(nodes)
    mine = set(inputs.nodes)
    return any(node.op is None and node.saved is not None and node not in mine for node in nodes)


def grad(fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """Return a function that computes the gradient of a scalar function.

    argnums: which positional arguments to differentiate, an int or several (then a tuple of gradients). has_aux: fun
    returns (value, aux), and the result is (gradient, aux). Raises as `value_and_grad`.
    """
    both = value_and_grad(fun, argnums, has_aux)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return wrapped


def vjp(fun: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """Return fun(*primals) and the function from a cotangent of that to the cotangents of the primals.

    The output may be any pytree of Tensors; the cotangent has its structure and shapes. The function may be called
    again. Raises ShapeMismatch for a cotangent that does not fit.
    """
    name = getattr(fun, "__name__", "the function")
    inputs = _Inputs(primals, f"vjp of {name}")
    outer = recording.on
    with force_grad():
        out = fun(*inputs.arguments())
    inputs.close()
    outputs, structure = optree.tree_flatten(out)
    nodes = reachable([o._node for o in outputs if type(o) is Tensor and o._node is not None])
    create = recording.capturing is not None or (outer and _others(nodes, inputs))
    plain: set[int] = set()
    tensors = any(type(given) is Tensor for given in inputs.given)
    kind = next((g for g in inputs.given if type(g) is Tensor), inputs.given[0] if inputs.given else 0.0)
    shown = [
        o
        if type(o) is not Tensor or (create and recording.capturing is None)
        else _like(o._data, kind if tensors else o.data, plain)
        for o in outputs
    ]

    def pull(cotangent: Any) -> tuple[Any, ...]:
        given, got = optree.tree_flatten(cotangent)
        if got != structure:
            raise ShapeMismatch(f"vjp of {name}: the cotangent has structure {got}, the output {structure}")
        pairs = []
        recorded = create or (recording.on and any(type(c) is Tensor and c._node is not None for c in given))
        for o, c in zip(outputs, given, strict=True):
            if type(o) is Tensor and o._node is not None:
                checked = as_cotangent(c, o, create=recorded)
                pairs.append((o._node, checked if type(checked) is Tensor or not recorded else box(checked, None)))
        results = sweep(pairs, inputs.nodes, keep=True, create=recorded)
        return inputs.like_given(results)

    return optree.tree_unflatten(structure, shown), pull
