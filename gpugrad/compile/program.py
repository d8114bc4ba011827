"""The captured program: a list of operations on values, in the order they ran.

    Value       an array as capture knows it: shape and dtype, no elements
    Constant    an array or number that was there when the function was captured
    Equation    one application of an op: outputs = op(*inputs, **params)
    Program     inputs, equations, outputs

`simplified` drops what does nothing: casts and reshapes that change nothing, equations that were there before (common
subexpressions), equations whose results nobody uses (dead code). What depends on constants alone was computed when it
was captured.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.op import Op, registry


class Value:
    """An array of the program. weak: a Python number, which does not widen what it meets."""

    __slots__ = ("dtype", "shape", "weak")

    def __init__(self, shape: tuple[int, ...], dtype: Any, weak: bool = False) -> None:
        self.shape, self.dtype, self.weak = shape, numpy.dtype(dtype), weak

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return int(self.size * self.dtype.itemsize)

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class Constant(Value):
    """A value that is known: an array, or a number (a Python number is weak)."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        weak = type(array) in (bool, int, float)
        self.array = array
        super().__init__(() if weak else array.shape, numpy.asarray(array).dtype if weak else array.dtype, weak)


@dataclass(eq=False)
class Equation:
    """outputs = op(*inputs, **params)."""

    op: Op
    inputs: tuple[Value, ...]
    params: dict[str, Any]
    outputs: tuple[Value, ...]


@dataclass(eq=False)
class Program:
    """What a function does to its arguments. outputs may be inputs or constants too."""

    inputs: tuple[Value, ...]
    equations: list[Equation]
    outputs: tuple[Value, ...]
    name: str = "fun"
    names: dict[Value, str] = field(default_factory=dict)

    def name_of(self, value: Value) -> str:
        """Return a short name for a value: a b c for inputs, numbers in order for the rest."""
        if isinstance(value, Constant):
            if value.ndim or not isinstance(value.array, (bool, int, float, numpy.generic)):
                return f"constant {value!r}"
            number: Any = value.array
            return repr(number if value.weak else number.item())
        if not self.names:
            for k, v in enumerate(self.inputs):
                self.names[v] = f"in{k}"
        return self.names.setdefault(value, f"t{len(self.names) - len(self.inputs)}")

    def lines(self) -> list[str]:
        """Return the equations as text."""
        out = [f"{self.name}({', '.join(f'{self.name_of(v)}: {v!r}' for v in self.inputs)})"]
        for eq in self.equations:
            params = "".join(f", {k}={v!r}" for k, v in eq.params.items() if v is not None)
            left = ", ".join(f"{self.name_of(v)}: {v!r}" for v in eq.outputs)
            out.append(f"  {left} = {eq.op.name}({', '.join(map(self.name_of, eq.inputs))}{params})")
        out.append(f"  return {', '.join(map(self.name_of, self.outputs))}")
        return out


def equation(op: str | Op, inputs: Sequence[Value], shape: tuple[int, ...], dtype: Any, /, **params: Any) -> Equation:
    """Return an equation of one output."""
    return Equation(registry[op] if isinstance(op, str) else op, tuple(inputs), params, (Value(shape, dtype),))


def consumers(equations: Iterable[Equation], outputs: Iterable[Value]) -> dict[Value, int]:
    """Return how often each value is used."""
    uses: dict[Value, int] = {}
    for value in (*(v for eq in equations for v in eq.inputs), *outputs):
        uses[value] = uses.get(value, 0) + 1
    return uses


def simplified(program: Program) -> Program:
    """Return the program without what does nothing, with means as sums that are scaled."""
    alias: dict[Value, Value] = {}
    known: dict[Any, tuple[Value, ...]] = {}
    kept: list[Equation] = []
    made: dict[Value, Equation] = {}

    def add(eq: Equation) -> None:
        eq = _joined(replace(eq, inputs=tuple(alias.get(v, v) for v in eq.inputs)), made)
        same = _does_nothing(eq) or _folded(eq)
        if same is not None:
            alias[eq.outputs[0]] = same
            return
        key = _key(eq)
        before = known.get(key) if key is not None else None
        if before is not None:
            alias.update(zip(eq.outputs, before, strict=True))
            return
        if key is not None:
            known[key] = eq.outputs
        kept.append(eq)
        made.update(dict.fromkeys(eq.outputs, eq))

    for eq in program.equations:
        for part in _lowered(_plainer(eq)):
            add(part)
    outputs = tuple(alias.get(v, v) for v in program.outputs)
    return Program(program.inputs, live(kept, outputs), outputs, program.name)


