"""The report: what is measured as data for JSON, and as text for a person."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from .limits import best
from .measure import MINE, NOT_ASKED

SCHEMA = "gpugrad bench 1"
WIDTH = 38
PROBLEMS = ("missing", "left out", "failed", "wrong")
UNITS = (("GBps", "GB/s"), ("GFLOPs", "GFLOP/s"))


class BadReport(Exception):
    """A file is no report of this command: why."""


def load(path: str) -> dict[str, Any]:
    """Read a report. Raises BadReport for a file that is none, OSError for one that cannot be read."""
    with open(path, encoding="utf-8") as file:
        try:
            report = json.load(file)
        except ValueError as error:
            raise BadReport(f"{path}: is no JSON ({error}); give a file that gpugrad bench --json wrote") from None
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise BadReport(f"{path}: its schema is {schema!r}, expected {SCHEMA!r}; measure again with this version")
    try:
        for row in report["rows"]:
            _ = row["suite"], row["name"], row["device"], row["bound"], row["references"].items()
            for found in row["implementations"].values():
                if "min_s" in found:
                    _ = float(found["min_s"]), [float(s) for s in found["samples_s"]]
        for found in report["limits"].values():
            _ = [float(s) for s in found["samples_s"]]
        _ = report["machine"]["versions"].items()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadReport(f"{path}: a part of the report is missing or no number ({error!r}); measure again") from None
    return dict(report)


def duration(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{seconds / 1e-9:.0f} ns"


def problem(found: dict[str, Any]) -> str | None:
    """Say why an implementation has no figure, or None."""
    return next(
        (f"{kind}: {found[kind]}" for kind in ("missing", "left out", "failed", "wrong") if kind in found), None
    )


def rate(row: dict[str, Any], found: dict[str, Any], limits: dict[str, Any]) -> tuple[str, float | None] | None:
    """Return an achieved rate with its unit, and its share of the machine's limit; None where neither says much."""
    if row["bound"] in ("calls", "memory") or "min_s" not in found or not (row["moved_bytes"] or row["flops"]):
        return None
    unit, amount = ("GFLOP/s", row["flops"]) if row["bound"] == "gemm" else ("GB/s", row["moved_bytes"])
    achieved = amount / found["min_s"] / 1e9
    limit = best(limits, row["bound"])
    top = limit and limit.get("GFLOPs" if row["bound"] == "gemm" else "GBps")
    return f"{achieved:,.3g} {unit}", achieved / top if top else None


def cells(row: dict[str, Any], limits: dict[str, Any]) -> Iterator[tuple[str, list[str], str]]:
    """Yield for each implementation and reference: name, [time, median, rate, share of limit, ratio], or a problem."""
    mine = row["implementations"].get(MINE, {})
    for name, found in (row["implementations"] | row["references"]).items():
        if found.get("missing") == NOT_ASKED:
            continue  # said once, at the top
        if text := problem(found):
            yield name, [], text
        elif "bytes" in found:
            yield name, [f"{found['bytes'] / 1e6:,.1f} MB", "", "", "", ""], ""
        elif "min_s" in found:
            achieved = rate(row, found, limits) if name not in row["references"] else None
            share = f"{achieved[1]:.2f}" if achieved and achieved[1] is not None else ""
            ratio = f"{found['min_s'] / mine['min_s']:,.2f}" if "min_s" in mine and name != MINE else ""
            times = [duration(found["min_s"]), duration(found["median_s"])]
            yield name, [*times, achieved[0] if achieved else "", share, ratio], ""


def about(machine: dict[str, Any], limits: dict[str, Any], missing: dict[str, str]) -> list[str]:
    """Return the machine, its limits and the peers that are missing."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else "memory unknown"
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    lines = [
        f"machine   {machine['processor']}, {machine['threads']} of {machine['cores']} cores, {memory}, {caches}",
        *([f"GPU       {machine['gpu']['name']}"] if "gpu" in machine else []),
        *([f"BUSY      {busy(machine)}"] if busy(machine) else []),
        f"system    {machine['system']}, Python {machine['python']}, governor {machine['governor'] or 'not readable'}",
        f"versions  {versions}",
        f"set       {', '.join(f'{k}={v}' for k, v in machine['environment'].items()) or 'nothing'}",
        *(f"missing   {peer}: {why}" for peer, why in missing.items()),
        "limits",
    ]
    for name, found in limits.items():
        speed = next(
            (f"{found[u]:,.1f} {text}" for u, text in (("GBps", "GB/s"), ("GFLOPs", "GFLOP/s")) if u in found), ""
        )
        lines.append(f"  {name:{WIDTH}s}{duration(found['min_s']):>10s}{speed:>16s}")
    return lines


def busy(machine: dict[str, Any]) -> str | None:
    """Say that something else was running when the measuring began, or None."""
    load, cores = machine.get("load"), machine["cores"]
    return (
        f"a load of {load:.1f} on {cores} cores before anything ran: times are uncertain"
        if (load or 0) > cores / 2
        else None
    )


def header(suite: str) -> list[str]:
    """Return the head of a suite's table."""
    if suite == "ops":
        names = ("gpugrad", "GB/s", "of copy", "numpy /", "with grad", "compiled")
        return ["", f"{'ops':{WIDTH}s}" + "".join(f"{name:>11s}" for name in names)]
    names = ("least", "median", "rate", "of limit", "/ gpugrad")
    widths = (11, 11, 16, 10, 11)
    return ["", f"{suite:{WIDTH}s}" + "".join(f"{name:>{w}s}" for name, w in zip(names, widths, strict=True))]


