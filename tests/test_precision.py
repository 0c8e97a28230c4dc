"""Laws of precision: what the flags come to on a machine, and what it cannot do, in words."""

import pytest
import torch

from llmrecipes.errors import HardwareError
from llmrecipes.precision import (
    Precision,
    computes_bf16,
    device_name,
    out_of_memory_told,
    resolve_device,
    resolve_precision,
)

CPU = torch.device("cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("flags", "expected", "name"),
    [
        ({"mixed_precision": False}, Precision(CPU, FP32, FP32, loss_scaling=False), "fp32"),
        ({"mixed_precision": True}, Precision(CPU, BF16, FP32, loss_scaling=False), "bf16"),
        ({"mixed_precision": None, "use_fp16": True}, Precision(CPU, FP16, FP32, loss_scaling=True), "fp16"),
        ({"mixed_precision": None, "pure_bf16": True}, Precision(CPU, BF16, BF16, loss_scaling=False), "bf16"),
    ],
)
def test_what_the_flags_come_to(flags: dict[str, bool], expected: Precision, name: str) -> None:
    found = resolve_precision("cpu", **{"use_fp16": False, **flags})  # type: ignore[arg-type]
    assert found == expected and found.name == name


def test_left_open_it_is_bfloat16_where_the_machine_computes_in_it() -> None:
    found = resolve_precision("cpu", mixed_precision=None, use_fp16=False)
    assert found.compute == (BF16 if computes_bf16(CPU) else FP32)


@pytest.mark.parametrize(
    ("compute", "trained", "product"), [(FP32, FP32, FP32), (BF16, FP32, BF16), (FP16, FP32, FP16), (BF16, BF16, FP32)]
)
def test_matmuls_run_in_the_compute_type(compute: torch.dtype, trained: torch.dtype, product: torch.dtype) -> None:
    # With one type throughout nothing is cast: float32 inputs then stay what they are.
    matrix = torch.ones(2, 2)
    with Precision(CPU, compute, trained, loss_scaling=False).autocast():
        assert (matrix @ matrix).dtype == product


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "mps:0:1", "cpu cuda"])
def test_a_device_that_is_none_is_told(name: str) -> None:
    with pytest.raises(HardwareError, match=f"--device {name}: expected auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_gpu_that_is_not_there_is_told() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(HardwareError, match=f"--device cuda:{count}: this machine has {count} CUDA devices"):
        resolve_device(f"cuda:{count}")


def test_auto_is_a_gpu_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == CPU
    assert device_name(CPU) == f"CPU, {torch.get_num_threads()} threads"


def test_the_end_of_the_memory_is_told_and_other_errors_are_not_touched() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        told = pytest.raises(HardwareError, match="training: the memory does not suffice .*; try less")
        with told, out_of_memory_told("training", "less"):
            raise error
    with pytest.raises(HardwareError, match="the memory does not suffice"), out_of_memory_told("training", "less"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="size mismatch"), out_of_memory_told("training", "less"):
        raise RuntimeError("size mismatch")
