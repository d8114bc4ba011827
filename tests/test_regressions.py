"""Defects that were found once: the smallest input that showed each."""

import sys
import threading
from typing import Any

import numpy as np
import pytest
import threadpoolctl
from numpy.testing import assert_allclose, assert_array_equal

import gpugrad as gg
from gpugrad import backend
from gpugrad.op import checksum, recording, registry


def in_threads(work: Any, count: int = 8) -> None:
    """Run work(k) in `count` threads that switch often; errors come through."""
    errors: list[BaseException] = []

    def guarded(k: int) -> None:
        try:
            work(k)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(k,)) for k in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def test_threads_add_to_one_leaf() -> None:
    w = gg.tensor([1.0, 2.0], requires_grad=True)

    def work(_: int) -> None:
        for _ in range(200):
            (w * 2.0).sum().backward()

    in_threads(work)
    assert w.grad is not None
    assert_array_equal(w.grad.numpy(), [3200.0, 3200.0])


def test_threads_watch_one_tensor() -> None:
    w = gg.tensor([1.0, 2.0])

    def work(_: int) -> None:
        for _ in range(100):
            with gg.Tape() as tape:
                tape.watch(w)
                loss = (w * w).sum()
                loss = loss + (w * w * w).sum()
            assert_array_equal(tape.gradient(loss, w), [5.0, 16.0])

    in_threads(work)
    assert not w.requires_grad


def test_no_grad_decorates_for_every_thread_alone() -> None:
    barrier = threading.Barrier(2)

    @gg.no_grad()
    def both_inside() -> None:
        barrier.wait()

    def work(k: int) -> None:
        for _ in range(50):
            if k:
                with gg.no_grad():
                    both_inside()
            else:
                both_inside()
            assert recording.on

    in_threads(work, 2)


def test_shuffled_one_hot_rows_are_noticed() -> None:
    a = np.eye(256)[np.random.default_rng(0).integers(0, 256, 2000)]
    w = gg.tensor(np.ones(a.shape), requires_grad=True)
    loss = (w * a).sum()
    np.random.default_rng(1).shuffle(a)
    with pytest.raises(gg.MutatedArray):
        loss.backward()
    b = np.eye(512)
    before = checksum(b)
    b[[0, 1]] = b[[1, 0]]
    assert checksum(b) != before


def test_a_read_only_array_with_a_writable_view_is_not_trusted() -> None:
    a = np.array([1.0, 2.0, 3.0])
    view = a[:]
    a.flags.writeable = False
    w = gg.tensor(np.ones(3), requires_grad=True)
    loss = (w * a).sum()
    view[:] = 0
    loss.backward()
    assert w.grad is not None
    assert_array_equal(w.grad.numpy(), [1.0, 2.0, 3.0])


def test_complex_numbers_carry_no_gradient() -> None:
    x = gg.tensor(2.0, requires_grad=True)
    with pytest.raises(gg.NotDifferentiable, match=r"multiply: complex"):
        x * 1j
    with pytest.raises(gg.NotDifferentiable, match=r"astype: complex"):
        x.astype("complex128")


@pytest.mark.parametrize(
    "call",
    [
        lambda x, a: gg.elu(x, alpha=a),
        lambda x, a: gg.leaky_relu(x, negative_slope=a),
    ],
)
def test_static_parameters_are_no_arrays(call: Any) -> None:
    x = gg.tensor([-1.0, 2.0])
    for a in (gg.tensor(0.5, requires_grad=True), gg.tensor([0.5, 1.0]), np.array([0.5, 1.0])):
        with pytest.raises(TypeError, match="expected a plain value"):
            call(x, a)


def test_lists_given_as_parameters_are_copied() -> None:
    axes = [[0], [1]]
    x = gg.tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    y = gg.tensordot(x, np.arange(8.0).reshape(4, 2), axes=axes)
    axes[1][0] = 0
    y.sum().backward()
    assert x.grad is not None
    assert_array_equal(x.grad.numpy(), np.repeat([[12.0], [16.0]], 3, axis=1))


