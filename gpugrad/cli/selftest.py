"""`gpugrad selftest`: are the numbers right on this machine?"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gpugrad as gg
from gpugrad.cli import selftest_cuda, selftest_ops, selftest_sums
from gpugrad.cli.files import check_outputs, say, write_json
from gpugrad.cli.fit import device_name, device_of
from gpugrad.cli.info import versions
from gpugrad.cli.selftest_report import Group, Run

MISSES_SHOWN = 40  # a group

# In this order, since on a GPU the ops take longest at first, with their many small kernels to compile.
SUMS = (selftest_sums.sums, selftest_sums.layouts, selftest_sums.models, selftest_sums.optimisers, selftest_sums.fits)
CUDA = (selftest_cuda.every_kernel, selftest_cuda.captured, selftest_cuda.memory, selftest_cuda.short_of_memory)
OPS = (selftest_ops.ops,)


def misses(groups: Sequence[Group]) -> Iterator[str]:
    """Yield a line for each miss."""
    for g in groups:
        for miss in g.misses[:MISSES_SHOWN]:
            yield f"MISS {g.name}: {miss['case']}: {miss['what']}: got {miss['got']}, wanted {miss['wanted']}"
        if len(g.misses) > MISSES_SHOWN:
            yield f"MISS {g.name}: and {len(g.misses) - MISSES_SHOWN} more"


def run(arguments: argparse.Namespace) -> int:
    """Run `gpugrad selftest`; returns 0 when all is right, 1 when something is not."""
    check_outputs([], {"--json": arguments.json})
    where = device_of(arguments.device)
    show = say if arguments.json == "-" else functools.partial(print, flush=True)
    check = Run(where, arguments.quick, show)
    began = time.perf_counter()
    show(f"gpugrad {gg.__version__} on {device_name(where)}")
    show(f"{'':34s}{'checks':>8s}{'missed':>8s}{'error/bound':>13s}{'seconds':>9s}")
    for part in (*SUMS, *(CUDA if where.kind == "cuda" else ()), *OPS):
        part(check)
    seconds = time.perf_counter() - began
    checks, missed = (sum(column) for column in zip(*((g.checks, len(g.misses)) for g in check.groups), strict=True))
    for line in misses(check.groups):
        show(line)
    show(f"{missed} of {checks:,} checks missed" if missed else f"all {checks:,} checks passed")
    if arguments.json:
        report: dict[str, Any] = {
            "device": str(where),
            "name": device_name(where),
            "quick": arguments.quick,
            "passed": not missed,
            "seconds": seconds,
            "versions": versions(),
            "groups": [vars(g) for g in check.groups],
        }
        write_json(arguments.json, report)
    return 1 if missed else 0
