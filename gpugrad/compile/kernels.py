"""The two kinds of fused kernel, as data: what `fuse` makes and the executors generate code from.

    Loop        pointwise work over a (rows, columns) index space, and sums of its results
    RowPass     one pass over the rows of data matrices: products with parameters, pointwise work, sums over rows

Both are made of scalar expressions (`gpugrad.compile.scalar`) whose inputs are numbered. They hold dtypes and layouts
but no lengths, except the number of columns of a matrix, so that one kernel serves every number of rows. They are
hashable: equal kernels are compiled once.
"""

from dataclasses import dataclass
from typing import Any, Literal

from gpugrad.compile.scalar import Expr, in_order

# How an operand of a Loop varies over (rows, columns).
Layout = Literal["full", "row", "column", "scalar"]
# Over what a Loop adds up: everything -> (), the rows -> (columns,), the columns -> (rows,).
Over = Literal["all", "rows", "columns"]


def signature(roots: tuple[Expr, ...]) -> tuple[Any, ...]:
    """Return expressions as nested plain data: equal for equal expressions, in any process."""
    place: dict[int, int] = {}
    rows: list[Any] = []
    for e in in_order(roots):
        value = e.value.item() if e.fn == "const" else e.value
        if value != value:
            value = "nan"
        place[id(e)] = len(rows)
        rows.append((e.fn, e.dtype.str, e.weak, repr(value), tuple(place[id(a)] for a in e.args)))
    return (*rows, tuple(place[id(e)] for e in roots))


@dataclass(frozen=True)
class Loop:
    """Pointwise work over (rows, columns), inputs in C order along columns.

    inputs: layout and dtype of each; input k is the expression ``argument(k, dtype)``. A "full" or "column" operand
    has any distance between rows; its columns are next to each other. outputs: expressions stored to full arrays of
    their dtype. sums: expressions added up, in float64 for float32 and float64; the result has their dtype.
    """

    inputs: tuple[tuple[Layout, str], ...]
    outputs: tuple[Expr, ...]
    sums: tuple[tuple[Expr, Over], ...] = ()

    def key(self) -> tuple[Any, ...]:
        """What tells this kernel from others, in any process."""
        overs = tuple(over for _, over in self.sums)
        return ("Loop", self.inputs, len(self.outputs), overs, signature((*self.outputs, *(e for e, _ in self.sums))))


@dataclass(frozen=True)
class RowPass:
    """One pass over rows: products of data rows with parameters, pointwise work on them, sums over rows.

        z[j] = matrix[m_j][i, :] . weight[j]            for every product j
        outputs[i] = expression(z, columns[i], scalars)
        sums      += expression(z, columns[i], scalars)            in float64
        back[k]   += expression(z, columns[i], scalars) * matrix[m_k][i, :]

    matrices: dtype and number of columns of each data matrix, (rows, columns), columns next to each other, rows at any
    distance. products: the matrix of each; its weight is a vector (columns,) of the matrix's dtype. columns: dtypes of
    arrays (rows,). scalars: dtypes of numbers that are the same for all rows. Inputs of the expressions are numbered
    products first, then columns, then scalars. back: (matrix, expression), each giving a vector of the matrix's
    columns. outputs: stored for each row.
    """

    matrices: tuple[tuple[str, int], ...]
    products: tuple[int, ...]
    columns: tuple[str, ...]
    scalars: tuple[str, ...]
    sums: tuple[Expr, ...]
    back: tuple[tuple[int, Expr], ...]
    outputs: tuple[Expr, ...] = ()

    def key(self) -> tuple[Any, ...]:
        """What tells this kernel from others, in any process."""
        roots = (*self.sums, *(e for _, e in self.back), *self.outputs)
        shape = (self.matrices, self.products, self.columns, self.scalars)
        counts = (len(self.sums), tuple(m for m, _ in self.back), len(self.outputs))
        return ("RowPass", *shape, *counts, signature(roots))
