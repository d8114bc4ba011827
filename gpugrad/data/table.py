"""Columnar tables in host memory, read from files, frames and arrays."""

from __future__ import annotations

import difflib
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gpugrad.errors import DataError

__all__ = ["Column", "Table", "read_table"]

Kind = Literal["numeric", "categorical", "other"]
Array = npt.NDArray[Any]

_SUFFIXES = ".parquet, .pq, .csv, .tsv, .npz or .npy"
_MAGIC = ((b"PAR1", "Parquet"), (b"PK\x03\x04", "npz or zip"), (b"\x93NUMPY", "npy"), (b"\x1f\x8b", "gzip"))
# pandas stores an unnamed index under these names: row numbers, never an input
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """One named column, read-only.

    kind "numeric": values float64 (rows,), NaN for missing; booleans are 0 and 1, integers beyond 2**53 are rounded.
    kind "categorical": values int32 codes (rows,) into `categories`, -1 for missing.
    kind "other" (dates, lists, bytes, ...): values bool (rows,), True where present; no use but to be named.
    stored: the type the source had, for messages.
    """

    name: str
    kind: Kind
    values: Array
    categories: tuple[str, ...] = ()
    stored: str = ""

    def __post_init__(self) -> None:
        values = self.values.view()  # the caller's own array stays as it was
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    @property
    def missing(self) -> npt.NDArray[np.bool_]:
        """Bool (rows,), True where the value is missing."""
        if self.kind == "numeric":
            return np.isnan(self.values)
        return self.values < 0 if self.kind == "categorical" else ~self.values

    def take(self, indices: Array) -> Column:
        """The rows `indices`, in that order."""
        return replace(self, values=self.values[indices])

    def as_categorical(self) -> Column:
        """The same column with numbers written as text (3.0 as "3"), categories in numeric order. No infinities."""
        if self.kind != "numeric":
            return self
        distinct, codes = np.unique(self.values, return_inverse=True, equal_nan=True)
        codes = codes.astype(np.int32)
        if distinct.size and np.isnan(distinct[-1]):
            distinct = distinct[:-1]
            codes[codes == distinct.size] = -1
        names = tuple(str(int(v)) if v.is_integer() else repr(v) for v in distinct.tolist())
        return Column(self.name, "categorical", codes, names, self.stored)

    def first_text(self) -> tuple[int, str] | None:
        """Row and value of the first entry that is no number, or None: why a column of numbers came as text."""
        text = np.array([*(not is_number(category) for category in self.categories), False])
        at = np.flatnonzero(text[self.values] if self.kind == "categorical" else [])
        return (int(at[0]), self.categories[self.values[at[0]]]) if len(at) else None


