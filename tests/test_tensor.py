"""Tensor: what it wraps, its attributes and methods, conversion, copying, and making one."""

import copy
import inspect
import pickle

import numpy as np
import pytest
from devices import assert_allclose, assert_array_equal, shares_memory
from devices import test_device_is_there as test_device_is_there

import gpugrad as gg
from gpugrad.errors import DeviceMismatch, NotDifferentiable, ShapeMismatch
from gpugrad.tensor import Tensor

DATA = np.array([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])


# --- making one ---------------------------------------------------------------------------------------------


def test_tensor_copies(device):
    array = device.put([1.0, 2.0])
    t = gg.tensor(array)
    assert not shares_memory(t._data, array)
    array[0] = 9
    assert_array_equal(t, [1, 2])


def test_asarray_shares(device):
    array = device.put([1.0, 2.0])
    t = gg.asarray(array)
    assert shares_memory(t._data, array)
    assert gg.asarray(t) is t
    assert not shares_memory(gg.asarray(array, copy=True)._data, array)
    assert not shares_memory(gg.asarray(t, copy=True)._data, array)
    assert gg.asarray(array, dtype="float32").dtype == np.float32
    assert shares_memory(gg.asarray(array, copy=False)._data, array)
    with pytest.raises(ValueError, match="copy"):
        gg.asarray(array, dtype="float32", copy=False)
    with pytest.raises(ValueError, match="copy"):
        gg.asarray([1.0], copy=False)


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        ([1.0, 2.0], "float64", (2,)),
        ([[1, 2]], "int64", (1, 2)),
        ([], "float64", (0,)),
        (3.0, "float64", ()),
        (3, "int64", ()),
        (True, "bool", ()),
        (1j, "complex128", ()),
        (np.float32(2), "float32", ()),
        (np.ones((2, 0), np.float16), "float16", (2, 0)),
        (range(3), "int64", (3,)),
    ],
)
def test_dtype_is_inferred_as_numpy_does(data, dtype, shape, device):
    for t in (gg.tensor(data, device=device), gg.asarray(data, device=device)):
        assert type(t) is Tensor
        assert (t.dtype, t.shape, t.ndim, t.size) == (dtype, shape, len(shape), int(np.prod(shape)))
        assert t.device == device


def test_dtype_may_be_given():
    assert gg.tensor([1, 2], dtype="float32", requires_grad=True).dtype == np.float32
    assert gg.tensor(gg.tensor([1.0]), dtype=np.float16).dtype == np.float16


def test_tensor_of_a_tensor_is_off_the_tape(device):
    x = gg.tensor([1.0], device=device, requires_grad=True)
    assert not gg.tensor(x * 2.0).requires_grad
    assert gg.tensor(x, requires_grad=True) is not x


def test_asarray_of_a_tracked_tensor_stays_on_the_tape(device):
    x = gg.tensor([1.0, 2.0], device=device, requires_grad=True)
    gg.asarray(x, dtype="float32").sum().backward()
    assert_array_equal(x.grad, [1, 1])
    assert x.grad.dtype == np.float64
    x.zero_grad()
    gg.asarray(x, copy=True).sum().backward()
    assert_array_equal(x.grad, [1, 1])


@pytest.mark.parametrize("data", [[1.0], 3.0, "text", None])
def test_constructor_wraps_arrays_only(data):
    with pytest.raises(TypeError, match=r"wraps an array, got.*gpugrad\.tensor"):
        Tensor(data)


@pytest.mark.parametrize("data", [np.array(["a"]), np.array([object()]), np.array([None, 1.0], dtype=object)])
def test_arrays_of_no_numbers_are_refused(data):
    with pytest.raises((TypeError, ValueError, NotDifferentiable)):
        gg.tensor(data, requires_grad=True)
    with pytest.raises((TypeError, ValueError)):
        gg.exp(gg.asarray(data))


# --- attributes ---------------------------------------------------------------------------------------------


