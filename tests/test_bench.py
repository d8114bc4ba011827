"""`gpugrad bench`: its measuring, verdicts and page on planted figures, and the command on small rows."""

import html
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpugrad.cli import bench, main
from gpugrad.op import registry

measure, report, verdicts = bench.part("measure"), bench.part("report"), bench.part("verdicts")
peers, processes, page, limits = (bench.part(name) for name in ("peers", "processes", "page", "limits"))
SUITES = bench.part("suites").SUITES
ROOT = Path(__file__).parents[1]

SMALL = ["bench", "step", "--quick", "--peers", "none", "--seconds", "0.01", "--device", "cpu"]


def run(capsys, *arguments):
    """Run the command; returns exit status, stdout and stderr."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return status, out, err


def planted(**build):
    """A row whose right value is 1."""
    return measure.Work(
        "planted",
        "one",
        lambda: None,
        {name: (lambda _data, f=f: f) for name, f in build.items()},
        lambda _data: measure.near([1.0], 1e-6),
        moved=1_000,
        bound="read",
    )


@pytest.fixture
def unmeasured(monkeypatch):
    """Fail when anything is measured."""

    def fail(*_):
        pytest.fail("something was measured before the arguments were checked")

    monkeypatch.setattr(limits, "limits", fail)


# --- arguments ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["speed"], 2, "unknown suite 'speed'; choose from ops, swish, linreg"),
        (["--peers", "theano"], 2, "unknown peer 'theano'; choose from numpy, cupy"),
        (["--device", "tpu"], 2, "unknown device 'tpu'"),
        (["--threads", "4000"], 2, "this process may run on"),
        (["--threads", "0"], 2, "whole number"),
        (["--seconds", "-1"], 2, "positive"),
        (["--json", "missing/a.json"], 1, "there is no folder"),
        (["--html", "missing/a.html"], 1, "there is no folder"),
        (["--json", "a", "--html", "a"], 2, "give another"),
        (["--compare", "missing.json"], 1, "No such file"),
        (["--compare", "text.json"], 1, "is no JSON"),
        (["--compare", "list.json"], 1, "its schema is None"),
        (["--compare", "other.json"], 1, "its schema is 'gpugrad bench 0'"),
        (["--compare", "half.json"], 1, "missing or no number"),
    ],
)
def test_bad_arguments(capsys, tmp_path, monkeypatch, arguments, status, says):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("least squares: fast")
    Path("list.json").write_text("[]")
    Path("other.json").write_text('{"schema": "gpugrad bench 0"}')
    Path("half.json").write_text(json.dumps({"schema": report.SCHEMA, "rows": [{"suite": "step"}]}))
    found, out, err = run(capsys, "bench", "--quick", *arguments)
    assert (found, out) == (status, "")
    assert says in err
    assert err.count("\n") <= 2


def test_help_names_what_can_be_chosen(capsys):
    status, out, _ = run(capsys, "bench", "--help")
    assert status == 0
    for name in (*SUITES, *peers.PEERS):
        assert name in out


# --- rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [True, False])
def test_rows_can_be_told_apart(quick):
    setting = measure.Setting(quick=quick, threads=2)
    rows = [work for make in SUITES.values() for work in make(setting)]
    places = [(work.suite, work.name) for work in rows]
    assert len(set(places)) == len(places)
    assert {work.suite for work in rows} == set(SUITES)
    for work in rows:
        assert next(iter(work.build)) == "gpugrad", work.name
        assert {name for name in work.build if not name.startswith("gpugrad")} <= set(peers.PEERS)
        figures = {*work.build, *work.references}
        assert {name for target in work.targets for name in target.against} <= figures
        assert bool(work.targets) <= (not quick)


def test_every_op_has_a_row():
    assert [work.name for work in SUITES["ops"](measure.Setting())] == list(registry)


def test_small_and_full_rows_of_memory_are_of_a_kind():
    """A process compiles for the small one before it measures the full one."""
    make = bench.part("suites").with_targets
    small, full = make(measure.Setting(quick=True)), make(measure.Setting())
    assert [re.sub("[0-9,]", "", w.name) for w in small] == [re.sub("[0-9,]", "", w.name) for w in full]


# --- measuring ----------------------------------------------------------------------------------------


class Clock:
    """A clock that moves only when an implementation runs."""

    def __init__(self):
        self.now, self.turns = 0.0, []

    def __call__(self):
        return self.now

    def takes(self, name, *seconds):
        def implementation():
            self.turns.append(name)
            self.now += seconds[self.turns.count(name) % len(seconds)]
            return [1.0]

        return implementation


def test_implementations_take_turns():
    clock = Clock()
    found = measure.sample({"a": clock.takes("a", 1.0), "b": clock.takes("b", 3.0, 5.0)}, 60.0, clock=clock)
    assert found["a"]["min_s"] == found["a"]["median_s"] == 1.0
    assert (found["b"]["min_s"], found["b"]["median_s"]) == (3.0, 5.0)
    assert len(found["a"]["samples_s"]) == len(found["b"]["samples_s"]) == 15
    # two calls each to see how long they take, then in turns
    assert clock.turns[4:] == ["a", "b"] * 15


def test_what_is_short_is_called_often():
    clock = Clock()
    found = measure.sample({"a": clock.takes("a", 1e-5)}, 0.5, clock=clock, each=1e-2)
    assert found["a"]["calls"] == pytest.approx(1000, abs=1)
    assert found["a"]["min_s"] == pytest.approx(1e-5)


def test_a_wrong_value_is_reported_and_not_timed():
    clock = Clock()

    def fails():
        raise RuntimeError("no such\nthing")

    work = planted(
        gpugrad=clock.takes("gpugrad", 1.0), numpy=lambda: [1.001], torch=fails, autograd=lambda: [np.ones(2)],
        sklearn=lambda: [1.0, 2.0], **{"torch.compile": clock.takes("inaccurate", 2.0)},
    )  # fmt: skip
    exact = work.verify(None)
    work.verify = lambda _data: lambda name, got: exact(name, [1.000005] if name == "torch.compile" else got)
    work.build["jax.jit"] = work.build["cupy"] = lambda _data: pytest.fail("must not be built")
    work.left_out["cupy"] = "no time"
    row = measure.in_turns(work, measure.Setting(peers={"jax.jit": "jax is not installed"}, seconds=5.0), clock)
    found = row["implementations"]
    assert found["gpugrad"]["min_s"] == 1.0
    assert "off by 0.001" in found["numpy"]["wrong"]
    assert found["torch"] == {"failed": "RuntimeError: no such"}
    assert "shape (2,)" in found["autograd"]["wrong"]
    assert "2 results" in found["sklearn"]["wrong"]
    assert found["jax.jit"] == {"missing": "jax is not installed"}
    assert found["cupy"] == {"left out": "no time"}
    assert found["torch.compile"]["min_s"] == 2.0
    assert "off by 5e-06" in found["torch.compile"]["inaccurate"]
    assert "off by" in exact("gpugrad", [1.000005])
    assert set(clock.turns) == {"gpugrad", "inaccurate"}
    text = "\n".join([*report.row_text(row, {}), *report.summary([row])])
    for said in ("missing: jax is not installed", "left out: no time", "wrong: result 0", "failed: RuntimeError"):
        assert said in text


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("exp", lambda out, grads: ([out[0] * 1.01], grads), "output 0"),
        ("exp", lambda out, grads: (out, [grads[0] * 1.01]), "gradient"),
        ("matmul", lambda out, grads: (out, [grads[0], grads[1][::-1]]), "gradient"),
        ("less", lambda out, grads: ([~out[0]], grads), "output 0"),
    ],
)
def test_a_wrong_op_is_seen(name, spoil, says):
    work = next(work for work in SUITES["ops"](measure.Setting(quick=True)) if work.name == name)
    data = work.make()
    verify = work.verify(data)
    last = list(work.build)[2 if len(work.build) > 2 else 0]
    out, grads = work.build[last](data)()
    assert verify(last, (out, grads)) is None
    spoilt = spoil([peers.host(o) if name != "less" else np.asarray(o.data) for o in out], grads and list(grads))
    assert says in verify(last, spoilt)


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (measure.Target(("numpy", "torch"), least=2.0), True),
        (measure.Target(("numpy", "torch"), least=2.5), False),
        (measure.Target(("numpy", "jax.jit"), least=1.5), None),
        # what is missed with one is missed without the other
        (measure.Target(("numpy", "jax.jit"), least=5.0), False),
        (measure.Target(("one read",), most=1.3), True),
        (measure.Target(("one read",), most=1.2), False),
    ],
)
def test_targets(target, met):
    row = {
        "implementations": {
            "gpugrad": {"min_s": 1.0}, "numpy": {"min_s": 2.0}, "torch": {"min_s": 3.0}, "jax.jit": {"missing": "no"}
        },
        "references": {"one read": {"min_s": 0.8}},
    }  # fmt: skip
    judged = measure.judged(target, row)
    assert judged["met"] is met
    assert report.mark(judged) in ("met:   ", "MISSED:", "open:  ")
    assert " and ".join(target.against) in report.target_text(judged)


def test_memory_target():
    target = measure.Target(most=100e6)
    for found, met in (({"bytes": 99e6}, True), ({"bytes": 101e6}, False), ({"failed": "no"}, None)):
        judged = measure.judged(target, {"implementations": {"gpugrad": found}, "references": {}})
        assert judged["met"] is met


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("counted", [True, False])
def test_a_peak_of_memory_is_seen(counted, monkeypatch):
    if not counted:
        monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError))
    before = processes.resident()
    with processes.peak() as found:
        block = np.ones(8_000_000)
        time.sleep(0.05)
        del block
    assert 60e6 < found["bytes"] - before < 90e6
    assert (found["method"] == "VmHWM") <= counted


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_planted_memory_is_weighed():
    """64 MB in between and 16 MB of results, beside data of 32 MB."""

    def build(data):
        def run():
            between = np.ones(8_000_000)
            return [between[:2_000_000] + data[:2_000_000]]

        return run

    work = planted()
    work.make, work.build = lambda: np.ones(4_000_000), {"gpugrad": build}
    found = processes.memory(work, work, "gpugrad")
    assert found["bytes"] == pytest.approx(64e6, abs=4e6)
    assert found["method"] == "VmHWM"


def test_size_of_results():
    assert processes.size([np.zeros(3), (np.zeros(2), 1.0)]) == 40


# --- verdicts -----------------------------------------------------------------------------------------


def timed(rng, seconds, noise=0.02, count=20, spikes=0.0):
    samples = seconds * (1 + noise * rng.random(count)) * np.where(rng.random(count) < spikes, 3.0, 1.0)
    return measure.summary(samples.tolist())


def test_a_planted_regression_is_found(rng):
    old, same, slow = timed(rng, 1.0), timed(rng, 1.02), timed(rng, 1.3)
    assert verdicts.judge(old, same)["verdict"] == verdicts.SAME
    found = verdicts.judge(old, slow)
    assert found["verdict"] == verdicts.SLOWER
    assert found["interval"][0] < found["ratio"] < found["interval"][1]
    assert verdicts.judge(slow, old)["verdict"] == verdicts.FASTER


def test_planted_noise_is_no_regression(rng):
    quiet = timed(rng, 1.0)
    for spikes in (0.3, 0.6):
        assert verdicts.judge(quiet, timed(rng, 1.0, spikes=spikes))["verdict"] != verdicts.SLOWER
    for noise in (0.3, 1.0, 3.0):
        for _ in range(20):
            pair = timed(rng, 1.0, noise), timed(rng, 1.0, noise)
            assert verdicts.judge(*pair)["verdict"] not in (verdicts.SLOWER, verdicts.FASTER)


def test_a_slower_machine_is_no_slower_gpugrad(rng):
    old, new = timed(rng, 1.0), timed(rng, 1.5)
    read = timed(rng, 0.4), timed(rng, 0.6)
    assert verdicts.judge(old, new)["verdict"] == verdicts.SLOWER
    assert verdicts.judge(old, new, read)["verdict"] == verdicts.SAME
    assert verdicts.judge(old, old, read)["verdict"] == verdicts.FASTER


def test_a_few_samples_tell_nothing(rng):
    assert verdicts.judge(timed(rng, 1.0, count=3), timed(rng, 9.0, count=3))["verdict"] == verdicts.CANNOT_TELL


def test_memory_is_compared():
    assert verdicts._memory(10e6, 17e6)["verdict"] == verdicts.SAME
    assert verdicts._memory(10e6, 30e6)["verdict"] == verdicts.LARGER
    assert verdicts._memory(0.0, 30e6)["verdict"] == verdicts.LARGER
    assert verdicts._memory(300e6, 200e6)["verdict"] == verdicts.SMALLER


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A report of the small suite."""
    path = tmp_path_factory.mktemp("bench") / "old.json"
    assert main([*SMALL, "--seconds", "0.2", "--json", str(path)]) == 0
    return path