class Table:
    """Named columns of one length; immutable. `table[name]` gives a Column, iteration the names."""

    __slots__ = ("_columns", "_source")

    def __init__(self, columns: Iterable[Column], source: str = "the table") -> None:
        columns = tuple(columns)
        if not columns:
            raise DataError(f"{source} has no columns; wanted at least one.")
        by_name = {column.name: column for column in columns}
        if len(by_name) < len(columns):
            names = [column.name for column in columns]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{source} has two columns called {twice!r}; rename one (is the header line missing?).")
        self._columns = by_name
        self._source = source
        for column in columns:
            if column.values.shape != (self.rows,):
                raise DataError(
                    f"{source}: column {column.name!r} has {len(column.values):,} rows, "
                    f"{columns[0].name!r} has {self.rows:,}; give columns of one length."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Column names, in order."""
        return tuple(self._columns)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self._columns.values())).values)

    @property
    def source(self) -> str:
        """Where it came from, for messages: a path or what it was in memory."""
        return self._source

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Column:
        try:
            return self._columns[name]
        except (KeyError, TypeError):
            raise DataError(_no_column(self, [name])) from None

    def __repr__(self) -> str:
        columns = ", ".join(f"{column.name}: {column.kind}" for column in self._columns.values())
        return f"Table({self.rows} rows; {columns})"

    def select(self, names: Iterable[str]) -> Table:
        """The columns `names`, in that order. Raises DataError naming those the table has not."""
        names = (names,) if isinstance(names, str) else tuple(names)
        if absent := [name for name in names if name not in self]:
            raise DataError(_no_column(self, absent))
        return Table((self[name] for name in names), self.source)

    def renamed(self, source: str) -> Table:
        """The same columns under another name of the whole, which messages tell."""
        return Table(self._columns.values(), source)

    def take(self, indices: npt.ArrayLike) -> Table:
        """The rows `indices` (integers, or a bool mask of `rows`), in that order. Raises DataError out of range."""
        wanted = np.asarray(indices)
        if wanted.dtype == np.bool_:
            fits = wanted.shape == (self.rows,)
        else:
            wanted = wanted.astype(np.int64) if wanted.size == 0 else wanted
            fits = wanted.ndim == 1 and wanted.dtype.kind in "iu"
            fits = fits and (wanted.size == 0 or (int(wanted.min()) >= 0 and int(wanted.max()) < self.rows))
        if not fits:
            raise DataError(
                f"take: rows came as {wanted.dtype} {wanted.shape}; wanted integers (n,) from 0 to {self.rows - 1}, "
                f"or a bool mask ({self.rows},)."
            )
        return Table((column.take(wanted) for column in self._columns.values()), self.source)


def read_table(source: object) -> Table:
    """Read a Table from a path, a frame or arrays.

    A path (str or PathLike): Parquet, CSV/TSV with a header, .npz or .npy, known by the suffix and checked by content.
    An object with `__arrow_c_stream__` (pandas, polars, pyarrow), a mapping name -> array (rows,), or anything with
    `__array__`. A 2-D array (rows, k) gives columns x0 ... (in a mapping: name0 ...); a Table passes through.
    Raises DataError when the source is missing, empty, malformed or not what its name says.
    """
    if isinstance(source, Table):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fsdecode(source))
    if isinstance(source, Mapping):
        columns = [c for name, values in source.items() for c in _array_columns(str(name), values, "the mapping")]
        return _non_empty(Table(columns, "the mapping"))
    if hasattr(source, "__arrow_c_stream__"):
        return _non_empty(_from_arrow(_arrow_stream(source), f"the {type(source).__name__}"))
    if hasattr(source, "__array__"):
        return _non_empty(Table(_whole_array(source, "the array"), "the array"))
    raise DataError(
        f"cannot read a table from {type(source).__name__}; give a path ({_SUFFIXES}), a pandas, polars or pyarrow "
        "table, a NumPy array, or a mapping of names to 1-D arrays."
    )


def require_pyarrow(what: str) -> Any:
    """The pyarrow module, imported now. Raises DataError with the remedy where it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f'{what} needs pyarrow, which is not installed; run: pip install "gpugrad[data]"') from None
    return pyarrow


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough to quote inside one of ours."""
    text = "; ".join(error.args) if all(isinstance(arg, str) for arg in error.args) else str(error)
    text = (text.strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return text if len(text) <= 120 else text[:117] + "..."


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names for a message, cut after `most`."""
    names = list(names)
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def is_number(text: str) -> bool:
    """Whether a category reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _no_column(table: Table, absent: list[str]) -> str:
    close = [match for name in absent for match in difflib.get_close_matches(str(name), table.names, n=1)]
    hint = f"; did you mean {listed(map(repr, close))}?" if close else "."
    noun = "column" if len(absent) == 1 else "columns"
    return f"{table.source} has no {noun} {listed(map(repr, absent))}{hint}\nIts columns: {listed(table.names, 30)}."


def _non_empty(table: Table) -> Table:
    if table.rows == 0:
        raise DataError(f"{table.source} has columns but no rows; wanted at least one row.")
    return table


# files ---------------------------------------------------------------------------------------------------------------


def _from_path(path: str) -> Table:
    readers = {
        ".parquet": ("Parquet", _read_parquet),
        ".pq": ("Parquet", _read_parquet),
        ".csv": ("CSV", _read_csv),
        ".tsv": ("CSV", _read_csv),
        ".npz": ("npz or zip", _read_npz),
        ".npy": ("npy", _read_npy),
    }
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; check the path (looked from {os.getcwd()}).")
    if os.path.isdir(path):
        raise DataError(f"{path} is a folder; give one {_SUFFIXES} file.")
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in readers:
        raise DataError(f"{path}: cannot tell its format from {suffix or 'a name without suffix'}; wanted {_SUFFIXES}.")
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check its permissions.") from None
    if not head.strip():
        raise DataError(f"{path} is empty ({os.path.getsize(path)} bytes); write the data again.")
    expected, reader = readers[suffix]
    found = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    if found is None and re.match(rb"\s*(<!doctype|<html|<\?xml)", head, re.IGNORECASE):
        found = "HTML or XML"
    if found != (None if expected == "CSV" else expected):
        came = f"{found} data" if found else "something else"
        remedy = "rename it to what it is, or convert it" if found else "write or download it again"
        raise DataError(f"{path}: its name says {expected.split()[0]}, its content is {came}; {remedy}.")
    return _non_empty(reader(path))


def _read_parquet(path: str) -> Table:
    pyarrow = require_pyarrow("reading Parquet")
    from pyarrow import parquet

    try:
        # ParquetFile, not read_table: that one would read "month=1/" in the path as a column
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}: truncated or damaged Parquet ({first_line(error)}); write or download it again."
        ) from None
    return _from_arrow(table, path)


def _read_csv(path: str) -> Table:
    pyarrow = require_pyarrow("reading CSV")
    from pyarrow import csv

    with open(path, "rb") as file:
        head = file.read(65536)
    if b"\0" in head:
        raise DataError(f"{path}: not UTF-8 text (it holds zero bytes); save it as CSV in UTF-8.")
    bad: list[str] = []

    def note(row: Any) -> str:
        text = row.text if len(row.text) <= 60 else row.text[:57] + "..."
        bad.append(f"line {row.number} has {row.actual_columns} fields, the header {row.expected_columns}: {text!r}")
        return "error"

    def read(threads: bool) -> Any:
        return csv.read_csv(
            path,
            read_options=csv.ReadOptions(use_threads=threads),
            parse_options=csv.ParseOptions(
                delimiter=_delimiter(head), newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=csv.ConvertOptions(strings_can_be_null=True),
        )

    try:
        try:
            table = read(threads=True)
        except pyarrow.ArrowInvalid:
            bad.clear()
            table = read(threads=False)  # only one thread knows the number of a bad row
        names = [name.strip() for name in table.column_names]
    except UnicodeDecodeError:
        raise DataError(f"{path}: its header is not UTF-8 text; save it as CSV in UTF-8.") from None
    except (pyarrow.ArrowException, OSError) as error:
        why = bad[0] if bad else first_line(error)
        raise DataError(
            f"{path}: truncated or malformed CSV: {why}.\nWanted a header line, then as many fields in every row."
        ) from None
    for name, field in zip(names, table.schema, strict=True):
        if pyarrow.types.is_binary(field.type):
            raise DataError(f"{path}: column {name!r} is not UTF-8 text; save the file as CSV in UTF-8.")
    # a column without a name is what pandas makes of row numbers, and a spreadsheet of a comma at the end
    named = [j for j, name in enumerate(names) if name]
    return _from_arrow(table.rename_columns(names).select(named), path)


def _delimiter(head: bytes) -> str:
    """The comma, unless the header line has none and has tabs or semicolons."""
    line = head.lstrip(b"\r\n").splitlines()[0] if head.strip() else b""
    return next((mark for mark in (",", "\t", ";") if mark.encode() in line), ",")


def _read_npz(path: str) -> Table:
    with open(path, "rb") as file, _NumpyErrors(path):
        arrays = np.load(file, allow_pickle=False)
        with arrays:
            loaded = {name: arrays[name] for name in arrays.files}
    if any(isinstance(array, bytes) for array in loaded.values()):
        raise DataError(f"{path}: a zip archive but not an .npz one; write it with numpy.savez.")
    return Table([c for name, array in loaded.items() for c in _array_columns(name, array, path)], path)


def _read_npy(path: str) -> Table:
    with open(path, "rb") as file, _NumpyErrors(path):
        array = np.load(file, allow_pickle=False)
    return Table(_whole_array(array, path), path)


class _NumpyErrors:
    """Turns what numpy.load raises on a bad file into one DataError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if error is None or isinstance(error, DataError):
            return
        if isinstance(error, ValueError) and "allow_pickle" in str(error):
            raise DataError(
                f"{self.path} holds Python objects (pickle), which are never loaded; save numbers or text arrays."
            ) from None
        if isinstance(error, (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)):
            raise DataError(
                f"{self.path}: truncated or damaged ({first_line(error)}); write or download it again."
            ) from None


