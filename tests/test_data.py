import gzip
import inspect
import os
import pickle
import struct
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rvi_fast.data import (
    SOURCES,
    ParquetRows,
    artificial,
    digits,
    fashion_mnist,
    load_idx,
    load_table,
    mnist,
    mosi,
)

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, CODES[array.dtype.str[1:]], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """No variable set and a working folder without data/."""
    monkeypatch.delenv("RVI_FAST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def write_test_split(folder, pixel):
    folder.mkdir(parents=True)
    images, labels = np.full((10_000, 28, 28), pixel, np.uint8), np.arange(10_000).astype(np.uint8) % 10
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(CODES)), st.booleans())
def test_load_idx_reads_back_every_dtype(tmp_path_factory, data, code, zipped):
    array = data.draw(arrays(np.dtype(code), array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
    path = tmp_path_factory.mktemp("idx") / "array"
    path.write_bytes(gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array))
    loaded = load_idx(path)
    assert loaded.dtype == array.dtype and loaded.dtype.isnative and loaded.flags.writeable
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "f8"])
def test_load_idx_refuses_every_truncation_and_any_excess(tmp_path, dtype, zipped):
    whole = idx_bytes(np.arange(6, dtype=dtype).reshape(2, 3))
    path = tmp_path / "array"
    for content in [*(whole[:n] for n in range(len(whole))), whole + b"\0"]:
        path.write_bytes(gzip.compress(content) if zipped else content)
        with pytest.raises(ValueError, match=r"not an idx file|truncated|should hold"):
            load_idx(path)


def test_load_idx_refuses_damaged_gzip(tmp_path):
    path = tmp_path / "array.gz"
    whole = gzip.compress(idx_bytes(np.arange(200, dtype="f8")))
    no_such_block = whole[:10] + b"\xff" + whole[11:]
    wrong_checksum = whole[:-8] + b"\0\0\0\0" + whole[-4:]
    for content in (whole[:10], whole[:-5], no_such_block, wrong_checksum):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or truncated gzip"):
            load_idx(path)


def test_load_idx_refuses_foreign_files(tmp_path):
    path = tmp_path / "foreign"
    for content in (b"", b"PK\x03\x04....", b"\x00\x00\x0a\x01\x00\x00\x00\x00", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="foreign is not an idx file"):
            load_idx(path)
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{absent} is not a file; give the path of an idx file"):
            load_idx(absent)
    with pytest.raises(TypeError, match=r"path must be a str or a pathlib.Path; got None"):
        load_idx(None)


@pytest.mark.parametrize(
    ("load", "layout", "foreign"),
    [
        (mnist, "mnist", "fashion-mnist"),
        (mnist, "MNIST/raw", "FashionMNIST/raw"),
        (fashion_mnist, "fashion-mnist", "mnist"),
        (fashion_mnist, "FashionMNIST/raw", "MNIST/raw"),
    ],
)
def test_image_search_order(no_data, monkeypatch, tmp_path, load, layout, foreign):
    write_test_split(tmp_path / "data" / layout, 1)
    images, labels = load("test")
    assert images.shape == (10_000, 784) and images.dtype == np.uint8 and images.max() == 1
    assert labels.dtype == np.int64 and labels[:3].tolist() == [0, 1, 2]
    write_test_split(tmp_path / "variable" / layout, 2)
    write_test_split(tmp_path / "variable" / foreign, 99)
    monkeypatch.setenv("RVI_FAST_DATA", str(tmp_path / "variable"))
    assert load("test")[0].max() == 2
    write_test_split(tmp_path / "explicit" / layout, 3)
    assert load("test", tmp_path / "explicit")[0].max() == 3
    assert load("test", tmp_path / "explicit" / layout)[0].max() == 3
    with pytest.raises(FileNotFoundError):
        load("test", tmp_path / "elsewhere")


