"""Programs over rows on a GPU: one pass over the data where the body allows it, and losses for an `Objective`.

A `rows.Split` with a `RowPass` becomes: what comes before the rows, the pass, and what is done to the sums. A cast of a
sum, its shape and its factor go into the launch that adds up what the blocks left, so that value and gradients of a
linear model are two launches, whatever they are divided by.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import optree

from gpugrad import backend
from gpugrad.backend import Array, Device
from gpugrad.compile import cuda_code
from gpugrad.compile.capture import TENSOR, capture
from gpugrad.compile.cuda import (
    LAYOUTS,
    Action,
    DeviceProgram,
    Env,
    Get,
    Memory,
    OwnKernel,
    Template,
    executable,
    layout_of,
    number_at,
)
from gpugrad.compile.fuse import Fuser, Kernel, Step, View
from gpugrad.compile.kernels import Loop
from gpugrad.compile.losses import Want, loss_program
from gpugrad.compile.plan import plan
from gpugrad.compile.program import Constant, Equation, Program, Value, equation, live, simplified
from gpugrad.compile.rows import NotByRows, PassPlan, Split, resized, row_pass, split
from gpugrad.compile.text import pass_lines, step_lines
from gpugrad.op import registry
from gpugrad.ops.shape import astype
from gpugrad.transforms import value_and_grad

RESULTS = (numpy.dtype(numpy.float32), numpy.dtype(numpy.float64))  # dtypes that the last launch writes
SIZES = 8  # numbers of rows that a loss keeps programs for


@dataclass(frozen=True, eq=False)
class Result:
    """A total as it is wanted: total number `total` of the pass times factor, and times the scale of the call."""

    total: int
    factor: float
    scaled: bool
    value: Value


@dataclass(eq=False)
class Pass(OwnKernel):
    """A step that runs a RowPass: inputs are the body's, outputs its row results, sums the values of `results`."""

    plan: PassPlan
    code: cuda_code.RowPassCode
    results: tuple[Result, ...]
    scale: Value | None = None

    def action(self, memory: Memory) -> Action:
        """Bind to buffers."""
        return _PassAction(memory, self)


class _PassAction:
    def __init__(self, memory: Memory, step: Pass) -> None:
        self.memory, self.step, self.code = memory, step, step.code
        plan_ = step.plan
        self.operands: list[tuple[Get, Any]] = [(memory.getter(v), None) for v in plan_.matrices]
        vectors = [*plan_.weights, *plan_.columns]
        self.operands += [(memory.getter(v), (slice(None), *index) if index else None) for v, index in vectors]
        self.scalars = [(memory.getter(v), i) for v, i in plan_.scalars]
        self.scalar_dtypes = plan_.kernel.scalars
        self.outputs = [(memory.bound(v), memory.slot(v)) for v in step.outputs]
        self.scale = memory.getter(step.scale) if step.scale is not None else None
        self.totals: list[tuple[str, int, float, bool, Any, Any]] = []
        self.turned: list[tuple[Any, Any, Array]] = []
        for result in step.results:
            array = memory.total(result.value)
            slot = memory.slot(result.value) if array is None else None
            self._place(result, slot, array)
        self.partial: Array | None = None
        self.rows = 0
        self.templates: OrderedDict[Hashable, Template] = OrderedDict()

    def _place(self, result: Result, slot: int | None, array: Array | None) -> None:
        """Say where the numbers of one result go: parts of its array, or a buffer of columns that are then turned."""
        kind, places = self.step.plan.totals[result.total]
        numbers = places.reshape(-1).tolist()
        common = (result.factor, result.scaled)
        if kind == "back" and len(numbers) > 1:
            columns = result.value.size // len(numbers)
            held = self.memory.cupy.empty((len(numbers), columns), dtype=result.value.dtype)
            self.turned.append((slot, array, held))
            self.totals += [("back", n, *common, None, held[k]) for k, n in enumerate(numbers)]
            return
        for k, n in enumerate(numbers):
            if array is None:
                self.totals.append((kind, n, *common, slot, k if kind == "sum" else None))
            else:
                self.totals.append((kind, n, *common, None, array.reshape(-1)[k : k + 1] if kind == "sum" else array))

    def __call__(self, env: Env) -> None:
        scale = 1.0 if self.scale is None else float(self.scale(env))
        arrays = []
        for get, index in self.operands:
            array = get(env)
            arrays.append(array if index is None else array[index])
        matrices = len(self.step.plan.matrices)
        for k in range(matrices):
            if arrays[k].strides[-1] != arrays[k].itemsize and arrays[k].shape[-1] > 1:
                arrays[k] = self.memory.cupy.ascontiguousarray(arrays[k])
                self.memory.copies += 1
        numbers = []
        for get, index in self.scalars:
            value = get(env)
            numbers.append(value[index] if index else value)
        outputs = [env[slot] if array is None else array for array, slot in self.outputs]
        operands = [(2 + 2 * k, array) for k, array in enumerate(arrays)]
        at = 2 + 2 * len(arrays)
        for value, dtype in zip(numbers, self.scalar_dtypes, strict=True):
            operands += number_at(at, value, dtype)
            at += 2
        operands += [(at + 2 * k, array) for k, array in enumerate(outputs)]
        totals = []
        for number, (_, _, factor, scaled, slot, to) in enumerate(self.totals):
            target = to
            if slot is not None:
                target = env[slot] if to is None else env[slot].reshape(-1)[to : to + 1]
            totals.append((number, target, factor * scale if scaled else factor))
        rows = len(arrays[0])
        key = (rows, *map(layout_of, (*arrays, *outputs)))
        template = self.templates.get(key)
        if template is None:
            template = self._bound(key, rows, arrays, numbers, outputs, totals, operands)
        template.run(operands, totals)
        for slot, array, held in self.turned:
            into = env[slot] if array is None else array
            into.reshape(-1, len(held))[...] = held.T
            self.memory.copies += 1

    def _bound(
        self,
        key: Hashable,
        rows: int,
        arrays: list[Array],
        numbers: list[Any],
        outputs: list[Array],
        totals: list[tuple[int, Array, float]],
        operands: list[tuple[int, Any]],
    ) -> Template:
        plan_ = self.step.plan
        if self.partial is None or rows > self.rows:
            self.partial, self.rows = self.code.partial(rows), rows
            self.templates.clear()
            self.memory.moved += 1
        m, w = len(plan_.matrices), len(plan_.weights)
        results = [(kind, n, factor, to) for (kind, n, *_), (_, to, factor) in zip(self.totals, totals, strict=True)]
        bound = self.code.bind(arrays[:m], arrays[m : m + w], arrays[m + w :], numbers, outputs, results, self.partial)
        template = self.templates[key] = Template(bound, frozenset(at for at, _ in operands))
        if len(self.templates) > LAYOUTS:
            self.templates.popitem(last=False)
            self.memory.moved += 1
        return template