def test_attributes(device):
    t = gg.tensor(DATA, device=device)
    assert isinstance(t.data, device.ndarray)
    assert (t.shape, t.ndim, t.size, t.dtype, t.device) == ((2, 3), 2, 6, np.float64, device)
    assert (t.requires_grad, t.grad) == (False, None)
    assert_array_equal(t.T, DATA.T)
    assert_array_equal(t.mT, DATA.T)
    assert len(t) == 2
    cube = gg.tensor(np.arange(24.0).reshape(2, 3, 4), device=device)
    assert cube.T.shape == (4, 3, 2)
    assert cube.mT.shape == (2, 4, 3)
    with pytest.raises(ShapeMismatch, match="no two axes"):
        gg.tensor([1.0], device=device).mT  # noqa: B018  # the attribute raises


def test_reductions_stay_arrays(device):
    total = gg.tensor(DATA, device=device).sum()
    assert type(total) is Tensor
    assert isinstance(total.data, device.ndarray)
    assert total.data.shape == ()


def test_numbers(device):
    t = gg.tensor(2.5, device=device)
    assert (float(t), int(t), t.item(), bool(t)) == (2.5, 2, 2.5, True)
    assert [10, 20, 30][gg.tensor(1, device=device)] == 20
    assert isinstance(gg.tensor([[7]], device=device).item(), int)
    for wrong in (gg.tensor([1.0, 2.0], device=device), gg.tensor([], device=device)):
        with pytest.raises((ValueError, TypeError)):
            wrong.item()
    with pytest.raises(ValueError, match="ambiguous"):
        bool(gg.tensor([1.0, 2.0], device=device))
    with pytest.raises(TypeError):
        [1, 2][gg.tensor(1.0, device=device)]


def test_numpy_functions_do_not_lose_a_gradient_silently():
    w = np.array([1.0, 2.0])
    for function in (np.dot, np.outer, np.vdot, lambda a, b: np.concatenate([a, b]), lambda a, _: np.asarray(a).sum()):
        with pytest.raises(gg.NotDifferentiable, match=r"use gpugrad's function.*t\.numpy\(\)"):
            gg.grad(lambda w, function=function: gg.sum(w) + function(w, w))(w)

    def through_an_array(w):
        b = np.zeros(2)
        b[:] = w * 2.0
        return (b * w).sum()

    with pytest.raises(gg.NotDifferentiable):
        gg.grad(through_an_array)(w)
    leaf = gg.tensor(w, requires_grad=True)
    with gg.no_grad():
        assert_array_equal(np.asarray(leaf), w)
    assert_array_equal(leaf.numpy(), w)


def test_to_numpy():
    t = gg.tensor(DATA)
    assert_array_equal(np.asarray(t), DATA)
    assert_array_equal(t.numpy(), DATA)
    assert np.asarray(t, dtype="float32").dtype == np.float32
    copied = np.array(t)
    copied[...] = 0
    assert_array_equal(t, DATA)
    assert isinstance(t.sum().numpy(), np.ndarray)


def test_no_implicit_conversion_from_a_device(device):
    t = gg.tensor(DATA, device=device)
    assert_array_equal(t.numpy(), DATA)
    if not device.on_cpu:
        with pytest.raises(DeviceMismatch, match=r"t\.numpy\(\)"):
            np.asarray(t)


