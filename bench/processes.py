"""What needs a process of its own: peaks of memory, other numbers of threads, first calls of what is compiled.

A child is asked by JSON in its arguments and answers by JSON in the last line of its output.

Memory is the peak of what the process has in physical memory while a warm implementation runs twice, less what it had
before and less the results: data in the library's own form, its code and what it compiled for a small problem are there
before. Linux counts the peak (VmHWM, reset through /proc/self/clear_refs); where that cannot be reset, a thread looks
once a millisecond and may miss a shorter peak. What malloc has kept for reuse is given back before, not to hide in it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpugrad
from gpugrad import backend

from .measure import MINE, Setting, Target, Work, in_turns, summary
from .peers import hold_threads, importable

SERVE = "from gpugrad.cli.bench import part; part('processes').serve()"
MEMORY = 100e6  # bytes beyond data and results
WEIGHED = (MINE, "numpy", "torch", "torch.compile", "jax.jit")
CACHES = tuple(f"{name}_CACHE_DIR" for name in ("GPUGRAD", "NUMBA", "TORCHINDUCTOR", "JAX_COMPILATION"))


# ---------------------------------------------------------------------------------------------------------- the parent


def ask(task: str, work: Work, name: str, setting: Setting, **environment: str) -> dict[str, Any]:
    """Have a fresh process measure one implementation of a row; {"failed": why} where it cannot."""
    request = {
        "task": task,
        "suite": work.suite,
        "row": work.name,
        "implementation": name,
        "setting": {**dataclasses.asdict(setting), "where": str(setting.where)},
    }
    folder = str(Path(gpugrad.__file__).parents[1])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", SERVE, json.dumps(request)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _row(work: Work, setting: Setting, measured: Callable[[str], dict[str, Any]], at_once: int = 1) -> dict[str, Any]:
    row = work.row(setting)
    names = [name for name in work.build if not work.reason(name, setting)]
    with ThreadPoolExecutor(at_once) as pool:
        found = dict(zip(names, pool.map(measured, names), strict=True))
    row["implementations"] = {name: work.reason(name, setting) or found[name] for name in work.build}
    return row


def weighed(work: Work, setting: Setting) -> Work:
    """Return the row of the memory that a row takes."""

    def measure(work: Work, setting: Setting) -> dict[str, Any]:
        return _row(work, setting, lambda name: ask("memory", work, name, setting), at_once=setting.threads)

    targets = () if setting.quick or setting.where.kind != "cpu" else (Target(most=MEMORY),)
    build = {name: run for name, run in work.build.items() if name in WEIGHED}
    left_out = dict(work.left_out)
    if setting.quick:
        left_out |= dict.fromkeys(("numpy", "torch"), "--quick starts two processes a row")
    if setting.where.kind != "cpu":
        left_out |= dict.fromkeys(build, "measured on the CPU only")
    elif not Path("/proc/self/status").exists():
        left_out |= dict.fromkeys(build, "this system has no /proc to see it in")
    return dataclasses.replace(
        work,
        suite="memory",
        build=build,
        measure=measure,
        targets=targets,
        bound="memory",
        left_out=left_out,
        alone=True,
    )


def on_threads(work: Work, threads: int) -> Work:
    """Return a row as it is on so many threads."""

    def measure(work: Work, setting: Setting) -> dict[str, Any]:
        child = dataclasses.replace(setting, threads=threads)
        asked = ask("turns", work, "", child)
        row = work.row(setting)
        if "failed" in asked:
            asked = {"implementations": dict.fromkeys(work.build, asked), "references": {}}
        return {**row, "implementations": asked["implementations"], "references": asked["references"]}

    name = f"{work.name}, {threads} thread{'s' * (threads > 1)}"
    return dataclasses.replace(work, name=name, measure=measure, curve=("threads", threads), targets=(), alone=True)


def first_calls(work: Work) -> list[Work]:
    """Return the rows of the first call of a row in a fresh process: nothing compiled yet, and all of it on disk."""
    build = {name: run for name, run in work.build.items() if name in (MINE, "torch.compile", "jax.jit")}
    taken: dict[str, dict[bool, list[float] | str]] = {}

    def calls(asked: Work, name: str, setting: Setting) -> dict[bool, list[float] | str]:
        found: dict[bool, list[float] | str] = {False: [], True: []}
        with tempfile.TemporaryDirectory() as folder:
            for attempt in range(1 if setting.quick or name != MINE else 4):
                caches = {variable: f"{folder}/{attempt}/{variable}" for variable in CACHES}
                caches["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
                for warm in (False, True):
                    answer, times = ask("first", asked, name, setting, **caches), found[warm]
                    if "failed" in answer:
                        found[warm] = str(answer["failed"])
                    elif isinstance(times, list):
                        times.append(answer["seconds"])
        return found

    def measure(warm: bool) -> Callable[[Work, Setting], dict[str, Any]]:
        def measured(asked: Work, name: str, setting: Setting) -> dict[str, Any]:
            # both kinds come from one measurement: the row of the second takes what the row of the first left
            if not warm or name not in taken:
                taken[name] = calls(asked, name, setting)
            times = taken.pop(name)[warm] if warm else taken[name][warm]
            return {"failed": times} if isinstance(times, str) else summary(times)

        return lambda asked, setting: _row(asked, setting, lambda name: measured(asked, name, setting))

    return [
        dataclasses.replace(
            work,
            suite="overhead",
            name=f"first call, {what}: {work.name}",
            build=build,
            bound="calls",
            targets=(),
            measure=measure(warm),
            alone=True,
        )
        for warm, what in ((False, "nothing compiled yet"), (True, "compiled by an earlier process"))
    ]


# ----------------------------------------------------------------------------------------------------------- the child


def serve() -> None:
    """Answer the request in the arguments of this process."""
    request = json.loads(sys.argv[1])
    setting = Setting(**{**request["setting"], "where": backend.as_device(request["setting"]["where"])})
    importable("numba", setting.numba)
    hold_threads(setting.threads, setting.where)
    from .suites import SUITES, with_targets  # which have the rows of this module

    make = with_targets if request["task"] == "memory" else SUITES[request["suite"]]
    rows = make(setting)
    place = next(i for i, work in enumerate(rows) if work.name == request["row"])
    work = rows[place]
    with backend.activate(setting.where):
        if request["task"] == "memory":
            small = make(dataclasses.replace(setting, quick=True))[place]
            answer: dict[str, Any] = memory(small, work, request["implementation"])
        elif request["task"] == "turns":
            answer = in_turns(dataclasses.replace(work, measure=None), setting)
        else:
            answer = {"seconds": first(work, request["implementation"])}
    print()
    print(json.dumps(answer))


def first(work: Work, name: str) -> float:
    """Return the seconds of building an implementation and calling it once, its library being loaded."""
    __import__({"jax.jit": "jax", "torch.compile": "torch"}.get(name, "gpugrad"))
    data = work.make()
    began = time.perf_counter()
    work.build[name](data)()
    return time.perf_counter() - began


def memory(small: Work, work: Work, name: str) -> dict[str, Any]:
    """Return the peak of an implementation in bytes, beyond its data and its results, and how it was found."""
    small.build[name](small.make())()
    run = work.build[name](work.make())
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    with peak() as look:
        run()
        results = run()
    return {"bytes": max(0, look["bytes"] - before - size(results)), "method": look["method"]}


def size(results: Any) -> int:
    """Return the bytes of the arrays in a list or tuple."""
    if isinstance(results, (list, tuple)):
        return sum(map(size, results))
    return int(getattr(results, "nbytes", 0))


def _status(key: str) -> int:
    return int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def resident() -> int:
    """Return the bytes that this process has in physical memory."""
    return _status("VmRSS")


@contextmanager
def peak() -> Iterator[dict[str, Any]]:
    """Find the peak of physical memory: what is yielded has "bytes" and "method" afterwards."""
    found: dict[str, Any] = {"bytes": 0, "method": "VmHWM"}
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        found["method"] = "looked at every ms"
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(1e-3):
                found["bytes"] = max(found["bytes"], resident())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield found
        finally:
            stop.set()
            thread.join()
        return
    yield found
    found["bytes"] = _status("VmHWM")
