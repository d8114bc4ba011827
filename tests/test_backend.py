"""The device layer: device strings, placement, a missing CuPy, and two devices that must not mix.

A module that stands in for CuPy, with arrays of its own kind that compute through NumPy, gives a second device where
there is none.
"""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from devices import host, problem
from numpy.testing import assert_allclose, assert_array_equal

import gpugrad as gg
from gpugrad import backend
from gpugrad.errors import DeviceMismatch, DeviceUnavailable

ROOT = Path(gg.__file__).parents[1]


# --- without CuPy -------------------------------------------------------------------------------------------


@pytest.fixture
def no_cupy(monkeypatch):
    """CuPy cannot be imported."""
    for name in list(sys.modules):
        if name == "cupy" or name.startswith("cupy."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: gg.tensor([1.0], device="cuda"),
        lambda: gg.asarray(np.ones(2), device="cuda:1"),
        lambda: gg.tensor([1.0]).to("cuda"),
        lambda: gg.tensor([1.0]).to_device("cuda:0"),
        lambda: backend.as_device("cuda"),
        lambda: backend.cupy(),
        lambda: gg.device("cuda").__enter__(),
    ],
    ids=["tensor", "asarray", "to", "to_device", "as_device", "cupy", "device"],
)
def test_cuda_without_cupy(no_cupy, ask):
    """One error that says what to install."""
    with pytest.raises(DeviceUnavailable, match=r"CuPy.*pip install \"gpugrad\[cuda1[23]\]\"") as caught:
        ask()
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # no second traceback above it
    assert gg.get_device() == "cpu"


def test_auto_falls_back(no_cupy):
    assert backend.as_device("auto") == "cpu"
    assert gg.tensor([1.0], device="auto").device == "cpu"
    with gg.device("auto") as chosen:
        assert chosen == "cpu"
    assert "cannot be imported" in backend.cuda_problem()


def test_everything_works_without_cupy(no_cupy):
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    (x * x).sum().backward()
    assert_array_equal(x.grad, [2, 4])
    assert not backend.is_cuda_array(np.ones(2))