# --------------------------------------------------------------------------------------- from a program to its steps


def pass_steps(parts: Split, scale: Value | None = None) -> list[Step] | None:
    """Return the steps of a program that is one pass over its rows; None where it is not, or no CUDA code is for it."""
    found = row_pass(parts)
    if found is None:
        return None
    code = cuda_code.row_pass(found.kernel)
    if code is None:
        return None
    count = len(parts.body.outputs) - parts.row_outputs
    arrived = parts.after.inputs[:count]
    results, rest = _folded(parts.after, arrived, scale)
    needed = {v for eq in rest.equations for v in eq.inputs} | set(rest.outputs)
    results += [Result(k, 1.0, False, v) for k, v in enumerate(arrived) if v in needed]
    if not results:
        return None
    row_outputs = parts.body.outputs[: parts.row_outputs]
    step = Pass(
        Loop((), ()),
        (*parts.body.inputs, *((scale,) if scale is not None else ())),
        row_outputs,
        tuple(r.value for r in results),
        parts.rows,
        1,
        found,
        code,
        tuple(results),
        scale,
    )
    return [*_without_copies(Fuser(parts.before).steps), step, *Fuser(rest).steps]


def _without_copies(steps: Sequence[Step]) -> list[Step]:
    """Return steps in which values that are only read may be views of others, not copies."""
    out: list[Step] = []
    for step in steps:
        if not isinstance(step, Kernel):
            out.append(step)
            continue
        kept = []
        for value, e in zip(step.outputs, step.loop.outputs, strict=True):
            source = step.inputs[e.value] if e.fn == "input" else value
            if source is value or source.weak or (source.size, source.dtype) != (value.size, value.dtype):
                kept.append((value, e))
            else:
                out.append(View(Equation(registry["reshape"], (source,), {"shape": value.shape}, (value,))))
        if kept or step.sums:
            loop = replace(step.loop, outputs=tuple(e for _, e in kept))
            out.append(replace(step, loop=loop, outputs=tuple(v for v, _ in kept)))
    return out


def outputs_of(parts: Split) -> tuple[Value, ...]:
    """Return the outputs of the program that a split is of, as its parts give them."""
    return tuple(parts.body.outputs[k] if where == "row" else parts.after.outputs[k] for where, k in parts.outputs)