@pytest.mark.parametrize(("load", "name"), [(mnist, "MNIST"), (fashion_mnist, "Fashion-MNIST")])
def test_absent_images_say_how_to_get_them(no_data, tmp_path, load, name):
    with pytest.raises(FileNotFoundError, match=rf"^{name} \(train\) needs .*RVI_FAST_DATA.*download=True"):
        load(root=tmp_path)
    with pytest.raises(ValueError, match="split must be"):
        load("validation")


def test_images_of_another_shape(no_data, tmp_path):
    for stem, array in (("images-idx3", np.zeros((5, 28, 28), np.uint8)), ("labels-idx1", np.zeros(5, np.uint8))):
        (tmp_path / f"train-{stem}-ubyte").write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=r"should be uint8 of shape \(60000, 28, 28\), got uint8 of \(5, 28, 28\)"):
        mnist(root=tmp_path)


@pytest.mark.parametrize(("load", "mean"), [(mnist, 0.13066), (fashion_mnist, 0.28604)])
def test_real_images(load, mean):
    try:
        images, labels = load("train")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert images.shape == (60_000, 784) and labels.shape == (60_000,)
    assert images.mean() / 255 == pytest.approx(mean, abs=1e-5)
    assert np.unique(labels).tolist() == list(range(10))


def test_every_place_that_was_searched_is_named(no_data, monkeypatch, tmp_path):
    monkeypatch.setenv("RVI_FAST_DATA", str(tmp_path / "variable"))
    with pytest.raises(FileNotFoundError) as caught:
        fashion_mnist()
    places = [str(tmp_path / "variable/fashion-mnist"), str(tmp_path / "variable/FashionMNIST/raw"), "data/fashion"]
    places += ["data/FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"]
    found = [str(caught.value).index(place) for place in places]
    assert found == sorted(found)


class RunsCode:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def mosi_pickle(folder, sizes=(4, 2, 3), mask=True):
    """aligned_50.pkl in small: T = 5 steps, of which some are padding; widths 3, 2, 1."""
    rng, splits = np.random.default_rng(0), {}
    for name, n in zip(("train", "valid", "test"), sizes, strict=True):
        part = {key: rng.normal(size=(n, 5, d)) for key, d in (("text", 3), ("audio", 2), ("vision", 1))}
        part["text_bert"] = np.ones((n, 3, 5), np.float32)
        part["text_bert"][:, 1, 3:] = 0  # BERT's features of padding are not zero
        part["audio"][:, :2] = 0
        part["audio"][0, 4, 1] = -np.inf
        part["vision"][1] = 0  # no face in the whole segment
        part |= {"regression_labels": rng.normal(size=n), "id": [f"{name}$_${i}" for i in range(n)], "raw_text": ["hi"]}
        if not mask:
            del part["text_bert"]
        splits[name] = part
    (folder / "aligned_50.pkl").write_bytes(pickle.dumps(splits))
    return splits


