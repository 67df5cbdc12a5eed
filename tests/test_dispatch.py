"""Which backend runs: the process's choice, a block's choice, the environment's; and life without triton."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import rvi_fast
from rvi_fast import dispatch
from rvi_fast.functional import philox_normal


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch):
    monkeypatch.setattr(dispatch, "_default", None)
    monkeypatch.delenv("RVI_FAST_BACKEND", raising=False)


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)


def test_default_is_auto():
    assert rvi_fast.get_backend() == "auto"


def test_environment_is_read_when_first_needed(monkeypatch):
    monkeypatch.setenv("RVI_FAST_BACKEND", "torch")
    assert rvi_fast.get_backend() == "torch"
    monkeypatch.setenv("RVI_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="RVI_FAST_BACKEND must be one of auto, torch, triton; got 'cuda'"):
        rvi_fast.get_backend()
    monkeypatch.setenv("RVI_FAST_BACKEND", "")
    assert rvi_fast.get_backend() == "auto"


def test_set_backend_overrides_the_environment(monkeypatch):
    monkeypatch.setenv("RVI_FAST_BACKEND", "auto")
    rvi_fast.set_backend("torch")
    assert rvi_fast.get_backend() == "torch"


def test_block_overrides_and_restores():
    rvi_fast.set_backend("auto")
    with pytest.raises(KeyError), rvi_fast.backend("torch"):
        assert rvi_fast.get_backend() == "torch"
        raise KeyError
    assert rvi_fast.get_backend() == "auto"


def test_block_binds_its_own_thread_alone():
    seen = []
    with rvi_fast.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(rvi_fast.get_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("choose", [rvi_fast.set_backend, lambda name: rvi_fast.backend(name).__enter__()])
def test_unknown_backend_is_named(choose):
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton; got 'numpy'"):
        choose("numpy")


def test_auto_follows_the_device():
    assert not dispatch.use_triton("philox_normal", torch.device("cpu"))


def test_auto_without_triton_is_torch(without_triton):
    assert not dispatch.use_triton("philox_normal", torch.device("cuda"))


def test_triton_without_triton_says_what_to_install(without_triton):
    with pytest.raises(ImportError, match=r"pip install 'rvi_fast\[triton\]'"):
        rvi_fast.set_backend("triton")


def test_triton_is_never_replaced_in_silence():
    pytest.importorskip("triton")
    with rvi_fast.backend("triton"), pytest.raises(NotImplementedError, match="relay_dance has no Triton kernel"):
        dispatch.use_triton("relay_dance", torch.device("cpu"))


@pytest.fixture
def old_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_new_enough", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    return torch.device("cuda:0")


def test_an_old_gpu_takes_the_equations(old_gpu):
    assert not dispatch.use_triton("relay_sample", old_gpu)
    with (
        rvi_fast.backend("triton"),
        pytest.raises(
            NotImplementedError,
            match=r"relay_sample has no Triton kernel for Tesla T4 \(it needs compute capability 8.0\)",
        ),
    ):
        dispatch.use_triton("relay_sample", old_gpu)


def test_what_a_kernel_cannot_do_takes_the_equations(monkeypatch):
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "_new_enough", lambda device: True)
    gpu = torch.device("cuda:0")
    assert dispatch.use_triton("relay_sample", gpu)
    assert not dispatch.use_triton("relay_sample", gpu, "float16 tables")
    with rvi_fast.backend("triton"), pytest.raises(NotImplementedError, match="no Triton kernel for float16 tables"):
        dispatch.use_triton("relay_sample", gpu, "float16 tables")


def test_every_named_kernel_has_its_file():
    kernels = {file.stem for file in Path(rvi_fast.__file__).parent.joinpath("kernels").glob("*.py")}
    assert kernels >= dispatch.KERNELS


def test_torch_backend_runs_no_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "rvi_fast.kernels.philox_normal", None)  # importing it would raise
    with rvi_fast.backend("torch"):
        assert philox_normal(0, "train", 0, torch.arange(2), 3).shape == (2, 3)


def test_library_works_where_triton_cannot_be_imported():
    program = """
import sys
sys.modules["triton"] = None
import torch, rvi_fast
from rvi_fast import functional
assert functional.philox_normal(0, "train", 0, torch.arange(2), 3).shape == (2, 3)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("version", "enough"), [("0.61.2", False), ("0.62.0", True), ("1.0.0rc1", True)])
def test_an_older_numba_is_none(monkeypatch, version, enough):
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba, "__version__", version)
    assert dispatch.has_numba.__wrapped__() == enough
