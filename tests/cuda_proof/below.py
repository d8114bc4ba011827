"""What CuPy has below Python, written on NumPy: by the names under which CuPy's own functions find it."""

import functools
import sys
import types

import numpy

from cuda_proof import machine
from cuda_proof.arrays import (
    argwhere,
    as_view,
    cupy_like,
    dot,
    fresh,
    from_dlpack,
    into,
    matrix_product,
    ndarray,
    operand,
    owned,
    read_one,
    scan,
)
from cuda_proof.machine import HOST, here, launch, library, to_device, wait


def _array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, blocking=False):
    """cupy.array: an upload, unless it is a device array already."""
    if subok:
        raise NotImplementedError
    obj = cupy_like(obj)
    if isinstance(obj, ndarray):
        dtype = obj.dtype if dtype is None else dtype
        if obj._block.device != here.machine.device:
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
    made = fresh(host.shape, host.dtype, "F" if fortran else "C")
    if host.ndim:
        to_device(made, host, machine.get_current_stream())
    else:
        made.fill(host)
    if blocking:
        wait(machine.get_current_stream()._queue)
    return made


def _device_arrays_in(obj):
    """The leaves of nested sequences, if there is a device array among them."""
    leaves = []

    def walk(part):
        for item in part:
            if isinstance(item, (list, tuple)):
                walk(item)
            else:
                leaves.append(cupy_like(item))

    walk(obj)
    return leaves if any(isinstance(leaf, ndarray) for leaf in leaves) else []


def _outline(obj):
    return [_outline(item) if isinstance(item, (list, tuple)) else 0 for item in obj]


def _concatenate(tup, axis, out=None, dtype=None, casting="same_kind"):
    arrays = [operand(a) for a in tup]
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
    launch(arrays)
    return into(out, numpy.concatenate([a._a for a in arrays], axis, dtype=dtype, casting=casting))


def _contiguous(a, dtype=None, order="C"):
    """cupy.ascontiguousarray: the array itself where it is so already; one of no axes gets one."""
    if not isinstance(a, ndarray):
        raise TypeError(f"Argument 'a' has incorrect type (expected cupy.ndarray, got {type(a).__name__})")
    dtype = a.dtype if dtype is None else dtype
    return (a if a.ndim else a.reshape(1)).astype(dtype, order=order, copy=False)


def _broadcast_to(array, shape):
    if not isinstance(array, ndarray):
        raise TypeError(f"Argument 'array' has incorrect type (expected cupy.ndarray, got {type(array).__name__})")
    return array if array.shape == tuple(shape) else as_view(array, numpy.lib.stride_tricks.as_strided(
        *_broadcast_strides(array._a, tuple(shape))))  # fmt: skip


def _broadcast_strides(values, shape):
    """Like numpy.broadcast_to, which would make the view read-only."""
    shown = numpy.broadcast_to(values, shape)  # raises ValueError
    return values, shown.shape, shown.strides


class broadcast:
    """cupy.broadcast."""

    def __init__(self, *arrays):
        arrays = [operand(a) for a in arrays]
        self.shape = numpy.broadcast_shapes(*(a.shape for a in arrays if isinstance(a, ndarray)))
        self.values = tuple(_broadcast_to(a, self.shape) if isinstance(a, ndarray) else a for a in arrays)
        self.nd, self.size = len(self.shape), int(numpy.prod(self.shape, dtype=int))


def _searchsorted(a, v, side="left", sorter=None):
    if not isinstance(a, ndarray) or not isinstance(v, ndarray):
        raise NotImplementedError("Only int or ndarray are supported for a/v")
    if sorter is not None:
        raise NotImplementedError("the stand-in's searchsorted takes no sorter")
    launch([a, v])
    return owned(numpy.searchsorted(a._a, v._a, side))


def _random_generator(seed=None):
    return Generator(seed)