def row_text(row: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """Return the lines of a row."""
    if row["suite"] == "ops":
        return _op_text(row, limits)
    lines = [row["name"]]
    for name, (*figures,), text in cells(row, limits):
        if text:
            lines.append(f"  {name:{WIDTH - 2}s}{text}")
        else:
            widths = (11, 11, 16, 10, 11)
            lines.append(f"  {name:{WIDTH - 2}s}" + "".join(f"{f:>{w}s}" for f, w in zip(figures, widths, strict=True)))
    return lines + [f"  {mark(target)} {target_text(target)}" for target in row.get("targets", ())]


def _op_text(row: dict[str, Any], limits: dict[str, Any]) -> list[str]:
    """Return an op on one line: forward, its rate, the formula's time over it, with gradient, compiled."""
    found = row["implementations"]
    mine = found[MINE]
    plain = next(found[name] for name in ("numpy", "cupy") if name in found)
    achieved = rate(row, mine, limits)
    both = [found.get(f"{MINE}, with gradient{more}", {}) for more in ("", ", compiled")]
    figures = [
        duration(mine["min_s"]) if "min_s" in mine else "-",
        achieved[0].split()[0] if achieved else "-",
        f"{achieved[1]:.2f}" if achieved and achieved[1] is not None else "-",
        f"{plain['min_s'] / mine['min_s']:.2f}" if "min_s" in mine and "min_s" in plain else "-",
        *(duration(f["min_s"]) if "min_s" in f else "-" for f in both),
    ]
    name = f"{row['name']} {row.get('shapes', '')}"
    lines = [f"{name:{WIDTH}s}" + "".join(f"{f:>11s}" for f in figures)]
    bad = [(who, text) for who, f in found.items() if (text := problem(f)) and not text.startswith(("left", "missing"))]
    return lines + [f"  {who}: {text}" for who, text in bad]


def mark(target: dict[str, Any]) -> str:
    """Return the verdict on a target in one word."""
    return {True: "met:   ", False: "MISSED:", None: "open:  "}[target["met"]]


def target_text(target: dict[str, Any]) -> str:
    """Return a target and what was found, in words."""
    if "most_bytes" in target:
        got = target["found"]["bytes"]
        found = "not measured" if got is None else f"{got / 1e6:,.1f} MB"
        return f"at most {target['most_bytes'] / 1e6:.0f} MB beyond data and results; found {found}"
    names = " and ".join(target["against"])
    found = ", ".join("not measured" if v is None else f"{v:.2f}" for v in target["found"].values())
    if "least" in target:
        return f"at least {target['least']:g} times faster than {names}; found {found}"
    return f"at most {target['most']:g} times {names}; found {found}"


def checks(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return all targets with their rows."""
    return [(row, target) for row in rows for target in row.get("targets", ())]


def faults(
    rows: Sequence[dict[str, Any]], kinds: Sequence[str] = ("failed", "wrong")
) -> Iterator[tuple[str, str, str]]:
    """Yield row, implementation and what is the matter, for all without figures of these kinds."""
    for row in rows:
        for name, found in row["implementations"].items():
            for kind in kinds:
                if kind in found:
                    yield f"{row['suite']}: {row['name']}", name, f"{kind}: {found[kind]}"


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the end of the report: targets, what was left out and why, what was wrong."""
    lines = []
    if found := checks(rows):
        met = sum(target["met"] is True for _, target in found)
        lines += ["", f"targets: {met} of {len(found)} met"]
        lines += [f"  {mark(target)} {row['suite']}: {row['name']}: {target_text(target)}" for row, target in found]
    reasons: dict[tuple[str, str], int] = {}
    for _, name, why in faults(rows, ("left out",)):
        reasons[name, why] = reasons.get((name, why), 0) + 1
    for (name, why), count in reasons.items():
        lines.append(f"{why.partition(': ')[0]}: {name} in {count} row{'s' * (count > 1)}: {why.partition(': ')[2]}")
    lines += [f"{row}: {name}: {why}" for row, name, why in faults(rows, ("inaccurate", "failed", "wrong"))]
    return lines
