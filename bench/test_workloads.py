"""The rows of `gpugrad bench` as pytest-benchmark suites: ``pytest bench``. GPUGRAD_BENCH_QUICK=1 takes small sizes.

Values are checked against float64 before anything is timed. What a process of its own measures (memory, threads, first
calls) is the command's alone.
"""

import functools
import os
from typing import Any

import pytest

from gpugrad.backend import CPU, available_cores

from .measure import Setting, Work
from .peers import PEERS, missing
from .suites import SUITES

# the peers' own warnings are theirs
pytestmark = pytest.mark.filterwarnings("default")
SETTING = Setting(quick=os.environ.get("GPUGRAD_BENCH_QUICK") == "1", threads=available_cores())
ROWS = {f"{suite}: {work.name}": work for suite, make in SUITES.items() for work in make(SETTING) if not work.alone}


@functools.lru_cache(maxsize=1)  # the data of one row at a time
def prepared(row: str) -> tuple[Work, Any, Any]:
    work = ROWS[row]
    data = work.make()
    return work, data, work.verify(data)


@pytest.mark.parametrize(("row", "name"), [(row, name) for row, work in ROWS.items() for name in work.build])
def test_workload(benchmark: Any, row: str, name: str) -> None:
    if name in PEERS and (reason := missing(name, CPU)):
        pytest.skip(f"missing peer: {reason}")
    if name in ROWS[row].left_out:
        pytest.skip(f"left out: {ROWS[row].left_out[name]}")
    work, data, verify = prepared(row)
    run = work.build[name](data)
    assert (wrong := verify(name, run())) is None, wrong
    benchmark.group = row
    benchmark.name = name
    benchmark(run)
