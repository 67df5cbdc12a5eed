"""Data sets and files: idx, parquet by row groups, (Fashion-)MNIST, CMU-MOSI, scikit-learn's tables, artificial."""

from __future__ import annotations

import gzip
import importlib
import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import arguments

__all__ = [
    "SOURCES",
    "ParquetRows",
    "artificial",
    "digits",
    "fashion_mnist",
    "load_idx",
    "load_table",
    "mnist",
    "mosi",
]

Floats = NDArray[np.float64]
Split = Literal["train", "test"]

MODALITIES = ("text", "audio", "vision")
MOSI_SPLITS = ("train", "valid", "test")
IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def load_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array in an idx file, plain or gzipped (told by its content), in native byte order.

    The whole file is read and checked before anything is returned. Raises FileNotFoundError if there is none, and
    ValueError if it is no idx file, is damaged, or holds fewer or more bytes than its header says.
    """
    file = arguments.path("path", path)
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of an idx file")
    content = file.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged or truncated gzip file; fetch it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_DTYPES:
        raise ValueError(f"{path} is not an idx file: it does not begin with two zero bytes and a known dtype")
    dtype, ndim = np.dtype(IDX_DTYPES[content[2]]), content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        raise ValueError(f"{path} is truncated within its header; fetch it again")
    shape = [int(size) for size in np.frombuffer(content, ">u4", ndim, offset=4)]
    expected, found = math.prod(shape) * dtype.itemsize, len(content) - start
    if found != expected:
        raise ValueError(f"{path} should hold {expected} bytes of data for shape {shape}, got {found}; fetch it again")
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


class ParquetRows:
    """The numeric columns of a parquet file as rows [N, D], read by row groups: what fit takes as X for a large file.

    columns: the names of those to read, default all. Cells are float32 where all columns are, else float64; null is
    NaN. X[a:b] gives an array; one row group is kept. Raises ValueError for a column that is absent, double or not
    numeric, and for a file that is no parquet.
    """

    def __init__(self, path: str | os.PathLike[str], columns: Sequence[str] | None = None):
        pyarrow = _imported("pyarrow", "reading parquet")
        parquet = _imported("pyarrow.parquet", "reading parquet")
        self.path = Path(path)
        try:
            self._file = parquet.ParquetFile(self.path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            if not self.path.is_file():
                raise FileNotFoundError(f"{path} is not a file; give the path of one parquet file") from None
            raise ValueError(f"{path} is not a whole parquet file ({error})") from None
        schema = self._file.schema_arrow
        self.columns = list(schema.names if columns is None else columns)
        kinds = [self._numeric_type(schema, name, pyarrow.types) for name in self.columns]
        self._type = pyarrow.float32() if set(kinds) == {pyarrow.float32()} else pyarrow.float64()
        self.dtype = np.dtype(self._type.to_pandas_dtype())
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self.shape = (int(self._starts[-1]), len(self.columns))
        self.chunks = (max(sizes, default=1), len(self.columns))
        self._kept: tuple[int, NDArray[Any]] | None = None

    def _numeric_type(self, schema: Any, name: str, types: Any) -> Any:
        if schema.names.count(name) != 1 or Counter(self.columns)[name] != 1:
            found = "is not there" if name not in schema.names else "is there twice"
            raise ValueError(f"column {name!r} of {self.path} {found}; it has {', '.join(map(repr, schema.names))}")
        kind = schema.field(name).type
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            raise ValueError(f"column {name!r} of {self.path} holds {kind}; pass columns with numeric ones only")
        return kind

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"ParquetRows is read by slices of step 1; got step {step}")
        parts = [np.empty((0, len(self.columns)), self.dtype)]
        while start < stop:
            group = int(np.searchsorted(self._starts, start, side="right")) - 1
            first, end = int(self._starts[group]), min(stop, int(self._starts[group + 1]))
            parts.append(self._group(group)[start - first : end - first])
            start = end
        return np.concatenate(parts)

    def _group(self, group: int) -> NDArray[Any]:
        if self._kept is None or self._kept[0] != group:
            self._kept = None  # never two at once
            table = self._file.read_row_group(group, columns=self.columns)
            cells = np.empty((len(table), len(self.columns)), self.dtype)
            for number, name in enumerate(self.columns):
                cells[:, number] = self._as_numbers(table.column(name), name)
            self._kept = group, cells
        return self._kept[1]

    def _as_numbers(self, column: Any, name: str) -> NDArray[Any]:
        try:
            return column.cast(self._type).to_numpy()
        except ValueError as error:  # pyarrow's own are ValueErrors too
            raise ValueError(f"column {name!r} of {self.path} does not go into float64 exactly ({error})") from None


def mnist(
    split: Split = "train", root: str | os.PathLike[str] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """MNIST: images uint8 [60000 or 10000, 784] and labels int64, from idx files on this machine.

    root: a folder that holds the files, or holds them in mnist/ or MNIST/raw/ (torchvision's layout). With no root, the
    same two subfolders are looked for in $RVI_FAST_DATA and then in ./data. Raises FileNotFoundError if the files are
    nowhere, ValueError for an unknown split or for files of other shapes.
    """
    remedy = "torchvision.datasets.MNIST(root, download=True) fetches them"
    return _images_and_labels("MNIST", split, root, ("mnist", "MNIST/raw"), (), remedy)


def fashion_mnist(
    split: Split = "train", root: str | os.PathLike[str] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Fashion-MNIST: images uint8 [60000 or 10000, 784] and labels int64, from idx files on this machine.

    As `mnist`, with the subfolders fashion-mnist/ and FashionMNIST/raw/, and last the folder of the Debian package
    dataset-fashion-mnist.
    """
    remedy = (
        "torchvision.datasets.FashionMNIST(root, download=True) fetches them, and so does Debian's "
        "`apt install dataset-fashion-mnist`"
    )
    debian = Path("/usr/share/datasets/fashion-mnist")
    return _images_and_labels("Fashion-MNIST", split, root, ("fashion-mnist", "FashionMNIST/raw"), (debian,), remedy)


def _images_and_labels(
    name: str,
    split: Split,
    root: str | os.PathLike[str] | None,
    subfolders: tuple[str, str],
    system_folders: tuple[Path, ...],
    remedy: str,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    _check_split(split)
    prefix, n = ("train", 60_000) if split == "train" else ("t10k", 10_000)
    stems = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    if root is not None:
        # The root itself comes last: MNIST and Fashion-MNIST have the same file names.
        folders = [*(Path(root) / sub for sub in subfolders), Path(root)]
    else:
        roots = [Path(found) for found in (os.environ.get("RVI_FAST_DATA"), "data") if found]
        folders = [*(base / sub for base in roots for sub in subfolders), *system_folders]
    for folder in folders:
        files = [_plain_or_gz(folder, stem) for stem in stems]
        if files[0] and files[1]:
            return _checked_images(files[0], n), _checked_labels(files[1], n)
    raise FileNotFoundError(
        f"{name} ({split}) needs {stems[0]} and {stems[1]}, plain or .gz, in {' or '.join(map(str, folders))}: "
        f"pass as root, or set as RVI_FAST_DATA, the folder that holds {subfolders[0]}/; {remedy}"
    )


def _plain_or_gz(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)


def _checked_images(path: Path, n: int) -> NDArray[np.uint8]:
    images = load_idx(path)
    if images.shape != (n, 28, 28) or images.dtype != np.uint8:
        raise ValueError(f"{path} should be uint8 of shape ({n}, 28, 28), got {images.dtype} of {images.shape}")
    return images.reshape(n, 784)


def _checked_labels(path: Path, n: int) -> NDArray[np.int64]:
    labels = load_idx(path)
    if labels.shape != (n,) or labels.dtype != np.uint8:
        raise ValueError(f"{path} should be uint8 of shape ({n},), got {labels.dtype} of {labels.shape}")
    return labels.astype(np.int64)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')


def mosi(
    path: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    split: Literal["train", "valid", "test"] | None = None,
    *,
    flatten: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[str]]:
    """CMU-MOSI from your own file: X float32 [N, D], sentiment float32 [N] in [-3, 3], and the segments' ids.

    path: an .npz made from MMSA's aligned_50.pkl (below), or the SDK's .csd files, as {"labels": file, "text": file,
    "audio": file, ...}; the modalities stand beside each other in X in this order. split: None takes all segments in
    the order train, valid, test; .csd files hold no splits. By default a feature is its mean over the steps that hold
    data: not those masked by text_bert (text alone), nor those of zeros in a whole modality (padding, or no face), nor
    cells that are not finite; NaN where no step does. With a .csd file a segment's steps are those whose interval
    overlaps the label's. flatten: instead of the mean every step, [N, sum over modalities of T * d], time-major, NaN
    where there is no data; T is the longest segment's number of steps. aligned_50 has d = 768, 5, 20 and T = 50, so D
    is 793, or 39,650 flattened.

    A pickle is not read here, because that runs whatever code the file holds. Convert one that you trust:

        import pickle
        import numpy as np

        keys = {"text", "audio", "vision", "text_bert", "regression_labels", "id"}
        with open("aligned_50.pkl", "rb") as file:
            splits = pickle.load(file)
        arrays = {f"{s}/{key}": np.asarray(part[key]) for s, part in splits.items() for key in keys & part.keys()}
        np.savez("aligned_50.npz", **arrays)

    Raises FileNotFoundError and ValueError for files that are absent, damaged or hold something else.
    """
    if split not in (None, *MOSI_SPLITS):
        raise ValueError(f"split must be None or one of {', '.join(map(repr, MOSI_SPLITS))}; got {split!r}")
    if not isinstance(path, Mapping):
        modalities, labels, ids = _mosi_npz(Path(path), MOSI_SPLITS if split is None else (split,))
    elif split is None:
        modalities, labels, ids = _mosi_csd(path)
    else:
        raise ValueError("split has no meaning for .csd files, which hold none; leave it out and choose rows by ids")
    join = _all_steps if flatten else _mean_step
    return np.concatenate([join([_holed(step) for step in m]) for m in modalities], axis=1), labels, ids


Steps = list[NDArray[Any]]  # one [T, d] a segment


def _holed(steps: NDArray[Any]) -> NDArray[np.float32]:
    """[T, d] with NaN where there is no data."""
    steps = np.where(np.isfinite(steps), steps, np.nan).astype(np.float32)
    steps[np.all((steps == 0) | np.isnan(steps), axis=1)] = np.nan
    return steps


def _mean_step(segments: Steps) -> NDArray[np.float32]:
    counts = np.stack([np.sum(~np.isnan(steps), axis=0) for steps in segments])
    sums = np.stack([np.nansum(steps, axis=0, dtype=np.float64) for steps in segments])
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)


def _all_steps(segments: Steps) -> NDArray[np.float32]:
    longest = max(len(steps) for steps in segments)
    out = np.full((len(segments), longest, segments[0].shape[1]), np.nan, dtype=np.float32)
    for segment, steps in zip(out, segments, strict=True):
        segment[: len(steps)] = steps
    return out.reshape(len(segments), -1)


def _mosi_npz(path: Path, splits: Sequence[str]) -> tuple[list[Steps], NDArray[np.float32], list[str]]:
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path} is a pickle, and reading one runs whatever code it holds; if you trust it, convert it to .npz as "
            "help(rvi_fast.data.mosi) shows"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; help(rvi_fast.data.mosi) shows how to make the .npz")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not a whole .npz file; help(rvi_fast.data.mosi) shows how to make one")
    with np.load(path, allow_pickle=False) as file:
        parts = [_mosi_part(file, path, split) for split in splits]
    modalities = [[steps for part in parts for steps in part[name]] for name in MODALITIES]
    labels = np.concatenate([part["regression_labels"] for part in parts]).astype(np.float32)
    return modalities, labels, [str(name) for part in parts for name in part["id"]]


