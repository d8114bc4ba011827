"""The workloads as pytest-benchmark suites: ``pytest bench --benchmark-group-by=group``.

GPUGRAD_BENCH_QUICK=1 takes small sizes. Values are checked before anything is timed.
"""

import os

import pytest

from bench.workloads import PEERS, QUICK, WORKLOADS, missing

TABLE = QUICK if os.environ.get("GPUGRAD_BENCH_QUICK") == "1" else WORKLOADS
_made: dict[str, object] = {}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", TABLE)
def test_workload(benchmark, name: str, peer: str) -> None:
    workload = _made.setdefault(name, TABLE[name]())
    if peer not in workload.build:
        pytest.skip(f"{peer} has no implementation of {workload.name}")
    if missing(peer):
        pytest.skip(f"missing peer: {missing(peer)}")
    run = workload.build[peer]()
    workload.check(peer, run)
    benchmark.group = workload.name
    benchmark.name = peer
    benchmark(run)
