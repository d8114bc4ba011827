"""The tape: backward, Tape, no_grad, memory, threads, and arrays changed behind its back."""

import contextlib
import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from devices import assert_allclose, assert_array_equal, host, shares_memory
from devices import test_device_is_there as test_device_is_there

import gpugrad as gg
from gpugrad import backend
from gpugrad.errors import DeviceUnavailable, GraphFreed, MutatedArray, NotDifferentiable, ShapeMismatch
from gpugrad.op import SNAPSHOT_BYTES
from gpugrad.tensor import Tensor

BIG = SNAPSHOT_BYTES // 8 + 1000  # float64 elements: just above what is copied


def leaf_on_cpu(data, dtype=None):
    return gg.tensor(data, dtype=dtype, requires_grad=True)


@pytest.fixture
def leaf(device):
    """A function that makes leaves on the device."""
    return lambda data, dtype=None: gg.tensor(data, dtype=dtype, device=device, requires_grad=True)


@pytest.fixture
def tensor(device):
    """A function that makes constants on the device."""
    return lambda data: gg.tensor(data, device=device)


# --- backward ---------------------------------------------------------------------------------------------


def test_example(leaf):
    """f = x*y + x at x = 2, y = 3."""
    x, y = leaf(2.0), leaf(3.0)
    (x * y + x).backward()
    assert (x.grad.item(), y.grad.item()) == (4, 2)


def test_diamond(leaf):
    """Two ways from x to the end add up."""
    x = leaf([0.5, -1.0])
    a = gg.exp(x)
    (a * a + 3.0 * a).sum().backward()
    e = np.exp([0.5, -1.0])
    assert_allclose(x.grad, 2 * e * e + 3 * e, rtol=1e-15)


def test_deep_diamonds():
    """2**60 paths through 60 diamonds: each node is visited once."""
    x = leaf_on_cpu(1.0)
    y = x
    for _ in range(60):
        y = 0.5 * (y + y)
    y.backward()
    assert x.grad.item() == 1


def test_same_tensor_in_all_places(leaf, device):
    x = leaf([2.0, 3.0])
    (x * x).sum().backward()
    assert_array_equal(x.grad, [4, 6])
    m = leaf([[1.0, 2.0], [3.0, 4.0]])
    (m @ m).sum().backward()
    ones = np.ones((2, 2))
    assert_array_equal(m.grad, ones @ m.numpy().T + m.numpy().T @ ones)
    t = leaf([1.0, 2.0])
    gg.concat([t, t, t]).backward(device.put(np.arange(6.0)))
    assert_array_equal(t.grad, [0 + 2 + 4, 1 + 3 + 5])


def test_gradients_accumulate_until_zero_grad(leaf):
    x = leaf([1.0, 2.0])
    (x * 3.0).sum().backward()
    (x * 4.0).sum().backward()
    assert_array_equal(x.grad, [7, 7])
    first = x.grad
    x.zero_grad()
    assert x.grad is None
    (x * 5.0).sum().backward()
    assert_array_equal(x.grad, [5, 5])
    assert_array_equal(first, [7, 7])


def test_accumulated_gradients_do_not_share_memory(leaf):
    """The sum made by the second backward is not written into what the first one gave."""
    x = leaf([1.0, 2.0])
    (x * 3.0).sum().backward()
    first = x.grad
    before = first.numpy().copy()
    (x * 4.0).sum().backward()
    assert_array_equal(first, before)


def test_only_leaves_collect(leaf):
    x = leaf([1.0, 2.0])
    y = x * 2.0
    y.sum().backward()
    assert y.grad is None
    assert x.grad is not None


def test_unreached_leaf_has_no_gradient(leaf):
    x, y = leaf(1.0), leaf(2.0)
    (x * 2.0).backward()
    assert y.grad is None


def test_retain_graph(leaf):
    x = leaf([1.0, 2.0])
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward(retain_graph=True)
    y.backward()
    assert_array_equal(x.grad, [6, 12])
    with pytest.raises(GraphFreed, match="retain_graph=True"):
        y.backward()
    assert_array_equal(x.grad, [6, 12])


def test_freed_part_of_a_larger_graph(leaf):
    x = leaf([1.0, 2.0])
    y = x * x
    y.sum().backward()
    with pytest.raises(GraphFreed):
        (y * 2.0).sum().backward()


def test_freed_multiple_outputs(leaf):
    x = leaf([[2.0, 0.5], [0.5, 1.0]])
    w, v = gg.linalg.eigh(x)
    w.sum().backward()
    with pytest.raises(GraphFreed):
        v.sum().backward()


