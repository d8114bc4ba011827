"""One self-contained page: verdicts, tables, a roofline plot, scaling curves. No scripts, nothing from elsewhere.

The plots are drawn for a phone, 360 units wide with text of 12, and grow with the screen. Tables scroll within
themselves, so that the page does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any

from .limits import best
from .measure import MINE
from .report import PROBLEMS, UNITS, busy, checks, duration, faults, rate, target_text
from .verdicts import SAME

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --ground: #fff; --band: #f6f8fa;
  --good: #11632a; --bad: #a40e26; --open: #6f4e00; --a: #0b5cad; --b: #b54708; --c: #6a3fb0; --d: #59636e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa5b1; --line: #3d444d; --ground: #0d1117;
  --band: #151b23; --good: #57d37a; --bad: #ff8f8a; --open: #e3b341; --a: #6cb6ff; --b: #ffa657; --c: #c4a2ff;
  --d: #9aa5b1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } p { margin: .3rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; font-size: .9rem; margin: .8rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; } thead th { background: var(--band); font-weight: 600; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); font-weight: 400;
  white-space: normal; min-width: 8.5rem; max-width: 17rem; overflow-wrap: normal; }
thead th:first-child { background: var(--band); }
td.text { text-align: left; white-space: normal; min-width: 8.5rem; }
td { font-variant-numeric: tabular-nums; } .good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.open { color: var(--open); } figure { margin: 0; } ol, ul { font-size: .9rem; padding-left: 1.6rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem; }
.wide { max-width: 36rem; } svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .axis { stroke: var(--line); }
svg .roof { stroke: var(--d); fill: none; stroke-width: 2; } svg .thin { stroke: var(--d); }
"""
MARKS = "●■▲"
LINES = ((MINE, "a", ""), ("torch.compile", "b", "7 4"), ("jax.jit", "c", "2 3"))
RELATIVE = "Times are the least measured. Peers and limits relative to gpugrad: above 1, gpugrad is faster."


def page(report: dict[str, Any]) -> str:
    """Return the page of a report, as HTML."""
    body = "".join(part for section in (_head, _verdicts, _limits, _plots, _tables, _notes) for part in section(report))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>gpugrad bench</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}</body></html>\n"
    )


