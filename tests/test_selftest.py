"""`gpugrad selftest`: it passes here, and every kind of fault makes it fail and is named."""

import contextlib
import functools
import json

import numpy as np
import pytest

import gpugrad as gg
from gpugrad import backend, declare, kernels, objective, stream
from gpugrad.cli import main, selftest_cuda, selftest_ops, selftest_report, selftest_sums
from gpugrad.cli.selftest import misses as misses_of
from gpugrad.op import registry


def selftest(capsys, *arguments):
    """Run the command on the CPU; returns exit status, stdout and stderr."""
    status = main(["selftest", "--device", "cpu", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def misses(capsys, *arguments):
    """Run a self-test that must fail; returns its lines about what missed."""
    status, out, err = selftest(capsys, "--quick", *arguments)
    assert (status, err) == (1, "")
    lines = [line for line in out.splitlines() if line.startswith("MISS")]
    assert lines
    assert "checks missed" in out.splitlines()[-1]
    return lines


# --- the command --------------------------------------------------------------------------------------


def test_passes_here(capsys):
    status, out, err = selftest(capsys)
    assert (status, err) == (0, ""), out
    assert "all " in out.splitlines()[-1]
    for row in ("sums", "layouts", "models", "optimisers", "finite sums", "regressions", "ops, float16", "differences"):
        assert row in out


def test_quick_is_less_of_the_same(capsys):
    counts = []
    for arguments in (["--quick"], []):
        status, out, _ = selftest(capsys, *arguments, "--json", "-")
        report = json.loads(out)
        assert (status, report["passed"], report["device"]) == (0, True, "cpu")
        counts.append({group["name"]: group["checks"] for group in report["groups"]})
    quick, full = counts
    assert set(quick) <= set(full)
    assert all(0 < quick[name] <= full[name] for name in quick)
    assert sum(quick.values()) < 0.5 * sum(full.values())


def test_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    status, out, _ = selftest(capsys, "--quick", "--json", str(path))
    report = json.loads(path.read_text())
    assert status == 0
    assert out.startswith("gpugrad ")
    assert report["versions"]["numpy"] == np.__version__
    assert {"name", "checks", "worst", "seconds", "misses"} == set(report["groups"][0])
    assert all(0 <= group["worst"] <= 1 for group in report["groups"])


def test_device_that_is_not_there(capsys):
    status = main(["selftest", "--device", "cuda:99"])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith("gpugrad selftest: device")


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--fast"], ["cpu"]])
def test_bad_usage(arguments, capsys):
    assert main(["selftest", *arguments]) == 2
    assert capsys.readouterr().err.startswith("gpugrad")


# --- what it compares with ----------------------------------------------------------------------------


def test_every_op_has_a_formula_of_its_own():
    """An op with none would be compared with itself alone; an elementwise one needs one without NumPy's mathematics."""
    assert [name for name, op in registry.items() if selftest_ops.reference(op) is None] == []
    elementwise = {name for name, op in registry.items() if op.kind == "elementwise"}
    assert elementwise - set(selftest_ops.SCALAR) == set()
    assert (set(selftest_ops.SCALAR) | set(selftest_ops.WHOLE)) - set(registry) == set()


def test_every_op_is_called():
    assert [op.name for op in registry.values() if op.kind != "nondiff" and not selftest_ops.calls_of(op, True)] == []


# --- planted faults -----------------------------------------------------------------------------------


def redeclare(monkeypatch, name, forward):
    """Put an op in the registry that has another forward under the same name."""
    old = registry[name]
    monkeypatch.delitem(registry, name)
    declare.elementwise(name, forward=forward, partials=old.partials, domain=old.domain, doc=old.doc)


def off_in(dtype, amount):
    """exp, off by a factor in one dtype alone."""

    def forward(xp, x):
        y = xp.exp(x)
        return y * y.dtype.type(1 + amount) if y.dtype == dtype else y

    return forward


@pytest.mark.parametrize(("dtype", "amount"), [("float64", 1e-13), ("float32", 5e-5)])
def test_wrong_value_in_one_dtype(dtype, amount, monkeypatch, capsys):
    redeclare(monkeypatch, "exp", off_in(dtype, amount))
    lines = misses(capsys)
    assert any(f"exp (131,) {dtype}: value: got" in line for line in lines)
    assert all(line.split(": ")[1].startswith("exp ") for line in lines)


def test_wrong_value_that_keeps_its_slope(monkeypatch, capsys):
    """x + y + 1 has the gradient of x + y: only an independent formula sees it."""
    redeclare(monkeypatch, "add", lambda xp, x, y: x + y + 1)
    assert any("ops, float64: add" in line for line in misses(capsys))


@pytest.mark.parametrize("name", ["sum", "matmul", "cholesky", "getitem", "greater"])
def test_wrong_value_of_a_whole_array(name, monkeypatch, capsys):
    op = registry[name]
    forward = op.forward
    wrong = (lambda *a, **k: ~forward(*a, **k)) if op.kind == "nondiff" else (lambda *a, **k: forward(*a, **k) + 1e-3)
    monkeypatch.setattr(op, "forward", wrong)
    assert any(f": {name} " in line for line in misses(capsys))


@pytest.mark.parametrize(("name", "argument"), [("tanh", 0), ("divide", 1), ("hypot", 0)])
def test_wrong_partial(name, argument, monkeypatch, capsys):
    op = registry[name]
    rules = list(op.partials)
    rule = rules[argument]
    rules[argument] = lambda y, *x: 1.001 * rule(y, *x)
    monkeypatch.setattr(op, "partials", tuple(rules))
    lines = misses(capsys)
    assert any("differences" in line and f": {name} " in line for line in lines)


def test_wrong_transpose(monkeypatch, capsys):
    op = registry["roll"]
    monkeypatch.setattr(op, "vjps", (lambda g, _y, _x, *, shift, axis: op.function(g, shift=shift, axis=axis),))
    assert any("differences" in line and ": roll " in line for line in misses(capsys))


def test_an_op_that_raises_is_a_miss(monkeypatch, capsys):
    def refuse(xp, x):
        raise RuntimeError("no such instruction\non this processor")

    redeclare(monkeypatch, "sin", refuse)
    assert any("sin (131,) float32: error: got RuntimeError: no such instruction, wanted" in x for x in misses(capsys))


def test_nan_is_a_miss(monkeypatch, capsys):
    redeclare(monkeypatch, "cos", lambda xp, x: xp.cos(x) + np.where(x > 2, np.nan, 0))
    assert any("cos (131,)" in line and "not finite alike" in line for line in misses(capsys))


def test_wrong_dtype_is_a_miss(monkeypatch, capsys):
    redeclare(monkeypatch, "negative", lambda xp, x: (-x).astype("float64"))
    assert any("got float64 of shape (131,), wanted float32" in line for line in misses(capsys))


def test_sum_that_loses_digits(monkeypatch, capsys):
    """One after the other in float32."""
    monkeypatch.setattr(
        registry["sum"], "forward", lambda xp, x, *, axis=None, keepdims=False: np.cumsum(x, axis=axis or 0)[-1]
    )
    assert any("MISS sums: sum of" in line for line in misses(capsys))


def test_sum_in_a_random_order(monkeypatch, capsys):
    """Right to rounding, and different each time."""
    forward, rng = registry["sum"].forward, np.random.default_rng()

    def shuffled(xp, x, *, axis=None, keepdims=False):
        if x.ndim == 1 and x.dtype == np.float32 and axis is None and not keepdims:
            return np.float32(np.cumsum(rng.permutation(x))[-1])
        return forward(xp, x, axis=axis, keepdims=keepdims)

    monkeypatch.setattr(registry["sum"], "forward", shuffled)
    assert any("the same bits" in line for line in misses(capsys))


def test_layout_that_is_misread(monkeypatch, capsys):
    op = registry["relu"]
    redeclare(monkeypatch, "relu", lambda xp, x: xp.maximum(np.ravel(x, order="K").reshape(x.shape), 0))
    monkeypatch.setattr(gg, "relu", registry["relu"].function)
    assert op is not registry["relu"]
    lines = misses(capsys)
    assert any("layouts of memory: relu float32, by columns" in line for line in lines)
    assert not any("in order" in line for line in lines)


def test_network_whose_gradient_is_off(monkeypatch, capsys):
    def wrong(params, X, activation=gg.swish):
        for layer in params[:-1]:
            X = activation(X @ layer["W"] + layer["b"])
        return X @ params[-1]["W"].detach() + params[-1]["b"]

    exact = gg.nn.mlp
    monkeypatch.setattr(gg.nn, "mlp", lambda p, X, f: (exact if X.dtype == np.float64 else wrong)(p, X, f))
    assert any("models: network with swish, float32: gradient" in line for line in misses(capsys))


def test_optimiser_that_forgets_a_correction(monkeypatch, capsys):
    step = gg.optim.Adam.step

    def wrong(self, params, grads):
        result = step(self, params, grads)
        self.count = 1
        return result

    monkeypatch.setattr(gg.optim.Adam, "step", wrong)
    lines = misses(capsys)
    assert any("optimisers: Adam, float32: parameter 0" in line for line in lines)
    assert not any("SGD" in line for line in lines)


def test_block_left_out(monkeypatch, capsys):
    class Short(gg.Objective):
        def __init__(self, loss, data, *, block_size="auto", **options):
            if block_size == 64:
                data = tuple(array[:-64] for array in data)
            super().__init__(loss, data, block_size=block_size, **options)

    monkeypatch.setattr(gg, "Objective", Short)
    lines = misses(capsys)
    assert any("finite sums: least squares float32, block_size 64: value" in line for line in lines)
    assert all("block_size 64" in line for line in lines)


def test_minimum_not_reached(monkeypatch, capsys):
    found = gg.minimize

    def wrong(*arguments, **options):
        result = found(*arguments, **options)
        result.params = result.params * 1.1
        return result

    monkeypatch.setattr(gg, "minimize", wrong)
    assert any("regressions: lbfgs float64" in line for line in misses(capsys))


def test_a_row_lists_no_end_of_misses(monkeypatch, capsys):
    monkeypatch.setattr("gpugrad.cli.selftest.MISSES_SHOWN", 0)
    redeclare(monkeypatch, "exp", lambda xp, x: 2 * xp.exp(x))
    assert any(line.endswith(": and 1 more") for line in misses(capsys))


def test_layouts_hold_the_same_numbers(rng):
    x = rng.normal(size=(3, 5))
    run = selftest_report.Run(gg.get_device(), True, lambda _: None)
    laid = selftest_sums.views(run, x)
    assert len({(v.strides, v.ctypes.data % 16) for v in laid.values()}) == len(laid)
    for view in laid.values():
        np.testing.assert_array_equal(view, x)


# --- on the stand-in for CuPy ---------------------------------------------------------------------------


@pytest.fixture
def on_device(stand_in):
    """Run one part of the self-test on the stand-in; returns the lines about what missed."""

    def check(part, quick=True):
        run = selftest_report.Run(backend.as_device("cuda"), quick, lambda _: None)
        part(run)
        assert all(group.checks for group in run.groups)
        return list(misses_of(run.groups))

    return check


def test_passes_on_the_stand_in(stand_in, capsys):
    status = main(["selftest", "--device", "cuda", "--quick"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, ""), out
    for row in ("kernels, float16", "memory", "short of memory", "ops, float32"):
        assert row in out


def test_every_kernel_is_launched(on_device, monkeypatch):
    """In every form and data type, also when there is little time."""
    launched, build = set(), kernels.Kernel.object
    monkeypatch.setattr(kernels.Kernel, "object", lambda self: (launched.add(self), build(self))[1])
    assert on_device(selftest_cuda.every_kernel) == []
    assert set(kernels.every()) - launched == set()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("relu", "y = x > A(0) ? A(x) : A(0);"),  # loses NaN
        ("swish", "y = A(x) / (A(1) + gpugrad::exponential(-beta * A(x)));"),  # overflows in the tail
        ("squared_error", "loss = (A(eta) - A(target)) * (A(eta) - A(target)); slope = A(eta) - A(target);"),
    ],
)
def test_wrong_kernel(name, body, on_device, monkeypatch):
    monkeypatch.setitem(kernels.POINTWISE, name, kernels.POINTWISE[name]._replace(body=body))
    monkeypatch.setattr(kernels, "_built", functools.cache(kernels._built.__wrapped__))
    missed = on_device(lambda run: selftest_cuda.every_kernel(run, [selftest_report.SINGLE]))
    assert missed
    assert all(f": {name} float" in line for line in missed if "and " not in line)


def test_kernel_that_takes_nothing(on_device, monkeypatch):
    """A launch that always leaves the work to the plain formula is a kernel that nobody has."""
    monkeypatch.setattr(kernels, "swish_backward", lambda *_: None)
    missed = on_device(selftest_cuda.every_kernel)
    assert any("swish_backward float32" in line and "did not take" in line for line in missed)


def test_sum_with_other_bits_each_time(on_device, monkeypatch):
    exact, calls = kernels.bias_relu_backward, []

    def wrong(g, y):
        dx, db = exact(g, y)
        calls.append(1)
        return dx, db * db.dtype.type(1 + 2e-7 * (len(calls) % 2))

    monkeypatch.setattr(kernels, "bias_relu_backward", wrong)
    assert any("the same bits twice" in line for line in on_device(selftest_cuda.every_kernel))


def test_kernel_that_nothing_checks(on_device, monkeypatch):
    every = list(kernels.every())
    monkeypatch.setattr(kernels, "every", lambda: iter([*every, every[0]._replace(name="gelu")]))
    assert on_device(selftest_cuda.every_kernel) == [
        "MISS kernels that nothing checks: gelu: kernel: got no check, wanted one here"
    ]


def test_memory_that_is_kept(on_device, monkeypatch):
    held, step = [], gg.optim.Adam.step

    def wrong(self, params, grads):
        held.append(grads)
        return step(self, params, grads)

    monkeypatch.setattr(gg.optim.Adam, "step", wrong)
    assert any("forward, backward and an Adam step: memory in use" in line for line in on_device(selftest_cuda.memory))


def test_memory_that_only_the_collector_frees(on_device, monkeypatch):
    """A cycle holds device memory until Python happens to look."""
    step = gg.optim.Adam.step

    def wrong(self, params, grads):
        cycle = [grads]
        cycle.append(cycle)
        return step(self, params, grads)

    monkeypatch.setattr(gg.optim.Adam, "step", wrong)
    assert on_device(selftest_cuda.memory)


def test_data_that_is_not_streamed(on_device, monkeypatch):
    monkeypatch.setattr(objective, "RESIDENT_SHARE", 1e9)
    monkeypatch.setattr(selftest_cuda, "_room", lambda pool, size: contextlib.nullcontext())
    missed = on_device(selftest_cuda.short_of_memory)
    assert any("streamed from the host: data left on the host" in line for line in missed)
    assert any("blocks halved: warnings: got 0 of them" in line for line in missed)


def test_stream_that_loses_a_block(on_device, monkeypatch):
    feed = stream.Feeder.feed
    monkeypatch.setattr(stream.Feeder, "feed", lambda self, parts: feed(self, [parts[0], parts[0], *parts[2:]]))
    assert any("streamed from the host: value" in line for line in on_device(selftest_cuda.short_of_memory))
