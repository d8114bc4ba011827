"""The device layer: NumPy on the CPU, CuPy on CUDA, reached through this one place.

CuPy is imported only when a device string or an array asks for it. Nothing here copies between
devices unless it was asked to by name (`to_device`, or `asarray` with a device).
"""

import functools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy

from gpugrad.errors import DeviceMismatch, DeviceUnavailable, GpugradError

Array = Any  # numpy.ndarray | numpy.generic | cupy.ndarray: CuPy may not be installed
Namespace = Any

# What NumPy computes with directly: arrays, its own scalars, Python numbers.
HOST_TYPES = frozenset({numpy.ndarray, bool, int, float, complex, *numpy.sctypeDict.values()})

PLAIN = frozenset({list, tuple, bool, int, float, complex})  # what holds no array of another library by itself


class Device(str):
    """A place for arrays: ``"cpu"`` or ``"cuda:N"``. Compares equal to its own string.

    kind: ``"cpu"`` or ``"cuda"``. number: which of its kind, 0 for the CPU.
    """

    kind: str
    number: int

    def __new__(cls, spec: str) -> "Device":
        self = super().__new__(cls, spec)
        kind, _, number = spec.partition(":")
        self.kind, self.number = kind, int(number or 0)
        return self


CPU = Device("cpu")


class Abstract:
    """Base of what stands for an array that is not there: shape and dtype without values, while a function is captured.

    place: the device it will be on. apply(op, args, params): what an op does with it, instead of computing.
    """

    __slots__ = ("place",)

    place: Device

    def apply(self, op: Any, args: Any, params: dict[str, Any]) -> Any:
        """Return the result of an op on arguments of which this is one."""
        raise NotImplementedError


# glibc gives memory above 128 KiB back to the system with every free, and each new array of that size then pays
# for its page faults: ten times what the arithmetic costs. Freeing one block of 31 MiB (never touched, so never
# really there) makes malloc raise that limit for good and keep up to 64 MiB for reuse. Elsewhere it does nothing.
numpy.empty(31 << 20, numpy.uint8)  # freed at once


class _Default(threading.local):
    device = CPU


_default = _Default()


def cupy() -> Any:
    """Return the CuPy module, importing it on first use.

    Raises DeviceUnavailable when it is not installed.
    """
    try:
        import cupy as module
    except ImportError as error:
        raise DeviceUnavailable(
            f"device 'cuda' needs CuPy, which cannot be imported ({error}); "
            'install it with: pip install "gpugrad[cuda13]" (or [cuda12] for CUDA 12 drivers)'
        ) from None
    return module


def _loaded_cupy() -> Any | None:
    """CuPy if something has imported it already: an array of its own can exist only then."""
    return sys.modules.get("cupy")


@functools.cache
def _cupy_namespace(module: Any) -> Namespace:
    # CuPy lacks some standard names; array-api-compat adds them without wrapping the arrays.
    import array_api_compat.cupy as namespace

    del module  # the cache key: a replaced CuPy gets a namespace of its own
    return namespace


def cuda_problem() -> str | None:
    """Say why CUDA cannot be used here, or None when it can."""
    try:
        module = cupy()
    except DeviceUnavailable as error:
        return str(error)
    try:
        count = module.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's CUDARuntimeError, or a missing driver library
        return f"device 'cuda' is not usable: {error}; install an NVIDIA driver and check that nvidia-smi lists a GPU"
    if count == 0:
        return "device 'cuda' is not usable: the driver reports no GPU; check CUDA_VISIBLE_DEVICES"
    return None


