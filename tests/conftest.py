"""Marks that depend on the machine, and the fixtures that every test may use."""

import functools
import os

import numpy as np
import pytest
from cuda_proof import stand_in as stand_in_module
from devices import KINDS, Place, problem

from gpugrad import backend


@functools.cache
def _no_torch() -> str | None:
    """Say why tests marked `oracle` cannot run here, or None when they can."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"PyTorch cannot be imported: {error}"
    return None


def pytest_generate_tests(metafunc):
    """Run a test with the argument `device` on each kind of device that is there, `every_device` on all, to say why."""
    for name, kinds in (("device", [k for k in KINDS if not problem(k)]), ("every_device", KINDS[1:])):
        if name in metafunc.fixturenames:
            marks = {"cuda": [pytest.mark.gpu]}
            metafunc.parametrize(
                name, [pytest.param(k, marks=marks.get(k, [])) for k in kinds], ids=kinds, indirect=True
            )


def pytest_runtest_setup(item):
    """Skip a test whose device or oracle is missing; fail instead where a GPU is required."""
    if item.get_closest_marker("gpu") and (missing := problem("cuda")):
        if os.environ.get("GPUGRAD_REQUIRE_GPU") == "1":
            pytest.fail(f"GPUGRAD_REQUIRE_GPU=1, but {missing}", pytrace=False)
        pytest.skip(missing)
    if item.get_closest_marker("oracle") and (missing := _no_torch()):
        pytest.skip(missing)


@pytest.fixture
def device(request):
    """A Place: the device this run of the test is for."""
    kind = request.param
    if missing := problem(kind):
        pytest.skip(missing)
    if kind == "stand-in":
        with stand_in_module.install() as cupy:
            yield Place(kind, cupy)
    else:
        yield Place(kind, backend.cupy() if kind == "cuda" else None)


every_device = device


@pytest.fixture
def stand_in():
    """The stand-in for CuPy in its place, with two devices; the module, which counts syncs and launches."""
    if missing := problem("stand-in"):
        pytest.skip(missing)
    with stand_in_module.install(devices=2) as cupy:
        yield cupy


@pytest.fixture
def rng():
    """Random numbers that are the same in every run."""
    return np.random.default_rng(20240229)


@pytest.fixture
def frozen():
    """Return a function that copies data into a read-only array: whoever writes to it is caught."""

    def freeze(data, dtype=None):
        array = np.array(data, dtype=dtype)
        array.flags.writeable = False
        return array

    return freeze
