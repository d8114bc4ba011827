"""CUDA kernels on the CPU: the unchanged text that CuPy would give to NVRTC, compiled by g++ and run on NumPy memory.

`run_elementwise` takes a real `cupy.ElementwiseKernel` and does on the host what its `__call__` does on the device:
broadcasting, the types, the reduction of dimensions, 32 or 64-bit indices, the grid. The source is CuPy's own, with its
own index code (carray.cuh). `run_raw` takes the text of an `extern "C" __global__` kernel; where that has barriers or
warp functions, each thread of a block is a fiber (launch.h).

What this shows and what it does not:

- Values. Arithmetic is IEEE, with multiply-adds contracted where the processor has them, as nvcc does by default,
  though not always the same ones. Mathematical functions are the host's, good to about one unit in the last place;
  `worst=True` moves each result of exp, log, tanh, rsqrt and their fast forms by the largest error CUDA documents.
- Flush to zero. CuPy compiles with -ftz=true, which concerns float32 only. Here the processor's own switch does it,
  for all its arithmetic, so it is on where no float64 takes part (or as `flush` says). It covers arithmetic,
  comparisons and the results of functions; copying a subnormal, negating it or taking its absolute value keeps it,
  where the device may flush it. float16 keeps its subnormals, as on the device.
- Memory. Arrays from `guarded` end at a page that nobody may touch; misaligned vectors, indices beyond a fixed array
  and signed overflow stop the kernel; shared memory starts as NaNs. All of this raises KernelFault.
- Barriers. A barrier or warp function that not all threads reach raises KernelFault with the lines of the kernel's text
  where threads wait; so does one that a thread has left the kernel before, which the hardware forgives. Threads run
  one after the other, so there are no races; `reverse=True` runs them in the opposite order, and a result that
  changes with it lacks a barrier.

Compiled kernels are kept in $GPUGRAD_EMULATOR_CACHE or a folder of temporary files, under the hash of text and options.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LIMIT_32_BITS = 1 << 31
NO_LIMIT = 0x7FFFFFFF
OPTIONS = [
    "-O1",
    "-std=gnu++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-w",
    "-fsanitize=alignment,bounds,integer-divide-by-zero,signed-integer-overflow",
    "-fsanitize-undefined-trap-on-error",
]
WAITS = re.compile(r"__syncthreads|__syncwarp|__shfl|__ballot|__any_sync|__all_sync|__activemask")


DOUBLE = re.compile(r"(?:\busing\s+T\s*=|^\s*#\s*define\s+\w*T)\s*double\b", re.MULTILINE)
DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:(?:__align__|alignas)\s*\(\s*\w+\s*\)\s*)?([\w:]+(?:\s+[\w:]+)*)\s+(\w+)\s*\[\s*\]\s*;"
)


class KernelFault(RuntimeError):
    """The kernel did what a GPU may not survive: its message says what, in which block and thread."""


def missing() -> str | None:
    """Say why kernels cannot run here, or None when they can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported (no GPU is needed: pip install cupy-cuda13x): {error}"
    if shutil.which("g++") is None:
        return "there is no g++"
    if platform.machine() not in ("x86_64", "aarch64"):
        return f"flush-to-zero is not known for {platform.machine()}"
    try:
        _include_options()
    except RuntimeError as error:
        return f"CuPy {cupy.__version__} finds no CUDA headers: {error}"
    return None


def private(module: str, name: str):
    """Return a private name of CuPy, or fail in words: the proof stands on a few of them."""
    import importlib

    import cupy

    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"CuPy {cupy.__version__} has no {module}.{name}, which the proof without a GPU needs: "
            "take CuPy 14.2, or find the new name"
        ) from error


# Compiling


@functools.cache
def _include_options() -> tuple[str, ...]:
    """Return the folders of headers that CuPy gives to NVRTC, its own and NVIDIA's."""
    options = private("cupy._core.core", "assemble_cupy_compiler_options")(())
    return tuple(option for option in options if option.startswith("-I"))


