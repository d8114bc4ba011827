"""`bench.gpu` and bench/gpu.sh on the stand-in for CuPy: they run through, see wrong numbers, say what is missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from devices import problem

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the package

from bench import gpu, gpu_steps  # noqa: E402
from gpugrad import backend, kernels  # noqa: E402
from gpugrad.cli import selftest_cuda  # noqa: E402

TINY = ["--quick", "--scale", "1e-5", "--seconds", "300"]


@pytest.fixture
def meter(stand_in):
    return gpu.Meter(backend.as_device("cuda"), scale=1e-5, seconds=300, each=0.0)


# --- the whole ----------------------------------------------------------------------------------------


def test_from_end_to_end(stand_in, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert gpu.main([*TINY, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    report = json.loads(path.read_text())
    # its figures can never pass for a GPU's
    assert "no figure here is a GPU's" in report["warning"]
    assert report["machine"]["name"] == "stand-in"
    assert report["warning"].upper() in out
    assert report["wrong"] == []
    measured = {(row["kernel"].partition(",")[0], row["dtype"]) for row in report["kernels"] if row["GBps"] > 0}
    names = {*kernels.POINTWISE, *selftest_cuda.SUMMING, "sgd_update", "adam_update"}
    assert measured == {(name, dtype) for name in names for dtype in ("float16", "float32", "float64")}
    assert len(report["steps"]) == len(gpu_steps.STEPS)
    for step in report["steps"]:
        assert step["peers"]["gpugrad"]["median_s"] > 0, step
        for row in step["peers"].values():
            assert "median_s" in row or row["missing"], step
    assert stand_in.get_default_memory_pool().get_limit() == 0  # the streamed step put it back
    small = report["steps"][-1]["peers"]
    assert 0 < small["gpugrad"]["launches"] < small["cupy"]["launches"] / 3
    assert small["gpugrad"]["launches"] < small["gpugrad op by op"]["launches"]
    assert small["gpugrad.compile"]["launches"] < small["gpugrad op by op"]["launches"]
    assert "every pointwise float32 kernel" in report["targets"][0]["what"]


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(backend, "cuda_problem", lambda: "device 'cuda' is not usable: no driver")
    assert gpu.main([]) == 3
    out, err = capsys.readouterr()
    assert (out, err) == ("", "bench.gpu: device 'cuda' is not usable: no driver\n")


@pytest.mark.parametrize("name", ["cuda:9"])
def test_no_such_device(name, stand_in, capsys):
    assert gpu.main(["--device", name]) == 3
    assert capsys.readouterr().err.count("\n") == 1


# --- what must not be timed -----------------------------------------------------------------------------


def test_a_kernel_with_wrong_values_is_not_timed(meter, monkeypatch):
    exact = kernels.relu
    monkeypatch.setattr(kernels, "relu", lambda x: exact(x) * 1.001)
    rows = {row["kernel"]: row for row in gpu.measure_kernels(meter, 1.0) if row["dtype"] == "float32"}
    assert "off by up to" in rows["relu"]["wrong"]
    assert "GBps" not in rows["relu"]
    assert "GBps" in rows["swish"]
    assert any(text.startswith("relu float32") for text in meter.wrong)


def test_a_kernel_that_is_wrong_on_many_rows_alone(meter, monkeypatch):
    exact = kernels.relu

    def wrong(x):
        y = exact(x)
        if len(x) > 64:
            y[-1, -1] = 5
        return y

    x = gpu.random(meter, (100, gpu.COLUMNS), np.dtype("float32"))
    gpu._verify_whole(meter, "relu", np.dtype("float32"), [x], 64)
    monkeypatch.setattr(kernels, "relu", wrong)
    with pytest.raises(gpu.WrongValue, match="other numbers in 100 rows"):
        gpu._verify_whole(meter, "relu", np.dtype("float32"), [x], 64)


def test_a_sum_that_leaves_rows_out(meter, monkeypatch):
    exact = kernels.bias_relu_backward

    def wrong(g, y):
        dx, db = exact(g, y)
        return (dx, db) if len(g) <= 64 else (dx, exact(g[:-1], y[:-1])[1])

    g, y = (gpu.random(meter, (100, gpu.COLUMNS), np.dtype("float32"), seed=k) for k in (1, 2))
    monkeypatch.setattr(kernels, "bias_relu_backward", wrong)
    with pytest.raises(gpu.WrongValue, match="the sum over 100 rows is off"):
        gpu._verify_whole(meter, "bias_relu_backward", np.dtype("float32"), [g, y], 64)


def implementation(value):
    return gpu_steps.Implementation(lambda: None, lambda _: None, lambda: [value])


def test_peers_that_are_wrong_or_missing(meter, capsys):
    def fail():
        raise RuntimeError("no kernel image\nfor this device")

    def gone():
        raise gpu_steps.Missing("not installed")

    build = {
        "gpugrad": lambda: implementation(np.ones(3)),
        "off": lambda: implementation(1.01 * np.ones(3)),
        "nan": lambda: implementation(np.full(3, np.nan)),
        "shape": lambda: implementation(np.ones(4)),
        "broken": fail,
        "gone": gone,
    }

    def step(_meter):
        return gpu_steps.Step("a step", build, lambda: [np.ones(3)], 1e-5)

    found = gpu_steps.measure(meter, step)["peers"]
    assert found["gpugrad"]["median_s"] > 0
    assert all("wrong" in found[peer] for peer in ("off", "nan", "shape"))
    assert found["broken"] == {"missing": "RuntimeError: no kernel image"}
    assert found["gone"] == {"missing": "not installed"}
    assert len(meter.wrong) == 3
    gpu_steps.show({"name": "a step", "note": "", "peers": found})
    assert "gone                    missing: not installed" in capsys.readouterr().out


@pytest.mark.oracle
def test_pytorchs_part_gives_the_right_numbers(meter, monkeypatch):
    """What is compared with is the same computation: PyTorch's code of every step, here on its CPU side."""
    torch = pytest.importorskip("torch")

    class OnTheCpu:
        def __getattr__(self, name):
            return getattr(torch, name)

        def from_dlpack(self, array):
            return torch.from_numpy(array.get())

        def tensor(self, value, device, **options):
            return torch.tensor(value, **options)

    monkeypatch.setattr(gpu_steps, "_torch", OnTheCpu)
    ran = 0
    for make in gpu_steps.STEPS:
        step = make(meter)
        for peer in ("torch", "torch composition"):
            if peer in step.build:
                made = step.build[peer]()
                assert gpu_steps._verified(step, made.check(), step.expected()) is None
                made.run()
                ran += 1
    assert ran == len(gpu_steps.STEPS) - 1  # all but the streamed one


