"""The workloads as pytest-benchmark suites: ``pytest bench``. GPUGRAD_BENCH_QUICK=1 takes small sizes.

Values are checked against float64 before anything is timed.
"""

import functools
import os
from typing import Any

import pytest

from bench.workloads import IMPLEMENTED, QUICK, WORKLOADS, Workload, missing

# the peers' own warnings are theirs
pytestmark = pytest.mark.filterwarnings("default")
TABLE = QUICK if os.environ.get("GPUGRAD_BENCH_QUICK") == "1" else WORKLOADS


@functools.cache
def workload(name: str) -> Workload:
    return TABLE[name]()


@pytest.mark.parametrize(("name", "peer"), [(name, peer) for name in TABLE for peer in IMPLEMENTED[name]])
def test_workload(benchmark: Any, name: str, peer: str) -> None:
    if missing(peer):
        pytest.skip(f"missing peer: {missing(peer)}")
    work = workload(name)
    assert tuple(work.build) == IMPLEMENTED[name]
    run = work.build[peer]()
    work.check(peer, run)
    benchmark.group = work.name
    benchmark.name = peer
    benchmark(run)