@functools.cache
def _host_options() -> tuple[str, ...]:
    """Return what depends on the machine: multiply-adds in one instruction, where the processor has it."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    return ("-mfma",) if platform.machine() == "x86_64" and re.search(r"\bfma\b", flags) else ()


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def cache_folder() -> Path:
    """Return the folder of compiled kernels, made if it is not there."""
    folder = os.environ.get("GPUGRAD_EMULATOR_CACHE") or Path(tempfile.gettempdir()) / f"gpugrad-emulator-{os.getuid()}"
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(folder)


@functools.cache
def _flags() -> list[str]:
    version = private("cupy_backends.cuda.api.driver", "get_build_version")() // 1000
    return [*OPTIONS, *_host_options(), f"-I{HERE}", *_include_options(), f"-D__CUDACC_VER_MAJOR__={version}"]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _make(target: Path, options: list[str], text: str) -> Path:
    """Compile a text to a file that is named by its hash, unless it is there; return the file."""
    if target.exists():
        return target
    # Two processes may compile the same text: each writes its own file, and the rename is atomic.
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        source, result = Path(folder) / "kernel.cpp", Path(folder) / "result"
        source.write_text(text)
        run = subprocess.run(["g++", *options, "-o", str(result), str(source)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"g++ cannot compile the kernel:\n{run.stderr[:4000]}")
        result.replace(target)
    return target


@functools.cache
def _prelude(includes: tuple[str, ...]) -> Path:
    """Write the header that comes before a kernel and compile it: reading CuPy's headers takes longer than the rest."""
    text = '#include "shim.h"\n#include "launch.h"\n' + "".join(f"{line}\n" for line in includes)
    own = [(HERE / name).read_text() for name in ("shim.h", "launch.h")]
    header = cache_folder() / f"{_hash(text, *own, *_flags(), _compiler_version())}.h"
    if not header.exists():
        with tempfile.NamedTemporaryFile("w", dir=cache_folder(), delete=False) as file:
            file.write(text)
        Path(file.name).replace(header)
    _make(header.with_suffix(".h.gch"), [*_flags(), "-x", "c++-header"], text)
    return header


