"""Data larger than the GPU: streamed, in smaller blocks where memory runs out, with the numbers of data that fits.

All on the stand-in for CuPy, whose devices have as much memory as a test gives them, whose copies from pinned memory
happen as late as CUDA allows, and which raises Race where two streams use the same memory with nothing to order them.
Whether copies really run under the compute, and what that gains, only a GPU can tell.
"""

import contextlib
import gc
import json
import re
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
from cuda_proof import machine, stand_in
from devices import problem
from numpy.testing import assert_allclose, assert_array_equal

import gpugrad as gg
from gpugrad import objective
from gpugrad.cli import main
from gpugrad.compile.cuda_rows import DeviceLoss
from gpugrad.errors import DeviceMemoryError, DeviceMemoryWarning
from gpugrad.stream import Feeder

if missing := problem("stand-in"):
    pytest.skip(missing, allow_module_level=True)

ROWS, COLS = 3001, 20
LARGE, SMALL = 16 << 30, 120_000  # bytes; the data takes 252,084


@pytest.fixture
def install() -> Any:
    """Put the stand-in in place until the test is over and all it made is gone."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(stand_in.install(**options))


@pytest.fixture
def data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(ROWS, COLS)).astype("f4"), rng.normal(size=ROWS).astype("f4")


@pytest.fixture
def start(rng: np.random.Generator) -> dict[str, Any]:
    return {"w": rng.normal(size=COLS).astype("f4"), "b": 0.25}


def loss(p: dict[str, Any], X: Any, y: Any) -> Any:
    return gg.square(gg.tanh(X @ p["w"] + p["b"]) - y)


def evaluated(memory: int, data: Any, start: Any, **options: Any) -> tuple[float, Any, bool]:
    """Value, gradients, and whether the data was streamed, on a device of so much memory."""
    with stand_in.install(memory=memory):
        obj = gg.Objective(loss, data, device="cuda", **options)
        found = *obj.value_and_grad(start), obj._streamed
        del obj
        return found


def same(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    assert_array_equal(a[1]["w"], b[1]["w"])
    assert a[1]["b"] == b[1]["b"]


def close(a: Any, b: Any) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-6)
    assert_allclose(a[1]["w"], b[1]["w"], rtol=1e-4, atol=1e-6)
    assert a[1]["b"] == pytest.approx(b[1]["b"], rel=1e-4)


# --- the same numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("feed", [64 << 20, 4000], ids=["many-blocks-a-copy", "few"])
@pytest.mark.parametrize("block_size", [11, 64, 149])
def test_streaming_changes_no_bit(data: Any, start: Any, block_size: int, feed: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(objective, "FEED_BYTES", feed)
    streamed = evaluated(SMALL, data, start, block_size=block_size)
    whole = evaluated(LARGE, data, start, block_size=block_size)
    assert (streamed[2], whole[2]) == (True, False)
    same(streamed, whole)


def test_rows_one_by_one(data: Any, start: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(objective, "RESIDENT_SHARE", 0.0)
    few = tuple(a[:23] for a in data)
    streamed = evaluated(LARGE, few, start, block_size=1)
    monkeypatch.undo()
    whole = evaluated(LARGE, few, start, block_size=1)
    assert streamed[2]
    same(streamed, whole)


@pytest.mark.parametrize("memory", [20_000, SMALL, 400_000])
def test_block_size_auto_fits_the_device(data: Any, start: Any, memory: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeviceMemoryWarning)
        streamed = evaluated(memory, data, start)
    assert streamed[2]
    cpu = gg.Objective(loss, data, device="cpu").value_and_grad(start)
    close(streamed, cpu)


@pytest.mark.parametrize("kind", ["memory map", "other byte order", "Fortran order", "strided", "integers"])
def test_any_host_array_streams(install: Any, data: Any, start: Any, kind: str, tmp_path: Any) -> None:
    X, y = data
    if kind == "memory map":
        np.save(tmp_path / "x.npy", X)
        X = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif kind == "other byte order":
        X = X.astype(X.dtype.newbyteorder("S"))
    elif kind == "Fortran order":
        X = np.asfortranarray(X)
    elif kind == "strided":
        X = np.repeat(X, 2, axis=1)[:, ::2]
    else:
        X = (10 * X).astype("i4")
    streamed = evaluated(SMALL, (X, y), start, block_size=100)
    right = gg.Objective(loss, (np.ascontiguousarray(X, X.dtype.newbyteorder("=")), y), device="cpu")
    assert streamed[2]
    close(streamed, right.value_and_grad(start))
    install(memory=SMALL)
    batches = [b.value(start) for b in gg.Objective(loss, (X, y), device="cuda").batches(100, seed=1)]
    assert_allclose(batches, [b.value(start) for b in right.batches(100, seed=1)], rtol=1e-6)


def test_arrays_on_the_device_beside_those_that_stream(install: Any, data: Any, start: Any) -> None:
    right = gg.Objective(loss, data, device="cpu")
    cupy = install(memory=SMALL)
    obj = gg.Objective(loss, (data[0], cupy.asarray(data[1])))
    assert obj._streamed
    assert obj.device == "cuda:0"
    close(obj.value_and_grad(start), right.value_and_grad(start))
    batches = [b.value(start) for b in obj.batches(128, seed=1)]
    assert_allclose(batches, [b.value(start) for b in right.batches(128, seed=1)], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [100, 128, 1000, 3001])
@pytest.mark.parametrize("memory", [20_000, SMALL])
def test_mini_batches_are_those_of_data_that_fits(
    install: Any, data: Any, start: Any, batch_size: int, memory: int
) -> None:
    def batches(memory: int) -> list[Any]:
        install(memory=memory)
        obj = gg.Objective(loss, data, device="cuda", reduction="sum")
        return [(b.rows, *b.value_and_grad(start)) for b in obj.batches(batch_size, seed=3)]

    whole = batches(LARGE)
    for a, b in zip(batches(memory), whole, strict=True):
        assert a[0] == b[0]
        close(a[1:], b[1:])


def test_mini_batches_may_be_kept(install: Any, data: Any, start: Any) -> None:
    """Each has memory of its own, so that using them later, or in another order, is no mistake."""
    install(memory=SMALL)
    obj = gg.Objective(loss, data, device="cuda")
    kept = [batch for batch, _ in zip(obj.batches(128, seed=3), range(4), strict=False)]
    late = [batch.value(start) for batch in reversed(kept)][::-1]
    assert late == [b.value(start) for b, _ in zip(obj.batches(128, seed=3), range(4), strict=False)]
    for batch in kept:
        assert batch.rows == len(batch.data[0]) == 128


def test_evaluating_all_rows_between_mini_batches(install: Any, data: Any, start: Any) -> None:
    install(memory=SMALL)
    obj = gg.Objective(loss, data, device="cuda")
    alone = obj.value(start)
    for batch, _ in zip(obj.batches(64), range(5), strict=False):
        batch.value(start)
        assert obj.value(start) == alone


@pytest.mark.parametrize("method", ["lbfgs", "gd", "adam"])
def test_minimize_finds_the_same_minimum(install: Any, data: Any, start: Any, method: str) -> None:
    options = {"max_iter": 5, "tol": None} if method != "adam" else {"batch_size": 200, "epochs": 2}
    right = gg.minimize(gg.Objective(loss, data, device="cpu"), start, method, **options)
    install(memory=SMALL)
    obj = gg.Objective(loss, data, device="cuda")
    assert obj._streamed
    found = gg.minimize(obj, start, method, **options)
    assert found.nfev == right.nfev
    assert found.fun == pytest.approx(right.fun, rel=1e-5)
    assert_allclose(found.params["w"], right.params["w"], atol=1e-4)
    assert type(found.params["b"]) is float


def test_the_first_bad_row_is_found_in_a_stream(install: Any, data: Any, start: Any) -> None:
    X, y = data
    y[[2500, 1234]] = np.nan
    install(memory=SMALL)
    obj = gg.Objective(loss, (X, y), device="cuda", block_size=100)
    with pytest.raises(gg.NonFiniteLoss, match=r"at row 1234 of the data \(block 12, row 34 in it\)"):
        obj.value(start)


# --- in which order ---------------------------------------------------------------------------------------------


class Journal:
    """Notes when rows are gathered, when a block's compute is launched, and what a copy waits for."""

    def __init__(self, monkeypatch: Any) -> None:
        self.lines: list[str] = []
        self.launched = 0  # compute launched when a copy was handed over, and how much of it the copy waits for
        gather, send = Feeder._gather, Feeder._send

        def noted_gather(feeder: Any, part: Any, rows: int, staged: Any) -> None:
            self.lines.append("gather")
            gather(feeder, part, rows, staged)

        def noted_send(feeder: Any, slot: int, part: Any, room: Any) -> None:
            launched = machine.here.machine.null[0].clock.get(0, 0)
            send(feeder, slot, part, room)
            waits_for = feeder._copies._queue.clock.get(0, 0)
            self.lines.append("copy under compute" if waits_for < launched - 1 else "copy")

        run = DeviceLoss.run

        def noted_run(captured: Any, *arguments: Any, **options: Any) -> Any:
            self.lines.append("compute")
            return run(captured, *arguments, **options)

        monkeypatch.setattr(Feeder, "_gather", noted_gather)
        monkeypatch.setattr(Feeder, "_send", noted_send)
        monkeypatch.setattr(DeviceLoss, "run", noted_run)