def _mosi_part(file: Any, path: Path, split: str) -> dict[str, NDArray[Any]]:
    """One split's arrays, checked; text holds NaN where text_bert masks it."""
    keys = (*MODALITIES, "regression_labels", "id", "text_bert")
    try:
        part = {key: file[f"{split}/{key}"] for key in keys if f"{split}/{key}" in file}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or holds Python objects ({error}); make it again") from None
    if absent := [key for key in keys[:-1] if key not in part]:
        raise ValueError(f"{path} lacks {split}/{absent[0]}; help(rvi_fast.data.mosi) shows how to make the file")
    n, mask = len(part["text"]), part.pop("text_bert", None)
    shapes = {key: array.shape for key, array in part.items()}
    right = all(len(shapes[name]) == 3 and part[name].dtype.kind in "fiu" for name in MODALITIES)
    right = right and all(shape[0] == n for shape in shapes.values()) and shapes["regression_labels"] == (n,)
    if not right or (mask is not None and mask.shape != (n, 3, shapes["text"][1])):
        raise ValueError(f"{path} does not hold what aligned_50.pkl does: {split} has arrays of shapes {shapes}")
    if mask is not None:
        part["text"] = np.where(mask[:, 1, :, None] != 0, part["text"], np.nan)
    return part


def _mosi_csd(paths: Mapping[str, Any]) -> tuple[list[Steps], NDArray[np.float32], list[str]]:
    if "labels" not in paths or len(paths) < 2:
        raise ValueError(f"path must name the .csd files of labels and of a modality or more; got {', '.join(paths)}")
    sequences = {name: _csd(Path(path)) for name, path in paths.items()}
    labelled = sequences.pop("labels")
    spans = [(f"{key}[{k}]", key, span) for key, (_, intervals) in labelled.items() for k, span in enumerate(intervals)]
    modalities = []
    for sequence in sequences.values():
        width = next(iter(sequence.values()))[0].shape[1]
        nothing = np.empty((0, width)), np.empty((0, 2))
        segments = []
        for _, key, (start, end) in spans:
            features, intervals = sequence.get(key, nothing)
            segments.append(features[(intervals[:, 0] < end) & (intervals[:, 1] > start)])
        modalities.append(segments)
    labels = np.concatenate([features[:, 0] for features, _ in labelled.values()]).astype(np.float32)
    return modalities, labels, [name for name, _, _ in spans]


