import string
import sys
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvi_fast import files
from rvi_fast.files import ReadOptions, format_number, read


def written(tmp_path, content, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def kinds(table):
    return {column.name: column.kind for column in table.columns}


TEXTS = {
    "plain": "a,b\n1,x\n2,\n",
    "no newline at the end": "a,b\n1,x\n2,y",
    "crlf": "a,b\r\n1,x\r\n2,y\r\n",
    "byte order mark": "\ufeffa,b\n1,x\n2,y\n",
    "semicolons": "a;b\n1,5;x\n2,25;y\n",
    "unicode, duplicate and empty names": "größe,größe,,日本\n1,2,3,4\n5,,7,8\n",
    "quotes": '"a","b ""c"""\n"1","x, y"\n"","two\nlines"\n',
    "quotes where R puts them": '"a","name"\n1.50,"x, y"\nNA,"z"\n',
    "stray quotes and spaces": 'a,b\n 1,5" disk\n2 , y\n',
    "formats": "a,b\n1e5,+3\n-0.50,007\n.5,1.\n",
    "one column with a hole": "a\n1\n\n3\n",
    "blank cells": "a,b,c\n,,\n1,,\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_comes_back_byte_for_byte(tmp_path, text):
    path = written(tmp_path, text)
    read(path).write(tmp_path / "out.csv", {}, {})
    assert (tmp_path / "out.csv").read_bytes() == path.read_bytes()


cell = st.one_of(
    st.just(""),
    st.integers(-(10**6), 10**6).map(str),
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr),
    st.text(alphabet=string.ascii_letters + " éß日'#;", max_size=5).filter(lambda text: "inf" not in text.lower()),
    st.text(alphabet='ab,;\n\r"', max_size=5).map(lambda text: '"' + text.replace('"', '""') + '"'),
)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(1, 6), columns=st.integers(2, 5), ending=st.sampled_from(["\n", "\r\n"]))
def test_any_text_comes_back_byte_for_byte(tmp_path_factory, data, rows, columns, ending):
    lines = [[data.draw(cell) for _ in range(columns)] for _ in range(rows)]
    lines = [[f"c{i}" for i in range(columns)], *lines]
    path = written(tmp_path_factory.mktemp("text"), "".join(",".join(line) + ending for line in lines))
    table = read(path, ReadOptions(delimiter=","))
    assert table.num_rows == rows
    table.write(path.with_name("out.csv"), {}, {})
    assert path.with_name("out.csv").read_bytes() == path.read_bytes()


def test_kinds_of_text_columns(tmp_path):
    text = (
        ",whole,real,code,name,day,gone,mixed,flag\n"
        "r1,1,0.5,007,x,2024-01-31,,1,True\n"
        "r2,NA,-1.25,010,y,2024-02-01 10:00,nan,2,False\n"
        "r3,3,null,011,,31.12.2024,?,oops,True\n"
    )
    table = read(written(tmp_path, text))
    assert kinds(table) == {
        "": "index",
        "whole": "number",
        "real": "number",
        "code": "text",
        "name": "text",
        "day": "date",
        "gone": "empty",
        "mixed": "text",
        "flag": "text",
    }
    assert [table.columns[i].decimals for i in (1, 2)] == [0, 2]
    np.testing.assert_array_equal(table.matrix([1, 2]).to_numpy(), [[1, 0.5], [np.nan, -1.25], [3, np.nan]])
    assert table.columns[7].note == "row 3 holds 'oops', no number; if it means a hole: --missing=oops"
    assert list(table.row_labels()) == [("r1",), ("r2",), ("r3",)]


def test_holes_alone_are_written(tmp_path):
    text = '"id";"a";"b";c\n"x; y";1,50;"";1e3\nz;;"2";?\n'
    table = read(written(tmp_path, text), ReadOptions(index=("id",)))
    filled = {1: np.array([9, 2.123456789]), 2: np.array([-0.2, 9]), 3: np.array([9, 1234567.0])}
    table.write(tmp_path / "out.csv", filled, {1: 2, 2: 0, 3: None})
    assert (tmp_path / "out.csv").read_text() == '"id";"a";"b";c\n"x; y";1,50;"0";1e3\nz;2,12;"2";1,23457e+06\n'