def converted(folder, monkeypatch):
    """The .npz that the lines in the docstring make."""
    lines = inspect.getdoc(mosi).partition("import pickle")
    code = textwrap.dedent("    import pickle" + lines[2].partition("Raises")[0])
    assert code.strip() in (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(folder)
    exec(code, {})
    return folder / "aligned_50.npz"


def test_mosi_is_the_mean_over_steps_with_data(tmp_path, monkeypatch):
    splits = mosi_pickle(tmp_path)
    path = converted(tmp_path, monkeypatch)
    X, labels, ids = mosi(path)
    assert X.shape == (9, 6) and X.dtype == labels.dtype == np.float32
    assert ids == [f"{s}$_${i}" for s, n in (("train", 4), ("valid", 2), ("test", 3)) for i in range(n)]
    X, labels, ids = mosi(path, "train")
    part = splits["train"]
    np.testing.assert_array_equal(labels, part["regression_labels"].astype(np.float32))
    np.testing.assert_allclose(X[:, :3], part["text"][:, :3].mean(1), rtol=1e-5)
    np.testing.assert_allclose(X[1:, 3:5], part["audio"][1:, 2:].mean(1), rtol=1e-5)
    np.testing.assert_allclose(X[0, 3:5], [part["audio"][0, 2:, 0].mean(), part["audio"][0, 2:4, 1].mean()], rtol=1e-5)
    np.testing.assert_allclose(X[[0, 2, 3], 5], part["vision"][[0, 2, 3], :, 0].mean(1), rtol=1e-5)
    assert np.isnan(X[1, 5]) and np.isnan(X).sum() == 1


def test_mosi_flattened_has_every_step(tmp_path, monkeypatch):
    part = mosi_pickle(tmp_path, mask=False)["test"]
    X, _, _ = mosi(converted(tmp_path, monkeypatch), "test", flatten=True)
    assert X.shape == (3, 5 * (3 + 2 + 1))
    np.testing.assert_array_equal(X[:, :15], part["text"].reshape(3, -1).astype(np.float32))
    assert np.isnan(X[:, 15:19]).all() and np.isnan(X[1, 25:]).all() and np.isnan(X[0, 24])


def test_mosi_runs_no_code_of_a_file(tmp_path):
    mark = tmp_path / "ran"
    evil = pickle.dumps({"train": RunsCode(mark)})
    for name in ("aligned_50.pkl", "aligned_50.pickle", "aligned_50.npz", "aligned_50"):
        (tmp_path / name).write_bytes(evil)
        with pytest.raises(ValueError, match=r"is a pickle.*help\(rvi_fast.data.mosi\)|not a whole .npz"):
            mosi(tmp_path / name)
    keys = {f"train/{key}": np.zeros((1, 5, 2)) for key in ("text", "audio", "vision")}
    objects = np.array([RunsCode(mark)], dtype=object)
    np.savez(tmp_path / "objects.npz", **keys | {"train/id": objects, "train/regression_labels": np.zeros(1)})
    with pytest.raises(ValueError, match=r"objects.npz is damaged or holds Python objects"):
        mosi(tmp_path / "objects.npz", "train")
    assert not mark.exists()


def test_mosi_names_what_is_wrong(tmp_path, monkeypatch):
    splits = mosi_pickle(tmp_path)
    path = converted(tmp_path, monkeypatch)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 997):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.npz is not a whole .npz"):
            mosi(tmp_path / "cut.npz")
    flipped = bytearray(whole)
    flipped[whole.index(splits["valid"]["text"].tobytes())] ^= 0xFF  # zip has checksums of the data, not of all headers
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"flipped.npz is damaged"):
        mosi(tmp_path / "flipped.npz")
    arrays = dict(np.load(path))
    np.savez(tmp_path / "lacks.npz", **{key: a for key, a in arrays.items() if key != "valid/audio"})
    with pytest.raises(ValueError, match="lacks valid/audio"):
        mosi(tmp_path / "lacks.npz")
    np.savez(tmp_path / "shapes.npz", **arrays | {"test/audio": np.zeros((3, 5))})
    with pytest.raises(ValueError, match=r"shapes.npz does not hold what.*test has arrays of shapes.*\(3, 5\)"):
        mosi(tmp_path / "shapes.npz")
    with pytest.raises(FileNotFoundError, match=r"absent.npz is not a file"):
        mosi(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="split must be None or one of 'train', 'valid', 'test'; got 'dev'"):
        mosi(path, "dev")


def write_csd(path, sequences):
    with pytest.importorskip("h5py").File(path, "w") as file:
        file.create_group("CMU_MOSI_X/metadata")
        for key, (features, intervals) in sequences.items():
            file[f"CMU_MOSI_X/data/{key}/features"] = np.asarray(features)
            file[f"CMU_MOSI_X/data/{key}/intervals"] = np.asarray(intervals, dtype=float).reshape(len(features), 2)


