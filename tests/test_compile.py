"""Captured functions give what they give eagerly: every op, transforms around and within, and what capture refuses."""

import dataclasses
import functools
import threading
import warnings
from typing import Any

import numpy as np
import optree
import pytest
from test_laws import Call, calls_of, outputs_of

import gpugrad as gg
from gpugrad import errors, threads
from gpugrad.compile import cpu_code, function
from gpugrad.compile import executable as executable_module
from gpugrad.compile.capture import capture
from gpugrad.compile.fuse import Call as OpStep
from gpugrad.compile.fuse import Fuser, Kernel, View
from gpugrad.compile.program import Value, simplified
from gpugrad.op import registry

TOLERANCE = {"float16": 4e-3, "float32": 5e-6, "float64": 1e-12}
JIT = cpu_code.available()


@pytest.fixture(params=["compiled", "blocks"])
def executor(request: Any, monkeypatch: Any) -> str:
    """Run a test with the loops that numba compiles, and with those on NumPy."""
    if request.param == "compiled" and JIT is not None:
        pytest.skip(f"no compiled loops: {JIT}")
    if request.param == "blocks":
        monkeypatch.setattr(cpu_code, "available", lambda: "switched off for this test")
    return str(request.param)


def close(got: Any, want: Any, dtype: Any = None, factor: float = 1.0) -> None:
    """The same structure, kinds, shapes and dtypes; the same numbers within rounding, relative to the largest."""
    gots, structure = optree.tree_flatten(got)
    wants, expected = optree.tree_flatten(want)
    assert structure == expected
    for a, b in zip(gots, wants, strict=True):
        assert (type(a) is gg.Tensor) == (type(b) is gg.Tensor)
        assert (type(a) is float) == (type(b) is float)
        a, b = (np.asarray(x.numpy() if type(x) is gg.Tensor else x) for x in (a, b))
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if b.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
            continue
        tolerance = factor * TOLERANCE[str(np.dtype(dtype or b.dtype))]
        wide = b.astype(float)
        largest = np.max(np.abs(wide[np.isfinite(wide)]), initial=0.0)
        np.testing.assert_allclose(a.astype(float), wide, rtol=tolerance, atol=tolerance * max(largest, 1e-300))


# --------------------------------------------------------------------------------------------------- every op

CALLS = [call for op in registry.values() for call in calls_of(op)]
# Each op once with every dtype through the compiler, which takes its time for each; every other way on NumPy.
ONE_EACH = [calls_of(op)[min(3, len(calls_of(op)) - 1)] for op in registry.values() if calls_of(op)]


def law_captured(call: Call, dtype: Any) -> None:
    """Value and cotangents of an op are the same captured and eager."""
    rng = call.rng()
    arrays = tuple(call.draw(rng, dtype))

    def forward(*x: Any) -> Any:
        return outputs_of(call(*x))

    try:
        want = forward(*arrays)
    except (TypeError, np.linalg.LinAlgError) as error:
        pytest.skip(f"not for {np.dtype(dtype)}: {error}")
    close(gg.compile(forward)(*arrays), want, dtype)
    if call.op.kind == "nondiff" or any(np.asarray(w).dtype.kind != "f" for w in want):
        return
    cotangents = call.cotangents(want, rng)

    def backward(x: Any, g: Any) -> Any:
        return gg.vjp(forward, *x)[1](g)

    close(gg.compile(backward)(arrays, cotangents), backward(arrays, cotangents), dtype, factor=20)


@pytest.mark.parametrize("call", CALLS, ids=[c.id for c in CALLS])
def test_every_op_on_numpy(call: Call, monkeypatch: Any) -> None:
    monkeypatch.setattr(cpu_code, "available", lambda: "switched off for this test")
    for dtype in (np.float64, np.float32, np.float16):
        law_captured(call, dtype)


@pytest.mark.skipif(JIT is not None, reason=f"no compiled loops: {JIT}")
@pytest.mark.parametrize("call", ONE_EACH, ids=[c.id for c in ONE_EACH])
def test_every_op_compiled(call: Call) -> None:
    for dtype in (np.float64, np.float32):
        law_captured(call, dtype)


