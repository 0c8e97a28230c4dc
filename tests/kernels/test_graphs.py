"""Laws of batches that are recorded: the gradients are the loss's own. Playing them is tested on a GPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipes.batch import Batch, Sample
from llmrecipes.data.loaders import padded_batch
from llmrecipes.kernels.graphs import Replayed
from llmrecipes.precision import Precision
from llmrecipes.training.loss import loss_sum

FLOAT32 = Precision(torch.device("cpu"), torch.float32, torch.float32, loss_scaling=False)

Build = Callable[..., Any]
Samples = Callable[..., list[Sample]]


class OnCPU(Replayed):
    """Stands for the GPU: a record computes anew."""

    def _record(self, model: Any, batch: Batch, precision: Precision) -> Any:
        return SimpleNamespace(play=lambda given: self._computed(model, given, precision))


@pytest.mark.parametrize("unused", [False, True])
def test_loss_and_gradients_are_those_of_the_loss(unused: bool, tiny_model: Build, random_samples: Samples) -> None:
    model = tiny_model()
    parameters = list(model.parameters()) + ([torch.nn.Parameter(torch.zeros(2))] if unused else [])
    refreshed = []
    replayed = OnCPU(loss_sum, parameters, lambda: refreshed.append(True))
    for seed in (0, 0, 1):  # computed, recorded and played, another shape
        batch = padded_batch([random_samples(3, seed=seed)])
        found = replayed(model, batch, FLOAT32)
        expected = loss_sum(model, batch, FLOAT32)
        assert torch.equal(found, expected)
        gradients = torch.autograd.grad(found / 3, parameters, allow_unused=True)
        for one, other in zip(gradients, torch.autograd.grad(expected / 3, parameters, allow_unused=True), strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.allclose(one, other, rtol=1e-3, atol=1e-6)
    assert (len(refreshed), len(replayed.seen), len(replayed.records)) == (3, 2, 1)
    with torch.no_grad():
        assert torch.equal(replayed(model, batch, FLOAT32), loss_sum(model, batch, FLOAT32))
    assert len(refreshed) == 3  # nothing is recorded where no gradient is wanted


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_records_are_given_up_where_the_memory_does_not_suffice_beside_them(
    wants_gradient: bool, tiny_model: Build, random_samples: Samples
) -> None:
    def loss(model: Any, batch: Batch, precision: Precision) -> torch.Tensor:
        if replayed.records and batch is other:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss_sum(model, batch, precision)

    model = tiny_model()
    replayed = OnCPU(loss, list(model.parameters()), lambda: None)
    batch, other = (padded_batch([random_samples(3, seed=seed)]) for seed in (0, 1))
    for _ in range(2):
        replayed(model, batch, FLOAT32)
    assert replayed.records
    for _ in range(2):
        with torch.set_grad_enabled(wants_gradient):
            assert torch.equal(replayed(model, other, FLOAT32), loss_sum(model, other, FLOAT32))
        assert not replayed.records
        replayed(model, batch, FLOAT32)  # for good


def test_what_does_not_fit_without_records_either_is_told() -> None:
    def loss(model: Any, batch: Batch, precision: Precision) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    replayed = OnCPU(loss, [torch.nn.Parameter(torch.zeros(1))], lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        replayed(None, padded_batch([]), FLOAT32)