def test_iteration_and_indexing(device):
    t = gg.tensor(DATA, device=device, requires_grad=True)
    rows = list(t)
    assert [r.shape for r in rows] == [(3,), (3,)]
    (rows[0] * rows[1]).sum().backward()
    assert_array_equal(t.grad, DATA[::-1])
    assert_array_equal(t[1, ::-1].numpy(), DATA[1, ::-1])
    assert_array_equal(t[..., None, -1].numpy(), DATA[..., None, -1])
    assert_array_equal(t[[1, 0]].numpy(), DATA[[1, 0]])
    assert_array_equal(t[gg.tensor([1, 0], device=device)].numpy(), DATA[[1, 0]])
    assert_array_equal(t[t > 0].numpy(), DATA[DATA > 0])
    assert_array_equal(t[[]].numpy(), DATA[[]])
    assert_array_equal(t[()].numpy(), DATA)
    with pytest.raises(IndexError):
        t[5]
    with pytest.raises(IndexError, match="float64"):
        t[device.put([0.5])]
    with pytest.raises(TypeError):
        iter(gg.tensor(1.0, device=device)).__next__()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([1.0, 2.0], "Tensor([1., 2.])"),
        (np.float32(1), "Tensor(1., dtype=float32)"),
        ([1, 2], "Tensor([1, 2])"),
        ([True], "Tensor([ True])"),
    ],
)
def test_repr(data, expected):
    assert repr(gg.tensor(data)) == expected
    assert str(gg.tensor(data)) == expected


def test_repr_of_a_leaf_and_format():
    assert repr(gg.tensor([1.0], requires_grad=True)) == "Tensor([1.], requires_grad=True)"
    assert f"{gg.tensor(1.23456):.2f}" == "1.23"
    assert f"{gg.tensor([1.0])}" == "Tensor([1.])"
    with pytest.raises((TypeError, ValueError)):
        f"{gg.tensor([1.0, 2.0]):.2f}"


def test_hash_is_identity():
    a, b = gg.tensor([1.0]), gg.tensor([1.0])
    assert len({a, b}) == 2
    assert {a: 1}[a] == 1


# --- methods ------------------------------------------------------------------------------------------------


def test_methods_are_the_functions(device):
    t = gg.tensor(DATA, device=device)
    for name, options in [
        ("sum", {"axis": 1}),
        ("mean", {"axis": 0, "keepdims": True}),
        ("prod", {}),
        ("max", {"axis": 1}),
        ("min", {}),
        ("var", {"axis": 1, "correction": 1}),
        ("std", {"axis": 0}),
    ]:
        assert_array_equal(getattr(t, name)(**options), getattr(gg, name)(t, **options))
    assert_array_equal(t.sum(1), DATA.sum(1))
    assert_allclose(t.std(0, 1, True), DATA.std(0, ddof=1, keepdims=True), rtol=0 if device.on_cpu else 1e-15)
    assert t.reshape(3, 2).shape == (3, 2)
    assert t.reshape((3, 2)).shape == (3, 2)
    assert t.reshape(-1).shape == (6,)
    assert t.astype("float32").dtype == np.float32
    assert_array_equal(abs(t), abs(DATA))
    assert_array_equal(-t, -DATA)
    assert_array_equal(+t, DATA)


def test_every_operator_is_attached():
    for name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or"):
        assert hasattr(Tensor, f"__{name}__")
        assert hasattr(Tensor, f"__r{name}__")
    for name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert", "getitem"):
        assert hasattr(Tensor, f"__{name}__")


def test_to_the_same_device():
    t = gg.tensor(DATA, requires_grad=True)
    assert t.to("cpu") is t
    assert t.to_device("cpu") is t
    with pytest.raises(ValueError, match="unknown device"):
        t.to("gpu")


def test_new_attributes_are_refused():
    with pytest.raises(AttributeError):
        gg.tensor([1.0]).gradient = 3


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(how, device):
    x = gg.tensor([1.0, 2.0], device=device, requires_grad=True)
    twin = how(x)
    assert twin.requires_grad
    assert twin.device == device
    assert_array_equal(twin.numpy(), x.numpy())
    (twin * 2.0).sum().backward()
    assert x.grad is None
    assert_array_equal(twin.grad, [2, 2])
    if device.on_cpu:
        with pytest.raises(ValueError, match="read-only"):
            twin.data[0] = 5
    constant = how(gg.tensor([1, 2]))
    assert not constant.requires_grad
    assert constant.dtype == np.int64


def test_grad_cannot_be_assigned_but_reset():
    x = gg.tensor([1.0], requires_grad=True)
    with pytest.raises(AttributeError):
        x.grad = gg.tensor([1.0])
    gg.tensor([1.0]).zero_grad()