@pytest.mark.slow
@pytest.mark.skipif(JIT is not None, reason=f"no compiled loops: {JIT}")
@pytest.mark.parametrize("call", CALLS, ids=[c.id for c in CALLS])
def test_every_op_compiled_in_every_way(call: Call) -> None:
    for dtype in (np.float64, np.float32, np.float16):
        law_captured(call, dtype)


def test_the_law_catches_a_wrong_program(monkeypatch: Any) -> None:
    """A planted fault: an operation that the fuser reads as another."""
    from gpugrad.compile import fuse

    right = fuse.evaluate_formula

    def wrong(forward: Any, args: Any, params: Any) -> Any:
        return right(registry["cos"].forward if forward is registry["sin"].forward else forward, args, params)

    monkeypatch.setattr(fuse, "evaluate_formula", wrong)
    with pytest.raises(AssertionError):
        law_captured(calls_of(registry["sin"])[3], np.float64)


# --------------------------------------------------------------------------------------------- programs and transforms


def least_squares(w: Any, X: Any, y: Any) -> Any:
    return gg.mean((X @ w - y) ** 2)


def mlp_loss(params: Any, X: Any, y: Any) -> Any:
    return gg.mean((gg.nn.mlp(params, X)[:, 0] - y) ** 2)


def everything(p: Any, x: Any) -> Any:
    """Reductions over some axes, broadcasts, views, products, branches: what fusion has to sort out."""
    a = gg.exp(-x * p["s"]) + p["row"]
    b = gg.where(a > 1, a, 0.5 * a) - gg.max(a, axis=1, keepdims=True)
    c = gg.sum(b * gg.sin(a), axis=0) + gg.mean(b, axis=0)
    d = (b.T @ a) @ gg.softmax(c)
    e = gg.concat([d, c])[::2] * gg.reshape(p["row"], (-1, 1))[:2].sum(axis=0)
    return gg.sum(e**2) + gg.logsumexp(b) + gg.prod(gg.tanh(c)) + gg.std(a)


@pytest.fixture
def data(rng: np.random.Generator) -> Any:
    X = rng.normal(size=(300, 4))
    return X, X @ np.array([1.0, -2.0, 0.5, 3.0]) + rng.normal(size=300)


def test_values_and_gradients(executor: str, data: Any, rng: np.random.Generator) -> None:
    X, y = data
    w = rng.normal(size=4)
    both = gg.value_and_grad(least_squares)
    close(gg.compile(both)(w, X, y), both(w, X, y))
    params = gg.nn.init_mlp((4, 8, 8, 1))
    both = gg.value_and_grad(mlp_loss)
    single = X.astype(np.float32), y.astype(np.float32)
    close(gg.compile(both)(params, *single), both(params, *single))
    p = {"s": rng.uniform(0.5, 1, size=(3,)), "row": rng.normal(size=3)}
    x = rng.normal(size=(5, 3))
    both = gg.value_and_grad(everything)
    close(gg.compile(both)(p, x), both(p, x), factor=100)


def test_second_order_within(executor: str, data: Any, rng: np.random.Generator) -> None:
    X, y = data
    w, v = rng.normal(size=4), rng.normal(size=4)

    def hvp(w: Any, v: Any, X: Any, y: Any) -> Any:
        return gg.grad(lambda u: gg.sum(gg.grad(least_squares)(u, X, y) * v))(w)

    close(gg.compile(hvp)(w, v, X, y), hvp(w, v, X, y))
    cube = gg.grad(gg.grad(gg.grad(lambda x: gg.sin(x) * x * x)))
    close(gg.compile(cube)(1.3), cube(1.3))


