"""Programs over rows: what can be done for a block of rows at a time, and what for one row alone.

Where the first axis of the data is examples, most programs are three parts:

    before      what depends on no row
    body        what is done for every row, ending in sums over the rows: losses, gradients of what all rows share
    after       what is done to the sums

`split` finds them: then a block of rows goes through the whole body while it is in cache, and no intermediate is longer
than a block. It is exact, not an approximation: the parts together are the program. A program that uses a sum over the
rows on the rows again (data centred by its own mean, a softmax over the batch) has no such parts.

`row_pass` goes further: where the body consists of products of data rows with vectors and pointwise work on few numbers
a row, it becomes one kernel, in which a row is read once for its product and for its share of the gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.compile.kernels import RowPass
from gpugrad.compile.program import Constant, Equation, Program, Value, equation, live
from gpugrad.compile.scalar import (
    Expr,
    NotExpressible,
    apply,
    argument,
    cast,
    constant,
    cost,
    evaluate_formula,
    substitute,
)
from gpugrad.op import registry
from gpugrad.ops.shape import axes_of

WIDE_PARAMETER = 16  # numbers of one kind a row, above which a body is blocks of rows and no single kernel
MANY_PRODUCTS = 8  # with one row, above which a matrix product by blocks is the quicker
LONG_PASS = 1000  # cost of the work on a row, likewise

# Ops that work along one or several axes and keep, or drop, those.
_ALONG = frozenset(
    {"softmax", "log_softmax", "cumulative_sum", "flip", "roll", "logsumexp", "max", "min", "prod", "sum"}
)


class NotByRows(Exception):
    """A program is not a sum over rows; the message says what stands in the way."""


@dataclass(eq=False)
class Split:
    """A program in three parts. rows: the length of the first axis of row values in it.

    before: uniform inputs -> uniform values that the others need. body: row inputs, then uniform values -> row
    outputs, then partial sums. after: totals in float64, then uniform values -> the program's outputs that are no rows.
    outputs: for each output of the program "row" or "after" and its place there.
    """

    program: Program
    rows: int
    before: Program
    body: Program
    after: Program
    row_outputs: int
    outputs: list[tuple[str, int]]


def split(program: Program, rows: int, *, wide: bool = False) -> Split:
    """Take a program apart. wide: outputs that are totals stay float64. Raises NotByRows."""
    return _Splitter(program, rows, wide).result()


class _Splitter:
    def __init__(self, program: Program, rows: int, wide: bool) -> None:
        self.program, self.rows, self.wide = program, rows, wide
        self.kind: dict[Value, str] = {}  # "uniform", "row", "turned" (rows on the last axis), "total", "after"
        self.equations: dict[str, list[Equation]] = {"before": [], "body": [], "after": []}
        self.totals: list[tuple[Value, Value]] = []  # as the program has it, as the body gives it
        for value in program.inputs:
            self.kind[value] = self._input_kind(value)
        for eq in program.equations:
            self._add(eq)

    def _input_kind(self, value: Value) -> str:
        if value.ndim and value.shape[0] == self.rows:
            if self.rows in value.shape[1:]:
                raise NotByRows(f"an argument has shape {value.shape}, rows on two axes")
            return "row"
        if self.rows in value.shape:
            raise NotByRows(f"an argument has shape {value.shape}, the number of rows on another axis than the first")
        return "uniform"

    def of(self, value: Value) -> str:
        if value not in self.kind:
            if self.rows in value.shape:
                raise NotByRows(f"a constant has the rows of the data as an axis, shape {value.shape}")
            self.kind[value] = "uniform"
        return self.kind[value]

    def _add(self, eq: Equation) -> None:
        for part in self._turns(eq):
            self._place(part)

    def _turns(self, eq: Equation) -> list[Equation]:
        """Write a reshape between (rows,) and (1, rows) as one to (rows, 1) and a transpose."""
        x, out = eq.inputs[0], eq.outputs[0]
        across, down = (1, self.rows), (self.rows, 1)
        if eq.op.name != "reshape" or x.shape == out.shape or across not in (x.shape, out.shape):
            return [eq]
        first = equation("permute_dims", (x,), down, x.dtype, axes=(1, 0))
        if x.shape != across:
            first = equation("reshape", (x,), down, x.dtype, shape=down)
        name, params = ("permute_dims", {"axes": (1, 0)}) if out.shape == across else ("reshape", eq.params)
        return [first, Equation(registry[name], first.outputs, params, eq.outputs)]

    def _place(self, eq: Equation) -> None:
        kinds = [self.of(v) for v in eq.inputs]
        grows = any(self.rows in v.shape for v in eq.outputs)
        if not {"row", "turned"} & set(kinds) and not grows:
            late = "total" in kinds or "after" in kinds
            self.equations["after" if late else "before"].append(eq)
            self.kind.update(dict.fromkeys(eq.outputs, "after" if late else "uniform"))
            return
        if "total" in kinds or "after" in kinds:
            raise NotByRows(f"{eq.op.name} uses a sum over all rows on each of them again")
        found = self._row_kind(eq, kinds)
        if found != "total":
            for value in eq.outputs:
                if found == "row" and (not value.ndim or value.shape[0] != self.rows or self.rows in value.shape[1:]):
                    raise NotByRows(f"{eq.op.name} moves the rows to shape {value.shape}")
            self.kind.update(dict.fromkeys(eq.outputs, found))
            self.equations["body"].append(eq)
            return
        (out,) = eq.outputs
        partial = Value(out.shape, "float64" if eq.op.name == "sum" else out.dtype)
        self.equations["body"].append(Equation(eq.op, eq.inputs, eq.params, (partial,)))
        self.kind[out] = "total"
        self.totals.append((out, partial))

    def _row_kind(self, eq: Equation, kinds: list[str]) -> str:
        """Return what an equation on rows gives. Raises NotByRows where rows mix."""
        name, params, x = eq.op.name, eq.params, eq.inputs[0]
        out = eq.outputs[0]
        if name == "matmul":
            return self._product_kind(eq, kinds)
        if name == "permute_dims" and x.ndim == 2:
            turned = params["axes"][0] % 2 == 1
            return "turned" if (kinds[0] == "row") == turned else "row"
        if "turned" in kinds:
            beside = [v.ndim < 2 or v.shape[1] == 1 for v, k in zip(eq.inputs, kinds, strict=True) if k == "uniform"]
            if eq.op.pointwise and "row" not in kinds and out.ndim == 2 and all(beside):
                return "turned"
            raise NotByRows(f"{name} of transposed rows")
        if eq.op.pointwise or name in ("astype", "broadcast_to"):
            for value, kind in zip(eq.inputs, kinds, strict=True):
                if kind == "uniform" and value.ndim == out.ndim and value.shape[0] != 1:
                    raise NotByRows(f"{name} of rows with shape {value.shape}")
                if kind == "row" and value.ndim != out.ndim:
                    raise NotByRows(f"{name} moves the rows to another axis")
            return "row"
        if name in _ALONG:
            axes = axes_of(params.get("axis"), x.ndim)
            if 0 not in axes:
                return "row"
            if name == "sum" and x.dtype.kind == "f":
                return "total"
        elif name in ("reshape", "permute_dims"):
            if kinds == ["row"] and (name == "reshape" or params["axes"][0] % x.ndim == 0):
                return "row"
        elif name in ("getitem", "scatter"):
            index = params["index"]
            if isinstance(index, tuple) and index and isinstance(index[0], slice) and index[0] == slice(None):
                return "row"
        elif name == "concat":
            if params["axis"] % out.ndim and "uniform" not in kinds:
                return "row"
        elif (name == "outer" and kinds == ["row", "uniform"]) or (
            name == "vecdot" and kinds == ["row", "row"] and x.ndim > 1
        ):
            return "row"
        raise NotByRows(f"{name} works across rows")

    def _product_kind(self, eq: Equation, kinds: list[str]) -> str:
        x, y = eq.inputs
        first, second = kinds
        floating = eq.outputs[0].dtype.kind == "f"  # totals are added up in float64, which is not exact for integers
        if first == "row" and second == "uniform" and x.ndim > 1 and y.ndim <= 2:
            return "row"
        if first == "row" and second == "row":
            if x.ndim == 1 and y.ndim <= 2 and floating:
                return "total"
            if x.ndim > 2 and x.ndim == y.ndim:
                return "row"
        if first == "turned" and second == "row" and y.ndim <= 2 and floating:
            return "total"
        if first == "uniform" and second == "turned":
            return "turned"
        raise NotByRows(f"matmul of shapes {x.shape} and {y.shape} mixes rows")

    def result(self) -> Split:
        outputs: list[tuple[str, int]] = []
        row_outputs: list[Value] = []
        after_outputs: list[Value] = []
        exact = dict(self.totals)
        # totals reach the rest in the dtype they have in the program; what is itself an output may stay float64
        narrowed: list[Equation] = []
        alias: dict[Value, Value] = {}
        arrived: dict[Value, Value] = {}
        for out, _ in self.totals:
            arrived[out] = Value(out.shape, "float64")
            narrow = equation("astype", (arrived[out],), out.shape, out.dtype, dtype=str(out.dtype))
            narrowed.append(narrow)
            alias[out] = narrow.outputs[0]
        for value in self.program.outputs:
            kind = self.of(value)
            if kind == "turned":
                raise NotByRows("a result has the rows on its last axis")
            if kind == "row":
                outputs.append(("row", len(row_outputs)))
                row_outputs.append(value)
            else:
                outputs.append(("after", len(after_outputs)))
                wide = self.wide and value in arrived
                after_outputs.append(arrived[value] if wide else alias.get(value, value))
        after = [
            Equation(eq.op, tuple(alias.get(v, v) for v in eq.inputs), eq.params, eq.outputs)
            for eq in self.equations["after"]
        ]
        after = live([*narrowed, *after], after_outputs)
        body_outputs = (*row_outputs, *(exact[out] for out, _ in self.totals))
        body = live(self.equations["body"], body_outputs)
        uniform = [v for v in self.program.inputs if self.kind[v] == "uniform"]
        made = {v for eq in self.equations["before"] for v in eq.outputs} | set(uniform)
        read_by_body = _read(body, body_outputs, made)
        read_after = _read(after, after_outputs, made)
        crossing = tuple(dict.fromkeys((*read_by_body, *read_after)))
        before = live(self.equations["before"], crossing)
        row_inputs = tuple(v for v in self.program.inputs if self.kind[v] == "row")
        name = self.program.name
        return Split(
            self.program,
            self.rows,
            Program(tuple(uniform), before, crossing, f"{name}, before the rows"),
            Program((*row_inputs, *crossing), body, body_outputs, f"{name}, a block of rows"),
            Program((*arrived.values(), *crossing), after, tuple(after_outputs), f"{name}, after the rows"),
            len(row_outputs),
            outputs,
        )


def _read(equations: Sequence[Equation], outputs: Sequence[Value], made: set[Value]) -> list[Value]:
    return [v for v in dict.fromkeys((*(v for eq in equations for v in eq.inputs), *outputs)) if v in made]


def resized(program: Program, rows: int, count: int) -> Program:
    """Return a program for another number of rows: every axis of length `rows` becomes `count`."""
    new: dict[Value, Value] = {}

    def of(value: Value) -> Value:
        if isinstance(value, Constant) or (rows not in value.shape and value in new):
            return new.get(value, value)
        if value not in new:
            new[value] = Value(_swapped(value.shape, rows, count), value.dtype, value.weak)
        return new[value]

    inputs = tuple(map(of, program.inputs))
    equations = []
    for eq in program.equations:
        params = eq.params
        if "shape" in params:
            params = {**params, "shape": _swapped(tuple(params["shape"]), rows, count)}
        equations.append(Equation(eq.op, tuple(map(of, eq.inputs)), params, tuple(map(of, eq.outputs))))
    return Program(inputs, equations, tuple(map(of, program.outputs)), program.name)


def _swapped(shape: tuple[int, ...], rows: int, count: int) -> tuple[int, ...]:
    return tuple(count if n == rows else n for n in shape)


# ------------------------------------------------------------------------------------------------ one kernel a row


@dataclass(eq=False)
class PassPlan:
    """A body as one kernel, and where its operands come from.

    matrices, columns, scalars, weights: (body input, index after the rows or into the value) of each operand of the
    kernel. totals: for each partial sum of the body an array of places: ("sum", k), or ("back", k) for a whole vector.
    """

    kernel: RowPass
    matrices: list[Value]
    weights: list[tuple[Value, tuple[int, ...]]]
    columns: list[tuple[Value, tuple[int, ...]]]
    scalars: list[tuple[Value, tuple[int, ...]]]
    totals: list[tuple[str, Any]]


_COLUMN, _SCALAR = 1 << 20, 1 << 21  # input numbers while it is not known how many there are of each


def row_pass(parts: Split) -> PassPlan | None:
    """Return the body as one kernel, None where it is no such body."""
    try:
        return _Scalars(parts).result()
    except (NotByRows, NotExpressible):
        return None


class _Scalars:
    """Follows one row through the body: every value is an object array of expressions, without the rows' axis."""

    def __init__(self, parts: Split) -> None:
        self.parts, self.body, self.rows = parts, parts.body, parts.rows
        self.arrays: dict[Value, Any] = {}
        self.turned: dict[Value, Value] = {}
        self.matrices: list[Value] = []
        self.products: list[tuple[int, Value, tuple[int, ...]]] = []
        self.columns: list[tuple[Value, tuple[int, ...]]] = []
        self.scalars: list[tuple[Value, tuple[int, ...]]] = []
        self.sums: list[Expr] = []
        self.back: list[tuple[int, Expr]] = []
        self.totals: dict[Value, tuple[str, Any]] = {}
        partial = set(self.body.outputs[parts.row_outputs :])
        self.inputs = set(self.body.inputs)
        for eq in self.body.equations:
            if eq.outputs[0] in partial:
                self.totals[eq.outputs[0]] = self._total(eq)
            else:
                self._add(eq)

    # ------------------------------------------------------------------------------------------------- values

    def of(self, value: Value) -> Any:
        """Return a value of one row, or a uniform one, as an object array."""
        found = self.arrays.get(value)
        if found is not None:
            return found
        is_row = self.rows in value.shape
        if isinstance(value, Constant):
            if value.size > WIDE_PARAMETER or backend.is_cuda_array(value.array):
                raise NotByRows("a constant array")
            array = numpy.asarray(value.array)
            items = [constant(x, None if value.weak else value.dtype) for x in array.reshape(-1).tolist()]
            self.arrays[value] = _filled(items, value.shape)
            return self.arrays[value]
        else:
            shape = value.shape[1:] if is_row else value.shape
            if value not in self.inputs or math.prod(shape) > WIDE_PARAMETER:
                raise NotByRows(f"a value of shape {value.shape} in pointwise work")
            where, base = (self.columns, _COLUMN) if is_row else (self.scalars, _SCALAR)
            items = []
            for index in numpy.ndindex(*shape):
                items.append(argument(base + len(where), value.dtype, value.weak))
                where.append((value, index))
        found = _filled(items, value.shape[1:] if is_row else value.shape)
        self.arrays[value] = found
        return found

    def _matrix(self, value: Value) -> int:
        """Return the number of a data matrix."""
        if value not in self.inputs or value.ndim != 2 or value.shape[0] != self.rows:
            raise NotByRows("a product with rows that are computed")
        if not value.shape[1]:
            raise NotByRows("a matrix without columns")
        if value not in self.matrices:
            self.matrices.append(value)
        return self.matrices.index(value)

    def _is_matrix(self, value: Value) -> bool:
        return value in self.inputs and value.ndim == 2 and value not in self.arrays

    # ---------------------------------------------------------------------------------------------- equations

    def _add(self, eq: Equation) -> None:
        (out,), name, params, x = eq.outputs, eq.op.name, eq.params, eq.inputs[0]
        if name == "permute_dims" and x.ndim == 2 and x.shape[0] == self.rows:
            self.turned[out] = x
            return
        if name == "matmul":
            self.arrays[out] = self._product(eq)
            return
        if name == "broadcast_to":
            # a row of an index space that has the rows first; a uniform value may have fewer axes
            self.arrays[out] = numpy.broadcast_to(self._aligned(x, out), out.shape[1:])
            return
        if name == "astype":
            self.arrays[out] = _each(lambda e: cast(e, out.dtype), self.of(x))
            return
        if eq.op.pointwise:
            operands = numpy.broadcast_arrays(*(self._aligned(v, out) for v in eq.inputs))
            result = _each(lambda *e: evaluate_formula(eq.op.forward, e, params), *operands)
            self.arrays[out] = _each(
                lambda e: e if e.dtype == out.dtype and e.weak == out.weak else cast(e, out.dtype), result
            )
            return
        a = self.of(x)
        shape = out.shape[1:]
        if name == "reshape":
            self.arrays[out] = a.reshape(shape)
        elif name == "permute_dims":
            self.arrays[out] = a.transpose([k % x.ndim - 1 for k in params["axes"][1:]])
        elif name == "getitem":
            self.arrays[out] = _object(a[params["index"][1:]])
        elif name == "scatter":
            into = _filled([constant(0, out.dtype)] * math.prod(shape), shape)
            if any(hasattr(part, "dtype") for part in params["index"]):
                raise NotByRows("an index array")
            into[params["index"][1:]] = a
            self.arrays[out] = into
        elif name == "concat":
            self.arrays[out] = numpy.concatenate([self.of(v) for v in eq.inputs], params["axis"] % out.ndim - 1)
        elif name in _REDUCERS:
            axes = tuple(k - 1 for k in axes_of(params["axis"], x.ndim))
            a = _each(lambda e: cast(e, out.dtype), a)  # small integers and booleans are added up in wide ones
            self.arrays[out] = _REDUCERS[name](a, axes).reshape(shape)
        else:
            raise NotByRows(f"{name} in a single row")
        if sum(e.size for e in self.arrays.values()) > 4 * LONG_PASS:
            raise NotByRows("too much work a row for one kernel")

    def _aligned(self, value: Value, out: Value) -> Any:
        a = self.of(value)
        if self.rows in value.shape or value.ndim < out.ndim:
            return a
        if value.shape[0] != 1:
            raise NotByRows("work on transposed rows")
        return a.reshape(a.shape[1:])  # a uniform value with an axis of length 1 where the rows are

    def _product(self, eq: Equation) -> Any:
        x, y = eq.inputs
        (out,) = eq.outputs
        if self._is_matrix(x) and self.rows not in y.shape and y in self.inputs:
            if not x.dtype == y.dtype == out.dtype or out.dtype.kind != "f":
                raise NotByRows("a product of two dtypes")
            m, first = self._matrix(x), len(self.products)
            count = 1 if y.ndim == 1 else y.shape[1]
            if first + count > MANY_PRODUCTS:
                raise NotByRows("a product with a wide matrix")
            for j in range(count):
                self.products.append((m, y, () if y.ndim == 1 else (j,)))
            return _filled([argument(first + j, x.dtype) for j in range(count)], out.shape[1:])
        a, b = self.of(x), self.of(y)
        if a.ndim != 1 or not 0 < a.size * b.size <= 4 * WIDE_PARAMETER:
            raise NotByRows("a product of computed rows")
        table = b if b.ndim == 2 else b[:, None]
        dots = [_sum([apply("mul", u, v) for u, v in zip(a, table[:, j], strict=True)]) for j in range(table.shape[1])]
        return _filled(dots, out.shape[1:])

    def _total(self, eq: Equation) -> tuple[str, Any]:
        """Return where a sum over all rows comes from: arrays of numbers of sums, or vectors gathered back."""
        (out,), x = eq.outputs, eq.inputs[0]
        if eq.op.name == "sum":
            axes = axes_of(eq.params["axis"], x.ndim)
            inner = tuple(k - 1 for k in axes if k)
            reduced = _REDUCERS["sum"](self.of(x), inner) if inner else self.of(x)
            return "sum", self._summed(reduced, out.shape)
        y = eq.inputs[1]
        if x in self.turned and self._is_matrix(self.turned[x]):
            m = self._matrix(self.turned[x])
            rows = self.of(y)
            return "back", self._gathered(m, rows, self.turned[x], out)
        if x.ndim == 1 and self._is_matrix(y):
            return "back", self._gathered(self._matrix(y), self.of(x), y, out)
        a = self.of(self.turned.get(x, x))
        b = self.of(y)
        if a.size * b.size > 2 * WIDE_PARAMETER:
            raise NotByRows("an outer product of computed rows")
        # a 1-d (rows,) has no axis left; (rows, k) has k
        table = (
            _each(lambda u, v: apply("mul", u, v), *numpy.broadcast_arrays(a[..., None], b))
            if a.ndim
            else _each(lambda v: apply("mul", a[()], v), b)
        )
        if b.ndim == 0 and a.ndim:
            table = _each(lambda u: apply("mul", u, b[()]), a)
        return "sum", self._summed(table, out.shape)

    def _summed(self, exprs: Any, shape: tuple[int, ...]) -> Any:
        first = len(self.sums)
        self.sums.extend(exprs.reshape(-1).tolist())
        return numpy.arange(first, len(self.sums)).reshape(shape)

    def _gathered(self, m: int, exprs: Any, matrix: Value, out: Value) -> Any:
        if out.dtype != matrix.dtype or exprs.size > WIDE_PARAMETER:
            raise NotByRows("a gradient of another dtype than the data, or too many columns")
        first = len(self.back)
        for e in exprs.reshape(-1):
            self.back.append((m, cast(e, matrix.dtype)))
        return numpy.arange(first, len(self.back)).reshape(exprs.shape)

    # ------------------------------------------------------------------------------------------------- result

    def result(self) -> PassPlan:
        row_outputs = self.body.outputs[: self.parts.row_outputs]
        stored = []
        for value in row_outputs:
            if value.ndim != 1:
                raise NotByRows("a result of several columns")
            stored.append(cast(self.of(value)[()], value.dtype))
        if not self.matrices:
            raise NotByRows("no product with data")
        roots = [*self.sums, *(e for _, e in self.back), *stored]
        if cost(roots) > LONG_PASS:
            raise NotByRows("too much work a row for one kernel")
        products, columns = len(self.products), len(self.columns)

        def numbered(e: Expr) -> Expr:
            k = e.value
            if k >= _SCALAR:
                k = k - _SCALAR + products + columns
            elif k >= _COLUMN:
                k = k - _COLUMN + products
            return argument(k, e.dtype, e.weak)

        roots = substitute(roots, numbered)
        count, gathered = len(self.sums), len(self.back)
        kernel = RowPass(
            tuple((v.dtype.str, v.shape[1]) for v in self.matrices),
            tuple(m for m, _, _ in self.products),
            tuple(v.dtype.str for v, _ in self.columns),
            tuple(v.dtype.str for v, _ in self.scalars),
            tuple(roots[:count]),
            tuple((m, e) for (m, _), e in zip(self.back, roots[count : count + gathered], strict=True)),
            tuple(roots[count + gathered :]),
        )
        totals = [self.totals[v] for v in self.body.outputs[self.parts.row_outputs :]]
        weights = [(v, index) for _, v, index in self.products]
        return PassPlan(kernel, self.matrices, weights, self.columns, self.scalars, totals)


