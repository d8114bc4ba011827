"""From a kernel's text to a function that can be called: numba compiles it and keeps it on disk.

numba is imported here, at the first kernel and not before. For every kernel a module is written to the cache folder,
whose one function takes the operands as arrays and hands their addresses to the kernel's IR; numba gives it its
processor's instructions, unpacks the arrays (in a tenth of the time that ctypes takes), lets go of the interpreter lock
and stores the machine code beside the module. The name of the module says what it depends on, so nothing is ever out of
date; checksums tell a damaged file from a good one.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpugrad.compile.cpu_ir import Unsupported
from gpugrad.compile.cpu_kernels import Text

LONG = 2.0  # seconds of compiling after which the user is told
_OLDEST = (0, 62)  # of numba: the first with the LLVM whose IR is written here

_lock = threading.RLock()


class _Batch(threading.local):
    depth = 0
    kernels = 0
    seconds = 0.0


_batch = _Batch()


def announce(kernels: int, seconds: float) -> None:
    """Tell the user why it took so long; replace it to tell otherwise."""
    kept = "cached for next time" if _folder() is not None else "kept for this process"
    noun = "kernel" if kernels == 1 else "kernels"
    print(f"gpugrad: compiled {kernels} {noun}, {kept} ({seconds:.1f} s)", file=sys.stderr)


@contextmanager
def compiling() -> Iterator[None]:
    """Count what is compiled within as one, for one announcement."""
    _batch.depth += 1
    try:
        yield
    finally:
        _batch.depth -= 1
        if not _batch.depth:
            kernels, seconds = _batch.kernels, _batch.seconds
            _batch.kernels, _batch.seconds = 0, 0.0
            if seconds > LONG:
                announce(kernels, seconds)


def _numba(name: str) -> Any:
    """Import a module of numba, which has few types."""
    return importlib.import_module(f"numba.{name}")


def _llvmlite(name: str) -> Any:
    return importlib.import_module(f"llvmlite.{name}")


@functools.cache
def _problem() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    try:
        version = importlib.import_module("numba").__version__
    except Exception as error:  # such as a NumPy that it is not made for
        return f"numba cannot be imported: {error}"
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        return f"numba is {version}; {'.'.join(map(str, _OLDEST))} or newer is needed"
    return "NUMBA_DISABLE_JIT is set" if _numba("core.config").DISABLE_JIT else None


def available() -> str | None:
    """Return None if kernels can be compiled, else why not. Imports numba."""
    if os.environ.get("GPUGRAD_JIT") == "0":
        return "GPUGRAD_JIT=0"
    return _problem()


@functools.cache
def processor() -> tuple[str, str]:
    """Return the name and the features of the processor that numba compiles for."""
    config = _numba("core.config")
    name, features = config.CPU_NAME, config.CPU_FEATURES
    if name is None:
        name = _llvmlite("binding").get_host_cpu_name()
    return name, _numba("core.codegen").get_host_cpu_features() if features is None else features


@functools.cache
def register() -> int:
    """Return the bytes of a vector register."""
    features = processor()[1].split(",")
    return 64 if "+avx512f" in features else 32 if "+avx2" in features else 16


@functools.cache
def _versions() -> str:
    numba, llvmlite = (importlib.import_module(name).__version__ for name in ("numba", "llvmlite"))
    sources = hashlib.sha256()
    for module in ("build", "ir", "kernels", "math"):
        sources.update(Path(__file__).with_name(f"cpu_{module}.py").read_bytes())
    return repr((sources.hexdigest(), numba, llvmlite, sys.version_info[:2], processor()))


@functools.cache
def _folder() -> Path | None:
    """Return the cache folder, which can be written to; None if there is no such."""
    given = os.environ.get("GPUGRAD_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given) if given else (Path(home) if home else Path.home() / ".cache") / "gpugrad"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        warnings.warn(
            f"compiled kernels are not kept: {error}; set GPUGRAD_CACHE_DIR to a folder that can be written to",
            stacklevel=2,
        )
        return None
    return folder.resolve()


def _source(text: Text, name: str, cache: bool) -> str:
    """Return the module of a kernel."""
    names = ", ".join(f"a{k}" for k in range(len(text.parameters)))
    spell = {"index": "types.int64", "number": "types.{}", "array": 'types.Array(types.{}, {}, "A")'}
    kinds = {"b": "boolean", "i": "int{}", "u": "uint{}", "f": "float{}"}
    signature = ", ".join(
        spell[what].format(kinds[kind[0]].format(8 * int(kind[1])), ndim) for what, kind, ndim in text.parameters
    )
    return f'''"""A kernel of gpugrad, made by gpugrad.compile and safe to delete."""

from numba import njit, types
from numba.extending import intrinsic

from gpugrad.compile.cpu_build import linked

IR = """{text.ir}"""


@intrinsic
def invoke(context, {names}):
    return types.void({names}), linked("{name}", IR)


@njit([types.void({signature})], cache={cache}, nogil=True, error_model="numpy")
def kernel({names}):
    invoke({names})
'''


def linked(name: str, ir: str) -> Callable[..., Any]:
    """Return how numba is to call the function `name` of a text of IR: with a pointer and a stride for an array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        llvm, cgutils, binding = _llvmlite("ir"), _numba("core.cgutils"), _llvmlite("binding")
        module = builder.module
        header = f'target triple = "{module.triple}"\ntarget datalayout = "{module.data_layout}"\n'
        parsed = binding.parse_assembly(header + ir)
        parsed.name = name
        parsed.verify()
        context.active_code_library.add_llvm_module(parsed)
        values = []
        for kind, value in zip(signature.args, args, strict=True):
            if isinstance(kind, _numba("core.types").Array):
                array = context.make_array(kind)(context, builder, value)
                values.append(builder.bitcast(array.data, cgutils.voidptr_t))
                values.append(cgutils.unpack_tuple(builder, array.strides)[0])
            else:
                values.append(value)
        made = llvm.FunctionType(llvm.VoidType(), [v.type for v in values])
        builder.call(cgutils.get_or_insert_function(module, made, name), values)
        return context.get_dummy_value()

    return codegen


