"""`gpugrad bench`: how fast is it here, against the machine's own limits and every peer that is installed?

The workloads and the measuring are the package `gpugrad.bench`, in a checkout the folder bench/ beside gpugrad/.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

import gpugrad as gg
from gpugrad.backend import available_cores
from gpugrad.cli.files import UsageError, check_outputs, say, write, write_json
from gpugrad.cli.fit import device_name, device_of
from gpugrad.errors import DataError

QUICK_SECONDS = 47.0  # after which --quick begins no further row; it is to take less than a minute
AGAIN = 2  # how often a row that looks slower than before is measured again


def part(name: str) -> Any:
    """Return a module of the benchmark. Raises DataError for an installation without it."""
    if importlib.util.find_spec("gpugrad.bench") is None:
        folder = Path(gg.__file__).parents[1] / "bench"
        spec = importlib.util.spec_from_file_location(
            "gpugrad.bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not folder.is_dir():
            raise DataError(f"the benchmark is neither in gpugrad nor in {folder}; install gpugrad again")
        module = importlib.util.module_from_spec(spec)
        sys.modules["gpugrad.bench"] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"gpugrad.bench.{name}")


def _chosen(what: str, asked: list[str], known: list[str]) -> list[str]:
    for name in asked:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
    return [name for name in known if name in asked]


class _Progress:
    """A bar on a terminal, plain lines elsewhere; both on stderr."""

    def __init__(self, total: int) -> None:
        self.terminal = sys.stderr.isatty()
        self.total, self.count = total, 0
        self.bar = tqdm(total=total, file=sys.stderr, dynamic_ncols=True, unit="row", disable=not self.terminal)

    def begin(self, name: str) -> None:
        self.bar.set_description_str(name[:40])

    def end(self, lines: list[str]) -> None:
        self.count += 1
        with self.bar.external_write_mode(file=sys.stderr):
            say(*lines)
        self.bar.update()


def run(arguments: argparse.Namespace) -> int:
    """Run `gpugrad bench`; returns 0, or 1 when a value of gpugrad's is wrong or a row has become slower."""
    report, measure = part("report"), part("measure")
    peers, suites = part("peers"), part("suites").SUITES
    chosen = _chosen("suite", arguments.suites, list(suites)) or list(suites)
    asked = list(peers.PEERS) if arguments.peers is None else [name for name in arguments.peers if name != "none"]
    wanted = _chosen("peer", asked, list(peers.PEERS))
    inputs = [arguments.compare] if arguments.compare else []
    check_outputs(inputs, {"--json": arguments.json, "--html": arguments.html})
    threads = arguments.threads or available_cores()
    if threads > available_cores():
        raise UsageError(f"--threads {threads}: this process may run on {available_cores()} cores")
    where = device_of(arguments.device)
    old = _load(arguments.compare) if arguments.compare else None

    began = time.perf_counter()
    peers.importable("numba", not arguments.no_numba)
    peers.hold_threads(threads, where)
    reasons = {name: peers.missing(name, where) if name in wanted else measure.NOT_ASKED for name in peers.PEERS}
    seconds = arguments.seconds or (0.15 if arguments.quick else 5.0)
    setting = measure.Setting(where, arguments.quick, threads, reasons, seconds, not arguments.no_numba)
    found = _Found(report.SCHEMA, setting, part("limits"), arguments)
    say(f"gpugrad {gg.__version__} bench on {device_name(where)}")
    say(*report.about(found.content["machine"], found.content["limits"], found.content["missing"]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' own are theirs; what goes wrong is in the report
            works = [work for suite in chosen for work in suites[suite](setting)]
            deadline = began + QUICK_SECONDS if arguments.quick else float("inf")
            _measure(found, works, setting, deadline)
            verdicts = _compared(found, old, works, setting) if old else []
    except KeyboardInterrupt:
        kept = found.save(time.perf_counter() - began)
        count = len(found.content["rows"])
        fate = f"what was measured is in {kept}" if kept else "--json FILE keeps what was measured"
        raise KeyboardInterrupt(f"interrupted after {count} rows; {fate}") from None
    rows = found.content["rows"]
    say(*report.summary(rows))
    if old:
        say(*part("verdicts").changes(old, found.content), *part("verdicts").text(verdicts, arguments.compare))
    found.content |= {"complete": True, "compared": verdicts}
    if "torch" in sys.modules:
        found.content["machine"]["torch_threads"] = sys.modules["torch"].get_num_threads()
    found.save(time.perf_counter() - began)
    say(f"{len(rows)} rows in {found.content['seconds']:.0f} s")
    mine = [fault for fault in report.faults(rows) if fault[1].startswith(measure.MINE)]
    worse = [v for v in verdicts if v["verdict"] in part("verdicts").REGRESSIONS] if old else []
    return 1 if mine or worse else 0


def _load(path: str) -> dict[str, Any]:
    report = part("report")
    try:
        return dict(report.load(path))
    except report.BadReport as error:
        raise DataError(f"--compare {error}") from None


class _Found:
    """The report as it grows, and where it is written."""

    def __init__(self, schema: str, setting: Any, limits: Any, arguments: argparse.Namespace) -> None:
        self.json, self.html = arguments.json, arguments.html
        self.content: dict[str, Any] = {
            "schema": schema,
            "complete": False,
            "quick": setting.quick,
            "device": str(setting.where),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds_a_row": setting.seconds,
            "machine": limits.machine(setting),
            "missing": {name: why for name, why in setting.peers.items() if why},
            "limits": limits.limits(setting),
            "rows": [],
        }

    def save(self, seconds: float) -> str:
        """Write what was asked for; returns the names of the files."""
        self.content["seconds"] = seconds
        if self.json:
            write_json(self.json, self.content)
        if self.html:
            page = part("page").page(self.content)
            write(self.html, lambda name: Path(name).write_text(page, encoding="utf-8"))
        return " and ".join(path for path in (self.json, self.html) if path)


def _measure(found: _Found, works: list[Any], setting: Any, deadline: float) -> None:
    """Measure all rows, showing each as it is done; after the deadline the rest is named as left out."""
    report, measure = part("report"), part("measure")
    progress = _Progress(len(works))
    suite = ""
    with progress.bar:
        for work in works:
            progress.begin(f"{work.suite}: {work.name}")
            if time.perf_counter() < deadline:
                row = measure.measure(work, setting)
            else:
                row = work.row(setting)
                row["implementations"] = {name: {"left out": "--quick was out of time"} for name in work.build}
            found.content["rows"].append(row)
            head = report.header(work.suite) if work.suite != suite else []
            suite = work.suite
            progress.end([*head, *report.row_text(row, found.content["limits"])])


def _compared(found: _Found, old: dict[str, Any], works: list[Any], setting: Any) -> list[dict[str, Any]]:
    """Return the verdicts; what looks slower is measured again first, since a busy minute is no regression."""
    verdicts, measure = part("verdicts"), part("measure")
    rows = found.content["rows"]
    for attempt in range(AGAIN + 1):
        judged: list[dict[str, Any]] = verdicts.compare(old, found.content)
        slower = {(v["suite"], v["name"]) for v in judged if v["verdict"] == verdicts.SLOWER}
        if attempt == AGAIN or not slower:
            break
        say(f"{len(slower)} row{'s look' if len(slower) > 1 else ' looks'} slower than before: measured again")
        for i, work in enumerate(works):
            if (work.suite, work.name) in slower:
                rows[i] = measure.pooled(work, rows[i], setting)
    if not judged:
        raise DataError("--compare: no row is in both reports; compare runs of the same suites and sizes")
    return judged