def _folded(after: Program, arrived: Sequence[Value], scale: Value | None) -> tuple[list[Result], Program]:
    """Return the outputs that are totals times a number, and a program for the others."""
    chain: dict[Value, tuple[int, float, bool]] = {v: (k, 1.0, False) for k, v in enumerate(arrived)}
    for eq in after.equations:
        found = next((v for v in eq.inputs if v in chain), None)
        out = eq.outputs[0]
        if found is None or out.size != found.size or out.dtype.kind != "f":
            continue
        total, factor, scaled = chain[found]
        others = [v for v in eq.inputs if v is not found]
        number = float(others[0].array) if len(others) == 1 and _is_number(others[0]) else None  # type: ignore[attr-defined]
        name = eq.op.name
        if name in ("astype", "reshape") and not others:
            chain[out] = total, factor, scaled
        elif name == "negative":
            chain[out] = total, -factor, scaled
        elif name == "multiply" and len(others) == 1 and others[0] is scale and not scaled:
            chain[out] = total, factor, True
        elif name == "multiply" and number is not None:
            chain[out] = total, factor * number, scaled
        elif name == "divide" and number and eq.inputs[0] is found:
            chain[out] = total, factor / number, scaled
    results, rest = [], []
    for value in dict.fromkeys(after.outputs):
        if value in chain and value.dtype in RESULTS:
            results.append(Result(chain[value][0], *chain[value][1:], value))
        else:
            rest.append(value)
    return results, Program(after.inputs, live(after.equations, rest), tuple(rest), after.name)


def _is_number(value: Value) -> bool:
    return isinstance(value, Constant) and value.size == 1 and not backend.is_cuda_array(value.array)


def joined(parts: Split, dtypes: Sequence[Any]) -> Program:
    """Return the parts as one program, its outputs (totals all) in the given dtypes, None for as they come.

    A sum is added up in float64 and stored in the dtype it is wanted in; a product stays in its own.
    """
    partials = parts.body.outputs[parts.row_outputs :]
    arrived = parts.after.inputs[: len(partials)]
    of = dict(zip(arrived, partials, strict=True))
    body = list(parts.body.equations)
    alias: dict[Value, Value] = {}
    used = {v for eq in parts.after.equations for v in eq.inputs}
    more: list[Equation] = []
    outputs = []
    for value, dtype in zip(outputs_of(parts), dtypes, strict=True):
        wanted = None if dtype is None else numpy.dtype(dtype)
        given = of.get(value, value)
        if wanted is None or given.dtype == wanted:
            outputs.append(alias.get(given, given))
            continue
        k = next((k for k, eq in enumerate(body) if given in eq.outputs and eq.op.name == "sum"), None)
        if k is not None and value in of and value not in used and given not in alias and wanted in RESULTS:
            alias[given] = Value(given.shape, wanted)
            body[k] = replace(body[k], outputs=(alias[given],))
            outputs.append(alias[given])
            continue
        narrow = equation("astype", (alias.get(given, given),), given.shape, wanted, dtype=str(wanted))
        more.append(narrow)
        outputs.append(narrow.outputs[0])
    late: list[Equation] = []
    here: dict[Value, Value] = {}
    for value, partial in of.items():
        if value not in used:
            continue
        if partial.dtype == value.dtype:
            here[value] = partial
            continue
        wide = equation("astype", (partial,), value.shape, value.dtype, dtype=str(value.dtype))
        late.append(wide)
        here[value] = wide.outputs[0]
    late += [replace(eq, inputs=tuple(here.get(v, v) for v in eq.inputs)) for eq in parts.after.equations]
    equations = live([*parts.before.equations, *body, *late, *more], outputs)
    return Program(parts.program.inputs, equations, tuple(outputs), parts.program.name)


# ------------------------------------------------------------------------------------------------------ gpugrad.compile


def compiled(program: Program, device: Device) -> DeviceProgram:
    """Return a program ready to run on a GPU, as one pass over its rows where it is that."""
    largest = max(program.inputs, key=lambda v: v.nbytes, default=None)
    if largest is not None and largest.ndim == 2 and largest.shape[0] > largest.shape[1]:
        try:
            parts = split(program, largest.shape[0])
        except NotByRows:
            return executable(program, device)
        steps = pass_steps(parts)
        if steps is not None:
            return DeviceProgram(
                steps, program.inputs, outputs_of(parts), device, lambda: _text(program, steps, outputs_of(parts))
            )
    return executable(program, device)


def _text(program: Program, steps: Sequence[Step], outputs: Sequence[Value]) -> str:
    """Return operations and steps as text."""
    lines = [*program.lines(), ""]
    others = [s for s in steps if not isinstance(s, Pass)]
    for step in steps:
        if isinstance(step, Pass):
            lines += pass_lines(step.plan.kernel, f"{step.rows:,} rows")
            nbytes = sum(v.nbytes for v in step.inputs if step.rows in v.shape)
            lines.append(f"  {nbytes / 1e6:.3g} MB read once, by 2 launches")
    if others:
        whole = plan(steps, program.inputs, outputs)
        lines += ["", *step_lines(program, others, whole)]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- Objective


