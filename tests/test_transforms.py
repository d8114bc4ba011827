"""grad, value_and_grad, vjp: argument numbers, structures, kinds, nesting, errors."""

import threading
from typing import NamedTuple

import numpy as np
import pytest
from devices import assert_allclose, assert_array_equal, host, shares_memory
from devices import test_device_is_there as test_device_is_there

import gpugrad as gg
from gpugrad.errors import NotDifferentiable, ShapeMismatch
from gpugrad.tensor import Tensor


class Params(NamedTuple):
    """Parameters of a line."""

    slope: object
    offset: object


def product(x, y, z=1.0):
    return (x * y * z).sum()


@pytest.fixture
def X(device):
    return device.put([1.0, 2.0])


@pytest.fixture
def Y(device):
    return device.put([3.0, 5.0])


# --- which arguments ----------------------------------------------------------------------------------------


def test_argnums(X, Y):
    assert_array_equal(gg.grad(product)(X, Y), Y)
    assert_array_equal(gg.grad(product, argnums=1)(X, Y), X)
    assert_array_equal(gg.grad(product, argnums=-1)(X, Y), X)
    assert_array_equal(gg.grad(product, argnums=-2)(X, Y), Y)
    both = gg.grad(product, argnums=(1, 0))(X, Y)
    assert isinstance(both, tuple)
    assert_array_equal(both[0], X)
    assert_array_equal(both[1], Y)
    (only,) = gg.grad(product, argnums=(0,))(X, Y)
    assert_array_equal(only, Y)
    first, last = gg.grad(product, argnums=(0, -1))(X, Y)
    assert_array_equal(first, Y)
    assert_array_equal(last, X)
    (listed,) = gg.grad(product, argnums=[1])(X, Y)
    assert_array_equal(listed, X)


def test_keyword_arguments_pass_through(X, Y):
    assert_array_equal(gg.grad(product)(X, Y, z=2.0), 2 * Y)
    assert_array_equal(gg.grad(lambda x, *, power: (x**power).sum())(X, power=2), 2 * X)


@pytest.mark.parametrize("argnums", [2, -3, (0, 2)])
def test_argnums_out_of_range(argnums, X, Y):
    with pytest.raises(TypeError, match=r"grad of product: argnums=.*2 argument"):
        gg.grad(product, argnums=argnums)(X, Y)


def test_other_arguments_may_be_anything(X, device):
    def f(x, how, mask):
        assert isinstance(mask, device.ndarray)
        return (x * mask).sum() if how == "sum" else x.max()

    assert_array_equal(gg.grad(f)(X, "sum", device.put([1, 0])), [1, 0])


def test_value_and_grad(X, Y):
    value, gradient = gg.value_and_grad(product)(X, Y)
    assert value == 13
    assert_array_equal(gradient, Y)


def test_has_aux(X):
    def f(x):
        return (x * x).sum(), {"note": "kept", "twice": 2 * x.detach()}

    gradient, aux = gg.grad(f, has_aux=True)(X)
    assert_array_equal(gradient, 2 * X)
    assert aux["note"] == "kept"
    assert_array_equal(aux["twice"], 2 * X)
    (value, aux), gradient = gg.value_and_grad(f, has_aux=True)(X)
    assert value == 5
    assert aux["note"] == "kept"
    assert_array_equal(gradient, 2 * X)


@pytest.mark.parametrize("result", [lambda x: x.sum(), lambda x: (x.sum(), 1, 2), lambda x: [x.sum(), 1]])
def test_has_aux_without_a_pair(result, X):
    with pytest.raises(TypeError, match=r"has_aux=True.*pair"):
        gg.grad(result, has_aux=True)(X)


def test_name_and_doc_are_kept():
    def loss(x):
        """How far off."""
        return x.sum()

    for wrapped in (gg.grad(loss), gg.value_and_grad(loss)):
        assert wrapped.__name__ == "loss"
        assert wrapped.__doc__ == "How far off."


# --- structures and kinds -----------------------------------------------------------------------------------


