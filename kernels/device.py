"""What a launcher asks of the device before it chooses a grid."""

import functools

import torch

PAPER_GPU = 132  # streaming multiprocessors of an H100


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors `device` has; a CPU (the interpreter, the static report) stands for an H100."""
    if device.type == "cpu":
        return PAPER_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count
