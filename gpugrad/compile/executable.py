"""A program ready to run on a device, by several threads at once."""

import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import numpy

from gpugrad import backend
from gpugrad.backend import Device
from gpugrad.compile import cpu_code, cuda_rows
from gpugrad.compile.cpu import Instance, Outputs, fused
from gpugrad.compile.cpu_rows import OPERAND_BYTES, RowProgram, rows_of
from gpugrad.compile.plan import plan
from gpugrad.compile.program import Constant, Equation, Program, Value
from gpugrad.compile.rows import NotByRows, split
from gpugrad.compile.text import describe
from gpugrad.threads import single_threaded_blas

DATA_BYTES = 1 << 16  # of an array that a function closes over, from which on it is data and no constant
LARGE_BYTES = 1 << 20  # of data or of what is kept from step to step, above which work by rows pays
TINY_FLOPS = 5e5  # of one product
SMALL_FLOPS = 2e7  # of all products of a program: a fraction of a millisecond


def _flops(eq: Equation) -> float:
    """Return multiplications and additions of a matrix product, 0 for another op."""
    if eq.op.name != "matmul":
        return 0.0
    return 2.0 * eq.outputs[0].size * (eq.inputs[0].shape or (1,))[-1]


class Executable(Protocol):
    """Runs a program: arrays of its inputs' shapes and dtypes to the arrays of its outputs, which the caller owns."""

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        """Run."""

    def text(self) -> str:
        """Return operations, fused loops, buffers and bytes moved as text."""


class _Whole:
    """A program on the CPU whose values are as long as they are. Each concurrent call has buffers of its own."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.steps = fused(program)
        self.threads = backend.available_cores()
        self.memory = Outputs()
        self.idle: list[Instance] = []
        self.lock = threading.Lock()
        self.kept = sum(plan(self.steps, program.inputs, program.outputs).buffers)  # bytes from step to step
        # below this, what threads gain a product they lose in meeting; the smallest get one thread from BLAS itself
        flops = [_flops(eq) for eq in program.equations]
        self.alone = max(flops, default=0) >= TINY_FLOPS and sum(flops) < SMALL_FLOPS

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        with single_threaded_blas() if self.alone else nullcontext():
            return self._run(arrays)

    def _run(self, arrays: Sequence[Any]) -> list[Any]:
        with self.lock:
            instance = self.idle.pop() if self.idle else None
        if instance is None:
            instance = Instance(self.steps, self.program.inputs, self.program.outputs, self.threads, self.memory)
        try:
            return instance.run(arrays)
        finally:
            with self.lock:
                self.idle.append(instance)

    def text(self) -> str:
        return describe(self.program, self.steps)


class _ByRows:
    """A program on the CPU that is a sum over rows, or works on each alone: a block of rows at a time."""

    def __init__(self, run: RowProgram) -> None:
        self.run, self.rows = run, run.parts.rows
        self.threads = backend.available_cores()

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        return self.run.run(list(arrays), self.rows, self.threads)

    def text(self) -> str:
        return self.run.text(self.threads)


class _Checked:
    """Gives an executable arrays in the machine's byte order, and numbers as arrays."""

    def __init__(self, run: Any, program: Program) -> None:
        self.run, self.dtypes = run, [v.dtype.newbyteorder("=") for v in program.inputs]
        self.text = run.text
        self.fresh = True

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        if self.fresh:  # its loops compile when they first run
            self.fresh = False
            with cpu_code.compiling():
                return self(arrays)
        results: list[Any] = self.run([numpy.asarray(a, dtype) for a, dtype in zip(arrays, self.dtypes, strict=True)])
        return results


class _WithData:
    """Gives an executable the large arrays that the function closed over, which are arguments to it like others."""

    def __init__(self, run: Executable, arrays: list[Any]) -> None:
        self.run, self.arrays = run, arrays
        self.text = run.text

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        return self.run([*arrays, *self.arrays])


def executable(program: Program, device: Device) -> Executable:
    """Return a program ready to run on a device."""
    if device.kind == "cpu":
        program, numbers = _with_numbers(program)
        if numbers:
            return _WithData(executable(program, device), numbers)
    used = dict.fromkeys(v for eq in program.equations for v in eq.inputs)
    if device.kind == "cuda":  # one pass over the rows is fewer launches, however few rows there are
        large = [v for v in used if isinstance(v, Constant) and v.size > 1 and backend.is_cuda_array(v.array)]
    else:
        large = [v for v in used if isinstance(v, Constant) and v.nbytes >= DATA_BYTES]
    data: dict[Value, Value] = {v: Value(v.shape, v.dtype) for v in large}
    if not data:
        return _executable(program, device)
    equations = [replace(eq, inputs=tuple(data.get(v, v) for v in eq.inputs)) for eq in program.equations]
    opened = Program((*program.inputs, *data.values()), equations, program.outputs, program.name)
    return _WithData(_executable(opened, device), [v.array for v in large])


_SPREADING = frozenset({"broadcast_to", "reshape"})
_KNOWN = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0)  # numbers that simplify what they are in


def _with_numbers(program: Program) -> tuple[Program, list[Any]]:
    """Return a program whose floating-point constants are arguments, and those constants.

    Such as one divided by the number of rows: kernels are then the same for every number, and compiled once.
    """
    taken: dict[Any, Value] = {}
    numbers: list[Any] = []

    def opened(eq: Equation, position: int, value: Value) -> Value:
        if not isinstance(value, Constant) or value.size != 1 or not (eq.op.pointwise or eq.op.name in _SPREADING):
            return value
        if eq.outputs[0].dtype not in (numpy.float32, numpy.float64) or (eq.op.name == "pow" and position):
            return value
        if value.dtype.kind != "f" and not (value.weak and value.dtype.kind == "i"):
            return value
        number = float(numpy.asarray(value.array).reshape(()))
        if number in _KNOWN or not math.isfinite(number):
            return value
        dtype = numpy.dtype("float64") if value.weak else value.dtype
        key = (number, dtype, value.weak, value.shape)
        if key not in taken:
            taken[key] = Value(value.shape, dtype, value.weak)
            numbers.append(numpy.full(value.shape, number, dtype))
        return taken[key]

    equations = [
        replace(eq, inputs=tuple(opened(eq, k, v) for k, v in enumerate(eq.inputs)))
        if eq.op.name in _SPREADING or any(v.dtype.kind == "f" for v in eq.inputs if not isinstance(v, Constant))
        else eq
        for eq in program.equations
    ]
    if not numbers:
        return program, []
    return Program((*program.inputs, *taken.values()), equations, program.outputs, program.name), numbers


def _executable(program: Program, device: Device) -> Executable:
    if device.kind == "cuda":
        return cuda_rows.compiled(program, device)
    whole = _Whole(program)
    rows = rows_of(program)
    # Small data stays in cache anyway, and one loop over everything is by blocks already.
    if rows is not None and max(whole.kept, sum(v.nbytes for v in program.inputs)) > LARGE_BYTES:
        try:
            by_rows = RowProgram(split(program, rows))
        except NotByRows:
            return _Checked(whole, program)
        if by_rows.kernel is not None or whole.kept > OPERAND_BYTES:
            return _Checked(_ByRows(by_rows), program)
    return _Checked(whole, program)