def test_an_error_of_gpugrads_own_stops_everything(meter):
    def fail():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        gpu_steps.measure(meter, lambda _: gpu_steps.Step("a step", {"gpugrad": fail}, list, 1e-5))


def test_out_of_time(stand_in):
    meter = gpu.Meter(backend.as_device("cuda"), scale=1e-5, seconds=0.0, each=0.0)
    assert {row["skipped"] for row in gpu.measure_kernels(meter, 1.0)} == {"out of time"}
    assert gpu_steps.measure(meter, gpu_steps.mlp)["note"] == "skipped, out of time"


def test_targets():
    def kernel(name, share, dtype="float32"):
        return {"kernel": name, "dtype": dtype, "of_copy": share}

    def times(mine, theirs):
        return {"gpugrad": {"median_s": mine}, "torch": theirs}

    least = ({"peer": "torch", "least": 2.0},)
    report = {
        "kernels": [
            kernel("relu", 0.95),
            kernel("swish", 0.85),
            kernel("relu", 0.1, "float64"),
            kernel("adam_update", 0.1),
            {"kernel": "swish", "dtype": "float32", "skipped": "out of time"},
        ],
        "steps": [
            {"name": "fast", "targets": least, "peers": times(1.0, {"median_s": 2.5})},
            {"name": "slow", "targets": least, "peers": times(1.0, {"median_s": 1.5})},
            {"name": "alone", "targets": least, "peers": times(1.0, {"missing": "not installed"})},
        ],
    }
    found = gpu.targets(report)
    assert [(t["found"], t["met"]) for t in found] == [("0.85 (swish)", False), ("2.50", True), ("1.50", False)]


