"""A strict stand-in for CuPy 14, so that the GPU path of Python code runs, and is judged, without a GPU.

    with stand_in.install(devices=2) as cupy:  # sys.modules["cupy"] until the block ends
        with cupy.counting() as count:
            step()
        assert count.syncs == 0

What is real: CuPy's own Python functions run, with their own signatures, checks and compositions, on this module's
`ndarray` in place of theirs (`Translator`); its ufuncs choose the types; its ElementwiseKernels and RawKernels are
compiled and run on the CPU by `emulator`. A name that CuPy has not does not exist here either. What is below Python
in CuPy (arrays, memory, streams, reductions, indexing, cuBLAS, cuSOLVER) is written here on NumPy, as CuPy 14.2's
sources do it; what is not written raises NotImplementedError.

What is strict: arrays are no numpy.ndarray and do not turn into one unasked; NumPy arrays, 0-d ones too, are refused
as operands; arrays of a device that is not current are refused (on a machine whose GPUs cannot reach each other);
fresh memory is filled with NaN; the memory pool has CuPy's limit and runs out; each wait of the host for the device
is counted.

Streams are simulated in two ways. Copies from and to pinned memory happen as late as CUDA allows: when something
that is ordered after them runs. And every stream has a vector clock: a kernel or copy that touches memory which
another stream uses, with no event or wait between the two, raises `Race`. Not simulated: the reuse of freed memory
by another stream, graphs, peer access between devices.

Numbers are NumPy's; what a GPU makes of them in the last digits only a GPU can tell.
"""

import builtins
import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import itertools
import operator
import sys
import threading
import time
import types
import warnings
import weakref

import numpy

HOST = numpy.ndarray
UNIT = 512  # the pool hands out memory in steps of this
kDLCPU, kDLCUDA = (1, 0), 2


class Race(AssertionError):
    """Two streams use the same memory, one of them to write, with nothing that orders them."""


def problem() -> str | None:
    """Say why the stand-in cannot be used here, or None when it can."""
    try:
        import cupy
    except ImportError as error:
        return f"the stand-in for CuPy takes its names from CuPy itself, which cannot be imported: {error}"
    if isinstance(cupy, Module) or cupy.__version__.startswith("14."):
        return None
    return f"the stand-in follows CuPy 14, here is {cupy.__version__}"


# ------------------------------------------------------------------------------------------ the machine: memory


class Machine:
    """The state that one installation has: counters, devices, streams."""

    def __init__(self, devices, memory):
        self.syncs = self.launches = self.bytes_to_device = self.bytes_to_host = 0
        self.memory = memory
        self.pools = [Pool(self, number) for number in range(devices)]
        self.local = threading.local()
        self.ids = itertools.count(1)
        self.null = [Queue(0, "null", number) for number in range(devices)]
        self.queues = list(self.null)
        self.host = {}  # the host's vector clock
        self.ordering = False  # whether there is anything to order: another stream, or a copy that waits

    @property
    def device(self):
        return getattr(self.local, "device", 0)


class Pool:
    """The memory of one device, as cupy.cuda.MemoryPool counts it (without fragmentation)."""

    def __init__(self, machine, device):
        self.machine, self.device = machine, device
        self.used = self.free = self.limit = 0
        self.lock = threading.Lock()

    def take(self, nbytes):
        size = -(-nbytes // UNIT) * UNIT
        if not self._fits(size):
            self.free = 0
            gc.collect()
            if not self._fits(size):
                limit = self.limit or self.machine.memory
                raise _real("cupy.cuda.memory").OutOfMemoryError(size, self.used + self.free, limit)
        with self.lock:
            self.free = max(self.free - size, 0)
            self.used += size
        return size

    def _fits(self, size):
        return size <= self.free or self.used + self.free + size <= (self.limit or self.machine.memory)

    def give_back(self, size):
        with self.lock:
            self.used -= size
            self.free += size


class Block:
    """One allocation: what the pool is told when the last view of it goes, and who used it last."""

    __slots__ = ("__weakref__", "buffer", "pool", "reads", "size", "written")

    def __init__(self, buffer):
        self.size = 0
        self.pool = _machine.pools[_machine.device]
        self.size = self.pool.take(buffer.nbytes)
        self.buffer = buffer
        self.written, self.reads = None, {}

    @property
    def device(self):
        return self.pool.device

    @property
    def address(self):
        return self.buffer.ctypes.data

    def __del__(self):
        if self.size:
            self.pool.give_back(self.size)


class Foreign(Block):
    """Memory that came through __cuda_array_interface__: somebody else's, kept alive by `owner`."""

    __slots__ = ("owner",)

    def __init__(self, buffer, owner, pool):
        self.size, self.pool, self.owner = 0, pool, owner
        self.buffer = buffer
        self.written, self.reads = None, {}


class Pointer:
    """cupy.cuda.MemoryPointer, as far as arrays show it."""

    def __init__(self, mem, offset):
        self.mem, self._offset = mem, offset
        self.ptr = mem.address + offset
        self.device_id = mem.device
        self.device = Device(mem.device)

    def __int__(self):
        return self.ptr

    def __add__(self, offset):
        return Pointer(self.mem, self._offset + offset)

    def _bytes(self, size):
        return self.mem.buffer.reshape(-1, order="A").view(numpy.uint8)[self._offset : self._offset + size]

    def memset_async(self, value, size, stream=None):
        with contextlib.nullcontext() if stream is None else stream:
            _touch((), [self.mem])
            self._bytes(size)[...] = value

    def copy_from_device_async(self, src, size, stream=None):
        with contextlib.nullcontext() if stream is None else stream:
            _touch([src.mem], [self.mem])
            self._bytes(size)[...] = src._bytes(size)


_machine: Machine = None  # type: ignore[assignment]  # of the installation that is in force


# ------------------------------------------------------------------------------------------------- streams


class Queue:
    """What has been handed to one stream: copies that wait, and a vector clock that tells what comes before what."""

    def __init__(self, key, kind, device):
        self.key, self.kind, self.device = key, kind, device
        self.pending, self.issued, self.done = [], 0, 0
        self.clock = {}

    def begin(self):
        """Take the order in which the next operation stands: after the host's waits, and the legacy stream's rule."""
        _join(self.clock, _machine.host)
        for other in _machine.queues:
            if other is not self and other.device == self.device and {self.kind, other.kind} == {"null", "blocking"}:
                _join(self.clock, other.clock)
                other.flush()
        self.clock[self.key] = self.clock.get(self.key, 0) + 1

    def flush(self, upto=None):
        """Run what waits, up to a position."""
        upto = self.issued if upto is None else upto
        while self.done < upto:
            self.done += 1
            self.pending.pop(0)()

    def enqueue(self, work):
        _machine.ordering = True
        self.pending.append(work)
        self.issued += 1

    def touches(self, block, write):
        """Note that the operation begun last uses a block; raise Race where an earlier use is not ordered before it."""
        now = self.clock[self.key]
        earlier = [block.written] if block.written else []
        if write:
            earlier += block.reads.items()
        for key, then in earlier:
            if self.clock.get(key, 0) < then:
                raise Race(
                    f"stream {self.key} {'writes' if write else 'reads'} {block.size} bytes that stream {key} uses, "
                    "and nothing orders the two: record an event there and wait for it here"
                )
        if write:
            block.written, block.reads = (self.key, now), {}
        else:
            block.reads[self.key] = now


def _join(clock, other):
    for key, then in other.items():
        if clock.get(key, 0) < then:
            clock[key] = then


def _wait(queue, upto=None, clock=None):
    """Let the host wait for a stream, or for an event in it."""
    _machine.syncs += 1
    queue.flush(upto)
    _join(_machine.host, queue.clock if clock is None else clock)


class Stream:
    """cupy.cuda.Stream."""

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        if ptds:
            raise NotImplementedError("the stand-in has no per-thread default stream")
        self.device_id = -1 if null else _machine.device
        self._machine = _machine
        self._own = None
        self.ptr = 0
        if not null:
            self.ptr = next(_machine.ids) << 12
            self._own = Queue(self.ptr, "free" if non_blocking else "blocking", _machine.device)
            _machine.queues.append(self._own)
            _machine.ordering = True
            weakref.finalize(self, _forget, _machine, self._own)

    @property
    def _queue(self):
        return _machine.null[_machine.device] if self._own is None else self._own

    def _check_device(self):
        if self._own is not None and self.device_id != _machine.device:
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with the current device "
                f"({_machine.device})"
            )

    def __enter__(self):
        self._check_device()
        stack = _machine.local.__dict__.setdefault("streams", {}).setdefault(_machine.device, [])
        _machine.local.__dict__.setdefault("entered", []).append(_machine.device)
        stack.append(self)
        return self

    def __exit__(self, *_):
        _machine.local.streams[_machine.local.entered.pop()].pop()

    def use(self):
        self._check_device()
        stack = _machine.local.__dict__.setdefault("streams", {}).setdefault(_machine.device, [])
        stack[-1:] = [self]
        return self

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return self.ptr

    @property
    def done(self):
        return self._queue.done == self._queue.issued

    def synchronize(self):
        self._queue.begin()
        _wait(self._queue)

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        queue = self._queue
        queue.begin()
        if event._queue is not None:
            _join(queue.clock, event._clock)
            if event._queue is not queue:
                queue.enqueue(functools.partial(event._queue.flush, event._position))


def _forget(machine, queue):
    queue.flush()
    machine.queues.remove(queue)


Stream.null = Stream.__new__(Stream)
Stream.null.__dict__.update(device_id=-1, _own=None, ptr=0)


def get_current_stream(device_id=-1):
    stack = getattr(_machine.local, "streams", {}).get(_machine.device if device_id == -1 else device_id)
    return stack[-1] if stack else Stream.null


