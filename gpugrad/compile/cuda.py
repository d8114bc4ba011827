"""The CUDA executor: runs the steps of a program on CuPy arrays, as launches on memory that is there before they run.

An `Instance` is a program ready to run: buffers made, views taken, kernels bound to their addresses. Arrays of the
call, and results that the caller will own, change address from call to call: a kernel that has them is launched with
these places filled in, and bound anew only where alignment or strides differ (`Template`). Where all steps are kernels
of gpugrad's own, calls whose addresses come again are replayed as one CUDA graph (`_Graphs`).

Instances are kept by stream: the next call on a stream is ordered after the last by the stream itself, so it may use
the same buffers while the last still runs, and no event is needed. Another stream, or another thread at the same time,
gets an instance of its own. CuPy's memory pool keeps memory by stream for the same reason.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.backend import Array, Device
from gpugrad.compile import cuda_code
from gpugrad.compile.fuse import Call, Fuser, Kernel, Step, View
from gpugrad.compile.kernels import Loop
from gpugrad.compile.plan import plan
from gpugrad.compile.program import Constant, Program, Value
from gpugrad.compile.scalar import FUNCTIONS, in_order
from gpugrad.compile.text import describe

LAYOUTS = 16  # of operands that a kernel stays bound to
STREAMS = 4  # on which a program keeps instances
GRAPHS = 16  # that an instance keeps, by addresses
REPEATED = 64  # addresses remembered, to see which come again
TRIED = 32  # graphs captured, after which replays must be as many

Env = list[Any]
Action = Callable[[Env], None]
Get = Callable[[Env], Any]


class Template:
    """Launches of one kernel, with gaps for what changes from call to call: operands, and where totals are written to.

    The gaps hold nothing between calls: a cached launch must not keep a caller's arrays alive.
    """

    def __init__(self, bound: cuda_code.Bound, gaps: frozenset[int]) -> None:
        first, *rest = bound.each
        self.kernel, self.grid, self.block = first.kernel, first.grid, (first.block,)
        self.arguments = [None if k in gaps else a for k, a in enumerate(first.arguments)]
        self.rest = [(launch.kernel, launch.grid, (launch.block,), launch.arguments) for launch in rest]
        self.partial = bound.kept[0]

    def run(self, operands: Sequence[tuple[int, Any]], totals: Sequence[tuple[int, Array, float]]) -> None:
        """Launch. operands: (place among the arguments, value); totals: (which, where to, factor)."""
        arguments = list(self.arguments)
        for at, value in operands:
            arguments[at] = value
        self.kernel(self.grid, self.block, tuple(arguments))
        for number, array, factor in totals:
            (table,), at = self.rest[number // cuda_code.TOTAL_MANY][3], number % cuda_code.TOTAL_MANY
            table["to"][at], table["factor"][at] = array.data.ptr, factor
        for kernel, grid, block, given in self.rest:
            kernel(grid, block, given)


def layout_of(array: Array) -> tuple[int, tuple[int, ...]]:
    """Return what decides which form of a kernel takes an array: how its address is aligned, and its strides."""
    return array.data.ptr % 16, array.strides


def number_at(place: int, value: Any, dtype: Any) -> list[tuple[int, Any]]:
    """Return the two arguments that stand for a number, which is an array on the device or a number of the host."""
    if backend.is_cuda_array(value):
        return [(place, value)]
    return [(place, numpy.uintp(0)), (place + 1, numpy.dtype(dtype).type(value))]


class OwnKernel(Kernel):
    """A step that is another kernel than a loop."""

    def action(self, memory: "Memory") -> Action:
        """Bind to buffers."""
        raise NotImplementedError


class Memory:
    """Where the values of an `Instance` are: buffers, constants, sums, and slots for what a call brings.

    copies: how many operands had to be copied so far, as a kernel could not read them where they lay. moved: how often
    memory that kernels are bound to was replaced by other. (Steps hold this and not the Instance, which holds them: no
    cycle keeps memory of a device until the garbage collector comes.)
    """

    def __init__(
        self, steps: Sequence[Step], inputs: Sequence[Value], outputs: Sequence[Value], device: Device
    ) -> None:
        self.device = device
        self.cupy, self.xp = backend.cupy(), backend.namespace_of_device(device)
        self.plan = plan(steps, inputs, outputs)
        self.buffers = [self.cupy.empty(n, dtype=numpy.uint8) for n in self.plan.buffers]
        self.slots: dict[Value, int] = {}
        self.static: dict[Value, Any] = {}
        self.copies = self.moved = 0
        for value in inputs:
            self.slot(value)

    def slot(self, value: Value) -> int:
        return self.slots.setdefault(value, len(self.slots))

    def bound(self, value: Value) -> Any:
        """Return the array, or number, of a value if it is always the same one."""
        if value in self.static:
            return self.static[value]
        if isinstance(value, Constant):
            array = value.array
            self.static[value] = backend.to_device(array, self.device) if isinstance(array, numpy.ndarray) else array
            return self.static[value]
        at = self.plan.place.get(value)
        if at is None:
            return None
        array = self.buffers[at][: value.nbytes].view(value.dtype).reshape(value.shape)
        self.static[value] = array
        return array

    def total(self, value: Value) -> Array | None:
        """Return where a sum is written to: memory of its own, or None for what the caller will own."""
        if value in self.plan.fresh:
            self.slot(value)
            return None
        array = self.static[value] = self.cupy.empty(value.shape, dtype=value.dtype)
        return array

    def getter(self, value: Value) -> Get:
        array = self.bound(value)
        if array is not None:
            return lambda _env: array
        slot = self.slot(value)
        return lambda env: env[slot]

    def laid_out(self, array: Any, layout: str, rows: int, columns: int) -> Any:
        """Return an operand as a loop can read it, copied where strides do not say it."""
        if layout == "scalar" or array.flags.c_contiguous:
            return array
        shape = {"full": (rows, columns), "row": (columns,), "column": (rows,)}[layout]
        laid = array if array.shape == shape else array.reshape(shape)
        if layout != "column" and laid.size and laid.strides[-1] != laid.itemsize and laid.shape[-1] > 1:
            laid = self.cupy.ascontiguousarray(laid)
        self.copies += _root(laid) is not _root(array)
        return laid

    def placed(self, parameter: Any) -> Any:
        """Return a static parameter with the arrays in it on the device, so that no call uploads them."""
        if isinstance(parameter, tuple):
            return tuple(map(self.placed, parameter))
        return backend.to_device(parameter, self.device) if isinstance(parameter, numpy.ndarray) else parameter


class Instance:
    """Steps bound to buffers: ``run(arrays) -> outputs``, which are the caller's. Belongs to one call at a time."""

    def __init__(
        self, steps: Sequence[Step], inputs: Sequence[Value], outputs: Sequence[Value], device: Device
    ) -> None:
        self.memory = memory = Memory(steps, inputs, outputs, device)
        self.inputs = len(inputs)
        written = {v for s in steps if isinstance(s, Kernel) for v in (*s.outputs, *s.sums)}
        written |= {v for s in steps if isinstance(s, Call) and s.equation.op.name == "matmul" for v in s.outputs}
        self.fresh = [(memory.slot(v), v.shape, v.dtype) for v in memory.plan.fresh if v in written]
        self.views: list[Action] = []
        self.actions: list[Action] = []
        own = True  # all steps are kernels of ours, or views
        for step, gone in zip(steps, memory.plan.dies, strict=True):
            if isinstance(step, Kernel):
                action: Action | None = _kernel(memory, step)
                own = own and not isinstance(action, _ByOperations)
            else:
                action = _call(memory, step)
                if action is not None:
                    own = own and isinstance(step, View)
                    self.views.append(action)
            if action is not None:
                self.actions.append(action)
            dead = [memory.slots[v] for v in gone if v in memory.slots]
            if dead:
                self.actions.append(_dropping(dead))
        self.results = [(memory.getter(v), copied) for v, copied in zip(outputs, memory.plan.copied, strict=True)]
        self.count = len(memory.slots)
        self.graphs = _Graphs() if own else None

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """Run on the current stream; arrays of the inputs' shapes and dtypes, numbers for those of the host."""
        env: Env = [None] * self.count
        env[: len(arrays)] = arrays
        for slot, shape, dtype in self.fresh:
            env[slot] = self.memory.cupy.empty(shape, dtype=dtype)
        if self.graphs is None or not self.graphs.replayed(self, env):
            for action in self.actions:
                action(env)
        return [_owned(get(env)) if copied else get(env) for get, copied in self.results]