def test_a_decimal_comma_between_commas_is_quoted(tmp_path):
    table = read(written(tmp_path, 'a,b\n"1,5",1\n,2\n'), ReadOptions(decimal=","))
    np.testing.assert_array_equal(table.numbers[0], [1.5, np.nan])
    table.write(tmp_path / "out.csv", {0: np.array([0, 2.5])}, {0: 1})
    assert (tmp_path / "out.csv").read_text() == 'a,b\n"1,5",1\n"2,5",2\n'


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (1.23456789, 3, "1.235"),
        (1.23456789, 17, "1.23457"),
        (123456789.4, 0, "123456789"),
        (123456.789, 3, "123457"),
        (0.000123456789, 9, "0.000123457"),
        (-0.2, 0, "0"),
        (0.0, 2, "0.00"),
        (2.0e-12, None, "2e-12"),
        (-1234567.0, None, "-1.23457e+06"),
    ],
)
def test_numbers_are_written_as_their_column_is(value, decimals, text):
    assert format_number(value, decimals) == text


def test_a_quote_that_is_never_closed_makes_no_number(tmp_path):
    table = read(written(tmp_path, 'a,b\n"1,2\n3,4\n5,6\n'))
    assert kinds(table) == {"a": "text", "b": "number"} and "row 1 holds '\"1'" in table.columns[0].note


def test_markers_count_as_text_and_as_numbers(tmp_path):
    table = read(written(tmp_path, "a,b\n-999,x\n-999.0,-\n7,y\n"), ReadOptions(missing=("-999", "-")))
    np.testing.assert_array_equal(table.numbers[0], [np.nan, np.nan, 7])
    np.save(tmp_path / "a.npy", np.array([[-999, 1], [2, 3]]))
    array = read(tmp_path / "a.npy", ReadOptions(missing=("-999",)))
    np.testing.assert_array_equal(array.observed, [[False, True], [True, True]])
    pq.write_table(pa.table({"a": [-999, 1]}), tmp_path / "a.parquet")
    np.testing.assert_array_equal(
        read(tmp_path / "a.parquet", ReadOptions(missing=("-999",))).numbers[0], [np.nan, 1.0]
    )