def test_structures():
    X, Y = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    params = {"w": X, "line": Params(2.0, gg.tensor([1.0, 1.0])), "list": [np.float32(3.0), (Y, None)]}

    def loss(p):
        assert type(p["line"]) is Params
        assert all(type(t) is Tensor for t in (p["w"], p["line"].slope, p["list"][0], p["list"][1][0]))
        assert p["list"][1][1] is None
        return (p["w"] * p["line"].slope + p["line"].offset * p["list"][1][0]).sum() * p["list"][0]

    value, g = gg.value_and_grad(loss)(params)
    assert type(value) is Tensor
    assert value.item() == (2 * X + Y).sum() * 3
    assert set(g) == set(params)
    assert type(g["line"]) is Params
    assert isinstance(g["w"], np.ndarray)
    assert_array_equal(g["w"], [6, 6])
    assert type(g["line"].slope) is float
    assert g["line"].slope == 9
    assert type(g["line"].offset) is Tensor
    assert_array_equal(g["line"].offset, 3 * Y)
    assert isinstance(g["list"], list)
    assert g["list"][0].dtype == np.float32
    assert g["list"][0] == (2 * X + Y).sum()
    assert isinstance(g["list"][1], tuple)
    assert g["list"][1][1] is None


def test_empty_structures(X):
    assert gg.grad(lambda p: 1.0)({}) == {}
    assert gg.grad(lambda p, x: x.sum(), argnums=(0, 1))([], X)[0] == []
    assert gg.grad(lambda p: 1.0)(None) is None


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (2,), (0, 3)])
def test_kinds(dtype, shape, device):
    array = device.put(np.full(shape, 2), dtype)
    g = gg.grad(lambda x: (x * x).sum())(array)
    assert isinstance(g, device.ndarray)
    assert (g.dtype, g.shape) == (array.dtype, shape)
    assert_array_equal(g, 2 * array)
    g = gg.grad(lambda x: (x * x).sum())(gg.tensor(array))
    assert type(g) is Tensor
    assert (g.dtype, g.shape, g.requires_grad) == (array.dtype, shape, False)
    value, g = gg.value_and_grad(lambda x: x * x)(3.0)
    assert (type(value), type(g)) == (float, float)
    assert (value, g) == (9, 6)
    scalar = np.dtype(dtype).type(3)
    g = gg.grad(lambda x: x * x)(scalar)
    assert g.dtype == dtype
    assert g == 6


def test_value_has_the_kind_of_the_arguments(X, Y, device):
    f = product
    assert type(gg.value_and_grad(f)(gg.tensor(X), Y)[0]) is Tensor
    assert type(gg.value_and_grad(f, argnums=(0, 1))(X, gg.tensor(Y))[0]) is Tensor
    value, _ = gg.value_and_grad(f)(X, Y)
    assert isinstance(value, device.array_types)
    value, _ = gg.value_and_grad(f)(X, gg.tensor(Y))
    assert isinstance(value, device.array_types)


def test_array_is_a_tensor_inside(X):
    gg.grad(lambda x: (isinstance(x, Tensor) or pytest.fail("not a Tensor")) and x.sum())(X)


def test_read_only_and_subclass_arrays(frozen):
    assert_array_equal(gg.grad(lambda x: (x * x).sum())(frozen([1.0, 2.0])), [2, 4])


def test_function_cannot_change_its_argument():
    def f(x):
        x.data[...] = 0
        return x.sum()

    x = np.array([1.0, 2.0])
    with pytest.raises(ValueError, match="read-only"):
        gg.grad(f)(x)
    assert_array_equal(x, [1, 2])


# --- nesting ------------------------------------------------------------------------------------------------


def test_third_order(device):
    f = gg.grad(gg.grad(gg.grad(lambda x: gg.sin(x) * x**2)))
    x = 0.8
    exact = -np.cos(x) * x**2 - 6 * x * np.sin(x) + 6 * np.cos(x)
    assert type(f(x)) is float
    assert f(x) == pytest.approx(exact, rel=1e-14)
    result = f(device.put(x))
    assert isinstance(result, device.ndarray)
    assert host(result) == pytest.approx(exact, rel=1e-14)


def test_fourth_order_of_exp():
    f = gg.exp
    for _ in range(4):
        f = gg.grad(f)
    assert f(0.5) == pytest.approx(np.exp(0.5), rel=1e-14)


