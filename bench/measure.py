"""One row of the benchmark: a piece of work, its implementations checked against float64, then timed in turns.

Every implementation of a row is warm and takes its turn in every round, so that a noisy machine is noisy for all. The
samples are kept: their least and median are shown, and two runs are compared by all of them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpugrad import backend
from gpugrad.backend import CPU, Device

from .peers import PEERS, Run, host

MINE = "gpugrad"  # implementations that begin with this are gpugrad's
ROUNDS = (5, 60)
MANY, SHORT = 20, 0.02  # rounds of what takes less than so many seconds: enough samples to see noise for what it is
LARGE = 10_000_000  # bytes
NOT_ASKED = "not asked for by --peers"
PEERS_MAY = 10  # times the error that gpugrad may have
Clock = Callable[[], float]


@dataclass(frozen=True)
class Target:
    """What a row should reach: `least` times faster than each of `against`, or `most` times the time of each.

    Without `against`, `most` is in bytes.
    """

    against: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Setting:
    """How everything is measured.

    peers: the reason why a peer is not measured, or None, by peer. seconds: for the samples of one row.
    """

    where: Device = CPU
    quick: bool = False
    threads: int = 1
    peers: Mapping[str, str | None] = field(default_factory=dict)
    seconds: float = 5.0
    numba: bool = True


@dataclass
class Work:
    """A row: what is computed, by whom, and what limits it.

    make() -> data, made when first needed. build: an implementation, from the data. verify(data) -> a function from
    the name and the result of an implementation to what is wrong with it, or None. references: what cannot be beaten
    (a read of the data, the matrix products alone), timed in the same turns. moved, flops: bytes and operations that
    cannot be avoided. bound: the limit of the machine that a rate is held against ("read", "copy", "gemm", or "calls"
    where it is the interpreter). left_out: why an implementation is not measured. curve: a place on a scaling curve.
    measure: how, where it is not by `in_turns`. alone: whether that takes a process of its own.
    """

    suite: str
    name: str
    make: Callable[[], Any]
    build: dict[str, Callable[[Any], Run]]
    verify: Callable[[Any], Callable[[str, Any], str | None]]
    references: dict[str, Callable[[Any], Run]] = field(default_factory=dict)
    moved: int = 0
    flops: int = 0
    bound: str = "read"
    targets: tuple[Target, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    curve: tuple[str, float] | None = None
    measure: Callable[[Work, Setting], dict[str, Any]] | None = None
    alone: bool = False

    def reason(self, name: str, setting: Setting) -> dict[str, str] | None:
        """Say why an implementation is not measured: {"missing": why} or {"left out": why}, or None."""
        if setting.peers.get(name):
            return {"missing": str(setting.peers[name])}
        return {"left out": self.left_out[name]} if name in self.left_out else None

    def row(self, setting: Setting) -> dict[str, Any]:
        """Return the row for JSON, without figures."""
        return {
            "suite": self.suite,
            "name": self.name,
            "device": str(setting.where),
            "moved_bytes": self.moved,
            "flops": self.flops,
            "bound": self.bound,
            "curve": list(self.curve) if self.curve else None,
            "implementations": {},
            "references": {},
        }


class Inaccurate(str):
    """What is to be said of a peer whose float32 sums have lost digits: it is timed all the same."""


def near(expected: Sequence[Any], rtol: float) -> Callable[[str, Any], str | None]:
    """Return a function that compares results with float64: errors relative to the largest element of each part.

    A peer may be off by PEERS_MAY times what gpugrad may, and is then called inaccurate: some add millions of terms
    in float32.
    """

    def verify(name: str, got: Any) -> str | None:
        parts = list(got)
        if len(parts) != len(expected):
            return f"gives {len(parts)} results, expected {len(expected)}"
        for i, (mine, right) in enumerate(zip(parts, expected, strict=True)):
            mine, right = host(mine), np.asarray(right, np.float64)
            if mine.shape != right.shape:
                return f"result {i} has shape {mine.shape}, expected {right.shape}"
            error = float(np.max(np.abs(mine - right), initial=0) / max(np.max(np.abs(right), initial=0), 1e-30))
            if not error <= rtol:
                off = f"result {i} is off by {error:.2g} relative to its largest element, allowed {rtol:.2g}"
                may = not name.startswith(MINE) and error <= PEERS_MAY * rtol
                return Inaccurate(f"{off} to gpugrad") if may else off
        return None

    return verify


def in_turns(work: Work, setting: Setting, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Check every implementation of a row, then time those that are right; return the row.

    An implementation that is missing, left out, failed or wrong says so in its place.
    """
    row, runs = work.row(setting), {}
    found: dict[str, Any] = row["implementations"]
    if work.moved > LARGE:
        gc.collect()  # the data of the row before may hang in a cycle of a peer's
    with backend.activate(setting.where):
        data = work.make()
        verify = work.verify(data)
        for name, build in work.build.items():
            if reason := work.reason(name, setting):
                found[name] = reason
                continue
            try:
                run = build(data)
                wrong = verify(name, run())
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
                continue
            if wrong and not isinstance(wrong, Inaccurate):
                found[name] = {"wrong": wrong}
                continue
            found[name] = {"inaccurate": wrong} if wrong else {}
            runs[name] = run
        if runs:
            references = {name: build(data) for name, build in work.references.items()}
            times = sample(runs | references, setting.seconds, setting.where, clock, 5e-4 if setting.quick else 2e-3)
            for name, took in times.items():
                part = row["references" if name in references else "implementations"]
                part[name] = {**part.get(name, {}), **took}
    return row