def _owned(value: Any) -> Any:
    return value.copy() if backend.is_cuda_array(value) else value


# -------------------------------------------------------------------------------------------------------------- steps


def _kernel(memory: Memory, step: Kernel) -> Action:
    if isinstance(step, OwnKernel):
        return step.action(memory)
    parts = _codes(step.loop)
    if parts is None:
        return _ByOperations(memory, step)
    actions = [_LoopAction(memory, step, code, outputs, sums) for code, outputs, sums in parts]
    return actions[0] if len(actions) == 1 else _sequence(actions)


def _call(memory: Memory, step: Call) -> Action | None:
    eq = step.equation
    params = {k: memory.placed(v) for k, v in eq.params.items()}
    forward, xp, pointwise = eq.op.forward, memory.xp, eq.op.pointwise
    bound = [memory.bound(v) for v in eq.inputs]
    if isinstance(step, View) and backend.is_cuda_array(bound[0]):
        view = forward(xp, *bound, **params)
        if _root(view) is _root(bound[0]) or not view.size:
            memory.static[eq.outputs[0]] = view
            return None
    gets = [memory.getter(v) for v in eq.inputs]
    if eq.op.name == "matmul":
        return _product(memory, eq.outputs[0], *gets)
    slots = [memory.slot(v) for v in eq.outputs]
    dtypes = [v.dtype for v in eq.outputs]
    fresh = [v in memory.plan.fresh for v in eq.outputs]
    one = eq.op.outputs == 1
    viewing = isinstance(step, View)

    def action(env: Env) -> None:
        given = [get(env) for get in gets]
        if not pointwise:
            given = [a if backend.is_cuda_array(a) else xp.asarray(a) for a in given]
        out = forward(xp, *given, **params)
        for slot, dtype, part, own in zip(slots, dtypes, (out,) if one else out, fresh, strict=True):
            array = part if backend.is_cuda_array(part) else xp.asarray(part, dtype=dtype)
            if array.dtype != dtype:
                array = array.astype(dtype)
            shared = any(_root(array) is _root(a) for a in given if backend.is_cuda_array(a))
            # an op may hand out its argument, or a view of it, whose buffer others are about to use
            if shared and (own or not viewing):
                array, shared = array.copy(), False
            memory.copies += viewing and not shared
            env[slot] = array

    return action


