"""Marks that depend on the machine, and the fixtures that every test may use."""

import functools
import os

import numpy as np
import pytest

from gpugrad import backend


@functools.cache
def _no_gpu() -> str | None:
    """Say why tests marked `gpu` cannot run here, or None when they can."""
    return backend.cuda_problem()


@functools.cache
def _no_torch() -> str | None:
    """Say why tests marked `oracle` cannot run here, or None when they can."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"PyTorch cannot be imported: {error}"
    return None


def pytest_runtest_setup(item):
    """Skip a test whose device or oracle is missing; fail instead where a GPU is required."""
    if item.get_closest_marker("gpu") and (problem := _no_gpu()):
        if os.environ.get("GPUGRAD_REQUIRE_GPU") == "1":
            pytest.fail(f"GPUGRAD_REQUIRE_GPU=1, but {problem}", pytrace=False)
        pytest.skip(problem)
    if item.get_closest_marker("oracle") and (problem := _no_torch()):
        pytest.skip(problem)


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
