"""What a self-test finds: comparisons in groups, each a row of a table, and the misses among them.

A comparison counts its error in units of the bound it must keep: above 1, or NaN, it is a miss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpugrad import backend
from gpugrad.backend import CPU, Device
from gpugrad.tensor import Tensor

Host = np.ndarray[Any, Any]
HALF, SINGLE, DOUBLE = np.dtype("float16"), np.dtype("float32"), np.dtype("float64")


@dataclass
class Group:
    """A row of the table: how many comparisons, the largest error over its bound, what missed."""

    name: str
    checks: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    misses: list[dict[str, str]] = field(default_factory=list)


class Run:
    """One self-test: where it runs, and what it has found so far."""

    def __init__(self, where: Device, quick: bool, show: Callable[[str], object]) -> None:
        self.where, self.quick, self.show = where, quick, show
        self.groups: list[Group] = []
        self._case = ""

    @contextmanager
    def group(self, name: str) -> Iterator[None]:
        """Collect comparisons in a row of the table, shown when it is complete."""
        group = Group(name)
        self.groups.append(group)
        began = time.perf_counter()
        with backend.activate(self.where):
            yield
        group.seconds = time.perf_counter() - began
        self.show(f"{name:34s}{group.checks:8d}{len(group.misses):8d}{group.worst:13.2g}{group.seconds:9.2f}")

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Name what is compared; an error raised inside is a miss like any other."""
        self._case = name
        try:
            yield
        except Exception as error:
            text = (str(error).splitlines() or [""])[0]
            self._miss("error", f"{type(error).__name__}: {text}", "no error")

    def near(self, what: str, got: Any, want: Any, bound: Any, dtype: Any = None) -> None:
        """Compare numbers; bound: the absolute error allowed, an array or a number. dtype: what `got` must have."""
        group = self.groups[-1]
        group.checks += 1
        got, want = host(got), np.asarray(want)
        if got.shape != want.shape or (dtype is not None and got.dtype != dtype):
            wanted = f"{dtype or want.dtype} of shape {want.shape}"
            self._miss(what, f"{got.dtype} of shape {got.shape}", wanted)
            return
        if not want.size:
            return
        a, b = got.astype(DOUBLE), want.astype(DOUBLE)
        with np.errstate(all="ignore"):
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            ratio = np.where(same, 0.0, np.abs(a - b) / np.maximum(bound, 1e-300))
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        worst = float(np.max(ratio))
        group.worst = max(group.worst, worst)
        if not worst <= 1:
            at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
            place = f" at {tuple(map(int, at))}" if at else ""
            off = f"{worst:.3g} times the bound" if math.isfinite(worst) else "not finite alike"
            self._miss(what, f"{a[at]:.9g}{place}", f"{b[at]:.9g} ({off})")

    def same(self, what: str, got: Any, want: Any) -> None:
        """Compare to the last bit."""
        self.near(what, got, host(want), 0.0, dtype=host(want).dtype)

    def holds(self, what: str, condition: bool, got: str, wanted: str) -> None:
        """Note whether something is as it should be."""
        self.groups[-1].checks += 1
        if not condition:
            self.groups[-1].worst = math.inf
            self._miss(what, got, wanted)

    def _miss(self, what: str, got: str, wanted: str) -> None:
        self.groups[-1].misses.append({"case": self._case, "what": what, "got": got, "wanted": wanted})

    def put(self, array: Any) -> Any:
        """Place a host array on the device."""
        return backend.to_device(np.asarray(array), self.where)


def host(value: Any) -> Host:
    """Return numbers on the host, from wherever they are."""
    value = value.detach()._data if isinstance(value, Tensor) else value
    return np.asarray(backend.to_device(value, CPU) if backend.is_array(value) else value)