def _product(memory: Memory, out: Value, x: Get, y: Get) -> Action:
    into, matmul = memory.bound(out), memory.cupy.matmul
    slot = -1 if into is not None else memory.slot(out)

    def action(env: Env) -> None:
        matmul(x(env), y(env), out=env[slot] if into is None else into)

    return action


def _root(array: Array) -> Array:
    """Return the array whose memory another is in."""
    return array if array.base is None else array.base


def _dropping(slots: list[int]) -> Action:
    def action(env: Env) -> None:
        for slot in slots:
            env[slot] = None

    return action


def _sequence(actions: Sequence[Action]) -> Action:
    def action(env: Env) -> None:
        for each in actions:
            each(env)

    return action


# -------------------------------------------------------------------------------------------------------------- loops


def _codes(loop: Loop) -> list[tuple[cuda_code.LoopCode, Sequence[int], Sequence[int]]] | None:
    """Return what launches a loop, with the numbers of the outputs and sums that each kernel makes; None if nothing."""
    outputs, sums = range(len(loop.outputs)), range(len(loop.sums))
    along = [k for k in sums if loop.sums[k][1] == "columns"]
    groups: list[tuple[Sequence[int], Sequence[int]]] = [(outputs, sums)]
    if along and any(over == "rows" for _, over in loop.sums):  # by rows and by columns at once are two kernels
        groups = [(outputs, [k for k in sums if k not in along]), ((), along)]
    found = []
    for some_outputs, some_sums in groups:
        part = Loop(loop.inputs, tuple(loop.outputs[k] for k in some_outputs), tuple(loop.sums[k] for k in some_sums))
        code = cuda_code.loop(part)
        if code is None:
            return None
        found.append((code, some_outputs, some_sums))
    return found