def test_create_graph(leaf):
    x = leaf([1.0, 2.0])
    (x**3).sum().backward(create_graph=True)
    g = x.grad
    assert g.requires_grad
    x.zero_grad()
    g.sum().backward()
    assert_allclose(x.grad, [6, 12], rtol=1e-15)
    assert not x.grad.requires_grad


def test_without_create_graph_the_gradient_is_off_the_tape(leaf):
    x = leaf([1.0, 2.0])
    (x**3).sum().backward()
    assert not x.grad.requires_grad


def test_third_order(leaf):
    x = leaf(0.7)
    y = gg.sin(x)
    for _ in range(3):
        x.zero_grad()
        y.backward(create_graph=True)
        y = x.grad
    assert y.item() == pytest.approx(-np.cos(0.7), rel=1e-15)


def test_cotangent(tensor, leaf, device):
    x = leaf([1.0, 2.0])
    (x * x).backward(device.put([10.0, 100.0]))
    assert_array_equal(x.grad, [20, 400])
    x.zero_grad()
    (x * x).backward(tensor([1.0, 1.0]))
    assert_array_equal(x.grad, [2, 4])
    x.zero_grad()
    (x * x).backward([1, 2])
    assert_array_equal(x.grad, [2, 8])


def test_cotangent_of_another_dtype_is_cast(leaf, device):
    x = leaf(np.ones(2, np.float32))
    (x * 2.0).backward(device.put([1.0, 0.1]))
    assert x.grad.dtype == np.float32
    assert_array_equal(x.grad, np.array([2, 0.2], np.float32))


def test_recorded_cotangent(leaf):
    """With create_graph the gradient depends on the cotangent too."""
    x, c = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    (x * x).backward(c, create_graph=True)
    x.grad.sum().backward()
    assert_array_equal(c.grad, [2, 4])


def test_backward_errors(leaf, device):
    x = leaf([1.0, 2.0])
    with pytest.raises(ShapeMismatch, match=r"non-scalar.*\(2,\).*sum"):
        (x * 2.0).backward()
    with pytest.raises(ShapeMismatch, match=r"shape \(3,\).*\(2,\)"):
        (x * 2.0).backward(device.put(np.ones(3)))
    with pytest.raises(ShapeMismatch, match=r"\(1, 2\)"):
        (x * 2.0).backward(device.put(np.ones((1, 2))))
    with pytest.raises(ShapeMismatch):
        (x * 2.0).sum().backward(device.put(np.ones(1)))
    with pytest.raises(NotDifferentiable, match="requires_grad"):
        gg.tensor([1.0]).sum().backward()
    with pytest.raises(NotDifferentiable):
        x.detach().sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("data", [3, [1, 2], True, np.arange(3), np.array([1 + 2j])])
def test_integers_have_no_gradient(data):
    with pytest.raises(NotDifferentiable, match=r"dtype (int64|bool|complex128).*cast"):
        gg.tensor(data, requires_grad=True)


def test_unknown_device():
    with pytest.raises(ValueError, match=r"unknown device 'tpu'.*cuda:N"):
        gg.tensor([1.0], device="tpu")
    if gg.backend.cuda_problem():
        with pytest.raises(DeviceUnavailable, match="cuda"):
            gg.tensor([1.0], device="cuda")


def test_integer_results_carry_no_gradient(leaf):
    x = leaf([1.5, 2.5])
    assert not x.astype("int64").requires_grad
    assert not (x > 2).requires_grad
    (x * x.astype("int64")).sum().backward()
    assert_array_equal(x.grad, [1, 2])


def test_cast_and_back(leaf):
    x = leaf([1.1, 2.2])
    (x.astype("float32") * 3.0).sum().backward()
    assert x.grad.dtype == np.float64
    assert_array_equal(x.grad, [3, 3])


# --- several outputs ---------------------------------------------------------------------------------------


def decompositions(rng):
    a = rng.normal(size=(4, 3))
    s = a.T @ a + np.diag([1.0, 3.0, 6.0])
    return [
        (gg.linalg.svd, a, 3),
        (gg.linalg.qr, a, 2),
        (lambda x: gg.linalg.eigh(0.5 * (x + gg.matrix_transpose(x))), s, 2),
        (gg.linalg.slogdet, s, 2),
    ]


