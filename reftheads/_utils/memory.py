"""How much memory is free."""

import psutil
import torch


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Return how many bytes are free where a device keeps its tensors: on a CUDA device its own, else main memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
