"""Laws that every op must keep, drawn from the registry: a new op is tested by having been declared.

A law is a function of one case (an op, a way to call it, a device to do so on), and raises AssertionError. Every law
holds on every device. `test_faults` gives the same laws ops with planted faults.
"""

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from devices import CPU, Place, assert_allclose, assert_array_equal, host, problem, shares_memory
from devices import test_device_is_there as test_device_is_there

import gpugrad as gg
from gpugrad import backend
from gpugrad.errors import NotDifferentiable
from gpugrad.op import Op, registry
from gpugrad.tensor import Tensor

HALF, SINGLE, DOUBLE = np.dtype("float16"), np.dtype("float32"), np.dtype("float64")

# Positions of arguments that are conditions: their dtype is not the result's.
CONDITIONS = {"where": (0,), "selected": (1,)}


@dataclass
class Call:
    """One way to call an op: shapes and domains of its arrays, its static parameters, and where."""

    op: Op
    shapes: tuple[Any, ...]
    intervals: tuple[tuple[float, float], ...]
    params: dict[str, Any]
    through: Any = None
    device: Place = CPU

    def on(self, device: Place) -> "Call":
        """The same call on another device, with the arrays among its parameters there."""
        if device.on_cpu:
            return self
        here = backend.Device(device)
        params = {k: here if isinstance(v, backend.Device) else _placed(v, device) for k, v in self.params.items()}
        return dataclasses.replace(self, params=params, device=device)

    @property
    def id(self) -> str:
        shown = ",".join(str(s).replace(" ", "") for s in self.shapes)
        extra = "".join(f"-{k}={v}" for k, v in self.params.items())
        return f"{self.op.name}{shown}{extra}".replace(" ", "").replace("\n", "")[:90]

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(f"{self.op.name}{self.shapes}".encode()))

    def draw(self, rng, dtype=DOUBLE, *, domain=True):
        """Random arrays strictly inside the domain."""
        arrays = []
        for shape, (low, high) in zip(self.shapes, self.intervals, strict=True):
            margin = 0.05 * (high - low)
            array = np.asarray(rng.uniform(low + margin, high - margin, size=shape)).astype(dtype)
            if domain and self.through is not None:
                array = np.asarray(self.through(array)).astype(dtype)
            arrays.append(self.device.put(array))
        return arrays

    def cotangents(self, result, rng):
        """Random arrays of the shapes and dtypes of the outputs."""
        return tuple(self.device.put(rng.normal(size=o.shape), o.dtype) for o in outputs_of(result))

    def __call__(self, *arrays):
        return self.op.function(arrays, **self.params) if self.op.variadic else self.op.function(*arrays, **self.params)

    def from_anywhere(self, *arrays):
        """The call as a function of any arrays: `through` brings them into the domain, differentiably."""
        return self(*arrays) if self.through is None else self(*map(self.through, arrays))


def calls_of(op: Op) -> list[Call]:
    if op.kind != "elementwise":
        return [Call(op, c.shapes, ((c.low, c.high),) * len(c.shapes), dict(c.params), c.through) for c in op.domain]
    n = len(op.domain)
    shapes = [[s] * n for s in ((), (0,), (3,), (2, 3))]
    if n > 1:
        shapes += [[(2, 3)] + [(3,)] * (n - 1), [(3, 1)] + [(1, 2)] * (n - 1), [()] + [(4,)] * (n - 1)]
        shapes += [[(4,)] * (n - 1) + [()], [(1, 2, 1)] + [(3, 1, 4)] * (n - 1), [(0, 3)] + [(3,)] * (n - 1)]
        shapes += [[(0, 3)] + [(1, 3)] * (n - 1)]
    return [Call(op, tuple(s), tuple(op.domain), {}) for s in shapes]


def _placed(parameter: Any, device: Place) -> Any:
    if isinstance(parameter, tuple):
        return tuple(_placed(part, device) for part in parameter)
    return device.put(parameter) if isinstance(parameter, np.ndarray) else parameter


