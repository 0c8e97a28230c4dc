"""Triton's kernels run under its interpreter here, where there is no GPU; where there is, they run on that."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrecipes.kernels.jit import runs_triton


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function so that its Triton kernel runs; skips where there is no Triton."""
    triton = pytest.importorskip("triton")

    def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(triton.knobs.runtime, "interpret", device.type == "cpu")
            assert runs_triton(torch.empty(0, device=device))
            return function(*arguments, **options)

    return run


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function in plain PyTorch on the CPU: its tensors go there, and come back."""

    def moved(value: Any, device: str) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return function(
            *(moved(value, "cpu") for value in arguments),
            **{name: moved(value, "cpu") for name, value in options.items()},
        )

    return run


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns a tensor of NaN (or -99), in which every number that a kernel does not write is seen."""
    value = -99 if dtype == torch.int8 else float("nan")
    return torch.full(shape, value, dtype=torch.float32).to(dtype).to(device)
