"""Which implementation runs: "triton" kernels for GPU tensors, "torch" anywhere."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

CHOICES = ("auto", "torch", "triton")
KERNELS = frozenset({"philox_normal"})  # ideas that have a file in kernels/


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _checked(name: str, source: str = "backend") -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}; got {name!r}")
    if name == "triton" and not _has_triton():
        raise ImportError("backend 'triton' needs the triton package: pip install 'rvi_fast[triton]'")
    return name


_default: str | None = None  # None: the environment decides, read when first needed
_scoped: ContextVar[str | None] = ContextVar("rvi_fast_backend", default=None)


def get_backend() -> str:
    """The backend in force: "auto", "torch" or "triton"."""
    return _scoped.get() or _default or _checked(os.environ.get("RVI_FAST_BACKEND") or "auto", "RVI_FAST_BACKEND")


def set_backend(name: str) -> None:
    """Choose the backend for the whole process: "auto" (by device), "torch" or "triton"."""
    global _default
    _default = _checked(name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend inside a with block."""
    token = _scoped.set(_checked(name))
    try:
        yield
    finally:
        _scoped.reset(token)


def use_triton(op: str, device: torch.device) -> bool:
    """Whether `op` runs its Triton kernel on tensors of `device`."""
    choice = get_backend()
    if choice == "triton" and op not in KERNELS:
        raise NotImplementedError(f"{op} has no Triton kernel; choose backend 'auto' or 'torch'")
    if choice == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, but {op} got one on the CPU; choose 'auto' or 'torch'"
        )
    return choice == "triton" or (choice == "auto" and op in KERNELS and device.type == "cuda" and _has_triton())