class Event:
    """cupy.cuda.Event."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self._queue = self._clock = self._time = None
        self._position, self._timed = 0, not disable_timing
        self.ptr = id(self)

    def record(self, stream=None):
        queue = (get_current_stream() if stream is None else stream)._queue
        queue.begin()
        self._queue, self._position, self._clock = queue, queue.issued, dict(queue.clock)
        self._time = time.perf_counter()

    @property
    def done(self):
        return self._queue is None or self._queue.done >= self._position

    def synchronize(self):
        if self._queue is not None:
            _wait(self._queue, self._position, self._clock)


def get_elapsed_time(start_event, end_event):
    if None in (start_event._time, end_event._time) or not (start_event._timed and end_event._timed):
        raise ValueError("both events must have been recorded, with timing")
    return max(1e3 * (end_event._time - start_event._time), 1e-3)


# ----------------------------------------------------------------------------------- what an operation goes through


def _on_this_device(*arrays):
    here = _machine.device
    for array in arrays:
        if array._block.pool.device != here:
            raise ValueError(
                f"The device where the array resides ({array._block.pool.device}) is different from the current device "
                f"({here}). Peer access is unavailable between these devices."
            )


def _launch(reads=(), writes=(), *, count=1):
    """Begin a kernel, or a copy within the device, on the current stream."""
    _on_this_device(*reads, *writes)
    _touch([a._block for a in reads], [a._block for a in writes], count)


def _touch(reads, writes, count=1):
    _machine.launches += count
    if _machine.ordering:
        queue = get_current_stream()._queue
        queue.begin()
        queue.flush()
        for block in reads:
            queue.touches(block, write=False)
        for block in writes:
            queue.touches(block, write=True)


def _written(array):
    """Note that the current stream wrote a fresh array."""
    if _machine.ordering:
        queue = get_current_stream()._queue
        array._block.written = (queue.key, queue.clock.get(queue.key, 0))
    return array


_pinned = weakref.WeakValueDictionary()  # address of each pinned buffer -> its owner


def _is_pinned(array):
    while isinstance(array.base, HOST):
        array = array.base
    return isinstance(array.base, PinnedMemory) or isinstance(array, PinnedArray)


class PinnedArray(HOST):
    """Carries the mark of pinned memory at the root of what is given out as plain arrays."""


class PinnedMemory:
    pass


def empty_pinned(shape, dtype=float, order="C"):
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    root = HOST.__new__(PinnedArray, shape, dtype, order=order)
    root.view(HOST)[...] = _junk(root.dtype)
    return root.view(HOST)


def zeros_pinned(shape, dtype=float, order="C"):
    array = empty_pinned(shape, dtype, order)
    array[...] = 0
    return array


def _to_device(target, source, stream):
    """Copy from the host: pinned memory is read when the stream gets there, other memory at once."""
    queue = stream._queue
    _machine.bytes_to_device += source.nbytes
    if _machine.ordering or _is_pinned(source):
        queue.begin()
        queue.touches(target._block, write=True)
        held = source if _is_pinned(source) else source.copy()
        queue.enqueue(lambda: numpy.copyto(target._a, held))
    else:
        numpy.copyto(target._a, source)


def _to_host(target, source, stream, blocking):
    queue = stream._queue
    _machine.bytes_to_host += source.nbytes
    if _machine.ordering or (not blocking and _is_pinned(target)):
        queue.begin()
        queue.touches(source._block, write=False)
        queue.enqueue(lambda: numpy.copyto(target, source._a))
        if not _is_pinned(target):
            queue.flush()
    else:
        numpy.copyto(target, source._a)
    if blocking:
        _wait(queue)


# ------------------------------------------------------------------------------------------------- the array


class Flags:
    def __init__(self, array):
        flags = array._a.flags
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.owndata = array.base is None

    @property
    def fnc(self):
        return self.f_contiguous and not self.c_contiguous

    @property
    def forc(self):
        return self.f_contiguous or self.c_contiguous

    def __getitem__(self, name):
        if name in ("C_CONTIGUOUS", "F_CONTIGUOUS", "OWNDATA"):
            return getattr(self, name.lower())
        raise KeyError(f"{name} is not defined for cupy.ndarray.flags")


def _junk(dtype):
    return numpy.full((), 0xFF, numpy.uint8).repeat(dtype.itemsize).view(dtype)[0] if dtype.kind != "b" else True


def _supported(dtype):
    dtype = numpy.dtype(dtype)
    if dtype.kind not in "biufcV" or dtype.char in "gG":
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype


def _own(values):
    """Make a device array of values that an operation has computed on the CPU; it is C-contiguous, as CuPy's are."""
    if not isinstance(values, HOST) or not values.flags.c_contiguous or values.base is not None:
        values = numpy.array(values, order="C", copy=True)
    return _written(_over(values))


def _over(values):
    array = object.__new__(ndarray)
    array._a, array._block, array.base = values, Block(values), None
    return array


def _empty(shape, dtype, order="C"):
    values = numpy.empty(shape, _supported(dtype), order=order)
    values[...] = _junk(values.dtype)
    return _written(_over(values))


def _view(array, values):
    if not values.flags.writeable:
        values.flags.writeable = True  # NumPy's diagonals are read-only, CuPy has no such thing
    view = object.__new__(ndarray)
    view._a, view._block = values, array._block
    view.base = array if array.base is None else array.base
    return view