def _filled(items: Sequence[Expr], shape: tuple[int, ...]) -> Any:
    out = numpy.empty(len(items), object)
    out[:] = items
    return out.reshape(shape)


def _object(value: Any) -> Any:
    if isinstance(value, Expr):
        return _filled([value], ())
    return value


def _each(function: Callable[..., Expr], *arrays: Any) -> Any:
    """Apply a function to the elements of object arrays of one shape."""
    shape = arrays[0].shape
    return _filled([function(*items) for items in zip(*(a.reshape(-1) for a in arrays), strict=True)], shape)


def _sum(items: Sequence[Expr]) -> Expr:
    total = items[0]
    for item in items[1:]:
        total = apply("add", total, item)
    return total


def _fold(fn: str) -> Callable[[Any, tuple[int, ...]], Any]:
    def reduce(a: Any, axes: tuple[int, ...]) -> Any:
        kept = tuple(k for k in range(a.ndim) if k not in axes)
        moved = a.transpose((*kept, *axes))
        shape = tuple(a.shape[k] for k in kept)
        flat = moved.reshape((math.prod(shape), -1))
        if not flat.shape[1]:
            raise NotByRows("a reduction of nothing")
        folded = []
        for items in flat:
            total = items[0]
            for item in items[1:]:
                total = apply(fn, total, item)
            folded.append(total)
        return _filled(folded, shape)

    return reduce