def as_device(spec: str | None) -> Device:
    """Turn ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or None (the default device) into a Device that is there.

    ``"auto"`` is a GPU if there is one, else the CPU (with a RuntimeWarning, once, where GPUGRAD_EXPECT_GPU=1);
    ``"cuda"`` is CuPy's current device.
    Raises ValueError for another string, DeviceUnavailable for a device that is not there.
    """
    if spec is None:
        return _default.device
    if spec == "cpu":
        return CPU
    if spec == "auto":
        problem = cuda_problem()
        if problem is None:
            return as_device("cuda")
        if os.environ.get("GPUGRAD_EXPECT_GPU") == "1":
            _warn_of_fallback(problem)
        return CPU
    kind, _, number = str(spec).partition(":")
    if not isinstance(spec, str) or kind != "cuda" or (":" in spec and not number.isdecimal()):
        raise ValueError(f"unknown device {spec!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:N'")
    problem = cuda_problem()
    if problem:
        raise DeviceUnavailable(problem)
    runtime = cupy().cuda.runtime
    index = int(number) if number else int(runtime.getDevice())
    count = int(runtime.getDeviceCount())
    if index >= count:
        raise DeviceUnavailable(f"device 'cuda:{index}' is not there: the driver lists {count} GPU(s), cuda:0 onwards")
    return Device(f"cuda:{index}")


@functools.cache  # once a process for each reason
def _warn_of_fallback(problem: str) -> None:
    warnings.warn(f"no GPU, computing on the CPU: {problem}", RuntimeWarning, stacklevel=3)


def available_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_device() -> Device:
    """Return the default device of this thread, on which `gpugrad.tensor` and the creation functions place arrays."""
    return _default.device


@contextmanager
def device(spec: str) -> Iterator[Device]:
    """Make `spec` this thread's default device inside a ``with`` block.

    Raises as `as_device` does.
    """
    chosen, before = as_device(spec), _default.device
    _default.device = chosen
    try:
        with activate(chosen):
            yield chosen
    finally:
        _default.device = before


def activate(where: Device) -> Any:
    """Context in which kernels launch on `where` (CuPy launches on the current device, not on the arrays' own)."""
    return nullcontext() if where.kind == "cpu" else cupy().cuda.Device(where.number)


def where_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function composed of plain operators compute on the device of its first argument (array or Tensor)."""

    @functools.wraps(function)
    def there(x: Any, *rest: Any, **params: Any) -> Any:
        if not is_cuda_array(array := getattr(x, "_data", x)):
            return function(x, *rest, **params)
        with activate(device_of(array)):
            return function(x, *rest, **params)

    return there


def is_cuda_array(obj: object) -> bool:
    """Tell whether `obj` is a cupy.ndarray, without importing CuPy."""
    module = _loaded_cupy()
    return module is not None and isinstance(obj, module.ndarray)


def is_array(obj: object) -> bool:
    """Tell whether `obj` is an array of either backend (NumPy scalars count), or stands for one."""
    return isinstance(obj, (numpy.ndarray, numpy.generic, Abstract)) or is_cuda_array(obj)


def device_of(array: Array) -> Device:
    """Return the device an array lives on. Python numbers and NumPy scalars count as the CPU's."""
    if isinstance(array, Abstract):
        return array.place
    return Device(f"cuda:{array.device.id}") if is_cuda_array(array) else CPU


def namespace(array: Array) -> Namespace:
    """Return the module that computes on `array`: numpy, or CuPy under the standard's names."""
    if isinstance(array, Abstract):
        return namespace_of_device(array.place)
    return _cupy_namespace(_loaded_cupy()) if is_cuda_array(array) else numpy


def namespace_of_device(where: Device) -> Namespace:
    """Return the module that computes on a device."""
    return numpy if where.kind == "cpu" else _cupy_namespace(cupy())


def place(operation: str, values: list[Any]) -> tuple[Namespace, Device, list[Any]]:
    """Find where an operation runs: namespace, device, and its operands as plain arrays or numbers.

    Raises DeviceMismatch when arrays of two devices meet, TypeError for something that is no array or number.
    """
    where: Device | None = None
    first = 0
    clean = []
    for position, value in enumerate(values):
        if is_cuda_array(value) or isinstance(value, Abstract):
            here = device_of(value)
        elif isinstance(value, numpy.ndarray):
            value = host_array(value, f"{operation}: argument {position}")
            here = CPU
        elif isinstance(value, (numpy.generic, bool, int, float, complex)):
            clean.append(value)  # a number goes to the kernel by value, on any device
            continue
        else:
            raise TypeError(
                f"{operation}: argument {position} is a {type(value).__name__}; "
                "expected a Tensor, an array or a number (gpugrad.tensor makes one from a list)"
            )
        clean.append(value)
        if where is None:
            where, first = here, position
        elif here != where:
            raise DeviceMismatch(
                f"{operation}: argument {first} is on {where!s}, argument {position} on {here!s}; gpugrad never copies "
                f"between devices unasked: move one with gpugrad.asarray(array, device={str(where)!r})"
            )
    where = CPU if where is None else where
    return namespace_of_device(where), where, clean