def test_gradients_of_a_compiled_function(executor: str, data: Any, rng: np.random.Generator) -> None:
    X, y = data
    w = rng.normal(size=4)
    compiled = gg.compile(least_squares)
    close(gg.grad(compiled)(w, X, y), gg.grad(least_squares)(w, X, y))
    close(gg.grad(compiled, argnums=(0, 1))(w, X, y), gg.grad(least_squares, argnums=(0, 1))(w, X, y))
    f = gg.compile(lambda x: gg.sin(x) * x)
    eager = lambda x: gg.sin(x) * x  # noqa: E731  # the same, uncompiled
    close(gg.grad(gg.grad(f))(1.0), gg.grad(gg.grad(eager))(1.0))
    close(gg.grad(gg.grad(gg.grad(f)))(1.0), gg.grad(gg.grad(gg.grad(eager)))(1.0))
    leaf = gg.tensor(w, requires_grad=True)
    compiled(leaf, X, y).backward()
    close(leaf.grad.numpy(), gg.grad(least_squares)(w, X, y))
    with gg.Tape() as tape:
        t = gg.tensor(w)
        tape.watch(t)
        out = compiled(t, X, y)
    close(tape.gradient(out, t).numpy(), gg.grad(least_squares)(w, X, y))


def test_static_objects_of_gradients_count_by_what_is_in_them() -> None:
    @dataclasses.dataclass(frozen=True)
    class Setting:
        scale: Any

    f = gg.compile(lambda x, s: gg.sum(x * s.scale))
    for scale in (2, 2.0, np.float64(3)):  # the first two are equal and are not the same
        x = gg.tensor(np.ones(2, np.float32), requires_grad=True)
        f(x, Setting(scale)).backward()
        close(x.grad.numpy(), np.full(2, scale, np.float32))


def test_several_outputs_on_the_tape(rng: np.random.Generator) -> None:
    def pair(x: Any, n: int) -> Any:
        return {"sum": gg.sum(x) * n, "sign": x > 0, "square": x**2}

    x = gg.tensor(rng.normal(size=3), requires_grad=True)
    out = gg.compile(pair)(x, 3)
    assert not out["sign"].requires_grad
    out["square"].sum().backward()
    close(x.grad.numpy(), 2 * x.numpy())


def test_kinds_come_back_as_they_went(rng: np.random.Generator) -> None:
    x = rng.normal(size=3)
    for fun, args in (
        (lambda a: a * 2, (x,)),
        (lambda a: a * 2, (gg.tensor(x),)),
        (gg.grad(lambda a: a * a), (2.0,)),
        (gg.grad(lambda a: gg.sum(a * a)), (gg.tensor(x),)),
        (lambda a, n, flag: (a**n if flag else a, {"n": n}), (x, 3, True)),
        (lambda a, lr: a - lr * a, (x.astype(np.float32), 0.1)),
        (lambda a: (a, a, 2.0, None), (x,)),
        (gg.value_and_grad(lambda a: (gg.sum(a * a), {"aux": a + 1}), has_aux=True), (x,)),
    ):
        close(gg.compile(fun)(*args), fun(*args))


def test_a_python_number_stays_weak() -> None:
    x = np.ones(3, np.float32)
    assert gg.compile(lambda x, lr: x * lr)(x, 0.5).dtype == np.float32
    assert gg.compile(lambda x, lr: x * lr)(x, np.float64(0.5)).dtype == np.float64


def test_results_are_the_callers_own(rng: np.random.Generator) -> None:
    x = rng.normal(size=100_000)
    double = gg.compile(lambda x: (x * 2, x))
    first, same = double(x)
    assert same is not x
    assert not np.shares_memory(same, x)
    kept = first.copy()
    second, _ = double(x + 1)
    np.testing.assert_array_equal(first, kept)
    address = second.__array_interface__["data"][0]
    view = second[10:]
    del second
    third, _ = double(x)
    assert third.__array_interface__["data"][0] != address, "a view of it is still in use"
    del view, third, _
    again, _ = double(x)
    addresses = {address, kept.__array_interface__["data"][0]}
    assert again.__array_interface__["data"][0] in addresses or again.flags.owndata
    first[:] = 0  # the caller may write to what he got