class ndarray:
    """cupy.ndarray: NumPy memory that cannot be reached as such."""

    __slots__ = ("__weakref__", "_a", "_block", "base")
    __module__ = "cupy"
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
        shape = (shape,) if isinstance(shape, (int, numpy.integer)) else tuple(map(operator.index, shape))
        dtype = _supported(dtype)
        if strides is not None and memptr is None:
            raise ValueError("memptr is required if strides is given.")
        if memptr is None:
            made = _empty(shape, dtype, order or "C")
            self._a, self._block, self.base = made._a, made._block, None
            return
        buffer = memptr.mem.buffer.reshape(-1, order="A").view(numpy.uint8)
        self._a = HOST(shape, dtype, buffer, memptr._offset, strides, order or "C")
        self._block, self.base = memptr.mem, None

    shape = property(lambda self: self._a.shape)
    strides = property(lambda self: self._a.strides)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    dtype = property(lambda self: self._a.dtype)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.nbytes)
    device = property(lambda self: Device(self._block.device))
    data = property(lambda self: Pointer(self._block, self._a.ctypes.data - self._block.address))
    flags = property(Flags)
    _c_contiguous = property(lambda self: self._a.flags.c_contiguous)
    _f_contiguous = property(lambda self: self._a.flags.f_contiguous)

    @shape.setter
    def shape(self, shape):
        view = self._a.view()
        view.shape = shape  # AttributeError where that needs a copy, as in CuPy
        self._a = view

    # --- to the host

    def get(self, stream=None, order="C", out=None, blocking=True):
        stream = get_current_stream() if stream is None else stream
        if out is None:
            if not self.size:
                return numpy.empty(self.shape, self.dtype)
            order = order.upper()
            order = ("F" if self._f_contiguous else "C") if order == "A" else order
            values = numpy.empty(self.shape, self.dtype, order=order)
        else:
            if not isinstance(out, HOST):
                raise TypeError("Only numpy.ndarray can be obtained fromcupy.ndarray")
            if self.dtype != out.dtype:
                raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
            if self.shape != out.shape:
                raise ValueError(f"Shape mismatch. Expected shape: {self.shape}, actual shape: {out.shape}")
            if not out.flags.forc:
                raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
            values = out
        with Device(self._block.device):
            _to_host(values, self, stream, blocking)
        return values

    def set(self, arr, stream=None):
        if not isinstance(arr, HOST):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
        if not self.flags.forc:
            raise RuntimeError("Cannot set to non-contiguous array")
        with Device(self._block.device):
            _to_device(self, arr, get_current_stream() if stream is None else stream)

    def item(self):
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self):
        return self.get().tolist()

    def tobytes(self, order="C"):
        return self.get().tobytes(order)

    def __int__(self):
        return int(self.get())

    def __float__(self):
        return float(self.get())

    def __complex__(self):
        return complex(self.get())

    def __index__(self):
        if self.ndim or self.dtype.kind not in "iu":
            raise TypeError("only integer scalar arrays can be converted to a scalar index")
        return int(self.get())

    def __bool__(self):
        if self.size > 1:
            raise ValueError(
                "The truth value of an array with more than one element is ambiguous. Use a.any() or a.all()"
            )
        return bool(self.size) and bool(self.get())

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def __reduce__(self):
        return _cupy.array, (self.get(order="A"),)

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "stream": get_current_stream().ptr or 1,
            "version": 3,
            "strides": None if self._c_contiguous else self.strides,
            "data": (self._a.ctypes.data if self.size else 0, False),
        }

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        if dl_device == kDLCPU:
            if copy is False:
                raise ValueError("GPU memory cannot be exported to CPU without copy.")
            return self.get().__dlpack__(max_version=max_version)
        if dl_device is not None and dl_device != self.__dlpack_device__():
            raise BufferError("unsupported device requested.")
        if copy is True:
            raise BufferError("copy=True only supported for copy to CPU.")
        if isinstance(stream, int) and stream < -1:
            raise ValueError(
                "On CUDA, the valid stream for the DLPack protocol is -1, 1, 2, or any larger value, but "
                f"{stream} was provided"
            )
        return Capsule(self)

    def __dlpack_device__(self):
        return (kDLCUDA, self._block.device)

    def __getattr__(self, name):
        if not name.startswith("_") and hasattr(_real("cupy").ndarray, name):
            raise NotImplementedError(f"the stand-in's arrays have no {name}: write it into {__name__}")
        raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")

    # --- views

    @property
    def T(self):
        return self if self.ndim < 2 else _view(self, self._a.T)

    @property
    def mT(self):
        if self.ndim < 2:
            raise ValueError("matrix transpose with ndim < 2 is undefined")
        return self.swapaxes(-1, -2)

    @property
    def real(self):
        return self if self.dtype.kind != "c" else _view(self, self._a.real)

    def view(self, dtype=None, type=None):
        return _view(self, self._a.view() if dtype is None else self._a.view(_supported(dtype)))

    def reshape(self, *shape, order="C", copy=None):
        shape = shape[0] if len(shape) == 1 else shape
        values = self._a.reshape(shape, order="C" if order is None else order)
        if not self.size or numpy.may_share_memory(values, self._a):
            return self.copy().reshape(shape, order=order) if copy else _view(self, values)
        if copy is False:
            raise ValueError("Unable to avoid copy while creating an array as requested.")
        _launch([self])
        return _own(values)

    def ravel(self, order="C"):
        return self.reshape(-1, order=order)

    def flatten(self, order="C"):
        return self.copy().reshape(-1, order=order)

    def _set_shape_and_strides(self, shape, strides, *_update):
        self._a = numpy.lib.stride_tricks.as_strided(self._a, tuple(shape), tuple(strides))

    def transpose(self, *axes):
        return _view(self, self._a.transpose(*axes))

    def swapaxes(self, axis1, axis2):
        return _view(self, self._a.swapaxes(axis1, axis2))

    def squeeze(self, axis=None):
        values = self._a.squeeze(axis)
        return self if values.ndim == self.ndim else _view(self, values)

    def diagonal(self, offset=0, axis1=0, axis2=1):
        return _view(self, self._a.diagonal(offset, axis1, axis2))

    # --- copies

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError(f"{'casting' if casting is not None else 'subok'} is not supported yet")
        dtype = _supported(dtype)
        same = order in (None, "K", "A") or getattr(self, f"_{order.lower()}_contiguous")
        if dtype == self.dtype and same and not copy:
            return self
        _launch([self], count=bool(self.size))
        with numpy.errstate(all="ignore"):
            return _written(_over(numpy.array(self._a, dtype, order=order, copy=True)))

    def copy(self, order="C"):
        if self._block.device == _machine.device or not self.size:
            return self.astype(self.dtype, order=order)
        if not self.flags.forc:
            raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
        _machine.launches += 1
        return _written(_over(self._a.copy(order)))

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        with Device(self._block.device):
            return self.copy()

    def fill(self, value):
        if isinstance(value, HOST):
            if value.shape:
                raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
            value = value.item()
        elif not isinstance(value, ndarray):
            _scalar(value)
        _launch([value] if isinstance(value, ndarray) else [], [self], count=bool(self.size))
        with numpy.errstate(all="ignore"):
            self._a[...] = _plain(value)

    # --- indexing

    def __len__(self):
        if not self.ndim:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        plain, arrays = _index(self, index)
        if not arrays:
            return _view(self, self._a[(*plain, ...) if Ellipsis not in plain else tuple(plain)])
        masks = [a for a in arrays if a.dtype.kind == "b" and a.size]
        for _ in masks:
            _read_one()  # how many are true decides the result's shape
        _launch([self, *arrays], count=1 + 2 * len(masks))
        return _own(self._a[tuple(plain)])

    def __setitem__(self, index, value):
        plain, arrays = _index(self, index)
        if not arrays:
            target = _view(self, self._a[(*plain, ...) if Ellipsis not in plain else tuple(plain)])
            value = _cupy_like(value)
            if not isinstance(value, ndarray):
                target.fill(value)  # refuses host arrays
                return
            _launch([value], [self], count=bool(target.size))
            with numpy.errstate(all="ignore"):
                target._a[...] = _unit_dims_off(value._a, target.ndim)
            return
        value = value if isinstance(value, ndarray) else _cupy.array(value, dtype=self.dtype)
        for mask in (a for a in arrays if a.dtype.kind == "b" and a.size):
            if len(arrays) > 1 or value.ndim:
                _read_one()
            del mask
        _launch([value, *arrays], [self])
        with numpy.errstate(all="ignore"):
            self._a[tuple(plain)] = value._a

    def _scatter_op(self, slices, value, op):
        """`ufunc.at`: add, maximum and the like, where repeated positions count each time."""
        allowed = {"add": "ilqefdILQ", "sub": "iI", "max": "ilqfdILQ", "min": "ilqfdILQ"}[op]
        function = {"add": numpy.add, "sub": numpy.subtract, "max": numpy.maximum, "min": numpy.minimum}[op]
        plain, arrays = _index(self, slices)
        if arrays and self.dtype.char not in allowed:
            raise TypeError(f"cupy.{function.__name__}.at does not support {self.dtype}")
        value = _cupy_like(value)
        if arrays:
            value = value if isinstance(value, ndarray) else _cupy.array(value, dtype=self.dtype)
        elif not isinstance(value, ndarray):
            _scalar(value)
        _launch([a for a in (value, *arrays) if isinstance(a, ndarray)], [self])
        with numpy.errstate(all="ignore"):
            given = _plain(value)
            function.at(self._a, tuple(plain), given.astype(self.dtype) if isinstance(given, HOST) else given)

    def take(self, indices, axis=None, out=None):
        if out is not None:
            raise NotImplementedError("the stand-in's take has no out")
        if isinstance(indices, (int, numpy.integer)):
            where, reads = indices, [self]
        else:
            indices = indices if isinstance(indices, ndarray) else _cupy.array(indices, dtype=int)
            where, reads = indices._a, [self, indices]
        _launch(reads)
        if not self.size and numpy.size(where):
            raise IndexError("cannot do a non-empty take from an empty axes.")
        return _own(numpy.take(self._a, where, axis, mode="wrap"))  # CuPy wraps what is out of bounds

    def nonzero(self):
        if not self.ndim:
            raise ValueError(
                "Calling nonzero on 0d arrays is not allowed. Use cp.atleast_1d(scalar).nonzero() instead."
            )
        rows = _argwhere(self)
        return tuple(rows[:, i] for i in range(self.ndim))

    def repeat(self, repeats, axis=None):
        if isinstance(repeats, HOST):
            raise TypeError("'repeats' does not accept numpy.ndarray; convert with cupy.array() first")
        each = repeats
        if isinstance(repeats, (ndarray, list, tuple)):
            counts = repeats if isinstance(repeats, ndarray) else _cupy.array(repeats, dtype=numpy.intp)
            if counts.dtype.kind not in "biu":
                raise TypeError(
                    f"Cannot cast array data from dtype('{counts.dtype}') to dtype('int64') according to the rule "
                    "'safe'"
                )
            _launch([counts], count=2)
            for _ in range(1 if counts.size == 1 else 2):
                _read_one()
            each = counts._a
        _launch([self])
        return _own(numpy.repeat(self._a, each, axis))

    def searchsorted(self, v, side="left", sorter=None):
        return _cupy.searchsorted(self, v, side, sorter)

    # --- reductions

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return _reduce(self, numpy.sum, axis, out, keepdims, dtype, _wide_half(self, dtype))

    def prod(self, axis=None, dtype=None, out=None, keepdims=None):
        return _reduce(self, numpy.prod, axis, out, bool(keepdims), dtype, _wide_half(self, dtype))

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return _reduce(self, numpy.mean, axis, out, keepdims, dtype, _wide_half(self, dtype))

    def var(self, axis=None, dtype=None, out=None, ddof=0, keepdims=False):
        function = functools.partial(numpy.var, ddof=ddof)
        return _reduce(self, function, axis, out, keepdims, dtype, _wide_half(self, dtype), count=4)

    def std(self, axis=None, dtype=None, out=None, ddof=0, keepdims=False):
        function = functools.partial(numpy.std, ddof=ddof)
        return _reduce(self, function, axis, out, keepdims, dtype, _wide_half(self, dtype), count=5)

    def max(self, axis=None, out=None, keepdims=False):
        return _reduce(self, numpy.max, axis, out, keepdims)

    def min(self, axis=None, out=None, keepdims=False):
        return _reduce(self, numpy.min, axis, out, keepdims)

    def all(self, axis=None, out=None, keepdims=False):
        return _reduce(self, numpy.all, axis, out, keepdims)

    def any(self, axis=None, out=None, keepdims=False):
        return _reduce(self, numpy.any, axis, out, keepdims)

    def argmax(self, axis=None, out=None, dtype=None, keepdims=False):
        return _reduce(self, numpy.argmax, axis, out, keepdims, None, None, dtype)

    def argmin(self, axis=None, out=None, dtype=None, keepdims=False):
        return _reduce(self, numpy.argmin, axis, out, keepdims, None, None, dtype)

    def ptp(self, axis=None, out=None, keepdims=False):
        return _reduce(self, numpy.ptp, axis, out, keepdims, count=3)

    def cumsum(self, axis=None, dtype=None, out=None):
        return _scan(self, numpy.cumsum, axis, dtype, out)

    def cumprod(self, axis=None, dtype=None, out=None):
        return _scan(self, numpy.cumprod, axis, dtype, out)

    def trace(self, offset=0, axis1=0, axis2=1, dtype=None, out=None):
        return self.diagonal(offset, axis1, axis2).sum(-1, dtype, out, False)

    def round(self, decimals=0, out=None):
        _launch([self])
        return _into(out, numpy.round(self._a, decimals))

    def clip(self, min=None, max=None, out=None):
        given = [v for v in (min, max) if v is not None]
        for value in given:
            _operand(value)
        _launch([self, *(v for v in given if isinstance(v, ndarray))])
        return _into(out, numpy.clip(self._a, _plain(min), _plain(max)).astype(self.dtype))

    def argsort(self, axis=-1, kind=None):
        _launch([self])
        return _own(numpy.argsort(self._a, axis, kind="stable"))

    def sort(self, axis=-1, kind=None):
        _launch([self], [self])
        self._a.sort(axis)

    def dot(self, b, out=None):
        return _dot(self, b, out)

    def conj(self):
        return self if self.dtype.kind != "c" else _cupy.conjugate(self)

    # --- operators

    def __array_ufunc__(self, ufunc_, method, *inputs, **kwargs):
        operands = inputs
        if "out" in kwargs:
            if len(kwargs["out"]) != 1:
                raise ValueError("The 'out' parameter must have exactly one array value")
            operands += kwargs["out"]
            kwargs["out"] = kwargs["out"][0]
        if method not in ("__call__", "outer", "at", "reduce", "accumulate", "reduceat"):
            return NotImplemented
        function = getattr(_cupy, ufunc_.__name__, None)
        function = function if method == "__call__" else getattr(function, method, None)
        if function is None:
            return NotImplemented
        for x in operands:
            known = isinstance(x, (ndarray, HOST, numpy.generic, bool, int, float, complex))
            if not known and not hasattr(x, "__cuda_array_interface__") and not hasattr(x, "__cupy_get_ndarray__"):
                return NotImplemented
        if ufunc_ in _COMPARISONS.values():
            inputs = tuple(x.item() if isinstance(x, HOST) and not x.ndim else x for x in inputs)
        return function(*inputs, **kwargs)

    def __array_function__(self, func, types, args, kwargs):
        try:
            module = functools.reduce(getattr, func.__module__.split(".")[1:], _cupy)
            function = getattr(module, func.__name__)
        except AttributeError:
            return NotImplemented
        if function is func or not all(issubclass(t, (ndarray, HOST)) for t in types):
            return NotImplemented
        return function(*args, **kwargs)

    def __pow__(self, other, modulo=None):
        fast = {2: "square", 0.5: "sqrt", -1.0: "reciprocal"}.get(other) if type(other) in (int, float) else None
        if fast and (type(other) is float or other == 2):
            whole = self.dtype.kind not in ("ifc" if type(other) is int else "fc")
            return getattr(_cupy, fast)(self, dtype=numpy.result_type(self.dtype, other) if whole else None)
        return _operate("power", self, other)


