"""A program ready to run on a device, by several threads at once."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy

from gpugrad import backend
from gpugrad.backend import Device
from gpugrad.compile.cpu import Instance, Outputs
from gpugrad.compile.fuse import Fuser
from gpugrad.compile.program import Program


class Executable:
    """Runs a program on the CPU: ``executable(arrays) -> arrays``. Each concurrent call has buffers of its own."""

    def __init__(self, program: Program, threads: int | None = None) -> None:
        self.program = program
        self.fused = Fuser(program)
        self.threads = threads or backend.available_cores()
        self.memory = Outputs()
        self.idle: list[Instance] = []
        self.lock = threading.Lock()

    def __call__(self, arrays: Sequence[Any]) -> list[Any]:
        """Return the outputs for arrays of the inputs' shapes and dtypes."""
        with self.lock:
            instance = self.idle.pop() if self.idle else None
        if instance is None:
            instance = Instance(self.fused.steps, self.program.inputs, self.program.outputs, self.threads, self.memory)
        given = [numpy.asarray(a, dtype=v.dtype) for a, v in zip(arrays, self.program.inputs, strict=True)]
        try:
            return instance.run(given)
        finally:
            with self.lock:
                self.idle.append(instance)

    def text(self) -> str:
        """Return the program, its steps, buffers and the bytes they move, as text."""
        return "\n".join(self.program.lines())


def executable(program: Program, device: Device) -> Executable:
    """Return a program ready to run on a device."""
    return Executable(program)
