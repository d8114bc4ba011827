"""Tensor: an array and its place on the tape.

No mathematics here: operators and methods are attached from a table in `gpugrad.ops`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy
from numpy import ndarray

from gpugrad import backend
from gpugrad import op as _op
from gpugrad.backend import Array, Device
from gpugrad.errors import DeviceMismatch, NotDifferentiable


class Tensor:
    """An immutable array on a device, with its place on the tape. Made by `gpugrad.tensor` and `gpugrad.asarray`.

    Attributes: `data`, `shape`, `ndim`, `size`, `dtype`, `device`, `T`, `mT`, `requires_grad`, `grad`.
    Mixes with plain arrays and numbers in every operator, on either side; the result is a Tensor.
    """

    # _external: the user can reach this memory by another way (CuPy only: NumPy arrays know by their write flag)
    __slots__ = ("__weakref__", "_data", "_external", "_node")

    _data: Any
    _node: _op.Node | None
    _external: bool

    __array_ufunc__ = None  # ndarray and cupy.ndarray leave binary operators to us
    __array_priority__ = 1000

    def __init__(self, data: Array) -> None:
        """Wrap an array (ndarray, NumPy scalar or cupy.ndarray), sharing its memory. Raises TypeError for others."""
        if not backend.is_array(data):
            raise TypeError(f"Tensor wraps an array, got {type(data).__name__}; gpugrad.tensor makes one from any data")
        self._data = data
        self._node = None
        self._external = True

    # ------------------------------------------------------------------------------------------ the array

    @property
    def data(self) -> Array:
        """The numpy.ndarray or cupy.ndarray. What gpugrad owns comes read-only from the CPU, as a copy from CUDA."""
        data = self._data
        if type(data) is not numpy.ndarray:
            if isinstance(data, numpy.generic):
                data = numpy.asarray(data)
                data.flags.writeable = False
            elif not self._external:
                with backend.activate(self.device):
                    data = data.copy()
        return data

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        return self._data.ndim  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return int(self._data.size)

    @property
    def dtype(self) -> Any:
        return self._data.dtype

    @property
    def device(self) -> Device:
        """Where the array lives: ``"cpu"`` or ``"cuda:N"``."""
        return backend.device_of(self._data)

    @property
    def requires_grad(self) -> bool:
        """Whether this Tensor is on the tape: a leaf made with ``requires_grad=True``, or computed from one."""
        return self._node is not None

    @property
    def grad(self) -> "Tensor | None":
        """The gradient that `backward` has added up for this leaf, or None."""
        node = self._node
        return node.grad if node is not None and node.op is None else None

    def zero_grad(self) -> None:
        """Forget the gradient collected so far."""
        if self._node is not None and self._node.op is None:
            self._node.grad = None

    def detach(self) -> "Tensor":
        """Return the same array off the tape."""
        result: Tensor = _op.box(self._data, None, self._external)
        return result

    # ------------------------------------------------------------------------- to the host: these synchronise

    def numpy(self) -> "ndarray[Any, Any]":
        """Return the values as a numpy.ndarray: as `data` is from the CPU, a copy from CUDA."""
        return numpy.asarray(backend.to_device(self._data, backend.CPU))

    def item(self) -> Any:
        """Return the only element as a Python number. Raises ValueError if there are more."""
        return self._data.item()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "ndarray[Any, Any]":
        if self.device.kind != "cpu":
            raise DeviceMismatch(f"numpy.asarray of a Tensor on {self.device} would copy it unasked; use t.numpy()")
        self._refuse_tracked("a NumPy function, or numpy.asarray,", "t.numpy()")
        return numpy.array(self._data, dtype=dtype, copy=copy)

    def _refuse_tracked(self, who: str, remedy: str) -> None:
        if self._node is not None and _op.recording.on:
            raise NotDifferentiable(
                f"{who} got a Tensor on the tape, and its gradient would be lost: use gpugrad's function of that name, "
                f"or {remedy} if the values alone are meant"
            )

    # ----------------------------------------------------------------------------------- to other array libraries

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export by DLPack: `torch.from_dlpack(t)`. A Tensor over an array of the user's shares its memory.

        What gpugrad owns goes out as a copy, since a consumer may write to it and not all heed a read-only mark.
        Raises NotDifferentiable for a Tensor on the tape, BufferError where copy=False cannot be had.
        """
        self._refuse_tracked("DLPack", "t.detach()")
        options = {"stream": stream, "max_version": max_version, "dl_device": dl_device}
        data, on_cpu = self._data, self.device.kind == "cpu"
        shared = self._external and (not on_cpu or (type(data) is ndarray and data.flags.writeable))
        if not shared and copy is False:
            raise BufferError("this memory is gpugrad's own, or read-only, and goes out as a copy: leave copy out")
        if on_cpu:
            data, options["copy"] = numpy.asarray(data), True if not shared else copy
        elif dl_device == backend.DLPACK_CPU:
            options["copy"] = copy
        elif copy or not shared:
            with backend.activate(self.device):
                data = data.copy()  # CuPy leaves that to us
        return data.__dlpack__(**{key: value for key, value in options.items() if value is not None})

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.device.kind == "cpu":
            return backend.DLPACK_CPU
        return self._data.__dlpack_device__()  # type: ignore[no-any-return]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.device.kind == "cpu":
            raise AttributeError("a Tensor on the CPU has no __cuda_array_interface__; move it with t.to('cuda')")
        self._refuse_tracked("a CuPy function, or __cuda_array_interface__,", "t.detach()")
        if not self._external:
            # Whoever reads this may write: the Tensor moves to memory that the tape knows nothing of.
            with backend.activate(self.device):
                self._data = self._data.copy()
            self._external = True
        return self._data.__cuda_array_interface__  # type: ignore[no-any-return]

    def __float__(self) -> float:
        return float(self._data.item())

    def __int__(self) -> int:
        return int(self._data.item())

    def __index__(self) -> int:
        return self._data.__index__()  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        return bool(self._data)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec and self.ndim == 0 else format(str(self), spec)

    def __repr__(self) -> str:
        if isinstance(self._data, backend.Abstract):
            return f"Tensor(captured, shape={self.shape}, dtype={self.dtype})"
        body = numpy.array2string(self.numpy(), separator=", ", prefix="Tensor(")
        where = "" if self.device == "cpu" else f", device='{self.device}'"
        tracked = ", requires_grad=True" if self.requires_grad else ""
        kind = "" if self.dtype in (numpy.float64, numpy.int64, numpy.bool_) else f", dtype={self.dtype}"
        return f"Tensor({body}{kind}{where}{tracked})"

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator["Tensor"]:
        return (self[i] for i in range(len(self)))

    __hash__ = object.__hash__

    def __reduce__(self) -> Any:
        # A copy or pickle starts a graph of its own: it is a leaf, or a constant.
        return _restore, (self.numpy(), str(self.device), self.requires_grad)

    if TYPE_CHECKING:  # attached by gpugrad.tape and gpugrad.ops

        def backward(self, gradient: Any = None, *, retain_graph: bool = False, create_graph: bool = False) -> None: ...
        def __add__(self, other: Any) -> "Tensor": ...
        def __radd__(self, other: Any) -> "Tensor": ...
        def __sub__(self, other: Any) -> "Tensor": ...
        def __rsub__(self, other: Any) -> "Tensor": ...
        def __mul__(self, other: Any) -> "Tensor": ...
        def __rmul__(self, other: Any) -> "Tensor": ...
        def __truediv__(self, other: Any) -> "Tensor": ...
        def __rtruediv__(self, other: Any) -> "Tensor": ...
        def __pow__(self, other: Any) -> "Tensor": ...
        def __rpow__(self, other: Any) -> "Tensor": ...
        def __matmul__(self, other: Any) -> "Tensor": ...
        def __rmatmul__(self, other: Any) -> "Tensor": ...
        def __neg__(self) -> "Tensor": ...
        def __pos__(self) -> "Tensor": ...
        def __abs__(self) -> "Tensor": ...
        def __invert__(self) -> "Tensor": ...
        def __and__(self, other: Any) -> "Tensor": ...
        def __or__(self, other: Any) -> "Tensor": ...
        def __lt__(self, other: Any) -> "Tensor": ...
        def __le__(self, other: Any) -> "Tensor": ...
        def __gt__(self, other: Any) -> "Tensor": ...
        def __ge__(self, other: Any) -> "Tensor": ...
        def __eq__(self, other: object) -> "Tensor": ...  # type: ignore[override]
        def __ne__(self, other: object) -> "Tensor": ...  # type: ignore[override]
        def __getitem__(self, index: Any) -> "Tensor": ...
        def to(self, device: str) -> "Tensor": ...
        def to_device(self, device: str) -> "Tensor": ...
        def astype(self, dtype: Any) -> "Tensor": ...
        def reshape(self, *shape: Any) -> "Tensor": ...
        def sum(self, axis: Any = None, keepdims: bool = False) -> "Tensor": ...
        def mean(self, axis: Any = None, keepdims: bool = False) -> "Tensor": ...
        def prod(self, axis: Any = None, keepdims: bool = False) -> "Tensor": ...
        def max(self, axis: Any = None, keepdims: bool = False) -> "Tensor": ...
        def min(self, axis: Any = None, keepdims: bool = False) -> "Tensor": ...
        def var(self, axis: Any = None, correction: float = 0, keepdims: bool = False) -> "Tensor": ...
        def std(self, axis: Any = None, correction: float = 0, keepdims: bool = False) -> "Tensor": ...
        def _masked_product(self, slope: Any) -> "Tensor": ...
        def _selected(self, condition: Any) -> "Tensor": ...
        @property
        def T(self) -> "Tensor": ...  # the standard's name
        @property
        def mT(self) -> "Tensor": ...


def _restore(data: Array, device: str, requires_grad: bool) -> Tensor:
    array = backend.asarray(data, where=backend.as_device(device), copy=True)
    if isinstance(array, ndarray):
        array.flags.writeable = False
    result: Tensor = _op.box(array, _op.leaf(array) if requires_grad else None)
    return result


_op.bind_tensor(Tensor)