def test_the_next_rows_come_under_the_compute(install: Any, data: Any, start: Any, monkeypatch: Any) -> None:
    journal = Journal(monkeypatch)
    cupy = install(memory=SMALL)
    obj = gg.Objective(loss, data, device="cuda", block_size=100)
    obj.value(start)  # makes the buffers
    monkeypatch.setattr(objective, "FEED_BYTES", 100 * 4 * (COLS + 1))
    obj._room.feeders[False].clear()
    journal.lines.clear()
    with cupy.counting() as count:
        obj.evaluate({"w": cupy.asarray(start["w"]), "b": cupy.asarray(np.float32(0))})
    once = ["compute", "gather", "copy under compute"]
    assert journal.lines == ["gather", "copy", *once * 30, "compute"]
    assert count.syncs == 0
    assert count.bytes_to_device >= sum(a.nbytes for a in data)


def test_the_next_mini_batch_comes_under_the_compute(install: Any, data: Any, start: Any, monkeypatch: Any) -> None:
    journal = Journal(monkeypatch)
    cupy = install(memory=SMALL)
    obj = gg.Objective(loss, data, device="cuda", block_size=100)
    params = {"w": cupy.asarray(start["w"]), "b": cupy.asarray(np.float32(0))}
    with cupy.counting() as count:
        for batch in obj.batches(100):
            batch.evaluate(params)
    once = ["compute", "gather", "copy under compute"]
    assert journal.lines == ["gather", "copy", *once * 30, "compute"]
    assert count.syncs == 0


