"""The CPU executor of programs over rows (`rows.Split`): one kernel a row, or blocks of rows through the whole body.

Rows are dealt out in stripes whose number does not depend on the threads; a stripe adds its blocks in order in float64,
and stripes are added in order, so that the result does not depend on which thread did what.
"""

import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from gpugrad import threads as _threads
from gpugrad.compile import cpu_code
from gpugrad.compile.cpu import Instance, Outputs, fused, has_compiler
from gpugrad.compile.fuse import Step, work
from gpugrad.compile.plan import Plan, plan
from gpugrad.compile.program import Program, Value
from gpugrad.compile.rows import PassPlan, Split, resized, row_pass
from gpugrad.compile.text import pass_lines, step_lines

Array = numpy.ndarray[Any, Any]
OPERAND_BYTES = 2 << 20  # the widest intermediate of a block: the second-level cache
BUFFER_BYTES = 20 << 20  # all buffers of a block, a thread
DATA_BYTES = 8 << 20  # data of a block
STRIPES = 16
PROBE_ROWS = 1 << 10  # of a block that is looked at to choose the size of the others
STRIPE_BYTES = 32 << 20  # float64 sums of all stripes


class _Fixed:
    """Steps for one number of rows: fused once, bound as often as threads ask."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps: list[Step] = fused(program)
        self.plan: Plan = plan(self.steps, program.inputs, program.outputs)
        self.idle: list[Instance] = []

    def instance(self, memory: Outputs) -> Instance:
        try:
            return self.idle.pop()
        except IndexError:
            return Instance(self.steps, self.program.inputs, self.program.outputs, 1, memory, the_plan=self.plan)


class RowProgram:
    """Runs a split program: ``run(arrays, rows, threads) -> outputs``, for any number of rows, by several callers."""

    def __init__(self, parts: Split) -> None:
        self.parts = parts
        self.before = _Fixed(parts.before) if parts.before.equations else None
        self.after = _Fixed(parts.after)
        self.memory = Outputs()
        self.small = Outputs()
        self.pass_plan: PassPlan | None = row_pass(parts)
        self.kernel: Callable[..., Any] | None = None
        if self.pass_plan is not None:
            self.kernel = _compiled(self.pass_plan)
        self.fresh = True
        self.fixed: dict[int, _Fixed] = {}
        self.lock = threading.Lock()
        self._block_rows = 0
        body = parts.body.outputs
        self.row_values, self.partials = body[: parts.row_outputs], body[parts.row_outputs :]

    def run(self, arrays: Sequence[Array], rows: int, threads: int, block_rows: int | None = None) -> list[Array]:
        """Return the outputs. arrays: the program's inputs, of which row inputs have `rows` rows."""
        if self.fresh:  # its loops compile when they first run
            self.fresh = False
            with cpu_code.compiling():
                return self.run(arrays, rows, threads, block_rows)
        program = self.parts.program
        data = [a for a, v in zip(arrays, program.inputs, strict=True) if self._is_row(v)]
        uniform = [a for a, v in zip(arrays, program.inputs, strict=True) if not self._is_row(v)]
        crossing = self._run(self.before, uniform) if self.before is not None else self._picked(uniform)
        results = [self.memory.take((rows, *v.shape[1:]), v.dtype) for v in self.row_values]
        if self.kernel is not None and all(map(_row_major, data)):
            totals = self._in_one_pass([*data, *crossing], results, threads)
        else:
            totals = self._in_blocks(
                data, crossing, results, rows, threads, block_rows or self.block_rows(rows, threads)
            )
        late = self._run(self.after, [*totals, *crossing])
        return [results[k] if where == "row" else late[k] for where, k in self.parts.outputs]

    @property
    def work(self) -> int:
        """What there is to compile, as `fuse.work` counts it."""
        return work(self._of(PROBE_ROWS).steps)

    def _is_row(self, value: Value) -> bool:
        return self.parts.rows in value.shape

    def _picked(self, uniform: list[Array]) -> list[Array]:
        by_value = dict(zip(self.parts.before.inputs, uniform, strict=True))
        return [by_value[v] for v in self.parts.before.outputs]

    def _run(self, fixed: _Fixed, arrays: list[Array]) -> list[Array]:
        instance = fixed.instance(self.small)
        try:
            return instance.run(arrays)
        finally:
            fixed.idle.append(instance)

    def _in_one_pass(self, body: list[Array], results: list[Array], threads: int) -> list[Any]:
        plan_ = self.pass_plan
        assert plan_ is not None
        assert self.kernel is not None
        at: dict[Value, Any] = dict(zip(self.parts.body.inputs, body, strict=True))
        matrices = [at[v] for v in plan_.matrices]
        weights = [at[v][(slice(None), *index)] for v, index in plan_.weights]
        columns = [at[v][(slice(None), *index)] for v, index in plan_.columns]
        scalars = [at[v][index] for v, index in plan_.scalars]
        sums, back = self.kernel(matrices, weights, columns, scalars, results, threads)
        totals = []
        for (kind, places), partial in zip(plan_.totals, self.partials, strict=True):
            if kind == "sum":
                totals.append(numpy.asarray(sums, dtype=numpy.float64)[places])
            else:
                gathered = [back[k] for k in places.reshape(-1)]
                totals.append(
                    (gathered[0] if not places.ndim else numpy.stack(gathered, axis=-1)).reshape(partial.shape)
                )
        return totals

    def text(self, threads: int) -> str:
        """Return what runs, as text."""
        parts, rows = self.parts, self.parts.rows
        lines = [*parts.program.lines(), ""]
        if self.before is not None:
            lines += [*step_lines(parts.before, self.before.steps, self.before.plan), ""]
        if self.kernel is not None and self.pass_plan is not None:
            lines += pass_lines(self.pass_plan.kernel, f"{rows:,} rows")
            row_bytes = sum(v.nbytes for v in parts.body.inputs if self._is_row(v))
            lines.append(f"  {row_bytes / 1e6:.3g} MB read once")
        else:
            size = self.block_rows(rows, threads)
            fixed = self._of(size)
            lines.append(f"{-(-rows // size)} blocks of {size:,} rows, by {threads} threads, each:")
            lines += step_lines(fixed.program, fixed.steps, fixed.plan)
        if self.after.steps:
            lines += ["", *step_lines(parts.after, self.after.steps, self.after.plan)]
        return "\n".join(lines)

    # ------------------------------------------------------------------------------------------------- blocks

    def block_rows(self, rows: int, threads: int) -> int:
        """Return the rows of a block: what fits the caches, every thread with as many blocks."""
        if not self._block_rows:
            probe = PROBE_ROWS
            fixed = self._of(probe)
            made = [v.nbytes / probe for s in fixed.steps for v in s.outputs if v.ndim and v.shape[0] == probe]
            data = [v.nbytes / probe for v in fixed.program.inputs if v.ndim and v.shape[0] == probe]
            held = sum(fixed.plan.buffers) / probe
            fitting = min(
                OPERAND_BYTES / max([*made, 1]), BUFFER_BYTES / max(held, 1), DATA_BYTES / max(sum(data), 1), 1 << 17
            )
            self._block_rows = max(1, int(fitting))
        size = min(self._block_rows, rows)
        blocks = -(-rows // size)
        if rows > 256:
            blocks = -(-blocks // threads) * threads
        return -(-rows // blocks)

    def _of(self, count: int) -> _Fixed:
        found = self.fixed.get(count)
        if found is None:
            with self.lock:
                found = self.fixed[count] = _Fixed(resized(self.parts.body, self.parts.rows, count))
                while len(self.fixed) > 8:
                    self.fixed.pop(next(iter(self.fixed)))
        return found

    def _in_blocks(
        self, data: list[Array], crossing: list[Array], results: list[Array], rows: int, threads: int, size: int
    ) -> list[Any]:
        starts = range(0, rows, size)
        nbytes = 8 * sum(v.size for v in self.partials)
        count = min(len(starts), STRIPES, max(4, STRIPE_BYTES // max(nbytes, 1)))
        bounds = [len(starts) * k // count for k in range(count + 1)]
        stop: list[bool] = []

        def stripe(k: int) -> list[Array]:
            totals = [numpy.zeros(v.shape) for v in self.partials]
            with numpy.errstate(all="ignore"):
                for start in starts[bounds[k] : bounds[k + 1]]:
                    if stop:
                        break
                    end = min(start + size, rows)
                    fixed = self._of(end - start)
                    instance = fixed.instance(self.small)
                    try:
                        out = instance.run([*(a[start:end] for a in data), *crossing], [r[start:end] for r in results])
                    finally:
                        fixed.idle.append(instance)
                    for total, part in zip(totals, out[len(results) :], strict=True):
                        total += part
            return totals

        stripes = _threads.in_order(stripe, count, threads, stop)
        with numpy.errstate(all="ignore"):
            return [functools.reduce(operator.add, parts) for parts in zip(*stripes, strict=True)]


def _row_major(array: Array) -> bool:
    """Tell whether the elements of a row are next to each other."""
    return array.ndim < 2 or array.strides[-1] == array.itemsize or array.shape[-1] == 1


def _compiled(plan_: PassPlan) -> Callable[..., Any] | None:
    return cpu_code.row_pass(plan_.kernel) if has_compiler() else None


def rows_of(program: Program) -> int | None:
    """Return the number of rows of a program over much data: the first axis of its largest argument, if it is one."""
    largest = max(program.inputs, key=lambda v: v.nbytes, default=None)
    return largest.shape[0] if largest is not None and largest.ndim and largest.shape[0] >= 1024 else None
