"""Registering operators with PyTorch, so that torch.compile, export and autocast see one opaque call each.

One boundary a hot call: the schema is defined and implemented directly, and its autograd.Function stands at the
Autograd key. Measured on a CPU (torch 2.13, forward and backward of an empty operator): 43 us this way, the same as an
autograd.Function called from Python; 52 us with define + register_autograd; 82 us with custom_op + register_autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import library

LIBRARY = library.Library("rvi_fast", "DEF")
DEVICES = ("CPU", "CUDA")  # ROCm's devices come under the name CUDA too


def operator(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    function: type[torch.autograd.Function] | None = None,
    autocast: torch.dtype | None = None,
) -> Any:
    """Define rvi_fast::`schema` and return it.

    implementation: runs below autograd, on any device: the kernel, or the twin where none may run. fake: the shapes
    and dtypes of the outputs. function: differentiates; its forward calls the operator under `below_autograd`.
    autocast: the dtype that floating-point inputs are cast to inside an autocast region.
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, implementation, device)
    library.register_fake(f"rvi_fast::{name}", fake, lib=LIBRARY)
    if function is not None:
        LIBRARY.impl(name, function.apply, "Autograd")
    if autocast is not None:
        library.register_autocast(f"rvi_fast::{name}", "cuda", autocast, lib=LIBRARY)
    return getattr(torch.ops.rvi_fast, name).default


def below_autograd() -> Any:
    """The context in which an autograd.Function calls its own operator."""
    return torch._C._AutoDispatchBelowAutograd()


def differentiable_once(backward: Callable[..., Any]) -> Any:
    """For an autograd.Function's backward (which returns a tuple): differentiating its result raises.

    torch's once_differentiable raises only where the incoming gradient needs one; elsewhere a second derivative by the
    saved inputs would pass for zero.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        sentence = b"the gradients of a kernel cannot be differentiated again; choose backend 'torch' for that"
        fail: Any = torch._C._functions.DelayedError(sentence, len(found))
        return fail(*(None if grad is None else grad.detach().requires_grad_() for grad in found))

    return wrapped
