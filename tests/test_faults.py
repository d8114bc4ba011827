"""Planted faults: each law of test_laws, and the golden comparison, catches the op that breaks it."""

import numpy as np
import pytest
import test_laws as laws
from devices import CPU, Place
from test_golden import check_value

import gpugrad as gg
from gpugrad import backend
from gpugrad.declare import case
from gpugrad.op import registry


@pytest.fixture
def plant():
    """Declare ops under temporary names; they leave the registry when the test is over."""
    before = set(registry)

    def declare(kind, name, **record):
        function = getattr(gg, kind)(f"t_{name}", doc="Temporary.", **record)
        return function.op

    yield declare
    for name in set(registry) - before:
        del registry[name]


def caught_by(law, op, device=CPU, errors=(AssertionError, TypeError, ValueError)):
    """Tell whether a law fails on some case of an op."""
    caught = False
    for call in laws.calls_of(op):
        try:
            law(call.on(device))
        except errors:
            caught = True
    return caught


def elementwise(plant, name, forward, partials, domain=((0.3, 2),), **rest):
    return plant("elementwise", name, forward=forward, partials=partials, domain=list(domain), **rest)


PAIR = ((0.3, 2), (0.3, 2))
EVERY = [value for name, value in vars(laws).items() if name.startswith("law_")]


def fits(law, call):
    """Tell whether a law applies to a case, as in the table of test_laws."""
    if law in (laws.law_adjoint, laws.law_linear):
        return call.op.kind in ("linear", "bilinear")
    if law is laws.law_number:
        return call.op.kind == "elementwise" and len(call.shapes) > 1
    return law is not laws.law_mixed_dtypes or len(call.shapes) > 1


def test_a_sound_op_passes_every_law(plant, device):
    """The laws do not cry wolf."""
    sound = [
        elementwise(plant, "cube", lambda xp, x: x * x * x, lambda _y, x: 3 * x * x),
        elementwise(plant, "plus", lambda xp, x, y: x + 2 * y, (1, 2), PAIR),
        elementwise(plant, "times", lambda xp, x, y: x * y, (lambda _z, _x, y: y, lambda _z, x, _y: x), PAIR),
        plant(
            "linear",
            "twice",
            forward=lambda xp, x, *, k: k * x,
            transpose=lambda g, _x, *, k: k * g,
            domain=[case((2, 3), k=2), case((), k=3)],
        ),
        plant(
            "bilinear",
            "dot",
            forward=lambda xp, x, y: (x * y).sum(axis=-1),
            transposes=(
                lambda g, _x, y: g.reshape((*g.shape, 1)) * y,
                lambda g, x, _y: g.reshape((*g.shape, 1)) * x,
            ),
            domain=[case((3,), (3,)), case((2, 3), (2, 3))],
        ),
    ]
    for op in sound:
        assert laws.record_faults(op) == []
        for call in laws.calls_of(op):
            for law in EVERY:
                if fits(law, call):
                    law(call.on(device))
            if device.kind == "stand-in":
                laws.stays_on_the_device(call.on(device))


def test_every_law_is_in_the_table():
    """A law that is written but not run tests nothing, and each has a planted fault here."""
    assert {law for law, _ in laws.LAWS} == set(EVERY)
    planted = {value for name, value in vars(laws).items() if name in PLANTED}
    assert planted == set(EVERY)


def wrong_partial(plant):
    return elementwise(plant, "wrong_partial", lambda xp, x: xp.exp(x), lambda y, _x: 1.001 * y)


def wrong_constant_partial(plant):
    return elementwise(plant, "wrong_constant", lambda xp, x, y: x - y, (1, 1), PAIR)


def partials_swapped(plant):
    return elementwise(
        plant, "swapped", lambda xp, x, y: x * x * y, (lambda _z, x, _y: x * x, lambda _z, x, y: 2 * x * y), PAIR
    )


def hidden_from_the_tape(plant):
    """Right at first order, computed by xp: constant at second."""

    def slope(_y, x):
        array = x.data if isinstance(x, gg.Tensor) else x
        return 3 * array**2 if array is x else gg.asarray(3 * array**2)

    return elementwise(plant, "hidden", lambda xp, x: x**3, slope)


def wrong_transpose(plant):
    return plant(
        "linear",
        "wrong_transpose",
        forward=lambda xp, x: xp.roll(x, 1),
        transpose=lambda g, _x: gg.roll(g, shift=1),
        domain=[case((4,))],
    )