def _unit_dims_off(values, ndim):
    while values.ndim > ndim and values.shape[0] == 1:
        values = values[0]
    return values


def _operate(name, x, other):
    if isinstance(other, (ndarray, bool, int, float, complex)):
        return getattr(_cupy, name)(x, other)
    if _defers_to(x, other):
        return NotImplemented
    return getattr(numpy, name)(x, other)  # comes back through __array_ufunc__, of whichever


def _defers_to(x, other):
    try:
        return other.__array_ufunc__ is None
    except AttributeError:
        return getattr(x, "__array_priority__", 0) < getattr(other, "__array_priority__", 0)


def _attach_operators():
    def binary(name):
        return (
            lambda self, other: _operate(name, self, other),
            lambda self, other: getattr(_cupy, name)(other, self),
            lambda self, other: getattr(_cupy, name)(self, other, self),
        )

    names = {
        "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
        "mod": "remainder", "pow": "power", "lshift": "left_shift", "rshift": "right_shift", "and": "bitwise_and",
        "or": "bitwise_or", "xor": "bitwise_xor", "matmul": "matmul", "divmod": "divmod",
    }  # fmt: skip
    for short, name in names.items():
        plain, reflected, in_place = binary(name)
        if short != "pow":
            setattr(ndarray, f"__{short}__", plain)
        setattr(ndarray, f"__r{short}__", reflected)
        if short not in ("matmul", "divmod"):
            setattr(ndarray, f"__i{short}__", in_place)
    for short, name in (("neg", "negative"), ("pos", "positive"), ("abs", "absolute"), ("invert", "invert")):
        setattr(ndarray, f"__{short}__", lambda self, name=name: getattr(_cupy, name)(self))
    for short, function in _COMPARISONS.items():

        def compare(self, other, name=function.__name__, short=short):
            if short in ("eq", "ne") and (other is None or type(other).__eq__ is object.__eq__):
                return (_cupy.zeros if short == "eq" else _cupy.ones)(self.shape, dtype=bool)
            if isinstance(other, HOST) and not other.ndim and not _defers_to(self, other):
                other = other.item()
            return _operate(name, self, other)

        setattr(ndarray, f"__{short}__", compare)


_COMPARISONS = {
    "lt": numpy.less, "le": numpy.less_equal, "eq": numpy.equal,
    "ne": numpy.not_equal, "gt": numpy.greater, "ge": numpy.greater_equal,
}  # fmt: skip


class Capsule:
    """What __dlpack__ gives out: CUDA memory that from_dlpack here takes in, once."""

    def __init__(self, array):
        self.array = array


def from_dlpack(array, *, device=None, copy=None):
    if isinstance(array, Capsule):
        capsule = array
    else:
        if device is not None:
            raise NotImplementedError("from_dlpack() does not support device yet.")
        kind, number = array.__dlpack_device__()
        if kind == kDLCPU[0]:
            raise TypeError(
                "CPU arrays cannot be directly imported to CuPy. Use `cupy.array(numpy.from_dlpack(input))` instead."
            )
        if kind != kDLCUDA:
            raise TypeError(f"Unsupported array type: {kind}")
        with Device(number):
            try:
                capsule = array.__dlpack__(stream=get_current_stream().ptr or 1, max_version=(1, 0), copy=copy)
            except TypeError:
                if copy is not None:
                    raise
                capsule = array.__dlpack__(stream=get_current_stream().ptr or 1)
    if capsule.array is None:
        raise ValueError("A DLPack tensor object can be consumed only once")
    source, capsule.array = capsule.array, None
    return _from_interface(source)


def _from_interface(obj):
    """Return an array over the memory that an object shows through __cuda_array_interface__."""
    shown = obj.__cuda_array_interface__
    dtype, shape = numpy.dtype(shown["typestr"]), tuple(shown["shape"])
    strides = shown.get("strides") or numpy.empty(shape, bool).strides  # refined below for other item sizes
    if shown.get("strides") is None:
        strides = tuple(s * dtype.itemsize for s in strides)
    span = sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) + dtype.itemsize if 0 not in shape else 0
    low = sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0) if span else 0
    address = shown["data"][0] + low
    raw = (ctypes.c_char * span).from_address(address) if span else bytearray(dtype.itemsize)
    buffer = numpy.frombuffer(raw, numpy.uint8)
    pool = _machine.pools[obj.device.id if isinstance(getattr(obj, "device", None), Device) else _machine.device]
    array = object.__new__(ndarray)
    array._a = HOST(shape, dtype, buffer, -low, strides) if span else numpy.empty(shape, dtype)
    root = getattr(obj, "_block", None)
    array._block = Foreign(buffer, obj, pool if root is None else root.pool)
    array.base = None
    return array


# ---------------------------------------------------------------------------------------------- what methods share


def _plain(value):
    return value._a if isinstance(value, ndarray) else value


def _cupy_like(value):
    """An array, or what CuPy takes for one; everything else as it is."""
    if isinstance(value, ndarray):
        return value
    if hasattr(value, "__cuda_array_interface__"):
        return _from_interface(value)
    if hasattr(value, "__cupy_get_ndarray__"):
        return value.__cupy_get_ndarray__()
    return value


def _scalar(value):
    """Check a number as CuPy does, which refuses NumPy arrays here. Raises TypeError."""
    return _real("cupy._core._scalar").CScalar(value)


def _operand(value):
    value = _cupy_like(value)
    if not isinstance(value, ndarray):
        _scalar(value)
    return value


def _read_one():
    """A number is read back within a CuPy function: one element's copy, and a wait."""
    _machine.bytes_to_host += 8
    _wait(get_current_stream()._queue)


def _index(array, index):
    """Split an index: its parts as NumPy takes them, and the arrays among them. Host arrays and lists are uploaded."""
    parts, arrays, axis = [], [], 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is None or part is Ellipsis or isinstance(part, slice):
            parts.append(part)
            axis += isinstance(part, slice)
            continue
        if isinstance(part, (int, numpy.integer)) and not isinstance(part, (bool, numpy.bool_)):
            parts.append(int(part))
            axis += 1
            continue
        given = part
        if not isinstance(part, ndarray):
            try:
                part = _cupy.array(part, copy=None)
            except ValueError:
                raise IndexError(
                    "only integers, slices (`:`), ellipsis (`...`), numpy.newaxis (`None`) and integer or boolean "
                    "arrays are valid indices"
                ) from None
            if isinstance(given, (list, tuple)) and not part.size:
                part = part.astype(numpy.int32)
        if part.dtype.kind not in "biu":
            raise IndexError(f"arrays used as indices must be of integer or boolean type. (actual: {part.dtype.type})")
        arrays.append(part)
        parts.append(part._a)
        axis += part.ndim if part.dtype.kind == "b" else 1
    if axis > array.ndim:
        raise IndexError(f"too many indices for array: array is {array.ndim}-dimensional, but {axis} were indexed")
    return _wrapped(parts, array), arrays


def _wrapped(parts, array):
    """Integer arrays wrap around where they are out of bounds, as on the device."""
    axes = [_axes_of(part) for part in parts]
    out, axis = [], 0
    for part, count in zip(parts, axes, strict=True):
        if isinstance(part, HOST) and part.dtype.kind != "b" and array.shape[axis]:
            part = part.astype(numpy.int64) % array.shape[axis]
        axis += array.ndim - sum(axes) if part is Ellipsis else count
        out.append(part)
    return out


def _axes_of(part):
    """How many axes of an array one part of an index is about."""
    if isinstance(part, HOST) and part.dtype.kind == "b":
        return part.ndim
    return int(part is not None and part is not Ellipsis)


def _argwhere(array):
    if array.size:
        _launch([array], count=3)
        _read_one()
    return _own(numpy.argwhere(array._a))


def _into(out, values):
    if out is None:
        return _own(values)
    if not isinstance(out, ndarray):
        raise TypeError(f"output array must be cupy.ndarray, got {type(out).__name__}")
    if out.shape != numpy.shape(values):
        raise ValueError(f"Output shape mismatch: {out.shape}, expected {numpy.shape(values)}")
    _on_this_device(out)
    with numpy.errstate(all="ignore"):
        out._a[...] = values
    return out


def _wide_half(array, dtype):
    """The device adds up half precision in single precision."""
    return numpy.float32 if array.dtype == numpy.float16 and dtype in (None, numpy.float16, "e") else None


