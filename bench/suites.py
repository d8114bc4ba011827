"""The suites: their names, and the rows of each at full and at quick sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .functions import overhead, step, swish
from .measure import MINE, Setting, Work, in_turns
from .ops import ops
from .processes import first_calls, on_threads, weighed
from .sums import glm, linear, linreg, mlps

COMPILED = (MINE, "torch.compile", "jax.jit")
# With --quick torch.compile compiles in the first row of these: each takes it seconds.
QUICK_COMPILES = ("swish", "linreg", "mlp", "step")


def _overhead(setting: Setting) -> list[Work]:
    start = linear(setting, "overhead", "logistic", 10_000, 32)
    return [*overhead(setting), *first_calls(start)]


def with_targets(setting: Setting) -> list[Work]:
    """The rows that have targets at full size, in the same order at quick sizes."""
    steps = [work for work in step(setting) if "256 rows" in work.name]
    return [*linreg(setting), *glm(setting)[:3], *mlps(setting), *swish(setting), *steps]


def memory(setting: Setting) -> list[Work]:
    """The memory that the rows with a target take."""
    rows = with_targets(setting)
    return [weighed(work, setting) for work in (rows[::6] if setting.quick else rows)]


def scaling(setting: Setting) -> list[Work]:
    """Least squares by rows, by columns at the same bytes, and by threads."""
    lengths = (1_000, 10_000, 100_000) if setting.quick else (10_000, 100_000, 1_000_000, 10_000_000)
    numbers = 1_000_000 if setting.quick else 64_000_000
    rows = [_scaled(setting, n, 32, "rows", n) for n in lengths]
    rows += [_scaled(setting, numbers // p, p, "columns", p) for p in (8, 32, 128, 512)]
    counts = [n for n in range(1, setting.threads + 1) if n <= 4 or n % 4 == 0]
    if setting.where.kind == "cpu":
        rows += [on_threads(_scaled(setting, numbers // 32, 32, "threads", n), n) for n in counts]
    return rows


def _scaled(setting: Setting, rows: int, columns: int, axis: str, at: float) -> Work:
    """A point on a curve, with half of the time of other rows."""

    def measure(work: Work, setting: Setting) -> dict[str, Any]:
        return in_turns(work, dataclasses.replace(setting, seconds=setting.seconds / 2))

    work = linear(setting, "scaling", "least squares", rows, columns, curve=(axis, at), measure=measure)
    return dataclasses.replace(
        work, name=f"by {axis}: {work.name}", build={name: work.build[name] for name in COMPILED}
    )


def _quick(suite: str, make: Callable[[Setting], list[Work]]) -> Callable[[Setting], list[Work]]:
    """Return a suite that says what it leaves out with --quick."""

    def rows(setting: Setting) -> list[Work]:
        works = make(setting)
        for i, work in enumerate(works if setting.quick else ()):
            if "torch.compile" in work.build and (suite not in QUICK_COMPILES or i):
                work.left_out.setdefault("torch.compile", "--quick has no time for it to compile")
        return works

    return rows


SUITES: dict[str, Callable[[Setting], list[Work]]] = {
    suite: _quick(suite, make)
    for suite, make in {
        "ops": ops,
        "swish": swish,
        "linreg": linreg,
        "glm": glm,
        "mlp": mlps,
        "step": step,
        "overhead": _overhead,
        "memory": memory,
        "scaling": scaling,
    }.items()
}