def test_the_report(measured, capsys):
    content = report.load(str(measured))
    assert content["complete"]
    assert set(content["missing"]) == set(peers.PEERS)
    assert content["missing"]["torch"] == "not asked for by --peers"
    assert content["machine"]["threads"] == peers.gg.backend.available_cores()
    assert content["machine"]["versions"]["numpy"] == np.__version__
    assert {"cores", "caches", "memory_bytes", "environment", "blas", "governor"} <= set(content["machine"])
    kinds = {name.split(",")[0].split()[0] for name in content["limits"]}
    assert kinds == {"read", "copy", "gemm", "calls"}
    (row,) = content["rows"]
    found = row["implementations"]["gpugrad"]
    assert found["min_s"] == pytest.approx(min(found["samples_s"]), rel=1e-5)
    assert len(found["samples_s"]) >= 5
    assert row["implementations"]["jax.jit"] == {"missing": "not asked for by --peers"}


def test_json_on_stdout(capsys):
    status, out, err = run(capsys, *SMALL, "--json", "-")
    assert status == 0
    assert json.loads(out)["rows"][0]["suite"] == "step"
    for said in ("missing   torch", "step of SGD", "limits", "gpugrad, not compiled"):
        assert said in err


def doctored(measured, tmp_path, factor):
    content = json.loads(measured.read_text())
    for row in content["rows"]:
        for name, found in row["implementations"].items():
            if name.startswith("gpugrad"):
                row["implementations"][name] = measure.summary([factor * s for s in found["samples_s"]])
    path = tmp_path / "doctored.json"
    path.write_text(json.dumps(content))
    return path