def test_captured_graphs_are_not_freed() -> None:
    w = gg.tensor([1.0, 2.0], requires_grad=True)
    h = w * w
    with gg.no_grad():
        assert_array_equal(gg.grad(lambda x: (x * h).sum())(np.ones(2)), [1.0, 4.0])
    gg.Objective(lambda p, x: p * x * h.sum(), (np.ones(40),), block_size=3, threads=2).value_and_grad(np.ones(()))
    h.sum().backward()
    assert w.grad is not None
    assert_array_equal(w.grad.numpy(), [2.0, 4.0])


def test_an_objective_inside_an_objective_does_not_wait_for_itself() -> None:
    inner = gg.Objective(lambda p, x: p * x, (np.ones(40),), block_size=4, threads=2)
    outer = gg.Objective(lambda p, x: p * x * inner.value(np.ones(())), (np.ones(40),), block_size=4, threads=2)
    done = threading.Thread(target=lambda: outer.value(np.ones(())), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive()


def test_objectives_in_threads_leave_blas_as_it_was() -> None:
    before = threadpoolctl.threadpool_info()
    obj = gg.Objective(lambda w, x: x @ w, (np.ones((60, 3)),), block_size=7, threads=2)
    in_threads(lambda _: [obj.value(np.ones(3)) for _ in range(20)], 4)
    assert threadpoolctl.threadpool_info() == before


def test_closed_tapes_do_not_record_their_gradient() -> None:
    w, b = gg.tensor([1.0]), gg.tensor([2.0])
    for _ in range(3):
        with gg.Tape(persistent=True) as tape:
            tape.watch([w, b])
            loss = (w * w * b).sum()
        w = w - 0.1 * tape.gradient(loss, w)
        assert not w.requires_grad


def test_aux_leaves_the_tape() -> None:
    _, aux = gg.grad(lambda x: ((x * x).sum(), {"twice": x * 2.0}), has_aux=True)(np.ones(2))
    assert not aux["twice"].requires_grad


def test_aux_stays_on_an_outer_tape() -> None:
    def outer(a: Any) -> Any:
        _, aux = gg.grad(lambda b: (b * b, a * b), has_aux=True)(2.0)
        return aux

    assert gg.grad(outer)(3.0) == 2.0


def test_argnums() -> None:
    with pytest.raises(ValueError, match="twice"):
        gg.grad(lambda x, y: (x * y).sum(), argnums=(0, -2))(np.ones(2), np.ones(2))
    assert_array_equal(gg.grad(lambda x, y: (x * y).sum(), argnums=np.int64(1))(np.ones(2), np.ones(2)), [1.0, 1.0])


def test_a_target_that_was_not_recorded() -> None:
    w = gg.tensor([1.0])
    with gg.Tape() as tape:
        loss = (w * w).sum()
        tape.watch(w)
    with pytest.raises(gg.NotDifferentiable, match="not recorded"):
        tape.gradient(loss, w)


def test_rank_deficient_float32_pseudo_inverse() -> None:
    a = (np.arange(24.0).reshape(6, 4) + 1).astype(np.float32)  # rank 2
    right = np.linalg.pinv(a.astype(np.float64))
    assert_allclose(gg.linalg.pinv(a), right, atol=1e-5)
    b = a.sum(axis=1)
    assert_allclose(gg.linalg.lstsq(a, b), np.linalg.lstsq(a.astype(float), b.astype(float), rcond=None)[0], atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: gg.take(x, np.array([0]), axis=5),
        lambda x: gg.squeeze(x, axis=2),
        lambda x: gg.linalg.norm(x, ord=2, axis=5),
    ],
)
def test_an_axis_out_of_range(call: Any) -> None:
    with pytest.raises(gg.ShapeMismatch, match=r"axis \d does not exist"):
        call(gg.tensor(np.ones((1, 3))))


def test_cumulative_sums_of_integers() -> None:
    assert_array_equal(gg.cumulative_sum(np.array([True, True, True])), [1, 2, 3])
    assert_array_equal(gg.cumulative_sum(np.array([100, 100], np.int8)), [100, 200])


