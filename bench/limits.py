"""What this machine can do at most, measured by itself: reading, copying, matrix products, and calls in Python."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from gpugrad import backend

from .measure import Setting, sample
from .peers import Run, versions

SETTINGS = ("OMP_", "OPENBLAS_", "MKL_", "NUMBA_", "GPUGRAD_", "XLA_", "JAX_", "TORCH", "MALLOC_", "LD_PRELOAD")


def threaded(setting: Setting, size: int, part: Callable[[int, int], Any]) -> tuple[Run, Run]:
    """Return part(start, stop) over 0..size as one call, and as one call a thread."""
    pool = ThreadPoolExecutor(setting.threads)
    edges = [size * i // setting.threads for i in range(setting.threads + 1)]
    pairs = list(itertools.pairwise(edges))
    return lambda: part(0, size), lambda: list(pool.map(lambda pair: part(*pair), pairs))


def python_loop() -> int:
    """Run a loop in Python: how fast the interpreter is, which limits what is small."""
    total = 0
    for i in range(2_000):
        total += i & 3
    return total


def limits(setting: Setting) -> dict[str, Any]:
    """Return the limits by name, each with its samples and a rate: GBps, GFLOPs, or none for the loop in Python."""
    n = (16 if setting.quick else 64) << 20  # float32: well above the caches
    side = 1024 if setting.quick else 2048
    runs: dict[str, Callable[[], Any]]
    rng = np.random.default_rng(0)
    with backend.activate(setting.where):
        a, b = (backend.to_device(rng.standard_normal((side, side), np.float32), setting.where) for _ in range(2))
        x = backend.to_device(np.tile(rng.standard_normal(1 << 20, np.float32), n >> 20), setting.where)
        y = x.copy()
        work: dict[str, tuple[str, float]] = {}
        if setting.where.kind == "cuda":
            runs = {"read": x.sum, "copy": lambda: y.data.copy_from_device_async(x.data, x.nbytes)}
            matmul = backend.cupy().matmul
        else:
            read, read_all = threaded(setting, n, lambda i, j: x[i:j].sum())
            copy, copy_all = threaded(setting, n, lambda i, j: np.copyto(y[i:j], x[i:j]))
            runs = {"read, 1 thread": read, "copy, 1 thread": copy}
            if setting.threads > 1:
                runs |= {f"read, {setting.threads} threads": read_all, f"copy, {setting.threads} threads": copy_all}
            matmul = np.matmul
        work = {name: ("GBps", (1 if name.startswith("read") else 2) * x.nbytes / 1e9) for name in runs}
        runs[f"gemm {side}, float32"] = lambda: matmul(a, b)
        work[f"gemm {side}, float32"] = ("GFLOPs", 2 * side**3 / 1e9)
        runs["calls, a loop in Python"] = python_loop
        found = sample(runs, min(4.0, 5 * setting.seconds), setting.where)
    for name, (unit, amount) in work.items():
        found[name][unit] = amount / found[name]["min_s"]
    return found


def best(found: dict[str, Any], bound: str) -> dict[str, Any] | None:
    """Return the fastest of the limits of one kind ("read", "copy", "gemm", "calls"), by name."""
    rows = [{"name": name, **row} for name, row in found.items() if name.startswith(bound)]
    return min(rows, key=lambda row: row["min_s"], default=None)


# -------------------------------------------------------------------------------------------- the machine, as it is set


def machine(setting: Setting) -> dict[str, Any]:
    """Describe the machine, its settings and the versions measured on it."""
    about: dict[str, Any] = {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": setting.threads,
        "load": os.getloadavg()[0]
        if hasattr(os, "getloadavg")
        else None,  # what others run, before anything is measured
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None,
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "transparent_hugepages": _text("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy_simd": np.show_config(mode="dicts")["SIMD Extensions"]["found"],  # type: ignore[call-overload]
        "blas": [
            {key: library.get(key) for key in ("user_api", "internal_api", "version", "num_threads", "architecture")}
            for library in threadpoolctl.threadpool_info()
        ],
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
        "versions": versions(),
    }
    if setting.where.kind == "cuda":
        runtime = backend.cupy().cuda.runtime
        card = runtime.getDeviceProperties(setting.where.number)
        about["gpu"] = {
            "name": card["name"].decode(errors="replace"),
            "memory_bytes": int(card["totalGlobalMem"]),
            "driver": int(runtime.driverGetVersion()),
            "runtime": int(runtime.runtimeGetVersion()),
        }
    if not setting.numba:
        about["versions"]["numba"] = None
    return about


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpuinfo(key: str) -> str | None:
    lines = (_text("/proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _caches() -> dict[str, str]:
    """Return the size of each cache of the first core, by level and kind."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(str(index / name)) for name in ("level", "type", "size"))
        if level and kind and size:
            found[f"L{level} {kind}"] = size
    return found