def test_mosi_from_csd_files(tmp_path):
    paths = {name: tmp_path / f"{name}.csd" for name in ("labels", "text", "audio")}
    write_csd(paths["labels"], {"a": ([[1.5], [-2.0]], [[0, 2], [2, 4]]), "b": ([[0.5]], [[0, 1]])})
    write_csd(paths["text"], {"a": (np.arange(8.0).reshape(4, 2) + 1, [[0, 1], [1, 2], [2, 3], [3, 5]])})
    write_csd(paths["audio"], {"a": ([[-np.inf], [4.0]], [[0, 1], [1, 3]]), "b": ([[0.0]], [[0, 1]])})
    X, labels, ids = mosi(paths)
    assert ids == ["a[0]", "a[1]", "b[0]"] and labels.tolist() == [1.5, -2.0, 0.5]
    nan = np.nan
    np.testing.assert_array_equal(X, np.float32([[2, 3, 4], [6, 7, 4], [nan, nan, nan]]))
    X, _, _ = mosi(paths, flatten=True)
    np.testing.assert_array_equal(X[:2], np.float32([[1, 2, 3, 4, nan, 4], [5, 6, 7, 8, 4, nan]]))
    with pytest.raises(ValueError, match=r"split has no meaning for .csd files"):
        mosi(paths, "train")
    with pytest.raises(ValueError, match=r"must name the .csd files of labels and of a modality or more; got text"):
        mosi({"text": paths["text"]})
    with pytest.raises(FileNotFoundError, match=r"absent.csd is not a file"):
        mosi(paths | {"vision": tmp_path / "absent.csd"})
    for content, message in [(b"", "not a whole .csd"), (paths["text"].read_bytes()[:3000], "not a whole .csd")]:
        (tmp_path / "bad.csd").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            mosi(paths | {"vision": tmp_path / "bad.csd"})
    write_csd(tmp_path / "words.csd", {"a": ([[b"hello"]], [[0, 1]])})
    with pytest.raises(ValueError, match="word vectors rather than words"):
        mosi(paths | {"text": tmp_path / "words.csd"})


def parquet_file(path, columns, **options):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path, **options)
    return path


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_parquet_rows_are_those_of_pandas(tmp_path_factory, data):
    pd = pytest.importorskip("pandas")
    n, rng = data.draw(st.integers(1, 40)), np.random.default_rng(0)
    frame = pd.DataFrame({"f": rng.normal(size=n), "i": rng.integers(0, 9, n), "b": rng.random(n) < 0.5})
    frame["holes"] = pd.array([None if hole else 2**53 for hole in rng.random(n) < 0.4], dtype="Int64")
    path = tmp_path_factory.mktemp("parquet") / "x.parquet"
    pytest.importorskip("pyarrow")
    frame.to_parquet(path, row_group_size=data.draw(st.integers(1, 50)))
    rows = ParquetRows(path)
    expected = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    assert rows.shape == (n, 4) and rows.dtype == np.float64 and rows.columns == ["f", "i", "b", "holes"]
    for _ in range(5):
        start = data.draw(st.integers(0, n))
        part = slice(start, data.draw(st.integers(start, n + 2)))
        np.testing.assert_array_equal(rows[part], expected[part])


def test_parquet_rows_keep_float32_and_choose_columns(tmp_path):
    X = np.arange(12, dtype=np.float32).reshape(6, 2)
    path = parquet_file(tmp_path / "x.parquet", {"b.c": X[:, 0], "a": X[:, 1], "when": ["now"] * 6}, row_group_size=4)
    rows = ParquetRows(path, columns=["a", "b.c"])
    assert rows.dtype == np.float32 and rows.chunks == (4, 2)
    np.testing.assert_array_equal(rows[1:5], X[1:5, ::-1])
    with pytest.raises(ValueError, match=r"column 'when' of .* holds string; pass columns with numeric ones only"):
        ParquetRows(path)
    with pytest.raises(ValueError, match=r"column 'x' of .* is not there; it has 'b.c', 'a', 'when'"):
        ParquetRows(path, columns=["x"])
    with pytest.raises(ValueError, match=r"column 'a' of .* is there twice"):
        ParquetRows(path, columns=["a", "a"])
    with pytest.raises(ValueError, match="slices of step 1; got step -1"):
        rows[::-1]


