"""New files, which take their name when they are complete."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .extras import extra


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside path, which takes its name when it is complete; path itself is old or new, never in part."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        why = error.strerror or f"the disk may be full ({error})"  # numpy does not say
        raise OSError(f"{path} cannot be written: {why}; nothing was changed") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_npy(path: Path, values: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array(file, values, allow_pickle=False)


def write_embedding(
    path: Path,
    embedding: NDArray[np.float32],
    labels: Any,
    delimiter: str | None = None,
    decimal: str = ".",
    ending: str = "\n",
) -> None:
    """A csv, tsv or parquet file with columns z0, z1, ... and the labels as index, or an npy file."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        with replacing(path) as part:
            write_npy(part, embedding)
        return
    pandas = extra("pandas")
    frame = pandas.DataFrame(embedding, columns=[f"z{i}" for i in range(embedding.shape[1])], index=labels)
    with replacing(path) as part:
        if suffix == ".parquet":
            extra("pyarrow")
            frame.to_parquet(part)
        else:
            delimiter = delimiter or ("\t" if suffix == ".tsv" else ",")
            numbered = isinstance(frame.index, pandas.RangeIndex) and frame.index.name is None
            frame.to_csv(part, sep=delimiter, decimal=decimal, lineterminator=ending, index=not numbered)