def test_options_of_the_reader(tmp_path):
    table = read(written(tmp_path, "1|2\n3|\n"), ReadOptions(delimiter="|", header=False))
    assert kinds(table) == {"0": "number", "1": "number"} and table.num_rows == 2
    table.write(tmp_path / "out.csv", {1: np.array([0.0, 4.0])}, {1: 0})
    assert (tmp_path / "out.csv").read_text() == "1|2\n3|4\n"
    assert "--no-header" in read(written(tmp_path, "1,2\n3,4\n")).note


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("a,b\n", "has a header but no rows"),
        ("a,b\n1,2\n3,4,5\n", "line 3 of .* has 3 cells, but the first line has 2"),
        ("a,b\n\n1,2\n3\n", "line 4 of .* has 1 cell, but the first line has 2"),
        ('a,b\n"1\n",2\n3\n', "line 4 of .* has 1 cell,"),
        ("a,b\n1,é\n".encode("latin-1"), r"is not UTF-8 \(byte 6 is 0xe9\); convert it"),
        ("a,b\n1,2\n".encode("utf-16"), "is not UTF-8 .* iconv -f UTF-16 -t UTF-8"),
        ('a,b\n"x,y",\ufdd0\n', r"holds U\+FDD0"),
        (b"a,b\n1,\0\n", "holds zero bytes"),
        ("a,b\n1,inf\n", "row 1 of column 'b' of .* holds 'inf'"),
        ("a,b\n1,2\n1,-1e999\n", "row 2 of column 'b' of .* holds '-1e999'"),
    ],
)
def test_bad_text_is_one_sentence(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(written(tmp_path, content))


def frame():
    rows = 6
    return pd.DataFrame(
        {
            "name": ["a", None, "c", "d", "e", "f"],
            "day": pd.date_range("2024-01-01", periods=rows),
            "small": np.array([1, 2, np.nan, 4, 5, 6], dtype=np.float32),
            "count": pd.array([1, None, 3, 4, 2**60 + 1, 6], dtype="Int64"),
            "byte": pd.array([1, None, 3, 4, 5, 250], dtype="UInt8"),
            "flag": pd.array([True, None, False, True, True, False], dtype="boolean"),
            "site": 7,
            "notes": np.full(rows, np.nan),
            "kind": pd.Categorical(["u", "v", "u", "v", "u", "v"]),
        },
        index=pd.Index([f"r{i}" for i in range(rows)], name="id"),
    )


def test_parquet_keeps_types_metadata_and_observed_cells(tmp_path):
    before = frame()
    before.to_parquet(tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet")
    assert kinds(table) == {
        "name": "text",
        "day": "date",
        "small": "number",
        "count": "number",
        "byte": "number",
        "flag": "number",
        "site": "number",
        "notes": "empty",
        "kind": "text",
        "id": "index",
    }
    filled = {2: np.full(6, 2.5), 3: np.full(6, 2.6), 4: np.full(6, 300.0), 5: np.full(6, 0.7), 6: np.full(6, 9.0)}
    table.write(tmp_path / "b.parquet", filled, {})
    after = pd.read_parquet(tmp_path / "b.parquet")
    expected = before.copy()
    expected.loc["r2", "small"] = 2.5
    expected.loc["r1", ["count", "byte", "flag"]] = [3, 255, True]
    pd.testing.assert_frame_equal(after, expected)
    assert after.loc["r4", "count"] == 2**60 + 1
    assert pq.read_schema(tmp_path / "a.parquet").equals(pq.read_schema(tmp_path / "b.parquet"), check_metadata=True)
    assert list(table.row_labels()) == list(before.index)


def test_parquet_of_other_writers(tmp_path):
    arrow = pa.table(
        [
            pa.array([1, None, 3], pa.int64()),
            pa.array([1.5, None, float("nan")], pa.float32()),
            pa.array([None, None, None]),
            pa.array([Decimal(1), None, Decimal(2)], pa.decimal128(10, 2)),
            pa.array([[1], [2], []]),
        ],
        names=["a", "a", "empty", "price", "list"],
    )
    pq.write_table(arrow, tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet")
    assert [column.kind for column in table.columns] == ["number", "number", "empty", "number", "text"]
    table.write(tmp_path / "b.parquet", {p: np.array([9, 2.256, 2.5]) for p in (0, 1, 3)}, {})
    after = pq.ParquetFile(tmp_path / "b.parquet").read()
    assert after.schema.equals(arrow.schema)
    assert after.column(0).to_pylist() == [1, 2, 3]
    assert after.column(1).to_pylist() == [1.5, np.float32(2.256), 2.5]
    assert [str(price) for price in after.column(3).to_pylist()] == ["1.00", "2.26", "2.00"]
    assert list(table.row_labels()) == [0, 1, 2]


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.date32(), pa.timestamp("s")])
def test_an_empty_column_of_another_type_takes_no_numbers(tmp_path, kind):
    pq.write_table(pa.table({"a": pa.array([None, None], kind), "b": [1.0, 2.0]}), tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet")
    assert kinds(table) == {"a": "empty", "b": "number"}
    with pytest.raises(ValueError, match=r"column 'a' is of type \S+, which cannot hold numbers; write it as float64"):
        table.write(tmp_path / "b.parquet", {0: np.ones(2)}, {})
    assert not (tmp_path / "b.parquet").exists()


def test_bad_parquet_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read(written(tmp_path, "a,b\n", "a.parquet"))
    pq.write_table(pa.table({"a": [1.5, None]}), tmp_path / "flipped.parquet")
    content = bytearray((tmp_path / "flipped.parquet").read_bytes())
    content[4:20] = bytes(0xFF ^ byte for byte in content[4:20])  # the head of the first page
    (tmp_path / "flipped.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*flipped.parquet cannot be read as parquet: [^\n]+$"):
        read(tmp_path / "flipped.parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        read(tmp_path / "empty.parquet")
    pq.write_table(pa.table({"a": [1.0, float("-inf")]}), tmp_path / "inf.parquet")
    with pytest.raises(ValueError, match=r"row 2 of column 'a' of .* is -inf"):
        read(tmp_path / "inf.parquet")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "bool", ">f4", "float64"])
def test_arrays_keep_shape_dtype_and_observed_cells(tmp_path, dtype):
    images = np.arange(24).reshape(2, 3, 4).astype(dtype)
    mask = np.random.default_rng(0).random(images.shape) < 0.5
    np.save(tmp_path / "a.npy", images)
    np.save(tmp_path / "mask.npy", mask)
    array = read(tmp_path / "a.npy", ReadOptions(mask=str(tmp_path / "mask.npy")))
    assert array.X.shape == (2, 12) and not array.observed.all()
    array.write(tmp_path / "b.npy", np.full((3, 2, 12), 0.7), ~array.observed)
    after = np.load(tmp_path / "b.npy")
    assert after.shape == (3, 2, 3, 4) and after.dtype == images.dtype
    np.testing.assert_array_equal(after[:, mask], np.broadcast_to(images[mask], (3, mask.sum())))
    assert (after[:, ~mask] == (images.dtype.type(0.7) if images.dtype.kind == "f" else 1)).all()


def test_integers_are_rounded_and_kept_in_range():
    values = np.array([-3.0, 0.5, 1.5, 1e30])
    np.testing.assert_array_equal(files.as_dtype(values, np.dtype(np.uint8)), [0, 0, 2, 255])
    assert files.as_dtype(values, np.dtype(np.int64))[-1] > 2**62


def test_npz_keeps_its_other_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.eye(2), x=np.array([[1.0, np.nan], [3.0, 4.0]]))
    assert read(tmp_path / "a.npz").key == "other"
    array = read(tmp_path / "a.npz", ReadOptions(key="x"))
    array.write(tmp_path / "b.npz", np.full((2, 2), 9.0), ~array.observed)
    after = np.load(tmp_path / "b.npz")
    assert after.files == ["other", "x"]
    np.testing.assert_array_equal(after["x"], [[1, 9], [3, 4]])
    np.testing.assert_array_equal(after["other"], np.eye(2))


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_no_pickle_is_loaded(tmp_path):
    trap = np.array([Trap()], dtype=object)
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    np.savez(tmp_path / "a.npz", x=trap)
    (tmp_path / "b.npy").write_bytes(b"\x80\x04N.")
    for name in ("a.npy", "a.npz", "b.npy"):
        with pytest.raises(ValueError, match="Python objects"):
            read(tmp_path / name)
    np.save(tmp_path / "x.npy", np.eye(2))
    with pytest.raises(ValueError, match="Python objects"):
        read(tmp_path / "x.npy", ReadOptions(mask=str(tmp_path / "a.npy")))