def build(key: Any, write: Callable[[str], Text]) -> Callable[..., Any]:
    """Return the machine code of a kernel, to be called with what its parameters name; made once for a key.

    write: returns the text, given a name for its function. What is called checks neither shapes nor dtypes.
    """
    with _lock:
        found = _built.get(key)
        if found is None:
            found = _built[key] = _build(key, write)
        return found


_built: dict[Any, Callable[..., Any]] = {}


def _build(key: Any, write: Callable[[str], Text]) -> Callable[..., Any]:
    name = "gpugrad_kernel_" + hashlib.sha256((repr(key) + _versions()).encode()).hexdigest()[:32]
    folder = _folder()
    began = time.perf_counter()
    module = None
    if folder is not None:
        for _ in range(2):  # once more without the files that were there
            try:
                module = _cached(folder, name, write)
                break
            except Unsupported:
                raise
            except Exception:  # whatever a damaged or vanished file leads to: the cache is not needed
                _forget(folder, name)
    if module is None:
        module = _module(_source(write(name), name, cache=False), name, f"<{name}>")
    kernel = module["kernel"]
    with compiling():
        if not kernel.stats.cache_hits:
            _batch.kernels += 1
            _batch.seconds += time.perf_counter() - began
    (overload,) = kernel.overloads.values()
    _kernels[overload.entry_point] = kernel
    entry: Callable[..., Any] = overload.entry_point  # without numba's dispatch on types
    return entry


_kernels: dict[Callable[..., Any], Any] = {}  # of entry points, whose machine code they keep alive


def machine_code(entry: Callable[..., Any]) -> str:
    """Return the assembly of what `build` returned, as far as numba still has it: not from the cache."""
    (text,) = _kernels[entry].inspect_asm().values()
    return str(text)


def _module(source: str, name: str, filename: str) -> dict[str, Any]:
    """Run a module's source; return its names."""
    module = types.ModuleType(name)
    module.__file__ = filename
    sys.modules[name] = module  # numba looks it up there, by the name that is in its file
    exec(compile(source, filename, "exec"), module.__dict__)
    return module.__dict__


def _cached(folder: Path, name: str, write: Callable[[str], Text]) -> dict[str, Any]:
    path = folder / f"{name}.py"
    sums = folder / f"{name}.json"
    if not _intact(sums):
        _forget(folder, name)
        _write(path, _source(write(name), name, cache=True))
    module = _module(path.read_text(encoding="utf-8"), name, str(path))
    if not module["kernel"].stats.cache_hits:
        _write(sums, json.dumps({str(path): _checksum(path) for path in _files(folder, name)}))
    return module


def _files(folder: Path, name: str) -> list[Path]:
    """Return a kernel's module and what numba keeps beside it."""
    places = [folder, folder / "__pycache__"]
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        places += Path(given).glob("*")
    return [p for place in places for p in place.glob(f"{name}.*") if p.suffix in (".py", ".nbi", ".nbc")]


def _checksum(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _intact(sums: Path) -> bool:
    """Tell whether a kernel's files are all there and as they were written."""
    try:
        return all(_checksum(path) == known for path, known in json.loads(sums.read_bytes()).items())
    except (OSError, ValueError, AttributeError):
        return False


def _forget(folder: Path, name: str) -> None:
    for path in [folder / f"{name}.json", *_files(folder, name)]:
        with suppress(OSError):
            path.unlink()


def _write(path: Path, text: str) -> None:
    """Write a file at once: another process sees all of it or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)
