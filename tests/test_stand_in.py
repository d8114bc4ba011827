"""The stand-in for CuPy is strict, counts, and stays true to CuPy where that can be compared without a GPU."""

import contextlib
import copy
import gc
import inspect
import math
import operator
import sys
import threading
import types

import numpy as np
import pytest
from cuda_proof import arrays, below, machine, originals
from cuda_proof.stand_in import Freed, Race, install, signature_of
from devices import problem
from numpy.testing import assert_array_equal

if reason := problem("stand-in"):
    pytest.skip(reason, allow_module_level=True)

import cupy as real

HOST = [np.ones(3), np.array(1.0), np.array([[1.0], [2.0]])]
OPERATORS = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne, operator.matmul,
]  # fmt: skip


@pytest.fixture
def cupy(stand_in):
    return stand_in


@pytest.fixture
def x(cupy):
    return cupy.arange(3.0)


# --- arrays are on the device, and nothing else goes with them --------------------------------------------------


def test_no_numpy_array_and_no_conversion(x):
    assert not isinstance(x, np.ndarray)
    for convert in (np.asarray, np.array, lambda a: np.zeros(3) + np.asarray(a), lambda a: np.float64(a)):
        with pytest.raises(
            TypeError, match=r"Implicit conversion to a NumPy array is not allowed. Please use `.get\(\)`"
        ):
            convert(x)
    with pytest.raises(TypeError):
        memoryview(x)
    host = np.zeros(3)
    with pytest.raises(TypeError):
        host[:] = x