def test_bad_arrays_are_one_sentence(tmp_path):
    np.save(tmp_path / "vector.npy", np.arange(3.0))
    np.save(tmp_path / "x.npy", np.eye(3))
    np.save(tmp_path / "complex.npy", np.eye(3) * 1j)
    np.savez(tmp_path / "a.npz", x=np.eye(2))
    np.savez(tmp_path / "none.npz")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-9])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-9])
    (tmp_path / "not.npz").write_bytes((tmp_path / "x.npy").read_bytes())
    for name, options, sentence in [
        ("vector.npy", {}, r"has shape \[3\]; it must be"),
        ("complex.npy", {}, "holds complex128"),
        ("cut.npy", {}, "is damaged"),
        ("cut.npz", {}, "is damaged"),
        ("not.npz", {}, "no npz file"),
        ("none.npz", {}, "has no array; it has none"),
        ("a.npz", {"key": "y"}, "has no array 'y'; it has x"),
        ("x.npy", {"mask": str(tmp_path / "vector.npy")}, r"must be a bool array of shape \[3, 3\].* got float64 of"),
        ("x.npy", {"key": "y"}, "--key has no meaning for x.npy"),
        ("x.npy", {"index": ("y",)}, "--index has no meaning for x.npy"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            read(tmp_path / name, ReadOptions(**options))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(ValueError, match="of no known kind; give a file that ends in"):
        read(written(tmp_path, "a,b\n", "a.xls"))
    with pytest.raises(ValueError, match=r"'z' is no column of .*; it has 'a', 'b'"):
        read(written(tmp_path, "a,b\n1,2\n"), ReadOptions(index=("z",)))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = written(tmp_path, "old")

    def fail():
        with files.replacing(path) as part:
            part.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"table.csv cannot be written: No space left on device; nothing was changed"):
        fail()
    with pytest.raises(OSError, match="the disk may be full"), files.replacing(path):
        raise OSError("9 requested and 4 written")  # what numpy says
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas; run pip install 'rvi_fast\[files\]'"):
        read(written(tmp_path, "a,b\n1,2\n"))