def live(equations: Sequence[Equation], outputs: Iterable[Value]) -> list[Equation]:
    """Return the equations that the outputs depend on."""
    wanted = set(outputs)
    kept = []
    for eq in reversed(equations):
        if not wanted.isdisjoint(eq.outputs):
            kept.append(eq)
            wanted.update(eq.inputs)
    return kept[::-1]


def alike(one: Program, other: Program, lengths: tuple[int, int] = (0, 0)) -> bool:
    """Tell whether two programs do the same; lengths: what a length in the one may be in the other."""
    names: dict[Value, Value] = dict(zip(one.inputs, other.inputs, strict=True))

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, slice) and isinstance(b, slice):
            return all(x == y for x, y in zip((a.start, a.stop, a.step), (b.start, b.stop, b.step), strict=True))
        if hasattr(a, "dtype") and hasattr(b, "dtype") and hasattr(a, "shape"):
            if a.shape != b.shape or a.dtype != b.dtype:
                return False
            a, b = (backend.to_device(x, backend.CPU) for x in (a, b))
            return bool(numpy.all((a == b) | ((a != a) & (b != b))))
        return bool(a == b) or (a != a and b != b)

    def shapes(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return len(a) == len(b) and all(x == y or (x, y) == lengths for x, y in zip(a, b, strict=True))

    def values(a: Value, b: Value) -> bool:
        if isinstance(a, Constant) and isinstance(b, Constant):
            return a.weak == b.weak and (a.array is b.array or same(a.array, b.array))
        return names.get(a) is b

    def params(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return a.keys() == b.keys() and all(
            shapes(tuple(a[k]), tuple(b[k])) if k == "shape" else same(a[k], b[k]) for k in a
        )

    if len(one.equations) != len(other.equations) or len(one.outputs) != len(other.outputs):
        return False
    for a, b in zip(one.equations, other.equations, strict=True):
        if a.op is not b.op or len(a.inputs) != len(b.inputs) or not params(a.params, b.params):
            return False
        if not all(map(values, a.inputs, b.inputs)):
            return False
        if not all(shapes(x.shape, y.shape) for x, y in zip(a.outputs, b.outputs, strict=True)):
            return False
        names.update(zip(a.outputs, b.outputs, strict=True))
    return all(map(values, one.outputs, other.outputs))


def _lowered(eq: Equation) -> list[Equation]:
    """Write a mean as a sum times a number."""
    (x,) = eq.inputs if len(eq.inputs) == 1 else (None,)
    if eq.op.name != "mean" or x is None or x.dtype.kind != "f" or x.dtype == numpy.float16:
        return [eq]
    (out,) = eq.outputs
    count = x.size // max(out.size, 1)
    if not count:
        return [eq]
    total = Value(out.shape, out.dtype)
    return [
        Equation(registry["sum"], (x,), eq.params, (total,)),
        Equation(registry["divide"], (total, Constant(out.dtype.type(count))), {}, eq.outputs),
    ]


def _plainer(eq: Equation) -> Equation:
    """Write what axes of length 1 make of an op.

    Indexing, transposing and adding up that only drops, adds or moves such axes is a reshape; a matrix product over
    such an axis is a multiplication with broadcasting.
    """
    if eq.op.name == "sum" and eq.inputs[0].size == eq.outputs[0].size and eq.inputs[0].dtype == eq.outputs[0].dtype:
        return Equation(registry["reshape"], eq.inputs, {"shape": eq.outputs[0].shape}, eq.outputs)
    if eq.op.name == "permute_dims":
        moved = [a for a in (a % max(eq.inputs[0].ndim, 1) for a in eq.params["axes"]) if eq.inputs[0].shape[a] != 1]
        if moved == sorted(moved):
            return Equation(registry["reshape"], eq.inputs, {"shape": eq.outputs[0].shape}, eq.outputs)
    if eq.op.name == "matmul":
        x, y = eq.inputs
        if x.ndim == y.ndim == 2 and x.shape[1] == 1 and x.dtype == y.dtype and x.dtype.kind == "f":
            return Equation(registry["multiply"], eq.inputs, {}, eq.outputs)  # (m, 1) times (1, n)
    if eq.op.name not in ("getitem", "scatter"):
        return eq
    (x,), (out,) = eq.inputs, eq.outputs
    index, longer = eq.params["index"], x if eq.op.name == "getitem" else out
    if x.size != out.size or not isinstance(index, tuple) or any(part is Ellipsis for part in index):
        return eq
    lengths = iter(longer.shape)
    for part in index:
        if part is None:
            continue
        n = next(lengths)
        if not (isinstance(part, slice) and part in (slice(None), slice(0, None))) and not (
            n == 1 and isinstance(part, (int, numpy.integer))
        ):
            return eq
    return Equation(registry["reshape"], eq.inputs, {"shape": out.shape}, eq.outputs)


def _joined(eq: Equation, made: dict[Value, Equation]) -> Equation:
    """Write a reshape of a reshape, and a transpose of a transpose, as one."""
    if eq.op.name not in ("reshape", "permute_dims"):
        return eq
    before = made.get(eq.inputs[0])
    if before is None or before.op is not eq.op:
        return eq
    if eq.op.name == "reshape":
        return replace(eq, inputs=before.inputs, params={"shape": eq.outputs[0].shape})
    first = [a % max(eq.outputs[0].ndim, 1) for a in before.params["axes"]]
    return replace(eq, inputs=before.inputs, params={"axes": tuple(first[a] for a in eq.params["axes"])})


def _does_nothing(eq: Equation) -> Value | None:
    """Return the input that an equation hands on unchanged, if it does."""
    if len(eq.outputs) != 1 or not eq.inputs:
        return None
    x, out, name = eq.inputs[0], eq.outputs[0], eq.op.name
    if x.shape != out.shape or x.dtype != out.dtype or x.weak != out.weak:
        return None
    if name in ("reshape", "broadcast_to", "astype", "to_device"):
        return x
    if name == "permute_dims" and tuple(eq.params["axes"]) == tuple(range(x.ndim)):
        return x
    if name == "sum" and eq.params["axis"] == ():
        return x
    return None


def _folded(eq: Equation) -> Constant | None:
    """Return the result of an equation on constants, unless it would be larger than they are."""
    if len(eq.outputs) != 1 or not all(isinstance(v, Constant) for v in eq.inputs):
        return None
    (out,) = eq.outputs
    arrays = [v.array for v in eq.inputs if isinstance(v, Constant)]
    if out.size > max((v.size for v in eq.inputs), default=0) or any(map(backend.is_cuda_array, arrays)):
        return None
    with numpy.errstate(all="ignore"):
        result = eq.op.forward(numpy, *(a if eq.op.pointwise else numpy.asarray(a) for a in arrays), **eq.params)
    return Constant(result if out.weak else numpy.asarray(result, dtype=out.dtype))


def _key(eq: Equation) -> Any:
    """Return what makes two equations equal, None for one that may not be shared."""
    inputs = tuple(
        ("number", type(v.array), v.array if v.array == v.array else "nan", math.copysign(1, v.array))
        if isinstance(v, Constant) and not v.ndim and isinstance(v.array, (bool, int, float, numpy.generic))
        else id(v.array)
        if isinstance(v, Constant)
        else id(v)
        for v in eq.inputs
    )
    try:
        return (eq.op, inputs, _hashable(eq.params))
    except TypeError:
        return None


def _hashable(params: Any) -> Any:
    """Return static parameters as something that can be a key. Raises TypeError where that is not possible."""
    if isinstance(params, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(params.items()))
    if isinstance(params, (tuple, list)):
        return tuple(map(_hashable, params))
    if isinstance(params, slice):
        return ("slice", params.start, params.stop, params.step)
    if isinstance(params, numpy.ndarray):
        return (params.shape, params.dtype.str, params.tobytes())
    if backend.is_cuda_array(params):
        raise TypeError("an array on a device")
    hash(params)
    return (type(params), params)