def test_hessian_vector_product(rng):
    a = rng.normal(size=(3, 3))
    x, v = rng.normal(size=3), rng.normal(size=3)

    def f(x):
        return (x @ a @ x) + (x**3).sum()

    hv = gg.grad(lambda x: (gg.grad(f)(x) * v).sum())(x)
    assert_allclose(hv, (a + a.T + np.diag(6 * x)) @ v, rtol=1e-13)


def test_closure_over_an_outer_variable():
    """d/dx [x * d/dy (x y^2)] at y = 3: the inner gradient depends on x."""

    def outer(x):
        inner = gg.grad(lambda y: x * y**2)(3.0)
        assert type(inner) is Tensor
        return x * inner

    assert gg.grad(outer)(2.0) == pytest.approx(2 * 2 * 2 * 3)


def test_perturbation_confusion():
    """The classic: d/dx [x * d/dy (x + y)] at y = 1 is 1, not 2."""
    assert gg.grad(lambda x: x * gg.grad(lambda y: x + y)(1.0))(1.0) == 1
    assert gg.grad(lambda x: gg.grad(lambda y: x * y)(2.0) * x)(5.0) == 10


def test_inner_gradient_that_does_not_depend_on_the_outer_variable():
    def outer(x):
        inner = gg.grad(lambda y: y**2)(3.0)
        assert type(inner) is float
        return x * inner

    assert gg.grad(outer)(2.0) == 6


def test_inner_argument_is_the_outer_variable(X):
    def outer(x):
        return gg.grad(lambda y: (y**3).sum())(x).sum()

    assert_allclose(gg.grad(outer)(X), 6 * X, rtol=1e-15)
    assert_allclose(gg.grad(lambda x: gg.grad(lambda y: (y**2 * x).sum())(x).sum())(X), 4 * X, rtol=1e-15)


def test_nested_structures(X, Y):
    def inner(p):
        return (p["a"] ** 2 * p["b"]).sum()

    def outer(p):
        g = gg.grad(inner)(p)
        return (g["a"] * g["b"]).sum()

    p = {"a": X, "b": Y}
    # g = (2ab, a^2): sum 2 a^3 b
    g = gg.grad(outer)(p)
    assert_allclose(g["a"], 6 * X**2 * Y, rtol=1e-14)
    assert_allclose(g["b"], 2 * X**3, rtol=1e-14)


def test_value_and_grad_nested(X):
    def outer(x):
        value, g = gg.value_and_grad(lambda y: (y**2).sum())(x)
        return value * g.sum()

    # s = sum x^2, t = sum 2x: d = 2x t + 2 s
    assert_allclose(gg.grad(outer)(X), 2 * X * 6 + 2 * 5, rtol=1e-15)


def test_inside_no_grad(X, Y):
    with gg.no_grad():
        assert_array_equal(gg.grad(product)(X, Y), Y)
        second = gg.grad(gg.grad(lambda x: x**3))(2.0)
        _, pull = gg.vjp(lambda x: x * x, X)
        assert_array_equal(pull(Y)[0], 2 * X * Y)
    assert second == 12


def test_no_grad_inside(X):
    """What is computed inside no_grad is constant."""

    def f(x):
        with gg.no_grad():
            c = x * x
        return (c * x).sum()

    assert_array_equal(gg.grad(f)(X), X**2)


def test_recording_is_restored_after_an_error(X):
    with gg.no_grad():
        with pytest.raises(ZeroDivisionError):
            gg.grad(lambda x: 1 / 0)(X)
        assert not (gg.tensor(X, requires_grad=True) * 2.0).requires_grad


def test_constant_functions(X, Y, device):
    for constant in (3.0, 3, np.float64(3), np.array(3.0), gg.tensor(3.0, device=device)):
        value, g = gg.value_and_grad(lambda x, c=constant: c)(X)
        assert value == 3
        assert isinstance(g, device.ndarray)
        assert_array_equal(g, [0, 0])
    assert gg.grad(lambda x: 3.0)(1.0) == 0
    g = gg.grad(lambda x: 3.0)(gg.tensor(X))
    assert type(g) is Tensor
    assert_array_equal(g, [0, 0])
    assert_array_equal(gg.grad(lambda x, y: y.sum(), argnums=(0, 1))(X, Y)[0], [0, 0])
    assert gg.grad(gg.grad(lambda x: 2.0 * x))(1.0) == 0


