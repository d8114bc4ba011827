"""check_grads tells right derivatives from wrong ones."""

import inspect
import re

import numpy as np
import pytest
from devices import test_device_is_there as test_device_is_there

import gpugrad as gg
from gpugrad.op import registry


@pytest.fixture
def declare():
    """Declare temporary elementwise ops; they leave the registry afterwards."""
    before = set(registry)

    def op(forward, partial, name="t_op"):
        return gg.elementwise(name, forward=forward, partials=partial, domain=[(0.5, 2)], doc="Temporary.")

    yield op
    for name in set(registry) - before:
        del registry[name]


X = np.array([0.6, 1.1, 1.7])


def test_right_rules_pass(device):
    gg.check_grads(lambda x: gg.exp(x) * gg.sin(x), [device.put(X)], order=3)
    gg.check_grads(lambda x, y: x @ y, [device.put(np.ones((2, 3))), device.put(np.ones((3, 2)))])


@pytest.mark.parametrize("kind", [lambda x: x, gg.tensor, lambda x: {"a": [x]}], ids=["array", "tensor", "pytree"])
def test_arguments_of_every_kind(kind, device):
    def f(x):
        x = x["a"][0] if isinstance(x, dict) else x
        return {"both": (gg.sin(x), x.sum())}

    gg.check_grads(f, [kind(device.put(X))])


def test_floats():
    gg.check_grads(lambda x, y: x * gg.exp(y), [0.5, 1.5], order=3)


def test_wrong_slope_is_found(declare, device):
    wrong = declare(lambda xp, x: xp.exp(x), lambda y, _x: 1.001 * y)
    with pytest.raises(AssertionError, match=r"order 1 is .* differences give .*error"):
        gg.check_grads(wrong, [device.put(X)])


def test_slope_that_cannot_be_differentiated_is_found_at_order_two(declare, device):
    """First order is right; the rule hides from the tape how it depends on x."""
    wrong = declare(lambda xp, x: x**3, lambda _y, x: 3 * (x.detach() if hasattr(x, "detach") else x) ** 2)
    gg.check_grads(wrong, [device.put(X)], order=1)
    with pytest.raises(AssertionError, match="order 2"):
        gg.check_grads(wrong, [device.put(X)], order=2)


def test_sign_and_missing_term(declare):
    with pytest.raises(AssertionError, match="order 1"):
        gg.check_grads(declare(lambda xp, x: xp.cos(x), lambda _y, x: gg.sin(x), "t_sign"), [X])
    with pytest.raises(AssertionError, match="order 1"):
        gg.check_grads(declare(lambda xp, x: x * xp.exp(x), lambda y, _x: y, "t_term"), [X])


def test_one_wrong_element_of_many(declare):
    """A random cotangent reaches every element."""
    wrong = declare(lambda xp, x: xp.exp(x), lambda y, _x: gg.where(np.arange(50) == 31, 0.9 * y, y))
    with pytest.raises(AssertionError):
        gg.check_grads(wrong, [np.linspace(0.5, 2, 50)], order=1)


def test_nan_is_found(declare, device):
    wrong = declare(lambda xp, x: xp.exp(x), lambda y, _x: y * np.nan)
    with pytest.raises(AssertionError):
        gg.check_grads(wrong, [device.put(X)], order=1)


def test_rule_that_ignores_the_cotangent():
    from gpugrad.declare import case

    try:
        wrong = gg.linear(
            "t_ignores",
            forward=lambda xp, x: 2 * x,
            transpose=lambda g, _x: 0 * g + 2.0,
            domain=[case((3,))],
            doc="Twice.",
        )
        with pytest.raises(AssertionError):
            gg.check_grads(wrong, [X], order=1)
    finally:
        registry.pop("t_ignores", None)


def test_message_names_the_function(declare):
    def my_loss(x):
        return wrong(x).sum()

    wrong = declare(lambda xp, x: xp.exp(x), lambda y, _x: 2 * y)
    with pytest.raises(AssertionError, match=r"^my_loss: derivative of order 1"):
        gg.check_grads(my_loss, [X])


def test_single_precision(declare, device):
    x = device.put(X, np.float32)
    gg.check_grads(lambda x: gg.exp(x).sum(), [x], order=1)
    wrong = declare(lambda xp, x: xp.exp(x), lambda y, _x: 1.3 * y)
    with pytest.raises(AssertionError):
        gg.check_grads(wrong, [x], order=1)


def test_tolerances():
    f = gg.exp
    with pytest.raises(AssertionError):
        gg.check_grads(f, [X], rtol=1e-18, atol=0.0)
    gg.check_grads(f, [X], rtol=1e-6)


def test_same_seed_same_check(declare):
    wrong = declare(lambda xp, x: xp.exp(x), lambda y, _x: 1.1 * y)
    messages = []
    for seed in (0, 0, 1):
        with pytest.raises(AssertionError) as caught:
            gg.check_grads(wrong, [X], seed=seed)
        messages.append(re.sub(r"0x\w+", "", str(caught.value)))
    assert messages[0] == messages[1] != messages[2]


def test_unknown_mode():
    with pytest.raises(ValueError, match="modes"):
        gg.check_grads(gg.exp, [X], modes=("sideways",))


def test_arguments_are_not_changed():
    x = X.copy()
    gg.check_grads(gg.exp, [x])
    assert np.array_equal(x, X)


def test_defaults():
    parameters = inspect.signature(gg.check_grads).parameters
    assert parameters["order"].default == 2
    assert parameters["rtol"].default is None