def test_memory_of_dropped_results_is_used_again(rng: np.random.Generator) -> None:
    x = rng.normal(size=1_000_000)
    double = gg.compile(lambda x: x * 2)
    seen = set()
    for _ in range(5):
        result = double(x)
        seen.add(result.__array_interface__["data"][0])
        del result
    assert len(seen) <= 2  # a worker may hold on to the first one a little longer


# ------------------------------------------------------------------------------------------------- signatures


def test_captured_once_a_signature(rng: np.random.Generator) -> None:
    calls = []

    def fun(x: Any, n: int) -> Any:
        calls.append(x.shape)
        return x * n

    f = gg.compile(fun)
    for _ in range(3):
        f(np.ones(3), 2)
    assert len(calls) == 1
    for args in ((np.ones(4), 2), (np.ones(3, np.float32), 2), (np.ones(3), 5), (gg.tensor(np.ones(3)), 2)):
        f(*args)
    assert len(calls) == 5
    close(f(np.ones(3), 5), np.full(3, 5.0))
    with pytest.raises(TypeError, match="hashable"):
        f(np.ones(3), [object(), {1, 2}])


def test_static_objects_count_by_what_is_in_them() -> None:
    @dataclasses.dataclass(frozen=True)
    class Setting:
        scale: Any

    f = gg.compile(lambda x, s: x * s.scale)
    x = np.arange(3)
    close(f(x, Setting(2)), x * 2)
    close(f(x, Setting(2.0)), x * 2.0)

    class Model:
        scale = 1.0

        @gg.compile
        def apply(self, x: Any) -> Any:
            return x * self.scale

    model = Model()
    close(model.apply(np.ones(2)), np.ones(2))
    model.scale = 5.0
    close(model.apply(np.ones(2)), np.full(2, 5.0))


def test_numbers_are_no_new_kernels(executor: str) -> None:
    f = gg.compile(lambda x, n: gg.sum(x / n) * 0.37)
    for n in (7.5, 11, 13):
        close(f(np.ones(5), n), np.float64(5 / n * 0.37))
    from gpugrad.compile.executable import _with_numbers

    keys = []
    for n in (300, 301):
        program, _ = steps_of(gg.value_and_grad(least_squares), np.ones(3), np.ones((n, 3)), np.ones(n))
        opened, numbers = _with_numbers(program)
        assert numbers
        keys.append([s.loop.key() for s in Fuser(opened).steps if isinstance(s, Kernel)])
    assert keys[0] == keys[1]


def test_much_code_is_many_small_loops(executor: str) -> None:
    def long(x: Any) -> Any:
        for _ in range(150):
            x = gg.sin(x) + 0.1 * x
        return gg.sum(x)

    x = np.linspace(0.1, 1, 20)
    close(gg.compile(gg.value_and_grad(long))(x), gg.value_and_grad(long)(x), factor=100)


def test_a_refusal_that_is_swallowed_holds() -> None:
    def careful(x: Any) -> Any:
        try:
            return x if x > 0 else -x
        except Exception:
            return -x

    with pytest.raises(errors.CaptureError, match="a value is read"):
        gg.compile(careful)(2.0)


def test_captured_tensors_can_be_shown() -> None:
    shown = []
    gg.compile(lambda x: (shown.append(repr(x)), x)[1])(np.ones((2, 3)))
    assert shown == ["Tensor(captured, shape=(2, 3), dtype=float64)"]
    assert repr(gg.compile(least_squares)) == "gpugrad.compile(least_squares)"


