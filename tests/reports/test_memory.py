"""The peak memory is the process's own."""

import pytest
import torch

from llmrecipes.reports.memory import peak_memory_bytes

TAKEN = 256 * 2**20


def test_the_peak_rises_by_what_is_taken_and_stays() -> None:
    before = peak_memory_bytes("cpu")
    tensor = torch.ones(TAKEN, dtype=torch.uint8)
    taken = peak_memory_bytes(torch.device("cpu"))
    del tensor
    assert 10 * 2**20 < before < 64 * 2**30
    # An earlier test may have reached a higher peak that has been freed since.
    assert taken >= before
    assert taken >= TAKEN
    assert peak_memory_bytes("cpu") >= taken


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_gpu_is_that_of_its_tensors() -> None:
    torch.cuda.reset_peak_memory_stats()
    tensor = torch.ones(TAKEN, dtype=torch.uint8, device="cuda")
    del tensor
    assert TAKEN <= peak_memory_bytes("cuda") < 4 * TAKEN