def slightly_wrong_transpose(plant):
    """Below what differences resolve."""
    return plant(
        "linear",
        "nearly",
        forward=lambda xp, x: 2 * x,
        transpose=lambda g, _x: (2 + 1e-9) * g,
        domain=[case((4,))],
    )


def not_linear(plant):
    return plant(
        "linear", "affine", forward=lambda xp, x: 2 * x + 1, transpose=lambda g, _x: 2 * g, domain=[case((3,))]
    )


def ignores_the_cotangent(plant):
    return plant(
        "primitive",
        "ignores",
        forward=lambda xp, x: xp.exp(x),
        vjp=lambda g, y, _x: 0 * g + y,
        domain=[case((3,))],
    )


def one_sided_cotangent(plant):
    """Right for positive cotangents only."""
    return plant(
        "primitive", "absolute", forward=lambda xp, x: 2 * x, vjp=lambda g, _y, _x: 2 * gg.abs(g), domain=[case((3,))]
    )


def gradient_too_small(plant):
    """Loses the axis of length 1 in a way that broadcasting cannot give back."""
    return plant(
        "linear",
        "squashed",
        forward=lambda xp, x: x.reshape(-1),
        transpose=lambda g, _x: g,
        domain=[case((2, 3))],
    )


def half_in_half(plant):
    """Sums in the precision of the argument, one by one."""
    return plant(
        "linear",
        "slow_sum",
        forward=lambda xp, x: (100 * x - 99.9 * x).astype(x.dtype),
        transpose=lambda g, _x: (100 - 99.9) * g,
        domain=[case((50,))],
    )


def widens(plant):
    return elementwise(plant, "widens", lambda xp, x: xp.exp(x) * np.float64(1), lambda y, _x: y)


def widens_with_a_number(plant):
    return elementwise(
        plant,
        "widens_number",
        lambda xp, x, y: xp.asarray(x) * xp.asarray(y),
        (lambda _z, _x, y: y, lambda _z, x, _y: x),
        PAIR,
    )


def narrows(plant):
    return elementwise(
        plant, "narrows", lambda xp, x, y: (x + y).astype(x.dtype if hasattr(x, "dtype") else "float32"), (1, 1), PAIR
    )


def writes_into_its_argument(plant):
    def forward(xp, x):
        if isinstance(x, np.ndarray) and x.ndim:
            x *= 1.5
            return x / 1.5 * 2
        return 2 * x

    return elementwise(plant, "writes", forward, 2)


def rule_writes_into_the_cotangent(plant):
    def rule(g, _x):
        if isinstance(g, np.ndarray):
            g *= 2
            return g
        return 2 * g

    return plant("linear", "rule_writes", forward=lambda xp, x: 2 * x, transpose=rule, domain=[case((3,))])


def returns_its_argument(plant):
    return elementwise(plant, "same", lambda xp, x: x, 1)


def returns_a_view(plant):
    return elementwise(plant, "view", lambda xp, x: x[...] if isinstance(x, np.ndarray) else x, 1)


def boxes_plain_arrays(plant):
    return elementwise(plant, "boxes", lambda xp, x: gg.asarray(2 * x), 2)


def keeps_too_much(plant):
    """The record says nothing is needed, the node keeps the argument."""
    op = elementwise(plant, "keeps", lambda xp, x: xp.exp(x) + x, lambda y, x: y - x + 1)
    op.needs = ((0,),)
    return op


def depends_on_who_asks(plant):
    """The rule in x reads y, and the record says it needs nothing: y is there only if the rule in y asked for it."""
    op = elementwise(
        plant,
        "who_asks",
        lambda xp, x, y, *, k=1.0: k * x * y,
        (lambda _z, _x, y, *, k: k if y is None else k * y, lambda _z, x, _y, *, k: k * x),
        PAIR,
    )
    op.needs = ((), (1, 2))
    return op


def wrong_only_when_plain(plant):
    """The cheaper first-order path has another slope than the recorded one."""
    return elementwise(
        plant,
        "residual",
        lambda xp, x: xp.exp(x),
        lambda y, _x: y,
        residual=(lambda xp, x: (xp.exp(x), 1.01 * xp.exp(x)), (lambda _y, _x, slope: slope,)),
    )


def reads_memory_order(plant):
    def forward(xp, x):
        return x * xp.arange(1.0, x.size + 1).reshape(x.shape) if x.flags.c_contiguous else x

    return plant(
        "linear",
        "order",
        forward=forward,
        transpose=lambda g, _x: g * np.arange(1.0, 7.0).reshape(2, 3),
        domain=[case((2, 3))],
    )