def test_intermediate_has_no_grad(device):
    assert (gg.tensor([1.0], device=device, requires_grad=True) * 2.0).grad is None
    assert gg.exp(gg.tensor([1.0], device=device, requires_grad=True)).grad is None


# --- what functions take ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["text", None, object(), [1.0, 2.0], (1.0,), {"a": 1.0}])
@pytest.mark.parametrize(
    "call", [gg.exp, lambda x: gg.add(x, 1.0), lambda x: gg.multiply(gg.tensor([1.0, 2.0]), x), gg.sum]
)
def test_other_things_are_refused(call, bad):
    """By name: which function, which argument, and how to make an array of it."""
    with pytest.raises(TypeError, match=r"\w+: argument \d is a \w+.*gpugrad\.tensor"):
        call(bad)


def test_masked_arrays_are_refused():
    masked = np.ma.masked_array([1.0, 2.0], mask=[True, False])
    for call in (gg.exp, gg.sum, lambda m: gg.tensor([1.0, 2.0]) * m, lambda m: m * gg.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match=r"masked array.*fill it"):
            call(masked)


def test_making_a_tensor_of_a_masked_array_does_not_lose_the_mask_silently():
    masked = np.ma.masked_array([1.0, 2.0], mask=[True, False])
    with pytest.raises(TypeError, match="mask"):
        gg.tensor(masked)
    with pytest.raises(TypeError, match="mask"):
        gg.asarray(masked)


def test_matrix_subclass_is_an_array():
    with pytest.warns(PendingDeprecationWarning):
        m = np.matrix([[1.0, 2.0], [3.0, 4.0]])
    result = gg.multiply(gg.tensor([[1.0, 2.0], [3.0, 4.0]]), m)
    assert type(result.data) is np.ndarray
    assert_array_equal(result, [[1, 4], [9, 16]])


def test_too_many_arguments():
    with pytest.raises(TypeError, match="sum"):
        gg.sum(gg.tensor([1.0]), 0, False, 3)
    with pytest.raises(TypeError):
        gg.sum(gg.tensor([1.0]), 0, axis=0)
    with pytest.raises(TypeError):
        gg.exp(gg.tensor([1.0]), 2)
    with pytest.raises(TypeError):
        gg.sum(gg.tensor([1.0]), axes=0)


def test_too_few_arguments():
    for call in (gg.add, gg.exp, gg.matmul, gg.where, gg.sum):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError):
        gg.add(gg.tensor([1.0]))


def test_signatures_read_well():
    assert str(inspect.signature(gg.sum)) == "(x, /, axis=None, keepdims=False)"
    assert str(inspect.signature(gg.add)) == "(x, y, /)"
    assert str(inspect.signature(gg.swish)) == "(x, /, beta=1.0)"
    assert_array_equal(gg.swish(DATA, beta=2.0), gg.swish(DATA, 2.0))
    x, beta = gg.tensor(DATA, requires_grad=True), gg.tensor(2.0, requires_grad=True)
    gg.swish(x, beta=beta).sum().backward()
    assert beta.grad is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda: gg.concat([gg.tensor([1.0]), gg.tensor([[1.0]])]),
        lambda: gg.stack([gg.tensor([1.0]), gg.tensor([1.0, 2.0])]),
        lambda: gg.tensor(DATA) @ gg.tensor(DATA),
        lambda: gg.tensor(DATA) + gg.tensor([1.0, 2.0]),
        lambda: gg.squeeze(gg.tensor(DATA), 0),
        lambda: gg.expand_dims(gg.tensor(DATA), axis=4),
        lambda: gg.tensor(DATA).reshape(4, 2),
        lambda: gg.take(gg.tensor(DATA), np.array([0])),
        lambda: gg.einsum("ij,jk->ik", gg.tensor(DATA)),
        lambda: gg.einsum("ijk->i", gg.tensor(DATA)),
    ],
    ids=["concat", "stack", "matmul", "add", "squeeze", "expand_dims", "reshape", "take", "terms", "axes"],
)
def test_shapes_that_do_not_fit(call):
    with pytest.raises(ValueError, match=r"."):
        call()


