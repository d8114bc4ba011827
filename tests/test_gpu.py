"""What only a GPU can show: real streams and waiting, cuBLAS, memory, sizes beyond 32 bits. Each test is marked `gpu`.

Those that can be run on the stand-in for CuPy run there too, so that they are known to run before they meet a card.
"""

import contextlib
import gc
import threading
import time
import warnings

import numpy as np
import pytest
from devices import host, problem
from fused import every_layout, logistic, squares

import gpugrad as gg
from gpugrad import backend, kernels
from gpugrad.cli import main
from gpugrad.compile import cuda_code
from gpugrad.compile.scalar import run
from gpugrad.errors import DeviceMemoryWarning, DeviceMismatch

SINGLE = np.float32
SPIN = r"""
extern "C" __global__ void spin(unsigned long long nanoseconds, float* x, float value, int count) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
  for (int i = threadIdx.x; i < count; i += blockDim.x) x[i] = value;
}
"""


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def cupy(request):
    """CuPy on a GPU, or its stand-in, with nothing left from other tests."""
    if missing := problem(request.param):
        pytest.skip(missing)
    with contextlib.ExitStack() as stack:
        if request.param == "stand-in":
            from cuda_proof import stand_in

            stack.enter_context(stand_in.install(devices=2))
        gc.collect()
        yield backend.cupy()


@pytest.fixture
def card(request):
    """CuPy on a GPU; its test needs the real thing."""
    if missing := problem("cuda"):
        pytest.skip(missing)
    gc.collect()
    module = backend.cupy()
    yield module
    module.get_default_memory_pool().free_all_blocks()


gpu = pytest.mark.gpu


def free_bytes(cupy):
    """Return the memory that is to be had."""
    cupy.get_default_memory_pool().free_all_blocks()
    return cupy.cuda.runtime.memGetInfo()[0]


def needs(cupy, gigabytes):
    """Skip where the device has less free memory than that."""
    free = free_bytes(cupy) / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of device memory, {free:.1f} are free")


@contextlib.contextmanager
def room(cupy, size):
    """Leave the pool no more than `size` bytes above what is in use."""
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + size)
    try:
        yield
    finally:
        pool.set_limit(size=0)


def network(cupy, rows=512, sizes=(16, 32, 32, 1), dtype=SINGLE):
    """Parameters, X and y on the device, and the loss of each row."""
    rng = np.random.default_rng(0)
    params = gg.nn.init_mlp(sizes, dtype=dtype, device="cuda")
    X, y = (cupy.asarray(rng.normal(size=s).astype(dtype)) for s in ((rows, sizes[0]), (rows,)))
    return params, X, y


def row_losses(params, X, y):
    return gg.squared_error(gg.nn.mlp(params, X)[:, 0], y)


def step(params, X, y, optimizer):
    """Forward, backward and update; the value and the new parameters."""
    value, slopes = gg.value_and_grad(lambda p: gg.mean(row_losses(p, X, y)))(params)
    return value, optimizer.step(params, slopes)


def leaves(params):
    return [host(layer[key]) for layer in params for key in ("W", "b")]


# --- everything, briefly --------------------------------------------------------------------------------


@gpu
def test_selftest(card, capsys):
    """The command that a user has says yes; it runs every kernel and op against float64."""
    status = main(["selftest", "--device", "cuda", "--quick"])
    assert status == 0, capsys.readouterr().out


