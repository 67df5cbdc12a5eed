"""Times of the operators, forward and backward, at the paper setting: pytest bench --benchmark-only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rvi_fast
from rvi_fast import dispatch, functional

B, T, D = 256, 64, 784
GROUPS, ACTIVE = (25, 50, 100), (13, 25, 50)


@pytest.fixture(scope="module", autouse=True)
def machine(request: pytest.FixtureRequest) -> None:
    """Say what the times depend on."""
    load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{torch.get_num_threads()} torch threads on {os.cpu_count()} cores; load {load}")


@pytest.fixture(params=["torch-cpu", "torch-cuda", "triton-cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs a benchmark once on each backend and device that the machine and its operator have."""
    backend, device = request.param.split("-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if backend == "triton" and request.node.originalname.removeprefix("test_") not in dispatch.KERNELS:
        pytest.skip("no Triton kernel")
    with rvi_fast.backend(backend):
        yield torch.device(device)


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()


def time(benchmark: Any, operator: Callable[[], Tensor], inputs: Sequence[Tensor]) -> None:
    """The operator and its gradients to `inputs`, which all live on one device."""

    def step() -> None:
        out = operator()
        if inputs:
            torch.autograd.grad(out.sum(), inputs)
        if out.is_cuda:
            torch.cuda.synchronize()

    benchmark(step)


def test_relay_mean(benchmark, device):
    coef, relays = normal(B, sum(GROUPS), device=device), normal(sum(GROUPS), T, device=device)
    time(benchmark, lambda: functional.relay_mean(coef, relays, GROUPS, ACTIVE), [coef, relays])


def test_relay_sample(benchmark, device):
    coef, relays = normal(B, sum(GROUPS), device=device), normal(sum(GROUPS), T, device=device)
    residual, log_std, noise = (normal(B, T, device=device) for _ in range(3))

    def operator() -> Tensor:
        z, kl = functional.relay_sample(coef, residual, log_std, relays, GROUPS, ACTIVE, noise.detach())
        return z.sum(1) + kl

    time(benchmark, operator, [coef, residual, log_std, relays])


def test_masked_gaussian_nll(benchmark, device):
    xhat, x, scale = normal(B, D, device=device), normal(B, D, device=device).detach(), torch.ones(D, device=device)
    mask = x > -0.5
    time(benchmark, lambda: functional.masked_gaussian_nll(xhat, x, mask, scale), [xhat])


def test_philox_normal(benchmark, device):
    rows, step = torch.arange(B, device=device), torch.tensor(0, device=device)
    time(benchmark, lambda: functional.philox_normal(0, "train", step, rows, T), [])