class _What(ctypes.Structure):
    """launch.h's gg::Launch."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("first", ctypes.c_ulonglong),
        ("stop", ctypes.c_ulonglong),
        ("shared", ctypes.c_ulonglong),
        ("flush", ctypes.c_int),
        ("fibers", ctypes.c_int),
        ("reverse", ctypes.c_int),
        ("worst", ctypes.c_int),
    )


class _Compiled:
    """A kernel in a shared object: its parameters and how to launch it."""

    def __init__(self, includes: list[str], source: str, name: str, options: tuple[str, ...]) -> None:
        header = _prelude(tuple(includes))
        flags = [*_flags(), "-shared", f"-I{header.parent}", *(o for o in options if o.startswith(("-D", "-I")))]
        text = f'#include "{header.name}"\n#line 1 "{name}.cu"\n{source}\nGG_EXPORT({name})\n'
        target = cache_folder() / f"{_hash(text, *flags)}.so"
        # PyDLL keeps the interpreter's lock: a kernel's state is global, so launches must not overlap.
        library = ctypes.PyDLL(str(_make(target, flags, text)))
        self.name, self.fibers = name, bool(WAITS.search(source))
        self._launch = library.gg_launch
        self._launch.restype, self._launch.argtypes = ctypes.c_char_p, (ctypes.POINTER(_What), ctypes.c_void_p)
        sizes, kinds = (ctypes.c_int * 4096)(), ctypes.create_string_buffer(4096)
        number = library.gg_signature(sizes, kinds)
        self.sizes, self.kinds = list(sizes[:number]), kinds.raw[:number].decode()

    def launch(self, grid, block, values, *, shared, flush, reverse, worst, blocks) -> None:
        """Launch with the bytes of each argument; ValueError if they do not fit, KernelFault if the kernel fails."""
        if [len(v) for v in values] != self.sizes:
            raise ValueError(
                f"{self.name}: the arguments have {[len(v) for v in values]} bytes, the parameters {self.sizes}; "
                "give each its exact type (numpy.float32(...), numpy.int64(...))"
            )
        total = grid[0] * grid[1] * grid[2]
        first, stop = (0, total) if blocks is None else blocks
        three = ctypes.c_uint * 3
        what = _What(three(*grid), three(*block), first, stop, shared, flush, self.fibers, reverse, worst)
        memory = [ctypes.create_string_buffer(v, max(len(v), 1) + 16) for v in values]
        # A structure may be declared with 16-byte alignment, so the values lie at such addresses.
        aligned = (ctypes.c_void_p * max(len(values), 1))()
        for i, (buffer, value) in enumerate(zip(memory, values, strict=True)):
            address = -(-ctypes.addressof(buffer) // 16) * 16
            ctypes.memmove(address, value, len(value))
            aligned[i] = address
        message = self._launch(what, aligned)
        if message:
            raise KernelFault(f"{self.name}: {message.decode()}")


# Elementwise kernels


class _Argument:
    """A NumPy array with what a CuPy array carries along its views: contiguity, and whether 32-bit indices do."""

    def __init__(self, array: np.ndarray, shape, strides, contiguous: bool, narrow: bool) -> None:
        self.array, self.shape, self.strides = array, tuple(shape), tuple(strides)
        self.contiguous, self.narrow = contiguous, narrow

    @classmethod
    def of(cls, array: np.ndarray, wide: bool) -> "_Argument":
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        narrow = not wide and root.nbytes <= LIMIT_32_BITS
        return cls(array, array.shape, array.strides, array.flags.c_contiguous, narrow)

    def viewed(self, shape, strides, contiguous: bool) -> "_Argument":
        return _Argument(self.array, shape, strides, contiguous, self.narrow)

    def bytes(self) -> bytes:
        n, size = len(self.shape), int(np.prod(self.shape, dtype=object))
        return struct.pack(f"=Qq{2 * n}q", self.array.ctypes.data, size, *self.shape, *self.strides)


def _contiguous(shape, strides, itemsize: int) -> bool:
    """Tell C order, where an axis of length 1 may have any stride, and nothing is always in order."""
    if 0 in shape:
        return True
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != itemsize:
            return False
        itemsize *= length
    return True


def _broadcast(arguments: list, params) -> tuple[int, ...]:
    """Give the arrays that are not raw their common shape, in place; return it."""
    places = [i for i, a in enumerate(arguments) if isinstance(a, _Argument) and not params[i].raw]
    shape = np.broadcast_shapes(*(arguments[i].shape for i in places))
    for i in places:
        a = arguments[i]
        if a.shape == shape:
            continue
        pad = len(shape) - len(a.shape)
        strides = [0] * pad + [s if n == m else 0 for n, m, s in zip(a.shape, shape[pad:], a.strides, strict=True)]
        arguments[i] = wider = a.viewed(shape, strides, _contiguous(shape, strides, a.array.itemsize))
        wider.narrow &= int(np.prod(shape, dtype=object)) * a.array.itemsize <= LIMIT_32_BITS
    return shape


def _reduce_dims(arguments: list, params, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Merge axes that lie behind one another in every array, as CuPy does before it generates index code."""
    places = [i for i, a in enumerate(arguments) if isinstance(a, _Argument) and not params[i].raw]
    strided = [i for i in places if not arguments[i].contiguous]
    if len(shape) <= 1 or not places or (len(shape) == 2 and strided):
        return shape
    if not strided:
        merged = (int(np.prod(shape, dtype=object)),)
        for i in places:
            arguments[i] = arguments[i].viewed(merged, (arguments[i].array.itemsize,), arguments[i].contiguous)
        return merged
    lengths, axes, last = list(shape), [], -1
    for axis, length in enumerate(shape):
        if length == 1:
            continue
        if last >= 0:
            if all(arguments[i].strides[axis] * length == arguments[i].strides[last] for i in strided):
                lengths[axis] *= lengths[last]
            else:
                axes.append(last)
        last = axis
    if last >= 0:
        axes.append(last)
    if len(axes) == len(shape):
        return shape
    merged = tuple(lengths[axis] for axis in axes)
    for i in places:
        a = arguments[i]
        arguments[i] = a.viewed(merged, [a.strides[axis] for axis in axes], a.contiguous)
    return merged


