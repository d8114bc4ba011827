"""Arrays of other libraries, both ways: DLPack and `__cuda_array_interface__`, on the CPU and the stand-in for CUDA."""

import array as standard_array
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import gpugrad as gg
from gpugrad import backend


@pytest.fixture
def cupy(stand_in: Any) -> Any:
    return stand_in


class Speaker:
    """An array of another library: nothing but DLPack, over NumPy's or the stand-in's memory."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Legacy(Speaker):
    """One of before DLPack 1.0, which knows of no options but the stream."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.array.__dlpack__()


def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is the other library")


# --- into gpugrad -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Speaker, Legacy])
def test_memory_is_shared(kind: Any) -> None:
    theirs = np.arange(6.0).reshape(2, 3)
    t = gg.asarray(kind(theirs))
    theirs[0, 0] = 7.0
    assert_array_equal(t, theirs)
    assert t.device == "cpu"


def test_copy_and_dtype_are_heeded() -> None:
    theirs = np.arange(3.0)
    copied = gg.asarray(Speaker(theirs), copy=True)
    cast = gg.asarray(Speaker(theirs), dtype="float32")
    made = gg.tensor(Speaker(theirs), requires_grad=True)
    theirs[:] = -1
    for t in (copied, cast, made):
        assert_array_equal(t.numpy(), [0, 1, 2])
    assert cast.dtype == "float32"
    assert gg.asarray(Speaker(theirs), copy=False).data[0] == -1
    with pytest.raises(ValueError, match="copy"):
        gg.asarray(Speaker(theirs), dtype="float32", copy=False)


@pytest.mark.oracle
def test_torch_tensors_come_in() -> None:
    theirs = torch().arange(6.0).reshape(2, 3)
    t = gg.asarray(theirs)
    assert np.shares_memory(t.data, theirs.numpy())
    assert_array_equal(gg.asarray(theirs.T), theirs.numpy().T)  # strides too
    assert gg.asarray(torch().ones(2, dtype=torch().float16)).dtype == "float16"


@pytest.mark.oracle
def test_torch_tensors_that_cannot_come_in() -> None:
    with pytest.raises(TypeError, match=r"torch\.Tensor of dtype torch\.bfloat16 cannot be taken over .*; cast it"):
        gg.asarray(torch().ones(2, dtype=torch().bfloat16))
    with pytest.raises(TypeError, match="detach"):
        gg.asarray(torch().ones(2, requires_grad=True))


def test_an_unknown_device_is_named() -> None:
    class Elsewhere(Speaker):
        def __dlpack_device__(self) -> Any:
            return (8, 0)

    with pytest.raises(TypeError, match="Elsewhere on DLPack device type 8; expected the CPU or CUDA"):
        gg.asarray(Elsewhere(np.ones(2)))


@pytest.mark.parametrize("make", [Speaker, standard_array.array, memoryview], ids=lambda kind: kind.__name__)
def test_what_others_can_reach_is_not_trusted(make: Any) -> None:
    """The tape keeps a copy: a change after the fact does not change the gradient."""
    if make is standard_array.array:
        theirs = make("d", [1.0, 2.0])
        given: Any = theirs
    else:
        theirs = np.array([1.0, 2.0])
        given = make(theirs)
    w = gg.tensor([3.0, 4.0], requires_grad=True)
    loss = (w * gg.asarray(given)).sum()
    theirs[0] = 99.0
    loss.backward()
    assert_array_equal(w.grad, [1, 2])


def test_a_list_becomes_memory_of_gpugrads_own() -> None:
    t = gg.asarray([1.0, 2.0])
    assert not t.data.flags.writeable
    assert not gg.asarray(np.ones(2), copy=True).data.flags.writeable


# --- out of gpugrad ---------------------------------------------------------------------------------------


def test_numpy_takes_tensors() -> None:
    mine = gg.tensor([[1.0, 2.0], [3.0, 4.0]])
    theirs = np.from_dlpack(mine)
    assert_array_equal(theirs, mine.numpy())
    theirs[0, 0] = 99
    assert_array_equal(mine.numpy()[0], [1, 2])  # what gpugrad owns went out as a copy
    assert_array_equal(np.from_dlpack(mine.sum()), 10.0)
    assert mine.__dlpack_device__() == (1, 0)


def test_memory_of_the_users_is_shared_outwards() -> None:
    x = np.arange(3.0)
    theirs = np.from_dlpack(gg.asarray(x))
    assert np.shares_memory(theirs, x)
    assert not np.shares_memory(np.from_dlpack(gg.asarray(x), copy=True), x)
    assert np.shares_memory(np.from_dlpack(gg.asarray(x), copy=False), x)