def test_fan_out_of_half_accumulates_wider() -> None:
    x = gg.tensor(np.float16(1.0), requires_grad=True)
    total = x * 0.0
    for _ in range(3000):
        total = total + x * np.float16(0.001)
    total.backward()
    assert x.grad is not None
    assert float(x.grad) == pytest.approx(3000 * float(np.float16(0.001)), rel=1e-3)


def test_hypot_at_the_origin() -> None:
    second = gg.grad(gg.grad(lambda x: gg.hypot(x, 0.0 * x)))
    assert second(0.0) == 0.0


def test_mean_of_large_floats() -> None:
    assert float(gg.mean(np.full(5000, 1e35, np.float32))) == pytest.approx(1e35)


def test_product_slopes_beyond_the_range() -> None:
    assert_array_equal(gg.grad(gg.prod)(np.array([0.0, 1e200, 1e200, 1e200]))[1:], [0.0, 0.0, 0.0])


@pytest.mark.parametrize("shapes", [((3, 0), (0,)), ((2, 3, 0), (0, 4)), ((2, 3, 4), (4, 0)), ((2, 3, 0), (0,))])
def test_products_of_empty_matrices(shapes: Any) -> None:
    x, y = (np.ones(shape) for shape in shapes)
    gx, gy = gg.grad(lambda x, y: gg.sum(x @ y), argnums=(0, 1))(x, y)
    assert (gx.shape, gy.shape) == shapes
    assert not gy.any()


@pytest.mark.parametrize("function", [gg.softmax, gg.log_softmax])
def test_softmax_of_nothing(function: Any) -> None:
    assert function(np.zeros((3, 0))).shape == (3, 0)
    assert gg.grad(lambda x: gg.sum(function(x)))(np.zeros(0)).shape == (0,)
    assert function(np.zeros(0, np.float16)).dtype == np.float16


def test_logsumexp_of_nothing() -> None:
    assert_array_equal(gg.logsumexp(np.zeros((3, 0)), axis=1), [-np.inf] * 3)
    assert gg.logsumexp(np.zeros(0)) == -np.inf


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_variance_of_nothing_has_an_empty_gradient() -> None:
    with np.errstate(invalid="ignore", divide="ignore"):
        assert gg.grad(gg.var)(np.zeros(0)).shape == (0,)


def test_numpy_integers_are_integers() -> None:
    x = gg.tensor(np.arange(4.0), requires_grad=True)
    two = np.int64(2)
    gg.roll(x, shift=two).sum().backward()
    assert gg.reshape(x, np.int64(4)).shape == (4,)
    assert gg.tile(x, two).shape == (8,)
    assert gg.sum(x, axis=[0]).shape == ()


def test_an_objective_cannot_be_differentiated_from_outside() -> None:
    obj = gg.Objective(lambda p, x: p * x, (np.ones(3),))
    for through in (obj.value, lambda w: obj.value_and_grad(w)[1]):
        with pytest.raises(gg.NotDifferentiable, match="value_and_grad of the Objective"):
            gg.grad(through)(1.0)
    w = gg.tensor(1.0, requires_grad=True)
    assert float(obj.value_and_grad(w)[1]) == 1.0


def test_half_gradients_of_a_block_do_not_overflow() -> None:
    x = np.full(100_000, 2.0, np.float16)
    w = np.float16(1.0) * np.ones((), np.float16)
    value, g = gg.Objective(lambda w, x: w * x, (x,), block_size=100_000).value_and_grad(w)
    assert (value, float(g), g.dtype) == (2.0, 2.0, np.float16)


def test_a_penalty_may_be_a_number() -> None:
    obj = gg.Objective(lambda p, x: p * x, (np.ones(3),), penalty=lambda p: 0.5)
    assert obj.value_and_grad(np.ones(()))[0] == 1.5


def test_finite_losses_with_an_infinite_sum() -> None:
    obj = gg.Objective(lambda p, x: p * x, (np.full(4, 1e308),), reduction="sum")
    with pytest.raises(gg.NonFiniteLoss, match="every row's loss is finite"):
        obj.value(np.ones(()))


