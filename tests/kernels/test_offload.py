"""Laws of layers' inputs in the host's memory: they come back, and take no more places than are in use at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from llmrecipes.kernels import offload
from llmrecipes.kernels.offload import HostMemory


class OnCPU(HostMemory):
    """Copies at once."""

    @contextmanager
    def copying(self, device: torch.device) -> Iterator[None]:
        yield


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All places that are ever made."""
    made: list[torch.Tensor] = []

    def plain(x: torch.Tensor) -> torch.Tensor:
        made.append(torch.empty(x.numel(), dtype=x.dtype))
        return made[-1]

    monkeypatch.setattr(offload, "pinned", plain)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def there_and_back(memory: HostMemory, rows: int, dtype: torch.dtype = torch.float32) -> None:
    inputs = [torch.randn(rows, 8).to(dtype) for _ in range(4)]
    stored = [memory.store(x) for x in inputs]
    for each, x in zip(reversed(stored), reversed(inputs), strict=True):
        assert torch.equal(each.take(), x)


def test_what_is_stored_comes_back_and_places_are_used_again(places: list[torch.Tensor]) -> None:
    memory = OnCPU()
    for rows in (20, 20, 7, 20):
        there_and_back(memory, rows)
    assert len(places) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_many_lengths_hold_no_more_than_the_longest_wants(
    dtype: torch.dtype, places: list[torch.Tensor]
) -> None:
    memory = OnCPU()
    there_and_back(memory, 3)
    for rows in (*range(5, 30), 11):
        there_and_back(memory, rows, dtype)
    assert len(memory._idle) == 4 and {place.numel() for place in memory._idle} == {29 * 8}


def test_places_of_a_recorded_computation_stay(places: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = OnCPU()
    there_and_back(memory, 9)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    there_and_back(memory, 9)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    there_and_back(memory, 12)
    assert {id(place) for place in memory._recorded} == {id(place) for place in places[:4]}
