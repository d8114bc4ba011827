"""Memory for the steps of a program: which value lives in which buffer, from when to when.

Every kernel and product writes to memory that is there before it runs. A buffer is free again after the last step that
reads it, or a view of it, and the next value takes it; buffers are made once and kept for the next run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gpugrad.compile.fuse import Kernel, Step, View
from gpugrad.compile.program import Constant, Value

ALIGN = 64


@dataclass(eq=False)
class Plan:
    """Where values live. buffers: bytes of each; place: the buffer of a value; dies: values to let go after each step.

    fresh: values that the caller will own, each to be given new memory. copied: outputs that are no memory of their
    own (an argument, a constant, an output named twice, or a view), to be copied at the end.
    """

    buffers: list[int]
    place: dict[Value, int]
    dies: list[list[Value]]
    fresh: list[Value]
    copied: list[bool]


def writes_in_place(step: Step) -> bool:
    """Tell whether a step takes memory for its results."""
    return isinstance(step, Kernel) or step.equation.op.name == "matmul"


def plan(steps: Sequence[Step], inputs: Sequence[Value], outputs: Sequence[Value]) -> Plan:
    """Assign buffers to what steps write, reusing them by liveness."""
    base: dict[Value, Value] = {}
    for step in steps:
        for value in step.outputs:
            base[value] = base.get(step.inputs[0], step.inputs[0]) if isinstance(step, View) else value
        if isinstance(step, Kernel):
            base.update((value, value) for value in step.sums)
    last: dict[Value, int] = {}
    for k, step in enumerate(steps):
        for value in step.inputs:
            last[base.get(value, value)] = k
    fresh: list[Value] = []
    copied: list[bool] = []
    written = {v for s in steps if writes_in_place(s) for v in s.outputs}
    for value in outputs:
        own = (
            value not in inputs and not isinstance(value, Constant) and base.get(value) is value and value not in fresh
        )
        copied.append(not own)
        if own:
            fresh.append(value)
        last[base.get(value, value)] = len(steps)
    buffers: list[int] = []
    free: list[int] = []
    place: dict[Value, int] = {}
    dies: list[list[Value]] = []
    for k, step in enumerate(steps):
        for value in step.outputs:
            if value in written and value not in fresh:
                place[value] = _taken(free, buffers, value.nbytes)
        gone = [v for v, when in last.items() if when == k]
        gone += [v for v in step.outputs if base[v] is v and v not in last]
        free.extend(place[v] for v in gone if v in place)
        dies.append([v for v in gone if v not in place])
    return Plan(buffers, place, dies, fresh, copied)


def _taken(free: list[int], buffers: list[int], nbytes: int) -> int:
    """Return a free buffer that fits best, grown if it must be, or a new one."""
    need = -(-nbytes // ALIGN) * ALIGN
    fitting = [b for b in free if buffers[b] >= need]
    if fitting:
        best = min(fitting, key=lambda b: buffers[b])
    elif free:
        best = max(free, key=lambda b: buffers[b])
        buffers[best] = need
    else:
        buffers.append(need)
        return len(buffers) - 1
    free.remove(best)
    return best