# --- indexing and integers --------------------------------------------------------------------------------------

CUBE = np.arange(24.0).reshape(2, 3, 4)
INDICES = {
    "int": 1,
    "negative": -1,
    "numpy-int": np.int64(1),
    "slice": slice(None, None, -1),
    "empty-slice": slice(5, 9),
    "ellipsis": (..., 2),
    "new-axis": (None, 0, None, slice(1, 3)),
    "mask": CUBE % 3 == 0,
    "row-mask": np.array([True, False]),
    "empty-mask": np.zeros((2, 3, 4), bool),
    "list": [1, 0, 1],
    "array-repeated": np.array([[0, 0], [1, 0]]),
    "pair": (np.array([0, 1, 1]), np.array([2, 0, 0])),
    "broadcast-pair": (np.array([[0], [1]]), np.array([2, 0])),
    "separated": (np.array([0, 1]), slice(None), np.array([3, 3])),
    "mixed": (0, slice(1, None), np.array([0, 0, 2])),
    "slice-then-array": (slice(None), np.array([2, 2])),
    "array-then-mask": (slice(None), np.array([True, False, True]), 1),
    "negative-array": np.array([-1, -2]),
    "small-ints": np.array([1, 0], np.int8),
    "unsigned": np.array([1, 0], np.uint64),
    "0-d": np.array(1),
    "all": (),
}


@pytest.mark.parametrize("name", INDICES)
def test_gradient_of_indexing(name, rng, device):
    """The cotangent goes back to where the element came from, as often as it was taken."""
    index = INDICES[name]
    parts = tuple(device.put(i) if isinstance(i, np.ndarray) else i for i in index) if type(index) is tuple else index
    there = device.put(parts) if isinstance(parts, np.ndarray) else parts
    for given in (there, gg.tensor(there)) if isinstance(there, device.ndarray) else (there,):
        x = gg.tensor(CUBE, device=device, requires_grad=True)
        y = x[given]
        assert_array_equal(y, CUBE[index])
        g = rng.normal(size=y.shape)
        y.backward(device.put(g))
        expected = np.zeros_like(CUBE)
        np.add.at(expected, index, g)
        assert_allclose(x.grad, expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (gg.softmax, np.exp([1.0, 2.0, 4.0]) / np.exp([1.0, 2.0, 4.0]).sum()),
        (gg.log_softmax, np.log(np.exp([1.0, 2.0, 4.0]) / np.exp([1.0, 2.0, 4.0]).sum())),
        (gg.logsumexp, np.log(np.exp([1.0, 2.0, 4.0]).sum())),
        (gg.linalg.norm, np.sqrt(21)),
        (gg.mean, 7 / 3),
        (gg.var, 14 / 9),
        (gg.std, np.sqrt(14 / 9)),
        (gg.sigmoid, 1 / (1 + np.exp([-1.0, -2.0, -4.0]))),
        (gg.silu, np.array([1, 2, 4]) / (1 + np.exp([-1.0, -2.0, -4.0]))),
        (gg.softplus, np.log1p(np.exp([1.0, 2.0, 4.0]))),
        (gg.elu, [1, 2, 4]),
        (gg.leaky_relu, [1, 2, 4]),
        (lambda x: gg.leaky_relu(-x), [-0.01, -0.02, -0.04]),
        (gg.sqrt, np.sqrt([1, 2, 4])),
        (lambda x: x / 2, [0.5, 1, 2]),
        (gg.linalg.inv, None),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_functions_of_integers_are_floats(call, expected, device):
    """No result is cut down to the integers it came from."""
    data = device.put([1, 2, 4])
    if expected is None:
        data, expected = device.put([[2, 0], [0, 4]]), [[0.5, 0], [0, 0.25]]
    for x in (data, gg.tensor(data)):
        assert_allclose(call(x), expected, rtol=1e-14)
