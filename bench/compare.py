"""Compare gpugrad with its peers in one process: ``python -m bench.compare [WORKLOAD ...] [--json FILE] [--quick]``.

Implementations take turns, so that a noisy machine is noisy for all. Prints the least and the median time of each, and
its ratio to gpugrad's, from the least times.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from bench.workloads import PEERS, QUICK, WORKLOADS, Workload, blocked_by_hand, missing, mlp_gemms


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Return seconds a call, over `repeats` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def compare(workload: Workload, extra: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Time every implementation in turn for about `seconds` in all."""
    runs = {}
    for peer in workload.peers():
        runs[peer] = workload.build[peer]()
        workload.check(peer, runs[peer])
    runs |= extra
    once = {}
    for name, run in runs.items():
        run()
        once[name] = timed(run, 1)
    repeats = {name: max(1, int(0.02 / max(t, 1e-7))) for name, t in once.items()}
    rounds = max(3, min(50, int(seconds / sum(once[n] * repeats[n] for n in runs))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(timed(run, repeats[name]))
    return {n: {"min": min(s), "median": statistics.median(s), "rounds": rounds} for n, s in samples.items()}


def machine() -> dict[str, Any]:
    """Describe the machine and the versions measured on it."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {"python": platform.python_version()}
    for name in ("gpugrad", "numpy", "torch", "jax", "autograd", "threadpoolctl"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    simd = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    return {"processor": model, "cores": cores, "numpy_simd": simd, "system": platform.platform(), "versions": versions}


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; default all")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each workload (default 20)")
    options = parser.parse_args(arguments)
    chosen = options.workloads or list(WORKLOADS)
    if unknown := set(chosen) - set(WORKLOADS):
        parser.error(f"unknown workload {sorted(unknown)[0]!r}: expected {', '.join(WORKLOADS)}")
    report: dict[str, Any] = {"machine": machine(), "quick": options.quick, "results": {}}
    print(json.dumps(report["machine"], indent=1), file=sys.stderr)
    for name in chosen:
        workload = (QUICK if options.quick else WORKLOADS)[name]()
        extra: dict[str, Callable[[], Any]] = {}
        if name == "mlp" and not options.quick:
            extra["its GEMMs alone (NumPy)"] = mlp_gemms()
        if name == "least_squares" and not options.quick:
            X = np.ones((2_000_000, 32), np.float32)
            extra["one read of X (X.sum(), one thread)"] = X.sum
            extra["NumPy by hand, blocks, 2 threads"] = blocked_by_hand()
        rows = compare(workload, extra, 1.0 if options.quick else options.seconds)
        report["results"][workload.name] = rows
        mine = rows["gpugrad"]["min"]
        print(f"\n{workload.name}\n  {'':36s}{'min ms':>12s}{'median ms':>12s}{'/ gpugrad':>12s}")
        for who, row in rows.items():
            print(f"  {who:36s}{row['min'] * 1e3:12.4g}{row['median'] * 1e3:12.4g}{row['min'] / mine:12.2f}")
        for peer in PEERS:
            if peer in workload.build and missing(peer):
                print(f"  {peer:36s}missing: {missing(peer)}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