def test_bits_do_not_depend_on_threads_for_large_parameters() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 2))
    p = rng.normal(size=(2, 300_000)).astype(np.float32)
    results = [
        gg.Objective(lambda p, x: gg.sum(gg.tanh(x @ p), axis=1), (x,), block_size=4, threads=t).value_and_grad(p)[1]
        for t in (1, 2, 7)
    ]
    assert len({r.tobytes() for r in results}) == 1


def test_logaddexp_stays_in_float32() -> None:
    x = gg.tensor(np.float32([1.0, 2.0]), requires_grad=True)
    node = gg.logaddexp(x, np.float32([0.5, 2.0]))._node
    assert node is not None
    assert node.op is not None
    assert node.op.partials[0](*node.saved).dtype == np.float32


def test_callback_gets_parameters_of_its_own() -> None:
    def spoil(result: Any) -> None:
        result.params[...] = 5.0

    result = gg.minimize(lambda p: gg.sum((p - 1.0) ** 2), np.zeros(2), callback=spoil)
    assert_allclose(result.params, 1.0, atol=1e-6)


def test_shape_errors_name_the_op() -> None:
    for call in (
        lambda: gg.tensor(np.ones(3)) + np.ones(4),
        lambda: gg.matmul(np.ones((2, 3)), gg.tensor(np.ones((2, 3)))),
        lambda: gg.add(np.ones(3), np.ones(4)),
    ):
        with pytest.raises(gg.ShapeMismatch, match=r"(add|matmul): .*\(\d.*\).*\(\d.*\)"):
            call()


@pytest.mark.parametrize("name", ["inv", "det", "cholesky", "pinv", "svd", "qr", "eigh", "slogdet"])
def test_linear_algebra_of_half(name: str) -> None:
    a = np.array([[4.0, 1.0], [1.0, 3.0]], np.float16)
    function = getattr(gg.linalg, name)
    result = function(a)
    wide = function(a.astype(np.float64))
    pairs = zip(result, wide, strict=True) if isinstance(result, tuple) else [(result, wide)]
    for got, right in pairs:
        assert got.dtype == np.float16
        assert_allclose(got, right, rtol=2e-3, atol=2e-3)
    first = lambda a: function(a)[-1] if isinstance(result, tuple) else function(a)  # noqa: E731
    gradient = gg.grad(lambda a: gg.sum(first(a) * 0.5))(a)
    assert gradient.dtype == np.float16
    assert_allclose(gradient, gg.grad(lambda a: gg.sum(first(a) * 0.5))(a.astype(np.float64)), rtol=1e-2, atol=1e-2)


def test_relu_keeps_infinite_slopes_out() -> None:
    with np.errstate(divide="ignore"):
        assert_array_equal(gg.grad(lambda x: gg.sum(gg.relu(gg.log(x))))(np.array([0.0, 0.5, 2.0])), [0.0, 0.0, 0.5])