def outputs_of(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def pullback(call, arrays):
    """(outputs, function from a tuple of cotangents to the gradients of all arrays)."""
    out, pull = gg.vjp(lambda *a: outputs_of(call(*a)), *arrays)
    return out, pull


def inner(xs, ys) -> float:
    pairs = zip(xs, ys, strict=True)
    return sum(float(np.sum(np.asarray(host(x), float) * np.asarray(host(y), float))) for x, y in pairs)


def largest(array: Any) -> float:
    return np.max(np.abs(host(array)), initial=0)


def size_of(arrays: Any) -> list[Any]:
    return [np.abs(host(a)) for a in arrays]


# --- the laws -------------------------------------------------------------------------------------------


def law_gradient(call):
    """First and second derivatives agree with central differences, along random directions and cotangents."""
    gg.check_grads(call.from_anywhere, call.draw(call.rng(), domain=False), order=2, rtol=1e-6)


def law_adjoint(call):
    """<A x, g> = <x, A^T g> to rounding, which differences cannot see; for bilinear ops in each place."""
    rng = call.rng()
    arrays = call.draw(rng)
    out, pull = pullback(call, arrays)
    g = call.cotangents(out, rng)
    gradients = pull(g)
    forward = inner(out, g)
    size = max(inner(size_of(out), size_of(g)), 1e-300)
    if call.op.kind == "linear":
        assert_allclose(inner(arrays, gradients), forward, rtol=0, atol=1e-13 * size)
    else:
        for x, gx in zip(arrays, gradients, strict=True):
            assert_allclose(inner([x], [gx]), forward, rtol=0, atol=1e-13 * size)


def law_linear(call):
    """A(a x + b y) = a A(x) + b A(y), for linear ops in all arguments, for bilinear ones in each."""
    rng = call.rng()
    xs, ys = call.draw(rng), call.draw(rng)
    together = call.op.kind == "linear"
    for k in [None] if together else range(len(xs)):
        moved = [y if k in (None, i) else x for i, (x, y) in enumerate(zip(xs, ys, strict=True))]
        mixed = [1.5 * x - 0.75 * y if k in (None, i) else x for i, (x, y) in enumerate(zip(xs, ys, strict=True))]
        assert_allclose(call(*mixed), 1.5 * call(*xs) - 0.75 * call(*moved), rtol=1e-13, atol=1e-13)


def law_cotangent(call):
    """The pullback is linear in the cotangent: a rule that ignores it is caught."""
    rng = call.rng()
    arrays = call.draw(rng)
    out, pull = pullback(call, arrays)
    g, h = call.cotangents(out, rng), call.cotangents(out, rng)
    mixed = pull(tuple(1.5 * a - 0.75 * b for a, b in zip(g, h, strict=True)))
    for got, a, b in zip(mixed, pull(g), pull(h), strict=True):
        scale = 1 + largest(a) + largest(b)
        assert_allclose(got, 1.5 * a - 0.75 * b, rtol=0, atol=1e-13 * scale)
    for zero in pull(tuple(0 * a for a in g)):
        assert not np.any(host(zero))


def law_shape(call):
    """The gradient has its input's shape, dtype and kind: array for array, Tensor for Tensor, float for float."""
    rng = call.rng()
    for dtype in (DOUBLE, SINGLE, HALF):
        arrays = call.draw(rng, dtype)
        out, pull = pullback(call, arrays)
        for x, g in zip(arrays, pull(call.cotangents(out, rng)), strict=True):
            assert isinstance(g, type(x))
            assert (g.shape, g.dtype) == (x.shape, x.dtype)
        tensors = [gg.tensor(x) for x in arrays]
        out, pull = pullback(call, tensors)
        assert all(type(o) is Tensor for o in out)
        for x, g in zip(arrays, pull(tuple(map(gg.tensor, call.cotangents(out, rng)))), strict=True):
            assert type(g) is Tensor
            assert (g.shape, g.dtype) == (x.shape, x.dtype)
    if call.op.kind == "elementwise" and call.device.on_cpu and all(s == () for s in call.shapes):
        numbers = [float(x) for x in call.draw(rng)]
        _, pull = gg.vjp(call, *numbers)
        assert all(type(g) is float for g in pull(1.0))


def law_dtype(call):
    """Values and gradients in float32 and float16 keep their dtype and are near those of float64 from the same inputs.

    Bounds: elementwise 8 eps (|y| + sum |x dy/dx|), and for slopes 16 eps of the same for g * slope; the others 200 eps
    of the largest element (their conditioning is that of the well-conditioned cases).
    """
    for dtype in (SINGLE, HALF):
        rng = call.rng()
        low = call.draw(rng, dtype)
        high = [x.astype(DOUBLE) for x in low]
        eps = float(np.finfo(dtype).eps)
        got, pull = pullback(call, low)
        want, exact_pull = pullback(call, high)
        g = tuple(c.astype(o.dtype) for c, o in zip(call.cotangents(want, rng), got, strict=True))
        gradients, exact = pull(g), exact_pull(tuple(c.astype(DOUBLE) for c in g))
        expected = np.dtype(call.params.get("dtype", dtype))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == expected
            near(a, b, high, exact, g, eps, elementwise=call.op.kind == "elementwise")
        for a, b in zip(gradients, exact, strict=True):
            assert a.dtype == dtype
            near(a, b, high, exact, g, 2 * eps, elementwise=call.op.kind == "elementwise")


def near(got, want, inputs, gradients, g, eps, *, elementwise):
    want = np.asarray(host(want))
    if not want.size:
        return
    scale = np.max(np.abs(want))
    if elementwise:
        scale += max(map(largest, inputs)) * max(map(largest, gradients))
    assert_allclose(
        np.asarray(host(got), DOUBLE), want, rtol=0, atol=(8 if elementwise else 200) * eps * (scale + 0.01)
    )


def law_mixed_dtypes(call):
    """float32 with float64 computes in float64, and each gradient comes back in its own input's dtype."""
    rng = call.rng()
    for first in (SINGLE, DOUBLE):
        dtypes = [(SINGLE, DOUBLE)[(i + (first == DOUBLE)) % 2] for i in range(len(call.shapes))]
        arrays = [x.astype(d) for x, d in zip(call.draw(rng), dtypes, strict=True)]
        out, pull = pullback(call, arrays)
        assert all(o.dtype == DOUBLE for o in out) or call.op.name in ("where", "selected")
        g = call.cotangents(out, rng)
        _, exact = pullback(call, [x.astype(DOUBLE) for x in arrays])
        for x, a, b in zip(arrays, pull(g), exact(tuple(c.astype(DOUBLE) for c in g)), strict=True):
            assert (a.dtype, a.shape) == (x.dtype, x.shape)
            assert_allclose(a, b, rtol=0, atol=1e-6 * (1 + largest(b)))


def law_inputs_unmutated(call):
    """Forward, reverse and recorded sweeps leave arguments and cotangents as they were, and take read-only ones."""
    rng = call.rng()
    arrays = call.draw(rng)
    before = [x.copy() for x in arrays]
    result = call(*arrays)
    g = call.cotangents(result, rng)
    g_before = [c.copy() for c in g]

    def both(*a):
        pulled = pullback(call, a)[1](g)
        tensors = [gg.tensor(x, requires_grad=True) for x in a]
        total = sum((o * c).sum() for o, c in zip(outputs_of(call(*tensors)), g, strict=True))
        total.backward(create_graph=True)
        return pulled

    both(*arrays)
    for x, was in zip([*arrays, *g], before + g_before, strict=True):
        assert_array_equal(x, was)
    # a cotangent on its way through the graph belongs to others too
    zeros = tuple(0 * c for c in g)
    _, pull = gg.vjp(lambda zs, *a: tuple(o + z for o, z in zip(outputs_of(call(*a)), zs, strict=True)), zeros, *arrays)
    for passed, c in zip(pull(g)[0], g, strict=True):
        assert_array_equal(passed, c)
    if call.device.on_cpu:  # CuPy has no read-only arrays
        for x in [*arrays, *g]:
            x.flags.writeable = False
        both(*arrays)
        call(*arrays)


def law_changed_in_place(call):
    """Arguments overwritten between forward and reverse do not change the gradients."""
    rng = call.rng()
    arrays = call.draw(rng)
    out, pull = pullback(call, arrays)
    g = call.cotangents(out, rng)
    wanted = pull(g)
    shared = [x.copy() for x in arrays]
    tensors = [gg.asarray(x) for x in shared]
    with gg.Tape() as tape:
        tape.watch(tensors)
        total = sum((o * c).sum() for o, c in zip(outputs_of(call(*tensors)), g, strict=True))
    for x in shared:
        x[...] = 0.123
    for got, expected in zip(tape.gradient(total, tensors), wanted, strict=True):
        assert_allclose(got, expected, rtol=0, atol=1e-12 * (1 + largest(expected)))


def law_no_alias(call):
    """What an elementwise op returns is memory of its own, and so is every gradient of any op."""
    rng = call.rng()
    arrays = call.draw(rng)
    if call.op.kind == "elementwise":
        tensors = [gg.asarray(x) for x in arrays]
        for result in (call(*arrays), call(*tensors)._data):
            assert not any(shares_memory(result, x) for x in arrays)
    out, pull = pullback(call, arrays)
    g = call.cotangents(out, rng)
    gradients = pull(g)
    for i, gradient in enumerate(gradients):
        others = [*arrays, *g, *out, *gradients[:i], *gradients[i + 1 :]]
        assert not any(shares_memory(gradient, x) for x in others)
        if gradient.ndim and call.device.on_cpu:
            assert gradient.flags.writeable


def law_plain(call):
    """Given plain arrays an op returns plain arrays; given a Tensor anywhere, Tensors with the same values."""
    arrays = call.draw(call.rng())
    plain = call(*arrays)
    for part in outputs_of(plain):
        assert isinstance(part, call.device.array_types)
    for k in range(len(arrays)):
        mixed = [gg.asarray(x) if i == k else x for i, x in enumerate(arrays)]
        for part, same in zip(outputs_of(call(*mixed)), outputs_of(plain), strict=True):
            assert type(part) is Tensor
            assert not part.requires_grad
            assert_array_equal(part, same)


def law_kept(call):
    """A node keeps the arrays its rules name, and no others."""
    arrays = call.draw(call.rng())
    tensors = [gg.tensor(x, requires_grad=True) for x in arrays]
    result = outputs_of(call(*tensors))[0]
    node = result._node
    if call.op.outputs > 1:
        (node,) = node.parents
    needs = call.op.needs
    named = {k for need in needs for k in need}
    for k, saved in enumerate(node.saved[: len(arrays) + 1]):
        kept = any(map(backend.is_array, saved if type(saved) is tuple else [saved]))
        assert not kept or k in named or (k > 0 and -1 in named) or call.op.residual


def law_alone(call):
    """The gradient in one argument is the same whether or not the others require grad."""
    rng = call.rng()
    arrays = call.draw(rng)
    out, pull = pullback(call, arrays)
    g = call.cotangents(out, rng)
    together = pull(g)
    for k, wanted in enumerate(together):
        _, one = gg.vjp(lambda x, k=k: outputs_of(call(*arrays[:k], x, *arrays[k + 1 :])), arrays[k])
        if call.device.on_cpu:
            assert_array_equal(one(g)[0], wanted)
        else:  # another kernel may add up in another order
            assert_allclose(one(g)[0], wanted, rtol=0, atol=1e-13 * (1 + largest(wanted)))


def law_recorded(call):
    """The recorded sweep (create_graph) gives the numbers of the plain one."""
    rng = call.rng()
    arrays = call.draw(rng)
    g = call.cotangents(call(*arrays), rng)
    grads = []
    for create in (False, True):
        tensors = [gg.tensor(x, requires_grad=True) for x in arrays]
        total = sum((o * c).sum() for o, c in zip(outputs_of(call(*tensors)), g, strict=True))
        total.backward(create_graph=create)
        grads.append([host(0.0 * x if t.grad is None else t.grad) for x, t in zip(arrays, tensors, strict=True)])
    for plain, recorded in zip(*grads, strict=True):
        assert plain.shape == recorded.shape
        assert plain.dtype == recorded.dtype
        assert_allclose(plain, recorded, rtol=0, atol=1e-12 * (1 + largest(plain)))


def law_layout(call):
    """Values and gradients do not depend on the layout of the arguments in memory."""
    rng = call.rng()
    arrays = call.draw(rng)
    out, pull = pullback(call, arrays)
    g = call.cotangents(out, rng)
    gradients = pull(g)
    for layout in (reversed_in_memory, every_second, by_columns):
        laid = [layout(x) for x in arrays]
        _, other_pull = pullback(call, [gg.asarray(x) for x in laid])  # given as arrays, they would be copied
        other = [t.numpy() for t in other_pull(tuple(layout(c) for c in g))]
        for a, b in zip([*out, *gradients], [*outputs_of(call(*laid)), *other], strict=True):
            assert a.shape == b.shape
            assert_allclose(a, b, rtol=0, atol=1e-12 * (1 + largest(a)))


def reversed_in_memory(x):
    every = (slice(None, None, -1),) * x.ndim
    return x[every].copy()[every] if x.ndim else x


def by_columns(x):
    return x.copy(order="F")


def every_second(x):
    if not x.ndim:
        return x
    wide = backend.namespace(x).full((*x.shape[:-1], 2 * x.shape[-1]), np.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def law_number(call):
    """A Python number in the place of an array gives its values, and does not widen float32."""
    rng = call.rng()
    arrays = call.draw(rng)
    for k in range(len(arrays)):
        number = float(np.float32(rng.uniform(*call.intervals[k])))
        arguments = [number if i == k else x.astype(SINGLE) for i, x in enumerate(arrays)]
        number_there = call.device.put(np.full(arrays[k].shape, number), SINGLE)
        same = [number_there if i == k else x for i, x in enumerate(arguments)]
        rest = [i for i in range(len(arrays)) if i != k]
        result = call(*arguments)
        if all(i in CONDITIONS.get(call.op.name, ()) for i in rest):
            continue  # a condition's dtype says nothing about the result's
        assert result.dtype == SINGLE
        tensors = [gg.tensor(x, requires_grad=True) if i in rest else x for i, x in enumerate(arguments)]
        twins = [gg.tensor(x, requires_grad=True) if i in rest else x for i, x in enumerate(same)]
        first, second = call(*tensors), call(*twins)
        assert first.dtype == SINGLE
        first.sum().backward()
        second.sum().backward()
        if first.shape == second.shape:
            assert_allclose(first.numpy(), second.numpy(), rtol=1e-6, atol=1e-6)
            for i in rest:
                if twins[i].grad is not None:
                    assert tensors[i].grad.dtype == SINGLE
                    scale = 1 + largest(twins[i].grad)
                    assert_allclose(tensors[i].grad, twins[i].grad, rtol=0, atol=1e-6 * scale)


# --- drawn from the registry ------------------------------------------------------------------------------

DIFFERENTIABLE = [op for op in registry.values() if op.kind != "nondiff"]
CALLS = [call for op in DIFFERENTIABLE for call in calls_of(op)]

ALL = [law_gradient, law_cotangent, law_shape, law_dtype, law_inputs_unmutated, law_no_alias, law_plain, law_kept]
ALL += [law_alone, law_recorded, law_layout, law_changed_in_place]
LAWS = [(law, call) for law in ALL for call in CALLS]
LAWS += [(law, call) for law in (law_adjoint, law_linear) for call in CALLS if call.op.kind in ("linear", "bilinear")]
LAWS += [(law_mixed_dtypes, call) for call in CALLS if len(call.shapes) > 1]
LAWS += [(law_number, call) for call in CALLS if call.op.kind == "elementwise" and len(call.shapes) > 1]


@pytest.mark.parametrize(("law", "call"), LAWS, ids=[f"{law.__name__[4:]}-{call.id}" for law, call in LAWS])
def test_law(law, call, device):
    law(call.on(device))


# --- on the device alone: counted by the stand-in -----------------------------------------------------------------

# What may wait for the device, or send something to it, within an op and its rules; and why.
WAITS = {
    "getitem": "how many elements a mask takes decides the shape of the result",
    "pinv": "CuPy's own counts the small singular values that it clears",
}
UPLOADS = {
    "einsum": "the positions of a diagonal, where one operand has a subscript twice",
    "diagonal": "the positions of the diagonal, for its transpose",
}


def stays_on_the_device(call):
    """Forward, reverse and recorded sweeps neither wait for the device nor send anything there or back."""
    rng = call.rng()
    arrays = call.draw(rng)
    g = call.cotangents(call(*arrays), rng)

    def sweep(create):
        tensors = [gg.tensor(x, requires_grad=True) for x in arrays]
        results = outputs_of(call(*tensors))
        sum((o * c).sum() for o, c in zip(results, g, strict=True)).backward(create_graph=create)

    for work in (lambda: call(*arrays), lambda: sweep(False), lambda: sweep(True)):
        with call.device.cupy.counting() as count:
            work()
        if call.op.name not in WAITS:
            assert count.syncs == 0
            assert count.bytes_to_host == 0
        if call.op.name not in UPLOADS:
            assert count.bytes_to_device == 0


ON_THE_STAND_IN = [] if problem("stand-in") else CALLS  # no case at all is one skip


@pytest.mark.parametrize("call", ON_THE_STAND_IN, ids=[call.id for call in ON_THE_STAND_IN])
def test_stays_on_the_device(call, stand_in):
    stays_on_the_device(call.on(Place("stand-in", stand_in)))


@pytest.mark.parametrize("call", ON_THE_STAND_IN, ids=[call.id for call in ON_THE_STAND_IN])
def test_law_on_a_device_that_is_not_current(call, stand_in):
    """CuPy computes on the current device, not on the arrays' own: every op and every sweep goes there first."""
    there = call.on(Place("stand-in", stand_in, number=1))
    for law in (law_plain, law_shape, law_alone, law_recorded):
        law(there)
    assert stand_in.cuda.Device().id == 0


@pytest.mark.parametrize(("name", "counter"), [(n, "syncs") for n in WAITS] + [(n, "bytes_to_device") for n in UPLOADS])
def test_exceptions_are_needed(name, counter, stand_in):
    """What is excused above really does it: an entry that is not needed would hide a fault."""
    place, total = Place("stand-in", stand_in), 0
    for call in (call.on(place) for call in CALLS if call.op.name == name):
        arrays = call.draw(call.rng())
        with stand_in.counting() as count:
            sum(o.sum() for o in outputs_of(call(*[gg.tensor(x, requires_grad=True) for x in arrays]))).backward()
        total += getattr(count, counter)
    assert total > 0


def record_faults(op):
    """What is missing in an op's record, apart from its formulas."""
    faults = []
    if not op.doc or not op.doc.strip():
        faults.append(f"{op.name} has no doc")
    if op.kind == "nondiff":
        if not op.reason.strip():
            faults.append(f"{op.name} is nondiff without a reason")
    elif not op.domain:
        faults.append(f"{op.name} has no domain")
    if op.kind not in ("elementwise", "linear", "bilinear", "primitive", "nondiff"):
        faults.append(f"{op.name} is of unknown kind {op.kind}")
    return faults


@pytest.mark.parametrize("op", registry.values(), ids=registry)
def test_record_is_complete(op):
    assert record_faults(op) == []
    assert op.function.__name__ == op.name
    assert op.function.__doc__ == op.doc


def test_ids_are_unique():
    """Two cases with one id would hide one from whoever selects by it."""
    ids = [call.id for call in CALLS]
    assert sorted(set(ids)) == sorted(ids)


# --- what is kept: a few by name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "kept"),
    [
        ("add", 2, set()),
        ("subtract", 2, set()),
        ("negative", 1, set()),
        ("sum", 1, set()),
        ("reshape", 1, set()),
        ("exp", 1, {0}),
        ("sqrt", 1, {0}),
        ("tan", 1, {0}),
        ("log", 1, {1}),
        ("softplus", 1, {1}),
        ("relu", 1, {0}),
        ("multiply", 2, {1, 2}),
        ("divide", 2, {0, 2}),
        ("softmax", 1, {0}),
        ("inv", 1, {0}),
    ],
)
def test_what_is_kept(name, arguments, kept):
    call = next(c for c in CALLS if c.op.name == name and all(np.prod(s, dtype=int) > 1 for s in c.shapes))
    result = call(*[gg.tensor(x, requires_grad=True) for x in call.draw(call.rng())])
    saved = result._node.saved
    assert len(saved) == arguments + 1
    assert {k for k, value in enumerate(saved) if isinstance(value, np.ndarray)} == kept


def test_factor_of_a_constant_is_not_kept():
    """x * c with c constant needs c for the slope in x, and nothing else."""
    x, c = gg.tensor([1.0, 2.0], requires_grad=True), np.array([3.0, 4.0])
    output, first, second = (x * c)._node.saved
    assert output is None
    assert first is None
    assert_array_equal(second, c)


# --- ops that have no derivative ------------------------------------------------------------------------------


NONDIFF = {name: op for name, op in registry.items() if op.kind == "nondiff"}


@pytest.mark.parametrize("name", NONDIFF)
def test_nondiff_results_carry_no_gradient(name):
    """Indices and truths are values off the tape; asking them for a gradient says so."""
    op = NONDIFF[name]
    boolean = name.startswith("logical") or name in ("all", "any")
    data = np.array([True, False, True]) if boolean else np.array([0.5, -1.0, 2.0])
    x = gg.tensor(data, requires_grad=not boolean)
    result = op.function(x, x) if len(op.vjps) == 2 else op.function(x)
    assert type(result) is Tensor
    assert not result.requires_grad
    assert result.dtype.kind in "bi"
    with pytest.raises(NotDifferentiable):
        result.backward()


@pytest.fixture
def temporary_op():
    """Declare ops that leave the registry when the test is over."""
    before = set(registry)
    yield
    for name in set(registry) - before:
        del registry[name]


def test_nondiff_with_float_result_raises(temporary_op):
    nearest = gg.nondiff("t_nearest", forward=lambda xp, x: xp.round(x), reason="it is a staircase", doc="Rounded.")
    x = gg.tensor([0.4, 1.7], requires_grad=True)
    y = nearest(x)
    assert_array_equal(y.numpy(), [0.0, 2.0])
    with pytest.raises(NotDifferentiable, match=r"t_nearest.*it is a staircase"):
        y.sum().backward()
    with pytest.raises(NotDifferentiable, match=r"t_nearest.*it is a staircase"):
        gg.grad(lambda x: nearest(x).sum())(np.array([0.4, 1.7]))
    assert_array_equal((nearest(x.detach()) * x).sum().item(), 3.4)
