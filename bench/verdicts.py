"""Is it faster or slower than before? Two reports compared, row by row, with the noise of both taken into account.

Times are taken relative to what the machine itself could do in the same turns (a reference of the row, the formula of
NumPy beside an op, else a limit of the machine), so that a slower machine is not a slower gpugrad. From the samples of
all four, a bootstrap gives the interval in which the ratio new / old of the lower quartiles lies. A row is slower where
the ratio of the quartiles and that of the least times both exceed the threshold, and the interval excludes 1.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .limits import best
from .measure import MINE
from .report import busy

THRESHOLD = 0.10
DRAWS = 2_000
TAIL = 0.001  # outside the interval, on either side: there are hundreds of rows
ENOUGH = 4  # samples
MORE_MEMORY = 8e6  # bytes that do not count
FASTER, SLOWER, SAME, CANNOT_TELL = "faster", "slower", "same", "cannot tell"
SMALLER, LARGER = "smaller", "larger"
REGRESSIONS = (SLOWER, LARGER)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a verdict for every row and implementation of gpugrad's that both reports have."""
    before = {(row["suite"], row["name"], row["device"]): row for row in old["rows"]}
    verdicts = []
    for row in new["rows"]:
        other = before.get((row["suite"], row["name"], row["device"]))
        for name in row["implementations"] if other else ():
            pair = [r["implementations"].get(name, {}) for r in (other, row)]
            if not name.startswith(MINE):
                continue
            place = {"suite": row["suite"], "name": row["name"], "implementation": name}
            if all("bytes" in found for found in pair):
                verdicts.append({**place, **_memory(pair[0]["bytes"], pair[1]["bytes"])})
            elif all("samples_s" in found for found in pair):
                by, references = next(_references(other, row, old, new), (None, None))
                verdicts.append({**place, "relative_to": by, **judge(*pair, references)})
    return verdicts


def _references(other: Any, row: Any, old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield what both rows can be taken relative to, the best first: name, (old, new)."""
    for name in row["references"]:
        if name in other["references"]:
            yield name, (other["references"][name], row["references"][name])
    if row["suite"] == "ops":
        for name in ("numpy", "cupy"):
            pair = [r["implementations"].get(name, {}) for r in (other, row)]
            if all("samples_s" in found for found in pair):
                yield name, (pair[0], pair[1])
    limits = [best(report["limits"], row["bound"]) for report in (old, new)]
    if limits[0] and limits[1]:
        yield limits[1]["name"], (limits[0], limits[1])


def judge(old: dict[str, Any], new: dict[str, Any], references: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """Return the verdict on two sets of samples, with the ratio new / old and its interval."""
    four = [np.asarray(found["samples_s"], np.float64) for found in (new, old, *(references or ()))]
    ratio = _relative([float(np.quantile(s, 0.25)) for s in four])
    least = _relative([float(np.min(s)) for s in four])
    rng = np.random.default_rng(zlib.crc32(np.concatenate(four).tobytes()))
    draws = [np.quantile(s[rng.integers(0, len(s), (DRAWS, len(s)))], 0.25, axis=1) for s in four]
    low, high = (float(q) for q in np.quantile(_relative(draws), [TAIL, 1 - TAIL]))
    worse, better = 1 + THRESHOLD, 1 / (1 + THRESHOLD)
    if min(map(len, four)) < ENOUGH:
        verdict = CANNOT_TELL
    elif min(ratio, least) > worse and low > 1:
        verdict = SLOWER
    elif max(ratio, least) < better and high < 1:
        verdict = FASTER
    elif better <= ratio <= worse and better / worse <= low and high <= worse * worse:
        verdict = SAME
    else:
        verdict = CANNOT_TELL
    return {"verdict": verdict, "ratio": ratio, "interval": [low, high]}


def _relative(figures: Any) -> Any:
    """Return (new / old) * (old reference / new reference)."""
    ratio = figures[0] / figures[1]
    return ratio * figures[2] / figures[3] if len(figures) == 4 else ratio


def _memory(old: float, new: float) -> dict[str, Any]:
    change = new - old
    more, fewer = change > max(MORE_MEMORY, THRESHOLD * old), -change > max(MORE_MEMORY, THRESHOLD * old)
    return {"verdict": LARGER if more else SMALLER if fewer else SAME, "ratio": new / old if old else None}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what makes two reports hard to compare: another machine, other settings, other versions."""
    lines = []
    for what in ("processor", "cores", "threads", "memory_bytes", "gpu"):
        a, b = old["machine"].get(what), new["machine"].get(what)
        if a != b:
            lines.append(f"another machine: {what} was {a}, is {b}; comparing machines says little about gpugrad")
    lines += [f"{when} run: {text}" for when, r in (("old", old), ("new", new)) if (text := busy(r["machine"]))]
    a, b = old["machine"]["versions"], new["machine"]["versions"]
    moved = [f"{name} {a.get(name)} -> {b.get(name)}" for name in b if name != MINE and a.get(name) != b.get(name)]
    return lines + ([f"other versions: {', '.join(moved)}"] if moved else [])


def text(verdicts: list[dict[str, Any]], path: str) -> list[str]:
    """Return the comparison for a person: everything that has changed, and how many have not."""
    lines = ["", f"compared with {path}: new / old, relative to the machine (threshold {THRESHOLD:.0%}, beyond noise)"]
    for v in verdicts:
        if v["verdict"] not in (SAME, CANNOT_TELL):
            span = "{:.2f} to {:.2f}".format(*v["interval"]) if "interval" in v else ""
            ratio = f"{v['ratio']:.2f}" if v["ratio"] is not None else "-"
            lines.append(
                f"  {v['verdict']:12s}{ratio:>7s}  {span:14s}  {v['suite']}: {v['name']}: {v['implementation']}"
            )
    counts = {
        kind: sum(v["verdict"] == kind for v in verdicts) for kind in dict.fromkeys(v["verdict"] for v in verdicts)
    }
    return [*lines, "  " + ", ".join(f"{count} {kind}" for kind, count in counts.items())]