def _reduce(array, function, axis, out, keepdims, dtype=None, wide=None, cast=None, count=1):
    ddof = isinstance(function, functools.partial)
    if isinstance(axis, list):
        raise TypeError("axis must be None, an int or a tuple of ints")
    _launch([array], count=count)
    options = {"axis": axis, "keepdims": keepdims}
    if wide is not None or dtype is not None:
        options["dtype"] = wide or _supported(dtype)
    with numpy.errstate(all="ignore"), contextlib.nullcontext() if array.size and not ddof else _quiet():
        values = numpy.asarray(function(array._a, **options))
        if wide is not None:
            values = values.astype(numpy.float16)
    if cast is not None:
        values = values.astype(cast)
    return _into(out, values)


@contextlib.contextmanager
def _quiet():
    """NumPy warns of the mean of nothing, CuPy does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _scan(array, function, axis, dtype, out):
    _launch([array], count=2)
    with numpy.errstate(all="ignore"):
        return _into(out, function(array._a, axis=axis, dtype=dtype))


def _matrix_product(function, x, y, out=None):
    for array in (x, y):
        if not isinstance(_operand(array), ndarray):
            raise TypeError(f"Unsupported type {type(array)}")
    _launch([x, y])
    dtype = numpy.result_type(x.dtype, y.dtype)
    with numpy.errstate(all="ignore"):
        if dtype == numpy.float16:  # cuBLAS accumulates half precision in single precision
            return _into(out, function(x._a.astype(numpy.float32), y._a.astype(numpy.float32)).astype(dtype))
        return _into(out, function(x._a, y._a))


def _dot(a, b, out=None):
    return _matrix_product(numpy.dot, a, b, out)


# ------------------------------------------------------------------------------------------------------- ufuncs


_BY_NAME = {
    "where": numpy.where,
    "copy": lambda x: x.copy(),
    "id": lambda x: x.copy(),
    "true_divide": numpy.true_divide,
    "angle": numpy.angle,
    "sinc": numpy.sinc,
    "i0": numpy.i0,
    "nan_to_num_": numpy.nan_to_num,
    "is_close": lambda a, b, rtol, atol, equal_nan: numpy.isclose(a, b, rtol, atol) | (equal_nan & (a != a) & (b != b)),
}


_NUMBERS = frozenset({bool, int, float, complex})


def _cast(value, dtype):
    value = value._a if type(value) is ndarray else value
    if isinstance(value, (HOST, numpy.generic)):
        return value if value.dtype == dtype else value.astype(dtype)
    return dtype.type(value)


class ufunc:
    """cupy.ufunc: CuPy's own choice of types, NumPy's arithmetic."""

    def __init__(self, real):
        self._types, self.__doc__ = {}, real.__doc__
        self._make_from(real)

    def _make_from(self, real):
        self._ufunc = real
        self.name = self.__name__ = real.name
        self.nin, self.nout, self.nargs = real.nin, real.nout, real.nargs
        self.types = real.types
        name = real.name.removeprefix("cupy_").removeprefix("cupyx_")
        same = getattr(numpy, name, None)
        self._compute = _BY_NAME.get(name) or (same if isinstance(same, numpy.ufunc) else None)

    def __repr__(self):
        return f"<ufunc '{self.name}'>"

    def __call__(self, *args, **kwargs):
        out, dtype = kwargs.pop("out", None), kwargs.pop("dtype", None)
        where, casting = kwargs.pop("_where", None), kwargs.pop("casting", self._ufunc._default_casting)
        if kwargs:
            raise TypeError(f"Wrong arguments {kwargs}")
        if not self.nin <= len(args) <= self.nargs:
            raise TypeError(
                f"Wrong number of arguments for {self.name!r}. It must be either {self.nin} or {self.nargs} (with "
                f"outputs), but given {len(args)}."
            )
        outputs = args[self.nin :]
        if out is not None:
            if outputs:
                raise ValueError("Cannot specify 'out' as both a positional and keyword argument")
            outputs = out if isinstance(out, tuple) else (out,)
        inputs = [a if type(a) in _NUMBERS else _cupy_like(a) for a in args[: self.nin]]
        types_in, types_out = self._types_for(inputs, dtype)
        given = [o for o in outputs if o is not None]
        for o in given:
            if not isinstance(o, ndarray):
                _scalar(o)  # says what it is
                raise TypeError("return arrays must be of ArrayType")
        if where is not None or self._compute is None:
            raise NotImplementedError(f"the stand-in does not compute {self.name}")
        arrays = [a for a in inputs if type(a) is ndarray]
        _launch(arrays, given, count=0)
        with numpy.errstate(all="ignore"):
            results = self._compute(*map(_cast, inputs, types_in))
            results = results if self.nout > 1 else (results,)
            results = [_cast(r, t) for r, t in zip(results, types_out, strict=True)]
            _machine.launches += bool(results[0].size)
            if not given:
                made = [_own(numpy.asarray(values)) for values in results]
                return made[0] if self.nout == 1 else tuple(made)
            shape = numpy.broadcast_shapes(results[0].shape, *(o.shape for o in given))
            made = []
            for values, target in itertools.zip_longest(results, outputs):
                if target is None:
                    made.append(_own(numpy.broadcast_to(values, shape)))
                    continue
                if target.shape != shape:
                    raise ValueError(f"non-broadcastable output operand with shape {target.shape}; expected {shape}")
                if not numpy.can_cast(values.dtype, target.dtype, casting):
                    raise TypeError(
                        f"output (typecode '{values.dtype.char}') could not be coerced to provided output parameter "
                        f"(typecode '{target.dtype.char}') according to the casting rule \"{casting}\""
                    )
                target._a[...] = values
                made.append(target)
        return made[0] if self.nout == 1 else tuple(made)

    def _types_for(self, inputs, dtype):
        """Return the types to compute in and those of the results, as CuPy chooses them. Raises TypeError."""
        key = (dtype, *[a.dtype if isinstance(a, (ndarray, numpy.generic)) else type(a) for a in inputs])
        found = self._types.get(key)
        if found is None:
            # an array's part is played by a number of its dtype, which is as strong
            played = [_scalar(a.dtype.type(0) if isinstance(a, ndarray) else a) for a in inputs]
            wanted = None if dtype is None else numpy.dtype(dtype)
            op = self._ufunc._ops.guess_routine(self.name, {}, played, wanted, self._ufunc._out_ops)
            found = self._types[key] = tuple(map(numpy.dtype, op.in_types)), tuple(map(numpy.dtype, op.out_types))
        return found

    def at(self, a, indices, b=None):
        if self._ufunc._scatter_op is None:
            raise NotImplementedError(f"`{self.name}.at` is not supported yet")
        a._scatter_op(indices, b, self._ufunc._scatter_op)

    def reduce(self, array, axis=0, dtype=None, out=None, keepdims=False):
        method = {"cupy_add": "sum", "cupy_multiply": "prod"}.get(self.name)
        if method is None:
            raise NotImplementedError(f"`{self.name}.reduce` is not supported yet")
        return getattr(array, method)(axis, dtype, out, keepdims)

    def accumulate(self, array, axis=0, dtype=None, out=None):
        method = {"cupy_add": "cumsum", "cupy_multiply": "cumprod"}.get(self.name)
        if method is None:
            raise NotImplementedError(f"`{self.name}.accumulate` is not supported yet")
        return getattr(array, method)(axis, dtype, out)

    def outer(self, A, B, **kwargs):
        A, B = _cupy.array(A), _cupy.array(B)
        return self(A.reshape(A.shape + (1,) * B.ndim), B.reshape((1,) * A.ndim + B.shape), **kwargs)


# ------------------------------------------------------------------------------------------------------ kernels


@contextlib.contextmanager
def _as_it_was():
    """Let CuPy's own modules be found while its own objects are at work."""
    here = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_cupys(name)}
    sys.modules.update(_hidden)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_cupys(name)]:
            _hidden[name] = sys.modules.pop(name)
        sys.modules.update(here)


def _arguments(args):
    """Kernel arguments with device arrays as their memory. Raises TypeError for host arrays, as CuPy does."""
    args = [_cupy_like(a) for a in args]
    arrays = [a for a in args if isinstance(a, ndarray)]
    return args, arrays


class ElementwiseKernel:
    """cupy.ElementwiseKernel: the real one inside, run by the emulator."""

    def __init__(self, in_params, out_params, operation, name="kernel", *args, **kwargs):
        self._kernel = _real("cupy").ElementwiseKernel(in_params, out_params, operation, name, *args, **kwargs)

    @classmethod
    def _around(cls, real):
        self = object.__new__(cls)
        self._kernel = real
        return self

    def __getattr__(self, name):
        return getattr(self._kernel, name)

    def __call__(self, *args, **kwargs):
        from cuda_proof import emulator

        kwargs = dict(kwargs)
        stream = kwargs.pop("stream", None)
        args, arrays = _arguments(args)
        nin = self._kernel.nin
        for value in args:
            if not isinstance(value, ndarray):
                _scalar(value)
        outputs = [a for a in args[nin:] if isinstance(a, ndarray)]
        with contextlib.nullcontext() if stream is None else stream:
            _launch([a for a in arrays if not any(a is o for o in outputs)], outputs)
            with _as_it_was():
                results = emulator.run_elementwise(self._kernel, [_plain(a) for a in args], kwargs)
        if outputs:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        made = [_own(r) for r in results]
        return made[0] if len(made) == 1 and not self._kernel.return_tuple else tuple(made)


class RawKernel:
    """cupy.RawKernel: the real one checks how it is made, the emulator runs its text."""

    def __init__(self, code, name, options=(), *args, **kwargs):
        self._kernel = _real("cupy").RawKernel(code, name, options, *args, **kwargs)
        self.code, self.name, self.options = code, name, options

    def __getattr__(self, name):
        return getattr(self._kernel, name)

    def __call__(self, grid, block, args, *, shared_mem=0):
        from cuda_proof import emulator

        args, arrays = _arguments(args)
        for value in args:
            known = isinstance(value, (ndarray, numpy.generic, bool, int, float, complex))
            # a structured number by value
            if not known and not (isinstance(value, HOST) and not value.ndim):
                raise TypeError(f"Unsupported type {type(value)}")
        # which are written is the kernel's secret
        _launch((), arrays)
        with _as_it_was():
            emulator.run_raw(
                self.code,
                self.name,
                tuple(grid),
                tuple(block),
                [_plain(a) for a in args],
                shared_mem=shared_mem,
                options=self.options,
            )


