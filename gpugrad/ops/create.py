"""Making Tensors from data."""

from typing import Any

from numpy import ndarray

from gpugrad import backend
from gpugrad.op import box
from gpugrad.tape import new_leaf
from gpugrad.tensor import Tensor


def _plain(obj: Any) -> Any:
    return obj._data if type(obj) is Tensor else obj


def _is_captured(obj: Any) -> bool:
    return type(obj) is Tensor and isinstance(obj._data, backend.Abstract)


def _moved(obj: Tensor, where: backend.Device, dtype: Any) -> Tensor:
    from gpugrad.ops.shape import astype, to_device

    there = obj if obj.device == where else to_device(obj, device=where, source=obj.device)
    moved: Tensor = there if there.dtype == dtype else astype(there, dtype=dtype)
    return moved


def tensor(data: Any, *, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """Copy data (nested lists, numbers, an array or a Tensor) into a new Tensor.

    dtype: as NumPy infers it if None. device: "cpu", "cuda", "cuda:N" or "auto"; if None, where an array is, and
    the default device for other data. requires_grad: make it a leaf whose `grad` `backward` fills.
    Raises NotDifferentiable for requires_grad with a dtype that is not floating point, DeviceUnavailable.
    """
    if _is_captured(data):
        return asarray(data.detach(), dtype=dtype, device=device)
    where = None if device is None else backend.as_device(device)
    array = backend.asarray(_plain(data), dtype=dtype, where=where, copy=True)
    if array.__class__.__module__ == "numpy":
        array.flags.writeable = False  # nobody else can reach it: what the tape keeps of it cannot change
    result: Tensor = box(array, new_leaf(array, "tensor(requires_grad=True)") if requires_grad else None)
    return result


def asarray(obj: Any, *, dtype: Any = None, device: str | None = None, copy: bool | None = None) -> Tensor:
    """Return obj as a Tensor, sharing the memory of an array where possible (the Array API standard's asarray).

    obj: an array of NumPy or CuPy, or of any library that speaks DLPack (PyTorch, JAX) or `__cuda_array_interface__`;
    a Tensor, nested lists, a number. dtype, device: as for `tensor`; a device given by name is where the result will
    be. copy: True always copies, False raises ValueError where a copy would be needed, None copies only then.
    Raises TypeError for a dtype that NumPy and CuPy have not, such as bfloat16.
    """
    where = None if device is None else backend.as_device(device)
    plain = _plain(obj)
    if _is_captured(obj):
        return _moved(obj, obj.device if where is None else where, obj.dtype if dtype is None else dtype)
    array = backend.asarray(plain, dtype=dtype, where=where, copy=copy)
    if type(obj) is Tensor and array is plain:
        return obj
    if type(obj) is Tensor and obj._node is not None:
        return _moved(obj, backend.device_of(array), array.dtype)
    # NumPy and CuPy say of their own arrays, and of fresh ones, whether memory is shared; of other objects nobody does.
    known = type(plain) in backend.PLAIN or backend.is_array(plain)
    external = (array is plain or array.base is not None) if known else copy is not True
    if not external and isinstance(array, ndarray):
        array.flags.writeable = False
    result: Tensor = box(array, None, external)
    return result