@pytest.mark.parametrize("new", [np.ones(3), np.ones((2, 3), np.float32)])
def test_an_optimiser_refuses_other_parameters(new: Any) -> None:
    optimiser = gg.optim.Adam(0.1)
    optimiser.step(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(gg.ShapeMismatch, match="make a new optimiser"):
        optimiser.step(new, np.ones(new.shape, new.dtype))


def test_an_op_that_gives_back_a_view_is_protected() -> None:
    declared = gg.elementwise(
        "t_view_of_first",
        forward=lambda xp, x, y, z: x[...],
        partials=(1, 0, 0),
        domain=[(0, 1)] * 3,
        doc="x, as a view: what elementwise asks not to do.",
    )
    try:
        a = np.array([1.0, 2.0])
        w = gg.tensor([1.0, 1.0], requires_grad=True)
        loss = (w * declared(gg.asarray(a), 1.0, 1.0)).sum()
        a[:] = 0
        loss.backward()
        assert w.grad is not None
        assert_array_equal(w.grad.numpy(), [1.0, 2.0])
    finally:
        del registry["t_view_of_first"]


def test_prediction_on_a_gpu_goes_on_in_smaller_blocks(stand_in):
    """Training streamed, but the forward pass over the test rows asked for all memory at once."""
    from gpugrad.cli.model import forward

    rng = np.random.default_rng(0)
    X = rng.normal(size=(5000, 8)).astype(np.float32)
    layers = gg.nn.init_mlp([8, 16, 1])
    want = np.asarray(gg.nn.mlp(layers, X))[:, 0]
    there = [{key: gg.asarray(array, device="cuda").data for key, array in layer.items()} for layer in layers]
    stand_in.get_default_memory_pool().set_limit(size=200_000)
    got = forward(there, None, X, backend.as_device("cuda"))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    "path", [("cuda:0", "cuda:1"), ("cuda:1", "cpu"), ("cuda:1", "cuda:0", "cuda:1"), ("cpu", "cuda:1")]
)
def test_a_graph_across_devices(stand_in, path):
    """The whole reverse sweep ran on the device of its first cotangent."""
    x = gg.tensor(np.linspace(-1, 1, 12).reshape(3, 4), device=path[0], requires_grad=True)
    b = gg.tensor(np.linspace(0, 1, 4), device=path[0], requires_grad=True)
    y = gg.swish(gg.bias_relu(x, b)) + x
    for where in path[1:]:
        y = gg.exp(y.to(where))
    with backend.activate(backend.as_device("cuda:0")):
        y.sum().backward()
    xs, bs = (gg.tensor(t.numpy(), requires_grad=True) for t in (x, b))
    want = gg.swish(gg.bias_relu(xs, bs)) + xs
    for _ in path[1:]:
        want = gg.exp(want)
    want.sum().backward()
    for got, right in ((x, xs), (b, bs)):
        assert got.grad.device == path[0]
        assert_allclose(got.grad.numpy(), right.grad.numpy(), rtol=1e-13)


def test_a_parameter_of_no_axes_keeps_its_shape(stand_in):
    """CuPy's ascontiguousarray gives an array of no axes one."""
    weights = {"b": gg.asarray(np.float32(0.5), device="cuda").data, "w": stand_in.ones(3, dtype="float32")}
    new = gg.optim.Adam(0.1).step(weights, weights)
    assert new["b"].shape == ()
    assert new["w"].shape == (3,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_infinities_and_nan_are_the_same_on_both_devices(stand_in, masked, dtype):
    """The kernels let an exact zero win everywhere; the formulas only below an op that masks."""
    x = np.array([np.nan, np.inf, -np.inf, 1.0, -1e4], dtype)
    g = np.array([0, np.inf, np.nan, 2.0], dtype)[:, None] * np.ones(5, dtype)

    def gradients(device):
        xs = gg.tensor(np.tile(x, (4, 1)), device=device, requires_grad=True)
        b = gg.tensor(np.zeros(5, dtype), device=device, requires_grad=True)
        y = gg.swish(xs) + gg.bias_swish(xs, b)
        if masked:
            y = gg.where(gg.tensor(g == g, device=device), y, 0.0)
        y.backward(gg.tensor(g, device=device))
        return xs.grad.numpy(), b.grad.numpy()

    with np.errstate(all="ignore"):
        for got, want in zip(gradients("cuda"), gradients("cpu"), strict=True):
            assert_allclose(got, want, rtol=3e-3 if dtype == np.float16 else 1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (1, 5), (4, 5)])
def test_slope_of_swish_in_beta_shows_nan_on_both_devices(stand_in, shape):
    """The kernel gave 0 for infinite x whatever beta was."""
    x = np.array([np.inf, -np.inf, np.nan, 1.0, 0.0]) * np.ones((4, 1))
    for value in (0.0, np.nan, 1.0, -1.0):

        def slope(device, value=value):
            beta = gg.tensor(np.full(shape, value), device=device, requires_grad=True)
            gg.swish(gg.tensor(x, device=device), beta).backward(gg.tensor(np.ones((4, 5)), device=device))
            return beta.grad.numpy()

        with np.errstate(all="ignore"):
            assert_allclose(slope("cuda"), slope("cpu"), equal_nan=True)