class RawModule:
    """cupy.RawModule of CUDA text."""

    def __init__(self, *, code=None, options=(), **kwargs):
        self._module = _real("cupy").RawModule(code=code, options=options, **kwargs)
        self.code, self.options = code, options

    def get_function(self, name):
        return RawKernel(self.code, name, self.options)


# ----------------------------------------------------------------------------------------------------- cupy.cuda


class Device:
    """cupy.cuda.Device."""

    def __init__(self, device=None):
        self.id = _machine.device if device is None else int(device)

    def use(self):
        if not 0 <= self.id < len(_machine.pools):
            raise _real("cupy.cuda").runtime.CUDARuntimeError(101)  # invalid device ordinal
        _machine.local.device = self.id

    def __enter__(self):
        before = _machine.device
        self.use()
        _machine.local.__dict__.setdefault("devices", []).append(before)
        return self

    def __exit__(self, *_):
        _machine.local.device = _machine.local.devices.pop()

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self):
        return hash(self.id)

    def __repr__(self):
        return f"<CUDA Device {self.id}>"

    def synchronize(self):
        with self:
            _device_synchronize()

    @property
    def compute_capability(self):
        return "90"

    @property
    def mem_info(self):
        pool = _machine.pools[self.id]
        return _machine.memory - pool.used - pool.free, _machine.memory

    @property
    def attributes(self):
        return {"MultiProcessorCount": 132, "WarpSize": 32, "MaxThreadsPerBlock": 1024, "ClockRate": 1_980_000}

    @property
    def pci_bus_id(self):
        return f"0000:{self.id + 1:02X}:00.0"


def _device_synchronize():
    _machine.syncs += 1
    for queue in [q for q in _machine.queues if q.device == _machine.device]:
        queue.flush()
        _join(_machine.host, queue.clock)


class MemoryPool:
    """cupy.cuda.MemoryPool: of whichever device is current."""

    _pool = property(lambda self: _machine.pools[_machine.device])

    def used_bytes(self):
        return self._pool.used

    def free_bytes(self):
        return self._pool.free

    def total_bytes(self):
        return self._pool.used + self._pool.free

    def n_free_blocks(self):
        return int(self._pool.free > 0)

    def free_all_blocks(self, stream=None):
        self._pool.free = 0

    def set_limit(self, size=None, fraction=None):
        if (size is None) == (fraction is None) and size is not None:
            raise ValueError("size and fraction cannot be specified at one time")
        size = int(fraction * _machine.memory) if size is None else size
        if size < 0:
            raise ValueError("memory limit size out of range")
        self._pool.limit = size

    def get_limit(self):
        return self._pool.limit


class PinnedMemoryPool:
    def free_all_blocks(self):
        pass

    def n_free_blocks(self):
        return 0


_memory_pool, _pinned_pool = MemoryPool(), PinnedMemoryPool()


def _device_properties(device_id):
    return {
        "name": b"stand-in",
        "totalGlobalMem": _machine.memory,
        "sharedMemPerBlock": 49152,
        "regsPerBlock": 65536,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "l2CacheSize": 50 << 20,
    }


def _set_device(device):
    Device(device).use()


# --------------------------------------------------------- what CuPy has below Python, by where its functions find it


def _array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, blocking=False):
    """cupy.array: an upload, unless it is a device array already."""
    if subok:
        raise NotImplementedError
    obj = _cupy_like(obj)
    if isinstance(obj, ndarray):
        dtype = obj.dtype if dtype is None else dtype
        if obj._block.device != _machine.device:
            made = obj.copy(order=order or "K").astype(dtype, copy=False)
        else:
            made = obj.astype(dtype, order=order or "K", copy=bool(copy))
            if copy is False and made is not obj:
                raise ValueError("Unable to avoid copy while creating an array as requested.")
        return made if ndmin <= made.ndim else made.reshape((1,) * (ndmin - made.ndim) + made.shape)
    if isinstance(obj, (list, tuple)) and (flat := _device_arrays_in(obj)):
        if any(not isinstance(a, ndarray) for a in flat):
            raise TypeError("Implicit conversion to a NumPy array is not allowed. "
                            "Please use `.get()` to construct a NumPy array explicitly.")  # fmt: skip
        made = _concatenate([a.reshape(1, *a.shape) for a in flat], 0)
        outer = numpy.shape(_outline(obj))
        return made.reshape(outer + flat[0].shape).astype(made.dtype if dtype is None else dtype, copy=False)
    host = numpy.array(obj, dtype=dtype, copy=None, ndmin=ndmin)
    if host.dtype.kind not in "biufcV" or host.dtype.char in "gG":
        raise ValueError(f"Unsupported dtype {host.dtype}")
    fortran = order == "F" or (order in ("K", "A", None) and isinstance(obj, HOST) and obj.flags.fnc)
    made = _empty(host.shape, host.dtype, "F" if fortran else "C")
    if host.ndim:
        _to_device(made, host, get_current_stream())
    else:
        made.fill(host)
    if blocking:
        _wait(get_current_stream()._queue)
    return made


def _device_arrays_in(obj):
    """The leaves of nested sequences, if there is a device array among them."""
    leaves = []

    def walk(part):
        for item in part:
            if isinstance(item, (list, tuple)):
                walk(item)
            else:
                leaves.append(_cupy_like(item))

    walk(obj)
    return leaves if any(isinstance(leaf, ndarray) for leaf in leaves) else []


def _outline(obj):
    return [_outline(item) if isinstance(item, (list, tuple)) else 0 for item in obj]


def _concatenate(tup, axis, out=None, dtype=None, casting="same_kind"):
    arrays = [_operand(a) for a in tup]
    if not arrays:
        raise ValueError("Cannot concatenate from empty tuple")
    for a in arrays:
        if not isinstance(a, ndarray):
            raise TypeError("Only cupy arrays can be concatenated")
        if not a.ndim:
            raise TypeError("zero-dimensional arrays cannot be concatenated")
        if a.ndim != arrays[0].ndim:
            raise ValueError("All arrays to concatenate must have the same ndim")
    shapes = {(*a.shape[: axis % a.ndim], *a.shape[axis % a.ndim + 1 :]) for a in arrays}
    if len(shapes) > 1:
        raise ValueError("All arrays must have same shape except the axis to concatenate")
    _launch(arrays)
    return _into(out, numpy.concatenate([a._a for a in arrays], axis, dtype=dtype, casting=casting))


def _contiguous(a, dtype=None, order="C"):
    """cupy.ascontiguousarray: the array itself where it is so already."""
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (expected cupy.ndarray, got {type(a).__name__})")
    dtype = a.dtype if dtype is None else dtype
    return a.astype(dtype, order=order, copy=False)


def _broadcast_to(array, shape):
    if not isinstance(array, ndarray):
        raise TypeError(f"Argument 'array' has incorrect type (expected cupy.ndarray, got {type(array).__name__})")
    return array if array.shape == tuple(shape) else _view(array, numpy.lib.stride_tricks.as_strided(
        *_broadcast_strides(array._a, tuple(shape))))  # fmt: skip


def _broadcast_strides(values, shape):
    """Like numpy.broadcast_to, which would make the view read-only."""
    shown = numpy.broadcast_to(values, shape)  # raises ValueError
    return values, shown.shape, shown.strides


class broadcast:
    """cupy.broadcast."""

    def __init__(self, *arrays):
        arrays = [_operand(a) for a in arrays]
        self.shape = numpy.broadcast_shapes(*(a.shape for a in arrays if isinstance(a, ndarray)))
        self.values = tuple(_broadcast_to(a, self.shape) if isinstance(a, ndarray) else a for a in arrays)
        self.nd, self.size = len(self.shape), int(numpy.prod(self.shape, dtype=int))


def _searchsorted(a, v, side="left", sorter=None):
    if not isinstance(a, ndarray) or not isinstance(v, ndarray):
        raise NotImplementedError("Only int or ndarray are supported for a/v")
    if sorter is not None:
        raise NotImplementedError("the stand-in's searchsorted takes no sorter")
    _launch([a, v])
    return _own(numpy.searchsorted(a._a, v._a, side))


def _random_generator(seed=None):
    return Generator(seed)


class Generator:
    """cupy.random.Generator, with NumPy's numbers in place of cuRAND's."""

    def __init__(self, seed=None):
        self._rng = numpy.random.default_rng(seed)

    def _draw(self, values, dtype):
        _launch()
        return _own(numpy.asarray(values, dtype))

    def random(self, size=None, dtype=numpy.float64, out=None):
        return self._draw(self._rng.random(size), dtype)

    def standard_normal(self, size=None, dtype=numpy.float64, out=None):
        return self._draw(self._rng.standard_normal(size), dtype)

    def uniform(self, low=0.0, high=1.0, size=None, dtype=numpy.float64):
        return self._draw(self._rng.uniform(low, high, size), dtype)

    def integers(self, low, high=None, size=None, dtype=numpy.int64, endpoint=False):
        return self._draw(self._rng.integers(low, high, size, endpoint=endpoint), dtype)


# --- cuBLAS and cuSOLVER. Their status is looked at, and waited for, only within cupyx.errstate(linalg="raise"): else
# --- a singular matrix gives numbers that mean nothing, here NaN.


def _lapack(function, *arrays):
    _launch(arrays)
    checked = _translated["cupyx"].geterr()["linalg"] == "raise"
    if checked:
        _read_one()
    with numpy.errstate(all="ignore"):
        try:
            return function(*(a._a for a in arrays))
        except numpy.linalg.LinAlgError:
            if checked:
                raise
            return None


