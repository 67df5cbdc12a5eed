"""What rvi_fast runs on: versions, backend, devices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

from . import __version__
from .dispatch import KERNELS, get_backend, use_numba, use_triton


def describe() -> dict[str, str]:
    """Names and values, in the order to print them."""
    facts = {"rvi_fast": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numba", "numpy", "safetensors", "scikit-learn", "matplotlib"):
        facts[package] = _version(package)
    facts["platform"] = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["devices"] = ", ".join(["cpu", *devices])
    facts["backend"] = _backend()
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backend() -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if any(use_triton(op, device) for op in KERNELS):
            return f"{get_backend()} (Triton kernels for {', '.join(sorted(KERNELS))}; PyTorch for the rest)"
        if use_numba(device):
            return f"{get_backend()} (compiled loops for the fused training step; PyTorch for the rest)"
        return f"{get_backend()} (PyTorch on every device here)"
    except (ValueError, ImportError, NotImplementedError) as error:
        return f"unusable: {error}"
