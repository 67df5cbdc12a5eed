"""How exactly tl.dot multiplies."""

import torch


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """What tl.dot's input_precision must be for torch's own matmul accuracy, as the user set it.

    A CPU (the interpreter, which is exact; the static report) stands for a GPU of the vendor that torch is built for.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