def test_many_shapes_warn_and_the_cache_is_bounded() -> None:
    f = gg.compile(lambda x: x + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(1, 9):
            f(np.ones(n))
    with pytest.warns(errors.CaptureWarning, match="captured for 9 signatures"):
        f(np.ones(9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        for n in range(10, 90):
            close(f(np.ones(n)), np.full(n, 2.0))
    assert len(f._entries) == function.SIGNATURES


def test_reading_a_value_names_line_and_remedy() -> None:
    def branch(x: Any) -> Any:
        if x > 0:
            return x
        return -x

    with pytest.raises(errors.CaptureError, match=r"test_compile\.py:\d+: a value is read .*gpugrad\.where"):
        gg.compile(branch)(2.0)
    for read in (float, int, bool, lambda x: x.item(), lambda x: x.numpy(), np.asarray, lambda x: f"{x:.2f}", range):
        with pytest.raises((errors.CaptureError, TypeError)):
            gg.compile(lambda x, read=read: x * float(read(x) is None))(np.float64(2.0))
    with pytest.raises(errors.CaptureError, match="grad"):
        gg.compile(lambda x: (x * x).backward())(gg.tensor(1.0))
    with pytest.raises(TypeError) as caught:
        gg.compile(np.exp)(np.ones(3))
    assert any("use gpugrad's functions" in note for note in caught.value.__notes__)


def test_a_tracked_tensor_from_outside_is_refused() -> None:
    w = gg.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(errors.CaptureError, match="as an argument"):
        gg.compile(lambda x: gg.sum(x * w))(np.ones(2))


def test_errors_are_those_of_the_op() -> None:
    with pytest.raises(errors.ShapeMismatch, match="add"):
        gg.compile(lambda x, y: x + y)(np.ones(2), np.ones(3))
    with pytest.raises(errors.ShapeMismatch, match="matmul"):
        gg.compile(lambda x, y: x @ y)(np.ones((2, 3)), np.ones(2))
    with pytest.raises(errors.NotDifferentiable):
        gg.compile(gg.grad(lambda x: gg.sum(x)))(np.ones(3, int))
    with pytest.raises(TypeError, match="expected a function"):
        gg.compile(3)  # type: ignore[arg-type]
    f = gg.compile(lambda x: x * 2)
    with pytest.raises(errors.CaptureError, match="has not been captured yet"):
        f.show()


def test_nan_and_infinity_are_where_they_are_eagerly(executor: str) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e300, -1e300, 1e-320, 2.0])

    def fun(x: Any) -> Any:
        return gg.swish(x), gg.log(x), gg.softplus(x), gg.where(x > 0, gg.sqrt(x), 0.0), gg.maximum(x, 1.0), gg.relu(x)

    with np.errstate(all="ignore"):
        close(gg.compile(fun)(x), fun(x))
        for loss in (
            lambda x: gg.sum(gg.where(x > 0, gg.sqrt(x), 0.0)),
            lambda x: gg.sum(gg.relu(x)),
            lambda x: gg.sum(gg.swish(x)),
        ):
            close(gg.compile(gg.grad(loss))(x), gg.grad(loss)(x))


def test_threads_may_share_a_compiled_function(executor: str, data: Any, rng: np.random.Generator) -> None:
    X, y = data
    f = gg.compile(gg.value_and_grad(least_squares))
    ws = [rng.normal(size=4) for _ in range(4)]
    want = [gg.value_and_grad(least_squares)(w, X, y) for w in ws]
    wrong: list[Any] = []

    def work(k: int) -> None:
        for _ in range(30):
            value, g = f(ws[k], X, y)
            if abs(value - want[k][0]) > 1e-9 or not np.allclose(g, want[k][1], rtol=1e-9):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_compiled_method_and_wrapping() -> None:
    class Model:
        scale = 3.0

        @gg.compile
        def apply(self, x: Any) -> Any:
            """Documented."""
            return x * 3.0

    assert Model.apply.__doc__ == "Documented."
    close(Model().apply(np.ones(2)), np.full(2, 3.0))
    f = gg.compile(lambda x: x)
    assert gg.compile(f) is f


def test_arguments_of_any_layout(executor: str, rng: np.random.Generator) -> None:
    X = rng.normal(size=(6, 5))
    w = rng.normal(size=5)
    fun = gg.value_and_grad(lambda w, X: gg.sum(gg.tanh(X @ w) + gg.sum(X * w, axis=1)))
    f = gg.compile(fun)
    for given in (
        X,
        np.asfortranarray(X),
        rng.normal(size=(12, 10))[::2, ::2],
        X[::-1],
        X.astype(">f8").astype(X.dtype.newbyteorder(">")),
    ):
        close(f(w, given), fun(w, np.asarray(given, dtype=float)))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (), (1, 1), (1,)])