@pytest.mark.parametrize("which", range(4), ids=["svd", "qr", "eigh", "slogdet"])
def test_some_outputs_used(which, rng, device):
    """Gradients through one output or several are those of the sum, each against differences."""
    function, x, outputs = decompositions(rng)[which]
    x = device.put(x)
    weights = [device.put(rng.normal(size=part.shape)) for part in function(x)]
    whole = 0 * x
    for k in range(outputs):

        def one(a, k=k):
            return (function(a)[k] * weights[k]).sum()

        gg.check_grads(one, [x], order=1)
        whole += gg.grad(one)(x)
    together = gg.grad(lambda a: sum((part * w).sum() for part, w in zip(function(a), weights, strict=True)))(x)
    assert_allclose(together, whole, rtol=0, atol=1e-12 * np.max(np.abs(host(whole))))


def test_no_output_used(leaf):
    x = leaf([[2.0, 0.5], [0.5, 1.0]])
    gg.linalg.eigh(x)
    (x * 2.0).sum().backward()
    assert_array_equal(x.grad, np.full((2, 2), 2.0))


def test_output_used_twice(leaf):
    x = leaf([[2.0, 0.5], [0.5, 1.0]])
    w = gg.linalg.eigh(x).eigenvalues
    (w + w).sum().backward()
    assert_allclose(x.grad, 2 * np.eye(2), rtol=0, atol=1e-14)


# --- Tape ---------------------------------------------------------------------------------------------------


def test_tape():
    w = gg.tensor([1.0, 2.0])
    with gg.Tape() as tape:
        tape.watch(w)
        loss = (w * w).sum()
    dw = tape.gradient(loss, w)
    assert type(dw) is Tensor
    assert_array_equal(dw, [2, 4])
    assert w.grad is None
    assert not w.requires_grad


def test_tape_is_used_up(tensor):
    w = tensor([1.0, 2.0])
    with gg.Tape() as tape:
        tape.watch(w)
        loss = (w * w).sum()
    tape.gradient(loss, w)
    with pytest.raises(GraphFreed, match="persistent=True"):
        tape.gradient(loss, w)


def test_persistent_tape(tensor):
    w = tensor([1.0, 2.0])
    with gg.Tape(persistent=True) as tape:
        tape.watch(w)
        y = w * w
        loss, other = y.sum(), (y * y).sum()
    assert_array_equal(tape.gradient(loss, w), [2, 4])
    assert_array_equal(tape.gradient(loss, w), [2, 4])
    assert_array_equal(tape.gradient(other, w), [4, 32])


def test_tape_structures(tensor):
    params = {"w": tensor([1.0, 2.0]), "layers": [tensor(3.0), (tensor([4.0]),)]}
    with gg.Tape() as tape:
        tape.watch(params)
        loss = params["w"].sum() * params["layers"][0]
    grads = tape.gradient(loss, params)
    assert_array_equal(grads["w"], [3, 3])
    assert grads["layers"][0].item() == 3
    assert_array_equal(grads["layers"][1][0], [0])  # not used: zero


def test_tape_of_an_intermediate(tensor):
    w = tensor([1.0, 2.0])
    with gg.Tape(persistent=True) as tape:
        tape.watch(w)
        y = w * 3.0
        loss = (y * y).sum()
    assert_array_equal(tape.gradient(loss, y), [6, 12])
    both = tape.gradient(loss, [w, y])
    assert_array_equal(both[0], [18, 36])
    assert_array_equal(both[1], [6, 12])


def test_tape_output_gradients(tensor, device):
    w = tensor([1.0, 2.0])
    with gg.Tape() as tape:
        tape.watch(w)
        y = w * w
    assert_array_equal(tape.gradient(y, w, output_gradients=device.put([1.0, 10.0])), [2, 40])


def test_tape_errors(tensor, device):
    w = tensor([1.0, 2.0])
    with gg.Tape(persistent=True) as tape:
        with pytest.raises(TypeError, match="ndarray; wrap it"):
            tape.watch(np.ones(2))
        with pytest.raises(NotDifferentiable, match="int64"):
            tape.watch(tensor([1, 2]))
        tape.watch(w)
        y = w * w
        stranger = tensor([1.0])
    with pytest.raises(ShapeMismatch, match="non-scalar"):
        tape.gradient(y, w)
    with pytest.raises(NotDifferentiable, match="not watched"):
        tape.gradient(y.sum(), stranger)
    with pytest.raises(TypeError, match="target is a float"):
        tape.gradient(3.0, w)
    with pytest.raises(ShapeMismatch):
        tape.gradient(y, w, output_gradients=device.put(np.ones(3)))