def _head(report: dict[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    yield "<h1>gpugrad bench</h1>\n"
    state = ("quick sizes" if report["quick"] else "full sizes") + ("" if report["complete"] else ", interrupted")
    yield f'<p class="soft">{escape(report["date"])}, on {escape(report["device"])}, {state}</p>\n'
    facts = {
        "processor": f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores",
        "busy": busy(machine),
        "GPU": machine.get("gpu", {}).get("name"),
        "caches": ", ".join(f"{name} {size}" for name, size in machine["caches"].items()),
        "memory": machine["memory_bytes"] and f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "system": f"{machine['system']}, Python {machine['python']}",
        "governor": machine["governor"] or "not readable",
        "BLAS, threads": ", ".join(
            f"{lib['internal_api']} {lib['version']}, {lib['num_threads']}" for lib in machine["blas"]
        ),
        "versions": ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items()),
        "set": ", ".join(f"{k}={v}" for k, v in machine["environment"].items()) or "nothing",
        "missing": "; ".join(f"{peer}: {why}" for peer, why in report["missing"].items()) or "no peer",
    }
    yield "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v) + "</dl>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of ready cells: <td>, or text that is escaped."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = ""
    for name, *cells in rows:
        rest = "".join(cell if cell.startswith("<td") else f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<tr><th scope="row">{escape(name)}</th>{rest}</tr>\n'
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _verdicts(report: dict[str, Any]) -> Iterator[str]:
    if found := checks(report["rows"]):
        met = sum(target["met"] is True for _, target in found)
        yield f"<h2>Targets: {met} of {len(found)} met</h2>\n"
        words = {True: ("met", "good"), False: ("missed", "bad"), None: ("open", "open")}
        rows = []
        for row, target in found:
            word, kind = words[target["met"]]
            place = f"{row['suite']}: {row['name']}"
            rows.append(
                [place, f'<td class="{kind}">{word}</td>', f'<td class="text">{escape(target_text(target))}</td>']
            )
        yield _table(("row", "", "target"), rows)
    if compared := report.get("compared"):
        changed = [v for v in compared if v["verdict"] != SAME]
        yield f"<h2>Compared with before: {len(compared) - len(changed)} of {len(compared)} the same</h2>\n"
        yield '<p class="soft">new / old, relative to what the machine could do at the same time</p>'
        rows = []
        for v in changed:
            span = "{:.2f} to {:.2f}".format(*v["interval"]) if "interval" in v else ""
            ratio = f"{v['ratio']:.2f}" if v["ratio"] is not None else ""
            rows.append([f"{v['suite']}: {v['name']}: {v['implementation']}", v["verdict"], ratio, span])
        yield _table(("row", "verdict", "ratio", "interval"), rows)


def _limits(report: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Limits of this machine</h2>\n"
    rows = []
    for name, found in report["limits"].items():
        speed = next((f"{found[key]:,.1f} {unit}" for key, unit in UNITS if key in found), "")
        rows.append([name, speed, duration(found["min_s"])])
    yield _table(("", "rate", "least"), rows)


def _tables(report: dict[str, Any]) -> Iterator[str]:
    limits = report["limits"]
    for suite in dict.fromkeys(row["suite"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["suite"] == suite]
        others = dict.fromkeys(name for row in rows for name in (*row["implementations"], *row["references"]))
        others.pop(MINE, None)
        memory = suite == "memory"
        yield f"<h2>{escape(suite)}</h2>\n"
        what = "Peak of memory beyond data and results." if memory else RELATIVE
        yield f'<p class="soft">{what}</p>'
        head = ["", MINE, *([] if memory else ["rate", "of limit"]), *others]
        yield _table(head, [_cells(row, list(others), limits, memory) for row in rows])


def _cells(row: dict[str, Any], others: Sequence[str], limits: dict[str, Any], memory: bool) -> list[str]:
    found = row["implementations"] | row["references"]
    mine = found.get(MINE, {})
    name = f"{row['name']} {row.get('shapes', '')}".strip()
    if memory:
        return [name, *(_megabytes(found.get(who)) for who in (MINE, *others))]
    achieved = rate(row, mine, limits)
    share = f"{achieved[1]:.2f}" if achieved and achieved[1] is not None else ""
    cells = [name, duration(mine["min_s"]) if "min_s" in mine else _why(mine), achieved[0] if achieved else "", share]
    for who in others:
        other = found.get(who, {})
        if "min_s" not in other:
            cells.append(_why(other))
        elif "min_s" not in mine or who.startswith(MINE):
            cells.append(duration(other["min_s"]))
        else:
            ratio = other["min_s"] / mine["min_s"]
            kind = "" if who in row["references"] else "good" if ratio >= 1 else "bad"
            cells.append(f'<td class="{kind}">{ratio:,.2f}</td>')
    return cells


def _why(found: dict[str, Any]) -> str:
    return f'<td class="soft">{next((kind for kind in PROBLEMS if kind in found), "")}</td>'


def _megabytes(found: dict[str, Any] | None) -> str:
    return f"{found['bytes'] / 1e6:,.1f} MB" if found and "bytes" in found else _why(found or {})


def _notes(report: dict[str, Any]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for place, name, why in faults(report["rows"], ("failed", "wrong", "inaccurate", "left out")):
        reasons.setdefault(f"{name} {why}", []).append(place)
    if reasons:
        yield "<h2>Wrong, inaccurate or without figures</h2>\n<ul>"
        for why, places in reasons.items():
            where = "; ".join(places) if len(places) < 4 else f"{len(places)} rows"
            yield f"<li>{escape(why)} <span class='soft'>({escape(where)})</span></li>"
        yield "</ul>\n"


# ---------------------------------------------------------------------------------------------------------------- plots


class Plot:
    """Axes on an area of 360 units, logarithmic in x and, if asked, in y."""

    LEFT, RIGHT, TOP, BOTTOM = 44, 340, 14, 250

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        names: tuple[str, str],
        log_y: bool,
        at: Sequence[float] | None = None,
    ) -> None:
        self.x_range, self.y_range, self.log_y = x, y, log_y
        self.parts: list[str] = []
        for value, shown in _decades(*x) if at is None else ((v, _short(v)) for v in at):
            self.segment((self.x(value), self.TOP), (self.x(value), self.BOTTOM), "axis")
            self.text(self.x(value), self.BOTTOM + 16, shown, "middle")
        for value, shown in _decades(*y) if log_y else _steps(y[1]):
            self.segment((self.LEFT, self.y(value)), (self.RIGHT, self.y(value)), "axis")
            self.text(self.LEFT - 5, self.y(value) + 4, shown, "end")
        self.text((self.LEFT + self.RIGHT) / 2, self.BOTTOM + 34, names[0], "middle")
        self.text(2, self.TOP - 3, names[1])

    def x(self, value: float) -> float:
        low, high = map(math.log, self.x_range)
        return self.LEFT + (self.RIGHT - self.LEFT) * (math.log(value) - low) / (high - low)

    def y(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self.log_y else float
        low, high = map(scale, self.y_range)
        return self.BOTTOM - (self.BOTTOM - self.TOP) * (scale(value) - low) / (high - low)

    def text(self, x: float, y: float, text: str, anchor: str = "start", more: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>')

    def segment(self, a: tuple[float, float], b: tuple[float, float], kind: str) -> None:
        ends = f'x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}"'
        self.parts.append(f'<line class="{kind}" {ends}/>')

    def dot(self, x: float, y: float, fill: str, stroke: str) -> None:
        place = f'cx="{x:.1f}" cy="{y:.1f}"'
        self.parts.append(f'<circle {place} r="4" fill="var(--{fill})" stroke="var(--{stroke})" stroke-width="1.5"/>')

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        path = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in points)
        self.parts.append(f'<polyline points="{path}" {style}/>')

    def svg(self, label: str, height: int = 292) -> str:
        return f'<svg viewBox="0 0 360 {height}" role="img" aria-label="{escape(label)}">{"".join(self.parts)}</svg>\n'


def _decades(low: float, high: float) -> Iterator[tuple[float, str]]:
    """Yield ticks of a logarithmic axis: powers of ten, of two where there are few of those."""
    base = 10 if high / low > 40 else 2
    for k in range(math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9) + 1):
        value = float(base) ** k
        yield value, _short(value)


def _short(value: float) -> str:
    return f"{value:g}" if value < 1e4 else f"1e{round(math.log10(value))}"


def _steps(high: float) -> Iterator[tuple[float, str]]:
    size = 10 ** math.floor(math.log10(high))
    size = next(size * f for f in (0.1, 0.2, 0.5, 1, 2) if high / (size * f) <= 6)
    for k in range(int(high / size) + 1):
        yield k * size, f"{k * size:g}"


def _plots(report: dict[str, Any]) -> Iterator[str]:
    yield from _roofline(report)
    curves = [row for row in report["rows"] if row["curve"]]
    axes = list(dict.fromkeys(row["curve"][0] for row in curves))
    if axes:
        marked = [(name, color, mark) for (name, color, _), mark in zip(LINES, MARKS, strict=True)]
        legend = " ".join(f'<span style="color: var(--{color})">{mark} {name}</span>' for name, color, mark in marked)
        yield "<h2>Scaling of least squares</h2>\n"
        yield f'<p>{legend} <span class="soft">- - one read of X, 1 thread</span></p><div class="plots">'
        for axis in axes:
            yield from _curve([row for row in curves if row["curve"][0] == axis], axis)
        yield "</div>\n"


def _roofline(report: dict[str, Any]) -> Iterator[str]:
    width = max((found["GBps"] for found in report["limits"].values() if "GBps" in found), default=0.0)
    top = (best(report["limits"], "gemm") or {}).get("GFLOPs", 0.0)
    rows = [row for row in report["rows"] if row["suite"] in ("linreg", "glm", "mlp", "swish")]
    rows = [row for row in rows if "min_s" in row["implementations"].get(MINE, {})]
    if not rows or not width or not top:
        return

    def achieved(row: dict[str, Any], seconds: float) -> float:
        return float(row["flops"] / seconds / 1e9)

    mine = [achieved(row, row["implementations"][MINE]["min_s"]) for row in rows]
    peers = [[f["min_s"] for n, f in r["implementations"].items() if n[:7] != MINE and "min_s" in f] for r in rows]
    fastest = [achieved(row, min(times)) if times else None for row, times in zip(rows, peers, strict=True)]
    intensity = [row["flops"] / row["moved_bytes"] for row in rows]
    ridge = top / width
    x_range = (min(*intensity, ridge) / 3, max(*intensity, ridge) * 3)
    y_range = (min(*mine, *(f for f in fastest if f)) / 2, max(top, *mine) * 2)
    plot = Plot(x_range, y_range, ("operations a byte", "GFLOP/s"), log_y=True)
    start = max(x_range[0], y_range[0] / width)
    plot.line([(x, min(top, x * width)) for x in (start, ridge, x_range[1])], 'class="roof"')
    plot.text(plot.RIGHT - 2, plot.y(top) - 6, f"{top:,.0f} GFLOP/s", "end")
    plot.text(plot.x(ridge) - 8, plot.y(top) + 4, f"{width:,.0f} GB/s", "end")
    points = [(plot.x(x), plot.y(y)) for x, y in zip(intensity, mine, strict=True)]
    for (x, y), peer in zip(points, fastest, strict=True):
        if peer:
            plot.segment((x, y), (x, plot.y(peer)), "thin")
            plot.dot(x, plot.y(peer), "ground", "b")
    for number, ((x, y), (at, height)) in enumerate(zip(points, _beside(points), strict=True), start=1):
        plot.segment((x, y), (at - 2, height), "thin")
        plot.dot(x, y, "a", "ground")
        plot.text(at, height + 4, str(number), more=' font-weight="600"')
    names = "".join(f"<li>{escape(row['name'])}</li>" for row in rows)
    yield '<h2>Roofline</h2>\n<figure class="wide">' + plot.svg("Roofline: achieved rate by operations a byte")
    yield (
        '<figcaption><span style="color: var(--a)">●</span> gpugrad, <span style="color: var(--b)">○</span> the '
        "fastest peer; the line is what this machine measured. Bytes are the data read once and the results; an "
        f"exponential counts as ten operations.</figcaption><ol>{names}</ol></figure>\n"
    )


def _beside(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return places for labels right of the points, one under the other where points are close."""
    places = [(0.0, 0.0)] * len(points)
    taken: list[tuple[float, float]] = []
    for i in sorted(range(len(points)), key=lambda i: points[i][1]):
        x, y = points[i]
        column = [(a, b) for a, b in taken if abs(a - x) < 40]
        height = max([y, *(b + 13 for _, b in column)])
        taken.append((x, height))
        places[i] = (max([x, *(a for a, _ in column)]) + 22, height)
    return places


def _curve(rows: Sequence[dict[str, Any]], axis: str) -> Iterator[str]:
    def points(name: str) -> list[tuple[float, float]]:
        found = [
            (r["curve"][1], r["moved_bytes"], (r["implementations"] | r["references"]).get(name, {})) for r in rows
        ]
        return [(at, moved / f["min_s"] / 1e9) for at, moved, f in found if "min_s" in f]

    reads = next((name for row in rows for name in row["references"]), "")
    lines = [(points(name), color, dash) for name, color, dash in LINES]
    highest = max((y for found, _, _ in [*lines, (points(reads), "", "")] for _, y in found), default=0.0)
    values = [row["curve"][1] for row in rows]
    if not highest:
        return
    spread = (min(values) / 1.15, max(values) * 1.15)
    plot = Plot(spread, (0.0, highest * 1.05), (axis, "GB/s"), log_y=False, at=sorted(values))
    plot.line(points(reads), 'class="roof" stroke-dasharray="5 5"')
    for i, (found, color, dash) in enumerate(lines):
        plot.line(found, f'fill="none" stroke="var(--{color})" stroke-width="2.5" stroke-dasharray="{dash}"')
        for x, y in found:
            plot.text(plot.x(x), plot.y(y) + 4, MARKS[i], "middle", f' style="fill: var(--{color})"')
    yield f"<figure><figcaption>by {axis}</figcaption>{plot.svg(f'Scaling by {axis}')}</figure>"