def test_a_regression_is_exit_status_1(measured, tmp_path, capsys):
    old = doctored(measured, tmp_path, 1e-4)  # beyond the noise of any machine
    path = tmp_path / "new.json"
    status, _, err = run(capsys, *SMALL, "--compare", old, "--json", path)
    assert status == 1
    assert "measured again" in err
    assert re.search(r"slower .* step: step of SGD", err)
    compared = json.loads(path.read_text())["compared"]
    assert {v["verdict"] for v in compared} == {"slower"}


def test_what_is_faster_is_exit_status_0(measured, tmp_path, capsys):
    status, _, err = run(capsys, *SMALL, "--compare", doctored(measured, tmp_path, 1e4))
    assert status == 0
    assert re.search(r"faster .* step: step of SGD", err)


def test_another_machine_is_named(measured, tmp_path, capsys):
    content = json.loads(measured.read_text())
    content["machine"]["processor"] = "8086"
    content["machine"]["versions"]["numpy"] = "1.0"
    content["machine"]["load"] = 900.0
    old = tmp_path / "old.json"
    old.write_text(json.dumps(content))
    _, _, err = run(capsys, *SMALL, "--compare", old)
    assert "processor was 8086" in err
    assert "numpy 1.0 ->" in err
    assert "old run: a load of 900.0" in err