def _csd(path: Path) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """The features [T, d] and intervals [T, 2] of every video in a computational sequence of the CMU SDK."""
    h5py = _imported("h5py", "reading .csd files")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of a .csd file")
    try:
        with h5py.File(path, "r") as file:
            (root,) = file.values()
            found = {key: (video["features"][()], video["intervals"][()]) for key, video in root["data"].items()}
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole .csd file of the CMU SDK ({error})") from None
    widths = {features.shape[1:] for features, _ in found.values()}
    if len(widths) != 1 or any(features.dtype.kind not in "fiu" for features, _ in found.values()):
        raise ValueError(
            f"{path} must hold numeric features [T, d] of one width, such as word vectors rather than words"
        )
    if any(f.ndim != 2 or intervals.shape != (len(f), 2) for f, intervals in found.values()):
        raise ValueError(f"{path} must hold features [T, d] and intervals [T, 2] for every video")
    return found


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """scikit-learn's digits: images float32 [1797, 64] in [0, 1] (8 x 8 pixels / 16) and labels int64 [1797].

    Raises ImportError if scikit-learn is not installed.
    """
    X, labels = _sklearn_datasets().load_digits(return_X_y=True)
    return (X / 16.0).astype(np.float32), labels.astype(np.int64)


def load_table(name: str) -> tuple[Floats, list[str]]:
    """A small real table from scikit-learn: X float64 [N, D] with nothing missing, and the names of its D columns.

    breast_cancer is 569 x 30, diabetes 442 x 10, iris 150 x 4, wine 178 x 13; the class or target is left out.
    Raises ValueError for another name, ImportError if scikit-learn is not installed.
    """
    if name not in ("breast_cancer", "diabetes", "iris", "wine"):
        raise ValueError(f"name must be breast_cancer, diabetes, iris or wine, got {name!r}")
    table = getattr(_sklearn_datasets(), f"load_{name}")()
    return table.data.astype(np.float64), [str(feature) for feature in table.feature_names]