def keeps_the_argument_itself(plant):
    """An intermediate that is the caller's own memory."""
    return elementwise(
        plant,
        "intermediate",
        lambda xp, x: x * x,
        lambda _y, x: 2 * x,
        residual=(lambda xp, x: (x * x, x), (lambda _y, _x, kept: 2 * kept,)),
    )


PLANTED = {
    "law_gradient": [wrong_partial, wrong_constant_partial, partials_swapped, hidden_from_the_tape, wrong_transpose],
    "law_adjoint": [wrong_transpose, slightly_wrong_transpose],
    "law_linear": [not_linear],
    "law_cotangent": [ignores_the_cotangent, one_sided_cotangent],
    "law_shape": [gradient_too_small],
    "law_dtype": [half_in_half, widens],
    "law_mixed_dtypes": [narrows],
    "law_inputs_unmutated": [writes_into_its_argument, rule_writes_into_the_cotangent],
    "law_changed_in_place": [keeps_the_argument_itself],
    "law_no_alias": [returns_its_argument, returns_a_view],
    "law_plain": [boxes_plain_arrays],
    "law_kept": [keeps_too_much],
    "law_alone": [depends_on_who_asks],
    "law_recorded": [wrong_only_when_plain],
    "law_layout": [reads_memory_order],
    "law_number": [widens_with_a_number],
}


@pytest.mark.parametrize(
    ("law", "fault"),
    [(getattr(laws, law), fault) for law, faults in PLANTED.items() for fault in faults],
    ids=[f"{law[4:]}-{fault.__name__}" for law, faults in PLANTED.items() for fault in faults],
)
def test_fault_is_caught(law, fault, plant):
    op = fault(plant)
    assert caught_by(law, op), f"{law.__name__} lets {op.name} pass"


# --- on a device --------------------------------------------------------------------------------------------------


def host_array_in_forward(plant):
    return elementwise(plant, "host_forward", lambda xp, x: x * np.full(x.shape, 2.0), 2)


def host_array_in_a_rule(plant):
    """The forward stays there; the backward brings an array of the host's."""
    return elementwise(plant, "host_rule", lambda xp, x: 2 * x, lambda _y, x: np.full(x.shape, 2.0))


def host_scalar_array_in_a_rule(plant):
    """On the CPU an array of no axes goes for a number; CuPy refuses it."""
    return elementwise(plant, "host_scalar", lambda xp, x: 2 * x, lambda _y, x: 0 * x + np.asarray(2.0))


def index_from_the_host(plant):
    """CuPy takes an index array of the host's without a word, and uploads it each time."""
    return plant(
        "linear",
        "host_index",
        forward=lambda xp, x: x[np.array([1, 0])],
        transpose=lambda g, _x: gg.take(g, backend.asarray([1, 0], where=backend.device_of(getattr(g, "_data", g)))),
        domain=[case((2,))],
    )


def computed_on_the_host(plant):
    """There, back again and right: NumPy does the work."""

    def forward(xp, x):
        where = backend.device_of(x)
        return backend.to_device(np.exp(backend.to_device(x, backend.CPU)), where)

    return elementwise(plant, "roundabout", forward, lambda y, _x: y)


def float_in_forward(plant):
    """Picks a formula by looking at the values."""

    def forward(xp, x):
        return xp.exp(x) if x.size and float(abs(x).max()) < 100 else 1 / xp.exp(-x)

    return elementwise(plant, "looks", forward, lambda y, _x: y)


def truth_of_an_array_in_backward(plant):
    def slope(y, x):
        array = getattr(x, "_data", x)
        return y if array.size and (array < 100).all() else 1 * y

    return elementwise(plant, "truth", lambda xp, x: xp.exp(x), slope)


def item_in_backward(plant):
    def rule(g, y, _x):
        total = getattr(y, "_data", y).sum().item()
        return g * y + 0 * total

    return plant("primitive", "item", forward=lambda xp, x: xp.exp(x), vjp=rule, domain=[case((3,))])


def mask_in_backward(plant):
    """Right, and waits to learn how many elements the mask takes."""

    def rule(g, x):
        array = getattr(x, "_data", x)
        zeros = backend.namespace(array).zeros_like(array)
        zeros[array < 0] = (0 * array)[array < 0]
        return 2 * g + zeros

    return plant("linear", "masked", forward=lambda xp, x: 2 * x, transpose=rule, domain=[case((4,))])