def test_nested_tapes(tensor):
    x = tensor(3.0)
    with gg.Tape() as outer:
        outer.watch(x)
        with gg.Tape() as inner:
            inner.watch(x)
            y = x**3
        dy = inner.gradient(y, x)
    assert dy.item() == pytest.approx(27, rel=1e-15)
    assert outer.gradient(dy, x).item() == pytest.approx(18, rel=1e-15)


def test_tape_records_inside_no_grad(tensor):
    w = tensor([1.0, 2.0])
    with gg.no_grad(), gg.Tape() as tape:
        tape.watch(w)
        loss = (w * w).sum()
    assert_array_equal(tape.gradient(loss, w), [2, 4])


def test_tape_of_a_leaf_leaves_its_grad_alone(leaf):
    x = leaf([1.0, 2.0])
    with gg.Tape() as tape:
        tape.watch(x)
        loss = (x * x).sum()
    assert_array_equal(tape.gradient(loss, x), [2, 4])
    assert x.grad is None
    assert x.requires_grad


def test_tape_gives_up_after_an_exception():
    w = gg.tensor([1.0])

    def stopped():
        with gg.Tape() as tape:
            tape.watch(w)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert not w.requires_grad
    assert not (w * 2.0).requires_grad


# --- no_grad ------------------------------------------------------------------------------------------------


def test_no_grad(leaf):
    x = leaf([1.0])
    with gg.no_grad():
        assert not (x * 2.0).requires_grad
        with gg.no_grad():
            pass
        assert not (x * 2.0).requires_grad
    assert (x * 2.0).requires_grad


def test_no_grad_as_a_decorator(leaf):
    x = leaf([1.0])

    @gg.no_grad()
    def double(t, deep=2):
        """Twice."""
        return t * 2.0 if not deep else double(t, deep - 1)

    assert not double(x).requires_grad
    assert (x * 2.0).requires_grad
    assert double.__doc__ == "Twice."


def test_no_grad_ends_with_an_exception(leaf):
    x = leaf([1.0])
    with pytest.raises(KeyError), gg.no_grad():
        raise KeyError
    assert (x * 2.0).requires_grad


def test_no_grad_of_one_thread_only():
    x = leaf_on_cpu([1.0])
    seen = []
    with gg.no_grad():
        worker = threading.Thread(target=lambda: seen.append((x * 2.0).requires_grad))
        worker.start()
        worker.join()
    assert seen == [True]


def test_detach(leaf):
    x = leaf([1.0, 2.0])
    (x.detach() * x).sum().backward()
    assert_array_equal(x.grad, [1, 2])
    assert x.detach()._data is x._data