def _sklearn_datasets() -> Any:
    try:
        return importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError("this data set comes with scikit-learn; run pip install 'rvi_fast[sklearn]'") from error


def _imported(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{purpose} needs {package}; run pip install {package}") from error


class Source(NamedTuple):
    """A distribution with its mean and standard deviation."""

    draw: Callable[[np.random.Generator, int], Floats]
    mean: float
    std: float


SOURCES: dict[str, Source] = {
    "normal": Source(lambda rng, n: rng.standard_normal(n), 0.0, 1.0),
    "beta": Source(lambda rng, n: rng.beta(2.0, 5.0, n), 2 / 7, math.sqrt(10 / 392)),
    "gumbel": Source(lambda rng, n: rng.gumbel(0.0, 1.0, n), float(np.euler_gamma), math.pi / math.sqrt(6)),
    "uniform": Source(lambda rng, n: rng.random(n), 0.5, math.sqrt(1 / 12)),
    "exponential": Source(lambda rng, n: rng.standard_exponential(n), 1.0, 1.0),
    "gamma": Source(lambda rng, n: rng.standard_gamma(2.0, n), 2.0, math.sqrt(2)),
    "laplace": Source(lambda rng, n: rng.laplace(0.0, 1.0, n), 0.0, math.sqrt(2)),
    "logistic": Source(lambda rng, n: rng.logistic(0.0, 1.0, n), 0.0, math.pi / math.sqrt(3)),
    "lognormal": Source(
        lambda rng, n: rng.lognormal(0.0, 0.5, n), math.exp(0.125), math.sqrt(math.expm1(0.25) * math.exp(0.25))
    ),
    "weibull": Source(lambda rng, n: rng.weibull(2.0, n), math.sqrt(math.pi) / 2, math.sqrt(1 - math.pi / 4)),
}

NONLINEARITIES: dict[str | None, Callable[[Floats], Floats]] = {
    None: lambda x: x,
    "tanh": np.tanh,
    "sigmoid": lambda x: 0.5 + 0.5 * np.tanh(0.5 * x),
    "relu": lambda x: np.maximum(x, 0.0),
}


def artificial(
    n: int = 10_000,
    dim: int = 300,
    *,
    n_sources: int = 10,
    nonlinearity: Literal["tanh", "sigmoid", "relu"] | None = None,
    seed: int = 0,
    split: Split = "train",
) -> NDArray[np.float32]:
    """Artificial data in the style of the paper's: linear combinations of samples of ten distributions; no noise.

    x = f(A s). The n_sources entries of s are independent; entry k follows distribution k % 10 of `SOURCES` (normal,
    beta(2, 5), gumbel, uniform, exponential, gamma(2), laplace, logistic, lognormal(0, 0.5), weibull(2)), shifted and
    scaled to mean 0 and variance 1. A [dim, n_sources] is drawn once from N(0, 1 / n_sources): it depends on the seed
    (and its own shape) alone, so train and test share it and only s differs. f acts on every entry after mixing.
    The paper prints no generator: the distributions' parameters and A are this library's choice.

    Returns float32 [n, dim]; a smaller n gives the first rows of a larger one. Raises ValueError for a size below 1,
    an unknown nonlinearity or an unknown split.
    """
    for name, size in (("n", n), ("dim", dim), ("n_sources", n_sources)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f'nonlinearity must be None, "tanh", "sigmoid" or "relu", got {nonlinearity!r}')
    _check_split(split)
    mixing = np.random.default_rng([seed, *b"mixing"]).standard_normal((dim, n_sources)) / math.sqrt(n_sources)
    kinds = list(SOURCES.values())
    sources = np.empty((n, n_sources))
    for k in range(n_sources):
        source = kinds[k % len(kinds)]
        rng = np.random.default_rng([seed, *split.encode(), k + 1])  # a stream per source, so n does not shift others
        sources[:, k] = (source.draw(rng, n) - source.mean) / source.std
    return NONLINEARITIES[nonlinearity](sources @ mixing.T).astype(np.float32)
