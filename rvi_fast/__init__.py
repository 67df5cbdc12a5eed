"""rvi_fast: Relay Variational Inference, fast."""

from . import data, functional, likelihoods, masks, metrics, nn, optim
from .dispatch import backend, get_backend, set_backend
from .estimators import RVI, VAD, VAE
from .infer import Posterior
from .predictive import Predictive

__version__ = "0.1.0"

__all__ = [
    "RVI",
    "VAD",
    "VAE",
    "Posterior",
    "Predictive",
    "backend",
    "data",
    "functional",
    "get_backend",
    "likelihoods",
    "masks",
    "metrics",
    "nn",
    "optim",
    "set_backend",
]
