"""Backends under test: every operator's tests run on each of them."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rvi_fast

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
TRITON_RUNS = importlib.util.find_spec("triton") is not None and (INTERPRETED or torch.cuda.is_available())


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("needs a GPU, and no interpreter")
    if item.get_closest_marker("large") and "large" not in item.config.option.markexpr:
        pytest.skip("takes minutes and 8 GB of disk; pytest -m large runs it")
    if item.get_closest_marker("triton") and not TRITON_RUNS:
        pytest.skip("needs triton and a GPU, or TRITON_INTERPRET=1")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """The tests of other operators run beside these (bench/on_gpu.sh) and need their share of the memory."""
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 1 << 30:
        torch.cuda.empty_cache()


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs a test once with each backend in force, on a device that this backend runs on."""
    with rvi_fast.backend(request.param):
        yield torch.device("cuda" if request.param == "triton" and not INTERPRETED else "cpu")


@pytest.fixture
def set_ctrl_c() -> Iterator[Callable[[Any], Any]]:
    """Sets what Ctrl-C does; afterwards it does what it did before, which in a script's background job is nothing."""
    before = signal.getsignal(signal.SIGINT)
    yield functools.partial(signal.signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)
