"""How exactly tl.dot multiplies."""

import torch


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """What tl.dot's input_precision must be for torch's own matmul accuracy, as the user set it."""
    if dtype != torch.float32 or device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
