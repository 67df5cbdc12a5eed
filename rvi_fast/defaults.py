"""What "auto" means: the settings that follow from the kind of data, in one place."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .likelihoods import Gaussian, Likelihood
from .observations import ColumnStatistics

FEW_COLUMNS, FEW_COLUMNS_EPOCHS = 8, 500  # a table with fewer columns takes so many epochs
IMAGE_COLUMNS = 256  # columns from which data in [0, 1] count as images


@dataclasses.dataclass(frozen=True)
class Settings:
    """One value for every argument that may be "auto"."""

    latent_dim: int
    hidden: tuple[int, ...]
    linear_path: bool
    activation: str
    scale: float | str
    min_scale: float  # of a learned scale
    standardize: bool
    lr: float
    row_lr: float  # where lr is "auto", too
    schedule: str
    weight_decay: float
    batch_size: int
    epochs: int


AUTO = tuple(
    f.name for f in dataclasses.fields(Settings) if f.name not in ("scale", "min_scale", "row_lr")
)  # arguments that may be "auto"

# both are measured: bench/results/paper/quick/README.md, one setting changed at a time
TABLE = Settings(
    latent_dim=16,
    hidden=(128,),
    linear_path=True,
    activation="silu",
    scale="learned",
    min_scale=0.05,
    standardize=True,
    lr=1e-2,
    row_lr=1e-2,
    schedule="cosine",
    weight_decay=0.1,
    batch_size=64,
    epochs=200,
)
IMAGE = Settings(
    latent_dim=64,
    hidden=(256,),
    linear_path=True,
    activation="relu",
    scale="learned",
    min_scale=0.1,
    standardize=False,
    lr=3e-3,
    row_lr=1e-2,
    schedule="cosine",
    weight_decay=0.0,
    batch_size=256,
    epochs=150,
)

# of RVIImputer, which is judged by what it fills: docs/tables.md
FILLING_KL_WEIGHT, FILLING_WEIGHT_DECAY = 0.7, 0.2

# the published experiments; the scale is not published: variance 0.02 (docs/math.md)
PAPER: dict[str, Any] = dict(
    latent_dim=64,
    hidden=(64, 64),
    linear_path=False,
    activation="relu",
    groups=(25, 50, 100),
    active=0.5,
    kl_weight=1.0,
    standardize=False,
    lr=1e-3,
    schedule="constant",
    weight_decay=0.0,
    batch_size=256,
    epochs=250,
    optimizer_mode="dense",
)
PAPER_SCALE = 0.02**0.5


def settings_for(dtype: np.dtype, statistics: ColumnStatistics, num_rows: int) -> Settings:
    """IMAGE for uint8, or for many columns that all lie in [0, 1]; else TABLE with a batch of about N/8 rows.

    What a learning rate does to a row depends on N/B (docs/math.md), so the batch grows with a small table. A table has
    no more latents than columns; on hidden training cells few columns gained from more passes, ten or more did not.
    """
    seen = statistics.count > 0
    in_unit_interval = bool((statistics.low[seen] >= 0).all() and (statistics.high[seen] <= 1).all())
    if dtype == np.uint8 or (in_unit_interval and len(seen) >= IMAGE_COLUMNS):
        return IMAGE
    batch_size = 2 ** round(math.log2(max(1.0, num_rows / 8)))
    return dataclasses.replace(
        TABLE,
        latent_dim=min(TABLE.latent_dim, len(seen)),
        batch_size=min(max(batch_size, 32), 256),
        epochs=TABLE.epochs if len(seen) >= FEW_COLUMNS else FEW_COLUMNS_EPOCHS,
    )


def likelihood_for(settings: Settings) -> Likelihood:
    return Gaussian(settings.scale, min_scale=settings.min_scale)