def _logsumexp(a: Any, axes: tuple[int, ...]) -> Any:
    top = _fold("maximum")(a, axes)
    top = _each(lambda t: apply("where", apply("isfinite", t), t, 0), top)
    back = numpy.broadcast_to(_kept(top, a, axes), a.shape)
    total = _fold("add")(_each(lambda x, t: apply("exp", apply("sub", x, t)), a, back), axes)
    return _each(lambda s, t: apply("add", apply("log", s), t), total, top)


def _kept(reduced: Any, a: Any, axes: tuple[int, ...]) -> Any:
    return reduced.reshape(tuple(1 if k in axes else n for k, n in enumerate(a.shape)))


def _softmax(a: Any, axes: tuple[int, ...]) -> Any:
    top = numpy.broadcast_to(_kept(_fold("maximum")(a, axes), a, axes), a.shape)
    e = _each(lambda x, t: apply("exp", apply("sub", x, t)), a, top)
    total = numpy.broadcast_to(_kept(_fold("add")(e, axes), a, axes), a.shape)
    return _each(lambda x, s: apply("div", x, s), e, total)


def _log_softmax(a: Any, axes: tuple[int, ...]) -> Any:
    top = numpy.broadcast_to(_kept(_fold("maximum")(a, axes), a, axes), a.shape)
    shifted = _each(lambda x, t: apply("sub", x, t), a, top)
    total = _fold("add")(_each(lambda x: apply("exp", x), shifted), axes)
    logs = numpy.broadcast_to(_kept(_each(lambda s: apply("log", s), total), a, axes), a.shape)
    return _each(lambda x, s: apply("sub", x, s), shifted, logs)


_REDUCERS: dict[str, Callable[[Any, tuple[int, ...]], Any]] = {
    "sum": _fold("add"),
    "prod": _fold("mul"),
    "max": _fold("maximum"),
    "min": _fold("minimum"),
    "logsumexp": _logsumexp,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
}
