"""Fused kernels on the CPU: `loop` and `row_pass` return functions that run one, over threads where that pays.

Work is cut into stripes by its size alone. Threads take stripes as they come free, each stripe has sums of its own, and
these are added in the order of the stripes: the same operands give the same bits, whatever the number of threads.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from gpugrad.compile import cpu_build, cpu_kernels
from gpugrad.compile.cpu_build import available, compiling
from gpugrad.compile.cpu_ir import Unsupported
from gpugrad.compile.kernels import Loop, RowPass
from gpugrad.compile.scalar import cast
from gpugrad.threads import pool

__all__ = ["available", "compiling", "loop", "row_pass"]

STRIPE_BYTES = 512 << 10  # of operands: about 30 us of one core's share of the memory
MOST_STRIPES = 64
PARTIAL_BYTES = 32 << 20  # sums of all stripes together
_NOTHING = numpy.zeros(0)
_NO_ROWS = numpy.zeros((0, 0))


def _share(work: Callable[[int], Any], stripes: int, threads: int) -> None:
    """Call work(0), ..., work(stripes - 1), the calling thread among those who do."""
    threads = min(threads, stripes)
    if threads <= 1:
        for s in range(stripes):
            work(s)
        return
    ticket = itertools.count()  # its next() is atomic

    def take() -> None:
        for s in ticket:
            if s >= stripes:
                return
            work(s)

    executor = pool(threads)
    helpers = [executor.submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        for helper in helpers:
            if not helper.cancel():  # not begun, as where all threads are busy: nothing is left for it to do
                helper.result()


def _added(partials: Any) -> Any:
    """Add up the sums of all stripes, in their order."""
    with numpy.errstate(all="ignore"):  # infinities of both signs
        return partials.sum(axis=0)


def _stripes(size: int) -> int:
    return max(1, min(MOST_STRIPES, size // STRIPE_BYTES))


# ---------------------------------------------------------------------------------------------------------- RowPass


def row_pass(kernel: RowPass) -> Callable[..., tuple[list[float], list[Any]]] | None:
    """Return a function that runs a RowPass; None if it holds what the CPU's code cannot do, such as float16.

    run(matrices, weights, columns, scalars, outputs, threads) -> (sums, back): arrays of the kernel's dtypes, matrices
    (rows, columns) with their columns next to each other, weights (columns,), columns and outputs (rows,) at any
    distance, 0 included; scalars numbers or 0-d arrays. Outputs are written; sums are floats, back float64 vectors.
    Dtypes and shapes are the caller's to see to: they are not checked.
    """
    try:
        build = functools.partial(cpu_kernels.row_pass_text, kernel, register=cpu_build.register())
        entry = cpu_build.build(kernel.key(), build)
    except Unsupported:
        return None
    count = len(kernel.sums)
    ends = list(
        itertools.accumulate((cpu_kernels.padded(kernel.matrices[m][1]) for m, _ in kernel.back), initial=count)
    )
    parts = [(start, start + kernel.matrices[m][1]) for start, (m, _) in zip(ends, kernel.back, strict=False)]
    width = ends[-1]
    row_bytes = sum(numpy.dtype(d).itemsize * n for d, n in kernel.matrices) + sum(
        numpy.dtype(d).itemsize for d in kernel.columns
    )

    def run(
        matrices: Sequence[Any],
        weights: Sequence[Any],
        columns: Sequence[Any],
        scalars: Sequence[Any],
        outputs: Sequence[Any],
        threads: int,
    ) -> tuple[list[float], list[Any]]:
        rows = len((matrices or columns)[0])
        if any(w.strides[0] != w.itemsize for w in weights):
            weights = [numpy.ascontiguousarray(w) for w in weights]
        operands = (*matrices, *weights, *columns, *scalars, *outputs)
        stripes = min(_stripes(rows * row_bytes), max(1, PARTIAL_BYTES // (8 * width + 1)), max(rows, 1))
        partials = numpy.zeros((stripes, width))
        if stripes == 1:
            entry(0, rows, *operands, partials[0])
            total = partials[0]
        else:
            _share(
                lambda s: entry(rows * s // stripes, rows * (s + 1) // stripes, *operands, partials[s]),
                stripes,
                threads,
            )
            total = _added(partials)
        return total[:count].tolist(), [total[start:stop] for start, stop in parts]

    return run


# ------------------------------------------------------------------------------------------------------------- Loop


def loop(kernel: Loop) -> Callable[..., list[Any]] | None:
    """Return a function that runs a Loop; None if it holds what the CPU's code cannot do, such as float16.

    run(inputs, outputs, threads, rows, columns) -> sums: "full" inputs and outputs (rows, columns), a row without gaps,
    "row" (columns,), without gaps, "column" (rows,), all of the kernel's dtypes; "scalar" numbers or 0-d arrays.
    An output may be an input's own memory, but not overlap it otherwise. Sums are float64: a float, (columns,) or
    (rows,) for "all", "rows" and "columns". Dtypes and shapes are the caller's to see to: they are not checked.
    """
    try:
        cpu_kernels.check(kernel)
    except Unsupported:
        return None
    return _Loop(kernel)


class _Loop:
    """A Loop and the machine code for numbers of columns that it has met."""

    def __init__(self, kernel: Loop) -> None:
        self._kernel = kernel
        self._lanes = cpu_kernels.loop_lanes(kernel, cpu_build.register())
        self._entries: dict[tuple[int, bool], Callable[..., Any]] = {}
        overs = [over for _, over in kernel.sums]
        self._overs = overs
        self._everything = overs.count("all")
        self._down = overs.count("rows")
        self._room = cpu_kernels.loop_room(kernel, 1) - self._everything
        self._across = overs.count("columns")
        layouts = [layout for layout, _ in kernel.inputs]
        self._full = [k for k, layout in enumerate(layouts) if layout == "full"]
        self._flat = not self._down and not self._across and all(layout in ("full", "scalar") for layout in layouts)
        self._bytes = sum(numpy.dtype(kernel.inputs[k][1]).itemsize for k in self._full) + sum(
            e.dtype.itemsize for e in kernel.outputs
        )

    def _entry(self, lanes: int, narrow: bool) -> Callable[..., Any]:
        entry = self._entries.get((lanes, narrow))
        if entry is None:
            text = functools.partial(
                cpu_kernels.loop_text, self._kernel, register=cpu_build.register(), lanes=lanes, narrow=narrow
            )
            entry = self._entries[lanes, narrow] = cpu_build.build((*self._kernel.key(), lanes, narrow), text)
        return entry

    @functools.cached_property
    def _of_one_column(self) -> tuple["_Loop", list[int]]:
        """The same work where there is one column, laid out along a row."""
        kernel = self._kernel
        layouts: Any = {"full": "full", "column": "full", "row": "scalar", "scalar": "scalar"}
        inputs = tuple((layouts[layout], dtype) for layout, dtype in kernel.inputs)
        across = tuple(cast(e, numpy.dtype(numpy.float64)) for e, over in kernel.sums if over == "columns")
        sums: Any = tuple((e, "all") for e, over in kernel.sums if over != "columns")
        return _Loop(Loop(inputs, (*kernel.outputs, *across), sums)), [
            k for k, (to, _) in enumerate(inputs) if to == "full"
        ]

    def _run_one_column(self, inputs: Sequence[Any], outputs: Sequence[Any], threads: int, rows: int) -> list[Any]:
        """Run as one long row; outputs have no gaps."""
        turned, full = self._of_one_column
        inputs = [
            numpy.ascontiguousarray(x).reshape(1, rows) if k in full else x if numpy.ndim(x) == 0 else x[0]
            for k, x in enumerate(inputs)
        ]
        across = [numpy.empty((1, rows)) for _ in range(self._across)]
        rest = iter(turned(inputs, [*(y.reshape(1, rows) for y in outputs), *across], threads, 1, rows))
        per_row = iter(across)
        return [
            next(per_row)[0] if over == "columns" else next(rest) if over == "all" else numpy.array([next(rest)])
            for over in self._overs
        ]

    def __call__(
        self, inputs: Sequence[Any], outputs: Sequence[Any], threads: int, rows: int, columns: int
    ) -> list[Any]:
        lanes = self._lanes
        narrow = columns <= lanes and rows > 1 and not (self._flat and self._dense(inputs, outputs))
        if narrow:
            if columns == 1 and all(y.strides[0] == y.itemsize for y in outputs):
                return self._run_one_column(inputs, outputs, threads, rows)
            while lanes > 4 and columns <= lanes // 2:
                lanes //= 2
        entry = self._entries.get((lanes, narrow)) or self._entry(lanes, narrow)
        size = rows * columns * self._bytes
        if not self._overs:
            if size < 2 * STRIPE_BYTES or threads == 1:
                entry(0, rows, 0, columns, columns, *inputs, *outputs, _NOTHING, _NO_ROWS)
            else:
                self._striped(entry, inputs, outputs, threads, rows, columns, _stripes(size), None, _NO_ROWS)
            return []
        width = self._everything + self._room * columns
        per_row = numpy.empty((self._across, rows)) if self._across else _NO_ROWS
        stripes = min(_stripes(size), max(1, PARTIAL_BYTES // (8 * width + 1)))
        if self._across:
            stripes = min(stripes, max(rows, 1))
        if stripes == 1:
            total = numpy.zeros(width)
            entry(0, rows, 0, columns, columns, *inputs, *outputs, total, per_row)
        else:
            partials = numpy.zeros((stripes, width))
            self._striped(entry, inputs, outputs, threads, rows, columns, stripes, partials, per_row)
            total = _added(partials)
        return self._sums(total, per_row, columns)

    def _dense(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> bool:
        """Tell whether no operand has gaps between rows."""
        return all(inputs[k].flags.c_contiguous for k in self._full) and all(y.flags.c_contiguous for y in outputs)

    def _striped(
        self,
        entry: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        threads: int,
        rows: int,
        columns: int,
        stripes: int,
        partials: Any,
        per_row: Any,
    ) -> None:
        operands = (*inputs, *outputs)

        def work(s: int) -> None:
            partial = _NOTHING if partials is None else partials[s]
            if rows >= stripes or self._across:
                entry(rows * s // stripes, rows * (s + 1) // stripes, 0, columns, columns, *operands, partial, per_row)
            else:
                start, stop = (columns * k // stripes // 64 * 64 if k < stripes else columns for k in (s, s + 1))
                entry(0, rows, start, stop, columns, *operands, partial, per_row)

        _share(work, stripes, threads)

    def _sums(self, total: Any, per_row: Any, columns: int) -> list[Any]:
        out: list[Any] = []
        everything = across = 0
        down = self._everything
        for over in self._overs:
            if over == "all":
                out.append(float(total[everything]))
                everything += 1
            elif over == "rows":
                out.append(total[down : down + columns])
                down += columns
            else:
                out.append(per_row[across])
                across += 1
        return out