# CuPy's numbers for kinds of argument (its enum is not visible from Python).
NDARRAY, INDEXER, SCALAR = 1, 2, 3


def argument_infos(layouts) -> tuple:
    """Build CuPy's descriptions of arguments from (kind, dtype, ndim, contiguous, narrow) tuples."""
    import cupy

    make = private("cupy._core._kernel", "_ArgInfo")
    types = {
        NDARRAY: cupy.ndarray,
        INDEXER: private("cupy._core._carray", "Indexer"),
        SCALAR: private("cupy._core._scalar", "CScalar"),
    }
    return tuple(
        make(kind, types[kind], dtype, n, contiguous, narrow) for kind, dtype, n, contiguous, narrow in layouts
    )


def elementwise_source(kernel, layouts, type_map) -> str:
    """Return the text that CuPy gives to NVRTC for these arguments, headers included."""
    generate = private("cupy._core._kernel", "_get_elementwise_kernel_code")
    headers = private("cupy._core.core", "_cupy_header_list")
    text = generate(
        argument_infos(layouts),
        type_map,
        kernel.params,
        kernel.operation,
        kernel.name,
        kernel.preamble,
        **kernel.kwargs,
    )
    return "".join(f"#include <{header}>\n" for header in headers) + text


@functools.cache
def _compiled_elementwise(source: str, name: str, options: tuple[str, ...]) -> _Compiled:
    includes = re.findall(r"^#include .cupy/.*$", source, re.MULTILINE)
    return _Compiled(includes, re.sub(r"^#include .cupy/.*$", "", source, flags=re.MULTILINE), name, options)


# By kernel and layouts, so that a repeated call does not ask CuPy for the text again. The kernel itself is the key.
_plans: dict[tuple, _Compiled] = {}