# arrays --------------------------------------------------------------------------------------------------------------


def _whole_array(source: Any, where: str) -> list[Column]:
    array = source if isinstance(source, np.ma.MaskedArray) else _to_numpy(source, where)
    if array.dtype.names is not None:
        return [c for name in array.dtype.names for c in _array_columns(name, array[name], where)]
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise DataError(f"{where} has shape {array.shape}; wanted (rows, columns) or (rows,).")
    return _array_columns("x", array, where)


def _array_columns(name: str, source: Any, where: str) -> list[Column]:
    """One column from a 1-D array, k columns from a 2-D one."""
    array = source if isinstance(source, np.ma.MaskedArray) else _to_numpy(source, f"{where}, column {name!r}")
    if array.ndim == 1:
        return [_array_column(name, array, where)]
    if array.ndim == 2:
        return [_array_column(f"{name}{j}", array[:, j], where) for j in range(array.shape[1])]
    raise DataError(f"{where}: column {name!r} has shape {array.shape}; wanted (rows,) or (rows, k).")


def _to_numpy(source: Any, where: str) -> Array:
    try:
        return np.asarray(source)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: {type(source).__name__} is no NumPy array ({first_line(error)}); copy it to one first."
        ) from None


def _array_column(name: str, array: Array, where: str) -> Column:
    mask = np.ma.getmaskarray(array) if isinstance(array, np.ma.MaskedArray) else None
    array = np.ma.getdata(array)
    stored = str(array.dtype)
    kind = array.dtype.kind
    if kind == "O":
        array, mask = _plain_objects(name, array, mask, where)
        kind = array.dtype.kind
    if kind in "biuf":
        # order="C" and a copy: the table must not change when the caller's array does
        values = np.array(array, dtype=np.float64, order="C")
        if mask is not None:
            values[mask] = np.nan
        return Column(name, "numeric", values, (), stored)
    if kind in "UT":
        present = slice(None) if mask is None else ~mask
        codes = np.full(len(array), -1, np.int32)
        distinct, codes[present] = np.unique(array[present], return_inverse=True)
        return Column(name, "categorical", codes, tuple(map(str, distinct.tolist())), "text")
    if kind in "Mm":
        return Column(name, "other", ~(np.isnat(array) if mask is None else np.isnat(array) | mask), (), stored)
    if kind == "O" and mask is not None:
        return Column(name, "other", ~mask, (), type(array[np.argmin(mask)]).__name__)
    raise DataError(f"{where}: column {name!r} is of type {stored}; wanted real numbers, booleans or text.")