def test_a_fit_from_files(cupy, tmp_path):
    """The command line trains on the device, and its predictions are those of the CPU."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 4))
    table = {f"x{k}": X[:, k] for k in range(4)} | {"y": X @ [1.0, -2.0, 0.5, 3.0] + 0.1 * rng.normal(size=600)}
    np.savez(tmp_path / "d.npz", **table)
    model = tmp_path / "m.safetensors"
    data = str(tmp_path / "d.npz")
    options = ["--target", "y", "--hidden", "8", "--epochs", "2", "--device", "cuda", "--out", str(model)]
    assert main(["fit", data, *options]) == 0
    for device in ("cpu", "cuda"):
        assert main(["predict", str(model), data, "--device", device, "--out", str(tmp_path / f"{device}.npy")]) == 0
    on_cpu, on_gpu = np.load(tmp_path / "cpu.npy"), np.load(tmp_path / "cuda.npy")
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-5 * np.max(np.abs(on_cpu)))


# --- numbers that libraries and hardware make -------------------------------------------------------------


def test_matrix_products_keep_all_digits(cupy):
    """TF32, which keeps 10 bits, is off unless CUPY_TF32=1 asks for it."""
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=(300, 300)).astype(SINGLE) for _ in range(2))
    got = host(gg.matmul(cupy.asarray(a), cupy.asarray(b)))
    want = a.astype(float) @ b
    assert np.max(np.abs(got - want)) < 2e-6 * np.max(np.abs(want)) * np.sqrt(300)


def test_half_precision_products_accumulate_in_single(cupy):
    """2,049 ones do not fit float16's digits one by one."""
    a = cupy.ones((4, 4096), dtype="float16") / 2
    np.testing.assert_array_equal(host(gg.matmul(a, a.T)), np.full((4, 4), 1024, "float16"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_same_bits_every_time(cupy, dtype):
    """Sums have a fixed order: no atomics on floating point."""
    params, X, y = network(cupy, rows=3001, dtype=np.dtype(dtype))
    x = cupy.asarray(np.random.default_rng(2).normal(size=(5003, 33)).astype(dtype))
    beta = cupy.asarray(np.linspace(0.5, 2, 33).astype(dtype))
    objective = gg.Objective(row_losses, (X, y), device="cuda", block_size=700)

    def once():
        value, slopes = objective.value_and_grad(params)
        _, pull = gg.vjp(gg.swish, x, beta)
        _, pull_one = gg.vjp(gg.swish, x, cupy.asarray(np.array(1.5, dtype)))
        return [np.float64(value), *leaves(slopes), host(pull(x)[1]), host(pull_one(x)[1]), host(gg.sum(x))]

    first = once()
    for _ in range(5):
        for one, two in zip(first, once(), strict=True):
            np.testing.assert_array_equal(one, two)


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("columns", [1, 4, 8, 32, 33, 100, 512, 1000])
@pytest.mark.parametrize("make", [logistic, squares])
def test_generated_passes_over_rows(cupy, make, columns, dtype):
    """Loss and gradient in float64 on the host; the same bits again, and as a graph."""
    kernel = make(columns, dtype)
    code = cuda_code.row_pass(kernel)
    if code is None:
        assert (columns, dtype) == (1000, "float64")
        return
    n = 3001 if hasattr(cupy, "counting") else 20_000_000 // (columns + 100)
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(n, columns)).astype(dtype)
    w, y = (rng.normal(size=columns) / np.sqrt(columns)).astype(dtype), rng.uniform(size=n).astype(dtype)
    z = x.astype(float) @ w.astype(float)
    loss, slope = run([kernel.sums[0], kernel.back[0][1]], [z, y.astype(float)])
    value, g = cupy.empty(()), cupy.empty(columns)
    given = [cupy.asarray(x)], [cupy.asarray(w)], [cupy.asarray(y)], [], []
    bound = code.bind(*given, [("sum", 0, 1 / n, value), ("back", 0, 1 / n, g)])
    bound()
    near = 1e-12 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(value.get(), np.mean(loss), rtol=near)
    np.testing.assert_allclose(g.get(), x.astype(float).T @ slope / n, rtol=near, atol=near)
    before = value.get(), g.get()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        bound()
        graph = stream.end_capture()
    for again in (bound, graph.launch):
        value.fill(0)
        g.fill(0)
        again()
        np.testing.assert_array_equal(value.get(), before[0])
        np.testing.assert_array_equal(g.get(), before[1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sums", [(), ("all", "rows", "rows"), ("columns", "all")], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1_000_003), (200_003, 8), (7001, 33), (301, 2056)])
def test_generated_loops(cupy, sums, dtype, rows, columns):
    if hasattr(cupy, "counting"):
        rows, columns = min(rows, 301), min(columns, 2056)
    kernel = every_layout(sums, dtype)
    rng = np.random.default_rng(rows)
    given = [rng.normal(size=shape).astype(dtype) for shape in ((rows, columns), (columns,), (rows,))]
    outputs = [cupy.empty((rows, columns), dtype=dtype) for _ in range(2)]
    made = cuda_code.loop(kernel)([*map(cupy.asarray, given), 0.7], outputs, rows, columns)
    x, row, column = (a.astype(float) for a in given)
    number = float(np.dtype(dtype).type(0.7))
    want = run([*kernel.outputs, *(e for e, _ in kernel.sums)], [x, row, column[:, None], number])
    near = 1e-13 if dtype == "float64" else 1e-6
    for out, exact in zip(outputs, want, strict=False):
        np.testing.assert_allclose(out.get(), exact, rtol=near, atol=4 * near)
    for total, over, terms in zip(made, sums, want[2:], strict=True):
        axis = {"all": None, "rows": 0, "columns": 1}[over]
        terms = np.broadcast_to(terms, (rows, columns))
        exact, size = terms.sum(axis), np.abs(terms).sum(axis)
        assert np.all(np.abs(total.get() - exact) <= near * (np.abs(exact) + size))


@pytest.mark.parametrize(("rows", "columns"), [(5_000_000, 8), (2, 3_000_000), (300_000, 1), (70_001, 257)])
def test_sums_over_shapes_at_the_limits_of_a_grid(card, rows, columns):
    needs(card, 2)
    x = (card.arange(rows * columns, dtype="float32") % 1001 / 500 - 1).reshape(rows, columns)
    g = (card.arange(rows * columns, dtype="float32") % 7 - 3).reshape(rows, columns)
    dx, db = kernels.bias_relu_backward(g, x)
    want = card.where(x > 0, g, 0)
    assert bool((dx == want).all())
    size = card.abs(want).sum(axis=0, dtype="float64")
    assert bool((card.abs(db - want.sum(axis=0, dtype="float64")) <= 1e-6 * size).all())
    dx, total = kernels.swish_backward_sum(g, x, 1.25)
    _, terms = kernels.swish_backward_both(g, x, 1.25)
    assert abs(float(total) - float(terms.sum(dtype="float64"))) <= 1e-6 * float(card.abs(terms).sum(dtype="float64"))


@gpu
@pytest.mark.parametrize("function", ["relu", "swish"])
def test_more_than_two_to_the_31_elements(card, function):
    """Indices are 64 bits wide: the last elements are right, and so are those where 32 bits would wrap."""
    needs(card, 14)
    n = 2**31 + 1001
    x = card.empty(n, dtype="float16")
    pattern = card.asarray(np.random.default_rng(3).normal(size=1 << 20).astype("float16"))
    for start in range(0, n, pattern.size):
        x[start : start + pattern.size] = pattern[: min(pattern.size, n - start)]
    y = getattr(gg, function)(x)
    want = getattr(gg, function)(pattern)
    assert y.shape == (n,)
    for start in {0, 2**31 - pattern.size, 2**31, (n // pattern.size - 1) * pattern.size}:
        count = min(pattern.size, n - start)
        assert bool((y[start : start + count] == want[:count]).all()), f"wrong from element {start}"


@gpu
def test_a_sum_over_more_than_two_to_the_31_elements(card):
    needs(card, 36)
    rows, columns = 2**26 + 3, 32
    x = card.ones((rows, columns), dtype="float16")
    g = card.empty((rows, columns), dtype="float32")
    g[...] = card.arange(columns, dtype="float32") % 3 - 1
    x[-1] = -1  # whose cotangents do not count
    _, db = kernels.bias_relu_backward(g, x)
    np.testing.assert_allclose(host(db), (np.arange(columns) % 3 - 1.0) * (rows - 1), rtol=1e-7)


# --- streams, and waiting for none ------------------------------------------------------------------------


def test_work_goes_to_the_current_stream(cupy):
    """On a stream of one's own everything comes out as on the default one."""
    params, X, y = network(cupy)
    value, new = step(params, X, y, gg.optim.Adam(1e-2))
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        other, other_new = step(params, X, y, gg.optim.Adam(1e-2))
    stream.synchronize()
    np.testing.assert_array_equal(host(value), host(other))
    for a, b in zip(leaves(new), leaves(other_new), strict=True):
        np.testing.assert_array_equal(a, b)


@gpu
def test_two_threads_with_a_stream_each(card):
    params, X, y = network(card)
    wanted = [leaves(step(params, X, y, gg.optim.Adam(rate))[1]) for rate in (1e-2, 1e-3)]
    card.cuda.runtime.deviceSynchronize()
    found = {}

    def work(k, rate):
        with card.cuda.Device(0), card.cuda.Stream(non_blocking=True) as stream:
            for _ in range(5):
                _, new = step(params, X, y, gg.optim.Adam(rate))
            stream.synchronize()
            found[k] = leaves(new)

    threads = [threading.Thread(target=work, args=(k, rate)) for k, rate in enumerate((1e-2, 1e-3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, want in enumerate(wanted):
        for a, b in zip(found[k], want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def spin(card):
    """A kernel that keeps one stream busy, then writes; warm."""
    kernel = card.RawKernel(SPIN, "spin")
    nothing = card.zeros(1, dtype="float32")

    def launch(seconds, x=nothing, value=0.0):
        kernel((1,), (256,), (np.uint64(seconds * 1e9), x, np.float32(value), np.int32(x.size)))

    launch(0.0)
    card.cuda.runtime.deviceSynchronize()
    return launch


@gpu
def test_forward_backward_and_update_wait_for_nothing(card, spin):
    """Behind a stream that is busy for a second, the host is through long before it."""
    params, X, y = network(card)
    optimizer = gg.optim.Adam(1e-3)
    objective = gg.Objective(row_losses, (X, y), device="cuda")

    def whole():
        _, new = step(params, X, y, optimizer)
        _, slopes = objective.evaluate(new)
        return optimizer.step(new, slopes)

    for _ in range(3):
        whole()  # compiles, and fills the pool
    card.cuda.runtime.deviceSynchronize()
    spin(1.0)
    began = time.perf_counter()
    whole()
    took = time.perf_counter() - began
    busy = not card.cuda.get_current_stream().done
    card.cuda.runtime.deviceSynchronize()
    assert busy, f"after {took:.2f} s on the host the device was through: something waited for it"
    assert took < 0.7


@gpu
def test_one_stream_does_not_hold_up_another(card, spin):
    params, X, y = network(card)
    step(params, X, y, gg.optim.Adam(1e-3))
    busy, mine = (card.cuda.Stream(non_blocking=True) for _ in range(2))
    with mine:
        step(params, X, y, gg.optim.Adam(1e-3))  # this stream's own pool of memory
    card.cuda.runtime.deviceSynchronize()
    with busy:
        spin(1.0)
    with mine:
        step(params, X, y, gg.optim.Adam(1e-3))
    mine.synchronize()
    held_up = busy.done
    busy.synchronize()
    assert not held_up, "the work on one stream waited for the other"


@gpu
def test_work_waits_for_what_the_stream_did_before(card, spin):
    """What a slow kernel on the current stream writes is what gpugrad reads."""
    x = card.zeros(1000, dtype="float32")
    gg.swish(x, 1.0)
    card.cuda.runtime.deviceSynchronize()
    with card.cuda.Stream(non_blocking=True) as stream:
        spin(0.3, x, 2.0)
        y = gg.relu(x)
        z, pull = gg.vjp(lambda t: gg.swish(t, 1.0), x)
        (dx,) = pull(y)
    stream.synchronize()
    np.testing.assert_array_equal(host(y), np.full(1000, 2, SINGLE))
    s = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(host(z), 2 * s, rtol=1e-6)
    np.testing.assert_allclose(host(dx), 2 * s * (1 + 2 * (1 - s)), rtol=1e-6)


# --- memory -----------------------------------------------------------------------------------------------


def test_memory_goes_back(cupy):
    """Twenty steps hold what one holds, and nothing is left when their results are gone."""
    pool = cupy.get_default_memory_pool()
    params, X, y = network(cupy)
    optimizer = gg.optim.Adam(1e-3)
    step(params, X, y, optimizer)
    gc.collect()
    gc.disable()  # by counting references alone
    try:
        before = pool.used_bytes()
        new, held = params, set()
        for _ in range(20):
            new = step(new, X, y, optimizer)[1]
            held.add(pool.used_bytes())
        del new
        after = pool.used_bytes()
    finally:
        gc.enable()
    assert after == before
    assert len(held) <= 2


def test_data_larger_than_the_memory(cupy):
    """Streamed through a quarter of the room that it would take, with the numbers of data that fits."""
    rng = np.random.default_rng(4)
    rows = 50_001
    X, y = rng.normal(size=(rows, 16)).astype(SINGLE), rng.normal(size=rows).astype(SINGLE)
    params = gg.nn.init_mlp([16, 8, 1], device="cuda")
    value, slopes = gg.Objective(row_losses, (cupy.asarray(X), cupy.asarray(y)), device="cuda").value_and_grad(params)
    with room(cupy, X.nbytes // 4):
        objective = gg.Objective(row_losses, (X, y), device="cuda")
        assert not any(backend.is_cuda_array(a) for a in objective.data)
        for _ in range(3):
            streamed, streamed_slopes = objective.value_and_grad(params)
            assert streamed == pytest.approx(value, rel=1e-6)
            for a, b in zip(leaves(streamed_slopes), leaves(slopes), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))


def test_a_block_that_does_not_fit_is_halved(cupy):
    rows = 60_000
    params, X, y = network(cupy, rows=rows, sizes=(16, 64, 1))
    value, _ = gg.Objective(row_losses, (X, y), device="cuda", block_size=1000).value_and_grad(params)
    objective = gg.Objective(row_losses, (X, y), device="cuda", block_size=rows)
    with room(cupy, rows * 64 * 4), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            halved, _ = objective.value_and_grad(params)
            assert halved == pytest.approx(value, rel=1e-6)
    assert [w.category for w in said] == [DeviceMemoryWarning]


# --- launches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: gg.optim.SGD(1e-3, momentum=0.9), lambda: gg.optim.Adam(1e-3)])
def test_an_update_is_one_launch(cupy, make, monkeypatch):
    """For all parameters of a dtype together, whatever their shapes."""
    params, X, y = network(cupy)
    optimizer = make()
    _, slopes = gg.value_and_grad(lambda p: gg.mean(row_losses(p, X, y)))(params)
    optimizer.step(params, slopes)
    launched, launch = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda name, *rest: (launched.append(name), launch(name, *rest)))
    optimizer.step(params, slopes)
    assert len(launched) == 1


def test_updates_can_be_captured_in_a_graph(cupy):
    """An update is kernels of gpugrad's alone: no library call, no copy, no wait stands in a capture's way."""
    w = [cupy.ones(1000, dtype="float32"), cupy.ones((3, 5), dtype="float32")]
    g = [cupy.full(a.shape, 0.5, dtype="float32") for a in w]
    state = [[cupy.zeros_like(a)] for a in w]
    options = {"rate": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "scale": None}
    kernels.sgd_update(w, g, state, **options)
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        kernels.sgd_update(w, g, state, **options)  # this stream's memory
        for s in state:
            s[0][...] = 0
        stream.synchronize()
        stream.begin_capture()
        out = kernels.sgd_update(w, g, state, **options)
        graph = stream.end_capture()
        for _ in range(2):
            graph.launch(stream)
        stream.synchronize()
    velocity = 0.9 * 0.5 + 0.5
    for a, s in zip(out, state, strict=True):
        np.testing.assert_allclose(host(s[0]), velocity, rtol=1e-6)
        np.testing.assert_allclose(host(a), 1 - 0.1 * velocity, rtol=1e-6)


# --- other libraries, several GPUs ------------------------------------------------------------------------


@gpu
def test_torch_tensors_both_ways(card):
    torch = pytest.importorskip("torch", reason="PyTorch is the other library")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch sees no GPU")
    theirs = torch.arange(6.0, device="cuda").reshape(2, 3)
    ours = gg.asarray(theirs)
    assert ours.device == f"cuda:{theirs.device.index}"
    theirs[0, 0] = 7.0
    torch.cuda.synchronize()
    np.testing.assert_array_equal(host(ours), [[7, 1, 2], [3, 4, 5]])
    back = torch.from_dlpack(gg.swish(gg.tensor(ours), 1.0))
    np.testing.assert_allclose(back.cpu().numpy(), torch.nn.functional.silu(theirs).cpu().numpy(), rtol=1e-6)
    assert back.is_cuda
    x = theirs.clone().requires_grad_()
    torch.nn.functional.silu(x).sum().backward()
    slope = gg.grad(lambda t: gg.sum(gg.silu(t)))(gg.asarray(theirs))
    np.testing.assert_allclose(host(slope), x.grad.cpu().numpy(), rtol=1e-5, atol=1e-7)


def test_several_gpus_do_not_mix(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    rng = np.random.default_rng(5)
    x = rng.normal(size=(7, 5)).astype(SINGLE)
    first, second = (gg.asarray(x, device=f"cuda:{k}") for k in (0, 1))
    with pytest.raises(DeviceMismatch, match="cuda:0"):
        first + second
    for t in (first, second):
        slope = gg.grad(lambda t: gg.sum(gg.swish(t, 1.0)))(t)
        assert slope.device == t.device
        z = x.astype(float)
        s = 1 / (1 + np.exp(-z))
        np.testing.assert_allclose(host(slope), s * (1 + z * (1 - s)), rtol=1e-5, atol=1e-6)
