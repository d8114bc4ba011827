"""Fusion: from a program to few steps, each a kernel, a call of an op as it is, or a view.

A pointwise value is not computed where the program computes it. It is kept as a scalar expression over values that
exist (`Fuser.expr`), and so are casts, broadcasts and reshapes of it. Only what an op that is not pointwise needs, or
the caller, becomes an array: it joins an open `Loop` over the same index space, as a sum over that space does, and the
loop is closed when one of its results is needed. A value that two loops need is computed twice rather than stored,
unless its expression has grown long.

    h = X @ w; r = h - y; loss = sum(r**2); g = (2*r) @ X      X @ w
                                                               loop: r2 = 2*(h - y), loss += (h - y)**2
                                                               r2 @ X
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from gpugrad.compile.kernels import Layout, Loop, Over
from gpugrad.compile.program import Constant, Equation, Program, Value, equation
from gpugrad.compile.scalar import (
    Expr,
    NotExpressible,
    argument,
    cast,
    constant,
    cost,
    evaluate_formula,
    in_order,
    substitute,
)
from gpugrad.op import registry
from gpugrad.ops.shape import axes_of

LONG = 200  # cost of an expression, above which it is stored and not computed again
LARGE = 500  # cost of a loop that takes no more work
VIEWS = frozenset({"reshape", "permute_dims", "broadcast_to", "getitem", "flip", "diagonal"})


@dataclass(eq=False)
class Kernel:
    """A step that runs a fused loop over rows x columns elements; inputs as `layouts` of the loop has them."""

    loop: Loop
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    sums: tuple[Value, ...]
    rows: int
    columns: int


@dataclass(eq=False)
class Call:
    """A step that runs an op by its own formula."""

    equation: Equation

    @property
    def inputs(self) -> tuple[Value, ...]:
        return self.equation.inputs

    @property
    def outputs(self) -> tuple[Value, ...]:
        return self.equation.outputs


@dataclass(eq=False)
class View(Call):
    """A step that gives another view of an array, and copies at most where strides cannot say it."""


Step = Kernel | Call


def work(steps: Sequence[Step]) -> int:
    """Return the cost of all loops of a program: how much code there is to compile."""
    loops = {s.loop.key(): s.loop for s in steps if isinstance(s, Kernel)}
    return sum(cost((*loop.outputs, *(e for e, _ in loop.sums))) for loop in loops.values())


@dataclass(eq=False)
class _Sum:
    value: Value
    expr: Expr
    reduced: tuple[bool, ...]


@dataclass(eq=False)
class _Group:
    """A loop that still takes more work: over the elements of `shape`."""

    shape: tuple[int, ...]
    outputs: list[tuple[Value, Expr]] = field(default_factory=list)
    sums: list[_Sum] = field(default_factory=list)


class Fuser:
    """Turns a program into `steps`, in order, after which all its outputs exist.

    long: cost of an expression, above which it is stored; small where computing it twice is what costs.
    """

    def __init__(self, program: Program, long: int = LONG) -> None:
        self.program = program
        self.long = long
        self.steps: list[Step] = []
        self.expr: dict[Value, Expr] = {}
        self.leaves: list[Value] = []
        self.slots: dict[Value, Expr] = {}
        self.ready: set[Value] = set(program.inputs)
        self.views: dict[tuple[Value, tuple[int, ...]], Value] = {}
        self.pending: dict[Value, _Group] = {}
        self.open: list[_Group] = []
        for eq in program.equations:
            self._add(eq)
        for value in program.outputs:  # results over the same elements are one loop
            if value not in self.ready and value not in self.pending and not isinstance(value, Constant):
                self._join(value.shape, (value, self.expr[value]))
        while self.open:
            self._close(self.open[0])

    # ------------------------------------------------------------------------------------------- expressions

    def _leaf(self, value: Value) -> Expr:
        """Return the expression for a value that is, or will be, an array."""
        found = self.slots.get(value)
        if found is None:
            found = self.slots[value] = argument(len(self.leaves), value.dtype, value.weak)
            self.leaves.append(value)
        return found

    def of(self, value: Value) -> Expr:
        """Return a value as an expression."""
        found = self.expr.get(value)
        if found is None:
            if isinstance(value, Constant) and value.size == 1 and not _on_device(value.array):
                array = value.array
                found = constant(array) if value.weak else constant(array.reshape(()), value.dtype)
            else:
                found = self._leaf(value)
            self.expr[value] = found
        return found

    def _pointwise(self, eq: Equation) -> Expr | None:
        """Return the result of an equation as an expression, None if it has none."""
        (out,), name = eq.outputs[:1], eq.op.name
        try:
            if name in ("astype", "broadcast_to"):
                return cast(self.of(eq.inputs[0]), out.dtype)
            if name == "reshape":
                return self._reshaped(eq)
            if name == "to_device" or not eq.op.pointwise:
                return None
            e = evaluate_formula(eq.op.forward, [self.of(v) for v in eq.inputs], eq.params)
            return e if e.dtype == out.dtype and e.weak == out.weak else cast(e, out.dtype)
        except NotExpressible:
            return None

    def _reshaped(self, eq: Equation) -> Expr | None:
        """Push a reshape down to what an expression is made of; None where an element would change its neighbours."""
        (x,), (out,) = eq.inputs, eq.outputs
        return self._carried(self.of(x), x.shape, out.shape)

    def _carried(self, e: Expr, before: tuple[int, ...], after: tuple[int, ...]) -> Expr | None:
        inputs = [i for i in in_order([e]) if i.fn == "input"]
        views: dict[int, Expr] = {}
        steps: list[View] = []
        for i in inputs:
            leaf = self.leaves[i.value]
            shape = _carried(leaf.shape, before, after)
            if shape is None:
                return None
            if shape == leaf.shape:
                continue
            view = self.views.get((leaf, shape))
            if view is None:
                step = View(equation("reshape", (leaf,), shape, leaf.dtype, shape=shape))
                view = self.views[leaf, shape] = step.outputs[0]
                steps.append(step)
            views[i.value] = self._leaf(view)
        for step in steps:
            self._demand(step.inputs[0])
            self.steps.append(step)
            self.ready.add(step.outputs[0])
        return substitute([e], lambda i: views.get(i.value, i))[0]

    # ------------------------------------------------------------------------------------------------- steps

    def _add(self, eq: Equation) -> None:
        found = self._pointwise(eq)
        if found is not None:
            out = eq.outputs[0]
            self.expr[out] = found
            if cost([found]) > self.long:
                self._demand(out)
            return
        if eq.op.name == "sum" and self._sum(eq):
            return
        for value in eq.inputs:
            self._demand(value)
        self.steps.append((View if eq.op.name in VIEWS and _is_view(eq) else Call)(eq))
        self.ready.update(eq.outputs)

    def _sum(self, eq: Equation) -> bool:
        """Let a sum join a loop. Tell whether it could."""
        (x,), (out,) = eq.inputs, eq.outputs
        if x.dtype.kind != "f" or not x.ndim:
            return False
        axes = axes_of(eq.params["axis"], x.ndim)
        total = _Sum(out, self.of(x), tuple(i in axes for i in range(x.ndim)))
        if _collapsed(x.shape, self._shapes([total.expr]), [total.reduced]) is None:
            return False
        self._join(x.shape, total)
        return True

    def _demand(self, value: Value) -> None:
        """See to it that a value is an array."""
        if value in self.ready or (isinstance(value, Constant) and value not in self.expr):
            self.ready.add(value)
            return
        if isinstance(value, Constant):
            return
        group = self.pending.get(value)
        if group is None and self._is_another(value):
            return
        if group is None:
            group = self._join(value.shape, (value, self.expr[value]))
        self._close(group)

    def _is_another(self, value: Value) -> bool:
        """Make a value a view where it is, element by element, what another is: nothing is to be computed."""
        e = self.expr[value]
        if e.fn != "input":
            return False
        leaf = self.leaves[e.value]
        if leaf is value or leaf.size != value.size or leaf.dtype != value.dtype or leaf.weak or value.weak:
            return False
        self._demand(leaf)
        self.steps.append(View(Equation(registry["reshape"], (leaf,), {"shape": value.shape}, (value,))))
        self.ready.add(value)
        return True

    def _join(self, shape: tuple[int, ...], root: "_Sum | tuple[Value, Expr]") -> _Group:
        """Put a result into an open loop over the same elements, or into a new one."""
        shape, root = self._squeezed(shape, root)
        value, e = (root.value, root.expr) if isinstance(root, _Sum) else root
        for i in in_order([e]):
            if i.fn == "input":
                leaf = self.leaves[i.value]
                if leaf in self.pending:
                    self._close(self.pending[leaf])
                elif leaf not in self.ready:
                    self._demand(leaf)
        group = next((g for g in self.open if g.shape == shape and self._fits(g, root)), None)
        if group is None:
            group = _Group(shape)
            self.open.append(group)
        if isinstance(root, _Sum):
            group.sums.append(root)
        else:
            group.outputs.append(root)
        self.pending[value] = group
        self.expr[value] = self._leaf(value)
        return group

    def _squeezed(self, shape: tuple[int, ...], root: "_Sum | tuple[Value, Expr]") -> Any:
        """Write work over (rows, 1) elements as work over (rows,), so that it can join a loop over those."""
        short = tuple(n for n in shape if n != 1)
        e = self._carried(root.expr if isinstance(root, _Sum) else root[1], shape, short)
        assert e is not None  # axes of length 1 can always be left out
        if isinstance(root, _Sum):
            return short, _Sum(root.value, e, tuple(r for r, n in zip(root.reduced, shape, strict=True) if n != 1))
        return short, (root[0], e)

    def _fits(self, group: _Group, root: "_Sum | tuple[Value, Expr]") -> bool:
        sums = [*group.sums, *([root] if isinstance(root, _Sum) else [])]
        exprs = [e for _, e in group.outputs] + [s.expr for s in sums]
        exprs += [] if isinstance(root, _Sum) else [root[1]]
        if (group.outputs or group.sums) and cost(exprs) > LARGE:
            return False
        return _collapsed(group.shape, self._shapes(exprs), [s.reduced for s in sums]) is not None

    def _shapes(self, exprs: Sequence[Expr]) -> list[tuple[int, ...]]:
        return [self.leaves[i.value].shape for i in in_order(exprs) if i.fn == "input"]

    def _close(self, group: _Group) -> None:
        """Make a kernel of a loop that takes no more work."""
        self.open.remove(group)
        roots = [*(e for _, e in group.outputs), *(s.expr for s in group.sums)]
        leaves = [self.leaves[i.value] for i in in_order(roots) if i.fn == "input"]
        shapes = [v.shape for v in leaves]
        found = _collapsed(group.shape, shapes, [s.reduced for s in group.sums])
        if found is None:  # only for outputs: a sum looks first
            leaves_before = leaves
            leaves = [self._spread(v, group.shape) for v in leaves]
            found = _collapsed(group.shape, [v.shape for v in leaves], [])
            assert found is not None
            renamed = {self.slots[b].value: v for b, v in zip(leaves_before, leaves, strict=True)}
        else:
            renamed = {self.slots[v].value: v for v in leaves}
        rows, columns, layouts, overs = found
        distinct = list(dict.fromkeys(leaves))
        layout_of = dict(zip(leaves, layouts, strict=True))
        place = {v: argument(k, v.dtype, v.weak) for k, v in enumerate(distinct)}
        roots = substitute(roots, lambda i: place[renamed[i.value]])
        count = len(group.outputs)
        loop = Loop(
            tuple((layout_of[v], v.dtype.str) for v in distinct),
            tuple(roots[:count]),
            tuple(zip(roots[count:], overs, strict=True)),
        )
        outputs, sums = tuple(v for v, _ in group.outputs), tuple(s.value for s in group.sums)
        self.steps.append(Kernel(loop, tuple(distinct), outputs, sums, rows, columns))
        for value in (*outputs, *sums):
            del self.pending[value]
            self.ready.add(value)

    def _spread(self, value: Value, shape: tuple[int, ...]) -> Value:
        """Return a value with all its axes there, as a copy, where a loop over rows and columns could not index it."""
        shape = (1,) * (value.ndim - len(shape)) + shape
        if value.size == 1 or value.shape == shape:
            return value
        eq = equation("broadcast_to", (value,), shape, value.dtype, shape=shape)
        self.steps.append(Call(eq))
        self._leaf(eq.outputs[0])
        self.ready.add(eq.outputs[0])
        return eq.outputs[0]


def _on_device(array: Any) -> bool:
    return hasattr(array, "dtype") and not isinstance(array, (numpy.ndarray, numpy.generic))


def _is_view(eq: Equation) -> bool:
    """Tell whether an op gives a view: indexing by arrays does not."""
    index = eq.params.get("index", ())
    return not any(hasattr(part, "dtype") for part in (index if isinstance(index, tuple) else (index,)))


def _carried(leaf: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of an operand that broadcasts to `after` as it did to `before`; None if elements would move."""
    if math.prod(leaf) == 1:
        return ()
    short = _without_leading(leaf)
    padded = (1,) * (len(before) - len(short)) + short
    if padded == before:
        carried = after
    elif [n for n in before if n != 1] == [n for n in after if n != 1]:
        lengths = iter(p for p, n in zip(padded, before, strict=True) if n != 1)
        carried = tuple(1 if n == 1 else next(lengths) for n in after)
    else:
        return None
    return leaf if _without_leading(carried) == short else carried


