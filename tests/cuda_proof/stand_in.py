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
another stream uses, with no event or wait between the two, raises `Race`. A stream that captures a graph keeps kernels
for `launch` and runs none; a graph on memory that is gone raises `Freed`; libraries and waits are refused meanwhile.
Not simulated: the reuse of freed memory by another stream, peer access between devices.

Numbers are NumPy's; what a GPU makes of them in the last digits only a GPU can tell.
"""

import builtins
import contextlib
import importlib
import inspect
import sys
import types

import array_api_compat

from cuda_proof import originals
from cuda_proof.arrays import ElementwiseKernel, RawKernel, RawModule, ndarray, ufunc
from cuda_proof.below import broadcast, overrides
from cuda_proof.machine import Freed as Freed
from cuda_proof.machine import Machine, here
from cuda_proof.machine import Race as Race


def problem() -> str | None:
    """Say why the stand-in cannot be used here, or None when it can."""
    try:
        import cupy
    except ImportError as error:
        return f"the stand-in for CuPy takes its names from CuPy itself, which cannot be imported: {error}"
    if isinstance(cupy, Module) or cupy.__version__.startswith("14."):
        return None
    return f"the stand-in follows CuPy 14, here is {cupy.__version__}"


# -------------------------------------------------------------------------------- CuPy's own functions, on our arrays


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
            real = originals.real(self.__name__)
            return [n for n in getattr(real, "__all__", dir(real)) if not n.startswith("_")]
        if name.startswith("__") and name not in ("__version__",):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = self._translator.lookup(self.__name__, name)
        self.__dict__[name] = value
        return value

    def __dir__(self):
        return dir(originals.real(self.__name__))


class Globals(dict):
    """The global names of one of CuPy's modules, looked up when its functions first use them."""

    def __init__(self, module, translator):
        super().__init__(__builtins__=builtins.__dict__, __name__=module)
        self._module, self._translator = module, translator

    def __missing__(self, name):
        if name not in vars(originals.real(self._module)):
            raise KeyError(name)
        value = self[name] = self._translator.lookup(self._module, name)
        return value


class Translator:
    """Turns what CuPy's modules hold into what the stand-in holds in its place."""

    def __init__(self, overrides):
        self.overrides = overrides
        self.modules, self.globals, self.made = {}, {}, {}
        core = originals.real("cupy._core.core")
        cupy = originals.real("cupy")
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
        return self.translate(getattr(originals.real(module), name), key)

    def translate(self, value, key):
        if isinstance(value, types.ModuleType):
            name = types.ModuleType.__getattribute__(value, "__name__")  # without loading a lazy one
            return self.module(name) if originals.is_cupys(name) else value
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, self.ufunc_type):
            return self._once(value, lambda: ufunc(value))
        if isinstance(value, self.kernel_types):
            return self._once(value, lambda: ElementwiseKernel._around(value))
        if callable(value) and originals.is_cupys(getattr(value, "__module__", None) or type(value).__module__):
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
        if not originals.is_cupys(value.__module__) or issubclass(value, (BaseException, tuple)):
            return value
        return self._once(value, lambda: _absent_class(f"{value.__module__}.{value.__name__}"))

    def _function(self, value):
        home = value.__globals__.get("__name__", "")
        if not originals.is_cupys(value.__module__ or ""):
            return value
        return self._once(value, lambda: self._rebound(value, home))

    def _rebound(self, value, home):
        space = value.__globals__
        if originals.is_cupys(home):
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
        raise NotImplementedError(f"the stand-in has no {name}: write it into cuda_proof.below")

    absent.__name__ = name.rpartition(".")[2]
    return absent


def _absent_class(name):
    def refuse(cls, *_args, **_kwargs):
        raise NotImplementedError(f"the stand-in has no {name}: write it into cuda_proof.below")

    return type(name.rpartition(".")[2], (), {"__new__": refuse})


# ------------------------------------------------------------------------------------------------- installation


translated: dict[str, types.ModuleType] = {}  # what goes into sys.modules, once made


class Count:
    """What happened inside a `counting` block."""

    def __init__(self):
        self.syncs = self.launches = self.bytes_to_device = self.bytes_to_host = 0


@contextlib.contextmanager
def counting():
    """Count within a block: syncs, launches, bytes_to_device, bytes_to_host."""
    count = Count()
    before = {name: getattr(here.machine, name) for name in vars(count)}
    try:
        yield count
    finally:
        for name, value in before.items():
            setattr(count, name, getattr(here.machine, name) - value)


class Cupy(Module):
    """The stand-in's `cupy`, with the counters beside CuPy's own names."""

    syncs = property(lambda self: here.machine.syncs)
    launches = property(lambda self: here.machine.launches)
    bytes_to_device = property(lambda self: here.machine.bytes_to_device)
    bytes_to_host = property(lambda self: here.machine.bytes_to_host)
    counting = staticmethod(counting)


@contextlib.contextmanager
def install(devices=1, memory=16 << 30):
    """Put the stand-in in CuPy's place until the block ends, on a fresh machine; yields it.

    devices: how many GPUs the machine has. memory: bytes that each of them has.
    """
    if problem():
        raise RuntimeError(problem())
    before = here.machine
    nested = before is not None
    if not nested:
        _load_all()
        for name in [name for name in sys.modules if originals.is_cupys(name)]:
            originals.hidden[name] = sys.modules.pop(name)
    here.machine = Machine(devices, memory)
    try:
        if not translated:
            _translate_all()
        sys.modules.update(translated)
        # `import a.b as c` takes the attribute of a before the entry of sys.modules
        array_api_compat.cupy = translated["array_api_compat.cupy"]
        yield here.cupy
    finally:
        for queue in here.machine.queues:
            queue.pending, queue.done = [], queue.issued
        here.machine = before
        if not nested:
            for name in [name for name in sys.modules if originals.is_cupys(name)]:
                del sys.modules[name]
            sys.modules.update(originals.hidden)
            originals.hidden.clear()
            array_api_compat.__dict__.pop("cupy", None)
            if "array_api_compat.cupy" in sys.modules:
                array_api_compat.cupy = sys.modules["array_api_compat.cupy"]


def _load_all():
    """Import what CuPy would import on first use, as long as it is there to import."""
    import cupy  # noqa: F401
    import cupyx  # noqa: F401


def _translate_all():
    """Make the stand-in's modules, and array-api-compat's names for CuPy on top of them."""
    translator = Translator(overrides())
    here.cupy = translator.modules["cupy"] = Cupy("cupy", translator)
    names = [name for name in originals.hidden if name.split(".")[0] != "array_api_compat"]
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
    translated.update({name: module for name, module in sys.modules.items() if originals.is_cupys(name)})


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
