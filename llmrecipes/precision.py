"""Device and data types of a run, decided once.

Trained weights are float32 (unless the user asks for pure bfloat16), the frozen base is kept in the type it computes
in, and matmuls run in that type under `torch.autocast`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from llmrecipes.errors import HardwareError


@dataclass(frozen=True)
class Precision:
    """Where a run computes, and in which types."""

    device: torch.device
    compute: torch.dtype
    """of matmuls and of the frozen base"""
    trained: torch.dtype
    """of the parameters that train, of their gradients and of the optimizer's state"""
    loss_scaling: bool

    def autocast(self) -> AbstractContextManager[object]:
        """Returns the context that a forward runs in."""
        if self.compute == torch.float32 or self.trained == self.compute:
            return nullcontext()
        # The cache of cast weights is one for all threads, and a forward casts each of them once anyway.
        return torch.autocast(self.device.type, dtype=self.compute, cache_enabled=self.device.type != "cpu")

    @property
    def name(self) -> str:
        """`fp32`, `bf16` or `fp16`."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.compute]


def resolve_precision(
    device_name: str, mixed_precision: bool | None, use_fp16: bool, pure_bf16: bool = False
) -> Precision:
    """Returns the precision that the flags and this machine come to; raises `HardwareError`.

    `mixed_precision`: True is bfloat16, False float32, None bfloat16 where the hardware computes in it.
    """
    device = resolve_device(device_name)
    if use_fp16:
        return Precision(device, torch.float16, torch.float32, loss_scaling=True)
    if pure_bf16:
        return Precision(device, torch.bfloat16, torch.bfloat16, loss_scaling=False)
    has_bf16 = computes_bf16(device)
    if mixed_precision and not has_bf16 and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        raise HardwareError(f"--mixed_precision true: {name} has no bfloat16; use --use_fp16, or leave it out")
    use_bf16 = has_bf16 if mixed_precision is None else mixed_precision
    return Precision(device, torch.bfloat16 if use_bf16 else torch.float32, torch.float32, loss_scaling=False)


def resolve_device(name: str) -> torch.device:
    """Returns the device that `auto`, `cpu`, `cuda` or `cuda:N` stands for; raises `HardwareError`."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise HardwareError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise HardwareError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise HardwareError(f"--device {name}: this machine has {count} CUDA devices; use --device cpu, or auto")
    return torch.device("cuda", device.index or 0)


def computes_bf16(device: torch.device) -> bool:
    """Returns whether the device has bfloat16 matrix instructions (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="ascii", errors="replace") if cpuinfo.is_file() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def device_name(device: torch.device) -> str:
    """Returns the device as a person would call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that the memory does not suffice: PyTorch's, or a library's own allocation."""
    marks = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(mark in str(error) for mark in marks)


@contextmanager
def out_of_memory_told(subject: str, remedy: str) -> Iterator[None]:
    """Turns the end of the memory, the GPU's or the machine's, into a `HardwareError` with what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).strip().splitlines() or ["out of memory"]
        raise HardwareError(f"{subject}: the memory does not suffice ({text[0][:200]}); try {remedy}") from None
