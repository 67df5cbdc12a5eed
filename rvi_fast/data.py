"""Data sets for examples, tests and experiments: idx files, (Fashion-)MNIST, scikit-learn's tables, artificial data."""

from __future__ import annotations

import gzip
import importlib
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SOURCES", "artificial", "digits", "fashion_mnist", "load_idx", "load_table", "mnist"]

Floats = NDArray[np.float64]
Split = Literal["train", "test"]

IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def load_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array in an idx file, plain or gzipped (told by its content), in native byte order.

    The whole file is read and checked before anything is returned. Raises FileNotFoundError if there is none, and
    ValueError if it is no idx file, is damaged, or holds fewer or more bytes than its header says.
    """
    content = Path(path).read_bytes()
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