def test_parquet_files_that_cannot_be_read(tmp_path):
    path = parquet_file(tmp_path / "x.parquet", {"a": [2**53 + 1]})
    with pytest.raises(ValueError, match=r"column 'a' of .* does not go into float64 exactly"):
        ParquetRows(path)[0:1]
    whole = path.read_bytes()
    for content in (b"", b"a,b\n1,2\n", whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.parquet is not a whole parquet file"):
            ParquetRows(path)
    for absent in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="give the path of one parquet file"):
            ParquetRows(absent)


@pytest.mark.parametrize(
    ("module", "call"), [("pyarrow", ParquetRows), ("h5py", lambda p: mosi({"labels": p, "a": p}))]
)
def test_missing_libraries_are_named(monkeypatch, tmp_path, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {module}; run pip install {module}"):
        call(tmp_path / "x")


def test_digits():
    pytest.importorskip("sklearn")
    X, labels = digits()
    assert X.shape == (1797, 64) and X.dtype == np.float32
    assert X.min() == 0.0 and X.max() == 1.0 and not np.any(X * 16 % 1)
    assert labels.dtype == np.int64 and np.unique(labels).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "shape"), [("breast_cancer", (569, 30)), ("diabetes", (442, 10)), ("iris", (150, 4)), ("wine", (178, 13))]
)
def test_load_table(name, shape):
    pytest.importorskip("sklearn")
    X, features = load_table(name)
    assert X.shape == shape and X.dtype == np.float64 and np.isfinite(X).all()
    assert len(set(features)) == shape[1] and all(type(feature) is str for feature in features)


def test_load_table_unknown_name():
    with pytest.raises(ValueError, match="name must be breast_cancer"):
        load_table("boston")  # type: ignore[arg-type]


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    with pytest.raises(ImportError, match=r"rvi_fast\[sklearn\]"):
        digits()


def test_there_are_ten_sources_and_their_moments_are_right():
    assert len(SOURCES) == 10
    for k, (name, source) in enumerate(SOURCES.items()):
        s = (source.draw(np.random.default_rng(k), 200_000) - source.mean) / source.std
        assert abs(s.mean()) < 0.012, name
        assert abs(s.var() - 1.0) < 0.05, name


def test_artificial_is_linear_and_shares_its_mixing_between_splits():
    train, test = artificial(500, 40), artificial(300, 40, split="test")
    assert train.shape == (500, 40) and test.shape == (300, 40) and train.dtype == np.float32
    _, singular, directions = np.linalg.svd(train, full_matrices=False)
    assert singular[9] > 1.0 > 1e-3 > singular[10]
    outside = test - test @ directions[:10].T @ directions[:10]
    assert np.abs(outside).max() < 1e-4
    assert np.abs(test[:300] - train[:300]).mean() > 0.1
    _, _, other = np.linalg.svd(artificial(500, 40, seed=1), full_matrices=False)
    assert np.abs(test - test @ other[:10].T @ other[:10]).max() > 0.1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 60), st.integers(1, 30), st.sampled_from([None, "tanh", "sigmoid", "relu"]), st.integers(0, 9))
def test_artificial_rows_and_columns_do_not_depend_on_how_many(n, dim, nonlinearity, seed):
    whole = artificial(60, 30, nonlinearity=nonlinearity, seed=seed)
    part = artificial(n, dim, nonlinearity=nonlinearity, seed=seed)
    np.testing.assert_allclose(part, whole[:n, :dim], rtol=1e-6, atol=1e-7)


def test_artificial_nonlinearity_follows_the_mixing():
    linear = artificial(50, 20, n_sources=25, seed=3)
    np.testing.assert_allclose(
        artificial(50, 20, n_sources=25, nonlinearity="tanh", seed=3), np.tanh(linear), atol=1e-6
    )
    relu = artificial(50, 20, n_sources=25, nonlinearity="relu", seed=3)
    np.testing.assert_allclose(relu, np.maximum(linear, 0), atol=1e-6)
    assert np.linalg.matrix_rank(linear) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"n_sources": 0}, "n_sources must be at least 1"),
        ({"nonlinearity": "cube"}, "nonlinearity must be None"),
        ({"split": "validation"}, "split must be"),
    ],
)
def test_artificial_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        artificial(**{"n": 5, "dim": 3} | arguments)
