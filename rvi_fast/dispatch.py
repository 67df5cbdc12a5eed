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
LEAST_NUMBA = (0, 62)  # the first whose compiler has but one kind of pointer, as loops/memory.py takes for granted
KERNELS = frozenset(  # ideas that have a file in kernels/
    {
        "elbo_step",
        "fit_rows",
        "linear_masked_gaussian_nll",
        "masked_bernoulli_nll",
        "masked_gaussian_nll",
        "philox_normal",
        "read_rows",
        "relay_sample",
        "row_adam_",
    }
)


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


def use_triton(op: str, device: torch.device, unsupported: str | None = None) -> bool:
    """Whether `op` runs its Triton kernel on tensors of `device`.

    unsupported: what about the arguments the kernel cannot do, if anything ("float16 tables"). It raises where triton
    was forced; otherwise the equations run.
    """
    choice = get_backend()
    if choice == "torch" or (choice == "auto" and (device.type != "cuda" or op not in KERNELS or not _has_triton())):
        return False
    unsupported = _lacking(op, device) or unsupported
    if unsupported and choice == "triton":
        raise NotImplementedError(f"{op} has no Triton kernel for {unsupported}; choose backend 'auto' or 'torch'")
    return not unsupported


def use_numba(device: torch.device) -> bool:
    """Whether compiled loops take the fused step of a model on `device`; else its equations do."""
    return get_backend() == "auto" and device.type == "cpu" and has_numba()


@functools.cache
def has_numba() -> bool:
    try:
        import numba  # an installed one may refuse this NumPy
    except ImportError:
        return False
    return tuple(int(number) for number in numba.__version__.split(".")[:2]) >= LEAST_NUMBA


def _lacking(op: str, device: torch.device) -> str | None:
    """What keeps any kernel of `op` from running on `device`."""
    if op not in KERNELS:
        return "any device"
    if device.type == "cuda":
        return (
            None if _new_enough(device) else f"{torch.cuda.get_device_name(device)} (it needs compute capability 8.0)"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return None
    return f"tensors on {device}"


@functools.cache
def _new_enough(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


# A compiled graph keeps the backend that it was traced with. torch.compiler.assume_constant_result does just this, but
# imports torch._dynamo, and with it triton, at every `import rvi_fast`.
use_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]
