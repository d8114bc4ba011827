"""Measure gpugrad on a GPU: ``python -m bench.gpu [--json FILE] [--quick] [--device cuda:N]``.

First the card's own limits (copying, matrix products), then every kernel in GB/s counted by the bytes that it must
move, then ops and training steps beside PyTorch, JAX and plain CuPy. Values are checked against float64 before anything
is timed; data is random; every implementation is warm and waited for. A peer that cannot run is named as missing.
Exit status: 0 measured, 1 a value was wrong, 3 there is no GPU.
"""

import argparse
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np

import gpugrad as gg
from gpugrad import backend, kernels
from gpugrad.cli.selftest_cuda import EXACT, SUMMING, arguments_of
from gpugrad.errors import DeviceUnavailable

HALF, SINGLE, DOUBLE = np.dtype("float16"), np.dtype("float32"), np.dtype("float64")
TARGET = 0.9  # of the copy bandwidth
COLUMNS = 256
BETA = 1.25
NEEDED = 12e9  # bytes of free device memory that full sizes ask for
STAND_IN = "stand-in"  # the name of what stands for a GPU in tests; its figures are no GPU's


class WrongValue(Exception):
    """An implementation gives other numbers than float64 does."""


class Meter:
    """Times things on one device, for as long as there is time at all.

    scale: of all sizes. seconds: for everything together.
    """

    def __init__(self, where: backend.Device, scale: float, seconds: float, each: float) -> None:
        self.cupy, self.where, self.scale, self.each = backend.cupy(), where, scale, each
        self.deadline = time.perf_counter() + seconds
        self.wrong: list[str] = []

    def size(self, full: int, multiple: int = 1) -> int:
        """Return a number of elements or rows at this scale."""
        return max(1, int(full * self.scale) // multiple) * multiple

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def wait(self) -> None:
        self.cupy.cuda.runtime.deviceSynchronize()

    def on_device(self, run: Callable[[], Any]) -> dict[str, float]:
        """Return seconds a call by the device's clock, a few calls a sample so that launches do not show."""
        start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()

        def sample(calls: int) -> float:
            start.record()
            for _ in range(calls):
                run()
            stop.record()
            stop.synchronize()
            return float(self.cupy.cuda.get_elapsed_time(start, stop)) * 1e-3 / calls

        return self._timed(sample)

    def on_host(self, run: Callable[[], Any], wait: Callable[[Any], object]) -> dict[str, float]:
        """Return seconds a call by the host's clock, from idle to idle, launches included."""

        def sample(calls: int) -> float:
            self.wait()
            began = time.perf_counter()
            for _ in range(calls):
                result = run()
            wait(result)
            return (time.perf_counter() - began) / calls

        return self._timed(sample)

    def _timed(self, sample: Callable[[int], float]) -> dict[str, float]:
        for _ in range(2):
            once = sample(1)  # the first compiles
        calls = int(min(max(0.01 / once, 1), 50))
        samples = [sample(calls)]
        began = time.perf_counter()
        while len(samples) < 3 or (time.perf_counter() - began < self.each and len(samples) < 100):
            samples.append(sample(calls))
        return {"median_s": statistics.median(samples), "min_s": min(samples), "samples": len(samples), "calls": calls}


def launches(meter: Meter, run: Callable[[], Any]) -> int | None:
    """Count the kernels that one call launches, by PyTorch's profiler, which sees all of a process; None without it."""
    if hasattr(meter.cupy, "counting"):
        with meter.cupy.counting() as count:
            run()
        return int(count.launches)
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile

        if not torch.cuda.is_available():
            return None
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            meter.wait()
        names = [event.name for event in profiler.events() if "CUDA" in str(event.device_type)]
        return sum(not name.lower().startswith(("memcpy", "memset")) for name in names) or None
    except Exception:  # a profiler that is missing or refused is no reason to stop
        return None


# ------------------------------------------------------------------------------------------------- the machine


def machine(meter: Meter) -> dict[str, Any]:
    """Describe the card and the versions measured on it."""
    runtime, number = meter.cupy.cuda.runtime, meter.where.number
    about = runtime.getDeviceProperties(number)
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in ("gpugrad", "numpy", "cupy", "torch", "jax", "triton"):
        versions[name] = _version(name)
    return {
        "name": about["name"].decode(errors="replace"),
        "memory_bytes": int(about["totalGlobalMem"]),
        "compute_capability": f"{about['major']}.{about['minor']}",
        "multiprocessors": int(about["multiProcessorCount"]),
        "cuda_driver": int(runtime.driverGetVersion()),
        "cuda_runtime": int(runtime.runtimeGetVersion()),
        "nvidia_smi": _smi(number),
        "versions": versions,
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


def _version(name: str) -> str:
    if name == "gpugrad":
        return gg.__version__  # also from a checkout
    names = ["cupy-cuda13x", "cupy-cuda12x", "cupy"] if name == "cupy" else [name]
    for package in names:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _smi(number: int) -> dict[str, str] | None:
    """Return what nvidia-smi tells about driver and clocks, None where it does not."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,pstate"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", str(number)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields.split(","), (part.strip() for part in done.stdout.split(",")), strict=False))


def limits(meter: Meter) -> dict[str, Any]:
    """Measure what no kernel can beat: copying on the device, from the host, and cuBLAS."""
    cupy, found = meter.cupy, {}
    for n in (meter.size(100_000_000), meter.size(400_000_000)):
        if 8 * n > 0.5 * cupy.cuda.runtime.memGetInfo()[0]:
            continue
        source = random(meter, (n,), SINGLE)
        target = cupy.empty_like(source)
        took = meter.on_device(functools.partial(target.data.copy_from_device_async, source.data, source.nbytes))
        found[f"copy of {n:,} float32"] = {**took, "GBps": 8 * n / took["median_s"] / 1e9}
        del source, target
    side = max(8, int(8192 * meter.scale ** (1 / 3)) // 8 * 8)
    a, b = (random(meter, (side, side), SINGLE) for _ in range(2))
    gemms: dict[str, Callable[[], Any]] = {f"matmul {side}, float32": lambda: cupy.matmul(a, b)}
    try:
        from cupy._core import get_compute_type, set_compute_type
        from cupy._core._routines_linalg import COMPUTE_TYPE_TF32

        def quick() -> Any:
            before = get_compute_type("f")
            set_compute_type("f", COMPUTE_TYPE_TF32)
            try:
                return cupy.matmul(a, b)
            finally:
                set_compute_type("f", before)

        quick()
        gemms[f"matmul {side}, TF32 (for information: off unless asked for)"] = quick
    except Exception as error:
        found["matmul, TF32"] = {"missing": str(error)}
    for name, gemm in gemms.items():
        took = meter.on_device(gemm)
        found[name] = {**took, "TFLOPs": 2 * side**3 / took["median_s"] / 1e12}
    import cupyx

    n = meter.size(64_000_000)
    pinned = cupyx.empty_pinned((n,), dtype=SINGLE)
    pinned[...] = random(meter, (n,), SINGLE).get()
    target = cupy.empty((n,), dtype=SINGLE)
    took = meter.on_device(lambda: target.set(pinned))
    found[f"host to device, pinned, {n:,} float32"] = {**took, "GBps": 4 * n / took["median_s"] / 1e9}
    return found


def copy_rate(found: dict[str, Any]) -> float:
    """Return the best copy bandwidth in GB/s."""
    return max(row["GBps"] for name, row in found.items() if name.startswith("copy"))


def random(meter: Meter, shape: tuple[int, ...], dtype: Any, scale: float = 1.0, seed: int = 0) -> Any:
    """Return normal numbers on the device: up to 4 million drawn on the host, repeated."""
    count = int(np.prod(shape))
    drawn = min(count, 1 << 22)
    values = np.random.default_rng(seed).standard_normal(drawn, dtype=SINGLE) * np.float32(scale)
    device = backend.to_device(values.astype(dtype), meter.where)
    return meter.cupy.tile(device, -(-count // drawn))[:count].copy().reshape(shape)


# ------------------------------------------------------------------------------------------------- the kernels


def _data(meter: Meter, dtype: Any, rows: int) -> dict[str, Any]:
    """Return what the launch functions take, (rows, COLUMNS) each."""
    shape, wide = (rows, COLUMNS), kernels.WIDE[dtype]
    x = random(meter, shape, dtype, scale=3)
    return {
        "x": x,
        "eta": x,
        "target": (random(meter, shape, dtype, seed=1) > 0).astype(dtype),
        "g:A": random(meter, shape, wide, seed=2),
        "m:A": kernels.swish_keep(x, BETA)[1],
        "b": random(meter, (COLUMNS,), dtype, seed=3),
        "beta:A": BETA,
    }


def _moved(name: str, dtype: Any) -> int:
    """Return the bytes an element that a launch must read and write; rows of biases do not count."""
    wide: Any = kernels.WIDE[dtype]
    widths = {True: wide.itemsize, False: dtype.itemsize}
    arrays = [a for a in arguments_of(name) if a not in ("b", "beta:A")]
    written = ("dx:A",) if name in SUMMING else kernels.POINTWISE[name].outputs
    return sum(widths[a.endswith(":A")] for a in (*arrays, *written))


def _verify(meter: Meter, name: str, dtype: Any, given: list[Any], rows: int) -> None:
    """Compare the launch on some rows with float64, every element and sum; raise WrongValue."""
    cut = [a[:rows] if getattr(a, "ndim", 0) == 2 else a for a in given]
    got = getattr(kernels, name)(*cut)
    if got is None:
        raise WrongValue(f"{name} {dtype}: the launch did not take its arguments")
    wide: Any = kernels.WIDE[dtype]
    eps = float(np.finfo(wide).eps)
    exact = EXACT[name](*(np.asarray(_host(a), DOUBLE) for a in cut))
    for part, (want, units) in zip(got if isinstance(got, tuple) else (got,), exact, strict=True):
        part = _host(part)
        rounding = 2.0**-10 * np.abs(want) + 2.0**-24 if part.dtype == HALF else 0
        off = np.abs(part.astype(DOUBLE) - want)
        if not np.all(off <= eps * units + rounding + 1e-30):
            raise WrongValue(f"{name} {dtype}: off by up to {np.max(off):.3g} from float64")


def _verify_whole(meter: Meter, name: str, dtype: Any, given: list[Any], part: int) -> None:
    """Compare the launch on all rows with launches on parts of them: the same numbers, wherever they lie."""
    launch = getattr(kernels, name)
    whole = launch(*given)
    whole = whole if isinstance(whole, tuple) else (whole,)
    rows = len(given[0])
    for start in {0, (rows - part) // 2, rows - part}:
        cut = [a[start : start + part] if getattr(a, "ndim", 0) == 2 else a for a in given]
        some = launch(*cut)
        for big, small in zip(whole, some if isinstance(some, tuple) else (some,), strict=True):
            if big.ndim == 2 and not bool((big[start : start + part] == small).all()):
                raise WrongValue(f"{name} {dtype}: other numbers in {rows:,} rows than in {part:,} of them")
    if name in SUMMING:
        terms = kernels.swish_backward_both(*given)[1] if name == "swish_backward_sum" else whole[0]
        axes = tuple(range(terms.ndim - whole[1].ndim))
        total, size = terms.sum(axis=axes, dtype=DOUBLE), meter.cupy.abs(terms).sum(axis=axes, dtype=DOUBLE)
        if not bool((meter.cupy.abs(total - whole[1]) <= 1e-6 * size).all()):
            raise WrongValue(f"{name} {dtype}: the sum over {rows:,} rows is off")


def _host(value: Any) -> Any:
    return np.asarray(backend.to_device(value, backend.CPU) if backend.is_array(value) else value)


def measure_kernels(meter: Meter, copy: float) -> list[dict[str, Any]]:
    """Time every launch function, in GB/s and as a share of the copy bandwidth."""
    found: list[dict[str, Any]] = []
    for dtype, full in ((SINGLE, 100_000_000), (HALF, 50_000_000), (DOUBLE, 50_000_000)):
        rows = meter.size(full, COLUMNS) // COLUMNS
        data = _data(meter, dtype, rows)
        names = [*kernels.POINTWISE, *SUMMING]
        variants = [(name, "", data) for name in names]
        row = backend.to_device(np.linspace(0.5, 2, COLUMNS).astype(kernels.WIDE[dtype]), meter.where)
        variants.append(("swish_backward_sum", ", beta a row", {**data, "beta:A": row}))
        for name, kind, arguments in variants:
            given = [arguments[a] for a in arguments_of(name)]
            entry: dict[str, Any] = {"kernel": name + kind, "dtype": str(dtype), "elements": rows * COLUMNS}
            found.append(entry)
            if meter.left <= 0:
                entry["skipped"] = "out of time"
                continue
            try:
                _verify(meter, name, dtype, given, min(rows, 4_003))
                _verify_whole(meter, name, dtype, given, min(rows, 64))
            except WrongValue as error:
                entry["wrong"] = str(error)
                meter.wrong.append(str(error))
                continue
            _rate(meter, entry, functools.partial(getattr(kernels, name), *given), _moved(name, dtype), copy)
        found += _measure_updates(meter, dtype, data, rows, copy)
    return found


def _measure_updates(meter: Meter, dtype: Any, data: dict[str, Any], rows: int, copy: float) -> list[dict[str, Any]]:
    """Time the optimiser updates of one large parameter; `gpugrad selftest` checks their values."""
    wide: Any = kernels.WIDE[dtype]
    weight, gradient = [data["x"]], [data["g:A"]]
    states = [[meter.cupy.zeros_like(data["g:A"]) for _ in range(2)]]
    sgd = functools.partial(
        kernels.sgd_update, weight, gradient, [states[0][:1]], rate=0.1, momentum=0.9, nesterov=False, weight_decay=0.0
    )
    adam = functools.partial(
        kernels.adam_update, weight, gradient, states, rate=0.1, betas=(0.9, 0.999), eps=1e-8, count=1, shrink=0.0
    )
    moved = {
        "sgd_update": 2 * dtype.itemsize + 3 * wide.itemsize,
        "adam_update": 2 * dtype.itemsize + 5 * wide.itemsize,
    }
    found = []
    for name, run in (("sgd_update", sgd), ("adam_update", adam)):
        entry: dict[str, Any] = {"kernel": name, "dtype": str(dtype), "elements": rows * COLUMNS}
        found.append(entry)
        if meter.left <= 0:
            entry["skipped"] = "out of time"
            continue
        _rate(meter, entry, functools.partial(run, scale=None), moved[name], copy)
    return found


def _rate(meter: Meter, entry: dict[str, Any], run: Callable[[], Any], width: int, copy: float) -> None:
    entry |= meter.on_device(run)
    entry["bytes_per_element"] = width
    entry["GBps"] = width * entry["elements"] / entry["median_s"] / 1e9
    entry["of_copy"] = entry["GBps"] / copy


# ------------------------------------------------------------------------------------------------- the report


def show_limits(found: dict[str, Any]) -> None:
    """Print the card's own limits."""
    print("\nlimits of this card")
    for name, row in found.items():
        rate = next((f"{row[unit]:,.1f} {text}" for unit, text in _UNITS if unit in row), row.get("missing", ""))
        print(f"  {name:64s}{rate:>18s}")


_UNITS = (("GBps", "GB/s"), ("TFLOPs", "TFLOP/s"))


def show_kernels(found: Sequence[dict[str, Any]]) -> None:
    """Print the kernels against the copy bandwidth."""
    print(f"\nkernels: GB/s by the bytes they must move, and as a share of copying (target {TARGET})")
    print(f"  {'':32s}{'dtype':>9s}{'elements':>13s}{'median us':>11s}{'min us':>10s}{'GB/s':>9s}{'of copy':>9s}")
    for row in found:
        start = f"  {row['kernel']:32s}{row['dtype']:>9s}{row['elements']:13,d}"
        if "of_copy" not in row:
            print(start, row.get("wrong") or row["skipped"])
            continue
        times = f"{row['median_s'] * 1e6:11.1f}{row['min_s'] * 1e6:10.1f}"
        below = "" if row["of_copy"] >= TARGET else "  below"
        print(f"{start}{times}{row['GBps']:9.0f}{row['of_copy']:9.2f}{below}")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    made.add_argument("--json", metavar="FILE", help="write everything measured")
    made.add_argument("--quick", action="store_true", help="a hundredth of the sizes, to see that everything runs")
    made.add_argument("--device", default="cuda", metavar="DEV", help="cuda or cuda:N (default cuda)")
    made.add_argument("--scale", type=_positive, default=None, metavar="F", help="of all sizes (default 1, quick 0.01)")
    made.add_argument("--seconds", type=_positive, default=190.0, metavar="S", help="for everything (default 190)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    options = parser().parse_args(arguments)
    if options.device.partition(":")[0] != "cuda":
        parser().error(f"--device {options.device}: expected cuda or cuda:N")
    if options.json and not os.access(os.path.dirname(os.path.abspath(options.json)), os.W_OK):
        parser().error(f"--json {options.json}: no folder to write to")
    if problem := backend.cuda_problem():
        print(f"bench.gpu: {problem}", file=sys.stderr)
        return 3
    try:
        where = backend.as_device(options.device)
    except (ValueError, DeviceUnavailable) as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 3
    from . import gpu_steps  # its peers are imported when they are built

    scale = options.scale or (0.01 if options.quick else 1.0)
    with backend.activate(where):
        scale = min(scale, backend.memory(where)[0] / NEEDED)
        meter = Meter(where, scale, options.seconds, 0.02 if options.quick else 0.2)
        report: dict[str, Any] = {"quick": options.quick, "scale": scale, "machine": machine(meter)}
        if report["machine"]["name"] == STAND_IN:
            report["warning"] = "a stand-in computed this on the CPU: no figure here is a GPU's"
            print(report["warning"].upper())
        print(json.dumps(report["machine"], indent=1), flush=True)
        report["limits"] = limits(meter)
        show_limits(report["limits"])
        report["kernels"] = measure_kernels(meter, copy_rate(report["limits"]))
        show_kernels(report["kernels"])
        report["steps"] = []
        for make in gpu_steps.STEPS:
            save(options.json, report)  # whatever stops this, what was measured is kept
            report["steps"].append(gpu_steps.measure(meter, make))
            gpu_steps.show(report["steps"][-1])
        gpu_steps.count(meter, report["steps"])
    report["targets"] = targets(report)
    report["wrong"] = meter.wrong
    print("\ntargets")
    for target in report["targets"]:
        print(f"  {'met   ' if target['met'] else 'MISSED'}  {target['what']}: {target['found']}")
    for text in meter.wrong:
        print(f"WRONG {text}")
    if "warning" in report:
        print(report["warning"].upper())
    save(options.json, report)
    return 1 if meter.wrong else 0


def save(path: str | None, report: dict[str, Any]) -> None:
    """Write the report, if it is to be written."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare what was measured with what is wanted."""
    found = []
    rows = [k for k in report["kernels"] if k["kernel"] in kernels.POINTWISE and k["dtype"] == "float32"]
    rows = [k for k in rows if "of_copy" in k]
    if rows:
        worst = min(rows, key=lambda row: row["of_copy"])
        text = f"{worst['of_copy']:.2f} ({worst['kernel']})"
        what = f"every pointwise float32 kernel at least {TARGET} of the copy bandwidth"
        found.append({"what": what, "found": text, "met": worst["of_copy"] >= TARGET})
    for step in report["steps"]:
        for target in step.get("targets", ()):
            peer, least = target["peer"], target["least"]
            times = step["peers"]
            if "median_s" in times.get("gpugrad", {}) and "median_s" in times.get(peer, {}):
                ratio = times[peer]["median_s"] / times["gpugrad"]["median_s"]
                what = f"{step['name']}: {peer}'s time over gpugrad's at least {least}"
                found.append({"what": what, "found": f"{ratio:.2f}", "met": ratio >= least})
    return found


if __name__ == "__main__":
    raise SystemExit(main())