class DeviceLoss:
    """A captured loss on a GPU, for any number of rows: sums over them times a number.

    one_pass: all rows go through one kernel, so that blocks need not be small. Raises CaptureError or NotByRows, or
    what the loss raises.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        want: Want,
        params: Sequence[Value],
        structure: Any,
        data: Sequence[Value],
        device: Device,
    ) -> None:
        self.device, self.params = device, [v.dtype for v in params]
        self.want: Want = want
        self.parts = loss_program(loss, want, params, structure, data, device)
        self.scale = Value((), "float64", weak=True)
        self.one_pass = pass_steps(self.parts) is not None
        if not self.one_pass:  # a product's result cannot be scaled by the way: the cotangent is
            self.parts = loss_program(loss, want, params, structure, data, device, scaled=True)
        self.after = backend.mark(device)
        self.programs: OrderedDict[Hashable, DeviceProgram] = OrderedDict()
        self.lock = threading.Lock()

    def run(self, arrays: Sequence[Any], rows: int, scale: float, *, whole: bool) -> list[Array]:
        """Return the sums over rows times scale, the value in float64.

        arrays: parameters, rows of the data, and for a product the vector. whole: these are all rows, and gradients are
        wanted in the dtypes of the parameters; otherwise they may be in any that loses nothing.
        """
        key = (whole, 0 if self.one_pass else rows)
        with self.lock:
            program = self.programs.get(key)
            if program is None:
                program = self.programs[key] = self._made(rows, whole)
                while len(self.programs) > SIZES:
                    self.programs.popitem(last=False)
            self.programs.move_to_end(key)
        return program([*arrays, scale])

    def release(self) -> int:
        """Let buffers go that no call is using; return how many sets there were."""
        with self.lock:
            return sum(program.release() for program in self.programs.values())

    def _made(self, rows: int, whole: bool) -> DeviceProgram:
        dtypes: list[Any] = [numpy.float64] if self.want != "product" else []
        dtypes += [d if whole else None for d in self.params][: len(self.parts.outputs) - len(dtypes)]
        if not self.one_pass:
            program = resized(joined(self.parts, dtypes), self.parts.rows, rows)
            return executable(program, self.device, self.after)
        parts = self._scaled(dtypes)
        steps = pass_steps(parts, self.scale)
        assert steps is not None
        inputs, outputs = parts.program.inputs, outputs_of(parts)
        text = functools.partial(_text, parts.program, steps, outputs)
        return DeviceProgram(steps, inputs, outputs, self.device, text, self.after)

    def _scaled(self, dtypes: Sequence[Any]) -> Split:
        """Return the parts with outputs times the scale, which is one more input, in the given dtypes."""
        parts, after = self.parts, self.parts.after
        more: list[Equation] = []
        outputs = []
        for value, dtype in zip(after.outputs, dtypes, strict=True):
            scaled = equation("multiply", (value, self.scale), value.shape, value.dtype)
            more.append(scaled)
            value = scaled.outputs[0]
            if dtype is not None and value.dtype != dtype:
                more.append(equation("astype", (value,), value.shape, dtype, dtype=str(numpy.dtype(dtype))))
                value = more[-1].outputs[0]
            outputs.append(value)
        program = replace(parts.program, inputs=(*parts.program.inputs, self.scale), names={})
        late = Program((*after.inputs, self.scale), [*after.equations, *more], tuple(outputs), after.name)
        return replace(parts, program=program, after=late)


def penalty_program(
    penalty: Callable[..., Any], params: Sequence[Value], structure: Any, gradients: Sequence[Value], device: Device
) -> DeviceProgram:
    """Return (parameters, value, gradients) -> value and gradients with those of a penalty, as one program.

    Raises CaptureError, or what the penalty raises.
    """
    count = len(params)

    def added(*tensors: Any) -> Any:
        p = optree.tree_unflatten(structure, list(tensors[:count]))
        value, slopes = value_and_grad(penalty)(p)
        sums = [a + b for a, b in zip(tensors[count + 1 :], optree.tree_leaves(slopes), strict=True)]
        return [tensors[count] + astype(value, "float64"), *sums]

    given = [(Value(v.shape, v.dtype), TENSOR) for v in (*params, Value((), "float64"), *gradients)]
    places: Any = (tuple(range(len(given))), {})
    _, outer = optree.tree_flatten(places)
    name = getattr(penalty, "__name__", "penalty")
    return executable(simplified(capture(added, given, outer, device, name).program), device)