def test_importing_and_computing_does_not_import_cupy():
    code = (
        "import sys, gpugrad as gg; x = gg.tensor([1.0], requires_grad=True); (x * x).sum().backward(); "
        "x.to('cpu'); print('cupy' in sys.modules)"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_auto_warns_once_where_a_gpu_is_expected(no_cupy, monkeypatch):
    monkeypatch.setenv("GPUGRAD_EXPECT_GPU", "1")
    backend._warn_of_fallback.cache_clear()
    with pytest.warns(RuntimeWarning, match="computing on the CPU") as caught:
        assert backend.as_device("auto") == backend.as_device("auto") == "cpu"
    assert len(caught) == 1


@pytest.mark.parametrize("spec", ["gpu", "tpu:0", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CPU", "", "cuda:1.5", 0])
def test_unknown_device_strings(spec):
    with pytest.raises(ValueError, match=r"unknown device .*expected 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        backend.as_device(spec)


def test_device_is_its_string():
    cpu = backend.as_device("cpu")
    assert cpu == "cpu"
    assert (cpu.kind, cpu.number) == ("cpu", 0)
    assert (backend.Device("cuda:3").kind, backend.Device("cuda:3").number) == ("cuda", 3)
    assert f"{cpu}" == "cpu"


def test_default_device():
    assert gg.get_device() == "cpu"
    with gg.device("cpu"):
        assert gg.get_device() == "cpu"
    assert backend.as_device(None) == "cpu"
    cpu = backend.as_device("cpu")
    assert backend.namespace_of_device(cpu) is np


# --- what place takes -----------------------------------------------------------------------------------------


def test_place_on_the_host():
    xp, where, values = backend.place("op", [np.ones(2), 3, 2.5, np.float32(1), True])
    assert xp is np
    assert where == "cpu"
    assert values[1:] == [3, 2.5, np.float32(1), True]
    assert backend.place("op", [1.0, 2])[1] == "cpu"


def test_place_drops_subclasses_and_shares_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(4.0))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    (value,) = backend.place("op", [mapped])[2]
    assert type(value) is np.ndarray
    assert np.shares_memory(value, mapped)


@pytest.mark.parametrize(
    ("value", "name"), [([1.0], "list"), ((1.0,), "tuple"), ("x", "str"), (None, "NoneType"), ({}, "dict")]
)
def test_place_refuses_other_things(value, name):
    with pytest.raises(TypeError, match=rf"op: argument 1 is a {name}; expected.*gpugrad\.tensor"):
        backend.place("op", [np.ones(2), value])


def test_place_refuses_masked_arrays():
    with pytest.raises(TypeError, match=r"op: argument 0 is a masked array.*fill it"):
        backend.place("op", [np.ma.masked_array([1.0], mask=[True])])


@pytest.mark.parametrize("data", [np.array([1.0, None], dtype=object), np.array(["a", "b"])])
def test_object_and_text_arrays_are_refused(data):
    with pytest.raises(TypeError, match=r"add.*dtype"):
        gg.add(data, data)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
def test_select(dtype, shape, rng):
    array = np.asarray(rng.normal(size=shape)).astype(dtype)
    if array.size > 2:
        array.reshape(-1)[:2] = np.nan, np.inf
    keep = np.asarray(rng.random(shape) < 0.5)
    for a in (array, array.T):
        k = keep.T if a is not array else keep
        got = backend.select(k, a)
        assert got.dtype == dtype
        assert_array_equal(got, np.where(k, a, np.zeros((), dtype)))
    assert_array_equal(backend.select(np.zeros(shape, bool), array), np.zeros(shape, dtype))


# --- a second device ------------------------------------------------------------------------------------------


class FakeArray:
    """Stands in for cupy.ndarray: NumPy memory under another type, on a numbered device."""

    __array_ufunc__ = None
    __array_priority__ = 100

    def __init__(self, data, device=0):
        self._host = np.asarray(data)
        self.device = types.SimpleNamespace(id=device)

    shape = property(lambda self: self._host.shape)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    dtype = property(lambda self: self._host.dtype)
    base = property(lambda self: self._host.base)
    flags = property(lambda self: types.SimpleNamespace(owndata=True, c_contiguous=self._host.flags.c_contiguous))

    def _wrap(self, data):
        return FakeArray(data, self.device.id)

    def astype(self, dtype, copy=True):
        return self._wrap(self._host.astype(dtype, copy=copy))

    def copy(self):
        return self._wrap(self._host.copy())

    def reshape(self, *shape):
        return self._wrap(self._host.reshape(*shape))

    def sum(self, axis=None, keepdims=False):
        return self._wrap(self._host.sum(axis=axis, keepdims=keepdims))

    def item(self):
        return self._host.item()

    def __array__(self, dtype=None, copy=None):
        raise TypeError("implicit conversion to a host array")

    def __getitem__(self, index):
        return self._wrap(self._host[index])

    def __neg__(self):
        return self._wrap(-self._host)


def _host(value):
    return value._host if isinstance(value, FakeArray) else value


def _operator(name):
    def apply(self, other):
        if isinstance(other, gg.Tensor):
            return NotImplemented
        if isinstance(other, np.ndarray):
            raise TypeError("unsupported operand: a host array")
        return self._wrap(getattr(np.asarray(self._host), name)(_host(other)))

    return apply


for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "pow",
    "eq",
    "ne",
    "lt",
    "gt",
    "ge",
    "le",
]:
    setattr(FakeArray, f"__{_name}__", _operator(f"__{_name}__"))


class FakeNamespace(types.ModuleType):
    """NumPy's functions on FakeArrays."""

    def __getattr__(self, name):
        function = getattr(np, name)
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args, **kwargs):
            first = next((a for a in args if isinstance(a, FakeArray)), None)
            if any(isinstance(a, np.ndarray) for a in args):
                raise TypeError("a host array reached the device")
            return FakeArray(function(*map(_host, args), **kwargs), first.device.id if first else FakeDevice.current)

        return call


class FakeDevice:
    """Stands in for cupy.cuda.Device: a context that makes a device current."""

    current = 0

    def __init__(self, index):
        self.index = index

    def __enter__(self):
        self.before, FakeDevice.current = FakeDevice.current, self.index

    def __exit__(self, *_):
        FakeDevice.current = self.before


@pytest.fixture
def fake_cupy(monkeypatch):
    """Two devices, cuda:0 and cuda:1, of a module that stands in for CuPy."""
    module = FakeNamespace("cupy")
    module.ndarray = FakeArray
    module.asarray = lambda a, dtype=None: FakeArray(np.array(_host(a), dtype=dtype), FakeDevice.current)
    module.asnumpy = lambda a: a._host.copy()
    module.cuda = types.SimpleNamespace(
        Device=FakeDevice,
        runtime=types.SimpleNamespace(getDeviceCount=lambda: 2, getDevice=lambda: FakeDevice.current),
        get_current_stream=lambda: types.SimpleNamespace(synchronize=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(backend, "_cupy_namespace", lambda cupy: cupy)
    FakeDevice.current = 0
    return module


def test_device_strings_with_two_gpus(fake_cupy):
    assert backend.cuda_problem() is None
    assert backend.as_device("auto") == "cuda:0"
    assert backend.as_device("cuda") == "cuda:0"
    assert backend.as_device("cuda:1") == "cuda:1"
    with FakeDevice(1):
        assert backend.as_device("cuda") == "cuda:1"
    with pytest.raises(DeviceUnavailable, match=r"cuda:2.*2 GPU"):
        backend.as_device("cuda:2")


def test_driver_problems(fake_cupy, monkeypatch):
    monkeypatch.setattr(fake_cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(DeviceUnavailable, match=r"no GPU.*CUDA_VISIBLE_DEVICES"):
        backend.as_device("cuda")
    assert backend.as_device("auto") == "cpu"

    def broken():
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(fake_cupy.cuda.runtime, "getDeviceCount", broken)
    with pytest.raises(DeviceUnavailable, match=r"cudaErrorInsufficientDriver.*nvidia-smi"):
        backend.as_device("cuda:0")


def test_moving_there_and_back(fake_cupy):
    t = gg.tensor([1.0, 2.0], device="cuda")
    assert t.device == "cuda:0"
    assert isinstance(t.data, FakeArray)
    assert_array_equal(t.to("cpu").data, [1, 2])
    assert t.to("cuda:1").device == "cuda:1"
    assert t.to("cuda:0") is t
    assert_array_equal(t.numpy(), [1, 2])
    assert gg.asarray(np.ones(2), device="cuda:1").device == "cuda:1"
    with pytest.raises(ValueError, match="copy"):
        gg.asarray(np.ones(2), device="cuda", copy=False)


def test_default_device_places_new_tensors(fake_cupy):
    with gg.device("cuda:1"):
        assert gg.get_device() == "cuda:1"
        assert gg.tensor([1.0]).device == "cuda:1"
        assert gg.tensor(np.ones(2)).device == "cpu"  # an array stays where it is
        assert FakeDevice.current == 1
    assert gg.get_device() == "cpu"
    assert FakeDevice.current == 0
    assert gg.tensor([1.0]).device == "cpu"


@pytest.mark.parametrize("order", [0, 1])
def test_two_devices_do_not_mix(fake_cupy, order):
    """The error names the op, the arguments, their devices and the remedy."""
    here, there = gg.tensor([1.0, 2.0]), gg.tensor([1.0, 2.0], device="cuda")
    pair = (here, there) if order else (there, here)
    first, second = ("cpu", "cuda:0") if order else ("cuda:0", "cpu")
    remedy = rf"move one with gpugrad\.asarray\(array, device='{first}'\)"
    message = rf"argument 0 is on {first}, argument 1 on {second}.*{remedy}"
    with pytest.raises(DeviceMismatch, match="add: " + message):
        pair[0] + pair[1]
    with pytest.raises(DeviceMismatch, match="multiply: " + message):
        gg.multiply(*pair)
    with pytest.raises(DeviceMismatch, match="matmul: " + message):
        pair[0] @ pair[1]
    with pytest.raises(DeviceMismatch, match="concat: " + message):
        gg.concat(pair)


@pytest.mark.parametrize("other", [np.ones(2), FakeArray(np.ones(2), 1)], ids=["host", "other-gpu"])
def test_plain_arrays_do_not_mix_either(fake_cupy, other):
    t = gg.tensor([1.0, 2.0], device="cuda:0")
    with pytest.raises(DeviceMismatch, match="cuda:0"):
        t + other
    with pytest.raises(DeviceMismatch, match="cuda:0"):
        other + t


def test_two_gpus_do_not_mix(fake_cupy):
    with pytest.raises(DeviceMismatch, match=r"argument 0 is on cuda:0, argument 1 on cuda:1"):
        gg.tensor([1.0], device="cuda:0") + gg.tensor([1.0], device="cuda:1")


def test_mismatch_is_a_value_error():
    assert issubclass(DeviceMismatch, ValueError)


def test_numbers_go_anywhere(fake_cupy):
    t = gg.tensor([1.0, 2.0], device="cuda:1")
    for y in (t * 2.0, 2 + t, t - np.float64(1)):
        assert y.device == "cuda:1"
        assert isinstance(y.data, FakeArray)


def test_gradients_stay_on_the_device(fake_cupy):
    t = gg.tensor([1.0, 2.0], device="cuda:1", requires_grad=True)
    (t * t * 3.0).sum().backward()
    assert t.grad.device == "cuda:1"
    assert_array_equal(t.grad.numpy(), [6, 12])


def test_gradient_flows_back_over_a_move(fake_cupy):
    x = gg.tensor([1.0, 2.0], requires_grad=True)
    moved = x.to("cuda:1")
    assert moved.device == "cuda:1"
    (moved * moved).sum().backward()
    assert x.grad.device == "cpu"
    assert_array_equal(x.grad, [2, 4])


def test_cotangent_on_another_device(fake_cupy):
    t = gg.tensor([1.0, 2.0], device="cuda:0", requires_grad=True)
    with pytest.raises(DeviceMismatch, match="cotangent"):
        (t * 2.0).backward(np.ones(2))


def test_index_on_another_device(fake_cupy):
    x = gg.tensor([1.0, 2.0])
    with pytest.raises(DeviceMismatch, match="getitem"):
        x[gg.tensor([0, 1], device="cuda")]


def test_no_implicit_copy_to_the_host(fake_cupy):
    t = gg.tensor([1.0, 2.0], device="cuda")
    with pytest.raises(DeviceMismatch, match=r"cuda:0.*t\.numpy\(\)"):
        np.asarray(t)


def test_what_the_user_can_reach_is_copied_when_saved(fake_cupy):
    """Arrays there cannot be made read-only: the tape keeps a copy of those that others hold."""
    other = FakeArray(np.array([3.0, 4.0]), 0)
    t = gg.tensor([1.0, 2.0], device="cuda:0", requires_grad=True)
    y = (t * other).sum()
    other._host[...] = 99
    y.backward()
    assert_array_equal(t.grad.numpy(), [3, 4])
    shared = gg.asarray(other)
    t.zero_grad()
    y = (t * shared).sum()
    other._host[...] = -1
    y.backward()
    assert_array_equal(t.grad.numpy(), [99, 99])


def test_data_of_an_owned_tensor_is_a_copy(fake_cupy):
    t = gg.tensor([1.0, 2.0], device="cuda:0", requires_grad=True)
    y = (t * t).sum()
    t.data._host[...] = 99
    y.backward()
    assert_array_equal(t.grad.numpy(), [2, 4])


# --- several GPUs: CuPy computes on the current one, gpugrad where the arrays are ------------------------------------


@pytest.fixture
def there(stand_in):
    """Make an array on cuda:1, while cuda:0 is current."""
    return lambda data: backend.asarray(np.asarray(data), where=backend.Device("cuda:1"))


DATA = [[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]


def place_of(x):
    return backend.device_of(getattr(x, "_data", x))


OPERATORS = {
    "less": lambda x: x < 1.5,
    "greater_equal": lambda x: x <= 1.5,
    "equal": lambda x: x == 1,
    "greater": lambda x: x > x,
    "row": lambda x: x[0],
    "list": lambda x: x[[1, 0]],
    "mask": lambda x: x[:, [True, False, True]],
    "index": lambda x: x[gg.tensor([1, 1], device=place_of(x))],
    "nothing": lambda x: x[[]],
    "where": lambda x: gg.where(x > 0, x, 0.0),
    "all": lambda x: gg.all(x > 0),
    "arithmetic": lambda x: 2.0 * x**2 - x / 3 + abs(-x),
    "diagonal": lambda x: gg.einsum("ii->i", x[:, :2]),
    "lstsq": lambda x: gg.linalg.lstsq(x.T, x[0]),
    "solve": lambda x: gg.linalg.solve(x[:, :2], x[:, 2]),
}
FUNCTIONS = {
    "take": lambda x: gg.take(x, [2, 0], axis=1),
    "repeat": lambda x: gg.repeat(x, 2, axis=0),
    "clip": lambda x: gg.clip(x, -1.0),
    "concat": lambda x: gg.concat([x, x]),
    "stack": lambda x: gg.stack([x, x], axis=1),
    "pad": lambda x: gg.pad(x, 1),
    "tile": lambda x: gg.tile(x, (2, 1)),
    "einsum": lambda x: gg.einsum("ij,kj->ik", x, x),
    "trace": gg.trace,
    "argmax": lambda x: gg.argmax(x, axis=1),
    "var": gg.var,
    "std": gg.std,
    "softmax": gg.softmax,
    "logsumexp": gg.logsumexp,
    "norm-1": lambda x: gg.linalg.norm(x, ord=1),
    "norm-3": lambda x: gg.linalg.norm(x, ord=3, axis=1),
    "norm-0": lambda x: gg.linalg.norm(x, ord=0, axis=1),
    "norm-nuc": lambda x: gg.linalg.norm(x, ord="nuc"),
    "asarray": lambda x: gg.asarray(x, dtype="float32"),
    "copy": lambda x: gg.asarray(x, copy=True),
    "tensor": gg.tensor,
    "grad": lambda x: gg.grad(lambda y: (y * y).sum())(x),
    "vjp": lambda x: gg.vjp(lambda y: 2.0 * y, x)[1](x)[0],
    "grad-grad": lambda x: gg.grad(lambda y: (gg.grad(lambda z: (z**3).sum())(y)).sum())(x),
    "mlp": lambda x: gg.nn.mlp(gg.nn.init_mlp([3, 4, 2], dtype="float64", device=place_of(x)), x),
}


CASES = [
    pytest.param(work, wrap, id=f"{name}-{kind}")
    for works, wrap, kind in ((OPERATORS | FUNCTIONS, gg.tensor, "tensor"), (FUNCTIONS, lambda x: x, "array"))
    for name, work in works.items()
]


@pytest.mark.parametrize(("work", "wrap"), [] if problem("stand-in") else CASES)  # no case at all is one skip
def test_computes_where_the_arrays_are(work, wrap, there, stand_in):
    want, got = work(wrap(np.array(DATA))), work(wrap(there(DATA)))
    assert place_of(got) == "cuda:1"
    assert stand_in.cuda.Device().id == 0
    assert_allclose(host(got), host(want), rtol=1e-13, atol=1e-13)


def test_backward_where_the_arrays_are(there, stand_in):
    x = gg.tensor(there(DATA), requires_grad=True)
    for _ in range(2):
        ((x[:, 1:] > 0) * gg.exp(x)[:, 1:]).sum().backward(create_graph=True)
    assert x.grad.device == "cuda:1"
    x.grad.sum().backward(gg.tensor(1.0, device="cuda:1"))
    with gg.Tape() as tape:
        t = gg.asarray(there(DATA))
        tape.watch(t)
        y = gg.swish(t, 0.5) @ there([1.0, 2.0, 3.0])
    assert tape.gradient(y, t, output_gradients=there([1.0, 2.0])).device == "cuda:1"
    assert stand_in.cuda.Device().id == 0


# --- with a real one --------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_real_device():
    x = gg.tensor([1.0, 2.0], device="cuda", requires_grad=True)
    assert x.device == backend.as_device("auto")
    (x * x).sum().backward()
    assert x.grad.device == x.device
    assert_array_equal(x.grad.numpy(), [2, 4])
    with pytest.raises(DeviceMismatch, match="add"):
        x + np.ones(2)


# --- the marks themselves -------------------------------------------------------------------------------------


def run_marked(tmp_path, mark, **environment):
    """Run one test that carries a mark, with these fixtures and no CuPy; returns pytest's output."""
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text(encoding="utf-8"))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: x\n    oracle: x\n")
    (tmp_path / "test_one.py").write_text(f"import pytest\n\n@pytest.mark.{mark}\ndef test_one():\n    pass\n")
    for missing in ("cupy", "torch"):
        (tmp_path / missing).mkdir()
        (tmp_path / missing / "__init__.py").write_text(f"raise ImportError('no {missing} here')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPUGRAD", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rsf", "-p", "no:cacheprovider", str(tmp_path)],
        env={**clean, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    return done.returncode, done.stdout


def test_gpu_mark_skips_with_a_reason(tmp_path):
    status, output = run_marked(tmp_path, "gpu")
    assert status == 0
    assert "1 skipped" in output
    assert "no cupy here" in output


def test_gpu_mark_fails_where_a_gpu_is_required(tmp_path):
    status, output = run_marked(tmp_path, "gpu", GPUGRAD_REQUIRE_GPU="1")
    assert status == 1
    assert "GPUGRAD_REQUIRE_GPU=1, but device 'cuda' needs CuPy" in output


def test_oracle_mark_skips_with_a_reason(tmp_path):
    status, output = run_marked(tmp_path, "oracle")
    assert status == 0
    assert "1 skipped" in output
    assert "PyTorch cannot be imported" in output