def test_nothing_in_common_is_an_error(measured, capsys):
    status, _, err = run(capsys, "bench", "swish", *SMALL[2:], "--compare", measured)
    assert status == 1
    assert "no row is in both reports" in err.splitlines()[-1]


def test_a_wrong_gpugrad_is_exit_status_1(capsys, monkeypatch):
    monkeypatch.setattr(measure, "near", lambda *_: lambda name, _got: "is off" if name == "gpugrad" else None)
    monkeypatch.setattr(bench.part("functions"), "near", measure.near)
    status, _, err = run(capsys, *SMALL)
    assert status == 1
    assert "wrong: is off" in err


def test_ctrl_c_keeps_what_was_measured(capsys, tmp_path, monkeypatch):
    real, calls = measure.measure, []

    def interrupt(work, setting):
        calls.append(work)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(work, setting)

    monkeypatch.setattr(measure, "measure", interrupt)
    path = tmp_path / "a.json"
    status, _, err = run(capsys, "bench", "ops", *SMALL[2:], "--json", path)
    assert status == 130
    assert err.splitlines()[-1] == f"gpugrad bench: interrupted after 2 rows; what was measured is in {path}"
    content = report.load(str(path))
    assert (content["complete"], len(content["rows"])) == (False, 2)
    calls.clear()
    status, _, err = run(capsys, "bench", "ops", *SMALL[2:])
    assert "--json FILE keeps" in err.splitlines()[-1]


def test_out_of_time_is_named(capsys, monkeypatch):
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    status, _, err = run(capsys, *SMALL)
    assert status == 0
    assert "--quick was out of time" in err


@pytest.mark.parametrize("package", ["torch", "jax", "autograd", "sklearn"])
def test_a_missing_peer_is_named(package, monkeypatch, capsys):
    real = peers.importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    hidden = [peer for peer, needs in peers.PEERS.items() if needs == package]
    status, _, err = run(capsys, *SMALL[:3], *SMALL[5:], "--peers", ",".join(hidden))
    assert status == 0
    for peer in hidden:
        assert f"missing   {peer}: {package} is not installed" in err


