"""The arrays of the stand-in for CuPy, their ufuncs and kernels."""

import contextlib
import ctypes
import functools
import itertools
import math
import operator
import warnings

import numpy

from cuda_proof import originals
from cuda_proof.machine import (
    HOST,
    UNIT,
    Block,
    Device,
    Foreign,
    Pointer,
    captured,
    get_current_stream,
    here,
    junk,
    launch,
    library,
    on_this_device,
    to_device,
    to_host,
    wait,
    written,
)

kDLCPU, kDLCUDA = (1, 0), 2

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


def _supported(dtype):
    dtype = numpy.dtype(dtype)
    if dtype.kind not in "biufcV" or dtype.char in "gG":
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype


def owned(values):
    """Make a device array of values that an operation has computed on the CPU; it is C-contiguous, as CuPy's are."""
    if not isinstance(values, HOST) or not values.flags.c_contiguous or values.base is not None:
        values = numpy.array(values, order="C", copy=True)
    return written(_over(values))


def _over(values, kept=None):
    array = object.__new__(ndarray)
    array._a, array._block, array.base = values, Block(values, kept), None
    return array


def fresh(shape, dtype, order="C"):
    """Return an array of the pool's memory, at the address that came back last if one did, as from CuPy's pool."""
    dtype = _supported(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = dtype.itemsize * math.prod(shape)
    if not nbytes:
        return written(_over(numpy.empty(shape, dtype, order=order)))
    raw, place = here.machine.pools[here.machine.device].memory(nbytes)
    values = HOST(shape, dtype, raw, -raw.ctypes.data % UNIT, order=order)
    values[...] = junk(dtype)
    return written(_over(values, (raw, place)))


def as_view(array, values):
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
            made = fresh(shape, dtype, order or "C")
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
            to_host(values, self, stream, blocking)
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
            to_device(self, arr, get_current_stream() if stream is None else stream)

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
        return here.cupy.array, (self.get(order="A"),)

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
        if not name.startswith("_") and hasattr(originals.real("cupy").ndarray, name):
            raise NotImplementedError(f"the stand-in's arrays have no {name}: write it into {__name__}")
        raise AttributeError(f"'cupy.ndarray' object has no attribute {name!r}")

    # --- views

    @property
    def T(self):
        return self if self.ndim < 2 else as_view(self, self._a.T)

    @property
    def mT(self):
        if self.ndim < 2:
            raise ValueError("matrix transpose with ndim < 2 is undefined")
        return self.swapaxes(-1, -2)

    @property
    def real(self):
        return self if self.dtype.kind != "c" else as_view(self, self._a.real)

    def view(self, dtype=None, type=None):
        return as_view(self, self._a.view() if dtype is None else self._a.view(_supported(dtype)))

    def reshape(self, *shape, order="C", copy=None):
        shape = shape[0] if len(shape) == 1 else shape
        values = self._a.reshape(shape, order="C" if order is None else order)
        if not self.size or numpy.may_share_memory(values, self._a):
            return self.copy().reshape(shape, order=order) if copy else as_view(self, values)
        if copy is False:
            raise ValueError("Unable to avoid copy while creating an array as requested.")
        launch([self])
        return owned(values)

    def ravel(self, order="C"):
        return self.reshape(-1, order=order)

    def flatten(self, order="C"):
        return self.copy().reshape(-1, order=order)

    def _set_shape_and_strides(self, shape, strides, *_update):
        self._a = numpy.lib.stride_tricks.as_strided(self._a, tuple(shape), tuple(strides))

    def transpose(self, *axes):
        return as_view(self, self._a.transpose(*axes))

    def swapaxes(self, axis1, axis2):
        return as_view(self, self._a.swapaxes(axis1, axis2))

    def squeeze(self, axis=None):
        values = self._a.squeeze(axis)
        return self if values.ndim == self.ndim else as_view(self, values)

    def diagonal(self, offset=0, axis1=0, axis2=1):
        return as_view(self, self._a.diagonal(offset, axis1, axis2))

    # --- copies

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        if casting is not None or subok is not None:
            raise TypeError(f"{'casting' if casting is not None else 'subok'} is not supported yet")
        dtype = _supported(dtype)
        same = order in (None, "K", "A") or getattr(self, f"_{order.lower()}_contiguous")
        if dtype == self.dtype and same and not copy:
            return self
        launch([self], count=bool(self.size))
        with numpy.errstate(all="ignore"):
            return written(_over(numpy.array(self._a, dtype, order=order, copy=True)))

    def copy(self, order="C"):
        if self._block.device == here.machine.device or not self.size:
            return self.astype(self.dtype, order=order)
        if not self.flags.forc:
            raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
        here.machine.launches += 1
        return written(_over(self._a.copy(order)))

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
        reads, plain = [value] if isinstance(value, ndarray) else [], _plain(value)
        if captured(reads, [self], functools.partial(_fill, self._a, plain)):
            return
        launch(reads, [self], count=bool(self.size))
        _fill(self._a, plain)

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
            return as_view(self, self._a[(*plain, ...) if Ellipsis not in plain else tuple(plain)])
        launch([self, *arrays], count=1 + _count_masks(arrays))
        return owned(self._a[tuple(plain)])

    def __setitem__(self, index, value):
        plain, arrays = _index(self, index)
        if not arrays:
            target = as_view(self, self._a[(*plain, ...) if Ellipsis not in plain else tuple(plain)])
            value = cupy_like(value)
            if not isinstance(value, ndarray):
                target.fill(value)  # refuses host arrays
                return
            values = _unit_dims_off(value._a, target.ndim)
            if not captured([value], [self], functools.partial(_fill, target._a, values)):
                launch([value], [self], count=bool(target.size))
                _fill(target._a, values)
            return
        value = value if isinstance(value, ndarray) else here.cupy.array(value, dtype=self.dtype)
        launch([value, *arrays], [self], count=1 + _count_masks(arrays))
        with numpy.errstate(all="ignore"):
            self._a[tuple(plain)] = value._a

    def _scatter_op(self, slices, value, op):
        """`ufunc.at`: add, maximum and the like, where repeated positions count each time."""
        allowed = {"add": "ilqefdILQ", "sub": "iI", "max": "ilqfdILQ", "min": "ilqfdILQ"}[op]
        function = {"add": numpy.add, "sub": numpy.subtract, "max": numpy.maximum, "min": numpy.minimum}[op]
        plain, arrays = _index(self, slices)
        if arrays and self.dtype.char not in allowed:
            raise TypeError(f"cupy.{function.__name__}.at does not support {self.dtype}")
        value = cupy_like(value)
        if arrays:
            value = value if isinstance(value, ndarray) else here.cupy.array(value, dtype=self.dtype)
        elif not isinstance(value, ndarray):
            _scalar(value)
        launch([a for a in (value, *arrays) if isinstance(a, ndarray)], [self], count=1 + _count_masks(arrays))
        with numpy.errstate(all="ignore"):
            given = _plain(value)
            function.at(self._a, tuple(plain), given.astype(self.dtype) if isinstance(given, HOST) else given)

    def take(self, indices, axis=None, out=None):
        if out is not None:
            raise NotImplementedError("the stand-in's take has no out")
        if isinstance(indices, (int, numpy.integer)):
            where, reads = indices, [self]
        else:
            indices = indices if isinstance(indices, ndarray) else here.cupy.array(indices, dtype=int)
            where, reads = indices._a, [self, indices]
        launch(reads)
        if not self.size and numpy.size(where):
            raise IndexError("cannot do a non-empty take from an empty axes.")
        return owned(numpy.take(self._a, where, axis, mode="wrap"))  # CuPy wraps what is out of bounds

    def nonzero(self):
        if not self.ndim:
            raise ValueError(
                "Calling nonzero on 0d arrays is not allowed. Use cp.atleast_1d(scalar).nonzero() instead."
            )
        rows = argwhere(self)
        return tuple(rows[:, i] for i in range(self.ndim))

    def repeat(self, repeats, axis=None):
        if isinstance(repeats, HOST):
            raise TypeError("'repeats' does not accept numpy.ndarray; convert with cupy.array() first")
        each = repeats
        if isinstance(repeats, (ndarray, list, tuple)):
            counts = repeats if isinstance(repeats, ndarray) else here.cupy.array(repeats, dtype=numpy.intp)
            if counts.dtype.kind not in "biu":
                raise TypeError(
                    f"Cannot cast array data from dtype('{counts.dtype}') to dtype('int64') according to the rule "
                    "'safe'"
                )
            launch([counts], count=2)
            for _ in range(1 if counts.size == 1 else 2):
                read_one()
            each = counts._a
        launch([self])
        return owned(numpy.repeat(self._a, each, axis))

    def searchsorted(self, v, side="left", sorter=None):
        return here.cupy.searchsorted(self, v, side, sorter)

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
        return scan(self, numpy.cumsum, axis, dtype, out)

    def cumprod(self, axis=None, dtype=None, out=None):
        return scan(self, numpy.cumprod, axis, dtype, out)

    def trace(self, offset=0, axis1=0, axis2=1, dtype=None, out=None):
        return self.diagonal(offset, axis1, axis2).sum(-1, dtype, out, False)

    def round(self, decimals=0, out=None):
        launch([self])
        return into(out, numpy.round(self._a, decimals))

    def clip(self, min=None, max=None, out=None):
        given = [v for v in (min, max) if v is not None]
        for value in given:
            operand(value)
        launch([self, *(v for v in given if isinstance(v, ndarray))])
        return into(out, numpy.clip(self._a, _plain(min), _plain(max)).astype(self.dtype))

    def argsort(self, axis=-1, kind=None):
        launch([self])
        return owned(numpy.argsort(self._a, axis, kind="stable"))

    def sort(self, axis=-1, kind=None):
        launch([self], [self])
        self._a.sort(axis)

    def dot(self, b, out=None):
        return dot(self, b, out)

    def conj(self):
        return self if self.dtype.kind != "c" else here.cupy.conjugate(self)

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
        function = getattr(here.cupy, ufunc_.__name__, None)
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
            module = functools.reduce(getattr, func.__module__.split(".")[1:], here.cupy)
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
            return getattr(here.cupy, fast)(self, dtype=numpy.result_type(self.dtype, other) if whole else None)
        return _operate("power", self, other)


def _unit_dims_off(values, ndim):
    while values.ndim > ndim and values.shape[0] == 1:
        values = values[0]
    return values


def _operate(name, x, other):
    if isinstance(other, (ndarray, bool, int, float, complex)):
        return getattr(here.cupy, name)(x, other)
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
            lambda self, other: getattr(here.cupy, name)(other, self),
            lambda self, other: getattr(here.cupy, name)(self, other, self),
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
        setattr(ndarray, f"__{short}__", lambda self, name=name: getattr(here.cupy, name)(self))
    for short, function in _COMPARISONS.items():

        def compare(self, other, name=function.__name__, short=short):
            if short in ("eq", "ne") and (other is None or type(other).__eq__ is object.__eq__):
                return (here.cupy.zeros if short == "eq" else here.cupy.ones)(self.shape, dtype=bool)
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
    strides = shown.get("strides") or tuple(dtype.itemsize * n for n in numpy.empty(shape, "V1").strides)
    ends = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    low = sum(e for e in ends if e < 0)
    span = sum(map(abs, ends)) + dtype.itemsize if 0 not in shape else 0
    raw = (ctypes.c_char * span).from_address(shown["data"][0] + low) if span else bytearray(dtype.itemsize)
    buffer = numpy.frombuffer(raw, numpy.uint8)
    array = object.__new__(ndarray)
    array._a = HOST(shape, dtype, buffer, -low, strides) if span else numpy.empty(shape, dtype)
    array._block = Foreign(buffer, obj, here.machine.pools[_device_of(obj)])
    array.base = None
    return array


def _device_of(obj):
    """The number of the device that an object's memory is on: its own word for it, else the current one."""
    if isinstance(obj, ndarray):
        return obj._block.device
    number = getattr(getattr(obj, "device", None), "id", None)
    return number if isinstance(number, int) else here.machine.device


# ---------------------------------------------------------------------------------------------- what methods share


def _plain(value):
    return value._a if isinstance(value, ndarray) else value


def cupy_like(value):
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
    return originals.real("cupy._core._scalar").CScalar(value)


def operand(value):
    value = cupy_like(value)
    if not isinstance(value, ndarray):
        _scalar(value)
    return value


def _fill(values, value):
    with numpy.errstate(all="ignore"):
        values[...] = value


def read_one():
    """A number is read back within a CuPy function: one element's copy, and a wait."""
    here.machine.bytes_to_host += 8
    wait(get_current_stream()._queue)


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
                part = here.cupy.array(part, copy=None)
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


def _count_masks(arrays):
    """How many elements each mask takes is counted by kernels, and read back. Returns how many kernels."""
    masks = [a for a in arrays if a.dtype.kind == "b" and a.size]
    for _ in masks:
        read_one()
    return 2 * len(masks)


def argwhere(array):
    if array.size:
        launch([array], count=3)
        read_one()
    return owned(numpy.argwhere(array._a))


def into(out, values):
    if out is None:
        return owned(values)
    if not isinstance(out, ndarray):
        raise TypeError(f"output array must be cupy.ndarray, got {type(out).__name__}")
    if out.shape != numpy.shape(values):
        raise ValueError(f"Output shape mismatch: {out.shape}, expected {numpy.shape(values)}")
    on_this_device(out)
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
    launch([array], count=count)
    options = {"axis": axis, "keepdims": keepdims}
    if wide is not None or dtype is not None:
        options["dtype"] = wide or _supported(dtype)
    with numpy.errstate(all="ignore"), contextlib.nullcontext() if array.size and not ddof else _quiet():
        values = numpy.asarray(function(array._a, **options))
        if wide is not None:
            values = values.astype(numpy.float16)
    if cast is not None:
        values = values.astype(cast)
    return into(out, values)


@contextlib.contextmanager
def _quiet():
    """NumPy warns of the mean of nothing, CuPy does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def scan(array, function, axis, dtype, out):
    launch([array], count=2)
    with numpy.errstate(all="ignore"):
        return into(out, function(array._a, axis=axis, dtype=dtype))


def matrix_product(function, x, y, out=None):
    for array in (x, y):
        if not isinstance(operand(array), ndarray):
            raise TypeError(f"Unsupported type {type(array)}")
    library("cuBLAS")
    launch([x, y])
    dtype = numpy.result_type(x.dtype, y.dtype)
    with numpy.errstate(all="ignore"):
        if dtype == numpy.float16:  # cuBLAS accumulates half precision in single precision
            return into(out, function(x._a.astype(numpy.float32), y._a.astype(numpy.float32)).astype(dtype))
        return into(out, function(x._a, y._a))


def dot(a, b, out=None):
    return matrix_product(numpy.dot, a, b, out)


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
    "is_close": lambda a, b, rtol, atol, nan: numpy.isclose(a, b, rtol, atol) | (nan & (a != a) & (b != b)),
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
        inputs = [a if type(a) in _NUMBERS else cupy_like(a) for a in args[: self.nin]]
        types_in, types_out = self._types_for(inputs, dtype)
        given = [o for o in outputs if o is not None]
        for o in given:
            if not isinstance(o, ndarray):
                _scalar(o)  # says what it is
                raise TypeError("return arrays must be of ArrayType")
        if where is not None or self._compute is None:
            raise NotImplementedError(f"the stand-in does not compute {self.name}")
        arrays = [a for a in inputs if type(a) is ndarray]
        if len(given) == self.nout:
            work = functools.partial(self._run, [_plain(a) for a in inputs], types_in, [o._a for o in given], types_out)
            if captured(arrays, given, work):
                return given[0] if self.nout == 1 else tuple(given)
        launch(arrays, given, count=0)
        with numpy.errstate(all="ignore"):
            results = self._compute(*map(_cast, inputs, types_in))
            results = results if self.nout > 1 else (results,)
            results = [_cast(r, t) for r, t in zip(results, types_out, strict=True)]
            here.machine.launches += bool(results[0].size)
            if not given:
                made = [owned(numpy.asarray(values)) for values in results]
                return made[0] if self.nout == 1 else tuple(made)
            shape = numpy.broadcast_shapes(results[0].shape, *(o.shape for o in given))
            made = []
            for values, target in itertools.zip_longest(results, outputs):
                if target is None:
                    made.append(owned(numpy.broadcast_to(values, shape)))
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

    def _run(self, inputs, types_in, outputs, types_out):
        """Compute, from memory to memory: what a graph does."""
        with numpy.errstate(all="ignore"):
            results = self._compute(*map(_cast, inputs, types_in))
            for out, values, dtype in zip(outputs, results if self.nout > 1 else (results,), types_out, strict=True):
                out[...] = _cast(values, dtype)

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
        A, B = here.cupy.array(A), here.cupy.array(B)
        return self(A.reshape(A.shape + (1,) * B.ndim), B.reshape((1,) * A.ndim + B.shape), **kwargs)


# ------------------------------------------------------------------------------------------------------ kernels


def _arguments(args):
    """Kernel arguments with device arrays as their memory. Raises TypeError for host arrays, as CuPy does."""
    args = [cupy_like(a) for a in args]
    arrays = [a for a in args if isinstance(a, ndarray)]
    return args, arrays


class ElementwiseKernel:
    """cupy.ElementwiseKernel: the real one inside, run by the emulator."""

    def __init__(self, in_params, out_params, operation, name="kernel", *args, **kwargs):
        self._kernel = originals.real("cupy").ElementwiseKernel(in_params, out_params, operation, name, *args, **kwargs)

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
        reads, plain = [a for a in arrays if not any(a is o for o in outputs)], [_plain(a) for a in args]

        def work():
            with originals.as_it_was():
                return emulator.run_elementwise(self._kernel, plain, kwargs)

        with contextlib.nullcontext() if stream is None else stream:
            if outputs and captured(reads, outputs, work):
                return outputs[0] if len(outputs) == 1 else tuple(outputs)
            launch(reads, outputs)
            results = work()
        if outputs:
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        made = [owned(r) for r in results]
        return made[0] if len(made) == 1 and not self._kernel.return_tuple else tuple(made)


class RawKernel:
    """cupy.RawKernel: the real one checks how it is made, the emulator runs its text."""

    def __init__(self, code, name, options=(), *args, **kwargs):
        self._kernel = originals.real("cupy").RawKernel(code, name, options, *args, **kwargs)
        self.code, self.name, self.options, self._compiled = code, name, options, False

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
        # structures are copied when a kernel is launched, or captured
        plain = [a.copy() if isinstance(a, HOST) else _plain(a) for a in args]
        if get_current_stream().is_capturing():  # a graph has addresses
            plain = [numpy.uintp(a.ctypes.data) if isinstance(a, HOST) and not a.dtype.names else a for a in plain]

        if not self._compiled:  # other threads must not find CuPy's own modules while a kernel runs
            with originals.as_it_was():
                emulator.compiled_raw(self.code, self.name, tuple(self.options))
            self._compiled = True

        def work():
            emulator.run_raw(
                self.code,
                self.name,
                tuple(grid),
                tuple(block),
                plain,
                shared_mem=shared_mem,
                options=self.options,
            )

        # which are written is the kernel's secret
        if not captured((), arrays, work):
            launch((), arrays)
            work()


class RawModule:
    """cupy.RawModule of CUDA text."""

    def __init__(self, *, code=None, options=(), **kwargs):
        self._module = originals.real("cupy").RawModule(code=code, options=options, **kwargs)
        self.code, self.options = code, options

    def get_function(self, name):
        return RawKernel(self.code, name, self.options)


_attach_operators()