SLIPPED_IN = [host_array_in_forward, host_array_in_a_rule, host_scalar_array_in_a_rule]
HIDDEN = [
    index_from_the_host, computed_on_the_host, float_in_forward, truth_of_an_array_in_backward, item_in_backward,
    mask_in_backward,
]  # fmt: skip


@pytest.mark.parametrize("fault", SLIPPED_IN)
def test_host_array_on_a_device_is_caught(fault, plant, stand_in):
    """Nothing shows on the CPU; the stand-in refuses it, as CuPy does."""
    op = fault(plant)
    assert not caught_by(laws.law_gradient, op)
    assert caught_by(laws.law_gradient, op, Place("stand-in", stand_in), TypeError)


@pytest.mark.parametrize("fault", HIDDEN)
def test_hidden_wait_or_transfer_is_caught(fault, plant, stand_in):
    """Right on every device, and slow: only the stand-in's counters show it."""
    op, place = fault(plant), Place("stand-in", stand_in)
    assert not caught_by(laws.law_gradient, op)
    assert not caught_by(laws.law_gradient, op, place)
    assert caught_by(laws.stays_on_the_device, op, place, AssertionError)


def test_wrong_forward_with_a_matching_rule_passes_the_gradient_law_and_not_the_golden_line(plant):
    """What golden values are for."""
    wrong = elementwise(plant, "softplus", lambda xp, x: xp.log1p(xp.exp(2 * x)) / 2, lambda _y, x: gg.sigmoid(2 * x))
    for call in laws.calls_of(wrong):
        laws.law_gradient(call)
    check_value("softplus", gg.softplus, ("softplus", [0.5], 0.9740769841801067))
    with pytest.raises(AssertionError):
        check_value("softplus", wrong.function, ("softplus", [0.5], 0.9740769841801067))


@pytest.mark.parametrize("factor", [1 + 1e-14, 1 - 1e-14])
def test_golden_line_sees_the_last_digits(factor):
    with pytest.raises(AssertionError):
        check_value("exp", lambda x: gg.exp(x) * factor, ("exp", [1.3], 3.6692966676192444))


def test_golden_line_sees_a_wrong_shape():
    with pytest.raises(AssertionError):
        check_value("exp", lambda x: gg.exp(x).reshape((1,)), ("exp", [1.3], 3.6692966676192444))


# --- the record itself ------------------------------------------------------------------------------------------


def test_incomplete_records_are_refused_or_reported(plant):
    with pytest.raises(ValueError, match="no doc"):
        gg.elementwise("t_x", forward=lambda xp, x: x + 0, partials=1, domain=[(0, 1)], doc="")
    with pytest.raises(ValueError, match="say why"):
        gg.nondiff("t_x", forward=lambda xp, x: x > 0, reason="", doc="Positive.")
    with pytest.raises(ValueError, match="intervals in domain"):
        gg.elementwise("t_x", forward=lambda xp, x: x + 0, partials=1, domain=[], doc="Same.")
    with pytest.raises(ValueError, match="2 rules for 1 array"):
        gg.elementwise("t_x", forward=lambda xp, x: x + 0, partials=(1, 1), domain=[(0, 1)], doc="Same.")
    with pytest.raises(ValueError, match="declared twice"):
        gg.elementwise("exp", forward=lambda xp, x: x + 0, partials=1, domain=[(0, 1)], doc="Same.")
    assert "t_x" not in registry
    bare = plant("linear", "bare", forward=lambda xp, x: 2 * x, transpose=lambda g, _x: 2 * g, domain=[])
    assert laws.record_faults(bare) == ["t_bare has no domain"]
    blank = gg.nondiff("t_blank", forward=lambda xp, x: x > 0, reason=" ", doc=" ").op
    assert laws.record_faults(blank) == ["t_blank has no doc", "t_blank is nondiff without a reason"]


def test_op_declared_outside_is_recorded_like_any_other(plant):
    op = elementwise(plant, "mine", lambda xp, x, *, k=2.0: k * xp.sin(x), lambda _y, x, *, k: k * gg.cos(x))
    x = gg.tensor([0.5, 1.0], requires_grad=True)
    op.function(x, k=3.0).sum().backward()
    np.testing.assert_allclose(x.grad, 3 * np.cos([0.5, 1.0]), rtol=1e-15)
    np.testing.assert_allclose(op.function(np.array([0.5])), 2 * np.sin([0.5]), rtol=1e-15)
