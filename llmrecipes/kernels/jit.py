"""Triton, where it is installed: what every kernel is written with.

A machine without a GPU need not have it; the kernels are then functions that nobody calls.
"""

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["jit", "runs_triton", "tl", "triton"]


def jit(kernel: Any) -> Any:
    """Makes a Triton kernel of a function where there is Triton."""
    return triton.jit(kernel) if triton is not None else kernel


def runs_triton(tensor: torch.Tensor) -> bool:
    """Returns whether the kernels take a tensor: on a GPU, or anywhere under Triton's interpreter."""
    return triton is not None and (tensor.is_cuda or triton.knobs.runtime.interpret)
