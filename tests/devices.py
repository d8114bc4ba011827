"""Where a test runs: on the CPU, on the stand-in for CuPy, on a GPU.

A test with the argument `device` runs on each of them that is there (conftest gives it a `Place`). A module of such
tests imports `test_device_is_there`, which skips with the reason for each that is not, and fails for a GPU under
GPUGRAD_REQUIRE_GPU=1. The assertions here compare numbers wherever they are.
"""

import functools
import shutil
from typing import Any

import numpy as np
import numpy.testing
from cuda_proof import stand_in

from gpugrad import backend
from gpugrad.tensor import Tensor

KINDS = ("cpu", "stand-in", "cuda")


@functools.cache
def problem(kind: str) -> str | None:
    """Say why nothing can run on a kind of device here, or None when it can."""
    if kind == "cuda":
        return backend.cuda_problem()
    if kind == "stand-in":
        if shutil.which("g++") is None:
            return "the stand-in for CuPy runs CUDA kernels through g++, which is not installed"
        return stand_in.problem()
    return None


class Place(str):
    """A device for a test: a string that gpugrad takes, and the ways there and back.

    kind: one of KINDS. cupy: the module in whose arrays the device computes, None for the CPU.
    """

    kind: str
    cupy: Any

    def __new__(cls, kind: str, cupy: Any = None, number: int = 0) -> "Place":
        self = super().__new__(cls, "cpu" if kind == "cpu" else f"cuda:{number}")
        self.kind, self.cupy = kind, cupy
        return self

    @property
    def on_cpu(self) -> bool:
        return self.kind == "cpu"

    @property
    def ndarray(self) -> type:
        """The class of plain arrays there."""
        return np.ndarray if self.cupy is None else self.cupy.ndarray

    @property
    def array_types(self) -> tuple[type, ...]:
        """What an operation on plain arrays may return there: on the CPU NumPy's scalars too."""
        return (np.ndarray, np.generic) if self.cupy is None else (self.cupy.ndarray,)

    def put(self, data: Any, dtype: Any = None) -> Any:
        """Copy host data (an array, numbers, nested lists) into a plain array there; tuples one by one."""
        if isinstance(data, tuple):
            return tuple(self.put(part, dtype) for part in data)
        array = np.array(data, dtype=dtype)
        return array if self.cupy is None else backend.asarray(array, where=backend.Device(self))


CPU = Place("cpu")


def host(value: Any) -> Any:
    """Return numbers from any device on the host; in sequences one by one."""
    if type(value) is Tensor:
        return value.numpy()
    if backend.is_cuda_array(value):
        return value.get()
    if isinstance(value, (list, tuple)) and any(type(v) is Tensor or backend.is_cuda_array(v) for v in value):
        return [host(v) for v in value]
    return value


def assert_allclose(got: Any, want: Any, *args: Any, **kwargs: Any) -> None:
    numpy.testing.assert_allclose(host(got), host(want), *args, **kwargs)


def assert_array_equal(got: Any, want: Any, **kwargs: Any) -> None:
    numpy.testing.assert_array_equal(host(got), host(want), **kwargs)


def shares_memory(a: Any, b: Any) -> bool:
    """Tell whether two arrays overlap: exactly on the host, by the range of their addresses on a device."""
    if not (backend.is_cuda_array(a) and backend.is_cuda_array(b)):
        return not backend.is_cuda_array(a) and not backend.is_cuda_array(b) and np.shares_memory(a, b)
    (low, high), (other_low, other_high) = _range(a), _range(b)
    return low < other_high and other_low < high


def _range(array: Any) -> tuple[int, int]:
    if not array.size:
        return 0, 0
    ends = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    start = array.data.ptr
    return start + sum(e for e in ends if e < 0), start + sum(e for e in ends if e > 0) + array.itemsize


def test_device_is_there(every_device: Place) -> None:
    """The tests of this module run there too."""