def test_zero_gradients_do_not_share_memory(X, Y, device):
    a, b = gg.grad(lambda x, y: 1.0, argnums=(0, 1))(X, Y)
    assert not shares_memory(a, b)
    a[...] = 1
    assert_array_equal(b, [0, 0])


def test_identity(X, Y):
    assert gg.grad(lambda x: x)(2.0) == 1
    out, pull = gg.vjp(lambda x: x, X)
    assert_array_equal(out, X)
    assert_array_equal(pull(Y)[0], Y)


# --- with tensors that require grad ---------------------------------------------------------------------------


def test_captured_leaf_gets_a_gradient():
    """A transform inside a recorded computation is part of it."""
    w = gg.tensor(3.0, requires_grad=True)
    g = gg.grad(lambda x: w * x**2)(2.0)
    assert type(g) is Tensor
    assert g.requires_grad
    g.backward()
    assert w.grad.item() == 4


def test_argument_that_requires_grad(X, device):
    w = gg.tensor([1.0, 2.0], device=device, requires_grad=True)
    g = gg.grad(lambda x: (x**3).sum())(w)
    assert_allclose(g.numpy(), 3 * X**2, rtol=1e-15)
    assert w.grad is None
    g.sum().backward()
    assert_allclose(w.grad, 6 * X, rtol=1e-15)


def test_leaf_made_inside(X, device):
    def f(x):
        inner = gg.tensor([1.0, 1.0], device=device, requires_grad=True)
        (inner * inner * x.detach()).sum().backward()
        return (x * inner.grad).sum()

    assert_array_equal(gg.grad(f)(X), 2 * X)


def test_captured_leaf_under_no_grad_is_constant():
    w = gg.tensor(3.0, requires_grad=True)
    with gg.no_grad():
        g = gg.grad(lambda x: w * x**2)(2.0)
    assert g == 12
    assert w.grad is None


def test_grad_inside_a_tape():
    x = gg.tensor(2.0)
    with gg.Tape() as tape:
        tape.watch(x)
        y = gg.grad(lambda t: t**3)(x)
    assert tape.gradient(y, x).item() == pytest.approx(12)


def test_tape_inside_grad():
    def f(x):
        with gg.Tape() as tape:
            tape.watch(x)
            y = x**3
        return tape.gradient(y, x)

    assert gg.grad(f)(2.0) == pytest.approx(12)


def test_backward_inside_grad():
    def f(x):
        w = gg.tensor(2.0, requires_grad=True)
        (w**2 * x).backward(create_graph=True)
        return w.grad

    assert float(gg.grad(f)(3.0)) == pytest.approx(4)


# --- vjp ----------------------------------------------------------------------------------------------------


def test_vjp(X, Y, device):
    out, pull = gg.vjp(lambda x, y: x * y, X, Y)
    assert isinstance(out, device.ndarray)
    assert_array_equal(out, X * Y)
    for g in (device.put([1.0, 10.0]), gg.tensor([1.0, 10.0], device=device)):
        dx, dy = pull(g)
        assert isinstance(dx, device.ndarray)
        assert_array_equal(dx, [3, 50])
        assert_array_equal(dy, [1, 20])


def test_vjp_of_structures(X, Y, device):
    def f(p):
        return {"sum": (p[0] + p[1]).sum(), "both": (p[0] * p[1], [p[0]]), "nothing": None, "constant": 2.0}

    out, pull = gg.vjp(f, [X, Y])
    assert set(out) == {"sum", "both", "nothing", "constant"}
    assert out["sum"] == 11
    assert out["nothing"] is None
    assert out["constant"] == 2.0
    both = (device.put([1.0, 0.0]), [device.put([0.0, 5.0])])
    (g,) = pull({"sum": 1.0, "both": both, "nothing": None, "constant": 0.0})
    assert isinstance(g, list)
    assert_array_equal(g[0], [1 + 3, 1 + 5])
    assert_array_equal(g[1], [1 + 1, 1])