def select(condition: Array, array: Array) -> Array:
    """Return `array` where the boolean `condition` of its shape holds, exactly 0 elsewhere (also for NaN and inf).

    On the CPU without a branch an element: by mask on the bits, ten times faster than numpy.where on random masks.
    """
    if isinstance(condition, numpy.bool_):
        return array if condition else namespace(array).zeros_like(array)
    if isinstance(array, numpy.ndarray) and array.ndim and array.dtype in _BITS:
        bits = _BITS[array.dtype]
        if condition.shape == array.shape and array.flags.c_contiguous and condition.flags.c_contiguous:
            mask = condition.astype(bits)
            numpy.negative(mask, out=mask)
            mask &= array.view(bits)
            return mask.view(array.dtype)
    return namespace(array).where(condition, array, 0)


_BITS = {numpy.dtype(f"f{n}"): numpy.dtype(f"i{n}") for n in (2, 4, 8)}


def host_array(array: numpy.ndarray[Any, Any], what: str) -> numpy.ndarray[Any, Any]:
    """Return a numpy.ndarray of numbers without its subclass (memmap, matrix), sharing the memory.

    Raises TypeError for a masked array and for anything but numbers.
    """
    if isinstance(array, numpy.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array, whose mask gpugrad would lose; fill it first")
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{what} has dtype {array.dtype}; expected numbers or booleans, cast it first")
    return numpy.asarray(array)


def to_device(array: Array, where: Device) -> Array:
    """Return `array` on another device: itself when it is there already, else a copy."""
    here = device_of(array)
    if here == where:
        return array
    if where.kind == "cpu":
        return cupy().asnumpy(array)
    with activate(where):
        return cupy().asarray(array)


def fetch(xp: Namespace, *values: Any) -> list[Any]:
    """Return numbers and arrays as float64 on the host, all in one transfer; what NumPy has, as it is."""
    if xp is numpy:
        return list(values)
    arrays = [value if is_cuda_array(value) else xp.asarray(value, dtype=xp.float64) for value in values]
    flat = to_device(xp.concat([array.reshape(-1) for array in arrays]), CPU).astype(numpy.float64, copy=False)
    ends = numpy.cumsum([array.size for array in arrays])[:-1]
    return [part.reshape(array.shape) for part, array in zip(numpy.split(flat, ends), arrays, strict=True)]


# ------------------------------------------------------------------------------------------------ memory of a GPU


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that a GPU's memory is full, from CuPy's pool or a library below it."""
    module = _loaded_cupy()
    if module is None:
        return False
    return isinstance(error, module.cuda.memory.OutOfMemoryError) or (
        type(error).__name__ in ("CUDARuntimeError", "CUDADriverError", "CUBLASError", "CUSOLVERError")
        and any(sign in str(error) for sign in ("cudaErrorMemoryAllocation", "OUT_OF_MEMORY", "ALLOC_FAILED"))
    )


def memory(where: Device) -> tuple[int, int]:
    """Return the bytes of a GPU's memory that CuPy can still hand out, and those there are in all."""
    module = cupy()
    with activate(where):
        free, total = module.cuda.runtime.memGetInfo()
        pool = module.get_default_memory_pool()
        free += pool.free_bytes()
        limit = pool.get_limit()
        if limit:
            free, total = min(free, limit - pool.used_bytes()), min(total, limit)
    return max(int(free), 0), int(total)


def release_memory(where: Device) -> None:
    """Give back to a GPU what CuPy's pool keeps of its memory for later."""
    with activate(where):
        cupy().get_default_memory_pool().free_all_blocks()


def release_pinned() -> None:
    """Give back to the system what CuPy's pool keeps of pinned memory for later."""
    cupy().get_default_pinned_memory_pool().free_all_blocks()


def mark(where: Device) -> Any:
    """Return an event at what has been launched on the current stream of a GPU so far."""
    cuda = cupy().cuda
    with activate(where):
        event = cuda.Event(disable_timing=True)
        event.record()
    return event


def follow(event: Any) -> None:
    """Let the current stream of the current GPU wait for an event; the host does not wait."""
    cupy().cuda.get_current_stream().wait_event(event)


def stream_key() -> tuple[int, int]:
    """Return what tells the current stream of the current GPU from others that are there at the same time."""
    stream = int(cupy().cuda.get_current_stream().ptr)
    return stream, threading.get_ident() if stream == _PER_THREAD else 0


_PER_THREAD = 2  # CUDA's handle for the default stream of a thread, the same in every thread


def empty_pinned(shape: tuple[int, ...], dtype: Any) -> numpy.ndarray[Any, Any]:
    """Return host memory that a GPU copies from by itself, while the host goes on."""
    cupy()  # for its error
    import cupyx

    array: numpy.ndarray[Any, Any] = cupyx.empty_pinned(shape, dtype)
    return array


def asarray(obj: Any, dtype: Any = None, where: Device | None = None, copy: bool | None = None) -> Array:
    """Return `obj` (array, nested list, number) as an array on `where`, or for None where it is, lists on the default.

    Arrays of other libraries come by DLPack or `__cuda_array_interface__`, sharing their memory. `copy` has the
    standard's meaning: True always copies, False never does (ValueError where a copy is needed).
    """
    if type(obj) not in PLAIN and not is_array(obj):
        obj = _taken_over(obj)
    if where is None:
        where = device_of(obj) if is_array(obj) else _default.device
    if is_cuda_array(obj):
        if device_of(obj) != where:
            if copy is False:
                raise ValueError(f"copy=False, but moving from {device_of(obj)} to {where} needs a copy")
            obj, copy = to_device(obj, where), None
        if where.kind == "cuda":
            with activate(where):
                return _as_typed(obj, dtype, copy)
        return _as_typed(obj, dtype, copy)
    if isinstance(obj, numpy.ndarray):
        obj = host_array(obj, "asarray: the input")
    if where.kind == "cpu":
        return host_array(numpy.array(obj, dtype=dtype, copy=copy), "asarray: the result")
    if copy is False:
        raise ValueError(f"copy=False, but host data cannot be used on {where} without a copy")
    return to_device(host_array(numpy.asarray(obj, dtype=dtype), "asarray: the result"), where)


def _taken_over(obj: Any) -> Any:
    """Return an array of another library as one of NumPy or CuPy in the same memory; any other object as it is.

    Raises TypeError for what they have no dtype for, or what its library does not hand out.
    """
    try:
        if hasattr(obj, "__dlpack_device__"):
            kind, number = obj.__dlpack_device__()
            if kind in _DLPACK_HOST:
                return numpy.from_dlpack(obj)
            if kind in _DLPACK_CUDA:
                with activate(Device(f"cuda:{int(number)}")):
                    return cupy().from_dlpack(obj)
        elif hasattr(obj, "__cuda_array_interface__"):
            return cupy().asarray(obj)
        else:
            return obj
    except GpugradError:
        raise
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"asarray: a {type(obj).__module__}.{type(obj).__qualname__} of dtype {getattr(obj, 'dtype', None)} cannot "
            f"be taken over ({error}); cast it to float32, say, detach it, or bring it to the CPU first"
        ) from None
    raise TypeError(f"asarray: a {type(obj).__qualname__} on DLPack device type {int(kind)}; expected the CPU or CUDA")


# DLPack's device types: memory the host reads (its own, and pinned), and memory CUDA reads (its own, and managed)
_DLPACK_HOST, _DLPACK_CUDA = (1, 3), (2, 13)
DLPACK_CPU = (1, 0)


def _as_typed(array: Array, dtype: Any, copy: bool | None) -> Array:
    if dtype is not None and array.dtype != dtype:
        if copy is False:
            raise ValueError(f"copy=False, but casting {array.dtype} to {numpy.dtype(dtype)} needs a copy")
        return array.astype(dtype)
    return array.copy() if copy else array