class Generator:
    """cupy.random.Generator, with NumPy's numbers in place of cuRAND's."""

    def __init__(self, seed=None):
        self._rng = numpy.random.default_rng(seed)

    def _draw(self, values, dtype):
        library("cuRAND")
        launch()
        return owned(numpy.asarray(values, dtype))

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
    library("cuSOLVER")
    launch(arrays)
    checked = sys.modules["cupyx"].geterr()["linalg"] == "raise"
    if checked:
        read_one()
    with numpy.errstate(all="ignore"):
        try:
            return function(*(a._a for a in arrays))
        except numpy.linalg.LinAlgError:
            if checked:
                raise
            return None


def _nan(array, *shapes):
    made = tuple(owned(numpy.full(shape, numpy.nan, array.dtype)) for shape in shapes)
    return made[0] if len(made) == 1 else made


def _linalg_types(*arrays):
    return here.cupy.linalg._util.linalg_common_type(*arrays)


def _gesv(a, b):
    """cupyx.lapack.gesv: solves in place."""
    found = _lapack(numpy.linalg.solve, a, b if b.ndim > 1 else b.reshape(-1, 1))
    b._a[...] = numpy.nan if found is None else found.reshape(b.shape)


def _batched_gesv(a, b):
    dtype, out_dtype = _linalg_types(a, b)
    if 0 in a.shape or 0 in b.shape:
        return fresh(b.shape, out_dtype)
    column = b.ndim == a.ndim - 1
    found = _lapack(numpy.linalg.solve, a.astype(dtype), (b.reshape(*b.shape, 1) if column else b).astype(dtype))
    return _nan(b, b.shape) if found is None else owned(found.reshape(b.shape).astype(out_dtype))


def _batched_inv(a):
    dtype, out_dtype = _linalg_types(a)
    if not a.size:
        return fresh(a.shape, out_dtype)
    found = _lapack(numpy.linalg.inv, a.astype(dtype))
    return _nan(a, a.shape) if found is None else owned(found.astype(out_dtype))


def _slogdet(a):
    """cupy.linalg.slogdet: the LU factors it is made of are not NumPy's to give."""
    util = here.cupy.linalg._util
    util._assert_stacked_2d(a)
    util._assert_stacked_square(a)
    dtype, sign_dtype = util.linalg_common_type(a)
    sign, log = _lapack(numpy.linalg.slogdet, a.astype(dtype))  # of a singular matrix: 0, -inf
    here.machine.launches += 6
    return owned(numpy.asarray(sign, sign_dtype)), owned(numpy.asarray(log, sign_dtype))


def _cholesky(a):
    util = here.cupy.linalg._util
    util._assert_cupy_array(a)
    util._assert_stacked_2d(a)
    util._assert_stacked_square(a)
    dtype, out_dtype = util.linalg_common_type(a)
    if not a.size:
        return fresh(a.shape, out_dtype)
    found = _lapack(numpy.linalg.cholesky, a.astype(dtype))
    return _nan(a, a.shape) if found is None else owned(found.astype(out_dtype))


def _qr(a, mode="reduced"):
    util = here.cupy.linalg._util
    util._assert_cupy_array(a)
    if mode not in ("reduced", "complete", "r", "raw"):
        raise ValueError(f"Unrecognized mode '{mode}'")
    dtype, out_dtype = util.linalg_common_type(a)
    found = _lapack(functools.partial(numpy.linalg.qr, mode=mode), a.astype(dtype))
    if mode == "r":
        return owned(found.astype(out_dtype))
    return tuple(owned(part.astype(out_dtype)) for part in found)


def _svd(a, full_matrices=True, compute_uv=True):
    util = here.cupy.linalg._util
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
        return owned(found.astype(out_dtype))
    return tuple(owned(part.astype(out_dtype)) for part in found)


def _eigh(a, UPLO="L"):
    util = here.cupy.linalg._util
    util._assert_stacked_2d(a)
    util._assert_stacked_square(a)
    dtype, out_dtype = _linalg_types(a)
    if UPLO not in ("L", "U"):
        raise ValueError("UPLO argument must be 'L' or 'U'")
    w, v = _lapack(functools.partial(numpy.linalg.eigh, UPLO=UPLO), a.astype(dtype))
    return owned(w.astype(out_dtype)), owned(v.astype(out_dtype))