class _LoopAction:
    """Launches a loop. Operands and results are bound where they are always the same arrays."""

    def __init__(
        self, memory: Memory, step: Kernel, code: cuda_code.LoopCode, outputs: Sequence[int], sums: Sequence[int]
    ) -> None:
        self.memory, self.code, self.rows, self.columns = memory, code, step.rows, step.columns
        self.layouts = step.loop.inputs
        self.given: list[Any] = []  # what is always the same, None for what a call brings
        self.gets: list[Get | None] = []
        for value, (layout, _) in zip(step.inputs, step.loop.inputs, strict=True):
            array = memory.bound(value)
            if array is not None and layout != "scalar" and not isinstance(value, Constant):
                before = memory.copies
                memory.laid_out(array, layout, self.rows, self.columns)
                if memory.copies != before:  # to be copied in every run
                    self.given.append(None)
                    self.gets.append(memory.getter(value))
                    continue
            if array is not None:
                array = memory.laid_out(array, layout, self.rows, self.columns)
            self.given.append(array)
            self.gets.append(None if array is not None else memory.getter(value))
        self.outputs = [(memory.bound(v), memory.slot(v)) for v in (step.outputs[k] for k in outputs)]
        values = [step.sums[k] for k in sums]
        self.overs = [step.loop.sums[k][1] for k in sums]
        terms = [step.loop.sums[k][0].dtype for k in sums]
        self.sums = [(memory.total(v), memory.slot(v), dtype) for v, dtype in zip(values, terms, strict=True)]
        self.templates: dict[Hashable, Template] = {}

    def __call__(self, env: Env) -> None:
        memory, rows, columns = self.memory, self.rows, self.columns
        inputs = list(self.given)
        key: list[Hashable] = []
        operands: list[tuple[int, Any]] = []
        for k, get in enumerate(self.gets):
            if get is None:
                continue
            layout, dtype = self.layouts[k]
            value = inputs[k] = memory.laid_out(get(env), layout, rows, columns)
            if layout == "scalar":
                operands += number_at(4 + 2 * k, value, dtype)
            else:
                operands.append((4 + 2 * k, value))
                key.append(layout_of(value))
        outputs = []
        at = 4 + 2 * len(inputs)
        for array, slot in self.outputs:
            if array is None:
                array = env[slot]
                operands.append((at, array))
                key.append(layout_of(array))
            outputs.append(array)
            at += 2
        sums, totals, number, casts = [], [], 0, []
        for (array, slot, terms), over in zip(self.sums, self.overs, strict=True):
            target = env[slot] if array is None else array
            if over == "columns" and terms != target.dtype:  # stored in the dtype of its terms
                casts.append((target, target := memory.cupy.empty(target.shape, dtype=terms)))
                memory.copies += 1
            sums.append(target)
            if over == "columns":
                operands.append((at, target))
                at += 1
            else:
                if array is None:
                    totals.append((number, target, 1.0))
                number += 1
        if not rows * columns:
            for target in sums:
                target.fill(0)
        else:
            self._template(tuple(key), inputs, outputs, sums, operands).run(operands, totals)
        for into, source in casts:
            into[...] = source

    def _template(
        self, key: Hashable, inputs: Sequence[Any], outputs: Sequence[Array], sums: Sequence[Array], operands: Any
    ) -> Template:
        found = self.templates.get(key)
        if found is None:
            bound, _ = self.code.bind(inputs, outputs, self.rows, self.columns, sums)
            if len(self.templates) >= LAYOUTS:
                self.templates.clear()
                self.memory.moved += 1
            found = self.templates[key] = Template(bound, frozenset(at for at, _ in operands))
        return found


class _ByOperations:
    """Runs a loop that CUDA code is not written for, operation by operation on CuPy."""

    def __init__(self, memory: Memory, step: Kernel) -> None:
        self.memory, self.step = memory, step
        self.gets = [memory.getter(v) for v in step.inputs]
        self.outputs = [(memory.bound(v), memory.slot(v)) for v in step.outputs]
        self.sums = [(memory.total(v), memory.slot(v)) for v in step.sums]

    def __call__(self, env: Env) -> None:
        step, xp = self.step, self.memory.cupy
        rows, columns = step.rows, step.columns
        shapes = {"full": (rows, columns), "row": (1, columns), "column": (rows, 1), "scalar": ()}
        values: dict[int, Any] = {}
        for e in in_order([*step.loop.outputs, *(e for e, _ in step.loop.sums)]):
            if e.fn == "input":
                value = self.gets[e.value](env)
                layout = step.loop.inputs[e.value][0]
                values[id(e)] = value.reshape(shapes[layout]) if backend.is_cuda_array(value) else value
            elif e.fn == "const":
                values[id(e)] = e.value
            elif e.fn == "cast":
                value = values[id(e.args[0])]
                values[id(e)] = value.astype(e.dtype) if backend.is_cuda_array(value) else e.dtype.type(value)
            else:
                given = [values[id(a)] for a in e.args]
                there = any(map(backend.is_cuda_array, given))
                with numpy.errstate(all="ignore"):
                    values[id(e)] = (getattr(xp, FUNCTIONS[e.fn].__name__) if there else FUNCTIONS[e.fn])(*given)
        for e, (array, slot) in zip(step.loop.outputs, self.outputs, strict=True):
            target = env[slot] if array is None else array
            target.reshape(rows, columns)[...] = values[id(e)]
        axes = {"all": None, "rows": 0, "columns": 1}
        for (e, over), (array, slot) in zip(step.loop.sums, self.sums, strict=True):
            target = env[slot] if array is None else array
            terms = values[id(e)]
            if not backend.is_cuda_array(terms) or terms.shape != (rows, columns):
                terms = xp.broadcast_to(xp.asarray(terms, dtype=e.dtype), (rows, columns))
            target[...] = xp.sum(terms, axis=axes[over], dtype=numpy.float64).reshape(target.shape)


