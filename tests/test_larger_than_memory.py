"""Resident memory of fit and impute on files larger than the memory allowed, as the kernel counts it."""

import subprocess
import sys

import numpy as np
import pytest

# VmHWM counts the pages of mapped files too, so a memmap must give back what it has read.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")

SCRIPT = """
import sys, warnings
import numpy as np
from rvi_fast import VAD, blocks

kind, path, filled, buffer_mib, steps = sys.argv[1:]
blocks.BUFFER_BYTES = int(buffer_mib) << 20

def opened():
    if kind == "memmap":
        return np.load(path, mmap_mode="r")
    if kind == "h5py":
        import h5py
        return h5py.File(path)["x"]
    if kind == "zarr":
        import zarr
        return zarr.open_array(path, mode="r")
    from rvi_fast.data import ParquetRows
    return ParquetRows(path)

def peak_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

X = opened()
model = VAD(latent_dim=2, batch_size=256, epochs=1, progress=False)  # small rows: the file is what is measured
small = np.random.default_rng(0).random((2048, X.shape[1]), dtype=np.float32)
small[small < 0.1] = np.nan
X[:1]
model.fit(small, val_cells=0.01).impute()  # what the libraries, and any fit of so many columns, take
before = peak_mib()
model.fit(X, max_steps=int(steps), val_cells=0.01)
out = np.lib.format.open_memmap(filled, "w+", dtype=X.dtype, shape=X.shape)
model.impute(out=out)
table = model.model_.posterior.table.store.values.nbytes / (1 << 20)
print(f"{peak_mib() - before:.0f} {table:.0f}")
"""


def write(kind, path, rows, columns):
    """A file of random cells in [0, 1), a tenth of them NaN: the same 4,096 rows again and again, each time rolled."""
    tile = np.random.default_rng(0).random((4096, columns), dtype=np.float32)
    tile[tile < 0.1] = np.nan
    tiles = (np.roll(tile, k, axis=1) for k in range(rows // len(tile)))
    if kind == "memmap":
        with open(path, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in tiles:
                part.tofile(file)
    elif kind in ("h5py", "zarr"):
        if kind == "h5py":
            container = pytest.importorskip("h5py").File(path, "w")
            dataset = container.create_dataset("x", (rows, columns), "f4", chunks=(256, columns))
        else:
            dataset = pytest.importorskip("zarr").create_array(
                path, shape=(rows, columns), chunks=(256, columns), dtype="f4", compressors=None
            )
        for k, part in enumerate(tiles):
            dataset[k * len(tile) : (k + 1) * len(tile)] = part
        if kind == "h5py":
            container.close()
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        tables = (pa.table({f"c{i}": c.astype("f8") for i, c in enumerate(part.T)}) for part in tiles)
        first = next(tables)
        with pq.ParquetWriter(path, first.schema, use_dictionary=False, compression="none") as writer:
            writer.write_table(first)
            for table in tables:
                writer.write_table(table)


def growth(kind, folder, rows, columns, buffer_mib, steps):
    """Growth of the peak in MiB, and what of it is the table of rows."""
    path, filled = folder / f"x.{kind}", folder / "filled.npy"
    write(kind, path, rows, columns)
    arguments = [kind, str(path), str(filled), str(buffer_mib), str(steps)]
    run = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert np.isfinite(np.load(filled, mmap_mode="r")[:: rows // 64]).all()
    filled.unlink()
    return [int(number) for number in run.stdout.split()]


@pytest.mark.parametrize("kind", ["memmap", "h5py"])
def test_400_mb_with_100_mb_allowed(tmp_path, kind):
    mib, table = growth(kind, tmp_path, rows=25 << 12, columns=1024, buffer_mib=32, steps=100)
    assert mib < 100, f"{mib} MiB, of which the rows' parameters are {table}"


@pytest.mark.large
@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [("memmap", 1 << 18, 4096), ("h5py", 1 << 18, 4096), ("zarr", 1 << 18, 4096), ("parquet", 1 << 21, 256)],
)
def test_4_gb_with_1_gb_allowed(tmp_path, kind, rows, columns):
    mib, table = growth(kind, tmp_path, rows, columns, buffer_mib=256, steps=300)
    print(f"{kind}: {mib} MiB, of which the rows' parameters are {table}")
    assert mib < 1000
