"""How exactly matrices are multiplied."""

import torch
import triton
import triton.language as tl


def dot_precision(dtype: torch.dtype) -> str:
    """What tl.dot's input_precision must be for torch's own matmul accuracy, as the user set it.

    On GPUs of the vendor that torch is built for; a build for none counts as NVIDIA's.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    # follows torch.set_float32_matmul_precision too; torch.get_float32_matmul_precision raises once this one is set
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a b: [R, C], [R, K], [K, C]. float64 is summed entry by entry: Triton 3.6 has no dot for it on a GPU."""
    if total.dtype == tl.float64:
        total += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total
