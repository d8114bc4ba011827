"""The CPU executor: runs the steps of a program on NumPy arrays, loops by numba where it is installed.

An `Instance` is a program ready to run: buffers made, views taken, kernels compiled. It belongs to one call at a time;
a second caller gets one of its own. Results go to memory the caller owns; what he has dropped is used again
(`Outputs`), since fresh pages cost more than the arithmetic of a large array.
"""

import math
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from gpugrad.compile import cpu_blocks, cpu_code
from gpugrad.compile.fuse import Call, Fuser, Kernel, Step, View, work
from gpugrad.compile.plan import Plan, plan, writes_in_place
from gpugrad.compile.program import Constant, Equation, Program, Value

Array = numpy.ndarray[Any, Any]
Env = list[Any]
Action = Callable[[Env], None]
SHORT = 12  # cost of an expression, above which it is stored where loops run on NumPy
MUCH_WORK = 5000  # cost of a program's loops, above which they run on NumPy: compiling would take over ten seconds
KEPT_BYTES = 256 << 20  # results of one program that are kept for the caller to drop


def has_compiler() -> bool:
    """Tell whether loops are compiled here (numba is installed) and not run on NumPy."""
    return cpu_code.available() is None


def fused(program: Program) -> list[Step]:
    """Return the steps of a program: few loops that are compiled, or many on NumPy that compute nothing twice."""
    if has_compiler():
        steps = Fuser(program).steps
        if work(steps) <= MUCH_WORK:
            return steps
    return Fuser(program, long=SHORT).steps


def loop_runner(kernel: Kernel, compiled: bool = True) -> Callable[..., list[Any]]:
    """Return what runs a fused loop: compiled where numba is there and takes its dtypes, else on NumPy."""
    found = cpu_code.loop(kernel.loop) if compiled and has_compiler() else None
    return found or cpu_blocks.loop(kernel.loop)