# --- memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gc():
    """Without the cycle collector only reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_long_chain():
    """100,000 ops: no recursion, forward, backward or when it is freed."""
    x = leaf_on_cpu(1.0)
    y = x
    for _ in range(100_000):
        y = y + 1e-5
    y.backward(retain_graph=True)
    assert x.grad.item() == 1
    y.backward()
    del y
    z = x
    for _ in range(100_000):
        z = z * 1.0
    del z  # never swept


def test_long_chain_does_not_leak(no_gc):
    def run():
        x = leaf_on_cpu(1.0)
        y = x
        for _ in range(20_000):
            y = y * 1.0001
        y.backward()
        return x.grad.item()

    tracemalloc.start()
    try:
        run()  # fills Python's lists of freed tuples, which are no leak
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            run()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 20_000


def nodes_of(tensor):
    seen, stack = set(), [tensor._node]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += node.parents
    return [weakref.ref(node) for node in seen]


@pytest.mark.parametrize("sweep", ["none", "backward", "retain_graph", "create_graph"])
def test_graph_is_freed_by_reference_counting(no_gc, sweep, leaf, device):
    x = leaf(np.arange(1.0, 4.0))
    y = gg.swish(gg.exp(x) * x, 0.5)
    w, _ = gg.linalg.eigh(gg.outer(y, y) + device.put(np.diag([1.0, 2.0, 3.0])))
    loss = (w * gg.where(w > 0, gg.sqrt(gg.abs(w)), 0.0)).sum()
    alive = nodes_of(loss)
    assert len(alive) > 8
    if sweep != "none":
        loss.backward(retain_graph=sweep == "retain_graph", create_graph=sweep == "create_graph")
        if sweep == "create_graph":
            alive += nodes_of(x.grad)
            x.zero_grad()  # a leaf that holds a gradient that hangs on it is a cycle, of the caller's making
    del x, y, w, _, loss
    assert [ref for ref in alive if ref() is not None] == []


def test_backward_frees_what_was_saved(no_gc):
    """After backward the intermediate arrays are gone, though the loss is still held."""
    x = leaf_on_cpu(np.ones(300_000))
    y = gg.exp(x)
    saved = weakref.ref(y._data)
    loss = y.sum()
    del y
    assert saved() is not None
    loss.backward()
    assert saved() is None


def test_transform_frees_everything(no_gc):
    kept = []

    def loss(w):
        y = gg.tanh(w * w)
        kept.extend(nodes_of(y))
        return (y * y).sum()

    gg.grad(loss)(np.ones(5))
    gg.grad(lambda w: gg.grad(loss)(w).sum())(np.ones(5))
    assert kept
    assert [ref for ref in kept if ref() is not None] == []


def test_error_in_backward_leaves_recording_as_it_was(leaf):
    x = leaf([1.0])
    y = (x * 2.0).sum()
    y.backward()
    with pytest.raises(GraphFreed):
        y.backward()
    assert (x * 2.0).requires_grad


# --- threads ------------------------------------------------------------------------------------------------


def test_threads():
    """8 threads differentiate at once, some inside no_grad, some with tapes; every gradient is right."""
    shared = np.linspace(0.1, 1, 50)
    start = threading.Barrier(8)
    wrong = []

    def work(k):
        rng = np.random.default_rng(k)
        start.wait()
        for _ in range(30):
            a = rng.normal(size=50)
            if k % 3 == 0:
                with gg.no_grad():
                    got = gg.grad(lambda x, a=a: (gg.sin(x * a) * shared).sum())(shared)
            elif k % 3 == 1:
                x = leaf_on_cpu(shared)
                (gg.sin(x * a) * shared).sum().backward()
                got = x.grad.numpy()
            else:
                x = gg.asarray(shared)
                with gg.Tape() as tape:
                    tape.watch(x)
                    y = (gg.sin(x * a) * shared).sum()
                got = tape.gradient(y, x).numpy()
            if not np.allclose(got, a * np.cos(shared * a) * shared, rtol=1e-13):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


# --- arrays changed in place ------------------------------------------------------------------------------------


def product_rule(array):
    """x * array with its own gradient wanted in x: the array is saved."""
    x = gg.tensor(np.ones(array.shape, array.dtype), device=backend.device_of(array), requires_grad=True)
    return x, (x * array).sum()


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(1.0, 7.0),
        lambda: np.arange(1.0, 13.0)[::2],
        lambda: np.arange(1.0, 7.0).reshape(2, 3).T,
        lambda: np.broadcast_to(np.arange(1.0, 4.0), (2, 3)),
        lambda: np.asfortranarray(np.arange(1.0, 7.0).reshape(2, 3)),
        lambda: np.array(5.0),
    ],
    ids=["array", "strided", "transposed", "broadcast", "fortran", "0-d"],
)
def test_small_array_changed_in_place(make, device):
    """Up to a size the tape keeps a copy: the gradient is that of the forward pass."""
    array = make()
    if not device.on_cpu:
        array = device.cupy.asarray(array)
    before = array.copy()
    x, y = product_rule(array)
    base = array
    while base.base is not None:
        base = base.base
    base[...] = -99
    y.backward()
    assert_array_equal(x.grad, before)


def test_small_view_and_preexisting_view():
    base = np.arange(10.0)
    view = base[2:5]
    before = view.copy()
    x, y = product_rule(view)
    base[3] = 99
    y.backward()
    assert_array_equal(x.grad, before)
    # read-only array, and a writable one that sees the same memory
    array = np.arange(3.0)
    frozen = array[:]
    frozen.flags.writeable = False
    x, y = product_rule(frozen)
    array[0] = 7
    y.backward()
    assert_array_equal(x.grad, [0, 1, 2])


def test_asarray_shares_memory_and_is_watched(device):
    array = device.put(np.arange(1.0, 4.0))
    t = gg.asarray(array)
    with gg.Tape() as tape:
        tape.watch(t)
        y = (t * t).sum()
    array[...] = -1
    assert_array_equal(tape.gradient(y, t), [2, 4, 6])


def one_element(array):
    array.reshape(-1, order="A")[-1] += 1


def swap_rows(array):
    array[[0, -1]] = array[[-1, 0]]


def swap_columns(array):
    array[:, [0, 1]] = array[:, [1, 0]]


def swap_two_elements(array):
    array[0, 0], array[-1, -1] = array[-1, -1], array[0, 0]


def shuffle_rows(array):
    np.random.default_rng(0).shuffle(array)


def add_and_take_away(array):
    array[0, 0] += 1
    array[0, 1] -= 1


def negate(array):
    np.negative(array, out=array)


@pytest.mark.parametrize(
    "change", [one_element, swap_rows, swap_columns, swap_two_elements, shuffle_rows, add_and_take_away, negate]
)
@pytest.mark.parametrize("width", [4, 256, 300], ids=lambda n: f"width{n}")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_big_array_changed_in_place(change, width, dtype, rng):
    """Above that size a change, a swap and a shuffle are noticed: an error, never a wrong gradient."""
    array = rng.normal(size=(2 * SNAPSHOT_BYTES // 4 // width, width)).astype(dtype)
    _, y = product_rule(array)
    change(array)
    with pytest.raises(MutatedArray, match=rf"multiply.*shape.*{dtype}.*copy"):
        y.backward()


def test_big_array_left_alone(rng):
    array = rng.normal(size=BIG)
    x, y = product_rule(array)
    y.backward()
    assert_array_equal(x.grad, array)


def test_big_array_changed_and_restored(rng):
    """Only what is there when the sweep runs matters."""
    array = rng.normal(size=BIG)
    x, y = product_rule(array)
    array += 1
    array -= 1  # rounding leaves traces, unless all is put back
    with pytest.raises(MutatedArray):
        y.backward()
    array = rng.normal(size=BIG)
    x, y = product_rule(array)
    old = array[5]
    array[5] = 0
    array[5] = old
    y.backward()
    assert_array_equal(x.grad, array)


def test_big_array_through_a_view(rng):
    base = rng.normal(size=(BIG, 2))
    view = base[:, 0]  # not contiguous: copied
    before = view.copy()
    x, y = product_rule(view)
    base[...] = 0
    y.backward()
    assert_array_equal(x.grad, before)
    base = rng.normal(size=2 * BIG)
    _, y = product_rule(base[:BIG])
    base[3] = 0
    with pytest.raises(MutatedArray):
        y.backward()


def test_big_array_changed_after_create_graph(rng):
    """A second sweep over a recorded one checks again."""
    array = rng.normal(size=BIG)
    x = leaf_on_cpu(np.ones(BIG))
    ((x * array) ** 2).sum().backward(create_graph=True)
    g = x.grad
    array[0] += 1
    with pytest.raises(MutatedArray):
        g.sum().backward()


def test_big_array_in_matmul(rng):
    a = rng.normal(size=(600, 300))
    w = leaf_on_cpu(rng.normal(size=300))
    y = (a @ w).sum()
    a[0, 0] += 1
    with pytest.raises(MutatedArray, match="matmul"):
        y.backward()


def test_big_result_of_an_op_is_not_checked():
    """Arrays that gpugrad made itself cannot be written to: the tape keeps them as they are."""
    x = leaf_on_cpu(np.ones(BIG))
    y = gg.exp(x)
    assert y._node.guard is None
    with pytest.raises(ValueError, match="read-only"):
        y.data[0] = 5


def test_memory_mapped_array(tmp_path, rng):
    path = tmp_path / "x.npy"
    np.save(path, rng.normal(size=BIG))
    mapped = np.load(path, mmap_mode="r+")
    x, y = product_rule(np.asarray(mapped))
    before = np.array(mapped)
    y.backward()
    assert_array_equal(x.grad, before)
    x = leaf_on_cpu(np.ones(BIG))
    y = (x * mapped).sum()
    mapped[7] += 1
    with pytest.raises(MutatedArray):
        y.backward()
    small = np.load(path, mmap_mode="r+")[:100]
    x = leaf_on_cpu(np.ones(100))
    y = (x * small).sum()
    before = np.array(small)
    small[...] = 0
    y.backward()
    assert_array_equal(x.grad, before)


def test_memory_mapped_read_only_file_changed_by_another(tmp_path, rng):
    """A read-only map shows what somebody else writes into the file."""
    path = tmp_path / "x.npy"
    np.save(path, rng.normal(size=100))
    mapped = np.load(path, mmap_mode="r")
    before = np.array(mapped)
    x = leaf_on_cpu(np.ones(100))
    y = (x * mapped).sum()
    np.load(path, mmap_mode="r+")[...] = 0
    try:
        y.backward()
    except MutatedArray:
        return
    assert_array_equal(x.grad, before)


def test_array_over_a_buffer():
    """An array over a bytearray can be changed through the bytearray."""
    buffer = bytearray(np.arange(1.0, 4.0).tobytes())
    array = np.frombuffer(buffer)
    array.flags.writeable = False
    x, y = product_rule(array)
    buffer[:8] = np.array([99.0]).tobytes()
    y.backward()
    assert_array_equal(x.grad, [1, 2, 3])


def test_index_array_changed_in_place(leaf, device):
    index = device.put([0, 2, 2])
    x = leaf([1.0, 2.0, 3.0])
    for pick in (lambda: x[index], lambda: gg.take(x, index), lambda: x[(index,)], lambda: x[[0, 2, 2]]):
        x.zero_grad()
        y = pick()
        index[...] = 1
        y.backward(device.put([1.0, 10.0, 100.0]))
        assert_array_equal(x.grad, [1, 0, 110])
        index[...] = device.put([0, 2, 2])


def test_mask_changed_in_place(leaf, device):
    mask = device.put([True, False, True])
    x = leaf([1.0, 2.0, 3.0])
    y = x[mask]
    mask[...] = False
    y.sum().backward()
    assert_array_equal(x.grad, [1, 0, 1])


def test_condition_changed_in_place(leaf, device):
    mask = device.put([True, False, True])
    x = leaf([1.0, 2.0, 3.0])
    y = gg.where(mask, x, 0.0)
    mask[...] = False
    y.sum().backward()
    assert_array_equal(x.grad, [1, 0, 1])


def test_index_list_in_params_is_copied(leaf, device):
    pieces = [device.put(np.ones(2)), device.put(np.ones(3))]
    x = leaf([1.0, 2.0])
    y = gg.concat([x, *pieces])
    pieces.clear()
    y.sum().backward()
    assert_array_equal(x.grad, [1, 1])


def test_data_given_to_tensor_may_change(device):
    array = device.put([1.0, 2.0])
    x = gg.tensor(array, requires_grad=True)
    y = (x * x).sum()
    array[...] = 99
    y.backward()
    assert_array_equal(x.grad, [2, 4])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x * 2.0,
        lambda x: x.sum(),
        lambda x: x.reshape((2, 1)),
        lambda x: x[0:1],
        lambda x: x.T,
        lambda x: gg.broadcast_to(x, (3, 2)),
    ],
    ids=["leaf", "product", "sum", "reshape", "slice", "T", "broadcast"],
)
def test_data_cannot_be_written(make):
    t = make(leaf_on_cpu([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"read-only|assignment destination"):
        t.data[...] = 5
    before = t.numpy().copy()
    with contextlib.suppress(ValueError):
        t.numpy()[...] = 5
    assert_array_equal(t.numpy(), before)
    with pytest.raises(TypeError):
        t[0] = 5


def test_out_argument_cannot_reach_the_tape():
    t = leaf_on_cpu([1.0, 2.0])
    y = gg.exp(t)
    with pytest.raises((ValueError, TypeError)):
        np.add(1.0, 1.0, out=y.data)


# --- gradients are the caller's own -------------------------------------------------------------------------------


def test_gradients_alias_nothing(device):
    a, b, c = (device.put(np.arange(1.0, 4.0) * k) for k in (1, 2, 3))
    g = device.put([1.0, 10.0, 100.0])
    _, pull = gg.vjp(lambda a, b, c: a + b + gg.reshape(c, (3,)), a, b, c)
    first, second = pull(g), pull(g)
    every = [*first, *second]
    for i, x in enumerate(every):
        for other in [*every[:i], *every[i + 1 :], a, b, c, g]:
            assert not shares_memory(x, other)
        x[...] = -1
    assert_array_equal(g, [1, 10, 100])
    for got in pull(g):
        assert_array_equal(got, g)


def test_gradients_of_backward_alias_nothing(leaf, device):
    a, b = leaf([1.0, 2.0]), leaf([3.0, 4.0])
    g = device.put([1.0, 10.0])
    (a + b).backward(g, retain_graph=True)
    assert not shares_memory(a.grad.data, b.grad.data)
    assert not shares_memory(a.grad.data, g)
    g[...] = 99
    assert_array_equal(a.grad, [1, 10])


def test_gradient_does_not_alias_what_is_saved(device):
    """d(x*y)/dx is y: the caller may write into it, and ask again."""
    y = device.put([3.0, 4.0])
    _, pull = gg.vjp(lambda x: x * y, device.put(np.ones(2)))
    (first,) = pull(device.put(np.ones(2)))
    first[...] = 0
    assert_array_equal(pull(device.put(np.ones(2)))[0], [3, 4])
    assert_array_equal(y, [3, 4])


def test_cotangent_changed_after_create_graph(leaf, device):
    g = device.put([1.0, 10.0])
    x = leaf([1.0, 2.0])
    (x * x).backward(g, create_graph=True)
    g[...] = 0
    x.grad.sum().backward()
    assert_array_equal(x.grad.numpy(), np.array([2, 40]) + np.array([2, 20]))


# --- mixing kinds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", ["+", "-", "*", "/", "**", "<", "<=", ">", ">=", "==", "!="])
@pytest.mark.parametrize(
    "other",
    [np.array([1.5, 2.5]), np.array([[1.5], [2.5]]), np.float64(1.5), np.float32(1.5), 1.5, 2, np.array(2.5)],
    ids=["array", "column", "float64", "float32", "float", "int", "0-d"],
)
def test_operators_in_either_order(symbol, other, device, tensor, leaf):
    """A Tensor wins on either side, and the values are NumPy's."""
    operate = eval(f"lambda a, b: a {symbol} b")
    data = np.array([0.5, 2.0])
    there = device.put(other) if isinstance(other, np.ndarray) else other
    for t in (tensor(data), leaf(data)):
        for got, want in ((operate(t, there), operate(data, other)), (operate(there, t), operate(other, data))):
            assert type(got) is Tensor
            assert got.dtype == want.dtype
            assert_allclose(got, want, rtol=0 if device.on_cpu else 1e-15)