# ------------------------------------------------------------------------------------------------------------- graphs


class _Graphs:
    """CUDA graphs of an instance, by the addresses that a call brings.

    A graph has the addresses it was captured with: of the instance's own buffers, which stay, and of the call's arrays
    and results, which the pool gives out again and again while a program steps. So one is captured when a call's
    addresses come the second time. Copying inputs to fixed places instead would cost the launches that a graph saves.
    Where addresses hardly ever come again, or capturing fails, the launches are made one by one.
    """

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.seen: OrderedDict[Hashable, None] = OrderedDict()
        self.captured = self.replays = self.moved = 0
        self.stopped = False

    def replayed(self, instance: Instance, env: Env) -> bool:
        """Run a call as a graph if its addresses came before. Tells whether it did."""
        if self.stopped:
            return False
        if self.moved != instance.memory.moved:  # a graph has the addresses of what was there
            self.kept.clear()
            self.seen.clear()
            self.moved = instance.memory.moved
        slots = [*range(instance.inputs), *(slot for slot, _, _ in instance.fresh)]
        key = tuple(_address(env[slot]) for slot in slots)
        graph = self.kept.get(key)
        if graph is None:
            if key not in self.seen:
                self.seen[key] = None
                if len(self.seen) > REPEATED:
                    self.seen.popitem(last=False)
                before = instance.memory.copies
                for action in instance.actions:
                    action(env)
                # a copy made on the way would be freed, and its memory given to others, while the graph writes to it
                self.stopped = instance.memory.copies != before
                return True
            if self.captured >= TRIED and self.replays < self.captured:
                self.stopped = True
                return False
            graph = self._captured(instance, list(env))
            if graph is None:
                return False
            self.kept[key] = graph
            if len(self.kept) > GRAPHS:
                self.kept.popitem(last=False)
        else:
            self.replays += 1
            self.kept.move_to_end(key)
        for view in instance.views:
            view(env)
        graph.launch()
        return True

    def _captured(self, instance: Instance, env: Env) -> Any:
        """Return the graph of a call, None where it cannot be captured. Nothing runs."""
        self.captured += 1
        try:
            # not the caller's: the legacy stream cannot be captured
            with instance.memory.cupy.cuda.Stream(non_blocking=True) as stream:
                stream.begin_capture()
                try:
                    for action in instance.actions:
                        action(env)
                finally:
                    graph = stream.end_capture()
        except Exception:  # whatever CUDA has against it: the launches do the same
            self.stopped = True
            return None
        return graph


def _address(value: Any) -> Hashable:
    return (value.data.ptr, value.shape, value.strides) if backend.is_cuda_array(value) else (type(value), value)


# --------------------------------------------------------------------------------------------------------- executable


class DeviceProgram:
    """Steps ready to run on a GPU by several threads and on several streams at once."""

    def __init__(
        self,
        steps: Sequence[Step],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        device: Device,
        text: Callable[[], str],
        after: Any = None,
    ) -> None:
        self.steps, self.inputs, self.outputs, self.device, self.text = steps, inputs, outputs, device, text
        # constants that capture computed are there after this, whatever the stream that uses them
        self.after = backend.mark(device) if after is None else after
        self.idle: OrderedDict[Hashable, list[Instance]] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        """Run on the current stream of the device; results are the caller's. Waits for nothing."""
        with backend.activate(self.device):
            key = backend.stream_key()
            with self.lock:
                kept = self.idle.get(key)
                instance = kept.pop() if kept else None
            if instance is None:
                backend.follow(self.after)
                instance = Instance(self.steps, self.inputs, self.outputs, self.device)
            results = instance.run(arrays)  # an instance in which something failed is not used again
            with self.lock:
                self.idle.setdefault(key, []).append(instance)
                self.idle.move_to_end(key)
                while len(self.idle) > STREAMS:
                    self.idle.popitem(last=False)
        return results

    def release(self) -> int:
        """Let the buffers go that no call is using; return how many sets there were."""
        with self.lock:
            count = sum(map(len, self.idle.values()))
            self.idle.clear()
        return count


def executable(program: Program, device: Device, after: Any = None) -> DeviceProgram:
    """Return a program ready to run on a GPU. after: an event after which its constants are there, by default now."""
    steps = Fuser(program).steps
    return DeviceProgram(steps, program.inputs, program.outputs, device, lambda: describe(program, steps), after)