def _nan(array, *shapes):
    made = tuple(_own(numpy.full(shape, numpy.nan, array.dtype)) for shape in shapes)
    return made[0] if len(made) == 1 else made


def _linalg_types(*arrays):
    return _cupy.linalg._util.linalg_common_type(*arrays)


def _gesv(a, b):
    """cupyx.lapack.gesv: solves in place."""
    found = _lapack(numpy.linalg.solve, a, b if b.ndim > 1 else b.reshape(-1, 1))
    b._a[...] = numpy.nan if found is None else found.reshape(b.shape)


def _batched_gesv(a, b):
    dtype, out_dtype = _linalg_types(a, b)
    if 0 in a.shape or 0 in b.shape:
        return _empty(b.shape, out_dtype)
    column = b.ndim == a.ndim - 1
    found = _lapack(numpy.linalg.solve, a.astype(dtype), (b.reshape(*b.shape, 1) if column else b).astype(dtype))
    return _nan(b, b.shape) if found is None else _own(found.reshape(b.shape).astype(out_dtype))


def _batched_inv(a):
    dtype, out_dtype = _linalg_types(a)
    if not a.size:
        return _empty(a.shape, out_dtype)
    found = _lapack(numpy.linalg.inv, a.astype(dtype))
    return _nan(a, a.shape) if found is None else _own(found.astype(out_dtype))


def _slogdet(a):
    """cupy.linalg.slogdet: the LU factors it is made of are not NumPy's to give."""
    util = _cupy.linalg._util
    util._assert_stacked_2d(a)
    util._assert_stacked_square(a)
    dtype, sign_dtype = util.linalg_common_type(a)
    sign, log = _lapack(numpy.linalg.slogdet, a.astype(dtype))  # of a singular matrix: 0, -inf
    _machine.launches += 6
    return _own(numpy.asarray(sign, sign_dtype)), _own(numpy.asarray(log, sign_dtype))


def _cholesky(a):
    util = _cupy.linalg._util
    util._assert_cupy_array(a)
    util._assert_stacked_2d(a)
    util._assert_stacked_square(a)
    dtype, out_dtype = util.linalg_common_type(a)
    if not a.size:
        return _empty(a.shape, out_dtype)
    found = _lapack(numpy.linalg.cholesky, a.astype(dtype))
    return _nan(a, a.shape) if found is None else _own(found.astype(out_dtype))


def _qr(a, mode="reduced"):
    util = _cupy.linalg._util
    util._assert_cupy_array(a)
    if mode not in ("reduced", "complete", "r", "raw"):
        raise ValueError(f"Unrecognized mode '{mode}'")
    dtype, out_dtype = util.linalg_common_type(a)
    found = _lapack(functools.partial(numpy.linalg.qr, mode=mode), a.astype(dtype))
    if mode == "r":
        return _own(found.astype(out_dtype))
    return tuple(_own(part.astype(out_dtype)) for part in found)


def _svd(a, full_matrices=True, compute_uv=True):
    util = _cupy.linalg._util
    util._assert_cupy_array(a)
    util._assert_stacked_2d(a)
    dtype, out_dtype = util.linalg_common_type(a)
    found = _lapack(functools.partial(numpy.linalg.svd, full_matrices=full_matrices, compute_uv=compute_uv),
                    a.astype(dtype))  # fmt: skip
    m, n = a.shape[-2:]
    k = min(m, n)
    if found is None:
        shapes = ((*a.shape[:-2], m, k), (*a.shape[:-2], k), (*a.shape[:-2], k, n))
        return _nan(a, *shapes) if compute_uv else _nan(a, shapes[1])
    if not compute_uv:
        return _own(found.astype(out_dtype))
    return tuple(_own(part.astype(out_dtype)) for part in found)


def _eigh(a, UPLO="L"):
    util = _cupy.linalg._util
    util._assert_stacked_2d(a)
    util._assert_stacked_square(a)
    dtype, out_dtype = _linalg_types(a)
    if UPLO not in ("L", "U"):
        raise ValueError("UPLO argument must be 'L' or 'U'")
    w, v = _lapack(functools.partial(numpy.linalg.eigh, UPLO=UPLO), a.astype(dtype))
    return _own(w.astype(out_dtype)), _own(v.astype(out_dtype))


# -------------------------------------------------------------------------------- CuPy's own functions, on our arrays


def _is_cupys(name):
    return name.split(".")[0] in ("cupy", "cupyx", "cupy_backends") or name.startswith("array_api_compat.cupy")


_hidden: dict[str, types.ModuleType] = {}  # CuPy's own modules while they are out of sys.modules


def _real(name):
    return _hidden[name] if name in _hidden else sys.modules[name]


# Compiled helpers of CuPy that touch neither arrays nor the device.
_HARMLESS = {
    "cupy._util",
    "cupy._core.internal",
    "cupy._core._dtype",
    "cupy._core.fusion",
    "cupy._core._fusion_thread_local",
    "cupy._core._accelerator",
    "cupy._core.syncdetect",
}


class Module(types.ModuleType):
    """One of CuPy's modules as the stand-in shows it: its own names, with what lies below replaced."""

    def __init__(self, name, translator):
        super().__init__(name)
        self.__dict__["_translator"] = translator

    def __getattr__(self, name):
        if name == "__all__":
            real = _real(self.__name__)
            return [n for n in getattr(real, "__all__", dir(real)) if not n.startswith("_")]
        if name.startswith("__") and name not in ("__version__",):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = self._translator.lookup(self.__name__, name)
        self.__dict__[name] = value
        return value

    def __dir__(self):
        return dir(_real(self.__name__))


class Globals(dict):
    """The global names of one of CuPy's modules, looked up when its functions first use them."""

    def __init__(self, module, translator):
        super().__init__(__builtins__=builtins.__dict__, __name__=module)
        self._module, self._translator = module, translator

    def __missing__(self, name):
        if name not in vars(_real(self._module)):
            raise KeyError(name)
        value = self[name] = self._translator.lookup(self._module, name)
        return value


class Translator:
    """Turns what CuPy's modules hold into what the stand-in holds in its place."""

    def __init__(self, overrides):
        self.overrides = overrides
        self.modules, self.globals, self.made = {}, {}, {}
        core = _real("cupy._core.core")
        cupy = _real("cupy")
        self.classes = {
            core.ndarray: ndarray,
            core._ndarray_base: ndarray,
            cupy.ufunc: ufunc,
            cupy.ElementwiseKernel: ElementwiseKernel,
            cupy.RawKernel: RawKernel,
            cupy.RawModule: RawModule,
            cupy.broadcast: broadcast,
        }
        self.kernel_types = (cupy.ElementwiseKernel,)
        self.ufunc_type = cupy.ufunc

    def module(self, name):
        found = self.modules.get(name)
        if found is None:
            found = self.modules[name] = Module(name, self)
        return found

    def lookup(self, module, name):
        key = f"{module}.{name}"
        if key in self.overrides:
            return self.overrides[key]
        return self.translate(getattr(_real(module), name), key)

    def translate(self, value, key):
        if isinstance(value, types.ModuleType):
            name = types.ModuleType.__getattribute__(value, "__name__")  # without loading a lazy one
            return self.module(name) if _is_cupys(name) else value
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, self.ufunc_type):
            return self._once(value, lambda: ufunc(value))
        if isinstance(value, self.kernel_types):
            return self._once(value, lambda: ElementwiseKernel._around(value))
        if callable(value) and _is_cupys(getattr(value, "__module__", None) or type(value).__module__):
            wrapped = getattr(value, "__wrapped__", None)
            if isinstance(wrapped, types.FunctionType):
                return self._function(wrapped)  # memoised by device: nothing to gain here
            home = getattr(value, "__module__", None) or ""
            return value if home in _HARMLESS or key.rpartition(".")[0] in _HARMLESS else _absent(key)
        return value

    def _once(self, value, make):
        found = self.made.get(id(value))
        if found is None:
            found = self.made[id(value)] = make()
        return found

    def _class(self, value):
        if value in self.classes:
            return self.classes[value]
        if not _is_cupys(value.__module__) or issubclass(value, (BaseException, tuple)):
            return value
        return self._once(value, lambda: _absent_class(f"{value.__module__}.{value.__name__}"))

    def _function(self, value):
        home = value.__globals__.get("__name__", "")
        if not _is_cupys(value.__module__ or ""):
            return value
        return self._once(value, lambda: self._rebound(value, home))

    def _rebound(self, value, home):
        space = value.__globals__
        if _is_cupys(home):
            space = self.globals.get(home)
            if space is None:
                space = self.globals[home] = Globals(home, self)
        cells = None
        if value.__closure__:
            cells = tuple(types.CellType(self.translate(c.cell_contents, home)) for c in value.__closure__)
        defaults = tuple(self.translate(d, home) for d in value.__defaults__ or ()) or None
        made = types.FunctionType(value.__code__, space, value.__name__, defaults, cells)
        made.__kwdefaults__ = value.__kwdefaults__
        made.__doc__, made.__qualname__, made.__module__ = value.__doc__, value.__qualname__, value.__module__
        return made


def _absent(name):
    def absent(*_args, **_kwargs):
        raise NotImplementedError(f"the stand-in has no {name}: write it into {__name__}")

    absent.__name__ = name.rpartition(".")[2]
    return absent


def _absent_class(name):
    def refuse(cls, *_args, **_kwargs):
        raise NotImplementedError(f"the stand-in has no {name}: write it into {__name__}")

    return type(name.rpartition(".")[2], (), {"__new__": refuse})