def test_empty_and_single(executor: str, shape: Any) -> None:
    x = np.ones(shape)
    fun = gg.value_and_grad(lambda x: gg.sum(gg.exp(x) * 2 + 1))
    close(gg.compile(fun)(x), fun(x))


def test_an_op_of_ones_own(executor: str) -> None:
    name = "test_compile_cube"
    if name not in registry:
        gg.elementwise(
            name, forward=lambda xp, x: x * x * x, partials=lambda _y, x: 3 * x * x, domain=[(-2, 2)], doc="Cube."
        )
        gg.elementwise(
            name + "_opaque", forward=lambda xp, x: xp.i0(x), partials=lambda _y, x: x * 0, domain=[(-2, 2)], doc="I0."
        )
    try:
        x = np.linspace(-1, 1, 7)
        for op in (registry[name], registry[name + "_opaque"]):
            fun = lambda x, op=op: op.function(x) + 1  # noqa: E731
            close(gg.compile(fun)(x), fun(x))
    finally:
        del registry[name], registry[name + "_opaque"]


# --------------------------------------------------------------------------------------------------- what is made


def steps_of(fun: Any, *args: Any) -> tuple[Any, list[Any]]:
    leaves, structure = optree.tree_flatten((args, {}))
    given = [(Value(np.shape(a), np.asarray(a).dtype), "array") for a in leaves]
    program = simplified(capture(fun, given, structure, gg.get_device(), "fun").program)
    return program, Fuser(program).steps


def kinds(steps: list[Any]) -> list[str]:
    return ["loop" if isinstance(s, Kernel) else s.equation.op.name for s in steps if not isinstance(s, View)]


def test_a_chain_is_one_loop() -> None:
    x = np.ones(50)
    _, steps = steps_of(lambda x: gg.sum(gg.exp(gg.sin(x) * 2) + x), x)
    assert kinds(steps) == ["loop"]
    assert not steps[0].outputs
    assert len(steps[0].sums) == 1
    _, steps = steps_of(gg.value_and_grad(lambda x: gg.sum(gg.exp(gg.sin(x) * 2) + x)), x)
    assert kinds(steps) == ["loop"], "forward, backward and the sum over the same elements"


def test_dead_and_common_code_goes() -> None:
    x = np.ones(5)

    def fun(x: Any) -> Any:
        unused = gg.exp(x) @ x  # noqa: F841
        return gg.sin(x) + gg.sin(x) * 1 + (2.0 * 3.0)

    program, steps = steps_of(fun, x)
    names = [eq.op.name for eq in program.equations]
    assert names.count("sin") == 1
    assert "matmul" not in names
    assert kinds(steps) == ["loop"]


def test_least_squares_is_two_products_and_a_loop() -> None:
    X, y, w = np.ones((50, 3)), np.ones(50), np.ones(3)
    _, steps = steps_of(gg.value_and_grad(least_squares), w, X, y)
    assert kinds(steps) == ["matmul", "loop", "matmul", "loop"]


def test_buffers_are_used_again() -> None:
    from gpugrad.compile.plan import plan

    def deep(x: Any) -> Any:
        for _ in range(10):
            x = gg.tanh(x @ x)
        return x

    program, steps = steps_of(deep, np.ones((20, 20)))
    made = plan(steps, program.inputs, program.outputs)
    assert len(made.buffers) <= 3
    lives: dict[int, Any] = {}
    for k, step in enumerate(steps):  # nothing is read after its memory has gone to something else
        for value in step.inputs:
            if value in made.place:
                assert lives[made.place[value]] is value, k
        for value in step.outputs:
            if value in made.place:
                lives[made.place[value]] = value