def _without_leading(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without axes of length 1 in front, which broadcasting adds by itself."""
    first = next((k for k, n in enumerate(shape) if n != 1), len(shape))
    return shape[first:]


def _collapsed(
    shape: tuple[int, ...], operands: Sequence[tuple[int, ...]], reductions: Sequence[tuple[bool, ...]]
) -> tuple[int, int, list[Layout], list[Over]] | None:
    """Write an index space as rows x columns: axes along which all operands and sums behave alike become one.

    Returns rows, columns, the layout of each operand and over what each sum goes; None where two axes are not enough.
    """
    short = map(_without_leading, operands)
    padded = [(1,) * (len(shape) - len(o)) + o for o in short]
    merged: list[tuple[int, tuple[bool, ...], tuple[bool, ...]]] = []
    for axis, n in enumerate(shape):
        if n == 1:
            continue
        varies = tuple(o[axis] != 1 for o in padded)
        reduced = tuple(r[axis] for r in reductions)
        if merged and merged[-1][1:] == (varies, reduced):
            merged[-1] = (merged[-1][0] * n, varies, reduced)
        else:
            merged.append((n, varies, reduced))
    if len(merged) > 2:
        return None
    if len(merged) < 2:
        n, varies, reduced = merged[0] if merged else (1, (False,) * len(operands), (True,) * len(reductions))
        if not all(reduced):  # neither over rows nor columns of a single row: left to the op itself
            return None
        return 1, n, ["full" if v else "scalar" for v in varies], ["all"] * len(reductions)
    (rows, by_row, over_rows), (columns, by_column, over_columns) = merged
    layouts: list[Layout] = [
        "full" if r and c else "column" if r else "row" if c else "scalar"
        for r, c in zip(by_row, by_column, strict=True)
    ]
    overs: list[Over] = []
    for r, c in zip(over_rows, over_columns, strict=True):
        if not r and not c:
            return None
        overs.append("all" if r and c else "rows" if r else "columns")
    return rows, columns, layouts, overs