def _overrides():
    core, math = "cupy._core._routines_", "cupy._core."
    table = {
        # below Python
        **{f"{place}.array": _array for place in ("cupy._core", "cupy._core.core")},
        **{f"{place}.ascontiguousarray": _contiguous for place in ("cupy._core", "cupy._core.core")},
        **{f"{place}._internal_ascontiguousarray": _contiguous for place in ("cupy._core", "cupy._core.core")},
        **{
            f"{place}.asfortranarray": functools.partial(_contiguous, order="F")
            for place in ("cupy._core", "cupy._core.core")
        },
        **{f"{place}.concatenate_method": _concatenate for place in ("cupy._core", f"{core}manipulation")},
        **{f"{place}.broadcast_to": _broadcast_to for place in ("cupy._core", f"{core}manipulation")},
        f"{core}manipulation._reshape": lambda a, shape, copy=None: a.reshape(shape, copy=copy),
        f"{core}manipulation._expand_dims": lambda a, axis: _view(a, numpy.expand_dims(a._a, axis)),
        f"{core}manipulation._transpose": lambda a, axes: a.transpose(axes),
        f"{core}manipulation._repeat": ndarray.repeat,
        **{f"{place}.moveaxis": _of_view(numpy.moveaxis) for place in ("cupy._core", f"{core}manipulation")},
        **{f"{place}.rollaxis": _of_view(numpy.rollaxis) for place in ("cupy._core", f"{core}manipulation")},
        **{
            f"{place}.size": lambda a, axis=None: a.size if axis is None else a.shape[axis]
            for place in ("cupy", "cupy._core")
        },
        f"{core}indexing._ndarray_argwhere": _argwhere,
        f"{core}math.scan_core": _scan_core,
        f"{core}math.scan_op": types.SimpleNamespace(SCAN_SUM=numpy.cumsum, SCAN_PROD=numpy.cumprod),
        f"{math}dot": _dot,
        f"{math}matmul": functools.partial(_matrix_product, numpy.matmul),
        "cupy.matmul": functools.partial(_matrix_product, numpy.matmul),
        "cupy._core._gufuncs._GUFunc": _absent("cupy._core._gufuncs._GUFunc"),
        f"{math}tensordot_core": _tensordot_core,
        **{
            f"cupy._creation.ranges.{name}": _by_position
            for name in ("_arange_ufunc", "_linspace_ufunc", "_linspace_ufunc_underflow")
        },
        "cupy.searchsorted": _searchsorted,
        "cupy._sorting.search.searchsorted": _searchsorted,
        "cupy._util.check_array": _check_array,
        "cupy.from_dlpack": from_dlpack,
        "cupy.linalg._util._tril": lambda x, k=0: _in_place(x, numpy.tril, k),
        "cupy.linalg._util._triu": lambda x, k=0: _in_place(x, numpy.triu, k),
        # libraries
        "cupyx.lapack.gesv": _gesv,
        "cupy.cublas.batched_gesv": _batched_gesv,
        "cupy.cublas.get_batched_gesv_limit": lambda: 2048,
        "cupy.linalg._solve._batched_inv": _batched_inv,
        **{f"{place}.slogdet": _slogdet for place in ("cupy.linalg", "cupy.linalg._norms")},
        **{f"{place}.cholesky": _cholesky for place in ("cupy.linalg", "cupy.linalg._decomposition")},
        **{f"{place}.qr": _qr for place in ("cupy.linalg", "cupy.linalg._decomposition")},
        **{f"{place}.svd": _svd for place in ("cupy.linalg", "cupy.linalg._decomposition")},
        **{f"{place}.eigh": _eigh for place in ("cupy.linalg", "cupy.linalg._eigenvalue")},
        "cupy.random.default_rng": _random_generator,
        "cupy.random.Generator": Generator,
        # the device
        "cupy.get_default_memory_pool": lambda: _memory_pool,
        "cupy.get_default_pinned_memory_pool": lambda: _pinned_pool,
        "cupy.is_available": lambda: True,
        "cupyx.empty_pinned": empty_pinned,
        "cupyx.zeros_pinned": zeros_pinned,
    }
    cuda = {
        "Device": Device,
        "Stream": Stream,
        "Event": Event,
        "MemoryPool": MemoryPool,
        "MemoryPointer": Pointer,
        "is_available": lambda: True,
        "get_device_id": lambda: _machine.device,
        "get_current_stream": get_current_stream,
        "get_elapsed_time": get_elapsed_time,
    }
    table |= {f"cupy.cuda.{name}": value for name, value in cuda.items()}
    table |= {f"cupy.cuda.device.{name}": cuda[name] for name in ("Device", "get_device_id")}
    table |= {f"cupy.cuda.stream.{name}": cuda[name] for name in ("Stream", "Event", "get_current_stream")}
    runtime = {
        "getDeviceCount": lambda: len(_machine.pools),
        "getDevice": lambda: _machine.device,
        "setDevice": _set_device,
        "memGetInfo": lambda: Device().mem_info,
        "driverGetVersion": lambda: 13000,
        "runtimeGetVersion": lambda: 13000,
        "getDeviceProperties": _device_properties,
        "deviceSynchronize": _device_synchronize,
        "deviceCanAccessPeer": lambda device, peer: 0,
    }
    for place in ("cupy.cuda.runtime", "cupy_backends.cuda.api.runtime"):
        table |= {f"{place}.{name}": value for name, value in runtime.items()}
    return table


def _scan_core(a, axis, op, dtype=None, out=None):
    return _scan(a, op, axis, dtype, out)


def _tensordot_core(a, b, out, n, m, k, ret_shape):
    _launch([a, b])
    dtype = numpy.result_type(a.dtype, b.dtype)
    wide = numpy.float32 if dtype == numpy.float16 else dtype
    left, right = a._a.reshape(k, n).astype(wide), b._a.reshape(k, m).astype(wide)
    with numpy.errstate(all="ignore"):
        return _into(out, (left.T @ right).reshape(tuple(ret_shape)).astype(dtype))


def _by_position(start, step, out, *divisor, dtype=None):
    """The ufuncs behind arange and linspace, which count elements."""
    _launch([], [out], count=bool(out.size))
    steps = numpy.arange(out.size, dtype=out.dtype if out.dtype.kind in "iu" else float) * step
    out._a[...] = start + (steps / divisor[0] if divisor else steps)
    return out


def _of_view(function):
    return lambda array, *args: _view(array, function(array._a, *args))


def _check_array(array, *, arg_name):
    if not isinstance(array, ndarray):
        raise TypeError(f"{arg_name} must be cupy.ndarray")


def _in_place(x, function, k):
    _launch([x], [x])
    x._a[...] = function(x._a, k)
    return x


# ------------------------------------------------------------------------------------------------- installation


_cupy: types.ModuleType = None  # type: ignore[assignment]  # the stand-in's own `cupy`
_translated: dict[str, types.ModuleType] = {}  # what goes into sys.modules, once made
_attach_operators()


class Count:
    """What happened inside a `counting` block."""

    def __init__(self):
        self.syncs = self.launches = self.bytes_to_device = self.bytes_to_host = 0


@contextlib.contextmanager
def counting():
    """Count within a block: syncs, launches, bytes_to_device, bytes_to_host."""
    count = Count()
    before = {name: getattr(_machine, name) for name in vars(count)}
    try:
        yield count
    finally:
        for name, value in before.items():
            setattr(count, name, getattr(_machine, name) - value)


class Cupy(Module):
    """The stand-in's `cupy`, with the counters beside CuPy's own names."""

    syncs = property(lambda self: _machine.syncs)
    launches = property(lambda self: _machine.launches)
    bytes_to_device = property(lambda self: _machine.bytes_to_device)
    bytes_to_host = property(lambda self: _machine.bytes_to_host)
    counting = staticmethod(counting)


@contextlib.contextmanager
def install(devices=1, memory=16 << 30):
    """Put the stand-in in CuPy's place until the block ends, on a fresh machine; yields it.

    devices: how many GPUs the machine has. memory: bytes that each of them has.
    """
    global _machine, _cupy
    if problem():
        raise RuntimeError(problem())
    before = _machine
    nested = before is not None
    if not nested:
        _load_all()
        for name in [name for name in sys.modules if _is_cupys(name)]:
            _hidden[name] = sys.modules.pop(name)
    _machine = Machine(devices, memory)
    try:
        if not _translated:
            _translate_all()
        sys.modules.update(_translated)
        yield _cupy
    finally:
        for queue in _machine.queues:
            queue.pending, queue.done = [], queue.issued
        _machine = before
        if not nested:
            for name in [name for name in sys.modules if _is_cupys(name)]:
                del sys.modules[name]
            sys.modules.update(_hidden)
            _hidden.clear()


def _load_all():
    """Import what CuPy would import on first use, as long as it is there to import."""
    import cupy  # noqa: F401
    import cupyx  # noqa: F401


def _translate_all():
    """Make the stand-in's modules, and array-api-compat's names for CuPy on top of them."""
    global _cupy
    translator = Translator(_overrides())
    _cupy = translator.modules["cupy"] = Cupy("cupy", translator)
    names = [name for name in _hidden if name.split(".")[0] != "array_api_compat"]
    made = {name: translator.module(name) for name in names}
    for name in ("cupyx.lapack", "cupy.cublas"):  # their own modules need the libraries they bind
        made[name] = types.ModuleType(name)
        for key, value in translator.overrides.items():
            if key.rpartition(".")[0] == name:
                setattr(made[name], key.rpartition(".")[2], value)
        parent, _, child = name.rpartition(".")
        made[parent].__dict__[child] = made[name]
    sys.modules.update(made)
    importlib.import_module("array_api_compat.cupy")
    _translated.update({name: module for name, module in sys.modules.items() if _is_cupys(name)})


def signature_of(function) -> inspect.Signature | None:
    """Return the signature that a compiled function's docstring begins with, or None where it shows none."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        line = (getattr(function, "__doc__", None) or "").partition("\n")[0].partition(" -> ")[0]
        inside = line[line.find("(") + 1 : line.rfind(")")] if "(" in line else None
    if inside is None:
        return None
    # Cython writes C types before some names
    plain = ", ".join(part.strip().split(" ")[-1] if part.strip() not in "*/" else part for part in inside.split(","))
    space: dict[str, object] = {}
    try:
        exec(f"def shown({plain}): pass", {}, space)
    except (SyntaxError, NameError):
        return None
    return inspect.signature(space["shown"])
