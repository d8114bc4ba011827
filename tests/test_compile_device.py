"""Captured functions and losses on a GPU: the numbers of eager mode, few launches, no wait, memory that nobody shares.

What a device computes is checked on the stand-in and, marked `gpu`, on a card. Launches, waits, streams and graphs are
counted on the stand-in alone; each of these checks is shown a fault that it must catch.
"""

import gc
import itertools
import threading
import warnings
import weakref
from typing import Any

import numpy as np
import optree
import pytest
from cuda_proof.stand_in import Race
from devices import Place, assert_allclose, assert_array_equal, host, shares_memory
from devices import test_device_is_there as test_device_is_there
from test_laws import HALF, NONDIFF, SINGLE, WAITS, Call, calls_of, pullback

import gpugrad as gg
from gpugrad import backend, optim
from gpugrad.compile import cuda, cuda_code
from gpugrad.compile.cuda import Instance
from gpugrad.errors import CaptureWarning, DeviceMemoryWarning
from gpugrad.op import registry


@pytest.fixture
def gpu(every_device: Place) -> Place:
    """The stand-in, or a card."""
    return every_device


def leaves(tree: Any) -> list[Any]:
    return optree.tree_leaves(tree)


def same(got: Any, want: Any, eps: float = 2.0**-23, units: float = 64) -> None:
    """Compare trees: kinds, shapes, dtypes, and numbers within rounding of the largest."""
    assert optree.tree_structure(got) == optree.tree_structure(want)
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert type(a) is type(b)
        if not isinstance(b, float):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(host(v), dtype=float) for v in (a, b))
        size = 1 + np.max(np.abs(b[np.isfinite(b)]), initial=0)
        assert_allclose(a, b, rtol=0, atol=units * eps * size)


def rerun(function: Any, *args: Any) -> list[Any]:
    """Capture a function, run it three times (the last may be a graph), and compare each with eager mode."""
    want = function(*args)
    compiled = gg.compile(function)
    got = [compiled(*args) for _ in range(3)]
    for result in got:
        same(result, want)
    return got


# ------------------------------------------------------------------------------------------------------- every op


def some_calls(op: Any) -> list[Call]:
    """A few calls of an op: of an elementwise one, one that broadcasts, since the formula is the same in all."""
    calls = calls_of(op)
    return calls if op.kind != "elementwise" else [calls[5] if len(op.domain) > 1 else calls[3]]


OPS = [op for op in registry.values() if op.kind != "nondiff"]


def both_ways(call: Call, dtype: Any) -> None:
    """Values and gradients of an op, captured as one program, against eager mode."""
    rng = call.rng()
    arrays = call.draw(rng, dtype)
    g = call.cotangents(call(*arrays), rng)

    def forward_and_back(g: Any, *a: Any) -> Any:
        out, pull = pullback(call, a)
        return out, pull(g)

    want = forward_and_back(g, *arrays)
    compiled = gg.compile(forward_and_back)
    eps = float(np.finfo(dtype).eps)
    same(compiled(g, *arrays), want, eps)
    if call.device.kind == "stand-in":
        with call.device.cupy.counting() as count:
            same_again = compiled(g, *arrays)
        if call.op.name not in WAITS:
            assert (count.syncs, count.bytes_to_host) == (0, 0)
        assert count.bytes_to_device == 0
        same(same_again, want, eps)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op(op: Any, gpu: Place) -> None:
    for call in some_calls(op):
        both_ways(call.on(gpu), SINGLE)


@pytest.mark.parametrize("name", ["swish", "matmul", "softmax", "sum", "einsum", "squared_error", "divide", "softplus"])
def test_half_precision(name: str, gpu: Place) -> None:
    for call in some_calls(registry[name]):
        both_ways(call.on(gpu), HALF)


@pytest.mark.parametrize("name", NONDIFF)
def test_ops_without_a_derivative(name: str, gpu: Place) -> None:
    op = NONDIFF[name]
    boolean = name.startswith("logical") or name in ("all", "any")
    x = gpu.put([[True, False, True]] if boolean else [[0.5, -1.0, 2.0]])
    rerun(lambda x: op.function(x, x) if len(op.vjps) == 2 else op.function(x), x)


# ------------------------------------------------------------------------------------------------------ transforms


@pytest.fixture
def arrays(gpu: Place, rng: np.random.Generator) -> tuple[Any, ...]:
    return tuple(gpu.put(rng.normal(size=s), "float32") for s in ((4,), (50, 4), (50,)))


