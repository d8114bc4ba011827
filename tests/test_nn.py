"""Dense layers."""

import numpy as np
import pytest
from devices import Place, assert_allclose, assert_array_equal
from devices import test_device_is_there as test_device_is_there

import gpugrad as gg


def test_mlp_is_what_it_says(rng: np.random.Generator, device: Place) -> None:
    params = gg.nn.init_mlp([3, 5, 4, 2], seed=1, dtype=np.float64)
    X = rng.normal(size=(7, 3))
    h = X
    for layer in params[:-1]:
        h = np.maximum(h @ layer["W"] + layer["b"], 0)
    right = h @ params[-1]["W"] + params[-1]["b"]
    there = gg.nn.init_mlp([3, 5, 4, 2], seed=1, dtype=np.float64, device=device)
    allowed = 1e-14 if device.on_cpu else 1e-13
    assert_allclose(gg.nn.mlp(there, device.put(X), activation=gg.relu), right, rtol=allowed)
    assert_allclose(gg.nn.mlp(there, gg.tensor(X, device=device), activation=gg.relu), right, rtol=allowed)


def test_initial_parameters() -> None:
    params = gg.nn.init_mlp([400, 300, 1], seed=0)
    assert [layer["W"].shape for layer in params] == [(400, 300), (300, 1)]
    assert all(layer["W"].dtype == np.float32 for layer in params)
    assert all(not layer["b"].any() for layer in params)
    assert params[0]["W"].std() == pytest.approx(np.sqrt(2 / 400), rel=0.01)
    assert params[1]["W"].std() == pytest.approx(np.sqrt(1 / 300), rel=0.1)
    same, other = gg.nn.init_mlp([400, 300, 1], seed=0), gg.nn.init_mlp([400, 300, 1], seed=1)
    np.testing.assert_array_equal(params[0]["W"], same[0]["W"])
    assert not np.array_equal(params[0]["W"], other[0]["W"])


@pytest.mark.parametrize("sizes", [[3], [], [3, 0, 1]])
def test_bad_sizes(sizes: list[int]) -> None:
    with pytest.raises(gg.ShapeMismatch, match="sizes"):
        gg.nn.init_mlp(sizes)


def test_the_same_seed_on_every_device(device: Place) -> None:
    for here, there in zip(gg.nn.init_mlp([3, 2], seed=5), gg.nn.init_mlp([3, 2], seed=5, device=device), strict=True):
        assert isinstance(there["W"], device.ndarray)
        assert_array_equal(there["W"], here["W"])


def test_gradients(rng: np.random.Generator, device: Place) -> None:
    params = gg.nn.init_mlp([3, 4, 2], dtype=np.float64, device=device)
    X = device.put(rng.normal(size=(5, 3)))
    gg.check_grads(lambda p: gg.nn.mlp(p, X), [params], order=2)