def _plain_objects(
    name: str, array: Array, mask: npt.NDArray[np.bool_] | None, where: str
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """An object array as numbers, text or, of anything else, unchanged; with the mask of its missing entries."""
    items = array.tolist()
    missing = np.fromiter(map(_is_missing, items), np.bool_, len(items))
    missing = missing if mask is None else mask | missing
    present = [x for x, gone in zip(items, missing, strict=True) if not gone]
    numbers = sum(isinstance(x, (bool, int, float, np.number, np.bool_)) for x in present)
    texts = sum(isinstance(x, str) for x in present)
    out: Array
    if numbers == len(present):
        out = np.full(len(items), np.nan)
        out[~missing] = present
    elif texts == len(present):
        out = np.full(len(items), "", dtype=np.dtypes.StringDType())
        out[~missing] = present
    elif numbers or texts:
        kinds = listed(sorted({type(x).__name__ for x in present}), 4)
        raise DataError(f"{where}: column {name!r} mixes {kinds}; make it numbers only or text only.")
    else:
        out = array
    return out, missing


def _is_missing(value: object) -> bool:
    # pandas.NA and NaT by name, without pandas
    return value != value if isinstance(value, float) else type(value).__name__ in ("NoneType", "NAType", "NaTType")


# Arrow ---------------------------------------------------------------------------------------------------------------


def _arrow_stream(source: Any) -> Any:
    name = type(source).__name__
    pyarrow = require_pyarrow(f"reading a {name}")
    try:
        # not pyarrow.table(source), which imports pandas
        return pyarrow.RecordBatchReader.from_stream(source).read_all()
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"the {name} is no table ({first_line(error)}); give a frame whose columns each hold one type."
        ) from None


