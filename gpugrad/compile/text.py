"""What a captured program does, as text for people: operations, fused loops, buffers, bytes moved."""

from collections.abc import Sequence

from gpugrad.compile.fuse import Kernel, Step, View
from gpugrad.compile.kernels import RowPass
from gpugrad.compile.plan import Plan, plan
from gpugrad.compile.program import Constant, Program, Value
from gpugrad.compile.scalar import Expr, in_order


def describe(program: Program, steps: Sequence[Step]) -> str:
    """Return the equations of a program, and the steps and buffers they become."""
    lines = [*program.lines(), "", *step_lines(program, steps, plan(steps, program.inputs, program.outputs))]
    return "\n".join(lines)


def step_lines(program: Program, steps: Sequence[Step], made: Plan) -> list[str]:
    """Return a line or two a step, with the bytes it reads and writes, and the buffers at the end."""
    name = program.name_of
    lines = [f"steps of {program.name}"]
    moved = 0
    for step in steps:
        sums: tuple[Value, ...] = step.sums if isinstance(step, Kernel) else ()
        nbytes = 0 if isinstance(step, View) else _bytes((*step.inputs, *step.outputs, *sums))
        moved += nbytes
        left = ", ".join(f"{name(v)}{_where(v, made)}" for v in (*step.outputs, *sums))
        inputs = ", ".join(map(name, step.inputs))
        if isinstance(step, Kernel):
            lines.append(f"  {left} = loop {step.rows} x {step.columns} ({inputs})   {_shown(nbytes)}")
            names = dict(enumerate(map(name, step.inputs)))
            lines += [
                f"      {name(v)} = {formula(e, names)}" for v, e in zip(step.outputs, step.loop.outputs, strict=True)
            ]
            lines += [
                f"      {name(v)} = sum over {over} of {formula(e, names)}"
                for v, (e, over) in zip(step.sums, step.loop.sums, strict=True)
            ]
        else:
            what = "view, " if isinstance(step, View) else ""
            lines.append(f"  {left} = {what}{step.equation.op.name}({inputs})   {_shown(nbytes)}")
    lines.append(f"  {_shown(moved)} moved; {len(made.buffers)} buffers, {_shown(sum(made.buffers))}")
    return lines


def pass_lines(kernel: RowPass, rows: str = "rows") -> list[str]:
    """Return what a one-pass kernel does."""
    names = {}
    for j, m in enumerate(kernel.products):
        names[j] = f"(X{m} @ w{j})"
    for k in range(len(kernel.columns)):
        names[len(kernel.products) + k] = f"column{k}"
    for k in range(len(kernel.scalars)):
        names[len(kernel.products) + len(kernel.columns) + k] = f"scalar{k}"
    shapes = ", ".join(f"X{m}: {dtype} {rows} x {p}" for m, (dtype, p) in enumerate(kernel.matrices))
    lines = [f"one pass over {rows}: {shapes}"]
    lines += [f"  sum += {formula(e, names)}" for e in kernel.sums]
    lines += [f"  vector += X{m} * ({formula(e, names)})" for m, e in kernel.back]
    lines += [f"  row result = {formula(e, names)}" for e in kernel.outputs]
    return lines


_SIGNS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
}
_LONG = 400


def formula(e: Expr, names: dict[int, str]) -> str:
    """Return an expression as it would be written by hand; a long one is cut."""
    shown: dict[int, str] = {}
    for part in in_order([e]):
        args = [shown[id(a)] for a in part.args]
        if part.fn == "input":
            text = names.get(part.value, f"in{part.value}")
        elif part.fn == "const":
            text = f"{part.value.item():g}" if part.dtype.kind == "f" else str(part.value.item())
        elif part.fn in _SIGNS:
            text = f"({args[0]} {_SIGNS[part.fn]} {args[1]})"
        elif part.fn == "cast":
            text = f"{part.dtype}({args[0]})"
        elif part.fn == "neg":
            text = f"-{args[0]}"
        else:
            text = f"{part.fn}({', '.join(args)})"
        shown[id(part)] = text if len(text) < _LONG else text[: _LONG - 4] + " ..."
    text = shown[id(e)]
    return text[1:-1] if text.startswith("(") and text.endswith(")") and e.fn in _SIGNS else text


def _bytes(values: Sequence[Value]) -> int:
    return sum(v.nbytes for v in dict.fromkeys(values) if not (isinstance(v, Constant) and not v.ndim))


def _where(value: Value, made: Plan) -> str:
    at = made.place.get(value)
    return f" [buffer {at}]" if at is not None else ""


def _shown(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} B"