def test_vjp_errors(X, device):
    _, pull = gg.vjp(lambda x: (x * 2.0, x.sum()), X)
    with pytest.raises(ShapeMismatch, match=r"structure"):
        pull(device.put(np.ones(2)))
    with pytest.raises(ShapeMismatch, match=r"structure"):
        pull([device.put(np.ones(2)), 1.0])
    with pytest.raises(ShapeMismatch, match=r"\(3,\).*\(2,\)"):
        pull((device.put(np.ones(3)), 1.0))
    with pytest.raises(ShapeMismatch):
        pull((device.put(np.ones(2)), device.put(np.ones(1))))
    assert_array_equal(pull((device.put(np.ones(2)), 1.0))[0], [3, 3])


def test_vjp_in_other_threads(X, device):
    _, pull = gg.vjp(lambda x: x * x, X)
    results, ones = [], device.put(np.ones(2))
    threads = [threading.Thread(target=lambda k=k: results.append(pull(k * ones)[0] / k)) for k in range(1, 9)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in results:
        assert_array_equal(r, 2 * X)
    assert len(results) == 8


def test_vjp_differentiated_in_its_cotangent(X, Y, device):
    """The pullback is linear in the cotangent, so its gradient there is the pushforward."""
    _, pull = gg.vjp(lambda x: x**2, X)
    g = gg.grad(lambda c: (pull(c)[0] * Y).sum())(device.put(np.ones(2)))
    assert_array_equal(g, 2 * X * Y)


def test_vjp_of_an_outer_variable(X, Y, device):
    def outer(x):
        out, pull = gg.vjp(lambda y: y * x, Y)
        return (out * pull(device.put(np.ones(2)))[0]).sum()

    # out = y x, pull = x: sum y x^2
    assert_array_equal(gg.grad(outer)(X), 2 * X * Y)


def test_vjp_of_no_arguments():
    out, pull = gg.vjp(lambda: 3.0)
    assert out == 3.0
    assert pull(1.0) == ()


# --- errors -------------------------------------------------------------------------------------------------


def loss_with_a_name(x):
    return x * 2.0


def test_not_a_scalar(X):
    with pytest.raises(ShapeMismatch, match=r"grad of loss_with_a_name: it returned shape \(2,\).*sum"):
        gg.grad(loss_with_a_name)(X)
    with pytest.raises(ShapeMismatch, match=r"\(1,\)"):
        gg.grad(loss_with_a_name)(X[:1])


@pytest.mark.parametrize("result", [None, "text", [1.0], {"a": 1.0}, np.ones(2)])
def test_not_a_number(result, X):
    with pytest.raises(ShapeMismatch, match=f"returned a {type(result).__name__}"):
        gg.grad(lambda x: result)(X)


def test_pair_without_has_aux(X):
    with pytest.raises(ShapeMismatch, match="returned a tuple"):
        gg.grad(lambda x: (x.sum(), 1))(X)


def test_integer_result(X):
    with pytest.raises(NotDifferentiable, match="dtype int64"):
        gg.grad(lambda x: gg.argmax(x))(X)
    with pytest.raises(NotDifferentiable, match="dtype bool"):
        gg.grad(lambda x: (x > 0).all() if hasattr(x, "all") else gg.all(x > 0))(X)


@pytest.mark.parametrize("x", [3, True])
def test_python_integers(x):
    with pytest.raises(NotDifferentiable, match=f"integer {x}; write {float(x)}"):
        gg.grad(lambda x: x * 2.0)(x)


@pytest.mark.parametrize("x", [np.arange(3), np.array(True), np.int32(2), gg.tensor([1, 2])])
def test_integer_arrays(x):
    with pytest.raises(NotDifferentiable, match=r"dtype (int|bool).*cast"):
        gg.grad(lambda x: x.sum())(x)


def test_complex_argument():
    with pytest.raises(NotDifferentiable, match="complex128"):
        gg.grad(lambda x: x.sum())(np.array([1j]))


@pytest.mark.parametrize("x", ["text", object(), {"a": "text"}])
def test_other_arguments(x):
    with pytest.raises(TypeError, match=r"cannot differentiate a (str|object)"):
        gg.grad(lambda x: 1.0)(x)


def test_numpy_function_on_a_tensor_does_not_lose_the_gradient_silently(X):
    """np.exp(t) gives the right gradient or an error, never a constant."""
    try:
        g = gg.grad(lambda x: np.exp(x).sum())(X)
    except TypeError:
        return
    assert_allclose(g, np.exp(X), rtol=1e-15)
