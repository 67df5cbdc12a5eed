"""Containers that are read by slices: what is read, in which order, how often, and what a fit makes of it."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rvi_fast import RVI, VAE, blocks, reference
from rvi_fast.blocks import BlockReader
from rvi_fast.data import ParquetRows
from rvi_fast.observations import Observations

SMALL = {"groups": (6,), "latent_dim": 4, "batch_size": 32, "epochs": 2, "progress": False}


class Slices:
    """shape, dtype and X[a:b] of an array, and nothing else; counts what is read."""

    def __init__(self, array, chunk_rows=None):
        self.array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, []
        if chunk_rows:
            self.chunks = (chunk_rows, array.shape[1])

    def __getitem__(self, rows):
        assert isinstance(rows, slice) and rows.step is None and 0 <= rows.start < rows.stop <= self.shape[0]
        self.reads.append((rows.start, rows.stop))
        return self.array[rows]


@pytest.fixture
def small_buffer(monkeypatch):
    """Blocks of 1 kB, four of them in the buffer."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(blocks, "BUFFER_BYTES", 4 << 10)


@pytest.fixture
def table():
    X = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
    X[np.random.default_rng(1).random(X.shape) < 0.3] = np.nan
    return X


def on_disk(kind, X, folder):
    path = folder / f"x.{kind}"
    if kind == "memmap":
        np.save(folder / "x.npy", X)
        return np.load(folder / "x.npy", mmap_mode="r")
    if kind == "h5py":
        return pytest.importorskip("h5py").File(path, "w").create_dataset("x", data=X)
    if kind == "zarr":
        array = pytest.importorskip("zarr").create_array(path, shape=X.shape, chunks=(32, X.shape[1]), dtype=X.dtype)
        array[:] = X
        return array
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({f"c{i}": c for i, c in enumerate(X.T)}), path, row_group_size=32)
    return ParquetRows(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reader_gives_what_indexing_gives(data):
    n, d = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 4))
    X = np.random.default_rng(0).integers(0, 99, (n, d)).astype(data.draw(st.sampled_from(["u1", "f4", ">f8", "?"])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", data.draw(st.integers(1, 200)))
        patch.setattr(blocks, "BUFFER_BYTES", data.draw(st.integers(200, 900)))
        reader = BlockReader(Slices(X, data.draw(st.sampled_from([None, 1, 7]))), "X")
    for _ in range(4):
        start = data.draw(st.integers(0, n))
        rows = slice(start, data.draw(st.integers(start, n + 3)))
        assert np.array_equal(reader[rows], X[rows])
        chosen = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=40)), dtype=np.int64)
        assert np.array_equal(reader[chosen], X[chosen]) and reader[chosen].dtype == reader.dtype
        assert len(reader._blocks) <= reader.capacity


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_block_permutation_shuffles_within_buffers_of_permuted_blocks(n, block_rows, buffer_blocks, epoch):
    order = reference.block_permutation(3, epoch, n, block_rows, buffer_blocks)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, reference.block_permutation(3, epoch, n, block_rows, buffer_blocks))
    seen = set()
    block_of = (order // block_rows).tolist()
    while block_of:  # each buffer: whole blocks, never met before nor again
        here = set(list(dict.fromkeys(block_of))[:buffer_blocks])
        size = sum(min(block_rows, n - b * block_rows) for b in here)
        assert set(block_of[:size]) == here and not here & seen
        seen |= here
        block_of = block_of[size:]
    if n <= block_rows * buffer_blocks:
        assert torch.equal(order, reference.permutation(3, epoch, n))


def test_block_permutation_depends_on_seed_and_epoch():
    order = reference.block_permutation(3, 0, 1000, 10, 4)
    assert not torch.equal(order, reference.block_permutation(3, 1, 1000, 10, 4))
    assert not torch.equal(order, reference.block_permutation(4, 0, 1000, 10, 4))
    first = order[:40] // 10
    assert len(first.unique()) == 4 and (first[1:] != first[:-1]).any(), "rows of a buffer are not mixed"


def test_an_epoch_reads_every_block_once(small_buffer, table):
    X = Slices(table)
    model = RVI(**SMALL | {"epochs": 1}).fit(X)
    data = Observations(X)
    block_rows, capacity = data.buffer
    assert (block_rows, capacity) == (32, 4)
    X.reads.clear()
    for rows in np.array_split(model._fitted_by.plan.order(0, 500), 17):  # batches across the borders of buffers
        values, observed = data.read(rows)
        assert np.array_equal(values, table[rows], equal_nan=True) and np.array_equal(observed, ~np.isnan(table[rows]))
    assert sorted(X.reads) == [(a, min(a + 32, 500)) for a in range(0, 500, 32)]


def test_every_read_of_a_fit_and_of_its_results_is_a_block(small_buffer, table):
    X, mask = Slices(np.nan_to_num(table)), Slices(~np.isnan(table))
    model = RVI(**SMALL).fit(X, mask, val_cells=0.2)
    model.impute(out=np.empty_like(table))
    model.score(X, mask)
    model.reconstruct()
    assert max(b - a for a, b in X.reads) == 32 and max(b - a for a, b in mask.reads) == 32


@pytest.mark.parametrize("kind", ["memmap", "h5py", "zarr", "parquet"])
def test_every_container_gives_the_same_model(tmp_path, table, monkeypatch, kind):
    X = on_disk(kind, table, tmp_path)
    whole = RVI(**SMALL).fit(table)
    assert np.array_equal(RVI(**SMALL).fit(X).impute(), whole.impute()), "what fits into the buffer is shuffled as ever"
    assert np.array_equal(whole.infer(X, steps=3).mean, whole.infer(table, steps=3).mean)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(blocks, "BUFFER_BYTES", 4 << 10)
    by_blocks = RVI(**SMALL).fit(Slices(table))
    model = RVI(**SMALL).fit(X)
    assert model._data.buffer == (32, 4)
    assert np.array_equal(model.impute(), by_blocks.impute()) and not np.array_equal(model.impute(), whole.impute())
    assert np.array_equal(model.score(), by_blocks.score())
    assert model.feature_names_in_ == ([f"c{i}" for i in range(8)] if kind == "parquet" else None)


def test_mask_on_disk_and_values_in_memory(small_buffer, table):
    filled, observed = np.nan_to_num(table), ~np.isnan(table)
    model = RVI(**SMALL).fit(filled, Slices(observed))
    assert model._data.buffer is None, "the mask, a byte a cell, fits into the buffer"
    assert np.array_equal(model.impute()[observed], table[observed])
    both = RVI(**SMALL).fit(Slices(filled), Slices(observed, chunk_rows=5))
    assert np.array_equal(both.impute(), RVI(**SMALL).fit(Slices(table)).impute())


def test_resume_keeps_the_order_and_needs_the_same_blocks(small_buffer, table, tmp_path, monkeypatch):
    whole = RVI(**SMALL).fit(Slices(table))
    stopped = RVI(**SMALL).fit(Slices(table), checkpoint_dir=tmp_path, callbacks=[lambda model, logs: True])
    assert stopped.n_steps_ == 16
    resumed = RVI(**SMALL).fit(Slices(table), checkpoint_dir=tmp_path, resume=True)
    assert resumed.n_steps_ == 32 and np.array_equal(resumed.impute(), whole.impute())
    monkeypatch.setattr(blocks, "BUFFER_BYTES", 2 << 10)
    with pytest.raises(ValueError, match=r"belongs to a fit with buffer \[32, 4\], not \[32, 2\]"):
        RVI(**SMALL).fit(Slices(table), checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize("kind", ["array", "memmap", "h5py", "zarr"])
def test_impute_writes_to_out(small_buffer, tmp_path, table, kind):
    model = RVI(**SMALL).fit(Slices(table))
    expected = model.impute()
    if kind == "array":
        out = np.zeros_like(table)
    elif kind == "memmap":
        out = np.lib.format.open_memmap(tmp_path / "o.npy", "w+", dtype="f4", shape=table.shape)
    elif kind == "h5py":
        out = pytest.importorskip("h5py").File(tmp_path / "o.h5", "w").create_dataset("o", table.shape, "f8")
    else:
        out = pytest.importorskip("zarr").create_array(tmp_path / "o", shape=table.shape, dtype="f4")
    assert model.impute(out=out) is out
    assert np.array_equal(out[:], expected)
    assert np.array_equal(model.impute(Slices(table), posterior=model.posterior_, out=np.zeros_like(table)), expected)
    with pytest.raises(TypeError, match="out goes with n_samples=None"):
        model.impute(n_samples=2, out=out)
    with pytest.raises(ValueError, match=r"out must be float32 \[500, 8\].* got float16 \[500, 8\]"):
        model.impute(out=np.zeros_like(table, dtype=np.float16))
    with pytest.raises(ValueError, match=r"got float32 \[500, 7\]"):
        model.impute(out=np.zeros((500, 7), np.float32))
    with pytest.raises(TypeError, match=r"out must be an array.* got list"):
        model.impute(out=[])


def test_vae_and_copies_of_a_model_fitted_on_an_open_file(small_buffer, tmp_path, table):
    X = on_disk("h5py", table, tmp_path)
    model = VAE(latent_dim=4, epochs=1, progress=False).fit(X)
    twin = copy.deepcopy(model)
    assert np.array_equal(twin.impute(X), model.impute())
    with pytest.raises(ValueError, match="pass X"):
        twin.impute()
    X.file.close()
    with pytest.raises(OSError, match=r"^X\[0:32\] cannot be read .*; is its file still open and whole\?"):
        model.impute()


def test_a_buffer_is_given_back_after_fit(small_buffer, table):
    model = RVI(**SMALL).fit(Slices(table))
    assert not any(reader._blocks for reader in model._data.readers)


def test_changes_to_a_memmap_survive(small_buffer, tmp_path):
    """Pages of a copy-on-write map hold what no file has; those of a shared one are in the file."""
    for mode in ("c", "r+"):
        np.save(tmp_path / "x.npy", np.ones((9000, 4), np.float32))
        X = np.load(tmp_path / "x.npy", mmap_mode=mode)
        X[:, 0] = np.arange(9000)
        view = X[100:]
        assert blocks.is_read_by_slices(view)
        assert np.array_equal(BlockReader(view, "X")[np.arange(8900)][:, 0], np.arange(100, 9000))
        assert np.array_equal(X[:, 0], np.arange(9000)) and (X[:, 1] == 1).all()


class Lies(Slices):
    """A container that gives something else than its shape and dtype say."""

    def __init__(self, give):
        super().__init__(np.zeros((5, 2), np.float32))
        self.give = give

    def __getitem__(self, rows):
        return self.give(self.array[rows])


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda a: a.astype(np.float64), r"X\[0:1\] must be an array of float32 \[1, 2\].* got float64 \[1, 2\]"),
        (lambda a: a[:, :1], r"got float32 \[1, 1\]"),
        (lambda a: np.ma.masked_equal(a, 0), "is a masked array; let it give NaN"),
        (lambda a: None, "got object"),
    ],
)
def test_containers_that_lie(give, message):
    with pytest.raises(TypeError, match=message):
        Observations(Lies(give))