def squares(w: Any, x: Any, y: Any) -> Any:
    return gg.mean((x @ w - y) ** 2)


def slope(w: Any, x: Any, y: Any) -> Any:
    return gg.sum(gg.tanh(x @ w) * y)


FUNCTIONS = {
    "pointwise": lambda w, x, y: gg.exp(x) * gg.tanh(w) + 1.0,
    "gradient": gg.value_and_grad(squares),
    "gradient of a gradient": gg.grad(lambda w, x, y: gg.sum(gg.grad(slope)(w, x, y) ** 2)),
    "rows alone": lambda w, x, y: gg.sigmoid(x @ w),
    "rows and sums": lambda w, x, y: (gg.sigmoid(x @ w), gg.sum(x @ w)),
    "a number": gg.value_and_grad(lambda w, x, y: squares(w, x, y * 0.5)),
    "several columns": gg.grad(lambda w, x, y: gg.mean(gg.logsumexp(x @ (w[:, None] * w[None, :]), axis=1) * y)),
    "sums both ways": lambda w, x, y: (gg.sum(gg.exp(x), axis=0), gg.sum(gg.exp(x), axis=1), gg.sum(gg.exp(x))),
    "integers": lambda w, x, y: gg.astype(x, "int32") ** 3,
    "transposed": lambda w, x, y: gg.sum(gg.exp(x.T) @ x, axis=1),
    "arguments and views": lambda w, x, y: (w, x.T, w, gg.exp(y)[3:5]),
    "nothing to do": lambda w, x, y: x,
    "centred": lambda w, x, y: gg.sum((x - gg.mean(x, axis=0)) @ w * y),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, arrays: tuple[Any, ...]) -> None:
    rerun(FUNCTIONS[name], *arrays)


@pytest.mark.parametrize("dtype", ["float16", "float64", "mixed"])
@pytest.mark.parametrize("name", ["gradient", "pointwise"])
def test_dtypes(name: str, dtype: str, arrays: tuple[Any, ...]) -> None:
    w, x, y = (a.astype("float32" if dtype == "mixed" else dtype) for a in arrays)
    function = FUNCTIONS[name]
    if dtype == "mixed":
        w = w.astype("float64")
    want, got = function(w, x, y), gg.compile(function)(w, x, y)
    same(got, want, float(np.finfo("float16" if dtype == "float16" else "float32").eps), units=8)


@pytest.mark.parametrize("layout", ["rows apart", "columns apart", "Fortran", "backwards", "no rows"])
def test_layouts(layout: str, gpu: Place, rng: np.random.Generator) -> None:
    w, y = gpu.put(rng.normal(size=4), "float32"), gpu.put(rng.normal(size=50), "float32")
    wide = gpu.put(rng.normal(size=(50, 8)), "float32")
    x = {
        "rows apart": wide[:, :4],
        "columns apart": wide[:, ::2],
        "Fortran": gpu.put(rng.normal(size=(4, 50)), "float32").T,
        "backwards": wide[::-1, 3::-1],
        "no rows": wide[:0, :4],
    }[layout]
    y = y[: len(x)]
    for name in ("pointwise", "rows and sums", "sums both ways"):
        rerun(FUNCTIONS[name], w, x, y)
    rerun(gg.grad(slope), w, x, y)


def test_numbers_go_in_by_value(arrays: tuple[Any, ...]) -> None:
    w, x, y = arrays
    scaled = gg.compile(gg.value_and_grad(lambda w, x, y, s: gg.sum((x @ w * s - y) ** 2)))
    power = gg.compile(lambda w, s: gg.exp(w) * s)
    for number in (2.5, 0.5, 2.5):
        right = gg.value_and_grad(lambda w, number=number: gg.sum((x @ w * number - y) ** 2))
        same(scaled(w, x, y, number), right(w))
        same(power(w, number), gg.exp(w) * number)


def test_within_and_around(arrays: tuple[Any, ...]) -> None:
    """A compiled function in a compiled one, and differentiated by the tape, with results that are not used."""
    w = arrays[0]
    inner = gg.compile(lambda w: (gg.exp(w), gg.sin(w)))
    rerun(lambda w: gg.sum(inner(w)[0] * inner(w)[1]), w)
    for use in (lambda a, b: gg.sum(a), lambda a, b: gg.sum(a * b)):
        same(gg.grad(lambda w, use=use: use(*inner(w)))(w), gg.grad(lambda w, use=use: use(gg.exp(w), gg.sin(w)))(w))


