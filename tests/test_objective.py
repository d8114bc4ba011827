"""The finite sum: exact for any block size, reproducible, small in memory, clear when something is wrong."""

import threading
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import gpugrad as gg


def linear_loss(params: Any, X: Any, y: Any) -> Any:
    return (X @ params["w"] + params["b"] - y) ** 2


def logistic(w: Any, X: Any, y: Any, weight: Any) -> Any:
    return weight * gg.softplus((1 - 2 * y) * (X @ w))


@pytest.fixture
def data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    X = rng.normal(size=(1003, 4))
    return X, X @ [1.0, -2.0, 0.5, 3.0] + rng.normal(size=1003)


def exact(params: dict[str, Any], X: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Value and gradient of the mean by hand."""
    r = X @ params["w"] + params["b"] - y
    return float(np.mean(r * r)), 2 * r @ X / len(y), float(2 * r.mean())


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("block_size", [1, 7, 250, 1003, 5000, "auto"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_for_any_block_size(data: Any, block_size: Any, threads: int, reduction: str) -> None:
    params = {"w": np.array([0.3, -0.2, 0.9, 1.1]), "b": 0.7}
    obj = gg.Objective(linear_loss, data, block_size=block_size, threads=threads, reduction=reduction)
    value, grads = obj.value_and_grad(params)
    right, gw, gb = exact(params, *data)
    scale = 1 if reduction == "mean" else len(data[0])
    assert value == pytest.approx(scale * right, rel=1e-13)
    np.testing.assert_allclose(grads["w"], scale * gw, rtol=1e-12)
    assert grads["b"] == pytest.approx(scale * gb, rel=1e-11)
    assert obj.value(params) == value
    assert type(value) is float
    assert type(grads["b"]) is float


def test_same_bits_whatever_the_threads_do(rng: np.random.Generator) -> None:
    X = rng.normal(size=(20_000, 8)).astype(np.float32)
    y = rng.normal(size=20_000).astype(np.float32)
    w = rng.normal(size=8).astype(np.float32)
    results = []
    for threads in (1, 2, 3, 8, 2, 2):
        obj = gg.Objective(lambda w, X, y: gg.swish(X @ w) * y, (X, y), block_size=500, threads=threads)
        value, g = obj.value_and_grad(w)
        results.append((value, g.tobytes()))
    assert len(set(results)) == 1


def test_accumulates_in_float64() -> None:
    # 1 + 2**-20 in float32 repeated: a float32 accumulator stalls far from the mean
    n = 3_000_000
    x = np.full(n, 1 + 2.0**-20, np.float32)
    obj = gg.Objective(lambda w, x: w * x, (x,), block_size=1000)
    value, g = obj.value_and_grad(np.float32(1.0) * np.ones((), np.float32))
    assert value == pytest.approx(1 + 2.0**-20, rel=1e-12)
    assert float(g) == pytest.approx(1 + 2.0**-20, rel=1e-7)


def test_penalty_is_added_once(data: Any) -> None:
    params = {"w": np.arange(4.0), "b": 1.0}
    penalty = lambda p: 0.5 * gg.sum(p["w"] ** 2)  # noqa: E731
    plain = gg.Objective(linear_loss, data, block_size=10)
    penalised = gg.Objective(linear_loss, data, block_size=10, penalty=penalty, reduction="mean")
    v0, g0 = plain.value_and_grad(params)
    v1, g1 = penalised.value_and_grad(params)
    assert v1 - v0 == pytest.approx(7.0, rel=1e-12)
    np.testing.assert_allclose(g1["w"] - g0["w"], np.arange(4.0), atol=1e-12)
    assert g1["b"] == g0["b"]
    assert penalised.value(params) == v1
    for batch in penalised.batches(100, seed=1):
        assert batch.value(params) - gg.Objective(linear_loss, batch.data).value(params) == pytest.approx(7.0)


def test_sample_weights_count_rows(rng: np.random.Generator) -> None:
    X, y = rng.normal(size=(50, 3)), rng.integers(0, 2, 50)
    count = rng.integers(1, 4, 50)
    w = rng.normal(size=3)
    weighted = gg.Objective(logistic, (X, y, count), reduction="sum").value_and_grad(w)
    repeated = gg.Objective(
        logistic, (X.repeat(count, 0), y.repeat(count), np.ones(count.sum())), reduction="sum"
    ).value_and_grad(w)
    assert weighted[0] == pytest.approx(repeated[0], rel=1e-12)
    np.testing.assert_allclose(weighted[1], repeated[1], rtol=1e-11)


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_gradients_come_like_the_parameters(data: Any, kind: str) -> None:
    w = np.ones(4, np.float32)
    params = {"w": gg.tensor(w) if kind == "tensor" else w, "b": 0.0}
    _, grads = gg.Objective(linear_loss, data).value_and_grad(params)
    assert type(grads["w"]) is (gg.Tensor if kind == "tensor" else np.ndarray)
    assert grads["w"].dtype == np.float32
    if kind == "array":
        assert grads["w"].flags.writeable


def test_python_float_does_not_widen(rng: np.random.Generator) -> None:
    seen = []

    def loss(params: Any, X: Any) -> Any:
        out = X @ params["w"] + params["b"]
        seen.append(out.dtype)
        return out

    X = rng.normal(size=(20, 3)).astype(np.float32)
    gg.Objective(loss, (X,)).value_and_grad({"w": np.ones(3, np.float32), "b": 0.5})
    assert set(seen) == {np.dtype(np.float32)}


def test_batches_are_one_seeded_epoch(data: Any) -> None:
    X, y = data
    obj = gg.Objective(linear_loss, data)
    rows = [batch.data[1] for batch in obj.batches(100, seed=3)]
    assert [len(r) for r in rows] == [100] * 10 + [3]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.sort(y))
    again = [batch.data[1] for batch in obj.batches(100, seed=3)]
    other = [batch.data[1] for batch in obj.batches(100, seed=4)]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(again))
    assert not np.array_equal(np.concatenate(rows), np.concatenate(other))
    for batch in obj.batches(100, seed=3):
        picked = [int(np.flatnonzero(y == v)[0]) for v in batch.data[1]]
        np.testing.assert_array_equal(batch.data[0], X[picked])  # rows stay together


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batch_gradients_average_to_the_full_one(data: Any, reduction: str) -> None:
    params = {"w": np.ones(4), "b": 0.1}
    obj = gg.Objective(linear_loss, data, reduction=reduction)
    _, full = obj.value_and_grad(params)
    parts = [(b.rows, b.value_and_grad(params)[1]["w"]) for b in obj.batches(100, seed=0)]
    mean = sum(n * g for n, g in parts) / obj.rows
    np.testing.assert_allclose(mean, full["w"], rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["least squares", "many intermediates", "wide intermediates"])
def test_memory_stays_under_100_mb(name: str) -> None:
    def many(w: Any, X: Any, y: Any) -> Any:
        z = X * w
        for _ in range(40):
            z = gg.tanh(z) + z
        return z.sum(axis=1) - y

    losses = {
        "least squares": lambda w, X, y: (X @ w - y) ** 2,
        "many intermediates": many,
        "wide intermediates": lambda w, X, y: (
            gg.exp(-gg.expand_dims(X, axis=2) * gg.expand_dims(X * w, axis=1)).sum(axis=(1, 2)) - y
        ),
    }
    rows = 2_000_000 if name == "least squares" else 200_000
    rng = np.random.default_rng(0)
    X = rng.standard_normal((rows, 32), dtype=np.float32)
    y = rng.standard_normal(rows).astype(np.float32)
    w = (rng.standard_normal(32) * 0.1).astype(np.float32)
    obj = gg.Objective(losses[name], (X, y), threads=2)
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        obj.evaluate(w)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, X, y: gg.mean((X @ p - y) ** 2), r"shape \(\) for a block of 1003 rows, expected shape \(1003,\)"),
        (lambda p, X, y: gg.expand_dims(X @ p, axis=1), r"shape \(1003, 1\).*\[:, 0\]"),
        (lambda p, X, y: 3.0, "a float"),
        (lambda p, X, y: None, "a NoneType"),
    ],
)
def test_loss_of_a_wrong_shape(data: Any, loss: Any, message: str) -> None:
    obj = gg.Objective(loss, data, block_size=2000)
    with pytest.raises(gg.ShapeMismatch, match=message):
        obj.value_and_grad(np.ones(4))


def test_integer_loss_is_refused(data: Any) -> None:
    with pytest.raises(gg.NotDifferentiable, match="bool"):
        gg.Objective(lambda p, X, y: X @ p > y, data).value_and_grad(np.ones(4))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_loss_names_the_first_row(data: Any, threads: int, bad: float) -> None:
    X, y = data[0], data[1].copy()
    y[[900, 412, 777]] = bad
    obj = gg.Objective(linear_loss, (X, y), block_size=100, threads=threads)
    params = {"w": np.ones(4), "b": 0.0}
    with pytest.raises(gg.NonFiniteLoss, match=r"at row 412 of the data \(block 4, row 12 in it\)"):
        obj.value_and_grad(params)
    with pytest.raises(gg.NonFiniteLoss, match="row 412"):
        obj.value(params)
    value, _ = obj.evaluate(params)
    assert not np.isfinite(value)


def test_errors_in_the_loss_come_through_from_threads(data: Any) -> None:
    def loss(p: Any, X: Any, y: Any) -> Any:
        if y[0] == data[1][500]:
            raise KeyError("mine")
        return X @ p

    obj = gg.Objective(loss, data, block_size=100, threads=2)
    for _ in range(3):
        with pytest.raises(KeyError, match="mine"):
            obj.value_and_grad(np.ones(4))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((np.ones((5, 2)), np.ones(4)), gg.ShapeMismatch, r"unequal length \[5, 4\]"),
        ((np.ones((0, 2)), np.ones(0)), ValueError, "no rows"),
        ((), ValueError, "no data"),
        ((np.ones((5, 2)), [1, 2, 3, 4, 5]), TypeError, r"data\[1\] is a list"),
        ((np.float64(3.0),), gg.ShapeMismatch, "0-d"),
    ],
)
def test_bad_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gg.Objective(lambda p, *block: p, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction='max'"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": "big"}, "block_size='big'"),
        ({"threads": 0}, "threads=0"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_bad_settings(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gg.Objective(linear_loss, data, **options)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"w": np.arange(4), "b": 0.0}, gg.NotDifferentiable, "int64"),
        ({"w": np.ones(4), "b": 1}, TypeError, "int"),
        ({"w": "x", "b": 1.0}, TypeError, "str"),
    ],
)
def test_bad_parameters(data: Any, params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gg.Objective(linear_loss, data).value_and_grad(params)


def test_batches_refuse_a_bad_size(data: Any) -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        next(gg.Objective(linear_loss, data).batches(0))


# ------------------------------------------------------------------------------------------------------ surroundings


def test_the_loss_cannot_write_to_the_data(data: Any) -> None:
    def loss(p: Any, X: Any, y: Any) -> Any:
        X *= 2
        return X @ p

    with pytest.raises(ValueError, match="read-only"):
        gg.Objective(loss, data).value_and_grad(np.ones(4))
    assert data[0].flags.writeable


def test_data_is_not_copied(data: Any) -> None:
    obj = gg.Objective(linear_loss, data)
    assert obj.data[0] is data[0]
    data[0][:] = 0.0
    data[1][:] = 2.0
    assert obj.value({"w": np.ones(4), "b": 0.0}) == 4.0


def test_a_scratch_array_of_the_loss_is_protected(rng: np.random.Generator) -> None:
    # The data is trusted for the length of a call; what the loss itself writes to is not.
    x = rng.normal(size=100)
    scratch = np.empty(100)

    def loss(w: Any, x: Any) -> Any:
        mine = scratch[: len(x)]
        mine[:] = x
        product = w * mine
        mine[:] = 1e9
        return product

    _, g = gg.Objective(loss, (x,), threads=1, reduction="sum").value_and_grad(np.ones(()))
    assert float(g) == pytest.approx(x.sum())


def test_float_errors_follow_the_callers_settings(rng: np.random.Generator) -> None:
    x = np.full(1000, 1e300)
    obj = gg.Objective(lambda w, x: w * x * x, (x,), block_size=100, threads=2)
    with np.errstate(over="ignore"):
        obj.evaluate(np.ones(()))
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        obj.evaluate(np.ones(()))


def test_many_threads_use_one_objective(data: Any) -> None:
    obj = gg.Objective(linear_loss, data, block_size=50, threads=2)
    params = {"w": np.ones(4), "b": 0.5}
    right = obj.value_and_grad(params)[0]
    got: list[float] = []

    def work() -> None:
        got.extend(obj.value_and_grad(params)[0] for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == [right] * 40


def test_loss_that_ignores_the_parameters(data: Any) -> None:
    value, g = gg.Objective(lambda p, X, y: y, data).value_and_grad(np.ones(4))
    assert value == pytest.approx(data[1].mean())
    np.testing.assert_array_equal(g, np.zeros(4))


def test_blas_threads_are_put_back(data: Any) -> None:
    before = threadpoolctl.threadpool_info()
    gg.Objective(linear_loss, data, block_size=50, threads=2).value({"w": np.ones(4), "b": 0.0})
    assert threadpoolctl.threadpool_info() == before


def test_memory_maps_are_data(tmp_path: Any, rng: np.random.Generator) -> None:
    X = rng.normal(size=(500, 3))
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    w = np.ones(3)
    assert gg.Objective(lambda w, X: X @ w, (mapped,)).value(w) == pytest.approx((X @ w).mean(), rel=1e-12)


# --------------------------------------------------------------------------------------- on the stand-in for CUDA


def on_device(cupy: Any, params: dict[str, Any]) -> dict[str, Any]:
    return {key: cupy.asarray(np.asarray(value, dtype="f4")) for key, value in params.items()}


@pytest.fixture
def narrow(data: Any) -> tuple[np.ndarray, ...]:
    return tuple(a.astype("f4") for a in data)


PARAMS = {"w": np.array([0.3, -0.2, 0.9, 1.1], "f4"), "b": 0.7}


@pytest.mark.parametrize("block_size", ["auto", 100])
@pytest.mark.parametrize("where", ["host", "device"])
def test_the_device_gives_the_same_numbers(stand_in: Any, narrow: Any, where: str, block_size: Any) -> None:
    penalty = lambda p: 0.5 * gg.sum(p["w"] ** 2)  # noqa: E731
    options = {"penalty": penalty, "block_size": block_size}
    right, expected = gg.Objective(linear_loss, narrow, device="cpu", **options).value_and_grad(PARAMS)
    obj = gg.Objective(linear_loss, narrow, device="cuda", **options)
    params = PARAMS if where == "host" else on_device(stand_in, PARAMS)
    value, grads = obj.value_and_grad(params)
    assert type(value) is float
    assert value == pytest.approx(right, rel=1e-6)
    assert type(grads["w"]) is (np.ndarray if where == "host" else stand_in.ndarray)
    assert type(grads["b"]) is (float if where == "host" else stand_in.ndarray)
    np.testing.assert_allclose(gg.asarray(grads["w"], device="cpu"), expected["w"], rtol=1e-5)
    assert float(grads["b"]) == pytest.approx(expected["b"], rel=1e-5)
    assert obj.value(params) == value


def test_an_evaluation_waits_once_at_most(stand_in: Any, narrow: Any) -> None:
    """Forward and backward never; the value, and gradients that go to the host, are one transfer."""
    obj = gg.Objective(linear_loss, narrow, device="cuda", block_size=100, penalty=lambda p: gg.sum(p["w"] ** 2))
    there = on_device(stand_in, PARAMS)
    for call, params, waits in [
        (obj.evaluate, there, 0),
        (obj.value_and_grad, there, 1),
        (obj.value, there, 1),
        (obj.evaluate, PARAMS, 1),
        (obj.value_and_grad, PARAMS, 1),
    ]:
        call(params)
        with stand_in.counting() as count:
            call(params)
        assert count.syncs == waits
    with stand_in.counting() as count:
        for batch in obj.batches(100):
            value, _ = batch.evaluate(there)
    assert count.syncs == 0
    assert type(value) is stand_in.ndarray
    assert value.shape == ()


def test_a_wait_in_the_loss_is_counted(stand_in: Any, narrow: Any) -> None:
    """The count above sees a value that is looked at on the way."""

    def peeking(p: Any, X: Any, y: Any) -> Any:
        return linear_loss(p, X, y) * (1.0 if float(p["b"]) > 0 else 2.0)

    obj = gg.Objective(peeking, narrow, device="cuda", block_size=100)
    there = on_device(stand_in, PARAMS)
    with pytest.warns(gg.errors.CaptureWarning, match="a value is read while peeking is captured"):
        obj.evaluate(there)
    with stand_in.counting() as count:
        obj.evaluate(there)
    assert count.syncs == 11


def test_a_host_array_in_the_loss_is_refused(stand_in: Any, narrow: Any) -> None:
    obj = gg.Objective(lambda p, X, y: (X @ p["w"] - narrow[1][: len(y)]) ** 2, narrow, device="cuda")
    with pytest.raises(gg.DeviceMismatch, match="subtract"):
        obj.evaluate(on_device(stand_in, PARAMS))


def test_the_data_says_where(stand_in: Any, narrow: Any) -> None:
    """Everything runs where the data is, whatever device is current; parameters of another GPU are refused."""
    with stand_in.cuda.Device(1):
        there = tuple(stand_in.asarray(a) for a in narrow)
        params = on_device(stand_in, PARAMS)
    obj = gg.Objective(linear_loss, there)
    assert obj.device == "cuda:1"
    _, grads = obj.value_and_grad(params)
    assert grads["w"].device.id == 1
    assert next(obj.batches(10)).data[0].device.id == 1
    with pytest.raises(gg.DeviceMismatch, match=r"the data is on cuda:1, a parameter on cuda:0"):
        obj.value(on_device(stand_in, PARAMS))
    with pytest.raises(gg.DeviceMismatch, match=r"data on cuda:1, device='cuda:0' asked for"):
        gg.Objective(linear_loss, there, device="cuda:0")
    with pytest.raises(gg.DeviceMismatch, match="cuda:1"):
        gg.Objective(linear_loss, (there[0], stand_in.asarray(narrow[1])))


def test_rows_that_are_not_finite_on_the_device(stand_in: Any, narrow: Any) -> None:
    X, y = narrow
    y[[900, 412]] = np.nan
    obj = gg.Objective(linear_loss, (X, y), device="cuda", block_size=100)
    with pytest.raises(gg.NonFiniteLoss, match=r"at row 412 of the data \(block 4, row 12 in it\)"):
        obj.value_and_grad(PARAMS)
    assert np.isnan(float(obj.evaluate(PARAMS)[0]))


@pytest.mark.parametrize("rows", [40, 1003])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes_on_the_device(stand_in: Any, narrow: Any, dtype: str, rows: int) -> None:
    data = tuple(a[:rows].astype(dtype) for a in narrow)
    params = {"w": PARAMS["w"].astype(dtype), "b": 0.5}
    right, expected = gg.Objective(linear_loss, data, device="cpu", block_size=500).value_and_grad(params)
    value, grads = gg.Objective(linear_loss, data, device="cuda", block_size=500).value_and_grad(params)
    eps = float(np.finfo(dtype).eps)
    assert grads["w"].dtype == dtype
    assert value == pytest.approx(right, rel=4 * eps)
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=20 * eps, atol=20 * eps)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("block_size", [10, 100])
def test_gradients_are_the_callers_own(stand_in: Any, reduction: str, block_size: int) -> None:
    """Parameters that share a cotangent, that do not matter, and that are used as they are."""
    x = np.arange(100.0)

    def loss(p: Any, x: Any) -> Any:
        return p["a"] + p["b"] + x * 0.0

    here = {key: np.zeros(()) for key in ("a", "b", "unused")}
    params = {key: stand_in.asarray(value) for key, value in here.items()}
    options: Any = {"reduction": reduction, "block_size": block_size}
    right, expected = gg.Objective(loss, x, device="cpu", **options).value_and_grad(here)
    obj = gg.Objective(loss, x, device="cuda", **options)
    value, grads = obj.value_and_grad(params)
    assert value == right
    for key in here:
        assert float(grads[key]) == pytest.approx(float(expected[key]))
    grads["a"] += 5.0
    assert float(grads["b"]) == pytest.approx(float(expected["b"]))
    for batch in obj.batches(30, seed=1):
        assert float(batch.value_and_grad(params)[1]["a"]) == pytest.approx(float(expected["a"]))
    constant = gg.Objective(lambda p, x: x, x, device="cuda", **options).value_and_grad(params)
    assert constant[0] == pytest.approx(x.mean() if reduction == "mean" else x.sum())
    assert float(constant[1]["a"]) == 0.0


def test_the_callers_stream_computes(stand_in: Any, narrow: Any) -> None:
    obj = gg.Objective(linear_loss, narrow, device="cuda", block_size=100)
    right = obj.value(PARAMS)
    with stand_in.cuda.Stream(non_blocking=True) as stream:  # nothing orders it after the one that copied the data
        queue = stream._queue
        before = queue.clock.get(queue.key, 0)
        assert obj.value(PARAMS) == right
        assert queue.clock[queue.key] > before + 30