def _from_arrow(table: Any, source: str) -> Table:
    try:
        columns = zip(table.column_names, table.columns, strict=True)
        return Table([_arrow_column(name, data) for name, data in columns if not _PANDAS_INDEX.fullmatch(name)], source)
    except UnicodeDecodeError:
        raise DataError(f"{source} holds text that is not UTF-8 (damaged?); write or download it again.") from None


def _arrow_column(name: str, column: Any) -> Column:
    """A pyarrow ChunkedArray as a Column."""
    from pyarrow import types

    kind = column.type
    stored = str(kind)
    real = (types.is_boolean, types.is_integer, types.is_floating, types.is_decimal, types.is_null)
    if any(check(kind) for check in real):
        return Column(name, "numeric", _arrow_floats(column), (), stored)
    if types.is_string_view(kind):
        column = column.cast("large_string")
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        column = column.dictionary_encode()
        categories = tuple(column.chunk(0).dictionary.to_pylist()) if column.num_chunks else ()
        codes = _arrow_codes(column, np.arange(-1, len(categories), dtype=np.int32))
        return Column(name, "categorical", codes, categories, "text")
    if types.is_dictionary(kind) and _has_spelling(kind.value_type):
        codes, categories = _arrow_dictionary(column.unify_dictionaries())
        return Column(name, "categorical", codes, categories, "text")
    present = np.concatenate([np.empty(0, np.bool_), *map(_arrow_present, column.chunks)])
    return Column(name, "other", present, (), stored)


def _has_spelling(value_type: Any) -> bool:
    """Whether the values of a dictionary are text or plain numbers."""
    from pyarrow import types

    texts = (types.is_string, types.is_large_string, types.is_string_view)
    return any(is_it(value_type) for is_it in (*texts, types.is_integer, types.is_floating, types.is_boolean))


def _arrow_numpy(array: Any, dtype: type[np.generic]) -> Array:
    """The values of an Arrow array of that fixed width, no copy; what lies under nulls is arbitrary."""
    # not to_numpy: pyarrow imports pandas for it
    buffer = array.buffers()[1]
    if len(array) == 0 or buffer is None:
        return np.zeros(len(array), dtype)
    return np.frombuffer(buffer, dtype, len(array), array.offset * np.dtype(dtype).itemsize)


def _arrow_present(array: Any) -> npt.NDArray[np.bool_]:
    return _arrow_numpy(array.is_valid().cast("uint8"), np.uint8).astype(np.bool_)


def _arrow_floats(column: Any) -> npt.NDArray[np.float64]:
    out = np.empty(len(column), np.float64)
    start = 0
    for chunk in column.chunks:
        part = out[start : start + len(chunk)]
        part[:] = _arrow_numpy(chunk.cast("float64", safe=False), np.float64)
        if chunk.null_count:
            part[~_arrow_present(chunk)] = np.nan
        start += len(chunk)
    return out


def _arrow_codes(column: Any, lookup: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """lookup[0] where a dictionary column is null, else lookup[1 + index]."""
    out = np.empty(len(column), np.int32)
    start = 0
    for chunk in column.chunks:
        indices = _arrow_numpy(chunk.indices.cast("int64"), np.int64)
        if chunk.indices.null_count:
            indices = np.where(_arrow_present(chunk.indices), indices, -1)
        out[start : start + len(chunk)] = lookup[indices + 1]
        start += len(chunk)
    return out


def _arrow_dictionary(column: Any) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Codes and categories of a column that came as a dictionary; it may hold nulls and the same value twice."""
    values = column.chunk(0).dictionary.to_pylist() if column.num_chunks else []
    categories: dict[str, int] = {}
    lookup = np.full(len(values) + 1, -1, np.int32)
    for index, value in enumerate(values):
        if not _is_missing(value):
            lookup[index + 1] = categories.setdefault(_spell(value), len(categories))
    return _arrow_codes(column, lookup), tuple(categories)


def _spell(value: object) -> str:
    """A category as text, spelled as `Column.as_categorical` spells numbers."""
    if isinstance(value, (bool, int, float)) and float(value).is_integer():
        return str(int(value))
    return str(value)