def test_results_are_the_callers(arrays: tuple[Any, ...]) -> None:
    """Written to, they change nothing; no two of them, and no argument, share memory."""
    w, x, y = arrays
    for name in ("gradient", "rows and sums", "sums both ways", "arguments and views", "nothing to do"):
        function = FUNCTIONS[name]
        want, compiled = leaves(function(w, x, y)), gg.compile(function)
        for _ in range(4):
            got = leaves(compiled(w, x, y))
            for a, b in zip(got, want, strict=True):
                assert_allclose(a, b, rtol=1e-5, atol=1e-5)
            for a, b in itertools.combinations([*got, w, x, y], 2):
                assert not shares_memory(a, b)
            for a in got:
                a[...] = 99


def test_arguments_are_not_kept_alive(gpu: Place) -> None:
    """A launch that is kept for the next call holds no array of this one."""
    for function in (FUNCTIONS["pointwise"], FUNCTIONS["gradient"], FUNCTIONS["transposed"]):
        compiled = gg.compile(function)
        given = [gpu.put(np.ones(s), "float32") for s in ((4,), (50, 4), (50,))]
        refs = [weakref.ref(a) for a in given]
        result = compiled(*given)
        del given
        gc.collect()
        assert [r() for r in refs] == [None] * 3
        del result


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swish_is_as_exact_as_its_kernel(dtype: str, gpu: Place) -> None:
    """In both tails, from a formula: value to 3 eps, slope to 3 eps of its parts."""
    z = np.concatenate([np.linspace(-80, 80, 2001), np.linspace(-1, 1, 201)]).astype(dtype)[:, None]
    exact = z.astype(np.longdouble)
    s, t = 1 / (1 + np.exp(-exact)), 1 / (1 + np.exp(exact))
    x, b, eps = gpu.put(z), gpu.put(np.zeros(1, dtype)), float(np.finfo(dtype).eps)
    value = gg.compile(lambda x, b: gg.bias_swish(x, b, 1.0))(x, b)
    slope = gg.compile(gg.grad(lambda x, b: gg.sum(gg.bias_swish(x, b, 1.0))))(x, b)
    assert np.all(np.abs(host(value) - exact * s) <= 3 * eps * np.abs(exact * s))
    assert np.all(np.abs(host(slope) - s * (1 + exact * t)) <= 3 * eps * s * (1 + np.abs(exact * t)))


def test_swish_has_one_exponential_an_element(gpu: Place) -> None:
    """Forward and backward share one: what is the same in a formula is computed once."""
    texts = []
    made = cuda_code.LoopCode.text
    cuda_code.loop.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cuda_code.LoopCode, "text", lambda self, pack: (texts.append(found := made(self, pack)), found)[1]
        )
        x, b = gpu.put(np.linspace(-3, 3, 12).reshape(3, 4), "float32"), gpu.put(np.ones(4), "float32")
        rerun(gg.value_and_grad(lambda x, b: gg.sum(gg.bias_swish(x, b, 1.0)), argnums=(0, 1)), x, b)
    assert texts
    for text in texts:
        assert text.split("struct Given")[1].count("scalar::exp(") <= 1


# ------------------------------------------------------------------------------------------------------- Objective


def linear(p: Any, x: Any, y: Any) -> Any:
    return gg.squared_error(x @ p["w"] + p["b"], y)


def logistic(p: Any, x: Any, y: Any) -> Any:
    return gg.softplus((x @ p["w"] + p["b"]) * -y)


def weighted(p: Any, x: Any, y: Any) -> Any:
    return gg.abs(y) * gg.square(x @ p["w"] * p["b"] - y)


def network(p: Any, x: Any, y: Any) -> Any:
    hidden = gg.swish(x @ (p["w"][:, None] * p["w"][None, :]) + p["b"])
    return gg.squared_error(gg.tanh(hidden) @ p["w"], y)


def classes(p: Any, x: Any, y: Any) -> Any:
    scores = gg.log_softmax(x @ gg.stack([p["w"], 2 * p["w"], -p["w"]], axis=1) + p["b"], axis=1)
    return -gg.where(y > 0, scores[:, 0], scores[:, 2])


LOSSES = (linear, logistic, weighted, network, classes)


def ridge(p: Any) -> Any:
    return 0.5 * gg.sum(p["w"] ** 2)