@pytest.mark.parametrize("symbol", ["+", "-", "*", "/", "**"])
def test_gradient_in_either_order(symbol, device):
    operate = eval(f"lambda a, b: a {symbol} b")
    data, other = device.put([0.5, 2.0]), device.put([[1.5], [2.5]])
    gg.check_grads(lambda t: operate(t, other), [data])
    gg.check_grads(lambda t: operate(other, t), [data])
    gg.check_grads(lambda t: operate(t, 2.0), [data])
    gg.check_grads(lambda t: operate(2.0, t), [data])
    gg.check_grads(operate, [data, other])


def test_matmul_in_either_order(rng, tensor, device):
    a, b = rng.normal(size=(3, 2)), rng.normal(size=(2, 4))
    x, y = device.put(a), device.put(b)
    for got in (tensor(a) @ y, x @ tensor(b), tensor(a) @ tensor(b)):
        assert type(got) is Tensor
        assert_allclose(got, a @ b, rtol=1e-14)


def test_bitwise_operators(tensor, device):
    p, q = device.put([True, False]), device.put([True, True])
    for got, want in ((tensor(p) & q, p & q), (p | tensor(q), p | q), (~tensor(p), ~p)):
        assert type(got) is Tensor
        assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("symbol", ["+", "-", "*", "/", "**"])