def test_show_tells_operations_loops_buffers_and_bytes(capsys: Any) -> None:
    f = gg.compile(gg.value_and_grad(least_squares))
    f(np.ones(3), np.ones((50, 3)), np.ones(50))
    f.show()
    text = capsys.readouterr().out
    for part in ("matmul(in1, in0)", "loop 1 x 50", "sum over all of", "buffer", "moved"):
        assert part in text
    X = np.ones((200_000, 32), np.float32)
    f.show(np.ones(32, np.float32), X, np.ones(200_000, np.float32))
    text = capsys.readouterr().out
    assert ("one pass over 200,000 rows" if JIT is None else "loop 1 x 200000") in text


def test_small_products_hold_blas_to_one_thread(monkeypatch: Any) -> None:
    entered = []
    real = threads.single_threaded_blas.__enter__
    monkeypatch.setattr(threads.single_threaded_blas, "__enter__", lambda self: (entered.append(1), real(self))[1])
    gg.compile(lambda x: x @ x)(np.ones((100, 100)))
    assert entered
    assert executable_module.SMALL_FLOPS > 0


def test_partials_and_functools() -> None:
    f = gg.compile(functools.partial(lambda a, x: a * x, 3.0))
    close(f(np.ones(2)), np.full(2, 3.0))
    assert OpStep is not View


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint64])
def test_numbers_that_an_integer_dtype_does_not_hold(dtype: Any, executor: str) -> None:
    x = gg.tensor(np.array([0, 5, 100], dtype))

    def compare(x: Any) -> Any:
        return x > -1000, x < 1000, x == 2**63, gg.where(x < 300, 1.0, 2.0)

    close(gg.compile(compare)(x), compare(x))
    if dtype is not np.uint64:
        with pytest.raises(OverflowError):
            gg.compile(lambda x: x + 1000)(x)
    close(gg.compile(lambda x: abs(-x))(x), abs(-x))


def test_axes_of_length_1_in_front_come_and_go(executor: str, rng: np.random.Generator) -> None:
    def back_and_forth(x: Any) -> Any:
        return (x.reshape((3,)) * 2 + 1).reshape((3, 1)) * x, (x.reshape((3,)) + 1).reshape((1, 1, 3)) * 2

    x = gg.tensor(rng.normal(size=(1, 3)))
    close(gg.compile(back_and_forth)(x), back_and_forth(x))

    def spread(x: Any, y: Any) -> Any:
        return gg.exp(x * y), gg.exp(x * y).sum(axis=2)

    given = gg.tensor(rng.normal(size=(1, 2, 1, 3))), gg.tensor(rng.normal(size=(1, 1, 4, 1)))
    close(gg.compile(spread)(*given), spread(*given))


def test_an_array_that_the_function_fills_anew(rng: np.random.Generator) -> None:
    def scratch(x: Any) -> Any:
        mask, total = np.zeros(3), 0.0
        for k in range(3):
            mask[:] = 0
            mask[k] = k + 1
            total = total + (x * mask).sum() * (k + 1)
        return total

    x = gg.tensor(rng.normal(size=(2, 3)))
    close(gg.compile(scratch)(x), scratch(x))


def test_a_constant_changed_before_the_reverse_sweep(rng: np.random.Generator) -> None:
    fun = gg.compile(lambda x, a: (x * x * a).sum())
    for wrapped in (np.asarray, gg.asarray):
        x, a = gg.tensor(np.ones(3), requires_grad=True), np.ones(3)
        out = fun(x, wrapped(a))
        a[:] = 5.0
        out.backward()
        close(x.grad, gg.tensor(np.full(3, 2.0)))


def test_results_on_the_tape_that_depend_on_the_shape() -> None:
    def fun(x: Any) -> Any:
        return (x.sum(), x * 2) if x.shape[0] > 3 else (x.sum(), gg.astype(x, dtype="int32"), np.ones(2), x * 3)

    compiled = gg.compile(fun)
    for n in (2, 5, 2):
        x = gg.tensor(np.arange(1.0, n + 1), requires_grad=True)
        got = compiled(x)
        assert [type(r) for r in got] == [type(r) for r in fun(x)]
        got[-1].sum().backward()
        close(x.grad, gg.tensor(np.full(n, 2.0 if n > 3 else 3.0)))