def sample(
    runs: Mapping[str, Run], seconds: float, where: Device = CPU, clock: Clock = time.perf_counter, each: float = 2e-3
) -> dict[str, dict[str, Any]]:
    """Time functions in turns for about `seconds` in all, several calls a sample up to about `each` seconds."""
    wait = backend.cupy().cuda.runtime.deviceSynchronize if where.kind == "cuda" else None

    def timed(run: Run, calls: int) -> float:
        began = clock()
        for _ in range(calls):
            run()
        if wait:
            wait()
        return (clock() - began) / calls

    once = {name: min(timed(run, 1), timed(run, 1)) for name, run in runs.items()}
    calls = {name: max(1, int(each / max(took, 1e-7))) for name, took in once.items()}
    length = max(sum(once[name] * calls[name] for name in runs), 1e-7)  # of a round
    rounds = min(max(int(seconds / length), MANY if length < SHORT else ROUNDS[0]), ROUNDS[1])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()  # as timeit does: a collection would hit whoever's turn it is
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                samples[name].append(timed(run, calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: summary(taken, calls[name]) for name, taken in samples.items()}


def summary(samples: Sequence[float], calls: int = 1) -> dict[str, Any]:
    """Return seconds a call with what they come from."""
    return {
        "min_s": min(samples),
        "median_s": statistics.median(samples),
        "calls": calls,
        "samples_s": [float(f"{s:.6g}") for s in samples],
    }


def measure(work: Work, setting: Setting) -> dict[str, Any]:
    """Measure a row in the way that it asks for, and hold it against its targets."""
    row = (work.measure or in_turns)(work, setting)
    row["targets"] = [judged(target, row) for target in work.targets]
    return row


def pooled(work: Work, row: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Measure gpugrad's part of a row again, and return the row with the samples of both measurements."""
    others = {name: "measured before" for name in PEERS if name not in ("numpy", "cupy")}
    again = (work.measure or in_turns)(work, replace(setting, peers={**setting.peers, **others}))
    both = dict(row)
    for part in ("implementations", "references"):
        both[part] = dict(row[part])
        for name, found in again[part].items():
            if "samples_s" in found and "samples_s" in row[part].get(name, {}):
                samples = [*row[part][name]["samples_s"], *found["samples_s"]]
                both[part][name] = {**row[part][name], **summary(samples, found["calls"])}
    both["targets"] = [judged(target, both) for target in work.targets]
    return both


def judged(target: Target, row: dict[str, Any]) -> dict[str, Any]:
    """Return a target with the figures found, and "met": true, false, or null where something is missing."""
    mine = row["implementations"].get(MINE, {})
    figures = {**row["implementations"], **row["references"]}
    if not target.against:
        found: dict[str, Any] = {"bytes": mine.get("bytes")}
        met = None if mine.get("bytes") is None else mine["bytes"] <= (target.most or 0)
        return {"against": [], "most_bytes": target.most, "found": found, "met": met}
    times = {name: figures.get(name, {}).get("min_s") for name in target.against}
    own = mine.get("min_s")
    if target.least is not None:
        found = {name: t / own if t and own else None for name, t in times.items()}
        fits = [ratio >= target.least for ratio in found.values() if ratio is not None]
        wanted = {"least": target.least}
    else:
        found = {name: own / t if t and own else None for name, t in times.items()}
        fits = [ratio <= (target.most or 0) for ratio in found.values() if ratio is not None]
        wanted = {"most": target.most}
    # one that fails is a miss whatever the others would have been
    met = False if not all(fits) else True if len(fits) == len(times) else None
    return {"against": list(target.against), **wanted, "found": found, "met": met}