@pytest.mark.parametrize("operate", OPERATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("host", HOST[:1] + HOST[2:], ids=["1-d", "2-d"])
def test_host_arrays_are_refused_in_operators(operate, host, cupy):
    x = cupy.ones(host.shape)
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy.ndarray'>"):
        operate(x, host)
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy.ndarray'>"):
        operate(host, x)


@pytest.mark.parametrize("operate", OPERATORS[:7], ids=lambda f: f.__name__)
def test_host_arrays_of_no_axes_are_refused_in_arithmetic(operate, x):
    """Comparisons take them, in CuPy as here."""
    for pair in ((x, np.array(1.0)), (np.array(1.0), x)):
        with pytest.raises(TypeError, match="Unsupported type"):
            operate(*pair)
    assert (x > np.array(1.0)).tolist() == [False, False, True]


@pytest.mark.parametrize("number", [2, 2.0, True, np.float32(2), np.float64(2), np.int8(2), np.float16(2)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_numbers_mix_with_the_types_of_numpy(number, dtype, cupy):
    x, same = cupy.ones(3, dtype), np.ones(3, dtype)
    for operate in OPERATORS[:4]:
        for got, want in ((operate(x, number), operate(same, number)), (operate(number, x), operate(number, same))):
            assert got.dtype == want.dtype
            assert_array_equal(got.get(), want)


@pytest.mark.parametrize(
    "call",
    [
        lambda cp, x: cp.add(x, [1.0, 2.0, 3.0]),
        lambda cp, x: operator.add(x, [1.0, 2.0, 3.0]),
        lambda cp, x: cp.concatenate([x, [1.0]]),
        lambda cp, x: cp.concatenate([x, np.ones(1)]),
        lambda cp, x: cp.stack([x, np.ones(3)]),
        lambda cp, x: cp.sum([1.0, 2.0]),
        lambda cp, x: cp.exp([1.0, 2.0]),
        lambda cp, x: cp.exp(np.ones(3)),
        lambda cp, x: cp.where(x > 1, x, np.ones(3)),
        lambda cp, x: cp.where(True, x, x),
        lambda cp, x: cp.where(np.array([True, False, True]), x, x),
        lambda cp, x: cp.maximum(x, np.zeros(3)),
        lambda cp, x: cp.dot(x, np.ones(3)),
        lambda cp, x: cp.matmul(x, np.ones(3)),
        lambda cp, x: cp.tensordot(x, np.ones(3), 1),
        lambda cp, x: cp.linalg.solve(cp.eye(3), np.ones(3)),
        lambda cp, x: cp.linalg.norm([1.0, 2.0]),
        lambda cp, x: cp.reshape([1.0, 2.0], (2, 1)),
        lambda cp, x: cp.broadcast_to(np.ones(3), (2, 3)),
        lambda cp, x: cp.add.at(x, cp.array([0]), object()),
        lambda cp, x: operator.setitem(x, slice(None), np.ones(3)),
        lambda cp, x: operator.setitem(x, slice(None), [1.0, 2.0, 3.0]),
        lambda cp, x: operator.setitem(x, 0, np.ones(1)),
        lambda cp, x: cp.add(x, x, out=np.zeros(3)),
        lambda cp, x: cp.add(x, x, np.zeros(3)),
        lambda cp, x: x.repeat(np.array([1, 2, 3])),
        lambda cp, x: x.set([1.0, 2.0, 3.0]),
        lambda cp, x: x.set(np.ones(2)),
        lambda cp, x: x.set(np.ones(3, np.float32)),
        lambda cp, x: x.get(out=np.zeros(3, np.float32)),
        lambda cp, x: x.get(out=[0.0]),
        lambda cp, x: cp.array(np.ones(2, np.longdouble)),
        lambda cp, x: cp.array(["a"]),
        lambda cp, x: cp.array([None]),
        lambda cp, x: cp.zeros(3, object),
        lambda cp, x: x.astype("float32", casting="unsafe"),
        lambda cp, x: cp.add(x, x, where=x > 0),
        lambda cp, x: cp.sum(x, where=x > 0),
        lambda cp, x: cp.ascontiguousarray(np.ones(3)),
        lambda cp, x: cp.from_dlpack(np.ones(3)),
        lambda cp, x: hash(x),
        lambda cp, x: cp.nonzero(np.ones(3)),
        lambda cp, x: x[np.array([0.5])],
        lambda cp, x: x["a"],
        lambda cp, x: x[0, 0],
        lambda cp, x: x[3],
        lambda cp, x: bool(x),
        lambda cp, x: x.item(),
        lambda cp, x: len(x.sum()),
        lambda cp, x: iter(x.sum()).__next__(),
        lambda cp, x: operator.index(x.sum()),
    ],
)  # fmt: skip
def test_what_cupy_refuses_is_refused(call, cupy, x):
    with pytest.raises((TypeError, ValueError, AttributeError, IndexError, np.linalg.LinAlgError)):
        call(cupy, x)


def test_host_indices_are_uploaded_not_refused(cupy, x):
    """As in CuPy, without a word: that is what the count of bytes is for."""
    with cupy.counting() as count:
        assert x[np.array([2, 0])].tolist() == [2, 0]
    assert count.bytes_to_device == 16
    with cupy.counting() as count:
        assert x[[True, False, True]].tolist() == [0, 2]
    assert count.bytes_to_device == 3


def test_no_write_flag(x):
    assert not hasattr(x.flags, "writeable")
    with pytest.raises(KeyError):
        x.flags["WRITEABLE"]


def test_results_of_no_axes_are_arrays(cupy, x):
    for value in (
        x.sum(),
        x[1],
        x.max(),
        cupy.exp(x[0]),
        x[0] * 2.0,
        cupy.dot(x, x),
        x @ x,
        cupy.array(3.0),
        x.argmax(),
    ):
        assert type(value) is cupy.ndarray
        assert value.shape == ()


def test_views_and_copies(cupy):
    x = cupy.arange(12.0).reshape(3, 4)
    base = x.base
    for view in (x[1], x[:, 1:], x[1, 2], x.T, x.reshape(4, 3), x.ravel(), x[None], x.diagonal(), x.view(), x.mT):
        assert view.base is base
        assert not view.flags.owndata
    assert cupy.broadcast_to(x, (2, 3, 4)).base is base
    row = x[1]
    row[...] = -1
    assert x[1].tolist() == [-1] * 4
    for made in (
        x.copy(),
        x + 0,
        x[[0, 1]],
        x[x > 3],
        x.astype("float32"),
        x.T.reshape(-1),
        cupy.array(x),
        x.take(0, 1),
    ):
        assert made.base is None
        assert made.flags.owndata
    assert cupy.asarray(x) is x
    assert x.astype("float64", copy=False) is x
    assert (x.T + 0).flags.c_contiguous  # CuPy's ufuncs give C order


def test_indices_out_of_bounds_wrap_around(cupy, x):
    assert x[cupy.array([3, -4])].tolist() == [0, 2]
    assert x.take(cupy.array([4])).tolist() == [1]


def test_fresh_memory_is_no_number(cupy):
    assert all(math.isnan(v) for v in cupy.empty(3).tolist())
    assert cupy.empty(2, "int64").tolist() == [-1, -1]


def test_in_place_results_keep_their_dtype(cupy, x):
    y = cupy.arange(3)
    with pytest.raises(TypeError, match="same_kind"):
        y += 0.5
    with pytest.raises(TypeError, match="same_kind"):
        cupy.add(x, x, out=y)
    with pytest.raises(ValueError, match="shape"):
        cupy.add(x, x, out=cupy.zeros(2))
    with pytest.raises(ValueError, match="output"):
        cupy.add(x, x, out=cupy.zeros(1))
    single = cupy.zeros(3, "float32")
    assert cupy.add(x, x, out=single) is single
    assert single.tolist() == [0, 2, 4]
    before = x
    x *= 2
    assert x is before


def test_numpy_functions_go_to_the_device(cupy, x):
    """__array_ufunc__ and __array_function__, as CuPy has them."""
    for value in (
        np.sin(x),
        np.sum(x),
        np.concatenate([x, x]),
        np.linalg.norm(x),
        np.add(x, 1.0),
        np.where(x > 1, x, 0),
    ):
        assert type(value) is cupy.ndarray
    with pytest.raises(TypeError):
        np.add(x, np.ones(3))
    with pytest.raises(TypeError):
        np.add(np.ones(3), np.ones(3), out=x)


def test_another_class_may_take_the_operators(x):
    class Other:
        __array_ufunc__ = None

        def __radd__(self, other):
            return "mine"

    assert x + Other() == "mine"


def test_half_is_added_up_in_single(cupy):
    assert cupy.ones(5000, "float16").sum() == 5000
    assert (cupy.ones((1, 5000), "float16") @ cupy.ones((5000, 1), "float16")).item() == 5000


def test_copies_are_arrays_there(cupy, x):
    for twin in (copy.copy(x), copy.deepcopy(x)):
        assert type(twin) is cupy.ndarray
        assert twin.tolist() == x.tolist()


def test_singular_matrices_are_not_looked_at(cupy):
    singular = cupy.zeros((2, 2))
    assert np.isnan(cupy.linalg.inv(singular).get()).all()
    assert np.isnan(cupy.linalg.cholesky(-cupy.eye(2)).get()).all()
    import cupyx

    with cupy.counting() as count, cupyx.errstate(linalg="raise"), pytest.raises(np.linalg.LinAlgError):
        cupy.linalg.inv(singular)
    assert count.syncs == 1


# --- what is counted ------------------------------------------------------------------------------------------------

WAITS = {
    "get": (lambda cp, x: x.get(), 1),
    "asnumpy": (lambda cp, x: cp.asnumpy(x), 1),
    "item": (lambda cp, x: x[0].item(), 1),
    "float": (lambda cp, x: float(x[0]), 1),
    "int": (lambda cp, x: int(x[0]), 1),
    "bool": (lambda cp, x: bool(x[0]), 1),
    "if": (lambda cp, x: 1 if x.max() > 1 else 0, 1),
    "index": (lambda cp, x: [1, 2, 3][x.argmax()], 1),
    "tolist": (lambda cp, x: x.tolist(), 1),
    "tobytes": (lambda cp, x: x.tobytes(), 1),
    "repr": (lambda cp, x: repr(x), 1),
    "str": (lambda cp, x: str(x), 1),
    "format": (lambda cp, x: f"{x[0]:.1f}", 1),
    "nonzero": (lambda cp, x: x.nonzero(), 1),
    "where": (lambda cp, x: cp.where(x > 0), 1),
    "flatnonzero": (lambda cp, x: cp.flatnonzero(x), 1),
    "argwhere": (lambda cp, x: cp.argwhere(x), 1),
    "mask": (lambda cp, x: x[x > 0], 1),
    "repeat": (lambda cp, x: cp.repeat(x, [1, 2, 3]), 2),
    "array-blocking": (lambda cp, x: cp.array([1.0], blocking=True), 1),
    "numpy.from_dlpack": (lambda cp, x: np.from_dlpack(x, device="cpu"), 1),
    "stream": (lambda cp, x: cp.cuda.get_current_stream().synchronize(), 1),
    "null": (lambda cp, x: cp.cuda.Stream.null.synchronize(), 1),
    "event": (lambda cp, x: cp.cuda.get_current_stream().record().synchronize(), 1),
    "device": (lambda cp, x: cp.cuda.Device().synchronize(), 1),
    "runtime": (lambda cp, x: cp.cuda.runtime.deviceSynchronize(), 1),
    "empty": (lambda cp, x: x[:0].get(), 0),
    "upload": (lambda cp, x: cp.asarray(np.ones(3)), 0),
    "set": (lambda cp, x: x.set(np.ones(3)), 0),
    "sum": (lambda cp, x: x.sum(), 0),
    "mean-var-std": (lambda cp, x: (x.mean(), x.var(), x.std()), 0),
    "where-three": (lambda cp, x: cp.where(x > 0, x, 0.0), 0),
    "take": (lambda cp, x: x[cp.array([0, 2])], 0),
    "put-mask": (lambda cp, x: operator.setitem(x, x > 0, 1.0), 1),
    "add.at": (lambda cp, x: cp.add.at(x, cp.array([0, 0]), 1.0), 0),
    "solve": (lambda cp, x: cp.linalg.solve(cp.eye(3), x), 0),
    "decompositions": (lambda cp, x: [f(cp.eye(3)) for f in (cp.linalg.svd, cp.linalg.qr, cp.linalg.eigh)], 0),
    "pinv": (lambda cp, x: cp.linalg.pinv(cp.eye(3)), 1),
    "cumsum": (lambda cp, x: cp.cumsum(x), 0),
    "repeat-number": (lambda cp, x: cp.repeat(x, 2), 0),
    "allclose": (lambda cp, x: cp.allclose(x, x), 0),
    "shape": (lambda cp, x: (len(x), x.shape, x.size, x.nbytes, x.device, x.flags, x.data.ptr), 0),
    "get-later": (lambda cp, x: x.get(blocking=False), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted(name, cupy, x):
    work, wanted = WAITS[name]
    with cupy.counting() as count:
        work(cupy, x)
    assert count.syncs == wanted


def test_unique_waits(cupy, x):
    with cupy.counting() as count:
        cupy.unique(x)
    assert count.syncs >= 1


def test_launches_are_counted(cupy):
    x, empty = cupy.ones((4, 4)), cupy.ones((0, 4))
    for work, launches in [
        (lambda: x + x, 1),
        (lambda: cupy.exp(x), 1),
        (lambda: x.sum(), 1),
        (lambda: x @ x, 1),
        (lambda: x.copy(), 1),
        (lambda: x.astype("float32"), 1),
        (lambda: cupy.zeros(3), 1),
        (lambda: cupy.empty(3), 0),
        (lambda: (x.T, x[1], x.reshape(-1), x[None]), 0),
        (lambda: empty + empty, 0),
        (lambda: (x + x) * x, 2),
        (lambda: x.mean(), 1),
        (lambda: cupy.asarray(np.ones(3)), 0),
    ]:
        with cupy.counting() as count:
            work()
        assert count.launches == launches


def test_bytes_are_counted(cupy):
    with cupy.counting() as count:
        x = cupy.asarray(np.ones(1000, np.float32))
        x.set(np.zeros(1000, np.float32))
    assert (count.bytes_to_device, count.bytes_to_host) == (8000, 0)
    with cupy.counting() as count:
        x.get()
        x[:10].get()
    assert (count.bytes_to_device, count.bytes_to_host) == (0, 4040)


# --- graphs -----------------------------------------------------------------------------------------------------------

DOUBLED = r"""extern "C" __global__ void doubled(const float* x, float* y, int n, float by) {
  if (threadIdx.x < n) y[threadIdx.x] = by * x[threadIdx.x];
}"""


def capture(cupy, *work):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        assert stream.is_capturing()
        try:
            for step in work:
                step()
        finally:
            graph = stream.end_capture()
    assert not stream.is_capturing()
    return graph


def test_a_graph_runs_when_it_is_launched(cupy):
    """Kernels of all kinds in their order, on what the memory holds then; one launch."""
    x, y, z, total = (cupy.zeros(4, dtype="float32") for _ in range(4))
    raw = cupy.RawKernel(DOUBLED, "doubled")
    more = cupy.ElementwiseKernel("float32 x", "float32 y", "y = x + 1", "one_more")
    by = np.float32(2)
    graph = capture(
        cupy,
        lambda: raw((1,), (32,), (x, y, np.int32(4), by)),
        lambda: more(y, z),
        lambda: cupy.multiply(z, z, out=total),
        lambda: y.fill(7),
        lambda: x.__setitem__(slice(0, 2), y[:2]),
    )
    assert total.get().tolist() == [0] * 4  # nothing has run
    x[...] = cupy.asarray(np.arange(4, dtype=np.float32))
    with cupy.counting() as count:
        graph.launch()
    assert (count.launches, count.syncs) == (1, 0)
    assert total.get().tolist() == [1, 9, 25, 49]
    assert (y.get().tolist(), x.get().tolist()) == ([7] * 4, [7, 7, 2, 3])
    stream = cupy.cuda.Stream()
    stream.wait_event(cupy.cuda.get_current_stream().record())
    graph.launch(stream)
    stream.synchronize()
    assert total.get().tolist() == [225, 225, 25, 49]


def test_what_a_capture_refuses(cupy, x):
    square, out = cupy.ones((3, 3)), cupy.empty((3, 3))
    with pytest.raises(NotImplementedError, match="calling cuBLAS API during stream capture is currently unsupported"):
        capture(cupy, lambda: cupy.matmul(square, square, out=out))
    with pytest.raises(NotImplementedError, match="cuSOLVER"):
        capture(cupy, lambda: sys.modules["cupyx.lapack"].gesv(square, out))
    with pytest.raises(real.cuda.runtime.CUDARuntimeError, match="cudaErrorStreamCaptureUnsupported"):
        capture(cupy, lambda: cupy.cuda.get_current_stream().synchronize())
    with pytest.raises(real.cuda.runtime.CUDARuntimeError, match="cudaErrorStreamCaptureUnsupported"):
        capture(cupy, lambda: cupy.cuda.Device().synchronize())
    for work in (x.get, lambda: x + x, lambda: float(x[0]), lambda: cupy.asarray(np.ones(3))):
        with pytest.raises(NotImplementedError, match="captures"):
            capture(cupy, work)
    with pytest.raises(RuntimeError, match="default"):
        cupy.cuda.Stream.null.begin_capture()
    with pytest.raises(NotImplementedError, match="stream capture"):
        cupy.cuda.Graph()
    assert (x + x).get().tolist() == [0, 2, 4]  # all is as before


def test_a_graph_keeps_no_memory_alive(cupy):
    arrays = [cupy.ones(3), cupy.empty(3)]
    graph = capture(cupy, lambda: cupy.exp(arrays[0], out=arrays[1]))
    graph.launch()
    arrays.pop()
    with pytest.raises(Freed):
        graph.launch()


def test_a_graph_is_in_the_order_of_its_stream(cupy):
    x, y = cupy.ones(3), cupy.empty(3)
    graph = capture(cupy, lambda: cupy.exp(x, out=y))
    other = cupy.cuda.Stream(non_blocking=True)
    graph.launch(other)
    with pytest.raises(Race):
        x.fill(2)


# --- true to CuPy ---------------------------------------------------------------------------------------------------


def test_only_names_that_cupy_has(cupy, x):
    for name in ("asdf", "fromregex", "float128", "matvec", "astype_"):
        assert not hasattr(real, name)
        with pytest.raises(AttributeError, match=f"module 'cupy' has no attribute '{name}'"):
            getattr(cupy, name)
    with pytest.raises(AttributeError):
        cupy.linalg.lstsqr  # noqa: B018  # the attribute raises
    with pytest.raises(AttributeError, match="no attribute 'numpy'"):
        x.numpy()
    with pytest.raises(NotImplementedError, match="stand-in"):
        x.mdspan(index_type=int)  # CuPy's, and not written here


def test_every_public_name_is_there(cupy):
    lazy = {"testing"}
    missing = [n for n in dir(real) if not n.startswith("_") and n not in lazy and not hasattr(cupy, n)]
    assert missing == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (arrays.ndarray, real.ndarray),
        (machine.Stream, real.cuda.Stream),
        (machine.Event, real.cuda.Event),
        (machine.Graph, real.cuda.Graph),
        (machine.Device, real.cuda.Device),
        (machine.MemoryPool, real.cuda.MemoryPool),
        (arrays.ufunc, real.ufunc),
    ],
    ids=lambda cls: cls.__name__,
)  # fmt: skip
def test_methods_are_cupys_own(ours, theirs):
    """No method that CuPy has not, and the same parameters."""
    for name in dir(ours):
        if name.startswith("_"):
            continue
        assert hasattr(theirs, name), f"{theirs.__name__} has no {name}"
        mine, shown = getattr(ours, name), signature_of(getattr(theirs, name))
        if inspect.isfunction(mine) and shown is not None:
            wanted = [(p.name, p.kind, p.default) for p in shown.parameters.values()]
            assert [(p.name, p.kind, p.default) for p in inspect.signature(mine).parameters.values()] == wanted


@pytest.mark.parametrize(
    ("path", "function"),
    [(path, f) for path, f in below.overrides().items() if isinstance(f, types.FunctionType)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_replaced_functions_take_what_cupys_take(path, function):
    """Whatever CuPy's own signature binds, binds here: names and order of what is written in place of CuPy's."""
    home, _, name = path.rpartition(".")
    module = sys.modules.get(home)
    found = getattr(module, name, None) if module is not None else None
    shown = signature_of(found) if found is not None else None
    if shown is None or function.__name__ == "<lambda>":
        return
    mine = inspect.signature(function)
    if any(p.kind is p.VAR_POSITIONAL for p in mine.parameters.values()):
        return
    positional = [p for p in shown.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {p.name: None for p in shown.parameters.values() if p.kind is p.KEYWORD_ONLY}
    mine.bind(*[None] * len(positional), **named)


def test_arguments_that_cupy_does_not_take(cupy, x):
    for call in (
        lambda: cupy.sum(x, axes=0),
        lambda: cupy.concatenate([x], dim=0),
        lambda: cupy.reshape(x, (3, 1), "C", None, 1),
        lambda: x.sum(where=True),
        lambda: cupy.linalg.svd(x[None], hermitian=True),
        lambda: cupy.linalg.pinv(x[None], rtol=1e-3),
        lambda: cupy.exp(x, order="C"),
        lambda: cupy.mean(x, ddof=1),
    ):
        with pytest.raises(TypeError):
            call()


UFUNCS = {n: u for n, u in vars(real).items() if isinstance(u, real.ufunc)}


@pytest.mark.parametrize("name", UFUNCS)
def test_ufuncs_have_cupys_types(name, cupy):
    """For every loop that CuPy lists: those inputs give those outputs."""
    ufunc = getattr(cupy, name)
    assert ufunc.types == UFUNCS[name].types
    assert (ufunc.nin, ufunc.nout) == (UFUNCS[name].nin, UFUNCS[name].nout)
    if ufunc._compute is None:
        with pytest.raises(NotImplementedError, match="stand-in"):
            ufunc(*[cupy.ones(2)] * ufunc.nin)
        return
    for types_of in ufunc.types:
        inputs, outputs = types_of.split("->")
        if any(np.dtype(c).kind not in "biuf" for c in inputs):
            continue
        with contextlib.suppress(TypeError):  # loops that only say what is not supported
            results = ufunc(*[cupy.ones(2, c) for c in inputs])
            results = results if isinstance(results, tuple) else (results,)
            assert [r.dtype for r in results] == [np.dtype(c) for c in outputs]


def test_array_api_compat_sits_on_top(cupy, x):
    import array_api_compat
    import array_api_compat.cupy as xp

    assert array_api_compat.is_cupy_array(x)
    assert array_api_compat.array_namespace(x) is xp
    assert xp.permute_dims(xp.ones((2, 3)), (1, 0)).shape == (3, 2)
    assert xp.concat([x, x]).shape == (6,)
    assert type(xp.linalg.svd(xp.eye(2)).S) is cupy.ndarray


def test_versions_and_properties(cupy):
    runtime = cupy.cuda.runtime
    assert cupy.__version__ == real.__version__
    assert runtime.getDeviceCount() == 2
    assert cupy.cuda.is_available()
    assert cupy.is_available()
    assert runtime.driverGetVersion() >= 12000
    assert runtime.runtimeGetVersion() >= 12000
    assert runtime.getDeviceProperties(0)["name"] == b"stand-in"
    free, total = runtime.memGetInfo()
    assert 0 < free <= total
    assert cupy.cuda.Device(0).compute_capability == "90"


def test_installation_leaves_no_trace():
    before = {name: module for name, module in sys.modules.items() if originals.is_cupys(name)}
    with install(devices=2) as first:
        import cupy

        assert cupy is first
        import array_api_compat.cupy as namespace

        assert namespace.ndarray is first.ndarray
        first.ones(3).get()
    after = {name: module for name, module in sys.modules.items() if originals.is_cupys(name)}
    assert after == before
    with install() as again:
        assert again is first
        assert (again.syncs, again.launches) == (0, 0)
        assert again.cuda.runtime.getDeviceCount() == 1
    with pytest.raises(ZeroDivisionError), install():
        raise ZeroDivisionError
    import cupy as now

    assert now is real


def test_installation_within_another():
    with install(devices=2) as outer:
        x = outer.ones(2)
        with install(devices=1) as inner:
            assert inner.cuda.runtime.getDeviceCount() == 1
        assert outer.cuda.runtime.getDeviceCount() == 2
        assert x.tolist() == [1, 1]


# --- several devices ------------------------------------------------------------------------------------------------


def test_current_device(cupy):
    assert cupy.cuda.Device().id == 0
    with cupy.cuda.Device(1) as device:
        assert device.id == cupy.cuda.runtime.getDevice() == 1
        assert cupy.ones(2).device.id == 1
        assert cupy.ones(2).device == cupy.cuda.Device(1)
        with cupy.cuda.Device(0):
            assert cupy.ones(2).device.id == 0
        assert cupy.ones(2).device.id == 1
    assert cupy.ones(2).device.id == 0
    with pytest.raises(real.cuda.runtime.CUDARuntimeError):
        cupy.cuda.Device(2).use()


def test_current_device_is_the_threads(cupy):
    seen = []
    with cupy.cuda.Device(1):
        thread = threading.Thread(target=lambda: seen.append(cupy.cuda.Device().id))
        thread.start()
        thread.join()
    assert seen == [0]


@pytest.mark.parametrize(
    "work",
    [
        lambda cp, a, b: b + 1.0,
        lambda cp, a, b: a + b,
        lambda cp, a, b: cp.exp(b),
        lambda cp, a, b: b.sum(),
        lambda cp, a, b: b @ b,
        lambda cp, a, b: cp.concatenate([a, b]),
        lambda cp, a, b: b[cp.array([0])],
        lambda cp, a, b: a[b > 0],
        lambda cp, a, b: operator.setitem(b, 0, 1.0),
        lambda cp, a, b: operator.setitem(a, slice(None), b),
        lambda cp, a, b: b.fill(0),
        lambda cp, a, b: cp.add(a, a, out=b),
        lambda cp, a, b: cp.linalg.norm(b),
    ],
)
def test_arrays_of_another_device_are_refused(work, cupy):
    a = cupy.ones(3)
    with cupy.cuda.Device(1):
        b = cupy.ones(3)
    with pytest.raises(ValueError, match=r"resides \(1\) is different from the current device \(0\)"):
        work(cupy, a, b)


def test_arrays_cross_by_copies_alone(cupy):
    with cupy.cuda.Device(1):
        b = cupy.arange(3.0)
    assert b.get().tolist() == [0, 1, 2]
    a = cupy.asarray(b)
    assert (a.device.id, b.device.id) == (0, 1)
    assert a.tolist() == [0, 1, 2]
    assert b[1:].device.id == 1


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(cupy):
    gc.collect()
    return cupy.get_default_memory_pool()


def test_memory_is_counted_and_given_back(cupy, pool):
    start = pool.used_bytes()
    x = cupy.zeros(1000)
    assert pool.used_bytes() == start + 8192  # in steps of 512
    view = x[10:]
    del x
    assert pool.used_bytes() == start + 8192
    del view
    assert pool.used_bytes() == start
    assert pool.free_bytes() >= 8192
    assert pool.total_bytes() == pool.used_bytes() + pool.free_bytes()
    free, total = cupy.cuda.Device().mem_info
    assert free == total - pool.total_bytes()
    pool.free_all_blocks()
    assert pool.free_bytes() == 0


def test_memory_runs_out(cupy, pool):
    pool.set_limit(size=1 << 20)
    assert pool.get_limit() == 1 << 20
    kept = cupy.zeros(100_000)
    with pytest.raises(real.cuda.memory.OutOfMemoryError, match="Out of memory allocating 524,288 bytes"):
        cupy.zeros(65_536)
    for work in (operator.neg, copy.copy, lambda _: cupy.asarray(np.zeros(65_536))):
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            work(kept)
    del kept
    assert cupy.zeros(65_536).shape == (65_536,)
    pool.set_limit(size=0)
    cupy.zeros(1 << 20)


def test_each_device_has_its_own_memory(cupy, pool):
    before = pool.used_bytes()
    with cupy.cuda.Device(1):
        x = cupy.zeros(1000)
        assert pool.used_bytes() == 8192
    assert pool.used_bytes() == before
    assert x.device.id == 1


def test_memory_of_the_machine():
    with install(memory=1 << 20) as cupy:
        cupy.zeros(100_000)
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            cupy.zeros(200_000)


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.fixture
def streams(cupy):
    """A copy stream beside the null stream, a pinned buffer and a device buffer."""
    import cupyx

    buffer = cupyx.empty_pinned((4,), np.float64)
    return cupy.cuda.Stream(non_blocking=True), buffer, cupy.zeros(4)


def test_pinned_memory_is_numpy(cupy):
    import cupyx

    for make in (cupyx.empty_pinned, cupyx.zeros_pinned):
        array = make((2, 3), np.float32)
        assert type(array) is np.ndarray
        assert (array.shape, array.dtype) == ((2, 3), np.float32)
    assert not cupyx.zeros_pinned(3).any()


def test_copy_on_another_stream_is_seen_after_its_event(cupy, streams):
    stream, buffer, x = streams
    buffer[...] = 1
    ready = cupy.cuda.get_current_stream().record()
    stream.wait_event(ready)
    x.set(buffer, stream=stream)
    done = stream.record()
    cupy.cuda.get_current_stream().wait_event(done)
    assert (x + 0).tolist() == [1] * 4


def test_missing_wait_before_use_is_a_race(cupy, streams):
    stream, buffer, x = streams
    stream.wait_event(cupy.cuda.get_current_stream().record())
    x.set(buffer, stream=stream)
    with pytest.raises(Race, match="record an event"):
        x + 1


def test_missing_wait_before_overwriting_is_a_race(cupy, streams):
    """The next batch's copy must not begin before the compute of this one is done."""
    stream, buffer, x = streams
    y = x * 2  # on the null stream
    with pytest.raises(Race):
        x.set(buffer, stream=stream)
    assert y.shape == (4,)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    x.set(buffer, stream=stream)


def test_pinned_buffer_overwritten_too_early_shows(cupy, streams):
    """The copy reads the buffer when it runs, which is not when it is handed over."""
    stream, buffer, x = streams
    stream.wait_event(cupy.cuda.get_current_stream().record())
    buffer[...] = 1
    x.set(buffer, stream=stream)
    buffer[...] = 2  # no wait for the copy
    stream.synchronize()
    assert x.tolist() == [2] * 4
    x.set(buffer, stream=stream)
    done = stream.record()
    done.synchronize()
    buffer[...] = 3
    cupy.cuda.get_current_stream().wait_event(done)
    assert x.tolist() == [2] * 4


def test_unpinned_memory_is_read_at_once(cupy, streams):
    stream, _, x = streams
    stream.wait_event(cupy.cuda.get_current_stream().record())
    host = np.ones(4)
    x.set(host, stream=stream)
    host[...] = 2
    stream.synchronize()
    assert x.tolist() == [1] * 4


def test_copy_back_is_not_there_before_a_wait(cupy, streams):
    stream, buffer, x = streams
    stream.wait_event(cupy.cuda.get_current_stream().record())
    buffer[...] = -1
    x.get(stream=stream, out=buffer, blocking=False)
    assert buffer.tolist() == [-1] * 4
    stream.synchronize()
    assert buffer.tolist() == [0] * 4


def test_work_on_a_stream_is_in_order(cupy, streams):
    stream, buffer, x = streams
    stream.wait_event(cupy.cuda.get_current_stream().record())
    buffer[...] = 5
    with stream:
        assert cupy.cuda.get_current_stream() == stream
        x.set(buffer)
        y = x * 2
        assert y.get().tolist() == [10] * 4
    assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null


def test_result_of_a_stream_needs_a_wait_elsewhere(cupy, streams):
    stream, _, x = streams
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        y = x * 2
    with pytest.raises(Race):
        y + 1
    stream.synchronize()
    assert (y + 1).tolist() == [1] * 4


def test_blocking_streams_wait_for_the_null_stream(cupy):
    """CUDA's rule for the legacy default stream: only non-blocking streams need events beside it."""
    stream, x = cupy.cuda.Stream(), cupy.zeros(4)
    x += 1
    with stream:
        y = x * 2
    assert (y + 1).tolist() == [3] * 4


def test_two_streams_may_read_together(cupy, streams):
    stream, _, x = streams
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        y = x * 2
    z = x * 3
    with pytest.raises(Race):
        x += 1  # the other stream may still be reading
    stream.synchronize()
    x += 1
    assert (y.tolist(), z.tolist(), x.tolist()) == ([0] * 4, [0] * 4, [1] * 4)


def test_events(cupy, streams):
    stream, buffer, x = streams
    stream.wait_event(cupy.cuda.get_current_stream().record())
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    x.set(buffer, stream=stream)
    end.record(stream)
    assert not end.done
    assert not stream.done
    end.synchronize()
    assert end.done
    assert stream.done
    assert cupy.cuda.get_elapsed_time(start, end) > 0
    cupy.cuda.Event().synchronize()  # of nothing
    with pytest.raises(ValueError, match="timing"):
        cupy.cuda.get_elapsed_time(start, cupy.cuda.Event(disable_timing=True))


def test_streams_belong_to_their_device(cupy):
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=True)
    with pytest.raises(RuntimeError, match="does not match"), stream:
        pass


# --- other libraries --------------------------------------------------------------------------------------------


def test_dlpack(cupy, x):
    assert x.__dlpack_device__() == (2, 0)
    twin = cupy.from_dlpack(x)
    twin[0] = 7
    assert x[0] == 7
    capsule = x.__dlpack__()
    cupy.from_dlpack(capsule)
    with pytest.raises(ValueError, match="once"):
        cupy.from_dlpack(capsule)
    with pytest.raises(TypeError, match="CPU arrays"):
        cupy.from_dlpack(np.ones(2))
    with pytest.raises(BufferError):
        x.__dlpack__(dl_device=(4, 0))


def test_cuda_array_interface(cupy):
    x = cupy.arange(12.0).reshape(3, 4)[::2, 1:]
    shown = x.__cuda_array_interface__
    assert shown["shape"] == (2, 3)
    assert shown["strides"] == (64, 8)
    assert shown["data"] == (x.data.ptr, False)
    assert shown["version"] == 3

    class Other:
        __cuda_array_interface__ = shown

    twin = cupy.asarray(Other())
    assert twin.tolist() == x.tolist()
    twin[0, 0] = -1
    assert x[0, 0] == -1
    assert (x + Other()).tolist() == (2 * x).tolist()


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_elementwise_kernel(cupy, x):
    kernel = cupy.ElementwiseKernel("T x, T k", "T y", "y = k * x + 1", "test_affine")
    with cupy.counting() as count:
        y = kernel(x, 2.0)
    assert (count.launches, count.syncs) == (1, 0)
    assert type(y) is cupy.ndarray
    assert y.tolist() == [1, 3, 5]
    out = cupy.zeros(3)
    assert kernel(x, 2.0, out) is out
    assert out.tolist() == [1, 3, 5]
    with pytest.raises(TypeError, match="Unsupported type"):
        kernel(np.ones(3), 2.0)
    with pytest.raises(TypeError):
        cupy.ElementwiseKernel("T x", "T y")
    with cupy.cuda.Device(1):
        there = cupy.ones(3)
    with pytest.raises(ValueError, match="different from the current device"):
        kernel(there, 2.0)


CUDA = r"""
extern "C" __global__ void scale(const double* x, double* y, double k, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = k * x[i];
}
"""


@pytest.mark.parametrize("how", ["kernel", "module"])
def test_raw_kernel(how, cupy, x):
    if how == "kernel":
        kernel = cupy.RawKernel(CUDA, "scale")
    else:
        kernel = cupy.RawModule(code=CUDA).get_function("scale")
    y = cupy.zeros(3)
    with cupy.counting() as count:
        kernel((1,), (32,), (x, y, 2.0, np.int32(3)))
    assert (count.launches, count.syncs) == (1, 0)
    assert y.tolist() == [0, 2, 4]
    with pytest.raises(TypeError, match="Unsupported type"):
        kernel((1,), (32,), (x, np.zeros(3), 2.0, np.int32(3)))