@pytest.fixture
def problem_data(gpu: Place, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Parameters, a direction, and data of 403 rows."""
    x, y = rng.normal(size=(403, 5)), np.sign(rng.normal(size=403))
    p, v = ({"b": gpu.put(0.25, "f4"), "w": gpu.put(rng.normal(size=5), "f4")} for _ in range(2))
    return p, v, (gpu.put(x, "f4"), gpu.put(y, "f4"))


def eager(loss: Any, data: Any, **options: Any) -> gg.Objective:
    obj = gg.Objective(loss, data, **options)
    obj._capturing = False
    return obj


@pytest.mark.parametrize("block_size", ["auto", 100])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_an_objective_gives_the_numbers_of_eager_mode(loss: Any, block_size: Any, problem_data: Any) -> None:
    p, v, data = problem_data
    for options in ({"penalty": ridge}, {"reduction": "sum"}):
        options = {"block_size": block_size, **options}
        captured, right = gg.Objective(loss, data, **options), eager(loss, data, **options)
        for _ in range(3):
            same(captured.value_and_grad(p), right.value_and_grad(p))
        same(captured.value(p), right.value(p))
        same(captured.hvp(p, v), right.hvp(p, v), units=256)
        batches = zip(captured.batches(150, seed=3), right.batches(150, seed=3), strict=True)
        for mine, theirs in batches:
            same(mine.value_and_grad(p), theirs.value_and_grad(p))
            same(mine.hvp(p, v), theirs.hvp(p, v), units=256)
        assert not any(isinstance(found, str) for found in captured._programs.values())


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("loss", [linear, network], ids=lambda f: f.__name__)
def test_an_objective_in_other_precisions(loss: Any, dtype: str, problem_data: Any) -> None:
    p, v, data = optree.tree_map(lambda a: a.astype(dtype), problem_data)
    captured, right = gg.Objective(loss, data), eager(loss, data)
    eps = float(np.finfo(dtype).eps)
    same(captured.value_and_grad(p), right.value_and_grad(p), eps, units=16)
    same(captured.hvp(p, v), right.hvp(p, v), eps, units=16)


def test_a_matrix_of_parameters(gpu: Place, rng: np.random.Generator) -> None:
    """Its gradient comes column by column, and is turned."""
    W = gpu.put(rng.normal(size=(5, 3)), "f4")
    data = (gpu.put(rng.normal(size=(200, 5)), "f4"), gpu.put(rng.normal(size=(200, 3)), "f4"))

    def loss(W: Any, x: Any, y: Any) -> Any:
        return gg.logsumexp(x @ W, axis=1) - gg.sum(y * (x @ W), axis=1)

    captured, right = gg.Objective(loss, data), eager(loss, data)
    for _ in range(3):
        same(captured.value_and_grad(W), right.value_and_grad(W))
    assert [found.one_pass for found in captured._programs.values()] == [True]


def test_rows_that_are_not_finite(problem_data: Any) -> None:
    p, _, (x, y) = problem_data
    y[317] = np.nan
    for loss in (linear, network):
        obj = gg.Objective(loss, (x, y), block_size=100)
        with pytest.raises(gg.NonFiniteLoss, match=r"at row 317 of the data \(block 3, row 17 in it\)"):
            obj.value_and_grad(p)
        assert not np.isfinite(float(obj.evaluate(p)[0]))


def test_what_cannot_be_captured_runs_eagerly_with_one_warning(problem_data: Any) -> None:
    p, v, data = problem_data

    def branching(p: Any, x: Any, y: Any) -> Any:
        return linear(p, x, y) if float(p["b"]) > 0 else logistic(p, x, y)

    obj = gg.Objective(branching, data)
    with pytest.warns(CaptureWarning, match=r"test_compile_device\.py:\d+: a value is read") as caught:
        first = obj.value_and_grad(p)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = obj.value_and_grad(p)
        obj.hvp(p, v)
    right = eager(linear, data).value_and_grad(p)
    same(first, right)
    same(second, right)


def test_a_penalty_that_changes_or_cannot_be_captured(problem_data: Any) -> None:
    p, _, data = problem_data
    strength = [0.5]
    obj = gg.Objective(linear, data, penalty=lambda p: strength[0] * gg.sum(p["w"] ** 2))
    for strength[0] in (0.5, 2.0):
        right = eager(linear, data, penalty=lambda p: strength[0] * gg.sum(p["w"] ** 2))
        same(obj.value_and_grad(p), right.value_and_grad(p))
    obj = gg.Objective(linear, data, penalty=lambda p: gg.sum(p["w"] ** 2) * float(p["b"] > 0) * 2.0)
    with pytest.warns(CaptureWarning, match="its penalty: test_compile_device"):
        found = obj.value_and_grad(p)
    same(found, right.value_and_grad(p))


def test_minimize_goes_the_same_way(problem_data: Any) -> None:
    p, _, data = problem_data
    for method in ("lbfgs", "gd", "adam"):
        found = optim.minimize(gg.Objective(linear, data), p, method, max_iter=6, tol=None)
        right = optim.minimize(eager(linear, data), p, method, max_iter=6, tol=None)
        assert_allclose(found.history["fun"], right.history["fun"], rtol=1e-4)


# ----------------------------------------------------------------------------- launches and waits, on the stand-in


def regression(cupy: Any, rows: int = 300, columns: int = 8) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(rows, columns)), np.sign(rng.normal(size=rows))
    p = {"b": cupy.zeros((), "f4"), "w": cupy.asarray(rng.normal(size=columns).astype("f4"))}
    return p, tuple(cupy.asarray(a.astype("f4")) for a in (x, y))


@pytest.mark.parametrize("loss", [linear, logistic], ids=lambda f: f.__name__)
def test_launches_of_gradient_descent(loss: Any, stand_in: Any) -> None:
    """Three: the pass over the data, what adds up and scales, the update. Two where the first two are a graph."""
    p, data = regression(stand_in)
    obj, rule = gg.Objective(loss, data), optim.GradientDescent(0.1)
    right, other = eager(loss, data), optim.GradientDescent(0.1)
    q, launches = dict(p), []
    for _ in range(24):
        with stand_in.counting() as count:
            _, grads = obj.evaluate(p)
            p = rule.step(p, grads)
        assert count.syncs == 0
        launches.append(count.launches)
        q = other.step(q, right.evaluate(q)[1])
    assert set(launches) == {2, 3}
    assert launches[-3:] == [2, 2, 2]  # the pool gives out the same addresses again
    same(p, q)


@pytest.mark.parametrize("loss", [linear, logistic], ids=lambda f: f.__name__)
def test_launches_of_mini_batches(loss: Any, stand_in: Any) -> None:
    """A step is three, and taking the rows is one an array; the penalty is the tape's."""
    p, data = regression(stand_in)
    obj, rule = gg.Objective(loss, data), optim.GradientDescent(0.1)
    for _ in range(2):
        for batch in obj.batches(100):
            with stand_in.counting() as count:
                _, grads = batch.evaluate(p)
                p = rule.step(p, grads)
            assert 2 <= count.launches <= 3
            assert count.syncs == 0


def test_launches_of_a_hessian_vector_product(stand_in: Any) -> None:
    p, data = regression(stand_in)
    obj = gg.Objective(logistic, data)
    for _ in range(6):
        with stand_in.counting() as count:
            obj.hvp(p, p)
        assert 1 <= count.launches <= 2
        assert count.syncs == 0
    assert count.launches == 1  # a graph


def test_launches_with_a_penalty(stand_in: Any) -> None:
    """Value and gradient of a ridge regression: two, and four for the penalty; 15 when that ran op by op."""
    p, data = regression(stand_in)
    obj = gg.Objective(linear, data, penalty=ridge)
    launches = []
    for _ in range(8):
        with stand_in.counting() as count:
            obj.evaluate(p)
        launches.append(count.launches)
        assert count.syncs == 0
    assert launches[1] <= 6
    assert launches[-1] == 2  # two graphs


def mlp_loss(p: Any, x: Any, y: Any) -> Any:
    return gg.mean(gg.squared_error(gg.nn.mlp(p, x)[:, 0], y))


def test_launches_of_a_compiled_network(stand_in: Any) -> None:
    """Value and gradients of two hidden layers: 31 launches eagerly, 16 captured."""
    p = gg.nn.init_mlp([8, 16, 16, 1], device="cuda")
    _, (x, y) = regression(stand_in)
    function = gg.value_and_grad(mlp_loss)
    compiled = gg.compile(function)
    compiled(p, x, y)
    counts = []
    for run in (function, compiled):
        with stand_in.counting() as count:
            run(p, x, y)
        counts.append(count.launches)
        assert count.syncs == 0
    assert counts == [31, 16]


def test_data_that_a_function_closes_over_is_read_in_one_pass(stand_in: Any) -> None:
    p, (x, y) = regression(stand_in)
    function = gg.value_and_grad(lambda w: squares(w, x, y))
    compiled = gg.compile(function)
    same(compiled(p["w"]), function(p["w"]))
    with stand_in.counting() as count:
        compiled(p["w"])
    assert (count.launches, count.syncs, count.bytes_to_device) == (2, 0, 0)
    x *= 2  # constant is the array, not what is in it
    same(compiled(p["w"]), function(p["w"]))


def test_show_tells_what_is_launched(stand_in: Any, capsys: Any) -> None:
    p, (x, y) = regression(stand_in)
    gg.compile(gg.value_and_grad(squares)).show(p["w"], x, y)
    out = capsys.readouterr().out
    assert "one pass over 300 rows: X0: <f4 300 rows x 8" in out
    assert "read once, by 2 launches" in out
    gg.compile(FUNCTIONS["pointwise"]).show(p["w"], x, y)
    assert "loop 300 x 8" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- threads and streams


def test_two_threads_call_one_function_at_the_same_time(gpu: Place, rng: np.random.Generator) -> None:
    compiled = gg.compile(lambda x: gg.sum(gg.tanh(x @ x.T) @ x, axis=0))
    given = [gpu.put(rng.normal(size=(20, 6)), "float32") for _ in range(4)]
    want = [host(gg.sum(gg.tanh(x @ x.T) @ x, axis=0)) for x in given]
    compiled(given[0])
    wrong: list[str] = []
    start = threading.Barrier(len(given))

    def work(k: int) -> None:
        start.wait()
        with backend.activate(backend.Device(gpu)):
            for _ in range(20):
                got = host(compiled(given[k]))
                if not np.allclose(got, want[k], rtol=1e-4, atol=1e-5):
                    wrong.append(f"thread {k}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def on_two_streams(cupy: Any) -> None:
    """Call one function on two streams that nothing orders, back and forth."""
    x = cupy.asarray(np.linspace(-1, 1, 24, dtype="f4").reshape(6, 4))
    y = cupy.asarray(np.linspace(-1, 1, 24, dtype="f4").reshape(6, 4))
    cupy.cuda.Device().synchronize()
    compiled = gg.compile(lambda x: gg.exp(x) @ gg.tanh(x).T)
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    results = []
    for _ in range(3):
        for stream, given in ((first, x), (second, y)):
            with stream:
                results.append(compiled(given))
    first.synchronize()
    second.synchronize()
    for result in results:
        assert_allclose(result, np.exp(x.get()) @ np.tanh(x.get()).T, rtol=1e-5)


def constants_on_two_streams(cupy: Any) -> None:
    """What capture computes on one stream is used on another."""
    table = np.linspace(0, 1, 4, dtype="f4")
    given = [cupy.asarray(np.linspace(-1, k, 24, dtype="f4").reshape(6, 4)) for k in (1, 2)]
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in given]
    compiled = gg.compile(lambda x: gg.exp(x) @ gg.exp(gg.asarray(table, device="cuda")))
    for stream, x in zip(streams, given, strict=True):
        with stream:
            compiled(x)
    for stream in streams:
        stream.synchronize()


def test_constants_are_there_on_every_stream(stand_in: Any) -> None:
    constants_on_two_streams(stand_in)


def test_a_constant_that_nothing_waits_for_is_caught(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "follow", lambda event: None)
    with pytest.raises(Race):
        constants_on_two_streams(stand_in)


def test_streams_do_not_share_buffers(stand_in: Any) -> None:
    on_two_streams(stand_in)


def test_buffers_that_streams_share_are_caught(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "stream_key", lambda: (0, 0))
    with pytest.raises(Race):
        on_two_streams(stand_in)


def test_another_device_than_the_current_one(stand_in: Any) -> None:
    with stand_in.cuda.Device(1):
        p, data = regression(stand_in)
    function = gg.value_and_grad(squares)
    got, want = gg.compile(function)(p["w"], *data), function(p["w"], *data)
    same(got, want)
    same(gg.Objective(linear, data).value_and_grad(p), eager(linear, data).value_and_grad(p))
    assert leaves(got)[0].device.id == 1
    assert stand_in.cuda.Device().id == 0


# ------------------------------------------------------------------------------------------------------------ graphs


def replays(cupy: Any) -> None:
    """Call a function on arrays that come and go; every result is right, and some calls are one launch."""
    compiled = gg.compile(gg.value_and_grad(squares))
    rng = np.random.default_rng(2)
    launches = []
    for k in range(12):
        w, x, y = (rng.normal(size=s).astype("f4") for s in ((4,), (50, 4), (50,)))
        given = [cupy.asarray(a) for a in (w, x, y)]
        if k % 3 == 2:
            given = [a.copy() for a in given]  # other addresses
        with cupy.counting() as count:
            value, g = compiled(*given)
        launches.append(count.launches)
        r = x.astype(float) @ w - y
        assert_allclose(value, np.mean(r * r), rtol=1e-5)
        assert_allclose(g, 2 / 50 * r @ x, rtol=1e-4, atol=1e-5)
        assert count.syncs == 0
    assert set(launches) == {1, 2}
    assert launches.count(1) >= 3


def test_a_graph_is_replayed_where_addresses_come_again(stand_in: Any) -> None:
    replays(stand_in)


def test_a_graph_with_a_stale_address_is_caught(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_address", lambda value: getattr(value, "shape", None))
    with pytest.raises(AssertionError):
        replays(stand_in)


def test_a_graph_that_forgets_a_number_is_caught(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = stand_in.asarray(np.linspace(0, 1, 6, dtype="f4"))

    def run() -> None:
        compiled = gg.compile(lambda x, s: (gg.exp(x) * s, gg.sum(x * s)))
        for number in (1.5, 2.5, 1.5, 2.5, 1.5, 2.5):
            assert_allclose(compiled(x, number)[0], np.exp(x.get()) * np.float32(number), rtol=1e-6)

    run()
    real = cuda._address
    monkeypatch.setattr(cuda, "_address", lambda value: type(value) if isinstance(value, float) else real(value))
    with pytest.raises(AssertionError):
        run()


def graphs_of(compiled: Any) -> list[Any]:
    programs = [entry.run for entry in compiled._entries.values()]
    return [instance.graphs for p in programs for kept in p.idle.values() for instance in kept]


def test_a_program_with_a_product_is_a_list_of_launches(stand_in: Any) -> None:
    compiled = gg.compile(lambda x: gg.exp(gg.tanh(x) @ x))
    x = stand_in.asarray(np.eye(3, dtype="f4"))
    for _ in range(4):
        compiled(x)
    assert graphs_of(compiled) == [None]


@pytest.mark.parametrize("fault", ["begin_capture", "end_capture"])
def test_where_capture_fails_the_launches_are_made(stand_in: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(stand_in.cuda.Stream, fault)

    def refused(self: Any, *args: Any) -> Any:
        if fault == "end_capture":
            real(self)
        raise RuntimeError("not here")

    monkeypatch.setattr(stand_in.cuda.Stream, fault, refused)
    compiled = gg.compile(lambda x: (gg.exp(x), gg.sum(x)))
    x = stand_in.asarray(np.linspace(0, 1, 6, dtype="f4"))
    for _ in range(4):
        assert_allclose(compiled(x)[0], np.exp(x.get()), rtol=1e-6)
    assert [g.stopped for g in graphs_of(compiled)] == [True]


def test_addresses_that_never_come_again_are_not_captured_for_ever(stand_in: Any) -> None:
    compiled = gg.compile(lambda x: (gg.exp(x), gg.sum(x)))
    kept = [stand_in.asarray(np.linspace(0, k, 6, dtype="f4")) for k in range(80)]
    results = [compiled(x) for x in kept]  # kept too
    assert [g.captured for g in graphs_of(compiled)] == [0]
    for x, (y, _) in zip(kept, results, strict=True):
        assert_allclose(y, np.exp(x.get()), rtol=1e-6)
    assert all(len(g.seen) <= cuda.REPEATED for g in graphs_of(compiled))


def test_an_operand_that_must_be_copied_is_in_no_graph(stand_in: Any) -> None:
    """The copy is freed when the call is over: a graph would read memory that others have by then."""
    compiled = gg.compile(lambda x: (gg.exp(x) * 2.0, gg.sum(gg.exp(x), axis=1)))
    x = stand_in.asarray(np.arange(12, dtype="f4").reshape(3, 4) / 9).T
    for _ in range(5):
        assert_allclose(compiled(x)[0], 2 * np.exp(x.get()), rtol=1e-6)
    assert [g.captured for g in graphs_of(compiled)] == [0]


def other_numbers_of_rows(cupy: Any) -> None:
    """One pass for any number of rows: what blocks leave needs more room when more rows come."""
    p, (x, y) = regression(cupy)
    few = gg.Objective(linear, (x[:50], y[:50]))
    many = gg.Objective(linear, (x, y))
    many._programs = few._programs
    right = [host(eager(linear, obj.data).evaluate(p)[1]["w"]) for obj in (few, many)]
    graphs = 0
    for _ in range(3):
        for obj, want in ((few, right[0]), (many, right[1])):
            for _ in range(6):
                with cupy.counting() as count:
                    _, g = obj.evaluate(p)
                graphs += count.launches == 1
                assert_allclose(g["w"], want, rtol=1e-5, atol=1e-6)
    assert graphs > 6


def test_graphs_go_when_what_they_write_to_moves(stand_in: Any) -> None:
    other_numbers_of_rows(stand_in)


def test_a_graph_on_memory_that_moved_is_caught(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.Memory, "moved", property(lambda self: 0, lambda self, value: None), raising=False)
    with pytest.raises(AssertionError):  # Freed is one
        other_numbers_of_rows(stand_in)


def test_memory_is_let_go_at_once(stand_in: Any) -> None:
    """Without waiting for the garbage collector: where memory runs out, it is needed now."""
    x = stand_in.asarray(np.eye(40, dtype="f4"))
    pool = stand_in.get_default_memory_pool()
    gc.collect()
    gc.disable()
    try:
        compiled = gg.compile(deep)
        compiled(x)
        (entry,) = compiled._entries.values()
        held = pool.used_bytes()
        entry.run.release()
        assert pool.used_bytes() <= held - 3 * x.nbytes
    finally:
        gc.enable()


def test_buffers_of_other_programs_go_before_blocks_are_halved(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with room for one program at a time has room for all of them, one after the other."""
    _, data = regression(stand_in, rows=4000)
    p = gg.nn.init_mlp([8, 16, 16, 1], device="cuda")
    loss = lambda p, x, y: gg.squared_error(gg.nn.mlp(p, x)[:, 0], y)  # noqa: E731
    obj, pool = gg.Objective(loss, data, block_size=4000), stand_in.get_default_memory_pool()

    def needed(call: Any) -> int:
        before = pool.used_bytes()
        call(p)
        return int(pool.used_bytes() - before)

    gradient, product = needed(obj.evaluate), needed(lambda p: obj.hvp(p, p))
    assert min(gradient, product) > 100_000
    fresh = gg.Objective(loss, data, block_size=4000)
    obj._programs.clear()
    gc.collect()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + (max(gradient, product) + gradient + product) // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            fresh.evaluate(p)
            fresh.hvp(p, p)
    monkeypatch.setattr(gg.Objective, "_let_go", lambda self: 0)
    with pytest.warns(DeviceMemoryWarning):  # where they are kept, blocks become smaller
        fresh.evaluate(p)


# ---------------------------------------------------------------------------------------------------- planted faults


def deep(x: Any) -> Any:
    """Values that live over several steps."""
    a = gg.exp(x) @ x
    b = gg.tanh(a) @ x
    return gg.sum(a * b + gg.sin(b) @ a, axis=0)


def check_deep(cupy: Any) -> int:
    x = cupy.asarray(np.random.default_rng(0).normal(size=(5, 5)).astype("f4") / 3)
    compiled = gg.compile(deep)
    same(compiled(x), deep(x))
    with cupy.counting() as count:
        compiled(x)
    return int(count.syncs)


def test_a_buffer_used_again_too_early_is_caught(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_deep(stand_in) == 0
    real = cuda.plan

    def hasty(*args: Any) -> Any:
        made = real(*args)
        made.place = dict.fromkeys(made.place, 0)
        made.buffers = [max(made.buffers)]
        return made

    monkeypatch.setattr(cuda, "plan", hasty)
    with pytest.raises(AssertionError):
        check_deep(stand_in)


def test_a_wait_hidden_in_a_step_is_counted(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cuda.Template.run

    def looking(self: Any, operands: Any, totals: Any) -> None:
        real(self, operands, totals)
        for _, value in operands:
            if backend.is_cuda_array(value):
                value.get()

    monkeypatch.setattr(cuda.Template, "run", looking)
    assert check_deep(stand_in) > 0


def test_a_result_in_a_buffer_is_caught(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were results left in the program's own memory, the next call would overwrite them."""
    real = Instance.run
    kept: dict[int, list[Any]] = {}

    def lending(self: Any, arrays: Any) -> Any:
        results = real(self, arrays)
        before = kept.setdefault(id(self), results)
        for into, result in zip(before, results, strict=True):
            into[...] = result
        return before

    monkeypatch.setattr(Instance, "run", lending)
    compiled = gg.compile(deep)
    x = stand_in.asarray(np.eye(5, dtype="f4"))
    first = compiled(x)
    want = first.get()
    compiled(2 * x)
    with pytest.raises(AssertionError):
        assert_array_equal(first, want)
