"""The machine of the stand-in for CuPy: devices, their memory, streams and events, and the counters."""

import contextlib
import functools
import gc
import itertools
import threading
import time
import weakref

import numpy

from cuda_proof import originals

HOST = numpy.ndarray
UNIT = 512  # the pool hands out memory in steps of this


class Freed(AssertionError):
    """A graph touches memory that was given back after its capture and that nobody has now."""


class Race(AssertionError):
    """Two streams use the same memory, one of them to write, with nothing that orders them."""


class Here:
    """The installation that is in force: its Machine, and its `cupy`."""

    machine = None
    cupy = None


here = Here()

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
        self.live = weakref.WeakValueDictionary()  # blocks by address

    @property
    def device(self):
        return getattr(self.local, "device", 0)


class Pool:
    """The memory of one device, as cupy.cuda.MemoryPool counts it (without fragmentation)."""

    def __init__(self, machine, device):
        self.machine, self.device = machine, device
        self.used = self.free = self.limit = 0
        self.lock = threading.Lock()
        self.spare = {}  # memory that was given back, by size and stream

    def memory(self, nbytes):
        """Return memory, and what it is to be given back as: what came back last, if there is any of that size."""
        key = (-(-nbytes // UNIT) * UNIT, get_current_stream().ptr)
        kept = self.spare.get(key)
        try:
            raw = kept.pop() if kept else None
        except IndexError:  # another thread took it
            raw = None
        return (numpy.empty(key[0] + UNIT, numpy.uint8) if raw is None else raw), key

    def empty(self):
        """Give back to the system what is kept for later."""
        self.free = 0
        self.spare.clear()

    def take(self, nbytes):
        size = -(-nbytes // UNIT) * UNIT
        if not self._fits(size):
            self.empty()
            gc.collect()
            if not self._fits(size):
                limit = self.limit or self.machine.memory
                raise originals.real("cupy.cuda.memory").OutOfMemoryError(size, self.used + self.free, limit)
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

    __slots__ = ("__weakref__", "buffer", "kept", "pool", "reads", "size", "written")

    def __init__(self, buffer, kept=None):
        self.size = 0
        self.kept = kept  # the memory it lies in and its place in the pool, if it comes from there
        self.pool = here.machine.pools[here.machine.device]
        self.size = self.pool.take(buffer.nbytes)
        self.buffer = buffer
        self.written, self.reads = None, {}
        if self.size:
            here.machine.live[self.address] = self

    @property
    def device(self):
        return self.pool.device

    @property
    def address(self):
        return self.buffer.ctypes.data

    def __del__(self):
        if self.size:
            self.pool.give_back(self.size)
            if self.kept is not None:
                self.pool.spare.setdefault(self.kept[1], []).append(self.kept[0])


class Foreign(Block):
    """Memory that came through __cuda_array_interface__: somebody else's, kept alive by `owner`."""

    __slots__ = ("owner",)

    def __init__(self, buffer, owner, pool):
        self.size, self.pool, self.owner, self.kept = 0, pool, owner, None
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
            touch((), [self.mem])
            self._bytes(size)[...] = value

    def copy_from_device_async(self, src, size, stream=None):
        with contextlib.nullcontext() if stream is None else stream:
            touch([src.mem], [self.mem])
            self._bytes(size)[...] = src._bytes(size)


# ------------------------------------------------------------------------------------------------- streams


class Queue:
    """What has been handed to one stream: copies that wait, and a vector clock that tells what comes before what."""

    def __init__(self, key, kind, device):
        self.key, self.kind, self.device = key, kind, device
        self.pending, self.issued, self.done = [], 0, 0
        self.clock = {}
        self.capture = None  # the graph that operations go into, while there is one

    def begin(self):
        """Take the order in which the next operation stands: after the host's waits, and the legacy stream's rule."""
        _join(self.clock, here.machine.host)
        for other in here.machine.queues:
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
        here.machine.ordering = True
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


def wait(queue, upto=None, clock=None):
    """Let the host wait for a stream, or for an event in it."""
    if queue.capture is not None:
        raise originals.real("cupy.cuda").runtime.CUDARuntimeError(900)  # not permitted when stream is capturing
    here.machine.syncs += 1
    queue.flush(upto)
    _join(here.machine.host, queue.clock if clock is None else clock)


class Stream:
    """cupy.cuda.Stream."""

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        if ptds:
            raise NotImplementedError("the stand-in has no per-thread default stream")
        self.device_id = -1 if null else here.machine.device
        self._machine = here.machine
        self._own = None
        self.ptr = 0
        if not null:
            self.ptr = next(here.machine.ids) << 12
            self._own = Queue(self.ptr, "free" if non_blocking else "blocking", here.machine.device)
            here.machine.queues.append(self._own)
            here.machine.ordering = True
            weakref.finalize(self, _forget, here.machine, self._own)

    @property
    def _queue(self):
        return here.machine.null[here.machine.device] if self._own is None else self._own

    def _check_device(self):
        if self._own is not None and self.device_id != here.machine.device:
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with the current device "
                f"({here.machine.device})"
            )

    def __enter__(self):
        self._check_device()
        stack = here.machine.local.__dict__.setdefault("streams", {}).setdefault(here.machine.device, [])
        here.machine.local.__dict__.setdefault("entered", []).append(here.machine.device)
        stack.append(self)
        return self

    def __exit__(self, *_):
        here.machine.local.streams[here.machine.local.entered.pop()].pop()

    def use(self):
        self._check_device()
        stack = here.machine.local.__dict__.setdefault("streams", {}).setdefault(here.machine.device, [])
        stack[-1:] = [self]
        return self

    def __eq__(self, other):
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self):
        return self.ptr

    def begin_capture(self, mode=None):
        if self._own is None:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._own.capture is not None:
            raise originals.real("cupy.cuda").runtime.CUDARuntimeError(1)  # invalid argument
        self._own.capture = Graph._captured()

    def end_capture(self):
        if self._own is None or self._own.capture is None:
            raise originals.real("cupy.cuda").runtime.CUDARuntimeError(1)
        graph, self._own.capture = self._own.capture, None
        return graph

    def is_capturing(self):
        return self._queue.capture is not None

    @property
    def done(self):
        return self._queue.done == self._queue.issued

    def synchronize(self):
        self._queue.begin()
        wait(self._queue)

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
    stack = getattr(here.machine.local, "streams", {}).get(here.machine.device if device_id == -1 else device_id)
    return stack[-1] if stack else Stream.null


class Graph:
    """cupy.cuda.Graph: kernels with the arguments they were captured with, which do not keep memory alive.

    Memory at the same address is the same memory, as for CUDA: what was given back and handed out again since.
    """

    def __init__(self, *args, **kwargs):
        raise NotImplementedError(
            "currently this class cannot be initiated by the user and must be created via stream capture"
        )

    @classmethod
    def _captured(cls):
        self = object.__new__(cls)
        self._device, self._kernels = here.machine.device, []
        return self

    def launch(self, stream=None):
        machine, before = here.machine, here.machine.launches
        with contextlib.nullcontext() if stream is None else stream:
            if get_current_stream()._queue.capture is not None:
                raise NotImplementedError("the stand-in captures no graph within a graph")
            for reads, writes, work in self._kernels:
                blocks = [[block() or machine.live.get(at) for block, at in some] for some in (reads, writes)]
                if None in blocks[0] or None in blocks[1]:
                    raise Freed("a graph is launched on memory that was freed after its capture")
                touch(*blocks)
                work()
        machine.launches = before + 1

    def upload(self, stream=None):
        pass


def captured(reads, writes, work):
    """Put a kernel into the graph that the current stream captures, and tell whether it does: then it is not run."""
    graph = get_current_stream()._queue.capture
    if graph is None:
        return False
    on_this_device(*reads, *writes)
    used = ([(weakref.ref(a._block), a._block.address) for a in some] for some in (reads, writes))
    graph._kernels.append((*used, work))
    return True


def library(name):
    """A library of NVIDIA's is called, which CuPy does not allow during a capture."""
    if get_current_stream()._queue.capture is not None:
        raise NotImplementedError(f"calling {name} API during stream capture is currently unsupported")


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
            wait(self._queue, self._position, self._clock)


def get_elapsed_time(start_event, end_event):
    if None in (start_event._time, end_event._time) or not (start_event._timed and end_event._timed):
        raise ValueError("both events must have been recorded, with timing")
    return max(1e3 * (end_event._time - start_event._time), 1e-3)


# ----------------------------------------------------------------------------------- what an operation goes through


def on_this_device(*arrays):
    current = here.machine.device
    for array in arrays:
        if array._block.pool.device != current:
            raise ValueError(
                f"The device where the array resides ({array._block.pool.device}) is different from the current device "
                f"({current}). Peer access is unavailable between these devices."
            )


def launch(reads=(), writes=(), *, count=1):
    """Begin a kernel, or a copy within the device, on the current stream."""
    on_this_device(*reads, *writes)
    touch([a._block for a in reads], [a._block for a in writes], count)


def touch(reads, writes, count=1):
    if get_current_stream()._queue.capture is not None:
        raise NotImplementedError("the stand-in captures kernels of gpugrad's, ufuncs with `out`, fill and copies only")
    here.machine.launches += count
    if here.machine.ordering:
        queue = get_current_stream()._queue
        queue.begin()
        queue.flush()
        for block in reads:
            queue.touches(block, write=False)
        for block in writes:
            queue.touches(block, write=True)


def written(array):
    """Note that the current stream wrote a fresh array."""
    if here.machine.ordering:
        queue = get_current_stream()._queue
        array._block.written = (queue.key, queue.clock.get(queue.key, 0))
    return array


def junk(dtype):
    return numpy.full((), 0xFF, numpy.uint8).repeat(dtype.itemsize).view(dtype)[0] if dtype.kind != "b" else True


def is_pinned(array):
    """Tell whether a host array lies in pinned memory."""
    while isinstance(array.base, HOST):
        array = array.base
    return isinstance(array, PinnedArray)


class PinnedArray(HOST):
    """Carries the mark of pinned memory at the root of what is given out as plain arrays."""


def empty_pinned(shape, dtype=float, order="C"):
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    root = HOST.__new__(PinnedArray, shape, dtype, order=order)
    root.view(HOST)[...] = junk(root.dtype)
    return root.view(HOST)


def zeros_pinned(shape, dtype=float, order="C"):
    array = empty_pinned(shape, dtype, order)
    array[...] = 0
    return array


def _no_capture(queue):
    if queue.capture is not None:
        raise NotImplementedError("the stand-in captures no copies from or to the host")


def to_device(target, source, stream):
    """Copy from the host: pinned memory is read when the stream gets there, other memory at once."""
    queue = stream._queue
    _no_capture(queue)
    here.machine.bytes_to_device += source.nbytes
    if here.machine.ordering or is_pinned(source):
        queue.begin()
        queue.touches(target._block, write=True)
        held = source if is_pinned(source) else source.copy()
        queue.enqueue(lambda: numpy.copyto(target._a, held))
    else:
        numpy.copyto(target._a, source)


def to_host(target, source, stream, blocking):
    """Copy to the host, into pinned memory when the stream gets there; `blocking` waits for that."""
    queue = stream._queue
    _no_capture(queue)
    here.machine.bytes_to_host += source.nbytes
    if here.machine.ordering or (not blocking and is_pinned(target)):
        queue.begin()
        queue.touches(source._block, write=False)
        queue.enqueue(lambda: numpy.copyto(target, source._a))
        if not is_pinned(target):
            queue.flush()
    else:
        numpy.copyto(target, source._a)
    if blocking:
        wait(queue)


# ----------------------------------------------------------------------------------------------------- cupy.cuda


class Device:
    """cupy.cuda.Device."""

    def __init__(self, device=None):
        self.id = here.machine.device if device is None else int(device)

    def use(self):
        if not 0 <= self.id < len(here.machine.pools):
            raise originals.real("cupy.cuda").runtime.CUDARuntimeError(101)  # invalid device ordinal
        here.machine.local.device = self.id

    def __enter__(self):
        before = here.machine.device
        self.use()
        here.machine.local.__dict__.setdefault("devices", []).append(before)
        return self

    def __exit__(self, *_):
        here.machine.local.device = here.machine.local.devices.pop()

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
            device_synchronize()

    @property
    def compute_capability(self):
        return "90"

    @property
    def mem_info(self):
        pool = here.machine.pools[self.id]
        return here.machine.memory - pool.used - pool.free, here.machine.memory

    @property
    def attributes(self):
        return {"MultiProcessorCount": 132, "WarpSize": 32, "MaxThreadsPerBlock": 1024, "ClockRate": 1_980_000}

    @property
    def pci_bus_id(self):
        return f"0000:{self.id + 1:02X}:00.0"


def device_synchronize():
    if any(queue.capture is not None for queue in here.machine.queues):
        raise originals.real("cupy.cuda").runtime.CUDARuntimeError(900)
    here.machine.syncs += 1
    for queue in [q for q in here.machine.queues if q.device == here.machine.device]:
        queue.flush()
        _join(here.machine.host, queue.clock)


class MemoryPool:
    """cupy.cuda.MemoryPool: of whichever device is current."""

    _pool = property(lambda self: here.machine.pools[here.machine.device])

    def used_bytes(self):
        return self._pool.used

    def free_bytes(self):
        return self._pool.free

    def total_bytes(self):
        return self._pool.used + self._pool.free

    def n_free_blocks(self):
        return int(self._pool.free > 0)

    def free_all_blocks(self, stream=None):
        self._pool.empty()

    def set_limit(self, size=None, fraction=None):
        if (size is None) == (fraction is None) and size is not None:
            raise ValueError("size and fraction cannot be specified at one time")
        size = int(fraction * here.machine.memory) if size is None else size
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


memory_pool, pinned_pool = MemoryPool(), PinnedMemoryPool()


def device_properties(device_id):
    return {
        "name": b"stand-in",
        "totalGlobalMem": here.machine.memory,
        "sharedMemPerBlock": 49152,
        "regsPerBlock": 65536,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
        "l2CacheSize": 50 << 20,
    }


def set_device(device):
    Device(device).use()