def fed(cupy: Any, fresh: bool) -> None:
    """Feed known rows and compute with them; an AssertionError (Race is one) when something is out of order."""
    rows = np.arange(4000.0).reshape(-1, 4)
    feeder = Feeder([rows], 100, gg.Objective(loss, (cupy.ones(1),)).device, fresh=fresh)
    parts = [slice(start, start + 100) for start in range(0, 1000, 100)]
    sums = []
    for (block,) in feeder.feed(parts):
        sums.append((block * 2.0).sum())
    assert_array_equal([float(s) for s in sums], [2 * rows[part].sum() for part in parts])
    if fresh:
        kept = [block for (block,) in feeder.feed(parts)]  # nothing computes: only the host's wait orders the copies
        assert_array_equal([block.get() for block in kept], [rows[part] for part in parts])


@pytest.mark.parametrize("fresh", [False, True])
def test_a_feed_in_order(install: Any, fresh: bool) -> None:
    cupy = install()
    fed(cupy, fresh)


FAULTS = {
    "compute does not wait for the copy": ("_await_copy", lambda feeder, slot: None),
    "a copy does not wait for compute": ("_note", lambda feeder: machine.Event()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_wait_is_caught(install: Any, fault: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(Feeder, *FAULTS[fault])
    cupy = install()
    with pytest.raises((machine.Race, AssertionError)):
        fed(cupy, fresh=False)


def test_a_pinned_buffer_filled_too_early_is_caught(install: Any, monkeypatch: Any) -> None:
    cupy = install()
    monkeypatch.setattr(machine.Event, "done", True)
    with pytest.raises(AssertionError):
        fed(cupy, fresh=True)


def test_streams_and_devices_of_the_caller(install: Any, data: Any, start: Any) -> None:
    """All work is on the caller's stream and the data's device, whatever device is current."""
    whole = evaluated(LARGE, data, start, block_size=100)
    cupy = install(devices=2, memory=SMALL)
    objectives = [gg.Objective(loss, data, device=f"cuda:{number}", block_size=100) for number in (0, 1)]
    for number, obj in enumerate(objectives):
        same(obj.value_and_grad(start), whole)  # the current device is cuda:0
        with cupy.cuda.Device(number):
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                same(obj.value_and_grad(start), whole)
                list(obj.batches(500))
            same(obj.value_and_grad(start), whole)
    used = [pool.used for pool in machine.here.machine.pools]
    assert used[0] == used[1] > 0


# --- out of memory ----------------------------------------------------------------------------------------------


def wide(p: Any, X: Any, y: Any) -> Any:
    """A loss whose intermediates are much larger than its data, also where it is captured: products need arrays."""
    z = gg.expand_dims(X @ p["w"], axis=1) + np.float32(0)
    z = z * gg.asarray(np.linspace(0, 1, 50, dtype="f4"), device=X.device)
    same = gg.asarray(np.eye(50, dtype="f4"), device=X.device)
    return gg.square(gg.tanh(gg.tanh(z) @ same).sum(axis=1) + p["b"] - y)


def counted(p: Any, x: Any) -> Any:
    """Losses and gradients are whole numbers: what is added twice, or not at all, shows."""
    return gg.expand_dims(p * x, axis=1).sum(axis=1) * gg.asarray(np.ones((1,), "f8"), device=x.device)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_block_that_does_not_fit_is_done_again_in_halves(install: Any, data: Any, start: Any, streamed: bool) -> None:
    data = tuple(a[:600] for a in data)
    right = gg.Objective(wide, data, device="cpu").value_and_grad(start)
    memory = 40_000 if streamed else 160_000
    install(memory=memory)
    obj = gg.Objective(wide, data, device="cuda", block_size=600)
    assert obj._streamed is streamed
    with pytest.warns(DeviceMemoryWarning) as caught:
        first = obj.value_and_grad(start)
    assert len(caught) == 1
    found = re.search(
        r"a block does not fit in cuda:0's memory; going on with blocks of (\d+) rows", str(caught[0].message)
    )
    assert found is not None
    assert 1 <= int(found[1]) < 600
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        again = obj.value_and_grad(start)
        for batch in obj.batches(300):
            batch.value_and_grad(start)
        obj.value(start)
    close(first, right)
    close(again, right)


@pytest.mark.parametrize("limit", range(8000, 40_000, 1500))
def test_nothing_is_added_twice(install: Any, limit: int) -> None:
    """Wherever in a block memory runs out, what it had done so far does not count."""
    x = np.arange(1.0, 801.0)
    cupy = install()
    obj = gg.Objective(counted, (cupy.asarray(x),), reduction="sum", block_size=300)
    pool = cupy.get_default_memory_pool()
    pool.set_limit(size=pool.used_bytes() + limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeviceMemoryWarning)
        value, grads = obj.value_and_grad(np.full((), 3.0))
    assert value == 3 * x.sum()
    assert grads == x.sum()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_mini_batch_that_does_not_fit_has_the_same_mean(install: Any, data: Any, start: Any, streamed: bool) -> None:
    right = [b.value_and_grad(start) for b in gg.Objective(wide, data, device="cpu").batches(2000, seed=4)]
    install(memory=SMALL if streamed else 520_000)
    obj = gg.Objective(wide, data, device="cuda", block_size=2000)
    assert obj._streamed is streamed
    with pytest.warns(DeviceMemoryWarning, match="going on with blocks of"):
        found = [batch.value_and_grad(start) for batch in obj.batches(2000, seed=4)]
    for a, b in zip(found, right, strict=True):
        close(a, b)


def test_minimize_goes_on_after_running_out_of_memory(install: Any, data: Any, start: Any) -> None:
    data = tuple(a[:600] for a in data)
    right = gg.minimize(gg.Objective(wide, data, device="cpu"), start, max_iter=4, tol=None)
    install(memory=160_000)
    with pytest.warns(DeviceMemoryWarning):
        found = gg.minimize(gg.Objective(wide, data, device="cuda", block_size=600), start, max_iter=4, tol=None)
    assert found.fun == pytest.approx(right.fun, rel=1e-5)


def test_a_row_that_does_not_fit_is_an_error_with_the_sizes(install: Any, data: Any) -> None:
    def enormous(p: Any, X: Any) -> Any:
        return gg.sum(X * p, axis=1) * gg.sum(gg.asarray(np.ones(50_000), device=X.device) * p[0])

    install(memory=100_000)
    obj = gg.Objective(enormous, data[0][:100], device="cuda", block_size=64)
    with pytest.raises(DeviceMemoryError) as caught:
        obj.value(np.ones(COLS, "f4"))
    assert isinstance(caught.value, MemoryError)
    message = str(caught.value)
    assert re.search(r"one row does not fit in the memory of cuda:0: .*allocating 40\d,\d{3} bytes", message)
    assert re.search(r"[\d,]+ of 100,000 bytes are free; make the model smaller.*device='cpu'", message)


def test_memory_that_is_short_from_the_start(install: Any, data: Any, start: Any) -> None:
    """The data would fit by the figures, and does not when it is copied: it is streamed."""
    whole = evaluated(LARGE, data, start, block_size=50)
    cupy = install(memory=10 * SMALL)
    pool = cupy.get_default_memory_pool()
    real, pool.get_limit = pool.get_limit, lambda: 0
    try:
        pool.set_limit(size=SMALL)
        obj = gg.Objective(loss, data, device="cuda", block_size=50)
        assert obj._streamed
    finally:
        pool.get_limit = real
    same(obj.value_and_grad(start), whole)


def test_errors_of_the_loss_come_through_and_leave_the_stream_usable(install: Any, data: Any, start: Any) -> None:
    whole = evaluated(LARGE, data, start, block_size=100)
    fail = True

    def moody(p: Any, X: Any, y: Any) -> Any:
        if fail and float(y[0].numpy()) == data[1][1500]:
            raise KeyError("mine")
        return loss(p, X, y)

    install(memory=SMALL)
    obj = gg.Objective(moody, data, device="cuda", block_size=100)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            obj.value_and_grad(start)
    fail = False
    same(obj.value_and_grad(start), whole)
    next(iter(obj.batches(100)))  # left unfinished
    same(obj.value_and_grad(start), whole)


# --- what is given back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["evaluate", "batches", "minimize", "out of memory", "error"])
def test_memory_is_given_back(install: Any, data: Any, start: Any, use: str, monkeypatch: Any) -> None:
    pinned: list[Any] = []
    real = machine.empty_pinned
    cupy = install(memory=SMALL)
    import cupyx

    def noted(shape: Any, dtype: Any) -> Any:
        array = real(shape, dtype)
        root = array.base if array.base is not None else array
        pinned.append(weakref.ref(root))
        return array

    monkeypatch.setattr(cupyx, "empty_pinned", noted)
    obj = gg.Objective(wide if use == "out of memory" else loss, data, device="cuda", block_size=400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeviceMemoryWarning)
        if use == "batches":
            for batch in obj.batches(100):
                batch.value(start)
            del batch
        elif use == "minimize":
            gg.minimize(obj, start, max_iter=2)
        elif use == "error":
            with pytest.raises(TypeError):
                obj.value({"w": start["w"]} | {"b": "x"})
            with pytest.raises(KeyError):
                obj.value({"w": start["w"]})
        else:
            obj.value_and_grad(start)
    assert pinned or use == "error"
    del obj
    gc.collect()
    assert [ref() for ref in pinned if ref() is not None] == []
    assert cupy.get_default_memory_pool().used_bytes() == 0


# --- the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "memory", "streamed"),
    [
        (["--model", "linear"], LARGE, False),
        (["--model", "linear"], 62_000, True),
        (["--hidden", "8", "--batch-size", "100", "--epochs", "2"], LARGE, False),
    ],
)
def test_fit_from_a_table(
    install: Any, rng: Any, tmp_path: Any, capsys: Any, monkeypatch: Any, model: Any, memory: int, streamed: bool
) -> None:
    """`gpugrad fit --device cuda`, end to end: the metrics of the CPU, and no wait within an epoch."""
    x = rng.normal(size=(2000, 5))
    np.save(tmp_path / "table.npy", np.column_stack([x, x @ [3.0, -1.0, 0.5, 0.0, 2.0] + rng.normal(size=2000)]))
    arguments = ["fit", str(tmp_path / "table.npy"), "--target", "x5", *model, "--json", str(tmp_path / "report.json")]

    def metrics(device: str) -> tuple[dict[str, float], int]:
        assert main([*arguments, "--device", device]) == 0, capsys.readouterr().err
        report = json.loads((tmp_path / "report.json").read_text())
        return report["metrics"]["test"], len(report["history"]["loss"])

    right, _ = metrics("cpu")
    cupy = install(memory=memory)
    feeds: list[bool] = []
    monkeypatch.setattr(Feeder, "feed", lambda *args, real=Feeder.feed: feeds.append(True) or real(*args))
    with cupy.counting() as count:
        found, epochs = metrics("cuda")
    assert bool(feeds) is streamed
    assert found == pytest.approx(right, rel=1e-4)
    assert count.syncs <= 3 * epochs + 10  # one for the epoch, the rest for what is shown of it


# --- the caller changes streams --------------------------------------------------------------------------------------


def per_row(w: Any, X: Any) -> Any:
    return gg.swish(X @ w)


def on_streams(cupy: Any, objective: Any, order: str) -> list[float]:
    """Evaluate once on each of the streams named by letters, with nothing waited for in between."""
    streams = {name: cupy.cuda.Stream(non_blocking=True) for name in sorted(set(order))}
    found = []
    for name in order:
        with streams[name]:
            found.append(objective.evaluate(np.ones(50, "float32"))[0])
    cupy.cuda.runtime.deviceSynchronize()
    return [float(value) for value in found]


@pytest.mark.parametrize(("memory", "streamed"), [(None, False), (500_000, True)])
def test_evaluations_on_changing_streams(install: Any, memory: int | None, streamed: bool) -> None:
    """Neither the upload of the data nor the buffers of a feed may be overtaken; a race raises."""
    cupy = install() if memory is None else install(memory=memory)
    X = np.random.default_rng(0).normal(size=(3000, 50)).astype("float32")
    objective = gg.Objective(per_row, (X,), device="cuda", block_size=300)
    assert objective._streamed is streamed
    values = on_streams(cupy, objective, "abab")
    want = float(np.mean(np.asarray(gg.swish(X @ np.ones(50, "float32"))), dtype=np.float64))
    np.testing.assert_allclose(values, want, rtol=1e-6)


def test_batches_evaluated_on_another_stream(install: Any) -> None:
    cupy = install()
    X = np.random.default_rng(0).normal(size=(900, 50)).astype("float32")
    objective = gg.Objective(per_row, (X,), device="cuda")
    for batch in objective.batches(300):
        (value,) = on_streams(cupy, batch, "a")
        assert np.isfinite(value)