def overrides():
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
        f"{core}manipulation._expand_dims": lambda a, axis: as_view(a, numpy.expand_dims(a._a, axis)),
        f"{core}manipulation._transpose": lambda a, axes: a.transpose(axes),
        f"{core}manipulation._repeat": ndarray.repeat,
        **{f"{place}.moveaxis": _of_view(numpy.moveaxis) for place in ("cupy._core", f"{core}manipulation")},
        **{f"{place}.rollaxis": _of_view(numpy.rollaxis) for place in ("cupy._core", f"{core}manipulation")},
        **{
            f"{place}.size": lambda a, axis=None: a.size if axis is None else a.shape[axis]
            for place in ("cupy", "cupy._core")
        },
        f"{core}indexing._ndarray_argwhere": argwhere,
        f"{core}math.scan_core": _scan_core,
        f"{core}math.scan_op": types.SimpleNamespace(SCAN_SUM=numpy.cumsum, SCAN_PROD=numpy.cumprod),
        f"{math}dot": dot,
        f"{math}matmul": functools.partial(matrix_product, numpy.matmul),
        "cupy.matmul": functools.partial(matrix_product, numpy.matmul),
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
        "cupy.get_default_memory_pool": lambda: machine.memory_pool,
        "cupy.get_default_pinned_memory_pool": lambda: machine.pinned_pool,
        "cupy.is_available": lambda: True,
        "cupyx.empty_pinned": machine.empty_pinned,
        "cupyx.zeros_pinned": machine.zeros_pinned,
    }
    cuda = {
        "Device": machine.Device,
        "Stream": machine.Stream,
        "Event": machine.Event,
        "Graph": machine.Graph,
        "MemoryPool": machine.MemoryPool,
        "MemoryPointer": machine.Pointer,
        "is_available": lambda: True,
        "get_device_id": lambda: here.machine.device,
        "get_current_stream": machine.get_current_stream,
        "get_elapsed_time": machine.get_elapsed_time,
    }
    table |= {f"cupy.cuda.{name}": value for name, value in cuda.items()}
    table |= {f"cupy.cuda.device.{name}": cuda[name] for name in ("Device", "get_device_id")}
    table |= {f"cupy.cuda.stream.{name}": cuda[name] for name in ("Stream", "Event", "get_current_stream")}
    runtime = {
        "getDeviceCount": lambda: len(here.machine.pools),
        "getDevice": lambda: here.machine.device,
        "setDevice": machine.set_device,
        "memGetInfo": lambda: machine.Device().mem_info,
        "driverGetVersion": lambda: 13000,
        "runtimeGetVersion": lambda: 13000,
        "getDeviceProperties": machine.device_properties,
        "deviceSynchronize": machine.device_synchronize,
        "deviceCanAccessPeer": lambda device, peer: 0,
    }
    for place in ("cupy.cuda.runtime", "cupy_backends.cuda.api.runtime"):
        table |= {f"{place}.{name}": value for name, value in runtime.items()}
    return table


def _scan_core(a, axis, op, dtype=None, out=None):
    return scan(a, op, axis, dtype, out)


def _tensordot_core(a, b, out, n, m, k, ret_shape):
    library("cuBLAS")
    launch([a, b])
    dtype = numpy.result_type(a.dtype, b.dtype)
    wide = numpy.float32 if dtype == numpy.float16 else dtype
    left, right = a._a.reshape(k, n).astype(wide), b._a.reshape(k, m).astype(wide)
    with numpy.errstate(all="ignore"):
        return into(out, (left.T @ right).reshape(tuple(ret_shape)).astype(dtype))


def _by_position(start, step, out, *divisor, dtype=None):
    """The ufuncs behind arange and linspace, which count elements."""
    launch([], [out], count=bool(out.size))
    steps = numpy.arange(out.size, dtype=out.dtype if out.dtype.kind in "iu" else float) * step
    out._a[...] = start + (steps / divisor[0] if divisor else steps)
    return out


def _of_view(function):
    return lambda array, *args: as_view(array, function(array._a, *args))


def _check_array(array, *, arg_name):
    if not isinstance(array, ndarray):
        raise TypeError(f"{arg_name} must be cupy.ndarray")


def _in_place(x, function, k):
    launch([x], [x])
    x._a[...] = function(x._a, k)
    return x