def test_without_numba(capsys):
    """In a process of its own: what is hidden from it stays hidden."""
    code = f"import sys; from gpugrad.cli import main; sys.exit(main({[*SMALL, '--no-numba', '--json', '-']!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    content = json.loads(done.stdout)
    assert content["machine"]["versions"]["numba"] is None
    assert "min_s" in content["rows"][0]["implementations"]["gpugrad"]


# --- the page -----------------------------------------------------------------------------------------


def everything(content):
    """The report with rows of every kind: a curve, targets, a peer without figures, a comparison."""
    rng = np.random.default_rng(0)
    for i in range(1, 5):
        row = {
            "suite": "scaling", "name": f"by rows: a < b & {i}", "device": "cpu", "moved_bytes": 10**i, "flops": 10**i,
            "bound": "read", "curve": ["rows", 10**i], "references": {"one read": timed(rng, 0.1)}, "targets": [],
        }  # fmt: skip
        row["implementations"] = {"gpugrad": timed(rng, 1.0), "jax.jit": timed(rng, 2.0), "torch": {"wrong": "off"}}
        row["targets"] = [measure.judged(measure.Target(("jax.jit",), least=1.5), row)]
        content["rows"] += [row, {**row, "suite": "linreg", "name": f"row {i}", "curve": None}]
    place = {
        "suite": "memory",
        "name": "m",
        "bound": "memory",
        "targets": [],
        "implementations": {"gpugrad": {"bytes": 5e6}},
    }
    content["rows"].append({**row, **place})
    verdict = {"suite": "step", "name": "s", "implementation": "gpugrad", "verdict": "slower", "ratio": 1.3}
    content["compared"] = [{**verdict, "interval": [1.2, 1.4]}, {**verdict, "verdict": "larger", "ratio": None}]
    return content


def check_page(text, content):
    for outside in ("http:", "https:", "<script", "<link", "<img", "@import", "url(", "src="):
        assert outside not in text, outside
    for row in content["rows"]:
        assert html.escape(row["name"]) in text
    for peer, why in content["missing"].items():
        assert html.escape(f"{peer}: {why}") in text


def test_the_page_stands_alone(measured):
    content = everything(json.loads(measured.read_text()))
    text = page.page(content)
    check_page(text, content)
    for said in ("Roofline", "by rows", "Targets: 8 of 8 met", "wrong: off", "Compared with before", "5.0 MB"):
        assert said in text
    assert text.count("<svg") == 2
    assert "NaN" not in text


def test_the_page_of_an_interrupted_run(measured):
    content = json.loads(measured.read_text()) | {"rows": [], "complete": False}
    assert "interrupted" in page.page(content)


def in_browser(folder, text, width):
    """What a browser says of the page on a screen so many pixels wide: its own width, and its errors."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    (folder / "report.html").write_text(text, encoding="utf-8")
    probe = folder / "probe.html"
    probe.write_text(
        f'<!doctype html><iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(text)}" onload="'
        "const page = this.contentDocument; document.body.append('widths ' + page.scrollingElement.scrollWidth + ' '"
        " + this.contentWindow.innerWidth + ' rows ' + page.querySelectorAll('tbody tr').length + ' small ' +"
        " [...page.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().height < 9).length + ' end')"
        '"></iframe>'
    )
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=5000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"widths (\d+) (\d+) rows (\d+) small (\d+) end", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return tuple(map(int, found.groups()))


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_the_page_in_a_browser(measured, tmp_path, width):
    content = everything(json.loads(measured.read_text()))
    scroll, inner, rows, small = in_browser(tmp_path, page.page(content), width)
    assert scroll <= inner == width
    assert rows >= len(content["rows"])
    assert small == 0


@pytest.mark.slow
def test_quick_takes_less_than_a_minute(tmp_path):
    """Everything, with all peers that are installed, in a process of its own."""
    names = [tmp_path / "a.json", tmp_path / "a.html"]
    command = ["bench", "--quick", "--device", "cpu", "--json", str(names[0]), "--html", str(names[1])]
    began = time.perf_counter()
    code = f"import sys; from gpugrad.cli import main; sys.exit(main({command!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    took = time.perf_counter() - began
    assert done.returncode == 0, done.stderr[-2000:]
    content = report.load(str(names[0]))
    assert {row["suite"] for row in content["rows"]} == set(SUITES)
    assert not list(report.faults(content["rows"]))
    check_page(names[1].read_text(encoding="utf-8"), content)
    scroll, inner, _, small = in_browser(tmp_path, names[1].read_text(encoding="utf-8"), 390)
    assert scroll <= inner == 390
    assert small == 0
    assert took < 60