class Outputs:
    """Memory for results. An array that only this list still refers to has been dropped by the caller."""

    def __init__(self) -> None:
        self.kept: dict[tuple[tuple[int, ...], Any], list[Array]] = {}
        self.lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array of arbitrary contents that nobody else refers to."""
        size = math.prod(shape) * dtype.itemsize
        if size < 1 << 16:  # malloc is as quick
            return numpy.empty(shape, dtype)
        with self.lock:
            kept = self.kept.setdefault((shape, dtype), [])
            alone = next((k for k, count in enumerate(_references(kept)) if count == _ALONE), None)
            if alone is not None:
                kept[alone].flags.writeable = True
                return kept[alone]
            array = numpy.empty(shape, dtype)
            if (len(kept) + 1) * size <= KEPT_BYTES:
                kept.append(array)
            return array


def _references(kept: list[Array]) -> list[int]:
    return [sys.getrefcount(array) for array in kept]


(_ALONE,) = _references([numpy.empty(1)])  # what is counted for an array that only a list holds


class Instance:
    """Steps bound to buffers: ``run(inputs) -> outputs``. threads: workers a loop may use."""

    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        threads: int,
        memory: Outputs,
        buffers: list[Array] | None = None,
        the_plan: Plan | None = None,
    ) -> None:
        self.plan = plan(steps, inputs, outputs) if the_plan is None else the_plan
        self.inputs, self.outputs, self.threads, self.memory = inputs, outputs, threads, memory
        self.buffers = [numpy.empty(n, numpy.uint8) for n in self.plan.buffers] if buffers is None else buffers
        self.compiled = work(steps) <= MUCH_WORK
        self.slots: dict[Value, int] = {}
        self.static: dict[Value, Array] = {}
        for value in inputs:
            self._slot(value)
        self.fresh = [(v, self._slot(v), v.shape, v.dtype) for v in self.plan.fresh]
        self.first = {v: k for k, v in reversed(list(enumerate(outputs)))}
        self.straight: set[int] = set()  # slots of inputs that loops read, which have to be without gaps
        self.actions: list[Action] = []
        for step, gone in zip(steps, self.plan.dies, strict=True):
            action = self._kernel(step) if isinstance(step, Kernel) else self._call(step)
            if action is not None:
                self.actions.append(action)
            dead = [self.slots[v] for v in gone if v in self.slots]
            if dead and sum(v.nbytes for v in gone) > 1 << 20:
                self.actions.append(_dropping(dead))
        self.results = [(self._getter(v), copied) for v, copied in zip(outputs, self.plan.copied, strict=True)]
        self.count = len(self.slots)

    def run(self, arrays: Sequence[Array], into: Sequence[Array] = ()) -> list[Array]:
        """Run on arrays of the inputs' shapes and dtypes; the results are the caller's.

        into: arrays for the first results, of their shapes and dtypes.
        """
        env: Env = [None] * self.count
        env[: len(arrays)] = arrays
        for slot in self.straight:
            if not env[slot].flags.c_contiguous:
                env[slot] = numpy.ascontiguousarray(env[slot])
        for value, slot, shape, dtype in self.fresh:
            k = self.first.get(value, len(into))
            env[slot] = into[k] if k < len(into) else self.memory.take(shape, dtype)
        with numpy.errstate(all="ignore"):  # NaN and infinity are answers here; the loops say nothing of them either
            for action in self.actions:
                action(env)
        results = [get(env) for get, _ in self.results]
        for k, (_, copied) in enumerate(self.results):
            if k < len(into):
                if results[k] is not into[k]:
                    into[k][...] = results[k]
            elif copied:
                results[k] = results[k].copy()
        return results

    # ------------------------------------------------------------------------------------------------ binding

    def _slot(self, value: Value) -> int:
        return self.slots.setdefault(value, len(self.slots))

    def _bound(self, value: Value) -> Array | None:
        """Return the array of a value if it is always the same one."""
        if isinstance(value, Constant):
            return numpy.asarray(value.array, dtype=value.dtype)
        if value in self.static:
            return self.static[value]
        at = self.plan.place.get(value)
        if at is None:
            return None
        array: Array = self.buffers[at][: value.nbytes].view(value.dtype).reshape(value.shape)
        self.static[value] = array
        return array

    def _getter(self, value: Value) -> Callable[[Env], Array]:
        array = self._bound(value)
        if array is not None:
            return lambda _env: array
        slot = self.slots[value]
        return lambda env: env[slot]

    def _kernel(self, step: Kernel) -> Action:
        run, rows, columns, threads = loop_runner(step, self.compiled), step.rows, step.columns, self.threads
        known: list[Any] = [None] * (len(step.inputs) + len(step.outputs))
        direct: list[tuple[int, int, tuple[int, ...] | None]] = []  # position, slot, shape if it has to be changed
        others: list[tuple[int, Callable[[Env], Array], tuple[int, ...]]] = []
        whole = self.plan.fresh
        for k, (value, (layout, _)) in enumerate(zip(step.inputs, step.loop.inputs, strict=True)):
            shape = {"full": (rows, columns), "row": (columns,), "column": (rows,), "scalar": ()}[layout]
            array = self._bound(value)
            if array is not None:
                laid = _laid_out(array, shape)
                if isinstance(value, Constant) or not laid.size or numpy.may_share_memory(laid, array):
                    known[k] = laid
                    continue
            elif value in whole or value in self.inputs:
                self.straight.update([self.slots[value]] if value in self.inputs else [])
                direct.append((k, self.slots[value], shape if shape != value.shape else None))
                continue
            others.append((k, self._getter(value), shape))
        for k, value in enumerate(step.outputs, start=len(step.inputs)):
            array = self._bound(value)
            if array is not None:
                known[k] = array.reshape(rows, columns)
            else:
                direct.append((k, self._slot(value), (rows, columns) if value.shape != (rows, columns) else None))
        count = len(step.inputs)
        sums = [(self._slot(v), v.shape, v.dtype) for v in step.sums]

        def action(env: Env) -> None:
            arrays = known.copy()
            for k, slot, shape in direct:
                arrays[k] = env[slot] if shape is None else env[slot].reshape(shape)
            for k, get, shape in others:
                arrays[k] = _laid_out(get(env), shape)
            totals = run(arrays[:count], arrays[count:], threads, rows, columns)
            for (slot, shape, dtype), total in zip(sums, totals, strict=True):
                array = numpy.asarray(total, dtype)
                env[slot] = array if array.shape == shape else array.reshape(shape)

        return action

    def _call(self, step: Call) -> Action | None:
        eq = step.equation
        bound = [self._bound(v) for v in eq.inputs]
        if isinstance(step, View) and bound[0] is not None:
            view = eq.op.forward(numpy, *bound, **eq.params)
            if isinstance(eq.inputs[0], Constant) or not view.size or numpy.may_share_memory(view, bound[0]):
                self.static[eq.outputs[0]] = view
                return None
        gets = [self._getter(v) for v in eq.inputs]
        if eq.op.name == "matmul" and writes_in_place(step):
            return self._product(eq.outputs[0], *gets)
        slots = [self._slot(v) for v in eq.outputs]
        quick = _quick_view(eq) if isinstance(step, View) and eq.outputs[0] not in self.plan.fresh else None
        if quick is not None:
            return _viewing(slots[0], gets[0], quick)
        forward, params, one = eq.op.forward, eq.params, eq.op.outputs == 1
        dtypes = [v.dtype for v in eq.outputs]
        fresh = [v in self.plan.fresh for v in eq.outputs]
        viewing = isinstance(step, View)

        def action(env: Env) -> None:
            given = [get(env) for get in gets]
            with numpy.errstate(all="ignore"):
                out = forward(numpy, *given, **params)
            for slot, dtype, part, own in zip(slots, dtypes, (out,) if one else out, fresh, strict=True):
                array = numpy.asarray(part, dtype=dtype)
                # an op may hand out its argument, or a view of it, whose buffer others are about to use
                lent = not viewing and any(numpy.may_share_memory(array, a) for a in given)
                owned = array.base is None and array.flags.writeable
                env[slot] = array.copy() if lent or (own and not owned) else array

        return action

    def _product(self, out: Value, x: Callable[[Env], Array], y: Callable[[Env], Array]) -> Action:
        into = self._bound(out)
        slot = -1 if into is not None else self._slot(out)

        def action(env: Env) -> None:
            numpy.matmul(x(env), y(env), out=env[slot] if into is None else into)

        return action


def _quick_view(eq: Equation) -> Callable[[Array], Array] | None:
    """Return a view as the array's own method, which is many times quicker than the function."""
    if eq.op.name == "reshape":
        shape = eq.outputs[0].shape
        return lambda a: a.reshape(shape)
    if eq.op.name == "permute_dims":
        axes = tuple(eq.params["axes"])
        return lambda a: a.transpose(axes)
    return None


def _viewing(slot: int, get: Callable[[Env], Array], view: Callable[[Array], Array]) -> Action:
    def action(env: Env) -> None:
        env[slot] = view(get(env))

    return action


def _dropping(slots: list[int]) -> Action:
    def action(env: Env) -> None:
        for slot in slots:
            env[slot] = None

    return action


def _laid_out(array: Array, shape: tuple[int, ...]) -> Array:
    """Return an operand in the shape a loop indexes it by, its last axis without gaps."""
    if array.shape != shape:
        array = array.reshape(shape)
    if array.ndim and array.strides[-1] != array.itemsize and array.size > 1:
        array = numpy.ascontiguousarray(array)
    return array