@pytest.mark.oracle
def test_torch_cannot_write_to_what_the_tape_trusts() -> None:
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    y = gg.exp(x)
    theirs = torch().from_dlpack(y.detach())
    theirs += 100.0
    y.sum().backward()
    np.testing.assert_allclose(x.grad, np.exp([1.0, 2.0]))
    frozen = np.ones(2)
    frozen.flags.writeable = False  # PyTorch does not heed the mark
    torch().from_dlpack(gg.asarray(frozen)).add_(1.0)
    assert_array_equal(frozen, 1)
    shared = np.ones(2)
    torch().from_dlpack(gg.asarray(shared)).add_(1.0)
    assert_array_equal(shared, 2)


def test_a_copy_that_may_not_be_made() -> None:
    with pytest.raises(BufferError, match="leave copy out"):
        gg.tensor([1.0]).__dlpack__(copy=False)


def test_tracked_tensors_do_not_leave_the_tape() -> None:
    x = gg.tensor([1.0], requires_grad=True)
    with pytest.raises(gg.NotDifferentiable, match=r"DLPack.*gradient would be lost.*t\.detach\(\)"):
        np.from_dlpack(x * 2)
    assert_array_equal(np.from_dlpack((x * 2).detach()), [2])
    with gg.no_grad():
        assert_array_equal(np.from_dlpack(x), [1])


def test_no_cuda_interface_on_the_cpu() -> None:
    t = gg.tensor([1.0])
    assert not hasattr(t, "__cuda_array_interface__")
    with pytest.raises(AttributeError, match="a Tensor on the CPU"):
        t.__cuda_array_interface__  # noqa: B018


# --- on the stand-in for CUDA -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_device_memory_comes_in_where_it_is(cupy: Any, number: int) -> None:
    with cupy.cuda.Device(number):
        theirs = cupy.arange(3.0)
    t = gg.asarray(Speaker(theirs))
    assert t.device == f"cuda:{number}"
    assert t._data.data.ptr == theirs.data.ptr
    assert_array_equal(gg.asarray(Speaker(theirs), device="cpu"), [0, 1, 2])


def test_the_cuda_interface_comes_in(cupy: Any) -> None:
    class Interface:
        def __init__(self, array: Any) -> None:
            self.array = array
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    theirs = cupy.arange(3.0)
    t = gg.asarray(Interface(theirs))
    assert t.device == "cuda:0"
    theirs[0] = 7.0
    assert_array_equal(t.numpy(), [7, 1, 2])
    w = gg.tensor([1.0, 1.0, 1.0], device="cuda", requires_grad=True)
    loss = (w * t).sum()
    theirs[:] = 99.0
    loss.backward()
    assert_array_equal(w.grad.numpy(), [7, 1, 2])


def test_device_memory_goes_out(cupy: Any) -> None:
    mine = gg.tensor([1.0, 2.0], device="cuda:1")
    assert tuple(mine.__dlpack_device__()) == (2, 1)
    with cupy.cuda.Device(1):
        theirs = cupy.from_dlpack(mine)
        theirs[:] = 99.0
    assert_array_equal(mine.numpy(), [1, 2])
    x = cupy.arange(2.0)
    shared = cupy.from_dlpack(gg.asarray(x))
    shared[:] = 5.0
    assert_array_equal(x.get(), 5)
    assert_array_equal(np.from_dlpack(mine, device="cpu"), [1, 2])


def test_the_cuda_interface_shows_memory_that_the_tape_does_not_trust(cupy: Any) -> None:
    x = gg.tensor([0.0, 1.0], device="cuda", requires_grad=True)
    y = gg.exp(x)  # keeps its result for the sweep
    theirs = cupy.asarray(y.detach())
    detached = y.detach()
    shown = cupy.asarray(detached)
    assert shown.data.ptr == detached.__cuda_array_interface__["data"][0]
    for array in (theirs, shown):
        array[:] = 99.0
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), np.exp([0.0, 1.0]))


def test_cupy_functions_refuse_tracked_tensors(cupy: Any) -> None:
    x = gg.tensor([1.0, 2.0], device="cuda", requires_grad=True)
    with pytest.raises(gg.NotDifferentiable, match="gradient would be lost"):
        cupy.exp(x)
    assert_array_equal(cupy.exp(x.detach()).get(), np.exp([1.0, 2.0]))
    assert type(cupy.ones(2) * x) is gg.Tensor  # operators are gpugrad's


def test_devices_do_not_mix_by_interchange(cupy: Any) -> None:
    with cupy.cuda.Device(1):
        theirs = cupy.ones(2)
    with pytest.raises(gg.DeviceMismatch, match=r"cuda:0.*cuda:1"):
        gg.tensor([1.0, 1.0], device="cuda:0") + gg.asarray(Speaker(theirs))
    assert backend.device_of(theirs) == "cuda:1"
