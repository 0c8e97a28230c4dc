"""The most memory that a run has taken, read once when it is asked for: nothing watches in a thread."""

import sys

import torch


def peak_memory_bytes(device: torch.device | str) -> int:
    """Returns the peak in bytes: of PyTorch's tensors on a CUDA device, elsewhere of the whole process (RSS).

    0 where the system tells no peak (Windows).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): bytes on macOS, KiB on Linux
