"""Nearest neighbours as a peer for imputation: scikit-learn's, on z-scores."""

from __future__ import annotations

import numpy as np


def knn_impute(X: np.ndarray, neighbors: int = 5) -> np.ndarray:
    """Fill the NaN of X [N, D] from the nearest rows, columns z-scored by observed cells. Returns float64 [N, D]."""
    from sklearn.impute import KNNImputer

    mean, std = np.nanmean(X, axis=0, dtype=np.float64), np.nanstd(X, axis=0, dtype=np.float64)
    std = np.where(std > 0, std, 1.0)
    filled = KNNImputer(n_neighbors=neighbors).fit_transform((X - mean) / std)
    return np.where(np.isnan(X), filled * std + mean, X)