def test_wrong_shapes_and_types_are_seen_before_anything_is_read():
    ok = Slices(np.zeros((5, 2), np.float32))
    for array, error, message in [
        (np.zeros(5), ValueError, r"X must have shape \[N, D\]; got \[5\]"),
        (np.zeros((5, 2, 2)), ValueError, r"got \[5, 2, 2\]; use reshape"),
        (np.zeros((0, 2)), ValueError, "at least one row"),
        (np.zeros((5, 2), "S3"), TypeError, r"got dtype \|S3"),
    ]:
        X = Slices(array)
        with pytest.raises(error, match=message):
            Observations(X)
        assert X.reads == []
    with pytest.raises(TypeError, match="mask must be bool, True = observed; got dtype uint8"):
        Observations(ok, Slices(np.ones((5, 2), np.uint8)))
    with pytest.raises(ValueError, match=r"mask must have X's shape \[5, 2\]; got \[4, 2\]"):
        Observations(ok, Slices(np.ones((4, 2), bool)))
    ok.shape = None
    with pytest.raises(TypeError, match="X must have a shape of ints"):
        Observations(ok)


def test_sparse_matrices_and_series_are_no_files():
    sparse = pytest.importorskip("scipy.sparse").eye(5)
    for X in (sparse.tocsr(), sparse.tocoo()):
        with pytest.raises(TypeError, match=r"got a sparse one; use X.toarray\(\)"):
            Observations(X)
    with pytest.raises(ValueError, match=r"X must have shape \[N, D\]; got \[2\]"):
        Observations(pytest.importorskip("pandas").Series([1, 2], dtype="Int64"))


def test_values_are_checked_in_blocks_with_their_place(small_buffer, table):
    table[400, 3] = np.inf
    with pytest.raises(ValueError, match=r"X\[400, 3\] is inf"):
        RVI(**SMALL).fit(Slices(table))


def test_chunks_beyond_the_buffer_are_named(small_buffer, table):
    with pytest.warns(UserWarning, match="X lies in chunks .* of 500 rows, more than the buffer"):
        reader = BlockReader(Slices(table, chunk_rows=500), "X")
    assert reader.block_rows * 32 <= blocks.BUFFER_BYTES and reader.capacity == 1
    assert BlockReader(Slices(table, chunk_rows=60), "X").block_rows == 60, "a chunk is never cut"
    assert BlockReader(Slices(table, chunk_rows=10), "X").block_rows == 30, "chunks are joined up to a block"
