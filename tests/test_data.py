import gzip
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rvi_fast.data import SOURCES, artificial, digits, fashion_mnist, load_idx, load_table, mnist

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
    with pytest.raises(FileNotFoundError):
        load_idx(tmp_path / "absent")


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