def run_elementwise(kernel, args, kwargs=None, *, wide=False, flush=None, reverse=False, worst=False, blocks=None):
    """Run a `cupy.ElementwiseKernel` on NumPy arrays and return the list of its outputs.

    Parameters
    ----------
    args
        What the kernel would be called with: NumPy arrays for its CuPy arrays, Python or NumPy scalars. Outputs may be
        left out, or given and are then written in place.
    kwargs
        The kernel's own `size`, `block_size` and `stream` (which is ignored).
    wide
        Take 64-bit indices, as CuPy does for memory above 2 GiB.
    flush
        Whether float32 subnormals count as zero; by default where no float64 is among the arguments.
    blocks
        (first, stop): run these blocks of the grid only.

    Raises
    ------
    TypeError, ValueError
        As CuPy does: wrong dtype, shapes that do not broadcast, `size` with arrays that are not raw.
    KernelFault
        See the module's docstring.
    """
    kwargs = dict(kwargs or {})
    size, block_size = kwargs.pop("size", -1), kwargs.pop("block_size", 128)
    kwargs.pop("stream", None)
    if kwargs:
        raise TypeError(f"Wrong arguments {kwargs}")
    if block_size <= 0:
        raise ValueError("block_size must be greater than zero")
    if len(args) not in (kernel.nin, kernel.nargs):
        raise TypeError(f"{kernel.name!r} takes {kernel.nin} or {kernel.nargs} arguments, but {len(args)} came")
    params = kernel.params
    arguments = [_Argument.of(a, wide) if isinstance(a, np.ndarray) else a for a in args]
    for a in arguments:
        if not isinstance(a, (_Argument, bool, int, float, complex, np.generic)):
            raise TypeError(f"Unsupported type {type(a)}")
    outputs = arguments[kernel.nin :]
    if any(not isinstance(a, _Argument) for a in outputs):
        raise TypeError("Output arguments type must be cupy.ndarray")
    loops = [isinstance(a, _Argument) and not params[i].raw for i, a in enumerate(arguments)]
    if size != -1 and any(loops):
        raise ValueError("Specified 'size' can be used only if all of the ndarray are 'raw'.")
    if size == -1 and not any(loops):
        raise ValueError("Loop size is undecided.")
    shape = _broadcast(arguments, params) if size == -1 else (size,)
    # CuPy goes on with the outputs as they came, so one that would have to be broadcast is refused below.
    inputs = arguments[: kernel.nin]
    in_types, out_types, type_map = kernel._decide_params_type(
        tuple(a.array.dtype if isinstance(a, _Argument) else None for a in inputs),
        tuple(a.array.dtype for a in outputs),
    )
    if not outputs:
        if size == -1 and any(p.raw for p in kernel.out_params):
            raise ValueError("Output array size is Undecided")
        outputs = [_Argument.of(np.empty(shape, t), wide) for t in out_types]
    elif any(not p.raw and a.shape != shape for p, a in zip(kernel.out_params, outputs, strict=True)):
        raise ValueError("Out shape is mismatched")
    results = [a.array for a in outputs]
    if 0 in shape:
        return results
    total = [*inputs, *outputs]
    if kernel.reduce_dims:
        shape = _reduce_dims(total, params, shape)

    layouts, values = [], []
    for i, a in enumerate(total):
        if isinstance(a, _Argument):
            layouts.append((NDARRAY, a.array.dtype, len(a.shape), a.contiguous, a.narrow))
            values.append(a.bytes())
        else:
            box = np.empty((), in_types[i])
            box[()] = a
            layouts.append((SCALAR, box.dtype, 0, True, True))
            values.append(box.tobytes())
    count = int(np.prod(shape, dtype=object))
    layouts.append((INDEXER, None, len(shape), True, count <= LIMIT_32_BITS))
    values.append(struct.pack(f"=q{2 * len(shape)}q", count, *shape, *(0,) * len(shape)))

    key = (kernel, tuple(layouts), type_map)
    compiled = _plans.get(key)
    if compiled is None:
        options = tuple(kernel.kwargs.get("options", ()))
        compiled = _compiled_elementwise(elementwise_source(kernel, layouts, type_map), kernel.name, options)
        _plans[key] = compiled
    if flush is None:
        flush = not any(layout[1] == np.float64 for layout in layouts)
    grid, block = min(NO_LIMIT, -(-count // block_size)), min(block_size, count)
    rules = {"flush": flush, "reverse": reverse, "worst": worst, "blocks": blocks}
    compiled.launch((grid, 1, 1), (block, 1, 1), values, shared=0, **rules)
    return results


# Raw kernels


@functools.cache
def compiled_raw(source: str, name: str, options: tuple[str, ...]) -> _Compiled:
    includes = re.findall(r"^[ \t]*#include .*$", source, re.MULTILINE)
    text = re.sub(r"^[ \t]*#include .*$", "", source, flags=re.MULTILINE)
    text = DYNAMIC.sub(r"\1 *const \2 = reinterpret_cast<\1 *>(gg::dynamic_shared);", text)
    if re.search(r"extern\s+__shared__", text):
        raise NotImplementedError(f"{name}: this form of `extern __shared__` is not known to the emulator")
    # Without linkage no function's shared memory is merged with another's, which g++ refuses in a section of its own.
    return _Compiled(includes, f'namespace {{\n#line 1 "{name}.cu"\n{text}\n}}', name, options)


def _value(a) -> tuple[bytes, str]:
    """Return an argument's bytes as CuPy's launch would copy them, and its kind."""
    if isinstance(a, np.ndarray) and not (a.dtype.names and a.ndim == 0):
        return struct.pack("=Q", a.ctypes.data), "p"
    if isinstance(a, bool) or a is None or isinstance(a, (complex, str, bytes)):
        raise TypeError(f"a kernel argument of {type(a)} is not supported")
    if isinstance(a, int):
        return struct.pack("=q", a), "i"
    if isinstance(a, float):
        return struct.pack("=d", a), "f"
    if isinstance(a, (np.generic, np.ndarray)):
        return a.tobytes(), {"f": "f", "i": "i", "u": "i", "b": "i", "V": "s"}[a.dtype.kind]
    raise TypeError(f"a kernel argument of {type(a)} is not supported")


def run_raw(
    source, name, grid, block, args, shared_mem=0, options=(), *, flush=None, reverse=False, worst=False, blocks=None
) -> None:
    """Run an `extern "C" __global__` kernel as a `cupy.RawKernel` of this text would be launched.

    Parameters
    ----------
    grid, block
        Tuples of up to three numbers.
    args
        NumPy arrays (their memory; strides are ignored, as by CuPy), NumPy scalars and structured scalars or 0-d
        structured arrays (by value), int (as int64), float (as float64). An address as numpy.uintp goes for a pointer.
    shared_mem
        Bytes of dynamic shared memory, at most 48 KiB.
    flush
        Whether float32 subnormals count as zero; by default unless the text says that its type is double, as in
        `using T = double` or `#define MINE_T double`.
    blocks
        (first, stop): run these blocks of the grid only, in linear order.

    Raises
    ------
    ValueError
        Sizes of grid, block or shared memory beyond CUDA's; arguments that do not fit the parameters in number, size
        or kind.
    KernelFault
        See the module's docstring.
    """
    grid, block = ((*(int(n) for n in t), 1, 1)[:3] for t in (grid, block))
    if min(*grid, *block) < 1 or np.prod(block) > 1024 or block[2] > 64:
        raise ValueError(f"{name}: grid {grid} and block {block}: at least 1 each, at most 1024 threads in a block")
    if grid[0] > NO_LIMIT or max(grid[1:]) > 65535:
        raise ValueError(f"{name}: grid {grid} is too large: at most (2**31 - 1, 65535, 65535)")
    if shared_mem > 48 * 1024:
        raise ValueError(f"{name}: {shared_mem} bytes of dynamic shared memory: at most 49152 without asking for more")
    compiled = compiled_raw(source, name, tuple(options))
    values = [_value(a) for a in args]
    for i, ((_, kind), wanted) in enumerate(zip(values, compiled.kinds, strict=False)):
        address = wanted == "p" and kind == "i" and isinstance(args[i], (np.uintp, np.int64, np.intp))
        if kind != wanted and not address and not (wanted == "s" and isinstance(args[i], np.generic)):
            words = {"p": "an array", "f": "a floating point number", "i": "an integer", "s": "a structure"}
            raise ValueError(f"{name}: argument {i} is {words[kind]}, the parameter wants {words[wanted]}")
    if flush is None:
        flush = not DOUBLE.search(source)
    rules = {"flush": flush, "reverse": reverse, "worst": worst, "blocks": blocks}
    compiled.launch(grid, block, [v for v, _ in values], shared=int(shared_mem), **rules)


# Guarded memory


def guarded(data, *, align=1, start=False) -> np.ndarray:
    """Copy an array to memory that ends (or starts) at a page nobody may touch: straying raises KernelFault.

    The copy is in C order. Its end lies at the page's edge, or before it by as little as puts the start at a multiple
    of `align` bytes; `start=True` puts the start at the edge and guards what lies before.
    """
    data = np.asarray(data)
    page = mmap.PAGESIZE
    room = -(-max(data.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for edge in (base, base + page + room):
        if protect(edge, page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if start else page + room - -(-data.nbytes // align) * align
    copy = np.frombuffer(memory, data.dtype, data.size, offset).reshape(data.shape)
    copy[...] = data
    return copy