def test_bytes_are_counted_once():
    """Each input read once, each output written once, in the kernels' own types."""
    half, single = np.dtype("float16"), np.dtype("float32")
    assert gpu._moved("relu", single) == 8
    assert gpu._moved("swish_backward", single) == 12
    assert gpu._moved("swish_backward", half) == 4 + 2 + 4  # g, x, dx
    assert gpu._moved("bias_swish", single) == 8
    assert gpu._moved("swish_backward_sum", single) == 12
    assert gpu._moved("squared_error", single) == 16


# --- the script -----------------------------------------------------------------------------------------


def script(*arguments, **environment):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )


def test_script_without_a_gpu(tmp_path):
    if problem("cuda") is None:
        pytest.skip("there is a GPU")
    done = script(tmp_path / "out")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("bench/gpu.sh: device 'cuda'")
    assert not (tmp_path / "out").exists()


def test_script_without_its_packages(tmp_path):
    """Python without site-packages has none of them."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = script(tmp_path / "out", PYTHON=str(bare), PYTHONPATH="")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "optree, array_api_compat" in done.stderr


@pytest.fixture
def everywhere(tmp_path):
    """Environment in which every Python that starts has the stand-in in CuPy's place."""
    if missing := problem("stand-in"):
        pytest.skip(missing)
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\n"
        "from cuda_proof import stand_in\n"
        "stand_in.held = stand_in.install(devices=2)\nstand_in.held.__enter__()\n"
    )
    return {
        "PYTHONPATH": str(folder),
        "SELFTEST_OPTIONS": "--quick",
        "BENCH_OPTIONS": " ".join(TINY),
        "TESTS": "tests/test_gpu.py tests/test_nn.py",
        "PYTEST_ADDOPTS": "-k 'every_time or memory_goes_back or several_gpus'",
    }


@pytest.mark.slow
def test_script_from_end_to_end(everywhere, tmp_path):
    folder = tmp_path / "out"
    done = script(folder, **everywhere)
    logs = {path.name: path.read_text() for path in folder.iterdir()}
    assert done.returncode == 0, [done, logs]
    assert set(logs) == {
        "env.txt", "summary.txt", "selftest.txt", "selftest.json", "tests.txt", "bench.txt", "bench.json"
    }  # fmt: skip
    for stage in ("selftest", "tests", "bench"):
        assert f"{stage:9} passed" in logs["summary.txt"]
    assert "stand-in" in logs["env.txt"]
    assert json.loads(logs["selftest.json"])["passed"]
    assert "stand-in" in json.loads(logs["bench.json"])["warning"]
    assert "4 passed" in logs["tests.txt"]


@pytest.mark.slow
def test_script_goes_on_and_says_what_failed(everywhere, tmp_path):
    folder = tmp_path / "out"
    done = script(folder, **{**everywhere, "SELFTEST_OPTIONS": "--no-such-option", "BENCH_OPTIONS": "--device cuda:7"})
    assert done.returncode == 1
    lines = (folder / "summary.txt").read_text().splitlines()
    assert lines[0].startswith("selftest  FAILED, status 2")
    assert lines[1].startswith("tests     passed")
    assert lines[2].startswith("bench     FAILED, status 3")


@pytest.mark.parametrize(
    "bad",
    [
        ["--device", "cpu"],
        ["--device", "gpu"],
        ["--scale", "-1"],
        ["--scale", "nan"],
        ["--seconds", "0"],
        ["--json", "no/b.json"],
    ],
    ids=" ".join,
)
def test_bad_usage(bad, capsys):
    """Before anything is measured, in one line and the usage, status 2."""
    with pytest.raises(SystemExit) as stop:
        gpu.main(bad)
    assert stop.value.code == 2
    assert bad[0] in capsys.readouterr().err