@pytest.mark.parametrize("number", [2, 1.5, True])
def test_python_numbers_are_weak(symbol, dtype, number, leaf):
    operate = eval(f"lambda a, b: a {symbol} b")
    for shape in ((), (3,)):
        t = leaf(np.ones(shape, dtype))
        for got in (operate(t, number), operate(number, t)):
            assert got.dtype == dtype
            t.zero_grad()
            got.sum().backward()
            assert t.grad.dtype == dtype
            assert t.grad.shape == shape


def test_in_place_operators_make_new_tensors(leaf):
    x = leaf([1.0, 2.0])
    before = x
    y = x * 2.0
    y += 1.0
    y *= x
    y.sum().backward()
    assert_array_equal(x.grad, [5, 9])
    assert x is before
    array = np.ones(2)
    with pytest.raises(TypeError):
        array += x


def test_broadcasting_is_undone(leaf, device):
    x, y = leaf(np.ones((3, 1))), leaf(np.ones((1, 2)))
    g = device.put(np.arange(6.0).reshape(3, 2))
    (x * y).backward(g)
    assert_array_equal(x.grad, g.sum(axis=1, keepdims=True))
    assert_array_equal(y.grad, g.sum(axis=0, keepdims=True))
    s = leaf(2.0)
    (s * device.put(np.ones((2, 0)))).backward(device.put(np.ones((2, 0))))
    assert s.grad.item() == 0
    z = leaf(np.ones((1, 3)))
    (z + device.put(np.ones((0, 3)))).backward(device.put(np.ones((0, 3))))
    assert_array_equal(z.grad, np.zeros((1, 3)))
