"""Tables from every kind of source, and the design matrices made from them."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpugrad.data import Column, Preprocessor, Table, read_table, train_test_split
from gpugrad.errors import DataError

ROOT = Path(__file__).parents[1]


def refused(call, *args, **kwargs) -> str:
    """The message of the DataError that the call must raise; every one is short and hides its causes."""
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2
    assert len(message) < 600
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def words(table: Table, name: str) -> list[str | None]:
    """A categorical column as text."""
    column = table[name]
    assert column.kind == "categorical"
    assert column.values.dtype == np.int32
    return [None if code < 0 else column.categories[code] for code in column.values]


def same(left: Table, right: Table) -> None:
    assert left.names == right.names
    for name in left.names:
        assert left[name].kind == right[name].kind
        if left[name].kind == "categorical":
            assert words(left, name) == words(right, name)
        else:
            np.testing.assert_array_equal(left[name].values, right[name].values)


SMALL = {
    "size": np.array([1.0, np.nan, 3.0, 5.0]),
    "count": np.array([4, 5, 6, 7]),
    "kind": np.array(["b", "a", "b", "c"]),
    "yes": np.array([True, False, True, True]),
}
SMALL_CSV = "size,count,kind,yes\n1,4,b,true\n,5,a,false\n3,6,b,true\n5,7,c,true\n"


def small_arrow():
    pa = pytest.importorskip("pyarrow")
    return pa.table({"size": [1.0, None, 3.0, 5.0], "count": [4, 5, 6, 7], "kind": list("babc"), "yes": SMALL["yes"]})


@pytest.fixture
def small(tmp_path) -> dict[str, Path]:
    """The small table in every file format."""
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = {suffix: tmp_path / f"small.{suffix}" for suffix in ("parquet", "pq", "csv", "tsv", "npz")}
    parquet.write_table(small_arrow(), paths["parquet"])
    parquet.write_table(small_arrow(), paths["pq"])
    paths["csv"].write_text(SMALL_CSV)
    paths["tsv"].write_text(SMALL_CSV.replace(",", "\t"))
    np.savez(paths["npz"], **SMALL)
    return paths


# --- the table ------------------------------------------------------------------------------------------


def test_a_table_tells_its_columns():
    table = read_table(SMALL)
    assert table.names == tuple(table) == ("size", "count", "kind", "yes")
    assert table.rows == len(table) == 4
    assert [table[name].kind for name in table] == ["numeric", "numeric", "categorical", "numeric"]
    assert table["count"].values.dtype == np.float64
    np.testing.assert_array_equal(table["size"].values, SMALL["size"])
    np.testing.assert_array_equal(table["size"].missing, [False, True, False, False])
    assert words(table, "kind") == ["b", "a", "b", "c"]
    assert "kind" in table
    assert "nothing" not in table
    assert "kind: categorical" in repr(table)


def test_a_table_cannot_be_changed():
    source = {"x": np.arange(3.0), "y": np.arange(3.0)}
    table = read_table(source)
    source["x"][0] = 99
    assert table["x"].values[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        table["x"].values[0] = 1
    with pytest.raises(AttributeError):
        table.rows = 7
    with pytest.raises(AttributeError):
        table["x"].name = "z"


def test_a_column_leaves_its_array_writable():
    values = np.arange(3.0)
    assert not Column("a", "numeric", values).values.flags.writeable
    values[0] = 1


def test_take_and_select():
    table = read_table(SMALL)
    part = table.take([3, 0, 0]).select(["kind", "count"])
    assert part.names == ("kind", "count")
    assert words(part, "kind") == ["c", "b", "b"]
    np.testing.assert_array_equal(part["count"].values, [7, 4, 4])
    np.testing.assert_array_equal(table.take(np.array([True, False, False, True]))["count"].values, [4, 7])
    assert table.take([]).rows == 0
    same(pickle.loads(pickle.dumps(table)), table)


@pytest.mark.parametrize("rows", [[4], [-1], [0.5], [[0]], [True], 0])
def test_take_refuses_rows_that_are_not_there(rows):
    assert "from 0 to 3" in refused(read_table(SMALL).take, rows)


def test_an_unknown_column_is_named_with_a_guess():
    table = read_table(SMALL)
    message = refused(table.__getitem__, "knd")
    assert "'knd'" in message
    assert "did you mean 'kind'?" in message
    assert "size, count, kind, yes" in message
    assert "columns 'p', 'q'" in refused(table.select, ["kind", "p", "q"])


def test_columns_of_two_lengths_or_one_name_are_refused():
    short, long = (Column(name, "numeric", np.zeros(n)) for name, n in (("a", 2), ("b", 3)))
    assert "'b' has 3 rows, 'a' has 2" in refused(Table, [short, long])
    assert "two columns called 'a'" in refused(Table, [short, short])
    assert "no columns" in refused(Table, [])


# --- sources in memory ----------------------------------------------------------------------------------


def test_a_table_passes_through():
    table = read_table(SMALL)
    assert read_table(table) is table


@pytest.mark.parametrize("suffix", ["parquet", "pq", "csv", "tsv", "npz"])
def test_every_file_format_gives_the_same_table(small, suffix):
    same(read_table(small[suffix]), read_table(SMALL))
    same(read_table(str(small[suffix])), read_table(SMALL))
    same(read_table(os.fsencode(small[suffix]).decode()), read_table(SMALL))


def test_arrow_tables_and_batches():
    same(read_table(small_arrow()), read_table(SMALL))
    same(read_table(small_arrow().to_batches()[0]), read_table(SMALL))


def test_pandas_frames():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(SMALL)
    same(read_table(frame), read_table(SMALL))
    # the index of a filtered frame holds row numbers, which are no input
    assert read_table(frame.iloc[[2, 0, 1]]).names == ("size", "count", "kind", "yes")
    kinds = read_table(pd.DataFrame({"c": pd.Categorical([10, 2, None]), "n": pd.array([1, None, 3], dtype="Int64")}))
    assert words(kinds, "c") == ["10", "2", None]
    np.testing.assert_array_equal(kinds["n"].values, [1, np.nan, 3])


def test_a_parquet_file_of_a_filtered_pandas_frame_has_no_index_column(tmp_path):
    pd = pytest.importorskip("pandas")
    pd.DataFrame(SMALL).iloc[[2, 0, 1]].to_parquet(tmp_path / "part.parquet")
    assert read_table(tmp_path / "part.parquet").names == ("size", "count", "kind", "yes")


def test_arrow_types():
    pa = pytest.importorskip("pyarrow")
    from decimal import Decimal

    table = pa.table(
        {
            "f16": pa.array(np.array([1, 2, 3], np.float16)),
            "f32": pa.array([1, None, 3], pa.float32()),
            "u8": pa.array([1, None, 255], pa.uint8()),
            "i64": pa.array([1, 2, 2**40], pa.int64()),
            "dec": pa.array([Decimal("1.5"), None, Decimal("2.5")]),
            "nan": pa.array([1.0, float("nan"), None]),
            "null": pa.nulls(3),
            "bool": pa.array([True, None, False]),
            "text": pa.array(["a", None, "b"]),
            "large": pa.array(["a", None, "b"], pa.large_string()),
            "view": pa.array(["a", None, "b"], pa.string_view()),
            "dict": pa.DictionaryArray.from_arrays(pa.array([2, None, 1], pa.int8()), pa.array(["z", "b", "a"])),
            "odd": pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), pa.array(["a", None, "a"])),
            "gap": pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), pa.array([None, "a", "b"])),
            "ints": pa.DictionaryArray.from_arrays(pa.array([0, 1, 1]), pa.array([7, 8])),
            "time": pa.array([0, None, 5], pa.timestamp("s")),
            "list": pa.array([[1], None, [2]]),
        }
    )
    got = read_table(table)
    nan = np.nan
    wanted = {
        "f16": [1, 2, 3],
        "f32": [1, nan, 3],
        "u8": [1, nan, 255],
        "i64": [1, 2, 2**40],
        "dec": [1.5, nan, 2.5],
        "nan": [1, nan, nan],
        "null": [nan, nan, nan],
        "bool": [1, nan, 0],
    }
    for name, values in wanted.items():
        assert got[name].kind == "numeric", name
        np.testing.assert_array_equal(got[name].values, values, err_msg=name)
    for name in ("text", "large", "view"):
        assert words(got, name) == ["a", None, "b"], name
    assert words(got, "dict") == ["a", None, "b"]
    assert words(got, "odd") == ["a", None, "a"]
    assert words(got, "gap") == [None, "a", "b"]
    assert words(got, "ints") == ["7", "8", "8"]
    for name in ("time", "list"):
        assert got[name].kind == "other", name
        np.testing.assert_array_equal(got[name].missing, [False, True, False])


def test_arrow_chunks_and_slices():
    """Chunks with dictionaries of their own, and slices that begin inside a byte of the validity bitmap."""
    pa = pytest.importorskip("pyarrow")
    numbers = [None if i % 7 == 3 else float(i) for i in range(40)]
    text = [None if i % 5 == 1 else f"t{i % 11}" for i in range(40)]
    flags = [None if i % 6 == 2 else i % 3 == 0 for i in range(40)]
    whole = pa.table({"n": numbers, "t": text, "d": pa.array(text).dictionary_encode(), "b": flags})
    parts = [whole.slice(3, 10), whole.slice(13, 0), whole.slice(13, 5), whole.slice(18, 21)]
    separate = [
        part.set_column(2, "d", pa.array(part["t"].to_pylist(), pa.string()).dictionary_encode()) for part in parts
    ]
    got = read_table(pa.concat_tables(separate))
    np.testing.assert_array_equal(got["n"].values, np.array(numbers[3:39], float))
    np.testing.assert_array_equal(got["b"].values, np.array(flags[3:39], float))
    assert words(got, "t") == words(got, "d") == text[3:39]


def test_arrays():
    table = read_table(np.arange(6, dtype=np.int16).reshape(3, 2))
    assert table.names == ("x0", "x1")
    np.testing.assert_array_equal(table["x1"].values, [1, 3, 5])
    assert read_table(np.arange(3)).names == ("x0",)
    record = read_table(np.array([(1, "p"), (2, "q")], [("u", "i4"), ("v", "U1")]))
    assert record.names == ("u", "v")
    assert words(record, "v") == ["p", "q"]
    masked = read_table(np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], [[0, 1], [0, 0]]))
    np.testing.assert_array_equal(masked["x1"].values, [np.nan, 4])
    pair = read_table({"X": np.zeros((2, 2)), "y": [1, 2]})
    assert pair.names == ("X0", "X1", "y")


def test_object_columns_and_their_missing_entries():
    pd = pytest.importorskip("pandas")
    table = read_table(
        {
            "text": np.array(["x", None, float("nan"), ""], object),
            "numbers": np.array([1, None, 2.5, True], object),
            "nothing": [None, None, None, None],
            "nullable": pd.array([1, None, 3, 4], dtype="Int64"),
            "strings": np.array(["u", "v", "u", "w"], np.dtypes.StringDType()),
            "days": np.array(["2013-01-01", "NaT", "2013-01-02", "2013-01-02"], "datetime64[D]"),
            "stamps": np.array([pd.Timestamp(0), pd.NaT, None, pd.Timestamp(1)], object),
        }
    )
    assert words(table, "text") == ["x", None, None, ""]
    np.testing.assert_array_equal(table["numbers"].values, [1, np.nan, 2.5, 1])
    assert np.isnan(table["nothing"].values).all()
    np.testing.assert_array_equal(table["nullable"].values, [1, np.nan, 3, 4])
    assert words(table, "strings") == ["u", "v", "u", "w"]
    assert table["days"].kind == table["stamps"].kind == "other"
    np.testing.assert_array_equal(table["days"].missing, [False, True, False, False])
    np.testing.assert_array_equal(table["stamps"].missing, [False, True, True, False])


class OnADevice:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("implicit conversion to a NumPy array is not allowed")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "cannot read a table from int"),
        ([[1, 2]], "cannot read a table from list"),
        (None, "cannot read a table from NoneType"),
        ({}, "no columns"),
        ({"a": []}, "no rows"),
        ({"a": 3}, r"shape \(\)"),
        ({"a": [1, 2], "b": [1]}, "'b' has 1 rows, 'a' has 2"),
        ({"a": np.array([1, "x"], object)}, "'a' mixes int, str"),
        ({"a": [[1, 2], [3]]}, "'a': list is no NumPy array"),
        ({"a": np.ones(2, complex)}, "'a' is of type complex128"),
        ({"a": np.array([b"x"])}, "'a' is of type .S1"),
        (np.ones((2, 2, 2)), r"shape \(2, 2, 2\)"),
        (np.float64(1), r"shape \(\)"),
        (np.empty((0, 2)), "no rows"),
        (OnADevice(), "OnADevice is no NumPy array"),
    ],
)
def test_what_is_no_table_is_refused(source, message):
    with pytest.raises(DataError, match=message):
        read_table(source)
    refused(read_table, source)


def test_frames_that_are_no_table_are_refused():
    pd = pytest.importorskip("pandas")
    assert "the Series is no table" in refused(read_table, pd.Series([1, 2]))
    assert "one type" in refused(read_table, pd.DataFrame({"m": [1, "x"]}))
    assert "no rows" in refused(read_table, pd.DataFrame({"m": [1.0]}).iloc[:0])
    assert "no columns" in refused(read_table, pd.DataFrame())


# --- files ----------------------------------------------------------------------------------------------


def test_csv_details(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeff, id , text,n,\n0,1,"p, q",NA,\n1,2,"two\nlines",1e3,\n2,3,NA, 5,\n', encoding="utf-8")
    table = read_table(path)
    # columns without a name are row numbers of pandas or a comma at the end
    assert table.names == ("id", "text", "n")
    assert words(table, "text") == ["p, q", "two\nlines", None]
    np.testing.assert_array_equal(table["n"].values, [np.nan, 1000, 5])
    path.write_text("a;b\n1;x\n")
    assert read_table(path).names == ("a", "b")


def test_lines_within_quotes_in_a_csv_longer_than_one_block(tmp_path):
    """Blocks are read side by side: none may begin inside a quoted value."""
    path = tmp_path / "long.csv"
    quoted = "word,\n" * 2000
    path.write_text("a,b\n" + f'1,"{quoted}"\n' * 300)
    table = read_table(path)
    assert table.rows == 300
    assert table["b"].categories == (quoted,)


def test_a_folder_that_looks_like_a_partition_adds_no_column(small, tmp_path):
    folder = tmp_path / "year=2013"
    folder.mkdir()
    small["parquet"].rename(folder / "a.parquet")
    assert read_table(folder / "a.parquet").names == ("size", "count", "kind", "yes")


def test_npy_files(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6.0).reshape(3, 2))
    assert read_table(tmp_path / "a.npy").names == ("x0", "x1")
    np.save(tmp_path / "b.npy", np.array([(1, 2.5)], [("u", "i4"), ("v", "f8")]))
    assert read_table(tmp_path / "b.npy").names == ("u", "v")


BROKEN_TEXT = {
    "empty.csv": (b"", "empty"),
    "blank.csv": (b"\n \n", "empty"),
    "header.csv": (b"a,b\n", "no rows"),
    "ragged.csv": (b"a,b,c\n1,2,3\n4,5\n", "line 3 has 2 fields, the header 3: '4,5'"),
    "quote.csv": (b'a,b\n1,2\n"3,4\n', "malformed"),
    "latin1.csv": ("a,b\ncaf\xe9,1\n".encode("latin1"), "'a' is not UTF-8"),
    "latin1-header.csv": ("caf\xe9,b\n1,1\n".encode("latin1"), "header is not UTF-8"),
    "utf16.csv": ("a,b\n1,2\n".encode("utf-16"), "UTF-8"),
    "twice.csv": (b"a,a\n1,2\n", "two columns called 'a'"),
    "unnamed.csv": (b",\n1,2\n", "no columns"),
    "page.csv": (b"<!DOCTYPE html><html></html>", "HTML"),
    "zip.csv": (b"PK\x03\x04....", "npz or zip data"),
    "gzip.csv": (b"\x1f\x8b....", "gzip data"),
    "empty.parquet": (b"", "empty"),
    "text.parquet": (b"a,b\n1,2\n", "its name says Parquet"),
    "short.parquet": (b"PAR1", "truncated"),
    "empty.npz": (b"", "empty"),
    "text.npz": (b"a,b\n1,2\n", "its name says npz"),
    "short.npz": (b"PK\x03\x04", "truncated"),
    "empty.npy": (b"", "empty"),
    "text.npy": (b"1 2 3", "its name says npy"),
    "short.npy": (b"\x93NUMPY", "truncated"),
    "book.xlsx": (b"PK\x03\x04", ".xlsx; wanted .parquet"),
    "noname": (b"a,b\n1,2\n", "without suffix"),
}


@pytest.mark.parametrize("name", BROKEN_TEXT)
def test_a_broken_file_gives_one_clear_message(tmp_path, name):
    content, expected = BROKEN_TEXT[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(read_table, path)
    assert expected in message
    assert str(path) in message


@pytest.mark.parametrize("suffix", ["parquet", "npz", "npy"])
def test_a_file_cut_anywhere_is_refused(small, tmp_path, suffix):
    if suffix == "npy":
        small["npy"] = tmp_path / "small.npy"
        np.save(small["npy"], np.arange(8.0))
    content = small[suffix].read_bytes()
    for length in range(0, len(content), max(1, len(content) // 40)):
        small[suffix].write_bytes(content[:length])
        assert str(small[suffix]) in refused(read_table, small[suffix])


def test_a_damaged_page_is_noticed(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path = tmp_path / "a.parquet"
    table = pa.table({"a": np.random.default_rng(0).normal(size=1000)})
    parquet.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    assert "damaged" in refused(read_table, path)
    np.savez(tmp_path / "a.npz", a=np.zeros(1000))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[4000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    assert "damaged" in refused(read_table, tmp_path / "a.npz")


def test_text_in_parquet_that_is_not_utf8(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": ["abcdefgh"]}), path, compression="none", write_statistics=False)
    content = path.read_bytes()
    assert content.count(b"abcdefgh") == 1
    path.write_bytes(content.replace(b"abcdefgh", b"abc\xff\xfefgh"))
    assert "not UTF-8" in refused(read_table, path)


def test_paths_that_are_no_file(tmp_path):
    assert "no such file" in refused(read_table, tmp_path / "nothing.csv")
    assert "is a folder" in refused(read_table, tmp_path)
    (tmp_path / "a.csv").write_text("a\n1\n")
    (tmp_path / "a.csv").chmod(0)
    if not os.access(tmp_path / "a.csv", os.R_OK):
        assert "cannot be opened" in refused(read_table, tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_pickles_are_never_loaded(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    save = np.save if name.endswith("npy") else np.savez
    save(tmp_path / name, np.array([Bomb()], object))
    assert "never loaded" in refused(read_table, tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_arrays_in_npz_that_are_no_columns(tmp_path):
    import zipfile

    np.savez(tmp_path / "a.npz", a=np.arange(3), b=np.arange(4))
    assert "'b' has 4 rows, 'a' has 3" in refused(read_table, tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", a=np.float64(3))
    assert "shape ()" in refused(read_table, tmp_path / "b.npz")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not an .npz" in refused(read_table, tmp_path / "c.npz")


def in_a_new_interpreter(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reading_files_imports_no_more_than_it_needs(small):
    for name, wanted in (("npz", "[]"), ("csv", "['pyarrow']"), ("parquet", "['pyarrow']")):
        code = (
            "import sys; import gpugrad.data as d; heavy = ('pyarrow', 'pandas', 'matplotlib', 'sklearn');"
            f"assert not any(m in sys.modules for m in heavy); d.read_table({str(small[name])!r});"
            "print([m for m in heavy if m in sys.modules])"
        )
        assert in_a_new_interpreter(code) == wanted


def test_without_pyarrow_the_remedy_is_named(small, monkeypatch):
    frame = small_arrow()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source in (small["csv"], small["parquet"], frame):
        assert 'pip install "gpugrad[data]"' in refused(read_table, source)
    same(read_table(small["npz"]), read_table(SMALL))


# --- design matrices ------------------------------------------------------------------------------------


def test_a_design_matrix_by_hand():
    table = read_table(
        {
            "num": [2.0, np.nan, 4.0, 6.0, 100.0],
            "cat": np.array(["b", "a", None, "b", "z"], object),
            "month": [10, 9, 9, 10, 1],
            "flag": [True, False, True, False, True],
            "same": [7.1] * 5,
            "y": [1.0, 2.0, 3.0, 4.0, np.nan],
        }
    )
    fitted = Preprocessor.fit(table, "y", categorical=["month"])
    design = fitted.transform(table)
    assert fitted.feature_names == [
        "num",
        "num is missing",
        "cat=a",
        "cat=b",
        "cat is missing",
        "month=9",
        "month=10",
        "flag",
        "same",
    ]
    scale = np.sqrt(8 / 4)  # (4 + 0 + 0 + 4) / 4 once the mean 4 stands in for the missing value
    wanted = [
        [-2 / scale, 0, 0, 1, 0, 0, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 0, -1, 0],
        [0, 0, 0, 0, 1, 1, 0, 1, 0],
        [2 / scale, 0, 0, 1, 0, 0, 1, -1, 0],
    ]
    np.testing.assert_array_equal(design.X, np.array(wanted, np.float32))
    assert design.X.dtype == design.y.dtype == np.float32
    assert design.X.flags.c_contiguous
    np.testing.assert_array_equal(design.y, [1, 2, 3, 4])
    np.testing.assert_array_equal(design.kept, [0, 1, 2, 3])
    assert design.kept.dtype == np.int64
    assert design.dropped == 1
    assert design.unknown == {}
    assert design.notes == ["dropped 1 of 5 rows: the target is missing"]
    # the row without a target taught nothing: neither its 100 nor its "z" nor its month
    assert fitted.means == {"num": 4.0, "flag": 0.5, "same": 7.1}
    assert fitted.scales == {"num": scale, "flag": 0.5, "same": 1.0}
    assert fitted.categories == {"cat": ("a", "b"), "month": ("9", "10")}
    assert fitted.numeric == ("num", "flag", "same")
    assert fitted.categorical == ("cat", "month")
    assert fitted.inputs == ("num", "cat", "month", "flag", "same")


def test_prediction_keeps_every_row_and_counts_unknown_categories():
    train = read_table({"cat": ["a", "b"], "num": [0.0, 2.0], "y": [0.0, 1.0]})
    fitted = Preprocessor.fit(train, "y")
    table = read_table({"num": [np.nan, 1.0, 4.0, 1.0], "cat": np.array(["b", "new", None, "new"], object)})
    design = fitted.transform(table, with_target=False)
    np.testing.assert_array_equal(design.X, [[0, 1, 0], [0, 0, 0], [0, 0, 3], [0, 0, 0]])
    assert design.y is None
    assert design.dropped == 0
    np.testing.assert_array_equal(design.kept, np.arange(4))
    assert design.unknown == {"cat": {"new": 2}}
    assert design.notes == [
        "column 'cat': 2 rows hold categories not seen in training, encoded as zeros: 'new'",
        "column 'num': 1 missing, though none was in training; the mean stands in",
    ]
    assert fitted.transform(table.take([]), with_target=False).X.shape == (0, 3)


def test_an_unknown_category_is_not_a_missing_one():
    text = np.array(["z", "a", None], object)
    fitted = Preprocessor.fit(read_table({"c": text, "m": [2, 1, np.nan], "y": [1, 2, 3]}), "y", categorical=["m"])
    assert fitted.feature_names == ["c=a", "c=z", "c is missing", "m=1", "m=2", "m is missing"]
    table = read_table({"c": np.array(["new", None], object), "m": [7, np.nan]})
    design = fitted.transform(table, with_target=False)
    np.testing.assert_array_equal(design.X, [[0] * 6, [0, 0, 1, 0, 0, 1]])
    assert design.unknown == {"c": {"new": 1}, "m": {"7": 1}}


def test_categories_do_not_depend_on_the_order_of_rows():
    pa = pytest.importorskip("pyarrow")
    for text in (["q", "p", "r"], ["r", "q", "p"]):
        fitted = Preprocessor.fit(read_table(pa.table({"c": text, "y": [1, 2, 3]})), "y")
        assert fitted.categories == {"c": ("p", "q", "r")}


def test_unknown_categories_of_dropped_rows_are_not_counted():
    fitted = Preprocessor.fit(read_table({"c": ["a", "b"], "y": [0.0, 1.0]}), "y")
    table = read_table({"c": ["new", "new", "a"], "y": [np.nan, 1.0, 2.0]})
    assert fitted.transform(table).unknown == {"c": {"new": 1}}
    assert fitted.transform(table.take([0, 2])).unknown == {}


def test_labels_match_however_they_are_stored():
    """A label column may be integers in one file, floats with gaps or text in another."""
    fitted = Preprocessor.fit(read_table({"m": [1, 2, 10], "y": [0.0, 1.0, 2.0]}), "y", categorical="m")
    assert fitted.categories == {"m": ("1", "2", "10")}
    for labels in ([10.0, 1.0], np.array(["10", "1"]), np.array([10, 1], np.uint8)):
        np.testing.assert_array_equal(
            fitted.transform(read_table({"m": labels}), with_target=False).X, [[0, 0, 1], [1, 0, 0]]
        )
    design = fitted.transform(read_table({"m": [np.nan, 2.5]}), with_target=False)
    assert not design.X.any()
    assert design.unknown == {"m": {"2.5": 1}}


def test_a_column_without_a_value_may_come_as_any_type():
    fitted = Preprocessor.fit(read_table({"n": [1.0, np.nan, 3.0], "c": ["a", "b", "b"], "y": [1, 2, 3]}), "y")
    nothing = Column("n", "categorical", np.full(2, -1, np.int32))
    design = fitted.transform(Table([nothing, read_table({"c": [None, None]})["c"]]), with_target=False)
    np.testing.assert_array_equal(design.X, [[0, 1, 0, 0]] * 2)


def test_features_drop_and_categorical_choose_the_inputs():
    table = read_table({"a": [1, 2], "b": ["p", "q"], "c": [0.5, 1.5], "y": [1, 2]})
    fit = Preprocessor.fit
    assert fit(table, "y").inputs == ("a", "b", "c")
    assert fit(table, "y", drop=["a"]).inputs == ("b", "c")
    assert fit(table, "y", drop="a").inputs == ("b", "c")
    assert fit(table, "y", features=["c", "a"]).inputs == ("c", "a")
    assert fit(table, "y", features=["c", "a"], drop=["c"]).inputs == ("a",)
    # labels that are not among the features do no harm: a data set names them all
    assert fit(table, "y", features=["c"], categorical=["a"]).categorical == ()
    assert fit(table, "y", categorical=["a", "b"]).categorical == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "yy"}, "no column 'yy'; did you mean 'y'?"),
        ({"features": ["a", "zzz"]}, "no column 'zzz'"),
        ({"drop": ["zzz"]}, "no column 'zzz'"),
        ({"categorical": ["zzz"]}, "no column 'zzz'"),
        ({"features": ["a", "y"]}, "'y' cannot be an input too"),
        ({"drop": ["y"]}, "'y' cannot be dropped too"),
        ({"categorical": ["y"]}, "'y' cannot be categorical too"),
        ({"features": ["a", "a"]}, "'a' is named twice"),
        ({"features": []}, "leaves no input"),
        ({"drop": ["a", "b", "when", "gone"]}, "leaves no input"),
        ({"features": ["when"]}, "'when' is of type datetime64[s], which has no encoding"),
        ({"features": ["gone"]}, "'gone' has no value where the target is present"),
        ({"target": "b"}, "'b' is not numeric (text, e.g. 'p' in row 0)"),
        ({"target": "when"}, "'when' is not numeric (datetime64[s])"),
        ({"target": "gone"}, "'gone' has only missing values (3 rows)"),
    ],
)
def test_fit_refuses(arguments, message):
    table = read_table(
        {
            "a": [1, 2, 3],
            "b": ["p", "q", "r"],
            "when": np.array([0, 1, 2], "datetime64[s]"),
            "gone": [np.nan] * 3,
            "y": [1, 2, 3],
        }
    )
    assert message in refused(lambda: Preprocessor.fit(table, **{"target": "y"} | arguments))


def test_columns_left_out_are_told():
    table = read_table(
        {"a": [1.0, 2.0], "when": np.array([0, 1], "datetime64[s]"), "gone": [np.nan, np.nan], "y": [1, 2]}
    )
    fitted = Preprocessor.fit(table, "y")
    assert fitted.inputs == ("a",)
    assert list(fitted.skipped) == ["when", "gone"]
    assert "datetime64[s]" in fitted.skipped["when"]
    assert "no value" in fitted.skipped["gone"]
    assert Preprocessor.fit(table, "y", drop=["when", "gone"]).skipped == {}


def test_identifiers_are_refused():
    rows = 1001
    table = read_table({"id": [f"t{i}" for i in range(rows)], "n": np.arange(rows), "y": np.arange(rows)})
    message = refused(Preprocessor.fit, table, "y")
    assert "'id' is categorical with 1,001 distinct values" in message
    assert "drop it" in message
    assert "'n' is categorical" in refused(Preprocessor.fit, table, "y", drop=["id"], categorical=["n"])
    fewer = Preprocessor.fit(table.take(np.arange(1000)), "y", drop=["n"])
    assert len(fewer.feature_names) == 1000


def test_numbers_spoilt_by_one_text_are_pointed_out():
    values = [str(i / 8) for i in range(1500)]
    values[700] = "n.a."
    table = read_table({"x": values, "y": np.arange(1500)})
    assert "because of 'n.a.' in row 700" in refused(Preprocessor.fit, table, "y")
    assert "e.g. 'n.a.' in row 700" in refused(Preprocessor.fit, table, "x")
    fitted = Preprocessor.fit(read_table({"x": np.arange(1500.0), "y": np.arange(1500)}), "y")
    assert "'x' (text, e.g. 'n.a.' in row 700; wanted numeric)" in refused(fitted.transform, table)


def test_transform_names_every_column_that_is_missing_or_of_the_wrong_type():
    fitted = Preprocessor.fit(read_table({"a": [1.0, 2.0], "b": ["p", "q"], "c": [1, 2], "y": [1, 2]}), "y")
    assert fitted.missing_columns(read_table({"b": ["p"], "z": [1]})) == ["a", "c"]
    assert fitted.missing_columns(read_table({"a": [1], "b": ["p"], "c": [1]})) == []
    assert "columns 'a', 'c'" in refused(fitted.transform, read_table({"b": ["p"], "z": [1]}), with_target=False)
    wrong = read_table({"a": ["x"], "b": np.array([0], "datetime64[s]"), "c": [1], "y": [1]})
    message = refused(fitted.transform, wrong)
    assert "'a' (text, e.g. 'x' in row 0; wanted numeric)" in message
    assert "'b' (datetime64[s]; wanted categorical)" in message
    without = read_table({"a": [1.0], "b": ["p"], "c": [1]})
    assert "no column 'y'" in refused(fitted.transform, without)
    assert fitted.transform(without, with_target=False).X.shape == (1, 4)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("name", ["x", "label", "y"])
def test_infinite_values_are_named_with_their_row(name, value):
    good = {"x": [1.0, 2.0, 3.0, 4.0], "label": [1.0, 2.0, 1.0, 2.0], "y": [np.nan, 2.0, 3.0, 4.0]}
    bad = {key: list(values) for key, values in good.items()}
    bad[name][2:] = [value, value]
    fitted = Preprocessor.fit(read_table(good), "y", categorical=["label"])
    if name == "label" and np.isfinite(value):
        assert fitted.transform(read_table(bad)).unknown == {"label": {str(int(value)): 2}}
        return
    expected = f"column {name!r} holds {value!r} in row 2"
    assert expected in refused(Preprocessor.fit, read_table(bad), "y", categorical=["label"])
    assert expected in refused(fitted.transform, read_table(bad))


@pytest.mark.parametrize("first", [1.0, np.nan])
def test_a_value_too_large_is_named_by_its_row_in_any_block(first):
    fitted = Preprocessor.fit(read_table({"x": [1.0, 2.0], "y": [1, 2]}), "y")
    x, y = np.ones(10_000), np.ones(10_000)
    x[8500:], y[0] = 1e200, first
    assert "'x' holds 1e+200 in row 8500" in refused(fitted.transform, read_table({"x": x, "y": y}))


def test_extremes_that_fit_are_encoded():
    table = read_table({"tiny": [1e-200, 2e-200], "big": [1e100, -1e100], "near": [1e9, 1e9 + 1], "y": [1, 2]})
    design = Preprocessor.fit(table, "y").transform(table)
    np.testing.assert_allclose(design.X[:, 1:], [[1, -1], [-1, 1]], rtol=1e-6)
    assert np.isfinite(design.X).all()


def test_a_constant_is_encoded_as_zeros_whatever_its_rounding():
    table = read_table({"c": np.full(1000, 0.1), "d": 0.1 + 1e-17 * (np.arange(1000) % 9), "y": np.arange(1000.0)})
    fitted = Preprocessor.fit(table, "y")
    assert fitted.scales == {"c": 1.0, "d": 1.0}
    assert np.abs(fitted.transform(table).X).max() < 1e-15


def random_table(seed: int, rows: int) -> Table:
    rng = np.random.default_rng(seed)
    number = rng.normal(3, 10, (rows, 2))
    number[rng.random(rows) < 0.2, 1] = np.nan
    letters = rng.choice(np.array(["p", "q", "r", "s"]), rows).astype(object)
    letters[rng.random(rows) < 0.1] = None
    target = rng.normal(size=rows)
    target[rng.random(rows) < 0.15] = np.nan
    target[0] = 1
    return read_table(
        {"n": number[:, 0], "gap": number[:, 1], "c": letters, "hour": rng.integers(0, 24, rows), "y": target}
    )


def test_blocks_do_not_show():
    """More rows than one block, with and without dropped ones: the same as row by row."""
    table = random_table(0, 9001)
    fitted = Preprocessor.fit(table, "y", categorical=["hour"])
    whole = fitted.transform(table)
    np.testing.assert_array_equal(whole.kept, np.flatnonzero(~np.isnan(table["y"].values)))
    np.testing.assert_array_equal(whole.y, table["y"].values[whole.kept].astype(np.float32))
    for rows in ([0], np.arange(4090, 4110), np.arange(7600, 7610)):
        part = fitted.transform(table.take(whole.kept[rows]))
        np.testing.assert_array_equal(part.X, whole.X[rows])
    np.testing.assert_array_equal(fitted.transform(table, with_target=False).X[whole.kept], whole.X)


def test_the_same_as_scikit_learn():
    compose = pytest.importorskip("sklearn.compose")
    impute = pytest.importorskip("sklearn.impute")
    pipeline = pytest.importorskip("sklearn.pipeline")
    scaling = pytest.importorskip("sklearn.preprocessing")
    pd = pytest.importorskip("pandas")

    table = random_table(1, 3000)
    ours = Preprocessor.fit(table, "y", features=["n", "gap", "hour", "c"], categorical=["hour"])
    design = ours.transform(table)
    frame = pd.DataFrame({name: table[name].values for name in ("n", "gap", "hour")}).assign(
        c=np.array([text or "~" for text in words(table, "c")])
    )
    theirs = compose.ColumnTransformer(
        [
            ("n", scaling.StandardScaler(), ["n"]),
            ("gap", pipeline.make_pipeline(impute.SimpleImputer(), scaling.StandardScaler()), ["gap"]),
            ("gap is missing", impute.MissingIndicator(), ["gap"]),
            ("labels", scaling.OneHotEncoder(sparse_output=False), ["hour", "c"]),
        ]
    )
    np.testing.assert_allclose(design.X, theirs.fit_transform(frame.iloc[design.kept]), rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_a_fitted_encoding_standardises_and_is_one_hot(seed, rows):
    table = random_table(seed, rows)
    fitted = Preprocessor.fit(table, "y", categorical=["hour"])
    design = fitted.transform(table)
    X = design.X.astype(float)
    names = fitted.feature_names
    assert X.shape == (len(design.kept), len(names))
    assert design.dropped + len(design.kept) == rows
    assert design.unknown == {}
    assert np.isfinite(X).all()
    for name in fitted.numeric:
        column = X[:, names.index(name)]
        assert abs(column.mean()) < 1e-5
        assert np.isclose(column.std(), 1, atol=1e-4) or not column.any()
    for name in fitted.categorical:
        group = X[:, [j for j, text in enumerate(names) if text.startswith((f"{name}=", f"{name} is"))]]
        np.testing.assert_array_equal(group.sum(1), 1)
        assert set(np.unique(group)) <= {0.0, 1.0}
        assert (group.sum(0) > 0).all()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-1e100, 1e100) | st.just(float("nan")), st.text(max_size=4) | st.none(), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_any_preprocessor_survives_json_exactly(rows):
    number, text, flag = zip(*rows, strict=True)
    table = read_table(
        {"x": number, "t": np.array(text, object), "flag": flag, "k": np.arange(len(rows)), "y": np.ones(len(rows))}
    )
    fitted = Preprocessor.fit(table, "y", categorical=["flag"])
    again = Preprocessor.from_json(fitted.to_json())
    assert again == fitted
    assert again.to_json() == fitted.to_json()
    assert json.loads(fitted.to_json())["format"] == 1
    np.testing.assert_array_equal(again.transform(table).X, fitted.transform(table).X)


def test_what_is_no_stored_preprocessor_is_refused():
    table = read_table({"x": [1.0, 2.0], "c": ["a", "b"], "y": [1, 2]})
    good = json.loads(Preprocessor.fit(table, "y").to_json())
    for text in ("", "{", "[]", "3", "{}", "null", json.dumps(good | {"columns": 3}), json.dumps(good | {"target": 1})):
        assert "no stored preprocessing" in refused(Preprocessor.from_json, text)
    for changed in ({"kind": "x"}, {"scale": 0.0}, {"scale": "1"}, {"mean": None}, {"indicator": 1}, {"name": 1}):
        columns = [good["columns"][0] | changed, good["columns"][1]]
        assert "no stored preprocessing" in refused(Preprocessor.from_json, json.dumps(good | {"columns": columns}))
    categories = [good["columns"][0], good["columns"][1] | {"categories": [1]}]
    assert "no stored" in refused(Preprocessor.from_json, json.dumps(good | {"columns": categories}))
    assert "format 2" in refused(Preprocessor.from_json, json.dumps(good | {"format": 2}))


# --- train and test -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 500), st.floats(0.001, 0.999), st.integers(0, 2**32))
def test_a_split_is_a_partition(rows, fraction, seed):
    train, test = train_test_split(rows, fraction, seed)
    assert train.dtype == test.dtype == np.int64
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(rows))
    assert len(test) == min(max(round(rows * fraction), 1), rows - 1)
    again = train_test_split(rows, fraction, seed)
    np.testing.assert_array_equal(again[0], train)
    np.testing.assert_array_equal(again[1], test)


def test_another_seed_is_another_split():
    train, test = train_test_split(1000, 0.2, 0)
    assert (len(train), len(test)) == (800, 200)
    assert set(test) != set(train_test_split(1000, 0.2, 1)[1])
    # shuffled, not only cut
    assert (np.diff(train) < 0).any()
    assert 400 < test.mean() < 600


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1, 0.2, 0), "rows"),
        ((10.0, 0.2, 0), "rows"),
        ((True, 0.2, 0), "rows"),
        ((10, 0, 0), "test_fraction"),
        ((10, 1.0, 0), "test_fraction"),
        ((10, float("nan"), 0), "test_fraction"),
        ((10, "0.2", 0), "test_fraction"),
        ((10, True, 0), "test_fraction"),
        ((10, 0.2, -1), "seed"),
        ((10, 0.2, 0.5), "seed"),
        ((10, 0.2, None), "seed"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(arguments, name):
    assert f"{name} came as" in refused(train_test_split, *arguments)


def test_values_missing_only_later_are_reported():
    train = read_table({"x": np.arange(5.0), "y": np.arange(5.0)})
    fitted = Preprocessor.fit(train, "y")
    design = fitted.transform(read_table({"x": np.array([1.0, np.nan, np.nan]), "y": np.ones(3)}))
    assert design.imputed == {"x": 2}
    assert any("'x': 2 missing, though none was in training" in note for note in design.notes)
    assert not design.X[1:, 0].any()
